// Package job holds the documents that the provider writes and the runner reads: the one contract between them.
//
// A job file (Layout.JobFile) describes what one pgark_postgresql_backup_job declares, as resolved on its guest: it
// names the instances with their directories. It holds no secret; credentials stand in a file of their own
// (Layout.CredentialsFile, credentials.go). The package parses and checks; it does not act.
//
// Both values of wal.mode ship a segment as soon as PostgreSQL has filled it. What has not filled one yet is streamed in
// mode "continuous", at most wal.max_lag behind; in mode "interval", PostgreSQL is made to finish the segment every
// wal.interval.
package job

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"os"
	"path"
	"time"

	"github.com/pgark/terraform-provider-pgark/internal/engine/objectstore"
	"github.com/pgark/terraform-provider-pgark/internal/engine/postgres"
)

// Format is the version of the job file that this build writes, and the newest it reads.
const Format = 1

// Job is a job file.
type Job struct {
	Format     int        `json:"format"`
	Name       string     `json:"name"`
	Host       string     `json:"host"` // what the guest is called in declarations, logs and the repository
	Enabled    bool       `json:"enabled"`
	Repository Repository `json:"repository"`
	Instances  Selection  `json:"instances"`
	Protected  []Instance `json:"protected"` // what the selection found

	// DatabaseUser is the role that pgark works as in every instance; "": that of the instance's owner.
	DatabaseUser string `json:"database_user,omitempty"`

	Image Image `json:"image"`
	WAL   WAL   `json:"wal"`

	// WALRetention belongs to pgark_wal_retention: the job's own resource keeps it as it finds it, and Digest leaves it out.
	WALRetention *WALRetention `json:"wal_retention,omitempty"`
}

// Repository says where the repository is, without secrets.
type Repository struct {
	URL          string `json:"url"`
	Region       string `json:"region,omitempty"`
	Endpoint     string `json:"endpoint,omitempty"`
	UsePathStyle bool   `json:"use_path_style,omitempty"`
	StorageClass string `json:"storage_class,omitempty"`
}

// Selection picks instances by name; patterns as path.Match.
type Selection struct {
	Include []string `json:"include"`
	Exclude []string `json:"exclude,omitempty"`
}

// Instance is a protected cluster.
type Instance struct {
	Name            string            `json:"name"` // "15-main", or "15-5433" where the cluster has no name
	DataDirectory   string            `json:"data_directory"`
	SocketDirectory string            `json:"socket_directory"`
	Port            int               `json:"port"`
	Owner           string            `json:"owner"` // operating system user of the data directory
	DatabaseUser    string            `json:"database_user"`
	Version         int               `json:"version"` // major
	SystemID        postgres.SystemID `json:"system_identifier"`
}

// Image is the image backup's plan.
type Image struct {
	Schedule    string         `json:"schedule"` // five-field cron; empty: only on demand
	Timezone    string         `json:"timezone"` // IANA name
	Compression string         `json:"compression"`
	Parallelism int            `json:"parallelism"`        // 0: one a core
	MaxRate     int64          `json:"max_rate,omitempty"` // bytes per second
	Capture     string         `json:"capture"`            // "auto" or "live"
	Retry       Retry          `json:"retry"`
	Retention   ImageRetention `json:"retention"`
	OnCreate    bool           `json:"on_create"`
}

// Retry says how often a failed image is tried again, and after what wait.
type Retry struct {
	Attempts int      `json:"attempts"`
	Wait     Duration `json:"wait"`
}

// ImageRetention keeps an image that any of its rules keeps; all zero keeps every image.
type ImageRetention struct {
	KeepLast int `json:"keep_last,omitempty"`
	KeepDays int `json:"keep_days,omitempty"`
	Weekly   int `json:"weekly,omitempty"`
	Monthly  int `json:"monthly,omitempty"`
	Yearly   int `json:"yearly,omitempty"`
}

// The values of WAL.Mode. Part of the job file.
const (
	WALContinuous = "continuous"
	WALInterval   = "interval"
)

// WAL is how WAL reaches the repository.
type WAL struct {
	Mode               string   `json:"mode"` // "continuous" or "interval"
	Interval           Duration `json:"interval"`
	MaxLag             Duration `json:"max_lag"`
	MaxRequestsPerHour int64    `json:"max_requests_per_hour,omitempty"` // of tails; 0: as many as MaxLag takes
	Synchronous        bool     `json:"synchronous,omitempty"`           // commits wait until they are durable in the repository
	Slot               bool     `json:"slot,omitempty"`                  // hold WAL back by a replication slot
	Compression        string   `json:"compression"`                     // "zstd", or "adaptive": less of it while there is a backlog
	TempFolder         string   `json:"temp_folder,omitempty"`           // "": Layout.SpoolDirectory
	TempFolderLimit    int64    `json:"temp_folder_limit,omitempty"`     // bytes; 0: what the file system has, but for a reserve
	Transport          string   `json:"transport"`                       // "automatic", "direct", "log_shipping_servers"
	LogShippingServers []string `json:"log_shipping_servers,omitempty"`
}

// WantsSynchronous tells whether commits are to wait for the repository: a job that is paused keeps nobody waiting.
func (j *Job) WantsSynchronous() bool { return j.Enabled && j.WAL.Synchronous }

// WantsSlot tells whether a replication slot is to hold WAL back. One that nothing moves would hold back all.
func (j *Job) WantsSlot() bool { return j.Enabled && j.WAL.Slot }

// SlotName is the job's replication slot, the same on every instance: "pgark_" and the job's name, with an underscore for
// what the name of a slot may not hold.
func SlotName(job string) string {
	slot := []byte("pgark_" + job)
	for i, c := range slot {
		if (c < 'a' || c > 'z') && (c < '0' || c > '9') {
			slot[i] = '_'
		}
	}
	return string(slot[:min(len(slot), maxSlotName)])
}

// maxSlotName is what PostgreSQL allows (NAMEDATALEN - 1).
const maxSlotName = 63

// WALRetention has exactly one of its fields set.
type WALRetention struct {
	UntilImageDeleted bool   `json:"until_image_deleted,omitempty"`
	KeepDays          int    `json:"keep_days,omitempty"`
	EnforcedBy        string `json:"enforced_by"` // "guest" or "log_shipping_server"
}

// Duration is a time.Duration that JSON holds as Go writes it, "10m0s".
type Duration time.Duration

// MarshalText writes the form of time.Duration.String.
func (d Duration) MarshalText() ([]byte, error) { return []byte(time.Duration(d).String()), nil }

// UnmarshalText reads what time.ParseDuration reads.
func (d *Duration) UnmarshalText(b []byte) error {
	v, err := time.ParseDuration(string(b))
	if err != nil {
		return err
	}
	*d = Duration(v)
	return nil
}

// FormatError says that a job file was written by a newer pgark.
type FormatError struct {
	Name  string // of the job, as far as the file tells
	Found int
}

func (e *FormatError) Error() string {
	return fmt.Sprintf("job %s: the job file has format %d, this pgark reads up to format %d: a newer pgark wrote it", e.Name, e.Found, Format)
}

// Parse reads a job file, applies the defaults and validates it. A newer format is refused with a *FormatError. A field
// that this format does not know is refused too: a job file says what is protected, and half of that must not be
// overlooked because of a letter.
func Parse(b []byte) (*Job, error) {
	var head struct {
		Format int    `json:"format"`
		Name   string `json:"name"`
	}
	if err := json.Unmarshal(b, &head); err != nil {
		return nil, fmt.Errorf("read job file: %w", err)
	}
	if head.Format > Format {
		return nil, &FormatError{Name: head.Name, Found: head.Format}
	}
	d := json.NewDecoder(bytes.NewReader(b))
	d.DisallowUnknownFields()
	j := new(Job)
	if err := d.Decode(j); err != nil {
		return nil, fmt.Errorf("job %s: read job file: %w", head.Name, err)
	}
	j.ApplyDefaults()
	if err := j.Validate(); err != nil {
		return nil, err
	}
	return j, nil
}

// Load reads and parses the job file of the named job; fs.ErrNotExist if there is none.
func Load(l Layout, name string) (*Job, error) {
	b, err := os.ReadFile(l.JobFile(name))
	if err != nil {
		return nil, fmt.Errorf("job %s: %w", name, err)
	}
	j, err := Parse(b)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", l.JobFile(name), err)
	}
	if j.Name != name {
		return nil, fmt.Errorf("%s: found the job %q, expected %q as the file's name says", l.JobFile(name), j.Name, name)
	}
	return j, nil
}

// Encode writes the canonical form: the same Job always gives the same bytes.
func (j *Job) Encode() []byte {
	var b bytes.Buffer
	e := json.NewEncoder(&b)
	e.SetEscapeHTML(false) // a schedule or a URL is read by people
	e.SetIndent("", "  ")
	if err := e.Encode(j); err != nil {
		panic("job: internal error: " + err.Error()) // plain data: no field can fail to encode
	}
	return b.Bytes()
}

// Digest is the SHA-256 of the canonical form without WALRetention, in hexadecimal: the config_sha256 that plans compare.
func (j *Job) Digest() string {
	c := *j
	c.WALRetention = nil
	sum := sha256.Sum256(c.Encode())
	return hex.EncodeToString(sum[:])
}

// Instance returns the protected instance of that name.
func (j *Job) Instance(name string) (Instance, bool) {
	for _, i := range j.Protected {
		if i.Name == name {
			return i, true
		}
	}
	return Instance{}, false
}

// Location says where the job's repository is, with the given credentials (nil: the AWS chain).
func (j *Job) Location(c *objectstore.Credentials) objectstore.Location {
	return objectstore.Location{
		URL:          j.Repository.URL,
		Region:       j.Repository.Region,
		Endpoint:     j.Repository.Endpoint,
		UsePathStyle: j.Repository.UsePathStyle,
		StorageClass: j.Repository.StorageClass,
		Credentials:  c,
	}
}

// Match reports whether the selection picks the instance of that name. A pattern that is malformed picks nothing;
// Validate reports it.
func (s Selection) Match(name string) bool {
	matches := func(patterns []string) bool {
		for _, p := range patterns {
			if ok, err := path.Match(p, name); err == nil && ok {
				return true
			}
		}
		return false
	}
	return matches(s.Include) && !matches(s.Exclude)
}
