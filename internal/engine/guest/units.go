//go:build linux

package guest

import (
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/pgark/terraform-provider-pgark/internal/engine/postgres"
)

// unitDirectories hold systemd's units, those that come first before others of the same name (systemd.unit(5)).
var unitDirectories = []string{"/etc/systemd/system", "/run/systemd/system", "/usr/local/lib/systemd/system", "/lib/systemd/system", "/usr/lib/systemd/system"}

// databaseUnit is a systemd unit that runs a PostgreSQL server.
type databaseUnit struct {
	name      string // postgresql-15.service, postgresql@orders.service
	directory string // its PGDATA, or what it gives to -D
}

// databaseUnits finds the units that start a server on a data directory which they name: packages for Red Hat and units
// that somebody has written do. Those of Debian name none; pg_ctlcluster looks for it below /etc/postgresql.
//
// Files are read, rather than systemd asked, because a unit that is not loaded is unknown to systemd until somebody knows
// its name.
func (g *local) databaseUnits() []databaseUnit {
	directories := make([]string, len(unitDirectories))
	for i, dir := range unitDirectories {
		directories[i] = g.systemPath(dir)
	}
	var out []databaseUnit
	for _, name := range unitNames(directories) {
		if dir := readUnit(directories, name).dataDirectory(name); dir != "" {
			out = append(out, databaseUnit{name: name, directory: dir})
		}
	}
	return out
}

// systemPath is a path of the machine, below the layout's root where that has one.
func (g *local) systemPath(path string) string { return filepath.Join("/"+g.layout.Root, path) }

// unitNames are the services for which there is a file, and the instances of templates that something names: a link
// (which is how they are enabled) or a directory of drop-ins.
func unitNames(directories []string) []string {
	var names []string
	add := func(name string) {
		if prefix, ok := strings.CutSuffix(name, ".service"); ok && !strings.HasSuffix(prefix, "@") {
			names = append(names, name)
		}
	}
	for _, dir := range directories {
		entries, _ := os.ReadDir(dir) // absent where the system has none
		for _, e := range entries {
			name := e.Name()
			add(strings.TrimSuffix(name, ".d"))
			if !strings.HasSuffix(name, ".wants") && !strings.HasSuffix(name, ".requires") {
				continue
			}
			links, _ := os.ReadDir(filepath.Join(dir, name))
			for _, l := range links {
				add(l.Name())
			}
		}
	}
	slices.Sort(names)
	return slices.Compact(names)
}

// unitText is what a unit and its drop-ins say in [Service], in order: key and value.
type unitText [][2]string

// readUnit reads a unit's file, or its template's, and the drop-ins of both.
func readUnit(directories []string, name string) unitText {
	files := []string{name}
	if prefix, rest, ok := strings.Cut(name, "@"); ok && rest != ".service" {
		files = append(files, prefix+"@.service")
	}
	var text unitText
	for _, file := range files {
		found := false
		for _, dir := range directories {
			path := filepath.Join(dir, file)
			if target, err := os.Readlink(path); err == nil && target == os.DevNull {
				return nil // masked
			}
			if b, err := os.ReadFile(path); err == nil {
				text, found = append(text, parseUnit(string(b))...), true
				break
			}
		}
		if found {
			break
		}
	}
	if text == nil {
		return nil
	}
	for _, file := range slices.Backward(files) { // what is for the instance comes last
		dropIns := map[string]string{}
		for _, dir := range slices.Backward(directories) {
			paths, _ := filepath.Glob(filepath.Join(dir, file+".d", "*.conf")) // the pattern is well formed
			for _, path := range paths {
				dropIns[filepath.Base(path)] = path
			}
		}
		names := make([]string, 0, len(dropIns))
		for n := range dropIns {
			names = append(names, n)
		}
		slices.Sort(names)
		for _, n := range names {
			if b, err := os.ReadFile(dropIns[n]); err == nil {
				text = append(text, parseUnit(string(b))...)
			}
		}
	}
	return text
}

// parseUnit reads the assignments of [Service] (systemd.syntax(7)).
func parseUnit(content string) unitText {
	var text unitText
	section := ""
	lines := strings.Split(content, "\n")
	for i := 0; i < len(lines); i++ {
		line := strings.TrimSpace(lines[i])
		if line == "" || line[0] == '#' || line[0] == ';' {
			continue
		}
		for strings.HasSuffix(line, `\`) && i+1 < len(lines) {
			i++
			if next := strings.TrimSpace(lines[i]); !strings.HasPrefix(next, "#") && !strings.HasPrefix(next, ";") {
				line = strings.TrimSuffix(line, `\`) + " " + next
			}
		}
		if strings.HasPrefix(line, "[") {
			section = line
			continue
		}
		if key, value, ok := strings.Cut(line, "="); ok && section == "[Service]" {
			text = append(text, [2]string{strings.TrimSpace(key), strings.TrimSpace(value)})
		}
	}
	return text
}

// dataDirectory is the data directory that the unit's server works in, or "" if it runs none, or does not say.
func (t unitText) dataDirectory(name string) string {
	environment := map[string]string{}
	var start []string
	for _, assignment := range t {
		key, value := assignment[0], expandSpecifiers(assignment[1], name)
		switch key {
		case "Environment":
			if value == "" {
				clear(environment)
			}
			for _, word := range unitWords(value) {
				if k, v, ok := strings.Cut(word, "="); ok {
					environment[k] = v
				}
			}
		case "EnvironmentFile":
			readEnvironmentFile(strings.TrimPrefix(value, "-"), environment)
		case "ExecStart":
			start = nil
			if value != "" {
				start = unitWords(strings.TrimLeft(value, "-@:+!|"))
			}
		}
	}
	if len(start) == 0 {
		return ""
	}
	for i, word := range start {
		for k, v := range environment {
			word = strings.ReplaceAll(strings.ReplaceAll(word, "${"+k+"}", v), "$"+k, v)
		}
		start[i] = word
	}
	dir := ""
	switch filepath.Base(start[0]) {
	case "postgres", "postmaster", "postgresql-ctl":
		dir = postgres.ParseCommandLine(start).Directory
	case "pg_ctl":
		for i, word := range start {
			switch {
			case (word == "-D" || word == "--pgdata") && i+1 < len(start):
				dir = start[i+1]
			case strings.HasPrefix(word, "--pgdata="):
				dir = strings.TrimPrefix(word, "--pgdata=")
			case strings.HasPrefix(word, "-D"):
				dir = strings.TrimPrefix(word, "-D")
			}
		}
	}
	if dir == "" {
		// A script that starts the server finds its directory here; what has no PGDATA either is no server.
		dir = environment["PGDATA"]
	}
	if !filepath.IsAbs(dir) {
		return ""
	}
	return filepath.Clean(dir)
}

// expandSpecifiers replaces those specifiers that a path of a server is made of.
func expandSpecifiers(value, name string) string {
	prefix, instance, _ := strings.Cut(strings.TrimSuffix(name, ".service"), "@")
	return strings.NewReplacer("%%", "%", "%i", instance, "%I", strings.ReplaceAll(instance, "-", "/"), "%p", prefix, "%n", name).Replace(value)
}

// unitWords splits a value at spaces; quotes keep words together.
func unitWords(value string) []string {
	var words []string
	var word strings.Builder
	quote, inWord := byte(0), false
	for i := range len(value) {
		c := value[i]
		switch {
		case quote != 0 && c == quote:
			quote = 0
		case quote == 0 && (c == '"' || c == '\''):
			quote, inWord = c, true
		case quote == 0 && (c == ' ' || c == '\t'):
			if inWord {
				words = append(words, word.String())
			}
			word.Reset()
			inWord = false
		default:
			word.WriteByte(c)
			inWord = true
		}
	}
	if inWord {
		words = append(words, word.String())
	}
	return words
}

func readEnvironmentFile(path string, into map[string]string) {
	b, err := os.ReadFile(path)
	if err != nil {
		return
	}
	for line := range strings.Lines(string(b)) {
		line = strings.TrimSpace(line)
		if k, v, ok := strings.Cut(line, "="); ok && !strings.HasPrefix(line, "#") {
			into[k] = strings.Trim(v, `"'`)
		}
	}
}
