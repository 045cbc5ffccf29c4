package repository

import (
	"context"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"iter"
	"time"

	"github.com/zeebo/blake3"

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

// PutWAL compresses, seals and stores a WAL file durably: SealWAL and PutSealed in one.
func (s *Series) PutWAL(ctx context.Context, info WALInfo, raw io.ReaderAt) (stored bool, storedSize int64, err error) {
	w, err := s.SealWAL(ctx, info, raw, Thorough)
	if err != nil {
		return false, 0, err
	}
	defer w.Close() // what it frees has been read to its end, or is thrown away
	return s.PutSealed(ctx, w)
}

// GetWAL writes the raw file to w after verifying every frame, and at the end its digest: on an error, what was
// written is to be thrown away. objectstore.ErrNotExist if absent.
func (s *Series) GetWAL(ctx context.Context, name string, w io.Writer) (WALInfo, error) {
	key, err := s.walKeyOf(name)
	if err != nil {
		return WALInfo{}, err
	}
	return s.readWAL(ctx, key, name, w)
}

// readWAL is GetWAL of the object that is stored under key.
func (s *Series) readWAL(ctx context.Context, key, name string, w io.Writer) (WALInfo, error) {
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
	return s.statWAL(ctx, key, name)
}

func (s *Series) statWAL(ctx context.Context, key, name string) (WALInfo, error) {
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
		directory := s.id.walPrefix() + walElement(t)
		startAfter := ""
		if from != "" {
			// A key just below from: listings begin after the key that they are given. "~" sorts after all that names have.
			startAfter = directory + from[:len(from)-1] + string(from[len(from)-1]-1) + "~"
		}
		// All names begin with the timeline; those of most tails do not.
		for o, err := range s.r.store.List(ctx, directory+t.String(), startAfter) {
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

// Timelines lists the timelines that have WAL objects, tails or a history file, ascending.
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
		timeline, history, ok := s.id.parseTimeline(first)
		if !ok {
			continue
		}
		if !history {
			after = s.id.walPrefix() + walElement(timeline) + "~" // sorts after all of its files
		}
		if want(history) && (len(all) == 0 || all[len(all)-1] != timeline) {
			all = append(all, timeline)
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
	if err := s.deleteKeys(ctx, keys); err != nil {
		return fmt.Errorf("delete WAL of %s: %w", s.id, err)
	}
	return nil
}
