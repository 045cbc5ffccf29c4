//go:build linux

package sshtest_test

import (
	"net"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/crypto/ssh"

	"github.com/pgark/terraform-provider-pgark/test/sshtest"
)

func TestStart(t *testing.T) {
	s := sshtest.Start(t)
	signer, err := ssh.ParsePrivateKey([]byte(s.PrivateKey))
	if err != nil {
		t.Fatal(err)
	}
	known, _, _, _, err := ssh.ParseAuthorizedKey([]byte(s.HostKey)) //nolint:dogsled // of five
	if err != nil {
		t.Fatal(err)
	}
	dial := func(user string) *ssh.Client {
		c, err := ssh.Dial("tcp", net.JoinHostPort(s.Address, strconv.Itoa(s.Port)), &ssh.ClientConfig{
			User: user, Auth: []ssh.AuthMethod{ssh.PublicKeys(signer)}, HostKeyCallback: ssh.FixedHostKey(known), Timeout: time.Minute,
		})
		if err != nil {
			t.Fatalf("%s: %v", user, err)
		}
		t.Cleanup(func() { _ = c.Close() })
		return c
	}
	for _, user := range []string{"root", "postgres"} {
		session, err := dial(user).NewSession()
		if err != nil {
			t.Fatal(err)
		}
		out, err := session.Output("id -un")
		if got := strings.TrimSpace(string(out)); err != nil || got != user {
			t.Errorf("found %q, %v, expected %s", got, err, user)
		}
	}
	c := dial("root")
	if n := s.Cut(); n == 0 {
		t.Error("found no connection to cut")
	}
	if err := c.Wait(); err == nil {
		t.Error("the connection was not cut")
	}
	dial("postgres") // another one is accepted
}
