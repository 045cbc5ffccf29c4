package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"time"

	"github.com/spf13/cobra"

	"github.com/pgark/terraform-provider-pgark/internal/engine/daemon/control"
	"github.com/pgark/terraform-provider-pgark/internal/engine/job"
	"github.com/pgark/terraform-provider-pgark/internal/engine/repository"
	"github.com/pgark/terraform-provider-pgark/internal/engine/restore"
)

func newImageCommand() *cobra.Command {
	t := &target{Layout: job.FindLayout()}
	kind := "auto"
	cmd := &cobra.Command{
		Use:   "image --job JOB [--instance INSTANCE]",
		Short: "Take an image now",
		Long: `image has the instance's runner take an image now, shows how it goes, and exits 0 once the image is committed. If one is
being taken already, it waits for that one. Ending this command does not end the image.

The first image of a series is full. Later ones upload what changed, and are complete by themselves all the same;
--kind full uploads everything once more.

    pgark image --job orders
    pgark image --job orders --instance 15-main --json`,
		Args: noArguments,
		RunE: func(cmd *cobra.Command, _ []string) error {
			ask := control.AnyKind
			switch kind {
			case "auto":
			case "full":
				ask = control.FullKind
			default:
				return usageError(fmt.Errorf("--kind %q: expected auto or full", kind))
			}
			instance, err := t.oneInstance()
			if err != nil {
				return err
			}
			p := newProgress()
			defer p.Clear()
			began := time.Now()
			answer, err := control.TakeImage(cmd.Context(), t.Layout.Socket(t.Job, instance), ask, func(line string) { p.Update("%s", line) })
			if _, ok := errors.AsType[*control.NotRunningError](err); ok {
				return fmt.Errorf("%w\nhint: the runner takes images, because it ships the WAL that makes them consistent; terraform apply starts it", err)
			}
			if err != nil {
				return err
			}
			var info repository.ImageInfo
			if err := json.Unmarshal(answer, &info); err != nil {
				return fmt.Errorf("answer of the runner: %w", err)
			}
			p.Clear()
			if t.JSON {
				return printJSON(cmd.OutOrStdout(), restore.DescribeImage(info))
			}
			fmt.Fprintf(cmd.OutOrStdout(), "image %s (%s) of %s/%s: %s, %s read, %s stored, in %s; consistent at %s (%s)\n",
				info.SID, info.Kind, t.Job, instance, humanBytes(info.SourceBytes), humanBytes(info.ReadBytes), humanBytes(info.StoredBytes),
				humanDuration(time.Since(began)), humanTime(info.CompletedAt), info.StopLSN)
			if info.CorruptPages > 0 {
				p.Line("warning: %d pages have wrong checksums on the database's disk; the runner's log names them", info.CorruptPages)
			}
			return nil
		},
	}
	f := cmd.Flags()
	f.StringVar(&t.Job, "job", "", "job of this guest, as declared in Terraform")
	f.StringVar(&t.Instance, "instance", "", "instance of the job, like 15-main (default: the only one)")
	f.StringVar(&kind, "kind", kind, "auto, or full to upload everything once more")
	f.BoolVar(&t.JSON, "json", false, "print one JSON document")
	return cmd
}

// oneInstance returns the instance that --instance names, or the job's only one.
func (t *target) oneInstance() (string, error) {
	if t.Job == "" {
		return "", usageError(errors.New("--job is missing"))
	}
	j, err := t.readJob()
	if err != nil {
		return "", err
	}
	var names []string
	for _, i := range j.Protected {
		if i.Name == t.Instance {
			return i.Name, nil
		}
		names = append(names, i.Name)
	}
	switch {
	case t.Instance != "":
		return "", fmt.Errorf("job %s protects no instance %s\nhint: it protects %v", t.Job, t.Instance, names)
	case len(names) != 1:
		return "", usageError(fmt.Errorf("job %s protects %d instances: name one with --instance\nhint: %v", t.Job, len(names), names))
	}
	return names[0], nil
}
