package postgres_test

import (
	"bytes"
	"context"
	"errors"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"sync"
	"testing"
	"time"

	"github.com/jackc/pgx/v5/pgconn"

	"github.com/pgark/terraform-provider-pgark/internal/engine/postgres"
	"github.com/pgark/terraform-provider-pgark/test/pgtest"
)

// replicate opens a replication connection. One that is not closed holds the server's shutdown up.
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

// expectEnd receives until the stream ends, reporting what the server asks for, and returns how.
func (v *received) expectEnd(t *testing.T, r *postgres.Replication) error {
	t.Helper()
	for limit := time.Now().Add(30 * time.Second); ; {
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		m, err := r.Receive(ctx)
		cancel()
		if errors.Is(err, context.DeadlineExceeded) && time.Now().Before(limit) {
			continue
		}
		if err != nil {
			return err
		}
		v.take(t, m)
		if err := r.Report(t.Context(), v.end(), 0, false); err != nil {
			return err
		}
	}
}

// eventually waits until a condition holds.
func eventually(t *testing.T, what string, holds func() bool) {
	t.Helper()
	for limit := time.Now().Add(30 * time.Second); !holds(); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(limit) {
			t.Fatalf("after 30 s still not: %s", what)
		}
	}
}

// TestReplication_majors is a client's life with a server of each major, with a standby of it, and with what becomes of
// that.
func TestReplication_majors(t *testing.T) {
	majors := pgtest.Majors
	if testing.Short() {
		majors = []int{13, 18}
	}
	for i, major := range majors {
		t.Run(strconv.Itoa(major), func(t *testing.T) {
			t.Parallel()
			sizeMB := []int{1, 4, 16}[i%3]
			c := pgtest.Start(t, pgtest.Options{Major: major, WALSegmentSizeMB: sizeMB,
				Settings: map[string]string{"wal_keep_size": "1GB", "max_slot_wal_keep_size": "1GB", "max_wal_senders": "4"}})
			size := postgres.SegmentSize(sizeMB << 20)
			c.Exec("create table t (n int, s text)")
			v := checkStream(t, c, size)
			checkKeepalive(t, c, size)
			checkSlot(t, c, size)
			checkSynchronous(t, c, size)
			checkReplicationErrors(t, c, size)
			standby := checkShutdown(t, c, size, v)
			checkPromotion(t, c, standby, size)
			checkKill(t, c, size)
			checkRemovedWAL(t, c, size)
		})
	}
}

// checkStream receives across segments, while they are written and with no patience at all.
func checkStream(t *testing.T, c *pgtest.Cluster, size postgres.SegmentSize) *received {
	r := replicate(t, c)
	defer r.Close()
	s := identify(t, r)
	if s.ID != c.SystemID || s.Timeline != 1 || s.Flushed > currentLSN(t, c) {
		t.Errorf("found %+v, expected system %s, timeline 1, up to %s", s, c.SystemID, currentLSN(t, c))
	}
	v := startAtSegment(t, r, size)
	if err := r.Start(t.Context(), 1, v.start, ""); err == nil {
		t.Error("a stream that is under way was started again")
	}
	for range 3 {
		c.Exec("insert into t select n, repeat('x', 100) from generate_series(1, 3000) n")
		c.SwitchWAL()
	}
	// One record of 3 MB takes many messages, and three of the smallest segments.
	c.Exec("select pg_logical_emit_message(true, 'pgark', repeat('y', 3000000))")
	v.until(t, r, currentLSN(t, c), 200*time.Microsecond)
	v.compare(t, c.WALDir, 1, size)
	return v
}

// startAtSegment starts a stream at the beginning of the current segment of the server's timeline.
func startAtSegment(t *testing.T, r *postgres.Replication, size postgres.SegmentSize) *received {
	t.Helper()
	s := identify(t, r)
	v := &received{start: size.Start(size.Number(s.Flushed))}
	if err := r.Start(t.Context(), s.Timeline, v.start, ""); err != nil {
		t.Fatal(err)
	}
	return v
}

// checkKeepalive asks an idle server for a sign of life.
func checkKeepalive(t *testing.T, c *pgtest.Cluster, size postgres.SegmentSize) {
	r := replicate(t, c)
	defer r.Close()
	v := startAtSegment(t, r, size)
	v.until(t, r, currentLSN(t, c), time.Second)
	if err := r.Report(t.Context(), v.end(), 0, true); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	for {
		m, err := r.Receive(ctx)
		if err != nil {
			t.Fatal(err)
		}
		v.take(t, m)
		if len(m.Data) == 0 && m.ServerEnd == v.end() {
			return
		}
	}
}

func checkSlot(t *testing.T, c *pgtest.Cluster, size postgres.SegmentSize) {
	const slot = "pgark_orders"
	r := replicate(t, c)
	defer r.Close()
	if _, err := r.EnsureSlot(t.Context(), "No-Name"); err == nil {
		t.Error("a slot of an impossible name was made")
	}
	first, err := r.EnsureSlot(t.Context(), slot)
	if err != nil {
		t.Fatal(err)
	}
	if first == 0 || first > currentLSN(t, c) {
		t.Errorf("found a slot that holds WAL from %s, expected one below %s", first, currentLSN(t, c))
	}
	c.Exec("insert into t values (1)")
	if again, err := r.EnsureSlot(t.Context(), slot); err != nil || again != first {
		t.Errorf("found %s, %v the second time, expected %s", again, err, first)
	}
	v := &received{start: size.Start(size.Number(identify(t, r).Flushed))}
	if err := r.Start(t.Context(), 1, v.start, slot); err != nil {
		t.Fatal(err)
	}
	v.until(t, r, currentLSN(t, c), time.Second)

	other := replicate(t, c)
	defer other.Close()
	if err := other.Start(t.Context(), 1, v.start, slot); err == nil || other.Broken() {
		t.Errorf("two streams on one slot: %v, broken: %v", err, other.Broken())
	}
	if err := other.DropSlot(t.Context(), slot); err == nil {
		t.Error("a slot in use was dropped")
	}
	durable := v.end()
	if err := r.Report(t.Context(), v.end(), durable, false); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the slot has moved to "+durable.String(), func() bool {
		return c.Scalar("select restart_lsn::text from pg_replication_slots where active and slot_name = $1", slot) == durable.String()
	})
	if err := r.Close(); err != nil {
		t.Error(err)
	}
	eventually(t, "the slot is dropped", func() bool { return other.DropSlot(t.Context(), slot) == nil })
	if err := other.DropSlot(t.Context(), slot); err != nil {
		t.Errorf("drop a slot that is absent: %v", err)
	}
	// One that holds nothing is made to.
	c.Exec("select pg_create_physical_replication_slot($1)", slot)
	if from, err := other.EnsureSlot(t.Context(), slot); err != nil || from == 0 {
		t.Errorf("found %s, %v, expected a slot that holds WAL", from, err)
	}
	if err := other.DropSlot(t.Context(), slot); err != nil {
		t.Error(err)
	}
}

// checkSynchronous looks at what a durable position means to the server.
func checkSynchronous(t *testing.T, c *pgtest.Cluster, size postgres.SegmentSize) {
	r := replicate(t, c)
	defer r.Close()
	v := startAtSegment(t, r, size)
	v.until(t, r, currentLSN(t, c), time.Second)
	c.Exec("alter system set synchronous_standby_names = '*'")
	c.Exec("select pg_reload_conf()")
	state := func() string {
		return c.Scalar("select sync_state from pg_stat_replication where application_name = 'pgark' and state = 'streaming' and write_lsn is not null")
	}
	report := func(durable postgres.LSN) {
		t.Helper()
		if err := r.Report(t.Context(), v.end(), durable, true); err != nil {
			t.Fatal(err)
		}
		for { // the server has taken it once it answers
			ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
			m, err := r.Receive(ctx)
			cancel()
			if err != nil {
				t.Fatal(err)
			}
			v.take(t, m)
			if len(m.Data) == 0 {
				return
			}
		}
	}
	// The setting reaches the server's processes a moment after the reload.
	report(v.end())
	eventually(t, "it is a synchronous standby", func() bool { return state() == "sync" })
	// What is committed, but not durable here, is not acknowledged, once the checkpointer has taken the setting, too: it
	// tells the sessions to wait (SyncRepUpdateSyncStandbysDefined).
	var committed chan struct{}
	eventually(t, "a commit waits until it is durable", func() bool {
		committed = make(chan struct{})
		go func(committed chan struct{}) {
			defer close(committed)
			c.Exec("insert into t values (2)")
		}(committed)
		before := v.end()
		for v.end() == before {
			report(before)
		}
		select {
		case <-committed:
			return false
		case <-time.After(50 * time.Millisecond):
			return true
		}
	})
	for done := false; !done; {
		report(v.end())
		select {
		case <-committed:
			done = true
		case <-time.After(time.Millisecond):
		}
	}
	// Without a durable position it is no synchronous standby of anybody.
	report(0)
	eventually(t, "it is no synchronous standby", func() bool { return state() == "async" })
	c.Exec("alter system reset synchronous_standby_names")
	c.Exec("select pg_reload_conf()")
}

// checkReplicationErrors leaves a connection usable after whatever the server refuses.
func checkReplicationErrors(t *testing.T, c *pgtest.Cluster, size postgres.SegmentSize) {
	r := replicate(t, c)
	defer r.Close()
	start := func(tl postgres.Timeline, from postgres.LSN, slot string) error {
		err := r.Start(t.Context(), tl, from, slot)
		if err == nil {
			_, err = r.Receive(t.Context())
		}
		return err
	}
	for what, f := range map[string]func() error{
		"a history that there is none of": func() error { _, err := r.History(t.Context(), 1); return err },
		"WAL that is not written yet":     func() error { return start(1, currentLSN(t, c)+postgres.LSN(16*size), "") },
		"a timeline that is not there":    func() error { return start(7, currentLSN(t, c), "") },
		"a slot that is not there":        func() error { return start(1, currentLSN(t, c), "absent") },
		"WAL before there is a stream":    func() error { _, err := r.Receive(t.Context()); return err },
	} {
		if err := f(); err == nil || r.Broken() {
			t.Errorf("%s: found %v, broken: %v", what, err, r.Broken())
		}
		identify(t, r)
	}
	if err := r.Report(t.Context(), 1, 1, true); err != nil {
		t.Errorf("report without a stream: %v", err)
	}
	identify(t, r)

	canceled, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := r.Identify(canceled); !errors.Is(err, context.Canceled) || r.Broken() {
		t.Errorf("found %v, broken: %v, expected a command that was not even sent", err, r.Broken())
	}
	identify(t, r)

	c.Exec("create role plain login")
	for role, expected := range map[string]postgres.Refusal{"plain": postgres.RefusedReplication, "absent": postgres.RefusedRole} {
		trust(t, c, role)
		_, err := postgres.ConnectReplication(t.Context(), postgres.ConnectOptions{SocketDirectory: c.SocketDir, Port: c.Port, User: role}, "pgark")
		if found := postgres.RefusalOf(err); found != expected {
			t.Errorf("%s: found refusal %d, expected %d: %v", role, found, expected, err)
		}
	}
	_, err := postgres.ConnectReplication(t.Context(), postgres.ConnectOptions{SocketDirectory: c.SocketDir, Port: c.Port, User: "stranger"}, "pgark")
	if found := postgres.RefusalOf(err); found != postgres.RefusedByHBA {
		t.Errorf("found refusal %d, expected %d: %v", found, postgres.RefusedByHBA, err)
	}
	for n := 0; ; n++ {
		another, err := postgres.ConnectReplication(t.Context(), postgres.ConnectOptions{SocketDirectory: c.SocketDir, Port: c.Port}, "pgark")
		if err == nil && n < 4 {
			defer another.Close()
			continue
		}
		if found := postgres.RefusalOf(err); found != postgres.RefusedConnections {
			t.Errorf("found refusal %d with %d connections, expected %d: %v", found, n, postgres.RefusedConnections, err)
		}
		break
	}
}

// trust lets a role replicate without being asked for anything.
func trust(t *testing.T, c *pgtest.Cluster, role string) {
	t.Helper()
	hba := filepath.Join(c.ConfigDir, "pg_hba.conf")
	b, err := os.ReadFile(hba)
	if err == nil {
		err = os.WriteFile(hba, append([]byte("local replication "+role+" trust\n"), b...), 0o600)
	}
	if err != nil {
		t.Fatal(err)
	}
	c.Exec("select pg_reload_conf()")
	eventually(t, "pg_hba.conf is read", func() bool {
		r, err := postgres.ConnectReplication(t.Context(), postgres.ConnectOptions{SocketDirectory: c.SocketDir, Port: c.Port, User: role}, "pgark")
		if err == nil {
			_ = r.Close()
		}
		return postgres.RefusalOf(err) != postgres.RefusedByHBA
	})
}

// checkShutdown goes along with a server that stops, which sends all that it has written, and copies its files for a
// standby. A stream that has only ever reported what it received does not hold the server up.
func checkShutdown(t *testing.T, c *pgtest.Cluster, size postgres.SegmentSize, v *received) *pgtest.Cluster {
	var r *postgres.Replication
	var err error
	for range 3 {
		r = replicate(t, c)
		defer r.Close()
		if err := r.Start(t.Context(), 1, v.end(), ""); err != nil {
			t.Fatal(err)
		}
		stopped := make(chan struct{})
		go func() {
			defer close(stopped)
			c.Stop(pgtest.Fast)
		}()
		err = v.expectEnd(t, r)
		<-stopped
		// PostgreSQL 18 may take a sender that has only just begun for an ordinary session, and end it as one.
		var ended *pgconn.PgError
		if !errors.As(err, &ended) || ended.Code != "57P01" {
			break
		}
		c.Start()
	}
	if !errors.Is(err, postgres.ErrServerEnded) || !r.Broken() {
		t.Fatalf("found %v, broken: %v, expected the server to end the stream", err, r.Broken())
	}
	if _, again := r.Receive(t.Context()); !errors.Is(again, postgres.ErrServerEnded) {
		t.Errorf("found %v afterwards, expected the same", again)
	}
	control, err := postgres.ReadControl(c.DataDir)
	if err != nil {
		t.Fatal(err)
	}
	if v.end() <= control.Checkpoint {
		t.Errorf("received WAL up to %s, expected the shutdown checkpoint at %s", v.end(), control.Checkpoint)
	}
	v.compare(t, c.WALDir, 1, size)

	dir := filepath.Join(pgtest.Dir(t), "standby")
	if out, err := exec.CommandContext(t.Context(), "cp", "-a", c.DataDir, dir).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	if err := os.WriteFile(filepath.Join(dir, "standby.signal"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	pgtest.Chown(t, dir)
	c.Start()
	return pgtest.Start(t, pgtest.Options{Major: c.Major, DataDir: dir, Settings: map[string]string{
		"primary_conninfo": "host=" + c.SocketDir + " port=" + strconv.Itoa(c.Port) + " user=" + c.Owner}})
}

// checkPromotion streams from a standby across its promotion.
func checkPromotion(t *testing.T, c, standby *pgtest.Cluster, size postgres.SegmentSize) {
	r := replicate(t, standby)
	defer r.Close()
	v := startAtSegment(t, r, size)
	c.Exec("insert into t select n, repeat('z', 100) from generate_series(1, 3000) n")
	c.SwitchWAL()
	c.Exec("insert into t values (3)")
	written := currentLSN(t, c)
	v.until(t, r, written, 20*time.Millisecond)
	v.compare(t, c.WALDir, 1, size)

	standby.Exec("select pg_promote()")
	err := v.expectEnd(t, r)
	var end *postgres.TimelineEnd
	if !errors.As(err, &end) || end.Next != 2 || end.Begin != v.end() || r.Broken() {
		t.Fatalf("found %v after WAL up to %s, expected the end of a timeline there", err, v.end())
	}
	b, err := r.History(t.Context(), 2)
	if err != nil {
		t.Fatal(err)
	}
	h, err := postgres.ParseHistory(2, b)
	if at, ok := h.SwitchPoint(1); err != nil || !ok || at != end.Begin {
		t.Errorf("found the switch at %s, %v in %q, expected %s", at, err, b, end.Begin)
	}
	err = r.Start(t.Context(), 1, end.Begin, "")
	if again := (*postgres.TimelineEnd)(nil); !errors.As(err, &again) || *again != *end {
		t.Errorf("found %v where the timeline ends, expected %v", err, end)
	}
	if err := r.Start(t.Context(), 1, end.Begin+8, ""); err == nil || r.Broken() {
		t.Errorf("found %v beyond the end of the timeline, broken: %v", err, r.Broken())
	}
	if s := identify(t, r); s.Timeline != 2 {
		t.Errorf("found timeline %d, expected 2", s.Timeline)
	}
	v = &received{start: size.Start(size.Number(end.Begin))}
	if err := r.Start(t.Context(), 2, v.start, ""); err != nil {
		t.Fatal(err)
	}
	standby.Exec("insert into t values (4)")
	v.until(t, r, currentLSN(t, standby), time.Second)
	v.compare(t, standby.WALDir, 2, size)
	standby.Stop(pgtest.Immediate)
}

// checkKill loses the server and goes on where it was.
func checkKill(t *testing.T, c *pgtest.Cluster, size postgres.SegmentSize) {
	r := replicate(t, c)
	defer r.Close()
	v := startAtSegment(t, r, size)
	c.Exec("insert into t values (5)")
	v.until(t, r, currentLSN(t, c), time.Second)
	c.Kill()
	err := v.expectEnd(t, r)
	if err == nil || errors.Is(err, postgres.ErrServerEnded) || !r.Broken() {
		t.Fatalf("found %v, broken: %v, expected a connection that is lost", err, r.Broken())
	}
	_, err = postgres.ConnectReplication(t.Context(), postgres.ConnectOptions{SocketDirectory: c.SocketDir, Port: c.Port}, "pgark")
	if !postgres.IsNotRunning(err) {
		t.Errorf("found %v, expected that no server runs", err)
	}
	c.Start()
	r = replicate(t, c)
	defer r.Close()
	if err := r.Start(t.Context(), 1, v.end(), ""); err != nil {
		t.Fatal(err)
	}
	c.Exec("insert into t values (6)")
	v.until(t, r, currentLSN(t, c), time.Second)
	v.compare(t, c.WALDir, 1, size)
}

// checkRemovedWAL asks for WAL that the server has recycled.
func checkRemovedWAL(t *testing.T, c *pgtest.Cluster, size postgres.SegmentSize) {
	c.Exec("alter system set wal_keep_size = 0")
	c.Exec("select pg_reload_conf()")
	old := size.Start(size.Number(currentLSN(t, c)))
	name := filepath.Join(c.WALDir, string(postgres.SegmentAt(1, old, size)))
	eventually(t, "the segment is gone", func() bool {
		c.SwitchWAL()
		c.Exec("checkpoint")
		_, err := os.Stat(name)
		return err != nil
	})
	r := replicate(t, c)
	defer r.Close()
	err := r.Start(t.Context(), 1, old, "")
	if err == nil {
		_, err = r.Receive(t.Context())
	}
	if !postgres.IsWALRemoved(err) || r.Broken() {
		t.Errorf("found %v, broken: %v, expected WAL that is gone", err, r.Broken())
	}
	v := startAtSegment(t, r, size)
	v.until(t, r, currentLSN(t, c), time.Second)
}

// TestReplication_senderTimeout keeps a stream alive by reports, and has it ended without.
func TestReplication_senderTimeout(t *testing.T) {
	t.Parallel()
	c := pgtest.Start(t, pgtest.Options{Settings: map[string]string{"wal_sender_timeout": "500ms"}})
	r := replicate(t, c)
	defer r.Close()
	v := startAtSegment(t, r, postgres.DefaultSegmentSize)
	asked := 0
	for limit := time.Now().Add(1500 * time.Millisecond); time.Now().Before(limit); {
		ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
		m, err := r.Receive(ctx)
		cancel()
		if err != nil && !errors.Is(err, context.DeadlineExceeded) {
			t.Fatal(err)
		}
		v.take(t, m)
		if m.Reply {
			asked++
			if err := r.Report(t.Context(), v.end(), 0, false); err != nil {
				t.Fatal(err)
			}
		}
	}
	if asked == 0 {
		t.Error("the server has not asked whether we live")
	}
	for {
		ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
		_, err := r.Receive(ctx)
		cancel()
		if err == nil {
			continue
		}
		if errors.Is(err, context.DeadlineExceeded) || !r.Broken() {
			t.Errorf("found %v, broken: %v, expected the server to end the connection", err, r.Broken())
		}
		return
	}
}

// TestReplication_reportWhileReceiving reports and closes from other goroutines than the one that receives.
func TestReplication_reportWhileReceiving(t *testing.T) {
	t.Parallel()
	c := pgtest.Start(t, pgtest.Options{})
	r := replicate(t, c)
	defer r.Close()
	startAtSegment(t, r, postgres.DefaultSegmentSize)
	var group sync.WaitGroup
	for range 3 {
		group.Go(func() {
			for range 300 {
				if err := r.Report(t.Context(), 1, 0, true); err != nil {
					t.Error(err)
				}
			}
		})
	}
	answers := make(chan int)
	go func() {
		n := 0
		for {
			m, err := r.Receive(context.Background())
			if err != nil {
				answers <- n
				return
			}
			if len(m.Data) == 0 {
				n++
			}
		}
	}()
	group.Wait()
	time.Sleep(100 * time.Millisecond)
	if err := r.Close(); err != nil {
		t.Error(err)
	}
	select {
	case n := <-answers:
		if n == 0 {
			t.Error("no report was answered")
		}
	case <-time.After(10 * time.Second):
		t.Fatal("Close has not ended Receive")
	}
	if err := r.Close(); err != nil {
		t.Errorf("close again: %v", err)
	}
	if err := r.Report(t.Context(), 1, 0, false); !errors.Is(err, net.ErrClosed) {
		t.Errorf("report after closing: found %v", err)
	}
}

// TestReplication_piecemeal receives through a proxy that passes messages on in pieces, with a patience that ends within
// nearly every one of them.
func TestReplication_piecemeal(t *testing.T) {
	t.Parallel()
	c := pgtest.Start(t, pgtest.Options{})
	trust(t, c, c.Owner) // the server sees the proxy as its peer, which is not the owner
	dir := pgtest.Dir(t)
	l, err := new(net.ListenConfig).Listen(t.Context(), "unix", filepath.Join(dir, ".s.PGSQL."+strconv.Itoa(c.Port)))
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(l.Addr().String(), 0o777); err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	random := rand.New(rand.NewPCG(1, 2))
	go func() {
		client, err := l.Accept()
		if err != nil {
			return
		}
		defer client.Close()
		server, err := new(net.Dialer).DialContext(t.Context(), "unix", filepath.Join(c.SocketDir, filepath.Base(l.Addr().String())))
		if err != nil {
			t.Error(err)
			return
		}
		defer server.Close()
		go func() { _, _ = io.Copy(server, client) }()
		for buffer := make([]byte, 9000); ; time.Sleep(time.Duration(random.IntN(400)) * time.Microsecond) {
			n, err := server.Read(buffer[:1+random.IntN(len(buffer))])
			if err != nil {
				return
			}
			if random.IntN(2) == 0 && n > 8 { // cut through headers, too
				for _, part := range [][]byte{buffer[:3], buffer[3:7]} {
					_, _ = client.Write(part)
					time.Sleep(300 * time.Microsecond)
				}
				_, _ = client.Write(buffer[7:n])
			} else if _, err := client.Write(buffer[:n]); err != nil {
				return
			}
		}
	}()
	r, err := postgres.ConnectReplication(t.Context(), postgres.ConnectOptions{SocketDirectory: dir, Port: c.Port, User: c.Owner, Owner: c.Owner}, "pgark")
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	v := startAtSegment(t, r, postgres.DefaultSegmentSize)
	c.Exec("create table t as select n, repeat('x', n % 200) from generate_series(1, 10000) n")
	if timeouts := v.until(t, r, currentLSN(t, c), 100*time.Microsecond); timeouts < 100 {
		t.Errorf("patience ended %d times only", timeouts)
	}
	v.compare(t, c.WALDir, 1, postgres.DefaultSegmentSize)
}

// BenchmarkReplication receives WAL that the server has at hand.
func BenchmarkReplication(b *testing.B) {
	c := pgtest.Start(b, pgtest.Options{Settings: map[string]string{"wal_keep_size": "2GB", "max_wal_size": "4GB"}})
	r, err := postgres.ConnectReplication(b.Context(), postgres.ConnectOptions{SocketDirectory: c.SocketDir, Port: c.Port}, "pgark")
	if err != nil {
		b.Fatal(err)
	}
	defer r.Close()
	s, err := r.Identify(b.Context())
	if err != nil {
		b.Fatal(err)
	}
	c.Exec("create table t as select n, repeat('x', 1000) from generate_series(1, 500000) n")
	end, err := postgres.ParseLSN(c.Scalar("select pg_current_wal_flush_lsn()"))
	if err != nil {
		b.Fatal(err)
	}
	b.SetBytes(int64(end - s.Flushed))
	b.ReportAllocs()
	for b.Loop() {
		r, err := postgres.ConnectReplication(b.Context(), postgres.ConnectOptions{SocketDirectory: c.SocketDir, Port: c.Port}, "pgark")
		if err != nil {
			b.Fatal(err)
		}
		if err := r.Start(b.Context(), 1, s.Flushed, ""); err != nil {
			b.Fatal(err)
		}
		for at := s.Flushed; at < end; {
			ctx, cancel := context.WithTimeout(b.Context(), 10*time.Second)
			m, err := r.Receive(ctx)
			cancel()
			if err != nil {
				b.Fatal(err)
			}
			at += postgres.LSN(len(m.Data))
		}
		_ = r.Close()
	}
}
