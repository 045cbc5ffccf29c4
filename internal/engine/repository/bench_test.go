package repository

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"iter"
	"math/rand/v2"
	"testing"

	"filippo.io/age"

	"github.com/pgark/terraform-provider-pgark/internal/engine/objectstore"
	"github.com/pgark/terraform-provider-pgark/internal/engine/postgres"
)

// discard is a store that takes packs and forgets them.
type discard struct{ *memoryStore }

func (d discard) Create(ctx context.Context, key string, body io.ReadSeeker, size int64) error {
	if bytes.Contains([]byte(key), []byte("/image/")) {
		return nil
	}
	return d.memoryStore.Create(ctx, key, body, size)
}

var _ objectstore.Store = discard{}

func (d discard) List(ctx context.Context, prefix, startAfter string) iter.Seq2[objectstore.Object, error] {
	return d.memoryStore.List(ctx, prefix, startAfter)
}

// rows is n bytes that look like heap pages: tuples with headers, counters and padded text; they compress about 4:1.
func rows(seed uint64, n int) []byte {
	rnd := rand.New(rand.NewPCG(seed, 5))
	b := make([]byte, 0, n+200)
	for len(b) < n {
		b = fmt.Appendf(b, "\x00\x00\x02\x03\x18\x00%08d%06d%-60s", rnd.Uint32N(1e8), rnd.Uint32N(1e6), "customer")
	}
	return b[:n]
}

func benchmarkSuites(b *testing.B, run func(b *testing.B, recipients []string, identities []age.Identity)) {
	b.Run("none", func(b *testing.B) { run(b, nil, nil) })
	identity, err := age.GenerateX25519Identity()
	if err != nil {
		b.Fatal(err)
	}
	b.Run("aes-256-gcm", func(b *testing.B) { run(b, []string{identity.Recipient().String()}, []age.Identity{identity}) })
}

func benchmarkSeries(b *testing.B, store objectstore.Store, recipients []string, identities []age.Identity) *Series {
	b.Helper()
	r, err := newRepository(store, Description{Format: Format, Recipients: recipients}, identities)
	if err != nil {
		b.Fatal(err)
	}
	return r.Series(testSeries)
}

func BenchmarkWriteFrame(b *testing.B) {
	benchmarkSuites(b, func(b *testing.B, recipients []string, identities []age.Identity) {
		s := benchmarkSeries(b, discard{newMemoryStore()}, recipients, identities)
		raw := rows(1, MaxFrame)
		w, err := s.NewImageWriter(context.Background(), 1, 0, WriterOptions{})
		if err != nil {
			b.Fatal(err)
		}
		defer w.Close()
		b.SetBytes(MaxFrame)
		b.ReportAllocs()
		b.RunParallel(func(p *testing.PB) {
			for p.Next() {
				if _, err := w.WriteFrame(context.Background(), raw); err != nil {
					b.Error(err)
					return
				}
			}
		})
	})
}

func BenchmarkReadFrames(b *testing.B) {
	benchmarkSuites(b, func(b *testing.B, recipients []string, identities []age.Identity) {
		ctx := context.Background()
		s := benchmarkSeries(b, newMemoryStore(), recipients, identities)
		sid, err := s.Begin(ctx, OpenSession{Kind: SessionImage})
		must(b, err)
		w, err := s.NewImageWriter(ctx, sid, 0, WriterOptions{})
		must(b, err)
		sm := &SegmentMap{BlockSize: MaxFrame}
		for n := range 512 {
			f, err := w.WriteFrame(ctx, rows(uint64(n), MaxFrame))
			must(b, err)
			sm.Frames = append(sm.Frames, f)
			sm.Runs = append(sm.Runs, Run{Start: sm.Blocks, Count: 1, Frame: uint32(n)})
			sm.Blocks++
		}
		manifest, refs, err := w.Finish(ctx, &Manifest{SID: sid, SystemID: testSystem, Volumes: []Volume{{}}, Files: []File{{Path: "f", Type: RegularFile, Size: 512 * MaxFrame, Inline: sm}}})
		must(b, err)
		must(b, s.Commit(ctx, ImageInfo{SID: sid, Timeline: 1, ManifestDigest: manifest, RefsDigest: refs}))
		image, err := s.OpenImage(ctx, sid)
		must(b, err)
		b.SetBytes(512 * MaxFrame)
		b.ReportAllocs()
		for b.Loop() {
			if err := image.ReadFrames(ctx, sm.Frames, func(FrameRef, []byte) error { return nil }); err != nil {
				b.Fatal(err)
			}
		}
	})
}

func BenchmarkPutWAL(b *testing.B) {
	benchmarkSuites(b, func(b *testing.B, recipients []string, identities []age.Identity) {
		store := newMemoryStore()
		s := benchmarkSeries(b, store, recipients, identities)
		raw := rows(1, 16<<20)
		b.SetBytes(16 << 20)
		b.ReportAllocs()
		n := uint64(0)
		for b.Loop() {
			n++
			name := string(postgres.MakeSegmentName(1, n, testSegment))
			if _, _, err := s.PutWAL(context.Background(), WALInfo{Name: name, Size: 16 << 20}, bytes.NewReader(raw)); err != nil {
				b.Fatal(err)
			}
			clear(store.objects)
			clear(store.original)
		}
	})
}

func BenchmarkGetWAL(b *testing.B) {
	benchmarkSuites(b, func(b *testing.B, recipients []string, identities []age.Identity) {
		s := benchmarkSeries(b, newMemoryStore(), recipients, identities)
		name := "000000010000000000000001"
		_, _, err := s.PutWAL(context.Background(), WALInfo{Name: name, Size: 16 << 20}, bytes.NewReader(rows(1, 16<<20)))
		must(b, err)
		b.SetBytes(16 << 20)
		b.ReportAllocs()
		for b.Loop() {
			if _, err := s.GetWAL(context.Background(), name, io.Discard); err != nil {
				b.Fatal(err)
			}
		}
	})
}

func BenchmarkSegmentMap(b *testing.B) {
	// A 1 GiB segment of which every tenth page changed in the last image.
	m := &SegmentMap{BlockSize: postgres.PageSize, Blocks: 131072}
	for block := uint32(0); block < m.Blocks; block += 32 {
		m.Frames = append(m.Frames, FrameRef{Object: ObjectRef{SID: 1, Kind: PackObject, N: block / 2048}, Frame: block / 32 % 64, Offset: 100 + block/32%64*60000, Stored: 60000, Raw: MaxFrame})
	}
	changed := uint32(len(m.Frames))
	for n := range uint32(410) {
		m.Frames = append(m.Frames, FrameRef{Object: ObjectRef{SID: 2, Kind: PackObject, N: n / 64}, Frame: n % 64, Offset: 100 + n%64*60000, Stored: 60000, Raw: MaxFrame})
	}
	for block := range m.Blocks {
		r := Run{Start: block, Count: 1, Frame: block / 32, First: uint16(block % 32)}
		if block%10 == 0 {
			r.Frame, r.First = changed+block/10/32, uint16(block/10%32)
		} else if block%10 > 1 && block%32 > 0 {
			m.Runs[len(m.Runs)-1].Count++
			continue
		}
		m.Runs = append(m.Runs, r)
	}
	encoded, err := m.MarshalBinary()
	must(b, err)
	compressed, _ := compress(nil, encoded, Thorough)
	b.Run("encode", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			if _, err := m.MarshalBinary(); err != nil {
				b.Fatal(err)
			}
		}
		b.ReportMetric(float64(len(encoded)), "bytes")
		b.ReportMetric(float64(len(compressed)), "compressed-bytes")
	})
	b.Run("decode", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			if err := new(SegmentMap).UnmarshalBinary(encoded); err != nil {
				b.Fatal(err)
			}
		}
	})
}
