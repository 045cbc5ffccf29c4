package provider

import (
	"context"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/hashicorp/terraform-plugin-framework/attr"
	"github.com/hashicorp/terraform-plugin-framework/diag"
	"github.com/hashicorp/terraform-plugin-framework/types"

	"github.com/pgark/terraform-provider-pgark/internal/engine/guest"
	"github.com/pgark/terraform-provider-pgark/internal/engine/job"
)

// noDiagnostics fails the test if there are any.
func noDiagnostics(t *testing.T, diags diag.Diagnostics) {
	t.Helper()
	for _, d := range diags {
		t.Errorf("%s: %s", d.Summary(), d.Detail())
	}
	if t.Failed() {
		t.FailNow()
	}
}

// declared is the model of a declaration that leaves out all that can be left out.
func declared(url string) backupJobModel {
	settings := repositorySettings{}.model()
	return backupJobModel{
		Name:               types.StringValue("orders"),
		Host:               types.StringValue("db1"),
		Connection:         objectOfDefaults(connectionAttribute()),
		Repository:         types.StringValue(url),
		RepositorySettings: types.ObjectValueMust(repositorySettingsTypes, attrsOf(settings)),
		Instances:          objectOfDefaults(instancesAttribute()),
		Image:              objectOfDefaults(imageAttribute()),
		WAL:                objectOfDefaults(walAttribute()),
		GuestSettings:      objectOfDefaults(guestSettingsAttribute()),
		Enabled:            types.BoolValue(true),
	}
}

func attrsOf(m repositorySettingsModel) map[string]attr.Value {
	return map[string]attr.Value{"region": m.Region, "endpoint": m.Endpoint, "use_path_style": m.UsePathStyle, "storage_class": m.StorageClass}
}

func TestToJob_defaultsAreTheJobsOwn(t *testing.T) {
	var diags diag.Diagnostics
	got := declared("file:///srv/backup").toJob(context.Background(), &diags)
	noDiagnostics(t, diags)
	if err := got.Validate(); err != nil {
		t.Error(err)
	}

	want := &job.Job{
		Format: job.Format, Name: "orders", Host: "db1", Enabled: true,
		Repository: job.Repository{URL: "file:///srv/backup"},
		Image:      job.Image{Schedule: defaultSchedule, OnCreate: true},
	}
	want.ApplyDefaults()
	if d := cmp.Diff(want, got); d != "" {
		t.Errorf("the schema's defaults are not the job's (-want +got):\n%s", d)
	}
}

func TestJobRoundTrip(t *testing.T) {
	full := &job.Job{
		Format: job.Format, Name: "orders", Host: "db1", Enabled: false,
		Repository: job.Repository{URL: "s3://b/p", Region: "eu-west-1", Endpoint: "http://localhost:1", UsePathStyle: true, StorageClass: "STANDARD_IA"},
		Instances:  job.Selection{Include: []string{"15-*", "16-*"}, Exclude: []string{"15-old"}},
		Image: job.Image{
			Schedule: "*/5 * * * *", Timezone: "Europe/Berlin", Compression: "none", Parallelism: 3, MaxRate: 1 << 40, Capture: "live",
			Retry:     job.Retry{Attempts: 5, Wait: job.Duration(90 * time.Second)},
			Retention: job.ImageRetention{KeepLast: 1, KeepDays: 2, Weekly: 3, Monthly: 4, Yearly: 5},
		},
		WAL: job.WAL{
			Mode: "interval", Interval: job.Duration(time.Minute), MaxLag: job.Duration(2 * time.Second),
			MaxRequestsPerHour: 600, Synchronous: true, Slot: true, Compression: "adaptive", // not all at once, as far as jobs go
			TempFolder: "/spool", TempFolderLimit: 1 << 30, Transport: "direct",
		},
	}
	for name, want := range map[string]*job.Job{
		"everything set":  full,
		"everything left": {Name: "orders", Host: "db1", Repository: job.Repository{URL: "file:///srv"}, Enabled: true},
	} {
		t.Run(name, func(t *testing.T) {
			ctx := context.Background()
			want.ApplyDefaults()
			var diags diag.Diagnostics
			m := backupJobModel{Name: types.StringValue(want.Name), Host: types.StringValue(want.Host)} // as after an import
			m.fromJob(ctx, want, &diags)
			got := m.toJob(ctx, &diags)
			noDiagnostics(t, diags)
			if d := cmp.Diff(want, got); d != "" {
				t.Errorf("-want +got:\n%s", d)
			}

			before := m
			m.fromJob(ctx, got, &diags)
			noDiagnostics(t, diags)
			if !before.Image.Equal(m.Image) || !before.WAL.Equal(m.WAL) || !before.Instances.Equal(m.Instances) {
				t.Error("reading the same job twice changes the model")
			}
		})
	}
}

func TestFromJob_keepsTheUsersNotation(t *testing.T) {
	ctx := context.Background()
	var diags diag.Diagnostics
	m := declared("s3://b/p?region=eu-west-1&path_style=true")
	j := m.toJob(ctx, &diags)
	if j.Repository.URL != "s3://b/p" {
		t.Errorf("the job's URL is %q, expected it without the query", j.Repository.URL)
	}
	m.fromJob(ctx, j, &diags)
	noDiagnostics(t, diags)
	if got := m.Repository.ValueString(); got != "s3://b/p?region=eu-west-1&path_style=true" {
		t.Errorf("found %q after reading", got)
	}

	j.Repository.URL = "s3://elsewhere/p"
	m.fromJob(ctx, j, &diags)
	if got := m.Repository.ValueString(); got != "s3://elsewhere/p" {
		t.Errorf("found %q after reading a job that goes elsewhere", got)
	}
}

func TestShortDuration(t *testing.T) {
	for want, d := range map[string]time.Duration{
		"0s": 0, "1s": time.Second, "1.5s": 1500 * time.Millisecond, "10s": 10 * time.Second, "1m": time.Minute, "10m": 10 * time.Minute, "1m10s": 70 * time.Second,
		"1h": time.Hour, "1h30m": 90 * time.Minute, "20h": 20 * time.Hour, "1h0m10s": time.Hour + 10*time.Second, "100ms": 100 * time.Millisecond,
	} {
		if got := shortDuration(d); got != want {
			t.Errorf("%v: found %q, expected %q", d, got, want)
		}
		if back, err := time.ParseDuration(want); err != nil || back != d {
			t.Errorf("%q reads as %v, expected %v", want, back, d)
		}
	}
}

func TestSelected(t *testing.T) {
	running := discovered{Instance: job.Instance{Name: "15-main", Port: 5433}, Running: true}
	stopped := discovered{Instance: job.Instance{Name: "16-main"}}
	other := discovered{Instance: job.Instance{Name: "17-scratch", Port: 5434}, Running: true}
	m := remembered{
		Discovered: []discovered{running, stopped, other},
		Protected:  []job.Instance{{Name: "15-main", Port: 5432}, {Name: "16-main", Port: 5435}, {Name: "14-gone", Port: 5436}},
	}
	got := m.selected(job.Selection{Include: []string{"*-main"}})
	want := []job.Instance{{Name: "15-main", Port: 5433}, {Name: "16-main", Port: 5435}}
	if d := cmp.Diff(want, got); d != "" {
		t.Errorf("a running one as it is, a stopped one as it was, a vanished one not at all (-want +got):\n%s", d)
	}
}

func TestFromState_missingPartsAreNull(t *testing.T) {
	ctx := context.Background()
	var diags diag.Diagnostics
	m := declared("file:///srv")
	m.fromState(ctx, &guest.State{Machine: guest.Machine{ID: "m"}, JobProblem: "cut short"}, &diags)
	noDiagnostics(t, diags)
	if !m.ConfigSHA256.IsNull() || !m.RunnerSHA256.IsNull() || !m.ProtectedInstances.IsNull() {
		t.Errorf("found %v %v %v, expected null: nothing of it is there", m.ConfigSHA256, m.RunnerSHA256, m.ProtectedInstances)
	}
	if m.Name.ValueString() != "orders" || m.Image.IsNull() {
		t.Error("what was declared is not forgotten because the job file is gone")
	}
}
