package provider

import (
	"context"

	"github.com/hashicorp/terraform-plugin-framework-validators/int64validator"
	"github.com/hashicorp/terraform-plugin-framework-validators/setvalidator"
	"github.com/hashicorp/terraform-plugin-framework-validators/stringvalidator"
	"github.com/hashicorp/terraform-plugin-framework/datasource"
	"github.com/hashicorp/terraform-plugin-framework/datasource/schema"
	"github.com/hashicorp/terraform-plugin-framework/diag"
	"github.com/hashicorp/terraform-plugin-framework/path"
	"github.com/hashicorp/terraform-plugin-framework/schema/validator"
	"github.com/hashicorp/terraform-plugin-framework/types"

	"github.com/pgark/terraform-provider-pgark/internal/engine/guest"
	"github.com/pgark/terraform-provider-pgark/internal/engine/repository"
	"github.com/pgark/terraform-provider-pgark/internal/provider/validators"
)

// dataSource is what all data sources have in common.
type dataSource struct{ data *providerData }

func (d *dataSource) Configure(_ context.Context, req datasource.ConfigureRequest, resp *datasource.ConfigureResponse) {
	d.data = fromProviderData(req.ProviderData, &resp.Diagnostics)
}

// connectionForData is how a data source reaches a host: the resources' connection attribute.
func connectionForData() schema.SingleNestedAttribute {
	return schema.SingleNestedAttribute{
		Optional:            true,
		MarkdownDescription: "How the host is reached. Default: as a job of this configuration reaches it, else over SSH, as the provider's `ssh` block says.",
		Attributes: map[string]schema.Attribute{
			"type": schema.StringAttribute{
				Optional: true, MarkdownDescription: "`ssh` (default), or `local`: the machine that Terraform runs on, as root.",
				Validators: []validator.String{stringvalidator.OneOf(connectionSSH, connectionLocal)},
			},
			"port":         schema.Int64Attribute{Optional: true, MarkdownDescription: "Port of the SSH server. Default: the provider's.", Validators: []validator.Int64{int64validator.Between(1, 65535)}},
			"user":         schema.StringAttribute{Optional: true, MarkdownDescription: "Account to log in as. Default: the provider's.", Validators: []validator.String{stringvalidator.LengthAtLeast(1)}},
			"host_key":     schema.StringAttribute{Optional: true, MarkdownDescription: "Public key that the host has to show, `ssh-ed25519 AAAA…`.", Validators: []validator.String{validators.String("a public key, as in `ssh-ed25519 AAAA…`", checkHostKey)}},
			"bastion_host": schema.StringAttribute{Optional: true, MarkdownDescription: "Host to jump through. Default: the provider's.", Validators: hostValidators()},
		},
	}
}

func hostForData() schema.StringAttribute {
	return schema.StringAttribute{Required: true, MarkdownDescription: "The guest: a host name or address.", Validators: hostValidators()}
}

// guest reaches the host of a data source; name is that of a job there, if one is known. It is nil after an error, which
// is reported.
func (d *dataSource) guest(ctx context.Context, host types.String, name string, connection types.Object, diags *diag.Diagnostics) guest.Guest {
	r, _ := newReach(connection, types.StringNull()) // a data source is read when all is known
	if connection.IsNull() {
		r = d.data.reachOf(ctx, host.ValueString(), name)
	}
	g, err := d.data.guest(host.ValueString(), r, tryOnce)
	if err != nil {
		diags.AddAttributeError(connectionPath(err), "Unable to Reach "+host.ValueString(), withHint(err))
		return nil
	}
	return g
}

func repositoryForData() schema.StringAttribute {
	return schema.StringAttribute{
		Required: true, Validators: urlValidators(),
		MarkdownDescription: "URL of the repository: `pgark_repository.NAME.url`, or `pgark_repository.NAME.location` where that has a region, endpoint or path style of its own. The provider reads it from where Terraform runs; no guest is asked, and no identity is needed.",
	}
}

func repositorySettingsForData() schema.SingleNestedAttribute {
	return schema.SingleNestedAttribute{
		Optional: true, Computed: true,
		MarkdownDescription: "How the repository is reached. Default: what the `pgark_repository` with this URL says, else the URL's query, else the provider's `s3` block.",
		Attributes: map[string]schema.Attribute{
			"region":         schema.StringAttribute{Optional: true, MarkdownDescription: "Region of the bucket."},
			"endpoint":       schema.StringAttribute{Optional: true, MarkdownDescription: "URL of an S3 compatible service."},
			"use_path_style": schema.BoolAttribute{Optional: true, MarkdownDescription: "Whether the bucket stands in the path rather than in the host name."},
			"storage_class":  schema.StringAttribute{Optional: true, MarkdownDescription: "Storage class of what is stored."},
		},
	}
}

// settings is how the repository of a data source is reached: as configured, else as the provider resolves its URL.
func (d *dataSource) settings(ctx context.Context, url types.String, configured types.Object, diags *diag.Diagnostics) types.Object {
	if !configured.IsNull() && !configured.IsUnknown() {
		return configured
	}
	if url.IsNull() {
		return types.ObjectNull(repositorySettingsTypes)
	}
	return encode(ctx, repositorySettingsTypes, d.data.resolve(url.ValueString()).model(), diags)
}

// openRepository opens the repository of a data source, which is reached as settings says.
func (d *dataSource) openRepository(ctx context.Context, url types.String, settings types.Object, diags *diag.Diagnostics) *repository.Repository {
	s := decode[repositorySettingsModel](ctx, settings, diags).settings()
	repo, err := d.data.openRepository(ctx, url.ValueString(), s, planPatience)
	if err != nil {
		diags.Append(repositoryProblem(path.Root("repository"), "Read", url.ValueString(), err))
		return nil
	}
	return repo
}

func valueStrings(v ...validator.String) validator.Set { return setvalidator.ValueStringsAre(v...) }
