package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/signal"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/spf13/cobra"

	"github.com/pgark/terraform-provider-pgark/internal/engine/daemon/control"
	"github.com/pgark/terraform-provider-pgark/internal/engine/job"
	"github.com/pgark/terraform-provider-pgark/internal/engine/postgres"
	"github.com/pgark/terraform-provider-pgark/internal/engine/wal"
)

// PostgreSQL reads meaning into the exit code of restore_command: up to 125 it takes for "not in the archive", which
// ends recovery; above that, recovery is abandoned (xlogarchive.c, RestoreArchivedFile).
const (
	exitNotArchived = 1
	exitFetchFailed = 130
)

func newWALCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "wal",
		Short: "PostgreSQL's archive_command and restore_command",
		Args:  noArguments,
		RunE:  func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	cmd.AddCommand(newWALPushCommand(), newWALFetchCommand())
	return cmd
}

const walPushUsage = "wal push --job JOB --instance INSTANCE PATH"

// newWALPushCommand is there for its help: walPush answers before any command is built.
func newWALPushCommand() *cobra.Command {
	return &cobra.Command{
		Use:   strings.TrimPrefix(walPushUsage, "wal "),
		Short: "Have the runner store a WAL file (archive_command)",
		Long: `push asks the instance's runner to store a WAL file, and exits 0 once it is durable in the repository. PostgreSQL calls
it as archive_command with PATH = %p, in its data directory. On any other exit PostgreSQL keeps the file, and asks
again.

A runner that is being started anew, after an upgrade say, is waited for up to 20 seconds, unless PostgreSQL shuts down.`,
		DisableFlagParsing: true,
		RunE: func(cmd *cobra.Command, args []string) error {
			if code := walPush(args); code != exitDone {
				return &codeError{code, nil}
			}
			return nil
		},
	}
}

// walPush is `pgark wal push` with the arguments after it; it returns the exit code. It reads its flags by hand, because
// without the small client (client.c), which leaves the unusual to it, it is started once a segment, while PostgreSQL
// waits.
func walPush(args []string) int {
	var jobName, instance, path string
	for i := 0; i < len(args); i++ {
		name, value, hasValue := strings.Cut(args[i], "=")
		var into *string
		switch name {
		case "--job":
			into = &jobName
		case "--instance":
			into = &instance
		case "-h", "--help":
			fmt.Println("usage: pgark " + walPushUsage)
			return exitDone
		default:
			if path != "" || strings.HasPrefix(args[i], "-") {
				fmt.Fprintf(os.Stderr, "pgark: wal push: unexpected argument %q; usage: pgark %s\n", args[i], walPushUsage)
				return exitUsage
			}
			path = args[i]
			continue
		}
		if !hasValue && i+1 < len(args) {
			i++
			value = args[i]
		}
		*into = value
	}
	if jobName == "" || instance == "" || path == "" {
		fmt.Fprintf(os.Stderr, "pgark: wal push: usage: pgark %s\n", walPushUsage)
		return exitUsage
	}
	// Not SIGTERM: PostgreSQL's archiver reads meaning into the death of its command by a signal.
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT)
	defer stop()
	l := job.FindLayout()
	if err := wal.Push(ctx, wal.PushRequest{Socket: l.Socket(jobName, instance), JobFile: l.JobFile(jobName), Path: path}); err != nil {
		fmt.Fprintf(os.Stderr, "pgark: %v\n", err)
		return exitError
	}
	return exitDone
}

func newWALFetchCommand() *cobra.Command {
	var (
		socket, ring, until, stop string
		prefetch                  int
		serve                     bool
	)
	cmd := &cobra.Command{
		Use:   "fetch (--repository URL --series JOB/INSTANCE/SYSTEM-ID | --job JOB --instance INSTANCE) NAME PATH",
		Short: "Get a WAL file from the repository (restore_command)",
		Long: `fetch puts the WAL file NAME at PATH. PostgreSQL calls it as restore_command with %f and %p:

    restore_command = 'pgark wal fetch --repository s3://backups/pg --series orders/15-main/7412345678901234567 %f %p'

It exits 0 when the file is there, 1 when the archive ends before it, and 130 on any error: a segment that is missing
while later ones are there, or a repository that cannot be reached, is never taken for the end of the archive.

The first call leaves a process behind that fetches the following segments ahead of being asked. It lives beside PATH, and
ends one minute after the last call.`,
		Args: func(_ *cobra.Command, args []string) error {
			if !serve && len(args) != 2 {
				return &codeError{exitFetchFailed, fmt.Errorf("wal fetch: found %d arguments, expected NAME and PATH (%%f and %%p)", len(args))}
			}
			return nil
		},
	}
	cmd.SetFlagErrorFunc(func(_ *cobra.Command, err error) error { return &codeError{exitFetchFailed, err} })
	t := addTarget(cmd)
	f := cmd.Flags()
	f.StringVar(&socket, "socket", "", "socket of a fetcher to ask first")
	f.IntVar(&prefetch, "prefetch", 0, "segments to fetch ahead; negative for none (default: 8, and up to 64 where replay has to wait)")
	f.StringVar(&until, "until-lsn", "", "LSN that must be reached: a segment before it that is missing is an error")
	f.StringVar(&stop, "stop-lsn", "", "LSN behind which recovery does not come: what is missing there is no error")
	f.BoolVar(&serve, "serve", false, "be the process that fetches ahead")
	f.StringVar(&ring, "ring", "", "directory for segments fetched ahead")
	for _, internal := range []string{"serve", "ring", "json"} {
		if err := f.MarkHidden(internal); err != nil {
			panic("runner: internal error: " + err.Error())
		}
	}
	cmd.RunE = func(cmd *cobra.Command, args []string) (err error) {
		defer func() {
			// The exit code of a panic, 2, would end recovery as if the archive ended here.
			if p := recover(); p != nil {
				err = &codeError{exitFetchFailed, fmt.Errorf("wal fetch: internal error: %v", p)}
			}
		}()
		var found bool
		switch {
		case serve:
			err = t.serveWAL(cmd.Context(), wal.FetcherOptions{Ring: ring, Prefetch: prefetch}, socket, until, stop)
			found = true
		case socket != "":
			found, err = wal.Fetch(cmd.Context(), socket, args[0], args[1])
			// What served while a restore waited ends with it; a server that recovers on fetches by itself.
			if errors.As(err, new(*control.NotRunningError)) && (t.Job != "" || t.Repository != "") {
				found, err = wal.FetchDetached(cmd.Context(), args[0], args[1], detachedKey(cmd, os.Args), detachedArguments(cmd))
			}
		default:
			found, err = wal.FetchDetached(cmd.Context(), args[0], args[1], detachedKey(cmd, os.Args), detachedArguments(cmd))
		}
		switch {
		case err != nil:
			return &codeError{exitFetchFailed, err}
		case !found:
			return &codeError{exitNotArchived, nil}
		}
		return nil
	}
	return cmd
}

// detachedKey tells fetchers of different targets apart: it is what stands between "wal fetch" and NAME in the command
// line, because that is what the small client (client.c) sees. Where NAME and PATH do not come last, which the client
// leaves to us, it is the flags.
func detachedKey(cmd *cobra.Command, commandLine []string) []string {
	positional := cmd.Flags().Args()
	if end := len(commandLine) - len(positional); end >= 3 && slices.Equal(commandLine[end:], positional) {
		return commandLine[3:end]
	}
	return detachedArguments(cmd)("", "")
}

// detachedArguments are the arguments with which the same target is served.
func detachedArguments(cmd *cobra.Command) wal.Detached {
	return func(ring, socket string) []string {
		args := []string{"wal", "fetch", "--serve", "--ring", ring, "--socket", socket}
		for _, name := range []string{"job", "instance", "repository", "series", "endpoint", "region", "path-style", "prefetch", "until-lsn", "stop-lsn"} {
			if f := cmd.Flags().Lookup(name); f.Changed {
				args = append(args, "--"+name+"="+f.Value.String())
			}
		}
		return args
	}
}

func (t *target) serveWAL(ctx context.Context, o wal.FetcherOptions, socket, until, stop string) (err error) {
	if o.Ring == "" || socket == "" {
		return usageError(errors.New("wal fetch --serve needs --ring and --socket"))
	}
	o.IdleAfter, o.Log = time.Minute, slog.New(slog.NewTextHandler(os.Stderr, nil))
	o.Open = func(ctx context.Context) (wal.Source, error) {
		opened, err := t.open(ctx)
		if err != nil {
			return nil, err
		}
		return opened.one()
	}
	if until != "" {
		if o.Until, err = postgres.ParseLSN(until); err != nil {
			return usageError(fmt.Errorf("--until-lsn: %w", err))
		}
	}
	if stop != "" {
		if o.Stop, err = postgres.ParseLSN(stop); err != nil {
			return usageError(fmt.Errorf("--stop-lsn: %w", err))
		}
	}
	return wal.ServeDetached(ctx, o, socket)
}
