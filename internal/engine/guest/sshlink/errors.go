package sshlink

import (
	"errors"
	"fmt"
	"io"
	"net"
	"slices"
	"strings"
	"syscall"
	"time"

	"golang.org/x/crypto/ssh"
)

// UnreachableError says that no connection could be made, or that one broke off.
type UnreachableError struct {
	User    string
	Host    string
	Port    int
	Bastion string        // user@host:port, where the way leads over one
	Tries   int           // how often it was tried
	Waited  time.Duration // from the first try to the last
	Lost    bool          // a connection was there, and broke off
	Err     error

	atBastion bool // it is the bastion that is not reached
}

func (e *UnreachableError) Error() string {
	s := "cannot reach "
	if e.Lost {
		s = "lost the connection to "
	}
	s += address(e.User, e.Host, e.Port)
	switch {
	case e.atBastion:
		s += ": bastion " + e.Bastion + " on the way is not reached"
	case e.Bastion != "":
		s += " over bastion " + e.Bastion
	}
	s += ": " + e.Err.Error()
	if e.Tries > 1 {
		s += fmt.Sprintf(" (tried %d times in %s)", e.Tries, e.Waited.Round(time.Second))
	}
	return s
}

// Unwrap gives the cause.
func (e *UnreachableError) Unwrap() error { return e.Err }

// Hint says what to look at.
func (e *UnreachableError) Hint() string {
	at := net.JoinHostPort(e.Host, fmt.Sprint(e.Port))
	from := "this machine"
	if e.atBastion {
		at = e.Bastion[strings.LastIndexByte(e.Bastion, '@')+1:]
	} else if e.Bastion != "" {
		from = "the bastion"
	}
	var resolve *net.DNSError
	var closed *ssh.OpenChannelError
	var algorithms *ssh.AlgorithmNegotiationError
	switch {
	case e.Lost:
		return "is the host up, and is nothing on the way closing idle or long connections? What ran there has been told to end; the same can be tried again."
	case errors.As(e.Err, &resolve) && resolve.IsNotFound:
		return fmt.Sprintf("the name %s does not resolve on this machine: compare it with the host's, or give its address.", resolve.Name)
	case errors.As(e.Err, &closed) && closed.Reason == ssh.Prohibited:
		return fmt.Sprintf("the bastion does not let this account through to %s: sshd_config there needs AllowTcpForwarding yes (or local), and a PermitOpen that allows it.", at)
	case errors.As(e.Err, &algorithms):
		return "this side supports what is considered safe today: an SSH server of 2016 (OpenSSH 7.2) or later, set up with its defaults, is spoken to."
	case errors.Is(e.Err, syscall.ECONNREFUSED):
		return fmt.Sprintf("the host answers, and nothing listens at %s: is sshd running, and is this its port? If the host is still booting, wait_for_host waits for it.", at)
	case errors.Is(e.Err, io.EOF), errors.Is(e.Err, syscall.ECONNRESET):
		return fmt.Sprintf("something accepts connections at %s and closes them: is it sshd (and not a proxy or a port mapping without a server behind it), and is this machine allowed there (fail2ban, MaxStartups, PerSourcePenalties)?", at)
	}
	return fmt.Sprintf("is the host up, and does a firewall let %s through to %s? If the host is still booting, wait_for_host waits for it.", from, at)
}

// retriable says that the host may be reached in a moment: it boots, or has too much to do.
func (e *UnreachableError) retriable() bool {
	var resolve *net.DNSError
	var closed *ssh.OpenChannelError
	switch {
	case errors.Is(e.Err, errNoAnswer), errors.Is(e.Err, errBooting):
		return true
	case errors.As(e.Err, &resolve):
		return resolve.Temporary() && !resolve.IsNotFound
	case errors.As(e.Err, &closed):
		return closed.Reason == ssh.ConnectionFailed
	}
	for _, passing := range []error{io.EOF, io.ErrUnexpectedEOF, syscall.ECONNREFUSED, syscall.ECONNRESET, syscall.ECONNABORTED, syscall.EPIPE,
		syscall.EHOSTUNREACH, syscall.ENETUNREACH, syscall.EHOSTDOWN, syscall.ETIMEDOUT} {
		if errors.Is(e.Err, passing) {
			return true
		}
	}
	return false
}

// hungUp says that the server took the connection and closed it at once, as sshd does when too many log in at a time.
func (e *UnreachableError) hungUp() bool {
	return !e.Lost && (errors.Is(e.Err, io.EOF) || errors.Is(e.Err, syscall.ECONNRESET))
}

// errNoAnswer is used in place of the timeouts of package net: those say that a context's deadline passed, which is the
// caller's, while here it is the time for one try.
var errNoAnswer = errors.New("no answer")

// errBooting is the answer of a system that does not let ordinary accounts in yet.
var errBooting = errors.New("the system is booting and lets no accounts in yet")

// AuthError says that a host, or the bastion, did not let the account in.
type AuthError struct {
	User    string
	Host    string
	Port    int
	For     string   // of a bastion: user@host:port of the host behind it
	Tried   []string // methods, with the keys that were offered
	Passed  []string // methods that succeeded, where the server wants several
	Accepts []string // methods that the server takes, or still wants
	Notes   []string // why something was not tried
	Banner  string   // what the server said
	Err     error
}

func (e *AuthError) Error() string {
	s := address(e.User, e.Host, e.Port)
	if e.For != "" {
		s = "bastion " + s + " (on the way to " + e.For + ")"
	}
	s += " refuses the login"
	if len(e.Tried) == 0 {
		s += ": nothing was there to log in with"
	} else {
		s += ": tried " + strings.Join(e.Tried, ", ")
	}
	switch {
	case len(e.Passed) > 0:
		s += "; it took " + strings.Join(e.Passed, ", ") + " and wants " + strings.Join(e.Accepts, " or ") + " as well"
	case len(e.Accepts) > 0:
		s += "; it accepts " + strings.Join(e.Accepts, ", ")
	}
	if len(e.Notes) > 0 {
		s += "; " + strings.Join(e.Notes, "; ")
	}
	if e.Banner != "" {
		s += "; it says: " + e.Banner
	}
	return s + ": " + e.Err.Error()
}

// Unwrap gives the cause.
func (e *AuthError) Unwrap() error { return e.Err }

// Hint says what to give, or to look at.
func (e *AuthError) Hint() string {
	prefix := ""
	if e.For != "" {
		prefix = "bastion_"
	}
	keys, passwords := 0, 0
	for _, t := range e.Tried {
		if strings.HasPrefix(t, "publickey") {
			if slices.Contains(e.Passed, "publickey") {
				continue
			}
			keys++
		} else {
			passwords++
		}
	}
	accepts := func(method string) bool { return len(e.Accepts) == 0 || slices.Contains(e.Accepts, method) }
	switch {
	case strings.Contains(e.Err.Error(), "Too many authentication failures"):
		return fmt.Sprintf("the server gives up after some keys (MaxAuthTries): give the one that is meant with %sprivate_key instead of leaving it to the agent, or remove keys from the agent.", prefix)
	case keys+passwords == 0 && !accepts("publickey"):
		return fmt.Sprintf("the server wants a password: give %spassword.", prefix)
	case keys+passwords == 0:
		return fmt.Sprintf("give %sprivate_key (or private_key_file, or an agent with SSH_AUTH_SOCK and agent = true), or %spassword.", prefix, prefix)
	case keys > 0 && accepts("publickey"):
		return fmt.Sprintf("is the public key in ~/.ssh/authorized_keys of %s on %s, the file and its directories writable by nobody else, "+
			"and the account allowed to log in (AllowUsers, PermitRootLogin, an expiry date)? sshd's log on the host says which.", e.User, e.Host)
	case keys > 0:
		return fmt.Sprintf("the server takes no keys: give %spassword, or allow keys there (PubkeyAuthentication yes).", prefix)
	case !accepts("password") && !accepts("keyboard-interactive"):
		return fmt.Sprintf("the server takes no passwords: give %sprivate_key.", prefix)
	}
	return fmt.Sprintf("is the password that of %s, and may the account log in with one (PasswordAuthentication, PermitRootLogin)? sshd's log on the host says which.", e.User)
}

// The values of HostKeyError.Problem.
const (
	KeyUnknown      = "unknown"      // nothing is known about the host
	KeyMismatch     = "mismatch"     // another key is known
	KeyRevoked      = "revoked"      // the key is marked @revoked
	KeyCertificate  = "certificate"  // an authority that is known signed the key, for another purpose, host or time
	KeysUnreadable  = "unreadable"   // what is known cannot be read
	knownHostsGuide = "SSH and sudo" // the guide that explains this
)

// HostKeyError says that a host, or the bastion, did not prove to be the one that is meant. Nothing was sent to it.
type HostKeyError struct {
	User     string
	Host     string
	Port     int
	For      string // of a bastion: user@host:port of the host behind it
	Problem  string
	Found    string   // the key that the host showed, "ssh-ed25519 AAAA…"; "" if it came not so far
	Expected []string // the keys that are known, each with where from
	File     string   // the known_hosts file, where the decision lies with it
	Pinned   bool     // the decision lies with the pinned key
	Err      error    // for KeyCertificate, KeysUnreadable

	found ssh.PublicKey
}

func (e *HostKeyError) Error() string {
	s := "host key of " + address(e.User, e.Host, e.Port)
	if e.For != "" {
		s = "host key of bastion " + address(e.User, e.Host, e.Port) + " (on the way to " + e.For + ")"
	}
	switch e.Problem {
	case KeyUnknown:
		return fmt.Sprintf("%s is not known: it shows %s, and %s has no key for it", s, describe(e.found), e.knownHosts())
	case KeyRevoked:
		return fmt.Sprintf("%s is revoked: it shows %s, which stands as @revoked in %s", s, describe(e.found), strings.Join(e.Expected, ", "))
	case KeyCertificate:
		return fmt.Sprintf("%s: its certificate, signed by %s, does not hold: %v", s, strings.Join(e.Expected, ", "), e.Err)
	case KeysUnreadable:
		return fmt.Sprintf("%s cannot be checked: %v", s, e.Err)
	}
	return fmt.Sprintf("%s has changed, or this is another host: found %s, expected %s", s, describe(e.found), strings.Join(e.Expected, " or "))
}

// Unwrap gives the cause, if there is one.
func (e *HostKeyError) Unwrap() error { return e.Err }

func (e *HostKeyError) knownHosts() string {
	if e.File == "" {
		return "no known_hosts file, for there is no home directory,"
	}
	return e.File
}

// Hint says how to find out whether the host is the right one, and what to change if it is.
func (e *HostKeyError) Hint() string {
	argument, name := "connection.host_key", knownHostsName(e.Host, e.Port)
	if e.For != "" {
		argument = "bastion_host_key"
	}
	compare := ""
	if e.found != nil {
		compare = fmt.Sprintf("Compare the fingerprint with that of the host, over another way than SSH: ssh-keygen -lf %s says it there.", hostKeyFile(e.found))
	}
	switch e.Problem {
	case KeyUnknown:
		return fmt.Sprintf("%s If it is the same, add this line to %s:\n%s\nor set %s = %q, or host_key_policy = \"accept-new\", which accepts the first key and from then on no other. See the guide %q.",
			compare, e.knownHosts(), name+" "+e.Found, argument, e.Found, knownHostsGuide)
	case KeyRevoked:
		return "a revoked key is never accepted: the host needs a new one (ssh-keygen -A after removing the old, and a restart of sshd)."
	case KeyCertificate:
		return "the host needs a certificate for its name that is valid now: ssh-keygen -Lf on its HostCertificate says what it has."
	case KeysUnreadable:
		return fmt.Sprintf("put the line right, or take it out, or name another file with known_hosts_file. See the guide %q.", knownHostsGuide)
	}
	if e.Pinned {
		return fmt.Sprintf("Somebody may be in between, or the host was built anew. %s If it was, set %s = %q. See the guide %q.", compare, argument, e.Found, knownHostsGuide)
	}
	return fmt.Sprintf("Somebody may be in between, or the host was built anew. %s If it was, remove the old key (ssh-keygen -R %s -f %s) and add this line to the file:\n%s\nor set %s = %q. See the guide %q.",
		compare, Quote(name), Quote(e.File), name+" "+e.Found, argument, e.Found, knownHostsGuide)
}

// CommandError says that a command ended with another code than 0.
type CommandError struct {
	Host    string // user@host:port
	Command string // as it was given
	Code    int    // its exit code; 128 and the signal's number if a signal ended it
	Signal  string // the signal's name without SIG, or ""
	Stderr  string // the end of what it printed on standard error
}

func (e *CommandError) Error() string {
	how := fmt.Sprintf("exit code %d", e.Code)
	if e.Signal != "" {
		how = "signal " + e.Signal
	}
	s := fmt.Sprintf("%s: %s: %s", e.Host, e.Command, how)
	if e.Stderr != "" {
		s += ": " + e.Stderr
	}
	return s
}

// The values of SudoError.Problem.
const (
	SudoMissing       = "missing"        // sudo is not installed
	SudoNotAllowed    = "not allowed"    // this account may not use sudo at all, or not for this command
	SudoNeedsPassword = "needs password" // and none is given
	SudoWrongPassword = "wrong password"
	SudoNeedsTerminal = "needs terminal" // requiretty
)

// SudoError says that sudo did not run a command.
type SudoError struct {
	Host    string // user@host:port
	User    string
	Command string
	Problem string
	Said    string // what sudo said
}

func (e *SudoError) Error() string {
	var s string
	switch e.Problem {
	case SudoMissing:
		s = "sudo is not installed"
	case SudoNeedsPassword:
		s = "sudo wants a password for this command, and none is given"
	case SudoWrongPassword:
		s = "sudo did not accept the password"
	case SudoNeedsTerminal:
		s = "sudo wants a terminal"
	default:
		s = "sudo does not allow it"
	}
	s = fmt.Sprintf("%s: run %s as root: %s", e.Host, e.Command, s)
	if e.Said != "" {
		s += ": " + e.Said
	}
	return s
}

// Hint says what to give, or to change on the host.
func (e *SudoError) Hint() string {
	var s string
	switch e.Problem {
	case SudoMissing:
		s = fmt.Sprintf("install sudo on the host, or log in as root, or, if %s may do all that is needed, set sudo = \"never\".", e.User)
	case SudoNeedsPassword:
		s = fmt.Sprintf("set sudo_password, or give %s a line with NOPASSWD for this command in /etc/sudoers.d.", e.User)
	case SudoWrongPassword:
		s = fmt.Sprintf("sudo_password (or, where that is not set, password) has to be what sudo asks for: %s's own password, unless sudoers says rootpw or targetpw.", e.User)
	case SudoNeedsTerminal:
		s = fmt.Sprintf("add a line \"Defaults:%s !requiretty\" to /etc/sudoers.d.", e.User)
	default:
		s = fmt.Sprintf("%s needs a line for this command in /etc/sudoers.d, word for word (sudo -l -U %s shows what there is).", e.User, e.User)
	}
	return s + " The guide \"SSH and sudo\" has the lines."
}

// address is how hosts are named in messages.
func address(user, host string, port int) string {
	return user + "@" + net.JoinHostPort(host, fmt.Sprint(port))
}

// describe gives a key's type and fingerprint.
func describe(k ssh.PublicKey) string {
	if k == nil {
		return "no key"
	}
	return k.Type() + " " + ssh.FingerprintSHA256(k)
}

// printable makes what a host says fit for a message: one line, nothing that moves a terminal's cursor, at most limit bytes.
func printable(s string, limit int) string {
	s = strings.Map(func(r rune) rune {
		switch {
		case r == '\n' || r == '\t':
			return ' '
		case r < ' ' || r == 0x7f || r >= 0x80 && r < 0xa0:
			return -1
		}
		return r
	}, strings.ToValidUTF8(s, "?"))
	s = strings.Join(strings.Fields(s), " ")
	if len(s) > limit {
		s = strings.ToValidUTF8(s[:limit], "") + "…"
	}
	return s
}
