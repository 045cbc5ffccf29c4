package wal

import (
	"context"
	"errors"
	"fmt"
	"io"
	"iter"
	"log/slog"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/pgark/terraform-provider-pgark/internal/engine/daemon/control"
	"github.com/pgark/terraform-provider-pgark/internal/engine/objectstore"
	"github.com/pgark/terraform-provider-pgark/internal/engine/postgres"
	"github.com/pgark/terraform-provider-pgark/internal/engine/repository"
)

// Source is what a Fetcher needs of a series.
type Source interface {
	TailSource
	Head(ctx context.Context) (*repository.Head, error)
	GetWAL(ctx context.Context, name string, w io.Writer) (repository.WALInfo, error)
	ListWAL(ctx context.Context, t postgres.Timeline, from string) iter.Seq2[repository.WALEntry, error]
	ListTails(ctx context.Context, t postgres.Timeline, from, to postgres.LSN) iter.Seq2[repository.Tail, error]
	Timelines(ctx context.Context) ([]postgres.Timeline, error)
}

var _ Source = (*repository.Series)(nil)

// FetcherOptions of NewFetcher. The first two have no default.
type FetcherOptions struct {
	// Open gives the series. It is called when the first file is asked for, and again after it failed: a Fetcher listens
	// first, so that whoever asks is told what is wrong.
	Open func(ctx context.Context) (Source, error)

	// Ring is a directory for files fetched ahead. It is made if it is not there, and what looks like ours is removed
	// from it at the beginning and the end. Best on the file system of pg_wal, so that files are renamed into place.
	// A Fetcher of root gives files to the directory's owner.
	Ring string

	// Prefetch is how many segments lie ready ahead; negative: none. Default: 8 at first and, when replay still has to
	// wait, twice as many, up to 64, or 1 GiB, or an eighth of the space that is free. On disk are as many and two more.
	Prefetch int

	Parallelism int                  // most downloads ahead at one time; default 8, of which as many run as keep pace
	SegmentSize postgres.SegmentSize // default: as the series' images say, else learned from the first segment
	Until       postgres.LSN         // WAL that ends before it is a gap; 0: not known
	Stop        postgres.LSN         // recovery has a target, and ends at or before it: no gap behind it counts; 0: not known

	RetryFor  time.Duration // how long an unreachable repository is tried; default 60 s
	GapWait   time.Duration // how long a gap must last: uploads overtake one another at the end of a live archive; default 5 s
	IdleAfter time.Duration // Serve ends when nothing was asked for as long; default 0: never
	Log       *slog.Logger  // default: none
}

func (o *FetcherOptions) applyDefaults() {
	if o.Parallelism == 0 {
		// Decoding takes 40 to 70 ms of CPU a segment and replay about 100 ms: more than 8 are of use over long distances
		// only, where a segment takes a second.
		o.Parallelism = 8
	}
	if o.RetryFor == 0 {
		o.RetryFor = time.Minute
	}
	if o.GapWait == 0 {
		o.GapWait = 5 * time.Second
	}
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
}

// Fetcher gets WAL out of a repository, ahead of being asked. Safe for concurrent use.
type Fetcher struct {
	o FetcherOptions

	mu        sync.Mutex // guards what follows; nothing is called under it that blocks
	source    Source
	size      postgres.SegmentSize // 0: not known yet
	ring      ring
	histories map[postgres.Timeline]postgres.History // those that were found: they never change
	handed    []handedFile
	serial    int
	lastAsk   time.Time
	asking    int
	base      context.Context
	cancel    context.CancelFunc
	running   sync.WaitGroup
	prepared  bool
}

// handedFile is one that a client moves away.
type handedFile struct {
	file string
	at   time.Time
}

// handedFor is how long a client may take to move a file away.
const handedFor = time.Minute

// ringPattern matches the files of a ring.
const ringPattern = "wal.*"

// NewFetcher prepares a Fetcher. Close releases what it holds.
func NewFetcher(o FetcherOptions) (*Fetcher, error) {
	o.applyDefaults()
	switch {
	case o.Open == nil:
		return nil, errors.New("wal fetcher: no series given")
	case !filepath.IsAbs(o.Ring):
		return nil, fmt.Errorf("wal fetcher: ring directory %q: expected an absolute path", o.Ring)
	}
	f := &Fetcher{o: o, size: o.SegmentSize, ring: newRing(), histories: make(map[postgres.Timeline]postgres.History)}
	f.base, f.cancel = context.WithCancel(context.Background())
	return f, nil
}

// GapError says that WAL is missing in the middle of a series.
type GapError struct {
	Series  repository.SeriesID
	Missing string       // name of the segment that is absent, or not there to its end
	Reached postgres.LSN // how far it is there; 0: not at all
	Later   string       // what is there and needs it; empty if Until says so
	Until   postgres.LSN // the position that was to be reached
}

func (e *GapError) Error() string {
	s := fmt.Sprintf("wal %s is missing in %s: ", e.Missing, e.Series)
	if e.Reached != 0 {
		s = fmt.Sprintf("wal %s in %s ends at %s: ", e.Missing, e.Series, e.Reached)
	}
	if e.Later != "" {
		return s + e.Later + " is there and comes after it"
	}
	return s + "it is needed to reach " + e.Until.String()
}

// Hint says what can still be done.
func (e *GapError) Hint() string {
	return "a target before the gap can be restored, and so can one after an image that was taken behind it; pgark list shows them"
}

// Fetch gets one WAL file and returns where it lies, verified, for the caller to move away within a minute. found is
// false at the end of the archive. Fetching the next segments goes on when it returns.
func (f *Fetcher) Fetch(ctx context.Context, name string) (file string, found bool, err error) {
	kind, err := postgres.ParseWALFile(name)
	if err != nil {
		return "", false, fmt.Errorf("fetch wal: %w", err)
	}
	if err := f.prepare(); err != nil {
		return "", false, err
	}
	f.mu.Lock()
	f.asking++
	f.mu.Unlock()
	defer func() {
		f.mu.Lock()
		f.asking--
		f.lastAsk = time.Now()
		f.mu.Unlock()
	}()
	f.sweep()

	source, err := f.open(ctx)
	if err != nil {
		return "", false, fmt.Errorf("fetch wal %s: %w", name, err)
	}
	segment := kind.Kind == postgres.SegmentFile
	if segment {
		f.ask(source, kind.Segment)
	}
	file, err = f.get(ctx, source, name)
	if segment && err == nil {
		f.answer(source, kind.Segment) // the first segment told the size
	}
	var corrupt *repository.CorruptError
	switch {
	case err == nil:
		return file, true, nil
	case segment && errors.As(err, &corrupt):
		// In a store that refuses deletions the tails that it replaced are still there.
		if file := f.wholeFromTails(ctx, source, kind.Segment); file != "" {
			f.o.Log.Warn("a damaged segment is replaced by what was streamed of it", "name", name, "error", err)
			return file, true, nil
		}
	case kind.Kind == postgres.HistoryFile && errors.As(err, &corrupt):
		f.o.Log.Error("a timeline's history is damaged", "name", name, "error", err)
		file, err := f.refusedHistory(name, err)
		return file, err == nil, err
	case errors.Is(err, objectstore.ErrNotExist) && segment:
		return f.absent(ctx, source, kind.Segment)
	case errors.Is(err, objectstore.ErrNotExist):
		// PostgreSQL probes for timeline histories that need not exist.
		return "", false, nil
	}
	return "", false, fmt.Errorf("fetch wal %s of %s: %w", name, source.ID(), err)
}

// refusedHistory stands in for a history that is damaged. To every server that ends recovery it must say that the timeline
// has been used, or its number would be taken again; to one that is to follow the timeline it must be an error, which it
// is, because PostgreSQL cannot parse it (readTimeLineHistory in timeline.c: a line has to begin with a number).
func (f *Fetcher) refusedHistory(name string, damage error) (file string, err error) {
	out, err := f.create(name)
	if err != nil {
		return "", err
	}
	defer out.closeOrRemove(&err)
	if _, err := fmt.Fprintf(out, "damaged in the repository: %s\n", strings.ReplaceAll(damage.Error(), "\n", " ")); err != nil {
		return "", err
	}
	f.handOver(out.Name())
	return out.Name(), nil
}

// prepare makes the ring.
func (f *Fetcher) prepare() error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.prepared {
		return nil
	}
	if err := os.MkdirAll(f.o.Ring, 0o700); err != nil {
		return fmt.Errorf("make the ring of wal fetched ahead: %w", err)
	}
	if err := f.empty(); err != nil {
		return err
	}
	f.prepared = true
	return nil
}

func (f *Fetcher) empty() error {
	names, err := filepath.Glob(filepath.Join(f.o.Ring, ringPattern))
	if err != nil {
		return fmt.Errorf("empty the ring of wal fetched ahead %s: %w", f.o.Ring, err)
	}
	for _, name := range names {
		if err := os.Remove(name); err != nil && !errors.Is(err, os.ErrNotExist) {
			return fmt.Errorf("empty the ring of wal fetched ahead: %w", err)
		}
	}
	return nil
}

func (f *Fetcher) open(ctx context.Context) (Source, error) {
	f.mu.Lock()
	source := f.source
	f.mu.Unlock()
	if source != nil {
		return source, nil
	}
	err := f.retry(ctx, func() (err error) {
		source, err = f.o.Open(ctx)
		return err
	})
	if err != nil {
		return nil, err
	}
	var size postgres.SegmentSize
	err = f.retry(ctx, func() error {
		head, err := source.Head(ctx)
		if err == nil && len(head.Images) > 0 {
			size = postgres.SegmentSize(head.Images[0].SegmentSize)
		}
		return err
	})
	if err != nil {
		return nil, err
	}
	f.mu.Lock()
	f.source = source
	if f.size == 0 && size.Valid() {
		f.size = size
	}
	f.mu.Unlock()
	return source, nil
}

// retry repeats fn while its error may pass, up to RetryFor.
func (f *Fetcher) retry(ctx context.Context, fn func() error) error {
	ctx, cancel := context.WithTimeout(ctx, f.o.RetryFor)
	defer cancel()
	for wait := 250 * time.Millisecond; ; wait = min(2*wait, 5*time.Second) {
		err := fn()
		if err == nil || !objectstore.IsTransient(err) {
			return err
		}
		f.o.Log.Warn("the repository cannot be reached", "error", err)
		select {
		case <-ctx.Done():
			return err
		case <-time.After(wait):
		}
	}
}

func (f *Fetcher) handOver(file string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.handed = append(f.handed, handedFile{file: file, at: time.Now()})
}

// sweep removes files that were handed over and never moved away.
func (f *Fetcher) sweep() {
	f.mu.Lock()
	var old []string
	for len(f.handed) > 0 && time.Since(f.handed[0].at) > handedFor {
		old = append(old, f.handed[0].file)
		f.handed = f.handed[1:]
	}
	f.mu.Unlock()
	for _, file := range old {
		_ = os.Remove(file) // as a rule it is gone
	}
}

// download gets one file into the ring, whole and verified.
func (f *Fetcher) download(ctx context.Context, source Source, name string) (file string, err error) {
	out, err := f.create(name)
	if err != nil {
		return "", err
	}
	defer out.closeOrRemove(&err)
	info, err := source.GetWAL(ctx, name, out)
	if err != nil {
		return "", err
	}
	if _, err := postgres.ParseSegmentName(name); err == nil {
		f.learn(postgres.SegmentSize(info.Size))
	}
	return out.Name(), nil
}

// learn notes the segments' size.
func (f *Fetcher) learn(size postgres.SegmentSize) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if size.Valid() {
		f.size = size
	}
}

// segmentSize is the size of segments, as far as it is known.
func (f *Fetcher) segmentSize() postgres.SegmentSize {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.size == 0 {
		// A series without images, of which nothing was fetched yet.
		return postgres.DefaultSegmentSize
	}
	return f.size
}

// ringFile is a file that is being written in the ring.
type ringFile struct{ *os.File }

// create makes a file in the ring. The client moves it only after it was told that it is whole, so it needs no other name
// until then.
func (f *Fetcher) create(name string) (*ringFile, error) {
	f.mu.Lock()
	f.serial++
	path := filepath.Join(f.o.Ring, "wal."+strconv.Itoa(f.serial)+"."+name)
	f.mu.Unlock()
	file, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return nil, err
	}
	out := &ringFile{file}
	if err := f.giveAway(file); err != nil {
		out.closeOrRemove(&err)
		return nil, err
	}
	return out, nil
}

// closeOrRemove ends writing: a file that did not become whole goes.
func (r *ringFile) closeOrRemove(err *error) {
	if e := r.Close(); *err == nil {
		*err = e
	}
	if *err != nil {
		_ = os.Remove(r.Name()) // swept with the ring otherwise
	}
}

// reset empties it, to be written anew.
func (r *ringFile) reset() error {
	if err := r.Truncate(0); err != nil {
		return err
	}
	_, err := r.Seek(0, io.SeekStart)
	return err
}

// fill completes it with zeros, which take up their space: PostgreSQL goes on to write into the file.
func (r *ringFile) fill(size int64) error {
	at, err := r.Seek(0, io.SeekEnd)
	if err != nil {
		return err
	}
	for at < size {
		n, err := r.Write(zeros[:min(int64(len(zeros)), size-at)])
		if err != nil {
			return err
		}
		at += int64(n)
	}
	return nil
}

// giveAway makes the ring's owner the owner of a file: PostgreSQL keeps the file, and later writes into it.
func (f *Fetcher) giveAway(file *os.File) error {
	if os.Geteuid() != 0 {
		return nil
	}
	info, err := os.Stat(f.o.Ring)
	if err != nil {
		return err
	}
	st, ok := info.Sys().(*syscall.Stat_t)
	if !ok || st.Uid == 0 {
		return nil
	}
	return file.Chown(int(st.Uid), int(st.Gid))
}

// Serve answers Fetch's requests on a socket until ctx ends or nothing was asked for as long as IdleAfter says.
func (f *Fetcher) Serve(ctx context.Context, socket string) error {
	if err := f.prepare(); err != nil {
		return err
	}
	l, err := control.Listen(socket)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	f.mu.Lock()
	f.lastAsk = time.Now()
	f.mu.Unlock()
	go func() {
		defer l.Close()
		if f.o.IdleAfter <= 0 {
			<-ctx.Done()
			return
		}
		tick := time.NewTicker(f.o.IdleAfter / 4)
		defer tick.Stop()
		for {
			select {
			case <-ctx.Done():
				return
			case <-tick.C:
			}
			f.mu.Lock()
			idle := f.asking == 0 && time.Since(f.lastAsk) > f.o.IdleAfter
			f.mu.Unlock()
			if idle {
				return
			}
		}
	}()
	return control.Serve(ctx, l, func(ctx context.Context, r control.Request, _ func(string) error) control.Answer {
		if r.Op != control.OpFetch {
			return control.Answer{Error: fmt.Sprintf("a wal fetcher knows no operation %q", r.Op)}
		}
		file, found, err := f.Fetch(ctx, r.Name)
		if err != nil {
			f.o.Log.Error("fetch wal", "name", r.Name, "error", err)
			return control.Fail(err)
		}
		return control.Answer{OK: true, Found: found, File: file}
	})
}

// Close stops fetching ahead and empties the ring. A file that was handed over is gone then, too.
func (f *Fetcher) Close() error {
	f.cancel()
	f.running.Wait()
	f.mu.Lock()
	defer f.mu.Unlock()
	if !f.prepared {
		return nil
	}
	return f.empty()
}
