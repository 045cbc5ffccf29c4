package provider

import (
	"errors"
	"fmt"
	"strconv"
	"strings"
	"time"

	"github.com/hashicorp/terraform-plugin-framework-timetypes/timetypes"
	"github.com/hashicorp/terraform-plugin-framework-validators/int64validator"
	"github.com/hashicorp/terraform-plugin-framework-validators/stringvalidator"
	"github.com/hashicorp/terraform-plugin-framework/attr"
	"github.com/hashicorp/terraform-plugin-framework/diag"
	"github.com/hashicorp/terraform-plugin-framework/path"
	"github.com/hashicorp/terraform-plugin-framework/provider/schema"
	"github.com/hashicorp/terraform-plugin-framework/schema/validator"
	"github.com/hashicorp/terraform-plugin-framework/types"
	"golang.org/x/crypto/ssh"

	"github.com/pgark/terraform-provider-pgark/internal/engine/guest/sshlink"
	"github.com/pgark/terraform-provider-pgark/internal/provider/validators"
)

// The environment stands in for what the provider's ssh block leaves out.
const (
	envSSHUser           = "PGARK_SSH_USER"
	envSSHPort           = "PGARK_SSH_PORT"
	envSSHPrivateKeyFile = "PGARK_SSH_PRIVATE_KEY_FILE"
	envSSHPassword       = "PGARK_SSH_PASSWORD"
	envSSHSudoPassword   = "PGARK_SSH_SUDO_PASSWORD" //nolint:gosec // the name of a variable
	envSSHBastionHost    = "PGARK_SSH_BASTION_HOST"
	envSSHAgent          = "SSH_AUTH_SOCK"
)

const (
	defaultSSHPort     = 22
	defaultSSHUser     = "root"
	defaultSSHTimeout  = 30 * time.Second
	defaultWaitForHost = 5 * time.Minute
)

// sshModel is the provider's ssh block.
type sshModel struct {
	User                        types.String         `tfsdk:"user"`
	Port                        types.Int64          `tfsdk:"port"`
	PrivateKey                  types.String         `tfsdk:"private_key"`
	PrivateKeyFile              types.String         `tfsdk:"private_key_file"`
	PrivateKeyPassphrase        types.String         `tfsdk:"private_key_passphrase"`
	Certificate                 types.String         `tfsdk:"certificate"`
	Password                    types.String         `tfsdk:"password"`
	Agent                       types.Bool           `tfsdk:"agent"`
	HostKeyPolicy               types.String         `tfsdk:"host_key_policy"`
	KnownHostsFile              types.String         `tfsdk:"known_hosts_file"`
	Timeout                     timetypes.GoDuration `tfsdk:"timeout"`
	WaitForHost                 timetypes.GoDuration `tfsdk:"wait_for_host"`
	Sudo                        types.String         `tfsdk:"sudo"`
	SudoPassword                types.String         `tfsdk:"sudo_password"`
	BastionHost                 types.String         `tfsdk:"bastion_host"`
	BastionPort                 types.Int64          `tfsdk:"bastion_port"`
	BastionUser                 types.String         `tfsdk:"bastion_user"`
	BastionPrivateKey           types.String         `tfsdk:"bastion_private_key"`
	BastionPrivateKeyPassphrase types.String         `tfsdk:"bastion_private_key_passphrase"`
	BastionCertificate          types.String         `tfsdk:"bastion_certificate"`
	BastionPassword             types.String         `tfsdk:"bastion_password"`
	BastionHostKey              types.String         `tfsdk:"bastion_host_key"`
}

func sshAttribute() schema.SingleNestedAttribute {
	optional := func(description string, v ...validator.String) schema.StringAttribute {
		return schema.StringAttribute{Optional: true, MarkdownDescription: description, Validators: append(v, stringvalidator.LengthAtLeast(1))}
	}
	secret := func(description string, v ...validator.String) schema.StringAttribute {
		return schema.StringAttribute{Optional: true, Sensitive: true, MarkdownDescription: description, Validators: append(v, stringvalidator.LengthAtLeast(1))}
	}
	port := func(description string) schema.Int64Attribute {
		return schema.Int64Attribute{Optional: true, MarkdownDescription: description, Validators: []validator.Int64{int64validator.Between(1, 65535)}}
	}
	duration := func(description string, v ...validator.String) schema.StringAttribute {
		return schema.StringAttribute{Optional: true, CustomType: timetypes.GoDurationType{}, MarkdownDescription: description, Validators: v}
	}
	sibling := func(name string) path.Expression { return path.MatchRelative().AtParent().AtName(name) }
	positive := validators.String("a Go duration above zero, as in `30s`", checkPositiveDuration)
	hostKey := validators.String("a public key, as in `ssh-ed25519 AAAA…`", checkHostKey)

	return schema.SingleNestedAttribute{
		Optional: true,
		MarkdownDescription: "How guests are reached over SSH; a job's `connection` overrides user, port, bastion and host key for its host. " +
			"Nothing of it enters the state, and values may be ephemeral. Neither `ssh` nor `~/.ssh/config` is used. " +
			"A connection is opened when it is first needed, and shared by all that name the host.",
		Attributes: map[string]schema.Attribute{
			"user":                   optional("Account to log in as. Default: `" + envSSHUser + "`, else `root`."),
			"port":                   port("Port of the SSH server. Default: `" + envSSHPort + "`, else `22`."),
			"private_key":            secret("Private key, PEM or OpenSSH, its content.", stringvalidator.ConflictsWith(sibling("private_key_file"))),
			"private_key_file":       optional("File with the private key; `~` is expanded. Default, without `private_key`: `" + envSSHPrivateKeyFile + "`."),
			"private_key_passphrase": secret("Passphrase of the private key."),
			"certificate":            optional("OpenSSH certificate for the private key or for one of the agent's keys, its content."),
			"password":               secret("Password to log in with; also used for sudo unless `sudo_password` is set. Default: `" + envSSHPassword + "`."),
			"agent":                  schema.BoolAttribute{Optional: true, MarkdownDescription: "Whether the SSH agent is asked. Default: `true` when `SSH_AUTH_SOCK` is set and no key is given."},
			"host_key_policy": optional("What to do with a host key that is not known: `strict` (default) refuses it, `accept-new` accepts it and pins it in the state, `insecure` accepts any, also a wrong one, with a warning every run. "+
				"Known is what `known_hosts_file` has, what `connection.host_key` declares, and what an earlier run has pinned (`host_key`).",
				stringvalidator.OneOf(sshlink.Strict, sshlink.AcceptNew, sshlink.Insecure)),
			"known_hosts_file": optional("File with known host keys; `~` is expanded, and the file need not exist. Default: `~/.ssh/known_hosts`."),
			"timeout":          duration("Limit for connecting and logging in, each try, as a Go duration. Default: `30s`.", positive),
			"wait_for_host":    duration("How long a guest that does not answer is tried again while a resource is created on it, because it may still boot. Anything else tries once. Default: `5m`."),
			"sudo": optional("Whether root's part is done through sudo: `auto` (default: when the account is not root), `always`, `never`.",
				stringvalidator.OneOf(sshlink.SudoAuto, sshlink.SudoAlways, sshlink.SudoNever)),
			"sudo_password":                  secret("Password for sudo, given on its standard input. Default: `" + envSSHSudoPassword + "`, else `password`."),
			"bastion_host":                   optional("Host to jump through. Default: `"+envSSHBastionHost+"`, else none.", hostValidators()...),
			"bastion_port":                   port("Port of the bastion's SSH server. Default: `port`."),
			"bastion_user":                   optional("Account on the bastion. Default: `user`."),
			"bastion_private_key":            secret("Private key for the bastion, its content. Default: the host's."),
			"bastion_private_key_passphrase": secret("Passphrase of the bastion's private key. Default: `private_key_passphrase`."),
			"bastion_certificate":            optional("OpenSSH certificate for the bastion's private key, its content. Default, without a key of its own: the host's."),
			"bastion_password":               secret("Password to log in to the bastion with. Default: `password`."),
			"bastion_host_key":               optional("Public host key of the bastion, `ssh-ed25519 AAAA…`. Default: what the known hosts say.", hostKey),
		},
	}
}

// checkHostKey is the rule for public host keys: type and key, with or without a comment.
func checkHostKey(key string) error {
	_, err := parseHostKey(key)
	return err
}

// parseHostKey gives a public key as links show it, "ssh-ed25519 AAAA…" without options and comment.
func parseHostKey(key string) (string, error) {
	public, _, options, rest, err := ssh.ParseAuthorizedKey([]byte(key))
	switch {
	case err != nil:
		return "", errors.New("host key: it is no public key in OpenSSH's form; ssh-keyscan, or the host's /etc/ssh/ssh_host_ed25519_key.pub, has it")
	case len(options) > 0:
		return "", fmt.Errorf("host key: %q stands before the key's type: give type and key alone, without host names", options[0])
	case strings.TrimSpace(string(rest)) != "":
		return "", errors.New("host key: there is more than one line")
	}
	return strings.TrimSpace(string(ssh.MarshalAuthorizedKey(public))), nil
}

// sshDefaults is the provider's ssh block over the environment: how a host is reached about which its own connection says
// nothing. Nothing of it enters a state or a log.
type sshDefaults struct {
	host        sshlink.Config // without Host, HostKey, WaitForHost and Bastion
	bastion     sshlink.Config // Host is "" where there is none unless a connection names one
	waitForHost time.Duration
	unknown     bool // some of it is not known yet: nothing can be reached over SSH in this process
}

// sshFrom merges the ssh block with the environment. Its errors are about the environment alone: the block itself was
// validated.
func sshFrom(m sshModel, getenv func(string) string, diags *diag.Diagnostics) sshDefaults {
	d := sshDefaults{
		host: sshlink.Config{
			User:           firstOf(m.User.ValueString(), getenv(envSSHUser), defaultSSHUser),
			Port:           int(m.Port.ValueInt64()),
			PrivateKey:     m.PrivateKey.ValueString(),
			PrivateKeyFile: m.PrivateKeyFile.ValueString(),
			Passphrase:     m.PrivateKeyPassphrase.ValueString(),
			Certificate:    m.Certificate.ValueString(),
			Password:       firstOf(m.Password.ValueString(), getenv(envSSHPassword)),
			HostKeyPolicy:  firstOf(m.HostKeyPolicy.ValueString(), sshlink.Strict),
			KnownHostsFile: m.KnownHostsFile.ValueString(),
			Timeout:        defaultSSHTimeout,
			Sudo:           firstOf(m.Sudo.ValueString(), sshlink.SudoAuto),
			SudoPassword:   firstOf(m.SudoPassword.ValueString(), getenv(envSSHSudoPassword)),
		},
		waitForHost: defaultWaitForHost,
	}
	if d.host.PrivateKey == "" && d.host.PrivateKeyFile == "" {
		d.host.PrivateKeyFile = getenv(envSSHPrivateKeyFile)
	}
	if !m.Agent.IsNull() {
		d.host.Agent = m.Agent.ValueBoolPointer()
	}
	if v := getenv(envSSHPort); d.host.Port == 0 && v != "" {
		port, err := strconv.Atoi(v)
		if err != nil || port < 1 || port > 65535 {
			diags.AddError("Invalid Environment", fmt.Sprintf("%s is %q, expected a port between 1 and 65535.", envSSHPort, v))
		}
		d.host.Port = port
	}
	if d.host.Port == 0 {
		d.host.Port = defaultSSHPort
	}
	if t := duration(m.Timeout); t > 0 {
		d.host.Timeout = t
	}
	if !m.WaitForHost.IsNull() {
		d.waitForHost = duration(m.WaitForHost)
	}

	d.bastion = sshlink.Config{
		Host:        firstOf(m.BastionHost.ValueString(), getenv(envSSHBastionHost)),
		Port:        d.host.Port,
		User:        firstOf(m.BastionUser.ValueString(), d.host.User),
		PrivateKey:  m.BastionPrivateKey.ValueString(),
		Passphrase:  m.BastionPrivateKeyPassphrase.ValueString(),
		Certificate: m.BastionCertificate.ValueString(),
		Password:    m.BastionPassword.ValueString(),
		HostKey:     m.BastionHostKey.ValueString(),
	}
	if p := m.BastionPort.ValueInt64(); p != 0 {
		d.bastion.Port = int(p)
	}
	return d
}

// checkSSH looks for combinations in the ssh block that cannot have been meant. What is not known yet is taken to be right.
func checkSSH(m sshModel, getenv func(string) string) diag.Diagnostics {
	var diags diag.Diagnostics
	at := path.Root("ssh")
	given := func(v attr.Value) bool { return !v.IsNull() }
	invalid := func(attribute, detail string) {
		diags.AddAttributeError(at.AtName(attribute), "Invalid Combination", detail)
	}

	key := given(m.PrivateKey) || given(m.PrivateKeyFile) || getenv(envSSHPrivateKeyFile) != ""
	agent := m.Agent.IsUnknown() || m.Agent.ValueBool() || m.Agent.IsNull() && !key && getenv(envSSHAgent) != ""
	if given(m.Certificate) && !key && !agent {
		invalid("certificate", "A certificate belongs to a private key: give private_key or private_key_file, or let the agent have it (agent = true).")
	}
	if given(m.PrivateKeyPassphrase) && !key {
		invalid("private_key_passphrase", "There is no private key that it could open: give private_key or private_key_file.")
	}
	if m.Agent.ValueBool() && getenv(envSSHAgent) == "" {
		invalid("agent", "agent is true, but SSH_AUTH_SOCK is not set where Terraform runs: no agent is there that could be asked.")
	}
	if given(m.SudoPassword) && m.Sudo.ValueString() == sshlink.SudoNever {
		invalid("sudo_password", `With sudo = "never" there is nothing that would ask for it.`)
	}
	if given(m.BastionCertificate) && !given(m.BastionPrivateKey) && !agent {
		invalid("bastion_certificate", "A certificate belongs to a private key: give bastion_private_key, or let the agent have it (agent = true).")
	}
	if given(m.BastionPrivateKeyPassphrase) && !given(m.BastionPrivateKey) {
		invalid("bastion_private_key_passphrase", "There is no key that it could open: give bastion_private_key.")
	}
	if !given(m.BastionHost) && getenv(envSSHBastionHost) == "" {
		for _, a := range []struct {
			name  string
			value attr.Value
		}{
			{"bastion_port", m.BastionPort}, {"bastion_user", m.BastionUser}, {"bastion_private_key", m.BastionPrivateKey},
			{"bastion_certificate", m.BastionCertificate}, {"bastion_password", m.BastionPassword}, {"bastion_host_key", m.BastionHostKey},
		} {
			if given(a.value) {
				invalid(a.name, fmt.Sprintf("%s needs bastion_host: there is no bastion that it could be for. "+
					"Where each connection names a bastion of its own, name one of them here too; the connections override it.", a.name))
			}
		}
	}
	return diags
}

// insecureHostKeys warns of what a policy gives up.
func insecureHostKeys() diag.Diagnostic {
	return diag.NewAttributeWarningDiagnostic(path.Root("ssh").AtName("host_key_policy"), "Host Keys Are Not Checked",
		`With host_key_policy = "insecure" anybody on the way to a guest can pretend to be it: take the passwords that are sent, and be handed the S3 keys. `+
			`Use "strict" with known hosts or connection.host_key, or "accept-new", which pins what it sees first.`)
}
