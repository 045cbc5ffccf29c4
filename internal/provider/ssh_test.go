package provider

import (
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/hashicorp/terraform-plugin-framework-timetypes/timetypes"
	"github.com/hashicorp/terraform-plugin-framework/diag"
	"github.com/hashicorp/terraform-plugin-framework/types"

	"github.com/pgark/terraform-provider-pgark/internal/engine/guest/sshlink"
	"github.com/pgark/terraform-provider-pgark/internal/engine/job"
)

// Two public keys that nobody has the private keys of any more.
const (
	someKey  = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIJZ3m2yqkqQ0XKyC0qkPbVf9XNbBz4HS5Cw6kVKW6b2M"
	otherKey = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIFNqpkGp1GIcXcGvWbSBqDNyB3KOHzWqC3rjAZcTDK7t"
)

func environment(set map[string]string) func(string) string {
	return func(name string) string { return set[name] }
}

func TestParseHostKey(t *testing.T) {
	for name, c := range map[string]struct{ key, want, problem string }{
		"as it is":         {someKey, someKey, ""},
		"with a comment":   {someKey + " root@db1", someKey, ""},
		"with a line end":  {someKey + "\n", someKey, ""},
		"with a host":      {"db1 " + someKey, "", `"db1" stands before the key's type`},
		"two keys":         {someKey + "\n" + otherKey, "", "more than one line"},
		"a fingerprint":    {"SHA256:fPzygORVtbm+C0IrKRN6Lv7H7agKzc8DC30ZxACrS7A", "", "no public key"},
		"a cut key":        {someKey[:40], "", "no public key"},
		"something secret": {"-----BEGIN OPENSSH PRIVATE KEY-----", "", "no public key"},
	} {
		t.Run(name, func(t *testing.T) {
			got, err := parseHostKey(c.key)
			if got != c.want || (err == nil) != (c.problem == "") || err != nil && !strings.Contains(err.Error(), c.problem) {
				t.Errorf("found %q, %v, expected %q, %q", got, err, c.want, c.problem)
			}
		})
	}
}

func TestSSHFrom(t *testing.T) {
	var diags diag.Diagnostics
	nothing := environment(nil)
	d := sshFrom(sshModel{}, nothing, &diags)
	noDiagnostics(t, diags)
	want := sshlink.Config{Host: "db1", User: "root", Port: 22, HostKeyPolicy: sshlink.Strict, Sudo: sshlink.SudoAuto, Timeout: 30 * time.Second}
	if diff := cmp.Diff(want, d.config("db1", reach{}, tryOnce)); diff != "" {
		t.Errorf("the defaults (-want +got):\n%s", diff)
	}

	env := environment(map[string]string{
		envSSHUser: "deploy", envSSHPort: "2222", envSSHPrivateKeyFile: "~/.ssh/deploy", envSSHPassword: "login", envSSHSudoPassword: "sudo", envSSHBastionHost: "jump",
	})
	want = sshlink.Config{
		Host: "db1", User: "deploy", Port: 2222, PrivateKeyFile: "~/.ssh/deploy", Password: "login", SudoPassword: "sudo",
		HostKeyPolicy: sshlink.Strict, Sudo: sshlink.SudoAuto, Timeout: 30 * time.Second, WaitForHost: 5 * time.Minute,
		Bastion: &sshlink.Config{Host: "jump", Port: 2222, User: "deploy"},
	}
	if diff := cmp.Diff(want, sshFrom(sshModel{}, env, &diags).config("db1", reach{}, waitForHost)); diff != "" {
		t.Errorf("the environment (-want +got):\n%s", diff)
	}

	block := sshModel{
		User: types.StringValue("admin"), Port: types.Int64Value(23), PrivateKey: types.StringValue("key"), Agent: types.BoolValue(false),
		HostKeyPolicy: types.StringValue(sshlink.AcceptNew), Timeout: timetypes.NewGoDurationValueFromStringMust("3s"),
		WaitForHost: timetypes.NewGoDurationValueFromStringMust("0s"), BastionHost: types.StringValue("gate"), BastionUser: types.StringValue("door"),
		BastionHostKey: types.StringValue(someKey),
	}
	no := false
	want = sshlink.Config{
		Host: "db1", User: "postgres", Port: 24, PrivateKey: "key", Password: "login", SudoPassword: "sudo", Agent: &no, HostKey: otherKey,
		HostKeyPolicy: sshlink.AcceptNew, Sudo: sshlink.SudoAuto, Timeout: 3 * time.Second,
		Bastion: &sshlink.Config{Host: "site", Port: 23, User: "door", HostKey: someKey},
	}
	d = sshFrom(block, env, &diags)
	r := reach{user: "postgres", port: 24, bastionHost: "site", declaredKey: otherKey, pinnedKey: someKey}
	if diff := cmp.Diff(want, d.config("db1", r, waitForHost)); diff != "" {
		t.Errorf("connection over block over environment (-want +got):\n%s", diff)
	}
	noDiagnostics(t, diags)

	for _, port := range []string{"ssh", "0", "65536"} {
		var diags diag.Diagnostics
		sshFrom(sshModel{}, environment(map[string]string{envSSHPort: port}), &diags)
		if !diags.HasError() || !strings.Contains(diags[0].Detail(), envSSHPort) {
			t.Errorf("%s=%s: found %v", envSSHPort, port, diags)
		}
	}
}

func TestConfig_insecureForgetsPins(t *testing.T) {
	s := sshDefaults{host: sshlink.Config{HostKeyPolicy: sshlink.Insecure}}
	if got := s.config("db1", reach{pinnedKey: someKey}, tryOnce).HostKey; got != "" {
		t.Errorf("found the pinned key %q, expected none: any is accepted", got)
	}
	if got := s.config("db1", reach{pinnedKey: someKey, declaredKey: otherKey}, tryOnce).HostKey; got != otherKey {
		t.Errorf("found %q, expected the declared key: it is demanded whatever the policy", got)
	}
}

func TestCheckSSH(t *testing.T) {
	value := types.StringValue("x")
	agent := map[string]string{envSSHAgent: "/run/agent"}
	for name, c := range map[string]struct {
		block sshModel
		env   map[string]string
		want  string // the attribute that is at fault; "" for none
	}{
		"nothing":                               {},
		"a certificate alone":                   {block: sshModel{Certificate: value}, want: "certificate"},
		"a certificate and a key":               {block: sshModel{Certificate: value, PrivateKey: value}},
		"a certificate and a key in the env":    {block: sshModel{Certificate: value}, env: map[string]string{envSSHPrivateKeyFile: "x"}},
		"a certificate and an agent":            {block: sshModel{Certificate: value}, env: agent},
		"a certificate and an unknown key":      {block: sshModel{Certificate: value, PrivateKey: types.StringUnknown()}},
		"a certificate, and no agent asked":     {block: sshModel{Certificate: value, Agent: types.BoolValue(false)}, env: agent, want: "certificate"},
		"a passphrase alone":                    {block: sshModel{PrivateKeyPassphrase: value}, want: "private_key_passphrase"},
		"an agent that is not there":            {block: sshModel{Agent: types.BoolValue(true)}, want: "agent"},
		"an agent":                              {block: sshModel{Agent: types.BoolValue(true)}, env: agent},
		"a sudo password, and sudo never":       {block: sshModel{SudoPassword: value, Sudo: types.StringValue(sshlink.SudoNever)}, want: "sudo_password"},
		"a bastion's account without a bastion": {block: sshModel{BastionUser: value}, want: "bastion_user"},
		"a bastion in the environment":          {block: sshModel{BastionUser: value}, env: map[string]string{envSSHBastionHost: "jump"}},
		"a bastion that is not known yet":       {block: sshModel{BastionUser: value, BastionHost: types.StringUnknown()}},
		"a bastion's certificate alone":         {block: sshModel{BastionHost: value, BastionCertificate: value}, want: "bastion_certificate"},
		"a bastion's passphrase alone":          {block: sshModel{BastionHost: value, BastionPrivateKeyPassphrase: value}, want: "bastion_private_key_passphrase"},
	} {
		t.Run(name, func(t *testing.T) {
			diags := checkSSH(c.block, environment(c.env))
			var at []string
			for _, d := range diags {
				if d, ok := d.(diag.DiagnosticWithPath); ok {
					at = append(at, d.Path().String())
				}
			}
			if got := strings.TrimPrefix(strings.Join(at, " "), "ssh."); got != c.want {
				t.Errorf("found fault with %q, expected %q: %v", got, c.want, diags)
			}
		})
	}
}

// TestGuest_shared holds the pool of connections to its word: one for each way to a host, and no way around a key.
func TestGuest_shared(t *testing.T) {
	d := newProviderData(world{there: func() job.Layout { return job.Layout{} }})
	d.ssh = sshFrom(sshModel{Password: types.StringValue("x")}, environment(nil), new(diag.Diagnostics))
	get := func(name string, r reach, p patience) *host {
		t.Helper()
		r.kind = connectionSSH
		h, err := d.guest(name, r, p)
		if err != nil {
			t.Fatal(err)
		}
		return h
	}
	first := get("db1", reach{}, tryOnce)
	for name, same := range map[string]bool{
		"the same":           get("db1", reach{}, tryOnce) == first,
		"the default's port": get("db1", reach{port: 22, user: "root"}, tryOnce) == first,
	} {
		if !same {
			t.Errorf("%s: found another connection", name)
		}
	}
	pinned := get("db1", reach{pinnedKey: someKey}, tryOnce)
	for name, h := range map[string]*host{
		"another host":                        get("db2", reach{}, tryOnce),
		"another port":                        get("db1", reach{port: 23}, tryOnce),
		"another account":                     get("db1", reach{user: "deploy"}, tryOnce),
		"through a bastion":                   get("db1", reach{bastionHost: "jump"}, tryOnce),
		"one that waits":                      get("db1", reach{}, waitForHost),
		"a key, of a host that showed none":   pinned,
		"another key":                         get("db1", reach{pinnedKey: otherKey}, tryOnce),
		"another key, declared over a pinned": get("db1", reach{pinnedKey: someKey, declaredKey: otherKey}, tryOnce),
	} {
		if h == first {
			t.Errorf("%s: found the same connection", name)
		}
	}
	if get("db3", reach{pinnedKey: someKey}, tryOnce) != get("db3", reach{}, tryOnce) {
		t.Error("who demands no key got another connection than who demands one")
	}

	d.ssh.unknown = true
	if _, err := d.guest("db1", reach{kind: connectionSSH}, tryOnce); err == nil {
		t.Error("a host was reached with half of the provider's configuration")
	}
}

func TestPlanHostKey(t *testing.T) {
	connection := func(r reach) types.Object {
		r.kind = firstOf(r.kind, connectionSSH)
		return r.model()
	}
	state := func(r reach, key types.String) place { return place{connection: connection(r), hostKey: key} }
	for name, c := range map[string]struct {
		create         bool
		planned, state place
		want           types.String
	}{
		"first contact":            {true, state(reach{}, types.StringUnknown()), place{}, types.StringUnknown()},
		"this machine":             {true, state(reach{kind: connectionLocal}, types.StringUnknown()), place{}, types.StringNull()},
		"as it was":                {false, state(reach{}, types.StringUnknown()), state(reach{}, types.StringValue(someKey)), types.StringValue(someKey)},
		"another port":             {false, state(reach{port: 23}, types.StringUnknown()), state(reach{}, types.StringValue(someKey)), types.StringValue(someKey)},
		"declared":                 {false, state(reach{declaredKey: otherKey}, types.StringUnknown()), state(reach{}, types.StringValue(someKey)), types.StringValue(otherKey)},
		"not known yet":            {false, place{connection: types.ObjectUnknown(connectionTypes)}, state(reach{}, types.StringValue(someKey)), types.StringUnknown()},
		"over SSH from now on":     {false, state(reach{}, types.StringUnknown()), state(reach{kind: connectionLocal}, types.StringNull()), types.StringUnknown()},
		"this machine from now on": {false, state(reach{kind: connectionLocal}, types.StringUnknown()), state(reach{}, types.StringValue(someKey)), types.StringNull()},
	} {
		t.Run(name, func(t *testing.T) {
			if got := planHostKey(c.create, c.planned, c.state); !got.Equal(c.want) {
				t.Errorf("found %s, expected %s", got, c.want)
			}
		})
	}
}

func TestReach_roundTrip(t *testing.T) {
	want := reach{kind: connectionSSH, port: 2222, user: "deploy", bastionHost: "jump", declaredKey: someKey, pinnedKey: otherKey}
	got, known := newReach(want.model(), types.StringValue(otherKey))
	if !known || got != want {
		t.Errorf("found %+v, %t, expected %+v", got, known, want)
	}
	if got.key() != someKey {
		t.Errorf("found the key %s, expected the declared one", got.key())
	}
	if got, known := newReach(types.ObjectNull(connectionTypes), types.StringNull()); !known || got != (reach{kind: connectionSSH}) {
		t.Errorf("null: found %+v, %t", got, known)
	}
	half := want.model().Attributes()
	half["bastion_host"] = types.StringUnknown()
	if _, known := newReach(types.ObjectValueMust(connectionTypes, half), types.StringNull()); known {
		t.Error("a connection with an unknown bastion is taken for known")
	}
}
