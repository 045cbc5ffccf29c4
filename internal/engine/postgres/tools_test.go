package postgres_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/pgark/terraform-provider-pgark/internal/engine/postgres"
	"github.com/pgark/terraform-provider-pgark/test/pgtest"
)

// TestControl_agreesWithControldata compares each line of pg_controldata that we have a field for.
func TestControl_agreesWithControldata(t *testing.T) {
	t.Parallel()
	c := pgtest.Start(t, pgtest.Options{DataChecksums: true})
	c.Tool("pg_controldata")
	c.Stop(pgtest.Fast)
	k, err := postgres.ReadControl(c.DataDir)
	if err != nil {
		t.Fatal(err)
	}
	expected := map[string]string{}
	for line := range strings.Lines(c.Run("pg_controldata", c.DataDir)) {
		key, value, _ := strings.Cut(line, ":")
		expected[key] = strings.TrimSpace(value)
	}
	yes := map[bool]string{true: "yes", false: "no"}
	for key, found := range map[string]any{
		"Database system identifier":           k.SystemID,
		"pg_control version number":            k.ControlVersion,
		"Catalog version number":               k.CatalogVersion,
		"Database cluster state":               k.State,
		"Latest checkpoint location":           k.Checkpoint,
		"Latest checkpoint's REDO location":    k.CheckpointRedo,
		"Latest checkpoint's REDO WAL file":    postgres.SegmentAt(k.CheckpointTimeline, k.CheckpointRedo, k.WALSegmentSize),
		"Latest checkpoint's TimeLineID":       uint32(k.CheckpointTimeline),
		"Minimum recovery ending location":     k.MinRecoveryPoint,
		"Backup start location":                k.BackupStart,
		"Backup end location":                  k.BackupEnd,
		"End-of-backup record required":        yes[k.BackupEndRequired],
		"wal_level setting":                    k.WALLevel,
		"wal_log_hints setting":                map[bool]string{true: "on", false: "off"}[k.WALLogHints],
		"max_connections setting":              k.MaxConnections,
		"max_worker_processes setting":         k.MaxWorkerProcesses,
		"max_wal_senders setting":              k.MaxWALSenders,
		"max_prepared_xacts setting":           k.MaxPreparedXacts,
		"max_locks_per_xact setting":           k.MaxLocksPerTransaction,
		"Database block size":                  k.BlockSize,
		"Blocks per segment of large relation": k.RelationSegmentSize,
		"WAL block size":                       k.WALBlockSize,
		"Bytes per WAL segment":                uint64(k.WALSegmentSize),
		"Data page checksum version":           k.DataChecksumVersion,
	} {
		if v, ok := expected[key]; !ok || fmt.Sprint(found) != v {
			t.Errorf("%s: found %v, pg_controldata says %q", key, found, v)
		}
	}
}

// TestReadControl_whileWritten reads a file that somebody rewrites in two halves all the time.
func TestReadControl_whileWritten(t *testing.T) {
	t.Parallel()
	c := pgtest.Start(t, pgtest.Options{NoStart: true})
	whole, err := os.ReadFile(filepath.Join(c.DataDir, postgres.ControlFile))
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	path := filepath.Join(dir, postgres.ControlFile)
	torn := bytes.Clone(whole)
	copy(torn[40:], make([]byte, 80))
	for _, e := range []error{os.Mkdir(filepath.Join(dir, "global"), 0o755), os.WriteFile(path, torn, 0o644)} {
		if e != nil {
			t.Fatal(e)
		}
	}
	if _, err := postgres.ReadControl(dir); !errors.Is(err, postgres.ErrControlChecksum) || !strings.Contains(err.Error(), path) {
		t.Errorf("torn for ever: found %v, expected ErrControlChecksum with the path", err)
	}
	written := make(chan error)
	go func() {
		time.Sleep(30 * time.Millisecond) // between the reader's first tries
		written <- os.WriteFile(path, whole, 0o644)
	}()
	if k, err := postgres.ReadControl(dir); err != nil || k.SystemID != c.SystemID {
		t.Errorf("torn for a while: found %+v, %v", k, err)
	}
	if err := <-written; err != nil {
		t.Fatal(err)
	}
}

// TestVerifyPage_agreesWithPgChecksums damages pages and compares what we find with what pg_checksums finds.
func TestVerifyPage_agreesWithPgChecksums(t *testing.T) {
	t.Parallel()
	c := pgtest.Start(t, pgtest.Options{DataChecksums: true})
	c.Exec("create table t as select g, repeat('x', 500) from generate_series(1, 5000) g")
	rel := c.Scalar("select pg_relation_filepath('t')")
	c.Stop(pgtest.Fast)
	if out := c.Run("pg_checksums", "--check", "-D", c.DataDir); !strings.Contains(out, "Bad checksums:  0") {
		t.Fatalf("pg_checksums: %s", out)
	}
	path := filepath.Join(c.DataDir, rel)
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	page := func(n int) []byte { return b[n*postgres.PageSize:][:postgres.PageSize] }
	page(3)[5000] ^= 1                  // one bit of a row
	page(4)[9] ^= 0x80                  // the checksum itself
	page(5)[0] ^= 1                     // the LSN
	copy(page(7), bytes.Clone(page(8))) // a page in the wrong place
	clear(page(9))                      // a new page is right
	if err := os.WriteFile(path, b, 0o600); err != nil {
		t.Fatal(err)
	}
	var found []string
	for n := range len(b) / postgres.PageSize {
		err := postgres.VerifyPage(page(n), uint32(n))
		if postgres.ValidPage(page(n), uint32(n)) != (err == nil) {
			t.Errorf("block %d: ValidPage and VerifyPage (%v) differ", n, err)
		}
		if e, ok := errors.AsType[*postgres.PageError](err); ok {
			found = append(found, fmt.Sprintf("block %d: calculated checksum %X but block contains %X", e.Block, e.Found, e.Expected))
		}
	}
	out, err := c.Command("pg_checksums", "--check", "-D", c.DataDir).CombinedOutput()
	if err == nil || len(found) != 4 {
		t.Errorf("found %q, pg_checksums: %s", found, out)
	}
	for _, f := range found {
		if !strings.Contains(string(out), f) {
			t.Errorf("found %q, pg_checksums: %s", f, out)
		}
	}
	page(9)[100] = 1
	if e, ok := errors.AsType[*postgres.PageError](postgres.VerifyPage(page(9), 9)); !ok || !e.New {
		t.Errorf("a new page that is not zero: found %v", e)
	}
}

// TestTimelines promotes a standby, takes a backup on one, and looks at what both leave in WAL.
func TestTimelines(t *testing.T) {
	t.Parallel()
	ctx := context.Background()
	primary := pgtest.Start(t, pgtest.Options{Settings: map[string]string{"wal_keep_size": "1GB"}})
	primary.Exec("create table t (a int)")
	dir := filepath.Join(primary.Root, "standby")
	primary.Run("pg_basebackup", "-D", dir, "-R", "-c", "fast", "-X", "stream")
	standby := pgtest.Start(t, pgtest.Options{DataDir: dir, Settings: map[string]string{"hot_standby": "on"}})

	conn := standby.Conn(ctx)
	s, err := postgres.ReadServer(ctx, conn)
	if err != nil || !s.InRecovery || s.Setting("primary_conninfo") != "(set)" {
		t.Errorf("found %+v, %v", s, err)
	}
	primary.Exec("insert into t values (1); checkpoint")
	b, err := postgres.StartBackup(ctx, conn, "on a standby")
	if err != nil {
		t.Fatal(err)
	}
	r, err := b.Stop(ctx)
	if err != nil {
		t.Fatal(err)
	}
	if l, err := postgres.ParseBackupLabel(r.Label); err != nil || !l.FromStandby || r.Timeline != 1 {
		t.Errorf("found %+v, %+v, %v", r, l, err)
	}
	promoted, err := postgres.StartBackup(ctx, conn, "during a promotion")
	if err != nil {
		t.Fatal(err)
	}
	standby.Exec("select pg_promote()")
	if r, err := promoted.Stop(ctx); err == nil {
		t.Errorf("found %+v, expected an error: the standby was promoted", r)
	}

	standby.Exec("insert into t select generate_series(1, 1000)")
	history, err := os.ReadFile(filepath.Join(dir, "pg_wal", postgres.HistoryFileName(2)))
	if err != nil {
		t.Fatal(err)
	}
	h, err := postgres.ParseHistory(2, history)
	if err != nil || len(h) != 1 || h[0].Timeline != 1 {
		t.Fatalf("found %+v, %v", h, err)
	}
	if string(h.Format()) != string(history) {
		t.Errorf("Format: found %q, expected %q", h.Format(), history)
	}
	// The first segment of timeline 2 begins with a copy of timeline 1's.
	name, err := postgres.ForceSegment(ctx, standby.Conn(ctx), "on two")
	if err != nil || name.Timeline() != 2 {
		t.Fatalf("found %s, %v", name, err)
	}
	first := postgres.SegmentAt(2, h[0].Switch, postgres.DefaultSegmentSize)
	data, err := os.ReadFile(filepath.Join(dir, "pg_wal", string(first)))
	if err != nil {
		t.Fatal(err)
	}
	header, err := postgres.CheckSegment(first, int64(len(data)), data, primary.SystemID)
	if err != nil {
		t.Error(err)
	}
	scan := postgres.ScanSegment(first, postgres.DefaultSegmentSize, data)
	if scan.Problem != nil || scan.Timeline != 2 || h[0].Switch > first.Start(postgres.DefaultSegmentSize) && header.Timeline != 1 {
		t.Errorf("found header %+v, %+v", header, scan)
	}
}
