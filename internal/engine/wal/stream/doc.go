// Package stream brings WAL to a repository as PostgreSQL writes it, within a second instead of a segment.
//
// A Streamer is a physical replication client of the protected server. It receives WAL from the start of the segment in
// progress, verifies record by record, and stores tails: objects that hold the bytes from a base up to the end of a record
// (or of the segment), long before PostgreSQL finishes the segment and its archiver asks for it. Whoever reads puts a
// segment together from a chain of tails that begins at its start.
//
// # Tails
//
// A base is the segment's start at first. As long as less than 512 KiB follow it, each tail begins there and takes the
// place of the one before; then the base moves to where that tail ended. A tail is stored at once when there was none for
// a while, then at intervals that follow the store's latency, so that WAL with a commit in it waits for at most max_lag.
// WAL without a commit waits for half of that. A server that writes nothing causes no requests. The last tail of a segment
// is left out if the whole segment is durable soon enough.
//
// The durable position is where all WAL before is durable, in tails or whole segments, without a hole. It never passes
// one: PUTs may end in any order, and fail.
//
// # Never a danger
//
// Archiving is the safety net. Without a slot nothing here holds PostgreSQL's WAL back, and what is received and not yet
// stored takes at most 64 MiB. When more waits, or the store fails for long, the Streamer forgets what it has and leaves
// the rest to whole segments; it begins again at the next segment, or reads the one in progress once more when no next one
// comes. To the server it reports durable positions only when commits wait for them or a slot follows them: otherwise a
// fast shutdown would wait for the store, and synchronous_standby_names = '*' would mean us.
//
// # Whole segments
//
// When the stream passes a segment's end, Options.Completed is told: the segment lies whole in pg_wal and can be shipped.
// Streamer.SegmentStored says that it is durable; its tails are deleted then. A store that refuses to delete keeps them.
//
// # Connections
//
// A connection is alive as long as any message comes; the Streamer asks for one after 10 s of silence and gives the
// connection up after 60. Nothing is concluded from a position that does not move. After a reconnect the stream begins at
// the start of the segment that the server writes; what is in memory is kept, and must come again with the same content.
// When a timeline ends, the next one is followed from the start of the segment in which it branches off, and its history
// is stored. Segments that went by while there was no connection are the archiver's.
//
// The package does not ship whole segments and does not look into the data directory.
package stream
