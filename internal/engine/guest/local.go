//go:build linux

package guest

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/pgark/terraform-provider-pgark/internal/engine/daemon/control"
	"github.com/pgark/terraform-provider-pgark/internal/engine/job"
)

// local is the machine that this process runs on. It holds nothing: every call looks anew.
type local struct {
	layout job.Layout
	kernel string // root of /proc/<pid>/attr and /sys, for tests; "": the machine's
}

var _ Guest = (*local)(nil)

// Local is the machine that this process runs on, with pgark's files where layout says.
func Local(layout job.Layout) Guest { return &local{layout: layout} }

// instancesOf names the instances that a job has anything of on this guest: those of its job file (nil: there is none),
// and those that have a state directory.
func (g *local) instancesOf(name string, j *job.Job) ([]string, error) {
	var names []string
	if j != nil {
		for _, i := range j.Protected {
			names = append(names, i.Name)
		}
	}
	entries, err := os.ReadDir(filepath.Dir(g.layout.StateDirectory(name, "x")))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	for _, e := range entries {
		if e.IsDir() && job.ValidName(e.Name()) == nil {
			names = append(names, e.Name())
		}
	}
	slices.Sort(names)
	return slices.Compact(names), nil
}

// knownInstance is what the job file says of an instance; zero if it says nothing.
func knownInstance(j *job.Job, instance string) job.Instance {
	if j == nil {
		return job.Instance{}
	}
	i, _ := j.Instance(instance)
	return i
}

// SetWALRetention implements Guest. A runner that runs is told; one that does not will read it when it starts.
func (g *local) SetWALRetention(ctx context.Context, name string, r *job.WALRetention) error {
	if err := job.ValidName(name); err != nil {
		return fmt.Errorf("job name %w", err)
	}
	if _, err := os.Stat(g.layout.JobFile(name)); errors.Is(err, fs.ErrNotExist) {
		return ErrNoJob // before a lock file is made on a machine that holds nothing
	}
	unlock, err := g.lock(ctx)
	if err != nil {
		return err
	}
	defer unlock()
	j, err := job.Load(g.layout, name)
	if errors.Is(err, fs.ErrNotExist) {
		return ErrNoJob
	}
	if err != nil {
		return err
	}
	j.WALRetention = r
	j.ApplyDefaults()
	if err := j.Validate(); err != nil {
		return err
	}
	changed, err := writeFile(g.layout.JobFile(name), j.Encode(), 0o644, account{uid: os.Geteuid(), gid: os.Getegid()})
	if err != nil {
		return fmt.Errorf("job %s: write the job file: %w", name, err)
	}
	if !changed {
		return nil
	}
	var notRunning *control.NotRunningError
	for _, i := range j.Protected {
		if err := control.Reload(ctx, g.layout.Socket(name, i.Name)); err != nil && !errors.As(err, &notRunning) {
			return fmt.Errorf("job %s: the job file is written, but the runner of %s did not take it over: %w", name, i.Name, err)
		}
	}
	return nil
}

// isJobFile tells whether a name in JobsDirectory is a job's document.
func isJobFile(name string) bool {
	return strings.HasSuffix(name, ".json") && !strings.HasPrefix(name, ".")
}
