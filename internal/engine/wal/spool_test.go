package wal

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/pgark/terraform-provider-pgark/internal/engine/daemon/control"
	"github.com/pgark/terraform-provider-pgark/internal/engine/repository"
)

// seal makes what a Spool keeps.
func (w *world) seal(name string, b []byte) *repository.SealedWAL {
	w.t.Helper()
	s, err := w.series.SealWAL(w.t.Context(), repository.WALInfo{Name: name, Size: int64(len(b))}, strings.NewReader(string(b)), repository.Thorough)
	if err != nil {
		w.t.Fatal(err)
	}
	w.t.Cleanup(func() { s.Close() })
	return s
}

// openSpool opens one that leaves nothing to others.
func openSpool(t *testing.T, dir string, limit int64) *Spool {
	t.Helper()
	s, err := OpenSpool(dir, limit)
	if err != nil {
		t.Fatal(err)
	}
	s.reserve = 0
	return s
}

func TestSpool(t *testing.T) {
	w := newWorld(t)
	dir := filepath.Join(t.TempDir(), "state", "spool")
	s := openSpool(t, dir, 0)
	names := []string{"00000002.history", segment(1, 7), segment(1, 8), segment(1, 9) + ".partial"}
	contents := map[string][]byte{}
	for i, name := range []string{names[2], names[0], names[3], names[1]} {
		contents[name] = []byte("1\t0/700000\tno recovery target specified\n")
		if !strings.HasSuffix(name, ".history") {
			contents[name] = content(name, uint64(i))
		}
		if err := s.Put(w.seal(name, contents[name]), w.series.ReadSealed); err != nil {
			t.Fatal(err)
		}
	}
	for _, path := range []string{dir, filepath.Dir(dir)} {
		if info, err := os.Stat(path); err != nil || info.Mode().Perm() != 0o700 {
			t.Errorf("%s has mode %v (%v), expected 0700", path, info.Mode(), err)
		}
	}
	// What a crash leaves, and what is not ours.
	torn := "." + segment(1, 6) + SealedSuffix + "12" + tempSuffix
	foreign := []string{"notes.txt", "x.sealed", "y.tmp", segment(1, 5)}
	for _, name := range append([]string{torn}, foreign...) {
		if err := os.WriteFile(filepath.Join(dir, name), []byte("half"), 0o600); err != nil {
			t.Fatal(err)
		}
	}

	s = openSpool(t, dir, 0)
	if got := s.Names(); !slices.Equal(got, names) {
		t.Errorf("found %v, expected %v", got, names)
	}
	var size int64
	for _, name := range names {
		info, err := os.Stat(filepath.Join(dir, name+SealedSuffix))
		if err != nil {
			t.Fatal(err)
		}
		if info.Mode().Perm() != 0o600 {
			t.Errorf("%s has mode %v, expected 0600", name, info.Mode())
		}
		size += info.Size()
	}
	if st := s.Status(); st.Bytes != size || st.Files != 4 || st.Oldest == nil || time.Since(*st.Oldest) > time.Minute || st.Full {
		t.Errorf("got %+v, expected 4 files of %d bytes", st, size)
	}
	if _, err := os.Stat(filepath.Join(dir, torn)); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the torn file should be gone: %v", err)
	}
	for _, name := range foreign {
		if _, err := os.Stat(filepath.Join(dir, name)); err != nil {
			t.Errorf("a file that is not ours should stay: %v", err)
		}
	}

	// The same again is success, other content is not.
	if err := s.Put(w.seal(names[1], contents[names[1]]), w.series.ReadSealed); err != nil {
		t.Error(err)
	}
	err := s.Put(w.seal(names[1], content(names[1], 99)), w.series.ReadSealed)
	var conflict *SpoolConflictError
	if !errors.As(err, &conflict) || !strings.Contains(err.Error(), conflict.There.Digest[:8]) || !strings.Contains(err.Error(), conflict.Here.Digest[:8]) {
		t.Errorf("got %v, expected *SpoolConflictError with both digests", err)
	}
	if s.Digest(names[1]) != conflict.There.Digest || s.Digest(names[2]) != "" {
		t.Errorf("a digest is known of what was read, and of nothing else")
	}

	for _, name := range names {
		first, ok := s.First(func(string) bool { return false })
		if !ok || first != name {
			t.Fatalf("found %q first, expected %q", first, name)
		}
		sealed, err := s.Read(name, w.series.ReadSealed)
		if err != nil {
			t.Fatal(err)
		}
		if stored, _, err := w.series.PutSealed(t.Context(), sealed); err != nil || !stored {
			t.Fatalf("store %s: %v, %v", name, stored, err)
		}
		sealed.Close()
		if err := s.Remove(name); err != nil {
			t.Fatal(err)
		}
		w.mustHold(name, contents[name])
	}
	if _, ok := s.First(func(string) bool { return false }); ok || s.Bytes() != 0 || s.Files() != 0 {
		t.Errorf("the folder should be empty: %+v", s.Status())
	}
	if err := s.Remove(names[0]); err != nil {
		t.Errorf("remove what is gone: %v", err)
	}
}

func TestSpool_limit(t *testing.T) {
	w := newWorld(t)
	a, b := w.seal(segment(1, 1), content(segment(1, 1), 1)), w.seal(segment(1, 2), content(segment(1, 2), 2))
	dir := t.TempDir()
	s := openSpool(t, dir, a.Size+b.Size-1)
	if err := s.Put(a, w.series.ReadSealed); err != nil {
		t.Fatal(err)
	}
	for _, err := range []error{s.Room(b.Size), s.Put(b, w.series.ReadSealed)} {
		if !errors.Is(err, ErrSpoolFull) || !s.Status().Full {
			t.Errorf("got %v, expected ErrSpoolFull", err)
		}
	}
	if err := s.Remove(segment(1, 1)); err != nil {
		t.Fatal(err)
	}
	if err := s.Put(b, w.series.ReadSealed); err != nil || s.Status().Full {
		t.Errorf("there is room again: %v", err)
	}
	// Many at a time do not get past it together.
	s = openSpool(t, t.TempDir(), 3*a.Size)
	var wg sync.WaitGroup
	for n := range uint64(12) {
		sealed := w.seal(segment(2, n), content(segment(2, n), n))
		wg.Go(func() {
			if err := s.Put(sealed, w.series.ReadSealed); err != nil && !errors.Is(err, ErrSpoolFull) {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if s.Bytes() > 3*a.Size || s.Files() == 0 {
		t.Errorf("found %d files of %d bytes, expected at most %d bytes", s.Files(), s.Bytes(), 3*a.Size)
	}
}

// mountTmpfs mounts a small file system until the test ends.
func mountTmpfs(t *testing.T, bytes int64) string {
	t.Helper()
	dir := t.TempDir()
	if err := unix.Mount("tmpfs", dir, "tmpfs", unix.MS_NOSUID|unix.MS_NODEV, fmt.Sprintf("size=%d,mode=0700", bytes)); err != nil {
		t.Fatalf("mount a small file system, which takes root: %v", err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
	return dir
}

func TestSpool_fullFileSystem(t *testing.T) {
	w := newWorld(t)
	dir := mountTmpfs(t, 1<<20)
	guarded, err := OpenSpool(dir, 0)
	if err != nil {
		t.Fatal(err)
	}
	if err := guarded.Put(w.seal(segment(1, 1), content(segment(1, 1), 1)), w.series.ReadSealed); !errors.Is(err, ErrSpoolFull) {
		t.Errorf("got %v, expected ErrSpoolFull: the room is for others", err)
	}

	// Others fill it while we write.
	s := openSpool(t, dir, 0)
	sealed := w.seal(segment(1, 1), content(segment(1, 1), 1))
	var filler *os.File
	sealed.Body = &hookedBody{ReadSeeker: sealed.Body, hook: func() {
		var err error
		if filler, err = os.Create(filepath.Join(dir, "filler")); err != nil {
			t.Error(err)
		}
		for err == nil {
			_, err = filler.Write(make([]byte, 64<<10))
		}
		filler.Close()
	}}
	if err := s.Put(sealed, w.series.ReadSealed); !errors.Is(err, ErrSpoolFull) || !errors.Is(err, syscall.ENOSPC) {
		t.Errorf("got %v, expected ErrSpoolFull because of ENOSPC", err)
	}
	if left, err := filepath.Glob(filepath.Join(dir, "*"+segment(1, 1)+"*")); err != nil || len(left) != 0 {
		t.Errorf("found %v (%v), expected nothing half written", left, err)
	}
	if s.Bytes() != 0 || s.Files() != 0 || !s.Status().Full {
		t.Errorf("got %+v, expected it full and empty", s.Status())
	}
	if err := os.Remove(filler.Name()); err != nil {
		t.Fatal(err)
	}
	if err := s.Put(w.seal(segment(1, 1), content(segment(1, 1), 1)), w.series.ReadSealed); err != nil {
		t.Errorf("there is room again: %v", err)
	}
}

// hookedBody calls hook before the first read.
type hookedBody struct {
	io.ReadSeeker
	hook func()
	once sync.Once
}

func (b *hookedBody) Read(p []byte) (int, error) {
	b.once.Do(b.hook)
	return b.ReadSeeker.Read(p)
}

var errAway = &objectstoreAway{}

// objectstoreAway is an error as the network makes it.
type objectstoreAway struct{}

func (*objectstoreAway) Error() string { return "dial tcp 10.0.0.1:443: connect: connection refused" }
func (*objectstoreAway) Unwrap() error { return syscall.ECONNREFUSED }

// spooling makes a shipper that spools.
func (w *world) spooling(dir string, change ...func(*Options)) (*Shipper, func()) {
	w.t.Helper()
	s, stop := w.shipper(append([]func(*Options){func(o *Options) {
		o.SpoolDirectory, o.AnswerAfter = dir, 20*time.Second
	}}, change...)...)
	return s, stop
}

// outage makes the repository one that has been away for a while.
func (w *world) outage(s *Shipper) {
	w.archive.fail(errAway)
	s.mu.Lock()
	defer s.mu.Unlock()
	s.health.failure(errAway, control.StoreAway, time.Now().Add(-failingAfter), time.Now())
}

func TestShip_outage(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	dir := t.TempDir()
	var mu sync.Mutex
	stored := map[string]int{}
	count := func(o *Options) {
		o.Stored = func(r Receipt) {
			mu.Lock()
			defer mu.Unlock()
			stored[r.Name]++
			if r.Spooled {
				t.Errorf("%s is said to be stored while it is in the folder", r.Name)
			}
		}
	}
	s, stop := w.spooling(dir, count)
	if s.spool == nil {
		t.Fatal("the folder was not opened")
	}
	w.outage(s)
	var paths []string
	for n := uint64(1); n <= 20; n++ {
		paths = append(paths, w.finish(segment(1, n), content(segment(1, n), n)))
	}
	for _, p := range paths {
		r, err := s.Ship(t.Context(), p)
		if err != nil {
			t.Fatal(err)
		}
		if !r.Spooled || r.Stored {
			t.Errorf("got %+v, expected it to be in the folder", r)
		}
	}
	w.mustNotHold(segment(1, 1))
	st := s.Status()
	if st.State != control.WALSpooling || st.Store != control.StoreAway || st.Spool == nil || st.Spool.Files != 20 || st.Pending != 0 ||
		!strings.Contains(st.Reason, "connection refused") {
		t.Errorf("got %+v with folder %+v", st, st.Spool)
	}
	if n, oldest := s.Waiting(); n != 20 || oldest.IsZero() {
		t.Errorf("%d files wait since %v, expected 20", n, oldest)
	}
	// An image needs its WAL in the repository.
	short, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
	defer cancel()
	if err := s.Wait(short, 1, testSize.Start(1), testSize.Start(3)); err == nil {
		t.Error("Wait should not count what is in the folder only")
	}
	if err := s.EndSession(t.Context()); err != nil {
		t.Fatal(err)
	}

	// PostgreSQL has removed the first ten when the runner is started again, and the repository is still away.
	stop()
	for n := uint64(1); n <= 10; n++ {
		for _, path := range []string{filepath.Join("archive_status", segment(1, n)+".ready"), segment(1, n)} {
			if err := os.Remove(filepath.Join(w.data, "pg_wal", path)); err != nil {
				t.Fatal(err)
			}
		}
	}
	s, _ = w.spooling(dir, count)
	w.outage(s)
	if r, err := s.Ship(t.Context(), paths[15]); err != nil || !r.Spooled {
		t.Errorf("got %+v, %v: what is in the folder with the same content is success", r, err)
	}
	w.write(paths[16], content(segment(1, 17), 99))
	if _, err := s.Ship(t.Context(), paths[16]); !errors.As(err, new(*SpoolConflictError)) {
		t.Errorf("got %v, expected a conflict: the folder has other content", err)
	}
	w.write(paths[16], content(segment(1, 17), 17))

	// It comes back; new WAL goes straight there.
	fresh := w.finish(segment(1, 21), content(segment(1, 21), 21))
	w.archive.fail(nil)
	eventually(t, "the folder is empty", func() bool { return s.spool.Files() == 0 })
	if _, err := s.Ship(t.Context(), fresh); err != nil {
		t.Fatal(err)
	}
	if err := s.Wait(t.Context(), 1, testSize.Start(1), testSize.Start(22)); err != nil {
		t.Fatal(err)
	}
	for n := uint64(1); n <= 21; n++ {
		w.mustHold(segment(1, n), content(segment(1, n), n))
		mu.Lock()
		if stored[segment(1, n)] == 0 {
			t.Errorf("nobody was told that %s is stored", segment(1, n))
		}
		mu.Unlock()
	}
	eventually(t, "all is well again", func() bool {
		st := s.Status()
		return st.Store == control.StoreReachable && st.State == control.WALArchiving && st.Reason == "" && len(st.Gaps) == 0
	})
	var spooled int64
	for r, err := range w.series.Sessions(t.Context(), time.Time{}) {
		if err != nil {
			t.Fatal(err)
		}
		spooled += r.Spooled
		if r.Spooled > 0 && r.Result != "warning" {
			t.Errorf("a session with an outage ended with %q", r.Result)
		}
	}
	if spooled != 20 {
		t.Errorf("sessions tell of %d files that waited, expected 20", spooled)
	}
}

// The folder is for WAL that was not stored for a while: until then, a request waits.
func TestShip_shortOutageDoesNotSpool(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	s, _ := w.spooling(t.TempDir())
	w.archive.fail(errAway)
	path := w.finish(segment(1, 1), content(segment(1, 1), 1))
	time.AfterFunc(2*time.Second, func() { w.archive.fail(nil) })
	r, err := s.Ship(t.Context(), path)
	if err != nil || r.Spooled || !r.Stored {
		t.Fatalf("got %+v, %v, expected it to be stored", r, err)
	}
}

func TestShip_spoolFull(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	size := w.seal(segment(1, 1), content(segment(1, 1), 1)).Size
	s, _ := w.spooling(t.TempDir(), func(o *Options) { o.SpoolLimit, o.AnswerAfter = 2*size+size/2, time.Second })
	w.outage(s)
	var paths []string
	for n := uint64(1); n <= 6; n++ {
		paths = append(paths, w.finish(segment(1, n), content(segment(1, n), n)))
	}
	kept := 0
	for _, p := range paths {
		_, err := s.Ship(t.Context(), p)
		switch {
		case err == nil:
			kept++
		case !errors.As(err, new(*PendingError)) || !errors.Is(err, ErrSpoolFull):
			t.Fatalf("got %v, expected *PendingError: the folder is full", err)
		}
	}
	if kept != 2 {
		t.Errorf("%d files were acknowledged, expected 2: there is room for no more", kept)
	}
	if n := s.Status().Failures; n > 40 {
		t.Errorf("%d attempts failed: the repository is asked again and again", n)
	}
	if b := s.spool.Bytes(); b > s.o.SpoolLimit {
		t.Errorf("the folder has %d bytes, its limit is %d", b, s.o.SpoolLimit)
	}
	if st := s.Status(); st.State != control.WALHeld || !st.Spool.Full || st.Pending != 4 || !strings.Contains(st.Reason, "full") {
		t.Errorf("got %+v, expected that PostgreSQL keeps 4 files", st)
	}
	w.archive.fail(nil)
	for _, p := range paths {
		eventually(t, "PostgreSQL's files are stored", func() bool { _, err := s.Ship(t.Context(), p); return err == nil })
	}
	eventually(t, "the folder is empty", func() bool { return s.spool.Files() == 0 })
	for n := uint64(1); n <= 6; n++ {
		w.mustHold(segment(1, n), content(segment(1, n), n))
	}
}

// What two servers store under one name is a conflict, wherever it waits, and holds nothing else up.
func TestShip_spooledConflict(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	s, _ := w.spooling(t.TempDir())
	w.outage(s)
	for n := uint64(1); n <= 3; n++ {
		if _, err := s.Ship(t.Context(), w.finish(segment(1, n), content(segment(1, n), n))); err != nil {
			t.Fatal(err)
		}
	}
	if _, _, err := w.series.PutSealed(t.Context(), w.seal(segment(1, 1), content(segment(1, 1), 99))); err != nil {
		t.Fatal(err)
	}
	if _, _, err := w.series.PutSealed(t.Context(), w.seal(segment(1, 2), content(segment(1, 2), 2))); err != nil {
		t.Fatal(err)
	}
	w.archive.fail(nil)
	eventually(t, "all but the conflict is stored", func() bool { return slices.Equal(s.spool.Names(), []string{segment(1, 1)}) })
	w.mustHold(segment(1, 1), content(segment(1, 1), 99))
	w.mustHold(segment(1, 3), content(segment(1, 3), 3))
	if st := s.Status(); st.Store != control.StoreConflicting || st.Conflicts != 1 || st.Duplicates != 1 {
		t.Errorf("got %+v, expected a conflict and a duplicate", st)
	}
}

func TestShip_damagedInTheFolder(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	dir := t.TempDir()
	s, stop := w.spooling(dir)
	w.outage(s)
	for n := uint64(1); n <= 2; n++ {
		if _, err := s.Ship(t.Context(), w.finish(segment(1, n), content(segment(1, n), n))); err != nil {
			t.Fatal(err)
		}
	}
	stop()
	spool := filepath.Join(dir, testSystem.String())
	for n := uint64(1); n <= 2; n++ {
		if err := os.Truncate(filepath.Join(spool, segment(1, n)+SealedSuffix), 5000); err != nil {
			t.Fatal(err)
		}
		if err := os.Remove(filepath.Join(w.data, "pg_wal", "archive_status", segment(1, n)+".ready")); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Remove(filepath.Join(w.data, "pg_wal", segment(1, 2))); err != nil {
		t.Fatal(err)
	}
	w.archive.fail(nil)
	gaps := make(chan control.WALGap, 2)
	s, _ = w.spooling(dir, func(o *Options) { o.Gap = func(g control.WALGap) { gaps <- g } })
	eventually(t, "the first is stored from pg_wal", func() bool {
		_, err := w.series.StatWAL(t.Context(), segment(1, 1))
		return err == nil
	})
	g := <-gaps
	if g.StartLSN != testSize.Start(2).String() || g.Segments != 1 {
		t.Errorf("found gap %+v, expected segment 2", g)
	}
	eventually(t, "both are set aside", func() bool {
		left, err := filepath.Glob(filepath.Join(spool, "*"+damagedSuffix))
		return err == nil && len(left) == 2 && s.spool.Files() == 0
	})
}

// Without a folder that can be used, everything goes on as without one.
func TestShip_noFolder(t *testing.T) {
	w := newWorld(t)
	file := filepath.Join(t.TempDir(), "file")
	w.write(file, nil)
	s, _ := w.spooling(file)
	if _, err := s.Ship(t.Context(), w.finish(segment(1, 1), content(segment(1, 1), 1))); err != nil {
		t.Fatal(err)
	}
	if st := s.Status(); st.Spool != nil {
		t.Errorf("got folder %+v, expected none", st.Spool)
	}
}
