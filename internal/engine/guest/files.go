//go:build linux

package guest

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/user"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
)

// account is an operating system user.
type account struct {
	name   string
	uid    int
	gid    int
	groups []int // supplementary ones included
}

func (a account) String() string {
	if a.name != "" {
		return a.name
	}
	return strconv.Itoa(a.uid)
}

// lookupAccount finds a user by name or number. A number without a name is a user too: containers have such.
func lookupAccount(name string) (account, error) {
	u, err := user.Lookup(name)
	if err != nil {
		uid, numeric := strconv.Atoi(name)
		if numeric != nil {
			return account{}, fmt.Errorf("operating system user %q: %w", name, err)
		}
		var nameless error
		if u, nameless = user.LookupId(name); nameless != nil {
			return account{uid: uid, gid: uid, groups: []int{uid}}, nil //nolint:nilerr // no name is no error
		}
	}
	a := account{name: u.Username}
	if a.uid, err = strconv.Atoi(u.Uid); err != nil {
		return account{}, fmt.Errorf("operating system user %q: found uid %q, expected a number", name, u.Uid)
	}
	if a.gid, err = strconv.Atoi(u.Gid); err != nil {
		return account{}, fmt.Errorf("operating system user %q: found gid %q, expected a number", name, u.Gid)
	}
	a.groups = []int{a.gid}
	if ids, err := u.GroupIds(); err == nil { // a directory service that is away costs the supplementary groups
		for _, id := range ids {
			if gid, err := strconv.Atoi(id); err == nil && gid != a.gid {
				a.groups = append(a.groups, gid)
			}
		}
	}
	return a, nil
}

// status is what stat(2) says of a file. Only file systems that are not the machine's give something else.
func status(info fs.FileInfo) *syscall.Stat_t {
	st, ok := info.Sys().(*syscall.Stat_t)
	if !ok {
		panic(fmt.Sprintf("guest: internal error: stat of %s is a %T", info.Name(), info.Sys()))
	}
	return st
}

// ownerOf is the name of a file's owner, or its number where it has no name.
func ownerOf(info fs.FileInfo) string {
	uid := strconv.Itoa(int(status(info).Uid))
	if u, err := user.LookupId(uid); err == nil {
		return u.Username
	}
	return uid
}

// Permission bits as access(2) counts them.
const (
	mayRead    = 4
	mayWrite   = 2
	mayExecute = 1
)

// may judges by owner, group and mode whether the account may use a file as wanted. It does not see access control
// lists, so a no is worth a message, not a proof.
func (a account) may(info fs.FileInfo, wanted fs.FileMode) bool {
	if a.uid == 0 {
		return true
	}
	st := status(info)
	mode := info.Mode().Perm()
	switch {
	case int(st.Uid) == a.uid:
		mode >>= 6
	case slices.Contains(a.groups, int(st.Gid)):
		mode >>= 3
	}
	return mode&wanted == wanted
}

// mayReach returns the first directory on the way to path, path itself excluded, that the account may not pass; ""
// if there is none.
func (a account) mayReach(path string) (blocked string, err error) {
	for dir := filepath.Dir(path); ; dir = filepath.Dir(dir) {
		info, err := os.Stat(dir)
		if err != nil {
			return "", err
		}
		if !a.may(info, mayExecute) {
			blocked = dir // the one highest up is what a person changes first
		}
		if dir == filepath.Dir(dir) {
			return blocked, nil
		}
	}
}

// existing returns path or, where it does not exist, the nearest directory above it that does.
func existing(path string) string {
	for {
		if _, err := os.Stat(path); err == nil || path == filepath.Dir(path) {
			return path
		}
		path = filepath.Dir(path)
	}
}

// writeFile makes path hold content, durably and at once: a reader sees the old content or the new. What is as wanted
// already is left alone, and changed is false.
func writeFile(path string, content []byte, mode fs.FileMode, owner account) (changed bool, err error) {
	if sameFile(path, content, mode, owner) {
		return false, nil
	}
	dir := filepath.Dir(path)
	f, err := os.CreateTemp(dir, "."+filepath.Base(path)+".*") // refuses to follow what somebody left there
	if err != nil {
		return false, err
	}
	defer func() {
		if err != nil {
			f.Close()
			_ = os.Remove(f.Name())
		}
	}()
	if err = chown(f.Name(), owner); err != nil {
		return false, err
	}
	if err = f.Chmod(mode); err != nil {
		return false, err
	}
	if _, err = f.Write(content); err != nil {
		return false, err
	}
	if err = f.Sync(); err != nil {
		return false, err
	}
	if err = f.Close(); err != nil {
		return false, err
	}
	if err = os.Rename(f.Name(), path); err != nil {
		return false, err
	}
	return true, syncDirectory(dir)
}

func sameFile(path string, content []byte, mode fs.FileMode, owner account) bool {
	info, err := os.Lstat(path)
	if err != nil || info.Mode() != mode || int(status(info).Uid) != owner.uid || info.Size() != int64(len(content)) {
		return false
	}
	there, err := os.ReadFile(path)
	return err == nil && bytes.Equal(there, content)
}

// switchLink makes the symbolic link point at target, durably and at once.
func switchLink(link, target string) error {
	if there, err := os.Readlink(link); err == nil && there == target {
		return nil
	}
	if info, err := os.Lstat(link); err == nil && info.Mode()&fs.ModeSymlink == 0 {
		return fmt.Errorf("%s: found a file that is not ours, expected a symbolic link", link)
	}
	temp := fmt.Sprintf("%s.%d.new", link, os.Getpid())
	_ = os.Remove(temp) // left by a process of that number
	if err := os.Symlink(target, temp); err != nil {
		return err
	}
	if err := os.Rename(temp, link); err != nil {
		_ = os.Remove(temp)
		return err
	}
	return syncDirectory(filepath.Dir(link))
}

// makeDirectory makes path with mode and owner. Directories above it that are missing are made for everybody to pass.
func makeDirectory(path string, mode fs.FileMode, owner account) error {
	if err := makeParents(filepath.Dir(path)); err != nil {
		return err
	}
	if err := os.Mkdir(path, mode); err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	info, err := os.Lstat(path)
	if err != nil {
		return err
	}
	if !info.IsDir() {
		return fmt.Errorf("%s: found no directory", path)
	}
	if int(status(info).Uid) != owner.uid {
		if err := chown(path, owner); err != nil {
			return err
		}
	}
	if info.Mode().Perm() != mode { // the umask takes away
		return os.Chmod(path, mode)
	}
	return nil
}

func makeParents(dir string) error {
	if _, err := os.Stat(dir); !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if err := makeParents(filepath.Dir(dir)); err != nil {
		return err
	}
	if err := os.Mkdir(dir, 0o755); err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	return os.Chmod(dir, 0o755)
}

// chown gives a path to owner. Who is not root owns what they make.
func chown(path string, owner account) error {
	if os.Geteuid() != 0 {
		return nil
	}
	return os.Lchown(path, owner.uid, owner.gid)
}

func syncDirectory(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer d.Close()
	return d.Sync()
}

// prune removes dir and the directories above it as far as they are empty, up to but not including stop.
func prune(dir, stop string) error {
	for ; dir != stop && strings.HasPrefix(dir, stop) && dir != filepath.Dir(dir); dir = filepath.Dir(dir) {
		err := os.Remove(dir)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if errors.Is(err, syscall.ENOTEMPTY) || errors.Is(err, syscall.EEXIST) || errors.Is(err, syscall.EBUSY) {
			return nil
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// tail returns the last lines of a file, n bytes at most; "" where there is none.
func tail(path string, n int64) string {
	f, err := os.Open(path)
	if err != nil {
		return ""
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return ""
	}
	from := max(0, info.Size()-n)
	b := make([]byte, info.Size()-from)
	read, _ := f.ReadAt(b, from)
	b = b[:read]
	if i := bytes.IndexByte(b, '\n'); from > 0 && i >= 0 {
		b = b[i+1:]
	}
	return strings.TrimRight(string(b), "\n")
}
