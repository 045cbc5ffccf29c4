package repository

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"sync"
	"testing"

	"github.com/klauspost/compress/zstd"
	"pgregory.net/rapid"
)

// libraries are the implementations of zstd that this build has, each by the language that it is written in.
var libraries = map[string]implementation{"Go": newGoZstd()}

// useLibrary has the test, which must not run in parallel to others, compress with z.
func useLibrary(t testing.TB, z implementation) {
	t.Helper()
	before := zstdLibrary
	zstdLibrary = z
	t.Cleanup(func() { zstdLibrary = before })
}

// pairs calls fn with every library as writer and every one as reader.
func pairs(fn func(what string, writer, reader implementation)) {
	for w, writer := range libraries {
		for r, reader := range libraries {
			fn("written in "+w+", read in "+r, writer, reader)
		}
	}
}

// wordy is content of n bytes that compresses, though not to nothing.
func wordy(seed uint64, n int) []byte {
	r := rand.New(rand.NewPCG(seed, 1))
	b := make([]byte, 0, n+64)
	for len(b) < n {
		b = binary.LittleEndian.AppendUint64(b, r.Uint64())
		b = fmt.Appendf(b, "document %d is new; ", r.IntN(1000))
		b = append(b, make([]byte, r.IntN(24))...)
	}
	return b[:n]
}

func TestCompress_roundTrip(t *testing.T) {
	sizes := []int{1, 31, 32, 33, 1 << 10, MaxFrame - 1, MaxFrame, MaxFrame + 1, maxStreamRaw, maxMapRaw}
	if testing.Short() {
		sizes = sizes[:len(sizes)-1]
	}
	for _, n := range sizes {
		raw := wordy(uint64(n), n)
		for _, effort := range []Effort{Thorough, Hasty} {
			pairs(func(what string, writer, reader implementation) {
				frame, err := writer.compress([]byte("before"), raw, effort)
				if err != nil || !bytes.HasPrefix(frame, []byte("before")) {
					t.Fatalf("%s: %d bytes: %v", what, n, err)
				}
				frame = frame[6:]
				if err := checkZstdFrame(frame); err != nil {
					t.Errorf("%s: %d bytes: %v", what, n, err)
				}
				// The size is in the frame, at least where it needs more than a byte, and no checksum.
				var h zstd.Header
				if err := h.Decode(frame); err != nil || h.HasFCS != (h.FrameContentSize == uint64(n)) || n > 255 && !h.HasFCS || h.HasCheckSum {
					t.Errorf("%s: %d bytes: found header %+v, %v", what, n, h, err)
				}
				for _, room := range []int{n, n + 1, 2 * n} {
					got := make([]byte, room)
					if m, err := reader.decompress(got[:n:room], frame); err != nil || !bytes.Equal(got[:m], raw) {
						t.Errorf("%s: %d bytes into %d: %d, %v", what, n, room, m, err)
					}
				}
				// Not a byte more than there is room for.
				small := bytes.Repeat([]byte{7}, n)
				if m, err := reader.decompress(small[:n-1:n-1], frame); err == nil || small[n-1] != 7 {
					t.Errorf("%s: %d bytes were put into %d: %d", what, n, n-1, m)
				}
			})
		}
	}
}

func TestCompress_rawWhereItDoesNotPay(t *testing.T) {
	noise := make([]byte, 4096)
	r := rand.New(rand.NewPCG(1, 2))
	for i := range noise {
		noise[i] = byte(r.Uint32())
	}
	for name, z := range libraries {
		useLibrary(t, z)
		for what, raw := range map[string][]byte{"nothing": {}, "noise": noise} {
			if out, c := compress([]byte("before"), raw, Thorough); c != codecRaw || string(out) != "before" {
				t.Errorf("%s: %s: found codec %d and %d bytes", name, what, c, len(out))
			}
		}
		if out, c := compress(nil, make([]byte, 4096), uncompressed); c != codecRaw || len(out) != 0 {
			t.Errorf("%s: uncompressed: found codec %d and %d bytes", name, c, len(out))
		}
	}
}

// TestCompress_hasty: a backlog may take up to twice the bytes, not more.
func TestCompress_hasty(t *testing.T) {
	raw := wordy(1, 1<<20)
	for name, z := range libraries {
		thorough, err := z.compress(nil, raw, Thorough)
		if err != nil {
			t.Fatal(err)
		}
		hasty, err := z.compress(nil, raw, Hasty)
		if err != nil || len(hasty) > 2*len(thorough) || len(hasty) > len(raw)*9/10 {
			t.Errorf("%s: %d bytes are %d, in haste %d, %v", name, len(raw), len(thorough), len(hasty), err)
		}
	}
}

func TestCompress_concurrently(t *testing.T) {
	for name, z := range libraries {
		var wg sync.WaitGroup
		for n := range 16 {
			wg.Go(func() {
				for i := range 20 {
					raw := wordy(uint64(100*n+i), 10_000+1_000*i)
					frame, err := z.compress(nil, raw, Effort(i%2))
					if err != nil {
						t.Errorf("%s: %v", name, err)
						return
					}
					got := make([]byte, len(raw))
					if _, err := z.decompress(got, frame); err != nil || !bytes.Equal(got, raw) {
						t.Errorf("%s: read something else: %v", name, err)
					}
				}
			})
		}
		wg.Wait()
	}
}

// TestDecompress_onlyOneFrame: what libraries read beyond one frame of RFC 8878 is none.
func TestDecompress_onlyOneFrame(t *testing.T) {
	raw := wordy(1, 1000)
	for name, z := range libraries {
		useLibrary(t, z)
		frame, err := z.compress(nil, raw, Thorough)
		if err != nil {
			t.Fatal(err)
		}
		room := make([]byte, 0, 2*len(raw))
		if got, err := decompress(room, frame, codecZstd, len(raw)); err != nil || !bytes.Equal(got, raw) {
			t.Fatalf("%s: %v", name, err)
		}
		skipped := []byte{0x50, 0x2a, 0x4d, 0x18, 4, 0, 0, 0, 1, 2, 3, 4}
		for what, test := range map[string]struct {
			b []byte
			n int
		}{
			"two frames":                  {append(bytes.Clone(frame), frame...), 2 * len(raw)},
			"a frame to be skipped":       {append(bytes.Clone(frame), skipped...), len(raw)},
			"a frame to be skipped first": {append(bytes.Clone(skipped), frame...), len(raw)},
			"a format from before":        {append([]byte{0x27, 0xb5, 0x2f, 0xfd}, frame[4:]...), len(raw)},
			"a byte more":                 {append(bytes.Clone(frame), 0), len(raw)},
			"a byte less":                 {frame[:len(frame)-1], len(raw)},
			"nothing":                     {nil, 0},
			"longer than announced":       {frame, len(raw) - 1},
			"shorter than announced":      {frame, len(raw) + 1},
		} {
			if _, err := decompress(room, test.b, codecZstd, test.n); err == nil {
				t.Errorf("%s: %s: was read", name, what)
			}
		}
	}
}

// TestCheckZstdFrame_everyKind walks over frames as other encoders make them: with a window, a checksum, without a size,
// with blocks of all kinds.
func TestCheckZstdFrame_everyKind(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		raw := wordy(rapid.Uint64().Draw(t, "seed"), rapid.IntRange(1, 400_000).Draw(t, "length"))
		if n := rapid.IntRange(0, len(raw)).Draw(t, "same"); n > 0 {
			copy(raw, bytes.Repeat([]byte{7}, n))
		}
		var b bytes.Buffer
		e, err := zstd.NewWriter(&b, zstd.WithEncoderCRC(rapid.Bool().Draw(t, "checksum")), zstd.WithSingleSegment(rapid.Bool().Draw(t, "single segment")),
			zstd.WithEncoderConcurrency(1), zstd.WithWindowSize(1<<rapid.IntRange(10, 20).Draw(t, "window")))
		if err != nil {
			t.Fatal(err)
		}
		if rapid.Bool().Draw(t, "at once") {
			b.Write(e.EncodeAll(raw, nil))
		} else {
			for part := range bytes.SplitSeq(raw, []byte("77")) {
				if _, err := e.Write(part); err != nil {
					t.Fatal(err)
				}
			}
			if err := e.Close(); err != nil {
				t.Fatal(err)
			}
		}
		if err := checkZstdFrame(b.Bytes()); err != nil {
			t.Fatal(err)
		}
	})
}

// FuzzDecompress gives anything to every library: they agree on what it holds, and fill nothing but the room given.
func FuzzDecompress(f *testing.F) {
	for _, n := range []int{1, 100, 5000} {
		for _, z := range libraries {
			for _, effort := range []Effort{Thorough, Hasty} {
				frame, err := z.compress(nil, wordy(uint64(n), n), effort)
				if err != nil {
					f.Fatal(err)
				}
				f.Add(frame, uint16(n))
			}
		}
	}
	f.Fuzz(func(t *testing.T, b []byte, n uint16) {
		var first []byte
		var from string
		for name, z := range libraries {
			useLibrary(t, z)
			room := bytes.Repeat([]byte{7}, int(n)+8)
			got, err := decompress(room[:0], b, codecZstd, int(n))
			if !bytes.Equal(room[n:], bytes.Repeat([]byte{7}, 8)) {
				t.Fatalf("%s: wrote beyond %d bytes", name, n)
			}
			switch {
			case err != nil:
			case from == "":
				first, from = bytes.Clone(got), name
			case !bytes.Equal(first, got):
				t.Fatalf("%s and %s read different content", from, name)
			}
		}
	})
}

// BenchmarkCompress compares the libraries on content of which real WAL is not worse.
func BenchmarkCompress(b *testing.B) {
	raw := wordy(1, maxStreamRaw)
	for name, z := range libraries {
		for _, effort := range []Effort{Thorough, Hasty} {
			b.Run(fmt.Sprintf("%s/effort=%d", name, effort), func(b *testing.B) {
				b.SetBytes(int64(len(raw)))
				b.ReportAllocs()
				out := make([]byte, 0, len(raw)+len(raw)/8)
				for b.Loop() {
					var err error
					if out, err = z.compress(out[:0], raw, effort); err != nil {
						b.Fatal(err)
					}
				}
				b.ReportMetric(float64(len(raw))/float64(len(out)), "ratio")
			})
		}
	}
}
