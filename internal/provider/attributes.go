package provider

import (
	"context"
	"fmt"
	"time"

	"github.com/hashicorp/terraform-plugin-framework-timetypes/timetypes"
	"github.com/hashicorp/terraform-plugin-framework/attr"
	datasourceschema "github.com/hashicorp/terraform-plugin-framework/datasource/schema"
	"github.com/hashicorp/terraform-plugin-framework/diag"
	"github.com/hashicorp/terraform-plugin-framework/resource/schema"
	"github.com/hashicorp/terraform-plugin-framework/resource/schema/defaults"
	"github.com/hashicorp/terraform-plugin-framework/resource/schema/objectdefault"
	"github.com/hashicorp/terraform-plugin-framework/types"
	"github.com/hashicorp/terraform-plugin-framework/types/basetypes"
	"github.com/hashicorp/terraform-plugin-go/tftypes"
)

// withDefaults makes a nested attribute optional in such a way that leaving it out means the same as writing it empty:
// every child has its own default. The framework applies children's defaults only where the parent is written.
func withDefaults(a schema.SingleNestedAttribute) schema.SingleNestedAttribute {
	a.Optional, a.Computed = true, true
	a.Default = objectdefault.StaticValue(objectOfDefaults(a))
	return a
}

func objectOfDefaults(a schema.SingleNestedAttribute) types.Object {
	values := make(map[string]attr.Value, len(a.Attributes))
	for name, child := range a.Attributes {
		values[name] = defaultOf(child)
	}
	return types.ObjectValueMust(attributeTypes(a), values)
}

// defaultOf is the attribute's static default, or null.
func defaultOf(a schema.Attribute) attr.Value {
	ctx := context.Background() // static defaults use it for nothing
	var value attr.Value
	switch a := a.(type) {
	case schema.StringAttribute:
		if a.Default != nil {
			var r defaults.StringResponse
			a.Default.DefaultString(ctx, defaults.StringRequest{}, &r)
			value = r.PlanValue
		}
	case schema.Int64Attribute:
		if a.Default != nil {
			var r defaults.Int64Response
			a.Default.DefaultInt64(ctx, defaults.Int64Request{}, &r)
			value = r.PlanValue
		}
	case schema.BoolAttribute:
		if a.Default != nil {
			var r defaults.BoolResponse
			a.Default.DefaultBool(ctx, defaults.BoolRequest{}, &r)
			value = r.PlanValue
		}
	case schema.SetAttribute:
		if a.Default != nil {
			var r defaults.SetResponse
			a.Default.DefaultSet(ctx, defaults.SetRequest{}, &r)
			value = r.PlanValue
		}
	case schema.SingleNestedAttribute:
		if a.Default != nil {
			var r defaults.ObjectResponse
			a.Default.DefaultObject(ctx, defaults.ObjectRequest{}, &r)
			value = r.PlanValue
		}
	}
	typ := a.GetType()
	raw := tftypes.NewValue(typ.TerraformType(ctx), nil)
	if value != nil {
		var err error
		if raw, err = value.ToTerraformValue(ctx); err != nil {
			panic("provider: internal error: default: " + err.Error())
		}
	}
	value, err := typ.ValueFromTerraform(ctx, raw) // through the attribute's own type, which may be a custom one
	if err != nil {
		panic("provider: internal error: default: " + err.Error())
	}
	return value
}

// attributeTypes gives the types of a nested attribute's children. It takes resource and data source attributes alike.
func attributeTypes(a interface{ GetType() attr.Type }) map[string]attr.Type {
	switch t := a.GetType().(type) {
	case attr.TypeWithAttributeTypes:
		return t.AttributeTypes()
	case attr.TypeWithElementType:
		return t.ElementType().(attr.TypeWithAttributeTypes).AttributeTypes() //nolint:forcetypeassert // nested lists hold objects
	}
	panic("provider: internal error: not a nested attribute")
}

var (
	_ interface{ GetType() attr.Type } = schema.SingleNestedAttribute{}
	_ interface{ GetType() attr.Type } = datasourceschema.ListNestedAttribute{}
)

// decode reads a known, non-null object into a T; null and unknown give the zero T.
func decode[T any](ctx context.Context, o types.Object, diags *diag.Diagnostics) T {
	var v T
	if o.IsNull() || o.IsUnknown() {
		return v
	}
	diags.Append(o.As(ctx, &v, basetypes.ObjectAsOptions{})...)
	return v
}

// encode makes an object of a struct with tfsdk tags.
func encode(ctx context.Context, typ map[string]attr.Type, v any, diags *diag.Diagnostics) types.Object {
	o, d := types.ObjectValueFrom(ctx, typ, v)
	diags.Append(d...)
	return o
}

// text is null for "": what a guest or a repository does not have is absent, not empty.
func text(s string) types.String {
	if s == "" {
		return types.StringNull()
	}
	return types.StringValue(s)
}

// count is null for 0.
func count(n int64) types.Int64 {
	if n == 0 {
		return types.Int64Null()
	}
	return types.Int64Value(n)
}

// moment is null for the zero time. Microseconds are PostgreSQL's resolution.
func moment(t time.Time) timetypes.RFC3339 {
	if t.IsZero() {
		return timetypes.NewRFC3339Null()
	}
	return timetypes.NewRFC3339ValueMust(t.UTC().Format("2006-01-02T15:04:05.999999Z07:00"))
}

// stringsOf reads a set of strings in the set's order, which Terraform sorts; nil for an empty one.
func stringsOf(ctx context.Context, s types.Set, diags *diag.Diagnostics) []string {
	if s.IsNull() || s.IsUnknown() {
		return nil
	}
	var out []string
	for _, e := range s.Elements() {
		if e.IsUnknown() {
			return nil
		}
	}
	diags.Append(s.ElementsAs(ctx, &out, false)...)
	if len(out) == 0 {
		return nil
	}
	return out
}

func setOf(ctx context.Context, list []string, diags *diag.Diagnostics) types.Set {
	if list == nil {
		list = []string{}
	}
	s, d := types.SetValueFrom(ctx, types.StringType, list)
	diags.Append(d...)
	return s
}

// duration reads a duration; null and unknown give 0. The attribute's type has checked its form.
func duration(v timetypes.GoDuration) time.Duration {
	if v.IsNull() || v.IsUnknown() {
		return 0
	}
	d, _ := v.ValueGoDuration() // the type's own validation refuses what cannot be parsed
	return d
}

// durationValue writes a duration as people do, "15m" and not "15m0s": what an import shows should be what one would write.
func durationValue(d time.Duration) timetypes.GoDuration {
	return timetypes.NewGoDurationValueFromStringMust(shortDuration(d))
}

func shortDuration(d time.Duration) string {
	s := d.String()
	if n := len(s); d >= time.Minute && n > 2 && s[n-2:] == "0s" && s[n-3] == 'm' {
		s = s[:n-2]
	}
	if n := len(s); d >= time.Hour && n > 2 && s[n-2:] == "0m" && s[n-3] == 'h' {
		s = s[:n-2]
	}
	return s
}

func listOf[T any](ctx context.Context, elem attr.Type, list []T, diags *diag.Diagnostics) types.List {
	l, d := types.ListValueFrom(ctx, elem, list)
	diags.Append(d...)
	return l
}

// timeOf reads a time; null gives the zero time. The attribute's type has checked its form.
func timeOf(v timetypes.RFC3339) time.Time {
	if v.IsNull() || v.IsUnknown() {
		return time.Time{}
	}
	t, _ := v.ValueRFC3339Time() // the type's own validation refuses what cannot be parsed
	return t
}

func checkPositiveDuration(s string) error {
	if d, err := time.ParseDuration(s); err == nil && d <= 0 {
		return fmt.Errorf("%s is not positive", s)
	}
	return nil // what cannot be parsed, the attribute's type refuses
}
