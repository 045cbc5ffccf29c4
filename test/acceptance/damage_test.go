package acceptance

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/pgark/terraform-provider-pgark/internal/engine/objectstore"
	"github.com/pgark/terraform-provider-pgark/internal/engine/postgres"
	"github.com/pgark/terraform-provider-pgark/internal/engine/repository"
	"github.com/pgark/terraform-provider-pgark/test/pgtest"
)

// damageWorld is a repository in a directory, taken from one that a runner has filled, of which copies can be harmed.
type damageWorld struct {
	*world
	dir    string
	series string
}

// extent is that of a window, of a listing or a verification.
type extent struct {
	StartLSN postgres.LSN      `json:"start_lsn"`
	EndLSN   postgres.LSN      `json:"end_lsn"`
	Timeline postgres.Timeline `json:"timeline"`
}

func (w extent) String() string {
	return fmt.Sprintf("%s to %s on %d", w.StartLSN, w.EndLSN, uint32(w.Timeline))
}

type verification struct {
	Objects int `json:"objects"`
	Damaged []struct {
		Name  string `json:"name"`
		Error string `json:"error"`
	} `json:"damaged"`
	Missing []struct {
		Name string `json:"name"`
	} `json:"missing"`
	Windows []extent `json:"windows"`
}

// TestDamagedWAL deletes and flips a byte of WAL objects of every kind, each in a copy of its own: the listing tells of
// what is gone, verify of what is damaged, the window ends or splits where it should, and a restore across it fails.
func TestDamagedWAL(t *testing.T) {
	t.Parallel()
	w := newWorld(t, worldOptions{cluster: pgtest.Options{WALSegmentSizeMB: 1, Settings: map[string]string{"autovacuum": "off"}}})
	w.cluster.Exec("CREATE TABLE log (n int)")
	insert := func(n int) string {
		w.cluster.Exec(fmt.Sprintf("INSERT INTO log VALUES (%d)", n))
		return w.cluster.Scalar("SELECT pg_walfile_name(pg_current_wal_lsn())")
	}
	first := w.takeImage()
	insert(1)
	w.flush()
	victim := insert(2)
	w.flush()
	insert(3)
	w.flush()
	second := w.takeImage()
	insert(4)
	written, err := postgres.ParseLSN(w.cluster.Scalar("SELECT pg_current_wal_lsn()"))
	w.must(err)
	w.eventually("the last commit is streamed", 30*time.Second, func() bool {
		windows := w.list().Series[0].Windows
		return windows[len(windows)-1].EndLSN >= written
	})
	w.cluster.Stop(pgtest.Fast)
	d := &damageWorld{world: w, series: jobName + "/" + w.instance + "/" + w.cluster.SystemID.String()}
	d.settle()
	d.dir = d.download()

	whole := d.list(d.dir)
	if len(whole) != 1 || whole[0].EndLSN < written {
		t.Fatalf("windows: %v", whole)
	}
	d.verify(d.dir, true)
	start := postgres.SegmentName(victim).Start(1 << 20)
	split := []extent{{first.StopLSN, start, 1}, {second.StopLSN, whole[0].EndLSN, 1}}
	across := []string{"--image", first.ID, "--latest"}

	t.Run("segment deleted", func(t *testing.T) {
		d := d.in(t)
		dir := d.copy(d.dir)
		w.must(os.Remove(d.object(dir, victim)))
		d.mustBe("listed", d.list(dir), split)
		v := d.verify(dir, false)
		d.mustBe("verified", v.Windows, split)
		if len(v.Damaged) != 0 || len(v.Missing) != 1 || v.Missing[0].Name != victim {
			t.Errorf("verify: %+v", v)
		}
		d.mustFail(dir, 3, victim, across...)
		d.mustHold(dir, 1, "--target-lsn", start.String())
		d.mustHold(dir, 4)
	})
	t.Run("segment damaged", func(t *testing.T) {
		d := d.in(t)
		dir := d.copy(d.dir)
		d.flip(d.object(dir, victim), -40)
		v := d.verify(dir, false)
		d.mustBe("verified", v.Windows, split)
		if len(v.Damaged) != 1 || !strings.HasSuffix(v.Damaged[0].Name, victim) || len(v.Missing) != 0 {
			t.Errorf("verify: %+v", v)
		}
		d.mustFail(dir, 1, victim, across...)
		d.mustHold(dir, 4)
	})
	t.Run("segment's header damaged", func(t *testing.T) {
		d := d.in(t)
		dir := d.copy(d.dir)
		d.flip(d.object(dir, victim), 60)
		d.mustBe("verified", d.verify(dir, false).Windows, split)
		d.mustFail(dir, 1, victim, across...)
	})

	// What is left of the tails reaches from the beginning of the last segment.
	last := d.lastTail(d.dir)
	unfinished := postgres.SegmentAt(1, whole[0].EndLSN, 1<<20)
	streamed := unfinished.Start(1 << 20)
	cut := []extent{{first.StopLSN, streamed, 1}}
	if from := d.tailStart(last); from > streamed {
		cut[0].EndLSN = from
	}
	t.Run("tail deleted", func(t *testing.T) {
		d := d.in(t)
		dir := d.copy(d.dir)
		w.must(os.Remove(d.object(dir, last)))
		if got := d.list(dir); len(got) != 1 || got[0].EndLSN >= whole[0].EndLSN || got[0].EndLSN < cut[0].EndLSN {
			t.Errorf("windows: %v, expected an end from %s", got, cut[0].EndLSN)
		}
		d.mustFail(dir, 3, "the archive ends at", "--target-lsn", whole[0].EndLSN.String())
	})
	t.Run("tail damaged", func(t *testing.T) {
		d := d.in(t)
		dir := d.copy(d.dir)
		for _, tail := range d.objects(dir, "*/*.tail") {
			if strings.Contains(tail, fmt.Sprintf("-%016X", uint64(d.tailEnd(last)))) {
				d.flip(tail, -20)
			}
		}
		v := d.verify(dir, false)
		if len(v.Damaged) == 0 || len(v.Windows) != 1 || v.Windows[0].EndLSN >= whole[0].EndLSN || v.Windows[0].EndLSN < cut[0].EndLSN {
			t.Errorf("verify: %+v", v)
		}
		d.mustFail(dir, 1, "without which the WAL ends at")
		d.mustHold(dir, 1, "--target-lsn", start.String())
	})

	// The cluster is lost. A copy is promoted from what was streamed; the old timeline is left in the middle of a segment.
	promoted := d.copy(d.dir)
	fork := d.promote(promoted)
	ways := d.list(promoted)
	if len(ways) != 1 || ways[0].Timeline != 2 {
		t.Fatalf("windows: %v", ways)
	}
	d.verify(promoted, true)
	t.Run("history", func(t *testing.T) {
		for how, harm := range map[string]func(d *damageWorld, name string){
			"deleted": func(_ *damageWorld, name string) { w.must(os.Remove(name)) },
			"damaged": func(d *damageWorld, name string) { d.flip(name, -5) },
		} {
			t.Run(how, func(t *testing.T) {
				d := d.in(t)
				dir := d.copy(promoted)
				harm(d, d.objects(dir, "00000002.history")[0])
				d.mustBe("listed", d.list(dir), whole)
				v := d.verify(dir, false)
				d.mustBe("verified", v.Windows, whole)
				if len(v.Damaged)+len(v.Missing) != 1 {
					t.Errorf("verify: %+v", v)
				}
				d.mustFail(dir, 3, "00000002.history", "--timeline", "2", "--latest")
				d.mustHold(dir, 4)
			})
		}
	})

	// As an archive without streaming has it: the old timeline's end as .partial only.
	partial := d.copy(promoted)
	for _, name := range d.objects(partial, "00000001/*.tail") {
		w.must(os.Remove(name))
	}
	for _, name := range d.objects(partial, "00000002*") {
		w.must(os.RemoveAll(name))
	}
	b, err := os.ReadFile(filepath.Join(fork, "pg_wal", string(unfinished)))
	w.must(err)
	d.put(partial, string(unfinished)+".partial", b)
	t.Run("partial deleted", func(t *testing.T) {
		d := d.in(t)
		dir := d.copy(partial)
		d.mustHold(dir, 4)
		w.must(os.Remove(d.object(dir, string(unfinished)+".partial")))
		d.mustBe("listed", d.list(dir), []extent{{first.StopLSN, streamed, 1}})
	})
	t.Run("partial damaged", func(t *testing.T) {
		d := d.in(t)
		dir := d.copy(partial)
		d.flip(d.object(dir, string(unfinished)+".partial"), -30)
		v := d.verify(dir, false)
		d.mustBe("verified", v.Windows, []extent{{first.StopLSN, streamed, 1}})
		d.mustFail(dir, 1, ".partial")
	})

	t.Run("any byte", func(t *testing.T) {
		rng := random(t)
		for _, name := range slices.Concat(d.objects(promoted, "*/*"), d.objects(promoted, "*.history")) {
			d := d.in(t)
			dir := d.copy(promoted)
			rel, err := filepath.Rel(promoted, name)
			w.must(err)
			d.flipAny(filepath.Join(dir, rel), rng)
			v := d.verify(dir, false)
			if len(v.Damaged) != 1 || !strings.HasSuffix(name, v.Damaged[0].Name) {
				t.Errorf("%s: verify: %+v", rel, v)
			}
		}
	})
}

// in reports to another test.
func (d *damageWorld) in(t *testing.T) *damageWorld {
	w := *d.world
	w.t = t
	return &damageWorld{world: &w, dir: d.dir, series: d.series}
}

// settle waits until the repository does not change any more: the server has stopped.
func (d *damageWorld) settle() {
	var last []string
	d.eventually("nothing is written any more", time.Minute, func() bool {
		var now []string
		for o, err := range d.s3.Open("acceptance/repository").List(d.ctx, "", "") {
			d.must(err)
			now = append(now, o.Key)
		}
		same := slices.Equal(last, now)
		last = now
		time.Sleep(500 * time.Millisecond)
		return same
	})
}

// download copies the repository into a directory.
func (d *damageWorld) download() string {
	dir := pgtest.Dir(d.t)
	to, err := objectstore.Open(d.ctx, objectstore.Location{URL: "file://" + dir}, objectstore.Options{})
	d.must(err)
	from := d.s3.Open("acceptance/repository")
	for o, err := range from.List(d.ctx, "", "") {
		d.must(err)
		r, err := from.Get(d.ctx, o.Key, 0, -1)
		d.must(err)
		b, err := io.ReadAll(r)
		d.must(err)
		d.must(r.Close())
		d.must(to.Create(d.ctx, o.Key, bytes.NewReader(b), int64(len(b))))
	}
	return dir
}

func (d *damageWorld) copy(dir string) string {
	to := filepath.Join(pgtest.Dir(d.t), "copy")
	d.must(exec.CommandContext(d.ctx, "cp", "-a", dir, to).Run())
	return to
}

// objects are the WAL objects whose names match.
func (d *damageWorld) objects(dir, pattern string) []string {
	d.t.Helper()
	names, err := filepath.Glob(filepath.Join(dir, filepath.FromSlash(d.series), "wal", pattern))
	d.must(err)
	if len(names) == 0 {
		d.t.Fatalf("no WAL object matches %s", pattern)
	}
	return names
}

func (d *damageWorld) object(dir, name string) string {
	d.t.Helper()
	return d.objects(dir, "*/"+name)[0]
}

// lastTail is the tail that reaches furthest.
func (d *damageWorld) lastTail(dir string) string {
	names := d.objects(dir, "*/*.tail")
	return filepath.Base(slices.MaxFunc(names, func(a, b string) int {
		return strings.Compare(a[strings.LastIndex(a, "-"):], b[strings.LastIndex(b, "-"):])
	}))
}

func (d *damageWorld) tailStart(name string) postgres.LSN { return d.position(name[:16]) }
func (d *damageWorld) tailEnd(name string) postgres.LSN   { return d.position(name[17:33]) }

func (d *damageWorld) position(hex string) postgres.LSN {
	v, err := strconv.ParseUint(hex, 16, 64)
	d.must(err)
	return postgres.LSN(v)
}

// flip damages an object at an offset, from its end if negative.
func (d *damageWorld) flip(name string, offset int) {
	b, err := os.ReadFile(name)
	d.must(err)
	if offset < 0 {
		offset += len(b)
	}
	b[offset] ^= 0x04
	d.must(os.Remove(name)) // its link may be another name's, too
	d.must(os.WriteFile(name, b, 0o644))
}

func (d *damageWorld) flipAny(name string, rng *rand.Rand) {
	info, err := os.Stat(name)
	d.must(err)
	d.flip(name, rng.IntN(int(info.Size())))
}

func (d *damageWorld) put(dir, name string, b []byte) {
	store, err := objectstore.Open(d.ctx, objectstore.Location{URL: "file://" + dir}, objectstore.Options{})
	d.must(err)
	r, err := repository.Open(d.ctx, store)
	d.must(err)
	s := r.Series(repository.SeriesID{Job: jobName, Instance: d.instance, SystemID: d.cluster.SystemID})
	_, _, err = s.PutWAL(d.ctx, repository.WALInfo{Name: name, Size: int64(len(b)), Host: "copy"}, bytes.NewReader(b))
	d.must(err)
}

// promote restores all there is, promotes it, and stores what its runner would; it returns the copy's data directory.
func (d *damageWorld) promote(dir string) string {
	d.t.Helper()
	r, err := d.tryRestore(dir, "--latest")
	d.must(err)
	c := r.conn()
	d.exec(c, "INSERT INTO public.log VALUES (5)")
	name := scalar[string](d.world, c, "SELECT pg_walfile_name(pg_switch_wal())")
	r.stop()
	for _, name := range []string{"00000002.history", name} {
		b, err := os.ReadFile(filepath.Join(r.dir, "pg_wal", name))
		d.must(err)
		d.put(dir, name, b)
	}
	return r.dir
}

func (d *damageWorld) arguments(dir string, args ...string) []string {
	return append(args, "--repository", "file://"+dir, "--series", d.series)
}

func (d *damageWorld) list(dir string) []extent {
	d.t.Helper()
	var l struct {
		Series []struct {
			Windows []extent `json:"windows"`
		} `json:"series"`
	}
	d.json(&l, d.arguments(dir, "list")...)
	return l.Series[0].Windows
}

// verify runs pgark verify --wal, which succeeds or not as expected.
func (d *damageWorld) verify(dir string, good bool) verification {
	d.t.Helper()
	out, err := d.pgark(append(d.arguments(dir, "verify", "--wal"), "--json")...)
	if (err == nil) != good || exitCode(err) > 1 {
		d.t.Errorf("verify: %v", err)
	}
	var v verification
	if err := json.Unmarshal(out, &v); err != nil {
		d.t.Fatalf("verify: %v in %s", err, out)
	}
	return v
}

func exitCode(err error) int {
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		return exit.ExitCode()
	}
	return 0
}

func (d *damageWorld) mustBe(what string, got, want []extent) {
	d.t.Helper()
	if !slices.Equal(got, want) {
		d.t.Errorf("%s: found windows %v, expected %v", what, got, want)
	}
}

func (d *damageWorld) tryRestore(dir string, target ...string) (*restored, error) {
	d.t.Helper()
	r := &restored{w: d.world, dir: filepath.Join(pgtest.Dir(d.t), "restored"), port: freePort()}
	d.t.Cleanup(r.stop)
	_, err := d.pgark(append(d.arguments(dir, "restore", "--data-directory", r.dir, "--port", strconv.Itoa(r.port),
		"--bin-directory", d.cluster.BinDir, "--start"), target...)...)
	if err == nil {
		r.socket = postmasterSocket(d.t, r.dir)
	}
	return r, err
}

// mustFail restores, which must end with an exit code and say something.
func (d *damageWorld) mustFail(dir string, code int, says string, target ...string) {
	d.t.Helper()
	r, err := d.tryRestore(dir, target...)
	if exitCode(err) != code || !strings.Contains(err.Error(), says) {
		d.t.Errorf("restore %v: got exit code %d, %v; expected %d and %q", target, exitCode(err), err, code, says)
	}
	if err == nil || code != 3 {
		r.remove()
	}
}

// mustHold restores, and expects the rows 1 to n.
func (d *damageWorld) mustHold(dir string, n int, target ...string) {
	d.t.Helper()
	r, err := d.tryRestore(dir, target...)
	d.must(err)
	if got := scalar[int](d.world, r.conn(), "SELECT count(*)::int FROM public.log"); got != n {
		d.t.Errorf("restore %v: found %d rows, expected %d", target, got, n)
	}
	r.remove()
}
