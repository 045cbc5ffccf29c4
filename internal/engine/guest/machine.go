//go:build linux

package guest

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"os"

	"github.com/pgark/terraform-provider-pgark/internal/engine/job"
)

// Machine tells which machine this is. A machine that has no id yet has none until the first Apply.
func (g *local) Machine(context.Context) (Machine, error) {
	host, err := os.Hostname()
	if err != nil {
		return Machine{}, fmt.Errorf("host name: %w", err)
	}
	id, err := job.MachineID(g.layout)
	if err != nil && !errors.Is(err, job.ErrNoMachineID) {
		return Machine{}, err
	}
	return Machine{ID: id, Host: host}, nil
}

// ensureMachineID gives the machine a random id if it has none of its own.
func (g *local) ensureMachineID() (string, error) {
	id, err := job.MachineID(g.layout)
	if !errors.Is(err, job.ErrNoMachineID) {
		return id, err
	}
	var random [16]byte
	_, _ = rand.Read(random[:]) // never fails
	id = hex.EncodeToString(random[:])
	if err := makeDirectory(g.layout.StateRoot(), 0o755, account{}); err != nil {
		return "", fmt.Errorf("machine id: %w", err)
	}
	if _, err := writeFile(g.layout.GeneratedMachineIDFile(), []byte(id+"\n"), 0o644, account{}); err != nil {
		return "", fmt.Errorf("machine id: %w", err)
	}
	return id, nil
}
