package guest

import (
	"os"
	"path/filepath"
	"strings"
)

// maxIncludeDepth is how deep configuration files may include one another (conffiles.h, CONF_FILE_MAX_DEPTH): also what
// ends a circle.
const maxIncludeDepth = 10

// readConfFile reads a configuration file and, in their places, those that it includes, as guc-file.l does: a relative
// name starts from the directory of the file that names it, and include_dir takes the files *.conf in order of name. What
// cannot be read is left out: a server that runs has said so in its log, and one that is stopped will.
func readConfFile(path string) []confLine { return readConfFileAt(path, 0) }

func readConfFileAt(path string, depth int) []confLine {
	b, err := os.ReadFile(path)
	if err != nil || depth > maxIncludeDepth {
		return nil
	}
	var lines []confLine
	for _, l := range parseConf(string(b)) {
		target := l.value
		if !filepath.IsAbs(target) {
			target = filepath.Join(filepath.Dir(path), target)
		}
		switch l.name {
		case "include", "include_if_exists":
			lines = append(lines, readConfFileAt(target, depth+1)...)
		case "include_dir":
			entries, err := os.ReadDir(target) // in order of name
			if err != nil {
				continue
			}
			for _, e := range entries {
				if name := e.Name(); strings.HasSuffix(name, ".conf") && !strings.HasPrefix(name, ".") && !e.IsDir() {
					lines = append(lines, readConfFileAt(filepath.Join(target, name), depth+1)...)
				}
			}
		default:
			lines = append(lines, l)
		}
	}
	return lines
}
