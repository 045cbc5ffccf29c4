package image

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"filippo.io/age"

	"github.com/pgark/terraform-provider-pgark/internal/engine/postgres"
	"github.com/pgark/terraform-provider-pgark/internal/engine/repository"
	"github.com/pgark/terraform-provider-pgark/test/pgtest"
)

func TestTake_failures(t *testing.T) {
	w := newWorld(t, pgtest.Options{Settings: map[string]string{"archive_timeout": "0"}})
	c := w.cluster
	c.Exec("create table t as select i, md5(random()::text) || md5(random()::text) v from generate_series(1, 50000) i")
	slow := w.options()
	slow.Plan.MaxRate = 2 << 20

	t.Run("cancelled while copying", func(t *testing.T) {
		ctx, cancel := context.WithCancelCause(t.Context())
		o := slow
		o.Progress = func(p Progress) {
			if p.Phase == Copying {
				cancel(errors.New("told to stop"))
			}
		}
		err := w.mustFail(ctx, o)
		if err.Error() != "image of "+w.series.ID().String()+": told to stop" {
			t.Errorf("found %q", err)
		}
		if log := c.Log(); strings.Contains(log, "aborting backup") {
			t.Error("the server lost the backup instead of having it ended")
		}
	})
	t.Run("cancelled while waiting for WAL", func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		o := w.options()
		o.WaitWAL = func(ctx context.Context, _ postgres.Timeline, _, _ postgres.LSN) error {
			cancel()
			<-ctx.Done()
			return context.Cause(ctx)
		}
		if err := w.mustFail(ctx, o); !errors.Is(err, context.Canceled) {
			t.Errorf("found %v", err)
		}
	})
	t.Run("connection killed while copying", func(t *testing.T) {
		o := slow
		o.aliveEvery = 20 * time.Millisecond
		killed := false
		o.Progress = func(p Progress) {
			if p.Phase == Copying && !killed {
				killed = true
				c.Exec("select pg_terminate_backend(pid) from pg_stat_activity where application_name = 'pgark'")
			}
		}
		err := w.mustFail(t.Context(), o)
		if lost, ok := errors.AsType[*postgres.BackupLostError](err); !ok || lost.StartLSN == 0 {
			t.Errorf("found %v, expected a lost backup", err)
		}
	})
	t.Run("connection killed just before backup stop", func(t *testing.T) {
		o := w.options()
		o.Progress = func(p Progress) {
			if p.Phase == Stopping {
				c.Exec("select pg_terminate_backend(pid) from pg_stat_activity where application_name = 'pgark'")
			}
		}
		err := w.mustFail(t.Context(), o)
		if _, ok := errors.AsType[*postgres.BackupLostError](err); !ok {
			t.Errorf("found %v, expected a lost backup", err)
		}
	})
	t.Run("WAL does not arrive", func(t *testing.T) {
		o := w.options()
		o.WaitWAL, o.WALTimeout = nil, 300*time.Millisecond // the repository never gets any
		err := w.mustFail(t.Context(), o)
		missing, ok := errors.AsType[*MissingWALError](err)
		if !ok || missing.Missing != postgres.SegmentAt(1, missing.From, postgres.DefaultSegmentSize) || missing.To <= missing.From {
			t.Fatalf("found %v, expected the first segment of the range", err)
		}
		for _, part := range []string{"segment " + string(missing.Missing), "archive_mode is on", "segments archived"} {
			if !strings.Contains(err.Error(), part) {
				t.Errorf("found %q, expected %q in it", err, part)
			}
		}
	})
	t.Run("evicted", func(t *testing.T) {
		o := w.options()
		o.Progress = func(p Progress) {
			if p.Phase == Stopping {
				if _, err := w.series.Evict(t.Context(), func(repository.OpenSession) bool { return false }); err != nil {
					t.Error(err)
				}
			}
		}
		if err := w.mustFail(t.Context(), o); !errors.Is(err, repository.ErrSessionGone) {
			t.Errorf("found %v", err)
		}
	})
	t.Run("busy", func(t *testing.T) {
		o := w.options()
		var inner error
		o.Progress = func(p Progress) {
			if p.Phase == Scanning {
				_, inner = Take(t.Context(), w.options())
			}
		}
		w.takeWith(o)
		if _, ok := errors.AsType[*BusyError](inner); !ok {
			t.Errorf("found %v, expected a busy error", inner)
		}
	})
	t.Run("another cluster", func(t *testing.T) {
		o := w.options()
		o.Series = w.repo.Series(repository.SeriesID{Job: "orders", Instance: "x", SystemID: 77})
		_, err := Take(t.Context(), o)
		if err == nil || !strings.Contains(err.Error(), "found system identifier "+c.SystemID.String()+", expected 77") {
			t.Errorf("found %v", err)
		}
	})
	t.Run("unreadable directory", func(t *testing.T) {
		o := w.options()
		o.StateDirectory = filepath.Join(w.state, "file")
		if err := os.WriteFile(o.StateDirectory, nil, 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := Take(t.Context(), o); err == nil || !strings.Contains(err.Error(), "create directory for the state") {
			t.Errorf("found %v", err)
		}
	})
	t.Run("server stopped", func(t *testing.T) {
		c.Stop(pgtest.Fast)
		if err := w.mustFail(t.Context(), w.options()); !postgres.IsNotRunning(err) {
			t.Errorf("found %v", err)
		}
		c.Start()
	})
	// Each failure left its account, except those in which nothing was begun.
	var results []string
	for r, err := range w.series.Sessions(t.Context(), time.Time{}) {
		if err != nil {
			t.Fatal(err)
		}
		results = append(results, r.Result)
		if (r.Result == "error") != (r.Error != "") || r.Kind != "image" || r.Host != "db1" {
			t.Errorf("session record %+v", r)
		}
	}
	slices.Sort(results)
	if got := fmt.Sprint(results); got != "[error error error error error error error success]" {
		t.Errorf("results %s, expected seven errors and one success", got)
	}
	// And after all that an image is taken.
	w.take()
}

// Without WaitWAL the repository itself is asked.
func TestTake_pollsRepository(t *testing.T) {
	w := newWorld(t, pgtest.Options{})
	o := w.options()
	o.WaitWAL, o.WALTimeout = nil, time.Minute
	taken, shipped := make(chan struct{}), make(chan struct{}) // Closed by the test; by the shipper.
	o.Progress = func(p Progress) {
		if p.Phase != Awaiting {
			return
		}
		go func() { // a shipper of the simplest kind
			defer close(shipped)
			for {
				select {
				case <-taken:
					return
				case <-time.After(10 * time.Millisecond):
				}
				names, _ := filepath.Glob(filepath.Join(w.archive, "????????????????????????"))
				for _, name := range names {
					b, err := os.ReadFile(name)
					if err != nil {
						t.Error(err)
					}
					info := repository.WALInfo{Name: filepath.Base(name), SystemID: w.cluster.SystemID, Size: int64(len(b)), Host: "db1"}
					if _, _, err := w.series.PutWAL(t.Context(), info, strings.NewReader(string(b))); err != nil {
						t.Error(err)
					}
				}
			}
		}()
	}
	w.takeWith(o)
	close(taken)
	<-shipped
}

// A guest that cannot read what it wrote still takes increments.
func TestTake_encrypted(t *testing.T) {
	identity, err := age.GenerateX25519Identity()
	if err != nil {
		t.Fatal(err)
	}
	w := newWorld(t, pgtest.Options{})
	w.repo = newRepository(t, identity.Recipient())
	w.series = w.repo.Series(w.series.ID())
	w.cluster.Exec("create table t as select i, repeat(md5(i::text), 20) v from generate_series(1, 40000) i") // a map of its own
	w.cluster.Exec("vacuum t")                                                                                // sets the hint bits that the update would set otherwise, on every page
	w.settle()
	w.take()
	w.cluster.Exec("update t set v = v where i = 5")
	info := w.take()
	if info.Kind != Incremental || info.StoredBytes > 1<<20 {
		t.Errorf("%s image, %d bytes stored", info.Kind, info.StoredBytes)
	}
	w.cluster.Exec("checkpoint")
	if _, err := w.series.OpenImage(t.Context(), info.SID); err == nil {
		t.Error("the guest can read what it wrote")
	}
	reader, err := repository.Open(t.Context(), w.repo.Store(), identity)
	if err != nil {
		t.Fatal(err)
	}
	w.series = reader.Series(w.series.ID())
	want := w.cluster.Scalar("select count(*) || md5(string_agg(v, '' order by i)) from t")
	if got := w.recover(info.SID).Scalar("select count(*) || md5(string_agg(v, '' order by i)) from t"); got != want {
		t.Error("the increment restores other rows")
	}
}

// Configuration that shares its directory with much else is taken file by file; links to it are followed.
func TestTake_configurationAmongOthers(t *testing.T) {
	w := newWorld(t, pgtest.Options{SeparateConfig: true})
	for i := range maxConfigEntries {
		if err := os.WriteFile(filepath.Join(w.cluster.ConfigDir, fmt.Sprint("other", i)), nil, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	info := w.take()
	_, m := w.materialise(info.SID)
	var found []string
	for _, f := range m.Files {
		if m.Volumes[f.Volume].Role == roleConfig {
			found = append(found, f.Path)
		}
	}
	if got := fmt.Sprint(found); got != "[. pg_hba.conf pg_ident.conf postgresql.conf]" {
		t.Errorf("found %s", got)
	}
}

// Data that PostgreSQL reaches through a symbolic link belongs into the image.
func TestTake_linkedDatabase(t *testing.T) {
	w := newWorld(t, pgtest.Options{})
	c := w.cluster
	c.Exec("create table t as select generate_series(1, 1000) i")
	c.Stop(pgtest.Fast)
	elsewhere := pgtest.Dir(t)
	base := filepath.Join(c.DataDir, "base")
	if err := errors.Join(os.Rename(base, filepath.Join(elsewhere, "base")), os.Symlink(filepath.Join(elsewhere, "base"), base)); err != nil {
		t.Fatal(err)
	}
	c.Start()
	info := w.take()
	if got := w.recover(info.SID).Scalar("select count(*) from t"); got != "1000" {
		t.Errorf("restored %s rows, expected 1000", got)
	}
}

func TestProgress_String(t *testing.T) {
	for _, c := range []struct {
		p    Progress
		want string
	}{
		{Progress{Phase: Starting}, "image: starting: waiting for PostgreSQL's checkpoint"},
		{Progress{Phase: Scanning, SID: 3, Kind: Full}, "image 0000000000000003 (full): listing files"},
		{
			Progress{Phase: Copying, SID: 3, Kind: Incremental, Copied: 10 * time.Second, FilesDone: 4, FilesTotal: 8, BytesDone: 1 << 30, BytesTotal: 4 << 30, ReadBytes: 512 << 20, ChangedBytes: 3 << 20, StoredBytes: 1000},
			"image 0000000000000003 (incremental): 25 %, 4 of 8 files, 512.0 MiB of 4.0 GiB read, 3.0 MiB changed, 1000 B stored, 102.4 MiB/s, 0:30 left",
		},
		{
			Progress{Phase: Done, SID: 3, Kind: Full, Elapsed: 3700 * time.Second, FilesTotal: 8, BytesTotal: 1024, ReadBytes: 1024, ChangedBytes: 1024, StoredBytes: 99},
			"image 0000000000000003 (full): done in 1:01:40: 8 files, 1.0 KiB of 1.0 KiB read, 1.0 KiB changed, 99 B stored",
		},
	} {
		if got := c.p.String(); got != c.want {
			t.Errorf("found    %q\nexpected %q", got, c.want)
		}
	}
}
