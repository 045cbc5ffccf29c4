//go:build linux

package guest

import (
	"context"
	"errors"
	"fmt"
	"os"
	"time"

	"github.com/pgark/terraform-provider-pgark/internal/engine/daemon/control"
	"github.com/pgark/terraform-provider-pgark/internal/engine/job"
)

const (
	// answerTimeout is how long a runner may take to answer after its start: it opens its socket before anything else.
	answerTimeout = 30 * time.Second
	// stopTimeout is how long a runner may take to end. It gives what it is doing 20 s.
	stopTimeout = 45 * time.Second

	logTail = 4 << 10 // bytes of a runner's log in an error
)

// runner is one instance's runner and how it is kept alive: by systemd, or as a supervised background process.
type runner interface {
	// install makes what keeps it alive, and reports whether that was different before. It starts nothing.
	install(ctx context.Context) (changed bool, err error)
	// start starts it, or starts it anew if it runs.
	start(ctx context.Context) error
	// stop stops it; one that does not run is no error.
	stop(ctx context.Context) error
	// remove takes away what install made, after stop.
	remove(ctx context.Context) error
	// installed tells whether install has made anything that is still there.
	installed() (bool, error)
	// log is the end of what it printed.
	log(ctx context.Context) string
}

// systemdRuns tells whether systemd is this machine's init (sd_booted(3)).
func systemdRuns() bool {
	info, err := os.Stat("/run/systemd/system")
	return err == nil && info.IsDir()
}

// withSystemd tells how runners are kept alive. A layout below a root of its own is a test's or a demo's, which must not
// leave units in the machine.
func (g *local) withSystemd() bool { return g.layout.Root == "" && systemdRuns() }

// runner prepares the runner of an instance. The owner is needed to install and to start it only.
func (g *local) runner(name, instance string, owner account) runner {
	if g.withSystemd() {
		return &unit{g: g, job: name, instance: instance, owner: owner}
	}
	return &background{layout: g.layout, job: name, instance: instance, owner: owner}
}

// status asks a runner for its status, shortly.
func (g *local) status(ctx context.Context, name, instance string) (*control.Status, error) {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	return control.GetStatus(ctx, g.layout.Socket(name, instance))
}

// runnerState tells whether an instance's runner runs.
func (g *local) runnerState(ctx context.Context, name, instance string) (string, error) {
	_, err := g.status(ctx, name, instance)
	if err == nil {
		return RunnerRunning, nil
	}
	if ctx.Err() != nil {
		return "", context.Cause(ctx)
	}
	there, err := g.runner(name, instance, account{}).installed()
	if err != nil {
		return "", err
	}
	if there {
		return RunnerStopped, nil
	}
	return RunnerMissing, nil
}

// change is what Apply found to be different about a job's documents.
type change int

const (
	changedNothing change = iota
	changedDocuments
	changedCredentials
)

// ensureRunner makes the instance's runner run, with the binary and the documents that are in place now: it starts one
// that does not run or that is another binary, and has one that runs already read its documents again.
func (g *local) ensureRunner(ctx context.Context, j *job.Job, i job.Instance, owner account, what change) error {
	r := g.runner(j.Name, i.Name, owner)
	fail := func(err error) error { return &RunnerError{Instance: i.Name, Log: r.log(ctx), Err: err} }
	changed, err := r.install(ctx)
	if err != nil {
		return fail(err)
	}
	// systemd hands credentials over when it starts a runner, and not again.
	changed = changed || what == changedCredentials && g.withSystemd()
	if s, err := g.status(ctx, j.Name, i.Name); err == nil && !changed && g.isCurrent(s.PID) {
		if what == changedNothing {
			return nil
		}
		if err := control.Reload(ctx, g.layout.Socket(j.Name, i.Name)); err == nil {
			return nil
		}
		// One that cannot take it over as it runs is started anew.
	}
	if err := r.start(ctx); err != nil {
		return fail(err)
	}
	deadline := time.Now().Add(answerTimeout)
	for wait := 10 * time.Millisecond; ; wait = min(2*wait, 500*time.Millisecond) {
		s, err := g.status(ctx, j.Name, i.Name)
		if err == nil && g.isCurrent(s.PID) {
			return nil
		}
		if b, ok := r.(*background); ok && b.ended() {
			return fail(errors.New("it ended right after its start"))
		}
		if err == nil {
			err = fmt.Errorf("process %d answers, which is not the runner that was started", s.PID)
		}
		if time.Now().After(deadline) {
			return fail(fmt.Errorf("no answer within %v: %w", answerTimeout, err))
		}
		select {
		case <-ctx.Done():
			return fail(context.Cause(ctx))
		case <-time.After(wait):
		}
	}
}

// isCurrent tells whether a process runs the binary that BinaryLink leads to.
func (g *local) isCurrent(pid int) bool {
	current, err := os.Stat(g.layout.BinaryLink())
	if err != nil {
		return false
	}
	running, err := os.Stat(fmt.Sprintf("/proc/%d/exe", pid))
	return err == nil && os.SameFile(current, running)
}
