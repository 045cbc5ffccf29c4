package sshlink

import (
	"io"
	"sync"
	"sync/atomic"
)

// inputPiece is how much of one Write goes on after a Close.
const inputPiece = 32 << 10

// stdin is a process's standard input. That of x/crypto/ssh may not be closed while something is written to it, and a Write
// may wait for the other side for ever; so Close here does not wait: a Write that is under way ends with its piece, and
// closes then.
type stdin struct {
	to io.WriteCloser

	closing atomic.Bool
	mu      sync.Mutex // held while to is used
	closed  bool       // guarded by mu
}

func (i *stdin) Write(b []byte) (n int, err error) {
	for err == nil && n < len(b) {
		var wrote int
		wrote, err = i.write(b[n:min(len(b), n+inputPiece)])
		n += wrote
	}
	if i.closing.Load() {
		_ = i.close() // as Close could not
	}
	return n, err
}

func (i *stdin) write(b []byte) (int, error) {
	i.mu.Lock()
	defer i.mu.Unlock()
	if i.closing.Load() {
		return 0, io.ErrClosedPipe
	}
	return i.to.Write(b)
}

// Close ends the input. It may be called at any time, and more than once.
func (i *stdin) Close() error {
	i.closing.Store(true)
	return i.close()
}

func (i *stdin) close() error {
	if !i.mu.TryLock() {
		return nil // who holds it looks at closing afterwards
	}
	defer i.mu.Unlock()
	if i.closed {
		return nil
	}
	i.closed = true
	return i.to.Close()
}
