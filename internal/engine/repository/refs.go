package repository

import (
	"context"
	"encoding/hex"
	"fmt"
	"slices"
)

// refs is the unencrypted table of contents of an image: every pack and map object that its maps refer to, its own and
// those of images before it. Collection, retention and keyless verification need nothing else, and a restore finds in
// it what it would otherwise have to fetch from each object's header.
type refs struct {
	SID      SID         `json:"sid"`
	Parent   SID         `json:"parent,omitempty"`
	Manifest refManifest `json:"manifest"`
	Keys     []refKey    `json:"keys"`
	Objects  []refObject `json:"objects"` // ascending
}

type refsDocument struct {
	Format int `json:"format"`
	*refs
}

type refManifest struct {
	Size   int64  `json:"size"`
	BLAKE3 string `json:"blake3"` // of the whole object
}

// refKey is a wrapped session key: one for each image whose objects are referred to.
type refKey struct {
	Suite suite  `json:"suite"`
	Blob  []byte `json:"blob,omitempty"` // age file, in base64
}

// refObject is one pack or map object.
type refObject struct {
	Object ObjectRef `json:"object"`
	Size   int64     `json:"size"`
	BLAKE3 string    `json:"blake3"`         // of the whole object
	Salt   string    `json:"salt,omitempty"` // 48 hexadecimal digits; absent in suite none
	Key    int       `json:"key"`            // index into Keys
}

// salt decodes Salt; check has seen that it can.
func (o *refObject) salt() (salt [saltSize]byte) {
	b, err := hex.DecodeString(o.Salt)
	if err == nil && len(b) == saltSize {
		copy(salt[:], b)
	}
	return salt
}

// object finds one object by binary search; nil if the image does not refer to it.
func (r *refs) object(o ObjectRef) *refObject {
	if i, ok := slices.BinarySearchFunc(r.Objects, o, func(e refObject, o ObjectRef) int { return compareObjects(e.Object, o) }); ok {
		return &r.Objects[i]
	}
	return nil
}

// covers tells whether a frame lies within an object that the image refers to.
func (r *refs) covers(f *FrameRef) error {
	o := r.object(f.Object)
	if o == nil {
		return fmt.Errorf("found a frame in %s, which refs do not name", f.Object)
	}
	if f.Stored < frameOverhead || int64(f.Offset)+int64(f.Stored) > o.Size {
		return fmt.Errorf("found frame %d of %s at %d of %d bytes, expected it within the object's %d", f.Frame, f.Object, f.Offset, f.Stored, o.Size)
	}
	return nil
}

// key returns the index of a wrapped key, adding it if it is new.
func (r *refs) key(k refKey) int {
	for i := range r.Keys {
		if r.Keys[i].Suite == k.Suite && string(r.Keys[i].Blob) == string(k.Blob) {
			return i
		}
	}
	r.Keys = append(r.Keys, k)
	return len(r.Keys) - 1
}

func (r *refs) check(sid SID) error {
	if r.SID != sid {
		return fmt.Errorf("found refs of image %s, expected %s", r.SID, sid)
	}
	for i := range r.Keys {
		if k := &r.Keys[i]; k.Suite > suiteAESGCM || (k.Suite == suiteNone) != (len(k.Blob) == 0) {
			return fmt.Errorf("key %d: found suite %d with a wrapped key of %d bytes", i, k.Suite, len(k.Blob))
		}
	}
	for i := range r.Objects {
		o := &r.Objects[i]
		switch {
		case o.Key < 0 || o.Key >= len(r.Keys):
			return fmt.Errorf("object %s: found key %d of %d", o.Object, o.Key, len(r.Keys))
		case o.Size <= 0 || o.Size > MaxPackSize:
			return fmt.Errorf("object %s: found %d bytes, expected up to %d", o.Object, o.Size, MaxPackSize)
		case !isDigest(o.BLAKE3, 32), r.Keys[o.Key].Suite == suiteNone && o.Salt != "", r.Keys[o.Key].Suite != suiteNone && !isDigest(o.Salt, saltSize):
			return fmt.Errorf("object %s: found BLAKE3 %q and salt %q", o.Object, o.BLAKE3, o.Salt)
		case i > 0 && compareObjects(r.Objects[i-1].Object, o.Object) >= 0:
			return fmt.Errorf("found object %s after %s, expected ascending ones", o.Object, r.Objects[i-1].Object)
		}
	}
	return nil
}

// isDigest tells whether s is n bytes in lower-case hexadecimal.
func isDigest(s string, n int) bool {
	b, err := hex.DecodeString(s)
	return err == nil && len(b) == n && hex.EncodeToString(b) == s
}

func (s *Series) readRefs(ctx context.Context, sid SID) (*refs, error) {
	r, _, err := s.readRefsChecksum(ctx, sid)
	return r, err
}

func (s *Series) readRefsChecksum(ctx context.Context, sid SID) (*refs, string, error) {
	d := refsDocument{refs: &refs{}}
	key := s.id.refsKey(sid)
	checksum, err := s.r.readDocument(ctx, key, &d)
	if err != nil {
		return nil, "", err
	}
	if err := d.check(sid); err != nil {
		return nil, "", &CorruptError{Repository: s.r.store.URL(), Key: key, Err: err}
	}
	return d.refs, checksum, nil
}
