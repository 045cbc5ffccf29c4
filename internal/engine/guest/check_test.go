//go:build linux

package guest_test

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"github.com/pgark/terraform-provider-pgark/internal/engine/guest"
	"github.com/pgark/terraform-provider-pgark/internal/engine/job"
	"github.com/pgark/terraform-provider-pgark/internal/engine/objectstore"
	"github.com/pgark/terraform-provider-pgark/internal/engine/repository"
	"github.com/pgark/terraform-provider-pgark/test/pgtest"
	"github.com/pgark/terraform-provider-pgark/test/s3test"
)

// Everything that is wrong is said at once, and Apply, which refuses, has changed nothing.
func TestCheck_everythingAtOnce(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	c := pgtest.Start(t, pgtest.Options{Settings: map[string]string{
		"archive_mode": "off", "wal_level": "minimal", "max_wal_senders": "0", "archive_command": "PGPASSWORD=hush ship %p",
		"archive_library": "basic_archive", "full_page_writes": "off",
	}})
	before := autoConf(t, c)
	j := w.job(c)
	j.Repository.URL += "/elsewhere"
	j.WAL.TempFolder = filepath.Join(w.layout.Root, "spool")
	found := w.expectFailing(j, "temporary_folder", "repository_reachable", "archive_mode", "archive_command", "archive_library", "wal_level", "max_wal_senders")

	order := make([]string, len(found))
	for i, k := range found {
		order[i] = k.Name
	}
	if expected := []string{
		"operating_system", "executable_place", "temporary_folder", "cluster_manager", "security_module", "clock", "repository_reachable",
		"postgresql_version", "postgresql_running", "privileges", "role", "archive_mode", "archive_command", "archive_library", "wal_level", "full_page_writes",
		"max_wal_senders",
	}; !slices.Equal(order, expected) {
		t.Errorf("order: found %q, expected %q", order, expected)
	}
	for name, text := range map[string]string{
		"temporary_folder":     "does not exist",
		"repository_reachable": "no such repository directory",
		"archive_mode":         "off",
		"archive_command":      "set by somebody else",
		"archive_library":      `"basic_archive"`,
		"wal_level":            "minimal",
		"full_page_writes":     "off",
		"max_wal_senders":      "0",
	} {
		if k := found.find(t, name); !strings.Contains(k.Found, text) {
			t.Errorf("%s: found %q, expected %q in it", name, k.Found, text)
		}
	}
	for _, k := range found {
		if strings.Contains(k.Found+k.Remedy+k.Expected, "hush") {
			t.Errorf("%s tells the secret of another archive_command: %+v", k.Name, k)
		}
	}
	if k := found.find(t, "full_page_writes"); k.Status != guest.Warn {
		t.Errorf("found %+v", k)
	}

	_, err := w.guest.Apply(w.ctx, w.deployment(j))
	var unmet *guest.PrerequisiteError
	if !errors.As(err, &unmet) || len(unmet.Checks) != 7 || !errors.Is(err, objectstore.ErrNoBucket) || !strings.Contains(unmet.Hint(), "ALTER SYSTEM SET archive_mode = on") {
		t.Errorf("found %v", err)
	}
	if files := w.files(); len(files) > 0 || autoConf(t, c) != before {
		t.Errorf("Apply refused, and changed %q, %s", files, autoConf(t, c))
	}
}

// follow runs a remedy as it stands, as somebody would who pastes it into a shell of root's.
func follow(t *testing.T, k guest.Check) {
	t.Helper()
	for line := range strings.Lines(k.Remedy) {
		if strings.ContainsAny(line, "\t") || line == "\n" {
			t.Errorf("%s: a line that is no command: %q", k.Name, line)
		}
	}
	cmd := exec.CommandContext(t.Context(), "bash", "-c", k.Remedy)
	cmd.Dir = "/"
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%s: %v\n%s\n%s", k.Name, err, k.Remedy, out)
	}
}

// adopt stops a server in the end that a remedy has started: it is no child of the test.
func adopt(t *testing.T, c *pgtest.Cluster) {
	t.Helper()
	t.Cleanup(func() {
		_ = c.Command("pg_ctl", "stop", "-s", "-w", "-m", "immediate", "-D", c.DataDir).Run()
	})
}

// mend follows the remedy of one check, which has to fail (or warn), and expects it to pass then.
func (w *world) mend(j *job.Job, name string) {
	w.t.Helper()
	w.mendTo(j, name, guest.Pass)
}

func (w *world) mendTo(j *job.Job, name string, expected guest.Status) {
	w.t.Helper()
	k := w.check(j).find(w.t, name)
	if k.Status == guest.Pass {
		w.t.Fatalf("%s: nothing to mend: %+v", name, k)
	}
	follow(w.t, k)
	if after := w.check(j).find(w.t, name); after.Status != expected {
		w.t.Fatalf("after the remedy\n%s\nfound %+v", k.Remedy, after)
	}
}

// The remedies are commands, and they work.
func TestCheck_remedies(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	c := cluster(t, pgtest.Options{Major: 16, Settings: map[string]string{
		"archive_command": "/bin/true", "archive_library": "basic_archive", "full_page_writes": "off",
	}})
	w.expectFailing(w.job(c), "archive_command", "archive_library")
	for _, name := range []string{"full_page_writes", "archive_command", "archive_library"} {
		w.mend(w.job(c), name)
	}
	w.apply(w.job(c))
}

// A server that archives nothing is mended with one restart, whatever has to be set: archive_mode with wal_level = minimal
// would keep it from starting.
func TestCheck_remediesWithRestart(t *testing.T) {
	t.Parallel()
	for _, major := range []int{13, 15, 18} {
		t.Run(strconv.Itoa(major), func(t *testing.T) {
			t.Parallel()
			w := newWorld(t)
			c := pgtest.Start(t, pgtest.Options{Major: major, Settings: map[string]string{
				"archive_mode": "off", "wal_level": "minimal", "max_wal_senders": "0",
			}})
			adopt(t, c)
			found := w.expectFailing(w.job(c), "archive_mode", "wal_level", "max_wal_senders")
			if k := found.find(t, "archive_mode"); !strings.Contains(k.Remedy, "wal_level = replica") {
				t.Errorf("found %+v", k)
			}
			w.mend(w.job(c), "archive_mode")
			w.expectFailing(w.job(c))

			// A change that waits for the restart only waits for it.
			c.Exec("alter system set archive_mode = off")
			c.Exec("select pg_reload_conf()")
			follow(t, guest.Check{Name: "restart", Remedy: strings.SplitN(found.find(t, "archive_mode").Remedy, " && ", 2)[1]})
			c.Exec("alter system set archive_mode = on")
			c.Exec("select pg_reload_conf()")
			w.eventually(func() bool {
				return strings.Contains(w.check(w.job(c)).find(t, "archive_mode").Found, "changed to take effect with the next restart")
			})
			if k := w.check(w.job(c)).find(t, "archive_mode"); strings.Contains(k.Remedy, "ALTER SYSTEM") {
				t.Errorf("found %+v", k)
			}
			w.mend(w.job(c), "archive_mode")
		})
	}
}

// A stopped server is started the way it was.
func TestCheck_remedyStarts(t *testing.T) {
	t.Parallel()
	for _, options := range []pgtest.Options{
		{Major: 14, SeparateConfig: true},
		{Major: 17},
	} {
		w := newWorld(t)
		c := cluster(t, options)
		adopt(t, c)
		w.apply(w.job(c)) // a job knows where it is: nothing else names this directory while nothing runs there
		c.Stop(pgtest.Fast)
		w.mend(w.job(c), "postgresql_running")
		w.expectFailing(w.job(c))
	}
}

func TestCheck_archiveCommand(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	c := cluster(t, pgtest.Options{Settings: map[string]string{"archive_command": "pgbackrest --stanza=x archive-push %p"}})
	for _, policy := range []struct {
		existing string
		manage   bool
		status   guest.Status
		text     string
	}{
		{"fail", true, guest.Fail, `set by somebody else, to "pgbackrest …"`},
		{"", true, guest.Fail, "set by somebody else"},
		{"replace", true, guest.Warn, "it will be replaced, and put back when the job is destroyed"},
		{"chain", true, guest.Warn, "it will be chained"},
		{"replace", false, guest.Fail, "set by somebody else"},
	} {
		w.policy = guest.SettingsPolicy{Manage: policy.manage, Restart: "never", ExistingArchiveCommand: policy.existing}
		k := w.check(w.job(c)).find(t, "archive_command")
		if k.Status != policy.status || !strings.Contains(k.Found, policy.text) {
			t.Errorf("%+v: found %+v", policy, k)
		}
	}
	// What cannot be chained says why.
	c.Exec("alter system set archive_command = 'ship %p # to the other site'")
	c.Exec("select pg_reload_conf()")
	w.policy = guest.SettingsPolicy{Manage: true, ExistingArchiveCommand: "chain"}
	w.eventually(func() bool {
		k := w.check(w.job(c)).find(t, "archive_command")
		return k.Status == guest.Fail && strings.Contains(k.Found, "cannot be chained: it has a comment") && !strings.Contains(k.Found+k.Remedy, "other site")
	})
	w.mend(w.job(c), "archive_command")
	// Another job of pgark is named.
	other := w.layout.ArchiveCommand("billing", name(c))
	c.Exec("alter system set archive_command = '" + other + "'")
	c.Exec("select pg_reload_conf()")
	w.policy = guest.SettingsPolicy{Manage: true, ExistingArchiveCommand: "fail"}
	if k := w.check(w.job(c)).find(t, "archive_command"); k.Status != guest.Fail || k.Found != "that of pgark's job billing" {
		t.Errorf("found %+v", k)
	}
}

func TestCheck_versionAndRunning(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	// A cluster of PostgreSQL 12, stopped, as Debian would have made it.
	data := filepath.Join(w.layout.Root, "old")
	conf := filepath.Join(w.layout.DebianClusters(), "12", "old", "postgresql.conf")
	must(t, os.MkdirAll(data, 0o700))
	must(t, os.MkdirAll(filepath.Dir(conf), 0o755))
	must(t, os.WriteFile(filepath.Join(data, "PG_VERSION"), []byte("12\n"), 0o600))
	must(t, os.WriteFile(conf, []byte("data_directory = '"+data+"'\nport = 5499 # of the old one\n"), 0o644))
	pgtest.Chown(t, data)
	j := w.job()
	j.Instances.Include = []string{"12-old"}
	found := w.expectFailing(j, "postgresql_version", "postgresql_running")
	if k := found.find(t, "postgresql_version"); !strings.Contains(k.Found, "PostgreSQL 12 in "+data) || k.Expected != "13 to 18" || k.Instance != "12-old" {
		t.Errorf("found %+v", k)
	}

	j.Instances.Include = []string{"99-*"}
	k := w.expectFailing(j, "postgresql_running").find(t, "postgresql_running")
	if !strings.Contains(k.Found, "12-old") || !strings.Contains(k.Expected, "99-*") {
		t.Errorf("found %+v", k)
	}
	must(t, os.RemoveAll(filepath.Join(w.layout.Root, "etc")))
}

// A replica that lets nobody in, and a server whose socket is gone.
func TestCheck_letsNobodyIn(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	c := cluster(t, pgtest.Options{Settings: map[string]string{"hot_standby": "off"}})
	adopt(t, c)
	c.Stop(pgtest.Fast)
	must(t, os.WriteFile(filepath.Join(c.DataDir, "standby.signal"), nil, 0o600))
	pgtest.Chown(t, filepath.Join(c.DataDir, "standby.signal"))
	c.Launch()
	w.eventually(func() bool {
		return strings.Contains(w.check(w.job(c)).find(t, "postgresql_running").Found, "hot_standby = off")
	})
	w.mend(w.job(c), "postgresql_running")
	must(t, os.Remove(filepath.Join(c.SocketDir, ".s.PGSQL."+strconv.Itoa(c.Port))))
	w.mend(w.job(c), "postgresql_running")
}

// Somebody who is neither root nor the owner is told how to become the one or the other.
func TestCheck_anotherUser(t *testing.T) {
	t.Parallel()
	if os.Geteuid() != 0 {
		t.Log("not root: the other user is the one who asks")
	}
	w := newWorld(t)
	c := cluster(t, pgtest.Options{})
	w.apply(w.job(c))
	cmd := exec.CommandContext(w.ctx, w.layout.BinaryLink(), "check", "--job", jobName)
	if os.Geteuid() == 0 {
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
	}
	cmd.Dir, cmd.Env = "/", []string{"PATH=" + os.Getenv("PATH")}
	out, err := cmd.CombinedOutput()
	if os.Geteuid() != 0 {
		must(t, err)
		return
	}
	if err == nil || strings.Contains(string(out), "postgresql_running") || !strings.Contains(string(out), "nobody ALL=(root) NOPASSWD: /usr/bin/install -D -m 0755 /dev/stdin "+w.layout.LibDirectory()+"/incoming/pgark") ||
		!strings.Contains(string(out), "user nobody may not look into "+c.DataDir) {
		t.Errorf("found %v\n%s", err, out)
	}
}

func TestCheck_role(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	c := cluster(t, pgtest.Options{})
	if k := w.check(w.job(c)).find(t, "role"); k.Status != guest.Pass || k.Found != "primary" {
		t.Errorf("found %+v", k)
	}
	c.Stop(pgtest.Fast)
	must(t, os.WriteFile(filepath.Join(c.DataDir, "standby.signal"), nil, 0o600))
	pgtest.Chown(t, filepath.Join(c.DataDir, "standby.signal"))
	c.Start()
	if k := w.expectFailing(w.job(c), "role").find(t, "role"); !strings.Contains(k.Found, "archives nothing") {
		t.Errorf("found %+v", k)
	}
	adopt(t, c)
	w.mendTo(w.job(c), "role", guest.Warn) // a replica stays one
	w.expectFailing(w.job(c))
	if s := w.apply(w.job(c)); s.Instances[0].Runner != "running" {
		t.Errorf("a replica: found %+v", s.Instances)
	}
}

func TestCheck_temporaryFolder(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	c := cluster(t, pgtest.Options{NoStart: true})
	c.Start()
	j := w.job(c)
	folder := filepath.Join(w.layout.Root, "spool")
	j.WAL.TempFolder = folder
	expect := func(status guest.Status, text string) {
		t.Helper()
		if k := w.check(j).find(t, "temporary_folder"); k.Status != status || !strings.Contains(k.Found, text) {
			t.Errorf("found %+v, expected %s, %q", k, status, text)
		}
	}
	expect(guest.Fail, "does not exist")
	w.mend(j, "temporary_folder")
	if os.Geteuid() == 0 {
		must(t, os.Chown(folder, 0, 0))
		expect(guest.Fail, c.Owner+" may not write to it")
		w.mend(j, "temporary_folder")
	}
	expect(guest.Pass, "free")
	j.WAL.TempFolderLimit = 1 << 60
	expect(guest.Fail, "free")
	if k := w.check(j).find(t, "temporary_folder"); !strings.Contains(k.Expected, "1073741824.0 GiB free") {
		t.Errorf("found %+v", k)
	}
	j.WAL.TempFolderLimit = 0
	if os.Geteuid() == 0 {
		must(t, os.Chmod(w.layout.Root, 0o700))
		expect(guest.Fail, c.Owner+" may not pass "+w.layout.Root)
		if k := w.check(j).find(t, "executable_place"); k.Status != guest.Fail || !strings.Contains(k.Remedy, "chmod o+x "+w.layout.Root) {
			t.Errorf("found %+v", k)
		}
		w.mend(j, "temporary_folder") // both: the folder lies there, too
		if k := w.check(j).find(t, "executable_place"); k.Status != guest.Pass {
			t.Errorf("found %+v", k)
		}
	}
	must(t, os.RemoveAll(folder))
	must(t, os.WriteFile(folder, nil, 0o600))
	expect(guest.Fail, "is no directory")
	must(t, os.Remove(folder))
}

// Each way in which a repository is out of reach has its own words.
func TestCheck_repository(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	c := cluster(t, pgtest.Options{})
	server := s3test.Start(t)
	good := server.Location("guest/repository")
	store, err := objectstore.Open(w.ctx, good, objectstore.Options{})
	must(t, err)
	_, _, err = repository.Create(w.ctx, store, nil)
	must(t, err)

	check := func(change func(*objectstore.Location)) guest.Check {
		t.Helper()
		l := good
		keys := *good.Credentials
		l.Credentials = &keys
		change(&l)
		j := w.job(c)
		j.Repository.URL, j.Repository.Endpoint, j.Repository.Region, j.Repository.UsePathStyle = l.URL, l.Endpoint, l.Region, l.UsePathStyle
		k, err := w.guest.Check(w.ctx, guest.CheckRequest{Job: j, Credentials: l.Credentials, Settings: w.policy})
		must(t, err)
		return checks(k).find(t, "repository_reachable")
	}
	for name, v := range map[string]struct {
		change   func(*objectstore.Location)
		status   guest.Status
		expected string
		remedy   string
	}{
		"as it should be": {func(*objectstore.Location) {}, guest.Pass, "a repository that this machine may use", ""},
		"a wrong bucket":  {func(l *objectstore.Location) { l.URL = "s3://nowhere-at-all/x" }, guest.Fail, "a bucket (or directory) that exists", "pgark creates none"},
		"an empty prefix": {func(l *objectstore.Location) { l.URL += "-other" }, guest.Fail, "as pgark_repository creates it", `resource "pgark_repository"`},
		"wrong keys":      {func(l *objectstore.Location) { l.Credentials.SecretAccessKey = "hush" }, guest.Fail, "S3 keys that are valid", "check the access key"},
		"nobody listens":  {func(l *objectstore.Location) { l.Endpoint = "http://127.0.0.1:1" }, guest.Fail, "an answer of the store", "check network"},
	} {
		t.Run(name, func(t *testing.T) {
			k := check(v.change)
			if k.Status != v.status || !strings.Contains(k.Expected, v.expected) || !strings.Contains(k.Remedy, v.remedy) || k.Found == "" {
				t.Errorf("found %+v", k)
			}
			if strings.Contains(k.Found, "hush") {
				t.Errorf("tells the secret: %+v", k)
			}
		})
	}

	// The keys go to the guest, and the whole way works with them.
	j := w.job(c)
	j.Repository.URL, j.Repository.Endpoint, j.Repository.Region, j.Repository.UsePathStyle = good.URL, good.Endpoint, good.Region, good.UsePathStyle
	d := w.deployment(j)
	d.Credentials = good.Credentials
	s, err := w.guest.Apply(w.ctx, d)
	must(t, err)
	if !s.HasCredentials {
		t.Error("no credentials on the guest")
	}
	proofs, err := guest.Prove(w.ctx, w.layout, s.Job, good.Credentials)
	if err != nil || len(proofs) != 1 || proofs[0].Segment == "" || proofs[0].Instance != name(c) {
		t.Errorf("found %+v, %v", proofs, err)
	}
}

// A segment that cannot reach the repository is not called proved, and the error says where it got stuck.
func TestApply_provesNothingFalse(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	c := cluster(t, pgtest.Options{Major: 15})
	j := w.job(c)
	s := w.apply(j)
	// The series' WAL directory, in the hands of somebody else: the runner may not create there.
	dir := filepath.Join(strings.TrimPrefix(w.location.URL, "file://"), jobName, name(c), c.SystemID.String(), "wal", "00000001")
	if _, err := os.Stat(dir); err != nil {
		dir = filepath.Dir(dir)
	}
	must(t, os.Chmod(dir, 0o500))
	if os.Geteuid() != 0 {
		t.Log("not root: the runner and the test are the same user")
	}
	must(t, os.Chown(dir, 0, 0))
	ctx, cancel := contextWithSeconds(w, 3)
	defer cancel()
	_, err := w.guest.Apply(ctx, w.deployment(j))
	var stuck *guest.ProofError
	if !errors.As(err, &stuck) || stuck.Instance != name(c) || !strings.Contains(stuck.Archiver, "archived ") || !strings.Contains(stuck.Runner, "running") {
		t.Fatalf("found %v", err)
	}
	if !strings.Contains(stuck.Runner, "denied") {
		t.Errorf("the runner's reason is missing: %s", stuck.Runner)
	}
	pgtest.Chown(t, dir)
	must(t, os.Chmod(dir, 0o750))
	if again := w.apply(j); again.Job.Digest() != s.Job.Digest() {
		t.Error("the job changed")
	}
}

func TestDiscover_majors(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	clusters := map[string]*pgtest.Cluster{}
	for _, major := range []int{13, 16, 18} {
		c := pgtest.Start(t, pgtest.Options{Major: major, WALSegmentSizeMB: 4})
		clusters[c.DataDir] = c
	}
	all, err := w.guest.Discover(w.ctx)
	must(t, err)
	if !slices.IsSortedFunc(all, func(a, b guest.Instance) int { return strings.Compare(a.Name, b.Name) }) {
		t.Errorf("not in order of name: %+v", all)
	}
	for _, i := range all {
		c, ok := clusters[i.DataDirectory]
		if !ok {
			continue // of other tests
		}
		delete(clusters, i.DataDirectory)
		if i.Name != strconv.Itoa(c.Major)+"-"+strconv.Itoa(c.Port) || i.Version != c.Major || i.Owner != c.Owner || i.SystemID != c.SystemID ||
			!i.Running || i.WALSegment != 4<<20 || i.SocketDirectory != c.SocketDir {
			t.Errorf("found %+v", i)
		}
	}
	if len(clusters) > 0 {
		t.Errorf("not found: %v in %+v", clusters, all)
	}
}

// Of a job that is deployed, what Apply would mend is named, too: with what mends it now.
func TestCheck_deployed(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.policy.ExistingArchiveCommand = "chain"
	c := cluster(t, pgtest.Options{Settings: map[string]string{"archive_command": "test -f %p && echo hush >/dev/null"}})
	s := w.apply(w.job(c))
	deployed := func() checks {
		t.Helper()
		k, err := w.guest.Check(w.ctx, guest.CheckRequest{
			Job: s.Job, Settings: guest.SettingsPolicy{Manage: true, Restart: "never", ExistingArchiveCommand: "fail"}, Deployed: true,
		})
		must(t, err)
		return k
	}
	k := deployed()
	if found := k.failing(); len(found) > 0 {
		t.Fatalf("failing: %q in %+v", found, k)
	}
	if found := k.find(t, "archive_command").Found; found != "pgark's, and behind it the one that was there before" {
		t.Errorf("found %q", found)
	}
	if found := k.find(t, "runner"); found.Status != guest.Pass || found.Instance != name(c) || found.Found != "running" {
		t.Errorf("found %+v", found)
	}
	for _, command := range []string{"", "/bin/true", w.layout.ArchiveCommand(jobName, "elsewhere")} {
		sql(c, "alter system set archive_command = '"+command+"'", "select pg_reload_conf()")
		w.eventually(func() bool { return slices.Equal(deployed().failing(), []string{"archive_command"}) })
		if found := deployed().find(t, "archive_command"); !strings.Contains(found.Remedy, "terraform apply") || strings.Contains(found.Remedy+found.Found, "hush") {
			t.Errorf("%q: found %+v", command, found)
		}
	}
	// Without a chain, it can be pasted.
	w.policy.ExistingArchiveCommand = "replace"
	s = w.apply(w.job(c))
	sql(c, "alter system set archive_command = ''", "select pg_reload_conf()")
	w.eventually(func() bool { return slices.Equal(deployed().failing(), []string{"archive_command"}) })
	follow(t, deployed().find(t, "archive_command"))
	w.eventually(func() bool { return len(deployed().failing()) == 0 })

	socket := w.layout.Socket(jobName, name(c))
	must(t, os.Rename(socket, socket+".away"))
	if found := deployed().find(t, "runner"); found.Status == guest.Pass || found.Remedy == "" {
		t.Errorf("found %+v", found)
	}
	must(t, os.Rename(socket+".away", socket))
}

// A repository in a directory says of itself what is wrong with it.
func TestCheck_directory(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	c := cluster(t, pgtest.Options{})
	dir := strings.TrimPrefix(w.location.URL, "file://")
	if os.Geteuid() == 0 {
		must(t, os.Chown(dir, 1, 1))
		must(t, os.Chmod(dir, 0o755))
		w.expectFailing(w.job(c), "repository_reachable")
		w.mend(w.job(c), "repository_reachable")
	}
	must(t, os.Rename(dir, dir+".away"))
	k := w.expectFailing(w.job(c), "repository_reachable").find(t, "repository_reachable")
	follow(t, k)
	if k := w.check(w.job(c)).find(t, "repository_reachable"); !strings.Contains(k.Found, "no repository in ") {
		t.Errorf("found %+v", k)
	}
	must(t, os.Remove(dir))
	must(t, os.Rename(dir+".away", dir))

	// The name of a job that another machine owns, which this one replaces.
	w.apply(w.job(c))
	must(t, w.guest.Remove(w.ctx, jobName))
	must(t, os.MkdirAll(w.layout.ConfigDirectory(), 0o755))
	before := w.machineID()
	must(t, os.WriteFile(w.layout.MachineIDFile(), []byte("another\n"), 0o644))
	k = w.expectFailing(w.job(c), "repository_reachable").find(t, "repository_reachable")
	if !strings.Contains(k.Remedy, before) {
		t.Errorf("found %+v", k)
	}
	w.mend(w.job(c), "repository_reachable")
	must(t, os.RemoveAll(w.layout.ConfigDirectory()))
}

func (w *world) machineID() string {
	w.t.Helper()
	m, err := w.guest.Machine(w.ctx)
	must(w.t, err)
	return m.ID
}
