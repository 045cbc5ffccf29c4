package postgres

import (
	"encoding/binary"
	"fmt"
)

// The page header, PageHeaderData in PostgreSQL's bufpage.h; offsets in bytes.
const (
	pageLSN      = 0 // two 32-bit halves, the high one first, whatever the machine's byte order
	pageChecksum = 8
	pageUpper    = 14
)

// PageLSN is the position of the last change of a page that was written to WAL (pd_lsn).
func PageLSN(page []byte) LSN {
	return LSN(uint64(binary.LittleEndian.Uint32(page[pageLSN:]))<<32 | uint64(binary.LittleEndian.Uint32(page[pageLSN+4:])))
}

// PageIsNew tells whether a page was added to its file and never filled: it has no checksum, and is all zero if it is
// in order (bufpage.h, PageIsNew).
func PageIsNew(page []byte) bool { return binary.LittleEndian.Uint16(page[pageUpper:]) == 0 }

// PageError is a page that its checksum contradicts.
type PageError struct {
	Block           uint32 // counted from the beginning of the relation, over all of its files
	LSN             LSN    // the page's own word, for what it is worth
	Found, Expected uint16 // the checksum of the page's bytes, and the one stored in it
	New             bool   // the page calls itself new but is not zero; Found and Expected mean nothing
}

// Error says which block it is and what is wrong.
func (e *PageError) Error() string {
	if e.New {
		return fmt.Sprintf("block %d: found bytes in a page that is marked as new, expected zeros", e.Block)
	}
	return fmt.Sprintf("block %d: found checksum %04x, expected %04x (page LSN %s)", e.Block, e.Found, e.Expected, e.LSN)
}

// VerifyPage checks a page of a cluster with page checksums. blkno counts from the beginning of the relation, over all of
// its files, because the checksum covers it: a page in the wrong place is found too. The error is a *PageError.
//
// A page that is being written while we read it can be half old, half new: read it again before you believe an error.
func VerifyPage(page []byte, blkno uint32) error {
	if PageIsNew(page) {
		if isZero(page) {
			return nil
		}
		return &PageError{Block: blkno, LSN: PageLSN(page), New: true}
	}
	expected := binary.LittleEndian.Uint16(page[pageChecksum:])
	if found := ChecksumPage(page, blkno); found != expected {
		return &PageError{Block: blkno, LSN: PageLSN(page), Found: found, Expected: expected}
	}
	return nil
}

// ValidPage is VerifyPage for who needs no reason.
func ValidPage(page []byte, blkno uint32) bool {
	if PageIsNew(page) {
		return isZero(page)
	}
	return ChecksumPage(page, blkno) == binary.LittleEndian.Uint16(page[pageChecksum:])
}

func isZero(b []byte) bool {
	for len(b) >= 32 {
		if binary.LittleEndian.Uint64(b)|binary.LittleEndian.Uint64(b[8:])|binary.LittleEndian.Uint64(b[16:])|binary.LittleEndian.Uint64(b[24:]) != 0 {
			return false
		}
		b = b[32:]
	}
	for _, c := range b {
		if c != 0 {
			return false
		}
	}
	return true
}

// checksumBase are the start values of the 32 sums that run in parallel (checksum_impl.h, checksumBaseOffsets).
var checksumBase = [32]uint32{
	0x5B1F36E9, 0xB8525960, 0x02AB50AA, 0x1DE66D2A, 0x79FF467A, 0x9BB9F8A3, 0x217E7CD2, 0x83E13D2C,
	0xF8D4474F, 0xE39EB970, 0x42C6AE16, 0x993216FA, 0x7B093B5D, 0x98DAFF3C, 0xF718902A, 0x0B1C9CDB,
	0xE58F764B, 0x187636BC, 0x5D7B3BB1, 0xE73DE7DE, 0x92BEC979, 0xCCA6C0B2, 0x304A0979, 0x85AA43D4,
	0x783125BB, 0x6CA8EAA2, 0xE407EAC6, 0x4B5CFC3E, 0x9FBF8C76, 0x15CA20BE, 0xF2CA9FD3, 0x959BD756,
}

const fnvPrime = 16777619

// ChecksumPage is PostgreSQL's checksum of a page of PageSize bytes (checksum_impl.h, pg_checksum_page): 32 interleaved
// sums of an FNV-1a variant, each over every 32nd word, folded with the block number into 16 bits that are never 0. The
// checksum stored in the page counts as zero.
func ChecksumPage(page []byte, blkno uint32) uint16 {
	p := (*[PageSize]byte)(page)
	// The words' order within a sum matters, the sums' order does not: eight at a time keep their state in registers.
	var result uint32
	for lane := 0; lane < 32; lane += 8 {
		base := (*[8]uint32)(checksumBase[lane:])
		s0, s1, s2, s3, s4, s5, s6, s7 := base[0], base[1], base[2], base[3], base[4], base[5], base[6], base[7]
		if lane == 0 {
			// Word 2 begins with the stored checksum. Mixing it in beforehand cancels it out.
			s2 ^= uint32(binary.LittleEndian.Uint16(p[pageChecksum:]))
		}
		for row := 4 * lane; row < PageSize; row += 128 {
			w := (*[32]byte)(p[row:])
			s0 ^= binary.LittleEndian.Uint32(w[0:])
			s1 ^= binary.LittleEndian.Uint32(w[4:])
			s2 ^= binary.LittleEndian.Uint32(w[8:])
			s3 ^= binary.LittleEndian.Uint32(w[12:])
			s4 ^= binary.LittleEndian.Uint32(w[16:])
			s5 ^= binary.LittleEndian.Uint32(w[20:])
			s6 ^= binary.LittleEndian.Uint32(w[24:])
			s7 ^= binary.LittleEndian.Uint32(w[28:])
			s0 = s0*fnvPrime ^ s0>>17
			s1 = s1*fnvPrime ^ s1>>17
			s2 = s2*fnvPrime ^ s2>>17
			s3 = s3*fnvPrime ^ s3>>17
			s4 = s4*fnvPrime ^ s4>>17
			s5 = s5*fnvPrime ^ s5>>17
			s6 = s6*fnvPrime ^ s6>>17
			s7 = s7*fnvPrime ^ s7>>17
		}
		for range 2 { // two more rounds, of zeros
			s0 = s0*fnvPrime ^ s0>>17
			s1 = s1*fnvPrime ^ s1>>17
			s2 = s2*fnvPrime ^ s2>>17
			s3 = s3*fnvPrime ^ s3>>17
			s4 = s4*fnvPrime ^ s4>>17
			s5 = s5*fnvPrime ^ s5>>17
			s6 = s6*fnvPrime ^ s6>>17
			s7 = s7*fnvPrime ^ s7>>17
		}
		result ^= s0 ^ s1 ^ s2 ^ s3 ^ s4 ^ s5 ^ s6 ^ s7
	}
	return uint16((result^blkno)%65535) + 1
}
