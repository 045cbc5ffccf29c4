package provider

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/hashicorp/terraform-plugin-framework/diag"
	"github.com/hashicorp/terraform-plugin-framework/path"
	"github.com/hashicorp/terraform-plugin-framework/resource"
	"github.com/hashicorp/terraform-plugin-framework/resource/identityschema"

	"github.com/pgark/terraform-provider-pgark/internal/engine/guest"
	"github.com/pgark/terraform-provider-pgark/internal/engine/job"
	"github.com/pgark/terraform-provider-pgark/internal/engine/objectstore"
	"github.com/pgark/terraform-provider-pgark/internal/engine/repository"
)

// The default limits of the job's operations. Create and Update deploy and prove one WAL segment's way; the first image
// takes its own time, in the runner.
const (
	jobCreateTimeout = 10 * time.Minute
	jobReadTimeout   = 2 * time.Minute // the runner may have to be sent first
	jobUpdateTimeout = 10 * time.Minute
	jobDeleteTimeout = 10 * time.Minute
	jobPlanTimeout   = 2 * time.Minute // all that a plan asks a guest for one job
)

const jobNoun = "PostgreSQL Backup Job"

type backupJobResource struct{ data *providerData }

func newBackupJobResource() resource.Resource { return &backupJobResource{} }

var (
	_ resource.ResourceWithConfigure      = (*backupJobResource)(nil)
	_ resource.ResourceWithIdentity       = (*backupJobResource)(nil)
	_ resource.ResourceWithImportState    = (*backupJobResource)(nil)
	_ resource.ResourceWithModifyPlan     = (*backupJobResource)(nil)
	_ resource.ResourceWithValidateConfig = (*backupJobResource)(nil)
)

func (r *backupJobResource) Metadata(_ context.Context, req resource.MetadataRequest, resp *resource.MetadataResponse) {
	resp.TypeName = req.ProviderTypeName + "_postgresql_backup_job"
}

func (r *backupJobResource) Configure(_ context.Context, req resource.ConfigureRequest, resp *resource.ConfigureResponse) {
	r.data = fromProviderData(req.ProviderData, &resp.Diagnostics)
}

func (r *backupJobResource) IdentitySchema(_ context.Context, _ resource.IdentitySchemaRequest, resp *resource.IdentitySchemaResponse) {
	resp.IdentitySchema = identityschema.Schema{Attributes: map[string]identityschema.Attribute{
		"host": identityschema.StringAttribute{RequiredForImport: true, Description: "The guest."},
		"name": identityschema.StringAttribute{RequiredForImport: true, Description: "Name of the job."},
	}}
}

func (r *backupJobResource) ValidateConfig(ctx context.Context, req resource.ValidateConfigRequest, resp *resource.ValidateConfigResponse) {
	var m backupJobModel
	diags := &resp.Diagnostics
	diags.Append(req.Config.Get(ctx, &m)...)
	if diags.HasError() {
		return
	}
	wal := decode[walModel](ctx, m.WAL, diags)
	const servers = "log_shipping_servers"
	instead := "Guests that reach the repository themselves need none: transport = \"automatic\" or \"direct\"."
	if wal.Transport.ValueString() == servers {
		diags.Append(notInThisBuild(path.Root("wal").AtName("transport"), `transport "log_shipping_servers"`, instead))
	} else if len(wal.LogShippingServers.Elements()) > 0 {
		diags.Append(notInThisBuild(path.Root("wal").AtName(servers), servers, instead))
	}

	validateWAL(wal, diags)

	image := decode[imageModel](ctx, m.Image, diags)
	if m.WaitForFirstImage.ValueBool() && !image.OnCreate.IsNull() && !image.OnCreate.IsUnknown() && !image.OnCreate.ValueBool() {
		diags.AddAttributeError(path.Root("wait_for_first_image"), "Invalid Combination",
			"With image.on_create = false the first image comes when the schedule says so; apply cannot wait for that.")
	}

	c := decode[credentialsModel](ctx, m.Credentials, diags)
	if m.Credentials.IsNull() || c.Source.IsUnknown() {
		return
	}
	given := !c.AccessKeyID.IsNull()
	switch source := firstOf(c.Source.ValueString(), credentialsProvider); {
	case source == credentialsStatic && !given:
		diags.AddAttributeError(path.Root("credentials"), "Invalid Combination",
			`source = "static" needs access_key_id, secret_access_key_wo and secret_access_key_wo_version.`)
	case source != credentialsStatic && given:
		diags.AddAttributeError(path.Root("credentials").AtName("access_key_id"), "Invalid Combination",
			fmt.Sprintf("Keys are given here, but source is %q: they would not be used. To use them, set source = \"static\".", source))
	}
}

// validateWAL looks at what only several attributes of wal tell together. Defaults are not in a configuration.
func validateWAL(w walModel, diags *diag.Diagnostics) {
	invalid := func(attribute, detail string) {
		diags.AddAttributeError(path.Root("wal").AtName(attribute), "Invalid Combination", detail)
	}
	interval := w.Mode.ValueString() == job.WALInterval
	if w.Synchronous.ValueBool() && interval {
		invalid("synchronous", "With mode = \"interval\" nothing is streamed that a commit could wait for. Use mode = \"continuous\", or leave out synchronous.")
	}
	if w.Synchronous.ValueBool() && w.MaxRequestsPerHour.ValueInt64() > 0 {
		invalid("max_requests_per_hour", "With synchronous = true every commit takes a request and waits for it; with a budget, commits would wait until it allows for the next one. Leave out one of the two.")
	}
	if w.Slot.ValueBool() && interval {
		invalid("slot", "With mode = \"interval\" nothing is streamed, so that a replication slot would never move, and hold back WAL until its limit. Use mode = \"continuous\", or leave out slot.")
	}
}

// ---- create, read, update, delete -----------------------------------------------------------------------------------

func (r *backupJobResource) Create(ctx context.Context, req resource.CreateRequest, resp *resource.CreateResponse) {
	operate(ctx, r.data, creating, req.Plan, resp.Identity, jobCreateTimeout, &resp.Diagnostics, func(ctx context.Context, o *operation, m backupJobModel) {
		// What is known only in the apply is checked here for the first time, before anything is changed.
		g, keys, ok := r.ready(ctx, o, m, req.Config)
		if !ok {
			return
		}

		// From here on the guest changes: let Terraform know of the job even if this process does not live to its end.
		early := m
		early.HostKey = o.reached(g)
		early.nullUnknown()
		o.diags.Append(resp.State.Set(ctx, &early)...)
		if o.diags.HasError() {
			return
		}
		r.deploy(ctx, o, g, &m, keys, nil, resp.Private)
		if o.diags.HasError() {
			return
		}
		o.diags.Append(resp.State.Set(ctx, &m)...)
		if m.WaitForFirstImage.ValueBool() {
			r.waitForFirstImage(ctx, m, o.diags)
		}
	})
}

// ready reaches the guest, finds its keys and makes the prerequisite checks an apply has to pass.
func (r *backupJobResource) ready(ctx context.Context, o *operation, m backupJobModel, from source) (*host, *objectstore.Credentials, bool) {
	var config backupJobModel
	o.diags.Append(from.Get(ctx, &config)...)
	g := o.guest()
	if g == nil {
		return nil, nil, false
	}
	keys := r.credentials(ctx, m, config, o.diags)
	if o.diags.HasError() {
		return nil, nil, false
	}
	if r.data.checks == checksError {
		found, err := r.check(ctx, g, m, keys, o.diags)
		if err != nil {
			o.failed(err)
		}
		for _, d := range found {
			if d.Severity() == diag.SeverityError { // the plan has shown the warnings
				o.diags.Append(d)
			}
		}
	}
	return g, keys, !o.diags.HasError()
}

// deploy makes the guest match the model, and the model the guest.
func (r *backupJobResource) deploy(ctx context.Context, o *operation, g *host, m *backupJobModel, keys *objectstore.Credentials, prior *remembered, private privateStateWriter) {
	declared := m.toJob(ctx, o.diags)
	d := guest.Deployment{Job: declared, Credentials: keys, KeepRunner: m.keepsRunner(), Settings: m.repairPolicy(ctx, o.diags), WithoutStream: r.data.checks != checksError}
	if o.diags.HasError() {
		return
	}
	if g.remote == nil { // the other end of a connection has its runner already
		var err error
		if d.Runner, err = r.data.world.binary(g.architecture()); err != nil {
			o.failed(err)
			return
		}
	}
	state, err := g.Apply(ctx, d)
	if err != nil {
		if owned, ok := errors.AsType[*repository.OwnedError](err); ok {
			o.diags.AddAttributeError(path.Root("name"), fmt.Sprintf("Job Name %q Belongs to Another Machine", m.Name.ValueString()),
				sentence(owned.Error())+"\n\nA job name has one owner in a repository, so that two machines never write into one another's backups. Choose another name, or another repository.")
			return
		}
		if unmet, ok := errors.AsType[*guest.PrerequisiteError](err); ok {
			for _, c := range unmet.Checks {
				o.diags.Append(prerequisiteNotMet(checkPath(c.Name), m.Host.ValueString(), c))
			}
			return
		}
		o.failed(err)
		return
	}
	planned := *m
	m.fromState(ctx, state, o.diags)
	m.HostKey = o.reached(g)
	m.keepPlanned(planned)
	reached, _ := newReach(m.Connection, m.HostKey)
	r.data.rememberReach(m.Host.ValueString(), reached)

	known := deployed(state, g.architecture())
	if prior != nil {
		known.Location = prior.Location
	}
	known.noteRepository(r.data, m.Repository.ValueString())
	o.diags.Append(known.save(ctx, private)...)
	o.hasRead(ctx, private)
}

func (r *backupJobResource) Read(ctx context.Context, req resource.ReadRequest, resp *resource.ReadResponse) {
	operate(ctx, r.data, reading, req.State, resp.Identity, jobReadTimeout, &resp.Diagnostics, func(ctx context.Context, o *operation, m backupJobModel) {
		name := m.Name.ValueString()
		reached, _ := newReach(m.Connection, m.HostKey)
		r.data.rememberReach(m.Host.ValueString(), reached)
		before, d := recall(ctx, req.Private)
		o.diags.Append(d...)
		g, err := o.reach()
		var state *guest.State
		if err == nil {
			state, err = g.State(ctx, name)
		}
		if errors.Is(err, guest.ErrNoJob) {
			resp.State.RemoveResource(ctx) // the guest was read, and it holds nothing of the job
			return
		}
		var instances []guest.Instance
		if err == nil {
			instances, err = g.Discover(ctx)
		}
		if err != nil {
			o.couldNotRead(ctx, err, m.Repository.IsNull(), resp.Private)
			return
		}
		o.hasRead(ctx, resp.Private)
		m.fromState(ctx, state, o.diags)
		m.HostKey = o.reached(g)
		wanted, _ := r.data.digest(g.architecture()) // where there is none, the plan says so
		known := looked(before, state, instances, g.architecture(), wanted)
		known.noteRepository(r.data, m.Repository.ValueString())
		o.diags.Append(known.save(ctx, resp.Private)...)
		o.diags.Append(resp.State.Set(ctx, &m)...)
	})
}

// Update deploys, unless nothing that changes concerns the guest. A new connection has to lead to the same machine.
func (r *backupJobResource) Update(ctx context.Context, req resource.UpdateRequest, resp *resource.UpdateResponse) {
	operate(ctx, r.data, updating, req.Plan, resp.Identity, jobUpdateTimeout, &resp.Diagnostics, func(ctx context.Context, o *operation, m backupJobModel) {
		var state backupJobModel
		o.diags.Append(req.State.Get(ctx, &state)...)
		if o.diags.HasError() {
			return
		}
		switch {
		case m.concernsGuest(state):
			g, keys, ok := r.ready(ctx, o, m, req.Config)
			if !ok {
				return
			}
			prior, d := recall(ctx, req.Private)
			o.diags.Append(d...)
			r.deploy(ctx, o, g, &m, keys, prior, resp.Private)
		case !m.Connection.Equal(state.Connection):
			r.reconnect(ctx, o, &m)
		}
		if o.diags.HasError() {
			return
		}
		o.diags.Append(resp.State.Set(ctx, &m)...)
	})
}

// reconnect looks whether a changed connection leads to the guest, and changes nothing there.
func (r *backupJobResource) reconnect(ctx context.Context, o *operation, m *backupJobModel) {
	g := o.guest()
	if g == nil {
		return
	}
	machine, err := g.Machine(ctx)
	if err != nil {
		o.failed(err)
		return
	}
	if known := m.MachineID.ValueString(); known != "" && machine.ID != known {
		o.diags.AddAttributeError(path.Root(connectionName), fmt.Sprintf("The Connection Leads to Another Machine Than That of Job %q", m.Name.ValueString()),
			fmt.Sprintf("Found the machine %s (%s), expected %s. Nothing was changed there.\n\nThe connection says how %s is reached; a job for another machine is another resource, or has another host.",
				machine.ID, machine.Host, known, m.Host.ValueString()))
		return
	}
	if m.HostKey.IsUnknown() {
		m.HostKey = o.reached(g)
	}
}

// Delete takes away whatever is there of the job, also half of it. It asks for no prerequisite: what cannot be
// protected can still be given up.
func (r *backupJobResource) Delete(ctx context.Context, req resource.DeleteRequest, resp *resource.DeleteResponse) {
	operate(ctx, r.data, deleting, req.State, nil, jobDeleteTimeout, &resp.Diagnostics, func(ctx context.Context, o *operation, m backupJobModel) {
		g := o.guest()
		if g == nil {
			return
		}
		if err := g.Remove(ctx, m.Name.ValueString()); err != nil {
			o.failed(err)
			return
		}
		if m.DeletionPolicy.ValueString() == deleteBackups {
			r.deleteBackups(ctx, m, o.diags)
		}
	})
}

// ImportState takes host/name, or the identity. The guest says the rest.
func (r *backupJobResource) ImportState(ctx context.Context, req resource.ImportStateRequest, resp *resource.ImportStateResponse) {
	r.data.importPair(ctx, "name", req, resp)
}
