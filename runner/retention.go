package main

import (
	"context"
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/pgark/terraform-provider-pgark/internal/engine/job"
	"github.com/pgark/terraform-provider-pgark/internal/engine/repository"
	"github.com/pgark/terraform-provider-pgark/internal/engine/retention"
)

func newRetentionCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "retention",
		Short: "Show and remove what is kept no longer",
		Long: `retention decides which images and which WAL a series may lose, by what the job declares or by the rules given as
flags, and removes them. The newest image that can be restored always stays, and every image keeps the WAL that makes it
consistent. Without any rule all images stay, and WAL that no image can use goes.

    pgark retention plan --job orders
    pgark retention apply --job orders
    pgark retention plan --repository s3://backups/pg --series orders/15-main --keep-days 30 --wal-keep-days 7`,
		Args: noArguments,
	}
	cmd.AddCommand(newRetentionPlanCommand(), newRetentionApplyCommand())
	return cmd
}

// rules are the flags that stand in for, or change, what the job declares.
type rules struct {
	images      job.ImageRetention
	walKeepDays int
}

func addRules(cmd *cobra.Command) *rules {
	r := &rules{}
	f := cmd.Flags()
	f.IntVar(&r.images.KeepLast, "keep-last", 0, "keep so many of the newest images")
	f.IntVar(&r.images.KeepDays, "keep-days", 0, "keep the images that are needed to restore any moment of so many days")
	f.IntVar(&r.images.Weekly, "weekly", 0, "keep the newest image of each of so many weeks")
	f.IntVar(&r.images.Monthly, "monthly", 0, "keep the newest image of each of so many months")
	f.IntVar(&r.images.Yearly, "yearly", 0, "keep the newest image of each of so many years")
	f.IntVar(&r.walKeepDays, "wal-keep-days", 0, "keep the WAL of so many days (default: as long as an image needs it)")
	return r
}

// policy is the job's, with the flags instead of it where any is given: image rules as a whole, and the WAL rule.
func (r *rules) policy(j *job.Job) (retention.Policy, error) {
	var p retention.Policy
	if j != nil {
		p = retention.PolicyOf(j)
	}
	if r.images != (job.ImageRetention{}) {
		p.Images = r.images
	}
	if r.walKeepDays != 0 {
		p.WAL = &job.WALRetention{KeepDays: r.walKeepDays}
	}
	if err := p.Check(); err != nil {
		return p, usageError(err)
	}
	return p, nil
}

func newRetentionPlanCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "plan",
		Short: "Show what apply would remove, and why the rest stays",
		Args:  noArguments,
	}
	t, r := addTarget(cmd), addRules(cmd)
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		opened, policy, err := openForRetention(cmd.Context(), t, r)
		if err != nil {
			return err
		}
		plans := []*retention.Plan{}
		for _, series := range opened.series() {
			state, err := retention.Read(cmd.Context(), series)
			if err != nil {
				return fmt.Errorf("plan retention of %s: %w", series.ID(), err)
			}
			plan, err := retention.Make(state, policy, time.Now())
			if err != nil {
				return err
			}
			plans = append(plans, plan)
		}
		if t.JSON {
			return printJSON(cmd.OutOrStdout(), map[string]any{"series": plans})
		}
		for i, plan := range plans {
			if i > 0 {
				fmt.Fprintln(cmd.OutOrStdout())
			}
			printPlan(cmd.OutOrStdout(), plan)
		}
		return nil
	}
	return cmd
}

func newRetentionApplyCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "apply",
		Short: "Remove what is kept no longer",
		Long:  `apply removes what "pgark retention plan" shows. It may be interrupted at any time and run again.`,
		Args:  noArguments,
	}
	t, r := addTarget(cmd), addRules(cmd)
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		opened, policy, err := openForRetention(cmd.Context(), t, r)
		if err != nil {
			return err
		}
		type applied struct {
			Series string `json:"series"`
			*retention.Result
		}
		results := []applied{}
		for _, series := range opened.series() {
			result, err := retention.Run(cmd.Context(), series, policy, time.Now)
			if err != nil {
				return err
			}
			results = append(results, applied{series.ID().String(), result})
			if !t.JSON {
				printRemoved(cmd.OutOrStdout(), series.ID(), result)
			}
		}
		if t.JSON {
			return printJSON(cmd.OutOrStdout(), map[string]any{"series": results})
		}
		return nil
	}
	return cmd
}

func openForRetention(ctx context.Context, t *target, r *rules) (*opened, retention.Policy, error) {
	o, err := t.open(ctx)
	if err != nil {
		return nil, retention.Policy{}, err
	}
	policy, err := r.policy(o.Job)
	if err == nil && len(o.IDs) == 0 {
		err = fmt.Errorf("%s holds nothing of %s", o.Repository.Store().URL(), o.Selector)
	}
	return o, policy, err
}

func printPlan(w io.Writer, p *retention.Plan) {
	fmt.Fprintln(w, p.Series)
	if len(p.Images) == 0 {
		fmt.Fprintln(w, "  no images")
	} else {
		rows := make([][]string, 0, len(p.Images))
		for _, i := range p.Images {
			what := "expires"
			switch {
			case i.Keep && i.Window:
				what = "stays"
			case i.Keep:
				what = "stays, without the WAL after it"
			}
			rows = append(rows, []string{i.ID, humanTime(i.CompletedAt), humanBytes(i.StoredBytes), what, strings.Join(i.Reasons, "; ")})
		}
		printTable(w, "  ", []string{"image", "completed", ">stored", "", "because"}, rows)
	}
	for _, l := range p.WAL {
		what := "all stays"
		if l.DeletedFiles > 0 {
			what = fmt.Sprintf("%d go (%s to %s, %s)", l.DeletedFiles, l.FirstDeleted, l.LastDeleted, humanBytes(l.DeletedBytes))
		}
		if l.DeletedTails > 0 {
			what += fmt.Sprintf("; %d of %d tails go (%s)", l.DeletedTails, l.Tails, humanBytes(l.DeletedTailBytes))
		}
		fmt.Fprintf(w, "  WAL of timeline %d: %d files, %s: %s\n", uint32(l.Timeline), l.Files, what, l.Reason)
	}
	if !p.Changes() {
		fmt.Fprintln(w, "  nothing to remove")
	}
}

func printRemoved(w io.Writer, id repository.SeriesID, r *retention.Result) {
	fmt.Fprintf(w, "%s: %d images expired, %d WAL files (%s) and %d objects of images (%s) removed\n",
		id, len(r.ExpiredImages), r.WALFiles, humanBytes(r.WALBytes), r.GarbageObjects, humanBytes(r.GarbageBytes))
	for _, why := range r.Held {
		fmt.Fprintf(w, "  stays for now: %s\n", why)
	}
}
