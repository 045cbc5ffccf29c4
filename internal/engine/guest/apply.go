//go:build linux

package guest

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/pgark/terraform-provider-pgark/internal/engine/job"
	"github.com/pgark/terraform-provider-pgark/internal/engine/objectstore"
	"github.com/pgark/terraform-provider-pgark/internal/engine/repository"
)

// rollbackTimeout bounds putting everything back after a failure: that goes on when the caller's time is over.
const rollbackTimeout = 2 * time.Minute

// root is the account that owns what no instance's owner needs to own: whoever deploys.
func root() account { return account{uid: os.Geteuid(), gid: os.Getegid()} }

// application is one run of Apply.
type application struct {
	g     *local
	d     Deployment
	job   *job.Job
	exam  *examination
	owner map[string]account // by instance
	repo  *repository.Repository

	changed change
	done    []string
}

// Apply implements Guest. It begins with the prerequisite checks: while one fails, nothing is changed.
func (g *local) Apply(ctx context.Context, d Deployment) (*State, error) {
	j := *d.Job
	j.ApplyDefaults()
	if err := j.Validate(); err != nil {
		return nil, err
	}
	if j.WAL.Transport == "log_shipping_servers" || len(j.WAL.LogShippingServers) > 0 {
		return nil, fmt.Errorf("job %s: log shipping servers are not in this build; wal.transport \"automatic\" and \"direct\" are", j.Name)
	}
	if len(d.Runner) == 0 {
		return nil, fmt.Errorf("job %s: no runner was given to deploy", j.Name)
	}
	exam, err := g.examine(ctx, CheckRequest{Job: &j, Credentials: d.Credentials, Settings: d.Settings})
	if err != nil {
		return nil, fmt.Errorf("job %s: check the prerequisites: %w", j.Name, err)
	}
	if failed := exam.failed(); len(failed) > 0 {
		var owned *repository.OwnedError
		if len(failed) == 1 && errors.As(errors.Join(exam.causes...), &owned) {
			return nil, owned
		}
		return nil, &PrerequisiteError{Job: j.Name, Checks: failed, Causes: exam.causes}
	}

	unlock, err := g.lock(ctx)
	if err != nil {
		return nil, fmt.Errorf("job %s: %w", j.Name, err)
	}
	defer unlock()
	_, err = g.State(ctx, j.Name)
	fresh := errors.Is(err, ErrNoJob)
	if err != nil && !fresh {
		return nil, err
	}

	a := &application{g: g, d: d, job: &j, exam: exam, owner: map[string]account{}}
	step, err := a.run(ctx)
	if err != nil {
		failure := &ApplyError{Job: j.Name, Step: step, Done: a.done, Err: err}
		if fresh {
			back, cancel := context.WithTimeout(context.WithoutCancel(ctx), rollbackTimeout)
			defer cancel()
			if err := g.remove(back, j.Name); err != nil {
				failure.Err = errors.Join(failure.Err, fmt.Errorf("and putting everything back: %w", err))
			} else {
				failure.RolledBack = true
			}
		}
		var owned *repository.OwnedError
		if errors.As(err, &owned) && failure.RolledBack {
			return nil, owned // the name was taken between check and claim
		}
		return nil, failure
	}
	return g.State(ctx, j.Name)
}

// run takes the steps in an order in which each can fail without harm: PostgreSQL is told of the runner only when the
// runner answers. It returns the step that failed.
func (a *application) run(ctx context.Context) (step string, err error) {
	steps := []struct {
		name string
		do   func(context.Context) error
	}{
		{"resolve the instances", a.resolve},
		{"claim the job's name in the repository", a.claim},
		{"install the runner", a.installBinary},
		{"write the job's files", a.writeDocuments},
	}
	for _, s := range steps {
		if err := s.do(ctx); err != nil {
			return s.name, err
		}
		if s.name != steps[0].name {
			a.done = append(a.done, s.name)
		}
	}
	for _, i := range a.job.Protected {
		step = "start the runner of " + i.Name
		if err := a.g.ensureRunner(ctx, a.job, i, a.owner[i.Name], a.changed); err != nil {
			return step, err
		}
		a.done = append(a.done, step)
	}
	if a.d.Settings.Manage {
		for _, i := range a.job.Protected {
			step = "configure " + i.Name
			if err := a.configure(ctx, i); err != nil {
				return step, err
			}
			a.done = append(a.done, step)
		}
	}
	for _, i := range a.job.Protected {
		step = "prove that WAL of " + i.Name + " reaches the repository"
		if err := a.prove(ctx, i); err != nil {
			return step, err
		}
	}
	a.removeOldBinaries()
	return "", nil
}

// resolve settles what is protected, and lets go of what was and is not any more.
func (a *application) resolve(ctx context.Context) error {
	a.job.Protected = nil
	var first account
	for _, c := range a.exam.clusters {
		owner, err := lookupAccount(c.Owner)
		if err != nil {
			return err
		}
		if len(a.job.Protected) == 0 {
			first = owner
		}
		if owner.uid != first.uid && !a.g.withSystemd() {
			return fmt.Errorf("found instances of %s and of %s in one job; without systemd, which hands the credentials over, all instances of a job belong to one user: make a job for each", first, owner)
		}
		if c.Port == 0 || c.SocketDirectory == "" || c.SystemID == 0 {
			return fmt.Errorf("instance %s in %s: %s", c.Name, c.DataDirectory, c.problem)
		}
		a.owner[c.Name] = owner
		a.job.Protected = append(a.job.Protected, c.Instance.Instance)
	}
	previous, err := job.Load(a.g.layout, a.job.Name)
	if err != nil {
		previous = nil // it is written anew
	}
	if previous != nil && a.job.WALRetention == nil {
		a.job.WALRetention = previous.WALRetention // another resource's
	}
	if err := a.job.Validate(); err != nil {
		return err
	}
	there, err := a.g.instancesOf(a.job.Name, previous)
	if err != nil {
		return err
	}
	for _, name := range there {
		if _, ok := a.job.Instance(name); ok {
			continue
		}
		if err := a.g.putBack(ctx, a.job.Name, name, knownInstance(previous, name)); err != nil {
			return err
		}
		if err := a.g.release(ctx, a.job.Name, name); err != nil {
			return fmt.Errorf("let go of %s: %w", name, err)
		}
	}
	return nil
}

// claim makes this machine the owner of the job's name.
func (a *application) claim(ctx context.Context) error {
	id, err := a.g.ensureMachineID()
	if err != nil {
		return err
	}
	store, err := objectstore.Open(ctx, a.job.Location(a.d.Credentials), objectstore.Options{})
	if err != nil {
		return err
	}
	if a.repo, err = repository.Open(ctx, store); err != nil {
		return err
	}
	host := a.job.Host
	if host == "" {
		if host, err = os.Hostname(); err != nil {
			return fmt.Errorf("host name: %w", err)
		}
	}
	if _, err := a.repo.ClaimJob(ctx, a.job.Name, repository.Owner{MachineID: id, Host: host, ClaimedAt: time.Now().UTC()}, ""); err != nil {
		return err
	}
	return a.handOver()
}

// handOver gives the owner of the instances what root has made in a file:// repository: the runner is not root, and has
// to write there. What belongs to anybody else is left alone.
func (a *application) handOver() error {
	dir := directoryOf(a.job.Repository.URL)
	if dir == "" || os.Geteuid() != 0 || len(a.job.Protected) == 0 {
		return nil
	}
	owner := a.owner[a.job.Protected[0].Name]
	give := func(path string) error {
		info, err := os.Lstat(path)
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		if err != nil || status(info).Uid != 0 || info.Mode()&fs.ModeSymlink != 0 {
			return err
		}
		return os.Lchown(path, owner.uid, owner.gid)
	}
	paths := []string{dir, filepath.Join(dir, "repository.json"), filepath.Join(dir, a.job.Name), filepath.Join(dir, a.job.Name, "owner")}
	claims, _ := filepath.Glob(filepath.Join(dir, a.job.Name, "owner", "*")) // the pattern is well formed
	for _, path := range append(paths, claims...) {
		if err := give(path); err != nil {
			return err
		}
	}
	return nil
}

// installBinary puts the runner in a directory named by its content, then points the link at it: a runner or an
// archive_command that runs meanwhile has the one or the other, whole.
func (a *application) installBinary(context.Context) error {
	sum := sha256.Sum256(a.d.Runner)
	digest := hex.EncodeToString(sum[:])
	dir := a.g.layout.BinaryDirectory(digest)
	if err := makeDirectory(dir, 0o755, root()); err != nil {
		return err
	}
	binary := filepath.Join(dir, "pgark")
	if _, err := writeFile(binary, a.d.Runner, 0o755, root()); err != nil {
		return err
	}
	// A new directory is durable once its parent is.
	if err := syncDirectory(a.g.layout.LibDirectory()); err != nil {
		return err
	}
	link := a.g.layout.BinaryLink()
	if err := makeParents(filepath.Dir(link)); err != nil {
		return err
	}
	return switchLink(link, binary)
}

// removeOldBinaries removes binaries that the link does not lead to and that nobody runs: the runners of other jobs may
// still be older ones. What cannot be removed is only a few megabytes.
func (a *application) removeOldBinaries() {
	current, err := filepath.EvalSymlinks(a.g.layout.BinaryLink())
	if err != nil {
		return
	}
	used := map[string]bool{current: true}
	exes, _ := filepath.Glob("/proc/[0-9]*/exe") // the pattern is well formed
	for _, exe := range exes {
		if path, err := os.Readlink(exe); err == nil {
			used[path] = true
		}
	}
	entries, err := os.ReadDir(a.g.layout.LibDirectory())
	if err != nil {
		return
	}
	for _, e := range entries {
		dir := filepath.Join(a.g.layout.LibDirectory(), e.Name())
		if resolved, err := filepath.EvalSymlinks(filepath.Join(dir, "pgark")); err == nil && !used[resolved] {
			_ = os.RemoveAll(dir) // see above
		}
	}
}

// writeDocuments writes the job file and the credentials, and makes the runner's directories.
func (a *application) writeDocuments(context.Context) error {
	l := a.g.layout
	if err := makeDirectory(l.JobsDirectory(), 0o755, root()); err != nil {
		return err
	}
	changed, err := writeFile(l.JobFile(a.job.Name), a.job.Encode(), 0o644, root())
	if err != nil {
		return fmt.Errorf("job file: %w", err)
	}
	if changed {
		a.changed = changedDocuments
	}

	// The owner of the instances reads them, as the runner and as whoever runs pgark by hand. Where there are several
	// owners, systemd hands them over, which reads as root.
	owner, several := account{}, false
	for i, p := range a.job.Protected {
		if i > 0 && a.owner[p.Name].uid != owner.uid {
			several = true
		}
		owner = a.owner[p.Name]
	}
	if several {
		owner = root()
	}
	file := l.CredentialsFile(a.job.Name)
	if a.d.Credentials != nil {
		changed, err := writeFile(file, job.EncodeCredentials(*a.d.Credentials), 0o600, owner)
		if err != nil {
			return fmt.Errorf("credentials: %w", err)
		}
		if changed {
			a.changed = changedCredentials
		}
	} else if err := os.Remove(file); err == nil {
		a.changed = changedCredentials
	} else if !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("credentials: %w", err)
	}

	for _, i := range a.job.Protected {
		owner := a.owner[i.Name]
		dirs := []struct {
			path string
			mode fs.FileMode
		}{{l.StateDirectory(a.job.Name, i.Name), 0o700}, {l.RunDirectory(a.job.Name), 0o755}}
		if !a.g.withSystemd() {
			dirs = append(dirs, struct {
				path string
				mode fs.FileMode
			}{l.LogDirectory(a.job.Name), 0o755})
		}
		for _, d := range dirs {
			if err := makeDirectory(d.path, d.mode, owner); err != nil {
				return err
			}
		}
		// sun_path: a socket with a longer path cannot be bound.
		if socket := l.Socket(a.job.Name, i.Name); len(socket) > 107 {
			return fmt.Errorf("socket %s: its path has %d bytes, at most 107 are possible; give the job a shorter name", socket, len(socket))
		}
	}
	return nil
}

// configure makes PostgreSQL hand its WAL to the runner.
func (a *application) configure(ctx context.Context, i job.Instance) error {
	wanted := map[string]string{"archive_command": a.g.layout.ArchiveCommand(a.job.Name, i.Name)}
	restart := a.exam.servers[i.Name].needsArchiveMode()
	if restart {
		wanted["archive_mode"] = archiveModeOn // the checks have made sure that we may
	}
	if err := a.g.takeSettings(ctx, a.job.Name, i, a.owner[i.Name], wanted); err != nil {
		return err
	}
	if !restart {
		return nil
	}
	for _, c := range a.exam.clusters {
		if c.Name == i.Name {
			return a.g.restart(ctx, c)
		}
	}
	return nil
}

// tellFiles names the lines of configuration files that PostgreSQL could not use.
func (s *inspected) tellFiles() string {
	var out []string
	for _, p := range s.fileProblems {
		out = append(out, fmt.Sprintf("%s line %d: %s", p.File, p.Line, p.Problem))
	}
	return strings.Join(out, "; ")
}
