package repository

import (
	"bytes"
	"context"
	crand "crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"slices"
	"strings"
	"sync"
	"time"

	"filippo.io/age"

	"github.com/pgark/terraform-provider-pgark/internal/engine/objectstore"
	"github.com/pgark/terraform-provider-pgark/internal/engine/postgres"
)

// Description is repository.json.
type Description struct {
	Format       int                      `json:"format"`
	ID           string                   `json:"id"` // random, 32 hexadecimal digits
	CreatedAt    time.Time                `json:"created_at"`
	Recipients   []string                 `json:"recipients,omitempty"` // age recipients; none: not encrypted
	Capabilities objectstore.Capabilities `json:"capabilities"`
}

// Repository is an opened repository. Safe for concurrent use.
type Repository struct {
	store       objectstore.Store
	description Description
	recipients  []age.Recipient
	identities  []age.Identity
	host        string // written into head changes, for people

	// Replaced by tests that need the same bytes, or the same order of events, every time.
	random io.Reader
	now    func() time.Time
	jitter func(limit time.Duration) time.Duration
	wrap   func(secret []byte) ([]byte, error)

	// unwrappedMu guards unwrapped: session keys by their wrapped form.
	unwrappedMu sync.Mutex
	unwrapped   map[string]*sessionKey

	// walKeyMu guards the key of the present day's WAL.
	walKeyMu  sync.Mutex
	walKeyDay string
	walKey    *sessionKey
}

func newRepository(store objectstore.Store, d Description, identities []age.Identity) (*Repository, error) {
	recipients, err := parseRecipients(d.Recipients)
	if err != nil {
		return nil, fmt.Errorf("repository %s: %w", store.URL(), err)
	}
	host, err := os.Hostname()
	if err != nil {
		host = "unknown" // information only
	}
	return &Repository{
		store:       store,
		description: d,
		recipients:  recipients,
		identities:  identities,
		host:        host,
		random:      crand.Reader,
		now:         time.Now,
		jitter:      rand.N[time.Duration],
		wrap:        wrapToRecipients(recipients),
		unwrapped:   make(map[string]*sessionKey),
	}, nil
}

// Create probes the store and writes repository.json if the store holds none. If it holds one already, that one is
// opened, provided its recipients are the same set; otherwise *MismatchError. created tells which.
func Create(ctx context.Context, store objectstore.Store, recipients []string) (r *Repository, created bool, err error) {
	wanted := slices.Clone(recipients)
	for i := range wanted {
		wanted[i] = strings.TrimSpace(wanted[i])
	}
	slices.Sort(wanted)
	wanted = slices.Compact(wanted)
	parsed, err := parseRecipients(wanted)
	if err != nil {
		return nil, false, fmt.Errorf("repository %s: %w", store.URL(), err)
	}
	if len(parsed) > 0 {
		// Some kinds of recipients cannot stand together; that must show now and not at the first backup.
		if _, err := wrapToRecipients(parsed)(make([]byte, sessionKeyLen)); err != nil {
			return nil, false, fmt.Errorf("repository %s: encrypt to its recipients: %w", store.URL(), err)
		}
	}

	r, err = Open(ctx, store)
	if errors.Is(err, ErrNoRepository) {
		capabilities, err := objectstore.Probe(ctx, store)
		if err != nil {
			return nil, false, err
		}
		var id [16]byte
		_, _ = crand.Read(id[:]) // never fails
		d := Description{
			Format: Format, ID: hex.EncodeToString(id[:]), CreatedAt: time.Now().UTC().Truncate(time.Microsecond),
			Recipients: wanted, Capabilities: capabilities,
		}
		b, _, err := encodeDocument(descriptionKey, d)
		if err != nil {
			return nil, false, err
		}
		err = store.Create(ctx, descriptionKey, bytes.NewReader(b), int64(len(b)))
		if err == nil {
			r, err = newRepository(store, d, nil)
			return r, err == nil, err
		}
		if _, ok := errors.AsType[*objectstore.ConflictError](err); !ok {
			return nil, false, fmt.Errorf("create repository: %w", err)
		}
		// Somebody else created it in between.
		if r, err = Open(ctx, store); err != nil {
			return nil, false, err
		}
	} else if err != nil {
		return nil, false, err
	}

	found := slices.Sorted(slices.Values(r.description.Recipients))
	if !slices.Equal(found, wanted) {
		return nil, false, &MismatchError{Repository: store.URL(), Found: found, Expected: wanted}
	}
	return r, false, nil
}

// Open reads repository.json. identities are needed only to read encrypted images and WAL; listing needs none.
// ErrNoRepository if the store holds no repository; a *FormatError if it is newer than this build.
func Open(ctx context.Context, store objectstore.Store, identities ...age.Identity) (*Repository, error) {
	reading := &Repository{store: store}
	var d Description
	if _, err := reading.readDocument(ctx, descriptionKey, &d); err != nil {
		if errors.Is(err, objectstore.ErrNotExist) {
			return nil, fmt.Errorf("open repository %s: %w", store.URL(), ErrNoRepository)
		}
		return nil, fmt.Errorf("open repository: %w", err)
	}
	return newRepository(store, d, identities)
}

// ParseIdentities reads the content of PGARK_IDENTITY_FILE (age identity lines, comments allowed).
func ParseIdentities(r io.Reader) ([]age.Identity, error) {
	identities, err := age.ParseIdentities(r)
	if err != nil {
		// The library's messages name the line and never its content.
		return nil, fmt.Errorf("read age identities: %w", err)
	}
	return identities, nil
}

func parseRecipients(texts []string) ([]age.Recipient, error) {
	if len(texts) == 0 {
		return nil, nil
	}
	var all []age.Recipient
	for _, t := range texts {
		if strings.HasPrefix(strings.ToUpper(t), "AGE-SECRET-KEY-") {
			return nil, errors.New("recipients: found a secret key, expected the public recipient that begins with age1")
		}
		r, err := age.ParseRecipients(strings.NewReader(t))
		if err != nil || len(r) != 1 {
			return nil, fmt.Errorf("recipient %q: expected an age recipient that begins with age1", t)
		}
		all = append(all, r...)
	}
	return all, nil
}

// Description returns what repository.json says.
func (r *Repository) Description() Description { return r.description }

// Store returns the store that the repository lies in.
func (r *Repository) Store() objectstore.Store { return r.store }

// Series gives access to one series, whether or not anything is stored in it yet. It makes no request.
func (r *Repository) Series(id SeriesID) *Series { return &Series{r: r, id: id, invalid: id.check()} }

// SeriesList finds every series in the repository; job or instance, when not empty, restrict it.
func (r *Repository) SeriesList(ctx context.Context, job, instance string) ([]SeriesID, error) {
	jobs := []string{job}
	if job == "" {
		var err error
		if jobs, err = r.elements(ctx, ""); err != nil {
			return nil, err
		}
	}
	var all []SeriesID
	for _, job := range jobs {
		instances := []string{instance}
		if instance == "" {
			var err error
			if instances, err = r.elements(ctx, job+"/"); err != nil {
				return nil, err
			}
		}
		for _, instance := range instances {
			if instance == ownerElement {
				continue
			}
			systems, err := r.elements(ctx, job+"/"+instance+"/")
			if err != nil {
				return nil, err
			}
			for _, s := range systems {
				system, err := postgres.ParseSystemID(s)
				id := SeriesID{Job: job, Instance: instance, SystemID: system}
				if err != nil || id.check() != nil || system.String() != s {
					continue // something else that lies in the bucket
				}
				all = append(all, id)
			}
		}
	}
	return all, nil
}

func (r *Repository) elements(ctx context.Context, prefix string) ([]string, error) {
	var all []string
	for e, err := range r.store.ListPrefixes(ctx, prefix) {
		if err != nil {
			return nil, fmt.Errorf("list series: %w", err)
		}
		all = append(all, e)
	}
	return all, nil
}

// nonce draws 16 random bytes.
func (r *Repository) nonce() (string, error) {
	var b [16]byte
	if _, err := io.ReadFull(r.random, b[:]); err != nil {
		return "", fmt.Errorf("draw a nonce: %w", err)
	}
	return hex.EncodeToString(b[:]), nil
}

// clock is the present time as it is stored: documents show microseconds.
func (r *Repository) clock() time.Time { return r.now().UTC().Truncate(time.Microsecond) }
