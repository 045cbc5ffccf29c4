//go:build linux

// Package guests boots whole Debian systems for tests: systemd, sshd, sudo, cron and PostgreSQL, each in a network
// namespace with an address of its own, reached over SSH like any server. The systems are made once by install.sh, and
// booted with systemd-nspawn over a throw-away overlay, so that every test begins with the same clean machine. What
// makes a machine itself differs in each: name, address, machine-id, SSH host key, PostgreSQL's system identifier.
//
//	net := guests.NewNetwork(t)
//	bucket := net.S3().Location("bucket")
//	web := net.Boot(guests.Options{})           // PostgreSQL 15, running
//	web.AddUser("deploy", "deploy ALL=(root) NOPASSWD: ALL")
//	key, _ := net.Key()                         // ssh -i key -o UserKnownHostsFile=net.KnownHosts() deploy@web.Address
//	web.Run("systemctl is-active postgresql@15-main")
//	web.Reboot()
//
// Machines see each other, the S3 server and this process, and nothing else: no internet, no name server. Their clock is
// this machine's, /tmp is a tmpfs, and what they write survives Reboot and Kill but is never flushed to the disk.
//
// It needs root, as namespaces, mounts and control groups do, and cgroup2. Everything ends with the test: containers,
// namespaces, mounts, files. What a test that was killed left behind, the next NewNetwork removes.
package guests

import (
	"fmt"
	"strings"
)

// Options describe a machine. The zero value is a Debian bookworm server.
type Options struct {
	Suite string // "bookworm" (default: PostgreSQL 15 of Debian, cluster 15/main, running) or "trixie" (17)
	Name  string // host name, of letters, digits and "-"; "" for one of its own

	// WithoutPostgreSQL leaves Debian's own cluster out. Programs and account stay.
	WithoutPostgreSQL bool

	// NoSystemd boots a small init that starts sshd, cron and PostgreSQL, and lacks systemctl: a guest without systemd.
	NoSystemd bool

	// Hidden makes a machine that other machines reach, but not this process: one behind a bastion.
	Hidden bool
}

// Run runs a shell script (bash -e) as root on the machine, not over SSH, and
// returns its standard output without the last newline; the test fails if it does not exit with 0.
func (g *Guest) Run(script string) string {
	g.n.t.Helper()
	out, err := g.Try(script)
	if err != nil {
		g.n.t.Fatalf("%v\noutput: %s", err, out)
	}
	return out
}

// Try is Run for scripts that may fail. The error holds what came on standard error.
func (g *Guest) Try(script string) (output string, err error) {
	return g.enter(script, nil)
}

// Put writes a file on the machine, owned by root, in a directory that is there.
func (g *Guest) Put(path string, content []byte, mode uint32) {
	g.n.t.Helper()
	script := fmt.Sprintf("rm -f %[1]s; umask 077; cat >%[1]s; chmod %[2]o %[1]s", quote(path), mode)
	if _, err := g.enter(script, content); err != nil {
		g.n.t.Fatalf("write %s: %v", path, err)
	}
}

// HostKey is the public key of its sshd, "ssh-ed25519 AAAA…".
func (g *Guest) HostKey() string { return g.hostKey }

// AddUser makes an account that logs in with the network's key, with the given lines in /etc/sudoers.d ("" for none).
// It has no password: set one with chpasswd.
func (g *Guest) AddUser(name, sudoers string) {
	g.n.t.Helper()
	g.Run("useradd --create-home --shell /bin/bash --password '*' " + quote(name))
	g.Run(fmt.Sprintf("install -d -m 700 -o %[1]s -g %[1]s /home/%[1]s/.ssh", name))
	keys := fmt.Sprintf("/home/%s/.ssh/authorized_keys", name)
	g.Put(keys, []byte(g.n.publicKey+"\n"), 0o600)
	g.Run(fmt.Sprintf("chown %[1]s:%[1]s %[2]s", name, keys))
	if sudoers != "" {
		g.Put("/etc/sudoers.d/"+name, []byte(strings.TrimSuffix(sudoers, "\n")+"\n"), 0o440)
		g.Run("visudo --check --quiet")
	}
}

// MountNoexec mounts a small tmpfs with noexec on a directory of the machine, until it reboots.
func (g *Guest) MountNoexec(dir string) {
	g.n.t.Helper()
	g.Run(fmt.Sprintf("mkdir -p %[1]s; mount -t tmpfs -o noexec,nosuid,nodev,mode=1777,size=256m tmpfs %[1]s", quote(dir)))
}

// SmallDisk mounts a file system of so many MiB on a directory of the machine, made where it is missing, until it
// reboots. Owner and mode are those of the directory.
func (g *Guest) SmallDisk(dir string, mib int) {
	g.n.t.Helper()
	g.Run(fmt.Sprintf("mkdir -p %[1]s; mount -t tmpfs -o $(stat -c mode=%%a,uid=%%u,gid=%%g %[1]s),size=%[2]dm tmpfs %[1]s", quote(dir), mib))
}

// SQL runs a statement as postgres in the cluster at port and socket directory and returns the result like psql -At.
func (g *Guest) SQL(socketDir string, port int, statement string) string {
	g.n.t.Helper()
	out, err := g.enter(fmt.Sprintf("cd /; exec runuser -u postgres -- psql -XAtq -v ON_ERROR_STOP=1 -h %s -p %d -d postgres -f -", quote(socketDir), port),
		[]byte(statement))
	if err != nil {
		g.n.t.Fatalf("%s: %v", statement, err)
	}
	return out
}

// quote makes a word of the shell.
func quote(s string) string { return "'" + strings.ReplaceAll(s, "'", `'\''`) + "'" }
