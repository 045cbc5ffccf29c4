// Package wirename gives one attribute another name on the wire than it has in the provider's schemas.
//
// The framework refuses a root attribute called "connection", because Terraform knows a block of that name inside
// resources (for provisioners). Terraform and OpenTofu themselves accept `connection = { … }`, an attribute, and leave it
// to the provider; it is the natural name, and the published one. So the schemas call it by another name, and this
// server, between Terraform and the framework's, translates: schemas, values, states, and the paths in diagnostics.
// It translates root attributes only and knows nothing of what they mean.
package wirename

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"

	"github.com/hashicorp/terraform-plugin-go/tfprotov6"
	"github.com/hashicorp/terraform-plugin-go/tftypes"
	"github.com/vmihailenco/msgpack/v5"
)

// Server is a provider server that shows the attribute Inside, of every resource and data source that has one, as Outside.
type Server struct {
	tfprotov6.ProviderServer
	Inside, Outside string
}

var _ tfprotov6.ProviderServer = (*Server)(nil)

// Wrap returns a constructor of servers as plugin servers and test frameworks want it.
func Wrap(server func() tfprotov6.ProviderServer, inside, outside string) func() tfprotov6.ProviderServer {
	return func() tfprotov6.ProviderServer {
		return &Server{ProviderServer: server(), Inside: inside, Outside: outside}
	}
}

// GetProviderSchema shows the schemas with the outside name.
func (s *Server) GetProviderSchema(ctx context.Context, r *tfprotov6.GetProviderSchemaRequest) (*tfprotov6.GetProviderSchemaResponse, error) {
	resp, err := s.ProviderServer.GetProviderSchema(ctx, r)
	if resp == nil {
		return resp, err
	}
	for _, schemas := range []map[string]*tfprotov6.Schema{resp.ResourceSchemas, resp.DataSourceSchemas} {
		for _, schema := range schemas {
			for _, a := range schema.Block.Attributes {
				if a.Name == s.Inside {
					a.Name = s.Outside
				}
			}
		}
	}
	return resp, err
}

// in translates values that come from Terraform, out those that go there.
func (s *Server) in(values ...*tfprotov6.DynamicValue) error {
	return renameAll(s.Outside, s.Inside, values)
}

func (s *Server) out(diagnostics []*tfprotov6.Diagnostic, values ...*tfprotov6.DynamicValue) error {
	for _, d := range diagnostics {
		d.Attribute = s.path(d.Attribute)
	}
	return renameAll(s.Inside, s.Outside, values)
}

func (s *Server) path(p *tftypes.AttributePath) *tftypes.AttributePath {
	if p == nil || len(p.Steps()) == 0 || p.Steps()[0] != tftypes.AttributeName(s.Inside) {
		return p
	}
	return tftypes.NewAttributePathWithSteps(append([]tftypes.AttributePathStep{tftypes.AttributeName(s.Outside)}, p.Steps()[1:]...))
}

func renameAll(from, to string, values []*tfprotov6.DynamicValue) error {
	for _, v := range values {
		if v == nil {
			continue
		}
		var err error
		if v.MsgPack, err = renameMsgPack(v.MsgPack, from, to); err != nil {
			return err
		}
		if v.JSON, err = renameJSON(v.JSON, from, to); err != nil {
			return err
		}
	}
	return nil
}

// renameMsgPack renames a key of an object; anything else (null, unknown) stays as it is.
func renameMsgPack(b []byte, from, to string) ([]byte, error) {
	if !bytes.Contains(b, []byte(from)) {
		return b, nil
	}
	d := msgpack.NewDecoder(bytes.NewReader(b))
	code, err := d.PeekCode()
	if err != nil {
		return nil, fmt.Errorf("translate a value: %w", err)
	}
	if isMap := code&0xf0 == 0x80 || code == 0xde || code == 0xdf; !isMap { // the MessagePack specification: fixmap, map 16, map 32
		return b, nil
	}
	n, err := d.DecodeMapLen()
	if err != nil {
		return nil, fmt.Errorf("translate a value: %w", err)
	}
	var buf bytes.Buffer
	e := msgpack.NewEncoder(&buf)
	if err := e.EncodeMapLen(n); err != nil {
		return nil, fmt.Errorf("translate a value: %w", err)
	}
	for range n {
		key, err := d.DecodeString()
		if err != nil {
			return nil, fmt.Errorf("translate a value: %w", err)
		}
		value, err := d.DecodeRaw()
		if err != nil {
			return nil, fmt.Errorf("translate %s: %w", key, err)
		}
		if key == from {
			key = to
		}
		if err := e.EncodeString(key); err != nil {
			return nil, fmt.Errorf("translate %s: %w", key, err)
		}
		if _, err := buf.Write(value); err != nil {
			return nil, fmt.Errorf("translate %s: %w", key, err)
		}
	}
	return buf.Bytes(), nil
}

func renameJSON(b []byte, from, to string) ([]byte, error) {
	if !bytes.Contains(b, []byte(from)) {
		return b, nil
	}
	var object map[string]json.RawMessage
	if err := json.Unmarshal(b, &object); err != nil {
		return nil, fmt.Errorf("translate a value: %w", err)
	}
	if v, ok := object[from]; ok {
		delete(object, from)
		object[to] = v
	}
	return json.Marshal(object)
}

// ---- the calls that carry values --------------------------------------------------------------------------------------

// ValidateResourceConfig translates its configuration.
func (s *Server) ValidateResourceConfig(ctx context.Context, r *tfprotov6.ValidateResourceConfigRequest) (*tfprotov6.ValidateResourceConfigResponse, error) {
	if err := s.in(r.Config); err != nil {
		return nil, err
	}
	resp, err := s.ProviderServer.ValidateResourceConfig(ctx, r)
	if err != nil || resp == nil {
		return resp, err
	}
	return resp, s.out(resp.Diagnostics)
}

// UpgradeResourceState translates the state as it was stored, and as it is returned.
func (s *Server) UpgradeResourceState(ctx context.Context, r *tfprotov6.UpgradeResourceStateRequest) (*tfprotov6.UpgradeResourceStateResponse, error) {
	if r.RawState != nil {
		var err error
		if r.RawState.JSON, err = renameJSON(r.RawState.JSON, s.Outside, s.Inside); err != nil {
			return nil, err
		}
	}
	resp, err := s.ProviderServer.UpgradeResourceState(ctx, r)
	if err != nil || resp == nil {
		return resp, err
	}
	return resp, s.out(resp.Diagnostics, resp.UpgradedState)
}

// ReadResource translates the state.
func (s *Server) ReadResource(ctx context.Context, r *tfprotov6.ReadResourceRequest) (*tfprotov6.ReadResourceResponse, error) {
	if err := s.in(r.CurrentState); err != nil {
		return nil, err
	}
	resp, err := s.ProviderServer.ReadResource(ctx, r)
	if err != nil || resp == nil {
		return resp, err
	}
	return resp, s.out(resp.Diagnostics, resp.NewState)
}

// PlanResourceChange translates configuration, states, and the paths that force replacement.
func (s *Server) PlanResourceChange(ctx context.Context, r *tfprotov6.PlanResourceChangeRequest) (*tfprotov6.PlanResourceChangeResponse, error) {
	if err := s.in(r.PriorState, r.ProposedNewState, r.Config); err != nil {
		return nil, err
	}
	resp, err := s.ProviderServer.PlanResourceChange(ctx, r)
	if err != nil || resp == nil {
		return resp, err
	}
	for i, p := range resp.RequiresReplace {
		resp.RequiresReplace[i] = s.path(p)
	}
	return resp, s.out(resp.Diagnostics, resp.PlannedState)
}

// ApplyResourceChange translates configuration and states.
func (s *Server) ApplyResourceChange(ctx context.Context, r *tfprotov6.ApplyResourceChangeRequest) (*tfprotov6.ApplyResourceChangeResponse, error) {
	if err := s.in(r.PriorState, r.PlannedState, r.Config); err != nil {
		return nil, err
	}
	resp, err := s.ProviderServer.ApplyResourceChange(ctx, r)
	if err != nil || resp == nil {
		return resp, err
	}
	return resp, s.out(resp.Diagnostics, resp.NewState)
}

// ImportResourceState translates the states found.
func (s *Server) ImportResourceState(ctx context.Context, r *tfprotov6.ImportResourceStateRequest) (*tfprotov6.ImportResourceStateResponse, error) {
	resp, err := s.ProviderServer.ImportResourceState(ctx, r)
	if err != nil || resp == nil {
		return resp, err
	}
	var states []*tfprotov6.DynamicValue
	for _, i := range resp.ImportedResources {
		states = append(states, i.State)
	}
	return resp, s.out(resp.Diagnostics, states...)
}

// MoveResourceState translates the state that comes back; what comes in is another type's.
func (s *Server) MoveResourceState(ctx context.Context, r *tfprotov6.MoveResourceStateRequest) (*tfprotov6.MoveResourceStateResponse, error) {
	resp, err := s.ProviderServer.MoveResourceState(ctx, r)
	if err != nil || resp == nil {
		return resp, err
	}
	return resp, s.out(resp.Diagnostics, resp.TargetState)
}

// GenerateResourceConfig translates the state and the configuration made from it.
func (s *Server) GenerateResourceConfig(ctx context.Context, r *tfprotov6.GenerateResourceConfigRequest) (*tfprotov6.GenerateResourceConfigResponse, error) {
	if err := s.in(r.State); err != nil {
		return nil, err
	}
	resp, err := s.ProviderServer.GenerateResourceConfig(ctx, r)
	if err != nil || resp == nil {
		return resp, err
	}
	return resp, s.out(resp.Diagnostics, resp.Config)
}

// ValidateDataResourceConfig translates its configuration.
func (s *Server) ValidateDataResourceConfig(ctx context.Context, r *tfprotov6.ValidateDataResourceConfigRequest) (*tfprotov6.ValidateDataResourceConfigResponse, error) {
	if err := s.in(r.Config); err != nil {
		return nil, err
	}
	resp, err := s.ProviderServer.ValidateDataResourceConfig(ctx, r)
	if err != nil || resp == nil {
		return resp, err
	}
	return resp, s.out(resp.Diagnostics)
}

// ReadDataSource translates configuration and state.
func (s *Server) ReadDataSource(ctx context.Context, r *tfprotov6.ReadDataSourceRequest) (*tfprotov6.ReadDataSourceResponse, error) {
	if err := s.in(r.Config); err != nil {
		return nil, err
	}
	resp, err := s.ProviderServer.ReadDataSource(ctx, r)
	if err != nil || resp == nil {
		return resp, err
	}
	return resp, s.out(resp.Diagnostics, resp.State)
}
