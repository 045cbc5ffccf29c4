package image

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/zeebo/blake3"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"github.com/pgark/terraform-provider-pgark/internal/engine/postgres"
	"github.com/pgark/terraform-provider-pgark/internal/engine/repository"
)

// frameStore takes frames and maps: what the copier needs of repository.ImageWriter.
type frameStore interface {
	WriteFrame(ctx context.Context, raw []byte) (repository.FrameRef, error)
	WriteMap(ctx context.Context, m *repository.SegmentMap) (repository.FrameRef, error)
}

// copier brings the contents of files into the image: it finds out what changed since the parent, and stores that.
type copier struct {
	store     frameStore
	state     *stateWriter
	parent    *state // nil: the image is full
	quiet     int64  // Unix nanoseconds; a file that changed after it is read. 0: read everything
	hashKey   []byte
	checksums bool         // the cluster has page checksums
	startLSN  postgres.LSN // of the backup
	log       *slog.Logger
	counters

	mu       sync.Mutex // guards excused
	excused  []excusedPage
	warnings atomic.Int64
}

// counters are read while the copier works.
type counters struct {
	files, bytes, read, changed atomic.Int64
}

// excusedPage is a page whose checksum was wrong and whose LSN says that it was written during the backup.
type excusedPage struct {
	e     *entry
	block uint32
	lsn   postgres.LSN
}

const (
	// readSize is what a worker reads at once: a multiple of every block size, and of the usual readahead.
	readSize = 1 << 20

	// quietPeriod is how long before the parent began a file must have been left alone for its stat to be trusted. Times
	// of files come from a clock that ticks every few milliseconds (coarser on old file systems, up to 2 s): a write in
	// the same tick as our last read would leave them unchanged.
	quietPeriod = 2 * time.Second
)

// buffers are a worker's own; with WriteFrame's they are all the memory that does not grow with a file. What grows is a
// file's hashes and maps, 2 MiB and a fraction for a segment of 1 GiB, for as long as the file is being copied.
type buffers struct {
	read, frame []byte
	hash        *blake3.Hasher
	sum         [32]byte
}

func newBuffers(key []byte) (*buffers, error) {
	h, err := blake3.NewKeyed(key)
	if err != nil {
		return nil, err
	}
	return &buffers{read: make([]byte, readSize), frame: make([]byte, 0, framePages*relationBlock), hash: h}, nil
}

// digest is the keyed hash of a block, valid until the next.
func (b *buffers) digest(block []byte) []byte {
	b.hash.Reset()
	_, _ = b.hash.Write(block) // a hash never fails
	return b.hash.Sum(b.sum[:0])[:hashSize]
}

// copyAll copies the regular files among entries with n workers, the largest first so that none is left over for one
// worker at the end.
func (c *copier) copyAll(ctx context.Context, entries []*entry, n int) error {
	var files []*entry
	for _, e := range entries {
		if e.file.Type == repository.RegularFile {
			files = append(files, e)
		}
	}
	slices.SortStableFunc(files, func(a, b *entry) int {
		switch {
		case a.file.Size > b.file.Size:
			return -1
		case a.file.Size < b.file.Size:
			return 1
		}
		return 0
	})
	var next atomic.Int64
	g, ctx := errgroup.WithContext(ctx)
	for range min(n, max(len(files), 1)) {
		g.Go(func() error {
			b, err := newBuffers(c.hashKey)
			if err != nil {
				return err
			}
			for {
				i := int(next.Add(1)) - 1
				if i >= len(files) {
					return nil
				}
				if ctx.Err() != nil {
					return context.Cause(ctx)
				}
				listed := files[i].file.Size
				if err := c.copyFile(ctx, files[i], b); err != nil {
					return fmt.Errorf("copy %s: %w", files[i].full, err)
				}
				c.files.Add(1)
				c.bytes.Add(listed - files[i].counted) // it may have grown, shrunk or not been read at all
			}
		})
	}
	return g.Wait()
}

// recall finds what the parent knew of the file; nil if nothing of use.
func (c *copier) recall(e *entry, key string) (old *fileState, encoded []byte) {
	if c.parent == nil {
		return nil, nil
	}
	old, encoded, err := c.parent.lookup(key, e.file.Path)
	if err != nil {
		// It was whole when the image began. Never guess: the file counts as new.
		c.warnings.Add(1)
		c.log.Warn("the parent's state is damaged: storing the file afresh", "path", e.full, "error", err)
		return nil, nil
	}
	if old == nil || old.BlockSize != e.blockSize() {
		return nil, nil
	}
	return old, encoded
}

func (e *entry) blockSize() uint32 {
	if e.relation {
		return relationBlock
	}
	return plainBlock
}

// copyFile copies one file. One that vanished is marked as gone: its removal is in the WAL that the image needs.
func (c *copier) copyFile(ctx context.Context, e *entry, b *buffers) error {
	old, encoded := c.recall(e, e.volumeKey)
	if old != nil && e.trustStat && c.untouched(e, old) {
		if err := c.state.addEncoded(encoded); err != nil {
			return err
		}
		e.describe(old)
		return nil
	}
	// Not blocking, should a fifo have taken the file's name.
	flags := unix.O_RDONLY | unix.O_NONBLOCK
	if !e.follow {
		flags |= unix.O_NOFOLLOW
	}
	f, err := os.OpenFile(e.full, flags, 0)
	switch {
	case errors.Is(err, fs.ErrNotExist), errors.Is(err, unix.ELOOP), errors.Is(err, unix.ENXIO):
		e.gone = true
		return nil
	case errors.Is(err, fs.ErrPermission) && e.optional:
		c.warnings.Add(1)
		c.log.Warn("leaving out what cannot be read outside the data directory", "path", e.full, "error", err)
		e.gone = true
		return nil
	case err != nil:
		return err
	}
	defer func() { _ = f.Close() }() // nothing was written
	identity, regular, err := statFile(int(f.Fd()), "", unix.AT_EMPTY_PATH)
	if err != nil {
		return err
	}
	if !regular {
		e.gone = true
		return nil
	}
	now, err := c.readFile(ctx, e, f, identity, old, b)
	if errors.Is(err, errScattered) {
		now, err = c.readFile(ctx, e, f, identity, nil, b)
	}
	if err != nil {
		return err
	}
	if err := c.state.add(now); err != nil {
		return err
	}
	e.describe(now)
	if n := len(now.Corrupt); n > 0 {
		c.log.Error("corrupt pages: their checksum is wrong on disk", "path", e.full, "pages", n, "first", now.Corrupt[:min(n, 8)])
	}
	return nil
}

// describe puts what is known of a copied file into the manifest's entry.
func (e *entry) describe(f *fileState) {
	e.file.Size, e.file.Corrupt = f.Size, f.Corrupt
	switch {
	case f.Map == nil:
	case f.MapRef == nil:
		e.file.Inline = f.Map
	default:
		e.file.Map, e.file.MapObjects = f.MapRef, f.MapObjects
	}
}

// untouched tells whether stat alone shows that the file is as the parent has it.
func (c *copier) untouched(e *entry, old *fileState) bool {
	// An excused page must be looked at again: replay made it good, or it never was.
	if c.quiet == 0 || len(old.Excused) > 0 || old.Size != old.Identity.Size {
		return false
	}
	flags := unix.AT_SYMLINK_NOFOLLOW
	if e.follow {
		flags = 0
	}
	now, regular, err := statFile(unix.AT_FDCWD, e.full, flags)
	return err == nil && regular && now == old.Identity && now.Modified < c.quiet && now.Changed < c.quiet
}

// statFile reads a file's identity.
func statFile(dir int, name string, flags int) (id fileIdentity, regular bool, err error) {
	var st unix.Statx_t
	for {
		err = unix.Statx(dir, name, flags|unix.AT_STATX_SYNC_AS_STAT, unix.STATX_BASIC_STATS|unix.STATX_BTIME, &st)
		if err != unix.EINTR {
			break
		}
	}
	if err != nil {
		return id, false, &fs.PathError{Op: "stat", Path: name, Err: err}
	}
	nano := func(t unix.StatxTimestamp) int64 { return t.Sec*1e9 + int64(t.Nsec) }
	id = fileIdentity{
		DeviceMajor: st.Dev_major, DeviceMinor: st.Dev_minor, Inode: st.Ino,
		Size: int64(st.Size), Modified: nano(st.Mtime), Changed: nano(st.Ctime),
	}
	if st.Mask&unix.STATX_BTIME != 0 {
		id.Birth = nano(st.Btime)
	}
	return id, st.Mode&unix.S_IFMT == unix.S_IFREG, nil
}

// errScattered asks for the file to be read once more and stored whole.
var errScattered = errors.New("too scattered")

// readFile reads a file up to the size that it had when it was opened, stores the blocks that differ from old, and
// returns its new state. With old nil every block is stored.
//
// Reading races with the server. A page may be torn, or the file may be cut short meanwhile: both are made good by
// replaying the WAL that the image needs, which restores whole pages that were written since backup start.
func (c *copier) readFile(ctx context.Context, e *entry, f *os.File, identity fileIdentity, old *fileState, b *buffers) (*fileState, error) {
	size, blockSize := identity.Size, int(e.blockSize())
	blocks := (size + int64(blockSize) - 1) / int64(blockSize)
	if blocks > 1<<32-1 {
		return nil, fmt.Errorf("file of %d bytes: more than %d blocks", size, uint32(1<<32-1))
	}
	now := &fileState{
		Volume: e.volumeKey, Path: e.file.Path, Identity: identity, BlockSize: uint32(blockSize),
		Hashes: make([]byte, 0, blocks*hashSize),
	}
	var oldMap *repository.SegmentMap
	if old != nil {
		oldMap = old.Map
	}
	builder := newMapBuilder(oldMap, uint32(blockSize))
	frame, reserved := b.frame[:0], uint32(0)
	flush := func() error {
		if len(frame) == 0 {
			return nil
		}
		ref, err := c.store.WriteFrame(ctx, frame)
		if err != nil {
			return err
		}
		builder.setFrame(reserved, ref)
		c.changed.Add(int64(len(frame)))
		frame = frame[:0]
		return nil
	}
	advise := newAdvice(f, size)
	changed := 0
	var offset int64
	for offset < size {
		want := int(min(int64(len(b.read)), size-offset))
		n, err := f.ReadAt(b.read[:want], offset)
		if err != nil && err != io.EOF {
			return nil, fmt.Errorf("read at %d: %w", offset, err)
		}
		advise.done(offset, n)
		c.read.Add(int64(n))
		c.bytes.Add(int64(n))
		e.counted += int64(n)
		for p := 0; p < n; p += blockSize {
			number := uint32((offset + int64(p)) / int64(blockSize))
			block := b.read[p:min(p+blockSize, n)]
			short := len(block) < blockSize
			if short && e.relation {
				block = b.read[p : p+blockSize]
				clear(block[n-p:])
			}
			sum := b.digest(block)
			same := old.hasHash(number, sum)
			// A page with the bytes that the parent has was verified then.
			if e.relation && !short && c.checksums && (!same || old.suspects(number)) {
				reread, err := c.checkPage(ctx, e, f, number, block, now)
				if err != nil {
					return nil, err
				}
				if reread {
					sum = b.digest(block)
					same = old.hasHash(number, sum)
				}
			}
			now.Hashes = append(now.Hashes, sum...)
			if same {
				if err := builder.keep(); err != nil {
					return nil, err
				}
				continue
			}
			if changed++; changed == 1 && oldMap != nil && scattered(oldMap, e.file.Path, 1) {
				return nil, errScattered
			}
			if len(frame) == 0 {
				reserved = builder.reserveFrame()
			}
			builder.store(reserved, uint16(len(frame)/blockSize))
			frame = append(frame, block...)
			if len(frame)+blockSize > cap(frame) {
				if err := flush(); err != nil {
					return nil, err
				}
			}
		}
		offset += int64(n)
		if n < want {
			break // it shrank
		}
		if ctx.Err() != nil {
			return nil, context.Cause(ctx)
		}
	}
	if err := flush(); err != nil {
		return nil, err
	}
	now.Size = offset
	switch {
	case builder.out.Blocks == 0:
		return now, nil
	case changed == 0 && oldMap != nil && builder.out.Blocks == oldMap.Blocks:
		now.Map, now.MapRef, now.MapObjects = oldMap, old.MapRef, old.MapObjects
		return now, nil
	case oldMap != nil && scattered(&builder.out, e.file.Path, 0):
		return nil, errScattered
	}
	now.Map = &builder.out
	if len(now.Map.Frames) > inlineFrames {
		ref, err := c.store.WriteMap(ctx, now.Map)
		if err != nil {
			return nil, err
		}
		now.MapRef, now.MapObjects = &ref, now.Map.Objects()
	}
	return now, nil
}

// hasHash tells whether a block has the given hash; nil has none.
func (f *fileState) hasHash(block uint32, sum []byte) bool {
	if f == nil {
		return false
	}
	i := int64(block) * hashSize
	return i+hashSize <= int64(len(f.Hashes)) && string(f.Hashes[i:i+hashSize]) == string(sum)
}

// suspects tells whether a page's checksum was wrong.
func (f *fileState) suspects(block uint32) bool {
	if f == nil {
		return false
	}
	_, corrupt := slices.BinarySearch(f.Corrupt, block)
	_, excused := slices.BinarySearch(f.Excused, block)
	return corrupt || excused
}

// checkPage verifies a page's checksum. A page that is wrong is read again, into the same place: we may have seen it
// half written. What stays wrong is noted: as corrupt, or as excused if its LSN says that it was written since backup
// start, because the WAL from there on begins with its whole image (full page writes are forced during a backup).
func (c *copier) checkPage(ctx context.Context, e *entry, f *os.File, number uint32, page []byte, now *fileState) (reread bool, err error) {
	block := e.firstBlock + number
	for attempt := 0; !postgres.ValidPage(page, block); attempt++ {
		// With many bad pages in a file waiting for each would take for ever, and they are not half written.
		if attempt == 5 || attempt > 0 && len(now.Corrupt) > 100 {
			lsn := postgres.PageLSN(page)
			if lsn < c.startLSN {
				now.Corrupt = append(now.Corrupt, number)
				return reread, nil
			}
			now.Excused = append(now.Excused, number)
			c.mu.Lock()
			c.excused = append(c.excused, excusedPage{e, number, lsn})
			c.mu.Unlock()
			return reread, nil
		}
		if attempt > 0 {
			select {
			case <-ctx.Done():
				return reread, context.Cause(ctx)
			case <-time.After(time.Duration(attempt) * 5 * time.Millisecond):
			}
		}
		reread = true
		n, err := f.ReadAt(page, int64(number)*relationBlock)
		if err != nil && err != io.EOF {
			return reread, fmt.Errorf("read page %d again: %w", number, err)
		}
		if n < len(page) {
			clear(page[n:]) // the file was cut: so is the page, once WAL is replayed
			clear(page[:n])
		}
	}
	return reread, nil
}

// judgeExcused settles, once the backup's end is known, which excused pages were corrupt after all: no page can bear
// an LSN that WAL had not reached.
func (c *copier) judgeExcused(stop postgres.LSN) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, p := range c.excused {
		if p.lsn > stop {
			p.e.file.Corrupt = append(p.e.file.Corrupt, p.block)
			c.log.Error("corrupt page: its checksum is wrong, and so is its LSN", "path", p.e.full, "page", p.block, "lsn", p.lsn)
		}
	}
}

// advice keeps a backup from pushing the server's working set out of the page cache: what was not cached before we
// read it is dropped again.
type advice struct {
	fd   int
	cold bool
}

func newAdvice(f *os.File, size int64) advice {
	a := advice{fd: int(f.Fd())}
	if size < readSize {
		return a
	}
	_ = unix.Fadvise(a.fd, 0, 0, unix.FADV_SEQUENTIAL) // only advice
	var cached unix.Cachestat_t
	// Linux 6.5 and later. Without it nothing is dropped: the kernel's own replacement tells pages that were read once
	// from those in use well enough, whereas dropping blindly would hurt for certain.
	err := unix.Cachestat(uint(a.fd), &unix.CachestatRange{}, &cached, 0)
	a.cold = err == nil && int64(cached.Cache)*int64(os.Getpagesize()) < size/8
	return a
}

func (a advice) done(offset int64, n int) {
	if a.cold && n > 0 {
		_ = unix.Fadvise(a.fd, offset, int64(n), unix.FADV_DONTNEED) // only advice
	}
}

// storeBytes brings a file that is held in memory into the image: pg_control.
func (c *copier) storeBytes(ctx context.Context, e *entry, content []byte, identity fileIdentity) error {
	b, err := newBuffers(c.hashKey)
	if err != nil {
		return err
	}
	ref, err := c.store.WriteFrame(ctx, content)
	if err != nil {
		return fmt.Errorf("copy %s: %w", e.full, err)
	}
	c.read.Add(int64(len(content)))
	c.changed.Add(int64(len(content)))
	now := &fileState{
		Volume: e.volumeKey, Path: e.file.Path, Identity: identity, Size: int64(len(content)), BlockSize: plainBlock,
		Hashes: slices.Clone(b.digest(content)),
		Map: &repository.SegmentMap{
			BlockSize: plainBlock, Blocks: 1, Frames: []repository.FrameRef{ref}, Runs: []repository.Run{{Count: 1}},
		},
	}
	e.describe(now)
	return c.state.add(now)
}
