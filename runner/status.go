package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"time"

	"github.com/spf13/cobra"

	"github.com/pgark/terraform-provider-pgark/internal/engine/daemon/control"
	"github.com/pgark/terraform-provider-pgark/internal/engine/job"
)

// runnerStatus is what status shows of one instance.
type runnerStatus struct {
	Job      string          `json:"job"`
	Instance string          `json:"instance"`
	Running  bool            `json:"running"`
	Error    string          `json:"error,omitempty"` // why nothing is known, where Running is false
	Status   *control.Status `json:"status,omitempty"`
}

func newStatusCommand() *cobra.Command {
	t := &target{Layout: job.FindLayout()}
	cmd := &cobra.Command{
		Use:   "status [--job JOB [--instance INSTANCE]]",
		Short: "Show what this guest's runners do",
		Long: `status asks the runners of this guest what they do: whether they reach the repository, how far WAL shipping is, what
waits, and when the next image is due. It exits 0 when every runner it was asked about protects its instance, and 1
otherwise.

    pgark status
    pgark status --job orders --json`,
		Args: noArguments,
		RunE: func(cmd *cobra.Command, _ []string) error {
			all, err := t.runners(cmd.Context())
			if err != nil {
				return err
			}
			if t.JSON {
				err = printJSON(cmd.OutOrStdout(), map[string]any{"runners": all})
			} else {
				for _, r := range all {
					printStatus(cmd.OutOrStdout(), r)
				}
			}
			if err != nil {
				return err
			}
			for _, r := range all {
				if !r.Running || r.Status.State != control.Running {
					return &codeError{exitError, nil}
				}
			}
			return nil
		},
	}
	f := cmd.Flags()
	f.StringVar(&t.Job, "job", "", "job of this guest (default: every one)")
	f.StringVar(&t.Instance, "instance", "", "instance of the job (default: every one)")
	f.BoolVar(&t.JSON, "json", false, "print one JSON document")
	return cmd
}

// runners asks every runner that the flags name.
func (t *target) runners(ctx context.Context) ([]runnerStatus, error) {
	names := t.jobsHere()
	if t.Job != "" {
		names = []string{t.Job}
	} else if t.Instance != "" {
		return nil, usageError(errors.New("--instance needs --job"))
	}
	all := []runnerStatus{}
	for _, name := range names {
		one := *t
		one.Job = name
		j, err := one.readJob()
		if err != nil {
			return nil, err
		}
		for _, i := range j.Protected {
			if t.Instance != "" && t.Instance != i.Name {
				continue
			}
			all = append(all, askRunner(ctx, t.Layout, name, i.Name))
		}
	}
	if len(all) == 0 {
		switch {
		case t.Instance != "":
			return nil, fmt.Errorf("job %s protects no instance %s", t.Job, t.Instance)
		case t.Job != "":
			return nil, fmt.Errorf("job %s protects no instance", t.Job)
		}
		return nil, errors.New("this guest has no jobs")
	}
	return all, nil
}

func askRunner(ctx context.Context, l job.Layout, name, instance string) runnerStatus {
	r := runnerStatus{Job: name, Instance: instance}
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	s, err := control.GetStatus(ctx, l.Socket(name, instance))
	if err != nil {
		r.Error = err.Error()
		return r
	}
	r.Running, r.Status = true, s
	return r
}

func printStatus(w io.Writer, r runnerStatus) {
	fmt.Fprintf(w, "%s/%s: ", r.Job, r.Instance)
	if !r.Running {
		fmt.Fprintf(w, "NOT RUNNING: %s\n", r.Error)
		return
	}
	s := r.Status
	switch s.State {
	case control.Running:
		fmt.Fprintf(w, "protected since %s (process %d)\n", humanTime(s.StartedAt), s.PID)
	default:
		fmt.Fprintf(w, "NOT PROTECTED: %s: %s (process %d)\n", s.State, s.Problem, s.PID)
	}
	line := func(name, format string, args ...any) {
		fmt.Fprintf(w, "  %-12s %s\n", name, fmt.Sprintf(format, args...))
	}
	line("repository", "%s", s.Repository)
	line("data", "%s (system identifier %s)", s.DataDirectory, orDash(s.SystemIdentifier))
	if s.State == control.Running {
		wal := s.WAL
		line("wal", "%d files stored, %s as %s; %d failures", wal.Segments, humanBytes(wal.Bytes), humanBytes(wal.StoredBytes), wal.Failures)
		if wal.LastStoredAt != nil {
			line("", "latest %s, %s ago; longest delay %s", wal.LastName, humanDuration(time.Since(*wal.LastStoredAt)),
				humanDuration(time.Duration(wal.MaxDelaySeconds*float64(time.Second))))
		}
		if wal.Pending > 0 && wal.OldestPending != nil {
			line("", "%d files wait, the oldest for %s", wal.Pending, humanDuration(time.Since(*wal.OldestPending)))
		}
		if wal.LastErrorAt != nil {
			line("", "last error %s ago: %s", humanDuration(time.Since(*wal.LastErrorAt)), wal.LastError)
		}
	}
	switch i := s.Image; {
	case i.Running && i.Progress != "":
		line("image", "%s", i.Progress)
	case i.Running:
		line("image", "being taken")
	case i.LastAt != nil:
		line("image", "latest %s, %s", i.LastID, humanTime(*i.LastAt))
	case s.State == control.Running:
		line("image", "none yet")
	}
	if s.Image.LastErrorAt != nil {
		line("", "failed %s ago: %s", humanDuration(time.Since(*s.Image.LastErrorAt)), s.Image.LastError)
	}
	switch {
	case !s.Enabled:
		line("", "the job is disabled: WAL is shipped, no image is taken by schedule")
	case s.Image.Next != nil:
		line("", "next %s", humanTime(*s.Image.Next))
	}
}

func orDash(s string) string {
	if s == "" {
		return "-"
	}
	return s
}
