package postgres_test

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"hash/crc32"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/pgark/terraform-provider-pgark/internal/engine/postgres"
)

// walBuilder writes WAL as PostgreSQL does, from the beginning of segment 1.
type walBuilder struct {
	b        bytes.Buffer
	size     postgres.SegmentSize
	start    postgres.LSN // of the first byte of b
	timeline postgres.Timeline
	previous postgres.LSN
	flags    uint16 // for the next page header
}

const smallSegment = postgres.MinSegmentSize

func newWAL() *walBuilder {
	const start = postgres.LSN(smallSegment)
	return &walBuilder{size: smallSegment, start: start, timeline: 1, previous: start - 8}
}

func (w *walBuilder) at() postgres.LSN { return w.start + postgres.LSN(w.b.Len()) }

func (w *walBuilder) u(bytes int, v uint64) {
	w.b.Write(binary.LittleEndian.AppendUint64(nil, v)[:bytes])
}

// page writes a page header if the position is at one; rest is what is left of a record.
func (w *walBuilder) page(rest int) {
	here := w.at()
	if here%postgres.WALPageSize != 0 {
		return
	}
	flags := w.flags
	w.flags = 0
	if rest > 0 {
		flags |= 1
	}
	long := w.size.Offset(here) == 0
	if long {
		flags |= 2
	}
	w.u(2, 0xD116)
	w.u(2, uint64(flags))
	w.u(4, uint64(w.timeline))
	w.u(8, uint64(here))
	w.u(8, uint64(rest))
	if long {
		w.u(8, 42)
		w.u(4, uint64(w.size))
		w.u(4, postgres.WALPageSize)
	}
}

// bytes writes a record's bytes around page headers, at most limit of them.
func (w *walBuilder) bytes(record []byte, limit int) {
	record = record[:min(limit, len(record))]
	left := len(record)
	for left > 0 {
		w.page(left)
		n := min(left, int(postgres.WALPageSize-w.at()%postgres.WALPageSize))
		w.b.Write(record[len(record)-left:][:n])
		left -= n
	}
}

func (w *walBuilder) record(manager, info byte, body []byte) []byte {
	r := make([]byte, 24, 24+len(body))
	binary.LittleEndian.PutUint32(r, uint32(24+len(body)))
	binary.LittleEndian.PutUint64(r[8:], uint64(w.previous))
	r[16], r[17] = info, manager
	table := crc32.MakeTable(crc32.Castagnoli)
	sum := crc32.Update(crc32.Checksum(body, table), table, r[:20])
	binary.LittleEndian.PutUint32(r[20:], sum)
	return append(r, body...)
}

// align goes to where the next record begins.
func (w *walBuilder) align() {
	for w.at()%8 != 0 {
		w.b.WriteByte(0)
	}
	w.page(0)
}

// add writes a record and returns where it begins.
func (w *walBuilder) add(manager, info byte, body []byte) postgres.LSN {
	w.align()
	begin := w.at()
	r := w.record(manager, info, body)
	w.previous = begin
	w.bytes(r, len(r))
	return begin
}

func data(b []byte) []byte {
	if len(b) < 256 {
		return append([]byte{255, byte(len(b))}, b...)
	}
	return append(binary.LittleEndian.AppendUint32([]byte{254}, uint32(len(b))), b...)
}

func commitAt(t time.Time) []byte {
	return binary.LittleEndian.AppendUint64(nil, uint64(t.UnixMicro()-946684800_000000))
}

// fill completes the segment with zeros.
func (w *walBuilder) fill() []byte {
	w.b.Write(make([]byte, int(w.size)*((w.b.Len()+int(w.size)-1)/int(w.size))-w.b.Len()))
	return w.b.Bytes()
}

const segment1 = postgres.SegmentName("000000020000000000000001")

func TestScanSegment_recordsOfEveryShape(t *testing.T) {
	early := time.Date(2026, 3, 1, 12, 0, 0, 123456000, time.UTC)
	late := early.Add(3 * time.Second)
	w := newWAL()
	w.timeline = 2
	first := w.add(0, 0x10, data(make([]byte, 88)))
	w.add(1, 0x00, data(commitAt(late)))
	w.add(1, 0x80|0x20, append([]byte{253, 1, 0, 252, 1, 2, 3, 4}, data(commitAt(early))...)) // an abort, with origin and top-level id
	w.add(1, 0x10, data(commitAt(early.Add(-time.Hour))))                                     // a PREPARE has no such timestamp
	w.add(1, 0x50, data(commitAt(early.Add(-time.Hour))))                                     // nor has an ASSIGNMENT
	w.add(10, 0x00, append([]byte{0, 0, 9, 0}, make([]byte, 40)...))                          // refers to a block
	w.add(0, 0x70, data(append(commitAt(early.Add(time.Second)), append([]byte("here"), make([]byte, 60)...)...)))
	w.add(9, 0, data(make([]byte, 30000))) // over several pages
	for i := range 200 {
		w.add(9, 0, data(make([]byte, i))) // some cut by a page in their headers
	}
	sw := w.add(0, 0x40, nil)
	s := postgres.ScanSegment(segment1, smallSegment, w.fill())
	if s.Problem != nil {
		t.Fatal(s.Problem)
	}
	if s.Records != 209 || s.First != first || !s.Switched || s.End != segment1.End(smallSegment) || s.Last != sw || s.Timeline != 2 || s.Continues {
		t.Errorf("found %+v", s)
	}
	if !s.FirstTime.Equal(early) || !s.LastTime.Equal(late) {
		t.Errorf("found times %s to %s, expected %s to %s", s.FirstTime, s.LastTime, early, late)
	}
	if len(s.RestorePoints) != 1 || s.RestorePoints[0].Name != "here" || !s.RestorePoints[0].Time.Equal(early.Add(time.Second)) {
		t.Errorf("found %+v", s.RestorePoints)
	}
}

func TestScanSegment_recordOverThreeSegments(t *testing.T) {
	w := newWAL()
	w.add(9, 0, data(make([]byte, 100)))
	long := w.add(9, 0, data(make([]byte, 2*int(smallSegment)+5000)))
	after := w.add(9, 0, data(nil))
	b := w.fill()
	name := postgres.SegmentName("000000010000000000000001")
	part := func(i int) postgres.SegmentScan {
		return postgres.ScanSegment(postgres.MakeSegmentName(1, uint64(i+1), smallSegment), smallSegment, b[i*int(smallSegment):][:smallSegment])
	}
	if s := part(0); s.Problem != nil || !s.Continues || s.Records != 1 || s.End != long || s.First != name.Start(smallSegment)+40 {
		t.Errorf("first: found %+v", s)
	}
	if s := part(1); s.Problem != nil || !s.Continues || s.Records != 0 || s.First != 0 || s.End != 0 {
		t.Errorf("middle: found %+v", s)
	}
	if s := part(2); s.Problem == nil || s.Continues || s.Records != 1 || s.First != after {
		t.Errorf("last: found %+v", s)
	}
}

// TestScanSegment_overwrittenRecord has a record whose rest was never written because the server crashed.
func TestScanSegment_overwrittenRecord(t *testing.T) {
	w := newWAL()
	w.add(9, 0, data(make([]byte, 100)))
	w.align()
	r := w.record(9, 0, data(make([]byte, 20000)))
	w.bytes(r, int(postgres.WALPageSize-w.at()%postgres.WALPageSize))
	w.flags = 8
	next := w.add(0, 0xD0, data(make([]byte, 16)))
	w.add(0, 0x40, nil)
	s := postgres.ScanSegment("000000010000000000000001", smallSegment, w.fill())
	if s.Problem != nil || s.Records != 3 || !s.Switched || next%postgres.WALPageSize != 24 {
		t.Errorf("found %+v; the record after at %s", s, next)
	}
}

// sampleSegment is whole, without a switch.
func sampleSegment() []byte {
	w := newWAL()
	for i := 0; w.b.Len() < int(smallSegment)-3000; i++ {
		w.add(1, 0, data(append(commitAt(time.Unix(1_800_000_000+int64(i), 0)), make([]byte, i*37%2500)...)))
	}
	w.add(9, 0, data(make([]byte, 9000)))
	return slices.Clone(w.fill()[:smallSegment])
}

func TestScanSegment_damage(t *testing.T) {
	const name = postgres.SegmentName("000000010000000000000001")
	good := sampleSegment()
	s := postgres.ScanSegment(name, smallSegment, good)
	if s.Problem != nil || !s.Continues {
		t.Fatalf("found %+v", s)
	}
	expect := func(situation, text string, name postgres.SegmentName, b []byte) {
		t.Helper()
		got := postgres.ScanSegment(name, smallSegment, b)
		if got.Problem == nil || !strings.Contains(got.Problem.Error(), text) || got.Continues {
			t.Errorf("%s: found %+v, expected a problem with %q", situation, got, text)
		}
	}
	expect("another name", "found address 0/100000", name.Next(smallSegment), good)
	expect("short", "ends after 8200 bytes", name, good[:8200])
	expect("empty", "ends after 0 bytes", name, nil)
	expect("zeros", "nothing was written", name, make([]byte, smallSegment))
	expect("longer", "more than", name, append(slices.Clone(good), good...))
	expect("no name", "24 upper-case", "x", good)
	if s := postgres.ScanSegment(name, 0, good); s.Problem == nil {
		t.Error("a segment size of 0 was accepted")
	}
	// Every bit that means something is covered by a checksum or a check: padding between records is all that is not.
	missed := 0
	for i := 0; i < len(good); i += 97 {
		b := slices.Clone(good)
		b[i] ^= 4
		if postgres.ScanSegment(name, smallSegment, b).Problem == nil {
			missed++
		}
	}
	// Besides padding, the last record's bytes: its checksum is in the next segment's hands.
	if limit := len(good) / 97 / 50; missed > limit {
		t.Errorf("%d of %d flipped bits were missed, expected at most %d", missed, len(good)/97, limit)
	}
}

func FuzzScanSegment(f *testing.F) {
	good := sampleSegment()
	f.Add(uint32(0), []byte{0, 1, 2, 3}, false)
	f.Add(uint32(40), []byte{0xFF, 0xFF, 0xFF, 0x7F}, false)
	f.Add(uint32(8192), []byte{0x16, 0xD1, 9}, true)
	f.Fuzz(func(t *testing.T, offset uint32, patch []byte, cut bool) {
		b := slices.Clone(good)
		at := int(offset) % len(b)
		n := copy(b[at:], patch)
		if cut {
			b = b[:at+n]
		}
		s := postgres.ScanSegment("000000010000000000000001", smallSegment, b)
		if s.End > segment1.End(smallSegment) || s.Problem == nil && cut && len(b) < int(smallSegment) {
			t.Errorf("found %+v", s)
		}
		_, _ = postgres.CheckSegment("000000010000000000000001", int64(len(b)), b, 42)
		_ = fmt.Sprint(s)
	})
}

func FuzzParsers(f *testing.F) {
	f.Add([]byte("START WAL LOCATION: 0/2000028 (file 000000010000000000000002)\nCHECKPOINT LOCATION: 0/2000060\nSTART TIMELINE: 1\n"))
	f.Add([]byte("123\n/data\n1700000000\n5432\n/run\n*\n  1 2\nready\n"))
	f.Fuzz(func(_ *testing.T, b []byte) {
		_, _ = postgres.ParseBackupLabel(string(b))
		_, _ = postgres.ParsePostmaster(b)
		_, _ = postgres.ParseControl(b)
		_, _ = postgres.ParseWALHeader(b)
		_, _ = postgres.CheckSegment("000000010000000000000001", int64(len(b)), b, 0)
	})
}
