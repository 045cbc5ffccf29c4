package restore

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/pgark/terraform-provider-pgark/internal/engine/objectstore"
	"github.com/pgark/terraform-provider-pgark/internal/engine/postgres"
	"github.com/pgark/terraform-provider-pgark/internal/engine/repository"
	"github.com/pgark/terraform-provider-pgark/internal/engine/wal"
)

// Filter restricts a Catalog. The zero value restricts nothing.
type Filter struct {
	Job, Instance string
	SystemID      postgres.SystemID

	// After and Before leave out images that were completed, and windows and gaps that lie, outside of them.
	After, Before time.Time
}

// Listing is what a repository can restore.
type Listing struct {
	Series []SeriesListing `json:"series"`
}

// SeriesListing is what one series can restore.
type SeriesListing struct {
	Job              string            `json:"job"`
	Instance         string            `json:"instance"`
	SystemIdentifier postgres.SystemID `json:"system_identifier"`
	Images           []Image           `json:"images"`  // oldest first
	Windows          []Window          `json:"windows"` // by timeline, then position
	Gaps             []Gap             `json:"gaps"`    // the same
}

// Statuses of an image.
const (
	Restorable = "restorable" // all WAL that makes it consistent is there
	Incomplete = "incomplete" // some is missing: Image.Reason
)

// Image is one image as a listing shows it.
type Image struct {
	ID              string            `json:"id"`
	Kind            string            `json:"kind"`
	Status          string            `json:"status"`
	Reason          string            `json:"reason,omitempty"` // why it is incomplete
	StartedAt       time.Time         `json:"started_at"`
	CompletedAt     time.Time         `json:"completed_at"`
	StartLSN        postgres.LSN      `json:"start_lsn"`
	StopLSN         postgres.LSN      `json:"stop_lsn"`
	Timeline        postgres.Timeline `json:"timeline"`
	PostgresVersion int               `json:"postgres_version"`
	SourceBytes     int64             `json:"source_bytes"`
	ReadBytes       int64             `json:"read_bytes"`
	StoredBytes     int64             `json:"stored_bytes"`
	CorruptPages    int64             `json:"corrupt_pages"`
	VerifiedAt      *time.Time        `json:"verified_at"`
}

// DescribeImage shows an image whose WAL is there, as a listing does: one that was just committed, say.
func DescribeImage(i repository.ImageInfo) Image {
	return Image{
		ID: i.SID.String(), Kind: i.Kind, Status: Restorable,
		StartedAt: i.StartedAt, CompletedAt: i.CompletedAt, StartLSN: i.StartLSN, StopLSN: i.StopLSN, Timeline: i.Timeline,
		PostgresVersion: i.PostgresVersion,
		SourceBytes:     i.SourceBytes, ReadBytes: i.ReadBytes, StoredBytes: i.StoredBytes, CorruptPages: i.CorruptPages,
	}
}

// lookBack is how many segments are asked for a commit's time, from a stretch's end, before giving up: idle hours of
// one segment a minute are bridged with few requests, since the first usually answers.
const lookBack = 64

// Catalog lists what the repository can restore. It needs no identity. The number of requests grows with the number
// of images and timelines, and by one for each thousand segments. An object whose header turns out to be damaged counts
// as absent; CheckWAL finds what is damaged behind it, too.
func Catalog(ctx context.Context, repo *repository.Repository, f Filter) (*Listing, error) {
	ids, err := repo.SeriesList(ctx, f.Job, f.Instance)
	if err != nil {
		return nil, fmt.Errorf("list series: %w", err)
	}
	l := &Listing{Series: []SeriesListing{}}
	for _, id := range ids {
		if f.SystemID != 0 && id.SystemID != f.SystemID {
			continue
		}
		s, err := readSeries(ctx, repo.Series(id))
		if err != nil {
			return nil, fmt.Errorf("series %s: %w", id, err)
		}
		var listing SeriesListing
		err = s.withoutDamage(func() (err error) {
			listing, err = s.listing(ctx)
			return err
		})
		if err != nil {
			return nil, fmt.Errorf("series %s: %w", id, err)
		}
		listing.filter(f)
		l.Series = append(l.Series, listing)
	}
	return l, nil
}

func (l *SeriesListing) filter(f Filter) {
	inside := func(from, to time.Time) bool {
		return (f.After.IsZero() || !to.Before(f.After)) && (f.Before.IsZero() || !from.After(f.Before))
	}
	images, windows, gaps := []Image{}, []Window{}, []Gap{}
	for _, i := range l.Images {
		if inside(i.CompletedAt, i.CompletedAt) {
			images = append(images, i)
		}
	}
	for _, w := range l.Windows {
		if inside(w.From, w.To) {
			windows = append(windows, w)
		}
	}
	for _, g := range l.Gaps {
		// A gap without known bounds may lie anywhere.
		if g.From == nil || g.To == nil || inside(*g.From, *g.To) {
			gaps = append(gaps, g)
		}
	}
	l.Images, l.Windows, l.Gaps = images, windows, gaps
}

// seriesState is a series as read at one moment.
type seriesState struct {
	id         repository.SeriesID
	series     *repository.Series
	header     func(ctx context.Context, name string) (repository.WALInfo, error)
	tailHeader func(ctx context.Context, t repository.Tail) (repository.WALInfo, error)
	lastRecord func(ctx context.Context, p route, number uint64) (postgres.LSN, error) // where it begins; 0 if there is none
	images     []repository.ImageInfo                                                  // oldest first
	inventory  *inventory
	survey     survey

	mu    sync.Mutex // guards times
	times map[string]repository.WALInfo
}

// damageError says that an object is damaged; what it would have been good for is then to be found out without it.
type damageError struct {
	name string // of a WAL file; "": a tail
	tail repository.Tail
	err  error
}

func (e *damageError) Error() string { return e.err.Error() }

func (e *damageError) Unwrap() error { return e.err }

// withoutDamage repeats fn without the objects that it finds to be damaged.
func (s *seriesState) withoutDamage(fn func() error) error {
	for {
		err := fn()
		var damage *damageError
		if !errors.As(err, &damage) {
			return err
		}
		s.exclude(damage)
	}
}

// exclude takes an object out of the inventory. Each is taken out at most once, since it is not looked at any more.
func (s *seriesState) exclude(d *damageError) {
	v := s.inventory
	defer func() { s.survey = v.survey(s.images) }()
	if d.name == "" {
		w := v.timelines[d.tail.Timeline]
		n := v.size.Number(d.tail.Start)
		w.setTails(n, slices.DeleteFunc(slices.Clone(w.tails[n].all), func(t repository.Tail) bool { return t == d.tail }), v.size)
		return
	}
	f, err := postgres.ParseWALFile(d.name)
	if err != nil {
		return
	}
	w := v.timelines[f.Timeline]
	switch f.Kind {
	case postgres.SegmentFile:
		w.remove(f.Segment.Number(v.size))
	case postgres.PartialFile:
		w.partial = nil
	case postgres.HistoryFile:
		w.history = nil
	}
}

// readSeries reads head, histories and the names of the WAL.
func readSeries(ctx context.Context, series *repository.Series) (*seriesState, error) {
	s := &seriesState{id: series.ID(), series: series, header: series.StatWAL, tailHeader: series.StatTail, times: map[string]repository.WALInfo{}}
	s.lastRecord = func(ctx context.Context, p route, number uint64) (postgres.LSN, error) {
		scan, _, err := s.scan(ctx, p, number)
		return scan.Last, err
	}
	head, err := series.Head(ctx)
	if err != nil {
		return nil, fmt.Errorf("read head: %w", err)
	}
	s.images = head.Images
	s.inventory = &inventory{size: postgres.DefaultSegmentSize, timelines: map[postgres.Timeline]*timelineWAL{}}
	if len(s.images) == 0 {
		return s, nil // without an image no WAL can be used
	}
	// initdb fixes the segment size; pg_resetwal can change it, and no WAL from before is then of use.
	newest := s.images[len(s.images)-1]
	s.inventory.size = postgres.SegmentSize(newest.SegmentSize)
	if !s.inventory.size.Valid() {
		return nil, fmt.Errorf("image %s: WAL segment size %d is none that PostgreSQL has", newest.SID, newest.SegmentSize)
	}
	from := endOfWAL
	for _, i := range s.images {
		from = min(from, i.StartLSN)
	}
	ids, err := series.Timelines(ctx)
	if err != nil {
		return nil, fmt.Errorf("list timelines: %w", err)
	}
	found := make([]*timelineWAL, len(ids))
	group, gctx := errgroup.WithContext(ctx)
	group.SetLimit(8)
	for k, t := range ids {
		group.Go(func() error {
			w, err := readTimeline(gctx, series, t, from, s.inventory.size)
			found[k] = w
			return err
		})
	}
	if err := group.Wait(); err != nil {
		return nil, err
	}
	for k, t := range ids {
		s.inventory.timelines[t] = found[k]
	}
	s.inventory.guessForks()
	s.survey = s.inventory.survey(s.images)
	return s, nil
}

func readTimeline(ctx context.Context, series *repository.Series, t postgres.Timeline, from postgres.LSN, size postgres.SegmentSize) (*timelineWAL, error) {
	w := &timelineWAL{}
	var err error
	if t > 1 {
		var b strings.Builder
		_, err = series.GetWAL(ctx, postgres.HistoryFileName(t), &b)
		var locked *repository.NoIdentityError
		switch {
		case errors.As(err, &locked):
			w.guess = true
		case isDamage(err), errors.Is(err, objectstore.ErrNotExist):
			// PostgreSQL cannot go from its ancestors to this timeline, and so nobody can.
		case err != nil:
			return nil, fmt.Errorf("read history of timeline %d: %w", t, err)
		default:
			if w.history, err = postgres.ParseHistory(t, []byte(b.String())); err != nil {
				return nil, err
			}
		}
	}
	if k := len(w.history); k > 0 {
		// What a timeline has before it begins is a copy in its first segment.
		from = max(from, size.Start(size.Number(w.history[k-1].Switch)))
	}
	return w, w.read(ctx, series, t, size.Number(from), size)
}

// isDamage tells whether an object is there, but is not what it was.
func isDamage(err error) bool {
	var corrupt *repository.CorruptError
	return errors.As(err, &corrupt)
}

// read lists the timeline's WAL from a segment on: its files, then the tails of segments that are not there whole.
//
// Segments replace their tails while we list. What was seen of neither kind shows as a hole, or as no tail behind the last
// segment, and is looked for again.
func (w *timelineWAL) read(ctx context.Context, series *repository.Series, t postgres.Timeline, first uint64, size postgres.SegmentSize) error {
	for next, again := first, 0; ; again++ {
		known := w.count()
		if err := w.listFiles(ctx, series, t, next, size); err != nil {
			return fmt.Errorf("list WAL of timeline %d: %w", t, err)
		}
		if again > 0 && w.count() == known || again == listAgain {
			break
		}
		next = first
		if k := len(w.segments); k > 0 {
			next = w.segments[k-1].last + 1
		}
		w.tails = nil
		if err := w.listTails(ctx, series, t, first, size); err != nil {
			return fmt.Errorf("list WAL tails of timeline %d: %w", t, err)
		}
		if _, streamed := w.tails[next]; streamed {
			break
		}
	}
	if w.partial != nil && len(w.segments) > 0 && w.segments[len(w.segments)-1].last >= *w.partial {
		w.partial = nil // the whole segment is there, or the timeline went on
	}
	return nil
}

// listAgain bounds how often the end of a live archive is looked at again.
const listAgain = 5

// count is how many whole segments there are.
func (w *timelineWAL) count() uint64 {
	var n uint64
	for _, r := range w.segments {
		n += r.last - r.first + 1
	}
	return n
}

func (w *timelineWAL) listFiles(ctx context.Context, series *repository.Series, t postgres.Timeline, from uint64, size postgres.SegmentSize) error {
	for e, err := range series.ListWAL(ctx, t, string(postgres.MakeSegmentName(t, from, size))) {
		if err != nil {
			return err
		}
		f, err := postgres.ParseWALFile(e.Name)
		if err != nil || f.Timeline != t {
			continue // something that a later version stores
		}
		switch f.Kind {
		case postgres.SegmentFile:
			w.add(f.Segment.Number(size))
		case postgres.PartialFile:
			n := f.Segment.Number(size)
			w.partial = &n
		}
	}
	return nil
}

// listTails lists the tails of what lies between the whole segments and behind them.
func (w *timelineWAL) listTails(ctx context.Context, series *repository.Series, t postgres.Timeline, from uint64, size postgres.SegmentSize) error {
	var absent []stretch
	at := from
	for _, r := range w.segments {
		if r.first > at {
			absent = append(absent, stretch{size.Start(at), size.Start(r.first)})
		}
		at = r.last + 1
	}
	absent = append(absent, stretch{size.Start(at), endOfWAL})
	found := map[uint64][]repository.Tail{}
	for _, a := range absent {
		for tail, err := range series.ListTails(ctx, t, a.start, a.end) {
			if err != nil {
				return err
			}
			n := size.Number(tail.Start)
			found[n] = append(found[n], tail)
		}
	}
	for n, tails := range found {
		w.setTails(n, tails, size)
	}
	return nil
}

// guessForks helps timelines whose history cannot be read, because it is encrypted and whoever lists has no identity: such
// a timeline is taken to continue the one before it from its first segment on.
func (v *inventory) guessForks() {
	ids := v.ids()
	for k, t := range ids {
		w := v.timelines[t]
		first, ok := w.first()
		if !w.guess || !ok || k == 0 {
			continue
		}
		at := v.size.Start(first)
		for _, a := range v.timelines[ids[k-1]].history {
			if a.Switch <= at {
				w.history = append(w.history, a)
			}
		}
		w.history = append(w.history, postgres.Ancestor{Timeline: ids[k-1], Switch: at, Reason: "guessed"})
	}
}

func (s *seriesState) listing(ctx context.Context) (SeriesListing, error) {
	l := SeriesListing{Job: s.id.Job, Instance: s.id.Instance, SystemIdentifier: s.id.SystemID}
	for _, i := range s.images {
		image := DescribeImage(i)
		if why, ok := s.survey.incomplete[i.SID]; ok {
			image.Status, image.Reason = Incomplete, why
		}
		l.Images = append(l.Images, image)
	}
	windows, err := s.windows(ctx)
	if err != nil {
		return l, err
	}
	l.Windows = windows
	for _, h := range s.survey.holes {
		g := Gap{Timeline: h.timeline, StartLSN: h.start, EndLSN: h.end,
			Segments: s.inventory.size.NumberBefore(h.end) - s.inventory.size.Number(h.start) + 1}
		if g.From, err = s.lastTime(ctx, h.route, stretch{0, h.start}); err != nil {
			return l, err
		}
		if g.To, err = s.firstTime(ctx, h.route, h.end); err != nil {
			return l, err
		}
		l.Gaps = append(l.Gaps, g)
	}
	return l, nil
}

// windows gives the survey's spans their times.
func (s *seriesState) windows(ctx context.Context) ([]Window, error) {
	out := make([]Window, len(s.survey.spans))
	for k, sp := range s.survey.spans {
		to, err := s.spanEnd(ctx, sp)
		if err != nil {
			return nil, err
		}
		out[k] = Window{From: completed(sp.first), To: to, StartLSN: sp.first.StopLSN, EndLSN: sp.stretch.end, Timeline: sp.route.timeline()}
	}
	return out, nil
}

// spanEnd is the time of the last commit known in the span. Images in it tell of a time, too: nothing was committed
// between the last commit of the WAL that is there and an image's stop.
func (s *seriesState) spanEnd(ctx context.Context, sp span) (time.Time, error) {
	to := completed(sp.first)
	for _, i := range s.images {
		if sp.route.on(i) && i.StartLSN >= sp.stretch.start && i.StopLSN <= sp.stretch.end && completed(i).After(to) {
			to = completed(i)
		}
	}
	last, err := s.lastTime(ctx, sp.route, sp.stretch)
	if err != nil {
		return to, err
	}
	if last != nil && last.After(to) {
		to = *last
	}
	return to, nil
}

// lastTime is the time of the last commit known in a stretch, nil if none is near its end.
func (s *seriesState) lastTime(ctx context.Context, p route, c stretch) (*time.Time, error) {
	size := s.inventory.size
	n := size.NumberBefore(c.end)
	for range lookBack {
		if c.end == 0 || size.Start(n) < c.start {
			return nil, nil
		}
		t, until, ok := s.inventory.find(p, n)
		if !ok {
			return nil, nil
		}
		last, err := s.lastTimeIn(ctx, p, t, n, until)
		if err != nil || last != nil {
			return last, err
		}
		if n == 0 {
			return nil, nil
		}
		n--
	}
	return nil, nil
}

// lastTimeIn is the time of the last commit in what timeline t has of a segment up to until, as far as headers tell.
func (s *seriesState) lastTimeIn(ctx context.Context, p route, t postgres.Timeline, number uint64, until postgres.LSN) (*time.Time, error) {
	size, w := s.inventory.size, s.inventory.timelines[t]
	name := string(postgres.MakeSegmentName(t, number, size))
	if w.hasWhole(number) {
		// A segment that the path leaves in its middle goes on with another future: its last commit may belong there.
		if until < size.Start(number+1) && t != p.timeline() {
			return nil, nil
		}
		i, err := s.stat(ctx, name)
		return i.LastTime, err
	}
	var last *time.Time
	for _, tail := range slices.Backward(w.tails[number].chain) {
		if wal.RecordEnd(tail.End, size) > until && t != p.timeline() {
			continue // the same
		}
		i, err := s.statTail(ctx, tail)
		if err != nil {
			return nil, err
		}
		if last = i.LastTime; last != nil {
			break
		}
	}
	if w.partial != nil && *w.partial == number {
		i, err := s.stat(ctx, name+".partial")
		if err != nil {
			return nil, err
		}
		if i.LastTime != nil && (last == nil || i.LastTime.After(*last)) {
			last = i.LastTime
		}
	}
	return last, nil
}

// firstTime is the time of the first commit known from a position on, nil if none is near.
func (s *seriesState) firstTime(ctx context.Context, p route, from postgres.LSN) (*time.Time, error) {
	for n, tries := s.inventory.size.Number(from), 0; tries < 8; n, tries = n+1, tries+1 {
		t, _, ok := s.inventory.find(p, n)
		if !ok {
			return nil, nil
		}
		w, name := s.inventory.timelines[t], string(postgres.MakeSegmentName(t, n, s.inventory.size))
		if run, streamed := w.tails[n]; streamed {
			for _, tail := range run.chain {
				if i, err := s.statTail(ctx, tail); err != nil || i.FirstTime != nil {
					return i.FirstTime, err
				}
			}
			continue
		}
		if !w.hasWhole(n) {
			name += ".partial"
		}
		if i, err := s.stat(ctx, name); err != nil || i.FirstTime != nil {
			return i.FirstTime, err
		}
	}
	return nil, nil
}

// stat reads the header of a WAL file, once.
func (s *seriesState) stat(ctx context.Context, name string) (repository.WALInfo, error) {
	return s.statOnce(name, &damageError{name: name}, func() (repository.WALInfo, error) { return s.header(ctx, name) })
}

// statTail reads the header of a tail, once.
func (s *seriesState) statTail(ctx context.Context, t repository.Tail) (repository.WALInfo, error) {
	return s.statOnce(t.String(), &damageError{tail: t}, func() (repository.WALInfo, error) { return s.tailHeader(ctx, t) })
}

func (s *seriesState) statOnce(name string, damage *damageError, read func() (repository.WALInfo, error)) (repository.WALInfo, error) {
	s.mu.Lock()
	i, ok := s.times[name]
	s.mu.Unlock()
	if ok {
		return i, nil
	}
	i, err := read()
	switch {
	case errors.Is(err, objectstore.ErrNotExist):
		i = repository.WALInfo{} // retention, or the whole segment, took its place meanwhile: it tells nothing
	case isDamage(err):
		damage.err = err
		return repository.WALInfo{}, damage
	case err != nil:
		return repository.WALInfo{}, fmt.Errorf("read header of WAL %s: %w", name, err)
	}
	s.mu.Lock()
	s.times[name] = i
	s.mu.Unlock()
	return i, nil
}
