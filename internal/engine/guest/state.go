//go:build linux

package guest

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/pgark/terraform-provider-pgark/internal/engine/job"
	"github.com/pgark/terraform-provider-pgark/internal/engine/postgres"
)

// stateSettings are the settings that InstanceState shows.
var stateSettings = []string{archiveMode, archiveCommand, archiveLibrary, walLevel, "full_page_writes", synchronousNames}

// State implements Guest.
func (g *local) State(ctx context.Context, name string) (*State, error) {
	if err := job.ValidName(name); err != nil {
		return nil, fmt.Errorf("job name %w", err)
	}
	s := &State{}
	var err error
	if s.Machine, err = g.Machine(ctx); err != nil {
		return nil, err
	}
	if s.Job, err = job.Load(g.layout, name); err != nil {
		s.JobProblem = err.Error()
		if errors.Is(err, fs.ErrPermission) {
			return nil, err // not seen is not gone
		}
	}
	absent := errors.Is(err, fs.ErrNotExist)
	if s.HasCredentials, err = exists(g.layout.CredentialsFile(name)); err != nil {
		return nil, err
	}
	s.AccessKeyID, s.CredentialsChanged = g.credentialsState(name)
	instances, err := g.instancesOf(name, s.Job)
	if err != nil {
		return nil, fmt.Errorf("job %s: %w", name, err)
	}
	if absent && !s.HasCredentials && len(instances) == 0 {
		return nil, ErrNoJob
	}
	if s.RunnerSHA256, err = g.installed(); err != nil {
		return nil, fmt.Errorf("job %s: runner binary: %w", name, err)
	}
	for _, instance := range instances {
		i := knownInstance(s.Job, instance)
		if i.DataDirectory == "" {
			if r, err := g.readRemembered(name, instance); err == nil && r != nil {
				i = r.Instance
			}
		}
		state, err := g.instanceState(ctx, name, instance, i)
		if err != nil {
			return nil, fmt.Errorf("job %s: instance %s: %w", name, instance, err)
		}
		if s.Job != nil {
			state.Waiting = s.Job.WantsSynchronous()
			if slot := job.SlotName(name); !s.Job.WantsSlot() && hasSlot(i.DataDirectory, slot) {
				state.LeftSlot = slot
			}
		}
		s.Instances = append(s.Instances, state)
	}
	return s, nil
}

func exists(path string) (bool, error) {
	_, err := os.Lstat(path)
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	return err == nil, err
}

// installed is the digest of the binary that the link leads to; "" if there is none.
func (g *local) installed() (string, error) {
	f, err := os.Open(g.layout.BinaryLink())
	if errors.Is(err, fs.ErrNotExist) {
		return "", nil
	}
	if err != nil {
		return "", err
	}
	defer f.Close()
	h := sha256.New()
	if _, err := io.Copy(h, f); err != nil {
		return "", err
	}
	return hex.EncodeToString(h.Sum(nil)), nil
}

// instanceState reads one instance as it is. A server that cannot be asked is a Problem of the instance, not an error:
// what its files say stands in for its answers.
func (g *local) instanceState(ctx context.Context, name, instance string, i job.Instance) (InstanceState, error) {
	s := InstanceState{Name: instance, Settings: map[string]string{}, Wanted: g.deployedCommand(name, instance)}
	var err error
	if s.Runner, s.Detail, err = g.runnerState(ctx, name, instance); err != nil {
		return s, err
	}
	if i.DataDirectory == "" {
		s.Problem = "where its data directory is, is not known"
		return s, nil
	}
	control, err := postgres.ReadControl(i.DataDirectory)
	if err != nil {
		s.Problem = err.Error()
		return s, nil //nolint:nilerr // see above
	}
	s.SystemID = control.SystemID

	running, postmaster, err := postgres.IsRunning(i.DataDirectory)
	if err == nil && running {
		// Port and socket may have changed since the job was applied, the cluster may have been initialised anew.
		i.Port, i.SocketDirectory, i.SystemID = postmaster.Port, postmaster.SocketDirectory, control.SystemID
		if s.Pending, err = g.readSettings(ctx, i, s.Settings); err == nil {
			return s, nil
		}
	}
	if ctx.Err() != nil {
		return s, context.Cause(ctx)
	}
	if err == nil {
		err = errNotRunning
	}
	s.Problem = err.Error() + "; settings as in the configuration files"
	for _, file := range []string{filepath.Join(i.DataDirectory, "postgresql.conf"), autoConf(i.DataDirectory)} {
		b, err := os.ReadFile(file)
		if err != nil {
			continue // Debian keeps the first elsewhere
		}
		lines := parseConf(string(b))
		for _, name := range stateSettings {
			if v, ok := confSetting(lines, name); ok {
				s.Settings[name] = v
			}
		}
	}
	return s, nil
}

// hasSlot tells whether a cluster has a replication slot, also of one that does not run: each has a directory (slot.c).
func hasSlot(dataDirectory, slot string) bool {
	info, err := os.Stat(slotDirectory(dataDirectory, slot))
	return err == nil && info.IsDir()
}

func slotDirectory(dataDirectory, slot string) string {
	return filepath.Join(dataDirectory, "pg_replslot", slot)
}

// readSettings reads the settings of a server that runs, and those that are pending.
func (g *local) readSettings(ctx context.Context, i job.Instance, into map[string]string) (pending map[string]string, err error) {
	conn, err := connect(ctx, i)
	if err != nil {
		return nil, err
	}
	defer closeNow(conn)
	settings, err := postgres.ReadSettings(ctx, conn, stateSettings...)
	if err != nil {
		return nil, err
	}
	command, err := readArchiveCommand(ctx, conn)
	if err != nil {
		return nil, err
	}
	for name, v := range settings {
		into[name] = v.Value
	}
	into[archiveCommand] = command
	return pendingSettings(ctx, conn, i.DataDirectory)
}
