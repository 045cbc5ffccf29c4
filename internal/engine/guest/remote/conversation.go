package remote

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"sync"
	"time"
)

const (
	// helloTimeout bounds the time between the end of the upload, or the start of a runner that was there, and the
	// first line of the server. It hashes itself before, which takes a slow machine a second.
	helloTimeout = time.Minute
	// maxChatter is how much a guest may print before the server's first line: shells greet, and sudo lectures.
	maxChatter = 64 << 10
	// settleTimeout is how long a canceled change is waited for: the guest puts things back within two minutes.
	settleTimeout = 150 * time.Second
	// endGrace is how long a server gets to end by itself once its input has ended.
	endGrace = 10 * time.Second
)

// errEnded is the end of a conversation that we have ended ourselves.
var errEnded = errors.New("the conversation was ended")

// transport is a server that runs: the process at the other end of a link.
type transport struct {
	in     io.WriteCloser
	out    io.Reader
	upload io.Reader                 // what goes to in before anything else; nil for nothing
	wait   func() error              // waits until it has ended, and says how; may be called more than once
	stop   func(grace time.Duration) // closes in, waits for at most grace, and ends it
}

// conversation is the client's end. A call is begun, made and finished; when none is under way for a while, it ends.
type conversation struct {
	hello   hello
	t       transport
	ping    time.Duration
	silence time.Duration
	idle    time.Duration
	out     *mailbox

	stopped chan struct{} // Closed by run, when nothing of the conversation is left.
	dead    chan struct{} // Closed by lose.

	mu       sync.Mutex // guards what follows
	err      error      // why it is dead; nil while it lives
	under    int        // calls begun and not finished
	quiet    *time.Timer
	number   uint64
	changes  int // changing calls without an answer
	answers  map[uint64]chan response
	answered time.Time // when something was last heard
}

// greet reads the server's first line, and starts the conversation. When it fails the transport is ended.
func greet(ctx context.Context, t transport, o Options) (*conversation, error) {
	c := &conversation{
		t: t, ping: o.ping, silence: o.silence, idle: o.Idle, out: newMailbox(),
		stopped: make(chan struct{}), dead: make(chan struct{}),
		answers: map[uint64]chan response{}, answered: time.Now(),
	}
	uploaded := make(chan error, 1)
	go func() {
		var err error
		if t.upload != nil {
			_, err = io.Copy(t.in, t.upload)
		}
		uploaded <- err
	}()
	type first struct {
		hello *hello
		err   error
	}
	got := make(chan first, 1)
	l := newLines(t.out)
	go func() {
		h, err := readHello(l)
		got <- first{h, err}
	}()

	var late <-chan time.Time
	sent := uploaded
	var err error
	for spoken := false; !spoken && err == nil; {
		select {
		case uploadErr := <-sent:
			// Whoever stopped reading will have said why, and ended.
			sent, late = nil, time.After(helloTimeout)
			if uploadErr != nil {
				late = time.After(endGrace)
			}
			uploaded <- uploadErr
		case f := <-got:
			if err = f.err; err == nil {
				c.hello, spoken = *f.hello, true
			} else if errors.Is(err, io.EOF) {
				// What it printed on standard error says more than that it said nothing.
				if err = t.wait(); err == nil {
					err = fmt.Errorf("%w: it ended without a word", errUnfit)
				}
			}
		case <-late:
			err = errors.New("it was started and did not speak")
			if uploadErr := <-uploaded; uploadErr != nil {
				err = fmt.Errorf("send the runner: %w", uploadErr)
			}
		case <-ctx.Done():
			err = context.Cause(ctx)
		}
	}
	if err != nil {
		t.stop(endGrace)
		go func() { _ = t.wait() }() // gives the session back
		return nil, err
	}
	go c.run(l)
	return c, nil
}

// readHello skips what others print before the server speaks.
func readHello(l *lines) (*hello, error) {
	for read := 0; read <= maxChatter; {
		line, err := l.next()
		if err != nil {
			return nil, err
		}
		if !bytes.HasPrefix(line, []byte(`{"hello":`)) {
			read += len(line) + 1
			continue
		}
		var r response
		if err := decode(line, &r); err != nil {
			return nil, fmt.Errorf("%w: its first line: %w", errUnfit, err)
		}
		if r.Hello.Protocol != protocol {
			return nil, fmt.Errorf("%w: it speaks version %d of the protocol, expected %d", errUnfit, r.Hello.Protocol, protocol)
		}
		return r.Hello, nil
	}
	return nil, fmt.Errorf("%w: it printed more than %d bytes before its first line", errUnfit, maxChatter)
}

// run keeps the conversation going until it is dead.
func (c *conversation) run(l *lines) {
	defer close(c.stopped)
	var group sync.WaitGroup
	group.Go(func() {
		err := c.out.writeTo(c.t.in)
		if err == nil {
			return
		}
		select {
		case <-c.dead: // how the server ended says more than that it does not read
		case <-time.After(endGrace):
			c.lose(fmt.Errorf("write a request: %w", err))
		}
	})
	group.Go(func() {
		for {
			line, err := l.next()
			if err == nil {
				err = c.hear(line)
			}
			if errors.Is(err, io.EOF) {
				if err = c.t.wait(); err == nil {
					err = errors.New("the runner on the guest ended")
				}
			}
			if err != nil {
				c.lose(err)
				return
			}
		}
	})
	group.Go(func() {
		ticks := time.NewTicker(c.ping)
		defer ticks.Stop()
		for {
			select {
			case <-c.dead:
				return
			case <-ticks.C:
			}
			c.send(request{Ping: true})
			c.mu.Lock()
			silent := time.Since(c.answered)
			c.mu.Unlock()
			if silent > c.silence {
				c.lose(fmt.Errorf("the guest has not answered for %s", silent.Round(time.Second)))
			}
		}
	})
	<-c.dead
	c.out.close()
	grace := endGrace
	c.mu.Lock()
	if c.changes > 0 {
		grace = settleTimeout // it puts things back
	}
	c.mu.Unlock()
	c.t.stop(grace)
	group.Wait()
	_ = c.t.wait() // gives the session back; how it ended is known already, or was our doing
}

// lose ends the conversation for a reason. The first one stands.
func (c *conversation) lose(err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.err != nil {
		return
	}
	c.err = err
	if c.quiet != nil {
		c.quiet.Stop()
	}
	close(c.dead)
}

// end ends the conversation and waits until the guest is rid of it.
func (c *conversation) end() {
	c.lose(errEnded)
	<-c.stopped
}

// begin says that a call will be made; false if the conversation is over.
func (c *conversation) begin() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.err != nil {
		return false
	}
	if c.quiet != nil {
		c.quiet.Stop()
		c.quiet = nil
	}
	c.under++
	return true
}

// finish is the counterpart of begin.
func (c *conversation) finish() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.under--
	if c.under == 0 && c.err == nil {
		c.quiet = time.AfterFunc(c.idle, c.endIfQuiet)
	}
}

func (c *conversation) endIfQuiet() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.under == 0 && c.err == nil {
		c.err = errEnded
		close(c.dead)
	}
}

func (c *conversation) send(r request) {
	line, err := encode(r)
	if err != nil {
		panic("remote: internal error: " + err.Error()) // call has tried what may not fit
	}
	c.out.put(line)
}

// hear takes one line of the server.
func (c *conversation) hear(line []byte) error {
	var r response
	if err := decode(line, &r); err != nil {
		return fmt.Errorf("read an answer: %w", err)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.answered = time.Now()
	if answer := c.answers[r.ID]; answer != nil {
		answer <- r // has room for the one
		delete(c.answers, r.ID)
	}
	return nil
}

// call makes one call between begin and finish. When ctx ends, the guest is told to stop, and a call that changes is
// waited for all the same, for a while: its answer says what became of it. died is set if there was no answer because the
// conversation ended.
func (c *conversation) call(ctx context.Context, r request, changes bool) (result json.RawMessage, died bool, err error) {
	answer := make(chan response, 1)
	c.mu.Lock()
	c.number++
	r.ID = c.number
	c.answers[r.ID] = answer
	if changes {
		c.changes++
	}
	c.mu.Unlock()
	line, err := encode(r)
	if err != nil {
		c.forget(r.ID, changes)
		return nil, false, fmt.Errorf("%s: %w", r.Call, err)
	}
	c.out.put(line)

	var settled <-chan time.Time
	done := ctx.Done()
	for {
		select {
		case a := <-answer:
			c.forget(r.ID, changes)
			return c.result(ctx, a)
		case <-c.dead:
			select { // the answer was the last that was heard
			case a := <-answer:
				return c.result(ctx, a)
			default:
			}
			c.mu.Lock()
			defer c.mu.Unlock()
			return nil, true, c.err
		case <-done:
			c.send(request{Cancel: r.ID, Expired: errors.Is(ctx.Err(), context.DeadlineExceeded)})
			if !changes {
				c.forget(r.ID, changes)
				return nil, false, context.Cause(ctx)
			}
			done, settled = nil, time.After(settleTimeout)
		case <-settled:
			c.forget(r.ID, changes)
			return nil, false, fmt.Errorf("the guest was told to stop, and did not within %s: %w", settleTimeout, context.Cause(ctx))
		}
	}
}

// forget ends the waiting for an answer: it has come, or is not waited for any more.
func (c *conversation) forget(id uint64, changes bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	delete(c.answers, id)
	if changes {
		c.changes--
	}
}

func (c *conversation) result(ctx context.Context, a response) (json.RawMessage, bool, error) {
	if a.Error == nil {
		return a.Result, false, nil
	}
	err := a.Error.err()
	// The guest knows that it was told to stop; why, is known here.
	if e, ok := err.(*guestError); ok && (a.Error.Canceled || a.Error.Expired) && ctx.Err() != nil { //nolint:errorlint // just made
		e.causes = append(e.causes, context.Cause(ctx))
	}
	return nil, false, err
}
