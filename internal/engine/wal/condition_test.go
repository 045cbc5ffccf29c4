package wal

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/pgark/terraform-provider-pgark/internal/engine/daemon/control"
	"github.com/pgark/terraform-provider-pgark/internal/engine/objectstore"
	"github.com/pgark/terraform-provider-pgark/internal/engine/postgres"
	"github.com/pgark/terraform-provider-pgark/internal/engine/repository"
)

func TestClassify(t *testing.T) {
	failed := func(err error) error { return &objectstore.Error{Op: "create", Key: "k", Store: "s3://b", Err: err} }
	for what, test := range map[string]struct {
		err   error
		blame blame
		state control.StoreState
	}{
		"conflict":           {&repository.WALConflictError{}, blameFile, control.StoreConflicting},
		"damaged there":      {fmt.Errorf("compare: %w", &repository.CorruptError{Err: errors.New("x")}), blameFile, control.StoreConflicting},
		"no bucket":          {failed(objectstore.ErrNoBucket), blameStore, control.StoreMissing},
		"read only":          {failed(objectstore.ErrReadOnly), blameStore, control.StoreReadOnly},
		"full":               {failed(objectstore.ErrFull), blameStore, control.StoreFull},
		"denied":             {failed(objectstore.ErrAccess), blameStore, control.StoreDenied},
		"expired":            {failed(fmt.Errorf("%w: %w", objectstore.ErrAccess, objectstore.ErrExpired)), blameStore, control.StoreDenied},
		"busy":               {failed(objectstore.ErrBusy), blameStore, control.StoreRefusing},
		"wrong region":       {failed(objectstore.ErrRegion), blameStore, control.StoreRefusing},
		"connection refused": {syscall.ECONNREFUSED, blameStore, control.StoreAway},
		"a certificate":      {failed(errors.New("x509: certificate signed by unknown authority")), blameStore, control.StoreAway},
	} {
		if b, s := classify(test.err); b != test.blame || s != test.state {
			t.Errorf("%s: got %d, %s, expected %d, %s", what, b, s, test.blame, test.state)
		}
	}
}

func TestHealth(t *testing.T) {
	now := time.Unix(1e9, 0)
	at := func(d time.Duration) time.Time { return now.Add(d) }
	h := health{maxLag: time.Second, state: control.StoreReachable}
	expect := func(when time.Time, state control.StoreState, away bool) {
		t.Helper()
		if s, _ := h.describe(when); s != state || h.away(when) != away {
			t.Errorf("at %v: got %s, away %v, expected %s, %v", when.Sub(now), s, h.away(when), state, away)
		}
	}
	h.succeeded(at(0), at(100*time.Millisecond), true)
	expect(at(time.Second), control.StoreReachable, false)

	// One that was unlucky while another got through says nothing.
	if !h.failure(syscall.ECONNRESET, control.StoreAway, at(0), at(5*time.Second)) || h.failing() {
		t.Error("a failure that began before the latest success should not count")
	}
	// A network that is away is said to be so after a while, ...
	if h.failure(syscall.ECONNREFUSED, control.StoreAway, at(10*time.Second), at(10*time.Second)) || !h.failing() {
		t.Error("the failure should count")
	}
	expect(at(12*time.Second), control.StoreReachable, false)
	if h.retry.Before(at(10*time.Second)) || h.retry.After(at(11*time.Second)) {
		t.Errorf("the first retry is in %v", h.retry.Sub(at(10*time.Second)))
	}
	for n := range 10 {
		h.failure(syscall.ECONNREFUSED, control.StoreAway, at(11*time.Second), at(time.Duration(11+n)*time.Second))
	}
	expect(at(15*time.Second), control.StoreAway, true)
	if wait := h.retry.Sub(at(20 * time.Second)); wait > probeMost || wait < probeMost/2 {
		t.Errorf("the retry is in %v, expected at most %v", wait, probeMost)
	}
	// ... and one success ends it.
	h.succeeded(at(30*time.Second), at(30*time.Second+200*time.Millisecond), true)
	expect(at(31*time.Second), control.StoreReachable, false)
	// What a server says in so many words counts at once, but does not yet fill the folder.
	h.failure(objectstore.ErrAccess, control.StoreDenied, at(40*time.Second), at(40*time.Second))
	expect(at(40*time.Second), control.StoreDenied, false)
	expect(at(45*time.Second), control.StoreDenied, true)

	// Slow, and fast again, with some space between.
	for range 40 {
		h.succeeded(at(50*time.Second), at(53*time.Second), true)
	}
	expect(at(54*time.Second), control.StoreSlow, false)
	h.succeeded(at(60*time.Second), at(60*time.Second), false) // a comparison
	expect(at(60*time.Second), control.StoreSlow, false)
	for range 40 {
		h.succeeded(at(60*time.Second), at(60*time.Second+800*time.Millisecond), true)
	}
	expect(at(61*time.Second), control.StoreSlow, false)
	for range 40 {
		h.succeeded(at(60*time.Second), at(60*time.Second+100*time.Millisecond), true)
	}
	expect(at(62*time.Second), control.StoreReachable, false)
}

// A far repository gets more uploads at one time, one whose line is full does not.
func TestClimber(t *testing.T) {
	for what, test := range map[string]struct {
		rate        func(limit int) float64 // uploads per second
		least, most int
	}{
		"latency only":           {func(n int) float64 { return float64(n) / 0.4 }, maxUploads, maxUploads},
		"a line that two fill":   {func(int) float64 { return 5 }, minUploads, 3},
		"a line that seven fill": {func(n int) float64 { return min(float64(n), 7) / 0.3 }, 6, 9},
		"worse with more":        {func(n int) float64 { return 10 / float64(n) }, minUploads, 3},
	} {
		c := climber{limit: minUploads}
		now := time.Unix(1e9, 0)
		for range 5000 {
			now = now.Add(time.Duration(float64(time.Second) / test.rate(c.limit)))
			c.uploaded(5<<20, now, true)
		}
		if c.trying {
			c.limit = c.proven
		}
		if c.limit < test.least || c.limit > test.most {
			t.Errorf("%s: ended with %d, expected %d to %d", what, c.limit, test.least, test.most)
		}
	}
	c := climber{limit: minUploads}
	for n := range 1000 {
		c.uploaded(5<<20, time.Unix(1e9+int64(n), 0), false)
	}
	if c.limit != minUploads {
		t.Errorf("with nobody waiting, the limit became %d", c.limit)
	}
}

func TestGate(t *testing.T) {
	g := newGate()
	for n := range minUploads + 1 {
		if found := g.tryEnter(); found != (n < minUploads) {
			t.Fatalf("number %d found a place: %v", n, found)
		}
	}
	ctx, cancel := context.WithCancelCause(t.Context())
	left := make(chan error)
	go func() { left <- g.enter(ctx) }()
	eventually(t, "one waits", func() bool { g.mu.Lock(); defer g.mu.Unlock(); return len(g.waiting) == 1 })
	cancel(ErrStopped)
	if err := <-left; !errors.Is(err, ErrStopped) {
		t.Errorf("got %v, expected the cause", err)
	}
	go func() { left <- g.enter(t.Context()) }()
	eventually(t, "one waits", func() bool { g.mu.Lock(); defer g.mu.Unlock(); return len(g.waiting) == 1 })
	g.leave(0, time.Now())
	if err := <-left; err != nil {
		t.Fatal(err)
	}
	g.leave(1, time.Now())
	g.leave(1, time.Now())
	if g.busy != 0 || len(g.waiting) != 0 {
		t.Errorf("%d are busy and %d wait, expected none", g.busy, len(g.waiting))
	}
}

// What the stream has passed is shipped before PostgreSQL says so, and where it never does.
func TestCompleted(t *testing.T) {
	w := newWorld(t)
	s, _ := w.shipper()
	eventually(t, "it runs", func() bool { s.mu.Lock(); defer s.mu.Unlock(); return !s.scanned.IsZero() })
	for n := uint64(1); n <= 3; n++ {
		w.write(filepath.Join(w.data, "pg_wal", segment(1, n)), content(segment(1, n), n))
		s.Completed(postgres.SegmentName(segment(1, n)))
	}
	eventually(t, "they are stored", func() bool { return s.Status().Segments == 3 })
	s.Completed(postgres.SegmentName(segment(1, 3))) // told twice
	s.Completed(postgres.SegmentName(segment(1, 9))) // gone already
	// PostgreSQL asks: the answer is there.
	for n := uint64(1); n <= 3; n++ {
		path := w.finish(segment(1, n), content(segment(1, n), n)) // it is written anew, so it is read anew
		if _, err := s.Ship(t.Context(), path); err != nil {
			t.Fatal(err)
		}
		began := time.Now()
		if _, err := s.Ship(t.Context(), path); err != nil {
			t.Fatal(err)
		}
		if took := time.Since(began); took > 5*time.Millisecond {
			t.Logf("an answer from memory took %v", took)
		}
	}
	eventually(t, "what is gone is forgotten", func() bool { s.mu.Lock(); defer s.mu.Unlock(); return s.files[segment(1, 9)] == nil })
}

// lines collects a log.
type lines struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *lines) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *lines) count(text string) int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return strings.Count(l.b.String(), text)
}

// An outage is one line when it begins and one when it ends, however often is tried.
func TestReview_oneLineAChange(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	var log lines
	s, _ := w.spooling(t.TempDir(), func(o *Options) { o.Log = slog.New(slog.NewTextHandler(io.MultiWriter(&log, t.Output()), nil)) })
	w.outage(s)
	for n := uint64(1); n <= 30; n++ {
		if _, err := s.Ship(t.Context(), w.finish(segment(1, n), content(segment(1, n), n))); err != nil {
			t.Fatal(err)
		}
	}
	eventually(t, "some attempts have failed", func() bool { return s.Status().Failures > 1 })
	w.archive.fail(nil)
	eventually(t, "it is over", func() bool {
		st := s.Status()
		return st.State == control.WALArchiving && st.Store == control.StoreReachable
	})
	for text, most := range map[string]int{
		"the repository cannot be reached":          1,
		"wal goes into the temporary folder":        1,
		"the repository takes wal as it should":     1,
		"wal waits and is being caught up with":     1,
		"wal reaches the repository segment by seg": 1,
		"connection refused":                        4,
	} {
		if n := log.count(text); n > most || n == 0 {
			t.Errorf("%q is said %d times, expected 1 to %d", text, n, most)
		}
	}
}

// Credentials that are refused fill the folder too, and nothing is asked of the file.
func TestShip_denied(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	s, _ := w.spooling(t.TempDir())
	w.archive.fail(&objectstore.Error{Op: "create", Key: "k", Store: "s3://b", Err: objectstore.ErrAccess})
	r, err := s.Ship(t.Context(), w.finish(segment(1, 1), content(segment(1, 1), 1)))
	if err != nil || !r.Spooled {
		t.Fatalf("got %+v, %v, expected it to be in the folder", r, err)
	}
	if st := s.Status(); st.Store != control.StoreDenied || st.State != control.WALSpooling {
		t.Errorf("got %s, %s", st.Store, st.State)
	}
	w.archive.fail(nil)
	eventually(t, "it is stored", func() bool { return s.spool.Files() == 0 })
	w.mustHold(segment(1, 1), content(segment(1, 1), 1))
}

// New WAL is not held up by what waits in the folder, nor the other way round.
func TestShip_catchUpSharesWithNew(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	dir := t.TempDir()
	spool, err := OpenSpool(filepath.Join(dir, testSystem.String()), 0)
	if err != nil {
		t.Fatal(err)
	}
	spool.reserve = 0
	const old = 60
	for n := uint64(1); n <= old; n++ {
		if err := spool.Put(w.seal(segment(1, n), content(segment(1, n), n)), w.series.ReadSealed); err != nil {
			t.Fatal(err)
		}
	}
	for n := uint64(old + 1); n <= 2*old; n++ {
		w.finish(segment(1, n), content(segment(1, n), n))
	}
	time.Sleep(settle)
	var mu sync.Mutex
	var got []string
	w.archive.delay = 20 * time.Millisecond
	s, _ := w.spooling(dir, func(o *Options) {
		o.Stored = func(r Receipt) {
			mu.Lock()
			defer mu.Unlock()
			got = append(got, r.Name)
		}
	})
	eventually(t, "all is stored", func() bool { mu.Lock(); defer mu.Unlock(); return len(got) == 2*old })
	mu.Lock()
	defer mu.Unlock()
	late, newer := 0, 0
	var last string
	for i, name := range got {
		if name > segment(1, old) {
			newer++
		} else {
			if name < last {
				late++ // uploads overtake one another, by as many as are in flight
			}
			last = max(last, name)
		}
		if i == old && (newer < old/4 || newer > old*9/10) {
			t.Errorf("of the first half, %d of %d were new", newer, i)
		}
	}
	if late > old/2 {
		t.Errorf("%d of %d came out of order", late, old)
	}
	if st := s.Status(); len(st.Gaps) != 0 {
		t.Errorf("found gaps %+v", st.Gaps)
	}
}

// Thousands of files cost what a few do, each.
func TestShip_longBacklog(t *testing.T) {
	t.Parallel()
	n := uint64(600)
	if testing.Short() {
		n = 200
	}
	w := newWorld(t)
	for i := uint64(1); i <= n; i++ {
		// Histories are small.
		name := fmt.Sprintf("%08X.history", i+1)
		if err := os.WriteFile(filepath.Join(w.data, "pg_wal", name), []byte("1\t0/700000\tno recovery target specified\n"), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(w.data, "pg_wal", "archive_status", name+".ready"), nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	time.Sleep(settle)
	s, _ := w.shipper(func(o *Options) { o.Log = nil })
	began, cpu := time.Now(), cpuTime(t)
	for i := uint64(1); i <= n; i++ {
		if _, err := s.Ship(t.Context(), filepath.Join(w.data, "pg_wal", fmt.Sprintf("%08X.history", i+1))); err != nil {
			t.Fatal(err)
		}
	}
	t.Logf("%d files in %v, %v of CPU", n, time.Since(began), cpuTime(t)-cpu)
	if s.Status().Pending != 0 {
		t.Errorf("%d still wait", s.Status().Pending)
	}
}
