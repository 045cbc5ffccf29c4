package wal

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"time"

	"github.com/pgark/terraform-provider-pgark/internal/engine/objectstore"
	"github.com/pgark/terraform-provider-pgark/internal/engine/postgres"
	"github.com/pgark/terraform-provider-pgark/internal/engine/repository"
)

// errAppeared says that a segment is there after all.
var errAppeared = errors.New("it is listed, but cannot be read")

// absent finds out what it means that segment is not in the archive as a whole: what tails or a .partial segment hold of
// it may be all there is, nothing may be the end, and either may be a gap.
func (f *Fetcher) absent(ctx context.Context, source Source, segment postgres.SegmentName) (string, bool, error) {
	name := string(segment)
	f.mu.Lock()
	f.foundEdge(segment)
	f.mu.Unlock()
	deadline := time.Now().Add(f.o.GapWait)
	for wait := 50 * time.Millisecond; ; wait = min(2*wait, time.Second) {
		var s substitute
		err := f.retry(ctx, func() (err error) {
			s, err = f.substitute(ctx, source, segment)
			return err
		})
		if err != nil {
			return "", false, fmt.Errorf("fetch wal %s of %s: find out whether it is the end: %w", name, source.ID(), err)
		}
		if s.problem == nil {
			return s.file, s.file != "", nil
		}
		// What is uploaded at this moment may arrive out of order: segments, and the deletion of the tails that they replace.
		// What is damaged does not heal.
		if e := (*TailError)(nil); !time.Now().Before(deadline) || errors.As(s.problem, &e) && !errors.Is(e, objectstore.ErrNotExist) {
			return "", false, s.problem
		}
		if !errors.Is(s.problem, errAppeared) || wait > 50*time.Millisecond {
			select {
			case <-time.After(min(wait, time.Until(deadline))):
			case <-ctx.Done():
				return "", false, context.Cause(ctx)
			}
		}
		switch file, err := f.get(ctx, source, name); {
		case err == nil:
			f.answer(source, segment)
			return file, true, nil
		case !errors.Is(err, objectstore.ErrNotExist):
			return "", false, fmt.Errorf("fetch wal %s of %s: %w", name, source.ID(), err)
		}
	}
}

// substitute is what there is in the place of a segment that is absent.
type substitute struct {
	file    string // "": nothing
	problem error  // why that is not all there should be; file is "" then
}

// candidate is a file in the ring that may stand in for a segment.
type candidate struct {
	file  string // "": none
	reach postgres.LSN
}

func (c *candidate) remove() {
	if c.file != "" {
		_ = os.Remove(c.file) // swept with the ring otherwise
		c.file = ""
	}
}

// substitute looks for it. Tails are listed before segments: whoever removes tails has stored the segment before.
func (f *Fetcher) substitute(ctx context.Context, source Source, segment postgres.SegmentName) (substitute, error) {
	size := f.segmentSize()
	start, end := segment.Start(size), segment.End(size)
	begin, err := f.begin(ctx, source, segment.Timeline())
	if err != nil {
		return substitute{}, err
	}
	tails, err := listTails(ctx, source, segment.Timeline(), start, end)
	if err != nil {
		return substitute{}, err
	}
	streamed, err := f.assemble(ctx, source, segment, tails)
	defer streamed.remove()
	var unreadable *TailError
	switch {
	case errors.As(err, &unreadable):
		return substitute{problem: err}, nil
	case err != nil:
		return substitute{}, err
	case streamed.reach == end:
		return f.give(&streamed), nil
	}

	// The unfinished segment that a timeline ended with holds all there is of it.
	partial, err := f.partial(ctx, source, segment)
	defer partial.remove()
	if err != nil {
		return substitute{}, err
	}
	if partial.file != "" && streamed.file != "" {
		if err := sameUpTo(streamed.file, partial.file, int64(min(streamed.reach, partial.reach)-start)); err != nil {
			return substitute{problem: fmt.Errorf("wal %s.partial of %s and what was streamed of it: %w", segment, source.ID(), err)}, nil
		}
	}
	best := &streamed
	if partial.file != "" && partial.reach >= streamed.reach {
		best = &partial
	}
	if best.file == "" || best.reach <= begin {
		// The first segment of a timeline begins with a copy of its ancestor's WAL. One that ends within it holds nothing of its
		// own, and PostgreSQL asks for the ancestor's next, which may hold more.
		best = &candidate{reach: start}
	}
	problem, err := f.gap(ctx, source, segment, best.reach, begin)
	switch {
	case err != nil:
		return substitute{}, err
	case problem != nil:
		return substitute{problem: problem}, nil
	}
	return f.give(best), nil
}

// give hands over the file of a candidate, if there is one.
func (f *Fetcher) give(c *candidate) substitute {
	s := substitute{file: c.file}
	if c.file != "" {
		f.handOver(c.file)
		c.file = ""
	}
	return s
}

func listTails(ctx context.Context, source Source, t postgres.Timeline, from, to postgres.LSN) ([]repository.Tail, error) {
	var tails []repository.Tail
	for t, err := range source.ListTails(ctx, t, from, to) {
		if err != nil {
			return nil, err
		}
		tails = append(tails, t)
	}
	return tails, nil
}

// assemble puts the segment together from tails in the ring; no file if none begins where it does. Its reach is the
// segment's end if it is as good as a whole one.
func (f *Fetcher) assemble(ctx context.Context, source Source, segment postgres.SegmentName, tails []repository.Tail) (candidate, error) {
	for {
		c, err := f.assembleOnce(ctx, source, segment, tails)
		// Recovery does not come to what is damaged if it ends before.
		if e := (*TailError)(nil); errors.As(err, &e) && f.enough(e.Reached) {
			f.o.Log.Warn("damaged wal lies beyond what is needed", "error", err)
			tails = slices.DeleteFunc(slices.Clone(tails), func(t repository.Tail) bool { return t == e.Tail })
			continue
		}
		return c, err
	}
}

func (f *Fetcher) assembleOnce(ctx context.Context, source Source, segment postgres.SegmentName, tails []repository.Tail) (c candidate, err error) {
	size := f.segmentSize()
	c.reach = segment.Start(size)
	if chain, _ := Chain(tails, c.reach); len(chain) == 0 {
		return c, nil
	}
	out, err := f.create(string(segment))
	if err != nil {
		return c, err
	}
	defer out.closeOrRemove(&err)
	a, err := assembleSegment(ctx, source, tails, segment, size, out)
	if err != nil {
		return c, err
	}
	if err := out.fill(int64(size)); err != nil {
		return c, err
	}
	return candidate{file: out.Name(), reach: a}, nil
}

// enough tells whether recovery is known to end at or before a position: PostgreSQL takes it for an error itself if it does
// not find the target that it was given.
func (f *Fetcher) enough(reach postgres.LSN) bool { return f.o.Stop != 0 && reach >= f.o.Stop }

// wholeFromTails puts the segment together if tails hold all of it; "" if not.
func (f *Fetcher) wholeFromTails(ctx context.Context, source Source, segment postgres.SegmentName) string {
	size := f.segmentSize()
	tails, err := listTails(ctx, source, segment.Timeline(), segment.Start(size), segment.End(size))
	if err != nil {
		return ""
	}
	c, err := f.assemble(ctx, source, segment, tails)
	defer c.remove()
	if err != nil || c.reach < segment.End(size) {
		return ""
	}
	return f.give(&c).file
}

// partial gets the .partial file of a segment, which reaches as far as its records do; no file if there is none.
func (f *Fetcher) partial(ctx context.Context, source Source, segment postgres.SegmentName) (candidate, error) {
	size := f.segmentSize()
	file, err := f.download(ctx, source, string(segment)+".partial")
	if errors.Is(err, objectstore.ErrNotExist) {
		return candidate{reach: segment.Start(size)}, nil
	}
	if err != nil {
		return candidate{}, fmt.Errorf("%s.partial: %w", segment, err)
	}
	c := candidate{file: file}
	in, err := os.Open(file)
	if err != nil {
		return c, err
	}
	defer in.Close()
	scanner := postgres.NewSegmentScanner(segment, size)
	if _, err := io.Copy(scanner, in); err != nil {
		return c, err
	}
	c.reach = max(segment.Start(size), scanner.Result().End)
	return c, nil
}

// sameUpTo compares the first n bytes of two files.
func sameUpTo(a, b string, n int64) error {
	x, err := os.Open(a)
	if err != nil {
		return err
	}
	defer x.Close()
	y, err := os.Open(b)
	if err != nil {
		return err
	}
	defer y.Close()
	p, q := make([]byte, len(zeros)), make([]byte, len(zeros))
	for at := int64(0); at < n; at += int64(len(p)) {
		k := min(int64(len(p)), n-at)
		if _, err := x.ReadAt(p[:k], at); err != nil {
			return err
		}
		if _, err := y.ReadAt(q[:k], at); err != nil {
			return err
		}
		if !bytes.Equal(p[:k], q[:k]) {
			return fmt.Errorf("found different content within the %d bytes from byte %d", k, at)
		}
	}
	return nil
}

// history is the history of a timeline, nil if it is not in the archive, or damaged. That it is absent is not remembered.
func (f *Fetcher) history(ctx context.Context, source Source, t postgres.Timeline) (postgres.History, error) {
	if t == 1 {
		return nil, nil
	}
	f.mu.Lock()
	h, ok := f.histories[t]
	f.mu.Unlock()
	if ok {
		return h, nil
	}
	var b bytes.Buffer
	if _, err := source.GetWAL(ctx, postgres.HistoryFileName(t), &b); unusable(err) {
		// Nothing says what it descends from. If it is along this timeline that recovery goes, PostgreSQL has asked for the file,
		// and was told.
		return nil, nil
	} else if err != nil {
		return nil, err
	}
	h, err := postgres.ParseHistory(t, b.Bytes())
	if err != nil {
		return nil, err
	}
	f.mu.Lock()
	f.histories[t] = h
	f.mu.Unlock()
	return h, nil
}

// begin is where a timeline begins, 0 if nothing says so.
func (f *Fetcher) begin(ctx context.Context, source Source, t postgres.Timeline) (postgres.LSN, error) {
	h, err := f.history(ctx, source, t)
	if err != nil || len(h) == 0 {
		return 0, err
	}
	return h[len(h)-1].Switch, nil
}

// gap looks for something that needs more of the segment than there is: it ends at reach, its start if it is absent. begin
// is where its timeline begins. A nil problem says that nothing does, errAppeared that the segment has arrived meanwhile.
func (f *Fetcher) gap(ctx context.Context, source Source, segment postgres.SegmentName, reach, begin postgres.LSN) (problem, err error) {
	name, timeline, size := string(segment), segment.Timeline(), f.segmentSize()
	start, end := segment.Start(size), segment.End(size)
	gap := &GapError{Series: source.ID(), Missing: name}
	if reach > start {
		gap.Reached = reach
	}
	if f.enough(reach) {
		return nil, nil
	}
	for e, err := range source.ListWAL(ctx, timeline, name) {
		if err != nil {
			return nil, err
		}
		if e.Name == name {
			return fmt.Errorf("wal %s of %s: %w", name, source.ID(), errAppeared), nil
		}
		later, err := postgres.ParseWALFile(e.Name)
		if err != nil || later.Kind == postgres.HistoryFile || later.Kind == postgres.BackupFile || later.Segment <= segment {
			continue
		}
		gap.Later = e.Name
		return gap, nil
	}
	for t, err := range source.ListTails(ctx, timeline, end, ^postgres.LSN(0)) {
		if err != nil {
			return nil, err
		}
		gap.Later = "wal from " + t.String()
		return gap, nil
	}

	timelines, err := source.Timelines(ctx)
	if err != nil {
		return nil, err
	}
	for _, t := range timelines {
		if t <= timeline {
			continue // a timeline's ancestors have lower numbers
		}
		history, err := f.history(ctx, source, t)
		if err != nil {
			return nil, err
		}
		left, ok := history.SwitchPoint(timeline)
		if !ok || left <= reach {
			continue
		}
		if left < end {
			// A timeline that branches off within the segment has a segment of its own there, which begins with a copy.
			there, err := f.reaches(ctx, source, segment.On(t), left)
			if err != nil {
				return nil, err
			}
			if there {
				continue
			}
		}
		gap.Later = fmt.Sprintf("timeline %d, which branches off at %s,", t, left)
		return gap, nil
	}
	if f.o.Until > max(reach, begin) {
		gap.Until = f.o.Until
		return gap, nil
	}
	return nil, nil
}

// reaches tells whether a segment is there whole, or in tails beyond a position.
func (f *Fetcher) reaches(ctx context.Context, source Source, segment postgres.SegmentName, at postgres.LSN) (bool, error) {
	size := f.segmentSize()
	tails, err := listTails(ctx, source, segment.Timeline(), segment.Start(size), segment.End(size))
	if err != nil {
		return false, err
	}
	if _, end := Chain(tails, segment.Start(size)); RecordEnd(end, size) > at {
		return true, nil
	}
	for e, err := range source.ListWAL(ctx, segment.Timeline(), string(segment)) {
		return e.Name == string(segment), err
	}
	return false, nil
}
