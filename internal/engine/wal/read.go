package wal

import (
	"bytes"
	"fmt"
	"io"
	"os"
	"time"

	"github.com/pgark/terraform-provider-pgark/internal/engine/postgres"
	"github.com/pgark/terraform-provider-pgark/internal/engine/repository"
)

const (
	// readInMemory is the largest file that is read once, into a buffer of its size; larger segments, which few clusters
	// have, are read in place, once for checking and twice by repository.Series.SealWAL.
	readInMemory = 64 << 20

	// maxText is more than a timeline history or a backup history can be.
	maxText = 8 << 20
)

// InvalidError says that a file in pg_wal is not what its name says. Retrying is of no use while it is what it is.
type InvalidError struct {
	Name string
	Err  error
}

func (e *InvalidError) Error() string { return fmt.Sprintf("store wal %s: %v", e.Name, e.Err) }

func (e *InvalidError) Unwrap() error { return e.Err }

// Hint says where to look.
func (e *InvalidError) Hint() string {
	return "it was not stored, since it could not be restored; look at it with pg_waldump, and at the server's disk"
}

// unsettledError says that a file is too young to be vouched for later.
type unsettledError struct{}

func (*unsettledError) Error() string { return "it has been changed just now" }

// reading is a file that was read and checked.
type reading struct {
	info     repository.WALInfo
	content  io.ReaderAt
	memory   []byte // the same, if it is in memory
	identity identity
	began    time.Time
	settled  bool
	file     *os.File // where content reads from, if not from memory
}

func (r *reading) close() {
	if r.file != nil {
		r.file.Close()
	}
}

// read reads and checks the file. One that nobody asked for is left alone while it is young: see settle. It returns the
// buffer, which holds the content of files that fit, for the next call.
func (s *Shipper) read(name, path string, buffer []byte, asked bool) (*reading, []byte, error) {
	r := &reading{}
	fail := func(err error) (*reading, []byte, error) {
		return r, buffer, fmt.Errorf("store wal %s: %w", name, err)
	}
	invalid := func(err error) (*reading, []byte, error) { return r, buffer, &InvalidError{Name: name, Err: err} }

	f, err := os.Open(path)
	if err != nil {
		return fail(err)
	}
	r.file = f
	before, err := f.Stat()
	if err != nil {
		return fail(err)
	}
	r.identity = identify(before)
	now := time.Now()
	young := now.Sub(r.identity.modified) < settle || now.Sub(r.identity.changed) < settle
	if young && !asked {
		return r, buffer, &unsettledError{}
	}
	r.began, r.settled = now, !young

	kind, err := postgres.ParseWALFile(name)
	if err != nil {
		return invalid(err)
	}
	size := before.Size()
	segment := kind.Kind == postgres.SegmentFile || kind.Kind == postgres.PartialFile
	switch {
	case segment && size != int64(s.o.SegmentSize):
		return invalid(fmt.Errorf("found %d bytes, expected %d: a whole segment", size, int64(s.o.SegmentSize)))
	case !segment && size > maxText:
		return invalid(fmt.Errorf("found %d bytes, expected at most %d", size, maxText))
	}

	r.info = repository.WALInfo{Name: name, SystemID: s.o.SystemID, Size: size, Host: s.o.Host}
	if size <= readInMemory {
		if int64(cap(buffer)) < size {
			buffer = make([]byte, size)
		}
		r.memory = buffer[:size]
		if n, err := io.ReadFull(f, r.memory); err != nil {
			return fail(fmt.Errorf("found %d bytes, expected %d: %w", n, size, err))
		}
		r.content = bytes.NewReader(r.memory)
	} else {
		r.content = f
	}
	if segment {
		if err := s.check(r, kind); err != nil {
			return invalid(err)
		}
	}
	after, err := f.Stat()
	if err != nil {
		return fail(err)
	}
	if identify(after) != r.identity {
		r.settled, r.began = false, time.Time{}
		return r, buffer, &unsettledError{}
	}
	return r, buffer, nil
}
