package restore

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	"github.com/pgark/terraform-provider-pgark/internal/engine/postgres"
	"github.com/pgark/terraform-provider-pgark/internal/engine/repository"
	"github.com/pgark/terraform-provider-pgark/internal/engine/wal"
)

// What the server does at its target (recovery_target_action).
const (
	ActionPromote  = "promote" // leave recovery and take writes, on a new timeline
	ActionPause    = "pause"   // wait, for someone to look; pg_wal_replay_resume() promotes
	ActionShutdown = "shutdown"
)

// Options of a restore. Series and DataDirectory have no default.
type Options struct {
	Series        *repository.Series
	DataDirectory string // absolute; absent or empty

	Target       Target
	Timeline     string         // LatestTimeline (default), CurrentTimeline or a number
	Image        repository.SID // default: the newest that precedes the target
	TargetAction string         // default: ActionPromote

	TablespaceMapping map[string]string // old directory → new; default: the old ones
	WALDirectory      string            // default: pg_wal in the data directory
	KeepArchiving     bool              // the copy archives as the original did, into the same series
	Port              int               // default: the image's

	// FetchCommand is the program and the arguments that come before the name and the path in restore_command, one each.
	// It must contain no secrets.
	FetchCommand []string

	Start        bool   // start the server and wait until it has reached the target
	BinDirectory string // of PostgreSQL; default: where the distributions install it

	DryRun   bool // decide and check all there is to decide and check, and touch nothing
	Progress func(Progress)
	Warn     func(string)
}

// Phase is what a restore is busy with.
type Phase string

// The phases, in their order.
const (
	Planning   Phase = "planning"
	Fetching   Phase = "fetching"
	Syncing    Phase = "syncing"
	Recovering Phase = "recovering"
)

// Progress is a moment of a restore.
type Progress struct {
	Phase         Phase
	BytesDone     int64 // of the files, of BytesTotal
	BytesTotal    int64
	BytesRead     int64 // from the repository
	Segment       string
	Segments      int64 // of WAL replayed
	SegmentsTotal int64 // at most
	Elapsed       time.Duration
}

// Result is what a restore has done.
type Result struct {
	Image         string            `json:"image"`
	Target        string            `json:"target"`
	ReachedTime   *time.Time        `json:"reached_time"` // of the last transaction that was replayed; null without --start, or if none was
	ReachedLSN    *postgres.LSN     `json:"reached_lsn"`  // null without --start
	Timeline      postgres.Timeline `json:"timeline"`     // the new one, once promoted
	BytesRead     int64             `json:"bytes_read"`
	Seconds       float64           `json:"seconds"`
	DataDirectory string            `json:"data_directory"`
	State         string            `json:"state"` // "restored", "promoted", "paused", "stopped", or "planned" for a dry run
	Plan          *Plan             `json:"plan,omitempty"`
	Warnings      []string          `json:"warnings,omitempty"`
}

// run is one restore.
type run struct {
	o              *Options
	state          *seriesState
	plan           *Plan
	layout         *layout
	owners         *ownership
	restoreCommand string
	warnings       []string
	walRead        atomic.Int64 // stored bytes of WAL that the fetcher has read
}

func (r *run) warn(format string, args ...any) {
	s := fmt.Sprintf(format, args...)
	r.warnings = append(r.warnings, s)
	if r.o.Warn != nil {
		r.o.Warn(s)
	}
}

func (o *Options) applyDefaults() error {
	if o.TargetAction == "" {
		o.TargetAction = ActionPromote
	}
	if !slices.Contains([]string{ActionPromote, ActionPause, ActionShutdown}, o.TargetAction) {
		return fmt.Errorf("target action %q: expected promote, pause or shutdown", o.TargetAction)
	}
	if o.Port < 0 || o.Port > 65535 {
		return fmt.Errorf("port %d: expected 1 to 65535", o.Port)
	}
	for what, dir := range map[string]*string{"data directory": &o.DataDirectory, "WAL directory": &o.WALDirectory} {
		if *dir == "" && what == "WAL directory" {
			continue
		}
		if !filepath.IsAbs(*dir) {
			return fmt.Errorf("%s %q: expected an absolute path", what, *dir)
		}
		*dir = filepath.Clean(*dir)
	}
	if o.Target.Kind == ToTime {
		o.Target.Time = o.Target.Time.Truncate(time.Microsecond) // PostgreSQL knows no finer time
	}
	if len(o.FetchCommand) == 0 {
		return errors.New("restore: no command given that fetches WAL")
	}
	return o.Target.Validate()
}

// Run restores. When it returns an error before the first file is written (UnreachableError, NotEmptyError,
// NoSpaceError, NoServerError, …) nothing was touched; later, the data directory holds a marker and cannot be started,
// or, once the files are complete, a server that did not reach its target.
func Run(ctx context.Context, o Options) (*Result, error) {
	began := time.Now()
	if err := o.applyDefaults(); err != nil {
		return nil, err
	}
	r := &run{o: &o}
	if o.Progress != nil {
		o.Progress(Progress{Phase: Planning})
	}
	var err error
	if r.state, err = readSeries(ctx, o.Series); err != nil {
		return nil, fmt.Errorf("series %s: %w", o.Series.ID(), err)
	}
	if r.plan, err = r.state.plan(ctx, &o); err != nil {
		return nil, err
	}
	var bin string
	if o.Start {
		if bin, err = findServer(ctx, r.plan.image.PostgresVersion/10000, o.BinDirectory); err != nil {
			return nil, err
		}
		if err := checkPort(ctx, o.Port); err != nil {
			return nil, err
		}
	}
	// The data directory comes first: it is what a person gets wrong, and an image takes a while to open.
	if err := checkEmpty("data directory", o.DataDirectory); err != nil {
		return nil, err
	}
	if !o.DryRun {
		release, err := r.pin(ctx)
		if err != nil {
			return nil, err
		}
		defer release()
	}
	image, err := o.Series.OpenImage(ctx, r.plan.image.SID)
	if err != nil {
		return nil, err
	}
	manifest := image.Manifest()
	if r.layout, err = newLayout(manifest, o.DataDirectory, o.WALDirectory, o.TablespaceMapping); err != nil {
		return nil, err
	}
	if err := r.checkDirectories(); err != nil {
		return nil, err
	}
	all, control, err := r.layout.files()
	if err != nil {
		return nil, err
	}
	if err := checkSpace(all); err != nil {
		return nil, err
	}
	for _, n := range r.layout.notes {
		r.warn("%s", n)
	}
	if r.plan.image.CorruptPages > 0 {
		r.warn("%d pages were damaged in the database when the image was taken, and are restored as they were", r.plan.image.CorruptPages)
	}
	result := &Result{Image: r.plan.Image, Target: r.plan.Target, Timeline: r.plan.Timeline, DataDirectory: o.DataDirectory, State: "planned"}
	if o.DryRun {
		result.Plan, result.Warnings, result.Seconds = r.plan, r.warnings, time.Since(began).Seconds()
		return result, nil
	}
	if r.owners, err = newOwnership(o.DataDirectory, manifest); err != nil {
		return nil, err
	}

	read, err := r.materialise(ctx, image, all, control)
	result.BytesRead, result.State = read, "restored"
	if err != nil {
		return nil, fmt.Errorf("restore image %s into %s: %w", r.plan.Image, o.DataDirectory, err)
	}
	if o.Start {
		reached, err := r.recover(ctx, bin)
		if err != nil {
			return nil, err
		}
		result.BytesRead += r.walRead.Load()
		result.ReachedTime, result.Timeline = reached.time, reached.timeline
		if reached.lsn != 0 {
			result.ReachedLSN = &reached.lsn
		}
		switch {
		case reached.paused:
			result.State = "paused"
		case reached.stopped:
			result.State = "stopped"
		default:
			result.State = "promoted"
		}
	}
	result.Warnings, result.Seconds = r.warnings, time.Since(began).Seconds()
	return result, nil
}

// checkDirectories refuses directories with something in them, all of them at once.
func (r *run) checkDirectories() error {
	var errs []error
	if r.o.WALDirectory != "" {
		errs = append(errs, checkEmpty("WAL directory", r.o.WALDirectory))
	}
	for _, p := range r.layout.places {
		if rel, err := filepath.Rel(r.o.DataDirectory, p.to); err == nil && filepath.IsLocal(rel) {
			continue // within the data directory
		}
		errs = append(errs, checkEmpty(fmt.Sprintf("tablespace %d", p.oid), p.to))
	}
	return errors.Join(errs...)
}

// checkPort refuses a port that something listens on. Whether the image's own is free shows when the server starts.
func checkPort(ctx context.Context, port int) error {
	if port == 0 {
		return nil
	}
	l, err := new(net.ListenConfig).Listen(ctx, "tcp", net.JoinHostPort("127.0.0.1", strconv.Itoa(port)))
	if err != nil {
		return fmt.Errorf("port %d: %w; choose another with --port", port, err)
	}
	return l.Close()
}

// pin keeps retention away from the image. Whoever may only read the repository goes without.
func (r *run) pin(ctx context.Context) (release func(), err error) {
	host, _ := os.Hostname()                     // for people only
	machine, _ := os.ReadFile("/etc/machine-id") // the same
	sid, err := r.o.Series.Begin(ctx, repository.OpenSession{
		Kind: repository.SessionRestore, Parent: r.plan.image.SID, Host: host, MachineID: strings.TrimSpace(string(machine)), StartedAt: time.Now().UTC(),
	})
	var gone *repository.NotLiveError
	switch {
	case errors.As(err, &gone), ctx.Err() != nil:
		return nil, err
	case err != nil:
		r.warn("the image is not protected from retention while it is restored: %v", err)
		return func() {}, nil
	}
	return func() {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 30*time.Second)
		defer cancel()
		if err := r.o.Series.Abort(ctx, sid); err != nil {
			r.warn("the restore's session %s could not be ended: %v", sid, err)
		}
	}, nil
}

// materialise writes everything, makes it durable, and pg_control last. It returns the bytes that it fetched.
func (r *run) materialise(ctx context.Context, image *repository.Image, all []placed, control *placed) (int64, error) {
	data := r.o.DataDirectory
	w := &writer{image: image, owners: r.owners, roots: map[string]*os.Root{}}
	defer w.close()
	for _, p := range all {
		w.total += p.file.Size
	}
	began := time.Now()
	w.report = throttle(100*time.Millisecond, func(done, total, fetched int64) {
		if r.o.Progress != nil {
			r.o.Progress(Progress{Phase: Fetching, BytesDone: done, BytesTotal: total, BytesRead: fetched, Elapsed: time.Since(began)})
		}
	})

	if err := r.owners.makeDirectory(data); err != nil {
		return 0, err
	}
	note, err := json.MarshalIndent(marker{r.o.Series.ID().String(), r.plan.Image, r.plan.Target, began.UTC()}, "", "  ")
	if err != nil {
		return 0, err
	}
	if err := r.writeOwn(markerName, append(note, '\n')); err != nil {
		return 0, err
	}
	for i, dir := range r.layout.roots {
		if dir != "" && r.layout.manifest.Volumes[i].Role == roleTablespace {
			if err := r.owners.makeDirectory(dir); err != nil {
				return 0, err
			}
		}
	}
	if r.o.WALDirectory != "" {
		if err := r.owners.makeDirectory(r.o.WALDirectory); err != nil {
			return 0, err
		}
	} else if r.layout.index(roleWAL) >= 0 {
		if err := r.owners.makeDirectory(filepath.Join(data, walLink)); err != nil {
			return 0, err
		}
	}

	if err := w.write(ctx, all); err != nil {
		return w.bytes.Load(), err
	}
	made, err := w.require(data, r.o.WALDirectory)
	if err != nil {
		return w.bytes.Load(), err
	}
	controlBytes, err := w.content(ctx, control)
	if err != nil {
		return w.bytes.Load(), err
	}
	parsed, err := postgres.ParseControl(controlBytes)
	if err != nil {
		return w.bytes.Load(), fmt.Errorf("%s of the image: %w", controlFile, err)
	}
	if parsed.SystemID != r.o.Series.ID().SystemID {
		return w.bytes.Load(), fmt.Errorf("%s of the image: found system identifier %s, expected %s", controlFile, parsed.SystemID, r.o.Series.ID().SystemID)
	}
	if err := r.writeOwn("backup_label", []byte(r.layout.manifest.BackupLabel)); err != nil {
		return w.bytes.Load(), err
	}
	if m := r.layout.tablespaceMap(); m != "" {
		if err := r.writeOwn("tablespace_map", []byte(m)); err != nil {
			return w.bytes.Load(), err
		}
	}
	r.restoreCommand = r.command()
	if err := r.configure(parsed, slices.ContainsFunc(all, func(p placed) bool { return r.layout.manifest.Volumes[p.file.Volume].Role == roleConfig })); err != nil {
		return w.bytes.Load(), err
	}
	if r.o.Progress != nil {
		r.o.Progress(Progress{Phase: Syncing, BytesDone: w.total, BytesTotal: w.total, BytesRead: w.bytes.Load(), Elapsed: time.Since(began)})
	}
	if err := w.sync(ctx, append(all, made...)); err != nil {
		return w.bytes.Load(), err
	}
	if err := r.owners.replaceFile(filepath.Join(data, filepath.FromSlash(controlFile)), controlBytes); err != nil {
		return w.bytes.Load(), err
	}
	if err := os.Remove(filepath.Join(data, markerName)); err != nil {
		return w.bytes.Load(), err
	}
	return w.bytes.Load(), syncDirectory(data)
}

// content reads a small file whole.
func (w *writer) content(ctx context.Context, p *placed) ([]byte, error) {
	m, err := w.image.FileMap(ctx, p.file)
	if err != nil {
		return nil, fmt.Errorf("read map of %s: %w", p.name, err)
	}
	const most = 1 << 20
	size := int64(m.Blocks) * int64(m.BlockSize)
	if p.file.Size > min(size, most) {
		return nil, fmt.Errorf("%s: found %d bytes, expected at most %d", p.name, p.file.Size, min(size, most))
	}
	out := make([]byte, p.file.Size)
	err = w.image.ReadFrames(ctx, m.Frames, func(f repository.FrameRef, raw []byte) error {
		w.bytes.Add(int64(f.Stored))
		for _, r := range m.Runs {
			if g := m.Frames[r.Frame]; g.Object != f.Object || g.Frame != f.Frame {
				continue
			}
			at, from := int64(r.Start)*int64(m.BlockSize), int64(r.First)*int64(m.BlockSize)
			n := min(int64(r.Count)*int64(m.BlockSize), int64(len(out))-at)
			if n > 0 && from+n > int64(len(raw)) {
				return fmt.Errorf("%s: its frame has %d bytes, expected %d", p.name, len(raw), from+n)
			}
			if n > 0 {
				copy(out[at:at+n], raw[from:])
			}
		}
		return nil
	})
	return out, err
}

// ring is where WAL waits that is fetched ahead: beside where PostgreSQL wants it, so that it is renamed into place.
func (r *run) ring() string {
	dir := r.o.WALDirectory
	if dir == "" {
		dir = filepath.Join(r.o.DataDirectory, walLink)
	}
	return filepath.Join(dir, ".pgark-restore")
}

func (r *run) socket() string { return filepath.Join(r.ring(), "socket") }

// until is the position that WAL must be there up to.
func (r *run) until() postgres.LSN {
	switch p := r.plan; {
	case p.stop == stopAtTarget && p.target.kind() == ToLSN:
		return max(p.image.StopLSN, p.target.LSN)
	case p.stop == stopAtKnownEnd:
		return max(p.image.StopLSN, p.endLSN)
	}
	return r.plan.image.StopLSN
}

// stopsBefore is a position that recovery does not come to, because it has a target before it; 0 if it has none. What is
// missing behind it is then of no concern: whether PostgreSQL has found its target it sees to itself.
func (r *run) stopsBefore() postgres.LSN {
	switch p := r.plan; p.stop {
	case stopConsistency:
		return p.image.StopLSN
	case stopAtKnownEnd:
		return p.endLSN + 1
	case stopAtTarget:
		if p.target.kind() == ToLSN {
			return p.target.LSN + 1
		}
		return p.stretch.end
	case stopAtEnd:
	}
	return 0
}

// command is restore_command. While we wait for a started server we fetch for it, with our credentials and identities;
// afterwards, and without us, the command fetches by itself.
func (r *run) command() string {
	args := slices.Clone(r.o.FetchCommand)
	args = append(args, "--until-lsn="+r.until().String())
	if stop := r.stopsBefore(); stop != 0 {
		args = append(args, "--stop-lsn="+stop.String())
	}
	if r.o.Start {
		args = append(args, "--socket="+r.socket())
	}
	for i, a := range args {
		args[i] = strings.ReplaceAll(shellQuote(a), "%", "%%")
	}
	return strings.Join(args, " ") + ` %f "%p"`
}

func shellQuote(s string) string {
	if s != "" && strings.Trim(s, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789@%+=:,./_-") == "" {
		return s
	}
	return "'" + strings.ReplaceAll(s, "'", `'\''`) + "'"
}

// counted is a series that counts what is read of it.
type counted struct {
	*repository.Series
	read *atomic.Int64
}

// GetWAL counts.
func (c counted) GetWAL(ctx context.Context, name string, w io.Writer) (repository.WALInfo, error) {
	i, err := c.Series.GetWAL(ctx, name, w)
	if err == nil {
		c.read.Add(i.StoredSize)
	}
	return i, err
}

// GetTail counts.
func (c counted) GetTail(ctx context.Context, t repository.Tail, w io.Writer) (repository.WALInfo, error) {
	i, err := c.Series.GetTail(ctx, t, w)
	if err == nil {
		c.read.Add(i.StoredSize)
	}
	return i, err
}

// recover starts the server, serves it WAL, and waits for its target.
func (r *run) recover(ctx context.Context, bin string) (*outcome, error) {
	if err := r.owners.makeDirectory(r.ring()); err != nil {
		return nil, err
	}
	fetcher, err := wal.NewFetcher(wal.FetcherOptions{
		Open: func(context.Context) (wal.Source, error) { return counted{r.o.Series, &r.walRead}, nil },
		Ring: r.ring(), SegmentSize: r.plan.size, Until: r.until(), Stop: r.stopsBefore(),
	})
	if err != nil {
		return nil, err
	}
	serving, stop := context.WithCancel(context.WithoutCancel(ctx))
	served := make(chan error, 1)
	go func() { served <- fetcher.Serve(serving, r.socket()) }()
	defer func() {
		stop()
		if err := <-served; err != nil {
			r.warn("serve WAL: %v", err)
		}
		if err := fetcher.Close(); err != nil {
			r.warn("%v", err)
		}
		_ = os.Remove(r.ring()) // a server that is not promoted may fetch there by itself
	}()
	if err := r.shareSocket(ctx, served); err != nil {
		return nil, err
	}
	for {
		s, err := r.launch(ctx, bin)
		if err != nil {
			return nil, err
		}
		reached, err := r.follow(ctx, s)
		var early *EndedEarlyError
		if errors.As(err, &early) && r.settle(ctx, early) {
			continue
		}
		if err != nil {
			return nil, err
		}
		if !reached.paused && !reached.stopped {
			if err := r.takeOutRecovery(); err != nil {
				r.warn("the recovery settings stay in postgresql.auto.conf: %v", err)
			}
		}
		return reached, nil
	}
}

// shareSocket waits for the fetcher's socket and lets the server's owner use it.
func (r *run) shareSocket(ctx context.Context, served chan error) error {
	for {
		_, err := os.Lstat(r.socket())
		if err == nil {
			break
		}
		select {
		case err := <-served:
			served <- err
			return fmt.Errorf("serve WAL: %w", err)
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-time.After(2 * time.Millisecond):
		}
	}
	if !r.owners.root {
		return nil
	}
	return os.Chown(r.socket(), r.owners.data.uid, r.owners.data.gid)
}

// settle deals with a time that PostgreSQL has not found: it stops at the first commit or abort after it, and takes it
// for an error if none comes. The archive may show by other records (a restore point) that the time had passed, so
// that everything of before it is there: then the known end of the archive is the target.
func (r *run) settle(ctx context.Context, early *EndedEarlyError) bool {
	p := r.plan
	if p.stop != stopAtTarget || p.target.kind() != ToTime || early.Time.After(p.target.Time) {
		return false
	}
	last, err := r.state.lastTime(ctx, p.route, p.stretch)
	if err != nil || last == nil || last.Before(p.target.Time) {
		return false
	}
	if err := r.state.resolveEnd(ctx, p); err != nil || p.stop == stopAtTarget {
		return false
	}
	return r.writeRecovery() == nil
}
