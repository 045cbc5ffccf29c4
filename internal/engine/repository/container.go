package repository

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"

	"github.com/zeebo/blake3"
)

// containerKind is stored in container headers: never renumber.
type containerKind uint8

const (
	packContainer     containerKind = 1
	mapContainer      containerKind = 2
	manifestContainer containerKind = 3
	walContainer      containerKind = 4
)

func (k containerKind) String() string {
	switch k {
	case packContainer:
		return "pack"
	case mapContainer:
		return "map object"
	case manifestContainer:
		return "manifest"
	case walContainer:
		return "WAL object"
	}
	return fmt.Sprintf("kind %d", uint8(k))
}

// containerKind of the objects that maps refer to.
func (k ObjectKind) container() containerKind {
	if k == MapObject {
		return mapContainer
	}
	return packContainer
}

// The layout of containers; doc.go describes it. All of these are part of the repository format.
const (
	containerMagic    = "PGARKOBJ"
	fixedHeaderSize   = 44
	headerChecksum    = 32
	maxMeta           = 1 << 20 // bytes
	frameHeaderSize   = 16
	frameOverhead     = frameHeaderSize + tagSize
	flagLast          = 1 << 0 // the object's last frame
	flagDirectory     = 1 << 1 // the frame is the directory of a pack or map object
	directoryEntry    = 12     // bytes
	trailerSize       = 16
	trailerMagic      = "PGARKEND"
	maxFramesInObject = 1 << 16 // the directory not counted

	// MaxFrame is the most bytes a frame of a pack holds before compression.
	MaxFrame = 256 << 10
	// MaxPackSize is the most bytes a pack may have, headers and tags included. Readers refuse more.
	MaxPackSize = 64 << 20

	maxStreamRaw = 4 << 20  // bytes in a frame of a manifest or WAL object
	maxMapRaw    = 32 << 20 // bytes of one encoded segment map: a file of about 1 TiB
)

// maxRaw is the most bytes that a frame may hold before compression.
func (k containerKind) maxRaw() uint32 {
	switch k {
	case packContainer:
		return MaxFrame
	case mapContainer:
		return maxMapRaw
	}
	return maxStreamRaw
}

// containerHeader begins every container.
type containerHeader struct {
	kind  containerKind
	suite suite
	salt  [saltSize]byte
	blob  []byte // wrapped session key
	meta  []byte // JSON, or empty
}

func (h *containerHeader) size() int {
	return fixedHeaderSize + len(h.blob) + len(h.meta) + headerChecksum
}

// append encodes the header for the object that is stored under key.
func (h *containerHeader) append(b []byte, key string) []byte {
	start := len(b)
	b = append(b, containerMagic...)
	b = append(b, Format, byte(h.kind), byte(h.suite), 0)
	b = binary.BigEndian.AppendUint32(b, uint32(len(h.blob)))
	b = binary.BigEndian.AppendUint32(b, uint32(len(h.meta)))
	b = append(b, h.salt[:]...)
	b = append(b, h.blob...)
	b = append(b, h.meta...)
	sum := headerSum(key, b[start:])
	return append(b, sum[:]...)
}

func headerSum(key string, header []byte) (sum [headerChecksum]byte) {
	s := blake3.New()
	_, _ = s.WriteString(key) // a hash never fails
	_, _ = s.Write([]byte{0})
	_, _ = s.Write(header)
	s.Sum(sum[:0])
	return sum
}

// newerFormat is the format of a container written by a newer pgark.
type newerFormat int

func (f newerFormat) Error() string {
	return fmt.Sprintf("found format %d, expected at most %d", int(f), Format)
}

// readHeader reads and checks the header of the object that is stored under key.
func readHeader(r io.Reader, key string, kind containerKind) (*containerHeader, error) {
	var fixed [fixedHeaderSize]byte
	if _, err := io.ReadFull(r, fixed[:]); err != nil {
		return nil, short("header", err)
	}
	if string(fixed[:8]) != containerMagic {
		return nil, fmt.Errorf("found %q at its beginning, expected %q", fixed[:8], containerMagic)
	}
	// Formats to come keep the first nine bytes. What follows is checked before it is believed, except for lengths, which
	// are bounded.
	if fixed[8] > Format {
		return nil, newerFormat(fixed[8])
	}
	nblob, nmeta := binary.BigEndian.Uint32(fixed[12:]), binary.BigEndian.Uint32(fixed[16:])
	if nblob > maxKeyBlob || nmeta > maxMeta {
		return nil, fmt.Errorf("header: found lengths %d and %d, expected at most %d and %d", nblob, nmeta, maxKeyBlob, maxMeta)
	}
	all := make([]byte, fixedHeaderSize+int(nblob)+int(nmeta)+headerChecksum)
	copy(all, fixed[:])
	if _, err := io.ReadFull(r, all[fixedHeaderSize:]); err != nil {
		return nil, short("header", err)
	}
	body, sum := all[:len(all)-headerChecksum], all[len(all)-headerChecksum:]
	if want := headerSum(key, body); !bytes.Equal(sum, want[:]) {
		return nil, errors.New("header: its checksum does not match: it is damaged, or another object's")
	}
	h := &containerHeader{kind: containerKind(fixed[9]), suite: suite(fixed[10]), blob: body[fixedHeaderSize : fixedHeaderSize+nblob], meta: body[fixedHeaderSize+nblob:]}
	copy(h.salt[:], fixed[20:])
	switch {
	case fixed[8] != Format:
		return nil, fmt.Errorf("header: found format %d, expected %d", fixed[8], Format)
	case h.kind != kind:
		return nil, fmt.Errorf("header: found a %s, expected a %s", h.kind, kind)
	case h.suite > suiteAESGCM || fixed[11] != 0:
		return nil, fmt.Errorf("header: found %s and reserved byte %d, expected a known suite and 0", h.suite, fixed[11])
	case (h.suite == suiteNone) != (nblob == 0):
		return nil, fmt.Errorf("header: found a wrapped key of %d bytes with suite %s", nblob, h.suite)
	}
	return h, nil
}

// short tells an object that ends too early from a failed read, which says nothing about the object.
func short(what string, err error) error {
	if read, ok := errors.AsType[*readError](err); ok {
		return read
	}
	if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
		return fmt.Errorf("%s: %w", what, errCutShort)
	}
	return &readError{err}
}

// errCutShort is not io.ErrUnexpectedEOF, which callers take for a broken connection that is worth another try.
var errCutShort = errors.New("cut short")

// readError marks an error of the store among those of the content.
type readError struct{ err error }

func (e *readError) Error() string { return e.err.Error() }
func (e *readError) Unwrap() error { return e.err }

// contentError turns what decoding the object under key returned into what callers see.
func (r *Repository) contentError(key string, err error) error {
	if err == nil {
		return nil
	}
	if e, ok := errors.AsType[*readError](err); ok {
		return e.err
	}
	if f, ok := errors.AsType[newerFormat](err); ok {
		return &FormatError{Repository: r.store.URL(), Key: key, Found: int(f), Supported: Format}
	}
	return &CorruptError{Repository: r.store.URL(), Key: key, Err: err}
}

// frameHeader begins every frame.
type frameHeader struct {
	stored uint32 // bytes of the payload
	raw    uint32 // bytes of the payload after decompression
	codec  codec
	flags  uint8
	items  uint32 // manifest: files; directory: frames; else 0. For people and rebuilding; nothing depends on it
}

func (h frameHeader) put(b []byte) {
	_ = b[frameHeaderSize-1]
	binary.BigEndian.PutUint32(b[0:], h.stored)
	binary.BigEndian.PutUint32(b[4:], h.raw)
	b[8], b[9], b[10], b[11] = byte(h.codec), h.flags, 0, 0
	binary.BigEndian.PutUint32(b[12:], h.items)
}

// parseFrameHeader checks bounds before anything is allocated or read by them; the tag is checked later.
func parseFrameHeader(b []byte, kind containerKind) (frameHeader, error) {
	_ = b[frameHeaderSize-1]
	h := frameHeader{
		stored: binary.BigEndian.Uint32(b[0:]),
		raw:    binary.BigEndian.Uint32(b[4:]),
		codec:  codec(b[8]),
		flags:  b[9],
		items:  binary.BigEndian.Uint32(b[12:]),
	}
	limit := kind.maxRaw()
	if h.flags&flagDirectory != 0 {
		limit = maxFramesInObject * directoryEntry
	}
	switch {
	case h.raw > limit || h.stored > h.raw:
		return h, fmt.Errorf("found lengths %d and %d, expected at most %d", h.stored, h.raw, limit)
	case h.codec > codecZstd || h.flags > flagLast|flagDirectory || b[10] != 0 || b[11] != 0:
		return h, fmt.Errorf("found codec %d, flags %d, expected known ones", h.codec, h.flags)
	}
	return h, nil
}

// openFrame verifies a whole frame and appends its content to dst. scratch is a buffer for the payload in between.
func openFrame(c *objectCipher, kind containerKind, number uint32, frame, dst []byte, scratch *[]byte) ([]byte, frameHeader, error) {
	if len(frame) < frameOverhead {
		return nil, frameHeader{}, fmt.Errorf("frame %d: found %d bytes, expected at least %d", number, len(frame), frameOverhead)
	}
	h, err := parseFrameHeader(frame, kind)
	if err != nil {
		return nil, h, fmt.Errorf("frame %d: %w", number, err)
	}
	if int(h.stored)+frameOverhead != len(frame) {
		return nil, h, fmt.Errorf("frame %d: found %d bytes, expected %d", number, len(frame), int(h.stored)+frameOverhead)
	}
	if h.codec == codecRaw {
		if h.stored != h.raw {
			return nil, h, fmt.Errorf("frame %d: found %d bytes stored raw, expected %d", number, h.stored, h.raw)
		}
		if dst, err = c.open(dst, number, frame); err != nil {
			return nil, h, fmt.Errorf("frame %d: %w", number, err)
		}
		return dst, h, nil
	}
	payload, err := c.open((*scratch)[:0], number, frame)
	if err != nil {
		return nil, h, fmt.Errorf("frame %d: %w", number, err)
	}
	*scratch = payload
	if cap(dst)-len(dst) < int(h.raw) {
		dst = append(make([]byte, 0, len(dst)+int(h.raw)), dst...)
	}
	if dst, err = decompress(dst, payload, h.codec, int(h.raw)); err != nil {
		return nil, h, fmt.Errorf("frame %d: %w", number, err)
	}
	return dst, h, nil
}

// frameReader reads the frames of a manifest or WAL object one after the other.
type frameReader struct {
	r       io.Reader
	c       *objectCipher
	kind    containerKind
	number  uint32
	last    bool
	frame   []byte
	payload []byte
	raw     []byte
}

// next returns the next frame's content, valid until the next call; io.EOF after the last one. An object that ends
// without its last frame, or goes on after it, is refused.
func (f *frameReader) next() ([]byte, frameHeader, error) {
	if f.last {
		var one [1]byte
		n, err := io.ReadFull(f.r, one[:])
		switch {
		case n != 0:
			return nil, frameHeader{}, fmt.Errorf("it goes on after its last frame, frame %d", f.number-1)
		case !errors.Is(err, io.EOF):
			return nil, frameHeader{}, short("end", err)
		}
		return nil, frameHeader{}, io.EOF
	}
	frame, h, err := f.nextSealed()
	if err != nil {
		return nil, h, err
	}
	if f.raw, h, err = openFrame(f.c, f.kind, f.number-1, frame, f.raw[:0], &f.payload); err != nil {
		return nil, h, err
	}
	return f.raw, h, nil
}

// nextSealed reads the next frame, valid until the next call, and checks its header and length only.
func (f *frameReader) nextSealed() ([]byte, frameHeader, error) {
	f.frame = grow(f.frame, frameHeaderSize)
	if _, err := io.ReadFull(f.r, f.frame); err != nil {
		return nil, frameHeader{}, short(fmt.Sprintf("frame %d", f.number), err)
	}
	h, err := parseFrameHeader(f.frame, f.kind)
	if err != nil {
		return nil, h, fmt.Errorf("frame %d: %w", f.number, err)
	}
	if h.flags&flagDirectory != 0 {
		return nil, h, fmt.Errorf("frame %d: found a directory, expected none in a %s", f.number, f.kind)
	}
	f.frame = grow(f.frame, frameOverhead+int(h.stored))
	if _, err := io.ReadFull(f.r, f.frame[frameHeaderSize:]); err != nil {
		return nil, h, short(fmt.Sprintf("frame %d", f.number), err)
	}
	f.number++
	f.last = h.flags&flagLast != 0
	return f.frame, h, nil
}

// grow gives a slice of n bytes that begins with b's content, up to n.
func grow(b []byte, n int) []byte {
	if cap(b) >= n {
		return b[:n]
	}
	g := make([]byte, n, n+n/4)
	copy(g, b[:min(len(b), n)])
	return g
}

// appendFrame compresses raw, or not if effort is uncompressed, and appends it as an unsealed frame: the room for its tag
// is left empty.
func appendFrame(b, raw []byte, flags uint8, items uint32, effort Effort) []byte {
	start := len(b)
	b = append(b, make([]byte, frameHeaderSize)...)
	b, c := compress(b, raw, effort)
	if c == codecRaw {
		b = append(b, raw...)
	}
	h := frameHeader{stored: uint32(len(b) - start - frameHeaderSize), raw: uint32(len(raw)), codec: c, flags: flags, items: items}
	h.put(b[start:])
	return append(b, make([]byte, tagSize)...)
}
