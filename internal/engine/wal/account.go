package wal

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/pgark/terraform-provider-pgark/internal/engine/daemon/control"
	"github.com/pgark/terraform-provider-pgark/internal/engine/repository"
)

// counts is what a stretch of shipping amounts to.
type counts struct {
	segments, bytes, storedBytes    int64
	duplicates, failures, conflicts int64
	lastName                        string
	lastAt                          time.Time
	lastError                       string
	lastErrorAt                     time.Time
	maxDelay                        time.Duration
	spooled, gaps                   int64
	lastGap                         string // what the latest one is
}

func (c *counts) stored(r Receipt, delay time.Duration) {
	if !r.Stored {
		c.duplicates++
		return
	}
	c.segments++
	c.bytes += r.Size
	c.storedBytes += r.StoredSize
	c.lastName, c.lastAt = r.Name, r.At
	c.maxDelay = max(c.maxDelay, delay)
}

func (c *counts) failed(err error, at time.Time, conflict bool) {
	c.failures++
	if conflict {
		c.conflicts++
	}
	c.lastError, c.lastErrorAt = err.Error(), at
}

// add undoes the taking away of counts: those of a record that could not be written.
func (c *counts) add(o counts) {
	c.segments += o.segments
	c.bytes += o.bytes
	c.storedBytes += o.storedBytes
	c.duplicates += o.duplicates
	c.failures += o.failures
	c.conflicts += o.conflicts
	c.maxDelay = max(c.maxDelay, o.maxDelay)
	c.spooled += o.spooled
	c.gaps += o.gaps
	if c.lastGap == "" {
		c.lastGap = o.lastGap
	}
	if c.lastErrorAt.Before(o.lastErrorAt) {
		c.lastError, c.lastErrorAt = o.lastError, o.lastErrorAt
	}
}

// Status counts since New, and looks at what waits. Mode, Stream, the positions and the lag are the caller's to fill in.
func (s *Shipper) Status() control.WALStatus {
	pending, oldest, err := s.pending()
	s.review()
	s.mu.Lock()
	c, cond := s.counts, s.condition
	gaps := slices.Clone(s.gaps)
	s.mu.Unlock()

	st := control.WALStatus{
		Segments: c.segments, Bytes: c.bytes, StoredBytes: c.storedBytes,
		Duplicates: c.duplicates, Failures: c.failures, Conflicts: c.conflicts,
		Pending: pending, OldestPending: oldest, LastName: c.lastName, LastError: c.lastError, MaxDelaySeconds: c.maxDelay.Seconds(),
		State: cond.wal, Since: cond.since, Reason: cond.reason, Store: cond.store, Gaps: gaps, GapCount: c.gaps,
	}
	if st.Gaps == nil {
		st.Gaps = []control.WALGap{}
	}
	if s.spool != nil {
		spool := s.spool.Status()
		st.Spool = &spool
	}
	if !c.lastAt.IsZero() {
		st.LastStoredAt = &c.lastAt
	}
	if !c.lastErrorAt.IsZero() {
		st.LastErrorAt = &c.lastErrorAt
	}
	if err != nil && st.LastError == "" {
		now := time.Now()
		st.LastError, st.LastErrorAt = err.Error(), &now
	}
	return st
}

// pending counts what PostgreSQL has finished and was not told about, and is not durable.
func (s *Shipper) pending() (n int, oldest *time.Time, err error) {
	ready, err := s.ready()
	s.mu.Lock()
	names := ready[:0]
	for _, name := range ready {
		if f := s.files[name]; f == nil || f.state != fileStored && f.state != fileSpooled {
			names = append(names, name)
		}
	}
	s.mu.Unlock()
	for _, name := range names {
		info, err := os.Stat(filepath.Join(s.walDir, "archive_status", name+".ready"))
		if err != nil {
			continue // acknowledged meanwhile
		}
		if at := info.ModTime(); oldest == nil || at.Before(*oldest) {
			oldest = &at
		}
		// Names are in the order in which PostgreSQL finished the files, but for histories, which are few and quick.
		break
	}
	return len(names), oldest, err
}

// Waiting counts the files that PostgreSQL has finished and that are not in the repository, those in the temporary folder
// included, and tells since when the oldest of them has waited; zero if there is none.
func (s *Shipper) Waiting() (files int, oldest time.Time) {
	n, at, err := s.pending()
	if err != nil {
		n, at = 0, nil
	}
	if at != nil {
		oldest = *at
	}
	if s.spool != nil {
		spool := s.spool.Status()
		n += spool.Files
		if spool.Oldest != nil && (oldest.IsZero() || spool.Oldest.Before(oldest)) {
			oldest = *spool.Oldest
		}
	}
	return n, oldest
}

// EndSession writes the session record of what was shipped since the last one, if anything was or failed, and begins a
// new one. When the record cannot be written, the next one will tell of both.
func (s *Shipper) EndSession(ctx context.Context) error {
	now := time.Now()
	s.mu.Lock()
	c, began := s.session, s.began
	s.session, s.began = counts{}, now
	s.mu.Unlock()
	if c == (counts{}) {
		return nil
	}
	r := repository.SessionRecord{
		Kind: "wal", Result: "success", StartedAt: began.UTC(), CompletedAt: now.UTC(), Host: s.o.Host,
		SourceBytes: c.bytes, ReadBytes: c.bytes, StoredBytes: c.storedBytes,
		Segments: c.segments, Failures: c.failures, MaxDelay: c.maxDelay.Seconds(), Spooled: c.spooled, Gaps: c.gaps,
	}
	switch {
	case c.gaps > 0:
		r.Result, r.Error = "error", c.lastGap
	case c.conflicts > 0:
		r.Result, r.Error = "error", c.lastError
	case c.failures > 0, c.spooled > 0:
		// What failed was tried again; what did not get through shows as a failure of the next session.
		r.Result, r.Error = "warning", c.lastError
	}
	if err := s.o.Series.PutSession(ctx, r); err != nil {
		s.mu.Lock()
		s.session.add(c)
		s.began = began
		s.mu.Unlock()
		return fmt.Errorf("write the session record of wal shipping since %s: %w", began.UTC().Format(time.RFC3339), err)
	}
	return nil
}
