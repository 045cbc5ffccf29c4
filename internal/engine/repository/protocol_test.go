package repository

import (
	"cmp"
	"fmt"
	"math/bits"
	"slices"
	"strings"
	"testing"
	"time"
)

// The explorer walks every interleaving of a few sessions and collections over the package's own transition functions
// (begin, commit, end, expire, needed, condemned), with arbitrarily stale collectors and writers that were evicted and
// go on. Its invariant: whatever a live image or a running session's parent needs is there.

// explorerSIDs is how many sessions are ever begun; explorerGCs how many collections run at once.
const (
	explorerSIDs = 2
	explorerGCs  = 2
)

// objectSet has a bit for each object of the model: two for each sid, a pack (map objects are treated alike), and
// manifest with refs, which are judged alike.
type objectSet uint32

const (
	packPart = iota
	refsPart
	parts
)

func partBit(sid SID, part int) objectSet { return 1 << (int(sid-1)*parts + part) }

// key gives the object's parsed key, which is what condemned judges.
func partKey(sid SID, part int) imageKey {
	if part == packPart {
		return imageKey{sid: sid, kind: PackObject}
	}
	return imageKey{sid: sid}
}

type writerState uint8

const (
	writerAbsent writerState = iota
	writerOpen               // begun: may upload
	writerPacked             // pack uploaded
	writerReady              // manifest and refs durable: may commit
	writerDone
)

// writer is what a session's process knows.
type writer struct {
	state  writerState
	parent SID
	refs   objectSet // what its refs name: its own pack, and what it shares with its parent
}

// world is one state: the head, what is in the store, and what each process remembers.
type world struct {
	head    *Head
	store   objectSet
	writers [explorerSIDs + 2]writer
	refs    [explorerSIDs + 2]objectSet // of each image, once written: immutable
	gcs     [explorerGCs]struct {
		head *Head // read, nil: idle
		kill objectSet
	}
}

// weakness takes one rule out of the protocol; each must make the explorer find a loss.
type weakness int

const (
	sound           weakness = iota
	noSIDBound               // collect judges objects of sessions that began after its head
	noMembership             // commit does not look whether the session is open
	noPin                    // needed() and condemned() forget the parents of sessions
	reuseAnything            // a writer refers to whatever lies in the store
	refsNotKept              // manifest and refs of expired images go even while pinned
	commitUnordered          // commit before the refs are durable
)

func (w weakness) String() string {
	return [...]string{"sound", "no sid bound", "no membership check", "no parent pin", "global reuse", "pinned refs collected", "commit before refs"}[w]
}

// headCode describes a head in the model; two heads with the same code behave the same. Four bits each: the next sid,
// the live images, and for each sid its session's parent, plus one.
func headCode(h *Head) (code uint64) {
	if h == nil {
		return 0
	}
	code = uint64(h.NextSID)
	for _, i := range h.Images {
		code |= 1 << (3 + int(i.SID)) // 4 to 7
	}
	for _, s := range h.Sessions {
		code |= uint64(s.Parent+1) << (4 * (1 + int(s.SID)))
	}
	return code
}

// worldKey identifies a state: equal keys have equal futures.
type worldKey struct {
	head    uint64
	store   objectSet
	writers [explorerSIDs + 2]writer
	refs    [explorerSIDs + 2]objectSet
	gcs     [explorerGCs]gcKey
}

type gcKey struct {
	head uint64
	kill objectSet
}

func (w *world) key() worldKey {
	k := worldKey{head: headCode(w.head), store: w.store, writers: w.writers, refs: w.refs}
	for i, g := range w.gcs {
		k.gcs[i] = gcKey{headCode(g.head), g.kill}
	}
	// Collections are interchangeable, and what a writer did matters no more when it is done.
	slices.SortFunc(k.gcs[:], func(a, b gcKey) int {
		return cmp.Or(cmp.Compare(a.head, b.head), cmp.Compare(a.kill, b.kill))
	})
	for i := range k.writers {
		if k.writers[i].state == writerDone {
			k.writers[i] = writer{state: writerDone}
		}
	}
	return k
}

// lost returns what is needed and not there.
func (w *world) lost(weak weakness) objectSet {
	var need objectSet
	want := func(sid SID) { need |= w.refs[sid] | partBit(sid, refsPart) }
	for _, i := range w.head.Images {
		want(i.SID)
	}
	if weak != noPin {
		for _, s := range w.head.Sessions {
			if s.Parent != 0 {
				want(s.Parent)
			}
		}
	}
	return need &^ w.store
}

// judge is Series.Collect's decision: the head that it read, the refs that are there now, and the listing.
func (w *world) judge(h *Head, weak weakness) (kill objectSet) {
	judged := h
	if weak == noPin {
		judged = h.next()
		for i := range judged.Sessions {
			judged.Sessions[i].Parent = 0
		}
	}
	used := map[ObjectRef]struct{}{}
	for _, sid := range judged.needed() {
		if w.store&partBit(sid, refsPart) == 0 {
			return 0 // Collect reads the head again
		}
		for s := SID(1); s <= explorerSIDs+1; s++ {
			if w.refs[sid]&partBit(s, packPart) != 0 {
				used[ObjectRef{SID: s, Kind: PackObject}] = struct{}{}
			}
		}
	}
	switch weak {
	case noSIDBound:
		judged = h.next()
		judged.NextSID = 1 << 60
	case refsNotKept:
		// The same head, in which no session pins: used is complete already.
		judged = h.next()
		for i := range judged.Sessions {
			judged.Sessions[i].Parent = 0
		}
	}
	for sid := SID(1); sid <= explorerSIDs+1; sid++ {
		for part := range parts {
			if bit := partBit(sid, part); w.store&bit != 0 && condemned(judged, used, partKey(sid, part)) {
				kill |= bit
			}
		}
	}
	return kill
}

// move is one step of some process, described lazily.
type move struct {
	format string
	a      SID
	b      objectSet
	to     world
}

func (m *move) String() string { return fmt.Sprintf(m.format, m.a, m.b) }

// moves lists every step that some process can make.
func (w *world) moves(weak weakness) []move {
	var all []move
	add := func(to world, format string, a SID, b objectSet) { all = append(all, move{format, a, b, to}) }
	// Image 1 is live from the beginning; sessions take the numbers from 2 on.
	if w.head.NextSID <= explorerSIDs+1 {
		parents := []SID{0}
		for _, i := range w.head.Images {
			parents = append(parents, i.SID)
		}
		for _, parent := range parents {
			if next, err := w.head.begin(testSeries, OpenSession{Kind: SessionImage, Parent: parent}); err == nil {
				to := *w
				to.head = next
				to.writers[w.head.NextSID].state, to.writers[w.head.NextSID].parent = writerOpen, parent
				add(to, "begin %d parent %d", w.head.NextSID, objectSet(parent))
			}
		}
	}
	for sid := SID(2); sid < w.head.NextSID; sid++ {
		wr := w.writers[sid]
		switch wr.state {
		case writerOpen:
			to := *w
			to.store |= partBit(sid, packPart)
			to.writers[sid].state++
			to.writers[sid].refs |= partBit(sid, packPart)
			add(to, "upload pack of %d (%b)", sid, partBit(sid, packPart))
		case writerPacked:
			// It shares all that its parent's refs name, or nothing.
			shares := []objectSet{0}
			if wr.parent != 0 {
				shares = append(shares, w.refs[wr.parent])
			}
			if weak == reuseAnything {
				var everything objectSet
				for s := SID(1); s <= explorerSIDs+1; s++ {
					everything |= w.store & partBit(s, packPart)
				}
				shares = append(shares, everything)
			}
			for _, share := range shares {
				to := *w
				to.writers[sid].state = writerReady
				to.writers[sid].refs |= share
				to.refs[sid] = to.writers[sid].refs
				if weak != commitUnordered {
					to.store |= partBit(sid, refsPart)
				}
				add(to, "refs of %d: %b", sid, to.refs[sid])
			}
		case writerReady:
			head := w.head
			if weak == noMembership && head.Session(sid) == nil && head.Image(sid) == nil {
				head = head.next()
				head.Sessions = append(head.Sessions, OpenSession{SID: sid, Kind: SessionImage, Parent: wr.parent})
				slices.SortFunc(head.Sessions, func(a, b OpenSession) int { return cmpUint(uint64(a.SID), uint64(b.SID)) })
			}
			next, err := head.commit(testSeries, ImageInfo{SID: sid, Parent: wr.parent, Timeline: 1})
			to := *w
			to.writers[sid].state = writerDone
			if err == nil && next != nil {
				to.head = next
				add(to, "commit %d: %b", sid, to.refs[sid])
			} else {
				add(to, "commit %d refused: %b", sid, to.refs[sid])
			}
		}
	}
	for _, s := range w.head.Sessions {
		to := *w
		to.head = w.head.end(s.SID)
		add(to, "evict %d parent %d", s.SID, objectSet(s.Parent))
	}
	for _, i := range w.head.Images {
		to := *w
		to.head = w.head.expire(i.SID)
		add(to, "expire %d: %b", i.SID, to.refs[i.SID])
	}
	for g := range w.gcs {
		if w.gcs[g].head == nil && w.gcs[g].kill == 0 {
			to := *w
			to.gcs[g].head = w.head
			add(to, "collector %d reads the head %d", SID(g), objectSet(w.head.NextSID))
			continue
		}
		if w.gcs[g].head != nil {
			to := *w
			kill := w.judge(w.gcs[g].head, weak)
			to.gcs[g].head, to.gcs[g].kill = nil, kill
			add(to, "collector %d judges: %b", SID(g), kill)
			continue
		}
		// In one order: which garbage goes first makes no difference to anybody.
		bit := objectSet(1) << bits.TrailingZeros32(uint32(w.gcs[g].kill))
		to := *w
		to.store &^= bit
		to.gcs[g].kill &^= bit
		add(to, "collector %d deletes %b", SID(g), bit)
	}
	return all
}

// explore returns how many states there are and, if the invariant breaks, the shortest way there.
func explore(weak weakness, limit int) (states int, trace []string, complete bool) {
	start := world{head: (&Head{NextSID: 2}).next(), store: partBit(1, packPart) | partBit(1, refsPart)}
	start.head.Images = []ImageInfo{{SID: 1, Timeline: 1}}
	start.refs[1] = partBit(1, packPart)

	type node struct {
		move
		from int
	}
	nodes := []node{{move: move{to: start}, from: -1}}
	seen := map[worldKey]struct{}{start.key(): {}}
	for at := 0; at < len(nodes); at++ {
		w := nodes[at].to
		if lost := w.lost(weak); lost != 0 {
			trace = append(trace, fmt.Sprintf("lost %b", lost))
			for n := at; n > 0; n = nodes[n].from {
				trace = append(trace, nodes[n].String())
			}
			slices.Reverse(trace)
			return len(seen), trace, true
		}
		if len(nodes) > limit {
			return len(seen), nil, false
		}
		for _, m := range w.moves(weak) {
			k := m.to.key()
			if _, ok := seen[k]; !ok {
				seen[k] = struct{}{}
				nodes = append(nodes, node{move: m, from: at})
			}
		}
	}
	return len(seen), nil, true
}

// TestProtocol_noInterleavingLosesAnything is exhaustive for two sessions and two collections.
func TestProtocol_noInterleavingLosesAnything(t *testing.T) {
	began := time.Now()
	limit := 5_000_000
	if testing.Short() {
		limit = 30_000 // the race detector finds nothing in code that runs alone, and takes minutes for all of it
	}
	states, trace, complete := explore(sound, limit)
	if trace != nil {
		t.Fatalf("after %d states:\n%s", states, strings.Join(trace, "\n"))
	}
	if !complete && !testing.Short() {
		t.Fatalf("stopped after %d states", states)
	}
	t.Logf("%d states in %s", states, time.Since(began).Round(time.Millisecond))
}

// TestProtocol_everyRuleIsNeeded shows that the explorer finds what it looks for.
func TestProtocol_everyRuleIsNeeded(t *testing.T) {
	for weak := noSIDBound; weak <= commitUnordered; weak++ {
		states, trace, _ := explore(weak, 5_000_000)
		if trace == nil {
			t.Errorf("%s: nothing was lost in %d states", weak, states)
			continue
		}
		t.Logf("%s: after %d states: %s", weak, states, strings.Join(trace, "; "))
	}
}
