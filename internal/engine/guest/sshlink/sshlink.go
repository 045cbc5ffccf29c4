// Package sshlink reaches a machine over SSH: one connection per host, opened on first use and shared by all who need
// it, through which commands run and bytes go. It knows nothing of what runs there.
//
// No external program is used. ~/.ssh/config is not read; known_hosts is.
//
// # Cancellation
//
// Everything that can block takes a context, and returns its cause when it ends. A command is ended with it: its input is
// closed, it gets SIGTERM with all of its process group, two seconds later SIGKILL, and then the channel is closed.
package sshlink

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"sync"
	"time"
)

// The values of Config.HostKeyPolicy.
const (
	Strict    = "strict"     // the key has to be known: pinned, or in the known_hosts file
	AcceptNew = "accept-new" // an unknown key is accepted (and to be pinned by the caller); a wrong one never is
	Insecure  = "insecure"   // any key
)

// The values of Config.Sudo.
const (
	SudoAuto   = "auto" // for accounts that are not root
	SudoAlways = "always"
	SudoNever  = "never"
)

// Config says how a host is reached. Nothing of it is ever logged.
type Config struct {
	Host string // name or address
	Port int    // 0: 22
	User string // "": root

	PrivateKey     string // content, PEM or OpenSSH
	PrivateKeyFile string // ~ is expanded
	Passphrase     string
	Certificate    string // content, OpenSSH; for the private key, or for the agent's
	Password       string
	Agent          *bool // nil: when SSH_AUTH_SOCK is set and no key is given

	// HostKey is the key that the host has to show, "ssh-ed25519 AAAA…", whatever the policy; "" for none. As
	// "@cert-authority ssh-ed25519 AAAA…" it is the key that has to have signed the host's.
	HostKey        string
	HostKeyPolicy  string // "": Strict
	KnownHostsFile string // "": ~/.ssh/known_hosts; ~ is expanded; need not exist

	Timeout     time.Duration // for dialling and logging in, each try, to the bastion and to the host; 0: 30 s
	WaitForHost time.Duration // how long a host that refuses or does not answer is tried again; 0: once

	Sudo         string // "": SudoAuto
	SudoPassword string // "": Password

	// Bastion, where set, is gone through. Empty fields of its credentials, and of how host keys are checked, are those of
	// the host, except HostKey; a key of its own goes without the host's certificate. Without one, the agent, if there is
	// one, is asked in addition to the host's key. Its WaitForHost, Sudo and Bastion are not used.
	Bastion *Config
}

// maxSessions is how many commands run at a time over one connection. sshd allows ten by default (MaxSessions).
const maxSessions = 4

// Link is the connection to one host, made by New. Safe for concurrent use.
type Link struct {
	host         *hop
	bastion      *hop // nil: none
	waitForHost  time.Duration
	keepalive    time.Duration
	sudo         bool // root is reached by sudo
	maySudo      bool
	sudoPassword string

	sessions chan struct{} // holds a token for each command that runs
	dialling chan struct{} // holds a token while a connection is being made; guards what that changes in the hops

	mu           sync.Mutex // guards the following; nothing that blocks is called under it
	current      *connection
	via          *connection // to the bastion
	hostKey      string
	sudoVerified bool // sudo has accepted the password
	cancelDial   context.CancelCauseFunc
}

// errClosed is what Close does to a connection that is being made.
var errClosed = errors.New("the link was closed")

// New prepares a link. It makes no connection yet, and reports only what can be seen without one: a key that cannot be
// parsed, an unknown policy.
func New(c Config) (*Link, error) {
	l := &Link{
		waitForHost: c.WaitForHost, keepalive: keepaliveInterval, maySudo: c.Sudo != SudoNever, sudoPassword: c.SudoPassword,
		sessions: make(chan struct{}, maxSessions), dialling: make(chan struct{}, 1),
	}
	var err error
	if l.host, err = newHop(c, ""); err != nil {
		return nil, fmt.Errorf("ssh to %s: %w", c.Host, err)
	}
	if c.Bastion != nil {
		if l.bastion, err = newHop(c.Bastion.withDefaults(c), l.host.String()); err != nil {
			return nil, fmt.Errorf("ssh to bastion %s: %w", c.Bastion.Host, err)
		}
	}
	switch c.Sudo {
	case "", SudoAuto:
		l.sudo = l.host.user != defaultUser
	case SudoAlways:
		l.sudo = true
	case SudoNever:
	default:
		return nil, fmt.Errorf("sudo: found %q, expected %s, %s or %s", c.Sudo, SudoAuto, SudoAlways, SudoNever)
	}
	if l.sudoPassword == "" {
		l.sudoPassword = c.Password
	}
	if strings.ContainsAny(l.sudoPassword, "\n\x00") {
		return nil, errors.New("sudo_password: a line break stands in it, which no password can have")
	}
	return l, nil
}

// Connect opens the connection unless it is open. What cannot be helped by trying again (a wrong host key, refused
// credentials) ends it at once.
//
// Errors: *UnreachableError, *HostKeyError, *AuthError; context's cause.
func (l *Link) Connect(ctx context.Context) error {
	_, err := l.connect(ctx)
	return err
}

func (l *Link) connect(ctx context.Context) (*connection, error) {
	if ctx.Err() != nil {
		return nil, context.Cause(ctx)
	}
	select {
	case l.dialling <- struct{}{}:
		defer func() { <-l.dialling }()
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	l.mu.Lock()
	current := l.current
	l.cancelDial = cancel
	l.mu.Unlock()
	if current.alive() {
		return current, nil
	}
	made, err := l.reach(ctx)
	if err != nil {
		return nil, err
	}
	l.mu.Lock()
	l.cancelDial = nil
	closed := ctx.Err() != nil
	if !closed {
		l.current, l.hostKey = made, made.pinned.String()
	}
	l.mu.Unlock()
	if closed {
		_ = made.client.Close()
		return nil, context.Cause(ctx)
	}
	l.keep(&l.host.trust, made)
	go made.keepAlive(l.keepalive)
	return made, nil
}

// HostKey is what to pin: the key that the host showed, "ssh-ed25519 AAAA…" without comment, or, where it was accepted for
// its certificate, the authority's, "@cert-authority ssh-ed25519 AAAA…"; "" before Connect.
func (l *Link) HostKey() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.hostKey
}

// String is user@host:port.
func (l *Link) String() string { return l.host.String() }

// MaySudo tells whether the policy lets an account that is not root run commands as root.
func (l *Link) MaySudo() bool { return l.maySudo }

// Close closes the connection and what runs over it. The link can be used again.
func (l *Link) Close() error {
	l.mu.Lock()
	current, via := l.current, l.via
	if l.cancelDial != nil {
		l.cancelDial(errClosed)
	}
	l.current, l.via = nil, nil
	l.mu.Unlock()
	for _, c := range []*connection{current, via} {
		if c.alive() {
			if err := c.client.Close(); err != nil && !broke(err) {
				return err
			}
		}
	}
	return nil
}

var _ io.Closer = (*Link)(nil)
