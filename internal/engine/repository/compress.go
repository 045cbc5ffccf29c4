package repository

import (
	"encoding/binary"
	"errors"
	"fmt"
)

// codec says how a frame's payload is compressed. Stored in frame headers: never renumber.
type codec uint8

const (
	codecRaw  codec = 0
	codecZstd codec = 1 // one zstd frame (RFC 8878) without checksum: the tag covers it
)

// uncompressed is the effort of a frame that is stored as it is.
const uncompressed Effort = -1

// implementation is a zstd library: libzstd in the runner (compress_cgo.go), Go code in what is built without C
// (compress_nocgo.go). Each reads what the other wrote. Its methods may be called concurrently.
type implementation interface {
	// compress appends raw as one zstd frame to dst.
	compress(dst, raw []byte, effort Effort) ([]byte, error)

	// decompress fills dst with the content of a zstd frame and returns its length. Content that does not fit into dst is
	// an error: nothing but dst is ever filled.
	decompress(dst, frame []byte) (int, error)
}

// compress appends raw's compressed form to dst, or says codecRaw and appends nothing where that saves less than 1/32:
// a restore then saves the decompression.
func compress(dst, raw []byte, effort Effort) ([]byte, codec) {
	if effort == uncompressed {
		return dst, codecRaw
	}
	// What cannot be compressed for want of memory is whole as it is.
	out, err := zstdLibrary.compress(dst, raw, effort)
	if n := len(out) - len(dst); err != nil || n >= len(raw)-len(raw)/32 {
		return dst, codecRaw
	}
	return out, codecZstd
}

// decompress appends exactly n bytes to dst, which must have room for them.
func decompress(dst, payload []byte, c codec, n int) ([]byte, error) {
	switch c {
	case codecRaw:
		if len(payload) != n {
			return nil, fmt.Errorf("found %d bytes, expected %d", len(payload), n)
		}
		return append(dst, payload...), nil
	case codecZstd:
		if err := checkZstdFrame(payload); err != nil {
			return nil, fmt.Errorf("decompress: %w", err)
		}
		got, err := zstdLibrary.decompress(dst[len(dst):len(dst)+n:len(dst)+n], payload)
		if err != nil {
			return nil, fmt.Errorf("decompress: %w", err)
		}
		if got != n {
			return nil, fmt.Errorf("decompress: found %d bytes, expected %d", got, n)
		}
		return dst[:len(dst)+n], nil
	}
	return nil, fmt.Errorf("found codec %d, expected 0 or 1", c)
}

var errZstdFrame = errors.New("expected one zstd frame")

// checkZstdFrame refuses what is not exactly one frame of RFC 8878, by walking over its blocks. Libraries read more than
// that: several frames, frames to be skipped, and libzstd also formats from before the RFC, whose decoders nobody has
// looked at for years and which a stranger who can write to a repository without encryption could otherwise reach.
func checkZstdFrame(b []byte) error {
	const (
		magic                      = 0xfd2fb528
		singleSegment, hasChecksum = 1 << 5, 1 << 2
		blockHeader                = 3
		rleBlock, reservedBlock    = 1, 3
	)
	if len(b) < 5 || binary.LittleEndian.Uint32(b) != magic {
		return errZstdFrame
	}
	descriptor := b[4]
	header := 5 + [...]int{0, 1, 2, 4}[descriptor&3] + [...]int{0, 2, 4, 8}[descriptor>>6]
	switch {
	case descriptor&singleSegment == 0:
		header++ // the window's size
	case descriptor>>6 == 0:
		header++ // the content's size takes a byte
	}
	for at := header; at+blockHeader <= len(b); {
		block := uint32(b[at]) | uint32(b[at+1])<<8 | uint32(b[at+2])<<16
		last, kind, size := block&1 == 1, block>>1&3, int(block>>3)
		switch kind {
		case rleBlock:
			size = 1
		case reservedBlock:
			return errZstdFrame
		}
		at += blockHeader + size
		if !last {
			continue
		}
		if descriptor&hasChecksum != 0 {
			at += 4
		}
		if at != len(b) {
			break
		}
		return nil
	}
	return errZstdFrame
}
