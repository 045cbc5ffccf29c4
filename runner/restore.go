package main

import (
	"errors"
	"fmt"
	"io"
	"net/url"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/pgark/terraform-provider-pgark/internal/engine/job"
	"github.com/pgark/terraform-provider-pgark/internal/engine/postgres"
	"github.com/pgark/terraform-provider-pgark/internal/engine/repository"
	"github.com/pgark/terraform-provider-pgark/internal/engine/restore"
)

// restoreFlags are the flags of `pgark restore` as given.
type restoreFlags struct {
	latest, immediate, exclusive bool
	time, lsn, xid, name         string

	timeline, action, image      string
	dataDirectory, walDirectory  string
	tablespaces                  []string
	port                         int
	start, dryRun, keepArchiving bool
	binDirectory                 string
}

func newRestoreCommand() *cobra.Command {
	var r restoreFlags
	cmd := &cobra.Command{
		Use:   "restore",
		Short: "Restore a cluster to a chosen moment",
		Long: `restore brings back a cluster as it was at a moment: it chooses the newest image before it, checks that all the WAL up
to the moment is there, writes the files, and leaves the settings with which PostgreSQL recovers to exactly that moment.
With --start it starts the server, waits until the moment has been reached, and says which it was.

    pgark restore --job orders --target-time '2026-11-22 14:03:10+00' \
          --data-directory /var/lib/postgresql/15/rescued --port 5433 --start
    pgark restore --repository s3://backups/pg --series orders/15-main --latest --data-directory /srv/pg

The target is the latest moment (the default), a time, an LSN, a transaction, a named restore point, or the image itself
(--target-immediate). A time without an offset is local. Everything up to and including the target is there afterwards;
--exclusive stops just before it.

Nothing is touched unless the target can be reached; else restore says how far it can go, and exits 3. The directories
it writes to must be absent or empty. As root, files get the owner that an existing data directory has, else the
image's. Tablespaces go where they were, unless --tablespace-mapping OLD=NEW says otherwise. Configuration from outside
the data directory is restored into it.

The restored server does not archive, so that it cannot write into the backups that it came from; --keep-archiving leaves
that as it was.`,
		Args: noArguments,
	}
	t := addTarget(cmd)
	f := cmd.Flags()
	f.BoolVar(&r.latest, "latest", false, "restore the latest moment in the archive (the default)")
	f.StringVar(&r.time, "target-time", "", "restore this moment")
	f.StringVar(&r.lsn, "target-lsn", "", "restore up to this position in the WAL, like 16/B374D848")
	f.StringVar(&r.xid, "target-xid", "", "restore up to the end of this transaction")
	f.StringVar(&r.name, "target-name", "", "restore up to this restore point (pg_create_restore_point)")
	f.BoolVar(&r.immediate, "target-immediate", false, "restore the image's own moment")
	f.BoolVar(&r.exclusive, "exclusive", false, "stop just before the target rather than after it (time, LSN, transaction)")
	f.StringVar(&r.timeline, "timeline", restore.LatestTimeline, "timeline to follow: latest, current (the newest image's) or a number")
	f.StringVar(&r.action, "target-action", restore.ActionPromote, "what the server does at the target: promote, pause or shutdown")
	f.StringVar(&r.image, "image", "", "image to begin with (default: the newest before the target)")
	f.StringVarP(&r.dataDirectory, "data-directory", "D", "", "directory to restore into")
	f.StringVar(&r.walDirectory, "wal-directory", "", "directory for WAL (default: pg_wal in the data directory)")
	f.StringArrayVar(&r.tablespaces, "tablespace-mapping", nil, "restore the tablespace in OLD into NEW: OLD=NEW (repeatable)")
	f.IntVar(&r.port, "port", 0, "port of the restored server (default: as it was)")
	f.BoolVar(&r.start, "start", false, "start the server and wait until it has reached the target")
	f.StringVar(&r.binDirectory, "bin-directory", "", "directory of the postgres program (default: where distributions put it)")
	f.BoolVar(&r.keepArchiving, "keep-archiving", false, "leave archiving as it was: the copy writes into the series that it came from")
	f.BoolVar(&r.dryRun, "dry-run", false, "check everything and print the plan, and touch nothing")
	cmd.MarkFlagsMutuallyExclusive("latest", "target-time", "target-lsn", "target-xid", "target-name", "target-immediate")
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		o, err := r.options()
		if err != nil {
			return err
		}
		opened, err := t.open(cmd.Context())
		if err != nil {
			return err
		}
		if o.Series, err = opened.one(); err != nil {
			return err
		}
		if o.FetchCommand, err = t.fetchCommand(o.Series.ID()); err != nil {
			return err
		}
		p := newProgress()
		o.Warn = func(s string) { p.Line("warning: %s", s) }
		o.Progress = func(s restore.Progress) { p.Update("%s", progressText(s)) }
		result, err := restore.Run(cmd.Context(), *o)
		p.Clear()
		if err != nil {
			return err
		}
		if t.JSON {
			return printJSON(cmd.OutOrStdout(), result)
		}
		printRestored(cmd.OutOrStdout(), o, result)
		return nil
	}
	return cmd
}

func (r *restoreFlags) options() (*restore.Options, error) {
	o := &restore.Options{
		Timeline: r.timeline, TargetAction: r.action, KeepArchiving: r.keepArchiving, Port: r.port,
		Start: r.start, BinDirectory: r.binDirectory, DryRun: r.dryRun,
	}
	var err error
	o.Target.Exclusive = r.exclusive
	switch {
	case r.time != "":
		o.Target.Kind = restore.ToTime
		if o.Target.Time, err = parseTimeFlag("target-time", r.time); err != nil {
			return nil, err
		}
	case r.lsn != "":
		o.Target.Kind = restore.ToLSN
		if o.Target.LSN, err = postgres.ParseLSN(r.lsn); err != nil {
			return nil, usageError(fmt.Errorf("--target-lsn: %w", err))
		}
	case r.xid != "":
		o.Target.Kind, o.Target.XID = restore.ToXID, r.xid
	case r.name != "":
		o.Target.Kind, o.Target.Name = restore.ToName, r.name
	case r.immediate:
		o.Target.Kind = restore.Immediate
	default:
		o.Target.Kind = restore.Latest
	}
	if err := o.Target.Validate(); err != nil {
		return nil, usageError(err)
	}
	if r.image != "" {
		if o.Image, err = repository.ParseSID(r.image); err != nil {
			return nil, usageError(fmt.Errorf("--image: %w", err))
		}
	}
	if r.dataDirectory == "" {
		return nil, usageError(errors.New("--data-directory is missing: where to restore to"))
	}
	if o.DataDirectory, err = filepath.Abs(r.dataDirectory); err != nil {
		return nil, err
	}
	if r.walDirectory != "" {
		if o.WALDirectory, err = filepath.Abs(r.walDirectory); err != nil {
			return nil, err
		}
	}
	if o.TablespaceMapping, err = parseMappings(r.tablespaces); err != nil {
		return nil, err
	}
	return o, nil
}

// parseMappings reads OLD=NEW; an equals sign in a directory's name is written \=, as pg_basebackup has it.
func parseMappings(all []string) (map[string]string, error) {
	if len(all) == 0 {
		return nil, nil
	}
	m := map[string]string{}
	for _, s := range all {
		parts := strings.Split(strings.ReplaceAll(s, `\=`, "\x00"), "=")
		if len(parts) != 2 || parts[0] == "" || parts[1] == "" {
			return nil, usageError(fmt.Errorf("--tablespace-mapping %q: expected OLD=NEW", s))
		}
		old, to := strings.ReplaceAll(parts[0], "\x00", "="), strings.ReplaceAll(parts[1], "\x00", "=")
		if !filepath.IsAbs(old) || !filepath.IsAbs(to) {
			return nil, usageError(fmt.Errorf("--tablespace-mapping %q: expected absolute directories", s))
		}
		m[filepath.Clean(old)] = filepath.Clean(to)
	}
	return m, nil
}

// fetchCommand is the beginning of the restore_command that reaches the same series without us. Keys are no part of it:
// they come from the job's credentials file or from the server's environment.
func (t *target) fetchCommand(id repository.SeriesID) ([]string, error) {
	self, err := os.Executable()
	if err != nil {
		return nil, fmt.Errorf("find own binary: %w", err)
	}
	var args []string
	for _, name := range []string{job.RootVariable, identityVariable} {
		if v := os.Getenv(name); v != "" {
			args = append(args, name+"="+v)
		}
	}
	if len(args) > 0 {
		args = append([]string{"env"}, args...) // paths that a server started by somebody else would not know
	}
	args = append(args, self, "wal", "fetch")
	if t.Job != "" {
		return append(args, "--job="+t.Job, "--series="+id.String()), nil
	}
	loc, err := t.parseRepository()
	if err != nil {
		return nil, err
	}
	args = append(args, "--repository="+withoutPassword(loc.URL), "--series="+id.String())
	if loc.Endpoint != "" {
		args = append(args, "--endpoint="+withoutPassword(loc.Endpoint))
	}
	if loc.Region != "" {
		args = append(args, "--region="+loc.Region)
	}
	if loc.UsePathStyle {
		args = append(args, "--path-style")
	}
	return args, nil
}

// withoutPassword takes user and password out of a URL: restore_command can be read by others.
func withoutPassword(s string) string {
	u, err := url.Parse(s)
	if err != nil || u.User == nil {
		return s
	}
	u.User = nil
	return u.String()
}

func progressText(p restore.Progress) string {
	switch p.Phase {
	case restore.Fetching:
		line := fmt.Sprintf("restore: %s of %s written, %s fetched", humanBytes(p.BytesDone), humanBytes(p.BytesTotal), humanBytes(p.BytesRead))
		if s := p.Elapsed.Seconds(); s >= 1 {
			rate := float64(p.BytesDone) / s
			line += fmt.Sprintf(", %s/s", humanBytes(int64(rate)))
			if rate > 0 && s >= 2 {
				line += ", " + humanDuration(time.Duration(float64(p.BytesTotal-p.BytesDone)/rate*float64(time.Second))) + " left"
			}
		}
		return line
	case restore.Syncing:
		return "restore: making it durable"
	case restore.Recovering:
		if p.Segment == "" {
			return "restore: waiting for the server"
		}
		return fmt.Sprintf("restore: replaying WAL %s, %d of at most %d segments, %s", p.Segment, p.Segments, p.SegmentsTotal, humanDuration(p.Elapsed))
	}
	return "restore: planning"
}

func printRestored(w io.Writer, o *restore.Options, r *restore.Result) {
	if p := r.Plan; p != nil {
		fmt.Fprintf(w, "would restore  %s\nto             %s, on timeline %d\n", o.Series.ID(), r.Target, r.Timeline)
		fmt.Fprintf(w, "from image     %s (%s, completed %s, %s)\n", p.Image, p.Kind, humanTime(p.CompletedAt), humanBytes(p.ImageBytes))
		fmt.Fprintf(w, "and WAL        %s to %s (%d segments at most)\ninto           %s\n", p.WALFrom, p.WALTo, p.WALSegments, r.DataDirectory)
		fmt.Fprintln(w, "Nothing was touched.")
		return
	}
	fmt.Fprintf(w, "restored image %s into %s\n", r.Image, r.DataDirectory)
	fmt.Fprintf(w, "target         %s\n", r.Target)
	if o.Start {
		if r.ReachedTime != nil {
			fmt.Fprintf(w, "reached        last transaction of %s\n", r.ReachedTime.Local().Format("2006-01-02 15:04:05.000000 -07:00"))
		} else {
			fmt.Fprintln(w, "reached        no transaction after the image")
		}
		if r.ReachedLSN != nil {
			fmt.Fprintf(w, "               LSN %s\n", *r.ReachedLSN)
		}
		fmt.Fprintf(w, "server         %s, timeline %d\n", r.State, r.Timeline)
	}
	fmt.Fprintf(w, "read           %s in %s\n", humanBytes(r.BytesRead), humanDuration(time.Duration(r.Seconds*float64(time.Second))))
	if !o.Start {
		port := ""
		if o.Port != 0 {
			port = " on port " + strconv.Itoa(o.Port)
		}
		fmt.Fprintf(w, "\nStart the server%s as the owner of the directory, with what reaches the repository (AWS_*, %s) in its\nenvironment; it then recovers to the target:\n    pg_ctl -D %s start\n", port, identityVariable, r.DataDirectory)
	}
}
