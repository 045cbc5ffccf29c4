package image

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"filippo.io/age"

	"github.com/pgark/terraform-provider-pgark/internal/engine/job"
	"github.com/pgark/terraform-provider-pgark/internal/engine/objectstore"
	"github.com/pgark/terraform-provider-pgark/internal/engine/postgres"
	"github.com/pgark/terraform-provider-pgark/internal/engine/repository"
	"github.com/pgark/terraform-provider-pgark/test/pgtest"
)

// world is a server that archives into a directory, and a repository in another.
type world struct {
	t       testing.TB
	cluster *pgtest.Cluster
	archive string
	state   string
	repo    *repository.Repository
	series  *repository.Series
	log     *logBuffer
	plan    job.Image
}

// logBuffer keeps what was logged.
type logBuffer struct {
	mu sync.Mutex // guards b
	b  bytes.Buffer
}

func (l *logBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *logBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

func newWorld(t testing.TB, o pgtest.Options) *world {
	t.Helper()
	w := &world{t: t, log: &logBuffer{}}
	w.archive = pgtest.Dir(t)
	if o.Settings == nil {
		o.Settings = map[string]string{}
	}
	for name, value := range map[string]string{
		"archive_mode":    "on",
		"archive_command": "cp %p " + w.archive + "/%f.part && mv " + w.archive + "/%f.part " + w.archive + "/%f",
		"wal_level":       "replica",
		"autovacuum":      "off",
	} {
		if _, set := o.Settings[name]; !set {
			o.Settings[name] = value
		}
	}
	w.cluster = pgtest.Start(t, o)
	w.state = t.TempDir()
	w.repo = newRepository(t)
	w.series = w.repo.Series(repository.SeriesID{Job: "orders", Instance: w.cluster.Instance().Name, SystemID: w.cluster.SystemID})
	w.plan.Parallelism = 2
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("log of the image backups:\n%s", w.log)
		}
	})
	return w
}

func newRepository(t testing.TB, recipients ...age.Recipient) *repository.Repository {
	t.Helper()
	store, err := objectstore.Open(t.Context(), objectstore.Location{URL: "file://" + t.TempDir()}, objectstore.Options{})
	if err != nil {
		t.Fatal(err)
	}
	names := make([]string, len(recipients))
	for i, r := range recipients {
		names[i] = fmt.Sprint(r)
	}
	repo, _, err := repository.Create(t.Context(), store, names)
	if err != nil {
		t.Fatal(err)
	}
	return repo
}

func (w *world) options() Options {
	return Options{
		Series: w.series, Instance: w.cluster.Instance(), Plan: w.plan, StateDirectory: w.state,
		Host: "db1", MachineID: "m1", WaitWAL: w.archived,
		Log: slog.New(slog.NewTextHandler(w.log, &slog.HandlerOptions{Level: slog.LevelDebug})),
	}
}

// archived waits for segments in the archive directory.
func (w *world) archived(ctx context.Context, tl postgres.Timeline, from, to postgres.LSN) error {
	size := postgres.DefaultSegmentSize
	for n := size.Number(from); n <= size.NumberBefore(to); {
		_, err := os.Stat(filepath.Join(w.archive, string(postgres.MakeSegmentName(tl, n, size))))
		switch {
		case err == nil:
			n++
			continue
		case !errors.Is(err, fs.ErrNotExist):
			return err
		}
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-time.After(5 * time.Millisecond):
		}
	}
	return nil
}

// take takes an image that must succeed.
func (w *world) take() repository.ImageInfo {
	w.t.Helper()
	return w.takeWith(w.options())
}

func (w *world) takeWith(o Options) repository.ImageInfo {
	w.t.Helper()
	ctx, cancel := context.WithTimeout(w.t.Context(), 2*time.Minute)
	defer cancel()
	info, err := Take(ctx, o)
	if err != nil {
		w.t.Fatal(err)
	}
	head, err := w.series.Head(ctx)
	if err != nil {
		w.t.Fatal(err)
	}
	if len(head.Sessions) != 0 {
		w.t.Fatalf("sessions after an image: %+v", head.Sessions)
	}
	if last := head.Images[len(head.Images)-1]; last.SID != info.SID {
		w.t.Fatalf("newest image %s, expected %s", last.SID, info.SID)
	}
	return info
}

// mustFail takes an image that must fail, and checks that nothing is left of it.
func (w *world) mustFail(ctx context.Context, o Options) error {
	w.t.Helper()
	before, err := w.series.Head(context.Background())
	if err != nil {
		w.t.Fatal(err)
	}
	info, err := Take(ctx, o)
	if err == nil {
		w.t.Fatalf("image %s was taken, expected an error", info.SID)
	}
	after, headErr := w.series.Head(context.Background())
	if headErr != nil {
		w.t.Fatal(headErr)
	}
	if len(after.Sessions) != 0 || len(after.Images) != len(before.Images) {
		w.t.Fatalf("after a failed image: %d sessions, %d images, expected none and %d", len(after.Sessions), len(after.Images), len(before.Images))
	}
	states, _ := filepath.Glob(filepath.Join(w.state, stateDirectory, "*.state"))
	for _, name := range states {
		sid, parseErr := repository.ParseSID(strings.TrimSuffix(filepath.Base(name), ".state"))
		if parseErr != nil || !slices.ContainsFunc(after.Images, func(i repository.ImageInfo) bool { return i.SID == sid }) {
			w.t.Fatalf("after a failed image there is %s", name)
		}
	}
	if w.cluster.Running() && w.backupsRunning() != 0 {
		w.t.Fatal("the server is in backup mode after a failed image")
	}
	return err
}

// backupsRunning counts our connections; a backup ends with its own.
func (w *world) backupsRunning() int {
	w.t.Helper()
	for deadline := time.Now().Add(5 * time.Second); ; time.Sleep(20 * time.Millisecond) {
		n := w.cluster.Scalar("select count(*) from pg_stat_activity where application_name = 'pgark'")
		if n == "0" {
			return 0
		}
		if time.Now().After(deadline) {
			return 1
		}
	}
}

// settle waits until everything in the data directory has been left alone for longer than the quiet period.
func (w *world) settle() {
	w.t.Helper()
	w.cluster.Exec("checkpoint")
	time.Sleep(quietPeriod + 100*time.Millisecond)
}

// materialise rebuilds an image's volumes below a new directory: data, wal, <oid> for each tablespace, config. Links of
// pg_tblspc and pg_wal are turned to them.
func (w *world) materialise(sid repository.SID) (root string, m *repository.Manifest) {
	w.t.Helper()
	ctx := w.t.Context()
	image, err := w.series.OpenImage(ctx, sid)
	if err != nil {
		w.t.Fatal(err)
	}
	root = pgtest.Dir(w.t)
	m = image.Manifest()
	roots := make([]string, len(m.Volumes))
	for i, v := range m.Volumes {
		switch v.Role {
		case roleData, roleWAL:
			roots[i] = filepath.Join(root, v.Role)
		case roleTablespace:
			roots[i] = filepath.Join(root, fmt.Sprint(v.OID))
		default:
			roots[i] = filepath.Join(root, fmt.Sprintf("config%d", i))
		}
	}
	for i := range m.Files {
		f := &m.Files[i]
		name := filepath.Join(roots[f.Volume], f.Path)
		switch f.Type {
		case repository.Directory:
			err = os.MkdirAll(name, 0o700)
		case repository.Symlink:
			link := f.Link
			if f.Path == "pg_wal" {
				link = filepath.Join(root, roleWAL)
			} else if filepath.Dir(f.Path) == "pg_tblspc" {
				link = filepath.Join(root, filepath.Base(f.Path))
			}
			err = os.Symlink(link, name)
		default:
			err = rebuild(ctx, image, f, name)
		}
		if err != nil {
			w.t.Fatalf("rebuild %s: %v", f.Path, err)
		}
		if f.Type != repository.Symlink {
			if err := os.Chmod(name, fs.FileMode(f.Mode&0o777)); err != nil {
				w.t.Fatal(err)
			}
		}
	}
	if err := os.WriteFile(filepath.Join(root, "data/backup_label"), []byte(m.BackupLabel), 0o600); err != nil {
		w.t.Fatal(err)
	}
	pgtest.Chown(w.t, root)
	return root, m
}

func rebuild(ctx context.Context, image *repository.Image, f *repository.File, name string) error {
	sm, err := image.FileMap(ctx, f)
	if err != nil {
		return err
	}
	out, err := os.Create(name)
	if err != nil {
		return err
	}
	defer out.Close()
	byFrame := make(map[repository.FrameRef][]repository.Run)
	for _, r := range sm.Runs {
		byFrame[sm.Frames[r.Frame]] = append(byFrame[sm.Frames[r.Frame]], r)
	}
	err = image.ReadFrames(ctx, sm.Frames, func(ref repository.FrameRef, raw []byte) error {
		for _, r := range byFrame[ref] {
			from := int(r.First) * int(sm.BlockSize)
			to := min(from+int(r.Count)*int(sm.BlockSize), len(raw))
			if _, err := out.WriteAt(raw[from:to], int64(r.Start)*int64(sm.BlockSize)); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		return err
	}
	return out.Truncate(f.Size)
}

// recover starts a server on a materialised image, which replays WAL from the archive to its end.
func (w *world) recover(sid repository.SID) *pgtest.Cluster {
	w.t.Helper()
	root, m := w.materialise(sid)
	data := filepath.Join(root, "data")
	if m.TablespaceMap != "" {
		// Recovery makes the links anew from this file.
		var b strings.Builder
		for line := range strings.Lines(m.TablespaceMap) {
			oid, _, _ := strings.Cut(line, " ")
			fmt.Fprintf(&b, "%s %s\n", oid, filepath.Join(root, oid))
		}
		if err := os.WriteFile(filepath.Join(data, "tablespace_map"), []byte(b.String()), 0o600); err != nil {
			w.t.Fatal(err)
		}
	}
	for i, v := range m.Volumes {
		if v.Role == roleConfig {
			for _, name := range []string{"postgresql.conf", "pg_hba.conf", "pg_ident.conf"} {
				b, err := os.ReadFile(filepath.Join(root, fmt.Sprintf("config%d", i), name))
				if err != nil {
					w.t.Fatal(err)
				}
				if err := os.WriteFile(filepath.Join(data, name), b, 0o600); err != nil {
					w.t.Fatal(err)
				}
			}
		}
	}
	if err := os.WriteFile(filepath.Join(data, "recovery.signal"), nil, 0o600); err != nil {
		w.t.Fatal(err)
	}
	pgtest.Chown(w.t, root)
	c := pgtest.Start(w.t, pgtest.Options{DataDir: data, Major: w.cluster.Major, Settings: map[string]string{
		"restore_command": "cp " + w.archive + "/%f %p", "archive_mode": "off", "recovery_target_timeline": "current",
		"data_directory": data, "hba_file": filepath.Join(data, "pg_hba.conf"), "ident_file": filepath.Join(data, "pg_ident.conf"),
	}})
	for deadline := time.Now().Add(time.Minute); c.Scalar("select pg_is_in_recovery()") != "f"; time.Sleep(20 * time.Millisecond) {
		if time.Now().After(deadline) {
			w.t.Fatal("recovery does not end")
		}
	}
	return c
}

// fileOf is a relation's first file.
func (w *world) fileOf(relation string) string {
	w.t.Helper()
	return filepath.Join(w.cluster.DataDir, w.cluster.Scalar("select pg_relation_filepath('"+relation+"')"))
}
