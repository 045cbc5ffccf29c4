package repository

import (
	"fmt"
	"strconv"
	"strings"
	"time"

	"github.com/pgark/terraform-provider-pgark/internal/engine/postgres"
)

// Every key is built and parsed in this file. All are relative to the repository's prefix.

const (
	descriptionKey = "repository.json"
	ownerElement   = "owner"
)

// SeriesID names a series: everything of one job, instance and cluster.
type SeriesID struct {
	Job      string
	Instance string
	SystemID postgres.SystemID
}

// String is the key prefix without slash at the end: "orders/15-main/7412345678901234567".
func (id SeriesID) String() string {
	return id.Job + "/" + id.Instance + "/" + id.SystemID.String()
}

// ParseSeriesID reads the form of String.
func ParseSeriesID(s string) (SeriesID, error) {
	parts := strings.Split(s, "/")
	if len(parts) != 3 {
		return SeriesID{}, fmt.Errorf("series %q: expected the form JOB/INSTANCE/SYSTEM-IDENTIFIER", s)
	}
	system, err := postgres.ParseSystemID(parts[2])
	if err != nil {
		return SeriesID{}, fmt.Errorf("series %q: %w", s, err)
	}
	id := SeriesID{Job: parts[0], Instance: parts[1], SystemID: system}
	if err := id.check(); err != nil {
		return SeriesID{}, err
	}
	if id.String() != s {
		return SeriesID{}, fmt.Errorf("series %q: expected %s", s, id)
	}
	return id, nil
}

func (id SeriesID) check() error {
	if err := checkName("job", id.Job); err != nil {
		return err
	}
	if err := checkName("instance", id.Instance); err != nil {
		return err
	}
	if id.Instance == ownerElement {
		return fmt.Errorf("instance %q: the name is reserved", id.Instance)
	}
	return nil
}

// checkName refuses names that are no element of a key, or that mean something else at that place.
func checkName(what, s string) error {
	switch {
	case s == "":
		return fmt.Errorf("%s name is empty", what)
	case len(s) > 128:
		return fmt.Errorf("%s name %q: found %d bytes, expected at most 128", what, s, len(s))
	case s == "." || s == ".." || strings.HasPrefix(s, ".pgark-"), s == descriptionKey:
		return fmt.Errorf("%s name %q: the name is reserved", what, s)
	}
	for i := range len(s) {
		if c := s[i]; c <= ' ' || c == '/' || c == '\\' || c >= 0x7f {
			return fmt.Errorf("%s name %q: found %q, expected printable ASCII without space and slash", what, s, c)
		}
	}
	return nil
}

// SID numbers the sessions of a series, from 1; an image has its session's number. 0 is "none".
type SID uint64

// String is 16 hexadecimal digits, the form used in object names and as an image's id.
func (s SID) String() string { return fmt.Sprintf("%016x", uint64(s)) }

// ParseSID reads the form of String, leading zeros optional.
func ParseSID(s string) (SID, error) {
	v, err := strconv.ParseUint(s, 16, 64)
	if err != nil || len(s) > 16 {
		return 0, fmt.Errorf("image id %q: expected up to 16 hexadecimal digits", s)
	}
	return SID(v), nil
}

// MarshalText writes the form of String: documents show the same id as object names.
func (s SID) MarshalText() ([]byte, error) { return []byte(s.String()), nil }

// UnmarshalText reads the form of String.
func (s *SID) UnmarshalText(b []byte) error {
	v, err := ParseSID(string(b))
	if err != nil {
		return err
	}
	*s = v
	return nil
}

// ObjectRef names a pack or a map object of a series.
type ObjectRef struct {
	SID  SID
	Kind ObjectKind
	N    uint32
}

// ObjectKind is part of the repository format.
type ObjectKind uint8

// The kinds of objects that maps and manifests refer to.
const (
	PackObject ObjectKind = 1
	MapObject  ObjectKind = 2
)

// String is the key below image/: "0000000000000003/pack/0000002a".
func (o ObjectRef) String() string {
	return fmt.Sprintf("%s/%s/%08x", o.SID, o.Kind, o.N)
}

// String is the element of the key.
func (k ObjectKind) String() string {
	switch k {
	case PackObject:
		return "pack"
	case MapObject:
		return "map"
	}
	return fmt.Sprintf("kind-%d", uint8(k))
}

// MarshalText writes the form of String.
func (o ObjectRef) MarshalText() ([]byte, error) { return []byte(o.String()), nil }

// UnmarshalText reads the form of String.
func (o *ObjectRef) UnmarshalText(b []byte) error {
	n, ok := parseImageKey(string(b))
	if !ok || n.kind == 0 {
		return fmt.Errorf("object %q: expected the form 0000000000000003/pack/0000002a", b)
	}
	*o = ObjectRef{SID: n.sid, Kind: n.kind, N: n.n}
	return nil
}

func compareObjects(a, b ObjectRef) int {
	switch {
	case a.SID != b.SID:
		return cmpUint(uint64(a.SID), uint64(b.SID))
	case a.Kind != b.Kind:
		return cmpUint(uint64(a.Kind), uint64(b.Kind))
	}
	return cmpUint(uint64(a.N), uint64(b.N))
}

func cmpUint(a, b uint64) int {
	switch {
	case a < b:
		return -1
	case a > b:
		return 1
	}
	return 0
}

// imageKey is a parsed key below image/. kind 0 is the manifest or the refs.
type imageKey struct {
	sid  SID
	kind ObjectKind
	n    uint32
}

// parseImageKey reads what follows image/ in a key. What it does not know is not ours to delete.
func parseImageKey(s string) (imageKey, bool) {
	parts := strings.Split(s, "/")
	sid, err := ParseSID(parts[0])
	if err != nil || len(parts[0]) != 16 || sid.String() != parts[0] {
		return imageKey{}, false
	}
	switch {
	case len(parts) == 2 && (parts[1] == "manifest" || parts[1] == "refs"):
		return imageKey{sid: sid}, true
	case len(parts) == 3 && len(parts[2]) == 8 && (parts[1] == "pack" || parts[1] == "map"):
		n, err := strconv.ParseUint(parts[2], 16, 32)
		if err != nil || fmt.Sprintf("%08x", n) != parts[2] {
			return imageKey{}, false
		}
		k := imageKey{sid: sid, kind: PackObject, n: uint32(n)}
		if parts[1] == "map" {
			k.kind = MapObject
		}
		return k, true
	}
	return imageKey{}, false
}

func (id SeriesID) headPrefix() string { return id.String() + "/head/" }
func (id SeriesID) headKey(version uint64) string {
	return fmt.Sprintf("%s%016x", id.headPrefix(), version)
}
func (id SeriesID) imagePrefix() string              { return id.String() + "/image/" }
func (id SeriesID) objectKey(o ObjectRef) string     { return id.imagePrefix() + o.String() }
func (id SeriesID) manifestKey(s SID) string         { return id.imagePrefix() + s.String() + "/manifest" }
func (id SeriesID) refsKey(s SID) string             { return id.imagePrefix() + s.String() + "/refs" }
func (id SeriesID) sessionPrefix() string            { return id.String() + "/session/" }
func (id SeriesID) sessionKey(session string) string { return id.sessionPrefix() + session }

func (id SeriesID) parseHeadKey(key string) (uint64, bool) {
	digits, ok := strings.CutPrefix(key, id.headPrefix())
	if !ok || len(digits) != 16 {
		return 0, false
	}
	v, err := strconv.ParseUint(digits, 16, 64)
	return v, err == nil && v > 0 && id.headKey(v) == key
}

func ownerPrefix(job string) string             { return job + "/" + ownerElement + "/" }
func ownerKey(job string, n uint64) string      { return fmt.Sprintf("%s%016x", ownerPrefix(job), n) }
func (id SeriesID) walPrefix() string           { return id.String() + "/wal/" }
func walElement(t postgres.Timeline) string     { return t.String() + "/" }
func historyElement(t postgres.Timeline) string { return postgres.HistoryFileName(t) }

func parseOwnerKey(job, key string) (uint64, bool) {
	digits, ok := strings.CutPrefix(key, ownerPrefix(job))
	if !ok || len(digits) != 16 {
		return 0, false
	}
	v, err := strconv.ParseUint(digits, 16, 64)
	return v, err == nil && v > 0 && ownerKey(job, v) == key
}

// walKey places a WAL file: histories beside the timelines' directories, because a restore looks for them first and
// without knowing which exist; all else in the directory of its timeline.
func (id SeriesID) walKey(name string) (string, error) {
	f, err := postgres.ParseWALFile(name)
	if err != nil {
		return "", err
	}
	if f.Kind == postgres.HistoryFile {
		return id.walPrefix() + historyElement(f.Timeline), nil
	}
	return id.walPrefix() + walElement(f.Timeline) + name, nil
}

// parseWALKey gives the name back; false for what is no WAL file of PostgreSQL.
func (id SeriesID) parseWALKey(key string) (string, bool) {
	rest, ok := strings.CutPrefix(key, id.walPrefix())
	if !ok {
		return "", false
	}
	name := rest[strings.LastIndexByte(rest, '/')+1:]
	built, err := id.walKey(name)
	return name, err == nil && built == key
}

// tailPosition is fixed in width, so that tails sort by position.
func tailPosition(l postgres.LSN) string { return fmt.Sprintf("%016X", uint64(l)) }

const tailSuffix = ".tail"

// name is the last element of the tail's key, and the name in its header.
func (t Tail) name() string { return tailPosition(t.Start) + "-" + tailPosition(t.End) + tailSuffix }

// tailKey places a tail among the WAL files of its timeline.
func (id SeriesID) tailKey(t Tail) string { return id.walPrefix() + walElement(t.Timeline) + t.name() }

// parseTailKey is tailKey's inverse; false for what is no tail.
func (id SeriesID) parseTailKey(key string) (Tail, bool) {
	rest, ok := strings.CutPrefix(key, id.walPrefix())
	if !ok {
		return Tail{}, false
	}
	timeline, name, _ := strings.Cut(rest, "/")
	positions, ok := strings.CutSuffix(name, tailSuffix)
	if !ok || len(timeline) != 8 || len(positions) != 33 {
		return Tail{}, false
	}
	n, errTimeline := strconv.ParseUint(timeline, 16, 32)
	start, errStart := strconv.ParseUint(positions[:16], 16, 64)
	end, errEnd := strconv.ParseUint(positions[17:], 16, 64)
	t := Tail{Timeline: postgres.Timeline(n), Start: postgres.LSN(start), End: postgres.LSN(end)}
	ok = errTimeline == nil && errStart == nil && errEnd == nil && t.check() == nil && id.tailKey(t) == key
	return t, ok
}

// parseTimeline tells which timeline a key below wal/ belongs to, and whether it is the history file's; false for what is
// neither a WAL file nor a tail.
func (id SeriesID) parseTimeline(key string) (t postgres.Timeline, history, ok bool) {
	if tail, ok := id.parseTailKey(key); ok {
		return tail.Timeline, false, true
	}
	name, ok := id.parseWALKey(key)
	if !ok {
		return 0, false, false
	}
	f, err := postgres.ParseWALFile(name)
	return f.Timeline, f.Kind == postgres.HistoryFile, err == nil
}

// sessionTime is fixed in width, so that records sort by time.
const sessionTime = "20060102T150405.000000Z"

func formatSessionTime(t time.Time) string { return t.UTC().Format(sessionTime) }
