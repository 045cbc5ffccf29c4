package image

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/pgark/terraform-provider-pgark/internal/engine/postgres"
)

// MissingWALError says that the WAL which makes an image consistent did not become durable.
type MissingWALError struct {
	From, To postgres.LSN
	Missing  postgres.SegmentName // the first segment that the repository lacks; "" if it could not be asked
	Waited   time.Duration
	Archiver string // what pg_stat_archiver says
	Err      error
}

func (e *MissingWALError) Error() string {
	what := "wal"
	if e.Missing != "" {
		what = "segment " + string(e.Missing)
	}
	s := fmt.Sprintf("%s of the range %s to %s, which the image needs, is not in the repository after %s", what, e.From, e.To, e.Waited.Round(time.Second))
	if e.Archiver != "" {
		s += " (" + e.Archiver + ")"
	}
	return s + ": " + e.Err.Error()
}

func (e *MissingWALError) Unwrap() error { return e.Err }

// Hint says where to look.
func (e *MissingWALError) Hint() string {
	return "does the server archive? Look at archive_mode, archive_command and pg_stat_archiver, and at the runner's log.\nOn a standby, segments are finished by its primary, and archived only with archive_mode = always"
}

var errWALTimeout = errors.New("gave up waiting")

// awaitWAL returns once the WAL between backup start and backup stop is durable.
func (t *taking) awaitWAL(ctx context.Context, conn *pgx.Conn, stop postgres.StopResult) error {
	wait := t.o.WaitWAL
	if wait == nil {
		wait = t.pollWAL
	}
	began := time.Now()
	limited, cancel := context.WithTimeoutCause(ctx, t.o.WALTimeout, errWALTimeout)
	defer cancel()
	err := wait(limited, stop.Timeline, stop.StartLSN, stop.StopLSN)
	if err == nil {
		return nil
	}
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	e := &MissingWALError{From: stop.StartLSN, To: stop.StopLSN, Waited: time.Since(began), Err: err}
	if limited.Err() != nil {
		e.Err = errWALTimeout
	}
	// Only to say more; what cannot be learned is left out.
	ask, done := context.WithTimeout(context.WithoutCancel(ctx), 30*time.Second)
	defer done()
	if missing, err := t.missingWAL(ask, stop.Timeline, stop.StartLSN, stop.StopLSN); err == nil && len(missing) > 0 {
		e.Missing = missing[0]
	}
	e.Archiver = archiverStatus(ask, conn)
	return e
}

// pollWAL asks the repository's listing until it shows all segments.
func (t *taking) pollWAL(ctx context.Context, tl postgres.Timeline, from, to postgres.LSN) error {
	for pause := 100 * time.Millisecond; ; pause = min(2*pause, 5*time.Second) {
		missing, err := t.missingWAL(ctx, tl, from, to)
		if err != nil {
			return err
		}
		if len(missing) == 0 {
			return nil
		}
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-time.After(pause):
		}
	}
}

// missingWAL lists the segments with a byte of [from, to) that the repository lacks, in order.
func (t *taking) missingWAL(ctx context.Context, tl postgres.Timeline, from, to postgres.LSN) ([]postgres.SegmentName, error) {
	size := t.control.WALSegmentSize
	first, last := size.Number(from), size.NumberBefore(to)
	there := make(map[postgres.SegmentName]bool)
	end := postgres.MakeSegmentName(tl, last, size)
	for entry, err := range t.o.Series.ListWAL(ctx, tl, string(postgres.MakeSegmentName(tl, first, size))) {
		if err != nil {
			return nil, err
		}
		if entry.Name > string(end) {
			break
		}
		there[postgres.SegmentName(entry.Name)] = true
	}
	var missing []postgres.SegmentName
	for n := first; n <= last; n++ {
		if name := postgres.MakeSegmentName(tl, n, size); !there[name] {
			missing = append(missing, name)
		}
	}
	return missing, nil
}

// archiverStatus says in a few words how archiving goes; "" if the server cannot be asked.
func archiverStatus(ctx context.Context, conn *pgx.Conn) string {
	var mode string
	var archived, failed int64
	var lastArchived, lastFailed *string
	var archivedAt, failedAt *time.Time
	err := conn.QueryRow(ctx, `select pg_catalog.current_setting('archive_mode'), archived_count, last_archived_wal,
		last_archived_time, failed_count, last_failed_wal, last_failed_time from pg_catalog.pg_stat_archiver`).
		Scan(&mode, &archived, &lastArchived, &archivedAt, &failed, &lastFailed, &failedAt)
	if err != nil {
		return ""
	}
	parts := []string{fmt.Sprintf("archive_mode is %s, %d segments archived", mode, archived)}
	if lastArchived != nil && archivedAt != nil {
		parts[0] += fmt.Sprintf(", the last %s at %s", *lastArchived, archivedAt.Format(time.RFC3339))
	}
	if failed > 0 && lastFailed != nil && failedAt != nil {
		parts = append(parts, fmt.Sprintf("%d attempts failed, the last on %s at %s", failed, *lastFailed, failedAt.Format(time.RFC3339)))
	}
	return strings.Join(parts, "; ")
}
