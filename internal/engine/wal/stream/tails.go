package stream

import (
	"cmp"
	"errors"
	"fmt"
	"hash/crc32"
	"slices"
	"time"

	"github.com/pgark/terraform-provider-pgark/internal/engine/postgres"
	"github.com/pgark/terraform-provider-pgark/internal/engine/repository"
)

const (
	// baseBytes is how much may gather behind a base before it moves: up to there every tail holds what the one before
	// held, and takes its place. So a segment of 16 MiB is at most some 32 tails and the chain a reader follows is short,
	// while a commit costs the compression of half as much on average, a millisecond or two.
	baseBytes = 512 << 10

	// runBytes is how much one tail may hold, unless a single record is longer: what a broken connection to the store
	// costs, and what a tail in flight holds in memory.
	runBytes = 4 << 20

	// bufferStep is the least that is allocated for a run: most never need more, and so the buffer of one that is stored
	// serves another. keepBuffers is how many wait for that.
	bufferStep  = 1 << 20
	keepBuffers = 4

	// bufferBytes bounds what is received and not durable. Beyond it whole segments are the faster way.
	bufferBytes = 64 << 20

	// catchUpBytes is where receiving pauses while the stream brings WAL that had been written before it began: that of
	// the segment in progress, which PostgreSQL keeps anyway.
	catchUpBytes = bufferBytes / 2

	// parallelPuts is how many tails may be in flight, so that a store which is further away than max_lag keeps up.
	parallelPuts = 4

	// failingFor is how long the store may fail before what is in memory is given up for whole segments.
	failingFor = 10 * time.Second

	// synchronousGap is the least time between two tails when commits wait for them: what commits meanwhile shares one.
	synchronousGap = 2 * time.Millisecond

	backoffFirst = 100 * time.Millisecond
	backoffMost  = 2 * time.Second

	// rememberStored is how many whole segments are remembered as durable, for a stream that is behind the shipper.
	rememberStored = 1024

	// deleteBatch is how many superseded tails make a request to delete them worthwhile before the segment is whole.
	deleteBatch = 500

	// forgetGarbage bounds the tails that wait to be deleted while the store does not let us. Retention removes the rest.
	forgetGarbage = 16 << 10

	// rememberMarks bounds how precisely the age of WAL is known that is not durable.
	rememberMarks = 256
)

// errDiverged says that bytes which were streamed before came again and were others.
var errDiverged = errors.New("the server sent other WAL than before at the same position of the same timeline")

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// ledger is the memory of one timeline: what was received of it, what is to be stored as a tail when, what is stored, and
// how far all of it is durable. It does no input or output and knows no time but what it is told, so that its rules can
// be tested. Not safe for concurrent use.
//
// A segment's bytes are cut in runs, each beginning at a base where the one before ends. A run in progress is stored again
// and again, from its base to the last whole record, until it has baseBytes; then it is closed and the next begins.
type ledger struct {
	timeline    postgres.Timeline
	size        postgres.SegmentSize
	maxLag      time.Duration
	synchronous bool
	budget      *budget

	segments []*segment // ascending; the last is the one that the stream is in. Those that are stored whole have gone
	floor    postgres.LSN

	at        postgres.LSN // position in the stream: of the byte that comes next
	want      postgres.LSN // of the byte that memory needs next; at, as long as buffering
	ends      postgres.LSN // of the last whole record
	serverEnd postgres.LSN
	catchUpTo postgres.LSN // where the server stood when the stream began

	buffering bool         // what arrives is kept
	rejoin    bool         // the stream was started again below want, and what comes up to there is known
	lostAt    time.Time    // when buffering ended
	dropped   bool         // and that was because of drop
	summed    postgres.LSN // end of the last whole record that is in memory
	sum, came uint32       // CRC-32C of the segment's bytes: up to summed, and of those that came again

	inFlight   []*cut
	memory     int64    // capacity of all runs' buffers
	free       [][]byte // buffers of bufferStep that no run has
	lastFlush  time.Time
	latency    time.Duration // of a PUT, smoothed
	lastStored time.Time     // when the newest tail that was stored had been begun

	failures     int // in a row
	failingSince time.Time
	notBefore    time.Time // no PUT earlier
	starved      bool      // the budget keeps WAL waiting for longer than maxLag

	wholes    []postgres.SegmentName // known to be stored, in the order of their storing
	completed []postgres.SegmentName
	garbage   []repository.Tail
	deleteNow bool
	sweep     []postgres.SegmentName // stored segments of which an earlier run of the runner may have left tails
	marks     []mark
}

// mark says when WAL up to a position had arrived.
type mark struct {
	end postgres.LSN
	at  time.Time
}

// segment is one that is not stored whole yet.
type segment struct {
	name       postgres.SegmentName
	start, end postgres.LSN
	runs       []*run // in order, without holes between them; only the last may be open
	whole      bool   // the stream has passed its end
	stored     bool   // the whole segment is durable
	inherited  bool   // an earlier run of the runner may have left tails
	halted     bool   // another cluster stores tails of it

	pendingSince time.Time // when the first whole record beyond flushTo had arrived; zero: there is none
	commits      bool      // somebody may wait for what is pending
	flushTo      postgres.LSN
	spare        []repository.Tail // stored, or perhaps stored, and of no use once the segment is
}

// run is a stretch of a segment that tails are cut from, all of which begin where it begins.
type run struct {
	start  postgres.LSN
	end    postgres.LSN // 0 while open
	data   []byte       // from start; nil once all of it is stored
	stored postgres.LSN // end of the longest tail that is stored; start: none is
	live   *repository.Tail
	dead   bool // given up: what is still in flight of it counts no more

	sum, storedSum uint32 // of the segment's bytes up to end, once there is one, and up to stored

	firstTime, lastTime time.Time // of commits in it
}

// cut is a tail to be stored.
type cut struct {
	tail                repository.Tail
	raw                 []byte
	firstTime, lastTime time.Time

	ledger  *ledger
	segment *segment
	run     *run
	sum     uint32
	begun   time.Time
}

// begin starts an empty ledger where the server's WAL stands: at the start of a segment. awaited are earlier segments, of
// this timeline or one that it descends from, that are not durable yet.
func (l *ledger) begin(now time.Time, start postgres.LSN, awaited []postgres.SegmentName) {
	l.at, l.want, l.ends, l.summed = start, start, start, start
	for _, name := range awaited {
		if name.Timeline() <= l.timeline && name.Start(l.size) < start && !slices.Contains(l.wholes, name) {
			s := l.newSegment(name, allOurs)
			s.whole = true
			l.segments = append(l.segments, s)
		}
	}
	slices.SortFunc(l.segments, func(a, b *segment) int { return cmp.Compare(a.start, b.start) })
	if len(l.segments) > 0 {
		l.marks = append(l.marks, mark{start, now})
	}
	l.segments = append(l.segments, l.newSegment(postgres.SegmentAt(l.timeline, start, l.size), inherited))
	l.buffering = !l.last().stored
}

const (
	inherited = true
	allOurs   = false
)

func (l *ledger) newSegment(name postgres.SegmentName, inherits bool) *segment {
	start := name.Start(l.size)
	return &segment{
		name: name, start: start, end: name.End(l.size), flushTo: start, inherited: inherits,
		stored: slices.Contains(l.wholes, name),
	}
}

// lacking are the segments that are not durable, but for the one in progress.
func (l *ledger) lacking() []postgres.SegmentName {
	var names []postgres.SegmentName
	for _, s := range l.segments {
		if s.covered() < s.end && s != l.last() {
			names = append(names, s.name)
		}
	}
	return names
}

func (l *ledger) last() *segment { return l.segments[len(l.segments)-1] }

// started says that the stream begins at from, a segment's start, and that the server's WAL ended at serverEnd.
func (l *ledger) started(from, serverEnd postgres.LSN) {
	l.at, l.catchUpTo = from, serverEnd
	l.serverEnd = max(l.serverEnd, serverEnd)
	l.rejoin, l.came = true, 0
}

// interrupted says that the stream has ended. The server may replace what follows the last whole record when it recovers
// from a crash, so that is forgotten.
func (l *ledger) interrupted() {
	if !l.buffering {
		return
	}
	l.buffering = false
	s := l.last()
	r := s.open()
	if s.whole || r == nil {
		return
	}
	end := max(l.summed, r.start)
	r.data = r.data[:end-r.start]
	l.want = end
}

// room tells whether there is room for more of what the server has had for long.
func (l *ledger) room() bool { return l.memory < catchUpBytes || l.at >= l.catchUpTo }

// stretch is how many of n bytes at pos may arrive together: they lie in one segment, and on one side of want.
func (l *ledger) stretch(pos postgres.LSN, n int) int {
	n = int(min(uint64(n), uint64(l.size)-l.size.Offset(pos)))
	if l.rejoin && pos < l.want {
		n = int(min(uint64(n), uint64(l.want-pos)))
	}
	return n
}

// arrive takes the next bytes of the stream, as many as stretch allows. ends is the end of the last record that is whole
// with them, passed what came by in them. Its error is errDiverged or a fault of the caller.
func (l *ledger) arrive(now time.Time, b []byte, ends postgres.LSN, passed postgres.PassedRecords) error {
	start := l.at
	if err := l.enter(now, start); err != nil {
		return err
	}
	l.at += postgres.LSN(len(b))
	s := l.last()
	if start < s.start {
		return nil // an earlier segment comes once more
	}
	if ends > l.ends {
		l.ends = ends
		l.mark(now)
	}
	if l.rejoin {
		if start < l.want {
			if start == s.start {
				l.came = 0
			}
			l.came = crc32.Update(l.came, castagnoli, b)
			if l.at == l.want && l.want == l.summed && l.came != l.sum {
				return fmt.Errorf("%w: %s to %s of timeline %d", errDiverged, s.start, l.want, uint32(l.timeline))
			}
			return nil
		}
		l.rejoin = false
		l.buffering = !s.stored && !s.halted && !s.whole
		l.dropped = l.dropped && !l.buffering
	}
	if l.buffering && !l.keep(s, b, ends, passed) {
		l.drop(now)
	}
	if l.buffering {
		l.settle(now, s, passed.Commits > 0)
	}
	if l.at == s.end && !s.whole {
		l.pass(now, s)
	}
	return nil
}

// enter makes the segment that holds pos the last one, if it is beyond it.
func (l *ledger) enter(now time.Time, pos postgres.LSN) error {
	if pos < l.last().end {
		return nil
	}
	start := l.size.Start(l.size.Number(pos))
	if pos != start {
		return fmt.Errorf("timeline %d: the stream goes on at %s, expected the start of a segment", uint32(l.timeline), pos)
	}
	if s := l.last(); !s.whole {
		l.pass(now, s) // the stream has leapt over its end: the server went on while we were away
	}
	name := l.last().name.Next(l.size)
	for ; name.Start(l.size) < start; name = name.Next(l.size) {
		s := l.newSegment(name, allOurs)
		l.segments = append(l.segments, s)
		l.pass(now, s)
	}
	s := l.newSegment(name, allOurs)
	l.segments = append(l.segments, s)
	l.prune()
	l.want, l.summed, l.sum = start, start, 0
	l.rejoin = false
	// A segment that the server has finished is on its way as a whole: tails of it would come too late.
	l.buffering = !s.stored && l.serverEnd < s.end && (!l.dropped || l.failures == 0)
	l.dropped = l.dropped && !l.buffering
	if !l.buffering && !l.dropped {
		l.lostAt = now
	}
	return nil
}

// pass notes that s lies whole in the server's pg_wal.
func (l *ledger) pass(now time.Time, s *segment) {
	s.whole = true
	l.completed = append(l.completed, s.name)
	r := s.open()
	if r == nil {
		return
	}
	l.close(s, r, min(s.end, r.start+postgres.LSN(len(r.data))))
	if s.flushTo < r.end && s.pendingSince.IsZero() {
		s.pendingSince = now
	}
}

// keep appends to the run that is open. It reports false if there is no room for it.
func (l *ledger) keep(s *segment, b []byte, ends postgres.LSN, passed postgres.PassedRecords) bool {
	r := s.open()
	if r == nil {
		r = &run{start: l.want, stored: l.want}
		s.runs = append(s.runs, r)
	}
	if !l.grow(r, len(r.data)+len(b)) {
		return false
	}
	r.data = append(r.data, b...)
	l.want += postgres.LSN(len(b))
	if r.firstTime.IsZero() {
		r.firstTime = passed.FirstTime
	}
	if !passed.LastTime.IsZero() {
		r.lastTime = passed.LastTime
	}
	if to := min(ends, l.want); to > l.summed {
		from := max(l.summed, r.start)
		l.sum = crc32.Update(l.sum, castagnoli, r.data[from-r.start:to-r.start])
		l.summed = to
	}
	return true
}

// settle closes the open run if it is long enough, and notes that something is to be stored.
func (l *ledger) settle(now time.Time, s *segment, commits bool) {
	r := s.open()
	if r == nil {
		return
	}
	end := l.cuttable(r)
	if end > s.flushTo {
		if s.pendingSince.IsZero() {
			s.pendingSince = now
		}
		s.commits = s.commits || commits
	}
	if end-r.start >= runBytes {
		l.close(s, r, end)
	}
}

// grow makes room for size bytes in r, if memory allows.
func (l *ledger) grow(r *run, size int) bool {
	have := cap(r.data)
	if size <= have {
		return true
	}
	want := max(bufferStep, have)
	for want < size {
		want *= 2
	}
	if l.memory+int64(want-have) > bufferBytes {
		return false
	}
	old := r.data
	r.data = append(l.buffer(want), old...)
	l.memory += int64(want)
	l.recycle(r, old)
	return true
}

// buffer returns an empty buffer.
func (l *ledger) buffer(size int) []byte {
	if n := len(l.free); n > 0 && size == bufferStep {
		b := l.free[n-1]
		l.free = l.free[:n-1]
		return b
	}
	return make([]byte, 0, size)
}

// release forgets the bytes of r.
func (l *ledger) release(r *run) {
	old := r.data
	r.data = nil
	l.recycle(r, old)
}

// recycle gives up a buffer of r, and keeps it for another run unless a tail in flight refers to it.
func (l *ledger) recycle(r *run, b []byte) {
	l.memory -= int64(cap(b))
	if cap(b) != bufferStep || len(l.free) == keepBuffers || slices.ContainsFunc(l.inFlight, func(c *cut) bool { return c.run == r }) {
		return
	}
	l.free = append(l.free, b[:0])
}

// close ends a run that is open; what lies behind its end begins the next.
func (l *ledger) close(s *segment, r *run, end postgres.LSN) {
	if end == r.start {
		l.release(r)
		s.runs = slices.DeleteFunc(s.runs, func(o *run) bool { return o == r })
		return
	}
	rest := r.data[end-r.start:]
	r.end, r.sum, r.data = end, l.sum, r.data[:end-r.start]
	if len(rest) > 0 {
		// The beginning of a record. It was within bounds where it lay, so it is here.
		next := &run{start: end, stored: end, data: append(l.buffer(max(bufferStep, len(rest))), rest...)}
		l.memory += int64(cap(next.data))
		s.runs = append(s.runs, next)
	}
	l.releaseIfStored(r)
}

func (l *ledger) releaseIfStored(r *run) {
	if r.end != 0 && r.stored == r.end {
		l.release(r)
	}
}

func (s *segment) open() *run {
	if n := len(s.runs); n > 0 && s.runs[n-1].end == 0 {
		return s.runs[n-1]
	}
	return nil
}

// cuttable is how far a tail of r may reach now.
func (l *ledger) cuttable(r *run) postgres.LSN {
	if r.end != 0 {
		return r.end
	}
	return max(r.start, l.summed)
}

// begunTo is how far r is stored, or on its way.
func (l *ledger) begunTo(r *run) postgres.LSN {
	end := r.stored
	for _, c := range l.inFlight {
		if c.run == r {
			end = max(end, c.tail.End)
		}
	}
	return end
}

// gap is the time from one tail to the next while WAL goes on coming: so long that requests are not wasted, so short that
// max_lag holds even when a PUT takes four times as long as lately.
func (l *ledger) gap() time.Duration {
	if l.synchronous {
		return synchronousGap
	}
	return min(max(l.maxLag-4*l.latency, l.maxLag/10), l.maxLag/2)
}

// due is when what is pending in s is to be stored; false: nothing is.
func (l *ledger) due(s *segment) (time.Time, bool) {
	if s.pendingSince.IsZero() {
		return time.Time{}, false
	}
	free := l.lastFlush.Add(l.gap())
	switch {
	case l.synchronous:
		return later(s.pendingSince, free), true
	case s.whole:
		// It is on its way as a whole, and most likely durable before this is over: then its last tail is not needed.
		return s.pendingSince.Add(l.gap()), true
	case s.commits:
		return later(s.pendingSince, free), true
	}
	return later(s.pendingSince.Add(l.maxLag/2), free), true
}

func later(a, b time.Time) time.Time {
	if a.Before(b) {
		return b
	}
	return a
}

// earlier is the earlier of two times, of which the zero one is never.
func earlier(a, b time.Time) time.Time {
	if a.IsZero() || b.Before(a) {
		return b
	}
	return a
}

// plan returns the next tail to be stored now. If there is none, it says when to look again; never, if that is zero,
// until something else happens. slots is how many more may be in flight.
func (l *ledger) plan(now time.Time, slots int) (*cut, time.Time) {
	var wake time.Time
	for _, s := range l.segments {
		if s.stored || s.halted {
			continue
		}
		if at, ok := l.due(s); ok {
			if at.After(now) {
				wake = earlier(wake, at)
			} else {
				l.flush(now, s)
			}
		}
		for _, r := range s.runs {
			end := l.cuttable(r)
			if l.begunTo(r) >= min(end, s.flushTo) {
				continue
			}
			if slots <= 0 || l.failures > 0 && len(l.inFlight) > 0 {
				// While the store fails one request is enough to find out when it does not any more.
				return nil, wake
			}
			if l.notBefore.After(now) {
				return nil, earlier(wake, l.notBefore)
			}
			if ok, at := l.budget.take(now); !ok {
				if oldest := l.oldest(); !oldest.IsZero() && now.Sub(oldest) > l.maxLag {
					l.starved = true
				}
				return nil, earlier(wake, at)
			}
			return l.cut(now, s, r, end), wake
		}
	}
	return nil, wake
}

// flush wants all that is whole in s stored.
func (l *ledger) flush(now time.Time, s *segment) {
	s.pendingSince, s.commits = time.Time{}, false
	if n := len(s.runs); n > 0 {
		s.flushTo = l.cuttable(s.runs[n-1])
	}
	if !s.whole {
		l.lastFlush = now
	}
}

// hurry wants everything stored at once.
func (l *ledger) hurry(now time.Time) {
	for _, s := range l.segments {
		if !s.pendingSince.IsZero() {
			l.flush(now, s)
		}
	}
}

// busy tells whether there is anything to be stored, or on its way.
func (l *ledger) busy() bool {
	if len(l.inFlight) > 0 {
		return true
	}
	for _, s := range l.segments {
		if s.stored || s.halted {
			continue
		}
		for _, r := range s.runs {
			if r.stored < l.cuttable(r) {
				return true
			}
		}
	}
	return false
}

// cut makes a tail of r up to end.
func (l *ledger) cut(now time.Time, s *segment, r *run, end postgres.LSN) *cut {
	c := &cut{
		tail:      repository.Tail{Timeline: l.timeline, Start: r.start, End: end},
		firstTime: r.firstTime, lastTime: r.lastTime,
		ledger: l, segment: s, run: r, sum: r.sum, begun: now,
	}
	if r.end == 0 {
		c.sum = l.sum // end is where it stands
		s.flushTo = end
		s.pendingSince, s.commits = time.Time{}, false
		if end-r.start >= baseBytes {
			l.close(s, r, end)
		}
	}
	n := int(end - r.start)
	c.raw = r.data[:n:n]
	l.inFlight = append(l.inFlight, c)
	return c
}

func (l *ledger) landed(c *cut) {
	l.inFlight = slices.DeleteFunc(l.inFlight, func(o *cut) bool { return o == c })
}

// put says that c is durable.
func (l *ledger) put(now time.Time, c *cut) {
	l.landed(c)
	if took := now.Sub(c.begun); l.latency == 0 {
		l.latency = took
	} else {
		l.latency += (took - l.latency) / 4
	}
	l.lastStored = later(l.lastStored, c.begun)
	l.storeWorks()
	s, r := c.segment, c.run
	switch {
	case s.stored:
		l.discard(c.tail)
		l.deleteNow = true
	case r.dead, r.live != nil && c.tail.End <= r.live.End:
		// A longer one of the same base arrived before it. It may be superseded, but whoever reads may hold it still: it
		// goes with the others.
		if r.dead {
			s.spare = append(s.spare, c.tail)
		} else {
			l.discard(c.tail)
		}
	default:
		if r.live != nil {
			l.discard(*r.live)
		}
		r.live, r.stored, r.storedSum = &c.tail, c.tail.End, c.sum
		l.releaseIfStored(r)
	}
	l.prune()
}

// failed says that c may or may not be stored, but that nobody can rely on it.
func (l *ledger) failed(now time.Time, c *cut) {
	l.landed(c)
	if c.segment.stored {
		l.discard(c.tail)
		l.deleteNow = true
	} else {
		c.segment.spare = append(c.segment.spare, c.tail)
	}
	l.prune()
	if c.begun.Before(l.lastStored) {
		return // one that was begun later has succeeded since
	}
	if l.failingSince.IsZero() {
		l.failingSince = c.begun
	}
	l.notBefore = now.Add(min(backoffFirst<<min(l.failures, 10), backoffMost))
	l.failures++
	l.check(now)
}

// conflict says that another cluster has stored c's name with other content: no more tails of that segment.
func (l *ledger) conflict(c *cut) {
	l.landed(c)
	s := c.segment
	s.halted, s.pendingSince = true, time.Time{}
	l.truncate(s, func(*run) bool { return false })
	if s == l.last() {
		l.buffering, l.rejoin = false, false
	}
	l.prune()
}

// check gives up what is in memory if the store has been failing for too long. A little may stay: it costs nothing, and a
// server that writes little need not be read again.
func (l *ledger) check(now time.Time) {
	if !l.failingSince.IsZero() && now.Sub(l.failingSince) > failingFor && l.behind() > runBytes {
		l.drop(now)
	}
}

// behind is how many bytes in memory are not durable.
func (l *ledger) behind() int64 {
	var sum int64
	for _, s := range l.segments {
		for _, r := range s.runs {
			if r.data != nil {
				sum += int64(len(r.data)) - int64(r.stored-r.start)
			}
		}
	}
	return sum
}

// drop gives up what is in memory and not durable, but for one tail at the edge, whose success will tell that the store
// works again, and those in flight. From there on only whole segments make WAL durable, until buffering begins again.
func (l *ledger) drop(now time.Time) {
	probe := true
	for _, s := range l.segments {
		if s.stored || s.halted {
			continue
		}
		l.truncate(s, func(r *run) bool {
			end := l.cuttable(r)
			switch {
			case end == r.start:
				return false
			case l.begunTo(r) == end:
				return true
			case probe && cap(r.data) <= 2*runBytes:
				probe = false
				return true
			}
			return false
		})
	}
	if l.buffering {
		l.lostAt, l.dropped = now, true
	}
	l.buffering = false
}

// truncate closes the runs of s, and gives up all from the first on that is neither stored nor wanted by keep.
func (l *ledger) truncate(s *segment, keep func(*run) bool) {
	at, sum := s.start, uint32(0)
	for i, r := range s.runs {
		if r.end == 0 || r.stored < r.end {
			if !keep(r) {
				rest := slices.Clone(s.runs[i:])
				s.runs = s.runs[:i:i]
				if r.stored > r.start {
					// What is stored of it stays; a longer tail that is on its way comes too late to count.
					s.runs = append(s.runs, &run{start: r.start, end: r.stored, stored: r.stored, sum: r.storedSum, live: r.live})
					at, sum = r.stored, r.storedSum
					r.live = nil
				}
				for _, o := range rest {
					l.abandon(s, o)
				}
				break
			}
			if r.end == 0 {
				end := l.cuttable(r)
				r.data = r.data[:end-r.start] // what lies behind begins a record that is given up
				l.close(s, r, end)
			}
		}
		at, sum = r.end, r.sum
	}
	if s == l.last() && !s.whole {
		l.want, l.summed, l.sum = at, at, sum
	}
}

// abandon gives up a run of s.
func (l *ledger) abandon(s *segment, r *run) {
	r.dead = true
	l.release(r)
	if r.live != nil {
		s.spare = append(s.spare, *r.live)
	}
}

// segmentStored says that a segment is durable as a whole: its tails may go.
func (l *ledger) segmentStored(name postgres.SegmentName) {
	if len(l.wholes) == rememberStored {
		l.wholes = slices.Delete(l.wholes, 0, 1)
	}
	l.wholes = append(l.wholes, name)
	l.storeWorks()
	for _, s := range l.segments {
		if s.name != name || s.stored {
			continue
		}
		s.stored = true
		l.discard(s.spare...)
		for _, r := range s.runs {
			if r.live != nil {
				l.discard(*r.live)
			}
			l.release(r)
		}
		s.runs, s.spare = nil, nil
		l.deleteNow = true
		if s.inherited {
			l.sweep = append(l.sweep, s.name)
		}
		if s == l.last() {
			l.buffering = false // the shipper is ahead of the stream
		}
	}
	l.prune()
}

// segmentLost says that a finished segment will never be durable as a whole: what follows does not wait for it any more.
// Its tails stay, since they are all there is of it.
func (l *ledger) segmentLost(name postgres.SegmentName) {
	last := l.last()
	l.segments = slices.DeleteFunc(l.segments, func(s *segment) bool {
		if s.name != name || s == last {
			return false
		}
		for _, r := range s.runs {
			l.release(r)
		}
		return true
	})
	l.prune()
}

// storeWorks ends a time of failures.
func (l *ledger) storeWorks() {
	l.failures, l.failingSince, l.notBefore = 0, time.Time{}, time.Time{}
}

// discard leaves tails to be deleted.
func (l *ledger) discard(tails ...repository.Tail) {
	l.garbage = append(l.garbage, tails...)
	if n := len(l.garbage) - forgetGarbage; n > 0 {
		l.garbage = slices.Delete(l.garbage, 0, n)
	}
}

// takeGarbage returns the tails to be deleted now, if it is worth a request.
func (l *ledger) takeGarbage() []repository.Tail {
	if len(l.garbage) < deleteBatch && (!l.deleteNow || len(l.garbage) == 0) {
		return nil
	}
	g := l.garbage
	l.garbage, l.deleteNow = nil, false
	return g
}

// prune forgets segments that are stored whole.
func (l *ledger) prune() {
	l.floor = l.durable()
	last := l.last()
	l.segments = slices.DeleteFunc(l.segments, func(s *segment) bool { return s.stored && s != last })
}

// covered is how far s is durable without a hole, by tails or as a whole.
func (s *segment) covered() postgres.LSN {
	if s.stored {
		return s.end
	}
	at := s.start
	for _, r := range s.runs {
		at = r.stored
		if r.end == 0 || at < r.end {
			break
		}
	}
	return at
}

// durable is how far all WAL is durable.
func (l *ledger) durable() postgres.LSN {
	at := l.floor
	for _, s := range l.segments {
		at = max(at, s.covered())
		if s.covered() < s.end {
			break
		}
	}
	return at
}

// mark notes when the WAL up to ends had arrived.
func (l *ledger) mark(now time.Time) {
	const coarse = 10 * time.Millisecond
	if n := len(l.marks); n > 0 && now.Sub(l.marks[n-1].at) < coarse {
		l.marks[n-1].end = l.ends
		return
	}
	l.oldest() // forgets those that are durable
	if len(l.marks) == rememberMarks {
		for i := range rememberMarks / 2 {
			l.marks[i] = mark{end: l.marks[2*i+1].end, at: l.marks[2*i].at}
		}
		l.marks = l.marks[:rememberMarks/2]
	}
	l.marks = append(l.marks, mark{l.ends, now})
}

// oldest is when the oldest WAL that is not durable had arrived; zero: all is.
func (l *ledger) oldest() time.Time {
	durable := l.durable()
	i := 0
	for i < len(l.marks) && l.marks[i].end <= durable {
		i++
	}
	l.marks = slices.Delete(l.marks, 0, i)
	if len(l.marks) == 0 {
		return time.Time{}
	}
	return l.marks[0].at
}

// rejoinAt tells when the stream is to be started again at the start of the segment in progress, because what memory has
// lost of it is nowhere else; false: not as things are.
func (l *ledger) rejoinAt() (time.Time, bool) {
	s := l.last()
	if l.buffering || l.rejoin || s.stored || s.whole || s.halted || !l.failingSince.IsZero() || l.serverEnd >= s.end {
		return time.Time{}, false
	}
	// If WAL comes fast the next segment begins before that, and nothing need be sent twice.
	return l.lostAt.Add(max(5*time.Second, 5*l.maxLag)), true
}

// takeCompleted returns the segments that the stream has passed since the last call.
func (l *ledger) takeCompleted() []postgres.SegmentName {
	names := l.completed
	l.completed = nil
	return names
}
