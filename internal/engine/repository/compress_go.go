package repository

import "github.com/klauspost/compress/zstd"

// goZstd is zstd in Go.
type goZstd struct {
	encoder *zstd.Encoder
	decoder *zstd.Decoder
}

func newGoZstd() *goZstd {
	// The fastest level, for both efforts: compression is three quarters of what an image costs the guest's CPU, and the
	// next level halves the speed for a few per cent of size. There is none that would be a hasty one.
	e, err := zstd.NewWriter(nil, zstd.WithEncoderLevel(zstd.SpeedFastest), zstd.WithEncoderCRC(false))
	if err != nil {
		panic("repository: internal error: zstd encoder: " + err.Error())
	}
	// A frame says how long its content is; the destination is made that long, and nothing longer is accepted.
	d, err := zstd.NewReader(nil, zstd.WithDecoderConcurrency(0), zstd.WithDecodeAllCapLimit(true), zstd.WithDecoderMaxMemory(maxMapRaw))
	if err != nil {
		panic("repository: internal error: zstd decoder: " + err.Error())
	}
	return &goZstd{encoder: e, decoder: d}
}

func (z *goZstd) compress(dst, raw []byte, _ Effort) ([]byte, error) {
	return z.encoder.EncodeAll(raw, dst), nil
}

func (z *goZstd) decompress(dst, frame []byte) (int, error) {
	out, err := z.decoder.DecodeAll(frame, dst[:0])
	return len(out), err
}
