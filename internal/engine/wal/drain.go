package wal

import (
	"context"
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"time"

	"github.com/pgark/terraform-provider-pgark/internal/engine/postgres"
	"github.com/pgark/terraform-provider-pgark/internal/engine/repository"
)

// drain brings a file from the temporary folder to the repository.
func (s *Shipper) drain(ctx context.Context, name string, probe bool) {
	defer func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		delete(s.draining, name)
		if probe {
			s.probing = false
		}
	}()
	if s.gate.enter(ctx) != nil {
		return // we are stopping
	}
	began := time.Now()
	w, err := s.spool.Read(name, s.o.Series.ReadSealed)
	if err != nil {
		s.gate.leave(0, time.Now())
		s.damaged(name, err)
		return
	}
	info := w.Info
	kept := info.StoredAt
	stored, size, err := s.o.Series.PutSealed(ctx, w)
	_ = w.Close() // it was only read
	now := time.Now()
	if err != nil {
		s.gate.leave(0, now)
		s.notDrained(ctx, name, err, began)
		return
	}
	uploaded := size
	if !stored {
		uploaded = 0
	}
	s.gate.leave(uploaded, now)
	s.removeSpooled(name)
	receipt := Receipt{Name: name, Size: info.Size, StoredSize: size, Stored: stored, At: now}
	s.mu.Lock()
	s.health.succeeded(began, now, stored)
	s.counted(func(c *counts) { c.stored(receipt, now.Sub(kept)) })
	delete(s.conflicts, name)
	switch f := s.files[name]; {
	case f == nil:
	case f.state == fileSpooled:
		f.state, f.receipt = fileStored, receipt
	case f.state == fileRefused:
		// Because the folder had other content: now there is the repository's to compare with.
		f.state, f.notUntil, f.attempts = fileWaiting, time.Time{}, 0
		s.queue.put(f, now)
	}
	close(s.changed)
	s.changed = make(chan struct{})
	s.mu.Unlock()
	s.o.Log.Debug("wal stored from the temporary folder", "name", name, "stored_bytes", size, "new", stored)
	s.durable(receipt)
}

// notDrained notes that a file stays in the temporary folder.
func (s *Shipper) notDrained(ctx context.Context, name string, err error, began time.Time) {
	if errors.Is(context.Cause(ctx), ErrStopped) {
		return
	}
	now := time.Now()
	blamed, state := classify(err)
	var conflict *repository.WALConflictError
	isConflict := errors.As(err, &conflict)
	s.mu.Lock()
	defer s.mu.Unlock()
	s.counted(func(c *counts) { c.failed(err, now, isConflict) })
	level := slog.LevelDebug
	switch {
	case blamed == blameFile:
		// Others go on. It stays for people to look at, and for the next run to try.
		level = slog.LevelError
		s.stuck[name] = true
		s.conflicts[name], s.conflict = err, err
	case s.health.failure(err, state, began, now) || s.health.failed == 1:
		level = slog.LevelWarn
	}
	s.o.Log.Log(ctx, level, "store wal from the temporary folder", "name", name, "error", err)
}

// removeSpooled removes what is durable elsewhere.
func (s *Shipper) removeSpooled(name string) {
	err := s.spool.Remove(name)
	s.mu.Lock()
	defer s.mu.Unlock()
	if err != nil {
		s.stuck[name] = true // the next run finds it stored, and tries again
		s.o.Log.Warn("remove stored wal from the temporary folder", "name", name, "error", err)
		return
	}
	s.spoolErr, s.spoolWait = nil, time.Time{} // there is room
}

// damaged deals with a file in the temporary folder that cannot be stored: if PostgreSQL still has it, it is shipped once
// more.
func (s *Shipper) damaged(name string, err error) {
	var broken *DamagedError
	if !errors.As(err, &broken) {
		s.mu.Lock()
		s.stuck[name] = true
		s.mu.Unlock()
		s.o.Log.Error("read wal in the temporary folder: it will be tried again when the runner is started anew", "name", name, "error", err)
		return
	}
	_, statErr := os.Stat(filepath.Join(s.walDir, name))
	again := statErr == nil
	s.o.Log.Error("wal in the temporary folder is damaged; the file is set aside", "name", name, "error", err, "pg_wal_has_it", again)
	if err := s.spool.SetAside(name); err != nil {
		s.o.Log.Error("set damaged wal aside", "error", err)
		s.mu.Lock()
		s.stuck[name] = true
		s.mu.Unlock()
	}
	kind, err := postgres.ParseWALFile(name)
	if err != nil {
		return // OpenSpool takes no other
	}
	if !again {
		if kind.Kind == postgres.SegmentFile {
			s.watcher.lost(kind.Segment)
		}
		return
	}
	s.mu.Lock()
	f := s.files[name]
	if f == nil {
		f = s.add(name)
	} else if f.state == fileSpooled {
		f.state, f.notUntil = fileWaiting, time.Time{}
		s.queue.put(f, time.Now())
	}
	f.passed = true
	s.mu.Unlock()
}
