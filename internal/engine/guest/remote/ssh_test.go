//go:build linux

package remote

import (
	"bytes"
	"compress/gzip"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/pgark/terraform-provider-pgark/internal/engine/guest"
	"github.com/pgark/terraform-provider-pgark/internal/engine/guest/sshlink"
	"github.com/pgark/terraform-provider-pgark/internal/engine/job"
	"github.com/pgark/terraform-provider-pgark/internal/engine/objectstore"
	"github.com/pgark/terraform-provider-pgark/internal/engine/repository"
	"github.com/pgark/terraform-provider-pgark/test/pgtest"
	"github.com/pgark/terraform-provider-pgark/test/sshtest"
)

const jobName = "orders"

// theRunner is the real one; anotherRunner another build of it.
var theRunner, anotherRunner Runner

func TestMain(m *testing.M) {
	dir, err := os.MkdirTemp("", "remote-runner-")
	if err != nil {
		panic(err)
	}
	binary := filepath.Join(dir, "pgark")
	out, err := exec.CommandContext(context.Background(), "bash", "../../../../runner/build.sh", runtime.GOARCH, binary).CombinedOutput()
	if err == nil {
		var b []byte
		if b, err = os.ReadFile(binary); err == nil {
			theRunner = pack(b)
			// What follows an ELF file's sections changes its digest and nothing else.
			anotherRunner = pack(append(b, "another build"...))
		}
	}
	_ = os.RemoveAll(dir)
	if err != nil {
		fmt.Fprintf(os.Stderr, "build the runner: %v\n%s", err, out)
		os.Exit(1)
	}
	os.Exit(m.Run())
}

func pack(binary []byte) Runner {
	sum := sha256.Sum256(binary)
	var b bytes.Buffer
	z, _ := gzip.NewWriterLevel(&b, gzip.BestSpeed) // the level is a valid one
	_, _ = z.Write(binary)                          // to memory
	_ = z.Close()
	return Runner{Compressed: b.Bytes(), SHA256: hex.EncodeToString(sum[:])}
}

// world is this machine, reached over SSH as if it were another one, with pgark's files below a root of its own.
type world struct {
	t      *testing.T
	ctx    context.Context
	layout job.Layout
	home   string // of whoever logs in
	sshd   *sshtest.Server
}

func newWorld(t *testing.T, sshd ...string) *world {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 3*time.Minute)
	t.Cleanup(cancel)
	w := &world{t: t, ctx: ctx, layout: job.Layout{Root: filepath.Join(pgtest.Dir(t), "g")}, home: filepath.Join(pgtest.Dir(t), "home")}
	must(t, os.Mkdir(w.layout.Root, 0o755))
	must(t, os.Mkdir(w.home, 0o755))
	pgtest.Chown(t, w.home)
	w.sshd = sshtest.Start(t, append(sshd, "SetEnv HOME="+w.home)...)
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
		defer cancel()
		if t.Failed() {
			logs, _ := filepath.Glob(w.layout.LogFile(jobName, "*"))
			for _, f := range logs {
				b, _ := os.ReadFile(f)
				t.Logf("%s:\n%s", f, b)
			}
		}
		if err := guest.Local(w.layout).Remove(ctx, jobName); err != nil {
			t.Errorf("remove at the end: %v", err)
		}
		w.ctx = ctx
		w.eventually("every process of this guest has ended", func() bool { return len(w.processes()) == 0 })
	})
	return w
}

// guest is the machine as an account sees it.
func (w *world) guest(user string, runner Runner, change ...func(*sshlink.Config, *Options)) *Guest {
	w.t.Helper()
	c := sshlink.Config{Host: w.sshd.Address, Port: w.sshd.Port, User: user, PrivateKey: w.sshd.PrivateKey, HostKey: w.sshd.HostKey}
	o := Options{Root: w.layout.Root, Runner: func(arch string) (Runner, error) {
		if arch != "amd64" && arch != "arm64" {
			return Runner{}, fmt.Errorf("found architecture %q", arch)
		}
		return runner, nil
	}}
	for _, f := range change {
		f(&c, &o)
	}
	link, err := sshlink.New(c)
	must(w.t, err)
	o.Link = link
	g := New(o)
	w.t.Cleanup(func() {
		if err := g.Close(); err != nil {
			w.t.Error(err)
		}
	})
	return g
}

// processes are those that run, or ran, a binary below the guest's root, or one that was staged.
func (w *world) processes() []string {
	var out []string
	exes, _ := filepath.Glob("/proc/[0-9]*/exe")
	for _, exe := range exes {
		path, err := os.Readlink(exe)
		if err == nil && (strings.HasPrefix(path, w.layout.Root) || strings.HasPrefix(path, w.home)) {
			out = append(out, filepath.Base(filepath.Dir(exe))+" "+path)
		}
	}
	return out
}

// files is everything that is on the guest.
func (w *world) files() []string {
	w.t.Helper()
	out := []string{}
	for _, root := range []string{w.layout.Root, w.home} {
		must(w.t, filepath.WalkDir(root, func(path string, _ fs.DirEntry, err error) error {
			if errors.Is(err, fs.ErrNotExist) {
				return nil // it went while we looked
			}
			if err == nil && path != root {
				out = append(out, path)
			}
			return err
		}))
	}
	return out
}

func (w *world) expectNoFiles() {
	w.t.Helper()
	if found := w.files(); len(found) > 0 {
		w.t.Errorf("found %q, expected nothing on the guest", found)
	}
}

func (w *world) eventually(what string, so func() bool) {
	w.t.Helper()
	for !so() {
		select {
		case <-w.ctx.Done():
			w.t.Fatalf("waited in vain until %s: %v; processes %q, files %q", what, context.Cause(w.ctx), w.processes(), w.files())
		case <-time.After(5 * time.Millisecond):
		}
	}
}

func cluster(t *testing.T) *pgtest.Cluster {
	t.Helper()
	return pgtest.Start(t, pgtest.Options{Settings: map[string]string{"archive_mode": "on"}})
}

func instanceName(c *pgtest.Cluster) string {
	return strconv.Itoa(c.Major) + "-" + strconv.Itoa(c.Port)
}

// deployment protects one cluster, in a repository of its own.
func (w *world) deployment(c *pgtest.Cluster) guest.Deployment {
	w.t.Helper()
	dir := filepath.Join(pgtest.Dir(w.t), "repository")
	must(w.t, os.Mkdir(dir, 0o750))
	location := objectstore.Location{URL: "file://" + dir}
	store, err := objectstore.Open(w.ctx, location, objectstore.Options{})
	must(w.t, err)
	_, _, err = repository.Create(w.ctx, store, nil)
	must(w.t, err)
	j := &job.Job{Name: jobName, Host: "db1", Enabled: true, Repository: job.Repository{URL: location.URL}}
	j.Instances.Include = []string{instanceName(c)}
	j.ApplyDefaults()
	return guest.Deployment{Job: j, Settings: guest.SettingsPolicy{Manage: true, Restart: "never", ExistingArchiveCommand: "fail"}}
}

// serverOf is the process at the other end of a guest's conversation; 0 while there is none.
func serverOf(g *Guest) int {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.talk == nil {
		return 0
	}
	return g.talk.hello.PID
}

func TestSSH_lifeOfAJob(t *testing.T) {
	w := newWorld(t)
	c := cluster(t)
	d := w.deployment(c)
	g := w.guest("root", theRunner)

	if _, err := g.State(w.ctx, jobName); !errors.Is(err, guest.ErrNoJob) {
		t.Fatalf("found %v, expected %v", err, guest.ErrNoJob)
	}
	equal(t, "host key", g.HostKey(), w.sshd.HostKey)
	w.expectNoFiles() // the runner runs, and is not there any more
	machine, err := g.Machine(w.ctx)
	must(t, err)
	local, err := guest.Local(w.layout).Machine(w.ctx)
	must(t, err)
	equal(t, "machine", machine, local)
	found, err := g.Discover(w.ctx)
	must(t, err)
	if !slices.ContainsFunc(found, func(i guest.Instance) bool { return i.Name == instanceName(c) && i.SystemID == c.SystemID && i.Running }) {
		t.Errorf("found %+v, expected %s among them", found, instanceName(c))
	}
	checks, err := g.Check(w.ctx, guest.CheckRequest{Job: d.Job, Settings: d.Settings})
	must(t, err)
	for _, k := range checks {
		if k.Status == guest.Fail {
			t.Errorf("%+v", k)
		}
	}
	w.expectNoFiles()

	state, err := g.Apply(w.ctx, d)
	must(t, err)
	digest, err := g.RunnerSHA256(w.ctx)
	must(t, err)
	equal(t, "runner", state.RunnerSHA256, digest)
	equal(t, "runner", digest, theRunner.SHA256)
	if len(state.Instances) != 1 || state.Instances[0].Runner != guest.RunnerRunning || state.Instances[0].SystemID != c.SystemID {
		t.Errorf("found %+v", state.Instances)
	}
	first := serverOf(g)

	// What is deployed is run by the next conversation.
	other := w.guest("root", theRunner)
	must(t, other.SetWALRetention(w.ctx, jobName, &job.WALRetention{KeepDays: 3, EnforcedBy: "guest"}))
	exe, err := os.Readlink(fmt.Sprintf("/proc/%d/exe", serverOf(other)))
	must(t, err)
	equal(t, "runner", exe, filepath.Join(w.layout.BinaryDirectory(digest), "pgark"))
	must(t, other.Close())
	if _, err := other.Machine(w.ctx); !errors.Is(err, errClosed) {
		t.Errorf("found %v, expected %v", err, errClosed)
	}

	state, err = g.Apply(w.ctx, d)
	must(t, err)
	if state.Job.WALRetention == nil || state.Job.WALRetention.KeepDays != 3 {
		t.Errorf("found WAL retention %+v", state.Job.WALRetention)
	}
	equal(t, "server", serverOf(g), first)
	must(t, g.Remove(w.ctx, jobName))
	if _, err := g.State(w.ctx, jobName); !errors.Is(err, guest.ErrNoJob) {
		t.Errorf("found %v, expected %v", err, guest.ErrNoJob)
	}
	w.expectNoFiles()
	must(t, g.Close())
	w.eventually("the server has ended", func() bool { return len(w.processes()) == 0 })
}

func TestSSH_errorsOfTheGuest(t *testing.T) {
	w := newWorld(t)
	c := cluster(t)
	d := w.deployment(c)
	g := w.guest("root", theRunner)
	c.Exec("ALTER SYSTEM SET archive_command = 'cp %p /nowhere'")
	c.Exec("SELECT pg_reload_conf()")
	_, err := g.Apply(w.ctx, d)
	prerequisites, ok := errors.AsType[*guest.PrerequisiteError](err)
	if !ok || len(prerequisites.Checks) != 1 || prerequisites.Checks[0].Name != "archive_command" || prerequisites.Hint() == "" {
		t.Fatalf("found %v, expected a *guest.PrerequisiteError", err)
	}

	c.Exec("ALTER SYSTEM RESET archive_command")
	c.Exec("SELECT pg_reload_conf()")
	store, err := objectstore.Open(w.ctx, d.Job.Location(nil), objectstore.Options{})
	must(t, err)
	r, err := repository.Open(w.ctx, store)
	must(t, err)
	_, err = r.ClaimJob(w.ctx, jobName, repository.Owner{MachineID: "another", Host: "db2", ClaimedAt: time.Now().UTC()}, "")
	must(t, err)
	_, err = g.Apply(w.ctx, d)
	owned, ok := errors.AsType[*repository.OwnedError](err)
	if !ok || owned.Owner.MachineID != "another" || owned.Owner.Host != "db2" {
		t.Fatalf("found %v, expected a *repository.OwnedError", err)
	}
	w.expectNoFiles()
}

// holdArchiver stops the server's archiver, so that a segment waits to be archived until release.
func holdArchiver(t *testing.T, c *pgtest.Cluster) (release func()) {
	t.Helper()
	pid, err := strconv.Atoi(c.Scalar("SELECT pid FROM pg_stat_activity WHERE backend_type = 'archiver'"))
	must(t, err)
	must(t, syscall.Kill(pid, syscall.SIGSTOP))
	release = sync.OnceFunc(func() { _ = syscall.Kill(pid, syscall.SIGCONT) })
	t.Cleanup(release)
	return release
}

// applyUntilProof applies, and calls then when everything is in place and the proof is awaited.
func (w *world) applyUntilProof(ctx context.Context, g *Guest, c *pgtest.Cluster, d guest.Deployment, then func()) error {
	w.t.Helper()
	result := make(chan error, 1)
	go func() {
		_, err := g.Apply(ctx, d)
		result <- err
	}()
	w.eventually("archive_command is ours", func() bool {
		select {
		case err := <-result:
			w.t.Fatalf("apply ended early: %v", err)
		default:
		}
		return strings.Contains(c.Scalar("SHOW archive_command"), "wal push")
	})
	then()
	return <-result
}

func (w *world) expectPutBack(c *pgtest.Cluster) {
	w.t.Helper()
	w.eventually("the guest has put everything back", func() bool {
		return len(w.processes()) == 0 && len(w.files()) == 0 && !strings.Contains(c.Scalar("SHOW archive_command"), "pgark")
	})
}

func TestSSH_connectionIsCutDuringApply(t *testing.T) {
	w := newWorld(t)
	c := cluster(t)
	d := w.deployment(c)
	g := w.guest("root", theRunner)
	release := holdArchiver(t, c)
	err := w.applyUntilProof(w.ctx, g, c, d, func() { w.sshd.Cut() })
	lost, ok := errors.AsType[*LostError](err)
	if !ok || lost.Call != "apply job orders" || lost.Host != fmt.Sprintf("root@127.0.0.1:%d", w.sshd.Port) {
		t.Fatalf("found %v, expected a *LostError", err)
	}
	w.expectPutBack(c)
	release()
	_, err = g.Apply(w.ctx, d)
	must(t, err)
	must(t, g.Remove(w.ctx, jobName))
}

func TestSSH_applyIsCanceled(t *testing.T) {
	w := newWorld(t)
	c := cluster(t)
	d := w.deployment(c)
	g := w.guest("root", theRunner)
	release := holdArchiver(t, c)
	ctx, cancel := context.WithCancel(w.ctx)
	defer cancel()
	pid := 0
	err := w.applyUntilProof(ctx, g, c, d, func() {
		pid = serverOf(g)
		cancel()
	})
	if !errors.Is(err, context.Canceled) || !strings.HasSuffix(err.Error(), "; everything was put back as it was") {
		t.Fatalf("found %v", err)
	}
	w.expectNoFiles()
	release()
	_, err = g.Apply(w.ctx, d)
	must(t, err)
	equal(t, "server", serverOf(g), pid) // a canceled call does not end the conversation
	must(t, g.Remove(w.ctx, jobName))
}

// The runner is told to end, as it is when the machine shuts down, more than once: it puts back what it began.
func TestSSH_serverIsToldToEndDuringApply(t *testing.T) {
	w := newWorld(t)
	c := cluster(t)
	d := w.deployment(c)
	g := w.guest("root", theRunner)
	holdArchiver(t, c)
	err := w.applyUntilProof(w.ctx, g, c, d, func() {
		for range 3 {
			_ = syscall.Kill(serverOf(g), syscall.SIGTERM)
			_ = syscall.Kill(serverOf(g), syscall.SIGHUP)
		}
	})
	if err == nil || !strings.Contains(err.Error(), "everything was put back as it was") {
		t.Fatalf("found %v", err)
	}
	w.expectPutBack(c)
}

func TestSSH_serverIsKilled(t *testing.T) {
	w := newWorld(t)
	g := w.guest("root", theRunner)
	_, err := g.Machine(w.ctx)
	must(t, err)
	pid := serverOf(g)
	must(t, syscall.Kill(pid, syscall.SIGKILL))
	_, err = g.Machine(w.ctx)
	must(t, err)
	if serverOf(g) == pid {
		t.Error("found the server that was killed")
	}
	w.expectNoFiles()
}

// Two runs of Terraform, of different versions even, come to a new guest at the same moment.
func TestSSH_stagedByManyAtOnce(t *testing.T) {
	w := newWorld(t)
	var group sync.WaitGroup
	for i := range 6 {
		runner := theRunner
		if i%2 == 1 {
			runner = anotherRunner
		}
		g := w.guest("root", runner)
		group.Go(func() {
			if _, err := g.Machine(w.ctx); err != nil {
				t.Errorf("guest %d: %v", i, err)
				return
			}
			if found := g.talk.hello.SHA256; found != runner.SHA256 {
				t.Errorf("guest %d: found runner %s, expected %s", i, found, runner.SHA256)
			}
		})
	}
	group.Wait()
	w.expectNoFiles()
}

func TestSSH_accountWithoutRoot(t *testing.T) {
	owner, _, _ := pgtest.Owner(t)
	w := newWorld(t)
	g := w.guest(owner, theRunner, func(c *sshlink.Config, _ *Options) { c.Sudo = sshlink.SudoNever })
	machine, err := g.Machine(w.ctx)
	must(t, err)
	if machine.Host == "" {
		t.Errorf("found %+v", machine)
	}
	exe, err := os.Readlink(fmt.Sprintf("/proc/%d/exe", serverOf(g)))
	must(t, err)
	if !strings.HasPrefix(exe, w.home+"/"+stagePrefix) {
		t.Errorf("found %s, expected one below %s", exe, w.home)
	}
	w.expectNoFiles()
	if _, err := g.State(w.ctx, jobName); !errors.Is(err, guest.ErrNoJob) {
		t.Errorf("found %v, expected %v", err, guest.ErrNoJob)
	}
}

func TestSSH_homeIsNoexec(t *testing.T) {
	owner, uid, _ := pgtest.Owner(t)
	w := newWorld(t)
	must(t, syscall.Mount("pgark-test", w.home, "tmpfs", syscall.MS_NOEXEC, "mode=0700,uid="+strconv.Itoa(uid)))
	t.Cleanup(func() {
		if err := syscall.Unmount(w.home, syscall.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
	g := w.guest(owner, theRunner, func(c *sshlink.Config, _ *Options) { c.Sudo = sshlink.SudoNever })
	_, err := g.Machine(w.ctx)
	must(t, err)
	exe, err := os.Readlink(fmt.Sprintf("/proc/%d/exe", serverOf(g)))
	must(t, err)
	if strings.HasPrefix(exe, w.home) || !strings.Contains(exe, "/"+stagePrefix) {
		t.Errorf("found %s, expected a directory of its own elsewhere than in %s", exe, w.home)
	}
	staged := strings.TrimSuffix(exe, " (deleted)")
	if _, err := os.Stat(filepath.Dir(staged)); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("found %v, expected %s to be gone", err, filepath.Dir(staged))
	}
	// For root it is only where the runner is unpacked.
	_, err = w.guest("root", theRunner).Machine(w.ctx)
	must(t, err)
	w.expectNoFiles()
}

func TestSSH_connectionIsCutDuringUpload(t *testing.T) {
	w := newWorld(t)
	big := make([]byte, 192<<20) // it does not get smaller, and takes its time
	_, _ = rand.Read(big)
	runner := pack(big)
	staging := func() bool {
		found, _ := filepath.Glob(filepath.Join(w.home, stagePrefix+"*", "pgark"))
		return len(found) > 0
	}
	g := w.guest("root", runner)
	result := make(chan error, 1)
	go func() {
		_, err := g.Machine(w.ctx)
		result <- err
	}()
	w.eventually("the upload is under way", staging)
	w.sshd.Cut()
	if err := <-result; err == nil {
		t.Error("found no error")
	}
	w.eventually("nothing is left", func() bool { return len(w.files()) == 0 })

	ctx, cancel := context.WithCancel(w.ctx)
	go func() {
		_, err := g.Machine(ctx)
		result <- err
	}()
	w.eventually("the upload is under way", staging)
	cancel()
	if err := <-result; !errors.Is(err, context.Canceled) {
		t.Errorf("found %v", err)
	}
	w.eventually("nothing is left", func() bool { return len(w.files()) == 0 })
}

// What lies where the runner is deployed, and is not it, is not run as root.
func TestSSH_deployedIsNotWhatItsNameSays(t *testing.T) {
	w := newWorld(t)
	witness := filepath.Join(w.layout.Root, "it-ran")
	script := []byte("#!/bin/sh\ntouch " + witness + "\n")
	binary := filepath.Join(w.layout.BinaryDirectory(theRunner.SHA256), "pgark")
	must(t, os.MkdirAll(filepath.Dir(binary), 0o755))
	for name, prepare := range map[string]func(){
		"others may write it":         func() { must(t, os.Chmod(binary, 0o777)) },
		"others may write beside it":  func() { must(t, os.Chmod(filepath.Dir(binary), 0o777)) },
		"it belongs to somebody else": func() { pgtest.Chown(t, binary) },
		"it is a link": func() {
			must(t, os.Rename(binary, binary+".real"))
			must(t, os.Symlink(binary+".real", binary))
		},
	} {
		t.Run(name, func(t *testing.T) {
			must(t, os.RemoveAll(filepath.Dir(binary)))
			must(t, os.Mkdir(filepath.Dir(binary), 0o755))
			must(t, os.WriteFile(binary, script, 0o755))
			prepare()
			_, err := w.guest("root", theRunner).Machine(w.ctx)
			must(t, err)
			if _, err := os.Stat(witness); err == nil {
				t.Error("it was run")
			}
		})
	}
	// One of root's is run, and another one is brought when it does not answer as it should.
	must(t, os.RemoveAll(filepath.Dir(binary)))
	must(t, os.Mkdir(filepath.Dir(binary), 0o755))
	must(t, os.WriteFile(binary, script, 0o755))
	g := w.guest("root", theRunner)
	_, err := g.Machine(w.ctx)
	must(t, err)
	equal(t, "runner", g.talk.hello.SHA256, theRunner.SHA256)
	_, err = os.Stat(witness)
	must(t, err)
}

// The programs that a guest needs, and no gzip.
func TestSSH_guestWithoutGzip(t *testing.T) {
	bin := pgtest.Dir(t)
	for _, program := range []string{"sh", "uname", "id", "ls", "df", "tail", "rm", "mkdir", "chmod", "head", "cat", "env"} {
		path, err := exec.LookPath(program)
		must(t, err)
		must(t, os.Symlink(path, filepath.Join(bin, program)))
	}
	w := newWorld(t, "SetEnv PATH="+bin)
	_, err := w.guest("root", theRunner).Machine(w.ctx)
	must(t, err)
	w.expectNoFiles()
}

func TestSSH_runnerDoesNotStart(t *testing.T) {
	w := newWorld(t)
	g := w.guest("root", pack([]byte("#!/bin/sh\necho no such luck >&2\nexit 3\n")))
	_, err := g.Machine(w.ctx)
	staged, ok := errors.AsType[*StageError](err)
	if expected := g.options.Link.String() + ": start the runner: exit code 3: no such luck"; !ok || err.Error() != expected {
		t.Fatalf("found %v, expected %s", err, expected)
	}
	if expected := "it was brought to " + w.layout.LibDirectory() + "/incoming on the guest: can that be written"; !strings.HasPrefix(staged.Hint(), expected) {
		t.Errorf("found hint %q", staged.Hint())
	}
	if _, err := os.Stat(w.layout.LibDirectory()); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("found %v, expected %s to be gone", err, w.layout.LibDirectory())
	}
}

func TestSSH_unreachable(t *testing.T) {
	w := newWorld(t)
	g := w.guest("root", theRunner, func(c *sshlink.Config, _ *Options) { c.Port, c.Timeout = 1, time.Second })
	var group sync.WaitGroup
	for range 3 {
		group.Go(func() {
			_, err := g.Machine(w.ctx)
			if _, ok := errors.AsType[*sshlink.UnreachableError](err); !ok {
				t.Errorf("found %v", err)
			}
		})
	}
	group.Wait()
	equal(t, "host key", g.HostKey(), "")
}
