package provider

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"

	tfjson "github.com/hashicorp/terraform-json"
	"github.com/hashicorp/terraform-plugin-testing/helper/resource"
	"github.com/hashicorp/terraform-plugin-testing/knownvalue"
	"github.com/hashicorp/terraform-plugin-testing/plancheck"
	"github.com/hashicorp/terraform-plugin-testing/statecheck"
	"github.com/hashicorp/terraform-plugin-testing/terraform"
	"github.com/hashicorp/terraform-plugin-testing/tfjsonpath"

	"github.com/pgark/terraform-provider-pgark/internal/engine/job"
	"github.com/pgark/terraform-provider-pgark/test/pgtest"
)

const (
	jobAddress       = "pgark_postgresql_backup_job.orders"
	retentionAddress = "pgark_wal_retention.orders"
)

// expectAction expects what the plan does with the job, and which of its attributes it does not know yet.
func expectAction(action plancheck.ResourceActionType, unknown ...string) resource.ConfigPlanChecks {
	checks := []plancheck.PlanCheck{plancheck.ExpectResourceAction(jobAddress, action)}
	for _, name := range unknown {
		checks = append(checks, plancheck.ExpectUnknownValue(jobAddress, tfjsonpath.New(name)))
	}
	return resource.ConfigPlanChecks{PreApply: checks}
}

// TestAccBackupJob follows a job through its life: create, change, drift and repair, import, destroy. Every step ends, by
// the test framework's own doing, in a plan that has to be empty.
func TestAccBackupJob(t *testing.T) {
	w := newAccWorld(t, pgtest.Options{Settings: map[string]string{"archive_mode": "on", "archive_timeout": "0"}})
	retention := func(rule string) string {
		return fmt.Sprintf("resource \"pgark_wal_retention\" \"orders\" {\n  host = %[1]s.host\n  job = %[1]s.name\n  %[2]s\n}\n", jobAddress, rule)
	}
	data := fmt.Sprintf(`
data "pgark_restore_points" "orders" {
  repository = pgark_repository.main.url
  job        = %[1]s.name
  depends_on = [%[1]s]
}
data "pgark_backup_statistics" "orders" {
  repository = pgark_repository.main.url
  job        = %[1]s.name
  depends_on = [%[1]s]
}
data "pgark_postgresql_instances" "here" {
  host       = %[1]s.host
  depends_on = [%[1]s]
}
data "pgark_prerequisites" "here" {
  host       = %[1]s.host
  job        = %[1]s.name
  repository = pgark_repository.main.url
  include    = ["*-%[2]d"]
  depends_on = [%[1]s]
}
`, jobAddress, w.cluster.Port)
	base := w.providerConfig("") + w.repositoryConfig()
	const staticSecret = "a-secret-that-nobody-may-see"
	secrets := noSecret{w.s3.SecretAccessKey, staticSecret}
	first := base + w.jobConfig(`wait_for_first_image = true`) + retention("until_image_deleted = true") + data
	changed := base + w.jobConfig(`
  image = { schedule = "30 3 * * *", timezone = "Europe/Berlin", on_create = true, retry = { wait = "600s" } }
  wal   = { mode = "interval", interval = "60s" }
`) + retention("keep_days = 7")
	static := base + w.jobConfig(fmt.Sprintf(`
  credentials = {
    source                       = "static"
    access_key_id                = %q
    secret_access_key_wo         = %q
    secret_access_key_wo_version = 1
  }
  deletion_policy = "retain"
`, w.s3.AccessKeyID, w.s3.SecretAccessKey))

	w.test(
		resource.TestStep{
			Config: first,
			ConfigPlanChecks: resource.ConfigPlanChecks{PreApply: []plancheck.PlanCheck{
				plancheck.ExpectKnownValue(jobAddress, tfjsonpath.New("repository_settings").AtMapKey("endpoint"), knownvalue.StringExact(w.s3.Endpoint())),
				plancheck.ExpectUnknownValue(jobAddress, tfjsonpath.New("runner_sha256")),
			}},
			ConfigStateChecks: []statecheck.StateCheck{
				secrets,
				statecheck.ExpectKnownValue(jobAddress, tfjsonpath.New("guest_settings_actual").AtMapKey(w.instance()).AtMapKey("archive_command"), knownvalue.StringExact(w.ours())),
				statecheck.ExpectKnownValue(jobAddress, tfjsonpath.New("runners").AtMapKey(w.instance()), knownvalue.StringExact("running")),
				statecheck.ExpectKnownValue(jobAddress, tfjsonpath.New("guest_has_credentials"), knownvalue.Bool(true)),
				statecheck.ExpectKnownValue(jobAddress, tfjsonpath.New("protected_instances").AtSliceIndex(0).AtMapKey("system_identifier"), knownvalue.StringExact(w.cluster.SystemID.String())),
				statecheck.ExpectKnownValue(retentionAddress, tfjsonpath.New("connection").AtMapKey("type"), knownvalue.StringExact("local")),
				statecheck.ExpectKnownValue("data.pgark_restore_points.orders", tfjsonpath.New("latest").AtMapKey("status"), knownvalue.StringExact("restorable")),
				statecheck.ExpectKnownValue("data.pgark_restore_points.orders", tfjsonpath.New("series").AtSliceIndex(0).AtMapKey("gaps"), knownvalue.ListSizeExact(0)),
				statecheck.ExpectKnownValue("data.pgark_backup_statistics.orders", tfjsonpath.New("series").AtSliceIndex(0).AtMapKey("restore_points").AtMapKey("count"), knownvalue.Int64Exact(1)),
				statecheck.ExpectKnownValue("data.pgark_prerequisites.here", tfjsonpath.New("ready"), knownvalue.Bool(true)),
				stateFunc(func(s *tfjson.State) error { return w.discovered(s) }),
			},
		},
		resource.TestStep{
			Config:            changed,
			ConfigPlanChecks:  expectAction(plancheck.ResourceActionUpdate, "config_sha256"),
			ConfigStateChecks: []statecheck.StateCheck{secrets},
		},
		resource.TestStep{ // durations are compared by what they mean
			Config:   strings.NewReplacer(`"600s"`, `"10m"`, `"60s"`, `"1m"`).Replace(changed),
			PlanOnly: false, ConfigPlanChecks: expectAction(plancheck.ResourceActionUpdate),
		},
		resource.TestStep{
			ResourceName: jobAddress, ImportState: true, ImportStateId: "localhost/orders", ImportStateVerify: true,
			ImportStateVerifyIdentifierAttribute: "name", ImportStateVerifyIgnore: []string{"timeouts"},
		},
		resource.TestStep{
			ResourceName: retentionAddress, ImportState: true, ImportStateId: "localhost/orders", ImportStateVerify: true,
			ImportStateVerifyIdentifierAttribute: "job",
		},
		resource.TestStep{ // somebody changes archive_command by hand
			PreConfig: func() {
				w.cluster.Exec("alter system set archive_command = 'true'")
				w.cluster.Exec("select pg_reload_conf()")
			},
			Config:           changed,
			ConfigPlanChecks: expectAction(plancheck.ResourceActionUpdate, "guest_settings_actual"),
			Check:            func(*terraform.State) error { return w.archiveCommandMustBe(w.ours()) },
		},
		resource.TestStep{ // the runner is killed for good
			PreConfig:        w.killRunner,
			Config:           changed,
			ConfigPlanChecks: expectAction(plancheck.ResourceActionUpdate, "runners"),
		},
		resource.TestStep{ // the job file is edited
			PreConfig: func() {
				file := w.layout.JobFile("orders")
				b, err := os.ReadFile(file)
				if err == nil {
					err = os.WriteFile(file, []byte(strings.Replace(string(b), "30 3 * * *", "31 3 * * *", 1)), 0o644)
				}
				if err != nil {
					t.Fatal(err)
				}
			},
			Config:           changed,
			ConfigPlanChecks: expectAction(plancheck.ResourceActionUpdate, "config_sha256"),
		},
		resource.TestStep{ // a provider with another runner
			PreConfig:        func() { w.changed = []byte("another") },
			Config:           changed,
			ConfigPlanChecks: expectAction(plancheck.ResourceActionUpdate, "runner_sha256"),
		},
		resource.TestStep{ // keys of its own, and no WAL retention any more
			Config:            static,
			ConfigPlanChecks:  expectAction(plancheck.ResourceActionUpdate),
			ConfigStateChecks: []statecheck.StateCheck{secrets, statecheck.ExpectKnownValue(jobAddress, tfjsonpath.New("credentials").AtMapKey("secret_access_key_wo"), knownvalue.Null())},
			Check: func(*terraform.State) error {
				j, err := job.Load(w.layout, "orders")
				if err == nil && j.WALRetention != nil {
					err = fmt.Errorf("the job file still has %+v", *j.WALRetention)
				}
				return err
			},
		},
		resource.TestStep{ // paused
			Config:           strings.Replace(static, `deletion_policy = "retain"`, "enabled = false", 1),
			ConfigPlanChecks: expectAction(plancheck.ResourceActionUpdate, "runners"),
		},
	)

	if err := w.archiveCommandMustBe(""); err != nil {
		t.Error(err)
	}
	if left := w.guestFiles(); len(left) > 0 {
		t.Errorf("destroy has left %v", left)
	}
	if n := w.walFiles(); n == 0 {
		t.Error("destroy has deleted the backups")
	}
}

// discovered checks that the data source has found the test's cluster, and asked it.
func (w *accWorld) discovered(s *tfjson.State) error {
	for _, r := range s.Values.RootModule.Resources {
		if r.Type != "pgark_postgresql_instances" {
			continue
		}
		instances, _ := r.AttributeValues["instances"].([]any)
		for _, i := range instances {
			i, _ := i.(map[string]any)
			if i["system_identifier"] != w.cluster.SystemID.String() {
				continue
			}
			found := fmt.Sprintf("%v %v %v %v %v %v", i["databases"], i["extensions"], i["tablespaces"], i["followers"], i["archive_command"], i["problem"])
			if want := "[postgres] [plpgsql] [] [] " + w.layout.BinaryLink() + " … <nil>"; found != want {
				return fmt.Errorf("found %s, expected %s", found, want)
			}
			return nil
		}
		return fmt.Errorf("found %v", instances)
	}
	return fmt.Errorf("there is no such data source in the state")
}

// mustFail plans the configuration, which has to fail with one error that holds all the parts.
func (w *accWorld) mustFail(config string, parts ...string) {
	w.Helper()
	failed := false
	resource.Test(w.T, resource.TestCase{
		ProtoV6ProviderFactories: w.factories(),
		ErrorCheck: func(err error) error {
			failed = true
			for _, p := range parts {
				if !inOrder(p).MatchString(err.Error()) {
					w.Errorf("found no %q in:\n%v", p, err)
				}
			}
			return nil
		},
		Steps: []resource.TestStep{{Config: config, PlanOnly: true}},
	})
	if !failed {
		w.Error("planning has not failed")
	}
}

// archiveCommandMustBe compares the server's archive_command.
func (w *accWorld) archiveCommandMustBe(want string) error {
	if got := w.archiveCommand(); got != want {
		return fmt.Errorf("archive_command is %q, expected %q", got, want)
	}
	return nil
}

// killRunner ends the runner and its supervisor, so that nobody starts it again.
func (w *accWorld) killRunner() {
	w.Helper()
	b, err := os.ReadFile(w.layout.PIDFile("orders", w.instance()))
	if err != nil {
		w.Fatal(err)
	}
	pid, err := strconv.Atoi(strings.Fields(string(b))[0])
	if err != nil {
		w.Fatal(err)
	}
	// It leads a session, and so a process group, of its own.
	if err := syscall.Kill(-pid, syscall.SIGKILL); err != nil {
		w.Fatal(err)
	}
}

func TestAccBackupJob_prerequisites(t *testing.T) {
	const theirs = "cp %p /tmp/%f"
	w := newAccWorld(t, pgtest.Options{Settings: map[string]string{"archive_mode": "off", "wal_level": "minimal", "max_wal_senders": "0", "archive_command": theirs}})
	missing := filepath.Join(w.layout.Root, "no-such-folder")
	folder := fmt.Sprintf("wal = { temp_folder = %q }", missing)
	w.test(
		resource.TestStep{
			Config: w.providerConfig("") + w.repositoryConfig() + w.jobConfig(`credentials = { source = "static" }`), PlanOnly: true,
			ExpectError: inOrder("needs access_key_id"),
		},
		resource.TestStep{
			Config: w.providerConfig("") + w.repositoryConfig() + w.jobConfig(`wal = { transport = "log_shipping_servers" }`), PlanOnly: true,
			ExpectError: inOrder("is not in this build"),
		},
		resource.TestStep{
			Config: w.providerConfig("") + w.repositoryConfig() + w.jobConfig(`image = { schedule = "0 25 * * *" }`), PlanOnly: true,
			ExpectError: inOrder("hour 25 is not in 0–23"),
		},
		resource.TestStep{
			Config: w.providerConfig("") + w.repositoryConfig() + w.jobConfig(`wal = { mode = "interval", interval = "30s" }`), PlanOnly: true,
			ExpectError: inOrder("interval 30s: not in 1m–8h"),
		},
		resource.TestStep{
			Config: w.providerConfig("") + w.repositoryConfig() + w.jobConfig(`wal = { max_lag = "50ms" }`), PlanOnly: true,
			ExpectError: inOrder("max_lag 50ms: not in 100ms–1h0m0s"),
		},
		resource.TestStep{
			Config: w.providerConfig("") + w.repositoryConfig() + w.jobConfig(`wal = { mode = "interval", synchronous = true, slot = true }`), PlanOnly: true,
			ExpectError: inOrder("nothing is streamed that a commit could wait for"),
		},
		resource.TestStep{
			Config: w.providerConfig("") + w.repositoryConfig() + w.jobConfig(`wal = { synchronous = true, max_requests_per_hour = 100 }`), PlanOnly: true,
			ExpectError: inOrder("commits would wait until it allows for the next one"),
		},
	)
	w.mustFail(w.providerConfig("")+w.repositoryConfig()+w.jobConfig(folder),
		"Prerequisite Not Met: temporary_folder", missing+" does not exist", "sudo install -d",
		"Prerequisite Not Met: archive_mode", "ALTER SYSTEM SET archive_mode = on",
		"Prerequisite Not Met: archive_command", `"cp …"`, `existing_archive_command = "replace"`,
		"Prerequisite Not Met: wal_level", "minimal",
		"Prerequisite Not Met: max_wal_senders", "WAL is streamed through it",
	)
	if err := w.archiveCommandMustBe(theirs); err != nil {
		t.Error(err)
	}
	if left := w.guestFiles(); len(left) > 0 {
		t.Errorf("planning has left %v on the guest", left)
	}
}

// TestAccBackupJob_synchronous has commits wait for the repository, and a slot hold WAL back, and takes both away again.
func TestAccBackupJob_synchronous(t *testing.T) {
	w := newAccWorld(t, pgtest.Options{Settings: map[string]string{"archive_mode": "on", "max_slot_wal_keep_size": "1GB"}})
	hba := filepath.Join(w.cluster.ConfigDir, "pg_hba.conf")
	before, err := os.ReadFile(hba)
	if err != nil {
		t.Fatal(err)
	}
	allow := func(content []byte) {
		if err := os.WriteFile(hba, content, 0o600); err != nil {
			t.Fatal(err)
		}
		w.cluster.Exec("select pg_reload_conf()")
	}
	base := w.providerConfig("") + w.repositoryConfig()
	synchronous, slot := base+w.jobConfig(`wal = { synchronous = true }`), base+w.jobConfig(`wal = { slot = true, max_requests_per_hour = 3600 }`)
	names := func(expected string) resource.TestCheckFunc {
		return func(*terraform.State) error {
			w.cluster.Exec("create table if not exists commits (i int)")
			w.cluster.Exec("insert into commits values (1)") // does not hang
			if found := w.cluster.Scalar("show synchronous_standby_names"); found != expected {
				return fmt.Errorf("synchronous_standby_names: found %q, expected %q", found, expected)
			}
			return nil
		}
	}
	actual := tfjsonpath.New("guest_settings_actual").AtMapKey(w.instance()).AtMapKey("synchronous_standby_names")
	w.test(
		resource.TestStep{
			PreConfig: func() { allow([]byte("local all all peer\n")) },
			Config:    synchronous, ExpectError: inOrder("Prerequisite Not Met: replication", "pg_hba.conf lets it stream no WAL", "local replication"),
		},
		resource.TestStep{
			PreConfig: func() { allow(before) },
			Config:    synchronous, Check: names("pgark"),
			ConfigStateChecks: []statecheck.StateCheck{statecheck.ExpectKnownValue(jobAddress, actual, knownvalue.StringExact("pgark"))},
		},
		resource.TestStep{ // somebody lets commits go on
			PreConfig: func() {
				w.cluster.Exec("alter system reset synchronous_standby_names")
				w.cluster.Exec("select pg_reload_conf()")
			},
			Config: synchronous, ConfigPlanChecks: expectAction(plancheck.ResourceActionUpdate, "guest_settings_actual"), Check: names("pgark"),
		},
		resource.TestStep{
			Config: slot, ConfigPlanChecks: expectAction(plancheck.ResourceActionUpdate, "config_sha256"), Check: names(""),
		},
		resource.TestStep{
			PreConfig: func() {
				if found := w.cluster.Scalar("select slot_name from pg_replication_slots where active"); found != "pgark_orders" {
					t.Errorf("active slots: %q", found)
				}
			},
			Config: synchronous, Check: names("pgark"),
		},
	)
	if err := names("")(nil); err != nil {
		t.Error(err)
	}
	if found := w.cluster.Scalar("select count(*) from pg_replication_slots"); found != "0" {
		t.Errorf("found %s slots", found)
	}
}

// TestAccBackupJob_destroyAnyway destroys a job whose guest does not meet the prerequisites any more, together with its
// backups, as its deletion policy says.
func TestAccBackupJob_destroyAnyway(t *testing.T) {
	w := newAccWorld(t, pgtest.Options{})
	folder := pgtest.Dir(t)
	pgtest.Chown(t, folder)
	// The host's name is not known while the first plan is made, as that of a machine created in the same run.
	config := w.providerConfig("") + w.repositoryConfig() + strings.Replace(w.jobConfig(fmt.Sprintf(`
  wal             = { temp_folder = %q }
  deletion_policy = "delete_backups"
  image           = { on_create = true }
  wait_for_first_image = true
`, folder)), `"localhost"`, "terraform_data.host.output", 1) + fmt.Sprintf(`
resource "terraform_data" "host" { input = "localhost" }
resource "pgark_wal_retention" "orders" {
  host      = %[1]s.host
  job       = %[1]s.name
  keep_days = 3
}
`, jobAddress)
	w.test(
		resource.TestStep{Config: config, ConfigPlanChecks: expectAction(plancheck.ResourceActionCreate, "host")},
		resource.TestStep{
			PreConfig: func() {
				if w.walFiles() == 0 {
					t.Fatal("nothing is stored that could be deleted")
				}
				if err := os.RemoveAll(folder); err != nil {
					t.Fatal(err)
				}
			},
			Config: config, Destroy: true,
		},
	)
	if n := w.walFiles(); n != 0 {
		t.Errorf("found %d WAL files, expected none", n)
	}
	repo := w.repository()
	ids, err := repo.SeriesList(t.Context(), "orders", "")
	if err != nil {
		t.Fatal(err)
	}
	for _, id := range ids {
		h, err := repo.Series(id).Head(t.Context())
		if err != nil || len(h.Images) != 0 {
			t.Errorf("found %d images, %v, expected none", len(h.Images), err)
		}
	}
}

// TestAccBackupJob_failedCreate lets the deployment fail after it has begun: the job is tainted, and a clean apply
// follows. The repository is there before, with an endpoint of its own.
func TestAccBackupJob_failedCreate(t *testing.T) {
	w := newAccWorld(t, pgtest.Options{})
	byURL := w.providerConfig("") + w.repositoryConfig() + w.jobConfig("")
	byLocation := strings.Replace(byURL, "pgark_repository.main.url", "pgark_repository.main.location", 1)
	w.test(
		resource.TestStep{Config: w.providerConfig("") + w.repositoryConfig()},
		resource.TestStep{Config: byURL, PlanOnly: true, ExpectError: inOrder("Its URL Does Not Tell", "pgark_repository.NAME.location")},
		resource.TestStep{
			PreConfig:   w.breakLink,
			Config:      byLocation,
			ExpectError: inOrder("Unable to Create PostgreSQL Backup Job"),
		},
		resource.TestStep{PreConfig: w.mendLink, Config: byLocation},
	)
}

// breakLink puts a directory where the link to the binary has to be.
func (w *accWorld) breakLink() {
	if err := os.MkdirAll(filepath.Join(w.layout.BinaryLink(), "in-the-way"), 0o755); err != nil {
		w.Fatal(err)
	}
}

func (w *accWorld) mendLink() {
	if err := os.RemoveAll(w.layout.BinaryLink()); err != nil {
		w.Fatal(err)
	}
}
