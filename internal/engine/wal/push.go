package wal

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/pgark/terraform-provider-pgark/internal/engine/daemon/control"
	"github.com/pgark/terraform-provider-pgark/internal/engine/postgres"
)

const (
	// pushTimeout ends a push whose runner, hung or stopped by a signal, never answers. A runner that works answers
	// within Options.AnswerAfter.
	pushTimeout = 2 * time.Minute

	// pushPatience is how long a push waits for a runner that is being started anew. An upgrade takes two seconds or so,
	// and one that has to be taken back a few more; a runner that is told to stop finishes what it uploads. PostgreSQL,
	// told no three times within two seconds, would not ask again for a minute (pgarch.c, NUM_ARCHIVE_RETRIES and
	// PGARCH_AUTOWAKE_INTERVAL).
	pushPatience = 20 * time.Second

	pushRetryFirst = 20 * time.Millisecond
	pushRetryMost  = 250 * time.Millisecond
)

// PushRequest is what Push has stored, and by whom.
type PushRequest struct {
	Socket  string // of the instance's runner
	JobFile string // of the job: while it is there, a runner that does not answer is one that is being started
	Path    string // of the WAL file; a relative one is relative to the working directory, as PostgreSQL means it
}

// Push asks a runner to have a WAL file stored, and returns nil once it is durable.
//
// A runner that is away, is stopping, or ends before it has answered is waited for, up to 20 seconds in all: so an upgrade
// of the runner, or its restart, is no failed archive_command. Asking again is safe, because a file that is stored
// already is success. Not waited for is a runner that says no, one that may not be asked, and one whose job is not
// deployed here any more; nor does Push wait once PostgreSQL is shutting down, which would wait for Push: it keeps the
// file, and asks again when it is back. Push ends at once when ctx does.
func Push(ctx context.Context, r PushRequest) error {
	path, err := filepath.Abs(r.Path)
	if err != nil {
		return fmt.Errorf("store wal %s: %w", r.Path, err)
	}
	ctx, cancel := context.WithTimeoutCause(ctx, pushTimeout, fmt.Errorf("no answer within %s", pushTimeout))
	defer cancel()
	asked := time.Now()
	for wait := pushRetryFirst; ; wait = min(2*wait, pushRetryMost) {
		_, err = control.Ask(ctx, r.Socket, control.Request{Op: control.OpPush, Path: path}, nil)
		if err == nil || !control.IsRestarting(err) || time.Since(asked)+wait > pushPatience || !r.worthWaiting(path) {
			break
		}
		select {
		case <-ctx.Done():
			return pushError(path, fmt.Errorf("%w, while waiting for the runner: %w", context.Cause(ctx), err))
		case <-time.After(wait):
		}
	}
	return pushError(path, err)
}

// worthWaiting tells whether a runner is to be expected, and PostgreSQL has the time.
func (r PushRequest) worthWaiting(path string) bool {
	if _, err := os.Stat(r.JobFile); err != nil {
		return false
	}
	// <data directory>/pg_wal/<segment>, also where pg_wal is a link.
	p, err := postgres.ReadPostmaster(filepath.Dir(filepath.Dir(path)))
	return err != nil || p.Status != "stopping"
}

func pushError(path string, err error) error {
	var no *control.AnswerError
	switch {
	case err == nil:
		return nil
	case errors.As(err, &no) && no.Hint != "":
		return fmt.Errorf("%w (hint: %s)", err, no.Hint)
	case errors.As(err, &no):
		return err
	}
	return fmt.Errorf("store wal %s: %w; PostgreSQL keeps the file and asks again", filepath.Base(path), err)
}

// Fetch asks the Fetcher that listens on socket for a WAL file and puts it at path. found is false at the end of the
// archive; a gap, or not knowing, is an error. Nothing is left at path unless found.
func Fetch(ctx context.Context, socket, name, path string) (found bool, err error) {
	a, err := control.Ask(ctx, socket, control.Request{Op: control.OpFetch, Name: name}, nil)
	if err != nil || !a.Found {
		return false, err
	}
	if err := move(a.File, path); err != nil {
		return false, fmt.Errorf("put wal %s in place: %w", name, err)
	}
	return true, nil
}

// move renames a file, or copies it to another file system. PostgreSQL fsyncs what it keeps of what it restores.
func move(from, to string) error {
	if err := os.Rename(from, to); err == nil {
		return nil
	}
	in, err := os.Open(from)
	if err != nil {
		return err
	}
	defer in.Close()
	temp := to + ".pgark"
	out, err := os.OpenFile(temp, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	_, err = out.ReadFrom(in)
	if e := out.Close(); err == nil {
		err = e
	}
	if err == nil {
		err = os.Rename(temp, to)
	}
	if err != nil {
		_ = os.Remove(temp) // the error that led here says more
		return err
	}
	_ = os.Remove(from) // the Fetcher sweeps its ring, too
	return nil
}
