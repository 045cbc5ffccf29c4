package main

import (
	"context"
	"errors"
	"fmt"
	"net/url"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"filippo.io/age"
	"github.com/spf13/cobra"

	"github.com/pgark/terraform-provider-pgark/internal/engine/job"
	"github.com/pgark/terraform-provider-pgark/internal/engine/objectstore"
	"github.com/pgark/terraform-provider-pgark/internal/engine/postgres"
	"github.com/pgark/terraform-provider-pgark/internal/engine/repository"
)

// identityVariable names the file that holds the age identities for reading an encrypted repository.
const identityVariable = "PGARK_IDENTITY_FILE"

// target is what a command works on: a job of this guest, or a repository and series anywhere.
type target struct {
	Job        string
	Instance   string
	Repository string
	Series     string
	Endpoint   string
	Region     string
	PathStyle  bool
	JSON       bool

	Layout job.Layout
}

// addTarget registers the flags that every command has, and returns what they will hold.
func addTarget(cmd *cobra.Command) *target {
	t := &target{Layout: job.FindLayout()}
	f := cmd.Flags()
	f.StringVar(&t.Job, "job", "", "job of this guest, as declared in Terraform")
	f.StringVar(&t.Instance, "instance", "", "instance of the job, like 15-main (default: the only one)")
	f.StringVar(&t.Repository, "repository", "", "repository URL, s3://BUCKET/PREFIX or file:///PATH, instead of --job")
	f.StringVar(&t.Series, "series", "", "series in the repository: JOB, JOB/INSTANCE or JOB/INSTANCE/SYSTEM-ID")
	f.StringVar(&t.Endpoint, "endpoint", "", "S3 endpoint URL (default: AWS_ENDPOINT_URL, else AWS)")
	f.StringVar(&t.Region, "region", "", "S3 region (default: the AWS chain)")
	f.BoolVar(&t.PathStyle, "path-style", false, "address buckets in the path rather than the host name")
	f.BoolVar(&t.JSON, "json", false, "print one JSON document")
	return t
}

// opened is a target within reach.
type opened struct {
	Repository *repository.Repository
	Location   objectstore.Location
	Job        *job.Job // nil without --job
	Selector   selector
	IDs        []repository.SeriesID // what the flags select, in order; of a job, its instances whether or not stored yet
}

// selector is a parsed --series, or what --job and --instance amount to; empty fields select everything.
type selector struct {
	Job, Instance string
	SystemID      postgres.SystemID
}

func (s selector) matches(id repository.SeriesID) bool {
	return (s.Job == "" || s.Job == id.Job) && (s.Instance == "" || s.Instance == id.Instance) &&
		(s.SystemID == 0 || s.SystemID == id.SystemID)
}

func (s selector) String() string {
	var parts []string
	for _, p := range []string{s.Job, s.Instance} {
		if p != "" {
			parts = append(parts, p)
		}
	}
	if s.SystemID != 0 {
		parts = append(parts, s.SystemID.String())
	}
	if len(parts) == 0 {
		return "any series"
	}
	return strings.Join(parts, "/")
}

func parseSelector(s string) (selector, error) {
	var sel selector
	parts := strings.Split(strings.Trim(s, "/"), "/")
	if len(parts) > 3 {
		return sel, usageError(fmt.Errorf("--series %q: found %d parts, expected JOB, JOB/INSTANCE or JOB/INSTANCE/SYSTEM-ID", s, len(parts)))
	}
	sel.Job = parts[0]
	if len(parts) > 1 {
		sel.Instance = parts[1]
	}
	if len(parts) > 2 {
		id, err := postgres.ParseSystemID(parts[2])
		if err != nil {
			return sel, usageError(fmt.Errorf("--series %q: %w", s, err))
		}
		sel.SystemID = id
	}
	return sel, nil
}

// open reads job file and credentials, or takes the repository's address from flags and environment, and opens the
// repository. It finds which series the flags select; finding none is no error here.
func (t *target) open(ctx context.Context) (*opened, error) {
	o := &opened{}
	var err error
	if o.Job, o.Location, err = t.locate(); err != nil {
		return nil, err
	}
	if o.Selector, err = t.selector(); err != nil {
		return nil, err
	}
	identities, err := readIdentities()
	if err != nil {
		return nil, err
	}
	store, err := objectstore.Open(ctx, o.Location, objectstore.Options{})
	if err != nil {
		return nil, err
	}
	if o.Repository, err = repository.Open(ctx, store, identities...); err != nil {
		return nil, fmt.Errorf("open repository %s: %w", store.URL(), err)
	}
	ids, err := o.Repository.SeriesList(ctx, o.Selector.Job, o.Selector.Instance)
	if err != nil {
		return nil, fmt.Errorf("list series in %s: %w", store.URL(), err)
	}
	for _, id := range ids {
		if o.Selector.matches(id) {
			o.IDs = append(o.IDs, id)
		}
	}
	return o, nil
}

// locate tells where the repository is, without opening it.
func (t *target) locate() (*job.Job, objectstore.Location, error) {
	var loc objectstore.Location
	switch {
	case t.Job != "" && t.Repository != "":
		return nil, loc, usageError(errors.New("--job and --repository exclude each other: a job names its repository"))
	case t.Job == "" && t.Repository == "":
		hint := ""
		if names := t.jobsHere(); len(names) > 0 {
			hint = "\nhint: jobs of this guest: " + strings.Join(names, ", ")
		}
		return nil, loc, usageError(fmt.Errorf("neither --job nor --repository is given%s", hint))
	case t.Job != "":
		j, err := t.readJob()
		if err != nil {
			return nil, loc, err
		}
		loc = objectstore.Location{
			URL: j.Repository.URL, Region: j.Repository.Region, Endpoint: j.Repository.Endpoint,
			UsePathStyle: j.Repository.UsePathStyle, StorageClass: j.Repository.StorageClass,
		}
		loc.Credentials, err = job.LoadCredentials(t.Layout, t.Job)
		return j, loc, err
	}
	loc, err := t.parseRepository()
	return nil, loc, err
}

func (t *target) readJob() (*job.Job, error) {
	path := t.Layout.JobFile(t.Job)
	b, err := os.ReadFile(path)
	if errors.Is(err, os.ErrNotExist) {
		hint := "this guest has no jobs"
		if names := t.jobsHere(); len(names) > 0 {
			hint = "jobs of this guest: " + strings.Join(names, ", ")
		}
		return nil, fmt.Errorf("job %s: %s is not there\nhint: %s", t.Job, path, hint)
	}
	if err != nil {
		return nil, fmt.Errorf("job %s: %w", t.Job, err)
	}
	j, err := job.Parse(b)
	if err != nil {
		return nil, fmt.Errorf("job %s: %s: %w", t.Job, path, err)
	}
	return j, nil
}

func (t *target) jobsHere() []string {
	files, _ := filepath.Glob(filepath.Join(t.Layout.JobsDirectory(), "*.json")) // the pattern is well formed
	for i, f := range files {
		files[i] = strings.TrimSuffix(filepath.Base(f), ".json")
	}
	return files
}

// parseRepository reads --repository, whose query may carry endpoint, region and path_style, so that one string says
// where a repository is. Flags win over the query, the query over the environment.
func (t *target) parseRepository() (objectstore.Location, error) {
	var loc objectstore.Location
	u, err := url.Parse(t.Repository)
	if err != nil {
		return loc, usageError(fmt.Errorf("--repository: %w", err))
	}
	loc.Region, loc.Endpoint, loc.UsePathStyle = t.Region, t.Endpoint, t.PathStyle
	for key, values := range u.Query() {
		value := values[len(values)-1]
		switch key {
		case "endpoint":
			if loc.Endpoint == "" {
				loc.Endpoint = value
			}
		case "region":
			if loc.Region == "" {
				loc.Region = value
			}
		case "path_style":
			on, err := strconv.ParseBool(value)
			if err != nil {
				return loc, usageError(fmt.Errorf("--repository: path_style=%q: expected true or false", value))
			}
			loc.UsePathStyle = loc.UsePathStyle || on
		default:
			return loc, usageError(fmt.Errorf("--repository: unknown parameter %q, expected endpoint, region or path_style", key))
		}
	}
	if loc.Endpoint == "" && u.Scheme == "s3" {
		for _, name := range []string{"AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL"} {
			if v := os.Getenv(name); v != "" {
				loc.Endpoint = v
				break
			}
		}
	}
	u.RawQuery = ""
	loc.URL = u.String()
	return loc, nil
}

func (t *target) selector() (selector, error) {
	sel := selector{Job: t.Job}
	if t.Series != "" {
		var err error
		if sel, err = parseSelector(t.Series); err != nil {
			return sel, err
		}
		if t.Job != "" && sel.Job != t.Job {
			return sel, usageError(fmt.Errorf("--job %s and --series %s name different jobs", t.Job, t.Series))
		}
	}
	if t.Instance != "" {
		if sel.Instance != "" && sel.Instance != t.Instance {
			return sel, usageError(fmt.Errorf("--series %s and --instance %s name different instances", t.Series, t.Instance))
		}
		sel.Instance = t.Instance
	}
	return sel, nil
}

// one returns the series when the flags select exactly one. Where a job's cluster was initialised anew, the job file
// says which of its series is the present one.
func (o *opened) one() (*repository.Series, error) {
	ids := o.IDs
	if o.Job != nil && len(ids) > 1 {
		var present []repository.SeriesID
		for _, id := range ids {
			for _, i := range o.Job.Protected {
				if i.Name == id.Instance && i.SystemID == id.SystemID {
					present = append(present, id)
				}
			}
		}
		if len(present) > 0 {
			ids = present
		}
	}
	where := o.Repository.Store().URL()
	switch len(ids) {
	case 0:
		all, err := o.Repository.SeriesList(context.Background(), "", "")
		if err != nil || len(all) == 0 {
			return nil, fmt.Errorf("%s holds nothing of %s", where, o.Selector)
		}
		return nil, fmt.Errorf("%s holds nothing of %s\nhint: it holds %s", where, o.Selector, joinSeries(all))
	case 1:
		return o.Repository.Series(ids[0]), nil
	}
	return nil, usageError(fmt.Errorf("%s holds several series of %s\nhint: choose one with --series: %s", where, o.Selector, joinSeries(ids)))
}

// series returns every series that the flags select.
func (o *opened) series() []*repository.Series {
	all := make([]*repository.Series, len(o.IDs))
	for i, id := range o.IDs {
		all[i] = o.Repository.Series(id)
	}
	return all
}

func joinSeries(ids []repository.SeriesID) string {
	names := make([]string, len(ids))
	for i, id := range ids {
		names[i] = id.String()
	}
	return strings.Join(names, ", ")
}

// readIdentities reads the age identities that PGARK_IDENTITY_FILE names, if it is set.
func readIdentities() ([]age.Identity, error) {
	path := os.Getenv(identityVariable)
	if path == "" {
		return nil, nil
	}
	f, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", identityVariable, err)
	}
	defer f.Close()
	ids, err := repository.ParseIdentities(f)
	if err != nil {
		return nil, fmt.Errorf("%s: %s: %w", identityVariable, path, err)
	}
	return ids, nil
}
