package provider

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/hashicorp/terraform-plugin-framework/diag"
	"github.com/hashicorp/terraform-plugin-framework/path"
	"github.com/hashicorp/terraform-plugin-framework/resource"
	"github.com/hashicorp/terraform-plugin-framework/types"

	"github.com/pgark/terraform-provider-pgark/internal/engine/guest"
	"github.com/pgark/terraform-provider-pgark/internal/engine/guest/sshlink"
	"github.com/pgark/terraform-provider-pgark/internal/engine/job"
	"github.com/pgark/terraform-provider-pgark/internal/engine/objectstore"
)

func (r *backupJobResource) ModifyPlan(ctx context.Context, req resource.ModifyPlanRequest, resp *resource.ModifyPlanResponse) {
	diags := &resp.Diagnostics
	if req.Plan.Raw.IsNull() {
		r.modifyDestroyPlan(ctx, req, diags)
		return
	}
	if r.data == nil {
		return
	}
	var m, config, state backupJobModel
	diags.Append(req.Plan.Get(ctx, &m)...)
	diags.Append(req.Config.Get(ctx, &config)...)
	create := req.State.Raw.IsNull()
	var known *remembered
	if !create {
		diags.Append(req.State.Get(ctx, &state)...)
		var d diag.Diagnostics
		known, d = recall(ctx, req.Private)
		diags.Append(d...)
	}
	if diags.HasError() {
		return
	}
	m.HostKey = planHostKey(create, m.place(), state.place())
	if reached, isKnown := newReach(m.Connection, m.HostKey); isKnown && !m.Host.IsUnknown() {
		r.data.rememberReach(m.Host.ValueString(), reached)
	}
	if config.RepositorySettings.IsNull() {
		m.RepositorySettings = types.ObjectUnknown(repositorySettingsTypes)
		if !m.Repository.IsUnknown() && !r.data.s3.unknown {
			r.planRepository(ctx, &m, known, create, diags)
		}
	}
	var unread, renewed bool
	if !create {
		unread, renewed = r.data.planUnread(ctx, m.place(), state.place(), req.Private, diags)
		if diags.HasError() {
			return
		}
		if renewed {
			m.forget()
		} else {
			r.planRepairs(ctx, &m, state, known, diags)
		}
	}
	diags.Append(resp.Plan.Set(ctx, &m)...)
	if diags.HasError() {
		return
	}
	if req.Config.Raw.IsFullyKnown() && !m.RepositorySettings.IsUnknown() && !r.data.s3.unknown && (!unread || renewed) {
		r.planChecks(ctx, m, config, create, diags)
	}
}

// planRepository plans how the repository is reached. The apply plans again, in a process that has not heard of a
// pgark_repository which does not change, and must come to the same answer. So what such a repository says is used only if
// the configuration alone says the same, or if the last refresh has noted it with the job.
func (r *backupJobResource) planRepository(ctx context.Context, m *backupJobModel, known *remembered, create bool, diags *diag.Diagnostics) {
	url := m.Repository.ValueString()
	settings := r.data.fallback(url)
	noted, isNoted := known.repository(url)
	declared, isDeclared := r.data.known(url)
	switch {
	case isDeclared && (declared.changes || declared.settings == settings || isNoted && declared.settings == noted):
		settings = declared.settings
	case isDeclared:
		problem := repositoryNotReferable(url)
		if !create {
			problem = asWarning(problem)
		}
		diags.Append(problem)
		return // not known yet
	case isNoted:
		settings = noted
	}
	r.data.rememberOfJob(url, settings)
	m.RepositorySettings = encode(ctx, repositorySettingsTypes, settings.model(), diags)
}

// modifyDestroyPlan says what destroy will do beyond the usual. It asks nobody: destroy must be possible always.
func (r *backupJobResource) modifyDestroyPlan(ctx context.Context, req resource.ModifyPlanRequest, diags *diag.Diagnostics) {
	var m backupJobModel
	diags.Append(req.State.Get(ctx, &m)...)
	if diags.HasError() || m.DeletionPolicy.ValueString() != deleteBackups {
		return
	}
	diags.AddAttributeWarning(path.Root("deletion_policy"), fmt.Sprintf("Backups of %q Will Be Deleted", m.Name.ValueString()),
		fmt.Sprintf("deletion_policy is \"delete_backups\": destroying the job %s deletes all its images and WAL from %s, for every instance, for good. "+
			"To keep them, set deletion_policy = \"retain\" and apply before destroying.", m.Name.ValueString(), m.Repository.ValueString()))
}

// repairs collects why a guest has to be brought back to what is declared.
type repairs []string

func (r *repairs) add(texts ...string) {
	for _, t := range texts {
		if !slices.Contains(*r, t) {
			*r = append(*r, t)
		}
	}
}

// planRepairs decides which computed attributes this plan will change: those that are not, on the guest, what they
// should be. Terraform then shows them as known after apply, and a warning says in words why there is something to do.
// It asks nobody: it goes by the state, and by what the last refresh remembered.
func (r *backupJobResource) planRepairs(ctx context.Context, m *backupJobModel, state backupJobModel, known *remembered, diags *diag.Diagnostics) {
	hostKey := m.HostKey
	*m = m.withComputed(state)
	m.HostKey = hostKey
	if known == nil {
		known = &remembered{}
	}
	differences := func(attribute string) (texts []string) {
		for _, d := range known.Differences {
			if d.Attribute == attribute {
				texts = append(texts, d.Text)
			}
		}
		return texts
	}
	var found repairs

	if texts := differences("machine_id"); len(texts) > 0 {
		found.add(texts...)
		m.MachineID = types.StringUnknown()
	}
	if r.planRunner(m, state, known, diags) {
		m.RunnerSHA256 = types.StringUnknown()
		found.add(differences("runner_sha256")...)
	}
	r.planConfig(ctx, m, state, known, &found, differences("config_sha256"), diags)

	policy := m.settingsPolicy(ctx, diags)
	if texts := differences("guest_settings_actual"); policy.Manage && len(texts) > 0 {
		found.add(texts...)
		m.GuestSettingsActual = types.MapUnknown(settingsOfInstanceType)
	}
	will, was := m.toJob(ctx, diags), state.toJob(ctx, diags)
	if !m.GuestSettings.Equal(state.GuestSettings) || will.WantsSynchronous() != was.WantsSynchronous() || will.WantsSlot() != was.WantsSlot() {
		m.GuestSettingsActual = types.MapUnknown(settingsOfInstanceType)
	}

	if texts := differences("runners"); m.Enabled.ValueBool() && state.Enabled.ValueBool() && len(texts) > 0 {
		found.add(texts...)
		m.Runners = types.MapUnknown(types.StringType)
	}
	if !m.Enabled.Equal(state.Enabled) {
		m.Runners = types.MapUnknown(types.StringType)
	}
	r.planCredentials(ctx, m, state, known, &found, differences("guest_has_credentials"), diags)

	if len(found) > 0 {
		diags.AddAttributeWarning(path.Root("host"), fmt.Sprintf("Job %q on %s Differs From Its Declaration", m.Name.ValueString(), m.Host.ValueString()),
			"  - "+strings.Join(found, "\n  - ")+"\n\nThis plan repairs it.")
	}
}

// planRunner reports whether another runner is to be installed.
func (r *backupJobResource) planRunner(m *backupJobModel, state backupJobModel, known *remembered, diags *diag.Diagnostics) bool {
	switch {
	case state.RunnerSHA256.IsNull():
		return true
	case m.keepsRunner() || known.Arch == "":
		return false
	}
	digest, err := r.data.digest(known.Arch)
	if err != nil {
		diags.AddWarning("No Runner in This Build", sentence(err.Error())+"\n\nThe guest's runner cannot be compared or replaced.")
		return false
	}
	return digest != state.RunnerSHA256.ValueString()
}

// planConfig compares the job file with what is declared, for the instances that are there.
func (r *backupJobResource) planConfig(ctx context.Context, m *backupJobModel, state backupJobModel, known *remembered, found *repairs, differences []string, diags *diag.Diagnostics) {
	desired := m.toJob(ctx, diags)
	desired.Protected = known.selected(desired.Instances)
	for i := range desired.Protected {
		desired.Protected[i].DatabaseUser = firstOf(desired.DatabaseUser, desired.Protected[i].Owner)
	}
	desired.ApplyDefaults()
	configKnown := !m.Repository.IsUnknown() && !m.RepositorySettings.IsUnknown() && !m.DatabaseUser.IsUnknown() && known.Discovered != nil
	if configKnown && desired.Digest() == state.ConfigSHA256.ValueString() {
		return
	}
	m.ConfigSHA256 = types.StringUnknown()
	found.add(differences...)
	if !sameInstances(desired.Protected, known.Protected) {
		m.ProtectedInstances = types.ListUnknown(protectedInstanceType)
		m.GuestSettingsActual = types.MapUnknown(settingsOfInstanceType)
		m.Runners = types.MapUnknown(types.StringType)
	}
	if m.Instances.Equal(state.Instances) && known.Discovered != nil && known.Protected != nil {
		found.add(instancesInWords(desired.Protected, known.Protected)...)
	}
}

// sameInstances reports whether two lists say the same of the same instances, as protected_instances shows it.
func sameInstances(a, b []job.Instance) bool {
	return slices.EqualFunc(a, b, func(a, b job.Instance) bool {
		return a.Name == b.Name && a.Version == b.Version && a.DataDirectory == b.DataDirectory && a.Port == b.Port && a.SystemID == b.SystemID
	})
}

// planCredentials compares the guest's S3 keys with those that it is to have, by the access key: the secret never leaves
// the guest. Keys that expire are others each time, and tell nothing.
func (r *backupJobResource) planCredentials(ctx context.Context, m *backupJobModel, state backupJobModel, known *remembered, found *repairs, differences []string, diags *diag.Diagnostics) {
	if m.Credentials.IsUnknown() || m.Repository.IsUnknown() {
		return
	}
	declared := m.Credentials.Equal(state.Credentials)
	wants := m.wantsCredentials(ctx, diags)
	switch has := state.GuestHasCredentials.ValueBool(); {
	case wants && !has:
		if declared {
			found.add("the S3 keys are missing")
		}
	case !wants && has:
		if declared {
			found.add("there are S3 keys on the guest, and none are declared")
		}
	case !wants:
		return
	case len(differences) > 0:
		found.add(differences...)
	default:
		wanted := r.accessKey(ctx, *m, diags)
		if wanted == "" || known.AccessKeyID == "" || wanted == known.AccessKeyID {
			return
		}
		if declared {
			found.add(fmt.Sprintf("the S3 keys were rotated: the guest has the access key %s, expected %s", known.AccessKeyID, wanted))
		}
	}
	m.GuestHasCredentials = types.BoolUnknown()
}

// accessKey is the access key that the guest is to have; "" where nothing can be said, or where it expires.
func (r *backupJobResource) accessKey(ctx context.Context, m backupJobModel, diags *diag.Diagnostics) string {
	if m.credentialsSource(ctx, diags) == credentialsStatic {
		return decode[credentialsModel](ctx, m.Credentials, diags).AccessKeyID.ValueString()
	}
	if r.data.s3.unknown {
		return ""
	}
	keys, expires, err := r.data.keysForGuest(ctx)
	if err != nil || expires {
		return "" // whether there are any is looked at when they are needed
	}
	return keys.AccessKeyID
}

// planChecks looks whether the guest meets the prerequisites.
func (r *backupJobResource) planChecks(ctx context.Context, m, config backupJobModel, create bool, diags *diag.Diagnostics) {
	if r.data.checks == checksOff {
		return
	}
	ctx, cancel := context.WithTimeout(ctx, jobPlanTimeout)
	defer cancel()
	var found diag.Diagnostics
	keys := r.credentials(ctx, m, config, &found)
	if !found.HasError() {
		reached, _ := newReach(m.Connection, m.HostKey)
		g, err := r.data.guest(m.Host.ValueString(), reached, tryOnce)
		var unmet diag.Diagnostics
		if err == nil {
			unmet, err = r.check(ctx, g, m, keys, diags)
		}
		if errors.Is(err, errSSHUnknown) {
			return // the apply knows it, and looks then
		}
		if err != nil {
			unmet = diag.Diagnostics{notChecked(m.Host.ValueString(), err, create)}
		}
		found.Append(unmet...)
	}
	for _, d := range found {
		switch {
		case create && r.data.checks == checksError:
			diags.Append(d)
		case create:
			diags.Append(asWarning(d))
		case d.Severity() == diag.SeverityError:
			diags.Append(asWarning(d)) // an error would block destroy; what only deserved attention has had it
		}
	}
}

// notChecked says that the prerequisites could not be looked at. A host that does not answer may be about to be switched
// on, and has to be no obstacle to what else is planned: creating waits for it, and checks then.
func notChecked(host string, err error, create bool) diag.Diagnostic {
	problem := diag.NewAttributeErrorDiagnostic(connectionPath(err), "Unable to Check Prerequisites on "+host, detail(err))
	if _, silent := errors.AsType[*sshlink.UnreachableError](err); silent && create {
		return diag.NewAttributeWarningDiagnostic(path.Root("host"), "Prerequisites on "+host+" Are Not Checked Yet",
			withHint(err)+"\n\nThey are checked in the apply, which waits for the host (wait_for_host) and changes nothing while one is not met.")
	}
	return problem
}

// check runs the prerequisite checks: one diagnostic for each that is not met, errors all. What only deserves attention
// comes as a warning. An error means that the guest could not be asked.
func (r *backupJobResource) check(ctx context.Context, g guest.Guest, m backupJobModel, keys *objectstore.Credentials, diags *diag.Diagnostics) (diag.Diagnostics, error) {
	var out diag.Diagnostics
	host := m.Host.ValueString()
	checks, err := r.data.check(ctx, g, host, guest.CheckRequest{
		Job: m.toJob(ctx, diags), Credentials: keys, Settings: m.repairPolicy(ctx, diags),
	})
	if err != nil {
		return nil, err
	}
	for _, c := range checks {
		switch {
		case c.Status == guest.Pass:
		case c.Name == "repository_reachable" && r.data.repositoryToCreate(m.Repository.ValueString()):
			// It is created before this job, and checked again then.
		case c.Status == guest.Warn:
			out.Append(asWarning(prerequisiteNotMet(checkPath(c.Name), host, c)))
		default:
			out.Append(prerequisiteNotMet(checkPath(c.Name), host, c))
		}
	}
	return out, nil
}

// checkPath is the attribute to which a prerequisite has most to do.
func checkPath(name string) path.Path {
	switch name {
	case "temporary_folder":
		return path.Root("wal").AtName("temp_folder")
	case "repository_reachable":
		return path.Root("repository")
	case "archive_command", "archive_library", "archive_mode", "wal_level", "full_page_writes", "max_wal_senders":
		return path.Root("guest_settings")
	case "replication":
		return path.Root("wal").AtName("mode")
	case "replication_slot":
		return path.Root("wal").AtName("slot")
	case synchronousNames, "synchronous_commit":
		return path.Root("wal").AtName("synchronous")
	}
	return path.Root("host")
}

// credentials are the S3 keys for the guest, nil for none. config is needed because write-only values are nowhere else.
func (r *backupJobResource) credentials(ctx context.Context, m, config backupJobModel, diags *diag.Diagnostics) *objectstore.Credentials {
	if !m.wantsCredentials(ctx, diags) {
		return nil
	}
	if m.credentialsSource(ctx, diags) == credentialsStatic {
		c := decode[credentialsModel](ctx, config.Credentials, diags)
		if c.SecretAccessKeyWO.ValueString() == "" {
			diags.AddAttributeError(path.Root("credentials").AtName("secret_access_key_wo"), "Missing Secret",
				"secret_access_key_wo is null, so there is nothing to give to the guest. It is needed whenever the job is created or changed, not only when its version is raised.")
			return nil
		}
		return &objectstore.Credentials{AccessKeyID: c.AccessKeyID.ValueString(), SecretAccessKey: c.SecretAccessKeyWO.ValueString()}
	}
	keys, expires, err := r.data.keysForGuest(ctx)
	if err != nil {
		diags.AddAttributeError(path.Root("credentials"), "No S3 Keys for the Guest", sentence(err.Error())+
			"\n\nGive the provider keys (s3 = { access_key_id, secret_access_key }, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY), "+
			"give the job its own (credentials = { source = \"static\", … }), or let the guest find its own (credentials = { source = \"instance_profile\" }).")
		return nil
	}
	if expires {
		diags.AddAttributeWarning(path.Root("credentials"), "The Guest's S3 Keys Will Expire",
			"The provider uses temporary keys, and they are handed over to the guest, which works on when they have expired here. Use keys that last, or credentials = { source = \"instance_profile\" }.")
	}
	return keys
}
