//go:build linux

package guest_test

import (
	"errors"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"github.com/pgark/terraform-provider-pgark/internal/engine/daemon/control"
	"github.com/pgark/terraform-provider-pgark/internal/engine/guest"
	"github.com/pgark/terraform-provider-pgark/internal/engine/postgres"
	"github.com/pgark/terraform-provider-pgark/test/pgtest"
)

const role = "pgark"

// sql runs statements as the superuser, each by itself.
func sql(c *pgtest.Cluster, statements ...string) {
	for _, s := range statements {
		c.Exec(s)
	}
}

// A role that is no superuser, and has exactly what Grants says, does everything: check, apply, image, WAL, remove. What it
// lacks is named with the statement that gives it, and a shell that runs the remedy gives it.
func TestPrivileges_least(t *testing.T) {
	t.Parallel()
	for _, major := range pgtest.Majors {
		t.Run(strconv.Itoa(major), func(t *testing.T) {
			t.Parallel()
			w := newWorld(t)
			c := cluster(t, pgtest.Options{Major: major, SeparateConfig: major%2 == 0})
			j := w.job(c)
			j.DatabaseUser = role

			// Nothing is prepared: one remedy lets the role in, makes it, and gives it what it needs.
			k := w.expectFailing(j, "privileges").find(t, "privileges")
			if !strings.Contains(k.Remedy, "local all pgark peer map=pgark") || !strings.Contains(k.Remedy, "pgark "+c.Owner+" pgark") {
				t.Errorf("found %+v", k)
			}
			follow(t, k)
			manage := major >= 15
			if !manage {
				// Only a superuser can change settings there.
				k := w.expectFailing(j, "privileges").find(t, "privileges")
				if !strings.Contains(k.Found, "before PostgreSQL 15 only a superuser can") || !strings.Contains(k.Remedy, "guest_settings = { manage = false }") {
					t.Errorf("found %+v", k)
				}
				follow(t, k)
				w.policy.Manage = false
			}
			w.expectFailing(j)

			if c.Scalar("select rolsuper from pg_roles where rolname = 'pgark'") != "f" {
				t.Error("the role is a superuser")
			}
			sql(c, "alter role pgark noreplication")
			if k := w.expectFailing(j, "replication").find(t, "replication"); !strings.Contains(k.Remedy, "ALTER ROLE pgark REPLICATION") || strings.Contains(k.Remedy, "sed") {
				t.Errorf("found %+v", k)
			}
			w.mend(j, "replication")
			var alter []string
			if manage {
				alter = []string{"archive_command"}
			}
			grants := postgres.Grants(major, role, alter...)
			for _, g := range grants {
				sql(c, strings.Replace(strings.Replace(g, "GRANT", "REVOKE", 1), " TO ", " FROM ", 1))
				if k := w.expectFailing(j, "privileges").find(t, "privileges"); !strings.Contains(k.Remedy, g) {
					t.Errorf("without %s: found %+v", g, k)
				}
				w.mend(j, "privileges")
			}
			// No more is given than is needed: nobody has it by default.
			if found := c.Scalar("select count(*) from pg_auth_members where member = 'pgark'::regrole"); found != "1" {
				t.Errorf("member of %s roles", found)
			}
			// Some rights everybody has, until somebody takes them away.
			sql(c, "revoke execute on function pg_control_system() from public")
			w.mend(j, "privileges")

			s := w.apply(j)
			if s.Job.DatabaseUser != role || s.Job.Protected[0].DatabaseUser != role || s.Instances[0].Problem != "" {
				t.Errorf("found %+v, %+v", s.Job, s.Instances)
			}
			proofs, err := guest.Prove(w.ctx, w.layout, s.Job, nil)
			if err != nil || len(proofs) != 1 || proofs[0].Segment == "" {
				t.Errorf("found %+v, %v", proofs, err)
			}
			if image, err := control.TakeImage(w.ctx, w.layout.Socket(jobName, name(c)), control.FullKind, func(string) {}); err != nil || len(image) == 0 {
				t.Fatalf("found %s, %v", image, err)
			}
			discovered := w.discover(c)
			if discovered.DatabaseUser != role || discovered.Problem != "" || discovered.SizeBytes < 1<<20 {
				t.Errorf("found %+v", discovered)
			}
			if k, err := w.guest.Check(w.ctx, guest.CheckRequest{Job: s.Job, Settings: guest.SettingsPolicy{Manage: true, Restart: "never", ExistingArchiveCommand: "fail"}, Deployed: true}); err != nil || len(checks(k).failing()) > 0 {
				t.Errorf("deployed: found %+v, %v", k, err)
			}

			// Another role, from the next apply on.
			j.DatabaseUser = ""
			if s := w.apply(j); s.Job.Protected[0].DatabaseUser != c.Owner {
				t.Errorf("found %+v", s.Job.Protected)
			}
			j.DatabaseUser = role
			if s := w.apply(j); s.Job.Protected[0].DatabaseUser != role {
				t.Errorf("found %+v", s.Job.Protected)
			}
			err = w.guest.Remove(w.ctx, jobName)
			var stuck *guest.SettingsError
			if !manage && errors.As(err, &stuck) {
				// Who set archive_command has to take it away: PostgreSQL would go on calling a program that is gone.
				follow(t, guest.Check{Name: "archive_command", Remedy: stuck.Hint()})
				err = w.guest.Remove(w.ctx, jobName)
			}
			must(t, err)
			if c.Scalar("select setting from pg_settings where name = 'archive_command'") != "" {
				t.Error("archive_command is still set")
			}
		})
	}
}

// discover finds one cluster among those of this machine.
func (w *world) discover(c *pgtest.Cluster) guest.Instance {
	w.t.Helper()
	all, err := w.guest.Discover(w.ctx)
	must(w.t, err)
	for _, i := range all {
		if i.DataDirectory == c.DataDir {
			return i
		}
	}
	w.t.Fatalf("not discovered: %+v", all)
	return guest.Instance{}
}

// Every way in which a server keeps a role out has its own remedy, which works.
func TestPrivileges_letIn(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	c := cluster(t, pgtest.Options{})
	j := w.job(c)
	j.DatabaseUser = role
	w.mend(j, "privileges") // pg_hba.conf, pg_ident.conf, the role, its grants

	reject := func(lines string) {
		t.Helper()
		must(t, os.WriteFile(filepath.Join(c.ConfigDir, "pg_hba.conf"), []byte(lines), 0o600))
		must(t, syscall.Kill(c.PID(), syscall.SIGHUP))
		w.eventually(func() bool { return w.check(j).find(t, "privileges").Status == guest.Fail })
	}
	reject("local all all peer\n")
	w.mend(j, "privileges")
	w.expectFailing(j) // it may stream WAL, too
	reject("local all all reject\n")
	// The owner is kept out, too; what can be done without a connection still lets the role in.
	follow(t, guest.Check{Name: "first part", Remedy: strings.SplitN(w.check(j).find(t, "privileges").Remedy, "\n", 2)[0]})
	w.expectFailing(j)

	owner := w.job(c)
	w.mend(owner, "privileges")
	w.expectFailing(owner)
	sql(c, "alter role pgark nologin")
	w.mend(j, "privileges")
	sql(c, "revoke connect on database postgres from public")
	w.mend(j, "privileges")
	sql(c, "grant connect on database postgres to public", "alter role pgark connection limit 0")
	if k := w.check(j).find(t, "privileges"); !strings.Contains(k.Found, "too many connections") {
		t.Errorf("found %+v", k)
	}
	w.mend(j, "privileges")
	sql(c, "drop owned by pgark; drop role pgark")
	if k := w.check(j).find(t, "privileges"); !strings.Contains(k.Found, "does not exist") {
		t.Errorf("found %+v", k)
	}
	w.mend(j, "privileges")
}

// Nobody may ALTER SYSTEM where that is turned off, a superuser neither.
func TestPrivileges_alterSystemOff(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	c := cluster(t, pgtest.Options{Major: 17, Settings: map[string]string{"allow_alter_system": "off"}})
	if k := w.expectFailing(w.job(c), "privileges").find(t, "privileges"); k.Found != "allow_alter_system = off" {
		t.Errorf("found %+v", k)
	}
	w.mend(w.job(c), "privileges")
	w.apply(w.job(c))
}

// A server without a socket cannot be asked, and gets one.
func TestPrivileges_noSocket(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	c := cluster(t, pgtest.Options{NoStart: true, Settings: map[string]string{"unix_socket_directories": "", "listen_addresses": "127.0.0.1"}})
	c.Launch()
	adopt(t, c)
	w.eventually(func() bool {
		p, err := postgres.ReadPostmaster(c.DataDir)
		return err == nil && p.Status == "ready"
	})
	if k := w.expectFailing(w.job(c), "privileges").find(t, "privileges"); !strings.Contains(k.Found, "no unix socket") {
		t.Errorf("found %+v", k)
	}
	if found := w.discover(c); !strings.Contains(found.Problem, "no unix socket") {
		t.Errorf("found %+v", found)
	}
	w.mend(w.job(c), "privileges")
}
