package restore

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/pgark/terraform-provider-pgark/internal/engine/objectstore"
	"github.com/pgark/terraform-provider-pgark/internal/engine/postgres"
	"github.com/pgark/terraform-provider-pgark/internal/engine/repository"
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
// of images and timelines, and by one for each thousand segments.
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
		listing, err := s.listing(ctx)
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
	id        repository.SeriesID
	series    *repository.Series
	header    func(ctx context.Context, name string) (repository.WALInfo, error)
	images    []repository.ImageInfo // oldest first
	inventory *inventory
	survey    survey

	mu    sync.Mutex // guards times
	times map[string]repository.WALInfo
}

// readSeries reads head, histories and the names of the WAL.
func readSeries(ctx context.Context, series *repository.Series) (*seriesState, error) {
	s := &seriesState{id: series.ID(), series: series, header: series.StatWAL, times: map[string]repository.WALInfo{}}
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
	for e, err := range series.ListWAL(ctx, t, string(postgres.SegmentAt(t, from, size))) {
		if err != nil {
			return nil, fmt.Errorf("list WAL of timeline %d: %w", t, err)
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
	if w.partial != nil && len(w.segments) > 0 && w.segments[len(w.segments)-1].last >= *w.partial {
		w.partial = nil // the whole segment is there, or the timeline went on
	}
	if t == 1 {
		return w, nil
	}
	var b strings.Builder
	_, err := series.GetWAL(ctx, postgres.HistoryFileName(t), &b)
	var locked *repository.NoIdentityError
	switch {
	case errors.Is(err, objectstore.ErrNotExist), errors.As(err, &locked):
		return w, nil // guessForks
	case err != nil:
		return nil, fmt.Errorf("read history of timeline %d: %w", t, err)
	}
	w.history, err = postgres.ParseHistory(t, []byte(b.String()))
	return w, err
}

// guessForks helps timelines whose history cannot be read, because it is missing or because it is encrypted and whoever
// lists has no identity: such a timeline is taken to continue the one before it from its first segment on.
func (v *inventory) guessForks() {
	ids := v.ids()
	for k, t := range ids {
		w := v.timelines[t]
		if t == 1 || len(w.history) > 0 || len(w.segments) == 0 || k == 0 {
			continue
		}
		at := v.size.Start(w.segments[0].first)
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
	i, err := s.lastCommit(ctx, p, c)
	if err != nil || i == nil {
		return nil, err
	}
	return i.LastTime, nil
}

// lastCommit finds the last segment near a stretch's end that has a commit in it; nil if there is none.
func (s *seriesState) lastCommit(ctx context.Context, p route, c stretch) (*repository.WALInfo, error) {
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
		// A segment that the path leaves in its middle goes on with another future: its last commit may belong there.
		if s.whole(p, t, n, until) {
			i, err := s.stat(ctx, t, n)
			if err != nil {
				return nil, err
			}
			if i.LastTime != nil {
				return &i, nil
			}
		}
		if n == 0 {
			return nil, nil
		}
		n--
	}
	return nil, nil
}

// whole tells whether all that the file holds lies on the path.
func (s *seriesState) whole(p route, t postgres.Timeline, number uint64, until postgres.LSN) bool {
	return until == s.inventory.size.Start(number+1) || t == p.timeline() || !s.inventory.timelines[t].hasWhole(number)
}

// firstTime is the time of the first commit known from a position on, nil if none is near.
func (s *seriesState) firstTime(ctx context.Context, p route, from postgres.LSN) (*time.Time, error) {
	for n, tries := s.inventory.size.Number(from), 0; tries < 8; n, tries = n+1, tries+1 {
		t, _, ok := s.inventory.find(p, n)
		if !ok {
			return nil, nil
		}
		i, err := s.stat(ctx, t, n)
		if err != nil {
			return nil, err
		}
		if i.FirstTime != nil {
			return i.FirstTime, nil
		}
	}
	return nil, nil
}

// stat reads a segment's header once.
func (s *seriesState) stat(ctx context.Context, t postgres.Timeline, number uint64) (repository.WALInfo, error) {
	name := string(postgres.MakeSegmentName(t, number, s.inventory.size))
	if !s.inventory.timelines[t].hasWhole(number) {
		name += ".partial"
	}
	s.mu.Lock()
	i, ok := s.times[name]
	s.mu.Unlock()
	if ok {
		return i, nil
	}
	i, err := s.header(ctx, name)
	if errors.Is(err, objectstore.ErrNotExist) {
		err = nil // retention removed it meanwhile: it tells nothing
	}
	if err != nil {
		return i, fmt.Errorf("read header of WAL %s: %w", name, err)
	}
	s.mu.Lock()
	s.times[name] = i
	s.mu.Unlock()
	return i, nil
}
