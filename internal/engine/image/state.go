package image

import (
	"bufio"
	"bytes"
	"crypto/rand"
	"crypto/subtle"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/zeebo/blake3"
	"golang.org/x/sys/unix"

	"github.com/pgark/terraform-provider-pgark/internal/engine/postgres"
	"github.com/pgark/terraform-provider-pgark/internal/engine/repository"
)

// The local state of one image: what the next image must know of it and may not be able to read from the repository,
// because a guest can write encrypted images without being able to read them. It can be lost at any time: then the
// next image is full. Its layout (integers little endian):
//
//	magic       16  "pgark state 0001"
//	identity    16  random; binds every record to this file
//	records         until the end record:
//	    length   4  of the payload
//	    kind     1  1 header (the first), 2 file, 3 end (the last; its payload is the number of file records, 8 bytes)
//	    payload
//	    sum     16  BLAKE3 of identity, the record's offset (8), length, kind and payload, cut to 128 bits
//
// The sum covers the offset and the file's identity, so a block that a crash left over from another file, or from
// another place, is never taken for a record. A file without its end record was never finished and is not used.
const stateMagic = "pgark state 0001"

const (
	stateHeaderRecord = 1
	stateFileRecord   = 2
	stateEndRecord    = 3

	stateRecordOverhead = 4 + 1 + 16

	// maxStateRecord bounds what a damaged length can make us allocate. A file of 1 TiB that is no relation has
	// 4 Mi blocks of 256 KiB: 64 MiB of hashes, and a map of about the same size.
	maxStateRecord = 1 << 29

	hashSize = 16
)

// stateHeader is the header record, in JSON.
type stateHeader struct {
	Series  string         `json:"series"`
	SID     repository.SID `json:"sid"`
	HashKey []byte         `json:"hash_key"` // 32 bytes; the parent's, so that hashes of unread files stay comparable

	// What decides whether the next image may trust stat.
	Start           time.Time         `json:"start"` // the guest's clock before the backup began
	SystemID        postgres.SystemID `json:"system_identifier"`
	PostgresVersion int               `json:"postgres_version"`
	Timeline        postgres.Timeline `json:"timeline"`
	StartLSN        postgres.LSN      `json:"start_lsn"`
	DataChecksums   uint32            `json:"data_checksum_version"`
	DataDirectory   string            `json:"data_directory"`
}

// fileIdentity is what stat tells of a file that was not touched since.
type fileIdentity struct {
	DeviceMajor, DeviceMinor uint32
	Inode                    uint64
	Birth                    int64 // Unix nanoseconds; 0 where the file system does not know it
	Size                     int64
	Modified, Changed        int64 // mtime and ctime, Unix nanoseconds
}

// fileState is a file's record.
type fileState struct {
	Volume    string // volumeKey
	Path      string
	Identity  fileIdentity // before the file was read
	Size      int64        // bytes that were read; smaller than Identity.Size if the file shrank meanwhile
	BlockSize uint32
	Hashes    []byte // hashSize for each block

	// Corrupt and Excused list the pages whose checksum was wrong. An excused one bears an LSN of the backup itself: it
	// was being written, and WAL replay writes it again.
	Corrupt []uint32
	Excused []uint32

	Map        *repository.SegmentMap // nil: the file is empty
	MapRef     *repository.FrameRef   // where the map is stored, unless the manifest holds it
	MapObjects []repository.ObjectRef // what the stored map refers to
}

var errStateRecord = errors.New("damaged record")

func appendBytes(b, v []byte) []byte {
	b = binary.AppendUvarint(b, uint64(len(v)))
	return append(b, v...)
}

func appendBlocks(b []byte, v []uint32) []byte {
	b = binary.AppendUvarint(b, uint64(len(v)))
	for _, n := range v {
		b = binary.AppendUvarint(b, uint64(n))
	}
	return b
}

// fieldReader takes fields off a payload; after the first that does not fit, all are zero and bad is set.
type fieldReader struct {
	b   []byte
	bad bool
}

func (r *fieldReader) uint() uint64 {
	v, n := binary.Uvarint(r.b)
	if n <= 0 {
		r.bad, r.b = true, nil
		return 0
	}
	r.b = r.b[n:]
	return v
}

func (r *fieldReader) int() int64 {
	v, n := binary.Varint(r.b)
	if n <= 0 {
		r.bad, r.b = true, nil
		return 0
	}
	r.b = r.b[n:]
	return v
}

// count reads how many items follow that take at least one byte each.
func (r *fieldReader) count() int {
	n := r.uint()
	if n > uint64(len(r.b)) {
		r.bad, r.b = true, nil
		return 0
	}
	return int(n)
}

func (r *fieldReader) bytes() []byte {
	n := r.count()
	v := r.b[:n:n]
	r.b = r.b[n:]
	return v
}

func (r *fieldReader) blocks() []uint32 {
	n := r.count()
	if n == 0 {
		return nil
	}
	v := make([]uint32, n)
	for i := range v {
		v[i] = uint32(r.uint())
	}
	return v
}

func (r *fieldReader) frame() *repository.FrameRef {
	return &repository.FrameRef{
		Object: r.object(), Frame: uint32(r.uint()), Offset: uint32(r.uint()), Stored: uint32(r.uint()), Raw: uint32(r.uint()),
	}
}

func (r *fieldReader) object() repository.ObjectRef {
	return repository.ObjectRef{SID: repository.SID(r.uint()), Kind: repository.ObjectKind(r.uint()), N: uint32(r.uint())}
}

func appendObject(b []byte, o repository.ObjectRef) []byte {
	b = binary.AppendUvarint(b, uint64(o.SID))
	b = binary.AppendUvarint(b, uint64(o.Kind))
	return binary.AppendUvarint(b, uint64(o.N))
}

// marshal encodes the record. Volume and path come first: the index needs nothing else.
func (f *fileState) marshal() ([]byte, error) {
	b := make([]byte, 0, len(f.Hashes)+len(f.Path)+256)
	b = appendBytes(b, []byte(f.Volume))
	b = appendBytes(b, []byte(f.Path))
	id := &f.Identity
	b = binary.AppendUvarint(b, uint64(id.DeviceMajor))
	b = binary.AppendUvarint(b, uint64(id.DeviceMinor))
	b = binary.AppendUvarint(b, id.Inode)
	for _, v := range []int64{id.Birth, id.Size, id.Modified, id.Changed, f.Size} {
		b = binary.AppendVarint(b, v)
	}
	b = binary.AppendUvarint(b, uint64(f.BlockSize))
	b = appendBytes(b, f.Hashes)
	b = appendBlocks(b, f.Corrupt)
	b = appendBlocks(b, f.Excused)
	if f.Map == nil {
		return append(b, 0), nil
	}
	m, err := f.Map.MarshalBinary()
	if err != nil {
		return nil, fmt.Errorf("map: %w", err)
	}
	if f.MapRef == nil {
		return appendBytes(append(b, 1), m), nil
	}
	b = appendBytes(append(b, 2), m)
	b = appendObject(b, f.MapRef.Object)
	for _, v := range []uint32{f.MapRef.Frame, f.MapRef.Offset, f.MapRef.Stored, f.MapRef.Raw} {
		b = binary.AppendUvarint(b, uint64(v))
	}
	b = binary.AppendUvarint(b, uint64(len(f.MapObjects)))
	for _, o := range f.MapObjects {
		b = appendObject(b, o)
	}
	return b, nil
}

// unmarshal decodes a record and checks that its parts fit together. It keeps parts of b.
func (f *fileState) unmarshal(b []byte) error {
	r := &fieldReader{b: b}
	*f = fileState{Volume: string(r.bytes()), Path: string(r.bytes())}
	f.Identity.DeviceMajor, f.Identity.DeviceMinor, f.Identity.Inode = uint32(r.uint()), uint32(r.uint()), r.uint()
	for _, v := range []*int64{&f.Identity.Birth, &f.Identity.Size, &f.Identity.Modified, &f.Identity.Changed, &f.Size} {
		*v = r.int()
	}
	f.BlockSize = uint32(r.uint())
	f.Hashes = r.bytes()
	f.Corrupt, f.Excused = r.blocks(), r.blocks()
	form := r.uint()
	if form > 2 {
		return errStateRecord
	}
	if form != 0 {
		f.Map = new(repository.SegmentMap)
		if err := f.Map.UnmarshalBinary(r.bytes()); err != nil {
			return fmt.Errorf("map of %s: %w", f.Path, err)
		}
	}
	if form == 2 {
		f.MapRef = r.frame()
		f.MapObjects = make([]repository.ObjectRef, r.count())
		for i := range f.MapObjects {
			f.MapObjects[i] = r.object()
		}
	}
	switch {
	case r.bad || len(r.b) != 0, f.BlockSize != relationBlock && f.BlockSize != plainBlock, f.Size < 0:
		return errStateRecord
	case int64(len(f.Hashes)) != hashSize*((f.Size+int64(f.BlockSize)-1)/int64(f.BlockSize)):
		return errStateRecord
	case f.Map == nil && f.Size != 0:
		return errStateRecord
	case f.Map != nil && (f.Map.BlockSize != f.BlockSize || int64(f.Map.Blocks)*hashSize != int64(len(f.Hashes))):
		return errStateRecord
	}
	return nil
}

// stateSum is the sum of the record at an offset of the file with this identity.
func stateSum(identity []byte, offset int64, head, payload []byte) (sum [hashSize]byte) {
	h := blake3.New()
	_, _ = h.Write(identity) // a hash never fails
	_, _ = h.Write(binary.LittleEndian.AppendUint64(nil, uint64(offset)))
	_, _ = h.Write(head)
	_, _ = h.Write(payload)
	_, _ = h.Digest().Read(sum[:])
	return sum
}

// ---- writing --------------------------------------------------------------------------------------------------------

const stateDirectory = "parent"

func stateName(directory string, sid repository.SID) string {
	return filepath.Join(directory, stateDirectory, sid.String()+".state")
}

// makeStateDirectory makes the directory of the states of images.
func makeStateDirectory(directory string) error {
	name := filepath.Join(directory, stateDirectory)
	if err := os.MkdirAll(name, 0o700); err != nil {
		return fmt.Errorf("create directory for the state of images: %w", err)
	}
	return giveTo(directory, name)
}

// giveTo makes name, which root has created, belong to whom directory belongs to: an image that an administrator takes
// by hand must not lock the runner out.
func giveTo(directory, name string) error {
	if os.Geteuid() != 0 {
		return nil
	}
	var st unix.Stat_t
	err := unix.Stat(directory, &st)
	if err == nil {
		err = os.Lchown(name, int(st.Uid), int(st.Gid))
	}
	if err != nil {
		return fmt.Errorf("give %s to the owner of %s: %w", name, directory, err)
	}
	return nil
}

// stateWriter writes an image's state while the image is being taken. Safe for concurrent use.
type stateWriter struct {
	mu       sync.Mutex // guards all below
	f        *os.File
	w        *bufio.Writer
	identity [16]byte
	offset   int64
	files    uint64
	err      error // sticky: a state with a hole must never be finished
}

func createState(directory string, h stateHeader) (*stateWriter, error) {
	if err := makeStateDirectory(directory); err != nil {
		return nil, err
	}
	name := stateName(directory, h.SID)
	// Left by an image of a repository that was since made anew: session numbers are never used twice in one.
	if err := os.Remove(name); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("create the image's state: %w", err)
	}
	f, err := os.OpenFile(name, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return nil, fmt.Errorf("create the image's state: %w", err)
	}
	if err := giveTo(directory, name); err != nil {
		return nil, errors.Join(err, f.Close())
	}
	s := &stateWriter{f: f, w: bufio.NewWriterSize(f, 256<<10), offset: int64(len(stateMagic)) + 16}
	_, _ = rand.Read(s.identity[:]) // never fails (crypto/rand)
	_, err = s.w.WriteString(stateMagic)
	if err == nil {
		_, err = s.w.Write(s.identity[:])
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("write the image's state: %w", err), f.Close())
	}
	b, err := json.Marshal(h)
	if err != nil {
		return nil, errors.Join(err, f.Close())
	}
	if err := s.record(stateHeaderRecord, b); err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return s, nil
}

func (s *stateWriter) record(kind byte, payload []byte) error {
	var head [5]byte
	if len(payload) > maxStateRecord {
		return fmt.Errorf("write the image's state: record of %d bytes, expected at most %d", len(payload), maxStateRecord)
	}
	binary.LittleEndian.PutUint32(head[:], uint32(len(payload)))
	head[4] = kind

	s.mu.Lock()
	defer s.mu.Unlock()
	if s.err != nil {
		return s.err
	}
	sum := stateSum(s.identity[:], s.offset, head[:], payload)
	for _, p := range [][]byte{head[:], payload, sum[:]} {
		if _, err := s.w.Write(p); err != nil {
			s.err = fmt.Errorf("write the image's state: %w", err)
			return s.err
		}
	}
	s.offset += int64(len(payload)) + stateRecordOverhead
	if kind == stateFileRecord {
		s.files++
	}
	return nil
}

// add writes the record of a file.
func (s *stateWriter) add(f *fileState) error {
	b, err := f.marshal()
	if err != nil {
		return fmt.Errorf("write the image's state: %s: %w", f.Path, err)
	}
	return s.record(stateFileRecord, b)
}

// addEncoded writes a record taken from the parent's state as it stands there.
func (s *stateWriter) addEncoded(payload []byte) error { return s.record(stateFileRecord, payload) }

// finish makes the state whole and durable, under its name.
func (s *stateWriter) finish() error {
	if err := s.record(stateEndRecord, binary.LittleEndian.AppendUint64(nil, s.files)); err != nil {
		return err
	}
	err := s.w.Flush()
	if err == nil {
		err = s.f.Sync()
	}
	if err = errors.Join(err, s.f.Close()); err == nil {
		err = syncDirectory(filepath.Dir(s.f.Name()))
	}
	if err != nil {
		return fmt.Errorf("make the image's state durable: %w", err)
	}
	return nil
}

// discard removes the state. Also after finish.
func (s *stateWriter) discard() error {
	_ = s.f.Close() // closed already, or about to be removed
	if err := os.Remove(s.f.Name()); err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("remove the image's state: %w", err)
	}
	return nil
}

func syncDirectory(name string) error {
	d, err := os.Open(name)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

// pruneStates removes the states of images that keep reports false for.
func pruneStates(directory string, keep func(repository.SID) bool) error {
	dir := filepath.Join(directory, stateDirectory)
	entries, err := os.ReadDir(dir)
	if err != nil {
		return err
	}
	var errs []error
	for _, e := range entries {
		name, ok := strings.CutSuffix(e.Name(), ".state")
		if !ok {
			continue
		}
		if sid, err := repository.ParseSID(name); err == nil && keep(sid) {
			continue
		}
		if err := os.Remove(filepath.Join(dir, e.Name())); err != nil && !errors.Is(err, os.ErrNotExist) {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

// ---- reading --------------------------------------------------------------------------------------------------------

// state is a finished and verified state. Memory holds the index only. Safe for concurrent use.
type state struct {
	f        *os.File
	identity [16]byte
	header   stateHeader
	index    map[fileKey]statePlace
}

// fileKey names a file independently of the order of volumes.
type fileKey struct{ volume, path string }

type statePlace struct {
	offset int64
	length uint32 // of the payload
}

// openState verifies every record of an image's state and indexes it. Any damage anywhere is an error.
func openState(directory string, series string, sid repository.SID) (*state, error) {
	f, err := os.Open(stateName(directory, sid))
	if err != nil {
		return nil, err
	}
	s := &state{f: f, index: make(map[fileKey]statePlace)}
	if err := s.load(series, sid); err != nil {
		return nil, errors.Join(fmt.Errorf("state %s: %w", f.Name(), err), f.Close())
	}
	return s, nil
}

func (s *state) load(series string, sid repository.SID) error {
	_ = unix.Fadvise(int(s.f.Fd()), 0, 0, unix.FADV_SEQUENTIAL) // only advice
	r := bufio.NewReaderSize(s.f, 1<<20)
	head := make([]byte, len(stateMagic)+16)
	if _, err := io.ReadFull(r, head); err != nil {
		return fmt.Errorf("read: %w", err)
	}
	if string(head[:len(stateMagic)]) != stateMagic {
		return fmt.Errorf("found %q, expected %q at its start", head[:len(stateMagic)], stateMagic)
	}
	copy(s.identity[:], head[len(stateMagic):])
	offset := int64(len(head))
	var payload []byte
	for n := uint64(0); ; n++ {
		kind, p, err := readStateRecord(r, s.identity[:], offset, payload)
		if err != nil {
			return fmt.Errorf("record at %d: %w", offset, err)
		}
		payload = p
		switch {
		case n == 0 && kind == stateHeaderRecord:
			if err := json.Unmarshal(p, &s.header); err != nil {
				return fmt.Errorf("header: %w", err)
			}
			if s.header.Series != series || s.header.SID != sid || len(s.header.HashKey) != 32 {
				return fmt.Errorf("it belongs to image %s of %s, expected image %s of %s", s.header.SID, s.header.Series, sid, series)
			}
		case n > 0 && kind == stateFileRecord:
			fields := &fieldReader{b: p}
			key := fileKey{string(fields.bytes()), string(fields.bytes())}
			if _, twice := s.index[key]; twice || fields.bad {
				return fmt.Errorf("record at %d: %w", offset, errStateRecord)
			}
			s.index[key] = statePlace{offset, uint32(len(p))}
		case n > 0 && kind == stateEndRecord:
			if len(p) != 8 || binary.LittleEndian.Uint64(p) != n-1 {
				return fmt.Errorf("record at %d: %w", offset, errStateRecord)
			}
			return nil
		default:
			return fmt.Errorf("record at %d: kind %d is out of place", offset, kind)
		}
		offset += int64(len(p)) + stateRecordOverhead
	}
}

// readStateRecord reads the record at offset, into buf where that is large enough.
func readStateRecord(r io.Reader, identity []byte, offset int64, buf []byte) (kind byte, payload []byte, err error) {
	var head [5]byte
	if _, err := io.ReadFull(r, head[:]); err != nil {
		return 0, nil, err
	}
	n := binary.LittleEndian.Uint32(head[:])
	if n > maxStateRecord {
		return 0, nil, errStateRecord
	}
	// Grown as bytes come, so that a damaged length costs no memory that the file does not have.
	b := bytes.NewBuffer(buf[:0])
	if _, err := io.CopyN(b, r, int64(n)); err != nil {
		return 0, nil, err
	}
	var sum [hashSize]byte
	if _, err := io.ReadFull(r, sum[:]); err != nil {
		return 0, nil, err
	}
	want := stateSum(identity, offset, head[:], b.Bytes())
	if subtle.ConstantTimeCompare(sum[:], want[:]) != 1 {
		return 0, nil, errStateRecord
	}
	return head[4], b.Bytes(), nil
}

// lookup reads a file's record, verified once more; nil if the image did not have the file. encoded is for addEncoded.
func (s *state) lookup(volume, path string) (f *fileState, encoded []byte, err error) {
	place, ok := s.index[fileKey{volume, path}]
	if !ok {
		return nil, nil, nil
	}
	r := io.NewSectionReader(s.f, place.offset, int64(place.length)+stateRecordOverhead)
	kind, payload, err := readStateRecord(r, s.identity[:], place.offset, make([]byte, 0, int(place.length)+bytes.MinRead))
	if err == nil && kind != stateFileRecord {
		err = errStateRecord
	}
	if err != nil {
		return nil, nil, fmt.Errorf("state %s: record at %d: %w", s.f.Name(), place.offset, err)
	}
	f = new(fileState)
	if err := f.unmarshal(payload); err != nil {
		return nil, nil, fmt.Errorf("state %s: record at %d: %w", s.f.Name(), place.offset, err)
	}
	return f, payload, nil
}

func (s *state) close() error { return s.f.Close() }
