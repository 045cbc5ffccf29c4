package wal

import (
	"context"
	"fmt"
	"time"

	"github.com/pgark/terraform-provider-pgark/internal/engine/postgres"
)

// watchGaps looks for gaps until ctx ends.
func (s *Shipper) watchGaps(ctx context.Context) {
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-s.wakeGaps:
		case <-timer.C:
		}
		again, err := s.watcher.check(ctx, time.Now())
		wait := time.Hour // until something is stored
		switch {
		case err != nil:
			s.o.Log.Debug("look for gaps in the wal", "error", err)
			wait = 5 * time.Second
		case again:
			wait = lookEvery
		}
		timer.Reset(wait)
		pause := time.NewTimer(checkGapsEvery)
		select {
		case <-ctx.Done():
		case <-pause.C:
		}
		pause.Stop()
	}
}

// held lists the segments of a range that are on their way, or there.
func (s *Shipper) held(t postgres.Timeline, from, to uint64) []uint64 {
	s.mu.Lock()
	defer s.mu.Unlock()
	var all []uint64
	look := func(name string, f *file) {
		kind, err := postgres.ParseWALFile(name)
		if err != nil || kind.Kind != postgres.SegmentFile || kind.Timeline != t || f.state == fileRefused {
			return
		}
		if n := kind.Segment.Number(s.o.SegmentSize); n >= from && n <= to {
			all = append(all, n)
		}
	}
	if to-from < uint64(len(s.files)) {
		for n := from; n <= to; n++ {
			name := string(postgres.MakeSegmentName(t, n, s.o.SegmentSize))
			if f := s.files[name]; f != nil {
				look(name, f)
			}
		}
		return all
	}
	for name, f := range s.files {
		look(name, f)
	}
	return all
}

// alarm tells of a gap, everywhere.
func (s *Shipper) alarm(g gap) {
	c := g.control(s.o.SegmentSize, time.Now().UTC())
	s.o.Log.Error("wal is lost: nothing between these positions can be recovered; a new image is needed, from which on everything can",
		"first", g.names[0], "last", g.names[1], "segments", c.Segments, "start_lsn", c.StartLSN, "end_lsn", c.EndLSN)
	s.mu.Lock()
	s.gaps = append(s.gaps, c)
	if n := len(s.gaps) - rememberGaps; n > 0 {
		s.gaps = s.gaps[n:]
	}
	s.counted(func(n *counts) {
		n.gaps++
		n.lastGap = fmt.Sprintf("wal from %s to %s on timeline %d is lost", c.StartLSN, c.EndLSN, c.Timeline)
	})
	s.mu.Unlock()
	if s.o.Gap != nil {
		s.o.Gap(c)
	}
}
