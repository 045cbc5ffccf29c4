package repository

import (
	"errors"
	"fmt"
	"strings"

	"github.com/pgark/terraform-provider-pgark/internal/engine/postgres"
)

var (
	// ErrNoRepository says that the store holds no repository.json.
	ErrNoRepository = errors.New("no repository here")
	// ErrSessionGone says that a session was evicted, or has ended: it cannot commit any more.
	ErrSessionGone = errors.New("session is not open any more")
	// ErrClosed is what an ImageWriter returns after Finish or Close.
	ErrClosed = errors.New("image writer is closed")
)

// MismatchError says that a repository is there, but for other recipients than those asked for.
type MismatchError struct {
	Repository string   // URL
	Found      []string // recipients in repository.json
	Expected   []string
}

func (e *MismatchError) Error() string {
	return fmt.Sprintf("repository %s: found one that is %s, expected one that is %s",
		e.Repository, recipientsText(e.Found), recipientsText(e.Expected))
}

func recipientsText(r []string) string {
	if len(r) == 0 {
		return "not encrypted"
	}
	return "encrypted to " + strings.Join(r, ", ")
}

// FormatError says that an object was written by a newer pgark.
type FormatError struct {
	Repository string // URL
	Key        string
	Found      int
	Supported  int // the newest format that this build reads
}

func (e *FormatError) Error() string {
	return fmt.Sprintf("read %s in %s: found format %d, expected at most %d; a newer pgark wrote it",
		e.Key, e.Repository, e.Found, e.Supported)
}

// CorruptError says that an object is not what was written under its name: damaged, cut short, or another object's
// content.
type CorruptError struct {
	Repository string // URL
	Key        string
	Err        error // what was found and expected
}

func (e *CorruptError) Error() string {
	return fmt.Sprintf("read %s in %s: damaged: %v", e.Key, e.Repository, e.Err)
}

// Unwrap gives the detail.
func (e *CorruptError) Unwrap() error { return e.Err }

// NoIdentityError says that an encrypted object cannot be read because no identity fits.
type NoIdentityError struct {
	Repository string // URL
	Key        string
	Identities int      // how many were tried
	Recipients []string // who can read what the repository stores now
}

func (e *NoIdentityError) Error() string {
	tried := "no identity was given"
	if e.Identities > 0 {
		tried = fmt.Sprintf("none of the %d identities given fits", e.Identities)
	}
	return fmt.Sprintf("read %s in %s: it is encrypted and %s; the repository's recipients are %s",
		e.Key, e.Repository, tried, strings.Join(e.Recipients, ", "))
}

// OwnedError says that a job name belongs to another machine.
type OwnedError struct {
	Repository string // URL
	Job        string
	Owner      Owner
	Claimant   Owner
}

func (e *OwnedError) Error() string {
	return fmt.Sprintf("job name %s in %s belongs to %s (machine %s) since %s; %s (machine %s) cannot use it",
		e.Job, e.Repository, e.Owner.Host, e.Owner.MachineID, e.Owner.ClaimedAt.UTC().Format("2006-01-02 15:04:05 MST"),
		e.Claimant.Host, e.Claimant.MachineID)
}

// NotLiveError says that an image is not, or no longer, in a series.
type NotLiveError struct {
	Series SeriesID
	SID    SID
}

func (e *NotLiveError) Error() string {
	return fmt.Sprintf("series %s has no image %s", e.Series, e.SID)
}

// BelowFloorError says that an image cannot be committed because WAL that it needs may have been deleted meanwhile.
type BelowFloorError struct {
	Series   SeriesID
	SID      SID
	Timeline postgres.Timeline
	Start    postgres.LSN
	Floor    postgres.LSN
}

func (e *BelowFloorError) Error() string {
	return fmt.Sprintf("commit image %s of %s: it starts at %s on timeline %d, expected at least %s: WAL below that may be deleted",
		e.SID, e.Series, e.Start, uint32(e.Timeline), e.Floor)
}

// FloorError says that WAL is still needed: a floor cannot rise, or a file cannot be deleted.
type FloorError struct {
	Series   SeriesID
	Timeline postgres.Timeline
	Wanted   postgres.LSN // the floor asked for, or the end of the file to delete
	Limit    postgres.LSN // the start of the image that needs WAL from there on, or the present floor
	Reason   string       // "image 0000000000000007 needs WAL from there on"
}

func (e *FloorError) Error() string {
	return fmt.Sprintf("WAL of %s up to %s on timeline %d must be kept above %s: %s",
		e.Series, e.Wanted, uint32(e.Timeline), e.Limit, e.Reason)
}

// WALConflictError says that a WAL file is there with other content.
type WALConflictError struct {
	Series SeriesID
	There  WALInfo
	Here   WALInfo
}

func (e *WALConflictError) Error() string {
	return fmt.Sprintf("store WAL file %s in %s: already there with other content (%d bytes, BLAKE3 %.16s…, stored by %s at %s there; %d bytes, %.16s… here)",
		e.Here.Name, e.Series, e.There.Size, e.There.Digest, e.There.Host, e.There.StoredAt.UTC().Format("2006-01-02 15:04:05 MST"),
		e.Here.Size, e.Here.Digest)
}
