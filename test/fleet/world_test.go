//go:build linux

// Package fleet proves what pgark promises about guests: whole Debian systems with systemd, sshd, sudo and PostgreSQL
// (package test/guests), a real S3 server, the Terraform or OpenTofu of this machine with the provider's binary. Nothing
// here looks inside; configuration, what the CLI prints, and what then stands on the guest are the only instruments.
package fleet

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/pgark/terraform-provider-pgark/internal/provider/runnerdist"
	"github.com/pgark/terraform-provider-pgark/test/guests"
	"github.com/pgark/terraform-provider-pgark/test/s3test"
)

const bucket = "fleet"

// providerBinary is the provider as users have it, with the runners of this source in it: built once.
var providerBinary = sync.OnceValues(func() ([]byte, error) {
	if _, err := runnerdist.Runner(runtime.GOARCH); err != nil {
		return nil, fmt.Errorf("%w (or make runners, which is enough for these tests)", err)
	}
	return buildProvider("")
})

// buildProvider builds the provider's binary; overlay is a file for go build -overlay, "" for none.
func buildProvider(overlay string) ([]byte, error) {
	dir, err := os.MkdirTemp("", "pgark-fleet.")
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(dir)
	args := []string{"build", "-trimpath", "-o", filepath.Join(dir, "provider")}
	if overlay != "" {
		args = append(args, "-overlay", overlay)
	}
	cmd := exec.CommandContext(context.Background(), "go", append(args, ".")...)
	cmd.Dir = sourceTree
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		return nil, fmt.Errorf("build the provider: %w\n%s", err, out)
	}
	return os.ReadFile(filepath.Join(dir, "provider"))
}

// cli is the CLI that these tests run: TF_ACC_TERRAFORM_PATH, else terraform or tofu from PATH, else the tofu of .tools.
func cli(t *testing.T) string {
	t.Helper()
	tools := cmp.Or(os.Getenv("PGARK_TOOLS"), filepath.Join("..", "..", ".tools"))
	for _, name := range []string{os.Getenv("TF_ACC_TERRAFORM_PATH"), "terraform", "tofu", filepath.Join(tools, "bin", "tofu")} {
		if name == "" {
			continue
		}
		if path, err := exec.LookPath(name); err == nil {
			path, err = filepath.Abs(path)
			if err != nil {
				t.Fatal(err)
			}
			return path
		}
	}
	t.Fatal("found neither terraform nor tofu; make setup installs one")
	return ""
}

// world is a network with an S3 server, and a Terraform working directory beside it.
type world struct {
	*testing.T

	net *guests.Network
	s3  *s3test.Server

	cli, dir string
	env      []string
	provider string // further lines of the provider's block
}

func newWorld(t *testing.T) *world {
	t.Helper()
	w := &world{T: t, net: guests.NewNetwork(t), cli: cli(t), dir: t.TempDir()}
	w.s3 = w.net.S3()
	w.s3.CreateBucket(bucket)
	binary, err := providerBinary()
	if err != nil {
		t.Fatal(err)
	}
	w.install(binary)
	for _, v := range os.Environ() {
		if name, _, _ := strings.Cut(v, "="); !strings.HasPrefix(name, "AWS_") && !strings.HasPrefix(name, "PGARK_") && name != "SSH_AUTH_SOCK" {
			w.env = append(w.env, v)
		}
	}
	w.env = append(w.env,
		"AWS_ACCESS_KEY_ID="+w.s3.AccessKeyID, "AWS_SECRET_ACCESS_KEY="+w.s3.SecretAccessKey, "AWS_REGION="+s3test.Region,
		"AWS_EC2_METADATA_DISABLED=true", "HOME="+w.dir, "CHECKPOINT_DISABLE=1", "TF_IN_AUTOMATION=1",
		"TF_CLI_CONFIG_FILE="+filepath.Join(w.dir, "none.tfrc"))
	if err := os.WriteFile(filepath.Join(w.dir, "none.tfrc"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	return w
}

// install makes a provider binary the one that the working directory uses. Called again, it is an upgrade.
func (w *world) install(provider []byte) {
	w.Helper()
	for _, host := range []string{"registry.terraform.io", "registry.opentofu.org"} {
		dir := filepath.Join(w.dir, "terraform.d", "plugins", host, "pgark", "pgark", "0.1.0", runtime.GOOS+"_"+runtime.GOARCH)
		if err := os.MkdirAll(dir, 0o755); err != nil {
			w.Fatal(err)
		}
		file := filepath.Join(dir, "terraform-provider-pgark_v0.1.0")
		_ = os.Remove(file) // a process may still run it
		if err := os.WriteFile(file, provider, 0o755); err != nil {
			w.Fatal(err)
		}
	}
	// The lock file has the old binary's hash.
	_ = os.Remove(filepath.Join(w.dir, ".terraform.lock.hcl"))
	_ = os.RemoveAll(filepath.Join(w.dir, ".terraform"))
}

// in is the same world for a subtest.
func (w *world) in(t *testing.T) *world {
	sub := *w
	sub.T = t
	return &sub
}

// configure writes main.tf: the provider with the given lines inside ssh = { … }, a repository, and what follows.
func (w *world) configure(ssh, rest string) {
	w.Helper()
	w.configureWithKnownHosts(w.net.KnownHosts(), ssh, rest)
}

// configureWithKnownHosts is configure with a known_hosts file other than the one that knows all guests.
func (w *world) configureWithKnownHosts(knownHosts, ssh, rest string) {
	w.Helper()
	key, _ := w.net.Key()
	text := fmt.Sprintf(`
terraform {
  required_providers {
    pgark = { source = "pgark/pgark" }
  }
}

provider "pgark" {
  ssh = {
    private_key_file = %q
    known_hosts_file = %q
    %s
  }
  s3 = {
    endpoint       = %q
    use_path_style = true
  }
  %s
}

resource "pgark_repository" "main" {
  url = "s3://%s/backups"
}

%s
`, key, knownHosts, ssh, w.s3.Endpoint(), w.provider, bucket, rest)
	if err := os.WriteFile(filepath.Join(w.dir, "main.tf"), []byte(text), 0o644); err != nil {
		w.Fatal(err)
	}
	if _, err := os.Stat(filepath.Join(w.dir, ".terraform")); err != nil {
		w.must("init", "-no-color", "-input=false")
	}
}

// job is a declaration of a job for a guest, with further lines in it. Its resource is named as the job.
func job(name string, g *guests.Guest, lines string) string {
	return fmt.Sprintf(`
resource "pgark_postgresql_backup_job" %[1]q {
  name       = %[1]q
  host       = %[2]q
  repository = pgark_repository.main.url
  image      = { schedule = "0 3 * * *", on_create = false }
  %[3]s
}
`, name, g.Address, lines)
}

// run runs the CLI and returns what it printed, and its exit code.
func (w *world) run(args ...string) (string, int) {
	w.Helper()
	ctx, cancel := context.WithTimeout(w.Context(), 10*time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, w.cli, args...)
	cmd.Cancel = func() error { return cmd.Process.Signal(os.Interrupt) }
	cmd.WaitDelay = 30 * time.Second
	cmd.Dir, cmd.Env = w.dir, w.env
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	began := time.Now()
	err := cmd.Run()
	w.Logf("%s: %.1f s", args[0], time.Since(began).Seconds())
	if cmd.ProcessState == nil {
		w.Fatalf("%s %s: %v", filepath.Base(w.cli), strings.Join(args, " "), err)
	}
	if text := out.String(); strings.Contains(text, w.s3.SecretAccessKey) {
		w.Errorf("%s printed the secret key", args[0])
	}
	return out.String(), cmd.ProcessState.ExitCode()
}

// must runs the CLI, which has to succeed.
func (w *world) must(args ...string) string {
	w.Helper()
	out, code := w.run(args...)
	if code != 0 {
		w.Fatalf("%s %s: exit %d\n%s", filepath.Base(w.cli), strings.Join(args, " "), code, out)
	}
	return out
}

func (w *world) apply(args ...string) string {
	w.Helper()
	return w.must(append([]string{"apply", "-no-color", "-input=false", "-auto-approve"}, args...)...)
}

func (w *world) destroy() {
	w.Helper()
	w.must("destroy", "-no-color", "-input=false", "-auto-approve")
}

// applyFails runs an apply that has to fail, and returns what it said.
func (w *world) applyFails(args ...string) string {
	w.Helper()
	out, code := w.run(append([]string{"apply", "-no-color", "-input=false", "-auto-approve"}, args...)...)
	if code == 0 {
		w.Fatalf("apply succeeded, expected it to fail:\n%s", out)
	}
	return out
}

// plan returns what a plan says, and whether it would change anything; a plan that fails fails the test.
func (w *world) plan() (out string, changes bool) {
	w.Helper()
	out, code := w.run("plan", "-no-color", "-input=false", "-detailed-exitcode")
	if code == 1 {
		w.Fatalf("plan failed:\n%s", out)
	}
	return out, code == 2
}

// planFails runs a plan that has to fail, and returns what it said.
func (w *world) planFails() string {
	w.Helper()
	out, code := w.run("plan", "-no-color", "-input=false")
	if code == 0 {
		w.Fatalf("plan succeeded, expected it to fail:\n%s", out)
	}
	return out
}

// nothingToDo demands an empty plan.
func (w *world) nothingToDo() {
	w.Helper()
	if out, changes := w.plan(); changes {
		w.Errorf("the plan is not empty:\n%s", out)
	}
}

// stateFile is the state as it stands on disk; it must not hold the secret key.
func (w *world) stateFile() string {
	w.Helper()
	b, err := os.ReadFile(filepath.Join(w.dir, "terraform.tfstate"))
	if err != nil {
		w.Fatal(err)
	}
	if bytes.Contains(b, []byte(w.s3.SecretAccessKey)) {
		w.Error("found the secret key in the state file")
	}
	return string(b)
}

var frame = regexp.MustCompile(`[│╷╵\s]+`)

// prose undoes the CLI's frames and line breaks, so that a sentence can be looked for.
func prose(out string) string { return frame.ReplaceAllString(out, " ") }

// says demands that each of the texts stands in what was printed, whatever the line breaks.
func (w *world) says(out string, texts ...string) {
	w.Helper()
	flat := prose(out)
	for _, text := range texts {
		if !strings.Contains(flat, prose(text)) {
			w.Errorf("found no %q in:\n%s", text, out)
		}
	}
}

// ---- on the guest ---------------------------------------------------------------------------------------------------

// segments counts the WAL segments that the repository holds of a job's instance.
func (w *world) segments(name, instance string) int {
	w.Helper()
	files, err := filepath.Glob(filepath.Join(w.s3.Directory, bucket, "backups", name, instance, "*", "wal", "*", strings.Repeat("[0-9A-F]", 24)))
	if err != nil {
		w.Fatal(err)
	}
	return len(files)
}

// list is `pgark list --json` of a job on its guest.
type list struct {
	Series []struct {
		Instance string `json:"instance"`
		Images   []struct {
			ID     string `json:"id"`
			Status string `json:"status"`
		} `json:"images"`
		Windows []struct {
			From time.Time `json:"from"`
			To   time.Time `json:"to"`
		} `json:"windows"`
		Gaps []json.RawMessage `json:"gaps"`
	} `json:"series"`
}

func (w *world) list(g *guests.Guest, name string) list {
	w.Helper()
	var l list
	if err := json.Unmarshal([]byte(g.Run("/usr/local/bin/pgark list --json --job "+name)), &l); err != nil {
		w.Fatal(err)
	}
	return l
}

// image takes an image of the guest's own cluster, now.
func image(g *guests.Guest, name string) {
	g.Run(fmt.Sprintf("/usr/local/bin/pgark image --job %s --instance %s", name, main15))
}

// noGap demands that everything a job has stored is one recoverable window for each instance.
func (w *world) noGap(g *guests.Guest, name string) {
	w.Helper()
	for _, s := range w.list(g, name).Series {
		if len(s.Gaps) > 0 || len(s.Windows) > 1 {
			w.Errorf("%s/%s: found %d gaps and %d windows", name, s.Instance, len(s.Gaps), len(s.Windows))
		}
	}
}

// eventually waits until a condition holds; what it waits for is said when it does not in time.
func (w *world) eventually(limit time.Duration, what string, holds func() bool) {
	w.Helper()
	deadline := time.Now().Add(limit)
	for !holds() {
		if time.Now().After(deadline) {
			w.Fatalf("%s: not within %v", what, limit)
		}
		time.Sleep(200 * time.Millisecond)
	}
}
