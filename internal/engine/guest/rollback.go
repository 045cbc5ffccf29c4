//go:build linux

package guest

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"

	"github.com/pgark/terraform-provider-pgark/internal/engine/daemon/control"
	"github.com/pgark/terraform-provider-pgark/internal/engine/job"
	"github.com/pgark/terraform-provider-pgark/internal/engine/postgres"
)

// snapshot is a job as it is deployed before Apply changes it.
type snapshot struct {
	g         *local
	name      string
	link      string // what BinaryLink leads to; "": it is missing
	job       *job.Job
	instances []string
	files     []savedFile
	runners   map[string]int    // by instance: the process that answers
	commands  map[string]string // by instance: archive_command in postgresql.auto.conf, where it is ours
	waiting   map[string]bool   // by instance: commits wait for the runner because we made them
}

// savedFile is a file as it was.
type savedFile struct {
	path    string
	there   bool
	content []byte
	mode    fs.FileMode
	owner   account
}

// snapshot reads what restore puts back. previous is nil where there is no job file, or it cannot be read.
func (g *local) snapshot(ctx context.Context, name string, previous *job.Job) (*snapshot, error) {
	s := &snapshot{g: g, name: name, job: previous, runners: map[string]int{}, commands: map[string]string{}, waiting: map[string]bool{}}
	var err error
	if s.link, err = os.Readlink(g.layout.BinaryLink()); err != nil {
		s.link = "" // none, or a file of somebody else's, which is not touched
	}
	if s.instances, err = g.instancesOf(name, previous); err != nil {
		return nil, err
	}
	paths := []string{g.layout.JobFile(name), g.layout.CredentialsFile(name), g.deployedFile(name)}
	for _, instance := range s.instances {
		if g.withSystemd() {
			paths = append(paths, g.layout.UnitFile(name, instance))
		}
		if status, err := g.status(ctx, name, instance); err == nil {
			s.runners[instance] = status.PID
		}
		i := knownInstance(previous, instance)
		if i.DataDirectory == "" {
			continue
		}
		if s.waiting[instance], err = g.holdsSynchronous(name, i); err != nil {
			return nil, err
		}
		if auto, err := readAutoConf(i.DataDirectory); err == nil {
			if command, _ := confSetting(auto, archiveCommand); g.jobOfCommand(command) == name {
				s.commands[instance] = command
			}
		}
	}
	for _, path := range paths {
		f := savedFile{path: path}
		info, err := os.Lstat(path)
		switch {
		case errors.Is(err, fs.ErrNotExist):
		case err != nil:
			return nil, err
		case !info.Mode().IsRegular():
			continue // a masked unit: nothing to go back to
		default:
			if f.content, err = os.ReadFile(path); err != nil {
				return nil, err
			}
			st := status(info)
			f.there, f.mode, f.owner = true, info.Mode().Perm(), account{uid: int(st.Uid), gid: int(st.Gid)}
		}
		s.files = append(s.files, f)
	}
	return s, nil
}

// restoreLink makes BinaryLink lead where it did: the runners and archive_commands of other jobs go by it, too.
func (s *snapshot) restoreLink() error {
	if s.link == "" {
		return nil
	}
	if _, err := os.Stat(s.link); err != nil {
		return nil //nolint:nilerr // it led nowhere, which is no place to go back to
	}
	return switchLink(s.g.layout.BinaryLink(), s.link)
}

// restore puts the job back as it was, and has the runners that answered then run again as they did. Runners that were
// not there, or did not answer, are no state to go back to: false without an error then, and what was done stays, but for
// the link.
func (s *snapshot) restore(ctx context.Context) (restored bool, err error) {
	if err := s.restoreLink(); err != nil {
		return false, err
	}
	if len(s.runners) == 0 || s.job == nil {
		return false, nil
	}
	reload := false
	for _, f := range s.files {
		changed, err := f.restore()
		if err != nil {
			return false, err
		}
		reload = reload || changed
	}
	if reload && s.g.withSystemd() {
		if err := systemctl(ctx, "daemon-reload"); err != nil {
			return false, err
		}
	}
	// Instances that came with this Apply go with it.
	there, err := s.g.instancesOf(s.name, s.job)
	if err != nil {
		return false, err
	}
	for _, instance := range there {
		if slices.Contains(s.instances, instance) {
			continue
		}
		// They have no image yet: their WAL alone restores nothing.
		if err := s.g.letGo(ctx, s.name, instance, nil, discardSpool); err != nil {
			return false, err
		}
	}
	for instance, pid := range s.runners {
		i, ok := s.job.Instance(instance)
		if !ok {
			continue
		}
		if err := s.restoreRunner(ctx, i, pid); err != nil {
			return false, err
		}
		if err := s.restoreCommand(ctx, i); err != nil {
			return false, err
		}
		if err := s.restoreWaiting(ctx, i); err != nil {
			return false, err
		}
	}
	return true, nil
}

func (f savedFile) restore() (changed bool, err error) {
	if f.there {
		return writeFile(f.path, f.content, f.mode, f.owner)
	}
	err = os.Remove(f.path)
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	return err == nil, err
}

// restoreRunner has an instance's runner run as it did: the same process where Apply had not come to start another.
func (s *snapshot) restoreRunner(ctx context.Context, i job.Instance, pid int) error {
	socket := s.g.layout.Socket(s.name, i.Name)
	if now, err := s.g.status(ctx, s.name, i.Name); err == nil && now.PID == pid {
		return control.Reload(ctx, socket)
	}
	owner, err := lookupAccount(i.Owner)
	if err != nil {
		return err
	}
	r := s.g.runner(s.name, i.Name, owner)
	if err := r.start(ctx); err != nil {
		return &RunnerError{Instance: i.Name, Log: r.log(ctx), Err: err}
	}
	return s.g.awaitRunner(ctx, r, s.name, i.Name)
}

// restoreCommand makes archive_command what it was, if that was ours: alone, or with another one behind it.
func (s *snapshot) restoreCommand(ctx context.Context, i job.Instance) error {
	command, ok := s.commands[i.Name]
	if !ok {
		return nil
	}
	auto, err := readAutoConf(i.DataDirectory)
	if err != nil {
		return err
	}
	if there, _ := confSetting(auto, archiveCommand); there == command {
		return nil
	}
	r, err := s.g.readRemembered(s.name, i.Name)
	if err != nil || r == nil {
		return err
	}
	owner, err := lookupAccount(i.Owner)
	if err != nil {
		return err
	}
	b := r.Settings[archiveCommand]
	b.Ours = command
	r.Settings[archiveCommand] = b
	if err := s.g.remember(s.name, i.Name, r, owner); err != nil {
		return err
	}
	conn, err := connect(ctx, i)
	if err != nil {
		return err
	}
	defer closeNow(conn)
	if err := postgres.AlterSystem(ctx, conn, archiveCommand, command); err != nil {
		return err
	}
	return postgres.Reload(ctx, conn)
}

// restoreWaiting has commits wait for the runner, or not, as they did.
func (s *snapshot) restoreWaiting(ctx context.Context, i job.Instance) error {
	owner, err := lookupAccount(i.Owner)
	if err != nil {
		return err
	}
	if !s.waiting[i.Name] {
		return s.g.releaseSynchronous(ctx, s.name, i, owner)
	}
	if err := s.g.awaitStream(ctx, s.name, i.Name); err != nil {
		return err
	}
	return s.g.takeSynchronous(ctx, s.name, i, owner)
}

// undo takes back what a failed Apply has done, in time of its own, and says in the error how that went.
func (a *application) undo(ctx context.Context, fresh bool, failure *ApplyError) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), rollbackTimeout)
	defer cancel()
	if fresh {
		// The link first: it goes with the last job, or has to lead other jobs where it did.
		err := errors.Join(a.before.restoreLink(), a.g.remove(ctx, a.job.Name, discardSpool))
		if err != nil {
			failure.Err = errors.Join(failure.Err, fmt.Errorf("and putting everything back: %w", err))
			return
		}
		failure.RolledBack = true
		a.g.removeOldBinaries()
		return
	}
	restored, err := a.before.restore(ctx)
	if err != nil {
		failure.Err = errors.Join(failure.Err, fmt.Errorf("and putting the previous runner back: %w", err))
		return
	}
	failure.Restored = restored
	a.g.removeOldBinaries()
}
