package stream

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/pgark/terraform-provider-pgark/internal/engine/objectstore"
	"github.com/pgark/terraform-provider-pgark/internal/engine/postgres"
	"github.com/pgark/terraform-provider-pgark/internal/engine/repository"
	"github.com/pgark/terraform-provider-pgark/test/pgtest"
	"github.com/pgark/terraform-provider-pgark/test/s3test"
)

// world is a PostgreSQL server, an S3 server behind a proxy, and a Streamer between them.
type world struct {
	t      *testing.T
	pg     *pgtest.Cluster
	size   postgres.SegmentSize
	s3     *s3test.Server
	proxy  *s3test.FaultProxy
	series *repository.Series // past the proxy
	base   string             // a copy of the data directory, from before anything was streamed
	start  postgres.LSN       // where the server's WAL stood then

	mu      sync.Mutex
	shipped []postgres.SegmentName
	log     bytes.Buffer
}

const testJob = "orders"

// newWorld makes a world; segments of megabytes, 0 for PostgreSQL's default.
func newWorld(t *testing.T, major, megabytes int) *world {
	t.Helper()
	w := &world{t: t, size: postgres.DefaultSegmentSize}
	if megabytes > 0 {
		w.size = postgres.SegmentSize(megabytes << 20)
	}
	w.s3 = s3test.Start(t)
	w.proxy = s3test.NewFaultProxy(t, w.s3.Endpoint(), s3test.Faults{})
	w.pg = pgtest.Start(t, pgtest.Options{Major: major, WALSegmentSizeMB: megabytes, Settings: map[string]string{
		"max_wal_senders": "5", "wal_keep_size": "1GB", "autovacuum": "off"}})
	w.pg.Exec("create table t (n bigint, x text)")
	w.pg.Stop(pgtest.Fast)
	w.base = filepath.Join(pgtest.Dir(t), "base")
	w.copy(w.pg.DataDir, w.base)
	w.pg.Start()
	w.start = flushed(t, w.pg)

	store := w.s3.Open("bucket/prefix")
	repo, _, err := repository.Create(t.Context(), store, nil)
	if err != nil {
		t.Fatal(err)
	}
	w.series = repo.Series(w.id())
	return w
}

func (w *world) id() repository.SeriesID {
	return repository.SeriesID{Job: testJob, Instance: "main", SystemID: w.pg.SystemID}
}

func (w *world) copy(from, to string) {
	w.t.Helper()
	if out, err := exec.CommandContext(w.t.Context(), "cp", "-a", from, to).CombinedOutput(); err != nil {
		w.t.Fatalf("%v: %s", err, out)
	}
	pgtest.Chown(w.t, to)
}

// through opens the series by way of the proxy.
func (w *world) through() *repository.Series {
	w.t.Helper()
	ctx := context.WithoutCancel(w.t.Context())
	store, err := objectstore.Open(ctx, w.proxy.Through(w.s3.Location("bucket/prefix")), objectstore.Options{})
	if err != nil {
		w.t.Fatal(err)
	}
	repo, err := repository.Open(ctx, store)
	if err != nil {
		w.t.Fatal(err)
	}
	return repo.Series(w.id())
}

// running is a Streamer that runs.
type running struct {
	*Streamer
	w      *world
	cancel context.CancelFunc
	done   chan struct{}
	err    error
}

// stream runs a Streamer of the server c until the test ends or stop is called. Whole segments are shipped as they pass,
// as the shipper would.
func (w *world) stream(c *pgtest.Cluster, change ...func(*Options)) *running {
	w.t.Helper()
	series := w.through()
	r := &running{w: w, done: make(chan struct{})}
	ctx, cancel := context.WithCancel(context.Background())
	r.cancel = cancel
	var ships sync.WaitGroup
	o := Options{
		Archive: series, SystemID: w.pg.SystemID, SegmentSize: w.size, Host: "db1",
		Connect: func(ctx context.Context) (*postgres.Replication, error) {
			return postgres.ConnectReplication(ctx, postgres.ConnectOptions{SocketDirectory: c.SocketDir, Port: c.Port, Owner: c.Owner}, "pgark")
		},
		Completed: func(name postgres.SegmentName) {
			ships.Go(func() { w.ship(ctx, series, c, r, name) })
		},
		Unstored: func() ([]postgres.SegmentName, error) {
			names := w.unstored(ctx, c)
			for _, name := range names {
				ships.Go(func() { w.ship(ctx, series, c, r, name) })
			}
			return names, nil
		},
		Log: slog.New(slog.NewTextHandler(&logWriter{w}, &slog.HandlerOptions{Level: slog.LevelDebug})),
	}
	for _, f := range change {
		f(&o)
	}
	s, err := New(o)
	if err != nil {
		w.t.Fatal(err)
	}
	r.Streamer = s
	go func() {
		defer close(r.done)
		r.err = s.Run(ctx)
		cancel()
		ships.Wait()
	}()
	w.t.Cleanup(func() { _ = r.stop() })
	return r
}

func (r *running) stop() error {
	r.cancel()
	<-r.done
	return r.err
}

// unstored lists the finished segments of timeline 1 that were not shipped yet, as the shipper finds them.
func (w *world) unstored(ctx context.Context, c *pgtest.Cluster) []postgres.SegmentName {
	conn, err := postgres.Connect(ctx, postgres.ConnectOptions{SocketDirectory: c.SocketDir, Port: c.Port, Owner: c.Owner, User: c.Owner})
	if err != nil {
		return nil
	}
	defer func() { _ = conn.Close(context.Background()) }()
	var lsn string
	if err := conn.QueryRow(ctx, "select case when pg_is_in_recovery() then '0/0' else pg_current_wal_flush_lsn()::text end").Scan(&lsn); err != nil {
		return nil
	}
	end, err := postgres.ParseLSN(lsn)
	if err != nil {
		return nil
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	var names []postgres.SegmentName
	for n := w.size.Number(w.start); n < w.size.Number(end); n++ {
		if name := postgres.MakeSegmentName(1, n, w.size); !slices.Contains(w.shipped, name) {
			names = append(names, name)
		}
	}
	return names
}

// ship stores a whole segment, trying until that succeeds.
func (w *world) ship(ctx context.Context, series *repository.Series, c *pgtest.Cluster, r *running, name postgres.SegmentName) {
	for {
		b, err := os.ReadFile(filepath.Join(c.WALDir, string(name)))
		if err == nil {
			_, _, err = series.PutWAL(ctx, repository.WALInfo{Name: string(name), Size: int64(len(b))}, bytes.NewReader(b))
		}
		if err == nil {
			w.mu.Lock()
			w.shipped = append(w.shipped, name)
			w.mu.Unlock()
			r.SegmentStored(name)
			return
		}
		select {
		case <-ctx.Done():
			return
		case <-time.After(100 * time.Millisecond):
		}
	}
}

type logWriter struct{ w *world }

func (l *logWriter) Write(b []byte) (int, error) {
	l.w.mu.Lock()
	defer l.w.mu.Unlock()
	l.w.log.Write(b)
	_, _ = l.w.t.Output().Write(b)
	return len(b), nil
}

// logged counts the lines of the log that hold a text.
func (w *world) logged(text string) int {
	w.mu.Lock()
	defer w.mu.Unlock()
	return bytes.Count(w.log.Bytes(), []byte(text))
}

// tails lists the tails of a segment.
func (w *world) tails(name postgres.SegmentName) []repository.Tail {
	w.t.Helper()
	var all []repository.Tail
	for t, err := range w.series.ListTails(w.t.Context(), name.Timeline(), name.Start(w.size), name.End(w.size)) {
		if err != nil {
			w.t.Fatal(err)
		}
		all = append(all, t)
	}
	return all
}

// assemble puts together from the repository what it holds of a segment: the whole, or a chain of tails.
func (w *world) assemble(name postgres.SegmentName) []byte {
	w.t.Helper()
	for {
		var whole bytes.Buffer
		_, err := w.series.GetWAL(w.t.Context(), string(name), &whole)
		if err == nil {
			return whole.Bytes()
		}
		if !errors.Is(err, objectstore.ErrNotExist) {
			w.t.Fatal(err)
		}
		out, err := w.chain(name)
		if err != nil && !errors.Is(err, objectstore.ErrNotExist) {
			w.t.Fatal(err)
		}
		// Tails go when the segment comes, or a longer tail: what was listed may be gone.
		if _, gone := w.series.StatWAL(w.t.Context(), string(name)); err == nil && gone != nil {
			return out
		}
	}
}

// chain puts together what the tails of a segment hold.
func (w *world) chain(name postgres.SegmentName) ([]byte, error) {
	w.t.Helper()
	var out []byte
	start := name.Start(w.size)
	tails := w.tails(name)
	for {
		at := start + postgres.LSN(len(out))
		best := repository.Tail{End: at}
		for _, t := range tails {
			if t.Start <= at && t.End > best.End {
				best = t
			}
		}
		if best.End == at {
			return out, nil
		}
		var b bytes.Buffer
		if _, err := w.series.GetTail(w.t.Context(), best, &b); err != nil {
			return nil, err
		}
		out = append(out, b.Bytes()[at-best.Start:]...)
	}
}

// compare checks that the repository holds what the server has in pg_wal, from start to a durable position.
func (w *world) compare(c *pgtest.Cluster, timeline postgres.Timeline, start, durable postgres.LSN) {
	w.t.Helper()
	for at := w.size.Start(w.size.Number(start)); at < durable; at += postgres.LSN(w.size) {
		name := postgres.SegmentAt(timeline, at, w.size)
		got := w.assemble(name)
		n := int(min(postgres.LSN(w.size), durable-at))
		if len(got) < n {
			w.t.Fatalf("%s: the repository holds %d bytes, expected at least %d: durable up to %s, tails %v", name, len(got), n, durable, w.tails(name))
		}
		want, err := os.ReadFile(filepath.Join(c.WALDir, string(name)))
		if err != nil {
			w.t.Fatal(err)
		}
		if !bytes.Equal(got[:n], want[:n]) {
			w.t.Fatalf("%s: the repository holds other bytes than pg_wal up to %s", name, durable)
		}
	}
}

// recover starts a server from the copy of before with what the repository holds from a position on, and nothing else.
func (w *world) recover(start postgres.LSN) *pgtest.Cluster {
	w.t.Helper()
	dir := pgtest.Dir(w.t)
	archive := filepath.Join(dir, "archive")
	if err := os.Mkdir(archive, 0o755); err != nil {
		w.t.Fatal(err)
	}
	for name := postgres.SegmentAt(1, start, w.size); ; name = name.Next(w.size) {
		b := w.assemble(name)
		if len(b) == 0 {
			break
		}
		b = append(b, make([]byte, int(w.size)-len(b))...)
		if err := os.WriteFile(filepath.Join(archive, string(name)), b, 0o644); err != nil {
			w.t.Fatal(err)
		}
	}
	data := filepath.Join(dir, "data")
	w.copy(w.base, data)
	entries, err := filepath.Glob(filepath.Join(data, "pg_wal", "0*"))
	if err != nil {
		w.t.Fatal(err)
	}
	for _, e := range entries {
		if err := os.Remove(e); err != nil {
			w.t.Fatal(err)
		}
	}
	if err := os.WriteFile(filepath.Join(data, "recovery.signal"), nil, 0o600); err != nil {
		w.t.Fatal(err)
	}
	pgtest.Chown(w.t, data)
	c := pgtest.Start(w.t, pgtest.Options{Major: w.pg.Major, DataDir: data, Settings: map[string]string{
		"restore_command": "cp " + archive + "/%f %p", "synchronous_standby_names": "", "archive_mode": "off"}})
	for deadline := time.Now().Add(30 * time.Second); c.Scalar("select pg_is_in_recovery()::text") == "true"; time.Sleep(20 * time.Millisecond) {
		if time.Now().After(deadline) {
			w.t.Fatal("the recovered server is not there after 30 s")
		}
	}
	return c
}

// flushed is where the server's WAL stands.
func flushed(t *testing.T, c *pgtest.Cluster) postgres.LSN {
	t.Helper()
	lsn, err := postgres.ParseLSN(c.Scalar("select pg_current_wal_flush_lsn()::text"))
	if err != nil {
		t.Fatal(err)
	}
	return lsn
}

// durable waits until WAL up to lsn is durable, and returns how far it is then.
func (r *running) durable(lsn postgres.LSN, within time.Duration) postgres.LSN {
	r.w.t.Helper()
	for deadline := time.Now().Add(within); ; time.Sleep(2 * time.Millisecond) {
		p := r.Position()
		if p.Durable >= lsn {
			return p.Durable
		}
		if time.Now().After(deadline) {
			r.w.t.Fatalf("after %s durable up to %s, expected %s: %+v, %+v", within, p.Durable, lsn, p, r.Status())
		}
	}
}

// writer commits rows one after the other until it is stopped, whatever happens to the server.
type writer struct {
	c      *pgtest.Cluster
	cancel context.CancelFunc
	done   chan struct{}

	mu    sync.Mutex
	acked []int64
}

// write commits numbers from first on, with a text of size bytes in each row, pausing in between.
func write(t *testing.T, c *pgtest.Cluster, first int64, size int, pause time.Duration) *writer {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	w := &writer{c: c, cancel: cancel, done: make(chan struct{})}
	go func() {
		defer close(w.done)
		for n := first; ctx.Err() == nil; {
			conn, err := postgres.Connect(ctx, postgres.ConnectOptions{SocketDirectory: c.SocketDir, Port: c.Port, Owner: c.Owner, User: c.Owner})
			if err != nil {
				time.Sleep(10 * time.Millisecond)
				continue
			}
			for ctx.Err() == nil {
				_, err := conn.Exec(ctx, "insert into public.t select $1::bigint, (select string_agg(md5(($1::bigint * i)::text), '') from generate_series(1, $2::int) i)", n, size/32)
				if err == nil {
					w.mu.Lock()
					w.acked = append(w.acked, n)
					w.mu.Unlock()
				}
				n++
				if err != nil {
					break
				}
				time.Sleep(pause)
			}
			_ = conn.Close(context.Background())
		}
	}()
	t.Cleanup(func() { w.stop() })
	return w
}

// stop ends the writer and returns the numbers that were acknowledged.
func (w *writer) stop() []int64 {
	w.cancel()
	<-w.done
	return w.so()
}

func (w *writer) so() []int64 {
	w.mu.Lock()
	defer w.mu.Unlock()
	return slices.Clone(w.acked)
}

// lost are the acknowledged numbers that a recovered server does not have.
func lost(c *pgtest.Cluster, acked []int64) string {
	return c.Scalar("select coalesce((select string_agg(n::text, ' ') from unnest($1::bigint[]) n where not exists (select from t where t.n = n.n)), '')", acked)
}

func eventually(t *testing.T, what string, within time.Duration, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(within); !ok(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("after %s still not so: %s", within, what)
		}
	}
}

// conninfo is how a standby reaches the server.
func (w *world) conninfo() string {
	return fmt.Sprintf("host=%s port=%d user=%s", w.pg.SocketDir, w.pg.Port, w.pg.Owner)
}

func (w *world) touch(path string) {
	w.t.Helper()
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		w.t.Fatal(err)
	}
	pgtest.Chown(w.t, path)
}
