package provider

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/hashicorp/terraform-plugin-framework/diag"
	"github.com/hashicorp/terraform-plugin-framework/path"
	"github.com/hashicorp/terraform-plugin-framework/resource"
	"github.com/hashicorp/terraform-plugin-framework/resource/identityschema"
	"github.com/hashicorp/terraform-plugin-framework/types"

	"github.com/pgark/terraform-provider-pgark/internal/engine/guest"
	"github.com/pgark/terraform-provider-pgark/internal/engine/job"
	"github.com/pgark/terraform-provider-pgark/internal/engine/objectstore"
	"github.com/pgark/terraform-provider-pgark/internal/engine/repository"
)

// The default limits of the job's operations. Create and Update deploy and prove one WAL segment's way; the first image
// takes its own time, in the runner.
const (
	jobCreateTimeout = 10 * time.Minute
	jobReadTimeout   = time.Minute
	jobUpdateTimeout = 10 * time.Minute
	jobDeleteTimeout = 10 * time.Minute
	jobPlanTimeout   = time.Minute // all that a plan asks a guest for one job
)

const jobNoun = "PostgreSQL Backup Job"

type backupJobResource struct{ data *providerData }

func newBackupJobResource() resource.Resource { return &backupJobResource{} }

var (
	_ resource.ResourceWithConfigure      = (*backupJobResource)(nil)
	_ resource.ResourceWithIdentity       = (*backupJobResource)(nil)
	_ resource.ResourceWithImportState    = (*backupJobResource)(nil)
	_ resource.ResourceWithModifyPlan     = (*backupJobResource)(nil)
	_ resource.ResourceWithValidateConfig = (*backupJobResource)(nil)
)

func (r *backupJobResource) Metadata(_ context.Context, req resource.MetadataRequest, resp *resource.MetadataResponse) {
	resp.TypeName = req.ProviderTypeName + "_postgresql_backup_job"
}

func (r *backupJobResource) Configure(_ context.Context, req resource.ConfigureRequest, resp *resource.ConfigureResponse) {
	r.data = fromProviderData(req.ProviderData, &resp.Diagnostics)
}

func (r *backupJobResource) IdentitySchema(_ context.Context, _ resource.IdentitySchemaRequest, resp *resource.IdentitySchemaResponse) {
	resp.IdentitySchema = identityschema.Schema{Attributes: map[string]identityschema.Attribute{
		"host": identityschema.StringAttribute{RequiredForImport: true, Description: "The guest."},
		"name": identityschema.StringAttribute{RequiredForImport: true, Description: "Name of the job."},
	}}
}

// identity is what identities of requests and responses can do.
type identity interface {
	SetAttribute(context.Context, path.Path, any) diag.Diagnostics
}

// setIdentity is called first in every operation, also where the object turns out to be gone: Terraform refuses an answer
// without it.
func setIdentity(ctx context.Context, id identity, diags *diag.Diagnostics, host types.String, nameAttribute string, name types.String) {
	diags.Append(id.SetAttribute(ctx, path.Root("host"), host)...)
	diags.Append(id.SetAttribute(ctx, path.Root(nameAttribute), name)...)
}

func (r *backupJobResource) ValidateConfig(ctx context.Context, req resource.ValidateConfigRequest, resp *resource.ValidateConfigResponse) {
	var m backupJobModel
	diags := &resp.Diagnostics
	diags.Append(req.Config.Get(ctx, &m)...)
	if diags.HasError() {
		return
	}
	wal := decode[walModel](ctx, m.WAL, diags)
	const servers = "log_shipping_servers"
	instead := "Guests that reach the repository themselves need none: transport = \"automatic\" or \"direct\"."
	if wal.Transport.ValueString() == servers {
		diags.Append(notInThisBuild(path.Root("wal").AtName("transport"), `transport "log_shipping_servers"`, instead))
	} else if len(wal.LogShippingServers.Elements()) > 0 {
		diags.Append(notInThisBuild(path.Root("wal").AtName(servers), servers, instead))
	}

	if decode[guestSettingsModel](ctx, m.GuestSettings, diags).ExistingArchiveCommand.ValueString() == existingChain {
		diags.Append(notInThisBuild(path.Root("guest_settings").AtName("existing_archive_command"), `existing_archive_command "chain"`,
			`"replace" puts pgark's command in the place of the one that is there, and puts that back on destroy.`))
	}

	image := decode[imageModel](ctx, m.Image, diags)
	if m.WaitForFirstImage.ValueBool() && !image.OnCreate.IsNull() && !image.OnCreate.IsUnknown() && !image.OnCreate.ValueBool() {
		diags.AddAttributeError(path.Root("wait_for_first_image"), "Invalid Combination",
			"With image.on_create = false the first image comes when the schedule says so; apply cannot wait for that.")
	}

	c := decode[credentialsModel](ctx, m.Credentials, diags)
	if m.Credentials.IsNull() || c.Source.IsUnknown() {
		return
	}
	given := !c.AccessKeyID.IsNull()
	switch source := firstOf(c.Source.ValueString(), credentialsProvider); {
	case source == credentialsStatic && !given:
		diags.AddAttributeError(path.Root("credentials"), "Invalid Combination",
			`source = "static" needs access_key_id, secret_access_key_wo and secret_access_key_wo_version.`)
	case source != credentialsStatic && given:
		diags.AddAttributeError(path.Root("credentials").AtName("access_key_id"), "Invalid Combination",
			fmt.Sprintf("Keys are given here, but source is %q: they would not be used. To use them, set source = \"static\".", source))
	}
}

// ---- plan -----------------------------------------------------------------------------------------------------------

func (r *backupJobResource) ModifyPlan(ctx context.Context, req resource.ModifyPlanRequest, resp *resource.ModifyPlanResponse) {
	diags := &resp.Diagnostics
	if req.Plan.Raw.IsNull() {
		r.modifyDestroyPlan(ctx, req, diags)
		return
	}
	if r.data == nil {
		return
	}
	var m, config backupJobModel
	diags.Append(req.Plan.Get(ctx, &m)...)
	diags.Append(req.Config.Get(ctx, &config)...)
	if diags.HasError() {
		return
	}
	connection := m.connectionType(ctx, diags)
	if !m.Host.IsUnknown() && !m.Connection.IsUnknown() {
		r.data.rememberConnection(m.Host.ValueString(), connection)
	}
	create := req.State.Raw.IsNull()
	var known *remembered
	if !create {
		var d diag.Diagnostics
		known, d = recall(ctx, req.Private)
		diags.Append(d...)
	}
	if config.RepositorySettings.IsNull() {
		m.RepositorySettings = types.ObjectUnknown(repositorySettingsTypes)
		if !m.Repository.IsUnknown() && !r.data.unknown {
			r.planRepository(ctx, &m, known, create, diags)
		}
	}
	if !create {
		var state backupJobModel
		diags.Append(req.State.Get(ctx, &state)...)
		if diags.HasError() {
			return
		}
		r.planRepairs(ctx, &m, state, known, diags)
	}
	diags.Append(resp.Plan.Set(ctx, &m)...)
	if diags.HasError() {
		return
	}
	if req.Config.Raw.IsFullyKnown() && !m.RepositorySettings.IsUnknown() && !r.data.unknown {
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

// remembered is what Read found beyond the state's attributes. ModifyPlan compares with it rather than ask the guest
// again: the plan and the apply's own plan of the same change must come to the same answer.
type remembered struct {
	Discovered []discovered   `json:"discovered"`
	Protected  []job.Instance `json:"protected"`
	Location   string         `json:"location,omitempty"` // of the repository, as its pgark_repository says it is reached
}

// repository is how the repository was reached at the last refresh, if a pgark_repository said so then.
func (m *remembered) repository(url string) (s repositorySettings, ok bool) {
	if m == nil || m.Location == "" {
		return s, false
	}
	noted, s := locationQuery(m.Location)
	plain, _ := locationQuery(url)
	return s, noted == plain
}

// noteRepository keeps for the apply what this process knows of the repository.
func (m *remembered) noteRepository(d *providerData, url string) {
	if k, ok := d.known(url); ok {
		m.Location = withSettings(url, k.settings)
	}
}

type discovered struct {
	job.Instance
	Running bool `json:"running"`
}

const rememberedKey = "guest"

type privateState interface {
	GetKey(context.Context, string) ([]byte, diag.Diagnostics)
}

type privateStateWriter interface {
	SetKey(context.Context, string, []byte) diag.Diagnostics
}

func recall(ctx context.Context, p privateState) (*remembered, diag.Diagnostics) {
	b, diags := p.GetKey(ctx, rememberedKey)
	if diags.HasError() || len(b) == 0 {
		return nil, diags
	}
	m := new(remembered)
	if err := json.Unmarshal(b, m); err != nil {
		return nil, diags // another version's; the next refresh writes it anew
	}
	return m, diags
}

func (m remembered) save(ctx context.Context, p privateStateWriter) diag.Diagnostics {
	b, err := json.Marshal(m)
	if err != nil {
		panic("provider: internal error: " + err.Error()) // plain data
	}
	return p.SetKey(ctx, rememberedKey, b)
}

// selected are the instances that a selection would protect now. One that is not running at the moment is taken as it was
// protected: a stopped server tells little of itself, and stopping it is no change of plan.
func (m *remembered) selected(s job.Selection) []job.Instance {
	var out []job.Instance
	for _, d := range m.Discovered {
		if !s.Match(d.Name) {
			continue
		}
		instance := d.Instance
		for _, p := range m.Protected {
			if p.Name == d.Name && !d.Running {
				instance = p
			}
		}
		out = append(out, instance)
	}
	return out
}

// planRepairs decides which computed attributes this plan will change: those that are not, on the guest, what they
// should be. Terraform then shows them as known after apply, and so says why there is something to do.
func (r *backupJobResource) planRepairs(ctx context.Context, m *backupJobModel, state backupJobModel, known *remembered, diags *diag.Diagnostics) {
	m.MachineID, m.RunnerSHA256, m.ConfigSHA256 = state.MachineID, state.RunnerSHA256, state.ConfigSHA256
	m.ProtectedInstances, m.GuestSettingsActual, m.Runners = state.ProtectedInstances, state.GuestSettingsActual, state.Runners
	m.GuestHasCredentials = state.GuestHasCredentials
	var repairs []string

	if _, digest, err := r.data.runner(); err != nil {
		diags.AddWarning("No Runner in This Build", sentence(err.Error())+"\n\nThe guest's runner cannot be compared or replaced.")
	} else if digest != state.RunnerSHA256.ValueString() {
		m.RunnerSHA256 = types.StringUnknown()
		if state.RunnerSHA256.IsNull() {
			repairs = append(repairs, "the runner is missing")
		}
	}

	desired := m.toJob(ctx, diags)
	configKnown := !m.Repository.IsUnknown() && !m.RepositorySettings.IsUnknown()
	if known != nil {
		desired.Protected = known.selected(desired.Instances)
		desired.ApplyDefaults()
	}
	switch {
	case state.ConfigSHA256.IsNull():
		repairs = append(repairs, "the job file is missing or unreadable")
		m.ConfigSHA256 = types.StringUnknown()
	case !configKnown || known == nil || desired.Digest() != state.ConfigSHA256.ValueString():
		m.ConfigSHA256 = types.StringUnknown()
	}
	if m.ConfigSHA256.IsUnknown() && (known == nil || !sameNames(desired.Protected, known.Protected)) {
		m.ProtectedInstances = types.ListUnknown(protectedInstanceType)
		m.GuestSettingsActual = types.MapUnknown(settingsOfInstanceType)
		m.Runners = types.MapUnknown(types.StringType)
	}

	policy := m.settingsPolicy(ctx, diags)
	if !m.GuestSettings.Equal(state.GuestSettings) {
		m.GuestSettingsActual = types.MapUnknown(settingsOfInstanceType)
	} else if found := r.settingsDrift(ctx, state, policy, diags); len(found) > 0 {
		repairs = append(repairs, found...)
		m.GuestSettingsActual = types.MapUnknown(settingsOfInstanceType)
	}

	var runners map[string]string
	diags.Append(state.Runners.ElementsAs(ctx, &runners, false)...)
	for _, name := range sortedKeys(runners) {
		if m.Enabled.ValueBool() && runners[name] != runnerRunning {
			repairs = append(repairs, fmt.Sprintf("the runner of %s is %s", name, runners[name]))
			m.Runners = types.MapUnknown(types.StringType)
		}
	}
	if !m.Enabled.Equal(state.Enabled) {
		m.Runners = types.MapUnknown(types.StringType)
	}

	if !m.Credentials.IsUnknown() && !m.Repository.IsUnknown() && m.wantsCredentials(ctx, diags) != state.GuestHasCredentials.ValueBool() {
		m.GuestHasCredentials = types.BoolUnknown()
		if m.Credentials.Equal(state.Credentials) {
			repairs = append(repairs, "the S3 keys are missing, or there against the declaration")
		}
	}

	if len(repairs) > 0 {
		diags.AddAttributeWarning(path.Root("host"), fmt.Sprintf("Job %q on %s Differs From Its Declaration", m.Name.ValueString(), m.Host.ValueString()),
			"  - "+strings.Join(repairs, "\n  - ")+"\n\nThis plan repairs it.")
	}
}

const runnerRunning = "running"

func sameNames(a, b []job.Instance) bool {
	if len(a) != len(b) {
		return false
	}
	for i := range a {
		if a[i].Name != b[i].Name {
			return false
		}
	}
	return true
}

// settingsDrift says which settings of protected instances are not ours any more.
func (r *backupJobResource) settingsDrift(ctx context.Context, state backupJobModel, policy guest.SettingsPolicy, diags *diag.Diagnostics) []string {
	if !policy.Manage || state.GuestSettingsActual.IsNull() || state.GuestSettingsActual.IsUnknown() {
		return nil
	}
	var actual map[string]map[string]string
	diags.Append(state.GuestSettingsActual.ElementsAs(ctx, &actual, false)...)
	var found []string
	for _, instance := range sortedKeys(actual) {
		settings := actual[instance]
		if len(settings) == 0 {
			continue // a server that is down cannot be asked
		}
		ours := r.data.world.layout().ArchiveCommand(state.Name.ValueString(), instance)
		if command := settings["archive_command"]; command != ours {
			found = append(found, fmt.Sprintf("archive_command of %s is %q, expected %q", instance, command, ours))
		}
		if library := settings["archive_library"]; library != "" {
			found = append(found, fmt.Sprintf("archive_library of %s is %q, expected it empty", instance, library))
		}
		if mode := settings["archive_mode"]; mode == "off" {
			found = append(found, fmt.Sprintf("archive_mode of %s is %q, expected %q", instance, mode, "on"))
		}
	}
	return found
}

// planChecks looks whether the guest meets the prerequisites.
func (r *backupJobResource) planChecks(ctx context.Context, m, config backupJobModel, create bool, diags *diag.Diagnostics) {
	if r.data.checks == checksOff {
		return
	}
	g := r.data.guest(m.Host.ValueString(), m.connectionType(ctx, diags), diags)
	if g == nil {
		return
	}
	var found diag.Diagnostics
	if create {
		if _, _, err := r.data.runner(); err != nil {
			found.AddError("No Runner in This Build", sentence(err.Error()))
		}
	}
	keys := r.credentials(ctx, m, config, &found)
	ctx, cancel := context.WithTimeout(ctx, jobPlanTimeout)
	defer cancel()
	if !found.HasError() {
		found.Append(r.check(ctx, g, m, keys, diags)...)
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

// check runs the prerequisite checks: one diagnostic for each that is not met, errors all. What only deserves attention
// comes as a warning.
func (r *backupJobResource) check(ctx context.Context, g guest.Guest, m backupJobModel, keys *objectstore.Credentials, diags *diag.Diagnostics) diag.Diagnostics {
	var out diag.Diagnostics
	host := m.Host.ValueString()
	checks, err := r.data.check(ctx, g, host, guest.CheckRequest{
		Job: m.toJob(ctx, diags), Credentials: keys, Settings: m.repairPolicy(ctx, diags),
	})
	if err != nil {
		out.AddAttributeError(path.Root("host"), "Unable to Check Prerequisites on "+host, detail(err))
		return out
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
	return out
}

// checkPath is the attribute to which a prerequisite has most to do.
func checkPath(name string) path.Path {
	switch name {
	case "temporary_folder":
		return path.Root("wal").AtName("temp_folder")
	case "repository_reachable":
		return path.Root("repository")
	case "archive_command", "archive_library", "archive_mode", "wal_level", "full_page_writes":
		return path.Root("guest_settings")
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

// ---- create, read, update, delete -----------------------------------------------------------------------------------

func (r *backupJobResource) Create(ctx context.Context, req resource.CreateRequest, resp *resource.CreateResponse) {
	diags := &resp.Diagnostics
	var m, config backupJobModel
	diags.Append(req.Plan.Get(ctx, &m)...)
	diags.Append(req.Config.Get(ctx, &config)...)
	setIdentity(ctx, resp.Identity, diags, m.Host, "name", m.Name)
	timeout, d := m.Timeouts.Create(ctx, jobCreateTimeout)
	diags.Append(d...)
	if diags.HasError() {
		return
	}
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()

	// What is known only in the apply is checked here for the first time, before anything is changed.
	g, keys, ok := r.ready(ctx, m, config, diags)
	if !ok {
		return
	}

	// From here on the guest changes: let Terraform know of the job even if this process does not live to its end.
	early := m
	early.nullUnknown()
	diags.Append(resp.State.Set(ctx, &early)...)
	if diags.HasError() {
		return
	}
	r.deploy(ctx, g, &m, keys, "Create", nil, resp.Private, diags)
	if diags.HasError() {
		return
	}
	diags.Append(resp.State.Set(ctx, &m)...)
	if m.WaitForFirstImage.ValueBool() {
		r.waitForFirstImage(ctx, m, diags)
	}
}

// ready reaches the guest, finds its keys and makes the prerequisite checks an apply has to pass.
func (r *backupJobResource) ready(ctx context.Context, m, config backupJobModel, diags *diag.Diagnostics) (guest.Guest, *objectstore.Credentials, bool) {
	g := r.data.guest(m.Host.ValueString(), m.connectionType(ctx, diags), diags)
	if g == nil {
		return nil, nil, false
	}
	keys := r.credentials(ctx, m, config, diags)
	if diags.HasError() {
		return nil, nil, false
	}
	if r.data.checks == checksError {
		for _, d := range r.check(ctx, g, m, keys, diags) {
			if d.Severity() == diag.SeverityError { // the plan has shown the warnings
				diags.Append(d)
			}
		}
	}
	return g, keys, !diags.HasError()
}

// deploy makes the guest match the model, and the model the guest.
func (r *backupJobResource) deploy(ctx context.Context, g guest.Guest, m *backupJobModel, keys *objectstore.Credentials, action string, prior *remembered, private privateStateWriter, diags *diag.Diagnostics) {
	runner, _, err := r.data.runner()
	if err != nil {
		diags.Append(unable(action, jobNoun, m.Name.ValueString(), err))
		return
	}
	declared := m.toJob(ctx, diags)
	if diags.HasError() {
		return
	}
	state, err := g.Apply(ctx, guest.Deployment{Job: declared, Credentials: keys, Runner: runner, Settings: m.repairPolicy(ctx, diags)})
	if err != nil {
		if owned, ok := errors.AsType[*repository.OwnedError](err); ok {
			diags.AddAttributeError(path.Root("name"), fmt.Sprintf("Job Name %q Belongs to Another Machine", m.Name.ValueString()),
				sentence(owned.Error())+"\n\nA job name has one owner in a repository, so that two machines never write into one another's backups. Choose another name, or another repository.")
			return
		}
		if unmet, ok := errors.AsType[*guest.PrerequisiteError](err); ok {
			for _, c := range unmet.Checks {
				diags.Append(prerequisiteNotMet(checkPath(c.Name), m.Host.ValueString(), c))
			}
			return
		}
		diags.Append(unable(action, jobNoun, m.Name.ValueString(), err))
		return
	}
	m.fromState(ctx, state, diags)
	known := remembered{}
	if prior != nil {
		known.Location = prior.Location
	}
	if state.Job != nil {
		known.Protected = state.Job.Protected
		for _, i := range state.Job.Protected {
			known.Discovered = append(known.Discovered, discovered{Instance: i, Running: true})
		}
	}
	known.noteRepository(r.data, m.Repository.ValueString())
	diags.Append(known.save(ctx, private)...)
}

// nullUnknown makes the model storable before what it does not know yet is known.
func (m *backupJobModel) nullUnknown() {
	if m.MachineID.IsUnknown() {
		m.MachineID = types.StringNull()
	}
	if m.RunnerSHA256.IsUnknown() {
		m.RunnerSHA256 = types.StringNull()
	}
	if m.ConfigSHA256.IsUnknown() {
		m.ConfigSHA256 = types.StringNull()
	}
	if m.ProtectedInstances.IsUnknown() {
		m.ProtectedInstances = types.ListNull(protectedInstanceType)
	}
	if m.GuestSettingsActual.IsUnknown() {
		m.GuestSettingsActual = types.MapNull(settingsOfInstanceType)
	}
	if m.Runners.IsUnknown() {
		m.Runners = types.MapNull(types.StringType)
	}
	if m.GuestHasCredentials.IsUnknown() {
		m.GuestHasCredentials = types.BoolNull()
	}
}

func (r *backupJobResource) Read(ctx context.Context, req resource.ReadRequest, resp *resource.ReadResponse) {
	diags := &resp.Diagnostics
	var m backupJobModel
	diags.Append(req.State.Get(ctx, &m)...)
	setIdentity(ctx, resp.Identity, diags, m.Host, "name", m.Name)
	timeout, d := m.Timeouts.Read(ctx, jobReadTimeout)
	diags.Append(d...)
	if diags.HasError() {
		return
	}
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()

	host, name := m.Host.ValueString(), m.Name.ValueString()
	connection := m.connectionType(ctx, diags)
	r.data.rememberConnection(host, connection)
	g := r.data.guest(host, connection, diags)
	if g == nil {
		return
	}
	state, err := g.State(ctx, name)
	if errors.Is(err, guest.ErrNoJob) {
		resp.State.RemoveResource(ctx) // the guest was read, and it holds nothing of the job
		return
	}
	var instances []guest.Instance
	if err == nil {
		instances, err = g.Discover(ctx)
	}
	if err != nil {
		problem := unreachable(host, fmt.Sprintf("%s %q", jobNoun, name), err)
		if r.data.onUnreachable == unreachableWarn {
			problem = asWarning(problem)
		}
		diags.Append(problem)
		return
	}
	if known := m.MachineID.ValueString(); known != "" && known != state.Machine.ID {
		diags.AddAttributeWarning(path.Root("host"), fmt.Sprintf("%s Is Another Machine", host),
			fmt.Sprintf("The job was created on the machine %s; %s is now %s (%s).", known, host, state.Machine.ID, state.Machine.Host))
	}
	m.fromState(ctx, state, diags)
	known := remembered{}
	if state.Job != nil {
		known.Protected = state.Job.Protected
	}
	for _, i := range instances {
		known.Discovered = append(known.Discovered, discovered{Instance: i.Instance, Running: i.Running})
	}
	known.noteRepository(r.data, m.Repository.ValueString())
	diags.Append(known.save(ctx, resp.Private)...)
	diags.Append(resp.State.Set(ctx, &m)...)
}

func (r *backupJobResource) Update(ctx context.Context, req resource.UpdateRequest, resp *resource.UpdateResponse) {
	diags := &resp.Diagnostics
	var m, config backupJobModel
	diags.Append(req.Plan.Get(ctx, &m)...)
	diags.Append(req.Config.Get(ctx, &config)...)
	setIdentity(ctx, resp.Identity, diags, m.Host, "name", m.Name)
	timeout, d := m.Timeouts.Update(ctx, jobUpdateTimeout)
	diags.Append(d...)
	if diags.HasError() {
		return
	}
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()

	g, keys, ok := r.ready(ctx, m, config, diags)
	if !ok {
		return
	}
	prior, d := recall(ctx, req.Private)
	diags.Append(d...)
	r.deploy(ctx, g, &m, keys, "Update", prior, resp.Private, diags)
	if diags.HasError() {
		return
	}
	diags.Append(resp.State.Set(ctx, &m)...)
}

// Delete takes away whatever is there of the job, also half of it. It asks for no prerequisite: what cannot be
// protected can still be given up.
func (r *backupJobResource) Delete(ctx context.Context, req resource.DeleteRequest, resp *resource.DeleteResponse) {
	diags := &resp.Diagnostics
	var m backupJobModel
	diags.Append(req.State.Get(ctx, &m)...)
	timeout, d := m.Timeouts.Delete(ctx, jobDeleteTimeout)
	diags.Append(d...)
	if diags.HasError() {
		return
	}
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()

	g := r.data.guest(m.Host.ValueString(), m.connectionType(ctx, diags), diags)
	if g == nil {
		return
	}
	if err := g.Remove(ctx, m.Name.ValueString()); err != nil {
		diags.Append(unable("Delete", jobNoun, m.Name.ValueString(), err))
		return
	}
	if m.DeletionPolicy.ValueString() == deleteBackups {
		r.deleteBackups(ctx, m, diags)
	}
}

// ImportState takes host/name, or the identity. The guest says the rest.
func (r *backupJobResource) ImportState(ctx context.Context, req resource.ImportStateRequest, resp *resource.ImportStateResponse) {
	host, name, ok := importedPair(ctx, req, "name", &resp.Diagnostics)
	if !ok {
		return
	}
	setIdentity(ctx, resp.Identity, &resp.Diagnostics, types.StringValue(host), "name", types.StringValue(name))
	resp.Diagnostics.Append(resp.State.SetAttribute(ctx, path.Root("host"), host)...)
	resp.Diagnostics.Append(resp.State.SetAttribute(ctx, path.Root("name"), name)...)
	// An import cannot say how the host is reached: it is this machine if this machine has the job.
	connection := objectOfDefaults(connectionAttribute())
	if r.data.holdsLocally(ctx, host, name) {
		connection = encode(ctx, connectionTypes, connectionModel{Type: types.StringValue(connectionLocal)}, &resp.Diagnostics)
	}
	resp.Diagnostics.Append(resp.State.SetAttribute(ctx, path.Root(connectionName), connection)...)
}

// importedPair reads what an import names: "host/name", split at the first slash, or the identity's attributes.
func importedPair(ctx context.Context, req resource.ImportStateRequest, nameAttribute string, diags *diag.Diagnostics) (host, name string, ok bool) {
	if req.ID == "" {
		diags.Append(req.Identity.GetAttribute(ctx, path.Root("host"), &host)...)
		diags.Append(req.Identity.GetAttribute(ctx, path.Root(nameAttribute), &name)...)
		return host, name, !diags.HasError()
	}
	host, name, found := strings.Cut(req.ID, "/")
	if !found || host == "" || name == "" {
		diags.AddError("Invalid Import ID", fmt.Sprintf("Found %q, expected HOST/%s, as in db1.example.com/orders.", req.ID, strings.ToUpper(nameAttribute)))
		return "", "", false
	}
	return host, name, true
}
