package daemon

import (
	"time"

	"github.com/pgark/terraform-provider-pgark/internal/engine/daemon/control"
)

// keepGaps bounds the gaps that are told of one by one.
const keepGaps = 100

// gap notes WAL that is lost, and has an image taken because of it. The shipper has told the log.
func (p *protection) gap(g control.WALGap) {
	d := p.d
	d.mu.Lock()
	d.gaps = append(d.gaps, g)
	if len(d.gaps) > keepGaps {
		d.gaps = d.gaps[len(d.gaps)-keepGaps:]
	}
	d.gapCount++
	d.mu.Unlock()
	if p.streaming != nil {
		p.streaming.lost(g)
	}
	p.images.afterGap(g.FoundAt)
}

// bridge notes that an image that began at a time makes up for the gaps found before.
func (d *daemon) bridge(began time.Time, image string) {
	d.mu.Lock()
	defer d.mu.Unlock()
	for i := range d.gaps {
		if g := &d.gaps[i]; g.Image == "" && g.FoundAt.Before(began) {
			g.Image = image
		}
	}
}

// knownGaps are the latest gaps, and how many there were in all.
func (d *daemon) knownGaps() ([]control.WALGap, int64) {
	d.mu.Lock()
	defer d.mu.Unlock()
	return append([]control.WALGap{}, d.gaps...), d.gapCount
}
