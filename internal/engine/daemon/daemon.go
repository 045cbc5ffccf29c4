// Package daemon is the runner's body: it protects one PostgreSQL instance, all day, by itself.
//
// It opens the repository and makes sure that the job's name there belongs to this machine, ships WAL (package wal) and
// streams what has not filled a segment yet (package stream) or, in interval mode, makes PostgreSQL finish the segment,
// takes images when the schedule says, and when WAL was lost (package image), applies retention after each, and answers
// on a socket (package control). Nothing it meets ends it, short of being told to stop: a repository that is away, a job name that belongs to
// another machine, a cluster that is stopped, or initialised anew under the same job (which begins a new series) are
// states that it reports and gets out of by itself. In every state it answers PostgreSQL's archive_command, with the
// reason where it cannot store: PostgreSQL then keeps its WAL.
//
// It composes what other packages do and holds no formats of its own, but for two small files in the state directory: one
// remembers which scheduled image was last considered, the other in which temporary folders WAL may wait.
package daemon

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/signal"
	"reflect"
	"runtime/debug"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/pgark/terraform-provider-pgark/internal/engine/daemon/control"
	"github.com/pgark/terraform-provider-pgark/internal/engine/job"
	"github.com/pgark/terraform-provider-pgark/internal/engine/objectstore"
	"github.com/pgark/terraform-provider-pgark/internal/engine/postgres"
	"github.com/pgark/terraform-provider-pgark/internal/engine/wal"
)

// Options of Run. Job and Instance have no default.
type Options struct {
	Layout   job.Layout
	Job      string
	Instance string
	Log      *slog.Logger // default: none
}

const (
	// answerAfter bounds a push in all: waiting for the repository to be opened, and shipping. See wal.Options.
	answerAfter = 30 * time.Second

	// watchEvery is how often pg_control is looked at for another system identifier.
	watchEvery = 10 * time.Second

	// grace is how long what goes on may take to end when the runner is told to stop. systemd waits 90 s by default.
	grace = 20 * time.Second

	// memoryLimit is where the garbage collector becomes keen, in bytes. What is in use in a backlog, or while the store is
	// away from a busy server, is below it (wal: memoryBudget, stream: bufferBytes); with the program itself, and what
	// libzstd has, the process stays below 256 MiB. It bounds nothing: what is needed is had. An image needs more, for packs
	// in flight, and for that time there is no limit: the collector would do nothing else.
	memoryLimit = 192 << 20

	reopenFirst = time.Second
	reopenMost  = 30 * time.Second
	// askOwnerEvery: a name changes hands when a person says so.
	askOwnerEvery = 30 * time.Second
)

// daemon is one run of the runner.
type daemon struct {
	o         Options
	log       *slog.Logger
	startedAt time.Time
	host      string

	reload chan struct{} // capacity 1: the job file was read again; open, or look at the schedule, at once

	mu         sync.Mutex // guards what follows; nothing is called under it that blocks
	config     config
	state      control.State
	problem    string
	protection *protection   // set in state Running only
	changed    chan struct{} // closed and replaced whenever state or protection change
	gaps       []control.WALGap
	gapCount   int64

	lags lags
}

// config is what the job file says of the instance, with the credentials beside it.
type config struct {
	job         *job.Job
	instance    job.Instance
	credentials *objectstore.Credentials
}

// sameTarget tells whether a running protection can go on under o.
func (c config) sameTarget(o config) bool {
	creds := func(c *objectstore.Credentials) objectstore.Credentials {
		if c == nil {
			return objectstore.Credentials{}
		}
		return *c
	}
	a, b := c.instance, o.instance
	a.SystemID, b.SystemID = 0, 0 // what pg_control says counts
	return c.job.Repository == o.job.Repository && a == b && creds(c.credentials) == creds(o.credentials)
}

// sameWAL tells whether WAL is to be treated under o as before.
func (c config) sameWAL(o config) bool {
	return reflect.DeepEqual(c.job.WAL, o.job.WAL) && c.job.WantsSlot() == o.job.WantsSlot() &&
		c.job.WantsSynchronous() == o.job.WantsSynchronous()
}

// Run protects the instance until ctx ends; then it stops taking work, gives what goes on a moment to end, and writes
// its session record. It fails only at the start: without a usable job file, or when another runner protects the
// instance.
func Run(ctx context.Context, o Options) error {
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	limitMemory(memoryLimit)
	if os.Getenv("GOGC") == "" {
		// Much of what lives is buffers of WAL, which the collector has nothing to do for: collecting twice as often costs a
		// few percent of CPU while shipping, and saves a quarter of the memory of a process that runs beside a database.
		debug.SetGCPercent(50)
	}
	host, err := os.Hostname()
	if err != nil {
		return fmt.Errorf("host name: %w", err)
	}
	d := &daemon{
		o: o, log: o.Log, startedAt: time.Now(), host: host,
		reload: make(chan struct{}, 1), changed: make(chan struct{}), state: control.Starting,
	}
	if d.config, err = d.read(); err != nil {
		return err
	}
	if d.config.job.Host != "" {
		d.host = d.config.job.Host
	}
	unlock, err := lock(o.Layout.StateDirectory(o.Job, o.Instance))
	if err != nil {
		return fmt.Errorf("protect %s of job %s: %w", o.Instance, o.Job, err)
	}
	defer unlock()
	if err := os.MkdirAll(o.Layout.RunDirectory(o.Job), 0o755); err != nil {
		return err
	}
	socket := o.Layout.Socket(o.Job, o.Instance)
	l, err := control.Listen(socket)
	if err != nil {
		return err
	}
	d.log.Info("runner started", "job", o.Job, "instance", o.Instance, "socket", socket,
		"data_directory", d.config.instance.DataDirectory, "repository", d.config.job.Repository.URL)

	hangup := make(chan os.Signal, 1)
	signal.Notify(hangup, syscall.SIGHUP)
	defer signal.Stop(hangup)

	// Requests are answered until everything else has ended: PostgreSQL may be waiting for a file that is in flight.
	serveCtx, stopServing := context.WithCancel(context.WithoutCancel(ctx))
	defer stopServing()
	var serving, working sync.WaitGroup
	serving.Go(func() {
		if err := control.Serve(serveCtx, l, d.handle); err != nil {
			d.log.Error("answer requests", "error", err)
		}
	})
	working.Go(func() { d.notify(ctx) })
	working.Go(func() { d.protect(ctx) })
	working.Go(func() {
		for {
			select {
			case <-ctx.Done():
				return
			case <-hangup:
				if err := d.reread(); err != nil {
					d.log.Error("read the job file again: what was declared before stays in force", "error", err)
				}
			}
		}
	})
	<-ctx.Done()
	d.log.Info("runner stops")
	ended := make(chan struct{})
	go func() {
		working.Wait()
		stopServing()
		l.Close()
		serving.Wait()
		close(ended)
	}()
	select {
	case <-ended:
		d.log.Info("runner stopped")
	case <-time.After(2 * grace):
		// The repository is away, mostly. What is left undone there, the next run ends (protection.go, Evict).
		l.Close()
		d.log.Warn("runner stopped before all that went on had ended")
	}
	return nil
}

// read reads the job file and the credentials.
func (d *daemon) read() (config, error) {
	path := d.o.Layout.JobFile(d.o.Job)
	b, err := os.ReadFile(path)
	if err != nil {
		return config{}, fmt.Errorf("job %s: %w", d.o.Job, err)
	}
	var c config
	if c.job, err = job.Parse(b); err != nil {
		return config{}, fmt.Errorf("job file %s: %w", path, err)
	}
	found := false
	for _, i := range c.job.Protected {
		if i.Name == d.o.Instance {
			c.instance, found = i, true
		}
	}
	if !found {
		return config{}, fmt.Errorf("job file %s: instance %s is not among those that it protects", path, d.o.Instance)
	}
	c.credentials, err = job.LoadCredentials(d.o.Layout, d.o.Job)
	return c, err
}

// reread takes over what the job file says now.
func (d *daemon) reread() error {
	c, err := d.read()
	if err != nil {
		return err
	}
	d.mu.Lock()
	old, p := d.config, d.protection
	d.config = c
	d.mu.Unlock()
	switch {
	case p == nil:
	case !old.sameTarget(c):
		p.end(errReopen)
	case !old.sameWAL(c):
		p.reopenSoon()
	}
	select {
	case d.reload <- struct{}{}:
	default:
	}
	if p != nil {
		p.images.reconsider()
	}
	d.log.Info("job file read again")
	return nil
}

func (d *daemon) current() config {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.config
}

// enter notes the state. A problem that is new is logged; p is nil in every state but Running.
func (d *daemon) enter(state control.State, p *protection, problem error) {
	text := ""
	if problem != nil {
		text = problem.Error()
	}
	d.mu.Lock()
	news := state != d.state || text != d.problem
	d.state, d.problem, d.protection = state, text, p
	close(d.changed)
	d.changed = make(chan struct{})
	d.mu.Unlock()
	if !news {
		return
	}
	switch state {
	case control.Running:
		d.log.Info("protecting", "series", p.series.ID().String())
	case control.Refused:
		d.log.Error("REFUSED: nothing is backed up, PostgreSQL keeps its wal", "error", text)
	case control.Waiting:
		d.log.Error("not protecting yet, PostgreSQL keeps its wal", "error", text)
	}
	d.tell()
}

// errReopen is why a protection ends although the runner does not.
var errReopen = errors.New("the runner opens the repository again")

// protect opens a protection, runs it, and opens another, until ctx ends.
func (d *daemon) protect(ctx context.Context) {
	var before *protection
	for wait := reopenFirst; ctx.Err() == nil; {
		c := d.current()
		p, err := d.open(ctx, c, before)
		if err == nil {
			wait = reopenFirst
			d.enter(control.Running, p, nil)
			p.run(ctx)
			if ctx.Err() != nil {
				return // stays in place: Ship tells who still asks that we are stopping
			}
			before = p
			d.enter(control.Starting, nil, nil)
			continue
		}
		if ctx.Err() != nil {
			return
		}
		state, pause := control.Waiting, wait
		if refusal(err) {
			state, pause = control.Refused, askOwnerEvery
		} else {
			wait = min(2*wait, reopenMost)
		}
		d.enter(state, nil, err)
		select {
		case <-ctx.Done():
		case <-d.reload:
			wait = reopenFirst
		case <-time.After(pause):
		}
	}
}

// handle answers one request.
func (d *daemon) handle(ctx context.Context, r control.Request, progress func(string) error) control.Answer {
	switch r.Op {
	case control.OpPush:
		if err := d.push(ctx, r.Path); err != nil {
			a := control.Fail(err)
			a.Again = errors.Is(err, wal.ErrStopped) || ctx.Err() != nil
			return a
		}
		return control.Answer{OK: true}
	case control.OpStatus:
		return control.Answer{OK: true, Status: d.status(ctx)}
	case control.OpImage:
		return d.image(ctx, r.Kind, progress)
	case control.OpReload:
		if err := d.reread(); err != nil {
			return control.Fail(err)
		}
		return control.Answer{OK: true}
	}
	return control.Answer{Error: fmt.Sprintf("this runner knows no operation %q", r.Op)}
}

// push stores one WAL file, through whichever protection there is.
func (d *daemon) push(ctx context.Context, path string) error {
	ctx, cancel := context.WithTimeoutCause(ctx, answerAfter, errors.New("the runner is still opening the repository; PostgreSQL keeps the file"))
	defer cancel()
	for {
		p, err := d.ready(ctx)
		if err != nil {
			return fmt.Errorf("store wal %s: %w", walName(path), err)
		}
		_, err = p.shipper.Ship(ctx, path)
		if err == nil {
			return nil
		}
		if p.looksElsewhere(err) || errors.Is(context.Cause(p.ctx), errReopen) {
			// Another cluster lives in the data directory, or the job file names another repository: the next protection
			// answers.
			p.end(errReopen)
			d.mu.Lock()
			changed, same := d.changed, d.protection == p
			d.mu.Unlock()
			if same {
				select {
				case <-changed:
				case <-ctx.Done():
					return err
				}
			}
			continue
		}
		return err
	}
}

// ready waits for a protection while the runner starts, and says why there is none otherwise.
func (d *daemon) ready(ctx context.Context) (*protection, error) {
	for {
		d.mu.Lock()
		state, problem, p, changed := d.state, d.problem, d.protection, d.changed
		d.mu.Unlock()
		switch {
		case p != nil:
			return p, nil
		case state != control.Starting:
			return nil, fmt.Errorf("%s; PostgreSQL keeps the file", problem)
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		}
	}
}

func (d *daemon) status(ctx context.Context) *control.Status {
	d.mu.Lock()
	c, p := d.config, d.protection
	s := &control.Status{
		Job: d.o.Job, Instance: d.o.Instance, Host: d.host, PID: os.Getpid(), StartedAt: d.startedAt.UTC(),
		Enabled: c.job.Enabled, State: d.state, Problem: d.problem,
		Repository: c.job.Repository.URL, DataDirectory: c.instance.DataDirectory,
	}
	d.mu.Unlock()
	s.ResidentBytes = residentBytes()
	s.WAL.Mode = c.job.WAL.Mode
	s.WAL.Gaps, s.WAL.GapCount = d.knownGaps()
	if p != nil {
		s.SystemIdentifier = p.series.ID().SystemID.String()
		s.WAL = p.walStatus(ctx)
		s.Image = p.images.status()
	}
	return s
}

// limitMemory sets the limit, in bytes, where nobody else has.
func limitMemory(limit int64) {
	if os.Getenv("GOMEMLIMIT") == "" {
		debug.SetMemoryLimit(limit)
	}
}

// residentBytes is the memory of this process (proc(5), statm); 0 where that is not known.
func residentBytes() int64 {
	b, err := os.ReadFile("/proc/self/statm")
	if err != nil {
		return 0
	}
	fields := strings.Fields(string(b))
	if len(fields) < 2 {
		return 0
	}
	pages, err := strconv.ParseInt(fields[1], 10, 64)
	if err != nil {
		return 0
	}
	return pages * int64(os.Getpagesize())
}

// systemID reads which cluster lives in a data directory now.
func systemID(dataDirectory string) (*postgres.Control, error) {
	c, err := postgres.ReadControl(dataDirectory)
	if err != nil {
		return nil, fmt.Errorf("which cluster lives in %s: %w", dataDirectory, err)
	}
	return c, nil
}
