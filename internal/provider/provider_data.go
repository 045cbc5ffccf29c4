package provider

import (
	"context"
	"errors"
	"fmt"
	"net/url"
	"strings"
	"sync"
	"time"

	"github.com/aws/aws-sdk-go-v2/config"
	"github.com/hashicorp/terraform-plugin-framework/diag"
	"github.com/hashicorp/terraform-plugin-framework/types"

	"github.com/pgark/terraform-provider-pgark/internal/engine/guest"
	"github.com/pgark/terraform-provider-pgark/internal/engine/job"
	"github.com/pgark/terraform-provider-pgark/internal/engine/objectstore"
	"github.com/pgark/terraform-provider-pgark/internal/engine/repository"
	"github.com/pgark/terraform-provider-pgark/internal/provider/runnerdist"
	"github.com/pgark/terraform-provider-pgark/internal/provider/validators"
)

// The values of prerequisite_checks and on_unreachable.
const (
	checksError      = "error"
	checksWarn       = "warn"
	checksOff        = "off"
	unreachableError = "error"
	unreachableWarn  = "warn"
)

// world is what the provider stands on besides Terraform; tests put parts of their own in its place.
type world struct {
	layout func() job.Layout // of this machine as a guest
	there  func() job.Layout // of guests that are reached over SSH: PGARK_ROOT moves them, too
	// runner gives the runner for an architecture, compressed by gzip, and the SHA-256 of the binary itself; binary gives
	// the binary.
	runner func(goarch string) (compressed []byte, digest string, err error)
	binary func(goarch string) ([]byte, error)
}

func theWorld() world {
	return world{layout: job.FindLayout, there: job.FindLayout, runner: runnerdist.Compressed, binary: runnerdist.Runner}
}

// providerData is what one provider process knows; see the package comment. Safe for concurrent use.
type providerData struct {
	world         world
	checks        string
	onUnreachable string
	s3            s3Defaults
	ssh           sshDefaults

	hostsMu sync.Mutex // guards hosts; key files are read under it
	hosts   map[endpoint]*host

	mu           sync.Mutex // guards what follows; nothing that blocks is called under it
	repositories map[string]knownRepository
	ofJobs       map[string]repositorySettings // how jobs reach repositories, for data sources only
	reaches      map[string]reach              // how jobs reach their hosts
	unread       map[string]diag.Diagnostic    // what ends a plan because of a guest that was not read, by noun and host/name
	checked      map[string]*checkRun
}

// s3Defaults is the provider's s3 block over the environment.
type s3Defaults struct {
	location    repositorySettings
	credentials *objectstore.Credentials
	profile     string
	unknown     bool // some of it is not known yet
}

// knownRepository is a pgark_repository of this configuration.
type knownRepository struct {
	settings repositorySettings
	toCreate bool // planned, not there yet
	changes  bool // is, or will be, created or updated in this run: then the apply's process hears of it too
}

// repositorySettings is how an S3 location is reached, without secrets.
type repositorySettings struct {
	region, endpoint, storageClass string
	usePathStyle                   bool
}

func newProviderData(w world) *providerData {
	return &providerData{
		world:         w,
		checks:        checksError,
		onUnreachable: unreachableError,
		repositories:  map[string]knownRepository{},
		ofJobs:        map[string]repositorySettings{},
		reaches:       map[string]reach{},
		unread:        map[string]diag.Diagnostic{},
		hosts:         map[endpoint]*host{},
		checked:       map[string]*checkRun{},
	}
}

// fromProviderData takes what Configure left. It is nil under terraform validate, where nothing may be asked.
func fromProviderData(data any, diags *diag.Diagnostics) *providerData {
	if data == nil {
		return nil
	}
	d, ok := data.(*providerData)
	if !ok {
		diags.AddError("Unexpected Provider Data", fmt.Sprintf("Expected *providerData, found %T. Please report this to the provider's developers.", data))
		return nil
	}
	return d
}

// ---- prerequisites -----------------------------------------------------------------------------------------------

// digest is that of the runner for an architecture.
func (d *providerData) digest(goarch string) (string, error) {
	_, digest, err := d.world.runner(goarch)
	return digest, err
}

// checkRun is one run of the prerequisite checks, shared by all who ask the same.
type checkRun struct {
	done   chan struct{} // closed when checks and err are set
	checks []guest.Check
	err    error
}

// check runs the prerequisite checks once per question and process: ten plans of one job ask the guest once.
func (d *providerData) check(ctx context.Context, g guest.Guest, host string, r guest.CheckRequest) ([]guest.Check, error) {
	key := fmt.Sprintf("%s\x00%s\x00%s\x00%v", host, r.Job.Name, r.Job.Digest(), r.Settings)
	d.mu.Lock()
	run, running := d.checked[key]
	if !running {
		run = &checkRun{done: make(chan struct{})}
		d.checked[key] = run
	}
	d.mu.Unlock()
	if running {
		select {
		case <-run.done:
			return run.checks, run.err
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		}
	}
	run.checks, run.err = g.Check(ctx, r)
	close(run.done)
	if run.err != nil {
		// A failure to look is no answer to remember.
		d.mu.Lock()
		delete(d.checked, key)
		d.mu.Unlock()
	}
	return run.checks, run.err
}

// ---- repositories ---------------------------------------------------------------------------------------------------

// locationQuery splits what a URL's query says of a location off the URL: s3://b/p?region=…&endpoint=…&path_style=true.
func locationQuery(raw string) (plain string, s repositorySettings) {
	plain, query, _ := strings.Cut(raw, "?")
	plain = strings.TrimRight(plain, "/")
	if plain == "file:" {
		plain = "file:///"
	}
	values, err := url.ParseQuery(query)
	if err != nil {
		return plain, s // checkLocation refuses it
	}
	s.region = values.Get("region")
	s.endpoint = values.Get("endpoint")
	s.storageClass = values.Get("storage_class")
	s.usePathStyle = values.Get("path_style") == "true"
	return plain, s
}

var checkPlainLocation = validators.Job(func(j *job.Job, url string) { j.Repository.URL = url })

// checkLocation is the rule for repository URLs; the part before the query is the engine's own rule.
func checkLocation(raw string) error {
	plain, query, found := strings.Cut(raw, "?")
	if err := checkPlainLocation(plain); err != nil {
		return err
	}
	if !found {
		return nil
	}
	values, err := url.ParseQuery(query)
	if err != nil {
		return fmt.Errorf("repository %q: the part after ? is malformed", plain)
	}
	for name := range values {
		switch name {
		case "region", "endpoint", "storage_class":
		case "path_style":
			if v := values.Get(name); v != "true" && v != "false" {
				return fmt.Errorf("repository %q: path_style=%s: expected true or false", plain, v)
			}
		default:
			return fmt.Errorf("repository %q: unknown parameter %q; region, endpoint, path_style and storage_class are known", plain, name)
		}
	}
	return nil
}

// known finds the pgark_repository of this configuration with the URL, as far as this process has heard of it.
func (d *providerData) known(raw string) (knownRepository, bool) {
	plain, _ := locationQuery(raw)
	d.mu.Lock()
	defer d.mu.Unlock()
	k, ok := d.repositories[plain]
	return k, ok
}

// fallback is how a repository is reached that no pgark_repository says anything of: as its URL says, else the provider.
// It needs nothing but configuration, so plan and apply always agree on it.
func (d *providerData) fallback(raw string) repositorySettings {
	plain, query := locationQuery(raw)
	if isFile(plain) {
		return repositorySettings{}
	}
	return d.fill(query)
}

// resolve says how a data source reaches a repository.
func (d *providerData) resolve(raw string) repositorySettings {
	if k, ok := d.known(raw); ok {
		return k.settings
	}
	plain, _ := locationQuery(raw)
	d.mu.Lock()
	defer d.mu.Unlock()
	if s, ok := d.ofJobs[plain]; ok {
		return s
	}
	return d.fallback(raw)
}

// rememberOfJob lets data sources that are read in an apply find a repository which does not change itself.
func (d *providerData) rememberOfJob(raw string, s repositorySettings) {
	plain, _ := locationQuery(raw)
	d.mu.Lock()
	defer d.mu.Unlock()
	d.ofJobs[plain] = s
}

// fill puts the provider's defaults where s says nothing.
func (d *providerData) fill(s repositorySettings) repositorySettings {
	s.region = firstOf(s.region, d.s3.location.region)
	s.endpoint = firstOf(s.endpoint, d.s3.location.endpoint)
	s.usePathStyle = s.usePathStyle || d.s3.location.usePathStyle
	return s
}

func (d *providerData) rememberRepository(raw string, r knownRepository) {
	plain, _ := locationQuery(raw)
	d.mu.Lock()
	defer d.mu.Unlock()
	d.repositories[plain] = r
}

// repositoryToCreate reports whether the plan will create the repository first.
func (d *providerData) repositoryToCreate(raw string) bool {
	k, _ := d.known(raw)
	return k.toCreate
}

// open opens a repository's store with the provider's own keys. patience bounds the retries of one request: short where
// a user waits for a plan.
func (d *providerData) open(ctx context.Context, raw string, s repositorySettings, patience time.Duration) (objectstore.Store, error) {
	plain, _ := locationQuery(raw)
	return objectstore.Open(ctx, objectstore.Location{
		URL:          plain,
		Region:       s.region,
		Endpoint:     s.endpoint,
		UsePathStyle: s.usePathStyle,
		StorageClass: s.storageClass,
		Credentials:  d.s3.credentials,
		Profile:      d.s3.profile,
	}, objectstore.Options{MaxElapsed: patience, AttemptTimeout: min(patience, 30*time.Second)})
}

// openRepository opens a repository for reading its unencrypted parts.
func (d *providerData) openRepository(ctx context.Context, raw string, s repositorySettings, patience time.Duration) (*repository.Repository, error) {
	store, err := d.open(ctx, raw, s, patience)
	if err != nil {
		return nil, err
	}
	return repository.Open(ctx, store)
}

// errNoKeys says that there is nothing to hand over to a guest.
var errNoKeys = errors.New("the provider has no S3 keys to hand over to the guest")

// keysForGuest gives the keys that this process uses itself, for a guest's credentials file.
func (d *providerData) keysForGuest(ctx context.Context) (keys *objectstore.Credentials, expires bool, err error) {
	if d.s3.credentials != nil {
		return d.s3.credentials, d.s3.credentials.SessionToken != "", nil
	}
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second) // the chain's last link asks a metadata service that may not answer
	defer cancel()
	var options []func(*config.LoadOptions) error
	if d.s3.profile != "" {
		options = append(options, config.WithSharedConfigProfile(d.s3.profile))
	}
	c, err := config.LoadDefaultConfig(ctx, options...)
	if err != nil {
		return nil, false, fmt.Errorf("%w: %w", errNoKeys, err)
	}
	v, err := c.Credentials.Retrieve(ctx)
	if err != nil {
		return nil, false, fmt.Errorf("%w: %w", errNoKeys, err)
	}
	return &objectstore.Credentials{AccessKeyID: v.AccessKeyID, SecretAccessKey: v.SecretAccessKey, SessionToken: v.SessionToken},
		v.CanExpire || v.SessionToken != "", nil
}

// withSettings writes a URL that says how the repository is reached; locationQuery reads it.
func withSettings(raw string, s repositorySettings) string {
	plain, _ := locationQuery(raw)
	q := url.Values{}
	for name, value := range map[string]string{"region": s.region, "endpoint": s.endpoint, "storage_class": s.storageClass} {
		if value != "" {
			q.Set(name, value)
		}
	}
	if s.usePathStyle {
		q.Set("path_style", "true")
	}
	if len(q) == 0 {
		return plain
	}
	return plain + "?" + q.Encode() // sorted by name
}

// repositorySettingsModel is the attribute repository_settings.
type repositorySettingsModel struct {
	Region       types.String `tfsdk:"region"`
	Endpoint     types.String `tfsdk:"endpoint"`
	UsePathStyle types.Bool   `tfsdk:"use_path_style"`
	StorageClass types.String `tfsdk:"storage_class"`
}

func (m repositorySettingsModel) settings() repositorySettings {
	return repositorySettings{
		region:       m.Region.ValueString(),
		endpoint:     m.Endpoint.ValueString(),
		usePathStyle: m.UsePathStyle.ValueBool(),
		storageClass: m.StorageClass.ValueString(),
	}
}

func (s repositorySettings) model() repositorySettingsModel {
	return repositorySettingsModel{
		Region:       text(s.region),
		Endpoint:     text(s.endpoint),
		UsePathStyle: types.BoolValue(s.usePathStyle),
		StorageClass: text(s.storageClass),
	}
}
