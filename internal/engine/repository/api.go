package repository

import (
	"context"
)

// WriterOptions: the zero value works.
type WriterOptions struct {
	PackSize    int    // bytes; default 16 MiB, 64 MiB at most
	Uploads     int    // packs in flight; default 2. Memory: (Uploads+1) × PackSize and one frame a caller
	Compression string // "zstd" (default) or "none"
	MaxRate     int64  // upload bytes per second; 0: unlimited
}

// ImageWriter uploads the objects of one image. Its methods are safe for concurrent use. After an error it is dead and
// every call returns that error.
type ImageWriter struct{}

// NewImageWriter prepares session sid's objects; parent, which that session pins, may be 0.
func (s *Series) NewImageWriter(ctx context.Context, sid, parent SID, o WriterOptions) (*ImageWriter, error) {
	panic("unimplemented")
}

// WriteFrame compresses and seals raw (1 byte to 256 KiB) and puts it in a pack. It returns before the pack is durable.
// It does not keep raw.
func (w *ImageWriter) WriteFrame(ctx context.Context, raw []byte) (FrameRef, error) {
	panic("unimplemented")
}

// WriteMap stores a map in a map object and says where.
func (w *ImageWriter) WriteMap(ctx context.Context, m *SegmentMap) (FrameRef, error) {
	panic("unimplemented")
}

// StoredBytes is what has been handed to the store so far.
func (w *ImageWriter) StoredBytes() int64 { panic("unimplemented") }

// Finish uploads what is left, then manifest and refs; everything is durable when it returns. The caller then commits
// with the digests that it returns. The manifest's maps may refer to this image's and the parent's objects only.
func (w *ImageWriter) Finish(ctx context.Context, m *Manifest) (manifestDigest, refsDigest string, err error) {
	panic("unimplemented")
}

// Close releases what the writer holds; without Finish, what it uploaded is garbage.
func (w *ImageWriter) Close() error { panic("unimplemented") }

// Image reads a live image. Safe for concurrent use. Pin it (Begin with SessionRestore) while reading.
type Image struct{}

// OpenImage reads and verifies refs and manifest. An encrypted one without a fitting identity: *NoIdentityError.
func (s *Series) OpenImage(ctx context.Context, sid SID) (*Image, error) { panic("unimplemented") }

func (i *Image) Manifest() *Manifest { panic("unimplemented") }

// FileMap returns a file's map, inline or fetched; an empty file's has no blocks.
func (i *Image) FileMap(ctx context.Context, f *File) (*SegmentMap, error) { panic("unimplemented") }

// ReadFrames fetches, verifies and decompresses frames, coalescing neighbours into ranged reads (gaps up to 512 KiB,
// up to 16 MiB a request), and calls fn for each, in no order, from one goroutine. raw is valid during the call.
func (i *Image) ReadFrames(ctx context.Context, frames []FrameRef, fn func(f FrameRef, raw []byte) error) error {
	panic("unimplemented")
}
