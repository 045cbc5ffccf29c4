package restore

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/pgark/terraform-provider-pgark/internal/engine/postgres"
	"github.com/pgark/terraform-provider-pgark/internal/engine/repository"
	"github.com/pgark/terraform-provider-pgark/test/pgtest"
)

const mib = postgres.SegmentSize(1 << 20)

// stream stores what the server has written of its present segment since from, as a tail; 0: since its start.
func (w *world) stream(from postgres.LSN) repository.Tail {
	w.t.Helper()
	line := strings.Split(w.cluster.Scalar("select pg_walfile_name(pg_current_wal_flush_lsn()) || ' ' || pg_current_wal_flush_lsn()"), " ")
	name := postgres.SegmentName(line[0])
	flushed, err := postgres.ParseLSN(line[1])
	if err != nil {
		w.t.Fatal(err)
	}
	b, err := os.ReadFile(filepath.Join(w.cluster.DataDir, "pg_wal", line[0]))
	if err != nil {
		w.t.Fatal(err)
	}
	start := name.Start(mib)
	clear(b[flushed-start:])
	scan := postgres.ScanSegment(name, mib, b)
	return w.putTail(name.Timeline(), max(from, start), scan.End, b[max(from, start)-start:scan.End-start], scan)
}

func (w *world) putTail(t postgres.Timeline, start, end postgres.LSN, b []byte, scan postgres.SegmentScan) repository.Tail {
	w.t.Helper()
	tail := repository.Tail{Timeline: t, Start: start, End: end}
	info := repository.WALInfo{Host: "db1"}
	if !scan.LastTime.IsZero() {
		info.FirstTime, info.LastTime = &scan.FirstTime, &scan.LastTime
	}
	if _, err := w.series.PutTail(w.t.Context(), tail, info, b); err != nil {
		w.t.Fatal(err)
	}
	return tail
}

func (w *world) windows() []Window {
	w.t.Helper()
	l, err := Catalog(w.t.Context(), w.repo, Filter{Job: "orders"})
	if err != nil {
		w.t.Fatal(err)
	}
	return l.Series[0].Windows
}

// removeWAL deletes the object of a WAL file.
func (w *world) removeWAL(name string) {
	w.t.Helper()
	objects, err := filepath.Glob(strings.TrimPrefix(w.store, "file://") + "/*/*/*/wal/*/" + name)
	if err != nil || len(objects) != 1 {
		w.t.Fatalf("object of %s: %v, %v", name, objects, err)
	}
	if err := os.Remove(objects[0]); err != nil {
		w.t.Fatal(err)
	}
}

func TestRun_tails(t *testing.T) {
	w := newWorld(t, pgtest.Options{WALSegmentSizeMB: 1, Settings: map[string]string{"wal_keep_size": "100MB"}})
	w.cluster.Exec(makeLog)
	w.image()
	first := w.write(5)
	tail := w.stream(0)
	got := w.windows()
	if len(got) != 1 || got[0].EndLSN != tail.End {
		t.Fatalf("windows: %v, expected an end at %s", got, tail.End)
	}
	w.mustRestore(w.options(Target{Kind: ToTime, Time: got[0].To})).mustHold(first.rows)
	w.mustRestore(w.options(Target{Kind: ToLSN, LSN: tail.End})).mustHold(first.rows)
	var unreachable *UnreachableError
	if _, err := w.restore(w.options(Target{Kind: ToLSN, LSN: tail.End + 1})); !errors.As(err, &unreachable) || !strings.Contains(err.Error(), "the archive ends at "+tail.End.String()) {
		t.Errorf("a position beyond: %v", err)
	}

	second := w.write(5)
	tail = w.stream(tail.End)
	w.mustRestore(w.options(Target{})).mustHold(second.rows)

	// The segment, whole, is lost; what was streamed of it is not. WAL behind it makes that a gap.
	name := string(postgres.SegmentAt(1, tail.Start, mib))
	w.write(5)
	w.ship()
	w.removeWAL(name)
	w.write(5)
	w.ship()
	behind := w.image()
	last := w.write(3)
	end := w.stream(0)
	got = w.windows()
	if len(got) != 2 || got[0].EndLSN != tail.End || got[1].StartLSN != behind.StopLSN || got[1].EndLSN != end.End {
		t.Fatalf("windows: %v, expected an end at %s, and one to %s", got, tail.End, end.End)
	}
	w.mustRestore(w.options(Target{Kind: ToTime, Time: got[0].To})).mustHold(second.rows)
	w.mustRestore(w.options(Target{})).mustHold(last.rows)
	o := w.options(Target{})
	var err error
	if o.Image, err = repository.ParseSID(w.images()[0]); err != nil {
		t.Fatal(err)
	}
	if _, err := w.restore(o); !errors.As(err, &unreachable) || !strings.Contains(err.Error(), tail.End.String()) {
		t.Errorf("across the gap: %v", err)
	}

	// Recovery by hand, without a target, does not take the gap for the end.
	segment := filepath.Join(t.TempDir(), "segment")
	out, code := w.command("wal", "fetch", "--repository="+w.store, "--series="+w.series.ID().String(), name, segment)
	if code <= 125 || !strings.Contains(out, "ends at "+tail.End.String()) {
		t.Errorf("fetch %s: exit code %d, %s", name, code, out)
	}

	// With the rest of the tails nothing is missing.
	b, err := os.ReadFile(filepath.Join(w.cluster.DataDir, "pg_wal", name))
	if err != nil {
		t.Fatal(err)
	}
	start, stop := postgres.SegmentName(name).Start(mib), postgres.SegmentName(name).End(mib)
	w.putTail(1, tail.End, stop, b[tail.End-start:], postgres.ScanSegment(postgres.SegmentName(name), mib, b))
	if got := w.windows(); len(got) != 1 {
		t.Errorf("windows: %v", got)
	}
	w.mustRestore(o).mustHold(last.rows)
}

func (w *world) images() []string {
	w.t.Helper()
	l, err := Catalog(w.t.Context(), w.repo, Filter{Job: "orders"})
	if err != nil {
		w.t.Fatal(err)
	}
	var ids []string
	for _, i := range l.Series[0].Images {
		ids = append(ids, i.ID)
	}
	return ids
}

// A cluster was lost while its last segment was only streamed. The copy that took its place goes on with that, and is
// itself streamed, and lost.
func TestRun_promotedFromTails(t *testing.T) {
	w := newWorld(t, pgtest.Options{WALSegmentSizeMB: 1})
	w.cluster.Exec(makeLog)
	w.image()
	old := w.write(5)
	end := w.stream(0)
	c := w.mustRestore(w.options(Target{}))
	c.mustHold(old.rows)
	newer := &world{t: t, root: w.root, store: w.store, repo: w.repo, series: w.series, state: t.TempDir()}
	newer.cluster = &pgtest.Cluster{DataDir: c.dir, SocketDir: w.cluster.SocketDir, Port: c.port, Owner: w.cluster.Owner, Major: w.cluster.Major, BinDir: w.cluster.BinDir}
	m := newer.write(4)
	file := c.scalar("select pg_walfile_name(pg_current_wal_flush_lsn())")
	flushed, err := postgres.ParseLSN(c.scalar("select pg_current_wal_flush_lsn()"))
	if err != nil {
		t.Fatal(err)
	}
	var at postgres.LSN
	for _, name := range []string{"00000002.history", file} {
		b, err := os.ReadFile(filepath.Join(c.dir, "pg_wal", name))
		if err != nil {
			t.Fatal(err)
		}
		if name != file {
			if _, _, err := w.series.PutWAL(t.Context(), repository.WALInfo{Name: name, Size: int64(len(b)), Host: "db2"}, strings.NewReader(string(b))); err != nil {
				t.Fatal(err)
			}
			continue
		}
		start := postgres.SegmentName(file).Start(mib)
		clear(b[flushed-start:])
		scan := postgres.ScanSegment(postgres.SegmentName(file), mib, b)
		at = scan.End
		w.putTail(2, start, at, b[:at-start], scan)
	}
	got := w.windows()
	if len(got) != 1 || got[0].Timeline != 2 || got[0].EndLSN != at {
		t.Fatalf("windows: %v, expected one on timeline 2 up to %s", got, at)
	}
	w.mustRestore(w.options(Target{})).mustHold(m.rows)
	o := w.options(Target{})
	o.Timeline = "1"
	w.mustRestore(o).mustHold(old.rows)
	if end.End > at {
		t.Errorf("timeline 1 ended at %s, timeline 2 at %s", end.End, at)
	}

	check := func() *WALCheck {
		t.Helper()
		r, err := CheckWAL(context.Background(), w.repo, Filter{}, nil)
		if err != nil {
			t.Fatal(err)
		}
		return r
	}
	if r := check(); !r.OK() || r.Objects < 4 || len(r.Windows) != 1 {
		t.Errorf("check: %+v", r)
	}
	objects, err := filepath.Glob(strings.TrimPrefix(w.store, "file://") + "/*/*/*/wal/00000002.history")
	if err != nil || len(objects) != 1 {
		t.Fatal(objects, err)
	}
	if err := os.Remove(objects[0]); err != nil {
		t.Fatal(err)
	}
	if r := check(); len(r.Missing) != 1 || r.Missing[0].Name != "00000002.history" || len(r.Windows) != 1 || r.Windows[0].Timeline != 1 {
		t.Errorf("check without the history: %+v", r)
	}
	o = w.options(Target{})
	o.Timeline = "2"
	var unreachable *UnreachableError
	if _, err := w.restore(o); !errors.As(err, &unreachable) || !strings.Contains(err.Error(), "00000002.history is missing") {
		t.Errorf("along a timeline without its history: %v", err)
	}
}
