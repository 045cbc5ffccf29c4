//go:build linux

package guest_test

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"github.com/pgark/terraform-provider-pgark/internal/engine/guest"
	"github.com/pgark/terraform-provider-pgark/internal/engine/job"
	"github.com/pgark/terraform-provider-pgark/internal/engine/postgres"
	"github.com/pgark/terraform-provider-pgark/test/pgtest"
)

const synchronousNames = "synchronous_standby_names"

func show(c *pgtest.Cluster, setting string) string {
	return c.Scalar("select setting from pg_settings where name = '" + setting + "'")
}

// What keeps WAL from being streamed is named, with what mends it; mode interval needs none of it.
func TestCheck_streaming(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	c := cluster(t, pgtest.Options{Settings: map[string]string{"max_wal_senders": "1"}})
	adopt(t, c)
	j := w.job(c)
	w.expectFailing(j)

	must(t, os.WriteFile(filepath.Join(c.ConfigDir, "pg_hba.conf"), []byte("local all all peer\n"), 0o600))
	must(t, syscall.Kill(c.PID(), syscall.SIGHUP))
	w.eventually(func() bool { return w.check(j).find(t, "replication").Status == guest.Fail })
	if k := w.expectFailing(j, "replication").find(t, "replication"); !strings.Contains(k.Found, "pg_hba.conf") || !strings.Contains(k.Remedy, "local replication "+c.Owner+" peer") {
		t.Errorf("found %+v", k)
	}
	interval := w.job(c)
	interval.WAL.Mode = job.WALInterval
	for _, k := range w.expectFailing(interval) {
		if k.Name == "replication" || k.Name == "max_wal_senders" {
			t.Errorf("in mode interval: %+v", k)
		}
	}
	// Where the user wants no error of it, whole segments are shipped.
	d := w.deployment(j)
	d.WithoutStream = true
	s, err := w.guest.Apply(w.ctx, d)
	must(t, err)
	w.waitForWAL(c, c.SwitchWAL())
	var not *guest.StreamError
	if _, err := guest.Prove(w.ctx, w.layout, s.Job, nil); !errors.As(err, &not) || !strings.Contains(err.Error(), "pg_hba.conf") {
		t.Errorf("found %v", err)
	}
	w.mend(j, "replication")

	// The runner's own connection, which comes as soon as it may, is in nobody's way.
	w.apply(j)
	w.expectFailing(j)
	must(t, w.guest.Remove(w.ctx, jobName))
	r, err := postgres.ConnectReplication(w.ctx, postgres.ConnectOptions{SocketDirectory: c.SocketDir, Port: c.Port, Owner: c.Owner}, "another")
	must(t, err)
	k := w.expectFailing(j, "replication").find(t, "replication")
	if !strings.Contains(k.Found, "all 1 WAL senders are taken") {
		t.Errorf("found %+v", k)
	}
	follow(t, k)
	must(t, r.Close())
	w.expectFailing(j)
	if found := show(c, "max_wal_senders"); found != "3" {
		t.Errorf("max_wal_senders is %s", found)
	}
}

// A slot without a limit is refused, as is one more than there may be.
func TestCheck_slot(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	c := cluster(t, pgtest.Options{Settings: map[string]string{"max_replication_slots": "1"}})
	adopt(t, c)
	j := w.job(c)
	j.WAL.Slot = true
	c.Exec("select pg_create_physical_replication_slot('another')")
	k := w.expectFailing(j, "replication_slot").find(t, "replication_slot")
	for _, text := range []string{"max_slot_wal_keep_size = -1", "all 1 replication slots are taken"} {
		if !strings.Contains(k.Found, text) {
			t.Errorf("found %q, expected %q in it", k.Found, text)
		}
	}
	w.mend(j, "replication_slot")
	w.expectFailing(j)

	slots := func() string {
		return c.Scalar("select coalesce(string_agg(slot_name || active, ',' order by slot_name), '') from pg_replication_slots")
	}
	w.apply(j)
	if found := slots(); found != "anotherfalse,pgark_orderstrue" {
		t.Errorf("slots: %s", found)
	}
	j.WAL.Slot = false
	if s := w.apply(j); slots() != "anotherfalse" || s.Instances[0].LeftSlot != "" {
		t.Errorf("slots: %s; found %+v", slots(), s.Instances)
	}
	c.Exec("select pg_create_physical_replication_slot('pgark_orders', true)")
	if s, err := w.guest.State(w.ctx, jobName); err != nil || s.Instances[0].LeftSlot != "pgark_orders" {
		t.Errorf("found %+v, %v", s, err)
	}
	j.WAL.Slot = true
	w.apply(j)
	j.Enabled = false
	if w.apply(j); slots() != "anotherfalse" {
		t.Errorf("of a job that is paused: %s", slots())
	}
	j.Enabled = true
	w.apply(j)
	must(t, w.guest.Remove(w.ctx, jobName))
	if found := slots(); found != "anotherfalse" {
		t.Errorf("slots: %s", found)
	}
}

// The slot of a server that is stopped goes, too.
func TestRemove_slotOfStopped(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	c := cluster(t, pgtest.Options{Settings: map[string]string{"max_slot_wal_keep_size": "1GB"}})
	j := w.job(c)
	j.WAL.Slot = true
	w.apply(j)
	c.Stop(pgtest.Fast)
	must(t, w.guest.Remove(w.ctx, jobName))
	c.Start()
	if found := c.Scalar("select count(*) from pg_replication_slots"); found != "0" {
		t.Errorf("found %s slots", found)
	}
}

// Commits wait for the repository as long as a runner is there that streams, and for nobody before and after.
func TestApply_synchronous(t *testing.T) {
	t.Parallel()
	for _, major := range []int{13, 17} {
		t.Run(strconv.Itoa(major), func(t *testing.T) {
			t.Parallel()
			w := newWorld(t)
			c := cluster(t, pgtest.Options{Major: major})
			c.Exec("alter system set work_mem = '5MB'")
			before := autoConf(t, c)
			c.Exec("create table t (i int)")
			j := w.job(c)
			j.WAL.Synchronous = true
			if k := w.expectFailing(j).find(t, synchronousNames); k.Status != guest.Warn || !strings.Contains(k.Found, "it will be set to pgark once the runner streams") {
				t.Errorf("found %+v", k)
			}
			waits := func(expected string) {
				t.Helper()
				if found := show(c, synchronousNames); found != expected {
					t.Errorf("%s is %q, expected %q", synchronousNames, found, expected)
				}
				c.Exec("insert into t values (1)") // does not hang
			}
			s := w.apply(j)
			waits("pgark")
			if found := c.Scalar("select sync_state from pg_stat_replication where application_name = 'pgark'"); found != "sync" {
				t.Errorf("pgark is %q", found)
			}
			if i := s.Instances[0]; !i.Waiting || i.Settings[synchronousNames] != "pgark" {
				t.Errorf("found %+v", i)
			}
			if k := w.expectFailing(j).find(t, synchronousNames); k.Status != guest.Warn || !strings.Contains(k.Found, "every commit waits for pgark") {
				t.Errorf("found %+v", k)
			}
			conf := autoConf(t, c)
			if w.apply(j); autoConf(t, c) != conf {
				t.Error("applying again has changed the settings")
			}

			// Drift.
			c.Exec("alter system reset " + synchronousNames)
			c.Exec("select pg_reload_conf()")
			w.eventually(func() bool {
				s, err := w.guest.State(w.ctx, jobName)
				must(t, err)
				return s.Instances[0].Settings[synchronousNames] == ""
			})
			w.apply(j)
			waits("pgark")

			// Another runner: commits wait for some seconds, and go on.
			d := w.deployment(j)
			d.Runner = otherBinary
			_, err := w.guest.Apply(w.ctx, d)
			must(t, err)
			waits("pgark")

			// One that does not come up is taken back, and commits go on.
			d.Runner = []byte("#!/bin/sh\n[ \"$1\" = version ]\n")
			if _, err := w.guest.Apply(w.ctx, d); err == nil {
				t.Error("a runner that does nothing was deployed")
			}
			waits("pgark")

			j.WAL.Synchronous = false
			w.apply(j)
			waits("")
			j.WAL.Synchronous = true
			w.apply(j)
			waits("pgark")
			j.Enabled = false
			w.apply(j)
			waits("")
			j.Enabled = true
			w.apply(j)
			waits("pgark")
			must(t, w.guest.Remove(w.ctx, jobName))
			waits("")
			if after := autoConf(t, c); after != before {
				t.Errorf("postgresql.auto.conf was\n%s\nand is\n%s", before, after)
			}
		})
	}
}

// For whom commits wait otherwise is somebody's decision: it is not rewritten, and what it has to be is said.
func TestApply_synchronousList(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	c := cluster(t, pgtest.Options{Major: 16, Settings: map[string]string{synchronousNames: `FIRST 1 (a, "b-2")`, "synchronous_commit": "local"}})
	j := w.job(c)
	j.WAL.Synchronous = true
	k := w.expectFailing(j, synchronousNames)
	if k := k.find(t, synchronousNames); !strings.Contains(k.Remedy, `FIRST 1 (a, \"b-2\", pgark)`) || !strings.Contains(k.Remedy, `FIRST 2 (pgark, a, \"b-2\")`) {
		t.Errorf("found %+v", k)
	}
	if k := k.find(t, "synchronous_commit"); k.Status != guest.Warn {
		t.Errorf("found %+v", k)
	}
	if _, err := w.guest.Apply(w.ctx, w.deployment(j)); err == nil {
		t.Error("applied")
	}
	w.mendTo(j, synchronousNames, guest.Warn)
	w.apply(j)
	must(t, w.guest.Remove(w.ctx, jobName))
	if found := show(c, synchronousNames); found != `FIRST 1 (a, "b-2", pgark)` {
		t.Errorf("found %s", found)
	}

	// Nor is anything set where settings are not ours to change.
	c.Exec("alter system set " + synchronousNames + " = ''")
	c.Exec("alter system set archive_command = '" + w.layout.ArchiveCommand(jobName, name(c)) + "'")
	c.Exec("select pg_reload_conf()")
	w.eventually(func() bool { return show(c, synchronousNames) == "" })
	w.policy.Manage = false
	if k := w.expectFailing(j).find(t, synchronousNames); k.Status != guest.Warn || !strings.Contains(k.Found, "manage = false") {
		t.Errorf("found %+v", k)
	}
	w.apply(j)
	if found := show(c, synchronousNames); found != "" {
		t.Errorf("found %s", found)
	}
	c.Exec("alter system reset archive_command")
}

// Where the runner is gone, and commits wait for it, removing the job lets them go on.
func TestRemove_commitsGoOn(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	c := cluster(t, pgtest.Options{})
	j := w.job(c)
	j.WAL.Synchronous = true
	w.apply(j)
	runner := w.status(c).PID
	b, err := os.ReadFile(w.layout.PIDFile(jobName, name(c)))
	must(t, err)
	supervisor, err := strconv.Atoi(string(bytes.TrimSpace(b)))
	must(t, err)
	for _, pid := range []int{supervisor, runner} { // in this order: nobody starts another
		must(t, syscall.Kill(pid, syscall.SIGKILL))
	}
	committed := make(chan error, 1)
	go func() {
		out, err := c.Command("psql", "-h", c.SocketDir, "-p", strconv.Itoa(c.Port), "-d", "postgres", "-c", "create table waits ()").CombinedOutput()
		if err != nil {
			err = errors.Join(err, errors.New(string(bytes.TrimSpace(out))))
		}
		committed <- err
	}()
	w.eventually(func() bool {
		return c.Scalar("select count(*) from pg_stat_activity where wait_event = 'SyncRep'") == "1"
	})
	must(t, w.guest.Remove(w.ctx, jobName))
	must(t, <-committed)
}

// WAL that PostgreSQL was told is safe is not thrown away with the job.
func TestRemove_spooled(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	c := cluster(t, pgtest.Options{})
	j := w.job(c)
	s := w.apply(j)
	spooled := filepath.Join(w.layout.SpoolDirectory(s.Job, name(c)), "1", "2", "elsewhere.sealed") // the runner knows no such file
	must(t, os.MkdirAll(filepath.Dir(spooled), 0o755))
	must(t, os.WriteFile(spooled, []byte("WAL"), 0o600))
	conf := autoConf(t, c)
	err := w.guest.Remove(w.ctx, jobName)
	var left *guest.SpoolError
	if !errors.As(err, &left) || left.Files != 1 || !strings.Contains(left.Hint(), "rm -r "+w.layout.SpoolDirectory(s.Job, name(c))) {
		t.Fatalf("found %v", err)
	}
	if autoConf(t, c) != conf || w.status(c).PID == 0 {
		t.Error("something was removed")
	}
	must(t, os.Remove(spooled))

	// Nobody knows where WAL may lie if the runner's notes of it cannot be read.
	notes := w.layout.SpoolPlacesFile(jobName, name(c))
	before, err := os.ReadFile(notes)
	must(t, err)
	must(t, os.WriteFile(notes, before[:len(before)/2], 0o600))
	if err := w.guest.Remove(w.ctx, jobName); err == nil || !strings.Contains(err.Error(), notes) || autoConf(t, c) != conf {
		t.Errorf("found %v, expected the job to stay while %s cannot be read", err, notes)
	}
	must(t, os.WriteFile(notes, before, 0o600))
	must(t, w.guest.Remove(w.ctx, jobName))

	// In a declared folder, which is shared, nothing of ours stays.
	folder := filepath.Join(w.layout.Root, "folder")
	must(t, os.Mkdir(folder, 0o755))
	j.WAL.TempFolder = folder
	w.mend(j, "temporary_folder")
	s = w.apply(j)
	must(t, os.MkdirAll(w.layout.SpoolDirectory(s.Job, name(c)), 0o755))
	must(t, w.guest.Remove(w.ctx, jobName))
	if left, err := os.ReadDir(folder); err != nil || len(left) > 0 {
		t.Errorf("found %v, %v", left, err)
	}
	must(t, os.Remove(folder))
}
