package guest

import (
	"fmt"
	"strings"
)

// PrerequisiteError says that Apply found prerequisites that are not met, and changed nothing.
type PrerequisiteError struct {
	Job    string
	Checks []Check // those that failed
	Causes []error // errors behind them, where there are any: of the repository, say
}

// Unwrap gives the causes.
func (e *PrerequisiteError) Unwrap() []error { return e.Causes }

func (e *PrerequisiteError) Error() string {
	lines := make([]string, len(e.Checks))
	for i, c := range e.Checks {
		on := ""
		if c.Instance != "" {
			on = " of " + c.Instance
		}
		lines[i] = fmt.Sprintf("%s%s: found %s, expected %s", c.Name, on, c.Found, c.Expected)
	}
	return fmt.Sprintf("job %s: nothing was changed, prerequisites are not met: %s", e.Job, strings.Join(lines, "; "))
}

// Hint gives the remedies, one after the other.
func (e *PrerequisiteError) Hint() string {
	var remedies []string
	for _, c := range e.Checks {
		if c.Remedy != "" {
			remedies = append(remedies, c.Remedy)
		}
	}
	return strings.Join(remedies, "\n")
}

// ApplyError says how far Apply came before it failed.
type ApplyError struct {
	Job  string
	Step string   // what was being done
	Done []string // what had been done before
	// RolledBack says that the job was new on this guest, and that everything was put back as it was. Where neither it nor
	// Restored holds, what is in Done stays; applying again goes on from there.
	RolledBack bool
	// Restored says that the job was there before, and that it is again as it was: binary, files, and runners that answer.
	Restored bool
	Err      error
}

func (e *ApplyError) Error() string {
	s := fmt.Sprintf("job %s: %s: %v", e.Job, e.Step, e.Err)
	switch {
	case e.RolledBack:
		s += "; everything was put back as it was"
	case e.Restored:
		s += "; the previous runner was put back and runs"
	case len(e.Done) > 0:
		s += "; what was done stays: " + strings.Join(e.Done, ", ")
	}
	return s
}

// Unwrap gives the cause.
func (e *ApplyError) Unwrap() error { return e.Err }

// ProofError says that a WAL segment which PostgreSQL was made to finish did not reach the repository, or got stuck in the
// archive_command behind pgark's.
type ProofError struct {
	Instance string
	Segment  string
	Behind   bool // it is in the repository: what is chained behind fails
	Waited   string
	Archiver string // what pg_stat_archiver says
	Runner   string // what the runner says
	Log      string // the end of the runner's log
	Err      error  // why it was not waited for any longer, if that is not patience: the time for it all was over
}

// Unwrap gives the cause.
func (e *ProofError) Unwrap() error { return e.Err }

func (e *ProofError) Error() string {
	if e.Behind {
		return fmt.Sprintf("WAL segment %s of %s is in the repository, but the archive_command that is chained behind pgark's did not succeed within %s: PostgreSQL's archiver: %s",
			e.Segment, e.Instance, e.Waited, e.Archiver)
	}
	return fmt.Sprintf("WAL segment %s of %s did not reach the repository within %s: PostgreSQL's archiver: %s; the runner: %s",
		e.Segment, e.Instance, e.Waited, e.Archiver, e.Runner)
}

// Hint gives the end of the runner's log.
func (e *ProofError) Hint() string {
	if e.Behind {
		return "what it printed is in PostgreSQL's log; until it succeeds, PostgreSQL keeps its WAL"
	}
	if e.Log == "" {
		return ""
	}
	return "the end of the runner's log:\n" + e.Log
}

// StreamError says that a runner which is to stream WAL does not.
type StreamError struct {
	Instance string
	Waited   string
	Log      string // the end of the runner's log
	Err      error  // what the runner says of it
}

// Unwrap gives the cause.
func (e *StreamError) Unwrap() error { return e.Err }

func (e *StreamError) Error() string {
	return fmt.Sprintf("the runner of %s did not stream WAL within %s: %v", e.Instance, e.Waited, e.Err)
}

// Hint gives the end of the runner's log.
func (e *StreamError) Hint() string {
	if e.Log == "" {
		return ""
	}
	return "the end of the runner's log:\n" + e.Log
}

// SpoolError says that WAL which PostgreSQL was told is safe lies in the temporary folder only, so that it must stay.
type SpoolError struct {
	Instance    string
	Directories []string
	Files       int
	Remedy      string
}

func (e *SpoolError) Error() string {
	return fmt.Sprintf("%d files of WAL of %s have not reached the repository yet: they lie in %s only", e.Files, e.Instance, strings.Join(e.Directories, " and "))
}

// Hint gives the remedy.
func (e *SpoolError) Hint() string { return e.Remedy }

// RunnerError says that a runner was started and does not answer.
type RunnerError struct {
	Instance string
	Log      string // the end of its log
	Err      error
}

func (e *RunnerError) Error() string {
	return fmt.Sprintf("runner of %s: %v", e.Instance, e.Err)
}

// Unwrap gives the cause.
func (e *RunnerError) Unwrap() error { return e.Err }

// Hint gives the end of the runner's log.
func (e *RunnerError) Hint() string {
	if e.Log == "" {
		return ""
	}
	return "the end of its log:\n" + e.Log
}

// SettingsError says that an instance's old settings could not be put back.
type SettingsError struct {
	Instance string
	Remedy   string
	Err      error
}

func (e *SettingsError) Error() string {
	return fmt.Sprintf("put the settings of %s back: %v", e.Instance, e.Err)
}

// Unwrap gives the cause.
func (e *SettingsError) Unwrap() error { return e.Err }

// Hint gives the remedy.
func (e *SettingsError) Hint() string { return e.Remedy }
