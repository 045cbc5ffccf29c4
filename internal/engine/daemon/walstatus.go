package daemon

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/pgark/terraform-provider-pgark/internal/engine/daemon/control"
	"github.com/pgark/terraform-provider-pgark/internal/engine/job"
	"github.com/pgark/terraform-provider-pgark/internal/engine/postgres"
	"github.com/pgark/terraform-provider-pgark/internal/engine/wal"
)

// askServerFor bounds what a status may take to ask the server where its WAL stands.
const askServerFor = 500 * time.Millisecond

// walStatus is what becomes of WAL.
func (p *protection) walStatus(ctx context.Context) control.WALStatus {
	s := p.shipper.Status()
	s.Mode = p.wal.Mode
	s.ObjectiveSeconds = p.objective().Seconds()
	s.Gaps, s.GapCount = p.d.knownGaps() // which tell of images, and outlive the shipper
	if p.streaming == nil || !p.describeStream(&s) {
		p.describeArchive(ctx, &s)
	}
	s.MaxLagSeconds = p.d.lags.longest(s.LagSeconds)
	return s
}

func setPositions(s *control.WALStatus, written, durable postgres.LSN) {
	s.WrittenLSN, s.DurableLSN = written.String(), durable.String()
	if written > durable {
		s.LagBytes = int64(written - durable)
	}
}

// objective is what the lag should stay below.
func (p *protection) objective() time.Duration {
	if p.wal.Mode == job.WALContinuous {
		return time.Duration(p.wal.MaxLag)
	}
	return time.Duration(p.wal.Interval)
}

// describeStream tells how far the stream is; false if it does not know where the server's WAL ends.
func (p *protection) describeStream(s *control.WALStatus) bool {
	st := p.streaming.status()
	s.Stream = &st
	at := p.streaming.position()
	written := max(at.ServerEnd, at.Received)
	if !st.Connected || written == 0 || at.Durable == 0 {
		return false
	}
	s.Timeline = uint32(at.Timeline)
	setPositions(s, written, at.Durable)
	s.LagSeconds = since(at.OldestPending).Seconds()
	return true
}

// describeArchive tells how far archiving is, which takes asking the server, once.
func (p *protection) describeArchive(ctx context.Context, s *control.WALStatus) {
	oldest := time.Time{}
	note := func(t *time.Time) {
		if t != nil && (oldest.IsZero() || t.Before(oldest)) {
			oldest = *t
		}
	}
	note(s.OldestPending)
	if s.Spool != nil {
		note(s.Spool.Oldest)
	}
	var at position
	ctx, cancel := context.WithTimeout(ctx, askServerFor)
	defer cancel()
	err := p.withServer(ctx, func(conn *pgx.Conn) (err error) {
		at, err = readPosition(ctx, conn)
		return err
	})
	// What a replica writes is its primary's, and has a name there. A server that does not run writes nothing.
	if err == nil && !at.replica {
		if began, err := p.interval.waiting(at); err == nil && !began.IsZero() {
			note(&began)
		}
		s.Timeline = uint32(at.timeline)
		setPositions(s, at.written, p.durableBefore(at, s))
	}
	s.LagSeconds = since(oldest).Seconds()
}

// durableBefore is the position up to which whole segments make all WAL durable.
func (p *protection) durableBefore(at position, s *control.WALStatus) postgres.LSN {
	size := p.segment
	durable := size.Start(size.Number(at.written))
	if s.Pending == 0 && (s.Spool == nil || s.Spool.Files == 0) {
		return durable
	}
	unstored, err := p.unstored()
	if err != nil {
		p.d.log.Warn("tell how far wal is durable: nothing is claimed", "error", err)
		return 0
	}
	for _, name := range unstored {
		if name.Timeline() == at.timeline {
			durable = min(durable, name.Start(size))
		}
	}
	return durable
}

// unstored lists the finished segments that are not in the repository, or were not a moment ago: those that PostgreSQL
// waits for, and those in the temporary folder. A directory that cannot be read is an error: none found there would be a
// claim that all is durable.
func (p *protection) unstored() ([]postgres.SegmentName, error) {
	var all []postgres.SegmentName
	for _, where := range []struct {
		dir, suffix string
		optional    bool
	}{
		{filepath.Join(p.dataDir, "pg_wal", "archive_status"), ".ready", false},
		{p.spool.used, wal.SealedSuffix, true}, // made when the first file goes into it
	} {
		files, err := namesIn(where.dir)
		if err != nil && (!where.optional || !errors.Is(err, fs.ErrNotExist)) {
			return nil, fmt.Errorf("look for wal that is not stored yet: %w", err)
		}
		for _, file := range files {
			name, ok := strings.CutSuffix(file, where.suffix)
			if segment, err := postgres.ParseSegmentName(name); ok && err == nil && segment.Check(p.segment) == nil {
				all = append(all, segment)
			}
		}
	}
	return all, nil
}

// namesIn lists a directory, in no order.
func namesIn(dir string) ([]string, error) {
	d, err := os.Open(dir)
	if err != nil {
		return nil, err
	}
	defer d.Close()
	return d.Readdirnames(-1)
}
