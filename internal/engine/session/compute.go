package session

import (
	"cmp"
	"slices"
	"time"

	"github.com/pgark/terraform-provider-pgark/internal/engine/postgres"
	"github.com/pgark/terraform-provider-pgark/internal/engine/repository"
)

// compute makes a series' statistics. It is a function of its arguments alone.
func compute(id repository.SeriesID, in *input, o Options) Series {
	start := o.Now.Add(-o.Period)
	s := Series{Job: id.Job, Instance: id.Instance, SystemIdentifier: id.SystemID}
	images, wal := in.sessions()
	s.Images = computeImages(images, start)
	s.WAL = computeWAL(wal, start, o)
	s.addHead(in.head, o)
	s.addWAL(in.wal, in.head, o)
	s.Status = s.status()
	return s
}

// sessions splits the records by kind, oldest first. An image whose record is missing, because the runner was killed
// between commit and record, is in the head all the same.
func (in *input) sessions() (images, wal []repository.SessionRecord) {
	recorded := make(map[repository.SID]bool)
	for _, r := range in.records {
		switch r.Kind {
		case "image":
			images = append(images, r)
			if r.SID != 0 {
				recorded[r.SID] = true
			}
		case "wal":
			wal = append(wal, r)
		}
	}
	for _, i := range in.head.Images {
		if recorded[i.SID] {
			continue
		}
		images = append(images, repository.SessionRecord{
			ID: i.SID.String(), Kind: "image", Result: Success, SID: i.SID, StartedAt: i.StartedAt, CompletedAt: i.CompletedAt,
			SourceBytes: i.SourceBytes, ReadBytes: i.ReadBytes, StoredBytes: i.StoredBytes,
		})
	}
	byStart := func(a, b repository.SessionRecord) int { return a.StartedAt.Compare(b.StartedAt) }
	slices.SortStableFunc(images, byStart)
	slices.SortStableFunc(wal, byStart)
	return images, wal
}

// durations gathers average and maximum.
type durations struct {
	sum, max time.Duration
	n        int
}

func (d *durations) add(r repository.SessionRecord) {
	took := max(r.CompletedAt.Sub(r.StartedAt), 0)
	d.sum, d.max, d.n = d.sum+took, max(d.max, took), d.n+1
}

func (d *durations) average() float64 {
	if d.n == 0 {
		return 0
	}
	return (d.sum / time.Duration(d.n)).Seconds()
}

func computeImages(records []repository.SessionRecord, start time.Time) Images {
	var s Images
	var d durations
	for _, r := range records {
		if r.Result == Error {
			s.ConsecutiveFailures++
			s.LastFailureAt, s.LastError = at(r.CompletedAt), r.Error
		} else {
			s.ConsecutiveFailures = 0
			s.LastSuccessAt = at(r.CompletedAt)
		}
		s.Last = session(r)
		if r.CompletedAt.Before(start) {
			continue
		}
		d.add(r)
		switch r.Result {
		case Error:
			s.ErrorCount++
		case Warning:
			s.WarningCount++
		default:
			s.SuccessCount++
		}
		s.SourceBytes += r.SourceBytes
		s.ReadBytes += r.ReadBytes
		s.StoredBytes += r.StoredBytes
	}
	s.AverageDurationSeconds, s.MaxDurationSeconds = d.average(), d.max.Seconds()
	s.Ratio = ratio(s.SourceBytes, s.StoredBytes)
	return s
}

func computeWAL(records []repository.SessionRecord, start time.Time, o Options) WAL {
	s := WAL{ObjectiveSeconds: o.MaxDelay.Seconds()}
	var d, streamed durations
	var sourceBytes int64
	for _, r := range records {
		if r.Result != Success {
			s.LastFailureAt, s.LastError = at(r.CompletedAt), r.Error
		}
		s.Last = session(r)
		if r.CompletedAt.Before(start) {
			continue
		}
		d.add(r)
		switch r.Result {
		case Error:
			s.ErrorCount++
		case Warning:
			s.WarningCount++
		default:
			s.SuccessCount++
		}
		if r.Result == Error || missed(r, o) {
			s.Misses++
		}
		s.Failures += r.Failures
		s.MaxDelaySeconds = max(s.MaxDelaySeconds, r.MaxDelay)
		if r.MaxLag > 0 {
			streamed.add(r)
		}
		s.MaxLagSeconds = max(s.MaxLagSeconds, r.MaxLag)
		s.LateSeconds += r.Late
		s.Tails += r.Tails
		s.TailBytes += r.TailBytes
		s.Spooled += r.Spooled
		s.Gaps += r.Gaps
		s.MaxSourceBytes = max(s.MaxSourceBytes, r.SourceBytes)
		sourceBytes += r.SourceBytes
	}
	s.AverageDurationSeconds, s.MaxDurationSeconds = d.average(), d.max.Seconds()
	if d.n > 0 {
		s.AverageSourceBytes = sourceBytes / int64(d.n)
		percent := 100 * float64(d.n-s.Misses) / float64(d.n)
		s.SLAPercent = &percent
	}
	if streamed.sum > 0 {
		percent := 100 * (1 - min(s.LateSeconds/streamed.sum.Seconds(), 1))
		s.WithinPercent = &percent
	}
	return s
}

// missed tells whether a session of WAL missed the objective (Options.MaxDelay).
func missed(r repository.SessionRecord, o Options) bool {
	if o.whole == 0 {
		return max(r.MaxDelay, r.MaxLag) > o.MaxDelay.Seconds()
	}
	if r.MaxLag > 0 {
		return r.Late > (1-withinShare)*r.CompletedAt.Sub(r.StartedAt).Seconds()
	}
	return r.MaxDelay > o.whole.Seconds()
}

// addHead adds what the head and the job say of now.
func (s *Series) addHead(h *repository.Head, o Options) {
	for _, i := range h.Images {
		s.RestorePoints.Count++
		s.RestorePoints.StoredBytes += i.StoredBytes
		if s.RestorePoints.OldestAt == nil || i.CompletedAt.Before(*s.RestorePoints.OldestAt) {
			s.RestorePoints.OldestAt = at(i.CompletedAt)
		}
		if s.RestorePoints.NewestAt == nil || i.CompletedAt.After(*s.RestorePoints.NewestAt) {
			s.RestorePoints.NewestAt = at(i.CompletedAt)
		}
	}
	for _, open := range h.Sessions {
		if open.Kind == repository.SessionImage {
			s.Images.RunningSince = at(open.StartedAt)
		}
	}
	if o.Job != nil && o.Job.Enabled && o.Job.Name == s.Job {
		// The schedule was checked when the job file was read.
		if next, err := o.Job.Image.Next(o.Now); err == nil && !next.IsZero() {
			s.Images.NextAt = at(next)
		}
	}
}

func (s *Series) addWAL(w walInput, h *repository.Head, o Options) {
	size := postgres.DefaultSegmentSize
	if n := len(h.Images); n > 0 {
		size = postgres.SegmentSize(h.Images[n-1].SegmentSize)
	} else if w.last != nil {
		size = postgres.SegmentSize(w.last.Size)
	}
	s.WAL.Segments, s.WAL.StoredBytes = w.segments, w.storedBytes
	s.WAL.SourceBytes = w.segments * int64(size)
	s.WAL.Ratio = ratio(s.WAL.SourceBytes, s.WAL.StoredBytes)
	if w.last == nil {
		return
	}
	newest, commit := w.last.StoredAt, w.last.LastTime
	if w.tail != nil {
		if w.tail.StoredAt.After(newest) {
			newest = w.tail.StoredAt
		}
		if w.tail.LastTime != nil {
			commit = w.tail.LastTime
		}
	}
	lag := max(o.Now.Sub(newest), 0).Seconds()
	s.WAL.LastStoredAt, s.WAL.LagSeconds = at(newest), &lag
	s.WAL.LastSegment, s.WAL.Timeline = w.last.Name, w.timeline
	if commit != nil {
		s.WAL.LastCommitAt = at(*commit)
	}
}

// severity orders results; what is not known counts for less than what is.
var severity = map[string]int{None: 0, Success: 1, Warning: 2, Error: 3}

func (s *Series) status() string {
	worst := None
	for _, last := range []*Session{s.Images.Last, s.WAL.Last} {
		if last != nil && cmp.Less(severity[worst], severity[last.Result]) {
			worst = last.Result
		}
	}
	return worst
}

func session(r repository.SessionRecord) *Session {
	return &Session{
		ID: r.ID, Result: r.Result, StartedAt: r.StartedAt.UTC(), CompletedAt: r.CompletedAt.UTC(),
		DurationSeconds: max(r.CompletedAt.Sub(r.StartedAt), 0).Seconds(), Error: r.Error,
		SourceBytes: r.SourceBytes, ReadBytes: r.ReadBytes, StoredBytes: r.StoredBytes, Ratio: ratio(r.SourceBytes, r.StoredBytes),
		Segments: r.Segments, MaxDelaySeconds: r.MaxDelay, MaxLagSeconds: r.MaxLag, Gaps: r.Gaps,
	}
}

func at(t time.Time) *time.Time {
	t = t.UTC()
	return &t
}

func ratio(source, stored int64) float64 {
	if stored <= 0 {
		return 0
	}
	return float64(source) / float64(stored)
}
