package repository

import (
	"context"
	"errors"
	"io"
	"iter"

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
	StoredSize int64 // of the object; filled when listed or read
}

var errNotBuilt = errors.New("not built yet")

// PutTail stores raw, the bytes of t, durably and if absent. info carries FirstTime, LastTime, StoredAt and Host; the rest
// is filled in. The same content again is success, other content is *WALConflictError.
func (s *Series) PutTail(ctx context.Context, t Tail, info WALInfo, raw []byte) (storedSize int64, err error) {
	return 0, errNotBuilt
}

// ListTails yields the tails of a timeline that begin in [from, to), by start, then end.
func (s *Series) ListTails(ctx context.Context, t postgres.Timeline, from, to postgres.LSN) iter.Seq2[Tail, error] {
	return func(yield func(Tail, error) bool) { yield(Tail{}, errNotBuilt) }
}

// GetTail writes the bytes of t to w after verifying every frame, and at the end their digest: on an error, what was
// written is to be thrown away. objectstore.ErrNotExist if absent.
func (s *Series) GetTail(ctx context.Context, t Tail, w io.Writer) (WALInfo, error) {
	return WALInfo{}, errNotBuilt
}

// StatTail reads a tail's header only.
func (s *Series) StatTail(ctx context.Context, t Tail) (WALInfo, error) {
	return WALInfo{}, errNotBuilt
}

// DeleteTails removes tails; absent ones are no error. The caller knows that the whole segment, or other tails, hold what
// they hold.
func (s *Series) DeleteTails(ctx context.Context, tails ...Tail) error { return errNotBuilt }
