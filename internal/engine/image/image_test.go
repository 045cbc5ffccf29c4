package image

import (
	"bytes"
	"context"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/pgark/terraform-provider-pgark/internal/engine/postgres"
	"github.com/pgark/terraform-provider-pgark/internal/engine/repository"
	"github.com/pgark/terraform-provider-pgark/test/pgtest"
)

// Each major takes a full image and an increment while something writes, with one odd arrangement each, and is
// recovered from both.
func TestTake_everyMajor(t *testing.T) {
	arrangements := map[int]pgtest.Options{
		13: {DataChecksums: true, Tablespaces: []string{"fast"}},
		14: {SeparateConfig: true},
		15: {DataChecksums: true, SeparateWAL: true, Tablespaces: []string{"fast", "Odd näme"}},
		16: {SeparateConfig: true, Tablespaces: []string{"fast"}},
		17: {DataChecksums: true, SeparateConfig: true, SeparateWAL: true},
		18: {DataChecksums: true, Tablespaces: []string{"fast"}},
	}
	for _, major := range pgtest.Majors {
		t.Run(strconv.Itoa(major), func(t *testing.T) {
			o := arrangements[major]
			o.Major = major
			w := newWorld(t, o)
			c := w.cluster
			c.Exec(`create table t (id int primary key, v text); insert into t select i, repeat(md5(i::text), 10) from generate_series(1, 20000) i`)
			if len(o.Tablespaces) > 0 {
				c.Exec(`create table far (id int) tablespace fast; insert into far select generate_series(1, 5000)`)
			}
			stop, done := make(chan struct{}), make(chan struct{})
			go func() {
				defer close(done)
				conn := c.Conn(context.Background())
				for i := 0; ; i++ {
					select {
					case <-stop:
						return
					case <-time.After(time.Millisecond):
					}
					_, err := conn.Exec(context.Background(), "with u as (update t set v = v where id % 211 = $1 % 211 returning 1) insert into t select 100000 + $1, 'n'", i)
					if err != nil {
						t.Errorf("write: %v", err)
						return
					}
				}
			}()
			full := w.take()
			c.Exec("vacuum t")
			c.Exec("truncate table t; insert into t select i, 'again' from generate_series(1, 3000) i; create table late (id int); insert into late values (7)")
			increment := w.take()
			close(stop)
			<-done
			c.SwitchWAL()
			rows := c.Scalar("select count(*) || ' ' || sum(id) || ' ' || max(v) from t")
			segment := c.SwitchWAL()
			if err := w.archived(t.Context(), segment.Timeline(), segment.Start(postgres.DefaultSegmentSize), segment.End(postgres.DefaultSegmentSize)); err != nil {
				t.Fatal(err)
			}

			if full.Kind != Full || full.Parent != 0 || increment.Kind != Incremental || increment.Parent != full.SID {
				t.Errorf("kinds %s and %s, expected full and incremental", full.Kind, increment.Kind)
			}
			if full.StopLSN <= full.StartLSN || full.PostgresVersion/10000 != major || full.Timeline != 1 || full.SegmentSize != 16<<20 {
				t.Errorf("image info: %+v", full)
			}
			if full.CorruptPages != 0 || increment.CorruptPages != 0 {
				t.Errorf("%d and %d corrupt pages, expected none", full.CorruptPages, increment.CorruptPages)
			}
			if increment.StoredBytes >= full.StoredBytes {
				t.Errorf("the increment stored %d bytes, the full image %d", increment.StoredBytes, full.StoredBytes)
			}
			for _, image := range []repository.ImageInfo{full, increment} {
				restored := w.recover(image.SID)
				if got := restored.Scalar("select count(*) || ' ' || sum(id) || ' ' || max(v) from t"); got != rows {
					t.Errorf("%s: restored %s, expected %s", image.Kind, got, rows)
				}
				if len(o.Tablespaces) > 0 {
					if got := restored.Scalar("select count(*) from far"); got != "5000" {
						t.Errorf("%s: %s rows in the tablespace, expected 5000", image.Kind, got)
					}
				}
				if got := restored.Scalar("select id from late"); got != "7" {
					t.Errorf("%s: found %s in late, expected 7", image.Kind, got)
				}
				restored.Exec("set enable_seqscan = off; select count(*) from t where id > 0")
				restored.Stop(pgtest.Fast)
				if o.DataChecksums && restored.HasTool("pg_checksums") {
					restored.Run("pg_checksums", "--check", "-D", restored.DataDir)
				}
			}
		})
	}
}

// A server that does nothing is stored byte for byte.
func TestTake_bytes(t *testing.T) {
	w := newWorld(t, pgtest.Options{Tablespaces: []string{"fast"}, SeparateWAL: true, SeparateConfig: true, DataChecksums: true})
	c := w.cluster
	c.Exec("create table t as select i, md5(i::text) from generate_series(1, 100000) i; create table far (id int) tablespace fast; insert into far values (1)")
	c.Exec("create unlogged table u as select generate_series(1, 1000) i")
	c.Exec("vacuum analyze")
	odd := map[string]string{
		"odd \n name\twith 'quotes'": "x", "log/postgresql.log": strings.Repeat("line\n", 200_000), "not-utf8-\xff\xfe": "y", "empty": "",
		"pgsql_tmp_is_left_out": "z", "base/pgsql_tmp/pgsql_tmp1.0": "z", "pg_replslot/slot/state": "z", "pg_internal.init.77": "z",
		"backup_manifest": "z", "lost+found/x": "z",
	}
	for name, content := range odd {
		full := filepath.Join(c.DataDir, name)
		if err := errors.Join(os.MkdirAll(filepath.Dir(full), 0o700), os.WriteFile(full, []byte(content), 0o600)); err != nil {
			t.Fatal(err)
		}
	}
	if err := errors.Join(
		os.Symlink("/nowhere/at/all", filepath.Join(c.DataDir, "dangling")),
		unix.Mkfifo(filepath.Join(c.DataDir, "fifo"), 0o600),
		os.MkdirAll(filepath.Join(c.ConfigDir, "conf.d"), 0o755),
		os.WriteFile(filepath.Join(c.ConfigDir, "conf.d/extra.conf"), []byte("# extra\n"), 0o644),
	); err != nil {
		t.Fatal(err)
	}
	pgtest.Chown(t, c.DataDir)
	c.Exec("checkpoint")

	info := w.take()
	unlogged := w.fileOf("u")
	c.Stop(pgtest.Immediate)
	root, m := w.materialise(info.SID)

	roles := ""
	for _, v := range m.Volumes {
		roles += v.Role + " "
		if v.SizeBytes == 0 || v.Device == "" || v.FileSystem == "" {
			t.Errorf("volume %+v: expected size, device and file system", v)
		}
	}
	if roles != "data tablespace wal config " {
		t.Errorf("volumes %s", roles)
	}
	compare := func(source, rebuilt string, leftOut func(rel string) bool) {
		t.Helper()
		err := filepath.WalkDir(source, func(name string, d fs.DirEntry, err error) error {
			if err != nil {
				return err
			}
			rel, _ := filepath.Rel(source, name)
			there, statErr := os.Lstat(filepath.Join(rebuilt, rel))
			if leftOut(rel) {
				if statErr == nil {
					t.Errorf("%s is in the image", rel)
				}
				if d.IsDir() {
					return fs.SkipDir
				}
				return nil
			}
			if statErr != nil {
				t.Errorf("%s is not in the image", rel)
				return nil //nolint:nilerr // reported; the walk goes on
			}
			here, err := d.Info()
			if err != nil {
				return err
			}
			if here.Mode() != there.Mode() {
				t.Errorf("%s: mode %s, expected %s", rel, there.Mode(), here.Mode())
			}
			if !d.Type().IsRegular() {
				return nil
			}
			a, err := os.ReadFile(name)
			if err != nil {
				return err
			}
			b, err := os.ReadFile(filepath.Join(rebuilt, rel))
			if err != nil {
				return err
			}
			if !bytes.Equal(a, b) {
				t.Errorf("%s: differs (%d bytes, expected %d)", rel, len(b), len(a))
			}
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	compare(c.DataDir, filepath.Join(root, "data"), func(rel string) bool {
		switch name := filepath.Base(rel); {
		case rel == "fifo", rel == "lost+found", strings.HasPrefix(name, "pgsql_tmp"), strings.HasPrefix(name, "pg_internal.init"):
			return true
		case name == "backup_manifest", name == "postmaster.opts", name == "postmaster.pid":
			return true
		case rel == filepath.Join("pg_replslot", "slot"):
			return true
		case filepath.Dir(rel) == "pg_notify" || filepath.Dir(rel) == "pg_subtrans":
			return true
		}
		full := filepath.Join(c.DataDir, rel)
		return full == unlogged || full == unlogged+"_vm" || full == unlogged+"_fsm"
	})
	if _, err := os.Stat(filepath.Join(root, "data", strings.TrimPrefix(unlogged, c.DataDir)+"_init")); err != nil {
		t.Errorf("the unlogged relation's init fork: %v", err)
	}
	for i, v := range m.Volumes {
		if v.Role == roleTablespace {
			compare(v.Path, filepath.Join(root, strconv.Itoa(int(v.OID))), func(string) bool { return false })
		}
		if v.Role == roleConfig {
			compare(v.Path, filepath.Join(root, "config"+strconv.Itoa(i)), func(string) bool { return false })
		}
	}
	for _, f := range m.Files {
		if m.Volumes[f.Volume].Role == roleWAL && f.Path != "." && f.Path != "archive_status" && f.Path != "summaries" {
			t.Errorf("WAL directory: %s is in the image", f.Path)
		}
	}
	if last := m.Files[len(m.Files)-1].Path; last != "global/pg_control" {
		t.Errorf("the last file is %s, expected pg_control", last)
	}
}

func TestTake_unchangedFilesAreNotRead(t *testing.T) {
	w := newWorld(t, pgtest.Options{})
	w.cluster.Exec("create table cold as select i, repeat('x', 500) from generate_series(1, 40000) i; create table hot (id int)")
	w.settle()
	full := w.take()
	if full.ReadBytes < full.SourceBytes {
		t.Errorf("the full image read %d of %d bytes", full.ReadBytes, full.SourceBytes)
	}
	w.cluster.Exec("insert into hot values (1)")
	increment := w.take()
	if increment.ReadBytes > full.ReadBytes/10 {
		t.Errorf("the increment read %d bytes, the full image %d", increment.ReadBytes, full.ReadBytes)
	}
	// What was not read is known as well to the image after.
	again := w.take()
	if again.ReadBytes > full.ReadBytes/10 || again.Parent != increment.SID {
		t.Errorf("the second increment read %d bytes of parent %s", again.ReadBytes, again.Parent)
	}
	if again.SourceBytes < full.SourceBytes {
		t.Errorf("the second increment is of %d bytes, the full image of %d", again.SourceBytes, full.SourceBytes)
	}

	// Same stat, but not quiet for long when the parent began: read.
	cold := w.fileOf("cold")
	now := time.Now()
	if err := os.Chtimes(cold, now, now); err != nil {
		t.Fatal(err)
	}
	w.take()
	info := w.take()
	size, err := os.Stat(cold)
	if err != nil {
		t.Fatal(err)
	}
	if info.ReadBytes < size.Size() {
		t.Errorf("read %d bytes, expected the %d of a file that was touched just before the parent", info.ReadBytes, size.Size())
	}
	if info.StoredBytes > 1<<20 {
		t.Errorf("stored %d bytes of an unchanged file", info.StoredBytes)
	}
	state := w.loadState(info.SID)
	state.header.Start = time.Now()
	for _, change := range []struct {
		what   string
		change func(h *stateHeader)
		want   string
	}{
		{"nothing", func(*stateHeader) {}, ""},
		{"clock", func(h *stateHeader) { h.Start = h.Start.Add(-time.Hour) }, "clock"},
		{"timeline", func(h *stateHeader) { h.Timeline++ }, "timeline"},
		{"lsn", func(h *stateHeader) { h.StartLSN-- }, "WAL went back"},
		{"checksums", func(h *stateHeader) { h.DataChecksums = 1 }, "checksums"},
		{"system", func(h *stateHeader) { h.SystemID++ }, "system identifier"},
		{"upgrade", func(h *stateHeader) { h.PostgresVersion += 10000 }, "PostgreSQL changed"},
		{"moved", func(h *stateHeader) { h.DataDirectory += "x" }, "moved"},
	} {
		h := state.header
		change.change(&h)
		if got := anomaly(&state.header, &h); change.want == "" && got != "" || !strings.Contains(got, change.want) {
			t.Errorf("%s: anomaly %q, expected %q", change.what, got, change.want)
		}
	}
}

// loadState opens the state of an image that is the newest.
func (w *world) loadState(sid repository.SID) *state {
	w.t.Helper()
	s, err := openState(w.state, w.series.ID().String(), sid)
	if err != nil {
		w.t.Fatal(err)
	}
	w.t.Cleanup(func() { _ = s.close() })
	return s
}

// After 1 % of the pages changed, an increment uploads at most three times their size; and it restores.
func TestTake_onePercent(t *testing.T) {
	w := newWorld(t, pgtest.Options{})
	c := w.cluster
	// Incompressible rows, about seven a page; fillfactor leaves room for updates in the page.
	c.Exec(`create table t (id int, v bytea) with (fillfactor = 80, autovacuum_enabled = off);
		alter table t alter v set storage plain;
		insert into t select i, decode(string_agg(md5(random()::text || j), ''), 'hex') from generate_series(1, 35000) i, generate_series(1, 60) j group by i order by i`)
	w.settle()
	full := w.take()
	pages, err := strconv.Atoi(c.Scalar("select relpages from (select pg_relation_size('t') / 8192 as relpages) p"))
	if err != nil {
		t.Fatal(err)
	}
	const step = 100
	c.Exec("update t set id = id where ctid in (select ('(' || b || ',1)')::tid from generate_series(0, " + strconv.Itoa(pages-1) + ", 100) b)")
	changed := int64(pages/step) * relationBlock
	increment := w.take()
	t.Logf("%d pages, %d bytes changed, increment stored %d and read %d of %d bytes", pages, changed, increment.StoredBytes, increment.ReadBytes, increment.SourceBytes)
	// The table is small, so what every server writes all the time (statistics, pg_control, catalogues) counts much.
	if limit := 3*changed + 256<<10; increment.StoredBytes > limit {
		t.Errorf("stored %d bytes, expected at most %d", increment.StoredBytes, limit)
	}
	if full.StoredBytes < int64(pages)*relationBlock/2 {
		t.Errorf("the full image stored %d bytes of %d pages that do not compress", full.StoredBytes, pages)
	}
	sum := "select md5(string_agg(v::text, '' order by id)) from t"
	want := c.Scalar(sum)
	if got := w.recover(increment.SID).Scalar(sum); got != want {
		t.Error("the increment restores other rows")
	}
}

func TestTake_growShrinkVanish(t *testing.T) {
	w := newWorld(t, pgtest.Options{})
	c := w.cluster
	c.Exec(`create table grow (id int, v text); create table shrink (id int, v text); create table vanish (id int);
		insert into shrink select i, repeat('s', 1000) from generate_series(1, 20000) i; insert into vanish values (1)`)
	w.take()
	for round := range 4 {
		c.Exec("insert into grow select i, repeat('g', 1000) from generate_series(1, 5000) i")
		c.Exec("delete from shrink where id > " + strconv.Itoa(15000-4000*round))
		c.Exec("vacuum (truncate) shrink")
		if round == 1 {
			c.Exec("drop table vanish")
		}
		w.take()
	}
	head, err := w.series.Head(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	q := "select (select count(*) from grow) || ' ' || (select count(*) from shrink) || ' ' || (select count(*) from pg_class)"
	want := c.Scalar(q)
	segment := c.SwitchWAL()
	if err := w.archived(t.Context(), 1, segment.Start(postgres.DefaultSegmentSize), segment.End(postgres.DefaultSegmentSize)); err != nil {
		t.Fatal(err)
	}
	if got := w.recover(head.Images[len(head.Images)-1].SID).Scalar(q); got != want {
		t.Errorf("restored %s, expected %s", got, want)
	}
	states, _ := filepath.Glob(filepath.Join(w.state, stateDirectory, "*.state"))
	if len(states) != 2 {
		t.Errorf("states %v, expected those of the newest image and its parent", states)
	}
}

func TestTake_corruptPages(t *testing.T) {
	w := newWorld(t, pgtest.Options{DataChecksums: true})
	c := w.cluster
	c.Exec("create table t as select i, repeat('x', 500) from generate_series(1, 5000) i; create table quiet (id int)")
	w.settle()
	c.Stop(pgtest.Fast)
	full := filepath.Join(c.DataDir, firstRelation(t, c.DataDir, 100))
	flip := func(offset int64) {
		t.Helper()
		f, err := os.OpenFile(full, os.O_RDWR, 0)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		b := make([]byte, 1)
		if _, err := f.ReadAt(b, offset); err != nil {
			t.Fatal(err)
		}
		b[0] ^= 0x40
		if _, err := f.WriteAt(b, offset); err != nil {
			t.Fatal(err)
		}
	}
	flip(3*relationBlock + 5000) // a row
	flip(7 * relationBlock)      // the LSN: it lies in the future now, where no page can be
	c.Start()
	info := w.take()
	if info.CorruptPages != 2 {
		t.Errorf("%d corrupt pages, expected 2", info.CorruptPages)
	}
	_, m := w.materialise(info.SID)
	found := false
	for _, f := range m.Files {
		if len(f.Corrupt) > 0 {
			found = filepath.Join(c.DataDir, f.Path) == full && len(f.Corrupt) == 2 && f.Corrupt[0]+f.Corrupt[1] == 10
		}
	}
	if !found {
		t.Error("the manifest does not name pages 3 and 7")
	}
	if !strings.Contains(w.log.String(), "corrupt page") {
		t.Error("nothing about it in the log")
	}
	for r, err := range w.series.Sessions(t.Context(), time.Time{}) {
		if err != nil || r.Result != "warning" || r.Kind != "image" {
			t.Errorf("session record %+v (%v), expected a warning", r, err)
		}
	}
	time.Sleep(quietPeriod)
	// They stay reported, be the file read (it has an excused page) or not.
	for range 2 {
		if info := w.take(); info.CorruptPages != 2 || info.Kind != Incremental {
			t.Errorf("%s: %d corrupt pages, expected 2", info.Kind, info.CorruptPages)
		}
	}
	c.Stop(pgtest.Fast)
	flip(3*relationBlock + 5000)
	flip(7 * relationBlock)
	c.Start()
	if info := w.take(); info.CorruptPages != 0 {
		t.Errorf("%d corrupt pages after the repair, expected none", info.CorruptPages)
	}
}

// firstRelation is a relation's file of at least the given number of pages in the database postgres.
func firstRelation(t *testing.T, data string, pages int64) string {
	t.Helper()
	var found string
	err := filepath.WalkDir(filepath.Join(data, "base"), func(name string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		rel, _ := filepath.Rel(data, name)
		r, ok := postgres.ParseRelationPath(rel)
		if ok && r.Number >= 16384 && r.Fork == postgres.MainFork && info.Size() >= pages*relationBlock {
			found = rel
		}
		return nil
	})
	if err != nil || found == "" {
		t.Fatalf("no relation of %d pages: %v", pages, err)
	}
	return found
}

// Whatever is wrong with the local state, the next image is full, never a guess.
func TestTake_stateLostOrDamaged(t *testing.T) {
	w := newWorld(t, pgtest.Options{})
	w.cluster.Exec("create table t as select i, repeat('x', 500) from generate_series(1, 5000) i")
	info := w.take()
	damage := []struct {
		what string
		do   func(b []byte) []byte
	}{
		{"empty", func([]byte) []byte { return nil }},
		{"cut before the end record", func(b []byte) []byte { return b[:len(b)-29] }},
		{"cut in the middle", func(b []byte) []byte { return b[:len(b)/2] }},
		{"magic", func(b []byte) []byte { b[3] ^= 1; return b }},
		{"identity", func(b []byte) []byte { b[20] ^= 1; return b }},
		{"header", func(b []byte) []byte { b[60] ^= 1; return b }},
		{"hash", func(b []byte) []byte { b[len(b)/2] ^= 1; return b }},
		{"length", func(b []byte) []byte { b[35] ^= 1; return b }},
		{"lost", nil},
	}
	for _, d := range damage {
		name := stateName(w.state, info.SID)
		if d.do == nil {
			if err := os.Remove(name); err != nil {
				t.Fatal(err)
			}
			// Nor must the grandparent's take its place when it is not there.
			if err := os.RemoveAll(filepath.Join(w.state, stateDirectory)); err != nil {
				t.Fatal(err)
			}
		} else {
			b, err := os.ReadFile(name)
			if err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(name, d.do(b), 0o600); err != nil {
				t.Fatal(err)
			}
		}
		info = w.take()
		if info.Kind != Full || info.Parent != 0 {
			t.Errorf("state %s: %s image with parent %s, expected a full one", d.what, info.Kind, info.Parent)
		}
		if d.do != nil && !strings.Contains(w.log.String(), "local state is of no use") {
			t.Errorf("state %s: nothing about it in the log", d.what)
		}
	}
	if next := w.take(); next.Kind != Incremental || next.Parent != info.SID {
		t.Errorf("%s image of parent %s after all, expected an increment of %s", next.Kind, next.Parent, info.SID)
	}

	// The newest image expires: its state is stale, the one before it serves.
	head, err := w.series.Head(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if err := w.series.Expire(t.Context(), head.Images[len(head.Images)-1].SID); err != nil {
		t.Fatal(err)
	}
	if next := w.take(); next.Parent != info.SID {
		t.Errorf("parent %s, expected %s: the newer one has expired", next.Parent, info.SID)
	}
	o := w.options()
	o.ForceFull = true
	if forced := w.takeWith(o); forced.Kind != Full || forced.StoredBytes < 1<<20 {
		t.Errorf("forced: %s image of %d bytes", forced.Kind, forced.StoredBytes)
	}
}
