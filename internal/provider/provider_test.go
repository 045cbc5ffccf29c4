package provider

import (
	"context"
	"testing"

	"github.com/hashicorp/terraform-plugin-framework/datasource"
	"github.com/hashicorp/terraform-plugin-framework/provider"
	"github.com/hashicorp/terraform-plugin-framework/resource"
	"github.com/hashicorp/terraform-plugin-go/tfprotov6"
)

// TestSchemas asks for all schemas as Terraform does, and has the framework check each.
func TestSchemas(t *testing.T) {
	ctx := context.Background()
	server := NewServer("test")()
	resp, err := server.GetProviderSchema(ctx, &tfprotov6.GetProviderSchemaRequest{})
	if err != nil {
		t.Fatal(err)
	}
	for _, d := range resp.Diagnostics {
		t.Errorf("%s: %s", d.Summary, d.Detail)
	}
	for _, name := range []string{"pgark_repository", "pgark_postgresql_backup_job", "pgark_wal_retention"} {
		if resp.ResourceSchemas[name] == nil {
			t.Errorf("there is no resource %s", name)
		}
	}
	for _, name := range []string{"pgark_restore_points", "pgark_backup_statistics", "pgark_postgresql_instances", "pgark_prerequisites"} {
		if resp.DataSourceSchemas[name] == nil {
			t.Errorf("there is no data source %s", name)
		}
	}

	p := &pgarkProvider{version: "test"}
	var ps provider.SchemaResponse
	p.Schema(ctx, provider.SchemaRequest{}, &ps)
	for _, d := range ps.Schema.ValidateImplementation(ctx) {
		t.Errorf("provider: %s: %s", d.Summary(), d.Detail())
	}
	for _, build := range p.Resources(ctx) {
		var m resource.MetadataResponse
		var s resource.SchemaResponse
		r := build()
		r.Metadata(ctx, resource.MetadataRequest{ProviderTypeName: "pgark"}, &m)
		r.Schema(ctx, resource.SchemaRequest{}, &s)
		for _, d := range s.Schema.ValidateImplementation(ctx) {
			t.Errorf("%s: %s: %s", m.TypeName, d.Summary(), d.Detail())
		}
	}
	for _, build := range p.DataSources(ctx) {
		var m datasource.MetadataResponse
		var s datasource.SchemaResponse
		d := build()
		d.Metadata(ctx, datasource.MetadataRequest{ProviderTypeName: "pgark"}, &m)
		d.Schema(ctx, datasource.SchemaRequest{}, &s)
		for _, d := range s.Schema.ValidateImplementation(ctx) {
			t.Errorf("%s: %s: %s", m.TypeName, d.Summary(), d.Detail())
		}
	}
}
