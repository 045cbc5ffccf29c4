//go:build linux

package guest

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
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

	before   *snapshot
	deployed *deployed
	leaving  []string // instances that were protected and are not any more
	proven   bool     // what was deployed works: nothing is taken back any more
	changed  difference
	done     []string
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
	exam, err := g.examine(ctx, CheckRequest{Job: &j, Credentials: d.Credentials, Settings: d.Settings})
	if err != nil {
		return nil, fmt.Errorf("job %s: check the prerequisites: %w", j.Name, err)
	}
	if failed := exam.failed(d.WithoutStream); len(failed) > 0 {
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
	fresh, previous, err := g.previous(j.Name)
	if err != nil {
		return nil, err
	}

	a := &application{g: g, d: d, job: &j, exam: exam, owner: map[string]account{}, deployed: &deployed{Format: 1, Units: map[string]string{}}}
	if a.before, err = g.snapshot(ctx, j.Name, previous); err != nil {
		return nil, fmt.Errorf("job %s: read what is deployed: %w", j.Name, err)
	}
	step, err := a.run(ctx)
	if err != nil {
		failure := &ApplyError{Job: j.Name, Step: step, Done: a.done, Err: err}
		if !a.proven {
			a.undo(ctx, fresh, failure)
		}
		var owned *repository.OwnedError
		if errors.As(err, &owned) && failure.RolledBack {
			return nil, owned // the name was taken between check and claim
		}
		return nil, failure
	}
	return g.State(ctx, j.Name)
}

// previous reads the job file as it is deployed; nil if there is none, or it cannot be read. fresh: the guest holds nothing
// of the job.
func (g *local) previous(name string) (fresh bool, previous *job.Job, err error) {
	previous, err = job.Load(g.layout, name)
	if err == nil {
		return false, previous, nil
	}
	if errors.Is(err, fs.ErrPermission) {
		return false, nil, err // not seen is not gone
	}
	absent := errors.Is(err, fs.ErrNotExist)
	instances, err := g.instancesOf(name, nil)
	if err != nil {
		return false, nil, err
	}
	credentials, err := exists(g.layout.CredentialsFile(name))
	return absent && !credentials && len(instances) == 0, nil, err
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
	if !a.job.WantsSynchronous() {
		for _, i := range a.job.Protected {
			step = "let no commit of " + i.Name + " wait any more"
			if err := a.g.releaseSynchronous(ctx, a.job.Name, i, a.owner[i.Name]); err != nil {
				return step, err
			}
		}
	}
	for _, i := range a.job.Protected {
		step = "start the runner of " + i.Name
		if err := a.ensureRunner(ctx, i); err != nil {
			return step, err
		}
		a.done = append(a.done, step)
	}
	if err := a.g.writeDeployed(a.job.Name, a.deployed); err != nil {
		return "write the job's files", err
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
	if step, err := a.stream(ctx); err != nil {
		return step, err
	}
	a.proven = true
	a.g.removeOldBinaries()
	for _, name := range a.leaving {
		step = "let go of " + name
		if err := a.g.letGo(ctx, a.job.Name, name, a.before.job, keepSpool); err != nil {
			return step, err
		}
	}
	return "", nil
}

// stream makes sure that WAL is streamed, then has commits wait for it if they are to: not before, or they would wait for
// nobody. What is left of a slot that is not wanted any more would hold WAL back until the disk is full.
func (a *application) stream(ctx context.Context) (step string, err error) {
	for _, i := range a.job.Protected {
		if a.job.Enabled && a.job.WAL.Mode == job.WALContinuous {
			step = "stream the WAL of " + i.Name
			err := a.g.awaitStream(ctx, a.job.Name, i.Name)
			var none *StreamError
			if errors.As(err, &none) && a.d.WithoutStream {
				continue // nor may a commit wait for it
			}
			if err != nil {
				return step, err
			}
		}
		if a.job.WantsSynchronous() && a.d.Settings.Manage {
			step = "let commits of " + i.Name + " wait for the repository"
			if err := a.g.takeSynchronous(ctx, a.job.Name, i, a.owner[i.Name]); err != nil {
				return step, err
			}
		}
		if !a.job.WantsSlot() {
			step = "drop the replication slot of " + i.Name
			if err := a.g.leaveSlot(ctx, a.job.Name, i.Name, i); err != nil {
				return step, err
			}
		}
	}
	return "", nil
}

// resolve settles what is protected, and what was and is not any more.
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
		// They share the credentials file and the directory of the sockets.
		if owner.uid != first.uid {
			return fmt.Errorf("found instances of %s and of %s in one job; all instances of a job belong to one user: make a job for each", first, owner)
		}
		if c.Port == 0 || c.SocketDirectory == "" || c.SystemID == 0 {
			return fmt.Errorf("instance %s in %s: %s", c.Name, c.DataDirectory, c.problem)
		}
		a.owner[c.Name] = owner
		a.job.Protected = append(a.job.Protected, c.Instance.Instance)
	}
	if previous := a.before.job; previous != nil && a.job.WALRetention == nil {
		a.job.WALRetention = previous.WALRetention // another resource's
	}
	if err := a.job.Validate(); err != nil {
		return err
	}
	for _, name := range a.before.instances {
		if _, ok := a.job.Instance(name); ok {
			continue
		}
		// One that has another name now is let go first, because its settings are taken anew; others once the rest works.
		known := knownInstance(a.before.job, name)
		if !slices.ContainsFunc(a.job.Protected, func(i job.Instance) bool { return i.DataDirectory == known.DataDirectory }) {
			a.leaving = append(a.leaving, name)
			continue
		}
		delete(a.before.runners, name)
		if err := a.g.letGo(ctx, a.job.Name, name, a.before.job, keepSpool); err != nil {
			return err
		}
	}
	return nil
}

// letGo puts the settings of an instance back and removes its runner. j is the job as it was deployed; nil if that is not
// known.
func (g *local) letGo(ctx context.Context, name, instance string, j *job.Job, spool spoolPolicy) error {
	if spool == keepSpool {
		if err := g.awaitSpool(ctx, name, instance, j); err != nil {
			return err
		}
	}
	if err := g.putBack(ctx, name, instance, knownInstance(j, instance)); err != nil {
		return err
	}
	if err := g.release(ctx, name, instance, j, spool); err != nil {
		return fmt.Errorf("let go of %s: %w", instance, err)
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
// archive_command that runs meanwhile has the one or the other, whole. A binary that cannot even say its version here is
// not let near archive_command, of this job and of others.
func (a *application) installBinary(ctx context.Context) error {
	if a.d.KeepRunner {
		if there, err := a.g.installed(); err != nil || there != "" {
			return err
		}
	}
	content := a.d.Runner
	if content == nil {
		var err error
		if content, err = os.ReadFile("/proc/self/exe"); err != nil { // also where its file was removed
			return fmt.Errorf("read the program that runs: %w", err)
		}
	}
	dir := a.g.layout.BinaryDirectory(hexDigest(content))
	if err := makeDirectory(dir, 0o755, root()); err != nil {
		return err
	}
	binary := filepath.Join(dir, "pgark")
	if _, err := writeFile(binary, content, 0o755, root()); err != nil {
		return err
	}
	// A new directory is durable once its parent is.
	if err := syncDirectory(a.g.layout.LibDirectory()); err != nil {
		return err
	}
	if err := a.tryBinary(ctx, binary); err != nil {
		return err
	}
	link := a.g.layout.BinaryLink()
	if err := makeParents(filepath.Dir(link)); err != nil {
		return err
	}
	return switchLink(link, binary)
}

// tryBinary has a runner say its version, as the user that it will run as.
func (a *application) tryBinary(ctx context.Context, binary string) error {
	ctx, cancel := context.WithTimeout(ctx, answerTimeout)
	defer cancel()
	var out bytes.Buffer
	err := untilWritten(ctx, func() error {
		cmd := exec.CommandContext(ctx, binary, "version")
		runAs(cmd, a.owner[a.job.Protected[0].Name])
		cmd.Dir = "/"
		cmd.Stdout, cmd.Stderr = &out, &out
		return cmd.Run()
	})
	if err != nil {
		return &RunnerError{Instance: a.job.Protected[0].Name, Log: strings.TrimSpace(out.String()), Err: fmt.Errorf("%s version: %w", binary, err)}
	}
	return nil
}

// untilWritten has a program that was just written started, again as long as somebody has it open for writing: who forked
// meanwhile holds it until he executes something else.
func untilWritten(ctx context.Context, start func() error) error {
	for try := 0; ; try++ {
		err := start()
		if !errors.Is(err, syscall.ETXTBSY) || try == 100 || ctx.Err() != nil {
			return err
		}
		time.Sleep(10 * time.Millisecond)
	}
}

// removeOldBinaries removes binaries that the link does not lead to and that nobody runs: the runners of other jobs may
// still be older ones. What cannot be removed is only a few megabytes.
func (g *local) removeOldBinaries() {
	current, err := filepath.EvalSymlinks(g.layout.BinaryLink())
	if err != nil {
		return
	}
	used := map[string]bool{current: true}
	exes, _ := filepath.Glob("/proc/[0-9]*/exe") // the pattern is well formed
	for _, exe := range exes {
		// An archive_command that runs still has no need of its file; a supervisor starts its runner from it.
		cmdline, err := os.ReadFile(filepath.Join(filepath.Dir(exe), "cmdline"))
		if err != nil || strings.Contains(string(cmdline), "\x00wal\x00push\x00") {
			continue
		}
		if path, err := os.Readlink(exe); err == nil {
			used[path] = true
		}
	}
	for _, dir := range g.binaryDirectories() {
		if resolved, err := filepath.EvalSymlinks(filepath.Join(dir, "pgark")); err == nil && !used[resolved] {
			_ = os.RemoveAll(dir) // see above
		}
	}
}

// binaryDirectories are the directories of installed binaries. What else lies beside them is a binary on its way to
// somebody who has just reached this guest.
func (g *local) binaryDirectories() []string {
	entries, err := os.ReadDir(g.layout.LibDirectory())
	if err != nil {
		return nil
	}
	var dirs []string
	for _, e := range entries {
		if b, err := hex.DecodeString(e.Name()); err == nil && len(b) == sha256.Size {
			dirs = append(dirs, filepath.Join(g.layout.LibDirectory(), e.Name()))
		}
	}
	return dirs
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

	// The owner of the instances reads them, as the runner and as whoever runs pgark by hand.
	file := l.CredentialsFile(a.job.Name)
	if a.d.Credentials != nil {
		content := job.EncodeCredentials(*a.d.Credentials)
		changed, err := writeFile(file, content, 0o600, a.owner[a.job.Protected[0].Name])
		if err != nil {
			return fmt.Errorf("credentials: %w", err)
		}
		if changed {
			a.changed = changedCredentials
		}
		a.deployed.Credentials = hexDigest(content)
	} else if err := os.Remove(file); err == nil {
		a.changed = changedCredentials
	} else if !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("credentials: %w", err)
	}

	for _, i := range a.job.Protected {
		if err := a.g.makeRunnerDirectories(a.job.Name, i.Name, a.owner[i.Name]); err != nil {
			return err
		}
		// sun_path: a socket with a longer path cannot be bound.
		if socket := l.Socket(a.job.Name, i.Name); len(socket) > 107 {
			return fmt.Errorf("socket %s: its path has %d bytes, at most 107 are possible; give the job a shorter name", socket, len(socket))
		}
	}
	return nil
}

// makeRunnerDirectories makes the directories that a runner writes to.
func (g *local) makeRunnerDirectories(name, instance string, owner account) error {
	if err := makeDirectory(g.layout.StateDirectory(name, instance), 0o700, owner); err != nil {
		return err
	}
	if err := makeDirectory(g.layout.RunDirectory(name), 0o755, owner); err != nil || g.withSystemd() {
		return err
	}
	return makeDirectory(g.layout.LogDirectory(name), 0o755, owner)
}

// configure makes PostgreSQL hand its WAL to the runner.
func (a *application) configure(ctx context.Context, i job.Instance) error {
	restart := a.exam.servers[i.Name].restartSettings() // the checks have made sure that we may
	restarts, err := a.g.takeSettings(ctx, a.job.Name, i, a.owner[i.Name], a.d.Settings.ExistingArchiveCommand, restart)
	if err != nil || !restarts {
		return err
	}
	if c := a.cluster(i.Name); c != nil {
		return a.g.restart(ctx, *c, nil)
	}
	return nil
}

// cluster is what the checks have found of an instance.
func (a *application) cluster(instance string) *cluster {
	for i := range a.exam.clusters {
		if c := &a.exam.clusters[i]; c.Name == instance {
			return c
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
