package wal

import (
	"context"
	"errors"
	"fmt"
	"hash/fnv"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/pgark/terraform-provider-pgark/internal/engine/daemon/control"
)

// Detached gives the arguments with which this program serves a Fetcher, by ServeDetached.
type Detached func(ring, socket string) []string

// startTimeout is how long a Fetcher may take to listen. It opens the repository later, when it is asked.
const startTimeout = 15 * time.Second

// FetchDetached is Fetch, through a Fetcher in a process of its own that lives in a directory beside path, and which is
// started if it does not run. Fetchers for different keys do not meet; a key is made of what tells what to fetch from.
func FetchDetached(ctx context.Context, name, path string, key []string, arguments Detached) (found bool, err error) {
	path, err = filepath.Abs(path)
	if err != nil {
		return false, err
	}
	ring := filepath.Join(filepath.Dir(path), detachedRing(key))
	socket := filepath.Join(ring, "socket")
	deadline := time.Now().Add(startTimeout)
	for started := (time.Time{}); ; {
		// The directory may be a shared one, like /tmp: files are taken only from a ring that is ours.
		if err := claimRing(ring); err != nil {
			return false, fmt.Errorf("fetch wal %s: %w", name, err)
		}
		found, err = Fetch(ctx, socket, name, path)
		if err == nil || !errors.As(err, new(*control.NotRunningError)) {
			return found, err
		}
		if time.Now().After(deadline) {
			return false, fmt.Errorf("fetch wal %s: no fetcher answers after %s: %w%s", name, startTimeout, err, lastWords(ring))
		}
		// Again after a second: the one that we started leaves at once when it finds another one, which may be leaving, too.
		if time.Since(started) > time.Second {
			if err := start(arguments(ring, socket), ring); err != nil {
				return false, fmt.Errorf("fetch wal %s: start a fetcher: %w", name, err)
			}
			started = time.Now()
		}
		select {
		case <-ctx.Done():
			return false, context.Cause(ctx)
		case <-time.After(5 * time.Millisecond):
		}
	}
}

// detachedRing is the name of the directory of a Fetcher. The small client (runner/client.c) makes the same name: the hash,
// of the key's elements with a NUL after each, is one that takes three lines in C. Two keys with one hash would be
// served by one Fetcher; they come from whoever writes restore_command, who has nothing to gain by that.
func detachedRing(key []string) string {
	h := fnv.New64a()
	for _, k := range key {
		_, _ = h.Write(append([]byte(k), 0)) // a hash never fails
	}
	return fmt.Sprintf(".pgark-fetch-%016x", h.Sum64())
}

// claimRing makes the ring, and refuses one that others may write to.
func claimRing(ring string) error {
	if err := os.Mkdir(ring, 0o700); err == nil || !errors.Is(err, os.ErrExist) {
		return err
	}
	info, err := os.Lstat(ring)
	if err != nil {
		return err
	}
	st, ok := info.Sys().(*syscall.Stat_t)
	if !ok || !info.IsDir() || info.Mode().Perm()&0o077 != 0 || int(st.Uid) != os.Geteuid() {
		return fmt.Errorf("%s: expected a directory of ours that nobody else can enter", ring)
	}
	return nil
}

// start starts this program in the background, free of the process that PostgreSQL waits for and of its log.
func start(arguments []string, ring string) error {
	self, err := os.Executable()
	if err != nil {
		return err
	}
	log, err := os.OpenFile(filepath.Join(ring, "log"), os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	defer log.Close()
	cmd := exec.CommandContext(context.Background(), self, arguments...) // it outlives us
	cmd.Dir = "/"
	cmd.Stderr = log
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := cmd.Start(); err != nil {
		return err
	}
	return cmd.Process.Release()
}

func lastWords(ring string) string {
	b, err := os.ReadFile(filepath.Join(ring, "log"))
	if err != nil || len(b) == 0 {
		return ""
	}
	lines := strings.Split(strings.TrimSpace(string(b)), "\n")
	return "; its last words: " + lines[len(lines)-1]
}

// ServeDetached serves a Fetcher for FetchDetached until nobody has asked for a while, and leaves nothing behind. Where
// one serves already, it returns at once.
func ServeDetached(ctx context.Context, o FetcherOptions, socket string) error {
	name := filepath.Join(o.Ring, "lock")
	lock, err := os.OpenFile(name, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return err
	}
	defer lock.Close()
	if err := syscall.Flock(int(lock.Fd()), syscall.LOCK_EX|syscall.LOCK_NB); err != nil {
		return nil
	}
	// One that is leaving may have removed the file between our opening and locking it.
	mine, err := lock.Stat()
	if err != nil {
		return err
	}
	if there, err := os.Stat(name); err != nil || !os.SameFile(mine, there) {
		return nil
	}
	f, err := NewFetcher(o)
	if err != nil {
		return err
	}
	err = f.Serve(ctx, socket)
	if e := f.Close(); err == nil {
		err = e
	}
	for _, left := range []string{"log", "lock", "."} {
		_ = os.Remove(filepath.Join(o.Ring, left)) // what somebody else has put there stays
	}
	return err
}
