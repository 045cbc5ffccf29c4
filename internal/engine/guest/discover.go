//go:build linux

package guest

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"
	"golang.org/x/sync/errgroup"

	"github.com/pgark/terraform-provider-pgark/internal/engine/job"
	"github.com/pgark/terraform-provider-pgark/internal/engine/postgres"
)

// cluster is what is known of an instance before its server is asked.
type cluster struct {
	Instance
	pid         int                  // of the postmaster; 0: not running
	status      string               // of the postmaster, as postmaster.pid says
	debian      string               // "15/main" where Debian's tools made it
	commandLine postgres.CommandLine // how it was started last, as far as that is known
	configFile  string               // postgresql.conf, where it is known without asking
	hbaFile     string
	identFile   string
	clusterName string
	managers    []clusterManager
	problem     string // why something could not be read
}

// The time that a server has to answer. One that hangs keeps nobody from seeing the others.
const (
	discoverTimeout = 5 * time.Second
	sizesTimeout    = 3 * time.Second // a part of discoverTimeout: every file of every database is looked at
	checkTimeout    = 10 * time.Second
)

// Discover finds running servers by their processes, and stopped ones where packages of Debian and Red Hat put clusters,
// where a systemd unit starts one, and where a job file says that one is. An instance's name is its major version and the
// name of the cluster: the one that a job on this guest knows it by, else Debian's, else the part of cluster_name behind
// the last slash, else its port. A server is asked as the role of the job that protects it, else as its owner.
func (g *local) Discover(ctx context.Context) ([]Instance, error) {
	clusters, err := g.clusters(ctx)
	if err != nil {
		return nil, err
	}
	out := make([]Instance, len(clusters))
	for i, c := range clusters {
		out[i] = c.Instance
	}
	eachServer(ctx, clusters, discoverTimeout, func(ctx context.Context, n int) error { return out[n].ask(ctx) }, func(n int, err error) {
		out[n].Problem = err.Error()
	})
	if ctx.Err() != nil {
		return nil, context.Cause(ctx)
	}
	return out, nil
}

// ask fills in what only the server knows.
func (i *Instance) ask(ctx context.Context) error {
	conn, err := connect(ctx, i.Instance)
	if err != nil {
		return err
	}
	defer closeNow(conn)
	s, err := postgres.ReadServer(ctx, conn)
	if err != nil {
		return err
	}
	command, err := readArchiveCommand(ctx, conn)
	if err != nil {
		return err
	}
	holds, err := postgres.ReadInventory(ctx, conn, sizesTimeout)
	if err != nil {
		return err
	}
	i.VersionNumber, i.Role = s.VersionNumber, role(s)
	i.ArchiveMode, i.WALLevel, i.ArchiveLibrary = s.Setting("archive_mode"), s.Setting("wal_level"), s.Setting("archive_library")
	if !isNoCommand(command) {
		i.ArchiveCommand = ProgramOf(command)
	}
	i.SizeBytes = holds.SizeBytes()
	for _, d := range holds.Databases {
		if !d.Template {
			i.Databases = append(i.Databases, d.Name)
		}
	}
	for _, t := range holds.Tablespaces {
		i.Tablespaces = append(i.Tablespaces, Tablespace{Name: t.Name, Location: t.Location})
	}
	i.Extensions, i.Followers = holds.Extensions, holds.Followers
	return nil
}

// eachServer asks those of the clusters that run, side by side and each for a limited time, and reports what went wrong.
// Each call has its own cluster, by its number.
func eachServer(ctx context.Context, clusters []cluster, limit time.Duration, ask func(context.Context, int) error, failed func(int, error)) {
	var group errgroup.Group
	group.SetLimit(16) // each is one connection, to a server of its own
	for n, c := range clusters {
		if !c.Running {
			continue
		}
		group.Go(func() error {
			bounded, cancel := context.WithTimeout(ctx, limit)
			defer cancel()
			err := ask(bounded, n)
			if err != nil && bounded.Err() != nil && ctx.Err() == nil {
				err = &silentError{pid: c.pid, waited: limit}
			}
			if err != nil {
				failed(n, err)
			}
			return nil
		})
	}
	_ = group.Wait() // nothing above returns an error
}

// silentError says that a server which runs does not answer.
type silentError struct {
	pid    int
	waited time.Duration
}

func (e *silentError) Error() string {
	return fmt.Sprintf("the server (process %d) did not answer within %v", e.pid, e.waited)
}

// clusters finds all clusters, named, in order of name. It asks no server: a name must not depend on whether one answers.
func (g *local) clusters(ctx context.Context) ([]cluster, error) {
	jobs, err := g.jobs()
	if err != nil {
		return nil, err
	}
	names := map[string]string{} // by data directory
	var gone []job.Instance      // that a job knows in a data directory which is not there
	var hidden []string          // data directories that we may not look into
	byDirectory := map[string]*cluster{}
	add := func(c cluster) (there bool) {
		if dir, err := filepath.EvalSymlinks(c.DataDirectory); err == nil {
			c.DataDirectory = dir
		}
		if _, err := os.Stat(filepath.Join(c.DataDirectory, "PG_VERSION")); err != nil {
			if errors.Is(err, fs.ErrPermission) {
				hidden = append(hidden, c.DataDirectory)
			}
			return false // declared, and not made yet or gone
		}
		known, ok := byDirectory[c.DataDirectory]
		if !ok {
			byDirectory[c.DataDirectory] = &c
			return true
		}
		known.debian = cmp.Or(known.debian, c.debian)
		known.configFile = cmp.Or(known.configFile, c.configFile)
		known.Service = cmp.Or(known.Service, c.Service)
		return true
	}
	for _, j := range jobs {
		for _, i := range j.Protected {
			if dir, err := filepath.EvalSymlinks(i.DataDirectory); err == nil {
				i.DataDirectory = dir
			}
			i.DatabaseUser = cmp.Or(j.DatabaseUser, i.DatabaseUser)
			if add(cluster{Instance: Instance{Instance: i}}) || slices.Contains(hidden, i.DataDirectory) {
				names[i.DataDirectory] = i.Name
			} else {
				gone = append(gone, i)
			}
		}
	}
	for _, c := range g.debianClusters() {
		add(c)
	}
	for _, pattern := range []string{"*/data/PG_VERSION", "data/PG_VERSION"} {
		files, _ := filepath.Glob(filepath.Join(g.layout.RedHatClusters(), pattern)) // the pattern is well formed
		for _, f := range files {
			add(cluster{Instance: Instance{Instance: job.Instance{DataDirectory: filepath.Dir(f)}}})
		}
	}
	for _, u := range g.databaseUnits() {
		c := cluster{Instance: Instance{Instance: job.Instance{DataDirectory: u.directory}, Service: u.name}}
		if file := filepath.Join(u.directory, "postgresql.conf"); isFile(file) {
			c.configFile = file
			if dir, ok := confSetting(readConfFile(file), "data_directory"); ok && filepath.IsAbs(dir) {
				c.DataDirectory = dir // the unit names the directory of the configuration
			}
		}
		add(c)
	}
	running, others, err := runningDirectories()
	if err != nil {
		return nil, err
	}
	hidden = append(hidden, others...)
	for _, dir := range running {
		add(cluster{Instance: Instance{Instance: job.Instance{DataDirectory: dir}}})
	}

	managing := findManagers()
	var out []cluster
	for _, c := range byDirectory {
		c.fill()
		if n, ok := names[c.DataDirectory]; ok {
			c.Name = n
		}
		for _, m := range managing {
			if m.manages(c) {
				c.managers = append(c.managers, m)
				c.Manager = cmp.Or(c.Manager, m.name)
			}
		}
		out = append(out, *c)
	}
	followMoved(out, gone)
	nameClusters(out, names)
	slices.SortFunc(out, func(a, b cluster) int { return cmp.Compare(a.Name, b.Name) })
	if ctx.Err() != nil {
		return nil, context.Cause(ctx)
	}
	if len(out) == 0 && len(hidden) > 0 {
		return nil, &hiddenError{directories: hidden, remedy: g.becomeRoot()} // could not look is not: there is none
	}
	return out, nil
}

// hiddenError says that nothing was found because we may not look where clusters are.
type hiddenError struct {
	directories []string
	remedy      string
}

func (e *hiddenError) Error() string {
	return "user " + ourName() + " may not look into " + strings.Join(e.directories, ", ")
}

// Hint gives the remedy.
func (e *hiddenError) Hint() string { return e.remedy }

func isFile(path string) bool {
	info, err := os.Stat(path)
	return err == nil && info.Mode().IsRegular()
}

// jobs reads the job files. One that cannot be read names nothing; State says what is wrong with it.
func (g *local) jobs() ([]*job.Job, error) {
	entries, err := os.ReadDir(g.layout.JobsDirectory())
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("read job files: %w", err)
	}
	var jobs []*job.Job
	for _, e := range entries {
		if name, ok := strings.CutSuffix(e.Name(), ".json"); ok && !strings.HasPrefix(name, ".") {
			if j, err := job.Load(g.layout, name); err == nil {
				jobs = append(jobs, j)
			}
		}
	}
	return jobs, nil
}

// debianClusters reads what pg_createcluster has made.
func (g *local) debianClusters() []cluster {
	files, _ := filepath.Glob(filepath.Join(g.layout.DebianClusters(), "*/*/postgresql.conf")) // the pattern is well formed
	var out []cluster
	for _, f := range files {
		name := filepath.Base(filepath.Dir(f))
		major := filepath.Base(filepath.Dir(filepath.Dir(f)))
		c := cluster{debian: major + "/" + name, configFile: f}
		dir, ok := confSetting(readConfFile(f), "data_directory")
		if !ok {
			dir = filepath.Join("/var/lib/postgresql", major, name)
		}
		c.DataDirectory = dir
		if slices.ContainsFunc(unitDirectories, func(dir string) bool { return isFile(g.systemPath(dir + "/postgresql@.service")) }) {
			c.Service = "postgresql@" + major + "-" + name + ".service"
		}
		out = append(out, c)
	}
	return out
}

// runningDirectories finds the data directories of running postmasters, and names servers of other users, whose
// directories only root may know.
func runningDirectories() (out, others []string, err error) {
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return nil, nil, fmt.Errorf("read processes: %w", err)
	}
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil {
			continue
		}
		proc := filepath.Join("/proc", e.Name())
		// After an upgrade of the package the link says "postgres (deleted)".
		exe, err := os.Readlink(filepath.Join(proc, "exe"))
		if errors.Is(err, fs.ErrPermission) && len(others) == 0 {
			if name, err := os.ReadFile(filepath.Join(proc, "comm")); err == nil && strings.TrimSpace(string(name)) == "postgres" {
				others = append(others, "the data directory of process "+e.Name())
			}
		}
		if base, _, _ := strings.Cut(filepath.Base(exe), " "); err != nil || base != "postgres" && base != "postmaster" {
			continue
		}
		dir, err := os.Readlink(filepath.Join(proc, "cwd"))
		if err != nil {
			continue
		}
		// A server in a container shows a path of a file system that is not ours.
		theirs, err := os.Stat(filepath.Join(proc, "cwd"))
		if err != nil {
			continue
		}
		if ours, err := os.Stat(dir); err != nil || !os.SameFile(ours, theirs) {
			continue
		}
		if root, err := os.Readlink(filepath.Join(proc, "root")); err != nil || root != "/" {
			continue
		}
		// The children work in the data directory too.
		if p, err := postgres.ReadPostmaster(dir); err == nil && p.PID == pid {
			out = append(out, dir)
		}
	}
	return out, others, nil
}

// fill reads what the data directory tells.
func (c *cluster) fill() {
	note := func(err error) {
		if c.problem == "" {
			c.problem = err.Error()
		}
	}
	if info, err := os.Stat(c.DataDirectory); err != nil {
		note(err)
	} else {
		c.Owner = ownerOf(info)
	}
	c.DatabaseUser = cmp.Or(c.DatabaseUser, c.Owner)
	var err error
	if c.Version, err = postgres.ReadMajor(c.DataDirectory); err != nil {
		note(err)
	}
	c.SystemID, c.WALSegment = 0, 0
	if control, err := postgres.ReadControl(c.DataDirectory); err != nil {
		note(err)
	} else {
		c.SystemID, c.WALSegment = control.SystemID, control.WALSegmentSize
	}

	running, postmaster, err := postgres.IsRunning(c.DataDirectory)
	if err != nil {
		note(err)
	}
	if c.Running = running; running {
		c.pid, c.status = postmaster.PID, postmaster.Status
		c.Port, c.SocketDirectory = postmaster.Port, postmaster.SocketDirectory
		// A name that begins with @ is no path, but one of Linux's abstract sockets.
		if c.SocketDirectory != "" && !filepath.IsAbs(c.SocketDirectory) && c.SocketDirectory[0] != '@' {
			c.SocketDirectory = filepath.Join(c.DataDirectory, c.SocketDirectory)
		}
		c.Service = cmp.Or(serviceOf(c.pid), c.Service)
	}
	c.readConf()
}

// readConf reads, of the configuration files and of how the server was started last, what names the cluster, and what a
// server that runs would tell.
func (c *cluster) readConf() {
	c.commandLine, _ = postgres.ReadCommandLine(c.DataDirectory) // of a server that never ran there is none
	started := c.commandLine.Settings["config_file"]
	if started == "" && filepath.IsAbs(c.commandLine.Directory) {
		started = filepath.Join(c.commandLine.Directory, "postgresql.conf")
	}
	switch {
	case c.Running && filepath.IsAbs(started):
		c.configFile = started
	case c.configFile == "" && filepath.IsAbs(started) && isFile(started):
		c.configFile = started
	case c.configFile == "":
		c.configFile = filepath.Join(c.DataDirectory, "postgresql.conf")
	}
	lines := append(readConfFile(c.configFile), readConfFile(autoConf(c.DataDirectory))...)
	setting := func(name string) string {
		if v, ok := c.commandLine.Settings[name]; ok {
			return v
		}
		v, _ := confSetting(lines, name)
		return v
	}
	file := func(name, standard string) string {
		if path := setting(name); filepath.IsAbs(path) {
			return path
		}
		return filepath.Join(filepath.Dir(c.configFile), standard)
	}
	c.hbaFile, c.identFile = file("hba_file", "pg_hba.conf"), file("ident_file", "pg_ident.conf")
	c.clusterName = setting("cluster_name")
	if c.Running {
		return
	}
	if port, err := strconv.Atoi(setting("port")); err == nil {
		c.Port = port
	}
	c.Port = cmp.Or(c.Port, 5432)
	if dirs := setting("unix_socket_directories"); dirs != "" {
		first, _, _ := strings.Cut(dirs, ",")
		c.SocketDirectory = strings.Trim(strings.TrimSpace(first), `"`)
	}
	c.SocketDirectory = cmp.Or(c.SocketDirectory, "/var/run/postgresql") // as the packages build it; upstream's is /tmp
}

var notInName = regexp.MustCompile(`[^A-Za-z0-9._-]`)

// nameClusters names those that have no name yet, without giving one that is taken.
func nameClusters(clusters []cluster, known map[string]string) {
	taken := map[string]bool{}
	for _, name := range known {
		taken[name] = true
	}
	for _, c := range clusters {
		taken[c.Name] = true
	}
	// Equal names go by data directory, so that a server that stops or starts changes nobody's.
	slices.SortFunc(clusters, func(a, b cluster) int { return cmp.Compare(a.DataDirectory, b.DataDirectory) })
	for i := range clusters {
		c := &clusters[i]
		if c.Name != "" {
			continue
		}
		natural := c.naturalName()
		name := natural
		if taken[name] {
			name = fmt.Sprintf("%s-%d", natural, c.Port)
		}
		for n := 2; taken[name]; n++ {
			name = fmt.Sprintf("%s-%d-%d", natural, c.Port, n)
		}
		taken[name] = true
		c.Name = name
	}
}

// naturalName is the name that an instance has if no other has it.
func (c *cluster) naturalName() string {
	suffix := strconv.Itoa(c.Port)
	if full := cmp.Or(c.debian, c.clusterName); full != "" {
		suffix = notInName.ReplaceAllString(full[strings.LastIndex(full, "/")+1:], "_")
		suffix = cmp.Or(suffix[:min(len(suffix), 48)], strconv.Itoa(c.Port))
	}
	return fmt.Sprintf("%d-%s", c.Version, suffix)
}

// followMoved names clusters as a job knows them from where they were before: the system identifier tells. Of several
// copies of one cluster it is the one that would have the name anyway, or has the port.
func followMoved(clusters []cluster, gone []job.Instance) {
	for _, before := range gone {
		var found *cluster
		best := 0
		for n := range clusters {
			c := &clusters[n]
			if c.Name != "" || c.SystemID == 0 || c.SystemID != before.SystemID {
				continue
			}
			rank := 1
			if c.naturalName() == before.Name {
				rank += 2
			}
			if c.Port == before.Port {
				rank++
			}
			if rank > best {
				found, best = c, rank
			}
		}
		if found != nil {
			found.Name = before.Name
		}
	}
}

// dial reaches the server at an instance's socket, whichever that is.
func dial(ctx context.Context, i job.Instance) (*pgx.Conn, error) {
	if i.SocketDirectory == "" {
		return nil, errNoSocket
	}
	return postgres.Connect(ctx, postgres.ConnectOptions{
		SocketDirectory: i.SocketDirectory, Port: i.Port, User: i.DatabaseUser, Owner: i.Owner,
	})
}

// connect reaches an instance's server, and makes sure that it is the instance's: another cluster may have its port now.
func connect(ctx context.Context, i job.Instance) (*pgx.Conn, error) {
	conn, err := dial(ctx, i)
	if err != nil {
		return nil, err
	}
	if err := verify(ctx, conn, i); err != nil {
		closeNow(conn)
		return nil, err
	}
	return conn, nil
}

// verify makes sure that it is the instance's server that answers.
func verify(ctx context.Context, conn *pgx.Conn, i job.Instance) error {
	if i.SystemID == 0 {
		return nil
	}
	var bits int64
	if err := conn.QueryRow(ctx, "select system_identifier from pg_catalog.pg_control_system()").Scan(&bits); err != nil {
		return fmt.Errorf("which cluster answers at port %d in %s: %w", i.Port, i.SocketDirectory, err)
	}
	if found := postgres.SystemID(bits); found != i.SystemID {
		return &otherClusterError{instance: i, found: found}
	}
	return nil
}

var errNoSocket = errors.New("the server listens on no unix socket (unix_socket_directories is empty)")

// otherClusterError says that the server at an instance's socket is another cluster's.
type otherClusterError struct {
	instance job.Instance
	found    postgres.SystemID
}

func (e *otherClusterError) Error() string {
	return fmt.Sprintf("the server at port %d in %s has system identifier %s, expected %s of %s in %s",
		e.instance.Port, e.instance.SocketDirectory, e.found, e.instance.SystemID, e.instance.Name, e.instance.DataDirectory)
}

// closeNow closes a connection whose context may be done. What closing has to say helps nobody.
func closeNow(conn *pgx.Conn) {
	ctx, cancel := context.WithTimeout(context.Background(), closeTimeout)
	defer cancel()
	_ = conn.Close(ctx)
}
