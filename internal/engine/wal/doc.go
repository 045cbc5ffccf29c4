// Package wal brings PostgreSQL's write-ahead log to a repository and back.
//
// # To the repository
//
// PostgreSQL calls its archive_command once for each WAL file that it has finished, one at a time, in order, until the
// command exits 0; then it may remove the file. A Shipper lives in the runner and stands behind that command (Push, a
// small client, asks it over the runner's socket). It does not wait to be asked: it looks into pg_wal/archive_status,
// where PostgreSQL marks what it has finished, and ships several files at once, so that most requests are answered from
// memory. The order in which files are acknowledged is PostgreSQL's own. Package stream, which receives WAL as it is
// written, tells it of each segment whose end has passed by: that one lies whole in pg_wal before PostgreSQL marks it,
// which on a standby it may never do.
//
// A file is read once, into memory. Its length, the segment's header (system identifier, timeline and position against
// its name) and its pages' addresses are checked; times of its first and last commit and its digest are taken; it is
// compressed, sealed and stored under its name, if absent. The same content again is success, other content is a
// repository.WALConflictError, and stays one. As many files are compressed at a time as there are CPUs, and as many
// uploaded as that makes faster, within a fixed amount of memory.
//
// What was shipped ahead is vouched for only as long as the file is what was read: the same inode, size, and times of
// change. A file that changed within a tick of the file system's clock before it was read is read again when it is asked
// for.
//
// # While the repository is away
//
// The answer is yes only when the object is durable: in the repository, or once that has taken nothing for some seconds,
// in a Spool, a folder for sealed files on this machine. One upload at a time goes on asking whether the repository is
// back. Then the folder is emptied in order, while newer files go straight to the repository; they share the places for
// uploads. Where the folder is full, or none is given, requests are answered no after a while: PostgreSQL keeps its WAL,
// and asks again. Nothing is ever dropped.
//
// # Gaps
//
// Segments become durable in any order. For each timeline the Shipper knows up to which one all are. When a later one is
// durable and one before it is neither on its way, nor in pg_wal (then it is shipped now), nor in the repository, it is
// lost: a gap, which is told of once, at once. WAL that no image needs, or that retention has removed, makes no gap.
//
// # And back
//
// A Fetcher answers restore_command (Fetch is its client). It fetches the segments that follow ahead of time into a ring
// of files, from where the client moves them into place. How many lie ready, and how many are fetched at one time,
// follows what a download takes and what replay takes; a file that is waited for far longer than usual is asked for a
// second time.
//
// A segment that was never stored whole is put together from what was streamed of it (repository.Tail): a chain of tails
// from its beginning on, every record verified, completed with zeros. The unfinished last segment of a timeline (.partial,
// archived when another timeline took over) stands in for it, too; where both are there they must agree, and the longer
// one is taken. A chain that comes to the segment's end is as good as the whole segment.
//
// What the archive does not hold, of the segment as a whole or behind what there is of it, is one of four things:
//
//   - the end of the archive: nothing that needs it is there. PostgreSQL ends recovery, or waits for more.
//   - a gap: later WAL of the timeline is there, or a timeline that branches off behind the end and has no copy of what is
//     missing, or there is a position behind it that must be reached. A *GapError, never an end.
//   - damage: the name of a tail tells that there was more, but it cannot be read, nor do others hold what it held. A
//     *TailError, never an end.
//   - not known: the repository cannot be reached. An error, too.
//
// Where recovery has a target (FetcherOptions.Stop), what lies behind it is of no concern: PostgreSQL itself takes it for
// an error if it does not find its target.
//
// The package neither decides what WAL is still needed nor removes any.
package wal
