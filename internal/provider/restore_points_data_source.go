package provider

import (
	"context"
	"time"

	"github.com/hashicorp/terraform-plugin-framework-timetypes/timetypes"
	"github.com/hashicorp/terraform-plugin-framework/datasource"
	"github.com/hashicorp/terraform-plugin-framework/datasource/schema"
	"github.com/hashicorp/terraform-plugin-framework/diag"
	"github.com/hashicorp/terraform-plugin-framework/path"
	"github.com/hashicorp/terraform-plugin-framework/types"

	"github.com/pgark/terraform-provider-pgark/internal/engine/restore"
)

type restorePointsDataSource struct{ dataSource }

func newRestorePointsDataSource() datasource.DataSource { return &restorePointsDataSource{} }

var _ datasource.DataSourceWithConfigure = (*restorePointsDataSource)(nil)

type restorePointsDataModel struct {
	Repository         types.String      `tfsdk:"repository"`
	RepositorySettings types.Object      `tfsdk:"repository_settings"`
	Job                types.String      `tfsdk:"job"`
	Instance           types.String      `tfsdk:"instance"`
	After              timetypes.RFC3339 `tfsdk:"after"`
	Before             timetypes.RFC3339 `tfsdk:"before"`
	Series             types.List        `tfsdk:"series"`
	Latest             types.Object      `tfsdk:"latest"`
	RecoverableFrom    timetypes.RFC3339 `tfsdk:"recoverable_from"`
	RecoverableTo      timetypes.RFC3339 `tfsdk:"recoverable_to"`
}

func computedString(description string) schema.StringAttribute {
	return schema.StringAttribute{Computed: true, MarkdownDescription: description}
}

func computedTime(description string) schema.StringAttribute {
	return schema.StringAttribute{Computed: true, CustomType: timetypes.RFC3339Type{}, MarkdownDescription: description}
}

func computedInt64(description string) schema.Int64Attribute {
	return schema.Int64Attribute{Computed: true, MarkdownDescription: description}
}

func restoreImageAttributes() map[string]schema.Attribute {
	return map[string]schema.Attribute{
		"id":               computedString("Id of the image within its series."),
		"kind":             computedString("`full` or `incremental`. Either is complete by itself."),
		"status":           computedString("`restorable`, or `incomplete` when WAL that makes it consistent is missing."),
		"reason":           computedString("Why it is incomplete; null when it is not."),
		"started_at":       computedTime("When its backup began."),
		"completed_at":     computedTime("When its backup ended."),
		"start_lsn":        computedString("Where in the WAL its backup began."),
		"stop_lsn":         computedString("Where in the WAL it is consistent."),
		"timeline":         computedInt64("Timeline."),
		"postgres_version": computedInt64("PostgreSQL's `server_version_num`."),
		"source_bytes":     computedInt64("Size of everything in it."),
		"read_bytes":       computedInt64("Bytes read to take it."),
		"stored_bytes":     computedInt64("Bytes that it added to the repository."),
		"corrupt_pages":    computedInt64("Pages whose checksum was wrong."),
		"verified_at":      computedTime("When it was last verified; null if never."),
	}
}

func seriesAttribute() schema.ListNestedAttribute {
	return schema.ListNestedAttribute{
		Computed: true, MarkdownDescription: "What each series (job, instance and cluster) can restore.",
		NestedObject: schema.NestedAttributeObject{Attributes: map[string]schema.Attribute{
			"job":               computedString("Name of the job."),
			"instance":          computedString("Name of the instance."),
			"system_identifier": computedString("System identifier of the cluster, decimal."),
			"images": schema.ListNestedAttribute{
				Computed: true, MarkdownDescription: "Images, oldest first.",
				NestedObject: schema.NestedAttributeObject{Attributes: restoreImageAttributes()},
			},
			"windows": schema.ListNestedAttribute{
				Computed: true, MarkdownDescription: "Intervals over which every moment can be restored.",
				NestedObject: schema.NestedAttributeObject{Attributes: map[string]schema.Attribute{
					"from":      computedTime("The first consistent moment."),
					"to":        computedTime("The last commit known."),
					"start_lsn": computedString("Position of `from`."),
					"end_lsn":   computedString("How far the WAL reaches: at or behind the position of `to`."),
					"timeline":  computedInt64("Timeline."),
				}},
			},
			"gaps": schema.ListNestedAttribute{
				Computed: true, MarkdownDescription: "Stretches of WAL that are missing; no moment in them can be restored.",
				NestedObject: schema.NestedAttributeObject{Attributes: map[string]schema.Attribute{
					"timeline":  computedInt64("Timeline."),
					"start_lsn": computedString("Where it begins."),
					"end_lsn":   computedString("Where it ends."),
					"segments":  computedInt64("How many segments are missing."),
					"from":      computedTime("The last commit known before it, where one is known."),
					"to":        computedTime("The first commit known behind it, where one is known."),
				}},
			},
		}},
	}
}

func latestAttribute() schema.SingleNestedAttribute {
	attributes := restoreImageAttributes()
	attributes["job"] = computedString("Name of its job.")
	attributes["instance"] = computedString("Name of its instance.")
	return schema.SingleNestedAttribute{
		Computed: true, MarkdownDescription: "The restorable image that was completed last; null if there is none.",
		Attributes: attributes,
	}
}

// fromListing takes over what the repository can restore.
func (m *restorePointsDataModel) fromListing(ctx context.Context, l *restore.Listing, diags *diag.Diagnostics) {
	// latest is one image, and whose it is.
	type latest struct {
		restore.Image

		Job      string `json:"job"`
		Instance string `json:"instance"`
	}
	var newest *latest
	var from, to time.Time
	for _, s := range l.Series {
		for _, i := range s.Images {
			if i.Status == restore.Restorable && (newest == nil || i.CompletedAt.After(newest.CompletedAt)) {
				newest = &latest{i, s.Job, s.Instance}
			}
		}
		for _, w := range s.Windows {
			if from.IsZero() || w.From.Before(from) {
				from = w.From
			}
			if w.To.After(to) {
				to = w.To
			}
		}
	}
	m.RecoverableFrom, m.RecoverableTo = moment(from), moment(to)
	m.Series = fromJSON[types.List](ctx, seriesAttribute().GetType(), l.Series, diags)
	m.Latest = fromJSON[types.Object](ctx, latestAttribute().GetType(), newest, diags)
}

func (d *restorePointsDataSource) Metadata(_ context.Context, req datasource.MetadataRequest, resp *datasource.MetadataResponse) {
	resp.TypeName = req.ProviderTypeName + "_restore_points"
}

func (d *restorePointsDataSource) Schema(_ context.Context, _ datasource.SchemaRequest, resp *datasource.SchemaResponse) {
	resp.Schema = schema.Schema{
		MarkdownDescription: "What a repository can restore: images, the windows of time over which every moment can be restored, and gaps.",
		Attributes: map[string]schema.Attribute{
			"repository":          repositoryForData(),
			"repository_settings": repositorySettingsForData(),
			"job":                 schema.StringAttribute{Optional: true, MarkdownDescription: "Only this job."},
			"instance":            schema.StringAttribute{Optional: true, MarkdownDescription: "Only this instance."},
			"after":               schema.StringAttribute{Optional: true, CustomType: timetypes.RFC3339Type{}, MarkdownDescription: "Only what lies at or after this time, RFC 3339."},
			"before":              schema.StringAttribute{Optional: true, CustomType: timetypes.RFC3339Type{}, MarkdownDescription: "Only what lies at or before this time, RFC 3339."},
			"series":              seriesAttribute(),
			"latest":              latestAttribute(),
			"recoverable_from":    computedTime("The earliest moment that any series can restore; null if there is none."),
			"recoverable_to":      computedTime("The latest moment that any series can restore; null if there is none."),
		},
	}
}

func (d *restorePointsDataSource) Read(ctx context.Context, req datasource.ReadRequest, resp *datasource.ReadResponse) {
	diags := &resp.Diagnostics
	var m restorePointsDataModel
	diags.Append(req.Config.Get(ctx, &m)...)
	if diags.HasError() {
		return
	}
	ctx, cancel := context.WithTimeout(ctx, dataTimeout)
	defer cancel()
	m.RepositorySettings = d.settings(ctx, m.Repository, m.RepositorySettings, diags)
	repo := d.openRepository(ctx, m.Repository, m.RepositorySettings, diags)
	if repo == nil {
		return
	}
	listing, err := restore.Catalog(ctx, repo, restore.Filter{
		Job: m.Job.ValueString(), Instance: m.Instance.ValueString(), After: timeOf(m.After), Before: timeOf(m.Before),
	})
	if err != nil {
		diags.AddAttributeError(path.Root("repository"), "Unable to List Restore Points", detail(err))
		return
	}
	m.fromListing(ctx, listing, diags)
	diags.Append(resp.State.Set(ctx, &m)...)
}
