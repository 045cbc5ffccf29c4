package postgres_test

import (
	"context"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"

	"github.com/pgark/terraform-provider-pgark/internal/engine/postgres"
	"github.com/pgark/terraform-provider-pgark/test/pgtest"
)

func BenchmarkChecksumPage(b *testing.B) {
	page := make([]byte, postgres.PageSize)
	for i := range page {
		page[i] = byte(rand.Uint32())
	}
	b.SetBytes(postgres.PageSize)
	var sum uint16
	for b.Loop() {
		sum ^= postgres.ChecksumPage(page, 1)
	}
	_ = sum
}

// BenchmarkScanSegment walks a segment of small records, the most costly kind.
func BenchmarkScanSegment(b *testing.B) {
	c := pgtest.Start(b, pgtest.Options{Settings: map[string]string{"wal_keep_size": "1GB", "full_page_writes": "off"}})
	ctx := context.Background()
	conn := c.Conn(ctx)
	if _, err := conn.Exec(ctx, "create table t (a int, b int)"); err != nil {
		b.Fatal(err)
	}
	first, err := postgres.ForceSegment(ctx, conn, "begin")
	if err != nil {
		b.Fatal(err)
	}
	name := first.Next(postgres.DefaultSegmentSize)
	for range 4 {
		if _, err := conn.Exec(ctx, "insert into t select 1, 2 from generate_series(1, 100000)"); err != nil {
			b.Fatal(err)
		}
	}
	data, err := os.ReadFile(filepath.Join(c.WALDir, string(name)))
	if err != nil {
		b.Fatal(err)
	}
	b.SetBytes(int64(len(data)))
	b.ReportAllocs()
	var s postgres.SegmentScan
	for b.Loop() {
		s = postgres.ScanSegment(name, postgres.DefaultSegmentSize, data)
	}
	if s.Problem != nil {
		b.Fatal(s.Problem)
	}
	b.ReportMetric(float64(s.Records), "records")
}
