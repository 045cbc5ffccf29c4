//go:build linux

package guest

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
)

// Remedies are commands for a shell on the guest, to be pasted by root or by somebody who may use sudo: every line is a
// command, or begins with a #. Where no command helps, the remedy is one sentence.

// sudo is what a command begins with that needs root; "" on a machine without sudo, where people become root themselves.
func sudo() string {
	if _, err := exec.LookPath("sudo"); err != nil {
		return ""
	}
	return "sudo "
}

// asOwner lets a command run as an operating system user.
func asOwner(owner, command string) string {
	if a, err := lookupAccount(owner); err == nil && a.uid == os.Geteuid() {
		return command
	}
	if s := sudo(); s != "" {
		return s + "-u " + owner + " " + command
	}
	return "runuser -u " + owner + " -- " + command
}

// statements run SQL in a cluster, as its superuser.
func statements(c cluster, sql ...string) string {
	command := psqlProgram()
	if len(sql) > 1 {
		command += " -v ON_ERROR_STOP=1" // what follows may need what comes before
	}
	command += fmt.Sprintf(" -h %s -p %d -d postgres", word(c.SocketDirectory), c.Port)
	for _, s := range sql {
		command += " -c " + shellQuote(s)
	}
	return asOwner(c.Owner, command)
}

// psqlProgram is psql by the name that a shell here finds it by.
func psqlProgram() string {
	if _, err := exec.LookPath("psql"); err == nil {
		return "psql"
	}
	for _, pattern := range []string{"/usr/lib/postgresql/*/bin/psql", "/usr/pgsql-*/bin/psql"} {
		if found, _ := filepath.Glob(pattern); len(found) > 0 { // the pattern is well formed
			return found[len(found)-1]
		}
	}
	return "psql"
}

// word quotes a path or name for a shell where it has to be quoted.
func word(s string) string {
	if s != "" && strings.IndexFunc(s, func(r rune) bool {
		return (r < 'a' || r > 'z') && (r < 'A' || r > 'Z') && (r < '0' || r > '9') && !strings.ContainsRune("/._-+@%=:,", r)
	}) < 0 {
		return s
	}
	return "'" + strings.ReplaceAll(s, "'", `'\''`) + "'"
}

// reload tells a cluster's server to read its configuration, without a connection.
func reload(c cluster) string {
	if program := pgCtl(c); filepath.IsAbs(program) {
		return asOwner(c.Owner, program+" reload -D "+word(c.DataDirectory))
	}
	return sudo() + "kill -HUP " + strconv.Itoa(c.pid)
}

// pgCtl is the pg_ctl that belongs to a cluster's server.
func pgCtl(c cluster) string {
	directories := []string{
		binaries(c.pid), filepath.Dir(c.commandLine.Program),
		fmt.Sprintf("/usr/lib/postgresql/%d/bin", c.Version), fmt.Sprintf("/usr/pgsql-%d/bin", c.Version), "/usr/bin",
	}
	for _, dir := range directories {
		if program := filepath.Join(dir, "pg_ctl"); filepath.IsAbs(program) && isFile(program) {
			return program
		}
	}
	return "pg_ctl"
}

// restartCommand restarts a cluster's server the way it was started.
func restartCommand(c cluster) string {
	major, name, debian := strings.Cut(c.debian, "/")
	switch service := serviceOf(c.pid); {
	case service != "":
		return sudo() + "systemctl restart " + service
	case debian:
		return sudo() + "pg_ctlcluster " + major + " " + name + " restart"
	}
	return asOwner(c.Owner, fmt.Sprintf("%s restart -w -D %s -l %s", pgCtl(c), word(c.DataDirectory), word(serverLog(c))))
}

// serverLog is where a server that pg_ctl starts anew goes on writing to: where it did, unless that was a terminal, or
// nothing that its owner may open. Without a name, pg_ctl would let it write where we do.
func serverLog(c cluster) string {
	file, err := os.Readlink(fmt.Sprintf("/proc/%d/fd/2", c.pid))
	if err != nil || !filepath.IsAbs(file) || !isFile(file) {
		return os.DevNull
	}
	owner, err := lookupAccount(c.Owner)
	if err != nil {
		return os.DevNull
	}
	if info, err := os.Stat(file); err != nil || !owner.may(info, mayWrite) {
		return os.DevNull
	}
	return file
}

// startCommand starts a stopped cluster.
func startCommand(c cluster) string {
	major, name, debian := strings.Cut(c.debian, "/")
	switch {
	case c.Service != "" && systemdRuns():
		return sudo() + "systemctl start " + c.Service
	case debian:
		return sudo() + "pg_ctlcluster " + major + " " + name + " start"
	}
	action, directory := "start", c.DataDirectory
	if filepath.IsAbs(c.commandLine.Directory) {
		directory = c.commandLine.Directory // that of the configuration, where it has one of its own
	}
	if len(c.commandLine.Settings) > 0 {
		action, directory = "restart", c.DataDirectory // starts it with the options that it had last (pg_ctl.c, do_restart)
	}
	return asOwner(c.Owner, fmt.Sprintf("%s %s -w -D %s -l %s", pgCtl(c), action, word(directory), word(filepath.Join(c.DataDirectory, "startup.log"))))
}

// change sets settings by ALTER SYSTEM, and reloads.
func change(c cluster, name, value string) string {
	return statements(c, alterStatement(name, value), "SELECT pg_reload_conf()")
}

func alterStatement(name, value string) string {
	if strings.Trim(value, "abcdefghijklmnopqrstuvwxyz") != "" || value == "" {
		value = "'" + strings.ReplaceAll(value, "'", "''") + "'"
	}
	return "ALTER SYSTEM SET " + name + " = " + value
}

// remount changes how the file system that a path lies on is mounted.
func remount(path, option string) string {
	return sudo() + "mount -o remount," + option + " $(findmnt -no TARGET -T " + word(path) + ")"
}
