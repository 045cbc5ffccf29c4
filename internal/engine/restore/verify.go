package restore

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"sync"

	"golang.org/x/sync/errgroup"

	"github.com/pgark/terraform-provider-pgark/internal/engine/objectstore"
	"github.com/pgark/terraform-provider-pgark/internal/engine/postgres"
	"github.com/pgark/terraform-provider-pgark/internal/engine/repository"
	"github.com/pgark/terraform-provider-pgark/internal/engine/wal"
)

// WALCheck is what CheckWAL found.
type WALCheck struct {
	Objects int64           `json:"objects"` // that were read
	Bytes   int64           `json:"bytes"`   // of them, as stored
	Damaged []DamagedObject `json:"damaged"`
	Missing []MissingWAL    `json:"missing"`
	Windows []SeriesWindow  `json:"windows"` // what can be restored without what is damaged or missing
}

// DamagedObject is one that is not what was stored, or that no server can have written.
type DamagedObject struct {
	Series string `json:"series"`
	Name   string `json:"name"` // below the series' wal/
	Error  string `json:"error"`
}

// MissingWAL is something that others show to have been there, or that an image needs.
type MissingWAL struct {
	Series   string            `json:"series"`
	Name     string            `json:"name"` // of the first file that is absent, or not there to its end
	Timeline postgres.Timeline `json:"timeline"`
	StartLSN postgres.LSN      `json:"start_lsn"` // as far as the WAL before it goes
	EndLSN   postgres.LSN      `json:"end_lsn"`
	Why      string            `json:"why"`
}

// SeriesWindow is a window, and whose it is.
type SeriesWindow struct {
	Series string `json:"series"`
	Window
}

// OK tells whether nothing is damaged or missing.
func (c *WALCheck) OK() bool { return len(c.Damaged) == 0 && len(c.Missing) == 0 }

// WALProgress is a moment of CheckWAL.
type WALProgress struct {
	Series         string
	Objects, Total int64 // of the series
	Bytes          int64 // read of it, as stored
}

// CheckWAL reads every WAL object of the series that f selects, and checks what can be checked without restoring: each
// object's digest, and that every record follows the one before it, from segment to segment and into what was streamed
// of the last. It needs an identity where the repository is encrypted. Objects that are removed while it goes on are
// passed over. Memory is bounded by 256 MiB. f's times are not looked at.
func CheckWAL(ctx context.Context, repo *repository.Repository, f Filter, progress func(WALProgress)) (*WALCheck, error) {
	ids, err := repo.SeriesList(ctx, f.Job, f.Instance)
	if err != nil {
		return nil, fmt.Errorf("list series: %w", err)
	}
	report := &WALCheck{Damaged: []DamagedObject{}, Missing: []MissingWAL{}, Windows: []SeriesWindow{}}
	for _, id := range ids {
		if f.SystemID != 0 && id.SystemID != f.SystemID {
			continue
		}
		c := &walCheck{series: repo.Series(id), report: report, progress: progress, damaged: map[string]bool{}, whole: map[postgres.SegmentName]bool{}, tails: map[postgres.Timeline][]repository.Tail{}}
		if err := c.run(ctx); err != nil {
			return nil, fmt.Errorf("check the WAL of series %s: %w", id, err)
		}
	}
	return report, nil
}

// walCheck is the check of one series.
type walCheck struct {
	series   *repository.Series
	report   *WALCheck
	progress func(WALProgress)
	at       WALProgress

	state   *seriesState
	size    postgres.SegmentSize
	objects []walObject
	damaged map[string]bool // by walObject.name
	whole   map[postgres.SegmentName]bool
	tails   map[postgres.Timeline][]repository.Tail // all of them
	scanner *postgres.RecordScanner                 // over the segments that follow one another
	next    postgres.SegmentName                    // that it expects
}

// walObject is one to read.
type walObject struct {
	name string
	file postgres.WALFile
	tail repository.Tail // if file is none
}

func tailName(t repository.Tail) string {
	return fmt.Sprintf("%s/%016X-%016X.tail", t.Timeline, uint64(t.Start), uint64(t.End))
}

// inMemory is the largest segment that is read ahead, and bytesAhead how much of them.
const (
	inMemory   = 64 << 20
	bytesAhead = 128 << 20
)

func (c *walCheck) run(ctx context.Context) error {
	var err error
	if c.state, err = readSeries(ctx, c.series); err != nil {
		return err
	}
	c.size = c.state.inventory.size
	timelines, err := c.series.Timelines(ctx)
	if err != nil {
		return err
	}
	for _, t := range timelines {
		if err := c.list(ctx, t); err != nil {
			return err
		}
	}
	c.at = WALProgress{Series: c.series.ID().String(), Total: int64(len(c.objects))}
	if err := c.read(ctx); err != nil {
		return err
	}
	c.missing()
	return c.conclude(ctx)
}

// list notes the objects of a timeline in the order in which they are read: segments as they follow one another.
func (c *walCheck) list(ctx context.Context, t postgres.Timeline) error {
	if t > 1 {
		c.objects = append(c.objects, walObject{name: postgres.HistoryFileName(t), file: postgres.WALFile{Kind: postgres.HistoryFile, Timeline: t}})
	}
	for tail, err := range c.series.ListTails(ctx, t, 0, endOfWAL) {
		if err != nil {
			return err
		}
		c.tails[t] = append(c.tails[t], tail)
		c.objects = append(c.objects, walObject{name: tailName(tail), tail: tail})
	}
	for e, err := range c.series.ListWAL(ctx, t, "") {
		if err != nil {
			return err
		}
		f, err := postgres.ParseWALFile(e.Name)
		if err != nil || f.Kind == postgres.HistoryFile {
			continue
		}
		if f.Kind == postgres.SegmentFile {
			c.whole[f.Segment] = true
			if err := c.learnSize(ctx, e.Name); err != nil {
				return err
			}
		}
		c.objects = append(c.objects, walObject{name: fmt.Sprintf("%s/%s", t, e.Name), file: f})
	}
	return nil
}

// learnSize takes the size of segments from the first one where no image tells it.
func (c *walCheck) learnSize(ctx context.Context, name string) error {
	if len(c.state.images) > 0 || len(c.whole) > 1 {
		return nil
	}
	i, err := c.series.StatWAL(ctx, name)
	if size := postgres.SegmentSize(i.Size); err == nil && size.Valid() {
		c.size = size
	}
	if isDamage(err) || errors.Is(err, objectstore.ErrNotExist) {
		return nil // it is read later
	}
	return err
}

// pending is an object that is being read.
type pending struct {
	object walObject
	done   chan error
	raw    *bytes.Buffer // of a segment; nil if it is too large, and is read when its turn comes
	info   repository.WALInfo
}

// read reads all objects, several at one time, and judges them in order.
func (c *walCheck) read(ctx context.Context) error {
	ahead := min(4, max(1, bytesAhead/int64(c.size)))
	buffers := sync.Pool{New: func() any { return new(bytes.Buffer) }}
	queue := make(chan *pending, ahead)
	group, ctx := errgroup.WithContext(ctx)
	group.Go(func() error {
		defer close(queue)
		for _, o := range c.objects {
			p := &pending{object: o, done: make(chan error, 1)}
			if b, ok := buffers.Get().(*bytes.Buffer); ok && c.size <= inMemory {
				b.Reset()
				p.raw = b
			}
			select {
			case queue <- p:
			case <-ctx.Done():
				return context.Cause(ctx)
			}
			if p.raw == nil {
				p.done <- nil
				continue
			}
			group.Go(func() (err error) {
				p.info, err = c.get(ctx, p.object, p.raw)
				p.done <- err
				return nil // the judge decides
			})
		}
		return nil
	})
	group.Go(func() error {
		for p := range queue {
			var err error
			select {
			case err = <-p.done:
			case <-ctx.Done():
				return context.Cause(ctx)
			}
			if err := c.judge(ctx, p, err); err != nil {
				return err
			}
			if p.raw != nil {
				buffers.Put(p.raw)
			}
		}
		return nil
	})
	if err := group.Wait(); err != nil {
		return err
	}
	return nil
}

func (c *walCheck) get(ctx context.Context, o walObject, w io.Writer) (repository.WALInfo, error) {
	if o.file.Kind == 0 {
		return c.series.GetTail(ctx, o.tail, w)
	}
	return c.series.GetWAL(ctx, o.file.String(), w)
}

// judge takes the next object: what it holds, or why it could not be read. An error is one that ends the check.
func (c *walCheck) judge(ctx context.Context, p *pending, err error) error {
	o := p.object
	records := io.Discard
	segment := o.file.Kind == postgres.SegmentFile
	if segment {
		if c.scanner == nil || c.next != o.file.Segment {
			c.scanner = postgres.NewRecordScanner(o.file.Timeline, o.file.Segment.Start(c.size), c.size)
		}
		c.next = o.file.Segment.Next(c.size)
		records = &keepGoing{w: c.scanner}
	}
	if err == nil && p.raw == nil {
		p.info, err = c.get(ctx, o, records)
	} else if err == nil {
		_, err = records.Write(p.raw.Bytes())
	}
	switch {
	case errors.Is(err, objectstore.ErrNotExist) && o.file.Kind == postgres.HistoryFile:
		at, _ := c.state.inventory.timelines[o.file.Timeline].begin(c.size)
		c.report.Missing = append(c.report.Missing, MissingWAL{Series: c.at.Series, Name: o.name, Timeline: o.file.Timeline, StartLSN: at, EndLSN: at,
			Why: fmt.Sprintf("nothing says what timeline %d descends from, so it can be restored from its own images only", uint32(o.file.Timeline))})
		return nil
	case errors.Is(err, objectstore.ErrNotExist):
		c.scanner = nil // removed meanwhile
		return nil
	case isDamage(err):
		c.damage(o, err)
		c.scanner = nil
	case err != nil:
		return err
	case segment:
		if k, ok := records.(*keepGoing); ok && k.err != nil {
			c.damage(o, fmt.Errorf("its records: %w", k.err))
			c.scanner = nil
		}
	}
	c.report.Objects++
	c.report.Bytes += p.info.StoredSize
	c.at.Objects++
	c.at.Bytes += p.info.StoredSize
	if c.progress != nil {
		c.progress(c.at)
	}
	return nil
}

// keepGoing hides an error of the records from whoever reads the object: its digest is to be checked to the end.
type keepGoing struct {
	w   io.Writer
	err error
}

func (k *keepGoing) Write(b []byte) (int, error) {
	if k.err == nil {
		_, k.err = k.w.Write(b)
	}
	return len(b), nil
}

func (c *walCheck) damage(o walObject, err error) {
	if c.damaged[o.name] {
		return
	}
	c.damaged[o.name] = true
	c.report.Damaged = append(c.report.Damaged, DamagedObject{Series: c.at.Series, Name: o.name, Error: err.Error()})
}

// begin is where the timeline's first segment begins.
func (w *timelineWAL) begin(size postgres.SegmentSize) (postgres.LSN, bool) {
	if w == nil {
		return 0, false
	}
	n, ok := w.first()
	return size.Start(n), ok
}

// missing reports what is absent, before what is damaged counts as absent, too.
func (c *walCheck) missing() {
	s, v := c.state, c.state.inventory
	for _, h := range s.survey.holes {
		c.report.Missing = append(c.report.Missing, MissingWAL{Series: c.at.Series, Name: string(postgres.SegmentAt(h.timeline, h.start, v.size)),
			Timeline: h.timeline, StartLSN: h.start, EndLSN: h.end, Why: "later WAL is there"})
	}
	for _, i := range s.images {
		name, from, why := v.lacks(v.route(i.Timeline), i)
		if _, incomplete := s.survey.incomplete[i.SID]; !incomplete || slices.ContainsFunc(c.report.Missing, func(m MissingWAL) bool {
			return m.Series == c.at.Series && m.Timeline == i.Timeline && m.StartLSN <= from && from < m.EndLSN
		}) {
			continue
		}
		c.report.Missing = append(c.report.Missing, MissingWAL{Series: c.at.Series, Name: string(name), Timeline: i.Timeline,
			StartLSN: from, EndLSN: i.StopLSN, Why: fmt.Sprintf("image %s needs it: %s", i.SID, why)})
	}
	for _, t := range v.ids() {
		p := v.route(t)
		stretches := v.stretches(p)
		if len(stretches) == 0 {
			continue
		}
		end := stretches[len(stretches)-1].end
		at, by, ok := v.demanded(p, end)
		name := string(postgres.SegmentAt(t, end, v.size))
		if !ok || slices.ContainsFunc(c.report.Missing, func(m MissingWAL) bool { return m.Series == c.at.Series && m.Name == name }) {
			continue
		}
		c.report.Missing = append(c.report.Missing, MissingWAL{Series: c.at.Series, Name: name, Timeline: t, StartLSN: end, EndLSN: at,
			Why: fmt.Sprintf("timeline %d branched off at %s", uint32(by), at)})
	}
}

// conclude checks the records of what was streamed, and finds what can be restored without what is damaged.
func (c *walCheck) conclude(ctx context.Context) error {
	s, v := c.state, c.state.inventory
	for t, w := range v.timelines {
		good := map[uint64][]repository.Tail{}
		for _, tail := range c.tails[t] {
			if !c.damaged[tailName(tail)] {
				n := v.size.Number(tail.Start)
				good[n] = append(good[n], tail)
			}
		}
		for name := range c.whole {
			if n := name.Number(v.size); name.Timeline() == t && c.damaged[fmt.Sprintf("%s/%s", t, name)] && w.hasWhole(n) {
				w.remove(n)
				w.setTails(n, good[n], v.size)
			}
		}
		if w.partial != nil && c.damaged[fmt.Sprintf("%s/%s.partial", t, postgres.MakeSegmentName(t, *w.partial, v.size))] {
			w.partial = nil
		}
		for n := range w.tails {
			if err := c.checkTails(ctx, t, n, good[n]); err != nil {
				return err
			}
		}
	}
	s.survey = v.survey(s.images)
	var windows []Window
	err := s.withoutDamage(func() (err error) {
		windows, err = s.windows(ctx)
		return err
	})
	for _, w := range windows {
		c.report.Windows = append(c.report.Windows, SeriesWindow{c.at.Series, w})
	}
	return err
}

// checkTails checks the records of a segment's tails, and leaves those in the inventory that are good.
func (c *walCheck) checkTails(ctx context.Context, t postgres.Timeline, number uint64, good []repository.Tail) error {
	v := c.state.inventory
	w := v.timelines[t]
	for {
		w.setTails(number, good, v.size)
		run, ok := w.tails[number]
		if !ok {
			return nil
		}
		scanner := postgres.NewRecordScanner(t, v.size.Start(number), v.size)
		records := &keepGoing{w: scanner}
		_, err := wal.ReadTails(ctx, c.series, good, v.size.Start(number), records)
		bad := repository.Tail{}
		var unreadable *wal.TailError
		switch {
		case errors.As(err, &unreadable):
			bad = unreadable.Tail
		case err != nil:
			return err
		case records.err == nil && (scanner.End() >= run.end || run.end == v.size.Start(number+1)):
			return nil
		default:
			i := max(0, slices.IndexFunc(run.chain, func(x repository.Tail) bool { return x.End > scanner.End() }))
			if bad, err = run.chain[i], records.err; err == nil {
				err = fmt.Errorf("its last record ends at %s", scanner.End())
			}
			err = fmt.Errorf("its records: %w", err)
		}
		if !errors.Is(err, objectstore.ErrNotExist) { // else the whole segment took its place
			c.damage(walObject{name: tailName(bad), tail: bad}, err)
		}
		good = slices.DeleteFunc(slices.Clone(good), func(x repository.Tail) bool { return x == bad })
	}
}
