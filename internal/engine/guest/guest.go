// Package guest reaches a machine that runs PostgreSQL: it finds the instances there, checks what stands in the way of
// protecting them, puts the runner and its job in place, tells what is there now, and takes it all away again.
//
// It does so on the machine it runs on. The provider uses it in its own process for connection type "local"; for a
// connection over SSH, the runner's binary runs the same code on the guest (packages remote and sshlink).
package guest

import (
	"context"
	"errors"

	"github.com/pgark/terraform-provider-pgark/internal/engine/job"
	"github.com/pgark/terraform-provider-pgark/internal/engine/objectstore"
	"github.com/pgark/terraform-provider-pgark/internal/engine/postgres"
)

// Guest is one machine. Changing methods are serialised by a lock file on it. Every method leaves the guest as it was
// when it fails before the first change, and says how far it came otherwise.
type Guest interface {
	// Machine tells which machine this is.
	Machine(ctx context.Context) (Machine, error)

	// Discover finds the instances, running or not, in order of name.
	Discover(ctx context.Context) ([]Instance, error)

	// Check runs every prerequisite check for the job and returns all of them, in a fixed order. An error means that the
	// checks could not be made, never that one failed. It changes nothing.
	Check(ctx context.Context, r CheckRequest) ([]Check, error)

	// Apply makes the guest match the deployment: binary, job file, credentials, state directories, settings, runners.
	// Applying twice is the same as once. It returns when every runner answers on its socket, a forced WAL segment of
	// every primary has reached the repository, and, in mode continuous, every runner streams WAL.
	Apply(ctx context.Context, d Deployment) (*State, error)

	// State reads what is there of a job. ErrNoJob only when the guest was read successfully and holds nothing of it.
	State(ctx context.Context, name string) (*State, error)

	// SetWALRetention writes (nil: removes) the WAL retention into the job file. ErrNoJob if there is none.
	SetWALRetention(ctx context.Context, name string, r *job.WALRetention) error

	// Remove stops the runners, puts the PostgreSQL settings back as they were, and removes everything of the job except
	// backups; the binary goes with the last job. Removing what is half there, or absent, succeeds. While there is WAL in
	// the temporary folder that is nowhere else, it fails with a *SpoolError.
	Remove(ctx context.Context, name string) error
}

// ErrNoJob says that a guest holds nothing of a job.
var ErrNoJob = errors.New("no such job on this guest")

// Machine identifies a guest.
type Machine struct {
	ID   string // see job.MachineID; "" on a machine that has none until the first Apply makes one
	Host string // its host name
}

// Instance is a discovered cluster.
type Instance struct {
	job.Instance
	Running       bool
	VersionNumber int    // server_version_num; 0 when not running
	Role          string // "primary", "replica", "" when not running
	ArchiveMode   string
	WALLevel      string
	SizeBytes     int64
	WALSegment    postgres.SegmentSize

	// What follows is known of a running server that lets us in only, but for Service.
	ArchiveCommand string       // its program only: the rest may hold a password
	ArchiveLibrary string       //
	Databases      []string     // in order of name, templates left out
	Extensions     []string     // of the database postgres, in order of name
	Tablespaces    []Tablespace // those that are users' own
	Followers      []string     // application_name of each streaming standby
	Service        string       // systemd unit that runs it, or would; "" if there is none
	Manager        string       // "patroni", "repmgrd", …: who decides about its role and settings; "" if nobody
	Problem        string       // why the server, which runs, could not be asked
}

// Tablespace is where a tablespace lies.
type Tablespace struct {
	Name     string `json:"name"`
	Location string `json:"location"`
}

// Status of a check.
type Status string

// The statuses of a check.
const (
	Pass Status = "pass"
	Warn Status = "warn"
	Fail Status = "fail"
)

// Check is one prerequisite. Those of the machine come first, without an instance. Its name is stable: operating_system,
// executable_place, temporary_folder, cluster_manager, security_module, clock, repository_reachable; postgresql_version,
// postgresql_running, privileges, role, archive_mode, archive_command, archive_library, wal_level, full_page_writes; where
// WAL is streamed, replication and max_wal_senders, and as far as they are declared replication_slot,
// synchronous_standby_names and synchronous_commit; and, of a job that is deployed, runner.
type Check struct {
	Name     string `json:"name"`
	Instance string `json:"instance,omitempty"`
	Status   Status `json:"status"`
	Found    string `json:"found"`
	Expected string `json:"expected"`
	Remedy   string `json:"remedy,omitempty"` // commands that can be pasted
}

// CheckRequest says what is to be protected. Credentials are nil for the AWS chain.
type CheckRequest struct {
	Job         *job.Job // Protected may be empty: it is resolved from Instances
	Credentials *objectstore.Credentials
	Settings    SettingsPolicy

	// Deployed: the job is in place and has to be as it was deployed. What Apply would mend fails, too, and the runners are
	// looked at.
	Deployed bool
}

// SettingsPolicy is guest_settings.
type SettingsPolicy struct {
	Manage                 bool
	Restart                string // "never" or "allow"
	ExistingArchiveCommand string // "fail", "replace" or "chain"
}

// Deployment is what Apply brings about.
type Deployment struct {
	Job         *job.Job // Protected may be empty: it is resolved from Instances
	Credentials *objectstore.Credentials
	Runner      []byte // the runner binary for this machine's architecture; nil: the program that runs
	KeepRunner  bool   // runner_update = "manual": a runner that is installed stays, whichever it is
	Settings    SettingsPolicy

	// WithoutStream: that WAL cannot be streamed does not stop Apply. Whole segments are archived then, and the runner's
	// status says why it is no more than that.
	WithoutStream bool
}

// State is what a guest holds of a job, as it is.
type State struct {
	Machine        Machine
	Job            *job.Job // nil: the job file is missing or unreadable (JobProblem says why)
	JobProblem     string
	RunnerSHA256   string // of the binary that BinaryLink leads to; "" if missing
	Instances      []InstanceState
	HasCredentials bool
	AccessKeyID    string // of the credentials; "" if there are none, or they are unreadable
	// CredentialsChanged: the file is not what was deployed. The secret itself never leaves the guest.
	CredentialsChanged bool
}

// The states of a runner.
const (
	RunnerRunning  = "running"  // it answers, and is kept alive as it was set up
	RunnerStopped  = "stopped"  // it should run, and does not
	RunnerMissing  = "missing"  // what keeps it alive is not there
	RunnerSilent   = "silent"   // its process runs, and does not answer at its socket
	RunnerOutdated = "outdated" // it runs another binary than the one that is installed
	RunnerMasked   = "masked"   // its unit is masked
	RunnerDisabled = "disabled" // its unit does not start with the machine
	RunnerEdited   = "edited"   // its unit file, or a drop-in for it, is not what was deployed
)

// InstanceState is one protected instance, as it is.
type InstanceState struct {
	Name     string
	Runner   string            // see RunnerRunning; of several that apply, the one that matters most
	Detail   string            // what is behind Runner, in words: a path, a unit; "" for RunnerRunning
	Problem  string            // why its settings could not be read, in words
	Settings map[string]string // archive_mode, archive_command, archive_library, wal_level, full_page_writes, synchronous_standby_names
	// Wanted is what archive_command has to be: ours, and behind it the one that was there where that is chained.
	Wanted string
	// Pending names settings, of those above, that do now and will end archiving with the next restart, with their values
	// then. Where those may not be read (pg_file_settings is for superusers) it is empty.
	Pending  map[string]string
	SystemID postgres.SystemID
	// Waiting says that commits are to wait for the runner: synchronous_standby_names, which is in Settings then, has to name
	// it.
	Waiting bool
	// LeftSlot is a replication slot of the job's that it does not declare (any more), and that holds WAL back; "" for none.
	LeftSlot string
}

// Proof is a WAL segment that PostgreSQL was made to finish, and that was then found in the repository.
type Proof struct {
	Instance   string  `json:"instance"`
	Segment    string  `json:"segment,omitempty"`
	Seconds    float64 `json:"seconds"` // from the switch to the object
	StoredSize int64   `json:"stored_bytes"`
	Skipped    string  `json:"skipped,omitempty"` // why there was nothing to prove
}
