//go:build linux

package guests

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"crypto/rand"
	"encoding/pem"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/crypto/ssh"
	"golang.org/x/sys/unix"

	"github.com/pgark/terraform-provider-pgark/test/s3test"
)

const (
	// prefix begins the name of everything that lives outside a namespace of its own: "<prefix><pid>-<start time>-…".
	prefix = "pgark-guests-"

	netnsDir = "/run/netns" // of ip(8)

	cleanupTimeout = time.Minute

	firstGuest = 10 // last byte of the first address given away; the bridge has 1, this process 2
)

// subnets are where a network's 256 addresses may lie: private ones, and those for benchmarks.
var subnets = []string{"10.213.", "172.29.", "198.18."}

var networks atomic.Int64 // made by this process

// Network is a switch with an address for this process: a namespace with a bridge, to which guests, servers and this
// process are attached. Nothing listens outside namespaces that it made.
type Network struct {
	t         testing.TB
	name      string       // of the namespace; begins the names of all others
	link      string       // interface of this process
	subnet    netip.Prefix // of 256 addresses
	dir       string       // of everything on disk
	cgroup    string       // parent of the machines' control groups
	publicKey string       // one line of authorized_keys
	tools     string       // the project's

	mu         sync.Mutex // guards what follows, and knownHosts
	guests     []*Guest
	namespaces []string
	ports      int
	bases      map[string]*os.File // base systems in use, locked, so that install.sh leaves them
}

// NewNetwork makes a network that ends with the test.
func NewNetwork(t testing.TB) *Network {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Fatal("guests: booting systems needs root: namespaces, mounts and control groups")
	}
	n := &Network{
		t:     t,
		name:  fmt.Sprintf("%s-n%d", owner(), networks.Add(1)),
		tools: tools(t),
		bases: make(map[string]*os.File),
	}
	t.Cleanup(n.close)
	if err := n.open(); err != nil {
		t.Fatalf("guests: make a network: %v", err)
	}
	return n
}

func (n *Network) open() error {
	parent, err := cgroup2()
	if err != nil {
		return err
	}
	n.cgroup = filepath.Join(parent, n.name)
	if err := n.addNamespace(n.name); err != nil {
		return err
	}
	// Only one at a time looks for a free subnet or for what others left behind.
	lock, err := os.Open(netnsDir)
	if err != nil {
		return err
	}
	defer lock.Close()
	if err := unix.Flock(int(lock.Fd()), unix.LOCK_EX); err != nil {
		return fmt.Errorf("lock %s: %w", netnsDir, err)
	}
	sweep(parent)
	if n.dir, err = os.MkdirTemp("", n.name+"-"); err != nil { // not t.TempDir: sweep must know whose it is
		return err
	}
	if err := errors.Join(os.Chmod(n.dir, 0o755), os.Mkdir(n.cgroup, 0o755), n.makeKey()); err != nil {
		return err
	}
	if err := n.chooseSubnet(); err != nil {
		return err
	}
	// The link goes away with the namespace.
	if err := ip("", fmt.Sprintf("link add name %[1]s type veth peer name host netns %[2]s\naddress add %[3]s/24 dev %[1]s\nlink set %[1]s up\n",
		n.link, n.name, n.address(2))); err != nil {
		return err
	}
	return ip(n.name, fmt.Sprintf(`link set lo up
link add name bridge type bridge stp_state 0 forward_delay 0
address add %s/24 dev bridge
link set bridge up
link set host master bridge
link set host up
`, n.address(1)))
}

// chooseSubnet finds addresses that no route of this machine covers, and a name for the interface.
func (n *Network) chooseSubnet() error {
	out, err := exec.CommandContext(context.Background(), "ip", "-4", "route", "show", "table", "all").Output()
	if err != nil {
		return fmt.Errorf("list routes: %w", err)
	}
	var taken []netip.Prefix
	for line := range strings.Lines(string(out)) {
		for _, word := range strings.Fields(line)[:min(2, len(strings.Fields(line)))] { // "local 10.0.0.1 dev …" or "10.0.0.0/8 dev …"
			if p, err := netip.ParsePrefix(word); err == nil {
				taken = append(taken, p)
			} else if a, err := netip.ParseAddr(word); err == nil {
				taken = append(taken, netip.PrefixFrom(a, a.BitLen()))
			}
		}
	}
	for _, begin := range subnets {
		for i := range 256 {
			p := netip.MustParsePrefix(fmt.Sprintf("%s%d.0/24", begin, i))
			link := fmt.Sprintf("pgk%s%d", strings.ReplaceAll(begin, ".", "-"), i) // at most 15 characters
			if _, err := os.Stat("/sys/class/net/" + link); err == nil || slices.ContainsFunc(taken, p.Overlaps) {
				continue
			}
			n.subnet, n.link = p, link
			return nil
		}
	}
	return fmt.Errorf("no free subnet: routes of this machine cover %s", strings.Join(subnets, "0.0/16, ")+"0.0/16")
}

// address is the address of the network with that last byte.
func (n *Network) address(last int) string {
	a := n.subnet.Addr().As4()
	a[3] = byte(last)
	return netip.AddrFrom4(a).String()
}

func (n *Network) addNamespace(name string) error {
	n.mu.Lock()
	n.namespaces = append(n.namespaces, name)
	n.mu.Unlock()
	return ip("", "netns add "+name)
}

// attach makes a namespace with an address on the bridge. port is the interface on the network's side.
func (n *Network) attach() (namespace, port, address string, err error) {
	n.mu.Lock()
	i := n.ports
	n.ports++
	n.mu.Unlock()
	if firstGuest+i > 254 {
		return "", "", "", errors.New("the network is full")
	}
	namespace, port, address = fmt.Sprintf("%s-p%d", n.name, i), fmt.Sprintf("port%d", i), n.address(firstGuest+i)
	if err := n.addNamespace(namespace); err != nil {
		return "", "", "", err
	}
	if err := ip(n.name, fmt.Sprintf("link add name %[1]s type veth peer name eth0 netns %[2]s\nlink set %[1]s master bridge\nlink set %[1]s up\n",
		port, namespace)); err != nil {
		return "", "", "", err
	}
	return namespace, port, address, ip(namespace, fmt.Sprintf("link set lo up\naddress add %s/24 dev eth0\nlink set eth0 up\n", address))
}

// S3 starts an S3 server in a namespace of its own on the network, which guests and this process reach at its Endpoint.
func (n *Network) S3() *s3test.Server {
	n.t.Helper()
	namespace, _, address, err := n.attach()
	if err != nil {
		n.t.Fatalf("guests: attach an S3 server: %v", err)
	}
	return s3test.StartInNamespace(n.t, filepath.Join(netnsDir, namespace), address+":7070")
}

// Key is a key pair that every guest of the network accepts for root. It was made for this network.
func (n *Network) Key() (privateFile, public string) { return n.path("id_ed25519"), n.publicKey }

// KnownHosts is a known_hosts file with the keys of all guests booted so far; Boot adds to it.
func (n *Network) KnownHosts() string { return n.path("known_hosts") }

func (n *Network) path(elem ...string) string {
	return filepath.Join(append([]string{n.dir}, elem...)...)
}

func (n *Network) makeKey() error {
	private, public, err := newKey(n.name)
	if err != nil {
		return err
	}
	n.publicKey = public
	file, _ := n.Key()
	return errors.Join(os.WriteFile(file, private, 0o600), os.WriteFile(file+".pub", []byte(public+"\n"), 0o644),
		os.WriteFile(n.KnownHosts(), nil, 0o644))
}

// newKey makes a key pair in OpenSSH's format.
func newKey(comment string) (private []byte, public string, err error) {
	pub, priv, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		return nil, "", err
	}
	block, err := ssh.MarshalPrivateKey(priv, comment)
	if err != nil {
		return nil, "", err
	}
	key, err := ssh.NewPublicKey(pub)
	if err != nil {
		return nil, "", err
	}
	return pem.EncodeToMemory(block), strings.TrimSpace(string(ssh.MarshalAuthorizedKey(key))), nil
}

// close removes everything that was made, as far as it was.
func (n *Network) close() {
	if n.t.Failed() {
		for _, g := range n.guests {
			g.tell()
		}
	}
	var wg sync.WaitGroup
	for _, g := range n.guests {
		wg.Go(g.end)
	}
	wg.Wait()
	if n.link != "" {
		_ = ip("", "link delete "+n.link) // it may never have come to be
	}
	for _, ns := range n.namespaces {
		if err := ip("", "netns delete "+ns); err != nil {
			n.t.Errorf("guests: clean up: %v", err)
		}
	}
	if err := errors.Join(removeCgroup(n.cgroup), removeTree(n.dir)); err != nil {
		n.t.Errorf("guests: clean up: %v", err)
	}
	for _, base := range n.bases {
		base.Close()
	}
}

// owner is the beginning of the names that belong to this process. The time of its start tells it from others that had
// its number.
func owner() string {
	pid := os.Getpid()
	return fmt.Sprintf("%s%d-%s", prefix, pid, startTime(pid))
}

// startTime of a process, in ticks since the machine's boot; "" if there is none.
func startTime(pid int) string {
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return ""
	}
	fields := strings.Fields(string(stat[bytes.LastIndexByte(stat, ')')+1:]))
	return fields[19] // field 22 of proc(5)
}

// orphaned tells whether a name is ours and the process that made it is gone.
func orphaned(name string) bool {
	rest, ours := strings.CutPrefix(name, prefix)
	fields := strings.SplitN(rest, "-", 3)
	if !ours || len(fields) != 3 {
		return false
	}
	pid, err := strconv.Atoi(fields[0])
	return err == nil && startTime(pid) != fields[1]
}

// sweep removes what tests left behind that were killed. What it cannot remove stays for the next one.
func sweep(cgroups string) {
	for _, c := range orphans(cgroups) {
		_ = removeCgroup(c) // first of all: it ends the processes
	}
	for _, ns := range orphans(netnsDir) {
		_ = ip("", "netns delete "+filepath.Base(ns))
	}
	for _, dir := range orphans(os.TempDir()) {
		_ = removeTree(dir)
	}
}

func orphans(dir string) []string {
	entries, _ := os.ReadDir(dir)
	var found []string
	for _, e := range entries {
		if orphaned(e.Name()) {
			found = append(found, filepath.Join(dir, e.Name()))
		}
	}
	return found
}

// removeTree removes a directory, unless something is mounted below it.
func removeTree(dir string) error {
	if dir == "" {
		return nil
	}
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return err
	}
	if bytes.Contains(mounts, []byte(" "+dir+"/")) {
		return fmt.Errorf("%s: something is mounted below it", dir)
	}
	return os.RemoveAll(dir)
}

// cgroup2 is where the unified hierarchy is mounted.
func cgroup2() (string, error) {
	for _, dir := range []string{"/sys/fs/cgroup", "/sys/fs/cgroup/unified"} {
		var s unix.Statfs_t
		if unix.Statfs(dir, &s) == nil && s.Type == unix.CGROUP2_SUPER_MAGIC {
			return dir, nil
		}
	}
	return "", errors.New("no cgroup2 file system at /sys/fs/cgroup or /sys/fs/cgroup/unified: mount one")
}

// removeCgroup kills all processes of a control group and of those below, and removes them.
func removeCgroup(dir string) error {
	deadline := time.Now().Add(cleanupTimeout)
	for {
		if err := os.WriteFile(filepath.Join(dir, "cgroup.kill"), []byte("1"), 0); errors.Is(err, os.ErrNotExist) {
			return nil
		}
		err := removeCgroups(dir)
		if err == nil || time.Now().After(deadline) {
			return err
		}
		time.Sleep(10 * time.Millisecond) // the processes are on their way out
	}
}

func removeCgroups(dir string) error {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return err
	}
	for _, e := range entries {
		if e.IsDir() {
			err = errors.Join(err, removeCgroups(filepath.Join(dir, e.Name())))
		}
	}
	if err != nil {
		return err
	}
	return syscall.Rmdir(dir)
}

// tools is the directory of the project's tools.
func tools(t testing.TB) string {
	t.Helper()
	if dir := os.Getenv("PGARK_TOOLS"); dir != "" {
		return dir
	}
	return filepath.Join(moduleRoot(t), ".tools")
}

func moduleRoot(t testing.TB) string {
	t.Helper()
	dir, err := os.Getwd()
	if err != nil {
		t.Fatal(err)
	}
	for dir != "/" {
		if _, err := os.Stat(filepath.Join(dir, "go.mod")); err == nil {
			return dir
		}
		dir = filepath.Dir(dir)
	}
	t.Fatal("guests: no go.mod above the working directory")
	return ""
}

// ip runs commands of ip(8), one a line, in a network namespace; "" is that of this machine.
func ip(namespace, batch string) error {
	args := []string{"-batch", "-"}
	if namespace != "" {
		args = append([]string{"-netns", namespace}, args...)
	}
	cmd := exec.CommandContext(context.Background(), "ip", args...)
	cmd.Stdin = strings.NewReader(batch)
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("ip %s: %w: %s\n%s", strings.Join(args, " "), err, out, batch)
	}
	return nil
}
