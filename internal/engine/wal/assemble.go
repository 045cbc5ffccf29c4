package wal

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"sync"

	"github.com/pgark/terraform-provider-pgark/internal/engine/objectstore"
	"github.com/pgark/terraform-provider-pgark/internal/engine/postgres"
	"github.com/pgark/terraform-provider-pgark/internal/engine/repository"
)

// TailSource is what reading tails needs of a series.
type TailSource interface {
	ID() repository.SeriesID
	GetTail(ctx context.Context, t repository.Tail, w io.Writer) (repository.WALInfo, error)
}

// tailsAhead bounds the tails that are read at one time, each into memory. A tail has seldom more than a few MiB: a
// streamer begins a new one once half a MiB has gathered.
const tailsAhead = 4

// Chain picks tails that follow one another from a position on, as far as that goes: of those that begin at or before
// where the chain ends the one that ends last. It returns them in order, and where the last one ends; from if there is
// none.
func Chain(tails []repository.Tail, from postgres.LSN) ([]repository.Tail, postgres.LSN) {
	sorted := slices.SortedFunc(slices.Values(tails), func(a, b repository.Tail) int {
		return cmp.Or(cmp.Compare(a.Start, b.Start), cmp.Compare(b.End, a.End))
	})
	var chain []repository.Tail
	at := from
	for i := 0; i < len(sorted); {
		best := repository.Tail{End: at}
		for ; i < len(sorted) && sorted[i].Start <= at; i++ {
			if sorted[i].End > best.End {
				best = sorted[i]
			}
		}
		if best.End == at {
			break
		}
		chain, at = append(chain, best), best.End
	}
	return chain, at
}

// RecordEnd gives the end of a tail in the form in which PostgreSQL names positions behind a record: a multiple of eight,
// and the beginning of a page rather than the end of its header. A position that was left by a timeline, say, can be
// compared with it.
func RecordEnd(end postgres.LSN, size postgres.SegmentSize) postgres.LSN {
	end = (end + 7) &^ 7
	header := postgres.LSN(pageHeader)
	page := end % postgres.WALPageSize
	if size.Offset(end) < postgres.WALPageSize {
		header = postgres.WALHeaderSize
	}
	if page <= header {
		end -= page
	}
	return end
}

// pageHeader is the length of the header of a page within a segment (SizeOfXLogShortPHD).
const pageHeader = 24

// TailError says that WAL that was stored, as names in the repository tell, cannot be read.
type TailError struct {
	Series  repository.SeriesID
	Tail    repository.Tail // the object that cannot be read
	Reached postgres.LSN    // how far the WAL can be read without it
	Err     error
}

func (e *TailError) Error() string {
	return fmt.Sprintf("wal from %s in %s, without which the WAL ends at %s: %v", e.Tail, e.Series, e.Reached, e.Err)
}

func (e *TailError) Unwrap() error { return e.Err }

// Hint says what can still be done.
func (e *TailError) Hint() string {
	return fmt.Sprintf("what was written before %s can be restored: pgark verify --wal says what else is damaged, and which targets are left", e.Reached)
}

// unusable tells whether an error of GetTail lies with that object alone: it is damaged, or not there any more.
func unusable(err error) bool {
	var corrupt *repository.CorruptError
	return errors.As(err, &corrupt) || errors.Is(err, objectstore.ErrNotExist)
}

// piece is a tail that was read.
type piece struct {
	tail repository.Tail
	b    []byte
	err  error
}

// ReadTails writes the WAL that tails hold from a position on to w, in order and without a hole, and returns where it ends.
// A tail that is damaged or gone is passed over if others hold what it holds; else it is a *TailError, and what was
// written is what can be read. So are tails whose contents contradict one another.
func ReadTails(ctx context.Context, s TailSource, tails []repository.Tail, from postgres.LSN, w io.Writer) (postgres.LSN, error) {
	ctx, cancel := context.WithCancel(ctx)
	var running sync.WaitGroup
	defer running.Wait()
	defer cancel()

	_, end := Chain(tails, from)
	left := slices.Clone(tails)
	started := map[repository.Tail]chan piece{}
	var before piece
	var damage, lost error // of a tail that was passed over, and of the one that was found to be needed
	var damaged, lostTail repository.Tail
	at := from
	for at < end {
		chain, reach := Chain(left, at)
		if reach < end {
			lost, lostTail = damage, damaged
			if end = reach; at >= end {
				break
			}
		}
		for _, t := range chain[:min(len(chain), tailsAhead)] {
			if started[t] != nil {
				continue
			}
			done := make(chan piece, 1)
			started[t] = done
			running.Go(func() { done <- readTail(ctx, s, t) })
		}
		next := <-started[chain[0]]
		delete(started, next.tail)
		switch {
		case ctx.Err() != nil:
			return at, context.Cause(ctx)
		case next.err != nil && unusable(next.err):
			damage, damaged = next.err, next.tail
			left = slices.DeleteFunc(left, func(t repository.Tail) bool { return t == next.tail })
			continue
		case next.err != nil:
			return at, fmt.Errorf("read wal from %s in %s: %w", next.tail, s.ID(), next.err)
		}
		if !next.agrees(before) {
			return at, &TailError{Series: s.ID(), Tail: next.tail, Reached: at,
				Err: fmt.Errorf("found other content from %s on than in the tail from %s", next.tail.Start, before.tail)}
		}
		if _, err := w.Write(next.b[at-next.tail.Start:]); err != nil {
			return at, err
		}
		before, at = next, next.tail.End
	}
	if lost != nil {
		return at, &TailError{Series: s.ID(), Tail: lostTail, Reached: at, Err: lost}
	}
	return at, nil
}

func readTail(ctx context.Context, s TailSource, t repository.Tail) piece {
	var b bytes.Buffer
	b.Grow(int(t.Size()))
	_, err := s.GetTail(ctx, t, &b)
	if err == nil && int64(b.Len()) != t.Size() {
		// The header agrees with the name, so this cannot be.
		panic(fmt.Sprintf("wal: internal error: the tail from %s has %d bytes", t, b.Len()))
	}
	return piece{tail: t, b: b.Bytes(), err: err}
}

// agrees tells whether what both hold is the same.
func (p piece) agrees(before piece) bool {
	from, to := max(p.tail.Start, before.tail.Start), min(p.tail.End, before.tail.End)
	return from >= to || bytes.Equal(p.b[from-p.tail.Start:to-p.tail.Start], before.b[from-before.tail.Start:to-before.tail.Start])
}

// assembleSegment writes the beginning of the segment that tails hold to w, after verifying every record, and returns
// where its last record ends: at the segment's end if what was written is, completed with zeros, as good as the whole one.
// There must be a tail that begins where the segment does.
func assembleSegment(ctx context.Context, s TailSource, tails []repository.Tail, segment postgres.SegmentName, size postgres.SegmentSize, w resettable) (postgres.LSN, error) {
	start, end := segment.Start(size), segment.End(size)
	left := slices.Clone(tails)
	var known postgres.LSN
	var refused *TailError
	for {
		chain, reach := Chain(left, start)
		reach = min(reach, end)
		if known = max(known, reach); reach < known {
			refused.Reached = RecordEnd(reach, size)
			return 0, refused
		}
		scanner := postgres.NewSegmentScanner(segment, size)
		_, err := ReadTails(ctx, s, left, start, io.MultiWriter(w, scanner))
		if e := (*TailError)(nil); errors.As(err, &e) {
			e.Reached = RecordEnd(e.Reached, size)
		}
		if err != nil {
			return 0, err
		}
		for rest := int64(end - reach); rest > 0; rest -= min(rest, int64(len(zeros))) {
			_, _ = scanner.Write(zeros[:min(rest, int64(len(zeros)))]) // never fails
		}
		scan := scanner.Result()
		at := RecordEnd(reach, size)
		switch {
		case scan.Switched, reach == end && scan.Problem == nil:
			return end, nil
		case reach < end && scan.End >= at:
			return at, nil
		}
		// A tail is stored record by record: one that ends elsewhere, or holds something else, is not what was meant.
		i := slices.IndexFunc(chain, func(t repository.Tail) bool { return t.End > max(scan.End, start) })
		if i < 0 {
			i = len(chain) - 1
		}
		refused = &TailError{Series: s.ID(), Tail: chain[i], Err: fmt.Errorf("its records: %w", scan.Problem)}
		left = slices.DeleteFunc(left, func(t repository.Tail) bool { return t == chain[i] })
		if err := w.reset(); err != nil {
			return 0, err
		}
	}
}

// resettable is a file that may have to be written anew.
type resettable interface {
	io.Writer
	reset() error
}

// zeros is a page's worth of nothing, many times.
var zeros = make([]byte, 64<<10)
