//go:build linux

package guest

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/pgark/terraform-provider-pgark/internal/engine/daemon/control"
	"github.com/pgark/terraform-provider-pgark/internal/engine/job"
	"github.com/pgark/terraform-provider-pgark/internal/engine/postgres"
)

const (
	// streamPatience is how long a runner may take to stream WAL after it answers.
	streamPatience = 15 * time.Second
	// slotPatience is how long a server may take to notice that a stream on a slot has ended.
	slotPatience = 15 * time.Second
)

// awaitStream waits until an instance's runner streams WAL; *StreamError if it does not.
func (g *local) awaitStream(ctx context.Context, name, instance string) error {
	began := time.Now()
	for wait := 20 * time.Millisecond; ; wait = min(2*wait, 500*time.Millisecond) {
		s, err := g.status(ctx, name, instance)
		if isStreaming(s, err) {
			return nil
		}
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		if time.Since(began) > streamPatience {
			return &StreamError{
				Instance: instance, Waited: streamPatience.String(), Err: whyNotStreaming(s, err),
				Log: g.runner(name, instance, account{}).log(context.WithoutCancel(ctx)),
			}
		}
		select {
		case <-ctx.Done():
		case <-time.After(wait):
		}
	}
}

// isStreaming tells whether a runner, asked for its status, streams WAL.
func isStreaming(s *control.Status, err error) bool {
	return err == nil && s.WAL.Stream != nil && s.WAL.Stream.Connected
}

// whyNotStreaming is what a runner, asked for its status, says of its stream.
func whyNotStreaming(s *control.Status, err error) error {
	switch {
	case err != nil:
		return err
	case s.WAL.Stream != nil && s.WAL.Stream.LastError != "":
		return errors.New(s.WAL.Stream.LastError)
	case s.Problem != "":
		return errors.New(s.Problem)
	case s.WAL.Reason != "":
		return errors.New(s.WAL.Reason)
	}
	return errors.New("it is not connected")
}

// takeSynchronous has commits wait for the runner, which streams, where they wait for nobody. Whom they wait for otherwise
// was judged by the checks, and is not ours to change.
func (g *local) takeSynchronous(ctx context.Context, name string, i job.Instance, owner account) error {
	conn, err := connect(ctx, i)
	if err != nil {
		return err
	}
	defer closeNow(conn)
	var recovers bool
	var there string
	err = conn.QueryRow(ctx, "select pg_catalog.pg_is_in_recovery(), setting from pg_catalog.pg_settings where name = $1", synchronousNames).Scan(&recovers, &there)
	if err != nil {
		return fmt.Errorf("read %s: %w", synchronousNames, err)
	}
	if recovers || there != "" {
		return nil
	}
	r, err := g.recall(name, i)
	if err != nil {
		return err
	}
	if r == nil {
		return fmt.Errorf("%s of %s: nothing is remembered of its settings", synchronousNames, i.Name)
	}
	auto, err := readAutoConf(i.DataDirectory)
	if err != nil {
		return err
	}
	b := r.Settings[synchronousNames]
	if b.Ours == "" {
		b.Value, b.Set = confSetting(auto, synchronousNames)
	}
	b.Ours = postgres.ApplicationName
	r.Settings[synchronousNames] = b
	if err := g.remember(name, i.Name, r, owner); err != nil {
		return err
	}
	if err := postgres.AlterSystem(ctx, conn, synchronousNames, b.Ours); err != nil {
		return err
	}
	if err := postgres.Reload(ctx, conn); err != nil {
		return err
	}
	settings, err := postgres.ReadSettings(ctx, conn, synchronousNames)
	if err != nil {
		return err
	}
	if found := settings[synchronousNames].Value; found != b.Ours {
		return fmt.Errorf("%s of %s is %q after the reload, expected %q: something comes before %s; look for it in pg_settings.sourcefile and pg_file_settings",
			synchronousNames, i.Name, found, b.Ours, autoConf(i.DataDirectory))
	}
	return nil
}

// holdsSynchronous tells whether it was us who let commits of an instance wait.
func (g *local) holdsSynchronous(name string, i job.Instance) (bool, error) {
	r, err := g.recall(name, i)
	return err == nil && r != nil && r.Settings[synchronousNames].Ours != "", err
}

// releaseSynchronous lets commits wait for the runner no more, as far as it was us who let them: to be called before it
// stops. It needs a server that runs.
func (g *local) releaseSynchronous(ctx context.Context, name string, i job.Instance, owner account) error {
	r, err := g.recall(name, i)
	if err != nil || r == nil || r.Settings[synchronousNames].Ours == "" {
		return err
	}
	auto, err := readAutoConf(i.DataDirectory)
	if err != nil {
		return err
	}
	b := r.Settings[synchronousNames]
	if there, set := confSetting(auto, synchronousNames); set && there == b.Ours {
		var value *string
		if b.Set {
			value = &b.Value
		}
		if _, err := alterBack(ctx, i, map[string]*string{synchronousNames: value}, r); err != nil {
			return err
		}
	}
	delete(r.Settings, synchronousNames)
	return g.remember(name, i.Name, r, owner)
}

// dropSlot drops a job's replication slot in an instance, if there is one, once nobody streams from it any more.
func dropSlot(ctx context.Context, i job.Instance, slot string) error {
	conn, err := connect(ctx, i)
	if err != nil {
		return err
	}
	defer closeNow(conn)
	began := time.Now()
	for wait := 20 * time.Millisecond; ; wait = min(2*wait, time.Second) {
		// In one statement: a slot that is gone by then is no error.
		var active bool
		err := conn.QueryRow(ctx, "select active from pg_catalog.pg_replication_slots where slot_name = $1 and slot_type = 'physical'", slot).Scan(&active)
		if errors.Is(err, pgx.ErrNoRows) {
			return nil
		}
		if err == nil && !active {
			_, err = conn.Exec(ctx, "select pg_catalog.pg_drop_replication_slot($1)", slot)
			if err == nil {
				return nil
			}
		}
		if err == nil {
			err = errors.New("somebody streams from it")
		}
		if ctx.Err() != nil || postgres.IsDenied(err) || time.Since(began) > slotPatience {
			return fmt.Errorf("drop the replication slot %s of %s: %w", slot, i.Name, err)
		}
		select {
		case <-ctx.Done():
		case <-time.After(wait):
		}
	}
}

// leaveSlot drops a job's replication slot in a cluster that may be stopped, or gone. known is what the job file says of the
// instance.
func (g *local) leaveSlot(ctx context.Context, name, instance string, known job.Instance) error {
	slot, i := job.SlotName(name), known
	if i.DataDirectory == "" {
		r, err := g.readRemembered(name, instance)
		if err != nil || r == nil {
			return nil //nolint:nilerr // nothing tells where it is; putBack has said what is to be said of the file
		}
		i = r.Instance
	}
	// Where there is none, no server need be asked.
	directory := slotDirectory(i.DataDirectory, slot)
	if _, err := os.Stat(directory); err != nil {
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		return &SettingsError{Instance: instance, Err: err}
	}
	running, postmaster, err := postgres.IsRunning(i.DataDirectory)
	if err != nil {
		return &SettingsError{Instance: instance, Err: err}
	}
	if !running {
		// As the server itself does it: what ends in .tmp is removed by the next start, should we not come to it
		// (slot.c, ReplicationSlotDropPtr and StartupReplicationSlots).
		err := os.Rename(directory, directory+".tmp")
		if err == nil {
			err = syncDirectory(filepath.Dir(directory))
		}
		if err == nil {
			err = os.RemoveAll(directory + ".tmp")
		}
		if err != nil {
			return &SettingsError{Instance: instance, Err: err}
		}
		return nil
	}
	i.Port, i.SocketDirectory, i.SystemID = postmaster.Port, postmaster.SocketDirectory, 0
	if err := dropSlot(ctx, i, slot); err != nil {
		return &SettingsError{Instance: instance, Err: err, Remedy: psql(i, dropSlotStatement(slot))}
	}
	return nil
}
