package postgres

import (
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

// Resource managers and their operations that the scan understands (rmgrlist.h, xact.h, pg_control.h).
const (
	managerXLOG        = 0
	managerTransaction = 1

	xlogSwitch       = 0x40
	xlogRestorePoint = 0x70

	transactionMask          = 0x70
	transactionCommit        = 0x00
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

	// Problem says why the walk ended before the segment did; nil if records follow one another to its end. A segment
	// that is still being written, or a .partial one, ends somewhere; a whole one that PostgreSQL archives must not.
	Problem error
}

// SegmentScanner walks the records of one WAL segment while its bytes pass by: it is an io.Writer that never fails.
// It holds one page, and never trusts a byte: what makes no sense ends the walk with SegmentScan.Problem.
type SegmentScanner struct {
	name SegmentName
	size SegmentSize
	scan SegmentScan

	page   []byte // a page that is not whole yet
	offset uint64 // of the next page in the segment
	done   bool

	// The record that is being read, if it goes on in the next page.
	remaining uint32
	skip      bool // it began in an earlier segment
	start     LSN
	header    [recordHeader]byte
	have      int // bytes of header
	body      [recordCapture]byte
	bodyLen   int
	crc       uint32

	previous LSN // start of the last record
}

// NewSegmentScanner begins a walk over the segment of that name.
func NewSegmentScanner(name SegmentName, size SegmentSize) *SegmentScanner {
	s := &SegmentScanner{name: name, size: size}
	if !size.Valid() {
		s.stop("found a segment size of %d bytes, expected a power of two from 1 MiB to 1 GiB", uint64(size))
	} else if err := name.Check(size); err != nil {
		s.done, s.scan.Problem = true, err
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
	n := len(b)
	for len(b) > 0 && !s.done {
		if len(s.page) > 0 || len(b) < WALPageSize {
			k := min(WALPageSize-len(s.page), len(b))
			s.page = append(s.page, b[:k]...)
			b = b[k:]
			if len(s.page) == WALPageSize {
				s.readPage(s.page)
				s.page = s.page[:0]
			}
			continue
		}
		s.readPage(b[:WALPageSize])
		b = b[WALPageSize:]
	}
	return n, nil
}

// Result ends the walk.
func (s *SegmentScanner) Result() SegmentScan {
	if !s.done && s.offset != uint64(s.size) {
		s.stop("the segment ends after %d bytes, expected %d", s.offset+uint64(len(s.page)), uint64(s.size))
	}
	s.done = true
	s.scan.Continues = s.remaining > 0 && s.scan.Problem == nil
	return s.scan
}

// at is the position of a byte of the current page.
func (s *SegmentScanner) at(offset int) LSN {
	return s.name.Start(s.size) + LSN(s.offset) + LSN(offset)
}

func (s *SegmentScanner) stop(format string, args ...any) {
	s.done = true
	s.scan.Problem = fmt.Errorf("WAL segment %s: "+format, append([]any{s.name}, args...)...)
}

func align8(n int) int { return (n + 7) &^ 7 }

func (s *SegmentScanner) readPage(page []byte) {
	if s.offset >= uint64(s.size) {
		s.stop("found more than %d bytes", uint64(s.size))
		return
	}
	off := s.readPageHeader(page)
	if s.done {
		return
	}
	for {
		if s.remaining > 0 {
			n := int(min(s.remaining, uint32(len(page)-off)))
			s.consume(page[off : off+n])
			s.remaining -= uint32(n)
			off = align8(off + n)
			if s.remaining > 0 {
				break
			}
			s.endRecord(s.at(off))
		} else {
			if off >= len(page) {
				break
			}
			off = s.beginRecord(page, off)
		}
		if s.done {
			return
		}
	}
	s.offset += WALPageSize
}

// readPageHeader checks a page's header, as XLogReaderValidatePageHeader does, and returns where its content begins.
func (s *SegmentScanner) readPageHeader(page []byte) int {
	here := s.at(0)
	first := s.offset == 0
	magic := binary.LittleEndian.Uint16(page[walMagic:])
	info := binary.LittleEndian.Uint16(page[walInfo:])
	timeline := Timeline(binary.LittleEndian.Uint32(page[walTimeline:]))
	address := LSN(binary.LittleEndian.Uint64(page[walAddress:]))
	rest := binary.LittleEndian.Uint32(page[walRemaining:])
	content := walShortHeader
	if info&walLongHeader != 0 {
		content = WALHeaderSize
	}
	switch {
	case magic == 0 && info == 0 && address == 0:
		s.stop("nothing was written from %s on", here)
	case walMajors[magic] == 0:
		s.stop("page %s: found magic number %04X, expected D106 to D118", here, magic)
	case address != here:
		s.stop("page %s: found address %s", here, address)
	case first != (info&walLongHeader != 0):
		s.stop("page %s: found flags %04x, expected a long header at the beginning and short ones behind", here, info)
	case timeline < s.scan.Timeline || timeline == 0 || timeline > s.name.Timeline():
		s.stop("page %s: found timeline %d, expected %d to %d", here, timeline, max(s.scan.Timeline, 1), s.name.Timeline())
	}
	if s.done {
		return 0
	}
	s.scan.Timeline = timeline

	continued := info&walFirstIsContinued != 0
	switch {
	case info&walFirstIsOverwriting != 0 && s.remaining > 0:
		// The server crashed before it had written the rest; the record never happened, and a new one takes its place
		// (CreateOverwriteContrecordRecord in xlog.c).
		s.remaining = 0
	case s.remaining > 0 && (!continued || rest != s.remaining):
		s.stop("page %s: found %d bytes left of the record at %s, expected %d", here, rest, s.start, s.remaining)
	case s.remaining == 0 && continued && !first:
		s.stop("page %s: found the rest of a record, expected a new one", here)
	case first && continued:
		if rest == 0 || rest > maxRecordLength {
			s.stop("page %s: found %d bytes left of a record, expected 1 to %d", here, rest, maxRecordLength)
			break
		}
		s.remaining, s.skip = rest, true
	}
	return content
}

// beginRecord looks at the record that begins at off: one that ends in the page is read at once. It returns where the
// next begins.
func (s *SegmentScanner) beginRecord(page []byte, off int) int {
	// Records are aligned to eight bytes, so the length is never cut.
	length := binary.LittleEndian.Uint32(page[off+recordLength:])
	if length == 0 {
		s.stop("no record at %s", s.at(off))
		return off
	}
	if length < recordHeader || length > maxRecordLength {
		s.stop("record at %s: found length %d, expected %d to %d", s.at(off), length, recordHeader, maxRecordLength)
		return off
	}
	s.start, s.skip, s.have, s.bodyLen, s.crc = s.at(off), false, 0, 0, 0
	if s.scan.First == 0 {
		s.scan.First = s.start
	}
	if int(length) > len(page)-off {
		s.remaining = length
		return off
	}
	record := page[off : off+int(length)]
	copy(s.header[:], record)
	s.crc = crc32.Update(0, castagnoli, record[recordHeader:])
	off = align8(off + int(length))
	s.finish(record[recordHeader:], s.at(off))
	return off
}

// consume takes a part of a record that lies in several pages.
func (s *SegmentScanner) consume(b []byte) {
	if s.skip {
		return
	}
	if s.have < recordHeader {
		n := copy(s.header[s.have:], b)
		s.have += n
		b = b[n:]
	}
	s.crc = crc32.Update(s.crc, castagnoli, b)
	s.bodyLen += copy(s.body[s.bodyLen:], b)
}

// endRecord finishes a record that lies in several pages.
func (s *SegmentScanner) endRecord(end LSN) {
	if s.skip {
		// The segment in which it began knows its head, we only know where it ends.
		s.scan.End = end
		return
	}
	s.finish(s.body[:s.bodyLen], end)
}

// finish checks a record whose header and checksum are known and takes from it what the scan wants; body is what follows
// the header, or its beginning.
func (s *SegmentScanner) finish(body []byte, end LSN) {
	h := &s.header
	crc := crc32.Update(s.crc, castagnoli, h[:recordCRC])
	if expected := binary.LittleEndian.Uint32(h[recordCRC:]); crc != expected {
		s.stop("record at %s: found checksum %08x, expected %08x", s.start, crc, expected)
		return
	}
	previous := LSN(binary.LittleEndian.Uint64(h[recordPrevious:]))
	switch {
	case s.previous != 0 && previous != s.previous:
		s.stop("record at %s: found %s as its predecessor, expected %s", s.start, previous, s.previous)
		return
	case previous >= s.start:
		s.stop("record at %s: found %s as its predecessor, expected a lower position", s.start, previous)
		return
	}
	s.previous = s.start
	s.scan.Records++
	s.scan.Last, s.scan.End = s.start, end

	info := h[recordInfo]
	switch h[recordManager] {
	case managerXLOG:
		switch info & 0xF0 {
		case xlogSwitch:
			s.scan.Switched, s.scan.End = true, s.name.End(s.size)
			s.done = true
		case xlogRestorePoint:
			s.restorePoint(body, end)
		}
	case managerTransaction:
		switch info & transactionMask {
		case transactionCommit, transactionAbort, transactionCommitPrepare, transactionAbortPrepared:
			if data, ok := mainData(body); ok && len(data) >= 8 {
				s.time(data)
			}
		}
	}
}

func (s *SegmentScanner) restorePoint(body []byte, end LSN) {
	data, ok := mainData(body)
	if !ok || len(data) < 8 {
		return
	}
	name := data[8:min(len(data), 8+restorePointBytes)]
	for i, c := range name {
		if c == 0 {
			name = name[:i]
			break
		}
	}
	s.scan.RestorePoints = append(s.scan.RestorePoints, RestorePoint{Name: string(name), LSN: end, Time: s.time(data)})
}

// time notes the timestamp with which the data of a commit, an abort and a restore point begins.
func (s *SegmentScanner) time(data []byte) time.Time {
	t := timestamp(int64(binary.LittleEndian.Uint64(data)))
	if s.scan.FirstTime.IsZero() || t.Before(s.scan.FirstTime) {
		s.scan.FirstTime = t
	}
	if t.After(s.scan.LastTime) {
		s.scan.LastTime = t
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
