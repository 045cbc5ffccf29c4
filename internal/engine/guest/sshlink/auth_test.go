//go:build linux

package sshlink_test

import (
	"encoding/pem"
	"net"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/crypto/ssh"
	"golang.org/x/crypto/ssh/agent"

	"github.com/pgark/terraform-provider-pgark/internal/engine/guest/sshlink"
)

// startAgent serves keys at a socket until the test ends.
func (w *world) startAgent(keys ...agent.AddedKey) {
	w.t.Helper()
	ring := agent.NewKeyring()
	for _, k := range keys {
		must(w.t, ring.Add(k))
	}
	socket := filepath.Join(w.dir, "agent")
	l, err := new(net.ListenConfig).Listen(w.ctx, "unix", socket)
	must(w.t, err)
	w.t.Cleanup(func() { _ = l.Close() })
	go func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			go func() { _ = agent.ServeAgent(ring, conn) }()
		}
	}()
	w.t.Setenv("SSH_AUTH_SOCK", socket)
}

func TestLogin_keys(t *testing.T) {
	w := newWorld(t)
	kinds := map[string]key{}
	var lines []string
	for _, kind := range []string{"ed25519", "rsa", "ecdsa"} {
		kinds[kind] = newKey(t, kind)
		lines = append(lines, line(kinds[kind].public()))
	}
	secret := generate(t, "ed25519")
	block, err := ssh.MarshalPrivateKeyWithPassphrase(secret, "", []byte("open sesame"))
	must(t, err)
	locked := string(pem.EncodeToMemory(block))
	signer, err := ssh.NewSignerFromSigner(secret)
	must(t, err)
	lines = append(lines, line(signer.PublicKey()))
	s := w.server(serverOptions{config: "AuthorizedKeysFile " + w.write("keys", strings.Join(lines, "\n")+"\n", 0o644)})
	c := s.config()

	for kind, k := range kinds {
		c.PrivateKey = k.private
		if err := w.link(c).Connect(w.ctx); err != nil {
			t.Errorf("%s: %v", kind, withHint(err))
		}
	}
	c.PrivateKey = strings.TrimSpace(kinds["rsa"].private) // as variables hold it
	must(t, w.link(c).Connect(w.ctx))
	c.PrivateKey, c.PrivateKeyFile = "", w.write("home/key", kinds["ecdsa"].private, 0o600)
	must(t, w.link(c).Connect(w.ctx))
	t.Setenv("HOME", filepath.Join(w.dir, "home"))
	c.PrivateKeyFile = "~/key"
	must(t, w.link(c).Connect(w.ctx))

	c.PrivateKeyFile, c.PrivateKey, c.Passphrase = "", locked, "open sesame"
	must(t, w.link(c).Connect(w.ctx))

	for text, change := range map[string]func(*sshlink.Config){
		"the key is encrypted: set private_key_passphrase": func(c *sshlink.Config) { c.Passphrase = "" },
		"private_key_passphrase does not open the key":     func(c *sshlink.Config) { c.Passphrase = "wrong" },
		"found a public key, expected the private one":     func(c *sshlink.Config) { c.PrivateKey = lines[0] },
		"puttygen": func(c *sshlink.Config) { c.PrivateKey = "PuTTY-User-Key-File-3: ssh-ed25519" },
		"expected a private key in OpenSSH or PEM format":     func(c *sshlink.Config) { c.PrivateKey = "/root/.ssh/id_rsa" },
		"private_key_file: open /none: no such file":          func(c *sshlink.Config) { c.PrivateKey, c.PrivateKeyFile = "", "/none" },
		"certificate: expected the content":                   func(c *sshlink.Config) { c.Certificate = "x" },
		"certificate: found a public key of type ssh-ed25519": func(c *sshlink.Config) { c.Certificate = lines[0] },
		"certificate: it is for the key SHA256:": func(c *sshlink.Config) {
			c.Certificate = line(certify(t, w.key, w.key.public(), ssh.UserCert, nil, time.Now().Add(time.Hour)))
		},
		"expected a user's": func(c *sshlink.Config) {
			c.Certificate = line(certify(t, w.key, w.key.public(), ssh.HostCert, nil, time.Now().Add(time.Hour)))
		},
		"host_key_policy: found \"no\"":     func(c *sshlink.Config) { c.HostKeyPolicy = "no" },
		"sudo: found \"perhaps\"":           func(c *sshlink.Config) { c.Sudo = "perhaps" },
		"port: found 70000":                 func(c *sshlink.Config) { c.Port = 70000 },
		"host: found none":                  func(c *sshlink.Config) { c.Host = "" },
		"sudo_password: a line break":       func(c *sshlink.Config) { c.SudoPassword = "a\nb" },
		"ssh to bastion : host: found none": func(c *sshlink.Config) { c.Bastion = &sshlink.Config{} },
		"agent = true, and SSH_AUTH_SOCK is not set": func(c *sshlink.Config) {
			yes := true
			c.PrivateKey, c.Agent = "", &yes
		},
	} {
		bad := c
		change(&bad)
		if _, err := sshlink.New(bad); err == nil || !strings.Contains(err.Error(), text) {
			t.Errorf("found error %v, expected %q in it", err, text)
		} else if strings.Contains(err.Error(), "open sesame") || strings.Contains(err.Error(), "id_rsa") {
			t.Errorf("a secret is in %v", err)
		}
	}
}

func TestLogin_certificate(t *testing.T) {
	w := newWorld(t)
	authority, mine := newKey(t, "ed25519"), newKey(t, "rsa")
	s := w.server(serverOptions{config: "TrustedUserCAKeys " + w.write("ca.pub", line(authority.public())+"\n", 0o644) + "\nAuthorizedKeysFile none"})
	c := s.config()
	c.PrivateKey = mine.private
	_ = as[*sshlink.AuthError](t, w.link(c).Connect(w.ctx))
	c.Certificate = line(certify(t, authority, mine.public(), ssh.UserCert, []string{"deploy"}, time.Now().Add(time.Hour)))
	must(t, w.link(c).Connect(w.ctx))

	expired := c
	expired.Certificate = line(certify(t, authority, mine.public(), ssh.UserCert, []string{"deploy"}, time.Now().Add(-time.Minute)))
	contains(t, w.link(expired).Connect(w.ctx), "(certificate for private_key)", "the certificate expired at ")
	other := c
	other.User = "other"
	contains(t, w.link(other).Connect(w.ctx), "the certificate is for deploy")

	// For a key that an agent holds.
	private, err := ssh.ParseRawPrivateKey([]byte(mine.private))
	must(t, err)
	missing := c
	missing.PrivateKey = ""
	_, err = sshlink.New(missing)
	contains(t, err, "certificate: its private key is missing")
	w.startAgent(agent.AddedKey{PrivateKey: private})
	must(t, w.link(missing).Connect(w.ctx))
	missing.Certificate = line(certify(t, authority, newKey(t, "ed25519").public(), ssh.UserCert, nil, time.Now().Add(time.Hour)))
	contains(t, w.link(missing).Connect(w.ctx), "the agent does not hold the certificate's key SHA256:")
}

func TestLogin_agent(t *testing.T) {
	w := newWorld(t)
	s := w.server(serverOptions{})
	yes, no := true, false
	right, err := ssh.ParseRawPrivateKey([]byte(w.key.private))
	must(t, err)
	w.startAgent(agent.AddedKey{PrivateKey: generate(t, "ecdsa")}, agent.AddedKey{PrivateKey: right})
	c := s.config()
	c.PrivateKey = ""
	must(t, w.link(c).Connect(w.ctx)) // SSH_AUTH_SOCK is set and no key is given
	c.PrivateKey = newKey(t, "ed25519").private
	err = w.link(c).Connect(w.ctx) // a key is given
	_ = as[*sshlink.AuthError](t, err)
	contains(t, err, "the agent was not asked")
	c.Agent = &yes
	must(t, w.link(c).Connect(w.ctx))
	c.PrivateKey, c.Agent = "", &no
	contains(t, w.link(c).Connect(w.ctx), "nothing was there to log in with", "no private key is given", "the agent was not asked")

	c.Agent = nil
	t.Setenv("SSH_AUTH_SOCK", filepath.Join(w.dir, "gone"))
	contains(t, w.link(c).Connect(w.ctx), "the agent does not answer")
}

func TestLogin_refused(t *testing.T) {
	w := newWorld(t)
	s := w.server(serverOptions{config: "Banner " + w.write("banner", "Authorised\tpersons\nonly\x1b[2J\n", 0o644)})
	c := s.config()
	c.PrivateKey = ""
	err := w.link(c).Connect(w.ctx)
	e := as[*sshlink.AuthError](t, err)
	if len(e.Tried) != 0 || e.User != "deploy" || e.Port != s.port {
		t.Errorf("found %#v", e)
	}
	contains(t, err, "deploy@"+s.address()+" refuses the login: nothing was there to log in with; it accepts publickey; no password is given; no private key is given; no agent is there (SSH_AUTH_SOCK is not set)",
		"it says: Authorised persons only[2J", "attempted methods [none]", "hint: give private_key (or private_key_file, or an agent")

	wrong := newKey(t, "ed25519")
	c.PrivateKey, c.Password = wrong.private, "a secret"
	err = w.link(c).Connect(w.ctx)
	contains(t, err, "tried publickey ssh-ed25519 "+fingerprint(wrong)+" (private_key)", "it accepts publickey", "hint: is the public key in ~/.ssh/authorized_keys of deploy on 127.0.0.1")
	if strings.Contains(withHint(err), "a secret") {
		t.Errorf("the password is in %v", err)
	}
	c.PrivateKey = ""
	contains(t, w.link(c).Connect(w.ctx), "hint: give private_key")

	// A refusal is never tried again, though the host is waited for.
	before := strings.Count(s.log.String(), "Connection from")
	c.WaitForHost, c.PrivateKey = time.Minute, wrong.private
	began := time.Now()
	_ = as[*sshlink.AuthError](t, w.link(c).Connect(w.ctx))
	if tries := strings.Count(s.log.String(), "Connection from") - before; tries != 1 || time.Since(began) > 20*time.Second {
		t.Errorf("found %d tries in %s, expected one", tries, time.Since(began))
	}
}

func TestLogin_password(t *testing.T) {
	w := newWorld(t)
	for name, config := range map[string]string{
		"password":             "PasswordAuthentication yes",
		"keyboard-interactive": "UsePAM yes\nKbdInteractiveAuthentication yes",
		"key and password":     "PasswordAuthentication yes\nAuthenticationMethods publickey,password",
	} {
		t.Run(name, func(t *testing.T) {
			s := w.server(serverOptions{config: config})
			c := s.config()
			if name != "key and password" {
				c.PrivateKey = ""
			}
			c.Password = password
			must(t, w.link(c).Connect(w.ctx))
			c.Password = "wrong"
			err := w.link(c).Connect(w.ctx)
			_ = as[*sshlink.AuthError](t, err)
			contains(t, err, "tried ", "hint: is the password that of deploy")
			if strings.Contains(withHint(err), "wrong") {
				t.Errorf("the password is in %v", err)
			}
			c.Password = ""
			if name == "key and password" {
				contains(t, w.link(c).Connect(w.ctx), "it took publickey and wants password as well", "no password is given", "hint: the server wants a password: give password")
			} else {
				contains(t, w.link(c).Connect(w.ctx), "no password is given", "hint: give ")
			}
		})
	}
}

func TestLogin_tooManyKeys(t *testing.T) {
	w := newWorld(t)
	s := w.server(serverOptions{})
	var keys []agent.AddedKey
	for range 8 {
		keys = append(keys, agent.AddedKey{PrivateKey: generate(t, "ed25519")})
	}
	w.startAgent(keys...)
	c := s.config()
	c.PrivateKey = ""
	err := w.link(c).Connect(w.ctx)
	_ = as[*sshlink.AuthError](t, err)
	contains(t, err, "Too many authentication failures", "hint: the server gives up after some keys")
}
