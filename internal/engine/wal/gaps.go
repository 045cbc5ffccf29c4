package wal

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"github.com/pgark/terraform-provider-pgark/internal/engine/daemon/control"
	"github.com/pgark/terraform-provider-pgark/internal/engine/objectstore"
	"github.com/pgark/terraform-provider-pgark/internal/engine/postgres"
	"github.com/pgark/terraform-provider-pgark/internal/engine/repository"
)

// span is a range of segment numbers, both ends included.
type span struct{ first, last uint64 }

// spans are disjoint, ascending, and do not touch.
type spans []span

// add joins a range with what is there.
func (s *spans) add(first, last uint64) {
	all := *s
	i := 0
	for i < len(all) && all[i].last+1 < first {
		i++
	}
	j := i
	for j < len(all) && all[j].first <= last+1 {
		first, last = min(first, all[j].first), max(last, all[j].last)
		j++
	}
	*s = slices.Replace(all, i, j, span{first, last})
}

// without lists the parts of [first, last] that are not in s.
func (s spans) without(first, last uint64) spans {
	var missing spans
	for _, p := range s {
		if p.last < first {
			continue
		}
		if p.first > last {
			break
		}
		if p.first > first {
			missing = append(missing, span{first, p.first - 1})
		}
		first = p.last + 1
	}
	if first <= last {
		missing = append(missing, span{first, last})
	}
	return missing
}

// chain says which timeline's file recovery takes for a segment, on the way to the end of one timeline: the one that its
// bytes belong to; where a timeline begins within a segment, that timeline's own copy.
type chain struct {
	own     postgres.Timeline
	history postgres.History // empty: of timeline 1, or not known
	size    postgres.SegmentSize
}

// from is the first segment of one of the chain's timelines.
func (c chain) from(t postgres.Timeline) uint64 {
	first := uint64(0)
	for _, a := range c.history {
		if a.Timeline >= t {
			break
		}
		first = c.size.Number(a.Switch)
	}
	return first
}

// at is the timeline of a segment.
func (c chain) at(number uint64) postgres.Timeline {
	for _, a := range c.history {
		if number < c.size.Number(a.Switch) {
			return a.Timeline
		}
	}
	return c.own
}

func (c chain) name(number uint64) string {
	return string(postgres.MakeSegmentName(c.at(number), number, c.size))
}

// timelines lists them, newest first.
func (c chain) timelines() []postgres.Timeline {
	all := []postgres.Timeline{c.own}
	for _, a := range slices.Backward(c.history) {
		if a.Timeline != all[len(all)-1] {
			all = append(all, a.Timeline)
		}
	}
	return all
}

// run is how far WAL is there without a hole, on the way to the end of one timeline.
type run struct {
	chain
	seeded bool
	end    uint64 // everything up to it is there, from where the repository begins
	ahead  spans  // there too, behind a hole

	told    uint64 // holes before this segment were told of by an earlier run
	foreign uint64 // holes before this segment may be another server's work

	// Of the hole behind end.
	since  time.Time // it has been looked for in vain since; zero: it has not
	listed time.Time // when the repository was last asked
}

func (r *run) there(first, last uint64) {
	if last <= r.end && r.seeded {
		return
	}
	r.ahead.add(first, last)
	r.advance()
}

func (r *run) advance() {
	if !r.seeded {
		return
	}
	for len(r.ahead) > 0 && r.ahead[0].first <= r.end+1 {
		if r.ahead[0].last > r.end {
			r.end = r.ahead[0].last
			r.since, r.listed = time.Time{}, time.Time{}
		}
		r.ahead = r.ahead[1:]
	}
}

const (
	// patienceOwn is how long a segment that was ours to ship must be missing. It is nowhere on this machine and not in
	// the repository, and nobody else writes there: the delay is for a second look.
	patienceOwn = 2 * time.Second

	// patienceOther is the same where another server's runner has stored what came before: it may still be at it.
	patienceOther = time.Minute

	// lookBack is how many segments before the first are looked at for holes that an earlier run may not have told of.
	lookBack = 64

	// lookEvery is the time between two looks at a hole, on this machine and in the repository.
	lookEvery = time.Second
)

// GapArchive is what tells a gap from WAL that is merely not ours.
type GapArchive interface {
	ListWAL(ctx context.Context, t postgres.Timeline, from string) iter.Seq2[repository.WALEntry, error]
	StatWAL(ctx context.Context, name string) (repository.WALInfo, error)
	Head(ctx context.Context) (*repository.Head, error)
}

// watcher finds gaps: WAL that PostgreSQL has removed, or never had us store, with later WAL stored behind it. Whether a
// file that is absent is on its way decides the caller's held and ship.
//
// Nothing is asked of the repository as long as segments come one after the other, but once for a timeline to learn
// where it stands. What another server's runner ships to the same series counts.
type watcher struct {
	archive GapArchive
	walDir  string
	size    postgres.SegmentSize
	host    string

	held  func(t postgres.Timeline, from, to uint64) []uint64 // segments that are on their way, or there
	ship  func(name string)                                   // one that still lies in pg_wal
	alarm func(g gap)

	mu   sync.Mutex // guards news
	news []postgres.SegmentName

	// Of check only.
	runs   map[postgres.Timeline]*run
	raised map[postgres.Timeline]*spans // what was told of
}

// gap is a run of segments that is lost.
type gap struct {
	timeline postgres.Timeline // of its last segment
	span
	names [2]string // first and last
}

// note says that a segment is there for good: in the repository, or in the temporary folder.
func (w *watcher) note(name postgres.SegmentName) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.news = append(w.news, name)
}

// lost says that one is not there after all.
func (w *watcher) lost(name postgres.SegmentName) {
	t, n := name.Timeline(), name.Number(w.size)
	w.alarm(gap{timeline: t, span: span{n, n}, names: [2]string{string(name), string(name)}})
}

// check looks at what has come since the last time. It tells whether it should be called again soon, without news. An
// error says that the repository could not be asked; nothing is concluded from that.
func (w *watcher) check(ctx context.Context, now time.Time) (again bool, err error) {
	w.mu.Lock()
	news := w.news
	w.news = nil
	w.mu.Unlock()
	if w.runs == nil {
		w.runs = make(map[postgres.Timeline]*run)
	}
	for _, name := range news {
		t := name.Timeline()
		r := w.runs[t]
		if r == nil {
			r = &run{chain: w.chain(t)}
			w.runs[t] = r
		}
		n := name.Number(w.size)
		r.there(n, n)
	}
	for _, r := range w.runs {
		if len(r.ahead) == 0 {
			continue
		}
		if !r.seeded {
			if err := w.seed(ctx, r); err != nil {
				return true, err
			}
		}
		if len(r.ahead) == 0 {
			continue
		}
		if err := w.look(ctx, r, now); err != nil {
			return true, err
		}
		again = again || len(r.ahead) > 0
	}
	return again, nil
}

// chain reads a timeline's history, which PostgreSQL keeps in pg_wal for ever. Where it is missing, the timeline is taken
// for one without a past: a gap before it goes unnoticed then, and none is made up.
func (w *watcher) chain(t postgres.Timeline) chain {
	c := chain{own: t, size: w.size}
	b, err := os.ReadFile(filepath.Join(w.walDir, postgres.HistoryFileName(t)))
	if err != nil {
		return c
	}
	if h, err := postgres.ParseHistory(t, b); err == nil {
		c.history = h
	}
	return c
}

// seed learns where a timeline stands, from the first segment of it that has come: r.ahead has it.
func (w *watcher) seed(ctx context.Context, r *run) error {
	first := r.ahead[0].first
	begin := func(end uint64) error {
		r.seeded, r.end = true, end
		r.advance()
		return nil
	}
	if first == 0 {
		return begin(0)
	}
	// A timeline that began before our eyes goes on where its ancestor was left.
	own := r.from(r.own)
	if n := len(r.history); n > 0 && first >= own && own > 0 {
		parent := w.runs[r.history[n-1].Timeline]
		if parent != nil && parent.seeded && first == own {
			return begin(min(parent.end, own-1))
		}
	}
	// What is on its way has come, as far as this question goes.
	onTheWay := make(map[uint64]bool)
	for _, t := range r.timelines() {
		for _, n := range w.held(t, r.from(t), first-1) {
			if r.at(n) == t {
				onTheWay[n] = true
			}
		}
	}
	for first > 0 && onTheWay[first-1] {
		first--
	}
	if first == 0 {
		return begin(0)
	}
	// Usually, the segment before is there, and those before it.
	from := uint64(0)
	if first > lookBack {
		from = first - lookBack
	}
	near, err := w.stored(ctx, r, from, first-1)
	if err != nil {
		return err
	}
	if len(near) == 0 {
		// Else the last one before it is where the run was broken off; there is none when the cluster was not protected
		// before.
		last, found, err := w.lastBefore(ctx, r, first)
		if err != nil {
			return err
		}
		if !found {
			for n := range onTheWay {
				if n > 0 && n < first {
					last, found = max(last, n-1), true
				}
			}
			if found {
				return begin(last)
			}
			return begin(first - 1)
		}
		near = spans{{last, last}}
	}
	end, latest := near[0].last, near[len(near)-1].last
	if end == first-1 {
		return begin(end)
	}
	// An earlier run may have told of these holes, or have ended before it did: an image tells. One that was taken because
	// of a gap that we have told of says nothing of others.
	if latest == first-1 && w.raised == nil {
		head, err := w.archive.Head(ctx)
		if err != nil {
			return err
		}
		for _, s := range near[1:] {
			if answered(head, r.size.Start(s.first)) {
				r.told = s.first
			}
		}
	}
	for _, n := range []uint64{end, latest} {
		info, err := w.archive.StatWAL(ctx, r.name(n))
		if err != nil && !errors.Is(err, objectstore.ErrNotExist) { // retention may have come by
			return err
		}
		if err == nil && info.Host != w.host {
			r.foreign = first
		}
	}
	for _, s := range near[1:] {
		r.ahead.add(s.first, s.last)
	}
	return begin(end)
}

// lastBefore finds the last segment of the chain that the repository has before a number.
func (w *watcher) lastBefore(ctx context.Context, r *run, number uint64) (last uint64, found bool, err error) {
	for _, t := range r.timelines() {
		from := r.from(t)
		if from >= number {
			continue
		}
		// What the timeline wrote after it was left belongs to another chain.
		to := number - 1
		for to > from && r.at(to) != t {
			to = r.switchBefore(to)
		}
		if r.at(to) != t {
			continue
		}
		for e, err := range w.archive.ListWAL(ctx, t, string(postgres.MakeSegmentName(t, from, w.size))) {
			if err != nil {
				return 0, false, err
			}
			n, ok := w.number(e.Name)
			if !ok {
				continue
			}
			if n > to {
				break
			}
			last, found = n, true
		}
		if found {
			return last, true, nil
		}
	}
	return 0, false, nil
}

// switchBefore is the last segment before the timeline of number.
func (c chain) switchBefore(number uint64) uint64 {
	from := c.from(c.at(number))
	if from == 0 {
		return 0
	}
	return from - 1
}

// number is that of a whole segment.
func (w *watcher) number(name string) (uint64, bool) {
	f, err := postgres.ParseWALFile(name)
	if err != nil || f.Kind != postgres.SegmentFile || f.Segment.Check(w.size) != nil {
		return 0, false
	}
	return f.Segment.Number(w.size), true
}

// look searches for what is missing between r.end and r.ahead.
func (w *watcher) look(ctx context.Context, r *run, now time.Time) error {
	if now.Sub(r.listed) < lookEvery {
		return nil
	}
	first, last := r.end+1, r.ahead[0].first-1
	// First here, then in the repository: what goes from one to the other meanwhile is found there.
	coming, err := w.coming(r, first, last)
	if err != nil {
		return err
	}
	if len(coming.without(first, last)) == 0 {
		r.since = time.Time{}
		return nil
	}
	r.listed = now
	stored, err := w.stored(ctx, r, first, last)
	if err != nil {
		return err
	}
	for _, s := range stored {
		r.ahead.add(s.first, s.last)
	}
	end := r.end
	r.advance()
	if r.end > end {
		// Somebody else is at it.
		r.listed, r.foreign = now, max(r.foreign, last+1)
		return nil
	}
	for _, s := range stored {
		coming.add(s.first, s.last)
	}
	missing := coming.without(first, last)
	if len(missing) == 0 {
		r.since = time.Time{}
		return nil
	}
	if r.since.IsZero() {
		r.since = now
	}
	patience := patienceOwn
	if first < r.foreign {
		patience = patienceOther
	}
	if now.Sub(r.since) < patience {
		return nil
	}
	head, err := w.archive.Head(ctx)
	if err != nil {
		return err
	}
	for _, m := range missing {
		if m.first >= r.told && matters(head, r.chain, m) {
			w.raise(r.chain, m)
		}
		r.ahead.add(m.first, m.last) // said once
	}
	since := r.since
	r.since = time.Time{}
	r.advance()
	if r.end+1 < r.foreign {
		r.since = since // the other server has had its time for the next hole, too
	}
	return nil
}

// raise tells of a gap, once: the way to the end of several timelines may lead across it.
func (w *watcher) raise(c chain, m span) {
	if w.raised == nil {
		w.raised = make(map[postgres.Timeline]*spans)
	}
	var fresh spans
	for n := m.first; n <= m.last; {
		t := c.at(n)
		last := m.last
		for c.at(last) != t {
			last = c.switchBefore(last)
		}
		if w.raised[t] == nil {
			w.raised[t] = &spans{}
		}
		for _, s := range w.raised[t].without(n, last) {
			fresh.add(s.first, s.last)
		}
		w.raised[t].add(n, last)
		n = last + 1
	}
	for _, s := range fresh {
		w.alarm(gap{timeline: c.at(s.last), span: s, names: [2]string{c.name(s.first), c.name(s.last)}})
	}
}

// matters tells whether a gap costs anything: an image before it, present or in the making, could have been recovered
// across it, and its WAL was not given up on purpose.
func matters(h *repository.Head, c chain, m span) bool {
	start, end := c.size.Start(m.first), c.size.Start(m.last+1)
	if end <= h.Floor(c.at(m.last)) && start <= h.Floor(c.at(m.first)) {
		return false
	}
	for _, s := range h.Sessions {
		if s.Kind == repository.SessionImage {
			return true
		}
	}
	for i := range h.Images {
		image := &h.Images[i]
		if image.StartLSN < end && (image.Timeline == c.own || c.history.Includes(image.Timeline, image.StopLSN)) {
			return true
		}
	}
	return false
}

// answered tells whether an image was taken since a gap that ends there: so somebody was told.
func answered(h *repository.Head, end postgres.LSN) bool {
	for i := range h.Images {
		if h.Images[i].StartLSN >= end {
			return true
		}
	}
	return false
}

// coming lists what is on its way of a range: what the caller holds, and what still lies in pg_wal, which is given to it.
func (w *watcher) coming(r *run, first, last uint64) (spans, error) {
	var all spans
	for _, t := range r.timelines() {
		for _, n := range w.held(t, first, last) {
			if r.at(n) == t {
				all.add(n, n)
			}
		}
	}
	if len(all.without(first, last)) == 0 {
		return all, nil
	}
	names, err := readNames(w.walDir)
	if err != nil {
		return nil, fmt.Errorf("look for wal that is missing in the repository: %w", err)
	}
	for _, name := range names {
		n, ok := w.number(name)
		if ok && n >= first && n <= last && r.name(n) == name && len(all.without(n, n)) > 0 {
			w.ship(name)
			all.add(n, n)
		}
	}
	return all, nil
}

// stored lists what the repository has of a range.
func (w *watcher) stored(ctx context.Context, r *run, first, last uint64) (spans, error) {
	var all spans
	for _, t := range r.timelines() {
		from := max(first, r.from(t))
		if from > last || r.at(from) != t {
			continue
		}
		for e, err := range w.archive.ListWAL(ctx, t, string(postgres.MakeSegmentName(t, from, w.size))) {
			if err != nil {
				return nil, err
			}
			n, ok := w.number(e.Name)
			if !ok {
				continue
			}
			if n > last || r.at(n) != t {
				break
			}
			all.add(n, n)
		}
	}
	return all, nil
}

// control is the gap as status tells it.
func (g gap) control(size postgres.SegmentSize, now time.Time) control.WALGap {
	return control.WALGap{
		FoundAt: now, Timeline: uint32(g.timeline), Segments: g.last - g.first + 1,
		StartLSN: size.Start(g.first).String(), EndLSN: size.Start(g.last + 1).String(),
	}
}
