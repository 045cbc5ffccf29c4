package daemon

import (
	"context"
	"sync"
	"time"

	"github.com/pgark/terraform-provider-pgark/internal/engine/daemon/control"
	"github.com/pgark/terraform-provider-pgark/internal/engine/job"
	"github.com/pgark/terraform-provider-pgark/internal/engine/postgres"
	"github.com/pgark/terraform-provider-pgark/internal/engine/repository"
)

// lags keeps the account of the lag in continuous mode: of the runner's life, and of the session that runs. It outlives
// protections.
type lags struct {
	mu      sync.Mutex // guards what follows
	worst   time.Duration
	session struct {
		judged      bool // there was anything to judge
		worst, late time.Duration
	}
}

const (
	// The lag is looked at four times in the time that it may take, within these bounds: it costs a few microseconds.
	lookLeast = 100 * time.Millisecond
	lookMost  = time.Second

	// Without a stream it takes asking the server.
	lookUnconnected = 5 * time.Second
)

// longest is the worst lag of the runner's life, one of now included.
func (l *lags) longest(seconds float64) float64 {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.worst = max(l.worst, time.Duration(seconds*float64(time.Second)))
	return l.worst.Seconds()
}

// saw notes a lag that was looked at some time after the one before.
func (l *lags) saw(lag, after, objective time.Duration) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.worst = max(l.worst, lag)
	l.session.judged = true
	l.session.worst = max(l.session.worst, lag)
	if lag > objective {
		l.session.late += after
	}
}

// tell writes what the session amounts to into its record.
func (l *lags) tell(r *repository.SessionRecord) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if !l.session.judged {
		return
	}
	// What is told has to be more than nothing.
	r.MaxLag = max(l.session.worst, time.Millisecond).Seconds()
	r.Late = l.session.late.Seconds()
}

// told begins a new session.
func (l *lags) told() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.session.judged, l.session.worst, l.session.late = false, 0, 0
}

// watchLag looks at the lag of continuous mode until ctx ends.
func (p *protection) watchLag(ctx context.Context) {
	if p.wal.Mode != job.WALContinuous {
		return
	}
	objective := p.objective()
	every := min(max(objective/4, lookLeast), lookMost)
	tick := time.NewTicker(every)
	defer tick.Stop()
	var unconnected time.Time // when the server was asked last
	for last := time.Now(); ; {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		now := time.Now()
		var s control.WALStatus
		if p.describeStream(&s) {
			unconnected = time.Time{}
		} else {
			if now.Sub(unconnected) < lookUnconnected {
				continue
			}
			unconnected = now
			if running, _, err := postgres.IsRunning(p.dataDir); err != nil || !running {
				last = now
				continue // nothing is written, and what was, the stream has had
			}
			s = p.shipper.Status()
			p.describeArchive(ctx, &s)
		}
		p.d.lags.saw(time.Duration(s.LagSeconds*float64(time.Second)), now.Sub(last), objective)
		last = now
	}
}

// accounts writes session records, to which it adds what the shipper does not know.
type accounts struct {
	*repository.Series
	p *protection
}

// PutSession writes a record.
func (a accounts) PutSession(ctx context.Context, r repository.SessionRecord) error {
	var st control.StreamStatus
	if v := a.p.streaming; v != nil {
		st = v.status()
		told := v.told(nil)
		r.Tails, r.TailBytes = st.Tails-told.Tails, st.TailBytes-told.TailBytes
	}
	a.p.d.lags.tell(&r)
	if err := a.Series.PutSession(ctx, r); err != nil {
		return err
	}
	if v := a.p.streaming; v != nil {
		v.told(&st)
	}
	a.p.d.lags.told()
	return nil
}
