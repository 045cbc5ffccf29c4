package acceptance

import (
	"context"
	"fmt"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/pgark/terraform-provider-pgark/internal/engine/daemon/control"
	"github.com/pgark/terraform-provider-pgark/internal/engine/postgres"
	"github.com/pgark/terraform-provider-pgark/test/pgtest"
)

// idleVariable names how long TestIdle is idle, as in "1h"; a minute by default.
const idleVariable = "PGARK_IDLE"

// idleRequests is what an idle server may ask of the repository in an hour.
const idleRequests = 100

// TestIdle protects a server that does nothing: hardly a request reaches the store, the replication connection stands
// however long no position moves, and the first commit behind that is durable as fast as any other.
func TestIdle(t *testing.T) {
	t.Parallel()
	idle := time.Minute
	if v := os.Getenv(idleVariable); v != "" {
		var err error
		if idle, err = time.ParseDuration(v); err != nil {
			t.Fatalf("%s: %v", idleVariable, err)
		}
	}
	// What autovacuum does with what the test itself has written is no idling.
	w := newWorld(t, worldOptions{faults: true, cluster: pgtest.Options{Settings: map[string]string{"autovacuum": "off"}}})
	var cancel context.CancelFunc
	w.ctx, cancel = context.WithTimeout(t.Context(), idle+10*time.Minute)
	defer cancel()
	w.cluster.Exec("CREATE TABLE t (n int)")
	w.takeImage()
	w.flush()
	// The last of what follows from work: a checkpoint, and within 15 seconds a snapshot of running transactions
	// (LOG_SNAPSHOT_INTERVAL_MS in bgwriter.c).
	w.cluster.Exec("CHECKPOINT")
	time.Sleep(16 * time.Second)
	settled := func() *control.Status {
		var s *control.Status
		w.eventually("all is streamed", time.Minute, func() bool {
			var err error
			s, err = w.status()
			return err == nil && s.WAL.State == control.WALStreaming && s.WAL.LagBytes == 0 && s.WAL.LagSeconds == 0
		})
		return s
	}
	before := settled()
	const sender = "SELECT pid || ' ' || backend_start FROM pg_stat_replication"
	senderBefore := w.cluster.Scalar(sender)
	requests, _ := w.proxy.Counts()

	began := time.Now()
	for end := began.Add(idle); time.Now().Before(end); time.Sleep(min(10*time.Second, time.Until(end)) + time.Millisecond) {
		s, err := w.status() // somebody watches: that is free, too
		w.must(err)
		if s.WAL.State != control.WALStreaming || s.WAL.LagSeconds > 5 {
			t.Errorf("after %s: %+v", time.Since(began), s.WAL)
		}
	}
	now, _ := w.proxy.Counts()
	after := settled()
	// What is allowed of a minute is one or two; one is the price of a single piece of WAL.
	allowed := int(idleRequests*idle/time.Hour) + 1
	t.Logf("%d requests in %s", now-requests, idle)
	if now-requests > allowed {
		t.Errorf("%d requests in %s of doing nothing, expected at most %d", now-requests, idle, allowed)
	}
	if s, a := before.WAL.Stream, after.WAL.Stream; a.Restarts != s.Restarts || !a.Since.Equal(*s.Since) {
		t.Errorf("the receiver was restarted: %+v before, %+v after", s, a)
	}
	if got := w.cluster.Scalar(sender); got != senderBefore {
		t.Errorf("the walsender is %s, expected %s as before", got, senderBefore)
	}
	if heard := after.WAL.Stream.LastAt; heard == nil || time.Since(*heard) > time.Minute {
		t.Errorf("PostgreSQL was heard at %v, expected a sign of life within a minute", heard)
	}

	shown, err := w.pgark("metrics", "--job", jobName)
	w.must(err)
	for _, line := range []string{
		fmt.Sprintf(`pgark_up{instance=%q,job=%q} 1`, w.instance, jobName),
		fmt.Sprintf(`pgark_wal_state{instance=%q,job=%q,state="streaming"} 1`, w.instance, jobName),
		fmt.Sprintf(`pgark_wal_lag_seconds{instance=%q,job=%q} 0`, w.instance, jobName),
	} {
		if !strings.Contains(string(shown), line+"\n") {
			t.Errorf("metrics lack %s:\n%s", line, shown)
		}
	}
	if shown, err = w.pgark("status", "--job", jobName); err != nil || !strings.Contains(string(shown), "streaming for") {
		t.Errorf("status says %v:\n%s", err, shown)
	}

	w.cluster.Exec("INSERT INTO t VALUES (1)")
	at, err := postgres.ParseLSN(w.cluster.Scalar("SELECT pg_current_wal_insert_lsn()"))
	w.must(err)
	committed := time.Now()
	w.eventually("the commit is durable", time.Minute, func() bool {
		s, err := w.status()
		w.must(err)
		durable, err := postgres.ParseLSN(s.WAL.DurableLSN)
		return err == nil && durable >= at
	})
	// max_lag, and what a machine takes that is busy with other tests.
	if took := time.Since(committed); took > 4*time.Second {
		t.Errorf("the commit behind the idle time was durable after %s", took)
	}
}
