package repository

import (
	"bytes"
	"context"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"

	"github.com/zeebo/blake3"
)

// Format is the format of the documents and containers that this build writes, and the newest it reads. It grows when
// a reader of the older one would misunderstand what is written.
const Format = 1

// maxDocument bounds what a reader accepts as a document, in bytes. The largest are the refs of an image of some
// hundred TiB.
const maxDocument = 256 << 20

// The end of every document: `,"checksum":"` 64 digits `"}` newline. Part of the format.
const (
	checksumOpen  = `,"checksum":"`
	checksumClose = "\"}\n"
	checksumTail  = len(checksumOpen) + 64 + len(checksumClose)
)

// encodeDocument makes the document that is stored under key. v must encode to a JSON object with a member "format".
// It also returns the checksum, by which other documents may refer to this one.
func encodeDocument(key string, v any) (doc []byte, checksum string, err error) {
	b, err := json.Marshal(v)
	if err != nil {
		return nil, "", fmt.Errorf("encode %s: %w", key, err)
	}
	if len(b) < 3 || b[0] != '{' || b[len(b)-1] != '}' {
		panic("repository: internal error: a document must be a JSON object with members")
	}
	b = b[:len(b)-1]
	checksum = documentChecksum(key, b)
	b = append(b, checksumOpen...)
	b = append(b, checksum...)
	return append(b, checksumClose...), checksum, nil
}

// documentChecksum binds the content to its key: a document copied to another key is found out.
func documentChecksum(key string, body []byte) string {
	h := blake3.New()
	_, _ = h.WriteString(key) // a hash never fails
	_, _ = h.Write([]byte{0})
	_, _ = h.Write(body)
	return hex.EncodeToString(h.Sum(nil))
}

var errNewerFormat = errors.New("newer format")

// decodeDocument checks a document read from key and decodes it into v. The checksum comes first: of a damaged
// document not even its format can be believed. Formats to come keep the checksum and the member "format".
func decodeDocument(key string, doc []byte, v any) (checksum string, err error) {
	if len(doc) < checksumTail+2 {
		return "", fmt.Errorf("found %d bytes, expected a document that ends with its checksum", len(doc))
	}
	body, tail := doc[:len(doc)-checksumTail], doc[len(doc)-checksumTail:]
	if !bytes.HasPrefix(tail, []byte(checksumOpen)) || !bytes.HasSuffix(tail, []byte(checksumClose)) {
		return "", errors.New("found no checksum at its end; it may have been cut short")
	}
	there := string(tail[len(checksumOpen) : len(checksumOpen)+64])
	if here := documentChecksum(key, body); here != there {
		return "", fmt.Errorf("found content with checksum %s, expected %s", here, there)
	}
	var f struct {
		Format int `json:"format"`
	}
	if err := json.Unmarshal(doc, &f); err != nil {
		return "", fmt.Errorf("found no JSON object: %w", err)
	}
	if f.Format > Format {
		return "", fmt.Errorf("%w %d", errNewerFormat, f.Format)
	}
	if f.Format < 1 {
		return "", fmt.Errorf("found format %d, expected 1 to %d", f.Format, Format)
	}
	if err := json.Unmarshal(doc, v); err != nil {
		return "", err
	}
	return there, nil
}

// readDocument fetches and decodes a document. Absent: objectstore.ErrNotExist.
func (r *Repository) readDocument(ctx context.Context, key string, v any) (checksum string, err error) {
	b, err := r.readSmall(ctx, key)
	if err != nil {
		return "", err
	}
	checksum, err = decodeDocument(key, b, v)
	if err != nil {
		var f struct {
			Format int `json:"format"`
		}
		if errors.Is(err, errNewerFormat) && json.Unmarshal(b, &f) == nil {
			return "", &FormatError{Repository: r.store.URL(), Key: key, Found: f.Format, Supported: Format}
		}
		return "", &CorruptError{Repository: r.store.URL(), Key: key, Err: err}
	}
	return checksum, nil
}

// readSmall fetches an object that is read whole.
func (r *Repository) readSmall(ctx context.Context, key string) ([]byte, error) {
	body := r.newReader(ctx, key, 0, -1)
	defer body.Close()
	b, err := io.ReadAll(io.LimitReader(body, maxDocument+1))
	if err != nil {
		return nil, err
	}
	if len(b) > maxDocument {
		return nil, &CorruptError{Repository: r.store.URL(), Key: key, Err: fmt.Errorf("found more than %d bytes, expected at most that", maxDocument)}
	}
	return b, nil
}

// createDocument stores a document; an identical one that is there is success.
func (r *Repository) createDocument(ctx context.Context, key string, v any) (checksum string, err error) {
	b, checksum, err := encodeDocument(key, v)
	if err != nil {
		return "", err
	}
	return checksum, r.store.Create(ctx, key, bytes.NewReader(b), int64(len(b)))
}
