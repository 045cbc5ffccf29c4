package retention

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/pgark/terraform-provider-pgark/internal/engine/job"
	"github.com/pgark/terraform-provider-pgark/internal/engine/postgres"
	"github.com/pgark/terraform-provider-pgark/internal/engine/repository"
)

const segment = 1 << 20 // bytes; small segments keep LSNs readable

var now = time.Date(2026, 5, 31, 12, 0, 0, 0, time.UTC)

// daysAgo is noon of an earlier day.
func daysAgo(n float64) time.Time { return now.Add(-time.Duration(n * 24 * float64(time.Hour))) }

// series builds a State. Positions are segment numbers.
type series struct {
	State
	t *testing.T
}

func newSeries(t *testing.T) *series {
	return &series{t: t, State: State{
		Series:    repository.SeriesID{Job: "orders", Instance: "15-main", SystemID: 7},
		Head:      &repository.Head{Version: 1, NextSID: 1, WALFloor: map[string]postgres.LSN{}},
		Timelines: map[postgres.Timeline]*Timeline{},
	}}
}

func lsn(segmentNumber float64) postgres.LSN { return postgres.LSN(segmentNumber * segment) }

// image adds a live image on a timeline, from one position to another.
func (s *series) image(t postgres.Timeline, completed time.Time, from, to float64) {
	sid := s.Head.NextSID
	s.Head.NextSID++
	s.Head.Images = append(s.Head.Images, repository.ImageInfo{
		SID: sid, Kind: "full", Timeline: t, StartedAt: completed.Add(-time.Minute), CompletedAt: completed,
		StartLSN: lsn(from), StopLSN: lsn(to), SegmentSize: segment,
	})
}

// wal adds whole segments of a timeline, first to last; the last was stored at the given time.
func (s *series) wal(t postgres.Timeline, first, last uint64, stored time.Time) {
	line := s.line(t)
	for n := first; n <= last; n++ {
		line.Files = append(line.Files, File{string(postgres.MakeSegmentName(t, n, segment)), 1000})
	}
	line.LastStoredAt = stored
}

// tails adds tails of a timeline; positions are segments and parts of them, in pairs of start and end.
func (s *series) tails(t postgres.Timeline, positions ...float64) {
	line := s.line(t)
	for ; len(positions) > 0; positions = positions[2:] {
		line.Tails = append(line.Tails, repository.Tail{Timeline: t, Start: lsn(positions[0]), End: lsn(positions[1]), StoredSize: 10})
	}
}

// doomedTails gives the deleted tails by timeline, as in "1: 0.5-0.75".
func doomedTails(p *Plan) string {
	var out []string
	for _, w := range p.WAL {
		for _, x := range w.doomedTails {
			out = append(out, fmt.Sprintf("%d: %g-%g", w.Timeline, float64(x.Start)/segment, float64(x.End)/segment))
		}
		if len(w.doomedTails) != w.DeletedTails || int64(10*w.DeletedTails) != w.DeletedTailBytes {
			out = append(out, fmt.Sprintf("counted as %d of %d bytes", w.DeletedTails, w.DeletedTailBytes))
		}
	}
	return strings.Join(out, "; ")
}

func (s *series) line(t postgres.Timeline) *Timeline {
	if s.Timelines[t] == nil {
		s.Timelines[t] = &Timeline{HistoryKnown: t == 1}
	}
	return s.Timelines[t]
}

// fork makes timeline 2 descend from timeline 1, which it left at a position.
func (s *series) fork(at float64) {
	s.line(2).History, s.line(2).HistoryKnown = postgres.History{{Timeline: 1, Switch: lsn(at)}}, true
}

func (s *series) plan(p Policy) *Plan {
	s.t.Helper()
	plan, err := Make(&s.State, p, now)
	if err != nil {
		s.t.Fatal(err)
	}
	return plan
}

func kept(p *Plan) string {
	var ids []string
	for _, i := range p.Images {
		if i.Keep {
			id := strings.TrimLeft(i.ID, "0")
			if !i.Window {
				id += "."
			}
			ids = append(ids, id)
		}
	}
	return strings.Join(ids, " ")
}

// doomed gives the deleted segments by timeline, as in "1: 0-3 7".
func doomed(p *Plan) string {
	var out []string
	for _, w := range p.WAL {
		var ranges []string
		var first, last uint64
		open := false
		flush := func() {
			if open && first == last {
				ranges = append(ranges, fmt.Sprint(first))
			} else if open {
				ranges = append(ranges, fmt.Sprintf("%d-%d", first, last))
			}
		}
		for _, f := range w.doomed {
			n := postgres.SegmentName(f.Name[:24]).Number(segment)
			if !open || n > last+1 {
				flush()
				first, open = n, true
			}
			last = n
		}
		flush()
		if len(ranges) > 0 {
			out = append(out, fmt.Sprintf("%d: %s", w.Timeline, strings.Join(ranges, " ")))
		}
	}
	return strings.Join(out, "; ")
}

func images(r job.ImageRetention) Policy { return Policy{Images: r} }

func TestMake_images(t *testing.T) {
	// Ten images, one a day at noon, the last today; image n was taken 10-n days ago (1 is the oldest, a the newest).
	daily := func(t *testing.T) *series {
		s := newSeries(t)
		for n := range 10 {
			s.image(1, daysAgo(float64(9-n)), float64(10*n), float64(10*n)+0.5)
		}
		s.wal(1, 0, 95, now)
		return s
	}
	for _, c := range []struct {
		name   string
		rules  job.ImageRetention
		kept   string
		doomed string
	}{
		{"no rule keeps all", job.ImageRetention{}, "1 2 3 4 5 6 7 8 9 a", ""},
		{"keep_last", job.ImageRetention{KeepLast: 3}, "8 9 a", "1: 0-69"},
		{"keep_last 1", job.ImageRetention{KeepLast: 1}, "a", "1: 0-89"},
		{"keep_last beyond what there is", job.ImageRetention{KeepLast: 100}, "1 2 3 4 5 6 7 8 9 a", ""},
		// The image of exactly two days ago makes every moment since restorable.
		{"keep_days on the edge", job.ImageRetention{KeepDays: 2}, "8 9 a", "1: 0-69"},
		{"union of rules", job.ImageRetention{KeepLast: 1, KeepDays: 1}, "9 a", "1: 0-79"},
		{"weekly", job.ImageRetention{Weekly: 2}, "3 a", "1: 0-19"}, // today is Sunday, and 24 May was
		{"monthly", job.ImageRetention{Monthly: 5}, "a", "1: 0-89"},
		{"yearly with keep_last", job.ImageRetention{Yearly: 1, KeepLast: 2}, "9 a", "1: 0-79"},
	} {
		t.Run(c.name, func(t *testing.T) {
			p := daily(t).plan(images(c.rules))
			if got := kept(p); got != c.kept {
				t.Errorf("kept %q, expected %q", got, c.kept)
			}
			if got := doomed(p); got != c.doomed {
				t.Errorf("WAL doomed %q, expected %q", got, c.doomed)
			}
		})
	}
	t.Run("keep_days between two images keeps the one before", func(t *testing.T) {
		s := newSeries(t)
		s.image(1, daysAgo(9.5), 0, 1)
		s.image(1, daysAgo(7.5), 10, 11)
		s.image(1, daysAgo(6.5), 20, 21)
		s.wal(1, 0, 30, now)
		if got := kept(s.plan(images(job.ImageRetention{KeepDays: 7}))); got != "2 3" {
			t.Errorf("kept %q, expected 2 (the last before the window) and 3", got)
		}
	})
	t.Run("keep_days with old images only keeps the newest", func(t *testing.T) {
		s := newSeries(t)
		s.image(1, daysAgo(90), 0, 1)
		s.image(1, daysAgo(80), 10, 11)
		s.wal(1, 0, 30, daysAgo(70))
		if got := kept(s.plan(images(job.ImageRetention{KeepDays: 7}))); got != "2" {
			t.Errorf("kept %q, expected 2", got)
		}
	})
	t.Run("no image at all", func(t *testing.T) {
		s := newSeries(t)
		s.wal(1, 0, 30, now)
		if p := s.plan(images(job.ImageRetention{KeepLast: 1})); p.Changes() {
			t.Errorf("WAL doomed %q before the first image is there", doomed(p))
		}
	})
}

func TestMake_incompleteImages(t *testing.T) {
	s := newSeries(t)
	s.image(1, daysAgo(5), 0, 1)
	s.image(1, daysAgo(4), 10, 12) // its WAL has a hole
	s.image(1, daysAgo(3), 20, 21)
	s.image(1, daysAgo(2), 30, 32) // the same
	s.image(1, daysAgo(0), 40, 42) // its WAL is on its way
	s.wal(1, 0, 10, now)
	s.wal(1, 12, 30, now)
	s.wal(1, 32, 40, now)
	p := s.plan(images(job.ImageRetention{KeepLast: 1}))
	if got := kept(p); got != "3 4. 5." {
		t.Errorf("kept %q, expected 3, the newest that can be restored, and what is newer", got)
	}
	if want := []string{"WAL that would make it consistent is missing, and it is older than all images that stay"}; !slices.Equal(p.Images[1].Reasons, want) {
		t.Errorf("image 2: %q, expected %q", p.Images[1].Reasons, want)
	}
	if got := doomed(p); got != "1: 0-10 12-19" {
		t.Errorf("WAL doomed %q", got)
	}
}

func TestMake_wrongClocks(t *testing.T) {
	s := newSeries(t)
	s.image(1, daysAgo(20), 0, 1)
	s.image(1, daysAgo(3), 10, 11)
	s.image(1, time.Unix(0, 0), 20, 21) // the guest's clock had lost its battery
	s.image(1, daysAgo(-900), 30, 31)   // and then was set by hand
	s.image(1, daysAgo(0.1), 40, 41)
	s.wal(1, 0, 50, now)
	if got := kept(s.plan(images(job.ImageRetention{KeepDays: 7}))); got != "1 2 3 4 5" {
		t.Errorf("kept %q: the images after 2 cannot be older than it", got)
	}
	if got := kept(s.plan(images(job.ImageRetention{KeepDays: 2}))); got != "3 4 5" {
		t.Errorf("kept %q: 3 is the last before the window", got)
	}
}

func TestMake_timelines(t *testing.T) {
	t.Run("a promotion keeps both timelines", func(t *testing.T) {
		s := newSeries(t)
		s.image(1, daysAgo(9), 0, 1)
		s.image(1, daysAgo(5), 10, 11)
		s.wal(1, 0, 20, daysAgo(4))
		s.fork(20.5)
		s.wal(2, 20, 30, now)
		p := s.plan(images(job.ImageRetention{KeepLast: 1}))
		if got := doomed(p); got != "1: 0-9" {
			t.Errorf("WAL doomed %q", got)
		}
	})
	t.Run("once a newer image is on the new timeline the old one goes", func(t *testing.T) {
		s := newSeries(t)
		s.image(1, daysAgo(5), 10, 11)
		s.wal(1, 0, 20, daysAgo(4))
		s.fork(20.5)
		s.wal(2, 20, 30, now)
		s.image(2, daysAgo(1), 25, 26)
		p := s.plan(images(job.ImageRetention{KeepLast: 1}))
		if got := doomed(p); got != "1: 0-20; 2: 20-24" {
			t.Errorf("WAL doomed %q", got)
		}
	})
	t.Run("a timeline that an image is being taken on, for all we know, stays", func(t *testing.T) {
		s := newSeries(t)
		s.wal(1, 0, 20, daysAgo(0.5))
		s.fork(5)
		s.wal(2, 5, 30, now)
		s.image(2, daysAgo(0.1), 25, 26)
		if got := doomed(s.plan(images(job.ImageRetention{KeepLast: 1}))); got != "1: 0-20; 2: 5-24" {
			t.Errorf("without a session: WAL doomed %q", got)
		}
		s.Head.Sessions = []repository.OpenSession{{SID: 9, Kind: repository.SessionImage, StartedAt: daysAgo(0.6)}}
		if got := doomed(s.plan(images(job.ImageRetention{KeepLast: 1}))); got != "2: 5-24" {
			t.Errorf("with a session: WAL doomed %q", got)
		}
	})
	t.Run("a branch from before the image stays out of its reach", func(t *testing.T) {
		// Restored from image 1 to position 8: timeline 2 knows nothing of image 2.
		s := newSeries(t)
		s.image(1, daysAgo(9), 0, 1)
		s.image(1, daysAgo(5), 10, 11)
		s.wal(1, 0, 20, daysAgo(4))
		s.fork(8.5)
		s.wal(2, 8, 30, now)
		p := s.plan(images(job.ImageRetention{KeepDays: 3}))
		if got := kept(p); got != "1 2" {
			t.Errorf("kept %q: moments of timeline 2 need image 1, and image 2 is the newest", got)
		}
		if got := doomed(p); got != "" {
			t.Errorf("WAL doomed %q", got)
		}
	})
	t.Run("an unknown history may reach everywhere", func(t *testing.T) {
		s := newSeries(t)
		s.image(1, daysAgo(9), 0, 1)
		s.image(1, daysAgo(5), 10, 11)
		s.wal(1, 0, 20, daysAgo(4))
		s.wal(2, 8, 30, now)
		p := s.plan(images(job.ImageRetention{KeepLast: 1}))
		if got := doomed(p); got != "1: 0-9" {
			t.Errorf("WAL doomed %q", got)
		}
	})
	t.Run("the end of a timeline lies in the next one's first segment", func(t *testing.T) {
		s := newSeries(t)
		s.image(1, daysAgo(5), 19, 20.2) // segment 20 of timeline 1 was never finished
		s.wal(1, 0, 19, daysAgo(4))
		s.fork(20.5)
		s.wal(2, 20, 30, now)
		s.image(2, daysAgo(1), 25, 26)
		p := s.plan(Policy{Images: job.ImageRetention{KeepLast: 2}, WAL: &job.WALRetention{KeepDays: 1}})
		if got := kept(p); got != "1. 2" {
			t.Errorf("kept %q", got)
		}
		if got := doomed(p); got != "1: 0-18; 2: 21-24" {
			t.Errorf("WAL doomed %q", got)
		}
	})
}

func TestMake_walKeepDays(t *testing.T) {
	s := newSeries(t)
	s.image(1, daysAgo(30), 0, 2)
	s.image(1, daysAgo(20), 10, 12)
	s.image(1, daysAgo(8), 20, 22)
	s.image(1, daysAgo(6), 30, 32)
	s.wal(1, 0, 40, now)
	p := s.plan(Policy{WAL: &job.WALRetention{KeepDays: 7}})
	if got := kept(p); got != "1. 2. 3 4" {
		t.Errorf("kept %q: 3 is needed for the window's beginning, 1 and 2 become restore points", got)
	}
	// Images end on a segment's boundary, so 0-1 and 10-11 make them consistent.
	if got := doomed(p); got != "1: 2-9 12-19" {
		t.Errorf("WAL doomed %q", got)
	}
	if p := s.plan(Policy{WAL: &job.WALRetention{UntilImageDeleted: true}}); p.Changes() {
		t.Errorf("until_image_deleted: WAL doomed %q", doomed(p))
	}
	if got, want := p.WAL[0].Reason, "image 0000000000000003 can be rolled forward from there"; got != want {
		t.Errorf("reason %q, expected %q", got, want)
	}
}

func TestMake_restoreSessionsHoldWAL(t *testing.T) {
	s := newSeries(t)
	s.image(1, daysAgo(5), 10, 11)
	s.image(1, daysAgo(4), 20, 21)
	s.wal(1, 0, 30, now)
	s.Head.Sessions = []repository.OpenSession{{SID: 9, Kind: repository.SessionRestore, Parent: 1, ParentTimeline: 1, ParentStart: lsn(10), Host: "db2"}}
	p := s.plan(images(job.ImageRetention{KeepLast: 1}))
	if kept(p) != "2" || doomed(p) != "1: 0-9" {
		t.Errorf("kept %q, WAL doomed %q: a restore reads image 1", kept(p), doomed(p))
	}
	if got, want := p.WAL[0].Reason, "a restore on db2 reads image 0000000000000001"; got != want {
		t.Errorf("reason %q, expected %q", got, want)
	}
}

func TestMake_partialAndBackupFiles(t *testing.T) {
	s := newSeries(t)
	s.image(1, daysAgo(5), 10, 11)
	s.line(1).LastStoredAt = now
	for _, name := range []string{"000000010000000000000008", "000000010000000000000009.00000028.backup", "000000010000000000000009.partial",
		"00000001000000000000000A", "00000001000000000000000A.00000028.backup"} {
		s.line(1).Files = append(s.line(1).Files, File{name, 10})
	}
	p := s.plan(Policy{})
	var names []string
	for _, f := range p.WAL[0].doomed {
		names = append(names, f.Name)
	}
	if want := []string{"000000010000000000000008", "000000010000000000000009.00000028.backup", "000000010000000000000009.partial"}; !slices.Equal(names, want) {
		t.Errorf("doomed %q, expected %q", names, want)
	}
	if w := p.WAL[0]; w.DeletedFiles != 3 || w.DeletedBytes != 30 || w.FirstDeleted != names[0] || w.LastDeleted != names[2] {
		t.Errorf("counted %+v", w)
	}
}

func TestPolicy_refused(t *testing.T) {
	s := newSeries(t)
	for want, p := range map[string]Policy{
		"plan retention of orders/15-main/7: image retention: keep_last -1: may not be negative":                  images(job.ImageRetention{KeepLast: -1}),
		"plan retention of orders/15-main/7: image retention: yearly -2: may not be negative":                     images(job.ImageRetention{Yearly: -2}),
		"plan retention of orders/15-main/7: WAL retention: expected until_image_deleted or keep_days":            {WAL: &job.WALRetention{}},
		"plan retention of orders/15-main/7: WAL retention: until_image_deleted and keep_days exclude each other": {WAL: &job.WALRetention{UntilImageDeleted: true, KeepDays: 3}},
		"plan retention of orders/15-main/7: WAL retention: keep_days -3: may not be negative":                    {WAL: &job.WALRetention{KeepDays: -3}},
	} {
		if _, err := Make(&s.State, p, now); err == nil || err.Error() != want {
			t.Errorf("%v\nexpected %s", err, want)
		}
	}
}

func TestMake_tails(t *testing.T) {
	for what, c := range map[string]struct {
		build  func(s *series)
		policy Policy
		want   string
	}{
		"of segments that are whole": {func(s *series) {
			s.image(1, daysAgo(1), 2, 2.5)
			s.wal(1, 2, 5, daysAgo(0))
			s.tails(1, 4, 4.5, 4.5, 5, 5, 5.5, 5.25, 5.5, 6, 6.5)
		}, Policy{}, "1: 4-4.5; 1: 4.5-5; 1: 5-5.5; 1: 5.25-5.5"},
		"of a segment that is there only as .partial": {func(s *series) {
			s.image(1, daysAgo(1), 2, 2.5)
			s.wal(1, 2, 3, daysAgo(0))
			s.line(1).Files = append(s.line(1).Files, File{string(postgres.MakeSegmentName(1, 4, segment)) + ".partial", 1000})
			s.tails(1, 4, 4.5)
		}, Policy{}, ""},
		"below the floor": {func(s *series) {
			s.image(1, daysAgo(3), 2, 2.5)
			s.image(1, daysAgo(1), 8.5, 8.75)
			s.wal(1, 2, 2, daysAgo(0))
			s.wal(1, 8, 8, daysAgo(0))
			s.tails(1, 6, 6.5, 7, 7.5, 9, 9.5)
		}, images(job.ImageRetention{KeepLast: 1}), "1: 6-6.5; 1: 7-7.5"},
		"of the segment that the floor lies in": {func(s *series) {
			s.image(1, daysAgo(3), 2, 2.5)
			s.image(1, daysAgo(1), 8.5, 9.5)
			s.wal(1, 2, 2, daysAgo(0))
			s.wal(1, 9, 9, daysAgo(0)) // 8 is not there: the image may become restorable
			s.tails(1, 8, 8.25, 8.25, 8.75)
		}, images(job.ImageRetention{KeepLast: 1}), ""},
		"above everything": {func(s *series) {
			s.image(1, daysAgo(1), 2, 2.5)
			s.wal(1, 2, 3, daysAgo(0))
			s.tails(1, 4, 4.5, 7, 7.5) // with a gap
		}, Policy{}, ""},
		"without images, whose segments' size nobody knows": {func(s *series) {
			s.wal(1, 2, 3, daysAgo(0))
			s.tails(1, 2, 2.5)
		}, Policy{}, ""},
		"over two segments, so of another segment size": {func(s *series) {
			s.image(1, daysAgo(1), 2, 2.5)
			s.wal(1, 2, 3, daysAgo(0))
			s.tails(1, 2, 3.5)
		}, Policy{}, ""},
		"of a timeline that has been given up": {func(s *series) {
			s.image(1, daysAgo(9), 2, 2.5)
			s.wal(1, 2, 3, daysAgo(9))
			s.fork(3.5)
			s.tails(2, 3, 3.75)
			s.line(2).LastStoredAt = daysAgo(8)
			s.line(3).History, s.line(3).HistoryKnown = postgres.History{{Timeline: 1, Switch: lsn(3.25)}}, true
			s.wal(3, 3, 9, daysAgo(0))
			s.image(3, daysAgo(1), 8, 8.5)
		}, images(job.ImageRetention{KeepLast: 1}), "2: 3-3.75"},
		"of a timeline that is being written": {func(s *series) {
			s.image(1, daysAgo(9), 2, 2.5)
			s.wal(1, 2, 3, daysAgo(9))
			s.fork(3.5)
			s.tails(2, 3, 3.75)
			s.line(2).LastStoredAt = daysAgo(0)
			s.line(3).History, s.line(3).HistoryKnown = postgres.History{{Timeline: 1, Switch: lsn(3.25)}}, true
			s.wal(3, 3, 9, daysAgo(0))
			s.image(3, daysAgo(1), 8, 8.5)
		}, images(job.ImageRetention{KeepLast: 1}), ""},
	} {
		t.Run(what, func(t *testing.T) {
			s := newSeries(t)
			c.build(s)
			p := s.plan(c.policy)
			if got := doomedTails(p); got != c.want {
				t.Errorf("deleted tails %q, expected %q", got, c.want)
			}
			if c.want != "" && !p.Changes() {
				t.Error("the plan says that it changes nothing")
			}
		})
	}
}
