package provider

import (
	"context"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/hashicorp/terraform-plugin-framework/diag"
	"github.com/hashicorp/terraform-plugin-framework/types"

	"github.com/pgark/terraform-provider-pgark/internal/engine/guest"
	"github.com/pgark/terraform-provider-pgark/internal/engine/job"
	"github.com/pgark/terraform-provider-pgark/internal/engine/objectstore"
)

const (
	oursMain = "/usr/local/bin/pgark wal push --job orders --instance 15-main %p"
	old      = "PGPASSWORD=hush test ! -f /old/%f && cp --password=hush %p /old/%f"
	digest   = "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef"
)

// asDeployed is a guest that is as it should be, and a memory of it.
func asDeployed(t *testing.T) (*guest.State, []guest.Instance, *remembered) {
	t.Helper()
	var diags diag.Diagnostics
	j := declared("s3://b/p").toJob(context.Background(), &diags)
	noDiagnostics(t, diags)
	i := job.Instance{Name: "15-main", DataDirectory: "/var/lib/postgresql/15/main", SocketDirectory: "/run/postgresql", Port: 5432, Owner: "postgres", Version: 15, SystemID: 42}
	j.Protected = []job.Instance{i}
	j.ApplyDefaults()
	s := &guest.State{
		Machine: guest.Machine{ID: "m1", Host: "db1"}, Job: j, RunnerSHA256: digest, HasCredentials: true, AccessKeyID: "AKIA1",
		Instances: []guest.InstanceState{{
			Name: "15-main", Runner: guest.RunnerRunning, SystemID: 42, Wanted: oursMain,
			Settings: map[string]string{"archive_mode": "on", "archive_command": oursMain, "archive_library": "", "wal_level": "replica"},
		}},
	}
	known := deployed(s, "amd64")
	return s, []guest.Instance{{Instance: j.Protected[0], Running: true}}, &known
}

// TestPlanRepairs makes every difference that a guest can have, and looks at what the plan says and does about it.
func TestPlanRepairs(t *testing.T) {
	setting := func(name, value string) func(*guest.State, []guest.Instance) {
		return func(s *guest.State, _ []guest.Instance) { s.Instances[0].Settings[name] = value }
	}
	runner := func(state, detail string) func(*guest.State, []guest.Instance) {
		return func(s *guest.State, _ []guest.Instance) {
			s.Instances[0].Runner, s.Instances[0].Detail = state, detail
		}
	}
	for name, c := range map[string]struct {
		change  func(*guest.State, []guest.Instance)
		declare func(*backupJobModel)
		unknown []string
		says    []string
	}{
		"nothing": {},
		"the binary is missing": {
			change:  func(s *guest.State, _ []guest.Instance) { s.RunnerSHA256 = "" },
			unknown: []string{"runner_sha256"}, says: []string{"the runner's binary is missing, or the link to it is broken"},
		},
		"the binary is missing, and updates are manual": {
			change:  func(s *guest.State, _ []guest.Instance) { s.RunnerSHA256 = "" },
			declare: func(m *backupJobModel) { m.RunnerUpdate = types.StringValue(runnerUpdateManual) },
			unknown: []string{"runner_sha256"}, says: []string{"the runner's binary is missing, or the link to it is broken"},
		},
		"the binary was replaced": {
			change:  func(s *guest.State, _ []guest.Instance) { s.RunnerSHA256 = "fedcba9876543210" },
			unknown: []string{"runner_sha256"}, says: []string{"the runner's binary was replaced: found fedcba987654…, deployed was 0123456789ab…"},
		},
		"another runner, and updates are manual": {
			change:  func(s *guest.State, _ []guest.Instance) { s.RunnerSHA256 = "fedcba9876543210" },
			declare: func(m *backupJobModel) { m.RunnerUpdate = types.StringValue(runnerUpdateManual) },
		},
		"the job file is gone": {
			change:  func(s *guest.State, _ []guest.Instance) { s.Job, s.JobProblem = nil, "open orders.json: no such file" },
			unknown: []string{"config_sha256", "protected_instances", "guest_settings_actual", "runners"},
			says:    []string{"the job file is missing or unreadable: open orders.json: no such file"},
		},
		"the job file was edited": {
			change: func(s *guest.State, _ []guest.Instance) {
				s.Job.Image.Schedule, s.Job.WAL.TempFolder = "1 2 * * *", "/spool"
			},
			unknown: []string{"config_sha256"}, says: []string{"the job file was edited: image.schedule, wal.temp_folder"},
		},
		"the retention was set": {
			change: func(s *guest.State, _ []guest.Instance) { s.Job.WALRetention = &job.WALRetention{KeepDays: 7} },
		},
		"the runner is stopped":  {change: runner(guest.RunnerStopped, ""), unknown: []string{"runners"}, says: []string{"the runner of 15-main is stopped"}},
		"the runner is silent":   {change: runner(guest.RunnerSilent, ""), unknown: []string{"runners"}, says: []string{"the runner of 15-main runs, but does not answer at its socket"}},
		"the runner is outdated": {change: runner(guest.RunnerOutdated, ""), unknown: []string{"runners"}, says: []string{"the runner of 15-main still runs another binary than the one that is installed"}},
		"the unit is masked": {
			change:  runner(guest.RunnerMasked, "pgark@orders-15-main.service"),
			unknown: []string{"runners"}, says: []string{"the runner of 15-main cannot start: its unit is masked (pgark@orders-15-main.service)"},
		},
		"the unit is missing":  {change: runner(guest.RunnerMissing, ""), unknown: []string{"runners"}, says: []string{"the runner of 15-main is missing: there is no service for it"}},
		"the unit is disabled": {change: runner(guest.RunnerDisabled, ""), unknown: []string{"runners"}, says: []string{"the runner of 15-main does not start with the machine: its unit is disabled"}},
		"the unit is edited":   {change: runner(guest.RunnerEdited, ""), unknown: []string{"runners"}, says: []string{"the runner of 15-main does not run as deployed: its unit was edited"}},
		"the runner is stopped, and the job is paused": {
			change: func(s *guest.State, _ []guest.Instance) {
				s.Job.Enabled, s.Instances[0].Runner = false, guest.RunnerStopped
			},
			declare: func(m *backupJobModel) { m.Enabled = types.BoolValue(false) },
		},
		"somebody's archive_command": {
			change:  setting("archive_command", "/opt/wal-g --password hush %p"),
			unknown: []string{"guest_settings_actual"}, says: []string{`archive_command of 15-main is set by somebody else, to "/opt/wal-g …", expected pgark's`},
		},
		"somebody's archive_command, with a variable": {
			change:  setting("archive_command", old),
			unknown: []string{"guest_settings_actual"}, says: []string{`archive_command of 15-main is set by somebody else, to "…", expected pgark's`},
		},
		"no archive_command": {
			change: setting("archive_command", ""), unknown: []string{"guest_settings_actual"}, says: []string{"archive_command of 15-main is empty: its WAL is not archived"},
		},
		"somebody's archive_command, where settings are not managed": {
			change:  setting("archive_command", "cp %p /old"),
			declare: func(m *backupJobModel) { m.GuestSettings = guestSettings(false, defaultExisting) },
		},
		"what is chained is lost": {
			change:  func(s *guest.State, _ []guest.Instance) { s.Instances[0].Wanted = oursMain + " && ( cp %p /hush )" },
			unknown: []string{"guest_settings_actual"}, says: []string{`archive_command of 15-main does not run "cp …" any more, which is chained behind pgark's`},
		},
		"what is chained was changed": {
			change: func(s *guest.State, _ []guest.Instance) {
				s.Instances[0].Wanted, s.Instances[0].Settings["archive_command"] = oursMain+" && ( cp %p /hush )", oursMain+" && ( mv %p /hush )"
			},
			unknown: []string{"guest_settings_actual"}, says: []string{`archive_command of 15-main runs "mv …" behind pgark's, and the one that is chained there is "cp …"; they differ`},
		},
		"archive_library": {
			change:  setting("archive_library", "basic_archive"),
			unknown: []string{"guest_settings_actual"}, says: []string{`archive_library of 15-main is "basic_archive", which takes the place of archive_command; expected it empty`},
		},
		"archive_mode": {
			change: setting("archive_mode", "off"), unknown: []string{"guest_settings_actual"}, says: []string{"archive_mode of 15-main is off: its WAL is not archived"},
		},
		"archive_mode, later": {
			change: func(s *guest.State, _ []guest.Instance) {
				s.Instances[0].Pending = map[string]string{"archive_mode": "off"}
			},
			unknown: []string{"guest_settings_actual"}, says: []string{`archive_mode of 15-main will be "off" after its next restart, and no WAL is archived then`},
		},
		"commits do not wait": {
			change: func(s *guest.State, _ []guest.Instance) {
				s.Instances[0].Waiting, s.Instances[0].Settings[synchronousNames] = true, "FIRST 1 (b)"
			},
			unknown: []string{"guest_settings_actual"},
			says:    []string{`synchronous_standby_names of 15-main is "FIRST 1 (b)" and does not name pgark: commits do not wait until they are in the repository`},
		},
		"commits wait, for others too": {
			change: func(s *guest.State, _ []guest.Instance) {
				s.Instances[0].Waiting, s.Instances[0].Settings[synchronousNames] = true, "FIRST 2 (b, PgArk)"
			},
		},
		"for whom commits wait is not declared": {
			change: setting(synchronousNames, "FIRST 1 (b)"),
		},
		"a slot is left over": {
			change:  func(s *guest.State, _ []guest.Instance) { s.Instances[0].LeftSlot = "pgark_orders" },
			unknown: []string{"guest_settings_actual"}, says: []string{"the replication slot pgark_orders of 15-main is left over, and keeps WAL from being removed"},
		},
		"the keys are missing": {
			change:  func(s *guest.State, _ []guest.Instance) { s.HasCredentials, s.AccessKeyID = false, "" },
			unknown: []string{"guest_has_credentials"}, says: []string{"the S3 keys are missing"},
		},
		"the keys were rotated": {
			change:  func(s *guest.State, _ []guest.Instance) { s.AccessKeyID = "AKIA0" },
			unknown: []string{"guest_has_credentials"}, says: []string{"the S3 keys were rotated: the guest has the access key AKIA0, expected AKIA1"},
		},
		"the keys were edited": {
			change:  func(s *guest.State, _ []guest.Instance) { s.CredentialsChanged = true },
			unknown: []string{"guest_has_credentials"}, says: []string{"the file with the S3 keys was changed by hand"},
		},
		"the data directory has moved": {
			change:  func(_ *guest.State, i []guest.Instance) { i[0].DataDirectory = "/srv/main" },
			unknown: []string{"config_sha256", "protected_instances", "guest_settings_actual", "runners"},
			says:    []string{"the data directory of 15-main has moved from /var/lib/postgresql/15/main to /srv/main"},
		},
		"the port has changed": {
			change:  func(_ *guest.State, i []guest.Instance) { i[0].Port = 5433 },
			unknown: []string{"config_sha256", "protected_instances", "guest_settings_actual", "runners"},
			says:    []string{"the port of 15-main has changed from 5432 to 5433"},
		},
		"the socket has moved": {
			change:  func(_ *guest.State, i []guest.Instance) { i[0].SocketDirectory = "/tmp" },
			unknown: []string{"config_sha256"}, says: []string{"the socket of 15-main has moved from /run/postgresql to /tmp"},
		},
		"another cluster": {
			change:  func(_ *guest.State, i []guest.Instance) { i[0].SystemID = 43 },
			unknown: []string{"config_sha256", "protected_instances", "guest_settings_actual", "runners"},
			says:    []string{"the cluster 15-main is another: its system identifier was 42 and is 43; a new series of backups begins, and the old one stays restorable"},
		},
		"an instance was dropped, another added": {
			change: func(_ *guest.State, i []guest.Instance) {
				i[0].Name, i[0].DataDirectory = "15-new", "/srv/new"
			},
			unknown: []string{"config_sha256", "protected_instances", "guest_settings_actual", "runners"},
			says:    []string{"instance 15-main is gone from the guest; its backups stay", "instance 15-new in /srv/new is new, and not protected yet"},
		},
		"an instance is not running": {
			change: func(_ *guest.State, i []guest.Instance) { i[0].Running, i[0].Port, i[0].SocketDirectory = false, 0, "" },
		},
		"another machine": {
			change:  func(s *guest.State, _ []guest.Instance) { s.Machine = guest.Machine{ID: "m2", Host: "db2"} },
			unknown: []string{"machine_id"}, says: []string{"another machine answers: the job was deployed on the machine m1, and this is m2 (db2)"},
		},
	} {
		t.Run(name, func(t *testing.T) {
			ctx := context.Background()
			s, instances, before := asDeployed(t)
			before.Job = clone(before.Job)
			if c.change != nil {
				c.change(s, instances)
			}
			var diags diag.Diagnostics
			planned := declared("s3://b/p")
			planned.RunnerUpdate = types.StringValue(defaultRunnerUpdate)
			if c.declare != nil {
				c.declare(&planned)
			}
			r := &backupJobResource{data: newProviderData(world{runner: func(string) ([]byte, string, error) { return nil, digest, nil }})}
			r.data.s3.credentials = &objectstore.Credentials{AccessKeyID: "AKIA1", SecretAccessKey: "hush"}
			state := planned
			state.fromState(ctx, s, &diags)
			known := looked(before, s, instances, "amd64", digest)
			r.planRepairs(ctx, &planned, state, &known, &diags)

			var unknown []string
			for i, a := range planned.computed() {
				if a.IsUnknown() {
					unknown = append(unknown, []string{"machine_id", "runner_sha256", "config_sha256", "protected_instances", "guest_settings_actual", "runners", "guest_has_credentials"}[i])
				}
			}
			slices.Sort(unknown)
			want := slices.Sorted(slices.Values(c.unknown))
			if diff := cmp.Diff(want, unknown); diff != "" {
				t.Errorf("known after apply (-want +got):\n%s", diff)
			}
			var text string
			for _, d := range diags {
				if d.Severity() != diag.SeverityWarning {
					t.Errorf("%s: %s", d.Summary(), d.Detail())
				}
				text += d.Detail()
			}
			var said []string
			for line := range strings.Lines(text) {
				if said1, ok := strings.CutPrefix(strings.TrimSpace(line), "- "); ok {
					said = append(said, said1)
				}
			}
			if diff := cmp.Diff(c.says, said); diff != "" {
				t.Errorf("in words (-want +got):\n%s", diff)
			}
			if strings.Contains(text+state.GuestSettingsActual.String(), "hush") {
				t.Errorf("found the arguments of somebody's command in %s %s", text, state.GuestSettingsActual)
			}
		})
	}
}

func guestSettings(manage bool, existing string) types.Object {
	values := objectOfDefaults(guestSettingsAttribute()).Attributes()
	values["manage"], values["existing_archive_command"] = types.BoolValue(manage), types.StringValue(existing)
	return types.ObjectValueMust(attributeTypes(guestSettingsAttribute()), values)
}

func clone(j *job.Job) *job.Job {
	c := *j
	return &c
}

// TestLooked_remembers holds what a refresh must not forget, and what it must.
func TestLooked_remembers(t *testing.T) {
	s, instances, before := asDeployed(t)
	before.Location = "s3://b/p?region=eu"
	s.Machine.ID, s.RunnerSHA256 = "m2", "fedcba"
	known := looked(before, s, instances, "amd64", digest)
	if known.MachineID != "m1" || known.Runner != digest || known.Location != before.Location {
		t.Errorf("found %+v, expected what was deployed", known)
	}
	again := looked(&known, s, instances, "amd64", digest)
	if diff := cmp.Diff(known, again); diff != "" {
		t.Errorf("a second look tells something else (-first +second):\n%s", diff)
	}
	if ours := looked(before, s, instances, "amd64", "fedcba"); ours.Runner != "fedcba" || len(ours.Differences) != 1 {
		t.Errorf("found %+v, expected this provider's own runner to be in order", ours)
	}
	if imported := looked(nil, s, instances, "amd64", digest); len(imported.Differences) != 0 {
		t.Errorf("found %v, expected none: nothing is known of before", imported.Differences)
	}
}

func TestCommandForState(t *testing.T) {
	for command, want := range map[string]string{
		"":                                   "",
		oursMain:                             oursMain,
		oursMain + " && ( cp %p /hush/%f )":  oursMain + " && ( cp … )",
		oursMain + " && ( A=hush cp %p / )":  oursMain + " && ( … )",
		"cp %p /hush":                        "cp …",
		"true":                               "true",
		"PASSWORD=hush cp %p /":              "…",
		"'/opt/my tool/archive' --hush":      "…",
		"(cat %p | ssh hush)":                "…",
		"/usr/bin/pgbackrest --stanza=hush ": "/usr/bin/pgbackrest …",
	} {
		if got := guest.RedactCommand(command); got != want {
			t.Errorf("%q: found %q, expected %q", command, got, want)
		}
	}
}

func TestKeepPlanned(t *testing.T) {
	planned := backupJobModel{RunnerSHA256: types.StringUnknown(), ConfigSHA256: types.StringValue("as planned"), MachineID: types.StringUnknown()}
	found := backupJobModel{RunnerSHA256: types.StringValue("new"), ConfigSHA256: types.StringValue("changed meanwhile"), MachineID: types.StringValue("m")}
	found.keepPlanned(planned)
	if found.RunnerSHA256.ValueString() != "new" || found.ConfigSHA256.ValueString() != "as planned" || found.MachineID.ValueString() != "m" {
		t.Errorf("found %v %v %v", found.RunnerSHA256, found.ConfigSHA256, found.MachineID)
	}
}
