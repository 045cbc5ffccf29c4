package retention

import (
	"context"
	"fmt"

	"github.com/pgark/terraform-provider-pgark/internal/engine/postgres"
	"github.com/pgark/terraform-provider-pgark/internal/engine/repository"
)

// Empty removes every image and all WAL of a series, by the same steps and rules as Apply: what a running restore reads
// stays, and is an error. It is for a series that nobody writes to any more. The head log and the session records stay, as
// the record of what there was, and the same cluster can be protected again under the same name: the WAL floors rise no
// higher than what was stored.
func Empty(ctx context.Context, series *repository.Series) error {
	head, err := series.Head(ctx)
	if err != nil {
		return fmt.Errorf("read the head of %s: %w", series.ID(), err)
	}
	var images []repository.SID
	for _, i := range head.Images {
		images = append(images, i.SID)
	}
	if len(images) > 0 {
		if err := series.Expire(ctx, images...); err != nil {
			return fmt.Errorf("expire the images of %s: %w", series.ID(), err)
		}
	}
	timelines, err := series.Timelines(ctx)
	if err != nil {
		return fmt.Errorf("list the timelines of %s: %w", series.ID(), err)
	}
	for _, t := range timelines {
		if err := emptyTimeline(ctx, series, t); err != nil {
			return fmt.Errorf("delete the WAL of %s on timeline %d: %w", series.ID(), uint32(t), err)
		}
	}
	if head.Version == 0 {
		return nil // no image was ever begun
	}
	if _, err := series.Collect(ctx, false); err != nil {
		return fmt.Errorf("collect %s: %w", series.ID(), err)
	}
	return nil
}

func emptyTimeline(ctx context.Context, series *repository.Series, t postgres.Timeline) error {
	var names []string
	var size postgres.SegmentSize
	var last postgres.SegmentName
	for e, err := range series.ListWAL(ctx, t, "") {
		if err != nil {
			return err
		}
		f, err := postgres.ParseWALFile(e.Name)
		if err != nil || f.Kind == postgres.HistoryFile {
			continue // something that a later version stores, or that stays
		}
		if f.Kind == postgres.SegmentFile && size == 0 {
			info, err := series.StatWAL(ctx, e.Name)
			if err != nil {
				return err
			}
			size = postgres.SegmentSize(info.Size) // a whole segment is as long as all are
		}
		names, last = append(names, e.Name), f.Segment // in order of name
	}
	var tails []repository.Tail
	for tail, err := range series.ListTails(ctx, t, 0, ^postgres.LSN(0)) {
		if err != nil {
			return err
		}
		tails = append(tails, tail)
	}
	if size == 0 {
		size = postgres.DefaultSegmentSize
	}
	floor := postgres.LSN(0)
	if len(names) > 0 {
		floor = last.End(size)
	}
	for _, tail := range tails {
		floor = max(floor, tail.End)
	}
	if floor == 0 {
		return nil
	}
	if err := series.RaiseWALFloor(ctx, t, floor); err != nil {
		return err
	}
	if err := series.DeleteWAL(ctx, size, names...); err != nil {
		return err
	}
	return series.DeleteTails(ctx, tails...)
}
