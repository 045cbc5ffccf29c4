// Package runnerdist carries the runner inside the provider: one binary for each architecture of guests, compressed, so
// that a provider deploys exactly the runner that it was released with and downloads nothing.
//
// It does not build them: `make runners` does, before the provider. A provider that was built without them works for
// everything but deploying, and says so.
package runnerdist

import (
	"bytes"
	"compress/gzip"
	"crypto/sha256"
	"embed"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"sync"
)

//go:embed all:dist
var dist embed.FS

// MissingError says that this provider was built without the runner for an architecture.
type MissingError struct{ Arch string }

func (e *MissingError) Error() string {
	return "this build contains no runner for linux/" + e.Arch + "; run make build"
}

type unpacked struct {
	packed []byte
	binary []byte
	sha256 string
	err    error
}

var (
	unpackMu sync.Mutex // guards cache, and keeps two callers from unpacking the same binary
	cache    = map[string]unpacked{}
)

// Binary returns the runner for an architecture, as Go names it ("amd64", "arm64"), and the SHA-256 of the runner in
// hexadecimal. The bytes are shared: they must not be changed. *MissingError if this build has none.
func Binary(goarch string) (binary []byte, digest string, err error) {
	u := cached(goarch)
	return u.binary, u.sha256, u.err
}

// Compressed is Binary as it is carried, by gzip; the SHA-256 is that of the binary. What is damaged is not returned.
func Compressed(goarch string) (packed []byte, digest string, err error) {
	u := cached(goarch)
	return u.packed, u.sha256, u.err
}

func cached(goarch string) unpacked {
	unpackMu.Lock()
	defer unpackMu.Unlock()
	u, ok := cache[goarch]
	if !ok {
		u = unpack(dist, goarch)
		cache[goarch] = u
	}
	return u
}

// Runner is Binary without the digest.
func Runner(goarch string) ([]byte, error) {
	b, _, err := Binary(goarch)
	return b, err
}

func unpack(files fs.FS, goarch string) unpacked {
	packed, err := fs.ReadFile(files, "dist/pgark_linux_"+goarch+".gz")
	if errors.Is(err, fs.ErrNotExist) {
		return unpacked{err: &MissingError{Arch: goarch}}
	}
	if err != nil {
		return unpacked{err: fmt.Errorf("runner for linux/%s: %w", goarch, err)}
	}
	z, err := gzip.NewReader(bytes.NewReader(packed))
	if err != nil {
		return unpacked{err: fmt.Errorf("unpack the runner for linux/%s: %w", goarch, err)}
	}
	b, err := io.ReadAll(z)
	if err != nil {
		return unpacked{err: fmt.Errorf("unpack the runner for linux/%s: %w", goarch, err)}
	}
	if !bytes.HasPrefix(b, []byte("\x7fELF")) {
		return unpacked{err: fmt.Errorf("unpack the runner for linux/%s: found no ELF binary; run make build", goarch)}
	}
	sum := sha256.Sum256(b)
	return unpacked{packed: packed, binary: b, sha256: hex.EncodeToString(sum[:])}
}
