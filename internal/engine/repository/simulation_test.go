package repository

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"flag"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/pgark/terraform-provider-pgark/internal/engine/objectstore"
	"github.com/pgark/terraform-provider-pgark/internal/engine/postgres"
)

var (
	simulationSeed  = flag.Uint64("simulation.seed", 1, "seed of the first simulation")
	simulationRuns  = flag.Int("simulation.runs", 4, "how many simulations, each with the next seed")
	simulationSteps = flag.Int("simulation.steps", 1500, "store operations in a simulation")
)

// simulation runs several machines against one store. Every store operation waits until the simulation lets it go on,
// and which one goes on, which fails, which fails after its effect, and who sleeps meanwhile, comes from the seed. It
// runs in a synctest bubble: between two operations every goroutine is blocked, so nothing else decides the order.
type simulation struct {
	t     *testing.T
	rnd   *rand.Rand
	store *memoryStore

	mu      sync.Mutex // guards all below
	waiting []*operation
	truth   map[SID]model // what each image that may be live restores to
	segment uint64
	counts  map[string]int
}

// operation is a store operation that waits.
type operation struct {
	actor, op, key string
	after          bool
	reply          chan error
}

type actorKey struct{}

// errLost is what a connection that breaks looks like; objectstore.IsTransient says so.
var errLost = fmt.Errorf("simulated: %w", syscall.ECONNRESET)

func (s *simulation) gate(ctx context.Context, op, key string, after bool) error {
	actor, ok := ctx.Value(actorKey{}).(string)
	if !ok {
		return nil // the simulation itself looks
	}
	o := &operation{actor: actor, op: op, key: key, after: after, reply: make(chan error, 1)}
	s.mu.Lock()
	s.waiting = append(s.waiting, o)
	s.mu.Unlock()
	select {
	case err := <-o.reply:
		return err
	case <-ctx.Done():
		return ctx.Err()
	}
}

// series opens the repository for an actor, as a process of its own would.
func (s *simulation) series(actor string, seed uint64) *Series {
	r, err := Open(context.Background(), s.store)
	if err != nil {
		s.t.Fatal(err)
	}
	rnd := rand.New(rand.NewPCG(seed, 99))
	r.host = actor
	r.jitter = func(limit time.Duration) time.Duration { return time.Duration(rnd.Int64N(int64(limit))) }
	return r.Series(testSeries)
}

func (s *simulation) count(what string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.counts[what]++
}

// allowed tells whether an actor may meet this error: faults, and refusals that the protocol makes on purpose.
func allowed(ctx context.Context, err error) bool {
	if err == nil || ctx.Err() != nil || objectstore.IsTransient(err) || errors.Is(err, ErrSessionGone) {
		return true
	}
	_, notLive := errors.AsType[*NotLiveError](err)
	_, below := errors.AsType[*BelowFloorError](err)
	_, floor := errors.AsType[*FloorError](err)
	return notLive || below || floor
}

// writer backs up a data directory that changes, again and again. On an error it sometimes crashes, leaving its session
// open, sometimes forgets what it kept locally, sometimes aborts.
func (s *simulation) writer(ctx context.Context, name string, seed uint64) {
	rnd := rand.New(rand.NewPCG(seed, 2))
	g := &guest{
		s: s.series(name, seed), options: WriterOptions{PackSize: 48 << 10},
		files: model{"base/1": compressible(seed, 12*postgres.PageSize), "PG_VERSION": []byte("15\n")},
		segment: func() uint64 {
			s.mu.Lock()
			defer s.mu.Unlock()
			s.segment++
			return s.segment
		},
		finish: func(sid SID, files model) {
			s.mu.Lock()
			defer s.mu.Unlock()
			s.truth[sid] = files
		},
	}
	before := model{}
	for ctx.Err() == nil {
		sid, err := g.backUp(ctx, rnd, before)
		if err == nil {
			s.count("committed")
			before, g.files = g.files, g.files.change(rnd)
			continue
		}
		collected := errors.Is(err, objectstore.ErrNotExist) && s.evicted(sid) // its parent, which nothing pinned any more
		if !allowed(ctx, err) && !collected {
			s.t.Errorf("%s: image %s: %v", name, sid, err)
			return
		}
		s.count("not committed")
		if _, ok := errors.AsType[*NotLiveError](err); ok || rnd.IntN(3) == 0 {
			g.parent, g.maps, g.refs = 0, nil, nil
		}
		if sid != 0 && rnd.IntN(2) == 0 {
			if err := g.s.Abort(ctx, sid); !allowed(ctx, err) {
				s.t.Errorf("%s: abort: %v", name, err)
			}
		}
	}
}

// evicted looks past the faults whether a session has ended.
func (s *simulation) evicted(sid SID) bool {
	h, err := s.series("look", 0).Head(context.Background())
	return err == nil && h.Session(sid) == nil
}

// reader restores images that it has pinned, and compares.
func (s *simulation) reader(ctx context.Context, name string, seed uint64) {
	rnd := rand.New(rand.NewPCG(seed, 3))
	series := s.series(name, seed)
	for ctx.Err() == nil {
		h, err := series.Head(ctx)
		if err != nil || len(h.Images) == 0 {
			if err == nil {
				_ = sleep(ctx, 50*time.Millisecond) // ends with ctx
			}
			continue
		}
		image := h.Images[rnd.IntN(len(h.Images))].SID
		sid, err := series.Begin(ctx, OpenSession{Kind: SessionRestore, Parent: image})
		if err != nil {
			if !allowed(ctx, err) {
				s.t.Errorf("%s: begin: %v", name, err)
			}
			continue
		}
		got, err := restore(ctx, series, image)
		if err == nil {
			s.mu.Lock()
			want := s.truth[image]
			s.mu.Unlock()
			err = diff(want, got)
			s.count("restored")
		}
		if !allowed(ctx, err) && !s.evicted(sid) {
			s.t.Errorf("%s: restore image %s: %v", name, image, err)
			return
		}
		if err := series.Abort(ctx, sid); !allowed(ctx, err) {
			s.t.Errorf("%s: abort: %v", name, err)
		}
	}
}

// janitor expires images, evicts sessions whether or not they are alive, and lets go of WAL.
func (s *simulation) janitor(ctx context.Context, name string, seed uint64) {
	rnd := rand.New(rand.NewPCG(seed, 4))
	series := s.series(name, seed)
	for ctx.Err() == nil {
		var err error
		switch rnd.IntN(4) {
		case 0:
			_, err = series.Evict(ctx, func(OpenSession) bool { return rnd.IntN(4) > 0 })
		case 1, 2:
			var h *Head
			if h, err = series.Head(ctx); err == nil && len(h.Images) > 1 {
				err = series.Expire(ctx, h.Images[rnd.IntN(len(h.Images))].SID)
				s.count("expired")
			}
		case 3:
			var h *Head
			if h, err = series.Head(ctx); err == nil && len(h.Images) > 0 {
				err = s.dropWAL(ctx, series, h.Images[0].StartLSN)
			}
		}
		if !allowed(ctx, err) {
			s.t.Errorf("%s: %v", name, err)
		}
		_ = sleep(ctx, time.Duration(rnd.IntN(40))*time.Millisecond) // ends with ctx
	}
}

func (s *simulation) dropWAL(ctx context.Context, series *Series, floor postgres.LSN) error {
	if err := series.RaiseWALFloor(ctx, 1, floor); err != nil {
		return err
	}
	var names []string
	for e, err := range series.ListWAL(ctx, 1, "") {
		if err != nil {
			return err
		}
		if postgres.SegmentName(e.Name).End(testSegment) <= floor {
			names = append(names, e.Name)
		}
	}
	s.count("WAL dropped")
	return series.DeleteWAL(ctx, testSegment, names...)
}

// collector collects garbage.
func (s *simulation) collector(ctx context.Context, name string, seed uint64) {
	series := s.series(name, seed)
	for ctx.Err() == nil {
		done, err := series.Collect(ctx, false)
		if !allowed(ctx, err) {
			s.t.Errorf("%s: %v", name, err)
		}
		if done.Objects > 0 {
			s.count("collected")
		}
		_ = sleep(ctx, 30*time.Millisecond) // ends with ctx
	}
}

// step lets one waiting operation go on. It returns false where none waits.
func (s *simulation) step(asleep map[string]int) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	awake := slices.DeleteFunc(slices.Clone(s.waiting), func(o *operation) bool { return asleep[o.actor] > 0 })
	for a := range asleep {
		asleep[a]--
	}
	if len(awake) == 0 {
		return false
	}
	slices.SortStableFunc(awake, func(a, b *operation) int {
		return cmp.Or(cmp.Compare(a.actor, b.actor), cmp.Compare(a.op, b.op), cmp.Compare(a.key, b.key))
	})
	o := awake[s.rnd.IntN(len(awake))]
	s.waiting = slices.DeleteFunc(s.waiting, func(w *operation) bool { return w == o })
	var err error
	switch {
	case s.rnd.IntN(40) == 0:
		err = errLost
		s.counts["fault"]++
	case s.rnd.IntN(60) == 0:
		// A machine that is paused for long, between the effect of one operation and the next.
		asleep[o.actor] = s.rnd.IntN(200)
	}
	o.reply <- err
	return true
}

// check looks past the faults: every live image has all that it needs and, if bytewise, restores to what it was.
func (s *simulation) check(bytewise bool) {
	ctx := context.Background()
	series := s.series("check", 0)
	h, err := series.Head(ctx)
	if err != nil {
		s.t.Fatal(err)
	}
	for _, image := range h.Images {
		refs, err := series.readRefs(ctx, image.SID)
		if err != nil {
			s.t.Fatalf("live image %s: %v", image.SID, err)
		}
		for _, o := range refs.Objects {
			if got, err := s.store.Stat(ctx, series.id.objectKey(o.Object)); err != nil || got.Size != o.Size {
				s.t.Fatalf("live image %s: %s: %d bytes, %v", image.SID, o.Object, got.Size, err)
			}
		}
		if _, err := series.GetWAL(ctx, string(postgres.SegmentAt(1, image.StartLSN, testSegment)), &bytes.Buffer{}); err != nil {
			s.t.Fatalf("live image %s: its WAL: %v", image.SID, err)
		}
		if !bytewise {
			continue
		}
		got, err := restore(ctx, series, image.SID)
		if err == nil {
			err = diff(s.truth[image.SID], got)
		}
		if err != nil {
			s.t.Fatalf("live image %s: %v", image.SID, err)
		}
	}
}

// TestSimulation_everyLiveImageRestores: writers, readers, retention and collections at once, over a store that loses
// requests and replies, on machines that fall asleep.
func TestSimulation_everyLiveImageRestores(t *testing.T) {
	// The compressor makes its channels at first use, which must not be inside of a bubble.
	b, c := compress(nil, make([]byte, 1000), Thorough)
	if _, err := decompress(make([]byte, 0, 1000), b, c, 1000); err != nil {
		t.Fatal(err)
	}
	total := map[string]int{}
	for n := range *simulationRuns {
		seed := *simulationSeed + uint64(n)
		synctest.Test(t, func(t *testing.T) {
			s := &simulation{t: t, rnd: rand.New(rand.NewPCG(seed, 1)), store: newMemoryStore(), truth: map[SID]model{}, counts: map[string]int{}}
			defer func() {
				if t.Failed() {
					t.Logf("run again with: -run %s -simulation.seed=%d -simulation.runs=1", t.Name(), seed)
				}
			}()
			if _, _, err := Create(context.Background(), s.store, nil); err != nil {
				t.Fatal(err)
			}
			s.store.gate = s.gate
			ctx, cancel := context.WithCancel(context.Background())
			var actors sync.WaitGroup
			for i, run := range []func(context.Context, string, uint64){s.writer, s.writer, s.writer, s.reader, s.janitor, s.collector, s.collector} {
				name := fmt.Sprintf("actor%d", i)
				actors.Go(func() { run(context.WithValue(ctx, actorKey{}, name), name, seed*100+uint64(i)) })
			}
			asleep := map[string]int{}
			for step := 0; step < *simulationSteps && !t.Failed(); {
				synctest.Wait()
				if !s.step(asleep) || s.rnd.IntN(10) == 0 {
					time.Sleep(time.Duration(1+s.rnd.IntN(20)) * time.Millisecond)
				} else {
					step++
				}
				if step%50 == 0 {
					synctest.Wait()
					s.check(step%500 == 0)
				}
			}
			cancel()
			actors.Wait()
			s.check(true)
			for k, v := range s.counts {
				total[k] += v
			}
		})
		if t.Failed() {
			return
		}
	}
	t.Logf("%v", total)
	for _, what := range strings.Split("committed,not committed,restored,expired,collected,WAL dropped,fault", ",") {
		if total[what] == 0 && *simulationRuns >= 4 {
			t.Errorf("nothing was %s: the simulation does not try what it should", what)
		}
	}
}
