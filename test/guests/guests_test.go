//go:build linux

package guests_test

import (
	"testing"
	"time"

	"github.com/pgark/terraform-provider-pgark/test/guests"
)

func TestQuick(t *testing.T) {
	n := guests.NewNetwork(t)
	s3 := n.S3()
	begin := time.Now()
	g := n.Boot(guests.Options{})
	t.Logf("boot: %v", time.Since(begin))
	t.Log(g.Run("id; hostname; cat /etc/machine-id; systemd-analyze; systemd-analyze blame | head; systemctl --failed; ip -br a; ip route; findmnt | head -20; ls /run/systemd/system; cat /proc/1/cgroup; cat /proc/self/cgroup; systemctl list-units --type=service --no-pager"))
	t.Log(g.SQL("/var/run/postgresql", 5432, "select version(), system_identifier, pg_encoding_to_char(encoding), datcollate from pg_control_system(), pg_database where datname='postgres'"))
	t.Log(s3.Endpoint())
	begin = time.Now()
	g.Reboot()
	t.Logf("reboot: %v", time.Since(begin))
	begin = time.Now()
	t.Log(len(g.Files()))
	t.Logf("files: %v", time.Since(begin))
	g.AddUser("deploy", "deploy ALL=(root) NOPASSWD: ALL")
	t.Log(g.Run("runuser -u deploy -- sudo -n id"))
}
