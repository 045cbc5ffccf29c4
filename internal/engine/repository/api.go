package repository

// This file is the package's surface while it is being built; each declaration moves to the file of its part.

import (
	"context"
	"io"
	"iter"
	"time"

	"filippo.io/age"

	"github.com/pgark/terraform-provider-pgark/internal/engine/objectstore"
	"github.com/pgark/terraform-provider-pgark/internal/engine/postgres"
)

// ---- the repository -------------------------------------------------------------------------------------------------

// Description is repository.json.
type Description struct {
	Format       int                      `json:"format"` // 1
	ID           string                   `json:"id"`     // random, 32 hexadecimal digits
	CreatedAt    time.Time                `json:"created_at"`
	Recipients   []string                 `json:"recipients,omitempty"` // age recipients; none: not encrypted
	Capabilities objectstore.Capabilities `json:"capabilities"`
}

// Repository is an opened repository. Safe for concurrent use.
type Repository struct{}

// Create probes the store and writes repository.json if the store holds none. If it holds one already, that one is
// opened, provided its recipients are the same set; otherwise *MismatchError. created tells which.
func Create(ctx context.Context, store objectstore.Store, recipients []string) (r *Repository, created bool, err error) {
	panic("unimplemented")
}

// Open reads repository.json. identities are needed only to read encrypted images and WAL; listing needs none.
// ErrNoRepository if the store holds no repository; an error that names both formats if it is newer than this build.
func Open(ctx context.Context, store objectstore.Store, identities ...age.Identity) (*Repository, error) {
	panic("unimplemented")
}

// ParseIdentities reads the content of PGARK_IDENTITY_FILE (age identity lines, comments allowed).
func ParseIdentities(r io.Reader) ([]age.Identity, error) { panic("unimplemented") }

func (r *Repository) Description() Description   { panic("unimplemented") }
func (r *Repository) Store() objectstore.Store   { panic("unimplemented") }
func (r *Repository) Series(id SeriesID) *Series { panic("unimplemented") }

// SeriesList finds every series in the repository; job or instance, when not empty, restrict it.
func (r *Repository) SeriesList(ctx context.Context, job, instance string) ([]SeriesID, error) {
	panic("unimplemented")
}

// SeriesID names a series: everything of one job, instance and cluster.
type SeriesID struct {
	Job      string
	Instance string
	SystemID postgres.SystemID
}

// String is the key prefix without slash at the end: "orders/15-main/7412345678901234567".
func (id SeriesID) String() string { panic("unimplemented") }

// ParseSeriesID reads the form of String.
func ParseSeriesID(s string) (SeriesID, error) { panic("unimplemented") }

// Owner says who may write under a job name.
type Owner struct {
	Number    uint64    `json:"number"`
	MachineID string    `json:"machine_id"`
	Host      string    `json:"host"`
	ClaimedAt time.Time `json:"claimed_at"`
}

// ClaimJob makes machine the owner of the job name, if nobody is, and succeeds at once if it is already. A name that
// another machine owns gives *OwnedError, unless takeOver names that owner's machine id (handed over on purpose).
func (r *Repository) ClaimJob(ctx context.Context, job string, machine Owner, takeOver string) (Owner, error) {
	panic("unimplemented")
}

// JobOwner returns the present owner; objectstore.ErrNotExist if the name is free.
func (r *Repository) JobOwner(ctx context.Context, job string) (Owner, error) { panic("unimplemented") }

// OwnedError says that a job name belongs to another machine.
type OwnedError struct {
	Repository string // URL
	Job        string
	Owner      Owner
	Claimant   Owner
}

func (e *OwnedError) Error() string { panic("unimplemented") }

// ---- heads ----------------------------------------------------------------------------------------------------------

// SID numbers the sessions of a series, from 1; an image has its session's number. 0 is "none".
type SID uint64

// String is 16 hexadecimal digits, the form used in object names and as an image's id.
func (s SID) String() string { panic("unimplemented") }

// ParseSID reads the form of String, leading zeros optional.
func ParseSID(s string) (SID, error) { panic("unimplemented") }

// Head is one version of a series' commit log: all that listing, retention and collection need, unencrypted.
type Head struct {
	Version  uint64                  `json:"version"`  // 0: the series has no head yet
	Previous string                  `json:"previous"` // checksum of version-1
	NextSID  SID                     `json:"next_sid"`
	Change   Change                  `json:"change"`    // what this version did
	Images   []ImageInfo             `json:"images"`    // live, by SID
	Sessions []OpenSession           `json:"sessions"`  // running: image backups and readers, by SID
	WALFloor map[string]postgres.LSN `json:"wal_floor"` // by timeline (8 hex digits): WAL that ends at or below may be deleted
}

// Change describes a head step, for the audit trail and to recognise one's own lost reply.
type Change struct {
	Op     string    `json:"op"` // "begin" "commit" "abort" "evict" "expire" "floor"
	SIDs   []SID     `json:"sids,omitempty"`
	Writer string    `json:"writer"` // host
	Nonce  string    `json:"nonce"`  // random, so that two writers never write the same bytes
	At     time.Time `json:"at"`     // the writer's clock; information only
}

// SessionKind tells writers from readers.
type SessionKind string

const (
	SessionImage   SessionKind = "image"
	SessionRestore SessionKind = "restore"
)

// OpenSession is a running session; it pins its parent.
type OpenSession struct {
	SID       SID         `json:"sid"`
	Kind      SessionKind `json:"kind"`
	Parent    SID         `json:"parent,omitempty"`
	Host      string      `json:"host"`
	MachineID string      `json:"machine_id"`
	StartedAt time.Time   `json:"started_at"`
}

// ImageInfo is what everybody may know of an image.
type ImageInfo struct {
	SID             SID               `json:"sid"`
	Kind            string            `json:"kind"` // "full" or "incremental"
	Parent          SID               `json:"parent,omitempty"`
	StartedAt       time.Time         `json:"started_at"`   // backup start returned
	CompletedAt     time.Time         `json:"completed_at"` // backup stop returned
	StartLSN        postgres.LSN      `json:"start_lsn"`
	StopLSN         postgres.LSN      `json:"stop_lsn"`
	Timeline        postgres.Timeline `json:"timeline"`
	PostgresVersion int               `json:"postgres_version"` // server_version_num
	SegmentSize     uint64            `json:"wal_segment_size"`
	SourceBytes     int64             `json:"source_bytes"` // size of everything in the image
	ReadBytes       int64             `json:"read_bytes"`
	StoredBytes     int64             `json:"stored_bytes"` // uploaded by this image
	CorruptPages    int64             `json:"corrupt_pages"`
	ManifestDigest  string            `json:"manifest_digest"` // BLAKE3 of the manifest object
	RefsDigest      string            `json:"refs_digest"`
	Capture         string            `json:"capture"` // "live"
}

// Series gives access to one series. Safe for concurrent use; it caches the newest head version it has seen.
type Series struct{}

func (s *Series) ID() SeriesID { panic("unimplemented") }

// Head reads the newest head. A series without one gives Version 0 and NextSID 1.
func (s *Series) Head(ctx context.Context) (*Head, error) { panic("unimplemented") }

// History yields all head versions, oldest first.
func (s *Series) History(ctx context.Context) iter.Seq2[*Head, error] { panic("unimplemented") }

// Begin opens a session and pins parent (0: none), which must be live: *NotLiveError otherwise.
func (s *Series) Begin(ctx context.Context, session OpenSession) (SID, error) { panic("unimplemented") }

// Commit makes the image live and ends its session. The image's objects must be durable (ImageWriter.Finish).
// ErrSessionGone if the session was evicted; *BelowFloorError if its start lies below the WAL floor.
func (s *Series) Commit(ctx context.Context, image ImageInfo) error { panic("unimplemented") }

// Abort ends a session without an image; an unknown session is no error.
func (s *Series) Abort(ctx context.Context, sid SID) error { panic("unimplemented") }

// Evict ends the sessions that keep reports false for.
func (s *Series) Evict(ctx context.Context, keep func(OpenSession) bool) ([]SID, error) {
	panic("unimplemented")
}

// Expire takes images out of the live set; unknown ones are no error.
func (s *Series) Expire(ctx context.Context, sids ...SID) error { panic("unimplemented") }

// RaiseWALFloor allows the deletion of WAL that ends at or below lsn on timeline. It never lowers a floor, and refuses
// to rise above the start of a live image on that timeline.
func (s *Series) RaiseWALFloor(ctx context.Context, t postgres.Timeline, lsn postgres.LSN) error {
	panic("unimplemented")
}

// Collected says what a collection removed or, with dryRun, would remove.
type Collected struct {
	Objects int
	Bytes   int64
}

// Collect deletes the objects of images that nothing refers to, by the rule of the package comment.
func (s *Series) Collect(ctx context.Context, dryRun bool) (Collected, error) { panic("unimplemented") }

// ---- writing an image -----------------------------------------------------------------------------------------------

// ObjectRef names a pack or a map object.
type ObjectRef struct {
	SID  SID
	Kind ObjectKind
	N    uint32
}

// ObjectKind is part of the repository format.
type ObjectKind uint8

const (
	PackObject ObjectKind = 1
	MapObject  ObjectKind = 2
)

// FrameRef says where a frame lies.
type FrameRef struct {
	Object ObjectRef
	Frame  uint32 // number within the object, from 0
	Offset uint32 // of the stored bytes within the object
	Stored uint32 // stored bytes, tag included
	Raw    uint32 // bytes after decompression
}

// Run maps Count consecutive blocks of a file, from Start, to blocks First.. of one frame.
type Run struct {
	Start, Count uint32
	Frame        uint32 // index into SegmentMap.Frames
	First        uint16 // block within the frame
}

// SegmentMap locates every block of one file (a relation's 1 GiB segment, or any other file).
type SegmentMap struct {
	BlockSize uint32 // 8192 for relation files, 262144 for others
	Blocks    uint32 // the last one may be short; it is stored short only for BlockSize 262144, else zero-padded
	Frames    []FrameRef
	Runs      []Run // ascending, without gap or overlap
}

// WriterOptions: the zero value works.
type WriterOptions struct {
	PackSize    int    // bytes; default 16 MiB, 64 MiB at most
	Uploads     int    // packs in flight; default 2. Memory: (Uploads+1) × PackSize and one frame a caller
	Compression string // "zstd" (default) or "none"
	MaxRate     int64  // upload bytes per second; 0: unlimited
}

// ImageWriter uploads the objects of one image. Its methods are safe for concurrent use. After an error it is dead and
// every call returns that error.
type ImageWriter struct{}

// NewImageWriter prepares session sid's objects; parent, which that session pins, may be 0.
func (s *Series) NewImageWriter(ctx context.Context, sid, parent SID, o WriterOptions) (*ImageWriter, error) {
	panic("unimplemented")
}

// WriteFrame compresses and seals raw (1 byte to 256 KiB) and puts it in a pack. It returns before the pack is durable.
// It does not keep raw.
func (w *ImageWriter) WriteFrame(ctx context.Context, raw []byte) (FrameRef, error) {
	panic("unimplemented")
}

// WriteMap stores a map in a map object and says where.
func (w *ImageWriter) WriteMap(ctx context.Context, m *SegmentMap) (FrameRef, error) {
	panic("unimplemented")
}

// StoredBytes is what has been handed to the store so far.
func (w *ImageWriter) StoredBytes() int64 { panic("unimplemented") }

// Finish uploads what is left, then manifest and refs; everything is durable when it returns. The caller then commits
// with the digests that it returns. The manifest's maps may refer to this image's and the parent's objects only.
func (w *ImageWriter) Finish(ctx context.Context, m *Manifest) (manifestDigest, refsDigest string, err error) {
	panic("unimplemented")
}

// Close releases what the writer holds; without Finish, what it uploaded is garbage.
func (w *ImageWriter) Close() error { panic("unimplemented") }

// ---- manifests ------------------------------------------------------------------------------------------------------

// Manifest describes an image completely. Encrypted where the repository is.
type Manifest struct {
	SID             SID               `json:"sid"`
	SystemID        postgres.SystemID `json:"system_identifier"`
	PostgresVersion int               `json:"postgres_version"`
	DataChecksums   bool              `json:"data_checksums"`
	BackupLabel     string            `json:"backup_label"`   // byte for byte, as backup stop returned it
	TablespaceMap   string            `json:"tablespace_map"` // the same
	DataDirectory   string            `json:"data_directory"` // where it was
	Host            string            `json:"host"`
	Volumes         []Volume          `json:"volumes"`
	Files           []File            `json:"-"` // stored as a stream of their own
}

// Volume is one directory tree of an image.
type Volume struct {
	Role       string `json:"role"`             // "data", "wal", "tablespace", "config"
	Path       string `json:"path"`             // absolute, on the guest
	OID        uint32 `json:"oid,omitempty"`    // of a tablespace
	Device     string `json:"device,omitempty"` // mount source
	FileSystem string `json:"file_system,omitempty"`
	SizeBytes  int64  `json:"size_bytes,omitempty"`
	UsedBytes  int64  `json:"used_bytes,omitempty"`
}

// FileType is part of the repository format.
type FileType uint8

const (
	RegularFile FileType = 1
	Directory   FileType = 2
	Symlink     FileType = 3
)

// File is one entry of a volume's tree.
type File struct {
	Volume  int         `json:"v"` // index into Manifest.Volumes
	Path    string      `json:"p"` // relative to the volume, slash-separated; "." is the volume's root
	Type    FileType    `json:"t"`
	Mode    uint32      `json:"m"` // permission bits
	UID     uint32      `json:"u"`
	GID     uint32      `json:"g"`
	Owner   string      `json:"o,omitempty"` // names, where the guest knew them
	Group   string      `json:"gr,omitempty"`
	Size    int64       `json:"s,omitempty"`
	ModTime int64       `json:"mt,omitempty"` // Unix nanoseconds
	Link    string      `json:"l,omitempty"`  // of a symlink
	Inline  *SegmentMap `json:"-"`            // small maps, stored in the manifest
	Map     *FrameRef   `json:"-"`            // larger ones; both nil: the file is empty
	Corrupt []uint32    `json:"c,omitempty"`  // pages whose checksum was wrong twice

	// MapObjects names the packs that the map behind Map refers to (SegmentMap.Objects). Nobody can read an encrypted
	// parent's maps while writing, so whoever shares one must know this; refs could not be written otherwise.
	// For a map that this image wrote, nil stands for what WriteMap saw.
	MapObjects []ObjectRef `json:"-"`
}

// Objects lists the packs that the map refers to, each once, in order.
func (m *SegmentMap) Objects() []ObjectRef { panic("unimplemented") }

// MarshalBinary encodes the map as it stands in map objects: the form in which a guest may keep its parent's maps.
func (m *SegmentMap) MarshalBinary() ([]byte, error) { panic("unimplemented") }

// UnmarshalBinary reads and checks what MarshalBinary wrote.
func (m *SegmentMap) UnmarshalBinary(b []byte) error { panic("unimplemented") }

// ---- reading an image -----------------------------------------------------------------------------------------------

// Image reads a live image. Safe for concurrent use. Pin it (Begin with SessionRestore) while reading.
type Image struct{}

// OpenImage reads and verifies refs and manifest. An encrypted one without a fitting identity: *NoIdentityError.
func (s *Series) OpenImage(ctx context.Context, sid SID) (*Image, error) { panic("unimplemented") }

func (i *Image) Manifest() *Manifest { panic("unimplemented") }

// FileMap returns a file's map, inline or fetched; an empty file's has no blocks.
func (i *Image) FileMap(ctx context.Context, f *File) (*SegmentMap, error) { panic("unimplemented") }

// ReadFrames fetches, verifies and decompresses frames, coalescing neighbours into ranged reads (gaps up to 512 KiB,
// up to 16 MiB a request), and calls fn for each, in no order, from one goroutine. raw is valid during the call.
func (i *Image) ReadFrames(ctx context.Context, frames []FrameRef, fn func(f FrameRef, raw []byte) error) error {
	panic("unimplemented")
}

// ---- WAL ------------------------------------------------------------------------------------------------------------

// WALInfo is what everybody may know of a WAL object: its header.
type WALInfo struct {
	Name       string            `json:"name"` // file name as PostgreSQL gives it: segment, .partial, .history, .backup
	SystemID   postgres.SystemID `json:"system_identifier"`
	Size       int64             `json:"size"`   // raw bytes
	Digest     string            `json:"digest"` // BLAKE3 of the raw bytes, hexadecimal
	StoredAt   time.Time         `json:"stored_at"`
	Host       string            `json:"host"`
	FirstTime  *time.Time        `json:"first_time,omitempty"` // of the first and last commit, abort or restore point record in it
	LastTime   *time.Time        `json:"last_time,omitempty"`
	StoredSize int64             `json:"-"` // of the object; filled when read
}

// WALConflictError says that a WAL file is there with other content.
type WALConflictError struct {
	Series SeriesID
	There  WALInfo
	Here   WALInfo
}

func (e *WALConflictError) Error() string { panic("unimplemented") }

// PutWAL compresses, seals and stores a WAL file durably. The same content again is success (stored false); other
// content is *WALConflictError. open is called for each pass over the file (one, unless the store must retry a body
// too large for memory).
func (s *Series) PutWAL(ctx context.Context, info WALInfo, raw io.ReaderAt) (stored bool, storedSize int64, err error) {
	panic("unimplemented")
}

// GetWAL writes the raw file to w after verifying every frame, and at the end its digest: on an error, what was
// written is to be thrown away. objectstore.ErrNotExist if absent.
func (s *Series) GetWAL(ctx context.Context, name string, w io.Writer) (WALInfo, error) {
	panic("unimplemented")
}

// StatWAL reads a WAL object's header only.
func (s *Series) StatWAL(ctx context.Context, name string) (WALInfo, error) { panic("unimplemented") }

// WALEntry is one listed WAL object.
type WALEntry struct {
	Name       string // as PostgreSQL names it
	StoredSize int64
	Modified   time.Time
}

// ListWAL yields the series' WAL objects of one timeline in order of name, from the given name on ("" for all).
// History files are listed by Histories.
func (s *Series) ListWAL(ctx context.Context, t postgres.Timeline, from string) iter.Seq2[WALEntry, error] {
	panic("unimplemented")
}

// Timelines lists the timelines that have WAL objects or a history file, ascending.
func (s *Series) Timelines(ctx context.Context) ([]postgres.Timeline, error) { panic("unimplemented") }

// DeleteWAL removes WAL objects that end at or below the head's floor; others are refused.
func (s *Series) DeleteWAL(ctx context.Context, segmentSize postgres.SegmentSize, names ...string) error {
	panic("unimplemented")
}

// ---- session records ------------------------------------------------------------------------------------------------

// SessionRecord is the account of one finished session, for statistics; unencrypted, never changed.
type SessionRecord struct {
	ID          string    `json:"id"`
	Kind        string    `json:"kind"`   // "image", "wal"
	Result      string    `json:"result"` // "success", "warning", "error"
	StartedAt   time.Time `json:"started_at"`
	CompletedAt time.Time `json:"completed_at"`
	Host        string    `json:"host"`
	SID         SID       `json:"sid,omitempty"`
	Error       string    `json:"error,omitempty"`
	SourceBytes int64     `json:"source_bytes"`
	ReadBytes   int64     `json:"read_bytes"`
	StoredBytes int64     `json:"stored_bytes"`
	Segments    int64     `json:"segments,omitempty"`
	Failures    int64     `json:"failures,omitempty"`
	MaxDelay    float64   `json:"max_delay_seconds,omitempty"` // from segment full (.ready) to durable
}

// PutSession stores a record; its ID is made from its start and random digits if empty.
func (s *Series) PutSession(ctx context.Context, r SessionRecord) error { panic("unimplemented") }

// Sessions yields records that started after the given time, oldest first.
func (s *Series) Sessions(ctx context.Context, after time.Time) iter.Seq2[SessionRecord, error] {
	panic("unimplemented")
}
