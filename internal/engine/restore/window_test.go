package restore

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"pgregory.net/rapid"

	"github.com/pgark/terraform-provider-pgark/internal/engine/postgres"
	"github.com/pgark/terraform-provider-pgark/internal/engine/repository"
)

// The tests' WAL is counted in quarters of a segment.
const (
	testSize    = postgres.SegmentSize(1 << 20)
	testQuarter = postgres.LSN(1 << 18)
	testEnd     = 12 * 4 // quarters
)

// model is WAL and images, with what can be restored worked out one quarter after the other.
type model struct {
	inventory *inventory
	images    []repository.ImageInfo
	ends      map[postgres.Timeline]map[int]int // how far each segment is there, in quarters; absent: not at all
}

func drawModel(t *rapid.T) *model {
	m := &model{inventory: &inventory{size: testSize, timelines: map[postgres.Timeline]*timelineWAL{}}, ends: map[postgres.Timeline]map[int]int{}}
	v := m.inventory
	last := postgres.Timeline(rapid.IntRange(1, 4).Draw(t, "timelines"))
	for id := postgres.Timeline(1); id <= last; id++ {
		w := &timelineWAL{}
		begin := 0
		if id > 1 {
			parent := postgres.Timeline(rapid.IntRange(1, int(id)-1).Draw(t, "parent"))
			for _, a := range v.timelines[parent].history {
				begin = int(a.Switch / testQuarter)
			}
			w.history = slices.Clone(v.timelines[parent].history)
			begin = rapid.IntRange(min(begin+1, testEnd-1), testEnd-1).Draw(t, "fork")
			w.history = append(w.history, postgres.Ancestor{Timeline: parent, Switch: postgres.LSN(begin) * testQuarter})
		}
		m.ends[id] = map[int]int{}
		for n := begin / 4; n < testEnd/4; n++ {
			switch kind := rapid.IntRange(0, 9).Draw(t, "there"); {
			case kind > 3:
				w.add(uint64(n))
				m.ends[id][n] = 4*n + 4
			case kind > 1:
				// Tails between any quarters of the segment; what they hold without a hole counts.
				var tails []repository.Tail
				for range rapid.IntRange(1, 4).Draw(t, "tails") {
					from := rapid.IntRange(0, 3).Draw(t, "from")
					to := rapid.IntRange(from+1, 4).Draw(t, "to")
					tails = append(tails, testTail(id, 4*n+from, 4*n+to))
				}
				w.setTails(uint64(n), tails, testSize)
				for q := 4 * n; slices.ContainsFunc(tails, func(x repository.Tail) bool {
					return x.Start <= postgres.LSN(q)*testQuarter && postgres.LSN(q)*testQuarter < x.End
				}); q++ {
					m.ends[id][n] = q + 1
				}
			}
		}
		v.timelines[id] = w
	}
	for i := range rapid.IntRange(0, 4).Draw(t, "images") {
		on := postgres.Timeline(rapid.IntRange(1, int(last)).Draw(t, "on"))
		begin := 0
		for _, a := range v.timelines[on].history {
			begin = int(a.Switch / testQuarter)
		}
		start := rapid.IntRange(begin, testEnd-1).Draw(t, "start")
		stop := rapid.IntRange(start+1, min(start+8, testEnd)).Draw(t, "stop")
		m.images = append(m.images, repository.ImageInfo{
			SID: repository.SID(i + 1), Timeline: on, StartLSN: postgres.LSN(start) * testQuarter, StopLSN: postgres.LSN(stop) * testQuarter, SegmentSize: uint64(testSize),
		})
	}
	return m
}

func testTail(t postgres.Timeline, from, to int) repository.Tail {
	return repository.Tail{Timeline: t, Start: postgres.LSN(from) * testQuarter, End: postgres.LSN(to) * testQuarter}
}

// there tells whether the quarter can be read on the way to timeline t. PostgreSQL takes a segment from the newest timeline
// that had begun by then and has one, which is one that holds more than a copy of its ancestor's.
func (m *model) there(t postgres.Timeline, quarter int) bool {
	begin := 0
	var way []postgres.Timeline
	begins := map[postgres.Timeline]int{}
	for _, a := range m.inventory.timelines[t].history {
		way, begins[a.Timeline] = append(way, a.Timeline), begin
		begin = int(a.Switch / testQuarter)
	}
	way, begins[t] = append(way, t), begin
	end := testEnd + 4
	for _, on := range slices.Backward(way) {
		n := quarter / 4
		if begins[on]/4 <= n {
			if to := m.ends[on][n]; to > begins[on] {
				return quarter < min(to, end)
			}
			if begins[on] <= 4*n {
				return false // it alone wrote the segment
			}
		}
		end = begins[on]
	}
	return false
}

// can tells whether the image can be brought to a position on the way to timeline t.
func (m *model) can(i repository.ImageInfo, t postgres.Timeline, to int) bool {
	if i.Timeline != t && !m.inventory.timelines[t].history.Includes(i.Timeline, i.StopLSN) || to < int(i.StopLSN/testQuarter) {
		return false
	}
	for q := int(i.StartLSN / testQuarter); q < to; q++ {
		if !m.there(t, q) {
			return false
		}
	}
	return true // what lies before in the same segment is there, too: a segment is read from its beginning
}

func (m *model) reachable(t postgres.Timeline, to int) bool {
	return slices.ContainsFunc(m.images, func(i repository.ImageInfo) bool { return m.can(i, t, to) })
}

func TestSurvey_likeModel(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		m := drawModel(t)
		v := m.inventory
		s := v.survey(m.images)
		covered := func(on postgres.Timeline, to int) bool {
			at := postgres.LSN(to) * testQuarter
			for _, sp := range s.spans {
				left, ok := sp.route.leaves(on)
				if ok && at <= left && at >= sp.first.StopLSN && at <= sp.stretch.end {
					return true
				}
			}
			return false
		}
		for _, on := range v.ids() {
			for to := range testEnd + 1 {
				if m.reachable(on, to) && !covered(on, to) {
					t.Fatalf("timeline %d up to quarter %d can be restored, but no window says so: %+v", on, to, s.spans)
				}
			}
		}
		for _, sp := range s.spans {
			for to := int(sp.first.StopLSN / testQuarter); to <= int(sp.stretch.end/testQuarter); to++ {
				if !m.reachable(sp.route.timeline(), to) {
					t.Fatalf("timeline %d up to quarter %d cannot be restored, but is in the window %+v", sp.route.timeline(), to, sp)
				}
			}
		}
		for _, i := range m.images {
			possible := slices.ContainsFunc(v.ids(), func(on postgres.Timeline) bool { return m.can(i, on, int(i.StopLSN/testQuarter)) })
			if _, incomplete := s.incomplete[i.SID]; incomplete == possible {
				t.Fatalf("image %d: incomplete %v, but restorable %v", i.SID, incomplete, possible)
			}
		}
		for _, h := range s.holes {
			for q := int(h.start / testQuarter); q < int(h.end/testQuarter); q++ {
				if m.there(h.route.timeline(), q) {
					t.Fatalf("quarter %d is there, but in the gap %+v", q, h)
				}
			}
		}
	})
}

func TestPlan_LSNLikeModel(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		m := drawModel(t)
		if len(m.images) == 0 {
			return
		}
		s := m.state(nil)
		on := rapid.SampledFrom(m.inventory.ids()).Draw(t, "timeline")
		to := rapid.IntRange(1, testEnd-1).Draw(t, "target")
		p, err := s.plan(t.Context(), &Options{Target: Target{Kind: ToLSN, LSN: postgres.LSN(to)*testQuarter + 8}, Timeline: fmt.Sprint(uint32(on))})
		// PostgreSQL stops at a record that begins at the target or after it, so the quarter that begins there is needed.
		var best repository.ImageInfo
		for _, i := range m.images {
			if m.can(i, on, to+1) && i.StopLSN <= postgres.LSN(to)*testQuarter+8 && i.StopLSN >= best.StopLSN {
				best = i
			}
		}
		switch {
		case best.SID == 0:
			var unreachable *UnreachableError
			if !errors.As(err, &unreachable) {
				t.Fatalf("found plan %+v (%v), expected an UnreachableError", p, err)
			}
		case err != nil:
			t.Fatalf("%v, but image %d can get there", err, best.SID)
		case p.image.StopLSN != best.StopLSN:
			t.Fatalf("found image %s, expected %s", p.image.SID, best.SID)
		}
	})
}

// state is the model as if read from a repository; header tells of segments.
func (m *model) state(header func(name string) repository.WALInfo) *seriesState {
	s := &seriesState{
		id:        repository.SeriesID{Job: "orders", Instance: "15-main", SystemID: 7},
		images:    m.images,
		inventory: m.inventory,
		survey:    m.inventory.survey(m.images),
		times:     map[string]repository.WALInfo{},
	}
	s.header = func(_ context.Context, name string) (repository.WALInfo, error) {
		if header == nil {
			return repository.WALInfo{}, nil
		}
		return header(name), nil
	}
	s.tailHeader = func(_ context.Context, t repository.Tail) (repository.WALInfo, error) {
		last := testTime(t.End).Add(-time.Second)
		return repository.WALInfo{FirstTime: &last, LastTime: &last}, nil
	}
	// A record begins in the middle of each quarter.
	s.lastRecord = func(_ context.Context, p route, number uint64) (postgres.LSN, error) {
		_, until, ok := m.inventory.find(p, number)
		if !ok {
			return 0, nil
		}
		return until - testQuarter/2, nil
	}
	return s
}

var testEpoch = time.Date(2026, 11, 22, 12, 0, 0, 0, time.UTC)

// testTime is the time at which a position was written: a minute each segment.
func testTime(at postgres.LSN) time.Time {
	return testEpoch.Add(time.Duration(at) * time.Minute / time.Duration(testSize))
}

// testHeader has commits in the middle and at three quarters of each segment.
func testHeader(name string) repository.WALInfo {
	start := postgres.SegmentName(name[:24]).Start(testSize)
	first, last := testTime(start+2*testQuarter), testTime(start+3*testQuarter)
	return repository.WALInfo{Name: name, FirstTime: &first, LastTime: &last}
}

func testImage(sid repository.SID, on postgres.Timeline, start, stop postgres.LSN) repository.ImageInfo {
	return repository.ImageInfo{SID: sid, Timeline: on, StartLSN: start * testQuarter, StopLSN: stop * testQuarter,
		StartedAt: testTime(start * testQuarter), CompletedAt: testTime(stop * testQuarter), SegmentSize: uint64(testSize), PostgresVersion: 150004}
}

func testWAL(history postgres.History, segments ...uint64) *timelineWAL {
	w := &timelineWAL{history: history}
	for _, n := range segments {
		w.add(n)
	}
	return w
}

func TestPlan_time(t *testing.T) {
	// Segments 1 to 4 and 6 to 9; images in 1, 3 and 7.
	m := &model{
		inventory: &inventory{size: testSize, timelines: map[postgres.Timeline]*timelineWAL{1: testWAL(nil, 1, 2, 3, 4, 6, 7, 8, 9)}},
		images:    []repository.ImageInfo{testImage(1, 1, 5, 6), testImage(2, 1, 13, 14), testImage(3, 1, 29, 30)},
	}
	quarter := func(q int) time.Time { return testTime(postgres.LSN(q) * testQuarter) }
	for name, c := range map[string]struct {
		at        time.Time
		exclusive bool
		image     repository.SID
		stop      stopKind
		reason    string
	}{
		"before the first image":       {at: quarter(4), reason: "it lies before the first moment that can be restored, 2026-11-22 12:01:30+00:00"},
		"within the first image":       {at: quarter(5).Add(time.Second), reason: "it lies within the backup of image 0000000000000001 (2026-11-22 12:01:15+00:00 to 2026-11-22 12:01:30+00:00), and no earlier image can be restored"},
		"when the first image is done": {at: quarter(6), image: 1, stop: stopAtTarget},
		"between images":               {at: quarter(12), image: 1, stop: stopAtTarget},
		"within the second image":      {at: quarter(13).Add(time.Second), image: 1, stop: stopAtTarget},
		"when the second is done":      {at: quarter(14), image: 2, stop: stopAtTarget},
		"just before the last commit":  {at: quarter(19).Add(-time.Microsecond), image: 2, stop: stopAtTarget},
		"just before, exclusively":     {at: quarter(19), exclusive: true, image: 2, stop: stopAtTarget},
		"in the gap":                   {at: quarter(19).Add(time.Microsecond), reason: "WAL 000000010000000000000005 is missing, before it: the last commit known is of 2026-11-22 12:04:45+00:00"},
		"behind the gap, too early":    {at: quarter(27), reason: "WAL 000000010000000000000005 is missing, before it: the last commit known is of 2026-11-22 12:04:45+00:00"},
		"behind the gap":               {at: quarter(31), image: 3, stop: stopAtTarget},
		"beyond the end":               {at: quarter(39).Add(time.Microsecond), reason: "the last commit known is of 2026-11-22 12:09:45+00:00, and the archive ends at 0/A00000; use the latest moment, or a position, if nothing was committed since"},
	} {
		t.Run(name, func(t *testing.T) {
			p, err := m.state(testHeader).plan(t.Context(), &Options{Target: Target{Kind: ToTime, Time: c.at, Exclusive: c.exclusive}})
			if c.reason != "" {
				var u *UnreachableError
				if !errors.As(err, &u) {
					t.Fatalf("found %+v (%v), expected it to be refused", p, err)
				}
				if u.Reason != c.reason {
					t.Errorf("found reason  %s\nexpected      %s", u.Reason, c.reason)
				}
				if len(u.Windows) != 2 {
					t.Errorf("windows: %v", u.Windows)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			if p.image.SID != c.image || p.stop != c.stop {
				t.Errorf("found image %d, stop %d, expected %d, %d", p.image.SID, p.stop, c.image, c.stop)
			}
		})
	}
}

func TestPlan_timelines(t *testing.T) {
	// Timeline 1 goes on to segment 6 after 2 left it in 3; 3 left 2 in 5.
	two := postgres.History{{Timeline: 1, Switch: 14 * testQuarter}}
	three := append(slices.Clone(two), postgres.Ancestor{Timeline: 2, Switch: 21 * testQuarter})
	m := &model{
		inventory: &inventory{size: testSize, timelines: map[postgres.Timeline]*timelineWAL{
			1: testWAL(nil, 1, 2, 3, 4, 5, 6), 2: testWAL(two, 3, 4, 5), 3: testWAL(three, 5, 6, 7),
		}},
		images: []repository.ImageInfo{testImage(1, 1, 5, 6), testImage(2, 1, 15, 16), testImage(3, 2, 17, 18)},
	}
	s := m.state(testHeader)
	windows, err := s.windows(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	var found []string
	for _, w := range windows {
		found = append(found, fmt.Sprintf("%d: %d to %d", w.Timeline, w.StartLSN/testQuarter, w.EndLSN/testQuarter))
	}
	// The whole segments of 1 and 2 hold more than their successors took over.
	if want := []string{"1: 6 to 28", "2: 6 to 24", "3: 6 to 32"}; !slices.Equal(found, want) {
		t.Errorf("windows: found %q, expected %q", found, want)
	}
	for name, c := range map[string]struct {
		target   Target
		timeline string
		image    repository.SID
		on       postgres.Timeline
		reason   string
	}{
		"latest":                           {image: 3, on: 3},
		"latest of the first":              {timeline: "1", image: 2, on: 1},
		"the newest image's":               {timeline: CurrentTimeline, image: 3, on: 2},
		"before any fork":                  {target: Target{Kind: ToLSN, LSN: 10 * testQuarter}, image: 1, on: 3},
		"an image that 3 does not pass":    {target: Target{Kind: ToLSN, LSN: 16*testQuarter + 8}, image: 1, on: 3},
		"the same, on the first":           {target: Target{Kind: ToLSN, LSN: 16*testQuarter + 8}, timeline: "1", image: 2, on: 1},
		"one that is not there":            {timeline: "4", reason: "there is no timeline 4 in the archive, found 1, 2, 3"},
		"an end that another timeline has": {target: Target{Kind: ToLSN, LSN: 30 * testQuarter}, timeline: "2", reason: "the archive ends at 0/600000"},
	} {
		t.Run(name, func(t *testing.T) {
			p, err := s.plan(t.Context(), &Options{Target: c.target, Timeline: c.timeline})
			if c.reason != "" {
				if err == nil || !strings.HasSuffix(err.Error(), c.reason) {
					t.Fatalf("found %v, expected %s", err, c.reason)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			if p.image.SID != c.image || p.Timeline != c.on {
				t.Errorf("found image %d on timeline %d, expected %d on %d", p.image.SID, p.Timeline, c.image, c.on)
			}
		})
	}
}

func TestSurvey_partial(t *testing.T) {
	// A promoted standby archives the old timeline's last segment as .partial, and the new one's with the copy.
	last := uint64(3)
	old := testWAL(nil, 1, 2)
	old.partial = &last
	m := &model{
		inventory: &inventory{size: testSize, timelines: map[postgres.Timeline]*timelineWAL{
			1: old, 2: testWAL(postgres.History{{Timeline: 1, Switch: 14 * testQuarter}}, 3, 4),
		}},
		images: []repository.ImageInfo{testImage(1, 1, 5, 6)},
	}
	s := m.inventory.survey(m.images)
	if len(s.spans) != 1 || s.spans[0].route.timeline() != 2 || s.spans[0].stretch.end != 20*testQuarter {
		t.Errorf("found %+v, expected one window, to the end of timeline 2", s.spans)
	}
	// Before the new timeline's segment has arrived, the old one's is good up to the fork.
	m.inventory.timelines[2].segments = nil
	s = m.inventory.survey(m.images)
	if len(s.spans) != 1 || s.spans[0].stretch.end != 14*testQuarter || len(s.holes) != 0 {
		t.Errorf("found %+v, expected one window, to where timeline 1 was left", s.spans)
	}
}
