package wal

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"hash/crc32"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"pgregory.net/rapid"

	"github.com/pgark/terraform-provider-pgark/internal/engine/postgres"
	"github.com/pgark/terraform-provider-pgark/internal/engine/repository"
)

// stream is WAL as a server writes it: records of many sizes, from a segment's start on.
type stream struct {
	b     []byte
	start postgres.LSN
	ends  []postgres.LSN // of the records
}

// newStream writes records from the start of segment number up to n bytes or a little more; the same seed gives the same
// ones. forks are timelines that pages belong to from a position on.
func newStream(number uint64, n int, seed uint64, forks ...postgres.Ancestor) *stream {
	s := &stream{start: testSize.Start(number)}
	r := rand.New(rand.NewPCG(seed, 0))
	previous := s.start - 8
	page := func(rest int) {
		here := s.at()
		if here%postgres.WALPageSize != 0 {
			return
		}
		flags, timeline := uint16(0), postgres.Timeline(1)
		for _, f := range forks {
			if here+postgres.WALPageSize > f.Switch {
				timeline = f.Timeline
			}
		}
		if rest > 0 {
			flags |= 1
		}
		long := testSize.Offset(here) == 0
		if long {
			flags |= 2
		}
		le := binary.LittleEndian
		s.b = le.AppendUint16(s.b, 0xD110)
		s.b = le.AppendUint16(s.b, flags)
		s.b = le.AppendUint32(s.b, uint32(timeline))
		s.b = le.AppendUint64(s.b, uint64(here))
		s.b = le.AppendUint64(s.b, uint64(rest))
		if long {
			s.b = le.AppendUint64(s.b, uint64(testSystem))
			s.b = le.AppendUint32(s.b, uint32(testSize))
			s.b = le.AppendUint32(s.b, postgres.WALPageSize)
		}
	}
	castagnoli := crc32.MakeTable(crc32.Castagnoli)
	for len(s.b) < n {
		page(0)
		record := make([]byte, 24, 24+9000)
		body := make([]byte, 5+r.IntN(1+r.IntN(8000)))
		for i := range body[5:] {
			body[5+i] = byte(r.Uint32())
		}
		body[0] = 254
		binary.LittleEndian.PutUint32(body[1:], uint32(len(body)-5))
		binary.LittleEndian.PutUint32(record, uint32(24+len(body)))
		binary.LittleEndian.PutUint64(record[8:], uint64(previous))
		record[17] = 9
		binary.LittleEndian.PutUint32(record[20:], crc32.Update(crc32.Checksum(body, castagnoli), castagnoli, record[:20]))
		record = append(record, body...)
		previous = s.at()
		for left := len(record); left > 0; {
			page(left)
			k := min(left, int(postgres.WALPageSize-s.at()%postgres.WALPageSize))
			s.b = append(s.b, record[len(record)-left:][:k]...)
			left -= k
		}
		for s.at()%8 != 0 {
			s.b = append(s.b, 0)
		}
		s.ends = append(s.ends, s.at())
	}
	return s
}

func (s *stream) at() postgres.LSN { return s.start + postgres.LSN(len(s.b)) }

func (s *stream) bytes(from, to postgres.LSN) []byte { return s.b[from-s.start : to-s.start] }

// end is the last record's end at or before a position.
func (s *stream) end(before postgres.LSN) postgres.LSN {
	i, _ := slices.BinarySearch(s.ends, before+1)
	return s.ends[i-1]
}

// fifth is segment 5, completed with zeros from a position on.
func (s *stream) fifth(until postgres.LSN) []byte {
	b := make([]byte, testSize)
	from := testSize.Start(5)
	copy(b, s.bytes(from, min(until, from+postgres.LSN(testSize))))
	return b
}

func (w *world) putTail(t postgres.Timeline, s *stream, from, to postgres.LSN) repository.Tail {
	w.t.Helper()
	tail := repository.Tail{Timeline: t, Start: from, End: to}
	if _, err := w.series.PutTail(w.t.Context(), tail, repository.WALInfo{Host: "db1"}, s.bytes(from, to)); err != nil {
		w.t.Fatal(err)
	}
	return tail
}

func (w *world) putFile(name string, b []byte) {
	w.t.Helper()
	if _, _, err := w.series.PutWAL(w.t.Context(), repository.WALInfo{Name: name, Size: int64(len(b)), Host: "db1"}, bytes.NewReader(b)); err != nil {
		w.t.Fatal(err)
	}
}

// objects are the files below the repository's directory whose names match.
func (w *world) objects(pattern string) []string {
	w.t.Helper()
	dir := strings.TrimPrefix(w.repo.Store().URL(), "file://")
	names, err := filepath.Glob(filepath.Join(dir, "orders", "*", "*", "wal", pattern))
	if err != nil || len(names) == 0 {
		w.t.Fatalf("no object %s: %v", pattern, err)
	}
	return names
}

// flip damages an object, in its middle.
func (w *world) flip(pattern string) {
	w.t.Helper()
	for _, name := range w.objects(pattern) {
		b, err := os.ReadFile(name)
		if err != nil {
			w.t.Fatal(err)
		}
		b[len(b)*3/4] ^= 0x10
		if err := os.Chmod(name, 0o600); err != nil {
			w.t.Fatal(err)
		}
		if err := os.WriteFile(name, b, 0o600); err != nil {
			w.t.Fatal(err)
		}
	}
}

func TestChain_likeModel(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		var tails []repository.Tail
		for range rapid.IntRange(0, 12).Draw(t, "tails") {
			start := rapid.IntRange(0, 19).Draw(t, "start")
			end := rapid.IntRange(start+1, 20).Draw(t, "end")
			tails = append(tails, repository.Tail{Timeline: 1, Start: postgres.LSN(start), End: postgres.LSN(end)})
		}
		from := postgres.LSN(rapid.IntRange(0, 5).Draw(t, "from"))
		chain, end := Chain(tails, from)
		// One byte after the other.
		want := from
		for slices.ContainsFunc(tails, func(x repository.Tail) bool { return x.Start <= want && want < x.End }) {
			want++
		}
		if end != want {
			t.Fatalf("found an end at %d, expected %d", end, want)
		}
		at := from
		for i, x := range chain {
			if x.Start > at || x.End <= at || i > 1 && x.Start <= chain[i-2].End {
				t.Fatalf("chain %v: its link %d does not belong at %d", chain, i, at)
			}
			at = x.End
		}
		if at != end {
			t.Fatalf("chain %v ends at %d, not at %d", chain, at, end)
		}
	})
}

func TestRecordEnd(t *testing.T) {
	for at, want := range map[postgres.LSN]postgres.LSN{
		0x100001: 0x100000, 0x100028: 0x100000, 0x100030: 0x100030, 0x100031: 0x100038,
		0x102000: 0x102000, 0x102018: 0x102000, 0x102019: 0x102020,
	} {
		if got := RecordEnd(at, testSize); got != want {
			t.Errorf("%s: found %s, expected %s", at, got, want)
		}
	}
}

// drawTails cuts [start, end) of a stream into tails as a streamer might, at ends of records, some within others.
func drawTails(t *rapid.T, s *stream, start, end postgres.LSN) []repository.Tail {
	var tails []repository.Tail
	cut := func(from postgres.LSN) postgres.LSN {
		at := postgres.LSN(rapid.Uint64Range(uint64(from)+1, uint64(end)).Draw(t, "cut"))
		if at = s.end(at); at <= from {
			return end
		}
		return at
	}
	for at := start; at < end; {
		for range rapid.IntRange(0, 2).Draw(t, "superseded") {
			tails = append(tails, repository.Tail{Timeline: 1, Start: at, End: cut(at)})
		}
		next := cut(at)
		tails = append(tails, repository.Tail{Timeline: 1, Start: at, End: next})
		at = next
	}
	slices.SortFunc(tails, func(a, b repository.Tail) int { return bytes.Compare([]byte(a.String()), []byte(b.String())) })
	return slices.Compact(tails)
}

// tailMap holds tails in memory; damaged ones cannot be read.
type tailMap struct {
	s       *stream
	damaged map[repository.Tail]bool
}

func (m *tailMap) ID() repository.SeriesID {
	return repository.SeriesID{Job: "orders", Instance: "15-main", SystemID: testSystem}
}

func (m *tailMap) GetTail(_ context.Context, t repository.Tail, w io.Writer) (repository.WALInfo, error) {
	b := m.s.bytes(t.Start, t.End)
	if m.damaged[t] {
		_, _ = w.Write(b[:len(b)/2])
		return repository.WALInfo{}, &repository.CorruptError{Key: t.String(), Err: errors.New("flipped")}
	}
	_, err := w.Write(b)
	return repository.WALInfo{}, err
}

// memoryFile is a file to be.
type memoryFile struct{ bytes.Buffer }

func (f *memoryFile) reset() error { f.Reset(); return nil }

func TestAssembleSegment_likeModel(t *testing.T) {
	s := newStream(1, 2*int(testSize)+20000, 1)
	segment := postgres.SegmentName(segment(1, 2))
	start := segment.Start(testSize)
	rapid.Check(t, func(t *rapid.T) {
		end := segment.End(testSize)
		if rapid.Bool().Draw(t, "unfinished") {
			end = s.end(start + postgres.LSN(rapid.IntRange(16000, int(testSize)).Draw(t, "length")))
		}
		tails := drawTails(t, s, start, end)
		m := &tailMap{s: s, damaged: map[repository.Tail]bool{}}
		var good []repository.Tail
		for _, x := range tails {
			if m.damaged[x] = rapid.IntRange(0, 9).Draw(t, "damaged") == 0; !m.damaged[x] {
				good = append(good, x)
			}
		}
		_, want := Chain(good, start)
		var file memoryFile
		reach, err := assembleSegment(t.Context(), m, tails, segment, testSize, &file)
		if want < end {
			var e *TailError
			if !errors.As(err, &e) || !m.damaged[e.Tail] || e.Reached != RecordEnd(want, testSize) || e.Hint() == "" {
				t.Fatalf("found %s, %v; expected *TailError that says that it ends at %s", reach, err, want)
			}
			return
		}
		if err != nil {
			t.Fatal(err)
		}
		if reach != end || !bytes.Equal(file.Bytes(), s.bytes(start, end)) {
			t.Fatalf("found %d bytes up to %s, expected the WAL up to %s", file.Len(), reach, end)
		}
	})
}

// A tail that holds what no server wrote is found out by its records, and by what another one holds.
func TestAssembleSegment_contradiction(t *testing.T) {
	s, other := newStream(1, int(testSize)+20000, 1), newStream(1, int(testSize)+20000, 2)
	name := postgres.SegmentName(segment(1, 1))
	w := newWorld(t)
	a, b := s.end(s.start+100_000), s.end(s.start+200_000)
	first := w.putTail(1, s, s.start, a)
	mixed := &stream{b: slices.Concat(s.bytes(s.start, a), other.bytes(a, other.at())), start: s.start}
	second := w.putTail(1, mixed, a, b)
	var file memoryFile
	_, err := assembleSegment(t.Context(), w.series, []repository.Tail{first, second}, name, testSize, &file)
	var e *TailError
	if !errors.As(err, &e) || e.Tail.Start != a || e.Reached != a || !strings.Contains(err.Error(), "records") {
		t.Errorf("got %v, expected that the records of the second tail are none", err)
	}
	// With one that holds the right thing, too, that one is taken.
	third := w.putTail(1, s, s.start, s.end(b+5000))
	reach, err := assembleSegment(t.Context(), w.series, []repository.Tail{first, second, third}, name, testSize, &file)
	if err != nil || reach != third.End {
		t.Errorf("found %s, %v; expected %s", reach, err, third.End)
	}
	overlapping := w.putTail(1, mixed, s.end(a-5000), b)
	_, err = assembleSegment(t.Context(), w.series, []repository.Tail{first, overlapping}, name, testSize, &file)
	if err != nil {
		t.Logf("as expected: %v", err)
	}
	_, err = assembleSegment(t.Context(), w.series, []repository.Tail{first, {Timeline: 1, Start: overlapping.Start, End: b}}, name, testSize, &file)
	if !errors.As(err, &e) {
		t.Errorf("got %v, expected *TailError", err)
	}
}

func TestFetch_tails(t *testing.T) {
	s := newStream(4, 3*int(testSize)+20000, 1)
	other := newStream(4, 3*int(testSize)+20000, 9)
	start := testSize.Start(5)
	end := testSize.Start(6)
	r := func(n int) postgres.LSN { return s.end(start + postgres.LSN(20*n)) }
	history := func(at postgres.LSN) string { return "1\t" + at.String() + "\tno recovery target specified\n" }
	for what, test := range map[string]struct {
		set    func(w *world)
		option func(*FetcherOptions)
		name   string       // default: segment 5 of timeline 1
		reach  postgres.LSN // 0: not found
		err    string
	}{
		"one":                  {set: func(w *world) { w.putTail(1, s, start, r(1000)) }, reach: r(1000)},
		"a chain":              {set: func(w *world) { w.putTail(1, s, start, r(15000)); w.putTail(1, s, r(15000), r(16000)) }, reach: r(16000)},
		"superseded ones":      {set: func(w *world) { w.putTail(1, s, start, r(3000)); w.putTail(1, s, start, r(5000)) }, reach: r(5000)},
		"all of it":            {set: func(w *world) { w.putTail(1, s, start, r(9000)); w.putTail(1, s, r(9000), end) }, reach: end},
		"all of it, and later": {set: func(w *world) { w.putTail(1, s, start, end); w.put(segment(1, 6)) }, reach: end},
		"not its beginning":    {set: func(w *world) { w.putTail(1, s, r(1000), r(3000)) }},
		"a hole":               {set: func(w *world) { w.putTail(1, s, start, r(1000)); w.putTail(1, s, r(5000), r(9000)) }, reach: r(1000)},
		"the whole one, too":   {set: func(w *world) { w.putTail(1, s, start, r(1000)); w.putFile(segment(1, 5), s.fifth(end)) }, reach: end},
		"before a later one":   {set: func(w *world) { w.putTail(1, s, start, r(1000)); w.put(segment(1, 6)) }, err: segment(1, 6) + " is there"},
		"before later tails":   {set: func(w *world) { w.putTail(1, s, start, r(1000)); w.putTail(1, s, end, s.end(end+9000)) }, err: "ends at " + r(1000).String()},
		"absent, later tails":  {set: func(w *world) { w.putTail(1, s, end, s.end(end+9000)) }, err: "wal from 0/600000 to"},
		"a position beyond":    {set: func(w *world) { w.putTail(1, s, start, r(1000)) }, option: func(o *FetcherOptions) { o.Until = r(1000) + 8 }, err: "needed to reach"},
		"the position it has":  {set: func(w *world) { w.putTail(1, s, start, r(1000)) }, option: func(o *FetcherOptions) { o.Until = r(1000) }, reach: r(1000)},
		"stops before the gap": {set: func(w *world) { w.putTail(1, s, start, r(9000)); w.put(segment(1, 6)) }, option: func(o *FetcherOptions) { o.Stop = r(1000) }, reach: r(9000)},
		"stops behind the gap": {set: func(w *world) { w.putTail(1, s, start, r(1000)); w.put(segment(1, 6)) }, option: func(o *FetcherOptions) { o.Stop = r(1000) + 1 }, err: segment(1, 6)},
		"longer than partial": {set: func(w *world) {
			w.putTail(1, s, start, r(9000))
			w.putFile(segment(1, 5)+".partial", s.fifth(r(5000)))
		}, reach: r(9000)},
		"shorter than partial": {set: func(w *world) {
			w.putTail(1, s, start, r(5000))
			w.putFile(segment(1, 5)+".partial", s.fifth(r(9000)))
		}, reach: r(9000)},
		"other than partial": {set: func(w *world) {
			w.putTail(1, s, start, r(5000))
			w.putFile(segment(1, 5)+".partial", other.fifth(r(9000)))
		}, err: "different content"},
		"partial up to a point": {set: func(w *world) { w.putFile(segment(1, 5)+".partial", s.fifth(r(5000))) }, option: func(o *FetcherOptions) { o.Until = r(5000) }, reach: r(5000)},
		"partial too short":     {set: func(w *world) { w.putFile(segment(1, 5)+".partial", s.fifth(r(5000))) }, option: func(o *FetcherOptions) { o.Until = r(9000) }, err: "needed to reach"},
		"up to a fork":          {set: func(w *world) { w.putTail(1, s, start, r(5000)); w.putHistory(2, history(r(5000))) }, reach: r(5000)},
		"beyond a fork":         {set: func(w *world) { w.putTail(1, s, start, r(9000)); w.putHistory(2, history(r(5000))) }, reach: r(9000)},
		"not up to a fork":      {set: func(w *world) { w.putTail(1, s, start, r(5000)); w.putHistory(2, history(r(9000))) }, err: "timeline 2, which branches off at"},
		"a fork that has it": {set: func(w *world) {
			w.putTail(1, s, start, r(5000))
			w.putHistory(2, history(r(9000)))
			fork := newStream(4, 3*int(testSize), 1, postgres.Ancestor{Timeline: 2, Switch: r(9000)})
			w.putTail(2, fork, start, r(20000))
		}, reach: r(5000)},
		"of the fork": {name: segment(2, 5), set: func(w *world) {
			w.putHistory(2, history(r(9000)))
			fork := newStream(4, 3*int(testSize), 1, postgres.Ancestor{Timeline: 2, Switch: r(9000)})
			w.putTail(2, fork, start, r(20000))
		}, reach: r(20000)},
		"of the fork, not that far": {name: segment(2, 5), set: func(w *world) {
			w.putHistory(2, history(r(9000)))
			w.putTail(2, newStream(4, 3*int(testSize), 1), start, r(5000))
		}, option: func(o *FetcherOptions) { o.Until = r(7000) }},
		"damaged": {set: func(w *world) { w.putTail(1, s, start, r(5000)); w.flip("00000001/*.tail") }, err: "without which the WAL ends at 0/500000"},
		"damaged, another covers": {set: func(w *world) {
			w.putTail(1, s, start, r(9000))
			w.flip("00000001/*.tail")
			w.putTail(1, s, start, r(5000))
			w.putTail(1, s, r(4000), r(9000))
		}, reach: r(9000)},
		"damaged beyond the stop": {set: func(w *world) {
			w.putTail(1, s, r(5000), r(9000))
			w.flip("00000001/*.tail")
			w.putTail(1, s, start, r(5000))
		}, option: func(o *FetcherOptions) { o.Stop = r(1000) }, reach: r(5000)},
		"the whole one is damaged": {set: func(w *world) {
			w.putFile(segment(1, 5), s.fifth(end))
			w.flip("00000001/" + segment(1, 5))
			w.putTail(1, s, start, end)
		}, reach: end},
		"the whole one is damaged, tails do not do": {set: func(w *world) {
			w.putFile(segment(1, 5), s.fifth(end))
			w.flip("00000001/" + segment(1, 5))
			w.putTail(1, s, start, r(5000))
		}, err: segment(1, 5)},
	} {
		t.Run(what, func(t *testing.T) {
			w := newWorld(t)
			test.set(w)
			var options []func(*FetcherOptions)
			if test.option != nil {
				options = append(options, test.option)
			}
			f := w.fetcher(w.series, options...)
			name := test.name
			if name == "" {
				name = segment(1, 5)
			}
			for range 2 { // a server asks again for what it has ended with
				file, found, err := f.Fetch(t.Context(), name)
				switch {
				case test.err != "":
					if err == nil || !strings.Contains(err.Error(), test.err) || !strings.Contains(err.Error(), "in "+w.series.ID().String()) && !strings.Contains(err.Error(), "of "+w.series.ID().String()) {
						t.Fatalf("got found %v, %v, expected an error that says %q", found, err, test.err)
					}
					continue
				case err != nil:
					t.Fatal(err)
				case found != (test.reach != 0):
					t.Fatalf("found: got %v, expected %v", found, test.reach != 0)
				case !found:
					continue
				}
				b, err := os.ReadFile(file)
				if err != nil {
					t.Fatal(err)
				}
				if got, want := b, s.fifth(test.reach); !bytes.Equal(got[:test.reach-start], want[:test.reach-start]) && test.name == "" || len(got) != int(testSize) {
					t.Errorf("the file is not the WAL up to %s", test.reach)
				}
				if scan := postgres.ScanSegment(postgres.SegmentName(name), testSize, b); test.reach < end && scan.End != test.reach {
					t.Errorf("its records end at %s, expected %s: %v", scan.End, test.reach, scan.Problem)
				}
				if err := os.Remove(file); err != nil {
					t.Fatal(err)
				}
			}
		})
	}
}

// A timeline whose history is damaged cannot be followed, but its number is not free.
func TestFetch_damagedHistory(t *testing.T) {
	w := newWorld(t)
	w.putHistory(2, "1\t0/500000\tno recovery target specified\n")
	w.flip("00000002.history")
	w.put(segment(1, 4))
	f := w.fetcher(w.series)
	file, found, err := f.Fetch(t.Context(), "00000002.history")
	if err != nil || !found {
		t.Fatalf("found %v, %v", found, err)
	}
	b, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if h, err := postgres.ParseHistory(2, b); err == nil {
		t.Errorf("it reads as %v", h)
	}
	if _, found, err := f.Fetch(t.Context(), segment(1, 5)); found || err != nil {
		t.Errorf("the end of timeline 1: found %v, %v", found, err)
	}
}

// A standby that follows an archive asks for the unfinished segment until it is whole.
func TestFetch_tailsThatGrow(t *testing.T) {
	w := newWorld(t)
	s := newStream(5, 2*int(testSize), 1)
	f := w.fetcher(w.series)
	ask := func() (postgres.LSN, bool) {
		file, found, err := f.Fetch(t.Context(), segment(1, 5))
		if err != nil {
			t.Fatal(err)
		}
		if !found {
			return 0, false
		}
		b, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		return postgres.ScanSegment(postgres.SegmentName(segment(1, 5)), testSize, b).End, true
	}
	if at, found := ask(); found {
		t.Fatalf("found up to %s", at)
	}
	for n := 10_000; n < int(testSize); n += 200_000 {
		to := s.end(s.start + postgres.LSN(n))
		w.putTail(1, s, s.start, to)
		if at, found := ask(); !found || at != to {
			t.Fatalf("found %v up to %s, expected %s", found, at, to)
		}
	}
	// The segment takes its tails' place between one request and the next.
	w.putFile(segment(1, 5), s.fifth(s.at()))
	for tail, err := range w.series.ListTails(t.Context(), 1, 0, ^postgres.LSN(0)) {
		if err != nil {
			t.Fatal(err)
		}
		if err := w.series.DeleteTails(t.Context(), tail); err != nil {
			t.Fatal(err)
		}
	}
	if _, found := ask(); !found {
		t.Fatal("the whole segment was not found")
	}
}

// hangingSource delays the first download of a segment.
type hangingSource struct {
	*countingSource
	name  string
	delay time.Duration
}

func (s *hangingSource) GetWAL(ctx context.Context, name string, w io.Writer) (repository.WALInfo, error) {
	first := s.count(name) == 0
	if name == s.name && first {
		s.mu.Lock()
		s.calls[name]++
		s.mu.Unlock()
		select {
		case <-time.After(s.delay):
		case <-ctx.Done():
			return repository.WALInfo{}, ctx.Err()
		}
	}
	return s.countingSource.GetWAL(ctx, name, w)
}

func TestFetch_hedges(t *testing.T) {
	w := newWorld(t)
	for n := uint64(1); n <= 12; n++ {
		w.put(segment(1, n))
	}
	source := &hangingSource{countingSource: &countingSource{Series: w.series, calls: map[string]int{}}, name: segment(1, 10), delay: time.Minute}
	f := w.fetcher(source)
	began := time.Now()
	for n := uint64(1); n <= 12; n++ {
		if _, found, err := f.Fetch(t.Context(), segment(1, n)); err != nil || !found {
			t.Fatalf("%d: %v, %v", n, found, err)
		}
	}
	if d := time.Since(began); d > 20*time.Second {
		t.Errorf("it took %s", d)
	}
	if c := source.count(segment(1, 10)); c != 2 {
		t.Errorf("%d requests for the late one, expected 2", c)
	}
	for n := uint64(1); n <= 12; n++ {
		if c := source.count(segment(1, n)); n != 10 && c != 1 {
			t.Errorf("%d requests for segment %d, expected 1", c, n)
		}
	}
}

// slowSource takes a while for each segment, as a store far away does.
type slowSource struct {
	*countingSource
	each time.Duration
}

func (s *slowSource) GetWAL(ctx context.Context, name string, w io.Writer) (repository.WALInfo, error) {
	select {
	case <-time.After(s.each):
	case <-ctx.Done():
		return repository.WALInfo{}, ctx.Err()
	}
	return s.countingSource.GetWAL(ctx, name, w)
}

func TestFetch_adapts(t *testing.T) {
	w := newWorld(t)
	const count = 40
	for n := uint64(1); n <= count; n++ {
		w.put(segment(1, n))
	}
	source := &slowSource{&countingSource{Series: w.series, calls: map[string]int{}}, 100 * time.Millisecond}
	f := w.fetcher(source)
	var late time.Duration
	for n := uint64(1); n <= count; n++ {
		began := time.Now()
		file, found, err := f.Fetch(t.Context(), segment(1, n))
		if err != nil || !found {
			t.Fatalf("%d: %v, %v", n, found, err)
		}
		if n > count/2 {
			late += time.Since(began)
		}
		_ = os.Remove(file)
		time.Sleep(20 * time.Millisecond) // replay
	}
	// One by one they would take 2 seconds.
	if late > time.Second {
		t.Errorf("the second half had to be waited for %s", late)
	}
	for n := uint64(1); n <= count; n++ {
		if c := source.count(segment(1, n)); c != 1 {
			t.Errorf("%d requests for segment %d, expected 1", c, n)
		}
	}
	// Behind the end nothing is looked for again and again.
	beyond := 0
	for n := uint64(count + 2); n <= count+80; n++ {
		beyond += source.count(segment(1, n))
	}
	if beyond > 16 {
		t.Errorf("%d requests for what lies behind the end", beyond)
	}
	for range 4 {
		if _, found, err := f.Fetch(t.Context(), segment(1, count+1)); found || err != nil {
			t.Fatal(found, err)
		}
	}
	again := 0
	for n := uint64(count + 2); n <= count+80; n++ {
		again += source.count(segment(1, n))
	}
	if again != beyond {
		t.Errorf("%d more requests for what lies behind the end", again-beyond)
	}
}
