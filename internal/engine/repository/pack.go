package repository

import (
	"encoding/binary"
	"sync"

	"github.com/zeebo/blake3"
)

// pack is a pack or map object in the making: a container whose frames are addressed by offset, closed by a directory
// and a trailer, so that it can be verified, and its maps rebuilt, from itself alone.
type pack struct {
	ref     ObjectRef
	key     string
	cipher  *objectCipher
	salt    [saltSize]byte
	limit   int // bytes
	buf     []byte
	entries []frameEntry
	sealing sync.WaitGroup // frames that are reserved and not yet sealed
}

// frameEntry is one line of the directory.
type frameEntry struct {
	offset, stored, raw uint32 // stored: header and tag included
}

// newPack begins an object in buf, which is kept and grown only where limit needs it.
func newPack(ref ObjectRef, key string, session *sessionKey, salt [saltSize]byte, limit int, buf []byte) (*pack, error) {
	kind := ref.Kind.container()
	c, err := session.cipherFor(key, kind, salt, nil)
	if err != nil {
		return nil, err
	}
	h := containerHeader{kind: kind, suite: session.suite, salt: salt, blob: session.blob}
	return &pack{ref: ref, key: key, cipher: c, salt: salt, limit: limit, buf: h.append(buf[:0], key)}, nil
}

// fits tells whether a frame of n bytes, overhead included, can be added and the object still be closed within limit.
func (p *pack) fits(n int) bool {
	closing := frameOverhead + directoryEntry*(len(p.entries)+1) + trailerSize
	return len(p.entries) < maxFramesInObject && len(p.buf)+n+closing <= p.limit
}

// reserve takes room for a frame. The caller fills and seals the returned bytes, then calls p.sealing.Done. Reserving
// needs the writer's lock; sealing does not.
func (p *pack) reserve(stored, raw int) (number uint32, frame []byte) {
	number = uint32(len(p.entries))
	offset := len(p.buf)
	p.entries = append(p.entries, frameEntry{offset: uint32(offset), stored: uint32(stored), raw: uint32(raw)})
	if offset+stored > cap(p.buf) {
		// Others still seal into the old array: wait for them before it is copied.
		p.sealing.Wait()
		p.buf = append(make([]byte, 0, offset+stored), p.buf...)
	}
	p.buf = p.buf[:offset+stored]
	p.sealing.Add(1)
	return number, p.buf[offset : offset+stored : offset+stored]
}

// finish waits for the seals, and writes directory and trailer.
func (p *pack) finish() {
	p.sealing.Wait()
	directory := make([]byte, 0, directoryEntry*len(p.entries))
	for _, e := range p.entries {
		directory = binary.BigEndian.AppendUint32(directory, e.offset)
		directory = binary.BigEndian.AppendUint32(directory, e.stored)
		directory = binary.BigEndian.AppendUint32(directory, e.raw)
	}
	start := len(p.buf)
	p.buf = appendFrame(p.buf, directory, flagLast|flagDirectory, uint32(len(p.entries)), Thorough)
	p.cipher.seal(uint32(len(p.entries)), p.buf[start:])
	end := len(p.buf)
	p.buf = binary.BigEndian.AppendUint32(p.buf, uint32(start))
	p.buf = binary.BigEndian.AppendUint32(p.buf, uint32(end-start))
	p.buf = append(p.buf, trailerMagic...)
}

// digest is the whole object's, as it stands in refs.
func (p *pack) digest() [32]byte { return blake3.Sum256(p.buf) }
