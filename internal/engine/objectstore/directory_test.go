package objectstore_test

import (
	"context"
	"errors"
	"io"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/pgark/terraform-provider-pgark/internal/engine/objectstore"
	"github.com/pgark/terraform-provider-pgark/internal/engine/objectstore/storetest"
)

func openDirectory(t *testing.T, dir string) objectstore.Store {
	t.Helper()
	s, err := objectstore.Open(t.Context(), objectstore.Location{URL: "file://" + dir}, objectstore.Options{})
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func TestDirectory(t *testing.T) {
	storetest.Run(t, storetest.Config{New: func(t *testing.T) objectstore.Store { return openDirectory(t, t.TempDir()) }})
}

func TestDirectory_missingIsNotMade(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "not", "mounted")
	s := openDirectory(t, dir)
	err := s.Create(t.Context(), "a/b", strings.NewReader("x"), 1)
	if !errors.Is(err, objectstore.ErrNoBucket) || objectstore.IsTransient(err) {
		t.Errorf("create: %v, expected ErrNoBucket", err)
	}
	want := "create a/b in file://" + dir + ": no such repository directory: stat " + dir + ": no such file or directory; " +
		"create it, writable by the owner of the PostgreSQL instance, or mount its file system"
	if err == nil || err.Error() != want {
		t.Errorf("create: %v\nexpected %s", err, want)
	}
	if _, err := s.Get(t.Context(), "a/b", 0, -1); !errors.Is(err, objectstore.ErrNoBucket) {
		t.Errorf("get: %v, expected ErrNoBucket", err)
	}
	for _, err := range s.List(t.Context(), "", "") {
		if !errors.Is(err, objectstore.ErrNoBucket) {
			t.Errorf("list: %v, expected ErrNoBucket", err)
		}
	}
	if _, err := objectstore.Probe(t.Context(), s); !errors.Is(err, objectstore.ErrNoBucket) {
		t.Errorf("probe: %v, expected ErrNoBucket", err)
	}
	if _, err := os.Stat(filepath.Dir(dir)); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the failed create left %s behind (%v)", filepath.Dir(dir), err)
	}
}

func TestDirectory_leftoversOfACrashAreInvisible(t *testing.T) {
	dir := t.TempDir()
	s := openDirectory(t, dir)
	if err := s.Create(t.Context(), "wal/1", strings.NewReader("x"), 1); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"wal/.pgark-0123456789abcdef.tmp", "gone/.pgark-0123456789abcdef.tmp"} {
		path := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte("half"), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	for o, err := range s.List(t.Context(), "", "") {
		if err != nil || o.Key != "wal/1" {
			t.Errorf("listed %+v, %v", o, err)
		}
	}
	for e, err := range s.ListPrefixes(t.Context(), "") {
		if err != nil || e != "wal" {
			t.Errorf("listed prefix %q, %v", e, err)
		}
	}
}

func TestDirectory_failedCreateLeavesNothing(t *testing.T) {
	dir := t.TempDir()
	s := openDirectory(t, dir)
	if err := s.Create(t.Context(), "k", strings.NewReader("four"), 5); err == nil {
		t.Error("a short body was accepted")
	}
	entries, err := os.ReadDir(dir)
	if err != nil || len(entries) != 0 {
		t.Errorf("left behind: %v, %v", entries, err)
	}
}

// A store that is full, and one that became read-only, say so.
func TestDirectory_fullAndReadOnly(t *testing.T) {
	dir := t.TempDir()
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "size=256k"); err != nil { // as root, as all tests
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
	s := openDirectory(t, dir)
	big := strings.Repeat("x", 1<<20)
	err := s.Create(t.Context(), "big", strings.NewReader(big), int64(len(big)))
	if !errors.Is(err, objectstore.ErrFull) || !errors.Is(err, syscall.ENOSPC) || !objectstore.IsTransient(err) || !strings.HasSuffix(err.Error(), "no space left on device; make room, or keep less") {
		t.Errorf("create in a full directory: %v, expected ErrFull", err)
	}
	if err := s.Create(t.Context(), "small", strings.NewReader("x"), 1); err != nil {
		t.Errorf("the failed create left no room: %v", err)
	}
	if err := unix.Mount("", dir, "", unix.MS_REMOUNT|unix.MS_RDONLY, ""); err != nil {
		t.Fatal(err)
	}
	for what, err := range map[string]error{
		"create": s.Create(t.Context(), "other", strings.NewReader("x"), 1), "delete": s.Delete(t.Context(), "small"),
	} {
		if !errors.Is(err, objectstore.ErrReadOnly) || errors.Is(err, objectstore.ErrAccess) || objectstore.IsTransient(err) {
			t.Errorf("%s in a read-only directory: %v, expected ErrReadOnly", what, err)
		}
	}
	if _, err := s.Stat(t.Context(), "small"); err != nil {
		t.Error(err)
	}
}

func TestDirectory_filesBelongToTheOwnerOfTheDirectory(t *testing.T) {
	dir := t.TempDir()
	wantUID, wantGID := os.Geteuid(), os.Getegid()
	if wantUID == 0 { // only root can give files away
		wantUID, wantGID = 12345, 12346
		if err := os.Chown(dir, wantUID, wantGID); err != nil {
			t.Fatal(err)
		}
	}
	if err := openDirectory(t, dir).Create(t.Context(), "job/owner/1", strings.NewReader("x"), 1); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"job", "job/owner", "job/owner/1"} {
		if uid, gid := ownerOf(t, filepath.Join(dir, name)); uid != wantUID || gid != wantGID {
			t.Errorf("%s belongs to %d:%d, expected the owner of the directory", name, uid, gid)
		}
	}
}

func TestOpen_refused(t *testing.T) {
	for url, want := range map[string]string{
		"":                    `repository "": expected s3://bucket/prefix or file:///absolute/path`,
		"/srv/backup":         `repository "/srv/backup": expected s3://bucket/prefix or file:///absolute/path`,
		"file://srv/backup":   `repository "file://srv/backup": expected the absolute path of a directory, as in file:///srv/backup`,
		"file:///":            `repository "file:///": expected the absolute path of a directory, as in file:///srv/backup`,
		"s3://":               `repository "s3://": expected a bucket, as in s3://bucket/prefix`,
		"s3://bucket/a//b":    `repository "s3://bucket/a//b": object key "a//b": a path element is empty`,
		"https://example.com": `repository "https://example.com": expected s3://bucket/prefix or file:///absolute/path`,
	} {
		_, err := objectstore.Open(t.Context(), objectstore.Location{URL: url}, objectstore.Options{})
		if err == nil || err.Error() != want {
			t.Errorf("open %q: %v\nexpected %s", url, err, want)
		}
	}
	_, err := objectstore.Open(t.Context(), objectstore.Location{URL: "file:///srv/backup", StorageClass: "STANDARD_IA"}, objectstore.Options{})
	if err == nil {
		t.Error("a directory with a storage class was accepted")
	}
}

func TestIsTransient(t *testing.T) {
	for want, errs := range map[bool][]error{
		true: {
			syscall.ECONNREFUSED, syscall.ENOSPC, &fs.PathError{Op: "write", Path: "x", Err: syscall.ESTALE},
			&net.OpError{Op: "dial", Err: os.ErrDeadlineExceeded}, &net.DNSError{IsTemporary: true},
		},
		false: {
			nil, context.Canceled, context.DeadlineExceeded, objectstore.ErrNotExist, objectstore.ErrAccess, objectstore.ErrNoBucket,
			&objectstore.ConflictError{}, &objectstore.UnsuitableError{}, io.ErrUnexpectedEOF, &net.DNSError{IsNotFound: true},
			errors.Join(syscall.ECONNRESET, context.Canceled),
		},
	} {
		for _, err := range errs {
			if got := objectstore.IsTransient(err); got != want {
				t.Errorf("IsTransient(%v) = %v", err, got)
			}
		}
	}
}

func ownerOf(t *testing.T, path string) (uid, gid int) {
	t.Helper()
	info, err := os.Stat(path)
	if err != nil {
		t.Fatal(err)
	}
	st, ok := info.Sys().(*syscall.Stat_t)
	if !ok {
		t.Fatalf("stat %s: the owner is not known", path)
	}
	return int(st.Uid), int(st.Gid)
}
