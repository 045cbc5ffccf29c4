package restore

import (
	"cmp"
	"fmt"
	"slices"
	"time"

	"github.com/pgark/terraform-provider-pgark/internal/engine/postgres"
	"github.com/pgark/terraform-provider-pgark/internal/engine/repository"
)

// Window is a closed interval over which every moment can be restored.
type Window struct {
	From     time.Time         `json:"from"` // the first consistent moment
	To       time.Time         `json:"to"`   // the last commit known in the WAL
	StartLSN postgres.LSN      `json:"start_lsn"`
	EndLSN   postgres.LSN      `json:"end_lsn"`
	Timeline postgres.Timeline `json:"timeline"`
}

func (w Window) String() string {
	return fmt.Sprintf("%s to %s (LSN %s to %s, timeline %d)",
		w.From.UTC().Format(timeFormat), w.To.UTC().Format(timeFormat), w.StartLSN, w.EndLSN, w.Timeline)
}

// Gap is WAL that is missing between an image and later WAL.
type Gap struct {
	Timeline postgres.Timeline `json:"timeline"`
	StartLSN postgres.LSN      `json:"start_lsn"`
	EndLSN   postgres.LSN      `json:"end_lsn"`
	Segments uint64            `json:"segments"`
	From     *time.Time        `json:"from"` // the last commit known before it
	To       *time.Time        `json:"to"`   // the first commit known behind it
}

// on tells whether the image lies on the path: the path must stay on its timeline until the image is consistent.
func (p route) on(i repository.ImageInfo) bool {
	end, ok := p.leaves(i.Timeline)
	return ok && i.StopLSN <= end
}

// cover finds the stretch that makes the image consistent.
func cover(stretches []stretch, i repository.ImageInfo) (stretch, bool) {
	for _, s := range stretches {
		if s.start <= i.StartLSN && i.StopLSN <= s.end {
			return s, true
		}
	}
	return stretch{}, false
}

// missing says what the image needs and the path lacks; "" if nothing.
func (v *inventory) missing(p route, i repository.ImageInfo) string {
	_, _, why := v.lacks(p, i)
	return why
}

// lacks names the first segment that the image needs and the path does not have to its end, and says how far it goes.
func (v *inventory) lacks(p route, i repository.ImageInfo) (name postgres.SegmentName, from postgres.LSN, why string) {
	for n := v.size.Number(i.StartLSN); n <= v.size.NumberBefore(i.StopLSN); n++ {
		_, until, ok := v.find(p, n)
		name = postgres.MakeSegmentName(i.Timeline, n, v.size)
		switch {
		case !ok:
			return name, v.size.Start(n), fmt.Sprintf("WAL %s is missing", name)
		case until < min(v.size.Start(n+1), i.StopLSN):
			return name, until, fmt.Sprintf("WAL %s ends at %s", name, until)
		}
	}
	return "", 0, ""
}

// span is a window before its times are known.
type span struct {
	route   route
	stretch stretch
	first   repository.ImageInfo // the first image that the stretch makes consistent
}

// hole is a gap before its times are known.
type hole struct {
	route      route
	timeline   postgres.Timeline
	start, end postgres.LSN
}

// survey is what can be restored from an inventory and images.
type survey struct {
	spans      []span
	holes      []hole
	incomplete map[repository.SID]string // images that cannot be restored, with the reason
}

func (v *inventory) survey(images []repository.ImageInfo) survey {
	s := survey{incomplete: map[repository.SID]string{}}
	if len(images) == 0 {
		return s
	}
	ids := v.ids()
	for _, i := range images {
		if !slices.Contains(ids, i.Timeline) {
			ids = append(ids, i.Timeline)
		}
	}
	slices.Sort(ids)
	restorable := map[repository.SID]bool{}
	seen := map[Gap]bool{}
	// Later timelines first: what an ancestor has to offer on its own may then be known to be part of theirs.
	for _, t := range slices.Backward(ids) {
		p := v.route(t)
		stretches := v.stretches(p)
		firsts := map[stretch]repository.ImageInfo{}
		from := endOfWAL // where the WAL begins that any image of this path needs
		for _, i := range images {
			if !p.on(i) {
				continue
			}
			from = min(from, i.StartLSN)
			c, ok := cover(stretches, i)
			if !ok {
				continue
			}
			restorable[i.SID] = true
			if f, ok := firsts[c]; !ok || i.StopLSN < f.StopLSN {
				firsts[c] = i
			}
		}
		for _, c := range stretches {
			first, ok := firsts[c]
			if ok && !s.contains(t, c, first) {
				s.spans = append(s.spans, span{p, c, first})
			}
		}
		for _, h := range v.holes(p, stretches, from) {
			key := Gap{Timeline: h.timeline, StartLSN: h.start, EndLSN: h.end}
			if !seen[key] {
				seen[key] = true
				s.holes = append(s.holes, h)
			}
		}
	}
	for _, i := range images {
		if restorable[i.SID] {
			continue
		}
		s.incomplete[i.SID] = v.missing(v.route(i.Timeline), i)
	}
	slices.SortStableFunc(s.spans, func(a, b span) int {
		return cmp.Or(cmp.Compare(a.route.timeline(), b.route.timeline()), cmp.Compare(a.stretch.start, b.stretch.start))
	})
	slices.SortStableFunc(s.holes, func(a, b hole) int {
		return cmp.Or(cmp.Compare(a.timeline, b.timeline), cmp.Compare(a.start, b.start))
	})
	return s
}

// contains tells whether the span of a later timeline offers everything that this one of timeline t does.
func (s *survey) contains(t postgres.Timeline, c stretch, first repository.ImageInfo) bool {
	for _, later := range s.spans {
		left, ok := later.route.leaves(t)
		if ok && later.first.SID == first.SID && c.end <= left && c.end <= later.stretch.end {
			return true
		}
	}
	return false
}

// holes are what is missing between from and the last stretch.
func (v *inventory) holes(p route, stretches []stretch, from postgres.LSN) []hole {
	var out []hole
	if from == endOfWAL {
		return nil
	}
	at := v.size.Start(v.size.Number(from))
	for _, c := range stretches {
		if c.end <= at {
			continue
		}
		if c.start > at {
			out = append(out, hole{p, p.at(at), at, c.start})
		}
		at = c.end
	}
	return out
}

// at is the timeline that the path runs along at a position.
func (p route) at(lsn postgres.LSN) postgres.Timeline {
	for _, l := range p {
		if lsn < l.end {
			return l.timeline
		}
	}
	return p.timeline()
}

// completed is when an image was complete, rounded up to PostgreSQL's resolution: from then on it can be a target.
func completed(i repository.ImageInfo) time.Time {
	t := i.CompletedAt.Truncate(time.Microsecond)
	if t.Before(i.CompletedAt) {
		t = t.Add(time.Microsecond)
	}
	return t
}
