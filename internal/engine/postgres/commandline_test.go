package postgres

import (
	"maps"
	"testing"
)

func TestParseCommandLine(t *testing.T) {
	c := ParseCommandLine([]string{
		"/usr/lib/postgresql/15/bin/postgres", "-D", "/var/lib/postgresql/15/main", "-c", "config_file=/etc/postgresql/15/main/postgresql.conf",
		"-i", "-p5433", "-k", "/run/other", "--Cluster-Name=15/main", "-B", "100", "-l", "stray", "-cwal_level=logical", "-c", "archive_command=a=b",
	})
	if c.Program != "/usr/lib/postgresql/15/bin/postgres" || c.Directory != "/var/lib/postgresql/15/main" {
		t.Errorf("found %+v", c)
	}
	if expected := map[string]string{
		"config_file": "/etc/postgresql/15/main/postgresql.conf", "port": "5433", "unix_socket_directories": "/run/other",
		"cluster_name": "15/main", "wal_level": "logical", "archive_command": "a=b",
	}; !maps.Equal(c.Settings, expected) {
		t.Errorf("found %v, expected %v", c.Settings, expected)
	}
	for _, args := range [][]string{nil, {"postgres"}, {"postgres", "-D"}, {"postgres", "-", "--", "x"}} {
		ParseCommandLine(args) // whatever stands there, it does not panic
	}
}
