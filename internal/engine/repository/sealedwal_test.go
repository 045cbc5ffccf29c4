package repository

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"testing"

	"filippo.io/age"
	"golang.org/x/sync/errgroup"

	"github.com/pgark/terraform-provider-pgark/internal/engine/objectstore"
	"github.com/pgark/terraform-provider-pgark/internal/engine/postgres"
)

// sealed writes a sealed file to a file, as an outage makes the shipper do, and takes it up again.
func sealed(t *testing.T, w *SealedWAL) (path string) {
	t.Helper()
	f, err := os.CreateTemp(t.TempDir(), "")
	must(t, err)
	n, err := io.Copy(f, w.Body)
	must(t, err)
	if n != w.Size || n != w.Info.StoredSize {
		t.Fatalf("%s: a body of %d bytes, expected %d", w.Info.Name, n, w.Size)
	}
	must(t, f.Close())
	return f.Name()
}

func readSealed(t *testing.T, s *Series, name, path string) (*SealedWAL, error) {
	t.Helper()
	f, err := os.Open(path)
	must(t, err)
	w, err := s.ReadSealed(name, f)
	if err != nil {
		must(t, f.Close()) // an error leaves that to the caller
		return nil, err
	}
	t.Cleanup(func() { must(t, w.Close()) })
	return w, nil
}

func TestSealWAL_storedAfterAnOutage(t *testing.T) {
	ctx := t.Context()
	suites(t, func(t *testing.T, recipients []string, identities []age.Identity) {
		store := directory(t)
		s := newSeries(t, store, recipients, identities)
		sizes := []int{0, 41, maxStreamRaw + 1, walInMemory + 1}
		if testing.Short() {
			sizes = sizes[:3]
		}
		for i, size := range sizes {
			name := string(postgres.MakeSegmentName(3, uint64(size), 16<<20))
			want := compressible(uint64(size), size)
			w, err := s.SealWAL(ctx, WALInfo{Name: name, Size: int64(size), Host: "db1"}, bytes.NewReader(want), []Effort{Thorough, Hasty}[i%2])
			must(t, err)
			if w.Info.Digest == "" || w.Info.StoredAt.IsZero() || w.Info.SystemID != testSystem {
				t.Errorf("%d bytes: sealed %+v", size, w.Info)
			}
			if _, err := s.StatWAL(ctx, name); !errors.Is(err, objectstore.ErrNotExist) {
				t.Errorf("%d bytes: sealing stored something: %v", size, err)
			}
			path := sealed(t, w)
			info := w.Info
			must(t, w.Close())
			must(t, w.Close())

			// The runner was restarted: another process, whose key of the day is another.
			r, err := Open(ctx, store, identities...)
			must(t, err)
			again := r.Series(testSeries)
			w, err = readSealed(t, again, name, path)
			must(t, err)
			if w.Info.Digest != info.Digest || w.Info.Size != info.Size || w.Info.StoredSize != info.StoredSize || !w.Info.StoredAt.Equal(info.StoredAt) || w.Info.Host != "db1" {
				t.Errorf("%d bytes: read %+v, expected %+v", size, w.Info, info)
			}
			stored, n, err := again.PutSealed(ctx, w)
			if err != nil || !stored || n != w.Size {
				t.Errorf("%d bytes: stored %v, %d, %v", size, stored, n, err)
			}
			if stored, n, err = again.PutSealed(ctx, w); err != nil || n != w.Size { // the directory finds the same bytes there
				t.Errorf("%d bytes again: stored %v, %d, %v", size, stored, n, err)
			}
			var got bytes.Buffer
			if _, err := again.GetWAL(ctx, name, &got); err != nil || !bytes.Equal(got.Bytes(), want) {
				t.Errorf("%d bytes: got %d, %v", size, got.Len(), err)
			}

			// Meanwhile PostgreSQL had asked again and the file was sealed anew, or another one of that name.
			other := append(bytes.Clone(want[:max(0, size-1)]), 0xee)
			for _, content := range [][]byte{want, other} {
				w, err := again.SealWAL(ctx, WALInfo{Name: name, Size: int64(len(content))}, bytes.NewReader(content), Thorough)
				must(t, err)
				stored, n, err := again.PutSealed(ctx, w)
				_, conflict := errors.AsType[*WALConflictError](err)
				if same := bytes.Equal(content, want); conflict == same || stored || same && n != info.StoredSize {
					t.Errorf("%d bytes, sealed anew: stored %v, %d, %v", size, stored, n, err)
				}
				must(t, w.Close())
			}
		}
	})
}

func TestReadSealed_damage(t *testing.T) {
	ctx := t.Context()
	suites(t, func(t *testing.T, recipients []string, identities []age.Identity) {
		s := newSeries(t, newMemoryStore(), recipients, identities)
		const name = "000000010000000000000001"
		raw := compressible(1, maxStreamRaw+100)
		w, err := s.SealWAL(ctx, WALInfo{Name: name, Size: int64(len(raw))}, bytes.NewReader(raw), Thorough)
		must(t, err)
		path := sealed(t, w)
		must(t, w.Close())
		good, err := os.ReadFile(path)
		must(t, err)
		refuses := func(what, name string, b []byte) {
			t.Helper()
			must(t, os.WriteFile(path, b, 0o600))
			if _, err := readSealed(t, s, name, path); err == nil {
				t.Errorf("%s: accepted", what)
			}
		}
		refuses("another name", "000000010000000000000002", good)
		refuses("no name", "pg_control", good)
		refuses("empty", name, nil)
		refuses("longer", name, append(bytes.Clone(good), 0))
		for _, n := range []int{1, 43, len(good) / 2, len(good) - 1} {
			refuses(fmt.Sprintf("cut to %d bytes", n), name, good[:n])
		}
		header := bytes.Clone(good)
		header[60] ^= 1
		refuses("a flipped bit in the header", name, header)
		if recipients == nil {
			body := bytes.Clone(good)
			body[len(body)/2] ^= 1
			refuses("a flipped bit in a frame", name, body)
		}
		other := s.r.Series(SeriesID{Job: "other", Instance: "15-main", SystemID: testSystem})
		must(t, os.WriteFile(path, good, 0o600))
		if _, err := readSealed(t, other, name, path); err == nil {
			t.Error("another series' file was accepted")
		}
		w, err = readSealed(t, s, name, path)
		must(t, err)
		if _, _, err := other.PutSealed(ctx, w); err == nil {
			t.Error("another series' file was stored")
		}
	})
}

func TestSealWAL_refuses(t *testing.T) {
	s := newSeries(t, newMemoryStore(), nil, nil)
	const name = "000000010000000000000001"
	for what, info := range map[string]WALInfo{
		"another cluster": {Name: name, Size: 100, SystemID: 5}, "more than there is": {Name: name, Size: 101},
		"more than there is, in a file": {Name: name, Size: walInMemory + 1}, "a wrong digest": {Name: name, Size: 100, Digest: noDigest},
		"more than a segment can have": {Name: name, Size: 1<<30 + 1},
	} {
		if _, err := s.SealWAL(t.Context(), info, bytes.NewReader(make([]byte, 100)), Thorough); err == nil {
			t.Errorf("%s: sealed", what)
		}
	}
	ctx, cancel := context.WithCancelCause(t.Context())
	cause := errors.New("shutting down")
	cancel(cause)
	if _, err := s.SealWAL(ctx, WALInfo{Name: name, Size: 100}, bytes.NewReader(make([]byte, 100)), Thorough); !errors.Is(err, cause) {
		t.Errorf("cancelled: %v", err)
	}
}

// Buffers are used again, but not before they are given back.
func TestSealWAL_buffers(t *testing.T) {
	s := newSeries(t, newMemoryStore(), nil, nil)
	var g errgroup.Group
	for worker := range 4 {
		g.Go(func() error {
			for round := range 20 {
				n := uint64(worker*100 + round)
				raw := compressible(n, 50_000)
				name := string(postgres.MakeSegmentName(1, n, testSegment))
				w, err := s.SealWAL(t.Context(), WALInfo{Name: name, Size: int64(len(raw))}, bytes.NewReader(raw), Hasty)
				if err != nil {
					return err
				}
				if _, _, err := s.PutSealed(t.Context(), w); err != nil {
					return err
				}
				if err := w.Close(); err != nil {
					return err
				}
				var got bytes.Buffer
				if _, err := s.GetWAL(t.Context(), name, &got); err != nil || !bytes.Equal(got.Bytes(), raw) {
					return fmt.Errorf("%s: got %d other bytes, %w", name, got.Len(), err)
				}
			}
			return nil
		})
	}
	if err := g.Wait(); err != nil {
		t.Error(err)
	}
}

// walSegments opens files to measure with: the WAL segments in the directory that $PGARK_BENCH_WAL names, or one that is
// made up of rows.
func walSegments(b *testing.B) []*os.File {
	b.Helper()
	directory := os.Getenv("PGARK_BENCH_WAL")
	if directory == "" {
		directory = b.TempDir()
		must(b, os.WriteFile(filepath.Join(directory, "000000010000000000000001"), rows(1, 16<<20), 0o600))
	}
	entries, err := os.ReadDir(directory)
	must(b, err)
	var files []*os.File
	for _, e := range entries {
		f, err := os.Open(filepath.Join(directory, e.Name()))
		must(b, err)
		b.Cleanup(func() { f.Close() })
		_, err = io.Copy(io.Discard, f) // into the page cache, where PostgreSQL has just written it
		must(b, err)
		files = append(files, f)
	}
	return files
}

// BenchmarkSealWAL measures what a segment of 16 MiB costs before it is stored, with files as in walSegments:
//
//	PGARK_BENCH_WAL=/var/lib/…/pg_wal go test -bench SealWAL ./internal/engine/repository
//
// The difference to compress-… is reading, hashing, sealing and copying.
func BenchmarkSealWAL(b *testing.B) {
	for _, effort := range []struct {
		name string
		Effort
	}{{"thorough", Thorough}, {"hasty", Hasty}} {
		benchmarkSuites(b, func(b *testing.B, recipients []string, identities []age.Identity) {
			b.Run(effort.name, func(b *testing.B) {
				s := benchmarkSeries(b, newMemoryStore(), recipients, identities)
				files := walSegments(b)
				stored, n := int64(0), 0
				b.SetBytes(16 << 20)
				b.ReportAllocs()
				for b.Loop() {
					name := string(postgres.MakeSegmentName(1, uint64(n), testSegment))
					w, err := s.SealWAL(context.Background(), WALInfo{Name: name, Size: 16 << 20}, files[n%len(files)], effort.Effort)
					must(b, err)
					stored += w.Size
					n++
					must(b, w.Close())
				}
				b.ReportMetric(float64(n)*(16<<20)/float64(stored), "ratio")
			})
		})
		b.Run("compress-"+effort.name, func(b *testing.B) {
			files := walSegments(b)
			buf, out := make([]byte, 16<<20), make([]byte, 0, maxStreamRaw*2)
			b.SetBytes(16 << 20)
			n := 0
			for b.Loop() {
				b.StopTimer()
				_, err := files[n%len(files)].ReadAt(buf, 0)
				must(b, err)
				b.StartTimer()
				for at := 0; at < len(buf); at += maxStreamRaw {
					compress(out, buf[at:at+maxStreamRaw], effort.Effort)
				}
				n++
			}
		})
	}
}
