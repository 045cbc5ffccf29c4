package acceptance

import (
	"context"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/pgark/terraform-provider-pgark/internal/engine/daemon/control"
	"github.com/pgark/terraform-provider-pgark/test/pgtest"
	"github.com/pgark/terraform-provider-pgark/test/s3test"
)

// numberedTable is what the tests under faults write and compare.
const numberedTable = "CREATE TABLE numbered (n int PRIMARY KEY, at timestamptz, body text)"

// load runs the writer and switches segments until stop is called, which returns what was committed and the longest
// time that a commit took.
func (w *world) load(every time.Duration) (stop func() []commit) {
	ctx, cancel := context.WithCancel(w.ctx)
	var commits []commit
	var wg sync.WaitGroup
	wg.Go(func() { commits = w.writer(ctx, 2*time.Millisecond) })
	wg.Go(func() {
		c := w.cluster.Conn(w.ctx)
		defer c.Close(context.Background())
		for ctx.Err() == nil {
			if _, err := c.Exec(w.ctx, "SELECT pg_switch_wal()"); err != nil {
				w.t.Errorf("switch: %v", err)
				return
			}
			time.Sleep(every)
		}
	})
	return func() []commit {
		cancel()
		wg.Wait()
		return commits
	}
}

// TestKilledRunner kills the runner at random moments, mid image, mid push, mid commit.
func TestKilledRunner(t *testing.T) {
	t.Parallel()
	rng := random(t)
	w := newWorld(t, worldOptions{cluster: pgtest.Options{Settings: map[string]string{"track_commit_timestamp": "on"}}})
	w.cluster.Exec(numberedTable)
	w.cluster.Run("pgbench", "-i", "-q", "-s", "3", "postgres")
	stop := w.load(400 * time.Millisecond)
	var images int
	for range scaled(50) {
		w.eventually("the runner answers", time.Minute, func() bool { _, err := w.status(); return err == nil })
		var wg sync.WaitGroup
		wg.Go(func() {
			// It is meant to fail most of the time: its runner dies under it.
			_, _ = w.pgark("image", "--job", jobName, "--instance", w.instance, "--json")
		})
		time.Sleep(time.Duration(rng.Int64N(int64(1200 * time.Millisecond))))
		status, err := w.status()
		if err == nil {
			if err := syscall.Kill(status.PID, syscall.SIGKILL); err != nil {
				t.Fatal(err)
			}
		}
		wg.Wait()
		// No half image is ever listed, and no acknowledged segment is missing.
		s := w.series()
		head, err := s.Head(w.ctx)
		w.must(err)
		for _, i := range head.Images[min(images, len(head.Images)):] {
			img, err := s.OpenImage(w.ctx, i.SID)
			if err != nil {
				t.Fatalf("image %s is listed and cannot be opened: %v", i.SID, err)
			}
			if img.Manifest().BackupLabel == "" {
				t.Fatalf("image %s is listed without a backup label", i.SID)
			}
		}
		images = len(head.Images)
	}
	w.eventually("the runner answers", time.Minute, func() bool { _, err := w.status(); return err == nil })
	w.takeImage()
	commits := stop()
	w.flush()
	w.mustHoldArchived()
	head, err := w.series().Head(w.ctx)
	w.must(err)
	if len(head.Sessions) != 0 {
		t.Errorf("%d sessions are left open", len(head.Sessions))
	}
	t.Logf("%d images survived the kills", len(head.Images)-1)
	l := w.list()
	if len(l.Series) != 1 || len(l.Series[0].Gaps) != 0 || len(l.Series[0].Windows) != 1 {
		t.Errorf("expected one series with one window and no gap, found %+v", l)
	}
	r := w.restore("--latest")
	mustHold(w, r.conn(), "restored to the latest", commits[len(commits)-1].n)
}

// TestRepositoryAway stops the S3 server under load.
func TestRepositoryAway(t *testing.T) {
	t.Parallel()
	w := newWorld(t, worldOptions{cluster: pgtest.Options{Settings: map[string]string{"track_commit_timestamp": "on"}}})
	w.cluster.Exec(numberedTable)
	w.takeImage()
	stop := w.load(500 * time.Millisecond)
	time.Sleep(2 * time.Second)
	w.s3.Stop()
	time.Sleep(time.Duration(scaled(60)) * time.Second)
	if st, err := w.status(); err != nil || st.WAL.State != control.WALSpooling || st.WAL.Store != control.StoreAway || st.WAL.Spool.Files == 0 {
		t.Errorf("while the repository is away, the runner should keep wal in its temporary folder: %+v, %v", st, err)
	}
	w.s3.Start()
	time.Sleep(2 * time.Second)
	commits := stop()
	mustNotStall(t, commits)
	w.flush()
	w.caughtUp()
	w.mustHoldArchived()
	w.takeImage()
	l := w.list()
	if len(l.Series[0].Gaps) != 0 || len(l.Series[0].Windows) != 1 {
		t.Errorf("expected one window and no gap, found %+v", l.Series[0])
	}
	r := w.restore("--latest")
	mustHold(w, r.conn(), "restored to the latest", commits[len(commits)-1].n)
}

// caughtUp waits until what PostgreSQL was told is safe is in the repository, not only in the temporary folder.
func (w *world) caughtUp() {
	w.t.Helper()
	w.eventually("what waited has reached the repository", 2*time.Minute, func() bool {
		st, err := w.status()
		return err == nil && st.WAL.Spool.Files == 0 && st.WAL.Pending == 0
	})
}

// TestUnreliableRepository injects errors and cut connections.
func TestUnreliableRepository(t *testing.T) {
	t.Parallel()
	w := newWorld(t, worldOptions{faults: true, cluster: pgtest.Options{Settings: map[string]string{"track_commit_timestamp": "on"}}})
	w.cluster.Exec(numberedTable)
	w.proxy.Set(s3test.Faults{Rate: 0.05})
	stop := w.load(200 * time.Millisecond)
	for range scaled(8) {
		w.takeImage()
		time.Sleep(time.Second)
	}
	commits := stop()
	mustNotStall(t, commits)
	w.flush()
	w.caughtUp()
	w.proxy.Set(s3test.Faults{})
	total, injected := w.proxy.Counts()
	t.Logf("faults in %d requests: %v", total, injected)
	w.proxy.Set(s3test.Faults{Rate: 0.05})
	w.mustHoldArchived()
	l := w.list()
	if len(l.Series[0].Gaps) != 0 || len(l.Series[0].Windows) != 1 {
		t.Errorf("expected one window and no gap, found %+v", l.Series[0])
	}
	r := w.restore("--latest") // through the faults as well
	mustHold(w, r.conn(), "restored to the latest", commits[len(commits)-1].n)
}

// mustNotStall checks that PostgreSQL went on committing. The machine is shared, so only a stall that a person would
// call one counts.
func mustNotStall(t *testing.T, commits []commit) {
	t.Helper()
	var worst time.Duration
	for i := 1; i < len(commits); i++ {
		worst = max(worst, commits[i].at.Sub(commits[i-1].at))
	}
	t.Logf("%d commits, the longest pause between two was %v", len(commits), worst)
	if worst > 10*time.Second {
		t.Errorf("PostgreSQL paused for %v between two commits", worst)
	}
}
