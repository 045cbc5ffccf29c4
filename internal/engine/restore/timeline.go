package restore

import (
	"cmp"
	"slices"
	"sort"

	"github.com/pgark/terraform-provider-pgark/internal/engine/postgres"
	"github.com/pgark/terraform-provider-pgark/internal/engine/repository"
	"github.com/pgark/terraform-provider-pgark/internal/engine/wal"
)

// segmentRange is a range of segment numbers, both ends included.
type segmentRange struct{ first, last uint64 }

// timelineWAL is what a repository holds of one timeline.
type timelineWAL struct {
	segments []segmentRange     // whole ones; ascending, with holes between them
	partial  *uint64            // the segment that is there as .partial only, behind all whole ones
	tails    map[uint64]tailRun // what was streamed of segments that are not there whole, by their numbers
	history  postgres.History
	guess    bool // history is encrypted, and we have no identity
}

// tailRun is WAL that tails hold from the beginning of a segment on, without a hole.
type tailRun struct {
	all   []repository.Tail
	chain []repository.Tail // those of all that are to be read
	end   postgres.LSN      // of the last record
}

// setTails notes the tails of a segment that is not there whole.
func (w *timelineWAL) setTails(number uint64, all []repository.Tail, size postgres.SegmentSize) {
	chain, end := wal.Chain(all, size.Start(number))
	if len(chain) == 0 {
		delete(w.tails, number)
		return
	}
	if w.tails == nil {
		w.tails = map[uint64]tailRun{}
	}
	w.tails[number] = tailRun{all: all, chain: chain, end: wal.RecordEnd(end, size)}
}

func (w *timelineWAL) add(number uint64) {
	if k := len(w.segments); k > 0 && w.segments[k-1].last+1 == number {
		w.segments[k-1].last = number
		return
	}
	w.segments = append(w.segments, segmentRange{number, number})
}

// hasWhole tells whether the segment is there whole.
func (w *timelineWAL) hasWhole(number uint64) bool {
	if w == nil {
		return false
	}
	i := sort.Search(len(w.segments), func(i int) bool { return w.segments[i].last >= number })
	return i < len(w.segments) && w.segments[i].first <= number
}

// first is the lowest segment of which anything is there.
func (w *timelineWAL) first() (number uint64, ok bool) {
	for _, r := range w.ranges() {
		if !ok || r.first < number {
			number, ok = r.first, true
		}
	}
	return number, ok
}

// remove takes a whole segment out.
func (w *timelineWAL) remove(number uint64) {
	var rest []segmentRange
	for _, r := range w.segments {
		if number < r.first || number > r.last {
			rest = append(rest, r)
			continue
		}
		if r.first < number {
			rest = append(rest, segmentRange{r.first, number - 1})
		}
		if number < r.last {
			rest = append(rest, segmentRange{number + 1, r.last})
		}
	}
	w.segments = rest
}

// ranges are the segments of which anything is there, in no order.
func (w *timelineWAL) ranges() []segmentRange {
	all := slices.Clone(w.segments)
	if w.partial != nil {
		all = append(all, segmentRange{*w.partial, *w.partial})
	}
	for n := range w.tails {
		all = append(all, segmentRange{n, n})
	}
	return all
}

// inventory is the WAL of a series.
type inventory struct {
	size      postgres.SegmentSize
	timelines map[postgres.Timeline]*timelineWAL
}

// ids lists the timelines, ascending.
func (v *inventory) ids() []postgres.Timeline {
	ids := make([]postgres.Timeline, 0, len(v.timelines))
	for t := range v.timelines {
		ids = append(ids, t)
	}
	slices.Sort(ids)
	return ids
}

// orphan tells whether the history of a timeline is missing: nothing says what it descends from.
func (v *inventory) orphan(t postgres.Timeline) bool {
	w := v.timelines[t]
	return t > 1 && w != nil && len(w.history) == 0 && !w.guess
}

// endOfWAL is the open end of a path's last leg.
const endOfWAL = ^postgres.LSN(0)

// leg is the part of a path that runs along one timeline, from begin (included) to end.
type leg struct {
	timeline   postgres.Timeline
	begin, end postgres.LSN
}

// path leads from the beginning of WAL to the end of its last timeline.
type route []leg

func (v *inventory) route(t postgres.Timeline) route {
	var p route
	var begin postgres.LSN
	if w := v.timelines[t]; w != nil {
		for _, a := range w.history {
			p = append(p, leg{a.Timeline, begin, a.Switch})
			begin = a.Switch
		}
	}
	return append(p, leg{t, begin, endOfWAL})
}

// timeline is where the path ends.
func (p route) timeline() postgres.Timeline { return p[len(p)-1].timeline }

// leaves is where the path leaves timeline t; false if it never was on it.
func (p route) leaves(t postgres.Timeline) (postgres.LSN, bool) {
	for _, l := range p {
		if l.timeline == t {
			return l.end, true
		}
	}
	return 0, false
}

// reach tells how far the timeline's own file of a segment, or what stands in for it, can be read; false if not at all.
// What ends before its timeline begins holds nothing of its own, and is passed over (wal.Fetcher does the same).
func (v *inventory) reach(t postgres.Timeline, number uint64) (postgres.LSN, bool) {
	w := v.timelines[t]
	start, end := v.size.Start(number), v.size.Start(number+1)
	if w.hasWhole(number) {
		return end, true
	}
	if w == nil {
		return 0, false
	}
	at := start
	if run, ok := w.tails[number]; ok {
		at = run.end
	}
	if w.partial != nil && *w.partial == number {
		// The unfinished segment that a timeline was left in ends where its successor began, if one is known.
		left, known := v.leftAt(t, number)
		switch {
		case known:
			at = max(at, left)
		case at == start:
			at = end
		}
	}
	if k := len(w.history); k > 0 && at <= w.history[k-1].Switch {
		return 0, false
	}
	return at, at > start
}

// find tells which timeline's file serves segment number along the path, and how far it can be read. PostgreSQL looks
// for a segment on the newest timeline first that had begun by then (xlogrecovery.c, XLogFileReadAnyTLI): the segment
// in which a timeline begins holds the old timeline's WAL before it, too.
func (v *inventory) find(p route, number uint64) (t postgres.Timeline, until postgres.LSN, ok bool) {
	start := v.size.Start(number)
	for i := len(p) - 1; i >= 0; i-- {
		l := p[i]
		if v.size.Number(l.begin) > number {
			continue
		}
		if l.end <= start {
			return 0, 0, false
		}
		if end, ok := v.reach(l.timeline, number); ok {
			return l.timeline, min(end, l.end), true
		}
	}
	return 0, 0, false
}

// stretch is WAL without a hole along a path. It begins on a segment's boundary.
type stretch struct{ start, end postgres.LSN }

// stretches finds what WAL is there along the path, ascending.
func (v *inventory) stretches(p route) []stretch {
	var ranges []segmentRange
	for _, l := range p {
		w := v.timelines[l.timeline]
		if w == nil {
			continue
		}
		first, last := v.size.Number(l.begin), v.size.NumberBefore(l.end)
		for _, r := range w.ranges() {
			r.first, r.last = max(r.first, first), min(r.last, last)
			if r.first <= r.last {
				ranges = append(ranges, r)
			}
		}
	}
	slices.SortFunc(ranges, func(a, b segmentRange) int { return cmp.Compare(a.first, b.first) })
	var out []stretch
	next := uint64(0)
	for _, r := range ranges {
		for n := max(r.first, next); n <= r.last; n++ {
			next = n + 1
			_, until, ok := v.find(p, n)
			if !ok {
				continue
			}
			if k := len(out); k > 0 && out[k-1].end == v.size.Start(n) {
				out[k-1].end = until
			} else {
				out = append(out, stretch{v.size.Start(n), until})
			}
		}
	}
	return out
}

// leftAt is where the latest of the timelines that begin in segment number of t left it.
func (v *inventory) leftAt(t postgres.Timeline, number uint64) (postgres.LSN, bool) {
	var at postgres.LSN
	for _, w := range v.timelines {
		left, ok := w.history.SwitchPoint(t)
		if ok && left > v.size.Start(number) && v.size.NumberBefore(left) == number {
			at = max(at, left)
		}
	}
	return at, at != 0
}

// demanded finds WAL behind the end of a stretch that must have been written, because a timeline branched off there; false
// if there is none. What a timeline's own first segment has a copy of is no loss to it.
func (v *inventory) demanded(p route, end postgres.LSN) (at postgres.LSN, by postgres.Timeline, ok bool) {
	for _, t := range v.ids() {
		left, branches := v.timelines[t].history.SwitchPoint(p.timeline())
		if !branches || left <= max(end, at) {
			continue
		}
		if n := v.size.NumberBefore(left); n == v.size.Number(end) {
			if _, copied := v.reach(t, n); copied {
				continue
			}
		}
		at, by, ok = left, t, true
	}
	for i, l := range p[:len(p)-1] {
		if l.end > max(end, at) {
			at, by, ok = l.end, p[i+1].timeline, true
		}
	}
	return at, by, ok
}
