package repository

import (
	"context"
	"errors"
	"io"
	"time"

	"github.com/pgark/terraform-provider-pgark/internal/engine/objectstore"
)

// reader reads a range of an object and goes on where it was when the connection breaks: stores and the boxes between
// cut transfers that last, and a Store retries what it can see, which ends with the first byte of the body.
type reader struct {
	r      *Repository
	ctx    context.Context
	key    string
	offset int64
	n      int64 // bytes left; < 0: to the end

	body     io.ReadCloser
	failures int // without a byte in between
}

// maxReadFailures bounds the attempts that bring no byte. Waiting 0.1, 0.2, 0.4 … s between them gives a store that
// restarts some 25 s; a store's own Get waits longer by itself.
const maxReadFailures = 8

func (r *Repository) newReader(ctx context.Context, key string, offset, n int64) *reader {
	return &reader{r: r, ctx: ctx, key: key, offset: offset, n: n}
}

func (s *reader) Read(p []byte) (int, error) {
	if s.n == 0 {
		return 0, io.EOF
	}
	if s.n > 0 && int64(len(p)) > s.n {
		p = p[:s.n]
	}
	for {
		if s.body == nil {
			body, err := s.r.store.Get(s.ctx, s.key, s.offset, s.n)
			if err != nil {
				return 0, err // the store has retried this already
			}
			s.body = body
		}
		n, err := s.body.Read(p)
		s.offset += int64(n)
		if s.n > 0 {
			s.n -= int64(n)
		}
		if n > 0 {
			s.failures = 0
		}
		switch {
		case err == nil && n > 0:
			return n, nil
		case err == nil:
			continue
		case err == io.EOF && s.n <= 0:
			return n, io.EOF
		case n > 0:
			s.drop()
			return n, nil
		}
		s.drop()
		if err := s.ctx.Err(); err != nil {
			return 0, context.Cause(s.ctx) // cancelled: that says nothing about the object
		}
		if err == io.EOF {
			err = io.ErrUnexpectedEOF
		}
		s.failures++
		if s.n > 0 && s.failures == 1 && errors.Is(err, io.ErrUnexpectedEOF) {
			// An object that really is too short will not grow by being read again.
			if o, statErr := s.r.store.Stat(s.ctx, s.key); statErr == nil && o.Size < s.offset+s.n {
				return 0, err
			}
		}
		worthAnother := objectstore.IsTransient(err) || errors.Is(err, io.ErrUnexpectedEOF)
		if !worthAnother || s.failures >= maxReadFailures {
			return 0, &readError{err}
		}
		if err := sleep(s.ctx, 50*time.Millisecond<<s.failures); err != nil {
			return 0, err
		}
	}
}

func (s *reader) drop() {
	if s.body != nil {
		_ = s.body.Close() // nothing was written: there is nothing that closing could lose
		s.body = nil
	}
}

// Close ends the transfer.
func (s *reader) Close() error {
	s.drop()
	return nil
}

// sleep waits for d or until ctx ends, whose cause it then returns.
func sleep(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}
