// Package remote is a guest at the other end of an SSH connection. The same code that serves a local guest runs there: the
// runner's own binary, started as `pgark guest`, answers requests on its standard input (Serve), and Guest here asks them.
//
// # Getting the binary there
//
// One look at the guest tells its architecture, the runners that are deployed there, and where files can be put. A guest
// that has the very binary deployed (by content hash), in a place that only root writes, runs that one. To any other it is
// sent first, compressed, and unpacked by the guest's gzip to a directory of its own in the account's home, or elsewhere:
// from there root gets it to <lib>/incoming/pgark by install(1); for anybody else that directory has to be on a file
// system that is not mounted noexec, and it runs there. Once it runs it removes its own file.
//
// All that is one session of one script, which removes what it made if less than the whole runner comes: a probe leaves
// nothing behind, whatever happens to the connection. Who brings another runner at the same moment may replace ours: the
// server's first line tells, and then it is brought again. Apply installs the program that runs, so the binary travels once.
//
// # The conversation
//
// One JSON document a line, both ways. The first line of the server says who it is and is checked; then requests, each with
// a number, are answered in any order. A request can be canceled, and is answered all the same. When the server's input
// ends, or is silent for two minutes (the client gives a sign of life every 15 s), it cancels what runs, waits until that
// has put things back, and ends: a lost connection stops the remote step. Secrets go in requests only.
package remote

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/pgark/terraform-provider-pgark/internal/engine/guest"
	"github.com/pgark/terraform-provider-pgark/internal/engine/guest/sshlink"
	"github.com/pgark/terraform-provider-pgark/internal/engine/job"
)

// Runner is the runner's binary for one architecture.
type Runner struct {
	Compressed []byte // by gzip
	SHA256     string // of the binary itself, hexadecimal
}

// Options make a Guest.
type Options struct {
	Link   *sshlink.Link
	Runner func(goarch string) (Runner, error)

	// Idle is how long a conversation with nothing to do is kept; 0: 30 s.
	Idle time.Duration

	// Root is the root of the guest's layout (job.Layout): "" on a real guest, a directory in tests.
	Root string

	ping    time.Duration // between signs of life; 0: 15 s
	silence time.Duration // after which the guest is taken for gone; 0: as silence
}

func (o *Options) applyDefaults() {
	if o.Idle <= 0 {
		o.Idle = 30 * time.Second // from plan to apply nothing is kept that long; between two resources of a walk it is
	}
	if o.ping <= 0 {
		o.ping = 15 * time.Second
	}
	if o.silence <= 0 {
		o.silence = silence
	}
}

// Guest is a guest.Guest over a Link. It connects on first use; a conversation that has had nothing to do for a while is
// ended, and begun again when it is needed. Changing calls run one at a time. Safe for concurrent use.
//
// Errors that come from the guest are those of a local one: errors.Is finds guest.ErrNoJob, errors.As
// *guest.PrerequisiteError and *repository.OwnedError; any other has the same words and the same hint. Beside them there
// are those of the link, *UnsupportedError, *StageError, and for changing calls *LostError.
//
// When the context of a changing call ends, the guest is told to stop and its answer is waited for, as a local guest
// would be: for at most two and a half minutes.
type Guest struct {
	options  Options
	opener   *opener
	dial     func(context.Context) (*conversation, error) // opener.open, but for tests without a network
	changing chan struct{}                                // holds an element while a changing call is under way

	mu      sync.Mutex // guards what follows
	talk    *conversation
	opening *opening
	closed  bool
}

var _ guest.Guest = (*Guest)(nil)

// opening is a conversation that is being opened, for all who wait for it.
type opening struct {
	done   chan struct{} // Closed when talk and err are set.
	talk   *conversation
	err    error
	users  int // who wait for it; when there are none left it is given up
	cancel context.CancelCauseFunc
}

// New prepares the guest. It asks nothing yet.
func New(o Options) *Guest {
	o.applyDefaults()
	g := &Guest{options: o, opener: &opener{o: o}, changing: make(chan struct{}, 1)}
	g.dial = g.opener.open
	return g
}

// RunnerSHA256 is the digest of the runner for this guest's architecture. It connects if it has to.
func (g *Guest) RunnerSHA256(ctx context.Context) (string, error) {
	arch := g.opener.architecture()
	if arch == "" {
		if _, err := g.opener.look(ctx); err != nil {
			return "", err
		}
		arch = g.opener.architecture()
	}
	r, err := g.options.Runner(arch)
	return r.SHA256, err
}

// HostKey is the key that the guest's SSH server showed; "" before the first call.
func (g *Guest) HostKey() string { return g.options.Link.HostKey() }

// Close ends the conversation and the connection. Calls that are under way fail. The guest cannot be used any more.
func (g *Guest) Close() error {
	g.mu.Lock()
	g.closed = true
	talk, opening := g.talk, g.opening
	g.mu.Unlock()
	if opening != nil {
		opening.cancel(errClosed)
		<-opening.done
		talk = opening.talk
	}
	if talk != nil {
		talk.end()
	}
	return g.options.Link.Close()
}

var errClosed = errors.New("the connection to the guest is closed")

// begin returns a conversation that a call was begun in.
func (g *Guest) begin(ctx context.Context) (*conversation, error) {
	for {
		g.mu.Lock()
		if g.closed {
			g.mu.Unlock()
			return nil, errClosed
		}
		if g.talk != nil && g.talk.begin() {
			defer g.mu.Unlock()
			return g.talk, nil
		}
		o := g.opening
		if o == nil {
			o = g.open(ctx)
			g.opening = o
		}
		o.users++
		g.mu.Unlock()

		select {
		case <-o.done:
			if o.err != nil {
				return nil, o.err
			}
		case <-ctx.Done():
			g.mu.Lock()
			if o.users--; o.users == 0 {
				o.cancel(context.Cause(ctx))
				if g.opening == o {
					g.opening = nil // whoever comes now is not given up with us
				}
			}
			g.mu.Unlock()
			return nil, context.Cause(ctx)
		}
	}
}

// open opens a conversation. It goes on as long as anybody waits for it. g.mu is held.
func (g *Guest) open(ctx context.Context) *opening {
	o := &opening{done: make(chan struct{})}
	ctx, o.cancel = context.WithCancelCause(context.WithoutCancel(ctx))
	go func() {
		defer o.cancel(nil)
		talk, err := g.dial(ctx)
		g.mu.Lock()
		o.talk, o.err = talk, err
		wanted := g.opening == o
		if wanted {
			g.opening = nil
			if err == nil {
				g.talk = talk
			}
		}
		g.mu.Unlock()
		if !wanted && talk != nil {
			talk.end()
		}
		close(o.done)
	}()
	return o
}

// call makes a call, reads its result into result (nil for none), and says in errors what it was for.
func (g *Guest) call(ctx context.Context, name string, params, result any) error {
	_, err := g.try(ctx, name, params, result, changesNothing)
	if _, died := err.(*diedError); died { //nolint:errorlint // as try returns it
		if _, err = g.try(ctx, name, params, result, changesNothing); err != nil {
			if again, ok := err.(*diedError); ok { //nolint:errorlint // as above
				return fmt.Errorf("%s: %s: the connection was lost twice, before an answer came: %w", g.options.Link, name, again.err)
			}
		}
	}
	return err
}

// change makes a call that changes something. what says it in words: "apply job orders".
func (g *Guest) change(ctx context.Context, what, name string, params, result any) error {
	select {
	case g.changing <- struct{}{}:
	case <-ctx.Done():
		return fmt.Errorf("%s: wait for another change of the same guest: %w", what, context.Cause(ctx))
	}
	defer func() { <-g.changing }()
	began, err := g.try(ctx, name, params, result, changesSomething)
	if died, ok := err.(*diedError); ok { //nolint:errorlint // as try returns it
		return &LostError{Host: g.options.Link.String(), Call: what, After: time.Since(began), Err: died.err}
	}
	return err
}

// Whether a call changes the guest.
const (
	changesNothing   = false
	changesSomething = true
)

// diedError says that the conversation ended before an answer came.
type diedError struct{ err error }

func (e *diedError) Error() string { return e.err.Error() }
func (e *diedError) Unwrap() error { return e.err }

// try makes a call once. began is when it was sent.
func (g *Guest) try(ctx context.Context, name string, params, result any, changes bool) (began time.Time, err error) {
	r := request{Call: name}
	if params != nil {
		if r.Params, err = json.Marshal(params); err != nil {
			return began, fmt.Errorf("%s: %w", name, err)
		}
	}
	talk, err := g.begin(ctx)
	if err != nil {
		return began, err
	}
	defer talk.finish()
	began = time.Now()
	answer, died, err := talk.call(ctx, r, changes)
	if died {
		return began, &diedError{err}
	}
	if err != nil || result == nil {
		return began, err
	}
	if err := decode(answer, result); err != nil {
		return began, fmt.Errorf("%s: read the answer of the guest: %w", name, err)
	}
	return began, nil
}

// Machine implements guest.Guest, as do the following.
func (g *Guest) Machine(ctx context.Context) (m guest.Machine, err error) {
	err = g.call(ctx, callMachine, nil, &m)
	return m, err
}

// Discover implements guest.Guest.
func (g *Guest) Discover(ctx context.Context) (found []guest.Instance, err error) {
	err = g.call(ctx, callDiscover, nil, &found)
	return found, err
}

// Check implements guest.Guest.
func (g *Guest) Check(ctx context.Context, r guest.CheckRequest) (checks []guest.Check, err error) {
	err = g.call(ctx, callCheck, r, &checks)
	return checks, err
}

// Apply implements guest.Guest. The runner that is deployed is the one of Options; Deployment.Runner is not used.
func (g *Guest) Apply(ctx context.Context, d guest.Deployment) (*guest.State, error) {
	d.Runner = nil // the program that runs there
	s := new(guest.State)
	if err := g.change(ctx, "apply job "+d.Job.Name, callApply, d, s); err != nil {
		return nil, err
	}
	return s, nil
}

// State implements guest.Guest.
func (g *Guest) State(ctx context.Context, name string) (*guest.State, error) {
	s := new(guest.State)
	if err := g.call(ctx, callState, named{name}, s); err != nil {
		return nil, err
	}
	return s, nil
}

// SetWALRetention implements guest.Guest.
func (g *Guest) SetWALRetention(ctx context.Context, name string, r *job.WALRetention) error {
	return g.change(ctx, "set the WAL retention of job "+name, callSetWALRetention, retentionParams{name, r}, nil)
}

// Remove implements guest.Guest.
func (g *Guest) Remove(ctx context.Context, name string) error {
	return g.change(ctx, "remove job "+name, callRemove, named{name}, nil)
}
