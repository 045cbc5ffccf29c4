package provider

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/hashicorp/terraform-plugin-framework-timeouts/resource/timeouts"
	"github.com/hashicorp/terraform-plugin-framework-timetypes/timetypes"
	"github.com/hashicorp/terraform-plugin-framework/attr"
	"github.com/hashicorp/terraform-plugin-framework/diag"
	"github.com/hashicorp/terraform-plugin-framework/types"

	"github.com/pgark/terraform-provider-pgark/internal/engine/guest"
	"github.com/pgark/terraform-provider-pgark/internal/engine/job"
)

// backupJobModel is pgark_postgresql_backup_job. Nested attributes are objects rather than structs because any of them may
// be unknown while planning.
type backupJobModel struct {
	Name               types.String   `tfsdk:"name"`
	Host               types.String   `tfsdk:"host"`
	Connection         types.Object   `tfsdk:"host_connection"`
	Repository         types.String   `tfsdk:"repository"`
	RepositorySettings types.Object   `tfsdk:"repository_settings"`
	Instances          types.Object   `tfsdk:"instances"`
	Image              types.Object   `tfsdk:"image"`
	WAL                types.Object   `tfsdk:"wal"`
	GuestSettings      types.Object   `tfsdk:"guest_settings"`
	Credentials        types.Object   `tfsdk:"credentials"`
	DatabaseUser       types.String   `tfsdk:"database_user"`
	Enabled            types.Bool     `tfsdk:"enabled"`
	RunnerUpdate       types.String   `tfsdk:"runner_update"`
	DeletionPolicy     types.String   `tfsdk:"deletion_policy"`
	WaitForFirstImage  types.Bool     `tfsdk:"wait_for_first_image"`
	Timeouts           timeouts.Value `tfsdk:"timeouts"`

	// What the guest has. Unknown in a plan that will change it.
	HostKey             types.String `tfsdk:"host_key"`
	MachineID           types.String `tfsdk:"machine_id"`
	RunnerSHA256        types.String `tfsdk:"runner_sha256"`
	ConfigSHA256        types.String `tfsdk:"config_sha256"`
	ProtectedInstances  types.List   `tfsdk:"protected_instances"`
	GuestSettingsActual types.Map    `tfsdk:"guest_settings_actual"`
	Runners             types.Map    `tfsdk:"runners"`
	GuestHasCredentials types.Bool   `tfsdk:"guest_has_credentials"`
}

type instancesModel struct {
	Include types.Set `tfsdk:"include"`
	Exclude types.Set `tfsdk:"exclude"`
}

type imageModel struct {
	Schedule    types.String `tfsdk:"schedule"`
	Timezone    types.String `tfsdk:"timezone"`
	Compression types.String `tfsdk:"compression"`
	Parallelism types.Int64  `tfsdk:"parallelism"`
	MaxRate     types.Int64  `tfsdk:"max_rate"`
	Capture     types.String `tfsdk:"capture"`
	Retry       types.Object `tfsdk:"retry"`
	Retention   types.Object `tfsdk:"retention"`
	OnCreate    types.Bool   `tfsdk:"on_create"`
}

type retryModel struct {
	Attempts types.Int64          `tfsdk:"attempts"`
	Wait     timetypes.GoDuration `tfsdk:"wait"`
}

type imageRetentionModel struct {
	KeepLast types.Int64 `tfsdk:"keep_last"`
	KeepDays types.Int64 `tfsdk:"keep_days"`
	Weekly   types.Int64 `tfsdk:"weekly"`
	Monthly  types.Int64 `tfsdk:"monthly"`
	Yearly   types.Int64 `tfsdk:"yearly"`
}

type walModel struct {
	Mode               types.String         `tfsdk:"mode"`
	Interval           timetypes.GoDuration `tfsdk:"interval"`
	MaxLag             timetypes.GoDuration `tfsdk:"max_lag"`
	MaxRequestsPerHour types.Int64          `tfsdk:"max_requests_per_hour"`
	Synchronous        types.Bool           `tfsdk:"synchronous"`
	Slot               types.Bool           `tfsdk:"slot"`
	Compression        types.String         `tfsdk:"compression"`
	TempFolder         types.String         `tfsdk:"temp_folder"`
	TempFolderLimit    types.Int64          `tfsdk:"temp_folder_limit"`
	Transport          types.String         `tfsdk:"transport"`
	LogShippingServers types.Set            `tfsdk:"log_shipping_servers"`
}

type guestSettingsModel struct {
	Manage                 types.Bool   `tfsdk:"manage"`
	Restart                types.String `tfsdk:"restart"`
	ExistingArchiveCommand types.String `tfsdk:"existing_archive_command"`
}

type credentialsModel struct {
	Source                   types.String `tfsdk:"source"`
	AccessKeyID              types.String `tfsdk:"access_key_id"`
	SecretAccessKeyWO        types.String `tfsdk:"secret_access_key_wo"`
	SecretAccessKeyWOVersion types.Int64  `tfsdk:"secret_access_key_wo_version"`
}

type protectedInstanceModel struct {
	Name             types.String `tfsdk:"name"`
	Version          types.Int64  `tfsdk:"version"`
	DataDirectory    types.String `tfsdk:"data_directory"`
	Port             types.Int64  `tfsdk:"port"`
	SystemIdentifier types.String `tfsdk:"system_identifier"`
}

var (
	connectionTypes         = attributeTypes(connectionAttribute())
	repositorySettingsTypes = attributeTypes(repositorySettingsAttribute())
	instancesTypes          = attributeTypes(instancesAttribute())
	imageTypes              = attributeTypes(imageAttribute())
	retryTypes              = imageTypes["retry"].(attr.TypeWithAttributeTypes).AttributeTypes()     //nolint:forcetypeassert // the schema says so
	imageRetentionTypes     = imageTypes["retention"].(attr.TypeWithAttributeTypes).AttributeTypes() //nolint:forcetypeassert // the schema says so
	walTypes                = attributeTypes(walAttribute())
	protectedInstanceType   = types.ObjectType{AttrTypes: map[string]attr.Type{
		"name": types.StringType, "version": types.Int64Type, "data_directory": types.StringType, "port": types.Int64Type, "system_identifier": types.StringType,
	}}
	settingsOfInstanceType = types.MapType{ElemType: types.StringType}
)

var jobName = func(name string) error { return job.ValidName(name) }

func checkHost(host string) error {
	if strings.ContainsAny(host, "/ \t\n") {
		return fmt.Errorf("host %q holds a slash or a blank", host)
	}
	return nil
}

func oneOf(allowed ...string) func(string) error {
	return func(s string) error {
		if slices.Contains(allowed, s) {
			return nil
		}
		return fmt.Errorf("%q is none of %s", s, strings.Join(allowed, ", "))
	}
}

// toJob is the job that the model declares. Its protected instances are the guest's business: they are not in it.
func (m backupJobModel) toJob(ctx context.Context, diags *diag.Diagnostics) *job.Job {
	plain, _ := locationQuery(m.Repository.ValueString())
	settings := decode[repositorySettingsModel](ctx, m.RepositorySettings, diags).settings()
	instances := decode[instancesModel](ctx, m.Instances, diags)
	image := decode[imageModel](ctx, m.Image, diags)
	retry := decode[retryModel](ctx, image.Retry, diags)
	retention := decode[imageRetentionModel](ctx, image.Retention, diags)
	wal := decode[walModel](ctx, m.WAL, diags)

	j := &job.Job{
		Format:  job.Format,
		Name:    m.Name.ValueString(),
		Host:    m.Host.ValueString(),
		Enabled: m.Enabled.ValueBool(),

		DatabaseUser: m.DatabaseUser.ValueString(),
		Repository: job.Repository{
			URL:          plain,
			Region:       settings.region,
			Endpoint:     settings.endpoint,
			UsePathStyle: settings.usePathStyle,
			StorageClass: settings.storageClass,
		},
		Instances: job.Selection{
			Include: stringsOf(ctx, instances.Include, diags),
			Exclude: stringsOf(ctx, instances.Exclude, diags),
		},
		Image: job.Image{
			Schedule:    image.Schedule.ValueString(),
			Timezone:    image.Timezone.ValueString(),
			Compression: image.Compression.ValueString(),
			Parallelism: int(image.Parallelism.ValueInt64()),
			MaxRate:     image.MaxRate.ValueInt64(),
			Capture:     image.Capture.ValueString(),
			Retry:       job.Retry{Attempts: int(retry.Attempts.ValueInt64()), Wait: job.Duration(duration(retry.Wait))},
			Retention: job.ImageRetention{
				KeepLast: int(retention.KeepLast.ValueInt64()),
				KeepDays: int(retention.KeepDays.ValueInt64()),
				Weekly:   int(retention.Weekly.ValueInt64()),
				Monthly:  int(retention.Monthly.ValueInt64()),
				Yearly:   int(retention.Yearly.ValueInt64()),
			},
			OnCreate: image.OnCreate.ValueBool(),
		},
		WAL: job.WAL{
			Mode:               wal.Mode.ValueString(),
			Interval:           job.Duration(duration(wal.Interval)),
			MaxLag:             job.Duration(duration(wal.MaxLag)),
			MaxRequestsPerHour: wal.MaxRequestsPerHour.ValueInt64(),
			Synchronous:        wal.Synchronous.ValueBool(),
			Slot:               wal.Slot.ValueBool(),
			Compression:        wal.Compression.ValueString(),
			TempFolder:         wal.TempFolder.ValueString(),
			TempFolderLimit:    wal.TempFolderLimit.ValueInt64(),
			Transport:          wal.Transport.ValueString(),
			LogShippingServers: stringsOf(ctx, wal.LogShippingServers, diags),
		},
	}
	j.ApplyDefaults()
	return j
}

// fromJob takes over what a job file says, in the user's notation where that means the same.
func (m *backupJobModel) fromJob(ctx context.Context, j *job.Job, diags *diag.Diagnostics) {
	if plain, _ := locationQuery(m.Repository.ValueString()); plain != j.Repository.URL {
		m.Repository = types.StringValue(j.Repository.URL)
	}
	settings := repositorySettings{
		region: j.Repository.Region, endpoint: j.Repository.Endpoint,
		usePathStyle: j.Repository.UsePathStyle, storageClass: j.Repository.StorageClass,
	}
	if decode[repositorySettingsModel](ctx, m.RepositorySettings, diags).settings() != settings || m.RepositorySettings.IsNull() {
		m.RepositorySettings = encode(ctx, repositorySettingsTypes, settings.model(), diags)
	}
	m.Enabled = types.BoolValue(j.Enabled)
	m.DatabaseUser = text(j.DatabaseUser)
	m.Instances = encode(ctx, instancesTypes, instancesModel{
		Include: setOf(ctx, j.Instances.Include, diags),
		Exclude: setOf(ctx, j.Instances.Exclude, diags),
	}, diags)

	prior := decode[imageModel](ctx, m.Image, diags)
	retention := prior.Retention
	if r := j.Image.Retention; r != (job.ImageRetention{}) {
		retention = encode(ctx, imageRetentionTypes, imageRetentionModel{
			KeepLast: count(int64(r.KeepLast)), KeepDays: count(int64(r.KeepDays)),
			Weekly: count(int64(r.Weekly)), Monthly: count(int64(r.Monthly)), Yearly: count(int64(r.Yearly)),
		}, diags)
	} else if decode[imageRetentionModel](ctx, retention, diags) != (imageRetentionModel{}) || retention.IsNull() {
		retention = types.ObjectNull(imageRetentionTypes) // an empty retention = {} means the same, and is left as written
	}
	m.Image = encode(ctx, imageTypes, imageModel{
		Schedule:    types.StringValue(j.Image.Schedule),
		Timezone:    types.StringValue(j.Image.Timezone),
		Compression: types.StringValue(j.Image.Compression),
		Parallelism: types.Int64Value(int64(j.Image.Parallelism)),
		MaxRate:     count(j.Image.MaxRate),
		Capture:     types.StringValue(j.Image.Capture),
		Retry: encode(ctx, retryTypes, retryModel{
			Attempts: types.Int64Value(int64(j.Image.Retry.Attempts)),
			Wait:     durationValue(time.Duration(j.Image.Retry.Wait)),
		}, diags),
		Retention: retention,
		OnCreate:  types.BoolValue(j.Image.OnCreate),
	}, diags)
	m.WAL = encode(ctx, walTypes, walModel{
		Mode:               types.StringValue(j.WAL.Mode),
		Interval:           durationValue(time.Duration(j.WAL.Interval)),
		MaxLag:             durationValue(time.Duration(j.WAL.MaxLag)),
		MaxRequestsPerHour: count(j.WAL.MaxRequestsPerHour),
		Synchronous:        types.BoolValue(j.WAL.Synchronous),
		Slot:               types.BoolValue(j.WAL.Slot),
		Compression:        types.StringValue(j.WAL.Compression),
		TempFolder:         text(j.WAL.TempFolder),
		TempFolderLimit:    count(j.WAL.TempFolderLimit),
		Transport:          types.StringValue(j.WAL.Transport),
		LogShippingServers: setOf(ctx, j.WAL.LogShippingServers, diags),
	}, diags)
}

// fillUndeclared gives what no guest knows its default: after an import there is nothing else to take it from.
func (m *backupJobModel) fillUndeclared() {
	if m.GuestSettings.IsNull() {
		m.GuestSettings = objectOfDefaults(guestSettingsAttribute())
	}
	if m.Connection.IsNull() {
		m.Connection = objectOfDefaults(connectionAttribute())
	}
	if m.DeletionPolicy.IsNull() {
		m.DeletionPolicy = types.StringValue(defaultDeletionPolicy)
	}
	if m.RunnerUpdate.IsNull() {
		m.RunnerUpdate = types.StringValue(defaultRunnerUpdate)
	}
	if m.WaitForFirstImage.IsNull() {
		m.WaitForFirstImage = types.BoolValue(false)
	}
}

// fromState takes over what the guest has. What is missing there becomes null, and differs from any plan.
func (m *backupJobModel) fromState(ctx context.Context, s *guest.State, diags *diag.Diagnostics) {
	m.fillUndeclared()
	m.MachineID = text(s.Machine.ID)
	m.RunnerSHA256 = text(s.RunnerSHA256)
	m.GuestHasCredentials = types.BoolValue(s.HasCredentials)
	m.ConfigSHA256 = types.StringNull()
	m.ProtectedInstances = types.ListNull(protectedInstanceType)
	if s.Job != nil {
		m.fromJob(ctx, s.Job, diags)
		m.ConfigSHA256 = types.StringValue(s.Job.Digest())
		protected := make([]protectedInstanceModel, 0, len(s.Job.Protected))
		for _, i := range s.Job.Protected {
			protected = append(protected, protectedInstanceModel{
				Name: types.StringValue(i.Name), Version: types.Int64Value(int64(i.Version)), DataDirectory: types.StringValue(i.DataDirectory),
				Port: types.Int64Value(int64(i.Port)), SystemIdentifier: types.StringValue(i.SystemID.String()),
			})
		}
		list, d := types.ListValueFrom(ctx, protectedInstanceType, protected)
		diags.Append(d...)
		m.ProtectedInstances = list
	}

	settings, runners := map[string]attr.Value{}, map[string]attr.Value{}
	for _, i := range s.Instances {
		runners[i.Name] = types.StringValue(i.Runner)
		values := map[string]attr.Value{}
		for _, name := range ownedSettings {
			if name == synchronousNames && !i.Waiting {
				continue // whom commits wait for is none of ours then
			}
			if v, ok := i.Settings[name]; ok {
				if name == "archive_command" {
					v = guest.RedactCommand(v)
				}
				values[name] = types.StringValue(v)
			}
		}
		if i.LeftSlot != "" {
			values["replication_slot"] = types.StringValue(i.LeftSlot)
		}
		settings[i.Name] = types.MapValueMust(types.StringType, values)
	}
	m.Runners = types.MapValueMust(types.StringType, runners)
	m.GuestSettingsActual = types.MapValueMust(settingsOfInstanceType, settings)
	if !m.settingsPolicy(ctx, diags).Manage {
		m.GuestSettingsActual = types.MapNull(settingsOfInstanceType) // not ours
	}
}

const synchronousNames = "synchronous_standby_names"

// ownedSettings are the PostgreSQL settings that decide whether WAL reaches us, and whether commits wait for that. Others,
// though checked as prerequisites, are the user's: what they become is none of our business.
var ownedSettings = []string{"archive_mode", "archive_command", "archive_library", synchronousNames}

func (m backupJobModel) settingsPolicy(ctx context.Context, diags *diag.Diagnostics) guest.SettingsPolicy {
	s := decode[guestSettingsModel](ctx, m.GuestSettings, diags)
	return guest.SettingsPolicy{
		Manage:                 s.Manage.ValueBool(),
		Restart:                s.Restart.ValueString(),
		ExistingArchiveCommand: s.ExistingArchiveCommand.ValueString(),
	}
}

// repairPolicy is the policy for what is there already. existing_archive_command is about commands from before us: on
// instances that the job protects, another command came after us, and is what a repair is about. While the plan changes
// which instances those are, protected_instances is unknown, and the declared policy holds for all.
func (m backupJobModel) repairPolicy(ctx context.Context, diags *diag.Diagnostics) guest.SettingsPolicy {
	p := m.settingsPolicy(ctx, diags)
	if !m.ProtectedInstances.IsUnknown() && len(m.ProtectedInstances.Elements()) > 0 && p.ExistingArchiveCommand == defaultExisting {
		p.ExistingArchiveCommand = existingReplace
	}
	return p
}

// keepsRunner: a runner that is installed stays, whichever it is.
func (m backupJobModel) keepsRunner() bool { return m.RunnerUpdate.ValueString() == runnerUpdateManual }

func (m backupJobModel) limits() timeouts.Value { return m.Timeouts }

func (m backupJobModel) place() place {
	return place{noun: jobNoun, host: m.Host, nameAttribute: "name", name: m.Name, connection: m.Connection, hostKey: m.HostKey}
}

// wantsCredentials reports whether the guest is to hold S3 keys.
func (m backupJobModel) wantsCredentials(ctx context.Context, diags *diag.Diagnostics) bool {
	return !isFile(m.Repository.ValueString()) && m.credentialsSource(ctx, diags) != credentialsInstance
}

func (m backupJobModel) credentialsSource(ctx context.Context, diags *diag.Diagnostics) string {
	if s := decode[credentialsModel](ctx, m.Credentials, diags).Source.ValueString(); s != "" {
		return s
	}
	return credentialsProvider
}

// concernsGuest reports whether a plan changes something that is on the guest, or lets it be repaired: what remains are
// the connection, and what only this side keeps.
func (m backupJobModel) concernsGuest(state backupJobModel) bool {
	for _, a := range m.computed() {
		if a.IsUnknown() {
			return true
		}
	}
	return !m.Credentials.Equal(state.Credentials) || !m.GuestSettings.Equal(state.GuestSettings)
}

// computed are the attributes that say what the guest has.
func (m backupJobModel) computed() []attr.Value {
	return []attr.Value{m.MachineID, m.RunnerSHA256, m.ConfigSHA256, m.ProtectedInstances, m.GuestSettingsActual, m.Runners, m.GuestHasCredentials}
}

// forget makes all that the guest has unknown.
func (m *backupJobModel) forget() {
	m.MachineID, m.RunnerSHA256, m.ConfigSHA256 = types.StringUnknown(), types.StringUnknown(), types.StringUnknown()
	m.ProtectedInstances = types.ListUnknown(protectedInstanceType)
	m.GuestSettingsActual = types.MapUnknown(settingsOfInstanceType)
	m.Runners = types.MapUnknown(types.StringType)
	m.GuestHasCredentials = types.BoolUnknown()
}

// keepPlanned keeps what a plan has promised, also where the guest has become another meanwhile: the next refresh shows
// it. Terraform takes any other answer for a fault of the provider.
func (m *backupJobModel) keepPlanned(planned backupJobModel) {
	keep(&m.HostKey, planned.HostKey)
	keep(&m.MachineID, planned.MachineID)
	keep(&m.RunnerSHA256, planned.RunnerSHA256)
	keep(&m.ConfigSHA256, planned.ConfigSHA256)
	keep(&m.ProtectedInstances, planned.ProtectedInstances)
	keep(&m.GuestSettingsActual, planned.GuestSettingsActual)
	keep(&m.Runners, planned.Runners)
	keep(&m.GuestHasCredentials, planned.GuestHasCredentials)
}

func keep[T attr.Value](found *T, planned T) {
	if !planned.IsUnknown() {
		*found = planned
	}
}

// nullUnknown makes the model storable before what it does not know yet is known.
func (m *backupJobModel) nullUnknown() {
	nothing := backupJobModel{
		ProtectedInstances:  types.ListNull(protectedInstanceType),
		GuestSettingsActual: types.MapNull(settingsOfInstanceType),
		Runners:             types.MapNull(types.StringType),
	}
	nothing.keepPlanned(*m)
	*m = m.withComputed(nothing)
}

// withComputed is the model with another's host key and computed attributes.
func (m backupJobModel) withComputed(from backupJobModel) backupJobModel {
	m.HostKey = from.HostKey
	m.MachineID, m.RunnerSHA256, m.ConfigSHA256 = from.MachineID, from.RunnerSHA256, from.ConfigSHA256
	m.ProtectedInstances, m.GuestSettingsActual, m.Runners = from.ProtectedInstances, from.GuestSettingsActual, from.Runners
	m.GuestHasCredentials = from.GuestHasCredentials
	return m
}
