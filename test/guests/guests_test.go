//go:build linux

package guests_test

import (
	"bytes"
	"net"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/crypto/ssh"
	"golang.org/x/crypto/ssh/knownhosts"

	"github.com/pgark/terraform-provider-pgark/test/guests"
)

const debianSocket = "/var/run/postgresql"

// clientConfig logs a user in with the network's key and knows the guests' keys.
func clientConfig(t *testing.T, n *guests.Network, user string) *ssh.ClientConfig {
	t.Helper()
	file, _ := n.Key()
	pem, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	key, err := ssh.ParsePrivateKey(pem)
	if err != nil {
		t.Fatal(err)
	}
	check, err := knownhosts.New(n.KnownHosts())
	if err != nil {
		t.Fatal(err)
	}
	return &ssh.ClientConfig{
		User:              user,
		Auth:              []ssh.AuthMethod{ssh.PublicKeys(key)},
		HostKeyCallback:   check,
		HostKeyAlgorithms: []string{ssh.KeyAlgoED25519},
		Timeout:           10 * time.Second,
	}
}

func dial(t *testing.T, n *guests.Network, g *guests.Guest, user string) *ssh.Client {
	t.Helper()
	client, err := ssh.Dial("tcp", net.JoinHostPort(g.Address, "22"), clientConfig(t, n, user))
	if err != nil {
		t.Fatalf("ssh %s@%s: %v", user, g.Name, err)
	}
	t.Cleanup(func() { client.Close() })
	return client
}

// over runs a command in a session of the client.
func over(t *testing.T, client *ssh.Client, command string) string {
	t.Helper()
	session, err := client.NewSession()
	if err != nil {
		t.Fatal(err)
	}
	defer session.Close()
	out, err := session.CombinedOutput(command)
	if err != nil {
		t.Fatalf("%s: %v: %s", command, err, out)
	}
	return strings.TrimSpace(string(out))
}

func want(t *testing.T, what, got, expected string) {
	t.Helper()
	if got != expected {
		t.Errorf("%s: found %q, expected %q", what, got, expected)
	}
}

func reachable(g *guests.Guest) error {
	conn, err := (&net.Dialer{Timeout: time.Second}).Dial("tcp", net.JoinHostPort(g.Address, "22"))
	if err == nil {
		conn.Close()
	}
	return err
}

func TestGuest(t *testing.T) {
	n := guests.NewNetwork(t)
	s3 := n.S3()
	begin := time.Now()
	g := n.Boot(guests.Options{Name: "web"})
	t.Logf("booted in %v", time.Since(begin).Round(time.Millisecond))

	g.AddUser("deploy", "deploy ALL=(root) NOPASSWD: /usr/bin/id -un")
	want(t, "user over SSH", over(t, dial(t, n, g, "root"), "id -un; hostname"), "root\nweb")
	want(t, "sudo over SSH", over(t, dial(t, n, g, "deploy"), "id -un; sudo -n id -un"), "deploy\nroot")
	want(t, "version", g.SQL(debianSocket, 5432, "SHOW server_version_num")[:2], "15")

	askS3 := "exec 3<>/dev/tcp/" + strings.Replace(strings.TrimPrefix(s3.Endpoint(), "http://"), ":", "/", 1) +
		`; printf 'GET / HTTP/1.1\r\nHost: s3\r\nConnection: close\r\n\r\n' >&3; head -c 8 <&3`
	want(t, "answer of S3 inside", g.Run(askS3), "HTTP/1.1")
	s3.CreateBucket("bucket") // and from here

	g.Cut()
	if err := reachable(g); err == nil {
		t.Error("a machine that was cut off answers")
	}
	if out, err := g.Try("timeout 2 bash -c " + `"` + strings.ReplaceAll(askS3, `"`, `\"`) + `"`); err == nil {
		t.Errorf("a machine that was cut off reaches S3: %q", out)
	}
	g.Mend()
	want(t, "answer of S3 after Mend", g.Run(askS3), "HTTP/1.1")

	files := g.Files()
	g.SmallDisk("/srv/small", 8)
	g.MountNoexec("/tmp")
	if _, err := g.Try("cp /bin/true /tmp/t; /tmp/t"); err == nil {
		t.Error("a program on a noexec file system ran")
	}
	if _, err := g.Try("head -c 9M /dev/zero >/srv/small/f"); err == nil || !strings.Contains(err.Error(), "No space left") {
		t.Errorf("9 MiB on a disk of 8: %v", err)
	}
	g.SQL(debianSocket, 5432, "CREATE TABLE kept AS SELECT 42 AS answer")
	g.Put("/etc/kept", []byte("it's\n"), 0o640)
	identity := "cat /etc/machine-id /etc/ssh/ssh_host_ed25519_key.pub; stat -c %a:%U /etc/kept; cat /etc/kept"
	before := g.Run(identity)
	for name, again := range map[string]func(){"Reboot": g.Reboot, "Kill": func() { g.Kill(); g.Start() },
		"its own command": func() { g.Run("systemctl reboot"); g.Start() }} {
		begin = time.Now()
		again()
		t.Logf("%s: %v", name, time.Since(begin).Round(time.Millisecond))
		want(t, "identity after "+name, g.Run(identity), before)
		want(t, "table after "+name, g.SQL(debianSocket, 5432, "SELECT answer FROM kept"), "42")
		want(t, "user after "+name, over(t, dial(t, n, g, "root"), "id -un"), "root")
	}
	now := g.Files()
	added := slices.DeleteFunc(slices.Clone(now), func(line string) bool { return slices.Contains(files, line) })
	gone := slices.DeleteFunc(slices.Clone(files), func(line string) bool { return slices.Contains(now, line) })
	if len(added) != 2 || !strings.HasPrefix(added[0], "/etc/kept f 640 root:root ") || !strings.HasPrefix(added[1], "/srv/small d ") || len(gone) != 0 {
		t.Errorf("files: found added %q and gone %q, expected /etc/kept and /srv/small added", added, gone)
	}
}

func TestTrixie(t *testing.T) {
	n := guests.NewNetwork(t)
	g := n.Boot(guests.Options{Suite: "trixie"})
	want(t, "version", g.SQL(debianSocket, 5432, "SHOW server_version_num")[:2], "17")
	want(t, "state", g.Run("systemctl is-system-running"), "running")
	want(t, "user over SSH", over(t, dial(t, n, g, "root"), "id -un"), "root")
}

func TestGuest_clusters(t *testing.T) {
	n := guests.NewNetwork(t)
	g := n.Boot(guests.Options{WithoutPostgreSQL: true})
	want(t, "Debian's clusters", g.Run("pg_lsclusters -h"), "")
	for _, c := range []guests.Cluster{
		{Major: 13, DataDirectory: "/srv/thirteen/data", Port: 6013, SocketDir: "/run/thirteen", Unit: "thirteen", SegmentMiB: 64,
			Name: "it's 13", Settings: map[string]string{"work_mem": "1MB"}},
		{Major: 18, DataDirectory: "/var/lib/postgresql/18", Port: 6018, SocketDir: "/var/lib/socket", Unit: "eighteen.service", SegmentMiB: 64, Checksums: true},
		{Major: 18, DataDirectory: "/var/lib/postgresql/plain", Port: 7018, SocketDir: "/tmp"},
	} {
		g.AddCluster(c)
	}
	settings := "SELECT string_agg(setting, ' ' ORDER BY name) FROM pg_settings WHERE name IN ('cluster_name', 'data_checksums', 'wal_segment_size', 'work_mem')"
	want(t, "18 without checksums", g.SQL("/tmp", 7018, settings), " off 16777216 4096")
	g.Reboot()
	want(t, "13", g.SQL("/run/thirteen", 6013, settings), "it's 13 off 67108864 1024")
	want(t, "18", g.SQL("/var/lib/socket", 6018, settings), " on 67108864 4096")
	want(t, "state", g.Run("systemctl is-system-running"), "running")
}

func TestGuest_withoutSystemd(t *testing.T) {
	n := guests.NewNetwork(t)
	g := n.Boot(guests.Options{NoSystemd: true})
	g.AddCluster(guests.Cluster{Major: 14, DataDirectory: "/srv/data", Port: 6014, SocketDir: "/run/fourteen", Unit: "fourteen"})
	g.Reboot()
	if out, err := g.Try("ls -d /run/systemd/system || command -v systemctl"); err == nil {
		t.Errorf("systemd is there: %s", out)
	}
	want(t, "15", g.SQL(debianSocket, 5432, "SHOW server_version_num")[:2], "15")
	want(t, "14", g.SQL("/run/fourteen", 6014, "SHOW server_version_num")[:2], "14")
	g.Kill()
	g.Start()
	want(t, "14 after Kill", g.SQL("/run/fourteen", 6014, "SHOW server_version_num")[:2], "14")
	want(t, "user over SSH", over(t, dial(t, n, g, "root"), "id -un"), "root")
}

// Machines differ in what tells them apart, and one may hide behind another.
func TestGuest_several(t *testing.T) {
	n := guests.NewNetwork(t)
	begin := time.Now()
	all := n.BootAll(guests.Options{Name: "bastion"}, guests.Options{Hidden: true}, guests.Options{})
	t.Logf("booted %d in %v", len(all), time.Since(begin).Round(time.Millisecond))
	seen := make(map[string]string)
	for _, g := range all {
		for _, id := range []string{g.Name, g.Address, g.HostKey(), g.Run("cat /etc/machine-id"),
			g.SQL(debianSocket, 5432, "SELECT system_identifier FROM pg_control_system()")} {
			if other, ok := seen[id]; ok {
				t.Errorf("%s and %s have both %s", other, g.Name, id)
			}
			seen[id] = g.Name
		}
	}
	bastion, hidden := all[0], all[1]
	for again := range 2 {
		if again > 0 {
			hidden.Reboot()
		}
		if err := reachable(hidden); err == nil {
			t.Error("a hidden machine answers")
		}
		conn, err := dial(t, n, bastion, "root").Dial("tcp", net.JoinHostPort(hidden.Address, "22"))
		if err != nil {
			t.Fatalf("reach the hidden machine through the bastion: %v", err)
		}
		greeting := make([]byte, 8)
		if _, err := conn.Read(greeting); err != nil || !bytes.Equal(greeting, []byte("SSH-2.0-")) {
			t.Errorf("greeting of the hidden machine: %q, %v", greeting, err)
		}
		conn.Close()
	}
}
