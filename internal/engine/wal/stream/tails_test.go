package stream

import (
	"bytes"
	"errors"
	"fmt"
	"slices"
	"testing"
	"time"

	"pgregory.net/rapid"

	"github.com/pgark/terraform-provider-pgark/internal/engine/postgres"
	"github.com/pgark/terraform-provider-pgark/internal/engine/repository"
)

// walPattern is what the made-up WAL consists of: the byte at a position depends on the position alone, so that a server
// that sends something again sends the same. Its length is a prime.
var walPattern = func() []byte {
	b := make([]byte, 1<<20-3)
	x := uint32(1)
	for i := range b {
		x = x*1664525 + 1013904223
		b[i] = byte(x >> 24)
	}
	return b
}()

func walBytes(from, to postgres.LSN) []byte {
	b := make([]byte, 0, to-from)
	for at := from; at < to; {
		offset := int(uint64(at) % uint64(len(walPattern)))
		part := walPattern[offset:min(len(walPattern), offset+int(to-at))]
		b = append(b, part...)
		at += postgres.LSN(len(part))
	}
	return b
}

// simulation is a server that writes, a connection that may break, and a store that may fail, around a ledger.
type simulation struct {
	t       rapid.TB
	l       *ledger
	now     time.Time
	size    postgres.SegmentSize
	base    postgres.LSN
	records []postgres.LSN // ends of records written, ascending; the last may lie beyond flushed
	commits map[postgres.LSN]bool
	flushed postgres.LSN // the server's end of WAL
	sent    postgres.LSN // the stream's position, while connected
	linked  bool

	flight []landing
	tails  map[repository.Tail]bool // in the store
	wholes map[postgres.LSN]bool
	lost   bool // memory was given up, or segments went by, at some time
	puts   int
	broken int // connections
	most   int
}

// landing is the end of a PUT.
type landing struct {
	cut *cut
	at  time.Time
	ok  bool
}

var epoch = time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)

func newSimulation(t rapid.TB, size postgres.SegmentSize, synchronous bool) *simulation {
	m := &simulation{
		t: t, now: epoch, size: size, base: 5 * postgres.LSN(size), commits: map[postgres.LSN]bool{},
		tails: map[repository.Tail]bool{}, wholes: map[postgres.LSN]bool{},
	}
	m.flushed = m.base
	m.l = &ledger{timeline: 1, size: size, maxLag: time.Second, synchronous: synchronous}
	m.l.begin(m.now, m.base, nil)
	m.connect()
	return m
}

func (m *simulation) connect() {
	from := m.size.Start(m.size.Number(m.flushed))
	m.l.started(from, m.flushed)
	m.sent, m.linked = from, true
}

func (m *simulation) disconnect() {
	m.l.interrupted()
	m.linked = false
	m.broken++
	// A server that has crashed goes back to the last whole record.
	if n := len(m.records); n > 0 && m.records[n-1] > m.flushed {
		m.records = m.records[:n-1]
		m.flushed = m.ends(m.flushed)
	}
}

func (m *simulation) ends(at postgres.LSN) postgres.LSN {
	i, ok := slices.BinarySearch(m.records, at)
	switch {
	case ok:
		return at
	case i == 0:
		return m.base
	}
	return m.records[i-1]
}

// write appends a record of n bytes, of which all but unsent are flushed.
func (m *simulation) write(n, unsent int, commit bool) {
	last := m.base
	if k := len(m.records); k > 0 {
		last = m.records[k-1]
	}
	m.flushed = max(m.flushed, last)
	end := last + postgres.LSN(n)
	m.records = append(m.records, end)
	m.commits[end] = commit
	m.flushed = max(m.flushed, end-postgres.LSN(min(unsent, n-1)))
}

// deliver sends what the server has, in messages as a walsender makes them.
func (m *simulation) deliver() {
	if !m.linked {
		return
	}
	if next := m.size.Start(m.size.Number(m.flushed)); m.sent < m.base {
		m.sent = next
	}
	m.l.serverEnd = max(m.l.serverEnd, m.flushed)
	for m.sent < m.flushed && m.l.room() {
		n := m.l.stretch(m.sent, int(min(128<<10, m.flushed-m.sent)))
		before := m.ends(m.sent)
		m.sent += postgres.LSN(n)
		ends := m.ends(m.sent)
		var p postgres.PassedRecords
		for _, r := range m.records {
			if r > before && r <= ends && m.commits[r] {
				p.Commits++
				p.FirstTime, p.LastTime = m.now, m.now
			}
		}
		if err := m.l.arrive(m.now, walBytes(m.sent-postgres.LSN(n), m.sent), ends, p); err != nil {
			m.t.Fatalf("arrive: %v", err)
		}
		if m.l.memory > bufferBytes+2*runBytes {
			m.t.Fatalf("%d bytes in memory", m.l.memory)
		}
	}
	m.lost = m.lost || !m.l.buffering
}

// store begins what is planned, each with the outcome that fate gives it.
func (m *simulation) store(fate func() (latency time.Duration, ok bool)) (wake time.Time) {
	m.l.check(m.now)
	for {
		c, at := m.l.plan(m.now, parallelPuts-len(m.flight))
		if c == nil {
			wake = at
			break
		}
		m.puts++
		if !bytes.Equal(c.raw, walBytes(c.tail.Start, c.tail.End)) {
			m.t.Fatalf("tail %s has other bytes than the server", c.tail)
		}
		if m.ends(c.tail.End) != c.tail.End && m.size.Offset(c.tail.End) != 0 {
			m.t.Fatalf("tail %s ends within a record", c.tail)
		}
		if m.size.Number(c.tail.Start) != m.size.NumberBefore(c.tail.End) {
			m.t.Fatalf("tail %s lies in two segments", c.tail)
		}
		latency, ok := fate()
		m.flight = append(m.flight, landing{c, m.now.Add(latency), ok})
		m.most = max(m.most, len(m.flight))
		if len(m.flight) > parallelPuts {
			m.t.Fatalf("%d tails in flight", len(m.flight))
		}
	}
	for _, g := range m.l.takeGarbage() {
		delete(m.tails, g)
	}
	m.check()
	return wake
}

// land ends the PUTs whose time has come.
func (m *simulation) land() {
	slices.SortStableFunc(m.flight, func(a, b landing) int { return a.at.Compare(b.at) })
	for len(m.flight) > 0 && !m.flight[0].at.After(m.now) {
		f := m.flight[0]
		m.flight = m.flight[1:]
		if c := f.cut; !bytes.Equal(c.raw, walBytes(c.tail.Start, c.tail.End)) {
			m.t.Fatalf("tail %s has got other bytes while it was in flight", c.tail)
		}
		if f.ok {
			m.tails[f.cut.tail] = true
			m.l.put(m.now, f.cut)
		} else {
			m.l.failed(m.now, f.cut)
		}
		m.lost = m.lost || m.l.dropped
		m.check()
	}
}

// advance goes to the time to, doing on the way what falls due.
func (m *simulation) advance(to time.Time, fate func() (time.Duration, bool)) {
	for {
		m.deliver()
		wake := m.store(fate)
		next := to
		if !wake.IsZero() && wake.Before(next) {
			next = wake
		}
		for _, f := range m.flight {
			if f.at.Before(next) {
				next = f.at
			}
		}
		if at, ok := m.l.rejoinAt(); ok && m.linked && at.Before(next) {
			next = at
		}
		if next.Before(m.now) {
			next = m.now
		}
		m.now = next
		m.land()
		if at, ok := m.l.rejoinAt(); ok && m.linked && !at.After(m.now) {
			m.l.interrupted()
			m.connect()
		}
		if !m.now.Before(to) {
			m.deliver()
			m.store(fate)
			return
		}
	}
}

// check compares the durable position with what the store holds.
func (m *simulation) check() {
	durable := m.l.durable()
	if got := m.chain(); durable > got {
		m.t.Fatalf("durable up to %s, but the store holds a chain up to %s only: %v", durable, got, m.tails)
	}
}

// chain is how far the store holds WAL from the simulation's start, as whoever reads puts it together.
func (m *simulation) chain() postgres.LSN {
	at := m.base
	for {
		if start := m.size.Start(m.size.Number(at)); m.wholes[start] {
			at = start + postgres.LSN(m.size)
			continue
		}
		best := at
		for t := range m.tails {
			if t.Start <= at && t.End > best {
				best = t.End
			}
		}
		if best == at {
			return at
		}
		at = best
	}
}

func (m *simulation) segmentStored(start postgres.LSN) {
	m.wholes[start] = true
	m.l.segmentStored(postgres.SegmentAt(1, start, m.size))
	m.check()
}

// settleDown lets the store work and everything arrive.
func (m *simulation) settleDown() {
	good := func() (time.Duration, bool) { return 10 * time.Millisecond, true }
	if !m.linked {
		m.connect()
	}
	m.advance(m.now.Add(time.Minute), good)
	// The shipper brings what was left to it.
	for start := m.base; start+postgres.LSN(m.size) <= m.flushed; start += postgres.LSN(m.size) {
		if !m.wholes[start] {
			m.segmentStored(start)
		}
	}
	m.advance(m.now.Add(time.Minute), good)
	if got, want := m.l.durable(), m.ends(m.flushed); got < want {
		m.t.Fatalf("after all is well again, found %s durable, expected %s (buffering %v, dropped %v)", got, want, m.l.buffering, m.l.dropped)
	}
	if !m.l.oldest().IsZero() {
		m.t.Fatalf("all is durable, but something is pending since %s", m.l.oldest())
	}
	before := m.puts
	if wake := m.store(good); !wake.IsZero() || m.puts != before {
		m.t.Fatalf("idle, but %d tails more, and the next look at %s", m.puts-before, wake)
	}
	for tail := range m.tails {
		if m.wholes[m.size.Start(m.size.Number(tail.Start))] {
			m.t.Fatalf("tail %s is left, although its segment is stored", tail)
		}
	}
}

// TestLedger_neverAhead: whatever the arrival, latencies, failures, reconnects and the shipper's progress, what counts as
// durable is durable, and in the end all is.
func TestLedger_neverAhead(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		size := postgres.SegmentSize(rapid.SampledFrom([]int{1 << 20, 4 << 20, 16 << 20}).Draw(t, "segment"))
		m := newSimulation(t, size, rapid.Bool().Draw(t, "synchronous"))
		slowest := rapid.IntRange(1, 4000).Draw(t, "slowest")
		unreliable := rapid.IntRange(0, 9).Draw(t, "unreliable")
		outage := false
		fate := func() (time.Duration, bool) {
			latency := time.Duration(rapid.IntRange(1, slowest).Draw(t, "latency")) * time.Millisecond
			return latency, !outage && rapid.IntRange(0, 9).Draw(t, "luck") >= unreliable
		}
		next := m.base
		for range rapid.IntRange(1, 40).Draw(t, "steps") {
			switch rapid.SampledFrom([]string{"commit", "commit", "commit", "burst", "burst", "record", "pause", "break", "link", "outage", "ship", "ship"}).Draw(t, "step") {
			case "commit":
				m.write(rapid.IntRange(32, 20_000).Draw(t, "bytes"), 0, true)
			case "record":
				m.write(rapid.IntRange(32, 3<<20).Draw(t, "bytes"), rapid.SampledFrom([]int{0, 0, 100, 100_000}).Draw(t, "unsent"), false)
			case "burst":
				for range rapid.IntRange(1, 60).Draw(t, "records") {
					m.write(rapid.IntRange(10_000, 300_000).Draw(t, "bytes"), 0, true)
				}
			case "pause":
				m.advance(m.now.Add(time.Duration(rapid.IntRange(1, 20_000).Draw(t, "pause"))*time.Millisecond), fate)
			case "break":
				if m.linked {
					m.disconnect()
				}
			case "link":
				if !m.linked {
					m.connect()
				}
			case "outage":
				outage = !outage
			case "ship":
				if next+postgres.LSN(size) <= m.flushed && !outage {
					m.segmentStored(next)
					next += postgres.LSN(size)
				}
			}
			m.advance(m.now.Add(time.Duration(rapid.IntRange(0, 700).Draw(t, "wait"))*time.Millisecond), fate)
		}
		m.settleDown()
	})
}

// TestLedger_lag: with a store that answers in a fifth of max_lag and WAL that fits through, no commit waits longer than
// max_lag, and there are no more requests than the gap allows.
func TestLedger_lag(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		m := newSimulation(t, 16<<20, false)
		slowest := rapid.IntRange(1, 200).Draw(t, "slowest")
		fate := func() (time.Duration, bool) {
			return time.Duration(rapid.IntRange(1, slowest).Draw(t, "latency")) * time.Millisecond, true
		}
		for range rapid.IntRange(1, 100).Draw(t, "steps") {
			if rapid.Bool().Draw(t, "write") {
				m.write(rapid.IntRange(32, 400_000).Draw(t, "bytes"), 0, true)
			}
			m.advance(m.now.Add(time.Duration(rapid.IntRange(1, 300).Draw(t, "wait"))*time.Millisecond), fate)
			if oldest := m.l.oldest(); !oldest.IsZero() && m.now.Sub(oldest) > m.l.maxLag {
				t.Fatalf("a commit waits for %s", m.now.Sub(oldest))
			}
		}
		allowed := int(m.now.Sub(epoch)/(m.l.maxLag/10)) + 2 + int(m.flushed-m.base)/runBytes + 2*int(m.size.Number(m.flushed)-m.size.Number(m.base))
		if m.puts > allowed {
			t.Fatalf("%d tails, expected at most %d", m.puts, allowed)
		}
		m.settleDown()
	})
}

// TestLedger_requestsOfASteadyServer: 1.5 MB/s in commits for a minute, on a store near by, takes two tails a second, and
// an idle one none.
func TestLedger_requestsOfASteadyServer(t *testing.T) {
	m := newSimulation(t, 16<<20, false)
	good := func() (time.Duration, bool) { return 5 * time.Millisecond, true }
	for range 6000 {
		m.write(15_000, 0, true)
		m.advance(m.now.Add(10*time.Millisecond), good)
	}
	if m.puts < 100 || m.puts > 140 {
		t.Errorf("%d tails in a minute, expected about 120", m.puts)
	}
	m.settleDown()
	before := m.puts
	m.advance(m.now.Add(time.Hour), good)
	if m.puts != before {
		t.Errorf("%d tails of an idle server", m.puts-before)
	}
}

// TestLedger_farStore: a store that answers after 700 ms of a max_lag of 1 s is kept busy by several PUTs, and lag stays
// near what the store makes inevitable.
func TestLedger_farStore(t *testing.T) {
	m := newSimulation(t, 16<<20, false)
	far := func() (time.Duration, bool) { return 700 * time.Millisecond, true }
	var worst time.Duration
	for i := range 3000 {
		m.write(15_000, 0, true)
		m.advance(m.now.Add(10*time.Millisecond), far)
		if oldest := m.l.oldest(); i > 500 && !oldest.IsZero() {
			worst = max(worst, m.now.Sub(oldest))
		}
	}
	if worst > time.Second {
		t.Errorf("WAL waited for %s, expected at most max_lag", worst)
	}
	if m.most < 3 {
		t.Errorf("at most %d in flight", m.most)
	}
	m.settleDown()
}

// TestLedger_outage: what does not fit into memory is left to whole segments, and once the store is back the segment in
// progress is read again.
func TestLedger_outage(t *testing.T) {
	m := newSimulation(t, 16<<20, false)
	down := true
	fate := func() (time.Duration, bool) { return 20 * time.Millisecond, !down }
	for range 1000 { // 20 MiB in 20 s
		m.write(20_000, 0, true)
		m.advance(m.now.Add(20*time.Millisecond), fate)
	}
	if !m.l.dropped || m.l.memory > 4*runBytes {
		t.Errorf("after 20 s of failures: dropped %v, %d bytes in memory", m.l.dropped, m.l.memory)
	}
	tried := m.puts
	m.advance(m.now.Add(10*time.Minute), fate)
	if n := m.puts - tried; n > 10*60/2+2 {
		t.Errorf("%d attempts in 10 minutes of an outage", n)
	}
	down = false
	m.segmentStored(m.base) // the shipper finds out
	m.advance(m.now.Add(2*time.Second), fate)
	if m.l.dropped || m.l.durable() != m.flushed {
		t.Errorf("2 s after the store is back: dropped %v, durable %s of %s", m.l.dropped, m.l.durable(), m.flushed)
	}
	m.settleDown()
}

// TestLedger_outageOfAnIdleServer: what fits is kept, so that nothing has to be read again.
func TestLedger_outageOfAnIdleServer(t *testing.T) {
	m := newSimulation(t, 16<<20, false)
	down := true
	fate := func() (time.Duration, bool) { return 20 * time.Millisecond, !down }
	m.write(300, 0, true)
	m.advance(m.now.Add(time.Hour), fate)
	m.write(300, 0, true)
	m.advance(m.now.Add(time.Second), fate)
	if m.l.dropped || !m.l.buffering {
		t.Errorf("600 bytes were dropped")
	}
	down = false
	m.advance(m.now.Add(backoffMost+time.Second), fate)
	if m.l.durable() != m.flushed {
		t.Errorf("after the store is back, durable %s of %s", m.l.durable(), m.flushed)
	}
}

// TestLedger_overload: more than the store takes. Memory is bounded, and lag ends with the next segment after it.
func TestLedger_overload(t *testing.T) {
	m := newSimulation(t, 1<<30, false)
	slow := func() (time.Duration, bool) { return 10 * time.Second, true }
	for range 100 { // 200 MB/s for 2 s
		m.write(4_000_000, 0, true)
		m.advance(m.now.Add(20*time.Millisecond), slow)
	}
	if !m.l.dropped {
		t.Errorf("nothing was dropped, with %d bytes in memory", m.l.memory)
	}
	m.settleDown()
}

func TestLedger_divergence(t *testing.T) {
	m := newSimulation(t, 1<<20, false)
	good := func() (time.Duration, bool) { return 5 * time.Millisecond, true }
	m.write(5000, 0, true)
	m.advance(m.now.Add(time.Second), good)
	m.l.interrupted()
	m.l.started(m.base, m.flushed)
	b := walBytes(m.base, m.flushed)
	b[100]++
	if n := m.l.stretch(m.base, len(b)); n != len(b) {
		t.Fatalf("a stretch of %d bytes, expected %d", n, len(b))
	}
	if err := m.l.arrive(m.now, b, m.flushed, postgres.PassedRecords{}); !errors.Is(err, errDiverged) {
		t.Errorf("other bytes at a known position: got %v", err)
	}
}

func TestLedger_conflictEndsTheSegmentsTails(t *testing.T) {
	m := newSimulation(t, 1<<20, false)
	good := func() (time.Duration, bool) { return 5 * time.Millisecond, true }
	m.write(5000, 0, true)
	m.deliver()
	c, _ := m.l.plan(m.now, 4)
	if c == nil {
		t.Fatal("no tail of a commit")
	}
	m.l.conflict(c)
	m.write(900_000, 0, true)
	m.advance(m.now.Add(time.Minute), good)
	if m.puts != 0 || m.l.durable() != m.base {
		t.Errorf("%d tails after a conflict, durable %s", m.puts, m.l.durable())
	}
	m.write(900_000, 0, true) // into the next segment
	m.advance(m.now.Add(time.Minute), good)
	if m.puts == 0 || m.l.durable() != m.base {
		t.Errorf("%d tails of the segment after a conflict, durable %s", m.puts, m.l.durable())
	}
	m.segmentStored(m.base)
	if m.l.durable() != m.flushed {
		t.Errorf("once the segment is stored, durable %s of %s", m.l.durable(), m.flushed)
	}
}

// TestLedger_awaited: segments that an earlier run left behind hold the durable position back until they are stored.
func TestLedger_awaited(t *testing.T) {
	size := postgres.DefaultSegmentSize
	start := 7 * postgres.LSN(size)
	l := &ledger{timeline: 3, size: size, maxLag: time.Second}
	name := func(timeline postgres.Timeline, n uint64) postgres.SegmentName {
		return postgres.MakeSegmentName(timeline, n, size)
	}
	l.wholes = append(l.wholes, name(3, 5))
	l.begin(epoch, start, []postgres.SegmentName{name(3, 6), name(2, 4), name(3, 5), name(3, 7), name(4, 2)})
	for _, step := range []struct {
		stored  postgres.SegmentName
		durable uint64
	}{{"", 4}, {name(3, 6), 4}, {name(2, 4), 7}} {
		if step.stored != "" {
			l.segmentStored(step.stored)
		}
		if got := l.durable(); got != size.Start(step.durable) {
			t.Errorf("after %q, durable %s, expected %s", step.stored, got, size.Start(step.durable))
		}
	}
}

// TestLedger_lost: nothing waits for a segment that is lost, and what is stored of it stays.
func TestLedger_lost(t *testing.T) {
	size := postgres.DefaultSegmentSize
	l := &ledger{timeline: 1, size: size, maxLag: time.Second}
	name := func(n uint64) postgres.SegmentName { return postgres.MakeSegmentName(1, n, size) }
	l.begin(epoch, size.Start(7), []postgres.SegmentName{name(5), name(6)})
	l.segmentLost(name(7)) // it is in progress: no such thing
	l.segmentStored(name(5))
	if got := l.durable(); got != size.Start(6) {
		t.Errorf("durable %s before, expected %s", got, size.Start(6))
	}
	l.segmentLost(name(6))
	if got := l.durable(); got != size.Start(7) {
		t.Errorf("durable %s, expected %s", got, size.Start(7))
	}
	if garbage := l.takeGarbage(); len(garbage) > 0 {
		t.Errorf("found %v to be deleted", garbage)
	}
}

func TestBudget(t *testing.T) {
	for _, perHour := range []int64{1, 10, 60, 720, 3600, 100_000} {
		t.Run(fmt.Sprint(perHour), func(t *testing.T) {
			b := newBudget(perHour)
			now := epoch
			var taken []time.Time
			for now.Before(epoch.Add(3 * time.Hour)) {
				ok, at := b.take(now)
				if ok {
					taken = append(taken, now)
					continue
				}
				if !at.After(now) {
					t.Fatalf("refused at %s, but to be asked again at %s", now, at)
				}
				now = at
			}
			worst, first := 0, 0
			for i, at := range taken {
				for at.Sub(taken[first]) >= time.Hour {
					first++
				}
				worst = max(worst, i-first+1)
			}
			if limit := int(perHour + 1); worst > limit {
				t.Errorf("%d requests in an hour, expected at most %d", worst, perHour)
			}
			if int64(len(taken)) < perHour*2 {
				t.Errorf("%d requests in three hours, expected nearly %d", len(taken), perHour*3)
			}
		})
	}
}

// BenchmarkLedger is what a segment of 16 MiB costs beside its records' verification and its tails' compression.
func BenchmarkLedger(b *testing.B) {
	size := postgres.DefaultSegmentSize
	l := &ledger{timeline: 1, size: size, maxLag: time.Second}
	now, at := epoch, postgres.LSN(size)
	l.begin(now, at, nil)
	l.started(at, at)
	message := walBytes(0, 64<<10)
	b.SetBytes(int64(size))
	b.ReportAllocs()
	for b.Loop() {
		for range int(size) / len(message) {
			at += postgres.LSN(len(message))
			now = now.Add(40 * time.Millisecond)
			if err := l.arrive(now, message, at, postgres.PassedRecords{Commits: 1}); err != nil {
				b.Fatal(err)
			}
			for {
				c, _ := l.plan(now, parallelPuts)
				if c == nil {
					break
				}
				l.put(now, c)
			}
			l.takeGarbage()
		}
		for _, name := range l.takeCompleted() {
			l.segmentStored(name)
		}
	}
}
