package repository

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math"
	"slices"
)

// FrameRef says where a frame lies.
type FrameRef struct {
	Object ObjectRef `json:"o"`
	Frame  uint32    `json:"f"` // number within the object, from 0
	Offset uint32    `json:"a"` // of the frame within the object
	Stored uint32    `json:"n"` // bytes of the frame, its header and tag included
	Raw    uint32    `json:"r"` // bytes after decompression
}

// Run maps Count consecutive blocks of a file, from Start, to blocks First.. of one frame.
type Run struct {
	Start, Count uint32
	Frame        uint32 // index into SegmentMap.Frames
	First        uint16 // block within the frame
}

// SegmentMap locates every block of one file (a relation's 1 GiB segment, or any other file).
type SegmentMap struct {
	BlockSize uint32 // 8192 for relation files, 262144 for others
	Blocks    uint32 // the last one may be short; it is stored short only for BlockSize 262144, else zero-padded
	Frames    []FrameRef
	Runs      []Run // ascending, without gap or overlap: together they cover every block
}

// Objects lists the packs that the map refers to, each once, in order.
func (m *SegmentMap) Objects() []ObjectRef {
	seen := make(map[ObjectRef]struct{})
	var out []ObjectRef
	for i := range m.Frames {
		o := m.Frames[i].Object
		if i > 0 && o == m.Frames[i-1].Object {
			continue
		}
		if _, ok := seen[o]; !ok {
			seen[o] = struct{}{}
			out = append(out, o)
		}
	}
	slices.SortFunc(out, compareObjects)
	return out
}

// mapVersion begins every encoded map. Part of the format.
const mapVersion = 1

// check refuses a map that a reader could not follow. The encoder runs it too: better no image than one that cannot be
// restored.
func (m *SegmentMap) check() error {
	if m.BlockSize == 0 || m.BlockSize > MaxFrame {
		return fmt.Errorf("segment map: found block size %d, expected 1 to %d", m.BlockSize, MaxFrame)
	}
	for i := range m.Frames {
		f := &m.Frames[i]
		switch {
		case f.Object.Kind != PackObject || f.Object.SID == 0:
			return fmt.Errorf("segment map: frame %d: found object %s, expected a pack", i, f.Object)
		case f.Raw == 0 || f.Raw > MaxFrame || f.Stored <= frameOverhead || f.Stored > f.Raw+frameOverhead:
			return fmt.Errorf("segment map: frame %d: found lengths %d and %d, expected at most %d", i, f.Stored, f.Raw, MaxFrame)
		case f.Frame >= maxFramesInObject || uint64(f.Offset)+uint64(f.Stored) > MaxPackSize:
			return fmt.Errorf("segment map: frame %d: found frame %d at %d of %d bytes, expected it within a pack", i, f.Frame, f.Offset, f.Stored)
		}
	}
	var next uint32
	for i := range m.Runs {
		r := &m.Runs[i]
		switch {
		case r.Start != next || r.Count == 0 || r.Count > m.Blocks-next:
			return fmt.Errorf("segment map: run %d: found blocks %d+%d, expected them from %d up to %d", i, r.Start, r.Count, next, m.Blocks)
		case int64(r.Frame) >= int64(len(m.Frames)):
			return fmt.Errorf("segment map: run %d: found frame %d, expected at most %d", i, r.Frame, len(m.Frames)-1)
		}
		// The last block of a frame may be short, so it counts if any byte of it is there.
		if last := uint64(r.First) + uint64(r.Count) - 1; last*uint64(m.BlockSize) >= uint64(m.Frames[r.Frame].Raw) {
			return fmt.Errorf("segment map: run %d: found blocks %d+%d of a frame of %d bytes", i, r.First, r.Count, m.Frames[r.Frame].Raw)
		}
		next += r.Count
	}
	if next != m.Blocks {
		return fmt.Errorf("segment map: found runs for %d blocks, expected %d", next, m.Blocks)
	}
	return nil
}

// MarshalBinary encodes the map as it stands in map objects: the form in which a guest may keep its parent's maps. It
// is integrity-checked by whatever it is stored in, not by itself.
func (m *SegmentMap) MarshalBinary() ([]byte, error) { return m.appendBinary(nil) }

func (m *SegmentMap) appendBinary(b []byte) ([]byte, error) {
	if err := m.check(); err != nil {
		return nil, err
	}
	b = append(b, mapVersion)
	b = binary.AppendUvarint(b, uint64(m.BlockSize))
	b = binary.AppendUvarint(b, uint64(m.Blocks))

	objects := m.Objects()
	index := make(map[ObjectRef]int, len(objects))
	b = binary.AppendUvarint(b, uint64(len(objects)))
	for i, o := range objects {
		index[o] = i
		b = binary.AppendUvarint(b, uint64(o.SID))
		b = binary.AppendUvarint(b, uint64(o.N))
	}

	b = binary.AppendUvarint(b, uint64(len(m.Frames)))
	next := make([]FrameRef, len(objects)) // where the following frame of each object would be
	last := 0
	for i := range m.Frames {
		f := &m.Frames[i]
		o := index[f.Object]
		n := &next[o]
		b = binary.AppendVarint(b, int64(o-last))
		b = binary.AppendVarint(b, int64(f.Frame)-int64(n.Frame))
		b = binary.AppendVarint(b, int64(f.Offset)-int64(n.Offset))
		b = binary.AppendUvarint(b, uint64(f.Stored))
		b = binary.AppendUvarint(b, uint64(f.Raw))
		last, n.Frame, n.Offset = o, f.Frame+1, f.Offset+f.Stored
	}

	b = binary.AppendUvarint(b, uint64(len(m.Runs)))
	frame := int64(0)
	for i := range m.Runs {
		r := &m.Runs[i]
		b = binary.AppendUvarint(b, uint64(r.Count))
		b = binary.AppendVarint(b, int64(r.Frame)-frame)
		b = binary.AppendUvarint(b, uint64(r.First))
		frame = int64(r.Frame)
	}
	return b, nil
}

// UnmarshalBinary reads and checks what MarshalBinary wrote.
func (m *SegmentMap) UnmarshalBinary(b []byte) error {
	d := varints{b: b}
	if v := d.unsigned(math.MaxUint64); v != mapVersion {
		return fmt.Errorf("segment map: found version %d, expected %d", v, mapVersion)
	}
	*m = SegmentMap{BlockSize: uint32(d.unsigned(MaxFrame)), Blocks: uint32(d.unsigned(math.MaxUint32))}

	// Each element takes a known least number of bytes, so a count can be refused before memory is taken by it.
	objects := make([]ObjectRef, d.count(2))
	for i := range objects {
		objects[i] = ObjectRef{SID: SID(d.unsigned(math.MaxUint64)), Kind: PackObject, N: uint32(d.unsigned(math.MaxUint32))}
	}
	next := make([]FrameRef, len(objects))
	if n := d.count(5); n > 0 {
		m.Frames = make([]FrameRef, n)
	}
	o := int64(0)
	for i := range m.Frames {
		o += d.signed()
		if d.failed || o < 0 || o >= int64(len(objects)) {
			return errMapDamaged
		}
		n := &next[o]
		f := FrameRef{Object: objects[o], Frame: d.delta(n.Frame), Offset: d.delta(n.Offset), Stored: uint32(d.unsigned(MaxFrame + frameOverhead)), Raw: uint32(d.unsigned(MaxFrame))}
		m.Frames[i] = f
		n.Frame, n.Offset = f.Frame+1, f.Offset+f.Stored
	}
	if n := d.count(3); n > 0 {
		m.Runs = make([]Run, n)
	}
	frame, start := uint32(0), uint32(0)
	for i := range m.Runs {
		count := uint32(d.unsigned(math.MaxUint32))
		frame = d.delta(frame)
		m.Runs[i] = Run{Start: start, Count: count, Frame: frame, First: uint16(d.unsigned(math.MaxUint16))}
		start += count
	}
	if d.failed || len(d.b) != 0 {
		return errMapDamaged
	}
	return m.check()
}

var errMapDamaged = errors.New("segment map: found what is no encoded map")

// varints reads a sequence of varints; after the first bad one it has failed and returns zeros.
type varints struct {
	b      []byte
	failed bool
}

func (d *varints) unsigned(limit uint64) uint64 {
	v, n := binary.Uvarint(d.b)
	if d.failed || n <= 0 || v > limit {
		d.failed, d.b = true, nil
		return 0
	}
	d.b = d.b[n:]
	return v
}

func (d *varints) signed() int64 {
	v, n := binary.Varint(d.b)
	if d.failed || n <= 0 {
		d.failed, d.b = true, nil
		return 0
	}
	d.b = d.b[n:]
	return v
}

// delta reads a difference to base.
func (d *varints) delta(base uint32) uint32 {
	delta := d.signed()
	v := int64(base) + delta
	if delta < -math.MaxUint32 || delta > math.MaxUint32 || v < 0 || v > math.MaxUint32 {
		d.failed, d.b = true, nil
		return 0
	}
	return uint32(v)
}

// count reads how many elements of at least size bytes follow.
func (d *varints) count(size int) int {
	return int(d.unsigned(uint64(len(d.b) / size)))
}
