//go:build linux

package fleet

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/pgark/terraform-provider-pgark/test/guests"
)

// check is one prerequisite, as data source and `pgark check` have it.
type check struct {
	Name     string `json:"name"`
	Instance string `json:"instance"`
	Status   string `json:"status"`
	Found    string `json:"found"`
	Expected string `json:"expected"`
	Remedy   string `json:"remedy"`
}

func (c check) String() string { return strings.TrimSpace(c.Name + " " + c.Instance) }

// finding is a check that has to fail, or warn.
type finding struct {
	check, instance string
	says            string // a part of what was found

	// inWords says that the remedy is no command, but tells a person what to change: obeyed is how that is done on the
	// guest, and situation.after what becomes of the configuration.
	inWords bool
	obeyed  string // a script; "" for nothing
}

// situation is a job in whose way something is, until the remedies are followed.
type situation struct {
	name     string
	instance string // that it selects
	broken   string // the script that brings it about
	job      string // further lines of the job
	data     string // and of the data source
	found    []finding

	repository string                       // of both, an expression; "" for the one that is there
	beside     string                       // further blocks of the configuration
	after      func(s *situation, r string) // what the remedy makes of the configuration
	planOnly   bool                         // it is never applied
}

// sql runs statements as the owner of a cluster, for scripts.
func sql(port int, statements ...string) string {
	var script strings.Builder
	for _, s := range statements {
		fmt.Fprintf(&script, "su postgres -c 'psql -XAtq -v ON_ERROR_STOP=1 -h %s -p %d postgres' <<'SQL'\n%s;\nSQL\n", socketDir, port, s)
	}
	return script.String()
}

// situations are those of one guest, all at the same time.
func situations(w *world) []*situation {
	const broken, missing = "/srv/broken", "/srv/missing"
	return []*situation{
		{
			name: "settings", instance: "15-main",
			broken: sql(5432, "alter system set archive_mode = off", "alter system set wal_level = minimal", "alter system set max_wal_senders = 0",
				"alter system set archive_command = 'cp --password=hush %p /srv/%f'", "alter system set archive_library = 'basic_archive'",
				"alter system set full_page_writes = off") + "systemctl restart postgresql@15-main; rm -rf " + missing,
			job: fmt.Sprintf("wal = { temp_folder = %q }", missing), data: fmt.Sprintf("temp_folder = %q", missing),
			found: []finding{
				{check: "temporary_folder", says: missing + " does not exist"},
				{check: "archive_mode", instance: "15-main", says: "off"},
				{check: "archive_command", instance: "15-main", says: `"cp …"`},
				{check: "archive_library", instance: "15-main", says: `"basic_archive"`},
				{check: "wal_level", instance: "15-main", says: "minimal"},
				{check: "full_page_writes", instance: "15-main", says: "off"},
				{check: "max_wal_senders", instance: "15-main", says: "0"},
			},
		},
		{
			name: "stopped", instance: "15-stopped",
			broken: "systemctl stop postgresql@15-stopped; rm -rf " + broken + "; install -d -m 755 " + broken,
			job:    fmt.Sprintf("wal = { temp_folder = %q }", broken), data: fmt.Sprintf("temp_folder = %q", broken),
			found: []finding{
				{check: "temporary_folder", says: "postgres may not write to it"},
				{check: "postgresql_running", instance: "15-stopped", says: "/var/lib/postgresql/15/stopped"},
			},
		},
		{
			name: "replica", instance: "15-replica",
			broken: sql(5503, "alter system set archive_mode = on") + `systemctl restart postgresql@15-replica
mountpoint -q /srv/full || { install -d -m 700 -o postgres /srv/full; mount -t tmpfs -o mode=700,uid=postgres tmpfs /srv/full; }
mount -o remount,size=64m /srv/full
head -c 50M /dev/zero >/srv/full/ballast`,
			job: `wal = { temp_folder = "/srv/full" }`, data: `temp_folder = "/srv/full"`,
			found: []finding{
				{check: "temporary_folder", says: "/srv/full with 14 MiB free", inWords: true, obeyed: "rm /srv/full/ballast; mount -o remount,size=2g /srv/full"},
				{check: "role", instance: "15-replica", says: "archives nothing"},
			},
		},
		{
			name: "hba", instance: "15-hba",
			broken: `sed -i 's/^local.*/local all all reject/' /etc/postgresql/15/hba/pg_hba.conf; systemctl reload postgresql@15-hba`,
			found:  []finding{{check: "privileges", instance: "15-hba", says: "pg_hba.conf"}},
		},
		{
			name: "least", instance: "15-least",
			broken: sql(5505, "revoke execute on function pg_switch_wal() from pgark", "revoke alter system on parameter archive_command from pgark"),
			job:    `database_user = "pgark"`, data: `database_user = "pgark"`,
			found: []finding{{check: "privileges", instance: "15-least", says: "role pgark may not call pg_switch_wal, may not change archive_command"}},
		},
		{
			name: "version", instance: "12-old", planOnly: true,
			broken: `install -d -o postgres -g postgres -m 700 /var/lib/postgresql/12/old /etc/postgresql/12/old
echo 12 >/var/lib/postgresql/12/old/PG_VERSION
echo "data_directory = '/var/lib/postgresql/12/old'" >/etc/postgresql/12/old/postgresql.conf
chown -R postgres:postgres /var/lib/postgresql/12 /etc/postgresql/12`,
			found: []finding{{check: "postgresql_version", instance: "12-old", says: "PostgreSQL 12 in /var/lib/postgresql/12/old", inWords: true}},
			// A cluster of an unsupported version can be upgraded, which no remedy does in passing, or be left out: that part can
			// be pasted.
			after: func(s *situation, r string) {
				exclude := regexp.MustCompile(`exclude = \[[^]]*\]`).FindString(r)
				if exclude == "" {
					w.Errorf("the remedy has nothing to paste: %s", r)
				}
				s.job, s.data, s.instance = "instances = { include = [\"12-old\", \"15-hba\"], "+exclude+" }", exclude, "15-hba"
			},
		},
		{
			name: "nobucket", instance: "15-spare", planOnly: true, repository: `"s3://nosuchbucket/backups"`,
			found: []finding{{check: "repository_reachable", says: "nosuchbucket", inWords: true}},
			after: func(s *situation, _ string) { s.repository = "" },
		},
		{
			name: "notcreated", instance: "15-spare", planOnly: true, repository: `"s3://` + bucket + `/empty"`,
			found: []finding{{check: "repository_reachable", says: "no repository in s3://" + bucket + "/empty", inWords: true}},
			after: func(s *situation, r string) {
				declaration := regexp.MustCompile(`resource "pgark_repository" "main" \{.*\}`).FindString(r)
				if declaration == "" {
					w.Errorf("the remedy has nothing to paste: %s", r)
				}
				s.beside = strings.Replace(declaration, `"main"`, `"pasted"`, 1)
				s.repository = "pgark_repository.pasted.url"
			},
		},
		{
			name: "keys", instance: "15-spare", planOnly: true,
			job: "provider = pgark.wrong", data: "provider = pgark.wrong",
			found: []finding{{check: "repository_reachable", says: "access denied", inWords: true}},
			after: func(s *situation, _ string) { s.job, s.data = "", "" },
		},
		{
			name: "unreachable", instance: "15-spare", planOnly: true, repository: `"s3://` + bucket + `/elsewhere?endpoint=http%3A%2F%2F127.0.0.1%3A9&path_style=true"`,
			found: []finding{{check: "repository_reachable", says: "127.0.0.1:9", inWords: true}},
			after: func(s *situation, _ string) { s.repository = "" },
		},
		{
			name: "directory", instance: "15-spare", planOnly: true, repository: "pgark_repository.files.url",
			broken: "chown -R daemon " + w.filesDirectory() + "; chmod 755 " + w.filesDirectory(),
			found:  []finding{{check: "repository_reachable", says: w.filesDirectory() + " belongs to daemon with mode 0755; postgres may not write to it"}},
		},
		{
			name: "manager", instance: "15-spare", planOnly: true,
			broken: `printf 'postgresql:\n  data_dir: /var/lib/postgresql/15/spare\n' >/srv/patroni.yml
printf '#!/bin/sh\nwhile :; do sleep 1; done\n' >/srv/patroni; chmod 755 /srv/patroni
systemd-run -q --unit patroni -p User=postgres /srv/patroni /srv/patroni.yml`,
			found: []finding{{check: "cluster_manager", says: "patroni", inWords: true, obeyed: "systemctl stop patroni"}},
		},
		{name: "none", instance: "15-spare", planOnly: true},
	}
}

// filesDirectory is a repository in a directory, at the same path here and on guests.
func (w *world) filesDirectory() string { return filepath.Join(w.dir, "files") }

// declare writes the configuration of the situations: a job and a data source for each.
func (w *world) declare(g *guests.Guest, list []*situation, with ...string) {
	w.Helper()
	var text, outputs strings.Builder
	fmt.Fprintf(&text, `
provider "pgark" {
  alias = "wrong"
  ssh = {
    private_key_file = %q
    known_hosts_file = %q
  }
  s3 = {
    endpoint          = %q
    region            = "us-east-1"
    use_path_style    = true
    access_key_id     = "NOBODY"
    secret_access_key = "nothing-to-hide"
  }
}

resource "pgark_repository" "files" {
  url = "file://%s"
}
`, w.keyFile(), w.net.KnownHosts(), w.s3.Endpoint(), w.filesDirectory())
	for _, s := range list {
		repository := s.repository
		if repository == "" {
			repository = "pgark_repository.main.url"
		}
		instances := fmt.Sprintf("instances = { include = [%q] }", s.instance)
		if strings.Contains(s.job, "instances =") {
			instances = ""
		}
		text.WriteString(s.beside + "\n")
		if slices.Contains(with, "jobs") {
			fmt.Fprintf(&text, `
resource "pgark_postgresql_backup_job" %[1]q {
  name       = %[1]q
  host       = %[2]q
  repository = %[3]s
  image      = { schedule = "0 3 * * *", on_create = false }
  %[4]s
  %[5]s
}
`, s.name, g.Address, repository, instances, s.job)
		}
		if slices.Contains(with, "data") {
			fmt.Fprintf(&text, `
data "pgark_prerequisites" %[1]q {
  host       = %[2]q
  job        = %[1]q
  repository = %[3]s
  include    = [%[4]q]
  %[5]s
}
`, s.name, g.Address, repository, s.instance, s.data)
			fmt.Fprintf(&outputs, "    %[1]s = { ready = data.pgark_prerequisites.%[1]s.ready, checks = data.pgark_prerequisites.%[1]s.checks }\n", s.name)
		}
	}
	if outputs.Len() > 0 {
		fmt.Fprintf(&text, "\noutput \"prerequisites\" {\n  value = {\n%s  }\n}\n", outputs.String())
	}
	w.configure("", text.String())
}

func (w *world) keyFile() string {
	key, _ := w.net.Key()
	return key
}

// prerequisites is what the data sources say.
type prerequisites map[string]struct {
	Ready  bool    `json:"ready"`
	Checks []check `json:"checks"`
}

func (w *world) ask() prerequisites {
	w.Helper()
	w.must("apply", "-no-color", "-input=false", "-auto-approve", "-refresh-only")
	var p prerequisites
	if err := json.Unmarshal([]byte(w.must("output", "-json", "prerequisites")), &p); err != nil {
		w.Fatal(err)
	}
	return p
}

// diagnostic is one of `plan -json`.
type diagnostic struct {
	Severity string `json:"severity"`
	Summary  string `json:"summary"`
	Detail   string `json:"detail"`
	Address  string `json:"address"`
}

// diagnostics plans and gives all that the plan had to say.
func (w *world) diagnostics() []diagnostic {
	w.Helper()
	out, _ := w.run("plan", "-json", "-input=false")
	var list []diagnostic
	for line := range strings.Lines(out) {
		var message struct {
			Diagnostic *diagnostic `json:"diagnostic"`
		}
		if err := json.Unmarshal([]byte(line), &message); err != nil {
			w.Fatalf("plan -json printed %q: %v", line, err)
		}
		if message.Diagnostic != nil {
			list = append(list, *message.Diagnostic)
		}
	}
	return list
}

// find looks for the check that a finding is about.
func (f finding) find(checks []check) (check, bool) {
	i := slices.IndexFunc(checks, func(c check) bool { return c.Name == f.check && c.Instance == f.instance })
	if i < 0 {
		return check{}, false
	}
	return checks[i], true
}

// mustFind demands that a list of checks has what a situation should show: these, and none more.
func (w *world) mustFind(where string, s *situation, checks []check) {
	w.Helper()
	for _, f := range s.found {
		switch c, ok := f.find(checks); {
		case !ok:
			w.Errorf("%s, %s: no check %s %s among %v", where, s.name, f.check, f.instance, checks)
		case c.Status == "pass":
			w.Errorf("%s, %s: %v passes: found %s", where, s.name, c, c.Found)
		case !strings.Contains(c.Found, f.says):
			w.Errorf("%s, %s: %v says %q, expected %q in it", where, s.name, c, c.Found, f.says)
		case c.Remedy == "" || c.Expected == "":
			w.Errorf("%s, %s: %v has remedy %q and expects %q", where, s.name, c, c.Remedy, c.Expected)
		}
	}
	for _, c := range checks {
		expected := slices.ContainsFunc(s.found, func(f finding) bool { return f.check == c.Name && f.instance == c.Instance })
		// The place is in the way of all; the cluster of an old version has no server.
		expected = expected || c.Name == "executable_place" || s.name == "version" && c.Name == "postgresql_running"
		if c.Status == "fail" && !expected {
			w.Errorf("%s, %s: %v fails: found %s", where, s.name, c, c.Found)
		}
		if strings.Contains(c.Found+c.Remedy, "hush") {
			w.Errorf("%s, %s: %v shows the arguments of somebody's archive_command", where, s.name, c)
		}
	}
}

// follow does what remedies say, literally.
func (w *world) follow(g *guests.Guest, s *situation, checks []check) {
	w.Helper()
	for _, f := range s.found {
		c, ok := f.find(checks)
		if !ok || c.Status == "pass" {
			continue
		}
		w.Logf("%s, %v: found %s\n  to fix: %s", s.name, c, c.Found, c.Remedy)
		script := c.Remedy
		if f.inWords {
			script = f.obeyed
			if s.after != nil {
				s.after(s, c.Remedy)
			}
		}
		if out, err := g.Try(script); err != nil {
			w.Errorf("%s, %v: the remedy fails: %v\n%s", s.name, c, err, out)
		}
	}
}

// TestPrerequisites puts everything in the way of jobs that can be in their way on a guest. Plan, data source and `pgark
// check` name each obstacle with its remedy; following that, word for word, removes it.
//
// Out of a container's reach are another clock and a kernel with SELinux or AppArmor; unit tests have those.
func TestPrerequisites(t *testing.T) {
	w := newWorld(t)
	g := w.net.Boot(guests.Options{})
	// No obstacle: nothing of ours runs there.
	g.MountNoexec("/tmp")
	g.MountNoexec("/var/tmp")
	const archive = "archive_mode = on"
	clone(g, cloned{"stopped", 5502, archive}, cloned{"replica", 5503, archive}, cloned{"hba", 5504, archive}, cloned{"least", 5505, archive}, cloned{"spare", 5506, archive})
	g.Run("systemctl stop postgresql@15-replica; touch /var/lib/postgresql/15/replica/standby.signal; systemctl start postgresql@15-replica")
	g.Put("/root/role.sql", []byte(example(t, "least-privilege/role.sql")), 0o644)
	g.Run("su postgres -c 'psql -q -v ON_ERROR_STOP=1 -p 5505' </root/role.sql")
	for file, line := range map[string]string{"pg_hba.conf": example(t, "least-privilege/pg_hba.conf"), "pg_ident.conf": example(t, "least-privilege/pg_ident.conf")} {
		g.Run(fmt.Sprintf("cd /etc/postgresql/15/least; sed -i '1i %s' %s", strings.ReplaceAll(strings.TrimSpace(line), "\n", `\n`), file))
	}
	g.Run("systemctl reload postgresql@15-least")

	// The repositories, one of them in a directory that both machines have.
	list := situations(w)
	if err := os.Mkdir(w.filesDirectory(), 0o755); err != nil {
		t.Fatal(err)
	}
	w.declare(g, nil)
	w.apply()
	description, err := os.ReadFile(filepath.Join(w.filesDirectory(), "repository.json"))
	if err != nil {
		t.Fatal(err)
	}
	g.Run("install -d " + w.filesDirectory())
	g.Put(filepath.Join(w.filesDirectory(), "repository.json"), description, 0o644)

	for _, s := range list {
		if _, err := g.Try(s.broken); err != nil {
			t.Fatalf("%s: %v", s.name, err)
		}
	}
	g.MountNoexec("/usr/local/lib/pgark")
	before := g.Files()

	// First contact: the plan of all the jobs, and the data sources.
	w.declare(g, list, "jobs", "data")
	planned := w.diagnostics()
	asked := w.ask()
	if after := g.Files(); !slices.Equal(before, after) {
		t.Errorf("planning and asking have changed the guest from\n%s\nto\n%s", strings.Join(before, "\n"), strings.Join(after, "\n"))
	}
	place := finding{check: "executable_place", says: "mounted noexec"}
	for _, s := range list {
		checks := asked[s.name].Checks
		w.mustFind("data source", s, checks)
		if asked[s.name].Ready {
			t.Errorf("data source, %s: it is ready", s.name)
		}
		for _, f := range append(s.found, place) {
			c, _ := f.find(checks)
			w.mustSay(planned, s, f, c)
		}
	}
	for _, name := range []string{"operating_system", "clock", "security_module"} { // nothing can be done about them here
		if c, ok := (finding{check: name}).find(asked["none"].Checks); !ok || c.Status == "fail" {
			t.Errorf("%s: %+v", name, c)
		}
	}
	c, _ := place.find(asked["none"].Checks)
	t.Logf("executable_place: found %s\n  to fix: %s", c.Found, c.Remedy)
	g.Run(c.Remedy)
	for _, s := range list {
		w.follow(g, s, asked[s.name].Checks)
	}
	w.declare(g, list, "jobs", "data")
	w.apply("-target=pgark_repository.pasted")
	asked = w.ask()
	for _, s := range list {
		for _, c := range asked[s.name].Checks {
			if c.Status == "fail" {
				t.Errorf("after its remedy, %s: %v fails: found %s", s.name, c, c.Found)
			}
			for _, f := range s.found {
				if f.check == c.Name && f.instance == c.Instance && c.Status == "warn" && c.Name != "role" {
					t.Errorf("after its remedy, %s: %v still warns: found %s", s.name, c, c.Found)
				}
			}
		}
	}
	for _, d := range w.diagnostics() {
		if d.Severity == "error" {
			t.Errorf("after the remedies the plan says: %s: %s\n%s", d.Address, d.Summary, d.Detail)
		}
	}
	if t.Failed() {
		t.FailNow()
	}

	// The same again, once the jobs are there: `pgark check` on the guest.
	list = slices.DeleteFunc(list, func(s *situation) bool { return s.planOnly })
	w.declare(g, list, "jobs")
	w.apply()
	for _, s := range list {
		if _, err := g.Try(s.broken); err != nil {
			t.Fatalf("%s: %v", s.name, err)
		}
	}
	w.plan() // of jobs that are there: warnings only, an error would be in the way of destroying them, too
	for _, s := range list {
		result := w.check(g, s.name)
		if result.OK {
			t.Errorf("pgark check, %s: it is in order", s.name)
		}
		w.mustFind("pgark check", s, result.Checks)
		w.follow(g, s, result.Checks)
		if result = w.check(g, s.name); !result.OK {
			t.Errorf("pgark check, %s: after its remedies: %s\n%v", s.name, result.Error, result.failed())
		}
	}
	w.nothingToDo()

	t.Run("owned by another machine", func(t *testing.T) {
		w := w.in(t)
		id := g.Run("cat /etc/machine-id")
		defer func() { g.Put("/etc/machine-id", []byte(id+"\n"), 0o444) }()
		g.Put("/etc/machine-id", []byte("0123456789abcdef0123456789abcdef\n"), 0o444)
		owned := &situation{name: "least", instance: "15-least", found: []finding{{check: "repository_reachable", says: id, inWords: true}}}
		w.mustFind("pgark check", owned, w.check(g, owned.name).Checks)
		w.declare(g, []*situation{owned}, "jobs", "data")
		asked := w.ask()
		w.mustFind("data source", owned, asked[owned.name].Checks)
		w.must("state", "rm", "pgark_postgresql_backup_job.least")
		c, _ := owned.found[0].find(asked[owned.name].Checks)
		w.mustSay(w.diagnostics(), owned, owned.found[0], c)
		t.Logf("repository_reachable: found %s\n  to fix: %s", c.Found, c.Remedy)
		g.Run(c.Remedy)
		if c, _ := owned.found[0].find(w.ask()[owned.name].Checks); c.Status != "pass" {
			t.Errorf("after its remedy: %+v", c)
		}
		g.Run("rm /etc/pgark/machine-id")
		owned.name = "another" // as the remedy says, too
		w.declare(g, []*situation{owned}, "jobs", "data")
		if c, _ := owned.found[0].find(w.ask()[owned.name].Checks); c.Status != "pass" {
			t.Errorf("with another name: %+v", c)
		}
	})

	t.Run("account without sudo", func(t *testing.T) {
		w := w.in(t)
		g.AddUser("deploy", "")
		w.configure(`user = "deploy"`, fmt.Sprintf("data \"pgark_prerequisites\" \"here\" {\n  host = %q\n}\n", g.Address)+
			job("plain", g, `instances = { include = ["15-spare"] }`))
		var remedy string
		for _, d := range w.diagnostics() {
			if d.Severity != "error" {
				continue
			}
			w.says(d.Detail, "deploy@"+g.Address+":22", "sudo")
			if d.Address == "pgark_postgresql_backup_job.plain" {
				_, remedy, _ = strings.Cut(d.Detail, "As root, on the host:\n")
				t.Logf("without sudo: %s: %s", d.Summary, d.Detail)
			}
		}
		g.Run(strings.SplitN(strings.TrimSpace(remedy), "\n", 2)[0])
		if got, want := g.Run("grep -v '^#' /etc/sudoers.d/pgark"), strings.TrimSpace(regexp.MustCompile("(?m)^#.*\n").ReplaceAllString(example(t, "ssh-and-sudo/sudoers"), "")); got != want {
			t.Errorf("the remedy is\n%s\nand the guide has\n%s", got, want)
		}
		w.plan()
	})
}

// mustSay demands that a plan has a check, in its place and with everything that the data source has.
func (w *world) mustSay(planned []diagnostic, s *situation, f finding, c check) {
	w.Helper()
	severity := map[string]string{"fail": "error", "warn": "warning"}[c.Status]
	address := "pgark_postgresql_backup_job." + s.name
	for _, d := range planned {
		if d.Address != address || d.Summary != "Prerequisite Not Met: "+f.check || f.instance != "" && !strings.Contains(d.Detail, "instance "+f.instance+":") {
			continue
		}
		if d.Severity != severity {
			w.Errorf("plan, %s: %s is a %s, expected a %s", s.name, f.check, d.Severity, severity)
		}
		flat := prose(d.Detail)
		for _, text := range []string{f.says, c.Expected, c.Remedy} {
			if !strings.Contains(flat, prose(text)) {
				w.Errorf("plan, %s: found no %q in:\n%s", s.name, text, d.Detail)
			}
		}
		return
	}
	var all []string
	for _, d := range planned {
		if d.Address == address || d.Address == "" {
			all = append(all, d.Severity+": "+d.Summary)
		}
	}
	w.Errorf("plan, %s: it does not name %s %s; it says %q", s.name, f.check, f.instance, all)
}

// checked is what `pgark check --json` prints.
type checked struct {
	OK     bool    `json:"ok"`
	Error  string  `json:"error"`
	Checks []check `json:"checks"`
}

func (c checked) failed() (out []string) {
	for _, c := range c.Checks {
		if c.Status == "fail" {
			out = append(out, fmt.Sprintf("%v: found %s, expected %s", c, c.Found, c.Expected))
		}
	}
	return out
}

func (w *world) check(g *guests.Guest, name string) checked {
	w.Helper()
	out, err := g.Try("/usr/local/bin/pgark check --json --job " + name)
	var c checked
	if e := json.Unmarshal([]byte(out), &c); e != nil {
		w.Fatalf("pgark check of %s: %v, %v", name, e, err)
	}
	if (err == nil) != c.OK {
		w.Errorf("pgark check of %s says ok: %v, and ends with %v", name, c.OK, err)
	}
	return c
}
