package daemon_test

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/pgark/terraform-provider-pgark/internal/engine/daemon/control"
	"github.com/pgark/terraform-provider-pgark/internal/engine/job"
	"github.com/pgark/terraform-provider-pgark/internal/engine/postgres"
	"github.com/pgark/terraform-provider-pgark/test/pgtest"
)

// A server that does nothing finishes no segment, however often the interval is over; what is committed is durable when
// it is over once, and what the server finishes by itself counts.
func TestRunner_interval(t *testing.T) {
	t.Parallel()
	const every = time.Second
	repo := directory(t)
	c := pgtest.Start(t, pgtest.Options{NoStart: true, WALSegmentSizeMB: 1, Settings: map[string]string{"checkpoint_timeout": "30s", "autovacuum": "off"}})
	g := newGuest(t, c, repo, repo, func(j *job.Job) {
		j.WAL.Mode, j.WAL.Interval = job.WALInterval, job.Duration(every)
	})
	own(t, repo)
	c.Configure(g.archiving())
	c.Start()
	c.Exec("create table t (n int)")
	segment := func() string { return c.Scalar("select pg_walfile_name(pg_current_wal_insert_lsn())") }
	stored := func(name string) bool {
		_, err := g.series().StatWAL(t.Context(), name)
		return err == nil
	}

	first := segment()
	g.run()
	g.mustReach(control.Running)
	eventually(t, "what was there before is durable", func() bool { return stored(first) })
	quiet := func(what string) {
		t.Helper()
		c.Exec("checkpoint") // PostgreSQL's own doings are no reason
		before := segment()
		time.Sleep(3*every + every/2)
		if now := segment(); now != before {
			t.Errorf("%s: the segment went from %s to %s, expected that an idle server finishes none", what, before, now)
		}
		if s := g.status().WAL; s.LagSeconds != 0 || s.Pending != 0 || s.Mode != job.WALInterval || s.ObjectiveSeconds != every.Seconds() {
			t.Errorf("%s: got %+v, expected nothing that waits", what, s)
		}
	}
	quiet("after the first segment")

	for i := range 2 {
		name := segment()
		began := time.Now()
		c.Exec(fmt.Sprintf("insert into t values (%d)", i))
		if s := g.status().WAL; s.State != control.WALArchiving || s.LagBytes == 0 || s.LagSeconds > (2*every).Seconds() || s.WrittenLSN == "" {
			t.Errorf("got %+v, expected a lag", s)
		}
		for !stored(name) {
			if time.Since(began) > every+10*time.Second {
				t.Fatalf("%s is not stored %s after a commit", name, time.Since(began))
			}
			time.Sleep(10 * time.Millisecond)
		}
		t.Logf("durable %s after the commit", time.Since(began).Round(time.Millisecond))
	}
	quiet("after two commits")

	// A server that finishes segments faster is left alone: those that it finishes are whole.
	n := len(c.Scalar("select string_agg(name, ' ') from pg_ls_archive_statusdir()"))
	end := time.Now().Add(2 * every)
	for i := 0; time.Now().Before(end); i++ {
		c.Exec("insert into t select generate_series(1, 4000)")
		time.Sleep(20 * time.Millisecond)
	}
	if more := len(c.Scalar("select string_agg(name, ' ') from pg_ls_archive_statusdir()")); more == n {
		t.Error("nothing was archived under load")
	}
	switches := 0
	for e, err := range g.series().ListWAL(t.Context(), 1, "") {
		if err != nil {
			t.Fatal(err)
		}
		scan := postgres.NewSegmentScanner(postgres.SegmentName(e.Name), 1<<20)
		if _, err := g.series().GetWAL(t.Context(), e.Name, scan); err != nil {
			t.Error(err)
		}
		if scan.Result().Switched {
			switches++
		}
	}
	// One for what was there before, one for each commit, and at most one as the load began, and one behind it.
	if switches < 3 || switches > 5 {
		t.Errorf("%d segments were finished early, expected 3 to 5", switches)
	}
	c.Stop("fast") // while there is somebody to take its last segment
	g.stop()
	if log := readLog(t, g); strings.Contains(log, "level=WARN") || strings.Contains(log, "level=ERROR") {
		t.Errorf("nothing went wrong, but the log says:\n%s", log)
	}
}
