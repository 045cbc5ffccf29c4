// Package storetest is the contract of objectstore.Store as tests. Every kind of store runs it; a store that passes can
// hold a repository. It tests what a store does, not how: each store has tests of its own for its faults.
package storetest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/pgark/terraform-provider-pgark/internal/engine/objectstore"
)

// Config says what to run the suite on.
type Config struct {
	// New gives an empty store of its own to each test.
	New func(t *testing.T) objectstore.Store

	// LargeObject is the size of the largest object that is stored, in bytes; it should lie above the store's part
	// threshold where it has one. Default 24 MiB.
	LargeObject int

	// ManyKeys is the number of objects in the long listing; more than 1000, the page of an S3 listing. Default 1100.
	ManyKeys int
}

// Run runs the suite.
func Run(t *testing.T, c Config) {
	if c.LargeObject == 0 {
		c.LargeObject = 24 << 20
	}
	if c.ManyKeys == 0 {
		c.ManyKeys = 1100
	}
	tests := []struct {
		name string
		run  func(*testing.T, objectstore.Store, Config)
	}{
		{"absent objects", testAbsent},
		{"create and read back", testCreate},
		{"create again", testCreateAgain},
		{"a body is read from its start", testBodyFromStart},
		{"a short body is not stored", testShortBody},
		{"many writers of one name, one winner", testRace},
		{"many writers of one content all succeed", testSameContentRace},
		{"ranges", testRanges},
		{"a large object", testLarge},
		{"list in order", testListOrder},
		{"list more than a page", testListPages},
		{"list prefixes", testListPrefixes},
		{"key characters", testKeyCharacters},
		{"refused keys", testRefusedKeys},
		{"delete", testDelete},
		{"create after delete", testCreateAfterDelete},
		{"cancelled", testCancelled},
		{"probe", testProbe},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) { test.run(t, c.New(t), c) })
	}
}

func testAbsent(t *testing.T, s objectstore.Store, _ Config) {
	ctx := t.Context()
	put(t, s, "there/below", "x")
	for _, key := range []string{"absent", "a/b/c", "there", "there/bel", "there/below/further"} {
		if _, err := s.Get(ctx, key, 0, -1); !errors.Is(err, objectstore.ErrNotExist) {
			t.Errorf("get %s: %v, expected ErrNotExist", key, err)
		}
		if _, err := s.Get(ctx, key, 5, 10); !errors.Is(err, objectstore.ErrNotExist) {
			t.Errorf("get a range of %s: %v, expected ErrNotExist", key, err)
		}
		_, err := s.Stat(ctx, key)
		if !errors.Is(err, objectstore.ErrNotExist) {
			t.Errorf("stat %s: %v, expected ErrNotExist", key, err)
		}
		if objectstore.IsTransient(err) {
			t.Errorf("stat %s: %v is transient", key, err)
		}
		if err := s.Delete(ctx, key); err != nil {
			t.Errorf("delete %s: %v", key, err)
		}
	}
	wantKeys(t, s, "absent/", "")
	wantKeys(t, s, "", "", "there/below")
	if got := read(t, s, "there/below", 0, -1); got != "x" {
		t.Errorf("after deletes around it, there/below holds %q", got)
	}
}

func testCreate(t *testing.T, s objectstore.Store, _ Config) {
	for _, content := range []string{"", "x", strings.Repeat("0123456789", 5000)} {
		key := fmt.Sprintf("size/%d", len(content))
		before := time.Now().Add(-time.Hour)
		put(t, s, key, content)
		if got := read(t, s, key, 0, -1); got != content {
			t.Errorf("%s: read %d bytes back, expected the %d stored", key, len(got), len(content))
		}
		o, err := s.Stat(t.Context(), key)
		if err != nil {
			t.Fatal(err)
		}
		if o.Key != key || o.Size != int64(len(content)) || o.Modified.Before(before) {
			t.Errorf("stat %s: %+v", key, o)
		}
	}
}

func testCreateAgain(t *testing.T, s objectstore.Store, _ Config) {
	for _, content := range []string{"", "one content"} {
		key := fmt.Sprintf("object-%d", len(content))
		put(t, s, key, content)
		put(t, s, key, content)
		for _, other := range []string{"two content", "one content and more", "o", ""} {
			if other == content {
				continue
			}
			err := create(t.Context(), s, key, other)
			conflict, ok := errors.AsType[*objectstore.ConflictError](err)
			if !ok {
				t.Fatalf("create over other content: %v, expected *ConflictError", err)
			}
			if conflict.Key != key || conflict.Store != s.URL() || conflict.Here == conflict.There || conflict.Here == "" || conflict.There == "" {
				t.Errorf("conflict: %+v", conflict)
			}
			if objectstore.IsTransient(err) {
				t.Errorf("%v is transient", err)
			}
		}
		if got := read(t, s, key, 0, -1); got != content {
			t.Errorf("after refused creates the object holds %q", got)
		}
	}
}

func testBodyFromStart(t *testing.T, s objectstore.Store, _ Config) {
	body := strings.NewReader("from the start")
	if _, err := body.Seek(5, io.SeekStart); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if err := s.Create(t.Context(), "k", body, body.Size()); err != nil {
			t.Fatal(err)
		}
	}
	if got := read(t, s, "k", 0, -1); got != "from the start" {
		t.Errorf("stored %q", got)
	}
	// Of a body longer than the size given, only that much is the object.
	if err := s.Create(t.Context(), "part", body, 4); err != nil {
		t.Fatal(err)
	}
	if got := read(t, s, "part", 0, -1); got != "from" {
		t.Errorf("stored %q, expected the first 4 bytes", got)
	}
}

func testShortBody(t *testing.T, s objectstore.Store, _ Config) {
	if err := s.Create(t.Context(), "short", strings.NewReader("12345"), 6); err == nil {
		t.Error("a body shorter than its size was accepted")
	}
	wantKeys(t, s, "", "")
}

func testRace(t *testing.T, s objectstore.Store, _ Config) {
	const writers, rounds = 16, 5
	for round := range rounds {
		key := fmt.Sprintf("head/%d", round)
		contents := make([]string, writers)
		for i := range contents {
			contents[i] = fmt.Sprintf("writer %2d %s", i, strings.Repeat("x", 1000*round))
		}
		errs := race(t.Context(), s, key, contents)
		stored := read(t, s, key, 0, -1)
		winners := 0
		for i, err := range errs {
			switch {
			case err == nil:
				winners++
				if stored != contents[i] {
					t.Errorf("round %d: writer %d was told that it won, but the object is %.9q", round, i, stored)
				}
			case !isConflict(err):
				t.Errorf("round %d: writer %d: %v, expected *ConflictError", round, i, err)
			}
		}
		if winners != 1 {
			t.Errorf("round %d: %d winners, expected 1", round, winners)
		}
	}
}

func testSameContentRace(t *testing.T, s objectstore.Store, _ Config) {
	for i, err := range race(t.Context(), s, "same/key", slices.Repeat([]string{"the same"}, 16)) {
		if err != nil {
			t.Errorf("writer %d: %v", i, err)
		}
	}
}

func testRanges(t *testing.T, s objectstore.Store, _ Config) {
	content := make([]byte, 100_000)
	for i := range content {
		content[i] = byte(i * 7 / 3)
	}
	put(t, s, "object", string(content))
	put(t, s, "empty", "")
	for _, r := range []struct{ offset, n int }{
		{0, 1}, {0, 100_000}, {0, 99_999}, {1, 99_999}, {99_999, 1}, {50_000, 10}, {50_000, -1}, {99_999, -1}, {100_000, -1}, {0, 0}, {10, 0},
	} {
		want := content[r.offset:]
		if r.n >= 0 {
			want = want[:r.n]
		}
		if got := read(t, s, "object", int64(r.offset), int64(r.n)); got != string(want) {
			t.Errorf("range %d+%d: %d bytes that differ from the %d expected", r.offset, r.n, len(got), len(want))
		}
	}
	if got := read(t, s, "empty", 0, -1); got != "" {
		t.Errorf("empty object: %q", got)
	}
	for _, r := range []struct {
		key       string
		offset, n int64
		want      int
	}{
		{"object", 0, 100_001, 100_000}, {"object", 99_990, 20, 10}, {"object", 100_000, 1, 0}, {"object", 200_000, 1, 0},
		{"object", 100_001, -1, 0}, {"empty", 0, 1, 0},
	} {
		body, err := s.Get(t.Context(), r.key, r.offset, r.n)
		if err != nil {
			t.Errorf("range %d+%d of %s: %v", r.offset, r.n, r.key, err)
			continue
		}
		got, err := io.ReadAll(body)
		body.Close()
		if !errors.Is(err, io.ErrUnexpectedEOF) || len(got) != r.want {
			t.Errorf("range %d+%d of %s, beyond its end: %d bytes and %v, expected %d and unexpected EOF", r.offset, r.n, r.key, len(got), err, r.want)
		}
	}
	// A reader that is not read to its end can be closed.
	body, err := s.Get(t.Context(), "object", 0, -1)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := io.ReadFull(body, make([]byte, 10)); err != nil {
		t.Error(err)
	}
	if err := body.Close(); err != nil {
		t.Error(err)
	}
}

func testLarge(t *testing.T, s objectstore.Store, c Config) {
	content := make([]byte, c.LargeObject)
	rng := rand.NewChaCha8([32]byte{1})
	_, _ = rng.Read(content) // never fails
	for range 2 {            // the second time it is there already
		if err := s.Create(t.Context(), "large", bytes.NewReader(content), int64(len(content))); err != nil {
			t.Fatal(err)
		}
	}
	body, err := s.Get(t.Context(), "large", 0, -1)
	if err != nil {
		t.Fatal(err)
	}
	got, err := io.ReadAll(body)
	body.Close()
	if err != nil || !bytes.Equal(got, content) {
		t.Fatalf("read back %d bytes (%v) that differ from the %d stored", len(got), err, len(content))
	}
	other := slices.Clone(content)
	other[len(other)-1]++
	if err := s.Create(t.Context(), "large", bytes.NewReader(other), int64(len(other))); !isConflict(err) {
		t.Errorf("create with the last byte changed: %v, expected *ConflictError", err)
	}
	if o, err := s.Stat(t.Context(), "large"); err != nil || o.Size != int64(len(content)) {
		t.Errorf("stat: %+v, %v", o, err)
	}
}

// orderedKeys are chosen so that orders that are not bytewise on whole keys show: by directory, by name, without case.
var orderedKeys = []string{
	"A/1", "B", "a-b/x", "a.b", "a/a/a", "a/a/b", "a/a-b", "a/b", "a0", "a~", "b/00000001/000000010000000000000001",
	"b/00000001/000000010000000000000002", "b/00000001.history", "b/00000002.history", "ba", "z/z/z/z/z",
}

func testListOrder(t *testing.T, s objectstore.Store, _ Config) {
	keys := slices.Clone(orderedKeys)
	rand.Shuffle(len(keys), func(i, j int) { keys[i], keys[j] = keys[j], keys[i] })
	for _, key := range keys {
		put(t, s, key, key)
	}
	slices.Sort(keys)
	for _, prefix := range []string{"", "a", "a/", "a/a", "a/a/", "a-", "b/", "b/0000", "b/00000001/", "z/z/z", "none", "A/1", "A/1/"} {
		for _, after := range append([]string{"", "a", "a/", "a/a", "a/zzz", "b/00000001", "b/00000001/", "zzz"}, keys...) {
			var want []string
			for _, key := range keys {
				if strings.HasPrefix(key, prefix) && key > after {
					want = append(want, key)
				}
			}
			wantKeys(t, s, prefix, after, want...)
		}
	}
	for o, err := range s.List(t.Context(), "", "") {
		if err != nil {
			t.Fatal(err)
		}
		if o.Size != int64(len(o.Key)) {
			t.Errorf("listed %+v, expected %d bytes", o, len(o.Key))
		}
	}
}

func testListPages(t *testing.T, s objectstore.Store, c Config) {
	want := make([]string, c.ManyKeys)
	for i := range want {
		want[i] = fmt.Sprintf("pages/%03d/%016x", i%7, i)
	}
	work := make(chan string)
	var wg sync.WaitGroup
	for range 16 {
		wg.Go(func() {
			for key := range work {
				if err := create(t.Context(), s, key, "x"); err != nil {
					t.Error(err)
				}
			}
		})
	}
	for _, key := range want {
		work <- key
	}
	close(work)
	wg.Wait()
	slices.Sort(want)
	wantKeys(t, s, "pages/", "", want...)
	wantKeys(t, s, "pages/", want[len(want)/2], want[len(want)/2+1:]...)
	wantPrefixes(t, s, "pages/", "000", "001", "002", "003", "004", "005", "006")
	// A listing can be left early.
	n := 0
	for _, err := range s.List(t.Context(), "pages/", "") {
		if err != nil {
			t.Fatal(err)
		}
		if n++; n == 10 {
			break
		}
	}
	if err := s.Delete(t.Context(), slices.Concat(want, []string{"pages/never/there"})...); err != nil {
		t.Fatal(err)
	}
	wantKeys(t, s, "pages/", "")
}

func testListPrefixes(t *testing.T, s objectstore.Store, _ Config) {
	for _, key := range []string{"repository.json", "orders/owner/1", "orders/15-main/7/head/1", "orders/15-main/8/head/1", "orders-2/x/y", "orders/15-main.txt"} {
		put(t, s, key, "")
	}
	wantPrefixes(t, s, "", "orders-2", "orders")
	wantPrefixes(t, s, "orders/", "15-main", "owner")
	wantPrefixes(t, s, "orders/15-main/", "7", "8")
	wantPrefixes(t, s, "orders/owner/")
	wantPrefixes(t, s, "nothing/")
	for _, err := range s.ListPrefixes(t.Context(), "orders") {
		if err == nil {
			t.Error("a prefix without a slash at its end was accepted")
		}
	}
}

func testKeyCharacters(t *testing.T, s objectstore.Store, _ Config) {
	keys := []string{
		"orders/15-main/7412345678901234567/wal/00000003/00000003000000A2000000F1",
		"orders/15-main/7412345678901234567/wal/00000003/0-A2B3C4D5-0-A2B3FFFF.tail",
		"orders/15-main/7412345678901234567/session/2026-05-01T10:11:12.123456Z-5f00aa17",
		"with space/and+plus/100%25/ä/日本/a=b&c?d#e/~!@$*()'\",;[]{}|^`<>\\",
		strings.Repeat("l", 200) + "/" + strings.Repeat("m", 200),
		"a//b"[:2] + "b", // "a/b"
	}
	slices.Sort(keys)
	for _, key := range keys {
		put(t, s, key, "content of "+key)
	}
	wantKeys(t, s, "", "", keys...)
	for _, key := range keys {
		if got := read(t, s, key, 11, -1); got != key {
			t.Errorf("object %q holds %q", key, got)
		}
		if _, err := s.Stat(t.Context(), key); err != nil {
			t.Error(err)
		}
	}
	if err := s.Delete(t.Context(), keys...); err != nil {
		t.Fatal(err)
	}
	wantKeys(t, s, "", "")
}

func testRefusedKeys(t *testing.T, s objectstore.Store, _ Config) {
	for _, key := range []string{"", "/", "/a", "a/", "a//b", ".", "..", "a/../b", "a/./b", "a\x00b", "a\nb", "a\xffb", ".pgark-x", "a/.pgark-x.tmp",
		strings.Repeat("x", 256), strings.Repeat("x/", 500) + "x"} {
		if err := create(t.Context(), s, key, "x"); err == nil {
			t.Errorf("create %q was accepted", key)
		}
		if _, err := s.Get(t.Context(), key, 0, -1); err == nil {
			t.Errorf("get %q was accepted", key)
		}
		if _, err := s.Stat(t.Context(), key); err == nil {
			t.Errorf("stat %q was accepted", key)
		}
		if err := s.Delete(t.Context(), key); err == nil {
			t.Errorf("delete %q was accepted", key)
		}
	}
	wantKeys(t, s, "", "")
}

func testDelete(t *testing.T, s objectstore.Store, _ Config) {
	for _, key := range []string{"d/1", "d/2", "d/sub/3", "e/4"} {
		put(t, s, key, key)
	}
	if err := s.Delete(t.Context()); err != nil {
		t.Errorf("delete of nothing: %v", err)
	}
	if err := s.Delete(t.Context(), "d/1", "d/absent", "d/sub/3", "absent/absent"); err != nil {
		t.Fatal(err)
	}
	wantKeys(t, s, "", "", "d/2", "e/4")
	if _, err := s.Stat(t.Context(), "d/1"); !errors.Is(err, objectstore.ErrNotExist) {
		t.Errorf("stat of a deleted object: %v", err)
	}
	wantPrefixes(t, s, "d/")
	if err := s.Delete(t.Context(), "d/1", "d/2", "e/4"); err != nil {
		t.Fatal(err)
	}
	wantKeys(t, s, "", "")
	wantPrefixes(t, s, "")
}

// testCreateAfterDelete lets creates and deletes in one directory meet: a store that tidies up behind a delete must not
// pull the ground from under a create.
func testCreateAfterDelete(t *testing.T, s objectstore.Store, _ Config) {
	var wg sync.WaitGroup
	for w := range 4 {
		wg.Go(func() {
			for i := range 25 {
				key := fmt.Sprintf("meet/here/%d-%d", w, i)
				if err := create(t.Context(), s, key, key); err != nil {
					t.Error(err)
				}
				if err := s.Delete(t.Context(), key); err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
	wantKeys(t, s, "", "")
	put(t, s, "meet", "now an object")
}

func testCancelled(t *testing.T, s objectstore.Store, _ Config) {
	put(t, s, "key", "content")
	cause := errors.New("the reason")
	ctx, cancel := context.WithCancelCause(t.Context())
	cancel(cause)
	calls := map[string]func() error{
		"create": func() error { return create(ctx, s, "other", "content") },
		"get": func() error {
			body, err := s.Get(ctx, "key", 0, -1)
			if err == nil {
				_, err = io.ReadAll(body)
				body.Close()
			}
			return err
		},
		"stat":   func() error { _, err := s.Stat(ctx, "key"); return err },
		"delete": func() error { return s.Delete(ctx, "key") },
		"list": func() error {
			for _, err := range s.List(ctx, "", "") {
				return err
			}
			return nil
		},
		"list prefixes": func() error {
			for _, err := range s.ListPrefixes(ctx, "") {
				return err
			}
			return nil
		},
	}
	for name, call := range calls {
		start := time.Now()
		err := call()
		if !errors.Is(err, cause) {
			t.Errorf("%s: %v, expected the cause of the cancellation", name, err)
		}
		if objectstore.IsTransient(err) {
			t.Errorf("%s: %v is transient", name, err)
		}
		if d := time.Since(start); d > 2*time.Second {
			t.Errorf("%s took %v to notice", name, d)
		}
	}
	wantKeys(t, s, "", "", "key")

	// Cancelled between two reads.
	big := strings.Repeat("x", 4<<20)
	put(t, s, "big", big)
	ctx, cancel = context.WithCancelCause(t.Context())
	body, err := s.Get(ctx, "big", 0, -1)
	if err != nil {
		t.Fatal(err)
	}
	defer body.Close()
	if _, err := io.ReadFull(body, make([]byte, 10)); err != nil {
		t.Fatal(err)
	}
	cancel(cause)
	if _, err := io.Copy(io.Discard, body); !errors.Is(err, cause) {
		t.Errorf("a reader whose context is cancelled: %v, expected the cause", err)
	}
}

func testProbe(t *testing.T, s objectstore.Store, _ Config) {
	c, err := objectstore.Probe(t.Context(), s)
	if err != nil {
		t.Fatal(err)
	}
	if want := (objectstore.Capabilities{CreateIfAbsent: true, RangedGet: true, ListAfterPut: true, Delete: true}); c != want {
		t.Errorf("probe found %+v", c)
	}
	wantKeys(t, s, "", "")
}

// race lets one writer for each of contents create key at the same moment.
func race(ctx context.Context, s objectstore.Store, key string, contents []string) []error {
	errs := make([]error, len(contents))
	start := make(chan struct{})
	var wg sync.WaitGroup
	for i, content := range contents {
		wg.Go(func() {
			<-start
			errs[i] = create(ctx, s, key, content)
		})
	}
	close(start)
	wg.Wait()
	return errs
}

func create(ctx context.Context, s objectstore.Store, key, content string) error {
	return s.Create(ctx, key, strings.NewReader(content), int64(len(content)))
}

func put(t *testing.T, s objectstore.Store, key, content string) {
	t.Helper()
	if err := create(t.Context(), s, key, content); err != nil {
		t.Fatal(err)
	}
}

func read(t *testing.T, s objectstore.Store, key string, offset, n int64) string {
	t.Helper()
	body, err := s.Get(t.Context(), key, offset, n)
	if err != nil {
		t.Fatal(err)
	}
	defer body.Close()
	b, err := io.ReadAll(body)
	if err != nil {
		t.Fatalf("read %s: %v", key, err)
	}
	return string(b)
}

func wantKeys(t *testing.T, s objectstore.Store, prefix, startAfter string, want ...string) {
	t.Helper()
	var got []string
	for o, err := range s.List(t.Context(), prefix, startAfter) {
		if err != nil {
			t.Fatal(err)
		}
		got = append(got, o.Key)
	}
	if !slices.Equal(got, want) {
		t.Errorf("list %q after %q: %d keys, expected %d\ngot  %.800q\nwant %.800q", prefix, startAfter, len(got), len(want), got, want)
	}
}

func wantPrefixes(t *testing.T, s objectstore.Store, prefix string, want ...string) {
	t.Helper()
	var got []string
	for e, err := range s.ListPrefixes(t.Context(), prefix) {
		if err != nil {
			t.Fatal(err)
		}
		got = append(got, e)
	}
	if !slices.Equal(got, want) {
		t.Errorf("list prefixes of %q: %q, expected %q", prefix, got, want)
	}
}

func isConflict(err error) bool {
	_, ok := errors.AsType[*objectstore.ConflictError](err)
	return ok
}
