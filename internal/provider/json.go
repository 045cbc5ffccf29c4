package provider

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"math/big"
	"time"

	"github.com/hashicorp/terraform-plugin-framework-timetypes/timetypes"
	"github.com/hashicorp/terraform-plugin-framework/attr"
	"github.com/hashicorp/terraform-plugin-framework/diag"
	"github.com/hashicorp/terraform-plugin-go/tftypes"
)

// fromJSON makes a Terraform value of what the engine prints as JSON: data sources have the attribute names that the
// runner's commands print, and so need no models of their own. Members that the type does not name are left out; absent
// ones, null, "" and the zero time are null, lists are empty rather than null.
func fromJSON[T attr.Value](ctx context.Context, typ attr.Type, v any, diags *diag.Diagnostics) T {
	var zero T
	b, err := json.Marshal(v)
	if err != nil {
		panic("provider: internal error: " + err.Error()) // plain data
	}
	d := json.NewDecoder(bytes.NewReader(b))
	d.UseNumber() // sizes may have more digits than a float64 holds
	var raw any
	if err := d.Decode(&raw); err != nil {
		panic("provider: internal error: " + err.Error()) // what we just wrote
	}
	value, err := terraformValue(ctx, typ, raw)
	if err == nil {
		var result attr.Value
		if result, err = typ.ValueFromTerraform(ctx, value); err == nil {
			if t, ok := result.(T); ok {
				return t
			}
			err = fmt.Errorf("found %T, expected %T", result, zero)
		}
	}
	diags.AddError("Unexpected Answer", sentence(err.Error())+" Please report this to the provider's developers.")
	return zero
}

func terraformValue(ctx context.Context, typ attr.Type, raw any) (tftypes.Value, error) {
	tf := typ.TerraformType(ctx)
	fail := func() (tftypes.Value, error) {
		return tftypes.Value{}, fmt.Errorf("found %v, expected %s", raw, typ)
	}
	switch raw := raw.(type) {
	case nil:
		if _, list := typ.(attr.TypeWithElementType); list {
			return tftypes.NewValue(tf, []tftypes.Value{}), nil // a nil slice is an empty one
		}
		return tftypes.NewValue(tf, nil), nil
	case bool:
		return tftypes.NewValue(tf, raw), nil
	case json.Number:
		f, ok := new(big.Float).SetString(raw.String())
		if !ok {
			return fail()
		}
		return tftypes.NewValue(tf, f), nil
	case string:
		if _, ok := typ.(timetypes.RFC3339Type); ok {
			t, err := time.Parse(time.RFC3339Nano, raw)
			if err != nil {
				return fail()
			}
			return moment(t).ToTerraformValue(ctx)
		}
		return text(raw).ToTerraformValue(ctx)
	case []any:
		list, ok := typ.(attr.TypeWithElementType)
		if !ok {
			return fail()
		}
		values := make([]tftypes.Value, 0, len(raw))
		for _, r := range raw {
			v, err := terraformValue(ctx, list.ElementType(), r)
			if err != nil {
				return tftypes.Value{}, err
			}
			values = append(values, v)
		}
		return tftypes.NewValue(tf, values), nil
	case map[string]any:
		object, ok := typ.(attr.TypeWithAttributeTypes)
		if !ok {
			return fail()
		}
		values := map[string]tftypes.Value{}
		for name, t := range object.AttributeTypes() {
			v, err := terraformValue(ctx, t, raw[name])
			if err != nil {
				return tftypes.Value{}, fmt.Errorf("%s: %w", name, err)
			}
			values[name] = v
		}
		return tftypes.NewValue(tf, values), nil
	}
	return fail()
}
