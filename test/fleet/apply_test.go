//go:build linux

package fleet

import (
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/pgark/terraform-provider-pgark/test/guests"
)

const (
	socketDir = "/var/run/postgresql"
	ordersJob = "orders"
	main15    = "15-main"
	unit15    = "pgark@orders-15-main.service"
)

// example reads a file of examples/guides: what the guides show is what is tested.
func example(t *testing.T, name string) string {
	t.Helper()
	b, err := os.ReadFile(filepath.Join("..", "..", "examples", "guides", name))
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

const oldArchive = "/var/lib/postgresql/old"

// oldCommand is an archive_command of somebody else, as people write them: it fails for a file that it has already.
const oldCommand = `test ! -f ` + oldArchive + `/%f && cp %p ` + oldArchive + `/%f`

// prepare turns archive_mode on and gives the guest's own cluster another archiver.
func prepare(g *guests.Guest) {
	g.Run("install -d -o postgres " + oldArchive)
	g.SQL(socketDir, 5432, "alter system set archive_mode = on")
	g.SQL(socketDir, 5432, "alter system set archive_command = '"+oldCommand+"'")
	g.Run("systemctl restart postgresql@15-main")
}

// untouched notes what a guest is like, and returns what compares it with that later: files, settings, the server's own
// file of settings byte for byte.
func (w *world) untouched(g *guests.Guest) (compare func(when string)) {
	w.Helper()
	look := func() (files []string, settings string) {
		w.Helper()
		// What the old archiver stores meanwhile is its own.
		files = slices.DeleteFunc(g.Files(), func(f string) bool { return strings.HasPrefix(f, oldArchive+"/") })
		return files, g.SQL(socketDir, 5432, "select name, setting, source from pg_settings where name like 'archive%' or name in ('wal_level') order by 1") +
			g.Run("sha256sum /var/lib/postgresql/15/main/postgresql.auto.conf /etc/postgresql/15/main/*.conf; ls /etc/systemd/system /etc/systemd/system/multi-user.target.wants")
	}
	files, settings := look()
	return func(when string) {
		w.Helper()
		files2, settings2 := look()
		for _, f := range files2 {
			if !slices.Contains(files, f) {
				w.Errorf("%s: found, and not before: %s", when, f)
			}
		}
		for _, f := range files {
			if !slices.Contains(files2, f) {
				w.Errorf("%s: found before, and not now: %s", when, f)
			}
		}
		if settings != settings2 {
			w.Errorf("%s: settings were\n%s\nand are\n%s", when, settings, settings2)
		}
	}
}

// protects demands that the job's runner runs, that an image can be taken, and that WAL goes on arriving.
func (w *world) protects(g *guests.Guest) {
	w.Helper()
	if state := strings.TrimSpace(g.Run("systemctl is-active " + unit15 + "; systemctl is-enabled " + unit15)); state != "active\nenabled" {
		w.Errorf("the unit is %q", state)
	}
	image(g, ordersJob)
	w.arrives(g)
	w.noGap(g, ordersJob)
}

// arrives demands that a new segment reaches the repository.
func (w *world) arrives(g *guests.Guest) {
	w.Helper()
	had := w.segments(ordersJob, main15)
	g.SQL(socketDir, 5432, "create table if not exists arrives (i int)")
	g.SQL(socketDir, 5432, "insert into arrives values (1)")
	g.SQL(socketDir, 5432, "select pg_switch_wal()")
	w.eventually(90*time.Second, "a segment arrives", func() bool { return w.segments(ordersJob, main15) > had })
}

// TestApply reaches one guest in every way there is: as root, as an account with the documented lines of sudoers, through a
// bastion, with a role that is no superuser. Each time it protects, keeps protecting after a reboot, and leaves nothing.
func TestApply(t *testing.T) {
	w := newWorld(t)
	machines := w.net.BootAll(guests.Options{}, guests.Options{Name: "bastion", WithoutPostgreSQL: true})
	g, bastion := machines[0], machines[1]
	prepare(g)

	t.Run("root", func(t *testing.T) {
		w := w.in(t)
		clean := w.untouched(g)
		w.configure("", job(ordersJob, g, `guest_settings = { existing_archive_command = "replace" }`))
		w.plan()
		clean("after a plan")
		w.apply()
		w.protects(g)
		w.nothingToDo()
		score := strings.Fields(regexp.MustCompile(`Overall exposure level.*: [0-9.]+`).FindString(g.Run("systemd-analyze security --no-pager " + unit15)))
		if len(score) == 0 {
			t.Error("systemd-analyze gives no score")
		} else if v, err := strconv.ParseFloat(score[len(score)-1], 64); err != nil || v >= 3 {
			t.Errorf("systemd-analyze security: found %v, expected less than 3.0", score)
		} else {
			t.Logf("systemd-analyze security: %.1f", v)
		}
		w.stateFile()
		w.destroy()
		clean("after destroy")
	})

	t.Run("sudo and chain", func(t *testing.T) {
		w := w.in(t)
		g.AddUser("deploy", example(t, "ssh-and-sudo/sudoers"))
		clean := w.untouched(g)
		w.configure(`user = "deploy"`, job(ordersJob, g, `guest_settings = { existing_archive_command = "chain" }`))
		w.apply()
		w.protects(g)
		w.nothingToDo()
		// Both must succeed: the old archiver has what the repository has.
		last := strings.TrimSpace(g.SQL(socketDir, 5432, "select last_archived_wal from pg_stat_archiver"))
		g.Run("test -f " + oldArchive + "/" + last)
		w.destroy()
		clean("after destroy")
	})

	t.Run("bastion", func(t *testing.T) {
		w := w.in(t)
		clean := w.untouched(g)
		w.configure(fmt.Sprintf("bastion_host = %q", bastion.Address), job(ordersJob, g, `guest_settings = { existing_archive_command = "replace" }`))
		w.apply()
		w.protects(g)
		w.nothingToDo()
		if log := g.Run("journalctl -q -o cat -u ssh -n 20 | grep Accepted | tail -n 1"); !strings.Contains(log, "from "+bastion.Address+" ") {
			t.Errorf("sshd accepted %q, expected a login from the bastion %s", log, bastion.Address)
		}
		w.destroy()
		clean("after destroy")
	})

	t.Run("role without superuser, and a reboot", func(t *testing.T) {
		w := w.in(t)
		g.Put("/tmp/role.sql", []byte(example(t, "least-privilege/role.sql")), 0o644)
		g.Run("su postgres -c 'psql -q -v ON_ERROR_STOP=1 -f /tmp/role.sql' && rm /tmp/role.sql")
		for file, line := range map[string]string{"pg_hba.conf": example(t, "least-privilege/pg_hba.conf"), "pg_ident.conf": example(t, "least-privilege/pg_ident.conf")} {
			conf := "/etc/postgresql/15/main/" + file
			g.Put(conf+".new", []byte(line+g.Run("cat "+conf)), 0o640)
			g.Run(fmt.Sprintf("chown postgres:postgres %[1]s.new && mv %[1]s.new %[1]s", conf))
		}
		g.SQL(socketDir, 5432, "select pg_reload_conf()")
		clean := w.untouched(g)
		w.configure("", job(ordersJob, g, `
  guest_settings = { existing_archive_command = "replace" }
  database_user  = "pgark"`))
		w.apply()
		w.protects(g)
		w.nothingToDo()
		if who := strings.TrimSpace(g.SQL(socketDir, 5432, "select distinct usename from pg_stat_activity where application_name = 'pgark'")); who != "" && who != "pgark" {
			t.Errorf("pgark works as %q", who)
		}

		g.Reboot()
		w.eventually(90*time.Second, "the runner runs again", func() bool {
			_, err := g.Try("test \"$(systemctl is-active " + unit15 + ")\" = active && psql -h " + socketDir + " -U postgres -qAtc 'select 1' postgres || su postgres -c 'psql -qAtc \"select 1\"'")
			return err == nil
		})
		w.protects(g)
		w.nothingToDo()
		w.destroy()
		clean("after destroy")
	})
}

// TestGuide does what "Protect a server in five minutes" says, letter by letter.
func TestGuide(t *testing.T) {
	w := newWorld(t)
	g := w.net.Boot(guests.Options{})
	g.SQL(socketDir, 5432, "alter system set archive_mode = on")
	g.Run("systemctl restart postgresql@15-main")
	if err := os.WriteFile(filepath.Join(w.dir, "main.tf"), []byte(example(t, "five-minutes/main.tf")), 0o644); err != nil {
		t.Fatal(err)
	}
	key, _ := w.net.Key()
	w.env = append(w.env, "TF_VAR_host="+g.Address, "TF_VAR_repository=s3://"+bucket+"/backups", "TF_VAR_endpoint="+w.s3.Endpoint(),
		"TF_VAR_private_key_file="+key, "TF_VAR_known_hosts_file="+w.net.KnownHosts())
	w.must("init", "-no-color", "-input=false")
	w.says(w.apply(), "15-main in /var/lib/postgresql/15/main")
	w.nothingToDo()
	g.SQL(socketDir, 5432, "create table proof as select 42 as answer")
	w.arrives(g)
	w.eventually(2*time.Minute, "the first image", func() bool {
		l := w.list(g, ordersJob)
		return len(l.Series) == 1 && len(l.Series[0].Images) > 0 && len(l.Series[0].Windows) > 0
	})
	guide, err := os.ReadFile(filepath.Join("..", "..", "templates", "guides", "protect-a-server.md.tmpl"))
	if err != nil {
		t.Fatal(err)
	}
	command := regexp.MustCompile(`(?m)^pgark restore .*$`).FindString(string(guide))
	if command == "" {
		t.Fatal("the guide restores nothing")
	}
	g.Run(command)
	if got := strings.TrimSpace(g.SQL(socketDir, 5433, "select answer from proof")); got != "42" {
		t.Errorf("the restored table holds %q", got)
	}
	g.Run("su postgres -c '/usr/lib/postgresql/15/bin/pg_ctl -D /var/lib/postgresql/restored -m fast stop'")
	w.destroy()
}

// TestLifeCycle is about guests that cannot be asked, are others than they were, or are not there yet.
func TestLifeCycle(t *testing.T) {
	w := newWorld(t)
	g := w.net.Boot(guests.Options{})
	declaration := job(ordersJob, g, `guest_settings = { restart = "allow" }`)
	unknown := filepath.Join(w.dir, "known_hosts")

	// Trust on first use: what was seen when the job was created is pinned, for every machine that has the state.
	w.configureWithKnownHosts(unknown, `
    host_key_policy = "accept-new"
    timeout         = "10s"`, declaration)
	w.apply()
	if !strings.Contains(w.stateFile(), strings.TrimSpace(g.HostKey())) {
		t.Error("the state does not hold the host key")
	}
	w.nothingToDo()

	// A host that cannot be reached: an error that says who was to be reached where; the state stays.
	before := w.stateFile()
	g.Cut()
	w.says(w.planFails(), "root@"+g.Address+":22", "on_unreachable")
	if w.stateFile() != before {
		t.Error("a guest that cannot be reached has changed the state")
	}
	g.Mend()
	w.nothingToDo()

	// Another host key: fatal under every policy but insecure, with both fingerprints.
	was := fingerprint(g)
	g.Run("rm /etc/ssh/ssh_host_*; ssh-keygen -q -t ed25519 -N '' -f /etc/ssh/ssh_host_ed25519_key && systemctl restart ssh")
	now := fingerprint(g)
	w.says(w.planFails(), now, "host_key")
	t.Logf("the key was %s and is %s", was, now)
	fresh := strings.Join(strings.Fields(g.Run("cat /etc/ssh/ssh_host_ed25519_key.pub"))[:2], " ")
	w.configureWithKnownHosts(unknown, `host_key_policy = "accept-new"`, job(ordersJob, g, fmt.Sprintf(`
  guest_settings = { restart = "allow" }
  connection     = { host_key = %q }`, fresh)))
	w.apply()
	w.nothingToDo()

	// The state was lost: import finds the job on its guest.
	w.must("state", "rm", "pgark_postgresql_backup_job.orders")
	w.must("import", "-no-color", "-input=false", "pgark_postgresql_backup_job.orders", g.Address+"/"+ordersJob)
	w.apply() // what only the configuration knows: policies, timeouts
	w.nothingToDo()
	w.destroy()

	// A host that is still booting when its job is created is waited for.
	g.Kill()
	started := make(chan struct{})
	go func() {
		defer close(started)
		time.Sleep(3 * time.Second)
		g.Start()
	}()
	defer func() { <-started }()
	w.configureWithKnownHosts(unknown, `
    host_key_policy = "accept-new"
    wait_for_host   = "2m"`, job(ordersJob, g, fmt.Sprintf(`
  guest_settings = { restart = "allow" }
  connection     = { host_key = %q }`, fresh)))
	out := w.must("apply", "-no-color", "-input=false", "-auto-approve")
	w.says(out, "Creation complete")
	<-started
	w.destroy()
}

func fingerprint(g *guests.Guest) string {
	return strings.Fields(g.Run("ssh-keygen -l -f /etc/ssh/ssh_host_ed25519_key.pub"))[1]
}

// TestWithoutSystemd protects a guest that has no systemd.
func TestWithoutSystemd(t *testing.T) {
	w := newWorld(t)
	g := w.net.Boot(guests.Options{NoSystemd: true})
	w.configure("", job(ordersJob, g, `guest_settings = { restart = "allow" }`))
	w.apply()
	image(g, ordersJob)
	w.arrives(g)
	w.nothingToDo()
	g.Run("pkill -9 -f 'pgark run'")
	out, changes := w.plan()
	if !changes {
		t.Errorf("the plan does not see that the runner was killed:\n%s", out)
	}
	w.says(out, "runner")
	w.apply()
	w.arrives(g)
	w.nothingToDo()
	w.noGap(g, ordersJob)
	w.destroy()
	if left := g.Run("ls -d /etc/pgark /usr/local/lib/pgark /run/pgark /var/log/pgark /usr/local/bin/pgark 2>/dev/null || true"); left != "" {
		t.Errorf("destroy has left %s", left)
	}
}
