package remote

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/pgark/terraform-provider-pgark/internal/engine/guest"
	"github.com/pgark/terraform-provider-pgark/internal/engine/repository"
)

// failure is an error on the wire: its words, and what callers branch on. An error that is none of the typed ones itself
// has those that it wraps in Causes.
type failure struct {
	Message string `json:"message"`
	Hint    string `json:"hint,omitempty"`

	NoJob         bool                   `json:"no_job,omitempty"`
	Canceled      bool                   `json:"canceled,omitempty"`
	Expired       bool                   `json:"expired,omitempty"` // context.DeadlineExceeded
	Owned         *repository.OwnedError `json:"owned,omitempty"`
	Prerequisites *prerequisites         `json:"prerequisites,omitempty"`

	Causes []*failure `json:"causes,omitempty"`
}

// prerequisites is a *guest.PrerequisiteError; the errors behind it are the Causes of its failure.
type prerequisites struct {
	Job    string        `json:"job"`
	Checks []guest.Check `json:"checks"`
}

// newFailure makes of an error what crosses the wire; nil of nil.
func newFailure(err error) *failure {
	if err == nil {
		return nil
	}
	f := &failure{Message: err.Error()}
	var hinted interface{ Hint() string }
	if errors.As(err, &hinted) {
		f.Hint = hinted.Hint()
	}
	switch e := err.(type) { //nolint:errorlint // what wraps one of them is another error; see below
	case *repository.OwnedError:
		f.Owned = e
		return f
	case *guest.PrerequisiteError:
		f.Prerequisites = &prerequisites{Job: e.Job, Checks: e.Checks}
		for _, cause := range e.Causes {
			f.Causes = append(f.Causes, newFailure(cause))
		}
		return f
	}
	f.NoJob = errors.Is(err, guest.ErrNoJob)
	f.Canceled = errors.Is(err, context.Canceled)
	f.Expired = errors.Is(err, context.DeadlineExceeded)
	if e, ok := errors.AsType[*guest.PrerequisiteError](err); ok {
		f.Causes = append(f.Causes, newFailure(e))
	} else if e, ok := errors.AsType[*repository.OwnedError](err); ok {
		f.Causes = append(f.Causes, newFailure(e))
	}
	return f
}

// err is the error that a failure stands for; nil for nil.
func (f *failure) err() error {
	if f == nil {
		return nil
	}
	var causes []error
	for _, c := range f.Causes {
		if err := c.err(); err != nil {
			causes = append(causes, err)
		}
	}
	switch {
	case f.Owned != nil:
		return f.Owned
	case f.Prerequisites != nil:
		return &guest.PrerequisiteError{Job: f.Prerequisites.Job, Checks: f.Prerequisites.Checks, Causes: causes}
	}
	for sentinel, is := range map[error]bool{guest.ErrNoJob: f.NoJob, context.Canceled: f.Canceled, context.DeadlineExceeded: f.Expired} {
		if !is {
			continue
		}
		if f.Message == sentinel.Error() {
			return sentinel
		}
		causes = append(causes, sentinel)
	}
	return &guestError{message: f.Message, hint: f.Hint, causes: causes}
}

// guestError is an error that the guest reported, in its words.
type guestError struct {
	message string
	hint    string
	causes  []error // those of its causes that callers branch on
}

func (e *guestError) Error() string   { return e.message }
func (e *guestError) Hint() string    { return e.hint }
func (e *guestError) Unwrap() []error { return e.causes }

// LostError says that the conversation ended while the guest was changing something.
type LostError struct {
	Host  string // user@host:port
	Call  string // what was being done: "apply job orders"
	After time.Duration
	Err   error // how the conversation ended
}

func (e *LostError) Error() string {
	return fmt.Sprintf("%s on %s: the connection was lost after %s, before the guest had answered: %v; the guest stops what it had not finished, and puts a job that was new there back as it was",
		e.Call, e.Host, e.After.Round(time.Second/10), e.Err)
}

// Unwrap gives how the conversation ended.
func (e *LostError) Unwrap() error { return e.Err }

// Hint says how to go on.
func (e *LostError) Hint() string {
	return "do it again once the guest can be reached: what was done stays done or was put back, and doing it again goes on from there"
}

// UnsupportedError says that a machine can be no guest.
type UnsupportedError struct {
	Host  string // user@host:port
	Found string // "FreeBSD amd64"
}

func (e *UnsupportedError) Error() string {
	return fmt.Sprintf("%s: found %s, expected Linux on x86_64 or aarch64", e.Host, e.Found)
}

// StageError says that the runner could not be brought to the guest, or not be started there.
type StageError struct {
	Host   string // user@host:port
	Step   string
	Remedy string
	Err    error
}

func (e *StageError) Error() string {
	return fmt.Sprintf("%s: %s: %v", e.Host, e.Step, e.Err)
}

// Unwrap gives the cause.
func (e *StageError) Unwrap() error { return e.Err }

// Hint gives the remedy; where there is none, that of the cause.
func (e *StageError) Hint() string {
	if e.Remedy != "" {
		return e.Remedy
	}
	var hinted interface{ Hint() string }
	if errors.As(e.Err, &hinted) {
		return hinted.Hint()
	}
	return ""
}
