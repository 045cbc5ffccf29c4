package wal

import (
	"context"
	"sync"
	"time"
)

const (
	minUploads = 2
	maxUploads = 16

	// memoryBudget bounds what files in flight hold, as they are and as they are stored, in bytes. One file is always let
	// through.
	memoryBudget = 96 << 20
)

// gate bounds the uploads in flight. Near the repository two are plenty: the CPU is what they wait for. The further away
// it is, the more it takes to fill the pipe; so the bound grows while uploads wait for one another, as long as more of
// them bring more.
type gate struct {
	mu      sync.Mutex
	busy    int
	waiting []chan struct{} // closed when it is one's turn, which counts as busy already; oldest first
	climb   climber
}

func newGate() *gate { return &gate{climb: climber{limit: minUploads}} }

// enter waits for a place.
func (g *gate) enter(ctx context.Context) error {
	if g.tryEnter() {
		return nil
	}
	g.mu.Lock()
	turn := make(chan struct{})
	g.waiting = append(g.waiting, turn)
	g.admit()
	g.mu.Unlock()
	select {
	case <-turn:
		return nil
	case <-ctx.Done():
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	for i, w := range g.waiting {
		if w == turn {
			g.waiting = append(g.waiting[:i], g.waiting[i+1:]...)
			return context.Cause(ctx)
		}
	}
	g.busy-- // our turn came at the same moment
	g.admit()
	return context.Cause(ctx)
}

// tryEnter takes a place if one is free and nobody waits for it.
func (g *gate) tryEnter() bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	if len(g.waiting) > 0 || g.busy >= g.climb.limit {
		return false
	}
	g.busy++
	return true
}

// leave gives a place back. bytes is what was uploaded; 0 if nothing.
func (g *gate) leave(bytes int64, now time.Time) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.busy--
	if bytes > 0 {
		g.climb.uploaded(bytes, now, len(g.waiting) > 0)
	}
	g.admit()
}

func (g *gate) admit() {
	for len(g.waiting) > 0 && g.busy < g.climb.limit {
		g.busy++
		close(g.waiting[0])
		g.waiting = g.waiting[1:]
	}
}

func (g *gate) limit() int {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.climb.limit
}

// climber looks for the least number of uploads in flight that takes all the repository, and the way there, can give.
// It measures bytes per second over a round of uploads, tries half as many more, and goes back if that was of no use.
type climber struct {
	limit int

	since time.Time // of the round; zero: none has begun
	bytes int64
	count int

	trying bool    // limit is more than what was proven
	proven int     // the limit before
	rate   float64 // bytes per second with proven
	rest   int     // rounds until the next try
}

const (
	roundLeast  = 500 * time.Millisecond
	worthMore   = 1.1 // what counts as more
	roundsRest  = 30
	roundLength = 2 // uploads a place
)

// uploaded counts one. waiting says that others wait for its place: if none does, there is nothing to find out.
func (c *climber) uploaded(bytes int64, now time.Time, waiting bool) {
	if !waiting || c.since.IsZero() {
		c.since, c.bytes, c.count = time.Time{}, 0, 0
		if waiting {
			c.since = now
		}
		return
	}
	c.bytes += bytes
	c.count++
	took := now.Sub(c.since)
	if c.count < roundLength*c.limit || took < roundLeast {
		return
	}
	rate := float64(c.bytes) / took.Seconds()
	c.since, c.bytes, c.count = now, 0, 0
	switch {
	case c.trying && rate < worthMore*c.rate:
		c.limit, c.trying, c.rest = c.proven, false, roundsRest
	case c.rest > 0:
		c.rest--
	case c.limit < maxUploads:
		c.trying, c.proven, c.rate = true, c.limit, rate
		c.limit = min(maxUploads, c.limit+max(1, c.limit/2))
	default:
		c.trying = false
	}
}
