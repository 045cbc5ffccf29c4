package repository

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"strings"
	"time"

	"github.com/pgark/terraform-provider-pgark/internal/engine/objectstore"
)

// SessionRecord is the account of one finished session, for statistics; unencrypted, never changed.
type SessionRecord struct {
	ID          string    `json:"id"`
	Kind        string    `json:"kind"`   // "image", "wal"
	Result      string    `json:"result"` // "success", "warning", "error"
	StartedAt   time.Time `json:"started_at"`
	CompletedAt time.Time `json:"completed_at"`
	Host        string    `json:"host"`
	SID         SID       `json:"sid,omitempty"`
	Error       string    `json:"error,omitempty"`
	SourceBytes int64     `json:"source_bytes"`
	ReadBytes   int64     `json:"read_bytes"`
	StoredBytes int64     `json:"stored_bytes"`
	Segments    int64     `json:"segments,omitempty"`
	Failures    int64     `json:"failures,omitempty"`
	MaxDelay    float64   `json:"max_delay_seconds,omitempty"` // from segment full (.ready) to durable

	// Of WAL sessions.
	Spooled   int64 `json:"spooled,omitempty"`    // files that waited in the temporary folder
	Gaps      int64 `json:"gaps,omitempty"`       // places where WAL was lost
	Tails     int64 `json:"tails,omitempty"`      // pieces stored before their segments were whole
	TailBytes int64 `json:"tail_bytes,omitempty"` // the same, as stored

	// Of WAL sessions in continuous mode, where MaxLag is above 0, however small, once there was anything to judge.
	MaxLag float64 `json:"max_lag_seconds,omitempty"` // longest time that written WAL was not durable
	Late   float64 `json:"late_seconds,omitempty"`    // how long, in all, the lag was more than the job allows
}

type sessionDocument struct {
	Format int `json:"format"`
	SessionRecord
}

// PutSession stores a record. An ID that does not begin with the session's start, "20060102T150405.000000Z-", gets that
// put before it, so that records sort by time; an empty one becomes the start and random digits.
func (s *Series) PutSession(ctx context.Context, record SessionRecord) error {
	if s.invalid != nil {
		return s.invalid
	}
	if record.StartedAt.IsZero() {
		return fmt.Errorf("session record of %s: found no start time", s.id)
	}
	if record.ID == "" {
		nonce, err := s.r.nonce()
		if err != nil {
			return err
		}
		record.ID = nonce[:8]
	}
	if start := formatSessionTime(record.StartedAt) + "-"; !strings.HasPrefix(record.ID, start) {
		record.ID = start + record.ID
	}
	if err := checkName("session", record.ID); err != nil {
		return err
	}
	if _, err := s.r.createDocument(ctx, s.id.sessionKey(record.ID), sessionDocument{Format: Format, SessionRecord: record}); err != nil {
		return fmt.Errorf("session record of %s: %w", s.id, err)
	}
	return nil
}

// Sessions yields records that started after the given time, oldest first.
func (s *Series) Sessions(ctx context.Context, after time.Time) iter.Seq2[SessionRecord, error] {
	return func(yield func(SessionRecord, error) bool) {
		if s.invalid != nil {
			yield(SessionRecord{}, s.invalid)
			return
		}
		startAfter := ""
		if !after.IsZero() {
			startAfter = s.id.sessionKey(formatSessionTime(after) + "~") // after every record of that microsecond
		}
		for o, err := range s.r.store.List(ctx, s.id.sessionPrefix(), startAfter) {
			if err != nil {
				yield(SessionRecord{}, fmt.Errorf("sessions of %s: %w", s.id, err))
				return
			}
			var d sessionDocument
			_, err := s.r.readDocument(ctx, o.Key, &d)
			if errors.Is(err, objectstore.ErrNotExist) {
				continue // deleted since it was listed
			}
			if err == nil && s.id.sessionKey(d.ID) != o.Key {
				err = &CorruptError{Repository: s.r.store.URL(), Key: o.Key, Err: fmt.Errorf("found record %q", d.ID)}
			}
			if err != nil {
				yield(SessionRecord{}, fmt.Errorf("sessions of %s: %w", s.id, err))
				return
			}
			if !yield(d.SessionRecord, nil) {
				return
			}
		}
	}
}
