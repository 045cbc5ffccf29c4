//go:build linux

package guest

import (
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/pgark/terraform-provider-pgark/internal/engine/job"
)

func put(t *testing.T, path, text string) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
}

func TestReadConfFile_includes(t *testing.T) {
	dir := t.TempDir()
	put(t, filepath.Join(dir, "main.conf"), "a = 1\nInclude 'sub/one.conf'\ninclude_dir = 'd'\ninclude_if_exists 'absent'\ninclude 'absent too'\nlast = here\n")
	put(t, filepath.Join(dir, "sub/one.conf"), "a = 2\ninclude two.conf\n")
	put(t, filepath.Join(dir, "sub/two.conf"), "b = 'beside one'\n")
	put(t, filepath.Join(dir, "d/20.conf"), "c = later\n")
	put(t, filepath.Join(dir, "d/10.conf"), "c = earlier\n")
	put(t, filepath.Join(dir, "d/.30.conf"), "c = hidden\n")
	put(t, filepath.Join(dir, "d/40.bak"), "c = old\n")
	put(t, filepath.Join(dir, "d/sub.conf/x.conf"), "c = deep\n")
	lines := readConfFile(filepath.Join(dir, "main.conf"))
	for name, expected := range map[string]string{"a": "2", "b": "beside one", "c": "later", "last": "here"} {
		if found, _ := confSetting(lines, name); found != expected {
			t.Errorf("%s: found %q, expected %q", name, found, expected)
		}
	}
	put(t, filepath.Join(dir, "circle.conf"), "n = 1\ninclude 'circle.conf'\n")
	if lines := readConfFile(filepath.Join(dir, "circle.conf")); len(lines) < maxIncludeDepth || len(lines) > 3*maxIncludeDepth {
		t.Errorf("a circle gave %d lines", len(lines))
	}
}

func TestDatabaseUnits(t *testing.T) {
	g := &local{layout: job.Layout{Root: t.TempDir()}}
	file := func(path, text string) { put(t, g.systemPath(path), text) }
	file("/usr/lib/systemd/system/postgresql-15.service", "[Unit]\nDescription=x\n[Service]\nEnvironment=PGDATA=/var/lib/pgsql/15/data/\nExecStart=/usr/pgsql-15/bin/postgres -D ${PGDATA}\n")
	file("/etc/systemd/system/postgresql-15.service.d/override.conf", "[Service]\nEnvironment=PGDATA=/srv/pg15\n")
	file("/etc/systemd/system/orders.service", "[Service]\nExecStartPre=/bin/true\nExecStart=\nExecStart=-/opt/pg/bin/pg_ctl start -D \"/srv/with space\" \\\n  -w\n")
	file("/etc/systemd/system/inline.service", "# none\n[Service]\nExecStart=/opt/pg/bin/postgres -c port=1 -D/srv/inline\n")
	file("/lib/systemd/system/shop@.service", "[Service]\nEnvironment=PGDATA=/srv/%i\nExecStart=/opt/start.sh\n")
	file("/etc/systemd/system/multi-user.target.wants/shop@one.service", "")
	file("/etc/systemd/system/shop@two.service.d/x.conf", "[Service]\nEnvironment=PGDATA=/srv/two-elsewhere\n")
	file("/etc/default/third", "# PGDATA=/no\nPGDATA=\"/srv/third\"\n")
	file("/etc/systemd/system/third.service", "[Service]\nEnvironmentFile=-"+g.systemPath("/etc/default/third")+"\nExecStart=/opt/pg/bin/postmaster -D $PGDATA\n")
	file("/lib/systemd/system/ssh.service", "[Service]\nExecStart=/usr/sbin/sshd -D $SSHD_OPTS\n")
	file("/lib/systemd/system/masked.service", "[Service]\nExecStart=/opt/pg/bin/postgres -D /srv/masked\n")
	if err := os.Symlink(os.DevNull, g.systemPath("/etc/systemd/system/masked.service")); err != nil {
		t.Fatal(err)
	}
	expected := []databaseUnit{
		{"inline.service", "/srv/inline"}, {"orders.service", "/srv/with space"}, {"postgresql-15.service", "/srv/pg15"},
		{"shop@one.service", "/srv/one"}, {"shop@two.service", "/srv/two-elsewhere"}, {"third.service", "/srv/third"},
	}
	if found := g.databaseUnits(); !slices.Equal(found, expected) {
		t.Errorf("found %v, expected %v", found, expected)
	}
}

func TestSecurityModule(t *testing.T) {
	running := func(pid int) []cluster {
		c := cluster{pid: pid}
		c.Name, c.Running = "15-main", true
		return []cluster{c}
	}
	for name, v := range map[string]struct {
		files  map[string]string
		status Status
		found  string
		remedy string
	}{
		"none":       {nil, Pass, "none", ""},
		"enforcing":  {map[string]string{"sys/fs/selinux/enforce": "1", "proc/7/attr/current": "system_u:system_r:postgresql_t:s0\x00"}, Warn, "SELinux is enforcing; process 7 of 15-main is in the domain postgresql_t", "semanage fcontext -a -t bin_t '/usr/local/lib/pgark/[^/]*/pgark'"},
		"unreadable": {map[string]string{"sys/fs/selinux/enforce": "1"}, Warn, "SELinux is enforcing", "audit2allow"},
		"permissive": {map[string]string{"sys/fs/selinux/enforce": "0\n", "proc/7/attr/current": "u:r:postgresql_t:s0:c0"}, Pass, "SELinux is permissive; process 7 of 15-main is in the domain postgresql_t", ""},
		"unconfined": {map[string]string{"sys/kernel/security/apparmor/profiles": "x (enforce)\n", "proc/7/attr/current": "unconfined\n"}, Pass, "AppArmor, which confines no PostgreSQL here", ""},
		"confined":   {map[string]string{"proc/7/attr/current": "/usr/lib/postgresql/15/bin/postgres (enforce)\n"}, Warn, "AppArmor confines process 7 of 15-main by the profile /usr/lib/postgresql/15/bin/postgres (enforce)", "/etc/apparmor.d/local/usr.lib.postgresql.15.bin.postgres"},
		"complains":  {map[string]string{"proc/7/attr/apparmor/current": "postgres (complain)\n"}, Pass, "AppArmor confines process 7 of 15-main by the profile postgres (complain)", ""},
	} {
		t.Run(name, func(t *testing.T) {
			g := &local{kernel: t.TempDir()}
			for path, text := range v.files {
				put(t, filepath.Join(g.kernel, path), text)
			}
			e := &examination{g: g, clusters: running(7)}
			e.securityModule()
			c := e.checks[0]
			if c.Name != "security_module" || c.Status != v.status || c.Found != v.found || !strings.Contains(c.Remedy, v.remedy) || (c.Remedy == "") != (v.remedy == "") {
				t.Errorf("found %+v", c)
			}
		})
	}
}

func TestManagedDirectory(t *testing.T) {
	dir := t.TempDir()
	put(t, filepath.Join(dir, "repmgr.conf"), "node_id=1\ndata_directory='/srv/repmgr'\n")
	put(t, filepath.Join(dir, "patroni.yml"), "postgresql:\n  listen: 0.0.0.0\n  data_dir: \"/srv/patroni\"\n")
	put(t, filepath.Join(dir, "proc/environ"), "A=b\x00PGDATA=/srv/autoctl\x00STKEEPER_DATA_DIR=/srv/stolon\x00")
	put(t, filepath.Join(dir, "empty/environ"), "")
	for _, v := range []struct {
		name, proc string
		args       []string
		expected   string
	}{
		{"patroni", "empty", []string{"--flag", filepath.Join(dir, "patroni.yml")}, "/srv/patroni"},
		{"patroni", "empty", nil, ""},
		{"repmgrd", "empty", []string{"-f", filepath.Join(dir, "repmgr.conf"), "-d"}, "/srv/repmgr"},
		{"repmgrd", "empty", []string{"--config-file=" + filepath.Join(dir, "repmgr.conf")}, "/srv/repmgr"},
		{"pg_autoctl", "proc", []string{"run"}, "/srv/autoctl"},
		{"pg_autoctl", "proc", []string{"run", "--pgdata", "/srv/given"}, "/srv/given"},
		{"stolon-keeper", "proc", nil, "/srv/stolon/postgres"},
		{"stolon-keeper", "empty", []string{"--data-dir=/srv/keeper"}, "/srv/keeper/postgres"},
	} {
		if found := managedDirectory(filepath.Join(dir, v.proc), v.name, v.args); found != v.expected {
			t.Errorf("%s %q: found %q, expected %q", v.name, v.args, found, v.expected)
		}
	}
	mine := &cluster{}
	mine.DataDirectory, mine.Owner = "/srv/a", "postgres"
	for m, expected := range map[clusterManager]bool{
		{directory: "/srv/a"}: true, {directory: "/srv/b", owner: "postgres"}: false, {owner: "postgres"}: true, {owner: "other"}: false,
	} {
		if m.manages(mine) != expected {
			t.Errorf("%+v: found %t", m, !expected)
		}
	}
}

// Remedies are words for a shell: what a path or a name holds must not become a command.
func TestWord(t *testing.T) {
	for in, expected := range map[string]string{"/var/lib/a-b_c@1": "/var/lib/a-b_c@1", "": "''", "it's; rm": `'it'\''s; rm'`, "$(x)": "'$(x)'"} {
		if found := word(in); found != expected {
			t.Errorf("%q: found %s, expected %s", in, found, expected)
		}
	}
	for in, expected := range map[string]string{"pgark": "pgark", "all": `"all"`, "a b": `"a b"`, "+group": `"+group"`, `q"`: `"q"""`} {
		if found := hbaWord(in); found != expected {
			t.Errorf("%q: found %s, expected %s", in, found, expected)
		}
	}
}

// Who is no root is told the lines that stand in the guide.
func TestBecomeRoot(t *testing.T) {
	g := &local{}
	for _, line := range []string{
		" ALL=(root) NOPASSWD: /usr/bin/install -D -m 0755 /dev/stdin /usr/local/lib/pgark/incoming/pgark",
		" ALL=(root) NOPASSWD: /usr/local/lib/pgark/*/pgark guest",
	} {
		if remedy := g.becomeRoot(); !strings.Contains(remedy, line) {
			t.Errorf("found %s, expected %s in it", remedy, line)
		}
	}
}

func TestStartRemedy(t *testing.T) {
	c := cluster{}
	c.DataDirectory, c.Owner, c.Version = "/srv/data", strconv.Itoa(os.Geteuid()), 99
	if found := startCommand(c); found != "pg_ctl start -w -D /srv/data -l /srv/data/startup.log" {
		t.Errorf("found %s", found)
	}
	c.commandLine.Settings = map[string]string{"port": "6000"}
	if found := startCommand(c); !strings.HasPrefix(found, "pg_ctl restart -w -D /srv/data ") {
		t.Errorf("found %s: the port would be lost", found)
	}
	c.debian = "99/main"
	if found := startCommand(c); !strings.HasSuffix(found, "pg_ctlcluster 99 main start") {
		t.Errorf("found %s", found)
	}
}
