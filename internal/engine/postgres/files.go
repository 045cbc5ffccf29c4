package postgres

import (
	"fmt"
	"iter"
	"path"
	"strconv"
	"strings"
)

// PathClass says what a base backup does with a path of the data directory.
type PathClass int

// The classes of paths.
const (
	// KeepPath is backed up.
	KeepPath PathClass = 1
	// SkipPath is left out, with all that is below it.
	SkipPath PathClass = 2
	// EmptyPath is a directory that is backed up without its contents. If it is a symbolic link, it is restored as a
	// plain directory.
	EmptyPath PathClass = 3
	// LastPath is pg_control, which is copied after everything else.
	LastPath PathClass = 4
)

// emptyDirectories are at the top of the data directory (basebackup.c, excludeDirContents, and pg_wal).
var emptyDirectories = map[string]bool{
	"pg_wal":       true, // comes from the archive
	"pg_stat_tmp":  true, // the statistics collector's, until 14, and what extensions put there
	"pg_replslot":  true, // a restored server must not hold back WAL for consumers that it never had
	"pg_dynshmem":  true, // removed at start
	"pg_notify":    true, // the same
	"pg_serial":    true, // the same
	"pg_snapshots": true, // the same
	"pg_subtrans":  true, // zeroed at start
}

// skippedFiles are left out wherever they are (basebackup.c, excludeFiles).
var skippedFiles = map[string]bool{
	"postgresql.auto.conf.tmp": true,
	"current_logfiles.tmp":     true,
	"backup_label":             true, // of another backup; this one's comes from the server when it ends
	"tablespace_map":           true,
	"backup_manifest":          true,
	"postmaster.pid":           true,
	"postmaster.opts":          true,
}

// ClassifyPath tells what a base backup does with a path relative to the data directory, with slashes. Tablespaces are
// seen through their links: pg_tblspc/16385/PG_17_202406281/5/16390. It implements the lists of basebackup.c, the union
// of what 13 to 18 have. Unlogged relations need the directory's other names to be known: see InitForks.
func ClassifyPath(rel string) PathClass {
	name := path.Base(rel)
	switch {
	case rel == ControlFile:
		return LastPath
	case emptyDirectories[rel]:
		return EmptyPath
	case skippedFiles[name]:
		return SkipPath
	case strings.HasPrefix(name, "pgsql_tmp"): // sorts and hashes that spill; directories of them, too
		return SkipPath
	case strings.HasPrefix(name, "pg_internal.init"): // caches of the catalogue, rebuilt; perhaps with a process id behind
		return SkipPath
	}
	if top, _, below := strings.Cut(rel, "/"); below && emptyDirectories[top] {
		return SkipPath
	}
	if r, ok := ParseRelationPath(rel); ok && r.Temporary {
		return SkipPath
	}
	return KeepPath
}

// Fork is one of the files that a relation consists of.
type Fork int

// The forks of a relation, with PostgreSQL's numbers (relpath.h, ForkNumber).
const (
	MainFork           Fork = 0
	FreeSpaceMap       Fork = 1
	VisibilityMap      Fork = 2
	InitializationFork Fork = 3
)

var forkSuffixes = map[string]Fork{"": MainFork, "fsm": FreeSpaceMap, "vm": VisibilityMap, "init": InitializationFork}

// RelationSegmentBlocks is how many blocks a relation's file has before the next one begins: 1 GiB, PostgreSQL's
// default RELSEG_SIZE. Control.RelationSegmentSize tells the server's.
const RelationSegmentBlocks = 131072

// GlobalTablespace is the object id of pg_global.
const GlobalTablespace = 1664

// RelationFile is what the name of a relation's file says.
type RelationFile struct {
	Tablespace uint32 // 0: the database's default, below base/
	Database   uint32 // 0 for the shared relations in global/
	Number     uint32 // relfilenode
	Fork       Fork
	Segment    uint32 // counts the 1 GiB files of a fork
	Temporary  bool   // of a session; Backend says whose
	Backend    uint32
}

// FirstBlock is the number of the file's first block in its fork: where page checksums count from.
func (r RelationFile) FirstBlock(segmentBlocks uint32) uint32 { return r.Segment * segmentBlocks }

// ParseRelationName reads a file name in a database's directory: <number>[_<fork>][.<segment>], and of a temporary
// relation t<backend>_<number>… (reinit.c, parse_filename_for_nontemp_relation; fd.c, looks_like_temp_rel_name).
func ParseRelationName(name string) (RelationFile, bool) {
	var r RelationFile
	rest := name
	var ok bool
	if t, temporary := strings.CutPrefix(rest, "t"); temporary {
		backend, number, cut := strings.Cut(t, "_")
		if !cut {
			return RelationFile{}, false
		}
		if r.Backend, ok = parseObjectID(backend); !ok {
			return RelationFile{}, false
		}
		r.Temporary, rest = true, number
	}
	if base, segment, cut := strings.Cut(rest, "."); cut {
		if r.Segment, ok = parseObjectID(segment); !ok || r.Segment == 0 {
			return RelationFile{}, false
		}
		rest = base
	}
	if base, suffix, cut := strings.Cut(rest, "_"); cut {
		if r.Fork, ok = forkSuffixes[suffix]; !ok || suffix == "" {
			return RelationFile{}, false
		}
		rest = base
	}
	if r.Number, ok = parseObjectID(rest); !ok || r.Number == 0 {
		return RelationFile{}, false
	}
	return r, true
}

// parseObjectID reads a number as PostgreSQL prints it: no sign, no leading zeros.
func parseObjectID(s string) (uint32, bool) {
	if s == "" || s[0] == '+' || len(s) > 1 && s[0] == '0' {
		return 0, false
	}
	v, err := strconv.ParseUint(s, 10, 32)
	return uint32(v), err == nil
}

// ParseRelationPath reads the path of a relation's file, relative to the data directory and with slashes:
// global/<name>, base/<database>/<name>, pg_tblspc/<oid>/PG_<major>_<catalog version>/<database>/<name>.
func ParseRelationPath(rel string) (RelationFile, bool) {
	dir, name := path.Split(rel)
	tablespace, database, ok := ParseRelationDirectory(strings.TrimSuffix(dir, "/"))
	if !ok {
		return RelationFile{}, false
	}
	r, ok := ParseRelationName(name)
	if !ok || tablespace == GlobalTablespace && r.Temporary {
		return RelationFile{}, false
	}
	r.Tablespace, r.Database = tablespace, database
	return r, true
}

// ParseRelationDirectory tells whether a directory, relative to the data directory, holds relations, and whose.
func ParseRelationDirectory(rel string) (tablespace, database uint32, ok bool) {
	parts := strings.Split(rel, "/")
	switch {
	case rel == "global":
		return GlobalTablespace, 0, true
	case parts[0] == "base" && len(parts) == 2:
		database, ok = parseObjectID(parts[1])
		return 0, database, ok
	case parts[0] == "pg_tblspc" && len(parts) == 4:
		var ok1, ok2 bool
		tablespace, ok1 = parseObjectID(parts[1])
		database, ok2 = parseObjectID(parts[3])
		return tablespace, database, ok1 && ok2 && isTablespaceVersion(parts[2])
	}
	return 0, 0, false
}

func isTablespaceVersion(s string) bool {
	rest, ok := strings.CutPrefix(s, "PG_")
	if !ok {
		return false
	}
	major, catalog, ok := strings.Cut(rest, "_")
	if !ok {
		return false
	}
	_, ok1 := parseObjectID(major)
	_, ok2 := parseObjectID(catalog)
	return ok1 && ok2
}

// TablespaceVersionDirectory is the directory that a cluster uses in each of its tablespaces: "PG_17_202406281". Others
// belong to clusters of other versions, after pg_upgrade say, and are none of this one's business.
func TablespaceVersionDirectory(major int, catalogVersion uint32) string {
	return fmt.Sprintf("PG_%d_%d", major, catalogVersion)
}

// Checksummed tells whether the pages of a file carry checksums, if the cluster has them: all relations do, and nothing
// else (basebackup.c leaves out the same by its list noChecksumFiles: pg_control, pg_filenode.map, pg_internal.init,
// PG_VERSION).
func Checksummed(rel string) bool {
	_, ok := ParseRelationPath(rel)
	return ok
}

// InitForks are the relations of one directory that have an initialization fork: unlogged ones. Recovery overwrites
// their other forks with it, so a backup leaves those out.
type InitForks map[uint32]struct{}

// FindInitForks collects them from the names in a directory that holds relations.
func FindInitForks(names iter.Seq[string]) InitForks {
	forks := InitForks{}
	for name := range names {
		if r, ok := ParseRelationName(name); ok && r.Fork == InitializationFork && !r.Temporary {
			forks[r.Number] = struct{}{}
		}
	}
	return forks
}

// Excludes tells whether a file of the directory is left out because its relation is unlogged.
func (f InitForks) Excludes(name string) bool {
	if len(f) == 0 {
		return false
	}
	r, ok := ParseRelationName(name)
	if !ok || r.Temporary || r.Fork == InitializationFork {
		return false
	}
	_, unlogged := f[r.Number]
	return unlogged
}
