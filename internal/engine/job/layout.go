package job

import (
	"os"
	"path/filepath"
	"strings"
)

// Layout says where pgark keeps its files on a machine. Root is "" on real guests; tests and the demo set it to a
// directory of their own (environment variable PGARK_ROOT), and everything lies below it.
type Layout struct{ Root string }

// RootVariable is the environment variable that moves a Layout's root.
const RootVariable = "PGARK_ROOT"

const libDirectory = "usr/local/lib/pgark"

// FindLayout returns the layout that PGARK_ROOT names, or the one that the running binary was deployed into: a runner
// started by PostgreSQL as archive_command has no environment of ours, but it knows its own path.
func FindLayout() Layout {
	if root := os.Getenv(RootVariable); root != "" {
		return Layout{Root: filepath.Clean(root)}
	}
	exe, err := os.Executable()
	if err != nil {
		return Layout{}
	}
	if exe, err = filepath.EvalSymlinks(exe); err != nil {
		return Layout{}
	}
	if i := strings.LastIndex(exe, "/"+libDirectory+"/"); i > 0 {
		return Layout{Root: exe[:i]}
	}
	return Layout{}
}

func (l Layout) path(elem ...string) string {
	return filepath.Join(append([]string{"/" + l.Root}, elem...)...)
}

// BinaryDirectory holds the binary of the given SHA-256.
func (l Layout) BinaryDirectory(sha256 string) string { return l.path(libDirectory, sha256) }

// LibDirectory is the parent of all BinaryDirectories.
func (l Layout) LibDirectory() string { return l.path(libDirectory) }

// BinaryLink is the stable name of the current binary; archive_command names it.
func (l Layout) BinaryLink() string { return l.path("usr/local/bin/pgark") }

// ConfigDirectory is /etc/pgark.
func (l Layout) ConfigDirectory() string { return l.path("etc/pgark") }

// JobsDirectory holds the job files.
func (l Layout) JobsDirectory() string { return l.path("etc/pgark/jobs") }

// JobFile is the job's document.
func (l Layout) JobFile(job string) string { return l.path("etc/pgark/jobs", job+".json") }

// CredentialsFile holds the job's S3 keys, as AWS_* lines, mode 0600.
func (l Layout) CredentialsFile(job string) string {
	return l.path("etc/pgark/jobs", job+".credentials")
}

// StateDirectory is the runner's memory for one instance.
func (l Layout) StateDirectory(job, instance string) string {
	return l.path("var/lib/pgark", job, instance)
}

// StateRoot is the parent of all state directories.
func (l Layout) StateRoot() string { return l.path("var/lib/pgark") }

// SettingsFile remembers the PostgreSQL settings that we replaced.
func (l Layout) SettingsFile(job, instance string) string {
	return filepath.Join(l.StateDirectory(job, instance), "settings.json")
}

// SpoolDirectory is where WAL of an instance waits while the repository is away: in the temporary folder that the job
// declares, which its instances and other jobs may share, or beside what else the runner remembers.
func (l Layout) SpoolDirectory(j *Job, instance string) string {
	if j.WAL.TempFolder != "" {
		return filepath.Join(j.WAL.TempFolder, j.Name, instance)
	}
	return filepath.Join(l.StateDirectory(j.Name, instance), "spool")
}

// RunRoot is the parent of all run directories.
func (l Layout) RunRoot() string { return l.path("run/pgark") }

// RunDirectory holds sockets and process ids.
func (l Layout) RunDirectory(job string) string { return l.path("run/pgark", job) }

// Socket is where the instance's runner listens. The path must fit sun_path (107 bytes).
func (l Layout) Socket(job, instance string) string {
	return filepath.Join(l.RunDirectory(job), instance+".sock")
}

// PIDFile names the supervised runner's process where there is no systemd.
func (l Layout) PIDFile(job, instance string) string {
	return filepath.Join(l.RunDirectory(job), instance+".pid")
}

// LogFile is the supervised runner's log where there is no systemd.
func (l Layout) LogFile(job, instance string) string {
	return l.path("var/log/pgark", job, instance+".log")
}

// LogDirectory holds the job's logs where there is no systemd.
func (l Layout) LogDirectory(job string) string { return l.path("var/log/pgark", job) }

// LogRoot is the parent of all log directories.
func (l Layout) LogRoot() string { return l.path("var/log/pgark") }

// Unit is the systemd unit of an instance's runner, where there is systemd.
func (l Layout) Unit(job, instance string) string {
	return "pgark@" + job + "-" + instance + ".service"
}

// UnitFile is where Unit is written.
func (l Layout) UnitFile(job, instance string) string {
	return l.path("etc/systemd/system", l.Unit(job, instance))
}

// DebianClusters is where Debian keeps the configuration of clusters, <major>/<name>/postgresql.conf.
func (l Layout) DebianClusters() string { return l.path("etc/postgresql") }

// RedHatClusters is where packages for Red Hat put data directories, <major>/data.
func (l Layout) RedHatClusters() string { return l.path("var/lib/pgsql") }

// ArchiveCommand is the setting that PostgreSQL gets.
func (l Layout) ArchiveCommand(job, instance string) string {
	return l.BinaryLink() + " wal push --job " + job + " --instance " + instance + " %p"
}
