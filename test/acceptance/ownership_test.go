package acceptance

import (
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/pgark/terraform-provider-pgark/internal/engine/guest"
	"github.com/pgark/terraform-provider-pgark/internal/engine/job"
	"github.com/pgark/terraform-provider-pgark/internal/engine/objectstore"
	"github.com/pgark/terraform-provider-pgark/internal/engine/postgres"
	"github.com/pgark/terraform-provider-pgark/internal/engine/repository"
	"github.com/pgark/terraform-provider-pgark/test/pgtest"
)

// secondGuest is another guest that shares the first one's repository: its own files, its own machine id unless it is
// given one.
func (w *world) secondGuest(machineID string, cluster *pgtest.Cluster) *world {
	w.t.Helper()
	n := &world{t: w.t, ctx: w.ctx, s3: w.s3, location: w.location, layout: job.Layout{Root: pgtest.Dir(w.t)}, cluster: cluster}
	w.must(os.MkdirAll(n.layout.ConfigDirectory(), 0o755))
	w.must(os.WriteFile(filepath.Join(n.layout.ConfigDirectory(), "machine-id"), []byte(machineID+"\n"), 0o644))
	n.guest = guest.Local(n.layout)
	w.t.Cleanup(func() {
		// The test's own context has ended by now.
		ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
		defer cancel()
		if err := n.guest.Remove(ctx, jobName); err != nil {
			w.t.Errorf("remove the second guest's job: %v", err)
		}
	})
	return n
}

// TestSecondGuestIsRefused: a job name belongs to the guest that claimed it.
func TestSecondGuestIsRefused(t *testing.T) {
	t.Parallel()
	w := newWorld(t, worldOptions{})
	other := w.secondGuest("0123456789abcdef0123456789abcdef", pgtest.Start(t, pgtest.Options{Settings: map[string]string{"archive_mode": "on"}}))
	_, err := other.guest.Apply(w.ctx, guest.Deployment{Job: other.job(), Credentials: w.location.Credentials, Runner: runnerBinary,
		Settings: guest.SettingsPolicy{Manage: true, Restart: "never", ExistingArchiveCommand: "fail"}})
	var owned *repository.OwnedError
	if !errors.As(err, &owned) {
		t.Fatalf("expected the job name to be refused, found %v", err)
	}
	if owned.Owner.Host == "" || !strings.Contains(err.Error(), owned.Owner.Host) {
		t.Errorf("the error does not name the owner: %v", err)
	}
	if got := other.cluster.Scalar("SHOW archive_command"); got != "" && got != "(disabled)" {
		t.Errorf("the refused guest's archive_command is %q", got)
	}
}

// TestDivergedClone: a copy of the data directory that runs under the same job, instance and machine writes other WAL
// under the same names. Exactly one object a name exists, and the loser is told.
func TestDivergedClone(t *testing.T) {
	t.Parallel()
	w := newWorld(t, worldOptions{name: "shared"})
	w.cluster.Exec("CREATE TABLE winner (n int)")
	w.flush()
	w.cluster.Stop(pgtest.Fast)

	// The clone, stopped in the same state, is protected while the original is down: both are "15-shared".
	dir := filepath.Join(pgtest.Dir(t), "clone")
	w.must(exec.CommandContext(w.ctx, "cp", "-a", w.cluster.DataDir, dir).Run())
	// It must not ship through the original's runner before it has one of its own.
	w.must(os.WriteFile(filepath.Join(dir, "postgresql.auto.conf"), nil, 0o600))
	clone := pgtest.Start(t, pgtest.Options{DataDir: dir})
	machine, err := w.guest.Machine(w.ctx)
	w.must(err)
	c := w.secondGuest(machine.ID, clone)
	j := c.job()
	j.Instances.Include = []string{w.instance}
	_, err = c.guest.Apply(w.ctx, guest.Deployment{Job: j, Credentials: w.location.Credentials, Runner: runnerBinary,
		Settings: guest.SettingsPolicy{Manage: true, Restart: "never", ExistingArchiveCommand: "fail"}})
	w.must(err)
	w.cluster.Start()

	// Both go on from the same position with other content.
	clone.Exec("CREATE TABLE loser AS SELECT generate_series(1, 1000)")
	w.cluster.Exec("INSERT INTO winner SELECT generate_series(1, 1000)")
	first := clone.Scalar("SELECT pg_walfile_name(pg_switch_wal())")
	c.instance = w.instance
	w.eventually("the clone's segment is archived", time.Minute, func() bool { return c.archived()[first] })
	for w.cluster.Scalar("SELECT pg_walfile_name(pg_current_wal_lsn())") < first {
		w.cluster.Exec("SELECT pg_switch_wal()")
		w.cluster.Exec("INSERT INTO winner VALUES (1)")
	}
	w.cluster.Exec("SELECT pg_switch_wal()")
	// PostgreSQL archives in order, so it stops at the first segment that differs.
	refused := regexp.MustCompile(`store WAL file ([0-9A-F]{24}) .*already there with other content`)
	var name string
	w.eventually("the original's push fails and says why", time.Minute, func() bool {
		if m := refused.FindStringSubmatch(w.cluster.Log()); m != nil {
			name = m[1]
		}
		return name != ""
	})
	if !c.archived()[name] || w.archived()[name] {
		t.Errorf("%s: acknowledged to the clone: %v, to the original: %v; expected the clone only, which came first", name, c.archived()[name], w.archived()[name])
	}
	stored, err := w.series().StatWAL(w.ctx, name)
	w.must(err)
	if stored.Name != name {
		t.Errorf("found %s, expected %s", stored.Name, name)
	}
}

// TestClusterInitialisedAnew: a new system identifier under the same job starts a new series; both stay restorable.
func TestClusterInitialisedAnew(t *testing.T) {
	t.Parallel()
	w := newWorld(t, worldOptions{name: "renewed"})
	w.cluster.Exec("CREATE TABLE numbered (n int PRIMARY KEY, at timestamptz, body text)")
	w.cluster.Exec("INSERT INTO numbered SELECT i, now(), repeat(md5(i::text), 20) FROM generate_series(1, 100) i")
	w.takeImage()
	w.flush()
	w.cluster.Stop(pgtest.Fast)

	// A new cluster in the same place.
	old := w.cluster.SystemID
	fresh := pgtest.Start(t, pgtest.Options{Major: w.cluster.Major, NoStart: true})
	conf, err := os.ReadFile(filepath.Join(w.cluster.DataDir, "postgresql.conf"))
	w.must(err)
	w.must(os.RemoveAll(w.cluster.DataDir))
	w.must(exec.CommandContext(w.ctx, "cp", "-a", fresh.DataDir, w.cluster.DataDir).Run())
	w.must(os.WriteFile(filepath.Join(w.cluster.DataDir, "postgresql.conf"), conf, 0o600))
	w.cluster.SystemID = fresh.SystemID
	w.cluster.Start()
	w.deploy()
	w.cluster.Exec("CREATE TABLE numbered (n int PRIMARY KEY, at timestamptz, body text)")
	w.cluster.Exec("INSERT INTO numbered SELECT i, now(), repeat(md5(i::text), 20) FROM generate_series(1, 7) i")
	w.takeImage()
	w.flush()

	l := w.list()
	if len(l.Series) != 2 {
		t.Fatalf("expected two series, found %d", len(l.Series))
	}
	for _, s := range []struct {
		id   postgres.SystemID
		rows int
	}{{old, 100}, {fresh.SystemID, 7}} {
		id := jobName + "/" + w.instance + "/" + s.id.String()
		r := w.restoreSeries(id, "--latest")
		mustHold(w, r.conn(), "restored from "+id, s.rows)
	}
}

// TestUnsuitableStore: a repository is refused where create-if-absent is not atomic, and where there is no bucket or
// no access, each in its own words.
func TestUnsuitableStore(t *testing.T) {
	t.Parallel()
	w := newWorld(t, worldOptions{})
	for _, c := range []struct {
		what     string
		location func(objectstore.Location) objectstore.Location
		want     string
	}{
		{"a bucket that does not exist", func(l objectstore.Location) objectstore.Location {
			l.URL = "s3://no-such-bucket/repository"
			return l
		}, "no-such-bucket"},
		{"wrong keys", func(l objectstore.Location) objectstore.Location {
			l.Credentials = &objectstore.Credentials{AccessKeyID: "somebody", SecretAccessKey: "guessed"}
			return l
		}, "access"},
	} {
		store, err := objectstore.Open(w.ctx, c.location(w.location), objectstore.Options{})
		w.must(err)
		_, _, err = repository.Create(w.ctx, store, nil)
		if err == nil || !strings.Contains(strings.ToLower(err.Error()), c.want) {
			t.Errorf("%s: found %v, expected an error that says %q", c.what, err, c.want)
		}
		if err != nil && strings.Contains(err.Error(), "guessed") {
			t.Errorf("%s: the error shows the key: %v", c.what, err)
		}
	}
}
