package postgres

import (
	"bytes"
	"fmt"
	"strconv"
	"strings"
)

// Ancestor is one line of a timeline's history: a timeline that it descends from, and where it was left.
type Ancestor struct {
	Timeline Timeline
	Switch   LSN // the first position that does not belong to Timeline any more
	Reason   string
}

// History is what a timeline's history file says: its ancestors, oldest first. Timeline 1 has none.
type History []Ancestor

// ParseHistory reads the history file of timeline t. The format is that of readTimeLineHistory in PostgreSQL's
// timeline.c: a line for each ancestor, with its number, the position where it was left and a reason, separated by
// tabs; empty lines and those that begin with # say nothing.
func ParseHistory(t Timeline, b []byte) (History, error) {
	var h History
	for i, line := range strings.Split(string(b), "\n") {
		line = strings.TrimLeft(strings.TrimSuffix(line, "\r"), " \t")
		if line == "" || line[0] == '#' {
			continue
		}
		fail := func(err error) (History, error) {
			return nil, fmt.Errorf("history of timeline %d, line %d: %w", t, i+1, err)
		}
		fields := strings.Fields(line)
		if len(fields) < 2 {
			return fail(fmt.Errorf("found %q, expected a timeline and a position", line))
		}
		id, err := strconv.ParseUint(fields[0], 10, 32)
		if err != nil || id == 0 {
			return fail(fmt.Errorf("found timeline %q, expected a number from 1", fields[0]))
		}
		lsn, err := ParseLSN(fields[1])
		if err != nil {
			return fail(err)
		}
		a := Ancestor{Timeline: Timeline(id), Switch: lsn}
		if _, rest, ok := strings.Cut(line, fields[1]); ok {
			a.Reason = strings.TrimSpace(rest)
		}
		if a.Timeline >= t {
			return fail(fmt.Errorf("found timeline %d, expected one below %d", id, t))
		}
		if n := len(h); n > 0 && (a.Timeline <= h[n-1].Timeline || a.Switch < h[n-1].Switch) {
			return fail(fmt.Errorf("found timeline %d left at %s, expected more than timeline %d and at least %s",
				id, lsn, h[n-1].Timeline, h[n-1].Switch))
		}
		h = append(h, a)
	}
	return h, nil
}

// Format writes the file that ParseHistory reads, as PostgreSQL's writeTimeLineHistory does.
func (h History) Format() []byte {
	var b bytes.Buffer
	for _, a := range h {
		fmt.Fprintf(&b, "%d\t%s\t%s\n", uint32(a.Timeline), a.Switch, a.Reason)
	}
	return b.Bytes()
}

// SwitchPoint tells where an ancestor was left; false if t is none.
func (h History) SwitchPoint(t Timeline) (LSN, bool) {
	for _, a := range h {
		if a.Timeline == t {
			return a.Switch, true
		}
	}
	return 0, false
}

// Includes tells whether what timeline t wrote up to lsn belongs to the history's own timeline as well: whether a
// backup that is consistent at lsn of t can be recovered along it.
func (h History) Includes(t Timeline, lsn LSN) bool {
	at, ok := h.SwitchPoint(t)
	return ok && lsn <= at
}

// At is the timeline that wrote the byte at lsn, in the history of timeline own (tliOfPointInHistory).
func (h History) At(own Timeline, lsn LSN) Timeline {
	for _, a := range h {
		if lsn < a.Switch {
			return a.Timeline
		}
	}
	return own
}
