// Package remote is a guest at the other end of an SSH connection. The same code that serves a local guest runs there: the
// runner's own binary, started as `pgark guest`, answers requests on its standard input (Serve), and Guest here asks them.
//
// # Getting the binary there
//
// A guest that has the very binary deployed (by content hash) runs that one. To any other it is sent first, compressed,
// through the shell's gzip: for root to <lib>/incoming/pgark by install(1), for anybody else to a directory of their own on
// a file system that is not mounted noexec. Once it runs it removes its own file: a probe leaves nothing behind, whatever
// happens to the connection. Apply installs the program that runs, so the binary travels once.
//
// # The conversation
//
// One JSON document a line, both ways. The first line of the server says who it is and is checked; then requests, each with
// a number, are answered in any order. When the server's input ends, or is silent for too long, it cancels what runs and
// ends: a lost connection stops the remote step.
package remote

import (
	"context"
	"io"

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
}

// Guest is a guest.Guest over a Link. It connects on first use; a conversation that has had nothing to do for a while is
// ended, and begun again when it is needed. Changing calls run one at a time. Safe for concurrent use.
type Guest struct {
	options Options
}

var _ guest.Guest = (*Guest)(nil)

// New prepares the guest. It asks nothing yet.
func New(o Options) *Guest { panic("unimplemented") }

// RunnerSHA256 is the digest of the runner for this guest's architecture. It connects if it has to.
func (g *Guest) RunnerSHA256(ctx context.Context) (string, error) { panic("unimplemented") }

// HostKey is the key that the guest's SSH server showed; "" before the first call.
func (g *Guest) HostKey() string { panic("unimplemented") }

// Close ends the conversation and the connection.
func (g *Guest) Close() error { panic("unimplemented") }

// Machine implements guest.Guest, as do the following.
func (g *Guest) Machine(ctx context.Context) (guest.Machine, error) { panic("unimplemented") }

// Discover implements guest.Guest.
func (g *Guest) Discover(ctx context.Context) ([]guest.Instance, error) { panic("unimplemented") }

// Check implements guest.Guest.
func (g *Guest) Check(ctx context.Context, r guest.CheckRequest) ([]guest.Check, error) {
	panic("unimplemented")
}

// Apply implements guest.Guest. The runner that is deployed is the one of Options; Deployment.Runner is not used.
func (g *Guest) Apply(ctx context.Context, d guest.Deployment) (*guest.State, error) {
	panic("unimplemented")
}

// State implements guest.Guest.
func (g *Guest) State(ctx context.Context, name string) (*guest.State, error) { panic("unimplemented") }

// SetWALRetention implements guest.Guest.
func (g *Guest) SetWALRetention(ctx context.Context, name string, r *job.WALRetention) error {
	panic("unimplemented")
}

// Remove implements guest.Guest.
func (g *Guest) Remove(ctx context.Context, name string) error { panic("unimplemented") }

// Serve answers requests from in on out with g until in ends. It is what `pgark guest` runs.
func Serve(ctx context.Context, g guest.Guest, in io.Reader, out io.Writer) error {
	panic("unimplemented")
}
