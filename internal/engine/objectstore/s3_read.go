package objectstore

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"sync"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/service/s3"
)

func (s *s3Store) Get(ctx context.Context, key string, offset, n int64) (io.ReadCloser, error) {
	if err := checkKey(key); err != nil {
		return nil, err
	}
	if n == 0 { // S3 has no empty ranges
		if _, err := s.Stat(ctx, key); err != nil {
			return nil, err
		}
		return io.NopCloser(strings.NewReader("")), nil
	}
	r := &s3Reader{ctx: ctx, s: s, key: key, next: offset, end: -1, asked: n}
	err := r.open()
	if errors.Is(err, errRange) {
		return s.getBeyondEnd(ctx, key, offset, n)
	}
	if err != nil {
		return nil, err
	}
	return r, nil
}

// getBeyondEnd gives what Get promises where S3 answers that the object has no byte in the range.
func (s *s3Store) getBeyondEnd(ctx context.Context, key string, offset, n int64) (io.ReadCloser, error) {
	o, err := s.Stat(ctx, key)
	if err != nil {
		return nil, err
	}
	if n < 0 && offset > o.Size {
		n = 1
	}
	if n < 0 {
		n = 0
	}
	empty := io.NopCloser(strings.NewReader(""))
	return &rangeReader{Closer: empty, r: empty, n: n}, nil
}

// s3Reader reads an object and, where the connection breaks, asks for the rest of it.
type s3Reader struct {
	ctx   context.Context
	s     *s3Store
	key   string
	next  int64 // offset of the next byte
	end   int64 // offset after the last byte that the store has for us; negative until the first answer
	asked int64 // bytes the caller asked for; negative: all

	w       *watchdog // of the open request
	body    io.ReadCloser
	short   bool // the object ends before what the caller asked for
	resumes int
	failed  error
}

// open asks for what is left.
func (r *s3Reader) open() error {
	return r.s.do(r.ctx, "get", r.key, func(w *watchdog) error {
		in := &s3.GetObjectInput{Bucket: &r.s.bucket, Key: r.s.full(r.key)}
		switch {
		case r.end >= 0:
			in.Range = aws.String(fmt.Sprintf("bytes=%d-%d", r.next, r.end-1))
		case r.asked >= 0:
			in.Range = aws.String(fmt.Sprintf("bytes=%d-%d", r.next, r.next+r.asked-1))
		case r.next > 0:
			in.Range = aws.String(fmt.Sprintf("bytes=%d-", r.next))
		}
		out, err := r.s.client.GetObject(w.ctx, in)
		if err != nil {
			return err
		}
		length := aws.ToInt64(out.ContentLength)
		if in.Range != nil && out.ContentRange == nil && (r.next > 0 || length > r.asked) {
			out.Body.Close()
			return errNoRanges
		}
		if r.end < 0 {
			r.end = r.next + length
			r.short = r.asked > length
		} else if length != r.end-r.next {
			out.Body.Close()
			return fmt.Errorf("asked for the rest of the object from offset %d: got %d bytes, expected %d", r.next, length, r.end-r.next)
		}
		w.pause() // the caller may take its time between two reads
		r.w, r.body = w, out.Body
		return nil
	})
}

func (r *s3Reader) Read(p []byte) (int, error) {
	if r.failed != nil {
		return 0, r.failed
	}
	n, err := r.read(p)
	if err != nil {
		r.failed = err
	}
	return n, err
}

func (r *s3Reader) read(p []byte) (int, error) {
	if len(p) == 0 {
		return 0, nil
	}
	waitedSince, failures := time.Now(), 0
	for {
		if r.ctx.Err() != nil {
			return 0, context.Cause(r.ctx)
		}
		if r.next >= r.end {
			if r.short {
				return 0, io.ErrUnexpectedEOF
			}
			return 0, io.EOF
		}
		if left := r.end - r.next; int64(len(p)) > left {
			p = p[:left]
		}
		r.w.progress()
		n, err := r.body.Read(p)
		r.w.pause()
		r.next += int64(n)
		if n > 0 {
			return n, nil // an error that came with it comes again, or with the next request
		}
		if err == nil {
			continue
		}
		if errors.Is(err, io.EOF) {
			err = io.ErrUnexpectedEOF // we know that there is more
		}
		err = r.s.fail(r.w, "get", r.key, err)
		r.close()
		if r.ctx.Err() != nil {
			return 0, context.Cause(r.ctx)
		}
		r.resumes++
		failures++
		wait := backoff(failures)
		if !isTransient(err) || r.resumes > maxResumes || time.Since(waitedSince)+wait > r.s.o.MaxElapsed {
			return 0, err
		}
		if err := sleep(r.ctx, wait); err != nil {
			return 0, err
		}
		if err := r.open(); err != nil {
			return 0, err
		}
	}
}

func (r *s3Reader) close() {
	if r.body != nil {
		r.w.stop()
		r.body.Close() // nothing is lost: what was read is read
		r.body = nil
	}
}

// Close ends the request. Reads after it fail.
func (r *s3Reader) Close() error {
	r.close()
	if r.failed == nil {
		r.failed = errors.New("objectstore: read after close")
	}
	return nil
}

// attemptBody is a section of a caller's body for one attempt. The HTTP transport may go on reading a request's body
// after it has answered; detach makes that harmless, so that the next attempt, or the caller, has the body for itself.
type attemptBody struct {
	progress func() // called for each read
	base     int64  // offset of the section in r
	size     int64  // of the section

	mu  sync.Mutex // guards what follows; not held while progress is called
	r   io.ReadSeeker
	pos int64 // in the section
	set bool  // r is at base+pos
	err error // the first that r gave
}

var errDetached = errors.New("objectstore: the request has ended")

func (b *attemptBody) Read(p []byte) (int, error) {
	b.progress()
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.r == nil {
		return 0, errDetached
	}
	if b.err != nil {
		return 0, b.err
	}
	if b.pos >= b.size {
		return 0, io.EOF
	}
	if !b.set {
		if _, b.err = b.r.Seek(b.base+b.pos, io.SeekStart); b.err != nil {
			return 0, b.err
		}
		b.set = true
	}
	if left := b.size - b.pos; int64(len(p)) > left {
		p = p[:left]
	}
	n, err := b.r.Read(p)
	b.pos += int64(n)
	if errors.Is(err, io.EOF) && b.pos < b.size {
		err = errShortBody
	}
	if errors.Is(err, io.EOF) {
		err = nil
	}
	b.err = err
	return n, err
}

func (b *attemptBody) Seek(offset int64, whence int) (int64, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	switch whence {
	case io.SeekCurrent:
		offset += b.pos
	case io.SeekEnd:
		offset += b.size
	}
	if offset < 0 {
		return 0, errors.New("objectstore: seek before the start of a body")
	}
	b.pos, b.set = offset, false
	return offset, nil
}

// detach ends all reading and returns the error that the caller's body gave, if any.
func (b *attemptBody) detach() error {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.r = nil
	return b.err
}
