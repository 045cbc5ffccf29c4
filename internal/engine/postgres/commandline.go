package postgres

import (
	"os"
	"path/filepath"
	"strings"
)

// OptionsFile is the file in the data directory that keeps how the server was started last.
const OptionsFile = "postmaster.opts"

// CommandLine is how a server was, or would be, started.
type CommandLine struct {
	Program   string            // path of postgres
	Directory string            // -D: the data directory, or that of the configuration files
	Settings  map[string]string // that are given, by name in lower case: they override every file
}

// takeValue are the single-letter options of the server that take a value (postmaster.c, PostmasterMain).
const takeValue = "BCcDdfhkNprStW"

// ParseCommandLine reads a server's arguments, the program first.
func ParseCommandLine(args []string) CommandLine {
	c := CommandLine{Settings: map[string]string{}}
	if len(args) == 0 {
		return c
	}
	set := func(assignment string) {
		name, value, _ := strings.Cut(assignment, "=")
		c.Settings[strings.ToLower(strings.ReplaceAll(name, "-", "_"))] = value
	}
	c.Program, args = args[0], args[1:]
	for len(args) > 0 {
		arg := args[0]
		args = args[1:]
		if long, ok := strings.CutPrefix(arg, "--"); ok {
			set(long)
			continue
		}
		if len(arg) < 2 || arg[0] != '-' {
			continue
		}
		letter, value := arg[1], arg[2:]
		if value == "" && len(args) > 0 && strings.IndexByte(takeValue, letter) >= 0 {
			value, args = args[0], args[1:]
		}
		switch letter {
		case 'D':
			c.Directory = value
		case 'p':
			c.Settings["port"] = value
		case 'k':
			c.Settings["unix_socket_directories"] = value
		case 'c':
			set(value)
		}
	}
	return c
}

// ReadCommandLine reads how the server of a data directory was started last, or runs: postmaster.opts, as
// CreateOptsFile of postmaster.c writes it. Every argument stands between double quotes, which are not escaped inside.
func ReadCommandLine(dataDirectory string) (CommandLine, error) {
	b, err := os.ReadFile(filepath.Join(dataDirectory, OptionsFile))
	if err != nil {
		return CommandLine{}, err
	}
	line, _, _ := strings.Cut(string(b), "\n")
	program, rest, _ := strings.Cut(line, ` "`)
	args := []string{program}
	if rest != "" {
		args = append(args, strings.Split(strings.TrimSuffix(rest, `"`), `" "`)...)
	}
	return ParseCommandLine(args), nil
}
