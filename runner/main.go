// Command pgark is the runner: on a guest it takes image backups of PostgreSQL and ships its WAL all day; anywhere it
// lists, restores and checks what a repository holds. Each file holds one command, which reads flags, calls the engine
// and prints; what a command does is in internal/engine.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"runtime"
	"strings"
	"syscall"

	"github.com/spf13/cobra"

	"github.com/pgark/terraform-provider-pgark/internal/engine/guest/remote"
	"github.com/pgark/terraform-provider-pgark/internal/engine/repository"
	"github.com/pgark/terraform-provider-pgark/internal/engine/restore"
)

// version is the release that this source becomes. A deployed runner is told apart by its content hash.
const version = "0.1.0"

// Exit codes. `pgark wal fetch` has its own, because PostgreSQL reads meaning into them (see wal.go).
const (
	exitDone        = 0
	exitError       = 1
	exitUsage       = 2
	exitUnreachable = 3 // a restore cannot reach its target, or nothing that was asked for is there
	exitInterrupted = 130
)

func main() {
	// PostgreSQL starts `pgark wal push` once a segment and waits for it: nothing is built that it does not need.
	if len(os.Args) > 2 && os.Args[1] == "wal" && os.Args[2] == "push" {
		os.Exit(walPush(os.Args[3:]))
	}
	os.Exit(run(os.Args[1:]))
}

func run(args []string) int {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	// The first signal asks for an orderly end; with the handler gone, a second one ends the process at once.
	context.AfterFunc(ctx, stop)

	root := newRootCommand()
	root.SetArgs(args)
	err := root.ExecuteContext(ctx)
	if err == nil {
		return exitDone
	}
	code := exitCode(ctx, err)
	var silent *codeError
	if !errors.As(err, &silent) || silent.err != nil {
		printError(os.Stderr, err)
	}
	return code
}

func newRootCommand() *cobra.Command {
	root := &cobra.Command{
		Use:   "pgark",
		Short: "Back up PostgreSQL to S3 and restore any moment",
		Long: `pgark takes image backups of the volumes that hold PostgreSQL, ships its WAL to S3 or a directory, and restores any
moment between.

On a guest that Terraform has set up, name the job; anywhere else, name the repository and, where it holds several, the
series:

    pgark list --job orders
    pgark list --repository s3://backups/pg
    pgark restore --repository s3://backups/pg --series orders/15-main \
          --target-time '2026-11-22 14:03:10+00' --data-directory /var/lib/postgresql/15/rescued --start --port 5433

S3 keys come from the job's credentials file or from the AWS chain (AWS_ACCESS_KEY_ID, AWS_PROFILE, an instance profile,
…); AWS_ENDPOINT_URL or --endpoint names another S3 service. An encrypted repository is read with the age identities in
the file that PGARK_IDENTITY_FILE names; listing needs none.

Output is for people; --json prints one JSON document on standard output instead. pgark exits 0 only when the thing is
done, 2 when it was asked wrongly, 3 when a restore cannot reach its target, and 1 on any other error.`,
		SilenceErrors:     true,
		SilenceUsage:      true,
		CompletionOptions: cobra.CompletionOptions{HiddenDefaultCmd: true},
	}
	root.SetFlagErrorFunc(func(cmd *cobra.Command, err error) error {
		return usageError(fmt.Errorf("%w\nhint: see %s --help", err, cmd.CommandPath()))
	})
	root.AddCommand(
		newRunCommand(),
		newBootCommand(),
		newCheckCommand(),
		newImageCommand(),
		newWALCommand(),
		newListCommand(),
		newStatsCommand(),
		newStatusCommand(),
		newMetricsCommand(),
		newRestoreCommand(),
		newRetentionCommand(),
		newVerifyCommand(),
		newGuestCommand(),
		newVersionCommand(),
	)
	return root
}

func newVersionCommand() *cobra.Command {
	var asJSON bool
	cmd := &cobra.Command{
		Use:   "version",
		Short: "Say which build this is",
		Args:  noArguments,
		RunE: func(cmd *cobra.Command, _ []string) error {
			sum, err := remote.OwnDigest()
			if err != nil {
				return err
			}
			if asJSON {
				return printJSON(cmd.OutOrStdout(), map[string]string{
					"version": version, "sha256": sum, "go": runtime.Version(), "platform": runtime.GOOS + "/" + runtime.GOARCH,
				})
			}
			fmt.Fprintf(cmd.OutOrStdout(), "pgark %s (%s/%s, %s)\nsha256 %s\n", version, runtime.GOOS, runtime.GOARCH, runtime.Version(), sum)
			return nil
		},
	}
	cmd.Flags().BoolVar(&asJSON, "json", false, "print one JSON document")
	return cmd
}

// ---- errors ---------------------------------------------------------------------------------------------------------

// codeError ends the program with a code of its own; with a nil err nothing is printed.
type codeError struct {
	code int
	err  error
}

func (e *codeError) Error() string {
	if e.err == nil {
		return fmt.Sprintf("exit %d", e.code)
	}
	return e.err.Error()
}

func (e *codeError) Unwrap() error { return e.err }

// usageError marks err as a mistake in how the command was called.
func usageError(err error) error { return &codeError{exitUsage, err} }

// noArguments is cobra.NoArgs with our exit code.
func noArguments(cmd *cobra.Command, args []string) error {
	if len(args) > 0 {
		return usageError(fmt.Errorf("%s takes no arguments, found %q\nhint: see %s --help", cmd.CommandPath(), args[0], cmd.CommandPath()))
	}
	return nil
}

// exitCode is the one place where errors become exit codes.
func exitCode(ctx context.Context, err error) int {
	var (
		coded       *codeError
		unreachable *restore.UnreachableError
		ended       *restore.EndedEarlyError
	)
	switch {
	case errors.As(err, &coded):
		return coded.code
	case ctx.Err() != nil && errors.Is(err, context.Canceled):
		return exitInterrupted
	case errors.As(err, &unreachable), errors.As(err, &ended):
		return exitUnreachable
	case strings.HasPrefix(err.Error(), "unknown command "): // cobra has no type for it
		return exitUsage
	}
	return exitError
}

// printError writes the error and, on lines of their own, the hints that go with it.
func printError(w io.Writer, err error) {
	fmt.Fprintf(w, "pgark: %v\n", err)
	var hinted interface{ Hint() string }
	if errors.As(err, &hinted) && hinted.Hint() != "" {
		fmt.Fprintf(w, "hint: %s\n", strings.ReplaceAll(hinted.Hint(), "\n", "\n      "))
	}
	var owned *repository.OwnedError
	if errors.As(err, &owned) {
		fmt.Fprintf(w, "hint: give this job another name, or hand the name over on purpose by naming machine %s\n", owned.Owner.MachineID)
	}
}
