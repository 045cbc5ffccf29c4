//go:build linux

package sshlink_test

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/crypto/ssh"
	"golang.org/x/crypto/ssh/knownhosts"

	"github.com/pgark/terraform-provider-pgark/internal/engine/guest/sshlink"
)

func fingerprint(k key) string { return ssh.FingerprintSHA256(k.public()) }

func TestHostKey_policies(t *testing.T) {
	w := newWorld(t)
	s := w.server(serverOptions{})
	shown := s.hostKeys[0]
	c := s.config()
	empty := c
	empty.KnownHostsFile = filepath.Join(w.dir, "none")

	l := w.link(c)
	if l.HostKey() != "" {
		t.Errorf("found host key %q before the first connection", l.HostKey())
	}
	must(t, l.Connect(w.ctx))
	if l.HostKey() != line(shown.public()) {
		t.Errorf("found host key %q, expected %q", l.HostKey(), line(shown.public()))
	}

	err := w.link(empty).Connect(w.ctx)
	e := as[*sshlink.HostKeyError](t, err)
	if e.Problem != sshlink.KeyUnknown || e.Found != line(shown.public()) {
		t.Errorf("found %#v", e)
	}
	contains(t, err, "host key of deploy@"+s.address()+" is not known: it shows ssh-ed25519 "+fingerprint(shown)+", and "+empty.KnownHostsFile+" has no key for it",
		"hint: ", "ssh-keygen -lf /etc/ssh/ssh_host_ed25519_key.pub", fmt.Sprintf("[127.0.0.1]:%d %s", s.port, line(shown.public())), `connection.host_key = "ssh-ed25519 `, `"accept-new"`)

	accept := empty
	accept.HostKeyPolicy = sshlink.AcceptNew
	l = w.link(accept)
	must(t, l.Connect(w.ctx))
	if l.HostKey() != line(shown.public()) {
		t.Errorf("found host key %q", l.HostKey())
	}
	if _, err := os.Stat(empty.KnownHostsFile); err == nil {
		t.Error("the known_hosts file was written")
	}

	// The line that the hint gives, followed literally.
	followed := empty
	followed.KnownHostsFile = w.write("followed", fmt.Sprintf("# mine\n\n[127.0.0.1]:%d %s\n", s.port, e.Found), 0o600)
	must(t, w.link(followed).Connect(w.ctx))

	pinned := empty
	pinned.HostKey = line(shown.public()) + " with a comment"
	must(t, w.link(pinned).Connect(w.ctx))

	// Hashed names, as Debian writes them; and the file in the home directory.
	home := w.write("home/.ssh/known_hosts", knownhosts.HashHostname(knownhosts.Normalize(s.address()))+" "+line(shown.public())+"\n", 0o600)
	t.Setenv("HOME", filepath.Dir(filepath.Dir(home)))
	hashed := c
	hashed.KnownHostsFile = ""
	must(t, w.link(hashed).Connect(w.ctx))
	hashed.KnownHostsFile = "~/.ssh/known_hosts"
	must(t, w.link(hashed).Connect(w.ctx))
}

func TestHostKey_mismatch(t *testing.T) {
	w := newWorld(t)
	s := w.server(serverOptions{})
	shown, old := s.hostKeys[0], newKey(t, "ed25519")
	c := s.config()
	entry := knownhosts.Line([]string{s.address()}, old.public())
	c.KnownHostsFile = w.write("old", "# one\n# two\n"+entry+"\n", 0o600)

	for _, policy := range []string{sshlink.Strict, sshlink.AcceptNew} {
		c.HostKeyPolicy = policy
		err := w.link(c).Connect(w.ctx)
		if e := as[*sshlink.HostKeyError](t, err); e.Problem != sshlink.KeyMismatch || e.Pinned {
			t.Errorf("found %#v", e)
		}
		contains(t, err, "has changed, or this is another host: found ssh-ed25519 "+fingerprint(shown)+", expected ssh-ed25519 "+fingerprint(old)+" ("+c.KnownHostsFile+":3)",
			"hint: Somebody may be in between, or the host was built anew.", fmt.Sprintf("ssh-keygen -R '[127.0.0.1]:%d' -f %s", s.port, c.KnownHostsFile), line(shown.public()), "connection.host_key")
	}
	c.HostKeyPolicy = sshlink.Insecure
	l := w.link(c)
	must(t, l.Connect(w.ctx))
	if l.HostKey() != line(shown.public()) {
		t.Errorf("found host key %q", l.HostKey())
	}

	// A pinned key decides, whatever the policy and the file.
	known := s.config()
	known.HostKey = line(old.public())
	for _, policy := range []string{sshlink.Strict, sshlink.AcceptNew, sshlink.Insecure} {
		known.HostKeyPolicy = policy
		err := w.link(known).Connect(w.ctx)
		if e := as[*sshlink.HostKeyError](t, err); e.Problem != sshlink.KeyMismatch || !e.Pinned {
			t.Errorf("found %#v", e)
		}
		contains(t, err, fingerprint(shown), fingerprint(old)+" (pinned as host_key)", "hint: ", `set connection.host_key = "`+line(shown.public()))
	}
	c.HostKeyPolicy, c.HostKey = sshlink.Strict, line(shown.public())
	must(t, w.link(c).Connect(w.ctx))

	// Nobody was logged in by those that were refused: no credentials were offered before the key was found wrong.
	if accepted := strings.Count(s.log.String(), "Accepted publickey"); accepted != 2 {
		t.Errorf("found %d logins, expected 2\n%s", accepted, s.log)
	}
}

// A link that took an unknown key takes no other later, without anybody pinning it.
func TestHostKey_acceptedOnce(t *testing.T) {
	w := newWorld(t)
	s := w.server(serverOptions{})
	c := s.config()
	c.HostKeyPolicy, c.KnownHostsFile = sshlink.AcceptNew, filepath.Join(w.dir, "none")
	l := w.link(c)
	must(t, l.Connect(w.ctx))
	first := s.hostKeys[0]
	s.stop()
	s.hostKeys = []key{newKey(t, "ed25519")}
	s.start()
	var err error
	w.eventually("the lost connection is noticed", func() bool { err = l.Connect(w.ctx); return err != nil })
	contains(t, err, fingerprint(s.hostKeys[0]), fingerprint(first)+" (shown before, in this run)")
}

// A host has keys of several types and shows the one that the client asks for first.
func TestHostKey_typeThatIsKnown(t *testing.T) {
	w := newWorld(t)
	keys := []key{newKey(t, "rsa"), newKey(t, "ecdsa"), newKey(t, "ed25519")}
	s := w.server(serverOptions{hostKeys: keys})
	for _, k := range keys {
		t.Run(k.public().Type(), func(t *testing.T) {
			c := s.config()
			c.KnownHostsFile = w.write("one", knownhosts.Line([]string{s.address()}, k.public())+"\n", 0o600)
			l := w.link(c)
			must(t, l.Connect(w.ctx))
			if l.HostKey() != line(k.public()) {
				t.Errorf("found %s, expected the known key", l.HostKey())
			}
			c.KnownHostsFile, c.HostKey = filepath.Join(w.dir, "none"), line(k.public())
			must(t, w.link(c).Connect(w.ctx))

			// Another key of that type is known: the message compares like with like.
			other := newKey(t, map[string]string{"ssh-rsa": "rsa", "ssh-ed25519": "ed25519", "ecdsa-sha2-nistp256": "ecdsa"}[k.public().Type()])
			c.HostKey = line(other.public())
			contains(t, w.link(c).Connect(w.ctx), fingerprint(k), fingerprint(other))
		})
	}
	c := s.config()
	c.HostKeyPolicy, c.KnownHostsFile = sshlink.AcceptNew, filepath.Join(w.dir, "none")
	l := w.link(c)
	must(t, l.Connect(w.ctx))
	if l.HostKey() != line(keys[2].public()) {
		t.Errorf("found %s, expected the ed25519 key to be preferred", l.HostKey())
	}

	// The known type is gone from the host: that is a mismatch, told with both fingerprints.
	only := w.server(serverOptions{hostKeys: keys[:1]})
	c = only.config()
	c.KnownHostsFile = w.write("gone", knownhosts.Line([]string{only.address()}, keys[2].public())+"\n", 0o600)
	contains(t, w.link(c).Connect(w.ctx), "found ssh-rsa "+fingerprint(keys[0]), "expected ssh-ed25519 "+fingerprint(keys[2]), "ssh_host_rsa_key.pub")
}

func TestHostKey_files(t *testing.T) {
	w := newWorld(t)
	s := w.server(serverOptions{})
	shown, other := s.hostKeys[0], newKey(t, "ed25519")
	entry := knownhosts.Line([]string{s.address()}, shown.public())
	connect := func(content string, change func(*sshlink.Config)) error {
		c := s.config()
		c.KnownHostsFile = w.write("case", content, 0o600)
		if change != nil {
			change(&c)
		}
		return w.link(c).Connect(w.ctx)
	}
	pin := func(c *sshlink.Config) { c.HostKey = line(shown.public()) }

	err := connect(entry+"\n@revoked * "+line(shown.public())+"\n", nil)
	if e := as[*sshlink.HostKeyError](t, err); e.Problem != sshlink.KeyRevoked {
		t.Errorf("found %#v", e)
	}
	contains(t, err, "is revoked", fingerprint(shown), "case:2")
	if e := as[*sshlink.HostKeyError](t, connect("@revoked * "+line(shown.public())+"\n", pin)); e.Problem != sshlink.KeyRevoked {
		t.Errorf("a pinned key that is revoked: found %#v", e)
	}

	err = connect(entry+"\n"+"db1 ssh-ed25519 not-base64\n", nil)
	if e := as[*sshlink.HostKeyError](t, err); e.Problem != sshlink.KeysUnreadable {
		t.Errorf("found %#v", e)
	}
	contains(t, err, "cannot be checked", filepath.Join(w.dir, "case")+":2", "hint: put the line right")

	must(t, connect(knownhosts.Line([]string{s.address()}, other.public())+"\n"+entry+"\n", nil)) // either of two
	// The same host at another port is another one, and a pattern can except it.
	if e := as[*sshlink.HostKeyError](t, connect("127.0.0.1 "+line(shown.public())+"\n", nil)); e.Problem != sshlink.KeyUnknown {
		t.Errorf("found %#v", e)
	}
	if e := as[*sshlink.HostKeyError](t, connect(fmt.Sprintf("![127.0.0.1]:%d,[*]:%[1]d %s\n", s.port, line(shown.public())), nil)); e.Problem != sshlink.KeyUnknown {
		t.Errorf("found %#v", e)
	}
	must(t, connect(fmt.Sprintf("[127.0.0.*]:%d %s\n", s.port, line(shown.public())), nil))

	for _, bad := range []string{"db1 " + line(shown.public()), "ssh-ed25519", "AAAA", line(shown.public()) + "\n" + line(other.public())} {
		c := s.config()
		c.HostKey = bad
		if _, err := sshlink.New(c); err == nil || !strings.Contains(err.Error(), "expected a public key") {
			t.Errorf("host key %q: found error %v", bad, err)
		}
	}
}

func TestHostKey_certificate(t *testing.T) {
	w := newWorld(t)
	authority := newKey(t, "ecdsa")
	s := w.server(serverOptions{hostKeys: []key{newKey(t, "rsa"), newKey(t, "ed25519")}, down: true})
	plain, certified := s.hostKeys[0], s.hostKeys[1]
	issue := func(kind uint32, principal string, until time.Time) {
		s.stop()
		cert := certify(t, authority, certified.public(), kind, []string{principal}, until)
		s.options.config = "HostCertificate " + w.write("host-cert.pub", line(cert)+"\n", 0o644)
		s.start()
	}
	later := time.Now().Add(time.Hour)
	c := s.config()
	trusting := c
	trusting.KnownHostsFile = w.write("authority", "@cert-authority [127.0.0.*]:* "+line(authority.public())+"\n"+
		fmt.Sprintf("@cert-authority [127.0.0.1]:%d %s\n", s.port, line(authority.public())), 0o600)

	issue(ssh.HostCert, "127.0.0.1", later)
	l := w.link(trusting)
	must(t, l.Connect(w.ctx))
	pin := "@cert-authority " + line(authority.public())
	if l.HostKey() != pin {
		t.Errorf("found %q to pin, expected the authority's key", l.HostKey())
	}
	pinned := c
	pinned.KnownHostsFile, pinned.HostKey = filepath.Join(w.dir, "none"), pin
	must(t, w.link(pinned).Connect(w.ctx))
	// Without the authority, the keys themselves count, whether the host has certificates for them or not.
	for _, k := range []key{plain, certified} {
		c.KnownHostsFile = w.write("plain", knownhosts.Line([]string{s.address()}, k.public())+"\n", 0o600)
		must(t, w.link(c).Connect(w.ctx))
	}
	// The authority's own key is not the host's.
	c.KnownHostsFile, c.HostKey = filepath.Join(w.dir, "none"), line(authority.public())
	_ = as[*sshlink.HostKeyError](t, w.link(c).Connect(w.ctx))
	// Another authority.
	pinned.HostKey = "@cert-authority " + line(newKey(t, "ed25519").public())
	contains(t, w.link(pinned).Connect(w.ctx), "expected a key signed by ssh-ed25519 SHA256:")
	pinned.HostKey = pin
	// A revoked authority, and a revoked key.
	for _, revoked := range []key{authority, certified} {
		trusting.KnownHostsFile = w.write("revoked", "@revoked * "+line(revoked.public())+"\n"+fmt.Sprintf("@cert-authority [127.0.0.1]:%d %s\n", s.port, line(authority.public())), 0o600)
		contains(t, w.link(trusting).Connect(w.ctx), "revoked")
	}
	trusting.KnownHostsFile = filepath.Join(w.dir, "authority")

	for _, test := range []struct {
		kind      uint32
		principal string
		until     time.Time
		text      string
	}{
		{ssh.HostCert, "elsewhere", later, "127.0.0.1"},
		{ssh.HostCert, "127.0.0.1", time.Now().Add(-time.Minute), "expired"},
	} {
		issue(test.kind, test.principal, test.until)
		for _, config := range []sshlink.Config{trusting, pinned} {
			err := w.link(config).Connect(w.ctx)
			if e := as[*sshlink.HostKeyError](t, err); e.Problem != sshlink.KeyCertificate {
				t.Errorf("found %#v", e)
			}
			contains(t, err, "does not hold", test.text)
		}
	}
}
