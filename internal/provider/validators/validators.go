// Package validators turns the engine's own rules into schema validators, so that a rule is written once and used twice:
// by the runner when it reads a job file, and by Terraform when it reads a configuration.
package validators

import (
	"context"
	"strings"

	"github.com/hashicorp/terraform-plugin-framework/schema/validator"

	"github.com/pgark/terraform-provider-pgark/internal/engine/job"
)

// String accepts what rule returns nil for. description says what that is, for documents and messages.
func String(description string, rule func(string) error) validator.String {
	return stringRule{description, rule}
}

type stringRule struct {
	description string
	rule        func(string) error
}

var _ validator.String = stringRule{}

func (r stringRule) Description(context.Context) string         { return r.description }
func (r stringRule) MarkdownDescription(context.Context) string { return r.description }

func (r stringRule) ValidateString(_ context.Context, req validator.StringRequest, resp *validator.StringResponse) {
	if req.ConfigValue.IsNull() || req.ConfigValue.IsUnknown() {
		return
	}
	if err := r.rule(req.ConfigValue.ValueString()); err != nil {
		resp.Diagnostics.AddAttributeError(req.Path, "Invalid Value", sentence(err.Error())+"\n\nExpected: "+r.description+".")
	}
}

// Int64 accepts what rule returns nil for.
func Int64(description string, rule func(int64) error) validator.Int64 {
	return int64Rule{description, rule}
}

type int64Rule struct {
	description string
	rule        func(int64) error
}

var _ validator.Int64 = int64Rule{}

func (r int64Rule) Description(context.Context) string         { return r.description }
func (r int64Rule) MarkdownDescription(context.Context) string { return r.description }

func (r int64Rule) ValidateInt64(_ context.Context, req validator.Int64Request, resp *validator.Int64Response) {
	if req.ConfigValue.IsNull() || req.ConfigValue.IsUnknown() {
		return
	}
	if err := r.rule(req.ConfigValue.ValueInt64()); err != nil {
		resp.Diagnostics.AddAttributeError(req.Path, "Invalid Value", sentence(err.Error())+"\n\nExpected: "+r.description+".")
	}
}

// probe is the name of the job that Job tries values in.
const probe = "probe"

// Job makes a rule of what job.Validate says about a job in which set has put the value, and nothing else is special.
func Job[T any](set func(*job.Job, T)) func(T) error {
	return func(v T) error {
		j := job.Job{Name: probe, Repository: job.Repository{URL: "file:///"}}
		j.ApplyDefaults()
		set(&j, v)
		err := j.Validate()
		if err == nil {
			return nil
		}
		return ruleError{err}
	}
}

// ruleError takes the probe's name out of the message: it means nothing to the user.
type ruleError struct{ error }

func (e ruleError) Error() string {
	return strings.ReplaceAll(e.error.Error(), "job "+probe+": ", "")
}

func (e ruleError) Unwrap() error { return e.error }

// sentence makes an error's message fit for a diagnostic, which is prose: first letter, full stop.
func sentence(s string) string {
	if s == "" {
		return s
	}
	if s[len(s)-1] != '.' {
		s += "."
	}
	return strings.ToUpper(s[:1]) + s[1:]
}
