// Package image takes image backups: it copies the volumes that hold a running PostgreSQL instance into a series of a
// repository, so that together with WAL they can be restored.
//
// Take is the whole of it. One image goes through these steps:
//
//  1. Choose the parent: the newest live image whose state this guest still has. None: the image is full. Begin pins it.
//  2. Backup start, on a connection that is held until backup stop.
//  3. List the files (scan.go), then let workers copy them (copy.go). A file whose identity in stat is the parent's, and
//     that was quiet before the parent began, is not read. Any other is read, and each of its blocks compared with the
//     parent's keyed hash; only blocks that differ are stored. Every map is complete: no image needs its parent once it
//     is committed.
//  4. pg_control, after everything else. Backup stop.
//  5. Wait until the WAL between start and stop is durable in the repository. Without it the image is worth nothing.
//  6. Manifest and refs, the local state made durable, and only then the commit.
//
// Whatever fails before the commit leaves no image: the session is aborted and the state removed. The package neither
// ships WAL, nor restores, nor decides when to take an image, nor collects what failed ones left behind.
//
// The local state (state.go) is the authority on what changed. It is self-checked; when it is lost, damaged, or of an
// image that is not live, the next image is full. Signs that stat cannot be trusted (the clock went back, the timeline
// changed, LSNs went back, page checksums were switched) make Take read every file, which costs time and no correctness.
//
// Memory: for each worker, 1.3 MiB and the hashes and maps of the file in hand (2 MiB for a segment of 1 GiB); what the
// image writer holds; the list of files with their maps of up to 64 frames; an index of the parent's state.
package image

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"sync"
	"time"

	"github.com/jackc/pgx/v5"
	"golang.org/x/sys/unix"

	"github.com/pgark/terraform-provider-pgark/internal/engine/job"
	"github.com/pgark/terraform-provider-pgark/internal/engine/postgres"
	"github.com/pgark/terraform-provider-pgark/internal/engine/repository"
)

// Kinds of images (repository.ImageInfo.Kind).
const (
	Full        = "full"
	Incremental = "incremental"
)

// Options of Take. Series, Instance and StateDirectory are required.
type Options struct {
	Series         *repository.Series
	Instance       job.Instance
	Plan           job.Image
	StateDirectory string // job.Layout.StateDirectory
	Host           string // as declared: what the repository calls the guest
	MachineID      string
	ForceFull      bool // store everything, whatever the parent holds

	// WaitWAL returns once every segment that holds a byte of [from, to) is durable in the repository. nil: ask the
	// repository's listing until it shows them.
	WaitWAL func(ctx context.Context, t postgres.Timeline, from, to postgres.LSN) error

	// WALTimeout bounds the wait. 0: 15 minutes.
	WALTimeout time.Duration

	// Progress is called at most four times a second, and at the begin of each phase, from one goroutine at a time. The
	// last call has the phase Done, and comes only if the image was committed.
	Progress func(Progress)

	Log *slog.Logger // nil: discard

	aliveEvery time.Duration // tests; 0: 10 s
}

func (o *Options) applyDefaults() {
	if o.WALTimeout == 0 {
		o.WALTimeout = 15 * time.Minute
	}
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	if o.Progress == nil {
		o.Progress = func(Progress) {}
	}
	if o.Plan.Parallelism <= 0 {
		o.Plan.Parallelism = runtime.GOMAXPROCS(0)
	}
	if o.aliveEvery == 0 {
		// A backup whose connection broke is lost; there is no point in copying on for hours.
		o.aliveEvery = 10 * time.Second
	}
}

// BusyError says that another process is taking an image of the instance.
type BusyError struct{ Instance string }

func (e *BusyError) Error() string {
	return fmt.Sprintf("take an image of %s: another one is being taken", e.Instance)
}

const (
	// stopTimeout bounds backup stop, which writes little and waits for nothing.
	stopTimeout = time.Minute
	// finalTimeout bounds what must happen although the caller has gone: commit or abort, and the session record.
	finalTimeout = 2 * time.Minute
)

// Take takes an image and returns once it is committed. When it fails, or ctx ends, the server is out of backup mode
// and the series has no trace of the image but a session record and objects for the next collection; if even the abort
// does not reach the repository, its session stays open until it is evicted.
//
// An instance that does not run is an error that postgres.IsNotRunning recognises, WAL that does not arrive a
// *MissingWALError, a second image at the same time a *BusyError.
func Take(ctx context.Context, o Options) (repository.ImageInfo, error) {
	o.applyDefaults()
	t := &taking{o: o, log: o.Log, began: time.Now(), phase: Starting}
	err := t.run(ctx)
	if err != nil {
		err = fmt.Errorf("image of %s: %w", o.Series.ID(), err)
	}
	t.record(ctx, err)
	if err != nil {
		return repository.ImageInfo{}, err
	}
	t.report(Done)
	return t.info, nil
}

// taking is one image on its way.
type taking struct {
	o     Options
	log   *slog.Logger
	began time.Time
	info  repository.ImageInfo
	c     copier

	parent   *state // nil: full
	writer   *repository.ImageWriter
	state    *stateWriter
	control  *postgres.Control
	major    int
	server   settings
	warnings int64

	mu         sync.Mutex // guards what follows
	phase      Phase
	copying    time.Time // when Copying began
	copied     time.Duration
	totalFiles int64
	totalBytes int64
}

// run takes the image and commits it, or undoes what it did.
func (t *taking) run(ctx context.Context) (err error) {
	unlock, err := t.lock()
	if err != nil {
		return err
	}
	defer unlock()
	t.report(Starting)
	conn, err := postgres.Connect(ctx, postgres.ConnectOptions{
		SocketDirectory: t.o.Instance.SocketDirectory, Port: t.o.Instance.Port, User: t.o.Instance.DatabaseUser, Owner: t.o.Instance.Owner,
	})
	if err != nil {
		return err
	}
	defer closeConnection(conn)
	if err := t.inspect(ctx, conn); err != nil {
		return err
	}
	if err := t.begin(ctx); err != nil {
		return err
	}
	if t.parent != nil {
		defer func() { _ = t.parent.close() }() // only read
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, t.undo(ctx))
		}
	}()
	inventory, stop, err := t.capture(ctx, conn)
	if postgres.IsNotRunning(err) {
		// The server did answer: a file that is missing must not be taken for that.
		return errors.New(err.Error())
	}
	if err != nil {
		return err
	}
	t.report(Awaiting)
	if err := t.awaitWAL(ctx, conn, stop); err != nil {
		return err
	}
	closeConnection(conn)
	t.report(Committing)
	return t.commit(ctx, inventory, stop)
}

// lock keeps a second process from taking an image with the same state: the runner and a command, say.
func (t *taking) lock() (unlock func(), err error) {
	name := filepath.Join(t.o.StateDirectory, stateDirectory)
	if err := makeStateDirectory(t.o.StateDirectory); err != nil {
		return nil, err
	}
	d, err := os.Open(name)
	if err != nil {
		return nil, err
	}
	if err := unix.Flock(int(d.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		_ = d.Close()
		if err == unix.EWOULDBLOCK {
			return nil, &BusyError{t.o.Instance.Name}
		}
		return nil, fmt.Errorf("lock %s: %w", name, err)
	}
	return func() { _ = d.Close() }, nil // releases the lock, too
}

// settings is what the server says of itself.
type settings struct {
	version       int
	dataDirectory string
	configFiles   []string
}

// inspect asks the server what it is and checks that it is the instance that the series belongs to.
func (t *taking) inspect(ctx context.Context, conn *pgx.Conn) error {
	t.server.dataDirectory = t.o.Instance.DataDirectory
	// Without the right to see a setting it has no row: the job's own data directory stands in then.
	rows, err := conn.Query(ctx, `
		select name, setting from pg_catalog.pg_settings
			where name in ('server_version_num', 'data_directory', 'config_file', 'hba_file', 'ident_file') and setting <> ''
		union
		select 'sourcefile', sourcefile from pg_catalog.pg_settings where sourcefile is not null
		order by 1, 2`)
	if err != nil {
		return fmt.Errorf("read settings: %w", err)
	}
	var name, value string
	_, err = pgx.ForEachRow(rows, []any{&name, &value}, func() error {
		switch name {
		case "server_version_num":
			_, err := fmt.Sscan(value, &t.server.version)
			return err
		case "data_directory":
			t.server.dataDirectory = value
		default:
			t.server.configFiles = append(t.server.configFiles, value)
		}
		return nil
	})
	if err != nil {
		return fmt.Errorf("read settings: %w", err)
	}
	t.major = t.server.version / 10000
	return t.readControl()
}

func (t *taking) readControl() error {
	control, err := postgres.ReadControl(t.server.dataDirectory)
	if err != nil {
		return err
	}
	if err := control.CheckBuild(); err != nil {
		return err
	}
	if want := t.o.Series.ID().SystemID; control.SystemID != want {
		return fmt.Errorf("data directory %s: found system identifier %s, expected %s: the cluster was initialised anew, or another one runs on port %d",
			t.server.dataDirectory, control.SystemID, want, t.o.Instance.Port)
	}
	t.control = control
	return nil
}

// begin chooses a parent and opens the session.
func (t *taking) begin(ctx context.Context) error {
	const attempts = 3 // a parent can expire between our look at the head and Begin
	for attempt := 1; ; attempt++ {
		var parent repository.SID
		if !t.o.ForceFull {
			if err := t.findParent(ctx); err != nil {
				return err
			}
			if t.parent != nil {
				parent = t.parent.header.SID
			}
		}
		sid, err := t.o.Series.Begin(ctx, repository.OpenSession{
			Kind: repository.SessionImage, Parent: parent, Host: t.o.Host, MachineID: t.o.MachineID, StartedAt: t.began,
		})
		if err == nil {
			t.info = repository.ImageInfo{SID: sid, Parent: parent, Kind: Full, Capture: "live"}
			if parent != 0 {
				t.info.Kind = Incremental
			}
			return nil
		}
		if t.parent != nil {
			_ = t.parent.close() // only read
			t.parent = nil
		}
		if _, notLive := errors.AsType[*repository.NotLiveError](err); !notLive || attempt == attempts {
			return err
		}
	}
}

// findParent opens the state of the newest live image that has one.
func (t *taking) findParent(ctx context.Context) error {
	head, err := t.o.Series.Head(ctx)
	if err != nil {
		return err
	}
	for i := len(head.Images) - 1; i >= 0; i-- {
		sid := head.Images[i].SID
		s, err := openState(t.o.StateDirectory, t.o.Series.ID().String(), sid)
		switch {
		case err == nil:
			t.parent = s
			return nil
		case errors.Is(err, fs.ErrNotExist):
		default:
			t.log.Warn("an image's local state is of no use: it cannot be the parent", "image", sid.String(), "error", err)
		}
	}
	if len(head.Images) > 0 {
		t.log.Info("no local state of any live image: storing everything anew")
	}
	return nil
}

// capture brings the instance's files into the image, between backup start and backup stop.
func (t *taking) capture(ctx context.Context, conn *pgx.Conn) (_ *inventory, _ postgres.StopResult, err error) {
	clock := time.Now()
	backup, err := postgres.StartBackup(ctx, conn, fmt.Sprintf("pgark %s image %s", t.o.Series.ID(), t.info.SID))
	if err != nil {
		return nil, postgres.StopResult{}, err
	}
	stopped := false
	defer func() {
		if !stopped {
			// In order, rather than by dropping the connection, so that the server does not log a lost backup. The files
			// are worth nothing any more; so is what it returns.
			ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), stopTimeout)
			defer cancel()
			_, _ = backup.Stop(ctx)
		}
	}()
	t.info.StartedAt, t.info.StartLSN, t.info.Timeline = backup.StartTime, backup.StartLSN, backup.StartTimeline
	if err := t.readControl(); err != nil { // as of the checkpoint
		return nil, postgres.StopResult{}, err
	}
	if err := t.open(ctx, clock); err != nil {
		return nil, postgres.StopResult{}, err
	}

	guarded, release := t.guard(ctx, backup)
	inventory, err := t.copyVolumes(guarded)
	if lost := release(); lost != nil {
		err = lost // what the copy says follows from it
	}
	if err != nil {
		return nil, postgres.StopResult{}, err
	}
	t.report(Stopping)
	if err := t.copyControl(ctx, inventory); err != nil {
		return nil, postgres.StopResult{}, err
	}
	stopped = true
	stopCtx, cancel := context.WithTimeout(context.WithoutCancel(ctx), stopTimeout)
	defer cancel()
	stop, err := backup.Stop(stopCtx)
	if err != nil {
		return nil, postgres.StopResult{}, err
	}
	t.info.StopLSN, t.info.CompletedAt = stop.StopLSN, stop.StopTime
	t.c.judgeExcused(stop.StopLSN)
	return inventory, stop, nil
}

// guard ends the context that it returns once the backup is lost. release stops that, waits for it, and says why the
// context ended.
func (t *taking) guard(ctx context.Context, backup *postgres.Backup) (guarded context.Context, release func() error) {
	guarded, cancel := context.WithCancelCause(ctx)
	stop := make(chan struct{}) // Closed by release.
	var lost error
	var wg sync.WaitGroup
	wg.Go(func() {
		tick := time.NewTicker(t.o.aliveEvery)
		defer tick.Stop()
		for {
			select {
			case <-stop:
				return
			case <-tick.C:
			}
			// A context that ends while the server is asked would end the connection: it is the limit only.
			ask, done := context.WithTimeout(context.WithoutCancel(ctx), 30*time.Second)
			lost = backup.Alive(ask)
			done()
			if lost != nil {
				cancel(lost)
				return
			}
		}
	})
	return guarded, func() error {
		close(stop)
		wg.Wait()
		cancel(nil)
		return lost
	}
}

// open prepares the image's writer and state.
func (t *taking) open(ctx context.Context, clock time.Time) (err error) {
	t.writer, err = t.o.Series.NewImageWriter(ctx, t.info.SID, t.info.Parent, repository.WriterOptions{
		Compression: t.o.Plan.Compression, MaxRate: t.o.Plan.MaxRate,
	})
	if err != nil {
		return err
	}
	h := stateHeader{
		Series: t.o.Series.ID().String(), SID: t.info.SID, Start: clock, SystemID: t.control.SystemID,
		PostgresVersion: t.server.version, Timeline: t.info.Timeline, StartLSN: t.info.StartLSN,
		DataChecksums: t.control.DataChecksumVersion, DataDirectory: t.server.dataDirectory,
	}
	if t.parent != nil {
		h.HashKey = t.parent.header.HashKey
	} else {
		h.HashKey = make([]byte, 32)
		_, _ = rand.Read(h.HashKey) // never fails (crypto/rand)
	}
	if t.state, err = createState(t.o.StateDirectory, h); err != nil {
		return err
	}
	t.c.store, t.c.state, t.c.parent, t.c.hashKey, t.c.log = t.writer, t.state, t.parent, h.HashKey, t.log
	t.c.checksums, t.c.startLSN = t.control.DataChecksums(), t.info.StartLSN
	if t.parent != nil {
		if why := anomaly(&t.parent.header, &h); why != "" {
			t.log.Info("reading every file: "+why, "parent", t.parent.header.SID.String())
		} else {
			t.c.quiet = t.parent.header.Start.Add(-quietPeriod).UnixNano()
		}
	}
	return nil
}

// anomaly says why what stat tells must not be compared with what it told at the parent's time; "" if nothing speaks
// against it. Hashes stay good in any case: they are of contents.
func anomaly(parent, now *stateHeader) string {
	switch {
	case now.Start.Before(parent.Start):
		return fmt.Sprintf("the clock went back, from %s to %s", parent.Start.Format(time.RFC3339), now.Start.Format(time.RFC3339))
	case now.SystemID != parent.SystemID:
		return fmt.Sprintf("the system identifier changed from %s to %s", parent.SystemID, now.SystemID)
	case now.Timeline != parent.Timeline:
		// A promoted or rewound server may have had its files replaced by tools that keep times.
		return fmt.Sprintf("the timeline changed from %d to %d", parent.Timeline, now.Timeline)
	case now.StartLSN < parent.StartLSN:
		return fmt.Sprintf("WAL went back, from %s to %s", parent.StartLSN, now.StartLSN)
	case now.DataChecksums != parent.DataChecksums:
		return "page checksums were switched"
	case now.PostgresVersion/10000 != parent.PostgresVersion/10000:
		return fmt.Sprintf("PostgreSQL changed from %d to %d", parent.PostgresVersion, now.PostgresVersion)
	case now.DataDirectory != parent.DataDirectory:
		return fmt.Sprintf("the data directory moved from %s to %s", parent.DataDirectory, now.DataDirectory)
	}
	return ""
}

// copyVolumes lists and copies everything but pg_control.
func (t *taking) copyVolumes(ctx context.Context) (*inventory, error) {
	t.report(Scanning)
	inventory, err := scan(ctx, t.server.dataDirectory, t.major, t.control, t.server.configFiles, t.log)
	if err != nil {
		return nil, err
	}
	t.warnings += int64(inventory.skipped)
	t.mu.Lock()
	for _, e := range inventory.entries {
		if e.file.Type == repository.RegularFile {
			t.totalFiles++
			t.totalBytes += e.file.Size
		}
	}
	t.copying = time.Now()
	t.mu.Unlock()
	t.report(Copying)

	stop := make(chan struct{}) // Closed when the copy is done.
	var wg sync.WaitGroup
	wg.Go(func() {
		tick := time.NewTicker(250 * time.Millisecond)
		defer tick.Stop()
		for {
			select {
			case <-stop:
				return
			case <-tick.C:
				t.report(Copying)
			}
		}
	})
	err = t.c.copyAll(ctx, inventory.entries, t.o.Plan.Parallelism)
	close(stop)
	wg.Wait()
	t.mu.Lock()
	t.copied = time.Since(t.copying)
	t.mu.Unlock()
	if err != nil && ctx.Err() != nil {
		err = context.Cause(ctx)
	}
	return inventory, err
}

// copyControl copies pg_control, verified. Recovery begins from what it says, so it must not be older than any page.
func (t *taking) copyControl(ctx context.Context, inventory *inventory) error {
	_, content, err := postgres.ReadControlFile(t.server.dataDirectory)
	if err != nil {
		return err
	}
	full := filepath.Join(t.server.dataDirectory, postgres.ControlFile)
	var st unix.Stat_t
	if err := unix.Lstat(full, &st); err != nil {
		return &fs.PathError{Op: "stat", Path: full, Err: err}
	}
	s := &scanner{inventory: *inventory, owners: make(map[uint32]string), groups: make(map[uint32]string)}
	e := s.add(0, postgres.ControlFile, full, &st)
	inventory.entries = s.entries
	// Without an identity the next image reads it again, as it must.
	return t.c.storeBytes(ctx, e, content, fileIdentity{})
}

// commit makes the image's last objects and the local state durable, and then the image live.
func (t *taking) commit(ctx context.Context, inventory *inventory, stop postgres.StopResult) error {
	m := &repository.Manifest{
		SID: t.info.SID, SystemID: t.control.SystemID, PostgresVersion: t.server.version, DataChecksums: t.control.DataChecksums(),
		BackupLabel: stop.Label, TablespaceMap: stop.TablespaceMap, DataDirectory: t.server.dataDirectory, Host: t.o.Host,
	}
	for i := range inventory.volumes {
		m.Volumes = append(m.Volumes, inventory.volumes[i].Volume)
	}
	m.Files = make([]repository.File, 0, len(inventory.entries))
	for _, e := range inventory.entries {
		if e.gone {
			continue
		}
		m.Files = append(m.Files, e.file)
		t.info.SourceBytes += e.file.Size
		t.info.CorruptPages += int64(len(e.file.Corrupt))
	}
	t.info.PostgresVersion, t.info.SegmentSize = t.server.version, uint64(t.control.WALSegmentSize)
	t.info.ReadBytes = t.c.read.Load()
	var err error
	if t.info.ManifestDigest, t.info.RefsDigest, err = t.writer.Finish(ctx, m); err != nil {
		return err
	}
	t.info.StoredBytes = t.writer.StoredBytes()
	_ = t.writer.Close() // everything is durable
	// Before the commit: a live image whose state is torn would be found out, one whose state is of an older run of the
	// same number would not.
	if err := t.state.finish(); err != nil {
		return err
	}
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	// The point of no return: giving up half way would leave nobody knowing whether the image is live.
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), finalTimeout)
	defer cancel()
	if err := t.o.Series.Commit(ctx, t.info); err != nil {
		return err
	}
	t.prune(ctx)
	return nil
}

// prune removes states that can be no parent's any more. They only take room, so a failure is no error.
func (t *taking) prune(ctx context.Context) {
	head, err := t.o.Series.Head(ctx)
	if err == nil {
		// The newest is the next parent, unless it expires first: then the one before it serves. Each takes two bytes a
		// thousand of the data, so there are no more.
		parentLives := slices.ContainsFunc(head.Images, func(i repository.ImageInfo) bool { return i.SID == t.info.Parent })
		err = pruneStates(t.o.StateDirectory, func(sid repository.SID) bool {
			return sid == t.info.SID || sid == t.info.Parent && parentLives
		})
	}
	if err != nil {
		t.log.Warn("remove the local state of images that are gone", "error", err)
	}
}

// undo ends the session of an image that failed.
func (t *taking) undo(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), finalTimeout)
	defer cancel()
	var errs []error
	if t.writer != nil {
		_ = t.writer.Close() // it failed, or is not needed
	}
	if t.state != nil {
		errs = append(errs, t.state.discard())
	}
	if err := t.o.Series.Abort(ctx, t.info.SID); err != nil {
		errs = append(errs, fmt.Errorf("abort session %s: %w", t.info.SID, err))
	}
	return errors.Join(errs...)
}

// record stores the account of the session. An image does not fail because its account cannot be kept.
func (t *taking) record(ctx context.Context, failure error) {
	if failure != nil && t.info.SID == 0 && (postgres.IsNotRunning(failure) || ctx.Err() != nil) {
		return // nothing was begun; whoever waits for a server asks again and again
	}
	if _, busy := errors.AsType[*BusyError](failure); busy {
		return
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), finalTimeout)
	defer cancel()
	r := repository.SessionRecord{
		Kind: "image", Result: "success", StartedAt: t.began, CompletedAt: time.Now(), Host: t.o.Host, SID: t.info.SID,
		SourceBytes: t.info.SourceBytes, ReadBytes: t.c.read.Load(), StoredBytes: t.info.StoredBytes,
	}
	switch {
	case failure != nil:
		r.Result, r.Error = "error", failure.Error()
		if t.writer != nil {
			r.StoredBytes = t.writer.StoredBytes()
		}
	case t.info.CorruptPages > 0 || t.warnings+t.c.warnings.Load() > 0:
		r.Result = "warning"
	}
	if err := t.o.Series.PutSession(ctx, r); err != nil {
		t.log.Warn("keep the account of the image's session", "error", err)
	}
}

// report tells Progress where things are.
func (t *taking) report(phase Phase) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.phase = phase
	p := Progress{
		Phase: phase, SID: t.info.SID, Kind: t.info.Kind, Elapsed: time.Since(t.began), Copied: t.copied,
		FilesDone: t.c.files.Load(), FilesTotal: t.totalFiles, BytesDone: t.c.bytes.Load(), BytesTotal: t.totalBytes,
		ReadBytes: t.c.read.Load(), ChangedBytes: t.c.changed.Load(),
	}
	if phase == Copying {
		p.Copied = time.Since(t.copying)
	}
	if t.writer != nil {
		p.StoredBytes = t.writer.StoredBytes()
	}
	t.o.Progress(p)
}

func closeConnection(conn *pgx.Conn) {
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Second)
	defer cancel()
	_ = conn.Close(ctx) // nothing depends on it
}
