package objectstore

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"io"

	"github.com/zeebo/blake3"
)

// digest reads r to its end and returns what ConflictError shows: BLAKE3-256 in hexadecimal, and the size.
func digest(r io.Reader) (string, error) {
	h := blake3.New()
	n, err := io.Copy(h, r)
	if err != nil {
		return "", err
	}
	return fmt.Sprintf("%s, %d bytes", hex.EncodeToString(h.Sum(nil)), n), nil
}

// compare settles a create whose name turned out to be taken: nil if the stored object has the offered content, else a
// *ConflictError, or ErrNotExist if there is no such object after all. Both sides are streamed.
func compare(ctx context.Context, s Store, key string, body io.ReadSeeker, size int64) error {
	stored, err := s.Get(ctx, key, 0, -1)
	if err != nil {
		return err
	}
	defer stored.Close()
	there, err := digest(stored)
	if err != nil {
		return err
	}
	here, err := digest(&contextReader{ctx, &exactReader{r: body, n: size}})
	if err != nil {
		return err
	}
	if there != here {
		return &ConflictError{Store: s.URL(), Key: key, There: there, Here: here}
	}
	return nil
}

// errShortBody says that a body ended before the size its caller gave. Nothing is stored in that case.
var errShortBody = errors.New("the body is shorter than the size given for it")

// exactReader reads n bytes of r and no more; an earlier end is errShortBody.
type exactReader struct {
	r io.Reader
	n int64
}

func (e *exactReader) Read(p []byte) (int, error) {
	if e.n <= 0 {
		return 0, io.EOF
	}
	if int64(len(p)) > e.n {
		p = p[:e.n]
	}
	n, err := e.r.Read(p)
	e.n -= int64(n)
	if err == io.EOF && e.n > 0 {
		err = errShortBody
	}
	return n, err
}

// contextReader ends with the context's cause once it is done.
type contextReader struct {
	ctx context.Context
	r   io.Reader
}

func (c *contextReader) Read(p []byte) (int, error) {
	if c.ctx.Err() != nil {
		return 0, context.Cause(c.ctx)
	}
	return c.r.Read(p)
}

// rangeReader turns the end of r before n bytes into io.ErrUnexpectedEOF, as Store.Get promises.
type rangeReader struct {
	io.Closer
	r io.Reader
	n int64 // bytes still expected; negative: to the end, whatever it is
}

func (r *rangeReader) Read(p []byte) (int, error) {
	if r.n == 0 {
		return 0, io.EOF
	}
	if r.n > 0 && int64(len(p)) > r.n {
		p = p[:r.n]
	}
	n, err := r.r.Read(p)
	if r.n > 0 {
		r.n -= int64(n)
		if err == io.EOF {
			if r.n > 0 {
				err = io.ErrUnexpectedEOF
			} else {
				err = nil
			}
		}
	}
	return n, err
}
