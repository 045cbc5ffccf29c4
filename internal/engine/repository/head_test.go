package repository

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"filippo.io/age"

	"github.com/pgark/terraform-provider-pgark/internal/engine/objectstore"
	"github.com/pgark/terraform-provider-pgark/internal/engine/postgres"
)

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func TestCreate(t *testing.T) {
	ctx := t.Context()
	one, err := age.GenerateX25519Identity()
	must(t, err)
	two, err := age.GenerateHybridIdentity()
	must(t, err)
	a, pq := one.Recipient().String(), two.Recipient().String()

	t.Run("again", func(t *testing.T) {
		store := directory(t)
		if _, err := Open(ctx, store); !errors.Is(err, ErrNoRepository) {
			t.Errorf("before: %v", err)
		}
		r, created, err := Create(ctx, store, []string{a})
		if err != nil || !created || !r.Description().Capabilities.CreateIfAbsent || len(r.Description().ID) != 32 {
			t.Fatalf("%+v, %v, %v", r, created, err)
		}
		again, created, err := Create(ctx, store, []string{" " + a + "\n", a})
		if err != nil || created || again.Description().ID != r.Description().ID {
			t.Errorf("again: %v, %v", created, err)
		}
		_, _, err = Create(ctx, store, nil)
		mismatch, ok := errors.AsType[*MismatchError](err)
		if !ok || !slices.Equal(mismatch.Found, []string{a}) {
			t.Errorf("without recipients: %v", err)
		}
		if want := fmt.Sprintf("repository %s: found one that is encrypted to %s, expected one that is not encrypted", store.URL(), a); err.Error() != want {
			t.Errorf("got %q, want %q", err, want)
		}
	})
	t.Run("many at once", func(t *testing.T) {
		store := directory(t)
		var mu sync.Mutex // guards ids and winners
		ids, winners := map[string]bool{}, 0
		var all sync.WaitGroup
		for range 8 {
			all.Go(func() {
				r, created, err := Create(ctx, store, nil)
				if err != nil {
					t.Error(err)
					return
				}
				mu.Lock()
				defer mu.Unlock()
				ids[r.Description().ID] = true
				if created {
					winners++
				}
			})
		}
		all.Wait()
		if len(ids) != 1 || winners != 1 {
			t.Errorf("%d repositories, created %d times", len(ids), winners)
		}
	})
	t.Run("bad recipients", func(t *testing.T) {
		store := directory(t)
		for _, bad := range [][]string{{"age1"}, {one.String()}, {""}, {a + "\n" + a}, {a, pq}} {
			_, _, err := Create(ctx, store, bad)
			if err == nil {
				t.Errorf("%q: created", bad)
			} else if strings.Contains(err.Error(), one.String()) {
				t.Errorf("a secret in an error: %v", err)
			}
		}
		if _, err := Open(ctx, store); !errors.Is(err, ErrNoRepository) {
			t.Errorf("something was created: %v", err)
		}
	})
	t.Run("post-quantum recipients", func(t *testing.T) {
		s := newSeries(t, directory(t), []string{pq}, []age.Identity{two})
		_, _, err := s.PutWAL(ctx, WALInfo{Name: "00000002.history", Size: 1}, strings.NewReader("x"))
		must(t, err)
		if info, err := s.StatWAL(ctx, "00000002.history"); err != nil || info.Size != 1 {
			t.Errorf("%+v, %v", info, err)
		}
		var got bytes.Buffer
		if _, err := s.GetWAL(ctx, "00000002.history", &got); err != nil || got.String() != "x" {
			t.Errorf("%q, %v", got.String(), err)
		}
	})
}

func TestClaimJob(t *testing.T) {
	ctx := t.Context()
	r, _, err := Create(ctx, directory(t), nil)
	must(t, err)
	if _, err := r.JobOwner(ctx, "orders"); !errors.Is(err, objectstore.ErrNotExist) {
		t.Errorf("nobody's: %v", err)
	}
	db1, db2 := Owner{MachineID: "m1", Host: "db1", ClaimedAt: time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)}, Owner{MachineID: "m2", Host: "db2"}
	for range 2 {
		got, err := r.ClaimJob(ctx, "orders", db1, "")
		if err != nil || got.Number != 1 || got.MachineID != "m1" {
			t.Fatalf("%+v, %v", got, err)
		}
	}
	_, err = r.ClaimJob(ctx, "orders", db2, "")
	if owned, ok := errors.AsType[*OwnedError](err); !ok || owned.Owner.Host != "db1" || owned.Claimant.Host != "db2" {
		t.Errorf("a second machine: %v", err)
	}
	if want := "job name orders in " + r.Store().URL() + " belongs to db1 (machine m1) since 2026-01-02 03:04:05 UTC; db2 (machine m2) cannot use it"; err.Error() != want {
		t.Errorf("got %q, want %q", err, want)
	}
	if _, err = r.ClaimJob(ctx, "orders", db2, "m3"); err == nil {
		t.Error("taken over from whom it does not belong to")
	}
	if got, err := r.ClaimJob(ctx, "orders", db2, "m1"); err != nil || got.Number != 2 {
		t.Errorf("handed over: %+v, %v", got, err)
	}
	if _, err = r.ClaimJob(ctx, "orders", db1, ""); err == nil {
		t.Error("the former owner still is")
	}

	// Of many machines one gets a free name.
	var winners sync.Map
	var all sync.WaitGroup
	for n := range 8 {
		all.Go(func() {
			if _, err := r.ClaimJob(ctx, "free", Owner{MachineID: fmt.Sprint(n)}, ""); err == nil {
				winners.Store(n, true)
			} else if _, ok := errors.AsType[*OwnedError](err); !ok {
				t.Error(err)
			}
		})
	}
	all.Wait()
	n := 0
	winners.Range(func(any, any) bool { n++; return true })
	if n != 1 {
		t.Errorf("%d machines own one name", n)
	}
}

func TestSeriesList(t *testing.T) {
	ctx := t.Context()
	store := directory(t)
	r, _, err := Create(ctx, store, nil)
	must(t, err)
	_, err = r.ClaimJob(ctx, "orders", Owner{MachineID: "m"}, "")
	must(t, err)
	want := []SeriesID{{"orders", "13-a", 5}, {"orders", "15-main", 5}, {"orders", "15-main", 7}, {"users", "15-main", 9}}
	for _, id := range want {
		_, err := r.Series(id).Begin(ctx, OpenSession{Kind: SessionImage})
		must(t, err)
	}
	must(t, store.Create(ctx, "else/where/file/x", bytes.NewReader(nil), 0))
	for _, c := range []struct {
		job, instance string
		want          []SeriesID
	}{{"", "", want}, {"orders", "", want[:3]}, {"orders", "15-main", want[1:3]}, {"", "15-main", want[1:]}, {"none", "", nil}} {
		if got, err := r.SeriesList(ctx, c.job, c.instance); err != nil || !slices.Equal(got, c.want) {
			t.Errorf("%q %q: got %v, %v; want %v", c.job, c.instance, got, err, c.want)
		}
	}
	if _, err := r.Series(SeriesID{"a/b", "c", 1}).Head(ctx); err == nil {
		t.Error("a series with a slash in its name")
	}
}

// live gives a head with live images of the given numbers, which start at their number.
func live(sids ...SID) *Head {
	h := (&Head{NextSID: 100}).next()
	for _, s := range sids {
		h.Images = append(h.Images, ImageInfo{SID: s, Timeline: 1, StartLSN: postgres.LSN(s), StopLSN: postgres.LSN(s)})
	}
	return h
}

func TestTransitions_refuse(t *testing.T) {
	open, err := live(1, 2).begin(testSeries, OpenSession{Kind: SessionImage, Parent: 2})
	must(t, err)
	reading, err := live(5, 9).begin(testSeries, OpenSession{Kind: SessionRestore, Parent: 5})
	must(t, err)
	reading = reading.expire(5)
	image := ImageInfo{SID: 100, Timeline: 1, StartLSN: 50, StopLSN: 60}
	with := func(change func(*ImageInfo)) ImageInfo { i := image; change(&i); return i }
	floor, err := open.expire(1, 2).raiseFloor(testSeries, 1, 51)
	must(t, err)

	for what, c := range map[string]struct {
		got  func() (*Head, error)
		want string
	}{
		"begin on what is not live":     {func() (*Head, error) { return live(1).begin(testSeries, OpenSession{Kind: SessionImage, Parent: 3}) }, "has no image 0000000000000003"},
		"begin of no kind":              {func() (*Head, error) { return live().begin(testSeries, OpenSession{}) }, `found kind ""`},
		"begin a restore of nothing":    {func() (*Head, error) { return live().begin(testSeries, OpenSession{Kind: SessionRestore}) }, "names no image"},
		"commit without session":        {func() (*Head, error) { return live(1).commit(testSeries, image) }, "session is not open any more"},
		"commit of a reader":            {func() (*Head, error) { return reading.commit(testSeries, image) }, "found a restore session"},
		"commit with a foreign parent":  {func() (*Head, error) { return open.commit(testSeries, with(func(i *ImageInfo) { i.Parent = 1 })) }, "found parent 0000000000000001"},
		"commit that ends early":        {func() (*Head, error) { return open.commit(testSeries, with(func(i *ImageInfo) { i.StopLSN = 1 })) }, "from 0/32 to 0/1"},
		"commit below the floor":        {func() (*Head, error) { return floor.commit(testSeries, image) }, "starts at 0/32 on timeline 1, expected at least 0/33"},
		"floor above an expired reader": {func() (*Head, error) { return reading.raiseFloor(testSeries, 1, 6) }, "restore session 0000000000000064"},
	} {
		if h, err := c.got(); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: got %v, %v; want an error with %q", what, h, err, c.want)
		}
	}

	// What changes nothing makes no version.
	committed, err := open.commit(testSeries, image)
	must(t, err)
	for what, h := range map[string]*Head{
		"end an unknown session":  live(1).end(7),
		"expire an unknown image": live(1).expire(7),
	} {
		if h != nil {
			t.Errorf("%s: a version", what)
		}
	}
	if h, err := committed.commit(testSeries, image); h != nil || err != nil {
		t.Errorf("commit again: %v, %v", h, err)
	}
	if h, err := floor.raiseFloor(testSeries, 1, 40); h != nil || err != nil {
		t.Errorf("lower a floor: %v, %v", h, err)
	}
	if h, err := live(7).raiseFloor(testSeries, 2, 800); err != nil || h.Floor(2) != 800 || h.Floor(1) != 0 {
		t.Errorf("another timeline: %v, %v", h, err)
	}
}

// TestStep_lostReply: the store takes the step, and its reply is lost. The step is made once.
func TestStep_lostReply(t *testing.T) {
	ctx := t.Context()
	store := newMemoryStore()
	r, err := newRepository(store, Description{Format: Format}, nil)
	must(t, err)
	s := r.Series(testSeries)
	lose := func(n int) {
		store.gate = func(_ context.Context, op, _ string, after bool) error {
			if op == "create" && after && n > 0 {
				n--
				return errLost
			}
			return nil
		}
	}
	lose(1)
	sid, err := s.Begin(ctx, OpenSession{Kind: SessionImage})
	if err != nil || sid != 1 {
		t.Fatalf("%v, %v", sid, err)
	}
	lose(1)
	must(t, s.Commit(ctx, ImageInfo{SID: sid, Timeline: 1, ManifestDigest: "m", RefsDigest: "r"}))
	h, err := s.Head(ctx)
	if err != nil || h.Version != 2 || len(h.Images) != 1 || len(h.Sessions) != 0 {
		t.Errorf("%+v, %v", h, err)
	}

	// A step whose request was lost before its effect is not made, and says so.
	store.gate = func(_ context.Context, op, _ string, after bool) error {
		if op == "create" && !after {
			return errLost
		}
		return nil
	}
	if err := s.Expire(ctx, sid); !objectstore.IsTransient(err) {
		t.Errorf("got %v", err)
	}
	store.gate = nil
	if h, err = s.Head(ctx); err != nil || len(h.Images) != 1 {
		t.Errorf("%+v, %v", h, err)
	}
}

// TestBegin_manyAtOnce: every session gets a number of its own.
func TestBegin_manyAtOnce(t *testing.T) {
	ctx := t.Context()
	store := directory(t)
	newSeries(t, store, nil, nil)
	var mu sync.Mutex // guards seen
	seen := map[SID]bool{}
	var all sync.WaitGroup
	for range 4 {
		s := newSeries(t, store, nil, nil)
		all.Go(func() {
			for range 5 {
				sid, err := s.Begin(ctx, OpenSession{Kind: SessionImage})
				if err != nil {
					t.Error(err)
					return
				}
				mu.Lock()
				seen[sid] = true
				mu.Unlock()
			}
		})
	}
	all.Wait()
	if len(seen) != 20 {
		t.Errorf("%d sessions, expected 20", len(seen))
	}
	s := newSeries(t, store, nil, nil)
	evicted, err := s.Evict(ctx, func(o OpenSession) bool { return o.SID%2 == 0 })
	if err != nil || len(evicted) != 10 {
		t.Errorf("evicted %v, %v", evicted, err)
	}
	if h, err := s.Head(ctx); err != nil || len(h.Sessions) != 10 || h.NextSID != 21 || h.Version != 21 {
		t.Errorf("%+v, %v", h, err)
	}
}

// TestHead_ofALongLog finds the newest of many versions in a few requests.
func TestHead_ofALongLog(t *testing.T) {
	ctx := t.Context()
	for _, versions := range []uint64{1, 2, 999, 1000, 1001, 1999, 2000, 2001, 17345} {
		store := newMemoryStore()
		r, err := newRepository(store, Description{Format: Format}, nil)
		must(t, err)
		for v := range versions {
			store.objects[testSeries.headKey(v+1)] = nil
		}
		key := testSeries.headKey(versions)
		store.objects[key], _, err = encodeDocument(key, headDocument{Format: Format, Head: &Head{Version: versions, NextSID: 1}})
		must(t, err)
		requests := 0
		store.gate = func(context.Context, string, string, bool) error { requests++; return nil }
		s := r.Series(testSeries)
		if h, err := s.Head(ctx); err != nil || h.Version != versions {
			t.Fatalf("%d versions: %+v, %v", versions, h, err)
		}
		if requests > 25 {
			t.Errorf("%d versions took %d requests", versions, requests)
		}
		requests = 0
		if h, err := s.Head(ctx); err != nil || h.Version != versions || requests != 1 {
			t.Errorf("%d versions, again: %+v, %v, %d requests", versions, h, err, requests)
		}
	}
}

// TestHistory_detectsAnotherPast: a head that does not name its predecessor is found out.
func TestHistory_detectsAnotherPast(t *testing.T) {
	ctx := t.Context()
	store := newMemoryStore()
	r, err := newRepository(store, Description{Format: Format}, nil)
	must(t, err)
	s := r.Series(testSeries)
	for range 3 {
		_, err := s.Begin(ctx, OpenSession{Kind: SessionImage})
		must(t, err)
	}
	h, err := s.readHead(ctx, 2)
	must(t, err)
	h.Change.Writer = "somebody else"
	key := testSeries.headKey(2)
	store.objects[key], _, err = encodeDocument(key, headDocument{Format: Format, Head: h})
	must(t, err)
	var found error
	for _, err := range r.Series(testSeries).History(ctx) {
		found = err
	}
	if _, ok := errors.AsType[*CorruptError](found); !ok {
		t.Errorf("got %v", found)
	}
}

// TestCollect_refusesWithoutRefs: if the refs of a live image are lost, nothing is deleted.
func TestCollect_refusesWithoutRefs(t *testing.T) {
	store := newMemoryStore()
	g := makeGolden(t, store, nil, nil)
	delete(store.objects, g.s.id.refsKey(g.second))
	before := len(store.objects)
	if done, err := g.s.Collect(t.Context(), false); err == nil || done.Objects != 0 || len(store.objects) != before {
		t.Errorf("collected %+v, %v", done, err)
	}
	// What is not ours stays.
	store.objects[g.s.id.refsKey(g.second)] = store.original[g.s.id.refsKey(g.second)]
	store.objects[g.s.id.imagePrefix()+"notes.txt"] = []byte("x")
	done, err := g.s.Collect(t.Context(), false)
	if err != nil || done.Objects != 2 { // manifest and refs of the first image; its pack holds pages of the second
		t.Errorf("collected %+v, %v", done, err)
	}
	if _, ok := store.objects[g.s.id.imagePrefix()+"notes.txt"]; !ok {
		t.Error("what is not ours is gone")
	}
}

func TestSessions(t *testing.T) {
	ctx := t.Context()
	s := newSeries(t, directory(t), nil, nil)
	start := time.Date(2026, 11, 22, 1, 2, 3, 4000, time.UTC)
	for n := range 3 {
		must(t, s.PutSession(ctx, SessionRecord{Kind: "image", Result: "success", StartedAt: start.Add(time.Duration(n) * time.Minute), SID: SID(n + 1)}))
	}
	must(t, s.PutSession(ctx, SessionRecord{ID: "mine", StartedAt: start.In(time.FixedZone("", 3600))}))
	list := func(after time.Time) (got []SID) {
		for r, err := range s.Sessions(ctx, after) {
			must(t, err)
			if !strings.HasPrefix(r.ID, formatSessionTime(r.StartedAt)+"-") {
				t.Errorf("id %q", r.ID)
			}
			got = append(got, r.SID)
		}
		return got
	}
	if got := list(time.Time{}); len(got) != 4 || got[2] != 2 || got[3] != 3 {
		t.Errorf("all: %v", got)
	}
	if got := list(start); !slices.Equal(got, []SID{2, 3}) {
		t.Errorf("after the first: %v", got)
	}
	if err := s.PutSession(ctx, SessionRecord{Kind: "wal"}); err == nil {
		t.Error("a record without start was stored")
	}
}

// TestDescription_hasOneFormat: the member stands once in repository.json, like in every document.
func TestDescription_hasOneFormat(t *testing.T) {
	store := newMemoryStore()
	makeGolden(t, store, nil, nil)
	var v map[string]any
	must(t, json.Unmarshal(store.objects[descriptionKey], &v))
	if v["format"] != float64(1) || bytes.Count(store.objects[descriptionKey], []byte(`"format"`)) != 1 {
		t.Errorf("%s", store.objects[descriptionKey])
	}
}

// A floor may rise above the start of a live image, which then keeps the segments that make it consistent.
func TestHead_imagesBelowTheFloor(t *testing.T) {
	const size = postgres.SegmentSize(1 << 20)
	h := &Head{NextSID: 9, Images: []ImageInfo{{SID: 7, Timeline: 1, StartLSN: size.Start(3) + 5, StopLSN: size.Start(6)}}}
	raised, err := h.raiseFloor(testSeries, 1, size.Start(20))
	if err != nil || raised.Floor(1) != size.Start(20) {
		t.Fatalf("raise the floor: %v, %v", raised, err)
	}
	for n := range uint64(12) {
		if got, want := raised.needsWAL(1, n, size) != "", n >= 3 && n <= 5; got != want {
			t.Errorf("segment %d: needed %v, expected %v", n, got, want)
		}
	}
	if raised.needsWAL(2, 4, size) != "" {
		t.Error("the image needs WAL of another timeline")
	}
	// A restore that began from it keeps it in need after it has expired.
	reading, err := raised.begin(testSeries, OpenSession{Kind: SessionRestore, Parent: 7})
	if err != nil {
		t.Fatal(err)
	}
	expired := reading.expire(7)
	if expired.needsWAL(1, 2, size) != "" || expired.needsWAL(1, 3, size) == "" {
		t.Error("expected the restore to need WAL from its image's start on")
	}
}
