package stream

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"sync"
	"time"

	"github.com/pgark/terraform-provider-pgark/internal/engine/postgres"
	"github.com/pgark/terraform-provider-pgark/internal/engine/repository"
)

const (
	// connectTimeout bounds everything up to the first byte of WAL.
	connectTimeout = 30 * time.Second

	// reportEvery is how often the server hears from us: wal_sender_timeout is 60 s by default, and at half of it the
	// server would ask.
	reportEvery = 10 * time.Second

	// askAfter is how long silence may last before we ask for a sign of life, deadAfter how long before the connection
	// is given up. A server with nothing to write says nothing by itself for wal_sender_timeout / 2.
	askAfter  = 10 * time.Second
	deadAfter = 60 * time.Second

	// writeTimeout bounds a report: it is 39 bytes, and fits into any buffer unless the server has stopped reading.
	writeTimeout = 10 * time.Second

	// replyPause is the least time between two answers that say the same: a server that shuts down asks again at once.
	replyPause = 20 * time.Millisecond

	// askedAgain is how soon a question after an answer tells a server that shuts down from one with a short
	// wal_sender_timeout, and askedOften how often in a row.
	askedAgain = 100 * time.Millisecond
	askedOften = 3

	// shutdownGrace is how long a server that shuts down may wait for its last WAL to become durable. It is in pg_wal,
	// and will be stored when the server is back.
	shutdownGrace = 5 * time.Second

	// historyAgain is the wait after a history file could not be stored.
	historyAgain = 10 * time.Second
)

var (
	// errRejoin ends a connection only to begin the segment in progress again.
	errRejoin = errors.New("the segment in progress is to be read again")
	errSilent = fmt.Errorf("the server has been silent for %s, although it was asked for an answer", deadAfter)
	// errLetGo ends a connection that a server which shuts down waits for.
	errLetGo = errors.New("the server shuts down, and its last wal cannot be stored yet: not waited for")
)

// link is the state of a connection.
type link struct {
	asked  time.Time // when the server asked for a report; zero: it has its answer
	paused bool      // we do not receive, because there is no room
}

// connection streams over one connection until that ends, and tells whether anything was received over it.
func (s *Streamer) connection(ctx context.Context, wg *sync.WaitGroup) (streamed bool, err error) {
	begin, cancel := context.WithTimeoutCause(ctx, connectTimeout, fmt.Errorf("begin to stream wal: not done within %s", connectTimeout))
	defer cancel()
	conn, err := s.o.Connect(begin)
	if err != nil {
		return false, err
	}
	defer func() { _ = conn.Close() }() // all that it had was reported
	sys, err := conn.Identify(begin)
	if err != nil {
		return false, err
	}
	if sys.ID != s.o.SystemID {
		return false, fmt.Errorf("%w: found system identifier %s, expected %s", ErrOtherCluster, sys.ID, s.o.SystemID)
	}
	if s.o.Slot != "" {
		if _, err := conn.EnsureSlot(begin, s.o.Slot); err != nil {
			return false, err
		}
	}

	timeline, at := sys.Timeline, sys.Flushed
	for {
		from := s.o.SegmentSize.Start(s.o.SegmentSize.Number(at))
		s.keepHistory(ctx, begin, conn, timeline, wg)
		l, err := s.follow(timeline, from, sys.Flushed)
		if err != nil {
			return streamed, err
		}
		err = conn.Start(begin, timeline, from, s.o.Slot)
		if err == nil {
			s.begun(!streamed)
			var some bool
			some, err = s.receive(ctx, conn, l, from)
			streamed = streamed || some
		}
		var end *postgres.TimelineEnd
		if !errors.As(err, &end) || end.Next <= timeline {
			return streamed, err
		}
		s.o.Log.Info("the timeline has ended", "timeline", uint32(timeline), "next", uint32(end.Next), "position", end.Begin.String())
		s.hurry()
		timeline, at = end.Next, end.Begin
		cancel()
		begin, cancel = context.WithTimeoutCause(ctx, connectTimeout, fmt.Errorf("begin to stream timeline %d: not done within %s", uint32(timeline), connectTimeout))
		defer cancel()
	}
}

// follow returns the ledger of a timeline, a new one if it is not the one that was followed so far.
func (s *Streamer) follow(timeline postgres.Timeline, from, serverEnd postgres.LSN) (*ledger, error) {
	now := time.Now()
	unstored, err := s.o.Unstored()
	if err != nil {
		return nil, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	before := s.current()
	if before == nil || before.timeline != timeline {
		awaited := unstored
		if before != nil && before.timeline < timeline {
			for _, name := range before.lacking() {
				if !slices.Contains(awaited, name) {
					awaited = append(awaited, name)
				}
			}
		}
		l := &ledger{timeline: timeline, size: s.o.SegmentSize, maxLag: s.o.MaxLag, synchronous: s.o.Synchronous, budget: s.budget}
		l.wholes = slices.Clone(s.stored)
		l.serverEnd = serverEnd
		l.begin(now, from, awaited)
		if before != nil {
			before.interrupted()
			l.latency = before.latency
		}
		s.ledgers = append(s.ledgers, l)
	}
	l := s.current()
	l.started(from, serverEnd)
	return l, nil
}

// begun counts a connection that streams, unless it only goes on with what another began.
func (s *Streamer) begun(first bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if first && !s.rejoining {
		s.account.streams++
	}
	s.rejoining = false
}

// receive takes what comes until the stream ends.
func (s *Streamer) receive(ctx context.Context, conn *postgres.Replication, l *ledger, from postgres.LSN) (streamed bool, err error) {
	s.mu.Lock()
	now := time.Now()
	s.account.connected, s.account.since, s.account.heard = true, now, now
	s.link = link{}
	s.mu.Unlock()
	s.o.Log.Info("streaming wal", "timeline", uint32(l.timeline), "from", from.String())

	ctx, cancel := context.WithCancelCause(ctx)
	var wg sync.WaitGroup
	defer wg.Wait()
	defer cancel(nil)
	wg.Go(func() {
		if err := s.report(ctx, conn, l); err != nil {
			cancel(err)
		}
	})
	scanner := postgres.NewRecordScanner(l.timeline, from, s.o.SegmentSize)
	for {
		m, err := conn.Receive(ctx)
		if err != nil {
			if errors.Is(err, postgres.ErrServerEnded) {
				s.hurry()
			}
			return streamed, err
		}
		streamed = true
		if err := s.take(l, scanner, m); err != nil {
			return streamed, err
		}
		if len(m.Data) > 0 {
			if err := s.awaitRoom(ctx, l); err != nil {
				return streamed, err
			}
		}
	}
}

// take enters a message into the ledger.
func (s *Streamer) take(l *ledger, scanner *postgres.RecordScanner, m postgres.StreamMessage) error {
	now := time.Now()
	s.mu.Lock()
	s.account.heard = now
	l.serverEnd = max(l.serverEnd, m.ServerEnd)
	if m.Reply {
		s.link.asked = now
		s.poke(s.wakeReports)
	}
	at := l.at
	s.mu.Unlock()
	if len(m.Data) > 0 && m.Start != at {
		return fmt.Errorf("stream timeline %d: found wal at %s, expected %s", uint32(l.timeline), m.Start, at)
	}
	for b := m.Data; len(b) > 0; {
		s.mu.Lock()
		n := l.stretch(l.at, len(b))
		s.mu.Unlock()
		if _, err := scanner.Write(b[:n]); err != nil {
			return fmt.Errorf("stream timeline %d: %w", uint32(l.timeline), err)
		}
		passed, ends := scanner.Take(), scanner.End()
		s.mu.Lock()
		err := l.arrive(now, b[:n], ends, passed)
		completed := l.takeCompleted()
		notices := s.changes(now, nil)
		s.mu.Unlock()
		s.say(notices)
		if err != nil {
			return err
		}
		for _, name := range completed {
			s.o.Completed(name)
		}
		b = b[n:]
	}
	if len(m.Data) > 0 {
		s.poke(s.wakeUploads)
	}
	return nil
}

// awaitRoom returns once there is room for more, which is at once unless the server sends what it has had for long.
func (s *Streamer) awaitRoom(ctx context.Context, l *ledger) error {
	for {
		s.mu.Lock()
		ok := l.room()
		s.link.paused = !ok
		if ok {
			s.account.heard = time.Now()
		}
		s.mu.Unlock()
		if ok {
			return nil
		}
		select {
		case <-s.wakeReceiver:
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-time.After(time.Second): // WAL that was given up makes room, too
		}
	}
}

// report tells the server how far WAL has come, as soon as it is durable, when it asks, and every now and then. It ends
// the connection when nothing comes any more, when the server waits in vain, or when the stream is to begin again.
func (s *Streamer) report(ctx context.Context, conn *postgres.Replication, l *ledger) error {
	// A server that waits for durable positions when it shuts down, or takes whoever reports them for a synchronous
	// standby, is to see them only where they are wanted.
	tellDurable := s.o.Synchronous || s.o.Slot != ""
	var told postgres.LSN
	var reported, pinged, stopping time.Time
	again := 0
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		now := time.Now()
		s.mu.Lock()
		durable, received := l.durable(), max(l.at, l.want)
		heard, asked, paused := s.account.heard, s.link.asked, s.link.paused
		rejoin, wantsRejoin := l.rejoinAt()
		failing := l.failures > 0
		s.mu.Unlock()
		if !tellDurable {
			durable = 0
		}
		if wantsRejoin && !rejoin.After(now) {
			return errRejoin
		}
		silence := now.Sub(heard)
		if silence >= deadAfter && !paused {
			return errSilent
		}
		ping := silence >= askAfter && now.Sub(pinged) >= askAfter
		reply := !asked.IsZero() && (durable != told || now.Sub(reported) >= replyPause)
		next := earlier(reported.Add(reportEvery), later(heard, pinged).Add(askAfter))
		if wantsRejoin {
			next = earlier(next, rejoin)
		}
		if !asked.IsZero() && !reply {
			next = earlier(next, reported.Add(replyPause))
		}

		if durable != told || reply || ping || now.Sub(reported) >= reportEvery {
			if reply {
				if again++; asked.Sub(reported) > askedAgain {
					again = 0
				}
				s.mu.Lock()
				s.link.asked = time.Time{}
				s.mu.Unlock()
			}
			send, cancel := context.WithTimeoutCause(ctx, writeTimeout, fmt.Errorf("report to the server: not taken within %s", writeTimeout))
			err := conn.Report(send, max(received, durable), durable, ping)
			cancel()
			if err != nil {
				return err
			}
			if ping {
				pinged = now
			}
			told, reported = durable, now
			next = earlier(now.Add(reportEvery), later(heard, pinged).Add(askAfter))
			if wantsRejoin {
				next = earlier(next, rejoin)
			}
		}
		if again >= askedOften && tellDurable && durable < received {
			if stopping.IsZero() {
				stopping = now
				s.hurry()
			}
			if failing || now.Sub(stopping) > shutdownGrace {
				return errLetGo
			}
		} else {
			stopping = time.Time{}
		}

		timer.Reset(max(time.Until(next), time.Millisecond))
		select {
		case <-s.wakeReports:
		case <-timer.C:
		case <-ctx.Done():
			return nil
		}
	}
}

// keepHistory stores a timeline's history file, once, in the background: the server's archiver may not do it, as that of
// a standby does not.
func (s *Streamer) keepHistory(ctx, begin context.Context, conn *postgres.Replication, t postgres.Timeline, wg *sync.WaitGroup) {
	s.mu.Lock()
	known := t <= 1 || s.histories[t]
	s.mu.Unlock()
	if known {
		return
	}
	content, err := conn.History(begin, t)
	if err != nil {
		s.o.Log.Warn("read the history of a timeline", "timeline", uint32(t), "error", err)
		return
	}
	s.mu.Lock()
	s.histories[t] = true
	s.mu.Unlock()
	wg.Go(func() {
		said := false
		for {
			attempt, cancel := context.WithTimeout(ctx, connectTimeout)
			info := repository.WALInfo{Name: postgres.HistoryFileName(t), Size: int64(len(content)), StoredAt: time.Now().UTC(), Host: s.o.Host}
			_, _, err := s.o.Archive.PutWAL(attempt, info, bytes.NewReader(content))
			cancel()
			if err == nil || ctx.Err() != nil {
				return
			}
			if !said {
				said = true
				s.o.Log.Log(ctx, slog.LevelWarn, "store the history of a timeline", "timeline", uint32(t), "error", err)
			}
			var conflict *repository.WALConflictError
			if errors.As(err, &conflict) {
				s.mu.Lock()
				s.account.failed(time.Now(), err.Error())
				s.mu.Unlock()
				return
			}
			select {
			case <-time.After(historyAgain):
			case <-ctx.Done():
				return
			}
		}
	})
}
