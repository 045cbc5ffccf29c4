package wal

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
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
	if c.lastErrorAt.Before(o.lastErrorAt) {
		c.lastError, c.lastErrorAt = o.lastError, o.lastErrorAt
	}
}

// Status counts since New, and looks at what waits.
func (s *Shipper) Status() control.WALStatus {
	ready, err := s.ready()
	s.mu.Lock()
	c := s.counts
	pending := ready[:0]
	for _, name := range ready {
		if f := s.files[name]; f == nil || f.state != fileStored {
			pending = append(pending, name)
		}
	}
	s.mu.Unlock()

	st := control.WALStatus{
		Segments: c.segments, Bytes: c.bytes, StoredBytes: c.storedBytes,
		Duplicates: c.duplicates, Failures: c.failures, Conflicts: c.conflicts,
		Pending: len(pending), LastName: c.lastName, LastError: c.lastError, MaxDelaySeconds: c.maxDelay.Seconds(),
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
	for _, name := range pending {
		info, err := os.Stat(filepath.Join(s.walDir, "archive_status", name+".ready"))
		if err != nil {
			continue // acknowledged meanwhile
		}
		if at := info.ModTime(); st.OldestPending == nil || at.Before(*st.OldestPending) {
			st.OldestPending = &at
		}
		// Names are in the order in which PostgreSQL finished the files, but for histories, which are few and quick.
		break
	}
	return st
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
		Segments: c.segments, Failures: c.failures, MaxDelay: c.maxDelay.Seconds(),
	}
	switch {
	case c.conflicts > 0:
		r.Result, r.Error = "error", c.lastError
	case c.failures > 0:
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
