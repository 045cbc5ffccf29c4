package main

import (
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/pgark/terraform-provider-pgark/internal/engine/restore"
)

func newListCommand() *cobra.Command {
	var after, before string
	cmd := &cobra.Command{
		Use:   "list",
		Short: "Show images, recoverable windows and gaps",
		Long: `list shows what can be restored: the images of each series, the windows over which every moment can be restored, and
the gaps between them. It needs no identity, encrypted or not.

    pgark list --job orders
    pgark list --repository s3://backups/pg --series orders/15-main --json`,
		Args: noArguments,
	}
	t := addTarget(cmd)
	cmd.Flags().StringVar(&after, "after", "", "leave out what is over before this time")
	cmd.Flags().StringVar(&before, "before", "", "leave out what begins after this time")
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		filter := restore.Filter{}
		var err error
		if filter.After, err = parseTimeFlag("after", after); err != nil {
			return err
		}
		if filter.Before, err = parseTimeFlag("before", before); err != nil {
			return err
		}
		o, err := t.open(cmd.Context())
		if err != nil {
			return err
		}
		filter.Job, filter.Instance, filter.SystemID = o.Selector.Job, o.Selector.Instance, o.Selector.SystemID
		l, err := restore.Catalog(cmd.Context(), o.Repository, filter)
		if err != nil {
			return err
		}
		if t.JSON {
			return printJSON(cmd.OutOrStdout(), l)
		}
		if len(l.Series) == 0 {
			fmt.Fprintf(cmd.OutOrStdout(), "%s holds nothing of %s.\n", o.Repository.Store().URL(), o.Selector)
			return nil
		}
		for i, s := range l.Series {
			if i > 0 {
				fmt.Fprintln(cmd.OutOrStdout())
			}
			printSeries(cmd.OutOrStdout(), s)
		}
		return nil
	}
	return cmd
}

func printSeries(w io.Writer, s restore.SeriesListing) {
	fmt.Fprintf(w, "%s/%s (system identifier %s)\n", s.Job, s.Instance, s.SystemIdentifier)
	if len(s.Images) == 0 {
		fmt.Fprintln(w, "  no images")
	} else {
		rows := make([][]string, 0, len(s.Images))
		for _, i := range s.Images {
			status := i.Status
			if i.Reason != "" {
				status += ": " + i.Reason
			}
			if i.CorruptPages > 0 {
				status += fmt.Sprintf(", %d damaged pages", i.CorruptPages)
			}
			rows = append(rows, []string{
				i.ID, i.Kind, humanTime(i.CompletedAt), humanDuration(i.CompletedAt.Sub(i.StartedAt)),
				humanBytes(i.SourceBytes), humanBytes(i.ReadBytes), humanBytes(i.StoredBytes), i.StopLSN.String(), fmt.Sprint(uint32(i.Timeline)), status,
			})
		}
		printTable(w, "  ", []string{"image", "kind", "completed", ">took", ">size", ">read", ">stored", "LSN", ">timeline", "status"}, rows)
	}
	if len(s.Windows) > 0 {
		fmt.Fprintln(w, "\n  every moment can be restored")
		rows := make([][]string, 0, len(s.Windows))
		for _, v := range s.Windows {
			rows = append(rows, []string{
				"from " + humanTime(v.From), "to " + humanTime(v.To), humanDuration(v.To.Sub(v.From)),
				fmt.Sprintf("LSN %s to %s", v.StartLSN, v.EndLSN), fmt.Sprintf("timeline %d", v.Timeline),
			})
		}
		printRows(w, "  ", rows)
	}
	if len(s.Gaps) > 0 {
		fmt.Fprintln(w, "\n  WAL is missing")
		rows := make([][]string, 0, len(s.Gaps))
		for _, g := range s.Gaps {
			rows = append(rows, []string{
				"after " + timeOrUnknown(g.From), "before " + timeOrUnknown(g.To), fmt.Sprintf("%d segments", g.Segments),
				fmt.Sprintf("LSN %s to %s", g.StartLSN, g.EndLSN), fmt.Sprintf("timeline %d", g.Timeline),
			})
		}
		printRows(w, "  ", rows)
	}
}

func timeOrUnknown(t *time.Time) string {
	if t == nil {
		return "(unknown)"
	}
	return humanTime(*t)
}

// timeLayouts are the ways in which people, PostgreSQL and JSON write times. Those without an offset are local.
var timeLayouts = []string{
	time.RFC3339Nano,
	"2006-01-02 15:04:05.999999999Z07:00", "2006-01-02 15:04:05.999999999Z07", "2006-01-02 15:04:05.999999999 Z07:00",
	"2006-01-02T15:04:05.999999999Z07",
	"2006-01-02T15:04:05.999999999", "2006-01-02 15:04:05.999999999", "2006-01-02 15:04", "2006-01-02",
}

// parseTimeFlag reads a time; an empty value is the zero time.
func parseTimeFlag(flag, value string) (time.Time, error) {
	if value == "" {
		return time.Time{}, nil
	}
	for _, layout := range timeLayouts {
		if t, err := time.ParseInLocation(layout, value, time.Local); err == nil {
			return t, nil
		}
	}
	// Go takes an abbreviation that it does not know for UTC, so only what cannot be mistaken is accepted.
	if rest, ok := strings.CutSuffix(value, " UTC"); ok {
		return parseTimeFlag(flag, rest+"+00:00")
	}
	return time.Time{}, usageError(fmt.Errorf("--%s %q: expected a time like '2026-11-22 14:03:10+00' or 2026-11-22T14:03:10.5Z", flag, value))
}
