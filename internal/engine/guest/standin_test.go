//go:build linux

package guest_test

import (
	"context"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"syscall"

	"github.com/pgark/terraform-provider-pgark/internal/engine/daemon"
	"github.com/pgark/terraform-provider-pgark/internal/engine/job"
	"github.com/pgark/terraform-provider-pgark/internal/engine/wal"
)

// standIn lets the test binary be a runner where it was deployed as one: it does what the commands of the same names do.
func standIn(command string, args []string) int {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM)
	defer stop()
	if command == "wal" {
		args = args[1:] // push
	}
	flags := flag.NewFlagSet(command, flag.ContinueOnError)
	flags.SetOutput(io.Discard)
	name, instance, supervise := flags.String("job", "", ""), flags.String("instance", "", ""), flags.Bool("supervise", false, "")
	err := flags.Parse(args)
	l := job.FindLayout()
	switch {
	case err != nil:
	case command == "version":
	case command == "wal":
		err = wal.Push(ctx, wal.PushRequest{Socket: l.Socket(*name, *instance), JobFile: l.JobFile(*name), Path: flags.Arg(0)})
	case command == "run" && *supervise:
		err = daemon.Supervise(ctx, l, *name, *instance, []string{"/proc/self/exe", "run", "--job", *name, "--instance", *instance})
	case command == "run":
		err = daemon.Run(ctx, daemon.Options{Layout: l, Job: *name, Instance: *instance})
	default:
		err = fmt.Errorf("unexpected command %q", command)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "stand-in for pgark:", err)
		return 1
	}
	return 0
}
