package repository

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"

	"github.com/zeebo/blake3"
	"golang.org/x/sync/errgroup"
)

// Image reads an image. Safe for concurrent use. Pin it (Begin with SessionRestore) while reading: else retention may
// take it away meanwhile, which shows as objectstore.ErrNotExist.
type Image struct {
	s        *Series
	sid      SID
	refs     *refs
	manifest *Manifest
}

// OpenImage reads and verifies refs and manifest of an image that is live, or that a session pins; any other:
// *NotLiveError. An encrypted one without a fitting identity: *NoIdentityError.
func (s *Series) OpenImage(ctx context.Context, sid SID) (*Image, error) {
	h, err := s.Head(ctx)
	if err != nil {
		return nil, err
	}
	info := h.Image(sid)
	if info == nil && !h.pinned(sid) {
		return nil, &NotLiveError{Series: s.id, SID: sid}
	}
	r, refsDigest, err := s.readRefsChecksum(ctx, sid)
	if err != nil {
		return nil, fmt.Errorf("open image %s of %s: %w", sid, s.id, err)
	}
	if info != nil && info.RefsDigest != refsDigest {
		return nil, &CorruptError{Repository: s.r.store.URL(), Key: s.id.refsKey(sid), Err: fmt.Errorf("found checksum %s, expected %s", refsDigest, info.RefsDigest)}
	}

	key := s.id.manifestKey(sid)
	body := s.r.newReader(ctx, key, 0, -1)
	defer body.Close()
	digest := blake3.New()
	counted := &countingReader{r: io.TeeReader(body, digest)}
	m, err := s.r.readManifest(counted, key)
	if err != nil {
		return nil, fmt.Errorf("open image %s of %s: %w", sid, s.id, err)
	}
	wanted := r.Manifest.BLAKE3
	if info != nil && info.ManifestDigest != wanted {
		return nil, &CorruptError{Repository: s.r.store.URL(), Key: s.id.refsKey(sid), Err: fmt.Errorf("found manifest %s, expected %s", wanted, info.ManifestDigest)}
	}
	if found := hex.EncodeToString(digest.Sum(nil)); found != wanted || counted.n != r.Manifest.Size {
		return nil, &CorruptError{Repository: s.r.store.URL(), Key: key, Err: fmt.Errorf("found %d bytes with BLAKE3 %s, expected %d with %s", counted.n, found, r.Manifest.Size, wanted)}
	}
	if m.SID != sid || m.SystemID != s.id.SystemID {
		return nil, &CorruptError{Repository: s.r.store.URL(), Key: key, Err: fmt.Errorf("found image %s of cluster %s, expected %s of %s", m.SID, m.SystemID, sid, s.id.SystemID)}
	}
	return &Image{s: s, sid: sid, refs: r, manifest: m}, nil
}

type countingReader struct {
	r io.Reader
	n int64
}

func (c *countingReader) Read(p []byte) (int, error) {
	n, err := c.r.Read(p)
	c.n += int64(n)
	return n, err
}

// Manifest is what the image holds. The caller must not change it.
func (i *Image) Manifest() *Manifest { return i.manifest }

// FileMap returns a file's map, inline or fetched; an empty file's has no blocks.
func (i *Image) FileMap(ctx context.Context, f *File) (*SegmentMap, error) {
	switch {
	case f.Inline != nil:
		return f.Inline, nil
	case f.Map == nil:
		return &SegmentMap{BlockSize: MaxFrame}, nil
	}
	key := i.s.id.objectKey(f.Map.Object)
	if f.Map.Object.Kind != MapObject {
		return nil, i.damaged(f, fmt.Errorf("found its map in %s", f.Map.Object))
	}
	if err := i.refs.covers(f.Map); err != nil {
		return nil, i.damaged(f, err)
	}
	c, err := i.cipher(f.Map.Object)
	if err != nil {
		return nil, err
	}
	body := i.s.r.newReader(ctx, key, int64(f.Map.Offset), int64(f.Map.Stored))
	defer body.Close()
	frame := make([]byte, f.Map.Stored)
	if _, err := io.ReadFull(body, frame); err != nil {
		return nil, i.s.r.contentError(key, short(fmt.Sprintf("frame %d", f.Map.Frame), err))
	}
	var payload []byte
	raw, err := openRef(c, mapContainer, f.Map, frame, nil, &payload)
	if err != nil {
		return nil, i.s.r.contentError(key, err)
	}
	m := &SegmentMap{}
	if err := m.UnmarshalBinary(raw); err != nil {
		return nil, i.s.r.contentError(key, fmt.Errorf("frame %d: %w", f.Map.Frame, err))
	}
	if int64(m.Blocks)*int64(m.BlockSize) < f.Size {
		return nil, i.damaged(f, fmt.Errorf("found a map of %d blocks of %d bytes, expected one for %d bytes", m.Blocks, m.BlockSize, f.Size))
	}
	return m, nil
}

func (i *Image) damaged(f *File, err error) error {
	return &CorruptError{Repository: i.s.r.store.URL(), Key: i.s.id.manifestKey(i.sid), Err: fmt.Errorf("file %q: %w", f.Path, err)}
}

// cipher makes the cipher of an object that refs name.
func (i *Image) cipher(ref ObjectRef) (*objectCipher, error) {
	o := i.refs.object(ref)
	if o == nil {
		return nil, fmt.Errorf("image %s of %s does not refer to %s", i.sid, i.s.id, ref)
	}
	key := i.s.id.objectKey(ref)
	k := &i.refs.Keys[o.Key]
	session, err := i.s.r.unwrap(key, k.Suite, k.Blob)
	if err != nil {
		return nil, err
	}
	return session.cipherFor(key, ref.Kind.container(), o.salt(), nil)
}

// openRef opens a frame and checks that it is the one that f means.
func openRef(c *objectCipher, kind containerKind, f *FrameRef, frame, dst []byte, scratch *[]byte) ([]byte, error) {
	start := len(dst)
	dst, h, err := openFrame(c, kind, f.Frame, frame, dst, scratch)
	if err != nil {
		return nil, err
	}
	if len(dst)-start != int(f.Raw) || h.flags != 0 {
		return nil, fmt.Errorf("frame %d: found %d bytes (flags %d), expected %d", f.Frame, len(dst)-start, h.flags, f.Raw)
	}
	return dst, nil
}

// How ReadFrames reads. Its memory is readFetches spans and, for each core, a few frames: some 70 MiB.
const (
	readGap     = 512 << 10 // bytes read and thrown away rather than asked for separately: some 6 ms of one connection, where a request costs 30 ms and more
	readSpan    = 8 << 20   // bytes of one request, at most: S3's advice is 8–16 MiB
	readFetches = 8         // requests in flight: the knee of parallel range reads lies at 8–16
)

// span is one ranged read: frames that lie close together in one object.
type span struct {
	object ObjectRef
	offset uint32
	n      int
	frames []uint32 // indexes into the frames asked for
}

// fetched is the content of a span; the last of its frames gives its buffer back.
type fetched struct {
	span
	cipher *objectCipher
	buf    []byte
	left   atomic.Int32
}

type frameTask struct {
	of    *fetched
	frame uint32 // index
}

type frameResult struct {
	frame uint32 // index
	raw   *scratch
}

// ReadFrames fetches, verifies and decompresses frames, coalescing neighbours into ranged reads (gaps up to 512 KiB,
// up to 8 MiB a request, 8 requests at a time), and calls fn for each, in no order, from the calling goroutine. raw is
// valid during the call of fn. Decompression runs on all cores. At the first error, fn's included, it stops.
func (i *Image) ReadFrames(ctx context.Context, frames []FrameRef, fn func(f FrameRef, raw []byte) error) error {
	order := make([]uint32, len(frames))
	for n := range frames {
		f := &frames[n]
		if f.Object.Kind != PackObject || f.Raw > MaxFrame || f.Stored > MaxFrame+frameOverhead {
			return fmt.Errorf("read frame %d of %s: expected one of up to %d bytes in a pack", f.Frame, f.Object, MaxFrame)
		}
		if err := i.refs.covers(f); err != nil {
			return fmt.Errorf("read image %s of %s: %w", i.sid, i.s.id, err)
		}
		order[n] = uint32(n)
	}
	slices.SortFunc(order, func(a, b uint32) int {
		if c := compareObjects(frames[a].Object, frames[b].Object); c != 0 {
			return c
		}
		return cmpUint(uint64(frames[a].Offset), uint64(frames[b].Offset))
	})

	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	g, ctx := errgroup.WithContext(ctx)
	workers := runtime.GOMAXPROCS(0)
	spans := make(chan span)
	tasks := make(chan frameTask, workers)
	results := make(chan frameResult, workers)
	buffers := make(chan []byte, readFetches)
	for range readFetches {
		buffers <- nil
	}

	// Goroutines: one plans, readFetches fetch, workers decode; all end before ReadFrames does.
	g.Go(func() error {
		defer close(spans)
		return plan(ctx, frames, order, spans)
	})
	var fetching, decoding sync.WaitGroup
	for range readFetches {
		fetching.Add(1)
		g.Go(func() error {
			defer fetching.Done()
			for s := range spans {
				if err := i.fetch(ctx, s, buffers, tasks); err != nil {
					return err
				}
			}
			return nil
		})
	}
	g.Go(func() error {
		fetching.Wait()
		close(tasks)
		return nil
	})
	for range workers {
		decoding.Add(1)
		g.Go(func() error {
			defer decoding.Done()
			var payload []byte
			for t := range tasks {
				r, err := i.decode(frames, t, &payload)
				if err != nil {
					return err
				}
				if t.of.left.Add(-1) == 0 {
					buffers <- t.of.buf // has room for all there are
				}
				select {
				case results <- r:
				case <-ctx.Done():
					return context.Cause(ctx)
				}
			}
			return nil
		})
	}
	g.Go(func() error {
		decoding.Wait()
		close(results)
		return nil
	})

	var failed error
	for r := range results {
		if failed == nil {
			if failed = fn(frames[r.frame], r.raw.b); failed != nil {
				cancel(failed)
			}
		}
		scratches.put(r.raw)
	}
	err := g.Wait()
	if failed != nil {
		return failed
	}
	if errors.Is(err, context.Canceled) {
		return context.Cause(ctx)
	}
	return err
}

// plan cuts the frames, in the given order, into spans.
func plan(ctx context.Context, frames []FrameRef, order []uint32, spans chan<- span) error {
	for start := 0; start < len(order); {
		first := &frames[order[start]]
		s := span{object: first.Object, offset: first.Offset}
		end, next := uint64(first.Offset)+uint64(first.Stored), start+1
		for ; next < len(order); next++ {
			f := &frames[order[next]]
			reach := max(end, uint64(f.Offset)+uint64(f.Stored))
			if f.Object != s.object || uint64(f.Offset) > end+readGap || reach-uint64(s.offset) > readSpan {
				break
			}
			end = reach
		}
		s.n, s.frames = int(end-uint64(s.offset)), order[start:next]
		select {
		case spans <- s:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
		start = next
	}
	return nil
}

// fetch reads a span into a free buffer and hands its frames to the decoders.
func (i *Image) fetch(ctx context.Context, s span, buffers chan []byte, tasks chan<- frameTask) error {
	c, err := i.cipher(s.object)
	if err != nil {
		return err
	}
	f := &fetched{span: s, cipher: c}
	f.left.Store(int32(len(s.frames)))
	select {
	case f.buf = <-buffers:
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	if cap(f.buf) < s.n {
		f.buf = make([]byte, s.n, min(readSpan, s.n+s.n/2))
	}
	f.buf = f.buf[:s.n]
	key := i.s.id.objectKey(s.object)
	body := i.s.r.newReader(ctx, key, int64(s.offset), int64(s.n))
	_, err = io.ReadFull(body, f.buf)
	_ = body.Close() // nothing was written
	if err != nil {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		return i.s.r.contentError(key, short(fmt.Sprintf("bytes %d to %d", s.offset, int(s.offset)+s.n), err))
	}
	for _, frame := range s.frames {
		select {
		case tasks <- frameTask{of: f, frame: frame}:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
	return nil
}

func (i *Image) decode(frames []FrameRef, t frameTask, payload *[]byte) (frameResult, error) {
	f := &frames[t.frame]
	start := int(f.Offset - t.of.offset)
	raw := scratches.get()
	var err error
	if raw.b, err = openRef(t.of.cipher, packContainer, f, t.of.buf[start:start+int(f.Stored)], raw.b[:0], payload); err != nil {
		return frameResult{}, i.s.r.contentError(i.s.id.objectKey(f.Object), err)
	}
	return frameResult{frame: t.frame, raw: raw}, nil
}
