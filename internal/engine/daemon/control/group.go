package control

import "sync"

// group runs functions concurrently, a bounded number at a time.
type group struct {
	slots chan struct{}
	wg    sync.WaitGroup
}

func newGroup(n int) *group { return &group{slots: make(chan struct{}, n)} }

// run starts fn, once there is room.
func (g *group) run(fn func()) {
	g.slots <- struct{}{}
	g.wg.Go(func() {
		defer func() { <-g.slots }()
		fn()
	})
}

func (g *group) wait() { g.wg.Wait() }
