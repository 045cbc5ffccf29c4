//go:build linux

package guest

import (
	"context"
	"errors"
	"maps"
	"slices"
	"strings"

	"github.com/pgark/terraform-provider-pgark/internal/engine/job"
	"github.com/pgark/terraform-provider-pgark/internal/engine/postgres"
)

// inspected is what a running server tells, for the checks.
type inspected struct {
	*postgres.Server
	archiveCommand string // as it is set: pg_settings shows "(disabled)" while archive_mode is off
	missing        []postgres.MissingPrivilege
	fileProblems   []postgres.FileProblem
	stream         *streaming // nil: nothing is to be streamed
}

var errNotRunning = errors.New("PostgreSQL is not running")

// privilegesError says that a role lacks what it takes to look.
type privilegesError struct {
	role    string
	missing []postgres.MissingPrivilege
	err     error
}

func (e *privilegesError) Error() string { return lacks(e.role, e.missing) }
func (e *privilegesError) Unwrap() error { return e.err }

func lacks(role string, missing []postgres.MissingPrivilege) string {
	what := make([]string, len(missing))
	for i, m := range missing {
		what[i] = m.What
	}
	return "role " + role + " may not " + strings.Join(what, ", may not ")
}

// inspect asks the cluster's server for what a job wants of it, and whether our role may change the given settings and, if
// a restart is allowed, those that it is needed for; an error of postgres.Connect if it is not there.
func inspect(ctx context.Context, c cluster, j *job.Job, alter []string, restart bool) (*inspected, error) {
	if !c.Running {
		return nil, errNotRunning
	}
	conn, err := dial(ctx, c.Instance.Instance)
	if err != nil {
		return nil, err
	}
	defer closeNow(conn)
	s := &inspected{}
	// First, because what follows needs some of them.
	if s.missing, err = postgres.MissingPrivileges(ctx, conn, alter...); err != nil {
		return nil, err
	}
	fail := func(err error) (*inspected, error) {
		if len(s.missing) > 0 && postgres.IsDenied(err) {
			err = &privilegesError{role: c.DatabaseUser, missing: s.missing, err: err}
		}
		return nil, err
	}
	if err := verify(ctx, conn, c.Instance.Instance); err != nil {
		return fail(err)
	}
	if s.Server, err = postgres.ReadServer(ctx, conn); err != nil {
		return fail(err)
	}
	if s.archiveCommand, err = readArchiveCommand(ctx, conn); err != nil {
		return fail(err)
	}
	if j.WAL.Mode == job.WALContinuous {
		if s.stream, err = inspectStreaming(ctx, conn, c); err != nil {
			return fail(err)
		}
	}
	if more := s.restartSettings(); restart && len(more) > 0 {
		alter = slices.Concat(alter, slices.Collect(maps.Keys(more)))
		slices.Sort(alter)
		if s.missing, err = postgres.MissingPrivileges(ctx, conn, slices.Compact(alter)...); err != nil {
			return nil, err
		}
	}
	if s.Superuser {
		if s.fileProblems, err = postgres.FileProblems(ctx, conn); err != nil {
			return fail(err)
		}
	}
	return s, nil
}

func role(s *postgres.Server) string {
	if s.InRecovery {
		return "replica"
	}
	return "primary"
}
