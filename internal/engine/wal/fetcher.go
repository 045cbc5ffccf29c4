package wal

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"iter"
	"log/slog"
	"os"
	"path/filepath"
	"strconv"
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
	ID() repository.SeriesID
	Head(ctx context.Context) (*repository.Head, error)
	GetWAL(ctx context.Context, name string, w io.Writer) (repository.WALInfo, error)
	ListWAL(ctx context.Context, t postgres.Timeline, from string) iter.Seq2[repository.WALEntry, error]
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

	Prefetch    int                  // segments ahead; default 8, negative: none. Disk: as many segments and two more
	Parallelism int                  // downloads at one time; default 4
	SegmentSize postgres.SegmentSize // default: as the series' images say, else learned from the first segment
	Until       postgres.LSN         // a segment that begins before it and is absent is a gap; 0: not known

	RetryFor  time.Duration // how long an unreachable repository is tried; default 60 s
	GapWait   time.Duration // how long a gap must last: uploads overtake one another at the end of a live archive; default 5 s
	IdleAfter time.Duration // Serve ends when nothing was asked for as long; default 0: never
	Log       *slog.Logger  // default: none
}

func (o *FetcherOptions) applyDefaults() {
	if o.Prefetch == 0 {
		// 128 MiB of default segments: replay takes some 10 of them a second at most.
		o.Prefetch = 8
	}
	o.Prefetch = max(o.Prefetch, 0)
	if o.Parallelism == 0 {
		o.Parallelism = 4
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

	mu       sync.Mutex // guards what follows; nothing is called under it that blocks
	source   Source
	size     postgres.SegmentSize // 0: not known yet
	ahead    map[string]*download
	handed   []handedFile
	serial   int
	lastAsk  time.Time
	asking   int
	slots    chan struct{} // one for each download that runs ahead
	base     context.Context
	cancel   context.CancelFunc
	running  sync.WaitGroup
	prepared bool
}

// download is one file on its way, or in the ring.
type download struct {
	name   string
	cancel context.CancelFunc
	done   chan struct{} // Closed when file or err is set.
	file   string
	err    error // objectstore.ErrNotExist: absent
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
	f := &Fetcher{o: o, size: o.SegmentSize, ahead: make(map[string]*download), slots: make(chan struct{}, o.Parallelism)}
	f.base, f.cancel = context.WithCancel(context.Background())
	return f, nil
}

// GapError says that WAL is missing in the middle of a series.
type GapError struct {
	Series  repository.SeriesID
	Missing string       // name of the absent segment
	Later   string       // what is there and needs it; empty if Until says so
	Until   postgres.LSN // the position that was to be reached
}

func (e *GapError) Error() string {
	s := fmt.Sprintf("wal %s is missing in %s: ", e.Missing, e.Series)
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
	if kind.Kind == postgres.SegmentFile {
		f.prefetch(source, kind.Segment)
	}
	file, err = f.get(ctx, source, name)
	if err == nil {
		if kind.Kind == postgres.SegmentFile {
			f.prefetch(source, kind.Segment) // the first segment told the size
		}
		return file, true, nil
	}
	if !errors.Is(err, objectstore.ErrNotExist) {
		return "", false, fmt.Errorf("fetch wal %s of %s: %w", name, source.ID(), err)
	}
	if kind.Kind != postgres.SegmentFile {
		// PostgreSQL probes for timeline histories that need not exist.
		return "", false, nil
	}
	return f.absent(ctx, source, kind.Segment)
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

// get returns the file of a download, one that runs ahead or its own.
func (f *Fetcher) get(ctx context.Context, source Source, name string) (string, error) {
	for {
		f.mu.Lock()
		d := f.ahead[name]
		delete(f.ahead, name)
		f.mu.Unlock()
		if d == nil {
			break
		}
		select {
		case <-d.done:
		case <-ctx.Done():
			f.mu.Lock()
			f.ahead[name] = d // it goes on, for who asks next
			f.mu.Unlock()
			return "", context.Cause(ctx)
		}
		if d.err == nil {
			f.handOver(d.file)
			return d.file, nil
		}
		// It ran ahead, some time ago: what it did not find may be there by now.
	}
	var file string
	err := f.retry(ctx, func() (err error) {
		file, err = f.download(ctx, source, name)
		return err
	})
	if err != nil {
		return "", err
	}
	f.handOver(file)
	return file, nil
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
	f.mu.Lock()
	f.serial++
	path := filepath.Join(f.o.Ring, "wal."+strconv.Itoa(f.serial)+"."+name)
	f.mu.Unlock()
	// The client moves it only after it was told that it is whole, so it needs no other name until then.
	out, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return "", err
	}
	defer func() {
		if e := out.Close(); err == nil {
			err = e
		}
		if err != nil {
			_ = os.Remove(path) // swept with the ring otherwise
		}
	}()
	if err := f.giveAway(out); err != nil {
		return "", err
	}
	info, err := source.GetWAL(ctx, name, out)
	if err != nil {
		return "", err
	}
	if len(name) == len("000000010000000000000001") {
		if size := postgres.SegmentSize(info.Size); size.Valid() {
			f.mu.Lock()
			f.size = size
			f.mu.Unlock()
		}
	}
	return path, nil
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

// prefetch starts to get the segments behind segment, and drops what lies elsewhere.
func (f *Fetcher) prefetch(source Source, segment postgres.SegmentName) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.size == 0 || f.o.Prefetch == 0 {
		return
	}
	wanted := map[string]bool{string(segment): true}
	next := segment
	for range f.o.Prefetch {
		next = next.Next(f.size)
		wanted[string(next)] = true
	}
	for name, d := range f.ahead {
		if !wanted[name] {
			delete(f.ahead, name)
			f.running.Go(func() {
				d.cancel()
				<-d.done
				if d.err == nil {
					_ = os.Remove(d.file) // swept with the ring otherwise
				}
			})
		}
	}
	next = segment
	for range f.o.Prefetch {
		next = next.Next(f.size)
		name := string(next)
		if d := f.ahead[name]; d != nil {
			select {
			case <-d.done:
				if d.err == nil {
					continue
				}
				// Failed or not there yet: try again, now that the end may have moved on.
			default:
				continue
			}
		}
		ctx, cancel := context.WithCancel(f.base)
		d := &download{name: name, cancel: cancel, done: make(chan struct{})}
		f.ahead[name] = d
		f.running.Go(func() {
			defer cancel()
			defer close(d.done)
			select {
			case f.slots <- struct{}{}:
				defer func() { <-f.slots }()
			case <-ctx.Done():
				d.err = ctx.Err()
				return
			}
			d.file, d.err = f.download(ctx, source, name)
		})
	}
}

// absent finds out what it means that segment is not in the archive.
func (f *Fetcher) absent(ctx context.Context, source Source, segment postgres.SegmentName) (string, bool, error) {
	name := string(segment)
	deadline := time.Now().Add(f.o.GapWait)
	for {
		var gap *GapError
		err := f.retry(ctx, func() (err error) {
			gap, err = f.gap(ctx, source, segment)
			return err
		})
		if err != nil {
			return "", false, fmt.Errorf("fetch wal %s of %s: find out whether it is the end: %w", name, source.ID(), err)
		}
		if gap == nil || gap.Later == "" {
			// The unfinished segment that a timeline ended with holds all there is of it.
			switch file, err := f.get(ctx, source, name+".partial"); {
			case err == nil:
				return file, true, nil
			case !errors.Is(err, objectstore.ErrNotExist):
				return "", false, fmt.Errorf("fetch wal %s.partial of %s: %w", name, source.ID(), err)
			}
		}
		if gap == nil {
			return "", false, nil
		}
		if !time.Now().Before(deadline) {
			return "", false, gap
		}
		// Segments are uploaded several at a time, and may arrive out of order.
		select {
		case <-time.After(min(time.Second, time.Until(deadline))):
		case <-ctx.Done():
			return "", false, context.Cause(ctx)
		}
		switch file, err := f.get(ctx, source, name); {
		case err == nil:
			return file, true, nil
		case !errors.Is(err, objectstore.ErrNotExist):
			return "", false, fmt.Errorf("fetch wal %s of %s: %w", name, source.ID(), err)
		}
	}
}

// gap looks for something that needs the absent segment; nil if there is nothing.
func (f *Fetcher) gap(ctx context.Context, source Source, segment postgres.SegmentName) (*GapError, error) {
	name, timeline := string(segment), segment.Timeline()
	for e, err := range source.ListWAL(ctx, timeline, name) {
		if err != nil {
			return nil, err
		}
		later, err := postgres.ParseWALFile(e.Name)
		if err != nil || later.Kind == postgres.HistoryFile || later.Kind == postgres.BackupFile || later.Segment <= segment {
			continue
		}
		return &GapError{Series: source.ID(), Missing: name, Later: e.Name}, nil
	}

	f.mu.Lock()
	size := f.size
	f.mu.Unlock()
	if size == 0 {
		// A series without images, of which nothing was fetched yet.
		size = postgres.DefaultSegmentSize
	}
	timelines, err := source.Timelines(ctx)
	if err != nil {
		return nil, err
	}
	for _, t := range timelines {
		if t <= timeline {
			continue // a timeline's ancestors have lower numbers
		}
		var b bytes.Buffer
		if _, err := source.GetWAL(ctx, postgres.HistoryFileName(t), &b); err != nil {
			if errors.Is(err, objectstore.ErrNotExist) {
				continue // nothing says what it descends from
			}
			return nil, err
		}
		history, err := postgres.ParseHistory(t, b.Bytes())
		if err != nil {
			return nil, err
		}
		// A timeline that branches off within the segment has a segment of its own there, which begins with a copy.
		if left, ok := history.SwitchPoint(timeline); ok && left >= segment.End(size) {
			return &GapError{
				Series: source.ID(), Missing: name,
				Later: fmt.Sprintf("timeline %d, which branches off at %s,", t, left),
			}, nil
		}
	}
	if f.o.Until > segment.Start(size) {
		return &GapError{Series: source.ID(), Missing: name, Until: f.o.Until}, nil
	}
	return nil, nil
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
