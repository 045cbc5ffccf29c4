package repository

import (
	"bytes"
	"crypto/aes"
	"crypto/cipher"
	"crypto/hkdf"
	"crypto/sha256"
	"crypto/subtle"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"strings"
	"sync"

	"filippo.io/age"
	"github.com/zeebo/blake3"
)

// suite says how frames are sealed. Stored in container headers: never renumber.
type suite uint8

const (
	suiteNone   suite = 0 // BLAKE3-128 over what is authenticated
	suiteAESGCM suite = 1 // AES-256-GCM
)

func (s suite) String() string {
	switch s {
	case suiteNone:
		return "none"
	case suiteAESGCM:
		return "aes-256-gcm"
	}
	return fmt.Sprintf("suite-%d", uint8(s))
}

const (
	tagSize       = 16
	saltSize      = 24
	sessionKeyLen = 32

	// maxKeyBlob bounds the wrapped session key: some thirty post-quantum recipients. Part of the format.
	maxKeyBlob = 64 << 10

	// objectKeyInfo begins the HKDF info of an object's key. Part of the format.
	objectKeyInfo = "pgark/1 object key\x00"
)

// sessionKey is what an image, or a day of WAL, is encrypted with: every object derives its own key from it.
type sessionKey struct {
	suite  suite
	secret []byte // sessionKeyLen random bytes; nil when not encrypted
	blob   []byte // secret as an age file to the recipients; stands in every object's header
}

// newSessionKey draws and wraps a key. A repository without recipients has none.
func (r *Repository) newSessionKey() (*sessionKey, error) {
	if len(r.recipients) == 0 {
		return &sessionKey{suite: suiteNone}, nil
	}
	k := &sessionKey{suite: suiteAESGCM, secret: make([]byte, sessionKeyLen)}
	if _, err := io.ReadFull(r.random, k.secret); err != nil {
		return nil, fmt.Errorf("draw a session key: %w", err)
	}
	blob, err := r.wrap(k.secret)
	if err != nil {
		return nil, fmt.Errorf("wrap a session key: %w", err)
	}
	if len(blob) > maxKeyBlob {
		return nil, fmt.Errorf("wrap a session key to %d recipients: found %d bytes, expected at most %d", len(r.recipients), len(blob), maxKeyBlob)
	}
	k.blob = blob
	return k, nil
}

// wrapToRecipients is Repository.wrap outside of tests.
func wrapToRecipients(recipients []age.Recipient) func(secret []byte) ([]byte, error) {
	return func(secret []byte) ([]byte, error) {
		var b bytes.Buffer
		w, err := age.Encrypt(&b, recipients...)
		if err != nil {
			return nil, err
		}
		if _, err := w.Write(secret); err != nil {
			return nil, err
		}
		if err := w.Close(); err != nil {
			return nil, err
		}
		return b.Bytes(), nil
	}
}

// unwrap recovers a session key from an object's header or from refs. Unwrapping costs an X25519 operation or more, and
// all objects of an image carry the same blob: what was unwrapped is remembered.
func (r *Repository) unwrap(key string, s suite, blob []byte) (*sessionKey, error) {
	if s == suiteNone {
		return &sessionKey{suite: suiteNone}, nil
	}
	r.unwrappedMu.Lock()
	k := r.unwrapped[string(blob)]
	r.unwrappedMu.Unlock()
	if k != nil {
		return k, nil
	}
	noIdentity := &NoIdentityError{Repository: r.store.URL(), Key: key, Identities: len(r.identities), Recipients: r.description.Recipients}
	if len(r.identities) == 0 {
		return nil, noIdentity
	}
	plain, err := age.Decrypt(bytes.NewReader(blob), r.identities...)
	if err != nil {
		if _, ok := errors.AsType[*age.NoIdentityMatchError](err); ok {
			return nil, noIdentity
		}
		return nil, &CorruptError{Repository: r.store.URL(), Key: key, Err: fmt.Errorf("wrapped key: %w", err)}
	}
	secret, err := io.ReadAll(io.LimitReader(plain, sessionKeyLen+1))
	if err != nil {
		return nil, &CorruptError{Repository: r.store.URL(), Key: key, Err: fmt.Errorf("wrapped key: %w", err)}
	}
	if len(secret) != sessionKeyLen {
		return nil, &CorruptError{Repository: r.store.URL(), Key: key, Err: fmt.Errorf("wrapped key: found %d bytes, expected %d", len(secret), sessionKeyLen)}
	}
	k = &sessionKey{suite: s, secret: secret, blob: bytes.Clone(blob)}
	r.unwrappedMu.Lock()
	defer r.unwrappedMu.Unlock()
	if len(r.unwrapped) >= maxUnwrapped {
		clear(r.unwrapped)
	}
	r.unwrapped[string(blob)] = k
	return k, nil
}

// maxUnwrapped bounds the session keys kept: some hundred bytes each; an image's packs come from a few dozen images.
const maxUnwrapped = 4096

// newSalt draws the salt of one object. With it a key is never used for two objects, even by two copies of a virtual
// machine that share a session key.
func (r *Repository) newSalt(s suite) ([saltSize]byte, error) {
	var salt [saltSize]byte
	if s == suiteNone {
		return salt, nil
	}
	if _, err := io.ReadFull(r.random, salt[:]); err != nil {
		return salt, fmt.Errorf("draw a salt: %w", err)
	}
	return salt, nil
}

// objectCipher seals and opens the frames of one object. Safe for concurrent use.
type objectCipher struct {
	aead  cipher.AEAD // nil: suiteNone
	bound []byte      // key, 0x00, kind: the beginning of what every frame authenticates
}

// cipherFor derives an object's key. meta is the container's, which the derivation binds: of an encrypted object not
// even the unencrypted part can be changed without every frame being refused.
func (k *sessionKey) cipherFor(key string, kind containerKind, salt [saltSize]byte, meta []byte) (*objectCipher, error) {
	c := &objectCipher{bound: append(append([]byte(key), 0), byte(kind))}
	if k.suite == suiteNone {
		return c, nil
	}
	digest := blake3.Sum256(meta)
	var info strings.Builder
	info.WriteString(objectKeyInfo)
	info.WriteByte(byte(kind))
	info.WriteString(key)
	info.WriteByte(0)
	info.Write(digest[:])
	object, err := hkdf.Key(sha256.New, k.secret, salt[:], info.String(), 32)
	if err != nil {
		return nil, fmt.Errorf("derive the key of %s: %w", key, err)
	}
	block, err := aes.NewCipher(object)
	if err != nil {
		return nil, fmt.Errorf("derive the key of %s: %w", key, err)
	}
	if c.aead, err = cipher.NewGCM(block); err != nil {
		return nil, fmt.Errorf("derive the key of %s: %w", key, err)
	}
	return c, nil
}

// sealing holds the small buffers of one seal or open, which would otherwise be allocated for each frame.
type sealing struct {
	nonce  [12]byte
	sum    [32]byte
	aad    []byte
	hasher *blake3.Hasher
}

var sealings = newPool(func() *sealing { return &sealing{hasher: blake3.New()} })

// pool is a sync.Pool that knows its type.
type pool[T any] struct{ p sync.Pool }

func newPool[T any](fresh func() *T) *pool[T] {
	return &pool[T]{p: sync.Pool{New: func() any { return fresh() }}}
}

func (p *pool[T]) get() *T {
	v, ok := p.p.Get().(*T)
	if !ok {
		panic("repository: internal error: a pool gave something else")
	}
	return v
}

func (p *pool[T]) put(v *T) { p.p.Put(v) }

// prepare sets nonce and associated data: key, 0x00, kind, frame number, frame header. A nonce is the frame's number,
// which never repeats under a key because each object has a key of its own and is written once.
func (s *sealing) prepare(c *objectCipher, number uint32, header []byte) {
	binary.BigEndian.PutUint32(s.nonce[8:], number)
	s.aad = append(s.aad[:0], c.bound...)
	s.aad = append(s.aad, s.nonce[8:]...)
	s.aad = append(s.aad, header...)
}

func (s *sealing) checksum(payload []byte) []byte {
	s.hasher.Reset()
	_, _ = s.hasher.Write(s.aad) // a hash never fails
	_, _ = s.hasher.Write(payload)
	return s.hasher.Sum(s.sum[:0])[:tagSize]
}

// seal completes a frame in place: header and payload stand in it, the last tagSize bytes are room for the tag.
func (c *objectCipher) seal(number uint32, frame []byte) {
	s := sealings.get()
	defer sealings.put(s)
	header, payload, tag := frame[:frameHeaderSize], frame[frameHeaderSize:len(frame)-tagSize], frame[len(frame)-tagSize:]
	s.prepare(c, number, header)
	if c.aead == nil {
		copy(tag, s.checksum(payload))
		return
	}
	c.aead.Seal(payload[:0], s.nonce[:], payload, s.aad)
}

var errSeal = errors.New("its tag does not match: it is damaged, or another object's")

// open verifies a whole frame and appends its payload to dst, which must not overlap frame.
func (c *objectCipher) open(dst []byte, number uint32, frame []byte) ([]byte, error) {
	s := sealings.get()
	defer sealings.put(s)
	s.prepare(c, number, frame[:frameHeaderSize])
	if c.aead == nil {
		payload, tag := frame[frameHeaderSize:len(frame)-tagSize], frame[len(frame)-tagSize:]
		if subtle.ConstantTimeCompare(s.checksum(payload), tag) != 1 {
			return nil, errSeal
		}
		return append(dst, payload...), nil
	}
	out, err := c.aead.Open(dst, s.nonce[:], frame[frameHeaderSize:], s.aad)
	if err != nil {
		return nil, errSeal
	}
	return out, nil
}
