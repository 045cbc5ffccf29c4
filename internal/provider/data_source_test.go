package provider

import (
	"context"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/hashicorp/terraform-plugin-framework/attr"
	"github.com/hashicorp/terraform-plugin-framework/diag"
	"github.com/hashicorp/terraform-plugin-framework/types"

	"github.com/pgark/terraform-provider-pgark/internal/engine/postgres"
	"github.com/pgark/terraform-provider-pgark/internal/engine/restore"
	"github.com/pgark/terraform-provider-pgark/internal/engine/session"
)

// jsonNames lists the JSON members of a struct type, those of nested structs with their parents' names in front.
func jsonNames(t reflect.Type, prefix string) []string {
	for t.Kind() == reflect.Pointer || t.Kind() == reflect.Slice {
		t = t.Elem()
	}
	if t.Kind() != reflect.Struct || t == reflect.TypeFor[time.Time]() {
		return nil
	}
	var names []string
	for _, f := range reflect.VisibleFields(t) {
		name, _, _ := strings.Cut(f.Tag.Get("json"), ",")
		if name == "" || name == "-" {
			continue
		}
		names = append(names, prefix+name)
		names = append(names, jsonNames(f.Type, prefix+name+".")...)
	}
	slices.Sort(names)
	return names
}

// attributeNames lists the attributes of a type in the same way.
func attributeNames(t attr.Type, prefix string) []string {
	if l, ok := t.(attr.TypeWithElementType); ok {
		t = l.ElementType()
	}
	o, ok := t.(attr.TypeWithAttributeTypes)
	if !ok {
		return nil
	}
	var names []string
	for name, t := range o.AttributeTypes() {
		names = append(names, prefix+name)
		names = append(names, attributeNames(t, prefix+name+".")...)
	}
	slices.Sort(names)
	return names
}

// TestDataSourceNames holds data sources and commands together: both show the engine's structs under the same names.
func TestDataSourceNames(t *testing.T) {
	for name, c := range map[string]struct {
		attribute attr.Type
		engine    reflect.Type
		left      []string // what the data source leaves out, and why
	}{
		"restore points": {seriesAttribute().GetType(), reflect.TypeFor[restore.SeriesListing](), nil},
		"statistics": {statisticsSeriesAttribute().GetType(), reflect.TypeFor[session.Series](),
			[]string{"images.next_at"}}, // the schedule is on the guest, which is not asked
	} {
		t.Run(name, func(t *testing.T) {
			want := jsonNames(c.engine, "")
			want = slices.DeleteFunc(want, func(n string) bool { return slices.Contains(c.left, n) })
			got := attributeNames(c.attribute, "")
			for _, n := range want {
				if !slices.Contains(got, n) {
					t.Errorf("%s has no attribute", n)
				}
			}
			for _, n := range got {
				if !slices.Contains(want, n) {
					t.Errorf("the attribute %s stands for nothing", n)
				}
			}
		})
	}
}

func TestRestorePointsFromListing(t *testing.T) {
	ctx := context.Background()
	at := func(hour int) time.Time { return time.Date(2026, 11, 22, hour, 0, 0, 123456789, time.UTC) }
	gapEnd := at(3)
	listing := &restore.Listing{Series: []restore.SeriesListing{{
		Job: "orders", Instance: "15-main", SystemIdentifier: postgres.SystemID(18446744073709551615),
		Images: []restore.Image{
			{ID: "01", Kind: "full", Status: restore.Restorable, CompletedAt: at(1), StartLSN: 0x1_00000028, SourceBytes: 1<<53 + 1},
			{ID: "02", Kind: "incremental", Status: restore.Restorable, CompletedAt: at(2)},
			{ID: "03", Kind: "incremental", Status: restore.Incomplete, Reason: "segment 5 is missing", CompletedAt: at(4)},
		},
		Windows: []restore.Window{{From: at(1), To: at(2), Timeline: 1}},
		Gaps:    []restore.Gap{{Timeline: 1, Segments: 2, To: &gapEnd}},
	}}}
	var m restorePointsDataModel
	var diags diag.Diagnostics
	m.fromListing(ctx, listing, &diags)
	noDiagnostics(t, diags)

	latest := m.Latest.Attributes()
	if got := latest["id"]; !got.Equal(types.StringValue("02")) {
		t.Errorf("latest is %v, expected the last that can be restored", got)
	}
	if got := latest["verified_at"]; !got.IsNull() {
		t.Errorf("verified_at is %v, expected null", got)
	}
	if got := m.RecoverableTo.ValueString(); got != "2026-11-22T02:00:00.123456Z" {
		t.Errorf("recoverable_to is %s, expected microseconds", got)
	}
	text := m.Series.String()
	for _, want := range []string{`"system_identifier":"18446744073709551615"`, `"source_bytes":9007199254740993`, `"start_lsn":"1/28"`, `"segments":2`} {
		if !strings.Contains(text, want) {
			t.Errorf("found no %s in %s", want, text)
		}
	}

	m.fromListing(ctx, &restore.Listing{}, &diags)
	noDiagnostics(t, diags)
	if !m.Latest.IsNull() || !m.RecoverableFrom.IsNull() || m.Series.IsNull() || len(m.Series.Elements()) != 0 {
		t.Errorf("an empty repository gives %v %v %v", m.Latest, m.RecoverableFrom, m.Series)
	}
}
