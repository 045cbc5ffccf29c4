//go:build linux

package guest_test

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/pgark/terraform-provider-pgark/internal/engine/guest"
	"github.com/pgark/terraform-provider-pgark/test/pgtest"
)

// What a server that runs tells of itself, on one connection.
func TestDiscover_inventory(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	c := cluster(t, pgtest.Options{Major: 15, WALSegmentSizeMB: 64, Tablespaces: []string{"space"}, Settings: map[string]string{
		"archive_command": "ship --password=hush %p", "archive_library": "basic_archive", "cluster_name": "shop/orders",
	}})
	c.Exec("create database orders")
	follow := pgtest.Dir(t)
	c.Run("pg_basebackup", "-R", "-D", filepath.Join(follow, "data"), "-T", c.TablespaceDir("space")+"="+filepath.Join(follow, "space"), "-X", "stream", "-c", "fast")
	standby := pgtest.Start(t, pgtest.Options{Major: 15, DataDir: filepath.Join(follow, "data"), Settings: map[string]string{"cluster_name": "follower"}})
	w.eventually(func() bool { return len(w.discover(c).Followers) > 0 })

	i := w.discover(c)
	if i.Name != "15-orders" || i.Role != "primary" || i.WALSegment != 64<<20 || i.Problem != "" || i.Manager != "" {
		t.Errorf("found %+v", i)
	}
	if i.ArchiveCommand != "ship …" || i.ArchiveLibrary != "basic_archive" || strings.Contains(fmt.Sprint(i), "hush") {
		t.Errorf("found archive command %q, library %q", i.ArchiveCommand, i.ArchiveLibrary)
	}
	if !slices.Equal(i.Databases, []string{"orders", "postgres"}) || !slices.Equal(i.Extensions, []string{"plpgsql"}) ||
		!slices.Equal(i.Followers, []string{"follower"}) || !slices.Equal(i.Tablespaces, []guest.Tablespace{{Name: "space", Location: c.TablespaceDir("space")}}) {
		t.Errorf("found %+v", i)
	}
	if s := w.discover(standby); s.Role != "replica" || s.Name != "15-follower" || s.SystemID != i.SystemID || len(s.Followers) > 0 {
		t.Errorf("found %+v", s)
	}
}

// A server that hangs costs its own answer, and a few seconds.
func TestDiscover_hangs(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	good, hung := cluster(t, pgtest.Options{}), cluster(t, pgtest.Options{})
	must(t, syscall.Kill(hung.PID(), syscall.SIGSTOP))
	t.Cleanup(func() { _ = syscall.Kill(hung.PID(), syscall.SIGCONT) }) // before the server is stopped
	began := time.Now()
	if i := w.discover(hung); !i.Running || i.Name != name(hung) || i.Role != "" || !strings.Contains(i.Problem, "did not answer within 5s") {
		t.Errorf("found %+v", i)
	}
	if i := w.discover(good); i.Problem != "" || i.Role != "primary" {
		t.Errorf("found %+v", i)
	}
	if took := time.Since(began); took > 25*time.Second {
		t.Errorf("two discoveries took %v", took)
	}
	if k := w.expectFailing(w.job(hung), "postgresql_running").find(t, "postgresql_running"); !strings.Contains(k.Found, "did not answer") {
		t.Errorf("found %+v", k)
	}
}

// A stopped cluster is known by the unit that starts it, and by its configuration, included files and all.
func TestDiscover_unitsAndIncludes(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	c := cluster(t, pgtest.Options{SeparateConfig: true, NoStart: true})
	write := func(path, text string) {
		t.Helper()
		must(t, os.MkdirAll(filepath.Dir(path), 0o755))
		must(t, os.WriteFile(path, []byte(text), 0o644))
	}
	units := filepath.Join(w.layout.Root, "etc/systemd/system")
	t.Cleanup(func() { _ = os.RemoveAll(filepath.Join(w.layout.Root, "etc/systemd")) })
	write(filepath.Join(w.layout.Root, "lib/systemd/system/postgresql@.service"), "[Service]\nType=notify\nEnvironment=PGDATA=/nowhere/%i\nExecStart=/usr/bin/postgres -D ${PGDATA}\n")
	t.Cleanup(func() { _ = os.RemoveAll(filepath.Join(w.layout.Root, "lib")) })
	write(filepath.Join(units, "postgresql@orders.service.d", "where.conf"), "[Service]\nEnvironment=\"PGDATA="+c.ConfigDir+"\"\n")
	c.Configure(map[string]string{"include_dir": "conf.d", "include_if_exists": "absent.conf"})
	write(filepath.Join(c.ConfigDir, "conf.d", "10-name.conf"), "cluster_name = 'shop'\ninclude '../more.conf'\n")
	write(filepath.Join(c.ConfigDir, "conf.d", "ignored"), "port = 1\n")
	write(filepath.Join(c.ConfigDir, "more.conf"), "port = 6543\nunix_socket_directories = '\"/run/here\", /tmp'\ninclude 'more.conf'\n")

	i := w.discover(c)
	if i.Running || i.Name != strconv.Itoa(c.Major)+"-shop" || i.Port != 6543 || i.SocketDirectory != "/run/here" || i.Service != "postgresql@orders.service" ||
		i.Owner != c.Owner || i.SystemID != c.SystemID {
		t.Errorf("found %+v", i)
	}
	// The name stays when it runs.
	must(t, os.Remove(filepath.Join(c.ConfigDir, "more.conf")))
	write(filepath.Join(c.ConfigDir, "conf.d", "10-name.conf"), "cluster_name = 'shop'\n")
	c.Start()
	if i := w.discover(c); !i.Running || i.Name != strconv.Itoa(c.Major)+"-shop" || i.Port != c.Port || i.SocketDirectory != c.SocketDir {
		t.Errorf("found %+v", i)
	}
}

// A cluster manager is found by its process, and told apart by the data directory that its configuration names.
func TestDiscover_manager(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	managed, free := cluster(t, pgtest.Options{}), cluster(t, pgtest.Options{})
	dir := pgtest.Dir(t)
	program, conf := filepath.Join(dir, "patroni"), filepath.Join(dir, "patroni.yml")
	must(t, os.WriteFile(program, []byte("#!/bin/sh\nread -r line\n"), 0o755))
	must(t, os.WriteFile(conf, []byte("scope: shop\npostgresql:\n  data_dir: "+managed.DataDir+" # ours\n"), 0o644))
	cmd := exec.CommandContext(t.Context(), "/bin/sh", program, conf)
	in, err := cmd.StdinPipe()
	must(t, err)
	must(t, cmd.Start())
	t.Cleanup(func() {
		_ = in.Close()
		_ = cmd.Wait()
	})
	w.eventually(func() bool { return w.discover(managed).Manager == "patroni" })
	if i := w.discover(free); i.Manager != "" {
		t.Errorf("found %+v", i)
	}
	if k := w.check(w.job(managed)).find(t, "cluster_manager"); k.Status != guest.Warn || k.Found != fmt.Sprintf("patroni (process %d) manages %s", cmd.Process.Pid, name(managed)) || k.Remedy == "" {
		t.Errorf("found %+v", k)
	}
	if k := w.check(w.job(free)).find(t, "cluster_manager"); k.Status != guest.Pass {
		t.Errorf("found %+v", k)
	}
}
