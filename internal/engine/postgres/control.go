package postgres

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"math"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"
)

// ControlFile is pg_control's path in the data directory.
const ControlFile = "global/pg_control"

// ControlFileSize is the size of pg_control; the record uses only its first 300 bytes, so that a write of it fits in a
// disk sector (pg_control.h, PG_CONTROL_FILE_SIZE and PG_CONTROL_MAX_SAFE_SIZE).
const ControlFileSize = 8192

// DBState is pg_control's state of the cluster.
type DBState uint32

// The states of a cluster (pg_control.h, DBState).
const (
	StateStartup            DBState = 0
	StateShutdown           DBState = 1
	StateShutdownInRecovery DBState = 2
	StateShuttingDown       DBState = 3
	StateCrashRecovery      DBState = 4
	StateArchiveRecovery    DBState = 5
	StateInProduction       DBState = 6
)

// String is the state as pg_controldata prints it.
func (s DBState) String() string {
	names := [...]string{
		"starting up", "shut down", "shut down in recovery", "shutting down", "in crash recovery", "in archive recovery",
		"in production",
	}
	if int(s) < len(names) {
		return names[s]
	}
	return "unrecognized state " + strconv.Itoa(int(s))
}

// WALLevel is a value of wal_level as the server stores it.
type WALLevel uint32

// The values of wal_level (xlog.h, WalLevel).
const (
	WALMinimal WALLevel = 0
	WALReplica WALLevel = 1
	WALLogical WALLevel = 2
)

// String is the setting's value.
func (l WALLevel) String() string {
	names := [...]string{"minimal", "replica", "logical"}
	if int(l) < len(names) {
		return names[l]
	}
	return "unrecognized wal_level " + strconv.Itoa(int(l))
}

// Control is what pgark needs of pg_control.
type Control struct {
	SystemID       SystemID
	ControlVersion uint32 // 1300: PostgreSQL 13 to 16; 1700; 1800
	CatalogVersion uint32
	State          DBState
	Modified       time.Time // when pg_control was last written, to the second

	Checkpoint         LSN // where the latest checkpoint's record is
	CheckpointRedo     LSN // where recovery from it starts
	CheckpointTimeline Timeline
	CheckpointTime     time.Time
	FullPageWrites     bool // as of the latest checkpoint

	MinRecoveryPoint         LSN // 0 unless in recovery: consistent from here on
	MinRecoveryPointTimeline Timeline
	BackupStart, BackupEnd   LSN // set while a restored backup is not yet consistent
	BackupEndRequired        bool

	WALLevel               WALLevel
	WALLogHints            bool
	MaxConnections         int // these five must not be smaller on a server that recovers
	MaxWorkerProcesses     int
	MaxWALSenders          int
	MaxPreparedXacts       int
	MaxLocksPerTransaction int

	BlockSize           uint32
	RelationSegmentSize uint32 // blocks a file: 131072 (1 GiB) by default
	WALBlockSize        uint32
	WALSegmentSize      SegmentSize
	DataChecksumVersion uint32 // 0: no page checksums
}

// DataChecksums tells whether pages carry checksums.
func (c *Control) DataChecksums() bool { return c.DataChecksumVersion != 0 }

// ErrControlChecksum says that pg_control's checksum does not match: it is damaged, or was read while it was written.
var ErrControlChecksum = errors.New("pg_control: checksum does not match")

// UnsupportedError is a version or build of PostgreSQL that pgark does not handle.
type UnsupportedError struct {
	What            string // "pg_control version", "block size"
	Found, Expected string
}

// Error says what was found and what is expected.
func (e *UnsupportedError) Error() string {
	return fmt.Sprintf("%s: found %s, expected %s", e.What, e.Found, e.Expected)
}

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// The layout of ControlFileData in pg_control.h on 64-bit machines: offsets in bytes. 18 added default_char_signedness
// before the nonce, which moved the checksum; 17 put wal_level into padding of the checkpoint copy.
const (
	controlSystemID       = 0
	controlVersion        = 8
	controlCatalogVersion = 12
	controlState          = 16
	controlTime           = 24
	controlCheckpoint     = 32

	controlCopy               = 40 // CheckPoint checkPointCopy
	controlCopyRedo           = controlCopy + 0
	controlCopyTimeline       = controlCopy + 8
	controlCopyFullPageWrites = controlCopy + 16
	controlCopyTime           = controlCopy + 64

	controlMinRecoveryPoint  = 136
	controlMinRecoveryTLI    = 144
	controlBackupStart       = 152
	controlBackupEnd         = 160
	controlBackupEndRequired = 168
	controlWALLevel          = 172
	controlWALLogHints       = 176
	controlMaxConnections    = 180
	controlMaxWorkers        = 184
	controlMaxWALSenders     = 188
	controlMaxPreparedXacts  = 192
	controlMaxLocks          = 196
	controlMaxAlign          = 204
	controlFloatFormat       = 208
	controlBlockSize         = 216
	controlRelSegSize        = 220
	controlWALBlockSize      = 224
	controlWALSegmentSize    = 228
	controlChecksumVersion   = 252

	controlCRC1300 = 288
	controlCRC1800 = 292
	controlSize    = controlCRC1800 + 4
)

// ParseControl decodes pg_control. A checksum that does not match is ErrControlChecksum; a version of PostgreSQL or a
// build that pgark does not handle is an *UnsupportedError.
func ParseControl(b []byte) (*Control, error) {
	if len(b) < controlSize {
		return nil, fmt.Errorf("pg_control: found %d bytes, expected %d", len(b), ControlFileSize)
	}
	u32 := func(offset int) uint32 { return binary.LittleEndian.Uint32(b[offset:]) }
	u64 := func(offset int) uint64 { return binary.LittleEndian.Uint64(b[offset:]) }

	var crcOffset int
	switch version := u32(controlVersion); {
	case version == 1300 || version == 1700:
		crcOffset = controlCRC1300
	case version == 1800:
		crcOffset = controlCRC1800
	case version%65536 == 0 && version != 0:
		return nil, &UnsupportedError{What: "pg_control byte order", Found: "big-endian", Expected: "little-endian"}
	default:
		return nil, &UnsupportedError{
			What: "pg_control version", Found: strconv.Itoa(int(version)), Expected: "1300 (PostgreSQL 13 to 16), 1700 or 1800",
		}
	}
	if found, expected := crc32.Checksum(b[:crcOffset], castagnoli), u32(crcOffset); found != expected {
		return nil, fmt.Errorf("%w: found %08x, expected %08x", ErrControlChecksum, found, expected)
	}
	c := &Control{
		SystemID:       SystemID(u64(controlSystemID)),
		ControlVersion: u32(controlVersion),
		CatalogVersion: u32(controlCatalogVersion),
		State:          DBState(u32(controlState)),
		Modified:       time.Unix(int64(u64(controlTime)), 0).UTC(),

		Checkpoint:         LSN(u64(controlCheckpoint)),
		CheckpointRedo:     LSN(u64(controlCopyRedo)),
		CheckpointTimeline: Timeline(u32(controlCopyTimeline)),
		CheckpointTime:     time.Unix(int64(u64(controlCopyTime)), 0).UTC(),
		FullPageWrites:     b[controlCopyFullPageWrites] != 0,

		MinRecoveryPoint:         LSN(u64(controlMinRecoveryPoint)),
		MinRecoveryPointTimeline: Timeline(u32(controlMinRecoveryTLI)),
		BackupStart:              LSN(u64(controlBackupStart)),
		BackupEnd:                LSN(u64(controlBackupEnd)),
		BackupEndRequired:        b[controlBackupEndRequired] != 0,

		WALLevel:               WALLevel(u32(controlWALLevel)),
		WALLogHints:            b[controlWALLogHints] != 0,
		MaxConnections:         int(u32(controlMaxConnections)),
		MaxWorkerProcesses:     int(u32(controlMaxWorkers)),
		MaxWALSenders:          int(u32(controlMaxWALSenders)),
		MaxPreparedXacts:       int(u32(controlMaxPreparedXacts)),
		MaxLocksPerTransaction: int(u32(controlMaxLocks)),

		BlockSize:           u32(controlBlockSize),
		RelationSegmentSize: u32(controlRelSegSize),
		WALBlockSize:        u32(controlWALBlockSize),
		WALSegmentSize:      SegmentSize(u32(controlWALSegmentSize)),
		DataChecksumVersion: u32(controlChecksumVersion),
	}
	// These two stand for the whole layout: a 32-bit build or another float format has other offsets.
	if align := u32(controlMaxAlign); align != 8 {
		return nil, &UnsupportedError{What: "maximum data alignment", Found: strconv.Itoa(int(align)), Expected: "8"}
	}
	if f := math.Float64frombits(u64(controlFloatFormat)); f != 1234567.0 {
		return nil, &UnsupportedError{What: "float format", Found: strconv.FormatFloat(f, 'g', -1, 64), Expected: "1234567"}
	}
	if !c.WALSegmentSize.Valid() {
		return nil, &UnsupportedError{
			What: "WAL segment size", Found: strconv.FormatUint(uint64(c.WALSegmentSize), 10), Expected: "a power of two from 1 MiB to 1 GiB",
		}
	}
	return c, nil
}

// CheckBuild refuses what pgark's page and WAL code does not handle: block sizes that were changed when PostgreSQL was
// compiled. The error is an *UnsupportedError.
func (c *Control) CheckBuild() error {
	if c.BlockSize != PageSize {
		return &UnsupportedError{What: "block size", Found: strconv.Itoa(int(c.BlockSize)), Expected: strconv.Itoa(PageSize)}
	}
	if c.WALBlockSize != WALPageSize {
		return &UnsupportedError{What: "WAL block size", Found: strconv.Itoa(int(c.WALBlockSize)), Expected: strconv.Itoa(WALPageSize)}
	}
	return nil
}

// ReadControl reads pg_control of a data directory.
func ReadControl(dataDirectory string) (*Control, error) {
	c, _, err := ReadControlFile(dataDirectory)
	return c, err
}

// ReadControlFile is ReadControl, and returns the file's bytes too: as a backup stores them, verified. The server writes
// the file in place, so that a reader can see half of a write; it is read again up to ten times, 10 ms apart, before a
// wrong checksum is believed (as PostgreSQL's get_controlfile does in frontends).
func ReadControlFile(dataDirectory string) (*Control, []byte, error) {
	path := filepath.Join(dataDirectory, ControlFile)
	for try := 1; ; try++ {
		b, err := os.ReadFile(path)
		if err != nil {
			return nil, nil, err
		}
		c, err := ParseControl(b)
		if err == nil {
			return c, b, nil
		}
		if !errors.Is(err, ErrControlChecksum) || try == 10 {
			return nil, nil, fmt.Errorf("%s: %w", path, err)
		}
		time.Sleep(10 * time.Millisecond)
	}
}

// ReadMajor reads the major version from a data directory's PG_VERSION.
func ReadMajor(dataDirectory string) (int, error) {
	path := filepath.Join(dataDirectory, "PG_VERSION")
	b, err := os.ReadFile(path)
	if err != nil {
		return 0, err
	}
	s := strings.TrimSpace(string(b))
	major, err := strconv.Atoi(s)
	if err != nil || major < 1 {
		return 0, fmt.Errorf("%s: found %q, expected a major version like 17", path, s)
	}
	return major, nil
}
