package repository

import (
	"context"
	"io"
)

// Effort is how hard WAL is compressed.
type Effort int

// The efforts. What they make differs in size and CPU only: every reader reads both.
const (
	// Thorough is for WAL that arrives as fast as it is written.
	Thorough Effort = iota
	// Hasty is for a backlog: a third of the CPU, up to twice the bytes.
	Hasty
)

// SealedWAL is a WAL file compressed, sealed and ready to be stored, now or after an outage. It holds nothing that the
// repository's recipients alone could not read.
type SealedWAL struct {
	Info WALInfo
	Key  string // of the object
	Body []byte // the whole object
}

// SealWAL makes the object of a WAL file without storing it. info is as for PutWAL.
func (s *Series) SealWAL(ctx context.Context, info WALInfo, raw io.ReaderAt, effort Effort) (*SealedWAL, error) {
	return nil, errNotBuilt
}

// PutSealed stores a sealed file durably. The same content again is success (stored false), other content is
// *WALConflictError.
func (s *Series) PutSealed(ctx context.Context, w *SealedWAL) (stored bool, storedSize int64, err error) {
	return false, 0, errNotBuilt
}

// ReadSealed checks an object that SealWAL made for this series and that lay on a disk since: its header, key and frames'
// lengths. name is the WAL file's.
func (s *Series) ReadSealed(name string, body []byte) (*SealedWAL, error) {
	return nil, errNotBuilt
}
