package wal

import (
	"context"
	"errors"
	"io/fs"
	"log/slog"
	"math/rand/v2"
	"os"
	"path/filepath"
	"time"

	"github.com/pgark/terraform-provider-pgark/internal/engine/postgres"
	"github.com/pgark/terraform-provider-pgark/internal/engine/repository"
)

// task is a file to be shipped.
type task struct {
	file   *file
	spool  bool // into the temporary folder; else the repository
	probe  bool // s.probing is for it
	effort repository.Effort
	memory int64
}

// take makes a file one that is in flight.
func (s *Shipper) take(f *file, t task) func(ctx context.Context) {
	waiting := s.queue.len()
	switch {
	case !s.o.Adaptive, waiting < hastyTo:
		s.hasty = false
	case waiting > hastyFrom:
		s.hasty = true
	}
	if s.hasty {
		t.effort = repository.Hasty
	}
	s.queue.drop(f)
	f.state, f.urgent = fileInFlight, false
	t.memory = s.need()
	s.memory += t.memory
	s.preparing++
	s.shipping++
	s.worked = time.Now()
	return func(ctx context.Context) { s.ship(ctx, t) }
}

// need is the memory of a file that is prepared: itself, and about a third when compressed.
func (s *Shipper) need() int64 {
	size := int64(s.o.SegmentSize)
	if size > readInMemory {
		return 8 << 20 // it goes through a temporary file
	}
	return size + size/3
}

// ship does t.
func (s *Shipper) ship(ctx context.Context, t task) {
	f := t.file
	r, w, err := s.prepare(ctx, t)
	defer s.release(&t)
	if err != nil {
		s.failed(ctx, t, r, err, false)
		return
	}
	defer w.Close()
	if t.spool {
		s.keep(ctx, t, r, w)
		return
	}
	if err := s.gate.enter(ctx); err != nil {
		s.failed(ctx, t, r, err, false)
		return
	}
	began := time.Now()
	stored, size, err := s.o.Series.PutSealed(ctx, w)
	now := time.Now()
	if err != nil {
		s.gate.leave(0, now)
		blamed, state := classify(err)
		if blamed == blameStore && !errors.Is(context.Cause(ctx), ErrStopped) {
			s.mu.Lock()
			unlucky := s.health.failure(err, state, began, now)
			spool := s.health.away(now) && s.spoolWorks(now)
			s.mu.Unlock()
			if spool {
				s.o.Log.Debug("store wal", "name", f.name, "error", err)
				s.keep(ctx, t, r, w)
				return
			}
			s.failed(ctx, t, r, err, !unlucky)
			return
		}
		s.failed(ctx, t, r, err, false)
		return
	}
	uploaded := size
	if !stored {
		uploaded = 0
	}
	s.gate.leave(uploaded, now)
	receipt := Receipt{Name: f.name, Size: r.info.Size, StoredSize: size, Stored: stored, At: now}
	delay := now.Sub(s.finishedAt(f.name, r.identity))
	if s.spool != nil && s.spool.Digest(f.name) == w.Info.Digest {
		s.removeSpooled(f.name) // an earlier run had put it there
	}
	s.mu.Lock()
	s.health.succeeded(began, now, stored)
	s.settleFile(f, r, fileStored, nil)
	f.receipt = receipt
	s.done = append(s.done, f.name)
	s.counted(func(c *counts) { c.stored(receipt, delay) })
	s.mu.Unlock()
	s.o.Log.Debug("wal stored", "name", f.name, "stored_bytes", size, "new", stored, "delay", delay)
	s.durable(receipt)
}

// prepare reads, checks and seals the file. The caller closes what it returns.
func (s *Shipper) prepare(ctx context.Context, t task) (r *reading, w *repository.SealedWAL, err error) {
	f := t.file
	s.mu.Lock()
	asked := f.asked > 0
	var buffer []byte
	if n := len(s.buffers); n > 0 {
		buffer = s.buffers[n-1]
		s.buffers = s.buffers[:n-1]
	}
	s.mu.Unlock()

	r, buffer, err = s.read(f.name, filepath.Join(s.walDir, f.name), buffer, asked)
	if err == nil {
		w, err = s.o.Series.SealWAL(ctx, r.info, r.content, t.effort)
	}
	if err == nil && r.memory == nil {
		// It was read once more meanwhile.
		if info, e := r.file.Stat(); e != nil || identify(info) != r.identity {
			_ = w.Close() // nobody has seen it
			w, err, r.settled, r.began = nil, &unsettledError{}, false, time.Time{}
		}
	}
	r.close()

	s.mu.Lock()
	s.preparing--
	if buffer != nil {
		s.buffers = append(s.buffers, buffer)
	}
	if w != nil {
		s.sealed = w.Size
	}
	s.mu.Unlock()
	s.poke() // a CPU is free
	return r, w, err
}

// release ends a file's flight.
func (s *Shipper) release(t *task) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.memory -= t.memory
	s.shipping--
	if t.probe {
		s.probing = false
	}
}

// settleFile notes what came of an attempt, and wakes those who wait. It is called with mu held.
func (s *Shipper) settleFile(f *file, r *reading, state fileState, err error) {
	f.identity, f.readAt, f.settled = r.identity, r.began, r.settled
	f.state, f.err = state, err
	if err == nil {
		f.attempts = 0
		delete(s.conflicts, f.name)
	}
	close(s.changed)
	s.changed = make(chan struct{})
}

func (s *Shipper) counted(count func(c *counts)) {
	count(&s.counts)
	count(&s.session)
}

// durable tells others that a file is in the repository.
func (s *Shipper) durable(r Receipt) {
	s.there(r.Name)
	if s.o.Stored != nil {
		s.o.Stored(r)
	}
}

// there tells the watcher that a file is safe.
func (s *Shipper) there(name string) {
	if kind, err := postgres.ParseWALFile(name); err == nil && kind.Kind == postgres.SegmentFile {
		s.watcher.note(kind.Segment)
		poke(s.wakeGaps)
	}
}

// failed notes an attempt that came to nothing. again says that the file itself is not to blame, and need not wait.
func (s *Shipper) failed(ctx context.Context, t task, r *reading, err error, again bool) {
	f := t.file
	now := time.Now()
	var conflict *repository.WALConflictError
	var kept *SpoolConflictError
	var unsettled *unsettledError
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case errors.As(err, &unsettled):
		s.settleFile(f, r, fileWaiting, nil)
		f.notUntil = now.Add(settle)
		s.queue.put(f, now)
		return
	case errors.Is(err, fs.ErrNotExist) && r.began.IsZero() && f.asked == 0:
		// It went between our learning of it and the attempt.
		s.settleFile(f, r, fileWaiting, nil)
		delete(s.files, f.name)
		poke(s.wakeGaps)
		return
	case errors.Is(context.Cause(ctx), ErrStopped):
		s.settleFile(f, r, fileWaiting, nil)
		s.queue.put(f, now)
		return
	}
	isConflict := errors.As(err, &conflict) || errors.As(err, &kept)
	s.counted(func(c *counts) { c.failed(err, now, isConflict) })
	level := slog.LevelWarn
	switch {
	case refused(err):
		s.settleFile(f, r, fileRefused, err)
		level = slog.LevelError
		if isConflict {
			s.conflicts[f.name], s.conflict = err, err
		}
	case again:
		// When the next file is tried is a matter of the repository.
		s.settleFile(f, r, fileWaiting, err)
		f.attempts++
		f.notUntil = time.Time{}
		s.queue.put(f, now)
		if s.health.failed > 1 {
			level = slog.LevelDebug // the state has been said
		}
	default:
		s.settleFile(f, r, fileWaiting, err)
		wait := min(backoffFirst<<min(f.attempts, 6), backoffMost)
		wait = wait/2 + rand.N(wait) // so that the files which failed together do not come back together
		f.attempts++
		f.notUntil = now.Add(wait)
		s.queue.put(f, now)
	}
	s.o.Log.Log(ctx, level, "store wal", "name", f.name, "error", err, "attempt", f.attempts)
}

// keep puts a sealed file into the temporary folder.
func (s *Shipper) keep(ctx context.Context, t task, r *reading, w *repository.SealedWAL) {
	f := t.file
	began := time.Now()
	err := s.spool.Put(w, s.o.Series.ReadSealed)
	now := time.Now()
	if err == nil {
		receipt := Receipt{Name: f.name, Size: r.info.Size, Spooled: true, At: now}
		s.mu.Lock()
		if s.spoolWait.Before(began) { // else another has found no room meanwhile
			s.spoolErr = nil
		}
		s.settleFile(f, r, fileSpooled, nil)
		f.receipt = receipt
		s.done = append(s.done, f.name)
		s.counted(func(c *counts) { c.spooled++ })
		s.mu.Unlock()
		s.o.Log.Debug("wal kept in the temporary folder", "name", f.name, "bytes", w.Size)
		s.there(f.name)
		return
	}
	if refused(err) {
		s.failed(ctx, t, r, err, false)
		return
	}
	s.mu.Lock()
	s.spoolErr, s.spoolWait = err, now.Add(spoolRetry)
	s.mu.Unlock()
	s.failed(ctx, t, r, err, true)
}

// refused tells whether err stays as long as the file is what it is.
func refused(err error) bool {
	var conflict *repository.WALConflictError
	var kept *SpoolConflictError
	var invalid *InvalidError
	return errors.As(err, &conflict) || errors.As(err, &kept) || errors.As(err, &invalid)
}

// finishedAt is when PostgreSQL finished the file: it marked it so.
func (s *Shipper) finishedAt(name string, id identity) time.Time {
	if info, err := os.Stat(filepath.Join(s.walDir, "archive_status", name+".ready")); err == nil {
		return info.ModTime()
	}
	if id.modified.IsZero() {
		return time.Now()
	}
	return id.modified
}

// conflicting tells whether other content keeps a file from being stored. It is called with mu held.
func (s *Shipper) conflicting() bool { return len(s.conflicts) > 0 }
