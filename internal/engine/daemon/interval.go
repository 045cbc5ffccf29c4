package daemon

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/pgark/terraform-provider-pgark/internal/engine/postgres"
)

// interval is the work of interval mode: it makes PostgreSQL finish its segment when something was written to it and
// the interval is over since the last one was finished. A server that does nothing finishes none: PostgreSQL itself
// writes checkpoints and snapshots of running transactions now and then, which nobody would miss.
//
// A position is asked for once an interval, over a connection that does not stay.
type interval struct {
	p     *protection
	every time.Duration

	mu     sync.Mutex // guards what follows
	look   look
	failed string // why the latest turn failed, so that it is logged once
}

// look is what is known of the segment that PostgreSQL writes.
type look struct {
	segment postgres.SegmentName
	records *postgres.RecordScanner
	offset  uint64    // up to where the segment was looked at
	work    bool      // something was found in it that has to be kept
	quietAt time.Time // when nothing had been found last
}

const (
	// serverAgain is the wait after a server could not be asked: it is being restarted, mostly.
	serverAgain = 15 * time.Second

	// flushSoon is more than a commit that does not wait for its WAL is behind (three times wal_writer_delay's default).
	flushSoon = time.Second

	// pageHeaders is the most by which the position of insertion is ahead of what is written when all of it is written:
	// behind a page's end it stands after the next header already (XLogBytePosToRecPtr in xlog.c; the long one has 40).
	pageHeaders = 40

	// interruptedInfo marks a page that begins with the rest of a record (XLP_FIRST_IS_CONTRECORD in xlog_internal.h).
	interruptedInfo = 0x0001
)

func newInterval(p *protection, every time.Duration) *interval {
	return &interval{p: p, every: every}
}

// run takes turns until ctx ends.
func (v *interval) run(ctx context.Context) {
	for {
		next, err := v.turn(ctx)
		if ctx.Err() != nil {
			return
		}
		v.tell(err)
		timer := time.NewTimer(max(time.Until(next), 0))
		select {
		case <-ctx.Done():
			timer.Stop()
			return
		case <-timer.C:
		}
	}
}

// tell logs an error that is another one than the last turn's. A server that does not run says so in other places.
func (v *interval) tell(err error) {
	text := ""
	if err != nil && !serverAway(err) {
		text = err.Error()
	}
	v.mu.Lock()
	news := text != v.failed
	v.failed = text
	v.mu.Unlock()
	if news && text != "" {
		v.p.d.log.Warn("finish the segment that is being written: it is tried again", "error", err)
	}
}

// turn finishes the segment if that is due, and tells when to look again.
func (v *interval) turn(ctx context.Context) (next time.Time, err error) {
	next = time.Now().Add(v.every)
	again := time.Now().Add(min(v.every, serverAgain))
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	err = v.p.withServer(ctx, func(conn *pgx.Conn) error {
		at, err := readPosition(ctx, conn)
		if err != nil {
			return err
		}
		if at.replica {
			return nil // its WAL is the primary's to finish
		}
		size := v.p.segment
		// Whatever stands in this segment was written since the one before it was finished: it may wait as long from then.
		name := postgres.SegmentAt(at.timeline, at.written, size)
		if due := v.finished(name).Add(v.every); due.After(time.Now()) && due.Before(next) {
			next = due
			return nil
		}
		work, err := v.worked(name, at.written)
		if err != nil {
			return err
		}
		if !work {
			next = soonIfUnwritten(at, next)
			return nil
		}
		if _, err := postgres.SwitchWAL(ctx, conn); err != nil {
			return err
		}
		v.p.d.log.Debug("segment finished early", "name", string(name), "bytes", size.Offset(at.written))
		next = time.Now().Add(v.every)
		return nil
	})
	if err != nil {
		return again, err
	}
	return next, nil
}

// soonIfUnwritten looks again soon when a commit that did not wait for its WAL may be on its way to pg_wal.
func soonIfUnwritten(at position, next time.Time) time.Time {
	if soon := time.Now().Add(flushSoon); at.inserted > at.written+pageHeaders && soon.Before(next) {
		return soon
	}
	return next
}

// finished tells when PostgreSQL finished the segment before name: it marked it as to be archived then, and renaming the
// mark when it is archived leaves its time alone. The zero time is given where that is not known.
func (v *interval) finished(name postgres.SegmentName) time.Time {
	before, ok := name.Previous(v.p.segment)
	if !ok {
		return time.Time{}
	}
	dir := filepath.Join(v.p.dataDir, "pg_wal")
	for _, mark := range []string{
		filepath.Join(dir, "archive_status", string(before)+".done"), filepath.Join(dir, "archive_status", string(before)+".ready"),
		filepath.Join(dir, string(before)),
	} {
		if info, err := os.Stat(mark); err == nil {
			return info.ModTime()
		}
	}
	return time.Time{}
}

// worked tells whether the segment holds anything up to a position that has to be kept. It reads what was added since the
// last call.
func (v *interval) worked(name postgres.SegmentName, to postgres.LSN) (bool, error) {
	v.mu.Lock()
	defer v.mu.Unlock()
	size := v.p.segment
	if v.look.segment != name {
		v.look = look{segment: name, records: postgres.NewRecordScanner(name.Timeline(), name.Start(size), size), quietAt: v.finished(name)}
	}
	l := &v.look
	end := uint64(to - name.Start(size))
	asked := time.Now()
	switch {
	case l.work:
		return true, nil
	case end <= l.offset:
		l.quietAt = asked
		return false, nil
	}
	path := filepath.Join(v.p.dataDir, "pg_wal", string(name))
	f, err := os.Open(path)
	if err != nil {
		return false, fmt.Errorf("look for work in the segment that is being written: %w", err)
	}
	defer f.Close()
	if l.offset == 0 {
		header := make([]byte, postgres.WALHeaderSize)
		if _, err := f.ReadAt(header, 0); err != nil {
			return false, fmt.Errorf("look for work in %s: %w", path, err)
		}
		// The end of a record whose beginning is in the segment before. What it was is not looked up: it is hardly ever
		// there, and finishing a segment too many is the lesser evil.
		if binary.LittleEndian.Uint16(header[2:])&interruptedInfo != 0 {
			l.work = true
			return true, nil
		}
	}
	n, err := io.Copy(l.records, io.NewSectionReader(f, int64(l.offset), int64(end-l.offset)))
	l.offset += uint64(n)
	if err == nil && l.offset < end {
		err = io.ErrUnexpectedEOF
	}
	switch {
	case errors.Is(err, io.ErrUnexpectedEOF):
		return false, fmt.Errorf("look for work in %s: found %d bytes, expected %d: %w", path, l.offset, end, err)
	case err != nil:
		// Whatever it is that does not scan, it is better kept.
		v.p.d.log.Warn("look for work in the segment that is being written", "name", string(name), "error", err)
		l.work = true
	default:
		l.work = l.records.Take().Work
	}
	if !l.work {
		l.quietAt = asked
	}
	return l.work, nil
}

// waiting tells since when, at most, something that has to be kept stands in the segment that holds the position; the
// zero time if nothing does.
func (v *interval) waiting(at position) (time.Time, error) {
	if at.replica {
		return time.Time{}, nil
	}
	work, err := v.worked(postgres.SegmentAt(at.timeline, at.written, v.p.segment), at.written)
	if err != nil || !work {
		return time.Time{}, err
	}
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.look.quietAt.IsZero() {
		return time.Now(), nil
	}
	return v.look.quietAt, nil
}
