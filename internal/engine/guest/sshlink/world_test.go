//go:build linux

package sshlink_test

import (
	"bytes"
	"compress/gzip"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/crypto/ssh"
	"golang.org/x/crypto/ssh/knownhosts"

	"github.com/pgark/terraform-provider-pgark/internal/engine/guest/sshlink"
)

// password is that of every account that the test's servers have, and passwordHash what openssl passwd -6 makes of it.
const (
	password     = "correct horse"
	passwordHash = "$6$sshlinktest$qJksXjCWNbOqzk/7O9FziMJLz5.XqCa2xn2cJA6rOTIoBA8mifLlqxGfEotHvP6F/LMzD8cKx24kjYnMz2HnU/"
)

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// world is a directory with keys, and the servers that know them.
type world struct {
	t   *testing.T
	ctx context.Context
	dir string
	key key // what every account accepts
}

type key struct {
	private string // OpenSSH
	signer  ssh.Signer
}

func newWorld(t *testing.T) *world {
	t.Helper()
	if os.Getuid() != 0 {
		t.Fatal("these tests start sshd for accounts of their own and need root")
	}
	if _, err := exec.LookPath("sshd"); err != nil {
		t.Fatal("sshd is missing: test/setup.sh test installs it")
	}
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	t.Cleanup(cancel)
	dir, err := os.MkdirTemp("/tmp", "sshlink-") //nolint:usetesting // t.TempDir is closed to other accounts
	must(t, err)
	t.Cleanup(func() {
		if err := os.RemoveAll(dir); err != nil {
			t.Errorf("clean up: %v", err)
		}
	})
	must(t, os.Chmod(dir, 0o755))
	// What the person who runs the tests has is none of theirs.
	t.Setenv("HOME", filepath.Join(dir, "no-home"))
	t.Setenv("SSH_AUTH_SOCK", "")
	return &world{t: t, ctx: ctx, dir: dir, key: newKey(t, "ed25519")}
}

func generate(t testing.TB, kind string) crypto.Signer {
	t.Helper()
	var k crypto.Signer
	var err error
	switch kind {
	case "ed25519":
		_, k, err = ed25519.GenerateKey(rand.Reader)
	case "rsa":
		k, err = rsa.GenerateKey(rand.Reader, 2048)
	case "ecdsa":
		k, err = ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	default:
		t.Fatalf("no such kind of key: %s", kind)
	}
	must(t, err)
	return k
}

func newKey(t testing.TB, kind string) key {
	t.Helper()
	private := generate(t, kind)
	block, err := ssh.MarshalPrivateKey(private, "")
	must(t, err)
	signer, err := ssh.NewSignerFromSigner(private)
	must(t, err)
	return key{private: string(pem.EncodeToMemory(block)), signer: signer}
}

func (k key) public() ssh.PublicKey { return k.signer.PublicKey() }

func line(k ssh.PublicKey) string { return strings.TrimSpace(string(ssh.MarshalAuthorizedKey(k))) }

// certify signs a key.
func certify(t testing.TB, authority key, k ssh.PublicKey, kind uint32, principals []string, until time.Time) *ssh.Certificate {
	t.Helper()
	cert := &ssh.Certificate{
		Key: k, CertType: kind, KeyId: "test", ValidPrincipals: principals,
		ValidAfter: uint64(time.Now().Add(-time.Hour).Unix()), ValidBefore: uint64(until.Unix()),
	}
	if kind == ssh.UserCert {
		cert.Extensions = map[string]string{"permit-port-forwarding": ""}
	}
	must(t, cert.SignCert(rand.Reader, authority.signer))
	return cert
}

func (w *world) write(name, content string, mode os.FileMode) string {
	w.t.Helper()
	path := filepath.Join(w.dir, name)
	must(w.t, os.MkdirAll(filepath.Dir(path), 0o755))
	must(w.t, os.WriteFile(path, []byte(content), mode))
	must(w.t, os.Chmod(path, mode))
	return path
}

// serverOptions say how a server differs from one that lets root and deploy in with the world's key, and has one ed25519
// host key.
type serverOptions struct {
	hostKeys []key  // in place of a new one
	config   string // further lines of sshd_config, which win over the usual ones
	sudoers  string
	script   string // run by sh in the server's namespaces before it starts
	port     int    // 0: a free one
	down     bool   // it is not started
}

// server is an OpenSSH server in mount and PID namespaces of its own, in which there are accounts deploy and other, and a
// sudoers file: of the machine's own files none changes. All that it starts ends with it.
type server struct {
	w        *world
	name     string
	port     int
	hostKeys []key
	options  serverOptions
	log      *lockedBuffer
	process  *exec.Cmd
}

func freePort(t testing.TB) int {
	t.Helper()
	l, err := new(net.ListenConfig).Listen(t.Context(), "tcp", "127.0.0.1:0")
	must(t, err)
	defer func() { _ = l.Close() }()
	_, port, err := net.SplitHostPort(l.Addr().String())
	must(t, err)
	n, err := strconv.Atoi(port)
	must(t, err)
	return n
}

func (w *world) server(o serverOptions) *server {
	w.t.Helper()
	s := &server{w: w, options: o, port: o.port, hostKeys: o.hostKeys, log: new(lockedBuffer)}
	if s.port == 0 {
		s.port = freePort(w.t)
	}
	s.name = fmt.Sprintf("server-%d", s.port)
	if s.hostKeys == nil {
		s.hostKeys = []key{newKey(w.t, "ed25519")}
	}
	if !o.down {
		s.start()
	}
	return s
}

// start starts the server, and returns when it listens.
func (s *server) start() {
	w := s.w
	w.t.Helper()
	var config strings.Builder
	config.WriteString(s.options.config + "\n")
	fmt.Fprintf(&config, "Port %d\nListenAddress 127.0.0.1\nPidFile none\nStrictModes no\nPermitRootLogin yes\nUsePAM no\nUseDNS no\nLogLevel VERBOSE\n", s.port)
	fmt.Fprintf(&config, "PasswordAuthentication no\nKbdInteractiveAuthentication no\nAuthorizedKeysFile %s\n", w.write(s.name+"/authorized_keys", line(w.key.public())+"\n", 0o644))
	for i, k := range s.hostKeys {
		path := w.write(fmt.Sprintf("%s/host_key_%d", s.name, i), k.private, 0o600)
		fmt.Fprintf(&config, "HostKey %s\n", path)
	}
	home := filepath.Join(w.dir, s.name, "home")
	must(w.t, os.MkdirAll(home, 0o755))
	must(w.t, os.Chown(home, 4242, 4242))
	bound := map[string]string{
		"/etc/passwd":  "root:x:0:0:root:" + home + ":/bin/bash\nsshd:x:102:65534::/run/sshd:/usr/sbin/nologin\nnobody:x:65534:65534::/nonexistent:/usr/sbin/nologin\n" + "deploy:x:4242:4242::" + home + ":/bin/bash\nother:x:4243:4243::" + home + ":/bin/sh\nlocked:x:4244:4244::" + home + ":/usr/sbin/nologin\n",
		"/etc/shadow":  "root:*:19000:0:99999:7:::\nsshd:!:19000::::::\ndeploy:" + passwordHash + ":19000:0:99999:7:::\nother:" + passwordHash + ":19000:0:99999:7:::\nlocked:" + passwordHash + ":19000:0:99999:7:::\n",
		"/etc/group":   "root:x:0:\nshadow:x:42:\nnogroup:x:65534:\ndeploy:x:4242:\nother:x:4243:\nlocked:x:4244:\n",
		"/etc/sudoers": "Defaults env_reset\nDefaults secure_path=\"/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin\"\nDefaults logfile=/run/sudo.log\n" + s.options.sudoers + "\n",
	}
	script := "set -e\nmount -t tmpfs none /run\nmkdir -m 755 /run/sshd\nmkdir -m 711 /run/sudo\nmount -t tmpfs none /var/lib/sudo\n"
	for at, content := range bound {
		mode := os.FileMode(0o644)
		if at == "/etc/sudoers" || at == "/etc/shadow" {
			mode = 0o440
		}
		script += fmt.Sprintf("mount --bind %s %s\n", w.write(s.name+at, content, mode), at)
	}
	script += s.options.script + "\n" + fmt.Sprintf("exec /usr/sbin/sshd -D -e -f %s\n", w.write(s.name+"/sshd_config", config.String(), 0o644))
	s.process = exec.Command("unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc", "sh", "-c", script) //nolint:noctx // ended by stop, not with the test's context
	s.process.Stdout, s.process.Stderr = s.log, s.log
	s.process.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	must(w.t, s.process.Start())
	w.t.Cleanup(s.stop)
	for {
		conn, err := new(net.Dialer).DialContext(w.ctx, "tcp", s.address())
		if err == nil {
			_ = conn.Close()
			return
		}
		if w.ctx.Err() != nil || s.process.ProcessState != nil {
			w.t.Fatalf("sshd did not start: %v\n%s", err, s.log)
		}
		time.Sleep(10 * time.Millisecond)
	}
}

// stop kills the server and all that it started.
func (s *server) stop() {
	if s.process == nil {
		return
	}
	_ = s.process.Process.Kill() // --kill-child takes the namespace's first process, and that all others
	_ = s.process.Wait()
	s.process = nil
	if s.w.t.Failed() {
		s.w.t.Logf("log of %s:\n%s", s.name, s.log)
	}
}

// first is the first process of the server's namespaces, as the machine numbers it.
func (s *server) first() int {
	s.w.t.Helper()
	children := childrenOf(s.process.Process.Pid)
	if len(children) != 1 {
		s.w.t.Fatalf("unshare has children %v, expected one", children)
	}
	return children[0]
}

// file is the content of a file as the server sees it.
func (s *server) file(path string) string {
	content, err := os.ReadFile(fmt.Sprintf("/proc/%d/root%s", s.first(), path))
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		s.w.t.Fatal(err)
	}
	return string(content)
}

func childrenOf(pid int) []int {
	var out []int
	content, _ := os.ReadFile(fmt.Sprintf("/proc/%d/task/%d/children", pid, pid))
	for _, f := range strings.Fields(string(content)) {
		if n, err := strconv.Atoi(f); err == nil {
			out = append(out, n)
		}
	}
	return out
}

// running are the processes below the server whose command line begins with the words.
func (s *server) running(words string) []int {
	var out []int
	pids := childrenOf(s.process.Process.Pid)
	for len(pids) > 0 {
		pid := pids[0]
		pids = append(pids[1:], childrenOf(pid)...)
		if cmdline, _ := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid)); strings.HasPrefix(strings.ReplaceAll(string(cmdline), "\x00", " "), words) {
			out = append(out, pid)
		}
	}
	return out
}

func (s *server) address() string { return net.JoinHostPort("127.0.0.1", strconv.Itoa(s.port)) }

// config reaches the server as deploy with the world's key; its host keys are known.
func (s *server) config() sshlink.Config {
	var known []string
	for _, k := range s.hostKeys {
		known = append(known, knownhosts.Line([]string{s.address()}, k.public()))
	}
	return sshlink.Config{
		Host: "127.0.0.1", Port: s.port, User: "deploy", PrivateKey: s.w.key.private, Timeout: 20 * time.Second,
		KnownHostsFile: s.w.write(s.name+"/known_hosts", strings.Join(known, "\n")+"\n", 0o644),
	}
}

// link is closed when the test ends.
func (w *world) link(c sshlink.Config) *sshlink.Link {
	w.t.Helper()
	l, err := sshlink.New(c)
	must(w.t, err)
	w.t.Cleanup(func() {
		if err := l.Close(); err != nil {
			w.t.Errorf("close: %v", err)
		}
	})
	return l
}

// run expects success.
func (w *world) run(l *sshlink.Link, c sshlink.Command) string {
	w.t.Helper()
	out, err := l.Run(w.ctx, c)
	if err != nil {
		w.t.Fatalf("%s: %v", c, withHint(err))
	}
	return string(out)
}

func withHint(err error) string {
	var h interface{ Hint() string }
	if errors.As(err, &h) {
		return err.Error() + "\nhint: " + h.Hint()
	}
	return fmt.Sprint(err)
}

// as finds an error's type, or fails.
func as[E error](t testing.TB, err error) E {
	t.Helper()
	var e E
	if !errors.As(err, &e) {
		t.Fatalf("found error %v (%T), expected a %T", err, err, e)
	}
	return e
}

// contains expects an error's text, hint included, to have all of these, in this order.
func contains(t testing.TB, err error, texts ...string) {
	t.Helper()
	all := withHint(err)
	rest := all
	for _, text := range texts {
		_, after, found := strings.Cut(rest, text)
		if !found {
			t.Errorf("found error\n%s\nexpected %q in it, in the order of %q", all, text, texts)
			return
		}
		rest = after
	}
}

// eventually waits for a condition.
func (w *world) eventually(what string, condition func() bool) {
	w.t.Helper()
	for !condition() {
		if w.ctx.Err() != nil {
			w.t.Fatalf("it did not come true that %s", what)
		}
		time.Sleep(10 * time.Millisecond)
	}
}

type lockedBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (b *lockedBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.Write(p)
}

func (b *lockedBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.String()
}

var _ io.Writer = (*lockedBuffer)(nil)

func gzipped(t testing.TB, s string) string {
	t.Helper()
	var b bytes.Buffer
	z := gzip.NewWriter(&b)
	_, err := io.WriteString(z, s)
	must(t, errors.Join(err, z.Close()))
	return b.String()
}
