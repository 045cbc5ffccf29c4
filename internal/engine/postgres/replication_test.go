package postgres_test

import (
	"bytes"
	"context"
	"errors"
	"os"
	"path/filepath"
	"strconv"
	"testing"
	"time"

	"github.com/pgark/terraform-provider-pgark/internal/engine/postgres"
	"github.com/pgark/terraform-provider-pgark/test/pgtest"
)

// replicate opens a replication connection that closes with the test.
func replicate(t *testing.T, c *pgtest.Cluster) *postgres.Replication {
	t.Helper()
	r, err := postgres.ConnectReplication(t.Context(), postgres.ConnectOptions{SocketDirectory: c.SocketDir, Port: c.Port}, "pgark")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = r.Close() })
	return r
}

func identify(t *testing.T, r *postgres.Replication) postgres.System {
	t.Helper()
	s, err := r.Identify(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// received is WAL as it came.
type received struct {
	start postgres.LSN
	wal   []byte
}

func (v *received) end() postgres.LSN { return v.start + postgres.LSN(len(v.wal)) }

// until receives until WAL up to an LSN is there. The patience of each Receive is a tick, as the streamer's is.
func (v *received) until(t *testing.T, r *postgres.Replication, lsn postgres.LSN, tick time.Duration) (timeouts int) {
	t.Helper()
	limit := time.Now().Add(30 * time.Second)
	for v.end() < lsn {
		ctx, cancel := context.WithTimeout(t.Context(), tick)
		m, err := r.Receive(ctx)
		cancel()
		switch {
		case errors.Is(err, context.DeadlineExceeded):
			timeouts++
			if time.Now().After(limit) {
				t.Fatalf("received WAL up to %s in 30 s, expected %s", v.end(), lsn)
			}
			continue
		case err != nil:
			t.Fatal(err)
		}
		if age := time.Since(m.SentAt); age < -time.Minute || age > time.Minute {
			t.Fatalf("found a message sent at %s", m.SentAt)
		}
		v.take(t, m)
		if m.Reply {
			if err := r.Report(t.Context(), v.end(), 0, false); err != nil {
				t.Fatal(err)
			}
		}
	}
	return timeouts
}

func (v *received) take(t *testing.T, m postgres.StreamMessage) {
	t.Helper()
	if len(m.Data) == 0 {
		return
	}
	if m.Start != v.end() {
		t.Fatalf("found WAL from %s, expected from %s", m.Start, v.end())
	}
	v.wal = append(v.wal, m.Data...)
	if m.ServerEnd < v.end() {
		t.Fatalf("found the server's end at %s in a message that ends at %s", m.ServerEnd, v.end())
	}
}

// compare compares what was received with the files of pg_wal.
func (v *received) compare(t *testing.T, walDir string, tl postgres.Timeline, size postgres.SegmentSize) {
	t.Helper()
	for b, at := v.wal, v.start; len(b) > 0; {
		name := postgres.SegmentAt(tl, at, size)
		file, err := os.ReadFile(filepath.Join(walDir, string(name)))
		if err != nil {
			t.Fatal(err)
		}
		file = file[size.Offset(at):]
		n := min(len(b), len(file))
		if !bytes.Equal(b[:n], file[:n]) {
			t.Fatalf("%s: found other bytes in the stream than in the file", name)
		}
		b, at = b[n:], at+postgres.LSN(n)
	}
}

func currentLSN(t *testing.T, c *pgtest.Cluster) postgres.LSN {
	t.Helper()
	lsn, err := postgres.ParseLSN(c.Scalar("select pg_current_wal_flush_lsn()"))
	if err != nil {
		t.Fatal(err)
	}
	return lsn
}

// TestReplication_majors runs a client against a server of each major, from its first segment to its end.
func TestReplication_majors(t *testing.T) {
	for i, major := range pgtest.Majors {
		t.Run(strconv.Itoa(major), func(t *testing.T) {
			t.Parallel()
			sizeMB := []int{1, 4, 16}[i%3]
			c := pgtest.Start(t, pgtest.Options{Major: major, WALSegmentSizeMB: sizeMB, SeparateWAL: true,
				Settings: map[string]string{"wal_keep_size": "1GB", "max_slot_wal_keep_size": "1GB"}})
			size := postgres.SegmentSize(sizeMB << 20)
			r := replicate(t, c)
			s := identify(t, r)
			if s.ID != c.SystemID || s.Timeline != 1 || s.Flushed > currentLSN(t, c) {
				t.Errorf("found %+v, expected system %s, timeline 1, up to %s", s, c.SystemID, currentLSN(t, c))
			}
			v := &received{start: size.Start(size.Number(s.Flushed))}
			if err := r.Start(t.Context(), 1, v.start, ""); err != nil {
				t.Fatal(err)
			}
			c.Exec("create table t (n int, s text)")
			for range 3 {
				c.Exec("insert into t select n, repeat('x', 100) from generate_series(1, 5000) n")
				c.SwitchWAL()
			}
			// A record of 3 MB takes many messages, and three segments of the smallest.
			c.Exec("select pg_logical_emit_message(true, 'pgark', repeat('y', 3000000))")
			v.until(t, r, currentLSN(t, c), time.Second)
			v.compare(t, c.WALDir, 1, size)
			t.Logf("received %d bytes", len(v.wal))
		})
	}
}
