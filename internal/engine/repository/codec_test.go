package repository

import (
	"bytes"
	"encoding/json"
	"errors"
	"io"
	"math"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"testing/iotest"
	"time"

	"pgregory.net/rapid"

	"github.com/pgark/terraform-provider-pgark/internal/engine/postgres"
)

// drawMap makes a valid segment map.
func drawMap(t *rapid.T) *SegmentMap {
	m := &SegmentMap{BlockSize: rapid.SampledFrom([]uint32{1, postgres.PageSize, MaxFrame}).Draw(t, "block size")}
	for range rapid.IntRange(0, 20).Draw(t, "frames") {
		raw := rapid.Uint32Range(1, MaxFrame).Draw(t, "raw")
		stored := rapid.Uint32Range(1, raw).Draw(t, "stored") + frameOverhead
		m.Frames = append(m.Frames, FrameRef{
			Object: ObjectRef{SID: SID(rapid.Uint64Range(1, math.MaxUint64).Draw(t, "sid")), Kind: PackObject, N: rapid.Uint32().Draw(t, "n")},
			Frame:  rapid.Uint32Range(0, maxFramesInObject-1).Draw(t, "frame"), Offset: rapid.Uint32Range(0, MaxPackSize-stored).Draw(t, "offset"), Stored: stored, Raw: raw,
		})
		if n := len(m.Frames); n > 1 && rapid.Bool().Draw(t, "same pack") {
			m.Frames[n-1].Object = m.Frames[n-2].Object
		}
	}
	if len(m.Frames) == 0 {
		return m
	}
	for range rapid.IntRange(0, 20).Draw(t, "runs") {
		frame := rapid.IntRange(0, len(m.Frames)-1).Draw(t, "frame of run")
		blocks := (m.Frames[frame].Raw + m.BlockSize - 1) / m.BlockSize
		first := rapid.Uint32Range(0, min(blocks-1, math.MaxUint16)).Draw(t, "first")
		count := rapid.Uint32Range(1, blocks-first).Draw(t, "count")
		m.Runs = append(m.Runs, Run{Start: m.Blocks, Count: count, Frame: uint32(frame), First: uint16(first)})
		m.Blocks += count
	}
	return m
}

func TestSegmentMap_roundTrip(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		m := drawMap(t)
		b, err := m.MarshalBinary()
		if err != nil {
			t.Fatal(err)
		}
		var got SegmentMap
		if err := got.UnmarshalBinary(b); err != nil || !reflect.DeepEqual(*m, got) {
			t.Fatalf("got %+v, %v; want %+v", got, err, m)
		}
		// No prefix is a map, nor is anything longer.
		for n := range b {
			if new(SegmentMap).UnmarshalBinary(b[:n]) == nil {
				t.Fatalf("a map cut to %d of %d bytes was read", n, len(b))
			}
		}
		if new(SegmentMap).UnmarshalBinary(append(b, 0)) == nil {
			t.Fatal("a map with a byte more was read")
		}
	})
}

func TestSegmentMap_refuses(t *testing.T) {
	frame := FrameRef{Object: ObjectRef{SID: 1, Kind: PackObject}, Stored: 100, Raw: 2 * postgres.PageSize}
	for what, m := range map[string]SegmentMap{
		"no block size":                 {},
		"a huge block size":             {BlockSize: MaxFrame + 1},
		"blocks without runs":           {BlockSize: 8192, Blocks: 1},
		"a frame that does not exist":   {BlockSize: 8192, Blocks: 1, Runs: []Run{{Count: 1}}},
		"a gap":                         {BlockSize: 8192, Blocks: 2, Frames: []FrameRef{frame}, Runs: []Run{{Start: 1, Count: 1}}},
		"an overlap":                    {BlockSize: 8192, Blocks: 2, Frames: []FrameRef{frame}, Runs: []Run{{Count: 1}, {Count: 1}}},
		"more runs than blocks":         {BlockSize: 8192, Blocks: 1, Frames: []FrameRef{frame}, Runs: []Run{{Count: 2}}},
		"blocks after the frame's end":  {BlockSize: 8192, Blocks: 1, Frames: []FrameRef{frame}, Runs: []Run{{Count: 1, First: 2}}},
		"a count that wraps around":     {BlockSize: 8192, Blocks: 1, Frames: []FrameRef{frame}, Runs: []Run{{Count: math.MaxUint32}}},
		"a frame in a map object":       {BlockSize: 8192, Frames: []FrameRef{{Object: ObjectRef{SID: 1, Kind: MapObject}, Stored: 100, Raw: 100}}},
		"a frame of no image":           {BlockSize: 8192, Frames: []FrameRef{{Object: ObjectRef{Kind: PackObject}, Stored: 100, Raw: 100}}},
		"a frame that was not filled":   {BlockSize: 8192, Frames: []FrameRef{{}}},
		"a frame beyond a pack's bound": {BlockSize: 8192, Frames: []FrameRef{{Object: frame.Object, Offset: MaxPackSize, Stored: 100, Raw: 100}}},
	} {
		if _, err := m.MarshalBinary(); err == nil {
			t.Errorf("%s: encoded", what)
		}
	}
}

func TestFrame_roundTrip(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		raw := rapid.SliceOfN(rapid.ByteRange(0, 3), 0, 5000).Draw(t, "raw")
		session := &sessionKey{suite: suite(rapid.IntRange(0, 1).Draw(t, "suite")), secret: make([]byte, sessionKeyLen)}
		c, err := session.cipherFor("key", walContainer, [saltSize]byte{}, nil)
		if err != nil {
			t.Fatal(err)
		}
		number := rapid.Uint32().Draw(t, "number")
		frame := appendFrame([]byte("before"), raw, flagLast, 7, rapid.SampledFrom([]Effort{uncompressed, Thorough, Hasty}).Draw(t, "effort"))[6:]
		c.seal(number, frame)
		var scratch []byte
		got, h, err := openFrame(c, walContainer, number, frame, nil, &scratch)
		if err != nil || !bytes.Equal(got, raw) || h.items != 7 || h.flags != flagLast {
			t.Fatalf("%v, %+v", err, h)
		}
	})
}

func TestManifest_roundTrip(t *testing.T) {
	session := &sessionKey{suite: suiteNone}
	name := rapid.OneOf(rapid.String(), rapid.Map(rapid.SliceOfN(rapid.Byte(), 1, 20), func(b []byte) string { return string(b) }))
	element := name.Filter(func(s string) bool {
		return s != "" && s != "." && s != ".." && !strings.ContainsAny(s, "/\x00")
	})
	rapid.Check(t, func(t *rapid.T) {
		m := &Manifest{
			SID: SID(rapid.Uint64().Draw(t, "sid")), SystemID: postgres.SystemID(rapid.Uint64().Draw(t, "system")), PostgresVersion: 180000, DataChecksums: rapid.Bool().Draw(t, "checksums"),
			BackupLabel: name.Draw(t, "label"), TablespaceMap: name.Draw(t, "tablespace map"), DataDirectory: name.Draw(t, "data directory"), Host: "db1",
			Volumes: []Volume{{Role: "data", Path: name.Draw(t, "path"), Device: name.Draw(t, "device")}, {Role: "tablespace", OID: 16385, UsedBytes: 7}},
		}
		for range rapid.IntRange(0, 8).Draw(t, "files") {
			f := File{
				Volume: rapid.IntRange(0, 1).Draw(t, "volume"), Path: element.Draw(t, "file"), Type: FileType(rapid.IntRange(1, 3).Draw(t, "type")),
				Mode: rapid.Uint32().Draw(t, "mode"), Owner: name.Draw(t, "owner"), ModTime: rapid.Int64().Draw(t, "time"),
			}
			switch f.Type {
			case Symlink:
				f.Link = name.Draw(t, "link")
			case RegularFile:
				if sm := drawMap(t); sm.Blocks > 0 {
					f.Size = int64(sm.Blocks) * int64(sm.BlockSize)
					if f.Inline = sm; rapid.Bool().Draw(t, "map object") {
						f.Inline, f.Map, f.MapObjects = nil, &FrameRef{Object: ObjectRef{SID: 3, Kind: MapObject, N: 4}, Frame: 5, Offset: 6, Stored: 7, Raw: 8}, sm.Objects()
					}
				}
			}
			m.Files = append(m.Files, f)
		}
		b, err := encodeManifest("key", m, session, [saltSize]byte{})
		if err != nil {
			t.Fatal(err)
		}
		r := &Repository{store: newMemoryStore()}
		got, err := r.readManifest(iotest.OneByteReader(bytes.NewReader(b)), "key")
		if err != nil || !reflect.DeepEqual(m, got) {
			t.Fatalf("%v: got %+v, want %+v", err, got, m)
		}
	})
}

// TestManifest_ofManyFiles spans several frames.
func TestManifest_ofManyFiles(t *testing.T) {
	m := &Manifest{SID: 1, Volumes: []Volume{{Role: "data"}}}
	for n := range 30000 {
		m.Files = append(m.Files, File{Path: "base/" + ObjectRef{SID: SID(n)}.String(), Type: RegularFile})
	}
	b, err := encodeManifest("key", m, &sessionKey{suite: suiteNone}, [saltSize]byte{})
	if err != nil {
		t.Fatal(err)
	}
	r := &Repository{store: newMemoryStore()}
	got, err := r.readManifest(bytes.NewReader(b), "key")
	if err != nil || !reflect.DeepEqual(m, got) {
		t.Fatalf("%d files, %v", len(got.Files), err)
	}
}

func TestDocument_roundTrip(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		h := &Head{Version: rapid.Uint64().Draw(t, "version"), NextSID: SID(rapid.Uint64().Draw(t, "next")), WALFloor: map[string]postgres.LSN{"00000001": postgres.LSN(rapid.Uint64().Draw(t, "floor"))}}
		h.Change = Change{Op: rapid.String().Draw(t, "op"), At: time.Unix(rapid.Int64Range(0, 1<<33).Draw(t, "at"), 1000).UTC()}
		h.Images = []ImageInfo{{SID: 3, Kind: rapid.String().Draw(t, "kind"), StartLSN: 7}}
		h.Sessions = []OpenSession{{SID: 4, Host: rapid.String().Draw(t, "host")}}
		key := rapid.String().Draw(t, "key")
		b, checksum, err := encodeDocument(key, headDocument{Format: Format, Head: h})
		if err != nil {
			t.Fatal(err)
		}
		got := headDocument{Head: &Head{}}
		there, err := decodeDocument(key, b, &got)
		if err != nil || there != checksum {
			t.Fatal(err)
		}
		want, _ := json.Marshal(h)
		have, _ := json.Marshal(got.Head)
		if !bytes.Equal(want, have) {
			t.Fatalf("got %s, want %s", have, want)
		}
		if _, err := decodeDocument(key+"x", b, &got); err == nil {
			t.Fatal("read under another key")
		}
		if b[len(b)-1] != '\n' || bytes.Count(b, []byte("\n")) != 1 || !json.Valid(b) {
			t.Fatalf("not one line of JSON: %q", b)
		}
	})
}

func TestNames_roundTrip(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		o := ObjectRef{SID: SID(rapid.Uint64().Draw(t, "sid")), Kind: ObjectKind(rapid.IntRange(1, 2).Draw(t, "kind")), N: rapid.Uint32().Draw(t, "n")}
		var got ObjectRef
		if err := got.UnmarshalText([]byte(o.String())); err != nil || got != o {
			t.Fatalf("%s: %v, %v", o, got, err)
		}
		v := rapid.Uint64Range(1, math.MaxUint64).Draw(t, "version")
		if got, ok := testSeries.parseHeadKey(testSeries.headKey(v)); !ok || got != v {
			t.Fatalf("head %d: %d", v, got)
		}
		if got, ok := parseOwnerKey("orders", ownerKey("orders", v)); !ok || got != v {
			t.Fatalf("owner %d: %d", v, got)
		}
		sid := SID(v)
		if got, err := ParseSID(sid.String()); err != nil || got != sid {
			t.Fatalf("%s: %v, %v", sid, got, err)
		}
	})
	if id, err := ParseSeriesID(testSeries.String()); err != nil || id != testSeries {
		t.Errorf("%v, %v", id, err)
	}
	for _, s := range []string{"", "a/b", "a/b/c", "a//5", "/b/5", "a/owner/5", "../b/5", "a/b/5/6", "a b/c/5", "a/b/-5", "a/b/05", "repository.json/b/5"} {
		if id, err := ParseSeriesID(s); err == nil {
			t.Errorf("%q was read as %v", s, id)
		}
	}
	for _, s := range []string{"", "1/pack", "0000000000000001/pack/0", "0000000000000001/pack/0000000G", "0000000000000001/refs/00000000", "000000000000000A/pack/00000000", "x"} {
		if k, ok := parseImageKey(s); ok {
			t.Errorf("%q was read as %+v", s, k)
		}
	}
}

// seeds adds the golden files whose key contains part.
func seeds(f *testing.F, part string) {
	f.Helper()
	err := filepath.WalkDir(filepath.Join("testdata", "v1"), func(path string, d os.DirEntry, err error) error {
		if err != nil || d.IsDir() || !strings.Contains(filepath.ToSlash(path), part) {
			return err
		}
		b, err := os.ReadFile(path)
		if err == nil {
			f.Add(b)
		}
		return err
	})
	if err != nil {
		f.Fatal(err)
	}
}

// FuzzContainer reads anything as each kind of container: nothing may be read without bounds, nor panic.
func FuzzContainer(f *testing.F) {
	for _, part := range []string{"/pack/", "/map/", "/manifest", "/wal/"} {
		seeds(f, part)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		r := &Repository{store: newMemoryStore()}
		for kind := packContainer; kind <= walContainer; kind++ {
			h, err := readHeader(bytes.NewReader(b), "key", kind)
			if err != nil {
				continue
			}
			if got := h.append(nil, "key"); !bytes.Equal(got, b[:len(got)]) {
				t.Fatal("a header was read that is written otherwise")
			}
		}
		_, _, _ = r.packDirectory("key", PackObject, b)
		_, _ = r.readManifest(bytes.NewReader(b), "key")
	})
}

// FuzzFrames seals what the fuzzer makes, so that the decoders behind the tag are reached.
func FuzzFrames(f *testing.F) {
	f.Add([]byte(`{"sid":"0000000000000001","volumes":[{"role":"data","path":"/"}]}`), []byte(`{"v":0,"p":"a","t":1,"m":384,"u":0,"g":0}`+"\n"), uint32(1), byte(codecRaw))
	f.Add([]byte(`{}`), []byte{}, uint32(0), byte(codecZstd))
	f.Fuzz(func(t *testing.T, first, second []byte, items uint32, code byte) {
		if len(first) > maxStreamRaw || len(second) > maxStreamRaw {
			return
		}
		c, err := (&sessionKey{}).cipherFor("key", manifestContainer, [saltSize]byte{}, nil)
		if err != nil {
			t.Fatal(err)
		}
		b := appendFrame(nil, first, 0, 0, uncompressed)
		c.seal(0, b)
		start := len(b)
		b = appendFrame(b, second, flagLast, items, uncompressed)
		h := frameHeader{stored: uint32(len(second)), raw: uint32(len(second)), codec: codec(code), flags: flagLast, items: items}
		if codec(code) == codecZstd {
			h.raw = maxStreamRaw
		}
		h.put(b[start:])
		c.seal(1, b[start:])
		m, err := decodeManifest(&frameReader{r: bytes.NewReader(b), c: c, kind: manifestContainer})
		if err == nil {
			for i := range m.Files {
				if err := m.Files[i].check(len(m.Volumes)); err != nil {
					t.Fatal(err)
				}
			}
		}
		frames := &frameReader{r: bytes.NewReader(second), c: c, kind: walContainer}
		for {
			if _, _, err := frames.next(); err != nil {
				if errors.Is(err, io.EOF) {
					return
				}
				break
			}
		}
	})
}

func FuzzSegmentMap(f *testing.F) {
	f.Add([]byte{1, 1, 0, 0, 0, 0})
	m := &SegmentMap{BlockSize: 8192, Blocks: 3, Frames: []FrameRef{{Object: ObjectRef{SID: 1, Kind: PackObject}, Stored: 100, Raw: 3 * 8192}}, Runs: []Run{{Count: 3}}}
	b, err := m.MarshalBinary()
	if err != nil {
		f.Fatal(err)
	}
	f.Add(b)
	f.Fuzz(func(t *testing.T, b []byte) {
		var m SegmentMap
		if m.UnmarshalBinary(b) != nil {
			return
		}
		again, err := m.MarshalBinary()
		if err != nil {
			t.Fatalf("a map was read that cannot be written: %v", err)
		}
		var got SegmentMap
		if err := got.UnmarshalBinary(again); err != nil || !reflect.DeepEqual(m, got) {
			t.Fatalf("%v: got %+v, want %+v", err, got, m)
		}
	})
}

// FuzzDocument gives the fuzzer's content a right checksum, and reads it as each kind of document.
func FuzzDocument(f *testing.F) {
	for _, part := range []string{"repository.json", "/head/", "/refs", "/owner/", "/session/"} {
		seeds(f, part)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		var d Description
		_, _ = decodeDocument("key", b, &d)
		body := b
		if len(b) > checksumTail {
			body = b[:len(b)-checksumTail]
		}
		b = append(append(append(bytes.Clone(body), checksumOpen...), documentChecksum("key", body)...), checksumClose...)
		h := headDocument{Head: &Head{}}
		if _, err := decodeDocument("key", b, &h); err == nil && h.check(h.Version) == nil {
			_ = h.needed()
			_ = condemned(h.Head, nil, imageKey{sid: 1})
		}
		r := refsDocument{refs: &refs{}}
		if _, err := decodeDocument("key", b, &r); err == nil && r.check(r.SID) == nil {
			for i := range r.Objects {
				if r.object(r.Objects[i].Object) == nil {
					t.Fatal("an object is not found")
				}
			}
		}
		if _, err := decodeDocument("key", b[:len(b)-1], &d); err == nil {
			t.Fatal("a document without its end was read")
		}
	})
}

func FuzzKeys(f *testing.F) {
	f.Add("0000000000000001/pack/00000002")
	f.Add(testSeries.headKey(3))
	f.Add(testSeries.String() + "/wal/00000001/000000010000000000000001.00000028.backup")
	f.Fuzz(func(t *testing.T, s string) {
		if k, ok := parseImageKey(s); ok && k.kind != 0 && (ObjectRef{k.sid, k.kind, k.n}).String() != s {
			t.Fatalf("%q was read as %+v", s, k)
		}
		if v, ok := testSeries.parseHeadKey(s); ok && testSeries.headKey(v) != s {
			t.Fatalf("%q was read as %d", s, v)
		}
		if name, ok := testSeries.parseWALKey(s); ok {
			if key, err := testSeries.walKey(name); err != nil || key != s {
				t.Fatalf("%q was read as %q", s, name)
			}
		}
		if id, err := ParseSeriesID(s); err == nil && id.String() != s {
			t.Fatalf("%q was read as %v", s, id)
		}
	})
}
