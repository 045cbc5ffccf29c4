package repository

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"filippo.io/age"

	"github.com/pgark/terraform-provider-pgark/internal/engine/objectstore"
)

var update = flag.Bool("update", false, "write the golden files anew")

// The identity that golden files are encrypted to. It protects nothing.
const goldenIdentity = "AGE-SECRET-KEY-1J9J5AV2DRRPE8VDCNLGHX8RAC7P85VDSTA8PXZ2RVTF5T96K5DCSQCJA5A"

// sequence is a random source that gives the same bytes every time.
type sequence struct{ next byte }

func (s *sequence) Read(p []byte) (int, error) {
	for i := range p {
		p[i] = s.next
		s.next += 7
	}
	return len(p), nil
}

var goldenTime = time.Date(2026, 11, 22, 16, 0, 0, 123456000, time.UTC)

// golden is a small repository with one object of every kind, made the same way every time.
type golden struct {
	store  objectstore.Store
	r      *Repository
	s      *Series
	keys   []string
	second SID
	files  model
}

// makeGolden writes it. blob is the wrapped session key, which age makes different each time.
func makeGolden(t testing.TB, store objectstore.Store, recipients []string, blob []byte) *golden {
	t.Helper()
	ctx := context.Background()
	d := Description{Format: Format, ID: "00112233445566778899aabbccddeeff", CreatedAt: goldenTime, Recipients: recipients, Capabilities: objectstore.Capabilities{CreateIfAbsent: true, RangedGet: true, ListAfterPut: true}}
	var identities []age.Identity
	if len(recipients) > 0 {
		var err error
		if identities, err = ParseIdentities(strings.NewReader(goldenIdentity)); err != nil {
			t.Fatal(err)
		}
	}
	r, err := newRepository(store, d, identities)
	if err != nil {
		t.Fatal(err)
	}
	r.host, r.now, r.random = "db1", func() time.Time { return goldenTime }, &sequence{}
	if blob != nil {
		secret := make([]byte, sessionKeyLen) // the one that blob wraps
		for i := range secret {
			secret[i] = byte(i)
		}
		r.wrap = func(given []byte) ([]byte, error) {
			copy(given, secret)
			return blob, nil
		}
	}
	g := &golden{store: store, r: r, s: r.Series(testSeries)}
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	_, err = r.createDocument(ctx, descriptionKey, d)
	must(err)
	_, err = r.ClaimJob(ctx, testSeries.Job, Owner{MachineID: "7d1b", Host: "db1", ClaimedAt: goldenTime}, "")
	must(err)
	must(g.s.PutSession(ctx, SessionRecord{ID: "0badcafe", Kind: "image", Result: "success", StartedAt: goldenTime, CompletedAt: goldenTime.Add(time.Minute), Host: "db1", SID: 1, SourceBytes: 3}))
	for _, name := range []string{"000000010000000000000001", "000000010000000000000001.00000028.backup", "000000010000000000000002.partial", "00000002.history"} {
		_, _, err = g.s.PutWAL(ctx, WALInfo{Name: name, Size: int64(len(name)) * 20, FirstTime: &goldenTime}, strings.NewReader(strings.Repeat(name, 20)))
		must(err)
	}
	image := func(parent SID, build func(w *ImageWriter, sid SID) []File) SID {
		sid, err := g.s.Begin(ctx, OpenSession{Kind: SessionImage, Parent: parent, Host: "db1", MachineID: "7d1b"})
		must(err)
		w, err := g.s.NewImageWriter(ctx, sid, parent, WriterOptions{PackSize: 16 << 10})
		must(err)
		defer w.Close()
		manifest, refs, err := w.Finish(ctx, &Manifest{
			SID: sid, SystemID: testSystem, PostgresVersion: 150004, DataChecksums: true, BackupLabel: "START WAL LOCATION: 0/2000028\n", DataDirectory: "/data",
			Host: "db1", Volumes: []Volume{{Role: "data", Path: "/data", Device: "/dev/vda", FileSystem: "ext4", SizeBytes: 1 << 30}}, Files: build(w, sid),
		})
		must(err)
		must(g.s.Commit(ctx, ImageInfo{SID: sid, Kind: "full", Parent: parent, StartedAt: goldenTime, CompletedAt: goldenTime, StartLSN: 0x2000028, StopLSN: 0x2000100,
			Timeline: 1, PostgresVersion: 150004, SegmentSize: 16 << 20, ManifestDigest: manifest, RefsDigest: refs, Capture: "live"}))
		return sid
	}
	one := func(f FrameRef, blockSize uint32) *SegmentMap {
		return &SegmentMap{BlockSize: blockSize, Blocks: 1, Frames: []FrameRef{f}, Runs: []Run{{Count: 1}}}
	}
	g.files = model{"PG_VERSION": []byte("15\n"), "base/1\xff": bytes.Repeat([]byte("page"), 2048), "base/2": compressible(1, 300)}
	var kept File
	image(0, func(w *ImageWriter, sid SID) []File {
		version, err := w.WriteFrame(ctx, g.files["PG_VERSION"])
		must(err)
		page, err := w.WriteFrame(ctx, g.files["base/1\xff"])
		must(err)
		sm := one(page, 8192)
		ref, err := w.WriteMap(ctx, sm)
		must(err)
		kept = File{Path: "base/1\xff", Type: RegularFile, Size: 8192, Map: &ref, MapObjects: sm.Objects(), Corrupt: []uint32{0}}
		return []File{
			{Path: ".", Type: Directory, Mode: 0o700, UID: 106, GID: 113, Owner: "postgres", Group: "postgres", ModTime: goldenTime.UnixNano()},
			{Path: "PG_VERSION", Type: RegularFile, Mode: 0o600, Size: 3, Inline: one(version, MaxFrame)},
			kept,
			{Path: "pg_tblspc/16385", Type: Symlink, Link: "/srv/space"},
		}
	})
	g.second = image(1, func(w *ImageWriter, sid SID) []File {
		version, err := w.WriteFrame(ctx, g.files["PG_VERSION"])
		must(err)
		more, err := w.WriteFrame(ctx, g.files["base/2"])
		must(err)
		return []File{
			{Path: "PG_VERSION", Type: RegularFile, Size: 3, Inline: one(version, MaxFrame)}, kept,
			{Path: "base/2", Type: RegularFile, Size: 300, Inline: one(more, MaxFrame)},
		}
	})
	must(g.s.RaiseWALFloor(ctx, 1, 0x2000000))
	must(g.s.Expire(ctx, 1))
	for o, err := range store.List(ctx, "", "") {
		must(err)
		g.keys = append(g.keys, o.Key)
	}
	return g
}

// check reads everything in the repository.
func (g *golden) check(ctx context.Context) error {
	r, err := Open(ctx, g.store, g.r.identities...)
	if err != nil {
		return err
	}
	if _, err := r.JobOwner(ctx, testSeries.Job); err != nil {
		return err
	}
	s := r.Series(testSeries)
	versions := 0
	for _, err := range s.History(ctx) {
		if err != nil {
			return err
		}
		versions++
	}
	if versions != 6 {
		return errors.New("the history is short")
	}
	for _, err := range s.Sessions(ctx, time.Time{}) {
		if err != nil {
			return err
		}
	}
	for _, key := range g.keys {
		name, ok := s.id.parseWALKey(key)
		if !ok {
			continue
		}
		var got bytes.Buffer
		info, err := s.GetWAL(ctx, name, &got)
		if err != nil {
			return err
		}
		if got.String() != strings.Repeat(name, 20) || info.Host != "db1" || !info.FirstTime.Equal(goldenTime) {
			return errors.New("WAL file " + name + " differs")
		}
	}
	// The first image has expired, but everything of it is still there.
	for sid := SID(1); sid <= g.second; sid++ {
		if _, err := s.readRefs(ctx, sid); err != nil {
			return err
		}
		key := s.id.manifestKey(sid)
		body := r.newReader(ctx, key, 0, -1)
		m, err := r.readManifest(body, key)
		body.Close()
		if err != nil {
			return err
		}
		if m.BackupLabel != "START WAL LOCATION: 0/2000028\n" || m.Files[len(m.Files)-2].Path != "base/1\xff" {
			return errors.New("manifest differs")
		}
	}
	for _, key := range g.keys {
		k, ok := parseImageKey(strings.TrimPrefix(key, s.id.imagePrefix()))
		if !ok || k.kind == 0 {
			continue
		}
		object, err := r.readSmall(ctx, key)
		if err != nil {
			return err
		}
		c, entries, err := r.packDirectory(key, k.kind, object)
		if err != nil {
			return err
		}
		var scratch []byte
		for n, e := range entries {
			raw, _, err := openFrame(c, k.kind.container(), uint32(n), object[e.offset:e.offset+e.stored], nil, &scratch)
			if err == nil && len(raw) != int(e.raw) {
				err = errors.New("frame differs from the directory")
			}
			if err != nil {
				return r.contentError(key, err)
			}
		}
	}
	got, err := restore(ctx, s, g.second)
	if err != nil {
		return err
	}
	return diff(g.files, got)
}

func goldenRecipient(t testing.TB) string {
	t.Helper()
	identity, err := age.ParseX25519Identity(goldenIdentity)
	if err != nil {
		t.Fatal(err)
	}
	return identity.Recipient().String()
}

// goldenBlob is a session key (bytes 0 to 31) that was wrapped once.
func goldenBlob(t testing.TB) []byte {
	t.Helper()
	path := filepath.Join("testdata", "v1", "session-key.age")
	b, err := os.ReadFile(path)
	if errors.Is(err, os.ErrNotExist) && *update {
		recipients, err := parseRecipients([]string{goldenRecipient(t)})
		if err != nil {
			t.Fatal(err)
		}
		secret := make([]byte, sessionKeyLen)
		for i := range secret {
			secret[i] = byte(i)
		}
		if b, err = wrapToRecipients(recipients)(secret); err != nil {
			t.Fatal(err)
		}
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, b, 0o644); err != nil {
			t.Fatal(err)
		}
		return b
	}
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// goldenSuites makes the golden repository, in memory, with and without encryption.
func goldenSuites(t *testing.T, run func(t *testing.T, name string, g *golden, s *memoryStore)) {
	for _, name := range []string{"none", "aes-256-gcm"} {
		t.Run(name, func(t *testing.T) {
			var recipients []string
			var blob []byte
			if name != "none" {
				recipients, blob = []string{goldenRecipient(t)}, goldenBlob(t)
			}
			s := newMemoryStore()
			run(t, name, makeGolden(t, s, recipients, blob), s)
		})
	}
}

// TestGolden guards the format: what is written today are the bytes that were written when the format was fixed, and
// those are read.
func TestGolden(t *testing.T) {
	useLibrary(t, libraries["Go"]) // whose bytes the golden files hold
	goldenSuites(t, func(t *testing.T, name string, g *golden, s *memoryStore) {
		root := filepath.Join("testdata", "v1", name)
		if *update {
			if err := os.RemoveAll(root); err != nil {
				t.Fatal(err)
			}
			for key, b := range s.objects {
				path := filepath.Join(root, filepath.FromSlash(key))
				if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
					t.Fatal(err)
				}
				if err := os.WriteFile(path, b, 0o644); err != nil {
					t.Fatal(err)
				}
			}
		}
		var keys []string
		err := filepath.WalkDir(root, func(path string, d os.DirEntry, err error) error {
			if err != nil || d.IsDir() {
				return err
			}
			key, err := filepath.Rel(root, path)
			if err != nil {
				return err
			}
			keys = append(keys, filepath.ToSlash(key))
			b, err := os.ReadFile(path)
			if err != nil {
				return err
			}
			if !bytes.Equal(b, s.objects[filepath.ToSlash(key)]) {
				t.Errorf("%s: what is written today differs from the golden file", key)
			}
			s.objects[filepath.ToSlash(key)] = b
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
		slices.Sort(keys)
		if !slices.Equal(keys, g.keys) {
			t.Errorf("found %v, expected %v", keys, g.keys)
		}
		for library, z := range libraries {
			useLibrary(t, z)
			if err := g.check(t.Context()); err != nil {
				t.Errorf("read with zstd in %s: %v", library, err)
			}
		}
	})
}

// TestDamage_isAlwaysDetected flips every byte of one object of every kind, cuts it at every length, adds a byte, and
// puts every other object in its place.
func TestDamage_isAlwaysDetected(t *testing.T) {
	goldenSuites(t, func(t *testing.T, name string, g *golden, s *memoryStore) {
		if err := g.check(t.Context()); err != nil {
			t.Fatal(err)
		}
		seen := map[string]bool{}
		for _, key := range g.keys {
			kind := kindOf(key)
			if seen[kind] {
				continue
			}
			seen[kind] = true
			original := s.objects[key]
			detected := func(what string, at int, damaged []byte) {
				s.objects[key] = damaged
				if err := g.readOne(t.Context(), key); err == nil {
					t.Errorf("%s: %s %d: read without an error", key, what, at)
				} else if _, ok := errors.AsType[*CorruptError](err); !ok {
					if _, newer := errors.AsType[*FormatError](err); !newer {
						t.Errorf("%s: %s %d: %v", key, what, at, err)
					}
				}
			}
			if err := g.readOne(t.Context(), key); err != nil {
				t.Fatalf("%s: %v", key, err)
			}
			for at := range original {
				for _, bit := range []byte{0x01, 0x80} {
					damaged := bytes.Clone(original)
					damaged[at] ^= bit
					detected("flip", at, damaged)
				}
				detected("cut", at, original[:at])
			}
			detected("append", len(original), append(bytes.Clone(original), 0))
			for n, other := range g.keys {
				if other != key {
					detected("swap with "+other, n, s.original[other])
				}
			}
			s.objects[key] = original
		}
		if len(seen) != 10 {
			t.Errorf("kinds tried: %v", seen)
		}
	})
}

// kindOf classes a key.
func kindOf(key string) string {
	switch {
	case key == descriptionKey:
		return key
	case strings.HasSuffix(key, ".history"):
		return "history"
	}
	for _, kind := range []string{"/owner/", "/head/", "/pack/", "/map/", "/wal/", "/session/", "/manifest", "/refs"} {
		if strings.Contains(key, kind) {
			return kind
		}
	}
	return "unknown"
}

// readOne reads one object the way that its users do.
func (g *golden) readOne(ctx context.Context, key string) error {
	s := g.r.Series(testSeries)
	k, image := parseImageKey(strings.TrimPrefix(key, s.id.imagePrefix()))
	name, wal := s.id.parseWALKey(key)
	switch {
	case key == descriptionKey:
		_, err := Open(ctx, g.store)
		return err
	case strings.Contains(key, "/owner/"):
		_, err := g.r.JobOwner(ctx, testSeries.Job)
		return err
	case strings.Contains(key, "/head/"):
		v, _ := s.id.parseHeadKey(key)
		_, err := s.readHead(ctx, v)
		return err
	case strings.Contains(key, "/session/"):
		for _, err := range s.Sessions(ctx, time.Time{}) {
			if err != nil {
				return err
			}
		}
		return nil
	case wal:
		_, err := s.GetWAL(ctx, name, io.Discard)
		return err
	case image && k.kind != 0:
		object, err := g.r.readSmall(ctx, key)
		if err != nil {
			return err
		}
		c, entries, err := g.r.packDirectory(key, k.kind, object)
		if err != nil {
			return err
		}
		var scratch []byte
		for n, e := range entries {
			if _, _, err := openFrame(c, k.kind.container(), uint32(n), object[e.offset:e.offset+e.stored], nil, &scratch); err != nil {
				return g.r.contentError(key, err)
			}
		}
		return nil
	case strings.HasSuffix(key, "/refs"):
		_, err := s.readRefs(ctx, k.sid)
		return err
	}
	body := g.r.newReader(ctx, key, 0, -1)
	defer body.Close()
	_, err := g.r.readManifest(body, key)
	return err
}

// TestReadFrames_detectsDamage damages every byte of a pack and reads the frames through the image.
func TestReadFrames_detectsDamage(t *testing.T) {
	goldenSuites(t, func(t *testing.T, name string, g *golden, s *memoryStore) {
		ctx := t.Context()
		key := g.s.id.objectKey(ObjectRef{SID: 2, Kind: PackObject, N: 0})
		image, err := g.s.OpenImage(ctx, 2)
		if err != nil {
			t.Fatal(err)
		}
		f := image.Manifest().Files[2].Inline.Frames[0]
		read := func() error {
			return image.ReadFrames(ctx, []FrameRef{f}, func(_ FrameRef, raw []byte) error {
				if !bytes.Equal(raw, g.files["base/2"]) {
					return errors.New("differs")
				}
				return nil
			})
		}
		original := s.objects[key]
		for at := int(f.Offset); at < int(f.Offset+f.Stored); at++ {
			s.objects[key] = bytes.Clone(original)
			s.objects[key][at] ^= 0x10
			if _, ok := errors.AsType[*CorruptError](read()); !ok {
				t.Errorf("byte %d: %v", at, read())
			}
		}
		s.objects[key] = original[:int(f.Offset+f.Stored)-1]
		err = read()
		if _, ok := errors.AsType[*CorruptError](err); !ok || objectstore.IsTransient(err) {
			t.Errorf("cut short: %v (transient: %v)", err, objectstore.IsTransient(err))
		}
		s.objects[key] = original
		if err := read(); err != nil {
			t.Error(err)
		}
		delete(s.objects, key)
		if err := read(); !errors.Is(err, objectstore.ErrNotExist) {
			t.Errorf("absent: %v", err)
		}
	})
}

// TestNewerFormat_isNamed: what a newer pgark wrote gives an error that says so.
func TestNewerFormat_isNamed(t *testing.T) {
	ctx := t.Context()
	s := newMemoryStore()
	g := makeGolden(t, s, nil, nil)
	s.objects[descriptionKey], _, _ = encodeDocument(descriptionKey, map[string]any{"format": 2, "id": "x"})
	_, err := Open(ctx, s)
	if f, ok := errors.AsType[*FormatError](err); !ok || f.Found != 2 || f.Supported != 1 {
		t.Errorf("document: %v", err)
	}
	key, _ := g.s.id.walKey("00000002.history")
	s.objects[key] = bytes.Clone(s.objects[key])
	s.objects[key][8] = 9
	_, err = g.s.GetWAL(ctx, "00000002.history", io.Discard)
	if f, ok := errors.AsType[*FormatError](err); !ok || f.Found != 9 {
		t.Errorf("container: %v", err)
	}
	if want := "read orders/15-main/7412345678901234567/wal/00000002.history in memory: found format 9, expected at most 1; a newer pgark wrote it"; err.Error() != want {
		t.Errorf("got %q, want %q", err, want)
	}
}

// TestCipher_bindsPlaceAndMeta: a frame opens only under its object's key, kind, number and meta data.
func TestCipher_bindsPlaceAndMeta(t *testing.T) {
	for _, k := range []*sessionKey{{suite: suiteNone}, {suite: suiteAESGCM, secret: make([]byte, sessionKeyLen)}} {
		with := func(key string, kind containerKind, salt byte, meta string) *objectCipher {
			c, err := k.cipherFor(key, kind, [saltSize]byte{salt}, []byte(meta))
			if err != nil {
				t.Fatal(err)
			}
			return c
		}
		c := with("a", packContainer, 1, "m")
		frame := appendFrame(nil, []byte("content"), 0, 0, uncompressed)
		c.seal(3, frame)
		if got, err := c.open(nil, 3, frame); err != nil || string(got) != "content" {
			t.Fatalf("%q, %v", got, err)
		}
		if k.suite != suiteNone && bytes.Contains(frame, []byte("content")) {
			t.Error("the payload is not encrypted")
		}
		others := map[string]*objectCipher{"another key": with("b", packContainer, 1, "m"), "another kind": with("a", mapContainer, 1, "m")}
		if k.suite != suiteNone {
			others["another salt"], others["other meta"] = with("a", packContainer, 2, "m"), with("a", packContainer, 1, "n")
		}
		for what, other := range others {
			if _, err := other.open(nil, 3, frame); err == nil {
				t.Errorf("%s: opened with %s", k.suite, what)
			}
		}
		if _, err := c.open(nil, 4, frame); err == nil {
			t.Errorf("%s: opened as another frame", k.suite)
		}
	}
}
