package stream

import (
	"context"
	"errors"
	"fmt"
	"io"
	"iter"
	"log/slog"
	"slices"
	"sync"
	"time"

	"github.com/jackc/pgx/v5/pgconn"

	"github.com/pgark/terraform-provider-pgark/internal/engine/postgres"
	"github.com/pgark/terraform-provider-pgark/internal/engine/repository"
)

// Archive is what a Streamer needs of a series.
type Archive interface {
	ID() repository.SeriesID
	PutTail(ctx context.Context, t repository.Tail, info repository.WALInfo, raw []byte) (storedSize int64, err error)
	ListTails(ctx context.Context, t postgres.Timeline, from, to postgres.LSN) iter.Seq2[repository.Tail, error]
	DeleteTails(ctx context.Context, tails ...repository.Tail) error
	PutWAL(ctx context.Context, info repository.WALInfo, raw io.ReaderAt) (stored bool, storedSize int64, err error)
}

var _ Archive = (*repository.Series)(nil)

// Options of a Streamer. The first four have no default.
type Options struct {
	// Connect opens a replication connection. Its application name is what synchronous_standby_names has to name.
	Connect func(ctx context.Context) (*postgres.Replication, error)

	Archive     Archive
	SystemID    postgres.SystemID
	SegmentSize postgres.SegmentSize

	Host               string        // who stores, for the record
	MaxLag             time.Duration // how old WAL with a commit in it may become before it is durable; default 1 s
	MaxRequestsPerHour int64         // bounds the tails stored; 0: as many as MaxLag takes. Not with Synchronous
	Synchronous        bool          // commits wait until they are durable: store every bit of WAL at once
	Slot               string        // made if absent, and moved with what is durable; default: none

	// Completed is told of every segment whose end the stream has passed: it lies whole in pg_wal, unless the server has
	// removed it meanwhile. It must not block.
	Completed func(postgres.SegmentName)

	// Unstored lists finished segments that are not durable in the repository and will be: those that SegmentStored is
	// going to name. It is asked when a timeline is begun, so that the durable position does not run ahead of WAL that
	// an earlier run of the runner, or an outage, left behind. While it fails nothing is streamed. Default: none.
	Unstored func() ([]postgres.SegmentName, error)

	Log *slog.Logger // default: none
}

func (o *Options) applyDefaults() {
	if o.MaxLag == 0 {
		o.MaxLag = time.Second
	}
	if o.Completed == nil {
		o.Completed = func(postgres.SegmentName) {}
	}
	if o.Unstored == nil {
		o.Unstored = func() ([]postgres.SegmentName, error) { return nil, nil }
	}
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
}

// Streamer streams one instance's WAL. Safe for concurrent use.
type Streamer struct {
	o      Options
	budget *budget

	wakeUploads  chan struct{} // capacity 1 each: something has changed
	wakeReports  chan struct{}
	wakeReceiver chan struct{}

	mu          sync.Mutex // guards what follows; nothing is called under it that blocks
	ledgers     []*ledger  // of timelines, the current one last
	stored      []postgres.SegmentName
	histories   map[postgres.Timeline]bool // whose file is stored, or about to be
	account     account
	link        link
	rejoining   bool // the next connection goes on with the one before
	deleting    bool
	deleteAfter time.Time
	undeletable bool // the store has refused
}

// New prepares a Streamer; Run makes it work.
func New(o Options) (*Streamer, error) {
	o.applyDefaults()
	switch {
	case o.Connect == nil:
		return nil, errors.New("wal streamer: no way to connect given")
	case o.Archive == nil:
		return nil, errors.New("wal streamer: no archive given")
	case o.SystemID == 0:
		return nil, errors.New("wal streamer: no system identifier given")
	case !o.SegmentSize.Valid():
		return nil, fmt.Errorf("wal streamer: segment size %d: expected a power of two from 1 MiB to 1 GiB", uint64(o.SegmentSize))
	case o.MaxLag < 0 || o.MaxRequestsPerHour < 0:
		return nil, fmt.Errorf("wal streamer: max_lag %s, max_requests_per_hour %d: expected none below 0", o.MaxLag, o.MaxRequestsPerHour)
	case o.Synchronous && o.MaxRequestsPerHour > 0:
		return nil, fmt.Errorf("wal streamer: max_requests_per_hour %d: expected none when commits wait", o.MaxRequestsPerHour)
	}
	return &Streamer{
		o:            o,
		budget:       newBudget(o.MaxRequestsPerHour),
		wakeUploads:  make(chan struct{}, 1),
		wakeReports:  make(chan struct{}, 1),
		wakeReceiver: make(chan struct{}, 1),
		histories:    make(map[postgres.Timeline]bool),
	}, nil
}

// ErrOtherCluster says that the server has another system identifier than the one that is protected.
var ErrOtherCluster = errors.New("the server is another cluster")

const (
	reconnectFirst = 200 * time.Millisecond
	reconnectMost  = 10 * time.Second

	// reconnectWhileDown is the longest wait while no server listens.
	reconnectWhileDown = 500 * time.Millisecond
)

// Run streams until ctx ends, over as many connections as it takes, then stores what it has received, which takes 5
// seconds at most. It returns nil then, and ErrOtherCluster if it met another cluster. It is called once.
func (s *Streamer) Run(ctx context.Context) error {
	uploads, stop := context.WithCancel(context.WithoutCancel(ctx))
	ctx, cancel := context.WithCancel(ctx)
	var wg sync.WaitGroup
	wg.Go(func() { s.upload(uploads) })
	defer wg.Wait()
	defer cancel()
	defer stop()

	wait := reconnectFirst
	for {
		streamed, err := s.connection(ctx, &wg)
		s.disconnected()
		switch {
		case ctx.Err() != nil:
			return nil
		case errors.Is(err, ErrOtherCluster):
			return err
		case errors.Is(err, errRejoin):
			s.o.Log.Debug("read the segment in progress again")
			s.mu.Lock()
			s.rejoining = true
			s.mu.Unlock()
			wait = reconnectFirst
			continue
		}
		if streamed {
			wait = reconnectFirst
		}
		if postgres.IsNotRunning(err) || startsUp(err) {
			// The first commits of a server that is back must not wait for us, and asking costs nothing.
			wait = min(wait, reconnectWhileDown)
		}
		s.lost(err)
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(wait):
		}
		wait = min(2*wait, reconnectMost)
	}
}

// startsUp tells whether a server listens that takes no connections yet: cannot_connect_now.
func startsUp(err error) bool {
	var pg *pgconn.PgError
	return errors.As(err, &pg) && pg.Code == "57P03"
}

// disconnected notes that nothing is received any more.
func (s *Streamer) disconnected() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.account.connected = false
	if l := s.current(); l != nil {
		l.interrupted()
	}
}

// lost says why a connection ended, once for each reason.
func (s *Streamer) lost(err error) {
	now := time.Now()
	s.mu.Lock()
	repeated := s.account.connection == err.Error()
	s.account.connection = err.Error()
	if !errors.Is(err, postgres.ErrServerEnded) {
		s.account.failed(now, err.Error())
	}
	if errors.Is(err, errDiverged) {
		// What was streamed before is no part of this server's WAL: nothing in memory can be relied on.
		s.ledgers = s.ledgers[:len(s.ledgers)-1]
	}
	s.mu.Unlock()
	level := slog.LevelWarn
	switch {
	case repeated:
		level = slog.LevelDebug
	case errors.Is(err, postgres.ErrServerEnded):
		level = slog.LevelInfo
	case errors.Is(err, errDiverged):
		level = slog.LevelError
	}
	s.o.Log.Log(context.Background(), level, "wal streaming was interrupted", "error", err)
}

// current is the ledger of the timeline that is streamed; nil before the first.
func (s *Streamer) current() *ledger {
	if len(s.ledgers) == 0 {
		return nil
	}
	return s.ledgers[len(s.ledgers)-1]
}

func (s *Streamer) poke(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}

// SegmentStored says that a whole segment is durable in the repository: it counts as such, and its tails are deleted. It
// may come before the stream has passed the segment, and for segments that the Streamer does not know.
func (s *Streamer) SegmentStored(name postgres.SegmentName) {
	now := time.Now()
	s.mu.Lock()
	if len(s.stored) == rememberStored {
		s.stored = slices.Delete(s.stored, 0, 1)
	}
	s.stored = append(s.stored, name)
	for _, l := range s.ledgers {
		l.segmentStored(name)
	}
	notices := s.changes(now, nil)
	s.mu.Unlock()
	s.poke(s.wakeUploads)
	s.poke(s.wakeReports)
	s.poke(s.wakeReceiver)
	s.say(notices)
}

// SegmentLost says that a finished segment is gone before it was durable: nobody waits for it any more, least of all
// commits that came after it.
func (s *Streamer) SegmentLost(name postgres.SegmentName) {
	now := time.Now()
	s.mu.Lock()
	for _, l := range s.ledgers {
		l.segmentLost(name)
	}
	notices := s.changes(now, nil)
	s.mu.Unlock()
	s.poke(s.wakeReports)
	s.say(notices)
}

// Position is how far WAL has come.
type Position struct {
	Timeline      postgres.Timeline // 0: nothing was streamed yet
	Received      postgres.LSN      // end of the last record received whole
	ServerEnd     postgres.LSN      // where the server's WAL ended when it last said so
	Durable       postgres.LSN      // all before it is durable in the repository; above Received if the archiver is faster
	OldestPending time.Time         // when the oldest WAL that is not durable was received; zero: all is
}

// Position tells how far WAL has come.
func (s *Streamer) Position() Position {
	s.mu.Lock()
	defer s.mu.Unlock()
	l := s.current()
	if l == nil {
		return Position{}
	}
	return Position{Timeline: l.timeline, Received: l.ends, ServerEnd: l.serverEnd, Durable: l.durable(), OldestPending: l.oldest()}
}
