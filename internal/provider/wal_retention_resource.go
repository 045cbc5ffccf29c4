package provider

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"time"

	"github.com/hashicorp/terraform-plugin-framework-timeouts/resource/timeouts"
	"github.com/hashicorp/terraform-plugin-framework-validators/boolvalidator"
	"github.com/hashicorp/terraform-plugin-framework-validators/int64validator"
	"github.com/hashicorp/terraform-plugin-framework-validators/resourcevalidator"
	"github.com/hashicorp/terraform-plugin-framework-validators/stringvalidator"
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

const (
	retentionTimeout       = 2 * time.Minute  // one small file on the guest
	retentionCreateTimeout = 10 * time.Minute // the guest may still boot
)

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
	HostKey           types.String   `tfsdk:"host_key"`
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

func (m walRetentionModel) limits() timeouts.Value { return m.Timeouts }

func (m walRetentionModel) place() place {
	return place{noun: retentionNoun, host: m.Host, nameAttribute: "job", name: m.Job, connection: m.Connection, hostKey: m.HostKey}
}

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
	connection.MarkdownDescription = "How the host is reached. Default: as the job of this configuration reaches it (refer to its `host` and `name`), and as it does when that changes; else over SSH, as the provider's `ssh` block says. " +
		"It is kept here, because what is destroyed or changed alone hears nothing of the job."
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
			"host_key":     hostKeyAttribute(),
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

// followsKey is the private state that says whether the connection is the job's, because none is declared.
const followsKey = "follows"

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
			m.Connection = state.Connection // Read follows the job
		case m.Host.IsUnknown() || m.Job.IsUnknown():
			m.Connection = types.ObjectUnknown(connectionTypes)
		default:
			m.Connection = r.data.reachOf(ctx, m.Host.ValueString(), m.Job.ValueString()).model()
		}
	}
	m.HostKey = planHostKey(create, m.place(), state.place())
	if follows, d := req.Private.GetKey(ctx, followsKey); !create && config.Connection.IsNull() && string(follows) != "true" {
		diags.Append(d...)
		m.HostKey = types.StringUnknown() // it is to follow from now on: an update notes that
	}
	diags.Append(resp.Plan.SetAttribute(ctx, path.Root(connectionName), m.Connection)...)
	diags.Append(resp.Plan.SetAttribute(ctx, path.Root("host_key"), m.HostKey)...)
	if create {
		return
	}
	r.data.planUnread(ctx, m.place(), state.place(), req.Private, diags)
	if from, to, shorter := shortened(state, m); shorter {
		diags.AddAttributeWarning(path.Root("keep_days"), fmt.Sprintf("WAL Retention of %q Becomes Shorter", m.Job.ValueString()),
			fmt.Sprintf("WAL was kept %s, and will be kept %s. What is older is deleted the next time retention is applied, and moments that only it reaches cannot be restored any more.", from, to))
	}
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
	operate(ctx, r.data, creating, req.Plan, resp.Identity, retentionCreateTimeout, &resp.Diagnostics, func(ctx context.Context, o *operation, m walRetentionModel) {
		if m.Connection.IsUnknown() {
			m.Connection = r.data.reachOf(ctx, m.Host.ValueString(), m.Job.ValueString()).model()
		}
		if r.write(ctx, o, &m, req.Config, resp.Private) {
			o.diags.Append(resp.State.Set(ctx, &m)...)
		}
	})
}

func (r *walRetentionResource) Update(ctx context.Context, req resource.UpdateRequest, resp *resource.UpdateResponse) {
	operate(ctx, r.data, updating, req.Plan, resp.Identity, retentionTimeout, &resp.Diagnostics, func(ctx context.Context, o *operation, m walRetentionModel) {
		if r.write(ctx, o, &m, req.Config, resp.Private) {
			o.diags.Append(resp.State.Set(ctx, &m)...)
		}
	})
}

// write puts the retention into the job's file, in one step.
func (r *walRetentionResource) write(ctx context.Context, o *operation, m *walRetentionModel, from source, private privateStateWriter) bool {
	var config walRetentionModel
	o.diags.Append(from.Get(ctx, &config)...)
	o.follow(m.Connection)
	g := o.guest()
	if g == nil {
		return false
	}
	err := g.SetWALRetention(ctx, m.Job.ValueString(), m.toRetention())
	switch {
	case errors.Is(err, guest.ErrNoJob):
		o.diags.AddAttributeError(path.Root("job"), fmt.Sprintf("Unable to %s %s %q on %s", o.word, retentionNoun, m.Job.ValueString(), m.Host.ValueString()),
			fmt.Sprintf("There is no job %q on %s. Refer to the job's resource, so that it is created first: job = pgark_postgresql_backup_job.NAME.name.", m.Job.ValueString(), m.Host.ValueString()))
		return false
	case err != nil:
		o.failed(err)
		return false
	}
	shown := o.reached(g)
	if m.HostKey.IsUnknown() {
		m.HostKey = shown
	}
	o.diags.Append(private.SetKey(ctx, followsKey, strconv.AppendBool(nil, config.Connection.IsNull()))...)
	o.hasRead(ctx, private)
	return true
}

func (r *walRetentionResource) Read(ctx context.Context, req resource.ReadRequest, resp *resource.ReadResponse) {
	operate(ctx, r.data, reading, req.State, resp.Identity, retentionTimeout, &resp.Diagnostics, func(ctx context.Context, o *operation, m walRetentionModel) {
		follows, d := req.Private.GetKey(ctx, followsKey)
		o.diags.Append(d...)
		if heard, ok := r.data.heard(m.Host.ValueString()); ok && string(follows) == "true" {
			m.Connection = heard.model()
			if heard.key() != "" {
				m.HostKey = types.StringValue(heard.key())
			}
			o.place = m.place()
		}
		g, err := o.reach()
		var state *guest.State
		if err == nil {
			state, err = g.State(ctx, m.Job.ValueString())
		}
		switch {
		case errors.Is(err, guest.ErrNoJob),
			// The retention stands in the job file: where that is missing or unreadable, the job's own resource repairs it, and
			// this one is then created anew.
			err == nil && state.Job == nil,
			err == nil && state.Job.WALRetention == nil:
			resp.State.RemoveResource(ctx)
			return
		case err != nil:
			o.couldNotRead(ctx, err, m.EnforcedBy.IsNull(), resp.Private)
			return
		}
		o.hasRead(ctx, resp.Private)
		m.HostKey = o.reached(g)
		m.fromRetention(state.Job.WALRetention)
		o.diags.Append(resp.State.Set(ctx, &m)...)
	})
}

// Delete returns the job to keeping all WAL that its images can be rolled forward with. A job that is gone keeps nothing on the guest anyway.
func (r *walRetentionResource) Delete(ctx context.Context, req resource.DeleteRequest, resp *resource.DeleteResponse) {
	operate(ctx, r.data, deleting, req.State, nil, retentionTimeout, &resp.Diagnostics, func(ctx context.Context, o *operation, m walRetentionModel) {
		g := o.guest()
		if g == nil {
			return
		}
		if err := g.SetWALRetention(ctx, m.Job.ValueString(), nil); err != nil && !errors.Is(err, guest.ErrNoJob) {
			o.failed(err)
		}
	})
}

// ImportState takes host/job, or the identity.
func (r *walRetentionResource) ImportState(ctx context.Context, req resource.ImportStateRequest, resp *resource.ImportStateResponse) {
	r.data.importPair(ctx, "job", req, resp)
}
