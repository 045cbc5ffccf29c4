//go:build linux

package guests

import (
	"fmt"
	"path"
	"slices"
	"strings"
)

// where a deployment may leave something.
const searched = "/etc /usr/bin /usr/sbin /usr/lib/systemd /usr/lib/tmpfiles.d /usr/lib/sysusers.d /usr/local /opt /srv /root /home " +
	"/var/lib /var/spool /var/tmp /tmp /run/pgark /run/systemd/system"

// passing names what changes by itself while a machine runs.
var passing = []string{
	"/var/lib/systemd/random-seed", "/var/lib/systemd/timers/*", "/var/lib/private", "/var/lib/sudo/*", "/var/lib/sudo/*/*",
	"/tmp/systemd-private-*", "/var/tmp/systemd-private-*",
}

// Files lists every file of the machine that a deployment could have touched (not /proc, /sys, /dev, logs, journals and
// PostgreSQL's data, but its configuration, units and crontabs), with mode, owner, and the digest of the content or the
// target of the link: one line a file, sorted by path. Two lists of the same machine can be compared. /run is looked at
// only in part, as much there differs after each boot.
func (g *Guest) Files() []string {
	g.n.t.Helper()
	listed := g.Run("find $(ls -d " + searched + " 2>/dev/null) -xdev -printf '%y\\t%m\\t%u:%g\\t%p\\t%l\\0'")
	type file struct{ kind, mode, owner, path, link string }
	var all []file
	var data []string // directories
	for entry := range strings.SplitSeq(strings.TrimSuffix(listed, "\x00"), "\x00") {
		f := strings.Split(entry, "\t")
		if len(f) != 5 {
			g.n.t.Fatalf("list files of %s: %q has %d fields, expected 5", g.Name, entry, len(f))
		}
		all = append(all, file{f[0], f[1], f[2], f[3], f[4]})
		if dir, name := path.Split(f[3]); name == "PG_VERSION" {
			data = append(data, dir)
		}
	}
	left := slices.DeleteFunc(all, func(f file) bool {
		for _, pattern := range passing {
			if ok, _ := path.Match(pattern, f.path); ok || strings.HasPrefix(f.path, pattern+"/") {
				return true
			}
			for dir := f.path; dir != "/" && strings.Contains(pattern, "systemd-private"); dir = path.Dir(dir) {
				if ok, _ := path.Match(pattern, dir); ok {
					return true
				}
			}
		}
		return slices.ContainsFunc(data, func(dir string) bool {
			rest, below := strings.CutPrefix(f.path, dir)
			conf := strings.HasSuffix(rest, ".conf") && !strings.Contains(rest, "/")
			return below && !conf
		})
	})
	var names strings.Builder
	for _, f := range left {
		if f.kind == "f" {
			names.WriteString(f.path + "\x00")
		}
	}
	// A file that vanished in between has no digest, which shows.
	sums, err := g.enter("xargs -0 sha256sum -z 2>/dev/null || true", []byte(names.String()))
	if err != nil {
		g.n.t.Fatalf("digest files of %s: %v", g.Name, err)
	}
	digests := make(map[string]string)
	for entry := range strings.SplitSeq(strings.TrimSuffix(sums, "\x00"), "\x00") {
		if digest, name, ok := strings.Cut(entry, "  "); ok {
			digests[name] = digest
		}
	}
	lines := make([]string, 0, len(left))
	slices.SortFunc(left, func(a, b file) int { return strings.Compare(a.path, b.path) })
	for _, f := range left {
		switch f.kind {
		case "f":
			f.link = digests[f.path]
		case "l":
			f.link = "-> " + f.link
		}
		lines = append(lines, strings.TrimSpace(fmt.Sprintf("%s %s %s %s %s", f.path, f.kind, f.mode, f.owner, f.link)))
	}
	return lines
}
