package acceptance

import (
	"context"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/pgark/terraform-provider-pgark/internal/engine/daemon/control"
	"github.com/pgark/terraform-provider-pgark/internal/engine/job"
	"github.com/pgark/terraform-provider-pgark/test/pgtest"
	"github.com/pgark/terraform-provider-pgark/test/s3test"
)

const (
	// storeFaultsTime names the environment variable that makes TestStoreFaults last as long as is promised: "10m".
	storeFaultsTime = "PGARK_STORE_FAULTS"

	// mostMemory is what a runner may hold, in bytes.
	mostMemory = 256 << 20

	// folderLimit is that of the temporary folder, in bytes: a few seconds of the load.
	folderLimit = 5 << 20
)

// TestStoreFaults has the repository fail in every way, under load: commits go on, the runner's memory and the temporary
// folder stay within their bounds, and when it is over all is there, in one window.
func TestStoreFaults(t *testing.T) {
	t.Parallel()
	length := time.Duration(scaled(45)) * time.Second
	if s := os.Getenv(storeFaultsTime); s != "" {
		var err error
		if length, err = time.ParseDuration(s); err != nil {
			t.Fatalf("%s: %v", storeFaultsTime, err)
		}
	}
	w := newWorld(t, worldOptions{
		faults:  true,
		cluster: pgtest.Options{WALSegmentSizeMB: 4, Settings: map[string]string{"track_commit_timestamp": "on"}},
		change:  func(j *job.Job) { j.WAL.TempFolderLimit = folderLimit },
	})
	w.cluster.Exec(numberedTable)
	w.cluster.Exec("CREATE TABLE noise (at timestamptz, body bytea)")
	w.cluster.Exec("ALTER TABLE noise ALTER body SET STORAGE EXTERNAL")
	w.takeImage()
	before, err := w.status()
	w.must(err)

	watching, unwatch := context.WithCancel(w.ctx)
	var watch folderWatch
	var wg sync.WaitGroup
	wg.Go(func() { watch.run(watching, w) })
	wg.Go(func() { w.noise(watching) })
	stop := w.load(time.Second)

	healthy := s3test.Faults{}
	kinds := []struct {
		what   string
		faults s3test.Faults
		down   bool
	}{
		{what: "503", faults: s3test.Faults{Rate: 0.7, Kinds: []s3test.Fault{s3test.Answer503, s3test.Answer500}}},
		{what: "409", faults: s3test.Faults{Rate: 0.7, Kinds: []s3test.Fault{s3test.Answer409, s3test.Answer412}}},
		{what: "slow bodies", faults: s3test.Faults{Rate: 0.7, Kinds: []s3test.Fault{s3test.Slow, s3test.Delay}, MaxDelay: 3 * time.Second}},
		{what: "cut connections", faults: s3test.Faults{Rate: 0.7, Kinds: []s3test.Fault{s3test.CutBefore, s3test.CutReply, s3test.CutBody}}},
		{what: "an outage", down: true},
		{what: "stalls", faults: s3test.Faults{Rate: 0.3, Kinds: []s3test.Fault{s3test.Stall}}},
	}
	// The outage is twice as long as the others, and a breath is between them.
	rounds := max(1, int(length/(2*time.Minute)))
	part := length / time.Duration(rounds*(len(kinds)+1))
	for range rounds {
		for _, k := range kinds {
			if k.down {
				w.s3.Stop()
				time.Sleep(2*part - part/4)
				w.s3.Start()
			} else {
				w.proxy.Set(k.faults)
				time.Sleep(part - part/4)
				w.proxy.Set(healthy)
			}
			time.Sleep(part / 4)
			if st, err := w.status(); err != nil {
				t.Errorf("the runner does not answer after %s: %v", k.what, err)
			} else {
				t.Logf("after %s: repository %s, wal %s, %d files in the folder, %d failures", k.what, st.WAL.Store, st.WAL.State, st.WAL.Spool.Files, st.WAL.Failures)
			}
		}
	}
	commits := stop()
	unwatch()
	wg.Wait()
	mustNotStall(t, commits)
	total, injected := w.proxy.Counts()
	t.Logf("faults in %d requests: %v", total, injected)

	w.flush()
	w.caughtUp()
	w.mustHoldArchived()
	after, err := w.status()
	w.must(err)
	if after.PID != before.PID {
		t.Errorf("the runner was started anew: process %d is now %d", before.PID, after.PID)
	}
	if peak := peakMemory(t, after.PID); peak > mostMemory {
		t.Errorf("the runner held %d bytes of memory, at most %d are allowed", peak, int64(mostMemory))
	} else {
		t.Logf("the runner held %d MiB of memory", peak>>20)
	}
	watch.check(t)
	if wal := after.WAL; wal.GapCount != 0 || wal.Conflicts != 0 {
		t.Errorf("the runner tells of %d gaps and %d conflicts: %+v", wal.GapCount, wal.Conflicts, wal)
	}
	l := w.list()
	if len(l.Series) != 1 || len(l.Series[0].Gaps) != 0 || len(l.Series[0].Windows) != 1 {
		t.Fatalf("expected one series with one window and no gap, found %+v", l)
	}
	r := w.restore("--latest")
	mustHold(w, r.conn(), "restored to the latest", commits[len(commits)-1].n)
}

// noise writes WAL that does not compress, some 3 MB a second.
func (w *world) noise(ctx context.Context) {
	c := w.cluster.Conn(w.ctx)
	defer c.Close(context.Background())
	for ctx.Err() == nil {
		_, err := c.Exec(w.ctx, "INSERT INTO noise SELECT clock_timestamp(), decode(string_agg(md5(random()::text), ''), 'hex') FROM generate_series(1, 40000)")
		if err != nil {
			w.t.Errorf("write noise: %v", err)
			return
		}
		time.Sleep(200 * time.Millisecond)
	}
}

// folderWatch looks at the temporary folder and at the states that the runner tells of.
type folderWatch struct {
	most   int64
	states []string
}

func (f *folderWatch) run(ctx context.Context, w *world) {
	dir := w.layout.SpoolDirectory(w.job(), w.instance)
	tick := time.NewTicker(100 * time.Millisecond)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		var bytes int64
		_ = filepath.WalkDir(dir, func(_ string, d fs.DirEntry, err error) error {
			if err != nil || d.IsDir() {
				return nil //nolint:nilerr // files come and go
			}
			if info, err := d.Info(); err == nil {
				bytes += info.Size()
			}
			return nil
		})
		f.most = max(f.most, bytes)
		if st, err := w.status(); err == nil {
			state := string(st.WAL.State)
			if !slices.Contains(f.states, state) {
				f.states = append(f.states, state)
			}
		}
	}
}

func (f *folderWatch) check(t *testing.T) {
	t.Helper()
	t.Logf("the temporary folder held up to %d bytes; states seen: %v", f.most, f.states)
	if f.most > folderLimit {
		t.Errorf("the temporary folder held %d bytes, its limit is %d", f.most, int64(folderLimit))
	}
	// The folder is full within moments: that WAL went into it shows by its size, if not by the state in between.
	if f.most == 0 || !slices.Contains(f.states, string(control.WALHeld)) {
		t.Error("wal never filled the temporary folder: the outage was too short for what it is to show")
	}
}

// peakMemory is the most that a process has held in memory, in bytes.
func peakMemory(t *testing.T, pid int) int64 {
	t.Helper()
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		t.Fatal(err)
	}
	for _, line := range strings.Split(string(b), "\n") {
		var kib int64
		if n, _ := fmt.Sscanf(line, "VmHWM: %d kB", &kib); n == 1 {
			return kib << 10
		}
	}
	t.Fatalf("found no VmHWM of process %d", pid)
	return 0
}
