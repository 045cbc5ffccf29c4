package provider

import (
	"context"

	"github.com/hashicorp/terraform-plugin-framework-validators/stringvalidator"
	"github.com/hashicorp/terraform-plugin-framework/datasource"
	"github.com/hashicorp/terraform-plugin-framework/datasource/schema"
	"github.com/hashicorp/terraform-plugin-framework/schema/validator"
	"github.com/hashicorp/terraform-plugin-framework/types"

	"github.com/pgark/terraform-provider-pgark/internal/engine/guest"
	"github.com/pgark/terraform-provider-pgark/internal/engine/job"
	"github.com/pgark/terraform-provider-pgark/internal/engine/objectstore"
	"github.com/pgark/terraform-provider-pgark/internal/provider/validators"
)

type prerequisitesDataSource struct{ dataSource }

func newPrerequisitesDataSource() datasource.DataSource { return &prerequisitesDataSource{} }

var _ datasource.DataSourceWithConfigure = (*prerequisitesDataSource)(nil)

type prerequisitesDataModel struct {
	Host               types.String `tfsdk:"host"`
	Connection         types.Object `tfsdk:"host_connection"`
	Job                types.String `tfsdk:"job"`
	Repository         types.String `tfsdk:"repository"`
	RepositorySettings types.Object `tfsdk:"repository_settings"`
	Include            types.Set    `tfsdk:"include"`
	Exclude            types.Set    `tfsdk:"exclude"`
	WALMode            types.String `tfsdk:"wal_mode"`
	Synchronous        types.Bool   `tfsdk:"synchronous"`
	Slot               types.Bool   `tfsdk:"slot"`
	TempFolder         types.String `tfsdk:"temp_folder"`
	DatabaseUser       types.String `tfsdk:"database_user"`
	GuestSettings      types.Object `tfsdk:"guest_settings"`
	Ready              types.Bool   `tfsdk:"ready"`
	Checks             types.List   `tfsdk:"checks"`
}

type checkModel struct {
	Name     types.String `tfsdk:"name"`
	Instance types.String `tfsdk:"instance"`
	Status   types.String `tfsdk:"status"`
	Found    types.String `tfsdk:"found"`
	Expected types.String `tfsdk:"expected"`
	Remedy   types.String `tfsdk:"remedy"`
}

func checkListAttribute() schema.ListNestedAttribute {
	return schema.ListNestedAttribute{
		Computed: true, MarkdownDescription: "Every check, in a fixed order.",
		NestedObject: schema.NestedAttributeObject{Attributes: map[string]schema.Attribute{
			"name":     schema.StringAttribute{Computed: true, MarkdownDescription: "Stable name of the check, as `archive_mode`."},
			"instance": schema.StringAttribute{Computed: true, MarkdownDescription: "The instance that it is about; null when it is about the host."},
			"status":   schema.StringAttribute{Computed: true, MarkdownDescription: "`pass`, `warn` or `fail`."},
			"found":    schema.StringAttribute{Computed: true, MarkdownDescription: "What was found."},
			"expected": schema.StringAttribute{Computed: true, MarkdownDescription: "What was expected."},
			"remedy":   schema.StringAttribute{Computed: true, MarkdownDescription: "Commands that mend it; null where there is nothing to mend."},
		}},
	}
}

var checkType = types.ObjectType{AttrTypes: attributeTypes(checkListAttribute())}

func (d *prerequisitesDataSource) Metadata(_ context.Context, req datasource.MetadataRequest, resp *datasource.MetadataResponse) {
	resp.TypeName = req.ProviderTypeName + "_prerequisites"
}

func (d *prerequisitesDataSource) Schema(_ context.Context, _ datasource.SchemaRequest, resp *datasource.SchemaResponse) {
	pattern := validators.String("a name or a pattern", validators.Job(func(j *job.Job, p string) { j.Instances.Include = []string{p} }))
	resp.Schema = schema.Schema{
		MarkdownDescription: "Every prerequisite for protecting the PostgreSQL instances of a host, with what was found, what was expected and what to do. " +
			"The same checks are made when a `pgark_postgresql_backup_job` is planned; here a failing one is no error, so that `check` blocks and postconditions can judge it. Nothing is changed on the guest.",
		Attributes: map[string]schema.Attribute{
			"host":         hostForData(),
			connectionName: connectionForData(),
			"job": schema.StringAttribute{
				Optional: true, MarkdownDescription: "Name of the job: an `archive_command` that is this job's is in order.",
				Validators: []validator.String{validators.String("letters, digits, dot, underscore and hyphen", jobName)},
			},
			"repository": schema.StringAttribute{
				Optional: true, Validators: urlValidators(),
				MarkdownDescription: "URL of the repository that the guest is to reach. Default: that is not checked.",
			},
			"repository_settings": repositorySettingsForData(),
			"include":             schema.SetAttribute{ElementType: types.StringType, Optional: true, MarkdownDescription: "Names or patterns of instances to look at. Default: all.", Validators: []validator.Set{valueStrings(pattern)}},
			"exclude":             schema.SetAttribute{ElementType: types.StringType, Optional: true, MarkdownDescription: "Names or patterns of instances to leave out.", Validators: []validator.Set{valueStrings(pattern)}},
			"wal_mode": schema.StringAttribute{
				Optional: true, MarkdownDescription: "`continuous` (default) or `interval`, as `wal.mode` of the job. Streaming has prerequisites of its own.",
				Validators: []validator.String{validators.String("`continuous` or `interval`", validators.Job(func(j *job.Job, v string) { j.WAL.Mode = v }))},
			},
			"synchronous": schema.BoolAttribute{Optional: true, MarkdownDescription: "Whether commits are to wait for the repository, as `wal.synchronous` of the job. Default: `false`."},
			"slot":        schema.BoolAttribute{Optional: true, MarkdownDescription: "Whether a replication slot is to hold WAL back, as `wal.slot` of the job. Default: `false`."},
			"temp_folder": schema.StringAttribute{
				Optional: true, MarkdownDescription: "Directory that is to take WAL while the repository is away, as `wal.temp_folder` of the job.",
				Validators: []validator.String{validators.String("an absolute path", validators.Job(func(j *job.Job, v string) { j.WAL.TempFolder = v }))},
			},
			"database_user": schema.StringAttribute{
				Optional: true, MarkdownDescription: "PostgreSQL role that pgark is to work as, as in the job.",
				Validators: []validator.String{validators.String("a role's name", validators.Job(func(j *job.Job, v string) { j.DatabaseUser = v }))},
			},
			"guest_settings": schema.SingleNestedAttribute{
				Optional: true, MarkdownDescription: "What pgark would be allowed to do, as in the job. It decides what still is a prerequisite.",
				Attributes: map[string]schema.Attribute{
					"manage":                   schema.BoolAttribute{Optional: true, MarkdownDescription: "Whether settings may be changed. Default: `true`."},
					"restart":                  schema.StringAttribute{Optional: true, MarkdownDescription: "`never` (default) or `allow`.", Validators: []validator.String{stringvalidator.OneOf(defaultRestart, "allow")}},
					"existing_archive_command": schema.StringAttribute{Optional: true, MarkdownDescription: "`fail` (default), `replace` or `chain`.", Validators: []validator.String{stringvalidator.OneOf(defaultExisting, existingReplace, existingChain)}},
				},
			},
			"ready":  schema.BoolAttribute{Computed: true, MarkdownDescription: "Whether no check fails."},
			"checks": checkListAttribute(),
		},
	}
}

func (d *prerequisitesDataSource) Read(ctx context.Context, req datasource.ReadRequest, resp *datasource.ReadResponse) {
	diags := &resp.Diagnostics
	var m prerequisitesDataModel
	diags.Append(req.Config.Get(ctx, &m)...)
	if diags.HasError() {
		return
	}
	g := d.guest(ctx, m.Host, m.Job.ValueString(), m.Connection, diags)
	if g == nil {
		return
	}
	settings := decode[guestSettingsModel](ctx, m.GuestSettings, diags)
	policy := guest.SettingsPolicy{
		Manage:                 settings.Manage.IsNull() || settings.Manage.ValueBool(),
		Restart:                firstOf(settings.Restart.ValueString(), defaultRestart),
		ExistingArchiveCommand: firstOf(settings.ExistingArchiveCommand.ValueString(), defaultExisting),
	}

	ctx, cancel := context.WithTimeout(ctx, dataTimeout)
	defer cancel()
	withRepository := !m.Repository.IsNull()
	j := &job.Job{
		Name:    firstOf(m.Job.ValueString(), "prerequisites"),
		Host:    m.Host.ValueString(),
		Enabled: true,

		DatabaseUser: m.DatabaseUser.ValueString(),
		Instances:    job.Selection{Include: stringsOf(ctx, m.Include, diags), Exclude: stringsOf(ctx, m.Exclude, diags)},
		WAL: job.WAL{
			Mode: m.WALMode.ValueString(), Synchronous: m.Synchronous.ValueBool(), Slot: m.Slot.ValueBool(), TempFolder: m.TempFolder.ValueString(),
		},
	}
	m.RepositorySettings = d.settings(ctx, m.Repository, m.RepositorySettings, diags)
	if withRepository {
		plain, _ := locationQuery(m.Repository.ValueString())
		s := decode[repositorySettingsModel](ctx, m.RepositorySettings, diags).settings()
		j.Repository = job.Repository{URL: plain, Region: s.region, Endpoint: s.endpoint, UsePathStyle: s.usePathStyle, StorageClass: s.storageClass}
	}
	j.ApplyDefaults()
	var keys *objectstore.Credentials
	if withRepository && !isFile(m.Repository.ValueString()) {
		if found, _, err := d.data.keysForGuest(ctx); err == nil {
			keys = found // otherwise the check itself says that there are none
		}
	}
	if diags.HasError() {
		return
	}
	checks, err := d.data.check(ctx, g, m.Host.ValueString(), guest.CheckRequest{Job: j, Credentials: keys, Settings: policy})
	if err != nil {
		diags.AddAttributeError(connectionPath(err), "Unable to Check Prerequisites on "+m.Host.ValueString(), detail(err))
		return
	}
	ready := true
	list := make([]checkModel, 0, len(checks))
	for _, c := range checks {
		if c.Name == "repository_reachable" && !withRepository {
			continue
		}
		ready = ready && c.Status != guest.Fail
		list = append(list, checkModel{
			Name: types.StringValue(c.Name), Instance: text(c.Instance), Status: types.StringValue(string(c.Status)),
			Found: types.StringValue(c.Found), Expected: types.StringValue(c.Expected), Remedy: text(c.Remedy),
		})
	}
	m.Ready = types.BoolValue(ready)
	m.Checks = listOf(ctx, checkType, list, diags)
	diags.Append(resp.State.Set(ctx, &m)...)
}
