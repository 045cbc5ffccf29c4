//go:build linux

package guest

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/pgark/terraform-provider-pgark/internal/engine/job"
	"github.com/pgark/terraform-provider-pgark/internal/engine/postgres"
)

func TestParseConf(t *testing.T) {
	lines := parseConf("# a comment\n" +
		"archive_command = 'cp %p ''/mnt/a b/%f''  # not a comment'  # one\n" +
		"Port 5433\r\n" +
		"  work_mem=4MB# here\n" +
		"escapes = 'a\\\\b\\'c\\t\\101'\n" +
		"empty = ''\n" +
		"broken = 'no end\n" +
		"include 'other.conf'\n" +
		"port = 5434")
	for name, expected := range map[string]string{
		"archive_command": "cp %p '/mnt/a b/%f'  # not a comment", "port": "5434", "work_mem": "4MB", "escapes": "a\\b'c\tA", "empty": "",
	} {
		if found, set := confSetting(lines, name); !set || found != expected {
			t.Errorf("%s: found %q, %t, expected %q", name, found, set, expected)
		}
	}
	for _, name := range []string{"broken", "absent", ""} {
		if found, set := confSetting(lines, name); set && name != "" {
			t.Errorf("%s: found %q", name, found)
		}
	}
}

func TestSetConf(t *testing.T) {
	before := "# kept\nwork_mem = '5MB'\narchive_command = 'x'\nARCHIVE_COMMAND = 'y'\n"
	value := `it's a \ test`
	after := setConf(parseConf(before), "archive_command", &value)
	if expected := "# kept\nwork_mem = '5MB'\narchive_command = 'it''s a \\\\ test'\n"; after != expected {
		t.Errorf("found\n%s\nexpected\n%s", after, expected)
	}
	if found := setConf(parseConf(after), "archive_command", nil); found != "# kept\nwork_mem = '5MB'\n" {
		t.Errorf("found %q", found)
	}
}

func FuzzConf(f *testing.F) {
	f.Add("a = 'b'\n", "c'd\\")
	f.Fuzz(func(t *testing.T, content, value string) {
		if strings.ContainsAny(value, "\n\r\x00") {
			return // ALTER SYSTEM refuses newlines, too
		}
		after := parseConf(setConf(parseConf(content), "archive_command", &value))
		if found, set := confSetting(after, "archive_command"); !set || found != value {
			t.Errorf("found %q, %t, expected %q", found, set, value)
		}
	})
}

func TestNameClusters(t *testing.T) {
	made := func(dir string, version, port int, debian, name string) cluster {
		c := cluster{debian: debian, clusterName: name}
		c.DataDirectory, c.Version, c.Port = dir, version, port
		return c
	}
	clusters := []cluster{
		made("/f", 17, 5432, "", "weird/näme of it"),
		made("/a", 15, 5432, "15/main", "15/other"),
		made("/b", 15, 5433, "", "15/main"),
		made("/c", 15, 5434, "", ""),
		made("/d", 15, 5434, "", ""),
		made("/e", 16, 5432, "", "orders"),
		made("/g", 16, 5439, "", ""),
	}
	clusters[6].Name = "16-orders" // a job knows it by this name
	nameClusters(clusters, map[string]string{"/g": "16-orders", "/gone": "15-5434"})
	expected := map[string]string{
		"/a": "15-main", "/b": "15-main-5433", "/c": "15-5434-5434", "/d": "15-5434-5434-2", "/e": "16-orders-5432", "/f": "17-n_me_of_it", "/g": "16-orders",
	}
	seen := map[string]bool{}
	for _, c := range clusters {
		if c.Name != expected[c.DataDirectory] {
			t.Errorf("%s: found %q, expected %q", c.DataDirectory, c.Name, expected[c.DataDirectory])
		}
		if seen[c.Name] || job.ValidName(c.Name) != nil {
			t.Errorf("%s: %q is not usable", c.DataDirectory, c.Name)
		}
		seen[c.Name] = true
	}
}

func TestFollowMoved(t *testing.T) {
	made := func(dir string, id postgres.SystemID, port int, debian string) cluster {
		c := cluster{debian: debian}
		c.DataDirectory, c.SystemID, c.Version, c.Port = dir, id, 15, port
		return c
	}
	clusters := []cluster{
		made("/named", 1, 5432, ""), made("/copy", 1, 5433, ""), made("/moved", 1, 5434, "15/main"),
		made("/port", 2, 5440, ""), made("/other", 2, 5441, ""), made("/new", 3, 5450, "15/gone"), made("/unread", 0, 5460, ""),
	}
	clusters[0].Name = "15-named"
	gone := []job.Instance{
		{Name: "15-main", SystemID: 1, Port: 5433}, {Name: "15-second", SystemID: 2, Port: 5440},
		{Name: "15-gone", SystemID: 4, Port: 5450}, {Name: "15-none"},
	}
	followMoved(clusters, gone)
	expected := map[string]string{"/named": "15-named", "/moved": "15-main", "/port": "15-second"}
	for _, c := range clusters {
		if c.Name != expected[c.DataDirectory] {
			t.Errorf("%s: found %q, expected %q", c.DataDirectory, c.Name, expected[c.DataDirectory])
		}
	}
}

func TestUnitText(t *testing.T) {
	j := &job.Job{Repository: job.Repository{URL: "file:///srv/back%20up/100%25"}}
	j.WAL.TempFolder = "/var/spool/wal"
	i := job.Instance{Name: "15-main", DataDirectory: "/var/lib/postgresql/15/main", SocketDirectory: "/run/postgresql"}
	text := func(hasCredentials bool) string {
		u := &unit{g: &local{}, job: "orders", instance: i.Name, owner: account{name: "postgres", uid: 101}}
		u.settle(j, i, nil, hasCredentials)
		return string(u.content)
	}
	golden := filepath.Join("testdata", "unit.golden")
	found := text(true)
	if os.Getenv("UPDATE_GOLDEN") != "" {
		if err := os.WriteFile(golden, []byte(found), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	expected, err := os.ReadFile(golden)
	if err != nil {
		t.Fatal(err)
	}
	if found != string(expected) {
		t.Errorf("found\n%s\nexpected\n%s", found, expected)
	}
	if strings.Contains(text(false), "LoadCredential") {
		t.Error("a file that is not there is handed over")
	}
	// What lies in a directory of temporary files must not be hidden.
	i.SocketDirectory = "/tmp"
	if strings.Contains(text(true), "PrivateTmp") {
		t.Error("the socket in /tmp would be hidden")
	}
	i.SocketDirectory, i.DataDirectory = "/run/postgresql", "/srv/pg"
	if !strings.Contains(text(true), "PrivateTmp=yes") {
		t.Error("/tmp is shared, and nothing lies there")
	}
	i.DataDirectory = t.TempDir()
	if err := os.MkdirAll(filepath.Join(i.DataDirectory, "pg_tblspc"), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink("/var/tmp/fast", filepath.Join(i.DataDirectory, "pg_tblspc", "16400")); err != nil {
		t.Fatal(err)
	}
	if !usesTemporary(i.DataDirectory, nil) {
		t.Error("the tablespace in /var/tmp would be hidden")
	}
}

func TestWriteFile(t *testing.T) {
	path := filepath.Join(t.TempDir(), "file")
	me := root()
	for _, step := range []struct {
		content string
		mode    os.FileMode
		changed bool
	}{{"one", 0o600, true}, {"one", 0o600, false}, {"one", 0o644, true}, {"two", 0o644, true}, {"", 0o644, true}} {
		changed, err := writeFile(path, []byte(step.content), step.mode, me)
		if err != nil || changed != step.changed {
			t.Errorf("%+v: found %t, %v", step, changed, err)
		}
		b, err := os.ReadFile(path)
		info, e2 := os.Stat(path)
		if err != nil || e2 != nil || string(b) != step.content || info.Mode() != step.mode {
			t.Errorf("%+v: found %q, %v", step, b, info)
		}
	}
	entries, err := os.ReadDir(filepath.Dir(path))
	if err != nil || len(entries) != 1 {
		t.Errorf("left behind: %v, %v", entries, err)
	}
}

func TestSwitchLink(t *testing.T) {
	dir := t.TempDir()
	link := filepath.Join(dir, "link")
	for _, target := range []string{"a", "a", "b"} {
		if err := switchLink(link, target); err != nil {
			t.Fatal(err)
		}
		if found, err := os.Readlink(link); err != nil || found != target {
			t.Errorf("found %q, %v", found, err)
		}
	}
	if err := os.Remove(link); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(link, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := switchLink(link, "a"); err == nil || !strings.Contains(err.Error(), "expected a symbolic link") {
		t.Errorf("found %v", err)
	}
}

func TestProgram(t *testing.T) {
	for command, expected := range map[string]string{
		"":                            "empty",
		"/bin/true":                   `set by somebody else, to "/bin/true"`,
		"pgbackrest --x archive-push": `set by somebody else, to "pgbackrest …"`,
		"PGPASSWORD=hush ship %p":     "set by somebody else",
	} {
		if found := program(command); found != expected {
			t.Errorf("%q: found %q, expected %q", command, found, expected)
		}
	}
}

func TestStandbyNames(t *testing.T) {
	for value, expected := range map[string]struct {
		canonical      string
		has, every     bool
		beside, always string
	}{
		"":                              {},
		"pgark":                         {"FIRST 1 (pgark)", true, true, "", ""},
		"PgArk, b":                      {"FIRST 1 (PgArk, b)", true, true, "", ""},
		"b, pgark":                      {"FIRST 1 (b, pgark)", true, false, "", ""},
		"*":                             {"FIRST 1 (*)", true, false, "", ""},
		"2 (*, pgark)":                  {"FIRST 2 (*, pgark)", true, false, "", ""},
		"first 2 (b, pgark)":            {"FIRST 2 (b, pgark)", true, true, "", ""},
		"ANY 1 (pgark, b)":              {"ANY 1 (pgark, b)", true, false, "", ""},
		"any 2(pgark,b)":                {"ANY 2 (pgark, b)", true, true, "", ""},
		"a":                             {"FIRST 1 (a)", false, false, "FIRST 1 (a, pgark)", "FIRST 2 (pgark, a)"},
		"s1, \"node-2\"":                {"FIRST 1 (s1, \"node-2\")", false, false, "FIRST 1 (s1, \"node-2\", pgark)", "FIRST 2 (pgark, s1, \"node-2\")"},
		"ANY 2 (s1, s2, s3)":            {"ANY 2 (s1, s2, s3)", false, false, "ANY 2 (s1, s2, s3, pgark)", "FIRST 3 (pgark, s1, s2, s3)"},
		"FIRST 1 (\"a\"\"b\", \"any\")": {`FIRST 1 ("a""b", "any")`, false, false, `FIRST 1 ("a""b", "any", pgark)`, `FIRST 2 (pgark, "a""b", "any")`},
	} {
		s, err := parseStandbyNames(value)
		if err != nil || s.String() != expected.canonical || s.has() != expected.has || s.everyCommit() != expected.every {
			t.Errorf("%q: found %s, %t, %t, %v", value, s, s.has(), s.everyCommit(), err)
		}
		if !expected.has && len(s.names) > 0 && (s.beside() != expected.beside || s.always() != expected.always) {
			t.Errorf("%q: found %s and %s", value, s.beside(), s.always())
		}
	}
	for _, broken := range []string{"a b", "a,", ",", "FIRST 1 (a", "FIRST x (a)", "0 (a)", `"a`, "a-b", "ANY 1 ()"} {
		if s, err := parseStandbyNames(broken); err == nil {
			t.Errorf("%q: found %v", broken, s)
		}
	}
}
