package restore

import (
	"context"
	"fmt"
	"slices"
	"strconv"

	"github.com/pgark/terraform-provider-pgark/internal/engine/postgres"
	"github.com/pgark/terraform-provider-pgark/internal/engine/repository"
	"github.com/pgark/terraform-provider-pgark/internal/engine/wal"
)

// scan walks over the records of a segment, as far as the route goes along with them.
func (s *seriesState) scan(ctx context.Context, p route, number uint64) (postgres.SegmentScan, bool, error) {
	size := s.inventory.size
	t, until, ok := s.inventory.find(p, number)
	if !ok {
		return postgres.SegmentScan{}, false, nil
	}
	segment := postgres.MakeSegmentName(t, number, size)
	scanner := postgres.NewSegmentScanner(segment, size)
	limit := &limited{w: scanner, left: int64(until - size.Start(number))}
	w := s.inventory.timelines[t]
	run, streamed := w.tails[number]
	var err error
	switch {
	case w.hasWhole(number):
		_, err = s.series.GetWAL(ctx, string(segment), limit)
	case streamed && (run.end >= until || w.partial == nil || *w.partial != number):
		_, err = wal.ReadTails(ctx, s.series, run.all, size.Start(number), limit)
		for rest := int64(size) - int64(run.chain[len(run.chain)-1].End-size.Start(number)); rest > 0; rest -= min(rest, int64(len(zeros))) {
			_, _ = scanner.Write(zeros[:min(rest, int64(len(zeros)))]) // never fails
		}
	default:
		_, err = s.series.GetWAL(ctx, string(segment)+".partial", limit)
	}
	if err != nil {
		return postgres.SegmentScan{}, false, fmt.Errorf("read WAL %s: %w", segment, err)
	}
	return scanner.Result(), true, nil
}

// beginsAt tells whether a record begins at a position of the stretch, or behind it. It is known to, unless the position
// lies in the stretch's last segment.
func (s *seriesState) beginsAt(ctx context.Context, p route, c stretch, at postgres.LSN) (bool, error) {
	size := s.inventory.size
	if at >= c.end {
		return false, nil
	}
	if size.Number(at) < size.NumberBefore(c.end) {
		return true, nil
	}
	last, err := s.lastRecord(ctx, p, size.Number(at))
	return last >= at, err
}

// limited hands on zeros instead of what lies behind a limit: where a timeline was left, its old future begins.
type limited struct {
	w    *postgres.SegmentScanner
	left int64
}

func (l *limited) Write(b []byte) (int, error) {
	n := int(min(l.left, int64(len(b))))
	if n > 0 {
		if _, err := l.w.Write(b[:n]); err != nil {
			return 0, err
		}
		l.left -= int64(n)
	}
	for rest := len(b) - n; rest > 0; rest -= min(rest, len(zeros)) {
		if _, err := l.w.Write(zeros[:min(rest, len(zeros))]); err != nil {
			return 0, err
		}
	}
	return len(b), nil
}

// resolveEnd replaces "the end of what is there now" by a position: that of the last record. PostgreSQL cannot be told
// to end at the end and yet not to take what arrives meanwhile.
func (s *seriesState) resolveEnd(ctx context.Context, p *Plan) error {
	size := s.inventory.size
	first := size.NumberBefore(p.image.StopLSN)
	for n := size.NumberBefore(p.stretch.end); ; n-- {
		last, err := s.lastRecord(ctx, p.route, n)
		if err != nil {
			return err
		}
		if last > p.image.StopLSN {
			p.stop, p.endLSN = stopAtKnownEnd, last
			return nil
		}
		if n == first {
			p.stop = stopConsistency // nothing follows the image
			return nil
		}
	}
}

// search finds the image for a target whose position is not known.
func (c *chooser) search(ctx context.Context) error {
	if c.target.kind() == ToXID {
		// Transactions are not looked for: all WAL would have to be read to find one, and recovery reads it anyway.
		newest := c.images[len(c.images)-1]
		c.take(newest, stopAtTarget)
		for _, i := range c.images {
			if i.StopLSN >= c.stretch.start && i.StopLSN <= c.stretch.end {
				c.take(i, stopAtTarget)
				break
			}
		}
		return nil
	}
	size := c.s.inventory.size
	for _, st := range slices.Backward(c.stretches) {
		for n := size.NumberBefore(st.end); size.Start(n) >= st.start; n-- {
			scan, ok, err := c.s.scan(ctx, c.route, n)
			if err != nil {
				return err
			}
			for _, point := range slices.Backward(scan.RestorePoints) {
				if !ok || point.Name != c.target.Name {
					continue
				}
				i, found := c.newest(func(i repository.ImageInfo) bool {
					return i.StopLSN <= point.LSN && i.StopLSN <= st.end && i.StartLSN >= st.start
				})
				if !found {
					return c.unreachable("it is at %s (%s), before any image that can be restored up to there", point.LSN, point.Time.UTC().Format(timeFormat))
				}
				c.take(i, stopAtTarget)
				return nil
			}
			if n == 0 {
				break
			}
		}
	}
	return c.unreachable("no restore point of that name is in the WAL of timeline %s", strconv.FormatUint(uint64(c.route.timeline()), 10))
}
