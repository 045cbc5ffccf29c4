package repository

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"iter"
	"strings"

	"github.com/pgark/terraform-provider-pgark/internal/engine/objectstore"
	"github.com/pgark/terraform-provider-pgark/internal/engine/postgres"
)

// Tail names a piece of WAL that was stored before its segment was whole: the bytes [Start, End) of one timeline, within
// one segment. Its key is wal/<timeline>/<start>-<end>.tail, positions as 16 upper-case hexadecimal digits.
//
// Tails of a segment overlap: one may hold what several others do. Whoever reads picks a chain from the segment's start,
// each tail beginning at or before where the one before ended.
type Tail struct {
	Timeline   postgres.Timeline
	Start, End postgres.LSN
	StoredSize int64 // of the object; filled when listed
}

// String names the tail for people, as "0/3000000 to 0/3000F48 on timeline 1".
func (t Tail) String() string {
	return fmt.Sprintf("%s to %s on timeline %d", t.Start, t.End, uint32(t.Timeline))
}

// Size is how many bytes of WAL the tail holds.
func (t Tail) Size() int64 { return int64(t.End - t.Start) }

func (t Tail) check() error {
	if t.Timeline == 0 || t.End <= t.Start || t.End-t.Start > postgres.LSN(postgres.MaxSegmentSize) {
		return fmt.Errorf("WAL tail from %s: expected a timeline, and 1 to %d bytes", t, int64(postgres.MaxSegmentSize))
	}
	return nil
}

func (s *Series) tailKeyOf(t Tail) (string, error) {
	if s.invalid != nil {
		return "", s.invalid
	}
	if err := t.check(); err != nil {
		return "", err
	}
	return s.id.tailKey(t), nil
}

// PutTail stores raw, the bytes of t, durably and if absent. info carries FirstTime, LastTime, StoredAt and Host; the rest
// is filled in. The same content again is success, other content is *WALConflictError.
func (s *Series) PutTail(ctx context.Context, t Tail, info WALInfo, raw []byte) (storedSize int64, err error) {
	key, err := s.tailKeyOf(t)
	if err != nil {
		return 0, err
	}
	if int64(len(raw)) != t.Size() {
		return 0, fmt.Errorf("store WAL from %s in %s: found %d bytes, expected %d", t, s.id, len(raw), t.Size())
	}
	info.Name, info.Size, info.Digest, info.SystemID = t.name(), t.Size(), "", s.id.SystemID
	w, err := s.seal(ctx, key, info, bytes.NewReader(raw), Thorough)
	if err != nil {
		return 0, err
	}
	defer w.Close() // it is memory
	_, storedSize, err = s.putSealed(ctx, w)
	return storedSize, err
}

// ListTails yields the tails of a timeline that begin in [from, to), by start, then end. A range within a segment costs
// one request, and so does one of many segments unless the timeline holds WAL files whose names sort among those of
// the range's tails.
func (s *Series) ListTails(ctx context.Context, t postgres.Timeline, from, to postgres.LSN) iter.Seq2[Tail, error] {
	return func(yield func(Tail, error) bool) {
		if s.invalid != nil {
			yield(Tail{}, s.invalid)
			return
		}
		// The names of WAL files begin with the timeline, those of tails with the high half of a position: all of the
		// timeline's files sort among the tails of 4 GiB of WAL. Whatever else is asked for is listed without them.
		own := postgres.LSN(t) << 32
		for _, end := range []postgres.LSN{own, own + 1<<32, to} {
			if end = min(end, to); from >= end {
				continue
			}
			if !s.listTails(ctx, t, from, end, yield) {
				return
			}
			from = end
		}
	}
}

// listTails yields the tails of one range, and tells whether to go on with the next.
func (s *Series) listTails(ctx context.Context, t postgres.Timeline, from, to postgres.LSN, yield func(Tail, error) bool) bool {
	directory := s.id.walPrefix() + walElement(t)
	first, last, beyond := tailPosition(from), tailPosition(to-1), tailPosition(to)
	same := 0
	for same < len(first) && first[same] == last[same] {
		same++
	}
	// A position sorts before the tails that begin at it.
	for o, err := range s.r.store.List(ctx, directory+first[:same], directory+first) {
		if err != nil {
			yield(Tail{}, fmt.Errorf("list WAL tails of %s: %w", s.id, err))
			return false
		}
		if strings.TrimPrefix(o.Key, directory) >= beyond {
			break
		}
		tail, ok := s.id.parseTailKey(o.Key)
		if !ok {
			continue
		}
		tail.StoredSize = o.Size
		if !yield(tail, nil) {
			return false
		}
	}
	return true
}

// GetTail writes the bytes of t to w after verifying every frame, and at the end their digest: on an error, what was
// written is to be thrown away. objectstore.ErrNotExist if absent.
func (s *Series) GetTail(ctx context.Context, t Tail, w io.Writer) (WALInfo, error) {
	key, err := s.tailKeyOf(t)
	if err != nil {
		return WALInfo{}, err
	}
	return s.readWAL(ctx, key, t.name(), w)
}

// StatTail reads a tail's header only.
func (s *Series) StatTail(ctx context.Context, t Tail) (WALInfo, error) {
	key, err := s.tailKeyOf(t)
	if err != nil {
		return WALInfo{}, err
	}
	return s.statWAL(ctx, key, t.name())
}

// DeleteTails removes tails; absent ones are no error. The caller knows that the whole segment, or other tails, hold what
// they hold.
func (s *Series) DeleteTails(ctx context.Context, tails ...Tail) error {
	keys := make([]string, 0, len(tails))
	for _, t := range tails {
		key, err := s.tailKeyOf(t)
		if err != nil {
			return err
		}
		keys = append(keys, key)
	}
	if err := s.deleteKeys(ctx, keys); err != nil {
		return fmt.Errorf("delete WAL tails of %s: %w", s.id, err)
	}
	return nil
}

func (s *Series) deleteKeys(ctx context.Context, keys []string) error {
	for len(keys) > 0 {
		n := min(len(keys), deleteBatch)
		if err := s.r.store.Delete(ctx, keys[:n]...); err != nil {
			return err
		}
		keys = keys[n:]
	}
	return nil
}

// isConflict tells whether a store refused an object because its key is taken by another.
func isConflict(err error) bool {
	_, ok := errors.AsType[*objectstore.ConflictError](err)
	return ok
}
