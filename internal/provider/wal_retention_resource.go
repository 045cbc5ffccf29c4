package provider

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/hashicorp/terraform-plugin-framework-timeouts/resource/timeouts"
	"github.com/hashicorp/terraform-plugin-framework-validators/boolvalidator"
	"github.com/hashicorp/terraform-plugin-framework-validators/int64validator"
	"github.com/hashicorp/terraform-plugin-framework-validators/resourcevalidator"
	"github.com/hashicorp/terraform-plugin-framework-validators/stringvalidator"
	"github.com/hashicorp/terraform-plugin-framework/diag"
	"github.com/hashicorp/terraform-plugin-framework/path"
	"github.com/hashicorp/terraform-plugin-framework/resource"
	"github.com/hashicorp/terraform-plugin-framework/resource/identityschema"
	"github.com/hashicorp/terraform-plugin-framework/resource/schema"
	"github.com/hashicorp/terraform-plugin-framework/resource/schema/planmodifier"
	"github.com/hashicorp/terraform-plugin-framework/resource/schema/stringplanmodifier"
	"github.com/hashicorp/terraform-plugin-framework/schema/validator"
	"github.com/hashicorp/terraform-plugin-framework/types"

	"github.com/pgark/terraform-provider-pgark/internal/engine/guest"
	"github.com/pgark/terraform-provider-pgark/internal/engine/job"
	"github.com/pgark/terraform-provider-pgark/internal/provider/validators"
)

const retentionNoun = "WAL Retention"

const retentionTimeout = 2 * time.Minute // one small file on the guest

type walRetentionResource struct{ data *providerData }

func newWALRetentionResource() resource.Resource { return &walRetentionResource{} }

var (
	_ resource.ResourceWithConfigure        = (*walRetentionResource)(nil)
	_ resource.ResourceWithIdentity         = (*walRetentionResource)(nil)
	_ resource.ResourceWithImportState      = (*walRetentionResource)(nil)
	_ resource.ResourceWithModifyPlan       = (*walRetentionResource)(nil)
	_ resource.ResourceWithConfigValidators = (*walRetentionResource)(nil)
	_ resource.ResourceWithValidateConfig   = (*walRetentionResource)(nil)
)

// walRetentionModel is pgark_wal_retention.
type walRetentionModel struct {
	Host              types.String   `tfsdk:"host"`
	Job               types.String   `tfsdk:"job"`
	Connection        types.Object   `tfsdk:"host_connection"`
	UntilImageDeleted types.Bool     `tfsdk:"until_image_deleted"`
	KeepDays          types.Int64    `tfsdk:"keep_days"`
	EnforcedBy        types.String   `tfsdk:"enforced_by"`
	Timeouts          timeouts.Value `tfsdk:"timeouts"`
}

func (m walRetentionModel) toRetention() *job.WALRetention {
	return &job.WALRetention{
		UntilImageDeleted: m.UntilImageDeleted.ValueBool(),
		KeepDays:          int(m.KeepDays.ValueInt64()),
		EnforcedBy:        m.EnforcedBy.ValueString(),
	}
}

func (m *walRetentionModel) fromRetention(r *job.WALRetention) {
	m.UntilImageDeleted = types.BoolNull()
	if r.UntilImageDeleted {
		m.UntilImageDeleted = types.BoolValue(true)
	}
	m.KeepDays = count(int64(r.KeepDays))
	m.EnforcedBy = types.StringValue(r.EnforcedBy)
}

func (m walRetentionModel) connectionType(ctx context.Context, diags *diag.Diagnostics) string {
	return firstOf(decode[connectionModel](ctx, m.Connection, diags).Type.ValueString(), connectionSSH)
}

func (m walRetentionModel) name() string { return m.Host.ValueString() + "/" + m.Job.ValueString() }

func (r *walRetentionResource) Metadata(_ context.Context, req resource.MetadataRequest, resp *resource.MetadataResponse) {
	resp.TypeName = req.ProviderTypeName + "_wal_retention"
}

func (r *walRetentionResource) Configure(_ context.Context, req resource.ConfigureRequest, resp *resource.ConfigureResponse) {
	r.data = fromProviderData(req.ProviderData, &resp.Diagnostics)
}

func (r *walRetentionResource) IdentitySchema(_ context.Context, _ resource.IdentitySchemaRequest, resp *resource.IdentitySchemaResponse) {
	resp.IdentitySchema = identityschema.Schema{Attributes: map[string]identityschema.Attribute{
		"host": identityschema.StringAttribute{RequiredForImport: true, Description: "The guest."},
		"job":  identityschema.StringAttribute{RequiredForImport: true, Description: "Name of the job."},
	}}
}

func (r *walRetentionResource) Schema(ctx context.Context, _ resource.SchemaRequest, resp *resource.SchemaResponse) {
	replace := []planmodifier.String{stringplanmodifier.RequiresReplace()}
	connection := connectionAttribute()
	connection.Optional, connection.Computed = true, true
	connection.MarkdownDescription = "How the host is reached. Default: as the job of this configuration reaches it (refer to its `host` and `name`), else over SSH."
	resp.Schema = schema.Schema{
		MarkdownDescription: "How long the WAL of a job is kept. A job without it keeps all WAL that its images can be rolled forward with. Whatever the rule, an image never loses the WAL that makes it consistent. " +
			"One per job; it is kept in the job's file on the guest. **Destroying it returns the job to keeping all that WAL.**",
		Attributes: map[string]schema.Attribute{
			"host": schema.StringAttribute{Required: true, MarkdownDescription: "The job's host: `pgark_postgresql_backup_job.NAME.host`.", PlanModifiers: replace, Validators: hostValidators()},
			"job": schema.StringAttribute{
				Required: true, MarkdownDescription: "The job's name: `pgark_postgresql_backup_job.NAME.name`.", PlanModifiers: replace,
				Validators: []validator.String{validators.String("letters, digits, dot, underscore and hyphen", jobName)},
			},
			connectionName: connection,
			"until_image_deleted": schema.BoolAttribute{
				Optional: true, MarkdownDescription: "`true`: WAL is kept until the image that it follows is deleted, so that every kept image can be rolled forward to the next.",
				Validators: []validator.Bool{boolvalidator.Equals(true)},
			},
			"keep_days": schema.Int64Attribute{
				Optional: true, MarkdownDescription: "WAL that is needed to restore some moment of the last so many days is kept. Older images stay restorable to the moment of their end.",
				Validators: []validator.Int64{int64validator.Between(1, 36500)},
			},
			"enforced_by": withDefault(job.DefaultEnforcedBy, "Who deletes: `guest`, or `log_shipping_server` (**not in this build**).",
				stringvalidator.OneOf(job.DefaultEnforcedBy, enforcedByServer)),
			"timeouts": timeouts.AttributesAll(ctx),
		},
	}
}

const enforcedByServer = "log_shipping_server"

func (r *walRetentionResource) ConfigValidators(context.Context) []resource.ConfigValidator {
	return []resource.ConfigValidator{
		resourcevalidator.ExactlyOneOf(path.MatchRoot("until_image_deleted"), path.MatchRoot("keep_days")),
	}
}

func (r *walRetentionResource) ValidateConfig(ctx context.Context, req resource.ValidateConfigRequest, resp *resource.ValidateConfigResponse) {
	var by types.String
	resp.Diagnostics.Append(req.Config.GetAttribute(ctx, path.Root("enforced_by"), &by)...)
	if by.ValueString() == enforcedByServer {
		resp.Diagnostics.Append(notInThisBuild(path.Root("enforced_by"), `enforced_by "log_shipping_server"`, `The guest enforces retention itself: enforced_by = "guest".`))
	}
}

func (r *walRetentionResource) ModifyPlan(ctx context.Context, req resource.ModifyPlanRequest, resp *resource.ModifyPlanResponse) {
	if req.Plan.Raw.IsNull() || r.data == nil {
		return
	}
	diags := &resp.Diagnostics
	var m, config, state walRetentionModel
	diags.Append(req.Plan.Get(ctx, &m)...)
	diags.Append(req.Config.Get(ctx, &config)...)
	create := req.State.Raw.IsNull()
	if !create {
		diags.Append(req.State.Get(ctx, &state)...)
	}
	if diags.HasError() {
		return
	}
	if config.Connection.IsNull() {
		switch {
		case !create:
			m.Connection = state.Connection
		case m.Host.IsUnknown() || m.Job.IsUnknown():
			m.Connection = types.ObjectUnknown(connectionTypes)
		default:
			m.Connection = r.connection(ctx, m, diags)
		}
		diags.Append(resp.Plan.SetAttribute(ctx, path.Root(connectionName), m.Connection)...)
	}
	if create {
		if !m.Host.IsUnknown() && !m.Connection.IsUnknown() {
			r.data.guest(m.Host.ValueString(), m.connectionType(ctx, diags), diags) // says so now if it cannot be reached at all
		}
		return
	}
	if from, to, shorter := shortened(state, m); shorter {
		diags.AddAttributeWarning(path.Root("keep_days"), fmt.Sprintf("WAL Retention of %q Becomes Shorter", m.Job.ValueString()),
			fmt.Sprintf("WAL was kept %s, and will be kept %s. What is older is deleted the next time retention is applied, and moments that only it reaches cannot be restored any more.", from, to))
	}
}

// connection is how the rest of this configuration reaches the host.
func (r *walRetentionResource) connection(ctx context.Context, m walRetentionModel, diags *diag.Diagnostics) types.Object {
	kind := r.data.connection(ctx, m.Host.ValueString(), m.Job.ValueString())
	return encode(ctx, connectionTypes, connectionModel{Type: types.StringValue(kind)}, diags)
}

// shortened compares two retentions. "Until the image is deleted" keeps at least what any number of days keeps.
func shortened(before, after walRetentionModel) (from, to string, shorter bool) {
	describe := func(m walRetentionModel) string {
		if m.UntilImageDeleted.ValueBool() {
			return "until its image is deleted"
		}
		return fmt.Sprintf("for %d days", m.KeepDays.ValueInt64())
	}
	if after.KeepDays.IsUnknown() || after.UntilImageDeleted.IsUnknown() || after.UntilImageDeleted.ValueBool() {
		return "", "", false
	}
	shorter = before.UntilImageDeleted.ValueBool() || after.KeepDays.ValueInt64() < before.KeepDays.ValueInt64()
	return describe(before), describe(after), shorter
}

func (r *walRetentionResource) Create(ctx context.Context, req resource.CreateRequest, resp *resource.CreateResponse) {
	diags := &resp.Diagnostics
	var m walRetentionModel
	diags.Append(req.Plan.Get(ctx, &m)...)
	setIdentity(ctx, resp.Identity, diags, m.Host, "job", m.Job)
	timeout, d := m.Timeouts.Create(ctx, retentionTimeout)
	diags.Append(d...)
	if diags.HasError() {
		return
	}
	if m.Connection.IsUnknown() {
		m.Connection = r.connection(ctx, m, diags)
	}
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	if r.write(ctx, m, "Create", diags) {
		diags.Append(resp.State.Set(ctx, &m)...)
	}
}

// write puts the retention into the job's file, in one step.
func (r *walRetentionResource) write(ctx context.Context, m walRetentionModel, action string, diags *diag.Diagnostics) bool {
	g := r.data.guest(m.Host.ValueString(), m.connectionType(ctx, diags), diags)
	if g == nil {
		return false
	}
	err := g.SetWALRetention(ctx, m.Job.ValueString(), m.toRetention())
	switch {
	case errors.Is(err, guest.ErrNoJob):
		diags.AddAttributeError(path.Root("job"), fmt.Sprintf("Unable to %s %s %q", action, retentionNoun, m.name()),
			fmt.Sprintf("There is no job %q on %s. Refer to the job's resource, so that it is created first: job = pgark_postgresql_backup_job.NAME.name.", m.Job.ValueString(), m.Host.ValueString()))
	case err != nil:
		diags.Append(unable(action, retentionNoun, m.name(), err))
	}
	return err == nil
}

func (r *walRetentionResource) Read(ctx context.Context, req resource.ReadRequest, resp *resource.ReadResponse) {
	diags := &resp.Diagnostics
	var m walRetentionModel
	diags.Append(req.State.Get(ctx, &m)...)
	setIdentity(ctx, resp.Identity, diags, m.Host, "job", m.Job)
	timeout, d := m.Timeouts.Read(ctx, retentionTimeout)
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
	state, err := g.State(ctx, m.Job.ValueString())
	switch {
	case errors.Is(err, guest.ErrNoJob),
		// The retention stands in the job file: where that is missing or unreadable, the job's own resource repairs it, and
		// this one is then created anew.
		err == nil && state.Job == nil,
		err == nil && state.Job.WALRetention == nil:
		resp.State.RemoveResource(ctx)
		return
	case err != nil:
		problem := unreachable(m.Host.ValueString(), retentionNoun+" of "+m.Job.ValueString(), err)
		if r.data.onUnreachable == unreachableWarn {
			problem = asWarning(problem)
		}
		diags.Append(problem)
		return
	}
	m.fromRetention(state.Job.WALRetention)
	diags.Append(resp.State.Set(ctx, &m)...)
}

func (r *walRetentionResource) Update(ctx context.Context, req resource.UpdateRequest, resp *resource.UpdateResponse) {
	diags := &resp.Diagnostics
	var m walRetentionModel
	diags.Append(req.Plan.Get(ctx, &m)...)
	setIdentity(ctx, resp.Identity, diags, m.Host, "job", m.Job)
	timeout, d := m.Timeouts.Update(ctx, retentionTimeout)
	diags.Append(d...)
	if diags.HasError() {
		return
	}
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	if r.write(ctx, m, "Update", diags) {
		diags.Append(resp.State.Set(ctx, &m)...)
	}
}

// Delete returns the job to keeping all WAL that its images can be rolled forward with. A job that is gone keeps nothing on the guest anyway.
func (r *walRetentionResource) Delete(ctx context.Context, req resource.DeleteRequest, resp *resource.DeleteResponse) {
	diags := &resp.Diagnostics
	var m walRetentionModel
	diags.Append(req.State.Get(ctx, &m)...)
	timeout, d := m.Timeouts.Delete(ctx, retentionTimeout)
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
	if err := g.SetWALRetention(ctx, m.Job.ValueString(), nil); err != nil && !errors.Is(err, guest.ErrNoJob) {
		diags.Append(unable("Delete", retentionNoun, m.name(), err))
	}
}

// ImportState takes host/job, or the identity.
func (r *walRetentionResource) ImportState(ctx context.Context, req resource.ImportStateRequest, resp *resource.ImportStateResponse) {
	host, name, ok := importedPair(ctx, req, "job", &resp.Diagnostics)
	if !ok {
		return
	}
	setIdentity(ctx, resp.Identity, &resp.Diagnostics, types.StringValue(host), "job", types.StringValue(name))
	resp.Diagnostics.Append(resp.State.SetAttribute(ctx, path.Root("host"), host)...)
	resp.Diagnostics.Append(resp.State.SetAttribute(ctx, path.Root("job"), name)...)
	connection := connectionSSH
	if r.data.holdsLocally(ctx, host, name) {
		connection = connectionLocal
	}
	resp.Diagnostics.Append(resp.State.SetAttribute(ctx, path.Root(connectionName),
		encode(ctx, connectionTypes, connectionModel{Type: types.StringValue(connection)}, &resp.Diagnostics))...)
}
