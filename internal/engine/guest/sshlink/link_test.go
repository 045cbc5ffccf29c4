//go:build linux

package sshlink_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/crypto/ssh/knownhosts"

	"github.com/pgark/terraform-provider-pgark/internal/engine/guest/sshlink"
)

// logins counts the logins that a server let in.
func (s *server) logins() int { return strings.Count(s.log.String(), "Accepted publickey") }

func TestConnect_onceForAll(t *testing.T) {
	w := newWorld(t)
	s := w.server(serverOptions{})
	l := w.link(s.config())
	if l.String() != "deploy@"+s.address() {
		t.Errorf("found %s", l)
	}
	var all sync.WaitGroup
	for range 16 {
		all.Add(1)
		go func() {
			defer all.Done()
			if _, err := l.Run(w.ctx, sshlink.Command{Args: []string{"true"}}); err != nil {
				t.Error(err)
			}
		}()
	}
	all.Wait()
	if n := s.logins(); n != 1 {
		t.Errorf("found %d logins, expected 1", n)
	}
	// A link that was closed opens again when it is used.
	must(t, l.Close())
	must(t, l.Close())
	w.run(l, sshlink.Command{Args: []string{"true"}})
	if n := s.logins(); n != 2 {
		t.Errorf("found %d logins, expected 2", n)
	}
}

func TestConnect_anewWhenTheConnectionBroke(t *testing.T) {
	w := newWorld(t)
	s := w.server(serverOptions{})
	l := w.link(s.config())
	p, err := l.Start(w.ctx, sshlink.Command{Args: []string{"cat"}})
	must(t, err)
	sessions := s.running("sshd: deploy")
	if len(sessions) == 0 {
		t.Fatal("found no process of the connection")
	}
	for _, pid := range sessions {
		must(t, syscall.Kill(pid, syscall.SIGKILL))
	}
	err = p.Wait()
	if e := as[*sshlink.UnreachableError](t, err); !e.Lost {
		t.Errorf("found %#v", e)
	}
	contains(t, err, "lost the connection to deploy@"+s.address()+": while cat ran", "hint: ")
	w.run(l, sshlink.Command{Args: []string{"true"}})
}

func TestKeepalive_hostThatIsGone(t *testing.T) {
	w := newWorld(t)
	s := w.server(serverOptions{})
	l := w.link(s.config())
	l.SetKeepalive(100 * time.Millisecond)
	// A connection without traffic is no dead one.
	w.run(l, sshlink.Command{Args: []string{"sleep", "1"}})
	if n := s.logins(); n != 1 {
		t.Fatalf("found %d logins, expected 1", n)
	}
	p, err := l.Start(w.ctx, sshlink.Command{Args: []string{"cat"}})
	must(t, err)
	stopped := s.running("sshd: deploy")
	for _, pid := range stopped {
		must(t, syscall.Kill(pid, syscall.SIGSTOP))
	}
	began := time.Now()
	if e := as[*sshlink.UnreachableError](t, p.Wait()); !e.Lost {
		t.Errorf("found %#v", e)
	}
	if d := time.Since(began); d < 200*time.Millisecond || d > 5*time.Second {
		t.Errorf("it took %s to notice, expected some 400 ms", d)
	}
	w.run(l, sshlink.Command{Args: []string{"true"}})
}

func TestCancel_hostThatIsGone(t *testing.T) {
	w := newWorld(t)
	s := w.server(serverOptions{})
	l := w.link(s.config())
	ctx, cancel := context.WithCancel(w.ctx)
	defer cancel()
	p, err := l.Start(ctx, sshlink.Command{Args: []string{"cat"}})
	must(t, err)
	for _, pid := range s.running("sshd: deploy") {
		must(t, syscall.Kill(pid, syscall.SIGSTOP))
	}
	began := time.Now()
	cancel()
	if err := p.Wait(); !errors.Is(err, context.Canceled) {
		t.Errorf("found %v, expected the context's cause", err)
	}
	// So does a command that cannot even be begun.
	ctx, cancel = context.WithTimeout(w.ctx, 100*time.Millisecond)
	defer cancel()
	if _, err := l.Run(ctx, sshlink.Command{Args: []string{"true"}}); err != nil && !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("found %v", err)
	}
	if d := time.Since(began); d > 15*time.Second {
		t.Errorf("it took %s", d)
	}
}

func TestConnect_unreachable(t *testing.T) {
	w := newWorld(t)
	s := w.server(serverOptions{down: true})
	c := s.config()
	err := w.link(c).Connect(w.ctx)
	if e := as[*sshlink.UnreachableError](t, err); e.User != "deploy" || e.Host != "127.0.0.1" || e.Port != s.port || e.Tries != 1 || !errors.Is(err, syscall.ECONNREFUSED) {
		t.Errorf("found %#v", e)
	}
	contains(t, err, "cannot reach deploy@"+s.address()+": ", "connection refused", "hint: the host answers, and nothing listens at "+s.address(), "wait_for_host")

	c.Host = "no-such-host.invalid"
	c.WaitForHost = time.Minute // a name that does not exist is not waited for
	contains(t, w.link(c).Connect(w.ctx), "cannot reach deploy@no-such-host.invalid:"+strconv.Itoa(s.port), "hint: ")

	// Something that accepts and says nothing.
	silent, err := new(net.ListenConfig).Listen(w.ctx, "tcp", "127.0.0.1:0")
	must(t, err)
	t.Cleanup(func() { _ = silent.Close() })
	c = s.config()
	c.Port, c.Timeout = silent.Addr().(*net.TCPAddr).Port, 300*time.Millisecond //nolint:forcetypeassert // it is TCP's
	err = w.link(c).Connect(w.ctx)
	_ = as[*sshlink.UnreachableError](t, err)
	contains(t, err, "no answer within 300ms", "hint: is the host up, and does a firewall")
	if errors.Is(err, context.DeadlineExceeded) {
		t.Error("the time for one try looks like the caller's deadline")
	}
	// The caller's own time, and a caller who gives up.
	c.Timeout = time.Minute
	ctx, cancel := context.WithTimeout(w.ctx, 100*time.Millisecond)
	defer cancel()
	if err := w.link(c).Connect(ctx); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("found %v, expected the caller's deadline", err)
	}
	cause := errors.New("given up")
	ctx, giveUp := context.WithCancelCause(w.ctx)
	l := w.link(c)
	time.AfterFunc(100*time.Millisecond, func() { giveUp(cause) })
	if err := l.Connect(ctx); !errors.Is(err, cause) {
		t.Errorf("found %v, expected the cause", err)
	}
	time.AfterFunc(100*time.Millisecond, func() { _ = l.Close() })
	contains(t, l.Connect(w.ctx), "the link was closed")

	// Something that hangs up, as sshd does when too many log in.
	rude, err := new(net.ListenConfig).Listen(w.ctx, "tcp", "127.0.0.1:0")
	must(t, err)
	t.Cleanup(func() { _ = rude.Close() })
	go func() {
		for {
			conn, err := rude.Accept()
			if err != nil {
				return
			}
			_ = conn.Close()
		}
	}()
	c.Port = rude.Addr().(*net.TCPAddr).Port //nolint:forcetypeassert // it is TCP's
	err = w.link(c).Connect(w.ctx)
	if e := as[*sshlink.UnreachableError](t, err); e.Tries != 5 {
		t.Errorf("found %d tries, expected 5", e.Tries)
	}
	contains(t, err, "hint: something accepts connections at 127.0.0.1:", "MaxStartups")
}

func TestConnect_tooManyAtATime(t *testing.T) {
	w := newWorld(t)
	s := w.server(serverOptions{config: "MaxStartups 2:100:2"})
	var all sync.WaitGroup
	c := s.config()
	for range 8 {
		l := w.link(c)
		all.Add(1)
		go func() {
			defer all.Done()
			if err := l.Connect(w.ctx); err != nil {
				t.Error(withHint(err))
			}
		}()
	}
	all.Wait()
}

func TestWaitForHost(t *testing.T) {
	w := newWorld(t)
	s := w.server(serverOptions{down: true, script: "echo 'System is booting up. Unprivileged users are not permitted to log in yet. See pam_nologin(8).' >/run/nologin", config: "UsePAM yes"})
	c := s.config()
	c.WaitForHost = 1500 * time.Millisecond
	err := w.link(c).Connect(w.ctx)
	if e := as[*sshlink.UnreachableError](t, err); e.Tries != 2 || e.Waited > 5*time.Second {
		t.Errorf("found %d tries in %s, expected 2", e.Tries, e.Waited)
	}
	contains(t, err, "(tried 2 times in 1s)")

	c.WaitForHost = time.Minute
	l := w.link(c)
	connected := make(chan error, 1)
	go func() { connected <- l.Connect(w.ctx) }()
	time.Sleep(100 * time.Millisecond) // the first try is refused
	s.start()
	w.eventually("the booting system turned it away", func() bool { return strings.Contains(s.log.String(), "by PAM account configuration") })
	select {
	case err := <-connected:
		t.Fatalf("it did not wait: %v", withHint(err))
	case <-time.After(100 * time.Millisecond):
	}
	must(t, os.Remove(fmt.Sprintf("/proc/%d/root/run/nologin", s.first())))
	if err := <-connected; err != nil {
		t.Error(withHint(err))
	}
}

// bastion is a server in front of another, with keys and known hosts of its own.
func (w *world) bastion(config string) (*server, *sshlink.Config) {
	mine := newKey(w.t, "ed25519")
	b := w.server(serverOptions{config: config + "\nAuthorizedKeysFile " + w.write("bastion_keys", line(mine.public())+"\n", 0o644)})
	c := b.config()
	c.PrivateKey, c.User = mine.private, "other"
	return b, &c
}

func TestBastion(t *testing.T) {
	w := newWorld(t)
	s := w.server(serverOptions{})
	b, through := w.bastion("")
	c := s.config()
	c.Bastion = through
	l := w.link(c)
	if out := w.run(l, sshlink.Command{Args: []string{"id", "-un"}}); out != "deploy\n" {
		t.Errorf("found %q", out)
	}
	if s.logins() != 1 || b.logins() != 1 || l.HostKey() != line(s.hostKeys[0].public()) {
		t.Errorf("found %d logins on the host and %d on the bastion, host key %s", s.logins(), b.logins(), l.HostKey())
	}
	if out := w.run(l, sshlink.Command{Args: []string{"wc", "-c"}, Stdin: io.LimitReader(zeros{}, 8<<20)}); out != "8388608\n" {
		t.Errorf("found %q", out)
	}
	for _, pid := range b.running("sshd: other") {
		must(t, syscall.Kill(pid, syscall.SIGKILL))
	}
	w.run(l, sshlink.Command{Args: []string{"true"}})

	way := "(on the way to deploy@" + s.address() + ")"
	both := w.write("both", knownhosts.Line([]string{s.address()}, s.hostKeys[0].public())+"\n"+knownhosts.Line([]string{b.address()}, b.hostKeys[0].public())+"\n", 0o600)
	for name, test := range map[string]struct {
		change func(c, through *sshlink.Config)
		texts  []string // nothing: it works
	}{
		"known hosts of the host": {func(c, through *sshlink.Config) { c.KnownHostsFile, through.KnownHostsFile = both, "" }, nil},
		"pinned": {func(c, through *sshlink.Config) {
			through.KnownHostsFile, through.HostKey = "", line(b.hostKeys[0].public())
		}, nil},
		"not known": {func(c, through *sshlink.Config) { through.KnownHostsFile = "" }, []string{"host key of bastion other@" + b.address() + " " + way + " is not known", "hint: ", "bastion_host_key"}},
		"the host's key is not the bastion's": {func(c, through *sshlink.Config) {
			c.HostKey, through.KnownHostsFile = line(s.hostKeys[0].public()), filepath.Join(w.dir, "none")
		}, []string{"host key of bastion", "is not known"}},
		"the host's wrong key": {func(c, through *sshlink.Config) { c.HostKey = line(newKey(t, "ed25519").public()) }, []string{"host key of deploy@" + s.address() + " has changed"}},
		"refused":              {func(c, through *sshlink.Config) { through.PrivateKey = newKey(t, "rsa").private }, []string{"bastion other@" + b.address() + " " + way + " refuses the login: tried publickey ssh-rsa"}},
		"the host's key":       {func(c, through *sshlink.Config) { through.PrivateKey = "" }, []string{"bastion other@", "tried publickey ssh-ed25519 " + fingerprint(w.key)}},
		"bastion's port": {func(c, through *sshlink.Config) { through.Port = freePort(t) }, []string{"cannot reach deploy@" + s.address() + ": bastion other@127.0.0.1:", " on the way is not reached: ", "connection refused",
			"hint: the host answers, and nothing listens at 127.0.0.1:"}},
		"host's port": {func(c, through *sshlink.Config) { c.Port = freePort(t) }, []string{"cannot reach deploy@127.0.0.1:", " over bastion other@" + b.address() + ": ", "hint: ", "let the bastion through to 127.0.0.1:"}},
	} {
		t.Run(name, func(t *testing.T) {
			c, through := c, *through
			test.change(&c, &through)
			c.Bastion = &through
			err := w.link(c).Connect(w.ctx)
			if test.texts == nil {
				must(t, err)
				return
			}
			if err == nil {
				t.Fatal("it was reached")
			}
			contains(t, err, test.texts...)
		})
	}

	closed, through := w.bastion("AllowTcpForwarding no")
	c.Bastion = through
	contains(t, w.link(c).Connect(w.ctx), "over bastion other@"+closed.address(), "hint: the bastion does not let this account through to "+s.address(), "AllowTcpForwarding")
}

func TestBastion_keptWhileTheHostIsWaitedFor(t *testing.T) {
	w := newWorld(t)
	s := w.server(serverOptions{down: true})
	b, through := w.bastion("")
	c := s.config()
	c.Bastion, c.WaitForHost = through, time.Minute
	l := w.link(c)
	connected := make(chan error, 1)
	go func() { connected <- l.Connect(w.ctx) }()
	w.eventually("two tries were made", func() bool { return strings.Count(b.log.String(), "connect_to 127.0.0.1") >= 2 })
	s.start()
	if err := <-connected; err != nil {
		t.Fatal(withHint(err))
	}
	if n := b.logins(); n != 1 {
		t.Errorf("found %d logins on the bastion, expected 1", n)
	}
}

type zeros struct{}

func (zeros) Read(p []byte) (int, error) { clear(p); return len(p), nil }
