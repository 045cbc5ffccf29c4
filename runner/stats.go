package main

import (
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/pgark/terraform-provider-pgark/internal/engine/session"
)

func newStatsCommand() *cobra.Command {
	var o session.Options
	cmd := &cobra.Command{
		Use:   "stats",
		Short: "Show how protection fared",
		Long: `stats shows for each series how image backups and WAL shipping fared over a period, and how they stand now: sessions
that succeeded and failed, durations, bytes, the delay of WAL and how often it was too long, restore points. It needs no
identity, encrypted or not.

    pgark stats --job orders
    pgark stats --repository s3://backups/pg --period 168h --json`,
		Args: noArguments,
	}
	t := addTarget(cmd)
	cmd.Flags().DurationVar(&o.Period, "period", 24*time.Hour, "length of the period that ends now")
	cmd.Flags().DurationVar(&o.MaxDelay, "objective", 0, "how long WAL may take until it is durable (default: the job's max_lag or interval, else 15m)")
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		if o.Period <= 0 || o.MaxDelay < 0 {
			return usageError(fmt.Errorf("--period %v, --objective %v: expected positive durations", o.Period, o.MaxDelay))
		}
		opened, err := t.open(cmd.Context())
		if err != nil {
			return err
		}
		o.Job = opened.Job
		s, err := session.Collect(cmd.Context(), opened.Repository, opened.IDs, o)
		if err != nil {
			return err
		}
		if t.JSON {
			return printJSON(cmd.OutOrStdout(), s)
		}
		printStatistics(cmd.OutOrStdout(), s)
		return nil
	}
	return cmd
}

func printStatistics(w io.Writer, s *session.Statistics) {
	fmt.Fprintf(w, "%s to %s: %d instances protected, %d not; %d success, %d warning, %d error\n",
		humanTime(s.PeriodStartedAt), humanTime(s.PeriodEndedAt), s.ProtectedInstances, s.UnprotectedInstances,
		s.SuccessInstances, s.WarningInstances, s.ErrorInstances)
	for _, series := range s.Series {
		earlier := ""
		if !series.Current {
			earlier = ", an earlier cluster"
		}
		fmt.Fprintf(w, "\n%s/%s (system identifier %s%s): %s\n", series.Job, series.Instance, series.SystemIdentifier, earlier, series.Status)
		rows := imageRows(series.Images)
		rows = append(rows, walRows(series.WAL)...)
		points := series.RestorePoints
		if points.Count == 0 {
			rows = append(rows, []string{"restore points", "none"})
		} else {
			rows = append(rows, []string{"restore points", fmt.Sprintf("%d, from %s to %s, %s uploaded for them",
				points.Count, pointer(points.OldestAt, humanTime), pointer(points.NewestAt, humanTime), humanBytes(points.StoredBytes))})
		}
		printRows(w, "  ", rows)
	}
}

func imageRows(i session.Images) [][]string {
	rows := [][]string{
		{"images", outcomes(i.SuccessCount, i.WarningCount, i.ErrorCount)},
		{"  duration", fmt.Sprintf("%s on average, %s at most", seconds(i.AverageDurationSeconds), seconds(i.MaxDurationSeconds))},
		{"  bytes", fmt.Sprintf("%s in images, %s read, %s stored (%.1f:1)", humanBytes(i.SourceBytes), humanBytes(i.ReadBytes), humanBytes(i.StoredBytes), i.Ratio)},
		{"  last success", pointer(i.LastSuccessAt, humanTime)},
	}
	if i.LastFailureAt != nil {
		rows = append(rows, []string{"  last failure", fmt.Sprintf("%s: %s", humanTime(*i.LastFailureAt), oneLine(i.LastError))})
	}
	if i.ConsecutiveFailures > 0 {
		rows = append(rows, []string{"  failed in a row", fmt.Sprint(i.ConsecutiveFailures)})
	}
	if i.RunningSince != nil {
		rows = append(rows, []string{"  running since", humanTime(*i.RunningSince)})
	}
	if i.NextAt != nil {
		rows = append(rows, []string{"  next", humanTime(*i.NextAt)})
	}
	return rows
}

func walRows(l session.WAL) [][]string {
	rows := [][]string{
		{"WAL", fmt.Sprintf("%d segments, %s, %s stored (%.1f:1)", l.Segments, humanBytes(l.SourceBytes), humanBytes(l.StoredBytes), l.Ratio)},
		{"  sessions", outcomes(l.SuccessCount, l.WarningCount, l.ErrorCount)},
	}
	if l.SLAPercent != nil {
		rows = append(rows, []string{"  objective", fmt.Sprintf("%s met by %.1f %% of sessions, %d missed it, longest delay %s",
			seconds(l.ObjectiveSeconds), *l.SLAPercent, l.Misses, seconds(l.MaxDelaySeconds))})
	}
	if l.WithinPercent != nil {
		rows = append(rows, []string{"  lag", fmt.Sprintf("within it %.2f %% of the time, %s at most; %d tails, %s", *l.WithinPercent,
			seconds(l.MaxLagSeconds), l.Tails, humanBytes(l.TailBytes))})
	}
	if l.Gaps > 0 {
		rows = append(rows, []string{"  GAPS", fmt.Sprintf("WAL was lost in %d places", l.Gaps)})
	}
	if l.Spooled > 0 {
		rows = append(rows, []string{"  spooled", fmt.Sprintf("%d files waited in the temporary folder", l.Spooled)})
	}
	if l.LastStoredAt != nil {
		rows = append(rows, []string{"  last stored", fmt.Sprintf("%s at %s, %s ago", l.LastSegment, humanTime(*l.LastStoredAt), pointer(l.LagSeconds, seconds))})
	}
	if l.LastFailureAt != nil {
		rows = append(rows, []string{"  last failure", fmt.Sprintf("%s: %s", humanTime(*l.LastFailureAt), oneLine(l.LastError))})
	}
	return rows
}

func outcomes(success, warning, failed int) string {
	return fmt.Sprintf("%d success, %d warning, %d error", success, warning, failed)
}

func seconds(s float64) string { return humanDuration(time.Duration(s * float64(time.Second))) }

// pointer prints what may be unknown.
func pointer[T any](v *T, text func(T) string) string {
	if v == nil {
		return "-"
	}
	return text(*v)
}

func oneLine(s string) string { return strings.Join(strings.Fields(s), " ") }
