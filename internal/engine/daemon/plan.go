package daemon

import (
	"context"
	"encoding/json"
	"errors"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"time"

	"github.com/pgark/terraform-provider-pgark/internal/engine/job"
)

// plan decides when an image is due. What it must remember over a restart of the runner lies in a file, so that an
// image that was missed meanwhile is made up for, once.
type plan struct {
	file string
	log  *slog.Logger
	memory
	hasImage bool      // the series has a live image
	notUntil time.Time // no first image before
}

// memory is the file: image-schedule.json in the state directory. Losing it means that a missed image is not noticed
// when the series has none yet.
type memory struct {
	ConsideredAt time.Time `json:"considered_at"` // the schedule is settled up to here
	Schedule     string    `json:"schedule"`      // under which it was considered

	// Attempts counts those at the image that is due, one that is under way included: an image that takes the runner down
	// with it is not tried for ever.
	Attempts int `json:"attempts,omitempty"`

	// GapAt is when WAL was found lost that no image makes up for yet.
	GapAt time.Time `json:"gap_at,omitzero"`
}

// plan reads what is remembered, and what the series has.
func (m *images) plan(ctx context.Context) *plan {
	c := m.p.d.current()
	p := &plan{
		file: filepath.Join(m.p.d.o.Layout.StateDirectory(m.p.d.o.Job, m.p.d.o.Instance), "image-schedule.json"),
		log:  m.p.d.log,
	}
	b, err := os.ReadFile(p.file)
	if err == nil {
		err = json.Unmarshal(b, &p.memory)
	}
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		p.log.Warn("what the schedule was last considered for is not known", "error", err)
	}
	head, err := m.p.series.Head(ctx)
	if err != nil {
		// Better no first image than a second one: the schedule goes on.
		p.log.Warn("look for images of the series", "error", err)
		p.hasImage = true
	} else if n := len(head.Images); n > 0 {
		p.hasImage = true
		newest := head.Images[n-1]
		m.mu.Lock()
		m.last = &newest
		m.mu.Unlock()
		if newest.StartedAt.After(p.GapAt) {
			p.lost(time.Time{}) // the image was there before this could be noted
		}
		if p.ConsideredAt.IsZero() {
			p.ConsideredAt, p.Schedule = newest.StartedAt, scheduleOf(c.job)
		}
	}
	p.changed(c.job)
	return p
}

// due returns when the next image is to be taken; the zero time for never.
func (p *plan) due(j *job.Job, now time.Time) time.Time {
	if !j.Enabled {
		return time.Time{}
	}
	next, err := j.Image.Next(p.ConsideredAt)
	if err != nil {
		p.log.Error("image schedule", "error", err) // Parse has checked it
		next = time.Time{}
	}
	if j.Image.OnCreate && !p.hasImage {
		first := now
		if p.notUntil.After(now) {
			first = p.notUntil
		}
		if next.IsZero() || first.Before(next) {
			return first
		}
	}
	return next
}

// changed starts to count from now where the schedule is another one than before: times that it would have named in the
// past were not missed.
func (p *plan) changed(j *job.Job) {
	if p.ConsideredAt.IsZero() || p.Schedule != scheduleOf(j) {
		p.memory = memory{ConsideredAt: time.Now(), Schedule: scheduleOf(j), GapAt: p.GapAt}
		p.save()
	}
}

// lost notes when WAL was lost that no image makes up for; the zero time if one does.
func (p *plan) lost(at time.Time) {
	if !p.GapAt.Equal(at) {
		p.GapAt = at.UTC().Round(0)
		p.save()
	}
}

// begin notes that an attempt at the image that is due begins.
func (p *plan) begin() {
	p.Attempts++
	p.save()
}

// excuse takes back the last attempt: it ended for no fault of the image.
func (p *plan) excuse() {
	p.Attempts = max(p.Attempts-1, 0)
	p.save()
}

// taken notes an image: it settles the schedule up to when it began. So does one on demand that was begun after the
// scheduled one was due.
func (p *plan) taken(began time.Time) {
	p.hasImage = true
	p.settle(began)
}

// exhausted tells whether the image that is due has had its attempts, and gives it up if so.
func (p *plan) exhausted(j *job.Job, now time.Time) bool {
	if p.Attempts < max(j.Image.Retry.Attempts, 1) {
		return false
	}
	p.notUntil = now.Add(firstImageAgain)
	p.settle(now)
	return true
}

func (p *plan) settle(at time.Time) {
	if at.After(p.ConsideredAt) {
		p.ConsideredAt = at
	}
	p.Attempts = 0
	p.save()
}

func (p *plan) save() {
	b, err := json.Marshal(p.memory)
	if err == nil {
		temp := p.file + ".new"
		if err = os.WriteFile(temp, append(b, '\n'), 0o600); err == nil {
			err = os.Rename(temp, p.file)
		}
	}
	if err != nil {
		p.log.Warn("remember what the schedule was considered for", "error", err)
	}
}
