package restore

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/pgark/terraform-provider-pgark/internal/engine/postgres"
	"github.com/pgark/terraform-provider-pgark/internal/engine/repository"
)

// The choices of Options.Timeline that are no number.
const (
	LatestTimeline  = "latest"  // the newest that anything can be restored on
	CurrentTimeline = "current" // that of the newest image
)

// Plan is what a restore will do, known before anything is touched.
type Plan struct {
	Image       string            `json:"image"`
	Kind        string            `json:"kind"`
	CompletedAt time.Time         `json:"completed_at"`
	StopLSN     postgres.LSN      `json:"stop_lsn"`
	Target      string            `json:"target"`
	Timeline    postgres.Timeline `json:"timeline"`
	ImageBytes  int64             `json:"image_bytes"`
	WALFrom     string            `json:"wal_from"` // the first segment that recovery reads
	WALTo       string            `json:"wal_to"`   // the last that is there
	WALSegments uint64            `json:"wal_segments"`

	image   repository.ImageInfo
	route   route
	stretch stretch
	size    postgres.SegmentSize
	target  Target
	stop    stopKind
	endLSN  postgres.LSN // of stopAtKnownEnd
	gap     bool         // the stretch ends before a gap, not at the end of the archive
	orphan  bool         // the timeline's history is missing
}

// stopKind is how PostgreSQL is told to stop.
type stopKind int

const (
	stopAtTarget    stopKind = 1 // recovery_target_* says it
	stopAtEnd       stopKind = 2 // at the end of the archive, whatever it is by then
	stopAtKnownEnd  stopKind = 3 // after the last record that is there now, even if the archive grows meanwhile
	stopConsistency stopKind = 4 // recovery_target = 'immediate'
)

// plan chooses image and timeline, and finds out whether the target can be reached from what is in the repository.
func (s *seriesState) plan(ctx context.Context, o *Options) (*Plan, error) {
	var windows []Window
	err := s.withoutDamage(func() (err error) {
		windows, err = s.windows(ctx)
		return err
	})
	if err != nil {
		return nil, err
	}
	c := chooser{s: s, target: o.Target, windows: windows}
	if len(s.images) == 0 {
		return nil, c.unreachable("the series holds no image")
	}
	if err := c.choosePath(o.Timeline, o.Image); err != nil {
		return nil, err
	}
	if err := c.candidates(o.Image); err != nil {
		return nil, err
	}
	switch o.Target.kind() {
	case Latest:
		err = c.latest()
	case Immediate:
		c.take(c.images[len(c.images)-1], stopConsistency)
	case ToLSN:
		err = c.lsn(ctx)
	case ToTime:
		err = c.time(ctx)
	case ToXID, ToName:
		err = c.search(ctx)
	}
	if err != nil {
		return nil, err
	}
	p := c.plan()
	if p.stop == stopAtKnownEnd {
		err = s.resolveEnd(ctx, p)
	}
	return p, err
}

// chooser narrows down a plan.
type chooser struct {
	s       *seriesState
	target  Target
	windows []Window

	route     route
	stretches []stretch
	images    []repository.ImageInfo // restorable on it, oldest first; never empty after candidates

	image   repository.ImageInfo
	stretch stretch
	stop    stopKind
}

func (c *chooser) unreachable(format string, args ...any) error {
	return &UnreachableError{Series: c.s.id.String(), Target: c.target, Reason: fmt.Sprintf(format, args...), Windows: c.windows}
}

func (c *chooser) choosePath(choice string, image repository.SID) error {
	v := c.s.inventory
	switch choice {
	case "", LatestTimeline:
		var newest postgres.Timeline
		for _, sp := range c.s.survey.spans {
			if image != 0 && !c.s.restorable(sp.route, image) {
				continue
			}
			newest = max(newest, sp.route.timeline())
		}
		if newest == 0 {
			newest = c.s.images[len(c.s.images)-1].Timeline // candidates will say what is wrong with it
		}
		c.route = v.route(newest)
	case CurrentTimeline:
		c.route = v.route(c.s.images[len(c.s.images)-1].Timeline)
	default:
		n, err := strconv.ParseUint(choice, 10, 32)
		if err != nil || n == 0 {
			return fmt.Errorf("timeline %q: expected latest, current or a number", choice)
		}
		t := postgres.Timeline(n)
		known := v.ids()
		if _, ok := v.timelines[t]; !ok {
			return c.unreachable("there is no timeline %d in the archive, found %s", t, listTimelines(known))
		}
		c.route = v.route(t)
	}
	c.stretches = v.stretches(c.route)
	return nil
}

func listTimelines(ids []postgres.Timeline) string {
	if len(ids) == 0 {
		return "none"
	}
	names := make([]string, len(ids))
	for i, t := range ids {
		names[i] = strconv.FormatUint(uint64(t), 10)
	}
	return strings.Join(names, ", ")
}

// restorable tells whether the image can be restored along the path.
func (s *seriesState) restorable(p route, sid repository.SID) bool {
	for _, i := range s.images {
		if i.SID == sid && p.on(i) {
			_, ok := cover(s.inventory.stretches(p), i)
			return ok
		}
	}
	return false
}

func (c *chooser) candidates(only repository.SID) error {
	var lacking []string
	for _, i := range c.s.images {
		if only != 0 && i.SID != only {
			continue
		}
		if !c.route.on(i) {
			why := ""
			if t := c.route.timeline(); c.s.inventory.orphan(t) {
				why = fmt.Sprintf(", since %s is missing", postgres.HistoryFileName(t))
			}
			lacking = append(lacking, fmt.Sprintf("image %s is not on the way to timeline %d%s", i.SID, c.route.timeline(), why))
			continue
		}
		if _, ok := cover(c.stretches, i); !ok {
			lacking = append(lacking, fmt.Sprintf("image %s: %s", i.SID, c.s.inventory.missing(c.route, i)))
			continue
		}
		c.images = append(c.images, i)
	}
	// Along one route images follow one another as they were taken, unless a copy of the cluster took some, too.
	slices.SortStableFunc(c.images, func(a, b repository.ImageInfo) int { return cmp.Compare(a.StopLSN, b.StopLSN) })
	switch {
	case len(c.images) > 0:
		return nil
	case len(lacking) == 0:
		return c.unreachable("image %s is not in the series", only)
	}
	return c.unreachable("no image can be restored on timeline %d: %s", c.route.timeline(), strings.Join(lacking, "; "))
}

func (c *chooser) take(i repository.ImageInfo, stop stopKind) {
	c.image, c.stop = i, stop
	c.stretch, _ = cover(c.stretches, i) // a candidate is covered
}

// newest is the newest candidate that fits.
func (c *chooser) newest(fits func(repository.ImageInfo) bool) (repository.ImageInfo, bool) {
	for _, i := range slices.Backward(c.images) {
		if fits(i) {
			return i, true
		}
	}
	return repository.ImageInfo{}, false
}

// after is the stretch behind the chosen one, if there is any.
func (c *chooser) after(s stretch) (stretch, bool) {
	for _, n := range c.stretches {
		if n.start >= s.end {
			return n, true
		}
	}
	return stretch{}, false
}

func (c *chooser) gapReason(s, next stretch) string {
	size := c.s.inventory.size
	t := c.route.at(s.end)
	first, last := postgres.SegmentAt(t, s.end, size), postgres.MakeSegmentName(t, size.NumberBefore(next.start), size)
	switch {
	case size.Offset(s.end) != 0 && first == last:
		return fmt.Sprintf("WAL %s ends at %s", first, s.end)
	case size.Offset(s.end) != 0:
		return fmt.Sprintf("WAL from %s on, which ends at %s, to %s is missing", first, s.end, last)
	case first == last:
		return fmt.Sprintf("WAL %s is missing", first)
	}
	return fmt.Sprintf("WAL from %s to %s is missing", first, last)
}

func (c *chooser) latest() error {
	newest := c.images[len(c.images)-1]
	c.take(newest, stopAtEnd)
	if next, ok := c.after(c.stretch); ok {
		return c.unreachable("%s, while later WAL is there up to %s; the newest image that can be restored lies before the gap, and can be brought to %s",
			c.gapReason(c.stretch, next), c.stretches[len(c.stretches)-1].end, c.stretch.end)
	}
	if at, by, ok := c.s.inventory.demanded(c.route, c.stretch.end); ok {
		return c.unreachable("the WAL ends at %s, before timeline %d branched off at %s; what can be restored ends there", c.stretch.end, by, at)
	}
	return nil
}

func (c *chooser) lsn(ctx context.Context) error {
	at := c.target.LSN
	i, ok := c.newest(func(i repository.ImageInfo) bool { return i.StopLSN <= at })
	if !ok {
		first := c.images[0]
		if at > first.StartLSN {
			return c.unreachable("it lies within the backup of image %s (%s to %s), and no earlier image can be restored", first.SID, first.StartLSN, first.StopLSN)
		}
		return c.unreachable("it lies before the first position that can be restored, %s", first.StopLSN)
	}
	c.take(i, stopAtTarget)
	switch {
	case at <= c.stretch.end:
		// PostgreSQL stops at a record that begins at the target or behind it. If none does, all that happened before it is at
		// hand all the same.
		begins, err := c.s.beginsAt(ctx, c.route, c.stretch, at)
		if err == nil && !begins {
			c.stop = stopAtKnownEnd
		}
		return err
	}
	if next, ok := c.after(c.stretch); ok {
		return c.unreachable("%s, before it", c.gapReason(c.stretch, next))
	}
	return c.unreachable("the archive ends at %s", c.stretch.end)
}

func (c *chooser) time(ctx context.Context) error {
	at := c.target.Time
	i, ok := c.newest(func(i repository.ImageInfo) bool { return !completed(i).After(at) })
	if !ok {
		first := c.images[0]
		if !at.Before(first.StartedAt) {
			return c.unreachable("it lies within the backup of image %s (%s to %s), and no earlier image can be restored",
				first.SID, first.StartedAt.UTC().Format(timeFormat), completed(first).UTC().Format(timeFormat))
		}
		return c.unreachable("it lies before the first moment that can be restored, %s", completed(first).UTC().Format(timeFormat))
	}
	c.take(i, stopAtTarget)
	last, err := c.s.lastTime(ctx, c.route, c.stretch)
	if err != nil {
		return err
	}
	if last != nil && last.Truncate(time.Microsecond).After(at) {
		return nil
	}
	if last != nil && last.Truncate(time.Microsecond).Equal(at) {
		// PostgreSQL stops at the first commit after the target (before one at it, when exclusive) and takes it for an error
		// if none comes.
		if !c.target.Exclusive {
			c.stop = stopAtKnownEnd
		}
		return nil
	}
	if next, ok := c.after(c.stretch); ok {
		return c.unreachable("%s, before it: %s", c.gapReason(c.stretch, next), knownCommit(last))
	}
	if completed(i).Equal(at) {
		c.stop = stopConsistency // nothing was committed since
		return nil
	}
	return c.unreachable("%s, and the archive ends at %s; use the latest moment, or a position, if nothing was committed since", knownCommit(last), c.stretch.end)
}

func knownCommit(last *time.Time) string {
	if last == nil {
		return "no commit after the image is known"
	}
	return "the last commit known is of " + last.UTC().Format(timeFormat)
}

func (c *chooser) plan() *Plan {
	size := c.s.inventory.size
	first, last := size.Number(c.image.StartLSN), size.NumberBefore(c.stretch.end)
	switch {
	case c.stop == stopConsistency:
		last = size.NumberBefore(c.image.StopLSN)
	case c.target.kind() == ToLSN:
		last = min(last, size.Number(c.target.LSN))
	}
	name := func(n uint64) string {
		t, _, ok := c.s.inventory.find(c.route, n)
		if !ok {
			t = c.route.at(size.Start(n))
		}
		return string(postgres.MakeSegmentName(t, n, size))
	}
	_, gap := c.after(c.stretch)
	_, _, more := c.s.inventory.demanded(c.route, c.stretch.end)
	return &Plan{
		Image: c.image.SID.String(), Kind: c.image.Kind, CompletedAt: c.image.CompletedAt, StopLSN: c.image.StopLSN,
		Target: c.target.String(), Timeline: c.route.timeline(), ImageBytes: c.image.SourceBytes,
		WALFrom: name(first), WALTo: name(last), WALSegments: last - first + 1,
		image: c.image, route: c.route, stretch: c.stretch, size: size, target: c.target, stop: c.stop, gap: gap || more, orphan: c.s.inventory.orphan(c.route.timeline()),
	}
}
