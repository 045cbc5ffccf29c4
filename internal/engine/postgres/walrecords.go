package postgres

import "time"

// RecordScanner walks the records of a stream of WAL, which it takes in pieces of any size, across segments. It begins at
// a segment's start, and verifies every page header and every record's checksum and predecessor.
type RecordScanner struct{}

// NewRecordScanner begins at the start of a segment of timeline t.
func NewRecordScanner(t Timeline, start LSN, size SegmentSize) *RecordScanner {
	return &RecordScanner{}
}

// Write takes the next bytes. Its error says what is wrong with them, and stays.
func (s *RecordScanner) Write(b []byte) (int, error) { return 0, errReplicationNotBuilt }

// Received is the position after the last byte taken.
func (s *RecordScanner) Received() LSN { return 0 }

// End is the position after the last record that has been taken whole and verified: the most that replay can reach.
func (s *RecordScanner) End() LSN { return 0 }

// PassedRecords is what went by since the last Take.
type PassedRecords struct {
	Commits             int64 // commits and aborts, of prepared transactions too: somebody may wait for them
	FirstTime, LastTime time.Time
	Work                bool // anything but checkpoints, switches and snapshots of running transactions
}

// Take tells what went by since the last Take.
func (s *RecordScanner) Take() PassedRecords { return PassedRecords{} }
