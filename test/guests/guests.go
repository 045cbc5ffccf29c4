//go:build linux

// Package guests boots whole Debian systems for tests: systemd, sshd, sudo and PostgreSQL, each in a network namespace
// with an address of its own, reached over SSH like any server. They are made once with mmdebstrap (test/setup.sh guests)
// and booted with systemd-nspawn over a throw-away overlay, so that every test begins with the same clean machine.
//
// Everything ends with the test: containers, namespaces, mounts, files.
package guests

import (
	"testing"

	"github.com/pgark/terraform-provider-pgark/test/s3test"
)

// Network is a switch with an address for this process: a namespace with a bridge, to which guests, servers and this
// process are attached. Nothing listens outside namespaces that it made.
type Network struct{}

// NewNetwork makes a network that ends with the test.
func NewNetwork(t *testing.T) *Network { panic("unimplemented") }

// S3 starts an S3 server in a namespace of its own on the network, which guests and this process reach at its Endpoint.
func (n *Network) S3() *s3test.Server { panic("unimplemented") }

// Key is a key pair that every guest of the network accepts for root. It was made for this network.
func (n *Network) Key() (privateFile, public string) { panic("unimplemented") }

// KnownHosts is a known_hosts file with the keys of all guests booted so far, and of those that will be.
func (n *Network) KnownHosts() string { panic("unimplemented") }

// Options describe a machine.
type Options struct {
	Suite string // "bookworm" (default: PostgreSQL 15 of Debian, cluster 15/main, running) or "trixie" (17)
	Name  string // host name; "" for one of its own

	// WithoutPostgreSQL stops and disables Debian's own cluster.
	WithoutPostgreSQL bool

	// NoSystemd boots a small init that only runs sshd: a guest without systemd.
	NoSystemd bool
}

// Guest is a booted machine.
type Guest struct {
	Name    string // host name
	Address string // its IP address
}

// Boot starts a machine and waits until it runs and sshd answers.
func (n *Network) Boot(o Options) *Guest { panic("unimplemented") }

// BootAll starts several machines side by side.
func (n *Network) BootAll(o ...Options) []*Guest { panic("unimplemented") }

// Run runs a shell script as root on the machine, not over SSH, and returns what it printed; the test fails if it does
// not exit with 0.
func (g *Guest) Run(script string) string { panic("unimplemented") }

// Try is Run for scripts that may fail.
func (g *Guest) Try(script string) (output string, err error) { panic("unimplemented") }

// Put writes a file on the machine.
func (g *Guest) Put(path string, content []byte, mode uint32) { panic("unimplemented") }

// HostKey is the public key of its sshd, "ssh-ed25519 AAAA…".
func (g *Guest) HostKey() string { panic("unimplemented") }

// AddUser makes an account that logs in with the network's key, with the given lines in /etc/sudoers.d ("" for none).
func (g *Guest) AddUser(name, sudoers string) { panic("unimplemented") }

// Cluster describes a PostgreSQL cluster that AddCluster makes.
type Cluster struct {
	Major         int    // 13 to 18
	DataDirectory string // made by postgres, who owns it
	Port          int
	SocketDir     string // made where it is missing
	Name          string // cluster_name; "" for none
	Checksums     bool
	SegmentMiB    int               // 0: 16
	Settings      map[string]string // of postgresql.conf
	Unit          string            // of a systemd service that runs it and starts it at boot
}

// AddCluster makes and starts a cluster of any major, with binaries that the machine sees at /opt/postgresql/<major>.
func (g *Guest) AddCluster(c Cluster) { panic("unimplemented") }

// SQL runs a statement as postgres in the cluster at port and socket directory and returns the result like psql -At.
func (g *Guest) SQL(socketDir string, port int, statement string) string { panic("unimplemented") }

// Reboot shuts the machine down and boots it again with the same disk and address.
func (g *Guest) Reboot() { panic("unimplemented") }

// Kill ends the machine as a power cut does. Start boots it again.
func (g *Guest) Kill() { panic("unimplemented") }

// Start boots a machine that was killed.
func (g *Guest) Start() { panic("unimplemented") }

// Cut takes the machine off the network; Mend puts it back.
func (g *Guest) Cut() { panic("unimplemented") }

// Mend undoes Cut.
func (g *Guest) Mend() { panic("unimplemented") }

// MountNoexec mounts a small tmpfs with noexec on a directory of the machine.
func (g *Guest) MountNoexec(dir string) { panic("unimplemented") }

// SmallDisk mounts a file system of so many MiB on a directory of the machine, made where it is missing.
func (g *Guest) SmallDisk(dir string, mib int) { panic("unimplemented") }

// Files lists every file of the machine that a deployment could have touched (not /proc, /sys, /dev, logs, journals and
// PostgreSQL's data), with mode, owner and a digest: one line a file. Two lists of the same machine can be compared.
func (g *Guest) Files() []string { panic("unimplemented") }
