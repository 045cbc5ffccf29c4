package repository

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/pgark/terraform-provider-pgark/internal/engine/objectstore"
)

// Owner says who may write under a job name. The owner with the highest number counts.
type Owner struct {
	Number    uint64    `json:"number"`
	MachineID string    `json:"machine_id"`
	Host      string    `json:"host"`
	ClaimedAt time.Time `json:"claimed_at"`
}

type ownerDocument struct {
	Format int `json:"format"`
	Owner
}

// ClaimJob makes machine the owner of the job name, if nobody is, and succeeds at once if it is already. A name that
// another machine owns gives *OwnedError, unless takeOver names that owner's machine id (handed over on purpose).
func (r *Repository) ClaimJob(ctx context.Context, job string, machine Owner, takeOver string) (Owner, error) {
	if err := checkName("job", job); err != nil {
		return Owner{}, err
	}
	if machine.MachineID == "" {
		return Owner{}, fmt.Errorf("claim job %s: found no machine id", job)
	}
	for attempt := 0; ; attempt++ {
		present, err := r.JobOwner(ctx, job)
		switch {
		case errors.Is(err, objectstore.ErrNotExist):
			present = Owner{}
		case err != nil:
			return Owner{}, err
		case present.MachineID == machine.MachineID:
			return present, nil
		case takeOver == "" || present.MachineID != takeOver:
			return Owner{}, &OwnedError{Repository: r.store.URL(), Job: job, Owner: present, Claimant: machine}
		}
		claim := ownerDocument{Format: Format, Owner: Owner{Number: present.Number + 1, MachineID: machine.MachineID, Host: machine.Host, ClaimedAt: machine.ClaimedAt}}
		if claim.ClaimedAt.IsZero() {
			claim.ClaimedAt = r.clock()
		}
		_, err = r.createDocument(ctx, ownerKey(job, claim.Number), claim)
		if err == nil {
			return claim.Owner, nil
		}
		if _, ok := errors.AsType[*objectstore.ConflictError](err); !ok || attempt >= maxConflicts {
			return Owner{}, fmt.Errorf("claim job %s: %w", job, err)
		}
		if err := r.backOff(ctx, attempt); err != nil {
			return Owner{}, err
		}
	}
}

// JobOwner returns the present owner; objectstore.ErrNotExist if the name is free.
func (r *Repository) JobOwner(ctx context.Context, job string) (Owner, error) {
	if err := checkName("job", job); err != nil {
		return Owner{}, err
	}
	var newest uint64
	for o, err := range r.store.List(ctx, ownerPrefix(job), "") {
		if err != nil {
			return Owner{}, fmt.Errorf("owner of job %s: %w", job, err)
		}
		if n, ok := parseOwnerKey(job, o.Key); ok {
			newest = n
		}
	}
	if newest == 0 {
		return Owner{}, fmt.Errorf("owner of job %s in %s: %w", job, r.store.URL(), objectstore.ErrNotExist)
	}
	var d ownerDocument
	key := ownerKey(job, newest)
	if _, err := r.readDocument(ctx, key, &d); err != nil {
		return Owner{}, fmt.Errorf("owner of job %s: %w", job, err)
	}
	if d.Number != newest || d.MachineID == "" {
		return Owner{}, &CorruptError{Repository: r.store.URL(), Key: key, Err: fmt.Errorf("found owner number %d (machine %q), expected %d", d.Number, d.MachineID, newest)}
	}
	return d.Owner, nil
}
