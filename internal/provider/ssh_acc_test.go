package provider

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	tfjson "github.com/hashicorp/terraform-json"
	"github.com/hashicorp/terraform-plugin-go/tfprotov6"
	"github.com/hashicorp/terraform-plugin-go/tftypes"
	"github.com/hashicorp/terraform-plugin-testing/helper/resource"
	"github.com/hashicorp/terraform-plugin-testing/knownvalue"
	"github.com/hashicorp/terraform-plugin-testing/plancheck"
	"github.com/hashicorp/terraform-plugin-testing/statecheck"
	"github.com/hashicorp/terraform-plugin-testing/terraform"
	"github.com/hashicorp/terraform-plugin-testing/tfjsonpath"

	"github.com/pgark/terraform-provider-pgark/internal/engine/job"
	"github.com/pgark/terraform-provider-pgark/test/pgtest"
	"github.com/pgark/terraform-provider-pgark/test/sshtest"
)

// sshHost is this machine as a guest: root logs in over loopback, and PGARK_ROOT keeps what is deployed in a directory.
const sshHost = "127.0.0.1"

// sshWorld is an accWorld whose guest is reached over SSH.
type sshWorld struct {
	*accWorld

	sshd       *sshtest.Server
	knownHosts string
}

func newSSHWorld(t *testing.T) *sshWorld {
	t.Helper()
	w := &sshWorld{accWorld: newAccWorld(t, pgtest.Options{}), sshd: sshtest.Start(t), knownHosts: filepath.Join(t.TempDir(), "known_hosts")}
	// To the provider, this machine and the one behind the SSH server are two.
	elsewhere := job.Layout{Root: t.TempDir()}
	w.here = func() job.Layout { return elsewhere }
	for _, name := range []string{envSSHUser, envSSHPort, envSSHPrivateKeyFile, envSSHPassword, envSSHSudoPassword, envSSHBastionHost, envSSHAgent} {
		t.Setenv(name, "")
	}
	return w
}

// config is a configuration with a job over SSH: lines for the provider, the ssh block, the job, and the rest.
func (w *sshWorld) config(provider, ssh, job, rest string) string {
	return w.providerConfig(fmt.Sprintf(`
  %s
  ssh = {
    private_key      = %q
    known_hosts_file = %q
    timeout          = "10s"
    %s
  }`, provider, w.sshd.PrivateKey, w.knownHosts, ssh)) + w.repositoryConfig() + fmt.Sprintf(`
resource "pgark_postgresql_backup_job" "orders" {
  name       = "orders"
  host       = %q
  repository = pgark_repository.main.url
  instances  = { include = ["*-%d"] }
  image      = { on_create = false }
  %s
}
`, sshHost, w.cluster.Port, job) + rest
}

// wire is a TCP port in front of the SSH server that can be cut.
type wire struct {
	Port int

	to       string
	mu       sync.Mutex // guards what follows
	listener net.Listener
	open     map[net.Conn]bool
}

func (w *sshWorld) wire() *wire {
	w.Helper()
	l := &wire{to: net.JoinHostPort(w.sshd.Address, strconv.Itoa(w.sshd.Port)), open: map[net.Conn]bool{}}
	l.mend(w.T)
	w.Cleanup(l.cut)
	return l
}

func (l *wire) mend(t *testing.T) {
	t.Helper()
	listener, err := new(net.ListenConfig).Listen(t.Context(), "tcp", net.JoinHostPort(sshHost, strconv.Itoa(l.Port)))
	if err != nil {
		t.Fatal(err)
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.listener = listener
	if a, ok := listener.Addr().(*net.TCPAddr); ok {
		l.Port = a.Port
	}
	go func() {
		for {
			near, err := listener.Accept()
			if err != nil {
				return // cut
			}
			go l.carry(near)
		}
	}()
}

func (l *wire) carry(near net.Conn) {
	far, err := (&net.Dialer{Timeout: time.Second}).DialContext(context.Background(), "tcp", l.to) // cut ends it
	if err != nil {
		near.Close()
		return
	}
	for _, c := range []net.Conn{near, far} {
		l.mu.Lock()
		l.open[c] = true
		l.mu.Unlock()
	}
	pass := func(to, from net.Conn) {
		_, err := io.Copy(to, from)
		_ = errors.Join(err, to.Close(), from.Close()) // one side has ended, so does the other
	}
	go pass(far, near)
	pass(near, far)
}

// cut closes the port and what goes through it.
func (l *wire) cut() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.listener.Close()
	for c := range l.open {
		c.Close()
	}
	clear(l.open)
}

// TestAccSSH follows a job and its WAL retention through their life over SSH: first contact, drift, another way to the
// same host, import, destroy.
func TestAccSSH(t *testing.T) {
	w := newSSHWorld(t)
	through := w.wire()
	retention := fmt.Sprintf(`
resource "pgark_wal_retention" "orders" {
  host      = %[1]s.host
  job       = %[1]s.name
  keep_days = 7
}
`, jobAddress)
	data := fmt.Sprintf(`
data "pgark_postgresql_instances" "there" {
  host       = %[1]s.host
  depends_on = [%[1]s]
}
data "pgark_prerequisites" "there" {
  host       = %[1]s.host
  job        = %[1]s.name
  include    = ["*-%[2]d"]
  depends_on = [%[1]s]
}
`, jobAddress, w.cluster.Port)
	onPort := func(port int) string { return fmt.Sprintf("connection = { port = %d }", port) }
	const acceptNew = `host_key_policy = "accept-new"`
	secrets := noSecret{w.s3.SecretAccessKey, strings.Split(w.sshd.PrivateKey, "\n")[2]}
	key := knownvalue.StringExact(w.sshd.HostKey)
	config := w.config("", acceptNew, onPort(through.Port), retention)

	var before time.Time
	w.test(
		resource.TestStep{ // nobody knows the host yet
			Config: w.config("", "", onPort(through.Port), ""), PlanOnly: true,
			ExpectError: inOrder("Unable to Check Prerequisites on 127.0.0.1", "is not known", "accept-new"),
		},
		resource.TestStep{
			Config: config + data,
			ConfigPlanChecks: resource.ConfigPlanChecks{PreApply: []plancheck.PlanCheck{
				plancheck.ExpectUnknownValue(jobAddress, tfjsonpath.New("host_key")),
			}},
			ConfigStateChecks: []statecheck.StateCheck{
				secrets,
				statecheck.ExpectKnownValue(jobAddress, tfjsonpath.New("host_key"), key),
				statecheck.ExpectKnownValue(jobAddress, tfjsonpath.New("runners").AtMapKey(w.instance()), knownvalue.StringExact("running")),
				statecheck.ExpectKnownValue(jobAddress, tfjsonpath.New("guest_settings_actual").AtMapKey(w.instance()).AtMapKey("archive_command"), knownvalue.StringExact(w.ours())),
				statecheck.ExpectKnownValue(retentionAddress, tfjsonpath.New("host_key"), key),
				statecheck.ExpectKnownValue(retentionAddress, tfjsonpath.New("connection").AtMapKey("port"), knownvalue.Int64Exact(int64(through.Port))),
				statecheck.ExpectKnownValue("data.pgark_prerequisites.there", tfjsonpath.New("ready"), knownvalue.Bool(true)),
				stateFunc(func(s *tfjson.State) error { return w.discovered(s) }),
			},
		},
		resource.TestStep{ // a known host is one that is pinned: no file is needed any more
			Config:           w.config("", "", onPort(through.Port), retention),
			ConfigPlanChecks: expectAction(plancheck.ResourceActionNoop),
		},
		resource.TestStep{ // which cannot say how the host is reached, so that the provider does
			Config:       w.config("", fmt.Sprintf("%s\n port = %d", acceptNew, through.Port), onPort(through.Port), retention),
			ResourceName: jobAddress, ImportState: true, ImportStateId: sshHost + "/orders", ImportStateVerify: true,
			ImportStateVerifyIdentifierAttribute: "name", ImportStateVerifyIgnore: []string{"timeouts", "connection.port"},
		},
		resource.TestStep{
			Config:       w.config("", fmt.Sprintf("%s\n port = %d", acceptNew, through.Port), onPort(through.Port), retention),
			ResourceName: retentionAddress, ImportState: true, ImportStateId: sshHost + "/orders", ImportStateVerify: true,
			ImportStateVerifyIdentifierAttribute: "job", ImportStateVerifyIgnore: []string{"connection.port"},
		},
		resource.TestStep{ // somebody changes archive_command by hand
			PreConfig: func() {
				w.cluster.Exec("alter system set archive_command = 'true --password=hush'")
				w.cluster.Exec("select pg_reload_conf()")
			},
			Config:            config,
			ConfigPlanChecks:  expectAction(plancheck.ResourceActionUpdate, "guest_settings_actual"),
			ConfigStateChecks: []statecheck.StateCheck{noSecret{"hush"}},
			Check:             func(*terraform.State) error { return w.archiveCommandMustBe(w.ours()) },
		},
		resource.TestStep{ // another runner, which is not for this guest, also when the job is deployed anew
			PreConfig:        func() { w.changed = []byte("another") },
			Config:           w.config("", acceptNew, onPort(through.Port)+"\n runner_update = \"manual\"\n wal = { mode = \"interval\" }", retention),
			ConfigPlanChecks: expectAction(plancheck.ResourceActionUpdate, "config_sha256"),
			ConfigStateChecks: []statecheck.StateCheck{
				statecheck.ExpectKnownValue(jobAddress, tfjsonpath.New("runner_sha256"), knownvalue.StringExact(w.runnerDigest())),
			},
		},
		resource.TestStep{ // and now it is
			Config:           config,
			ConfigPlanChecks: expectAction(plancheck.ResourceActionUpdate, "runner_sha256"),
		},
		resource.TestStep{ // another way to the same host changes nothing there
			PreConfig: func() { before = w.jobFileTime() },
			Config:    w.config("", acceptNew, onPort(w.sshd.Port), retention),
			ConfigPlanChecks: resource.ConfigPlanChecks{PreApply: []plancheck.PlanCheck{
				plancheck.ExpectResourceAction(jobAddress, plancheck.ResourceActionUpdate),
				plancheck.ExpectKnownValue(jobAddress, tfjsonpath.New("host_key"), key),
				plancheck.ExpectResourceAction(retentionAddress, plancheck.ResourceActionNoop),
			}},
			ConfigStateChecks: []statecheck.StateCheck{
				statecheck.ExpectKnownValue(retentionAddress, tfjsonpath.New("connection").AtMapKey("port"), knownvalue.Int64Exact(int64(w.sshd.Port))),
			},
			Check: func(*terraform.State) error {
				if now := w.jobFileTime(); !now.Equal(before) {
					return fmt.Errorf("the job file was written at %s, expected it as it was at %s", now, before)
				}
				return nil
			},
		},
	)
	if err := w.archiveCommandMustBe(""); err != nil {
		t.Error(err)
	}
	if left := w.guestFiles(); len(left) > 0 {
		t.Errorf("destroy has left %v", left)
	}
}

// runnerDigest is that of the runner as it is built.
func (w *accWorld) runnerDigest() string {
	w.Helper()
	b, err := testRunner()
	if err != nil {
		w.Fatal(err)
	}
	sum := sha256.Sum256(b)
	return hex.EncodeToString(sum[:])
}

func (w *accWorld) jobFileTime() time.Time {
	w.Helper()
	info, err := os.Stat(w.layout.JobFile("orders"))
	if err != nil {
		w.Fatal(err)
	}
	return info.ModTime()
}

// TestAccSSH_unreachable takes the guest away, and gives it another host key: nothing is concluded from that, and what the
// messages say is the way out.
func TestAccSSH_unreachable(t *testing.T) {
	w := newSSHWorld(t)
	through := w.wire()
	const acceptNew = `host_key_policy = "accept-new"`
	on := func(extra string) string { return fmt.Sprintf("connection = { port = %d, %s }", through.Port, extra) }
	who := fmt.Sprintf("root@%s:%d", sshHost, through.Port)
	config := w.config("", acceptNew, on(""), "")
	other := sshtest.Start(t) // another host key
	declares := fmt.Sprintf("host_key = %q", other.HostKey+" root@db1")

	w.test(
		resource.TestStep{ // it is not there when the plan is made, and comes up while it is waited for
			PreConfig: func() {
				through.cut()
				time.AfterFunc(5*time.Second, func() { through.mend(t) })
			},
			Config: w.config("", acceptNew+"\n timeout = \"2s\"", on(""), ""),
		},
		resource.TestStep{
			PreConfig: through.cut, Config: config, PlanOnly: true,
			ExpectError: inOrder(`Unable to Read PostgreSQL Backup Job "orders" on 127.0.0.1`, who, `on_unreachable = "warn"`, "terraform state rm"),
		},
		resource.TestStep{
			Config: w.config(`on_unreachable = "warn"`, acceptNew, on(""), ""), PlanOnly: true,
		},
		resource.TestStep{
			Config: config, Destroy: true, ExpectError: inOrder(who),
		},
		resource.TestStep{ // the SSH server has moved to another port: the state leads nowhere, and the plan knows better
			Config:           w.config(`on_unreachable = "warn"`, acceptNew, fmt.Sprintf("connection = { port = %d }", w.sshd.Port), ""),
			ConfigPlanChecks: expectAction(plancheck.ResourceActionUpdate, "config_sha256"),
		},
		resource.TestStep{
			PreConfig: func() { through.mend(t) }, Config: config,
			ConfigPlanChecks: expectAction(plancheck.ResourceActionUpdate),
		},
		resource.TestStep{ // somebody else answers
			PreConfig: func() {
				through.cut()
				through.to = net.JoinHostPort(other.Address, strconv.Itoa(other.Port))
				through.mend(t)
			},
			Config: config, PlanOnly: true,
			ExpectError: inOrder("Unable to Read", "has changed, or this is another host", "connection.host_key"),
		},
		resource.TestStep{
			Config: w.config(`on_unreachable = "warn"`, acceptNew, on(""), ""), PlanOnly: true,
			ExpectError: inOrder("has changed, or this is another host"),
		},
		resource.TestStep{ // declared, it is the one, which does not let this account in
			Config:      w.config("", acceptNew, on(declares), ""),
			ExpectError: inOrder("refuses the login"),
		},
		resource.TestStep{
			Config:            strings.Replace(w.config("", acceptNew, on(declares), ""), strconv.Quote(w.sshd.PrivateKey), strconv.Quote(other.PrivateKey), 1),
			ConfigPlanChecks:  expectAction(plancheck.ResourceActionUpdate, "config_sha256"),
			ConfigStateChecks: []statecheck.StateCheck{statecheck.ExpectKnownValue(jobAddress, tfjsonpath.New("host_key"), knownvalue.StringExact(other.HostKey))},
		},
	)
}

// TestAccSSH_retention reaches a retention by a connection of its own, and loses it.
func TestAccSSH_retention(t *testing.T) {
	w := newSSHWorld(t)
	through := w.wire()
	config := func(provider, connection string) string {
		return w.config(provider, fmt.Sprintf("host_key_policy = \"accept-new\"\n port = %d", w.sshd.Port), "", fmt.Sprintf(`
resource "pgark_wal_retention" "orders" {
  host      = %[1]s.host
  job       = %[1]s.name
  keep_days = 7
  %[2]s
}
`, jobAddress, connection))
	}
	own := fmt.Sprintf("connection = { port = %d }", through.Port)
	w.test(
		resource.TestStep{Config: config("", own)},
		resource.TestStep{
			PreConfig: through.cut, Config: config("", own), PlanOnly: true,
			ExpectError: inOrder(`Unable to Read WAL Retention "orders" on 127.0.0.1`, fmt.Sprintf("root@%s:%d", sshHost, through.Port), "on_unreachable"),
		},
		resource.TestStep{Config: config(`on_unreachable = "warn"`, own), PlanOnly: true},
		resource.TestStep{
			Config: config(`on_unreachable = "warn"`, fmt.Sprintf("connection = { port = %d }", w.sshd.Port)),
			ConfigPlanChecks: resource.ConfigPlanChecks{PreApply: []plancheck.PlanCheck{
				plancheck.ExpectResourceAction(retentionAddress, plancheck.ResourceActionUpdate),
			}},
			ConfigStateChecks: []statecheck.StateCheck{
				statecheck.ExpectKnownValue(retentionAddress, tfjsonpath.New("host_key"), knownvalue.StringExact(w.sshd.HostKey)),
			},
		},
		resource.TestStep{ // without one of its own it keeps the last, and follows the job from now on
			PreConfig: func() { through.mend(t) },
			Config:    config("", ""),
			ConfigPlanChecks: resource.ConfigPlanChecks{PreApply: []plancheck.PlanCheck{
				plancheck.ExpectResourceAction(retentionAddress, plancheck.ResourceActionUpdate),
			}},
		},
		resource.TestStep{
			Config: strings.Replace(config("", ""), "image      =", own+"\n image =", 1),
			ConfigStateChecks: []statecheck.StateCheck{
				statecheck.ExpectKnownValue(retentionAddress, tfjsonpath.New("connection").AtMapKey("port"), knownvalue.Int64Exact(int64(through.Port))),
			},
		},
	)
}

// TestAccSSH_unknownProvider has a provider whose ssh block comes from a resource: while that is not known nothing is
// asked, nothing is forgotten, and nothing fails.
func TestAccSSH_unknownProvider(t *testing.T) {
	w := newSSHWorld(t)
	config := func(label string) string {
		return w.config("", fmt.Sprintf("host_key_policy = \"accept-new\"\n port = %d\n user = split(\"/\", terraform_data.machine.output)[0]", w.sshd.Port), "", fmt.Sprintf(`
resource "terraform_data" "machine" { input = "root/%s" }
`, label))
	}
	w.test(
		resource.TestStep{Config: config("first"), ConfigPlanChecks: expectAction(plancheck.ResourceActionCreate)},
		resource.TestStep{
			Config:           config("second"), // its output is unknown again
			ConfigPlanChecks: expectAction(plancheck.ResourceActionNoop),
		},
	)
}

// TestImportByIdentity imports as an import block with an identity does, which not every Terraform can.
func TestImportByIdentity(t *testing.T) {
	ctx := t.Context()
	for name, nameAttribute := range map[string]string{"pgark_postgresql_backup_job": "name", "pgark_wal_retention": "job"} {
		t.Run(name, func(t *testing.T) {
			server := serve(&pgarkProvider{version: "test", world: world{
				layout: func() job.Layout { return job.Layout{Root: t.TempDir()} },
			}})()
			schemas, err := server.GetProviderSchema(ctx, &tfprotov6.GetProviderSchemaRequest{})
			if err != nil {
				t.Fatal(err)
			}
			empty := map[string]tftypes.Value{}
			provider, _ := schemas.Provider.ValueType().(tftypes.Object)
			for attribute, typ := range provider.AttributeTypes {
				empty[attribute] = tftypes.NewValue(typ, nil)
			}
			configured, err := server.ConfigureProvider(ctx, &tfprotov6.ConfigureProviderRequest{Config: dynamic(t, provider, empty)})
			if err != nil || len(configured.Diagnostics) > 0 {
				t.Fatal(err, configured)
			}
			typ := tftypes.Object{AttributeTypes: map[string]tftypes.Type{"host": tftypes.String, nameAttribute: tftypes.String}}
			resp, err := server.ImportResourceState(ctx, &tfprotov6.ImportResourceStateRequest{TypeName: name, Identity: &tfprotov6.ResourceIdentityData{
				IdentityData: dynamic(t, typ, map[string]tftypes.Value{
					"host": tftypes.NewValue(tftypes.String, "db1"), nameAttribute: tftypes.NewValue(tftypes.String, "orders"),
				}),
			}})
			if err != nil {
				t.Fatal(err)
			}
			for _, d := range resp.Diagnostics {
				t.Errorf("%s: %s", d.Summary, d.Detail)
			}
			if len(resp.ImportedResources) != 1 {
				t.Fatalf("%d resources were imported, expected one", len(resp.ImportedResources))
			}
			state, err := resp.ImportedResources[0].State.Unmarshal(schemas.ResourceSchemas[name].ValueType())
			if err != nil {
				t.Fatal(err)
			}
			var found map[string]tftypes.Value
			if err := state.As(&found); err != nil {
				t.Fatal(err)
			}
			for attribute, want := range map[string]string{"host": "db1", nameAttribute: "orders"} {
				if !found[attribute].Equal(tftypes.NewValue(tftypes.String, want)) {
					t.Errorf("%s is %s, expected %q", attribute, found[attribute], want)
				}
			}
			if text := found["connection"].String(); !strings.Contains(text, `"type":tftypes.String<"ssh">`) {
				t.Errorf("the connection is %s, expected one over SSH", text)
			}
		})
	}
}

// dynamic is an object of a type on the wire.
func dynamic(t *testing.T, typ tftypes.Type, values map[string]tftypes.Value) *tfprotov6.DynamicValue {
	t.Helper()
	v, err := tfprotov6.NewDynamicValue(typ, tftypes.NewValue(typ, values))
	if err != nil {
		t.Fatal(err)
	}
	return &v
}
