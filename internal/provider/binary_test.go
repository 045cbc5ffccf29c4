package provider

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"testing"

	"github.com/pgark/terraform-provider-pgark/internal/provider/runnerdist"
	"github.com/pgark/terraform-provider-pgark/test/pgtest"
	"github.com/pgark/terraform-provider-pgark/test/s3test"
)

// directory is a Terraform working directory with the provider as users have it: a binary of its own.
type directory struct {
	*testing.T

	path string
	env  []string
}

// testBinary is the provider's binary, built once from this source.
var testBinary = sync.OnceValues(func() ([]byte, error) {
	return built(func(file string) *exec.Cmd {
		cmd := exec.CommandContext(context.Background(), "go", "build", "-trimpath", "-o", file, "../..")
		cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
		return cmd
	})
})

func newDirectory(t *testing.T) *directory {
	t.Helper()
	needTerraform(t)
	d := &directory{T: t, path: t.TempDir()}
	binary, err := testBinary()
	if err != nil {
		t.Fatal(err)
	}
	for _, host := range []string{"registry.terraform.io", "registry.opentofu.org"} {
		plugins := filepath.Join(d.path, "terraform.d", "plugins", host, "pgark", "pgark", "0.1.0", runtime.GOOS+"_"+runtime.GOARCH)
		if err := os.MkdirAll(plugins, 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(plugins, "terraform-provider-pgark_v0.1.0"), binary, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	// A CLI configuration that is not there is what some machines have; neither CLI nor provider may mind.
	d.env = append(os.Environ(), "TF_CLI_CONFIG_FILE="+filepath.Join(d.path, "nowhere"), "CHECKPOINT_DISABLE=1", "TF_IN_AUTOMATION=1")
	return d
}

// copyIn puts configuration files into the directory.
func (d *directory) copyIn(files ...string) {
	d.Helper()
	for _, f := range files {
		b, err := os.ReadFile(f)
		if err != nil {
			d.Fatal(err)
		}
		name := strings.ReplaceAll(strings.TrimPrefix(f, "../../examples/"), "/", "_")
		if err := os.WriteFile(filepath.Join(d.path, name), b, 0o644); err != nil {
			d.Fatal(err)
		}
	}
}

// run runs the CLI, which has to exit with 0.
func (d *directory) run(args ...string) {
	d.Helper()
	cmd := exec.CommandContext(d.Context(), cli, args...)
	cmd.Dir, cmd.Env = d.path, d.env
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := cmd.Run(); err != nil {
		d.Fatalf("%s %s: %v\n%s", filepath.Base(cli), strings.Join(args, " "), err, out.Bytes())
	}
}

// TestAccExamples validates every example that the documents show.
func TestAccExamples(t *testing.T) {
	d := newDirectory(t)
	var files []string
	for _, pattern := range []string{"provider/*.tf", "resources/*/*.tf", "data-sources/*/*.tf", "guides/wal/*.tf"} {
		found, err := filepath.Glob(filepath.Join("../../examples", pattern))
		if err != nil || len(found) == 0 {
			t.Fatalf("examples/%s: found %v, %v", pattern, found, err)
		}
		files = append(files, found...)
	}
	d.copyIn(files...)
	d.run("init", "-no-color")
	d.run("validate", "-no-color")
}

// TestAccBinary takes the demo's declaration through the provider's binary, with the runner that it carries: apply, an empty
// plan, a state without a secret, destroy.
func TestAccBinary(t *testing.T) {
	if _, err := runnerdist.Runner(runtime.GOARCH); err != nil {
		t.Fatalf("%v (or make runners, which is enough for this test)", err)
	}
	w := newAccWorld(t, pgtest.Options{})
	d := newDirectory(t)
	d.env = append(d.env,
		"TF_VAR_repository="+w.url(), "TF_VAR_endpoint="+w.s3.Endpoint(), fmt.Sprintf("TF_VAR_instance=*-%d", w.cluster.Port),
		"AWS_ACCESS_KEY_ID="+w.s3.AccessKeyID, "AWS_SECRET_ACCESS_KEY="+w.s3.SecretAccessKey, "AWS_REGION="+s3test.Region)
	d.copyIn("../../examples/demo/main.tf")
	d.run("init", "-no-color")
	d.run("apply", "-no-color", "-auto-approve")
	d.run("plan", "-no-color", "-detailed-exitcode") // 2 when it is not empty

	state, err := os.ReadFile(filepath.Join(d.path, "terraform.tfstate"))
	if err != nil {
		t.Fatal(err)
	}
	if strings.Contains(string(state), w.s3.SecretAccessKey) {
		t.Error("found the secret key in the state file")
	}
	d.run("destroy", "-no-color", "-auto-approve")
	if err := w.archiveCommandMustBe(""); err != nil {
		t.Error(err)
	}
	if left := w.guestFiles(); len(left) > 0 {
		t.Errorf("destroy has left %v", left)
	}
	if _, err := os.Stat(filepath.Join(w.s3.Directory, accBucket, "backups", "repository.json")); err != nil {
		t.Errorf("destroy has deleted the repository: %v", err)
	}
}
