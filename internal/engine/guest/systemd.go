//go:build linux

package guest

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"text/template"

	"github.com/pgark/terraform-provider-pgark/internal/engine/job"
)

// unit keeps a runner alive by systemd: one unit file for each protected instance. Drop-ins for the template
// pgark@.service are the machine's own, for all of pgark's units (a proxy, say), and left alone.
type unit struct {
	g             *local
	job, instance string
	owner         account
	content       []byte // of the unit file; set by settle, for install
}

var _ runner = (*unit)(nil)

// unitTemplate is the unit of a runner.
//
// Order: PostgreSQL starts after the runner and stops before it, so that the last WAL of a machine that shuts down is
// shipped. Starting takes a runner no more than opening its socket; it does not wait for the network, and bounds the time
// that a database would ever wait for it.
//
// Rights: what it may write to is named; everything else is read-only for it. RemoveIPC has to stay off: the user is
// PostgreSQL's, whose shared memory systemd would remove with the runner's end. So has PrivateUsers: images record who
// owns files. The directories of temporary files stay the machine's where something lies there that the runner needs; its
// own temporary files (of WAL segments too large for memory) go to its state directory, which it may write to anyway.
var unitTemplate = template.Must(template.New("unit").Parse(`# Written by pgark for job {{.Job}}; changes are overwritten when it is applied.
[Unit]
Description=pgark: protects PostgreSQL instance {{.Instance}} (job {{.Job}})
Documentation=https://registry.terraform.io/providers/pgark/pgark
After=network.target nss-lookup.target
{{- if .Service}}
Before={{.Service}}
{{- end}}
RequiresMountsFor={{.DataDirectory}}
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
TimeoutStartSec=20
TimeoutStopSec=60
{{- if .Credentials}}
LoadCredential={{.CredentialsName}}:{{.Credentials}}
{{- end}}
Environment=TMPDIR={{.State}}
RuntimeDirectory=pgark/{{.Job}}
RuntimeDirectoryPreserve=yes
UMask=0077
OOMScoreAdjust=100
Nice=5
IOSchedulingPriority=6
NoNewPrivileges=yes
CapabilityBoundingSet=
AmbientCapabilities=
ProtectSystem=strict
ProtectHome=read-only
ReadWritePaths={{range $i, $p := .ReadWrite}}{{if $i}} {{end}}{{$p}}{{end}}
{{- if .PrivateTmp}}
PrivateTmp=yes
{{- end}}
PrivateDevices=yes
DevicePolicy=closed
ProtectClock=yes
ProtectControlGroups=yes
ProtectHostname=yes
ProtectKernelLogs=yes
ProtectKernelModules=yes
ProtectKernelTunables=yes
ProtectProc=invisible
ProcSubset=pid
LockPersonality=yes
MemoryDenyWriteExecute=yes
RemoveIPC=no
RestrictAddressFamilies=AF_UNIX AF_INET AF_INET6
RestrictNamespaces=yes
RestrictRealtime=yes
RestrictSUIDSGID=yes
SystemCallArchitectures=native
SystemCallFilter=@system-service
SystemCallFilter=~@privileged @resources
SystemCallErrorNumber=EPERM

[Install]
WantedBy=multi-user.target
`))

// settle makes the unit file of an instance's runner. c is nil where nothing is known of its server.
func (u *unit) settle(j *job.Job, i job.Instance, c *cluster, hasCredentials bool) {
	l := u.g.layout
	values := struct {
		Job, Instance, User, Binary, Credentials, CredentialsName, Service, DataDirectory, State string

		ReadWrite  []string
		PrivateTmp bool
	}{
		Job: u.job, Instance: u.instance, User: u.owner.String(), Binary: l.BinaryLink(), CredentialsName: job.CredentialsName,
		DataDirectory: unitPath(i.DataDirectory), State: l.StateDirectory(u.job, u.instance), ReadWrite: []string{unitPath(l.StateDirectory(u.job, u.instance))},
	}
	if hasCredentials {
		values.Credentials = l.CredentialsFile(u.job)
	}
	needed := []string{i.DataDirectory, i.SocketDirectory, j.WAL.TempFolder, directoryOf(j.Repository.URL)}
	if c != nil {
		values.Service = serviceOf(c.pid)
		needed = append(needed, c.configFile)
	}
	values.PrivateTmp = !usesTemporary(i.DataDirectory, needed)
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
	u.content = b.Bytes()
}

// usesTemporary tells whether any of paths, or of what the data directory links to (tablespaces, pg_wal), lies in a
// directory that PrivateTmp would hide.
func usesTemporary(dataDirectory string, paths []string) bool {
	links, _ := filepath.Glob(filepath.Join(dataDirectory, "pg_tblspc", "*")) // the pattern is well formed
	for _, path := range slices.Concat(paths, links, []string{filepath.Join(dataDirectory, "pg_wal")}) {
		resolved, err := filepath.EvalSymlinks(path)
		if err != nil {
			resolved = path
		}
		for _, p := range []string{path, resolved} {
			if strings.HasPrefix(p+"/", "/tmp/") || strings.HasPrefix(p+"/", "/var/tmp/") {
				return true
			}
		}
	}
	return false
}

// unitPath quotes a path for a unit file, where % begins a specifier (systemd.unit(5)).
func unitPath(path string) string {
	path = strings.ReplaceAll(path, "%", "%%")
	if strings.ContainsAny(path, " \t\"'\\") {
		return `"` + strings.NewReplacer(`\`, `\\`, `"`, `\"`).Replace(path) + `"`
	}
	return path
}

func (u *unit) name() string { return u.g.layout.Unit(u.job, u.instance) }
func (u *unit) file() string { return u.g.layout.UnitFile(u.job, u.instance) }

// wantsLink is what systemctl enable makes.
func (u *unit) wantsLink() string {
	return filepath.Join(filepath.Dir(u.file()), "multi-user.target.wants", u.name())
}

// install writes the unit as it has to be and enables it, after removing what others have put over it.
func (u *unit) install(ctx context.Context) (changed bool, err error) {
	p, err := u.properties(ctx)
	if err != nil {
		return false, err
	}
	if changed, err = u.revert(ctx, p); err != nil {
		return false, err
	}
	written, err := writeFile(u.file(), u.content, 0o644, account{})
	if err != nil {
		return false, err
	}
	changed = changed || written || p["NeedDaemonReload"] == "yes"
	if changed {
		if err := systemctl(ctx, "daemon-reload"); err != nil {
			return false, err
		}
	}
	return changed, systemctl(ctx, "enable", "--quiet", u.name())
}

// properties is what systemd knows of the unit.
func (u *unit) properties(ctx context.Context) (map[string]string, error) {
	names := "LoadState,ActiveState,SubState,Result,UnitFileState,DropInPaths,NeedDaemonReload,MainPID"
	cmd := exec.CommandContext(ctx, "systemctl", "show", "--no-pager", "--property="+names, u.name())
	out, err := cmd.Output()
	if err != nil {
		return nil, fmt.Errorf("%s: %w", strings.Join(cmd.Args, " "), err)
	}
	p := map[string]string{}
	for line := range strings.Lines(string(out)) {
		name, value, _ := strings.Cut(strings.TrimSuffix(line, "\n"), "=")
		p[name] = value
	}
	return p, nil
}

// masked says how the unit is masked; "" if it is not. A mask below /run has no effect while there is a unit file below
// /etc, and is somebody's wish all the same.
func (u *unit) masked(p map[string]string) string {
	for _, path := range []string{u.file(), u.runtimeFile()} {
		if target, err := os.Readlink(path); err == nil && target == os.DevNull {
			return path + " is a link to " + os.DevNull
		}
	}
	if p["LoadState"] == "masked" {
		return "unit " + u.name() + " is masked"
	}
	return ""
}

func (u *unit) runtimeFile() string { return filepath.Join("/run/systemd/system", u.name()) }

// revert takes away what was put over the unit: masks, and drop-ins of its own.
func (u *unit) revert(ctx context.Context, p map[string]string) (changed bool, err error) {
	if u.masked(p) == "" && len(u.dropIns(p)) == 0 {
		return false, nil
	}
	if err := systemctl(ctx, "revert", u.name()); err != nil { // a unit file of ours stays
		return false, err
	}
	// It overlooks a mask that has no effect.
	if err := os.Remove(u.runtimeFile()); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return false, err
	}
	return true, nil
}

// dropIns are the files that change this unit alone.
func (u *unit) dropIns(p map[string]string) []string {
	var out []string
	for _, path := range strings.Fields(p["DropInPaths"]) {
		if filepath.Base(filepath.Dir(path)) == u.name()+".d" {
			out = append(out, path)
		}
	}
	return out
}

func (u *unit) facts(ctx context.Context) (runnerFacts, error) {
	p, err := u.properties(ctx)
	if err != nil {
		return runnerFacts{}, err
	}
	f := runnerFacts{
		masked: u.masked(p), alive: p["ActiveState"] == "active" || p["ActiveState"] == "reloading",
		what: "unit " + u.name() + " is " + p["ActiveState"],
	}
	if p["Result"] != "" && p["Result"] != "success" {
		f.what += " (" + p["SubState"] + ", " + p["Result"] + ")"
	}
	if f.alive {
		f.what = "process " + p["MainPID"] + " of unit " + u.name()
	}
	digest, err := fileDigest(u.file())
	if err != nil {
		return f, err
	}
	if f.installed = digest != ""; !f.installed {
		f.what = u.file() + " is missing"
	}
	if p["UnitFileState"] != "enabled" {
		f.disabled = "unit " + u.name() + " does not start with the machine (" + cmp.Or(p["UnitFileState"], "not enabled") + ")"
	}
	if d := u.g.readDeployed(u.job); d != nil && d.Units[u.instance] != "" && d.Units[u.instance] != digest {
		f.edited = u.file() + " was changed"
	}
	if dropIns := u.dropIns(p); len(dropIns) > 0 {
		f.edited = strings.Join(dropIns, ", ") + " changes it"
	}
	return f, nil
}

func (u *unit) start(ctx context.Context) error {
	return systemctl(ctx, "restart", u.name())
}

func (u *unit) stop(ctx context.Context) error {
	p, err := u.properties(ctx)
	if err != nil {
		return err
	}
	// Also one whose file is gone runs on. A masked one is stopped like any other.
	if p["ActiveState"] == "inactive" || p["ActiveState"] == "failed" {
		return nil
	}
	return systemctl(ctx, "stop", u.name())
}

func (u *unit) remove(ctx context.Context) error {
	p, err := u.properties(ctx)
	if err != nil {
		return err
	}
	if _, err := u.revert(ctx, p); err != nil {
		return err
	}
	removed := false
	for _, path := range []string{u.wantsLink(), u.file()} {
		err := os.Remove(path)
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		removed = removed || err == nil
	}
	if !removed && p["LoadState"] == "not-found" {
		return nil
	}
	if err := systemctl(ctx, "daemon-reload"); err != nil {
		return err
	}
	// A unit that had failed would be listed on.
	_ = systemctl(ctx, "reset-failed", u.name())
	return nil
}

func (u *unit) log(ctx context.Context) string {
	out, err := exec.CommandContext(ctx, "journalctl", "--no-pager", "-q", "-n", "20", "-o", "cat", "-u", u.name()).Output()
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
