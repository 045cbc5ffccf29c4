package wal

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/pgark/terraform-provider-pgark/internal/engine/daemon/control"
)

// pushTimeout ends a request that the runner, hung or stopped by a signal, never answers. A runner that works answers
// within Options.AnswerAfter.
const pushTimeout = 2 * time.Minute

// Push asks the runner that listens on socket to have a WAL file stored, and returns nil once it is durable. A relative
// path is relative to the working directory, as PostgreSQL means it: it runs archive_command in its data directory.
func Push(ctx context.Context, socket, path string) error {
	path, err := filepath.Abs(path)
	if err != nil {
		return fmt.Errorf("store wal %s: %w", path, err)
	}
	name := filepath.Base(path)
	ctx, cancel := context.WithTimeoutCause(ctx, pushTimeout, fmt.Errorf("no answer within %s", pushTimeout))
	defer cancel()
	_, err = control.Ask(ctx, socket, control.Request{Op: control.OpPush, Path: path}, nil)
	var away *control.NotRunningError
	var no *control.AnswerError
	switch {
	case err == nil:
		return nil
	case errors.As(err, &away):
		return fmt.Errorf("store wal %s: %w; PostgreSQL keeps the file and asks again", name, err)
	case errors.As(err, &no):
		if no.Hint != "" {
			return fmt.Errorf("%w (hint: %s)", err, no.Hint)
		}
		return err
	}
	return fmt.Errorf("store wal %s: %w; PostgreSQL keeps the file and asks again", name, err)
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
