//go:build linux

package guests

import (
	"bufio"
	"bytes"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

const (
	bootTimeout     = 3 * time.Minute // on a machine that is busy with other tests
	shutdownTimeout = 2 * time.Minute
	scriptTimeout   = 10 * time.Minute // of Run

	bootsAtOnce = 4 // of BootAll: more only wait for each other's processor time
)

// majors that the suites bring.
var majors = map[string]int{"bookworm": 15, "trixie": 17}

// Guest is a booted machine.
type Guest struct {
	Name    string // host name
	Address string // its IP address; sshd listens at port 22

	n         *Network
	o         Options
	hostKey   string
	namespace string
	port      string // its plug in the network's namespace
	dir       string // on this machine: all that follows
	base      string // the system made by install.sh
	disk      string // what lies over base, or a copy of base if overlay is false
	overlay   bool
	cgroup    string
	cut       bool

	supervisor *exec.Cmd     // systemd-nspawn; nil while the machine is off
	exited     chan struct{} // closed when it is gone
	booted     bool          // at least once
}

// Boot starts a machine and waits until all of it runs and sshd answers.
func (n *Network) Boot(o Options) *Guest {
	n.t.Helper()
	return n.BootAll(o)[0]
}

// BootAll starts several machines side by side.
func (n *Network) BootAll(options ...Options) []*Guest {
	n.t.Helper()
	for _, o := range options {
		if err := n.install(o); err != nil { // before the clock of the boot runs
			n.t.Fatalf("guests: %v", err)
		}
	}
	guests, errs := make([]*Guest, len(options)), make([]error, len(options))
	turn := make(chan struct{}, bootsAtOnce)
	var wg sync.WaitGroup
	for i, o := range options {
		wg.Go(func() {
			turn <- struct{}{}
			defer func() { <-turn }()
			guests[i], errs[i] = n.boot(o)
		})
	}
	wg.Wait()
	if err := errors.Join(errs...); err != nil {
		n.t.Fatalf("guests: %v", err)
	}
	return guests
}

// install makes the base system unless it is there, and keeps it there while the network is.
func (n *Network) install(o Options) error {
	dir, err := n.base(o.suite())
	if err != nil || n.bases[dir] != nil {
		return err
	}
	if _, err := os.Stat(dir); errors.Is(err, fs.ErrNotExist) {
		cmd := exec.CommandContext(n.t.Context(), "bash", n.recipe(), filepath.Dir(dir), o.suite())
		if out, err := cmd.CombinedOutput(); err != nil {
			return fmt.Errorf("make a Debian %s system: %w; \"test/setup.sh guests\" installs what it needs\n%s", o.suite(), err, out)
		}
	}
	base, err := os.Open(dir)
	if err != nil {
		return err
	}
	n.bases[dir] = base
	return unix.Flock(int(base.Fd()), unix.LOCK_SH)
}

func (n *Network) recipe() string {
	return filepath.Join(moduleRoot(n.t), "test", "guests", "install.sh")
}

func (o Options) suite() string {
	if o.Suite == "" {
		return "bookworm"
	}
	return o.Suite
}

// base is the directory that install.sh makes.
func (n *Network) base(suite string) (string, error) {
	if majors[suite] == 0 {
		return "", fmt.Errorf("suite %q: expected bookworm or trixie", suite)
	}
	recipe, err := os.ReadFile(n.recipe())
	if err != nil {
		return "", err
	}
	hash := sha256.Sum256(recipe)
	return filepath.Join(n.tools, "guests", suite+"-"+hex.EncodeToString(hash[:6])), nil
}

func (n *Network) boot(o Options) (g *Guest, err error) {
	g = &Guest{Name: o.Name, n: n, o: o}
	if g.base, err = n.base(o.suite()); err != nil {
		return nil, err
	}
	if g.namespace, g.port, g.Address, err = n.attach(); err != nil {
		return nil, err
	}
	if g.Name == "" {
		g.Name = "guest" + strings.TrimPrefix(g.port, "port")
	}
	g.dir = n.path(g.port)
	g.cgroup = filepath.Join(n.cgroup, g.port)
	n.mu.Lock()
	n.guests = append(n.guests, g)
	n.mu.Unlock()
	if err := g.makeDisk(); err != nil {
		return nil, fmt.Errorf("make the disk of %s: %w", g.Name, err)
	}
	if err := g.start(); err != nil {
		return nil, fmt.Errorf("boot %s: %w", g.Name, err)
	}
	return g, nil
}

// makeDisk lays what is the machine's own over the base system.
func (g *Guest) makeDisk() error {
	for _, d := range []string{"", "root", "work", "disk"} {
		if err := os.Mkdir(filepath.Join(g.dir, d), 0o755); err != nil {
			return err
		}
	}
	g.disk = filepath.Join(g.dir, "disk")
	g.overlay = g.overlayWorks()
	if !g.overlay {
		if err := os.Remove(g.disk); err != nil {
			return err
		}
		if out, err := exec.CommandContext(context.Background(), "cp", "-a", "--reflink=auto", g.base, g.disk).CombinedOutput(); err != nil {
			return fmt.Errorf("copy %s: %w: %s", g.base, err, out)
		}
	}
	private, public, err := newKey("root@" + g.Name)
	if err != nil {
		return err
	}
	g.hostKey = public
	id := make([]byte, 16)
	_, _ = rand.Read(id) // never fails
	for _, f := range []struct {
		path, content string
		mode          fs.FileMode
	}{
		{"etc/hostname", g.Name + "\n", 0o644},
		{"etc/hosts", "127.0.0.1 localhost\n" + g.Address + " " + g.Name + "\n", 0o644},
		{"etc/machine-id", hex.EncodeToString(id) + "\n", 0o444},
		{"etc/ssh/ssh_host_ed25519_key", string(private), 0o600},
		{"etc/ssh/ssh_host_ed25519_key.pub", public + "\n", 0o644},
		{"root/.ssh/authorized_keys", g.n.publicKey + "\n", 0o600},
	} {
		if err := g.write(f.path, []byte(f.content), f.mode); err != nil {
			return err
		}
	}
	if g.o.NoSystemd {
		err = g.remove("usr/bin/systemctl")
	}
	if g.o.WithoutPostgreSQL {
		major := strconv.Itoa(majors[g.o.suite()])
		err = errors.Join(err, g.remove("etc/postgresql/"+major), g.remove("var/lib/postgresql/"+major))
	} else {
		err = errors.Join(err, g.identify())
	}
	if err != nil {
		return err
	}

	g.n.mu.Lock()
	defer g.n.mu.Unlock()
	known, err := os.OpenFile(g.n.KnownHosts(), os.O_APPEND|os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	_, err = known.WriteString(g.Address + " " + public + "\n")
	return errors.Join(err, known.Close())
}

// overlayWorks tries a mount, as some file systems cannot be the upper half of an overlay.
func (g *Guest) overlayWorks() bool {
	return exec.CommandContext(context.Background(), "unshare", "-m", "mount", "-t", "overlay", "overlay", "-o", g.overlayOptions(),
		filepath.Join(g.dir, "root")).Run() == nil && os.RemoveAll(filepath.Join(g.dir, "work", "work")) == nil
}

// overlayOptions name the layers. "volatile" makes fsync cheap: nothing need survive a crash of this machine.
func (g *Guest) overlayOptions() string {
	return fmt.Sprintf("lowerdir=%s,upperdir=%s,workdir=%s,volatile", g.base, g.disk, filepath.Join(g.dir, "work"))
}

// identify gives the cluster a system identifier of its own. The checksum of the file and the WAL that begins with the
// identifier are made anew by pg_resetwal, before the first boot.
func (g *Guest) identify() error {
	path := filepath.Join(g.dataDirectory(), "global/pg_control")
	control, err := os.ReadFile(filepath.Join(g.base, path))
	if err != nil {
		return err
	}
	var id [4]byte
	_, _ = rand.Read(id[:])
	binary.LittleEndian.PutUint64(control, uint64(time.Now().Unix())<<32|uint64(binary.LittleEndian.Uint32(id[:])))
	return g.write(path, control, 0o600)
}

// dataDirectory is that of Debian's own cluster, without the leading slash.
func (g *Guest) dataDirectory() string {
	return fmt.Sprintf("var/lib/postgresql/%d/main", majors[g.o.suite()])
}

// write writes a file of the machine while it is off. It gets the owner of its directory, and missing directories those
// of the base system.
func (g *Guest) write(path string, content []byte, mode fs.FileMode) error {
	if err := g.mkdir(filepath.Dir(path)); err != nil {
		return err
	}
	var dir unix.Stat_t
	if err := unix.Stat(filepath.Join(g.disk, filepath.Dir(path)), &dir); err != nil {
		return err
	}
	name := filepath.Join(g.disk, path)
	if err := os.Remove(name); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return errors.Join(os.WriteFile(name, content, mode), os.Chmod(name, mode), os.Lchown(name, int(dir.Uid), int(dir.Gid)))
}

func (g *Guest) mkdir(path string) error {
	if path == "." {
		return nil
	}
	if _, err := os.Lstat(filepath.Join(g.disk, path)); err == nil {
		return nil
	}
	if err := g.mkdir(filepath.Dir(path)); err != nil {
		return err
	}
	like := unix.Stat_t{Mode: 0o700}
	if err := unix.Lstat(filepath.Join(g.base, path), &like); err != nil && !errors.Is(err, unix.ENOENT) {
		return err
	}
	name := filepath.Join(g.disk, path)
	return errors.Join(os.Mkdir(name, 0o700), os.Lchown(name, int(like.Uid), int(like.Gid)), unix.Chmod(name, like.Mode&0o7777))
}

// remove removes a file or directory of the base system while the machine is off.
func (g *Guest) remove(path string) error {
	name := filepath.Join(g.disk, path)
	if !g.overlay {
		return os.RemoveAll(name)
	}
	return errors.Join(g.mkdir(filepath.Dir(path)), unix.Mknod(name, unix.S_IFCHR, 0)) // what overlayfs takes for "gone"
}

// launch mounts the disk and becomes systemd-nspawn. It runs in a mount namespace of its own, so that the mounts go with
// the last process. /run is hidden there: systemd-nspawn leaves files in it.
const launch = `set -e
touch netns
mount --bind "$NETNS" netns
mount -t tmpfs -o mode=755 tmpfs /run
if [ -n "$OVERLAY" ]; then
	rm -rf work/work
	mount -t overlay overlay -o "$OVERLAY" root
else
	mount --bind disk root
fi
if [ -n "$RESETWAL" ]; then
	chroot --userspec=postgres:postgres root $RESETWAL
fi
exec systemd-nspawn "$@"
`

// start boots the machine with the disk as it is.
func (g *Guest) start() error {
	if err := removeCgroup(g.cgroup); err != nil { // of the boot before
		return err
	}
	if err := errors.Join(os.Mkdir(g.cgroup, 0o755), os.Mkdir(filepath.Join(g.cgroup, "visitors"), 0o755)); err != nil {
		return err
	}
	log, err := os.OpenFile(g.console(), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		return err
	}
	defer log.Close()
	args := []string{"-m", "sh", "-c", launch, "sh",
		"--quiet", "--register=no", "--keep-unit", "--settings=no", "--link-journal=no", "--resolv-conf=off", "--timezone=off",
		"--machine=" + g.Name, "--hostname=" + g.Name,
		"--network-namespace-path=" + filepath.Join(g.dir, "netns"),
		"--directory=" + filepath.Join(g.dir, "root"),
		"--bind-ro=" + filepath.Join(g.n.tools, "pg") + ":/opt/postgresql",
	}
	if _, err := os.Stat("/dev/fuse"); err == nil {
		args = append(args, "--bind=/dev/fuse")
	}
	if g.o.NoSystemd {
		args = append(args, "--kill-signal=SIGTERM", "/usr/sbin/guest-init")
	} else {
		args = append(args, "--boot")
	}
	cmd := exec.CommandContext(context.Background(), "unshare", args...)
	cmd.Dir = g.dir
	cmd.Env = append(os.Environ(), "SYSTEMD_NSPAWN_UNIFIED_HIERARCHY=1", "NETNS="+filepath.Join(netnsDir, g.namespace), "OVERLAY=", "RESETWAL=")
	if g.overlay {
		cmd.Env = append(cmd.Env, "OVERLAY="+g.overlayOptions())
	}
	if !g.booted && !g.o.WithoutPostgreSQL {
		cmd.Env = append(cmd.Env, fmt.Sprintf("RESETWAL=/usr/lib/postgresql/%d/bin/pg_resetwal -f -D /%s", majors[g.o.suite()], g.dataDirectory()))
	}
	cmd.Stdout, cmd.Stderr = log, log
	group, err := os.Open(g.cgroup)
	if err != nil {
		return err
	}
	defer group.Close()
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL, UseCgroupFD: true, CgroupFD: int(group.Fd())}
	exited, started := make(chan struct{}), make(chan error)
	go func() {
		// The death signal comes when the thread that started the process ends, so the thread must stay.
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		err := cmd.Start()
		started <- err
		if err == nil {
			_ = cmd.Wait() // the console's log tells why it ended
			close(exited)
		}
	}()
	if err := <-started; err != nil {
		return err
	}
	g.supervisor, g.exited = cmd, exited
	return g.await()
}

// await waits until the machine has booted.
func (g *Guest) await() error {
	deadline := time.Now().Add(bootTimeout)
	state := "its first process is not there"
	for time.Now().Before(deadline) {
		select {
		case <-g.exited:
			return fmt.Errorf("it went off:\n%s", g.consoleTail())
		case <-time.After(50 * time.Millisecond):
		}
		pid := g.findInit()
		if pid == 0 {
			continue
		}
		var err error
		if state, err = g.state(pid); err != nil {
			continue
		}
		if g.o.Hidden {
			err = ip(g.namespace, "route replace unreachable "+g.n.address(2))
		} else if !g.cut {
			err = g.answers()
		}
		if err == nil {
			g.booted = true
			return nil
		}
		state = err.Error()
	}
	jobs, _ := g.Try("systemctl list-jobs; systemctl --failed")
	return fmt.Errorf("not up after %v: %s\n%s\n%s", bootTimeout, state, jobs, g.consoleTail())
}

// state tells how far the boot is; no error: all was started.
func (g *Guest) state(pid int) (string, error) {
	if g.o.NoSystemd {
		_, err := os.Stat(fmt.Sprintf("/proc/%d/root/run/guest-init.ready", pid))
		return "starting", err
	}
	state, err := g.Try("systemctl is-system-running --wait")
	if state == "degraded" { // some unit failed: for the test to judge
		err = nil
	}
	return state, err
}

// answers waits for the greeting of sshd.
func (g *Guest) answers() error {
	conn, err := (&net.Dialer{Timeout: time.Second}).DialContext(context.Background(), "tcp", net.JoinHostPort(g.Address, "22"))
	if err != nil {
		return err
	}
	defer conn.Close()
	if err := conn.SetDeadline(time.Now().Add(5 * time.Second)); err != nil {
		return err
	}
	if _, err := bufio.NewReader(conn).ReadString('\n'); err != nil {
		return fmt.Errorf("sshd does not answer: %w", err)
	}
	return nil
}

// findInit looks among the supervisor's children for the one that is number 1 in the machine, and runs its own program
// already; 0: not there yet.
func (g *Guest) findInit() int {
	tasks, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/children", g.supervisor.Process.Pid))
	for _, file := range tasks {
		children, _ := os.ReadFile(file) // the task may be gone
		for _, child := range strings.Fields(string(children)) {
			status, _ := os.ReadFile("/proc/" + child + "/status")
			name, first := "", false
			for line := range strings.Lines(string(status)) {
				fields := strings.Fields(line)
				switch {
				case len(fields) == 2 && fields[0] == "Name:":
					name = fields[1]
				case len(fields) > 2 && fields[0] == "NSpid:":
					first = fields[len(fields)-1] == "1"
				}
			}
			if pid, err := strconv.Atoi(child); err == nil && first && (name == "systemd" || name == "init" || name == "guest-init") {
				return pid
			}
		}
	}
	return 0
}

// enter runs a script inside the machine.
func (g *Guest) enter(script string, stdin []byte) (string, error) {
	if g.supervisor == nil {
		return "", fmt.Errorf("%s is off", g.Name)
	}
	pid := g.findInit()
	if pid == 0 {
		return "", fmt.Errorf("%s has no first process: it goes down or comes up", g.Name)
	}
	group, err := os.Open(filepath.Join(g.cgroup, "visitors"))
	if err != nil {
		return "", err
	}
	defer group.Close()
	ctx, cancel := context.WithTimeout(context.Background(), scriptTimeout)
	defer cancel()
	cmd := exec.CommandContext(ctx, "nsenter", "-t", strconv.Itoa(pid), "-m", "-u", "-i", "-n", "-p", "-C", "--",
		"/usr/bin/env", "-i", "HOME=/root", "LANG=C.UTF-8", "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
		"/bin/bash", "-e", "-c", script)
	// The script belongs to the machine, so that it ends with it.
	cmd.SysProcAttr = &syscall.SysProcAttr{UseCgroupFD: true, CgroupFD: int(group.Fd())}
	cmd.WaitDelay = 2 * time.Second // for what the script left running, with our pipes in its hands
	var stdout, stderr bytes.Buffer
	cmd.Stdin, cmd.Stdout, cmd.Stderr = bytes.NewReader(stdin), &stdout, &stderr
	err = cmd.Run()
	if errors.Is(err, exec.ErrWaitDelay) {
		err = nil
	}
	out := strings.TrimSuffix(stdout.String(), "\n")
	if err != nil {
		return out, fmt.Errorf("on %s: %w: %s\nscript: %s", g.Name, err, strings.TrimSpace(stderr.String()), script)
	}
	return out, nil
}

// Reboot shuts the machine down and boots it again with the same disk and address.
func (g *Guest) Reboot() {
	g.n.t.Helper()
	g.Shutdown()
	g.Start()
}

// Shutdown shuts the machine down in good order. Start boots it again.
func (g *Guest) Shutdown() {
	g.n.t.Helper()
	_ = g.supervisor.Process.Signal(syscall.SIGTERM) // it fails if the machine is off, which is as good
	select {
	case <-g.exited:
	case <-time.After(shutdownTimeout):
		jobs, _ := g.Try("systemctl list-jobs")
		g.n.t.Fatalf("shut down %s: still running after %v\n%s\n%s", g.Name, shutdownTimeout, jobs, g.consoleTail())
	}
	g.off()
}

// Kill ends the machine as a power cut does, but for what was written: that stays, flushed or not. The network notices
// nothing, connections stay half open. Start boots it again.
func (g *Guest) Kill() {
	g.n.t.Helper()
	if err := g.plug("down"); err != nil { // first, or its kernel would say goodbye
		g.n.t.Fatal(err)
	}
	g.off()
}

// off ends whatever runs.
func (g *Guest) off() {
	g.n.t.Helper()
	if err := removeCgroup(g.cgroup); err != nil {
		g.n.t.Fatalf("end %s: %v", g.Name, err)
	}
	<-g.exited
	g.supervisor = nil
}

// Start boots a machine that was shut down or killed, or that went off by itself: one that reboots by its own command
// goes off, too.
func (g *Guest) Start() {
	g.n.t.Helper()
	if g.supervisor != nil {
		select {
		case <-g.exited:
			g.off()
		case <-time.After(shutdownTimeout):
			g.n.t.Fatalf("start %s: it still runs after %v", g.Name, shutdownTimeout)
		}
	}
	if g.o.Hidden { // its kernel keeps the route; await sets it anew
		_ = ip(g.namespace, "route delete unreachable "+g.n.address(2))
	}
	if !g.cut {
		if err := g.plug("up"); err != nil {
			g.n.t.Fatal(err)
		}
	}
	if err := g.start(); err != nil {
		g.n.t.Fatalf("boot %s: %v", g.Name, err)
	}
}

// Cut takes the machine off the network: packets vanish, connections stay half open. Mend puts it back.
func (g *Guest) Cut() {
	g.n.t.Helper()
	if err := g.plug("down"); err != nil {
		g.n.t.Fatal(err)
	}
	g.cut = true
}

// Mend undoes Cut.
func (g *Guest) Mend() {
	g.n.t.Helper()
	if err := g.plug("up"); err != nil {
		g.n.t.Fatal(err)
	}
	g.cut = false
}

func (g *Guest) plug(state string) error {
	return ip(g.n.name, "link set "+g.port+" "+state)
}

// end removes the machine's processes. The network removes the rest.
func (g *Guest) end() {
	if err := removeCgroup(g.cgroup); err != nil {
		g.n.t.Errorf("guests: clean up: end %s: %v", g.Name, err)
		return
	}
	if g.supervisor != nil {
		<-g.exited
	}
}

// tell logs what the machine knows, for a test that failed.
func (g *Guest) tell() {
	if g.supervisor == nil {
		return
	}
	if journal, err := g.Try("journalctl --no-pager -n 60 -p notice"); err == nil {
		g.n.t.Logf("journal of %s:\n%s", g.Name, journal)
	}
}

func (g *Guest) console() string { return filepath.Join(g.dir, "console.log") }

func (g *Guest) consoleTail() string {
	log, _ := os.ReadFile(g.console()) // it is only for a message
	lines := strings.Split(string(log), "\n")
	return strings.Join(lines[max(0, len(lines)-40):], "\n")
}
