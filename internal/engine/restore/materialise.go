package restore

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"sort"
	"strings"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"github.com/pgark/terraform-provider-pgark/internal/engine/repository"
)

// markerName is in the data directory from the first moment of a restore to its last.
const markerName = "pgark.restoring"

// marker is the marker's content.
type marker struct {
	Series    string    `json:"series"`
	Image     string    `json:"image"`
	Target    string    `json:"target"`
	StartedAt time.Time `json:"started_at"`
}

func (m marker) String() string {
	return fmt.Sprintf("of image %s of %s, started at %s", m.Image, m.Series, m.StartedAt.UTC().Format(timeFormat))
}

// Bounds of what is held at a time.
const (
	batchFrames = 1 << 17 // some 16 MiB of references, and 32 GiB of data in a full image
	openFiles   = 128
	mapFetches  = 8
	syncers     = 16
)

// checkEmpty refuses a directory with anything in it. One that is not there is fine.
func checkEmpty(what, dir string) error {
	list, err := os.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if errors.Is(err, syscall.ENOTDIR) {
		return &NotEmptyError{What: what, Path: dir, Found: "a file in its place"}
	}
	if err != nil {
		return fmt.Errorf("look into %s: %w", what, err)
	}
	var names []string
	for _, e := range list {
		if e.Name() == "lost+found" {
			continue // of a file system of its own
		}
		if e.Name() == markerName {
			left := "unknown"
			if b, err := os.ReadFile(filepath.Join(dir, markerName)); err == nil {
				var m marker
				if json.Unmarshal(b, &m) == nil && m.Image != "" {
					left = m.String()
				}
			}
			return &NotEmptyError{What: what, Path: dir, Left: left}
		}
		names = append(names, e.Name())
	}
	if len(names) == 0 {
		return nil
	}
	found := strings.Join(names[:min(3, len(names))], ", ")
	if more := len(names) - 3; more > 0 {
		found += fmt.Sprintf(" and %d more", more)
	}
	return &NotEmptyError{What: what, Path: dir, Found: found}
}

// writer brings an image's files into being.
type writer struct {
	image  *repository.Image
	owners *ownership
	roots  map[string]*os.Root // nothing that a manifest says can lead out of them
	bytes  atomic.Int64        // fetched
	wrote  atomic.Int64        // of the files' sizes
	total  int64
	report func(done, total, fetched int64)

	open  map[int]*os.File // by index into the batch
	order []int            // the same, longest unused first
}

// fileTask is a file with content, in a batch.
type fileTask struct {
	placed
	segments *repository.SegmentMap
}

// piece is where a part of a frame goes.
type piece struct {
	file         int // index into the batch
	start, count uint32
	first        uint16
}

// frameKey tells frames apart.
type frameKey struct {
	object repository.ObjectRef
	frame  uint32
}

func (w *writer) root(dir string) (*os.Root, error) {
	if r := w.roots[dir]; r != nil {
		return r, nil
	}
	r, err := os.OpenRoot(dir)
	if err == nil {
		w.roots[dir] = r
	}
	return r, err
}

func (w *writer) close() {
	_ = w.closeFiles() // after an error; else they are closed
	for _, r := range w.roots {
		_ = r.Close() // a directory opened to look things up in
	}
}

// create makes directories, links and files of their final size, mode and owner; regular files with content are
// returned for fill.
func (w *writer) create(p placed) (content bool, err error) {
	r, err := w.root(p.root)
	if err != nil {
		return false, err
	}
	name, mode, owner := filepath.FromSlash(p.name), fs.FileMode(p.file.Mode&0o777), w.owners.of(p.file)
	if name != "." {
		if parent := filepath.Dir(name); parent != "." {
			if _, err := r.Lstat(parent); errors.Is(err, fs.ErrNotExist) {
				if err := r.MkdirAll(parent, 0o700); err != nil {
					return false, err
				}
			}
		}
	}
	switch p.file.Type {
	case repository.Directory:
		if name != "." {
			if err := r.Mkdir(name, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
				return false, err
			}
		}
		d, err := r.Open(name)
		if err != nil {
			return false, err
		}
		defer d.Close()
		return false, w.finish(d, owner, mode)
	case repository.Symlink:
		if err := r.Symlink(p.link, name); err != nil {
			return false, err
		}
		if w.owners.root {
			return false, r.Lchown(name, owner.uid, owner.gid)
		}
		return false, nil
	case repository.RegularFile:
		f, err := r.OpenFile(name, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
		if err != nil {
			return false, err
		}
		err = w.finish(f, owner, mode)
		if err == nil && p.file.Size > 0 {
			err = f.Truncate(p.file.Size)
		}
		if e := f.Close(); err == nil {
			err = e
		}
		return p.file.Size > 0, err
	}
	return false, fmt.Errorf("%s: type %d is none that this build knows", p.name, p.file.Type)
}

func (w *writer) finish(f *os.File, owner ids, mode fs.FileMode) error {
	if w.owners.root {
		if err := f.Chown(owner.uid, owner.gid); err != nil {
			return err
		}
	}
	return f.Chmod(mode)
}

// write brings all files into being. The content of several files that lies together in the repository is fetched
// together, and every frame once (twice at most where a batch ends in its middle).
func (w *writer) write(ctx context.Context, all []placed) error {
	var content []placed
	for _, p := range all {
		more, err := w.create(p)
		if err != nil {
			return fmt.Errorf("make %s: %w", filepath.Join(p.root, p.name), err)
		}
		if more {
			content = append(content, p)
		}
	}
	for len(content) > 0 {
		// An uncompressed guess of one frame for 256 KiB bounds the batch before the maps are known.
		n, frames := 0, int64(0)
		for n < len(content) && (n == 0 || frames < batchFrames) {
			frames += content[n].file.Size/(256<<10) + 1
			n++
		}
		if err := w.fill(ctx, content[:n]); err != nil {
			return err
		}
		content = content[n:]
	}
	return nil
}

func (w *writer) fill(ctx context.Context, files []placed) error {
	batch := make([]fileTask, len(files))
	group, gctx := errgroup.WithContext(ctx)
	group.SetLimit(mapFetches)
	for i := range files {
		batch[i].placed = files[i]
		group.Go(func() error {
			m, err := w.image.FileMap(gctx, files[i].file)
			if err == nil && int64(m.Blocks)*int64(m.BlockSize) < files[i].file.Size {
				err = fmt.Errorf("its map has %d blocks of %d bytes, expected %d bytes", m.Blocks, m.BlockSize, files[i].file.Size)
			}
			batch[i].segments = m
			if err != nil {
				return fmt.Errorf("read map of %s: %w", files[i].file.Path, err)
			}
			return nil
		})
	}
	if err := group.Wait(); err != nil {
		return err
	}
	var frames []repository.FrameRef
	pieces := map[frameKey][]piece{}
	for i := range batch {
		m := batch[i].segments
		for _, r := range m.Runs {
			f := m.Frames[r.Frame]
			key := frameKey{f.Object, f.Frame}
			if pieces[key] == nil {
				frames = append(frames, f)
			}
			pieces[key] = append(pieces[key], piece{i, r.Start, r.Count, r.First})
		}
	}
	defer func() { _ = w.closeFiles() }() // for errors; without, it is checked below
	err := w.image.ReadFrames(ctx, frames, func(f repository.FrameRef, raw []byte) error {
		w.bytes.Add(int64(f.Stored))
		for _, p := range pieces[frameKey{f.Object, f.Frame}] {
			if err := w.put(batch, p, raw); err != nil {
				return fmt.Errorf("write %s: %w", filepath.Join(batch[p.file].root, batch[p.file].name), err)
			}
		}
		w.report(w.wrote.Load(), w.total, w.bytes.Load())
		return nil
	})
	if err != nil {
		return err
	}
	return w.closeFiles()
}

// put writes one piece. Blocks of zeros are left out: the file was made of them.
func (w *writer) put(batch []fileTask, p piece, raw []byte) error {
	t := &batch[p.file]
	block := int64(t.segments.BlockSize)
	offset := int64(p.start) * block
	n := min(int64(p.count)*block, t.file.Size-offset)
	if n <= 0 {
		return nil
	}
	from := int64(p.first) * block
	if from+n > int64(len(raw)) {
		return fmt.Errorf("its frame has %d bytes, expected %d", len(raw), from+n)
	}
	raw = raw[from : from+n]
	w.wrote.Add(n)
	if allZero(raw) {
		return nil
	}
	f, err := w.file(batch, p.file)
	if err != nil {
		return err
	}
	_, err = f.WriteAt(raw, offset)
	return err
}

var zeros [8192]byte

func allZero(b []byte) bool {
	for len(b) > 0 {
		n := min(len(b), len(zeros))
		if !bytes.Equal(b[:n], zeros[:n]) {
			return false
		}
		b = b[n:]
	}
	return true
}

// file keeps the files open that were written last: frames come nearly in the order of files.
func (w *writer) file(batch []fileTask, i int) (*os.File, error) {
	if f := w.open[i]; f != nil {
		return f, nil
	}
	if len(w.order) >= openFiles {
		oldest := w.order[0]
		w.order = w.order[1:]
		f := w.open[oldest]
		delete(w.open, oldest)
		if err := f.Close(); err != nil {
			return nil, err
		}
	}
	r, err := w.root(batch[i].root)
	if err != nil {
		return nil, err
	}
	f, err := r.OpenFile(filepath.FromSlash(batch[i].name), os.O_WRONLY, 0)
	if err != nil {
		return nil, err
	}
	if w.open == nil {
		w.open = map[int]*os.File{}
	}
	w.open[i] = f
	w.order = append(w.order, i)
	return f, nil
}

func (w *writer) closeFiles() error {
	var first error
	for _, f := range w.open {
		if err := f.Close(); first == nil {
			first = err
		}
	}
	w.open, w.order = nil, nil
	return first
}

// sync makes every file and directory durable. Many at a time share the commits of the file system's journal; syncfs
// would wait for what others write, and before Linux 5.8 it does not tell of errors.
func (w *writer) sync(ctx context.Context, all []placed) error {
	var next atomic.Int64
	group, ctx := errgroup.WithContext(ctx)
	for range syncers {
		group.Go(func() error {
			for {
				i := int(next.Add(1)) - 1
				if i >= len(all) {
					return nil
				}
				if err := ctx.Err(); err != nil {
					return context.Cause(ctx)
				}
				if all[i].file.Type == repository.Symlink {
					continue // part of its directory
				}
				f, err := w.roots[all[i].root].Open(filepath.FromSlash(all[i].name))
				if err != nil {
					return err
				}
				err = f.Sync()
				if e := f.Close(); err == nil {
					err = e
				}
				if err != nil {
					return fmt.Errorf("sync %s: %w", filepath.Join(all[i].root, all[i].name), err)
				}
			}
		})
	}
	return group.Wait()
}

// requiredDirectories are what PostgreSQL expects to be there and makes only itself in initdb. An image has them; one
// whose WAL directory was elsewhere has no pg_wal.
var requiredDirectories = []string{
	"pg_wal", "pg_wal/archive_status", "pg_commit_ts", "pg_dynshmem", "pg_logical", "pg_logical/mappings", "pg_logical/snapshots",
	"pg_multixact", "pg_multixact/members", "pg_multixact/offsets", "pg_notify", "pg_replslot", "pg_serial", "pg_snapshots",
	"pg_stat", "pg_stat_tmp", "pg_subtrans", "pg_tblspc", "pg_twophase", "pg_xact",
}

// require makes the directories that are missing.
func (w *writer) require(data, wal string) ([]placed, error) {
	dir := &repository.File{Type: repository.Directory, Mode: 0o700}
	var made []placed
	for _, name := range requiredDirectories {
		p := placed{file: dir, root: data, name: name}
		if wal != "" && (name == walLink || strings.HasPrefix(name, walLink+"/")) {
			p.root, p.name = wal, path.Clean("./"+strings.TrimPrefix(strings.TrimPrefix(name, walLink), "/"))
		}
		r, err := w.root(p.root)
		if err != nil {
			return nil, err
		}
		if _, err := r.Lstat(p.name); err == nil {
			continue
		}
		if err := r.Mkdir(p.name, 0o700); err != nil {
			return nil, err
		}
		if w.owners.root {
			if err := r.Chown(p.name, w.owners.data.uid, w.owners.data.gid); err != nil {
				return nil, err
			}
		}
		made = append(made, p)
	}
	return made, nil
}

// space is what a file system must take.
type space struct {
	dir   string
	need  int64
	free  int64
	dense bool // it may need less than the files' sizes: it compresses
}

// checkSpace refuses to begin what cannot end.
func checkSpace(all []placed) error {
	need := map[string]int64{}
	for _, p := range all {
		need[p.root] += p.file.Size
	}
	systems := map[uint64]*space{}
	for root, n := range need {
		dir := root
		for {
			var st unix.Stat_t
			err := unix.Stat(dir, &st)
			if errors.Is(err, fs.ErrNotExist) && dir != "/" {
				dir = filepath.Dir(dir)
				continue
			}
			if err != nil {
				return &fs.PathError{Op: "stat", Path: dir, Err: err}
			}
			s := systems[st.Dev]
			if s == nil {
				var fs unix.Statfs_t
				if err := unix.Statfs(dir, &fs); err != nil {
					return fmt.Errorf("free space of %s: %w", dir, err)
				}
				s = &space{dir: dir, free: int64(fs.Bavail) * fs.Bsize}
				s.dense = fs.Type == unix.BTRFS_SUPER_MAGIC || fs.Type == zfsMagic
				systems[st.Dev] = s
			}
			s.need += n
			break
		}
	}
	var short []string
	for _, s := range systems {
		if s.need > s.free && !s.dense {
			short = append(short, fmt.Sprintf("%s: found %d bytes free, expected %d", s.dir, s.free, s.need))
		}
	}
	if len(short) == 0 {
		return nil
	}
	sort.Strings(short)
	return &NoSpaceError{Where: short}
}

// zfsMagic is what statfs says of ZFS (its f_type; not in the kernel's headers).
const zfsMagic = 0x2fc12fc1

// throttle calls f at most every so often, and at the end. For one goroutine.
func throttle(every time.Duration, f func(done, total, fetched int64)) func(done, total, fetched int64) {
	var last time.Time
	return func(done, total, fetched int64) {
		if now := time.Now(); now.Sub(last) >= every || done >= total {
			last = now
			f(done, total, fetched)
		}
	}
}
