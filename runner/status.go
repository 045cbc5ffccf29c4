package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sync/errgroup"
	"golang.org/x/term"

	"github.com/pgark/terraform-provider-pgark/internal/engine/daemon/control"
	"github.com/pgark/terraform-provider-pgark/internal/engine/job"
)

// runnerStatus is what status shows of one instance.
type runnerStatus struct {
	Job      string          `json:"job"`
	Instance string          `json:"instance"`
	Running  bool            `json:"running"`
	Error    string          `json:"error,omitempty"` // why nothing is known, where Running is false
	Status   *control.Status `json:"status,omitempty"`

	err error // what Error says
}

func newStatusCommand() *cobra.Command {
	t := &target{Layout: job.FindLayout()}
	var watch bool
	var every time.Duration
	cmd := &cobra.Command{
		Use:   "status [--job JOB [--instance INSTANCE]]",
		Short: "Show what this guest's runners do",
		Long: `status asks the runners of this guest what they do: whether they reach the repository, how far WAL is behind in bytes and
seconds, what waits, and when the next image is due. It exits 0 when every runner it was asked about protects its
instance, and 1 otherwise.

With --watch it asks again until it is interrupted: on a terminal it shows the same, refreshed in place, elsewhere a line
for each runner each time.

    pgark status
    pgark status --job orders --json
    pgark status --watch --every 500ms`,
		Args: noArguments,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if watch {
				if t.JSON {
					return usageError(errors.New("--watch and --json exclude each other: --json prints one document\nhint: pgark metrics --listen serves what changes"))
				}
				if every < minWatch {
					return usageError(fmt.Errorf("--every %v: expected at least %v", every, minWatch))
				}
				return t.watch(cmd.Context(), cmd.OutOrStdout(), every)
			}
			all, err := t.runners(cmd.Context())
			if err != nil {
				return err
			}
			if t.JSON {
				err = printJSON(cmd.OutOrStdout(), map[string]any{"runners": all})
			} else {
				for _, r := range all {
					printStatus(cmd.OutOrStdout(), r)
				}
			}
			if err != nil {
				return err
			}
			for _, r := range all {
				if !r.Running || r.Status.State != control.Running {
					return &codeError{exitError, nil}
				}
			}
			return nil
		},
	}
	f := cmd.Flags()
	f.StringVar(&t.Job, "job", "", "job of this guest (default: every one)")
	f.StringVar(&t.Instance, "instance", "", "instance of the job (default: every one)")
	f.BoolVar(&t.JSON, "json", false, "print one JSON document")
	f.BoolVar(&watch, "watch", false, "ask again and again, until interrupted")
	f.DurationVar(&every, "every", time.Second, "how often --watch asks")
	return cmd
}

// minWatch keeps a watch from costing the guest what is to be watched.
const minWatch = 100 * time.Millisecond

// watch shows the runners again and again until ctx ends.
func (t *target) watch(ctx context.Context, w io.Writer, every time.Duration) error {
	f, ok := w.(*os.File)
	terminal := ok && term.IsTerminal(int(f.Fd()))
	tick := time.NewTicker(every)
	defer tick.Stop()
	for {
		all, err := t.runners(ctx)
		switch {
		case ctx.Err() != nil:
			return nil
		case err != nil:
			return err
		}
		var b strings.Builder
		for _, r := range all {
			if terminal {
				printStatus(&b, r)
			} else {
				b.WriteString(statusLine(time.Now(), r) + "\n")
			}
		}
		text := b.String()
		if terminal {
			width, height, err := term.GetSize(int(f.Fd()))
			if err != nil {
				width, height = 0, 0
			}
			text = onScreen(text, width, height)
		}
		if _, err := io.WriteString(w, text); err != nil {
			return err
		}
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
	}
}

// onScreen makes text replace what a terminal shows: each line is cut where it would wrap, and cleared behind its end, so
// that nothing flickers.
func onScreen(text string, width, height int) string {
	lines := strings.Split(strings.TrimSuffix(text, "\n"), "\n")
	if height > 1 && len(lines) >= height {
		lines = lines[:height-1]
	}
	var b strings.Builder
	b.WriteString("\x1b[H")
	for _, line := range lines {
		if runes := []rune(line); width > 1 && len(runes) >= width {
			line = string(runes[:width-1])
		}
		b.WriteString(line + "\x1b[K\n")
	}
	b.WriteString("\x1b[J")
	return b.String()
}

// statusLine says the most important in one line.
func statusLine(now time.Time, r runnerStatus) string {
	head := now.Local().Format("15:04:05.0") + " " + r.Job + "/" + r.Instance
	switch {
	case !r.Running:
		return head + " NOT RUNNING: " + oneLine(r.Error)
	case r.Status.State != control.Running:
		return head + " NOT PROTECTED: " + string(r.Status.State) + ": " + oneLine(r.Status.Problem)
	}
	wal := r.Status.WAL
	line := fmt.Sprintf("%s %s, %s behind (%s), written %s, durable %s, repository %s", head, walWords(wal.State),
		seconds(wal.LagSeconds), humanBytes(wal.LagBytes), orDash(wal.WrittenLSN), orDash(wal.DurableLSN), storeWords(wal.Store))
	if s := wal.Spool; s != nil && s.Files > 0 {
		line += fmt.Sprintf(", %d files (%s) in the temporary folder", s.Files, humanBytes(s.Bytes))
	}
	return line
}

// runners asks every runner that the flags name.
func (t *target) runners(ctx context.Context) ([]runnerStatus, error) {
	names := t.jobsHere()
	if t.Job != "" {
		names = []string{t.Job}
	} else if t.Instance != "" {
		return nil, usageError(errors.New("--instance needs --job"))
	}
	all := []runnerStatus{}
	for _, name := range names {
		one := *t
		one.Job = name
		j, err := one.readJob()
		if err != nil {
			return nil, err
		}
		for _, i := range j.Protected {
			if t.Instance == "" || t.Instance == i.Name {
				all = append(all, runnerStatus{Job: name, Instance: i.Name})
			}
		}
	}
	if len(all) == 0 {
		switch {
		case t.Instance != "":
			return nil, fmt.Errorf("job %s protects no instance %s", t.Job, t.Instance)
		case t.Job != "":
			return nil, fmt.Errorf("job %s protects no instance", t.Job)
		}
		return nil, errors.New("this guest has no jobs")
	}
	// Side by side: one that hangs is not to delay the others' answers.
	var g errgroup.Group
	g.SetLimit(16)
	for i := range all {
		g.Go(func() error {
			askRunner(ctx, t.Layout, &all[i])
			return nil
		})
	}
	return all, g.Wait()
}

func askRunner(ctx context.Context, l job.Layout, r *runnerStatus) {
	ctx, cancel := context.WithTimeout(ctx, 6*time.Second)
	defer cancel()
	s, err := control.GetStatus(ctx, l.Socket(r.Job, r.Instance))
	if err != nil {
		r.Error, r.err = err.Error(), err
		return
	}
	r.Running, r.Status = true, s
}

func printStatus(w io.Writer, r runnerStatus) {
	fmt.Fprintf(w, "%s/%s: ", r.Job, r.Instance)
	if !r.Running {
		fmt.Fprintf(w, "NOT RUNNING: %s\n", r.Error)
		return
	}
	s := r.Status
	switch s.State {
	case control.Running:
		fmt.Fprintf(w, "protected since %s (process %d)\n", humanTime(s.StartedAt), s.PID)
	default:
		fmt.Fprintf(w, "NOT PROTECTED: %s: %s (process %d)\n", s.State, s.Problem, s.PID)
	}
	line := func(name, format string, args ...any) {
		fmt.Fprintf(w, "  %-12s %s\n", name, fmt.Sprintf(format, args...))
	}
	store := ""
	if s.State == control.Running {
		store = ", " + storeWords(s.WAL.Store)
	}
	line("repository", "%s%s", s.Repository, store)
	line("data", "%s (system identifier %s)", s.DataDirectory, orDash(s.SystemIdentifier))
	if s.State == control.Running {
		printWAL(line, &s.WAL)
	}
	switch i := s.Image; {
	case i.Running && i.Progress != "":
		line("image", "%s", i.Progress)
	case i.Running:
		line("image", "being taken")
	case i.LastAt != nil:
		line("image", "latest %s, %s", i.LastID, humanTime(*i.LastAt))
	case s.State == control.Running:
		line("image", "none yet")
	}
	if s.Image.LastErrorAt != nil {
		line("", "failed %s ago: %s", humanDuration(time.Since(*s.Image.LastErrorAt)), s.Image.LastError)
	}
	switch {
	case !s.Enabled:
		line("", "the job is disabled: WAL is shipped, no image is taken by schedule")
	case s.Image.Next != nil:
		line("", "next %s", humanTime(*s.Image.Next))
	}
}

func printWAL(line func(name, format string, args ...any), wal *control.WALStatus) {
	since := ""
	if !wal.Since.IsZero() {
		since = " for " + humanDuration(time.Since(wal.Since))
	}
	line("wal", "%s%s%s", walWords(wal.State), since, prefixed(": ", oneLine(wal.Reason)))
	lag := "all is durable"
	if wal.LagBytes > 0 || wal.LagSeconds > 0 {
		lag = fmt.Sprintf("%s and %s behind", humanBytes(wal.LagBytes), seconds(wal.LagSeconds))
	}
	if wal.ObjectiveSeconds > 0 {
		lag += fmt.Sprintf("; at most %s are wanted, %s were seen", seconds(wal.ObjectiveSeconds), seconds(wal.MaxLagSeconds))
	}
	line("", "%s", lag)
	if wal.WrittenLSN != "" || wal.DurableLSN != "" {
		on := ""
		if wal.Timeline != 0 {
			on = fmt.Sprintf(" on timeline %d", wal.Timeline)
		}
		line("", "written up to %s, durable up to %s%s", orDash(wal.WrittenLSN), orDash(wal.DurableLSN), on)
	}
	if st := wal.Stream; st != nil {
		connection := "not connected"
		if st.Connected {
			connection = "connected"
		}
		if st.Since != nil {
			connection += " for " + humanDuration(time.Since(*st.Since))
		}
		if st.Restarts > 0 {
			connection += fmt.Sprintf(", %d restarts", st.Restarts)
		}
		if st.Slot != "" {
			connection += ", slot " + st.Slot
		}
		if st.Synchronous {
			connection += ", commits wait for the repository"
		}
		line("stream", "%s; %d tails, %s stored", connection, st.Tails, humanBytes(st.TailBytes))
		if st.LastErrorAt != nil {
			line("", "last error %s ago: %s", humanDuration(time.Since(*st.LastErrorAt)), oneLine(st.LastError))
		}
	}
	line("archive", "%d files stored, %s as %s; %d failures", wal.Segments, humanBytes(wal.Bytes), humanBytes(wal.StoredBytes), wal.Failures)
	if wal.LastStoredAt != nil {
		line("", "latest %s, %s ago; longest delay %s", wal.LastName, humanDuration(time.Since(*wal.LastStoredAt)), seconds(wal.MaxDelaySeconds))
	}
	if wal.Pending > 0 && wal.OldestPending != nil {
		line("", "%d files wait, the oldest for %s", wal.Pending, humanDuration(time.Since(*wal.OldestPending)))
	}
	if wal.LastErrorAt != nil {
		line("", "last error %s ago: %s", humanDuration(time.Since(*wal.LastErrorAt)), oneLine(wal.LastError))
	}
	if sp := wal.Spool; sp != nil && (sp.Files > 0 || sp.Full) {
		room := humanBytes(sp.Bytes)
		if sp.LimitBytes > 0 {
			room += " of " + humanBytes(sp.LimitBytes)
		}
		oldest := ""
		if sp.Oldest != nil {
			oldest = ", the oldest for " + humanDuration(time.Since(*sp.Oldest))
		}
		full := ""
		if sp.Full {
			full = "; FULL: PostgreSQL keeps its WAL"
		}
		line("spool", "%d files, %s in %s%s%s", sp.Files, room, sp.Directory, oldest, full)
	}
	if more := wal.GapCount - int64(min(len(wal.Gaps), shownGaps)); more > 0 {
		line("GAPS", "%d earlier ones", more)
	}
	for _, g := range wal.Gaps[max(0, len(wal.Gaps)-shownGaps):] {
		image := "; an image is being taken, or due, because of it"
		if g.Image != "" {
			image = "; image " + g.Image + " was taken after it"
		}
		line("GAP", "wal from %s to %s on timeline %d is lost, found %s%s", g.StartLSN, g.EndLSN, g.Timeline, humanTime(g.FoundAt), image)
	}
}

// shownGaps bounds the gaps that are shown one by one.
const shownGaps = 5

// walWords says what becomes of WAL.
func walWords(s control.WALState) string {
	switch s {
	case control.WALStreaming:
		return "streaming"
	case control.WALArchiving:
		return "archiving whole segments"
	case control.WALCatchingUp:
		return "catching up"
	case control.WALSpooling:
		return "SPOOLING: the repository is away, WAL goes into the temporary folder"
	case control.WALHeld:
		return "HELD: the repository is away, PostgreSQL keeps its WAL"
	}
	return orDash(string(s))
}

// storeWords says how the repository fares.
func storeWords(s control.StoreState) string {
	switch s {
	case control.StoreReachable:
		return "reachable"
	case control.StoreSlow:
		return "SLOW"
	case control.StoreAway:
		return "AWAY: it cannot be reached"
	case control.StoreRefusing:
		return "REFUSING: it answers with errors"
	case control.StoreDenied:
		return "DENIED: the credentials are wrong, expired, or not enough"
	case control.StoreReadOnly:
		return "READ-ONLY"
	case control.StoreFull:
		return "FULL"
	case control.StoreMissing:
		return "MISSING: no such bucket or directory"
	case control.StoreConflicting:
		return "CONFLICTING: names are taken by other content"
	}
	return orDash(string(s))
}

// prefixed puts a prefix before a text that is not empty.
func prefixed(prefix, s string) string {
	if s == "" {
		return ""
	}
	return prefix + s
}

func orDash(s string) string {
	if s == "" {
		return "-"
	}
	return s
}
