package repository

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"path"
	"strings"
	"unicode/utf8"

	"github.com/pgark/terraform-provider-pgark/internal/engine/postgres"
)

// Manifest describes an image completely. Encrypted where the repository is.
type Manifest struct {
	SID             SID
	SystemID        postgres.SystemID
	PostgresVersion int // server_version_num
	DataChecksums   bool
	BackupLabel     string // byte for byte, as backup stop returned it
	TablespaceMap   string // the same
	DataDirectory   string // where it was
	Host            string
	Volumes         []Volume
	Files           []File
}

// Volume is one directory tree of an image.
type Volume struct {
	Role       string // "data", "wal", "tablespace", "config"
	Path       string // absolute, on the guest
	OID        uint32 // of a tablespace
	Device     string // mount source
	FileSystem string
	SizeBytes  int64
	UsedBytes  int64
}

// FileType is part of the repository format.
type FileType uint8

// The types of files.
const (
	RegularFile FileType = 1
	Directory   FileType = 2
	Symlink     FileType = 3
)

// File is one entry of a volume's tree.
type File struct {
	Volume  int    // index into Manifest.Volumes
	Path    string // relative to the volume, slash-separated; "." is the volume's root
	Type    FileType
	Mode    uint32 // permission bits
	UID     uint32
	GID     uint32
	Owner   string // names, where the guest knew them
	Group   string
	Size    int64
	ModTime int64       // Unix nanoseconds
	Link    string      // of a symlink
	Inline  *SegmentMap // small maps, stored in the manifest
	Map     *FrameRef   // larger ones; both nil: the file is empty
	Corrupt []uint32    // pages whose checksum was wrong twice

	// MapObjects names the packs that the map behind Map refers to (SegmentMap.Objects). Nobody can read an encrypted
	// parent's maps while writing, so whoever shares one must know this; refs could not be written otherwise.
	// For a map that this image wrote, nil stands for what WriteMap saw.
	MapObjects []ObjectRef
}

// text is a string that survives JSON: file names and labels are bytes and need not be UTF-8, which JSON would replace.
// It stands as a string where it is valid UTF-8, else as {"base64":"…"}.
type text string

func (t text) MarshalJSON() ([]byte, error) {
	if utf8.ValidString(string(t)) {
		return json.Marshal(string(t))
	}
	return json.Marshal(struct {
		Bytes []byte `json:"base64"`
	}{[]byte(t)})
}

func (t *text) UnmarshalJSON(b []byte) error {
	if len(b) > 0 && b[0] == '{' {
		var v struct {
			Bytes []byte `json:"base64"`
		}
		err := json.Unmarshal(b, &v)
		*t = text(v.Bytes)
		return err
	}
	return json.Unmarshal(b, (*string)(t))
}

// manifestJSON is the content of a manifest's first frame.
type manifestJSON struct {
	SID             SID               `json:"sid"`
	SystemID        postgres.SystemID `json:"system_identifier"`
	PostgresVersion int               `json:"postgres_version"`
	DataChecksums   bool              `json:"data_checksums"`
	BackupLabel     text              `json:"backup_label"`
	TablespaceMap   text              `json:"tablespace_map"`
	DataDirectory   text              `json:"data_directory"`
	Host            string            `json:"host"`
	Volumes         []volumeJSON      `json:"volumes"`
}

type volumeJSON struct {
	Role       string `json:"role"`
	Path       text   `json:"path"`
	OID        uint32 `json:"oid,omitempty"`
	Device     text   `json:"device,omitempty"`
	FileSystem string `json:"file_system,omitempty"`
	SizeBytes  int64  `json:"size_bytes,omitempty"`
	UsedBytes  int64  `json:"used_bytes,omitempty"`
}

// fileJSON is one line of the frames that follow. The names are short because a cluster may have millions of files.
type fileJSON struct {
	Volume     int         `json:"v"`
	Path       text        `json:"p"`
	Type       FileType    `json:"t"`
	Mode       uint32      `json:"m"`
	UID        uint32      `json:"u"`
	GID        uint32      `json:"g"`
	Owner      text        `json:"o,omitempty"`
	Group      text        `json:"gr,omitempty"`
	Size       int64       `json:"s,omitempty"`
	ModTime    int64       `json:"mt,omitempty"`
	Link       text        `json:"l,omitempty"`
	Inline     []byte      `json:"i,omitempty"` // encoded segment map
	Map        *FrameRef   `json:"map,omitempty"`
	MapObjects []ObjectRef `json:"mo,omitempty"`
	Corrupt    []uint32    `json:"c,omitempty"`
}

// fileFrame is the size at which lines are cut into a frame; maxFileLine bounds one line, and with it inline maps.
const (
	fileFrame   = 1 << 20 // bytes
	maxFileLine = 2 << 20 // bytes
)

// check refuses an entry that a restore could not, or must not, follow.
func (f *File) check(volumes int) error {
	switch {
	case f.Volume < 0 || f.Volume >= volumes:
		return fmt.Errorf("file %q: found volume %d of %d", f.Path, f.Volume, volumes)
	case f.Type < RegularFile || f.Type > Symlink:
		return fmt.Errorf("file %q: found type %d", f.Path, f.Type)
	case f.Path == "" || path.IsAbs(f.Path) || path.Clean(f.Path) != f.Path || f.Path == ".." || strings.HasPrefix(f.Path, "../") || strings.IndexByte(f.Path, 0) >= 0:
		return fmt.Errorf("file %q: expected a clean path within its volume", f.Path)
	case f.Size < 0:
		return fmt.Errorf("file %q: found size %d", f.Path, f.Size)
	case f.Inline != nil && f.Map != nil:
		return fmt.Errorf("file %q: found both an inline map and a map object", f.Path)
	case f.Type != RegularFile && (f.Inline != nil || f.Map != nil):
		return fmt.Errorf("file %q: found a map for what is no regular file", f.Path)
	case f.Map != nil && f.Map.Object.Kind != MapObject:
		return fmt.Errorf("file %q: found its map in %s, expected a map object", f.Path, f.Map.Object)
	case f.Map != nil && len(f.MapObjects) == 0:
		return fmt.Errorf("file %q: found no list of the packs behind its map", f.Path)
	case f.Inline != nil && int64(f.Inline.Blocks)*int64(f.Inline.BlockSize) < f.Size,
		f.Inline == nil && f.Map == nil && f.Type == RegularFile && f.Size != 0:
		return fmt.Errorf("file %q: found a map for less than its %d bytes", f.Path, f.Size)
	}
	return nil
}

// encodeManifest makes the whole manifest object.
func encodeManifest(key string, m *Manifest, session *sessionKey, salt [saltSize]byte) ([]byte, error) {
	h := containerHeader{kind: manifestContainer, suite: session.suite, salt: salt, blob: session.blob}
	c, err := session.cipherFor(key, manifestContainer, salt, h.meta)
	if err != nil {
		return nil, err
	}
	out := h.append(nil, key)
	number := uint32(0)
	frame := func(raw []byte, items int, last bool) error {
		if len(raw) > maxStreamRaw {
			return fmt.Errorf("manifest: found a frame of %d bytes, expected at most %d", len(raw), maxStreamRaw)
		}
		flags := uint8(0)
		if last {
			flags = flagLast
		}
		start := len(out)
		out = appendFrame(out, raw, flags, uint32(items), Thorough)
		c.seal(number, out[start:])
		number++
		return nil
	}

	first := manifestJSON{
		SID: m.SID, SystemID: m.SystemID, PostgresVersion: m.PostgresVersion, DataChecksums: m.DataChecksums,
		BackupLabel: text(m.BackupLabel), TablespaceMap: text(m.TablespaceMap), DataDirectory: text(m.DataDirectory),
		Host: m.Host, Volumes: make([]volumeJSON, len(m.Volumes)),
	}
	for i, v := range m.Volumes {
		first.Volumes[i] = volumeJSON{Role: v.Role, Path: text(v.Path), OID: v.OID, Device: text(v.Device), FileSystem: v.FileSystem, SizeBytes: v.SizeBytes, UsedBytes: v.UsedBytes}
	}
	b, err := json.Marshal(first)
	if err != nil {
		return nil, fmt.Errorf("manifest: %w", err)
	}
	if err := frame(b, 0, len(m.Files) == 0); err != nil {
		return nil, err
	}

	var lines bytes.Buffer
	encoder := json.NewEncoder(&lines)
	items := 0
	for i := range m.Files {
		f := &m.Files[i]
		if err := f.check(len(m.Volumes)); err != nil {
			return nil, fmt.Errorf("manifest: %w", err)
		}
		line := fileJSON{
			Volume: f.Volume, Path: text(f.Path), Type: f.Type, Mode: f.Mode, UID: f.UID, GID: f.GID, Owner: text(f.Owner), Group: text(f.Group),
			Size: f.Size, ModTime: f.ModTime, Link: text(f.Link), Map: f.Map, MapObjects: f.MapObjects, Corrupt: f.Corrupt,
		}
		if f.Inline != nil {
			if line.Inline, err = f.Inline.MarshalBinary(); err != nil {
				return nil, fmt.Errorf("manifest: file %q: %w", f.Path, err)
			}
		}
		before := lines.Len()
		if err := encoder.Encode(line); err != nil { // ends the line
			return nil, fmt.Errorf("manifest: file %q: %w", f.Path, err)
		}
		if n := lines.Len() - before; n > maxFileLine {
			return nil, fmt.Errorf("manifest: file %q: found an entry of %d bytes, expected at most %d: its map belongs into a map object", f.Path, n, maxFileLine)
		}
		items++
		if last := i == len(m.Files)-1; last || lines.Len() >= fileFrame {
			if err := frame(lines.Bytes(), items, last); err != nil {
				return nil, err
			}
			lines.Reset()
			items = 0
		}
	}
	return out, nil
}

// readManifest reads a manifest object; its digest is for the caller to check.
func (r *Repository) readManifest(body io.Reader, key string) (*Manifest, error) {
	h, err := readHeader(body, key, manifestContainer)
	if err != nil {
		return nil, r.contentError(key, err)
	}
	session, err := r.unwrap(key, h.suite, h.blob)
	if err != nil {
		return nil, err
	}
	c, err := session.cipherFor(key, manifestContainer, h.salt, h.meta)
	if err != nil {
		return nil, err
	}
	m, err := decodeManifest(&frameReader{r: body, c: c, kind: manifestContainer})
	return m, r.contentError(key, err)
}

func decodeManifest(frames *frameReader) (*Manifest, error) {
	raw, _, err := frames.next()
	if err != nil {
		return nil, err // a container has a first frame, so this is not io.EOF
	}
	var first manifestJSON
	if err := json.Unmarshal(raw, &first); err != nil {
		return nil, fmt.Errorf("first frame: %w", err)
	}
	m := &Manifest{
		SID: first.SID, SystemID: first.SystemID, PostgresVersion: first.PostgresVersion, DataChecksums: first.DataChecksums,
		BackupLabel: string(first.BackupLabel), TablespaceMap: string(first.TablespaceMap), DataDirectory: string(first.DataDirectory),
		Host: first.Host, Volumes: make([]Volume, len(first.Volumes)),
	}
	for i, v := range first.Volumes {
		m.Volumes[i] = Volume{Role: v.Role, Path: string(v.Path), OID: v.OID, Device: string(v.Device), FileSystem: v.FileSystem, SizeBytes: v.SizeBytes, UsedBytes: v.UsedBytes}
	}
	for {
		raw, h, err := frames.next()
		if errors.Is(err, io.EOF) {
			return m, nil
		}
		if err != nil {
			return nil, err
		}
		before := len(m.Files)
		for len(raw) > 0 {
			line, rest, ok := bytes.Cut(raw, []byte("\n"))
			if !ok {
				return nil, errors.New("files: found a line without its end")
			}
			f, err := decodeFile(line, len(m.Volumes))
			if err != nil {
				return nil, err
			}
			m.Files = append(m.Files, f)
			raw = rest
		}
		if n := len(m.Files) - before; n != int(h.items) {
			return nil, fmt.Errorf("files: found %d in a frame, expected %d", n, h.items)
		}
	}
}

func decodeFile(line []byte, volumes int) (File, error) {
	var l fileJSON
	if err := json.Unmarshal(line, &l); err != nil {
		return File{}, fmt.Errorf("files: %w", err)
	}
	f := File{
		Volume: l.Volume, Path: string(l.Path), Type: l.Type, Mode: l.Mode, UID: l.UID, GID: l.GID, Owner: string(l.Owner), Group: string(l.Group),
		Size: l.Size, ModTime: l.ModTime, Link: string(l.Link), Map: l.Map, MapObjects: l.MapObjects, Corrupt: l.Corrupt,
	}
	if l.Inline != nil {
		f.Inline = &SegmentMap{}
		if err := f.Inline.UnmarshalBinary(l.Inline); err != nil {
			return File{}, fmt.Errorf("file %q: %w", f.Path, err)
		}
	}
	return f, f.check(volumes)
}
