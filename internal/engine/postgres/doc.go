// Package postgres knows PostgreSQL 13 to 18 from outside: the names and contents of its files, and how to talk to a
// running server. It decides nothing about backups.
//
// Files: names of WAL files (SegmentName, WALFile), timeline histories (History), pg_control (Control), headers and
// records of WAL segments (CheckSegment, SegmentScanner), pages and their checksums (VerifyPage), what a base backup
// leaves out and which files hold relations (ClassifyPath, ParseRelationPath), postmaster.pid (Postmaster), backup_label
// (BackupLabel).
//
// Servers: Connect as the instance's owner over the unix socket, then StartBackup, ReadServer, AlterSystem, Reload,
// ForceSegment.
//
// All formats are those of little-endian 64-bit builds with the default block sizes (8 KiB pages in files and WAL);
// others are refused by name (UnsupportedError, SegmentError), never misread. Where a layout differs between majors the
// constants say so. Everything that parses takes bytes from a disk that may lie: parsers return errors, and never panic
// or allocate by a length they were told.
package postgres
