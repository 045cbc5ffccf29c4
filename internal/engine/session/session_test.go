package session

import (
	"encoding/json"
	"strings"
	"testing"
	"time"

	"github.com/pgark/terraform-provider-pgark/internal/engine/job"
	"github.com/pgark/terraform-provider-pgark/internal/engine/objectstore"
	"github.com/pgark/terraform-provider-pgark/internal/engine/postgres"
	"github.com/pgark/terraform-provider-pgark/internal/engine/repository"
)

var now = time.Date(2026, 5, 31, 12, 0, 0, 0, time.UTC)

func hoursAgo(h float64) time.Time { return now.Add(-time.Duration(h * float64(time.Hour))) }

func record(kind, result string, started, hours float64) repository.SessionRecord {
	r := repository.SessionRecord{
		Kind: kind, Result: result, StartedAt: hoursAgo(started), CompletedAt: hoursAgo(started - hours),
		SourceBytes: 1000, ReadBytes: 500, StoredBytes: 100,
	}
	if result != Success {
		r.Error = "what went wrong " + r.StartedAt.Format("15:04")
	}
	return r
}

var ordersID = repository.SeriesID{Job: "orders", Instance: "15-main", SystemID: 7}

func emptyHead() *repository.Head { return &repository.Head{NextSID: 1} }

func defaults(o Options) Options {
	o.Now = now
	o.applyDefaults()
	return o
}

func TestCompute_nothingKnown(t *testing.T) {
	s := compute(ordersID, &input{head: emptyHead()}, defaults(Options{}))
	if s.Status != None || s.WAL.SLAPercent != nil || s.WAL.LagSeconds != nil || s.Images.Last != nil || s.RestorePoints.OldestAt != nil {
		t.Errorf("statistics of nothing: %+v", s)
	}
	if s.WAL.ObjectiveSeconds != 900 {
		t.Errorf("objective %v s, expected 15 minutes", s.WAL.ObjectiveSeconds)
	}
}

func TestCompute_images(t *testing.T) {
	in := &input{head: emptyHead(), records: []repository.SessionRecord{
		record("image", Success, 50, 1), // before the period, which is the last 24 hours
		record("image", Success, 24.5, 1),
		record("image", Warning, 14, 3),
		record("image", Error, 10, 1),
		record("image", Error, 2, 1),
	}}
	s := compute(ordersID, in, defaults(Options{})).Images
	if s.SuccessCount != 1 || s.WarningCount != 1 || s.ErrorCount != 2 {
		t.Errorf("%d success, %d warning, %d error, expected 1, 1, 2: a session counts in the period it ended in", s.SuccessCount, s.WarningCount, s.ErrorCount)
	}
	if s.AverageDurationSeconds != 5400 || s.MaxDurationSeconds != 10800 {
		t.Errorf("duration %v s on average, %v s at most", s.AverageDurationSeconds, s.MaxDurationSeconds)
	}
	if s.SourceBytes != 4000 || s.ReadBytes != 2000 || s.StoredBytes != 400 || s.Ratio != 10 {
		t.Errorf("bytes: %+v", s)
	}
	if s.ConsecutiveFailures != 2 || s.LastError != "what went wrong 10:00" || !s.LastFailureAt.Equal(hoursAgo(1)) || !s.LastSuccessAt.Equal(hoursAgo(11)) {
		t.Errorf("failures: %+v", s)
	}
	if s.Last == nil || s.Last.Result != Error || s.Last.DurationSeconds != 3600 || s.Last.Ratio != 10 {
		t.Errorf("last session: %+v", s.Last)
	}
}

func TestCompute_imageWithoutRecord(t *testing.T) {
	head := emptyHead()
	head.Images = []repository.ImageInfo{
		{SID: 3, StartedAt: hoursAgo(6), CompletedAt: hoursAgo(5), SourceBytes: 70, StoredBytes: 7},
		{SID: 4, StartedAt: hoursAgo(2), CompletedAt: hoursAgo(1), SourceBytes: 90, StoredBytes: 9},
	}
	recorded := record("image", Success, 6, 1)
	recorded.SID = 3
	failed := record("image", Error, 4, 1)
	s := compute(ordersID, &input{head: head, records: []repository.SessionRecord{recorded, failed}}, defaults(Options{}))
	if s.Images.SuccessCount != 2 || s.Images.ErrorCount != 1 || s.Images.ConsecutiveFailures != 0 || s.Status != Success {
		t.Errorf("images: %+v, status %s; image 4 is live, so it succeeded", s.Images, s.Status)
	}
	if p := s.RestorePoints; p.Count != 2 || !p.OldestAt.Equal(hoursAgo(5)) || !p.NewestAt.Equal(hoursAgo(1)) || p.StoredBytes != 16 {
		t.Errorf("restore points: %+v", p)
	}
}

func TestCompute_wal(t *testing.T) {
	on := func(r repository.SessionRecord, delay float64, failures int64) repository.SessionRecord {
		r.MaxDelay, r.Failures = delay, failures
		return r
	}
	in := &input{
		head: emptyHead(),
		records: []repository.SessionRecord{
			on(record("wal", Error, 40, 2), 5000, 9), // before the period
			on(record("wal", Success, 26, 10), 1, 0),
			on(record("wal", Warning, 16, 8), 899, 3),
			on(record("wal", Success, 8, 4), 901, 0), // succeeded, but too late
			on(record("wal", Error, 4, 2), 2, 5),
		},
		wal: walInput{segments: 100, storedBytes: 400 << 20, timeline: 3, last: &repository.WALInfo{
			Name: "0000000300000000000000A2", Size: 16 << 20, StoredAt: hoursAgo(0.5)}},
	}
	all := compute(ordersID, in, defaults(Options{}))
	s := all.WAL
	if *s.SLAPercent != 50 || s.Misses != 2 || s.MaxDelaySeconds != 901 || s.Failures != 8 {
		t.Errorf("SLA %v %%, %d misses, %v s delay, %d failures", *s.SLAPercent, s.Misses, s.MaxDelaySeconds, s.Failures)
	}
	if s.SuccessCount != 2 || s.WarningCount != 1 || s.ErrorCount != 1 || s.AverageDurationSeconds != 6*3600 || s.MaxDurationSeconds != 10*3600 {
		t.Errorf("sessions: %+v", s)
	}
	if s.Segments != 100 || s.SourceBytes != 1600<<20 || s.Ratio != 4 || s.AverageSourceBytes != 1000 {
		t.Errorf("sizes: %+v", s)
	}
	if *s.LagSeconds != 1800 || s.LastSegment != "0000000300000000000000A2" || s.Timeline != 3 || s.LastCommitAt != nil {
		t.Errorf("lag: %+v", s)
	}
	if s.LastError != "what went wrong 08:00" || all.Status != Error {
		t.Errorf("last error %q, status %s", s.LastError, all.Status)
	}
}

func TestCompute_continuous(t *testing.T) {
	j := &job.Job{Name: "orders", WAL: job.WAL{Mode: job.WALContinuous, Interval: job.Duration(time.Minute), MaxLag: job.Duration(time.Second)}}
	on := func(r repository.SessionRecord, delay, lag, late float64) repository.SessionRecord {
		r.MaxDelay, r.MaxLag, r.Late, r.Tails, r.TailBytes = delay, lag, late, 10, 1000
		return r
	}
	gap := on(record("wal", Error, 2, 1), 1, 0.5, 0)
	gap.Gaps, gap.Spooled = 1, 7
	records := []repository.SessionRecord{
		on(record("wal", Success, 20, 10), 2, 0.4, 0),
		on(record("wal", Success, 10, 5), 2, 9, 12),  // 12 of 18,000 seconds
		on(record("wal", Warning, 5, 1), 2, 300, 80), // 80 of 3,600 seconds
		on(record("wal", Success, 4, 1), 800, 0, 0),  // streamed nothing: a segment may take 15 minutes
		on(record("wal", Success, 3, 1), 901, 0, 0),
		gap,
	}
	in := &input{head: emptyHead(), records: records, wal: walInput{
		timeline: 1, segments: 1,
		last: &repository.WALInfo{Name: "000000010000000000000002", Size: 16 << 20, StoredAt: hoursAgo(2), LastTime: new(hoursAgo(2.5))},
		tail: &repository.WALInfo{StoredAt: hoursAgo(0.5), LastTime: new(hoursAgo(0.6))},
	}}
	s := compute(ordersID, in, defaults(Options{Job: j})).WAL
	if s.ObjectiveSeconds != 1 || s.Misses != 3 || *s.SLAPercent != 50 {
		t.Errorf("objective %v s, %d misses, %v %%; expected max_lag, missed by the late, the slow, and the one that failed", s.ObjectiveSeconds, s.Misses, *s.SLAPercent)
	}
	if s.LateSeconds != 92 || s.MaxLagSeconds != 300 || s.Tails != 60 || s.TailBytes != 6000 || s.Gaps != 1 || s.Spooled != 7 {
		t.Errorf("sums: %+v", s)
	}
	if within := *s.WithinPercent; within < 99.84 || within > 99.86 {
		t.Errorf("within max_lag for %v %% of 17 hours, expected all but 92 seconds", within)
	}
	if *s.LagSeconds != 1800 || !s.LastStoredAt.Equal(hoursAgo(0.5)) || !s.LastCommitAt.Equal(hoursAgo(0.6)) || s.LastSegment != "000000010000000000000002" {
		t.Errorf("the tail is newer than the segment: %+v", s)
	}
	if s.Last.Gaps != 1 || s.Last.MaxLagSeconds != 0.5 {
		t.Errorf("last session: %+v", s.Last)
	}
	// An objective that somebody names is one that no second may miss.
	s = compute(ordersID, in, defaults(Options{Job: j, MaxDelay: 10 * time.Second})).WAL
	if s.Misses != 4 || s.ObjectiveSeconds != 10 {
		t.Errorf("%d misses of %v s, expected 4", s.Misses, s.ObjectiveSeconds)
	}
}

func TestCompute_job(t *testing.T) {
	j := &job.Job{Name: "orders", Enabled: true, Image: job.Image{Schedule: "0 22 * * *", Timezone: "UTC"}, WAL: job.WAL{Interval: job.Duration(5 * time.Minute)}}
	head := emptyHead()
	head.Sessions = []repository.OpenSession{{SID: 5, Kind: repository.SessionRestore}, {SID: 6, Kind: repository.SessionImage, StartedAt: hoursAgo(0.25)}}
	s := compute(ordersID, &input{head: head}, defaults(Options{Job: j}))
	if s.Images.NextAt == nil || !s.Images.NextAt.Equal(time.Date(2026, 5, 31, 22, 0, 0, 0, time.UTC)) {
		t.Errorf("next image at %v", s.Images.NextAt)
	}
	if s.Images.RunningSince == nil || !s.Images.RunningSince.Equal(hoursAgo(0.25)) {
		t.Errorf("running since %v", s.Images.RunningSince)
	}
	if s.WAL.ObjectiveSeconds != 300 {
		t.Errorf("objective %v s, expected the job's interval", s.WAL.ObjectiveSeconds)
	}
}

func TestSummarize(t *testing.T) {
	protected := func(instance string, id postgres.SystemID, status string, failures int, newest float64) Series {
		return Series{Job: "orders", Instance: instance, SystemIdentifier: id, Status: status,
			Images: Images{ConsecutiveFailures: failures}, RestorePoints: RestorePoints{Count: 1, NewestAt: at(hoursAgo(newest))}}
	}
	s := Statistics{Series: []Series{
		protected("13-old", 1, Success, 0, 1),
		protected("15-main", 7, Error, 0, 900), // the cluster that was there before
		protected("15-main", 8, Warning, 0, 2),
		protected("16-other", 9, Error, 2, 30),
	}}
	s.summarize(Options{Job: &job.Job{Name: "orders", Protected: []job.Instance{{Name: "15-main", SystemID: 8}, {Name: "17-new"}}}})
	if s.ProtectedInstances != 2 || s.UnprotectedInstances != 2 || s.SuccessInstances != 1 || s.WarningInstances != 1 || s.ErrorInstances != 1 {
		t.Errorf("instances: %+v", s)
	}
	if s.Series[1].Current || !s.Series[2].Current {
		t.Error("the newer series of 15-main is the current one")
	}
}

func TestCollect(t *testing.T) {
	ctx := t.Context()
	store, err := objectstore.Open(ctx, objectstore.Location{URL: "file://" + t.TempDir()}, objectstore.Options{})
	if err != nil {
		t.Fatal(err)
	}
	repo, _, err := repository.Create(ctx, store, nil)
	if err != nil {
		t.Fatal(err)
	}
	series := repo.Series(ordersID)
	present := time.Now().UTC()
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	sid, err := series.Begin(ctx, repository.OpenSession{Kind: repository.SessionImage, Host: "db1"})
	must(err)
	must(series.Commit(ctx, repository.ImageInfo{SID: sid, Kind: "full", Timeline: 1, StartLSN: 0x2000000, StopLSN: 0x2000100, SegmentSize: 16 << 20,
		StartedAt: present.Add(-30 * time.Hour), CompletedAt: present.Add(-29 * time.Hour), SourceBytes: 50, StoredBytes: 5}))
	for _, name := range []string{"000000010000000000000002", "000000010000000000000003", "000000020000000000000003"} {
		content := strings.Repeat(name, 100)
		_, _, err := series.PutWAL(ctx, repository.WALInfo{Name: name, Size: int64(len(content)), StoredAt: present.Add(-time.Minute)}, strings.NewReader(content))
		must(err)
	}
	for i, result := range []string{Error, Error, Success} {
		must(series.PutSession(ctx, repository.SessionRecord{Kind: "wal", Result: result, StartedAt: present.Add(time.Duration(i-48) * time.Hour), CompletedAt: present.Add(-time.Hour)}))
	}
	must(series.PutSession(ctx, repository.SessionRecord{Kind: "image", Result: Error, Error: "disk full", StartedAt: present.Add(-3 * time.Hour), CompletedAt: present.Add(-2 * time.Hour)}))

	s, err := Collect(ctx, repo, []repository.SeriesID{ordersID}, Options{})
	must(err)
	if len(s.Series) != 1 || !s.Series[0].Current || s.UnprotectedInstances != 1 || s.ErrorInstances != 1 {
		t.Fatalf("statistics: %+v", s)
	}
	one := s.Series[0]
	if one.Images.SuccessCount != 0 || one.Images.ErrorCount != 1 || one.Images.ConsecutiveFailures != 1 || one.Images.LastError != "disk full" || one.Images.LastSuccessAt == nil {
		t.Errorf("images: %+v", one.Images)
	}
	// Records from before the image before the period are not read: two days are not searched to tell of one.
	if one.WAL.Segments != 3 || one.WAL.LastSegment != "000000020000000000000003" || one.WAL.Timeline != 2 || one.WAL.SuccessCount+one.WAL.ErrorCount != 0 {
		t.Errorf("WAL: %+v", one.WAL)
	}
	if lag := *one.WAL.LagSeconds; lag < 59 || lag > 120 {
		t.Errorf("lag %v s, expected a minute", lag)
	}
	b, err := json.Marshal(s)
	must(err)
	for _, want := range []string{`"system_identifier":"7"`, `"sla_percent":null`, `"next_at":null`, `"last_error":"disk full"`} {
		if !strings.Contains(string(b), want) {
			t.Errorf("JSON lacks %s: %s", want, b)
		}
	}
}

// What was streamed behind the last whole segment counts.
func TestCollect_tails(t *testing.T) {
	ctx := t.Context()
	store, err := objectstore.Open(ctx, objectstore.Location{URL: "file://" + t.TempDir()}, objectstore.Options{})
	if err != nil {
		t.Fatal(err)
	}
	repo, _, err := repository.Create(ctx, store, nil)
	if err != nil {
		t.Fatal(err)
	}
	const size = 1 << 20
	series := repo.Series(ordersID)
	stored := time.Now().UTC().Truncate(time.Microsecond)
	commit := stored.Add(-time.Second)
	segment := repository.WALInfo{Name: "000000010000000000000002", Size: size, StoredAt: stored.Add(-time.Hour)}
	if _, _, err := series.PutWAL(ctx, segment, strings.NewReader(strings.Repeat("x", size))); err != nil {
		t.Fatal(err)
	}
	for _, end := range []postgres.LSN{100, 300, 200} {
		tail := repository.Tail{Timeline: 1, Start: 3 * size, End: 3*size + end}
		info := repository.WALInfo{StoredAt: stored.Add(time.Duration(end-300) * time.Millisecond), LastTime: &commit}
		if _, err := series.PutTail(ctx, tail, info, make([]byte, end)); err != nil {
			t.Fatal(err)
		}
	}
	s, err := Collect(ctx, repo, []repository.SeriesID{ordersID}, Options{})
	if err != nil {
		t.Fatal(err)
	}
	w := s.Series[0].WAL
	if w.LastSegment != segment.Name || !w.LastStoredAt.Equal(stored) || w.LastCommitAt == nil || !w.LastCommitAt.Equal(commit) || w.Segments != 1 {
		t.Errorf("got %+v, expected the newest tail's times", w)
	}
}
