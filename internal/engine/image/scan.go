package image

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"os/user"
	"path"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/pgark/terraform-provider-pgark/internal/engine/postgres"
	"github.com/pgark/terraform-provider-pgark/internal/engine/repository"
)

// Roles of volumes (repository.Volume.Role).
const (
	roleData       = "data"
	roleWAL        = "wal"
	roleTablespace = "tablespace"
	roleConfig     = "config"
)

// volume is a directory tree of the image and how it is walked.
type volume struct {
	repository.Volume
	key       string // names the volume across images: its role, and the tablespace's OID or the configuration's path
	trustStat bool   // false on file systems whose times another machine's clock makes
}

// entry is one file of the image on its way through the pipeline.
type entry struct {
	file   repository.File
	full   string // where to read it
	follow bool   // full is a symbolic link that the image resolves

	relation   bool
	firstBlock uint32 // of the file within its fork: where page checksums count from

	volumeKey string // of its volume
	trustStat bool   // of its volume
	optional  bool   // an image without it is still whole: configuration outside the data directory

	counted int64 // bytes that progress has seen of it
	gone    bool  // vanished since it was listed
}

// inventory is what there is to copy.
type inventory struct {
	volumes []volume
	entries []*entry
	skipped int // entries of configuration directories that could not be read
}

// scanner lists the volumes of an instance.
type scanner struct {
	inventory
	ctx    context.Context
	log    *slog.Logger
	owners map[uint32]string
	groups map[uint32]string

	segmentBlocks    uint32
	versionDirectory string // of the cluster in its tablespaces
}

// scan lists all that belongs into an image: the data directory, the tablespaces that pg_tblspc links to, the WAL
// directory where it lies elsewhere (without contents: WAL comes from the repository), and the configuration files
// outside the data directory. What basebackup.c leaves out is left out. It must run after backup start: what is
// created later is in the WAL that the image needs.
func scan(ctx context.Context, dataDirectory string, major int, control *postgres.Control, configFiles []string, log *slog.Logger) (*inventory, error) {
	s := &scanner{
		ctx: ctx, log: log, owners: make(map[uint32]string), groups: make(map[uint32]string),
		segmentBlocks:    control.RelationSegmentSize,
		versionDirectory: postgres.TablespaceVersionDirectory(major, control.CatalogVersion),
	}
	data, err := s.addVolume(roleData, dataDirectory, 0)
	if err != nil {
		return nil, fmt.Errorf("data directory: %w", err)
	}
	if err := s.walkRoot(data); err != nil {
		return nil, err
	}
	if err := s.scanConfig(configFiles); err != nil {
		return nil, err
	}
	return &s.inventory, nil
}

func (s *scanner) addVolume(role, root string, oid uint32) (int, error) {
	v := volume{Volume: repository.Volume{Role: role, Path: root, OID: oid}, key: role, trustStat: true}
	switch role {
	case roleTablespace:
		v.key += ":" + strconv.FormatUint(uint64(oid), 10)
	case roleConfig:
		v.key += ":" + root
	}
	var st unix.Statfs_t
	if err := unix.Statfs(root, &st); err != nil {
		return 0, &fs.PathError{Op: "statfs", Path: root, Err: err}
	}
	v.SizeBytes = int64(st.Blocks) * st.Bsize
	v.UsedBytes = int64(st.Blocks-st.Bfree) * st.Bsize
	v.trustStat = !remoteFileSystem(st.Type)
	v.Device, v.FileSystem = mountOf(root)
	s.volumes = append(s.volumes, v)
	return len(s.volumes) - 1, nil
}

// remoteFileSystem tells whether another machine, or a program, sets a file's times. A server whose clock runs behind
// could make a file look quiet that has just been written.
func remoteFileSystem(magic int64) bool {
	const (
		smb1, smb2, cifs = 0x517b, 0xfe534d42, 0xff534d42
		fuse             = 0x65735546
		nfs              = 0x6969
		ninep            = 0x01021997
		ceph             = 0x00c36400
		afs              = 0x5346414f
	)
	return slices.Contains([]int64{smb1, smb2, cifs, fuse, nfs, ninep, ceph, afs}, magic&0xffffffff)
}

// mountOf finds what is mounted where name lies, from /proc/self/mountinfo; empty where that cannot be read.
func mountOf(name string) (device, fileSystem string) {
	if resolved, err := filepath.EvalSymlinks(name); err == nil {
		name = resolved
	}
	b, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return "", ""
	}
	longest := -1
	for line := range strings.Lines(string(b)) {
		// 36 35 98:0 /mnt1 /mnt2 rw,noatime master:1 - ext3 /dev/root rw,errors=continue (proc_pid_mountinfo(5))
		left, right, ok := strings.Cut(line, " - ")
		l, r := strings.Fields(left), strings.Fields(right)
		if !ok || len(l) < 5 || len(r) < 2 {
			continue
		}
		point := unescapeMount(l[4])
		// Of several mounts on one point the last is the one that shows.
		if len(point) >= longest && within(name, point) {
			longest, device, fileSystem = len(point), unescapeMount(r[1]), r[0]
		}
	}
	return device, fileSystem
}

// unescapeMount decodes the octal escapes of mountinfo.
func unescapeMount(s string) string {
	if !strings.Contains(s, `\`) {
		return s
	}
	return strings.NewReplacer(`\040`, " ", `\011`, "\t", `\012`, "\n", `\134`, `\`).Replace(s)
}

// within tells whether name is directory or lies below it. Both are clean.
func within(name, directory string) bool {
	return name == directory || directory == "/" || strings.HasPrefix(name, directory+"/")
}

// add takes an entry into the image.
func (s *scanner) add(v int, rel, full string, st *unix.Stat_t) *entry {
	of := &s.volumes[v]
	e := &entry{
		full: full, file: repository.File{Volume: v, Path: rel},
		volumeKey: of.key, trustStat: of.trustStat, optional: of.Role == roleConfig,
	}
	e.setStat(st)
	e.file.Owner, e.file.Group = s.owner(st.Uid), s.group(st.Gid)
	s.entries = append(s.entries, e)
	return e
}

func (e *entry) setStat(st *unix.Stat_t) {
	e.file.Mode, e.file.UID, e.file.GID = st.Mode&0o7777, st.Uid, st.Gid
	e.file.ModTime = st.Mtim.Nano()
	switch st.Mode & unix.S_IFMT {
	case unix.S_IFDIR:
		e.file.Type = repository.Directory
	case unix.S_IFLNK:
		e.file.Type = repository.Symlink
	case unix.S_IFREG:
		e.file.Type, e.file.Size = repository.RegularFile, st.Size
	}
}

func (s *scanner) owner(id uint32) string {
	name, ok := s.owners[id]
	if !ok {
		if u, err := user.LookupId(strconv.FormatUint(uint64(id), 10)); err == nil {
			name = u.Username
		}
		s.owners[id] = name
	}
	return name
}

func (s *scanner) group(id uint32) string {
	name, ok := s.groups[id]
	if !ok {
		if g, err := user.LookupGroupId(strconv.FormatUint(uint64(id), 10)); err == nil {
			name = g.Name
		}
		s.groups[id] = name
	}
	return name
}

// walkRoot lists a volume from its root, which may be reached through a symbolic link.
func (s *scanner) walkRoot(v int) error {
	root := s.volumes[v].Path
	var st unix.Stat_t
	if err := unix.Stat(root, &st); err != nil {
		return &fs.PathError{Op: "stat", Path: root, Err: err}
	}
	if st.Mode&unix.S_IFMT != unix.S_IFDIR {
		return &fs.PathError{Op: "list", Path: root, Err: unix.ENOTDIR}
	}
	s.add(v, ".", root, &st)
	return s.walk(v, ".", 0)
}

// maxDepth stops a walk that followed links in a circle. PostgreSQL's own files lie four levels deep.
const maxDepth = 100

// walk lists what is in the directory rel of volume v.
func (s *scanner) walk(v int, rel string, depth int) error {
	if err := s.ctx.Err(); err != nil {
		return context.Cause(s.ctx)
	}
	root, role := s.volumes[v].Path, s.volumes[v].Role
	directory := filepath.Join(root, rel)
	if depth > maxDepth {
		return fmt.Errorf("list %s: more than %d directories deep", directory, maxDepth)
	}
	list, err := os.ReadDir(directory)
	if errors.Is(err, fs.ErrNotExist) && rel != "." {
		return nil // dropped since its parent was listed
	}
	if err != nil {
		if role == roleConfig && errors.Is(err, fs.ErrPermission) {
			s.unreadable(directory, err)
			return nil
		}
		return fmt.Errorf("list %s: %w", directory, err)
	}
	names := make([]string, len(list))
	for i, d := range list {
		names[i] = d.Name()
	}
	var unlogged postgres.InitForks
	if _, _, ok := postgres.ParseRelationDirectory(s.dataPath(v, rel)); ok {
		unlogged = postgres.FindInitForks(slices.Values(names))
	}
	for _, name := range names {
		if unlogged.Excludes(name) {
			continue // its main fork, say: recovery makes it anew from the init fork
		}
		if err := s.visit(v, path.Join(rel, name), depth); err != nil {
			return err
		}
	}
	return nil
}

// dataPath is a path as the data directory's own tree has it, with tablespaces seen through their links; "" for
// configuration.
func (s *scanner) dataPath(v int, rel string) string {
	switch of := &s.volumes[v]; of.Role {
	case roleData:
		return rel
	case roleTablespace:
		return path.Join("pg_tblspc", strconv.FormatUint(uint64(of.OID), 10), rel)
	}
	return ""
}

// ownPlace tells whether PostgreSQL itself keeps data at a path, so that a symbolic link there hides data of the
// cluster. Logs, and what administrators put beside the data, are not.
func ownPlace(dataPath string) bool {
	top, _, _ := strings.Cut(dataPath, "/")
	return top == "base" || top == "global" || strings.HasPrefix(top, "pg_") && top != "pg_log"
}

// visit decides about one directory entry.
func (s *scanner) visit(v int, rel string, depth int) error {
	full, inData := filepath.Join(s.volumes[v].Path, rel), s.dataPath(v, rel)
	class := postgres.KeepPath
	if inData != "" {
		class = postgres.ClassifyPath(inData)
	}
	if rel == "lost+found" || class == postgres.SkipPath || class == postgres.LastPath {
		return nil // pg_control is copied after everything else
	}
	var st unix.Stat_t
	if err := unix.Lstat(full, &st); err != nil {
		if err == unix.ENOENT {
			return nil
		}
		return &fs.PathError{Op: "stat", Path: full, Err: err}
	}
	isLink := st.Mode&unix.S_IFMT == unix.S_IFLNK
	switch {
	case inData == "pg_wal":
		return s.visitWAL(v, full, &st)
	case isLink && path.Dir(inData) == "pg_tblspc":
		return s.visitTablespace(v, rel, full, &st)
	}
	follow := false
	if isLink {
		var target unix.Stat_t
		// PostgreSQL would follow the link to its own data, so that data belongs into the image; a restored link would
		// lead into the running server's files, or nowhere.
		if follow = ownPlace(inData) && unix.Stat(full, &target) == nil; follow {
			st = target
			s.log.Info("following a symbolic link inside the data directory", "path", full)
		}
	}
	switch st.Mode & unix.S_IFMT {
	case unix.S_IFDIR:
		s.add(v, rel, full, &st)
		if class == postgres.EmptyPath {
			return nil
		}
		return s.walk(v, rel, depth+1)
	case unix.S_IFLNK:
		return s.addLink(v, rel, full, &st)
	case unix.S_IFREG:
		e := s.add(v, rel, full, &st)
		e.follow = follow
		var r postgres.RelationFile
		if r, e.relation = postgres.ParseRelationPath(inData); e.relation {
			e.firstBlock = r.FirstBlock(s.segmentBlocks)
		}
		return nil
	}
	s.log.Debug("leaving out a special file", "path", full) // sockets, fifos, devices: nothing to restore
	return nil
}

func (s *scanner) addLink(v int, rel, full string, st *unix.Stat_t) error {
	link, err := os.Readlink(full)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	s.add(v, rel, full, st).file.Link = link
	return nil
}

// visitWAL takes the WAL directory without its contents. PostgreSQL makes archive_status by itself if it is missing
// only since 14, summaries since 17.
func (s *scanner) visitWAL(v int, full string, st *unix.Stat_t) error {
	rel := "pg_wal"
	if st.Mode&unix.S_IFMT == unix.S_IFLNK {
		if err := s.addLink(v, rel, full, st); err != nil {
			return err
		}
		target, err := filepath.EvalSymlinks(full)
		if err != nil {
			return fmt.Errorf("WAL directory: %w", err)
		}
		if v, err = s.addVolume(roleWAL, target, 0); err != nil {
			return fmt.Errorf("WAL directory: %w", err)
		}
		full, rel = target, "."
		if err := unix.Stat(target, st); err != nil {
			return &fs.PathError{Op: "stat", Path: target, Err: err}
		}
	}
	s.add(v, rel, full, st)
	for _, name := range []string{"archive_status", "summaries"} {
		var sub unix.Stat_t
		if unix.Stat(filepath.Join(full, name), &sub) == nil && sub.Mode&unix.S_IFMT == unix.S_IFDIR {
			s.add(v, path.Join(rel, name), filepath.Join(full, name), &sub)
		}
	}
	return nil
}

// visitTablespace takes a link of pg_tblspc and the version's own directory in the tablespace that it leads to. Other
// directories there belong to other clusters (an upgraded one, say).
func (s *scanner) visitTablespace(v int, rel, full string, st *unix.Stat_t) error {
	oid, err := strconv.ParseUint(path.Base(rel), 10, 32)
	if err != nil {
		return s.addLink(v, rel, full, st)
	}
	if err := s.addLink(v, rel, full, st); err != nil {
		return err
	}
	target, err := filepath.EvalSymlinks(full)
	if errors.Is(err, fs.ErrNotExist) {
		// DROP TABLESPACE empties the directory and removes the link; an administrator may have removed the directory
		// of a tablespace that failed. PostgreSQL warns and goes on in both cases, and so does the WAL.
		s.log.Warn("tablespace has no directory", "link", full)
		return nil
	}
	if err != nil {
		return fmt.Errorf("tablespace %d: %w", oid, err)
	}
	t, err := s.addVolume(roleTablespace, target, uint32(oid))
	if err != nil {
		return fmt.Errorf("tablespace %d: %w", oid, err)
	}
	var root unix.Stat_t
	if err := unix.Stat(target, &root); err != nil {
		return &fs.PathError{Op: "stat", Path: target, Err: err}
	}
	s.add(t, ".", target, &root)
	directory := s.versionDirectory
	var sub unix.Stat_t
	if err := unix.Stat(filepath.Join(target, directory), &sub); err == unix.ENOENT {
		return nil
	} else if err != nil {
		return &fs.PathError{Op: "stat", Path: filepath.Join(target, directory), Err: err}
	}
	s.add(t, directory, filepath.Join(target, directory), &sub)
	return s.walk(t, directory, 1)
}

// ---- configuration outside the data directory ------------------------------------------------------------------------

// Bounds of a configuration directory that is taken whole. Debian's /etc/postgresql/15/main has seven entries.
const (
	maxConfigEntries = 1000
	maxConfigBytes   = 64 << 20
)

// scanConfig takes the directories of the configuration files that lie outside the data directory, whole, so that
// included files, certificates and conf.d come along. Of a directory that holds much else only the files themselves
// are taken.
func (s *scanner) scanConfig(files []string) error {
	data := s.volumes[0].Path
	if resolved, err := filepath.EvalSymlinks(data); err == nil {
		data = resolved
	}
	wanted := make(map[string][]string) // directory → names of files
	take := func(name string) {
		directory, base := filepath.Dir(name), filepath.Base(name)
		if within(directory, s.volumes[0].Path) || within(directory, data) || slices.Contains(wanted[directory], base) {
			return
		}
		wanted[directory] = append(wanted[directory], base)
	}
	for _, name := range files {
		if !filepath.IsAbs(name) {
			continue
		}
		name = filepath.Clean(name)
		take(name)
		// The file itself may be elsewhere than its name: data/postgresql.conf → /etc/postgresql/postgresql.conf.
		if resolved, err := filepath.EvalSymlinks(name); err == nil && resolved != name {
			take(resolved)
		}
	}
	directories := make([]string, 0, len(wanted))
	for directory := range wanted {
		directories = append(directories, directory)
	}
	slices.Sort(directories)
	var whole []string
	for _, directory := range directories {
		if slices.ContainsFunc(whole, func(w string) bool { return within(directory, w) }) {
			continue
		}
		mark, skipped := len(s.entries), s.skipped
		v, err := s.addVolume(roleConfig, directory, 0)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return fmt.Errorf("configuration directory: %w", err)
		}
		if s.mayTakeWhole(directory) {
			if err := s.walkRoot(v); err != nil {
				return fmt.Errorf("configuration directory: %w", err)
			}
			if s.small(s.entries[mark:]) {
				whole = append(whole, directory)
				continue
			}
			s.entries, s.skipped = s.entries[:mark], skipped
		}
		s.log.Info("taking single configuration files: their directory holds much else", "directory", directory, "files", wanted[directory])
		if err := s.takeFiles(v, wanted[directory]); err != nil {
			return fmt.Errorf("configuration directory: %w", err)
		}
	}
	return nil
}

// mayTakeWhole refuses directories that belong to more than PostgreSQL's configuration.
func (s *scanner) mayTakeWhole(directory string) bool {
	if strings.Count(directory, "/") < 2 || slices.Contains([]string{"/usr/local", "/usr/local/etc", "/var/lib", "/usr/share"}, directory) {
		return false
	}
	resolved, err := filepath.EvalSymlinks(directory)
	if err != nil {
		return false
	}
	return !slices.ContainsFunc(s.volumes, func(v volume) bool {
		root, err := filepath.EvalSymlinks(v.Path)
		return v.Role != roleConfig && (err != nil || within(root, resolved))
	})
}

func (s *scanner) small(entries []*entry) bool {
	var size int64
	for _, e := range entries {
		size += e.file.Size
	}
	return len(entries) <= maxConfigEntries && size <= maxConfigBytes
}

func (s *scanner) takeFiles(v int, names []string) error {
	root := s.volumes[v].Path
	var st unix.Stat_t
	if err := unix.Stat(root, &st); err != nil {
		return &fs.PathError{Op: "stat", Path: root, Err: err}
	}
	s.add(v, ".", root, &st)
	slices.Sort(names)
	for _, name := range names {
		if err := s.visit(v, name, 0); err != nil {
			return err
		}
	}
	return nil
}

func (s *scanner) unreadable(name string, err error) {
	s.skipped++
	s.log.Warn("leaving out what cannot be read outside the data directory", "path", name, "error", err)
}
