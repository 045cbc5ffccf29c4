package retention

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/pgark/terraform-provider-pgark/internal/engine/job"
	"github.com/pgark/terraform-provider-pgark/internal/engine/objectstore"
	"github.com/pgark/terraform-provider-pgark/internal/engine/postgres"
	"github.com/pgark/terraform-provider-pgark/internal/engine/repository"
)

// stored is a real series in a directory, whose images are a few bytes and whose segments of 1 MiB hold a few words.
type stored struct {
	*repository.Series
	t     *testing.T
	store objectstore.Store
}

func newStored(t *testing.T) *stored {
	t.Helper()
	store, err := objectstore.Open(t.Context(), objectstore.Location{URL: "file://" + t.TempDir()}, objectstore.Options{})
	if err != nil {
		t.Fatal(err)
	}
	repo, _, err := repository.Create(t.Context(), store, nil)
	if err != nil {
		t.Fatal(err)
	}
	return &stored{repo.Series(repository.SeriesID{Job: "orders", Instance: "15-main", SystemID: 7}), t, store}
}

func (s *stored) wal(name, content string, at time.Time) {
	s.t.Helper()
	if _, _, err := s.PutWAL(s.t.Context(), repository.WALInfo{Name: name, Size: int64(len(content)), StoredAt: at}, strings.NewReader(content)); err != nil {
		s.t.Fatal(err)
	}
}

func (s *stored) segments(t postgres.Timeline, first, last uint64, at time.Time) {
	s.t.Helper()
	for n := first; n <= last; n++ {
		name := string(postgres.MakeSegmentName(t, n, segment))
		s.wal(name, "content of "+name, at)
	}
}

// image stores an image with one small file of its own, from one segment's start into the next.
func (s *stored) image(parent repository.SID, t postgres.Timeline, completed time.Time, from uint64) repository.SID {
	s.t.Helper()
	ctx := s.t.Context()
	sid, err := s.Begin(ctx, repository.OpenSession{Kind: repository.SessionImage, Parent: parent, Host: "db1", StartedAt: completed})
	if err != nil {
		s.t.Fatal(err)
	}
	w, err := s.NewImageWriter(ctx, sid, parent, repository.WriterOptions{})
	if err != nil {
		s.t.Fatal(err)
	}
	defer w.Close()
	content := fmt.Appendf(nil, "content of image %s", sid)
	frame, err := w.WriteFrame(ctx, content)
	if err != nil {
		s.t.Fatal(err)
	}
	manifest, refs, err := w.Finish(ctx, &repository.Manifest{
		SID: sid, SystemID: 7, Volumes: []repository.Volume{{Role: "data", Path: "/data"}},
		Files: []repository.File{
			{Path: ".", Type: repository.Directory, Mode: 0o700},
			{Path: "PG_VERSION", Type: repository.RegularFile, Size: int64(len(content)), Inline: &repository.SegmentMap{
				BlockSize: 262144, Blocks: 1, Frames: []repository.FrameRef{frame}, Runs: []repository.Run{{Count: 1}},
			}},
		},
	})
	if err != nil {
		s.t.Fatal(err)
	}
	info := repository.ImageInfo{
		SID: sid, Kind: "full", Parent: parent, Timeline: t, StartedAt: completed.Add(-time.Minute), CompletedAt: completed,
		StartLSN: lsn(float64(from)), StopLSN: lsn(float64(from) + 1.5), SegmentSize: segment,
		ManifestDigest: manifest, RefsDigest: refs, StoredBytes: w.StoredBytes(),
	}
	if parent != 0 {
		info.Kind = "incremental"
	}
	if err := s.Commit(ctx, info); err != nil {
		s.t.Fatal(err)
	}
	return sid
}

// tail stores WAL of a timeline from one position to another.
func (s *stored) tail(t postgres.Timeline, from, to float64, at time.Time) repository.Tail {
	s.t.Helper()
	x := repository.Tail{Timeline: t, Start: lsn(from), End: lsn(to)}
	if _, err := s.PutTail(s.t.Context(), x, repository.WALInfo{StoredAt: at}, make([]byte, x.Size())); err != nil {
		s.t.Fatal(err)
	}
	return x
}

func (s *stored) tailsLeft(t postgres.Timeline) []repository.Tail {
	s.t.Helper()
	var all []repository.Tail
	for x, err := range s.ListTails(s.t.Context(), t, 0, ^postgres.LSN(0)) {
		if err != nil {
			s.t.Fatal(err)
		}
		x.StoredSize = 0
		all = append(all, x)
	}
	return all
}

// whole stores a segment of timeline 1 that is as long as one.
func (s *stored) whole(n uint64, at time.Time) {
	s.t.Helper()
	s.wal(string(postgres.MakeSegmentName(1, n, segment)), strings.Repeat("w", segment), at)
}

func (s *stored) names(t postgres.Timeline) []string {
	s.t.Helper()
	var names []string
	for e, err := range s.ListWAL(s.t.Context(), t, "") {
		if err != nil {
			s.t.Fatal(err)
		}
		names = append(names, e.Name)
	}
	return names
}

func (s *stored) objects(kind string) int {
	s.t.Helper()
	n := 0
	for _, err := range s.store.List(s.t.Context(), s.ID().String()+"/"+kind+"/", "") {
		if err != nil {
			s.t.Fatal(err)
		}
		n++
	}
	return n
}

// mustRestore opens the image and checks that all it needs to be consistent is there.
func (s *stored) mustRestore(sid repository.SID) {
	s.t.Helper()
	ctx := s.t.Context()
	head, err := s.Head(ctx)
	if err != nil {
		s.t.Fatal(err)
	}
	info := head.Image(sid)
	if info == nil {
		s.t.Fatalf("image %s is not live", sid)
	}
	image, err := s.OpenImage(ctx, sid)
	if err != nil {
		s.t.Fatal(err)
	}
	for _, f := range image.Manifest().Files {
		if f.Inline == nil {
			continue
		}
		err := image.ReadFrames(ctx, f.Inline.Frames, func(_ repository.FrameRef, raw []byte) error {
			if want := "content of image " + sid.String(); string(raw) != want {
				s.t.Errorf("image %s holds %q", sid, raw)
			}
			return nil
		})
		if err != nil {
			s.t.Error(err)
		}
	}
	names := s.names(info.Timeline)
	for n := postgres.SegmentSize(segment).Number(info.StartLSN); n <= postgres.SegmentSize(segment).NumberBefore(info.StopLSN); n++ {
		if name := string(postgres.MakeSegmentName(info.Timeline, n, segment)); !slices.Contains(names, name) {
			s.t.Errorf("image %s lives, but %s is gone", sid, name)
		}
	}
}

// fourImages is a series with an image every ten segments, the third a child of the second.
func fourImages(t *testing.T) (*stored, []repository.SID) {
	s := newStored(t)
	s.segments(1, 1, 45, daysAgo(0))
	var sids []repository.SID
	for n, days := range []float64{9, 6, 3, 0.1} {
		parent := repository.SID(0)
		if n == 2 {
			parent = sids[1]
		}
		sids = append(sids, s.image(parent, 1, daysAgo(days), uint64(10*n+2)))
	}
	return s, sids
}

func clock() time.Time { return now }

func TestRun(t *testing.T) {
	s, sids := fourImages(t)
	before := s.objects("image")
	r, err := Run(t.Context(), s.Series, Policy{Images: job.ImageRetention{KeepLast: 2}}, clock)
	if err != nil {
		t.Fatal(err)
	}
	if want := []string{sids[0].String(), sids[1].String()}; !slices.Equal(r.ExpiredImages, want) {
		t.Errorf("expired %q, expected %q", r.ExpiredImages, want)
	}
	if r.WALFiles != 21 || r.WALBytes == 0 || len(r.Held) != 0 {
		t.Errorf("result %+v, expected segments 1 to 21 gone", r)
	}
	if got := s.names(1); len(got) != 24 || got[0] != "000000010000000000000016" {
		t.Errorf("left: %d WAL files from %s", len(got), got[0])
	}
	// Each image has a pack, a manifest and refs; the third refers to nothing of its parent's.
	if left := s.objects("image"); r.GarbageObjects != before-left || left != 6 || r.GarbageBytes == 0 {
		t.Errorf("collected %d of %d objects, %d are left", r.GarbageObjects, before, left)
	}
	s.mustRestore(sids[2])
	s.mustRestore(sids[3])

	again, err := Run(t.Context(), s.Series, Policy{Images: job.ImageRetention{KeepLast: 2}}, clock)
	if err != nil || len(again.ExpiredImages) != 0 || again.WALFiles != 0 || again.GarbageObjects != 0 {
		t.Errorf("the second run removed %+v (%v)", again, err)
	}
}

func TestRun_emptySeries(t *testing.T) {
	s := newStored(t)
	if r, err := Run(t.Context(), s.Series, Policy{Images: job.ImageRetention{KeepLast: 1}}, clock); err != nil || r.WALFiles != 0 {
		t.Errorf("an empty series: %+v, %v", r, err)
	}
	s.segments(1, 1, 3, now)
	if r, err := Run(t.Context(), s.Series, Policy{Images: job.ImageRetention{KeepLast: 1}}, clock); err != nil || r.WALFiles != 0 {
		t.Errorf("a series without images: %+v, %v", r, err)
	}
}

// Whatever keep_days takes away, images stay consistent and the window stays whole.
func TestRun_walKeepDays(t *testing.T) {
	s, sids := fourImages(t)
	if _, err := Run(t.Context(), s.Series, Policy{WAL: &job.WALRetention{KeepDays: 5}}, clock); err != nil {
		t.Fatal(err)
	}
	for _, sid := range sids {
		s.mustRestore(sid)
	}
	names := s.names(1)
	if names[0] != "000000010000000000000002" || names[2] != "00000001000000000000000C" {
		t.Errorf("left: %q …, expected the first image's 2 and 3, and what follows the second", names[:4])
	}
	for n := uint64(12); n <= 45; n++ { // from the image before the window on
		if name := string(postgres.MakeSegmentName(1, n, segment)); !slices.Contains(names, name) {
			t.Errorf("%s is gone", name)
		}
	}
}

// Interrupted after any number of requests, the series holds what it must, and the next run finishes the job.
func TestRun_interrupted(t *testing.T) {
	for stop := 0; ; stop++ {
		s, sids := fourImages(t)
		ctx, cancel := context.WithCancel(t.Context())
		store := &countingStore{Store: s.store, left: stop, cancel: cancel}
		repo, err := repository.Open(t.Context(), store)
		if err != nil {
			t.Fatal(err)
		}
		store.armed = true
		policy := Policy{Images: job.ImageRetention{KeepLast: 2}}
		_, err = Run(ctx, repo.Series(s.ID()), policy, clock)
		cancel()
		if err != nil && !errors.Is(err, context.Canceled) {
			t.Fatalf("interrupted after %d requests: %v", stop, err)
		}
		s.mustRestore(sids[2])
		s.mustRestore(sids[3])
		if _, err := Run(t.Context(), s.Series, policy, clock); err != nil {
			t.Fatalf("run after one that was interrupted after %d requests: %v", stop, err)
		}
		if wal, objects := s.names(1), s.objects("image"); len(wal) != 24 || objects != 6 {
			t.Errorf("interrupted after %d requests and run again: %d WAL files and %d objects are left, expected 24 and 6", stop, len(wal), objects)
		}
		if err == nil {
			if stop < 4 { // expire, raise the floor, delete WAL, collect
				t.Errorf("a run took %d requests", stop)
			}
			return
		}
	}
}

// countingStore cancels once it was asked a number of times.
type countingStore struct {
	objectstore.Store
	armed  bool
	left   int
	cancel context.CancelFunc
}

func (c *countingStore) Create(ctx context.Context, key string, body io.ReadSeeker, size int64) error {
	c.ask()
	return c.Store.Create(ctx, key, body, size)
}

func (c *countingStore) Delete(ctx context.Context, keys ...string) error {
	c.ask()
	return c.Store.Delete(ctx, keys...)
}

func (c *countingStore) ask() {
	if !c.armed {
		return
	}
	if c.left--; c.left < 0 {
		c.cancel()
	}
}

func TestApply_restoreBegunAfterThePlan(t *testing.T) {
	s, sids := fourImages(t)
	state, err := Read(t.Context(), s.Series)
	if err != nil {
		t.Fatal(err)
	}
	plan, err := Make(state, Policy{Images: job.ImageRetention{KeepLast: 1}}, now)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.Begin(t.Context(), repository.OpenSession{Kind: repository.SessionRestore, Parent: sids[1], Host: "db2"}); err != nil {
		t.Fatal(err)
	}
	r, err := Apply(t.Context(), s.Series, plan)
	if err != nil {
		t.Fatal(err)
	}
	if r.WALFiles != 11 || len(r.Held) != 1 || !strings.Contains(r.Held[0], "restore session") {
		t.Errorf("result %+v, expected the WAL from image 2 on to stay for the restore", r)
	}
	if names := s.names(1); names[0] != "00000001000000000000000C" {
		t.Errorf("WAL left from %s on", names[0])
	}
}

func TestApply_seriesChanged(t *testing.T) {
	s, sids := fourImages(t)
	state, err := Read(t.Context(), s.Series)
	if err != nil {
		t.Fatal(err)
	}
	plan, err := Make(state, Policy{Images: job.ImageRetention{KeepLast: 1}}, now)
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Expire(t.Context(), sids[3]); err != nil { // by another hand
		t.Fatal(err)
	}
	if _, err := Apply(t.Context(), s.Series, plan); !errors.Is(err, ErrChanged) {
		t.Errorf("apply: %v, expected ErrChanged", err)
	}
	for _, sid := range sids[:3] {
		s.mustRestore(sid)
	}
}

func TestRead_histories(t *testing.T) {
	s := newStored(t)
	s.segments(1, 1, 5, daysAgo(2))
	s.wal("00000002.history", "1\t0/480000\tno recovery target specified\n", daysAgo(1))
	s.segments(2, 4, 6, daysAgo(1))
	s.segments(3, 6, 7, daysAgo(0.5))
	state, err := Read(t.Context(), s.Series)
	if err != nil {
		t.Fatal(err)
	}
	two, three := state.Timelines[2], state.Timelines[3]
	if at, ok := two.History.SwitchPoint(1); !two.HistoryKnown || !ok || at != lsn(4.5) || len(two.Files) != 3 || !two.LastStoredAt.Equal(daysAgo(1)) {
		t.Errorf("timeline 2: %+v", two)
	}
	if three.HistoryKnown || len(three.Files) != 2 {
		t.Errorf("timeline 3: %+v", three)
	}
}

func TestRun_tails(t *testing.T) {
	s, _ := fourImages(t) // segments 1 to 45
	s.whole(46, daysAgo(0))
	s.tail(1, 5, 5.5, daysAgo(8))   // below the floor
	s.tail(1, 46, 46.5, daysAgo(0)) // its segment is whole
	s.tail(1, 46.5, 47, daysAgo(0))
	short := s.tail(1, 45, 45.5, daysAgo(0)) // what is stored under its segment's name is no segment
	only := s.tail(1, 47, 47.5, daysAgo(0))
	policy := Policy{Images: job.ImageRetention{KeepLast: 2}}

	state, err := Read(t.Context(), s.Series)
	if err != nil {
		t.Fatal(err)
	}
	plan, err := Make(state, policy, now)
	if err != nil {
		t.Fatal(err)
	}
	if w := plan.WAL[0]; w.Tails != 5 || w.DeletedTails != 4 || w.DeletedTailBytes == 0 {
		t.Errorf("planned %+v", w)
	}
	r, err := Run(t.Context(), s.Series, policy, clock)
	if err != nil || r.Tails != 3 || r.TailBytes == 0 || len(r.Held) != 0 {
		t.Errorf("result %+v, %v", r, err)
	}
	if got := s.tailsLeft(1); !slices.Equal(got, []repository.Tail{short, only}) {
		t.Errorf("left %v, expected %v and %v", got, short, only)
	}
}

// A store that takes objects and lets none go leaves tails: that is no reason to fail.
func TestRun_tailsInAnAppendOnlyStore(t *testing.T) {
	s := newStored(t)
	s.whole(2, daysAgo(1))
	s.whole(3, daysAgo(1))
	s.image(0, 1, daysAgo(1), 2)
	s.tail(1, 2, 2.5, daysAgo(1))
	s.tail(1, 2.5, 3, daysAgo(1))
	repo, err := repository.Open(t.Context(), refusing{s.store})
	if err != nil {
		t.Fatal(err)
	}
	r, err := Run(t.Context(), repo.Series(s.ID()), Policy{}, clock)
	if err != nil || r.Tails != 0 || len(r.Held) != 1 || !strings.HasPrefix(r.Held[0], "2 tails on timeline 1 that are not needed any more: ") {
		t.Errorf("result %+v, %v", r, err)
	}
	if n := len(s.tailsLeft(1)); n != 2 {
		t.Errorf("%d tails are left", n)
	}
}

// refusing is a bucket whose policy forbids to delete.
type refusing struct{ objectstore.Store }

func (r refusing) Delete(context.Context, ...string) error {
	return &objectstore.Error{Op: "delete", Store: r.URL(), Err: objectstore.ErrAccess}
}

func TestRead_tailsAreSignsOfLife(t *testing.T) {
	s := newStored(t)
	s.segments(1, 1, 3, daysAgo(5))
	x := s.tail(1, 4, 4.5, daysAgo(1))
	s.tail(2, 4, 4.5, daysAgo(2)) // a timeline without a whole segment yet
	state, err := Read(t.Context(), s.Series)
	if err != nil {
		t.Fatal(err)
	}
	if one := state.Timelines[1]; !one.LastStoredAt.Equal(daysAgo(1)) || len(one.Tails) != 1 || one.Tails[0].End != x.End || one.Tails[0].StoredSize == 0 {
		t.Errorf("timeline 1: %+v", one)
	}
	if two := state.Timelines[2]; two == nil || !two.LastStoredAt.Equal(daysAgo(2)) || len(two.Tails) != 1 || len(two.Files) != 0 {
		t.Errorf("timeline 2: %+v", two)
	}
}

func TestEmpty_tails(t *testing.T) {
	s := newStored(t)
	s.whole(2, daysAgo(1))
	s.whole(3, daysAgo(1))
	s.image(0, 1, daysAgo(1), 2)
	s.tail(1, 46, 46.5, daysAgo(0))
	s.tail(2, 46, 46.75, daysAgo(0))
	if err := Empty(t.Context(), s.Series); err != nil {
		t.Fatal(err)
	}
	if n := s.objects("wal"); n != 0 || s.objects("image") != 0 {
		t.Errorf("%d WAL objects and %d of images are left", n, s.objects("image"))
	}
	head, err := s.Head(t.Context())
	if err != nil || head.Floor(1) != lsn(46.5) || head.Floor(2) != lsn(46.75) {
		t.Errorf("floors %v, %v: expected where the tails end", head.WALFloor, err)
	}
}
