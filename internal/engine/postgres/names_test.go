package postgres_test

import (
	"errors"
	"strings"
	"testing"

	"pgregory.net/rapid"

	"github.com/pgark/terraform-provider-pgark/internal/engine/postgres"
)

func TestSegmentName_knownPositions(t *testing.T) {
	const mib = 1 << 20
	for _, c := range []struct {
		size  postgres.SegmentSize
		lsn   string
		name  postgres.SegmentName
		start string
		next  postgres.SegmentName
	}{
		{16 * mib, "0/0", "000000010000000000000000", "0/0", "000000010000000000000001"},
		{16 * mib, "0/1000028", "000000010000000000000001", "0/1000000", "000000010000000000000002"},
		{16 * mib, "16/B374D848", "0000000100000016000000B3", "16/B3000000", "0000000100000016000000B4"},
		{16 * mib, "0/FFFFFFFF", "0000000100000000000000FF", "0/FF000000", "000000010000000100000000"},
		{1 * mib, "0/FFFFFFFF", "000000010000000000000FFF", "0/FFF00000", "000000010000000100000000"},
		{64 * mib, "2/FC000000", "00000001000000020000003F", "2/FC000000", "000000010000000300000000"},
		{1024 * mib, "5/40000000", "000000010000000500000001", "5/40000000", "000000010000000500000002"},
	} {
		lsn := lsnOf(t, c.lsn)
		name := postgres.SegmentAt(1, lsn, c.size)
		if name != c.name || name.Start(c.size).String() != c.start || name.Next(c.size) != c.next || name.End(c.size) != c.next.Start(c.size) {
			t.Errorf("%s with %d: found %s from %s, next %s; expected %s from %s, next %s",
				c.lsn, c.size, name, name.Start(c.size), name.Next(c.size), c.name, c.start, c.next)
		}
		if err := name.Check(c.size); err != nil {
			t.Error(err)
		}
	}
	if p, ok := postgres.SegmentName("000000010000000000000000").Previous(16 * mib); ok {
		t.Errorf("the first segment has a predecessor, %s", p)
	}
	if err := postgres.SegmentName("000000010000000000000100").Check(16 * mib); !errors.Is(err, postgres.ErrNotWALFile) {
		t.Errorf("000000010000000000000100 with 16 MiB: found %v", err)
	}
	if n := postgres.SegmentName("000000010000000200000003").On(0xAB); n != "000000AB0000000200000003" {
		t.Errorf("On: %s", n)
	}
}

func TestSegmentName_roundTrip(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		size := postgres.SegmentSize(1) << rapid.IntRange(20, 30).Draw(t, "bits")
		timeline := postgres.Timeline(rapid.Uint32Min(1).Draw(t, "timeline"))
		lsn := postgres.LSN(rapid.Uint64Range(1, 1<<63).Draw(t, "lsn"))
		name := postgres.SegmentAt(timeline, lsn, size)
		parsed, err := postgres.ParseSegmentName(string(name))
		if err != nil || parsed != name || name.Check(size) != nil {
			t.Fatalf("%s: %v, %v", name, err, name.Check(size))
		}
		if name.Timeline() != timeline || name.Number(size) != size.Number(lsn) {
			t.Fatalf("%s: timeline %d, number %d", name, name.Timeline(), name.Number(size))
		}
		if lsn < name.Start(size) || lsn >= name.End(size) || uint64(name.Start(size))+size.Offset(lsn) != uint64(lsn) {
			t.Fatalf("%s: %s is not in %s to %s", name, lsn, name.Start(size), name.End(size))
		}
		if before := size.NumberBefore(lsn); before != name.Number(size) && (lsn != name.Start(size) || before != name.Number(size)-1) {
			t.Fatalf("%s: segment before %s is %d", name, lsn, before)
		}
		next := name.Next(size)
		if back, ok := next.Previous(size); !ok || back != name || next <= name {
			t.Fatalf("%s: next %s, back %s", name, next, back)
		}
	})
}

func TestParseWALFile(t *testing.T) {
	for name, kind := range map[string]postgres.WALFileKind{
		"0000000100000016000000B3":                 postgres.SegmentFile,
		"0000000100000016000000B3.partial":         postgres.PartialFile,
		"0000000A.history":                         postgres.HistoryFile,
		"0000000100000016000000B3.00000028.backup": postgres.BackupFile,
	} {
		f, err := postgres.ParseWALFile(name)
		if err != nil || f.Kind != kind || f.String() != name || f.Timeline == 0 {
			t.Errorf("%s: found %+v, %v", name, f, err)
		}
	}
	for _, name := range []string{
		"", "0", "archive_status", "summaries", "0000000100000016000000b3", "0000000100000016000000B", "0000000100000016000000B33",
		"0000000100000016000000B3.", "0000000100000016000000B3.partial.tmp", "0000000100000016000000B3.deleted", "0000000000000016000000B3",
		"00000000.history", "1.history", "0000000a.history", "0000000100000016000000B3.28.backup", "0000000100000016000000B3.0000002G.backup",
		"../00000001000000160000B3", "0000000100000016000000B3.ready", "xlogtemp.123", "RECOVERYHISTORY", ".history", ".backup",
	} {
		if f, err := postgres.ParseWALFile(name); !errors.Is(err, postgres.ErrNotWALFile) {
			t.Errorf("%q: found %+v, %v", name, f, err)
		}
	}
}

func FuzzParseWALFile(f *testing.F) {
	f.Add("0000000100000016000000B3.00000028.backup")
	f.Add("0000000A.history")
	f.Fuzz(func(t *testing.T, name string) {
		if w, err := postgres.ParseWALFile(name); err == nil && w.String() != name {
			t.Errorf("%q reads as %+v, which is named %q", name, w, w.String())
		}
	})
}

func TestParseHistory(t *testing.T) {
	const file = "# a comment\n\n1\t0/3000000\tno recovery target specified\n2\t0/50001A8\tbefore 2026-01-02 03:04:05+00\n"
	h, err := postgres.ParseHistory(4, []byte(file))
	if err != nil {
		t.Fatal(err)
	}
	if len(h) != 2 || h[0].Reason != "no recovery target specified" || h[1].Timeline != 2 || h[1].Switch != 0x50001A8 {
		t.Fatalf("found %+v", h)
	}
	if got := string(h.Format()); got != file[strings.Index(file, "1\t"):] {
		t.Errorf("Format: found %q", got)
	}
	for lsn, timeline := range map[postgres.LSN]postgres.Timeline{0: 1, 0x2FFFFFF: 1, 0x3000000: 2, 0x50001A7: 2, 0x50001A8: 4} {
		if got := h.At(4, lsn); got != timeline {
			t.Errorf("At(%s): found %d, expected %d", lsn, got, timeline)
		}
	}
	if !h.Includes(1, 0x3000000) || h.Includes(1, 0x3000001) || !h.Includes(2, 0x50001A8) || h.Includes(3, 1) {
		t.Error("Includes is wrong at a switch point")
	}
	for name, bad := range map[string]string{
		"no position": "1\n", "timeline 0": "0\t0/1\tx\n", "itself": "4\t0/1\tx\n", "younger": "5\t0/1\tx\n", "no number": "x\t0/1\n",
		"descending timelines": "2\t0/1\tx\n1\t0/2\tx\n", "descending positions": "1\t0/2\tx\n2\t0/1\tx\n", "bad position": "1\t01\tx\n",
	} {
		if h, err := postgres.ParseHistory(4, []byte(bad)); err == nil {
			t.Errorf("%s: found %+v, expected an error", name, h)
		}
	}
}

func FuzzParseHistory(f *testing.F) {
	f.Add([]byte("1\t0/3000000\tno recovery target specified\n"))
	f.Fuzz(func(t *testing.T, b []byte) {
		h, err := postgres.ParseHistory(9, b)
		if err != nil {
			return
		}
		again, err := postgres.ParseHistory(9, h.Format())
		if err != nil || len(again) != len(h) {
			t.Errorf("%q formats as %q: %v", b, h.Format(), err)
		}
	})
}
