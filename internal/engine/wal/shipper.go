package wal

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"iter"
	"log/slog"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/pgark/terraform-provider-pgark/internal/engine/postgres"
	"github.com/pgark/terraform-provider-pgark/internal/engine/repository"
)

// Archive is what a Shipper needs of a series.
type Archive interface {
	ID() repository.SeriesID
	PutWAL(ctx context.Context, info repository.WALInfo, raw io.ReaderAt) (stored bool, storedSize int64, err error)
	ListWAL(ctx context.Context, t postgres.Timeline, from string) iter.Seq2[repository.WALEntry, error]
	PutSession(ctx context.Context, r repository.SessionRecord) error
}

var _ Archive = (*repository.Series)(nil)

// Options of a Shipper. The first four have no default.
type Options struct {
	Series        Archive
	DataDirectory string
	SystemID      postgres.SystemID
	SegmentSize   postgres.SegmentSize

	Repository  string        // its URL, for messages
	Host        string        // who ships, for the record
	Parallelism int           // files in flight; default 4. Memory: twice its number of segments, at most 64 MiB each
	AnswerAfter time.Duration // a request is answered no when its file is not durable by then; default 30 s
	Grace       time.Duration // what is in flight when Run ends may take as long; default 10 s
	Log         *slog.Logger  // default: none
}

func (o *Options) applyDefaults() {
	if o.Parallelism == 0 {
		// Compression takes most of the time near the repository, round trips do far from it; four keep two cores and a
		// store 100 ms away busy.
		o.Parallelism = 4
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
	// scanEvery is how often archive_status is read when nobody asks. PostgreSQL asks for a file within milliseconds of
	// finishing it; this is for files behind one that it is stuck with.
	scanEvery = time.Second

	// scanPause is the least time between two readings: with a long backlog each takes milliseconds.
	scanPause = 100 * time.Millisecond

	// queueAhead is how many files beyond those in flight are taken from one reading.
	queueAhead = 64

	// settle is more than a tick of any file system's clock (10 ms at HZ=100): a file that was quiet for as long before
	// we began to read has other times if it changed since.
	settle = 50 * time.Millisecond

	// keepBuffers is how long the buffers of files are kept with nothing to ship.
	keepBuffers = 30 * time.Second

	// rememberFiles is how many acknowledged files are kept in mind, for Wait and for PostgreSQL asking twice.
	rememberFiles = 1024

	backoffFirst = time.Second
	backoffMost  = 15 * time.Second

	// awayAnswer replaces AnswerAfter once the repository is known to be away: holding PostgreSQL any longer would not
	// make the file arrive.
	awayAnswer = 5 * time.Second
)

// Shipper ships one instance's WAL. Safe for concurrent use.
type Shipper struct {
	o      Options
	walDir string
	wake   chan struct{} // capacity 1: something for Run to look at
	ended  chan struct{} // Closed when Run returns.

	mu      sync.Mutex // guards what follows; nothing is called under it that blocks
	files   map[string]*file
	done    []string      // names of stored files, oldest first
	changed chan struct{} // closed and replaced whenever a file ends
	counts  counts
	session counts // the same since the last session record
	began   time.Time
	away    error // why the latest attempt failed, if it may pass; nil after a success
	rescan  bool
}

// file is a WAL file in the Shipper's mind.
type file struct {
	name     string
	state    fileState
	asked    int       // requests that wait for it now
	attempts int       // failed ones in a row
	notUntil time.Time // no attempt before

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
	fileStored                    // durable, as identity says
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
	Stored     bool  // false: it was in the repository already, with the same content
	At         time.Time
}

// New prepares a Shipper; Run makes it work.
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
	}
	return &Shipper{
		o:       o,
		walDir:  filepath.Join(o.DataDirectory, "pg_wal"),
		wake:    make(chan struct{}, 1),
		ended:   make(chan struct{}),
		files:   make(map[string]*file),
		changed: make(chan struct{}),
		began:   time.Now(),
	}, nil
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

// Ship returns once the file at path, one of this instance's finished WAL files, is durable in the repository, as it is
// now. Other content under its name is *repository.WALConflictError, a file of another data directory *ForeignError.
// When it takes too long, *PendingError, and the work goes on: so it does when ctx ends.
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
	if s.away != nil {
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
			f = &file{name: name}
			s.files[name] = f
		}
		// What an attempt since asked has read is what PostgreSQL asks us to keep. So is what was read before, if the file
		// is the same still.
		fresh := f.identity == now && (f.settled || !f.readAt.Before(asked))
		switch {
		case f.state == fileStored && fresh:
			r := f.receipt
			s.mu.Unlock()
			return r, nil
		case f.state == fileRefused && fresh && !first:
			err := f.err
			s.mu.Unlock()
			return Receipt{}, err
		case f.state == fileRefused && fresh && time.Since(f.readAt) < backoffMost:
			// PostgreSQL asks again every second or so; reading it each time would tell nothing new.
			err := f.err
			s.mu.Unlock()
			return Receipt{}, err
		case f.state == fileStored, f.state == fileRefused:
			f.state, f.notUntil, f.attempts = fileWaiting, time.Time{}, 0
		}
		if first {
			// A request is worth an attempt at once: its failure is what PostgreSQL is told.
			f.notUntil = time.Time{}
		}
		first = false
		f.asked++
		changed := s.changed
		s.rescan = true
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
			why = s.away
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

func (s *Shipper) poke() {
	select {
	case s.wake <- struct{}{}:
	default:
	}
}

// Run ships until ctx ends: what PostgreSQL has finished, and what Ship is asked for. What is in flight then gets
// Options.Grace to end. It is called once.
func (s *Shipper) Run(ctx context.Context) error {
	defer close(s.ended)
	work, cancel := context.WithCancelCause(context.WithoutCancel(ctx))
	defer cancel(ErrStopped)
	var wg sync.WaitGroup
	slots := make(chan struct{}, s.o.Parallelism)
	buffers := make(chan []byte, s.o.Parallelism)

	var scanned time.Time
	worked := time.Now()
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

		s.mu.Lock()
		rescan := s.rescan
		s.mu.Unlock()
		if age := time.Since(scanned); age >= scanEvery || rescan && age >= scanPause {
			s.scan()
			scanned = time.Now()
		}

	start:
		for {
			select {
			case slots <- struct{}{}:
			default:
				break start // one that ends wakes us
			}
			f := s.pick()
			if f == nil {
				<-slots
				break start
			}
			worked = time.Now()
			wg.Go(func() {
				var buffer []byte
				select {
				case buffer = <-buffers:
				default:
				}
				buffer = s.attempt(work, f, buffer)
				if buffer != nil {
					buffers <- buffer // has room: no more goroutines than its capacity
				}
				<-slots
				s.poke()
			})
		}
		if time.Since(worked) > keepBuffers {
			select {
			case <-buffers: // one a turn: the next busy hour makes new ones
			default:
			}
		}
		timer.Reset(s.idle(scanned))
	}
}

// idle is how long Run may sleep.
func (s *Shipper) idle(scanned time.Time) time.Duration {
	s.mu.Lock()
	defer s.mu.Unlock()
	next := scanned.Add(scanEvery)
	if s.rescan {
		next = scanned.Add(scanPause)
	}
	for _, f := range s.files {
		// One whose time has come waits for a slot; the attempt that frees it wakes us.
		if f.state == fileWaiting && f.notUntil.After(time.Now()) && f.notUntil.Before(next) {
			next = f.notUntil
		}
	}
	return max(time.Until(next), time.Millisecond)
}

// scan reads archive_status and queues what is finished and not known yet, in PostgreSQL's order. It forgets files that
// PostgreSQL was told about long ago.
func (s *Shipper) scan() {
	ready, err := s.ready()
	if err != nil {
		s.o.Log.Warn("look for finished wal", "error", err)
		return
	}
	present := make(map[string]bool, len(ready))
	for _, name := range ready {
		present[name] = true
	}

	s.mu.Lock()
	defer s.mu.Unlock()
	s.rescan = false
	waiting := 0
	for name, f := range s.files {
		if f.state == fileWaiting {
			if !present[name] && f.asked == 0 {
				// Acknowledged by somebody else, or removed by hand: no longer ours to ship.
				delete(s.files, name)
				continue
			}
			waiting++
		}
	}
	for _, name := range ready {
		if waiting >= queueAhead {
			s.rescan = true
			break
		}
		if s.files[name] == nil {
			s.files[name] = &file{name: name}
			waiting++
		}
	}
	keep := s.done[:0]
	for i, name := range s.done {
		f := s.files[name]
		switch {
		case f == nil:
		case len(s.done)-i > rememberFiles && !present[name] && f.asked == 0 && f.state != fileInFlight:
			delete(s.files, name)
		default:
			keep = append(keep, name)
		}
	}
	s.done = keep
}

// ready lists the names of finished files that PostgreSQL has no receipt for, in the order in which it asks: timeline
// histories first, then by name (pgarch.c, ready_file_comparator; versions before 15 do the same file by file).
func (s *Shipper) ready() ([]string, error) {
	entries, err := os.ReadDir(filepath.Join(s.walDir, "archive_status"))
	if err != nil {
		return nil, err
	}
	var names []string
	for _, e := range entries {
		name, ok := strings.CutSuffix(e.Name(), ".ready")
		if !ok {
			continue
		}
		if _, err := postgres.ParseWALFile(name); err == nil {
			names = append(names, name)
		}
	}
	slices.SortFunc(names, order)
	return names, nil
}

func order(a, b string) int {
	ha, hb := strings.HasSuffix(a, ".history"), strings.HasSuffix(b, ".history")
	switch {
	case ha && !hb:
		return -1
	case hb && !ha:
		return 1
	}
	return strings.Compare(a, b)
}

// pick takes the file that is to be shipped next: one that is asked for before others.
func (s *Shipper) pick() *file {
	now := time.Now()
	s.mu.Lock()
	defer s.mu.Unlock()
	var best *file
	for _, f := range s.files {
		if f.state != fileWaiting || f.notUntil.After(now) {
			continue
		}
		switch {
		case best == nil, f.asked > 0 && best.asked == 0:
			best = f
		case (f.asked > 0) == (best.asked > 0) && order(f.name, best.name) < 0:
			best = f
		}
	}
	if best != nil {
		best.state = fileInFlight
	}
	return best
}

// attempt ships f once and notes what came of it. It returns the buffer for the next one.
func (s *Shipper) attempt(ctx context.Context, f *file, buffer []byte) []byte {
	s.mu.Lock()
	asked := f.asked > 0
	s.mu.Unlock()

	path := filepath.Join(s.walDir, f.name)
	r, buffer, err := s.read(f.name, path, buffer, asked)
	defer r.close()
	var stored, offered bool
	var storedSize int64
	if err == nil {
		offered = true
		stored, storedSize, err = s.o.Series.PutWAL(ctx, r.info, r.content)
	}
	now := time.Now()
	delay := now.Sub(s.finishedAt(f.name, r.identity))

	s.mu.Lock()
	defer s.mu.Unlock()
	defer func() {
		close(s.changed)
		s.changed = make(chan struct{})
	}()
	f.identity, f.readAt, f.settled = r.identity, r.began, r.settled
	f.err = err
	var conflict *repository.WALConflictError
	var unsettled *unsettledError
	switch {
	case err == nil:
		f.state, f.attempts = fileStored, 0
		f.receipt = Receipt{Name: f.name, Size: r.info.Size, StoredSize: storedSize, Stored: stored, At: now}
		s.away = nil
		s.done = append(s.done, f.name)
		for _, c := range []*counts{&s.counts, &s.session} {
			c.stored(f.receipt, delay)
		}
		s.o.Log.Debug("wal stored", "name", f.name, "stored_bytes", storedSize, "new", stored, "delay", delay)
		return buffer
	case errors.As(err, &unsettled):
		f.state, f.notUntil, f.err = fileWaiting, now.Add(settle), nil
		return buffer
	case errors.Is(err, fs.ErrNotExist) && r.began.IsZero() && !asked:
		// It went between the reading of archive_status and ours.
		delete(s.files, f.name)
		return buffer
	case errors.Is(context.Cause(ctx), ErrStopped):
		f.state = fileWaiting
		return buffer
	}
	for _, c := range []*counts{&s.counts, &s.session} {
		c.failed(err, now, errors.As(err, &conflict))
	}
	level := slog.LevelWarn
	if refused(err) {
		f.state, level = fileRefused, slog.LevelError
	} else {
		f.state = fileWaiting
		wait := min(backoffFirst<<min(f.attempts, 6), backoffMost)
		wait = wait/2 + rand.N(wait) // so that the files which failed together do not come back together
		f.attempts++
		f.notUntil = now.Add(wait)
		if offered {
			s.away = err
		}
	}
	s.o.Log.Log(ctx, level, "store wal", "name", f.name, "error", err, "attempt", f.attempts)
	return buffer
}

// refused tells whether err stays as long as the file is what it is.
func refused(err error) bool {
	var conflict *repository.WALConflictError
	var invalid *InvalidError
	return errors.As(err, &conflict) || errors.As(err, &invalid)
}

// finishedAt is when PostgreSQL finished the file: it marked it so.
func (s *Shipper) finishedAt(name string, id identity) time.Time {
	if info, err := os.Stat(filepath.Join(s.walDir, "archive_status", name+".ready")); err == nil {
		return info.ModTime()
	}
	if id.modified.IsZero() {
		return time.Now()
	}
	return id.modified
}
