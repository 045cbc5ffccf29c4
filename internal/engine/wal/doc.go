// Package wal brings PostgreSQL's write-ahead log to a repository and back.
//
// # To the repository
//
// PostgreSQL calls its archive_command once for each WAL file that it has finished, one at a time, in order, until the
// command exits 0; then it may remove the file. A Shipper lives in the runner and stands behind that command (Push, a
// small client, asks it over the runner's socket). It does not wait to be asked: it looks into pg_wal/archive_status,
// where PostgreSQL marks what it has finished, and ships several files at once, so that most requests are answered from
// memory. The order in which files are acknowledged is PostgreSQL's own.
//
// A file is read once. Its length, the segment's header (system identifier, timeline and position against its name) and
// its pages' addresses are checked; times of its first and last commit and its digest are taken; it is compressed,
// sealed and stored under its name, if absent. The answer is yes only when the object is durable. The same content
// again is success, other content is a repository.WALConflictError, and stays one.
//
// What was shipped ahead is vouched for only as long as the file is what was read: the same inode, size, and times of
// change. A file that changed within a tick of the file system's clock before it was read is read again when it is asked
// for.
//
// While the repository is away, requests are answered no after a while: PostgreSQL keeps its WAL, and asks again. The
// Shipper goes on trying meanwhile, with all the files that wait.
//
// # And back
//
// A Fetcher answers restore_command (Fetch is its client). It fetches the segments that follow ahead of time into a ring
// of files, from where the client moves them into place. What the archive does not hold is one of three things:
//
//   - the end of the archive: neither the segment nor anything that needs it is there. PostgreSQL ends recovery, or
//     waits for more.
//   - a gap: a later segment of the timeline is there, or a timeline that branches off behind the segment, or the
//     segment lies before a position that must be reached. A *GapError, never an end.
//   - not known: the repository cannot be reached. An error, too.
//
// The unfinished last segment of a timeline (.partial, archived when another timeline took over) stands in for the whole
// one where that is absent and nothing on its timeline follows.
//
// The package neither decides what WAL is still needed nor removes any.
package wal
