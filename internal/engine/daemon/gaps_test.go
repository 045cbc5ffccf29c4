package daemon_test

import (
	"context"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/pgark/terraform-provider-pgark/internal/engine/daemon/control"
	"github.com/pgark/terraform-provider-pgark/test/pgtest"
)

// WAL that somebody removes before it is stored raises an alarm, and an image is taken because of it, once, and also when
// the runner is killed in between.
func TestRunner_gap(t *testing.T) {
	t.Parallel()
	repo := directory(t)
	c := pgtest.Start(t, pgtest.Options{NoStart: true, WALSegmentSizeMB: 1, Settings: map[string]string{"autovacuum": "off"}})
	g := newGuest(t, c, repo, repo)
	own(t, repo)
	c.Configure(g.archiving())
	c.Start()
	c.Exec("create table t (n int)")
	g.run()
	g.mustReach(control.Running)
	if _, err := control.TakeImage(t.Context(), g.socket(), control.AnyKind, nil); err != nil {
		t.Fatal(err)
	}
	archived(t, c)
	if s := g.status(); s.WAL.GapCount != 0 || s.WAL.Gaps == nil {
		t.Fatalf("got gaps %+v, expected none, and not null", s.WAL.Gaps)
	}
	g.stop()

	var names []string
	for range 4 {
		c.Exec("insert into t values (1)")
		names = append(names, string(c.SwitchWAL()))
	}
	lost := names[1]
	for _, file := range []string{lost, filepath.Join("archive_status", lost+".ready")} {
		if err := os.Remove(filepath.Join(c.DataDir, "pg_wal", file)); err != nil {
			t.Fatal(err)
		}
	}
	g.run()
	eventually(t, "the gap is found", func() bool { return g.status().WAL.GapCount == 1 })
	g.kill() // whatever it is about to do
	g.run()
	eventually(t, "an image is there that makes up for it", func() bool {
		head, err := g.series().Head(context.Background())
		return err == nil && len(head.Images) == 2 && len(head.Sessions) == 0
	})
	eventually(t, "no image is being taken", func() bool { return !g.status().Image.Running })

	// Once more, without a kill: the gap tells of its image.
	g.stop()
	names = nil
	for range 3 {
		c.Exec("insert into t values (1)")
		names = append(names, string(c.SwitchWAL()))
	}
	lost = names[1]
	for _, file := range []string{lost, filepath.Join("archive_status", lost+".ready")} {
		if err := os.Remove(filepath.Join(c.DataDir, "pg_wal", file)); err != nil {
			t.Fatal(err)
		}
	}
	g.run()
	var s *control.Status
	eventually(t, "the gap is found, and an image was taken because of it", func() bool {
		s = g.status()
		return len(s.WAL.Gaps) == 1 && s.WAL.Gaps[0].Image != ""
	})
	gap := s.WAL.Gaps[0]
	if gap.Segments != 1 || gap.Timeline != 1 || gap.Image != s.Image.LastID || s.WAL.GapCount != 1 {
		t.Errorf("got %+v, expected one segment, and the image %s", gap, s.Image.LastID)
	}
	if log := readLog(t, g); !strings.Contains(log, "level=ERROR") || !strings.Contains(log, lost) || !strings.Contains(log, "an image is taken because wal was lost") {
		t.Error("the log should tell of the gap, by its name, and of the image")
	}
	g.stop()
	failed := 0
	for r, err := range g.series().Sessions(t.Context(), time.Time{}) {
		if err != nil {
			t.Fatal(err)
		}
		if r.Kind == "wal" && r.Gaps == 1 && r.Result == "error" {
			failed++
		}
	}
	if failed == 0 {
		t.Error("no session of wal says that there was a gap")
	}
	c.Stop("immediate")
}
