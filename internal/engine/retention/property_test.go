package retention

import (
	"maps"
	"slices"
	"testing"
	"time"

	"pgregory.net/rapid"

	"github.com/pgark/terraform-provider-pgark/internal/engine/job"
	"github.com/pgark/terraform-provider-pgark/internal/engine/postgres"
	"github.com/pgark/terraform-provider-pgark/internal/engine/repository"
)

// world is a made-up past of a cluster and what is stored of it.
type world struct {
	state   State
	written map[postgres.Timeline]map[uint64]time.Time // when PostgreSQL finished each segment, whether it was stored or not
	policy  Policy
}

// drawWorld lets a cluster write, be backed up, promoted, taken back in time, and lose some of its WAL.
func drawWorld(t *rapid.T) *world {
	w := &world{
		state: State{
			Series:    repository.SeriesID{Job: "j", Instance: "i", SystemID: 1},
			Head:      &repository.Head{Version: 1, NextSID: 1, WALFloor: map[string]postgres.LSN{}},
			Timelines: map[postgres.Timeline]*Timeline{1: {HistoryKnown: true}},
		},
		written: map[postgres.Timeline]map[uint64]time.Time{1: {}},
	}
	histories := map[postgres.Timeline]postgres.History{1: nil}
	clock := daysAgo(30)
	current, newest := postgres.Timeline(1), postgres.Timeline(1)
	position := uint64(1)
	starts := map[postgres.Timeline]uint64{1: 1}
	ends := map[postgres.Timeline]uint64{}
	write := func() {
		w.written[current][position] = clock
		if rapid.IntRange(0, 30).Draw(t, "lost") != 0 {
			line := w.state.Timelines[current]
			line.Files = append(line.Files, File{string(postgres.MakeSegmentName(current, position, segment)), 1})
			line.LastStoredAt = clock
		}
		position++
		ends[current] = position
	}
	for range rapid.IntRange(1, 60).Draw(t, "steps") {
		clock = clock.Add(time.Duration(rapid.IntRange(0, 24).Draw(t, "hours")) * time.Hour)
		if clock.After(now) {
			clock = now
		}
		switch rapid.SampledFrom([]string{"write", "write", "write", "image", "image", "fork"}).Draw(t, "step") {
		case "write":
			write()
		case "image":
			start := lsn(float64(position) + 0.25)
			for range rapid.IntRange(0, 2).Draw(t, "length") {
				write()
			}
			sid := w.state.Head.NextSID
			w.state.Head.NextSID++
			w.state.Head.Images = append(w.state.Head.Images, repository.ImageInfo{
				SID: sid, Timeline: current, StartLSN: start, StopLSN: lsn(float64(position) + 0.5),
				StartedAt: clock.Add(-time.Minute), CompletedAt: clock, SegmentSize: segment,
			})
			write() // pg_backup_stop switches to the next segment
		case "fork":
			// A promotion at the end, or a restore to some earlier position, of any timeline.
			from := rapid.SampledFrom(slices.Sorted(maps.Keys(w.written))).Draw(t, "from")
			if ends[from] == 0 {
				continue
			}
			at := rapid.Uint64Range(starts[from], ends[from]-1).Draw(t, "at")
			newest++
			h := slices.Clone(histories[from])
			h = append(h, postgres.Ancestor{Timeline: from, Switch: lsn(float64(at) + 0.75)})
			histories[newest] = h
			w.written[newest] = map[uint64]time.Time{}
			line := &Timeline{}
			if rapid.IntRange(0, 4).Draw(t, "history lost") != 0 {
				line.History, line.HistoryKnown = h, true
			}
			w.state.Timelines[newest] = line
			current, position = newest, at
			starts[newest] = at
			write()
		}
	}
	if n := len(w.state.Head.Images); n > 0 && rapid.Bool().Draw(t, "restoring") {
		i := w.state.Head.Images[rapid.IntRange(0, n-1).Draw(t, "restored")]
		w.state.Head.Sessions = append(w.state.Head.Sessions, repository.OpenSession{
			SID: w.state.Head.NextSID, Kind: repository.SessionRestore, Parent: i.SID, ParentTimeline: i.Timeline, ParentStart: i.StartLSN})
		w.state.Head.NextSID++
	}
	few := func(name string) int { return max(rapid.IntRange(-3, 6).Draw(t, name), 0) }
	w.policy.Images = job.ImageRetention{KeepLast: few("keep_last"), KeepDays: few("keep_days"), Weekly: few("weekly"), Monthly: few("monthly"), Yearly: few("yearly")}
	switch rapid.IntRange(0, 2).Draw(t, "wal") {
	case 1:
		w.policy.WAL = &job.WALRetention{UntilImageDeleted: true}
	case 2:
		w.policy.WAL = &job.WALRetention{KeepDays: rapid.IntRange(1, 20).Draw(t, "wal keep_days")}
	}
	return w
}

// after is the state once the plan has been applied.
func (w *world) after(p *Plan) *State {
	s := &State{Series: w.state.Series, Timelines: map[postgres.Timeline]*Timeline{}}
	head := *w.state.Head
	head.WALFloor = maps.Clone(head.WALFloor)
	head.Images = slices.Clone(head.Images)
	for _, d := range p.Images {
		if !d.Keep {
			head.Images = slices.DeleteFunc(head.Images, func(i repository.ImageInfo) bool { return i.SID == d.sid })
		}
	}
	for _, d := range p.WAL {
		line := *w.state.Timelines[d.Timeline]
		line.Files = slices.DeleteFunc(slices.Clone(line.Files), func(f File) bool { return slices.Contains(d.doomed, f) })
		s.Timelines[d.Timeline] = &line
		head.WALFloor[d.Timeline.String()] = max(d.Floor, d.PresentFloor)
	}
	s.Head = &head
	return s
}

// moment is the end of a segment of a timeline: something a restore can aim at.
type moment struct {
	t postgres.Timeline
	n uint64
}

// restorable finds which of an image's moments a state can restore, by walking along each known path segment by
// segment: a reading of the rules of its own, with nothing of the planner's.
func restorable(s *State, i repository.ImageInfo) map[moment]bool {
	out := map[moment]bool{}
	stored := func(t postgres.Timeline, n uint64) bool {
		return s.Timelines[t] != nil && slices.ContainsFunc(s.Timelines[t].Files, func(f File) bool {
			return f.Name == string(postgres.MakeSegmentName(t, n, segment))
		})
	}
	for t, line := range s.Timelines {
		if t != i.Timeline && (!line.HistoryKnown || !line.History.Includes(i.Timeline, i.StopLSN)) {
			continue
		}
		// On which timeline is a segment of this path? A switch lies inside a segment, and the new timeline has it too.
		path := append(slices.Clone(line.History), postgres.Ancestor{Timeline: t, Switch: ^postgres.LSN(0)})
		for n := uint64(i.StartLSN) / segment; ; n++ {
			found := false
			for _, a := range path {
				if a.Timeline >= i.Timeline && stored(a.Timeline, n) && n <= uint64(a.Switch)/segment {
					found = true
				}
			}
			if !found {
				break
			}
			if n >= (uint64(i.StopLSN)-1)/segment {
				if at, ok := line.History.SwitchPoint(i.Timeline); t == i.Timeline || ok && n >= uint64(at)/segment {
					if stored(t, n) {
						out[moment{t, n}] = true
					}
				}
			}
		}
	}
	return out
}

func TestMake_properties(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		w := drawWorld(t)
		p, err := Make(&w.state, w.policy, now)
		if err != nil {
			t.Fatal(err)
		}
		after := w.after(p)
		byID := map[repository.SID]ImageDecision{}
		var newestRestorable repository.SID
		restorableBefore := 0
		for _, d := range p.Images {
			byID[d.sid] = d
		}
		before := &maker{s: &w.state, size: segment}
		later := &maker{s: after, size: segment}
		var last []repository.SID // restorable ones
		for _, i := range w.state.Head.Images {
			if !before.restorable(i) {
				continue
			}
			restorableBefore++
			newestRestorable = i.SID
			last = append(last, i.SID)
			// Whatever stays keeps the WAL that makes it consistent.
			if byID[i.SID].Keep && !later.restorable(i) {
				t.Errorf("image %s stays, but its WAL does not", i.SID)
			}
		}
		if restorableBefore > 0 && !byID[newestRestorable].Keep {
			t.Errorf("the newest restorable image %s goes", newestRestorable)
		}
		if len(w.state.Head.Images) > 0 && len(after.Head.Images) == 0 {
			t.Error("no image stays")
		}
		for _, sid := range last[max(0, len(last)-w.policy.Images.KeepLast):] {
			if !byID[sid].Keep {
				t.Errorf("image %s goes, though it is one of the newest %d", sid, w.policy.Images.KeepLast)
			}
		}

		// Moments.
		reachable := map[moment]bool{}     // before, from any image
		reachableKept := map[moment]bool{} // before, from an image that stays
		reachableAfter := map[moment]bool{}
		for _, i := range w.state.Head.Images {
			all := restorable(&w.state, i)
			maps.Copy(reachable, all)
			if !byID[i.SID].Keep {
				continue
			}
			maps.Copy(reachableKept, all)
			left := restorable(after, i)
			maps.Copy(reachableAfter, left)
			if w.policy.WAL == nil || w.policy.WAL.UntilImageDeleted {
				for m := range all {
					if !left[m] {
						t.Errorf("until_image_deleted: image %s stays, but %v cannot be restored from it any more", i.SID, m)
					}
				}
			}
		}
		wal := 1000 // days
		if w.policy.WAL != nil && w.policy.WAL.KeepDays > 0 {
			wal = w.policy.WAL.KeepDays
		}
		for m := range reachableKept {
			if w.written[m.t][m.n].After(now.Add(-days(wal))) && !reachableAfter[m] {
				t.Errorf("WAL keep_days %d: %v, written %v, cannot be restored any more", wal, m, w.written[m.t][m.n])
			}
		}
		if keep := w.policy.Images.KeepDays; keep > 0 {
			for m := range reachable {
				if w.written[m.t][m.n].After(now.Add(-days(min(keep, wal)))) && !reachableAfter[m] {
					t.Errorf("keep_days %d: %v, written %v, cannot be restored any more", keep, m, w.written[m.t][m.n])
				}
			}
		}

		// A restore that runs loses nothing.
		for _, s := range w.state.Head.Sessions {
			i := *w.state.Head.Image(s.Parent)
			left := restorable(after, i)
			for m := range restorable(&w.state, i) {
				if !left[m] {
					t.Errorf("the restore of image %s cannot reach %v any more", i.SID, m)
				}
			}
		}

		// On a single timeline no WAL stays that no image can use.
		if len(w.state.Timelines) == 1 && restorableBefore > 0 && len(w.state.Head.Sessions) == 0 {
			for _, f := range after.Timelines[1].Files {
				if n := postgres.SegmentName(f.Name).Number(segment); n < uint64(after.Head.Images[0].StartLSN)/segment {
					t.Errorf("%s stays, though the oldest image begins behind it", f.Name)
				}
			}
		}

		// Doing it again changes nothing.
		again, err := Make(after, w.policy, now)
		if err != nil {
			t.Fatal(err)
		}
		if again.Changes() {
			t.Errorf("the same plan again is not empty: kept %q, WAL doomed %q", kept(again), doomed(again))
		}
	})
}
