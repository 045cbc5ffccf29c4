package provider

import (
	"cmp"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/hashicorp/terraform-plugin-testing/helper/resource"
)

// cli is the Terraform or OpenTofu that the acceptance tests run.
var cli string

// TestMain settles which CLI runs: TF_ACC_TERRAFORM_PATH, else terraform or tofu from PATH, else the tofu of .tools.
func TestMain(m *testing.M) {
	// OpenTofu prints a warning about a missing file where the test framework expects its version.
	if file := os.Getenv("TF_CLI_CONFIG_FILE"); file != "" {
		if _, err := os.Stat(file); err != nil {
			os.Unsetenv("TF_CLI_CONFIG_FILE")
		}
	}
	if err := findCLI(); err != nil && os.Getenv("TF_ACC") != "" {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	resource.TestMain(m)
}

func findCLI() error {
	tools := cmp.Or(os.Getenv("PGARK_TOOLS"), filepath.Join("..", "..", ".tools"))
	for _, name := range []string{os.Getenv("TF_ACC_TERRAFORM_PATH"), "terraform", "tofu", filepath.Join(tools, "bin", "tofu")} {
		if name == "" {
			continue
		}
		path, err := exec.LookPath(name)
		if err != nil {
			continue
		}
		if path, err = filepath.Abs(path); err != nil {
			return err
		}
		cli = path
		if filepath.Base(path) == "tofu" && os.Getenv("TF_ACC_PROVIDER_HOST") == "" {
			os.Setenv("TF_ACC_PROVIDER_HOST", "registry.opentofu.org")
		}
		os.Setenv("TF_ACC_TERRAFORM_PATH", path)
		return nil
	}
	return fmt.Errorf("found neither terraform nor tofu on PATH, nor tofu in %s; make setup installs one", filepath.Join(tools, "bin"))
}
