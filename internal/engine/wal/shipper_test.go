package wal

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/pgark/terraform-provider-pgark/internal/engine/postgres"
	"github.com/pgark/terraform-provider-pgark/internal/engine/repository"
)

func TestShip_everyKindOfFile(t *testing.T) {
	w := newWorld(t)
	s, _ := w.shipper()
	for name, b := range map[string][]byte{
		segment(1, 7):                           content(segment(1, 7), 1),
		segment(1, 8) + ".partial":              content(segment(1, 8), 2),
		"00000002.history":                      []byte("1\t0/700000\tno recovery target specified\n"),
		segment(1, 7) + ".00000028" + ".backup": []byte("START WAL LOCATION: 0/700028\n"),
	} {
		r, err := s.Ship(t.Context(), w.finish(name, b))
		if err != nil {
			t.Fatal(err)
		}
		if !r.Stored || r.Size != int64(len(b)) {
			t.Errorf("%s: got %+v, expected it to be stored with %d bytes", name, r, len(b))
		}
		w.mustHold(name, b)
	}
}

func TestShip_answersFromMemoryWhatItShippedAhead(t *testing.T) {
	w := newWorld(t)
	var paths []string
	for n := uint64(1); n <= 100; n++ { // more than one reading of archive_status queues
		paths = append(paths, w.finish(segment(1, n), content(segment(1, n), n)))
	}
	time.Sleep(settle) // so that ahead means settled: no request makes it read again
	s, _ := w.shipper()
	eventually(t, "all 100 files are shipped without being asked for", func() bool { return s.Status().Segments == 100 })
	if n := s.Status().Pending; n != 0 {
		t.Errorf("got %d pending, expected none", n)
	}
	for _, p := range paths {
		if _, err := s.Ship(t.Context(), p); err != nil {
			t.Fatal(err)
		}
		if n := w.archive.count(filepath.Base(p)); n != 1 {
			t.Errorf("%s was offered %d times, expected once", filepath.Base(p), n)
		}
	}
}

func TestShip_fileChangedSinceItWasShippedAhead(t *testing.T) {
	for how, change := range map[string]func(w *world, path string, b []byte){
		"written in place": func(w *world, path string, b []byte) { w.write(path, b) },
		"replaced": func(w *world, path string, b []byte) {
			w.write(path+".new", b)
			if err := os.Rename(path+".new", path); err != nil {
				w.t.Fatal(err)
			}
		},
		"written in place, with its old time": func(w *world, path string, b []byte) {
			info, err := os.Stat(path)
			if err != nil {
				w.t.Fatal(err)
			}
			w.write(path, b)
			if err := os.Chtimes(path, info.ModTime(), info.ModTime()); err != nil {
				w.t.Fatal(err)
			}
		},
	} {
		t.Run(how, func(t *testing.T) {
			w := newWorld(t)
			name := segment(1, 7)
			path := w.finish(name, content(name, 1))
			s, _ := w.shipper()
			eventually(t, "the file is shipped", func() bool { return s.Status().Segments == 1 })
			change(w, path, content(name, 2))
			_, err := s.Ship(t.Context(), path)
			var conflict *repository.WALConflictError
			if !errors.As(err, &conflict) {
				t.Fatalf("got %v, expected a conflict: what is stored is not what is asked for", err)
			}
			w.mustHold(name, content(name, 1))

			// Back to what is stored: success.
			w.write(path, content(name, 1))
			if _, err := s.Ship(t.Context(), path); err != nil {
				t.Fatal(err)
			}
		})
	}
}

func TestShip_duplicate(t *testing.T) {
	w := newWorld(t)
	name := segment(1, 7)
	path := w.finish(name, content(name, 1))
	s, stop := w.shipper()
	if _, err := s.Ship(t.Context(), path); err != nil {
		t.Fatal(err)
	}
	stop()
	s, _ = w.shipper() // one that remembers nothing
	r, err := s.Ship(t.Context(), path)
	if err != nil {
		t.Fatal(err)
	}
	if r.Stored {
		t.Error("the second time it should have been there already")
	}
	if st := s.Status(); st.Segments != 0 || st.Duplicates != 1 || st.Failures != 0 {
		t.Errorf("got %+v, expected one duplicate and nothing else", st)
	}
}

func TestShip_conflictDoesNotHoldUpOthers(t *testing.T) {
	w := newWorld(t)
	taken := segment(1, 7)
	other := newWorld(t)
	other.archive, other.series, other.repo = w.archive, w.series, w.repo // another primary, same series
	s2, stop := other.shipper()
	if _, err := s2.Ship(t.Context(), other.finish(taken, content(taken, 99))); err != nil {
		t.Fatal(err)
	}
	stop()

	path := w.finish(taken, content(taken, 1))
	w.finish(segment(1, 8), content(segment(1, 8), 2))
	time.Sleep(settle)
	s, _ := w.shipper()
	_, err := s.Ship(t.Context(), path)
	var conflict *repository.WALConflictError
	if !errors.As(err, &conflict) {
		t.Fatalf("got %v, expected a conflict", err)
	}
	for _, digest := range []string{conflict.There.Digest, conflict.Here.Digest} {
		if digest == "" || !strings.Contains(err.Error(), digest[:4]) {
			t.Errorf("%q should name the digest %q", err, digest)
		}
	}
	eventually(t, "the next segment is stored", func() bool { return s.Status().Segments == 1 })
	w.mustHold(segment(1, 8), content(segment(1, 8), 2))
	w.mustHold(taken, content(taken, 99))

	before := w.archive.count(taken)
	if _, err := s.Ship(t.Context(), path); !errors.As(err, &conflict) {
		t.Fatalf("got %v, expected the conflict again", err)
	}
	if n := w.archive.count(taken); n != before {
		t.Errorf("a refusal that is fresh was offered again")
	}
}

func TestShip_refusesACopyOfTheDataDirectory(t *testing.T) {
	w := newWorld(t)
	s, _ := w.shipper()
	clone := newWorld(t)
	name := segment(1, 7)
	path := clone.finish(name, content(name, 1))
	_, err := s.Ship(t.Context(), path)
	var foreign *ForeignError
	if !errors.As(err, &foreign) {
		t.Fatalf("got %v, expected *ForeignError", err)
	}
	for _, dir := range []string{clone.data, w.data} {
		if !strings.Contains(err.Error(), dir) {
			t.Errorf("%q should name %s", err, dir)
		}
	}
	w.mustNotHold(name)

	// The same directory by another name is ours.
	link := filepath.Join(t.TempDir(), "data")
	if err := os.Symlink(w.data, link); err != nil {
		t.Fatal(err)
	}
	w.finish(name, content(name, 1))
	if _, err := s.Ship(t.Context(), filepath.Join(link, "pg_wal", name)); err != nil {
		t.Error(err)
	}
}

func TestShip_refusesWhatIsNotWhatItsNameSays(t *testing.T) {
	name := segment(1, 7)
	for what, test := range map[string]struct {
		name    string
		content []byte
		say     string
	}{
		"another cluster":  {name, func() []byte { b := content(name, 1); b[24] ^= 1; return b }(), "system identifier"},
		"another segment":  {name, content(segment(1, 8), 1), "address"},
		"a later timeline": {name, func() []byte { b := content(name, 1); b[4] = 9; return b }(), "timeline"},
		"cut short":        {name, content(name, 1)[:testSize-8192], "bytes"},
		"zeros":            {name, make([]byte, testSize), "magic number"},
		"cut partial":      {name + ".partial", content(name, 1)[:8192], "bytes"},
	} {
		t.Run(what, func(t *testing.T) {
			w := newWorld(t)
			s, _ := w.shipper()
			_, err := s.Ship(t.Context(), w.finish(test.name, test.content))
			var invalid *InvalidError
			if !errors.As(err, &invalid) || !strings.Contains(err.Error(), test.say) || !strings.Contains(err.Error(), test.name) {
				t.Errorf("got %v, expected *InvalidError that says %q and names the file", err, test.say)
			}
			w.mustNotHold(test.name)
		})
	}
	w := newWorld(t)
	s, _ := w.shipper()
	for _, name := range []string{"xlogtemp.123", "000000010000000000000007.tmp", "archive_status", "../PG_VERSION"} {
		if _, err := s.Ship(t.Context(), filepath.Join(w.data, "pg_wal", name)); !errors.Is(err, postgres.ErrNotWALFile) {
			t.Errorf("%s: got %v, expected ErrNotWALFile", name, err)
		}
	}
	if _, err := s.Ship(t.Context(), filepath.Join(w.data, "pg_wal", segment(1, 3))); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("absent: got %v, expected ErrNotExist", err)
	}
}

func TestShip_repositoryAway(t *testing.T) {
	w := newWorld(t)
	s, _ := w.shipper(func(o *Options) { o.AnswerAfter = 200 * time.Millisecond })
	away := errors.New("dial tcp 10.0.0.1:443: connection refused")
	w.archive.fail(away)
	var paths []string
	for n := uint64(1); n <= 20; n++ {
		paths = append(paths, w.finish(segment(1, n), content(segment(1, n), n)))
	}
	began := time.Now()
	_, err := s.Ship(t.Context(), paths[0])
	var pending *PendingError
	if !errors.As(err, &pending) || !errors.Is(err, away) {
		t.Fatalf("got %v, expected *PendingError with the reason", err)
	}
	if took := time.Since(began); took > 5*time.Second {
		t.Errorf("the answer took %s", took)
	}
	if !strings.Contains(err.Error(), "PostgreSQL keeps the file") || !strings.Contains(err.Error(), w.repo.Store().URL()) {
		t.Errorf("%q should say where, and what happens now", err)
	}
	if st := s.Status(); st.Pending != 20 || st.OldestPending == nil || st.LastError == "" || st.Failures == 0 {
		t.Errorf("got %+v, expected 20 pending and the failure", st)
	}

	w.archive.fail(nil)
	for _, p := range paths {
		eventually(t, "what waited is acknowledged", func() bool {
			_, err := s.Ship(t.Context(), p)
			return err == nil
		})
	}
	for n := uint64(1); n <= 20; n++ {
		w.mustHold(segment(1, n), content(segment(1, n), n))
	}
}

func TestShip_hangingUploadIsNotAcknowledged(t *testing.T) {
	w := newWorld(t)
	w.archive.hang = make(chan struct{})
	s, _ := w.shipper(func(o *Options) { o.AnswerAfter = 100 * time.Millisecond })
	path := w.finish(segment(1, 7), content(segment(1, 7), 1))
	time.Sleep(settle)
	if _, err := s.Ship(t.Context(), path); !errors.As(err, new(*PendingError)) {
		t.Fatalf("got %v, expected *PendingError", err)
	}
	ctx, cancel := context.WithCancelCause(t.Context())
	cancel(errors.New("enough"))
	if _, err := s.Ship(ctx, path); err == nil || !strings.Contains(err.Error(), "enough") {
		t.Fatalf("got %v, expected the cause of the context", err)
	}
	close(w.archive.hang)
	eventually(t, "the upload that went on is acknowledged", func() bool {
		_, err := s.Ship(t.Context(), path)
		return err == nil
	})
	if n := w.archive.count(segment(1, 7)); n != 1 {
		t.Errorf("offered %d times, expected once: requests must not start uploads of what is in flight", n)
	}
}

func TestRun_endsWithWhatIsInFlight(t *testing.T) {
	w := newWorld(t)
	w.archive.hang = make(chan struct{})
	s, stop := w.shipper(func(o *Options) { o.Grace = 50 * time.Millisecond })
	path := w.finish(segment(1, 7), content(segment(1, 7), 1))
	answer := make(chan error)
	go func() {
		_, err := s.Ship(context.Background(), path)
		answer <- err
	}()
	eventually(t, "the upload hangs", func() bool { return w.archive.count(segment(1, 7)) == 1 })
	stop()
	if err := <-answer; !errors.Is(err, ErrStopped) {
		t.Errorf("got %v, expected ErrStopped", err)
	}
	w.mustNotHold(segment(1, 7))
}

func TestWait(t *testing.T) {
	w := newWorld(t)
	earlier, stop := w.shipper()
	for n := uint64(3); n <= 4; n++ {
		if _, err := earlier.Ship(t.Context(), w.finish(segment(1, n), content(segment(1, n), n))); err != nil {
			t.Fatal(err)
		}
		if err := os.Remove(filepath.Join(w.data, "pg_wal", "archive_status", segment(1, n)+".ready")); err != nil {
			t.Fatal(err)
		}
	}
	stop()

	s, _ := w.shipper()
	from, to := testSize.Start(3)+100, testSize.Start(6) // up to the end of segment 5
	short, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
	defer cancel()
	if err := s.Wait(short, 1, from, to); !errors.Is(err, context.DeadlineExceeded) || !strings.Contains(err.Error(), segment(1, 5)) {
		t.Fatalf("got %v, expected a time-out that names %s", err, segment(1, 5))
	}
	done := make(chan error)
	go func() { done <- s.Wait(t.Context(), 1, from, to) }()
	w.finish(segment(1, 5), content(segment(1, 5), 5))
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	if err := s.Wait(t.Context(), 1, to, to); err != nil {
		t.Errorf("an empty range: %v", err)
	}

	// A segment that cannot become durable ends the wait.
	bad := content(segment(1, 6), 1)
	bad[24] ^= 1
	w.finish(segment(1, 6), bad)
	if err := s.Wait(t.Context(), 1, from, testSize.Start(7)); !errors.As(err, new(*InvalidError)) {
		t.Errorf("got %v, expected *InvalidError", err)
	}
}

func TestEndSession(t *testing.T) {
	w := newWorld(t)
	s, _ := w.shipper()
	if err := s.EndSession(t.Context()); err != nil {
		t.Fatal(err)
	}
	w.archive.fail(errors.New("away"))
	path := w.finish(segment(1, 7), content(segment(1, 7), 1))
	eventually(t, "it failed", func() bool { return s.Status().Failures > 0 })
	w.archive.fail(nil)
	if _, err := s.Ship(t.Context(), path); err != nil {
		t.Fatal(err)
	}
	if err := s.EndSession(t.Context()); err != nil {
		t.Fatal(err)
	}
	var records []repository.SessionRecord
	for r, err := range w.series.Sessions(t.Context(), time.Time{}) {
		if err != nil {
			t.Fatal(err)
		}
		records = append(records, r)
	}
	if len(records) != 1 {
		t.Fatalf("got %d records, expected one: the empty stretch has none", len(records))
	}
	r := records[0]
	if r.Kind != "wal" || r.Result != "warning" || r.Segments != 1 || r.Failures < 1 || r.SourceBytes != int64(testSize) ||
		r.StoredBytes == 0 || r.MaxDelay <= 0 || r.Host != "db1" || !strings.Contains(r.Error, "away") {
		t.Errorf("got %+v", r)
	}
}
