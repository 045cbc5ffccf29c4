package objectstore

import (
	"context"
	"time"
)

// Location says where a store is and how it is reached. It holds no secret unless Credentials is set, which is never
// written to a job file.
type Location struct {
	URL          string `json:"url"`                      // s3://bucket/prefix or file:///absolute/path
	Region       string `json:"region,omitempty"`         // S3 only; default: the AWS chain, else us-east-1
	Endpoint     string `json:"endpoint,omitempty"`       // S3 only; default: AWS
	UsePathStyle bool   `json:"use_path_style,omitempty"` // S3 only
	StorageClass string `json:"storage_class,omitempty"`  // S3 only; default: the bucket's

	Credentials *Credentials `json:"-"` // nil: the AWS credential chain (AWS_* variables, profile, instance profile)
	Profile     string       `json:"-"` // a profile of the AWS shared files
}

// Credentials are static S3 keys.
type Credentials struct {
	AccessKeyID, SecretAccessKey, SessionToken string
}

// Options bound what a store may take. The zero value works.
type Options struct {
	AttemptTimeout time.Duration // one request without progress; default 60 s
	MaxElapsed     time.Duration // all attempts of one call; default 5 min
	PartThreshold  int64         // S3: bodies above it go up in parts; default and maximum 5 GiB, the limit of one PUT
}

// Open checks loc and returns its store. It makes no request: a bucket that is missing shows at first use.
func Open(ctx context.Context, loc Location, o Options) (Store, error) { panic("unimplemented") }

// Capabilities is what Probe found a store to do. It is kept in repository.json.
type Capabilities struct {
	CreateIfAbsent bool `json:"create_if_absent"` // atomic: of many writers exactly one wins
	RangedGet      bool `json:"ranged_get"`
	ListAfterPut   bool `json:"list_after_put"`
	Delete         bool `json:"delete"` // false in an append-only bucket
}

// Probe tries, under the prefix "probe/", what a repository needs: create-if-absent (in sequence and in a race),
// ranged reads, and a listing that shows what was just created. It removes what it wrote where deletion is allowed.
// A store without atomic create-if-absent is refused with an *UnsuitableError that says what was tried and seen.
func Probe(ctx context.Context, s Store) (Capabilities, error) { panic("unimplemented") }

// UnsuitableError says why a store cannot hold a repository.
type UnsuitableError struct {
	Store  string
	Need   string // what a repository needs: "atomic create-if-absent"
	Found  string // what the probe saw
	Remedy string
}

func (e *UnsuitableError) Error() string {
	return e.Store + " cannot hold a repository: " + e.Need + " is missing: " + e.Found + "; " + e.Remedy
}

func isTransient(err error) bool { panic("unimplemented") }
