package restore

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"filippo.io/age"

	"github.com/pgark/terraform-provider-pgark/internal/engine/wal"
	"github.com/pgark/terraform-provider-pgark/test/pgtest"
)

const makeLog = "create table public.log (id bigint generated always as identity, filler text)"

func TestRun_targets(t *testing.T) {
	w := newWorld(t, pgtest.Options{DataChecksums: true, Tablespaces: []string{"fast"}, SeparateConfig: true})
	w.cluster.Exec(makeLog)
	w.cluster.Exec("create table public.spaced tablespace fast as select generate_series(1, 1000) n")
	w.image()
	first := w.write(20)
	incremental := w.image()
	var moments []moment
	for i := range 4 {
		moments = append(moments, w.write(10))
		if i == 1 {
			w.cluster.Exec("select pg_create_restore_point('half')")
		}
		time.Sleep(2 * time.Millisecond)
	}
	w.ship()
	mapping := func(o Options) Options {
		o.TablespaceMapping = map[string]string{w.cluster.TablespaceDir("fast"): filepath.Join(filepath.Dir(o.DataDirectory), "fast")}
		return o
	}

	t.Run("time", func(t *testing.T) {
		m := moments[1]
		c := w.mustRestore(mapping(w.options(Target{Kind: ToTime, Time: m.time})))
		c.mustHold(m.rows)
		if c.Image != incremental.SID.String() || c.State != "promoted" || c.Timeline != 2 {
			t.Errorf("found image %s, state %s, timeline %d, expected %s, promoted, 2", c.Image, c.State, c.Timeline, incremental.SID)
		}
		if c.ReachedTime == nil || c.ReachedTime.After(m.time) || m.time.Sub(*c.ReachedTime) > time.Second {
			t.Errorf("reached time: found %v, expected shortly before %v", c.ReachedTime, m.time)
		}
		if c.ReachedLSN == nil || *c.ReachedLSN > moments[2].lsn || *c.ReachedLSN < moments[0].lsn {
			t.Errorf("reached LSN: found %v, expected about %v", c.ReachedLSN, m.lsn)
		}
		if got := c.scalar("select sum(n) from public.spaced"); got != "500500" {
			t.Errorf("table in a tablespace: found sum %s", got)
		}
		if got := c.scalar("select pg_tablespace_location(oid) from pg_tablespace where spcname = 'fast'"); got != filepath.Join(filepath.Dir(c.dir), "fast") {
			t.Errorf("tablespace: found it in %s", got)
		}
		for name, want := range map[string]string{
			"archive_mode": "off", "data_directory": c.dir, "hba_file": c.dir + "/pg_hba.conf", "config_file": c.dir + "/postgresql.conf",
		} {
			if got := c.scalar("select current_setting('" + name + "')"); got != want {
				t.Errorf("%s: found %q, expected %q", name, got, want)
			}
		}
		auto, err := os.ReadFile(filepath.Join(c.dir, "postgresql.auto.conf"))
		if err != nil || strings.Contains(string(auto), "recovery_target") || strings.Contains(string(auto), "restore_command") {
			t.Errorf("postgresql.auto.conf after recovery: %v\n%s", err, auto)
		}
		for _, left := range []string{markerName, "recovery.signal", "backup_label", "pg_wal/.pgark-restore"} {
			if _, err := os.Lstat(filepath.Join(c.dir, left)); err == nil {
				t.Errorf("%s is left", left)
			}
		}
		head, err := w.series.Head(t.Context())
		if err != nil || len(head.Sessions) != 0 {
			t.Errorf("sessions after the restore: %v, %v", head.Sessions, err)
		}
	})
	t.Run("time before the second image", func(t *testing.T) {
		c := w.mustRestore(mapping(w.options(Target{Kind: ToTime, Time: first.time})))
		c.mustHold(first.rows)
	})
	t.Run("LSN", func(t *testing.T) {
		m := moments[0]
		c := w.mustRestore(mapping(w.options(Target{Kind: ToLSN, LSN: m.lsn, Exclusive: true})))
		c.mustHold(m.rows)
		if c.ReachedLSN == nil || *c.ReachedLSN != m.lsn {
			t.Errorf("reached LSN: found %v, expected %s", c.ReachedLSN, m.lsn)
		}
	})
	t.Run("transaction", func(t *testing.T) {
		c := w.mustRestore(mapping(w.options(Target{Kind: ToXID, XID: moments[2].xid})))
		c.mustHold(moments[2].rows)
	})
	t.Run("name", func(t *testing.T) {
		c := w.mustRestore(mapping(w.options(Target{Kind: ToName, Name: "half"})))
		c.mustHold(moments[1].rows)
	})
	t.Run("immediate, paused", func(t *testing.T) {
		o := mapping(w.options(Target{Kind: Immediate}))
		o.TargetAction = ActionPause
		c := w.mustRestore(o)
		c.mustHold(first.rows)
		if c.State != "paused" || c.scalar("select pg_is_in_recovery()") != "true" {
			t.Errorf("found state %s", c.State)
		}
	})
	t.Run("latest, elsewhere", func(t *testing.T) {
		o := mapping(w.options(Target{}))
		o.WALDirectory = filepath.Join(filepath.Dir(o.DataDirectory), "wal")
		c := w.mustRestore(o)
		c.mustHold(moments[3].rows)
		if link, err := os.Readlink(filepath.Join(c.dir, "pg_wal")); err != nil || link != o.WALDirectory {
			t.Errorf("pg_wal: found a link to %q (%v)", link, err)
		}
	})
	t.Run("the very end as a time", func(t *testing.T) {
		l, err := Catalog(t.Context(), w.repo, Filter{})
		if err != nil {
			t.Fatal(err)
		}
		if len(l.Series) != 1 || len(l.Series[0].Windows) != 1 || len(l.Series[0].Images) != 2 || len(l.Series[0].Gaps) != 0 {
			t.Fatalf("catalog: %+v", l)
		}
		c := w.mustRestore(mapping(w.options(Target{Kind: ToTime, Time: l.Series[0].Windows[0].To})))
		c.mustHold(moments[3].rows)
	})
	t.Run("not started", func(t *testing.T) {
		o := mapping(w.options(Target{Kind: ToTime, Time: moments[2].time}))
		o.Start = false
		c := w.mustRestore(o)
		if c.State != "restored" || c.ReachedLSN != nil {
			t.Errorf("found %+v", c.Result)
		}
		pg := pgtest.Start(t, pgtest.Options{Major: w.cluster.Major, DataDir: c.dir})
		for deadline := time.Now().Add(30 * time.Second); pg.Scalar("select pg_is_in_recovery()") == "t"; time.Sleep(20 * time.Millisecond) {
			if time.Now().After(deadline) {
				t.Fatal("recovery does not end")
			}
		}
		if got := pg.Scalar("select count(*) from public.log"); got != fmt.Sprint(moments[2].rows) {
			t.Errorf("found %s rows, expected %d", got, moments[2].rows)
		}
	})
	t.Run("command", func(t *testing.T) {
		dir := filepath.Join(pgtest.Dir(t), "restored")
		target := []string{"restore", "--repository=" + w.store, "--series=orders", "--data-directory=" + dir, "--json"}
		fast := "--tablespace-mapping=" + w.cluster.TablespaceDir("fast") + "=" + filepath.Join(filepath.Dir(dir), "fast")
		out, code := w.command("list", "--repository="+w.store, "--json")
		if code != 0 || !strings.Contains(out, `"status": "restorable"`) || !strings.Contains(out, `"windows"`) {
			t.Errorf("list: exit %d\n%s", code, out)
		}
		out, code = w.command("list", "--repository="+w.store)
		if code != 0 || !strings.Contains(out, "every moment can be restored") {
			t.Errorf("list: exit %d\n%s", code, out)
		}
		t.Log(out)
		out, code = w.command(append(target, "--target-time=2001-01-01 00:00:00+00")...)
		if code != 3 || !strings.Contains(out, "hint: what can be restored:\n") {
			t.Errorf("an unreachable target: exit %d\n%s", code, out)
		}
		if out, code = w.command(append(target, "--target-time=soon")...); code != 2 {
			t.Errorf("no time: exit %d\n%s", code, out)
		}
		target = append(target, fast, "--target-time="+moments[0].time.Format(time.RFC3339Nano))
		if out, code = w.command(append(target, "--dry-run")...); code != 0 || !strings.Contains(out, `"state": "planned"`) {
			t.Errorf("dry run: exit %d\n%s", code, out)
		}
		port := 20000 + rand.IntN(30000)
		t.Cleanup(func() { stopServer(t, dir) })
		if out, code = w.command(append(target, "--start", fmt.Sprintf("--port=%d", port), "--bin-directory="+w.cluster.BinDir)...); code != 0 || !strings.Contains(out, `"state": "promoted"`) {
			t.Fatalf("restore: exit %d\n%s", code, out)
		}
		(&restored{Result: &Result{Target: "the first"}, w: w, dir: dir, port: port}).mustHold(moments[0].rows)
	})
	t.Run("refusals", func(t *testing.T) {
		o := w.options(Target{Kind: ToTime, Time: moments[3].time.Add(time.Hour)})
		_, err := w.restore(o)
		var unreachable *UnreachableError
		if !errors.As(err, &unreachable) || len(unreachable.Windows) != 1 || !strings.Contains(err.Error(), "the last commit known is of") {
			t.Errorf("a time beyond the end: %v", err)
		}
		o.Target = Target{Kind: ToTime, Time: time.Now().Add(-time.Hour)}
		if _, err = w.restore(o); !errors.As(err, &unreachable) {
			t.Errorf("a time before the beginning: %v", err)
		}
		o.Target = Target{Kind: ToLSN, LSN: moments[3].lsn + 1<<30}
		if _, err = w.restore(o); !errors.As(err, &unreachable) || !strings.Contains(err.Error(), "the archive ends at") {
			t.Errorf("an LSN beyond the end: %v", err)
		}
		o.Target = Target{Kind: ToName, Name: "nowhere"}
		if _, err = w.restore(o); !errors.As(err, &unreachable) {
			t.Errorf("an unknown name: %v", err)
		}
		if _, err := os.Lstat(o.DataDirectory); err == nil {
			t.Error("a refused restore touched its directory")
		}
		o.Target = Target{}
		var full *NotEmptyError
		if _, err = w.restore(o); !errors.As(err, &full) || !strings.HasPrefix(full.What, "tablespace") {
			t.Errorf("a tablespace that is in use: %v", err)
		}
		o.DataDirectory = w.cluster.DataDir
		if _, err = w.restore(mapping(o)); !errors.As(err, &full) || full.What != "data directory" {
			t.Errorf("a data directory that is in use: %v", err)
		}
		if !w.cluster.Running() {
			t.Error("the original server is gone")
		}
	})
}

func TestRun_gap(t *testing.T) {
	w := newWorld(t, pgtest.Options{WALSegmentSizeMB: 1})
	w.cluster.Exec(makeLog)
	w.image()
	before := w.write(5)
	w.ship()
	w.write(5)
	lost := w.cluster.Scalar("select pg_walfile_name(pg_current_wal_lsn())")
	w.ship()
	w.write(5)
	w.ship()
	behind := w.image()
	last := w.write(5)
	w.ship()
	objects, err := filepath.Glob(strings.TrimPrefix(w.store, "file://") + "/*/*/*/wal/*/" + lost + "*")
	if err != nil || len(objects) != 1 {
		t.Fatalf("object of %s: %v, %v", lost, objects, err)
	}
	if err := os.Remove(objects[0]); err != nil {
		t.Fatal(err)
	}

	l, err := Catalog(t.Context(), w.repo, Filter{Job: "orders"})
	if err != nil {
		t.Fatal(err)
	}
	s := l.Series[0]
	if len(s.Windows) != 2 || len(s.Gaps) != 1 || s.Gaps[0].Segments != 1 || s.Gaps[0].From == nil || s.Gaps[0].To == nil {
		t.Fatalf("catalog with a gap: %+v", s)
	}
	if s.Windows[1].StartLSN != behind.StopLSN || s.Windows[0].EndLSN != s.Gaps[0].StartLSN {
		t.Errorf("windows: %+v", s.Windows)
	}

	// The end of the first window is as good as any other moment, and what comes behind the gap is no part of it.
	c := w.mustRestore(w.options(Target{Kind: ToTime, Time: s.Windows[0].To}))
	c.mustHold(before.rows)
	c = w.mustRestore(w.options(Target{}))
	c.mustHold(last.rows)

	o := w.options(Target{Kind: ToLSN, LSN: behind.StartLSN - 1})
	var unreachable *UnreachableError
	if _, err := w.restore(o); !errors.As(err, &unreachable) || !strings.Contains(err.Error(), lost) {
		t.Errorf("a position behind the gap: %v", err)
	}
}

func TestRun_majors(t *testing.T) {
	for _, major := range pgtest.Majors {
		t.Run(fmt.Sprint(major), func(t *testing.T) {
			t.Parallel()
			w := newWorld(t, pgtest.Options{Major: major, SeparateWAL: major%2 == 0, DataChecksums: major%2 == 1})
			w.cluster.Exec(makeLog)
			w.image()
			m := w.write(5)
			time.Sleep(2 * time.Millisecond)
			w.write(5)
			w.ship()
			c := w.mustRestore(w.options(Target{Kind: ToTime, Time: m.time}))
			c.mustHold(m.rows)
			if c.State != "promoted" || c.Timeline != 2 || c.ReachedTime == nil || c.ReachedLSN == nil {
				t.Errorf("found %+v", c.Result)
			}
		})
	}
}

// A restored and promoted copy goes on under a timeline of its own; the series then has two ends.
func TestRun_timelines(t *testing.T) {
	w := newWorld(t, pgtest.Options{WALSegmentSizeMB: 1})
	w.cluster.Exec(makeLog)
	w.image()
	fork := w.write(5)
	time.Sleep(2 * time.Millisecond)
	old := w.write(5)
	w.ship()
	c := w.mustRestore(w.options(Target{Kind: ToTime, Time: fork.time}))
	c.mustHold(fork.rows)

	// What archive_command would ship of the copy.
	newer := &world{t: t, root: w.root, store: w.store, repo: w.repo, series: w.series, state: t.TempDir()}
	newer.cluster = &pgtest.Cluster{DataDir: c.dir, SocketDir: w.cluster.SocketDir, Port: c.port, Owner: w.cluster.Owner, Major: w.cluster.Major, BinDir: w.cluster.BinDir}
	m := newer.write(1)
	segment := c.scalar("select pg_walfile_name(pg_switch_wal())")
	shipper, err := wal.New(wal.Options{Series: w.series, DataDirectory: c.dir, SystemID: w.cluster.SystemID, SegmentSize: 1 << 20, Repository: w.store, Host: "db2"})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	var running sync.WaitGroup
	running.Go(func() { _ = shipper.Run(ctx) }) // ends with ctx
	defer running.Wait()
	defer cancel()
	names, err := filepath.Glob(filepath.Join(c.dir, "pg_wal", "00000002*"))
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range names {
		if base := filepath.Base(name); base == "00000002.history" || base <= segment {
			if _, err := shipper.Ship(t.Context(), name); err != nil {
				t.Fatal(err)
			}
		}
	}

	l, err := Catalog(t.Context(), w.repo, Filter{})
	if err != nil {
		t.Fatal(err)
	}
	if got := l.Series[0].Windows; len(got) != 2 || got[0].Timeline != 1 || got[1].Timeline != 2 {
		t.Fatalf("windows: %v", got)
	}
	c = w.mustRestore(w.options(Target{}))
	c.mustHold(m.rows)
	if c.Timeline != 3 {
		t.Errorf("found timeline %d, expected 3", c.Timeline)
	}
	o := w.options(Target{})
	o.Timeline = "1"
	w.mustRestore(o).mustHold(old.rows)
}

// A restore point shows that the time has passed, but PostgreSQL stops at commits only.
func TestRun_timeWithoutCommitBehind(t *testing.T) {
	w := newWorld(t, pgtest.Options{})
	w.cluster.Exec(makeLog)
	w.image()
	m := w.write(3)
	time.Sleep(20 * time.Millisecond)
	w.cluster.Exec("select pg_create_restore_point('later')")
	w.ship()
	c := w.mustRestore(w.options(Target{Kind: ToTime, Time: m.time.Add(10 * time.Millisecond)}))
	c.mustHold(m.rows)
	if c.State != "promoted" {
		t.Errorf("found state %s", c.State)
	}

	var early *EndedEarlyError
	o := w.options(Target{Kind: ToXID, XID: "4000000000"})
	if _, err := w.restore(o); !errors.As(err, &early) || early.LSN < m.lsn-1<<20 || early.Time.IsZero() {
		t.Errorf("a transaction that never was: %v", err)
	}
}

func TestRun_encrypted(t *testing.T) {
	identity, err := age.GenerateX25519Identity()
	if err != nil {
		t.Fatal(err)
	}
	w := newWorld(t, pgtest.Options{}, identity)
	w.cluster.Exec(makeLog)
	w.image()
	m := w.write(3)
	w.ship()
	w.mustRestore(w.options(Target{})).mustHold(m.rows)

	// Without the identity everything can be listed, and nothing restored.
	out, code := w.command("list", "--repository="+w.store, "--json")
	if code != 0 || !strings.Contains(out, `"status": "restorable"`) {
		t.Errorf("list: exit %d\n%s", code, out)
	}
	dir := filepath.Join(pgtest.Dir(t), "restored")
	out, code = w.command("restore", "--repository="+w.store, "--data-directory="+dir)
	if code != 1 || !strings.Contains(out, "identit") {
		t.Errorf("restore without an identity: exit %d\n%s", code, out)
	}
	if _, err := os.Lstat(dir); err == nil {
		t.Error("a refused restore touched its directory")
	}
}

func TestRun_interrupted(t *testing.T) {
	w := newWorld(t, pgtest.Options{})
	w.cluster.Exec(makeLog)
	w.image()
	w.ship()
	o := w.options(Target{})
	ctx, cancel := context.WithCancel(t.Context())
	o.Progress = func(p Progress) {
		if p.Phase == Fetching {
			cancel()
		}
	}
	if _, err := Run(ctx, o); !errors.Is(err, context.Canceled) {
		t.Fatalf("found %v, expected it to be interrupted", err)
	}
	if _, err := os.Lstat(filepath.Join(o.DataDirectory, "global", "pg_control")); err == nil {
		t.Error("an unfinished data directory has a pg_control")
	}
	o.Progress = nil
	var left *NotEmptyError
	if _, err := Run(t.Context(), o); !errors.As(err, &left) || !strings.Contains(err.Error(), "holds what an interrupted restore left (of image 0000000000000001 of orders/main/") {
		t.Errorf("a repeated restore: %v", err)
	}
	head, err := w.series.Head(t.Context())
	if err != nil || len(head.Sessions) != 0 {
		t.Errorf("sessions: %v, %v", head.Sessions, err)
	}
}
