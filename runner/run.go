package main

import (
	"errors"
	"log/slog"
	"os"

	"github.com/spf13/cobra"

	"github.com/pgark/terraform-provider-pgark/internal/engine/daemon"
	"github.com/pgark/terraform-provider-pgark/internal/engine/job"
)

func newRunCommand() *cobra.Command {
	var jobName, instance string
	var supervise bool
	cmd := &cobra.Command{
		Use:   "run --job JOB --instance INSTANCE",
		Short: "Protect an instance: ship its WAL and take its images",
		Long: `run protects one PostgreSQL instance until it is told to stop (SIGTERM): it stores WAL as PostgreSQL writes it, or makes
PostgreSQL finish its segment every interval, keeps WAL in the temporary folder while the repository is away, takes images
when the job's schedule says or WAL was lost, applies retention, and answers archive_command. Terraform sets it up to run
as a service, as the instance's owner. SIGHUP makes it read the job file again.

With --supervise it starts itself as a child, again whenever that ends, and writes a pid file and a log file: for machines
without systemd.`,
		Args: noArguments,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if jobName == "" || instance == "" {
				return usageError(errors.New("run needs --job and --instance\nhint: pgark status shows the jobs of this guest"))
			}
			layout := job.FindLayout()
			if supervise {
				self, err := os.Executable()
				if err != nil {
					return err
				}
				return daemon.Supervise(cmd.Context(), layout, jobName, instance,
					[]string{self, "run", "--job", jobName, "--instance", instance})
			}
			return daemon.Run(cmd.Context(), daemon.Options{
				Layout: layout, Job: jobName, Instance: instance,
				Log: slog.New(slog.NewTextHandler(os.Stderr, nil)),
			})
		},
	}
	cmd.Flags().StringVar(&jobName, "job", "", "job of this guest, as declared in Terraform")
	cmd.Flags().StringVar(&instance, "instance", "", "instance of the job, like 15-main")
	cmd.Flags().BoolVar(&supervise, "supervise", false, "start again whenever it ends; write a pid file and a log file")
	return cmd
}
