//go:build linux

package guest

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
)

// kernelPath is a path of the kernel's own file systems; tests have some of their own.
func (g *local) kernelPath(elem ...string) string {
	return filepath.Join(append([]string{"/" + g.kernel}, elem...)...)
}

// securityModule looks whether SELinux or AppArmor stands between PostgreSQL, its archive_command and the runner. What
// they forbid shows when it happens, so this can only warn.
func (e *examination) securityModule() {
	c := Check{Name: "security_module", Status: Pass, Expected: "nothing that keeps PostgreSQL from running pgark, or pgark from reading PostgreSQL's files"}
	selinux := e.g.seLinux()
	var confined, profiles, found, remedy []string
	for _, cl := range e.clusters {
		if !cl.Running {
			continue
		}
		domain, profile := e.g.confinement(cl.pid)
		if domain != "" {
			confined = append(confined, fmt.Sprintf("process %d of %s is in the domain %s", cl.pid, cl.Name, domain))
		}
		if profile != "" {
			found = append(found, fmt.Sprintf("AppArmor confines process %d of %s by the profile %s", cl.pid, cl.Name, profile))
			profiles = append(profiles, profile)
		}
	}
	if selinux != "" {
		found = append([]string{"SELinux is " + selinux}, append(confined, found...)...)
	}
	if selinux == "enforcing" {
		c.Status = Warn
		remedy = append(remedy, e.allowSELinux())
	}
	for _, p := range profiles {
		if strings.HasSuffix(p, "(enforce)") {
			c.Status = Warn
			remedy = append(remedy, e.allowAppArmor(strings.TrimSuffix(p, " (enforce)")))
		}
	}
	if len(found) == 0 {
		found = []string{"none"}
		if _, err := os.Stat(e.g.kernelPath("sys/kernel/security/apparmor/profiles")); err == nil {
			found = []string{"AppArmor, which confines no PostgreSQL here"}
		}
	}
	c.Found, c.Remedy = strings.Join(found, "; "), strings.Join(remedy, "\n")
	e.add(c)
}

// seLinux is "enforcing" or "permissive"; "" where there is none.
func (g *local) seLinux() string {
	b, err := os.ReadFile(g.kernelPath("sys/fs/selinux/enforce"))
	if err != nil {
		return ""
	}
	if strings.TrimSpace(string(b)) == "1" {
		return "enforcing"
	}
	return "permissive"
}

// confinement reads the security label of a process: an SELinux domain, as postgresql_t, or an AppArmor profile with its
// mode, as "/usr/lib/postgresql/15/bin/postgres (enforce)". Both are "" for what nothing confines.
func (g *local) confinement(pid int) (domain, profile string) {
	label := func(elem ...string) string {
		b, err := os.ReadFile(g.kernelPath(append([]string{"proc", strconv.Itoa(pid), "attr"}, elem...)...))
		if err != nil { // no security module answers there, or the process ended
			return ""
		}
		return strings.TrimRight(string(b), "\x00\n")
	}
	for _, l := range []string{label("current"), label("apparmor", "current")} {
		if parts := strings.Split(l, ":"); len(parts) >= 4 { // user:role:type:level
			domain = parts[2]
		} else if l != "" && l != "unconfined" && (strings.HasSuffix(l, ")")) {
			profile = l
		}
	}
	return domain, profile
}

// allowSELinux labels what pgark installs as what it is. The rest of what a policy forbids differs from one to the next: it
// is taken from what was denied.
func (e *examination) allowSELinux() string {
	l := e.g.layout
	s := sudo()
	return fmt.Sprintf("# PostgreSQL runs %s and connects to sockets below %s; pgark, a service, reads PostgreSQL's files\n", l.BinaryLink(), l.RunRoot()) +
		fmt.Sprintf("%ssemanage fcontext -a -t bin_t '%s/[^/]*/pgark' && %smkdir -p %s && %srestorecon -R %s\n", s, l.LibDirectory(), s, l.LibDirectory(), s, l.LibDirectory()) +
		"# if applying the job then fails, this allows what was denied:\n" +
		fmt.Sprintf("%sausearch -m avc -ts recent --raw | audit2allow -M pgark && %ssemodule -i pgark.pp", s, s)
}

// allowAppArmor adds to a profile what archive_command does.
func (e *examination) allowAppArmor(profile string) string {
	l := e.g.layout
	file := strings.ReplaceAll(strings.TrimPrefix(profile, "/"), "/", ".") // as packages name them
	rules := []string{
		l.BinaryLink() + " ix,", l.LibDirectory() + "/*/pgark mrix,", l.RunRoot() + "/** rw,", l.JobsDirectory() + "/* r,",
		filepath.Dir(l.StateDirectory("*", "x")) + "/** rwk,",
	}
	return "# PostgreSQL runs " + l.BinaryLink() + ", which connects to sockets below " + l.RunRoot() + "\n" +
		"printf '  %s\\n' '" + strings.Join(rules, "' '") + "' | " + sudo() + "tee -a /etc/apparmor.d/local/" + file +
		" && " + sudo() + "apparmor_parser -r /etc/apparmor.d/" + file
}
