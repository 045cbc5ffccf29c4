package main

import (
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"
)

type header struct {
	date     time.Time
	cores    int
	rounds   int
	mib      int64
	ratio    float64
	postgres string
	segments int
}

// report writes the tables: medians, and our median divided by the peer's (below 1 is better).
func report(b *strings.Builder, results map[string]map[string][]sample, calls []call, replays map[string][]float64, tools []tool, h header) {
	ours, peer := tools[0], tools[1]
	fmt.Fprintf(b, "# Measured beside %s\n\n", peer.name())
	fmt.Fprintf(b, "%s, %d cores, %d rounds in alternating order, medians (least to most in parentheses). %s, %d MiB of data, half pgbench, half text, JSON and UUIDs; the second half compresses %.1f:1 with zstd level 3. The S3 server (versitygw, TLS) and PostgreSQL share the machine and are not counted. `make bench` repeats it.\n\n",
		h.date.Format("2006-01-02"), h.cores, h.rounds, h.postgres, h.mib, h.ratio)
	for _, t := range tools {
		fmt.Fprintf(b, "- **%s** %s: %s\n", t.name(), t.version(), t.settings())
	}
	b.WriteString("\nRatio: pgark divided by the peer, below 1 is better. Both tools find the same database in each round; from the second round on pgbench has scattered it, so increments grow.\n")
	pushed := fmt.Sprintf("%d segments pushed", h.segments)
	operations := []string{"full image", "increment, 1 % changed", "full restore", pushed, pushed + ", codec adapts to the backlog"}
	for _, op := range operations {
		if len(results[op]) == 0 {
			continue
		}
		fmt.Fprintf(b, "\n## %s\n\n| | %s | %s | ratio |\n|---|---|---|---|\n", op, ours.name(), peer.name())
		a, p := results[op][ours.name()], results[op][peer.name()]
		row := func(name string, value func(sample) float64, format string) {
			ma, sa := spread(a, value, format)
			mp, sp := spread(p, value, format)
			ratio := "–"
			if mp > 0 {
				ratio = fmt.Sprintf("%.2f", ma/mp)
			}
			fmt.Fprintf(b, "| %s | %s | %s | %s |\n", name, sa, sp, ratio)
		}
		row("wall, s", func(s sample) float64 { return s.wall.Seconds() }, "%.2f")
		row("CPU, s", func(s sample) float64 { return s.cpu.Seconds() }, "%.2f")
		row("peak memory, MiB", func(s sample) float64 { return float64(s.rss) / (1 << 20) }, "%.0f")
		if strings.HasPrefix(op, pushed) {
			row("segments a second", func(s sample) float64 { return float64(h.segments) / s.wall.Seconds() }, "%.1f")
			row("CPU a segment, ms", func(s sample) float64 { return s.cpu.Seconds() * 1000 / float64(h.segments) }, "%.0f")
		}
		if op != "full restore" {
			row("stored, MiB", func(s sample) float64 { return float64(s.stored) / (1 << 20) }, "%.2f")
		}
	}
	reportWAL(b, calls, replays, h.segments)
}

// reportWAL writes what has no peer beside it in the same table: the time of single calls, and replay.
func reportWAL(b *strings.Builder, calls []call, replays map[string][]float64, segments int) {
	if len(calls) > 0 {
		b.WriteString("\n## archive_command, one segment at a time\n\n| | median, ms | least, ms | most, ms |\n|---|---|---|---|\n")
		for _, c := range calls {
			ms := func(d time.Duration) float64 { return float64(d.Microseconds()) / 1000 }
			fmt.Fprintf(b, "| %s | %.1f | %.1f | %.1f |\n", c.what, ms(c.median()), ms(c.took[0]), ms(c.took[len(c.took)-1]))
		}
	}
	if len(replays) > 0 {
		fmt.Fprintf(b, "\n## replay of %d segments through restore_command\n\n| | segments a second |\n|---|---|\n", segments)
		for _, what := range slices.Sorted(maps.Keys(replays)) {
			rates := slices.Sorted(slices.Values(replays[what]))
			fmt.Fprintf(b, "| %s | %.1f (%.1f–%.1f) |\n", what, rates[len(rates)/2], rates[0], rates[len(rates)-1])
		}
	}
}

// mergeCalls adds the calls of one round to those of the rounds before.
func mergeCalls(all, more []call) []call {
	if all == nil {
		return more
	}
	for i := range all {
		all[i].took = append(all[i].took, more[i].took...)
		slices.Sort(all[i].took)
	}
	return all
}

func spread(samples []sample, value func(sample) float64, format string) (median float64, text string) {
	v := make([]float64, 0, len(samples))
	for _, s := range samples {
		v = append(v, value(s))
	}
	if len(v) == 0 {
		return 0, "–"
	}
	slices.Sort(v)
	median = v[len(v)/2]
	if len(v)%2 == 0 {
		median = (v[len(v)/2-1] + v[len(v)/2]) / 2
	}
	return median, fmt.Sprintf(format+" ("+format+"–"+format+")", median, v[0], v[len(v)-1])
}
