package postgres_test

import (
	"bufio"
	"context"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/pgark/terraform-provider-pgark/internal/engine/postgres"
	"github.com/pgark/terraform-provider-pgark/test/pgtest"
)

// waldumped is what pg_waldump says of one segment.
type waldumped struct {
	records       int64
	first, last   postgres.LSN
	early, late   time.Time
	restorePoints []string
	switched      bool
}

var waldumpLine = regexp.MustCompile(`^rmgr: (\S+)\s+len \(rec/tot\):\s*\d+/\s*(\d+), tx:\s*\d+, lsn: (\S+), prev \S+, desc: (\S+)(.*)$`)

// waldump runs pg_waldump on a segment. Its errors are expected: it ends at the segment's last record.
func waldump(t *testing.T, c *pgtest.Cluster, segment string, size postgres.SegmentSize) waldumped {
	t.Helper()
	name := postgres.SegmentName(filepath.Base(segment))
	cmd := c.Command("pg_waldump", segment)
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	var w waldumped
	lines := bufio.NewScanner(out)
	lines.Buffer(nil, 1<<20)
	for lines.Scan() {
		m := waldumpLine.FindStringSubmatch(lines.Text())
		if m == nil {
			t.Fatalf("pg_waldump printed %q", lines.Text())
		}
		lsn, err := postgres.ParseLSN(m[3])
		if err != nil {
			t.Fatal(err)
		}
		if lsn >= name.End(size) {
			t.Fatalf("pg_waldump left the segment: %s", lines.Text())
		}
		w.records++
		if w.first == 0 {
			w.first = lsn
		}
		w.last = lsn
		note := func(s string) {
			at, err := time.Parse("2006-01-02 15:04:05.999999 MST", s)
			if err != nil {
				t.Fatalf("pg_waldump time %q: %v", s, err)
			}
			if w.early.IsZero() || at.Before(w.early) {
				w.early = at
			}
			if at.After(w.late) {
				w.late = at
			}
		}
		stamp := regexp.MustCompile(`\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d+ \w+`)
		switch m[1] + " " + m[4] {
		case "Transaction COMMIT", "Transaction ABORT", "Transaction COMMIT_PREPARED", "Transaction ABORT_PREPARED":
			note(stamp.FindString(m[5]))
		case "XLOG RESTORE_POINT":
			w.restorePoints = append(w.restorePoints, strings.TrimSpace(m[5]))
		case "XLOG SWITCH":
			w.switched = true
		}
	}
	_ = cmd.Wait()
	return w
}

// writeWAL fills a few segments with every kind of record that the scan cares about.
func writeWAL(t *testing.T, c *pgtest.Cluster) {
	t.Helper()
	ctx := context.Background()
	conn := c.Conn(ctx)
	run := func(sql string) {
		t.Helper()
		if _, err := conn.Exec(ctx, sql); err != nil {
			t.Fatalf("%s: %v", sql, err)
		}
	}
	run("create table t (id bigint generated always as identity primary key, v text)")
	run("create table big (v text)")
	run("alter table big alter v set storage external")
	for i := range 6 {
		run("insert into t (v) select repeat(md5(g::text), 3) from generate_series(1, 2000) g")
		run(fmt.Sprintf("select pg_create_restore_point('point %d')", i))
		run("begin; insert into t (v) values ('x'); savepoint a; insert into t (v) values ('y'); rollback to a; commit")
		run("begin; insert into t (v) values ('x'); rollback")
		run(fmt.Sprintf("begin; insert into t (v) values ('p'); prepare transaction 'p%d'", i))
		if i%2 == 0 {
			run(fmt.Sprintf("commit prepared 'p%d'", i))
		} else {
			run(fmt.Sprintf("rollback prepared 'p%d'", i))
		}
		run("update t set v = v || 'z' where id % 7 = 0")
		// A record over many pages.
		run("select pg_logical_emit_message(false, 'long', repeat('w', 300000))")
		run("create table gone (a int)")
		run("drop table gone")
		if i == 3 {
			run("select pg_switch_wal()")
			run("checkpoint")
		}
	}
	run("select pg_switch_wal()")
	run("insert into t (v) values ('in the next segment')")
}

// segments lists the finished segments of a cluster: all but the last that is in use.
func segments(t *testing.T, c *pgtest.Cluster) []string {
	t.Helper()
	current := c.Scalar("select pg_walfile_name(pg_current_wal_lsn())")
	entries, err := os.ReadDir(c.WALDir)
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, e := range entries {
		if f, err := postgres.ParseWALFile(e.Name()); err == nil && f.Kind == postgres.SegmentFile && e.Name() < current {
			names = append(names, e.Name())
		}
	}
	slices.Sort(names)
	return names
}

func TestScanSegment_agreesWithWaldump(t *testing.T) {
	t.Parallel()
	for _, mb := range []int{1, 16} {
		t.Run(strconv.Itoa(mb)+"MB", func(t *testing.T) {
			t.Parallel()
			c := pgtest.Start(t, pgtest.Options{WALSegmentSizeMB: mb, Settings: map[string]string{
				"max_prepared_transactions": "5", "wal_keep_size": "1GB", "timezone": "UTC", "wal_level": "logical",
			}})
			c.Tool("pg_waldump")
			writeWAL(t, c)
			size := postgres.SegmentSize(mb << 20)
			names := segments(t, c)
			if len(names) < 2 {
				t.Fatalf("found %d segments", len(names))
			}
			var points []string
			for _, name := range names {
				path := filepath.Join(c.WALDir, name)
				b, err := os.ReadFile(path)
				if err != nil {
					t.Fatal(err)
				}
				if _, err := postgres.CheckSegment(postgres.SegmentName(name), int64(len(b)), b, c.SystemID); err != nil {
					t.Error(err)
				}
				s := postgres.ScanSegment(postgres.SegmentName(name), size, b)
				if s.Problem != nil {
					t.Fatal(s.Problem)
				}
				w := waldump(t, c, path, size)
				for _, p := range s.RestorePoints {
					points = append(points, p.Name)
				}
				if s.Continues {
					// pg_waldump, given one file, does not show the record that it cannot read to its end.
					if s.End >= postgres.SegmentName(name).End(size) {
						t.Errorf("%s: End %s although a record goes on in the next", name, s.End)
					}
				}
				if s.Records != w.records || s.First != w.first || s.Switched != w.switched {
					t.Errorf("%s: found %d records from %s, switched %v; pg_waldump %d from %s, %v",
						name, s.Records, s.First, s.Switched, w.records, w.first, w.switched)
				}
				if s.End <= w.last || s.Last != w.last {
					t.Errorf("%s: last record at %s, End %s; pg_waldump last %s", name, s.Last, s.End, w.last)
				}
				var found []string
				for _, p := range s.RestorePoints {
					found = append(found, p.Name)
				}
				if !slices.Equal(found, w.restorePoints) {
					t.Errorf("%s: found restore points %q, pg_waldump %q", name, found, w.restorePoints)
				}
				if len(found) == 0 && (!s.FirstTime.Equal(w.early) || !s.LastTime.Equal(w.late)) {
					t.Errorf("%s: found times %s to %s, pg_waldump %s to %s", name, s.FirstTime, s.LastTime, w.early, w.late)
				}
				if len(found) > 0 && (s.FirstTime.After(w.early) || s.LastTime.Before(w.late)) {
					t.Errorf("%s: found times %s to %s, pg_waldump %s to %s without restore points", name, s.FirstTime, s.LastTime, w.early, w.late)
				}
				checkEveryChunking(t, name, size, b, s)
			}
			if len(points) != 6 {
				t.Errorf("found restore points %q, expected 6", points)
			}
		})
	}
}

// checkEveryChunking feeds the segment in pieces of odd sizes.
func checkEveryChunking(t *testing.T, name string, size postgres.SegmentSize, b []byte, expected postgres.SegmentScan) {
	t.Helper()
	for _, chunk := range []int{1000, 8191, 8192, 8193, 100_003} {
		s := postgres.NewSegmentScanner(postgres.SegmentName(name), size)
		for part := range slices.Chunk(b, chunk) {
			if n, err := s.Write(part); n != len(part) || err != nil {
				t.Fatalf("Write: %d, %v", n, err)
			}
		}
		if got := s.Result(); fmt.Sprint(got) != fmt.Sprint(expected) {
			t.Errorf("%s in chunks of %d: found %+v, expected %+v", name, chunk, got, expected)
		}
	}
}
