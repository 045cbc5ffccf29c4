//go:build linux

package guest

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/pgark/terraform-provider-pgark/internal/engine/job"
	"github.com/pgark/terraform-provider-pgark/internal/engine/wal"
)

// Remove implements Guest. While the settings of an instance cannot be put back, everything stays as it is: PostgreSQL
// would go on calling an archive_command whose program is gone.
func (g *local) Remove(ctx context.Context, name string) error {
	if err := job.ValidName(name); err != nil {
		return fmt.Errorf("job name %w", err)
	}
	if fresh, _, err := g.previous(name); err == nil && fresh {
		return nil // before a lock file is made on a machine that holds nothing
	}
	unlock, err := g.lock(ctx)
	if err != nil {
		return fmt.Errorf("job %s: %w", name, err)
	}
	defer unlock()
	return g.remove(ctx, name, keepSpool)
}

// spoolPolicy says what becomes of WAL in the temporary folder that has not reached the repository.
type spoolPolicy int

const (
	keepSpool    spoolPolicy = iota // PostgreSQL was told that it is safe
	discardSpool                    // nothing can be restored with it
)

// remove is Remove under the lock.
func (g *local) remove(ctx context.Context, name string, spool spoolPolicy) error {
	j, err := job.Load(g.layout, name)
	if err != nil {
		j = nil // unreadable or gone: what is remembered of the settings names the instances, too
	}
	instances, err := g.instancesOf(name, j)
	if err != nil {
		return fmt.Errorf("job %s: %w", name, err)
	}
	var problems []error
	for _, instance := range instances {
		if spool == keepSpool {
			if err := g.awaitSpool(ctx, name, instance, j); err != nil {
				problems = append(problems, err)
				continue
			}
		}
		if err := g.putBack(ctx, name, instance, knownInstance(j, instance)); err != nil {
			problems = append(problems, err)
		}
	}
	if len(problems) > 0 {
		return fmt.Errorf("job %s: nothing was removed: %w", name, errors.Join(problems...))
	}
	for _, instance := range instances {
		if err := g.release(ctx, name, instance, j, spool); err != nil {
			return fmt.Errorf("job %s: remove the runner of %s: %w", name, instance, err)
		}
	}
	l := g.layout
	for _, path := range []string{l.CredentialsFile(name), l.JobFile(name)} {
		if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("job %s: %w", name, err)
		}
	}
	for _, dir := range []string{filepath.Dir(l.StateDirectory(name, "x")), l.RunDirectory(name), l.LogDirectory(name)} {
		if err := os.RemoveAll(dir); err != nil {
			return fmt.Errorf("job %s: %w", name, err)
		}
	}
	return g.removeShared()
}

// release stops an instance's runner and removes everything of the instance. PostgreSQL hands no WAL over any more.
func (g *local) release(ctx context.Context, name, instance string, j *job.Job, spool spoolPolicy) error {
	if spool == keepSpool {
		// The last of it may just have come.
		if err := g.awaitSpool(ctx, name, instance, j); err != nil {
			return err
		}
	}
	r := g.runner(name, instance, account{})
	if err := r.stop(ctx); err != nil {
		return err
	}
	if spool == keepSpool {
		// What was on its way while the runner stopped. The next one stores it.
		if err := g.spooled(name, instance, j); err != nil {
			return errors.Join(err, r.start(ctx))
		}
	}
	if err := g.leaveSlot(ctx, name, instance, knownInstance(j, instance)); err != nil {
		return err
	}
	if err := r.remove(ctx); err != nil {
		return err
	}
	if j != nil {
		directory := g.layout.SpoolDirectory(j, instance)
		if err := os.RemoveAll(directory); err != nil {
			return err
		}
		if j.WAL.TempFolder != "" {
			if err := prune(filepath.Dir(directory), j.WAL.TempFolder); err != nil {
				return err
			}
		}
	}
	return os.RemoveAll(g.layout.StateDirectory(name, instance))
}

// spoolPatience is how long a runner that is to go may take to store what is in its temporary folder.
const spoolPatience = 10 * time.Second

// awaitSpool waits until the temporary folder is empty; *SpoolError if that takes too long.
func (g *local) awaitSpool(ctx context.Context, name, instance string, j *job.Job) error {
	began := time.Now()
	for {
		err := g.spooled(name, instance, j)
		var left *SpoolError
		if !errors.As(err, &left) || time.Since(began) > spoolPatience || ctx.Err() != nil {
			return err
		}
		select {
		case <-ctx.Done():
		case <-time.After(200 * time.Millisecond):
		}
	}
}

// spooled fails with a *SpoolError while WAL lies in an instance's temporary folder, the one that j declares or an earlier
// one. Without a job file it can only be looked for where the runner says that it may be.
func (g *local) spooled(name, instance string, j *job.Job) error {
	if j == nil {
		j = &job.Job{Name: name}
	}
	e := &SpoolError{Instance: instance}
	declared := g.layout.SpoolDirectory(j, instance)
	places, err := g.layout.SpoolPlaces(name, instance)
	if err != nil {
		return fmt.Errorf("instance %s: %w", instance, err)
	}
	directories := []string{declared}
	for _, p := range places {
		if !strings.HasPrefix(p.Directory, declared+"/") {
			directories = append(directories, p.Directory)
		}
	}
	for _, directory := range directories {
		n, err := wal.CountSpooled(directory)
		if err != nil {
			return err
		}
		if n > 0 {
			e.Directories = append(e.Directories, directory)
			e.Files += n
		}
	}
	if e.Files == 0 {
		return nil
	}
	remove := sudo() + "rm -r"
	for _, directory := range e.Directories {
		remove += " " + word(directory)
	}
	e.Remedy = "# the runner stores them as soon as it reaches the repository; this shows how far it is:\n" +
		g.layout.BinaryLink() + " status --job " + name + "\n# to lose them:\n# " + remove
	return e
}

// removeShared removes what all jobs share, if there is none left. A machine id that we made stays: it owns the names of
// jobs in repositories.
func (g *local) removeShared() error {
	l := g.layout
	entries, err := os.ReadDir(l.JobsDirectory())
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	for _, e := range entries {
		if isJobFile(e.Name()) {
			return nil
		}
	}
	if err := os.Remove(l.BinaryLink()); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	for _, dir := range g.binaryDirectories() {
		if err := os.RemoveAll(dir); err != nil {
			return err
		}
	}
	if err := os.Remove(l.LibDirectory()); err != nil && !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, syscall.ENOTEMPTY) {
		return err
	}
	if err := removeBootFile(l); err != nil {
		return err
	}
	// Whoever waits for the lock notices that its file has gone.
	if err := os.Remove(filepath.Join(l.RunRoot(), "lock")); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	// Directories of the machine, like /usr/local/bin, are not ours even when they are empty.
	for _, dir := range []string{l.JobsDirectory(), l.StateRoot(), l.RunRoot(), l.LogRoot()} {
		stop := filepath.Dir(dir)
		if dir == l.JobsDirectory() {
			stop = filepath.Dir(l.ConfigDirectory())
		}
		if l.Root != "" {
			stop = filepath.Clean("/" + l.Root)
		}
		if err := prune(dir, stop); err != nil {
			return err
		}
	}
	if l.Root == "" {
		return nil
	}
	for _, dir := range []string{filepath.Dir(l.LibDirectory()), filepath.Dir(l.BinaryLink())} {
		if err := prune(dir, filepath.Clean("/"+l.Root)); err != nil {
			return err
		}
	}
	return nil
}
