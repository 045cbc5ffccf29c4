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
// The end of a window as a position is the end of its last segment, which may hold less. As a time it is that of the
// last commit known, which stands in the headers of the WAL objects.
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
// The package neither verifies a whole image nor removes anything from a repository.
package restore
