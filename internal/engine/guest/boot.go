//go:build linux

package guest

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/pgark/terraform-provider-pgark/internal/engine/job"
)

// Boot starts the runners of all jobs that do not run: what cron does with the start of a machine without systemd. It
// goes on with the next when one fails.
func Boot(ctx context.Context, layout job.Layout) error {
	g := &local{layout: layout}
	if g.withSystemd() {
		return nil
	}
	unlock, err := g.lock(ctx)
	if err != nil {
		return err
	}
	defer unlock()
	jobs, err := g.jobs()
	if err != nil {
		return err
	}
	var problems []error
	for _, j := range jobs {
		for _, i := range j.Protected {
			problems = append(problems, g.boot(ctx, j, i))
		}
	}
	return errors.Join(problems...)
}

func (g *local) boot(ctx context.Context, j *job.Job, i job.Instance) error {
	owner, err := lookupAccount(i.Owner)
	if err != nil {
		return err
	}
	if err := g.makeRunnerDirectories(j.Name, i.Name, owner); err != nil { // /run is empty
		return err
	}
	r := g.runner(j.Name, i.Name, owner)
	if f, err := r.facts(ctx); err != nil || f.alive {
		return err
	}
	if err := r.start(ctx); err != nil {
		return &RunnerError{Instance: i.Name, Log: r.log(ctx), Err: err}
	}
	return nil
}

// bootFile is the crontab that brings the runners back; "" where there is no cron that runs something at the start of the
// machine. Busybox's does not.
func bootFile(l job.Layout) string {
	dir := filepath.Join("/"+l.Root, "etc/cron.d")
	if info, err := os.Stat(dir); err != nil || !info.IsDir() || os.Geteuid() != 0 {
		return ""
	}
	for _, program := range []string{"usr/sbin/cron", "usr/sbin/crond"} {
		path, err := filepath.EvalSymlinks(filepath.Join("/"+l.Root, program))
		if err == nil && filepath.Base(path) != "busybox" {
			return filepath.Join(dir, "pgark")
		}
	}
	return ""
}

func bootText(l job.Layout) []byte {
	return []byte("# Written by pgark: starts the runners with the machine. It goes with the last job.\n@reboot root " + l.BinaryLink() + " boot\n")
}

func writeBootFile(l job.Layout) error {
	path := bootFile(l)
	if path == "" {
		return nil
	}
	_, err := writeFile(path, bootText(l), 0o644, root())
	return err
}

// bootFileMissing says what keeps cron from bringing the runners back; "" if nothing does, or there is no cron to do it.
func bootFileMissing(l job.Layout) (string, error) {
	path := bootFile(l)
	if path == "" {
		return "", nil
	}
	there, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return path + ", which starts it with the machine, is missing", nil
	}
	if err == nil && string(there) != string(bootText(l)) {
		return path + ", which starts it with the machine, was changed", nil
	}
	return "", err
}

func removeBootFile(l job.Layout) error {
	path := bootFile(l)
	if path == "" {
		return nil
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}
