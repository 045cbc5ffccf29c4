//go:build linux

package guest

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"syscall"
	"time"
)

// lock keeps other changers of this guest away, in this process and in others, until unlock or the end of the process.
// It lies in RunRoot, where it goes with the last job, or with the next boot.
func (g *local) lock(ctx context.Context) (unlock func(), err error) {
	name := filepath.Join(g.layout.RunRoot(), "lock")
	for wait := time.Millisecond; ; wait = min(2*wait, 200*time.Millisecond) {
		f, err := g.tryLock(name)
		if err != nil {
			return nil, fmt.Errorf("lock the guest: %w", err)
		}
		if f != nil {
			return func() { f.Close() }, nil
		}
		select {
		case <-ctx.Done():
			return nil, fmt.Errorf("lock the guest: somebody else changes it (%s is locked): %w", name, context.Cause(ctx))
		case <-time.After(wait):
		}
	}
}

// tryLock returns nil without an error while somebody else has the lock.
func (g *local) tryLock(name string) (*os.File, error) {
	if err := makeParents(filepath.Dir(name)); err != nil {
		return nil, err
	}
	f, err := os.OpenFile(name, os.O_RDWR|os.O_CREATE|syscall.O_NOFOLLOW, 0o600)
	if err != nil {
		return nil, err
	}
	err = syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB)
	if errors.Is(err, syscall.EWOULDBLOCK) {
		f.Close()
		return nil, nil
	}
	if err != nil {
		f.Close()
		return nil, err
	}
	// Who removed the last job removed the file too, while we waited for it: a lock on a file without a name keeps
	// nobody away.
	locked, err := f.Stat()
	if err != nil {
		f.Close()
		return nil, err
	}
	named, err := os.Stat(name)
	if err != nil || !os.SameFile(locked, named) {
		f.Close()
		return nil, nil //nolint:nilerr // not there is not ours to lock: another try makes it
	}
	return f, nil
}
