package postgres

import (
	"errors"
	"fmt"
	"math/bits"
	"strconv"
	"strings"
)

// The bounds of a WAL segment's size (xlog_internal.h, WalSegMinSize and WalSegMaxSize).
const (
	MinSegmentSize SegmentSize = 1 << 20
	MaxSegmentSize SegmentSize = 1 << 30
)

// Valid tells whether initdb could have made a cluster with segments of this size.
func (s SegmentSize) Valid() bool {
	return s >= MinSegmentSize && s <= MaxSegmentSize && bits.OnesCount64(uint64(s)) == 1
}

// PerLog is how many segments share the middle eight digits of their names: they count 4 GiB of WAL.
func (s SegmentSize) PerLog() uint64 { return (1 << 32) / uint64(s) }

// Number is the segment that holds the byte at lsn, counted from the beginning of WAL. A position on a boundary
// belongs to the segment that begins there.
func (s SegmentSize) Number(lsn LSN) uint64 { return uint64(lsn) / uint64(s) }

// NumberBefore is the segment that holds the byte before lsn: the last one needed to reach an end position.
func (s SegmentSize) NumberBefore(lsn LSN) uint64 {
	if lsn == 0 {
		return 0
	}
	return (uint64(lsn) - 1) / uint64(s)
}

// Start is the position of segment number's first byte.
func (s SegmentSize) Start(number uint64) LSN { return LSN(number * uint64(s)) }

// Offset is where in its segment lsn lies.
func (s SegmentSize) Offset(lsn LSN) uint64 { return uint64(lsn) % uint64(s) }

// SegmentName is the file name of a WAL segment: 24 upper-case hexadecimal digits, eight for the timeline, eight for
// the high half of the LSN, eight for the segment within it. Within a timeline names sort as their positions do.
type SegmentName string

const segmentNameLength = 24

// ErrNotWALFile says that a name is none that PostgreSQL archives.
var ErrNotWALFile = errors.New("not a WAL file name")

// ParseSegmentName checks that s is a segment's name. It cannot know the segment size: Check does.
func ParseSegmentName(s string) (SegmentName, error) {
	if len(s) != segmentNameLength || !isUpperHex(s) {
		return "", fmt.Errorf("segment name %q: expected 24 upper-case hexadecimal digits: %w", s, ErrNotWALFile)
	}
	if SegmentName(s).Timeline() == 0 {
		return "", fmt.Errorf("segment name %q: found timeline 0, expected 1 or above: %w", s, ErrNotWALFile)
	}
	return SegmentName(s), nil
}

// MakeSegmentName names segment number (SegmentSize.Number) of a timeline.
func MakeSegmentName(t Timeline, number uint64, size SegmentSize) SegmentName {
	return SegmentName(fmt.Sprintf("%08X%08X%08X", uint32(t), uint32(number/size.PerLog()), uint32(number%size.PerLog())))
}

// SegmentAt names the segment that holds the byte at lsn.
func SegmentAt(t Timeline, lsn LSN, size SegmentSize) SegmentName {
	return MakeSegmentName(t, size.Number(lsn), size)
}

// part reads eight digits; the constructors saw to it that they are hexadecimal.
func (n SegmentName) part(i int) uint32 {
	if len(n) != segmentNameLength {
		return 0
	}
	v, err := strconv.ParseUint(string(n[8*i:8*i+8]), 16, 32)
	if err != nil {
		return 0
	}
	return uint32(v)
}

// Timeline is the timeline that the name carries; 0 for a malformed name.
func (n SegmentName) Timeline() Timeline { return Timeline(n.part(0)) }

// Number is the segment's number, counted from the beginning of WAL.
func (n SegmentName) Number(size SegmentSize) uint64 {
	return uint64(n.part(1))*size.PerLog() + uint64(n.part(2))
}

// Start is the position of the segment's first byte.
func (n SegmentName) Start(size SegmentSize) LSN { return size.Start(n.Number(size)) }

// End is the position after the segment's last byte: the Start of the next.
func (n SegmentName) End(size SegmentSize) LSN { return size.Start(n.Number(size) + 1) }

// Next is the following segment of the same timeline.
func (n SegmentName) Next(size SegmentSize) SegmentName {
	return MakeSegmentName(n.Timeline(), n.Number(size)+1, size)
}

// Previous is the preceding segment of the same timeline; false for the very first.
func (n SegmentName) Previous(size SegmentSize) (SegmentName, bool) {
	number := n.Number(size)
	if number == 0 {
		return "", false
	}
	return MakeSegmentName(n.Timeline(), number-1, size), true
}

// On is the segment of the same position on another timeline.
func (n SegmentName) On(t Timeline) SegmentName {
	if len(n) != segmentNameLength {
		return ""
	}
	return SegmentName(t.String()) + n[8:]
}

// Check tells whether the name can exist in a cluster whose segments have this size: larger segments use fewer values
// of the last eight digits.
func (n SegmentName) Check(size SegmentSize) error {
	if _, err := ParseSegmentName(string(n)); err != nil {
		return err
	}
	if uint64(n.part(2)) >= size.PerLog() {
		return fmt.Errorf("segment name %s: found %08X in the last eight digits, expected at most %08X with segments of %d bytes: %w",
			n, n.part(2), size.PerLog()-1, uint64(size), ErrNotWALFile)
	}
	return nil
}

// WALFileKind is a kind of file that PostgreSQL hands to archive_command.
type WALFileKind int

// The kinds of WAL files.
const (
	// SegmentFile is a whole segment.
	SegmentFile WALFileKind = 1
	// PartialFile is the unfinished last segment of a timeline, archived when another timeline took over.
	PartialFile WALFileKind = 2
	// HistoryFile is a timeline's history.
	HistoryFile WALFileKind = 3
	// BackupFile is the record of a base backup, named after the segment in which it started.
	BackupFile WALFileKind = 4
)

// String is the kind in words.
func (k WALFileKind) String() string {
	switch k {
	case SegmentFile:
		return "segment"
	case PartialFile:
		return "partial segment"
	case HistoryFile:
		return "timeline history"
	case BackupFile:
		return "backup history"
	}
	return "unknown"
}

// WALFile is a parsed name of a file that PostgreSQL archives.
type WALFile struct {
	Kind     WALFileKind
	Timeline Timeline
	Segment  SegmentName // empty for a HistoryFile
	Offset   uint32      // BackupFile: where in Segment the backup started
}

// ParseWALFile classifies a file name, without a directory. Anything that PostgreSQL does not archive is an error that
// matches ErrNotWALFile.
func ParseWALFile(name string) (WALFile, error) {
	refuse := func() (WALFile, error) {
		return WALFile{}, fmt.Errorf("WAL file name %q: expected a segment, .partial, .history or .backup file: %w", name, ErrNotWALFile)
	}
	if t, ok := strings.CutSuffix(name, ".history"); ok {
		if len(t) != 8 || !isUpperHex(t) {
			return refuse()
		}
		v, err := strconv.ParseUint(t, 16, 32)
		if err != nil || v == 0 {
			return refuse()
		}
		return WALFile{Kind: HistoryFile, Timeline: Timeline(v)}, nil
	}
	if len(name) < segmentNameLength {
		return refuse()
	}
	segment, err := ParseSegmentName(name[:segmentNameLength])
	if err != nil {
		return refuse()
	}
	f := WALFile{Timeline: segment.Timeline(), Segment: segment}
	switch rest := name[segmentNameLength:]; {
	case rest == "":
		f.Kind = SegmentFile
	case rest == ".partial":
		f.Kind = PartialFile
	case len(rest) == len(".00000028.backup") && rest[0] == '.' && strings.HasSuffix(rest, ".backup") && isUpperHex(rest[1:9]):
		v, err := strconv.ParseUint(rest[1:9], 16, 32)
		if err != nil {
			return refuse()
		}
		f.Kind, f.Offset = BackupFile, uint32(v)
	default:
		return refuse()
	}
	return f, nil
}

// String is the file's name: ParseWALFile's inverse.
func (f WALFile) String() string {
	switch f.Kind {
	case SegmentFile:
		return string(f.Segment)
	case PartialFile:
		return string(f.Segment) + ".partial"
	case HistoryFile:
		return HistoryFileName(f.Timeline)
	case BackupFile:
		return fmt.Sprintf("%s.%08X.backup", f.Segment, f.Offset)
	}
	return ""
}

// HistoryFileName names a timeline's history file.
func HistoryFileName(t Timeline) string { return t.String() + ".history" }

func isUpperHex(s string) bool {
	for i := range len(s) {
		if c := s[i]; (c < '0' || c > '9') && (c < 'A' || c > 'F') {
			return false
		}
	}
	return true
}
