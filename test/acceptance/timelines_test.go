package acceptance

import (
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"testing"
	"time"

	"github.com/pgark/terraform-provider-pgark/internal/engine/guest"
	"github.com/pgark/terraform-provider-pgark/internal/engine/postgres"
	"github.com/pgark/terraform-provider-pgark/test/pgtest"
)

// branched is a commit and the timeline that it was made on.
type branched struct {
	commit
	timeline postgres.Timeline
}

// family is a cluster on several hosts and what was committed on each of its timelines.
type family struct {
	t         *testing.T
	a, b      *world // the same instance on two hosts of the same declared member
	commits   []branched
	histories map[postgres.Timeline]postgres.History
	random    *rand.Rand
}

// TestTimelines promotes a standby beside its primary, rewinds the old primary behind it, promotes that one again, and
// puts a restored past in its place. Both hosts archive, the standby too, into one series. Every recoverable moment
// of every timeline then restores, to what had been committed by then on the way to it.
func TestTimelines(t *testing.T) {
	t.Parallel()
	majors := pgtest.Majors
	if testing.Short() {
		majors = []int{15}
	}
	for _, major := range majors {
		t.Run(strconv.Itoa(major), func(t *testing.T) {
			t.Parallel()
			f := newFamily(t, major)
			f.standby()
			f.commit(f.a, 1, 10)
			f.a.takeImage()
			past := f.commit(f.a, 1, 5)
			f.a.flush() // a segment that both archive
			f.commit(f.a, 1, 3)

			f.promote(f.b, f.a, 2)
			f.commit(f.a, 1, 5) // what the other does not know
			f.commit(f.b, 2, 8)
			f.settle(f.a, 1)
			f.settle(f.b, 2)

			f.follow()
			f.commit(f.b, 2, 4)
			f.promote(f.a, f.b, 3)
			f.commit(f.b, 2, 3)
			f.commit(f.a, 3, 6)
			f.settle(f.b, 2)
			f.settle(f.a, 3)
			f.b.cluster.Stop(pgtest.Fast)

			f.goBack(past, 4)
			f.commit(f.a, 4, 6)
			f.settle(f.a, 4)
			f.restoreAll()
		})
	}
}

func newFamily(t *testing.T, major int) *family {
	f := &family{t: t, histories: map[postgres.Timeline]postgres.History{}, random: random(t)}
	segment := 1 // MB: less to write for each restored server
	if major == 15 {
		segment = 16
	}
	f.a = newWorld(t, worldOptions{name: fmt.Sprintf("branches-%d-", major), cluster: pgtest.Options{Major: major, WALSegmentSizeMB: segment, Settings: map[string]string{
		"track_commit_timestamp": "on", "autovacuum": "off", "wal_retrieve_retry_interval": "100ms", "shared_buffers": "16MB",
	}}})
	f.a.cluster.Exec("CREATE TABLE branches (n int PRIMARY KEY, timeline int)")
	return f
}

// standby makes a second host, whose server follows the first's and archives what it receives.
func (f *family) standby() {
	a := f.a
	a.cluster.Stop(pgtest.Fast)
	dir := filepath.Join(pgtest.Dir(f.t), "standby")
	a.must(exec.CommandContext(a.ctx, "cp", "-a", a.cluster.DataDir, dir).Run())
	a.must(os.WriteFile(filepath.Join(dir, "postgresql.auto.conf"), nil, 0o600)) // the first's archive_command
	a.must(os.WriteFile(filepath.Join(dir, "standby.signal"), nil, 0o600))
	pgtest.Chown(f.t, dir)
	cluster := pgtest.Start(f.t, pgtest.Options{Major: a.cluster.Major, DataDir: dir, Settings: map[string]string{
		"primary_conninfo": f.conninfo(a.cluster), "archive_mode": "always",
	}})
	machine, err := a.guest.Machine(a.ctx)
	a.must(err)
	f.b = a.secondGuest(machine.ID, cluster)
	f.b.instance = a.instance
	j := f.b.job()
	j.Instances.Include = []string{a.instance}
	_, err = f.b.guest.Apply(a.ctx, guest.Deployment{Job: j, Credentials: a.location.Credentials, Runner: runnerBinary,
		Settings: guest.SettingsPolicy{Manage: true, Restart: "never", ExistingArchiveCommand: "fail"}})
	a.must(err)
	f.t.Cleanup(func() {
		if f.t.Failed() {
			f.b.dumpRunnerLog()
		}
	})
	a.cluster.Start()
}

func (f *family) conninfo(c *pgtest.Cluster) string {
	return "host=" + c.SocketDir + " port=" + strconv.Itoa(c.Port) + " user=" + c.Owner + " dbname=postgres"
}

// commit commits some rows on a host and returns the last commit.
func (f *family) commit(w *world, tl postgres.Timeline, rows int) branched {
	f.t.Helper()
	c := w.cluster.Conn(w.ctx)
	defer c.Close(context.Background())
	for range rows {
		k := branched{timeline: tl, commit: commit{n: len(f.commits) + 1}}
		xid := scalar[string](w, c, "INSERT INTO branches VALUES ($1, $2) RETURNING txid_current()::text", k.n, int(tl))
		k.at = scalar[time.Time](w, c, "SELECT pg_xact_commit_timestamp($1::text::xid)", xid)
		var err error
		k.lsn, err = postgres.ParseLSN(scalar[string](w, c, "SELECT pg_current_wal_lsn()::text"))
		w.must(err)
		f.commits = append(f.commits, k)
	}
	return f.commits[len(f.commits)-1]
}

// last is the last commit that was made on a timeline.
func (f *family) last(tl postgres.Timeline) branched {
	for _, k := range slices.Backward(f.commits) {
		if k.timeline == tl {
			return k
		}
	}
	f.t.Fatalf("nothing was committed on timeline %d", tl)
	return branched{}
}

// promote makes the standby a primary once it has all that the other has committed. The other goes on.
func (f *family) promote(w, primary *world, tl postgres.Timeline) {
	f.t.Helper()
	lsn := primary.cluster.Scalar("SELECT pg_current_wal_lsn()::text")
	w.eventually("the standby has replayed "+lsn, time.Minute, func() bool {
		return w.cluster.Scalar("SELECT (pg_last_wal_replay_lsn() >= $1::text::pg_lsn)::text", lsn) == "true"
	})
	if w == f.b {
		// What it has archived as a standby is what the primary has.
		w.eventually("the standby archives", time.Minute, func() bool { return len(w.archived()) > 0 })
	}
	w.cluster.Exec("SELECT pg_promote()")
	f.begun(w, tl)
}

// begun reads how a host has come to its timeline.
func (f *family) begun(w *world, tl postgres.Timeline) {
	f.t.Helper()
	b, err := os.ReadFile(filepath.Join(w.cluster.DataDir, "pg_wal", postgres.HistoryFileName(tl)))
	w.must(err)
	f.histories[tl], err = postgres.ParseHistory(tl, b)
	w.must(err)
}

// settle waits until what a host has committed on its timeline can be restored, though it has not filled a segment.
func (f *family) settle(w *world, tl postgres.Timeline) {
	f.t.Helper()
	last := f.last(tl)
	w.eventually(fmt.Sprintf("a window of timeline %d reaches %s", tl, last.lsn), time.Minute, func() bool {
		for _, v := range f.windows() {
			if v.timeline == tl && v.end >= last.lsn {
				return true
			}
		}
		return false
	})
}

// window is a window of the listing.
type window struct {
	timeline   postgres.Timeline
	from, to   time.Time
	start, end postgres.LSN
}

func (f *family) windows() []window {
	f.t.Helper()
	l := f.a.list()
	if len(l.Series) != 1 || len(l.Series[0].Gaps) != 0 {
		f.t.Fatalf("found %+v, expected one series without gaps", l)
	}
	var out []window
	for _, v := range l.Series[0].Windows {
		tl, err := strconv.ParseUint(string(v.Timeline), 10, 32)
		f.a.must(err)
		out = append(out, window{postgres.Timeline(tl), v.From, v.To, v.StartLSN, v.EndLSN})
	}
	return out
}

// follow makes the old primary a standby of the new one: rewound where there is pg_rewind, else copied.
func (f *family) follow() {
	f.t.Helper()
	a, b := f.a.cluster, f.b.cluster
	a.Stop(pgtest.Fast)
	own := map[string][]byte{}
	for _, name := range []string{"postgresql.conf", "postgresql.auto.conf", "pg_hba.conf"} {
		content, err := os.ReadFile(filepath.Join(a.DataDir, name))
		f.a.must(err)
		own[name] = content
	}
	if a.Major == 15 {
		b.Exec("CHECKPOINT") // or pg_rewind sees the timeline from before the promotion
		a.Run("pg_rewind", "--target-pgdata="+a.DataDir, "--source-server="+f.conninfo(b))
	} else {
		b.Stop(pgtest.Fast)
		f.a.must(os.RemoveAll(a.DataDir))
		f.a.must(exec.CommandContext(f.a.ctx, "cp", "-a", b.DataDir, a.DataDir).Run())
		b.Start()
	}
	for name, content := range own {
		f.a.must(os.WriteFile(filepath.Join(a.DataDir, name), content, 0o600))
	}
	f.a.must(os.WriteFile(filepath.Join(a.DataDir, "standby.signal"), nil, 0o600))
	pgtest.Chown(f.t, a.DataDir)
	a.Configure(map[string]string{"primary_conninfo": f.conninfo(b)})
	a.Start()
}

// goBack puts the cluster as it was at a commit in the place of the first host's, where it archives on.
func (f *family) goBack(to branched, tl postgres.Timeline) {
	f.t.Helper()
	a := f.a
	a.cluster.Stop(pgtest.Fast)
	a.must(os.RemoveAll(a.cluster.DataDir))
	_, err := a.pgark("restore", "--job", jobName, "--target-lsn", to.lsn.String(), "--timeline", strconv.Itoa(int(to.timeline)),
		"--keep-archiving", "--data-directory", a.cluster.DataDir, "--bin-directory", a.cluster.BinDir)
	a.must(err)
	a.cluster.Start()
	a.eventually("the restored cluster is a primary", time.Minute, func() bool {
		return a.cluster.Scalar("SELECT pg_is_in_recovery()::text") == "false"
	})
	f.begun(a, tl)
}

// held are the rows that a timeline holds up to a commit that counts as one it reaches.
func (f *family) held(tl postgres.Timeline, reached func(branched) bool) []int {
	var rows []int
	for _, k := range f.commits {
		if (k.timeline == tl || f.histories[tl].Includes(k.timeline, k.lsn)) && reached(k) {
			rows = append(rows, k.n)
		}
	}
	return rows
}

// restoreAll restores each window at its edges and at moments within, and compares.
func (f *family) restoreAll() {
	f.t.Helper()
	windows := f.windows()
	covered := map[postgres.Timeline]bool{}
	for _, v := range windows {
		covered[v.timeline] = true
		last := f.last(v.timeline)
		if v.end < last.lsn || v.to.Before(last.at) {
			f.t.Errorf("timeline %d: the window ends at %s, %s; expected the last commit, %s, %s, in it",
				v.timeline, v.end, v.to, last.lsn, last.at)
		}
		f.restoreWindow(v)
	}
	for tl := postgres.Timeline(1); tl <= 4; tl++ {
		if !covered[tl] {
			f.t.Errorf("found %+v, expected a window of timeline %d", windows, tl)
		}
	}
}

func (f *family) restoreWindow(v window) {
	f.t.Helper()
	type moment struct {
		target  []string
		reached func(branched) bool
	}
	at := func(t time.Time) moment {
		return moment{[]string{"--target-time", t.UTC().Format(time.RFC3339Nano)}, func(k branched) bool { return !k.at.After(t) }}
	}
	to := func(lsn postgres.LSN) moment {
		return moment{[]string{"--target-lsn", lsn.String()}, func(k branched) bool { return k.lsn <= lsn }}
	}
	end := moment{[]string{"--latest"}, func(branched) bool { return true }}
	edges := []moment{at(v.from), to(v.start), at(v.to)}
	var within []moment
	for _, k := range f.commits {
		if slices.Contains(f.held(v.timeline, func(branched) bool { return true }), k.n) && k.lsn > v.start {
			within = append(within, at(k.at), to(k.lsn))
		}
	}
	f.random.Shuffle(len(within), func(i, j int) { within[i], within[j] = within[j], within[i] })
	moments := []moment{end, within[0]}
	if f.a.cluster.Major == 15 && !testing.Short() {
		moments = append(append(moments, edges...), within[1])
	}
	for _, m := range moments {
		target := append(m.target, "--timeline", strconv.Itoa(int(v.timeline)))
		r := f.a.restore(target...)
		c := r.conn()
		found := scalar[[]int](f.a, c, "SELECT coalesce(array_agg(n ORDER BY n), '{}') FROM branches")
		if expected := f.held(v.timeline, m.reached); !slices.Equal(found, expected) {
			f.t.Errorf("restored to %v: found rows %v, expected %v", target, found, expected)
		}
		r.remove()
	}
}
