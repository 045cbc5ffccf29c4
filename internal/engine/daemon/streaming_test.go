package daemon_test

import (
	"context"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/pgark/terraform-provider-pgark/internal/engine/daemon/control"
	"github.com/pgark/terraform-provider-pgark/internal/engine/job"
	"github.com/pgark/terraform-provider-pgark/internal/engine/postgres"
	"github.com/pgark/terraform-provider-pgark/internal/engine/repository"
	"github.com/pgark/terraform-provider-pgark/test/pgtest"
	"github.com/pgark/terraform-provider-pgark/test/s3test"
)

// durable is how far the repository itself has all WAL of timeline 1 in whole segments and tails: what a restore can use.
func durable(t *testing.T, s *repository.Series, size postgres.SegmentSize) (end postgres.LSN, tails int) {
	t.Helper()
	for e, err := range s.ListWAL(t.Context(), 1, "") {
		if err != nil {
			t.Fatal(err)
		}
		if name, err := postgres.ParseSegmentName(e.Name); err == nil {
			end = name.End(size)
		}
	}
	for tail, err := range s.ListTails(t.Context(), 1, 0, ^postgres.LSN(0)) {
		if err != nil {
			t.Fatal(err)
		}
		tails++
		if end == 0 {
			end = size.Start(size.Number(tail.Start)) // of the first segment that we see
		}
		if tail.Start <= end && tail.End > end {
			end = tail.End
		}
	}
	return end, tails
}

func lsn(t *testing.T, s string) postgres.LSN {
	t.Helper()
	l, err := postgres.ParseLSN(s)
	if err != nil {
		t.Fatal(err)
	}
	return l
}

// commitAndWait commits and measures how long it takes until the repository has it.
func (g *guest) commitAndWait(c *pgtest.Cluster, size postgres.SegmentSize) time.Duration {
	t, ok := g.t.(*testing.T)
	if !ok {
		panic("daemon_test: internal error: no test")
	}
	t.Helper()
	c.Exec("insert into t values (1)")
	at, began := lsn(t, c.Scalar("select pg_current_wal_insert_lsn()")), time.Now()
	for {
		if end, _ := durable(t, g.series(), size); end >= at {
			return time.Since(began)
		}
		if time.Since(began) > time.Minute {
			end, tails := durable(t, g.series(), size)
			t.Fatalf("committed up to %s, but after a minute the repository has %s, with %d tails: %+v", at, end, tails, g.status().WAL)
		}
		time.Sleep(5 * time.Millisecond)
	}
}

// What is committed is in the repository within max_lag, whatever becomes of connections; whole segments replace tails;
// status tells of it.
func TestRunner_streaming(t *testing.T) {
	t.Parallel()
	const size = 1 << 20
	s3 := s3test.Start(t)
	direct := s3.Location("wal")
	proxy := s3test.NewFaultProxy(t, s3.Endpoint(), s3test.Faults{})
	c := pgtest.Start(t, pgtest.Options{NoStart: true, WALSegmentSizeMB: 1, Settings: map[string]string{"autovacuum": "off"}})
	g := newGuest(t, c, direct, proxy.Through(direct))
	c.Configure(g.archiving())
	c.Start()
	c.Exec("create table t (n int)")
	g.run()
	g.mustReach(control.Running)
	streaming := func() *control.WALStatus {
		var s *control.Status
		eventually(t, "wal is streamed", func() bool { s = g.status(); return s.WAL.State == control.WALStreaming })
		return &s.WAL
	}
	s := streaming()
	if s.Mode != job.WALContinuous || s.ObjectiveSeconds != 1 || s.Stream == nil || !s.Stream.Connected || s.Store != control.StoreReachable {
		t.Errorf("got %+v", s)
	}
	slack := time.Second // and a machine that is busy with other tests
	if testing.Short() {
		slack = 10 * time.Second
	}
	for range 5 {
		if took := g.commitAndWait(c, size); took > time.Second+slack {
			t.Errorf("a commit was durable after %s, expected max_lag", took)
		}
		time.Sleep(50 * time.Millisecond)
	}
	eventually(t, "status says that all is durable", func() bool {
		s := g.status().WAL
		return s.LagSeconds == 0 && s.LagBytes == 0 && s.WrittenLSN == s.DurableLSN && s.WrittenLSN != ""
	})
	if s := g.status().WAL; s.Stream.Tails == 0 || s.Stream.TailBytes == 0 || s.MaxLagSeconds > (time.Second+slack).Seconds() {
		t.Errorf("got %+v, %+v; expected tails", s, s.Stream)
	}

	// The whole segment takes the place of its tails, and PostgreSQL is answered.
	archived(t, c)
	eventually(t, "the tails are gone", func() bool { _, n := durable(t, g.series(), size); return n == 0 })

	// A server that is restarted.
	c.Stop("fast")
	eventually(t, "the runner has noticed", func() bool { return !g.status().WAL.Stream.Connected })
	if s := g.status(); s.State != control.Running || s.WAL.LagSeconds != 0 {
		t.Errorf("got %+v, expected a runner that waits for a server that has left nothing behind", s)
	}
	c.Start()
	s = streaming()
	if s.Stream.Restarts != 1 {
		t.Errorf("%d restarts of the stream, expected one", s.Stream.Restarts)
	}
	if took := g.commitAndWait(c, size); took > time.Second+slack {
		t.Errorf("after a restart a commit was durable after %s, expected max_lag", took)
	}

	// A repository that is away: commits go on, PostgreSQL is told yes once WAL is in the temporary folder. Meanwhile the
	// job file is changed, and WAL goes on being accepted.
	s3.Stop()
	c.Exec("insert into t select generate_series(1, 1000)")
	archived(t, c)
	eventually(t, "wal is spooled", func() bool { s := g.status().WAL; return s.State == control.WALSpooling && s.Spool.Files > 0 })
	st := g.status().WAL
	if st.Store != control.StoreAway || st.LagSeconds == 0 || st.LagBytes == 0 {
		t.Errorf("got %+v, expected a lag", st)
	}
	former := st.Spool.Directory
	if want := g.layout.SpoolDirectory(g.job, g.instance.Name); !strings.HasPrefix(former, want) {
		t.Errorf("the temporary folder is %s, expected one in %s", former, want)
	}
	g.job.WAL.MaxLag = job.Duration(500 * time.Millisecond)
	g.job.WAL.TempFolder = filepath.Join(g.dir, "elsewhere")
	g.declare()
	pushing := make(chan struct{})
	go func() {
		defer close(pushing)
		for range 10 {
			c.Exec("insert into t select generate_series(1, 100)")
			c.SwitchWAL()
			time.Sleep(50 * time.Millisecond)
		}
	}()
	failed := c.Scalar("select failed_count from pg_stat_archiver")
	if err := control.Reload(t.Context(), g.socket()); err != nil {
		t.Fatal(err)
	}
	<-pushing
	eventually(t, "the new objective holds, while the repository is away", func() bool {
		s := g.status()
		return s.State == control.Running && s.WAL.ObjectiveSeconds == 0.5
	})
	archived(t, c)
	if now := c.Scalar("select failed_count from pg_stat_archiver"); now != failed {
		t.Errorf("PostgreSQL was told no %s times, before the job file was changed %s times", now, failed)
	}
	if s := g.status().WAL.Spool; s.Directory != former || s.Files < 3 {
		t.Errorf("got %+v, expected that the former folder is used as long as something waits in it", s)
	}

	s3.Start()
	eventually(t, "all has arrived, and the declared folder is used", func() bool {
		s := g.status().WAL
		return s.State == control.WALStreaming && s.Pending == 0 && s.Spool.Files == 0 && strings.HasPrefix(s.Spool.Directory, g.job.WAL.TempFolder)
	})
	if took := g.commitAndWait(c, size); took > time.Second+slack {
		t.Errorf("after an outage a commit was durable after %s, expected max_lag", took)
	}
	if _, err := os.Stat(former); err == nil {
		t.Errorf("%s was left behind", former)
	}
	if s := g.status().WAL; s.GapCount != 0 {
		t.Errorf("gaps were found: %+v", s.Gaps)
	}
	g.mustHaveAll(c)

	// Nothing that happens asks the repository for nothing.
	before, _ := proxy.Counts()
	time.Sleep(5 * time.Second)
	if after, _ := proxy.Counts(); after > before+1 {
		t.Errorf("%d requests in 5 idle seconds", after-before)
	}
	g.stop()
	n := 0
	for r, err := range g.series().Sessions(t.Context(), time.Time{}) {
		if err != nil {
			t.Fatal(err)
		}
		n++
		if r.Tails == 0 || r.MaxLag == 0 {
			t.Errorf("got the record %+v, expected tails and a lag", r)
		}
		if r.Spooled > 0 && r.Late == 0 {
			t.Errorf("got the record %+v, expected that it was late", r)
		}
	}
	if n == 0 {
		t.Error("no session was recorded")
	}
	c.Stop("immediate")
}

// WAL in the temporary folder reaches the series that it belongs to, even when the cluster is another one by then.
func TestRunner_spoolOfAnEarlierCluster(t *testing.T) {
	t.Parallel()
	s3 := s3test.Start(t)
	direct := s3.Location("wal")
	c := pgtest.Start(t, pgtest.Options{NoStart: true, WALSegmentSizeMB: 1})
	g := newGuest(t, c, direct, direct)
	c.Configure(g.archiving())
	c.Start()
	g.run()
	g.mustReach(control.Running)
	archived(t, c)
	s3.Stop()
	last := archived(t, c)
	eventually(t, "it is in the temporary folder", func() bool { s := g.status().WAL.Spool; return s != nil && s.Files > 0 })
	folder := g.status().WAL.Spool.Directory
	c.Stop("immediate")

	anew := pgtest.Start(t, pgtest.Options{NoStart: true})
	if err := os.Rename(c.DataDir, c.DataDir+".old"); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(anew.DataDir, c.DataDir); err != nil {
		t.Fatal(err)
	}
	next := pgtest.Start(t, pgtest.Options{DataDir: c.DataDir, Settings: g.archiving()})
	g.mustReach(control.Waiting)
	s3.Start()
	g.mustReach(control.Running)
	name := archived(t, next)
	id := g.series().ID()
	id.SystemID = next.SystemID
	if _, err := g.repo.Series(id).StatWAL(t.Context(), name); err != nil {
		t.Error(err)
	}
	eventually(t, last+" of the earlier cluster is stored, and its folder gone", func() bool {
		_, stored := g.series().StatWAL(t.Context(), last)
		_, there := os.Stat(folder)
		return stored == nil && there != nil
	})
	g.stop()
	next.Stop("immediate")
}

// mustHaveAll checks that the segments of timeline 1 follow one another up to the one that PostgreSQL writes.
func (g *guest) mustHaveAll(c *pgtest.Cluster) {
	g.t.Helper()
	var names []string
	for e, err := range g.series().ListWAL(context.Background(), 1, "") {
		if err != nil {
			g.t.Fatal(err)
		}
		names = append(names, e.Name)
	}
	for i, name := range names {
		if i > 0 && string(postgres.SegmentName(names[i-1]).Next(1<<20)) != name {
			g.t.Errorf("a gap between %s and %s", names[i-1], name)
		}
	}
	if last := c.Scalar("select last_archived_wal from pg_stat_archiver"); len(names) == 0 || names[len(names)-1] < last {
		g.t.Errorf("%d segments, expected them up to %s", len(names), last)
	}
}
