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

	"github.com/pgark/terraform-provider-pgark/internal/engine/job"
	"github.com/pgark/terraform-provider-pgark/internal/engine/postgres"
)

// cluster is what is known of an instance before its server is asked.
type cluster struct {
	Instance
	pid         int    // of the postmaster; 0: not running
	status      string // of the postmaster, as postmaster.pid says
	debian      string // "15/main" where Debian's tools made it
	configFile  string // postgresql.conf, where it is known without asking
	clusterName string
	problem     string // why something could not be read
}

// Discover finds running servers by their processes, and stopped ones where packages of Debian and Red Hat put clusters
// and where a job file says that one is. An instance's name is its major version and the name of the cluster: the one
// that a job on this guest knows it by, else Debian's, else the part of cluster_name behind the last slash, else its port.
func (g *local) Discover(ctx context.Context) ([]Instance, error) {
	clusters, err := g.clusters(ctx)
	if err != nil {
		return nil, err
	}
	out := make([]Instance, len(clusters))
	for i, c := range clusters {
		out[i] = c.Instance
		s, err := inspect(ctx, c)
		if err != nil {
			if ctx.Err() != nil {
				return nil, context.Cause(ctx)
			}
			continue // it runs, or does not, and keeps its counsel; Check says why
		}
		out[i].VersionNumber = s.VersionNumber
		out[i].Role = s.role()
		out[i].ArchiveMode = s.Setting("archive_mode")
		out[i].WALLevel = s.Setting("wal_level")
		out[i].SizeBytes = s.inventory.SizeBytes()
	}
	return out, nil
}

// clusters finds all clusters, named, in order of name.
func (g *local) clusters(ctx context.Context) ([]cluster, error) {
	jobs, err := g.jobs()
	if err != nil {
		return nil, err
	}
	names := map[string]string{} // by data directory
	byDirectory := map[string]*cluster{}
	add := func(c cluster) {
		if dir, err := filepath.EvalSymlinks(c.DataDirectory); err == nil {
			c.DataDirectory = dir
		}
		if _, err := os.Stat(filepath.Join(c.DataDirectory, "PG_VERSION")); err != nil {
			return // declared, and not made yet or gone
		}
		known, ok := byDirectory[c.DataDirectory]
		if !ok {
			byDirectory[c.DataDirectory] = &c
			return
		}
		known.debian = cmp.Or(known.debian, c.debian)
		known.configFile = cmp.Or(known.configFile, c.configFile)
	}
	for _, j := range jobs {
		for _, i := range j.Protected {
			if dir, err := filepath.EvalSymlinks(i.DataDirectory); err == nil {
				i.DataDirectory = dir
			}
			names[i.DataDirectory] = i.Name
			add(cluster{Instance: Instance{Instance: i}})
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
	running, err := runningDirectories()
	if err != nil {
		return nil, err
	}
	for _, dir := range running {
		add(cluster{Instance: Instance{Instance: job.Instance{DataDirectory: dir}}})
	}

	var out []cluster
	for _, c := range byDirectory {
		c.fill(ctx)
		if n, ok := names[c.DataDirectory]; ok {
			c.Name = n
		}
		out = append(out, *c)
	}
	nameClusters(out, names)
	slices.SortFunc(out, func(a, b cluster) int { return cmp.Compare(a.Name, b.Name) })
	return out, nil
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
		b, err := os.ReadFile(f)
		if err != nil {
			continue
		}
		dir, ok := confSetting(parseConf(string(b)), "data_directory")
		if !ok {
			dir = filepath.Join("/var/lib/postgresql", major, name)
		}
		c.DataDirectory = dir
		out = append(out, c)
	}
	return out
}

// runningDirectories finds the data directories of running postmasters.
func runningDirectories() ([]string, error) {
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return nil, fmt.Errorf("read processes: %w", err)
	}
	var out []string
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil {
			continue
		}
		proc := filepath.Join("/proc", e.Name())
		// After an upgrade of the package the link says "postgres (deleted)".
		exe, err := os.Readlink(filepath.Join(proc, "exe"))
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
	return out, nil
}

// fill reads what the data directory tells.
func (c *cluster) fill(ctx context.Context) {
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
		if c.SocketDirectory != "" && !filepath.IsAbs(c.SocketDirectory) {
			c.SocketDirectory = filepath.Join(c.DataDirectory, c.SocketDirectory)
		}
	}
	c.readConf()
	if running && c.debian == "" {
		// What the server was started with counts: cluster_name may stand on its command line.
		if conn, err := connect(ctx, c.Instance.Instance); err == nil {
			defer closeNow(conn)
			if s, err := postgres.ReadSettings(ctx, conn, "cluster_name"); err == nil {
				c.clusterName = s["cluster_name"].Value
			}
		}
	}
}

// readConf guesses from the configuration files what a server that runs would tell.
func (c *cluster) readConf() {
	var lines []confLine
	for _, f := range []string{cmp.Or(c.configFile, filepath.Join(c.DataDirectory, "postgresql.conf")), autoConf(c.DataDirectory)} {
		if b, err := os.ReadFile(f); err == nil {
			lines = append(lines, parseConf(string(b))...)
		}
	}
	c.clusterName, _ = confSetting(lines, "cluster_name")
	if c.Running {
		return
	}
	if text, ok := confSetting(lines, "port"); ok {
		if port, err := strconv.Atoi(text); err == nil {
			c.Port = port
		}
	}
	c.Port = cmp.Or(c.Port, 5432)
	if dirs, ok := confSetting(lines, "unix_socket_directories"); ok {
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
	// Equal names go by data directory, so that a server that stops or starts changes nobody's.
	slices.SortFunc(clusters, func(a, b cluster) int { return cmp.Compare(a.DataDirectory, b.DataDirectory) })
	for i := range clusters {
		c := &clusters[i]
		if c.Name != "" {
			continue
		}
		suffix := strconv.Itoa(c.Port)
		if full := cmp.Or(c.debian, c.clusterName); full != "" {
			suffix = notInName.ReplaceAllString(full[strings.LastIndex(full, "/")+1:], "_")
			suffix = cmp.Or(suffix[:min(len(suffix), 48)], strconv.Itoa(c.Port))
		}
		name := fmt.Sprintf("%d-%s", c.Version, suffix)
		if taken[name] {
			name = fmt.Sprintf("%s-%d", name, c.Port)
		}
		for n := 2; taken[name]; n++ {
			name = fmt.Sprintf("%d-%s-%d-%d", c.Version, suffix, c.Port, n)
		}
		taken[name] = true
		c.Name = name
	}
}

// connect reaches an instance's server, and makes sure that it is the instance's: another cluster may have its port now.
func connect(ctx context.Context, i job.Instance) (*pgx.Conn, error) {
	if i.SocketDirectory == "" {
		return nil, errNoSocket
	}
	conn, err := postgres.Connect(ctx, postgres.ConnectOptions{
		SocketDirectory: i.SocketDirectory, Port: i.Port, User: i.DatabaseUser, Owner: i.Owner,
	})
	if err != nil {
		return nil, err
	}
	if i.SystemID == 0 {
		return conn, nil
	}
	var bits int64
	if err := conn.QueryRow(ctx, "select system_identifier from pg_catalog.pg_control_system()").Scan(&bits); err != nil {
		closeNow(conn)
		return nil, fmt.Errorf("which cluster answers at port %d in %s: %w", i.Port, i.SocketDirectory, err)
	}
	if found := postgres.SystemID(bits); found != i.SystemID {
		closeNow(conn)
		return nil, &otherClusterError{instance: i, found: found}
	}
	return conn, nil
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

// inspected is what a running server tells, for the checks.
type inspected struct {
	*postgres.Server
	archiveCommand string // as it is set: pg_settings shows "(disabled)" while archive_mode is off
	missing        []postgres.MissingPrivilege
	fileProblems   []postgres.FileProblem
	inventory      *postgres.Inventory
}

func (s *inspected) role() string {
	if s.InRecovery {
		return "replica"
	}
	return "primary"
}

// inspect asks the cluster's server; an error of postgres.Connect if it is not there.
func inspect(ctx context.Context, c cluster) (*inspected, error) {
	if !c.Running {
		return nil, errNotRunning
	}
	conn, err := connect(ctx, c.Instance.Instance)
	if err != nil {
		return nil, err
	}
	defer closeNow(conn)
	s := &inspected{}
	if s.Server, err = postgres.ReadServer(ctx, conn); err != nil {
		return nil, err
	}
	if s.inventory, err = postgres.ReadInventory(ctx, conn, 2*time.Second); err != nil {
		return nil, err
	}
	if s.archiveCommand, err = readArchiveCommand(ctx, conn); err != nil {
		return nil, err
	}
	if s.missing, err = postgres.MissingPrivileges(ctx, conn, "archive_command"); err != nil {
		return nil, err
	}
	if s.Superuser {
		if s.fileProblems, err = postgres.FileProblems(ctx, conn); err != nil {
			return nil, err
		}
	}
	return s, nil
}

var errNotRunning = errors.New("PostgreSQL is not running")
