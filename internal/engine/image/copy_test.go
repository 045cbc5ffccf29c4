package image

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"golang.org/x/sys/unix"
	"pgregory.net/rapid"

	"github.com/pgark/terraform-provider-pgark/internal/engine/postgres"
	"github.com/pgark/terraform-provider-pgark/internal/engine/repository"
)

// frameOverhead is what a frame takes beside its bytes; maps with less are refused.
const frameOverhead = 32

// memoryFrames keeps frames in memory.
type memoryFrames struct {
	sid    repository.SID
	frames map[repository.FrameRef][]byte
	maps   int
	bytes  int
}

func (m *memoryFrames) WriteFrame(_ context.Context, raw []byte) (repository.FrameRef, error) {
	n := uint32(len(m.frames))
	ref := repository.FrameRef{
		Object: repository.ObjectRef{SID: m.sid, Kind: repository.PackObject, N: n / 8}, Frame: n % 8,
		Offset: 100 + n%8*300000, Stored: uint32(len(raw)) + frameOverhead, Raw: uint32(len(raw)),
	}
	m.frames[ref] = slices.Clone(raw)
	m.bytes += len(raw)
	return ref, nil
}

func (m *memoryFrames) WriteMap(context.Context, *repository.SegmentMap) (repository.FrameRef, error) {
	m.maps++
	return repository.FrameRef{Object: repository.ObjectRef{SID: m.sid, Kind: repository.MapObject, N: uint32(m.maps)}, Offset: 100, Stored: 100, Raw: 50}, nil
}

// read rebuilds a file from its map.
func (m *memoryFrames) read(f *fileState) []byte {
	if f.Map == nil {
		return nil
	}
	out := make([]byte, 0, int(f.Map.Blocks)*int(f.Map.BlockSize))
	for _, r := range f.Map.Runs {
		raw := m.frames[f.Map.Frames[r.Frame]]
		from := int(r.First) * int(f.Map.BlockSize)
		out = append(out, raw[from:min(from+int(r.Count)*int(f.Map.BlockSize), len(raw))]...)
	}
	return out[:f.Size]
}

var testKey = []byte("0123456789abcdef0123456789abcdef")

// Any history of a file (changes, growth, shrinkage, ends within a block), copied again and again, reads back as it was
// each time, and an image stores no more than what changed unless the file is written afresh.
func TestReadFile_history(t *testing.T) {
	dir := t.TempDir()
	rapid.Check(t, func(rt *rapid.T) {
		relation := rapid.Bool().Draw(rt, "relation")
		e := &entry{full: filepath.Join(dir, "f"), relation: relation, volumeKey: roleData, file: repository.File{Path: "f"}}
		store := &memoryFrames{frames: make(map[repository.FrameRef][]byte)}
		c := &copier{store: store, log: slog.New(slog.DiscardHandler)}
		b, err := newBuffers(testKey)
		if err != nil {
			rt.Fatal(err)
		}
		bs := int(e.blockSize())
		maxBlocks := map[bool]int{true: 300, false: 9}[relation]
		var content []byte
		var old *fileState
		for image := range rapid.IntRange(1, 8).Draw(rt, "images") {
			size := rapid.IntRange(0, maxBlocks).Draw(rt, "blocks") * bs
			if size > 0 && rapid.Bool().Draw(rt, "ragged") {
				size -= rapid.IntRange(1, bs-1).Draw(rt, "missing")
			}
			if image > 0 && rapid.Bool().Draw(rt, "same size") {
				size = len(content)
			}
			before := slices.Clone(content)
			content = append(content[:min(size, len(content))], make([]byte, max(0, size-len(content)))...)
			if size > 0 {
				for range rapid.IntRange(0, 40).Draw(rt, "writes") {
					at := rapid.IntRange(0, size-1).Draw(rt, "at")
					content[at] = byte(rapid.IntRange(0, 255).Draw(rt, "byte"))
				}
			}
			if err := os.WriteFile(e.full, content, 0o600); err != nil {
				rt.Fatal(err)
			}
			f, err := os.Open(e.full)
			if err != nil {
				rt.Fatal(err)
			}
			identity, _, err := statFile(int(f.Fd()), "", unix.AT_EMPTY_PATH)
			if err != nil {
				rt.Fatal(err)
			}
			store.sid++
			stored := store.bytes
			now, err := c.readFile(t.Context(), e, f, identity, old, b)
			if errors.Is(err, errScattered) {
				old, stored = nil, store.bytes
				now, err = c.readFile(t.Context(), e, f, identity, nil, b)
			}
			_ = f.Close()
			if err != nil {
				rt.Fatal(err)
			}
			if got := store.read(now); string(got) != string(content) {
				rt.Fatalf("image %d: read back %d bytes, expected %d, or other content", image, len(got), len(content))
			}
			if old != nil {
				changed := 0
				for at := 0; at < len(content); at += bs {
					is, was := content[at:min(at+bs, len(content))], before[min(at, len(before)):min(at+bs, len(before))]
					if relation { // pages are compared whole, with zeros behind the file's end
						is, was = append(slices.Clone(is), make([]byte, bs-len(is))...), append(slices.Clone(was), make([]byte, bs-len(was))...)
					}
					if at >= len(before) || string(is) != string(was) {
						changed += bs
					}
				}
				if store.bytes-stored > changed {
					rt.Fatalf("image %d stored %d bytes, expected at most %d", image, store.bytes-stored, changed)
				}
			}
			// Through the state, as the next image gets it.
			encoded, err := now.marshal()
			if err != nil {
				rt.Fatal(err)
			}
			old = new(fileState)
			if err := old.unmarshal(encoded); err != nil {
				rt.Fatal(err)
			}
		}
	})
}

// A segment that changes a little in every image is written afresh before its blocks lie in too many of them.
func TestReadFile_scattered(t *testing.T) {
	e := &entry{full: filepath.Join(t.TempDir(), "f"), relation: true, volumeKey: roleData, file: repository.File{Path: "f"}}
	store := &memoryFrames{frames: make(map[repository.FrameRef][]byte)}
	c := &copier{store: store, log: slog.New(slog.DiscardHandler)}
	b, err := newBuffers(testKey)
	if err != nil {
		t.Fatal(err)
	}
	random := rand.New(rand.NewPCG(1, 2))
	content := make([]byte, 500*relationBlock)
	var old *fileState
	afresh, most := 0, 0
	for image := range 150 {
		for range 3 {
			binary.LittleEndian.PutUint64(content[random.IntN(500)*relationBlock:], random.Uint64())
		}
		if err := os.WriteFile(e.full, content, 0o600); err != nil {
			t.Fatal(err)
		}
		f, err := os.Open(e.full)
		if err != nil {
			t.Fatal(err)
		}
		store.sid++
		now, err := c.readFile(t.Context(), e, f, fileIdentity{Size: int64(len(content))}, old, b)
		if errors.Is(err, errScattered) {
			afresh++
			now, err = c.readFile(t.Context(), e, f, fileIdentity{Size: int64(len(content))}, nil, b)
		}
		_ = f.Close()
		if err != nil {
			t.Fatal(err)
		}
		if string(store.read(now)) != string(content) {
			t.Fatalf("image %d reads back differently", image)
		}
		images := make(map[repository.SID]bool)
		for _, f := range now.Map.Frames {
			images[f.Object.SID] = true
		}
		most = max(most, len(images))
		old = now
	}
	if afresh < 2 || afresh > 4 || most > maxImages {
		t.Errorf("written afresh %d times in 150 images, in pieces of up to %d", afresh, most)
	}
}

// Files that change shape while they are copied must not stop an image, nor hang it.
func TestCopyAll_moving(t *testing.T) {
	dir := t.TempDir()
	// What the links below lead to is written through by whatever follows them: it must be ours.
	elsewhere := filepath.Join(t.TempDir(), "elsewhere")
	if err := os.WriteFile(elsewhere, make([]byte, 1000), 0o600); err != nil {
		t.Fatal(err)
	}
	series := newRepository(t).Series(repository.SeriesID{Job: "j", Instance: "i", SystemID: 1})
	var entries []*entry
	for i := range 200 {
		e := &entry{
			full: filepath.Join(dir, fmt.Sprint(i)), relation: i%2 == 0, volumeKey: roleData,
			file: repository.File{Path: fmt.Sprint(i), Type: repository.RegularFile, Size: 400_000},
		}
		entries = append(entries, e)
		if err := os.WriteFile(e.full, make([]byte, 400_000), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	stop, done := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(done)
		random := rand.New(rand.NewPCG(1, 2))
		for {
			select {
			case <-stop:
				return
			default:
			}
			name := entries[random.IntN(len(entries))].full
			switch random.IntN(6) {
			case 0:
				_ = os.Truncate(name, random.Int64N(800_000))
			case 1:
				_ = os.Remove(name)
			case 2:
				_ = os.Remove(name) // of a fifo, opening it would wait for a reader
				_ = os.WriteFile(name, make([]byte, random.Int64N(800_000)), 0o600)
			case 3:
				_ = os.Remove(name)
				_ = os.Symlink(elsewhere, name)
			case 4:
				_ = os.Remove(name)
				_ = unix.Mkfifo(name, 0o600)
			case 5:
				_ = os.Remove(name)
				_ = os.Mkdir(name, 0o700)
			}
		}
	}()
	sid, err := series.Begin(t.Context(), repository.OpenSession{Kind: repository.SessionImage})
	if err != nil {
		t.Fatal(err)
	}
	writer, err := series.NewImageWriter(t.Context(), sid, 0, repository.WriterOptions{})
	if err != nil {
		t.Fatal(err)
	}
	defer writer.Close()
	state, err := createState(t.TempDir(), stateHeader{SID: sid, HashKey: testKey})
	if err != nil {
		t.Fatal(err)
	}
	c := &copier{store: writer, state: state, hashKey: testKey, checksums: true, log: slog.New(slog.DiscardHandler)}
	if err := c.copyAll(t.Context(), entries, 4); err != nil {
		t.Fatal(err)
	}
	close(stop)
	<-done
	gone := 0
	for _, e := range entries {
		if e.gone {
			gone++
		}
	}
	t.Logf("%d of %d files had gone", gone, len(entries))
}

func TestJudgeExcused(t *testing.T) {
	e := &entry{}
	c := &copier{log: slog.New(slog.DiscardHandler), excused: []excusedPage{{e, 4, 100}, {e, 5, 101}, {e, 6, postgres.LSN(1) << 60}}}
	c.judgeExcused(100)
	if !slices.Equal(e.file.Corrupt, []uint32{5, 6}) {
		t.Errorf("corrupt %v, expected pages 5 and 6, whose LSN lies after the end of the backup", e.file.Corrupt)
	}
}

// The worker's path: read, hash, compare, and what follows from each outcome.
func BenchmarkCopyFile(b *testing.B) {
	const size = 64 << 20
	dir := b.TempDir()
	content := make([]byte, size)
	random := rand.NewChaCha8([32]byte{1})
	_, _ = random.Read(content)
	for i := 0; i < size; i += 3 { // compresses about 3:1, as rows do
		content[i] = 'x'
		if i+1 < size {
			content[i+1] = byte(i / 8192)
		}
	}
	for p := 0; p < size; p += relationBlock { // pages with valid checksums
		binary.LittleEndian.PutUint64(content[p:], 0)
		binary.LittleEndian.PutUint64(content[p+8:], 0x2000200000180000)
		binary.LittleEndian.PutUint16(content[p+8:], postgres.ChecksumPage(content[p:p+relationBlock], uint32(p/relationBlock)))
	}
	e := &entry{full: filepath.Join(dir, "f"), relation: true, volumeKey: roleData, file: repository.File{Path: "f", Type: repository.RegularFile, Size: size}}
	if err := os.WriteFile(e.full, content, 0o600); err != nil {
		b.Fatal(err)
	}
	series := newRepository(b).Series(repository.SeriesID{Job: "j", Instance: "i", SystemID: 1})
	run := func(name string, checksums bool, prepare func(old *fileState) *fileState) {
		b.Run(name, func(b *testing.B) {
			sid, err := series.Begin(b.Context(), repository.OpenSession{Kind: repository.SessionImage})
			if err != nil {
				b.Fatal(err)
			}
			writer, err := series.NewImageWriter(b.Context(), sid, 0, repository.WriterOptions{})
			if err != nil {
				b.Fatal(err)
			}
			defer writer.Close()
			c := &copier{store: writer, checksums: checksums, log: slog.New(slog.DiscardHandler)}
			buf, err := newBuffers(testKey)
			if err != nil {
				b.Fatal(err)
			}
			f, err := os.Open(e.full)
			if err != nil {
				b.Fatal(err)
			}
			defer f.Close()
			old, err := c.readFile(b.Context(), e, f, fileIdentity{Size: size}, nil, buf)
			if err != nil {
				b.Fatal(err)
			}
			if len(old.Corrupt) > 0 {
				b.Fatal("the pages are corrupt")
			}
			old = prepare(old)
			b.SetBytes(size)
			b.ReportAllocs()
			for b.Loop() {
				if _, err := c.readFile(b.Context(), e, f, fileIdentity{Size: size}, old, buf); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
	run("full", false, func(*fileState) *fileState { return nil })
	run("full with page checksums", true, func(*fileState) *fileState { return nil })
	run("unchanged", true, func(old *fileState) *fileState { return old })
	run("one percent changed", true, func(old *fileState) *fileState {
		for i := 0; i < len(old.Hashes); i += 100 * hashSize {
			old.Hashes[i] ^= 1
		}
		return old
	})
}
