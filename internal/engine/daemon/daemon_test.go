package daemon_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/pgark/terraform-provider-pgark/internal/engine/daemon/control"
	"github.com/pgark/terraform-provider-pgark/internal/engine/job"
	"github.com/pgark/terraform-provider-pgark/internal/engine/objectstore"
	"github.com/pgark/terraform-provider-pgark/internal/engine/postgres"
	"github.com/pgark/terraform-provider-pgark/internal/engine/repository"
	"github.com/pgark/terraform-provider-pgark/test/pgtest"
	"github.com/pgark/terraform-provider-pgark/test/s3test"
)

// What PostgreSQL was told is archived is in the repository at that moment, whatever happens to the runner and the
// repository meanwhile; all of it arrives; and what arrived replays to the same rows. Afterwards a gap is made, and
// recovery must not take it for the end.
func TestRunner_losesNothing(t *testing.T) {
	t.Parallel()
	s3 := s3test.Start(t)
	direct := s3.Location("wal")
	proxy := s3test.NewFaultProxy(t, s3.Endpoint(), s3test.Faults{Rate: 0.05})
	c := pgtest.Start(t, pgtest.Options{WALSegmentSizeMB: 1, Settings: map[string]string{"archive_mode": "on", "archive_command": "false", "max_wal_size": "64MB"}})
	c.Exec("create table t (id bigint primary key, filler text)")
	c.Stop("fast")
	base := copyCluster(t, c)
	g := newGuest(t, c, direct, proxy.Through(direct))
	c.Configure(g.archiving())
	c.Start()
	g.run()

	// The witness compares what PostgreSQL was told with what lies on the store's disk, which an outage does not touch.
	watching, stopWatching := context.WithCancel(t.Context())
	var witness sync.WaitGroup
	defer witness.Wait()
	defer stopWatching()
	acknowledged := map[string]bool{}
	witness.Go(func() {
		conn := c.Conn(context.Background())
		defer conn.Close(context.Background())
		for ; watching.Err() == nil; time.Sleep(5 * time.Millisecond) {
			var name *string
			if err := conn.QueryRow(context.Background(), "select last_archived_wal from pg_stat_archiver").Scan(&name); err != nil {
				t.Errorf("ask pg_stat_archiver: %v", err)
				return
			}
			if name != nil && !acknowledged[*name] {
				acknowledged[*name] = true
				if !onDisk(s3, *name) {
					t.Errorf("PostgreSQL was told that %s is archived, but the store does not have it", *name)
				}
			}
		}
	})
	writing, stopWriting := context.WithCancel(t.Context())
	var writer sync.WaitGroup
	defer writer.Wait()
	defer stopWriting()
	rows := 0
	// Under the race detector (-short) archive_command, which is this test's own binary, takes a second to start.
	pause := 20 * time.Millisecond
	if testing.Short() {
		pause = 120 * time.Millisecond
	}
	writer.Go(func() {
		conn := c.Conn(context.Background())
		defer conn.Close(context.Background())
		for ; writing.Err() == nil; rows += 300 {
			_, err := conn.Exec(context.Background(), `insert into t select $1 + i, (select string_agg(md5(random()::text || i || j), '') from generate_series(1, 30) j)
				from generate_series(1, 300) i`, rows)
			if err != nil {
				t.Errorf("PostgreSQL must not notice: %v", err)
				return
			}
			time.Sleep(pause)
		}
	})

	for range 6 {
		time.Sleep(time.Duration(300+rand.IntN(700)) * time.Millisecond)
		g.kill()
		time.Sleep(time.Duration(rand.IntN(300)) * time.Millisecond)
		g.run()
	}
	s3.Stop()
	outage := time.Now()
	time.Sleep(3 * time.Second)
	g.kill() // and a runner that starts while the repository is away
	g.run()
	if s := g.mustReach(control.Waiting); s.Problem == "" {
		t.Error("a runner that waits should say why")
	}
	time.Sleep(time.Until(outage.Add(10 * time.Second)))
	s3.Start()
	g.mustReach(control.Running)
	time.Sleep(time.Second)
	stopWriting()
	writer.Wait()
	if t.Failed() {
		return
	}
	last := archived(t, c)
	stopWatching()
	witness.Wait()
	faults, _ := proxy.Counts()
	t.Logf("%d rows, up to %s, %d segments seen acknowledged, %d requests", rows, last, len(acknowledged), faults)
	if failed := c.Scalar("select failed_count from pg_stat_archiver"); failed == "0" {
		t.Error("no push failed at all: this test tests nothing")
	}
	var names []string
	for e, err := range g.series().ListWAL(t.Context(), 1, "") {
		if err != nil {
			t.Fatal(err)
		}
		names = append(names, e.Name)
	}
	for i, name := range names {
		if i > 0 && string(postgres.SegmentName(names[i-1]).Next(1<<20)) != name {
			t.Errorf("a gap between %s and %s", names[i-1], name)
		}
		if info, err := g.series().GetWAL(t.Context(), name, io.Discard); err != nil {
			t.Error(err)
		} else if info.FirstTime == nil && info.LastTime != nil {
			t.Errorf("%s: a last time but no first one", name)
		}
	}
	if n := len(names); n < 20 || names[n-1] < last {
		t.Fatalf("%d segments up to %s, expected at least 20 up to %s", n, names[n-1], last)
	}
	const sum = "select count(*) || ' ' || coalesce(md5(string_agg(md5(filler), '' order by id)), '') from t"
	want := c.Scalar(sum)
	g.stop()
	c.Stop("fast")
	if s := sessions(t, g.series()); s["wal"] == 0 {
		t.Errorf("got session records %v, expected one of wal shipping", s)
	}

	again := base + "-2"
	if err := os.CopyFS(again, os.DirFS(base)); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(again, 0o700); err != nil {
		t.Fatal(err)
	}
	pgtest.Chown(t, again)
	s3env := append(s3.Env(), "PATH="+os.Getenv("PATH"))
	restoring := func(dir string) *pgtest.Cluster {
		g.write(filepath.Join(dir, "recovery.signal"), nil)
		return pgtest.Start(t, pgtest.Options{DataDir: dir, NoStart: true, Env: s3env, Settings: map[string]string{
			"archive_mode":    "off",
			"restore_command": g.binary + " fetch " + direct.URL + " " + g.series().ID().String() + " %f %p",
		}})
	}
	r := restoring(base)
	r.Start()
	eventually(t, "recovery ends", func() bool {
		return r.Scalar("select case when pg_is_in_recovery() then 'recovering' else 'done' end") == "done"
	})
	if got := r.Scalar(sum); got != want {
		t.Errorf("replayed: got %s, expected %s", got, want)
	}
	if got := r.Scalar("select count(*) from pg_ls_waldir() where name = 'RECOVERYXLOG'"); got != "0" {
		t.Error("a file being restored was left behind")
	}
	r.Stop("fast")
	eventually(t, "the fetcher that ran ahead is gone, with its ring", func() bool {
		left, err := filepath.Glob(filepath.Join(base, "pg_wal", ".pgark*"))
		return err == nil && len(left) == 0
	})

	middle := names[len(names)/2]
	if err := os.Remove(pathOnDisk(s3, middle)); err != nil {
		t.Fatal(err)
	}
	r = restoring(again)
	r.Launch()
	eventually(t, "recovery is abandoned", func() bool { return !r.Running() })
	if log := r.Log(); !strings.Contains(log, "wal "+middle+" is missing") || strings.Contains(log, "archive recovery complete") {
		t.Error("recovery should end with an error that names the gap")
	}
}

func pathOnDisk(s3 *s3test.Server, name string) string {
	found := ""
	_ = filepath.WalkDir(s3.Directory, func(path string, d os.DirEntry, err error) error {
		if err == nil && d.Name() == name && !d.IsDir() {
			found = path
		}
		return nil // what goes away meanwhile was none of ours
	})
	return found
}

func onDisk(s3 *s3test.Server, name string) bool { return pathOnDisk(s3, name) != "" }

// sessions counts the session records by kind.
func sessions(t *testing.T, s *repository.Series) map[string]int {
	t.Helper()
	n := map[string]int{}
	for r, err := range s.Sessions(t.Context(), time.Time{}) {
		if err != nil {
			t.Fatal(err)
		}
		n[r.Kind]++
	}
	return n
}

func directory(t *testing.T) objectstore.Location {
	t.Helper()
	return objectstore.Location{URL: "file://" + pgtest.Dir(t)}
}

// own gives a repository in a directory, which the test made, to the runner.
func own(t *testing.T, l objectstore.Location) { pgtest.Chown(t, strings.TrimPrefix(l.URL, "file://")) }

func TestRunner_images(t *testing.T) {
	t.Parallel()
	repo := directory(t)
	c := pgtest.Start(t, pgtest.Options{NoStart: true})
	g := newGuest(t, c, repo, repo, func(j *job.Job) {
		j.Image.OnCreate = true
		j.Image.Schedule = "0 3 * * *"
	})
	own(t, repo)
	g.run()
	s := g.mustReach(control.Running)
	if s.SystemIdentifier != c.SystemID.String() || s.DataDirectory != c.DataDir || s.Host != "db1" {
		t.Errorf("got %+v", s)
	}
	// The first image is due at once, but the server does not run: that is nothing to give up for.
	eventually(t, "the image waits for PostgreSQL", func() bool { return g.status().Image.LastError != "" })
	c.Configure(g.archiving())
	c.Start()
	// On demand, twice at the same time: one image.
	ids := make(chan repository.ImageInfo, 2)
	for range 2 {
		go func() {
			var info repository.ImageInfo
			b, err := control.TakeImage(context.Background(), g.socket(), control.AnyKind, nil)
			if err == nil {
				err = json.Unmarshal(b, &info)
			}
			if err != nil {
				t.Error(err)
			}
			ids <- info
		}()
	}
	first, second := <-ids, <-ids
	if first.SID == 0 || first.SID != second.SID {
		t.Errorf("got images %s and %s, expected one", first.SID, second.SID)
	}
	eventually(t, "the image is shown, and the next at three", func() bool {
		s := g.status().Image
		return s.LastID == first.SID.String() && !s.Running && s.LastError == "" && s.Next != nil && s.Next.Hour() == 3
	})
	head, err := g.series().Head(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if len(head.Images) != 1 || len(head.Sessions) != 0 {
		t.Errorf("got %d images and %d sessions, expected the one image", len(head.Images), len(head.Sessions))
	}
	eventually(t, "there is a record of the image, and one of the wal up to it", func() bool {
		n := sessions(t, g.series())
		return n["image"] == 1 && n["wal"] == 1
	})

	// A second runner is refused, and does no harm.
	p := g.start("run", jobName, g.instance.Name)
	<-p.done
	if b, _ := os.ReadFile(p.log); p.err == nil || !strings.Contains(string(b), "another runner does already") {
		t.Errorf("a second runner: %v: %s", p.err, b)
	}
	archived(t, c)

	// A job file that is broken is refused, and what was declared before stays.
	g.write(g.layout.JobFile(jobName), []byte("{"))
	if err := control.Reload(t.Context(), g.socket()); err == nil || !strings.Contains(err.Error(), g.layout.JobFile(jobName)) {
		t.Errorf("got %v, expected an error that names the job file", err)
	}
	archived(t, c)
	g.job.Image.Schedule = "30 4 * * *"
	g.declare()
	if err := control.Reload(t.Context(), g.socket()); err != nil {
		t.Error(err)
	}
	eventually(t, "the new schedule holds", func() bool { n := g.status().Image.Next; return n != nil && n.Minute() == 30 })

	// A restart takes no image: none was missed. One that was missed is made up for.
	g.stop()
	g.run()
	if s := g.mustReach(control.Running); s.Image.Running || s.Image.LastID != first.SID.String() {
		t.Errorf("got %+v, expected no new image", s.Image)
	}
	g.stop()
	g.write(filepath.Join(g.layout.StateDirectory(jobName, g.instance.Name), "image-schedule.json"), fmt.Appendf(nil,
		`{"considered_at":%q,"schedule":"30 4 * * * UTC"}`, time.Now().Add(-25*time.Hour).Format(time.RFC3339)))
	g.run()
	eventually(t, "the missed image is taken", func() bool {
		s := g.status().Image
		return !s.Running && s.LastID != "" && s.LastID != first.SID.String()
	})
	eventually(t, "the next image is due in the future: a missed one is taken once", func() bool {
		s := g.status().Image
		return s.Next != nil && s.Next.After(time.Now())
	})

	// Cut off while it takes an image: nothing half is listed, and the next one succeeds.
	c.Exec("create table filler as select i, md5(i::text) from generate_series(1, 200000) i")
	interrupted := make(chan error)
	progressing := make(chan struct{})
	go func() {
		var once sync.Once
		_, err := control.TakeImage(context.Background(), g.socket(), control.AnyKind, func(string) { once.Do(func() { close(progressing) }) })
		interrupted <- err
	}()
	<-progressing
	g.kill()
	if err := <-interrupted; err == nil {
		t.Log("the image was quicker than the kill")
	}
	g.run()
	g.mustReach(control.Running)
	if _, err := control.TakeImage(t.Context(), g.socket(), control.AnyKind, nil); err != nil {
		t.Error(err)
	}
	if head, err = g.series().Head(t.Context()); err != nil || len(head.Sessions) != 0 {
		t.Errorf("sessions left open: %+v, %v", head.Sessions, err)
	}
}

func TestRunner_jobNameOfAnotherMachine(t *testing.T) {
	t.Parallel()
	repo := directory(t)
	c := pgtest.Start(t, pgtest.Options{NoStart: true})
	g := newGuest(t, c, repo, repo)
	other := repository.Owner{MachineID: "ffffffffffffffffffffffffffffffff", Host: "db9"}
	if _, err := g.repo.ClaimJob(t.Context(), jobName, other, ""); err != nil {
		t.Fatal(err)
	}
	own(t, repo)
	c.Configure(g.archiving())
	c.Start()
	g.run()
	s := g.mustReach(control.Refused)
	if !strings.Contains(s.Problem, "db9") {
		t.Errorf("%q should name the owner", s.Problem)
	}
	name := string(c.SwitchWAL())
	eventually(t, "PostgreSQL is told, and keeps its wal", func() bool { return strings.Contains(c.Log(), "db9") })
	if _, err := g.series().StatWAL(t.Context(), name); !errors.Is(err, objectstore.ErrNotExist) {
		t.Errorf("%s: got %v, expected that nothing is stored under another machine's name", name, err)
	}

	// Handed over on purpose.
	mine := repository.Owner{MachineID: "1b4e28ba2fa111d2883f0016d3cca427", Host: "db1"}
	if _, err := g.repo.ClaimJob(t.Context(), jobName, mine, other.MachineID); err != nil {
		t.Fatal(err)
	}
	own(t, repo)
	if err := control.Reload(t.Context(), g.socket()); err != nil {
		t.Fatal(err)
	}
	g.mustReach(control.Running)
	c.Exec("select pg_reload_conf()") // wakes the archiver, which waits for a minute after three failures
	archived(t, c)
}

func TestRunner_copiesAndNewClusters(t *testing.T) {
	t.Parallel()
	repo := directory(t)
	c := pgtest.Start(t, pgtest.Options{NoStart: true})
	g := newGuest(t, c, repo, repo)
	own(t, repo)
	c.Configure(g.archiving())
	c.Start()
	g.run()
	archived(t, c)
	c.Stop("fast")
	copied := copyCluster(t, c)
	c.Start()
	c.Exec("create table original ()")
	taken := archived(t, c)

	// A copy whose archive_command still names us.
	clone := pgtest.Start(t, pgtest.Options{DataDir: copied})
	clone.Exec("create table copied as select generate_series(1, 1000)")
	clone.SwitchWAL()
	eventually(t, "the copy is told", func() bool { return strings.Contains(clone.Log(), "but this runner protects") })
	if log := clone.Log(); !strings.Contains(log, clone.WALDir) || !strings.Contains(log, c.DataDir) {
		t.Error("the message should name both directories")
	}

	// The copy with a runner of its own, under the same name on the same machine (its disk was copied, too): whichever
	// stored a segment first wins, the other is told.
	clone.Stop("fast")
	g2 := newGuest(t, clone, repo, repo)
	own(t, repo)
	g2.run()
	clone.Configure(g2.archiving())
	clone.Start()
	eventually(t, "the copy's segment is refused", func() bool { return strings.Contains(clone.Log(), "already there with other content") })
	if s := g2.status(); s.WAL.Conflicts == 0 || s.WAL.LastError == "" {
		t.Errorf("got %+v, expected the conflict", s.WAL)
	}
	g2.stop()
	clone.Stop("immediate")
	if _, err := g.series().GetWAL(t.Context(), taken, io.Discard); err != nil {
		t.Error(err)
	}

	// Initialised anew in the same place: a new series, without anybody restarting the runner.
	c.Stop("fast")
	anew := pgtest.Start(t, pgtest.Options{NoStart: true})
	if err := os.Rename(c.DataDir, c.DataDir+".old"); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(anew.DataDir, c.DataDir); err != nil {
		t.Fatal(err)
	}
	next := pgtest.Start(t, pgtest.Options{DataDir: c.DataDir, Settings: g.archiving()})
	name := archived(t, next)
	if s := g.status(); s.SystemIdentifier != next.SystemID.String() || s.State != control.Running {
		t.Errorf("got %s, expected the new cluster's %s", s.SystemIdentifier, next.SystemID)
	}
	id := g.series().ID()
	id.SystemID = next.SystemID
	if _, err := g.repo.Series(id).GetWAL(t.Context(), name, io.Discard); err != nil {
		t.Error(err)
	}
	if _, err := g.series().GetWAL(t.Context(), taken, io.Discard); err != nil {
		t.Errorf("the old series: %v", err)
	}
	g.stop()
}
