package restore

import (
	"fmt"
	"path"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/pgark/terraform-provider-pgark/internal/engine/repository"
)

// Roles of volumes (repository.Volume.Role).
const (
	roleData       = "data"
	roleWAL        = "wal"
	roleTablespace = "tablespace"
	roleConfig     = "config"
)

// controlFile is written last: without it PostgreSQL does not start.
const controlFile = "global/pg_control"

// walLink is where the data directory has its WAL, or a link to it.
const walLink = "pg_wal"

// layout says where each volume and file of an image goes.
type layout struct {
	manifest *repository.Manifest
	data     string
	wal      string   // "" unless the WAL directory lies elsewhere
	roots    []string // by volume: the directory it goes to; "" for volumes that are not restored as such
	places   []tablespacePlace
	notes    []string // what a person should know
}

// tablespacePlace is where a tablespace was and where it goes.
type tablespacePlace struct {
	volume int
	oid    uint32
	link   string // what pg_tblspc/<oid> said
	path   string // where that led
	to     string
}

// newLayout decides where everything goes. mapping gives tablespaces, by their old directory, a new one.
func newLayout(m *repository.Manifest, data, wal string, mapping map[string]string) (*layout, error) {
	l := &layout{manifest: m, data: data, wal: wal, roots: make([]string, len(m.Volumes))}
	wanted := map[string]string{}
	for old, to := range mapping {
		wanted[filepath.Clean(old)] = filepath.Clean(to)
	}
	links := map[string]string{} // by OID
	for i := range m.Files {
		f := &m.Files[i]
		if f.Volume < 0 || f.Volume >= len(m.Volumes) || !filepath.IsLocal(filepath.FromSlash(f.Path)) {
			return nil, fmt.Errorf("manifest of image %s: file %q of volume %d: expected a path inside one of %d volumes", m.SID, f.Path, f.Volume, len(m.Volumes))
		}
		if m.Volumes[f.Volume].Role == roleData && f.Type == repository.Symlink && path.Dir(f.Path) == "pg_tblspc" {
			links[path.Base(f.Path)] = f.Link
		}
	}
	used := map[string]bool{}
	for i, v := range m.Volumes {
		switch v.Role {
		case roleData:
			l.roots[i] = data
		case roleWAL:
			l.roots[i] = filepath.Join(data, walLink)
			if wal != "" {
				l.roots[i] = wal
			}
		case roleTablespace:
			p := tablespacePlace{volume: i, oid: v.OID, link: links[strconv.FormatUint(uint64(v.OID), 10)], path: v.Path}
			if p.link == "" {
				p.link = p.path
			}
			p.to = p.link
			for _, old := range []string{p.link, p.path} {
				if to, ok := wanted[filepath.Clean(old)]; ok {
					p.to = to
					used[filepath.Clean(old)] = true
					break
				}
			}
			// A tablespace inside the data directory, which PostgreSQL warns of, moves with it.
			if rel, err := filepath.Rel(m.DataDirectory, p.to); err == nil && filepath.IsLocal(rel) && p.to == p.link {
				p.to = filepath.Join(data, rel)
			}
			if !filepath.IsAbs(p.to) {
				return nil, fmt.Errorf("tablespace %d: directory %q: expected an absolute path", v.OID, p.to)
			}
			l.roots[i] = p.to
			l.places = append(l.places, p)
		case roleConfig:
			// files: they go into the data directory one by one
		default:
			l.notes = append(l.notes, fmt.Sprintf("volume %s (%s) is left out: this build does not know its role", v.Path, v.Role))
		}
	}
	for old := range wanted {
		if !used[old] {
			return nil, fmt.Errorf("tablespace mapping %s: no tablespace of the image was there, found %s", old, l.tablespaceList())
		}
	}
	if l.index(roleData) < 0 {
		return nil, fmt.Errorf("manifest of image %s: no data directory in it", m.SID)
	}
	return l, l.disjoint()
}

func (l *layout) tablespaceList() string {
	if len(l.places) == 0 {
		return "none"
	}
	names := make([]string, len(l.places))
	for i, p := range l.places {
		names[i] = p.link
	}
	return strings.Join(names, ", ")
}

func (l *layout) index(role string) int {
	return slices.IndexFunc(l.manifest.Volumes, func(v repository.Volume) bool { return v.Role == role })
}

// disjoint refuses directories that would be filled by two volumes. A tablespace inside the data directory is fine.
func (l *layout) disjoint() error {
	seen := map[string]string{l.data: "data directory"}
	add := func(what, dir string) error {
		if other, ok := seen[dir]; ok {
			return fmt.Errorf("%s: directory %s is that of the %s, too", what, dir, other)
		}
		if rel, err := filepath.Rel(dir, l.data); err == nil && filepath.IsLocal(rel) {
			return fmt.Errorf("%s: directory %s contains the data directory", what, dir)
		}
		seen[dir] = what
		return nil
	}
	if l.wal != "" {
		if err := add("WAL directory", l.wal); err != nil {
			return err
		}
	}
	for _, p := range l.places {
		if err := add(fmt.Sprintf("tablespace %d", p.oid), p.to); err != nil {
			return err
		}
	}
	return nil
}

// placed is one file to be written.
type placed struct {
	file *repository.File
	root string // an absolute directory
	name string // below root
	link string // what a symbolic link says, which may be another than the image's
}

// files lists what to write, parents before children, without global/pg_control.
func (l *layout) files() (all []placed, control *placed, err error) {
	taken := map[string]bool{}    // paths in the data directory
	linked := map[string]string{} // absolute path of a configuration file → the link in the data directory that led to it
	for i := range l.manifest.Files {
		f := &l.manifest.Files[i]
		if l.manifest.Volumes[f.Volume].Role != roleData {
			continue
		}
		if f.Type == repository.Symlink && strings.HasSuffix(f.Path, ".conf") && l.hasConfig(f.Link) {
			linked[path.Clean(f.Link)] = f.Path
			continue
		}
		taken[f.Path] = true
	}
	hasWAL := l.index(roleWAL) >= 0
	for i := range l.manifest.Files {
		f := &l.manifest.Files[i]
		p := placed{file: f, root: l.roots[f.Volume], name: f.Path, link: f.Link}
		switch l.manifest.Volumes[f.Volume].Role {
		case roleConfig:
			if skipConfig(f.Path) {
				continue
			}
			if name, ok := linked[path.Join(l.manifest.Volumes[f.Volume].Path, f.Path)]; ok {
				p.name = name
			}
			if taken[f.Path] {
				l.notes = append(l.notes, fmt.Sprintf("%s is left out: the data directory has a %s of its own",
					path.Join(l.manifest.Volumes[f.Volume].Path, f.Path), f.Path))
				continue
			}
			p.root = l.data
		case roleData:
			switch {
			case f.Path == controlFile:
				control = &p
				continue
			case f.Type == repository.Symlink && linked[path.Clean(f.Link)] == f.Path:
				continue // the file itself takes its place
			case f.Path == "standby.signal", f.Path == "recovery.signal", f.Path == "backup_label", f.Path == "tablespace_map", f.Path == "current_logfiles", f.Path == markerName:
				continue // of the cluster's past: recovery has its own
			case f.Path == walLink && f.Type == repository.Symlink:
				if l.wal == "" {
					continue // a plain directory: the WAL volume's root, or made with the directories that must be there
				}
				p.link = l.wal
			case f.Path == walLink && l.wal != "":
				// The plain directory moves out; a link takes its place.
				link := *f
				link.Type = repository.Symlink
				p.file, p.link = &link, l.wal
				if !hasWAL {
					all = append(all, p)
					p = placed{file: f, root: l.wal, name: "."}
				}
			case strings.HasPrefix(f.Path, walLink+"/") && l.wal != "":
				p.root, p.name = l.wal, strings.TrimPrefix(f.Path, walLink+"/")
			case f.Type == repository.Symlink && path.Dir(f.Path) == "pg_tblspc":
				for _, t := range l.places {
					if path.Base(f.Path) == strconv.FormatUint(uint64(t.oid), 10) {
						p.link = t.to
					}
				}
			}
		default:
			if p.root == "" {
				continue
			}
		}
		all = append(all, p)
	}
	if control == nil {
		return nil, nil, fmt.Errorf("manifest of image %s: no %s in it", l.manifest.SID, controlFile)
	}
	return all, control, nil
}

// hasConfig tells whether the image holds the file as configuration outside the data directory.
func (l *layout) hasConfig(name string) bool {
	if !path.IsAbs(name) {
		return false
	}
	for i := range l.manifest.Files {
		f := &l.manifest.Files[i]
		v := l.manifest.Volumes[f.Volume]
		if v.Role == roleConfig && f.Type == repository.RegularFile && path.Join(v.Path, f.Path) == path.Clean(name) {
			return true
		}
	}
	return false
}

// skipConfig tells of files in a configuration directory that mean nothing inside a data directory: Debian's own, and
// the directory itself.
func skipConfig(name string) bool {
	switch name {
	case ".", "environment", "pg_ctl.conf", "start.conf":
		return true
	}
	return false
}

// tablespaceMap gives the tablespaces of the image's tablespace_map their places. Where none moved it is the same, byte
// for byte. PostgreSQL makes the links of pg_tblspc from it when recovery starts (xlogrecovery.c, read_tablespace_map):
// a line is the OID, a space, and the path, in which line ends and backslashes are escaped by a backslash.
func (l *layout) tablespaceMap() string {
	to := map[string]string{}
	for _, p := range l.places {
		if p.to != p.link {
			to[strconv.FormatUint(uint64(p.oid), 10)] = p.to
		}
	}
	if len(to) == 0 {
		return l.manifest.TablespaceMap
	}
	var out, line strings.Builder
	flush := func(end string) {
		s := line.String()
		line.Reset()
		oid, _, ok := strings.Cut(s, " ")
		if place, moved := to[oid]; ok && moved {
			s = oid + " " + strings.NewReplacer("\\", "\\\\", "\n", "\\\n", "\r", "\\\r").Replace(place)
		}
		out.WriteString(s + end)
	}
	escaped := false
	for _, c := range []byte(l.manifest.TablespaceMap) {
		if c == '\n' && !escaped {
			flush("\n")
			continue
		}
		escaped = c == '\\' && !escaped
		line.WriteByte(c)
	}
	if line.Len() > 0 {
		flush("")
	}
	return out.String()
}
