package retention

import (
	"fmt"
	"slices"
	"time"

	"github.com/pgark/terraform-provider-pgark/internal/engine/job"
	"github.com/pgark/terraform-provider-pgark/internal/engine/postgres"
	"github.com/pgark/terraform-provider-pgark/internal/engine/repository"
)

// Plan is what Apply will do, with the reasons.
type Plan struct {
	Series string          `json:"series"`
	At     time.Time       `json:"at"`     // the clock that it was made by
	Images []ImageDecision `json:"images"` // all live images, oldest first
	WAL    []WALDecision   `json:"wal"`    // all timelines that have WAL, ascending

	segmentSize postgres.SegmentSize
}

// ImageDecision says what becomes of an image, and why.
type ImageDecision struct {
	ID          string            `json:"id"`
	Kind        string            `json:"kind"`
	StartedAt   time.Time         `json:"started_at"`
	CompletedAt time.Time         `json:"completed_at"`
	StartLSN    postgres.LSN      `json:"start_lsn"`
	StopLSN     postgres.LSN      `json:"stop_lsn"`
	Timeline    postgres.Timeline `json:"timeline"`
	StoredBytes int64             `json:"stored_bytes"`
	Keep        bool              `json:"keep"`
	Reasons     []string          `json:"reasons"`
	Window      bool              `json:"window"` // kept, and so is the WAL that follows it; false: a restore point only, or expired

	sid repository.SID
}

// WALDecision says what becomes of a timeline's WAL, and why.
type WALDecision struct {
	Timeline     postgres.Timeline `json:"timeline"`
	PresentFloor postgres.LSN      `json:"present_floor"`
	Floor        postgres.LSN      `json:"floor"` // WAL that ends at or below it goes, but for what images need to be consistent
	Reason       string            `json:"reason"`
	Files        int               `json:"files"` // stored now
	DeletedFiles int               `json:"deleted_files"`
	DeletedBytes int64             `json:"deleted_bytes"`
	FirstDeleted string            `json:"first_deleted,omitempty"`
	LastDeleted  string            `json:"last_deleted,omitempty"`

	Tails            int   `json:"tails"` // stored now
	DeletedTails     int   `json:"deleted_tails"`
	DeletedTailBytes int64 `json:"deleted_tail_bytes"`

	doomed      []File
	doomedTails []repository.Tail
}

// Changes tells whether the plan removes anything.
func (p *Plan) Changes() bool {
	return slices.ContainsFunc(p.Images, func(i ImageDecision) bool { return !i.Keep }) ||
		slices.ContainsFunc(p.WAL, func(w WALDecision) bool { return w.DeletedFiles > 0 || w.DeletedTails > 0 || w.Floor > w.PresentFloor })
}

// Make plans retention at the moment now. It has no effect.
func Make(s *State, policy Policy, now time.Time) (*Plan, error) {
	if err := policy.Check(); err != nil {
		return nil, fmt.Errorf("plan retention of %s: %w", s.Series, err)
	}
	p := &Plan{Series: s.Series.String(), At: now.UTC(), Images: []ImageDecision{}, WAL: []WALDecision{}}
	m := &maker{s: s, now: now, size: postgres.DefaultSegmentSize}
	if n := len(s.Head.Images); n > 0 {
		m.size = postgres.SegmentSize(s.Head.Images[n-1].SegmentSize)
		if !m.size.Valid() {
			return nil, fmt.Errorf("plan retention of %s: image %s: found WAL segment size %d", s.Series, s.Head.Images[n-1].SID, uint64(m.size))
		}
	}
	p.segmentSize = m.size
	m.readImages()
	m.chooseImages(policy.Images)
	m.chooseRoots(policy.WAL)
	for _, i := range m.images {
		p.Images = append(p.Images, i.decision())
	}
	for _, t := range sortedTimelines(s.Timelines) {
		p.WAL = append(p.WAL, m.decideWAL(t))
	}
	return p, nil
}

func sortedTimelines(m map[postgres.Timeline]*Timeline) []postgres.Timeline {
	ids := make([]postgres.Timeline, 0, len(m))
	for t := range m {
		ids = append(ids, t)
	}
	slices.Sort(ids)
	return ids
}

// maker is a plan in the making.
type maker struct {
	s      *State
	now    time.Time
	size   postgres.SegmentSize
	images []*image // oldest first
}

// image is a live image, or one that a restore session reads.
type image struct {
	repository.ImageInfo
	completed  time.Time // by which rules judge it
	restorable bool
	reasons    []string // why it stays; none: it does not
	root       bool     // all WAL that it can be rolled forward with stays
}

func (i *image) keep(format string, args ...any) {
	i.reasons = append(i.reasons, fmt.Sprintf(format, args...))
}

func (i *image) kept() bool { return len(i.reasons) > 0 }

func (i *image) decision() ImageDecision {
	d := ImageDecision{
		ID: i.SID.String(), Kind: i.Kind, StartedAt: i.StartedAt, CompletedAt: i.CompletedAt,
		StartLSN: i.StartLSN, StopLSN: i.StopLSN, Timeline: i.Timeline, StoredBytes: i.StoredBytes,
		Keep: i.kept(), Reasons: i.reasons, Window: i.kept() && i.root && i.restorable, sid: i.SID,
	}
	if !d.Keep {
		d.Reasons = []string{"no rule keeps it"}
		if !i.restorable {
			d.Reasons = []string{"WAL that would make it consistent is missing, and it is older than all images that stay"}
		}
	}
	return d
}

// readImages judges the head's images. Their times come from the guest's clock, which may be wrong: an image is never
// taken to be older than one before it, and one from the future is taken to be new, but proves nothing for others.
func (m *maker) readImages() {
	var latest time.Time
	for _, info := range m.s.Head.Images {
		i := &image{ImageInfo: info, completed: info.CompletedAt, restorable: m.restorable(info)}
		if i.completed.After(m.now) {
			i.completed = m.now
		} else {
			if i.completed.Before(latest) {
				i.completed = latest
			}
			latest = i.completed
		}
		m.images = append(m.images, i)
	}
}

// restorable tells whether the WAL from the image's start to its stop is there.
func (m *maker) restorable(i repository.ImageInfo) bool {
	for n := m.size.Number(i.StartLSN); n <= m.size.NumberBefore(i.StopLSN); n++ {
		if !m.has(i, n) {
			return false
		}
	}
	return true
}

// has tells whether segment n can be read on the image's timeline: whole, or the .partial that its end left, or as the
// first segment of a timeline that descends from it behind the image, which begins with a copy.
func (m *maker) has(i repository.ImageInfo, n uint64) bool {
	name := string(postgres.MakeSegmentName(i.Timeline, n, m.size))
	if line := m.s.Timelines[i.Timeline]; line.stores(name) || line.stores(name+".partial") {
		return true
	}
	for t, line := range m.s.Timelines {
		if at, ok := line.History.SwitchPoint(i.Timeline); ok && i.StopLSN <= at && m.size.Number(at) == n &&
			line.stores(string(postgres.MakeSegmentName(t, n, m.size))) {
			return true
		}
	}
	return false
}

func (l *Timeline) stores(name string) bool {
	if l == nil {
		return false
	}
	_, ok := slices.BinarySearchFunc(l.Files, name, func(f File, name string) int {
		switch {
		case f.Name < name:
			return -1
		case f.Name > name:
			return 1
		}
		return 0
	})
	return ok
}

// reaches tells whether an image that is consistent at stop on timeline from can be rolled forward along timeline t.
func (m *maker) reaches(from postgres.Timeline, stop postgres.LSN, t postgres.Timeline) bool {
	if from >= t {
		return from == t
	}
	line := m.s.Timelines[t]
	if line == nil || !line.HistoryKnown {
		return true // for all we know
	}
	return line.History.Includes(from, stop)
}

func days(n int) time.Duration { return time.Duration(n) * 24 * time.Hour }

// chooseImages decides which images stay.
func (m *maker) chooseImages(rules job.ImageRetention) {
	if rules == (job.ImageRetention{}) {
		for _, i := range m.images {
			i.keep("no rule expires images")
		}
		return
	}
	last := 0
	buckets := []struct {
		name string
		n    int
		of   func(time.Time) string
		seen map[string]bool
	}{
		{"weekly", rules.Weekly, func(t time.Time) string { y, w := t.ISOWeek(); return fmt.Sprintf("%d-W%02d", y, w) }, map[string]bool{}},
		{"monthly", rules.Monthly, func(t time.Time) string { return t.Format("2006-01") }, map[string]bool{}},
		{"yearly", rules.Yearly, func(t time.Time) string { return t.Format("2006") }, map[string]bool{}},
	}
	for _, i := range slices.Backward(m.images) {
		if !i.restorable {
			continue
		}
		if last == 0 {
			i.keep("the newest image that can be restored")
		}
		if last++; last <= rules.KeepLast {
			i.keep("keep_last %d: number %d of the newest", rules.KeepLast, last)
		}
		for _, b := range buckets {
			if key := b.of(i.completed.UTC()); !b.seen[key] && len(b.seen) < b.n {
				b.seen[key] = true
				i.keep("%s %d: the newest of %s", b.name, b.n, key)
			}
		}
	}
	if rules.KeepDays > 0 {
		for i := range m.inWindow(m.now.Add(-days(rules.KeepDays))) {
			i.keep("keep_days %d: needed to restore moments of the last %d days", rules.KeepDays, rules.KeepDays)
		}
	}
	olderStays, anyRestorable := false, last > 0
	for _, i := range m.images {
		if !i.restorable && (olderStays || !anyRestorable) {
			i.keep("WAL that makes it consistent is missing, but may come")
		}
		olderStays = olderStays || i.kept()
	}
}

// inWindow finds the restorable images that are needed to restore some moment from cutoff on.
func (m *maker) inWindow(cutoff time.Time) map[*image]bool {
	needed := make(map[*image]bool)
	// Timelines on which there may be such moments: all that were written since, and the present one.
	var written []postgres.Timeline
	newest := postgres.Timeline(0)
	for t, line := range m.s.Timelines {
		newest = max(newest, t)
		if !line.LastStoredAt.Before(cutoff) {
			written = append(written, t)
		}
	}
	written = append(written, newest)
	if n := len(m.images); n > 0 {
		written = append(written, m.images[n-1].Timeline)
	}
	for _, t := range written {
		for _, i := range slices.Backward(m.images) {
			if i.restorable && !i.completed.After(cutoff) && m.reaches(i.Timeline, i.StopLSN, t) {
				needed[i] = true
				break
			}
		}
	}
	for _, i := range m.images {
		if i.restorable && i.completed.After(cutoff) {
			needed[i] = true
		}
	}
	// Where no image is old enough for the window's beginning, it begins with the first there is: that is in it.
	return needed
}

// chooseRoots decides which images keep all the WAL that they can be rolled forward with.
func (m *maker) chooseRoots(rule *job.WALRetention) {
	var window map[*image]bool
	var cutoff time.Time
	if rule != nil && rule.KeepDays > 0 {
		cutoff = m.now.Add(-days(rule.KeepDays))
		window = m.inWindowOfKept(cutoff)
	}
	for _, i := range m.images {
		// An image that is not complete yet is judged by its time alone.
		i.root = i.kept() && (window == nil || window[i] || !i.restorable && !i.completed.Before(cutoff))
	}
}

// inWindowOfKept is inWindow among the images that stay.
func (m *maker) inWindowOfKept(cutoff time.Time) map[*image]bool {
	kept := *m
	kept.images = slices.DeleteFunc(slices.Clone(m.images), func(i *image) bool { return !i.kept() })
	return kept.inWindow(cutoff)
}

// decideWAL decides about one timeline.
func (m *maker) decideWAL(t postgres.Timeline) WALDecision {
	line := m.s.Timelines[t]
	d := WALDecision{Timeline: t, PresentFloor: m.s.Head.Floor(t), Files: len(line.Files), Tails: len(line.Tails)}
	d.Floor, d.Reason = m.floor(t, line)
	for _, f := range line.Files {
		w, err := postgres.ParseWALFile(f.Name)
		if err != nil || w.Segment.Check(m.size) != nil {
			continue // Read lets none through; one of another segment size is not ours to judge
		}
		if w.Segment.End(m.size) > d.Floor || m.consistency(t, w.Segment.Number(m.size)) {
			continue
		}
		d.doomed = append(d.doomed, f)
		d.DeletedFiles++
		d.DeletedBytes += f.StoredSize
		d.LastDeleted = f.Name
		if d.FirstDeleted == "" {
			d.FirstDeleted = f.Name
		}
	}
	for _, tail := range line.Tails {
		if m.tailGoes(t, line, tail, d.Floor) {
			d.doomedTails = append(d.doomedTails, tail)
			d.DeletedTails++
			d.DeletedTailBytes += tail.StoredSize
		}
	}
	return d
}

// tailGoes tells whether a tail is of no use any more. The chain of a segment's tails begins at its start, so the segment
// decides and not where the tail ends.
func (m *maker) tailGoes(t postgres.Timeline, line *Timeline, tail repository.Tail, floor postgres.LSN) bool {
	n := m.size.Number(tail.Start)
	if len(m.images) == 0 || m.size.NumberBefore(tail.End) != n {
		return false // images tell the size of segments; one of another size is not ours to judge
	}
	return line.stores(string(postgres.MakeSegmentName(t, n, m.size))) || m.size.Start(n+1) <= floor && !m.consistency(t, n)
}

// consistency tells whether an image that stays needs the segment to become consistent.
func (m *maker) consistency(t postgres.Timeline, n uint64) bool {
	for _, i := range m.images {
		if i.kept() && m.size.Number(i.StartLSN) <= n && n <= m.size.NumberBefore(i.StopLSN) &&
			(i.Timeline == t || m.reaches(i.Timeline, i.StopLSN, t)) {
			return true
		}
	}
	return false
}

// floor is the position on a timeline below which nothing is needed but what makes images consistent.
func (m *maker) floor(t postgres.Timeline, line *Timeline) (postgres.LSN, string) {
	if !slices.ContainsFunc(m.images, (*image).kept) {
		return 0, "the series has no image yet"
	}
	floor, reached, reason := ^postgres.LSN(0), false, ""
	need := func(lsn postgres.LSN, why string) {
		if reached = true; lsn < floor {
			floor, reason = lsn, why
		}
	}
	for _, i := range m.images {
		switch {
		case !i.kept():
		case i.root && i.Timeline == t:
			need(i.StartLSN, fmt.Sprintf("image %s can be rolled forward from there", i.SID))
		case i.root && m.reaches(i.Timeline, i.StopLSN, t):
			need(0, fmt.Sprintf("image %s of timeline %d can be rolled forward along this one", i.SID, uint32(i.Timeline)))
		}
	}
	for _, s := range m.s.Head.Sessions {
		switch {
		case s.Kind != repository.SessionRestore || s.ParentTimeline == 0:
		case s.ParentTimeline == t:
			need(s.ParentStart, fmt.Sprintf("a restore on %s reads image %s", s.Host, s.Parent))
		case m.reaches(s.ParentTimeline, s.ParentStart, t):
			need(0, fmt.Sprintf("a restore on %s reads image %s of timeline %d", s.Host, s.Parent, uint32(s.ParentTimeline)))
		}
	}
	if reached {
		return floor, reason
	}
	if !m.givenUp(t, line) {
		return 0, "no image reaches this timeline, but it may be in use"
	}
	end := postgres.LSN(0)
	if n := len(line.Files); n > 0 {
		f, err := postgres.ParseWALFile(line.Files[n-1].Name)
		if err != nil || f.Segment.Check(m.size) != nil {
			return 0, "its segments have another size"
		}
		end = f.Segment.End(m.size)
	}
	if n := len(line.Tails); n > 0 {
		end = max(end, m.size.Start(m.size.Number(line.Tails[n-1].Start)+1))
	}
	return end, "no image reaches this timeline, and a newer one is in use"
}

// givenUp tells whether nobody writes timeline t any more: a later timeline has an image, and nothing was stored on t
// since that was begun, nor since any image was begun that is still being taken and may turn out to be one of t.
func (m *maker) givenUp(t postgres.Timeline, line *Timeline) bool {
	newest := m.images[len(m.images)-1]
	if newest.Timeline <= t || line.LastStoredAt.IsZero() || !line.LastStoredAt.Before(newest.StartedAt) {
		return false
	}
	for _, s := range m.s.Head.Sessions {
		if s.Kind == repository.SessionImage && !line.LastStoredAt.Before(s.StartedAt) {
			return false
		}
	}
	return true
}
