//go:build linux

package fleet

import (
	"fmt"
	"strings"
	"testing"

	"github.com/pgark/terraform-provider-pgark/test/guests"
)

// cloned are Debian's clusters that clone makes.
type cloned struct {
	name     string
	port     int
	settings string // lines of postgresql.conf
}

// clone makes further clusters of 15/main, with its system identifier, and starts them all. It is much quicker than initdb.
func clone(g *guests.Guest, clusters ...cloned) {
	script := "systemctl stop postgresql@15-main\n"
	for _, c := range clusters {
		script += fmt.Sprintf(`cp -a /etc/postgresql/15/main /etc/postgresql/15/%[1]s
cp -a /var/lib/postgresql/15/main /var/lib/postgresql/15/%[1]s
sed -i 's,15/main,15/%[1]s,g; s,15-main,15-%[1]s,g; s,^port = .*,port = %[2]d,' /etc/postgresql/15/%[1]s/postgresql.conf
cat >>/etc/postgresql/15/%[1]s/postgresql.conf <<'CONF'
%[3]s
CONF
`, c.name, c.port, c.settings)
	}
	script += "systemctl start postgresql@15-main"
	for _, c := range clusters {
		script += " postgresql@15-" + c.name
	}
	g.Run(script)
}

// drift is something that somebody does on a guest, behind Terraform's back.
type drift struct {
	what string
	by   string   // a script
	says []string // what the plan calls it
}

func unitOf(instance string) string { return "pgark@" + ordersJob + "-" + instance + ".service" }

// alter is a statement in a cluster of the guest, as its owner, followed by a reload.
func alter(port int, statement string) string {
	return fmt.Sprintf(`su postgres -c 'psql -XAtq -v ON_ERROR_STOP=1 -h %s -p %d postgres' <<'SQL'
%s;
select pg_reload_conf();
SQL`, socketDir, port, statement)
}

// drifts are made, seen and repaired round by round; those of one round do not hide one another: each instance has one
// way at a time in which its runner is not as it was left.
var drifts = [][]drift{
	{
		{"a unit is stopped", "systemctl stop " + unitOf("15-main"), []string{"the runner of 15-main is stopped"}},
		{"a unit is masked", "systemctl stop " + unitOf("15-b") + "; ln -sf /dev/null /etc/systemd/system/" + unitOf("15-b") + "; systemctl daemon-reload",
			[]string{"the runner of 15-b cannot start: its unit is masked"}},
		{"a unit is disabled", "systemctl disable -q " + unitOf("15-c"), []string{"the runner of 15-c does not start with the machine: its unit is disabled"}},
		{"a unit is edited", "echo '# edited' >>/etc/systemd/system/" + unitOf("15-d") + "; systemctl daemon-reload",
			[]string{"the runner of 15-d does not run as deployed: its unit was edited", "/etc/systemd/system/" + unitOf("15-d")}},
		{"the job file is deleted", "rm /etc/pgark/jobs/orders.json", []string{"the job file is missing or unreadable", "config_sha256"}},
		{"the credentials are edited", "sed -i 's/^AWS_SECRET_ACCESS_KEY=.*/AWS_SECRET_ACCESS_KEY=another/' /etc/pgark/jobs/orders.credentials",
			[]string{"the file with the S3 keys was changed by hand", "guest_has_credentials"}},
		{"archive_command is changed", alter(5432, "alter system set archive_command = 'cp --password=hush %p /tmp/%f'"),
			[]string{`archive_command of 15-main is set by somebody else, to "cp …", expected pgark's`, "guest_settings_actual"}},
		{"archive_library is set", alter(5502, "alter system set archive_library = 'basic_archive'"),
			[]string{`archive_library of 15-b is "basic_archive", which takes the place of archive_command; expected it empty`}},
		{"archive_mode will be off", alter(5503, "alter system set archive_mode = off"),
			[]string{`archive_mode of 15-c will be "off" after its next restart`}},
	},
	{
		{"the link to the binary is removed", "rm /usr/local/bin/pgark", []string{"the runner's binary is missing, or the link to it is broken", "runner_sha256"}},
		{"the credentials are deleted", "rm /etc/pgark/jobs/orders.credentials", []string{"S3 keys", "guest_has_credentials"}},
		{"a drop-in is added", `d=/etc/systemd/system/` + unitOf("15-main") + `.d
mkdir "$d"; printf '[Service]\nNice=5\n' >"$d/nice.conf"; systemctl daemon-reload`,
			[]string{"the runner of 15-main does not run as deployed: its unit was edited", "nice.conf"}},
		{"a replication slot is left over", alter(5502, "select pg_create_physical_replication_slot('pgark_orders', true)"),
			[]string{"the replication slot pgark_orders of 15-b is left over, and keeps WAL from being removed"}},
		{"a socket is deleted", "rm /run/pgark/orders/15-b.sock", []string{"the runner of 15-b runs, but does not answer at its socket"}},
		{"a port is changed", "sed -i 's/^port = .*/port = 5513/' /etc/postgresql/15/c/postgresql.conf; systemctl restart postgresql@15-c",
			[]string{"the port of 15-c has changed from 5503 to 5513", "protected_instances"}},
		{"a data directory is moved", `systemctl stop postgresql@15-d
mv /var/lib/postgresql/15/d /srv/d
sed -i "s,^data_directory = .*,data_directory = '/srv/d'," /etc/postgresql/15/d/postgresql.conf
systemctl start postgresql@15-d`,
			[]string{"the data directory of 15-d has moved from /var/lib/postgresql/15/d to /srv/d"}},
		{"the job file is edited", `sed -i 's/"0 3 \* \* \*"/"0 4 * * *"/' /etc/pgark/jobs/orders.json; grep -q '"0 4 ' /etc/pgark/jobs/orders.json`,
			[]string{"the job file was edited: image.schedule"}},
	},
	{
		// Its place names another content than it has.
		{"the binary is replaced", `f=$(readlink -f /usr/local/bin/pgark)
cp "$f" "$f.new"; echo >>"$f.new"; mv "$f.new" "$f"`, []string{"the runner's binary was replaced: found ", "runner_sha256"}},
		{"a cluster is made anew", `pg_dropcluster --stop 15 c
pg_createcluster 15 c -p 5513 -o archive_mode=on --start >/dev/null`,
			[]string{"the cluster 15-c is another: its system identifier was ", "a new series of backups begins, and the old one stays restorable", "archive_command of 15-c is empty"}},
		{"an instance is added", "pg_createcluster 15 e -p 5505 -o archive_mode=on --start >/dev/null",
			[]string{"instance 15-e in /var/lib/postgresql/15/e is new, and not protected yet"}},
	},
	{
		{"an instance is dropped", "pg_dropcluster --stop 15 e", []string{"instance 15-e is gone from the guest; its backups stay"}},
		{"a unit is deleted", "systemctl disable -q --now " + unitOf("15-main") + "; rm -f /etc/systemd/system/" + unitOf("15-main") + "; systemctl daemon-reload",
			[]string{"the runner of 15-main is missing: there is no service for it"}},
		{"a server was restarted without archive_mode", alter(5502, "alter system set archive_mode = off") + "\nsystemctl restart postgresql@15-b",
			[]string{"archive_mode of 15-b is off: its WAL is not archived"}},
	},
}

// asLeft is what an apply has left on the guest, of the instances that stay what they are in every round.
func asLeft(g *guests.Guest) string {
	return g.Run(`cd /
readlink /usr/local/bin/pgark
sha256sum /usr/local/bin/pgark /etc/pgark/jobs/orders.credentials
stat -c '%n %a %U' /etc/pgark/jobs/* /usr/local/lib/pgark/*/pgark
for i in 15-main 15-b; do
	sha256sum "/etc/systemd/system/pgark@orders-$i.service"
	ls "/etc/systemd/system/pgark@orders-$i.service.d" 2>/dev/null || true
	systemctl is-active "pgark@orders-$i.service"
	systemctl is-enabled "pgark@orders-$i.service"
done
for port in 5432 5502; do
	su postgres -c "psql -XAtq -p $port postgres -c \"select name, setting, pending_restart from pg_settings where name like 'archive%' order by 1\""
done`)
}

// TestDrift changes a guest by hand, in every way there is. Each time the plan says so in words, an apply repairs it, and
// nothing is left to do.
func TestDrift(t *testing.T) {
	w := newWorld(t)
	g := w.net.Boot(guests.Options{})
	clone(g, cloned{"b", 5502, ""}, cloned{"c", 5503, ""}, cloned{"d", 5504, ""})
	w.configure("", job(ordersJob, g, `guest_settings = { restart = "allow" }`))
	w.apply()
	w.nothingToDo()
	left := asLeft(g)

	kinds := 0
	for n, round := range drifts {
		for _, d := range round {
			if _, err := g.Try(d.by); err != nil {
				t.Fatalf("%s: %v", d.what, err)
			}
		}
		out, changes := w.plan()
		if !changes {
			t.Errorf("round %d: the plan sees nothing:\n%s", n+1, out)
		}
		flat := prose(out)
		for _, d := range round {
			kinds++
			seen := true
			for _, text := range d.says {
				if !strings.Contains(flat, prose(text)) {
					seen = false
					t.Errorf("%s: the plan does not say %q", d.what, text)
				}
			}
			if seen {
				t.Logf("%s: the plan says %q", d.what, d.says)
			}
		}
		if strings.Contains(out, "hush") {
			t.Errorf("round %d: the plan shows the arguments of somebody's archive_command:\n%s", n+1, out)
		}
		if t.Failed() {
			t.Logf("round %d: the plan was:\n%s", n+1, out)
		}
		w.apply()
		w.nothingToDo()
		if now := asLeft(g); now != left {
			t.Errorf("round %d: apply had left\n%s\nand has repaired it to\n%s", n+1, left, now)
		}
		for _, instance := range []string{"15-c", "15-d"} {
			if state := g.Run("systemctl is-active " + unitOf(instance) + "; systemctl is-enabled " + unitOf(instance)); state != "active\nenabled" {
				t.Errorf("round %d: the runner of %s is %q", n+1, instance, state)
			}
		}
	}
	if list := g.Run("ls /etc/systemd/system | grep 15-e || true; ls /var/lib/pgark/orders"); strings.Contains(list, "15-e") {
		t.Errorf("of the instance that was dropped there is left:\n%s", list)
	}

	// All of it is gone, but for PostgreSQL's settings: there is nothing to repair any more, it is to be created.
	g.Run(`for u in /etc/systemd/system/pgark@*.service; do systemctl disable -q --now "${u##*/}"; rm "$u"; done
systemctl daemon-reload
rm -rf /etc/pgark /var/lib/pgark /run/pgark /usr/local/lib/pgark /usr/local/bin/pgark`)
	kinds++
	out, _ := w.plan()
	w.says(out, "pgark_postgresql_backup_job.orders will be created")
	w.apply()
	w.nothingToDo()
	if now := asLeft(g); now != left {
		t.Errorf("created anew: apply had left\n%s\nand has made\n%s", left, now)
	}
	w.arrives(g)
	t.Logf("%d kinds of drift", kinds)
}
