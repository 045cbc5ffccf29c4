package wal

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/pgark/terraform-provider-pgark/internal/engine/postgres"
	"github.com/pgark/terraform-provider-pgark/internal/engine/repository"
	"github.com/pgark/terraform-provider-pgark/test/s3test"
)

// realWAL names a directory of whole segments of 16 MiB, for the benchmark.
const realWAL = "PGARK_BENCH_WAL"

// BenchmarkBacklog pushes segments as PostgreSQL does, to an S3 server on this machine, without TLS: so the CPU time
// includes what TLS would make unnecessary, the body's SHA-256.
func BenchmarkBacklog(b *testing.B) {
	dir := os.Getenv(realWAL)
	if dir == "" {
		b.Fatalf("set %s to a directory of WAL segments", realWAL)
	}
	source, err := filepath.Glob(filepath.Join(dir, strings.Repeat("[0-9A-F]", 24)))
	if err != nil || len(source) == 0 {
		b.Fatalf("%s: found no segments: %v", dir, err)
	}
	defer debug.SetGCPercent(debug.SetGCPercent(50)) // as the runner does
	for _, adaptive := range []bool{false, true} {
		b.Run(map[bool]string{false: "zstd", true: "adaptive"}[adaptive], func(b *testing.B) {
			if b.N > len(source) {
				b.Fatalf("found %d segments, expected %d: run with -benchtime=%dx", len(source), b.N, len(source))
			}
			l := newLine(b, source, adaptive)
			var paths []string
			for _, from := range source[:b.N] {
				paths = append(paths, l.finish(b, from))
			}
			time.Sleep(settle)
			runtime.GC()
			before := cpuTime(b)
			b.ResetTimer()
			stop := l.run(b)
			for _, path := range paths {
				if _, err := l.shipper.Ship(b.Context(), path); err != nil {
					b.Fatal(err)
				}
			}
			b.StopTimer()
			used := cpuTime(b) - before
			stop()
			st := l.shipper.Status()
			b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "segments/s")
			b.ReportMetric(float64(used.Milliseconds())/float64(b.N), "cpu-ms/segment")
			b.ReportMetric(float64(st.StoredBytes)/float64(b.N)/1024, "stored-KiB/segment")
			b.ReportMetric(float64(l.shipper.gate.limit()), "uploads")
			b.ReportMetric(float64(peakMemory(b))/(1<<20), "peak-MiB")
		})
	}
}

// cpuTime is what this process has used.
func cpuTime(tb testing.TB) time.Duration {
	tb.Helper()
	var u syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &u); err != nil {
		tb.Fatal(err)
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

// peakMemory is the most that this process has held in memory, in bytes.
func peakMemory(tb testing.TB) int64 {
	tb.Helper()
	b, err := os.ReadFile("/proc/self/status")
	if err != nil {
		tb.Fatal(err)
	}
	for _, line := range strings.Split(string(b), "\n") {
		var kib int64
		if n, _ := fmt.Sscanf(line, "VmHWM: %d kB", &kib); n == 1 {
			return kib << 10
		}
	}
	tb.Fatal("found no VmHWM in /proc/self/status")
	return 0
}

// BenchmarkSinglePush pushes one segment at a time: not-stored is the whole way to the S3 server, stored is what
// streaming leaves of it.
func BenchmarkSinglePush(b *testing.B) {
	dir := os.Getenv(realWAL)
	if dir == "" {
		b.Fatalf("set %s to a directory of WAL segments", realWAL)
	}
	source, err := filepath.Glob(filepath.Join(dir, strings.Repeat("[0-9A-F]", 24)))
	if err != nil || len(source) < b.N {
		b.Fatalf("%s: found %d segments, expected %d: %v", dir, len(source), b.N, err)
	}
	for _, stored := range []bool{false, true} {
		b.Run(map[bool]string{false: "not-stored", true: "stored"}[stored], func(b *testing.B) {
			l := newLine(b, source, false)
			l.run(b)
			var took []time.Duration
			for _, from := range source[:b.N] {
				name := filepath.Base(from)
				path := l.finish(b, from)
				if stored {
					l.shipper.Completed(postgres.SegmentName(name))
					time.Sleep(300 * time.Millisecond)
				}
				began := time.Now()
				if _, err := l.shipper.Ship(b.Context(), path); err != nil {
					b.Fatal(err)
				}
				took = append(took, time.Since(began))
			}
			slices.Sort(took)
			b.ReportMetric(float64(took[len(took)/2].Microseconds())/1000, "median-ms")
			b.ReportMetric(float64(took[len(took)-1].Microseconds())/1000, "most-ms")
		})
	}
}

// line is a shipper of real segments to an S3 server.
type line struct {
	data    string
	shipper *Shipper
}

func newLine(b *testing.B, source []string, adaptive bool) *line {
	b.Helper()
	store := s3test.Start(b).Open("backlog/" + strconv.Itoa(b.N))
	repo, _, err := repository.Create(b.Context(), store, nil)
	if err != nil {
		b.Fatal(err)
	}
	l := &line{data: b.TempDir()}
	if err := os.MkdirAll(filepath.Join(l.data, "pg_wal", "archive_status"), 0o700); err != nil {
		b.Fatal(err)
	}
	first, err := os.ReadFile(source[0])
	if err != nil {
		b.Fatal(err)
	}
	header, err := postgres.ParseWALHeader(first)
	if err != nil {
		b.Fatal(err)
	}
	l.shipper, err = New(Options{
		Series:        repo.Series(repository.SeriesID{Job: "orders", Instance: "main", SystemID: header.SystemID}),
		DataDirectory: l.data, SystemID: header.SystemID, SegmentSize: header.SegmentSize, Host: "db1", Adaptive: adaptive,
	})
	if err != nil {
		b.Fatal(err)
	}
	return l
}

// run runs the shipper until the benchmark ends, or stop is called.
func (l *line) run(b *testing.B) (stop func()) {
	b.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- l.shipper.Run(ctx) }()
	stop = sync.OnceFunc(func() {
		cancel()
		if err := <-done; err != nil {
			b.Error(err)
		}
	})
	b.Cleanup(stop)
	return stop
}

// finish has a segment lie in pg_wal, finished.
func (l *line) finish(b *testing.B, from string) string {
	b.Helper()
	name := filepath.Base(from)
	path := filepath.Join(l.data, "pg_wal", name)
	if err := os.Link(from, path); err != nil {
		b.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(l.data, "pg_wal", "archive_status", name+".ready"), nil, 0o600); err != nil {
		b.Fatal(err)
	}
	return path
}
