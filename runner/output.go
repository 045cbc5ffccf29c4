package main

import (
	"encoding/json"
	"fmt"
	"io"
	"os"
	"strings"
	"sync"
	"time"
	"unicode/utf8"

	"golang.org/x/term"
)

// printJSON writes v as the one document that --json promises.
func printJSON(w io.Writer, v any) error {
	e := json.NewEncoder(w)
	e.SetIndent("", "  ")
	e.SetEscapeHTML(false)
	return e.Encode(v)
}

// humanBytes prints a size as people read it, "1.4 GiB".
func humanBytes(n int64) string {
	if n < 1024 && n > -1024 {
		return fmt.Sprintf("%d B", n)
	}
	f, units := float64(n), "KMGTPE"
	i := -1
	for (f >= 1023.95 || f <= -1023.95) && i < len(units)-1 {
		f /= 1024
		i++
	}
	return fmt.Sprintf("%.1f %ciB", f, units[i])
}

// humanTime prints a moment in the local zone, with its offset, to the second.
func humanTime(t time.Time) string {
	if t.IsZero() {
		return "-"
	}
	return t.Local().Format("2006-01-02 15:04:05 -07:00")
}

// humanDuration prints a duration with the two units that matter.
func humanDuration(d time.Duration) string {
	switch {
	case d < 0:
		return "-" + humanDuration(-d)
	case d < 10*time.Second:
		return fmt.Sprintf("%.1f s", d.Seconds())
	case d < time.Minute:
		return fmt.Sprintf("%.0f s", d.Seconds())
	case d < time.Hour:
		return fmt.Sprintf("%d min %d s", int(d.Minutes()), int(d.Seconds())%60)
	case d < 48*time.Hour:
		return fmt.Sprintf("%d h %d min", int(d.Hours()), int(d.Minutes())%60)
	}
	return fmt.Sprintf("%d days %d h", int(d.Hours())/24, int(d.Hours())%24)
}

// printTable aligns rows under their headings. Columns whose heading starts with ">" are aligned to the right.
func printTable(w io.Writer, indent string, headings []string, rows [][]string) {
	right := make([]bool, len(headings))
	all := make([][]string, 0, len(rows)+1)
	head := make([]string, len(headings))
	for i, h := range headings {
		head[i], right[i] = strings.CutPrefix(h, ">")
	}
	printAligned(w, indent, right, append(append(all, head), rows...))
}

// printRows aligns rows that need no headings.
func printRows(w io.Writer, indent string, rows [][]string) {
	if len(rows) > 0 {
		printAligned(w, indent, make([]bool, len(rows[0])), rows)
	}
}

func printAligned(w io.Writer, indent string, right []bool, all [][]string) {
	width := make([]int, len(right))
	for _, r := range all {
		for i, c := range r {
			width[i] = max(width[i], utf8.RuneCountInString(c))
		}
	}
	for _, r := range all {
		var b strings.Builder
		for i, c := range r {
			pad := strings.Repeat(" ", width[i]-utf8.RuneCountInString(c))
			if right[i] {
				c = pad + c
			} else {
				c += pad
			}
			if i > 0 {
				b.WriteString("  ")
			}
			b.WriteString(c)
		}
		fmt.Fprintf(w, "%s%s\n", indent, strings.TrimRight(b.String(), " "))
	}
}

// progress shows one line that says what goes on. On a terminal the line repaints in place; elsewhere only lines that
// are final appear. Safe for concurrent use.
type progress struct {
	mu       sync.Mutex // guards what follows and the writer
	w        io.Writer
	terminal bool
	painted  bool
	last     time.Time
}

// newProgress writes to standard error: standard output is for results.
func newProgress() *progress {
	return &progress{w: os.Stderr, terminal: term.IsTerminal(int(os.Stderr.Fd()))}
}

// Update repaints the line; too frequent calls are dropped.
func (p *progress) Update(format string, args ...any) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if !p.terminal || time.Since(p.last) < 100*time.Millisecond {
		return
	}
	p.last, p.painted = time.Now(), true
	line := fmt.Sprintf(format, args...)
	if width, _, err := term.GetSize(int(os.Stderr.Fd())); err == nil && width > 1 && utf8.RuneCountInString(line) >= width {
		line = string([]rune(line)[:width-1])
	}
	fmt.Fprintf(p.w, "\r\x1b[K%s", line)
}

// Line writes a line that stays.
func (p *progress) Line(format string, args ...any) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.clear()
	fmt.Fprintf(p.w, format+"\n", args...)
}

// Clear removes a painted line, so that what follows starts on an empty one.
func (p *progress) Clear() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.clear()
}

func (p *progress) clear() {
	if p.painted {
		fmt.Fprint(p.w, "\r\x1b[K")
		p.painted = false
	}
}
