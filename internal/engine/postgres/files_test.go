package postgres_test

import (
	"slices"
	"testing"

	"github.com/pgark/terraform-provider-pgark/internal/engine/postgres"
)

func TestClassifyPath(t *testing.T) {
	for path, class := range map[string]postgres.PathClass{
		"PG_VERSION":                      postgres.KeepPath,
		"base":                            postgres.KeepPath,
		"base/5/1259":                     postgres.KeepPath,
		"base/5/PG_VERSION":               postgres.KeepPath,
		"base/5/pg_filenode.map":          postgres.KeepPath,
		"base/5/pg_internal.init":         postgres.SkipPath,
		"base/5/pg_internal.init.123":     postgres.SkipPath,
		"global/pg_internal.init":         postgres.SkipPath,
		"global/pg_control":               postgres.LastPath,
		"global/1262":                     postgres.KeepPath,
		"base/pgsql_tmp":                  postgres.SkipPath,
		"base/pgsql_tmp/pgsql_tmp1.0":     postgres.SkipPath,
		"base/5/t3_16400":                 postgres.SkipPath,
		"base/5/t3_16400_fsm":             postgres.SkipPath,
		"base/5/t3_16400_vm.1":            postgres.SkipPath,
		"base/5/t3_16400.x":               postgres.KeepPath,
		"pg_wal":                          postgres.EmptyPath,
		"pg_wal/000000010000000000000001": postgres.SkipPath,
		"pg_wal/archive_status":           postgres.SkipPath,
		"pg_replslot":                     postgres.EmptyPath,
		"pg_replslot/slot/state":          postgres.SkipPath,
		"pg_stat_tmp":                     postgres.EmptyPath,
		"pg_stat":                         postgres.KeepPath,
		"pg_xact/0000":                    postgres.KeepPath,
		"pg_logical/mappings":             postgres.KeepPath,
		"pg_tblspc/16385":                 postgres.KeepPath,
		"postmaster.pid":                  postgres.SkipPath,
		"postmaster.opts":                 postgres.SkipPath,
		"backup_label":                    postgres.SkipPath,
		"backup_label.old":                postgres.KeepPath,
		"tablespace_map":                  postgres.SkipPath,
		"backup_manifest":                 postgres.SkipPath,
		"postgresql.auto.conf":            postgres.KeepPath,
		"postgresql.auto.conf.tmp":        postgres.SkipPath,
		"current_logfiles":                postgres.KeepPath,
		"current_logfiles.tmp":            postgres.SkipPath,
		"pg_tblspc/16385/PG_17_202406281/5/t1_16390": postgres.SkipPath,
		"pg_tblspc/16385/PG_17_202406281/pgsql_tmp":  postgres.SkipPath,
		"pg_tblspc/16385/PG_17_202406281/5/16390":    postgres.KeepPath,
	} {
		if got := postgres.ClassifyPath(path); got != class {
			t.Errorf("%s: found class %d, expected %d", path, got, class)
		}
	}
}

func TestParseRelationPath(t *testing.T) {
	for path, expected := range map[string]postgres.RelationFile{
		"base/5/1259":                               {Database: 5, Number: 1259},
		"base/5/1259_fsm":                           {Database: 5, Number: 1259, Fork: postgres.FreeSpaceMap},
		"base/5/1259_vm.3":                          {Database: 5, Number: 1259, Fork: postgres.VisibilityMap, Segment: 3},
		"base/16384/16400_init":                     {Database: 16384, Number: 16400, Fork: postgres.InitializationFork},
		"base/16384/16400.12":                       {Database: 16384, Number: 16400, Segment: 12},
		"base/5/4294967295":                         {Database: 5, Number: 4294967295},
		"base/5/t12_16400.1":                        {Database: 5, Number: 16400, Segment: 1, Temporary: true, Backend: 12},
		"global/1262":                               {Tablespace: postgres.GlobalTablespace, Number: 1262},
		"pg_tblspc/16385/PG_15_202209061/5/16390.1": {Tablespace: 16385, Database: 5, Number: 16390, Segment: 1},
	} {
		got, ok := postgres.ParseRelationPath(path)
		if !ok || got != expected {
			t.Errorf("%s: found %+v, %v; expected %+v", path, got, ok, expected)
		}
	}
	for _, path := range []string{
		"", "base", "base/5", "base/5/", "base/5/0", "base/5/01", "base/5/x", "base/5/1259_", "base/5/1259_foo", "base/5/1259.0", "base/5/1259.01",
		"base/5/1259.", "base/5/1259.1.2", "base/5/1259_fsm_vm", "base/5/4294967296", "base/5/t_1", "base/5/t1", "base/x/1259", "base/5/6/7",
		"global/pg_control", "global/pg_filenode.map", "global/PG_VERSION", "pg_tblspc/16385/5/16390", "pg_tblspc/16385/PG_x/5/16390",
		"pg_xact/0000", "1259", "base/5/+1", "base/5/1259 ",
	} {
		if got, ok := postgres.ParseRelationPath(path); ok {
			t.Errorf("%q: found %+v, expected no relation", path, got)
		}
	}
	if b := (postgres.RelationFile{Segment: 3}).FirstBlock(postgres.RelationSegmentBlocks); b != 393216 {
		t.Errorf("FirstBlock: %d", b)
	}
}

func TestInitForks(t *testing.T) {
	names := []string{"16400", "16400.1", "16400_fsm", "16400_init", "16401", "16401_vm", "t1_16400", "PG_VERSION", "164000"}
	forks := postgres.FindInitForks(slices.Values(names))
	var left []string
	for _, n := range names {
		if !forks.Excludes(n) {
			left = append(left, n)
		}
	}
	if expected := []string{"16400_init", "16401", "16401_vm", "t1_16400", "PG_VERSION", "164000"}; !slices.Equal(left, expected) {
		t.Errorf("found %q, expected %q", left, expected)
	}
}

func FuzzParseRelationPath(f *testing.F) {
	f.Add("base/5/t12_16400_fsm.1")
	f.Add("pg_tblspc/16385/PG_15_202209061/5/16390.1")
	f.Fuzz(func(_ *testing.T, path string) {
		postgres.ParseRelationPath(path)
		postgres.ClassifyPath(path)
	})
}
