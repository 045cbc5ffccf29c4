package wal

import (
	"context"
	"encoding/binary"
	"errors"
	"log/slog"
	"math/rand/v2"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/pgark/terraform-provider-pgark/internal/engine/objectstore"
	"github.com/pgark/terraform-provider-pgark/internal/engine/postgres"
	"github.com/pgark/terraform-provider-pgark/internal/engine/repository"
)

const (
	testSystem = postgres.SystemID(7412345678901234567)
	testSize   = postgres.SegmentSize(1 << 20)
)

// world is a repository in a directory and a data directory of which only pg_wal is there.
type world struct {
	t       *testing.T
	data    string
	repo    *repository.Repository
	series  *repository.Series
	archive *faultyArchive
}

func newWorld(t *testing.T) *world {
	t.Helper()
	ctx := t.Context()
	store, err := objectstore.Open(ctx, objectstore.Location{URL: "file://" + t.TempDir()}, objectstore.Options{})
	if err != nil {
		t.Fatal(err)
	}
	repo, _, err := repository.Create(ctx, store, nil)
	if err != nil {
		t.Fatal(err)
	}
	w := &world{t: t, repo: repo, data: newDataDirectory(t)}
	w.series = repo.Series(repository.SeriesID{Job: "orders", Instance: "15-main", SystemID: testSystem})
	w.archive = &faultyArchive{Series: w.series}
	return w
}

func newDataDirectory(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	if err := os.MkdirAll(filepath.Join(dir, "pg_wal", "archive_status"), 0o700); err != nil {
		t.Fatal(err)
	}
	return dir
}

// faultyArchive is the series, whose PutSealed fails while err is set, and counts.
type faultyArchive struct {
	*repository.Series
	mu    sync.Mutex
	err   error
	hang  chan struct{} // closed: stop hanging
	delay time.Duration // of each; set before it is used
	calls map[string]int
}

func (a *faultyArchive) PutSealed(ctx context.Context, w *repository.SealedWAL) (bool, int64, error) {
	a.mu.Lock()
	err, hang := a.err, a.hang
	if a.calls == nil {
		a.calls = map[string]int{}
	}
	a.calls[w.Info.Name]++
	a.mu.Unlock()
	if hang != nil {
		select {
		case <-hang:
		case <-ctx.Done():
			return false, 0, context.Cause(ctx)
		}
	}
	if err != nil {
		return false, 0, err
	}
	time.Sleep(a.delay)
	return a.Series.PutSealed(ctx, w)
}

func (a *faultyArchive) fail(err error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.err = err
}

func (a *faultyArchive) count(name string) int {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.calls[name]
}

// shipper starts one that ends with the test, or when the returned function is called.
func (w *world) shipper(change ...func(*Options)) (*Shipper, func()) {
	w.t.Helper()
	o := Options{
		Series: w.archive, DataDirectory: w.data, SystemID: testSystem, SegmentSize: testSize, Repository: w.repo.Store().URL(),
		Host: "db1", AnswerAfter: 10 * time.Second, Log: slog.New(slog.NewTextHandler(w.t.Output(), &slog.HandlerOptions{Level: slog.LevelDebug})),
	}
	for _, c := range change {
		c(&o)
	}
	s, err := New(o)
	if err != nil {
		w.t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() {
		defer close(done)
		if err := s.Run(ctx); err != nil {
			w.t.Error(err)
		}
	}()
	stop := func() { cancel(); <-done }
	w.t.Cleanup(stop)
	return s, stop
}

func segment(t postgres.Timeline, number uint64) string {
	return string(postgres.MakeSegmentName(t, number, testSize))
}

// content makes a segment with a proper header and noise behind it.
func content(name string, seed uint64) []byte {
	n := postgres.SegmentName(name[:24])
	b := make([]byte, testSize)
	r := rand.New(rand.NewPCG(seed, 0))
	for i := 8192; i+8 <= len(b)/4; i += 8 {
		binary.LittleEndian.PutUint64(b[i:], r.Uint64())
	}
	le := binary.LittleEndian
	le.PutUint16(b[0:], 0xD110)
	le.PutUint16(b[2:], 0x0002)
	le.PutUint32(b[4:], uint32(n.Timeline()))
	le.PutUint64(b[8:], uint64(n.Start(testSize)))
	le.PutUint64(b[24:], uint64(testSystem))
	le.PutUint32(b[32:], uint32(testSize))
	le.PutUint32(b[36:], 8192)
	return b
}

// finish puts a file into pg_wal and marks it as finished, a while ago.
func (w *world) finish(name string, b []byte) string {
	w.t.Helper()
	path := filepath.Join(w.data, "pg_wal", name)
	w.write(path, b)
	if err := os.WriteFile(filepath.Join(w.data, "pg_wal", "archive_status", name+".ready"), nil, 0o600); err != nil {
		w.t.Fatal(err)
	}
	return path
}

func (w *world) write(path string, b []byte) {
	w.t.Helper()
	if err := os.WriteFile(path, b, 0o600); err != nil {
		w.t.Fatal(err)
	}
}

// mustHold checks that the repository has exactly this content.
func (w *world) mustHold(name string, want []byte) repository.WALInfo {
	w.t.Helper()
	var got buffer
	info, err := w.series.GetWAL(w.t.Context(), name, &got)
	if err != nil {
		w.t.Fatalf("the repository should hold %s: %v", name, err)
	}
	if string(got) != string(want) {
		w.t.Fatalf("the repository holds %s with other content", name)
	}
	return info
}

func (w *world) mustNotHold(name string) {
	w.t.Helper()
	if _, err := w.series.StatWAL(w.t.Context(), name); !errors.Is(err, objectstore.ErrNotExist) {
		w.t.Fatalf("the repository should not hold %s: got %v", name, err)
	}
}

type buffer []byte

func (b *buffer) Write(p []byte) (int, error) { *b = append(*b, p...); return len(p), nil }

// eventually waits for a condition.
func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(15 * time.Second); !ok(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("still not so: %s", what)
		}
	}
}
