//go:build linux

package guest

import (
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
)

// managers are programs that decide about an instance's settings and role, by the name in their command line.
var managers = []string{"patroni", "repmgrd", "pg_autoctl", "stolon-keeper"}

// clusterManager is a program of managers that runs.
type clusterManager struct {
	name      string
	pid       int
	owner     string // operating system user
	directory string // the data directory that it manages; "" where that cannot be told
}

// findManagers looks for cluster managers among the processes of this machine; those in containers manage what is there.
func findManagers() []clusterManager {
	files, _ := filepath.Glob("/proc/[0-9]*/cmdline") // the pattern is well formed
	var out []clusterManager
	for _, f := range files {
		b, err := os.ReadFile(f)
		if err != nil || len(b) == 0 {
			continue
		}
		args := strings.Split(strings.TrimRight(string(b), "\x00"), "\x00")
		for i, arg := range args[:min(len(args), 3)] { // python3 -E /usr/bin/patroni …
			name := filepath.Base(arg)
			if !slices.Contains(managers, name) {
				continue
			}
			proc := filepath.Dir(f)
			if root, err := os.Readlink(filepath.Join(proc, "root")); err == nil && root != "/" {
				break
			}
			m := clusterManager{name: name}
			m.pid, _ = strconv.Atoi(filepath.Base(proc)) // the pattern admits numbers
			if info, err := os.Stat(proc); err == nil {
				m.owner = ownerOf(info)
			}
			m.directory = managedDirectory(proc, name, args[i+1:])
			if resolved, err := filepath.EvalSymlinks(m.directory); err == nil {
				m.directory = resolved
			}
			out = append(out, m)
			break
		}
	}
	return out
}

// patroniDirectory is the line of patroni.yml that names the data directory.
var patroniDirectory = regexp.MustCompile(`(?m)^\s*data_dir:\s*['"]?([^'"#\s]+)`)

// managedDirectory is the data directory that a manager's arguments, environment or configuration name; "" if none does,
// or it may not be read.
func managedDirectory(proc, name string, args []string) string {
	flag := func(names ...string) string {
		for i, a := range args {
			for _, n := range names {
				if a == n && i+1 < len(args) {
					return args[i+1]
				}
				if v, ok := strings.CutPrefix(a, n+"="); ok {
					return v
				}
			}
		}
		return ""
	}
	environment := func(name string) string {
		b, _ := os.ReadFile(filepath.Join(proc, "environ")) // another user's is not ours to read
		for v := range strings.SplitSeq(string(b), "\x00") {
			if v, ok := strings.CutPrefix(v, name+"="); ok {
				return v
			}
		}
		return ""
	}
	read := func(file string) string {
		if file != "" && !filepath.IsAbs(file) {
			file = filepath.Join(proc, "cwd", file)
		}
		b, _ := os.ReadFile(file) // see above
		return string(b)
	}
	switch name {
	case "patroni":
		if dir := environment("PATRONI_POSTGRESQL_DATA_DIR"); dir != "" {
			return dir
		}
		for _, a := range args {
			if !strings.HasPrefix(a, "-") {
				if m := patroniDirectory.FindStringSubmatch(read(a)); m != nil {
					return m[1]
				}
			}
		}
	case "repmgrd":
		file := flag("-f", "--config-file")
		if file == "" {
			file = "/etc/repmgr.conf"
		}
		dir, _ := confSetting(parseConf(read(file)), "data_directory")
		return dir
	case "pg_autoctl":
		if dir := flag("--pgdata"); dir != "" {
			return dir
		}
		return environment("PGDATA")
	case "stolon-keeper":
		dir := flag("--data-dir")
		if dir == "" {
			dir = environment("STKEEPER_DATA_DIR")
		}
		if dir != "" {
			return filepath.Join(dir, "postgres")
		}
	}
	return ""
}

// manages tells whether the manager decides about a cluster: by its data directory or, where that is not known, by its
// user.
func (m clusterManager) manages(c *cluster) bool {
	if m.directory != "" {
		return m.directory == c.DataDirectory
	}
	return m.owner == c.Owner
}
