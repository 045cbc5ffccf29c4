package sshlink

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/crypto/ssh"
)

const (
	defaultPort    = 22
	defaultUser    = "root"
	defaultTimeout = 30 * time.Second

	// A connection on which nothing comes for keepaliveInterval is asked for a sign of life, and one that gives none for
	// three of them is dead: a host that is gone is noticed within a minute, not after the two hours of TCP.
	keepaliveInterval = 15 * time.Second
	keepaliveMisses   = 3

	// The pauses between tries while a host is waited for. Refused connections cost it nothing; five seconds is what a
	// person would not notice at the end of a boot.
	firstPause = time.Second
	lastPause  = 5 * time.Second

	// sshd drops connections at random when ten are logging in at a time (MaxStartups 10:30:100), which a bastion before
	// many hosts sees on every apply. That is tried again even where nobody asked to wait.
	hangUpTries = 5
)

// hop is one SSH server on the way, the last being the host.
type hop struct {
	user        string
	host        string
	port        int
	timeout     time.Duration
	credentials credentials
	trust       trust
}

func (h *hop) String() string { return address(h.user, h.host, h.port) }

// newHop checks a host's configuration. What it is called in messages follows from whether it is a bastion for another.
func newHop(c Config, bastionFor string) (*hop, error) {
	h := &hop{user: c.User, host: strings.TrimSuffix(strings.TrimPrefix(c.Host, "["), "]"), port: c.Port, timeout: c.Timeout}
	if h.host == "" {
		return nil, errors.New("host: found none")
	}
	if h.user == "" {
		h.user = defaultUser
	}
	if h.port == 0 {
		h.port = defaultPort
	}
	if h.port < 1 || h.port > 65535 {
		return nil, fmt.Errorf("port: found %d, expected 1 to 65535", h.port)
	}
	if h.timeout <= 0 {
		h.timeout = defaultTimeout
	}
	var err error
	if h.credentials, err = c.credentials(); err != nil {
		return nil, err
	}
	h.trust = trust{user: h.user, host: h.host, port: h.port, behind: bastionFor, policy: c.HostKeyPolicy}
	switch c.HostKeyPolicy {
	case "":
		h.trust.policy = Strict
	case Strict, AcceptNew, Insecure:
	default:
		return nil, fmt.Errorf("host_key_policy: found %q, expected %s, %s or %s", c.HostKeyPolicy, Strict, AcceptNew, Insecure)
	}
	if h.trust.pinned, err = parsePin(c.HostKey, "pinned as host_key"); err != nil {
		return nil, err
	}
	h.trust.file = c.KnownHostsFile
	if h.trust.file == "" {
		h.trust.file = "~/.ssh/known_hosts"
	}
	if h.trust.file, err = expandHome(h.trust.file); err != nil {
		if c.KnownHostsFile != "" {
			return nil, fmt.Errorf("known_hosts_file %s: %w", c.KnownHostsFile, err)
		}
		h.trust.file = "" // without a home directory there is no default file
	}
	return h, nil
}

var errBastionLost = fmt.Errorf("the bastion's connection broke: %w", io.EOF)

// connection is one that stands, or stood.
type connection struct {
	client *ssh.Client
	pinned *pin
	heard  *heardConn
	over   chan struct{} // closed when it is over
}

func (c *connection) alive() bool {
	if c == nil {
		return false
	}
	select {
	case <-c.over:
		return false
	default:
		return true
	}
}

// heardConn notes when something came last.
type heardConn struct {
	net.Conn
	last atomic.Int64 // Unix time in nanoseconds
}

func (c *heardConn) Read(p []byte) (int, error) {
	n, err := c.Conn.Read(p)
	if n > 0 {
		c.last.Store(time.Now().UnixNano())
	}
	return n, err
}

// dial makes one try to reach the hop, over via unless that is nil.
func (h *hop) dial(ctx context.Context, via *connection) (*connection, error) {
	tooLong := fmt.Errorf("%w within %s", errNoAnswer, h.timeout)
	ctx, cancel := context.WithTimeoutCause(ctx, h.timeout, tooLong)
	defer cancel()
	unreachable := func(err error) error {
		if ctx.Err() != nil {
			err = context.Cause(ctx)
			if !errors.Is(err, errNoAnswer) && !errors.Is(err, errBastionLost) {
				return err
			}
		}
		return &UnreachableError{Err: plainTimeout(err)}
	}
	at := net.JoinHostPort(h.host, strconv.Itoa(h.port))
	var conn net.Conn
	var err error
	if via != nil {
		// Package ssh may wait in vain for a channel that it opens while the connection breaks.
		alone, lost := context.WithCancelCause(ctx)
		defer lost(nil)
		ctx = alone
		go func() {
			select {
			case <-via.over:
				lost(errBastionLost)
			case <-alone.Done():
			}
		}()
		conn, err = via.client.DialContext(ctx, "tcp", at)
	} else {
		conn, err = new(net.Dialer).DialContext(ctx, "tcp", at)
	}
	if err != nil {
		return nil, unreachable(err)
	}
	// Channels through a bastion know no deadlines, so both kinds are closed when the time is over.
	stop := context.AfterFunc(ctx, func() { _ = conn.Close() })
	heard := &heardConn{Conn: conn}

	knows, err := h.trust.read()
	if err != nil {
		_ = conn.Close()
		stop()
		return nil, err
	}
	var attempt login
	methods, closeAgent := attempt.methods(ctx, h.credentials)
	defer closeAgent()
	var pinned *pin
	var refused error // of the host key: the error that comes out of the handshake need not carry it
	c, channels, requests, err := ssh.NewClientConn(heard, at, &ssh.ClientConfig{
		User:              h.user,
		Auth:              methods,
		HostKeyAlgorithms: h.trust.algorithms(knows),
		HostKeyCallback: func(_ string, _ net.Addr, key ssh.PublicKey) error {
			p, err := h.trust.verify(knows, key)
			if pinned == nil {
				pinned = p
			}
			refused = err
			return err
		},
		BannerCallback: func(message string) error {
			if attempt.banner.Len() < 4096 {
				attempt.banner.WriteString(message)
			}
			return nil
		},
		AuthCallback: func(c *ssh.ClientAuthContext) (ssh.AuthMethod, error) {
			attempt.started, attempt.accepts, attempt.passed = true, c.AllowedMethods, c.PartialSuccessMethods
			return nil, nil
		},
	})
	if stopped := stop(); err == nil && !stopped {
		_ = c.Close() // the time ran out just now
		return nil, unreachable(ctx.Err())
	}
	if err != nil {
		_ = conn.Close()
		switch {
		case refused != nil:
			return nil, refused
		case ctx.Err() != nil || !attempt.started:
			return nil, unreachable(err)
		case strings.Contains(attempt.banner.String(), "pam_nologin(8)"):
			// What systemd has sshd say until a system is up; root is let in before.
			return nil, unreachable(fmt.Errorf("%w: %w", errBooting, err))
		}
		return nil, &AuthError{
			User: h.user, Host: h.host, Port: h.port, For: h.trust.behind, Tried: attempt.tried, Passed: attempt.passed, Accepts: attempt.accepts,
			Notes: attempt.notes, Banner: printable(attempt.banner.String(), 500), Err: err,
		}
	}
	made := &connection{client: ssh.NewClient(c, channels, requests), pinned: pinned, heard: heard, over: make(chan struct{})}
	go func() {
		_ = made.client.Wait()
		close(made.over)
	}()
	return made, nil
}

// plainTimeout replaces timeouts of the network: package net has them say that a context's deadline passed.
func plainTimeout(err error) error {
	var timeout net.Error
	if errors.As(err, &timeout) && timeout.Timeout() && !errors.Is(err, errNoAnswer) {
		return fmt.Errorf("%w: %s", errNoAnswer, err.Error()) //nolint:errorlint // the cause is what must not be found
	}
	return err
}

// keepAlive closes the connection when the host is gone.
func (c *connection) keepAlive(interval time.Duration) {
	ticker := time.NewTicker(interval)
	defer ticker.Stop()
	asked := make(chan struct{}, 1) // holds a token while an answer is waited for
	for misses := 0; ; {
		select {
		case <-c.over:
			return
		case <-ticker.C:
		}
		if time.Since(time.Unix(0, c.heard.last.Load())) < interval {
			misses = 0
			continue
		}
		if misses == keepaliveMisses {
			_ = c.client.Close()
			return
		}
		misses++
		// Sending can block as well, when what was sent before does not get away.
		select {
		case asked <- struct{}{}:
			go func() {
				_, _, _ = c.client.SendRequest("keepalive@openssh.com", true, nil)
				<-asked
			}()
		default:
		}
	}
}

// reach connects to the host, over the bastion if there is one, and tries again as long as that may help. The bastion's
// connection is kept for the next try.
func (l *Link) reach(ctx context.Context) (*connection, error) {
	start := time.Now()
	pause := firstPause
	for try := 1; ; try++ {
		made, err := l.reachOnce(ctx)
		if err == nil {
			return made, nil
		}
		var unreachable *UnreachableError
		if !errors.As(err, &unreachable) {
			return nil, err
		}
		unreachable.User, unreachable.Host, unreachable.Port = l.host.user, l.host.host, l.host.port
		unreachable.Tries, unreachable.Waited = try, time.Since(start)
		if l.bastion != nil {
			unreachable.Bastion = l.bastion.String()
		}
		wait := pause
		switch {
		case unreachable.retriable() && time.Since(start)+pause <= l.waitForHost:
			pause = min(pause*3/2, lastPause)
		case unreachable.hungUp() && try < hangUpTries && !errors.Is(err, errBooting):
			wait = rand.N(time.Duration(try)*200*time.Millisecond) + 100*time.Millisecond // apart, as those that were dropped came together
		default:
			return nil, err
		}
		timer := time.NewTimer(wait)
		select {
		case <-ctx.Done():
			timer.Stop()
			return nil, context.Cause(ctx)
		case <-timer.C:
		}
	}
}

func (l *Link) reachOnce(ctx context.Context) (*connection, error) {
	if l.bastion == nil {
		return l.host.dial(ctx, nil)
	}
	l.mu.Lock()
	via := l.via
	l.mu.Unlock()
	if !via.alive() {
		var err error
		if via, err = l.bastion.dial(ctx, nil); err != nil {
			var unreachable *UnreachableError
			if errors.As(err, &unreachable) {
				unreachable.atBastion = true
			}
			return nil, err
		}
		l.keep(&l.bastion.trust, via)
		go via.keepAlive(l.keepalive)
		l.mu.Lock()
		l.via = via
		l.mu.Unlock()
	}
	made, err := l.host.dial(ctx, via)
	if err != nil && (errors.Is(err, errNoAnswer) || ctx.Err() != nil) {
		_ = via.client.Close() // the bastion may be what does not answer
	}
	return made, err
}

// keep remembers the key that was accepted: whatever the policy, the host is the same one for as long as the link lives.
func (l *Link) keep(t *trust, c *connection) {
	if t.policy == Insecure || t.pinned != nil {
		return
	}
	if t.policy == AcceptNew {
		t.pinned = &pin{key: c.pinned.key, authority: c.pinned.authority, origin: "shown before, in this run"}
	}
}

// broke says that something failed because the connection is gone, and not for a reason of its own.
func broke(err error) bool {
	return errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) || errors.Is(err, net.ErrClosed) ||
		errors.Is(err, syscall.EPIPE) || errors.Is(err, syscall.ECONNRESET)
}
