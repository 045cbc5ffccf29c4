package postgres

import (
	"fmt"
	"strconv"
	"strings"
)

// LSN is a byte position in the write-ahead log, as PostgreSQL's XLogRecPtr.
type LSN uint64

// ParseLSN reads the form that PostgreSQL prints, "16/B374D848".
func ParseLSN(s string) (LSN, error) {
	hi, lo, ok := strings.Cut(s, "/")
	if !ok {
		return 0, fmt.Errorf("LSN %q: found no slash, expected a form like 16/B374D848", s)
	}
	h, err := strconv.ParseUint(hi, 16, 32)
	if err != nil {
		return 0, fmt.Errorf("LSN %q: high half: %w", s, err)
	}
	l, err := strconv.ParseUint(lo, 16, 32)
	if err != nil {
		return 0, fmt.Errorf("LSN %q: low half: %w", s, err)
	}
	return LSN(h<<32 | l), nil
}

// String prints the LSN as PostgreSQL does (%X/%X).
func (l LSN) String() string { return fmt.Sprintf("%X/%X", uint64(l)>>32, uint32(l)) }

// MarshalText writes the form of String.
func (l LSN) MarshalText() ([]byte, error) { return []byte(l.String()), nil }

// UnmarshalText reads the form of String.
func (l *LSN) UnmarshalText(b []byte) error {
	v, err := ParseLSN(string(b))
	if err != nil {
		return err
	}
	*l = v
	return nil
}

// Timeline is a PostgreSQL timeline id; 0 is "none".
type Timeline uint32

// String prints the eight hexadecimal digits that begin a segment's file name.
func (t Timeline) String() string { return fmt.Sprintf("%08X", uint32(t)) }

// SystemID identifies a cluster: pg_control's system_identifier, set by initdb.
type SystemID uint64

// String prints the decimal form that pg_controldata and pg_control_system() show.
func (s SystemID) String() string { return strconv.FormatUint(uint64(s), 10) }

// ParseSystemID reads the decimal form.
func ParseSystemID(s string) (SystemID, error) {
	v, err := strconv.ParseUint(s, 10, 64)
	if err != nil {
		return 0, fmt.Errorf("system identifier %q: expected a decimal number", s)
	}
	return SystemID(v), nil
}

// MarshalText writes the decimal form: JSON numbers above 2^53 lose digits in other languages.
func (s SystemID) MarshalText() ([]byte, error) { return []byte(s.String()), nil }

// UnmarshalText reads the decimal form.
func (s *SystemID) UnmarshalText(b []byte) error {
	v, err := ParseSystemID(string(b))
	if err != nil {
		return err
	}
	*s = v
	return nil
}

// PageSize is the block size that pgark supports: PostgreSQL's default BLCKSZ, 8 KiB.
const PageSize = 8192

// SegmentSize is a cluster's WAL segment size in bytes: a power of two from 1 MiB to 1 GiB (initdb --wal-segsize).
type SegmentSize uint64

// DefaultSegmentSize is initdb's default, 16 MiB.
const DefaultSegmentSize SegmentSize = 16 << 20
