// Package session turns what a repository records of sessions into statistics: how protection fared over a period, how
// it stands now, and what it cost.
//
// A session is one run of an image backup, or the stretch of WAL shipping between two images. Its record is written once
// it has ended (repository.SessionRecord). The package reads records, heads, and listings and headers of WAL, all of
// which are unencrypted: no identity is needed. It writes nothing and decides nothing; in particular the times that
// stores keep of their objects are used here, for counting, and must not be used for more.
package session

import (
	"context"
	"errors"
	"fmt"
	"math"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/pgark/terraform-provider-pgark/internal/engine/job"
	"github.com/pgark/terraform-provider-pgark/internal/engine/objectstore"
	"github.com/pgark/terraform-provider-pgark/internal/engine/postgres"
	"github.com/pgark/terraform-provider-pgark/internal/engine/repository"
)

// The results of a session, and of an instance as a whole.
const (
	Success = "success"
	Warning = "warning" // done, though something failed on the way
	Error   = "error"
	None    = "none" // nothing is known: no session has ended yet
)

// Options restrict and complete statistics. The zero value works.
type Options struct {
	Now    time.Time     // end of the period; default: the present
	Period time.Duration // default 24 h

	// Job, if known, is where the recovery point objective, the schedule and the protected instances come from.
	Job *job.Job

	// MaxDelay is the recovery point objective: how long WAL may take from written to durable. A session that exceeded it
	// once has missed it. Default: what the job declares, else 15 minutes.
	//
	// What a job in continuous mode declares, max_lag, is another order of magnitude: hardly a day passes in which a
	// repository does not once take a second longer. By default a session in that mode has met it that was within it
	// nearly all the time (withinShare), and one that did not stream, as a session of an older runner, is judged by the
	// interval.
	MaxDelay time.Duration

	// whole is the objective of sessions that did not stream, where it is another one; 0: MaxDelay.
	whole time.Duration
}

// withinShare of its time a session in continuous mode has to be within max_lag: three nines are some 86 seconds a day.
const withinShare = 0.999

const (
	defaultPeriod   = 24 * time.Hour
	defaultMaxDelay = 15 * time.Minute
)

func (o *Options) applyDefaults() {
	if o.Now.IsZero() {
		o.Now = time.Now()
	}
	o.Now = o.Now.UTC().Truncate(time.Microsecond) // as all times are shown
	if o.Period <= 0 {
		o.Period = defaultPeriod
	}
	if o.MaxDelay <= 0 && o.Job != nil {
		o.MaxDelay = time.Duration(o.Job.WAL.Interval)
		if o.Job.WAL.Mode == job.WALContinuous && o.Job.WAL.MaxLag > 0 {
			o.whole = max(o.MaxDelay, defaultMaxDelay)
			o.MaxDelay = time.Duration(o.Job.WAL.MaxLag)
		}
	}
	if o.MaxDelay <= 0 {
		o.MaxDelay = defaultMaxDelay
	}
}

// Statistics tell how protection fared, over all series that were asked for.
type Statistics struct {
	PeriodStartedAt time.Time `json:"period_started_at"`
	PeriodEndedAt   time.Time `json:"period_ended_at"`
	PeriodSeconds   float64   `json:"period_seconds"`

	// Instances by how their latest image fared: protected if it is there, unprotected if it failed or none was taken.
	ProtectedInstances   int `json:"protected_instances"`
	UnprotectedInstances int `json:"unprotected_instances"`

	// Instances by Status.
	SuccessInstances int `json:"success_instances"`
	WarningInstances int `json:"warning_instances"`
	ErrorInstances   int `json:"error_instances"`

	Series []Series `json:"series"` // by job, instance, system identifier
}

// Series are the statistics of one series.
type Series struct {
	Job              string            `json:"job"`
	Instance         string            `json:"instance"`
	SystemIdentifier postgres.SystemID `json:"system_identifier"`
	Current          bool              `json:"current"` // the instance's newest series; others are of clusters before it
	Status           string            `json:"status"`  // worse of the latest image session and the latest WAL session

	Images        Images        `json:"images"`
	WAL           WAL           `json:"wal"`
	RestorePoints RestorePoints `json:"restore_points"`
}

// Images are the statistics of image sessions: of the period, unless a field's name says otherwise.
type Images struct {
	SuccessCount int `json:"success_count"`
	WarningCount int `json:"warning_count"`
	ErrorCount   int `json:"error_count"`

	AverageDurationSeconds float64 `json:"average_duration_seconds"`
	MaxDurationSeconds     float64 `json:"max_duration_seconds"`

	SourceBytes int64   `json:"source_bytes"` // size of what the images hold
	ReadBytes   int64   `json:"read_bytes"`   // read from the guest's disks
	StoredBytes int64   `json:"stored_bytes"` // written to the repository
	Ratio       float64 `json:"ratio"`        // source_bytes to stored_bytes; 0: nothing was stored

	Last                *Session   `json:"last_session"` // the latest that has ended, in the period or before it
	LastSuccessAt       *time.Time `json:"last_success_at"`
	LastFailureAt       *time.Time `json:"last_failure_at"`
	LastError           string     `json:"last_error"`
	ConsecutiveFailures int        `json:"consecutive_failures"`
	RunningSince        *time.Time `json:"running_since"`
	NextAt              *time.Time `json:"next_at"` // by the job's schedule
}

// Session is one session.
type Session struct {
	ID              string    `json:"id"`
	Result          string    `json:"result"`
	StartedAt       time.Time `json:"started_at"`
	CompletedAt     time.Time `json:"completed_at"`
	DurationSeconds float64   `json:"duration_seconds"`
	Error           string    `json:"error"`
	SourceBytes     int64     `json:"source_bytes"`
	ReadBytes       int64     `json:"read_bytes"`
	StoredBytes     int64     `json:"stored_bytes"`
	Ratio           float64   `json:"ratio"`
	Segments        int64     `json:"segments"`
	MaxDelaySeconds float64   `json:"max_delay_seconds"`
	MaxLagSeconds   float64   `json:"max_lag_seconds"`
	Gaps            int64     `json:"gaps"`
}

// WAL are the statistics of WAL shipping, of the period unless a field's name says otherwise. Segments and bytes come
// from what the repository holds, so they include the session that is running; WAL that retention has removed is not in
// them. The rest comes from records of sessions that have ended.
type WAL struct {
	Segments    int64   `json:"segments"`
	SourceBytes int64   `json:"source_bytes"`
	StoredBytes int64   `json:"stored_bytes"`
	Ratio       float64 `json:"ratio"`

	SuccessCount           int     `json:"success_count"` // sessions
	WarningCount           int     `json:"warning_count"`
	ErrorCount             int     `json:"error_count"`
	AverageDurationSeconds float64 `json:"average_duration_seconds"`
	MaxDurationSeconds     float64 `json:"max_duration_seconds"`
	AverageSourceBytes     int64   `json:"average_source_bytes"` // a session
	MaxSourceBytes         int64   `json:"max_source_bytes"`
	Failures               int64   `json:"failures"` // attempts that were made again

	ObjectiveSeconds float64  `json:"objective_seconds"` // how long WAL may take from written, or complete, to durable
	SLAPercent       *float64 `json:"sla_percent"`       // of sessions that met it; null: none has ended
	Misses           int      `json:"misses"`            // sessions that did not
	MaxDelaySeconds  float64  `json:"max_delay_seconds"` // of whole segments, from complete to durable

	// Of sessions in continuous mode.
	MaxLagSeconds float64  `json:"max_lag_seconds"` // longest time that written WAL was not durable
	LateSeconds   float64  `json:"late_seconds"`    // how long the lag was more than max_lag, in all
	WithinPercent *float64 `json:"within_percent"`  // of their time that it was not; null: there was none
	Tails         int64    `json:"tails"`
	TailBytes     int64    `json:"tail_bytes"` // as stored

	Spooled int64 `json:"spooled"` // files that waited in the temporary folder
	Gaps    int64 `json:"gaps"`    // places where WAL was lost

	LastStoredAt  *time.Time        `json:"last_stored_at"` // of the newest segment, or the newest tail behind it
	LastSegment   string            `json:"last_segment"`
	Timeline      postgres.Timeline `json:"timeline"`
	LagSeconds    *float64          `json:"lag_seconds"` // since last_stored_at
	LastCommitAt  *time.Time        `json:"last_commit_at"`
	Last          *Session          `json:"last_session"`
	LastFailureAt *time.Time        `json:"last_failure_at"`
	LastError     string            `json:"last_error"`
}

// RestorePoints are the live images.
type RestorePoints struct {
	Count       int        `json:"count"`
	OldestAt    *time.Time `json:"oldest_at"`
	NewestAt    *time.Time `json:"newest_at"`
	StoredBytes int64      `json:"stored_bytes"` // uploaded for them; what expired images left behind is not in it
}

// parallelSeries bounds the series that are read at once; each has few requests in flight.
const parallelSeries = 4

// Collect reads the statistics of the given series.
func Collect(ctx context.Context, repo *repository.Repository, ids []repository.SeriesID, o Options) (*Statistics, error) {
	o.applyDefaults()
	s := &Statistics{
		PeriodStartedAt: o.Now.Add(-o.Period), PeriodEndedAt: o.Now, PeriodSeconds: o.Period.Seconds(),
		Series: make([]Series, len(ids)),
	}
	g, gctx := errgroup.WithContext(ctx)
	g.SetLimit(parallelSeries)
	for i, id := range ids {
		g.Go(func() error {
			in, err := read(gctx, repo.Series(id), o)
			if err != nil {
				return fmt.Errorf("statistics of %s: %w", id, err)
			}
			s.Series[i] = compute(id, in, o)
			return nil
		})
	}
	if err := g.Wait(); err != nil {
		return nil, err
	}
	s.summarize(o)
	return s, nil
}

// summarize marks the current series of each instance and counts instances.
func (s *Statistics) summarize(o Options) {
	type instance struct{ job, name string }
	current := make(map[instance]int)
	for i := range s.Series {
		key := instance{s.Series[i].Job, s.Series[i].Instance}
		if best, ok := current[key]; !ok || s.Series[i].newerThan(&s.Series[best], o) {
			current[key] = i
		}
	}
	counted := make(map[instance]bool)
	count := func(protected bool, status string) {
		if protected {
			s.ProtectedInstances++
		} else {
			s.UnprotectedInstances++
		}
		switch status {
		case Success:
			s.SuccessInstances++
		case Warning:
			s.WarningInstances++
		case Error:
			s.ErrorInstances++
		}
	}
	for key, i := range current {
		series := &s.Series[i]
		series.Current = true
		counted[key] = true
		count(series.RestorePoints.Count > 0 && series.Images.ConsecutiveFailures == 0, series.Status)
	}
	if o.Job == nil {
		return
	}
	for _, i := range o.Job.Protected { // those that have stored nothing yet
		if !counted[instance{o.Job.Name, i.Name}] {
			count(false, None)
		}
	}
}

// newerThan decides between two series of one instance: the job knows its cluster's identity; else the latest to show
// any life is the current one.
func (s *Series) newerThan(other *Series, o Options) bool {
	if o.Job != nil {
		for _, i := range o.Job.Protected {
			if i.Name == s.Instance && i.SystemID != 0 {
				if s.SystemIdentifier == i.SystemID {
					return true
				}
				if other.SystemIdentifier == i.SystemID {
					return false
				}
			}
		}
	}
	return s.lastLife().After(other.lastLife())
}

func (s *Series) lastLife() time.Time {
	var last time.Time
	for _, t := range []*time.Time{s.WAL.LastStoredAt, s.RestorePoints.NewestAt, s.Images.RunningSince, s.Images.LastFailureAt} {
		if t != nil && t.After(last) {
			last = *t
		}
	}
	return last
}

// input is what the statistics of a series are computed from.
type input struct {
	head    *repository.Head
	records []repository.SessionRecord // oldest first; from the start of the period, and from the latest image before it
	wal     walInput
}

// walInput is what the WAL of a series tells.
type walInput struct {
	segments, storedBytes int64               // stored within the period
	last                  *repository.WALInfo // of the newest segment of the newest timeline
	tail                  *repository.WALInfo // of the newest tail behind it; nil: there is none
	timeline              postgres.Timeline
}

func read(ctx context.Context, series *repository.Series, o Options) (*input, error) {
	head, err := series.Head(ctx)
	if err != nil {
		return nil, err
	}
	in := &input{head: head}
	start := o.Now.Add(-o.Period)
	var before *repository.ImageInfo // the latest image before the period
	for i := range head.Images {
		if image := &head.Images[i]; image.CompletedAt.Before(start) {
			before = image
		}
	}
	// The WAL session that runs as the period starts began after the image before it, and so did every failure that
	// counts as consecutive. Without such an image, all there is must be read.
	var after time.Time
	if before != nil {
		after = before.StartedAt.Add(-time.Second)
	}
	for r, err := range series.Sessions(ctx, after) {
		if err != nil {
			return nil, err
		}
		in.records = append(in.records, r)
	}
	in.wal, err = readWAL(ctx, series, before, start)
	return in, err
}

func readWAL(ctx context.Context, series *repository.Series, before *repository.ImageInfo, start time.Time) (walInput, error) {
	var w walInput
	timelines, err := series.Timelines(ctx)
	if err != nil {
		return w, err
	}
	for _, t := range timelines {
		from := ""
		if before != nil && t == before.Timeline {
			from = string(postgres.SegmentAt(t, before.StartLSN, postgres.SegmentSize(before.SegmentSize)))
		}
		last := ""
		for e, err := range series.ListWAL(ctx, t, from) {
			if err != nil {
				return w, err
			}
			f, err := postgres.ParseWALFile(e.Name)
			if err != nil {
				continue // something that a later version stores
			}
			if f.Kind == postgres.SegmentFile {
				last = e.Name
			}
			if e.Modified.Before(start) {
				continue
			}
			w.storedBytes += e.StoredSize
			if f.Kind == postgres.SegmentFile {
				w.segments++
			}
		}
		if last == "" {
			continue
		}
		info, err := series.StatWAL(ctx, last)
		if errors.Is(err, objectstore.ErrNotExist) {
			continue // retention removed it meanwhile
		}
		if err != nil {
			return w, err
		}
		w.last, w.timeline = &info, t
	}
	if w.last == nil {
		return w, nil
	}
	w.tail, err = readTail(ctx, series, w.timeline, postgres.SegmentName(w.last.Name), postgres.SegmentSize(w.last.Size))
	return w, err
}

// readTail reads what the newest of the tails behind a segment tells.
func readTail(ctx context.Context, series *repository.Series, t postgres.Timeline, segment postgres.SegmentName, size postgres.SegmentSize) (*repository.WALInfo, error) {
	if segment.Check(size) != nil {
		return nil, nil // no segment that PostgreSQL has made: its size tells nothing
	}
	var newest repository.Tail
	for tail, err := range series.ListTails(ctx, t, segment.End(size), math.MaxUint64) {
		if err != nil {
			return nil, err
		}
		if tail.End > newest.End {
			newest = tail
		}
	}
	if newest.End == 0 {
		return nil, nil
	}
	info, err := series.StatTail(ctx, newest)
	if errors.Is(err, objectstore.ErrNotExist) {
		return nil, nil // the whole segment has replaced it meanwhile
	}
	if err != nil {
		return nil, err
	}
	return &info, nil
}
