package repository

import (
	"bytes"
	"context"
	"encoding/hex"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"

	"github.com/zeebo/blake3"
	"golang.org/x/time/rate"
)

// WriterOptions say how an image is uploaded. The zero value works.
type WriterOptions struct {
	PackSize    int    // bytes; default 16 MiB, 64 MiB at most
	Uploads     int    // packs in flight; default 2. Memory: (Uploads+1) × PackSize, and one frame a caller
	Compression string // "zstd" (default) or "none"
	MaxRate     int64  // upload bytes per second, on average over some packs; 0: unlimited
}

const (
	defaultPackSize = 16 << 20 // a PUT of 16 MiB costs little more than one of 64, and suits guests with little memory
	defaultUploads  = 2        // one compresses while two travel; a 2-core guest does not fill more
	mapObjectSize   = 4 << 20  // maps of a 100 GB cluster
)

func (o *WriterOptions) applyDefaults() error {
	if o.PackSize == 0 {
		o.PackSize = defaultPackSize
	}
	if o.Uploads == 0 {
		o.Uploads = defaultUploads
	}
	if o.Compression == "" {
		o.Compression = "zstd"
	}
	switch {
	case o.PackSize < 0 || o.PackSize > MaxPackSize:
		return fmt.Errorf("pack size: found %d bytes, expected up to %d", o.PackSize, MaxPackSize)
	case o.Uploads < 0:
		return fmt.Errorf("uploads: found %d, expected 1 or above", o.Uploads)
	case o.Compression != "zstd" && o.Compression != "none":
		return fmt.Errorf("compression: found %q, expected zstd or none", o.Compression)
	case o.MaxRate < 0:
		return fmt.Errorf("upload rate: found %d bytes a second", o.MaxRate)
	}
	return nil
}

// ImageWriter uploads the objects of one image. Its methods are safe for concurrent use. After an error, or once the
// context of NewImageWriter or of a call has ended, it is dead and every call returns that error.
type ImageWriter struct {
	s           *Series
	sid, parent SID
	o           WriterOptions
	session     *sessionKey
	parentRefs  *refs // nil: no parent
	limiter     *rate.Limiter
	stored      atomic.Int64

	// ctx ends with the writer's first error as its cause.
	ctx  context.Context
	kill context.CancelCauseFunc

	// turn is a lock that a caller can give up waiting for: who has sent to it may use the fields below, up to the next
	// blank line. It is held while waiting for a buffer.
	turn     chan struct{}
	open     [3]*pack // by ObjectKind: the objects being filled
	count    [3]uint32
	finished bool

	buffers   chan []byte    // what packs are built in: Uploads+1 of them, allocated at first use
	inFlight  chan struct{}  // has room for Uploads
	uploading sync.WaitGroup // objects that were filled and are not yet durable

	// mu guards done and behind.
	mu     sync.Mutex
	done   []refObject                 // durable, without their key
	behind map[objectFrame][]ObjectRef // what each map written here refers to
}

// objectFrame names a frame within an object.
type objectFrame struct {
	Object ObjectRef
	Frame  uint32
}

// NewImageWriter prepares session sid's objects; parent, which that session pins, may be 0.
func (s *Series) NewImageWriter(ctx context.Context, sid, parent SID, o WriterOptions) (*ImageWriter, error) {
	if s.invalid != nil {
		return nil, s.invalid
	}
	if sid == 0 || parent >= sid {
		return nil, fmt.Errorf("write image %s of %s: found parent %s, expected an earlier one", sid, s.id, parent)
	}
	if err := o.applyDefaults(); err != nil {
		return nil, fmt.Errorf("write image %s of %s: %w", sid, s.id, err)
	}
	w := &ImageWriter{
		s: s, sid: sid, parent: parent, o: o,
		turn:     make(chan struct{}, 1),
		buffers:  make(chan []byte, o.Uploads+1),
		inFlight: make(chan struct{}, o.Uploads),
		behind:   make(map[objectFrame][]ObjectRef),
	}
	for range cap(w.buffers) {
		w.buffers <- nil
	}
	if o.MaxRate > 0 {
		// A burst of a tenth of a second smooths what a pack would otherwise send at once.
		w.limiter = rate.NewLimiter(rate.Limit(o.MaxRate), int(max(o.MaxRate/10, 64<<10)))
	}
	var err error
	if parent != 0 {
		if w.parentRefs, err = s.readRefs(ctx, parent); err != nil {
			return nil, fmt.Errorf("write image %s of %s: refs of its parent: %w", sid, s.id, err)
		}
	}
	if w.session, err = s.r.newSessionKey(); err != nil {
		return nil, err
	}
	w.ctx, w.kill = context.WithCancelCause(ctx)
	return w, nil
}

// fail makes the writer dead and returns its first error.
func (w *ImageWriter) fail(err error) error {
	w.kill(err)
	return context.Cause(w.ctx)
}

// lock waits for its turn.
func (w *ImageWriter) lock(ctx context.Context) error {
	select {
	case w.turn <- struct{}{}:
	case <-w.ctx.Done():
		return context.Cause(w.ctx)
	case <-ctx.Done():
		return w.fail(context.Cause(ctx))
	}
	if w.ctx.Err() != nil {
		w.unlock()
		return context.Cause(w.ctx)
	}
	if w.finished {
		w.unlock()
		return ErrClosed
	}
	return nil
}

func (w *ImageWriter) unlock() { <-w.turn }

// scratch holds the compressed form of one frame until its place is known.
type scratch struct{ b []byte }

var scratches = newPool(func() *scratch { return &scratch{b: make([]byte, 0, MaxFrame+MaxFrame/8)} })

// WriteFrame compresses and seals raw (1 byte to 256 KiB) and puts it in a pack. It returns before the pack is durable.
// It does not keep raw.
func (w *ImageWriter) WriteFrame(ctx context.Context, raw []byte) (FrameRef, error) {
	if len(raw) == 0 || len(raw) > MaxFrame {
		return FrameRef{}, fmt.Errorf("write frame of image %s: found %d bytes, expected 1 to %d", w.sid, len(raw), MaxFrame)
	}
	return w.write(ctx, PackObject, raw)
}

// WriteMap stores a map in a map object and says where. The frames that it names must have been written, or be the
// parent's.
func (w *ImageWriter) WriteMap(ctx context.Context, m *SegmentMap) (FrameRef, error) {
	raw, err := m.MarshalBinary()
	if err != nil {
		return FrameRef{}, err
	}
	if len(raw) > maxMapRaw {
		return FrameRef{}, fmt.Errorf("write map of image %s: found %d bytes, expected at most %d", w.sid, len(raw), maxMapRaw)
	}
	f, err := w.write(ctx, MapObject, raw)
	if err != nil {
		return FrameRef{}, err
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	w.behind[objectFrame{f.Object, f.Frame}] = m.Objects()
	return f, nil
}

func (w *ImageWriter) write(ctx context.Context, kind ObjectKind, raw []byte) (FrameRef, error) {
	// Compressing is most of the work and needs no lock; only then is it known how much room to take.
	s := scratches.get()
	defer scratches.put(s)
	payload, c := raw, codecRaw
	if w.o.Compression == "zstd" {
		if s.b, c = compress(s.b[:0], raw, Thorough); c == codecZstd {
			payload = s.b
		}
	}
	p, f, frame, err := w.reserve(ctx, kind, len(payload)+frameOverhead, len(raw))
	if err != nil {
		return FrameRef{}, err
	}
	frameHeader{stored: uint32(len(payload)), raw: uint32(len(raw)), codec: c}.put(frame)
	copy(frame[frameHeaderSize:], payload)
	p.cipher.seal(f.Frame, frame)
	p.sealing.Done()
	return f, nil
}

// reserve takes room in the open object of a kind, beginning a new one where the frame does not fit.
func (w *ImageWriter) reserve(ctx context.Context, kind ObjectKind, stored, raw int) (*pack, FrameRef, []byte, error) {
	if err := w.lock(ctx); err != nil {
		return nil, FrameRef{}, nil, err
	}
	defer w.unlock()
	p := w.open[kind]
	if p != nil && !p.fits(stored) && len(p.entries) > 0 {
		if err := w.dispatch(ctx, kind); err != nil {
			return nil, FrameRef{}, nil, w.fail(err)
		}
		p = nil
	}
	if p == nil {
		var err error
		if p, err = w.begin(ctx, kind); err != nil {
			return nil, FrameRef{}, nil, w.fail(err)
		}
		w.open[kind] = p
	}
	offset := len(p.buf)
	number, frame := p.reserve(stored, raw)
	return p, FrameRef{Object: p.ref, Frame: number, Offset: uint32(offset), Stored: uint32(stored), Raw: uint32(raw)}, frame, nil
}

// begin starts an object. For a pack it waits until a buffer is free: so memory is bounded, and whoever writes frames
// is slowed to what the store takes.
func (w *ImageWriter) begin(ctx context.Context, kind ObjectKind) (*pack, error) {
	ref := ObjectRef{SID: w.sid, Kind: kind, N: w.count[kind]}
	salt, err := w.s.r.newSalt(w.session.suite)
	if err != nil {
		return nil, err
	}
	var buf []byte
	limit := min(w.o.PackSize, mapObjectSize)
	if kind == PackObject {
		limit = w.o.PackSize
		select {
		case buf = <-w.buffers:
		case <-w.ctx.Done():
			return nil, context.Cause(w.ctx)
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		}
		if buf == nil {
			buf = make([]byte, 0, limit)
		}
	}
	w.count[kind]++
	return newPack(ref, w.s.id.objectKey(ref), w.session, salt, limit, buf)
}

// dispatch hands the open object of a kind to an upload of its own, once there are less than Uploads in flight. The
// upload's goroutine ends with it, and Finish and Close wait for it.
func (w *ImageWriter) dispatch(ctx context.Context, kind ObjectKind) error {
	p := w.open[kind]
	if p == nil {
		return nil
	}
	select {
	case w.inFlight <- struct{}{}:
	case <-w.ctx.Done():
		return context.Cause(w.ctx)
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	w.open[kind] = nil
	w.uploading.Add(1)
	go func() {
		defer w.uploading.Done()
		if err := w.upload(p); err != nil {
			w.kill(err)
		}
		if kind == PackObject {
			w.buffers <- p.buf[:0] // has room for all there are
		}
		<-w.inFlight
	}()
	return nil
}

func (w *ImageWriter) upload(p *pack) error {
	p.finish()
	if len(p.buf) > MaxPackSize {
		return fmt.Errorf("store %s: found %d bytes, expected at most %d", p.key, len(p.buf), MaxPackSize)
	}
	digest := p.digest()
	if err := w.create(p.key, p.buf); err != nil {
		return err
	}
	o := refObject{Object: p.ref, Size: int64(len(p.buf)), BLAKE3: hex.EncodeToString(digest[:])}
	if w.session.suite != suiteNone {
		o.Salt = hex.EncodeToString(p.salt[:])
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	w.done = append(w.done, o)
	return nil
}

// create stores an object at the rate that is allowed.
func (w *ImageWriter) create(key string, object []byte) error {
	for left := len(object); w.limiter != nil && left > 0; {
		n := min(left, w.limiter.Burst())
		if err := w.limiter.WaitN(w.ctx, n); err != nil {
			if w.ctx.Err() != nil {
				return context.Cause(w.ctx)
			}
			return err
		}
		left -= n
	}
	w.stored.Add(int64(len(object)))
	if err := w.s.r.store.Create(w.ctx, key, bytes.NewReader(object), int64(len(object))); err != nil {
		if w.ctx.Err() != nil {
			return context.Cause(w.ctx) // not the store's fault
		}
		return err
	}
	return nil
}

// StoredBytes is what has been handed to the store so far.
func (w *ImageWriter) StoredBytes() int64 { return w.stored.Load() }

// Finish uploads what is left, then manifest and refs; everything is durable when it returns. The caller then commits
// with the digests that it returns. The manifest's maps may refer to this image's and the parent's objects only. The
// writer can be used no more afterwards.
func (w *ImageWriter) Finish(ctx context.Context, m *Manifest) (manifestDigest, refsDigest string, err error) {
	stop := context.AfterFunc(ctx, func() { w.kill(context.Cause(ctx)) })
	defer stop()
	if err := w.lock(ctx); err != nil {
		return "", "", err
	}
	for _, kind := range []ObjectKind{PackObject, MapObject} {
		if err := w.dispatch(ctx, kind); err != nil {
			w.unlock()
			return "", "", w.fail(err)
		}
	}
	w.finished = true
	w.unlock()
	w.uploading.Wait()
	if w.ctx.Err() != nil {
		return "", "", context.Cause(w.ctx)
	}
	if manifestDigest, refsDigest, err = w.seal(m); err != nil {
		return "", "", w.fail(fmt.Errorf("finish image %s of %s: %w", w.sid, w.s.id, err))
	}
	return manifestDigest, refsDigest, nil
}

// seal writes manifest and refs.
func (w *ImageWriter) seal(m *Manifest) (manifestDigest, refsDigest string, err error) {
	if m.SID != w.sid || m.SystemID != w.s.id.SystemID {
		return "", "", fmt.Errorf("found a manifest of image %s of cluster %s, expected %s of %s", m.SID, m.SystemID, w.sid, w.s.id.SystemID)
	}
	all, err := w.available()
	if err != nil {
		return "", "", err
	}
	// The manifest is stored with MapObjects complete, without touching the caller's.
	stored := *m
	stored.Files = slices.Clone(m.Files)
	used := make(map[ObjectRef]struct{})
	for i := range stored.Files {
		if err := w.use(&stored.Files[i], all, used); err != nil {
			return "", "", fmt.Errorf("file %q: %w", stored.Files[i].Path, err)
		}
	}

	salt, err := w.s.r.newSalt(w.session.suite)
	if err != nil {
		return "", "", err
	}
	key := w.s.id.manifestKey(w.sid)
	object, err := encodeManifest(key, &stored, w.session, salt)
	if err != nil {
		return "", "", err
	}
	digest := blake3.Sum256(object)
	if err := w.create(key, object); err != nil {
		return "", "", err
	}

	r := &refs{SID: w.sid, Parent: w.parent, Manifest: refManifest{Size: int64(len(object)), BLAKE3: hex.EncodeToString(digest[:])}, Keys: []refKey{}, Objects: []refObject{}}
	for i := range all.Objects {
		o := all.Objects[i]
		if _, ok := used[o.Object]; ok {
			o.Key = r.key(all.Keys[o.Key])
			r.Objects = append(r.Objects, o)
		}
	}
	if err := r.check(w.sid); err != nil {
		return "", "", err
	}
	key = w.s.id.refsKey(w.sid)
	document, refsDigest, err := encodeDocument(key, refsDocument{Format: Format, refs: r})
	if err != nil {
		return "", "", err
	}
	if err := w.create(key, document); err != nil {
		return "", "", err
	}
	return r.Manifest.BLAKE3, refsDigest, nil
}

// available makes the table of everything that this image may refer to: its own objects and its parent's. Nothing
// else, whatever lies in the repository: only these are kept from collection until the commit.
func (w *ImageWriter) available() (*refs, error) {
	all := &refs{SID: w.sid}
	if w.parentRefs != nil {
		all.Keys = slices.Clone(w.parentRefs.Keys)
		all.Objects = slices.Clone(w.parentRefs.Objects)
	}
	k := all.key(refKey{Suite: w.session.suite, Blob: w.session.blob})
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, o := range w.done {
		o.Key = k
		all.Objects = append(all.Objects, o)
	}
	slices.SortFunc(all.Objects, func(a, b refObject) int { return compareObjects(a.Object, b.Object) })
	return all, all.check(w.sid)
}

// use records what a file refers to and checks that it may.
func (w *ImageWriter) use(f *File, all *refs, used map[ObjectRef]struct{}) error {
	if f.Inline != nil {
		for i := range f.Inline.Frames {
			frame := &f.Inline.Frames[i]
			if err := all.covers(frame); err != nil {
				return err
			}
			used[frame.Object] = struct{}{}
		}
	}
	if f.Map == nil {
		return nil
	}
	if err := all.covers(f.Map); err != nil {
		return err
	}
	used[f.Map.Object] = struct{}{}
	if f.Map.Object.SID == w.sid {
		w.mu.Lock()
		seen := w.behind[objectFrame{f.Map.Object, f.Map.Frame}]
		w.mu.Unlock()
		given := slices.SortedFunc(slices.Values(f.MapObjects), compareObjects)
		if f.MapObjects != nil && !slices.Equal(seen, slices.Compact(given)) {
			return fmt.Errorf("found a list of %d packs behind its map, expected the %d that the map refers to", len(given), len(seen))
		}
		f.MapObjects = seen
	}
	for _, o := range f.MapObjects {
		if all.object(o) == nil {
			return fmt.Errorf("found %s behind its map, which is neither this image's nor its parent's", o)
		}
		if f.Map.Object.SID != w.sid && o.SID == w.sid {
			return fmt.Errorf("found %s behind a map that is older", o)
		}
		used[o] = struct{}{}
	}
	return nil
}

// Close releases what the writer holds and waits for its uploads to end; without Finish, what it uploaded is garbage.
func (w *ImageWriter) Close() error {
	w.kill(ErrClosed)
	w.turn <- struct{}{} // whoever has it gives up now
	w.finished = true
	w.unlock()
	w.uploading.Wait()
	return nil
}
