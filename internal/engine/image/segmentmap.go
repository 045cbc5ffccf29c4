package image

import (
	"fmt"
	"hash/fnv"

	"github.com/pgark/terraform-provider-pgark/internal/engine/repository"
)

const (
	// relationBlock and plainBlock are the units that are hashed and compared: a page of a relation, and what other
	// files are cut into (DESIGN §6; part of the repository format through SegmentMap.BlockSize).
	relationBlock = 8192
	plainBlock    = 256 << 10

	// framePages is how many pages a frame holds at most: 256 KiB, the knee of the compression curve.
	framePages = 32

	// inlineFrames is the largest map kept in the manifest itself; a larger one is an object of its own, which an
	// image in which the file is unchanged shares.
	inlineFrames = 64
)

// mapBuilder makes the map of a file's new state, block by block in ascending order: a block is either kept, where the
// parent's map has it, or stored in a frame of this image.
type mapBuilder struct {
	parent *repository.SegmentMap // nil: nothing can be kept
	cursor int                    // the parent's run that holds the next kept block, or an earlier one
	kept   []uint32               // the parent's frame index → index in out.Frames, plus 1; 0: not referred to yet
	out    repository.SegmentMap
}

func newMapBuilder(parent *repository.SegmentMap, blockSize uint32) *mapBuilder {
	b := &mapBuilder{parent: parent, out: repository.SegmentMap{BlockSize: blockSize}}
	if parent != nil {
		b.kept = make([]uint32, len(parent.Frames))
	}
	return b
}

// keep takes the next block from where the parent's map has it.
func (b *mapBuilder) keep() error {
	block := b.out.Blocks
	for b.cursor < len(b.parent.Runs) {
		r := &b.parent.Runs[b.cursor]
		if block >= r.Start+r.Count {
			b.cursor++
			continue
		}
		if block < r.Start || int(r.Frame) >= len(b.kept) {
			break
		}
		i := b.kept[r.Frame]
		if i == 0 {
			b.out.Frames = append(b.out.Frames, b.parent.Frames[r.Frame])
			i = uint32(len(b.out.Frames))
			b.kept[r.Frame] = i
		}
		b.add(i-1, r.First+uint16(block-r.Start))
		return nil
	}
	return fmt.Errorf("block %d is not in the parent's map", block)
}

// reserveFrame gives the index of a frame that setFrame describes once it is written.
func (b *mapBuilder) reserveFrame() uint32 {
	b.out.Frames = append(b.out.Frames, repository.FrameRef{})
	return uint32(len(b.out.Frames) - 1)
}

func (b *mapBuilder) setFrame(i uint32, ref repository.FrameRef) { b.out.Frames[i] = ref }

// store says that the next block is block first of the reserved frame.
func (b *mapBuilder) store(frame uint32, first uint16) { b.add(frame, first) }

func (b *mapBuilder) add(frame uint32, first uint16) {
	block := b.out.Blocks
	b.out.Blocks++
	if n := len(b.out.Runs); n > 0 {
		r := &b.out.Runs[n-1]
		if r.Frame == frame && uint32(r.First)+r.Count == uint32(first) {
			r.Count++
			return
		}
	}
	b.out.Runs = append(b.out.Runs, repository.Run{Start: block, Count: 1, Frame: frame, First: first})
}

// Limits beyond which a file is written afresh instead of being patched once more.
const (
	// maxImages bounds the images whose packs one file's blocks lie in. Each contributes its own ranged reads to a
	// restore, and keeps packs alive for a few blocks.
	maxImages = 64
	// maxImagesSpread lowers the bound per file, so that files which change in every image are not all rewritten by
	// the same one.
	maxImagesSpread = 16
	// maxAmplification bounds what a restore must decompress for a file, as a multiple of its size.
	maxAmplification = 3
	// amplificationSlack lets small files be patched whatever the ratio.
	amplificationSlack = 1 << 20
)

// scattered reports whether a map refers to so many images, so many dead blocks or so many short runs that the file
// should be written afresh. more counts images that are going to be added to it.
func scattered(m *repository.SegmentMap, path string, more int) bool {
	var raw int64
	images := make(map[repository.SID]struct{})
	for i := range m.Frames {
		images[m.Frames[i].Object.SID] = struct{}{}
		raw += int64(m.Frames[i].Raw)
	}
	h := fnv.New32a()
	_, _ = h.Write([]byte(path)) // a hash never fails
	if len(images)+more > maxImages-int(h.Sum32()%maxImagesSpread) {
		return true
	}
	size := int64(m.Blocks) * int64(m.BlockSize)
	if raw > maxAmplification*size+amplificationSlack {
		return true
	}
	return len(m.Runs) > 1024 && len(m.Runs) > int(m.Blocks)/4*3
}
