package validators

import (
	"context"
	"strings"
	"testing"

	"github.com/hashicorp/terraform-plugin-framework/path"
	"github.com/hashicorp/terraform-plugin-framework/schema/validator"
	"github.com/hashicorp/terraform-plugin-framework/types"

	"github.com/pgark/terraform-provider-pgark/internal/engine/job"
)

func TestString(t *testing.T) {
	schedule := String("a cron expression of five fields", Job(func(j *job.Job, v string) { j.Image.Schedule = v }))
	for name, c := range map[string]struct {
		value types.String
		want  string // a part of the message; empty: valid
	}{
		"valid":         {types.StringValue("0 22 * * *"), ""},
		"null":          {types.StringNull(), ""},
		"unknown":       {types.StringUnknown(), ""},
		"hour too high": {types.StringValue("0 25 * * *"), "hour 25 is not in 0–23"},
		"four fields":   {types.StringValue("0 22 * *"), "found 4 fields, expected five"},
	} {
		t.Run(name, func(t *testing.T) {
			var resp validator.StringResponse
			schedule.ValidateString(context.Background(), validator.StringRequest{Path: path.Root("x"), ConfigValue: c.value}, &resp)
			switch n := len(resp.Diagnostics); {
			case c.want == "" && n != 0:
				t.Errorf("found %v, expected it to be valid", resp.Diagnostics)
			case c.want != "" && n != 1:
				t.Errorf("found %d diagnostics, expected one", n)
			case c.want != "":
				text := resp.Diagnostics[0].Detail()
				if !strings.Contains(text, c.want) || strings.Contains(text, probe) {
					t.Errorf("found %q, expected %q and no job's name", text, c.want)
				}
			}
		})
	}
}
