package repository

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"iter"
	"maps"
	"slices"
	"strings"
	"sync"

	"github.com/pgark/terraform-provider-pgark/internal/engine/objectstore"
)

// memoryStore is an objectstore.Store that tests can damage, and whose operations they can hold up and fail.
type memoryStore struct {
	mu       sync.Mutex // guards the maps
	objects  map[string][]byte
	original map[string][]byte // what was created, for ever

	// gate, if set, is asked before an operation's effect and, with after, before its reply; an error of it is the
	// operation's.
	gate func(ctx context.Context, op, key string, after bool) error
}

func newMemoryStore() *memoryStore {
	return &memoryStore{objects: map[string][]byte{}, original: map[string][]byte{}}
}

func (m *memoryStore) pass(ctx context.Context, op, key string, after bool) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	if m.gate == nil {
		return nil
	}
	return m.gate(ctx, op, key, after)
}

func (m *memoryStore) Create(ctx context.Context, key string, body io.ReadSeeker, size int64) error {
	b, err := io.ReadAll(body)
	if err != nil {
		return err
	}
	if int64(len(b)) != size {
		return fmt.Errorf("found a body of %d bytes, expected %d", len(b), size)
	}
	if err := m.pass(ctx, "create", key, false); err != nil {
		return err
	}
	m.mu.Lock()
	there, taken := m.objects[key]
	if !taken {
		m.objects[key], m.original[key] = b, b
	}
	m.mu.Unlock()
	if taken && !bytes.Equal(there, b) {
		return &objectstore.ConflictError{Store: m.URL(), Key: key}
	}
	return m.pass(ctx, "create", key, true)
}

func (m *memoryStore) get(key string) ([]byte, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	b, ok := m.objects[key]
	if !ok {
		return nil, fmt.Errorf("get %s: %w", key, objectstore.ErrNotExist)
	}
	return b, nil
}

func (m *memoryStore) Get(ctx context.Context, key string, offset, n int64) (io.ReadCloser, error) {
	if err := m.pass(ctx, "get", key, false); err != nil {
		return nil, err
	}
	b, err := m.get(key)
	if err != nil {
		return nil, err
	}
	b = b[min(offset, int64(len(b))):]
	if n < 0 {
		return io.NopCloser(bytes.NewReader(b)), nil
	}
	if n > int64(len(b)) {
		return io.NopCloser(io.MultiReader(bytes.NewReader(b), cutReader{})), nil
	}
	return io.NopCloser(bytes.NewReader(b[:n])), nil
}

type cutReader struct{}

func (cutReader) Read([]byte) (int, error) { return 0, io.ErrUnexpectedEOF }

func (m *memoryStore) Stat(ctx context.Context, key string) (objectstore.Object, error) {
	if err := m.pass(ctx, "stat", key, false); err != nil {
		return objectstore.Object{}, err
	}
	b, err := m.get(key)
	return objectstore.Object{Key: key, Size: int64(len(b))}, err
}

func (m *memoryStore) List(ctx context.Context, prefix, startAfter string) iter.Seq2[objectstore.Object, error] {
	return func(yield func(objectstore.Object, error) bool) {
		if err := m.pass(ctx, "list", prefix, false); err != nil {
			yield(objectstore.Object{}, err)
			return
		}
		m.mu.Lock()
		keys := slices.Sorted(maps.Keys(m.objects))
		sizes := make([]int, len(keys))
		for i, k := range keys {
			sizes[i] = len(m.objects[k])
		}
		m.mu.Unlock()
		for i, k := range keys {
			if strings.HasPrefix(k, prefix) && k > startAfter {
				if !yield(objectstore.Object{Key: k, Size: int64(sizes[i])}, nil) {
					return
				}
			}
		}
	}
}

func (m *memoryStore) ListPrefixes(ctx context.Context, prefix string) iter.Seq2[string, error] {
	return func(yield func(string, error) bool) {
		last := ""
		for o, err := range m.List(ctx, prefix, "") {
			if err != nil {
				yield("", err)
				return
			}
			if e, _, ok := strings.Cut(o.Key[len(prefix):], "/"); ok && e != last {
				last = e
				if !yield(e, nil) {
					return
				}
			}
		}
	}
}

func (m *memoryStore) Delete(ctx context.Context, keys ...string) error {
	for _, k := range keys {
		if err := m.pass(ctx, "delete", k, false); err != nil {
			return err
		}
		m.mu.Lock()
		delete(m.objects, k)
		m.mu.Unlock()
	}
	return m.pass(ctx, "delete", "", true)
}

func (m *memoryStore) URL() string { return "memory" }
