package daemon

import (
	"log/slog"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/pgark/terraform-provider-pgark/internal/engine/job"
)

func TestPlan(t *testing.T) {
	at := func(s string) time.Time {
		v, err := time.Parse("2006-01-02 15:04", s)
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
	daily := job.Image{Schedule: "0 22 * * *", Timezone: "UTC"}
	onCreate := daily
	onCreate.OnCreate = true
	onlyOnce := job.Image{OnCreate: true, Timezone: "UTC"}
	noon := at("2026-11-22 12:00")
	for what, test := range map[string]struct {
		image      job.Image
		considered time.Time
		has        bool
		disabled   bool
		notUntil   time.Time
		want       time.Time
	}{
		"as scheduled":                     {image: daily, considered: at("2026-11-22 11:00"), has: true, want: at("2026-11-22 22:00")},
		"missed":                           {image: daily, considered: at("2026-11-21 11:00"), has: true, want: at("2026-11-21 22:00")},
		"missed long ago: once":            {image: daily, considered: at("2026-11-01 11:00"), has: true, want: at("2026-11-01 22:00")},
		"the first at once":                {image: onCreate, considered: at("2026-11-22 11:00"), want: noon},
		"the first, and one missed":        {image: onCreate, considered: at("2026-11-20 11:00"), want: at("2026-11-20 22:00")},
		"the first failed for good":        {image: onCreate, considered: at("2026-11-22 11:00"), notUntil: at("2026-11-22 13:00"), want: at("2026-11-22 13:00")},
		"the first is there":               {image: onCreate, considered: at("2026-11-22 11:00"), has: true, want: at("2026-11-22 22:00")},
		"not at once":                      {image: daily, considered: at("2026-11-22 11:00"), want: at("2026-11-22 22:00")},
		"no schedule":                      {image: job.Image{Timezone: "UTC"}, considered: at("2026-11-22 11:00")},
		"no schedule, the first":           {image: onlyOnce, considered: at("2026-11-22 11:00"), want: noon},
		"no schedule, the first is there":  {image: onlyOnce, considered: at("2026-11-22 11:00"), has: true},
		"disabled":                         {image: onCreate, considered: at("2026-11-20 11:00"), disabled: true},
		"considered at the scheduled time": {image: daily, considered: at("2026-11-21 22:00"), has: true, want: at("2026-11-22 22:00")},
	} {
		t.Run(what, func(t *testing.T) {
			p := &plan{log: slog.New(slog.DiscardHandler), hasImage: test.has, notUntil: test.notUntil}
			p.ConsideredAt = test.considered
			got := p.due(&job.Job{Enabled: !test.disabled, Image: test.image}, noon)
			if !got.Equal(test.want) {
				t.Errorf("got %s, expected %s", got, test.want)
			}
		})
	}
}

func TestPlan_attempts(t *testing.T) {
	p := &plan{log: slog.New(slog.NewTextHandler(t.Output(), nil)), file: filepath.Join(t.TempDir(), "image-schedule.json")}
	j := &job.Job{Enabled: true, Image: job.Image{Schedule: "0 22 * * *", Timezone: "UTC", Retry: job.Retry{Attempts: 2}}}
	before := time.Date(2026, 11, 21, 11, 0, 0, 0, time.UTC)
	due := time.Date(2026, 11, 21, 22, 0, 0, 0, time.UTC)
	now := due.Add(time.Minute)
	p.Schedule, p.ConsideredAt = scheduleOf(j), before
	p.changed(j)

	p.begin() // and the runner is killed: it is due again
	if p.exhausted(j, now) || !p.due(j, now).Equal(due) {
		t.Errorf("after an attempt that was cut off: due %s, expected %s", p.due(j, now), due)
	}
	p.begin()
	p.excuse() // PostgreSQL does not run
	if p.exhausted(j, now) {
		t.Error("an excused attempt counts")
	}
	p.begin()
	if !p.exhausted(j, now) || p.due(j, now).Before(now) || p.Attempts != 0 {
		t.Errorf("after two attempts: due %s, expected the next day", p.due(j, now))
	}
	if b, err := os.ReadFile(p.file); err != nil || len(b) == 0 {
		t.Errorf("it should be remembered: %v", err)
	}

	p.ConsideredAt = before
	p.taken(now)
	if !p.due(j, now).Equal(due.AddDate(0, 0, 1)) {
		t.Errorf("after an image: due %s", p.due(j, now))
	}

	// Another schedule counts from now on: its times of the past were not missed.
	p.ConsideredAt = before
	j.Image.Schedule = "0 3 * * *"
	p.changed(j)
	if d := p.due(j, time.Now()); d.Before(time.Now()) {
		t.Errorf("another schedule: due %s, expected it in the future", d)
	}
}
