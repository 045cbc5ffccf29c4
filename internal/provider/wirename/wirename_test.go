package wirename

import (
	"testing"

	"github.com/hashicorp/terraform-plugin-go/tfprotov6"
	"github.com/hashicorp/terraform-plugin-go/tftypes"
)

func TestRenameMsgPack(t *testing.T) {
	object := func(name string) tftypes.Object {
		return tftypes.Object{AttributeTypes: map[string]tftypes.Type{
			"a": tftypes.Number, name: tftypes.Object{AttributeTypes: map[string]tftypes.Type{"from": tftypes.String}}, "z": tftypes.List{ElementType: tftypes.String},
		}}
	}
	inner := func(v any) tftypes.Value {
		return tftypes.NewValue(tftypes.Object{AttributeTypes: map[string]tftypes.Type{"from": tftypes.String}}, v)
	}
	value := func(name string, nested tftypes.Value) tftypes.Value {
		return tftypes.NewValue(object(name), map[string]tftypes.Value{
			"a": tftypes.NewValue(tftypes.Number, 7), name: nested,
			"z": tftypes.NewValue(tftypes.List{ElementType: tftypes.String}, tftypes.UnknownValue),
		})
	}
	for name, nested := range map[string]tftypes.Value{
		"known":   inner(map[string]tftypes.Value{"from": tftypes.NewValue(tftypes.String, "x")}),
		"null":    inner(nil),
		"unknown": inner(tftypes.UnknownValue),
	} {
		t.Run(name, func(t *testing.T) {
			v, err := tfprotov6.NewDynamicValue(object("from"), value("from", nested))
			if err != nil {
				t.Fatal(err)
			}
			if err := renameAll("from", "to", []*tfprotov6.DynamicValue{&v, nil}); err != nil {
				t.Fatal(err)
			}
			got, err := v.Unmarshal(object("to"))
			if err != nil {
				t.Fatal(err)
			}
			if want := value("to", nested); !got.Equal(want) {
				t.Errorf("found %s, expected %s", got, want)
			}
		})
	}
	t.Run("a null state", func(t *testing.T) {
		v, err := tfprotov6.NewDynamicValue(object("from"), tftypes.NewValue(object("from"), nil))
		if err != nil {
			t.Fatal(err)
		}
		if err := renameAll("from", "to", []*tfprotov6.DynamicValue{&v}); err != nil {
			t.Fatal(err)
		}
		if got, err := v.Unmarshal(object("to")); err != nil || !got.IsNull() {
			t.Errorf("found %s, %v, expected null", got, err)
		}
	})
}

func TestRenameJSON(t *testing.T) {
	got, err := renameJSON([]byte(`{"from":{"from":1},"n":12345678901234567890}`), "from", "to")
	if err != nil {
		t.Fatal(err)
	}
	if want := `{"n":12345678901234567890,"to":{"from":1}}`; string(got) != want {
		t.Errorf("found %s, expected %s", got, want)
	}
}

func TestPath(t *testing.T) {
	s := &Server{Inside: "in", Outside: "out"}
	p := tftypes.NewAttributePath().WithAttributeName("in").WithAttributeName("in")
	if got, want := s.path(p), tftypes.NewAttributePath().WithAttributeName("out").WithAttributeName("in"); !got.Equal(want) {
		t.Errorf("found %s, expected %s", got, want)
	}
	if s.path(nil) != nil {
		t.Error("no path became one")
	}
}
