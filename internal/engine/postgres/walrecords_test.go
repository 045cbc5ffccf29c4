package postgres_test

import (
	"bufio"
	"context"
	"encoding/binary"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"pgregory.net/rapid"

	"github.com/pgark/terraform-provider-pgark/internal/engine/postgres"
	"github.com/pgark/terraform-provider-pgark/test/pgtest"
)

// recordEnds is what pg_waldump says of the records of some segments that follow one another, the last ended by a switch.
type recordEnds struct {
	ends     []postgres.LSN    // ascending
	skipped  [][2]postgres.LSN // from the end of a switch to the end of its segment
	records  int64
	finished int64 // transactions that somebody may have waited for
}

func dumpRecords(t *testing.T, c *pgtest.Cluster, names []string, size postgres.SegmentSize) recordEnds {
	t.Helper()
	cmd := c.Command("pg_waldump", "-p", c.WALDir, names[0], names[len(names)-1])
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	d := recordEnds{ends: []postgres.LSN{postgres.SegmentName(names[0]).Start(size)}}
	lines := bufio.NewScanner(out)
	lines.Buffer(nil, 64<<20) // a logical message is printed byte by byte, whatever its length
	for lines.Scan() {
		m := waldumpLine.FindStringSubmatch(lines.Text())
		if m == nil {
			continue // "first record is after …"
		}
		start := lsnOf(t, m[3])
		d.records++
		// A record that begins behind a page's header follows one that ended with the page before.
		end := start
		if size.Offset(start) == postgres.WALHeaderSize {
			end -= postgres.WALHeaderSize
		} else if start%postgres.WALPageSize == 24 {
			end -= 24
		}
		d.ends = append(d.ends, end)
		switch m[1] + " " + m[4] {
		case "Transaction COMMIT", "Transaction ABORT", "Transaction COMMIT_PREPARED", "Transaction ABORT_PREPARED", "Transaction PREPARE":
			d.finished++
		case "XLOG SWITCH":
			end := start + 24
			if start/postgres.WALPageSize != (end-1)/postgres.WALPageSize {
				end += 24
			}
			d.skipped = append(d.skipped, [2]postgres.LSN{end, size.Start(size.Number(start) + 1)})
		}
	}
	if err := lines.Err(); err != nil {
		_ = cmd.Process.Kill() // or it would wait for somebody to read on
		_ = cmd.Wait()         // it was killed
		t.Fatalf("read what pg_waldump prints: %v", err)
	}
	_ = cmd.Wait() // it fails where the WAL ends
	return d
}

// at is where the last record ended that lies below received.
func (d *recordEnds) at(received postgres.LSN) postgres.LSN {
	for _, s := range d.skipped {
		if s[0] <= received && received <= s[1] {
			return received
		}
	}
	i, found := slices.BinarySearch(d.ends, received)
	if !found {
		i--
	}
	return d.ends[i]
}

// pieces cuts b in pieces of all sizes: as a server sends them, and smaller than anything.
func pieces(rnd *rand.Rand, b []byte) func(yield func([]byte) bool) {
	return func(yield func([]byte) bool) {
		for len(b) > 0 {
			n := min(1+rnd.IntN([]int{12, 200, 9000, 128 << 10, 128 << 10, 1 << 20}[rnd.IntN(6)]), len(b))
			if !yield(b[:n]) {
				return
			}
			b = b[n:]
		}
	}
}

// checkRecords compares the walk over a stream with pg_waldump and with the walk over each segment, and looks for work in
// a server that has none.
func checkRecords(t *testing.T, c *pgtest.Cluster, size postgres.SegmentSize) {
	ctx := context.Background()
	conn := c.Conn(ctx)
	for _, sql := range []string{
		"create table r (id bigint generated always as identity, v text)",
		"insert into r (v) select repeat(md5(g::text), 3) from generate_series(1, 2000) g",
		"begin", "insert into r (v) values ('x')", "rollback",
		"begin", "insert into r (v) values ('p')", "prepare transaction 'p'",
		"commit prepared 'p'",
		"select pg_logical_emit_message(false, 'long', repeat('w', 3000000))", // over segments of 1 MiB
		"select pg_create_restore_point('here')",
		"select pg_switch_wal()",
		"insert into r (v) values ('y')",
		"select pg_switch_wal()",
	} {
		if _, err := conn.Exec(ctx, sql); err != nil {
			t.Fatalf("%s: %v", sql, err)
		}
	}
	names := segments(t, c)
	names = names[max(0, len(names)-6):]
	var all []byte
	var records int64
	ends := make(map[postgres.LSN]postgres.LSN) // of the last record, by segment's end
	for _, name := range names {
		b, err := os.ReadFile(filepath.Join(c.WALDir, name))
		if err != nil {
			t.Fatal(err)
		}
		all = append(all, b...)
		s := postgres.ScanSegment(postgres.SegmentName(name), size, b)
		if s.Problem != nil {
			t.Fatal(s.Problem)
		}
		records += s.Records
		ends[postgres.SegmentName(name).End(size)] = s.End
	}
	// The packages of the other majors have no pg_waldump; records are laid out the same in all of them.
	var dump *recordEnds
	if c.HasTool("pg_waldump") {
		d := dumpRecords(t, c, names, size)
		if dump = &d; dump.records < records || len(dump.skipped) == 0 {
			t.Fatalf("pg_waldump found %d records in %v, we %d", dump.records, names, records)
		}
	}
	start := postgres.SegmentName(names[0]).Start(size)
	seed := rand.Uint64()
	rnd := rand.New(rand.NewPCG(seed, 0))
	s := postgres.NewRecordScanner(1, start, size)
	var passed postgres.PassedRecords
	for piece := range pieces(rnd, all) {
		if n, err := s.Write(piece); n != len(piece) || err != nil {
			t.Fatalf("seed %d: Write at %s: %d, %v", seed, s.Received(), n, err)
		}
		if dump != nil {
			if expected := dump.at(s.Received()); s.End() != expected {
				t.Fatalf("seed %d: at %s the last record ends at %s, expected %s", seed, s.Received(), s.End(), expected)
			}
		}
		if end := ends[s.Received()]; end != 0 && end != s.End() {
			t.Errorf("seed %d: at the segment's end %s the last record ends at %s, the segment's walk says %s", seed, s.Received(), s.End(), end)
		}
		p := s.Take()
		passed.Commits += p.Commits
		passed.Work = passed.Work || p.Work
	}
	if s.Received() != start+postgres.LSN(len(all)) || passed.Commits == 0 || !passed.Work {
		t.Errorf("seed %d: received up to %s, %+v; expected %s, and commits", seed, s.Received(), passed, start+postgres.LSN(len(all)))
	}
	if dump != nil && passed.Commits != dump.finished {
		t.Errorf("seed %d: found %d commits, pg_waldump %d", seed, passed.Commits, dump.finished)
	}

	// What an idle server writes is no work.
	work := func() bool {
		t.Helper()
		now := lsnOf(t, c.Scalar("select pg_current_wal_flush_lsn()"))
		name := postgres.SegmentAt(1, now, size)
		b, err := os.ReadFile(filepath.Join(c.WALDir, string(name)))
		if err != nil {
			t.Fatal(err)
		}
		s := postgres.ScanSegment(name, size, b[:size.Offset(now)])
		if s.End != now {
			t.Errorf("the walk over the segment in use ends at %s, expected %s (%v)", s.End, now, s.Problem)
		}
		return s.Work
	}
	c.Exec("checkpoint")
	c.Exec("select pg_switch_wal()")
	c.Exec("checkpoint")
	if work() {
		t.Error("found work where there was a checkpoint only")
	}
	c.Exec("insert into r (v) values ('work')")
	if !work() {
		t.Error("found no work where there was an insert")
	}
}

// Records of all sizes, over pages and segments, in pieces of all sizes.
func TestRecordScanner_anyRecordsInAnyPieces(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		w := newWAL()
		ends := []postgres.LSN{w.start}
		commits := int64(0)
		end := func() postgres.LSN { return (w.at() + 7) &^ 7 }
		for range rapid.IntRange(1, 60).Draw(t, "records") {
			switch rapid.IntRange(0, 9).Draw(t, "kind") {
			case 0:
				w.add(1, 0x00, data(commitAt(time.Unix(1_800_000_000, 0))))
				commits++
			case 1:
				w.add(9, 0, data(make([]byte, rapid.IntRange(0, 1_500_000).Draw(t, "long"))))
			case 2: // up to the end of the page, or nearly
				left := int(postgres.WALPageSize - w.at()%postgres.WALPageSize)
				if n := left - 26 - rapid.IntRange(0, 40).Draw(t, "rest"); n > 0 && n < 256 {
					w.add(9, 0, data(make([]byte, n)))
				} else if n > 255 {
					w.add(9, 0, data(make([]byte, n-3)))
				}
			case 3:
				w.add(0, 0x40, nil)
				from := end()
				w.fill()
				for at := from; at <= w.at(); at += 8 {
					ends = append(ends, at)
				}
			default:
				w.add(9, 0, data(make([]byte, rapid.IntRange(0, 3000).Draw(t, "length"))))
			}
			ends = append(ends, end())
		}
		w.align()
		b := w.b.Bytes()
		s := postgres.NewRecordScanner(1, w.start, smallSegment)
		got := int64(0)
		for piece := range pieces(rand.New(rand.NewPCG(rapid.Uint64().Draw(t, "seed"), 0)), b) {
			if n, err := s.Write(piece); n != len(piece) || err != nil {
				t.Fatalf("Write: %d, %v", n, err)
			}
			i, found := slices.BinarySearch(ends, s.Received())
			if !found {
				i--
			}
			if expected := ends[i]; s.End() != expected && s.End()&^7 != expected { // zeros behind a switch count one by one
				t.Fatalf("at %s the last record ends at %s, expected %s", s.Received(), s.End(), expected)
			}
			got += s.Take().Commits
		}
		if got != commits {
			t.Errorf("found %d commits, expected %d", got, commits)
		}

		// A bit of a record that is changed is found, or makes the last record longer than what there is.
		at := rapid.IntRange(0, len(b)-1).Draw(t, "damaged byte")
		position := w.start + postgres.LSN(at)
		if b[at] == 0 || position%postgres.WALPageSize < postgres.WALHeaderSize { // padding; headers have their own tests
			return
		}
		b[at] ^= 1 << rapid.IntRange(0, 7).Draw(t, "bit")
		s = postgres.NewRecordScanner(1, w.start, smallSegment)
		n, err := s.Write(b)
		if s.End() > s.Received() || s.Received() != w.start+postgres.LSN(n) || s.End() > position {
			t.Fatalf("the byte at %s was changed; received %s, end %s, %v", position, s.Received(), s.End(), err)
		}
		if err == nil {
			return
		}
		if n, again := s.Write(b); n != 0 || again == nil || again.Error() != err.Error() {
			t.Errorf("the error did not stay: %d, %v", n, again)
		}
	})
}

func TestRecordScanner_beginsWithinARecord(t *testing.T) {
	w := newWAL()
	w.add(9, 0, data(make([]byte, int(smallSegment)+5000)))
	after := (w.at() + 7) &^ 7
	w.add(1, 0, data(commitAt(time.Unix(1_800_000_000, 0))))
	w.align()
	b := w.b.Bytes()[smallSegment:]
	start := 2 * postgres.LSN(smallSegment)
	s := postgres.NewRecordScanner(1, start, smallSegment)
	if _, err := s.Write(b[:1000]); err != nil || s.End() != start {
		t.Errorf("within the record: end %s, %v", s.End(), err)
	}
	if _, err := s.Write(b[1000 : after-start]); err != nil || s.End() != after {
		t.Errorf("at the record's end: end %s, expected %s, %v", s.End(), after, err)
	}
	if p := s.Take(); p.Commits != 0 || !p.Work {
		t.Errorf("found %+v, expected work of an unknown kind", p)
	}
	if _, err := s.Write(b[after-start:]); err != nil || s.End() != start+postgres.LSN(len(b)) {
		t.Errorf("at the end: %s, %v", s.End(), err)
	}
	p := s.Take()
	if p.Commits != 1 || !p.FirstTime.Equal(time.Unix(1_800_000_000, 0)) || !p.LastTime.Equal(p.FirstTime) {
		t.Errorf("found %+v", p)
	}
	if p := s.Take(); p != (postgres.PassedRecords{}) {
		t.Errorf("taken twice: %+v", p)
	}
}

func TestRecordScanner_overwrittenRecord(t *testing.T) {
	w := newWAL()
	w.align()
	r := w.record(9, 0, data(make([]byte, 20000)))
	w.bytes(r, int(postgres.WALPageSize-w.at()%postgres.WALPageSize))
	w.flags = 8
	w.add(0, 0xD0, data(make([]byte, 16)))
	w.align()
	s := postgres.NewRecordScanner(1, w.start, smallSegment)
	if _, err := s.Write(w.b.Bytes()); err != nil || s.End() != w.at() {
		t.Errorf("end %s, expected %s, %v", s.End(), w.at(), err)
	}
}

func TestRecordScanner_refuses(t *testing.T) {
	const start = postgres.LSN(smallSegment)
	good := sampleSegment()
	change := func(at int, value byte) []byte {
		b := slices.Clone(good)
		b[at] = value
		return b
	}
	for what, c := range map[string]struct {
		s    *postgres.RecordScanner
		b    []byte
		text string
	}{
		"no segment size":           {postgres.NewRecordScanner(1, start, 5), good, "segment size of 5 bytes"},
		"no timeline":               {postgres.NewRecordScanner(0, start, smallSegment), good, "expected a timeline"},
		"not at a segment's start":  {postgres.NewRecordScanner(1, start+8, smallSegment), good, "the start of a segment"},
		"another position":          {postgres.NewRecordScanner(1, 2*start, smallSegment), good, "found address 0/100000"},
		"a later timeline's":        {postgres.NewRecordScanner(1, start, smallSegment), change(4, 2), "found timeline 2, expected 1 to 1"},
		"zeros":                     {postgres.NewRecordScanner(1, start, smallSegment), make([]byte, 8192), "nothing was written from 0/100000 on"},
		"zeros after a record":      {postgres.NewRecordScanner(1, start, smallSegment), append(slices.Clone(good[:40]), make([]byte, 8)...), "no record at 0/100028"},
		"a length beyond reason":    {postgres.NewRecordScanner(1, start, smallSegment), change(43, 0x7F), "found length"},
		"another record's checksum": {postgres.NewRecordScanner(1, start, smallSegment), change(60, good[60]+1), "found checksum"},
	} {
		if _, err := c.s.Write(c.b); err == nil || !strings.Contains(err.Error(), c.text) {
			t.Errorf("%s: %v, expected %q", what, err, c.text)
		}
		if c.s.End() > c.s.Received() {
			t.Errorf("%s: end %s, received %s", what, c.s.End(), c.s.Received())
		}
	}
}

func TestScanSegment_work(t *testing.T) {
	for what, c := range map[string]struct {
		manager, info byte
		work          bool
	}{
		"a shutdown checkpoint":    {0, 0x00, false},
		"an online checkpoint":     {0, 0x10, false},
		"a checkpoint's beginning": {0, 0xE0, false},
		"a restore point":          {0, 0x70, true},
		"a hint's page":            {0, 0xB0, true},
		"running transactions":     {8, 0x10, false},
		"their locks":              {8, 0x00, false},
		"invalidations":            {8, 0x20, true},
		"a commit":                 {1, 0x00, true},
		"a row":                    {10, 0x00, true},
	} {
		w := newWAL()
		w.add(c.manager, c.info, data(make([]byte, 90)))
		w.add(0, 0x40, nil)
		s := postgres.ScanSegment("000000010000000000000001", smallSegment, w.fill())
		if s.Problem != nil || s.Work != c.work {
			t.Errorf("%s: work %v, %v", what, s.Work, s.Problem)
		}
	}
}

// The two walks agree on every segment, good or bad.
func FuzzRecordScanner(f *testing.F) {
	good := sampleSegment()
	f.Add(uint32(0), []byte{0, 1, 2, 3}, uint64(1))
	f.Add(uint32(40), []byte{0xFF, 0xFF, 0xFF, 0x7F}, uint64(2))
	f.Add(uint32(8192), []byte{0x16, 0xD1, 9}, uint64(3))
	f.Add(uint32(40), binary.LittleEndian.AppendUint32(nil, 24), uint64(4))
	f.Fuzz(func(t *testing.T, offset uint32, patch []byte, seed uint64) {
		b := slices.Clone(good)
		copy(b[int(offset)%len(b):], patch)
		const name = postgres.SegmentName("000000010000000000000001")
		whole := postgres.ScanSegment(name, smallSegment, b)
		s := postgres.NewRecordScanner(1, name.Start(smallSegment), smallSegment)
		var err error
		for piece := range pieces(rand.New(rand.NewPCG(seed, 0)), b) {
			before := s.Received()
			var n int
			n, err = s.Write(piece)
			if s.End() > s.Received() || s.Received() != before+postgres.LSN(n) || (err == nil) != (n == len(piece)) && err == nil {
				t.Fatalf("took %d of %d, received %s, end %s, %v", n, len(piece), s.Received(), s.End(), err)
			}
			if err != nil {
				break
			}
		}
		if (err == nil) != (whole.Problem == nil) || err != nil && err.Error() != whole.Problem.Error() || s.End() != max(whole.End, name.Start(smallSegment)) {
			t.Errorf("found %v, end %s; the segment's walk %v, end %s", err, s.End(), whole.Problem, whole.End)
		}
	})
}

// BenchmarkRecordScanner walks WAL as a server sends it: the files in the directory that $PGARK_BENCH_WAL names, or made up.
func BenchmarkRecordScanner(b *testing.B) {
	const size = postgres.DefaultSegmentSize
	timeline, start := postgres.Timeline(1), postgres.LSN(smallSegment)
	segments := [][]byte{sampleSegment()}
	segmentSize := smallSegment
	if directory := os.Getenv("PGARK_BENCH_WAL"); directory != "" {
		entries, err := os.ReadDir(directory)
		if err != nil {
			b.Fatal(err)
		}
		segments, segmentSize = nil, size
		for i, e := range entries {
			if i == 0 {
				name := postgres.SegmentName(e.Name())
				timeline, start = name.Timeline(), name.Start(size)
			}
			content, err := os.ReadFile(filepath.Join(directory, e.Name()))
			if err != nil {
				b.Fatal(err)
			}
			segments = append(segments, content)
		}
	}
	b.SetBytes(int64(segmentSize))
	b.ReportAllocs()
	n := 0
	var s *postgres.RecordScanner
	for b.Loop() {
		if n%len(segments) == 0 {
			s = postgres.NewRecordScanner(timeline, start, segmentSize)
		}
		for piece := range slices.Chunk(segments[n%len(segments)], 128<<10) {
			if _, err := s.Write(piece); err != nil {
				b.Fatal(err)
			}
		}
		n++
	}
}
