package sshlink

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/crypto/ssh"
	"golang.org/x/crypto/ssh/agent"
)

const agentVariable = "SSH_AUTH_SOCK"

// credentials are what one login is tried with.
type credentials struct {
	identities  []identity
	certificate *ssh.Certificate // for one of the agent's keys
	agent       bool
	password    string
	notes       []string // why something is not there
}

// identity is a key to log in with.
type identity struct {
	signer ssh.Signer
	origin string // for messages
}

func (i identity) String() string {
	return "publickey " + describe(i.signer.PublicKey()) + " (" + i.origin + ")"
}

// withDefaults fills a bastion's fields from those of the host behind it. A key is one with its passphrase and certificate.
func (c Config) withDefaults(host Config) Config {
	or := func(field *string, value string) {
		if *field == "" {
			*field = value
		}
	}
	or(&c.User, host.User)
	or(&c.Password, host.Password)
	or(&c.HostKeyPolicy, host.HostKeyPolicy)
	or(&c.KnownHostsFile, host.KnownHostsFile)
	if c.Timeout == 0 {
		c.Timeout = host.Timeout
	}
	if c.PrivateKey == "" && c.PrivateKeyFile == "" {
		// What the key of the host cannot open, the agent may: a key is often for the host alone.
		if c.Agent == nil && host.Agent == nil && c.Certificate == "" {
			asked := os.Getenv(agentVariable) != ""
			c.Agent = &asked
		}
		c.PrivateKey, c.PrivateKeyFile = host.PrivateKey, host.PrivateKeyFile
		or(&c.Certificate, host.Certificate)
	}
	or(&c.Passphrase, host.Passphrase)
	if c.Agent == nil {
		c.Agent = host.Agent
	}
	return c
}

// credentials reads and parses what there is to log in with.
func (c Config) credentials() (credentials, error) {
	var out credentials
	out.password = c.Password
	if c.Password == "" {
		out.notes = append(out.notes, "no password is given")
	}
	var cert *ssh.Certificate
	if c.Certificate != "" {
		public, _, _, _, err := ssh.ParseAuthorizedKey([]byte(c.Certificate))
		if err != nil {
			return out, errors.New("certificate: expected the content of an OpenSSH certificate (…-cert.pub), \"ssh-ed25519-cert-v01@openssh.com AAAA…\"")
		}
		var ok bool
		if cert, ok = public.(*ssh.Certificate); !ok {
			return out, fmt.Errorf("certificate: found a public key of type %s, expected a certificate", public.Type())
		}
		if cert.CertType != ssh.UserCert {
			return out, errors.New("certificate: found a host's certificate, expected a user's")
		}
	}
	content, origin := []byte(c.PrivateKey), "private_key"
	if c.PrivateKey == "" && c.PrivateKeyFile != "" {
		path, err := expandHome(c.PrivateKeyFile)
		if err != nil {
			return out, fmt.Errorf("private_key_file %s: %w", c.PrivateKeyFile, err)
		}
		if content, err = os.ReadFile(path); err != nil {
			return out, fmt.Errorf("private_key_file: %w", err)
		}
		origin = "private_key_file " + c.PrivateKeyFile
	}
	if len(content) > 0 {
		signer, err := parsePrivateKey(content, c.Passphrase)
		if err != nil {
			return out, fmt.Errorf("%s: %w", origin, err)
		}
		if cert != nil {
			certified, err := ssh.NewCertSigner(cert, signer)
			if err == nil {
				out.identities = append(out.identities, identity{certified, "certificate for " + origin})
				cert = nil
			} else if c.Agent == nil || !*c.Agent {
				return out, fmt.Errorf("certificate: it is for the key %s, and %s is %s", ssh.FingerprintSHA256(cert.Key), origin, ssh.FingerprintSHA256(signer.PublicKey()))
			}
		}
		out.identities = append(out.identities, identity{signer, origin})
	} else {
		out.notes = append(out.notes, "no private key is given")
	}
	out.certificate = cert
	socket := os.Getenv(agentVariable)
	switch {
	case c.Agent != nil:
		out.agent = *c.Agent
		if out.agent && socket == "" && len(out.identities) == 0 && out.password == "" {
			return out, fmt.Errorf("agent = true, and %s is not set: start an agent (eval $(ssh-agent); ssh-add), or give a key", agentVariable)
		}
	default:
		out.agent = socket != "" && len(content) == 0
	}
	switch {
	case out.agent && socket == "":
		out.agent = false
		out.notes = append(out.notes, "no agent is there ("+agentVariable+" is not set)")
	case !out.agent && socket == "" && len(content) == 0:
		out.notes = append(out.notes, "no agent is there ("+agentVariable+" is not set)")
	case !out.agent && socket != "":
		out.notes = append(out.notes, "the agent was not asked")
	}
	if cert != nil && !out.agent {
		return out, errors.New("certificate: its private key is missing: give private_key or private_key_file, or an agent that holds it")
	}
	return out, nil
}

// parsePrivateKey parses a key, and says of what is none what it is. The messages hold nothing of the content.
func parsePrivateKey(content []byte, passphrase string) (ssh.Signer, error) {
	text := strings.TrimSpace(string(content))
	switch {
	case strings.HasPrefix(text, "ssh-"), strings.HasPrefix(text, "ecdsa-"), strings.HasPrefix(text, "sk-"):
		return nil, errors.New("found a public key, expected the private one")
	case strings.HasPrefix(text, "PuTTY-User-Key-File"):
		return nil, errors.New("found a key in PuTTY's format; puttygen KEY -O private-openssh -o NEW converts it")
	}
	// Text that went through a variable often lost its last line break, which PEM needs.
	pem := []byte(text + "\n")
	signer, err := ssh.ParsePrivateKey(pem)
	var locked *ssh.PassphraseMissingError
	if errors.As(err, &locked) {
		if passphrase == "" {
			return nil, errors.New("the key is encrypted: set private_key_passphrase, or have an agent hold it (ssh-add, agent = true)")
		}
		signer, err = ssh.ParsePrivateKeyWithPassphrase(pem, []byte(passphrase))
		if errors.Is(err, x509.IncorrectPasswordError) {
			return nil, errors.New("private_key_passphrase does not open the key")
		}
	}
	if err != nil {
		return nil, errors.New("expected a private key in OpenSSH or PEM format (-----BEGIN … PRIVATE KEY-----, all its lines)")
	}
	return signer, nil
}

// expandHome replaces a leading ~.
func expandHome(path string) (string, error) {
	if path != "~" && !strings.HasPrefix(path, "~/") {
		return path, nil
	}
	home, err := os.UserHomeDir()
	if err != nil {
		return "", err
	}
	return filepath.Join(home, strings.TrimPrefix(path, "~")), nil
}

// login is one attempt to log in, and what came of it.
type login struct {
	tried   []string
	passed  []string
	accepts []string
	notes   []string
	banner  strings.Builder
	started bool // the server is asking for credentials: the host key was right, the key exchange done
}

// methods prepares everything that there is, for one login: a server that wants two of them gets both, and a failure can
// tell all that was tried. ctx bounds the talk with the agent; close ends it.
func (l *login) methods(ctx context.Context, c credentials) (methods []ssh.AuthMethod, closeAgent func()) {
	l.notes = append(l.notes, c.notes...)
	closeAgent = func() {}
	identities := c.identities
	if c.agent {
		held, end, err := agentIdentities(ctx, c)
		if err != nil {
			l.notes = append(l.notes, err.Error())
		} else {
			closeAgent = end
			if len(held) == 0 {
				l.notes = append(l.notes, "the agent holds no keys")
			}
		}
		for _, h := range held {
			known := false
			for _, i := range identities {
				known = known || same(i.signer.PublicKey(), h.signer.PublicKey())
			}
			if !known {
				identities = append(identities, h)
			}
		}
	}
	if len(identities) > 0 {
		methods = append(methods, ssh.PublicKeysCallback(func() ([]ssh.Signer, error) {
			var signers []ssh.Signer
			for _, i := range identities {
				l.tried = append(l.tried, i.String())
				signers = append(signers, i.signer)
				l.noteValidity(i)
			}
			return signers, nil
		}))
	}
	if c.password != "" {
		methods = append(methods, ssh.PasswordCallback(func() (string, error) {
			l.tried = append(l.tried, "password")
			return c.password, nil
		}), ssh.KeyboardInteractive(func(_, _ string, questions []string, echo []bool) ([]string, error) {
			if len(questions) == 0 { // a bare notice
				return nil, nil
			}
			l.tried = append(l.tried, "keyboard-interactive")
			if len(questions) > 1 || echo[0] {
				return nil, fmt.Errorf("the server asks %q, which only a person can answer", printable(strings.Join(questions, " "), 200))
			}
			return []string{c.password}, nil
		}))
	}
	return methods, closeAgent
}

// noteValidity tells of a certificate what a server will not say.
func (l *login) noteValidity(i identity) {
	cert, ok := i.signer.PublicKey().(*ssh.Certificate)
	if !ok {
		return
	}
	now := uint64(time.Now().Unix()) //nolint:gosec // after 1970
	const layout = time.RFC3339
	at := func(t uint64) string { return time.Unix(int64(t), 0).UTC().Format(layout) } //nolint:gosec // certificates hold Unix times
	switch {
	case cert.ValidBefore != ssh.CertTimeInfinity && now >= cert.ValidBefore:
		l.notes = append(l.notes, "the certificate expired at "+at(cert.ValidBefore))
	case now < cert.ValidAfter:
		l.notes = append(l.notes, "the certificate is valid from "+at(cert.ValidAfter))
	case len(cert.ValidPrincipals) > 0:
		l.notes = append(l.notes, "the certificate is for "+strings.Join(cert.ValidPrincipals, ", "))
	}
}

// agentIdentities asks the agent for its keys. end has to be called when they are no longer used.
func agentIdentities(ctx context.Context, c credentials) (held []identity, end func(), err error) {
	conn, err := new(net.Dialer).DialContext(ctx, "unix", os.Getenv(agentVariable))
	if err != nil {
		return nil, nil, fmt.Errorf("the agent does not answer: %w", err)
	}
	stop := context.AfterFunc(ctx, func() { _ = conn.Close() })
	end = func() { stop(); _ = conn.Close() }
	signers, err := agent.NewClient(conn).Signers()
	if err != nil {
		end()
		return nil, nil, fmt.Errorf("the agent does not list its keys: %w", err)
	}
	if c.certificate != nil {
		matched := false
		for _, s := range signers {
			if certified, err := ssh.NewCertSigner(c.certificate, s); err == nil {
				held, matched = append(held, identity{certified, "certificate for the agent's key"}), true
			}
		}
		if !matched {
			end()
			return nil, nil, fmt.Errorf("the agent does not hold the certificate's key %s", ssh.FingerprintSHA256(c.certificate.Key))
		}
	}
	for _, s := range signers {
		held = append(held, identity{s, "agent"})
	}
	return held, end, nil
}
