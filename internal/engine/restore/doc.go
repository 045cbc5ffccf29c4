// Package restore tells what a repository can bring back, and brings it back.
//
// Catalog lists the images of each series, the windows over which every moment can be restored, and the gaps between
// them. Run restores: it chooses the image, checks that the target can be reached before it touches anything, writes the
// files, leaves the settings for PostgreSQL's recovery and, if asked to, starts the server and waits until the target
// has been reached.
//
// # What can be restored
//
// A timeline's history names its ancestors and where each was left, so the WAL from any moment to the end of a timeline
// is one path through the segments of several timelines. Along a path, the segments that are there without a hole form a
// stretch. An image can be restored along a path if it lies on it, before the path leaves the image's timeline, and one
// stretch holds all WAL from the image's start to its stop. Every moment from the stop of the first such image of a
// stretch to the stretch's end can be restored: a window. What lies behind a hole can be restored only from an image
// taken behind it.
//
// A segment that is not there whole is there as far as what was streamed of it goes (repository.Tail), or what its
// timeline was left with (.partial). So the end of a window as a position is the end of its last record, or of a last
// segment that is there whole, which may hold less. As a time it is that of the last commit known, which stands in the
// headers of the WAL objects.
//
// A timeline whose history is missing descends from nothing, for PostgreSQL as for us: only its own images can be
// restored along it. One whose history is encrypted, while whoever lists has no identity, is taken to continue the one
// before it.
//
// An object that is found to be damaged counts as absent. Catalog reads headers only, and few of them; CheckWAL reads
// everything.
//
// # What a restore leaves when it is interrupted
//
// The directory holds a marker file (markerName) from the first to the last, and no global/pg_control until everything
// else is durable: PostgreSQL refuses to start there, and a repeated restore says what it found. It is never continued.
//
// # Afterwards
//
// The server that comes up recovers from the archive by restore_command, with archiving turned off: a copy must not
// write into the series that it came from. What recovery settings were appended to postgresql.auto.conf stand between
// two comment lines and are taken out again once a started server has reached its target and left recovery.
//
// The package neither verifies images nor removes anything from a repository.
package restore
