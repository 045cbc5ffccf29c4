package sshlink

import (
	"crypto/ed25519"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/crypto/ssh"
	"golang.org/x/crypto/ssh/knownhosts"
)

const authorityMarker = "@cert-authority"

// pin is a key that a host has to show, or, as authority, has to have its key signed by. Nil: none.
type pin struct {
	key       ssh.PublicKey
	authority bool
	origin    string // for messages
}

// parsePin reads "ssh-ed25519 AAAA…", with or without a comment, or "@cert-authority ssh-ed25519 AAAA…".
func parsePin(s, origin string) (*pin, error) {
	s = strings.TrimSpace(s)
	if s == "" {
		return nil, nil
	}
	p := &pin{origin: origin}
	if rest, marked := strings.CutPrefix(s, authorityMarker+" "); marked {
		p.authority, s = true, strings.TrimSpace(rest)
	}
	key, _, options, rest, err := ssh.ParseAuthorizedKey([]byte(s))
	if err != nil || len(options) > 0 || len(rest) > 0 {
		return nil, fmt.Errorf("%s: found %q, expected a public key such as \"ssh-ed25519 AAAA…\", without a host name before it", origin, printable(s, 40))
	}
	if cert, ok := key.(*ssh.Certificate); ok {
		key = cert.Key
	}
	p.key = key
	return p, nil
}

func (p *pin) String() string {
	s := keyLine(p.key)
	if p.authority {
		s = authorityMarker + " " + s
	}
	return s
}

// trust decides whether a key is that of a host.
type trust struct {
	user   string
	host   string
	port   int
	behind string // of a bastion: the host behind it
	policy string
	pinned *pin
	file   string // known_hosts, or ""
}

// known is what a known_hosts file says about a host.
type known struct {
	check       ssh.HostKeyCallback // nil: nothing
	keys        []knownhosts.KnownKey
	authorities []knownhosts.KnownKey
}

// address is how the host is named to package knownhosts. Host names are case-insensitive, and stand in lower case there.
func (t *trust) address() string {
	return net.JoinHostPort(strings.ToLower(t.host), strconv.Itoa(t.port))
}

func (t *trust) fail(problem string, found ssh.PublicKey, e HostKeyError) *HostKeyError {
	e.User, e.Host, e.Port, e.For, e.Problem = t.user, t.host, t.port, t.behind, problem
	if e.found = found; found != nil {
		e.Found = keyLine(found)
	}
	return &e
}

// read reads what is known of the host. A file that is not there is an empty one.
func (t *trust) read() (known, error) {
	if t.policy == Insecure && t.pinned == nil || t.file == "" {
		return known{}, nil
	}
	unreadable := func(err error) error {
		return t.fail(KeysUnreadable, nil, HostKeyError{File: t.file, Err: err})
	}
	content, err := os.ReadFile(t.file)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return known{}, nil
	case err != nil:
		return known{}, unreadable(err)
	}
	check, err := knownhosts.New(t.file)
	if err != nil {
		return known{}, unreadable(err)
	}
	k := known{check: check}
	// The file is asked about a key that no host can have, since its private half is made here and thrown away: the answer
	// names all keys that it has for the host.
	public, _, err := ed25519.GenerateKey(nil)
	if err != nil {
		return known{}, unreadable(err)
	}
	nobody, err := ssh.NewPublicKey(public)
	if err != nil {
		return known{}, unreadable(err)
	}
	var answer *knownhosts.KeyError
	if err := check(t.address(), &net.TCPAddr{}, nobody); !errors.As(err, &answer) {
		return known{}, unreadable(fmt.Errorf("%s: %w", t.file, err))
	}
	lines := strings.Split(string(content), "\n")
	for _, entry := range answer.Want {
		if entry.Line <= len(lines) && strings.HasPrefix(strings.TrimSpace(lines[entry.Line-1]), authorityMarker) {
			k.authorities = append(k.authorities, entry)
		} else {
			k.keys = append(k.keys, entry)
		}
	}
	return k, nil
}

// algorithms is the order in which the host is asked for its keys. A host has several, and shows the first of this order
// that it has: if that is of another type than the known one, a key that is right looks wrong. So the known types come
// first. The others follow, instead of being left out, so that a host which does not have the known key any more shows
// another, and the message has both fingerprints.
func (t *trust) algorithms(k known) []string {
	var certificates, plain []string
	for _, a := range ssh.SupportedAlgorithms().HostKeys {
		if strings.Contains(a, "-cert-") {
			certificates = append(certificates, a)
		} else {
			plain = append(plain, a)
		}
	}
	// Among keys of which none is known, the one that people compare and ssh itself prefers is pinned.
	preference := func(a string) int {
		switch {
		case a == ssh.KeyAlgoED25519:
			return 0
		case strings.HasPrefix(a, "ecdsa-"):
			return 1
		case strings.HasPrefix(a, "rsa-"):
			return 2
		}
		return 3
	}
	slices.SortStableFunc(plain, func(a, b string) int { return preference(a) - preference(b) })

	var types []string
	byAuthority := false
	if t.pinned != nil {
		types, byAuthority = []string{t.pinned.key.Type()}, t.pinned.authority
	} else if t.policy != Insecure {
		for _, entry := range k.keys {
			types = append(types, entry.Key.Type())
		}
		byAuthority = len(k.authorities) > 0
	}
	if byAuthority {
		return append(certificates, plain...)
	}
	isKnown := func(algorithm string) bool {
		switch algorithm {
		case ssh.KeyAlgoRSASHA256, ssh.KeyAlgoRSASHA512: // signatures of an ssh-rsa key; the third, with SHA-1, is not supported
			return slices.Contains(types, ssh.KeyAlgoRSA)
		}
		return slices.Contains(types, algorithm)
	}
	slices.SortStableFunc(plain, func(a, b string) int {
		switch {
		case isKnown(a) == isKnown(b):
			return 0
		case isKnown(a):
			return -1
		}
		return 1
	})
	return append(plain, certificates...)
}

// verify decides about the key that the host shows, and returns what to pin: the key, or the authority by whose signature
// it was accepted.
func (t *trust) verify(k known, shown ssh.PublicKey) (*pin, error) {
	key := shown
	cert, _ := shown.(*ssh.Certificate)
	if cert != nil {
		key = cert.Key
	}
	if t.policy == Insecure && t.pinned == nil {
		return &pin{key: key}, nil
	}
	var lines *knownhosts.KeyError
	err := error(&knownhosts.KeyError{})
	if k.check != nil {
		err = k.check(t.address(), &net.TCPAddr{}, key)
	}
	var revoked *knownhosts.RevokedError
	if errors.As(err, &revoked) {
		return nil, t.fail(KeyRevoked, key, HostKeyError{File: t.file, Expected: []string{fileLine(revoked.Revoked)}})
	}
	if t.pinned != nil {
		return t.verifyPinned(k, key, cert)
	}
	if cert != nil {
		for _, authority := range k.authorities {
			if same(authority.Key, cert.SignatureKey) {
				if err := t.verifyCertificate(k, cert); err != nil {
					return nil, t.fail(KeyCertificate, key, HostKeyError{File: t.file, Expected: []string{expected(authority)}, Err: err})
				}
				return &pin{key: cert.SignatureKey, authority: true}, nil
			}
		}
		// A certificate of an authority that is not known is no worse than its key without one, which ssh does as well.
	}
	// An authority's key is not the host's own: package knownhosts would accept it as such.
	for _, entry := range k.keys {
		if same(entry.Key, key) {
			return &pin{key: key}, nil
		}
	}
	if !errors.As(err, &lines) && err != nil {
		return nil, t.fail(KeysUnreadable, key, HostKeyError{File: t.file, Err: err})
	}
	if len(k.keys)+len(k.authorities) == 0 {
		if t.policy == AcceptNew {
			return &pin{key: key}, nil
		}
		return nil, t.fail(KeyUnknown, key, HostKeyError{File: t.file})
	}
	// Keys of the type that was shown are what it should have been; those of other types are told if there are none.
	var want, others []string
	for _, entry := range slices.Concat(k.keys, k.authorities) {
		if entry.Key.Type() == key.Type() {
			want = append(want, expected(entry))
		} else {
			others = append(others, expected(entry))
		}
	}
	if len(want) == 0 {
		want = others
	}
	return nil, t.fail(KeyMismatch, key, HostKeyError{File: t.file, Expected: want})
}

func (t *trust) verifyPinned(k known, key ssh.PublicKey, cert *ssh.Certificate) (*pin, error) {
	want := []string{describe(t.pinned.key) + " (" + t.pinned.origin + ")"}
	if t.pinned.authority {
		want[0] = "a key signed by " + want[0]
	}
	switch {
	case !t.pinned.authority && same(t.pinned.key, key):
		return t.pinned, nil
	case t.pinned.authority && cert != nil && same(t.pinned.key, cert.SignatureKey):
		if err := t.verifyCertificate(k, cert); err != nil {
			return nil, t.fail(KeyCertificate, key, HostKeyError{Pinned: true, Expected: want, Err: err})
		}
		return t.pinned, nil
	}
	return nil, t.fail(KeyMismatch, key, HostKeyError{Pinned: true, Expected: want})
}

// verifyCertificate checks a certificate whose authority is trusted: purpose, name, time, signature, revocation.
func (t *trust) verifyCertificate(k known, cert *ssh.Certificate) error {
	if cert.CertType != ssh.HostCert {
		return errors.New("it is a user's certificate, not a host's")
	}
	checker := ssh.CertChecker{IsRevoked: func(c *ssh.Certificate) bool {
		var revoked *knownhosts.RevokedError
		return k.check != nil && errors.As(k.check(t.address(), &net.TCPAddr{}, c.SignatureKey), &revoked)
	}}
	return checker.CheckCert(strings.ToLower(t.host), cert)
}

func same(a, b ssh.PublicKey) bool { return string(a.Marshal()) == string(b.Marshal()) }

// keyLine is a public key as it stands in files, without comment.
func keyLine(k ssh.PublicKey) string {
	return strings.TrimSpace(string(ssh.MarshalAuthorizedKey(k)))
}

func fileLine(k knownhosts.KnownKey) string { return fmt.Sprintf("%s:%d", k.Filename, k.Line) }

func expected(k knownhosts.KnownKey) string { return describe(k.Key) + " (" + fileLine(k) + ")" }

// knownHostsName is how known_hosts names a host.
func knownHostsName(host string, port int) string {
	return knownhosts.Normalize(net.JoinHostPort(strings.ToLower(host), strconv.Itoa(port)))
}

// hostKeyFile is where sshd keeps a host key of this type, by its defaults.
func hostKeyFile(k ssh.PublicKey) string {
	kind := "ed25519"
	switch {
	case k.Type() == ssh.KeyAlgoRSA:
		kind = "rsa"
	case strings.HasPrefix(k.Type(), "ecdsa-"):
		kind = "ecdsa"
	}
	return "/etc/ssh/ssh_host_" + kind + "_key.pub"
}
