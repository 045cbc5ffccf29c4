// Package job holds the documents that the provider writes and the runner reads: the one contract between them.
//
// A job file (Layout.JobFile) describes what one pgark_postgresql_backup_job declares, as resolved on its guest: it
// names the instances with their directories. It holds no secret; credentials stand in a file of their own
// (Layout.CredentialsFile). The package parses and checks; it does not act.
package job

import (
	"time"

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
	Image      Image      `json:"image"`
	WAL        WAL        `json:"wal"`

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

// WAL is how WAL reaches the repository.
type WAL struct {
	Mode               string   `json:"mode"` // "continuous" or "interval"
	Interval           Duration `json:"interval"`
	MaxLag             Duration `json:"max_lag"`
	TempFolder         string   `json:"temp_folder,omitempty"`
	TempFolderLimit    int64    `json:"temp_folder_limit,omitempty"` // bytes
	Transport          string   `json:"transport"`                   // "automatic", "direct", "log_shipping_servers"
	LogShippingServers []string `json:"log_shipping_servers,omitempty"`
}

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

// Parse reads a job file and validates it. A newer format is refused with both numbers named.
func Parse(b []byte) (*Job, error) { panic("unimplemented") }

// Encode writes the canonical form: the same Job always gives the same bytes.
func (j *Job) Encode() []byte { panic("unimplemented") }

// Digest is the SHA-256 of the canonical form without WALRetention: the config_sha256 that plans compare.
func (j *Job) Digest() string { panic("unimplemented") }

// Validate reports everything that is wrong, joined, each as "job orders: image.schedule "0 25 * * *": hour 25 is not in 0–23".
func (j *Job) Validate() error { panic("unimplemented") }

// Next returns the first time after t that the image schedule names, in the schedule's time zone; the zero time if the
// schedule is empty.
func (i Image) Next(t time.Time) (time.Time, error) { panic("unimplemented") }
