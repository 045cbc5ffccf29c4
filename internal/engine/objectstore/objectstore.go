// Package objectstore keeps immutable objects under names: in S3 or in a directory.
//
// An object is created once, whole, and never overwritten. That single primitive, atomic create-if-absent, is what
// every guarantee of a repository stands on (see package repository); a store that lacks it is refused by Probe.
// The package knows nothing of what the objects mean.
package objectstore

import (
	"context"
	"errors"
	"fmt"
	"io"
	"iter"
	"time"
)

// Store is a flat, immutable name space. Keys are slash-separated, relative to the store's own prefix, without a
// leading slash. All methods are safe for concurrent use. They retry transient failures themselves, with backoff,
// until their budget or ctx ends; what they return has no meaning for a retry except through IsTransient.
type Store interface {
	// Create stores size bytes of body as key, durably, if and only if no such object exists: when it returns nil,
	// the object is there with exactly this content, and survives a crash of the store's machine.
	// An object that is already there with the same content is success too (a lost reply, a repeated request).
	// One with other content gives a *ConflictError. body is read from its start, possibly several times.
	Create(ctx context.Context, key string, body io.ReadSeeker, size int64) error

	// Get opens n bytes of the object from offset; n < 0 means to its end. The caller closes the reader.
	// A reader that ends before n bytes reports io.ErrUnexpectedEOF. An absent object is ErrNotExist.
	Get(ctx context.Context, key string, offset, n int64) (io.ReadCloser, error)

	// Stat returns the object's size and time; ErrNotExist when absent.
	Stat(ctx context.Context, key string) (Object, error)

	// List yields the objects whose key starts with prefix and sorts after startAfter (bytewise), in bytewise order
	// of their keys. It ends at the first error, which it yields.
	List(ctx context.Context, prefix, startAfter string) iter.Seq2[Object, error]

	// ListPrefixes yields the distinct next path elements below prefix (which ends in a slash or is empty), without
	// their trailing slash, in order: a directory listing that skips plain objects.
	ListPrefixes(ctx context.Context, prefix string) iter.Seq2[string, error]

	// Delete removes the objects; absent ones are no error.
	Delete(ctx context.Context, keys ...string) error

	// URL names the store for people, without secrets: s3://bucket/prefix or file:///path.
	URL() string
}

// Object is one entry of a listing. Nothing in pgark decides anything from Modified: stores are known to return
// stale times. It is shown to people only.
type Object struct {
	Key      string
	Size     int64
	Modified time.Time
}

// ErrNotExist says that no object has the key.
var ErrNotExist = errors.New("no such object")

// ConflictError says that key is already taken by an object with other content than the one offered.
type ConflictError struct {
	Store  string // URL of the store
	Key    string
	There  string // BLAKE3 of the stored object, in hexadecimal, with its size
	Here   string // the same of the object offered
	Reason string // optional detail
}

func (e *ConflictError) Error() string {
	return fmt.Sprintf("create %s in %s: already there with other content (%s there, %s here)", e.Key, e.Store, e.There, e.Here)
}

// IsTransient reports whether err may go away by itself: the network, throttling, 5xx, a time-out of one attempt.
// Missing objects, conflicts, refused credentials, a missing bucket and a cancelled context are not transient.
func IsTransient(err error) bool { return isTransient(err) }
