package acceptance

import (
	"context"
	"fmt"
	"sync"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/pgark/terraform-provider-pgark/internal/engine/postgres"
	"github.com/pgark/terraform-provider-pgark/test/pgtest"
)

// commit is one row of the writer: its number, when PostgreSQL says it was committed (the time that the commit record in
// the WAL holds), and the WAL position right after it.
type commit struct {
	n   int
	at  time.Time
	lsn postgres.LSN
}

// writer commits numbered rows until its context ends, and returns what it committed.
func (w *world) writer(ctx context.Context, pause time.Duration) []commit {
	c := w.cluster.Conn(w.ctx)
	defer c.Close(context.Background())
	var commits []commit
	for n := 1; ctx.Err() == nil; n++ {
		var xid, lsn string
		if err := c.QueryRow(w.ctx, "INSERT INTO numbered VALUES ($1::int, clock_timestamp(), repeat(md5($1::int::text), 20)) RETURNING txid_current()::text", n).Scan(&xid); err != nil {
			w.t.Errorf("insert %d: %v", n, err)
			break
		}
		k := commit{n: n}
		if err := c.QueryRow(w.ctx, "SELECT pg_xact_commit_timestamp($1::text::xid), pg_current_wal_lsn()::text", xid).Scan(&k.at, &lsn); err != nil {
			w.t.Errorf("commit time of %d: %v", n, err)
			break
		}
		var err error
		if k.lsn, err = postgres.ParseLSN(lsn); err != nil {
			w.t.Error(err)
			break
		}
		commits = append(commits, k)
		time.Sleep(pause)
	}
	return commits
}

// mustHold checks that a restored table holds exactly the rows 1 to n, unharmed.
func mustHold(w *world, c *pgx.Conn, what string, n int) {
	w.t.Helper()
	var count, most, bad int
	if err := c.QueryRow(w.ctx, "SELECT count(*), coalesce(max(n), 0), count(*) FILTER (WHERE body <> repeat(md5(n::text), 20)) FROM numbered").Scan(&count, &most, &bad); err != nil {
		w.t.Errorf("%s: %v", what, err)
		return
	}
	if count != n || most != n || bad != 0 {
		w.t.Errorf("%s: holds %d rows up to %d, %d of them damaged; expected exactly rows 1 to %d", what, count, most, bad, n)
	}
}

func TestPointInTime(t *testing.T) {
	t.Parallel()
	rng := random(t)
	w := newWorld(t, worldOptions{cluster: pgtest.Options{Settings: map[string]string{"track_commit_timestamp": "on", "shared_buffers": "32MB"}}})
	w.cluster.Exec("CREATE TABLE numbered (n int PRIMARY KEY, at timestamptz, body text)")

	ctx, stop := context.WithCancel(w.ctx)
	var commits []commit
	var wg sync.WaitGroup
	wg.Go(func() { commits = w.writer(ctx, 5*time.Millisecond) })
	first := w.takeImage()
	switcher := w.cluster.Conn(w.ctx)
	for range 3 {
		for range 3 {
			time.Sleep(700 * time.Millisecond)
			w.exec(switcher, "SELECT pg_switch_wal()")
		}
		w.takeImage()
	}
	time.Sleep(time.Second)
	stop()
	wg.Wait()
	w.flush()
	if len(commits) < 100 {
		t.Fatalf("the writer committed %d rows only", len(commits))
	}

	// A moment before the first image is complete cannot be restored; from there to the last commit each can.
	from, to := first.CompletedAt, commits[len(commits)-1].at
	for i := range scaled(30) {
		moment := from.Add(time.Duration(rng.Int64N(int64(to.Sub(from))))).Truncate(time.Microsecond)
		if i == 0 {
			moment = to // the very last commit is included
		}
		want := 0
		for _, c := range commits {
			if !c.at.After(moment) {
				want = c.n
			}
		}
		r := w.restore("--target-time", moment.UTC().Format(time.RFC3339Nano))
		mustHold(w, r.conn(), fmt.Sprintf("restored to %s", moment.UTC().Format(time.RFC3339Nano)), want)
		r.remove()
	}
	var after []commit
	for _, c := range commits {
		if c.lsn > first.StopLSN {
			after = append(after, c)
		}
	}
	for range scaled(10) {
		c := after[rng.IntN(len(after)-1)]
		r := w.restore("--target-lsn", c.lsn.String())
		mustHold(w, r.conn(), "restored to "+c.lsn.String(), c.n)
		r.remove()
	}
	r := w.restore("--latest")
	mustHold(w, r.conn(), "restored to the latest", commits[len(commits)-1].n)
}
