package daemon_test

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strconv"
	"syscall"
	"testing"
	"time"

	"github.com/pgark/terraform-provider-pgark/internal/engine/daemon"
	"github.com/pgark/terraform-provider-pgark/internal/engine/daemon/control"
	"github.com/pgark/terraform-provider-pgark/internal/engine/job"
	"github.com/pgark/terraform-provider-pgark/internal/engine/objectstore"
	"github.com/pgark/terraform-provider-pgark/internal/engine/repository"
	"github.com/pgark/terraform-provider-pgark/internal/engine/wal"
	"github.com/pgark/terraform-provider-pgark/test/pgtest"
)

// The test binary stands in for pgark where a process of its own is needed: it does what the commands of the same names
// do, without their flags.
func TestMain(m *testing.M) {
	if len(os.Args) < 2 {
		os.Exit(m.Run())
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM)
	defer stop()
	switch args := os.Args[2:]; os.Args[1] {
	case "run":
		exit(daemon.Run(ctx, daemon.Options{
			Layout: job.FindLayout(), Job: args[0], Instance: args[1],
			Log: slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelDebug})),
		}))
	case "supervise":
		exit(daemon.Supervise(ctx, job.FindLayout(), args[0], args[1], []string{os.Args[0], "run", args[0], args[1]}))
	case "push":
		exit(wal.Push(ctx, wal.PushRequest{Socket: args[0], Path: args[1]}))
	case "fetch":
		location, series, name, path := args[0], args[1], args[2], args[3]
		found, err := wal.FetchDetached(ctx, name, path, nil, func(ring, socket string) []string {
			return []string{"serve", ring, socket, location, series}
		})
		switch {
		case err != nil:
			fmt.Fprintln(os.Stderr, "pgark:", err)
			os.Exit(130)
		case !found:
			os.Exit(1)
		}
		os.Exit(0)
	case "serve":
		exit(wal.ServeDetached(ctx, wal.FetcherOptions{
			Ring: args[0], IdleAfter: 2 * time.Second, RetryFor: 20 * time.Second, GapWait: time.Second,
			Open: func(ctx context.Context) (wal.Source, error) {
				store, err := objectstore.Open(ctx, objectstore.Location{URL: args[2]}, objectstore.Options{})
				if err != nil {
					return nil, err
				}
				r, err := repository.Open(ctx, store)
				if err != nil {
					return nil, err
				}
				id, err := repository.ParseSeriesID(args[3])
				if err != nil {
					return nil, err
				}
				return r.Series(id), nil
			},
		}, args[1]))
	}
	os.Exit(m.Run())
}

func exit(err error) {
	if err != nil {
		fmt.Fprintln(os.Stderr, "pgark:", err)
		os.Exit(1)
	}
	os.Exit(0)
}

const jobName = "orders"

// guest is a machine as deploying a job leaves it: job file, directories, binary; and a cluster.
type guest struct {
	t        testing.TB
	dir      string
	layout   job.Layout
	binary   string
	job      *job.Job
	instance job.Instance
	location objectstore.Location
	repo     *repository.Repository // reached past every proxy
	runner   *process
	env      []string // of processes, added
}

// process is a started command with its output.
type process struct {
	cmd  *exec.Cmd
	log  string
	done chan struct{} // Closed when it has ended.
	err  error
}

// newGuest prepares a machine for c's job. through is where the runner finds the repository.
func newGuest(t testing.TB, c *pgtest.Cluster, direct, through objectstore.Location, change ...func(*job.Job)) *guest {
	t.Helper()
	g := &guest{t: t, dir: pgtest.Dir(t), location: direct, instance: c.Instance()}
	g.layout = job.Layout{Root: filepath.Join(g.dir, "r")}
	g.binary = filepath.Join(g.dir, "pgark")
	copyFile(t, os.Args[0], g.binary)

	store, err := objectstore.Open(t.Context(), direct, objectstore.Options{})
	if err != nil {
		t.Fatal(err)
	}
	if g.repo, _, err = repository.Create(t.Context(), store, nil); err != nil {
		t.Fatal(err)
	}
	g.job = &job.Job{
		Name: jobName, Host: "db1", Enabled: true,
		Repository: job.Repository{URL: through.URL, Region: through.Region, Endpoint: through.Endpoint, UsePathStyle: through.UsePathStyle},
		Protected:  []job.Instance{g.instance},
	}
	g.job.ApplyDefaults()
	for _, f := range change {
		f(g.job)
	}
	g.declare()
	if direct.Credentials != nil {
		g.write(g.layout.CredentialsFile(jobName), job.EncodeCredentials(*direct.Credentials))
	}
	g.setMachine("1b4e28ba2fa111d2883f0016d3cca427")
	for _, dir := range []string{g.layout.StateDirectory(jobName, g.instance.Name), g.layout.RunDirectory(jobName)} {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	pgtest.Chown(t, g.dir)
	return g
}

// declare writes the job file.
func (g *guest) declare() {
	g.t.Helper()
	if err := g.job.Validate(); err != nil {
		g.t.Fatal(err)
	}
	g.write(g.layout.JobFile(jobName), g.job.Encode())
}

func (g *guest) setMachine(id string) {
	g.t.Helper()
	g.write(g.layout.MachineIDFile(), []byte(id+"\n"))
}

func (g *guest) write(name string, b []byte) {
	g.t.Helper()
	if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
		g.t.Fatal(err)
	}
	if err := os.WriteFile(name, b, 0o600); err != nil {
		g.t.Fatal(err)
	}
	_, uid, gid := pgtest.Owner(g.t)
	if err := os.Chown(name, uid, gid); err != nil {
		g.t.Fatal(err)
	}
}

func copyFile(t testing.TB, from, to string) {
	t.Helper()
	in, err := os.Open(from)
	if err != nil {
		t.Fatal(err)
	}
	defer in.Close()
	out, err := os.OpenFile(to, os.O_WRONLY|os.O_CREATE, 0o755)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := io.Copy(out, in); err != nil {
		t.Fatal(err)
	}
	if err := out.Close(); err != nil {
		t.Fatal(err)
	}
}

func (g *guest) socket() string { return g.layout.Socket(jobName, g.instance.Name) }

// archiving are the settings of a protected server.
func (g *guest) archiving() map[string]string {
	return map[string]string{"archive_mode": "on", "archive_command": g.binary + " push " + g.socket() + " %p"}
}

// start starts a command as the instance's owner; it is killed when the test ends.
func (g *guest) start(args ...string) *process {
	g.t.Helper()
	p := &process{done: make(chan struct{}), log: filepath.Join(g.dir, args[0]+"."+strconv.FormatInt(time.Now().UnixNano(), 36)+".log")}
	out, err := os.Create(p.log)
	if err != nil {
		g.t.Fatal(err)
	}
	defer out.Close()
	p.cmd = exec.CommandContext(context.Background(), g.binary, args...) // until its clean-up
	p.cmd.Env = []string{job.RootVariable + "=" + g.layout.Root, "PATH=" + os.Getenv("PATH")}
	p.cmd.Env = append(p.cmd.Env, g.env...)
	p.cmd.Stdout, p.cmd.Stderr = out, out
	p.cmd.Dir = "/"
	p.cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if _, uid, gid := pgtest.Owner(g.t); os.Geteuid() == 0 {
		p.cmd.SysProcAttr.Credential = &syscall.Credential{Uid: uint32(uid), Gid: uint32(gid)}
	}
	if err := p.cmd.Start(); err != nil {
		g.t.Fatal(err)
	}
	go func() {
		p.err = p.cmd.Wait()
		close(p.done)
	}()
	g.t.Cleanup(func() {
		_ = p.cmd.Process.Kill() // as a rule it has ended
		<-p.done
		if g.t.Failed() {
			b, _ := os.ReadFile(p.log)
			g.t.Logf("log of %v, its end:\n%s", args, b[max(0, len(b)-12<<10):])
		}
	})
	return p
}

// run starts the runner and waits until it answers.
func (g *guest) run() {
	g.t.Helper()
	g.runner = g.start("run", jobName, g.instance.Name)
	eventually(g.t, "the runner answers", func() bool {
		_, err := control.GetStatus(context.Background(), g.socket())
		return err == nil
	})
}

// readLog is what the runner that runs has logged.
func readLog(t testing.TB, g *guest) string {
	t.Helper()
	b, err := os.ReadFile(g.runner.log)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

func (g *guest) status() *control.Status {
	g.t.Helper()
	s, err := control.GetStatus(context.Background(), g.socket())
	if err != nil {
		g.t.Fatal(err)
	}
	return s
}

func (g *guest) mustReach(state control.State) *control.Status {
	g.t.Helper()
	var s *control.Status
	eventually(g.t, "the runner's state is "+string(state), func() bool { s = g.status(); return s.State == state })
	return s
}

// kill ends the runner as a power cut would; stop asks it to end.
func (g *guest) kill() {
	_ = g.runner.cmd.Process.Kill()
	<-g.runner.done
}

func (g *guest) stop() {
	g.t.Helper()
	if err := g.runner.cmd.Process.Signal(syscall.SIGTERM); err != nil {
		g.t.Fatal(err)
	}
	select {
	case <-g.runner.done:
		if g.runner.err != nil {
			g.t.Errorf("the runner ended: %v", g.runner.err)
		}
	case <-time.After(30 * time.Second):
		g.t.Fatal("the runner does not end")
	}
	if _, err := os.Lstat(g.socket()); err == nil {
		g.t.Error("the runner left its socket behind")
	}
}

// series is the one of the cluster that the instance was when the guest was made.
func (g *guest) series() *repository.Series {
	return g.repo.Series(repository.SeriesID{Job: jobName, Instance: g.instance.Name, SystemID: g.instance.SystemID})
}

// archived waits until PostgreSQL has had an acknowledgement for the segment that it finishes now.
func archived(t testing.TB, c *pgtest.Cluster) string {
	t.Helper()
	last := string(c.SwitchWAL())
	eventually(t, last+" is acknowledged", func() bool {
		return c.Scalar("select coalesce(last_archived_wal, '') from pg_stat_archiver") >= last
	})
	return last
}

// copyCluster copies a stopped cluster's data directory to a place from where it can be started.
func copyCluster(t testing.TB, c *pgtest.Cluster) string {
	t.Helper()
	to := filepath.Join(pgtest.Dir(t), "data")
	if out, err := exec.CommandContext(t.Context(), "cp", "-a", c.DataDir, to).CombinedOutput(); err != nil {
		t.Fatalf("copy %s: %v: %s", c.DataDir, err, out)
	}
	return to
}

// eventually waits for a condition, longer than a machine busy with other tests needs, and longer than PostgreSQL's archiver sleeps after three failures (PGARCH_AUTOWAKE_INTERVAL, 60 s).
func eventually(t testing.TB, what string, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(3 * time.Minute); !ok(); time.Sleep(20 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("still not so: %s", what)
		}
	}
}
