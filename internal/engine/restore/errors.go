package restore

import (
	"fmt"
	"strings"
	"time"

	"github.com/pgark/terraform-provider-pgark/internal/engine/postgres"
)

// UnreachableError says that a target cannot be reached from what the repository holds, found before anything was
// touched. Windows is what can be reached.
type UnreachableError struct {
	Series  string
	Target  Target
	Reason  string
	Windows []Window
}

func (e *UnreachableError) Error() string {
	return fmt.Sprintf("restore %s to %s: %s", e.Series, e.Target, e.Reason)
}

// Hint lists the recoverable windows.
func (e *UnreachableError) Hint() string {
	if len(e.Windows) == 0 {
		return "nothing of this series can be restored: no image has all the WAL that makes it consistent"
	}
	lines := make([]string, 0, len(e.Windows)+1)
	lines = append(lines, "what can be restored:")
	for _, w := range e.Windows {
		lines = append(lines, "  "+w.String())
	}
	return strings.Join(lines, "\n")
}

// NotEmptyError says that a directory to restore into has something in it. Nothing was touched.
type NotEmptyError struct {
	What  string // "data directory", "tablespace 16385", "WAL directory"
	Path  string
	Found string // what is in it
	Left  string // who left it there, when it is a restore that was interrupted
}

func (e *NotEmptyError) Error() string {
	if e.Left != "" {
		return fmt.Sprintf("%s %s holds what an interrupted restore left (%s)", e.What, e.Path, e.Left)
	}
	return fmt.Sprintf("%s %s is not empty: found %s", e.What, e.Path, e.Found)
}

// Hint says what to do about it.
func (e *NotEmptyError) Hint() string {
	switch {
	case strings.HasPrefix(e.What, "tablespace"):
		return "restore it elsewhere with --tablespace-mapping " + e.Path + "=NEW-DIRECTORY, or empty the directory first"
	case e.Left != "":
		return "it cannot be started or continued; empty the directory, then run the restore again"
	}
	return "name another directory, or empty this one first"
}

// EndedEarlyError says that recovery stopped before its target.
type EndedEarlyError struct {
	Target Target
	LSN    postgres.LSN // last replayed, 0 if unknown
	Time   time.Time    // last replayed commit, zero if unknown
	Detail string       // what PostgreSQL said
	Log    string       // its log file
}

func (e *EndedEarlyError) Error() string {
	far := "nothing is known of how far it came"
	switch {
	case e.LSN != 0 && !e.Time.IsZero():
		far = fmt.Sprintf("it came to %s, last commit %s", e.LSN, e.Time.UTC().Format(timeFormat))
	case e.LSN != 0:
		far = fmt.Sprintf("it came to %s", e.LSN)
	case !e.Time.IsZero():
		far = "its last commit was of " + e.Time.UTC().Format(timeFormat)
	}
	return fmt.Sprintf("recovery ended before %s: %s (%s)", e.Target, far, e.Detail)
}

// Hint points at the server's log.
func (e *EndedEarlyError) Hint() string { return "the server's log is " + e.Log }

// NoSpaceError says that the files would not fit. Nothing was touched.
type NoSpaceError struct{ Where []string }

func (e *NoSpaceError) Error() string { return "not enough space: " + strings.Join(e.Where, "; ") }

// NoServerError says that there is no PostgreSQL here to start.
type NoServerError struct {
	Major int
	Tried []string
}

func (e *NoServerError) Error() string {
	return fmt.Sprintf("no PostgreSQL %d on this machine: looked in %s", e.Major, strings.Join(e.Tried, ", "))
}

// Hint says how to get or to name one.
func (e *NoServerError) Hint() string {
	return fmt.Sprintf("install it (Debian, Ubuntu: apt-get install postgresql-%d), or name its directory with --bin-directory", e.Major)
}

// ServerError says that the server ended while it recovered, for a reason of its own.
type ServerError struct {
	Said  string // its last FATAL or PANIC
	Fetch string // what restore_command said last
	Log   string
}

func (e *ServerError) Error() string {
	s := "the server ended while it recovered: " + e.Said
	if e.Fetch != "" {
		s += "; " + e.Fetch
	}
	return s
}

// Hint points at the server's log.
func (e *ServerError) Hint() string { return "the server's log is " + e.Log }
