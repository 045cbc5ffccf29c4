package daemon

import (
	"context"
	"errors"
	"sync"
	"time"

	"github.com/pgark/terraform-provider-pgark/internal/engine/daemon/control"
	"github.com/pgark/terraform-provider-pgark/internal/engine/job"
	"github.com/pgark/terraform-provider-pgark/internal/engine/postgres"
	"github.com/pgark/terraform-provider-pgark/internal/engine/wal"
	"github.com/pgark/terraform-provider-pgark/internal/engine/wal/stream"
)

const (
	// streamAgain is the wait before streaming is begun anew after it ended with an error; it doubles up to streamMost.
	// A server that is away, or refuses us, is nothing that ends it.
	streamAgain = time.Second
	streamMost  = time.Minute

	// fallenBehind is how many times max_lag, but at least fallenBehindLeast, the lag may be before WAL is not called
	// streaming any more. One request that takes long is no change of state.
	fallenBehind      = 3
	fallenBehindLeast = 5 * time.Second
)

// streaming keeps a streamer at work for a protection in continuous mode.
type streaming struct {
	p      *protection
	maxLag time.Duration
	begin  func() (*stream.Streamer, error)

	mu      sync.Mutex // guards what follows
	s       *stream.Streamer
	before  control.StreamStatus // what earlier streamers have counted
	err     error                // why the last one ended
	errAt   time.Time
	within  bool                 // WAL is streaming, as far as the lag goes
	account control.StreamStatus // what session records have told of
}

func newStreaming(p *protection, archive stream.Archive, c config) (*streaming, error) {
	w := c.job.WAL
	v := &streaming{p: p, maxLag: time.Duration(w.MaxLag)}
	o := stream.Options{
		Connect: func(ctx context.Context) (*postgres.Replication, error) {
			// The name is what synchronous_standby_names names. It is the same without synchronous, so that commits which wait
			// for pgark because that was declared before go on being confirmed.
			return postgres.ConnectReplication(ctx, p.connectOptions(), postgres.ApplicationName)
		},
		Archive: archive, SystemID: p.systemID, SegmentSize: p.segment, Host: p.d.host,
		MaxLag: v.maxLag, MaxRequestsPerHour: w.MaxRequestsPerHour, Synchronous: c.job.WantsSynchronous(),
		Completed: func(name postgres.SegmentName) { p.shipper.Completed(name) },
		Unstored:  p.unstored,
		Log:       p.d.log,
	}
	if o.Synchronous {
		o.MaxRequestsPerHour = 0 // commits wait: none may be saved
	}
	if c.job.WantsSlot() {
		o.Slot = job.SlotName(c.job.Name)
	}
	v.begin = func() (*stream.Streamer, error) { return stream.New(o) }
	var err error
	v.s, err = v.begin()
	return v, err
}

// run streams until ctx ends, or another cluster answers.
func (v *streaming) run(ctx context.Context) {
	for wait := streamAgain; ; wait = min(2*wait, streamMost) {
		began := time.Now()
		s, err := v.next()
		if err == nil {
			err = s.Run(ctx)
		}
		switch {
		case ctx.Err() != nil:
			return
		case errors.Is(err, stream.ErrOtherCluster):
			v.p.d.log.Warn("another cluster answers where the protected one did", "error", err)
			v.p.end(errReopen)
			return
		case time.Since(began) > streamMost:
			wait = streamAgain
		}
		v.p.d.log.Error("streaming has ended: whole segments are stored, and it is begun anew", "error", err, "in", wait)
		v.ended(err)
		select {
		case <-ctx.Done():
			return
		case <-time.After(wait):
		}
	}
}

// next is the streamer to run: a new one, where the last has ended.
func (v *streaming) next() (*stream.Streamer, error) {
	v.mu.Lock()
	defer v.mu.Unlock()
	var err error
	if v.s == nil {
		v.s, err = v.begin()
	}
	return v.s, err
}

func (v *streaming) current() *stream.Streamer {
	v.mu.Lock()
	defer v.mu.Unlock()
	return v.s
}

// ended keeps what a streamer has counted.
func (v *streaming) ended(err error) {
	st := v.status()
	v.mu.Lock()
	defer v.mu.Unlock()
	v.before = control.StreamStatus{Restarts: st.Restarts + 1, Tails: st.Tails, TailBytes: st.TailBytes}
	v.s = nil
	v.err, v.errAt = err, time.Now()
}

// stored is told of every file that has become durable in the repository.
func (v *streaming) stored(r wal.Receipt) {
	name, err := postgres.ParseSegmentName(r.Name)
	if s := v.current(); err == nil && s != nil {
		s.SegmentStored(name)
	}
}

// lost is told of every gap.
func (v *streaming) lost(g control.WALGap) {
	s := v.current()
	start, err := postgres.ParseLSN(g.StartLSN)
	if err != nil || s == nil {
		return
	}
	size := v.p.segment
	for n := size.Number(start); n < size.Number(start)+g.Segments; n++ {
		s.SegmentLost(postgres.MakeSegmentName(postgres.Timeline(g.Timeline), n, size))
	}
}

// status counts since the protection began.
func (v *streaming) status() control.StreamStatus {
	s := v.current()
	var st control.StreamStatus
	if s != nil {
		st = s.Status()
	}
	v.mu.Lock()
	defer v.mu.Unlock()
	st.Restarts += v.before.Restarts
	st.Tails += v.before.Tails
	st.TailBytes += v.before.TailBytes
	if st.LastErrorAt == nil && v.err != nil {
		at := v.errAt
		st.LastError, st.LastErrorAt = v.err.Error(), &at
	}
	return st
}

// told notes what session records have told of, if it is given, and returns what they had.
func (v *streaming) told(of *control.StreamStatus) control.StreamStatus {
	v.mu.Lock()
	defer v.mu.Unlock()
	before := v.account
	if of != nil {
		v.account = *of
	}
	return before
}

func (v *streaming) position() stream.Position {
	if s := v.current(); s != nil {
		return s.Position()
	}
	return stream.Position{}
}

// holds tells whether WAL reaches the repository as it is written.
func (v *streaming) holds() bool {
	s := v.current()
	connected := s != nil && s.Status().Connected
	lag := since(v.position().OldestPending)
	v.mu.Lock()
	defer v.mu.Unlock()
	switch {
	case !connected:
		v.within = false
	case lag > max(fallenBehind*v.maxLag, fallenBehindLeast):
		v.within = false
	case lag <= 2*v.maxLag:
		v.within = true
	}
	return v.within
}

// since is the time since t; 0 for the zero time and those to come.
func since(t time.Time) time.Duration {
	if t.IsZero() {
		return 0
	}
	return max(time.Since(t), 0)
}
