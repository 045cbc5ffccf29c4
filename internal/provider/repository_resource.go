package provider

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/hashicorp/terraform-plugin-framework-timeouts/resource/timeouts"
	"github.com/hashicorp/terraform-plugin-framework-validators/int64validator"
	"github.com/hashicorp/terraform-plugin-framework-validators/setvalidator"
	"github.com/hashicorp/terraform-plugin-framework-validators/stringvalidator"
	"github.com/hashicorp/terraform-plugin-framework/attr"
	"github.com/hashicorp/terraform-plugin-framework/diag"
	"github.com/hashicorp/terraform-plugin-framework/path"
	"github.com/hashicorp/terraform-plugin-framework/resource"
	"github.com/hashicorp/terraform-plugin-framework/resource/identityschema"
	"github.com/hashicorp/terraform-plugin-framework/resource/schema"
	"github.com/hashicorp/terraform-plugin-framework/resource/schema/planmodifier"
	"github.com/hashicorp/terraform-plugin-framework/resource/schema/stringplanmodifier"
	"github.com/hashicorp/terraform-plugin-framework/schema/validator"
	"github.com/hashicorp/terraform-plugin-framework/types"

	"filippo.io/age"

	"github.com/pgark/terraform-provider-pgark/internal/engine/objectstore"
	"github.com/pgark/terraform-provider-pgark/internal/engine/repository"
	"github.com/pgark/terraform-provider-pgark/internal/provider/validators"
)

// How long one request to a repository may be retried: little where somebody waits for a plan.
const (
	planPatience  = 10 * time.Second // for one request; also of a refresh
	applyPatience = time.Minute
)

type repositoryResource struct{ data *providerData }

func newRepositoryResource() resource.Resource { return &repositoryResource{} }

var (
	_ resource.ResourceWithConfigure      = (*repositoryResource)(nil)
	_ resource.ResourceWithIdentity       = (*repositoryResource)(nil)
	_ resource.ResourceWithImportState    = (*repositoryResource)(nil)
	_ resource.ResourceWithModifyPlan     = (*repositoryResource)(nil)
	_ resource.ResourceWithValidateConfig = (*repositoryResource)(nil)
)

// repositoryModel is pgark_repository.
type repositoryModel struct {
	URL           types.String   `tfsdk:"url"`
	Region        types.String   `tfsdk:"region"`
	Endpoint      types.String   `tfsdk:"endpoint"`
	UsePathStyle  types.Bool     `tfsdk:"use_path_style"`
	StorageClass  types.String   `tfsdk:"storage_class"`
	Encryption    types.Object   `tfsdk:"encryption"`
	ObjectLock    types.Object   `tfsdk:"object_lock"`
	ID            types.String   `tfsdk:"id"`
	Location      types.String   `tfsdk:"location"`
	FormatVersion types.Int64    `tfsdk:"format_version"`
	Capabilities  types.Object   `tfsdk:"capabilities"`
	Timeouts      timeouts.Value `tfsdk:"timeouts"`
}

type encryptionModel struct {
	Recipients types.Set `tfsdk:"recipients"`
}

type capabilitiesModel struct {
	CreateIfAbsent types.Bool `tfsdk:"create_if_absent"`
	RangedGet      types.Bool `tfsdk:"ranged_get"`
	ListAfterPut   types.Bool `tfsdk:"list_after_put"`
	Delete         types.Bool `tfsdk:"delete"`
}

var (
	encryptionTypes   = map[string]attr.Type{"recipients": types.SetType{ElemType: types.StringType}}
	capabilitiesTypes = map[string]attr.Type{
		"create_if_absent": types.BoolType, "ranged_get": types.BoolType, "list_after_put": types.BoolType, "delete": types.BoolType,
	}
)

// recipients of the model, sorted; none when it is not encrypted.
func (m repositoryModel) recipients(ctx context.Context, diags *diag.Diagnostics) []string {
	e := decode[encryptionModel](ctx, m.Encryption, diags)
	return slices.Sorted(slices.Values(stringsOf(ctx, e.Recipients, diags)))
}

// settings is where the repository is, with the provider's defaults filled in.
func (m repositoryModel) settings(d *providerData) repositorySettings {
	_, query := locationQuery(m.URL.ValueString())
	s := repositorySettings{
		region:       firstOf(m.Region.ValueString(), query.region),
		endpoint:     firstOf(m.Endpoint.ValueString(), query.endpoint),
		storageClass: firstOf(m.StorageClass.ValueString(), query.storageClass),
		usePathStyle: m.UsePathStyle.ValueBool() || query.usePathStyle,
	}
	if isFile(m.URL.ValueString()) {
		return s
	}
	usePathStyle := s.usePathStyle
	s = d.fill(s)
	if !m.UsePathStyle.IsNull() {
		s.usePathStyle = usePathStyle // an explicit false stands against the provider's true
	}
	return s
}

func isFile(url string) bool { return len(url) >= 7 && url[:7] == "file://" }

// fromDescription takes over what the repository says of itself.
func (m *repositoryModel) fromDescription(ctx context.Context, d repository.Description, diags *diag.Diagnostics) {
	m.ID = types.StringValue(d.ID)
	m.FormatVersion = types.Int64Value(int64(d.Format))
	m.Capabilities = encode(ctx, capabilitiesTypes, capabilitiesModel{
		CreateIfAbsent: types.BoolValue(d.Capabilities.CreateIfAbsent),
		RangedGet:      types.BoolValue(d.Capabilities.RangedGet),
		ListAfterPut:   types.BoolValue(d.Capabilities.ListAfterPut),
		Delete:         types.BoolValue(d.Capabilities.Delete),
	}, diags)
	if !slices.Equal(m.recipients(ctx, diags), slices.Sorted(slices.Values(d.Recipients))) {
		m.Encryption = types.ObjectNull(encryptionTypes)
		if len(d.Recipients) > 0 {
			m.Encryption = encode(ctx, encryptionTypes, encryptionModel{setOf(ctx, d.Recipients, diags)}, diags)
		}
	}
}

func (r *repositoryResource) Metadata(_ context.Context, req resource.MetadataRequest, resp *resource.MetadataResponse) {
	resp.TypeName = req.ProviderTypeName + "_repository"
}

func (r *repositoryResource) Configure(_ context.Context, req resource.ConfigureRequest, resp *resource.ConfigureResponse) {
	r.data = fromProviderData(req.ProviderData, &resp.Diagnostics)
}

func (r *repositoryResource) IdentitySchema(_ context.Context, _ resource.IdentitySchemaRequest, resp *resource.IdentitySchemaResponse) {
	resp.IdentitySchema = identityschema.Schema{Attributes: map[string]identityschema.Attribute{
		"url": identityschema.StringAttribute{RequiredForImport: true, Description: "URL of the repository."},
	}}
}

// urlAttribute is where a repository is, as every resource and data source takes it.
func urlValidators() []validator.String {
	return []validator.String{validators.String("`s3://bucket/prefix` or `file:///absolute/path`", checkLocation)}
}

func (r *repositoryResource) Schema(ctx context.Context, _ resource.SchemaRequest, resp *resource.SchemaResponse) {
	notEmpty := stringvalidator.LengthAtLeast(1)
	resp.Schema = schema.Schema{
		MarkdownDescription: "A repository: an S3 bucket and prefix, or a directory, that holds the backups of any number of jobs. Creating it probes what the store can do, and refuses one " +
			"without atomic create-if-absent; a repository that is already there is taken over. **Destroying it leaves its data alone.**",
		Attributes: map[string]schema.Attribute{
			"url": schema.StringAttribute{
				Required:            true,
				MarkdownDescription: "Where the repository is: `s3://bucket/prefix`, or `file:///absolute/path` for a directory (NFS, trying it out). The bucket or directory has to exist.",
				PlanModifiers:       []planmodifier.String{stringplanmodifier.RequiresReplace()},
				Validators:          urlValidators(),
			},
			"region":         schema.StringAttribute{Optional: true, MarkdownDescription: "Region of the bucket. Default: the provider's.", Validators: []validator.String{notEmpty}},
			"endpoint":       schema.StringAttribute{Optional: true, MarkdownDescription: "URL of an S3 compatible service. Default: the provider's, else AWS.", Validators: []validator.String{notEmpty}},
			"use_path_style": schema.BoolAttribute{Optional: true, MarkdownDescription: "Whether the bucket stands in the path rather than in the host name; most S3 compatible services want it. Default: the provider's."},
			"storage_class":  schema.StringAttribute{Optional: true, MarkdownDescription: "Storage class of what is stored from now on. Default: the bucket's.", Validators: []validator.String{notEmpty}},
			"encryption": schema.SingleNestedAttribute{
				Optional: true,
				MarkdownDescription: "Encryption to [age](https://age-encryption.org) recipients: guests can back up without being able to read what they backed up before. " +
					"It is decided when the repository is created and cannot be changed afterwards. Without it backups are not encrypted by pgark.",
				Attributes: map[string]schema.Attribute{
					"recipients": schema.SetAttribute{
						Required: true, ElementType: types.StringType,
						MarkdownDescription: "Public keys, `age1…`. Whoever has one of their identities can restore. Losing all of them loses the backups.",
						Validators: []validator.Set{setvalidator.SizeAtLeast(1), setvalidator.ValueStringsAre(
							validators.String("a public age key, `age1…`", checkRecipient))},
					},
				},
			},
			"object_lock": schema.SingleNestedAttribute{
				Optional:            true,
				MarkdownDescription: "Retention that the store itself enforces (S3 Object Lock). **Not in this build.**",
				Attributes: map[string]schema.Attribute{
					"mode": schema.StringAttribute{Required: true, MarkdownDescription: "`governance` or `compliance`.", Validators: []validator.String{stringvalidator.OneOf("governance", "compliance")}},
					"days": schema.Int64Attribute{Required: true, MarkdownDescription: "For how many days an object cannot be deleted.", Validators: []validator.Int64{int64validator.AtLeast(1)}},
				},
			},
			"id": schema.StringAttribute{
				Computed: true, MarkdownDescription: "Random id of the repository, made when it is created.",
				PlanModifiers: []planmodifier.String{stringplanmodifier.UseStateForUnknown()},
			},
			"location":       computedLocation(),
			"format_version": schema.Int64Attribute{Computed: true, MarkdownDescription: "Version of the repository's format."},
			"capabilities": schema.SingleNestedAttribute{
				Computed: true, MarkdownDescription: "What the store was found to do when the repository was created.",
				Attributes: map[string]schema.Attribute{
					"create_if_absent": schema.BoolAttribute{Computed: true, MarkdownDescription: "Of many writers of one name, exactly one wins."},
					"ranged_get":       schema.BoolAttribute{Computed: true, MarkdownDescription: "Parts of an object can be read."},
					"list_after_put":   schema.BoolAttribute{Computed: true, MarkdownDescription: "A listing shows what was just stored."},
					"delete":           schema.BoolAttribute{Computed: true, MarkdownDescription: "Objects can be deleted; false in an append-only bucket."},
				},
			},
			"timeouts": timeouts.Attributes(ctx, timeouts.Opts{Create: true, Read: true, Update: true,
				CreateDescription: "Limit for creating, as a Go duration. Default: `5m`.",
				ReadDescription:   "Limit for reading, as a Go duration. Default: `1m`.",
				UpdateDescription: "Limit for updating, as a Go duration. Default: `5m`."}),
		},
	}
}

func computedLocation() schema.StringAttribute {
	return schema.StringAttribute{
		Computed: true,
		MarkdownDescription: "`url`, and how it is reached, as one text: `s3://bucket/prefix?endpoint=…&path_style=true&region=…`. " +
			"To be referred to instead of `url` where the repository is reached in another way than the provider's `s3` block says.",
	}
}

func checkRecipient(s string) error {
	if _, err := age.ParseX25519Recipient(s); err != nil {
		if _, hybrid := age.ParseHybridRecipient(s); hybrid != nil {
			return fmt.Errorf("%q is not a public age key", s)
		}
	}
	return nil
}

func (r *repositoryResource) ValidateConfig(ctx context.Context, req resource.ValidateConfigRequest, resp *resource.ValidateConfigResponse) {
	var m repositoryModel
	resp.Diagnostics.Append(req.Config.Get(ctx, &m)...)
	if resp.Diagnostics.HasError() {
		return
	}
	if !m.ObjectLock.IsNull() {
		resp.Diagnostics.Append(notInThisBuild(path.Root("object_lock"), "object_lock",
			"A default retention on the bucket itself works: pgark never overwrites an object, and reports what it is not allowed to delete."))
	}
	if isFile(m.URL.ValueString()) {
		for _, a := range []struct {
			name  string
			value attr.Value
		}{{"region", m.Region}, {"endpoint", m.Endpoint}, {"use_path_style", m.UsePathStyle}, {"storage_class", m.StorageClass}} {
			if !a.value.IsNull() {
				resp.Diagnostics.AddAttributeError(path.Root(a.name), "Invalid Combination", a.name+" is for s3:// repositories only.")
			}
		}
	}
}

func (r *repositoryResource) ModifyPlan(ctx context.Context, req resource.ModifyPlanRequest, resp *resource.ModifyPlanResponse) {
	if req.Plan.Raw.IsNull() || r.data == nil {
		return
	}
	var m, state repositoryModel
	resp.Diagnostics.Append(req.Plan.Get(ctx, &m)...)
	create := req.State.Raw.IsNull()
	if !create {
		resp.Diagnostics.Append(req.State.Get(ctx, &state)...)
	}
	if resp.Diagnostics.HasError() || m.URL.IsUnknown() {
		return
	}
	m.Location = types.StringUnknown()
	known := !m.Region.IsUnknown() && !m.Endpoint.IsUnknown() && !m.UsePathStyle.IsUnknown() && !m.StorageClass.IsUnknown() && !r.data.s3.unknown
	if known {
		m.Location = types.StringValue(withSettings(m.URL.ValueString(), m.settings(r.data)))
	}
	if !create {
		// The repository itself does not change: what it is was decided when it was created.
		m.ID, m.FormatVersion, m.Capabilities = state.ID, state.FormatVersion, state.Capabilities
	}
	resp.Diagnostics.Append(resp.Plan.Set(ctx, &m)...)
	if known {
		r.data.rememberRepository(m.URL.ValueString(), knownRepository{
			settings: m.settings(r.data), toCreate: create, changes: create || !resp.Plan.Raw.Equal(req.State.Raw),
		})
	}
	if create {
		if known && r.data.checks != checksOff {
			resp.Diagnostics.Append(r.look(ctx, m)...)
		}
		return
	}
	if !m.Encryption.IsUnknown() && !m.Encryption.Equal(state.Encryption) {
		resp.Diagnostics.Append(asWarning(recipientsFixed(m.URL.ValueString())))
	}
}

// look asks the store before the plan is approved. Only refused keys are an error by then: the bucket may be created in
// the same run.
func (r *repositoryResource) look(ctx context.Context, m repositoryModel) diag.Diagnostics {
	var diags diag.Diagnostics
	ctx, cancel := context.WithTimeout(ctx, 2*planPatience)
	defer cancel()
	_, err := r.data.openRepository(ctx, m.URL.ValueString(), m.settings(r.data), planPatience)
	switch {
	case err == nil, errors.Is(err, repository.ErrNoRepository):
	case errors.Is(err, objectstore.ErrAccess) && r.data.checks == checksError:
		diags.Append(repositoryProblem(path.Root("url"), "Reach", m.URL.ValueString(), err))
	default:
		diags.Append(asWarning(repositoryProblem(path.Root("url"), "Reach", m.URL.ValueString(), err)))
	}
	return diags
}

func recipientsFixed(url string) diag.Diagnostic {
	return diag.NewAttributeErrorDiagnostic(path.Root("encryption"), "Recipients of a Repository Are Fixed",
		fmt.Sprintf("The recipients of %s were decided when it was created, and this build cannot change them. "+
			"To encrypt to others, create a repository at another URL and let jobs write there; what is here stays restorable.", url))
}

func (r *repositoryResource) setIdentity(ctx context.Context, identity interface {
	SetAttribute(context.Context, path.Path, any) diag.Diagnostics
}, url types.String) diag.Diagnostics {
	return identity.SetAttribute(ctx, path.Root("url"), url)
}

func (r *repositoryResource) Create(ctx context.Context, req resource.CreateRequest, resp *resource.CreateResponse) {
	var m repositoryModel
	resp.Diagnostics.Append(req.Plan.Get(ctx, &m)...)
	resp.Diagnostics.Append(r.setIdentity(ctx, resp.Identity, m.URL)...)
	timeout, d := m.Timeouts.Create(ctx, 5*time.Minute)
	resp.Diagnostics.Append(d...)
	if resp.Diagnostics.HasError() {
		return
	}
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()

	// Creating is one object, created if absent: there is no half of it that a state saved early could tell of.
	url, settings := m.URL.ValueString(), m.settings(r.data)
	store, err := r.data.open(ctx, url, settings, applyPatience)
	if err != nil {
		resp.Diagnostics.Append(repositoryProblem(path.Root("url"), "Create", url, err))
		return
	}
	repo, created, err := repository.Create(ctx, store, m.recipients(ctx, &resp.Diagnostics))
	if err != nil {
		if mismatch, ok := errors.AsType[*repository.MismatchError](err); ok {
			resp.Diagnostics.AddAttributeError(path.Root("encryption"), fmt.Sprintf("Repository %q Is Another", url),
				sentence(mismatch.Error())+"\n\nRecipients are decided when a repository is created. Declare those that it has, or use another URL.")
			return
		}
		resp.Diagnostics.Append(repositoryProblem(path.Root("url"), "Create", url, err))
		return
	}
	r.data.rememberRepository(url, knownRepository{settings: settings, changes: true})
	m.Location = types.StringValue(withSettings(url, settings))
	m.fromDescription(ctx, repo.Description(), &resp.Diagnostics)
	if created && len(repo.Description().Recipients) == 0 {
		resp.Diagnostics.AddAttributeWarning(path.Root("url"), "Repository Is Not Encrypted",
			fmt.Sprintf("Whoever can read %s can read the databases in it. To encrypt, create a repository at another URL with encryption = { recipients = [\"age1…\"] }: "+
				"recipients cannot be added later. This is said once.", url))
	}
	resp.Diagnostics.Append(resp.State.Set(ctx, &m)...)
}

func (r *repositoryResource) Read(ctx context.Context, req resource.ReadRequest, resp *resource.ReadResponse) {
	var m repositoryModel
	resp.Diagnostics.Append(req.State.Get(ctx, &m)...)
	resp.Diagnostics.Append(r.setIdentity(ctx, resp.Identity, m.URL)...)
	timeout, d := m.Timeouts.Read(ctx, time.Minute)
	resp.Diagnostics.Append(d...)
	if resp.Diagnostics.HasError() {
		return
	}
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()

	url, settings := m.URL.ValueString(), m.settings(r.data)
	r.data.rememberRepository(url, knownRepository{settings: settings})
	repo, err := r.data.openRepository(ctx, url, settings, planPatience)
	switch {
	case errors.Is(err, repository.ErrNoRepository):
		resp.Diagnostics.AddAttributeWarning(path.Root("url"), fmt.Sprintf("Repository %q Is Gone", url),
			"The store was read, and holds no repository.json. It is planned to be created anew; backups that are still there stay readable under the old repository only.")
		resp.State.RemoveResource(ctx)
		return
	case err != nil && r.data.onUnreachable == unreachableWarn:
		resp.Diagnostics.Append(asWarning(repositoryProblem(path.Root("url"), "Read", url, err)))
		return
	case err != nil:
		resp.Diagnostics.Append(repositoryProblem(path.Root("url"), "Read", url, err))
		return
	}
	if id := repo.Description().ID; !m.ID.IsNull() && m.ID.ValueString() != id {
		resp.Diagnostics.AddAttributeWarning(path.Root("url"), fmt.Sprintf("Repository %q Was Replaced", url),
			fmt.Sprintf("The state knows the repository %s, the store holds %s.", m.ID.ValueString(), id))
	}
	m.Location = types.StringValue(withSettings(url, settings))
	m.fromDescription(ctx, repo.Description(), &resp.Diagnostics)
	resp.Diagnostics.Append(resp.State.Set(ctx, &m)...)
}

func (r *repositoryResource) Update(ctx context.Context, req resource.UpdateRequest, resp *resource.UpdateResponse) {
	var m, state repositoryModel
	resp.Diagnostics.Append(req.Plan.Get(ctx, &m)...)
	resp.Diagnostics.Append(req.State.Get(ctx, &state)...)
	resp.Diagnostics.Append(r.setIdentity(ctx, resp.Identity, m.URL)...)
	timeout, d := m.Timeouts.Update(ctx, 5*time.Minute)
	resp.Diagnostics.Append(d...)
	if resp.Diagnostics.HasError() {
		return
	}
	if !m.Encryption.Equal(state.Encryption) {
		resp.Diagnostics.Append(recipientsFixed(m.URL.ValueString()))
		return
	}
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()

	// The new way to the repository has to lead to the same one.
	url, settings := m.URL.ValueString(), m.settings(r.data)
	repo, err := r.data.openRepository(ctx, url, settings, applyPatience)
	if err != nil {
		resp.Diagnostics.Append(repositoryProblem(path.Root("url"), "Update", url, err))
		return
	}
	if id := repo.Description().ID; id != state.ID.ValueString() {
		resp.Diagnostics.AddAttributeError(path.Root("url"), fmt.Sprintf("Repository %q Is Another", url),
			fmt.Sprintf("With the new region and endpoint, %s is the repository %s, expected %s.", url, id, state.ID.ValueString()))
		return
	}
	r.data.rememberRepository(url, knownRepository{settings: settings, changes: true})
	m.Location = types.StringValue(withSettings(url, settings))
	resp.Diagnostics.Append(resp.State.Set(ctx, &m)...)
}

// Delete forgets the repository. Its data are the user's: they stay.
func (r *repositoryResource) Delete(ctx context.Context, req resource.DeleteRequest, resp *resource.DeleteResponse) {
	resp.Diagnostics.Append(r.setIdentity(ctx, resp.Identity, stateString(ctx, req.State.GetAttribute, "url", &resp.Diagnostics))...)
}

func (r *repositoryResource) ImportState(ctx context.Context, req resource.ImportStateRequest, resp *resource.ImportStateResponse) {
	resource.ImportStatePassthroughWithIdentity(ctx, path.Root("url"), path.Root("url"), req, resp)
	resp.Diagnostics.Append(r.setIdentity(ctx, resp.Identity, stateString(ctx, resp.State.GetAttribute, "url", &resp.Diagnostics))...)
}

// stateString reads one attribute of a state.
func stateString(ctx context.Context, get func(context.Context, path.Path, any) diag.Diagnostics, name string, diags *diag.Diagnostics) types.String {
	var v types.String
	diags.Append(get(ctx, path.Root(name), &v)...)
	return v
}
