//go:build linux

package guest_test

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/pgark/terraform-provider-pgark/internal/engine/daemon/control"
	"github.com/pgark/terraform-provider-pgark/internal/engine/guest"
	"github.com/pgark/terraform-provider-pgark/internal/engine/job"
	"github.com/pgark/terraform-provider-pgark/internal/engine/objectstore"
	"github.com/pgark/terraform-provider-pgark/internal/engine/repository"
	"github.com/pgark/terraform-provider-pgark/test/pgtest"
)

func digest(b []byte) string {
	sum := sha256.Sum256(b)
	return hex.EncodeToString(sum[:])
}

// One guest's life: applied, applied again, changed, upgraded, destroyed.
func TestApply_life(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	c := cluster(t, pgtest.Options{})
	before := autoConf(t, c)
	j := w.job(c)

	s := w.apply(j)
	if len(s.Instances) != 1 || s.Instances[0].Name != name(c) || s.Instances[0].Runner != "running" || s.Instances[0].Problem != "" {
		t.Fatalf("instances: found %+v", s.Instances)
	}
	ours := w.layout.ArchiveCommand(jobName, name(c))
	if found := s.Instances[0].Settings; found["archive_command"] != ours || found["archive_mode"] != "on" {
		t.Errorf("settings: found %v", found)
	}
	if s.RunnerSHA256 != digest(runnerBinary) || s.HasCredentials || s.Job == nil || s.Instances[0].SystemID != c.SystemID {
		t.Errorf("found %+v", s)
	}
	if found := s.Job.Protected; len(found) != 1 || found[0].DataDirectory != c.DataDir || found[0].Port != c.Port || found[0].Owner != c.Owner {
		t.Errorf("protected: found %+v", found)
	}
	if show := c.Scalar("show archive_command"); show != ours {
		t.Errorf("archive_command: found %q, expected %q", show, ours)
	}
	w.waitForWAL(c, c.SwitchWAL())
	runner := w.status(c)
	if u := processOwner(t, runner.PID); u != c.Owner {
		t.Errorf("the runner belongs to %s, expected %s", u, c.Owner)
	}

	t.Run("the same again changes nothing", func(t *testing.T) {
		files, conf := w.files(), autoConf(t, c)
		again := w.apply(j)
		if again.Job.Digest() != s.Job.Digest() || autoConf(t, c) != conf || !slices.Equal(w.files(), files) {
			t.Error("something changed")
		}
		if found := w.status(c); found.PID != runner.PID {
			t.Errorf("the runner was started anew: process %d, then %d", runner.PID, found.PID)
		}
	})
	t.Run("WAL retention is another resource's", func(t *testing.T) {
		must(t, w.guest.SetWALRetention(w.ctx, jobName, &job.WALRetention{KeepDays: 15}))
		s := w.apply(j)
		if r := s.Job.WALRetention; r == nil || r.KeepDays != 15 || r.EnforcedBy != "guest" {
			t.Errorf("found %+v", r)
		}
		must(t, w.guest.SetWALRetention(w.ctx, jobName, nil))
		s, err := w.guest.State(w.ctx, jobName)
		if err != nil || s.Job.WALRetention != nil {
			t.Errorf("found %+v, %v", s, err)
		}
		if err := w.guest.SetWALRetention(w.ctx, jobName, &job.WALRetention{KeepDays: 1, UntilImageDeleted: true}); err == nil {
			t.Error("an invalid retention was written")
		}
		if err := w.guest.SetWALRetention(w.ctx, "nobody", nil); !errors.Is(err, guest.ErrNoJob) {
			t.Errorf("found %v, expected ErrNoJob", err)
		}
	})
	t.Run("a change reaches the runner as it runs", func(t *testing.T) {
		j.Image.Schedule = "0 3 * * *"
		w.apply(j)
		found := w.status(c)
		if found.PID != runner.PID || found.Image.Next == nil || found.Image.Next.UTC().Hour() != 3 {
			t.Errorf("found %+v, expected process %d with the next image at 3", found.Image, runner.PID)
		}
	})
	t.Run("drift is seen and repaired", func(t *testing.T) {
		c.Exec("alter system set archive_command = '/bin/true'")
		c.Exec("select pg_reload_conf()")
		changed := filepath.Join(w.layout.Root, "changed")
		must(t, os.WriteFile(changed, []byte("changed"), 0o755))
		must(t, os.Remove(w.layout.BinaryLink()))
		must(t, os.Symlink(changed, w.layout.BinaryLink()))
		s, err := w.guest.State(w.ctx, jobName)
		must(t, err)
		if s.RunnerSHA256 != digest([]byte("changed")) {
			t.Errorf("runner: found %s", s.RunnerSHA256)
		}
		w.eventually(func() bool {
			s, err = w.guest.State(w.ctx, jobName)
			must(t, err)
			return s.Instances[0].Settings["archive_command"] == "/bin/true"
		})
		w.policy.ExistingArchiveCommand = "replace"
		s = w.apply(j)
		if s.RunnerSHA256 != digest(runnerBinary) || s.Instances[0].Settings["archive_command"] != ours {
			t.Errorf("found %+v", s)
		}
		w.policy.ExistingArchiveCommand = "fail"
		must(t, os.Remove(changed))
	})
	t.Run("pgark check, as the owner of the instance", func(t *testing.T) {
		check := func() (out []byte, ok bool) {
			cmd := c.Command("psql")
			cmd.Path, cmd.Args = w.layout.BinaryLink(), []string{"pgark", "check", "--job", jobName, "--json"}
			out, err := cmd.Output()
			return out, err == nil
		}
		var document struct {
			OK     bool          `json:"ok"`
			Checks []guest.Check `json:"checks"`
			Proofs []guest.Proof `json:"proofs"`
		}
		out, ok := check()
		must(t, json.Unmarshal(out, &document))
		if !ok || !document.OK || len(document.Proofs) != 1 || len(document.Checks) < 15 || document.Proofs[0].Segment == "" {
			t.Errorf("found %t, %s", ok, out)
		}
		c.Exec("alter system set archive_command = '/bin/false'")
		c.Exec("select pg_reload_conf()")
		w.eventually(func() bool { return c.Scalar("show archive_command") == "/bin/false" })
		out, ok = check()
		must(t, json.Unmarshal(out, &document))
		if ok || document.OK || len(document.Proofs) != 0 {
			t.Errorf("found %t, %s", ok, out)
		}
		c.Exec("alter system set archive_command = '" + ours + "'")
		c.Exec("select pg_reload_conf()")
		w.eventually(func() bool { return c.Scalar("show archive_command") == ours })
	})
	t.Run("a killed runner comes back by itself", func(t *testing.T) {
		pid := w.status(c).PID
		must(t, syscall.Kill(pid, syscall.SIGKILL))
		if found := w.waitForRunner(c, pid); found.PID == pid {
			t.Errorf("found process %d", found.PID)
		}
	})
	t.Run("stopped runners are started", func(t *testing.T) {
		b, err := os.ReadFile(w.layout.PIDFile(jobName, name(c)))
		must(t, err)
		pid, err := strconv.Atoi(strings.TrimSpace(string(b)))
		must(t, err)
		must(t, syscall.Kill(pid, syscall.SIGTERM))
		for len(w.processes()) > 0 {
			time.Sleep(10 * time.Millisecond)
		}
		s, err := w.guest.State(w.ctx, jobName)
		if err != nil || s.Instances[0].Runner == "running" {
			t.Fatalf("found %+v, %v", s, err)
		}
		if s := w.apply(j); s.Instances[0].Runner != "running" {
			t.Errorf("found %+v", s.Instances)
		}
	})
	t.Run("another binary takes over", func(t *testing.T) {
		old := w.status(c).PID
		d := w.deployment(j)
		d.Runner = otherBinary
		s, err := w.guest.Apply(w.ctx, d)
		must(t, err)
		if s.RunnerSHA256 != digest(otherBinary) || w.status(c).PID == old {
			t.Errorf("found %s, process %d", s.RunnerSHA256, w.status(c).PID)
		}
		if _, err := os.Stat(w.layout.BinaryDirectory(digest(runnerBinary))); err == nil {
			t.Error("the old binary is kept")
		}
		w.waitForWAL(c, c.SwitchWAL())
	})
	t.Run("with PostgreSQL down, State reads the files", func(t *testing.T) {
		c.Stop(pgtest.Fast)
		s, err := w.guest.State(w.ctx, jobName)
		must(t, err)
		i := s.Instances[0]
		if i.Settings["archive_command"] != ours || !strings.Contains(i.Problem, "PostgreSQL is not running") || i.SystemID != c.SystemID {
			t.Errorf("found %+v", i)
		}
		if _, err := w.guest.Apply(w.ctx, w.deployment(j)); err == nil || !strings.Contains(err.Error(), "postgresql_running") {
			t.Errorf("found %v", err)
		}
		c.Start()
	})
	t.Run("destroyed", func(t *testing.T) {
		must(t, w.guest.Remove(w.ctx, jobName))
		if found := w.files(); len(found) > 0 {
			t.Errorf("left behind: %q", found)
		}
		if found := autoConf(t, c); found != before {
			t.Errorf("postgresql.auto.conf: found\n%s\nexpected\n%s", found, before)
		}
		if found := c.Scalar("show archive_command"); found != "" {
			t.Errorf("archive_command: found %q", found)
		}
		if pids := w.processes(); len(pids) > 0 {
			t.Errorf("processes go on: %v", pids)
		}
		if _, err := w.guest.State(w.ctx, jobName); !errors.Is(err, guest.ErrNoJob) {
			t.Errorf("found %v, expected ErrNoJob", err)
		}
		must(t, w.guest.Remove(w.ctx, jobName))
	})
}

func (w *world) status(c *pgtest.Cluster) *control.Status {
	w.t.Helper()
	s, err := control.GetStatus(w.ctx, w.layout.Socket(jobName, name(c)))
	must(w.t, err)
	return s
}

// waitForRunner waits for a runner that is not the process not.
func (w *world) waitForRunner(c *pgtest.Cluster, not int) *control.Status {
	w.t.Helper()
	for {
		s, err := control.GetStatus(w.ctx, w.layout.Socket(jobName, name(c)))
		if err == nil && s.PID != not {
			return s
		}
		if w.ctx.Err() != nil {
			w.t.Fatal(err)
		}
		time.Sleep(20 * time.Millisecond)
	}
}

func uidOf(t *testing.T, info os.FileInfo) int {
	t.Helper()
	st, ok := info.Sys().(*syscall.Stat_t)
	if !ok {
		t.Fatalf("stat of %s: found a %T", info.Name(), info.Sys())
	}
	return int(st.Uid)
}

func processOwner(t *testing.T, pid int) string {
	t.Helper()
	info, err := os.Stat(fmt.Sprintf("/proc/%d", pid))
	must(t, err)
	u, err := user.LookupId(strconv.Itoa(uidOf(t, info)))
	must(t, err)
	return u.Username
}

// What was set before comes back exactly, whoever stopped the server meanwhile.
func TestRemove_putsSettingsBack(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.policy.ExistingArchiveCommand = "replace"
	c := cluster(t, pgtest.Options{})
	c.Exec("alter system set work_mem = '5MB'")
	for _, old := range []struct{ name, command string }{
		{"a command", `test ! -f "/mnt/%f" && cp %p '/mnt/it''s \ here/%f'`}, {"an empty one", ""},
	} {
		for _, server := range []string{"running", "stopped"} {
			t.Run(old.name+", server "+server, func(t *testing.T) {
				c.Exec("alter system set archive_command = '" + strings.ReplaceAll(old.command, "'", "''") + "'")
				c.Exec("select pg_reload_conf()")
				before := autoConf(t, c)
				w.apply(w.job(c))
				if server == "stopped" {
					c.Stop(pgtest.Fast)
				}
				must(t, w.guest.Remove(w.ctx, jobName))
				if server == "stopped" {
					c.Start()
				}
				if found := c.Scalar("show archive_command"); found != old.command {
					t.Errorf("archive_command: found %q, expected %q", found, old.command)
				}
				if found, expected := sortedLines(autoConf(t, c)), sortedLines(before); !slices.Equal(found, expected) {
					t.Errorf("postgresql.auto.conf: found %q, expected %q", found, expected)
				}
			})
		}
	}
	t.Run("somebody's later decision stays", func(t *testing.T) {
		w.apply(w.job(c))
		c.Exec("alter system set archive_command = '/bin/false'")
		c.Exec("select pg_reload_conf()")
		must(t, w.guest.Remove(w.ctx, jobName))
		if found := autoConf(t, c); !strings.Contains(found, "archive_command = '/bin/false'") {
			t.Errorf("found %s", found)
		}
	})
	t.Run("without memory, ours goes", func(t *testing.T) {
		w.apply(w.job(c))
		must(t, os.Remove(w.layout.SettingsFile(jobName, name(c))))
		must(t, w.guest.Remove(w.ctx, jobName))
		if found := autoConf(t, c); strings.Contains(found, "archive_command") {
			t.Errorf("found %s", found)
		}
	})
	t.Run("without the job file", func(t *testing.T) {
		w.apply(w.job(c))
		must(t, os.Remove(w.layout.JobFile(jobName)))
		s, err := w.guest.State(w.ctx, jobName)
		if err != nil || s.Job != nil || s.JobProblem == "" || len(s.Instances) != 1 {
			t.Errorf("found %+v, %v", s, err)
		}
		must(t, w.guest.Remove(w.ctx, jobName))
		if found := autoConf(t, c); strings.Contains(found, "archive_command") || len(w.files()) > 0 {
			t.Errorf("found %s and %q", found, w.files())
		}
	})
}

func sortedLines(s string) []string {
	lines := strings.Split(strings.TrimSpace(s), "\n")
	slices.Sort(lines)
	return lines
}

// archive_mode is turned on with a restart, where that is allowed, and off again with another.
func TestApply_restart(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	c := pgtest.Start(t, pgtest.Options{Settings: map[string]string{"archive_mode": "off"}})
	t.Cleanup(func() {
		// A restarted server is no child of the test any more.
		_ = c.Command("pg_ctl", "stop", "-s", "-w", "-m", "immediate", "-D", c.DataDir).Run()
	})
	before := autoConf(t, c)
	w.expectFailing(w.job(c), "archive_mode")
	w.policy.Restart = "allow"
	if k := w.check(w.job(c)).find(t, "archive_mode"); k.Status != guest.Warn || !strings.Contains(k.Found, "one restart") {
		t.Errorf("found %+v", k)
	}
	s := w.apply(w.job(c))
	if found := s.Instances[0].Settings; found["archive_mode"] != "on" {
		t.Errorf("found %v", found)
	}
	w.waitForWAL(c, c.SwitchWAL())
	w.apply(w.job(c))
	must(t, w.guest.Remove(w.ctx, jobName))
	if found := autoConf(t, c); found != before {
		t.Errorf("postgresql.auto.conf: found\n%s\nexpected\n%s", found, before)
	}
	if found := c.Scalar("show archive_mode"); found != "off" {
		t.Errorf("archive_mode: found %s: PostgreSQL would keep all WAL", found)
	}
}

// A failure of a new job leaves the guest as it was, and says why.
func TestApply_rollsBack(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	c := cluster(t, pgtest.Options{})
	before := autoConf(t, c)
	for what, test := range map[string]struct{ runner, step, hint string }{
		"it does not even start":  {"#!/bin/sh\necho this is no runner >&2\nexit 3\n", "install the runner", "this is no runner"},
		"it starts, and ends":     {"#!/bin/sh\n[ $1 = version ] && exit\necho run: no luck >&2\nexit 3\n", "start the runner of " + name(c), "run: no luck"},
		"it cannot be called one": {"no program", "install the runner", ""},
	} {
		d := w.deployment(w.job(c))
		d.Runner = []byte(test.runner)
		_, err := w.guest.Apply(w.ctx, d)
		var failure *guest.ApplyError
		if !errors.As(err, &failure) || !failure.RolledBack || failure.Step != test.step {
			t.Fatalf("%s: found %v", what, err)
		}
		var runner *guest.RunnerError
		if !errors.As(err, &runner) || !strings.Contains(runner.Hint(), test.hint) {
			t.Errorf("%s: found %v, hint %q", what, err, runner.Hint())
		}
		if found := w.files(); len(found) > 0 {
			t.Errorf("%s: left behind: %q", what, found)
		}
		if autoConf(t, c) != before {
			t.Errorf("%s: postgresql.auto.conf changed", what)
		}
	}
}

// An upgrade that fails puts the previous runner back, whichever step it fails at: the guest is as it was, WAL goes on.
func TestApply_restores(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	c := cluster(t, pgtest.Options{})
	keys := &objectstore.Credentials{AccessKeyID: "AKIA", SecretAccessKey: "hush"}
	d := w.deployment(w.job(c))
	d.Credentials = keys
	before, err := w.guest.Apply(w.ctx, d)
	must(t, err)
	files, conf := w.files(), autoConf(t, c)
	document, err := os.ReadFile(w.layout.JobFile(jobName))
	must(t, err)
	credentials, err := os.ReadFile(w.layout.CredentialsFile(jobName))
	must(t, err)

	second := cluster(t, pgtest.Options{})
	secondConf := autoConf(t, second)
	pusher := w.layout.BinaryDirectory(digest(runnerBinary)) + "/pgark" // until the new one answers: a broken one that can still push
	fails := func(what, step string, deployment guest.Deployment) {
		t.Helper()
		old := w.status(c).PID
		ctx, cancel := contextWithSeconds(w, 30) // the proof would wait for a minute
		defer cancel()
		_, err := w.guest.Apply(ctx, deployment)
		var failure *guest.ApplyError
		if !errors.As(err, &failure) || !failure.Restored || failure.RolledBack || failure.Step != step {
			t.Fatalf("%s: found %v", what, err)
		}
		if !strings.HasSuffix(err.Error(), "; the previous runner was put back and runs") {
			t.Errorf("%s: found %q", what, err)
		}
		s, err := w.guest.State(w.ctx, jobName)
		must(t, err)
		if s.RunnerSHA256 != before.RunnerSHA256 || s.Job.Digest() != before.Job.Digest() || s.AccessKeyID != "AKIA" || s.CredentialsChanged {
			t.Errorf("%s: found %+v", what, s)
		}
		if len(s.Instances) != 1 || s.Instances[0].Runner != guest.RunnerRunning || s.Instances[0].Detail != "" {
			t.Errorf("%s: found %+v", what, s.Instances)
		}
		if found := w.files(); !slices.Equal(found, files) {
			t.Errorf("%s: files: %s", what, cmp.Diff(files, found))
		}
		for file, expected := range map[string][]byte{w.layout.JobFile(jobName): document, w.layout.CredentialsFile(jobName): credentials} {
			if found, err := os.ReadFile(file); err != nil || !slices.Equal(found, expected) {
				t.Errorf("%s: %s changed: %v", what, file, err)
			}
		}
		if autoConf(t, c) != conf || autoConf(t, second) != secondConf {
			t.Errorf("%s: postgresql.auto.conf changed", what)
		}
		if step == "install the runner" && w.status(c).PID != old {
			t.Errorf("%s: the runner was started anew", what)
		}
		w.waitForWAL(c, c.SwitchWAL())
	}

	j := w.job(c, second)
	j.Image.Schedule = "0 3 * * *"
	d = w.deployment(j)
	d.Credentials = &objectstore.Credentials{AccessKeyID: "AKIB", SecretAccessKey: "hash"}
	d.Runner = []byte("#!/bin/sh\nexit 3\n")
	fails("no program", "install the runner", d)
	d.Runner = []byte("#!/bin/sh\n[ $1 = version ] && exit\n[ $1 = wal ] && exec " + pusher + " \"$@\"\nexit 3\n")
	fails("ends at once", "start the runner of "+min(name(c), name(second)), d)

	// WAL that is refused is found by the proof.
	archive := filepath.Join(strings.TrimPrefix(w.location.URL, "file://"), jobName, name(second))
	must(t, os.WriteFile(archive, []byte("in the way of the series"), 0o600))
	d.Runner = otherBinary
	fails("no proof", "prove that WAL of "+name(second)+" reaches the repository", d)
	must(t, os.Remove(archive))

	s, err := w.guest.Apply(w.ctx, d)
	must(t, err)
	if len(s.Instances) != 2 || s.RunnerSHA256 != digest(otherBinary) || s.AccessKeyID != "AKIB" {
		t.Errorf("found %+v", s)
	}
}

// A runner that is to be kept stays, whichever it is; a missing one is installed.
func TestApply_keepRunner(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	c := cluster(t, pgtest.Options{})
	d := w.deployment(w.job(c))
	d.KeepRunner = true
	s, err := w.guest.Apply(w.ctx, d)
	must(t, err)
	pid := w.status(c).PID
	if s.RunnerSHA256 != digest(runnerBinary) {
		t.Errorf("found %s", s.RunnerSHA256)
	}
	d.Runner = otherBinary
	s, err = w.guest.Apply(w.ctx, d)
	must(t, err)
	if s.RunnerSHA256 != digest(runnerBinary) || w.status(c).PID != pid {
		t.Errorf("found %s, process %d, expected %d", s.RunnerSHA256, w.status(c).PID, pid)
	}
	d.KeepRunner = false
	s, err = w.guest.Apply(w.ctx, d)
	must(t, err)
	if s.RunnerSHA256 != digest(otherBinary) || w.status(c).PID == pid {
		t.Errorf("found %s, process %d", s.RunnerSHA256, w.status(c).PID)
	}
}

// Without a runner to deploy, it is the program that runs: here the test's, which can stand in for it.
func TestApply_ownProgram(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	c := cluster(t, pgtest.Options{})
	d := w.deployment(w.job(c))
	d.Runner = nil
	s, err := w.guest.Apply(w.ctx, d)
	must(t, err)
	own, err := os.ReadFile("/proc/self/exe")
	must(t, err)
	if s.RunnerSHA256 != digest(own) || s.Instances[0].Runner != guest.RunnerRunning {
		t.Errorf("found %+v", s)
	}
	w.waitForWAL(c, c.SwitchWAL())
}

// What is chained behind ours goes on, is seen to be changed, and is put back as it was.
func TestApply_chain(t *testing.T) {
	t.Parallel()
	for place, inFile := range map[string]bool{"in postgresql.conf": true, "by ALTER SYSTEM": false} {
		t.Run(place, func(t *testing.T) {
			t.Parallel()
			w := newWorld(t)
			old := filepath.Join(pgtest.Dir(t), "it's old")
			must(t, os.Mkdir(old, 0o700))
			_, uid, gid := pgtest.Owner(t)
			must(t, os.Chown(old, uid, gid))
			theirs := `test ! -f "` + old + `/%f" && cp %p "` + old + `/%f"; test $? -eq 0`
			o := pgtest.Options{}
			if inFile {
				o.Settings = map[string]string{"archive_command": theirs}
			}
			c := cluster(t, o)
			set := func(command string) {
				t.Helper()
				if command == "" {
					c.Exec("alter system reset archive_command")
				} else {
					c.Exec("alter system set archive_command = '" + strings.ReplaceAll(command, "'", "''") + "'")
				}
				c.Exec("select pg_reload_conf()")
			}
			if !inFile {
				set(theirs)
			}
			w.eventually(func() bool { return c.Scalar("show archive_command") == theirs })
			before := autoConf(t, c)
			ours := w.layout.ArchiveCommand(jobName, name(c))
			chained := ours + " && ( " + theirs + " )"
			expect := func(policy, command string) {
				t.Helper()
				w.policy.ExistingArchiveCommand = policy
				s := w.apply(w.job(c))
				if i := s.Instances[0]; i.Wanted != command || i.Settings["archive_command"] != command || c.Scalar("show archive_command") != command {
					t.Errorf("%s: wanted %q, found %q, expected %q", policy, i.Wanted, i.Settings["archive_command"], command)
				}
			}

			expect("chain", chained)
			segment := c.SwitchWAL()
			w.waitForWAL(c, segment)
			w.eventually(func() bool {
				_, err := os.Stat(filepath.Join(old, string(segment)))
				return err == nil
			})
			conf := autoConf(t, c)
			expect("chain", chained)
			expect("fail", chained)
			if autoConf(t, c) != conf {
				t.Error("applying again has changed something")
			}
			expect("replace", ours)
			expect("chain", chained)
			for what, command := range map[string]string{
				"ours was taken out": theirs, "theirs was taken out": ours, "emptied": " ", "theirs was changed": ours + " && ( /bin/true )",
			} {
				set(command)
				w.eventually(func() bool { return c.Scalar("show archive_command") == command })
				s, err := w.guest.State(w.ctx, jobName)
				must(t, err)
				if i := s.Instances[0]; i.Wanted != chained || i.Settings["archive_command"] != command {
					t.Errorf("%s: found %+v", what, i)
				}
				expect("chain", chained)
			}
			must(t, w.guest.Remove(w.ctx, jobName))
			if found := autoConf(t, c); found != before || c.Scalar("show archive_command") != theirs {
				t.Errorf("postgresql.auto.conf: found\n%s\nexpected\n%s", found, before)
			}

			// What somebody has put behind ours is theirs to keep.
			w.policy.ExistingArchiveCommand = "chain"
			w.apply(w.job(c))
			set(ours + " && ( /bin/true )")
			w.eventually(func() bool { return strings.HasSuffix(c.Scalar("show archive_command"), "( /bin/true )") })
			must(t, w.guest.Remove(w.ctx, jobName))
			if found := c.Scalar("show archive_command"); found != "/bin/true" {
				t.Errorf("found %q", found)
			}
		})
	}
}

// A command behind ours that fails keeps WAL from going away: nobody is told that all is well.
func TestApply_chainFails(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	c := cluster(t, pgtest.Options{Settings: map[string]string{"archive_command": "/bin/false"}})
	before := autoConf(t, c)
	w.policy.ExistingArchiveCommand = "chain"
	ctx, cancel := contextWithSeconds(w, 20)
	defer cancel()
	_, err := w.guest.Apply(ctx, w.deployment(w.job(c)))
	var stuck *guest.ProofError
	var failure *guest.ApplyError
	if !errors.As(err, &stuck) || !stuck.Behind || !strings.Contains(stuck.Archiver, "failed ") || !errors.As(err, &failure) || !failure.RolledBack {
		t.Fatalf("found %v", err)
	}
	if found := w.files(); len(found) > 0 || autoConf(t, c) != before {
		t.Errorf("left behind: %q", found)
	}
}

// wal_level and archive_mode are changed with one restart, where that is allowed, and put back where the server starts so.
func TestApply_walLevel(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	c := pgtest.Start(t, pgtest.Options{Settings: map[string]string{"archive_mode": "off", "wal_level": "minimal", "max_wal_senders": "0"}})
	t.Cleanup(func() {
		// A restarted server is no child of the test any more.
		_ = c.Command("pg_ctl", "stop", "-s", "-w", "-m", "immediate", "-D", c.DataDir).Run()
	})
	before := "# by hand\n" + autoConf(t, c) + "work_mem =  7MB  # as it was\n"
	must(t, os.WriteFile(filepath.Join(c.DataDir, "postgresql.auto.conf"), []byte(before), 0o600))
	w.expectFailing(w.job(c), "archive_mode", "wal_level", "max_wal_senders")
	w.policy.Restart = "allow"
	for _, senders := range []string{"0", "5"} {
		started := c.Scalar("select pg_postmaster_start_time()")
		s := w.apply(w.job(c))
		if found := s.Instances[0].Settings; found["archive_mode"] != "on" || found["wal_level"] != "replica" {
			t.Errorf("found %v", found)
		}
		if found := show(c, "max_wal_senders"); found != "10" {
			t.Errorf("max_wal_senders is %s", found)
		}
		if c.Scalar("select pg_postmaster_start_time()") == started {
			t.Error("the server was not restarted")
		}
		started = c.Scalar("select pg_postmaster_start_time()")
		w.apply(w.job(c))
		if c.Scalar("select pg_postmaster_start_time()") != started {
			t.Error("applied again, the server was restarted again")
		}
		expected := "minimal"
		if senders != "0" {
			c.Exec("alter system set max_wal_senders = " + senders) // with this, minimal would be the end
			expected = "replica"
		}
		must(t, w.guest.Remove(w.ctx, jobName))
		if found := c.Scalar("show wal_level") + ", " + c.Scalar("show archive_mode"); found != expected+", off" {
			t.Errorf("max_wal_senders = %s: found %s", senders, found)
		}
		if found := autoConf(t, c); senders == "0" && found != before {
			t.Errorf("postgresql.auto.conf: found\n%s\nexpected\n%s", found, before)
		}
	}
}

// Where nothing is left to put back but what has to stay, the file of a stopped server is left alone.
func TestRemove_keepsWhatIsTheirs(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	c := pgtest.Start(t, pgtest.Options{Settings: map[string]string{"archive_mode": "off", "wal_level": "minimal", "max_wal_senders": "0"}})
	t.Cleanup(func() {
		// A restarted server is no child of the test any more.
		_ = c.Command("pg_ctl", "stop", "-s", "-w", "-m", "immediate", "-D", c.DataDir).Run()
	})
	w.policy.Restart = "allow"
	w.apply(w.job(c))
	c.Exec("alter system set archive_mode = always") // somebody's decision, as is what follows
	c.Exec("alter system set archive_command = '/bin/true'")
	c.Exec("alter system set work_mem = '7MB'")
	expected := autoConf(t, c)
	must(t, c.Command("pg_ctl", "stop", "-s", "-w", "-m", "fast", "-D", c.DataDir).Run())
	must(t, w.guest.Remove(w.ctx, jobName))
	if found := autoConf(t, c); found != expected {
		t.Errorf("postgresql.auto.conf: found\n%s\nexpected\n%s", found, expected)
	}
}

// A Remove that ended between two of its steps is taken up by the next one.
func TestRemove_goesOn(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	c := pgtest.Start(t, pgtest.Options{Settings: map[string]string{"archive_mode": "off"}})
	t.Cleanup(func() {
		// A restarted server is no child of the test any more.
		_ = c.Command("pg_ctl", "stop", "-s", "-w", "-m", "immediate", "-D", c.DataDir).Run()
	})
	w.policy.Restart = "allow"
	w.apply(w.job(c))
	// The file says what it said before; the server has not heard of it.
	c.Exec("alter system reset archive_command")
	c.Exec("alter system reset archive_mode")
	must(t, w.guest.Remove(w.ctx, jobName))
	if found := c.Scalar("select coalesce(reset_val, '') from pg_settings where name = 'archive_command'") + ", " + c.Scalar("show archive_mode"); found != ", off" {
		t.Errorf("after the second half of a Remove: found %s", found)
	}

	w.policy.Restart = "never"
	d := cluster(t, pgtest.Options{})
	w.apply(w.job(d))
	d.Exec("alter system reset archive_command")
	must(t, w.guest.Remove(w.ctx, jobName))
	w.eventually(func() bool { return d.Scalar("show archive_command") == "" })
}

// What would end archiving with the next restart is seen and taken back.
func TestApply_pending(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	c := cluster(t, pgtest.Options{})
	before := autoConf(t, c)
	w.apply(w.job(c))
	pending := func() map[string]string {
		t.Helper()
		s, err := w.guest.State(w.ctx, jobName)
		must(t, err)
		return s.Instances[0].Pending
	}
	if found := pending(); len(found) > 0 {
		t.Errorf("found %v", found)
	}
	c.Exec("alter system set archive_mode = off")
	c.Exec("alter system set wal_level = logical") // somebody's plan, which does not concern us
	c.Exec("select pg_reload_conf()")
	w.eventually(func() bool { return len(pending()) > 0 })
	if found := pending(); len(found) != 1 || found["archive_mode"] != "off" {
		t.Errorf("found %v", found)
	}
	s := w.apply(w.job(c))
	if found := s.Instances[0].Pending; len(found) > 0 || strings.Contains(autoConf(t, c), "archive_mode") || !strings.Contains(autoConf(t, c), "logical") {
		t.Errorf("found %v in %s", found, autoConf(t, c))
	}
	c.Exec("alter system reset wal_level")

	// Where it stands in postgresql.conf, ALTER SYSTEM comes before it until the job is gone.
	file := filepath.Join(c.DataDir, "postgresql.conf")
	conf, err := os.ReadFile(file)
	must(t, err)
	must(t, os.WriteFile(file, append(slices.Clone(conf), "\narchive_mode = off\n"...), 0o600))
	c.Exec("select pg_reload_conf()")
	w.eventually(func() bool { return len(pending()) > 0 })
	if s := w.apply(w.job(c)); len(s.Instances[0].Pending) > 0 || !strings.Contains(autoConf(t, c), "archive_mode = 'on'") {
		t.Errorf("found %v in %s", s.Instances[0].Pending, autoConf(t, c))
	}
	must(t, w.guest.Remove(w.ctx, jobName))
	if found := autoConf(t, c); found != before || c.Scalar("show archive_mode") != "on" {
		t.Errorf("postgresql.auto.conf: found\n%s\nexpected\n%s", found, before)
	}
}

// Each difference of a runner has its word and its reason, and is mended.
// suspend stops a process and waits until it has: its threads run on until one of them takes the signal.
func suspend(t *testing.T, pid int) {
	t.Helper()
	must(t, syscall.Kill(pid, syscall.SIGSTOP))
	for deadline := time.Now().Add(10 * time.Second); time.Now().Before(deadline); time.Sleep(time.Millisecond) {
		stopped := true
		tasks, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/stat", pid))
		must(t, err)
		for _, task := range tasks {
			b, err := os.ReadFile(task)
			// "12345 (name) T …"; a thread that ends meanwhile is none.
			if _, after, ok := strings.Cut(string(b), ") "); err == nil && ok && !strings.HasPrefix(after, "T") {
				stopped = false
			}
		}
		if stopped && len(tasks) > 0 {
			return
		}
	}
	t.Fatalf("process %d does not stop", pid)
}

func TestState_runner(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	c := cluster(t, pgtest.Options{})
	cron := filepath.Join(w.layout.Root, "etc/cron.d/pgark")
	must(t, os.MkdirAll(filepath.Dir(cron), 0o755))
	must(t, os.MkdirAll(filepath.Join(w.layout.Root, "usr/sbin"), 0o755))
	must(t, os.WriteFile(filepath.Join(w.layout.Root, "usr/sbin/cron"), nil, 0o755))
	w.apply(w.job(c))
	socket := w.layout.Socket(jobName, name(c))
	for what, test := range map[string]struct {
		state, detail string
		change        func()
	}{
		"socket gone": {guest.RunnerSilent, "does not answer: no runner answers on " + socket, func() { must(t, os.Remove(socket)) }},
		"hung":        {guest.RunnerSilent, "does not answer", func() { suspend(t, w.status(c).PID) }},
		"link elsewhere": {guest.RunnerOutdated, w.layout.LibDirectory(), func() {
			must(t, os.Remove(w.layout.BinaryLink()))
			must(t, os.Symlink("/bin/true", w.layout.BinaryLink()))
		}},
		"cron's file gone":    {guest.RunnerDisabled, cron + ", which starts it with the machine, is missing", func() { must(t, os.Remove(cron)) }},
		"cron's file changed": {guest.RunnerDisabled, cron + ", which starts it with the machine, was changed", func() { must(t, os.WriteFile(cron, nil, 0o644)) }},
	} {
		test.change()
		s, err := w.guest.State(w.ctx, jobName)
		must(t, err)
		if i := s.Instances[0]; i.Runner != test.state || !strings.Contains(i.Detail, test.detail) {
			t.Errorf("%s: found %q, %q", what, i.Runner, i.Detail)
		}
		if i := w.apply(w.job(c)).Instances[0]; i.Runner != guest.RunnerRunning || i.Detail != "" {
			t.Errorf("%s: mended, found %q, %q", what, i.Runner, i.Detail)
		}
	}

	// After a start of the machine there is nothing below /run, and no process.
	for _, pid := range w.processes() {
		n, err := strconv.Atoi(pid)
		must(t, err)
		must(t, syscall.Kill(n, syscall.SIGKILL))
	}
	w.eventually(func() bool { return len(w.processes()) == 0 })
	must(t, os.RemoveAll(w.layout.RunRoot()))
	s, err := w.guest.State(w.ctx, jobName)
	if err != nil || s.Instances[0].Runner != guest.RunnerStopped || s.Instances[0].Detail == "" {
		t.Errorf("found %+v, %v", s, err)
	}
	b, err := os.ReadFile(cron)
	must(t, err)
	_, line, _ := strings.Cut(string(b), "@reboot root ")
	must(t, exec.CommandContext(w.ctx, "sh", "-c", line).Run())
	w.waitForRunner(c, 0)
	w.waitForWAL(c, c.SwitchWAL())
	must(t, w.guest.Remove(w.ctx, jobName))
	if _, err := os.Stat(cron); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("%s: found %v", cron, err)
	}
}

// A name that another machine has is refused with that machine named, before anything changes.
func TestApply_ownedByAnotherMachine(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	c := cluster(t, pgtest.Options{})
	must(t, os.MkdirAll(w.layout.ConfigDirectory(), 0o755))
	must(t, os.WriteFile(w.layout.MachineIDFile(), []byte("machine-one\n"), 0o644))
	if m, err := w.guest.Machine(w.ctx); err != nil || m.ID != "machine-one" {
		t.Fatalf("found %+v, %v", m, err)
	}
	w.apply(w.job(c))

	other := newWorld(t)
	other.location = w.location
	must(t, os.MkdirAll(other.layout.ConfigDirectory(), 0o755))
	must(t, os.WriteFile(other.layout.MachineIDFile(), []byte("machine-two\n"), 0o644))
	c2 := cluster(t, pgtest.Options{})
	before := autoConf(t, c2)
	k := other.expectFailing(other.job(c2), "repository_reachable").find(t, "repository_reachable")
	if !strings.Contains(k.Found, "machine-one") || !strings.Contains(k.Found, "db1") {
		t.Errorf("found %+v, expected the owner's name", k)
	}
	_, err := other.guest.Apply(other.ctx, other.deployment(other.job(c2)))
	var owned *repository.OwnedError
	if !errors.As(err, &owned) || owned.Owner.MachineID != "machine-one" || owned.Claimant.MachineID != "machine-two" {
		t.Errorf("found %v", err)
	}
	if found := other.files(); len(found) != 3 || autoConf(t, c2) != before { // etc, etc/pgark, the machine's id
		t.Errorf("the guest changed: %q", found)
	}
	must(t, os.RemoveAll(other.layout.ConfigDirectory()))
}

// Two instances, one let go.
func TestApply_selectionShrinks(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	a, b := cluster(t, pgtest.Options{Major: 13}), cluster(t, pgtest.Options{Major: 18})
	before := autoConf(t, b)
	j := w.job(a, b)
	if s := w.apply(j); len(s.Instances) != 2 || s.Instances[1].Name != name(b) || len(w.processes()) != 4 {
		t.Fatalf("found %+v, processes %v", s.Instances, w.processes())
	}
	s := w.apply(w.job(a))
	if len(s.Instances) != 1 || s.Instances[0].Name != name(a) || len(w.processes()) != 2 {
		t.Errorf("found %+v, processes %v", s.Instances, w.processes())
	}
	if autoConf(t, b) != before {
		t.Error("the settings of the instance that was let go were not put back")
	}
	w.waitForWAL(a, a.SwitchWAL())
}

func TestApply_credentials(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	c := cluster(t, pgtest.Options{})
	d := w.deployment(w.job(c))
	d.Credentials = &objectstore.Credentials{AccessKeyID: "AKIA", SecretAccessKey: "hush"}
	s, err := w.guest.Apply(w.ctx, d)
	must(t, err)
	file := w.layout.CredentialsFile(jobName)
	info, err := os.Stat(file)
	must(t, err)
	_, uid, _ := pgtest.Owner(t)
	if found := uidOf(t, info); !s.HasCredentials || info.Mode().Perm() != 0o600 || found != uid {
		t.Errorf("credentials: found %v, mode %o, owner %d, expected mode 600, owner %d", s.HasCredentials, info.Mode().Perm(), found, uid)
	}
	if b := s.Job.Encode(); strings.Contains(string(b), "hush") {
		t.Error("the job file holds the secret")
	}
	for what, change := range map[string]func(){
		"another secret": func() {
			must(t, os.WriteFile(file, []byte("AWS_ACCESS_KEY_ID=AKIA\nAWS_SECRET_ACCESS_KEY=else\n"), 0o600))
		},
		"readable": func() { must(t, os.Chmod(file, 0o644)) },
		"gone":     func() { must(t, os.Remove(file)) },
	} {
		change()
		s, err := w.guest.State(w.ctx, jobName)
		if err != nil || !s.CredentialsChanged || what != "gone" && s.AccessKeyID != "AKIA" {
			t.Errorf("%s: found %+v, %v", what, s, err)
		}
		if s, err = w.guest.Apply(w.ctx, d); err != nil || s.CredentialsChanged || s.AccessKeyID != "AKIA" {
			t.Errorf("%s: mended, found %+v, %v", what, s, err)
		}
	}
	if s := w.apply(w.job(c)); s.HasCredentials {
		t.Error("keys that are not declared any more stay on the guest")
	}
}

// Two changers wait for one another.
func TestApply_concurrent(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	c := cluster(t, pgtest.Options{})
	results := make(chan error, 3)
	for range cap(results) {
		go func() {
			_, err := guest.Local(w.layout).Apply(w.ctx, w.deployment(w.job(c)))
			results <- err
		}()
	}
	for range cap(results) {
		must(t, <-results)
	}
	if pids := w.processes(); len(pids) != 2 {
		t.Errorf("processes: found %v, expected a supervisor and a runner", pids)
	}
}

// A cancelled Apply of a new job puts everything back, in time of its own.
// Whoever interrupts an apply while PostgreSQL is down for its restart finds it up again.
func TestApply_cancelledDuringRestart(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	c := pgtest.Start(t, pgtest.Options{Settings: map[string]string{"archive_mode": "off"}})
	t.Cleanup(func() {
		// A restarted server is no child of the test any more.
		_ = c.Command("pg_ctl", "stop", "-s", "-w", "-m", "immediate", "-D", c.DataDir).Run()
	})
	w.policy.Restart = "allow"
	ctx, cancel := context.WithCancel(w.ctx)
	go func() {
		for w.ctx.Err() == nil {
			if _, err := os.Stat(filepath.Join(c.DataDir, "postmaster.pid")); err != nil {
				break
			}
			time.Sleep(time.Millisecond)
		}
		cancel()
	}()
	if _, err := w.guest.Apply(ctx, w.deployment(w.job(c))); !errors.Is(err, context.Canceled) {
		t.Errorf("found %v", err)
	}
	if found := c.Scalar("show archive_mode"); found != "off" {
		t.Errorf("archive_mode: found %s", found)
	}
	if found := w.files(); len(found) > 0 {
		t.Errorf("left behind: %q", found)
	}
}

func TestApply_cancelled(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	c := cluster(t, pgtest.Options{})
	before := autoConf(t, c)
	ctx, cancel := context.WithCancel(w.ctx)
	go func() { // as soon as the runner is in place
		for w.ctx.Err() == nil {
			if _, err := os.Stat(w.layout.PIDFile(jobName, name(c))); err == nil {
				break
			}
			time.Sleep(time.Millisecond)
		}
		cancel()
	}()
	_, err := w.guest.Apply(ctx, w.deployment(w.job(c)))
	if err == nil || !errors.Is(err, context.Canceled) {
		t.Fatalf("found %v", err)
	}
	if found := w.files(); len(found) > 0 || autoConf(t, c) != before {
		t.Errorf("left behind: %q, %s", found, autoConf(t, c))
	}
}

func TestApply_debianNames(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	c := cluster(t, pgtest.Options{SeparateConfig: true, Settings: map[string]string{"cluster_name": "whatever/orders db"}})
	find := func() guest.Instance {
		t.Helper()
		all, err := w.guest.Discover(w.ctx)
		must(t, err)
		for _, i := range all {
			if i.DataDirectory == c.DataDir {
				return i
			}
		}
		t.Fatalf("not discovered: %+v", all)
		return guest.Instance{}
	}
	i := find()
	if expected := strconv.Itoa(c.Major) + "-orders_db"; i.Name != expected || !i.Running || i.Role != "primary" ||
		i.ArchiveMode != "on" || i.WALLevel != "replica" || i.VersionNumber/10000 != c.Major || i.SizeBytes < 1<<20 || i.WALSegment != 16<<20 {
		t.Errorf("found %+v, expected %s", i, expected)
	}
	// Debian's name comes first, and is the only one of a server that is stopped.
	dir := filepath.Join(w.layout.DebianClusters(), strconv.Itoa(c.Major), "main")
	must(t, os.MkdirAll(filepath.Dir(dir), 0o755))
	must(t, os.Symlink(c.ConfigDir, dir))
	main := strconv.Itoa(c.Major) + "-main"
	if i := find(); i.Name != main {
		t.Errorf("found %s, expected %s", i.Name, main)
	}
	c.Stop(pgtest.Fast)
	if i := find(); i.Name != main || i.Running || i.Port != c.Port || i.SocketDirectory != c.SocketDir || i.SystemID != c.SystemID || i.Role != "" {
		t.Errorf("found %+v", i)
	}
	j := w.job()
	j.Instances.Include = []string{main}
	k := w.expectFailing(j, "postgresql_running").find(t, "postgresql_running")
	if !strings.Contains(k.Remedy, "pg_ctlcluster "+strconv.Itoa(c.Major)+" main start") && !strings.Contains(k.Remedy, "systemctl start") {
		t.Errorf("found %+v", k)
	}
	must(t, os.RemoveAll(filepath.Join(w.layout.Root, "etc")))
}
