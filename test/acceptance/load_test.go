package acceptance

import (
	"context"
	"fmt"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/pgark/terraform-provider-pgark/test/pgtest"
)

// TestImageUnderLoad takes a full image and ten increments under pgbench and DDL, restores each, and lets PostgreSQL's
// own tools judge.
func TestImageUnderLoad(t *testing.T) {
	t.Parallel()
	w := newWorld(t, worldOptions{cluster: pgtest.Options{DataChecksums: true, Tablespaces: []string{"elsewhere"}}})
	w.cluster.Run("pgbench", "-i", "-q", "-s", "4", "postgres")
	w.cluster.Exec("CREATE EXTENSION amcheck")

	ctx, stop := context.WithCancel(w.ctx)
	defer stop()
	var wg sync.WaitGroup
	wg.Go(func() {
		for ctx.Err() == nil {
			cmd := w.cluster.Command("pgbench", "-n", "-c", "8", "-j", "2", "-T", "5", "-R", "400", "postgres")
			if out, err := cmd.CombinedOutput(); err != nil && ctx.Err() == nil {
				t.Errorf("pgbench: %v\n%s", err, out)
				return
			}
		}
	})
	wg.Go(func() { w.ddl(ctx) })

	for i := range scaled(11) {
		img := w.takeImage()
		if want := map[bool]string{true: "full", false: "incremental"}[i == 0]; img.Kind != want {
			t.Errorf("image %d is %s, expected %s", i, img.Kind, want)
		}
		r := w.restoreImage(img)
		w.checkRestored(r)
		r.remove()
	}
	stop()
	wg.Wait()
}

// ddl does what confuses backup tools, over and over.
func (w *world) ddl(ctx context.Context) {
	c := w.cluster.Conn(w.ctx)
	defer c.Close(context.Background())
	for i := 3; ctx.Err() == nil; i++ {
		for _, sql := range []string{
			fmt.Sprintf("CREATE TABLE t%d AS SELECT i, md5(i::text) FROM generate_series(1, 5000) i", i),
			fmt.Sprintf("CREATE INDEX ON t%d (md5)", i),
			fmt.Sprintf("ALTER TABLE t%d SET TABLESPACE elsewhere", i),
			"SELECT lo_from_bytea(0, decode(repeat('c0ffee', 5000), 'hex'))",
			fmt.Sprintf("CREATE UNLOGGED TABLE u%d AS SELECT i FROM generate_series(1, 1000) i", i),
			fmt.Sprintf("CREATE DATABASE d%d", i),
			fmt.Sprintf("TRUNCATE t%d", i),
			fmt.Sprintf("INSERT INTO t%d SELECT i, md5(i::text) FROM generate_series(1, 2000) i", i),
			fmt.Sprintf("VACUUM FULL t%d", i),
			fmt.Sprintf("DROP TABLE IF EXISTS t%d", max(0, i-3)),
			fmt.Sprintf("DROP TABLE IF EXISTS u%d", max(0, i-1)),
			fmt.Sprintf("DROP DATABASE IF EXISTS d%d", max(0, i-2)),
			"VACUUM pgbench_branches, pgbench_tellers",
		} {
			if ctx.Err() != nil {
				return
			}
			if _, err := c.Exec(w.ctx, sql); err != nil {
				w.t.Errorf("%s: %v", sql, err)
				return
			}
		}
	}
}

// restoreImage restores an image to its own consistency and nothing later.
func (w *world) restoreImage(i image) *restored {
	w.t.Helper()
	dir := filepath.Join(pgtest.Dir(w.t), "elsewhere")
	return w.restore("--target-lsn", i.StopLSN.String(), "--tablespace-mapping", w.cluster.TablespaceDir("elsewhere")+"="+dir)
}

// checkRestored judges a restored cluster with PostgreSQL's tools.
func (w *world) checkRestored(r *restored) {
	w.t.Helper()
	c := r.conn()
	var accounts, branches, tellers, history int64
	if err := c.QueryRow(w.ctx, `SELECT (SELECT sum(abalance) FROM pgbench_accounts), (SELECT sum(bbalance) FROM pgbench_branches),
		(SELECT sum(tbalance) FROM pgbench_tellers), (SELECT coalesce(sum(delta), 0) FROM pgbench_history)`).Scan(&accounts, &branches, &tellers, &history); err != nil {
		w.t.Fatal(err)
	}
	if accounts != branches || accounts != tellers || accounts != history {
		w.t.Errorf("sums differ: accounts %d, branches %d, tellers %d, history %d", accounts, branches, tellers, history)
	}
	_ = c.Close(w.ctx)
	tool := func(name string, args ...string) {
		cmd := w.cluster.Command(name, args...)
		cmd.Env = append(cmd.Env, "PGHOST="+r.socket, fmt.Sprintf("PGPORT=%d", r.port))
		if out, err := cmd.CombinedOutput(); err != nil {
			w.t.Errorf("%s: %v\n%s", name, err, lastLines(string(out), 20))
		}
	}
	tool("pg_amcheck", "--heapallindexed", "postgres")
	stop := w.cluster.Command("pg_ctl", "-D", r.dir, "-m", "fast", "-w", "stop")
	if out, err := stop.CombinedOutput(); err != nil {
		w.t.Errorf("stop the restored server: %v\n%s", err, out)
	}
	tool("pg_checksums", "--check", "-D", r.dir)
}

func lastLines(s string, n int) string {
	lines := strings.Split(strings.TrimSpace(s), "\n")
	return strings.Join(lines[max(0, len(lines)-n):], "\n")
}

// TestIncrementUploadsWhatChanged bounds what an increment costs.
func TestIncrementUploadsWhatChanged(t *testing.T) {
	t.Parallel()
	w := newWorld(t, worldOptions{cluster: pgtest.Options{DataChecksums: true, Settings: map[string]string{"autovacuum": "off"}}})
	w.cluster.Run("pgbench", "-i", "-q", "-s", "10", "-F", "90", "postgres")
	c := w.cluster.Conn(w.ctx)
	w.exec(c, "VACUUM FREEZE pgbench_accounts")
	w.exec(c, "CHECKPOINT")
	full := w.takeImage()
	// Files that were written shortly before an image are read again by the next one; let them grow cold.
	time.Sleep(3 * time.Second)
	second := w.takeImage()
	if second.StoredBytes > full.StoredBytes/4 {
		t.Errorf("an increment without changes stored %d bytes, the full image %d", second.StoredBytes, full.StoredBytes)
	}
	pages := scalar[int64](w, c, "SELECT pg_relation_size('pgbench_accounts') / 8192")
	tag, err := c.Exec(w.ctx, "UPDATE pgbench_accounts SET abalance = abalance + 1 WHERE aid % 5500 = 7")
	w.must(err)
	w.exec(c, "CHECKPOINT")
	third := w.takeImage()
	changed := tag.RowsAffected() * 8192
	t.Logf("%d of %d pages changed (%d bytes); full stored %d, increment read %d and stored %d", tag.RowsAffected(), pages, changed, full.StoredBytes, third.ReadBytes, third.StoredBytes)
	if third.StoredBytes > 3*changed {
		t.Errorf("the increment stored %d bytes for %d bytes of changed pages: more than three times as much", third.StoredBytes, changed)
	}
	if third.Kind != "incremental" {
		t.Errorf("the third image is %s", third.Kind)
	}
}
