package restore

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/user"
	"path/filepath"
	"strconv"
	"syscall"

	"github.com/pgark/terraform-provider-pgark/internal/engine/repository"
)

// ids are a user and a group.
type ids struct{ uid, gid int }

// ownership decides who owns what is restored. Only root can give files away; anybody else owns them all.
type ownership struct {
	root   bool
	all    *ids // whoever the data directory was prepared for owns everything
	data   ids  // of the data directory
	users  map[string]int
	groups map[string]int
}

// newOwnership looks at who runs, at a data directory that is there already, and at the image's.
func newOwnership(data string, m *repository.Manifest) (*ownership, error) {
	o := &ownership{root: os.Geteuid() == 0, users: map[string]int{}, groups: map[string]int{}}
	o.data = ids{os.Geteuid(), os.Getegid()}
	if !o.root {
		return o, nil
	}
	if st, err := os.Stat(data); err == nil {
		if s, ok := st.Sys().(*syscall.Stat_t); ok && s.Uid != 0 {
			o.all = &ids{int(s.Uid), int(s.Gid)}
			o.data = *o.all
			return o, nil
		}
	}
	for i := range m.Files {
		f := &m.Files[i]
		if f.Path == "." && m.Volumes[f.Volume].Role == roleData {
			o.data = o.of(f)
		}
	}
	if o.data.uid == 0 {
		return nil, fmt.Errorf("restore as root: PostgreSQL does not run as root, and the image does not tell another owner; make %s and give it to the user that shall run the server", data)
	}
	return o, nil
}

// of is the owner of a restored file: by name where this machine knows the name, since numbers differ between machines,
// else by number.
func (o *ownership) of(f *repository.File) ids {
	if o.all != nil {
		return *o.all
	}
	if !o.root {
		return o.data
	}
	return ids{
		resolve(o.users, f.Owner, f.UID, func(n string) (string, error) {
			u, err := user.Lookup(n)
			if err != nil {
				return "", err
			}
			return u.Uid, nil
		}),
		resolve(o.groups, f.Group, f.GID, func(n string) (string, error) {
			g, err := user.LookupGroup(n)
			if err != nil {
				return "", err
			}
			return g.Gid, nil
		}),
	}
}

func resolve(known map[string]int, name string, number uint32, look func(string) (string, error)) int {
	if name == "" {
		return int(number)
	}
	if n, ok := known[name]; ok && n >= 0 {
		return n
	} else if ok {
		return int(number)
	}
	known[name] = -1 // not known here
	if s, err := look(name); err == nil {
		if n, err := strconv.Atoi(s); err == nil {
			known[name] = n
			return n
		}
	}
	return int(number)
}

// makeDirectory makes a directory with its parents; those that were missing get the data directory's owner.
func (o *ownership) makeDirectory(dir string) error {
	var missing []string
	for d := dir; ; d = filepath.Dir(d) {
		_, err := os.Stat(d)
		if err == nil {
			break
		}
		if !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		missing = append(missing, d)
	}
	for i := len(missing) - 1; i >= 0; i-- {
		mode := fs.FileMode(0o755)
		if i == 0 {
			mode = 0o700
		}
		if err := os.Mkdir(missing[i], mode); err != nil {
			return err
		}
		if o.root {
			if err := os.Chown(missing[i], o.data.uid, o.data.gid); err != nil {
				return err
			}
		}
		if err := syncDirectory(filepath.Dir(missing[i])); err != nil {
			return err
		}
	}
	return nil
}

// replaceFile writes a file of the data directory, durably and at once: there is the old content or the new. The mode
// is what PostgreSQL gives its own files, readable by the group where the directory is.
func (o *ownership) replaceFile(name string, content []byte) error {
	dir := filepath.Dir(name)
	st, err := os.Stat(dir)
	if err != nil {
		return err
	}
	mode := fs.FileMode(0o600)
	if st.Mode().Perm()&0o050 == 0o050 {
		mode = 0o640
	}
	temp := name + ".pgark"
	f, err := os.OpenFile(temp, os.O_WRONLY|os.O_CREATE|os.O_TRUNC|syscall.O_NOFOLLOW, mode)
	if err != nil {
		return err
	}
	_, err = f.Write(content)
	if err == nil && o.root {
		err = f.Chown(o.data.uid, o.data.gid)
	}
	if err == nil {
		err = f.Chmod(mode)
	}
	if err == nil {
		err = f.Sync()
	}
	if e := f.Close(); err == nil {
		err = e
	}
	if err == nil {
		err = os.Rename(temp, name)
	}
	if err != nil {
		_ = os.Remove(temp) // the error that led here says more
		return err
	}
	return syncDirectory(dir)
}

func syncDirectory(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	err = d.Sync()
	if e := d.Close(); err == nil {
		err = e
	}
	return err
}
