// Package retention decides which images and which WAL a series may lose, and removes them.
//
// Deciding (Make) is a pure function of what a series holds (Read), a policy and a clock: the janitor's, never the
// guest's. Its rules are:
//
//   - An image stays if any rule keeps it. Rules count restorable images only: those whose WAL from start to stop is
//     there. The newest restorable image always stays. An image whose WAL is not complete, which may be about to come,
//     stays as long as an older image does.
//   - keep_last: the newest so many images.
//   - keep_days: every image that is needed to restore some moment of the last so many days: those completed in them,
//     and for each timeline that was written in them the newest image before.
//   - weekly, monthly, yearly: the newest image of each of the last so many ISO weeks, months, years (UTC) that have one.
//   - Without any rule every image stays.
//   - WAL, until_image_deleted: what an image that stays can be rolled forward with stays, on its timeline and on all
//     that descend from it.
//   - WAL, keep_days: the same for the images that are needed to restore some moment of the last so many days. The
//     others keep the WAL that makes them consistent: they are restore points without a window.
//   - A timeline that no image reaches is given up once a newer image was taken elsewhere and nothing was stored on it
//     since. One whose history cannot be read (it is missing, or encrypted) is taken to descend from every lower one.
//   - History files stay for ever.
//   - A tail goes once its segment is stored whole, or ends at or below the floor and no image needs it to be consistent.
//     Tails that are the only copy of WAL above the floor stay. The streamer removes tails itself as a rule.
//
// Removing (Apply) goes in the order that is safe to be interrupted anywhere and done again: images leave the head, the
// WAL floors rise, WAL below them is deleted, and what no image refers to is collected.
package retention

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/pgark/terraform-provider-pgark/internal/engine/job"
	"github.com/pgark/terraform-provider-pgark/internal/engine/objectstore"
	"github.com/pgark/terraform-provider-pgark/internal/engine/postgres"
	"github.com/pgark/terraform-provider-pgark/internal/engine/repository"
)

// Policy is what to keep. The zero value keeps all images, and of the WAL what they can be rolled forward with.
type Policy struct {
	Images job.ImageRetention
	WAL    *job.WALRetention // nil: until_image_deleted
}

// PolicyOf is the policy that a job file declares.
func PolicyOf(j *job.Job) Policy { return Policy{Images: j.Image.Retention, WAL: j.WALRetention} }

// Check refuses a policy that says nothing clear.
func (p Policy) Check() error {
	for _, rule := range []struct {
		name string
		n    int
	}{
		{"keep_last", p.Images.KeepLast}, {"keep_days", p.Images.KeepDays},
		{"weekly", p.Images.Weekly}, {"monthly", p.Images.Monthly}, {"yearly", p.Images.Yearly},
	} {
		if rule.n < 0 {
			return fmt.Errorf("image retention: %s %d: may not be negative", rule.name, rule.n)
		}
	}
	if p.WAL == nil {
		return nil
	}
	switch {
	case p.WAL.KeepDays < 0:
		return fmt.Errorf("WAL retention: keep_days %d: may not be negative", p.WAL.KeepDays)
	case p.WAL.UntilImageDeleted && p.WAL.KeepDays > 0:
		return errors.New("WAL retention: until_image_deleted and keep_days exclude each other")
	case !p.WAL.UntilImageDeleted && p.WAL.KeepDays == 0:
		return errors.New("WAL retention: expected until_image_deleted or keep_days")
	}
	return nil
}

// State is what a series holds, as far as retention is concerned.
type State struct {
	Series    repository.SeriesID
	Head      *repository.Head
	Timelines map[postgres.Timeline]*Timeline // those that have WAL
}

// Timeline is the WAL of one timeline.
type Timeline struct {
	History      postgres.History // its ancestors
	HistoryKnown bool             // false: the history file is missing, or encrypted to somebody else
	Files        []File           // all but the history file, by name
	Tails        []repository.Tail
	LastStoredAt time.Time // when the last of Files or Tails was stored, by the guest's clock
}

// File is a stored WAL file.
type File struct {
	Name       string
	StoredSize int64 // bytes
}

// Read reads what Make needs: head, histories, and the names of all WAL files and tails, some 64 bytes of memory each.
func Read(ctx context.Context, series *repository.Series) (*State, error) {
	s := &State{Series: series.ID(), Timelines: make(map[postgres.Timeline]*Timeline)}
	timelines, err := series.Timelines(ctx)
	if err != nil {
		return nil, err
	}
	for _, t := range timelines {
		if s.Timelines[t], err = readTimeline(ctx, series, t); err != nil {
			return nil, err
		}
	}
	// Last, so that every image in it may have found its WAL above: it was complete before the image was committed, or
	// is being stored still, and then the image counts as incomplete and stays.
	if s.Head, err = series.Head(ctx); err != nil {
		return nil, err
	}
	return s, nil
}

func readTimeline(ctx context.Context, series *repository.Series, t postgres.Timeline) (*Timeline, error) {
	line := &Timeline{HistoryKnown: t == 1}
	for e, err := range series.ListWAL(ctx, t, "") {
		if err != nil {
			return nil, err
		}
		if f, err := postgres.ParseWALFile(e.Name); err != nil || f.Kind == postgres.HistoryFile {
			continue // what a later version stores is not ours to judge
		}
		line.Files = append(line.Files, File{Name: e.Name, StoredSize: e.StoredSize})
	}
	if n := len(line.Files); n > 0 {
		info, err := series.StatWAL(ctx, line.Files[n-1].Name)
		if err != nil && !errors.Is(err, objectstore.ErrNotExist) {
			return nil, err
		}
		line.LastStoredAt = info.StoredAt
	}
	for tail, err := range series.ListTails(ctx, t, 0, ^postgres.LSN(0)) {
		if err != nil {
			return nil, err
		}
		line.Tails = append(line.Tails, tail)
	}
	if n := len(line.Tails); n > 0 {
		info, err := series.StatTail(ctx, line.Tails[n-1])
		if err != nil && !errors.Is(err, objectstore.ErrNotExist) {
			return nil, err
		}
		if info.StoredAt.After(line.LastStoredAt) {
			line.LastStoredAt = info.StoredAt
		}
	}
	if t == 1 {
		return line, nil
	}
	history, err := readHistory(ctx, series, t)
	if locked := (*repository.NoIdentityError)(nil); errors.As(err, &locked) || errors.Is(err, objectstore.ErrNotExist) {
		return line, nil
	}
	if err != nil {
		return nil, err
	}
	line.History, line.HistoryKnown = history, true
	return line, nil
}

func readHistory(ctx context.Context, series *repository.Series, t postgres.Timeline) (postgres.History, error) {
	var b limitedBuffer
	if _, err := series.GetWAL(ctx, postgres.HistoryFileName(t), &b); err != nil {
		return nil, err
	}
	return postgres.ParseHistory(t, b.bytes)
}

// limitedBuffer holds a history file; real ones have some 50 bytes a timeline.
type limitedBuffer struct{ bytes []byte }

const maxHistory = 1 << 20 // bytes

func (b *limitedBuffer) Write(p []byte) (int, error) {
	if len(b.bytes)+len(p) > maxHistory {
		return 0, fmt.Errorf("history file: expected at most %d bytes", maxHistory)
	}
	b.bytes = append(b.bytes, p...)
	return len(p), nil
}

// Result is what Apply removed.
type Result struct {
	ExpiredImages  []string `json:"expired_images"`
	WALFiles       int      `json:"wal_files"`
	WALBytes       int64    `json:"wal_bytes"`
	Tails          int      `json:"tails"`
	TailBytes      int64    `json:"tail_bytes"`
	GarbageObjects int      `json:"garbage_objects"` // of images: packs, maps, manifests
	GarbageBytes   int64    `json:"garbage_bytes"`
	Held           []string `json:"held"` // why WAL that was planned to go has stayed
}

func (r *Result) add(o *Result) {
	r.ExpiredImages = append(r.ExpiredImages, o.ExpiredImages...)
	r.WALFiles += o.WALFiles
	r.WALBytes += o.WALBytes
	r.Tails += o.Tails
	r.TailBytes += o.TailBytes
	r.GarbageObjects += o.GarbageObjects
	r.GarbageBytes += o.GarbageBytes
	r.Held = o.Held
}

// ErrChanged says that the series is no longer what the plan was made from, in a way that matters. Nothing that the
// series needs has been removed: read it and plan again.
var ErrChanged = errors.New("the series has changed since the plan was made")

// deleteBatch is how many WAL files go with one request; between two, cancellation is noticed.
const deleteBatch = 1000

// Apply does what the plan says. It may be interrupted at any point and done again, also after other programs have
// changed the series; then it may return ErrChanged. The result tells what was removed, also beside an error.
func Apply(ctx context.Context, series *repository.Series, p *Plan) (*Result, error) {
	r := &Result{ExpiredImages: []string{}, Held: []string{}}
	if err := p.expire(ctx, series, r); err != nil {
		return r, fmt.Errorf("apply retention to %s: %w", series.ID(), err)
	}
	for i := range p.WAL {
		if err := p.WAL[i].apply(ctx, series, p.segmentSize, r); err != nil {
			return r, fmt.Errorf("apply retention to %s: %w", series.ID(), err)
		}
	}
	collected, err := series.Collect(ctx, false)
	r.GarbageObjects, r.GarbageBytes = collected.Objects, collected.Bytes
	if err != nil {
		return r, fmt.Errorf("apply retention to %s: %w", series.ID(), err)
	}
	return r, nil
}

// expire takes images out of the head, unless those that were to stay in their place have left it meanwhile.
func (p *Plan) expire(ctx context.Context, series *repository.Series, r *Result) error {
	var expire, keep []repository.SID
	for _, i := range p.Images {
		if i.Keep {
			keep = append(keep, i.sid)
		} else {
			expire = append(expire, i.sid)
		}
	}
	if len(expire) == 0 {
		return nil
	}
	head, err := series.Head(ctx)
	if err != nil {
		return err
	}
	for _, sid := range keep {
		if head.Image(sid) == nil {
			return fmt.Errorf("image %s is gone: %w", sid, ErrChanged)
		}
	}
	if err := series.Expire(ctx, expire...); err != nil {
		return err
	}
	for _, sid := range expire {
		r.ExpiredImages = append(r.ExpiredImages, sid.String())
	}
	return nil
}

// apply raises the timeline's floor and deletes what is doomed below it. Where somebody has come to need WAL since the
// plan was made, a restore for instance, the floor rises as far as that allows.
func (w *WALDecision) apply(ctx context.Context, series *repository.Series, size postgres.SegmentSize, r *Result) error {
	floor := w.Floor
	if floor > w.PresentFloor {
		err := series.RaiseWALFloor(ctx, w.Timeline, floor)
		if limit, ok := errors.AsType[*repository.FloorError](err); ok {
			r.Held = append(r.Held, limit.Error())
			floor, err = limit.Limit, nil
			if floor > w.PresentFloor {
				err = series.RaiseWALFloor(ctx, w.Timeline, floor)
			}
		}
		if err != nil {
			return changed(err)
		}
	}
	below := func(f File) bool {
		wal, err := postgres.ParseWALFile(f.Name)
		return err == nil && wal.Segment.End(size) <= floor
	}
	n := 0
	for n < len(w.doomed) && below(w.doomed[n]) { // they are in order
		n++
	}
	for batch := range slices.Chunk(w.doomed[:n], deleteBatch) {
		names := make([]string, len(batch))
		var bytes int64
		for k, f := range batch {
			names[k] = f.Name
			bytes += f.StoredSize
		}
		if err := series.DeleteWAL(ctx, size, names...); err != nil {
			return changed(err)
		}
		r.WALFiles += len(batch)
		r.WALBytes += bytes
	}
	return w.applyTails(ctx, series, size, floor, r)
}

// applyTails deletes the doomed tails whose segments end at or below the floor, and those whose segments are still stored
// whole, which is asked once more because nothing else guards a tail.
func (w *WALDecision) applyTails(ctx context.Context, series *repository.Series, size postgres.SegmentSize, floor postgres.LSN, r *Result) error {
	var doomed []repository.Tail
	var asked postgres.SegmentName
	var whole bool
	for _, tail := range w.doomedTails { // by segment
		name := postgres.SegmentAt(w.Timeline, tail.Start, size)
		if name.End(size) > floor {
			if name != asked {
				info, err := series.StatWAL(ctx, string(name))
				if err != nil && !errors.Is(err, objectstore.ErrNotExist) {
					return err
				}
				asked, whole = name, err == nil && info.Size == int64(size)
			}
			if !whole {
				continue
			}
		}
		doomed = append(doomed, tail)
	}
	for batch := range slices.Chunk(doomed, deleteBatch) {
		if err := series.DeleteTails(ctx, batch...); errors.Is(err, objectstore.ErrAccess) {
			// In a store that only takes objects the streamer cannot remove them either. They do no harm, and it is no
			// reason to fail where the policy itself removes nothing.
			r.Held = append(r.Held, fmt.Sprintf("%d tails on timeline %d that are not needed any more: %v", len(doomed), uint32(w.Timeline), err))
			return nil
		} else if err != nil {
			return err
		}
		r.Tails += len(batch)
		for _, tail := range batch {
			r.TailBytes += tail.StoredSize
		}
	}
	return nil
}

// changed recognises what the series refuses because the plan is not about it any more.
func changed(err error) error {
	if _, ok := errors.AsType[*repository.FloorError](err); ok {
		return fmt.Errorf("%w: %w", ErrChanged, err)
	}
	return err
}

// maxReplans bounds how often Run begins again because the series changes under its hands.
const maxReplans = 5

// Run reads, plans and applies, and does so again when the series has changed meanwhile.
func Run(ctx context.Context, series *repository.Series, policy Policy, clock func() time.Time) (*Result, error) {
	total := &Result{ExpiredImages: []string{}, Held: []string{}}
	for n := 1; ; n++ {
		state, err := Read(ctx, series)
		if err != nil {
			return total, fmt.Errorf("plan retention of %s: %w", series.ID(), err)
		}
		plan, err := Make(state, policy, clock())
		if err != nil {
			return total, err
		}
		r, err := Apply(ctx, series, plan)
		total.add(r)
		if !errors.Is(err, ErrChanged) || n >= maxReplans {
			return total, err
		}
	}
}
