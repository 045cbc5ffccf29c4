package provider

import (
	"context"
	"errors"
	"fmt"
	"runtime"
	"sync"

	"github.com/hashicorp/terraform-plugin-framework/attr"
	"github.com/hashicorp/terraform-plugin-framework/types"

	"github.com/pgark/terraform-provider-pgark/internal/engine/guest"
	"github.com/pgark/terraform-provider-pgark/internal/engine/guest/remote"
	"github.com/pgark/terraform-provider-pgark/internal/engine/guest/sshlink"
)

// The values of connection.type.
const (
	connectionSSH   = "ssh"
	connectionLocal = "local"
)

// reach is how a host is reached: what its connection attribute says, over which the provider's defaults are laid when it
// is used, and the key that it has shown before.
type reach struct {
	kind        string // connectionSSH or connectionLocal
	port        int64  // 0: the provider's
	user        string // "": the provider's
	bastionHost string // "": the provider's
	declaredKey string // connection.host_key, without its comment; "" if there is none
	pinnedKey   string // host_key of the state; "" before the first contact
}

// newReach reads a connection attribute and the state's host_key. known is false while a part of the connection that
// matters is not known yet; null is the default.
func newReach(connection types.Object, hostKey types.String) (r reach, known bool) {
	r = reach{kind: connectionSSH, pinnedKey: hostKey.ValueString()}
	if connection.IsUnknown() {
		return r, false
	}
	if connection.IsNull() {
		return r, true
	}
	known = true
	word := func(name string) string {
		v, _ := connection.Attributes()[name].(types.String) // the schema says so
		known = known && !v.IsUnknown()
		return v.ValueString()
	}
	port, _ := connection.Attributes()["port"].(types.Int64)
	known = !port.IsUnknown()
	r.port = port.ValueInt64()
	r.kind = firstOf(word("type"), connectionSSH)
	r.user = word("user")
	r.bastionHost = word("bastion_host")
	if declared := word("host_key"); declared != "" {
		r.declaredKey, _ = parseHostKey(declared) // validated
	}
	return r, known
}

// key is the key that the host has to show; "" if none is known but to the known_hosts file.
func (r reach) key() string { return firstOf(r.declaredKey, r.pinnedKey) }

// model is the connection attribute that says this; the pinned key is not part of it.
func (r reach) model() types.Object {
	port := types.Int64Null()
	if r.port != 0 {
		port = types.Int64Value(r.port)
	}
	return types.ObjectValueMust(connectionTypes, map[string]attr.Value{
		"type": types.StringValue(r.kind), "port": port, "user": text(r.user),
		"host_key": text(r.declaredKey), "bastion_host": text(r.bastionHost),
	})
}

// patience says what to do about a host that does not answer.
type patience bool

const (
	tryOnce     patience = false
	waitForHost patience = true // it may still boot
)

// host is a guest as this process reaches it.
type host struct {
	guest.Guest
	remote *remote.Guest // nil for this very machine
	mu     sync.Mutex    // guards arch
	arch   string        // as Go names it; "" before the first call
}

// hostKey is the key that the host has shown; "" for this very machine, and before the first call.
func (h *host) hostKey() string {
	if h.remote == nil {
		return ""
	}
	return h.remote.HostKey()
}

// architecture is that of the guest; "" before the first call.
func (h *host) architecture() string {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.arch
}

func (h *host) learn(arch string) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.arch = arch
}

// errSSHUnknown says that the provider's own configuration has to become known first.
var errSSHUnknown = errors.New("the provider's ssh block is not known yet: it depends on something that this run is about to create")

// endpoint is what makes two connections the same.
type endpoint struct {
	host, user, bastionHost string
	port                    int
	key                     string // that the host has to show
	waits                   patience
}

// guest gives the guest behind a host name. It makes no connection yet. All who reach a host in the same way share one.
func (d *providerData) guest(name string, r reach, p patience) (*host, error) {
	if r.kind == connectionLocal {
		return &host{Guest: guest.Local(d.world.layout()), arch: runtime.GOARCH}, nil
	}
	if d.ssh.unknown {
		return nil, fmt.Errorf("reach %s: %w", name, errSSHUnknown)
	}
	config := d.ssh.config(name, r, p)
	e := endpoint{host: name, user: config.User, port: config.Port, key: config.HostKey, waits: p}
	if config.Bastion != nil {
		e.bastionHost = config.Bastion.Host
	}
	d.hostsMu.Lock()
	defer d.hostsMu.Unlock()
	if h := d.pooled(e); h != nil {
		return h, nil
	}
	link, err := sshlink.New(config)
	if err != nil {
		return nil, err
	}
	h := &host{}
	h.remote = remote.New(remote.Options{Link: link, Root: d.world.there().Root, Runner: func(goarch string) (remote.Runner, error) {
		h.learn(goarch)
		packed, digest, err := d.world.runner(goarch)
		return remote.Runner{Compressed: packed, SHA256: digest}, err
	}})
	h.Guest = h.remote
	d.hosts[e] = h
	return h, nil
}

// pooled finds a connection that serves e: the very same; or one that has shown the key that e demands; or, where e
// demands none, any that leads there; and, if it is open, it does not matter whether it would have waited.
func (d *providerData) pooled(e endpoint) *host {
	if h := d.hosts[e]; h != nil {
		return h
	}
	for other, h := range d.hosts {
		shown := h.hostKey()
		rightKey := other.key == e.key || e.key == "" || shown == e.key
		waited := other.waits == e.waits || shown != ""
		other.key, other.waits = e.key, e.waits
		if other == e && rightKey && waited {
			return h
		}
	}
	return nil
}

// config lays a connection over the provider's defaults.
func (s sshDefaults) config(name string, r reach, p patience) sshlink.Config {
	c := s.host
	c.Host = name
	c.User = firstOf(r.user, c.User)
	if r.port != 0 {
		c.Port = int(r.port)
	}
	c.HostKey = r.declaredKey
	if c.HostKeyPolicy != sshlink.Insecure {
		c.HostKey = r.key()
	}
	if p == waitForHost {
		c.WaitForHost = s.waitForHost
	}
	bastion := s.bastion
	bastion.Host = firstOf(r.bastionHost, bastion.Host)
	if bastion.Host != "" {
		c.Bastion = &bastion
	}
	return c
}

// keepsKeys reports whether what hosts show is pinned.
func (s sshDefaults) keepsKeys() bool { return s.host.HostKeyPolicy != sshlink.Insecure }

// rememberReach lets those that name only a host find how it is reached.
func (d *providerData) rememberReach(name string, r reach) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.reaches[name] = r
}

// heard is how a job of this configuration reaches the host, if this process has heard of one.
func (d *providerData) heard(name string) (reach, bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	r, ok := d.reaches[name]
	return r, ok
}

// reachOf is how this configuration reaches the host of a job: as the job does, if it is in this configuration. The
// process of an apply does not hear of a job that does not change; then this very machine is asked whether it has it.
func (d *providerData) reachOf(ctx context.Context, name, job string) reach {
	if r, ok := d.heard(name); ok {
		return r
	}
	if job != "" && d.holdsLocally(ctx, name, job) {
		return reach{kind: connectionLocal}
	}
	return reach{kind: connectionSSH}
}

// holdsLocally reports whether this very machine is the host, as far as a job file tells.
func (d *providerData) holdsLocally(ctx context.Context, name, job string) bool {
	s, err := guest.Local(d.world.layout()).State(ctx, job)
	return err == nil && s.Job != nil && s.Job.Host == name
}
