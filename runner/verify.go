package main

import (
	"errors"
	"fmt"
	"io"

	"github.com/spf13/cobra"

	"github.com/pgark/terraform-provider-pgark/internal/engine/restore"
)

func newVerifyCommand() *cobra.Command {
	var checkWAL bool
	cmd := &cobra.Command{
		Use:   "verify --wal",
		Short: "Read what is stored, and check it",
		Long: `verify --wal reads every WAL object of the series: segments, what was streamed before they were whole, and timeline
histories. It checks each one's digest, and that every record follows the one before it, from segment to segment. It says
what is damaged, what is missing, and what can be restored without either; it exits 1 if anything is.

    pgark verify --wal --job orders
    pgark verify --wal --repository s3://backups/pg --series orders/15-main --json

All WAL is transferred, so it is best run near the repository. An encrypted one is read with the identities in the file
that PGARK_IDENTITY_FILE names. Nothing is changed. Images are not read.`,
		Args: noArguments,
	}
	t := addTarget(cmd)
	cmd.Flags().BoolVar(&checkWAL, "wal", false, "check the WAL")
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		if !checkWAL {
			return usageError(errors.New("verify: nothing to check is named: --wal"))
		}
		o, err := t.open(cmd.Context())
		if err != nil {
			return err
		}
		if len(o.IDs) == 0 {
			return fmt.Errorf("%s holds nothing of %s", o.Repository.Store().URL(), o.Selector)
		}
		p := newProgress()
		report, err := restore.CheckWAL(cmd.Context(), o.Repository,
			restore.Filter{Job: o.Selector.Job, Instance: o.Selector.Instance, SystemID: o.Selector.SystemID},
			func(at restore.WALProgress) {
				p.Update("verify: %s: %d of %d objects, %s", at.Series, at.Objects, at.Total, humanBytes(at.Bytes))
			})
		p.Clear()
		if err != nil {
			return err
		}
		if t.JSON {
			err = printJSON(cmd.OutOrStdout(), report)
		} else {
			printWALCheck(cmd.OutOrStdout(), report)
		}
		if err == nil && !report.OK() {
			err = fmt.Errorf("verify: %d WAL objects are damaged, %d missing", len(report.Damaged), len(report.Missing))
		}
		return err
	}
	return cmd
}

func printWALCheck(w io.Writer, c *restore.WALCheck) {
	fmt.Fprintf(w, "%d WAL objects, %s, read and checked\n", c.Objects, humanBytes(c.Bytes))
	for _, d := range c.Damaged {
		fmt.Fprintf(w, "  damaged  %s/wal/%s\n           %s\n", d.Series, d.Name, d.Error)
	}
	for _, m := range c.Missing {
		fmt.Fprintf(w, "  missing  %s/wal/%s (LSN %s to %s, timeline %d): %s\n", m.Series, m.Name, m.StartLSN, m.EndLSN, m.Timeline, m.Why)
	}
	if len(c.Windows) == 0 {
		fmt.Fprintln(w, "\nNothing can be restored: no image has all the WAL that makes it consistent.")
		return
	}
	fmt.Fprintln(w, "\nEvery moment can be restored:")
	rows := make([][]string, 0, len(c.Windows))
	for _, v := range c.Windows {
		rows = append(rows, []string{
			v.Series, "from " + humanTime(v.From), "to " + humanTime(v.To),
			fmt.Sprintf("LSN %s to %s", v.StartLSN, v.EndLSN), fmt.Sprintf("timeline %d", v.Timeline),
		})
	}
	printRows(w, "", rows)
}
