//go:build linux

// Package sshtest runs a real SSH server for tests: OpenSSH's sshd, on loopback, with keys of its own, in which the
// accounts of this machine log in with one key. It needs root, as sshd does to become other users, and touches nothing of
// the machine but /run/sshd, an empty directory that sshd insists on.
package sshtest

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"crypto/rand"
	"encoding/pem"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/crypto/ssh"
)

const (
	program      = "/usr/sbin/sshd"
	startTimeout = 30 * time.Second
)

// Server is an sshd and its keys.
type Server struct {
	Address    string // 127.0.0.1
	Port       int
	HostKey    string // "ssh-ed25519 AAAA…"
	PrivateKey string // of a key that every account accepts, OpenSSH

	t       testing.TB
	config  string
	log     *log
	process *os.Process
	exited  chan struct{} // Closed when the listener is gone.
}

// log is what sshd says.
type log struct {
	mu sync.Mutex // guards b
	b  bytes.Buffer
}

func (l *log) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *log) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

// Start runs a server, with these lines in its sshd_config before all others. It ends with the test, and every
// connection with it.
func Start(t testing.TB, lines ...string) *Server {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Fatal("sshtest: sshd has to become other users: run the test as root")
	}
	if _, err := os.Stat(program); err != nil {
		t.Fatalf("sshtest: %v: install openssh-server (test/setup.sh test)", err)
	}
	if err := os.MkdirAll("/run/sshd", 0o755); err != nil {
		t.Fatalf("sshtest: %v", err)
	}
	// Accounts have to reach the list of keys, so it cannot be in t.TempDir.
	dir, err := os.MkdirTemp("/tmp", "sshd-") //nolint:usetesting // see above
	if err != nil {
		t.Fatalf("sshtest: %v", err)
	}
	s := &Server{Address: "127.0.0.1", Port: freePort(t), t: t, config: filepath.Join(dir, "sshd_config"), log: &log{}}
	t.Cleanup(func() {
		s.stop()
		if err := os.RemoveAll(dir); err != nil {
			t.Errorf("sshtest: %v", err)
		}
		if t.Failed() {
			t.Logf("sshtest: what sshd said:\n%s", s.log)
		}
	})
	hostKey, public := newKey(t)
	s.HostKey = public
	var authorized string
	s.PrivateKey, authorized = newKey(t)
	config := strings.Join(append(lines,
		"ListenAddress "+s.Address, "Port "+strconv.Itoa(s.Port), "HostKey "+filepath.Join(dir, "host"), "PidFile none",
		"AuthorizedKeysFile "+filepath.Join(dir, "authorized"), "StrictModes no", "PermitRootLogin prohibit-password",
		"PasswordAuthentication no", "KbdInteractiveAuthentication no", "UsePAM yes", // accounts without a password are locked without it
		"Subsystem sftp internal-sftp", "MaxStartups 100", "LogLevel VERBOSE", "PrintMotd no",
	), "\n") + "\n"
	err = errors.Join(
		os.Chmod(dir, 0o755), // see above
		os.WriteFile(filepath.Join(dir, "host"), []byte(hostKey), 0o600),
		os.WriteFile(filepath.Join(dir, "authorized"), []byte(authorized+"\n"), 0o644),
		os.WriteFile(s.config, []byte(config), 0o600),
	)
	if err != nil {
		t.Fatalf("sshtest: %v", err)
	}
	s.start()
	return s
}

// newKey makes a key pair in OpenSSH's formats.
func newKey(t testing.TB) (private, public string) {
	t.Helper()
	pub, key, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatalf("sshtest: %v", err)
	}
	block, err := ssh.MarshalPrivateKey(key, "")
	if err != nil {
		t.Fatalf("sshtest: %v", err)
	}
	p, err := ssh.NewPublicKey(pub)
	if err != nil {
		t.Fatalf("sshtest: %v", err)
	}
	return string(pem.EncodeToMemory(block)), strings.TrimSpace(string(ssh.MarshalAuthorizedKey(p)))
}

func freePort(t testing.TB) int {
	t.Helper()
	l, err := new(net.ListenConfig).Listen(t.Context(), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatalf("sshtest: %v", err)
	}
	defer l.Close()
	a, ok := l.Addr().(*net.TCPAddr)
	if !ok {
		t.Fatalf("sshtest: found an address of type %T", l.Addr())
	}
	return a.Port
}

func (s *Server) start() {
	s.t.Helper()
	cmd := exec.CommandContext(context.WithoutCancel(s.t.Context()), program, "-D", "-e", "-f", s.config)
	cmd.Stderr = s.log
	// What sessions inherit must not be what this test happens to run with.
	cmd.Env = []string{"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"}
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	s.exited = make(chan struct{})
	started := make(chan error)
	go func() {
		// The death signal comes when the thread that started the process ends, so the thread must stay.
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		err := cmd.Start()
		started <- err
		if err == nil {
			_ = cmd.Wait() // we end it with a signal
			close(s.exited)
		}
	}()
	if err := <-started; err != nil {
		s.t.Fatalf("sshtest: %v", err)
	}
	s.process = cmd.Process
	deadline := time.Now().Add(startTimeout)
	for {
		conn, err := new(net.Dialer).DialContext(s.t.Context(), "tcp", net.JoinHostPort(s.Address, strconv.Itoa(s.Port)))
		if err == nil {
			conn.Close()
			return
		}
		select {
		case <-s.exited:
			s.t.Fatalf("sshtest: sshd has ended at its start:\n%s", s.log)
		case <-time.After(10 * time.Millisecond):
		}
		if time.Now().After(deadline) {
			s.t.Fatalf("sshtest: sshd does not answer after %s: %v\n%s", startTimeout, err, s.log)
		}
	}
}

// Cut ends every connection, as a network does that goes away: what runs in them is not told but for the end of its
// input. New connections are accepted. It returns how many connections there were.
func (s *Server) Cut() int {
	connections := s.connections(s.process.Pid)
	for _, pid := range connections {
		kill(pid)
	}
	return len(connections)
}

// stop ends the server and all connections.
func (s *Server) stop() {
	if s.process == nil {
		return
	}
	connections := s.connections(s.process.Pid)
	_ = s.process.Kill() // it fails if it has ended, which is as good
	for _, pid := range connections {
		kill(pid)
	}
	<-s.exited // not before: connections hold the log open, which a process is waited for with
	s.process = nil
}

func kill(pid int) { _ = syscall.Kill(pid, syscall.SIGKILL) } // gone already is as good

// connections are the processes of sshd below a process of sshd.
func (s *Server) connections(parent int) []int {
	var out []int
	tasks, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/children", parent)) // the pattern is well formed
	for _, file := range tasks {
		b, err := os.ReadFile(file)
		if err != nil {
			continue // it ended
		}
		for _, field := range strings.Fields(string(b)) {
			pid, err := strconv.Atoi(field)
			if err != nil {
				continue
			}
			// Not what a session runs, which has another program.
			exe, err := os.Readlink(fmt.Sprintf("/proc/%d/exe", pid))
			if err != nil || !strings.HasPrefix(filepath.Base(exe), "sshd") {
				continue
			}
			out = append(append(out, pid), s.connections(pid)...)
		}
	}
	return out
}
