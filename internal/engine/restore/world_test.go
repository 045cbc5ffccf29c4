package restore

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"sync"
	"syscall"
	"testing"
	"time"

	"filippo.io/age"
	"github.com/jackc/pgx/v5"

	"github.com/pgark/terraform-provider-pgark/internal/engine/daemon/control"
	"github.com/pgark/terraform-provider-pgark/internal/engine/image"
	"github.com/pgark/terraform-provider-pgark/internal/engine/job"
	"github.com/pgark/terraform-provider-pgark/internal/engine/objectstore"
	"github.com/pgark/terraform-provider-pgark/internal/engine/postgres"
	"github.com/pgark/terraform-provider-pgark/internal/engine/repository"
	"github.com/pgark/terraform-provider-pgark/internal/engine/wal"
	"github.com/pgark/terraform-provider-pgark/test/pgtest"
)

var (
	buildOnce sync.Once
	built     string
	buildErr  error
)

func TestMain(m *testing.M) {
	code := m.Run()
	if built != "" {
		_ = os.RemoveAll(filepath.Dir(built))
	}
	os.Exit(code)
}

// pgark builds the command, which PostgreSQL runs as archive_command and restore_command.
func pgark(t testing.TB) string {
	t.Helper()
	buildOnce.Do(build)
	if buildErr != nil {
		t.Fatalf("build pgark: %v", buildErr)
	}
	return built
}

// build serves all tests, so what it builds outlives the first.
func build() {
	var dir string
	if dir, buildErr = os.MkdirTemp("", "pgark-restore-test-"); buildErr != nil {
		return
	}
	built = filepath.Join(dir, "pgark")
	if buildErr = os.Chmod(dir, 0o755); buildErr != nil {
		return
	}
	out, err := exec.CommandContext(context.Background(), "bash", "../../../runner/build.sh", runtime.GOARCH, built).CombinedOutput()
	if err != nil {
		buildErr = fmt.Errorf("%w\n%s", err, out)
	}
}

// world is a server whose WAL goes into a repository in a directory, as a runner would ship it.
type world struct {
	t       testing.TB
	root    string
	store   string // URL
	cluster *pgtest.Cluster
	repo    *repository.Repository
	series  *repository.Series
	shipper *wal.Shipper
	state   string
}

// newWorld makes a world; with an identity, its repository is encrypted.
func newWorld(t testing.TB, o pgtest.Options, identities ...*age.X25519Identity) *world {
	t.Helper()
	w := &world{t: t, root: pgtest.Dir(t), state: t.TempDir()}
	layout := job.Layout{Root: w.root}
	if o.Settings == nil {
		o.Settings = map[string]string{}
	}
	o.Env = append(o.Env, job.RootVariable+"="+w.root)
	for name, value := range map[string]string{
		"archive_mode":    "on",
		"archive_command": pgark(t) + " wal push --job orders --instance main %p",
		"autovacuum":      "off",
	} {
		if _, set := o.Settings[name]; !set {
			o.Settings[name] = value
		}
	}
	w.cluster = pgtest.Start(t, o)
	dir := pgtest.Dir(t)
	w.store = "file://" + dir
	store, err := objectstore.Open(t.Context(), objectstore.Location{URL: w.store}, objectstore.Options{})
	if err != nil {
		t.Fatal(err)
	}
	var recipients []string
	var keys []age.Identity
	for _, i := range identities {
		recipients, keys = append(recipients, i.Recipient().String()), append(keys, i)
	}
	if _, _, err = repository.Create(t.Context(), store, recipients); err != nil {
		t.Fatal(err)
	}
	if w.repo, err = repository.Open(t.Context(), store, keys...); err != nil {
		t.Fatal(err)
	}
	w.series = w.repo.Series(repository.SeriesID{Job: "orders", Instance: "main", SystemID: w.cluster.SystemID})
	controlFile, err := postgres.ReadControl(w.cluster.DataDir)
	if err != nil {
		t.Fatal(err)
	}
	w.shipper, err = wal.New(wal.Options{
		Series: w.series, DataDirectory: w.cluster.DataDir, SystemID: w.cluster.SystemID, SegmentSize: controlFile.WALSegmentSize,
		Repository: w.store, Host: "db1", Log: slog.New(slog.DiscardHandler),
	})
	if err != nil {
		t.Fatal(err)
	}
	w.serve(layout.Socket("orders", "main"))
	return w
}

// serve answers archive_command.
func (w *world) serve(socket string) {
	w.t.Helper()
	if err := os.MkdirAll(filepath.Dir(socket), 0o755); err != nil {
		w.t.Fatal(err)
	}
	l, err := control.Listen(socket)
	if err != nil {
		w.t.Fatal(err)
	}
	pgtest.Chown(w.t, socket)
	ctx, cancel := context.WithCancel(context.Background())
	var running sync.WaitGroup
	running.Go(func() { _ = w.shipper.Run(ctx) }) // ends with ctx
	running.Go(func() {
		_ = control.Serve(ctx, l, func(ctx context.Context, r control.Request, _ func(string) error) control.Answer {
			if _, err := w.shipper.Ship(ctx, r.Path); err != nil {
				return control.Fail(err)
			}
			return control.Answer{OK: true}
		})
	})
	w.t.Cleanup(func() {
		cancel()
		_ = l.Close()
		running.Wait()
	})
}

func (w *world) image() repository.ImageInfo {
	w.t.Helper()
	ctx, cancel := context.WithTimeout(w.t.Context(), time.Minute)
	defer cancel()
	info, err := image.Take(ctx, image.Options{
		Series: w.series, Instance: w.cluster.Instance(), Plan: job.Image{Parallelism: 2}, StateDirectory: w.state,
		Host: "db1", MachineID: "m1", WaitWAL: w.shipper.Wait,
	})
	if err != nil {
		w.t.Fatalf("take an image: %v", err)
	}
	return info
}

// ship makes all that was written so far durable in the repository.
func (w *world) ship() {
	w.t.Helper()
	name := w.cluster.SwitchWAL()
	ctx, cancel := context.WithTimeout(w.t.Context(), 30*time.Second)
	defer cancel()
	control, err := postgres.ReadControl(w.cluster.DataDir)
	if err != nil {
		w.t.Fatal(err)
	}
	if err := w.shipper.Wait(ctx, name.Timeline(), name.Start(control.WALSegmentSize), name.End(control.WALSegmentSize)); err != nil {
		w.t.Fatalf("WAL %s: %v", name, err)
	}
}

// moment is what the database held at a time.
type moment struct {
	time time.Time
	lsn  postgres.LSN // of the next record
	xid  string
	rows int
}

// write commits a row by itself and notes the moment after.
func (w *world) write(n int) moment {
	w.t.Helper()
	var m moment
	conn := w.conn(w.cluster.SocketDir, w.cluster.Port)
	defer func() { _ = conn.Close(context.Background()) }()
	ctx := w.t.Context()
	for range n {
		if err := conn.QueryRow(ctx, "insert into public.log (filler) values (repeat('x', 500)) returning pg_current_xact_id()::text").Scan(&m.xid); err != nil {
			w.t.Fatal(err)
		}
	}
	var lsn string
	if err := conn.QueryRow(ctx, "select clock_timestamp(), pg_current_wal_insert_lsn()::text, (select count(*) from public.log)").Scan(&m.time, &lsn, &m.rows); err != nil {
		w.t.Fatal(err)
	}
	var err error
	if m.lsn, err = postgres.ParseLSN(lsn); err != nil {
		w.t.Fatal(err)
	}
	return m
}

func (w *world) conn(socket string, port int) *pgx.Conn {
	w.t.Helper()
	conn, err := postgres.Connect(w.t.Context(), postgres.ConnectOptions{SocketDirectory: socket, Port: port, Owner: w.cluster.Owner, User: w.cluster.Owner})
	if err != nil {
		w.t.Fatal(err)
	}
	return conn
}

// restored is a restored cluster.
type restored struct {
	*Result
	w    *world
	dir  string
	port int
}

// options restore into a fresh directory and start the server.
func (w *world) options(target Target) Options {
	w.t.Helper()
	return Options{
		Series: w.series, Target: target, DataDirectory: filepath.Join(pgtest.Dir(w.t), "restored"), Port: 20000 + rand.IntN(30000),
		Start: true, BinDirectory: w.cluster.BinDir,
		FetchCommand: []string{pgark(w.t), "wal", "fetch", "--repository=" + w.store, "--series=" + w.series.ID().String()},
	}
}

func (w *world) restore(o Options) (*restored, error) {
	w.t.Helper()
	ctx, cancel := context.WithTimeout(w.t.Context(), time.Minute)
	defer cancel()
	w.t.Cleanup(func() {
		stopServer(w.t, o.DataDirectory)
		if w.t.Failed() {
			b, _ := os.ReadFile(filepath.Join(o.DataDirectory, serverLog))
			w.t.Logf("log of %s:\n%s", o.DataDirectory, b)
		}
	})
	r, err := Run(ctx, o)
	return &restored{Result: r, w: w, dir: o.DataDirectory, port: o.Port}, err
}

func (w *world) mustRestore(o Options) *restored {
	w.t.Helper()
	c, err := w.restore(o)
	if err != nil {
		w.t.Fatalf("restore to %s: %v", o.Target, err)
	}
	return c
}

// scalar asks the restored server.
func (c *restored) scalar(sql string) string {
	c.w.t.Helper()
	conn := c.w.conn(c.w.cluster.SocketDir, c.port)
	defer func() { _ = conn.Close(context.Background()) }()
	var s string
	if err := conn.QueryRow(c.w.t.Context(), "select ("+sql+")::text").Scan(&s); err != nil {
		c.w.t.Fatalf("%s: %v", sql, err)
	}
	return s
}

func (c *restored) rows() string { c.w.t.Helper(); return c.scalar("select count(*) from public.log") }

func (c *restored) mustHold(rows int) {
	c.w.t.Helper()
	if got, want := c.rows(), fmt.Sprint(rows); got != want {
		c.w.t.Errorf("restored to %s: found %s rows, expected %s", c.Target, got, want)
	}
}

// command runs pgark and returns what it printed, errors included, and its exit code.
func (w *world) command(args ...string) (string, int) {
	w.t.Helper()
	ctx, cancel := context.WithTimeout(w.t.Context(), time.Minute)
	defer cancel()
	out, err := exec.CommandContext(ctx, pgark(w.t), args...).CombinedOutput()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		w.t.Fatalf("pgark %s: %v", args[0], err)
	}
	if exit != nil {
		return string(out), exit.ExitCode()
	}
	return string(out), 0
}

// stopServer stops the server of a data directory, if one runs.
func stopServer(t testing.TB, data string) {
	t.Helper()
	for _, signal := range []syscall.Signal{syscall.SIGINT, syscall.SIGQUIT} {
		p, err := postgres.ReadPostmaster(data)
		if errors.Is(err, fs.ErrNotExist) {
			return
		}
		if err != nil {
			t.Error(err)
			return
		}
		if syscall.Kill(p.PID, signal) != nil {
			return
		}
		for range 500 {
			if running, _, _ := postgres.IsRunning(data); !running {
				return
			}
			time.Sleep(10 * time.Millisecond)
		}
	}
	t.Errorf("the server in %s did not stop", data)
}
