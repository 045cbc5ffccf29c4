package objectstore

import (
	"context"
	"fmt"
	"path"
	"strings"
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

// applyDefaults fills in what is zero.
func (o *Options) applyDefaults() {
	if o.AttemptTimeout <= 0 {
		o.AttemptTimeout = 60 * time.Second
	}
	if o.MaxElapsed <= 0 {
		o.MaxElapsed = 5 * time.Minute
	}
	if o.PartThreshold <= 0 || o.PartThreshold > maxPut {
		o.PartThreshold = maxPut
	}
}

// Open checks loc and returns its store. It makes no request: a bucket that is missing shows at first use.
func Open(ctx context.Context, loc Location, o Options) (Store, error) {
	o.applyDefaults()
	scheme, rest, ok := strings.Cut(loc.URL, "://")
	switch {
	case ok && scheme == "file":
		if loc.Region != "" || loc.Endpoint != "" || loc.UsePathStyle || loc.StorageClass != "" {
			return nil, fmt.Errorf("repository %q: region, endpoint, path style and storage class are for s3:// only", loc.URL)
		}
		root := path.Clean(rest)
		if !strings.HasPrefix(rest, "/") || root == "/" {
			return nil, fmt.Errorf("repository %q: expected the absolute path of a directory, as in file:///srv/backup", loc.URL)
		}
		return &directoryStore{root: root}, nil
	case ok && scheme == "s3":
		bucket, prefix, _ := strings.Cut(rest, "/")
		if bucket == "" {
			return nil, fmt.Errorf("repository %q: expected a bucket, as in s3://bucket/prefix", loc.URL)
		}
		prefix = strings.Trim(prefix, "/")
		if prefix != "" {
			if err := checkKey(prefix); err != nil {
				return nil, fmt.Errorf("repository %q: %w", loc.URL, err)
			}
		}
		return openS3(ctx, loc, bucket, prefix, o)
	}
	return nil, fmt.Errorf("repository %q: expected s3://bucket/prefix or file:///absolute/path", loc.URL)
}

// Capabilities is what Probe found a store to do. It is kept in repository.json.
type Capabilities struct {
	CreateIfAbsent bool `json:"create_if_absent"` // atomic: of many writers exactly one wins
	RangedGet      bool `json:"ranged_get"`
	ListAfterPut   bool `json:"list_after_put"`
	Delete         bool `json:"delete"` // false in an append-only bucket
}

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
