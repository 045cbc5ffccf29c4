package main

import (
	"errors"
	"fmt"
	"io"
	"strings"

	"github.com/spf13/cobra"

	"github.com/pgark/terraform-provider-pgark/internal/engine/guest"
	"github.com/pgark/terraform-provider-pgark/internal/engine/job"
)

func newCheckCommand() *cobra.Command {
	t := &target{Layout: job.FindLayout()}
	cmd := &cobra.Command{
		Use:   "check --job JOB",
		Short: "Check the prerequisites and send a WAL segment the whole way",
		Long: `check looks whether everything that protects a job's instances is as it has to be: PostgreSQL and its settings, the
runner and its place, the repository, the clock. If nothing fails, it has each primary finish a WAL segment and waits until
that segment is in the repository. Apart from that segment it changes nothing. It exits 0 when every check passes, or only
warns, and every segment has arrived.

Run it as root or as the owner of the instances.

    sudo pgark check --job orders`,
		Args: noArguments,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if t.Job == "" {
				return usageError(errors.New("check needs --job JOB"))
			}
			j, err := t.readJob()
			if err != nil {
				return err
			}
			keys, err := job.LoadCredentials(t.Layout, t.Job)
			if err != nil {
				return err
			}
			checks, err := guest.Local(t.Layout).Check(cmd.Context(), guest.CheckRequest{
				Job: j, Credentials: keys, Settings: guest.SettingsPolicy{Manage: true, Restart: "never", ExistingArchiveCommand: "fail"},
				Deployed: true,
			})
			if err != nil {
				return err
			}
			failed := 0
			for _, c := range checks {
				if c.Status == guest.Fail {
					failed++
				}
			}
			if !t.JSON {
				printChecks(cmd.OutOrStdout(), checks)
			}
			proofs := []guest.Proof{}
			if failed == 0 {
				proofs, err = guest.Prove(cmd.Context(), t.Layout, j, keys)
			}
			if t.JSON {
				document := map[string]any{"checks": checks, "proofs": proofs, "ok": failed == 0 && err == nil}
				if err != nil {
					document["error"] = err.Error()
				}
				if err := printJSON(cmd.OutOrStdout(), document); err != nil {
					return err
				}
			} else {
				printProofs(cmd.OutOrStdout(), proofs)
			}
			if err != nil {
				return err
			}
			if failed > 0 {
				if t.JSON {
					return &codeError{exitError, nil}
				}
				return fmt.Errorf("job %s: %d of %d checks failed; no segment was sent", t.Job, failed, len(checks))
			}
			return nil
		},
	}
	f := cmd.Flags()
	f.StringVar(&t.Job, "job", "", "job of this guest")
	f.BoolVar(&t.JSON, "json", false, "print one JSON document")
	return cmd
}

func printChecks(w io.Writer, checks []guest.Check) {
	rows := make([][]string, len(checks))
	for i, c := range checks {
		rows[i] = []string{string(c.Status), c.Name, c.Instance, c.Found}
	}
	printTable(w, "", []string{"", "CHECK", "INSTANCE", "FOUND"}, rows)
	for _, c := range checks {
		if c.Status == guest.Pass {
			continue
		}
		on := ""
		if c.Instance != "" {
			on = " of " + c.Instance
		}
		fmt.Fprintf(w, "\n%s%s: found %s\n  expected: %s\n", c.Name, on, c.Found, c.Expected)
		if c.Remedy != "" {
			fmt.Fprintf(w, "  to fix:   %s\n", strings.ReplaceAll(c.Remedy, "\n", "\n            "))
		}
	}
}

func printProofs(w io.Writer, proofs []guest.Proof) {
	for _, p := range proofs {
		if p.Skipped != "" {
			fmt.Fprintf(w, "\n%s: no segment was sent: %s\n", p.Instance, p.Skipped)
			continue
		}
		fmt.Fprintf(w, "\n%s: WAL segment %s reached the repository in %.1f s (%s stored)\n", p.Instance, p.Segment, p.Seconds, humanBytes(p.StoredSize))
	}
}
