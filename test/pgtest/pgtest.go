// Package pgtest runs real PostgreSQL servers for tests.
//
// Start makes a cluster of any major from 13 to 18 in a directory of its own, reachable over a unix socket only, and
// removes everything when the test ends. A test that runs as root gets a server that runs as "postgres" (or "nobody"
// where that user is missing), as on a real guest; any other user gets a server of its own.
//
// Server binaries come from Debian's /usr/lib/postgresql/<major>/bin, which holds all client tools, or from
// <tools>/pg/<major>, where install.sh puts bare servers of all six majors. <tools> is $PGARK_TOOLS, or .tools beside
// go.mod. What is missing fails the test with the command that installs it: no test skips.
//
// PGTEST_KEEP=1 keeps the files of every cluster.
package pgtest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/pgark/terraform-provider-pgark/internal/engine/job"
	"github.com/pgark/terraform-provider-pgark/internal/engine/postgres"
)

// Majors are the versions that pgark supports. Loop over it for what differs between them.
var Majors = []int{13, 14, 15, 16, 17, 18}

// Options of Start. The zero value gives a cluster of the version with the most tools, without page checksums, that
// does not wait for the disk.
type Options struct {
	// Major is the version. 0: the newest that Debian's packages installed with all tools, else the newest there is.
	Major int

	// DataChecksums turns page checksums on; they are off otherwise, in 18 too.
	DataChecksums bool

	// WALSegmentSizeMB is initdb's --wal-segsize. 0: 16.
	WALSegmentSizeMB int

	// Settings go into postgresql.conf, as they would be written there but without quotes.
	Settings map[string]string

	// Tablespaces are created with these names, in directories of their own (Cluster.TablespaceDir).
	Tablespaces []string

	// SeparateWAL puts pg_wal elsewhere, behind a symbolic link.
	SeparateWAL bool

	// SeparateConfig keeps postgresql.conf, pg_hba.conf and pg_ident.conf outside the data directory, as Debian does.
	SeparateConfig bool

	// Fsync makes the server wait for the disk. Tests that kill the server need not: only a crash of the machine loses
	// what was not flushed.
	Fsync bool

	// DataDir adopts an existing data directory, a restored one say, instead of making one. It must belong to Owner()
	// (Chown gives it away), and stays when the test ends. Its configuration is used as it is, apart from where the
	// server listens; Settings are given on the command line.
	DataDir string

	// Env is added to the server's environment, which archive_command inherits.
	Env []string

	// NoStart leaves the server stopped.
	NoStart bool
}

// Cluster is a server and its files.
type Cluster struct {
	Major     int
	BinDir    string // initdb, pg_ctl and postgres; see Tool for others
	Root      string // everything of this cluster lies below, unless Options.DataDir says otherwise
	DataDir   string
	ConfigDir string // where postgresql.conf is
	WALDir    string // where WAL is, symbolic links resolved
	SocketDir string
	Port      int
	Owner     string // operating system user and database superuser
	SystemID  postgres.SystemID
	LogFile   string

	t        testing.TB
	o        Options
	uid, gid int
	run      *run
}

// run holds the server of a Cluster and of what For made of it.
type run struct{ server *server }

// server is one run of the postmaster.
type server struct {
	process *os.Process
	done    chan struct{} // Closed once the process was waited for.
}

// Owner returns the operating system user that servers run as, and its ids.
func Owner(t testing.TB) (name string, uid, gid int) {
	t.Helper()
	find := func() (*user.User, error) {
		if os.Geteuid() != 0 {
			return user.Current()
		}
		if u, err := user.Lookup("postgres"); err == nil {
			return u, nil
		}
		return user.Lookup("nobody")
	}
	u, err := find()
	if err != nil {
		t.Fatalf("pgtest: no operating system user to run PostgreSQL as: %v", err)
	}
	if uid, err = strconv.Atoi(u.Uid); err != nil {
		t.Fatalf("pgtest: user %s: %v", u.Username, err)
	}
	if gid, err = strconv.Atoi(u.Gid); err != nil {
		t.Fatalf("pgtest: user %s: %v", u.Username, err)
	}
	return u.Username, uid, gid
}

// Chown gives a tree to Owner, symbolic links themselves included.
func Chown(t testing.TB, path string) {
	t.Helper()
	_, uid, gid := Owner(t)
	err := filepath.WalkDir(path, func(path string, _ fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		return os.Lchown(path, uid, gid)
	})
	if err != nil {
		t.Fatalf("pgtest: %v", err)
	}
}

// Dir makes a directory that Owner owns and reaches (t.TempDir may lie below one that it cannot), with a path short
// enough for sockets. It is removed when the test ends.
func Dir(t testing.TB) string {
	t.Helper()
	_, uid, gid := Owner(t)
	base := os.TempDir()
	if len(base) > 40 || !reachable(base) {
		base = "/tmp"
	}
	dir, err := os.MkdirTemp(base, "pgt-") //nolint:usetesting // t.TempDir is long, and closed to other users
	if err != nil {
		t.Fatalf("pgtest: %v", err)
	}
	t.Cleanup(func() {
		if os.Getenv("PGTEST_KEEP") != "" {
			t.Logf("pgtest: kept %s", dir)
			return
		}
		if err := os.RemoveAll(dir); err != nil {
			t.Errorf("pgtest: clean up: %v", err)
		}
	})
	if err := errors.Join(os.Chmod(dir, 0o755), os.Chown(dir, uid, gid)); err != nil {
		t.Fatalf("pgtest: %v", err)
	}
	return dir
}

// reachable tells whether everybody may pass through to dir.
func reachable(dir string) bool {
	for {
		info, err := os.Stat(dir)
		if err != nil || info.Mode().Perm()&1 == 0 {
			return false
		}
		if dir == "/" || dir == "." {
			return true
		}
		dir = filepath.Dir(dir)
	}
}

// Tools is the directory of the project's tools.
func Tools(t testing.TB) string {
	t.Helper()
	if dir := os.Getenv("PGARK_TOOLS"); dir != "" {
		return dir
	}
	dir, err := os.Getwd()
	if err != nil {
		t.Fatalf("pgtest: %v", err)
	}
	for ; ; dir = filepath.Dir(dir) {
		if _, err := os.Stat(filepath.Join(dir, "go.mod")); err == nil {
			return filepath.Join(dir, ".tools")
		}
		if dir == "/" {
			t.Fatalf("pgtest: no go.mod above the working directory: set PGARK_TOOLS")
		}
	}
}

const debianRoot = "/usr/lib/postgresql"

func debianBin(major int) string { return filepath.Join(debianRoot, strconv.Itoa(major), "bin") }

func exists(path string) bool {
	_, err := os.Stat(path)
	return err == nil
}

// findServer returns the directory of a major's binaries.
func findServer(t testing.TB, major int) (int, string) {
	t.Helper()
	tools := Tools(t)
	bare := func(major int) string { return filepath.Join(tools, "pg", strconv.Itoa(major), "bin") }
	candidates := []int{major}
	if major == 0 {
		candidates = slices.Clone(Majors)
		slices.Reverse(candidates)
	}
	for _, m := range candidates {
		if exists(filepath.Join(debianBin(m), "postgres")) && exists(filepath.Join(debianBin(m), "pgbench")) {
			return m, debianBin(m)
		}
	}
	for _, m := range candidates {
		if exists(filepath.Join(bare(m), "postgres")) {
			return m, bare(m)
		}
	}
	t.Fatalf("pgtest: no server of PostgreSQL %v in %s or %s: run make tools, or test/pgtest/install.sh %s",
		candidates, debianRoot, filepath.Join(tools, "pg"), filepath.Join(tools, "pg"))
	return 0, ""
}

// Start makes a cluster, starts its server and waits until it takes connections.
func Start(t testing.TB, o Options) *Cluster {
	t.Helper()
	c := &Cluster{t: t, o: o, Port: 20000 + rand.IntN(40000), run: &run{}}
	c.Owner, c.uid, c.gid = Owner(t)
	if o.DataDir != "" && o.Major == 0 {
		version, err := os.ReadFile(filepath.Join(o.DataDir, "PG_VERSION"))
		if err != nil {
			t.Fatalf("pgtest: adopt: %v", err)
		}
		if o.Major, err = strconv.Atoi(strings.TrimSpace(string(version))); err != nil {
			t.Fatalf("pgtest: adopt %s: PG_VERSION: %v", o.DataDir, err)
		}
	}
	c.Root = Dir(t)
	c.Major, c.BinDir = findServer(t, o.Major)
	if os.Geteuid() == 0 && !reachable(c.BinDir) {
		// A checkout below a private directory, like root's home: lend the owner a copy.
		copied := filepath.Join(c.Root, "postgresql")
		c.must(exec.CommandContext(t.Context(), "cp", "-a", filepath.Dir(c.BinDir), copied))
		c.BinDir = filepath.Join(copied, "bin")
	}
	c.SocketDir = c.Root
	c.LogFile = filepath.Join(c.Root, "log")
	if o.DataDir != "" {
		c.DataDir, c.ConfigDir = o.DataDir, o.DataDir
	} else {
		c.initdb()
	}
	wal, err := filepath.EvalSymlinks(filepath.Join(c.DataDir, "pg_wal"))
	if err != nil {
		t.Fatalf("pgtest: %v", err)
	}
	c.WALDir = wal
	control, err := postgres.ReadControl(c.DataDir)
	if err != nil {
		t.Fatalf("pgtest: %v", err)
	}
	c.SystemID = control.SystemID

	t.Cleanup(func() {
		c.kill(syscall.SIGQUIT)
		if t.Failed() {
			t.Logf("pgtest: log of PostgreSQL %d in %s, its end:\n%s", c.Major, c.DataDir, c.logTail(16<<10))
		}
	})
	if o.NoStart {
		return c
	}
	c.Start()
	if o.DataDir == "" {
		for _, name := range o.Tablespaces {
			dir := c.TablespaceDir(name)
			c.mkdir(dir, 0o700)
			c.Exec("create tablespace " + pgx.Identifier{name}.Sanitize() + " location '" + dir + "'")
		}
	}
	return c
}

// For is the cluster in the hands of a subtest: what goes wrong fails that one, and its connections close with it.
func (c *Cluster) For(t testing.TB) *Cluster {
	other := *c
	other.t = t
	return &other
}

func (c *Cluster) initdb() {
	c.t.Helper()
	c.DataDir = filepath.Join(c.Root, "data")
	c.ConfigDir = c.DataDir
	args := []string{"-D", c.DataDir, "-U", c.Owner, "--auth-local=peer", "--auth-host=reject", "--locale=C", "--encoding=UTF8", "--no-sync"}
	switch {
	case c.o.DataChecksums:
		args = append(args, "--data-checksums")
	case c.Major >= 18:
		args = append(args, "--no-data-checksums")
	}
	if c.o.WALSegmentSizeMB != 0 {
		args = append(args, "--wal-segsize="+strconv.Itoa(c.o.WALSegmentSizeMB))
	}
	if c.o.SeparateWAL {
		args = append(args, "--waldir="+filepath.Join(c.Root, "wal"))
	}
	c.must(c.Command("initdb", args...))

	if c.o.SeparateConfig {
		c.ConfigDir = filepath.Join(c.Root, "etc")
		c.mkdir(c.ConfigDir, 0o755)
		for _, name := range []string{"postgresql.conf", "pg_hba.conf", "pg_ident.conf"} {
			if err := os.Rename(filepath.Join(c.DataDir, name), filepath.Join(c.ConfigDir, name)); err != nil {
				c.t.Fatalf("pgtest: %v", err)
			}
		}
	}
	settings := map[string]string{
		"listen_addresses":        "",
		"port":                    strconv.Itoa(c.Port),
		"unix_socket_directories": c.SocketDir,
		"shared_buffers":          "32MB",
		"max_connections":         "50",
		"fsync":                   "off",
		"log_checkpoints":         "off",
	}
	if c.o.Fsync {
		settings["fsync"] = "on"
	}
	if c.o.SeparateConfig {
		settings["data_directory"] = c.DataDir
		settings["hba_file"] = filepath.Join(c.ConfigDir, "pg_hba.conf")
		settings["ident_file"] = filepath.Join(c.ConfigDir, "pg_ident.conf")
	}
	for name, value := range c.o.Settings {
		settings[name] = value
	}
	c.Configure(settings)
}

// Configure appends to postgresql.conf. It takes a Reload or a restart to have an effect.
func (c *Cluster) Configure(settings map[string]string) {
	c.t.Helper()
	var b bytes.Buffer
	for name, value := range settings {
		fmt.Fprintf(&b, "%s = '%s'\n", name, strings.ReplaceAll(value, "'", "''"))
	}
	f, err := os.OpenFile(filepath.Join(c.ConfigDir, "postgresql.conf"), os.O_APPEND|os.O_WRONLY, 0)
	if err == nil {
		_, err = f.Write(b.Bytes())
		err = errors.Join(err, f.Close())
	}
	if err != nil {
		c.t.Fatalf("pgtest: configure: %v", err)
	}
}

func (c *Cluster) mkdir(dir string, mode os.FileMode) {
	c.t.Helper()
	err := errors.Join(os.MkdirAll(filepath.Dir(dir), 0o755), os.Mkdir(dir, mode), os.Chown(dir, c.uid, c.gid))
	if err != nil {
		c.t.Fatalf("pgtest: %v", err)
	}
}

// TablespaceDir is where Options.Tablespaces puts a tablespace.
func (c *Cluster) TablespaceDir(name string) string { return filepath.Join(c.Root, "tblspc", name) }

// Command prepares a tool of PostgreSQL (Tool) to be run as the owner, with the connection in its environment.
func (c *Cluster) Command(tool string, args ...string) *exec.Cmd {
	c.t.Helper()
	// Not the test's context: it ends before Cleanup, which stops servers in order.
	cmd := exec.CommandContext(context.Background(), c.Tool(tool), args...)
	cmd.Dir = c.Root
	cmd.Env = c.environment()
	cmd.SysProcAttr = c.attributes()
	return cmd
}

func (c *Cluster) environment() []string {
	env := []string{
		"PATH=" + c.BinDir + ":" + os.Getenv("PATH"), "HOME=" + c.Root, "LC_ALL=C",
		"PGHOST=" + c.SocketDir, "PGPORT=" + strconv.Itoa(c.Port), "PGUSER=" + c.Owner, "PGDATABASE=postgres",
	}
	return append(env, c.o.Env...)
}

func (c *Cluster) attributes() *syscall.SysProcAttr {
	a := &syscall.SysProcAttr{}
	if os.Geteuid() != c.uid {
		a.Credential = &syscall.Credential{Uid: uint32(c.uid), Gid: uint32(c.gid)}
	}
	return a
}

func (c *Cluster) must(cmd *exec.Cmd) {
	c.t.Helper()
	if out, err := cmd.CombinedOutput(); err != nil {
		c.t.Fatalf("pgtest: %s: %v\n%s", strings.Join(cmd.Args, " "), err, out)
	}
}

// Run runs a tool (Command) to its end and returns what it printed; the test fails if the tool does.
func (c *Cluster) Run(tool string, args ...string) string {
	c.t.Helper()
	cmd := c.Command(tool, args...)
	out, err := cmd.CombinedOutput()
	if err != nil {
		c.t.Fatalf("pgtest: %s: %v\n%s", strings.Join(cmd.Args, " "), err, out)
	}
	return string(out)
}

// anyMajor are the tools that work with servers of other majors.
var anyMajor = []string{"psql", "pgbench", "pg_amcheck", "pg_isready"}

// HasTool tells whether Tool would find the tool, for what tests check in addition where they can.
func (c *Cluster) HasTool(name string) bool { return c.findTool(name) != "" }

// Tool returns the path of a PostgreSQL program, or fails the test, saying what to install.
func (c *Cluster) Tool(name string) string {
	c.t.Helper()
	path := c.findTool(name)
	if path == "" {
		c.t.Fatalf("pgtest: no %s for PostgreSQL %d: apt-get install postgresql-%d", name, c.Major, c.Major)
	}
	return path
}

func (c *Cluster) findTool(name string) string {
	candidates := []string{filepath.Join(c.BinDir, name), filepath.Join(debianBin(c.Major), name)}
	if slices.Contains(anyMajor, name) {
		for _, m := range slices.Backward(Majors) {
			candidates = append(candidates, filepath.Join(debianBin(m), name))
		}
	}
	for _, path := range candidates {
		if exists(path) {
			return path
		}
	}
	return ""
}

// Start starts the server and waits until it takes connections: for one in recovery with hot_standby, until it is
// consistent.
func (c *Cluster) Start() {
	c.t.Helper()
	c.Launch()
	deadline := time.Now().Add(60 * time.Second)
	for {
		conn, err := c.connect(context.Background())
		if err == nil {
			_ = conn.Close(context.Background())
			return
		}
		select {
		case <-c.run.server.done:
			c.t.Fatalf("pgtest: PostgreSQL %d in %s ended instead of starting: see its log", c.Major, c.DataDir)
		case <-time.After(20 * time.Millisecond):
		}
		if time.Now().After(deadline) {
			c.t.Fatalf("pgtest: PostgreSQL %d in %s takes no connections after 60 s: %v", c.Major, c.DataDir, err)
		}
	}
}

// Launch starts the server without waiting for it: for one that is expected to fail, or to recover for a while.
func (c *Cluster) Launch() {
	c.t.Helper()
	if c.Running() {
		c.t.Fatalf("pgtest: PostgreSQL in %s runs already", c.DataDir)
	}
	args := []string{"-D", c.ConfigDir}
	if c.o.DataDir != "" {
		args = append(args, "-c", "listen_addresses=", "-c", "port="+strconv.Itoa(c.Port), "-c", "unix_socket_directories="+c.SocketDir)
		for name, value := range c.o.Settings {
			args = append(args, "-c", name+"="+value)
		}
	}
	log, err := os.OpenFile(c.LogFile, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		c.t.Fatalf("pgtest: %v", err)
	}
	defer func() { _ = log.Close() }()
	cmd := c.Command("postgres", args...)
	cmd.Stdout, cmd.Stderr = log, log
	// A test that dies must not leave its server behind. The signal comes when the thread that forked ends, so one
	// goroutine keeps that thread until the server has ended.
	cmd.SysProcAttr.Pdeathsig = syscall.SIGQUIT
	cmd.SysProcAttr.Setpgid = true // Ctrl-C is ours to handle
	s := &server{done: make(chan struct{})}
	started := make(chan error)
	go func() {
		runtime.LockOSThread()
		err := cmd.Start()
		s.process = cmd.Process
		started <- err
		if err == nil {
			_ = cmd.Wait() // the server's log says why it ended
		}
		close(s.done)
	}()
	if err := <-started; err != nil {
		c.t.Fatalf("pgtest: start %s: %v", cmd.Path, err)
	}
	c.run.server = s
}

// Running tells whether the server process that Start or Launch started is there.
func (c *Cluster) Running() bool {
	if c.run.server == nil {
		return false
	}
	select {
	case <-c.run.server.done:
		return false
	default:
		return true
	}
}

// PID is the postmaster's process id.
func (c *Cluster) PID() int {
	c.t.Helper()
	if !c.Running() {
		c.t.Fatalf("pgtest: PostgreSQL in %s is not running", c.DataDir)
	}
	return c.run.server.process.Pid
}

// Wait waits until the server has ended by itself.
func (c *Cluster) Wait(timeout time.Duration) {
	c.t.Helper()
	if c.run.server == nil {
		return
	}
	select {
	case <-c.run.server.done:
	case <-time.After(timeout):
		c.t.Fatalf("pgtest: PostgreSQL in %s still runs after %v", c.DataDir, timeout)
	}
}

// Modes of Stop, as pg_ctl names them.
const (
	Smart     = "smart"
	Fast      = "fast"
	Immediate = "immediate"
)

// Stop stops the server and waits for its end; Immediate leaves it to recover as after a crash.
func (c *Cluster) Stop(mode string) {
	c.t.Helper()
	signals := map[string]syscall.Signal{Smart: syscall.SIGTERM, Fast: syscall.SIGINT, Immediate: syscall.SIGQUIT}
	s, ok := signals[mode]
	if !ok {
		c.t.Fatalf("pgtest: stop mode %q: expected smart, fast or immediate", mode)
	}
	if !c.kill(s) {
		c.t.Fatalf("pgtest: PostgreSQL in %s did not stop (%s) within 60 s", c.DataDir, mode)
	}
}

// Restart stops the server fast and starts it.
func (c *Cluster) Restart() {
	c.t.Helper()
	c.Stop(Fast)
	c.Start()
}

// Kill kills the postmaster with SIGKILL, as the kernel does when memory runs out, and waits until its children have
// noticed and are gone too, so that Start can follow.
func (c *Cluster) Kill() {
	c.t.Helper()
	c.kill(syscall.SIGKILL)
	for deadline := time.Now().Add(30 * time.Second); c.attached(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			c.t.Fatalf("pgtest: children of PostgreSQL in %s outlive it by 30 s", c.DataDir)
		}
	}
}

// attached tells whether a process works in the data directory: every child of a postmaster does.
func (c *Cluster) attached() bool {
	cwds, _ := filepath.Glob("/proc/[0-9]*/cwd")
	for _, cwd := range cwds {
		if dir, err := os.Readlink(cwd); err == nil && dir == c.DataDir {
			return true
		}
	}
	return false
}

func (c *Cluster) kill(s syscall.Signal) bool {
	if !c.Running() {
		return true
	}
	_ = c.run.server.process.Signal(s) // it may just have ended
	select {
	case <-c.run.server.done:
		return true
	case <-time.After(60 * time.Second):
	}
	_ = c.run.server.process.Kill()
	<-c.run.server.done
	return false
}

// Log is what the server wrote to its log.
func (c *Cluster) Log() string {
	c.t.Helper()
	b, err := os.ReadFile(c.LogFile)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		c.t.Fatalf("pgtest: %v", err)
	}
	return string(b)
}

func (c *Cluster) logTail(n int) string {
	b, err := os.ReadFile(c.LogFile)
	if err != nil {
		return err.Error()
	}
	return string(b[max(0, len(b)-n):])
}

func (c *Cluster) connect(ctx context.Context) (*pgx.Conn, error) {
	return c.connectTo(ctx, "postgres")
}

func (c *Cluster) connectTo(ctx context.Context, database string) (*pgx.Conn, error) {
	conn, err := postgres.Connect(ctx, postgres.ConnectOptions{
		SocketDirectory: c.SocketDir, Port: c.Port, User: c.Owner, Database: database, Owner: c.Owner,
	})
	if err != nil {
		return nil, err
	}
	// Tests are users, with a user's search path.
	if _, err := conn.Exec(ctx, `set search_path = "$user", public; set application_name = 'pgtest'`); err != nil {
		_ = conn.Close(ctx)
		return nil, err
	}
	return conn, nil
}

// Conn opens a connection to the database postgres. It closes when the test ends, if not before.
func (c *Cluster) Conn(ctx context.Context) *pgx.Conn {
	c.t.Helper()
	return c.ConnTo(ctx, "postgres")
}

// ConnTo is Conn for any database.
func (c *Cluster) ConnTo(ctx context.Context, database string) *pgx.Conn {
	c.t.Helper()
	conn, err := c.connectTo(ctx, database)
	if err != nil {
		c.t.Fatalf("pgtest: %v", err)
	}
	c.t.Cleanup(func() { _ = conn.Close(context.Background()) })
	return conn
}

// Exec runs statements on a connection of its own. Without arguments there may be several, but VACUUM, CREATE DATABASE
// and the like only by themselves.
func (c *Cluster) Exec(sql string, args ...any) {
	c.t.Helper()
	c.with(func(ctx context.Context, conn *pgx.Conn) error {
		if len(args) == 0 {
			_, err := conn.PgConn().Exec(ctx, sql).ReadAll()
			return err
		}
		_, err := conn.Exec(ctx, sql, args...)
		return err
	}, sql)
}

// Scalar runs a query on a connection of its own and returns the first column of its only row as text; "" for null.
func (c *Cluster) Scalar(sql string, args ...any) string {
	c.t.Helper()
	var out string
	c.with(func(ctx context.Context, conn *pgx.Conn) error {
		args = append([]any{pgx.QueryResultFormats{pgx.TextFormatCode}}, args...)
		rows, err := conn.Query(ctx, sql, args...)
		if err != nil {
			return err
		}
		defer rows.Close()
		if !rows.Next() {
			return errors.Join(errors.New("no row"), rows.Err())
		}
		out = string(rows.RawValues()[0])
		rows.Close()
		return rows.Err()
	}, sql)
	return out
}

func (c *Cluster) with(f func(context.Context, *pgx.Conn) error, sql string) {
	c.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	defer cancel()
	conn, err := c.connect(ctx)
	if err != nil {
		c.t.Fatalf("pgtest: %v", err)
	}
	defer func() { _ = conn.Close(ctx) }()
	if err := f(ctx, conn); err != nil {
		c.t.Fatalf("pgtest: %s: %v", sql, err)
	}
}

// SwitchWAL completes the current segment and returns its name.
func (c *Cluster) SwitchWAL() postgres.SegmentName {
	c.t.Helper()
	// The message makes sure that there is something to switch away from.
	return postgres.SegmentName(c.Scalar("select pg_walfile_name(pg_switch_wal()) from pg_logical_emit_message(false, 'pgtest', 'x')"))
}

// Instance is the cluster as a job file names it: "17-main".
func (c *Cluster) Instance() job.Instance {
	return job.Instance{
		Name:            strconv.Itoa(c.Major) + "-main",
		DataDirectory:   c.DataDir,
		SocketDirectory: c.SocketDir,
		Port:            c.Port,
		Owner:           c.Owner,
		DatabaseUser:    c.Owner,
		Version:         c.Major,
		SystemID:        c.SystemID,
	}
}
