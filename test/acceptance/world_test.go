// Package acceptance proves what pgark promises, end to end: a real PostgreSQL, a real S3 server, the real runner
// deployed as it is on a guest, and restores that are compared with what the database held. Nothing here looks inside;
// the commands of the runner and the repository's public listing are the only instruments.
//
// PGARK_ACCEPTANCE_SCALE below 1 shortens what is repeated (moments, kills, seconds of outage) while working on a test.
package acceptance

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/pgark/terraform-provider-pgark/internal/engine/daemon/control"
	"github.com/pgark/terraform-provider-pgark/internal/engine/guest"
	"github.com/pgark/terraform-provider-pgark/internal/engine/job"
	"github.com/pgark/terraform-provider-pgark/internal/engine/objectstore"
	"github.com/pgark/terraform-provider-pgark/internal/engine/postgres"
	"github.com/pgark/terraform-provider-pgark/internal/engine/repository"
	"github.com/pgark/terraform-provider-pgark/test/pgtest"
	"github.com/pgark/terraform-provider-pgark/test/s3test"
)

const jobName = "acceptance"

// runnerBinary is the runner that every world deploys, built once.
var runnerBinary []byte

func TestMain(m *testing.M) {
	code, err := buildAndRun(m)
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		code = 1
	}
	os.Exit(code)
}

func buildAndRun(m *testing.M) (int, error) {
	dir, err := os.MkdirTemp("", "pgark-acceptance.")
	if err != nil {
		return 1, err
	}
	defer os.RemoveAll(dir)
	build := exec.CommandContext(context.Background(), "bash", "../../runner/build.sh", runtime.GOARCH, filepath.Join(dir, "pgark"))
	if out, err := build.CombinedOutput(); err != nil {
		return 1, fmt.Errorf("build the runner: %w\n%s", err, out)
	}
	if runnerBinary, err = os.ReadFile(filepath.Join(dir, "pgark")); err != nil {
		return 1, err
	}
	return m.Run(), nil
}

// scaled is n, or less of it while somebody works on a test.
func scaled(n int) int {
	s, err := strconv.ParseFloat(os.Getenv("PGARK_ACCEPTANCE_SCALE"), 64)
	if err != nil {
		return n
	}
	return max(1, int(float64(n)*s))
}

// random is seeded and says its seed, so that a failure can be repeated (PGARK_SEED).
func random(t *testing.T) *rand.Rand {
	seed, err := strconv.ParseUint(os.Getenv("PGARK_SEED"), 10, 64)
	if err != nil {
		seed = rand.Uint64()
	}
	t.Logf("PGARK_SEED=%d", seed)
	return rand.New(rand.NewPCG(seed, 0))
}

// world is one protected guest.
type world struct {
	t        *testing.T
	ctx      context.Context
	s3       *s3test.Server
	location objectstore.Location
	layout   job.Layout
	cluster  *pgtest.Cluster
	instance string
	name     string
	guest    guest.Guest
	proxy    *s3test.FaultProxy
	change   func(*job.Job)
}

type worldOptions struct {
	cluster pgtest.Options
	// name is the cluster's name; without one the instance is called by its port.
	name string
	// faults, when set, puts the fault proxy between runner and S3 server. It starts harmless.
	faults bool
	// change, when set, makes the job another than the default.
	change func(*job.Job)
}

// newWorld makes PostgreSQL, S3 and a repository, and deploys the job.
func newWorld(t *testing.T, o worldOptions) *world {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 15*time.Minute)
	t.Cleanup(cancel)
	w := &world{t: t, ctx: ctx, s3: s3test.Start(t), layout: job.Layout{Root: pgtest.Dir(t)}, change: o.change}
	w.location = w.s3.Location("acceptance/repository")
	if o.faults {
		w.proxy = s3test.NewFaultProxy(t, w.s3.Endpoint(), s3test.Faults{})
		w.location = w.proxy.Through(w.location)
	}
	settings := map[string]string{"archive_mode": "on", "wal_keep_size": "4GB", "max_wal_size": "512MB"}
	for k, v := range o.cluster.Settings {
		settings[k] = v
	}
	if o.name != "" {
		// Discovery sees every server of the machine: the name must be this test's own.
		w.name = o.name + strconv.Itoa(os.Getpid())
		settings["cluster_name"] = "test/" + w.name
	}
	o.cluster.DataChecksums = true
	o.cluster.Settings = settings
	w.cluster = pgtest.Start(t, o.cluster)
	w.createRepository()
	w.guest = guest.Local(w.layout)
	w.deploy()
	t.Cleanup(func() {
		if t.Failed() {
			w.dumpRunnerLog()
		}
		ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
		defer cancel()
		if err := w.guest.Remove(ctx, jobName); err != nil {
			t.Errorf("remove the job: %v", err)
		}
	})
	return w
}

func (w *world) createRepository() {
	w.t.Helper()
	store, err := objectstore.Open(w.ctx, w.location, objectstore.Options{})
	w.must(err)
	_, _, err = repository.Create(w.ctx, store, nil)
	w.must(err)
}

func (w *world) must(err error) {
	w.t.Helper()
	if err != nil {
		w.t.Fatal(err)
	}
}

// job is the deployment's document: everything by default, images on demand.
func (w *world) job() *job.Job {
	pattern := "*-" + strconv.Itoa(w.cluster.Port)
	if w.name != "" {
		pattern = "*-" + w.name
	}
	j := &job.Job{
		Format: job.Format, Name: jobName, Host: "localhost", Enabled: true,
		Repository: job.Repository{URL: w.location.URL, Region: w.location.Region, Endpoint: w.location.Endpoint, UsePathStyle: w.location.UsePathStyle},
		Instances:  job.Selection{Include: []string{pattern}},
	}
	if w.change != nil {
		w.change(j)
	}
	j.ApplyDefaults()
	return j
}

func (w *world) deploy() {
	w.t.Helper()
	state, err := w.guest.Apply(w.ctx, guest.Deployment{Job: w.job(), Credentials: w.location.Credentials, Runner: runnerBinary,
		Settings: guest.SettingsPolicy{Manage: true, Restart: "never", ExistingArchiveCommand: "fail"}})
	w.must(err)
	if len(state.Instances) != 1 {
		w.t.Fatalf("protected %d instances, expected the test's only", len(state.Instances))
	}
	w.instance = state.Instances[0].Name
}

func (w *world) dumpRunnerLog() {
	if b, err := os.ReadFile(w.layout.LogFile(jobName, w.instance)); err == nil {
		if len(b) > 8000 {
			b = b[len(b)-8000:]
		}
		w.t.Logf("runner's log:\n%s", b)
	}
}

// pgark runs a command of the deployed runner and returns its standard output.
func (w *world) pgark(args ...string) ([]byte, error) {
	cmd := exec.CommandContext(w.ctx, w.layout.BinaryLink(), args...)
	cmd.Dir = w.layout.Root
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if err := cmd.Run(); err != nil {
		return stdout.Bytes(), fmt.Errorf("pgark %s: %w\n%s", strings.Join(args, " "), err, stderr.Bytes())
	}
	return stdout.Bytes(), nil
}

func (w *world) json(v any, args ...string) {
	w.t.Helper()
	out, err := w.pgark(append(args, "--json")...)
	w.must(err)
	if err := json.Unmarshal(out, v); err != nil {
		w.t.Fatalf("pgark %s: %v in %s", strings.Join(args, " "), err, out)
	}
}

// image is the JSON of an image.
type image struct {
	ID          string       `json:"id"`
	Kind        string       `json:"kind"`
	Status      string       `json:"status"`
	StartedAt   time.Time    `json:"started_at"`
	CompletedAt time.Time    `json:"completed_at"`
	StartLSN    postgres.LSN `json:"start_lsn"`
	StopLSN     postgres.LSN `json:"stop_lsn"`
	SourceBytes int64        `json:"source_bytes"`
	ReadBytes   int64        `json:"read_bytes"`
	StoredBytes int64        `json:"stored_bytes"`
}

type listing struct {
	Series []struct {
		Job              string  `json:"job"`
		Instance         string  `json:"instance"`
		SystemIdentifier string  `json:"system_identifier"`
		Images           []image `json:"images"`
		Windows          []struct {
			From     time.Time       `json:"from"`
			To       time.Time       `json:"to"`
			StartLSN postgres.LSN    `json:"start_lsn"`
			EndLSN   postgres.LSN    `json:"end_lsn"`
			Timeline json.RawMessage `json:"timeline"`
		} `json:"windows"`
		Gaps []json.RawMessage `json:"gaps"`
	} `json:"series"`
}

func (w *world) list() listing {
	w.t.Helper()
	var l listing
	w.json(&l, "list", "--job", jobName)
	return l
}

func (w *world) takeImage() image {
	w.t.Helper()
	var i image
	w.json(&i, "image", "--job", jobName, "--instance", w.instance)
	return i
}

// restored is what pgark restore reports, and where it is.
type restored struct {
	Image       string `json:"image"`
	ReachedTime string `json:"reached_time"`
	ReachedLSN  string `json:"reached_lsn"`
	dir, socket string
	port        int
	w           *world
}

// restore restores with --start and stops the server at the end of the test, or by stop.
func (w *world) restore(target ...string) *restored {
	w.t.Helper()
	return w.restoreSeries(jobName+"/"+w.instance+"/"+w.cluster.SystemID.String(), target...)
}

func (w *world) restoreSeries(series string, target ...string) *restored {
	w.t.Helper()
	r := &restored{w: w, dir: filepath.Join(pgtest.Dir(w.t), "restored"), port: freePort()}
	args := append([]string{"restore", "--job", jobName, "--series", series, "--data-directory", r.dir, "--port", strconv.Itoa(r.port),
		"--bin-directory", w.cluster.BinDir, "--start"}, target...)
	w.t.Cleanup(r.stop)
	w.json(r, args...)
	r.socket = postmasterSocket(w.t, r.dir)
	return r
}

func (r *restored) stop() {
	cmd := r.w.cluster.Command("pg_ctl", "-D", r.dir, "-m", "immediate", "-w", "stop")
	if _, err := os.Stat(filepath.Join(r.dir, "postmaster.pid")); err == nil {
		_ = cmd.Run()
	}
}

// remove stops the server and frees the disk, for tests that restore often.
func (r *restored) remove() {
	r.stop()
	_ = os.RemoveAll(r.dir)
}

func (r *restored) conn() *pgx.Conn {
	r.w.t.Helper()
	c, err := postgres.Connect(r.w.ctx, postgres.ConnectOptions{SocketDirectory: r.socket, Port: r.port, User: r.w.cluster.Owner, Database: "postgres", Owner: r.w.cluster.Owner})
	r.w.must(err)
	r.w.exec(c, "SET search_path TO public")
	r.w.t.Cleanup(func() { _ = c.Close(context.Background()) })
	return c
}

// postmasterSocket reads the socket directory: the fifth line of postmaster.pid.
func postmasterSocket(t *testing.T, dir string) string {
	t.Helper()
	b, err := os.ReadFile(filepath.Join(dir, "postmaster.pid"))
	if err != nil {
		t.Fatal(err)
	}
	lines := strings.Split(string(b), "\n")
	if len(lines) < 5 {
		t.Fatalf("postmaster.pid has %d lines, expected the socket directory in the fifth", len(lines))
	}
	return lines[4]
}

// Below the ports that outgoing connections of other tests get (ip_local_port_range).
var nextPort = 22000 + os.Getpid()%8000

// freePort numbers sockets. Nothing here listens on TCP, but a restore demands that its port is free there, too.
func freePort() int {
	for {
		nextPort++
		l, err := new(net.ListenConfig).Listen(context.Background(), "tcp", fmt.Sprintf("127.0.0.1:%d", nextPort))
		if err == nil {
			_ = l.Close() // it was only a question
			return nextPort
		}
	}
}

// scalar runs a query that gives one value.
func scalar[T any](w *world, c *pgx.Conn, sql string, args ...any) T {
	w.t.Helper()
	var v T
	if err := c.QueryRow(w.ctx, sql, args...).Scan(&v); err != nil {
		w.t.Fatalf("%s: %v", sql, err)
	}
	return v
}

func (w *world) exec(c *pgx.Conn, sql string) {
	w.t.Helper()
	if _, err := c.Exec(w.ctx, sql); err != nil {
		w.t.Fatalf("%s: %v", sql, err)
	}
}

// eventually waits for a condition.
func (w *world) eventually(what string, limit time.Duration, ok func() bool) {
	w.t.Helper()
	for end := time.Now().Add(limit); !ok(); time.Sleep(100 * time.Millisecond) {
		if time.Now().After(end) {
			w.t.Fatalf("after %v still not: %s", limit, what)
		}
	}
}

// flush switches the segment and waits until everything PostgreSQL has finished is in the repository.
func (w *world) flush() {
	w.t.Helper()
	c := w.cluster.Conn(w.ctx)
	defer c.Close(context.Background())
	name := scalar[string](w, c, "SELECT pg_walfile_name(pg_switch_wal())")
	w.eventually("segment "+name+" is archived", 2*time.Minute, func() bool {
		return w.archived()[name]
	})
}

// archived is the set of segments that PostgreSQL was told are safe.
func (w *world) archived() map[string]bool {
	done, err := filepath.Glob(filepath.Join(w.cluster.WALDir, "archive_status", "*.done"))
	w.must(err)
	set := map[string]bool{}
	for _, d := range done {
		set[strings.TrimSuffix(filepath.Base(d), ".done")] = true
	}
	return set
}

// status asks the runner.
func (w *world) status() (*control.Status, error) {
	ctx, cancel := context.WithTimeout(w.ctx, 5*time.Second)
	defer cancel()
	return control.GetStatus(ctx, w.layout.Socket(jobName, w.instance))
}

// series opens the repository past any fault proxy.
func (w *world) series() *repository.Series {
	w.t.Helper()
	store, err := objectstore.Open(w.ctx, w.s3.Location("acceptance/repository"), objectstore.Options{})
	w.must(err)
	r, err := repository.Open(w.ctx, store)
	w.must(err)
	return r.Series(repository.SeriesID{Job: jobName, Instance: w.instance, SystemID: w.cluster.SystemID})
}

// mustHoldArchived checks invariant 1: what PostgreSQL was told is archived is in the repository.
func (w *world) mustHoldArchived() {
	w.t.Helper()
	s := w.series()
	for name := range w.archived() {
		if _, err := s.StatWAL(w.ctx, name); err != nil {
			w.t.Errorf("%s was acknowledged and is not in the repository: %v", name, err)
		}
	}
}
