//go:build linux

package guest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"strings"
	"text/template"

	"github.com/pgark/terraform-provider-pgark/internal/engine/job"
)

// unit keeps a runner alive by systemd: one unit file for each protected instance.
type unit struct {
	g             *local
	job, instance string
	owner         account
}

var _ runner = (*unit)(nil)

// unitTemplate is the unit of a runner. What it may write to is named; everything else is read-only for it. /tmp stays
// the machine's, because sockets of PostgreSQL may lie there.
var unitTemplate = template.Must(template.New("unit").Parse(`# Written by pgark for job {{.Job}}; changes are overwritten when it is applied.
[Unit]
Description=pgark: protects PostgreSQL instance {{.Instance}} (job {{.Job}})
Documentation=https://registry.terraform.io/providers/pgark/pgark
Wants=network-online.target
After=network-online.target postgresql.service
StartLimitIntervalSec=0

[Service]
Type=notify
NotifyAccess=main
User={{.User}}
ExecStart={{.Binary}} run --job {{.Job}} --instance {{.Instance}}
ExecReload=/bin/kill -HUP $MAINPID
Restart=always
RestartSec=2
WatchdogSec=60
TimeoutStopSec=60
{{- if .Credentials}}
LoadCredential={{.CredentialsName}}:{{.Credentials}}
{{- end}}
RuntimeDirectory=pgark/{{.Job}}
RuntimeDirectoryPreserve=yes
UMask=0077
OOMScoreAdjust=100
Nice=5
IOSchedulingPriority=6
NoNewPrivileges=yes
CapabilityBoundingSet=
ProtectSystem=strict
ProtectHome=read-only
ReadWritePaths={{range $i, $p := .ReadWrite}}{{if $i}} {{end}}{{$p}}{{end}}
PrivateDevices=yes
ProtectClock=yes
ProtectControlGroups=yes
ProtectHostname=yes
ProtectKernelLogs=yes
ProtectKernelModules=yes
ProtectKernelTunables=yes
LockPersonality=yes
MemoryDenyWriteExecute=yes
RestrictAddressFamilies=AF_UNIX AF_INET AF_INET6
RestrictNamespaces=yes
RestrictRealtime=yes
RestrictSUIDSGID=yes
SystemCallArchitectures=native

[Install]
WantedBy=multi-user.target
`))

// unitText is the unit file of an instance's runner.
func (u *unit) text(j *job.Job, hasCredentials bool) []byte {
	l := u.g.layout
	values := struct {
		Job, Instance, User, Binary, Credentials, CredentialsName string
		ReadWrite                                                 []string
	}{
		Job: u.job, Instance: u.instance, User: u.owner.String(), Binary: l.BinaryLink(), CredentialsName: job.CredentialsName,
		ReadWrite: []string{unitPath(l.StateDirectory(u.job, u.instance))},
	}
	if hasCredentials {
		values.Credentials = l.CredentialsFile(u.job)
	}
	// A minus: a folder that is missing is the runner's to report, not a reason not to start.
	if j.WAL.TempFolder != "" {
		values.ReadWrite = append(values.ReadWrite, unitPath("-"+j.WAL.TempFolder))
	}
	if dir := directoryOf(j.Repository.URL); dir != "" {
		values.ReadWrite = append(values.ReadWrite, unitPath("-"+dir))
	}
	var b bytes.Buffer
	if err := unitTemplate.Execute(&b, values); err != nil {
		panic("guest: internal error: " + err.Error()) // the template and its values are constant in kind
	}
	return b.Bytes()
}

// unitPath quotes a path for a unit file, where % begins a specifier (systemd.unit(5)).
func unitPath(path string) string {
	path = strings.ReplaceAll(path, "%", "%%")
	if strings.ContainsAny(path, " \t\"'\\") {
		return `"` + strings.NewReplacer(`\`, `\\`, `"`, `\"`).Replace(path) + `"`
	}
	return path
}

func (u *unit) install(ctx context.Context) (bool, error) {
	j, err := job.Load(u.g.layout, u.job)
	if err != nil {
		return false, err
	}
	_, err = os.Stat(u.g.layout.CredentialsFile(u.job))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return false, err
	}
	changed, err := writeFile(u.g.layout.UnitFile(u.job, u.instance), u.text(j, err == nil), 0o644, account{})
	if err != nil || !changed {
		return changed, err
	}
	return true, systemctl(ctx, "daemon-reload")
}

func (u *unit) installed() (bool, error) {
	_, err := os.Stat(u.g.layout.UnitFile(u.job, u.instance))
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	return err == nil, err
}

func (u *unit) start(ctx context.Context) error {
	name := u.g.layout.Unit(u.job, u.instance)
	if err := systemctl(ctx, "enable", "--quiet", name); err != nil {
		return err
	}
	return systemctl(ctx, "restart", name)
}

func (u *unit) stop(ctx context.Context) error {
	there, err := u.installed()
	if err != nil || !there {
		return err
	}
	return systemctl(ctx, "disable", "--quiet", "--now", u.g.layout.Unit(u.job, u.instance))
}

func (u *unit) remove(ctx context.Context) error {
	err := os.Remove(u.g.layout.UnitFile(u.job, u.instance))
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	if err := systemctl(ctx, "daemon-reload"); err != nil {
		return err
	}
	// A unit that had failed would be listed on.
	_ = systemctl(ctx, "reset-failed", u.g.layout.Unit(u.job, u.instance))
	return nil
}

func (u *unit) log(ctx context.Context) string {
	out, err := exec.CommandContext(ctx, "journalctl", "--no-pager", "-q", "-n", "20", "-o", "cat", "-u", u.g.layout.Unit(u.job, u.instance)).Output()
	if err != nil {
		return ""
	}
	return strings.TrimRight(string(out), "\n")
}

func systemctl(ctx context.Context, args ...string) error {
	out, err := exec.CommandContext(ctx, "systemctl", args...).CombinedOutput()
	if err != nil {
		return fmt.Errorf("systemctl %s: %w: %s", strings.Join(args, " "), err, bytes.TrimSpace(out))
	}
	return nil
}
