package wal

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"time"

	"github.com/pgark/terraform-provider-pgark/internal/engine/daemon/control"
	"github.com/pgark/terraform-provider-pgark/internal/engine/objectstore"
	"github.com/pgark/terraform-provider-pgark/internal/engine/repository"
)

// What failing to store a file says.
type blame int

const (
	blameFile  blame = iota // the file, or how it is read: others may get through
	blameStore              // the repository, or the way there: any other file would have fared the same
)

// classify judges an error of storing a file: whose fault it is, and what it says of the repository.
func classify(err error) (blame, control.StoreState) {
	var conflict *repository.WALConflictError
	var corrupt *repository.CorruptError
	var format *repository.FormatError
	switch {
	case errors.As(err, &conflict), errors.As(err, &corrupt), errors.As(err, &format):
		return blameFile, control.StoreConflicting // what is stored under the name is not this file
	case errors.Is(err, objectstore.ErrNoBucket):
		return blameStore, control.StoreMissing
	case errors.Is(err, objectstore.ErrReadOnly):
		return blameStore, control.StoreReadOnly
	case errors.Is(err, objectstore.ErrFull):
		return blameStore, control.StoreFull
	case errors.Is(err, objectstore.ErrAccess): // ErrExpired and ErrClock come with it
		return blameStore, control.StoreDenied
	case errors.Is(err, objectstore.ErrBusy), errors.Is(err, objectstore.ErrRegion):
		return blameStore, control.StoreRefusing
	case objectstore.IsTransient(err):
		return blameStore, control.StoreAway
	}
	// No answer that could be made sense of: a certificate, a name, a proxy in between.
	return blameStore, control.StoreAway
}

const (
	// failingAfter is how long the repository must have taken nothing before files go into the temporary folder, and
	// before what may pass by itself is called a state. It rides out a hiccup.
	failingAfter = 5 * time.Second

	// While the repository takes nothing, one file at a time is tried, this far apart.
	probeFirst = time.Second
	probeMost  = 5 * time.Second
)

// health judges the repository by what came of uploads. Not safe for concurrent use.
type health struct {
	maxLag time.Duration

	since   time.Time // nothing has got through since; zero: the latest upload did
	success time.Time // when the latest did
	err     error     // of the latest failure, while since is set
	state   control.StoreState
	failed  int
	retry   time.Time // no attempt before

	latency time.Duration // of an upload, smoothed
	slow    bool
}

// succeeded notes an upload. Only one that was not a mere comparison tells how fast the repository is.
func (h *health) succeeded(began, now time.Time, uploaded bool) {
	h.since, h.err, h.failed, h.retry, h.state = time.Time{}, nil, 0, time.Time{}, control.StoreReachable
	h.success = now
	if !uploaded {
		return
	}
	took := now.Sub(began)
	if h.latency == 0 {
		h.latency = took
	}
	h.latency += (took - h.latency) / 8
	switch {
	case h.maxLag <= 0:
	case h.latency > h.maxLag:
		h.slow = true
	case h.latency < h.maxLag*7/10:
		h.slow = false
	}
}

// failure notes one that is the repository's fault. It tells whether others got through meanwhile: then the file was
// merely unlucky.
func (h *health) failure(err error, state control.StoreState, began, now time.Time) (unlucky bool) {
	if h.success.After(began) {
		return true
	}
	if h.since.IsZero() {
		h.since = began
	}
	wait := min(probeFirst<<min(h.failed, 4), probeMost)
	h.err, h.state = err, state
	h.failed++
	h.retry = now.Add(wait/2 + rand.N(wait/2))
	return false
}

// failing tells whether the latest upload failed: files are tried one at a time.
func (h *health) failing() bool { return !h.since.IsZero() }

// away tells whether nothing has got through for so long that the temporary folder is what there is.
func (h *health) away(now time.Time) bool {
	return h.failing() && now.Sub(h.since) >= failingAfter
}

// describe is the state as it is shown.
func (h *health) describe(now time.Time) (control.StoreState, string) {
	switch {
	case h.failing() && (h.away(now) || h.state != control.StoreAway && h.state != control.StoreRefusing):
		return h.state, h.err.Error() // what a server says in so many words needs no confirmation
	case h.slow:
		return control.StoreSlow, fmt.Sprintf("a request takes %s", h.latency.Round(10*time.Millisecond))
	}
	return control.StoreReachable, ""
}

// A backlog is what makes WALArchiving WALCatchingUp, in files that wait; it has passed when few are left.
const (
	backlogFrom = 8
	backlogTo   = 2
)

// condition is what was last said of the repository and of WAL.
type condition struct {
	store      control.StoreState
	wal        control.WALState
	since      time.Time // of wal
	reason     string    // of wal
	storeSince time.Time
}

// review looks at how things stand, and logs what has changed.
func (s *Shipper) review() {
	now := time.Now()
	s.mu.Lock()
	before := s.condition
	after := s.judge(now)
	s.condition = after
	waiting := s.queue.len()
	s.mu.Unlock()

	if after.store != before.store {
		level, text := storeText(after.store)
		attrs := []any{"repository", s.o.Repository, "before", before.store, "state", after.store}
		if after.store == control.StoreReachable {
			attrs = append(attrs, "after", now.Sub(before.storeSince).Round(time.Second))
		} else {
			attrs = append(attrs, "reason", after.reason)
		}
		s.o.Log.Log(context.Background(), level, text, attrs...)
	}
	if after.wal != before.wal {
		level, text := walText(after.wal)
		attrs := []any{"before", before.wal, "state", after.wal, "waiting", waiting}
		if s.spool != nil {
			attrs = append(attrs, "spooled", s.spool.Files(), "spooled_bytes", s.spool.Bytes())
		}
		if after.reason != "" {
			attrs = append(attrs, "reason", after.reason)
		}
		s.o.Log.Log(context.Background(), level, text, attrs...)
	}
}

// judge is called with mu held.
func (s *Shipper) judge(now time.Time) condition {
	c := s.condition
	store, why := s.health.describe(now)
	if store == control.StoreReachable || store == control.StoreSlow {
		if s.conflicting() {
			store, why = control.StoreConflicting, s.conflict.Error()
		}
	}
	if store != c.store {
		c.store, c.storeSince = store, now
	}

	open := s.queue.len() + s.shipping
	spooled := 0
	if s.spool != nil {
		spooled = s.spool.Files()
	}
	state := c.wal
	c.reason = why
	switch {
	case s.health.away(now) && s.spool != nil && s.spoolErr == nil:
		state = control.WALSpooling
	case s.health.away(now):
		state = control.WALHeld
		switch {
		case s.spoolErr != nil:
			c.reason = fmt.Sprintf("%s; and the temporary folder takes no more: %v", why, s.spoolErr)
		case s.spool == nil:
			c.reason = why + "; and there is no temporary folder"
		}
	case spooled > 0 || open > backlogFrom || state == control.WALCatchingUp && open > backlogTo:
		state = control.WALCatchingUp
		if c.reason == "" {
			c.reason = fmt.Sprintf("%d files wait, %d of them in the temporary folder", open+spooled, spooled)
		}
	case s.o.Streaming != nil && s.o.Streaming():
		state = control.WALStreaming
	default:
		state = control.WALArchiving
	}
	if state != c.wal {
		c.wal, c.since = state, now
	}
	return c
}

// storeText says what a state of the repository means for the data.
func storeText(s control.StoreState) (slog.Level, string) {
	switch s {
	case control.StoreReachable:
		return slog.LevelInfo, "the repository takes wal as it should"
	case control.StoreSlow:
		return slog.LevelWarn, "the repository is slow: more than max_lag would be lost with this server"
	case control.StoreAway:
		return slog.LevelError, "the repository cannot be reached: no wal is lost while this server lives"
	case control.StoreRefusing:
		return slog.LevelError, "the repository answers with errors: no wal is lost while this server lives"
	case control.StoreDenied:
		return slog.LevelError, "the repository refuses our credentials: no wal is lost while this server lives, but somebody must renew them"
	case control.StoreReadOnly:
		return slog.LevelError, "the repository takes no writes: no wal is lost while this server lives, but somebody must allow them"
	case control.StoreFull:
		return slog.LevelError, "the repository is full: no wal is lost while this server lives, but somebody must make room"
	case control.StoreMissing:
		return slog.LevelError, "the repository is not there: no wal is lost while this server lives, but somebody must look"
	case control.StoreConflicting:
		return slog.LevelError, "other content is stored under the name of a file of ours, which stays where it is: do two servers write to one series?"
	}
	return slog.LevelError, "the repository: " + string(s)
}

// walText says what becomes of WAL.
func walText(s control.WALState) (slog.Level, string) {
	switch s {
	case control.WALStreaming:
		return slog.LevelInfo, "wal reaches the repository as it is written"
	case control.WALArchiving:
		return slog.LevelInfo, "wal reaches the repository segment by segment"
	case control.WALCatchingUp:
		return slog.LevelInfo, "wal waits and is being caught up with"
	case control.WALSpooling:
		return slog.LevelWarn, "wal goes into the temporary folder until the repository is back"
	case control.WALHeld:
		return slog.LevelError, "wal stays where it is: PostgreSQL keeps it, and pg_wal grows"
	}
	return slog.LevelError, "wal: " + string(s)
}
