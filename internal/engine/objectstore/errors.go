package objectstore

import (
	"context"
	"errors"
	"net"
	"syscall"
)

// Errors that callers, and the texts shown to users, tell apart. All are found with errors.Is. ErrFull and ErrBusy are
// transient: retention, people or time change them while we wait; the others are not.
var (
	// ErrNoBucket says that the store itself is missing: the bucket, or the directory.
	ErrNoBucket = errors.New("no such bucket")
	// ErrAccess says that the store refused the credentials, or what they may do.
	ErrAccess = errors.New("access denied")
	// ErrRegion says that the bucket lies in another region than the one declared.
	ErrRegion = errors.New("wrong region")
	// ErrClock says, beside ErrAccess, that the store refused because of the time of a request.
	ErrClock = errors.New("the clocks differ")
	// ErrExpired says, beside ErrAccess, that credentials were good once.
	ErrExpired = errors.New("the credentials have expired")
	// ErrReadOnly says that the store can be read only.
	ErrReadOnly = errors.New("read-only")
	// ErrFull says that the store, or a quota, has no room.
	ErrFull = errors.New("no room left")
	// ErrBusy says that the store answers, but refuses for now: throttling, an error of its own.
	ErrBusy = errors.New("the store refuses for now")
)

// kindError is err, which errors.Is finds to be kind, too. Its text is err's, which says it in the words of the store.
type kindError struct{ kind, err error }

func (e *kindError) Error() string        { return e.err.Error() }
func (e *kindError) Is(target error) bool { return target == e.kind }
func (e *kindError) Unwrap() error        { return e.err }

// Error is a failed call of a store.
type Error struct {
	Op    string // "create", "get", "stat", "list", "delete"
	Key   string // or prefix, of a list
	Store string // URL
	Err   error
	Hint  string // what the user may do, where we know

	transient bool
}

func (e *Error) Error() string {
	s := e.Op + " "
	if e.Key != "" {
		s += e.Key + " "
	}
	s += "in " + e.Store + ": " + e.Err.Error()
	if e.Hint != "" {
		s += "; " + e.Hint
	}
	return s
}

// Unwrap gives the cause.
func (e *Error) Unwrap() error { return e.Err }

func isTransient(err error) bool {
	if err == nil || errors.Is(err, context.Canceled) {
		return false
	}
	if e, ok := errors.AsType[*Error](err); ok {
		return e.transient
	}
	if errors.Is(err, context.DeadlineExceeded) {
		return false // the caller's deadline: the time-outs of attempts are *Error
	}
	return transientCause(err)
}

// transientCause judges errors of the operating system and the network.
func transientCause(err error) bool {
	for _, e := range []error{
		// A full file system or quota is freed by retention, or by people, while we wait.
		syscall.ENOSPC, syscall.EDQUOT,
		syscall.ESTALE, syscall.EAGAIN, syscall.EINTR, syscall.EBUSY, syscall.ETIMEDOUT,
		syscall.ECONNREFUSED, syscall.ECONNRESET, syscall.ECONNABORTED, syscall.EPIPE,
		syscall.ENETUNREACH, syscall.EHOSTUNREACH, syscall.ENETDOWN, syscall.EHOSTDOWN,
	} {
		if errors.Is(err, e) {
			return true
		}
	}
	if dns, ok := errors.AsType[*net.DNSError](err); ok {
		return !dns.IsNotFound
	}
	if ne, ok := errors.AsType[net.Error](err); ok {
		return ne.Timeout()
	}
	return false
}

// What a store cannot do; Probe makes *UnsuitableError of them.
var (
	errNotImplemented = errors.New("not implemented by the store")
	errNoRanges       = errors.New("the store ignored the range and answered with the whole object")
)
