package main

import (
	"fmt"
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
func report(b *strings.Builder, results map[string]map[string][]sample, tools []tool, h header) {
	ours, peer := tools[0], tools[1]
	fmt.Fprintf(b, "# Measured beside %s\n\n", peer.name())
	fmt.Fprintf(b, "%s, %d cores, %d rounds in alternating order, medians (least to most in parentheses). %s, %d MiB of data, half pgbench, half text, JSON and UUIDs; the second half compresses %.1f:1 with zstd level 3. The S3 server (versitygw, TLS) and PostgreSQL share the machine and are not counted. `make bench` repeats it.\n\n",
		h.date.Format("2006-01-02"), h.cores, h.rounds, h.postgres, h.mib, h.ratio)
	for _, t := range tools {
		fmt.Fprintf(b, "- **%s** %s: %s\n", t.name(), t.version(), t.settings())
	}
	b.WriteString("\nRatio: pgark divided by the peer, below 1 is better. Both tools find the same database in each round; from the second round on pgbench has scattered it, so increments grow.\n")
	operations := []string{"full image", "increment, 1 % changed", fmt.Sprintf("%d segments pushed", h.segments), "full restore"}
	for _, op := range operations {
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
		if op != "full restore" {
			row("stored, MiB", func(s sample) float64 { return float64(s.stored) / (1 << 20) }, "%.2f")
		}
	}
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
