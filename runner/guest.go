package main

import (
	"os"
	"os/signal"
	"syscall"

	"github.com/spf13/cobra"

	"github.com/pgark/terraform-provider-pgark/internal/engine/guest"
	"github.com/pgark/terraform-provider-pgark/internal/engine/guest/remote"
	"github.com/pgark/terraform-provider-pgark/internal/engine/job"
)

func newGuestCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "guest",
		Short: "Serve the provider, over SSH, on standard input and output",
		Long: `guest is what the Terraform provider starts on a guest over SSH: it answers requests on standard input, one JSON document
a line, and ends with its input. It is of no use to people; they have the other commands.`,
		Hidden: true,
		Args:   noArguments,
		RunE: func(cmd *cobra.Command, _ []string) error {
			layout := job.FindLayout()
			if err := remote.RemoveStaged(layout); err != nil {
				return err
			}
			// SSH servers hang up when a connection ends. What runs is canceled then, and has to be put back: no second
			// signal may end the process before that, nor a pipe that nobody reads any more.
			signals := make(chan os.Signal, 1)
			signal.Notify(signals, syscall.SIGHUP, syscall.SIGTERM, syscall.SIGINT)
			broken := make(chan os.Signal, 1)
			signal.Notify(broken, syscall.SIGPIPE)
			ctx, stop := signal.NotifyContext(cmd.Context(), syscall.SIGHUP)
			defer stop()
			return remote.Serve(ctx, guest.Local(layout), os.Stdin, os.Stdout)
		},
	}
}
