package repository

import (
	"cmp"
	"fmt"
	"maps"
	"slices"
	"time"

	"github.com/pgark/terraform-provider-pgark/internal/engine/postgres"
)

// Head is one version of a series' commit log: all that listing, retention and collection need, unencrypted.
type Head struct {
	Version  uint64                  `json:"version"`  // 0: the series has no head yet
	Previous string                  `json:"previous"` // checksum of version-1
	NextSID  SID                     `json:"next_sid"`
	Change   Change                  `json:"change"`    // what this version did
	Images   []ImageInfo             `json:"images"`    // live, by SID
	Sessions []OpenSession           `json:"sessions"`  // running: image backups and readers, by SID
	WALFloor map[string]postgres.LSN `json:"wal_floor"` // by timeline (8 hex digits): WAL that ends at or below may be deleted

	checksum string // of the document; "" for version 0
}

// headDocument is a Head as it is stored.
type headDocument struct {
	Format int `json:"format"`
	*Head
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

// The kinds of sessions.
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

	// Filled by Begin from the parent: a reader needs the WAL of its image even after the image has expired.
	ParentTimeline postgres.Timeline `json:"parent_timeline,omitempty"`
	ParentStart    postgres.LSN      `json:"parent_start_lsn,omitempty"`
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

// Image returns the live image with the given number, or nil.
func (h *Head) Image(sid SID) *ImageInfo {
	if i, ok := slices.BinarySearchFunc(h.Images, sid, func(i ImageInfo, s SID) int { return cmp.Compare(i.SID, s) }); ok {
		return &h.Images[i]
	}
	return nil
}

// Session returns the running session with the given number, or nil.
func (h *Head) Session(sid SID) *OpenSession {
	if i, ok := slices.BinarySearchFunc(h.Sessions, sid, func(s OpenSession, sid SID) int { return cmp.Compare(s.SID, sid) }); ok {
		return &h.Sessions[i]
	}
	return nil
}

// pinned tells whether a running session has sid as its parent.
func (h *Head) pinned(sid SID) bool {
	return slices.ContainsFunc(h.Sessions, func(s OpenSession) bool { return s.Parent == sid })
}

// Floor is the position on a timeline up to which WAL may be deleted; 0: none may.
func (h *Head) Floor(t postgres.Timeline) postgres.LSN { return h.WALFloor[t.String()] }

// The transitions of the protocol. Each is a pure function of a head: it returns the next one, without version, link
// and change, or nil where nothing has to change, or why it may not be made. protocol_test.go explores their
// interleavings.

// next copies the head, so that a transition can change it.
func (h *Head) next() *Head {
	n := &Head{
		NextSID:  h.NextSID,
		Images:   slices.Clone(h.Images),
		Sessions: slices.Clone(h.Sessions),
		WALFloor: maps.Clone(h.WALFloor),
	}
	// An empty list stands as [], not null, in every document.
	if n.Images == nil {
		n.Images = []ImageInfo{}
	}
	if n.Sessions == nil {
		n.Sessions = []OpenSession{}
	}
	if n.WALFloor == nil {
		n.WALFloor = map[string]postgres.LSN{}
	}
	return n
}

// begin opens a session; its number is the head's NextSID. The parent must be live now: from then on the session pins
// it, and everything that it refers to.
func (h *Head) begin(id SeriesID, session OpenSession) (*Head, error) {
	if session.Kind != SessionImage && session.Kind != SessionRestore {
		return nil, fmt.Errorf("begin session of %s: found kind %q, expected %q or %q", id, session.Kind, SessionImage, SessionRestore)
	}
	if session.Kind == SessionRestore && session.Parent == 0 {
		return nil, fmt.Errorf("begin session of %s: a restore session names no image", id)
	}
	session.SID, session.ParentTimeline, session.ParentStart = h.NextSID, 0, 0
	if session.Parent != 0 {
		parent := h.Image(session.Parent)
		if parent == nil {
			return nil, &NotLiveError{Series: id, SID: session.Parent}
		}
		session.ParentTimeline, session.ParentStart = parent.Timeline, parent.StartLSN
	}
	n := h.next()
	n.NextSID++
	n.Sessions = append(n.Sessions, session)
	return n, nil
}

// commit makes an image live and ends its session. The same image again is no change: the caller may repeat a commit
// whose outcome it does not know.
func (h *Head) commit(id SeriesID, image ImageInfo) (*Head, error) {
	if there := h.Image(image.SID); there != nil && there.ManifestDigest == image.ManifestDigest && there.RefsDigest == image.RefsDigest {
		return nil, nil
	}
	session := h.Session(image.SID)
	if session == nil {
		return nil, fmt.Errorf("commit image %s of %s: %w", image.SID, id, ErrSessionGone)
	}
	if session.Kind != SessionImage {
		return nil, fmt.Errorf("commit image %s of %s: found a %s session, expected an image session", image.SID, id, session.Kind)
	}
	if image.Parent != 0 && image.Parent != session.Parent {
		return nil, fmt.Errorf("commit image %s of %s: found parent %s, expected %s, which its session pins", image.SID, id, image.Parent, session.Parent)
	}
	if image.Timeline == 0 || image.StopLSN < image.StartLSN {
		return nil, fmt.Errorf("commit image %s of %s: found timeline %d from %s to %s", image.SID, id, uint32(image.Timeline), image.StartLSN, image.StopLSN)
	}
	if floor := h.Floor(image.Timeline); image.StartLSN < floor {
		return nil, &BelowFloorError{Series: id, SID: image.SID, Timeline: image.Timeline, Start: image.StartLSN, Floor: floor}
	}
	n := h.next()
	n.dropSession(image.SID)
	n.Images = append(n.Images, image)
	slices.SortFunc(n.Images, func(a, b ImageInfo) int { return cmp.Compare(a.SID, b.SID) })
	return n, nil
}

func (h *Head) dropSession(sids ...SID) {
	h.Sessions = slices.DeleteFunc(h.Sessions, func(s OpenSession) bool { return slices.Contains(sids, s.SID) })
}

// end drops sessions without an image: abort, and evict.
func (h *Head) end(sids ...SID) *Head {
	n := h.next()
	n.dropSession(sids...)
	if len(n.Sessions) == len(h.Sessions) {
		return nil
	}
	return n
}

// expire takes images out of the live set.
func (h *Head) expire(sids ...SID) *Head {
	n := h.next()
	n.Images = slices.DeleteFunc(n.Images, func(i ImageInfo) bool { return slices.Contains(sids, i.SID) })
	if len(n.Images) == len(h.Images) {
		return nil
	}
	return n
}

// raiseFloor allows WAL up to lsn to be deleted, but for what makes a live image consistent (needsWAL). The floor rises
// before anything is deleted, and commit refuses images that begin below it: so an image that becomes live has its WAL,
// however late its commit comes, and below the floor live images only ever become fewer.
func (h *Head) raiseFloor(id SeriesID, t postgres.Timeline, lsn postgres.LSN) (*Head, error) {
	if t == 0 {
		return nil, fmt.Errorf("WAL floor of %s: found timeline 0", id)
	}
	if lsn <= h.Floor(t) {
		return nil, nil
	}
	for i := range h.Sessions {
		// A restore may still need the WAL of an image that has expired since.
		if s := &h.Sessions[i]; s.Kind == SessionRestore && s.ParentTimeline == t && s.ParentStart < lsn {
			return nil, &FloorError{Series: id, Timeline: t, Wanted: lsn, Limit: s.ParentStart,
				Reason: fmt.Sprintf("restore session %s on %s needs WAL from there on", s.SID, s.Host)}
		}
	}
	n := h.next()
	n.WALFloor[t.String()] = lsn
	return n, nil
}

// needsWAL says who needs a segment of a timeline although it may lie below the floor: a live image that it makes
// consistent, or a restore that began from such an image, which may have expired since; "" if nobody does.
func (h *Head) needsWAL(t postgres.Timeline, number uint64, size postgres.SegmentSize) string {
	for i := range h.Images {
		if image := &h.Images[i]; image.Timeline == t && size.Number(image.StartLSN) <= number && number <= size.NumberBefore(image.StopLSN) {
			return "image " + image.SID.String()
		}
	}
	for i := range h.Sessions {
		if s := &h.Sessions[i]; s.Kind == SessionRestore && s.ParentTimeline == t && size.Number(s.ParentStart) <= number {
			return "restore session " + s.SID.String() + " on " + s.Host
		}
	}
	return ""
}

// check refuses a head that no sequence of transitions could have made.
func (h *Head) check(version uint64) error {
	if h.Version != version {
		return fmt.Errorf("found version %d, expected %d", h.Version, version)
	}
	if h.NextSID == 0 {
		return fmt.Errorf("found next session 0, expected 1 or above")
	}
	last := SID(0)
	for i := range h.Images {
		if s := h.Images[i].SID; s <= last || s >= h.NextSID {
			return fmt.Errorf("found image %s after %s, expected ascending numbers below %s", s, last, h.NextSID)
		}
		last = h.Images[i].SID
	}
	last = 0
	for i := range h.Sessions {
		s := h.Sessions[i].SID
		if s <= last || s >= h.NextSID || h.Sessions[i].Parent >= s || h.Image(s) != nil {
			return fmt.Errorf("found session %s after %s with parent %s, expected ascending numbers below %s", s, last, h.Sessions[i].Parent, h.NextSID)
		}
		last = s
	}
	return nil
}

// needed lists the images whose refs say what must be kept: the live ones, and the parents that running sessions pin.
func (h *Head) needed() []SID {
	var all []SID
	for i := range h.Images {
		all = append(all, h.Images[i].SID)
	}
	for i := range h.Sessions {
		if p := h.Sessions[i].Parent; p != 0 {
			all = append(all, p)
		}
	}
	slices.Sort(all)
	return slices.Compact(all)
}

// condemned decides whether an object below image/ is garbage, and with it that it will be garbage for ever (see the
// package comment). used holds every object that the refs of h.needed() name. It may be asked with any head that ever
// was the newest, however old: what was garbage then is garbage now.
func condemned(h *Head, used map[ObjectRef]struct{}, key imageKey) bool {
	switch {
	case key.sid >= h.NextSID:
		return false // a session that began after h
	case h.Session(key.sid) != nil:
		return false // being written
	case key.kind == 0:
		// Manifest and refs are needed as long as somebody may open the image or read what it refers to.
		return h.Image(key.sid) == nil && !h.pinned(key.sid)
	}
	_, ok := used[ObjectRef{SID: key.sid, Kind: key.kind, N: key.n}]
	return !ok
}
