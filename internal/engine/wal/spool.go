package wal

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/pgark/terraform-provider-pgark/internal/engine/daemon/control"
	"github.com/pgark/terraform-provider-pgark/internal/engine/postgres"
	"github.com/pgark/terraform-provider-pgark/internal/engine/repository"
)

// ErrSpoolFull says that the temporary folder takes no more: its limit is reached, or the file system's room is.
var ErrSpoolFull = errors.New("the temporary folder is full")

// SpoolConflictError says that the temporary folder holds other content under a WAL file's name.
type SpoolConflictError struct {
	Directory   string
	Name        string
	There, Here repository.WALInfo
}

func (e *SpoolConflictError) Error() string {
	return fmt.Sprintf("keep wal %s in %s: already there with other content (hash %.8s… there, %.8s… here)", e.Name, e.Directory, e.There.Digest, e.Here.Digest)
}

// Files in a Spool are named like the WAL files that they stand for, with an ending that says that they are whole; while
// one is being written it has another. Those that wait end in SealedSuffix.
const (
	SealedSuffix  = ".sealed"
	tempSuffix    = ".tmp"
	damagedSuffix = ".damaged"
)

// The file system's room that is left to others: PostgreSQL's own WAL may live there.
const (
	spoolReserve      = 1 << 30 // bytes
	spoolReserveShare = 20      // and at least one part in so many
)

// Spool keeps sealed WAL files in a directory of its own while the repository is away. What Put has accepted is there
// after a crash of the machine, and stays until Remove. Safe for concurrent use, but one Spool at a time may have a
// directory.
type Spool struct {
	dir     string
	limit   int64 // bytes; 0: none
	reserve int64 // spoolReserve, but in tests

	mu      sync.Mutex
	files   map[string]*spooledFile // by name of the WAL file
	names   []string                // the same, in the order in which PostgreSQL gave them
	bytes   int64                   // of files
	written int64                   // bytes that are about to become files
	full    bool                    // the latest Put found no room
}

type spooledFile struct {
	size   int64
	at     time.Time
	digest string // of the WAL file; "" while it is not known
}

// OpenSpool takes over a directory, which is made if it is absent. What a crash left half written is removed; files that
// are not ours are left alone.
func OpenSpool(dir string, limit int64) (*Spool, error) {
	s := &Spool{dir: dir, limit: limit, reserve: spoolReserve, files: make(map[string]*spooledFile)}
	fail := func(err error) (*Spool, error) { return nil, fmt.Errorf("temporary folder %s: %w", dir, err) }
	if err := makeDurable(dir); err != nil {
		return fail(err)
	}
	entries, err := os.ReadDir(dir)
	if err != nil {
		return fail(err)
	}
	for _, e := range entries {
		name, whole := strings.CutSuffix(e.Name(), SealedSuffix)
		temp, half := strings.CutSuffix(e.Name(), tempSuffix)
		if half {
			temp, _, _ = strings.Cut(strings.TrimPrefix(temp, "."), SealedSuffix)
			if _, err := postgres.ParseWALFile(temp); err == nil && e.Type().IsRegular() {
				if err := os.Remove(filepath.Join(dir, e.Name())); err != nil {
					return fail(err)
				}
			}
			continue
		}
		if _, err := postgres.ParseWALFile(name); !whole || err != nil || !e.Type().IsRegular() {
			continue
		}
		info, err := e.Info()
		if err != nil {
			return fail(err)
		}
		s.files[name] = &spooledFile{size: info.Size(), at: info.ModTime()}
		s.names = append(s.names, name)
		s.bytes += info.Size()
	}
	slices.SortFunc(s.names, order)
	// The crash of an earlier run may have come between a rename and its becoming durable.
	if err := syncDir(dir); err != nil {
		return fail(err)
	}
	return s, nil
}

// makeDurable makes a directory, and those above it, for the owner alone, in a way that survives a crash.
func makeDurable(dir string) error {
	info, err := os.Stat(dir)
	if err == nil && !info.IsDir() {
		return syscall.ENOTDIR
	}
	if !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if err := makeDurable(filepath.Dir(dir)); err != nil {
		return err
	}
	if err := os.Mkdir(dir, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	return syncDir(filepath.Dir(dir))
}

// CountSpooled counts the files that wait in a directory, or below it. What has another ending was never whole, or was
// found to be damaged. No directory is none.
func CountSpooled(dir string) (n int, err error) {
	err = filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		switch {
		case errors.Is(err, fs.ErrNotExist):
			return nil // none was ever needed, or one was stored just now
		case err == nil && d.Type().IsRegular() && strings.HasSuffix(path, SealedSuffix):
			n++
		}
		return err
	})
	return n, err
}

func syncDir(dir string) error {
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

func (s *Spool) path(name string) string { return filepath.Join(s.dir, name+SealedSuffix) }

// Put keeps a file. Once it returns nil, the file survives a crash of the machine. The same content again is success;
// other content is *SpoolConflictError. Without room it is ErrSpoolFull, and nothing has changed; the same holds for any
// other error. It does not close w. read takes up what Put has kept under the same name before
// (repository.Series.ReadSealed).
func (s *Spool) Put(w *repository.SealedWAL, read ReadSealed) (err error) {
	defer func() {
		if _, told := errors.AsType[*SpoolConflictError](err); err != nil && !told {
			err = fmt.Errorf("keep wal %s in %s: %w", w.Info.Name, s.dir, err)
		}
	}()
	if s.Has(w.Info.Name) {
		there, err := s.Read(w.Info.Name, read)
		if err != nil {
			return err
		}
		defer there.Close()
		if there.Info.Digest != w.Info.Digest {
			return &SpoolConflictError{Directory: s.dir, Name: w.Info.Name, There: there.Info, Here: w.Info}
		}
		return nil
	}
	if err := s.claim(w.Size); err != nil {
		return err
	}
	at, err := s.write(w)
	s.mu.Lock()
	defer s.mu.Unlock()
	s.written -= w.Size
	if errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EDQUOT) {
		s.full = true
		return fmt.Errorf("%w: %w", ErrSpoolFull, err)
	}
	if err != nil {
		return err
	}
	s.bytes += w.Size
	s.files[w.Info.Name] = &spooledFile{size: w.Size, at: at, digest: w.Info.Digest}
	if i, ok := slices.BinarySearchFunc(s.names, w.Info.Name, order); !ok {
		s.names = slices.Insert(s.names, i, w.Info.Name)
	}
	return nil
}

// claim sets bytes aside for a file, if there is room.
func (s *Spool) claim(size int64) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	err := s.room(size)
	s.full = err != nil
	if err == nil {
		s.written += size
	}
	return err
}

// Room tells why a file of that size would find no room; nil if it would.
func (s *Spool) Room(size int64) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	err := s.room(size)
	s.full = err != nil
	return err
}

func (s *Spool) room(size int64) error {
	used := s.bytes + s.written + size
	if s.limit > 0 && used > s.limit {
		return fmt.Errorf("%w: found %d bytes with the file, expected at most %d", ErrSpoolFull, used, s.limit)
	}
	var fsys unix.Statfs_t
	if err := unix.Statfs(s.dir, &fsys); err != nil {
		return &fs.PathError{Op: "statfs", Path: s.dir, Err: err}
	}
	block := fsys.Frsize
	free := int64(fsys.Bavail)*block - s.written - size
	reserve := int64(0)
	if s.reserve > 0 {
		reserve = max(s.reserve, int64(fsys.Blocks)*block/spoolReserveShare)
	}
	if free < reserve {
		return fmt.Errorf("%w: its file system would have %d bytes left with the file, expected %d for others", ErrSpoolFull, max(free, 0), reserve)
	}
	return nil
}

// write makes a file durable: its content before its name, and its name before we say so.
func (s *Spool) write(w *repository.SealedWAL) (time.Time, error) {
	if _, err := w.Body.Seek(0, io.SeekStart); err != nil {
		return time.Time{}, err
	}
	f, err := os.CreateTemp(s.dir, "."+w.Info.Name+SealedSuffix+"*"+tempSuffix) // for the owner alone
	if err != nil {
		return time.Time{}, err
	}
	n, err := io.Copy(f, io.LimitReader(w.Body, w.Size))
	if err == nil && n != w.Size {
		err = fmt.Errorf("found %d bytes of the sealed file, expected %d", n, w.Size)
	}
	if err == nil {
		err = f.Sync()
	}
	if e := f.Close(); err == nil {
		err = e
	}
	if err == nil {
		err = os.Rename(f.Name(), s.path(w.Info.Name))
	}
	if err != nil {
		_ = os.Remove(f.Name()) // the error that led here says more; OpenSpool removes it too
		return time.Time{}, err
	}
	if err := syncDir(s.dir); err != nil {
		// It may be gone after a crash, so it was not kept.
		_ = os.Remove(s.path(w.Info.Name))
		return time.Time{}, err
	}
	return time.Now(), nil
}

// ReadSealed is repository.Series.ReadSealed.
type ReadSealed func(name string, body io.ReadSeekCloser) (*repository.SealedWAL, error)

// Read takes up a file for storing. The caller closes it. *repository.CorruptError and the like say that it is damaged.
func (s *Spool) Read(name string, read ReadSealed) (*repository.SealedWAL, error) {
	f, err := os.Open(s.path(name))
	if err != nil {
		return nil, err
	}
	w, err := read(name, f)
	if err != nil {
		_ = f.Close() // nothing was written
		return nil, &DamagedError{Path: f.Name(), Err: err}
	}
	s.mu.Lock()
	if e := s.files[name]; e != nil {
		e.digest = w.Info.Digest
	}
	s.mu.Unlock()
	return w, nil
}

// DamagedError says that a file in the temporary folder is not what was put there.
type DamagedError struct {
	Path string
	Err  error
}

func (e *DamagedError) Error() string { return fmt.Sprintf("%s is damaged: %v", e.Path, e.Err) }

func (e *DamagedError) Unwrap() error { return e.Err }

// Remove forgets a file that has become durable elsewhere.
func (s *Spool) Remove(name string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	// Coming back after a crash, it is merely found to be stored already.
	if err := os.Remove(s.path(name)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	s.forget(name)
	return nil
}

// SetAside forgets a damaged file, and leaves it for people to look at.
func (s *Spool) SetAside(name string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if err := os.Rename(s.path(name), filepath.Join(s.dir, name+damagedSuffix)); err != nil {
		return err
	}
	s.forget(name)
	return nil
}

func (s *Spool) forget(name string) {
	e := s.files[name]
	if e == nil {
		return
	}
	s.bytes -= e.size
	s.full = false
	delete(s.files, name)
	if i, ok := slices.BinarySearchFunc(s.names, name, order); ok {
		s.names = slices.Delete(s.names, i, i+1)
	}
}

// Has tells whether a file is kept.
func (s *Spool) Has(name string) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.files[name] != nil
}

// Digest is that of a file's content; "" if it is not known, or not there.
func (s *Spool) Digest(name string) string {
	s.mu.Lock()
	defer s.mu.Unlock()
	if e := s.files[name]; e != nil {
		return e.digest
	}
	return ""
}

// First is the first file, in PostgreSQL's order, that skip does not tell to pass over.
func (s *Spool) First(skip func(name string) bool) (name string, ok bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, name := range s.names {
		if !skip(name) {
			return name, true
		}
	}
	return "", false
}

// Names lists the files in PostgreSQL's order.
func (s *Spool) Names() []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Clone(s.names)
}

// Files counts them.
func (s *Spool) Files() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.names)
}

// Bytes is what they take.
func (s *Spool) Bytes() int64 {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.bytes
}

// Status tells of the folder.
func (s *Spool) Status() control.SpoolStatus {
	s.mu.Lock()
	defer s.mu.Unlock()
	st := control.SpoolStatus{Directory: s.dir, Files: len(s.names), Bytes: s.bytes, LimitBytes: s.limit, Full: s.full}
	for _, e := range s.files {
		if st.Oldest == nil || e.at.Before(*st.Oldest) {
			st.Oldest = &e.at
		}
	}
	return st
}
