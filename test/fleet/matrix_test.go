//go:build linux

package fleet

import (
	"fmt"
	"strings"
	"testing"

	"github.com/pgark/terraform-provider-pgark/test/guests"
)

// TestMatrix protects all majors with one job, and brings each back to a moment: page checksums on and off, WAL segments of
// 16 and of 64 MiB, in all four combinations.
func TestMatrix(t *testing.T) {
	const name = "matrix"
	w := newWorld(t)
	took := startClock()
	g := w.net.Boot(guests.Options{WithoutPostgreSQL: true})
	var all []restored
	for _, c := range []struct {
		major     int
		checksums bool
		segment   int // MiB
		by        string
	}{
		{13, false, 16, "time"},
		{14, true, 64, "lsn"},
		{15, false, 64, "time"},
		{16, true, 16, "lsn"},
		{17, false, 16, "lsn"},
		{18, true, 64, "time"},
	} {
		i := restored{
			instance: fmt.Sprintf("%d-main", c.major), major: c.major, directory: fmt.Sprintf("/var/lib/postgresql/%d/main", c.major),
			sockets: socketDir, port: 5400 + c.major, by: c.by, checksums: c.checksums, segment: c.segment,
		}
		g.AddCluster(guests.Cluster{
			Major: i.major, DataDirectory: i.directory, Port: i.port, SocketDir: i.sockets, Name: fmt.Sprintf("%d/main", c.major),
			Checksums: i.checksums, SegmentMiB: i.segment, Unit: fmt.Sprintf("postgresql-%d", c.major),
			Settings: map[string]string{"archive_mode": "on", "shared_buffers": "32MB"},
		})
		all = append(all, i)
	}
	took.lap(t, "a guest with six clusters")

	w.configure("", job(name, g, ""))
	w.apply()
	took = startClock()
	w.restore(g, name, all...)
	took.lap(t, "six restores to a moment")
	w.nothingToDo()
	w.noGap(g, name)
	if n := len(w.list(g, name).Series); n != len(all) {
		t.Errorf("found %d series, expected %d", n, len(all))
	}
	w.destroy()
	for _, i := range all {
		if set := g.SQL(i.sockets, i.port, "select setting from pg_settings where name = 'archive_command'"); strings.TrimSpace(set) != "" {
			t.Errorf("destroy has left archive_command = %q in %s", set, i.instance)
		}
	}
}
