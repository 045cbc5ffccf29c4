//go:build !linux

package guest

import (
	"context"
	"errors"
	"runtime"

	"github.com/pgark/terraform-provider-pgark/internal/engine/job"
	"github.com/pgark/terraform-provider-pgark/internal/engine/objectstore"
)

// errNotLinux answers for the machines of users who run Terraform elsewhere: theirs is no guest.
var errNotLinux = errors.New("this machine runs " + runtime.GOOS + ", expected Linux: it can be no guest")

type local struct{}

// Local is the machine that this process runs on. Only Linux can be a guest.
func Local(job.Layout) Guest { return local{} }

func (local) Machine(context.Context) (Machine, error)                         { return Machine{}, errNotLinux }
func (local) Discover(context.Context) ([]Instance, error)                     { return nil, errNotLinux }
func (local) Apply(context.Context, Deployment) (*State, error)                { return nil, errNotLinux }
func (local) State(context.Context, string) (*State, error)                    { return nil, errNotLinux }
func (local) Check(context.Context, CheckRequest) ([]Check, error)             { return nil, errNotLinux }
func (local) Remove(context.Context, string) error                             { return errNotLinux }
func (local) SetWALRetention(context.Context, string, *job.WALRetention) error { return errNotLinux }

// Prove needs the runner, which only runs on Linux.
func Prove(context.Context, job.Layout, *job.Job, *objectstore.Credentials) ([]Proof, error) {
	return nil, errNotLinux
}

// Boot has no runners to start where none can be.
func Boot(context.Context, job.Layout) error { return errNotLinux }
