//go:build linux

package guest_test

import (
	"context"
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
	"testing"
	"time"

	"github.com/pgark/terraform-provider-pgark/internal/engine/guest"
	"github.com/pgark/terraform-provider-pgark/internal/engine/job"
	"github.com/pgark/terraform-provider-pgark/internal/engine/objectstore"
	"github.com/pgark/terraform-provider-pgark/internal/engine/postgres"
	"github.com/pgark/terraform-provider-pgark/internal/engine/repository"
	"github.com/pgark/terraform-provider-pgark/test/pgtest"
)

const jobName = "orders"

// runnerBinary is the real runner; otherBinary another build of it, for upgrades.
var runnerBinary, otherBinary []byte

func TestMain(m *testing.M) {
	if len(os.Args) > 1 && !strings.HasPrefix(os.Args[1], "-") {
		os.Exit(standIn(os.Args[1], os.Args[2:]))
	}
	dir, err := os.MkdirTemp("", "guest-runner-")
	if err != nil {
		panic(err)
	}
	binary := filepath.Join(dir, "pgark")
	out, err := exec.CommandContext(context.Background(), "bash", "../../../runner/build.sh", runtime.GOARCH, binary).CombinedOutput()
	if err == nil {
		runnerBinary, err = os.ReadFile(binary)
		// What follows an ELF file's sections changes its digest and nothing else.
		otherBinary = append(slices.Clone(runnerBinary), "another build"...)
	}
	_ = os.RemoveAll(dir)
	if err != nil {
		fmt.Fprintf(os.Stderr, "build the runner: %v\n%s", err, out)
		os.Exit(1)
	}
	os.Exit(m.Run())
}

// world is a guest with files below a root of its own, and a repository in a directory.
type world struct {
	t        *testing.T
	ctx      context.Context
	layout   job.Layout
	guest    guest.Guest
	location objectstore.Location
	policy   guest.SettingsPolicy
}

func newWorld(t *testing.T) *world {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 3*time.Minute)
	t.Cleanup(cancel)
	w := &world{
		t: t, ctx: ctx, layout: job.Layout{Root: filepath.Join(pgtest.Dir(t), "g")},
		policy: guest.SettingsPolicy{Manage: true, Restart: "never", ExistingArchiveCommand: "fail"},
	}
	must(t, os.Mkdir(w.layout.Root, 0o755))
	w.guest = guest.Local(w.layout)
	repositoryDir := filepath.Join(pgtest.Dir(t), "repository")
	must(t, os.Mkdir(repositoryDir, 0o750)) // root's: the runner gets it with the first job
	w.location = objectstore.Location{URL: "file://" + repositoryDir}
	store, err := objectstore.Open(ctx, w.location, objectstore.Options{})
	must(t, err)
	_, _, err = repository.Create(ctx, store, nil)
	must(t, err)
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
		if err := w.guest.Remove(ctx, jobName); err != nil {
			t.Errorf("remove at the end: %v", err)
		}
		for _, pid := range w.processes() {
			t.Errorf("process %s of this test goes on", pid)
		}
	})
	return w
}

// processes are those that run a binary of this guest.
func (w *world) processes() []string {
	var out []string
	exes, _ := filepath.Glob("/proc/[0-9]*/exe")
	for _, exe := range exes {
		if path, err := os.Readlink(exe); err == nil && strings.HasPrefix(path, w.layout.Root) {
			out = append(out, filepath.Base(filepath.Dir(exe)))
		}
	}
	return out
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// cluster starts a server that archiving can be turned on for at any time.
func cluster(t *testing.T, o pgtest.Options) *pgtest.Cluster {
	t.Helper()
	settings := map[string]string{"archive_mode": "on"}
	for k, v := range o.Settings {
		settings[k] = v
	}
	o.Settings = settings
	return pgtest.Start(t, o)
}

// job protects the given clusters and no other that may run on this machine.
func (w *world) job(clusters ...*pgtest.Cluster) *job.Job {
	j := &job.Job{Name: jobName, Host: "db1", Enabled: true, Repository: job.Repository{URL: w.location.URL}}
	for _, c := range clusters {
		j.Instances.Include = append(j.Instances.Include, name(c))
	}
	j.ApplyDefaults()
	return j
}

func name(c *pgtest.Cluster) string { return strconv.Itoa(c.Major) + "-" + strconv.Itoa(c.Port) }

func (w *world) deployment(j *job.Job) guest.Deployment {
	return guest.Deployment{Job: j, Runner: runnerBinary, Settings: w.policy}
}

func (w *world) apply(j *job.Job) *guest.State {
	w.t.Helper()
	s, err := w.guest.Apply(w.ctx, w.deployment(j))
	must(w.t, err)
	return s
}

func (w *world) check(j *job.Job) checks {
	w.t.Helper()
	c, err := w.guest.Check(w.ctx, guest.CheckRequest{Job: j, Settings: w.policy})
	must(w.t, err)
	return c
}

type checks []guest.Check

func (c checks) find(t *testing.T, name string) guest.Check {
	t.Helper()
	for _, k := range c {
		if k.Name == name {
			return k
		}
	}
	t.Fatalf("no check %s in %+v", name, c)
	return guest.Check{}
}

// failing are the names of the checks that fail.
func (c checks) failing() []string {
	var out []string
	for _, k := range c {
		if k.Status == guest.Fail {
			out = append(out, k.Name)
		}
	}
	return out
}

func (w *world) expectFailing(j *job.Job, expected ...string) checks {
	w.t.Helper()
	c := w.check(j)
	if found := c.failing(); !slices.Equal(found, expected) {
		w.t.Fatalf("failing checks: found %q, expected %q\n%+v", found, expected, c)
	}
	for _, k := range c {
		if k.Status == guest.Fail && (k.Found == "" || k.Expected == "" || k.Remedy == "") {
			w.t.Errorf("%s: found %q, expected %q, remedy %q: one is empty", k.Name, k.Found, k.Expected, k.Remedy)
		}
	}
	return c
}

// files lists what is below the guest's root, for comparing before and after.
func (w *world) files() []string {
	w.t.Helper()
	var out []string
	must(w.t, filepath.WalkDir(w.layout.Root, func(path string, _ fs.DirEntry, err error) error {
		if err == nil && path != w.layout.Root {
			out = append(out, path)
		}
		return err
	}))
	return out
}

// autoConf is the cluster's postgresql.auto.conf.
func autoConf(t *testing.T, c *pgtest.Cluster) string {
	t.Helper()
	b, err := os.ReadFile(filepath.Join(c.DataDir, "postgresql.auto.conf"))
	must(t, err)
	return string(b)
}

func (w *world) series(c *pgtest.Cluster) *repository.Series {
	w.t.Helper()
	store, err := objectstore.Open(w.ctx, w.location, objectstore.Options{})
	must(w.t, err)
	repo, err := repository.Open(w.ctx, store)
	must(w.t, err)
	return repo.Series(repository.SeriesID{Job: jobName, Instance: name(c), SystemID: c.SystemID})
}

// waitForWAL waits until a segment is in the repository.
func (w *world) waitForWAL(c *pgtest.Cluster, segment postgres.SegmentName) {
	w.t.Helper()
	series := w.series(c)
	w.eventually(func() bool {
		_, err := series.StatWAL(w.ctx, string(segment))
		if err != nil && !errors.Is(err, objectstore.ErrNotExist) {
			w.t.Fatal(err)
		}
		return err == nil
	})
}

// contextWithSeconds bounds one call that is expected to wait in vain.
func contextWithSeconds(w *world, seconds int) (context.Context, context.CancelFunc) {
	return context.WithTimeout(w.ctx, time.Duration(seconds)*time.Second)
}

// eventually waits until something is so; the world's time bounds it.
func (w *world) eventually(so func() bool) {
	w.t.Helper()
	for !so() {
		select {
		case <-w.ctx.Done():
			w.t.Fatal(context.Cause(w.ctx))
		case <-time.After(20 * time.Millisecond):
		}
	}
}
