package stream

import (
	"context"
	"fmt"
	"log/slog"
	"time"

	"github.com/pgark/terraform-provider-pgark/internal/engine/daemon/control"
)

// account is what Status tells, and what was said in the log: each change of state is one line.
type account struct {
	connected  bool
	since      time.Time
	streams    int64 // connections that have streamed
	heard      time.Time
	tails      int64
	tailBytes  int64
	lastError  string
	lastErrAt  time.Time
	connection string // the latest error of a connection, so that one that stays is said once

	saidFailing, saidDropped, saidStarved, saidConflict bool
}

func (a *account) failed(now time.Time, text string) { a.lastError, a.lastErrAt = text, now }

// notice is a line for the log.
type notice struct {
	level slog.Level
	text  string
	args  []any
}

func (s *Streamer) say(notices []notice) {
	for _, n := range notices {
		s.o.Log.Log(context.Background(), n.level, n.text, n.args...)
	}
}

// changes tells what is new, to be said once mu is released. err is why the store has failed, if it just did.
func (s *Streamer) changes(now time.Time, err error) []notice {
	var out []notice
	a, l := &s.account, s.current()
	if l == nil {
		return nil
	}
	failing, starved := false, false
	for _, l := range s.ledgers {
		failing = failing || l.failures > 0
		starved = starved || l.starved
	}
	if failing != a.saidFailing {
		a.saidFailing = failing
		switch {
		case failing && s.o.Synchronous:
			a.failed(now, fmt.Sprintf("commits wait: wal cannot be stored: %v", err))
			out = append(out, notice{slog.LevelError, "commits wait, because wal cannot be stored", []any{"error", err}})
		case failing:
			out = append(out, notice{slog.LevelWarn, "wal cannot be stored as it is written", []any{"error", err}})
		default:
			out = append(out, notice{slog.LevelInfo, "wal can be stored again", nil})
		}
	}
	if l.dropped != a.saidDropped {
		a.saidDropped = l.dropped
		if l.dropped {
			a.failed(now, "too much wal is waiting to be stored: only whole segments are, for now")
			out = append(out, notice{slog.LevelWarn, "wal is stored in whole segments only, until the repository keeps up", []any{"position", l.durable().String()}})
		} else {
			out = append(out, notice{slog.LevelInfo, "wal is stored as it is written again", []any{"position", l.want.String()}})
		}
	}
	if starved && !a.saidStarved {
		a.saidStarved = true
		a.failed(now, fmt.Sprintf("max_requests_per_hour = %d does not suffice for max_lag = %s: wal waits longer", s.o.MaxRequestsPerHour, s.o.MaxLag))
		out = append(out, notice{slog.LevelWarn, "max_requests_per_hour does not suffice for max_lag", []any{"max_requests_per_hour", s.o.MaxRequestsPerHour, "max_lag", s.o.MaxLag}})
	}
	return out
}

// Status tells how the stream fares.
func (s *Streamer) Status() control.StreamStatus {
	s.mu.Lock()
	defer s.mu.Unlock()
	a := s.account
	st := control.StreamStatus{
		Connected: a.connected, Restarts: max(0, a.streams-1), Tails: a.tails, TailBytes: a.tailBytes,
		Synchronous: s.o.Synchronous, Slot: s.o.Slot, LastError: a.lastError,
	}
	if l := s.current(); l != nil {
		st.Timeline = uint32(l.timeline)
		st.ReceivedLSN, st.DurableLSN = l.ends.String(), l.durable().String()
	}
	if a.connected {
		st.Since = &a.since
	}
	if !a.heard.IsZero() {
		st.LastAt = &a.heard
	}
	if !a.lastErrAt.IsZero() {
		st.LastErrorAt = &a.lastErrAt
	}
	return st
}
