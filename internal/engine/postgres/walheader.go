package postgres

import (
	"encoding/binary"
	"fmt"
	"strconv"
)

// WALPageSize is PostgreSQL's default XLOG_BLCKSZ, 8 KiB, the only one that pgark supports.
const WALPageSize = 8192

// The headers of WAL pages, XLogPageHeaderData and XLogLongPageHeaderData in xlog_internal.h; offsets in bytes. A
// segment's first page has the long one.
const (
	walMagic     = 0
	walInfo      = 2
	walTimeline  = 4
	walAddress   = 8
	walRemaining = 16
	walSystemID  = 24
	walSegSize   = 32
	walBlockSize = 36

	walShortHeader = 24
	// WALHeaderSize is how many bytes of a segment CheckSegment and ParseWALHeader need: the long page header.
	WALHeaderSize = 40
)

// The bits of a page header's info. 13 to 18 agree on them.
const (
	walFirstIsContinued   = 0x0001 // XLP_FIRST_IS_CONTRECORD: the page begins with the rest of a record
	walLongHeader         = 0x0002 // XLP_LONG_HEADER
	walFirstIsOverwriting = 0x0008 // XLP_FIRST_IS_OVERWRITE_CONTRECORD: the rest of a record never came, after a crash
)

// walMajors maps a page's magic number to the version of PostgreSQL that writes it (XLOG_PAGE_MAGIC).
var walMajors = map[uint16]int{0xD106: 13, 0xD10D: 14, 0xD110: 15, 0xD113: 16, 0xD116: 17, 0xD118: 18}

// WALHeader is the long page header with which a segment begins.
type WALHeader struct {
	Magic       uint16
	Major       int // the version that Magic stands for; 0 for one that we do not know
	Continued   bool
	Timeline    Timeline
	Address     LSN    // of the page
	Remaining   uint32 // bytes that are left of a record which began in an earlier segment
	SystemID    SystemID
	SegmentSize SegmentSize
	BlockSize   uint32
}

// SegmentError says that a segment's header does not fit what it is taken for.
type SegmentError struct {
	Segment         string // file name
	Field           string // "system identifier", "address", …
	Found, Expected string
}

// Error says which segment it is, what was found and what is expected.
func (e *SegmentError) Error() string {
	return fmt.Sprintf("WAL segment %s: %s: found %s, expected %s", e.Segment, e.Field, e.Found, e.Expected)
}

// ParseWALHeader decodes the first WALHeaderSize bytes of a segment. It refuses only what is no long page header at all;
// CheckSegment compares the fields.
func ParseWALHeader(b []byte) (WALHeader, error) {
	if len(b) < WALHeaderSize {
		return WALHeader{}, fmt.Errorf("WAL page header: found %d bytes, expected %d", len(b), WALHeaderSize)
	}
	info := binary.LittleEndian.Uint16(b[walInfo:])
	h := WALHeader{
		Magic:       binary.LittleEndian.Uint16(b[walMagic:]),
		Continued:   info&walFirstIsContinued != 0,
		Timeline:    Timeline(binary.LittleEndian.Uint32(b[walTimeline:])),
		Address:     LSN(binary.LittleEndian.Uint64(b[walAddress:])),
		Remaining:   binary.LittleEndian.Uint32(b[walRemaining:]),
		SystemID:    SystemID(binary.LittleEndian.Uint64(b[walSystemID:])),
		SegmentSize: SegmentSize(binary.LittleEndian.Uint32(b[walSegSize:])),
		BlockSize:   binary.LittleEndian.Uint32(b[walBlockSize:]),
	}
	h.Major = walMajors[h.Magic]
	if info&walLongHeader == 0 {
		return h, fmt.Errorf("WAL page header: found flags %04x, expected the long form (flag %04x)", info, walLongHeader)
	}
	return h, nil
}

// CheckSegment tells whether a file can be the WAL segment that its name says: header are its first WALHeaderSize bytes,
// size is its length. It compares the magic number, the position, the segment and block size, and the system identifier
// (0: any). The timeline may be an ancestor's: the first segment of a new timeline begins with a copy. The error is a
// *SegmentError.
func CheckSegment(name SegmentName, size int64, header []byte, system SystemID) (WALHeader, error) {
	h, err := ParseWALHeader(header)
	refuse := func(field, found, expected string) (WALHeader, error) {
		return h, &SegmentError{Segment: string(name), Field: field, Found: found, Expected: expected}
	}
	if len(header) < WALHeaderSize || size < WALHeaderSize {
		return refuse("length", fmt.Sprintf("%d bytes", min(size, int64(len(header)))), fmt.Sprintf("at least %d", WALHeaderSize))
	}
	if h.Major == 0 {
		return refuse("magic number", fmt.Sprintf("%04X", h.Magic), "D106 to D118 (PostgreSQL 13 to 18)")
	}
	if err != nil {
		return refuse("page header", "the short form", "the long form")
	}
	if system != 0 && h.SystemID != system {
		return refuse("system identifier", h.SystemID.String(), system.String())
	}
	if !h.SegmentSize.Valid() {
		return refuse("segment size", strconv.FormatUint(uint64(h.SegmentSize), 10), "a power of two from 1 MiB to 1 GiB")
	}
	if h.BlockSize != WALPageSize {
		return refuse("WAL block size", strconv.FormatUint(uint64(h.BlockSize), 10), strconv.Itoa(WALPageSize))
	}
	if size != int64(h.SegmentSize) {
		return refuse("length", strconv.FormatInt(size, 10), strconv.FormatUint(uint64(h.SegmentSize), 10))
	}
	if err := name.Check(h.SegmentSize); err != nil {
		return h, err
	}
	if start := name.Start(h.SegmentSize); h.Address != start {
		return refuse("address", h.Address.String(), start.String())
	}
	if h.Timeline == 0 || h.Timeline > name.Timeline() {
		return refuse("timeline", strconv.Itoa(int(h.Timeline)), fmt.Sprintf("%d or an ancestor", name.Timeline()))
	}
	return h, nil
}
