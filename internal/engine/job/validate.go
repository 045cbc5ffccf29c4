package job

import (
	"cmp"
	"errors"
	"fmt"
	"net/url"
	"path"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"time"

	"github.com/pgark/terraform-provider-pgark/internal/engine/postgres"
)

// The defaults of a job, in one place: ApplyDefaults sets them, schemas and documents quote them.
const (
	DefaultCompression   = "zstd"
	DefaultTimezone      = "UTC"
	DefaultCapture       = "auto"
	DefaultRetryAttempts = 3
	DefaultRetryWait     = 10 * time.Minute
	DefaultWALMode       = WALContinuous
	DefaultWALInterval   = 15 * time.Minute // what the reference product has, and its users expect
	DefaultWALMaxLag     = time.Second
	DefaultTransport     = "automatic"
	DefaultEnforcedBy    = "guest"
)

// ApplyDefaults fills in what a declaration left out. Applying twice is the same as once.
func (j *Job) ApplyDefaults() {
	if j.Format == 0 {
		j.Format = Format
	}
	if len(j.Instances.Include) == 0 {
		j.Instances.Include = []string{"*"}
	}
	setDefault(&j.Image.Timezone, DefaultTimezone)
	setDefault(&j.Image.Compression, DefaultCompression)
	setDefault(&j.Image.Capture, DefaultCapture)
	setDefault(&j.Image.Retry.Attempts, DefaultRetryAttempts)
	setDefault(&j.Image.Retry.Wait, Duration(DefaultRetryWait))
	setDefault(&j.WAL.Mode, DefaultWALMode)
	setDefault(&j.WAL.Interval, Duration(DefaultWALInterval))
	setDefault(&j.WAL.MaxLag, Duration(DefaultWALMaxLag))
	setDefault(&j.WAL.Transport, DefaultTransport)
	setDefault(&j.WAL.Compression, DefaultCompression)
	if j.WALRetention != nil {
		setDefault(&j.WALRetention.EnforcedBy, DefaultEnforcedBy)
	}
	for i := range j.Protected {
		setDefault(&j.Protected[i].DatabaseUser, cmp.Or(j.DatabaseUser, j.Protected[i].Owner))
	}
}

func setDefault[T comparable](v *T, def T) {
	var zero T
	if *v == zero {
		*v = def
	}
}

// namePattern is what job and instance names may be: they stand, unquoted, in paths, object names, unit names and in
// PostgreSQL's archive_command.
var namePattern = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9._-]*$`)

// The most characters that a job's or an instance's name may have.
const maxName = 63

// ValidName says in an error what is wrong with a job's or an instance's name.
func ValidName(name string) error {
	switch {
	case name == "":
		return errors.New("is missing")
	case len(name) > maxName:
		return fmt.Errorf("%q: has %d characters, at most %d are possible", name, len(name), maxName)
	case !namePattern.MatchString(name):
		return fmt.Errorf("%q: may hold letters, digits, dot, underscore and hyphen, and begins with a letter or digit", name)
	}
	return nil
}

// problems collects what is wrong with a job, each with the job's name in front.
type problems struct {
	job  string
	list []error
}

func (p *problems) add(format string, args ...any) {
	p.list = append(p.list, fmt.Errorf("job %s: "+format, append([]any{p.job}, args...)...))
}

func (p *problems) oneOf(field, value string, allowed ...string) {
	for _, a := range allowed {
		if value == a {
			return
		}
	}
	quoted := make([]string, len(allowed))
	for i, a := range allowed {
		quoted[i] = strconv.Quote(a)
	}
	p.add("%s %q: expected %s", field, value, strings.Join(quoted, " or "))
}

func (p *problems) between(field string, value, low, high time.Duration) {
	if value < low || value > high {
		p.add("%s %s: not in %s–%s", field, value, low, high)
	}
}

// Validate reports everything that is wrong, joined, each as "job orders: image.schedule "0 25 * * *": hour 25 is not in 0–23".
func (j *Job) Validate() error {
	p := &problems{job: j.Name}
	if j.Format != Format {
		p.add("format %d: expected %d", j.Format, Format)
	}
	if err := ValidName(j.Name); err != nil {
		p.add("name %w", err)
	}
	j.Repository.validate(p)
	j.Instances.validate(p)
	j.validateProtected(p)
	j.Image.validate(p)
	j.WAL.validate(p)
	j.WALRetention.validate(p)
	return errors.Join(p.list...)
}

func (r Repository) validate(p *problems) {
	u, err := url.Parse(r.URL)
	switch {
	case r.URL == "":
		p.add("repository.url is missing: expected s3://bucket/prefix or file:///path")
	case err != nil:
		// The parser's own message repeats the URL, which might hold a password.
		p.add("repository.url: expected s3://bucket/prefix or file:///path, found what is no URL")
	case u.User != nil:
		p.add("repository.url: found a user or password in it; keys belong into credentials")
	case u.Scheme == "s3" && u.Host == "":
		p.add("repository.url %q: names no bucket", r.URL)
	case u.Scheme == "file" && (u.Host != "" || !filepath.IsAbs(u.Path)):
		p.add("repository.url %q: expected an absolute path, as in file:///srv/backup", r.URL)
	case u.Scheme != "s3" && u.Scheme != "file":
		p.add("repository.url %q: expected s3://bucket/prefix or file:///path", r.URL)
	}
}

func (s Selection) validate(p *problems) {
	for _, l := range []struct {
		field    string
		patterns []string
	}{{"instances.include", s.Include}, {"instances.exclude", s.Exclude}} {
		for _, pattern := range l.patterns {
			if _, err := path.Match(pattern, ""); err != nil || pattern == "" {
				p.add("%s %q: is no pattern; * and ? and [a-z] are possible", l.field, pattern)
			}
		}
	}
}

func (j *Job) validateProtected(p *problems) {
	seen := map[string]bool{}
	for n, i := range j.Protected {
		field := fmt.Sprintf("protected[%d]", n)
		if err := ValidName(i.Name); err != nil {
			p.add("%s.name %w", field, err)
			continue
		}
		field = "instance " + i.Name
		if seen[i.Name] {
			p.add("%s: stands twice", field)
		}
		seen[i.Name] = true
		if !filepath.IsAbs(i.DataDirectory) {
			p.add("%s: data_directory %q: expected an absolute path", field, i.DataDirectory)
		}
		if !filepath.IsAbs(i.SocketDirectory) {
			p.add("%s: socket_directory %q: expected an absolute path", field, i.SocketDirectory)
		}
		if i.Port < 1 || i.Port > 65535 {
			p.add("%s: port %d: not in 1–65535", field, i.Port)
		}
		if i.Owner == "" {
			p.add("%s: owner is missing", field)
		}
		if i.SystemID == postgres.SystemID(0) {
			p.add("%s: system_identifier is missing", field)
		}
	}
}

func (i Image) validate(p *problems) {
	if _, err := parseSchedule(i.Schedule); i.Schedule != "" && err != nil {
		p.add("image.schedule %q: %w", i.Schedule, err)
	}
	if _, err := loadTimezone(i.Timezone); err != nil {
		p.add("image.timezone %q: %w", i.Timezone, err)
	}
	p.oneOf("image.compression", i.Compression, "zstd", "none")
	p.oneOf("image.capture", i.Capture, "auto", "live")
	if i.Parallelism < 0 || i.Parallelism > 64 {
		p.add("image.parallelism %d: not in 0–64 (0: one a core)", i.Parallelism)
	}
	if i.MaxRate < 0 {
		p.add("image.max_rate %d: expected bytes per second, or 0 for no limit", i.MaxRate)
	}
	if i.Retry.Attempts < 1 || i.Retry.Attempts > 100 {
		p.add("image.retry.attempts %d: not in 1–100", i.Retry.Attempts)
	}
	p.between("image.retry.wait", time.Duration(i.Retry.Wait), time.Second, 24*time.Hour)
	r := i.Retention
	for _, v := range []struct {
		field string
		n     int
	}{{"keep_last", r.KeepLast}, {"keep_days", r.KeepDays}, {"weekly", r.Weekly}, {"monthly", r.Monthly}, {"yearly", r.Yearly}} {
		if v.n < 0 {
			p.add("image.retention.%s %d: may not be negative", v.field, v.n)
		}
	}
}

func (w WAL) validate(p *problems) {
	p.oneOf("wal.mode", w.Mode, WALContinuous, WALInterval)
	p.between("wal.interval", time.Duration(w.Interval), time.Second, 24*time.Hour)
	p.between("wal.max_lag", time.Duration(w.MaxLag), 100*time.Millisecond, time.Hour)
	if w.TempFolder != "" && !filepath.IsAbs(w.TempFolder) {
		p.add("wal.temp_folder %q: expected an absolute path", w.TempFolder)
	}
	if w.TempFolderLimit < 0 {
		p.add("wal.temp_folder_limit %d: expected bytes, or 0 for no limit", w.TempFolderLimit)
	}
	if w.MaxRequestsPerHour < 0 {
		p.add("wal.max_requests_per_hour %d: expected a number of requests, or 0 for as many as wal.max_lag takes", w.MaxRequestsPerHour)
	}
	if w.Synchronous && w.Mode != WALContinuous {
		p.add("wal.synchronous needs wal.mode %q: nothing is streamed otherwise that a commit could wait for", WALContinuous)
	}
	if w.Synchronous && w.MaxRequestsPerHour > 0 {
		p.add("wal.synchronous takes a request for every commit: leave out wal.max_requests_per_hour, or commits would wait for the budget")
	}
	if w.Slot && w.Mode != WALContinuous {
		p.add("wal.slot needs wal.mode %q: only a stream moves a replication slot", WALContinuous)
	}
	p.oneOf("wal.compression", w.Compression, "zstd", "adaptive")
	p.oneOf("wal.transport", w.Transport, "automatic", "direct", "log_shipping_servers")
	switch {
	case w.Transport == "log_shipping_servers" && len(w.LogShippingServers) == 0:
		p.add(`wal.transport "log_shipping_servers": names no server in wal.log_shipping_servers`)
	case w.Transport == "direct" && len(w.LogShippingServers) > 0:
		p.add(`wal.log_shipping_servers: are not used with wal.transport "direct"`)
	}
}

func (r *WALRetention) validate(p *problems) {
	if r == nil {
		return
	}
	if r.KeepDays < 0 {
		p.add("wal_retention.keep_days %d: may not be negative", r.KeepDays)
	}
	if r.UntilImageDeleted == (r.KeepDays != 0) {
		p.add("wal_retention: expected exactly one of until_image_deleted and keep_days")
	}
	p.oneOf("wal_retention.enforced_by", r.EnforcedBy, "guest", "log_shipping_server")
}
