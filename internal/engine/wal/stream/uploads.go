package stream

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"sync"
	"time"

	"github.com/pgark/terraform-provider-pgark/internal/engine/objectstore"
	"github.com/pgark/terraform-provider-pgark/internal/engine/postgres"
	"github.com/pgark/terraform-provider-pgark/internal/engine/repository"
)

const (
	// putTimeout and putSlowest bound one attempt to store a tail: so long, and as long again as its bytes take at a rate
	// below which tails make no sense. The store retries within.
	putTimeout = 5 * time.Second
	putSlowest = 256 << 10 // bytes a second

	deleteTimeout = 30 * time.Second
	deleteAgain   = time.Minute // after a deletion that failed

	// lastWords is how long a Streamer that ends may take to store what it has received.
	lastWords = 5 * time.Second
)

var errStopped = errors.New("the runner is stopping")

// upload stores tails and deletes superseded ones until ctx ends, then what is left, if that does not take long.
func (s *Streamer) upload(ctx context.Context) {
	work, cancel := context.WithCancelCause(context.WithoutCancel(ctx))
	var wg sync.WaitGroup
	defer wg.Wait()
	defer cancel(errStopped)
	timer := time.NewTimer(0)
	defer timer.Stop()
	done := ctx.Done()
	var deadline <-chan time.Time
	for {
		wake := s.dispatch(work, &wg)
		if done == nil && !s.worthwhile() {
			return
		}
		timer.Stop()
		if !wake.IsZero() {
			timer.Reset(time.Until(wake))
		}
		select {
		case <-s.wakeUploads:
		case <-timer.C:
		case <-deadline:
			return
		case <-done:
			done, deadline = nil, time.After(lastWords)
			s.hurry()
		}
	}
}

// dispatch begins what is to be done now, and says when to look again.
func (s *Streamer) dispatch(ctx context.Context, wg *sync.WaitGroup) (wake time.Time) {
	now := time.Now()
	s.mu.Lock()
	inFlight := 0
	for _, l := range s.ledgers {
		inFlight += len(l.inFlight)
	}
	for _, l := range s.ledgers {
		l.check(now)
		for {
			c, at := l.plan(now, parallelPuts-inFlight)
			if c == nil {
				if !at.IsZero() {
					wake = earlier(wake, at)
				}
				break
			}
			inFlight++
			wg.Go(func() { s.put(ctx, c) })
		}
		if !s.deleting && !s.undeletable && now.After(s.deleteAfter) {
			sweep := l.sweep
			if garbage := l.takeGarbage(); len(garbage)+len(sweep) > 0 {
				l.sweep = nil
				s.deleting = true
				wg.Go(func() { s.remove(ctx, l, garbage, sweep) })
			}
		}
	}
	notices := s.changes(now, nil)
	// Earlier timelines go when nothing of them is left to do.
	s.ledgers = slices.DeleteFunc(s.ledgers, func(l *ledger) bool {
		return l != s.current() && !l.busy() && len(l.lacking()) == 0 && len(l.garbage) == 0
	})
	s.mu.Unlock()
	s.say(notices)
	return wake
}

// hurry wants all that was received stored at once.
func (s *Streamer) hurry() {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, l := range s.ledgers {
		l.hurry(time.Now())
	}
	s.poke(s.wakeUploads)
}

// worthwhile tells whether something is left to be stored, and is likely to be.
func (s *Streamer) worthwhile() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, l := range s.ledgers {
		if l.busy() && l.failures == 0 {
			return true
		}
	}
	return false
}

// put stores one tail.
func (s *Streamer) put(ctx context.Context, c *cut) {
	limit := putTimeout + time.Duration(len(c.raw))*time.Second/putSlowest
	attempt, cancel := context.WithTimeoutCause(ctx, limit, fmt.Errorf("store wal from %s: not done within %s", c.tail, limit.Round(time.Second)))
	defer cancel()
	info := repository.WALInfo{StoredAt: c.begun.UTC(), Host: s.o.Host, FirstTime: moment(c.firstTime), LastTime: moment(c.lastTime)}
	size, err := s.o.Archive.PutTail(attempt, c.tail, info, c.raw)

	now := time.Now()
	var notices []notice
	s.mu.Lock()
	l := c.ledger
	var conflict *repository.WALConflictError
	switch {
	case err == nil:
		l.put(now, c)
		s.account.tails++
		s.account.tailBytes += size
	case errors.As(err, &conflict):
		l.conflict(c)
		s.account.failed(now, err.Error())
		if !s.account.saidConflict {
			s.account.saidConflict = true
			notices = append(notices, notice{slog.LevelError, "another cluster stores wal under the same names: this segment is not streamed",
				[]any{"timeline", uint32(c.tail.Timeline), "segment", string(c.segment.name), "error", err}})
		}
	default:
		l.failed(now, c)
		if context.Cause(ctx) == nil {
			s.account.failed(now, err.Error())
		}
	}
	if context.Cause(ctx) == nil {
		notices = append(notices, s.changes(now, err)...)
	}
	s.mu.Unlock()
	s.poke(s.wakeUploads)
	s.poke(s.wakeReports)
	s.poke(s.wakeReceiver)
	s.say(notices)
}

func moment(t time.Time) *time.Time {
	if t.IsZero() {
		return nil
	}
	return &t
}

// remove deletes tails that nobody needs any more, and all of segments in which an earlier run may have left some.
func (s *Streamer) remove(ctx context.Context, l *ledger, tails []repository.Tail, sweep []postgres.SegmentName) {
	ctx, cancel := context.WithTimeout(ctx, deleteTimeout)
	defer cancel()
	var err error
	var left []postgres.SegmentName
	for _, name := range sweep {
		for t, e := range s.o.Archive.ListTails(ctx, name.Timeline(), name.Start(s.o.SegmentSize), name.End(s.o.SegmentSize)) {
			if e != nil {
				err = e
				left = append(left, name)
				break
			}
			if !slices.ContainsFunc(tails, func(o repository.Tail) bool { return o.Start == t.Start && o.End == t.End }) {
				tails = append(tails, t)
			}
		}
	}
	if len(tails) > 0 {
		if e := s.o.Archive.DeleteTails(ctx, tails...); e != nil {
			err = e
		} else {
			tails = nil
		}
	}

	var notices []notice
	s.mu.Lock()
	s.deleting = false
	switch {
	case err == nil:
	case ctx.Err() != nil || objectstore.IsTransient(err):
		s.deleteAfter = time.Now().Add(deleteAgain)
		l.discard(tails...)
		l.sweep = append(l.sweep, left...)
		l.deleteNow = true
	default:
		// A bucket that takes no deletions is a fine place for backups.
		s.undeletable = true
		notices = append(notices, notice{slog.LevelInfo, "superseded wal tails stay: the repository takes no deletions", []any{"error", err}})
	}
	s.mu.Unlock()
	s.poke(s.wakeUploads)
	s.say(notices)
}
