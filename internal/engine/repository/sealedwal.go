package repository

import (
	"bytes"
	"context"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"

	"github.com/zeebo/blake3"

	"github.com/pgark/terraform-provider-pgark/internal/engine/postgres"
)

// Effort is how hard WAL is compressed.
type Effort int

// The efforts. What they make differs in size and CPU only: every reader reads both.
const (
	// Thorough is for WAL that arrives as fast as it is written.
	Thorough Effort = iota
	// Hasty is for a backlog: about half of the CPU, up to twice the bytes.
	Hasty
)

// SealedWAL is a WAL file compressed, sealed and ready to be stored, now or after an outage. It holds nothing that the
// repository's recipients alone could not read. Whoever has one closes it.
type SealedWAL struct {
	Info WALInfo
	Key  string        // of the object
	Body io.ReadSeeker // the whole object, for one reader at a time; who reads it again seeks to its start
	Size int64         // of Body

	release func() error
}

// Close gives back the memory, or closes the file, behind Body, which is of no use any more.
func (w *SealedWAL) Close() error {
	w.Body = nil
	release := w.release
	if w.release = nil; release == nil {
		return nil
	}
	return release()
}

// walInMemory is the largest WAL file, in raw bytes, that is encoded in memory; larger ones go through a temporary
// file. It covers PostgreSQL's default of 16 MiB and the usual larger choice of 64 MiB.
const walInMemory = 64 << 20

// Buffers for encoding, which are used again: a backlog would otherwise allocate some 10 MiB for each segment.
var (
	walInputs  = newPool(func() *[]byte { b := make([]byte, maxStreamRaw); return &b })
	walOutputs = newPool(func() *[]byte { return new([]byte) })
)

// maxPooledOutput bounds what an idle process keeps of a burst of large or incompressible segments.
const maxPooledOutput = 32 << 20

// SealWAL makes the object of a WAL file without storing it. info.Size says how much of raw is the file. info.Digest may
// be empty: if it is not, and raw turns out to be something else, that is an error. info.SystemID, StoredAt and Host are
// filled in where zero.
//
// A file of up to 64 MiB is read once and its compressed form held in memory; a larger one is read twice and encoded
// into a temporary file, below $TMPDIR.
func (s *Series) SealWAL(ctx context.Context, info WALInfo, raw io.ReaderAt, effort Effort) (*SealedWAL, error) {
	key, err := s.walKeyOf(info.Name)
	if err != nil {
		return nil, err
	}
	return s.seal(ctx, key, info, raw, effort)
}

// seal is SealWAL for the object that is stored under key.
func (s *Series) seal(ctx context.Context, key string, info WALInfo, raw io.ReaderAt, effort Effort) (*SealedWAL, error) {
	if info.SystemID == 0 {
		info.SystemID = s.id.SystemID
	}
	if info.SystemID != s.id.SystemID {
		return nil, fmt.Errorf("store WAL file %s in %s: found system identifier %s, expected %s", info.Name, s.id, info.SystemID, s.id.SystemID)
	}
	if info.Size < 0 || info.Size > int64(postgres.MaxSegmentSize) {
		return nil, fmt.Errorf("store WAL file %s in %s: found %d bytes, expected at most %d", info.Name, s.id, info.Size, int64(postgres.MaxSegmentSize))
	}
	if info.StoredAt.IsZero() {
		info.StoredAt = s.r.clock()
	}
	if info.Host == "" {
		info.Host = s.r.host
	}
	session, err := s.r.walKeyFor(info.StoredAt)
	if err != nil {
		return nil, err
	}
	encode := s.encodeWAL
	if info.Size > walInMemory {
		encode = s.encodeWALFile
	}
	w, err := encode(ctx, key, info, session, raw, effort)
	if err != nil {
		return nil, fmt.Errorf("store WAL file %s in %s: %w", info.Name, s.id, err)
	}
	return w, nil
}

// PutSealed stores a sealed file durably. The same content again is success (stored false), other content is
// *WALConflictError. It does not close w.
func (s *Series) PutSealed(ctx context.Context, w *SealedWAL) (stored bool, storedSize int64, err error) {
	key, err := s.walKeyOf(w.Info.Name)
	if err != nil {
		return false, 0, err
	}
	if w.Key != key {
		return false, 0, fmt.Errorf("store WAL file %s in %s: it was sealed for %s, expected %s", w.Info.Name, s.id, w.Key, key)
	}
	return s.putSealed(ctx, w)
}

func (s *Series) putSealed(ctx context.Context, w *SealedWAL) (stored bool, storedSize int64, err error) {
	err = s.r.store.Create(ctx, w.Key, w.Body, w.Size)
	if err == nil {
		return true, w.Size, nil
	}
	if !isConflict(err) {
		return false, 0, err
	}
	// Another time of storing, and with encryption another salt, make other bytes of the same file.
	there, err := s.statWAL(ctx, w.Key, w.Info.Name)
	if err != nil {
		return false, 0, fmt.Errorf("compare with what is stored: %w", err)
	}
	if there.Digest != w.Info.Digest || there.Size != w.Info.Size {
		return false, 0, &WALConflictError{Series: s.id, There: there, Here: w.Info}
	}
	return false, there.StoredSize, nil
}

// ReadSealed takes up an object that SealWAL made for this series, and that lay on a disk since. name is the WAL file's.
// It reads all of body and checks the header, that it belongs to the name, and that the frames are complete; damage
// within a frame only shows in a repository that is not encrypted, because nothing here can open the others. Closing
// what it returns closes body; on an error that is left to the caller.
func (s *Series) ReadSealed(name string, body io.ReadSeekCloser) (*SealedWAL, error) {
	key, err := s.walKeyOf(name)
	if err != nil {
		return nil, err
	}
	w := &SealedWAL{Key: key, Body: body, release: body.Close}
	if w.Info, w.Size, err = s.checkSealed(key, name, body); err != nil {
		return nil, fmt.Errorf("read the sealed WAL file %s of %s: %w", name, s.id, err)
	}
	return w, nil
}

func (s *Series) checkSealed(key, name string, body io.ReadSeeker) (WALInfo, int64, error) {
	if _, err := body.Seek(0, io.SeekStart); err != nil {
		return WALInfo{}, 0, err
	}
	info, h, err := s.readWALHeader(body, key, name)
	if err != nil {
		return WALInfo{}, 0, err
	}
	var c *objectCipher
	if h.suite == suiteNone {
		session := &sessionKey{suite: suiteNone}
		if c, err = session.cipherFor(key, walContainer, h.salt, h.meta); err != nil {
			return WALInfo{}, 0, err
		}
	}
	frames := frameReader{r: body, kind: walContainer}
	var payload []byte
	raw, size := int64(0), int64(h.size())
	for !frames.last {
		frame, fh, err := frames.nextSealed()
		if err != nil {
			return WALInfo{}, 0, err
		}
		if c != nil {
			if payload, err = c.open(payload[:0], frames.number-1, frame); err != nil {
				return WALInfo{}, 0, fmt.Errorf("frame %d: %w", frames.number-1, err)
			}
		}
		raw += int64(fh.raw)
		size += int64(len(frame))
	}
	if raw != info.Size {
		return WALInfo{}, 0, fmt.Errorf("found frames of %d bytes, expected %d", raw, info.Size)
	}
	if end, err := body.Seek(0, io.SeekEnd); err != nil {
		return WALInfo{}, 0, err
	} else if end != size {
		return WALInfo{}, 0, fmt.Errorf("it goes on after its last frame: found %d bytes, expected %d", end, size)
	}
	if _, err := body.Seek(0, io.SeekStart); err != nil {
		return WALInfo{}, 0, err
	}
	info.StoredSize = size
	return info, size, nil
}

// walHeader makes the header of a WAL object. Its length does not depend on the digest's value.
func (s *Series) walHeader(info *WALInfo, session *sessionKey, salt [saltSize]byte) (*containerHeader, error) {
	meta, err := json.Marshal(info)
	if err != nil {
		return nil, err
	}
	if len(meta) > maxMeta {
		return nil, fmt.Errorf("found %d bytes of header, expected at most %d", len(meta), maxMeta)
	}
	return &containerHeader{kind: walContainer, suite: session.suite, salt: salt, blob: session.blob, meta: meta}, nil
}

// noDigest holds the digest's place in the header until the file has been read.
var noDigest = strings.Repeat("0", 64)

// encodeWAL encodes a file in one pass: compress and hash while reading, then, when the digest and with it the header
// and the key are known, seal in place.
func (s *Series) encodeWAL(ctx context.Context, key string, info WALInfo, session *sessionKey, raw io.ReaderAt, effort Effort) (_ *SealedWAL, err error) {
	salt, err := s.r.newSalt(session.suite)
	if err != nil {
		return nil, err
	}
	expected := info.Digest
	info.Digest = noDigest
	h, err := s.walHeader(&info, session, salt)
	if err != nil {
		return nil, err
	}
	headerSize := h.size()
	output := walOutputs.get()
	out := *output
	release := func() {
		if cap(out) <= maxPooledOutput {
			*output = out[:0]
			walOutputs.put(output)
		}
	}
	defer func() {
		if err != nil {
			release()
		}
	}()
	// WAL compresses 4:1 or better, and compressing a frame wants room for all of it; append grows this where it is more.
	out = grow(out[:0], headerSize+int(info.Size)/4+int(min(info.Size, maxStreamRaw))+64<<10)[:headerSize]
	digest := blake3.New()
	var starts []int
	err = eachWALFrame(ctx, raw, info.Size, func(part []byte, flags uint8) error {
		_, _ = digest.Write(part) // a hash never fails
		starts = append(starts, len(out))
		out = appendWALFrame(out, part, flags, effort)
		return nil
	})
	if err != nil {
		return nil, err
	}
	info.Digest = hex.EncodeToString(digest.Sum(nil))
	if expected != "" && expected != info.Digest {
		return nil, fmt.Errorf("found content with BLAKE3 %s, expected %s: it changed while it was read", info.Digest, expected)
	}
	if h, err = s.walHeader(&info, session, salt); err != nil {
		return nil, err
	}
	if h.size() != headerSize {
		panic("repository: internal error: the header of a WAL object changed its length")
	}
	h.append(out[:0], key)
	c, err := session.cipherFor(key, walContainer, salt, h.meta)
	if err != nil {
		return nil, err
	}
	for i, start := range starts {
		end := len(out)
		if i+1 < len(starts) {
			end = starts[i+1]
		}
		c.seal(uint32(i), out[start:end])
	}
	info.StoredSize = int64(len(out))
	w := &SealedWAL{Info: info, Key: key, Body: bytes.NewReader(out), Size: int64(len(out))}
	w.release = func() error { release(); return nil }
	return w, nil
}

// encodeWALFile does the same for a file too large for memory: a first pass finds the digest.
func (s *Series) encodeWALFile(ctx context.Context, key string, info WALInfo, session *sessionKey, raw io.ReaderAt, effort Effort) (_ *SealedWAL, err error) {
	salt, err := s.r.newSalt(session.suite)
	if err != nil {
		return nil, err
	}
	digest := blake3.New()
	hash := func(part []byte, _ uint8) error {
		_, err := digest.Write(part)
		return err
	}
	if err := eachWALFrame(ctx, raw, info.Size, hash); err != nil {
		return nil, err
	}
	found := hex.EncodeToString(digest.Sum(nil))
	if info.Digest != "" && info.Digest != found {
		return nil, fmt.Errorf("found content with BLAKE3 %s, expected %s: it changed while it was read", found, info.Digest)
	}
	info.Digest = found
	h, err := s.walHeader(&info, session, salt)
	if err != nil {
		return nil, err
	}
	c, err := session.cipherFor(key, walContainer, salt, h.meta)
	if err != nil {
		return nil, err
	}

	f, err := os.CreateTemp("", "pgark-wal-*")
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			_ = f.Close() // the first error counts
		}
	}()
	if err := os.Remove(f.Name()); err != nil { // nobody else needs its name, and so a crash leaves nothing behind
		return nil, err
	}
	out := h.append(nil, key)
	number, size := uint32(0), int64(0)
	digest.Reset()
	err = eachWALFrame(ctx, raw, info.Size, func(part []byte, flags uint8) error {
		_, _ = digest.Write(part) // a hash never fails
		start := len(out)
		out = appendWALFrame(out, part, flags, effort)
		c.seal(number, out[start:])
		number++
		n, err := f.Write(out)
		size += int64(n)
		out = out[:0]
		return err
	})
	if err != nil {
		return nil, err
	}
	if again := hex.EncodeToString(digest.Sum(nil)); again != found {
		return nil, fmt.Errorf("found content with BLAKE3 %s, expected %s: it changed while it was read", again, found)
	}
	if _, err := f.Seek(0, io.SeekStart); err != nil {
		return nil, err
	}
	info.StoredSize = size
	return &SealedWAL{Info: info, Key: key, Body: f, Size: size, release: f.Close}, nil
}

// eachWALFrame reads the file frame by frame; an empty file has one empty frame. part is valid during the call.
func eachWALFrame(ctx context.Context, raw io.ReaderAt, size int64, fn func(part []byte, flags uint8) error) error {
	input := walInputs.get()
	defer walInputs.put(input)
	for offset := int64(0); ; {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		part := (*input)[:min(size-offset, maxStreamRaw)]
		if n, err := raw.ReadAt(part, offset); n < len(part) {
			if errors.Is(err, io.EOF) {
				return fmt.Errorf("found %d bytes, expected %d", offset+int64(n), size)
			}
			return err
		}
		offset += int64(len(part))
		flags := uint8(0)
		if offset == size {
			flags = flagLast
		}
		if err := fn(part, flags); err != nil {
			return err
		}
		if offset == size {
			return nil
		}
	}
}

// appendWALFrame is appendFrame with an effort.
func appendWALFrame(b, part []byte, flags uint8, effort Effort) []byte {
	return appendFrame(b, part, flags, 0, effort)
}
