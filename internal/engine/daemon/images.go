package daemon

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/jackc/pgx/v5/pgconn"

	"github.com/pgark/terraform-provider-pgark/internal/engine/daemon/control"
	"github.com/pgark/terraform-provider-pgark/internal/engine/job"
	"github.com/pgark/terraform-provider-pgark/internal/engine/postgres"
	"github.com/pgark/terraform-provider-pgark/internal/engine/repository"
)

const (
	// lookAgain bounds every sleep: a clock that was set, or a machine that slept, is noticed within it.
	lookAgain = time.Minute

	// serverAwayWait is the wait before an image is tried again because PostgreSQL does not run. It takes no attempt away:
	// a restart is no failure of a backup.
	serverAwayWait = 15 * time.Second

	// gapImageAgain is the least time between the end of an image that was taken because of lost WAL and the next such: a
	// server whose WAL is lost again and again is not to be read again and again. It is twice the time that the image took,
	// if that is longer.
	gapImageAgain = 10 * time.Minute

	// firstImageAgain is the wait after all attempts at a job's first image failed and no schedule names another time.
	firstImageAgain = time.Hour
)

// images takes a protection's images, one at a time: when the schedule says, and on demand.
type images struct {
	p      *protection
	demand chan *taking  // capacity 1, filled under mu only when current is nil
	wake   chan struct{} // capacity 1: the job file may say something else

	mu          sync.Mutex // guards what follows
	current     *taking
	next        time.Time // what the loop waits for; zero: nothing
	last        *repository.ImageInfo
	lastError   string
	lastErrorAt time.Time

	gapAt    time.Time // when WAL was lost that no image makes up for yet; zero: never
	gapAfter time.Time // no image because of it before
}

// taking is one image being taken.
type taking struct {
	kind control.Kind
	done chan struct{} // Closed when info or err is set.
	info *repository.ImageInfo
	err  error

	mu       sync.Mutex // guards progress
	progress string
}

func (t *taking) show(line string) {
	t.mu.Lock()
	t.progress = line
	t.mu.Unlock()
}

func (t *taking) shown() string {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.progress
}

func newImages(p *protection) *images {
	return &images{p: p, demand: make(chan *taking, 1), wake: make(chan struct{}, 1)}
}

func (m *images) reconsider() {
	select {
	case m.wake <- struct{}{}:
	default:
	}
}

// request starts an image, or joins the one that is being taken, which may be of another kind.
func (m *images) request(kind control.Kind) *taking {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.current == nil {
		m.current = &taking{kind: kind, done: make(chan struct{})}
		m.demand <- m.current
	}
	return m.current
}

// taking is the image that is being taken, or about to be; nil: none is.
func (m *images) taking() *taking {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.current
}

// begin claims the right to take an image for the schedule; nil when a demand came first.
func (m *images) begin() *taking {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.current != nil {
		return nil
	}
	m.current = &taking{done: make(chan struct{})}
	return m.current
}

// afterGap has an image taken soon, because WAL was lost at a time: no moment after it can be restored until there is
// one. An image that was begun before does not make up for it. A series without an image has nothing to make up for.
func (m *images) afterGap(at time.Time) {
	m.mu.Lock()
	if at.After(m.gapAt) {
		m.gapAt = at
	}
	m.mu.Unlock()
	m.reconsider()
}

// dueForGap is when an image is due because WAL was lost; the zero time for never.
func (m *images) dueForGap() (due, lost time.Time) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.gapAt.IsZero() {
		return time.Time{}, time.Time{}
	}
	return later(m.gapAt, m.gapAfter), m.gapAt
}

// taken notes an image: what was due before it began is settled, and the gaps found before are bridged.
func (m *images) taken(plan *plan, began time.Time, id string) {
	m.mu.Lock()
	if m.gapAt.Before(began) {
		m.gapAt = time.Time{}
	}
	open := m.gapAt
	m.mu.Unlock()
	plan.taken(began)
	plan.lost(open)
	m.p.d.bridge(began, id)
}

func (m *images) putOff(until time.Time) {
	m.mu.Lock()
	m.gapAfter = until
	m.mu.Unlock()
}

func later(a, b time.Time) time.Time {
	if a.After(b) {
		return a
	}
	return b
}

// run takes images until ctx ends.
func (m *images) run(ctx context.Context) {
	plan := m.plan(ctx)
	c := m.p.d.current()
	if plan.exhausted(c.job, time.Now()) {
		m.p.d.log.Error("the image failed for good: its last attempt ended with the runner", "attempts", c.job.Image.Retry.Attempts)
	}
	if !plan.GapAt.IsZero() {
		m.afterGap(plan.GapAt)
	}
	var again time.Time // of the next attempt at an image that failed
	excused := false    // the latest failure was PostgreSQL not running
	for ctx.Err() == nil {
		c = m.p.d.current()
		now := time.Now()
		at := plan.due(c.job, now)
		if !again.IsZero() && c.job.Enabled {
			at = again
		}
		forGap := false
		due, lost := m.dueForGap()
		plan.lost(lost)
		if !due.IsZero() && plan.hasImage && c.job.Enabled && (at.IsZero() || due.Before(at)) {
			at, forGap = due, true
		}
		m.mu.Lock()
		m.next = at
		m.mu.Unlock()

		sleep := lookAgain
		if !at.IsZero() {
			sleep = max(min(sleep, at.Sub(now)), 0)
		}
		timer := time.NewTimer(sleep)
		var t *taking
		select {
		case <-ctx.Done():
		case <-m.wake:
			c = m.p.d.current()
			plan.changed(c.job)
		case t = <-m.demand:
			now = time.Now()
			if err := m.take(ctx, t); err == nil {
				m.taken(plan, now, t.info.SID.String())
				again = time.Time{}
			}
		case <-timer.C:
			now = time.Now()
			if at.IsZero() || now.Before(at) {
				break
			}
			if t = m.begin(); t == nil {
				break // a demand came first
			}
			wait := max(time.Duration(c.job.Image.Retry.Wait), time.Second)
			if forGap {
				m.p.d.log.Warn("an image is taken because wal was lost", "found_at", lost.UTC().Format(time.RFC3339))
				if m.takeForGap(ctx, plan, t, now, wait) {
					again = time.Time{}
				}
				break
			}
			plan.begin()
			err := m.take(ctx, t)
			switch {
			case err == nil:
				m.taken(plan, now, t.info.SID.String())
				again, excused = time.Time{}, false
			case ctx.Err() != nil:
				plan.excuse() // it is due again when the runner is back
			case serverAway(err):
				plan.excuse()
				if !excused {
					m.p.d.log.Warn("the image waits for PostgreSQL to run", "error", err)
				}
				again, excused = time.Now().Add(serverAwayWait), true
			case plan.exhausted(c.job, time.Now()):
				m.p.d.log.Error("the image failed for good: the next one is due as scheduled", "attempts", c.job.Image.Retry.Attempts, "error", err)
				again, excused = time.Time{}, false
			default:
				again, excused = time.Now().Add(wait), false
				m.p.d.log.Warn("the image will be tried again", "failed", plan.Attempts, "of", c.job.Image.Retry.Attempts, "at", again.Format(time.RFC3339))
			}
		}
		timer.Stop()
	}
	// A demand that came too late is answered all the same.
	select {
	case t := <-m.demand:
		m.finish(t, nil, context.Cause(ctx))
	default:
	}
}

// takeForGap takes an image that the schedule knows nothing of: its failure takes none of the schedule's attempts away,
// and it is tried until it is there.
func (m *images) takeForGap(ctx context.Context, plan *plan, t *taking, now time.Time, wait time.Duration) bool {
	switch err := m.take(ctx, t); {
	case err == nil:
		m.taken(plan, now, t.info.SID.String())
		m.putOff(time.Now().Add(max(gapImageAgain, 2*time.Since(now))))
		return true
	case serverAway(err):
		m.putOff(time.Now().Add(serverAwayWait))
	case ctx.Err() == nil:
		m.putOff(time.Now().Add(wait))
		m.p.d.log.Warn("the image that is to make up for lost wal will be tried again", "at", time.Now().Add(wait).Format(time.RFC3339))
	}
	return false
}

// serverAway tells whether an image failed because PostgreSQL does not run, or is only starting or stopping.
func serverAway(err error) bool {
	const cannotConnectNow = "57P03"
	pg, ok := errors.AsType[*pgconn.PgError](err)
	return postgres.IsNotRunning(err) || ok && pg.Code == cannotConnectNow
}

// take takes one image and does what follows from it.
func (m *images) take(ctx context.Context, t *taking) error {
	info, err := m.p.takeImage(ctx, t.kind, t.show)
	if ctx.Err() != nil && err != nil {
		err = fmt.Errorf("%w: %w", context.Cause(ctx), err)
	}
	m.finish(t, info, err)
	if err != nil {
		if !serverAway(err) { // nothing was begun then; run says so once
			m.p.d.log.Error("image failed", "error", err)
		}
		return err
	}
	m.p.d.log.Info("image done", "id", info.SID.String(), "kind", info.Kind, "start_lsn", info.StartLSN.String(), "stop_lsn", info.StopLSN.String(),
		"source_bytes", info.SourceBytes, "read_bytes", info.ReadBytes, "stored_bytes", info.StoredBytes)
	if info.CorruptPages > 0 {
		m.p.d.log.Error("the image holds pages whose checksums are wrong: look at the database's disk", "id", info.SID.String(), "corrupt_pages", info.CorruptPages)
	}
	if err := m.p.shipper.EndSession(ctx); err != nil {
		m.p.d.log.Warn("the account of wal shipping goes into the next session's", "error", err)
	}
	m.p.retain(ctx)
	return nil
}

func (m *images) finish(t *taking, info *repository.ImageInfo, err error) {
	m.mu.Lock()
	m.current = nil
	if err == nil {
		m.last, m.lastError, m.lastErrorAt = info, "", time.Time{}
	} else {
		m.lastError, m.lastErrorAt = err.Error(), time.Now()
	}
	m.mu.Unlock()
	t.info, t.err = info, err
	close(t.done)
}

func (m *images) status() control.ImageStatus {
	m.mu.Lock()
	defer m.mu.Unlock()
	s := control.ImageStatus{Running: m.current != nil, LastError: m.lastError}
	if m.current != nil {
		s.Progress = m.current.shown()
	}
	if !m.next.IsZero() {
		next := m.next
		s.Next = &next
	}
	if m.last != nil {
		s.LastID = m.last.SID.String()
		at := m.last.CompletedAt
		s.LastAt = &at
	}
	if !m.lastErrorAt.IsZero() {
		at := m.lastErrorAt
		s.LastErrorAt = &at
	}
	return s
}

// image answers the request for an image: it takes one, or waits for the one that is being taken. A full one is only
// done by a full one: it follows the one that is being taken.
func (d *daemon) image(ctx context.Context, kind control.Kind, progress func(string) error) control.Answer {
	waiting, cancel := context.WithTimeoutCause(ctx, answerAfter, errors.New("the runner is still opening the repository"))
	defer cancel()
	p, err := d.ready(waiting)
	if err != nil {
		return control.Fail(fmt.Errorf("take an image: %w", err))
	}
	t := p.images.request(kind)
	tick := time.NewTicker(250 * time.Millisecond)
	defer tick.Stop()
	shown := ""
	for {
		select {
		case <-t.done:
			if kind == control.FullKind && t.kind != kind {
				t = p.images.request(kind)
				continue
			}
			if t.err != nil {
				return control.Fail(t.err)
			}
			b, err := json.Marshal(t.info)
			if err != nil {
				return control.Fail(err)
			}
			return control.Answer{OK: true, Image: b}
		case <-tick.C:
			if line := t.shown(); line != shown {
				shown = line
				if progress(line) != nil {
					return control.Answer{} // nobody listens; the image goes on
				}
			}
		case <-p.ctx.Done():
			select {
			case <-t.done:
			case <-time.After(grace):
				return control.Fail(fmt.Errorf("take an image: %w", context.Cause(p.ctx)))
			}
		}
	}
}

// scheduleOf is what makes a plan void when it changes.
func scheduleOf(j *job.Job) string { return j.Image.Schedule + " " + j.Image.Timezone }
