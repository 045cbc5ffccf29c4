//go:build linux

package guests

import (
	"fmt"
	"maps"
	"path"
	"slices"
	"strings"
)

// Cluster describes a PostgreSQL cluster that AddCluster makes.
type Cluster struct {
	Major         int    // 13 to 18
	DataDirectory string // made by postgres, who owns it
	Port          int
	SocketDir     string // made where it is missing
	Name          string // cluster_name; "" for none
	Checksums     bool
	SegmentMiB    int               // 0: 16
	Settings      map[string]string // of postgresql.conf, as they would be written there but without quotes
	Unit          string            // of a systemd service that runs it and starts it at boot; "" for none
}

// AddCluster makes and starts a cluster of any major, with binaries that the machine sees at /opt/postgresql/<major>.
// It listens on its socket only, and lets each account in under its own name. The machine's own psql and pgbench talk
// to it. Without Unit, or without systemd, pg_ctl starts it; on a machine without systemd a Unit stands for a line in
// /etc/rc.local, which starts it at boot.
func (g *Guest) AddCluster(c Cluster) {
	g.n.t.Helper()
	bin := fmt.Sprintf("/opt/postgresql/%d/bin", c.Major)
	initdb := []string{bin + "/initdb", "-D", quote(c.DataDirectory), "-U", "postgres", "-E", "UTF8", "--locale=C.UTF-8",
		"--auth-local=peer", "--auth-host=scram-sha-256"}
	switch {
	case c.Checksums:
		initdb = append(initdb, "-k")
	case c.Major >= 18:
		initdb = append(initdb, "--no-data-checksums")
	}
	if c.SegmentMiB != 0 {
		initdb = append(initdb, fmt.Sprintf("--wal-segsize=%d", c.SegmentMiB))
	}
	g.Run(fmt.Sprintf("mkdir -p %[1]s; [ -e %[2]s ] || install -d -m 700 -o postgres -g postgres %[2]s; cd /; runuser -u postgres -- %[3]s >/dev/null",
		quote(path.Dir(c.DataDirectory)), quote(c.DataDirectory), strings.Join(initdb, " ")))

	var conf strings.Builder
	set := func(name, value string) {
		fmt.Fprintf(&conf, "%s = '%s'\n", name, strings.ReplaceAll(value, "'", "''"))
	}
	set("port", fmt.Sprint(c.Port))
	set("listen_addresses", "")
	set("unix_socket_directories", c.SocketDir)
	set("cluster_name", c.Name)
	for _, name := range slices.Sorted(maps.Keys(c.Settings)) {
		set(name, c.Settings[name])
	}
	if _, err := g.enter("cat >>"+quote(c.DataDirectory+"/postgresql.conf"), []byte(conf.String())); err != nil {
		g.n.t.Fatalf("configure the cluster in %s: %v", c.DataDirectory, err)
	}
	makeSocketDir := fmt.Sprintf("[ -e %[1]s ] || install -d -m 755 -o postgres -g postgres %[1]s", quote(c.SocketDir))
	g.Run(makeSocketDir)

	start := fmt.Sprintf("cd /; runuser -u postgres -- %s/pg_ctl start -s -w -D %s -l /var/log/postgresql/port-%d.log", bin, quote(c.DataDirectory), c.Port)
	switch {
	case c.Unit == "":
		g.Run(start)
	case g.o.NoSystemd:
		if _, err := g.enter("cat >>/etc/rc.local", []byte(makeSocketDir+"\n"+start+"\n")); err != nil {
			g.n.t.Fatalf("write /etc/rc.local: %v", err)
		}
		g.Run(start)
	default:
		unit := strings.TrimSuffix(c.Unit, ".service")
		if strings.HasPrefix(c.SocketDir, "/run/") || strings.HasPrefix(c.SocketDir, "/tmp/") { // empty after a boot
			g.Put("/etc/tmpfiles.d/"+unit+".conf", fmt.Appendf(nil, "d %s 0755 postgres postgres -\n", c.SocketDir), 0o644)
		}
		g.Put("/etc/systemd/system/"+unit+".service", fmt.Appendf(nil, `[Unit]
Description=PostgreSQL %[1]d in %[2]s
After=network.target

[Service]
Type=forking
User=postgres
ExecStart=%[3]s/pg_ctl start -s -w -t 120 -D %[2]s
ExecReload=%[3]s/pg_ctl reload -s -D %[2]s
ExecStop=%[3]s/pg_ctl stop -s -m fast -D %[2]s
PIDFile=%[2]s/postmaster.pid
TimeoutSec=180

[Install]
WantedBy=multi-user.target
`, c.Major, c.DataDirectory, bin), 0o644)
		g.Run(fmt.Sprintf("systemctl daemon-reload; systemctl enable --quiet --now %s", unit))
	}
}
