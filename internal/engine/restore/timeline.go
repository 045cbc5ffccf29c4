package restore

import (
	"slices"
	"sort"

	"github.com/pgark/terraform-provider-pgark/internal/engine/postgres"
)

// segmentRange is a range of segment numbers, both ends included.
type segmentRange struct{ first, last uint64 }

// timelineWAL is what a repository holds of one timeline.
type timelineWAL struct {
	segments []segmentRange // whole ones; ascending, with holes between them
	partial  *uint64        // the segment that is there as .partial only, behind all whole ones
	history  postgres.History
}

func (w *timelineWAL) add(number uint64) {
	if k := len(w.segments); k > 0 && w.segments[k-1].last+1 == number {
		w.segments[k-1].last = number
		return
	}
	w.segments = append(w.segments, segmentRange{number, number})
}

// has tells whether the segment can be read to its end, or, for the last of a timeline, as far as it was written.
func (w *timelineWAL) has(number uint64) bool {
	if w == nil {
		return false
	}
	if w.partial != nil && *w.partial == number {
		return true
	}
	i := sort.Search(len(w.segments), func(i int) bool { return w.segments[i].last >= number })
	return i < len(w.segments) && w.segments[i].first <= number
}

func (w *timelineWAL) hasWhole(number uint64) bool {
	return w.has(number) && (w.partial == nil || *w.partial != number)
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

// find tells which timeline's file serves segment number along the path, and how far it can be read. PostgreSQL looks
// for a segment on the newest timeline first that had begun by then (xlogrecovery.c, XLogFileReadAnyTLI): the segment
// in which a timeline begins holds the old timeline's WAL before it, too.
func (v *inventory) find(p route, number uint64) (t postgres.Timeline, until postgres.LSN, ok bool) {
	start, end := v.size.Start(number), v.size.Start(number+1)
	for i := len(p) - 1; i >= 0; i-- {
		l := p[i]
		if v.size.Number(l.begin) > number {
			continue
		}
		if l.end <= start {
			return 0, 0, false
		}
		if w := v.timelines[l.timeline]; w.has(number) {
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
		all := w.segments
		if w.partial != nil {
			all = append(slices.Clip(all), segmentRange{*w.partial, *w.partial})
		}
		first, last := v.size.Number(l.begin), v.size.NumberBefore(l.end)
		for _, r := range all {
			r.first, r.last = max(r.first, first), min(r.last, last)
			if r.first <= r.last {
				ranges = append(ranges, r)
			}
		}
	}
	slices.SortFunc(ranges, func(a, b segmentRange) int {
		if a.first < b.first {
			return -1
		}
		return 1
	})
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
	// The unfinished segment that a timeline was left in ends where its successor began, if one is known.
	if k := len(out); k > 0 {
		t := p.timeline()
		if w := v.timelines[t]; w != nil && w.partial != nil && out[k-1].end == v.size.Start(*w.partial+1) {
			if at, ok := v.leftAt(t, *w.partial); ok {
				out[k-1].end = at
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
