package repository

import "github.com/pgark/terraform-provider-pgark/internal/engine/postgres"

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
