package wal

import (
	"container/heap"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/pgark/terraform-provider-pgark/internal/engine/postgres"
)

// order is that in which PostgreSQL asks: timeline histories first, then by name (pgarch.c, ready_file_comparator;
// versions before 15 do the same file by file).
func order(a, b string) int {
	ha, hb := strings.HasSuffix(a, ".history"), strings.HasSuffix(b, ".history")
	switch {
	case ha && !hb:
		return -1
	case hb && !ha:
		return 1
	}
	return strings.Compare(a, b)
}

// queue holds the files that wait: those that may be shipped now, and those whose time has not come. Each waiting file
// is in one of the two.
type queue struct {
	now   fileHeap
	later fileHeap
}

func newQueue() queue {
	return queue{
		now: fileHeap{less: func(a, b *file) bool {
			if (a.asked > 0) != (b.asked > 0) {
				return a.asked > 0 // PostgreSQL waits for it
			}
			return order(a.name, b.name) < 0
		}},
		later: fileHeap{less: func(a, b *file) bool { return a.notUntil.Before(b.notUntil) }},
	}
}

func (q *queue) len() int { return len(q.now.files) + len(q.later.files) }

// put adds a file, or finds it the place that its asked and notUntil have come to demand.
func (q *queue) put(f *file, now time.Time) {
	q.drop(f)
	h := &q.now
	if f.notUntil.After(now) {
		h = &q.later
	}
	f.in = h
	heap.Push(h, f)
}

// drop takes a file out, if it is in.
func (q *queue) drop(f *file) {
	if f.in != nil {
		heap.Remove(f.in, f.place)
		f.in = nil
	}
}

// wake moves the files whose time has come, and tells when the next one's comes; zero: never.
func (q *queue) wake(now time.Time) (next time.Time) {
	for len(q.later.files) > 0 {
		f := q.later.files[0]
		if f.notUntil.After(now) {
			return f.notUntil
		}
		q.put(f, now)
	}
	return time.Time{}
}

// first is the file to be shipped next, or nil.
func (q *queue) first() *file {
	if len(q.now.files) == 0 {
		return nil
	}
	return q.now.files[0]
}

// fileHeap implements heap.Interface.
type fileHeap struct {
	files []*file
	less  func(a, b *file) bool
}

func (h *fileHeap) Len() int           { return len(h.files) }
func (h *fileHeap) Less(i, j int) bool { return h.less(h.files[i], h.files[j]) }
func (h *fileHeap) Swap(i, j int) {
	h.files[i], h.files[j] = h.files[j], h.files[i]
	h.files[i].place, h.files[j].place = i, j
}

func (h *fileHeap) Push(x any) {
	f := x.(*file) //nolint:forcetypeassert // container/heap gives back what was pushed
	f.place = len(h.files)
	h.files = append(h.files, f)
}

func (h *fileHeap) Pop() any {
	n := len(h.files) - 1
	f := h.files[n]
	h.files[n] = nil
	h.files = h.files[:n]
	return f
}

// readNames lists a directory's names, in no order, without asking what they are.
func readNames(dir string) ([]string, error) {
	d, err := os.Open(dir)
	if err != nil {
		return nil, err
	}
	defer d.Close()
	return d.Readdirnames(-1)
}

// ready lists the names of finished files that PostgreSQL has no receipt for, in the order in which it asks.
func (s *Shipper) ready() ([]string, error) {
	all, err := readNames(filepath.Join(s.walDir, "archive_status"))
	if err != nil {
		return nil, err
	}
	names := all[:0]
	for _, name := range all {
		name, ok := strings.CutSuffix(name, ".ready")
		if !ok {
			continue
		}
		if _, err := postgres.ParseWALFile(name); err == nil {
			names = append(names, name)
		}
	}
	slices.SortFunc(names, order)
	return names, nil
}

const (
	// scanEvery is how often archive_status is read when nobody asks. PostgreSQL asks for a file within milliseconds of
	// finishing it; this is for files behind one that it is stuck with.
	scanEvery = time.Second

	// scanPause is the least time between two readings. A long one is not repeated before twenty times as long: so
	// reading takes at most a twentieth of one CPU, however many files there are.
	scanPause = 100 * time.Millisecond
	scanShare = 20

	// queueAhead is how many waiting files are kept in mind. Each is some 300 bytes.
	queueAhead = 4096

	// queueLow: with as few files waiting, a request for a file that was not known is reason to look for more.
	queueLow = 16

	// rememberFiles is how many acknowledged files are kept in mind, for Wait and for PostgreSQL asking twice.
	rememberFiles = 1024
)

// scan reads archive_status and queues what is finished and not known yet. It forgets files that PostgreSQL was told
// about long ago.
func (s *Shipper) scan() {
	began := time.Now()
	ready, err := s.ready()
	took := time.Since(began)
	s.mu.Lock()
	defer s.mu.Unlock()
	s.scanned, s.rescan = time.Now(), false
	s.scanWait = max(scanPause, scanShare*took)
	if err != nil {
		if !s.blind {
			s.o.Log.Warn("look for finished wal", "error", err)
		}
		s.blind = true
		return
	}
	s.blind = false
	present := make(map[string]bool, len(ready))
	for _, name := range ready {
		present[name] = true
	}
	for name, f := range s.files {
		if f.state == fileWaiting && !present[name] && f.asked == 0 && !f.passed {
			// Acknowledged by somebody else, or removed by hand: no longer ours to ship.
			s.queue.drop(f)
			delete(s.files, name)
		}
	}
	for _, name := range ready {
		if s.queue.len() >= queueAhead {
			break // the next reading finds it
		}
		if s.files[name] == nil {
			s.add(name)
		}
	}
	keep := s.done[:0]
	for i, name := range s.done {
		f := s.files[name]
		switch {
		case f == nil:
		case len(s.done)-i > rememberFiles && !present[name] && f.asked == 0 && f.state == fileStored:
			delete(s.files, name)
		default:
			keep = append(keep, name)
		}
	}
	clear(s.done[len(keep):])
	s.done = keep
}

// add queues a file that is not known. It is called with mu held.
func (s *Shipper) add(name string) *file {
	f := &file{name: name}
	s.files[name] = f
	s.queue.put(f, time.Now())
	return f
}
