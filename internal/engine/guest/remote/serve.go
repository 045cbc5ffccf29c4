package remote

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"sync"
	"time"

	"github.com/pgark/terraform-provider-pgark/internal/engine/guest"
)

const (
	// silence is how long either end hears nothing before it takes the other for gone. It is eight pings: a network that
	// is away for a minute, or a machine that swaps, does not undo an Apply.
	silence = 2 * time.Minute
	// flushTimeout bounds the writing of the last answers to whoever may not read any more.
	flushTimeout = 5 * time.Second
	// maxRequests run at a time. Terraform has ten operations under way, each of which asks one thing at a time.
	maxRequests = 64
)

var (
	errSilent     = fmt.Errorf("the other end has been silent for too long: %w", context.Canceled)
	errNoInput    = fmt.Errorf("the connection was closed: %w", context.Canceled)
	errNoJobGiven = errors.New("found no job in it")
)

// Serve answers requests from in on out with g until in ends, ctx ends, or nothing was heard for two minutes. Then it
// cancels what runs, waits for that, and returns: nil when in ended. It is what `pgark guest` runs. A read of in that is
// under way is left behind.
func Serve(ctx context.Context, g guest.Guest, in io.Reader, out io.Writer) error {
	sum, err := OwnDigest()
	if err != nil {
		return err
	}
	s := &server{guest: g, silence: silence}
	return s.run(ctx, hello{Protocol: protocol, SHA256: sum, PID: os.Getpid(), EUID: os.Geteuid()}, in, out)
}

// OwnDigest is the SHA-256 of the program that runs. Its file may be gone already.
func OwnDigest() (string, error) {
	path := "/proc/self/exe"
	if _, err := os.Stat(path); err != nil {
		if path, err = os.Executable(); err != nil {
			return "", fmt.Errorf("find own binary: %w", err)
		}
	}
	f, err := os.Open(path)
	if err != nil {
		return "", fmt.Errorf("hash own binary: %w", err)
	}
	defer f.Close()
	h := sha256.New()
	if _, err := io.Copy(h, f); err != nil {
		return "", fmt.Errorf("hash own binary: %w", err)
	}
	return hex.EncodeToString(h.Sum(nil)), nil
}

// server is the guest's end of a conversation.
type server struct {
	guest   guest.Guest
	silence time.Duration

	calls sync.WaitGroup
	out   *mailbox

	mu     sync.Mutex // guards cancel
	cancel map[uint64]context.CancelCauseFunc
}

func (s *server) run(ctx context.Context, hi hello, in io.Reader, out io.Writer) error {
	ctx, stop := context.WithCancelCause(ctx)
	defer stop(nil)
	s.cancel = map[uint64]context.CancelCauseFunc{}
	s.out = newMailbox()
	written := make(chan struct{}) // closed by the writer
	go func() {
		defer close(written)
		if err := s.out.writeTo(out); err != nil {
			stop(fmt.Errorf("write an answer: %w", err))
		}
	}()
	s.send(response{Hello: &hi})

	heard := time.AfterFunc(s.silence, func() { stop(errSilent) })
	defer heard.Stop()
	go func() {
		l := newLines(in)
		for n := 1; ; n++ {
			line, err := l.next()
			if errors.Is(err, io.EOF) {
				stop(errNoInput)
				return
			}
			if err == nil {
				heard.Reset(s.silence)
				err = s.handle(ctx, line)
			}
			if err != nil {
				stop(fmt.Errorf("read request %d: %w", n, err))
				return
			}
			if ctx.Err() != nil {
				return
			}
		}
	}()

	<-ctx.Done()
	s.mu.Lock()
	s.cancel = nil // from now on nothing begins
	s.mu.Unlock()
	s.calls.Wait()
	s.out.close()
	select {
	case <-written:
	case <-time.After(flushTimeout):
	}
	if err := context.Cause(ctx); !errors.Is(err, errNoInput) {
		return err
	}
	return nil
}

// handle takes one line. Its error ends the conversation: who cannot be understood may have asked for anything.
func (s *server) handle(ctx context.Context, line []byte) error {
	var r request
	if err := decode(line, &r); err != nil {
		return err
	}
	switch {
	case r.Ping:
		s.send(response{Pong: true})
	case r.Cancel != 0:
		s.mu.Lock()
		cancel := s.cancel[r.Cancel]
		s.mu.Unlock()
		if cancel == nil {
			return nil // answered meanwhile
		}
		if r.Expired {
			cancel(context.DeadlineExceeded)
		} else {
			cancel(context.Canceled)
		}
	case r.ID != 0 && r.Call != "":
		return s.begin(ctx, r)
	default:
		return errors.New("found neither a call nor a cancellation nor a ping")
	}
	return nil
}

// begin starts to work on a request.
func (s *server) begin(ctx context.Context, r request) error {
	ctx, cancel := context.WithCancelCause(ctx)
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.cancel == nil {
		cancel(nil)
		return nil
	}
	if _, twice := s.cancel[r.ID]; twice {
		cancel(nil)
		return fmt.Errorf("found the number %d a second time", r.ID)
	}
	if len(s.cancel) >= maxRequests {
		cancel(nil)
		s.send(response{ID: r.ID, Error: newFailure(fmt.Errorf("found %d requests under way, expected at most that many at a time", maxRequests))})
		return nil
	}
	s.cancel[r.ID] = cancel
	s.calls.Go(func() {
		defer cancel(nil)
		a := response{ID: r.ID}
		result, err := answer(ctx, s.guest, r)
		if err == nil {
			a.Result, err = json.Marshal(result)
		}
		if err != nil {
			a.Result, a.Error = nil, newFailure(err)
		}
		s.mu.Lock()
		delete(s.cancel, r.ID)
		s.mu.Unlock()
		s.send(a)
	})
	return nil
}

// send puts an answer in the mailbox. One that is too long for a line is answered with that.
func (s *server) send(a response) {
	line, err := encode(a)
	if err != nil {
		if line, err = encode(response{ID: a.ID, Error: newFailure(err)}); err != nil {
			panic("remote: internal error: " + err.Error()) // a few words always fit
		}
	}
	s.out.put(line)
}

// answer does what a request asks for.
func answer(ctx context.Context, g guest.Guest, r request) (any, error) {
	switch r.Call {
	case callMachine:
		return g.Machine(ctx)
	case callDiscover:
		return g.Discover(ctx)
	case callCheck:
		p, err := params[guest.CheckRequest](r)
		if err == nil && p.Job == nil {
			err = fmt.Errorf("params of %s: %w", r.Call, errNoJobGiven)
		}
		if err != nil {
			return nil, err
		}
		return g.Check(ctx, p)
	case callApply:
		p, err := params[guest.Deployment](r)
		if err == nil && p.Job == nil {
			err = fmt.Errorf("params of %s: %w", r.Call, errNoJobGiven)
		}
		if err != nil {
			return nil, err
		}
		return g.Apply(ctx, p)
	case callState:
		p, err := params[named](r)
		if err != nil {
			return nil, err
		}
		return g.State(ctx, p.Name)
	case callSetWALRetention:
		p, err := params[retentionParams](r)
		if err != nil {
			return nil, err
		}
		return nil, g.SetWALRetention(ctx, p.Name, p.Retention)
	case callRemove:
		p, err := params[named](r)
		if err != nil {
			return nil, err
		}
		return nil, g.Remove(ctx, p.Name)
	}
	return nil, fmt.Errorf("found the call %.40q, which this runner does not know", r.Call)
}

// params reads those of a request.
func params[P any](r request) (p P, err error) {
	if err := decode(r.Params, &p); err != nil {
		return p, fmt.Errorf("params of %s: %w", r.Call, err)
	}
	return p, nil
}

// mailbox holds lines that are to be written, so that nobody has to wait for whoever reads them, or does not. What it
// holds is bounded by the requests under way.
type mailbox struct {
	mu     sync.Mutex // guards lines and closed
	lines  [][]byte
	closed bool
	more   chan struct{} // has one element when there is something new
}

func newMailbox() *mailbox { return &mailbox{more: make(chan struct{}, 1)} }

func (m *mailbox) put(line []byte) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if !m.closed {
		m.lines = append(m.lines, line)
	}
	m.wake()
}

// close lets writeTo return once everything is written.
func (m *mailbox) close() {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.closed = true
	m.wake()
}

func (m *mailbox) wake() {
	select {
	case m.more <- struct{}{}:
	default:
	}
}

// writeTo writes what is put until close, or an error.
func (m *mailbox) writeTo(w io.Writer) error {
	for range m.more {
		m.mu.Lock()
		lines, closed := m.lines, m.closed
		m.lines = nil
		m.mu.Unlock()
		for _, line := range lines {
			if _, err := w.Write(line); err != nil {
				m.mu.Lock()
				m.closed, m.lines = true, nil
				m.mu.Unlock()
				return err
			}
		}
		if closed {
			return nil
		}
	}
	return nil
}
