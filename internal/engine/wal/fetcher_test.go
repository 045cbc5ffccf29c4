package wal

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/pgark/terraform-provider-pgark/internal/engine/daemon/control"
	"github.com/pgark/terraform-provider-pgark/internal/engine/objectstore"
	"github.com/pgark/terraform-provider-pgark/internal/engine/postgres"
	"github.com/pgark/terraform-provider-pgark/internal/engine/repository"
)

// countingSource is the series, with its downloads counted; err makes them fail.
type countingSource struct {
	*repository.Series
	mu    sync.Mutex
	calls map[string]int
	err   error
}

func (s *countingSource) GetWAL(ctx context.Context, name string, w io.Writer) (repository.WALInfo, error) {
	s.mu.Lock()
	if s.calls == nil {
		s.calls = map[string]int{}
	}
	s.calls[name]++
	err := s.err
	s.mu.Unlock()
	if err != nil {
		return repository.WALInfo{}, err
	}
	return s.Series.GetWAL(ctx, name, w)
}

func (s *countingSource) count(name string) int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.calls[name]
}

// put stores files as they would have been shipped.
func (w *world) put(names ...string) {
	w.t.Helper()
	for _, name := range names {
		b := content(name, 1)
		if _, _, err := w.series.PutWAL(w.t.Context(), repository.WALInfo{Name: name, Size: int64(len(b)), Host: "db1"}, bytesReaderAt(b)); err != nil {
			w.t.Fatal(err)
		}
	}
}

func (w *world) putHistory(t postgres.Timeline, lines string) {
	w.t.Helper()
	name := postgres.HistoryFileName(t)
	if _, _, err := w.series.PutWAL(w.t.Context(), repository.WALInfo{Name: name, Size: int64(len(lines)), Host: "db1"}, strings.NewReader(lines)); err != nil {
		w.t.Fatal(err)
	}
}

func bytesReaderAt(b []byte) io.ReaderAt { return strings.NewReader(string(b)) }

func (w *world) fetcher(source Source, change ...func(*FetcherOptions)) *Fetcher {
	w.t.Helper()
	o := FetcherOptions{
		Open:        func(context.Context) (Source, error) { return source, nil },
		Ring:        filepath.Join(w.t.TempDir(), "ring"),
		SegmentSize: testSize,
		RetryFor:    50 * time.Millisecond,
		GapWait:     20 * time.Millisecond,
	}
	for _, c := range change {
		c(&o)
	}
	f, err := NewFetcher(o)
	if err != nil {
		w.t.Fatal(err)
	}
	w.t.Cleanup(func() {
		if err := f.Close(); err != nil {
			w.t.Error(err)
		}
		left, err := filepath.Glob(filepath.Join(o.Ring, "*"))
		if err != nil || len(left) > 0 {
			w.t.Errorf("the ring should be empty at the end: found %v, %v", left, err)
		}
	})
	return f
}

func TestFetch_whatIsAbsent(t *testing.T) {
	until := func(number uint64) func(*FetcherOptions) {
		return func(o *FetcherOptions) { o.Until = testSize.Start(number) + 1 }
	}
	history := func(at postgres.LSN) string { return fmt.Sprintf("1\t%s\tno recovery target specified\n", at) }
	for what, test := range map[string]struct {
		set    func(w *world)
		option func(*FetcherOptions)
		name   string
		found  bool
		gap    string // part of the message
	}{
		"found":                     {set: func(w *world) { w.put(segment(1, 5)) }, name: segment(1, 5), found: true},
		"end of the archive":        {set: func(w *world) { w.put(segment(1, 4)) }, name: segment(1, 5)},
		"empty archive":             {set: func(*world) {}, name: segment(1, 5)},
		"later segment":             {set: func(w *world) { w.put(segment(1, 4), segment(1, 7)) }, name: segment(1, 5), gap: segment(1, 7)},
		"later partial segment":     {set: func(w *world) { w.put(segment(1, 7) + ".partial") }, name: segment(1, 5), gap: ".partial"},
		"own backup history only":   {set: func(w *world) { w.put(segment(1, 5) + ".00000028.backup") }, name: segment(1, 5)},
		"partial segment":           {set: func(w *world) { w.put(segment(1, 5) + ".partial") }, name: segment(1, 5), found: true},
		"whole and partial":         {set: func(w *world) { w.put(segment(1, 5), segment(1, 5)+".partial") }, name: segment(1, 5), found: true},
		"partial with later whole":  {set: func(w *world) { w.put(segment(1, 5)+".partial", segment(1, 6)) }, name: segment(1, 5), gap: segment(1, 6)},
		"segment of other timeline": {set: func(w *world) { w.put(segment(2, 9)) }, name: segment(1, 5)},
		"branch behind it": {set: func(w *world) {
			w.put(segment(2, 8))
			w.putHistory(2, history(testSize.Start(8)+100))
		}, name: segment(1, 5), gap: "timeline 2"},
		"branch at its end": {set: func(w *world) {
			w.put(segment(2, 6))
			w.putHistory(2, history(testSize.Start(6)))
		}, name: segment(1, 5), gap: "timeline 2"},
		"branch within it": {set: func(w *world) {
			w.put(segment(2, 5))
			w.putHistory(2, history(testSize.Start(5)+100))
		}, name: segment(1, 5)},
		"branch before it": {set: func(w *world) {
			w.put(segment(2, 3))
			w.putHistory(2, history(testSize.Start(3)+100))
		}, name: segment(1, 5)},
		"branch of another": {set: func(w *world) {
			w.put(segment(1, 4))
			w.putHistory(3, "2\t"+testSize.Start(9).String()+"\tx\n")
		}, name: segment(1, 5)},
		"must be reached":           {set: func(w *world) { w.put(segment(1, 4)) }, option: until(5), name: segment(1, 5), gap: "reach"},
		"need not be reached":       {set: func(w *world) { w.put(segment(1, 4)) }, option: until(4), name: segment(1, 5)},
		"a partial without records": {set: func(w *world) { w.put(segment(1, 5) + ".partial") }, option: until(5), name: segment(1, 5), gap: "reach"},
		"history that is not":       {set: func(w *world) { w.put(segment(1, 9)) }, name: "00000002.history"},
		"history that is":           {set: func(w *world) { w.putHistory(2, history(100)) }, name: "00000002.history", found: true},
		"partial that is not":       {set: func(w *world) { w.put(segment(1, 9)) }, name: segment(1, 5) + ".partial"},
		"backup that is not":        {set: func(w *world) { w.put(segment(1, 9)) }, name: segment(1, 5) + ".00000028.backup"},
	} {
		t.Run(what, func(t *testing.T) {
			w := newWorld(t)
			test.set(w)
			var options []func(*FetcherOptions)
			if test.option != nil {
				options = append(options, test.option)
			}
			file, found, err := w.fetcher(w.series, options...).Fetch(t.Context(), test.name)
			var gap *GapError
			switch {
			case test.gap != "":
				if !errors.As(err, &gap) || !strings.Contains(err.Error(), test.gap) || !strings.Contains(err.Error(), test.name) || gap.Hint() == "" {
					t.Fatalf("got %v, expected *GapError that says %q", err, test.gap)
				}
			case err != nil:
				t.Fatal(err)
			case found != test.found:
				t.Fatalf("found: got %v, expected %v", found, test.found)
			case found:
				if info, err := os.Stat(file); err != nil || info.Size() == 0 {
					t.Fatalf("the file that was found: %v", err)
				}
			}
		})
	}
}

func TestFetch_ahead(t *testing.T) {
	w := newWorld(t)
	for n := uint64(1); n <= 20; n++ {
		w.put(segment(1, n))
	}
	source := &countingSource{Series: w.series}
	f := w.fetcher(source, func(o *FetcherOptions) { o.Prefetch, o.SegmentSize = 4, 0 })
	for n := uint64(1); n <= 20; n++ {
		file, found, err := f.Fetch(t.Context(), segment(1, n))
		if err != nil || !found {
			t.Fatalf("%s: found %v, %v", segment(1, n), found, err)
		}
		b, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		if string(b) != string(content(segment(1, n), 1)) {
			t.Fatalf("%s: other content", segment(1, n))
		}
		if err := os.Remove(file); err != nil {
			t.Fatal(err)
		}
		eventually(t, "the next four are fetched without being asked for", func() bool {
			return n+4 > 20 || source.count(segment(1, n+4)) > 0
		})
		if n+5 <= 20 && source.count(segment(1, n+5)) > 0 {
			t.Fatalf("%s: fetched ahead of its turn", segment(1, n+5))
		}
	}
	for n := uint64(1); n <= 20; n++ {
		if c := source.count(segment(1, n)); c != 1 {
			t.Errorf("%s was downloaded %d times, expected once", segment(1, n), c)
		}
	}

	// Elsewhere: what was fetched ahead there goes.
	if _, _, err := f.Fetch(t.Context(), segment(1, 2)); err != nil {
		t.Fatal(err)
	}
	if _, _, err := f.Fetch(t.Context(), segment(1, 12)); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the ring holds two that were handed over and four ahead", func() bool {
		files, err := filepath.Glob(filepath.Join(f.o.Ring, "*"))
		return err == nil && len(files) == 6
	})
}

func TestFetch_lateSegmentIsNoGap(t *testing.T) {
	w := newWorld(t)
	w.put(segment(1, 6))
	f := w.fetcher(w.series, func(o *FetcherOptions) { o.GapWait = 10 * time.Second })
	go func() {
		time.Sleep(100 * time.Millisecond)
		w.put(segment(1, 5))
	}()
	if _, found, err := f.Fetch(t.Context(), segment(1, 5)); err != nil || !found {
		t.Fatalf("found %v, %v", found, err)
	}
}

func TestFetch_unreachableIsNotAbsent(t *testing.T) {
	w := newWorld(t)
	source := &countingSource{Series: w.series, err: fmt.Errorf("get: %w", io.ErrUnexpectedEOF)} // transient
	_, found, err := w.fetcher(source).Fetch(t.Context(), segment(1, 5))
	if err == nil || found {
		t.Fatalf("found %v, %v; expected an error", found, err)
	}
	if n := source.count(segment(1, 5)); n < 1 {
		t.Errorf("tried %d times", n)
	}
	_, found, err = w.fetcher(source).Fetch(t.Context(), "00000002.history")
	if err == nil || found {
		t.Fatalf("history: found %v, %v; expected an error", found, err)
	}
	failing := w.fetcher(nil, func(o *FetcherOptions) {
		o.Open = func(context.Context) (Source, error) { return nil, objectstore.ErrNoBucket }
	})
	if _, _, err := failing.Fetch(t.Context(), segment(1, 5)); !errors.Is(err, objectstore.ErrNoBucket) {
		t.Fatalf("got %v, expected why the repository cannot be opened", err)
	}
}

func TestServe(t *testing.T) {
	w := newWorld(t)
	w.put(segment(1, 5))
	f := w.fetcher(w.series, func(o *FetcherOptions) { o.IdleAfter = 200 * time.Millisecond })
	socket := filepath.Join(t.TempDir(), "socket")
	served := make(chan error)
	go func() { served <- f.Serve(t.Context(), socket) }()
	to := filepath.Join(t.TempDir(), "RECOVERYXLOG")
	eventually(t, "the fetcher answers", func() bool {
		_, err := Fetch(t.Context(), socket, segment(1, 5), to)
		return !errors.As(err, new(*control.NotRunningError))
	})
	b, err := os.ReadFile(to)
	if err != nil || string(b) != string(content(segment(1, 5), 1)) {
		t.Fatalf("the file should be in place: %v", err)
	}
	if found, err := Fetch(t.Context(), socket, segment(1, 6), to+"2"); found || err != nil {
		t.Fatalf("the end: found %v, %v", found, err)
	}
	if _, err := os.Stat(to + "2"); err == nil {
		t.Fatal("a file that was not found is there")
	}
	w.put(segment(1, 9))
	if _, err := Fetch(t.Context(), socket, segment(1, 6), to+"2"); err == nil || !strings.Contains(err.Error(), segment(1, 9)) {
		t.Fatalf("got %v, expected the gap", err)
	}
	if err := <-served; err != nil {
		t.Fatal(err)
	}
	if _, err := Fetch(t.Context(), socket, segment(1, 5), to); !errors.As(err, new(*control.NotRunningError)) {
		t.Fatalf("got %v, expected that it has ended", err)
	}
}

func TestMove_toAnotherFileSystem(t *testing.T) {
	from := filepath.Join(t.TempDir(), "from")
	if err := os.WriteFile(from, []byte("wal"), 0o600); err != nil {
		t.Fatal(err)
	}
	dir, err := os.MkdirTemp("/dev/shm", "pgark-test-") //nolint:usetesting // t.TempDir is on the file system of from
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	to := filepath.Join(dir, "to")
	if err := move(from, to); err != nil {
		t.Fatal(err)
	}
	if b, err := os.ReadFile(to); err != nil || string(b) != "wal" {
		t.Fatalf("got %q, %v", b, err)
	}
	if _, err := os.Stat(from); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the source should be gone: %v", err)
	}
	if err := move(from, to+"/x"); err == nil {
		t.Error("moving what is not there should fail")
	}
}
