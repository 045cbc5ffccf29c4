package objectstore

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"iter"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"
)

// directoryStore keeps each object in a file below root, named by its key.
//
// Create writes a temporary file beside the object, syncs it, and gives it the object's name with link(2), which fails
// if the name is taken: atomic on every local file system and on NFS. Then every directory up to root that is not known
// to be durable is synced, also those that another process made: it may crash before it syncs them.
//
// Delete removes directories that it leaves empty, as S3 has no empty ones. A Create in such a directory notices that
// it is gone and makes it again; once its temporary file is there, the directory cannot go away.
//
// root itself is never made: a runner must not fill the local disk when the mount is missing, and whoever makes it must
// decide whose it is.
type directoryStore struct {
	root string

	mu      sync.Mutex
	durable map[string]inode // directories whose entry in their parent has been synced
}

// inode tells a directory from a later one of the same path: file systems use inode numbers again.
type inode struct {
	device, number uint64
	birth          unix.StatxTimestamp
}

var _ Store = (*directoryStore)(nil)

func (d *directoryStore) URL() string { return "file://" + d.root }

func (d *directoryStore) path(key string) string {
	return filepath.Join(d.root, filepath.FromSlash(key))
}

// fail makes the errors of all methods.
func (d *directoryStore) fail(op, key string, err error) error {
	if err == nil || errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded) {
		return err
	}
	if _, ok := errors.AsType[*ConflictError](err); ok {
		return err
	}
	if _, ok := errors.AsType[*Error](err); ok {
		return err
	}
	e := &Error{Op: op, Key: key, Store: d.URL(), Err: err, transient: transientCause(err)}
	switch {
	case errors.Is(err, fs.ErrPermission):
		e.Err = fmt.Errorf("%w: %w", ErrAccess, err)
		e.Hint = "the directory must be writable by the user that runs pgark, the owner of the PostgreSQL instance"
	case errors.Is(err, syscall.EROFS):
		e.Err = &kindError{ErrReadOnly, err}
		e.Hint = "mount its file system writable, or find out why it became read-only"
	case errors.Is(err, syscall.ENOSPC), errors.Is(err, syscall.EDQUOT):
		e.Err = &kindError{ErrFull, err}
		e.Hint = "make room, or keep less"
	case errors.Is(err, fs.ErrNotExist):
		if _, rootErr := os.Stat(d.root); errors.Is(rootErr, fs.ErrNotExist) {
			e.Err, e.Hint = &missingDirectoryError{rootErr}, "create it, writable by the owner of the PostgreSQL instance, or mount its file system"
		} else {
			e.Err = ErrNotExist
		}
	}
	return e
}

// missingDirectoryError is ErrNoBucket where the bucket is a directory.
type missingDirectoryError struct{ err error }

func (e *missingDirectoryError) Error() string {
	return "no such repository directory: " + e.err.Error()
}
func (e *missingDirectoryError) Is(target error) bool { return target == ErrNoBucket }

func (d *directoryStore) Create(ctx context.Context, key string, body io.ReadSeeker, size int64) error {
	if err := checkKey(key); err != nil {
		return err
	}
	// A name that is taken costs a comparison, but no write.
	if _, err := os.Lstat(d.path(key)); err == nil {
		return d.fail("create", key, d.settle(ctx, key, body, size))
	}
	for attempt := 0; ; attempt++ {
		err := d.create(ctx, key, body, size)
		switch {
		case errors.Is(err, fs.ErrExist):
			err = d.settle(ctx, key, body, size)
			if errors.Is(err, ErrNotExist) && attempt < 100 {
				continue // deleted in between
			}
		case errors.Is(err, fs.ErrNotExist) && attempt < 100:
			if _, rootErr := os.Stat(d.root); rootErr == nil {
				continue // a Delete removed the directory before our file was in it
			}
		}
		return d.fail("create", key, err)
	}
}

// settle compares the stored object with body. What another process has just created must be durable before we say so.
func (d *directoryStore) settle(ctx context.Context, key string, body io.ReadSeeker, size int64) error {
	if _, err := body.Seek(0, io.SeekStart); err != nil {
		return err
	}
	if err := compare(ctx, d, key, body, size); err != nil {
		return err
	}
	return d.syncParents(key)
}

func (d *directoryStore) create(ctx context.Context, key string, body io.ReadSeeker, size int64) error {
	if _, err := body.Seek(0, io.SeekStart); err != nil {
		return err
	}
	path := d.path(key)
	if err := d.makeParents(key); err != nil {
		return err
	}
	temp := filepath.Join(filepath.Dir(path), hiddenPrefix+randomHex()+".tmp")
	f, err := os.OpenFile(temp, os.O_WRONLY|os.O_CREATE|os.O_EXCL|syscall.O_NOFOLLOW, 0o640)
	if err != nil {
		return err
	}
	defer os.Remove(temp) // after a successful rename it is gone already
	defer f.Close()
	if err := d.giveToOwner(temp); err != nil {
		return err
	}
	if _, err := io.Copy(f, &contextReader{ctx, &exactReader{r: body, n: size}}); err != nil {
		return err
	}
	if err := f.Sync(); err != nil {
		return err
	}
	if err := f.Close(); err != nil {
		return err
	}
	if err := linkNoReplace(temp, path); err != nil {
		return err
	}
	return d.syncParents(key)
}

// linkNoReplace names the file temp as path unless path exists (fs.ErrExist).
func linkNoReplace(temp, path string) error {
	err := os.Link(temp, path)
	// Some file systems (vfat, a few FUSE ones) have no hard links.
	if errors.Is(err, syscall.EPERM) || errors.Is(err, syscall.EOPNOTSUPP) || errors.Is(err, syscall.ENOSYS) {
		err = unix.Renameat2(unix.AT_FDCWD, temp, unix.AT_FDCWD, path, unix.RENAME_NOREPLACE)
		if err != nil {
			err = &os.LinkError{Op: "rename without replacing", Old: temp, New: path, Err: err}
		}
	}
	return err
}

// makeParents makes the directories between root and key, without syncing them.
func (d *directoryStore) makeParents(key string) error {
	dir := d.root
	elements := strings.Split(key, "/")
	for _, e := range elements[:len(elements)-1] {
		dir = filepath.Join(dir, e)
		err := os.Mkdir(dir, 0o750)
		if err == nil {
			err = d.giveToOwner(dir)
		}
		if err != nil && !errors.Is(err, fs.ErrExist) {
			return err
		}
	}
	return nil
}

// giveToOwner hands what root creates to the owner of the store's directory: a repository that root sets up on a guest
// is written by the instance's owner afterwards.
func (d *directoryStore) giveToOwner(path string) error {
	if os.Geteuid() != 0 {
		return nil
	}
	info, err := os.Stat(d.root)
	if err != nil {
		return err
	}
	st, ok := info.Sys().(*syscall.Stat_t)
	if !ok {
		return fmt.Errorf("stat %s: the owner is not known", d.root)
	}
	if st.Uid == 0 && st.Gid == 0 {
		return nil
	}
	return os.Lchown(path, int(st.Uid), int(st.Gid))
}

// syncParents makes the entry of key, and those of all directories above it up to root, durable.
func (d *directoryStore) syncParents(key string) error {
	if err := syncDirectory(filepath.Dir(d.path(key))); err != nil {
		return err
	}
	for dir := filepath.Dir(d.path(key)); len(dir) > len(d.root); dir = filepath.Dir(dir) {
		id, known := statInode(dir)
		if known {
			d.mu.Lock()
			was, ok := d.durable[dir]
			d.mu.Unlock()
			if ok && was == id {
				continue
			}
		}
		if err := syncDirectory(filepath.Dir(dir)); err != nil {
			return err
		}
		if known {
			d.mu.Lock()
			if d.durable == nil || len(d.durable) > 4096 { // bounded: a forgotten entry costs one more sync
				d.durable = make(map[string]inode)
			}
			d.durable[dir] = id
			d.mu.Unlock()
		}
	}
	return nil
}

// statInode identifies a directory; known is false where the file system keeps no birth time (NFS before 4.2).
func statInode(path string) (id inode, known bool) {
	var st unix.Statx_t
	err := unix.Statx(unix.AT_FDCWD, path, unix.AT_SYMLINK_NOFOLLOW, unix.STATX_INO|unix.STATX_BTIME, &st)
	if err != nil || st.Mask&unix.STATX_BTIME == 0 {
		return inode{}, false
	}
	return inode{uint64(st.Dev_major)<<32 | uint64(st.Dev_minor), st.Ino, st.Btime}, true
}

func syncDirectory(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	err = f.Sync()
	// File systems that cannot sync directories (some FUSE and SMB ones) make renames durable by themselves or never.
	if errors.Is(err, syscall.EINVAL) || errors.Is(err, syscall.ENOTSUP) {
		return nil
	}
	return err
}

func (d *directoryStore) Get(ctx context.Context, key string, offset, n int64) (io.ReadCloser, error) {
	if err := checkKey(key); err != nil {
		return nil, err
	}
	if ctx.Err() != nil {
		return nil, context.Cause(ctx)
	}
	f, err := os.Open(d.path(key))
	if err != nil {
		return nil, d.fail("get", key, notADirectoryMeansAbsent(err))
	}
	info, err := f.Stat()
	if err == nil && info.IsDir() {
		err = ErrNotExist
	}
	if err == nil && n < 0 && offset > info.Size() {
		n = offset - info.Size() // an offset beyond the end is an end too early, as with n given
	}
	if err == nil {
		_, err = f.Seek(offset, io.SeekStart)
	}
	if err != nil {
		f.Close()
		return nil, d.fail("get", key, err)
	}
	return &rangeReader{Closer: f, r: &contextReader{ctx, f}, n: n}, nil
}

// notADirectoryMeansAbsent: below an object there are no objects in this store.
func notADirectoryMeansAbsent(err error) error {
	if errors.Is(err, syscall.ENOTDIR) {
		return ErrNotExist
	}
	return err
}

func (d *directoryStore) Stat(ctx context.Context, key string) (Object, error) {
	if err := checkKey(key); err != nil {
		return Object{}, err
	}
	if ctx.Err() != nil {
		return Object{}, context.Cause(ctx)
	}
	info, err := os.Stat(d.path(key))
	if err == nil && info.IsDir() {
		err = ErrNotExist
	}
	if err != nil {
		return Object{}, d.fail("stat", key, notADirectoryMeansAbsent(err))
	}
	return Object{Key: key, Size: info.Size(), Modified: info.ModTime()}, nil
}

func (d *directoryStore) List(ctx context.Context, prefix, startAfter string) iter.Seq2[Object, error] {
	return func(yield func(Object, error) bool) {
		base := ""
		if i := strings.LastIndexByte(prefix, '/'); i >= 0 {
			base = prefix[:i+1]
		}
		d.walk(ctx, base, prefix, startAfter, yield)
	}
}

// walk yields the objects below the directory base ("" or ending in a slash) that List selects. It returns false when
// the listing has ended.
func (d *directoryStore) walk(ctx context.Context, base, prefix, startAfter string, yield func(Object, error) bool) bool {
	names, err := d.readDirectory(ctx, base)
	if err != nil {
		yield(Object{}, d.fail("list", prefix, err))
		return false
	}
	for _, name := range names {
		key := base + name
		if below, isDir := strings.CutSuffix(key, "/"); isDir {
			if !strings.HasPrefix(key, prefix) && !strings.HasPrefix(prefix, key) {
				continue
			}
			// All keys below start with key, so if startAfter does not, they all compare as key does.
			if key < startAfter && !strings.HasPrefix(startAfter, key) {
				continue
			}
			if !d.walk(ctx, below+"/", prefix, startAfter, yield) {
				return false
			}
			continue
		}
		if !strings.HasPrefix(key, prefix) || key <= startAfter {
			continue
		}
		info, err := os.Lstat(d.path(key))
		if errors.Is(err, fs.ErrNotExist) {
			continue // deleted since the directory was read
		}
		if err != nil {
			yield(Object{}, d.fail("list", prefix, err))
			return false
		}
		if !yield(Object{Key: key, Size: info.Size(), Modified: info.ModTime()}, nil) {
			return false
		}
	}
	return true
}

// readDirectory returns the names in a directory, those of directories with a slash at the end, in the order of the
// keys below: "a-b" sorts before "a/", and that before "a0", other than plain names do. A directory that is not there
// is empty, except the root.
func (d *directoryStore) readDirectory(ctx context.Context, base string) ([]string, error) {
	if ctx.Err() != nil {
		return nil, context.Cause(ctx)
	}
	entries, err := os.ReadDir(d.path(base))
	if err != nil {
		if errors.Is(err, fs.ErrNotExist) || errors.Is(err, syscall.ENOTDIR) {
			if _, rootErr := os.Stat(d.root); rootErr == nil {
				return nil, nil
			}
		}
		return nil, err
	}
	names := make([]string, 0, len(entries))
	for _, e := range entries {
		switch {
		case strings.HasPrefix(e.Name(), hiddenPrefix):
		case e.IsDir():
			names = append(names, e.Name()+"/")
		case e.Type().IsRegular():
			names = append(names, e.Name())
		}
	}
	slices.Sort(names)
	return names, nil
}

func (d *directoryStore) ListPrefixes(ctx context.Context, prefix string) iter.Seq2[string, error] {
	return func(yield func(string, error) bool) {
		if prefix != "" && !strings.HasSuffix(prefix, "/") {
			yield("", fmt.Errorf("list prefixes below %q in %s: expected a slash at the end", prefix, d.URL()))
			return
		}
		names, err := d.readDirectory(ctx, prefix)
		if err != nil {
			yield("", d.fail("list", prefix, err))
			return
		}
		for _, name := range names {
			element, isDir := strings.CutSuffix(name, "/")
			if !isDir {
				continue
			}
			// A directory counts once an object is in it: it may have been made by a Create that is still writing.
			for _, err := range d.List(ctx, prefix+name, "") {
				if err == nil && !yield(element, nil) {
					return
				}
				if err != nil {
					yield("", err)
					return
				}
				break
			}
		}
	}
}

func (d *directoryStore) Delete(ctx context.Context, keys ...string) error {
	directories := make(map[string]bool)
	for _, key := range keys {
		if err := checkKey(key); err != nil {
			return err
		}
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		err := syscall.Unlink(d.path(key)) // not os.Remove, which would remove an empty directory of that name
		if errors.Is(err, syscall.EISDIR) || errors.Is(err, fs.ErrNotExist) || errors.Is(err, syscall.ENOTDIR) {
			continue
		}
		if err != nil {
			return d.fail("delete", key, &fs.PathError{Op: "unlink", Path: d.path(key), Err: err})
		}
		directories[filepath.Dir(d.path(key))] = true
	}
	for dir := range directories {
		for len(dir) > len(d.root) && syscall.Rmdir(dir) == nil { // fails while anything is in it
			dir = filepath.Dir(dir)
		}
	}
	return nil
}

func randomHex() string {
	var b [8]byte
	rand.Read(b[:]) // never fails
	return hex.EncodeToString(b[:])
}
