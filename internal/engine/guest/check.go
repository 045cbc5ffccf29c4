//go:build linux

package guest

import (
	"context"
	"errors"
	"io/fs"
	"slices"
	"sync"

	"github.com/pgark/terraform-provider-pgark/internal/engine/job"
	"github.com/pgark/terraform-provider-pgark/internal/engine/objectstore"
	"github.com/pgark/terraform-provider-pgark/internal/engine/postgres"
)

// The majors that pgark protects.
const (
	oldestMajor = 13
	newestMajor = 18
)

// The values of SettingsPolicy.
const (
	restartAllow    = "allow"
	commandReplace  = "replace"
	commandChain    = "chain"
	archiveModeOff  = "off"
	archiveModeOn   = "on"
	archiveAlways   = "always"
	walLevelMinimal = "minimal"
)

// examination is one run of the checks.
type examination struct {
	g        *local
	job      *job.Job
	keys     *objectstore.Credentials
	policy   SettingsPolicy
	deployed bool
	checks   []Check

	causes   []error
	clusters []cluster // that the selection picked
	servers  map[string]*inspected
	refused  map[string]error // why a server that runs is not among servers
}

// Check runs the checks of the machine first, then those of each instance. An instance that is stopped, or cannot be
// asked, has only those that need no answer from it.
func (g *local) Check(ctx context.Context, r CheckRequest) ([]Check, error) {
	e, err := g.examine(ctx, r)
	if err != nil {
		return nil, err
	}
	return e.checks, nil
}

func (g *local) examine(ctx context.Context, r CheckRequest) (*examination, error) {
	j := *r.Job
	j.ApplyDefaults()
	e := &examination{
		g: g, job: &j, keys: r.Credentials, policy: r.Settings, deployed: r.Deployed,
		servers: map[string]*inspected{}, refused: map[string]error{},
	}
	all, err := g.clusters(ctx)
	var hidden *hiddenError
	if err != nil && !errors.As(err, &hidden) {
		return nil, err
	}
	for _, c := range all {
		if !e.selects(c) {
			continue
		}
		// What an earlier job file says of the role is out of date as soon as the job says something else.
		if c.DatabaseUser = j.DatabaseUser; c.DatabaseUser == "" {
			c.DatabaseUser = c.Owner
		}
		e.clusters = append(e.clusters, c)
	}

	var asked sync.WaitGroup
	asked.Go(func() { e.ask(ctx) })
	found := e.lookAtRepository(ctx)
	asked.Wait()

	e.operatingSystem()
	e.executablePlace()
	e.temporaryFolder()
	e.clusterManager()
	e.securityModule()
	e.clock(found)
	e.repository(found)
	switch {
	case hidden != nil:
		e.add(Check{
			Name: "privileges", Status: Fail, Found: hidden.Error(), Expected: "to deploy as root, or as the owner of the instances", Remedy: hidden.remedy,
		})
	case len(e.clusters) == 0:
		e.noInstance(all)
	}
	runners, err := e.runnerStates(ctx)
	if err != nil {
		return nil, err
	}
	for _, c := range e.clusters {
		e.instance(c)
		if state, ok := runners[c.Name]; ok {
			e.runner(state)
		}
	}
	if ctx.Err() != nil {
		return nil, context.Cause(ctx) // half of the checks say nothing
	}
	return e, nil
}

// ask inspects the servers that run.
func (e *examination) ask(ctx context.Context) {
	var mu sync.Mutex // guards servers and refused
	eachServer(ctx, e.clusters, checkTimeout, func(ctx context.Context, n int) error {
		c := e.clusters[n]
		s, err := inspect(ctx, c, e.job, e.altered(c), e.mayRestart())
		if err != nil {
			return err
		}
		if s.stream != nil && postgres.RefusalOf(s.stream.refused) == postgres.RefusedConnections {
			s.stream.ours = isStreaming(e.g.status(ctx, e.job.Name, c.Name))
		}
		mu.Lock()
		defer mu.Unlock()
		e.servers[c.Name] = s
		return nil
	}, func(n int, err error) {
		mu.Lock()
		defer mu.Unlock()
		e.refused[e.clusters[n].Name] = err
	})
}

// altered are the settings that pgark changes in a cluster, or has changed and puts back one day.
func (e *examination) altered(c cluster) []string {
	if !e.manages(c) {
		return nil
	}
	names := []string{archiveCommand}
	r, err := e.g.recall(e.job.Name, c.Instance.Instance)
	if err != nil {
		r = nil
	}
	ours := func(name string) bool { return r != nil && r.Settings[name].Ours != "" }
	for _, name := range restarted {
		if ours(name) {
			names = append(names, name)
		}
	}
	if e.job.WantsSynchronous() || ours(synchronousNames) {
		names = append(names, synchronousNames)
	}
	if r == nil {
		return names
	}
	if e.takesLibraryBack(c) {
		names = append(names, archiveLibrary)
	}
	return names
}

// takesLibraryBack tells whether Apply undoes an archive_library, because it came after us. One that stands in a
// configuration file is for whoever wrote it there to take out.
func (e *examination) takesLibraryBack(c cluster) bool {
	auto, err := readAutoConf(c.DataDirectory)
	return err == nil && alteredLibrary(auto) != "" && e.manages(c) && e.g.configured(e.job.Name, c.Instance.Instance)
}

// manages tells whether pgark changes a cluster's settings. Of a job that is deployed, what it remembers of them tells.
func (e *examination) manages(c cluster) bool {
	if !e.policy.Manage || !e.deployed {
		return e.policy.Manage
	}
	r, err := e.g.readRemembered(e.job.Name, c.Name)
	return err != nil || r != nil
}

func (e *examination) mayRestart() bool {
	return e.policy.Manage && e.policy.Restart == restartAllow
}

func (e *examination) selects(c cluster) bool {
	if len(e.job.Protected) == 0 {
		return e.job.Instances.Match(c.Name)
	}
	for _, i := range e.job.Protected {
		if i.Name == c.Name || i.DataDirectory == c.DataDirectory {
			return true
		}
	}
	return false
}

func (e *examination) add(c Check) { e.checks = append(e.checks, c) }

// failed are the checks that failed; without those that can be done without, if withoutStream is set.
func (e *examination) failed(withoutStream bool) []Check {
	var out []Check
	for _, c := range e.checks {
		if c.Status == Fail && (!withoutStream || !slices.Contains(streamChecks, c.Name)) {
			out = append(out, c)
		}
	}
	return out
}

// owners are the accounts that the instances belong to.
func (e *examination) owners() []account {
	var out []account
	for _, c := range e.clusters {
		if a, err := lookupAccount(c.Owner); err == nil && !slices.ContainsFunc(out, func(o account) bool { return o.uid == a.uid }) {
			out = append(out, a)
		}
	}
	return out
}

// runnerStates are those of the instances of a job that is deployed: nothing is expected of one that is not.
func (e *examination) runnerStates(ctx context.Context) (map[string]InstanceState, error) {
	if !e.deployed {
		return nil, nil
	}
	s, err := e.g.State(ctx, e.job.Name)
	if errors.Is(err, ErrNoJob) || errors.Is(err, fs.ErrPermission) { // the check of privileges says the latter
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	states := map[string]InstanceState{}
	for _, i := range s.Instances {
		states[i.Name] = i
	}
	return states, nil
}
