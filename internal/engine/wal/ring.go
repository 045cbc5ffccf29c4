package wal

import (
	"context"
	"errors"
	"os"
	"slices"
	"time"

	"golang.org/x/sys/unix"

	"github.com/pgark/terraform-provider-pgark/internal/engine/objectstore"
	"github.com/pgark/terraform-provider-pgark/internal/engine/postgres"
)

const (
	ringFirst = 8       // segments ahead at first
	ringMost  = 64      // at most
	ringBytes = 1 << 30 // at most, as files

	// hedgeAfter is how many times the usual duration a download that is waited for may take before another one of the same
	// file is begun: servers that are not well answer one request in a hundred late. hedgeFloor keeps short hiccups of a
	// near store, or of our own CPU, from causing requests, hedgeFirst holds as long as nothing is known.
	hedgeAfter = 3
	hedgeFloor = 300 * time.Millisecond
	hedgeFirst = 3 * time.Second

	// edgeFor is how long a segment that was not there stays one behind which nothing is looked for.
	edgeFor = 30 * time.Second
)

// download is one file on its way, or in the ring.
type download struct {
	name    string
	ahead   bool // nobody waits for it yet
	begun   time.Time
	ctx     context.Context
	cancel  context.CancelFunc
	done    chan struct{} // Closed when file or err is set.
	file    string
	err     error // objectstore.ErrNotExist: absent
	started bool
}

func (d *download) finished() bool {
	select {
	case <-d.done:
		return true
	default:
		return false
	}
}

// ring is what is fetched ahead, and how replay goes along with it. The Fetcher's mutex guards it.
type ring struct {
	files   map[string]*download // ahead, under way or done
	queue   []*download          // of them those that were not begun, in order
	active  int                  // of them those that are under way
	depth   int                  // segments ahead
	hedging bool                 // a second download of a file is under way

	// edge is the lowest segment that was looked for ahead and was not there; "" if none. Nothing is looked for behind it.
	edge   postgres.SegmentName
	edgeAt time.Time

	usual    time.Duration // that a download takes; 0: not known
	pace     time.Duration // between an answer and the next question: what replay takes for a segment; 0: not known
	answered time.Time
}

func newRing() ring { return ring{files: make(map[string]*download), depth: ringFirst} }

// smooth gives the latest of many durations a quarter of the weight.
func smooth(old, latest time.Duration) time.Duration {
	if old == 0 {
		return latest
	}
	return (3*old + latest) / 4
}

// ask is called when a segment is asked for: those behind it are fetched.
func (f *Fetcher) ask(source Source, segment postgres.SegmentName) {
	f.mu.Lock()
	defer f.mu.Unlock()
	r := &f.ring
	if !r.answered.IsZero() {
		r.pace = smooth(r.pace, min(time.Since(r.answered), time.Minute))
		r.answered = time.Time{}
	}
	if d := r.files[string(segment)]; d != nil && !d.finished() && f.o.Prefetch == 0 {
		// It comes too late. More of them, begun earlier, hide a longer way.
		r.depth = min(2*r.depth, f.deepest())
	}
	if r.edge == segment && time.Since(r.edgeAt) < edgeFor {
		return // somebody waits for the end to move on
	}
	f.prefetch(source, segment)
}

// answer is called when the segment has been found.
func (f *Fetcher) answer(source Source, segment postgres.SegmentName) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.ring.answered = time.Now()
	if f.ring.edge == segment {
		f.ring.edge = ""
	}
	f.prefetch(source, segment)
}

// deepest is how many segments the ring may hold. The mutex is held; asking the kernel for free space does not block.
func (f *Fetcher) deepest() int {
	budget := int64(ringBytes)
	var st unix.Statfs_t
	if err := unix.Statfs(f.o.Ring, &st); err == nil {
		budget = min(budget, int64(st.Bavail)*st.Bsize/8)
	}
	return int(max(1, min(ringMost, budget/int64(max(f.size, postgres.MinSegmentSize)))))
}

// parallel is how many downloads ahead keep pace with replay. The mutex is held.
func (r *ring) parallel(most int) int {
	if r.usual == 0 || r.pace == 0 {
		return min(4, most)
	}
	return max(min(int(r.usual/max(r.pace, time.Millisecond))+2, most), min(2, most))
}

// prefetch queues the segments behind segment, and drops what lies elsewhere. The mutex is held.
func (f *Fetcher) prefetch(source Source, segment postgres.SegmentName) {
	depth := f.o.Prefetch
	if f.size == 0 || depth < 0 {
		return
	}
	r := &f.ring
	if depth == 0 {
		depth = min(r.depth, f.deepest())
	}
	if r.edge != "" && (r.edge <= segment || r.edge.Timeline() != segment.Timeline() || time.Since(r.edgeAt) > edgeFor) {
		r.edge = ""
	}
	wanted := map[string]bool{string(segment): true}
	var order []string
	next := segment
	for range depth {
		next = next.Next(f.size)
		if r.edge != "" && next > r.edge {
			break
		}
		wanted[string(next)] = true
		order = append(order, string(next))
	}
	for name, d := range r.files {
		if !wanted[name] {
			f.drop(d)
		}
	}
	for _, name := range order {
		if d := r.files[name]; d != nil {
			if !d.finished() || d.err == nil {
				continue
			}
			// Failed or not there yet: try again, now that the end may have moved on.
		}
		d := f.newDownload(name)
		d.ahead = true
		r.files[name] = d
		r.queue = append(r.queue, d)
	}
	slices.SortFunc(r.queue, func(a, b *download) int {
		if a.name < b.name {
			return -1
		}
		return 1
	})
	f.pump(source)
}

func (f *Fetcher) newDownload(name string) *download {
	d := &download{name: name, done: make(chan struct{})}
	d.ctx, d.cancel = context.WithCancel(f.base)
	return d
}

// drop takes a download out of the ring. The mutex is held.
func (f *Fetcher) drop(d *download) {
	delete(f.ring.files, d.name)
	f.abandon(d)
}

// abandon ends a download that nobody wants, and removes its file. The mutex is held.
func (f *Fetcher) abandon(d *download) {
	d.cancel()
	if !d.started {
		f.ring.queue = slices.DeleteFunc(f.ring.queue, func(q *download) bool { return q == d })
		return
	}
	f.running.Go(func() {
		<-d.done
		if d.err == nil {
			_ = os.Remove(d.file) // swept with the ring otherwise
		}
	})
}

// pump begins as many of the queued downloads as may run. The mutex is held.
func (f *Fetcher) pump(source Source) {
	r := &f.ring
	for len(r.queue) > 0 && r.active < r.parallel(f.o.Parallelism) {
		d := r.queue[0]
		r.queue = r.queue[1:]
		r.active++
		f.start(source, d, func() {
			r.active--
			switch {
			case errors.Is(d.err, objectstore.ErrNotExist) && r.files[d.name] == d:
				f.foundEdge(postgres.SegmentName(d.name))
			case d.err == nil && r.edge == postgres.SegmentName(d.name):
				r.edge = ""
			}
			f.pump(source)
		})
	}
}

// foundEdge stops the search at a segment that is not there. The mutex is held.
func (f *Fetcher) foundEdge(segment postgres.SegmentName) {
	r := &f.ring
	if r.edge != "" && r.edge.Timeline() == segment.Timeline() && r.edge < segment {
		return
	}
	r.edge, r.edgeAt = segment, time.Now()
	for _, d := range slices.Clone(r.queue) {
		if d.name > string(segment) {
			f.drop(d)
		}
	}
}

// start begins a download. then is called with the mutex held when it has ended, before others hear of it. The mutex is
// held.
func (f *Fetcher) start(source Source, d *download, then func()) {
	d.started, d.begun = true, time.Now()
	f.running.Go(func() {
		defer d.cancel()
		file, err := f.download(d.ctx, source, d.name)
		f.mu.Lock()
		defer f.mu.Unlock()
		d.file, d.err = file, err
		if _, e := postgres.ParseSegmentName(d.name); e == nil && err == nil {
			f.ring.usual = smooth(f.ring.usual, time.Since(d.begun))
		}
		if then != nil {
			then()
		}
		close(d.done)
	})
}

// take gives the download of a file: the one that runs ahead, or one that begins now, past those that wait.
func (f *Fetcher) take(source Source, name string) (d *download, ahead bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	d = f.ring.files[name]
	delete(f.ring.files, name)
	if d != nil && d.started {
		return d, true
	}
	if d != nil {
		f.abandon(d)
	}
	d = f.newDownload(name)
	f.start(source, d, nil)
	return d, false
}

// get returns the file of a download, one that runs ahead or its own.
func (f *Fetcher) get(ctx context.Context, source Source, name string) (string, error) {
	var file string
	err := f.retry(ctx, func() error {
		for {
			d, ahead := f.take(source, name)
			winner, err := f.wait(ctx, source, d)
			if err != nil {
				return err
			}
			if winner.err == nil {
				file = winner.file
				f.handOver(file)
				return nil
			}
			if !ahead {
				return winner.err
			}
			// It ran ahead, some time ago: what it did not find may be there by now.
		}
	})
	return file, err
}

// decided tells whether a download that has ended says what there is to say: the file, or that there is none.
func (d *download) decided() bool { return d.err == nil || errors.Is(d.err, objectstore.ErrNotExist) }

// wait waits for a download, and begins another one of the same file if it takes far longer than usual. Whichever is
// decided first is returned. Its error is that of ctx.
func (f *Fetcher) wait(ctx context.Context, source Source, d *download) (*download, error) {
	if d.finished() {
		return d, nil
	}
	f.mu.Lock()
	patience := hedgeFirst
	if f.ring.usual > 0 {
		patience = max(hedgeAfter*f.ring.usual, hedgeFloor)
	}
	f.mu.Unlock()
	late := time.NewTimer(time.Until(d.begun.Add(patience)))
	defer late.Stop()
	first, hedge, second := d.done, (chan struct{})(nil), (*download)(nil)
	for {
		select {
		case <-first:
			if second == nil || d.decided() {
				f.settle(second, nil)
				return d, nil
			}
			first = nil
		case <-hedge:
			if second.decided() {
				f.settle(second, d)
				return second, nil
			}
			hedge = nil
		case <-late.C:
			f.mu.Lock()
			if !f.ring.hedging {
				f.ring.hedging = true
				second = f.newDownload(d.name)
				f.start(source, second, nil)
				hedge = second.done
			}
			f.mu.Unlock()
			continue
		case <-ctx.Done():
			f.settle(second, nil)
			f.mu.Lock()
			if f.ring.files[d.name] == nil {
				f.ring.files[d.name] = d // it goes on, for who asks next
			} else {
				f.abandon(d)
			}
			f.mu.Unlock()
			return nil, context.Cause(ctx)
		}
		if first == nil && hedge == nil {
			f.settle(second, nil)
			return d, nil
		}
	}
}

// settle ends a hedge, if there was one: second won over loser, or without one, is not wanted itself.
func (f *Fetcher) settle(second, loser *download) {
	if second == nil {
		return
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	f.ring.hedging = false
	if loser == nil {
		loser = second
	}
	f.abandon(loser)
}
