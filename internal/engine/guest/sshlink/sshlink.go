// Package sshlink reaches a machine over SSH: one connection per host, opened on first use and shared by all who need
// it, through which commands run and bytes go. It knows nothing of what runs there.
//
// No external program is used. ~/.ssh/config is not read; known_hosts is.
package sshlink

import (
	"context"
	"io"
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

	// HostKey is the key that the host has to show, "ssh-ed25519 AAAA…", whatever the policy; "" for none.
	HostKey        string
	HostKeyPolicy  string // "": Strict
	KnownHostsFile string // "": ~/.ssh/known_hosts, which need not exist

	Timeout     time.Duration // for dialling and logging in, each try; 0: 30 s
	WaitForHost time.Duration // how long a host that refuses or does not answer is tried again; 0: once

	Sudo         string // "": SudoAuto
	SudoPassword string // "": Password

	// Bastion, where set, is gone through. Empty fields of its credentials are those of the host.
	Bastion *Config
}

// Link is the connection to one host, made by New. Safe for concurrent use.
type Link struct {
	config Config
}

// New prepares a link. It makes no connection yet, and reports only what can be seen without one: a key that cannot be
// parsed, an unknown policy.
func New(c Config) (*Link, error) { panic("unimplemented") }

// Connect opens the connection unless it is open. What cannot be helped by trying again (a wrong host key, refused
// credentials) ends it at once.
//
// Errors: *UnreachableError, *HostKeyError, *AuthError; context's cause.
func (l *Link) Connect(ctx context.Context) error { panic("unimplemented") }

// HostKey is the key that the host showed, "ssh-ed25519 AAAA…" without comment; "" before Connect.
func (l *Link) HostKey() string { panic("unimplemented") }

// String is user@host:port.
func (l *Link) String() string { panic("unimplemented") }

// MaySudo tells whether the policy lets an account that is not root run commands as root.
func (l *Link) MaySudo() bool { return l.config.Sudo != SudoNever }

// Close closes the connection and what runs over it. The link can be used again.
func (l *Link) Close() error { panic("unimplemented") }

// Command is a program on the host. Nothing secret may stand in it: arguments are visible there.
type Command struct {
	Args  []string // quoted for the remote shell; or
	Shell string   // a script for sh, as it stands
	Root  bool     // run it as root: by sudo if the policy says so

	// A Shell with Root runs as the account itself: it finds a shell function `asroot PROGRAM [ARGUMENT]…` that runs one
	// program as root with the script's standard input and output (by sudo -n; by sudo -S where a password is needed,
	// which the script never sees; as it is for root), so that sudo is asked for that program and not for sh. It may be
	// called more than once, in a pipeline, with its input redirected, and at the end of a script.
	Stdin io.Reader
}

// Run runs a command to its end and returns what it printed on standard output. At most four run at a time, the others
// wait. When ctx ends, the command is ended too. Output is bounded to 1 MiB.
//
// Errors: *CommandError when it ended with another code than 0, *SudoError, and those of Connect.
func (l *Link) Run(ctx context.Context, c Command) ([]byte, error) { panic("unimplemented") }

// Process is a running command.
type Process struct {
	Stdin  io.WriteCloser
	Stdout io.Reader
}

// Start starts a command that is talked to. Stdin of the Command is not used. The process holds one of the link's
// sessions until Wait returns.
func (l *Link) Start(ctx context.Context, c Command) (*Process, error) { panic("unimplemented") }

// Wait waits until the process has ended; errors as Run's.
func (p *Process) Wait() error { panic("unimplemented") }

// Stop closes the process's input, waits for grace, and then ends it.
func (p *Process) Stop(grace time.Duration) { panic("unimplemented") }
