package image

import (
	"errors"
	"fmt"
	"os"
	"reflect"
	"testing"

	"github.com/pgark/terraform-provider-pgark/internal/engine/repository"
)

func sampleStates() []*fileState {
	frame := func(sid repository.SID, n uint32) repository.FrameRef {
		return repository.FrameRef{Object: repository.ObjectRef{SID: sid, Kind: repository.PackObject, N: n}, Frame: n, Offset: 100 + n, Stored: 5000, Raw: 2 * relationBlock}
	}
	relation := &repository.SegmentMap{
		BlockSize: relationBlock, Blocks: 3, Frames: []repository.FrameRef{frame(4, 0), frame(9, 7)},
		Runs: []repository.Run{{Start: 0, Count: 2, Frame: 0}, {Start: 2, Count: 1, Frame: 1, First: 1}},
	}
	at := repository.FrameRef{Object: repository.ObjectRef{SID: 9, Kind: repository.MapObject, N: 3}, Frame: 2, Offset: 77, Stored: 60, Raw: 50}
	return []*fileState{
		{Volume: "data", Path: "empty", BlockSize: plainBlock, Hashes: []byte{}},
		{
			Volume: "tablespace:16385", Path: "PG_15_202209061/5/16390", BlockSize: relationBlock, Size: 2*relationBlock + 1, Hashes: make([]byte, 48),
			Identity: fileIdentity{8, 1, 12345, -1, 3 * relationBlock, 1700000000000000001, 1700000000000000002},
			Corrupt:  []uint32{0, 2}, Excused: []uint32{1}, Map: relation,
		},
		{
			Volume: "data", Path: "odd\n\xff", BlockSize: relationBlock, Size: 3 * relationBlock, Hashes: make([]byte, 48), Map: relation, MapRef: &at,
			MapObjects: relation.Objects(),
		},
	}
}

func writeState(t testing.TB, dir string, files []*fileState) {
	t.Helper()
	w, err := createState(dir, stateHeader{Series: "a/b/1", SID: 9, HashKey: testKey})
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range files {
		if err := w.add(f); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.finish(); err != nil {
		t.Fatal(err)
	}
}

func TestState_roundTrip(t *testing.T) {
	dir := t.TempDir()
	files := sampleStates()
	writeState(t, dir, files)
	s, err := openState(dir, "a/b/1", 9)
	if err != nil {
		t.Fatal(err)
	}
	defer s.close()
	for _, want := range files {
		got, encoded, err := s.lookup(want.Volume, want.Path)
		if err != nil {
			t.Fatal(err)
		}
		if !reflect.DeepEqual(got, want) {
			t.Errorf("%q:\nfound    %+v\nexpected %+v", want.Path, got, want)
		}
		if b, _ := want.marshal(); string(b) != string(encoded) {
			t.Errorf("%q: found other bytes than were written", want.Path)
		}
	}
	if f, _, err := s.lookup("data", "absent"); f != nil || err != nil {
		t.Errorf("absent file: %v, %v", f, err)
	}
	for _, other := range []struct {
		series string
		sid    repository.SID
	}{{"a/b/2", 9}, {"a/b/1", 8}} {
		if err := os.Rename(stateName(dir, 9), stateName(dir, other.sid)); err != nil {
			t.Fatal(err)
		}
		if s, err := openState(dir, other.series, other.sid); err == nil {
			_ = s.close()
			t.Errorf("opened the state of image 9 of a/b/1 as that of %d of %s", other.sid, other.series)
		}
		if err := os.Rename(stateName(dir, other.sid), stateName(dir, 9)); err != nil {
			t.Fatal(err)
		}
	}
}

// Every single flipped byte and every length that a file can be cut to is noticed.
func TestState_damage(t *testing.T) {
	dir := t.TempDir()
	writeState(t, dir, sampleStates())
	name := stateName(dir, 9)
	whole, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	open := func(b []byte, what string) {
		t.Helper()
		if err := os.WriteFile(name, b, 0o600); err != nil {
			t.Fatal(err)
		}
		if s, err := openState(dir, "a/b/1", 9); err == nil {
			_ = s.close()
			t.Errorf("%s: opened", what)
		} else if errors.Is(err, os.ErrNotExist) {
			t.Fatal(err)
		}
	}
	for i := range whole {
		b := append([]byte(nil), whole...)
		b[i] ^= 0x10
		open(b, fmt.Sprintf("byte %d flipped", i))
		open(whole[:i], fmt.Sprintf("cut to %d bytes", i))
	}
	// A record that changes after the state was opened.
	if err := os.WriteFile(name, whole, 0o600); err != nil {
		t.Fatal(err)
	}
	s, err := openState(dir, "a/b/1", 9)
	if err != nil {
		t.Fatal(err)
	}
	defer s.close()
	place := s.index[fileKey{"data", "empty"}]
	f, err := os.OpenFile(name, os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := f.WriteAt([]byte{0xaa}, place.offset+9); err != nil {
		t.Fatal(err)
	}
	if f, _, err := s.lookup("data", "empty"); f != nil || !errors.Is(err, errStateRecord) {
		t.Errorf("damaged record: %v, %v", f, err)
	}
}

func FuzzFileState(f *testing.F) {
	for _, s := range sampleStates() {
		b, err := s.marshal()
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		var s fileState
		if s.unmarshal(b) != nil {
			return
		}
		again, err := s.marshal()
		if err != nil {
			t.Fatalf("decoded, but not encoded: %v", err)
		}
		var s2 fileState
		if err := s2.unmarshal(again); err != nil || !reflect.DeepEqual(s, s2) {
			t.Fatalf("found %+v (%v), expected %+v", s2, err, s)
		}
	})
}
