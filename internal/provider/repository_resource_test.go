package provider

import (
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"filippo.io/age"
	"github.com/hashicorp/terraform-plugin-testing/helper/resource"
	"github.com/hashicorp/terraform-plugin-testing/knownvalue"
	"github.com/hashicorp/terraform-plugin-testing/plancheck"
	"github.com/hashicorp/terraform-plugin-testing/statecheck"
	"github.com/hashicorp/terraform-plugin-testing/terraform"
	"github.com/hashicorp/terraform-plugin-testing/tfjsonpath"

	"github.com/pgark/terraform-provider-pgark/test/s3test"
)

func TestAccRepository_directory(t *testing.T) {
	needTerraform(t)
	w := &accWorld{T: t}
	dir := t.TempDir()
	identity, err := age.GenerateX25519Identity()
	if err != nil {
		t.Fatal(err)
	}
	config := func(extra string) string {
		return fmt.Sprintf("resource \"pgark_repository\" \"main\" {\n  url = \"file://%s\"\n  %s\n}\n", dir, extra)
	}
	encrypted := fmt.Sprintf("encryption = { recipients = [%q] }", identity.Recipient())
	const address = "pgark_repository.main"
	w.test(
		resource.TestStep{
			Config: config(`object_lock = { mode = "compliance", days = 7 }`), PlanOnly: true,
			ExpectError: inOrder("object_lock is not in this build"),
		},
		resource.TestStep{
			Config: config(`region = "x"`), PlanOnly: true,
			ExpectError: inOrder("region is for s3:// repositories only"),
		},
		resource.TestStep{
			Config: config(`encryption = { recipients = ["age1nonsense"] }`), PlanOnly: true,
			ExpectError: inOrder("is not a public age key"),
		},
		resource.TestStep{
			Config: config(encrypted),
			ConfigStateChecks: []statecheck.StateCheck{
				statecheck.ExpectKnownValue(address, tfjsonpath.New("format_version"), knownvalue.Int64Exact(1)),
				statecheck.ExpectKnownValue(address, tfjsonpath.New("capabilities").AtMapKey("create_if_absent"), knownvalue.Bool(true)),
			},
		},
		resource.TestStep{
			ResourceName: address, ImportState: true, ImportStateId: "file://" + dir, ImportStateVerify: true,
			ImportStateVerifyIdentifierAttribute: "url",
		},
		resource.TestStep{ // recipients are fixed: the plan warns, the apply refuses, and nothing is lost
			Config: config(""), ExpectError: inOrder("Recipients of a Repository Are Fixed"),
		},
		resource.TestStep{Config: config(encrypted), PlanOnly: true},
		resource.TestStep{ // somebody deletes it
			PreConfig: func() {
				if err := os.Remove(filepath.Join(dir, "repository.json")); err != nil {
					t.Fatal(err)
				}
			},
			Config:           config(encrypted),
			ConfigPlanChecks: resource.ConfigPlanChecks{PreApply: []plancheck.PlanCheck{plancheck.ExpectResourceAction(address, plancheck.ResourceActionCreate)}},
		},
	)
	if _, err := os.Stat(filepath.Join(dir, "repository.json")); err != nil {
		t.Errorf("destroying the resource has deleted the repository: %v", err)
	}
}

func TestAccRepository_s3(t *testing.T) {
	needTerraform(t)
	w := &accWorld{T: t, s3: s3test.Start(t)}
	w.s3.CreateBucket(accBucket)
	t.Setenv("AWS_EC2_METADATA_DISABLED", "true")
	const warn = `on_unreachable = "warn"`
	wrongKeys := fmt.Sprintf("provider \"pgark\" {\n  s3 = { access_key_id = %q, secret_access_key = \"wrong\" }\n}\n", w.s3.AccessKeyID)
	missing := fmt.Sprintf("resource \"pgark_repository\" \"main\" {\n  url = \"s3://no-such-bucket/x\"\n  endpoint = %q\n  use_path_style = true\n  region = %q\n}\n",
		w.s3.Endpoint(), s3test.Region)
	w.test(
		resource.TestStep{Config: wrongKeys + w.repositoryConfig(), PlanOnly: true, ExpectError: inOrder("Unable to Reach Repository", "access denied", "The store refused the keys")},
		resource.TestStep{Config: w.providerConfig("") + missing, ExpectError: inOrder("Unable to Create Repository", "no such bucket", "pgark creates none")},
		resource.TestStep{
			Config:            w.providerConfig("") + w.repositoryConfig(),
			ConfigStateChecks: []statecheck.StateCheck{noSecret{w.s3.SecretAccessKey}},
		},
		resource.TestStep{
			ResourceName: "pgark_repository.main", ImportState: true,
			ImportStateIdFunc: func(*terraform.State) (string, error) {
				return w.url() + "?path_style=true&endpoint=" + w.s3.Endpoint() + "&region=" + s3test.Region, nil
			},
		},
		resource.TestStep{ // "could not look" is not "gone"
			PreConfig:   w.s3.Stop,
			Config:      w.providerConfig("") + w.repositoryConfig(),
			PlanOnly:    true,
			ExpectError: inOrder("Unable to Read Repository"),
		},
		resource.TestStep{Config: w.providerConfig(warn) + w.repositoryConfig(), PlanOnly: true},
		resource.TestStep{PreConfig: w.s3.Start, Config: w.providerConfig("") + w.repositoryConfig(), PlanOnly: true},
	)
	if _, err := os.Stat(filepath.Join(w.s3.Directory, accBucket, "backups", "repository.json")); err != nil {
		t.Errorf("destroying the resource has deleted the repository: %v", err)
	}
}
