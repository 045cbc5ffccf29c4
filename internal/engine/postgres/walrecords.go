package postgres

import (
	"fmt"
	"time"
)

// RecordScanner walks the records of a stream of WAL, which it takes in pieces of any size, across segments. It begins at
// a segment's start, and verifies every page header and every record's checksum and predecessor. A record that began
// before is not verified, only its length is: whoever read the segment before has its head.
type RecordScanner struct{ walk recordWalk }

// NewRecordScanner begins at the start of a segment of timeline t.
func NewRecordScanner(t Timeline, start LSN, size SegmentSize) *RecordScanner {
	s := &RecordScanner{}
	switch {
	case !size.Valid():
		s.walk.problem = fmt.Errorf("WAL from %s on timeline %d: found a segment size of %d bytes, expected a power of two from 1 MiB to 1 GiB", start, uint32(t), uint64(size))
	case t == 0 || size.Offset(start) != 0:
		s.walk.problem = fmt.Errorf("WAL from %s on timeline %d: expected a timeline, and the start of a segment of %d bytes", start, uint32(t), uint64(size))
	default:
		s.walk = newRecordWalk(t, start, size)
		s.walk.dropPoints = true // nobody takes them
	}
	return s
}

// Write takes the next bytes. Its error says what is wrong with them, and stays; the records before it count.
func (s *RecordScanner) Write(b []byte) (int, error) {
	n := s.walk.take(b)
	return n, s.walk.problem
}

// Received is the position after the last byte taken.
func (s *RecordScanner) Received() LSN { return s.walk.pos }

// End is the position after the last record that has been taken whole and verified, and after the padding behind it: the
// most that replay can reach. It is never above Received. The zeros that follow a switch count as they come, so that with
// the last of them it is the segment's end. Before any record it is the start.
func (s *RecordScanner) End() LSN { return max(s.walk.end, s.walk.from) }

// PassedRecords is what went by since the last Take.
type PassedRecords struct {
	// Commits counts commits, aborts and prepared transactions: somebody may wait for them.
	Commits int64

	// FirstTime and LastTime are the earliest and the latest time of a commit, abort or restore point; zero if there is
	// none.
	FirstTime, LastTime time.Time

	// Work says that there was anything but what SegmentScan.Work leaves out.
	Work bool
}

// Take tells what went by since the last Take.
func (s *RecordScanner) Take() PassedRecords {
	p := s.walk.passed
	s.walk.passed = PassedRecords{}
	return p
}
