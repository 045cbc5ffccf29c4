//go:build cgo

package repository

import (
	"errors"
	"runtime"
	"slices"

	"github.com/DataDog/zstd"
)

var zstdLibrary implementation = newCZstd()

// The levels of libzstd, per 16 MiB of real WAL in frames of 4 MiB: level 1 takes 20 ms of CPU and divides the size by 6.5
// (zstd in Go: 36 ms and 6.5; level 3: 35 ms and 7.1). On the pages of tables in frames of 256 KiB: 16 ms and 8.0 (Go: 30
// ms and 8.0).
//
// Below zero a level is the number of bytes that are passed over after each place where nothing matched, less one.
// PostgreSQL aligns what it writes into WAL to 8 bytes, so that -7 is faster than the levels above it and finds more, too:
// 11 ms and 3.8, where -5 takes 13 ms for 3.4.
const (
	thoroughLevel = 1
	hastyLevel    = -7
)

// cZstd is libzstd.
type cZstd struct {
	compressors, decompressors contexts
}

func newCZstd() *cZstd { return &cZstd{newContexts(), newContexts()} }

func (z *cZstd) compress(dst, raw []byte, effort Effort) (out []byte, err error) {
	level := thoroughLevel
	if effort == Hasty {
		level = hastyLevel
	}
	// With less room than the worst case takes, the library would allocate.
	dst = slices.Grow(dst, zstd.CompressBound(len(raw)))
	z.compressors.with(func(c zstd.Ctx) { out, err = c.CompressLevel(dst[len(dst):cap(dst)], raw, level) })
	return dst[:len(dst)+len(out)], err
}

func (z *cZstd) decompress(dst, frame []byte) (n int, err error) {
	room := dst
	if len(room) == 0 {
		room = make([]byte, 1) // the library takes the address of the first byte
	}
	z.decompressors.with(func(c zstd.Ctx) { n, err = c.DecompressInto(room, frame) })
	if err == nil && n > len(dst) {
		err = errors.New("found content, expected none")
	}
	return n, err
}

// contexts are the memory of libzstd, up to 1 MiB each, which Go's memory limit does not see: there are as many as
// processors, made when they are first needed and then kept.
type contexts chan zstd.Ctx

func newContexts() contexts {
	c := make(contexts, runtime.GOMAXPROCS(0))
	for range cap(c) {
		c <- nil
	}
	return c
}

// with calls fn with a context that nobody else uses meanwhile.
func (c contexts) with(fn func(zstd.Ctx)) {
	one := <-c
	defer func() { c <- one }()
	if one == nil {
		one = zstd.NewCtx()
	}
	fn(one)
}
