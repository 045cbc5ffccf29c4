package postgres

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"hash/crc32"
	"time"
)

// The header of a WAL record, XLogRecord in xlogrecord.h; offsets in bytes. Records begin at multiples of eight and
// flow around page headers; the header itself may be cut by one.
const (
	recordLength   = 0
	recordPrevious = 8
	recordInfo     = 16
	recordManager  = 17
	recordCRC      = 20
	recordHeader   = 24

	// recordCapture is how much of a record is looked at beyond its header: enough for the timestamp of a commit and the
	// name of a restore point behind the headers of origin, top-level transaction and data.
	recordCapture = 128
)

// Resource managers and their operations that the scan understands (rmgrlist.h, xact.h, pg_control.h, standbydefs.h).
const (
	managerXLOG        = 0
	managerTransaction = 1
	managerStandby     = 8

	xlogCheckpointShutdown = 0x00
	xlogCheckpointOnline   = 0x10
	xlogSwitch             = 0x40
	xlogRestorePoint       = 0x70
	xlogCheckpointRedo     = 0xE0 // since 17

	standbyLock    = 0x00
	standbyRunning = 0x10

	transactionMask          = 0x70
	transactionCommit        = 0x00
	transactionPrepare       = 0x10
	transactionAbort         = 0x20
	transactionCommitPrepare = 0x30
	transactionAbortPrepared = 0x40
)

// The ids of the headers inside a record that are no references to blocks (xlogrecord.h).
const (
	blockTopLevelXID = 252
	blockOrigin      = 253
	blockDataLong    = 254
	blockDataShort   = 255
)

// dataHeaders are the lengths of those headers, the id included. The data follows the last of them.
var dataHeaders = map[byte]int{blockTopLevelXID: 5, blockOrigin: 3, blockDataLong: 5, blockDataShort: 2}

const (
	maxRecordLength   = 1020 << 20 // XLogRecordMaxSize, which 16 introduced; longer ones could not be replayed
	restorePointBytes = 64         // MAXFNAMELEN
)

// RestorePoint is a named restore point (pg_create_restore_point).
type RestorePoint struct {
	Name string
	LSN  LSN // end of its record: where recovery to that name stops
	Time time.Time
}

// SegmentScan is what a walk over a segment's records found.
type SegmentScan struct {
	Records int64 // that begin in the segment and end in it, their checksums verified

	// First is where the first record begins that begins in this segment; 0 if none does.
	First LSN

	// End is the position after the last record that ends in this segment, where the next one begins: after a switch
	// the segment's end. 0 if none ends here.
	End LSN

	// Last is where the last of Records begins; 0 if there is none. Recovery to this position, inclusive, ends with it.
	Last LSN

	// Timeline is the one that wrote the last page: an ancestor of the name's where the segment holds only a copy.
	Timeline Timeline

	// Continues says that a record begins in the segment and goes on in the next.
	Continues bool

	// Switched says that the segment was ended early (XLOG_SWITCH). What follows means nothing; PostgreSQL writes zeros.
	Switched bool

	// FirstTime and LastTime are the earliest and the latest time of a commit or abort, of prepared transactions too, or
	// of a restore point: what recovery_target_time is compared with. Both are zero if there is none. A record that
	// begins in another segment does not count.
	FirstTime, LastTime time.Time

	RestorePoints []RestorePoint

	// Work says that the segment holds anything but checkpoints, switches, and snapshots of running transactions and their
	// locks, which PostgreSQL writes by itself: anything that is worth to be archived early.
	Work bool

	// Problem says why the walk ended before the segment did; nil if records follow one another to its end. A segment
	// that is still being written, or a .partial one, ends somewhere; a whole one that PostgreSQL archives must not.
	Problem error
}

// SegmentScanner walks the records of one WAL segment while its bytes pass by: it is an io.Writer that never fails.
// It never trusts a byte: what makes no sense ends the walk with SegmentScan.Problem.
type SegmentScanner struct {
	name SegmentName
	size SegmentSize
	walk recordWalk
	got  uint64 // bytes
}

// NewSegmentScanner begins a walk over the segment of that name.
func NewSegmentScanner(name SegmentName, size SegmentSize) *SegmentScanner {
	s := &SegmentScanner{name: name, size: size}
	if !size.Valid() {
		s.walk.problem = fmt.Errorf("WAL segment %s: found a segment size of %d bytes, expected a power of two from 1 MiB to 1 GiB", name, uint64(size))
	} else if err := name.Check(size); err != nil {
		s.walk.problem = err
	} else {
		s.walk = newRecordWalk(name.Timeline(), name.Start(size), size)
	}
	return s
}

// ScanSegment walks over a segment in memory.
func ScanSegment(name SegmentName, size SegmentSize, b []byte) SegmentScan {
	s := NewSegmentScanner(name, size)
	_, _ = s.Write(b) // never fails
	return s.Result()
}

// Write takes the segment's next bytes.
func (s *SegmentScanner) Write(b []byte) (int, error) {
	if s.goesOn() {
		fit := b[:min(uint64(len(b)), uint64(s.size)-s.got)]
		s.got += uint64(len(fit))
		s.walk.take(fit)
		if len(fit) < len(b) && s.goesOn() {
			s.walk.problem = fmt.Errorf("WAL segment %s: found more than %d bytes", s.name, uint64(s.size))
		}
	}
	return len(b), nil
}

// goesOn tells whether more of the segment means anything.
func (s *SegmentScanner) goesOn() bool { return s.walk.problem == nil && !s.walk.switched }

// Result ends the walk.
func (s *SegmentScanner) Result() SegmentScan {
	w := &s.walk
	if s.goesOn() && s.got != uint64(s.size) {
		w.problem = fmt.Errorf("WAL segment %s: the segment ends after %d bytes, expected %d", s.name, s.got, uint64(s.size))
	}
	scan := SegmentScan{
		Records: w.records, First: w.first, End: w.end, Last: w.last, Timeline: w.timeline,
		Continues: w.remaining > 0 && w.problem == nil, Switched: w.switched,
		FirstTime: w.passed.FirstTime, LastTime: w.passed.LastTime, Work: w.passed.Work,
		RestorePoints: w.points, Problem: w.problem,
	}
	scan.Work = scan.Work || scan.Continues
	if w.switched {
		scan.End = s.name.End(s.size)
	}
	return scan
}

// recordWalk goes from record to record through WAL that arrives in pieces of any size, from the start of a segment on.
// It holds no more than the head of one record.
type recordWalk struct {
	line Timeline
	size SegmentSize
	from LSN // where the walk began
	pos  LSN // of the next byte

	page [WALHeaderSize]byte // the present page's header, as far as it has come

	// The record that is being read. It has ended once the padding to the next multiple of eight has come, too: so all
	// that lies before end has been taken.
	start     LSN
	remaining uint32
	padding   int
	skip      bool // it began before from
	header    [recordHeader]byte
	have      int // bytes of header
	body      [recordCapture]byte
	bodyLen   int
	crc       uint32

	first, last, end LSN // start of the first and of the last record that began here, end of the last that ended here
	records          int64
	timeline         Timeline // of the present page
	switched         bool     // there was an XLOG_SWITCH
	skipping         bool     // what is left of the segment means nothing
	passed           PassedRecords
	points           []RestorePoint
	dropPoints       bool

	problem error // ends the walk
}

func newRecordWalk(t Timeline, from LSN, size SegmentSize) recordWalk {
	return recordWalk{line: t, size: size, from: from, pos: from}
}

func (w *recordWalk) stop(format string, args ...any) {
	at := w.pos
	if at > w.from {
		at-- // the end of a page belongs to it
	}
	w.problem = fmt.Errorf("WAL segment %s: "+format, append([]any{SegmentAt(w.line, at, w.size)}, args...)...)
}

func align8(n int) int { return (n + 7) &^ 7 }

// take walks over the next bytes and returns how many it could make sense of.
func (w *recordWalk) take(b []byte) int {
	n := len(b)
	for len(b) > 0 && w.problem == nil {
		if w.skipping {
			skip := min(LSN(len(b)), w.size.Start(w.size.Number(w.pos)+1)-w.pos)
			b = b[skip:]
			w.pos += skip
			w.end = w.pos
			w.skipping = w.pos%LSN(w.size) != 0
			continue
		}
		content := walShortHeader
		if w.pos&LSN(w.size-1) < WALHeaderSize {
			content = WALHeaderSize
		}
		off := int(w.pos % WALPageSize)
		if off < content {
			k := copy(w.page[off:content], b)
			b = b[k:]
			w.pos += LSN(k)
			if off+k == content {
				w.readPageHeader(content)
			}
			continue
		}
		k := min(len(b), WALPageSize-off)
		b = b[w.takeContent(b[:k]):]
	}
	return n - len(b)
}

// readPageHeader checks a page's header, as XLogReaderValidatePageHeader does.
func (w *recordWalk) readPageHeader(length int) {
	here := w.pos - LSN(length)
	magic := binary.LittleEndian.Uint16(w.page[walMagic:])
	info := binary.LittleEndian.Uint16(w.page[walInfo:])
	timeline := Timeline(binary.LittleEndian.Uint32(w.page[walTimeline:]))
	address := LSN(binary.LittleEndian.Uint64(w.page[walAddress:]))
	rest := binary.LittleEndian.Uint32(w.page[walRemaining:])
	switch {
	case magic == 0 && info == 0 && address == 0:
		w.stop("nothing was written from %s on", here)
	case walMajors[magic] == 0:
		w.stop("page %s: found magic number %04X, expected D106 to D118", here, magic)
	case address != here:
		w.stop("page %s: found address %s", here, address)
	case (length == WALHeaderSize) != (info&walLongHeader != 0):
		w.stop("page %s: found flags %04x, expected a long header at the beginning and short ones behind", here, info)
	case timeline < w.timeline || timeline == 0 || timeline > w.line:
		w.stop("page %s: found timeline %d, expected %d to %d", here, timeline, max(w.timeline, 1), w.line)
	}
	if w.problem != nil {
		return
	}
	w.timeline = timeline

	continued := info&walFirstIsContinued != 0
	switch {
	case info&walFirstIsOverwriting != 0 && w.remaining > 0:
		// The server crashed before it had written the rest; the record never happened, and a new one takes its place
		// (CreateOverwriteContrecordRecord in xlog.c).
		w.remaining, w.have = 0, 0
	case w.remaining > 0 && (!continued || rest != w.remaining):
		w.stop("page %s: found %d bytes left of the record at %s, expected %d", here, rest, w.start, w.remaining)
	case w.remaining == 0 && continued && here != w.from:
		w.stop("page %s: found the rest of a record, expected a new one", here)
	case here == w.from && continued:
		if rest == 0 || rest > maxRecordLength {
			w.stop("page %s: found %d bytes left of a record, expected 1 to %d", here, rest, maxRecordLength)
			break
		}
		// Its kind is not known, so it may matter.
		w.remaining, w.skip, w.passed.Work = rest, true, true
	}
}

// takeContent walks over bytes of one page behind its header.
func (w *recordWalk) takeContent(b []byte) int {
	off := 0
	for off < len(b) && w.problem == nil && !w.skipping {
		switch {
		case w.remaining > 0:
			n := int(min(w.remaining, uint32(len(b)-off)))
			w.consume(b[off : off+n])
			w.remaining -= uint32(n)
			off += n
			w.pos += LSN(n)
			if w.remaining == 0 {
				if w.padding = int(-w.pos & 7); w.padding == 0 {
					w.endRecord()
				}
			}
		case w.padding > 0:
			n := min(w.padding, len(b)-off)
			off += n
			w.pos += LSN(n)
			if w.padding -= n; w.padding == 0 {
				w.endRecord()
			}
		default:
			off += w.beginRecord(b[off:])
		}
	}
	return off
}

// beginRecord looks at the record that begins with b, which ends with the page at the latest: one that lies in it whole
// is read at once. It returns how much of b it took.
func (w *recordWalk) beginRecord(b []byte) int {
	length := uint32(0)
	if w.have == 0 && len(b) >= 4 {
		length = binary.LittleEndian.Uint32(b[recordLength:])
	} else {
		// A record is aligned to eight bytes, so a page does not cut its length, only we may have got it in pieces.
		n := copy(w.header[w.have:4], b)
		if w.have == 0 {
			w.start = w.pos
		}
		w.have += n
		w.pos += LSN(n)
		if w.have < 4 {
			return n
		}
		length = binary.LittleEndian.Uint32(w.header[recordLength:])
		if w.checkLength(length) {
			w.open()
			w.remaining = length - 4
		}
		return n
	}
	w.start = w.pos
	if !w.checkLength(length) {
		return 0
	}
	w.open()
	whole := align8(int(length))
	if whole > len(b) {
		w.remaining = length
		return 0
	}
	copy(w.header[:], b)
	body := b[recordHeader:length]
	w.crc = crc32.Update(0, castagnoli, body)
	w.pos += LSN(whole)
	w.finish(body)
	return whole
}

func (w *recordWalk) checkLength(length uint32) bool {
	if length == 0 {
		w.stop("no record at %s", w.start)
		return false
	}
	if length < recordHeader || length > maxRecordLength {
		w.stop("record at %s: found length %d, expected %d to %d", w.start, length, recordHeader, maxRecordLength)
		return false
	}
	return true
}

// open prepares for the record at start.
func (w *recordWalk) open() {
	w.skip, w.bodyLen, w.crc = false, 0, 0
	if w.first == 0 {
		w.first = w.start
	}
}

// consume takes a part of a record that has come in pieces.
func (w *recordWalk) consume(b []byte) {
	if w.skip {
		return
	}
	if w.have < recordHeader {
		n := copy(w.header[w.have:], b)
		w.have += n
		b = b[n:]
	}
	w.crc = crc32.Update(w.crc, castagnoli, b)
	w.bodyLen += copy(w.body[w.bodyLen:], b)
}

// endRecord finishes a record that has come in pieces.
func (w *recordWalk) endRecord() {
	w.have = 0
	if w.skip {
		// The segment in which it began knows its head, we only know where it ends.
		w.end = w.pos
		return
	}
	w.finish(w.body[:w.bodyLen])
}

// finish checks a record whose header and checksum are known and takes from it what the walk is for; body is what follows
// the header, or its beginning. The record ends at pos.
func (w *recordWalk) finish(body []byte) {
	h := &w.header
	crc := crc32.Update(w.crc, castagnoli, h[:recordCRC])
	if expected := binary.LittleEndian.Uint32(h[recordCRC:]); crc != expected {
		w.stop("record at %s: found checksum %08x, expected %08x", w.start, crc, expected)
		return
	}
	previous := LSN(binary.LittleEndian.Uint64(h[recordPrevious:]))
	switch {
	case w.last != 0 && previous != w.last:
		w.stop("record at %s: found %s as its predecessor, expected %s", w.start, previous, w.last)
		return
	case previous >= w.start:
		w.stop("record at %s: found %s as its predecessor, expected a lower position", w.start, previous)
		return
	}
	w.records++
	w.last, w.end = w.start, w.pos

	info := h[recordInfo] & 0xF0
	switch h[recordManager] {
	case managerXLOG:
		switch info {
		case xlogSwitch:
			w.switched, w.skipping = true, w.pos%LSN(w.size) != 0
			return
		case xlogCheckpointShutdown, xlogCheckpointOnline, xlogCheckpointRedo:
			return
		case xlogRestorePoint:
			w.restorePoint(body)
		}
	case managerStandby:
		if info == standbyLock || info == standbyRunning {
			return
		}
	case managerTransaction:
		switch info & transactionMask {
		case transactionCommit, transactionAbort, transactionCommitPrepare, transactionAbortPrepared:
			w.passed.Commits++
			if data, ok := mainData(body); ok && len(data) >= 8 {
				w.time(data)
			}
		case transactionPrepare:
			w.passed.Commits++
		}
	}
	w.passed.Work = true
}

func (w *recordWalk) restorePoint(body []byte) {
	data, ok := mainData(body)
	if !ok || len(data) < 8 {
		return
	}
	at := w.time(data)
	if w.dropPoints {
		return
	}
	name := data[8:min(len(data), 8+restorePointBytes)]
	if i := bytes.IndexByte(name, 0); i >= 0 {
		name = name[:i]
	}
	w.points = append(w.points, RestorePoint{Name: string(name), LSN: w.end, Time: at})
}

// time notes the timestamp with which the data of a commit, an abort and a restore point begins.
func (w *recordWalk) time(data []byte) time.Time {
	t := timestamp(int64(binary.LittleEndian.Uint64(data)))
	if w.passed.FirstTime.IsZero() || t.Before(w.passed.FirstTime) {
		w.passed.FirstTime = t
	}
	if t.After(w.passed.LastTime) {
		w.passed.LastTime = t
	}
	return t
}

// timestamp converts a TimestampTz: microseconds since 2000-01-01.
func timestamp(microseconds int64) time.Time {
	const epoch = 946684800 // 2000-01-01 in seconds since 1970
	seconds, rest := microseconds/1e6, microseconds%1e6
	return time.Unix(epoch+seconds, rest*1000).UTC()
}

// mainData finds the data of a record that refers to no blocks; of one that does there is none for us.
func mainData(body []byte) ([]byte, bool) {
	for len(body) > 0 {
		id := body[0]
		skip, known := dataHeaders[id]
		if !known || len(body) < skip {
			return nil, false
		}
		body = body[skip:]
		if id == blockDataShort || id == blockDataLong {
			return body, true
		}
	}
	return nil, false
}
