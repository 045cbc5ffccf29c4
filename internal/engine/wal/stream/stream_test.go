package stream

import (
	"context"
	"errors"
	"math/rand/v2"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/pgark/terraform-provider-pgark/internal/engine/objectstore"
	"github.com/pgark/terraform-provider-pgark/internal/engine/postgres"
	"github.com/pgark/terraform-provider-pgark/internal/engine/repository"
	"github.com/pgark/terraform-provider-pgark/test/pgtest"
	"github.com/pgark/terraform-provider-pgark/test/s3test"
)

// TestStream_killedServersAndRunners: under load the server is killed and the Streamer cancelled at random moments. What
// counts as durable is in the repository, as it is in pg_wal; in the end the segments are whole and their tails gone.
func TestStream_killedServersAndRunners(t *testing.T) {
	t.Parallel()
	w := newWorld(t, 15, 1)

	w.proxy.Set(s3test.Faults{Rate: 0.05, MaxDelay: 50 * time.Millisecond})
	load := write(t, w.pg, 1, 8000, time.Millisecond)
	r := w.stream(w.pg)
	rounds := 8
	if testing.Short() {
		rounds = 3
	}
	for i := range rounds {
		time.Sleep(time.Duration(rand.IntN(700)) * time.Millisecond)
		if i%2 == 0 {
			w.pg.Kill()
			w.compare(w.pg, 1, w.start, r.Position().Durable)
			w.pg.Start()
		} else {
			if err := r.stop(); err != nil {
				t.Fatal(err)
			}
			w.compare(w.pg, 1, w.start, r.Position().Durable)
			r = w.stream(w.pg)
		}
	}
	r.durable(flushed(t, w.pg), 10*time.Second)
	acked := load.stop()
	r.durable(flushed(t, w.pg), 10*time.Second)
	whole := w.pg.SwitchWAL()
	w.pg.Exec("insert into t values (0)")
	durable := r.durable(flushed(t, w.pg), 10*time.Second)
	w.compare(w.pg, 1, w.start, durable)
	eventually(t, "the tails of "+string(whole)+" are deleted", 10*time.Second, func() bool { return len(w.tails(whole)) == 0 })
	c := w.recover(w.start)
	if missing := lost(c, acked); missing != "" {
		t.Errorf("not recovered: %s", missing)
	}
	t.Logf("%d commits, status %+v", len(acked), r.Status())
}

// TestStream_lag: under a load of many commits all WAL is durable within max_lag, at a bounded number of requests; a
// single commit after a rest is durable at once.
func TestStream_lag(t *testing.T) {
	w := newWorld(t, 15, 0)
	r := w.stream(w.pg)
	r.durable(flushed(t, w.pg), 5*time.Second)
	load := write(t, w.pg, 1, 2000, 2*time.Millisecond)
	var worst time.Duration
	length := 6 * time.Second
	if testing.Short() {
		length = 2 * time.Second
	}
	for end := time.Now().Add(length); time.Now().Before(end); time.Sleep(time.Millisecond) {
		if p := r.Position(); !p.OldestPending.IsZero() {
			worst = max(worst, time.Since(p.OldestPending))
		}
	}
	acked := load.stop()
	tails := r.Status().Tails
	t.Logf("%d commits, %d tails, at worst %s not durable", len(acked), tails, worst)
	if worst > time.Second {
		t.Errorf("WAL waited for %s, expected at most max_lag", worst)
	}
	if limit := int64(length/(400*time.Millisecond)) + 8; tails > limit {
		t.Errorf("%d tails in %s, expected at most %d", tails, length, limit)
	}
	r.durable(flushed(t, w.pg), 2*time.Second)

	time.Sleep(1200 * time.Millisecond)
	w.pg.Exec("insert into t values (0)")
	began := time.Now()
	r.durable(flushed(t, w.pg), time.Second)
	if took := time.Since(began); took > 300*time.Millisecond {
		t.Errorf("one commit after a rest was durable after %s", took)
	}
}

// TestStream_idle: a server that writes nothing causes no requests, and its connection is never given up.
func TestStream_idle(t *testing.T) {
	t.Parallel()
	w := newWorld(t, 15, 0)
	r := w.stream(w.pg)
	r.durable(flushed(t, w.pg), 5*time.Second)
	rest := 20 * time.Second
	if testing.Short() {
		rest = 3 * time.Second
	}
	at := flushed(t, w.pg)
	before, _ := w.proxy.Counts()
	time.Sleep(rest)
	allowed := 0
	if flushed(t, w.pg) != at {
		allowed = 1 // the background writer notes the running transactions once after a start
	}
	if after, _ := w.proxy.Counts(); after-before > allowed {
		t.Errorf("%d requests of an idle server in %s, expected %d", after-before, rest, allowed)
	}
	st := r.Status()
	if st.Restarts != 0 || !st.Connected || st.LastAt == nil || time.Since(*st.LastAt) > askAfter+2*time.Second {
		t.Errorf("after %s of rest: %+v", rest, st)
	}
}

// TestStream_budget: max_requests_per_hour holds, and that max_lag does not is said.
func TestStream_budget(t *testing.T) {
	t.Parallel()
	w := newWorld(t, 15, 0)
	r := w.stream(w.pg, func(o *Options) { o.MaxRequestsPerHour, o.MaxLag = 300, 200*time.Millisecond })
	load := write(t, w.pg, 1, 100, 5*time.Millisecond)
	eventually(t, "the log says that max_lag does not hold", 10*time.Second, func() bool {
		return w.logged("max_requests_per_hour does not suffice for max_lag") == 1
	})
	time.Sleep(time.Second)
	load.stop()
	if st := r.Status(); st.Tails > 6 || !strings.Contains(st.LastError, "max_requests_per_hour = 300 does not suffice for max_lag = 200ms") {
		t.Errorf("with 5 tails at once allowed: %+v", st)
	}
}

// TestStream_storeAway: while the store is away commits go on; soon after it is back all is durable.
func TestStream_storeAway(t *testing.T) {
	t.Parallel()
	w := newWorld(t, 17, 1)

	r := w.stream(w.pg)
	load := write(t, w.pg, 1, 5000, 2*time.Millisecond)
	r.durable(w.start+100_000, 5*time.Second)
	w.s3.Stop()
	before := len(load.so())
	away := 11 * time.Second
	if testing.Short() {
		away = 8 * time.Second
	}
	time.Sleep(away)
	during := len(load.so()) - before
	if during < 100 {
		t.Errorf("%d commits in %s without a store", during, away)
	}
	if st := r.Status(); st.LastError == "" {
		t.Errorf("nothing of it in the status: %+v", st)
	}
	w.s3.Start()
	back := time.Now()
	at := flushed(t, w.pg)
	r.durable(at, 12*time.Second)
	t.Logf("%d commits while the store was away; durable %s after it was back", during, time.Since(back))
	acked := load.stop()
	durable := r.durable(flushed(t, w.pg), 5*time.Second)
	w.compare(w.pg, 1, w.start, durable)
	if failed, again := w.logged("wal cannot be stored as it is written"), w.logged("wal can be stored again"); failed != 1 || again != 1 {
		t.Errorf("the log tells %d times of the failure and %d times of its end", failed, again)
	}
	if missing := lost(w.recover(w.start), acked); missing != "" {
		t.Errorf("not recovered: %s", missing)
	}
}

// TestStream_synchronous: commits wait until they are durable, so that no kill of server or runner loses one.
func TestStream_synchronous(t *testing.T) {
	t.Parallel()
	for _, major := range []int{15, 18} {
		t.Run(strconv.Itoa(major), func(t *testing.T) {
			t.Parallel()
			w := newWorld(t, major, 1)

			w.pg.Configure(map[string]string{"synchronous_standby_names": "pgark"})
			w.pg.Exec("select pg_reload_conf()")
			sync := func(o *Options) { o.Synchronous = true }
			r := w.stream(w.pg, sync)
			load := []*writer{write(t, w.pg, 1, 3000, 0), write(t, w.pg, 1_000_000, 500, 0), write(t, w.pg, 2_000_000, 20_000, 5*time.Millisecond)}
			rounds := 4
			if testing.Short() {
				rounds = 2
			}
			for i := range rounds {
				time.Sleep(time.Duration(300+rand.IntN(700)) * time.Millisecond)
				if i%2 == 0 {
					w.pg.Kill()
					w.pg.Start()
				} else {
					if err := r.stop(); err != nil {
						t.Fatal(err)
					}
					r = w.stream(w.pg, sync)
				}
			}
			time.Sleep(time.Second)
			// The end of everything: nothing of what is acknowledged depends on anything but the repository.
			w.proxy.Set(s3test.Faults{Rate: 1, Kinds: []s3test.Fault{s3test.CutBefore}})
			w.pg.Kill()
			var acked []int64
			for _, l := range load {
				acked = append(acked, l.stop()...)
			}
			if len(acked) < 5 {
				t.Errorf("%d commits only", len(acked))
			}
			c := w.recover(w.start)
			if missing := lost(c, acked); missing != "" {
				t.Errorf("acknowledged, but not recovered: %s", missing)
			}
			t.Logf("%d commits, all recovered", len(acked))
			_ = r.stop()
		})
	}
}

// TestStream_shutdown: a server that shuts down waits for durable positions if it was told any, so the Streamer hurries,
// and lets go of it if the store is away.
func TestStream_shutdown(t *testing.T) {
	t.Parallel()
	w := newWorld(t, 15, 0)
	for _, c := range []struct {
		name   string
		change func(*Options)
		away   bool
		limit  time.Duration
	}{
		{"asynchronous, store away", func(*Options) {}, true, 3 * time.Second},
		{"slot", func(o *Options) { o.Slot = "pgark_orders" }, false, 3 * time.Second},
		{"slot, store away", func(o *Options) { o.Slot = "pgark_orders" }, true, shutdownGrace + 4*time.Second},
	} {
		t.Run(c.name, func(t *testing.T) {
			w.pg = w.pg.For(t)
			r := w.stream(w.pg, c.change, func(o *Options) { o.MaxLag = 4 * time.Second })
			w.pg.Exec("insert into t values (1)")
			r.durable(flushed(t, w.pg), 10*time.Second)
			if c.away {
				w.proxy.Set(s3test.Faults{Rate: 1, Kinds: []s3test.Fault{s3test.Stall}})
			}
			w.pg.Exec("insert into t values (2)")
			began := time.Now()
			w.pg.Stop(pgtest.Fast)
			if took := time.Since(began); took > c.limit {
				t.Errorf("the server took %s to stop", took)
			} else {
				t.Logf("stopped in %s", took)
			}
			w.proxy.Set(s3test.Faults{})
			_ = r.stop()
			w.pg.Start()
		})
	}
}

// TestStream_slot: the slot is made and moves with what is durable.
func TestStream_slot(t *testing.T) {
	t.Parallel()
	w := newWorld(t, 13, 1)
	r := w.stream(w.pg, func(o *Options) { o.Slot = "pgark_orders" })
	w.pg.Exec("insert into t values (1)")
	at := flushed(t, w.pg)
	r.durable(at, 10*time.Second)
	eventually(t, "the slot has moved", 5*time.Second, func() bool {
		return w.pg.Scalar("select (restart_lsn >= $1::pg_lsn)::text from pg_replication_slots where slot_name = 'pgark_orders'", at.String()) == "true"
	})
}

// TestStream_promotion: a standby as source is promoted. The old timeline is stored to its end, then the new one from the
// start of the segment in which it branched off, with its history.
func TestStream_promotion(t *testing.T) {
	t.Parallel()
	w := newWorld(t, 16, 1)

	dir := pgtest.Dir(t) + "/standby"
	w.copy(w.base, dir)
	w.touch(dir + "/standby.signal")
	standby := pgtest.Start(t, pgtest.Options{Major: w.pg.Major, DataDir: dir, Settings: map[string]string{"primary_conninfo": w.conninfo()}})
	r := w.stream(standby)
	for i := range 5 {
		w.pg.Exec("insert into t select $1, string_agg(md5(i::text), '') from generate_series(1, 12000) i", i)
	}
	before := flushed(t, w.pg)
	r.durable(before, 10*time.Second)
	w.compare(w.pg, 1, w.start, before)

	standby.Exec("select pg_promote()")
	standby.Exec("insert into t values (1000, 'promoted')")
	eventually(t, "timeline 2 is streamed", 10*time.Second, func() bool { return r.Position().Timeline == 2 })
	after := flushed(t, standby)
	durable := r.durable(after, 10*time.Second)
	w.compare(standby, 2, before, durable)
	eventually(t, "the history is stored", 10*time.Second, func() bool {
		_, err := w.series.StatWAL(t.Context(), "00000002.history")
		return err == nil
	})
	// The end of timeline 1 is in its tails.
	if got := w.assemble(postgres.SegmentAt(1, before, w.size)); postgres.LSN(len(got)) < postgres.LSN(w.size.Offset(before)) {
		t.Errorf("timeline 1 is stored up to %d bytes of its last segment, expected %d", len(got), w.size.Offset(before))
	}
	if st := r.Status(); st.Restarts != 0 || st.Timeline != 2 {
		t.Errorf("after a promotion, which needs no new connection: %+v", st)
	}
	standby.Restart()
	standby.Exec("insert into t values (1001, 'restarted')")
	r.durable(flushed(t, standby), 10*time.Second)
	if st := r.Status(); st.Restarts != 1 {
		t.Errorf("after a restart of the server: %+v", st)
	}
}

// TestStream_otherCluster: a server with another system identifier ends the protection.
func TestStream_otherCluster(t *testing.T) {
	t.Parallel()
	w := newWorld(t, 15, 0)
	r := w.stream(w.pg, func(o *Options) { o.SystemID++ })
	select {
	case <-r.done:
		if !errors.Is(r.err, ErrOtherCluster) {
			t.Errorf("got %v", r.err)
		}
	case <-time.After(10 * time.Second):
		t.Error("it goes on streaming")
	}
}

// TestStream_unstoredUnknown: nothing counts as durable while nobody can tell which segments are not.
func TestStream_unstoredUnknown(t *testing.T) {
	t.Parallel()
	w := newWorld(t, 15, 0)
	var known atomic.Bool
	r := w.stream(w.pg, func(o *Options) {
		unstored := o.Unstored
		o.Unstored = func() ([]postgres.SegmentName, error) {
			if !known.Load() {
				return nil, errors.New("too many open files")
			}
			return unstored()
		}
	})
	w.pg.Exec("insert into t values (1)")
	time.Sleep(time.Second)
	if at := r.Position(); at.Durable != 0 || !strings.Contains(r.Status().LastError, "too many open files") {
		t.Errorf("found %+v, %+v, expected that nothing is claimed, and why", at, r.Status())
	}
	known.Store(true)
	r.durable(flushed(t, w.pg), 15*time.Second)
}

// TestStream_undeletable: a repository that takes no deletions is asked once, and keeps the tails.
func TestStream_undeletable(t *testing.T) {
	t.Parallel()
	w := newWorld(t, 15, 1)
	archive := &appendOnly{Series: w.through()}
	r := w.stream(w.pg, func(o *Options) { o.Archive = archive })
	for range 3 {
		w.pg.Exec("insert into t values (1)")
		r.durable(flushed(t, w.pg), 5*time.Second)
		w.pg.SwitchWAL()
	}
	w.pg.Exec("insert into t values (1)")
	r.durable(flushed(t, w.pg), 5*time.Second)
	eventually(t, "it is said", 5*time.Second, func() bool { return w.logged("the repository takes no deletions") == 1 })
	if n := archive.asked.Load(); n != 1 {
		t.Errorf("%d deletions were tried", n)
	}
}

// appendOnly is a series in a bucket that takes no deletions.
type appendOnly struct {
	*repository.Series
	asked atomic.Int64
}

func (a *appendOnly) DeleteTails(context.Context, ...repository.Tail) error {
	a.asked.Add(1)
	return &objectstore.Error{Op: "delete", Store: "s3://bucket", Err: objectstore.ErrAccess}
}

// TestNew_options refuses what cannot work.
func TestNew_options(t *testing.T) {
	connect := func(context.Context) (*postgres.Replication, error) { return nil, errors.New("none") }
	for want, o := range map[string]Options{
		"wal streamer: no way to connect given": {},
		"wal streamer: no archive given":        {Connect: connect},
	} {
		if _, err := New(o); err == nil || err.Error() != want {
			t.Errorf("got %v, expected %s", err, want)
		}
	}
}
