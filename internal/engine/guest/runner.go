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
	// facts tells what is there of it.
	facts(ctx context.Context) (runnerFacts, error)
	// log is the end of what it printed.
	log(ctx context.Context) string
}

// runnerFacts is what can be seen of a runner from outside. The texts say what is behind a difference; "" is none.
type runnerFacts struct {
	installed bool   // what keeps it alive is there
	alive     bool   // its process runs
	what      string // the process, or why there is none
	masked    string
	edited    string
	disabled  string
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

// runnerState tells whether an instance's runner runs, as it was deployed, and if not, what is behind it: of several
// differences the one that keeps it from working comes first.
func (g *local) runnerState(ctx context.Context, name, instance string) (state, detail string, err error) {
	f, err := g.runner(name, instance, account{}).facts(ctx)
	if err != nil {
		return "", "", err
	}
	s, asked := g.status(ctx, name, instance)
	if asked != nil && ctx.Err() != nil {
		return "", "", context.Cause(ctx)
	}
	switch {
	case !f.installed:
		return RunnerMissing, f.what, nil
	case f.masked != "":
		return RunnerMasked, f.masked, nil
	case asked != nil && !f.alive && f.disabled != "":
		return RunnerStopped, f.what + "; and " + f.disabled, nil
	case asked != nil && !f.alive:
		return RunnerStopped, f.what, nil
	case asked != nil:
		return RunnerSilent, fmt.Sprintf("%s runs, and does not answer: %v", f.what, asked), nil
	}
	// Without a binary there is none that it should run; that there is none is said of the binary.
	if exe, current := g.isCurrent(s.PID); !current && isFile(g.layout.BinaryLink()) {
		return RunnerOutdated, fmt.Sprintf("process %d runs %s", s.PID, exe), nil
	}
	switch {
	case f.edited != "":
		return RunnerEdited, f.edited, nil
	case f.disabled != "":
		return RunnerDisabled, f.disabled, nil
	}
	return RunnerRunning, "", nil
}

// difference is what Apply found to be different about a job's documents.
type difference int

const (
	changedNothing difference = iota
	changedDocuments
	changedCredentials
)

// ensureRunner makes the instance's runner run, with the binary and the documents that are in place now: it starts one
// that does not run, does not answer or is another binary, and has one that runs already read its documents again.
func (a *application) ensureRunner(ctx context.Context, i job.Instance) error {
	r := a.g.runner(a.job.Name, i.Name, a.owner[i.Name])
	u, withUnit := r.(*unit)
	if withUnit {
		u.settle(a.job, i, a.cluster(i.Name), a.d.Credentials != nil)
	}
	fail := func(err error) error { return &RunnerError{Instance: i.Name, Log: r.log(ctx), Err: err} }
	changed, err := r.install(ctx)
	if err != nil {
		return fail(err)
	}
	if withUnit {
		a.deployed.Units[i.Name] = hexDigest(u.content)
		// systemd hands credentials over when it starts a runner, and not again.
		changed = changed || a.changed == changedCredentials
	}
	if s, err := a.g.status(ctx, a.job.Name, i.Name); err == nil && !changed {
		if _, current := a.g.isCurrent(s.PID); current {
			if a.changed == changedNothing {
				return nil
			}
			if err := control.Reload(ctx, a.g.layout.Socket(a.job.Name, i.Name)); err == nil {
				return nil
			}
			// One that cannot take it over as it runs is started anew.
		}
	}
	if err := r.start(ctx); err != nil {
		return fail(err)
	}
	return a.g.awaitRunner(ctx, r, a.job.Name, i.Name)
}

// awaitRunner waits until the runner that was started answers; *RunnerError if it does not.
func (g *local) awaitRunner(ctx context.Context, r runner, name, instance string) error {
	fail := func(err error) error { return &RunnerError{Instance: instance, Log: r.log(ctx), Err: err} }
	deadline := time.Now().Add(answerTimeout)
	for wait := 10 * time.Millisecond; ; wait = min(2*wait, 500*time.Millisecond) {
		s, err := g.status(ctx, name, instance)
		if err == nil {
			if _, current := g.isCurrent(s.PID); current {
				return nil
			}
			err = fmt.Errorf("process %d answers, which is not the runner that was started", s.PID)
		}
		if b, ok := r.(*background); ok && b.ended() {
			return fail(errors.New("it ended right after its start"))
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

// isCurrent tells which binary a process runs, and whether that is the one that BinaryLink leads to.
func (g *local) isCurrent(pid int) (exe string, current bool) {
	link := fmt.Sprintf("/proc/%d/exe", pid)
	exe, err := os.Readlink(link)
	if err != nil {
		return "a binary that may not be seen", false
	}
	installed, err := os.Stat(g.layout.BinaryLink())
	if err != nil {
		return exe, false
	}
	running, err := os.Stat(link)
	return exe, err == nil && os.SameFile(installed, running)
}
