//go:build linux

package guest

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/jackc/pgx/v5/pgconn"
	"golang.org/x/sys/unix"

	"github.com/pgark/terraform-provider-pgark/internal/engine/job"
	"github.com/pgark/terraform-provider-pgark/internal/engine/objectstore"
	"github.com/pgark/terraform-provider-pgark/internal/engine/postgres"
	"github.com/pgark/terraform-provider-pgark/internal/engine/repository"
)

// The majors that pgark protects.
const (
	oldestMajor = 13
	newestMajor = 18
)

// The values of SettingsPolicy.
const (
	restartAllow    = "allow"
	commandReplace  = "replace"
	commandChain    = "chain"
	archiveModeOff  = "off"
	archiveModeOn   = "on"
	archiveAlways   = "always"
	walLevelMinimal = "minimal"
)

// pgark is not older than this: a clock that shows less is wrong.
var clockNotBefore = time.Date(2026, 11, 1, 0, 0, 0, 0, time.UTC)

// clockTolerance is how far the clocks of this machine and of others that write to the repository may be apart. S3
// refuses requests that are 15 minutes off.
const clockTolerance = 5 * time.Minute

// examination is one run of the checks.
type examination struct {
	g      *local
	job    *job.Job
	keys   *objectstore.Credentials
	policy SettingsPolicy
	checks []Check

	causes   []error
	clusters []cluster // that the selection picked
	servers  map[string]*inspected
}

// Check runs the checks of the machine first, then those of each instance. An instance that is stopped, or cannot be
// asked, has only those that need no answer from it.
func (g *local) Check(ctx context.Context, r CheckRequest) ([]Check, error) {
	e, err := g.examine(ctx, r)
	if err != nil {
		return nil, err
	}
	return e.checks, nil
}

func (g *local) examine(ctx context.Context, r CheckRequest) (*examination, error) {
	j := *r.Job
	j.ApplyDefaults()
	e := &examination{g: g, job: &j, keys: r.Credentials, policy: r.Settings, servers: map[string]*inspected{}}
	all, err := g.clusters(ctx)
	if err != nil {
		return nil, err
	}
	for _, c := range all {
		if e.selects(c) {
			e.clusters = append(e.clusters, c)
		}
	}
	e.operatingSystem()
	e.executablePlace()
	e.temporaryFolder()
	e.clusterManager()
	e.repository(ctx)
	if len(e.clusters) == 0 {
		e.noInstance(all)
	}
	for _, c := range e.clusters {
		e.instance(ctx, c)
	}
	if ctx.Err() != nil {
		return nil, context.Cause(ctx) // half of the checks say nothing
	}
	return e, nil
}

func (e *examination) selects(c cluster) bool {
	if len(e.job.Protected) == 0 {
		return e.job.Instances.Match(c.Name)
	}
	for _, i := range e.job.Protected {
		if i.Name == c.Name || i.DataDirectory == c.DataDirectory {
			return true
		}
	}
	return false
}

func (e *examination) add(c Check) { e.checks = append(e.checks, c) }

// failed are the checks that failed.
func (e *examination) failed() []Check {
	var out []Check
	for _, c := range e.checks {
		if c.Status == Fail {
			out = append(out, c)
		}
	}
	return out
}

// owners are the accounts that the instances belong to.
func (e *examination) owners() []account {
	var out []account
	for _, c := range e.clusters {
		if a, err := lookupAccount(c.Owner); err == nil && !slices.ContainsFunc(out, func(o account) bool { return o.uid == a.uid }) {
			out = append(out, a)
		}
	}
	return out
}

// ---- the machine ----------------------------------------------------------------------------------------------------

func (e *examination) operatingSystem() {
	c := Check{Name: "operating_system", Status: Pass, Found: "Linux", Expected: "Linux"}
	var u unix.Utsname
	if err := unix.Uname(&u); err == nil {
		c.Found = "Linux " + unix.ByteSliceToString(u.Release[:]) + ", " + unix.ByteSliceToString(u.Machine[:])
	}
	e.add(c)
}

func (e *examination) executablePlace() {
	lib := e.g.layout.LibDirectory()
	c := Check{Name: "executable_place", Status: Pass, Found: lib, Expected: "a directory where programs can be put, and run by the owner of PostgreSQL"}
	fail := func(found, remedy string) {
		c.Status, c.Found, c.Remedy = Fail, found, remedy
	}
	for _, dir := range []string{existing(lib), existing(filepath.Dir(e.g.layout.BinaryLink()))} {
		var st unix.Statfs_t
		if err := unix.Statfs(dir, &st); err != nil {
			fail(fmt.Sprintf("%s: %v", dir, err), "")
			break
		}
		if st.Flags&unix.ST_RDONLY != 0 {
			fail(dir+" is on a file system that is mounted read-only", "sudo mount -o remount,rw $(findmnt -no TARGET -T "+dir+")")
			break
		}
		if st.Flags&unix.ST_NOEXEC != 0 {
			fail(dir+" is on a file system that is mounted noexec", "sudo mount -o remount,exec $(findmnt -no TARGET -T "+dir+")")
			break
		}
		if err := unix.Access(dir, unix.W_OK|unix.X_OK); err != nil {
			if _, err := os.Stat(e.g.layout.BinaryLink()); err == nil {
				continue // the owner of an instance looks at what is deployed
			}
			fail(dir+" is not writable for the user that deploys pgark", "run Terraform as root on this machine")
			break
		}
		for _, o := range e.owners() {
			// What does not exist yet is made for everybody to pass.
			if blocked, err := o.mayReach(filepath.Join(dir, "pgark")); err == nil && blocked != "" {
				fail(fmt.Sprintf("%s may not pass %s on the way to %s", o, blocked, lib), "sudo chmod o+x "+blocked)
			}
		}
	}
	e.add(c)
}

func (e *examination) temporaryFolder() {
	folder, limit := e.job.WAL.TempFolder, e.job.WAL.TempFolderLimit
	c := Check{Name: "temporary_folder", Status: Pass, Found: folder, Expected: "none declared: WAL waits in pg_wal while the repository is away"}
	if folder == "" {
		c.Found = "none"
		e.add(c)
		return
	}
	need := int64(2 * postgres.DefaultSegmentSize)
	for _, cl := range e.clusters {
		need = max(need, 2*int64(cl.WALSegment))
	}
	need = max(need, limit)
	c.Expected = fmt.Sprintf("a directory that the owner of PostgreSQL may write to, with %s free", bytesText(need))
	owner := "postgres"
	if owners := e.owners(); len(owners) > 0 {
		owner = owners[0].String()
	}
	info, err := os.Stat(folder)
	var st unix.Statfs_t
	switch {
	case errors.Is(err, fs.ErrNotExist):
		c.Status, c.Found = Fail, folder+" does not exist"
		c.Remedy = fmt.Sprintf("sudo install -d -o %s -m 0700 %s", owner, folder)
	case err != nil:
		c.Status, c.Found = Fail, err.Error()
	case !info.IsDir():
		c.Status, c.Found, c.Remedy = Fail, folder+" is no directory", "name a directory in wal.temp_folder"
	default:
		if err := unix.Statfs(folder, &st); err != nil {
			c.Status, c.Found = Fail, fmt.Sprintf("%s: %v", folder, err)
			break
		}
		if st.Flags&unix.ST_RDONLY != 0 {
			c.Status, c.Found, c.Remedy = Fail, folder+" is on a file system that is mounted read-only", "sudo mount -o remount,rw $(findmnt -no TARGET -T "+folder+")"
			break
		}
		for _, o := range e.owners() {
			if blocked, err := o.mayReach(folder); err == nil && blocked != "" {
				c.Status, c.Found, c.Remedy = Fail, fmt.Sprintf("%s may not pass %s", o, blocked), "sudo chmod o+x "+blocked
			} else if !o.may(info, mayRead|mayWrite|mayExecute) {
				c.Status, c.Found = Fail, fmt.Sprintf("%s belongs to %s with mode %04o; %s may not write to it", folder, ownerOf(info), info.Mode().Perm(), o)
				c.Remedy = fmt.Sprintf("sudo chown %s %s && sudo chmod u+rwx %s", o, folder, folder)
			}
		}
		if c.Status == Pass {
			free := int64(st.Bavail) * st.Bsize
			c.Found = fmt.Sprintf("%s with %s free", folder, bytesText(free))
			if free < need {
				c.Status, c.Remedy = Fail, "free space there, name another wal.temp_folder, or lower wal.temp_folder_limit"
			}
		}
	}
	e.add(c)
}

// managers are programs that decide about an instance's settings and role, by the name in their command line.
var managers = []string{"patroni", "repmgrd", "pg_autoctl", "stolon-keeper"}

func (e *examination) clusterManager() {
	c := Check{Name: "cluster_manager", Status: Pass, Found: "none", Expected: "none: this build does not follow a switch to another machine"}
	files, _ := filepath.Glob("/proc/[0-9]*/cmdline") // the pattern is well formed
	for _, f := range files {
		b, err := os.ReadFile(f)
		if err != nil {
			continue
		}
		args := strings.Split(string(b), "\x00")
		for _, arg := range args[:min(len(args), 2)] { // python3 /usr/bin/patroni …
			if m := filepath.Base(arg); slices.Contains(managers, m) {
				c.Status = Warn
				c.Found = m + " (process " + filepath.Base(filepath.Dir(f)) + ")"
				c.Remedy = "leave archive_mode, archive_command and archive_library out of what " + m + " manages; when another machine becomes the primary, WAL comes from there no more"
			}
		}
	}
	e.add(c)
}

// repository looks whether the repository can be used from here, and, by what stands in it, whether the clock is right.
func (e *examination) repository(ctx context.Context) {
	c := Check{Name: "repository_reachable", Status: Pass, Expected: "a repository that this machine may use"}
	ctx, cancel := context.WithTimeout(ctx, 20*time.Second)
	defer cancel()
	var newest time.Time
	store, err := objectstore.Open(ctx, e.job.Location(e.keys), objectstore.Options{AttemptTimeout: 8 * time.Second, MaxElapsed: 4 * time.Second})
	var repo *repository.Repository
	if err == nil {
		repo, err = repository.Open(ctx, store)
	}
	if err == nil {
		newest = repo.Description().CreatedAt
		var owner repository.Owner
		owner, err = repo.JobOwner(ctx, e.job.Name)
		if errors.Is(err, objectstore.ErrNotExist) {
			err = nil
		} else if err == nil {
			if owner.ClaimedAt.After(newest) {
				newest = owner.ClaimedAt
			}
			if machine, e2 := job.MachineID(e.g.layout); e2 != nil || machine != owner.MachineID {
				err = &repository.OwnedError{Repository: store.URL(), Job: e.job.Name, Owner: owner, Claimant: repository.Owner{MachineID: machine, Host: e.job.Host}}
			}
		}
	}
	if err == nil {
		err = e.directoryUsable()
	}
	c.Found = "repository " + e.job.Repository.URL
	if repo != nil && err == nil {
		c.Found += " (id " + repo.Description().ID + ")"
	}
	if err != nil {
		e.explain(&c, err)
		e.causes = append(e.causes, err)
	}
	e.clock(newest)
	e.add(c)
}

// explain gives each way in which a repository is out of reach its own words.
func (e *examination) explain(c *Check, err error) {
	c.Status = Fail
	c.Found = err.Error()
	url := e.job.Repository.URL
	var owned *repository.OwnedError
	var newer *repository.FormatError
	var directory *directoryError
	switch {
	case errors.As(err, &owned):
		c.Expected = "a job name that is free, or this machine's"
		c.Remedy = "give the job another name, or hand the name over on purpose (it belongs to machine " + owned.Owner.MachineID + ")"
	case errors.As(err, &directory):
		c.Expected, c.Remedy = "a directory that the owner of PostgreSQL may use", directory.remedy
	case errors.As(err, &newer):
		c.Expected, c.Remedy = "a repository that this version of pgark reads", "update the provider"
	case errors.Is(err, repository.ErrNoRepository):
		c.Found = "no repository in " + url
		c.Expected = "a repository, as pgark_repository creates it"
		c.Remedy = "declare it: resource \"pgark_repository\" \"main\" { url = \"" + url + "\" }, and let the job refer to it"
	case errors.Is(err, objectstore.ErrNoBucket):
		c.Expected = "a bucket (or directory) that exists"
		c.Remedy = "compare the name in " + url + ", and the endpoint, with where the bucket is; pgark creates none"
	case errors.Is(err, objectstore.ErrRegion):
		c.Expected = "a bucket in the region that is declared"
		c.Remedy = "set the repository's region to the bucket's"
	case errors.Is(err, objectstore.ErrAccess):
		c.Expected = "S3 keys that are valid and may list, read and create objects below " + url
		c.Remedy = "check the access key and its policy (s3:GetObject, s3:PutObject, s3:ListBucket, s3:DeleteObject), and the clock of this machine"
		if strings.HasPrefix(url, "file:") {
			c.Expected, c.Remedy = "a directory that this user may use", "check the owner and mode of the directory"
		}
	default:
		c.Expected = "an answer of the store"
		c.Remedy = "check network, name resolution, endpoint and certificates from this machine"
	}
}

// directoryError says that the owner of an instance may not use a repository in a directory.
type directoryError struct{ found, remedy string }

func (e *directoryError) Error() string { return e.found }

// directoryUsable judges a file:// repository: the runner works there as the owner of the instance. What belongs to root
// is handed over when the job is applied.
func (e *examination) directoryUsable() error {
	dir := directoryOf(e.job.Repository.URL)
	if dir == "" {
		return nil
	}
	info, err := os.Stat(dir)
	if err != nil {
		return err
	}
	for _, o := range e.owners() {
		if blocked, err := o.mayReach(dir); err == nil && blocked != "" {
			return &directoryError{fmt.Sprintf("%s may not pass %s on the way to %s", o, blocked, dir), "sudo chmod o+x " + blocked}
		}
		if status(info).Uid != 0 && !o.may(info, mayRead|mayWrite|mayExecute) {
			return &directoryError{
				fmt.Sprintf("%s belongs to %s with mode %04o; %s may not write to it", dir, ownerOf(info), info.Mode().Perm(), o),
				fmt.Sprintf("sudo chown -R %s %s", o, dir),
			}
		}
	}
	return nil
}

// directoryOf is the directory of a file:// repository; "" for any other.
func directoryOf(repositoryURL string) string {
	u, err := url.Parse(repositoryURL)
	if err != nil || u.Scheme != "file" {
		return ""
	}
	return filepath.Clean(u.Path)
}

// clock compares this machine's clock with what it cannot be before: the release of pgark, and what stands in the
// repository. A clock that is ahead cannot be told from one that is right.
func (e *examination) clock(newest time.Time) {
	now := time.Now()
	c := Check{Name: "clock", Status: Pass, Found: now.UTC().Format(time.RFC3339), Expected: "a clock that is right: restore points are found by it"}
	switch {
	case now.Before(clockNotBefore):
		c.Status, c.Expected = Fail, "a time after "+clockNotBefore.Format(time.RFC3339)
	case now.Add(clockTolerance).Before(newest):
		c.Status, c.Expected = Fail, "a time after "+newest.UTC().Format(time.RFC3339)+", when the repository was last changed"
	default:
		var t unix.Timex
		if state, err := unix.Adjtimex(&t); err == nil {
			if state == unix.TIME_ERROR {
				c.Found += ", not synchronised as far as the kernel knows"
			} else {
				c.Found += ", synchronised"
			}
		}
	}
	if c.Status == Fail {
		c.Remedy = "sudo timedatectl set-ntp true"
	}
	e.add(c)
}

// ---- instances ------------------------------------------------------------------------------------------------------

func (e *examination) noInstance(all []cluster) {
	names := make([]string, len(all))
	for i, c := range all {
		names[i] = c.Name
	}
	found := "no instance of PostgreSQL on this machine"
	if len(names) > 0 {
		found = "none of the instances on this machine: " + strings.Join(names, ", ")
	}
	selection := "instances.include " + strings.Join(e.job.Instances.Include, ", ")
	if len(e.job.Instances.Exclude) > 0 {
		selection += " and exclude " + strings.Join(e.job.Instances.Exclude, ", ")
	}
	e.add(Check{
		Name: "postgresql_running", Status: Fail, Found: found, Expected: "at least one that matches " + selection,
		Remedy: "start PostgreSQL, or change instances; a stopped server is found only where Debian's or Red Hat's packages keep clusters",
	})
}

func (e *examination) instance(ctx context.Context, cl cluster) {
	add := func(c Check) {
		c.Instance = cl.Name
		e.add(c)
	}
	version := Check{
		Name: "postgresql_version", Status: Pass, Found: strconv.Itoa(cl.Version), Expected: fmt.Sprintf("%d to %d", oldestMajor, newestMajor),
	}
	if cl.Version < oldestMajor || cl.Version > newestMajor {
		version.Status = Fail
		version.Found = fmt.Sprintf("PostgreSQL %d in %s", cl.Version, cl.DataDirectory)
		version.Remedy = "upgrade the cluster (pg_upgrade), or leave it out: instances = { exclude = [\"" + cl.Name + "\"] }"
	}

	running := Check{Name: "postgresql_running", Status: Pass, Found: fmt.Sprintf("process %d, port %d", cl.pid, cl.Port), Expected: "a server that runs"}
	privileges := Check{Name: "privileges", Status: Pass, Expected: "to connect and to configure"}
	if uid := os.Geteuid(); uid != 0 {
		if o, err := lookupAccount(cl.Owner); err != nil || o.uid != uid {
			privileges.Status = Fail
			privileges.Found = fmt.Sprintf("deploying as user %d", uid)
			privileges.Expected = "to deploy as root, or as " + cl.Owner + ", the owner of the instance"
			privileges.Remedy = "run Terraform as root on this machine"
		}
	}
	s, err := inspect(ctx, cl)
	var other *otherClusterError
	switch {
	case err == nil:
		e.servers[cl.Name] = s
		version.Found = s.Version
	case !cl.Running:
		running.Status, running.Found = Fail, "no server runs on "+cl.DataDirectory
		running.Remedy = startCommand(cl)
	case errors.As(err, &other), postgres.IsNotRunning(err), isStarting(err):
		running.Status, running.Found = Fail, err.Error()
		running.Remedy = "wait until it has started, or see why it does not in its log"
	default:
		privileges.Status, privileges.Found = Fail, err.Error()
		privileges.Remedy = fmt.Sprintf("let %s in over the socket: put the line \"local all %s peer\" first in pg_hba.conf and reload", cl.DatabaseUser, cl.DatabaseUser)
		if errors.Is(err, errNoSocket) {
			privileges.Remedy = "set unix_socket_directories and restart PostgreSQL"
		}
	}
	add(version)
	add(running)
	if running.Status == Fail {
		if privileges.Status == Fail {
			add(privileges)
		}
		return
	}
	if s == nil {
		add(privileges)
		return
	}
	if len(s.missing) > 0 && privileges.Status == Pass {
		var what, grants []string
		for _, m := range s.missing {
			what, grants = append(what, m.What), append(grants, m.Grant)
		}
		privileges.Status = Fail
		privileges.Found = "role " + s.User + " may not " + strings.Join(what, ", may not ")
		privileges.Remedy = strings.Join(grants, "\n")
	}
	if privileges.Status == Pass {
		privileges.Found = "role " + s.User
	}
	add(privileges)
	add(e.role(cl, s))
	add(e.archiveMode(cl, s))
	add(e.archiveCommand(cl, s))
	add(e.archiveLibrary(cl, s))
	add(e.walLevel(cl, s))
	add(e.fullPageWrites(cl, s))
}

// isStarting tells whether a server refused because it starts, recovers or stops (SQLSTATE 57P03).
func isStarting(err error) bool {
	var pg *pgconn.PgError
	return errors.As(err, &pg) && pg.Code == "57P03"
}

func (e *examination) role(cl cluster, s *inspected) Check {
	c := Check{Name: "role", Status: Pass, Found: s.role(), Expected: "a primary, or a replica with archive_mode = always"}
	if s.InRecovery {
		c.Status = Warn
		c.Remedy = "protect the primary, too, if it is not: what a replica has not received yet is not safe"
		if s.Setting("archive_mode") != archiveAlways {
			c.Status, c.Found = Fail, "replica with archive_mode = "+s.Setting("archive_mode")+", which archives nothing"
			c.Remedy = psql(cl.Instance.Instance, "ALTER SYSTEM SET archive_mode = always") + " && " + restartCommand(cl)
		}
	}
	return c
}

func (e *examination) archiveMode(cl cluster, s *inspected) Check {
	mode := s.Settings["archive_mode"]
	c := Check{Name: "archive_mode", Status: Pass, Found: mode.Value, Expected: "on or always"}
	if mode.Value == archiveModeOn || mode.Value == archiveAlways {
		return c
	}
	c.Status = Fail
	c.Remedy = psql(cl.Instance.Instance, "ALTER SYSTEM SET archive_mode = on") + " && " + restartCommand(cl)
	switch {
	case mode.Overrides():
		c.Found += ", given on the server's command line"
		c.Remedy = "take it off the command line, and start the server again"
	case mode.PendingRestart:
		c.Found += ", and changed to take effect with the next restart"
		c.Remedy = restartCommand(cl)
		if e.mayRestart() && canRestart(cl) == nil {
			c.Status, c.Found, c.Remedy = Warn, c.Found+": PostgreSQL will be restarted once", ""
		}
	case e.mayRestart() && s.Setting("wal_level") != walLevelMinimal:
		if err := canRestart(cl); err != nil {
			c.Found += "; PostgreSQL cannot be restarted from here: " + err.Error()
			break
		}
		c.Status, c.Found, c.Remedy = Warn, c.Found+": it will be turned on, with one restart of PostgreSQL", ""
	}
	return c
}

func (e *examination) mayRestart() bool {
	return e.policy.Manage && e.policy.Restart == restartAllow
}

// needsArchiveMode tells whether archive_mode is to be turned on.
func (s *inspected) needsArchiveMode() bool {
	mode := s.Setting("archive_mode")
	return mode != archiveModeOn && mode != archiveAlways
}

func (e *examination) archiveCommand(cl cluster, s *inspected) Check {
	ours := e.g.layout.ArchiveCommand(e.job.Name, cl.Name)
	c := Check{Name: "archive_command", Status: Pass, Found: "empty", Expected: "empty, or pgark's of this job"}
	command := s.archiveCommand
	set := psql(cl.Instance.Instance, "ALTER SYSTEM SET archive_command = '"+strings.ReplaceAll(ours, "'", "''")+"'") + " && " +
		psql(cl.Instance.Instance, "SELECT pg_reload_conf()")
	switch {
	case command == ours:
		c.Found = "pgark's"
	case s.Settings["archive_command"].Overrides():
		c.Status, c.Found = Fail, program(command)+", given on the server's command line"
		c.Remedy = "take it off the command line, and start the server again"
	case !e.policy.Manage:
		c.Status, c.Found, c.Expected = Fail, program(command), "pgark's of this job: with guest_settings.manage = false you set it yourself"
		c.Remedy = set
	case command == "" || command == "(disabled)":
	case e.ownOf(command, cl):
		c.Found = "pgark's, and out of date"
	default:
		c.Found = program(command)
		if other := e.g.jobOfCommand(command); other != "" {
			c.Found = "that of pgark's job " + other
		}
		switch e.policy.ExistingArchiveCommand {
		case commandReplace:
			c.Status = Warn
			c.Found += ": it will be replaced, and put back when the job is destroyed; what it archives to gets no more WAL"
		case commandChain:
			c.Status, c.Remedy = Fail, "chaining is not in this build: guest_settings = { existing_archive_command = \"replace\" } replaces it"
		default:
			c.Status = Fail
			c.Remedy = psql(cl.Instance.Instance, "ALTER SYSTEM SET archive_command = ''") + " && " + psql(cl.Instance.Instance, "SELECT pg_reload_conf()") +
				"\nor let pgark replace it: guest_settings = { existing_archive_command = \"replace\" }"
		}
	}
	return c
}

// ownOf tells whether the command is ours of this job, by an older name of the instance or from another place.
func (e *examination) ownOf(command string, cl cluster) bool {
	if e.g.jobOfCommand(command) != e.job.Name {
		return false
	}
	j, err := job.Load(e.g.layout, e.job.Name)
	return err != nil || slices.ContainsFunc(j.Protected, func(i job.Instance) bool { return i.DataDirectory == cl.DataDirectory })
}

// jobOfCommand returns the job whose archive_command this is; "" if it is none of pgark's on this machine.
func (g *local) jobOfCommand(command string) string {
	rest, ok := strings.CutPrefix(command, g.layout.BinaryLink()+" wal push --job ")
	if !ok {
		return ""
	}
	name, _, _ := strings.Cut(rest, " ")
	return name
}

// program names a foreign command by its first word: the rest may hold a password.
func program(command string) string {
	first, rest, more := strings.Cut(strings.TrimSpace(command), " ")
	if first == "" {
		return "empty"
	}
	if strings.Contains(first, "=") {
		return "set by somebody else" // NAME=secret command
	}
	if more && rest != "" {
		first += " …"
	}
	return "set by somebody else, to " + strconv.Quote(first)
}

func (e *examination) archiveLibrary(cl cluster, s *inspected) Check {
	c := Check{Name: "archive_library", Status: Pass, Found: "empty", Expected: "empty: PostgreSQL uses it in the place of archive_command"}
	if library := s.Setting("archive_library"); library != "" {
		c.Status, c.Found = Fail, strconv.Quote(library)
		c.Remedy = psql(cl.Instance.Instance, "ALTER SYSTEM SET archive_library = ''") + " && " + psql(cl.Instance.Instance, "SELECT pg_reload_conf()")
	}
	return c
}

func (e *examination) walLevel(cl cluster, s *inspected) Check {
	c := Check{Name: "wal_level", Status: Pass, Found: s.Setting("wal_level"), Expected: "replica or logical"}
	if c.Found == walLevelMinimal {
		c.Status = Fail
		c.Remedy = psql(cl.Instance.Instance, "ALTER SYSTEM SET wal_level = replica") + " && " + restartCommand(cl)
	}
	return c
}

func (e *examination) fullPageWrites(cl cluster, s *inspected) Check {
	c := Check{Name: "full_page_writes", Status: Pass, Found: s.Setting("full_page_writes"), Expected: "on"}
	if c.Found == "off" {
		// A backup of a primary turns it on while it runs (xlog.c, do_pg_backup_start); a replica's cannot.
		c.Status = Warn
		if s.InRecovery {
			c.Status = Fail
		}
		c.Remedy = psql(cl.Instance.Instance, "ALTER SYSTEM SET full_page_writes = on") + " && " + psql(cl.Instance.Instance, "SELECT pg_reload_conf()")
	}
	return c
}

func bytesText(n int64) string {
	switch {
	case n >= 1<<30:
		return fmt.Sprintf("%.1f GiB", float64(n)/(1<<30))
	case n >= 1<<20:
		return fmt.Sprintf("%.0f MiB", float64(n)/(1<<20))
	}
	return fmt.Sprintf("%d bytes", n)
}
