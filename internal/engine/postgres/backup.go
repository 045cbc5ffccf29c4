package postgres

import (
	"context"
	"errors"
	"fmt"
	"regexp"
	"strconv"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"
)

// Backup is a backup in progress: the server forces full page writes and keeps a place to recover from until it ends.
// It lives and dies with its connection. Its methods must not be called at the same time.
type Backup struct {
	// StartLSN is the redo position of the checkpoint that the backup begins with: recovery reads WAL from here.
	StartLSN LSN
	// StartTimeline is the timeline of that checkpoint.
	StartTimeline Timeline
	// StartTime is the server's clock when the checkpoint was done.
	StartTime time.Time

	conn *pgx.Conn
	stop string
}

// StopResult is what ending a backup gives.
type StopResult struct {
	StartLSN      LSN
	StopLSN       LSN // recovery is consistent from here on
	Timeline      Timeline
	Label         string // to be written to backup_label, byte for byte
	TablespaceMap string // to be written to tablespace_map, byte for byte; empty: no file
	StopTime      time.Time
}

// BackupLostError says that the connection of a backup broke, whereupon the server ended the backup: what was copied so
// far is worth nothing.
type BackupLostError struct {
	StartLSN LSN
	Err      error
}

// Error says which backup it was.
func (e *BackupLostError) Error() string {
	return fmt.Sprintf("backup that started at %s was lost with its connection: %v", e.StartLSN, e.Err)
}

// Unwrap gives what broke the connection.
func (e *BackupLostError) Unwrap() error { return e.Err }

// StartBackup begins a backup, with an immediate checkpoint. Until it ends, the connection belongs to it: use it for
// nothing else. Cancelling ctx while the checkpoint runs ends the connection and the backup with it.
//
// The server's functions changed their names in 15, when the exclusive mode went.
func StartBackup(ctx context.Context, conn *pgx.Conn, label string) (*Backup, error) {
	if label == "" || len(label) > 500 || strings.ContainsAny(label, "\r\n") {
		return nil, fmt.Errorf("start backup: label %q: expected 1 to 500 bytes in one line", label)
	}
	version, err := versionNumber(ctx, conn)
	if err != nil {
		return nil, fmt.Errorf("start backup: %w", err)
	}
	start, stop := "pg_backup_start($1, true)", "pg_backup_stop(false)"
	if version < 150000 {
		start, stop = "pg_start_backup($1, true, false)", "pg_stop_backup(false, false)"
	}
	b := &Backup{conn: conn, stop: stop}
	var lsn string
	// clock_timestamp() is evaluated after the function in FROM has returned, so after the checkpoint.
	err = conn.QueryRow(ctx, "select b.lsn::text, pg_catalog.clock_timestamp() from pg_catalog."+start+" as b(lsn)", label).Scan(&lsn, &b.StartTime)
	if err != nil {
		return nil, fmt.Errorf("start backup: %w", err)
	}
	if b.StartLSN, err = ParseLSN(lsn); err != nil {
		b.Abort()
		return nil, fmt.Errorf("start backup: %w", err)
	}
	var timeline int64
	if err := conn.QueryRow(ctx, "select timeline_id from pg_catalog.pg_control_checkpoint()").Scan(&timeline); err != nil {
		b.Abort()
		return nil, fmt.Errorf("start backup: timeline: %w", err)
	}
	b.StartTimeline = Timeline(timeline)
	return b, nil
}

// Alive asks the server whether the backup still runs. The error is a *BackupLostError if it does not.
func (b *Backup) Alive(ctx context.Context) error {
	if err := b.conn.Ping(ctx); err != nil {
		return b.lost("ask whether the backup runs", err)
	}
	return nil
}

// Stop ends the backup. It does not wait until the WAL up to StopLSN is archived: without all of it the backup cannot be
// restored. If the connection is gone, the error is a *BackupLostError; a standby that was promoted meanwhile refuses.
// After any error the backup is over and its files are worth nothing.
func (b *Backup) Stop(ctx context.Context) (StopResult, error) {
	var lsn, label, tablespaces string
	r := StopResult{StartLSN: b.StartLSN}
	err := b.conn.QueryRow(ctx, `select b.lsn::text, b.label, coalesce(b.map, ''), pg_catalog.clock_timestamp()
		from pg_catalog.`+b.stop+` as b(lsn, label, map)`).Scan(&lsn, &label, &tablespaces, &r.StopTime)
	if err != nil {
		err = b.lost("stop backup", err)
		b.Abort()
		return StopResult{}, err
	}
	if r.StopLSN, err = ParseLSN(lsn); err != nil {
		return StopResult{}, fmt.Errorf("stop backup: %w", err)
	}
	parsed, err := ParseBackupLabel(label)
	if err != nil {
		return StopResult{}, fmt.Errorf("stop backup: %w", err)
	}
	if parsed.StartLSN != b.StartLSN {
		return StopResult{}, fmt.Errorf("stop backup: found %s as the start in backup_label, expected %s", parsed.StartLSN, b.StartLSN)
	}
	r.Timeline, r.Label, r.TablespaceMap = parsed.Timeline, label, tablespaces
	return r, nil
}

// Abort ends the backup by closing its connection. The server keeps nothing of it.
func (b *Backup) Abort() { closeNow(b.conn) }

func (b *Backup) lost(doing string, err error) error {
	if b.conn.IsClosed() {
		return &BackupLostError{StartLSN: b.StartLSN, Err: err}
	}
	return fmt.Errorf("%s: %w", doing, err)
}

// BackupLabel is what a backup_label file says.
type BackupLabel struct {
	StartLSN    LSN         // redo position
	StartFile   SegmentName // the segment that holds it
	Checkpoint  LSN         // position of the checkpoint's record
	Timeline    Timeline
	FromStandby bool
	Label       string
}

var backupLabelStart = regexp.MustCompile(`^([0-9A-F]+/[0-9A-F]+) \(file ([0-9A-F]{24})\)$`)

// ParseBackupLabel reads a backup_label file (xlogbackup.c, build_backup_content).
func ParseBackupLabel(label string) (BackupLabel, error) {
	var l BackupLabel
	var err error
	for line := range strings.Lines(label) {
		key, value, ok := strings.Cut(strings.TrimSuffix(line, "\n"), ": ")
		if !ok {
			continue
		}
		switch key {
		case "START WAL LOCATION":
			m := backupLabelStart.FindStringSubmatch(value)
			if m == nil {
				return BackupLabel{}, fmt.Errorf("backup_label: %s: found %q, expected a position and a file", key, value)
			}
			l.StartLSN, err = ParseLSN(m[1])
			l.StartFile = SegmentName(m[2])
		case "CHECKPOINT LOCATION":
			l.Checkpoint, err = ParseLSN(value)
		case "START TIMELINE":
			var t uint64
			t, err = strconv.ParseUint(value, 10, 32)
			l.Timeline = Timeline(t)
		case "BACKUP FROM":
			l.FromStandby = value == "standby"
		case "LABEL":
			l.Label = value
		}
		if err != nil {
			return BackupLabel{}, fmt.Errorf("backup_label: %s: %w", key, err)
		}
	}
	if l.StartLSN == 0 || l.Timeline == 0 {
		return BackupLabel{}, errors.New("backup_label: found no START WAL LOCATION or START TIMELINE")
	}
	return l, nil
}
