package provider

import (
	"context"
	"time"

	"github.com/hashicorp/terraform-plugin-framework/attr"
	"github.com/hashicorp/terraform-plugin-framework/datasource"
	"github.com/hashicorp/terraform-plugin-framework/datasource/schema"
	"github.com/hashicorp/terraform-plugin-framework/diag"
	"github.com/hashicorp/terraform-plugin-framework/types"

	"github.com/pgark/terraform-provider-pgark/internal/engine/guest"
)

const dataTimeout = 2 * time.Minute // what one data source may take

type instancesDataSource struct{ dataSource }

func newInstancesDataSource() datasource.DataSource { return &instancesDataSource{} }

var _ datasource.DataSourceWithConfigure = (*instancesDataSource)(nil)

type instancesDataModel struct {
	Host       types.String `tfsdk:"host"`
	Connection types.Object `tfsdk:"host_connection"`
	Instances  types.List   `tfsdk:"instances"`
}

type instanceModel struct {
	Name             types.String `tfsdk:"name"`
	Version          types.Int64  `tfsdk:"version"`
	VersionNumber    types.Int64  `tfsdk:"version_number"`
	DataDirectory    types.String `tfsdk:"data_directory"`
	SocketDirectory  types.String `tfsdk:"socket_directory"`
	Port             types.Int64  `tfsdk:"port"`
	Owner            types.String `tfsdk:"owner"`
	SystemIdentifier types.String `tfsdk:"system_identifier"`
	Running          types.Bool   `tfsdk:"running"`
	Role             types.String `tfsdk:"role"`
	ArchiveMode      types.String `tfsdk:"archive_mode"`
	WALLevel         types.String `tfsdk:"wal_level"`
	SizeBytes        types.Int64  `tfsdk:"size_bytes"`
	WALSegmentBytes  types.Int64  `tfsdk:"wal_segment_bytes"`
	ArchiveCommand   types.String `tfsdk:"archive_command"`
	ArchiveLibrary   types.String `tfsdk:"archive_library"`
	Databases        types.List   `tfsdk:"databases"`
	Extensions       types.List   `tfsdk:"extensions"`
	Tablespaces      types.List   `tfsdk:"tablespaces"`
	Followers        types.List   `tfsdk:"followers"`
	Service          types.String `tfsdk:"service"`
	Manager          types.String `tfsdk:"manager"`
	Problem          types.String `tfsdk:"problem"`
}

type tablespaceModel struct {
	Name     types.String `tfsdk:"name"`
	Location types.String `tfsdk:"location"`
}

func newInstanceModel(ctx context.Context, i guest.Instance, diags *diag.Diagnostics) instanceModel {
	tablespaces := make([]tablespaceModel, 0, len(i.Tablespaces))
	for _, t := range i.Tablespaces {
		tablespaces = append(tablespaces, tablespaceModel{Name: types.StringValue(t.Name), Location: types.StringValue(t.Location)})
	}
	names := func(list []string) types.List {
		return listOf(ctx, types.StringType, append([]string{}, list...), diags) // empty rather than null
	}
	return instanceModel{
		Name:             types.StringValue(i.Name),
		Version:          types.Int64Value(int64(i.Version)),
		VersionNumber:    count(int64(i.VersionNumber)),
		DataDirectory:    types.StringValue(i.DataDirectory),
		SocketDirectory:  text(i.SocketDirectory),
		Port:             count(int64(i.Port)),
		Owner:            text(i.Owner),
		SystemIdentifier: types.StringValue(i.SystemID.String()),
		Running:          types.BoolValue(i.Running),
		Role:             text(i.Role),
		ArchiveMode:      text(i.ArchiveMode),
		WALLevel:         text(i.WALLevel),
		SizeBytes:        types.Int64Value(i.SizeBytes),
		WALSegmentBytes:  count(int64(i.WALSegment)),
		ArchiveCommand:   text(i.ArchiveCommand),
		ArchiveLibrary:   text(i.ArchiveLibrary),
		Databases:        names(i.Databases),
		Extensions:       names(i.Extensions),
		Tablespaces:      listOf(ctx, tablespaceType, tablespaces, diags),
		Followers:        names(i.Followers),
		Service:          text(i.Service),
		Manager:          text(i.Manager),
		Problem:          text(i.Problem),
	}
}

func instanceListAttribute() schema.ListNestedAttribute {
	return schema.ListNestedAttribute{
		Computed: true, MarkdownDescription: "The instances, in order of name.",
		NestedObject: schema.NestedAttributeObject{Attributes: map[string]schema.Attribute{
			"name":              schema.StringAttribute{Computed: true, MarkdownDescription: "Name of the instance: major version, hyphen, name or port."},
			"version":           schema.Int64Attribute{Computed: true, MarkdownDescription: "Major version of PostgreSQL."},
			"version_number":    schema.Int64Attribute{Computed: true, MarkdownDescription: "Its `server_version_num`; null when it is not running."},
			"data_directory":    schema.StringAttribute{Computed: true, MarkdownDescription: "Data directory."},
			"socket_directory":  schema.StringAttribute{Computed: true, MarkdownDescription: "Directory of its Unix socket."},
			"port":              schema.Int64Attribute{Computed: true, MarkdownDescription: "Port."},
			"owner":             schema.StringAttribute{Computed: true, MarkdownDescription: "Operating system user that owns the data directory."},
			"system_identifier": schema.StringAttribute{Computed: true, MarkdownDescription: "System identifier of the cluster, decimal."},
			"running":           schema.BoolAttribute{Computed: true, MarkdownDescription: "Whether it is running."},
			"role":              schema.StringAttribute{Computed: true, MarkdownDescription: "`primary` or `replica`; null when it is not running."},
			"archive_mode":      schema.StringAttribute{Computed: true, MarkdownDescription: "Its setting `archive_mode`; null when it is not running."},
			"wal_level":         schema.StringAttribute{Computed: true, MarkdownDescription: "Its setting `wal_level`; null when it is not running."},
			"size_bytes":        schema.Int64Attribute{Computed: true, MarkdownDescription: "Size of the data directory."},
			"wal_segment_bytes": schema.Int64Attribute{Computed: true, MarkdownDescription: "Size of a WAL segment."},
			"archive_command":   schema.StringAttribute{Computed: true, MarkdownDescription: "Program that its `archive_command` runs; its arguments, which may hold a password, are left out. Null when there is none, or it is not known."},
			"archive_library":   schema.StringAttribute{Computed: true, MarkdownDescription: "Its setting `archive_library`; null when there is none, or it is not known."},
			"databases":         schema.ListAttribute{Computed: true, ElementType: types.StringType, MarkdownDescription: "Names of its databases, without templates. Empty when the server could not be asked, as are the following lists."},
			"extensions":        schema.ListAttribute{Computed: true, ElementType: types.StringType, MarkdownDescription: "Extensions of its database `postgres`."},
			"tablespaces": schema.ListNestedAttribute{
				Computed: true, MarkdownDescription: "Tablespaces that lie outside the data directory.",
				NestedObject: schema.NestedAttributeObject{Attributes: map[string]schema.Attribute{
					"name":     schema.StringAttribute{Computed: true, MarkdownDescription: "Name of the tablespace."},
					"location": schema.StringAttribute{Computed: true, MarkdownDescription: "Its directory."},
				}},
			},
			"followers": schema.ListAttribute{Computed: true, ElementType: types.StringType, MarkdownDescription: "Standbys that stream from it, by `application_name`."},
			"service":   schema.StringAttribute{Computed: true, MarkdownDescription: "systemd unit that runs it, or would; null if there is none."},
			"manager":   schema.StringAttribute{Computed: true, MarkdownDescription: "Cluster manager that decides about its role and settings, as `patroni`; null if there is none."},
			"problem":   schema.StringAttribute{Computed: true, MarkdownDescription: "Why the server, which runs, could not be asked; null if it could."},
		}},
	}
}

var tablespaceType = types.ObjectType{AttrTypes: map[string]attr.Type{"name": types.StringType, "location": types.StringType}}

var instanceType = types.ObjectType{AttrTypes: attributeTypes(instanceListAttribute())}

func (d *instancesDataSource) Metadata(_ context.Context, req datasource.MetadataRequest, resp *datasource.MetadataResponse) {
	resp.TypeName = req.ProviderTypeName + "_postgresql_instances"
}

func (d *instancesDataSource) Schema(_ context.Context, _ datasource.SchemaRequest, resp *datasource.SchemaResponse) {
	resp.Schema = schema.Schema{
		MarkdownDescription: "Finds the PostgreSQL instances (clusters) on a host, running or not.",
		Attributes: map[string]schema.Attribute{
			"host":         hostForData(),
			connectionName: connectionForData(),
			"instances":    instanceListAttribute(),
		},
	}
}

func (d *instancesDataSource) Read(ctx context.Context, req datasource.ReadRequest, resp *datasource.ReadResponse) {
	diags := &resp.Diagnostics
	var m instancesDataModel
	diags.Append(req.Config.Get(ctx, &m)...)
	if diags.HasError() {
		return
	}
	g := d.guest(ctx, m.Host, "", m.Connection, diags)
	if g == nil {
		return
	}
	ctx, cancel := context.WithTimeout(ctx, dataTimeout)
	defer cancel()
	found, err := g.Discover(ctx)
	if err != nil {
		diags.AddAttributeError(connectionPath(err), "Unable to Find PostgreSQL Instances on "+m.Host.ValueString(), detail(err))
		return
	}
	list := make([]instanceModel, 0, len(found))
	for _, i := range found {
		list = append(list, newInstanceModel(ctx, i, diags))
	}
	m.Instances = listOf(ctx, instanceType, list, diags)
	diags.Append(resp.State.Set(ctx, &m)...)
}
