package wal

import (
	"context"
	"fmt"
	"time"

	"github.com/pgark/terraform-provider-pgark/internal/engine/postgres"
)

// Wait returns once every segment that holds a byte of [from, to) on timeline t is durable in the repository, whoever
// shipped it. A segment of the range that is refused for good ends it with the reason. It does not make PostgreSQL
// finish a segment.
func (s *Shipper) Wait(ctx context.Context, t postgres.Timeline, from, to postgres.LSN) error {
	if to <= from {
		return nil
	}
	missing := make(map[string]bool)
	var first string
	for n := s.o.SegmentSize.Number(from); n <= s.o.SegmentSize.NumberBefore(to); n++ {
		name := string(postgres.MakeSegmentName(t, n, s.o.SegmentSize))
		missing[name] = true
		if first == "" {
			first = name
		}
	}

	const listEvery = 5 * time.Second
	var listed time.Time
	for {
		s.mu.Lock()
		changed := s.changed
		var refusal error
		for name := range missing {
			f := s.files[name]
			switch {
			case f == nil:
			case f.state == fileStored:
				delete(missing, name)
			case f.state == fileRefused:
				refusal = f.err
			}
		}
		s.mu.Unlock()
		if len(missing) == 0 {
			return nil
		}
		if refusal != nil {
			return fmt.Errorf("wait for wal %s to %s: %w", from, to, refusal)
		}
		// Segments that an earlier run of this runner shipped are in the repository only.
		if time.Since(listed) >= listEvery {
			for e, err := range s.o.Series.ListWAL(ctx, t, first) {
				if err != nil {
					if ctx.Err() == nil {
						s.o.Log.Warn("look for wal in the repository", "error", err)
					}
					break
				}
				delete(missing, e.Name)
				if len(missing) == 0 {
					return nil
				}
			}
			listed = time.Now()
		}
		timer := time.NewTimer(time.Until(listed.Add(listEvery)))
		select {
		case <-changed:
		case <-timer.C:
		case <-s.ended:
			timer.Stop()
			return fmt.Errorf("wait for wal %s to %s: %w", from, to, ErrStopped)
		case <-ctx.Done():
			timer.Stop()
			return fmt.Errorf("wait for wal %s to %s: %s is not durable yet: %w", from, to, anyOf(missing), context.Cause(ctx))
		}
		timer.Stop()
	}
}

// anyOf names the first of the segments that are missing.
func anyOf(missing map[string]bool) string {
	first := ""
	for name := range missing {
		if first == "" || name < first {
			first = name
		}
	}
	if len(missing) > 1 {
		return fmt.Sprintf("%s and %d more", first, len(missing)-1)
	}
	return first
}
