package repository

import (
	"bytes"
	"context"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"iter"
	"os"
	"strings"
	"time"

	"github.com/zeebo/blake3"

	"github.com/pgark/terraform-provider-pgark/internal/engine/objectstore"
	"github.com/pgark/terraform-provider-pgark/internal/engine/postgres"
)

// WALInfo is what everybody may know of a WAL object: its header.
type WALInfo struct {
	Name       string            `json:"name"` // file name as PostgreSQL gives it: segment, .partial, .history, .backup
	SystemID   postgres.SystemID `json:"system_identifier"`
	Size       int64             `json:"size"`   // raw bytes
	Digest     string            `json:"digest"` // BLAKE3 of the raw bytes, hexadecimal
	StoredAt   time.Time         `json:"stored_at"`
	Host       string            `json:"host"`
	FirstTime  *time.Time        `json:"first_time,omitempty"` // of the first and last commit, abort or restore point record in it
	LastTime   *time.Time        `json:"last_time,omitempty"`
	StoredSize int64             `json:"-"` // of the object; filled when read
}

// walInMemory is the largest WAL file, in raw bytes, that is encoded in memory; larger ones go through a temporary
// file. It covers PostgreSQL's default of 16 MiB and the usual larger choice of 64 MiB.
const walInMemory = 64 << 20

// walKeyFor returns the session key of the present day's WAL. Wrapping once a day and process keeps the public-key
// operation out of every segment; each object's own salt keeps their keys apart.
func (r *Repository) walKeyFor(now time.Time) (*sessionKey, error) {
	r.walKeyMu.Lock()
	defer r.walKeyMu.Unlock()
	day := now.UTC().Format(time.DateOnly)
	if r.walKey == nil || r.walKeyDay != day {
		k, err := r.newSessionKey()
		if err != nil {
			return nil, err
		}
		r.walKey, r.walKeyDay = k, day
	}
	return r.walKey, nil
}

// PutWAL compresses, seals and stores a WAL file durably. The same content again is success (stored false); other
// content is *WALConflictError. info.Size says how much of raw is the file. info.Digest may be empty: if it is not, and
// raw turns out to be something else, nothing is stored. info.SystemID, StoredAt and Host are filled in where zero.
//
// A file of up to 64 MiB is read once and its compressed form held in memory; a larger one is read twice and encoded
// into a temporary file, below $TMPDIR.
func (s *Series) PutWAL(ctx context.Context, info WALInfo, raw io.ReaderAt) (stored bool, storedSize int64, err error) {
	if s.invalid != nil {
		return false, 0, s.invalid
	}
	key, err := s.id.walKey(info.Name)
	if err != nil {
		return false, 0, err
	}
	if info.SystemID == 0 {
		info.SystemID = s.id.SystemID
	}
	if info.SystemID != s.id.SystemID {
		return false, 0, fmt.Errorf("store WAL file %s in %s: found system identifier %s, expected %s", info.Name, s.id, info.SystemID, s.id.SystemID)
	}
	if info.Size < 0 || info.Size > int64(postgres.MaxSegmentSize) {
		return false, 0, fmt.Errorf("store WAL file %s in %s: found %d bytes, expected at most %d", info.Name, s.id, info.Size, int64(postgres.MaxSegmentSize))
	}
	if info.StoredAt.IsZero() {
		info.StoredAt = s.r.clock()
	}
	if info.Host == "" {
		info.Host = s.r.host
	}
	session, err := s.r.walKeyFor(info.StoredAt)
	if err != nil {
		return false, 0, err
	}

	var body io.ReadSeeker
	if info.Size <= walInMemory {
		b, err := s.encodeWAL(ctx, key, &info, session, raw)
		if err != nil {
			return false, 0, fmt.Errorf("store WAL file %s in %s: %w", info.Name, s.id, err)
		}
		body, storedSize = bytes.NewReader(b), int64(len(b))
	} else {
		f, n, err := s.encodeWALFile(ctx, key, &info, session, raw)
		if err != nil {
			return false, 0, fmt.Errorf("store WAL file %s in %s: %w", info.Name, s.id, err)
		}
		defer f.Close() // it has no name any more: closing frees it
		body, storedSize = f, n
	}

	err = s.r.store.Create(ctx, key, body, storedSize)
	if err == nil {
		return true, storedSize, nil
	}
	if _, conflict := errors.AsType[*objectstore.ConflictError](err); !conflict {
		return false, 0, err
	}
	// Another time of storing, and with encryption another salt, make other bytes of the same file.
	there, err := s.StatWAL(ctx, info.Name)
	if err != nil {
		return false, 0, fmt.Errorf("compare with what is stored: %w", err)
	}
	if there.Digest != info.Digest || there.Size != info.Size {
		return false, 0, &WALConflictError{Series: s.id, There: there, Here: info}
	}
	return false, there.StoredSize, nil
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
func (s *Series) encodeWAL(ctx context.Context, key string, info *WALInfo, session *sessionKey, raw io.ReaderAt) ([]byte, error) {
	salt, err := s.r.newSalt(session.suite)
	if err != nil {
		return nil, err
	}
	expected := info.Digest
	info.Digest = noDigest
	h, err := s.walHeader(info, session, salt)
	if err != nil {
		return nil, err
	}
	headerSize := h.size()
	out := make([]byte, headerSize, headerSize+int(info.Size)/3+64<<10) // WAL compresses about 3:1; append grows it where not
	digest := blake3.New()
	buf := make([]byte, min(info.Size, maxStreamRaw))
	var starts []int
	err = eachWALFrame(ctx, raw, info.Size, buf, func(part []byte, flags uint8) error {
		_, _ = digest.Write(part) // a hash never fails
		starts = append(starts, len(out))
		out = appendFrame(out, part, flags, 0, true)
		return nil
	})
	if err != nil {
		return nil, err
	}
	info.Digest = hex.EncodeToString(digest.Sum(nil))
	if expected != "" && expected != info.Digest {
		return nil, fmt.Errorf("found content with BLAKE3 %s, expected %s: it changed while it was read", info.Digest, expected)
	}
	if h, err = s.walHeader(info, session, salt); err != nil {
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
	return out, nil
}

// encodeWALFile does the same for a file too large for memory: a first pass finds the digest.
func (s *Series) encodeWALFile(ctx context.Context, key string, info *WALInfo, session *sessionKey, raw io.ReaderAt) (_ *os.File, size int64, err error) {
	salt, err := s.r.newSalt(session.suite)
	if err != nil {
		return nil, 0, err
	}
	digest := blake3.New()
	buf := make([]byte, maxStreamRaw)
	hash := func(part []byte, _ uint8) error {
		_, err := digest.Write(part)
		return err
	}
	if err := eachWALFrame(ctx, raw, info.Size, buf, hash); err != nil {
		return nil, 0, err
	}
	found := hex.EncodeToString(digest.Sum(nil))
	if info.Digest != "" && info.Digest != found {
		return nil, 0, fmt.Errorf("found content with BLAKE3 %s, expected %s: it changed while it was read", found, info.Digest)
	}
	info.Digest = found
	h, err := s.walHeader(info, session, salt)
	if err != nil {
		return nil, 0, err
	}
	c, err := session.cipherFor(key, walContainer, salt, h.meta)
	if err != nil {
		return nil, 0, err
	}

	f, err := os.CreateTemp("", "pgark-wal-*")
	if err != nil {
		return nil, 0, err
	}
	defer func() {
		if err != nil {
			_ = f.Close() // the first error counts
		}
	}()
	if err := os.Remove(f.Name()); err != nil { // nobody else needs its name, and so a crash leaves nothing behind
		return nil, 0, err
	}
	out := h.append(nil, key)
	number := uint32(0)
	digest.Reset()
	err = eachWALFrame(ctx, raw, info.Size, buf, func(part []byte, flags uint8) error {
		_, _ = digest.Write(part) // a hash never fails
		start := len(out)
		out = appendFrame(out, part, flags, 0, true)
		c.seal(number, out[start:])
		number++
		n, err := f.Write(out)
		size += int64(n)
		out = out[:0]
		return err
	})
	if err != nil {
		return nil, 0, err
	}
	if again := hex.EncodeToString(digest.Sum(nil)); again != found {
		return nil, 0, fmt.Errorf("found content with BLAKE3 %s, expected %s: it changed while it was read", again, found)
	}
	return f, size, nil
}

// eachWALFrame reads the file in parts of up to len(buf); an empty file has one empty part.
func eachWALFrame(ctx context.Context, raw io.ReaderAt, size int64, buf []byte, fn func(part []byte, flags uint8) error) error {
	for offset := int64(0); ; {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		part := buf[:min(size-offset, int64(len(buf)))]
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

// GetWAL writes the raw file to w after verifying every frame, and at the end its digest: on an error, what was
// written is to be thrown away. objectstore.ErrNotExist if absent.
func (s *Series) GetWAL(ctx context.Context, name string, w io.Writer) (WALInfo, error) {
	key, err := s.walKeyOf(name)
	if err != nil {
		return WALInfo{}, err
	}
	body := s.r.newReader(ctx, key, 0, -1)
	defer body.Close()
	info, h, err := s.readWALHeader(body, key, name)
	if err != nil {
		return WALInfo{}, s.r.contentError(key, err)
	}
	session, err := s.r.unwrap(key, h.suite, h.blob)
	if err != nil {
		return WALInfo{}, err
	}
	c, err := session.cipherFor(key, walContainer, h.salt, h.meta)
	if err != nil {
		return WALInfo{}, err
	}
	digest := blake3.New()
	frames := frameReader{r: body, c: c, kind: walContainer}
	for size := int64(0); ; {
		raw, _, err := frames.next()
		if errors.Is(err, io.EOF) {
			if size != info.Size {
				return WALInfo{}, s.r.contentError(key, fmt.Errorf("found %d bytes, expected %d", size, info.Size))
			}
			break
		}
		if err != nil {
			return WALInfo{}, s.r.contentError(key, err)
		}
		if size += int64(len(raw)); size > info.Size {
			return WALInfo{}, s.r.contentError(key, fmt.Errorf("found more than %d bytes, expected that", info.Size))
		}
		_, _ = digest.Write(raw) // a hash never fails
		if _, err := w.Write(raw); err != nil {
			return WALInfo{}, fmt.Errorf("write WAL file %s: %w", name, err)
		}
	}
	if found := hex.EncodeToString(digest.Sum(nil)); found != info.Digest {
		return WALInfo{}, s.r.contentError(key, fmt.Errorf("found content with BLAKE3 %s, expected %s", found, info.Digest))
	}
	info.StoredSize = body.offset
	return info, nil
}

func (s *Series) walKeyOf(name string) (string, error) {
	if s.invalid != nil {
		return "", s.invalid
	}
	return s.id.walKey(name)
}

// readWALHeader reads the header and checks that it belongs to the name.
func (s *Series) readWALHeader(r io.Reader, key, name string) (WALInfo, *containerHeader, error) {
	h, err := readHeader(r, key, walContainer)
	if err != nil {
		return WALInfo{}, nil, err
	}
	var info WALInfo
	if err := json.Unmarshal(h.meta, &info); err != nil {
		return WALInfo{}, nil, fmt.Errorf("header: %w", err)
	}
	if info.Name != name || info.SystemID != s.id.SystemID {
		return WALInfo{}, nil, fmt.Errorf("header: found WAL file %q of cluster %s, expected %s of %s", info.Name, info.SystemID, name, s.id.SystemID)
	}
	return info, h, nil
}

// headerGuess is enough for the header of nearly every WAL object: some 40 recipients, or 4 post-quantum ones.
const headerGuess = 8 << 10

// StatWAL reads a WAL object's header only.
func (s *Series) StatWAL(ctx context.Context, name string) (WALInfo, error) {
	key, err := s.walKeyOf(name)
	if err != nil {
		return WALInfo{}, err
	}
	o, err := s.r.store.Stat(ctx, key)
	if err != nil {
		return WALInfo{}, err
	}
	for n := min(o.Size, headerGuess); ; n = o.Size {
		body := s.r.newReader(ctx, key, 0, n)
		info, _, err := s.readWALHeader(body, key, name)
		_ = body.Close() // nothing was written
		if errors.Is(err, errCutShort) && n < o.Size {
			continue
		}
		if err != nil {
			return WALInfo{}, s.r.contentError(key, err)
		}
		info.StoredSize = o.Size
		return info, nil
	}
}

// WALEntry is one listed WAL object.
type WALEntry struct {
	Name       string // as PostgreSQL names it
	StoredSize int64
	Modified   time.Time
}

// ListWAL yields the series' WAL objects of one timeline in order of name, from the given name on ("" for all).
// History files are listed by Histories.
func (s *Series) ListWAL(ctx context.Context, t postgres.Timeline, from string) iter.Seq2[WALEntry, error] {
	return func(yield func(WALEntry, error) bool) {
		if s.invalid != nil {
			yield(WALEntry{}, s.invalid)
			return
		}
		prefix := s.id.walPrefix() + walElement(t)
		startAfter := ""
		if from != "" {
			// A key just below from: listings begin after the key that they are given. "~" sorts after all that names have.
			startAfter = prefix + from[:len(from)-1] + string(from[len(from)-1]-1) + "~"
		}
		for o, err := range s.r.store.List(ctx, prefix, startAfter) {
			if err != nil {
				yield(WALEntry{}, fmt.Errorf("list WAL of %s: %w", s.id, err))
				return
			}
			name, ok := s.id.parseWALKey(o.Key)
			if !ok || name < from {
				continue
			}
			if !yield(WALEntry{Name: name, StoredSize: o.Size, Modified: o.Modified}, nil) {
				return
			}
		}
	}
}

// Timelines lists the timelines that have WAL objects or a history file, ascending.
func (s *Series) Timelines(ctx context.Context) ([]postgres.Timeline, error) {
	return s.timelines(ctx, func(bool) bool { return true })
}

// Histories lists the timelines that have a history file, ascending. GetWAL reads them by their file name.
func (s *Series) Histories(ctx context.Context) ([]postgres.Timeline, error) {
	return s.timelines(ctx, func(history bool) bool { return history })
}

// timelines visits the first object of each timeline and leaps to the next: one request each, however much WAL there is.
func (s *Series) timelines(ctx context.Context, want func(history bool) bool) ([]postgres.Timeline, error) {
	if s.invalid != nil {
		return nil, s.invalid
	}
	var all []postgres.Timeline
	after := ""
	for {
		var first string
		for o, err := range s.r.store.List(ctx, s.id.walPrefix(), after) {
			if err != nil {
				return nil, fmt.Errorf("list timelines of %s: %w", s.id, err)
			}
			first = o.Key
			break
		}
		if first == "" {
			return all, nil
		}
		after = first
		name, ok := s.id.parseWALKey(first)
		if !ok {
			continue
		}
		f, err := postgres.ParseWALFile(name)
		if err != nil {
			continue // parseWALKey has checked
		}
		history := f.Kind == postgres.HistoryFile
		if !history {
			after = s.id.walPrefix() + walElement(f.Timeline) + "~" // sorts after all of its files
		}
		if want(history) && (len(all) == 0 || all[len(all)-1] != f.Timeline) {
			all = append(all, f.Timeline)
		}
	}
}

// DeleteWAL removes WAL objects that end at or below the head's floor and make no live image consistent; others are
// refused with a *FloorError, and then none is removed. History files are kept for ever: they are small, and every later timeline needs them.
func (s *Series) DeleteWAL(ctx context.Context, segmentSize postgres.SegmentSize, names ...string) error {
	if len(names) == 0 {
		return nil
	}
	if !segmentSize.Valid() {
		return fmt.Errorf("delete WAL of %s: found segment size %d", s.id, uint64(segmentSize))
	}
	h, err := s.Head(ctx)
	if err != nil {
		return err
	}
	keys := make([]string, 0, len(names))
	for _, name := range names {
		f, err := postgres.ParseWALFile(name)
		if err != nil {
			return err
		}
		key, err := s.id.walKey(name)
		if err != nil {
			return err
		}
		floor := h.Floor(f.Timeline)
		switch {
		case f.Kind == postgres.HistoryFile:
			return &FloorError{Series: s.id, Timeline: f.Timeline, Limit: floor, Reason: "history files are kept"}
		case f.Segment.Check(segmentSize) != nil:
			return f.Segment.Check(segmentSize)
		case f.Segment.End(segmentSize) > floor:
			return &FloorError{Series: s.id, Timeline: f.Timeline, Wanted: f.Segment.End(segmentSize), Limit: floor,
				Reason: "WAL floor; raise it before " + name + " is deleted"}
		}
		if who := h.needsWAL(f.Timeline, f.Segment.Number(segmentSize), segmentSize); who != "" {
			return &FloorError{Series: s.id, Timeline: f.Timeline, Wanted: f.Segment.End(segmentSize), Limit: f.Segment.Start(segmentSize),
				Reason: who + " needs " + name}
		}
		keys = append(keys, key)
	}
	for len(keys) > 0 {
		n := min(len(keys), deleteBatch)
		if err := s.r.store.Delete(ctx, keys[:n]...); err != nil {
			return fmt.Errorf("delete WAL of %s: %w", s.id, err)
		}
		keys = keys[n:]
	}
	return nil
}
