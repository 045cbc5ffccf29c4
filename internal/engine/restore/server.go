package restore

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/pgark/terraform-provider-pgark/internal/engine/postgres"
)

// serverLog is the started server's standard error, in its data directory.
const serverLog = "pgark-restore.log"

// findServer finds the directory of the postgres program of a major version.
func findServer(ctx context.Context, major int, given string) (string, error) {
	if given != "" {
		return given, checkServer(ctx, given, major)
	}
	m := strconv.Itoa(major)
	tried := []string{"/usr/lib/postgresql/" + m + "/bin", "/usr/pgsql-" + m + "/bin", "/usr/local/pgsql/bin"}
	if path, err := exec.LookPath("postgres"); err == nil {
		tried = append(tried, filepath.Dir(path))
	}
	for _, dir := range tried {
		if checkServer(ctx, dir, major) == nil {
			return dir, nil
		}
	}
	return "", &NoServerError{Major: major, Tried: tried}
}

func checkServer(ctx context.Context, dir string, major int) error {
	path := filepath.Join(dir, "postgres")
	out, err := exec.CommandContext(ctx, path, "--version").Output()
	if err != nil {
		return fmt.Errorf("%s --version: %w", path, err)
	}
	// "postgres (PostgreSQL) 15.14 (Debian 15.14-0+deb12u1)"
	fields := strings.Fields(string(out))
	if len(fields) < 3 || leadingNumber(fields[2]) != major {
		return fmt.Errorf("%s: found %q, expected PostgreSQL %d", path, strings.TrimSpace(string(out)), major)
	}
	return nil
}

// leadingNumber reads the digits that a string begins with: 18 of "18beta1".
func leadingNumber(s string) int {
	n := 0
	for n < len(s) && s[n] >= '0' && s[n] <= '9' {
		n++
	}
	v, err := strconv.Atoi(s[:n])
	if err != nil {
		return 0
	}
	return v
}

// server is a server that recovers.
type server struct {
	data    string
	process *os.Process
	done    chan struct{} // Closed when the process has ended.
	logs    logs
	seen    seen
}

// launch starts postgres itself, as the data directory's owner: what pg_ctl does, with its own process to wait for. It
// outlives us, in a session of its own.
func (r *run) launch(ctx context.Context, bin string) (*server, error) {
	data := r.o.DataDirectory
	name := filepath.Join(data, serverLog)
	log, err := os.OpenFile(name, os.O_CREATE|os.O_APPEND|os.O_WRONLY|syscall.O_NOFOLLOW, 0o600)
	if err != nil {
		return nil, fmt.Errorf("open the server's log: %w", err)
	}
	defer log.Close()
	end, err := log.Seek(0, io.SeekEnd)
	if err != nil {
		return nil, fmt.Errorf("open the server's log: %w", err)
	}
	old := sizes(data, effective(data)["log_directory"])
	// Messages in English, because they tell how recovery goes.
	cmd := exec.CommandContext(context.WithoutCancel(ctx), filepath.Join(bin, "postgres"), "-D", data, "-c", "lc_messages=C")
	cmd.Dir = data
	cmd.Env = serverEnvironment(os.Environ())
	cmd.Stdout, cmd.Stderr = log, log
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if r.owners.root {
		if err := log.Chown(r.owners.data.uid, r.owners.data.gid); err != nil {
			return nil, err
		}
		cmd.SysProcAttr.Credential = credential(r.owners.data)
	}
	if err := cmd.Start(); err != nil {
		return nil, fmt.Errorf("start %s: %w", cmd.Path, err)
	}
	s := &server{data: data, process: cmd.Process, done: make(chan struct{}), logs: logs{data: data}}
	s.logs.files = []*logFile{{name: name, offset: end}}
	s.logs.old = old
	go func() {
		_ = cmd.Wait() // the log says why it ended
		close(s.done)
	}()
	return s, nil
}

// credential is a user with all its groups.
func credential(owner ids) *syscall.Credential {
	c := &syscall.Credential{Uid: uint32(owner.uid), Gid: uint32(owner.gid)}
	u, err := user.LookupId(strconv.Itoa(owner.uid))
	if err != nil {
		return c
	}
	groups, err := u.GroupIds()
	if err != nil {
		return c
	}
	for _, g := range groups {
		if n, err := strconv.ParseUint(g, 10, 32); err == nil {
			c.Groups = append(c.Groups, uint32(n))
		}
	}
	return c
}

// serverEnvironment leaves out what would change the server (PGPORT, PGDATA, …) or our own standing with systemd.
func serverEnvironment(all []string) []string {
	var out []string
	for _, v := range all {
		name, _, _ := strings.Cut(v, "=")
		if strings.HasPrefix(name, "PG") && !strings.HasPrefix(name, "PGARK_") || name == "NOTIFY_SOCKET" || strings.HasPrefix(name, "LISTEN_") {
			continue
		}
		out = append(out, v)
	}
	return out
}

func (s *server) running() bool {
	select {
	case <-s.done:
		return false
	default:
		return true
	}
}

// stop shuts the server down, fast, then at once.
func (s *server) stop() {
	for _, signal := range []syscall.Signal{syscall.SIGINT, syscall.SIGQUIT, syscall.SIGKILL} {
		_ = s.process.Signal(signal) // it may just have ended
		select {
		case <-s.done:
			return
		case <-time.After(15 * time.Second):
		}
	}
}

// seen is what the server's log told.
type seen struct {
	lastTime   time.Time    // of the last completed transaction
	redoDone   postgres.LSN // where the last replayed record begins
	consistent bool
	paused     bool
	shutdown   bool   // by recovery_target_action
	endedEarly bool   // recovery ended before the target
	segment    string // last one restored
	segments   int64
	fatal      string // the last FATAL or PANIC
	ours       string // the last error of pgark wal fetch
}

var (
	lastTimePattern = regexp.MustCompile(`last completed transaction was at log time (\d{4,}-\d\d-\d\d \d\d:\d\d:\d\d(?:\.\d+)?[+-]\d\d(?::?\d\d)*)`)
	redoDonePattern = regexp.MustCompile(`redo done at ([0-9A-F]+/[0-9A-F]+)`)
	restoredPattern = regexp.MustCompile(`restored log file [\\"]+([0-9A-F]{24})(?:\.partial)?[\\"]+ from archive`)
	fatalPattern    = regexp.MustCompile(`(?:FATAL|PANIC)(?::  |,|"?, ?)(.*)`)
	oursPattern     = regexp.MustCompile(`^pgark: (.*)`)
)

func (s *seen) line(line string) {
	if m := lastTimePattern.FindStringSubmatch(line); m != nil {
		if t, err := parseLogTime(m[1]); err == nil {
			s.lastTime = t
		}
	}
	if m := redoDonePattern.FindStringSubmatch(line); m != nil {
		if lsn, err := postgres.ParseLSN(m[1]); err == nil {
			s.redoDone = lsn
		}
	}
	if m := restoredPattern.FindStringSubmatch(line); m != nil {
		s.segment = m[1]
		s.segments++
	}
	if m := fatalPattern.FindStringSubmatch(line); m != nil {
		// Sessions that come too early are refused with FATAL, too.
		if !strings.Contains(m[1], "the database system is ") && !strings.Contains(m[1], "terminating connection") {
			s.fatal = strings.TrimSpace(m[1])
		}
	}
	if m := oursPattern.FindStringSubmatch(line); m != nil {
		s.ours = m[1]
	}
	s.consistent = s.consistent || strings.Contains(line, "consistent recovery state reached")
	s.paused = s.paused || strings.Contains(line, "recovery has paused") || strings.Contains(line, "pausing at the end of recovery")
	s.shutdown = s.shutdown || strings.Contains(line, "shutdown at recovery target")
	s.endedEarly = s.endedEarly || strings.Contains(line, "recovery ended before configured recovery target was reached")
}

// parseLogTime reads a time as timestamptz_to_str prints it: the offset has hours, then minutes if there are any.
func parseLogTime(s string) (time.Time, error) {
	for _, layout := range []string{"2006-01-02 15:04:05.999999-07", "2006-01-02 15:04:05.999999-07:00", "2006-01-02 15:04:05.999999-07:00:00"} {
		if t, err := time.Parse(layout, s); err == nil {
			return t.UTC(), nil
		}
	}
	return time.Time{}, fmt.Errorf("time %q: unknown form", s)
}

// logs follows the server's standard error and, where a logging collector runs, the files that current_logfiles names.
type logs struct {
	data  string
	files []*logFile
	old   map[string]int64 // what the collector's files held before
}

// sizes of the files in the logging collector's directory.
func sizes(data, dir string) map[string]int64 {
	if dir == "" {
		dir = "log"
	}
	if !filepath.IsAbs(dir) {
		dir = filepath.Join(data, dir)
	}
	out := map[string]int64{}
	list, _ := os.ReadDir(dir) // as a rule there is none
	for _, e := range list {
		if info, err := e.Info(); err == nil {
			out[filepath.Join(dir, e.Name())] = info.Size()
		}
	}
	return out
}

type logFile struct {
	name   string
	offset int64
	rest   []byte // a line without its end
}

func (l *logs) poll(line func(string)) {
	if b, err := os.ReadFile(filepath.Join(l.data, "current_logfiles")); err == nil {
		for _, entry := range strings.Split(string(b), "\n") {
			// "stderr log/postgresql-2026-11-22_160000.log"
			_, name, ok := strings.Cut(entry, " ")
			if !ok || name == "" {
				continue
			}
			if !filepath.IsAbs(name) {
				name = filepath.Join(l.data, name)
			}
			l.add(name)
		}
	}
	for _, f := range l.files {
		f.poll(line)
	}
}

// add follows a file from its beginning, or from where the image's logs end.
func (l *logs) add(name string) {
	for _, f := range l.files {
		if f.name == name {
			return
		}
	}
	l.files = append(l.files, &logFile{name: name, offset: l.old[name]})
}

func (f *logFile) poll(line func(string)) {
	file, err := os.Open(f.name)
	if err != nil {
		return // not there yet, or not any more
	}
	defer file.Close()
	if _, err := file.Seek(f.offset, io.SeekStart); err != nil {
		return
	}
	b, err := io.ReadAll(io.LimitReader(file, 8<<20))
	if err != nil && len(b) == 0 {
		return
	}
	f.offset += int64(len(b))
	b = append(f.rest, b...)
	for {
		i := bytes.IndexByte(b, '\n')
		if i < 0 {
			break
		}
		line(string(b[:i]))
		b = b[i+1:]
	}
	f.rest = bytes.Clone(b)
}

// outcome is how recovery went.
type outcome struct {
	paused, stopped bool
	time            *time.Time
	lsn             postgres.LSN
	timeline        postgres.Timeline
}

// pollEvery is how often the server's state is looked at.
const pollEvery = 50 * time.Millisecond

// follow waits until the server has reached its target and done what it was told to do there.
func (r *run) follow(ctx context.Context, s *server) (*outcome, error) {
	tick := time.NewTicker(pollEvery)
	defer tick.Stop()
	started := time.Now()
	for n := 0; ; n++ {
		select {
		case <-ctx.Done():
			s.stop()
			return nil, fmt.Errorf("the server was stopped before it reached %s; its data directory %s is complete, and recovery goes on when it is started: %w",
				r.plan.Target, s.data, context.Cause(ctx))
		case <-tick.C:
		}
		ended := !s.running()
		s.logs.poll(s.seen.line)
		if r.o.Progress != nil {
			r.o.Progress(Progress{Phase: Recovering, Segment: s.seen.segment, Segments: s.seen.segments, SegmentsTotal: int64(r.plan.WALSegments), Elapsed: time.Since(started)})
		}
		switch {
		case s.seen.shutdown && ended:
			return r.reached(ctx, s, &outcome{stopped: true}), nil
		case ended:
			return nil, r.failed(s)
		case s.seen.paused:
			return r.reached(ctx, s, &outcome{paused: true}), nil
		case r.promoted(s):
			s.logs.poll(s.seen.line)
			return r.reached(ctx, s, &outcome{}), nil
		case r.o.TargetAction == ActionPause && n%40 == 39 && r.isPaused(ctx):
			return r.reached(ctx, s, &outcome{paused: true}), nil
		}
	}
}

// promoted tells whether the server has left recovery and takes connections. pg_control says "in production" from the
// image on; that PostgreSQL has removed the signal file says that recovery is over.
func (r *run) promoted(s *server) bool {
	if _, err := os.Lstat(filepath.Join(s.data, "recovery.signal")); !errors.Is(err, fs.ErrNotExist) {
		return false
	}
	c, err := postgres.ReadControl(s.data)
	if err != nil || c.State != postgres.StateInProduction {
		return false
	}
	p, err := postgres.ReadPostmaster(s.data)
	return err == nil && p.Status == "ready"
}

// isPaused asks the server; where we may not connect, the log has to tell.
func (r *run) isPaused(ctx context.Context) bool {
	paused := false
	_ = r.query(ctx, "select pg_catalog.pg_is_wal_replay_paused()", &paused)
	return paused
}

func (r *run) query(ctx context.Context, sql string, into ...any) error {
	p, err := postgres.ReadPostmaster(r.o.DataDirectory)
	if err != nil {
		return err
	}
	if p.SocketDirectory == "" {
		return errors.New("the server has no unix socket")
	}
	ctx, cancel := context.WithTimeout(ctx, 3*time.Second)
	defer cancel()
	conn, err := postgres.Connect(ctx, postgres.ConnectOptions{
		SocketDirectory: p.SocketDirectory, Port: p.Port, Owner: strconv.Itoa(r.owners.data.uid), Timeout: 3 * time.Second,
	})
	if err != nil {
		return err
	}
	defer func() { _ = conn.Close(ctx) }()
	return conn.QueryRow(ctx, sql).Scan(into...)
}

// reached finds out how far recovery came: the history that PostgreSQL writes for the new timeline says it exactly, the
// log says when the last transaction was, and where neither does the server is asked.
func (r *run) reached(ctx context.Context, s *server, o *outcome) *outcome {
	o.timeline, o.lsn = r.plan.Timeline, s.seen.redoDone
	if !s.seen.lastTime.IsZero() {
		o.time = &s.seen.lastTime
	}
	if t, lsn, ok := newTimeline(s.data, r.plan.Timeline); ok && !o.paused {
		o.timeline, o.lsn = t, lsn
	}
	if o.time == nil && !o.stopped {
		var at *time.Time
		if r.query(ctx, "select pg_catalog.pg_last_xact_replay_timestamp()", &at) == nil && at != nil {
			utc := at.UTC()
			o.time = &utc
		}
	}
	if o.paused {
		var text string
		if r.query(ctx, "select pg_catalog.pg_last_wal_replay_lsn()::text", &text) == nil {
			if lsn, err := postgres.ParseLSN(text); err == nil {
				o.lsn = lsn
			}
		}
	}
	if o.lsn == 0 {
		if c, err := postgres.ReadControl(s.data); err == nil {
			o.lsn = c.MinRecoveryPoint
		}
	}
	return o
}

// newTimeline finds the history that the end of recovery wrote: the newest timeline, and where it left its parent.
func newTimeline(data string, from postgres.Timeline) (postgres.Timeline, postgres.LSN, bool) {
	names, _ := filepath.Glob(filepath.Join(data, walLink, "*.history")) // the pattern is well formed
	var newest postgres.Timeline
	var at postgres.LSN
	for _, name := range names {
		f, err := postgres.ParseWALFile(filepath.Base(name))
		if err != nil || f.Timeline <= max(newest, from) {
			continue
		}
		b, err := os.ReadFile(name)
		if err != nil {
			continue
		}
		h, err := postgres.ParseHistory(f.Timeline, b)
		if err != nil || len(h) == 0 || h[len(h)-1].Timeline != from {
			continue
		}
		newest, at = f.Timeline, h[len(h)-1].Switch
	}
	return newest, at, newest != 0
}

// failed says why the server ended before its target.
func (r *run) failed(s *server) error {
	log := filepath.Join(s.data, serverLog)
	if s.seen.endedEarly {
		e := &EndedEarlyError{Target: r.o.Target, LSN: s.seen.redoDone, Time: s.seen.lastTime, Detail: s.seen.fatal, Log: log}
		if e.LSN == 0 {
			if c, err := postgres.ReadControl(s.data); err == nil {
				e.LSN = c.MinRecoveryPoint
			}
		}
		return e
	}
	e := &ServerError{Said: s.seen.fatal, Fetch: s.seen.ours, Log: log}
	if e.Said == "" {
		e.Said = "it ended without saying why"
	}
	return e
}

// usableSocketDirectories keeps those of the image's that are there; without any, the data directory's own host would
// refuse to start.
func (r *run) usableSocketDirectories(configured string) (string, bool) {
	if configured == "" {
		return "", true // the build's default, which its package has made
	}
	var usable []string
	all := strings.Split(configured, ",")
	for _, d := range all {
		d = strings.Trim(strings.TrimSpace(d), `"`)
		if d == "" || d[0] == '@' {
			usable = append(usable, d)
			continue
		}
		if !filepath.IsAbs(d) {
			d = filepath.Join(r.o.DataDirectory, d)
		}
		if st, err := os.Stat(d); err == nil && st.IsDir() && r.owners.mayWrite(st) {
			usable = append(usable, d)
		}
	}
	if len(usable) == len(all) {
		return "", true
	}
	if len(usable) > 0 {
		return strings.Join(usable, ", "), false
	}
	return "/tmp", false
}

// mayWrite tells whether the data directory's owner may write to a directory, from its mode.
func (o *ownership) mayWrite(st fs.FileInfo) bool {
	s, ok := st.Sys().(*syscall.Stat_t)
	if !ok {
		return true
	}
	c := credential(o.data)
	groups := append([]uint32{c.Gid}, c.Groups...)
	switch {
	case o.data.uid == 0:
		return true
	case int(s.Uid) == o.data.uid:
		return s.Mode&0o300 == 0o300
	}
	for _, g := range groups {
		if g == s.Gid {
			return s.Mode&0o030 == 0o030
		}
	}
	return s.Mode&0o003 == 0o003
}
