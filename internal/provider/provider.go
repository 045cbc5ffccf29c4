// Package provider is the Terraform side of pgark: schemas, models, diagnostics. It translates between what a user
// declares and what the engine (internal/engine) does, and holds no backup logic of its own.
//
// # Rules that every resource keeps
//
// Identity is set first in every call: Terraform refuses a state without it, also where the object turns out to be gone.
// "Could not look" is never "gone": a resource leaves the state only after its guest or repository was read successfully.
// Create saves the state before its first change, so that what was half made is known. A prerequisite that is not met is
// an error only when the object is about to be created: an error for one that exists would block terraform destroy.
//
// # What one process knows
//
// Terraform starts a provider process for the plan and another for the apply. Each has its own providerData: where the
// repositories of this configuration are (filled by pgark_repository, used by all that name a repository by its URL), how
// its hosts are reached, the connections to them, and the prerequisite checks already made. Nothing is connected before the
// first call that needs it; all who reach a host in the same way share one connection.
//
// Both processes plan every change, and have to come to the same answer. But the process of an apply hears of what
// changes only: a repository or a job that stays as it is is not even planned there. So nothing that a plan decides may
// rest on such a resource alone; backupJobResource.planRepository says how that is kept for repositories. How a host is
// reached stands in the state of each resource on it. What a refresh saw on a guest beyond the attributes stands in the
// private state (remembered): a plan compares with that and asks nobody.
//
// # Guests that cannot be read
//
// A guest that cannot be read leaves the state as it was, with an error or, if the provider says so, a warning. A wrong host
// key is special: Read does not see the configuration, where the key of a host that was set up anew may have been declared.
// So it notes the failure, and ModifyPlan makes an error of it, unless the plan changes the connection
// (operation.couldNotRead, planUnread).
package provider

import (
	"context"
	"os"

	"github.com/hashicorp/terraform-plugin-framework-validators/stringvalidator"
	"github.com/hashicorp/terraform-plugin-framework/datasource"
	"github.com/hashicorp/terraform-plugin-framework/path"
	"github.com/hashicorp/terraform-plugin-framework/provider"
	"github.com/hashicorp/terraform-plugin-framework/provider/schema"
	"github.com/hashicorp/terraform-plugin-framework/providerserver"
	"github.com/hashicorp/terraform-plugin-framework/resource"
	"github.com/hashicorp/terraform-plugin-framework/schema/validator"
	"github.com/hashicorp/terraform-plugin-framework/types"
	"github.com/hashicorp/terraform-plugin-go/tfprotov6"

	"github.com/pgark/terraform-provider-pgark/internal/engine/objectstore"
	"github.com/pgark/terraform-provider-pgark/internal/provider/wirename"
)

// NewServer returns a constructor of provider servers, in the form that plugin servers ask for.
func NewServer(version string) func() tfprotov6.ProviderServer {
	return serve(&pgarkProvider{version: version, world: theWorld()})
}

// serve puts the translation of names before the framework's server.
func serve(p provider.Provider) func() tfprotov6.ProviderServer {
	return wirename.Wrap(providerserver.NewProtocol6(p), connectionName, "connection")
}

// connectionName is what the schemas here call the attribute that users know as "connection": the framework reserves that
// name (package wirename).
const connectionName = "host_connection"

type pgarkProvider struct {
	version string
	world   world
}

var (
	_ provider.Provider                   = (*pgarkProvider)(nil)
	_ provider.ProviderWithValidateConfig = (*pgarkProvider)(nil)
)

func (p *pgarkProvider) Metadata(_ context.Context, _ provider.MetadataRequest, resp *provider.MetadataResponse) {
	resp.TypeName = "pgark"
	resp.Version = p.version
}

// providerModel is the provider block.
type providerModel struct {
	SSH                types.Object `tfsdk:"ssh"`
	S3                 types.Object `tfsdk:"s3"`
	PrerequisiteChecks types.String `tfsdk:"prerequisite_checks"`
	OnUnreachable      types.String `tfsdk:"on_unreachable"`
}

type s3Model struct {
	Region          types.String `tfsdk:"region"`
	Endpoint        types.String `tfsdk:"endpoint"`
	UsePathStyle    types.Bool   `tfsdk:"use_path_style"`
	AccessKeyID     types.String `tfsdk:"access_key_id"`
	SecretAccessKey types.String `tfsdk:"secret_access_key"`
	SessionToken    types.String `tfsdk:"session_token"`
	Profile         types.String `tfsdk:"profile"`
}

func (p *pgarkProvider) Schema(_ context.Context, _ provider.SchemaRequest, resp *provider.SchemaResponse) {
	optional := func(description string, v ...validator.String) schema.StringAttribute {
		return schema.StringAttribute{Optional: true, MarkdownDescription: description, Validators: v}
	}

	resp.Schema = schema.Schema{
		MarkdownDescription: "pgark protects PostgreSQL servers on Linux guests: scheduled image backups and continuous WAL shipping to S3, from which any moment can be restored.",
		Attributes: map[string]schema.Attribute{
			"ssh": sshAttribute(),
			"s3": schema.SingleNestedAttribute{
				Optional: true,
				MarkdownDescription: "How S3 is reached, by this process and, unless a job says otherwise, by its guest. " +
					"What is left out comes from the AWS environment (`AWS_*` variables, shared files, instance profile). Nothing of it enters the state, except where a repository is: region and endpoint.",
				Attributes: map[string]schema.Attribute{
					"region":            optional("Region of buckets. Default: `AWS_REGION`, else `us-east-1`."),
					"endpoint":          optional("URL of an S3 compatible service. Default: `AWS_ENDPOINT_URL_S3` or `AWS_ENDPOINT_URL`, else AWS."),
					"use_path_style":    schema.BoolAttribute{Optional: true, MarkdownDescription: "Whether the bucket stands in the path rather than in the host name; most S3 compatible services want it. Default: `false`."},
					"access_key_id":     optional("Access key.", stringvalidator.AlsoRequires(path.MatchRelative().AtParent().AtName("secret_access_key")), stringvalidator.ConflictsWith(path.MatchRelative().AtParent().AtName("profile"))),
					"secret_access_key": schema.StringAttribute{Optional: true, Sensitive: true, MarkdownDescription: "Secret of the access key. May be ephemeral.", Validators: []validator.String{stringvalidator.AlsoRequires(path.MatchRelative().AtParent().AtName("access_key_id"))}},
					"session_token":     schema.StringAttribute{Optional: true, Sensitive: true, MarkdownDescription: "Session token of temporary keys.", Validators: []validator.String{stringvalidator.AlsoRequires(path.MatchRelative().AtParent().AtName("access_key_id"))}},
					"profile":           optional("Profile of the AWS shared files."),
				},
			},
			"prerequisite_checks": optional("What a prerequisite that a guest does not meet is, when a job is about to be created: an `error` (default), a warning (`warn`), or not looked for (`off`). For a job that exists it is never more than a warning.",
				stringvalidator.OneOf(checksError, checksWarn, checksOff)),
			"on_unreachable": optional("What it is when a guest or a repository cannot be asked during refresh: an `error` (default), or a warning after which the last known state is used (`warn`).",
				stringvalidator.OneOf(unreachableError, unreachableWarn)),
		},
	}
}

// ValidateConfig looks at what no single attribute can tell.
func (p *pgarkProvider) ValidateConfig(ctx context.Context, req provider.ValidateConfigRequest, resp *provider.ValidateConfigResponse) {
	var m providerModel
	resp.Diagnostics.Append(req.Config.Get(ctx, &m)...)
	if resp.Diagnostics.HasError() || m.SSH.IsUnknown() {
		return
	}
	// The environment of an apply may be another than that of a validation, which finds fault with the block alone.
	anything := func(string) string { return "set" }
	resp.Diagnostics.Append(checkSSH(decode[sshModel](ctx, m.SSH, &resp.Diagnostics), anything)...)
}

func (p *pgarkProvider) Configure(ctx context.Context, req provider.ConfigureRequest, resp *provider.ConfigureResponse) {
	var m providerModel
	resp.Diagnostics.Append(req.Config.Get(ctx, &m)...)
	if resp.Diagnostics.HasError() {
		return
	}
	s3 := decode[s3Model](ctx, m.S3, &resp.Diagnostics)
	block := decode[sshModel](ctx, m.SSH, &resp.Diagnostics)
	resp.Diagnostics.Append(checkSSH(block, os.Getenv)...)
	ssh := sshFrom(block, os.Getenv, &resp.Diagnostics)
	if resp.Diagnostics.HasError() {
		return
	}

	d := newProviderData(p.world)
	d.ssh = ssh
	d.ssh.unknown = !fullyKnown(ctx, m.SSH)
	if !d.ssh.keepsKeys() {
		resp.Diagnostics.Append(insecureHostKeys())
	}
	if v := m.PrerequisiteChecks.ValueString(); v != "" {
		d.checks = v
	}
	if v := m.OnUnreachable.ValueString(); v != "" {
		d.onUnreachable = v
	}
	d.s3 = s3Defaults{
		location: repositorySettings{
			region:       firstOf(s3.Region.ValueString(), os.Getenv("AWS_REGION"), os.Getenv("AWS_DEFAULT_REGION")),
			endpoint:     firstOf(s3.Endpoint.ValueString(), os.Getenv("AWS_ENDPOINT_URL_S3"), os.Getenv("AWS_ENDPOINT_URL")),
			usePathStyle: s3.UsePathStyle.ValueBool(),
		},
		profile: s3.Profile.ValueString(),
		unknown: !fullyKnown(ctx, m.S3),
	}
	if id := s3.AccessKeyID.ValueString(); id != "" {
		d.s3.credentials = &objectstore.Credentials{
			AccessKeyID:     id,
			SecretAccessKey: s3.SecretAccessKey.ValueString(),
			SessionToken:    s3.SessionToken.ValueString(),
		}
	}

	resp.ResourceData = d
	resp.DataSourceData = d
	resp.EphemeralResourceData = d
	resp.ActionData = d
	resp.ListResourceData = d
}

// fullyKnown reports whether nothing of a block is unknown. Values that come from resources not created yet are unknown
// during plan. That is no error: what needs them is looked at when they are known, in the apply.
func fullyKnown(ctx context.Context, block types.Object) bool {
	raw, err := block.ToTerraformValue(ctx)
	return err == nil && raw.IsFullyKnown()
}

func firstOf(values ...string) string {
	for _, v := range values {
		if v != "" {
			return v
		}
	}
	return ""
}

func (p *pgarkProvider) Resources(context.Context) []func() resource.Resource {
	return []func() resource.Resource{
		newRepositoryResource,
		newBackupJobResource,
		newWALRetentionResource,
	}
}

func (p *pgarkProvider) DataSources(context.Context) []func() datasource.DataSource {
	return []func() datasource.DataSource{
		newRestorePointsDataSource,
		newBackupStatisticsDataSource,
		newInstancesDataSource,
		newPrerequisitesDataSource,
	}
}
