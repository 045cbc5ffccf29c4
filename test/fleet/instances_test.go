//go:build linux

package fleet

import (
	"encoding/json"
	"fmt"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/pgark/terraform-provider-pgark/test/guests"
)

// facts are what the data source says of an instance.
type facts struct {
	Name             string  `json:"name"`
	Version          int     `json:"version"`
	VersionNumber    *int    `json:"version_number"`
	DataDirectory    string  `json:"data_directory"`
	SocketDirectory  string  `json:"socket_directory"`
	Port             int     `json:"port"`
	Owner            string  `json:"owner"`
	SystemIdentifier string  `json:"system_identifier"`
	Running          bool    `json:"running"`
	Role             *string `json:"role"`
	ArchiveMode      *string `json:"archive_mode"`
	WALLevel         *string `json:"wal_level"`
	SizeBytes        int64   `json:"size_bytes"`
	WALSegmentBytes  int64   `json:"wal_segment_bytes"`
	ArchiveCommand   *string `json:"archive_command"`

	Databases   []string `json:"databases"`
	Extensions  []string `json:"extensions"`
	Tablespaces []struct {
		Name     string `json:"name"`
		Location string `json:"location"`
	} `json:"tablespaces"`
	Service *string `json:"service"`
	Problem *string `json:"problem"`
}

// instancesNow reads the output "instances", by name of the instance.
func (w *world) instancesNow() map[string]facts {
	w.Helper()
	var list []facts
	if err := json.Unmarshal([]byte(w.must("output", "-json", "instances")), &list); err != nil {
		w.Fatal(err)
	}
	all := map[string]facts{}
	for _, i := range list {
		all[i.Name] = i
	}
	return all
}

// TestInstances has three clusters on one guest, none of them where one would look, and protects two.
func TestInstances(t *testing.T) {
	const name = "unusual"
	w := newWorld(t)
	took := startClock()
	g := w.net.Boot(guests.Options{WithoutPostgreSQL: true})

	// Blanks in the path, port in a file that the configuration includes, started by hand.
	orders := restored{
		instance: "16-orders", major: 16, directory: "/home/data bases/orders", sockets: "/srv/the sockets", port: 7001,
		by: "time", segment: 16,
	}
	g.Run("mkdir -p /etc/orders; echo 'port = 7001' >/etc/orders/port.conf")
	g.AddCluster(guests.Cluster{
		Major: orders.major, DataDirectory: orders.directory, Port: 6001, SocketDir: orders.sockets, Name: "orders",
		Settings: map[string]string{"archive_mode": "on", "shared_buffers": "32MB", "include": "/etc/orders/port.conf"},
	})
	// No name of its own, its socket in /tmp, a tablespace on another file system.
	billing := restored{
		instance: "14-7002", major: 14, directory: "/opt/billing/14.d/pgdata", sockets: "/tmp/billing", port: 7002,
		by: "lsn", location: "/mnt/fast/billing", checksums: true, segment: 64,
	}
	g.AddCluster(guests.Cluster{
		Major: billing.major, DataDirectory: billing.directory, Port: billing.port, SocketDir: billing.sockets,
		Checksums: true, SegmentMiB: billing.segment, Unit: "billing-database",
		Settings: map[string]string{"archive_mode": "on", "shared_buffers": "32MB"},
	})
	g.SmallDisk("/mnt/fast", 256)
	g.Run("install -d -o postgres -g postgres -m 700 /mnt/fast/billing")
	g.SQL(billing.sockets, billing.port, "create tablespace fast location '/mnt/fast/billing'")
	g.SQL(billing.sockets, billing.port, "create database invoices")
	// The one that is left out archives on its own.
	const others = "test -d /srv && cp %p /srv/elsewhere/%f"
	scratch := restored{instance: "18-scratch", major: 18, directory: "/srv/scratch/pg", sockets: "/var/lib/scratch", port: 50432, segment: 1}
	g.Run("install -d -o postgres /srv/elsewhere")
	g.AddCluster(guests.Cluster{
		Major: scratch.major, DataDirectory: scratch.directory, Port: scratch.port, SocketDir: scratch.sockets, Name: "scratch",
		SegmentMiB: 1, Unit: "scratch",
		Settings: map[string]string{"archive_mode": "on", "archive_command": others, "shared_buffers": "32MB"},
	})
	took.lap(t, "a guest with three clusters")

	declared := job(name, g, `instances = { exclude = ["*-scratch"] }`) + fmt.Sprintf(`
output "protected" {
  value = [for i in pgark_postgresql_backup_job.%s.protected_instances : i.name]
}
`, name)
	w.configure("", declared)
	w.apply()

	var protected []string
	if err := json.Unmarshal([]byte(w.must("output", "-json", "protected")), &protected); err != nil {
		t.Fatal(err)
	}
	if expected := []string{billing.instance, orders.instance}; !reflect.DeepEqual(protected, expected) {
		t.Errorf("protected are %q, expected %q", protected, expected)
	}

	// Sizes change all the time, and an output that changes is something to do: so it is not there all the time.
	w.configure("", declared+fmt.Sprintf(`
data "pgark_postgresql_instances" "all" {
  host = %q
}

output "instances" {
  value = data.pgark_postgresql_instances.all.instances
}
`, g.Address))
	w.apply()
	found := w.instancesNow()
	if len(found) != 3 {
		t.Errorf("found %d instances, expected 3: %v", len(found), found)
	}
	number := map[string]string{}
	for _, i := range []restored{orders, billing, scratch} {
		row := strings.Split(strings.TrimSpace(g.SQL(i.sockets, i.port,
			"select system_identifier, current_setting('server_version_num') from pg_control_system()")), "|")
		number[i.instance] = row[0]
		f, ok := found[i.instance]
		if !ok {
			t.Errorf("found no %s, but %v", i.instance, found)
			continue
		}
		if f.Version != i.major || f.DataDirectory != i.directory || f.SocketDirectory != i.sockets || f.Port != i.port ||
			f.Owner != "postgres" || !f.Running || f.SystemIdentifier != row[0] || f.WALSegmentBytes != int64(i.segment)<<20 {
			t.Errorf("%s is said to be %+v, expected %+v with system identifier %s", i.instance, f, i, row[0])
		}
		if text(f.Role) != "primary" || text(f.ArchiveMode) != "on" || text(f.WALLevel) != "replica" || f.VersionNumber == nil || fmt.Sprint(*f.VersionNumber) != row[1] {
			t.Errorf("%s is said to be %q with archive_mode %q and wal_level %q", i.instance, text(f.Role), text(f.ArchiveMode), text(f.WALLevel))
		}
		if f.SizeBytes < 10<<20 {
			t.Errorf("%s is said to have %d bytes", i.instance, f.SizeBytes)
		}
		databases, spaces := "[postgres]", "[]"
		if i.instance == billing.instance {
			databases, spaces = "[invoices postgres]", "[{fast /mnt/fast/billing}]"
		}
		if fmt.Sprint(f.Databases) != databases || fmt.Sprint(f.Tablespaces) != spaces || fmt.Sprint(f.Extensions) != "[plpgsql]" || f.Problem != nil {
			t.Errorf("%s is said to hold the databases %v, tablespaces %v and extensions %v, with the problem %q",
				i.instance, f.Databases, f.Tablespaces, f.Extensions, text(f.Problem))
		}
	}
	for instance, service := range map[string]string{orders.instance: "null", billing.instance: "billing-database.service", scratch.instance: "scratch.service"} {
		if found := text(found[instance].Service); found != service {
			t.Errorf("%s is said to be run by %q, expected %q", instance, found, service)
		}
	}
	// Of another's command only the program is told: arguments may hold secrets.
	if command := text(found[scratch.instance].ArchiveCommand); command != "test …" {
		t.Errorf("the archive_command of %s is said to be %q", scratch.instance, command)
	}

	// What is known of a server that does not run comes from its files.
	g.Run("systemctl stop scratch")
	w.apply()
	f := w.instancesNow()[scratch.instance]
	if f.Running || f.Port != scratch.port || f.SocketDirectory != scratch.sockets || f.DataDirectory != scratch.directory ||
		f.SystemIdentifier != number[scratch.instance] || f.Version != scratch.major || f.Role != nil {
		t.Errorf("the stopped %s is said to be %+v", scratch.instance, f)
	}
	g.Run("systemctl start scratch")
	w.configure("", declared)
	w.apply()
	took = startClock()

	w.restore(g, name, orders, billing)
	took.lap(t, "two restores to a moment")
	w.nothingToDo()
	w.noGap(g, name)
	if n := len(w.list(g, name).Series); n != 2 {
		t.Errorf("found %d series, expected those of two instances", n)
	}

	g.SQL(scratch.sockets, scratch.port, "create table t (i int); select pg_switch_wal()")
	w.eventually(time.Minute, "the archiver of the instance that is left out works", func() bool {
		return g.Run("ls /srv/elsewhere") != ""
	})
	if set := strings.TrimSpace(g.SQL(scratch.sockets, scratch.port, "show archive_command")); set != others {
		t.Errorf("archive_command of the instance that is left out is %q", set)
	}

	w.destroy()
	for _, i := range []restored{orders, billing} {
		if set := strings.TrimSpace(g.SQL(i.sockets, i.port, "select setting from pg_settings where name = 'archive_command'")); set != "" {
			t.Errorf("destroy has left archive_command = %q in %s", set, i.instance)
		}
	}
}

// text is the value of a string that may be null.
func text(s *string) string {
	if s == nil {
		return "null"
	}
	return *s
}
