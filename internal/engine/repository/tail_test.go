package repository

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"time"

	"filippo.io/age"

	"github.com/pgark/terraform-provider-pgark/internal/engine/objectstore"
	"github.com/pgark/terraform-provider-pgark/internal/engine/postgres"
)

func tail(t postgres.Timeline, start, end postgres.LSN) Tail {
	return Tail{Timeline: t, Start: start, End: end}
}

func TestTail_getsBackWhatWasPut(t *testing.T) {
	ctx := t.Context()
	suites(t, func(t *testing.T, recipients []string, identities []age.Identity) {
		s := newSeries(t, directory(t), recipients, identities)
		at := time.Date(2026, 7, 1, 12, 0, 0, 0, time.UTC)
		for _, size := range []int{1, 8192, 512 << 10, maxStreamRaw + 8} {
			x := tail(3, 0x1_0000_0000, postgres.LSN(0x1_0000_0000+size))
			want := compressible(uint64(size), size)
			info := WALInfo{Host: "db1", FirstTime: &at, LastTime: &at}
			n, err := s.PutTail(ctx, x, info, want)
			if err != nil || n == 0 {
				t.Fatalf("%d bytes: %d, %v", size, n, err)
			}
			var got bytes.Buffer
			there, err := s.GetTail(ctx, x, &got)
			if err != nil || !bytes.Equal(got.Bytes(), want) {
				t.Fatalf("%d bytes: got %d bytes, %v", size, got.Len(), err)
			}
			name := fmt.Sprintf("0000000100000000-%016X.tail", 0x1_0000_0000+size)
			if there.Name != name || there.StoredSize != n || there.Host != "db1" || there.SystemID != testSystem || there.Size != int64(size) || !there.LastTime.Equal(at) {
				t.Fatalf("%d bytes: got %+v", size, there)
			}
			stat, err := s.StatTail(ctx, x)
			if err != nil || stat.Digest != there.Digest || stat.StoredSize != n {
				t.Fatalf("%d bytes: stat %+v, %v", size, stat, err)
			}

			// The streamer was restarted and receives the same again; or the cluster was cloned and goes its own way.
			if again, err := s.PutTail(ctx, x, info, want); err != nil || again != n {
				t.Fatalf("%d bytes again: %d, %v", size, again, err)
			}
			other := bytes.Clone(want)
			other[size-1]++
			conflict, ok := errors.AsType[*WALConflictError](second(s.PutTail(ctx, x, info, other)))
			if !ok || conflict.There.Digest != there.Digest || conflict.Here.Digest == there.Digest || conflict.Here.Name != name {
				t.Fatalf("%d bytes, other content: %v", size, conflict)
			}
		}
		absent := tail(3, 0x1_0000_0000, 0x1_0000_0008)
		if _, err := s.GetTail(ctx, absent, &bytes.Buffer{}); !errors.Is(err, objectstore.ErrNotExist) {
			t.Errorf("absent: %v", err)
		}
		if _, err := s.StatTail(ctx, absent); !errors.Is(err, objectstore.ErrNotExist) {
			t.Errorf("absent: %v", err)
		}
		if err := s.DeleteTails(ctx, absent); err != nil {
			t.Errorf("delete an absent one: %v", err)
		}
	})
}

func second[T any](_ T, err error) error { return err }

func TestTail_refuses(t *testing.T) {
	store := newMemoryStore()
	s := newSeries(t, store, nil, nil)
	before := len(store.objects)
	for what, x := range map[string]Tail{
		"no timeline": tail(0, 0, 8), "empty": tail(1, 8, 8), "backwards": tail(1, 16, 8), "more than a segment": tail(1, 0, 1<<30+1),
	} {
		if _, err := s.PutTail(t.Context(), x, WALInfo{}, make([]byte, 8)); err == nil {
			t.Errorf("%s: stored", what)
		}
		if err := s.DeleteTails(t.Context(), x); err == nil {
			t.Errorf("%s: deleted", what)
		}
	}
	if _, err := s.PutTail(t.Context(), tail(1, 0, 9), WALInfo{}, make([]byte, 8)); err == nil {
		t.Error("fewer bytes than the name says: stored")
	}
	if len(store.objects) != before {
		t.Error("something was stored")
	}
}

// A tail that was copied to another's name, or damaged, is found out.
func TestTail_damage(t *testing.T) {
	ctx := t.Context()
	suites(t, func(t *testing.T, recipients []string, identities []age.Identity) {
		store := newMemoryStore()
		s := newSeries(t, store, recipients, identities)
		x, y := tail(1, 0x1000000, 0x1002000), tail(1, 0x1002000, 0x1004000)
		if _, err := s.PutTail(ctx, x, WALInfo{}, compressible(1, 0x2000)); err != nil {
			t.Fatal(err)
		}
		good := store.objects[s.id.tailKey(x)]
		store.objects[s.id.tailKey(y)] = good
		for i := 0; i < len(good); i += 31 {
			bad := bytes.Clone(good)
			bad[i] ^= 1
			store.objects[s.id.tailKey(x)] = bad
			if _, err := s.GetTail(ctx, x, &bytes.Buffer{}); err == nil {
				t.Errorf("a flipped bit at %d of %d was not found", i, len(good))
			}
		}
		if _, err := s.GetTail(ctx, y, &bytes.Buffer{}); !isCorrupt(err) {
			t.Errorf("another's object: %v", err)
		}
	})
}

func isCorrupt(err error) bool {
	_, ok := errors.AsType[*CorruptError](err)
	return ok
}

func listTails(t *testing.T, s *Series, timeline postgres.Timeline, from, to postgres.LSN) (got []Tail) {
	t.Helper()
	for x, err := range s.ListTails(t.Context(), timeline, from, to) {
		if err != nil {
			t.Fatal(err)
		}
		if x.StoredSize == 0 {
			t.Errorf("%s: no stored size", x)
		}
		x.StoredSize = 0
		got = append(got, x)
	}
	return got
}

// The names of tails sort below, among and above those of the segments of their timeline.
func TestTails_listing(t *testing.T) {
	ctx := t.Context()
	for name, store := range map[string]objectstore.Store{"directory": directory(t), "memory": newMemoryStore()} {
		t.Run(name, func(t *testing.T) {
			s := newSeries(t, store, nil, nil)
			put := func(x Tail) Tail {
				t.Helper()
				if _, err := s.PutTail(ctx, x, WALInfo{}, make([]byte, x.Size())); err != nil {
					t.Fatal(err)
				}
				return x
			}
			files := []string{"000000020000000000000001", "000000020000000000000002", "000000020000000200000000", "000000020000000200000001.partial", "000000020000000300000000"}
			for _, n := range append(files, "00000002.history") {
				if _, _, err := s.PutWAL(ctx, WALInfo{Name: n, Size: 1}, strings.NewReader("x")); err != nil {
					t.Fatal(err)
				}
			}
			tails := []Tail{
				put(tail(2, 0x0_01000000, 0x0_01000100)),
				put(tail(2, 0x1_FFFFFF00, 0x2_00000000)),
				put(tail(2, 0x2_00000000, 0x2_00000008)),
				put(tail(2, 0x2_00000000, 0x2_00000100)), // longer, from the same position
				put(tail(2, 0x2_00000008, 0x2_00000010)),
				put(tail(2, 0x2_03000000, 0x2_03000100)),
				put(tail(2, 0x3_00000000, 0x3_00000100)),
				put(tail(2, 0xAB_00000000, 0xAB_00000100)),
			}
			only := put(tail(5, 0x2_00000000, 0x2_00000008)) // a timeline of nothing but this
			for _, key := range []string{                    // others' things
				"00000002/0000000200000000-0000000200000100.tail.tmp", "00000002/0000000200000000_0000000200000100.tail",
				"00000002/0000000200000000-00000002000000ff.tail", "00000002/0000000200000100-0000000200000100.tail",
			} {
				if err := store.Create(ctx, s.id.walPrefix()+key, strings.NewReader("x"), 1); err != nil {
					t.Fatal(err)
				}
			}
			positions := []postgres.LSN{0, 1, 0x2_00000001, 0x2_03000001, 0x2_FFFFFFFF, 0x3_00000001, 0x100_00000000, ^postgres.LSN(0)}
			for _, x := range tails {
				positions = append(positions, x.Start)
			}
			for _, from := range positions {
				for _, to := range positions {
					var want []Tail
					for _, x := range tails {
						if from <= x.Start && x.Start < to {
							want = append(want, x)
						}
					}
					if got := listTails(t, s, 2, from, to); !slices.Equal(got, want) {
						t.Fatalf("tails from %s to %s: got %v, expected %v", from, to, got, want)
					}
				}
			}
			if got := listTails(t, s, 5, 0, ^postgres.LSN(0)); !slices.Equal(got, []Tail{only}) {
				t.Errorf("timeline 5: got %v", got)
			}
			if got := listTails(t, s, 1, 0, ^postgres.LSN(0)); got != nil {
				t.Errorf("timeline 1: got %v", got)
			}
			for _, err := range s.ListTails(ctx, 2, 0, ^postgres.LSN(0)) {
				if err != nil {
					t.Fatal(err)
				}
				break // leaving early is allowed
			}

			var names []string
			for e, err := range s.ListWAL(ctx, 2, "") {
				if err != nil {
					t.Fatal(err)
				}
				names = append(names, e.Name)
			}
			if !slices.Equal(names, files) {
				t.Errorf("WAL files %v, expected %v", names, files)
			}
			if got, err := s.Timelines(ctx); err != nil || !slices.Equal(got, []postgres.Timeline{2, 5}) {
				t.Errorf("timelines %v, %v", got, err)
			}
			if got, err := s.Histories(ctx); err != nil || !slices.Equal(got, []postgres.Timeline{2}) {
				t.Errorf("histories %v, %v", got, err)
			}
		})
	}
}

// The tails of a segment are found with one request that names what their positions share.
func TestTails_requests(t *testing.T) {
	ctx := t.Context()
	store := newMemoryStore()
	s := newSeries(t, store, nil, nil)
	x := tail(2, 0x2_05000000, 0x2_05000100)
	if _, err := s.PutTail(ctx, x, WALInfo{}, make([]byte, x.Size())); err != nil {
		t.Fatal(err)
	}
	var asked []string
	store.gate = func(_ context.Context, op, key string, after bool) error {
		if !after {
			asked = append(asked, op+" "+strings.TrimPrefix(key, s.id.walPrefix()))
		}
		return nil
	}
	if got := listTails(t, s, 2, 0x2_05000000, 0x2_06000000); len(got) != 1 {
		t.Errorf("got %v", got)
	}
	if want := []string{"list 00000002/0000000205"}; !slices.Equal(asked, want) {
		t.Errorf("asked %q, expected %q", asked, want)
	}

	asked = nil
	many := []Tail{x}
	for i := range 2 * deleteBatch {
		many = append(many, tail(2, postgres.LSN(i*8), postgres.LSN(i*8+8)))
	}
	if err := s.DeleteTails(ctx, many...); err != nil {
		t.Fatal(err)
	}
	if len(asked) != len(many) || len(listTails(t, s, 2, 0, ^postgres.LSN(0))) != 0 {
		t.Errorf("deleted %d of %d", len(asked), len(many))
	}
}

func FuzzTailKey(f *testing.F) {
	f.Add("00000001/0000000001000000-0000000001000100.tail")
	f.Add("00000001/000000010000000000000001")
	f.Add("0000000A/00000000010000000000000001000100.tail")
	f.Fuzz(func(t *testing.T, rest string) {
		key := testSeries.walPrefix() + rest
		x, ok := testSeries.parseTailKey(key)
		if ok && (testSeries.tailKey(x) != key || x.check() != nil) {
			t.Errorf("%q: parsed as %+v", key, x)
		}
		if _, file := testSeries.parseWALKey(key); ok && file {
			t.Errorf("%q is a WAL file and a tail", key)
		}
	})
}

func TestTailKey_roundTrip(t *testing.T) {
	rnd := rand.New(rand.NewPCG(1, 2))
	for range 1000 {
		x := Tail{Timeline: postgres.Timeline(1 + rnd.Uint32N(1<<31)), Start: postgres.LSN(rnd.Uint64() >> (1 + rnd.IntN(60)))}
		x.End = x.Start + 1 + postgres.LSN(rnd.Uint64N(1<<30))
		if got, ok := testSeries.parseTailKey(testSeries.tailKey(x)); !ok || got != x {
			t.Fatalf("%+v: got %+v, %v", x, got, ok)
		}
	}
}
