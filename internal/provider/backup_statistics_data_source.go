package provider

import (
	"context"

	"github.com/hashicorp/terraform-plugin-framework-timetypes/timetypes"
	"github.com/hashicorp/terraform-plugin-framework/datasource"
	"github.com/hashicorp/terraform-plugin-framework/datasource/schema"
	"github.com/hashicorp/terraform-plugin-framework/diag"
	"github.com/hashicorp/terraform-plugin-framework/path"
	"github.com/hashicorp/terraform-plugin-framework/schema/validator"
	"github.com/hashicorp/terraform-plugin-framework/types"

	"github.com/pgark/terraform-provider-pgark/internal/engine/session"
	"github.com/pgark/terraform-provider-pgark/internal/provider/validators"
)

type backupStatisticsDataSource struct{ dataSource }

func newBackupStatisticsDataSource() datasource.DataSource { return &backupStatisticsDataSource{} }

var _ datasource.DataSourceWithConfigure = (*backupStatisticsDataSource)(nil)

type backupStatisticsDataModel struct {
	Repository         types.String         `tfsdk:"repository"`
	RepositorySettings types.Object         `tfsdk:"repository_settings"`
	Job                types.String         `tfsdk:"job"`
	Instance           types.String         `tfsdk:"instance"`
	Period             timetypes.GoDuration `tfsdk:"period"`
	Objective          timetypes.GoDuration `tfsdk:"objective"`

	PeriodStartedAt      timetypes.RFC3339 `tfsdk:"period_started_at"`
	PeriodEndedAt        timetypes.RFC3339 `tfsdk:"period_ended_at"`
	ProtectedInstances   types.Int64       `tfsdk:"protected_instances"`
	UnprotectedInstances types.Int64       `tfsdk:"unprotected_instances"`
	SuccessInstances     types.Int64       `tfsdk:"success_instances"`
	WarningInstances     types.Int64       `tfsdk:"warning_instances"`
	ErrorInstances       types.Int64       `tfsdk:"error_instances"`
	Series               types.List        `tfsdk:"series"`
}

func computedFloat64(description string) schema.Float64Attribute {
	return schema.Float64Attribute{Computed: true, MarkdownDescription: description}
}

func computedObject(description string, attributes map[string]schema.Attribute) schema.SingleNestedAttribute {
	return schema.SingleNestedAttribute{Computed: true, MarkdownDescription: description, Attributes: attributes}
}

func sessionAttribute(description string) schema.SingleNestedAttribute {
	return computedObject(description, map[string]schema.Attribute{
		"id":                computedString("Id of the session."),
		"result":            computedString("`success`, `warning` or `error`."),
		"started_at":        computedTime("When it began."),
		"completed_at":      computedTime("When it ended."),
		"duration_seconds":  computedFloat64("How long it took."),
		"error":             computedString("What went wrong; null if nothing did."),
		"source_bytes":      computedInt64("Size of what it was about."),
		"read_bytes":        computedInt64("Bytes read on the guest."),
		"stored_bytes":      computedInt64("Bytes written to the repository."),
		"ratio":             computedFloat64("`source_bytes` to `stored_bytes`; 0 when nothing was stored."),
		"segments":          computedInt64("WAL segments shipped."),
		"max_delay_seconds": computedFloat64("The longest that a segment took from complete to durable."),
		"max_lag_seconds":   computedFloat64("The longest that written WAL was not durable, in continuous mode."),
		"gaps":              computedInt64("Places where WAL was lost."),
	})
}

func statisticsSeriesAttribute() schema.ListNestedAttribute {
	return schema.ListNestedAttribute{
		Computed: true, MarkdownDescription: "Statistics of each series (job, instance and cluster).",
		NestedObject: schema.NestedAttributeObject{Attributes: map[string]schema.Attribute{
			"job":               computedString("Name of the job."),
			"instance":          computedString("Name of the instance."),
			"system_identifier": computedString("System identifier of the cluster, decimal."),
			"current":           schema.BoolAttribute{Computed: true, MarkdownDescription: "Whether it is the instance's newest series; others are of clusters before it."},
			"status":            computedString("The worse of the latest image session and the latest WAL session: `success`, `warning`, `error`, or `none` when none has ended."),
			"images": computedObject("Image sessions; of the period, unless said otherwise.", map[string]schema.Attribute{
				"success_count":            computedInt64("Sessions that succeeded."),
				"warning_count":            computedInt64("Sessions that succeeded, though something failed on the way."),
				"error_count":              computedInt64("Sessions that failed."),
				"average_duration_seconds": computedFloat64("Average duration."),
				"max_duration_seconds":     computedFloat64("Longest duration."),
				"source_bytes":             computedInt64("Size of what the images hold."),
				"read_bytes":               computedInt64("Bytes read from the guest's disks."),
				"stored_bytes":             computedInt64("Bytes written to the repository."),
				"ratio":                    computedFloat64("`source_bytes` to `stored_bytes`; 0 when nothing was stored."),
				"last_session":             sessionAttribute("The latest that has ended, in the period or before it; null if none has."),
				"last_success_at":          computedTime("When one last succeeded."),
				"last_failure_at":          computedTime("When one last failed."),
				"last_error":               computedString("Why it failed."),
				"consecutive_failures":     computedInt64("How many have failed since one succeeded."),
				"running_since":            computedTime("When the running one began; null if none runs."),
			}),
			"wal": computedObject("WAL shipping; of the period, unless said otherwise.", map[string]schema.Attribute{
				"segments":                 computedInt64("Segments stored."),
				"source_bytes":             computedInt64("Size of the segments."),
				"stored_bytes":             computedInt64("Bytes written to the repository."),
				"ratio":                    computedFloat64("`source_bytes` to `stored_bytes`; 0 when nothing was stored."),
				"success_count":            computedInt64("Sessions that succeeded."),
				"warning_count":            computedInt64("Sessions in which something had to be tried again."),
				"error_count":              computedInt64("Sessions that failed."),
				"average_duration_seconds": computedFloat64("Average duration of a session."),
				"max_duration_seconds":     computedFloat64("Longest duration of a session."),
				"average_source_bytes":     computedInt64("Average size of a session."),
				"max_source_bytes":         computedInt64("Largest size of a session."),
				"failures":                 computedInt64("Attempts that were made again."),
				"objective_seconds":        computedFloat64("How long WAL may take from complete to durable."),
				"sla_percent":              computedFloat64("Share of sessions that met the objective; null when none has ended."),
				"misses":                   computedInt64("Sessions that did not meet it."),
				"max_delay_seconds":        computedFloat64("The longest that a segment took from complete to durable."),
				"max_lag_seconds":          computedFloat64("The longest that written WAL was not durable, in continuous mode."),
				"late_seconds":             computedFloat64("How long it lagged by more than `max_lag`, in all, in continuous mode."),
				"within_percent":           computedFloat64("Share of the time in which it did not; null when there was no session in continuous mode."),
				"tails":                    computedInt64("Parts of segments stored before the segment was whole."),
				"tail_bytes":               computedInt64("Bytes written to the repository for them."),
				"spooled":                  computedInt64("Files that waited in the temporary folder."),
				"gaps":                     computedInt64("Places where WAL was lost."),
				"last_stored_at":           computedTime("When the newest segment was stored."),
				"last_segment":             computedString("Its name."),
				"timeline":                 computedInt64("Its timeline."),
				"lag_seconds":              computedFloat64("Seconds since then; null when nothing is stored."),
				"last_commit_at":           computedTime("The last commit known in it."),
				"last_session":             sessionAttribute("The latest session that has ended; null if none has."),
				"last_failure_at":          computedTime("When one last failed."),
				"last_error":               computedString("Why it failed."),
			}),
			"restore_points": computedObject("The images that are there now.", map[string]schema.Attribute{
				"count":        computedInt64("How many."),
				"oldest_at":    computedTime("When the oldest was completed."),
				"newest_at":    computedTime("When the newest was completed."),
				"stored_bytes": computedInt64("Bytes uploaded for them."),
			}),
		}},
	}
}

func (d *backupStatisticsDataSource) Metadata(_ context.Context, req datasource.MetadataRequest, resp *datasource.MetadataResponse) {
	resp.TypeName = req.ProviderTypeName + "_backup_statistics"
}

func (d *backupStatisticsDataSource) Schema(_ context.Context, _ datasource.SchemaRequest, resp *datasource.SchemaResponse) {
	positive := validators.String("a positive Go duration, as in `24h`", checkPositiveDuration)
	resp.Schema = schema.Schema{
		MarkdownDescription: "How protection fared over a period, how it stands now, and what it cost, from the session records in the repository. " +
			"Made for `check` blocks, for example on `lag_seconds` or `consecutive_failures`.",
		Attributes: map[string]schema.Attribute{
			"repository":            repositoryForData(),
			"repository_settings":   repositorySettingsForData(),
			"job":                   schema.StringAttribute{Optional: true, MarkdownDescription: "Only this job."},
			"instance":              schema.StringAttribute{Optional: true, MarkdownDescription: "Only this instance."},
			"period":                schema.StringAttribute{Optional: true, CustomType: timetypes.GoDurationType{}, MarkdownDescription: "Length of the period that ends now, as a Go duration. Default: `24h`.", Validators: []validator.String{positive}},
			"objective":             schema.StringAttribute{Optional: true, CustomType: timetypes.GoDurationType{}, MarkdownDescription: "How long WAL may take from complete to durable, as a Go duration. Default: `15m`.", Validators: []validator.String{positive}},
			"period_started_at":     computedTime("Begin of the period."),
			"period_ended_at":       computedTime("End of the period."),
			"protected_instances":   computedInt64("Instances whose latest image is there."),
			"unprotected_instances": computedInt64("Instances whose latest image failed, or that have none."),
			"success_instances":     computedInt64("Instances whose status is `success`."),
			"warning_instances":     computedInt64("Instances whose status is `warning`."),
			"error_instances":       computedInt64("Instances whose status is `error`."),
			"series":                statisticsSeriesAttribute(),
		},
	}
}

// fromStatistics takes over what the session records say.
func (m *backupStatisticsDataModel) fromStatistics(ctx context.Context, s *session.Statistics, diags *diag.Diagnostics) {
	m.PeriodStartedAt, m.PeriodEndedAt = moment(s.PeriodStartedAt), moment(s.PeriodEndedAt)
	m.ProtectedInstances = types.Int64Value(int64(s.ProtectedInstances))
	m.UnprotectedInstances = types.Int64Value(int64(s.UnprotectedInstances))
	m.SuccessInstances = types.Int64Value(int64(s.SuccessInstances))
	m.WarningInstances = types.Int64Value(int64(s.WarningInstances))
	m.ErrorInstances = types.Int64Value(int64(s.ErrorInstances))
	m.Series = fromJSON[types.List](ctx, statisticsSeriesAttribute().GetType(), s.Series, diags)
}

func (d *backupStatisticsDataSource) Read(ctx context.Context, req datasource.ReadRequest, resp *datasource.ReadResponse) {
	diags := &resp.Diagnostics
	var m backupStatisticsDataModel
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
	ids, err := repo.SeriesList(ctx, m.Job.ValueString(), m.Instance.ValueString())
	var statistics *session.Statistics
	if err == nil {
		statistics, err = session.Collect(ctx, repo, ids, session.Options{Period: duration(m.Period), MaxDelay: duration(m.Objective)})
	}
	if err != nil {
		diags.AddAttributeError(path.Root("repository"), "Unable to Read Backup Statistics", detail(err))
		return
	}
	m.fromStatistics(ctx, statistics, diags)
	diags.Append(resp.State.Set(ctx, &m)...)
}
