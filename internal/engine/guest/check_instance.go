//go:build linux

package guest

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/jackc/pgx/v5/pgconn"

	"github.com/pgark/terraform-provider-pgark/internal/engine/job"
	"github.com/pgark/terraform-provider-pgark/internal/engine/postgres"
)

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
		Remedy: "start PostgreSQL, or change instances; a stopped server is found only where Debian's or Red Hat's packages keep clusters, and where a systemd unit names its directory",
	})
}

func (e *examination) instance(cl cluster) {
	add := func(c Check) {
		c.Instance = cl.Name
		e.add(c)
	}
	s, err := e.servers[cl.Name], e.refused[cl.Name]
	version := e.version(cl, s)
	add(version)
	running := e.running(cl, err)
	add(running)
	if running.Status == Fail {
		err = nil // says nothing of privileges
	}
	privileges := e.privileges(cl, s, err)
	switch {
	case version.Status == Fail:
		return // what such a server says of itself is not known to be understood
	case running.Status == Fail:
		if privileges.Status == Fail {
			add(privileges)
		}
		return
	}
	add(privileges)
	if s == nil {
		return
	}
	add(e.role(cl, s))
	add(e.archiveMode(cl, s))
	add(e.archiveCommand(cl, s))
	add(e.archiveLibrary(cl, s))
	add(e.walLevel(cl, s))
	add(e.fullPageWrites(cl, s))
	e.streaming(cl, s, add)
}

func (e *examination) version(cl cluster, s *inspected) Check {
	c := Check{Name: "postgresql_version", Status: Pass, Found: strconv.Itoa(cl.Version), Expected: fmt.Sprintf("%d to %d", oldestMajor, newestMajor)}
	if s != nil {
		c.Found = s.Version
	}
	without := "leave it out: instances = { exclude = [\"" + cl.Name + "\"] }"
	switch {
	case cl.Version == 0:
		c.Status, c.Found, c.Remedy = Fail, cl.problem, "see why the version of "+cl.DataDirectory+" cannot be read, or "+without
	case cl.Version < oldestMajor:
		c.Status, c.Remedy = Fail, "upgrade the cluster (pg_upgrade), or "+without
	case cl.Version > newestMajor:
		c.Status, c.Remedy = Fail, "update the provider (terraform init -upgrade) to one that knows this version, or "+without
	}
	if c.Status == Fail && cl.Version > 0 {
		c.Found = fmt.Sprintf("PostgreSQL %d in %s", cl.Version, cl.DataDirectory)
	}
	return c
}

func (e *examination) running(cl cluster, err error) Check {
	c := Check{Name: "postgresql_running", Status: Pass, Found: fmt.Sprintf("process %d, port %d", cl.pid, cl.Port), Expected: "a server that runs"}
	var other *otherClusterError
	var silent *silentError
	switch {
	case !cl.Running:
		c.Status, c.Found, c.Remedy = Fail, "no server runs on "+cl.DataDirectory, startCommand(cl)
	case errors.As(err, &silent):
		c.Status, c.Found = Fail, err.Error()
		c.Remedy = "# its log may say what it waits for; this restarts it:\n" + restartCommand(cl)
	case errors.As(err, &other):
		c.Status, c.Found = Fail, err.Error()
		c.Remedy = "# another cluster has taken the port: give one of them another, and restart this one\n" + restartCommand(cl)
	case isStarting(err) && cl.status == "standby": // as the postmaster says when it is up and lets nobody in
		c.Status, c.Found = Fail, "a replica with hot_standby = off, which lets nobody in"
		c.Remedy = "echo 'hot_standby = on' | " + sudo() + "tee -a " + word(cl.configFile) + " && " + restartCommand(cl)
	case isStarting(err):
		c.Status, c.Found = Fail, err.Error()
		c.Remedy = "wait until it has started, or see in its log why it does not"
	case postgres.IsNotRunning(err):
		c.Status, c.Found = Fail, err.Error()
		c.Remedy = "# its socket is gone; a restart makes it anew\n" + restartCommand(cl)
	}
	return c
}

// isReplica tells whether a cluster is a replica, or would be one if it ran.
func (c cluster) isReplica() bool {
	_, err := os.Stat(filepath.Join(c.DataDirectory, "standby.signal"))
	return err == nil
}

// isStarting tells whether a server refused because it starts, recovers or stops (SQLSTATE 57P03).
func isStarting(err error) bool {
	var pg *pgconn.PgError
	return errors.As(err, &pg) && pg.Code == "57P03"
}

func (e *examination) role(cl cluster, s *inspected) Check {
	c := Check{Name: "role", Status: Pass, Found: role(s.Server), Expected: "a primary, or a replica with archive_mode = always"}
	if !s.InRecovery {
		return c
	}
	if mode := s.Setting("archive_mode"); mode != archiveAlways {
		c.Found = "replica with archive_mode = " + mode + ", which archives nothing"
		e.restartedSetting(&c, cl, s, archiveMode, "it will be always, with one restart of PostgreSQL")
		return c
	}
	c.Status, c.Remedy = Warn, "protect the primary, too, if it is not: what a replica has not received yet is not safe"
	return c
}

// restartFor sets what has to be other before WAL can be archived, all of it, and restarts the server once. One setting
// without the other may keep the server from starting: archive_mode with wal_level = minimal does.
func restartFor(cl cluster, s *inspected) string {
	wanted := s.restartSettings()
	var sql []string
	for _, name := range restarted {
		// What waits for a restart is not off, minimal or 0, since the server is that now; "on" would not do for a replica.
		if value, ok := wanted[name]; ok && (!s.Settings[name].PendingRestart || s.InRecovery) {
			sql = append(sql, alterStatement(name, value))
		}
	}
	if len(sql) == 0 {
		return restartCommand(cl)
	}
	return statements(cl, sql...) + " && " + restartCommand(cl)
}

// restartedSetting judges a setting that takes a restart, and that is not as it has to be.
func (e *examination) restartedSetting(c *Check, cl cluster, s *inspected, name, will string) {
	setting := s.Settings[name]
	c.Status = Fail
	c.Remedy = restartFor(cl, s)
	switch {
	case setting.Overrides():
		c.Found += ", given on the server's command line"
		c.Remedy = offCommandLine(cl, name)
		return
	case setting.PendingRestart:
		c.Found += ", and changed to take effect with the next restart"
		will = "PostgreSQL will be restarted once"
	}
	if !e.mayRestart() {
		return
	}
	for other := range s.restartSettings() {
		if s.Settings[other].Overrides() {
			return // it would not start, or archive nothing
		}
	}
	if err := canRestart(cl); err != nil {
		c.Found += "; PostgreSQL cannot be restarted from here: " + err.Error()
		return
	}
	c.Status, c.Found, c.Remedy = Warn, c.Found+": "+will, ""
}

// offCommandLine says where the command line of a server comes from.
func offCommandLine(cl cluster, name string) string {
	switch {
	case serviceOf(cl.pid) != "":
		return "# take " + name + " out of the command line in its unit, and start the server again\n" + sudo() + "systemctl edit --full " + cl.Service
	case cl.debian != "":
		return "take " + name + " out of pg_ctl_options in " + filepath.Join(filepath.Dir(cl.configFile), "pg_ctl.conf") + ", and start the server again"
	}
	return "take " + name + " off the command line (" + filepath.Join(cl.DataDirectory, postgres.OptionsFile) + " has it as it was), and start the server again"
}

func (e *examination) archiveMode(cl cluster, s *inspected) Check {
	c := Check{Name: "archive_mode", Status: Pass, Found: s.Setting("archive_mode"), Expected: "on or always"}
	if c.Found != archiveModeOn && c.Found != archiveAlways { // a replica's "on" is a matter of its role
		e.restartedSetting(&c, cl, s, archiveMode, "it will be turned on, with one restart of PostgreSQL")
	}
	return c
}

func (e *examination) walLevel(cl cluster, s *inspected) Check {
	c := Check{Name: "wal_level", Status: Pass, Found: s.Setting("wal_level"), Expected: "replica or logical"}
	if _, needed := s.restartSettings()[walLevel]; needed {
		e.restartedSetting(&c, cl, s, walLevel, "it will be replica, with one restart of PostgreSQL")
	}
	return c
}

func (e *examination) archiveCommand(cl cluster, s *inspected) Check {
	ours := e.g.layout.ArchiveCommand(e.job.Name, cl.Name)
	c := Check{Name: "archive_command", Status: Pass, Found: "empty", Expected: "empty, or pgark's of this job"}
	command := s.archiveCommand
	switch {
	case !e.manages(cl):
		c.Expected = "pgark's of this job: with guest_settings.manage = false you set it yourself"
	case e.deployed:
		c.Expected = "pgark's of this job, as it was deployed"
	}
	wanted, err := e.g.plannedCommand(e.job.Name, cl.Instance.Instance, e.policy.ExistingArchiveCommand, command)
	own := e.ownOf(command, cl)
	set := change(cl, archiveCommand, ours)
	switch {
	case err == nil && command == wanted, command == ours, e.deployed && command == e.g.deployedCommand(e.job.Name, cl.Name):
		c.Found = "pgark's"
		if unchain(command) != "" {
			c.Found += ", and behind it the one that was there before"
		}
	case s.Settings[archiveCommand].Overrides():
		c.Status, c.Found, c.Remedy = Fail, program(command)+", given on the server's command line", offCommandLine(cl, archiveCommand)
	case e.deployed && e.manages(cl):
		c.Status, c.Found = Fail, program(command)
		c.Remedy = set
		if own {
			c.Found = "pgark's, and out of date"
		}
		if e.g.deployedCommand(e.job.Name, cl.Name) != ours {
			c.Remedy = "apply the job again (terraform apply): it puts the one that was there before behind pgark's, as it was"
		}
	case !e.manages(cl):
		c.Status, c.Found, c.Remedy = Fail, program(command), set
	case isNoCommand(command):
	case own:
		c.Found = "pgark's, and out of date"
	default:
		c.Found = program(command)
		if other := e.g.jobOfCommand(command); other != "" {
			c.Found = "that of pgark's job " + other
		}
		e.foreignCommand(&c, cl, err)
	}
	return c
}

// foreignCommand judges an archive_command of somebody else by what is to happen to it.
func (e *examination) foreignCommand(c *Check, cl cluster, chainErr error) {
	off := change(cl, archiveCommand, "")
	switch policy := e.policy.ExistingArchiveCommand; {
	case policy != commandChain && e.g.configured(e.job.Name, cl.Instance.Instance):
		// What is to happen to an existing command is said of one that was there before us.
		c.Status = Warn
		c.Found += ", after pgark's: that will be put in its place again"
	case policy == commandReplace:
		c.Status = Warn
		c.Found += ": it will be replaced, and put back when the job is destroyed; what it archives to gets no more WAL"
	case policy == commandChain:
		if chainErr == nil {
			c.Status = Warn
			c.Found += ": it will be chained: pgark's comes first, both have to succeed, and it is put back when the job is destroyed"
			return
		}
		c.Status = Fail
		c.Found += ", which cannot be chained: " + chainErr.Error()
		c.Expected = "a command that can stand behind pgark's in one line of shell"
		c.Remedy = "# put it in a script, and name that script instead:\n# " + change(cl, archiveCommand, "/path/to/script %p %f") +
			"\n# or turn it off:\n" + off
	default:
		c.Status = Fail
		c.Remedy = off + "\n# or let pgark replace it, or chain it behind its own: guest_settings = { existing_archive_command = \"replace\" } or \"chain\""
	}
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

// program names a foreign command by its program.
func program(command string) string {
	if isNoCommand(command) {
		return "empty"
	}
	name := ProgramOf(command)
	if name == unsaid {
		return "set by somebody else"
	}
	return "set by somebody else, to " + strconv.Quote(name)
}

func (e *examination) archiveLibrary(cl cluster, s *inspected) Check {
	c := Check{Name: "archive_library", Status: Pass, Found: "empty", Expected: "empty: PostgreSQL uses it in the place of archive_command"}
	if library := s.Setting(archiveLibrary); library != "" {
		c.Status, c.Found, c.Remedy = Fail, strconv.Quote(library), change(cl, archiveLibrary, "")
		switch {
		case s.Settings[archiveLibrary].Overrides():
			c.Found, c.Remedy = c.Found+", given on the server's command line", offCommandLine(cl, archiveLibrary)
		case !e.deployed && e.takesLibraryBack(cl):
			c.Status = Warn
			c.Found += ", set after pgark's archive_command: it will be taken back"
		}
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
		c.Remedy = change(cl, "full_page_writes", "on")
	}
	return c
}

// runner judges the runner of an instance of a job that is deployed.
func (e *examination) runner(s InstanceState) {
	c := Check{Name: "runner", Instance: s.Name, Status: Fail, Found: s.Runner, Expected: "running"}
	if s.Detail != "" {
		c.Found += ": " + s.Detail
	}
	again := "apply the job again: terraform apply"
	if os.Geteuid() != 0 && !e.g.withSystemd() {
		again += " (or, as its owner, start it: pgark run --job " + e.job.Name + " --instance " + s.Name + ")"
	}
	c.Remedy = again
	unit := e.g.layout.Unit(e.job.Name, s.Name)
	with := func(commands ...string) {
		if e.g.withSystemd() {
			for i := range commands {
				commands[i] = sudo() + "systemctl " + commands[i] + " " + unit
			}
			c.Remedy = strings.Join(commands, " && ") + "\n# its log: " + sudo() + "journalctl -u " + unit
		}
	}
	switch s.Runner {
	case RunnerRunning:
		c.Status, c.Remedy = Pass, ""
	case RunnerStopped:
		with("enable --now")
	case RunnerMasked:
		with("unmask", "enable --now")
	case RunnerSilent:
		with("restart")
	case RunnerOutdated:
		c.Status = Warn
		with("restart")
	case RunnerDisabled:
		c.Status = Warn
		with("enable --now")
	case RunnerEdited:
		c.Status = Warn
	}
	e.add(c)
}
