package repository

import (
	"bytes"
	"context"
	"errors"
	"math/rand/v2"
	"slices"
	"testing"

	"filippo.io/age"

	"github.com/pgark/terraform-provider-pgark/internal/engine/objectstore"
	"github.com/pgark/terraform-provider-pgark/internal/engine/postgres"
)

const testSystem = postgres.SystemID(7412345678901234567)

var testSeries = SeriesID{Job: "orders", Instance: "15-main", SystemID: testSystem}

// suites runs a test with and without encryption.
func suites(t *testing.T, run func(t *testing.T, recipients []string, identities []age.Identity)) {
	t.Run("none", func(t *testing.T) { run(t, nil, nil) })
	t.Run("age", func(t *testing.T) {
		identity, err := age.GenerateX25519Identity()
		if err != nil {
			t.Fatal(err)
		}
		run(t, []string{identity.Recipient().String()}, []age.Identity{identity})
	})
}

// directory is a directory store in a temporary directory.
func directory(t testing.TB) objectstore.Store {
	t.Helper()
	store, err := objectstore.Open(context.Background(), objectstore.Location{URL: "file://" + t.TempDir()}, objectstore.Options{})
	if err != nil {
		t.Fatal(err)
	}
	return store
}

// newSeries creates a repository in store and opens it with the identities.
func newSeries(t testing.TB, store objectstore.Store, recipients []string, identities []age.Identity) *Series {
	t.Helper()
	ctx := context.Background()
	if _, _, err := Create(ctx, store, recipients); err != nil {
		t.Fatal(err)
	}
	r, err := Open(ctx, store, identities...)
	if err != nil {
		t.Fatal(err)
	}
	return r.Series(testSeries)
}

// compressible is n bytes that compress about 3:1.
func compressible(seed uint64, n int) []byte {
	rnd := rand.New(rand.NewPCG(seed, 1))
	b := make([]byte, n)
	for i := range b {
		if i%3 == 0 {
			b[i] = byte(rnd.Uint32())
		}
	}
	return b
}

func TestPutWAL_getsBackWhatWasPut(t *testing.T) {
	ctx := t.Context()
	suites(t, func(t *testing.T, recipients []string, identities []age.Identity) {
		s := newSeries(t, directory(t), recipients, identities)
		sizes := []int{0, 1, 41, maxStreamRaw - 1, maxStreamRaw, maxStreamRaw + 1, 2 * maxStreamRaw, 16 << 20, walInMemory + 1}
		if testing.Short() {
			sizes = []int{0, 1, 41, maxStreamRaw, maxStreamRaw + 1} // compressing takes ten times as long under the race detector
		}
		for _, size := range sizes {
			name := postgres.MakeSegmentName(3, uint64(size), 16<<20)
			want := compressible(uint64(size), size)
			info := WALInfo{Name: string(name), Size: int64(size), Host: "db1"}
			stored, n, err := s.PutWAL(ctx, info, bytes.NewReader(want))
			if err != nil || !stored || n == 0 {
				t.Fatalf("%d bytes: stored %v, %d, %v", size, stored, n, err)
			}
			var got bytes.Buffer
			there, err := s.GetWAL(ctx, string(name), &got)
			if err != nil || !bytes.Equal(got.Bytes(), want) {
				t.Fatalf("%d bytes: got %d bytes, %v", size, got.Len(), err)
			}
			if there.StoredSize != n || there.Host != "db1" || there.SystemID != testSystem || there.Size != int64(size) {
				t.Fatalf("%d bytes: got %+v", size, there)
			}
			stat, err := s.StatWAL(ctx, string(name))
			if err != nil || stat.Digest != there.Digest || stat.StoredSize != n {
				t.Fatalf("%d bytes: stat %+v, %v", size, stat, err)
			}

			// PostgreSQL asks again after a crash; a clone of the cluster offers something else.
			if stored, _, err = s.PutWAL(ctx, info, bytes.NewReader(want)); err != nil || stored {
				t.Fatalf("%d bytes again: stored %v, %v", size, stored, err)
			}
			other := append(bytes.Clone(want[:max(0, size-1)]), 0xee)
			info.Size = int64(len(other))
			_, _, err = s.PutWAL(ctx, info, bytes.NewReader(other))
			conflict, ok := errors.AsType[*WALConflictError](err)
			if !ok || conflict.There.Digest != there.Digest || conflict.Here.Digest == there.Digest {
				t.Fatalf("%d bytes, other content: %v", size, err)
			}
		}
	})
}

func TestPutWAL_refuses(t *testing.T) {
	s := newSeries(t, directory(t), nil, nil)
	raw := bytes.NewReader(make([]byte, 100))
	name := "000000010000000000000001"
	for what, info := range map[string]WALInfo{
		"no WAL file":        {Name: "pg_control", Size: 100},
		"a path":             {Name: "../" + name, Size: 100},
		"another cluster":    {Name: name, Size: 100, SystemID: 5},
		"more than there is": {Name: name, Size: 101},
		"a negative size":    {Name: name, Size: -1},
		"a wrong digest":     {Name: name, Size: 100, Digest: noDigest},
	} {
		if _, _, err := s.PutWAL(t.Context(), info, raw); err == nil {
			t.Errorf("%s: stored", what)
		}
	}
	if _, err := s.StatWAL(t.Context(), name); !errors.Is(err, objectstore.ErrNotExist) {
		t.Errorf("something was stored: %v", err)
	}
}

func TestWAL_listing(t *testing.T) {
	ctx := t.Context()
	store := directory(t)
	s := newSeries(t, store, nil, nil)
	names := []string{
		"00000001000000000000000A", "00000001000000000000000B", "00000001000000000000000B.00000028.backup", "00000001000000000000000C.partial",
		"00000002.history", "00000002000000000000000C", "00000003.history",
	}
	for _, n := range names {
		if _, _, err := s.PutWAL(ctx, WALInfo{Name: n, Size: int64(len(n))}, bytes.NewReader([]byte(n))); err != nil {
			t.Fatal(err)
		}
	}
	if err := store.Create(ctx, s.id.walPrefix()+"00000001/README", bytes.NewReader(nil), 0); err != nil {
		t.Fatal(err)
	}
	list := func(timeline postgres.Timeline, from string) (got []string) {
		for e, err := range s.ListWAL(ctx, timeline, from) {
			if err != nil {
				t.Fatal(err)
			}
			got = append(got, e.Name)
		}
		return got
	}
	for _, c := range []struct {
		timeline postgres.Timeline
		from     string
		want     []string
	}{
		{1, "", names[:4]},
		{1, "00000001000000000000000B", names[1:4]},
		{1, "00000001000000000000000B.00000028.backup", names[2:4]},
		{1, "00000001000000000000000D", nil},
		{2, "", names[5:6]},
		{3, "", nil},
	} {
		if got := list(c.timeline, c.from); !slices.Equal(got, c.want) {
			t.Errorf("timeline %d from %q: got %v, want %v", c.timeline, c.from, got, c.want)
		}
	}
	if got, err := s.Timelines(ctx); err != nil || !slices.Equal(got, []postgres.Timeline{1, 2, 3}) {
		t.Errorf("timelines %v, %v", got, err)
	}
	if got, err := s.Histories(ctx); err != nil || !slices.Equal(got, []postgres.Timeline{2, 3}) {
		t.Errorf("histories %v, %v", got, err)
	}

	// Nothing below the floor: nothing may go.
	if err := s.DeleteWAL(ctx, 16<<20, names[0]); err == nil {
		t.Error("deleted above the floor")
	}
	if err := s.RaiseWALFloor(ctx, 1, postgres.LSN(0x0B)<<24); err != nil {
		t.Fatal(err)
	}
	if _, ok := errors.AsType[*FloorError](s.DeleteWAL(ctx, 16<<20, names[0], names[1])); !ok {
		t.Error("deleted above the floor")
	}
	if err := s.DeleteWAL(ctx, 16<<20, "00000002.history"); err == nil {
		t.Error("deleted a history file")
	}
	if got := list(1, ""); !slices.Equal(got, names[:4]) {
		t.Errorf("after refusals: %v", got)
	}
	if err := s.DeleteWAL(ctx, 16<<20, names[0]); err != nil {
		t.Error(err)
	}
	if got := list(1, ""); !slices.Equal(got, names[1:4]) {
		t.Errorf("after deletion: %v", got)
	}
}
