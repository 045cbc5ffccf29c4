// Command bench measures pgark beside pgBackRest; see run.sh, which prepares what it needs and calls it.
//
// Both tools work on the same running cluster and store through the same S3 server over TLS, in alternating order, so
// that a noisy neighbour hits both. Wall time, CPU of the tool and all its children, peak resident memory of the same
// processes, and bytes stored are taken for each operation; medians and ratios go to a Markdown table.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"log"
	"os"
	"os/signal"
	"runtime"
	"strings"
	"syscall"
	"time"
)

func main() {
	log.SetFlags(log.Ltime)
	rounds := flag.Int("rounds", 3, "how often each operation is measured")
	mib := flag.Int("mib", 1024, "size of the data set")
	segments := flag.Int("segments", 200, "WAL segments to push")
	peerRoot := flag.String("peer-root", "", "root directory that holds pgBackRest")
	only := flag.String("only", "", "measure \"images\" or \"wal\" only")
	out := flag.String("out", "", "Markdown file to write (default: standard output)")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, *rounds, *mib, *segments, *peerRoot, *only, *out); err != nil {
		log.Fatal("bench: ", err)
	}
}

// A tool is one of the two contestants.
type tool interface {
	name() string
	version() string
	settings() string
	// full, increment and restore are one command each; prepare whatever they need beforehand.
	full() command
	increment() command
	push(segment string) command
	restore(dir string) command
	stored() int64 // bytes in its part of the S3 server
}

func run(ctx context.Context, rounds, mib, segments int, peerRoot, only, out string) (err error) {
	w, err := newWorld(ctx, mib, peerRoot)
	if err != nil {
		return err
	}
	defer w.close()
	ours, err := w.newPgark()
	if err != nil {
		return err
	}
	peer, err := w.newPgBackRest()
	if err != nil {
		return err
	}
	tools := []tool{ours, peer}
	ratio, err := w.compressionRatio()
	if err != nil {
		return err
	}

	results := map[string]map[string][]sample{} // operation, tool
	add := func(op string, t tool, s sample) {
		if results[op] == nil {
			results[op] = map[string][]sample{}
		}
		results[op][t.name()] = append(results[op][t.name()], s)
		log.Printf("%-28s %-11s %7.2f s  cpu %6.2f s  rss %4d MiB  stored %8.2f MiB", op, t.name(), s.wall.Seconds(), s.cpu.Seconds(), s.rss>>20, float64(s.stored)/(1<<20))
	}
	one := func(op string, t tool, c command, resident residentPart) error {
		s, err := w.measure(t, c, resident)
		if err != nil {
			return fmt.Errorf("%s of %s: %w", op, t.name(), err)
		}
		add(op, t, s)
		return nil
	}

	var calls []call
	replays := map[string][]float64{}
	for round := range rounds {
		// The order alternates, so that neither tool always finds the caches as the other left them.
		order := tools
		if round%2 == 1 {
			order = []tool{tools[1], tools[0]}
		}
		log.Printf("round %d of %d", round+1, rounds)
		if only != "wal" {
			if err := w.images(round, order, one); err != nil {
				return err
			}
		}
		if only != "images" {
			if err := w.wal(segments, ours, peer, order, add, &calls, replays); err != nil {
				return err
			}
		}
	}

	var b strings.Builder
	report(&b, results, calls, replays, tools, header{
		date: time.Now().UTC(), cores: runtime.NumCPU(), rounds: rounds, mib: w.sizeMiB(), ratio: ratio,
		postgres: w.postgresVersion, segments: segments,
	})
	if out == "" {
		fmt.Print(b.String())
		return nil
	}
	return os.WriteFile(out, []byte(b.String()), 0o644)
}

// images measures images and their restore.
func (w *world) images(round int, order []tool, one func(op string, t tool, c command, resident residentPart) error) error {
	for _, t := range order {
		if err := one("full image", t, t.full(), counted); err != nil {
			return err
		}
	}
	if err := w.change(round); err != nil {
		return err
	}
	for _, t := range order {
		if err := one("increment, 1 % changed", t, t.increment(), counted); err != nil {
			return err
		}
	}
	for _, t := range order {
		dir, err := w.emptyDir("restored-" + t.name())
		if err != nil {
			return err
		}
		if err := one("full restore", t, t.restore(dir), notCounted); err != nil {
			return err
		}
		if err := w.checkRestored(dir); err != nil {
			return fmt.Errorf("restore of %s: %w", t.name(), err)
		}
		if err := os.RemoveAll(dir); err != nil {
			return err
		}
	}
	return nil
}

// wal measures archiving and replay.
func (w *world) wal(segments int, ours *pgark, peer *pgBackRest, order []tool, add func(op string, t tool, s sample), calls *[]call, replays map[string][]float64) error {
	if err := w.hideArchiving(); err != nil {
		return err
	}
	first, err := w.nextSegment() // recovery of the copy begins in it
	if err != nil {
		return err
	}
	base, err := w.base()
	if err != nil {
		return err
	}
	names, err := w.makeSegments(first, segments)
	if err != nil {
		return err
	}
	if err := w.backlog(names, ours, order, add); err != nil {
		return err
	}
	found, err := w.singles(names[:min(20, len(names))], ours, peer)
	if err != nil {
		return err
	}
	*calls = mergeCalls(*calls, found)
	// For replay, everything into the repository once more, uncounted.
	if err := w.signalResident(syscall.SIGCONT); err != nil {
		return err
	}
	if _, err := w.measurePush(ours, names); err != nil {
		return err
	}
	kept, err := w.keepSegments(names)
	if err != nil {
		return err
	}
	for _, c := range []struct {
		what, command string
		env           []string
	}{{"cp from a local directory", "cp " + kept + "/%f %p", nil}, {"pgark", ours.fetch(), ours.env}} {
		r, err := w.replay(base, c.command, c.env)
		if err != nil {
			return fmt.Errorf("replay by %s: %w", c.what, err)
		}
		log.Printf("replay by %-26s %d segments in %.1f s, %.1f a second", c.what, r.segments, r.took.Seconds(), r.rate())
		replays[c.what] = append(replays[c.what], r.rate())
	}
	if err := errors.Join(os.RemoveAll(kept), os.RemoveAll(base), peer.forgetWAL()); err != nil {
		return err
	}
	return w.resumeArchiving()
}
