//go:build linux

package remote

import (
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/pgark/terraform-provider-pgark/internal/engine/guest"
	"github.com/pgark/terraform-provider-pgark/internal/engine/guest/sshlink"
	"github.com/pgark/terraform-provider-pgark/internal/engine/job"
	"github.com/pgark/terraform-provider-pgark/internal/engine/objectstore"
	"github.com/pgark/terraform-provider-pgark/internal/engine/repository"
	"github.com/pgark/terraform-provider-pgark/test/guests"
)

// Accounts that are not root, on a whole system with sudo, and /tmp mounted noexec.
func TestGuest_accounts(t *testing.T) {
	net := guests.NewNetwork(t)
	machine := net.Boot(guests.Options{})
	documented, err := os.ReadFile("../../../../examples/guides/ssh-and-sudo/sudoers")
	must(t, err)
	const password = "correct horse"
	machine.AddUser("deploy", string(documented))
	machine.AddUser("typist", "typist ALL=(root) ALL")
	machine.AddUser("nobodys", "")
	machine.Run("echo 'typist:" + password + "' | chpasswd")
	machine.MountNoexec("/tmp")
	keyFile, _ := net.Key()

	location := net.S3().Location("accounts")
	store, err := objectstore.Open(t.Context(), location, objectstore.Options{})
	must(t, err)
	_, _, err = repository.Create(t.Context(), store, nil)
	must(t, err)
	j := &job.Job{Name: jobName, Host: "db1", Enabled: true, Repository: job.Repository{
		URL: location.URL, Region: location.Region, Endpoint: location.Endpoint, UsePathStyle: location.UsePathStyle,
	}}
	j.ApplyDefaults()
	settings := guest.SettingsPolicy{Manage: true, Restart: "allow", ExistingArchiveCommand: "fail"}
	before := machine.Files()

	connect := func(t *testing.T, user string, change func(*sshlink.Config)) *Guest {
		t.Helper()
		c := sshlink.Config{Host: machine.Address, User: user, PrivateKeyFile: keyFile, HostKey: machine.HostKey()}
		change(&c)
		link, err := sshlink.New(c)
		must(t, err)
		return New(Options{Link: link, Runner: func(string) (Runner, error) { return theRunner, nil }})
	}
	for name, c := range map[string]struct {
		user   string
		change func(*sshlink.Config)
		root   bool
	}{
		"root":                             {"root", func(*sshlink.Config) {}, true},
		"the documented lines of sudoers":  {"deploy", func(*sshlink.Config) {}, true},
		"sudo with a password":             {"typist", func(c *sshlink.Config) { c.SudoPassword = password }, true},
		"no root":                          {"nobodys", func(c *sshlink.Config) { c.Sudo = sshlink.SudoNever }, false},
		"no root, although there could be": {"deploy", func(c *sshlink.Config) { c.Sudo = sshlink.SudoNever }, false},
	} {
		t.Run(name, func(t *testing.T) {
			g := connect(t, c.user, c.change)
			found, err := g.Discover(t.Context())
			if !c.root {
				// Not seen is not absent.
				if err == nil || !strings.Contains(err.Error(), "may not look into /var/lib/postgresql/15/main") {
					t.Errorf("found %+v, %v; expected to be told what the account may not see", found, err)
				}
			} else if must(t, err); !slices.ContainsFunc(found, func(i guest.Instance) bool { return i.Name == "15-main" && i.Running }) {
				t.Errorf("found %+v, expected 15-main among them", found)
			}
			checks, err := g.Check(t.Context(), guest.CheckRequest{Job: j, Settings: settings, Credentials: location.Credentials})
			must(t, err)
			if failed := slices.ContainsFunc(checks, func(k guest.Check) bool { return k.Status == guest.Fail }); failed == c.root {
				t.Errorf("found %+v", checks)
			}
			processes := machine.Run("ps axww -o user,args")
			for _, secret := range []string{password, location.Credentials.SecretAccessKey} {
				if strings.Contains(processes, secret) {
					t.Errorf("found a secret among the arguments of programs:\n%s", processes)
				}
			}
			if !strings.Contains(processes, "pgark guest") {
				t.Errorf("found no server:\n%s", processes)
			}
			// Its file has gone, while it works.
			if diff := cmp.Diff(before, machine.Files()); diff != "" {
				t.Errorf("files on the guest differ (-before +now):\n%s", diff)
			}
			must(t, g.Close())
			if left, err := machine.Try("pgrep -a pgark"); err == nil {
				t.Errorf("found %s, expected no process", left)
			}
		})
	}

	t.Run("sudo without the password", func(t *testing.T) {
		g := connect(t, "typist", func(*sshlink.Config) {})
		_, err := g.Machine(t.Context())
		expectSudo(t, err, sshlink.SudoNeedsPassword)
		must(t, g.Close())
	})
	t.Run("sudo is not allowed", func(t *testing.T) {
		g := connect(t, "nobodys", func(c *sshlink.Config) { c.SudoPassword = "unused" })
		_, err := g.Machine(t.Context())
		expectSudo(t, err, sshlink.SudoNotAllowed)
		must(t, g.Close())
	})
	if diff := cmp.Diff(before, machine.Files()); diff != "" {
		t.Errorf("files on the guest differ (-before +after):\n%s", diff)
	}

	t.Run("apply by the documented lines", func(t *testing.T) {
		g := connect(t, "deploy", func(*sshlink.Config) {})
		d := guest.Deployment{Job: j, Settings: settings, Credentials: location.Credentials}
		state, err := g.Apply(t.Context(), d)
		must(t, err)
		equal(t, "runner", state.RunnerSHA256, theRunner.SHA256)
		must(t, g.Close())
		g = connect(t, "deploy", func(*sshlink.Config) {}) // by the runner that is deployed now
		state, err = g.Apply(t.Context(), d)
		must(t, err)
		if len(state.Instances) != 1 || state.Instances[0].Runner != guest.RunnerRunning {
			t.Errorf("found %+v", state.Instances)
		}
		exe := machine.Run(fmt.Sprintf("readlink /proc/%d/exe", serverOf(g)))
		equal(t, "runner", exe, "/usr/local/lib/pgark/"+theRunner.SHA256+"/pgark")
		must(t, g.Remove(t.Context(), jobName))
		must(t, g.Close())
		if left, err := machine.Try("ls -d /usr/local/lib/pgark /etc/pgark /var/lib/pgark /home/deploy/.pgark* 2>/dev/null"); err == nil || left != "" {
			t.Errorf("found %s, expected nothing", left)
		}
	})
}

func expectSudo(t *testing.T, err error, problem string) {
	t.Helper()
	if e, ok := err.(*sshlink.SudoError); !ok || e.Problem != problem || e.Hint() == "" { //nolint:errorlint // as it comes
		t.Errorf("found %v, expected a *sshlink.SudoError: %s", err, problem)
	}
}
