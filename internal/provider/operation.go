package provider

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/hashicorp/terraform-plugin-framework-timeouts/resource/timeouts"
	"github.com/hashicorp/terraform-plugin-framework/diag"
	"github.com/hashicorp/terraform-plugin-framework/path"
	"github.com/hashicorp/terraform-plugin-framework/resource"
	"github.com/hashicorp/terraform-plugin-framework/tfsdk"
	"github.com/hashicorp/terraform-plugin-framework/types"

	"github.com/pgark/terraform-provider-pgark/internal/engine/guest/sshlink"
)

// onHost is the model of a resource that stands on a host.
type onHost interface {
	place() place
	limits() timeouts.Value
}

// place is where a resource stands, and what it is called there.
type place struct {
	noun          string // "WAL Retention"
	host          types.String
	nameAttribute string // the name's, in identity and schema
	name          types.String
	connection    types.Object
	hostKey       types.String
}

// title is what diagnostics call the resource: host/name, as an import does.
func (p place) title() string { return p.host.ValueString() + "/" + p.name.ValueString() }

// verb is what is done to a resource: its word in diagnostics, its time limit, and what it does about a silent host.
type verb struct {
	word     string
	limit    func(timeouts.Value, context.Context, time.Duration) (time.Duration, diag.Diagnostics)
	patience patience
}

var (
	creating = verb{"Create", timeouts.Value.Create, waitForHost}
	reading  = verb{"Read", timeouts.Value.Read, tryOnce}
	updating = verb{"Update", timeouts.Value.Update, tryOnce}
	deleting = verb{"Delete", timeouts.Value.Delete, tryOnce}
)

// operation is one call of Terraform about a resource on a host.
type operation struct {
	verb
	place

	data  *providerData
	diags *diag.Diagnostics
}

// source is a plan, a state or a configuration.
type source interface {
	Get(context.Context, any) diag.Diagnostics
}

// operate reads the resource's model, sets its identity, and does what is to be done within its time limit. Identity comes
// first in every call, also where the object turns out to be gone: Terraform refuses an answer without it. It is nil
// for a deletion, which has no answer.
func operate[M onHost](ctx context.Context, d *providerData, v verb, from source, id *tfsdk.ResourceIdentity, limit time.Duration, diags *diag.Diagnostics,
	do func(context.Context, *operation, M),
) {
	var m M
	diags.Append(from.Get(ctx, &m)...)
	if diags.HasError() {
		return
	}
	o := &operation{verb: v, place: m.place(), data: d, diags: diags}
	if id != nil {
		setIdentity(ctx, id, diags, o.host, o.nameAttribute, o.name)
	}
	limit, found := v.limit(m.limits(), ctx, limit)
	diags.Append(found...)
	if diags.HasError() {
		return
	}
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	do(ctx, o, m)
}

// identity is what identities of requests and responses can do.
type identity interface {
	SetAttribute(context.Context, path.Path, any) diag.Diagnostics
}

func setIdentity(ctx context.Context, id identity, diags *diag.Diagnostics, host types.String, nameAttribute string, name types.String) {
	diags.Append(id.SetAttribute(ctx, path.Root("host"), host)...)
	diags.Append(id.SetAttribute(ctx, path.Root(nameAttribute), name)...)
}

// reach gives the guest that the resource stands on.
func (o *operation) reach() (*host, error) {
	r, _ := newReach(o.connection, o.hostKey)
	return o.data.guest(o.host.ValueString(), r, o.patience)
}

// guest is reach; nil after an error, which is reported.
func (o *operation) guest() *host {
	g, err := o.reach()
	if err != nil {
		o.failed(err)
		return nil
	}
	return g
}

// follow takes the connection of a resource that declares none; the key that a job's host has shown is part of it.
func (o *operation) follow(connection types.Object) {
	o.connection = connection
	if heard, ok := o.data.heard(o.host.ValueString()); ok && heard.model().Equal(connection) && o.hostKey.ValueString() == "" {
		o.hostKey = text(heard.pinnedKey)
	}
}

// failed reports why the guest did not do what it was asked for.
func (o *operation) failed(err error) {
	o.diags.Append(guestProblem(o.word, o.noun, o.name.ValueString(), o.host.ValueString(), err))
}

// reached notes how the host was reached, and gives the key to keep of it: null where keys are not kept.
func (o *operation) reached(g *host) types.String {
	r, _ := newReach(o.connection, o.hostKey)
	if r.kind == connectionLocal {
		return types.StringNull()
	}
	if !o.data.ssh.keepsKeys() {
		return text(r.pinnedKey)
	}
	r.pinnedKey = g.hostKey()
	return text(r.pinnedKey)
}

// ---- guests that could not be read ----------------------------------------------------------------------------------

// unreadKey is the private state that says whether the last refresh could not read the guest.
const unreadKey = "unread"

// couldNotRead leaves the state as it was. "Could not look" is never "gone": it is an error, or a warning if the provider says
// so. Before the first successful read, which is after an import, there is nothing to go on with.
//
// What a wrong host key means is for the plan to say (planUnread): Read does not see the configuration, where the key of a
// host that was set up anew may have been declared. It is fatal there whatever on_unreachable says.
func (o *operation) couldNotRead(ctx context.Context, err error, first bool, private privateStateWriter) {
	if first {
		o.diags.Append(notImported(o.noun, o.name.ValueString(), o.host.ValueString(), err))
		return
	}
	if errors.Is(err, errSSHUnknown) {
		return
	}
	problem := unreachable(o.noun, o.name.ValueString(), o.host.ValueString(), err)
	if _, wrongKey := errors.AsType[*sshlink.HostKeyError](err); wrongKey {
		o.data.noteUnread(o.noun, o.title(), problem)
		o.diags.AddAttributeWarning(path.Root("host"), fmt.Sprintf("%s Was Not Read", o.host.ValueString()),
			sentence(err.Error())+" What was known of it last stays.")
	} else if o.data.onUnreachable == unreachableWarn {
		o.diags.Append(asWarning(problem))
	} else {
		o.diags.Append(problem)
		return
	}
	o.diags.Append(private.SetKey(ctx, unreadKey, []byte("true"))...)
}

// hasRead ends what couldNotRead began.
func (o *operation) hasRead(ctx context.Context, private privateStateWriter) {
	o.data.noteUnread(o.noun, o.title(), nil)
	o.diags.Append(private.SetKey(ctx, unreadKey, []byte("false"))...)
}

// planUnread says what a failed refresh means for the plan: a wrong host key ends it, else it goes on from what was known
// last. Where the plan changes the connection the failure means nothing: renewed is true, all that the guest has is
// unknown, and the update will look. Both processes of a change come to that same answer.
func (d *providerData) planUnread(ctx context.Context, p, state place, private privateState, diags *diag.Diagnostics) (unread, renewed bool) {
	b, found := private.GetKey(ctx, unreadKey)
	diags.Append(found...)
	if string(b) != "true" {
		return false, false
	}
	if !p.connection.Equal(state.connection) {
		return true, true
	}
	if problem := d.unreadProblem(p.noun, p.title()); problem != nil {
		diags.Append(problem)
	}
	return true, false
}

// noteUnread keeps, for the plan of the same process, why it cannot go on without the guest; nil: it can.
func (d *providerData) noteUnread(noun, title string, problem diag.Diagnostic) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if problem == nil {
		delete(d.unread, noun+" "+title)
		return
	}
	d.unread[noun+" "+title] = problem
}

func (d *providerData) unreadProblem(noun, title string) diag.Diagnostic {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.unread[noun+" "+title]
}

// planHostKey is the host_key that a plan promises: the one that is pinned, or the one that is declared now.
func planHostKey(create bool, planned, state place) types.String {
	r, known := newReach(planned.connection, types.StringNull())
	switch {
	case !known:
		return types.StringUnknown()
	case r.kind == connectionLocal:
		return types.StringNull()
	case create:
		return types.StringUnknown()
	case r.declaredKey != "":
		return types.StringValue(r.declaredKey)
	}
	if before, _ := newReach(state.connection, types.StringNull()); before.kind == connectionLocal {
		return types.StringUnknown()
	}
	return state.hostKey
}

// importPair begins an import: of "host/name", split at the first slash, or of the identity's attributes. How the host is
// reached an import cannot say: as a job of this configuration reaches it; if this machine holds the job, as this machine;
// else over SSH, as the provider's ssh block says.
func (d *providerData) importPair(ctx context.Context, nameAttribute string, req resource.ImportStateRequest, resp *resource.ImportStateResponse) {
	diags := &resp.Diagnostics
	var host, name string
	if req.ID == "" {
		diags.Append(req.Identity.GetAttribute(ctx, path.Root("host"), &host)...)
		diags.Append(req.Identity.GetAttribute(ctx, path.Root(nameAttribute), &name)...)
	} else {
		host, name, _ = strings.Cut(req.ID, "/")
		if host == "" || name == "" {
			diags.AddError("Invalid Import ID", fmt.Sprintf("Found %q, expected HOST/%s, as in db1.example.com/orders.", req.ID, strings.ToUpper(nameAttribute)))
		}
	}
	if diags.HasError() {
		return
	}
	setIdentity(ctx, resp.Identity, diags, types.StringValue(host), nameAttribute, types.StringValue(name))
	r := d.reachOf(ctx, host, name)
	for attribute, value := range map[string]any{"host": host, nameAttribute: name, connectionName: r.model(), "host_key": text(r.pinnedKey)} {
		diags.Append(resp.State.SetAttribute(ctx, path.Root(attribute), value)...)
	}
}
