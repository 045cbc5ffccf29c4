package repository

import (
	"fmt"

	"github.com/klauspost/compress/zstd"
)

// codec says how a frame's payload is compressed. Stored in frame headers: never renumber.
type codec uint8

const (
	codecRaw  codec = 0
	codecZstd codec = 1 // one zstd frame (RFC 8878) without checksum: the tag covers it
)

// This file is the one place that compresses.

var (
	zstdEncoder = mustEncoder()
	zstdDecoder = mustDecoder()
)

func mustEncoder() *zstd.Encoder {
	// The fastest level: compression is three quarters of what an image costs the guest's CPU, and the next level halves
	// the speed for a few per cent of size.
	e, err := zstd.NewWriter(nil, zstd.WithEncoderLevel(zstd.SpeedFastest), zstd.WithEncoderCRC(false))
	if err != nil {
		panic("repository: internal error: zstd encoder: " + err.Error())
	}
	return e
}

func mustDecoder() *zstd.Decoder {
	// A frame says how long its content is; the destination is made that long, and nothing longer is accepted.
	d, err := zstd.NewReader(nil, zstd.WithDecoderConcurrency(0), zstd.WithDecodeAllCapLimit(true), zstd.WithDecoderMaxMemory(maxMapRaw))
	if err != nil {
		panic("repository: internal error: zstd decoder: " + err.Error())
	}
	return d
}

// compress appends raw's compressed form to dst, or says codecRaw and appends nothing where that saves less than 1/32:
// a restore then saves the decompression.
func compress(dst, raw []byte) ([]byte, codec) {
	out := zstdEncoder.EncodeAll(raw, dst)
	if n := len(out) - len(dst); n >= len(raw)-len(raw)/32 {
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
		out, err := zstdDecoder.DecodeAll(payload, dst[:len(dst):len(dst)+n])
		if err != nil {
			return nil, fmt.Errorf("decompress: %w", err)
		}
		if len(out)-len(dst) != n {
			return nil, fmt.Errorf("decompress: found %d bytes, expected %d", len(out)-len(dst), n)
		}
		return out, nil
	}
	return nil, fmt.Errorf("found codec %d, expected 0 or 1", c)
}
