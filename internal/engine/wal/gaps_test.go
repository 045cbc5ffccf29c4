package wal

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"pgregory.net/rapid"

	"github.com/pgark/terraform-provider-pgark/internal/engine/daemon/control"
	"github.com/pgark/terraform-provider-pgark/internal/engine/objectstore"
	"github.com/pgark/terraform-provider-pgark/internal/engine/postgres"
	"github.com/pgark/terraform-provider-pgark/internal/engine/repository"
)

// history is the truth that a watcher is compared with: what a cluster has written, and what became of it.
type history struct {
	t       *rapid.T
	walDir  string
	chain   chain
	next    uint64            // the segment that is written next
	stored  map[string]string // in the repository, by whom
	pending map[string]bool   // on its way
	lost    map[string]bool
	kept    map[string]bool // in pg_wal, nobody has told the watcher
	head    *repository.Head
	away    bool
	lists   int
	starts  int

	now    time.Time
	w      *watcher
	alarms map[string]int
	told   map[string]bool
}

func (h *history) ListWAL(_ context.Context, t postgres.Timeline, from string) iter.Seq2[repository.WALEntry, error] {
	return func(yield func(repository.WALEntry, error) bool) {
		h.lists++
		if h.away {
			yield(repository.WALEntry{}, errors.New("away"))
			return
		}
		for _, name := range slices.Sorted(maps.Keys(h.stored)) {
			if postgres.SegmentName(name[:24]).Timeline() == t && name >= from && !yield(repository.WALEntry{Name: name}, nil) {
				return
			}
		}
	}
}

func (h *history) StatWAL(_ context.Context, name string) (repository.WALInfo, error) {
	host, ok := h.stored[name]
	switch {
	case h.away:
		return repository.WALInfo{}, errors.New("away")
	case !ok:
		return repository.WALInfo{}, objectstore.ErrNotExist
	}
	return repository.WALInfo{Name: name, Host: host}, nil
}

func (h *history) Head(context.Context) (*repository.Head, error) {
	if h.away {
		return nil, errors.New("away")
	}
	return h.head, nil
}

func (h *history) start() {
	h.starts++
	clear(h.alarms) // one that has told of a gap, and was started anew, may tell of it again
	h.w = &watcher{
		archive: h, walDir: h.walDir, size: h.chain.size, host: "db1",
		held: func(t postgres.Timeline, from, to uint64) (all []uint64) {
			for name := range h.pending {
				s := postgres.SegmentName(name)
				if n := s.Number(h.chain.size); s.Timeline() == t && n >= from && n <= to {
					all = append(all, n)
				}
			}
			return all
		},
		ship: func(name string) {
			if _, err := os.Stat(filepath.Join(h.walDir, name)); err != nil {
				h.t.Fatalf("told to ship %s: %v", name, err)
			}
			delete(h.kept, name)
			h.pending[name] = true
		},
		alarm: func(g gap) {
			for n := g.first; n <= g.last; n++ {
				name := h.chain.name(n)
				if !h.lost[name] {
					h.t.Fatalf("a false alarm: %s is not lost", name)
				}
				h.told[name] = true
				if h.alarms[name]++; h.alarms[name] > 1 {
					h.t.Fatalf("%s is reported lost %d times", name, h.alarms[name])
				}
			}
			// As the daemon does.
			h.head.Images = append(h.head.Images, repository.ImageInfo{SID: repository.SID(len(h.head.Images) + 1), Timeline: h.chain.own, StartLSN: h.chain.size.Start(h.next), StopLSN: h.chain.size.Start(h.next)})
		},
	}
}

func (h *history) check() {
	if _, err := h.w.check(h.t.Context(), h.now); (err != nil) != h.away && err != nil {
		h.t.Fatal(err)
	}
}

func (h *history) arrive(name string) {
	delete(h.pending, name)
	_ = os.Remove(filepath.Join(h.walDir, name)) // PostgreSQL may have removed it long ago
	h.stored[name] = "db1"
	h.w.note(postgres.SegmentName(name))
}

func (h *history) write(fate string) {
	name := h.chain.name(h.next)
	h.next++
	switch fate {
	case "lost":
		h.lost[name] = true
	case "kept":
		h.kept[name] = true
		if err := os.WriteFile(filepath.Join(h.walDir, name), nil, 0o600); err != nil {
			h.t.Fatal(err)
		}
	default:
		h.pending[name] = true
	}
}

func newHistory(t *rapid.T, dir string) *history {
	h := &history{
		t: t, walDir: dir, chain: chain{own: 1, size: 16 << 20}, next: uint64(rapid.IntRange(1, 600).Draw(t, "first")),
		stored: map[string]string{}, pending: map[string]bool{}, lost: map[string]bool{}, kept: map[string]bool{}, alarms: map[string]int{}, told: map[string]bool{},
		head: &repository.Head{}, now: time.Unix(1e9, 0),
	}
	h.head.Images = []repository.ImageInfo{{SID: 1, Timeline: 1, StartLSN: h.chain.size.Start(h.next), StopLSN: h.chain.size.Start(h.next) + 100}}
	h.start()
	return h
}

// In whatever order segments arrive, and whatever else happens: what is lost is reported, once, and nothing else is.
func TestGaps_anyOrder(t *testing.T) {
	t.Parallel()
	root := t.TempDir()
	runs := 0
	rapid.Check(t, func(t *rapid.T) {
		runs++
		dir := filepath.Join(root, fmt.Sprint(runs))
		if err := os.Mkdir(dir, 0o700); err != nil {
			t.Fatal(err)
		}
		defer os.RemoveAll(dir)
		h := newHistory(t, dir)
		h.write("stored")
		first := h.chain.name(h.next - 1)
		h.arrive(first) // with nothing before it, it is where protection began
		h.check()
		pick := func() string {
			return rapid.SampledFrom(slices.Sorted(maps.Keys(h.pending))).Draw(t, "which")
		}
		for range rapid.IntRange(1, 80).Draw(t, "steps") {
			switch rapid.SampledFrom([]string{"write", "write", "write", "arrive", "arrive", "check", "check", "switch", "restart", "other", "away"}).Draw(t, "step") {
			case "write":
				h.write(rapid.SampledFrom([]string{"stored", "stored", "stored", "stored", "stored", "lost", "kept"}).Draw(t, "fate"))
			case "arrive":
				if len(h.pending) > 0 {
					h.arrive(pick())
				}
			case "check":
				h.now = h.now.Add(time.Duration(rapid.IntRange(0, 4000).Draw(t, "ms")) * time.Millisecond)
				h.check()
			case "switch":
				// Somewhere in the segment that would come next, or where it would begin.
				at := h.chain.size.Start(h.next) + postgres.LSN(rapid.SampledFrom([]int{0, 8, 5 << 20}).Draw(t, "at"))
				if n := len(h.chain.history); n > 0 {
					at = max(at, h.chain.history[n-1].Switch)
				}
				h.chain.history = append(slices.Clone(h.chain.history), postgres.Ancestor{Timeline: h.chain.own, Switch: at, Reason: "test"})
				h.chain.own++
				if err := os.WriteFile(filepath.Join(dir, postgres.HistoryFileName(h.chain.own)), h.chain.history.Format(), 0o600); err != nil {
					t.Fatal(err)
				}
			case "restart":
				h.start()
			case "other":
				if len(h.pending) > 0 {
					name := pick()
					delete(h.pending, name)
					_ = os.Remove(filepath.Join(h.walDir, name)) // it need not be there
					h.stored[name] = "db2"
				}
			case "away":
				h.away = !h.away
			}
		}
		// In the end everything that is not lost arrives, and WAL goes on.
		h.away = false
		for range 200 {
			for _, name := range slices.Sorted(maps.Keys(h.pending)) {
				h.arrive(name)
			}
			if len(h.kept) == 0 {
				h.write("stored")
				h.arrive(h.chain.name(h.next - 1))
			} else {
				h.write("stored")
			}
			h.now = h.now.Add(time.Second)
			h.check()
		}
		for name := range h.lost {
			// After a start, a gap that an image was taken behind is taken for one that was told of.
			answered := h.starts > 1 && h.head.Images[len(h.head.Images)-1].StartLSN > postgres.SegmentName(name).Start(h.chain.size)
			if !h.told[name] && !answered {
				t.Errorf("%s is lost, and nobody was told", name)
			}
		}
	})
}

// While segments follow one another, nothing is asked of the repository but once.
func TestGaps_asksOnce(t *testing.T) {
	rapid.Check(t, func(rt *rapid.T) {
		h := newHistory(rt, t.TempDir())
		for range 100 {
			h.write("stored")
		}
		for _, name := range rapid.Permutation(slices.Sorted(maps.Keys(h.pending))).Draw(rt, "order") {
			h.arrive(name)
			h.now = h.now.Add(10 * time.Millisecond)
			h.check()
		}
		if h.lists > 2 { // a second one to learn that the cluster was not protected before
			rt.Errorf("listed %d times", h.lists)
		}
	})
}

func TestGaps_whatIsNone(t *testing.T) {
	size := postgres.SegmentSize(16 << 20)
	name := func(t postgres.Timeline, n uint64) string { return string(postgres.MakeSegmentName(t, n, size)) }
	for what, test := range map[string]struct {
		stored []string // before the runner's start
		head   *repository.Head
		here   []string // stored by the runner
		alarm  bool
	}{
		"protected for the first time":         {nil, imagesAt(size, 100), []string{name(1, 500)}, false},
		"a gap while nobody looked":            {[]string{name(1, 97), name(1, 98)}, imagesAt(size, 90), []string{name(1, 105)}, true},
		"the same, with no image before it":    {[]string{name(1, 97), name(1, 98)}, imagesAt(size, 105), []string{name(1, 105)}, false},
		"the same, with no image at all":       {[]string{name(1, 97), name(1, 98)}, &repository.Head{}, []string{name(1, 105)}, false},
		"the same, with an image being taken":  {[]string{name(1, 97)}, &repository.Head{Sessions: []repository.OpenSession{{Kind: repository.SessionImage}}}, []string{name(1, 105)}, true},
		"retention has removed what is absent": {[]string{name(1, 20)}, withFloor(imagesAt(size, 20), 1, size.Start(105)), []string{name(1, 105)}, false},
		"an unknown timeline":                  {[]string{name(1, 97)}, imagesAt(size, 90), []string{name(7, 300)}, false},
		"told before": {[]string{name(1, 97), name(1, 99)}, &repository.Head{Images: append(imagesAt(size, 90).Images, imagesAt(size, 99).Images...)},
			[]string{name(1, 100)}, false},
		"not told before": {[]string{name(1, 97), name(1, 99)}, imagesAt(size, 90), []string{name(1, 100)}, true},
		"other files":     {[]string{name(1, 97), name(1, 98) + ".partial", "00000002.history"}, imagesAt(size, 90), []string{name(1, 98)}, false},
	} {
		t.Run(what, func(t *testing.T) {
			h := &history{walDir: t.TempDir(), stored: map[string]string{}, head: test.head, now: time.Unix(1e9, 0)}
			for _, n := range test.stored {
				h.stored[n] = "db1"
			}
			var alarms []gap
			w := &watcher{archive: h, walDir: h.walDir, size: size, host: "db1", alarm: func(g gap) { alarms = append(alarms, g) },
				held: func(postgres.Timeline, uint64, uint64) []uint64 { return nil }, ship: func(string) {}}
			for _, n := range test.here {
				h.stored[n] = "db1"
				w.note(postgres.SegmentName(n))
			}
			for range 100 {
				h.now = h.now.Add(time.Second)
				if _, err := w.check(t.Context(), h.now); err != nil {
					t.Fatal(err)
				}
			}
			if (len(alarms) > 0) != test.alarm {
				t.Errorf("got %+v, expected an alarm: %v", alarms, test.alarm)
			}
		})
	}
}

func imagesAt(size postgres.SegmentSize, number uint64) *repository.Head {
	return &repository.Head{Images: []repository.ImageInfo{{SID: 1, Timeline: 1, StartLSN: size.Start(number) + 40, StopLSN: size.Start(number) + 400}}}
}

func withFloor(h *repository.Head, t postgres.Timeline, floor postgres.LSN) *repository.Head {
	h.WALFloor = map[string]postgres.LSN{t.String(): floor}
	return h
}

// Another server's runner may be slow; it is given time as long as it gets on.
func TestGaps_anotherServer(t *testing.T) {
	size := postgres.SegmentSize(16 << 20)
	name := func(n uint64) string { return string(postgres.MakeSegmentName(1, n, size)) }
	h := &history{walDir: t.TempDir(), stored: map[string]string{name(50): "db2", name(60): "db1"}, head: imagesAt(size, 40), now: time.Unix(1e9, 0)}
	var alarms []gap
	w := &watcher{archive: h, walDir: h.walDir, size: size, host: "db1", alarm: func(g gap) { alarms = append(alarms, g) },
		held: func(postgres.Timeline, uint64, uint64) []uint64 { return nil }, ship: func(string) {}}
	w.note(postgres.SegmentName(name(60)))
	for n := uint64(51); n <= 55; n++ {
		for range 50 {
			h.now = h.now.Add(time.Second)
			if _, err := w.check(t.Context(), h.now); err != nil {
				t.Fatal(err)
			}
		}
		h.stored[name(n)] = "db2"
	}
	if len(alarms) > 0 {
		t.Fatalf("got %+v while the other server was at it", alarms)
	}
	for range 70 {
		h.now = h.now.Add(time.Second)
		if _, err := w.check(t.Context(), h.now); err != nil {
			t.Fatal(err)
		}
	}
	if len(alarms) != 1 || alarms[0].span != (span{56, 59}) {
		t.Errorf("got %+v, expected one alarm for 56 to 59", alarms)
	}
}

// The whole way: PostgreSQL has lost a segment under us, and another still lies in pg_wal.
func TestShip_gap(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	gaps := make(chan control.WALGap, 10)
	s, stop := w.shipper(func(o *Options) { o.Gap = func(g control.WALGap) { gaps <- g } })
	putImage(t, w)
	for n := uint64(1); n <= 7; n++ {
		name := segment(1, n)
		switch n {
		case 3: // lost
		case 5:
			w.write(filepath.Join(w.data, "pg_wal", name), content(name, n)) // nobody asks for it
		default:
			if _, err := s.Ship(t.Context(), w.finish(name, content(name, n))); err != nil {
				t.Fatal(err)
			}
		}
	}
	g := <-gaps
	if g.StartLSN != testSize.Start(3).String() || g.EndLSN != testSize.Start(4).String() || g.Segments != 1 || g.Timeline != 1 {
		t.Errorf("got %+v, expected segment 3", g)
	}
	eventually(t, "what still lies in pg_wal is stored", func() bool {
		_, err := w.series.StatWAL(t.Context(), segment(1, 5))
		return err == nil
	})
	if st := s.Status(); len(st.Gaps) != 1 || st.GapCount != 1 {
		t.Errorf("status has %+v, expected one gap", st.Gaps)
	}
	if err := s.EndSession(t.Context()); err != nil {
		t.Fatal(err)
	}
	for r, err := range w.series.Sessions(t.Context(), time.Time{}) {
		if err != nil {
			t.Fatal(err)
		}
		if r.Result != "error" || r.Gaps != 1 || r.Error == "" {
			t.Errorf("got %+v, expected an error because of the gap", r)
		}
	}
	stop()
	if len(gaps) > 0 {
		t.Errorf("another alarm: %+v", <-gaps)
	}
}

// putImage opens the session of an image: what is lost from here on matters.
func putImage(t *testing.T, w *world) {
	t.Helper()
	if _, err := w.series.Begin(t.Context(), repository.OpenSession{Kind: repository.SessionImage, Host: "db1", MachineID: "m", StartedAt: time.Now()}); err != nil {
		t.Fatal(err)
	}
}
