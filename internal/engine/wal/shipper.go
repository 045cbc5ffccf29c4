package wal

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"iter"
	"log/slog"
	"os"
	"path/filepath"
	"runtime"
	"sync"
	"syscall"
	"time"

	"github.com/pgark/terraform-provider-pgark/internal/engine/daemon/control"
	"github.com/pgark/terraform-provider-pgark/internal/engine/postgres"
	"github.com/pgark/terraform-provider-pgark/internal/engine/repository"
)

// Archive is what a Shipper needs of a series.
type Archive interface {
	ID() repository.SeriesID
	SealWAL(ctx context.Context, info repository.WALInfo, raw io.ReaderAt, effort repository.Effort) (*repository.SealedWAL, error)
	PutSealed(ctx context.Context, w *repository.SealedWAL) (stored bool, storedSize int64, err error)
	ReadSealed(name string, body io.ReadSeekCloser) (*repository.SealedWAL, error)
	ListWAL(ctx context.Context, t postgres.Timeline, from string) iter.Seq2[repository.WALEntry, error]
	StatWAL(ctx context.Context, name string) (repository.WALInfo, error)
	Head(ctx context.Context) (*repository.Head, error)
	PutSession(ctx context.Context, r repository.SessionRecord) error
}

var _ Archive = (*repository.Series)(nil)

// Options of a Shipper. The first four have no default.
type Options struct {
	Series        Archive
	DataDirectory string
	SystemID      postgres.SystemID
	SegmentSize   postgres.SegmentSize

	Repository string // its URL, for messages
	Host       string // who ships, for the record

	// Parallelism is how many files are read, checked and compressed at one time; default: the number of CPUs, at most 8.
	// How many are uploaded at one time follows from what that brings. Memory: memoryBudget, or one file if that is more.
	Parallelism int
	Adaptive    bool          // compress less while there is a backlog: a third of the CPU, up to twice the bytes
	AnswerAfter time.Duration // a request is answered no when its file is not durable by then; default 30 s
	Grace       time.Duration // what is in flight when Run ends may take as long; default 10 s
	MaxLag      time.Duration // a repository that takes longer for a request is said to be slow; 0: none is

	// SpoolDirectory is where files are kept while the repository is away, in a directory for the cluster; "": nowhere,
	// PostgreSQL keeps them. SpoolLimit is what they may take, in bytes; 0: all that the file system has but a reserve.
	SpoolDirectory string
	SpoolLimit     int64

	Stored    func(Receipt)        // called once a file is durable in the repository, maybe found there; it must not block
	Gap       func(control.WALGap) // called once for each gap; it must not block
	Streaming func() bool          // tells whether WAL is durable within MaxLag, before its segments are whole; nil: never
	Log       *slog.Logger         // default: none
}

func (o *Options) applyDefaults() {
	if o.Parallelism == 0 {
		// More would only wait for one another.
		o.Parallelism = min(runtime.GOMAXPROCS(0), 8)
	}
	if o.AnswerAfter == 0 {
		// PostgreSQL gives up three times a second apart, then waits for a minute: long enough to ride out a hiccup, short
		// enough that a server being stopped is not held up for long.
		o.AnswerAfter = 30 * time.Second
	}
	if o.Grace == 0 {
		o.Grace = 10 * time.Second
	}
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
}

const (
	// settle is more than a tick of any file system's clock (10 ms at HZ=100): a file that was quiet for as long before
	// we began to read has other times if it changed since.
	settle = 50 * time.Millisecond

	// keepBuffers is how long the buffers of files are kept with nothing to ship.
	keepBuffers = 30 * time.Second

	// A file that failed by itself is tried again after a while.
	backoffFirst = time.Second
	backoffMost  = 15 * time.Second

	// awayAnswer replaces AnswerAfter while the repository takes nothing and nothing else does: holding PostgreSQL any
	// longer would not make the file arrive.
	awayAnswer = 5 * time.Second

	// spoolRetry is how long a temporary folder that took no more is left alone.
	spoolRetry = 5 * time.Second

	// With more files waiting, they are compressed hastily; with fewer, thoroughly again.
	hastyFrom = 32
	hastyTo   = 8

	// checkGapsEvery bounds how often the order of what was stored is looked at.
	checkGapsEvery = 100 * time.Millisecond

	// rememberGaps is how many are shown.
	rememberGaps = 100
)

// Shipper ships one instance's WAL. Safe for concurrent use.
type Shipper struct {
	o        Options
	walDir   string
	spool    *Spool // nil: none
	watcher  *watcher
	gate     *gate
	wake     chan struct{} // capacity 1: something for Run to look at
	wakeGaps chan struct{} // capacity 1: something for the watcher to look at
	ended    chan struct{} // Closed when Run returns.

	mu      sync.Mutex // guards what follows; nothing is called under it that blocks, and no lock but those of spool and gate taken
	files   map[string]*file
	queue   queue
	done    []string      // names of stored files, oldest first
	changed chan struct{} // closed and replaced whenever a file ends
	counts  counts
	session counts // the same since the last session record
	began   time.Time
	gaps    []control.WALGap

	scanned  time.Time
	scanWait time.Duration // before the next scan that somebody wants
	rescan   bool          // somebody wants one
	blind    bool          // the latest one failed

	health    health
	condition condition
	conflicts map[string]error // by name: what is kept from being stored by other content
	conflict  error            // the latest of them

	spoolErr  error     // why the temporary folder took no more, at the latest attempt
	spoolWait time.Time // no attempt before

	hasty     bool
	shipping  int   // files in flight: preparing and behind
	preparing int   // of them, those being read, checked and compressed
	memory    int64 // that they hold
	probing   bool  // one of the uploads in flight is to find out whether the repository is back
	draining  map[string]bool
	stuck     map[string]bool // in the temporary folder, and not to be tried again by this Run
	sealed    int64           // bytes that the latest file was sealed to
	buffers   [][]byte
	worked    time.Time
}

// file is a WAL file in the Shipper's mind.
type file struct {
	name     string
	state    fileState
	asked    int       // requests that wait for it now
	urgent   bool      // one of them is new
	passed   bool      // Completed: it is to be shipped though PostgreSQL may never ask for it
	attempts int       // failed ones in a row
	notUntil time.Time // no attempt before

	in    *fileHeap // of the queue; nil: it does not wait
	place int       // in it

	// Of the latest attempt that read the file:
	identity identity
	readAt   time.Time // when reading began
	settled  bool      // the file had been quiet before: identity vouches for its content
	receipt  Receipt
	err      error
}

type fileState int

const (
	fileWaiting  fileState = iota // to be shipped; err says why not yet
	fileInFlight                  // a goroutine has it
	fileSpooled                   // durable in the temporary folder, as identity says
	fileStored                    // durable in the repository, as identity says
	fileRefused                   // err will not pass as long as the file is what it is
)

// identity tells whether a file is still the one that was read.
type identity struct {
	device, inode uint64
	size          int64
	modified      time.Time
	changed       time.Time
}

func identify(info fs.FileInfo) identity {
	id := identity{size: info.Size(), modified: info.ModTime()}
	if st, ok := info.Sys().(*syscall.Stat_t); ok {
		id.device, id.inode = st.Dev, st.Ino
		// Renaming and linking change it too. That costs at most one more reading.
		id.changed = time.Unix(st.Ctim.Unix())
	}
	return id
}

// Receipt says what became of a file.
type Receipt struct {
	Name       string
	Size       int64
	StoredSize int64 // of the object, in the repository
	Stored     bool  // false: it was there already, with the same content
	Spooled    bool  // it is in the temporary folder, and not in the repository yet
	At         time.Time
}

// New prepares a Shipper; Run makes it work. A temporary folder that cannot be used is logged, and done without.
func New(o Options) (*Shipper, error) {
	o.applyDefaults()
	switch {
	case o.Series == nil:
		return nil, errors.New("wal shipper: no series given")
	case !filepath.IsAbs(o.DataDirectory):
		return nil, fmt.Errorf("wal shipper: data directory %q: expected an absolute path", o.DataDirectory)
	case o.SystemID == 0:
		return nil, errors.New("wal shipper: no system identifier given")
	case !o.SegmentSize.Valid():
		return nil, fmt.Errorf("wal shipper: segment size %d: expected a power of two from 1 MiB to 1 GiB", uint64(o.SegmentSize))
	case o.SpoolDirectory != "" && !filepath.IsAbs(o.SpoolDirectory):
		return nil, fmt.Errorf("wal shipper: temporary folder %q: expected an absolute path", o.SpoolDirectory)
	}
	now := time.Now()
	s := &Shipper{
		o:         o,
		walDir:    filepath.Join(o.DataDirectory, "pg_wal"),
		gate:      newGate(),
		wake:      make(chan struct{}, 1),
		wakeGaps:  make(chan struct{}, 1),
		ended:     make(chan struct{}),
		files:     make(map[string]*file),
		queue:     newQueue(),
		changed:   make(chan struct{}),
		began:     now,
		health:    health{maxLag: o.MaxLag, state: control.StoreReachable},
		condition: condition{store: control.StoreReachable, wal: control.WALArchiving, since: now, storeSince: now},
		conflicts: make(map[string]error),
		draining:  make(map[string]bool),
		stuck:     make(map[string]bool),
	}
	s.watcher = &watcher{archive: o.Series, walDir: s.walDir, size: o.SegmentSize, host: o.Host, held: s.held, alarm: s.alarm,
		ship: func(name string) { s.Completed(postgres.SegmentName(name)) }}
	if o.SpoolDirectory != "" {
		s.openSpool()
	}
	return s, nil
}

// openSpool opens the cluster's part of the temporary folder: what an earlier cluster left there belongs to another
// series.
func (s *Shipper) openSpool() {
	dir := filepath.Join(s.o.SpoolDirectory, s.o.SystemID.String())
	spool, err := OpenSpool(dir, s.o.SpoolLimit)
	if err != nil {
		s.spoolErr = err
		s.o.Log.Error("the temporary folder cannot be used: PostgreSQL keeps its wal while the repository is away", "error", err)
		return
	}
	s.spool = spool
	for _, name := range spool.Names() {
		if kind, err := postgres.ParseWALFile(name); err == nil && kind.Kind == postgres.SegmentFile {
			s.watcher.note(kind.Segment)
		}
	}
	if n := spool.Files(); n > 0 {
		s.o.Log.Info("wal of an earlier run waits in the temporary folder", "directory", dir, "files", n, "bytes", spool.Bytes())
	}
}

// ErrStopped says that the Shipper's Run has ended.
var ErrStopped = errors.New("the runner is stopping")

// ForeignError says that a request came from another data directory than the one that is protected.
type ForeignError struct {
	Name  string
	Asked string // pg_wal directory of the file asked for
	Ours  string
}

func (e *ForeignError) Error() string {
	return fmt.Sprintf("store wal %s: it lies in %s, but this runner protects %s", e.Name, e.Asked, e.Ours)
}

// Hint tells how that comes about.
func (e *ForeignError) Hint() string {
	return "is this a copy of the protected data directory? give it an archive_command of its own, or none"
}

// PendingError says that a file is not durable yet. It will be shipped, and is to be asked for again.
type PendingError struct {
	Name       string
	Repository string
	Waited     time.Duration
	Err        error // of the latest attempt; nil: the first has not ended
}

func (e *PendingError) Error() string {
	why := "it has not been stored there yet"
	if e.Err != nil {
		why = e.Err.Error()
	}
	return fmt.Sprintf("store wal %s in %s: not durable after %s: %s; PostgreSQL keeps the file", e.Name, e.Repository, e.Waited.Round(100*time.Millisecond), why)
}

func (e *PendingError) Unwrap() error { return e.Err }

// Ship returns once the file at path, one of this instance's finished WAL files, is durable as it is now: in the
// repository, or while that is away in the temporary folder. Other content under its name is
// *repository.WALConflictError, a file of another data directory *ForeignError. When it takes too long, *PendingError,
// and the work goes on: so it does when ctx ends.
func (s *Shipper) Ship(ctx context.Context, path string) (Receipt, error) {
	name := filepath.Base(path)
	if _, err := postgres.ParseWALFile(name); err != nil {
		return Receipt{}, fmt.Errorf("store wal: %w", err)
	}
	if err := s.ours(path); err != nil {
		return Receipt{}, err
	}
	asked := time.Now()
	s.mu.Lock()
	limit := s.o.AnswerAfter
	if s.health.failing() && (s.spool == nil || s.spoolErr != nil) {
		limit = min(limit, awayAnswer)
	}
	s.mu.Unlock()
	timer := time.NewTimer(limit)
	defer timer.Stop()

	first := true
	for {
		info, err := os.Stat(filepath.Join(s.walDir, name))
		if err != nil {
			return Receipt{}, fmt.Errorf("store wal %s: %w", name, err)
		}
		now := identify(info)

		s.mu.Lock()
		f := s.files[name]
		if f == nil {
			f = s.add(name)
			if s.queue.len() < queueLow {
				s.rescan = true
			}
		}
		// What an attempt since asked has read is what PostgreSQL asks us to keep. So is what was read before, if the file
		// is the same still.
		fresh := f.identity == now && (f.settled || !f.readAt.Before(asked))
		switch {
		case (f.state == fileStored || f.state == fileSpooled) && fresh:
			r := f.receipt
			s.mu.Unlock()
			return r, nil
		case f.state == fileRefused && fresh && (!first || time.Since(f.readAt) < backoffMost):
			// PostgreSQL asks again every second or so; reading it each time would tell nothing new.
			err := f.err
			s.mu.Unlock()
			return Receipt{}, err
		case f.state != fileInFlight && f.state != fileWaiting:
			f.state, f.notUntil, f.attempts = fileWaiting, time.Time{}, 0
		}
		f.asked++
		if f.state == fileWaiting {
			if first {
				// A request is worth an attempt at once: its failure is what PostgreSQL is told.
				f.notUntil, f.urgent = time.Time{}, true
			}
			s.queue.put(f, time.Now())
		}
		first = false
		changed := s.changed
		s.mu.Unlock()
		s.poke()

		err = nil
		late := false
		select {
		case <-changed:
		case <-timer.C:
			late = true
		case <-s.ended:
			err = fmt.Errorf("store wal %s: %w", name, ErrStopped)
		case <-ctx.Done():
			err = fmt.Errorf("store wal %s: %w", name, context.Cause(ctx))
		}
		s.mu.Lock()
		f.asked--
		why := f.err
		if why == nil {
			why = s.health.err
		}
		if why != nil && s.health.failing() && s.spoolErr != nil {
			why = fmt.Errorf("%w; %w", why, s.spoolErr)
		}
		s.mu.Unlock()
		if late {
			return Receipt{}, &PendingError{Name: name, Repository: s.o.Repository, Waited: time.Since(asked), Err: why}
		}
		if err != nil {
			return Receipt{}, err
		}
	}
}

// Completed says that a segment lies whole in pg_wal, as the stream that has passed its end knows before PostgreSQL has
// marked it. It is shipped soon, also where PostgreSQL never asks for it: on a standby. It does not block.
func (s *Shipper) Completed(name postgres.SegmentName) {
	s.mu.Lock()
	f := s.files[string(name)]
	if f == nil {
		f = s.add(string(name))
	}
	f.passed = true
	s.mu.Unlock()
	s.poke()
}

// ours checks that path lies in the protected instance's pg_wal, whatever names lead there.
func (s *Shipper) ours(path string) error {
	asked := filepath.Dir(path)
	if asked == s.walDir {
		return nil
	}
	a, err := os.Stat(asked)
	if err != nil {
		return fmt.Errorf("store wal %s: %w", filepath.Base(path), err)
	}
	b, err := os.Stat(s.walDir)
	if err != nil {
		return fmt.Errorf("store wal %s: %w", filepath.Base(path), err)
	}
	if !os.SameFile(a, b) {
		return &ForeignError{Name: filepath.Base(path), Asked: asked, Ours: s.walDir}
	}
	return nil
}

func (s *Shipper) poke() { poke(s.wake) }

func poke(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}

// Run ships until ctx ends: what PostgreSQL has finished, what the stream has passed, what Ship is asked for, and what is
// left in the temporary folder. What is in flight then gets Options.Grace to end. It is called once.
func (s *Shipper) Run(ctx context.Context) error {
	defer close(s.ended)
	work, cancel := context.WithCancelCause(context.WithoutCancel(ctx))
	defer cancel(ErrStopped)
	var wg, watching sync.WaitGroup
	watching.Go(func() { s.watchGaps(ctx) })
	defer watching.Wait()
	poke(s.wakeGaps) // for what waits in the temporary folder

	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			ended := make(chan struct{})
			go func() { wg.Wait(); close(ended) }()
			select {
			case <-ended:
			case <-time.After(s.o.Grace):
				cancel(ErrStopped)
				<-ended
			}
			return nil
		case <-s.wake:
		case <-timer.C:
		}
		if s.wantsScan() {
			s.scan()
		}
		for {
			t := s.next()
			if t == nil {
				break
			}
			wg.Go(func() {
				t(work)
				s.poke()
			})
		}
		s.review()
		timer.Reset(s.idle())
	}
}

func (s *Shipper) wantsScan() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	age := time.Since(s.scanned)
	return age >= max(scanEvery, s.scanWait) || s.rescan && age >= s.scanWait
}

// idle is how long Run may sleep.
func (s *Shipper) idle() time.Duration {
	now := time.Now()
	s.mu.Lock()
	defer s.mu.Unlock()
	next := s.scanned.Add(max(scanEvery, s.scanWait))
	if s.rescan {
		next = s.scanned.Add(s.scanWait)
	}
	sooner := func(t time.Time) {
		// One whose time has come waits for a place; the file that frees it wakes us.
		if t.After(now) && t.Before(next) {
			next = t
		}
	}
	sooner(s.queue.wake(now))
	if s.health.failing() {
		sooner(s.health.retry)
		sooner(s.health.since.Add(failingAfter))
		sooner(s.spoolWait)
	}
	if len(s.buffers) > 0 && s.preparing == 0 && now.Sub(s.worked) > keepBuffers {
		s.buffers = nil // the next busy hour makes new ones
	}
	return max(time.Until(next), time.Millisecond)
}

// next decides what is to be done next, and takes note that it is being done; nil: nothing now.
func (s *Shipper) next() func(ctx context.Context) {
	now := time.Now()
	limit := s.gate.limit()
	s.mu.Lock()
	defer s.mu.Unlock()
	s.queue.wake(now)
	f := s.queue.first()
	ready := f != nil && s.preparing < s.o.Parallelism && (s.memory == 0 || s.memory+s.need() <= memoryBudget)

	if s.health.failing() {
		spooling := s.health.away(now) && s.spoolWorks(now)
		// One upload at a time finds out whether the repository is back: of what has waited longest.
		if !s.probing && (!now.Before(s.health.retry) || ready && f.urgent && !spooling) {
			if name, ok := s.spooled(); ok {
				s.probing = true
				s.draining[name] = true
				if f != nil {
					f.urgent = false // this attempt is what its request is worth
				}
				return func(ctx context.Context) { s.drain(ctx, name, true) }
			}
			if ready {
				s.probing = true
				return s.take(f, task{file: f, probe: true})
			}
		}
		if ready && spooling {
			return s.take(f, task{file: f, spool: true})
		}
		return nil
	}

	// Prepared files that wait for their upload are memory that does nothing; a few keep the pipe full.
	if ready && s.shipping < limit+s.o.Parallelism {
		return s.take(f, task{file: f})
	}
	share := limit
	if f != nil || s.shipping > 0 {
		share = max(1, limit/2) // what PostgreSQL has finished since is not to wait for what is safe for now
	}
	if len(s.draining) < share {
		if name, ok := s.spooled(); ok {
			s.draining[name] = true
			return func(ctx context.Context) { s.drain(ctx, name, false) }
		}
	}
	return nil
}

// spooled finds what is to be brought from the temporary folder next.
func (s *Shipper) spooled() (string, bool) {
	if s.spool == nil {
		return "", false
	}
	return s.spool.First(func(name string) bool { return s.draining[name] || s.stuck[name] })
}

// spoolWorks tells whether the temporary folder is worth an attempt.
func (s *Shipper) spoolWorks(now time.Time) bool {
	if s.spool == nil || now.Before(s.spoolWait) {
		return false
	}
	// To find out while sealing would cost the CPU time of a file each time.
	if err := s.spool.Room(max(s.sealed, 1)); err != nil {
		s.spoolErr, s.spoolWait = err, now.Add(spoolRetry)
		return false
	}
	return true
}
