//go:build linux

package guest_test

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/pgark/terraform-provider-pgark/internal/engine/guest"
	"github.com/pgark/terraform-provider-pgark/test/pgtest"
)

// What somebody puts in the place of our archive_command is repaired, whatever is to be done about one that was there
// before; but in another cluster, one was there before.
func TestApply_repairs(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	c := cluster(t, pgtest.Options{})
	before := autoConf(t, c)
	w.apply(w.job(c))
	ours := c.Scalar("show archive_command")

	c.Exec("alter system set archive_command = 'cp %p /mnt/%f'")
	c.Exec("alter system set archive_library = 'basic_archive'")
	c.Exec("select pg_reload_conf()")
	w.eventually(func() bool { return c.Scalar("show archive_library") != "" })
	checks := w.expectFailing(w.job(c))
	for _, name := range []string{"archive_command", "archive_library"} {
		if k := checks.find(t, name); k.Status != guest.Warn {
			t.Errorf("found %+v, expected a warning", k)
		}
	}
	w.apply(w.job(c))
	if command, library := c.Scalar("show archive_command"), c.Scalar("show archive_library"); command != ours || library != "" {
		t.Errorf("after a repair: archive_command %q, archive_library %q", command, library)
	}

	// A file is for whoever wrote it.
	file := filepath.Join(c.DataDir, "postgresql.conf")
	conf, err := os.ReadFile(file)
	must(t, err)
	must(t, os.WriteFile(file, append(conf, "\narchive_library = 'basic_archive'\n"...), 0o600))
	c.Exec("select pg_reload_conf()")
	w.eventually(func() bool { return c.Scalar("show archive_library") != "" })
	w.expectFailing(w.job(c), "archive_library")
	must(t, os.WriteFile(file, conf, 0o600))
	c.Exec("select pg_reload_conf()")

	memory := w.layout.SettingsFile(jobName, name(c))
	remembered, err := os.ReadFile(memory)
	must(t, err)
	another := strings.Replace(string(remembered), c.SystemID.String(), "1"+c.SystemID.String()[1:], 1)
	if another == string(remembered) {
		t.Fatalf("found no system identifier in %s", remembered)
	}
	must(t, os.WriteFile(memory, []byte(another), 0o600))
	c.Exec("alter system set archive_command = 'cp %p /mnt/%f'")
	c.Exec("select pg_reload_conf()")
	w.eventually(func() bool { return c.Scalar("show archive_command") != ours })
	w.expectFailing(w.job(c), "archive_command")

	must(t, os.WriteFile(memory, remembered, 0o600))
	w.apply(w.job(c))
	must(t, w.guest.Remove(w.ctx, jobName))
	if found := autoConf(t, c); found != before {
		t.Errorf("postgresql.auto.conf: found\n%s\nexpected\n%s", found, before)
	}
}
