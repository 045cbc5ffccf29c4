package main

import (
	"github.com/spf13/cobra"

	"github.com/pgark/terraform-provider-pgark/internal/engine/guest"
	"github.com/pgark/terraform-provider-pgark/internal/engine/job"
)

// newBootCommand is what cron runs with the start of a machine without systemd.
func newBootCommand() *cobra.Command {
	return &cobra.Command{
		Use:    "boot",
		Short:  "Start the runners of all jobs of this machine that do not run",
		Hidden: true,
		Args:   noArguments,
		RunE:   func(cmd *cobra.Command, _ []string) error { return guest.Boot(cmd.Context(), job.FindLayout()) },
	}
}
