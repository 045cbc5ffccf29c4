package repository

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
)

// This file reads packs and map objects by their directory alone, as one would to rebuild what refs and manifests say.
// Nothing else needs that: restores find frames by their maps.

// packDirectory reads the directory of a whole pack or map object and checks that its frames fill the object without
// gap. Reading all frames by it verifies every byte of the object.
func (r *Repository) packDirectory(key string, kind ObjectKind, object []byte) (*objectCipher, []frameEntry, error) {
	h, err := readHeader(bytes.NewReader(object), key, kind.container())
	if err != nil {
		return nil, nil, r.contentError(key, err)
	}
	session, err := r.unwrap(key, h.suite, h.blob)
	if err != nil {
		return nil, nil, err
	}
	c, err := session.cipherFor(key, kind.container(), h.salt, h.meta)
	if err != nil {
		return nil, nil, err
	}
	entries, err := parseDirectory(c, kind.container(), h.size(), object)
	return c, entries, r.contentError(key, err)
}

func parseDirectory(c *objectCipher, kind containerKind, headerSize int, object []byte) ([]frameEntry, error) {
	if len(object) < headerSize+frameOverhead+trailerSize {
		return nil, errors.New("trailer: cut short")
	}
	end := len(object) - trailerSize
	trailer := object[end:]
	if string(trailer[8:]) != trailerMagic {
		return nil, fmt.Errorf("found %q at its end, expected %q", trailer[8:], trailerMagic)
	}
	start, n := int64(binary.BigEndian.Uint32(trailer)), int64(binary.BigEndian.Uint32(trailer[4:]))
	if start < int64(headerSize) || start+n != int64(end) || n < frameOverhead {
		return nil, fmt.Errorf("trailer: found a directory at %d of %d bytes, expected it to end at %d", start, n, end)
	}
	frame := object[start:end]
	h, err := parseFrameHeader(frame, kind)
	if err != nil {
		return nil, fmt.Errorf("directory: %w", err)
	}
	if h.flags != flagLast|flagDirectory || h.raw%directoryEntry != 0 || h.items != h.raw/directoryEntry {
		return nil, fmt.Errorf("directory: found flags %d, %d items in %d bytes", h.flags, h.items, h.raw)
	}
	var scratch []byte
	raw, _, err := openFrame(c, kind, h.items, frame, nil, &scratch)
	if err != nil {
		return nil, fmt.Errorf("directory: %w", err)
	}
	entries := make([]frameEntry, h.items)
	at := uint32(headerSize)
	for i := range entries {
		b := raw[directoryEntry*i:]
		e := frameEntry{offset: binary.BigEndian.Uint32(b), stored: binary.BigEndian.Uint32(b[4:]), raw: binary.BigEndian.Uint32(b[8:])}
		if e.offset != at || e.stored < frameOverhead || int64(at)+int64(e.stored) > start {
			return nil, fmt.Errorf("directory: found frame %d at %d of %d bytes, expected it at %d", i, e.offset, e.stored, at)
		}
		at += e.stored
		entries[i] = e
	}
	if int64(at) != start {
		return nil, fmt.Errorf("directory: found its frames to end at %d, expected %d", at, start)
	}
	return entries, nil
}
