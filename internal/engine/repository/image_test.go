package repository

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"filippo.io/age"

	"github.com/pgark/terraform-provider-pgark/internal/engine/objectstore"
	"github.com/pgark/terraform-provider-pgark/internal/engine/postgres"
)

// model is what an image must restore to: files by path.
type model map[string][]byte

const testSegment postgres.SegmentSize = 16 << 20

// guest is a writer of images with what it must keep locally: its last image's maps.
type guest struct {
	s       *Series
	options WriterOptions
	files   model
	parent  SID
	maps    map[string]*SegmentMap
	refs    map[string]*FrameRef // of maps in map objects

	segment func() uint64              // if set, the segment in which the next image starts and stops; it is put at the start
	finish  func(sid SID, files model) // if set, told what the image is to restore to before it can become live
}

// backUp takes an image of g.files: blocks that equal the parent's are kept, others written.
func (g *guest) backUp(ctx context.Context, rnd *rand.Rand, before model) (SID, error) {
	kind := "incremental"
	if g.parent == 0 {
		kind = "full"
	}
	sid, err := g.s.Begin(ctx, OpenSession{Kind: SessionImage, Parent: g.parent, Host: "db1"})
	if err != nil {
		return 0, err
	}
	start := postgres.LSN(sid) << 24
	if g.segment != nil {
		start = postgres.LSN(g.segment()) << 24
		name := string(postgres.SegmentAt(1, start, testSegment))
		if _, _, err := g.s.PutWAL(ctx, WALInfo{Name: name, Size: int64(len(name))}, strings.NewReader(name)); err != nil {
			return sid, err
		}
	}
	w, err := g.s.NewImageWriter(ctx, sid, g.parent, g.options)
	if err != nil {
		return sid, err
	}
	defer w.Close()
	m := &Manifest{SID: sid, SystemID: g.s.id.SystemID, BackupLabel: "START WAL LOCATION", Volumes: []Volume{{Role: "data", Path: "/data"}}}
	m.Files = append(m.Files, File{Path: ".", Type: Directory, Mode: 0o700})
	maps, mapRefs := map[string]*SegmentMap{}, map[string]*FrameRef{}
	for _, path := range sorted(g.files) {
		content := g.files[path]
		f := File{Path: path, Type: RegularFile, Size: int64(len(content))}
		if len(content) > 0 {
			old := g.maps[path]
			if old != nil && g.refs[path] != nil && bytes.Equal(content, before[path]) {
				f.Map, f.MapObjects = g.refs[path], old.Objects()
				maps[path], mapRefs[path] = old, f.Map
			} else {
				sm, err := writeFile(ctx, w, content, before[path], old)
				if err != nil {
					return sid, err
				}
				if rnd.IntN(2) == 0 {
					f.Inline = sm
				} else {
					ref, err := w.WriteMap(ctx, sm)
					if err != nil {
						return sid, err
					}
					f.Map = &ref
					if rnd.IntN(2) == 0 {
						f.MapObjects = sm.Objects()
					}
				}
				maps[path], mapRefs[path] = sm, f.Map
			}
		}
		m.Files = append(m.Files, f)
	}
	manifest, refs, err := w.Finish(ctx, m)
	if err != nil {
		return sid, err
	}
	if g.finish != nil {
		g.finish(sid, g.files)
	}
	err = g.s.Commit(ctx, ImageInfo{
		SID: sid, Kind: kind, Parent: g.parent, Timeline: 1, StartLSN: start, StopLSN: start + 1,
		ManifestDigest: manifest, RefsDigest: refs, StoredBytes: w.StoredBytes(),
	})
	if err != nil {
		return sid, err
	}
	g.parent, g.maps, g.refs = sid, maps, mapRefs
	return sid, nil
}

// writeFile writes the pages that differ from the parent's, up to 32 in a frame.
func writeFile(ctx context.Context, w *ImageWriter, content, before []byte, old *SegmentMap) (*SegmentMap, error) {
	const page = postgres.PageSize
	sm := &SegmentMap{BlockSize: page, Blocks: uint32((len(content) + page - 1) / page)}
	at := func(b []byte, n int) []byte {
		if n*page >= len(b) {
			return nil
		}
		return b[n*page : min((n+1)*page, len(b))]
	}
	where := map[int]Run{}
	if old != nil {
		for _, r := range old.Runs {
			for i := range r.Count {
				where[int(r.Start+i)] = Run{Frame: r.Frame, First: r.First + uint16(i)}
			}
		}
	}
	frame := map[FrameRef]uint32{}
	index := func(f FrameRef) uint32 {
		i, ok := frame[f]
		if !ok {
			i = uint32(len(sm.Frames))
			frame[f] = i
			sm.Frames = append(sm.Frames, f)
		}
		return i
	}
	for n := 0; n < int(sm.Blocks); {
		if r, ok := where[n]; ok && bytes.Equal(at(content, n), at(before, n)) {
			sm.Runs = append(sm.Runs, Run{Start: uint32(n), Count: 1, Frame: index(old.Frames[r.Frame]), First: r.First})
			n++
			continue
		}
		var raw []byte
		start := n
		for ; n < int(sm.Blocks) && n-start < 32; n++ {
			if _, ok := where[n]; ok && bytes.Equal(at(content, n), at(before, n)) {
				break
			}
			raw = append(raw, at(content, n)...)
			raw = append(raw, make([]byte, (n-start+1)*page-len(raw))...)
		}
		f, err := w.WriteFrame(ctx, raw)
		if err != nil {
			return nil, err
		}
		sm.Runs = append(sm.Runs, Run{Start: uint32(start), Count: uint32(n - start), Frame: index(f)})
	}
	return sm, nil
}

func sorted(m model) []string { return slices.Sorted(maps.Keys(m)) }

// restore reads an image back, without pinning it.
func restore(ctx context.Context, s *Series, sid SID) (model, error) {
	i, err := s.OpenImage(ctx, sid)
	if err != nil {
		return nil, err
	}
	out := model{}
	for n := range i.Manifest().Files {
		f := &i.Manifest().Files[n]
		if f.Type != RegularFile {
			continue
		}
		sm, err := i.FileMap(ctx, f)
		if err != nil {
			return nil, err
		}
		content := make([]byte, int(sm.Blocks)*int(sm.BlockSize))
		runs := map[FrameRef][]Run{}
		for _, r := range sm.Runs {
			runs[sm.Frames[r.Frame]] = append(runs[sm.Frames[r.Frame]], r)
		}
		err = i.ReadFrames(ctx, sm.Frames, func(f FrameRef, raw []byte) error {
			for _, r := range runs[f] {
				from := int(r.First) * int(sm.BlockSize)
				copy(content[int(r.Start)*int(sm.BlockSize):], raw[from:min(len(raw), from+int(r.Count)*int(sm.BlockSize))])
			}
			return nil
		})
		if err != nil {
			return nil, err
		}
		out[f.Path] = content[:f.Size]
	}
	return out, nil
}

func diff(want, got model) error {
	if len(want) != len(got) {
		return fmt.Errorf("found %d files, expected %d", len(got), len(want))
	}
	for p := range want {
		if !bytes.Equal(want[p], got[p]) {
			return fmt.Errorf("file %s differs (%d bytes, expected %d)", p, len(got[p]), len(want[p]))
		}
	}
	return nil
}

// change makes the next state of the files: pages rewritten, files grown, cut, made and removed.
func (m model) change(rnd *rand.Rand) model {
	next := model{}
	for _, p := range sorted(m) {
		b := bytes.Clone(m[p])
		switch {
		case rnd.IntN(8) == 0:
			continue
		case rnd.IntN(4) == 0:
			b = b[:rnd.IntN(len(b)+1)]
		case rnd.IntN(3) > 0 && len(b) > 0:
			for range 1 + rnd.IntN(5) {
				b[rnd.IntN(len(b))] ^= byte(1 + rnd.IntN(255))
			}
		}
		next[p] = b
	}
	for range rnd.IntN(3) {
		next[fmt.Sprintf("base/%d", rnd.IntN(20))] = compressible(rnd.Uint64(), rnd.IntN(40*postgres.PageSize))
	}
	return next
}

func TestImage_everyImageOfAChainRestores(t *testing.T) {
	ctx := t.Context()
	suites(t, func(t *testing.T, recipients []string, identities []age.Identity) {
		rnd := rand.New(rand.NewPCG(3, 4))
		s := newSeries(t, directory(t), recipients, identities)
		g := &guest{s: s, options: WriterOptions{PackSize: 128 << 10}, files: model{"base/1": compressible(1, 3<<20), "PG_VERSION": []byte("15\n"), "empty": nil}}
		states := map[SID]model{}
		before := model{}
		for range 8 {
			sid, err := g.backUp(ctx, rnd, before)
			if err != nil {
				t.Fatal(err)
			}
			states[sid] = g.files
			before, g.files = g.files, g.files.change(rnd)
		}
		check := func() {
			t.Helper()
			h, err := s.Head(ctx)
			if err != nil {
				t.Fatal(err)
			}
			for _, image := range h.Images {
				got, err := restore(ctx, s, image.SID)
				if err == nil {
					err = diff(states[image.SID], got)
				}
				if err != nil {
					t.Fatalf("image %s: %v", image.SID, err)
				}
			}
		}
		check()

		// Any image can go without touching another.
		for _, sid := range []SID{1, 4, 5} {
			if err := s.Expire(ctx, sid); err != nil {
				t.Fatal(err)
			}
			would, err := s.Collect(ctx, true)
			if err != nil {
				t.Fatal(err)
			}
			did, err := s.Collect(ctx, false)
			if err != nil || did != would || did.Objects < 2 {
				t.Fatalf("collected %+v, %v; announced %+v", did, err, would)
			}
			if _, err := s.OpenImage(ctx, sid); err == nil {
				t.Fatal("an expired image opened")
			}
			check()
		}
		versions := 0
		for h, err := range s.History(ctx) {
			if err != nil {
				t.Fatal(err)
			}
			versions++
			if h.Version != uint64(versions) {
				t.Fatalf("version %d after %d", h.Version, versions-1)
			}
		}
		if versions != 8*2+3 {
			t.Errorf("found %d versions", versions)
		}
	})
}

func TestImage_concurrentFramesOfAllSizes(t *testing.T) {
	ctx := t.Context()
	suites(t, func(t *testing.T, recipients []string, identities []age.Identity) {
		s := newSeries(t, directory(t), recipients, identities)
		sid, err := s.Begin(ctx, OpenSession{Kind: SessionImage})
		if err != nil {
			t.Fatal(err)
		}
		w, err := s.NewImageWriter(ctx, sid, 0, WriterOptions{PackSize: 1 << 20, Uploads: 3})
		if err != nil {
			t.Fatal(err)
		}
		defer w.Close()
		var mu sync.Mutex // guards want
		want := map[FrameRef][]byte{}
		var writers sync.WaitGroup
		for g := range 4 {
			writers.Go(func() {
				rnd := rand.New(rand.NewPCG(uint64(g), 7))
				for n := range 60 {
					size := []int{1, 2, 8191, 8192, 8193, MaxFrame - 1, MaxFrame, 1 + rnd.IntN(MaxFrame)}[n%8]
					raw := compressible(rnd.Uint64(), size)
					if n%5 == 0 {
						for i := range raw {
							raw[i] = byte(rnd.Uint32()) // does not compress
						}
					}
					f, err := w.WriteFrame(ctx, raw)
					if err != nil {
						t.Error(err)
						return
					}
					mu.Lock()
					want[f] = raw
					mu.Unlock()
				}
			})
		}
		writers.Wait()
		sm := &SegmentMap{BlockSize: 1}
		for f := range want {
			sm.Runs = append(sm.Runs, Run{Start: sm.Blocks, Count: 1, Frame: uint32(len(sm.Frames))})
			sm.Frames = append(sm.Frames, f)
			sm.Blocks++
		}
		manifest, refs, err := w.Finish(ctx, &Manifest{SID: sid, SystemID: testSystem, Volumes: []Volume{{}}, Files: []File{{Path: "f", Type: RegularFile, Size: int64(sm.Blocks), Inline: sm}}})
		if err != nil {
			t.Fatal(err)
		}
		if _, err := w.WriteFrame(ctx, []byte("late")); !errors.Is(err, ErrClosed) {
			t.Errorf("after Finish: %v", err)
		}
		if err := s.Commit(ctx, ImageInfo{SID: sid, Timeline: 1, ManifestDigest: manifest, RefsDigest: refs}); err != nil {
			t.Fatal(err)
		}
		image, err := s.OpenImage(ctx, sid)
		if err != nil {
			t.Fatal(err)
		}
		// Each twice, and in any order.
		asked := append(append([]FrameRef{}, sm.Frames...), sm.Frames...)
		rand.Shuffle(len(asked), func(a, b int) { asked[a], asked[b] = asked[b], asked[a] })
		seen := map[FrameRef]int{}
		err = image.ReadFrames(ctx, asked, func(f FrameRef, raw []byte) error {
			if !bytes.Equal(raw, want[f]) {
				return fmt.Errorf("frame %+v differs", f)
			}
			seen[f]++
			return nil
		})
		if err != nil || len(seen) != len(want) {
			t.Fatalf("%d frames, %v", len(seen), err)
		}
		for f, n := range seen {
			if n != 2 {
				t.Errorf("frame %+v came %d times", f, n)
			}
		}

		stop := errors.New("enough")
		if err := image.ReadFrames(ctx, asked, func(FrameRef, []byte) error { return stop }); !errors.Is(err, stop) {
			t.Errorf("got %v", err)
		}
		cancelled, cancel := context.WithCancelCause(ctx)
		if err := image.ReadFrames(cancelled, asked, func(FrameRef, []byte) error { cancel(stop); return nil }); !errors.Is(err, stop) {
			t.Errorf("got %v", err)
		}

		// Whoever holds no identity sees all that listing needs, and nothing else.
		if len(recipients) > 0 {
			keyless, err := Open(ctx, s.r.store)
			if err != nil {
				t.Fatal(err)
			}
			if h, err := keyless.Series(testSeries).Head(ctx); err != nil || len(h.Images) != 1 {
				t.Errorf("head %+v, %v", h, err)
			}
			_, err = keyless.Series(testSeries).OpenImage(ctx, sid)
			if _, ok := errors.AsType[*NoIdentityError](err); !ok {
				t.Errorf("opened without identity: %v", err)
			}
		}
	})
}

// failingStore fails what predicate names.
type failingStore struct {
	objectstore.Store
	fail func(op, key string) error
}

func (f *failingStore) Create(ctx context.Context, key string, body io.ReadSeeker, size int64) error {
	if err := f.fail("create", key); err != nil {
		return err
	}
	return f.Store.Create(ctx, key, body, size)
}

func TestImageWriter_isDeadAfterAnError(t *testing.T) {
	ctx := t.Context()
	broken := errors.New("broken")
	store := &failingStore{Store: directory(t), fail: func(string, string) error { return nil }}
	s := newSeries(t, store, nil, nil)
	sid, err := s.Begin(ctx, OpenSession{Kind: SessionImage})
	if err != nil {
		t.Fatal(err)
	}
	w, err := s.NewImageWriter(ctx, sid, 0, WriterOptions{PackSize: 64 << 10})
	if err != nil {
		t.Fatal(err)
	}
	store.fail = func(_, key string) error {
		if bytes.Contains([]byte(key), []byte("/pack/00000002")) {
			return broken
		}
		return nil
	}
	deadline := time.Now().Add(10 * time.Second)
	for n := uint64(0); ; n++ {
		if _, err = w.WriteFrame(ctx, compressible(n, 60<<10)); err != nil {
			break
		}
		if time.Now().After(deadline) {
			t.Fatal("goes on")
		}
	}
	if !errors.Is(err, broken) {
		t.Errorf("got %v", err)
	}
	if _, _, err := w.Finish(ctx, &Manifest{SID: sid, SystemID: testSystem}); !errors.Is(err, broken) {
		t.Errorf("finish: %v", err)
	}
	if err := w.Close(); err != nil {
		t.Error(err)
	}
	if _, err := store.Stat(ctx, s.id.refsKey(sid)); !errors.Is(err, objectstore.ErrNotExist) {
		t.Errorf("refs of an unfinished image: %v", err)
	}
}

func TestImageWriter_refusesWhatOthersWrote(t *testing.T) {
	ctx := t.Context()
	rnd := rand.New(rand.NewPCG(1, 1))
	s := newSeries(t, directory(t), nil, nil)
	g := &guest{s: s, files: model{"a": compressible(1, 100<<10)}}
	first, err := g.backUp(ctx, rnd, nil)
	if err != nil {
		t.Fatal(err)
	}
	foreign := *g.maps["a"]

	// A second image that does not have the first as its parent may not refer to it: nothing pins it.
	sid, err := s.Begin(ctx, OpenSession{Kind: SessionImage})
	if err != nil {
		t.Fatal(err)
	}
	for what, f := range map[string]File{
		"an inline map":             {Path: "a", Type: RegularFile, Size: 100 << 10, Inline: &foreign},
		"a map":                     {Path: "a", Type: RegularFile, Size: 100 << 10, Map: &FrameRef{Object: ObjectRef{SID: first, Kind: MapObject}, Stored: 50, Raw: 20}, MapObjects: foreign.Objects()},
		"a path outside":            {Path: "../a", Type: RegularFile},
		"a file larger than mapped": {Path: "a", Type: RegularFile, Size: 1},
	} {
		w, err := s.NewImageWriter(ctx, sid, 0, WriterOptions{})
		if err != nil {
			t.Fatal(err)
		}
		if _, _, err := w.Finish(ctx, &Manifest{SID: sid, SystemID: testSystem, Volumes: []Volume{{}}, Files: []File{f}}); err == nil {
			t.Errorf("%s: finished", what)
		}
		if err := w.Close(); err != nil {
			t.Error(err)
		}
	}
}
