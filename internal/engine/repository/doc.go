// Package repository keeps images and WAL of PostgreSQL clusters in an object store, as immutable objects.
//
// A [Repository] is a prefix of an [objectstore.Store]. It holds series, each of which is everything of one job,
// instance and cluster: a log of head versions ([Series.Head]), images ([ImageWriter], [Image]), WAL files
// ([Series.PutWAL]), tails of WAL ([Series.PutTail]) and session records. The package knows formats, keys and the protocol by which several machines
// share a series without losing anything. It does not know what changed in a cluster (package image), which WAL a
// restore needs (package restore), nor what may be deleted when (package retention).
//
// What follows is the repository format, version 1, for whoever writes a second implementation.
//
// # Conventions
//
// Keys are relative to the repository's prefix: a repository may be moved as a whole to another bucket or prefix, but
// its objects not to other names. Integers in containers are unsigned and big-endian; a varint is that of Go's
// encoding/binary (Protocol Buffers' varint; signed ones zigzag). BLAKE3 digests are 32 bytes. Hexadecimal digits are
// lower case, but for the names that PostgreSQL gives. Times are RFC 3339 in UTC with up to microseconds, LSNs as
// PostgreSQL prints them, system identifiers decimal strings, ids of sessions and images ("sid") strings of 16
// hexadecimal digits. Every object is created if absent and never overwritten.
//
// # Keys
//
//	repository.json                              document: what the repository is
//	<job>/owner/<n, 16 hex digits>               document: who may write under the job's name; the highest n counts
//	<job>/<instance>/<system identifier>/        a series:
//	    head/<version, 16 hex digits>            document: one version of the commit log, from 1, without holes
//	    image/<sid>/refs                         document: what the image refers to
//	    image/<sid>/manifest                     container: files, volumes, labels
//	    image/<sid>/pack/<n, 8 hex digits>       container: frames of file content
//	    image/<sid>/map/<n, 8 hex digits>        container: frames that each hold one segment map
//	    wal/<timeline, 8 HEX digits>/<name>      container: a WAL segment, .partial or .backup file
//	    wal/<timeline, 8 HEX digits>/<start, 16 HEX digits>-<end, 16 HEX digits>.tail
//	                                             container: a tail, the WAL from start to end
//	    wal/<timeline, 8 HEX digits>.history     container: a timeline history file
//	    session/<time>-<id>                      document: the account of a session; time as 20060102T150405.000000Z
//
// Names of jobs and instances are 1 to 128 bytes of printable ASCII without space, slash and backslash; an instance is
// not called "owner". Readers pass over keys that they do not know, and collection leaves them alone.
//
// # Documents
//
// A document is a JSON object in UTF-8 without line breaks, followed by one newline. Its first member is "format": 1.
// Its last is "checksum", and the bytes from there on are exactly
//
//	,"checksum":"<64 hex digits>"}<newline>
//
// The checksum is BLAKE3 over the object's key, one zero byte, and all bytes of the document before these. So a document
// that is cut short, changed, or copied to another key is found out. Check it first; then "format"; then read the
// members. Documents have at most 256 MiB. They are never encrypted: listing, statistics, retention and collection work
// without a key.
//
//	repository.json   Description
//	owner             Owner
//	head              Head; "previous" is the checksum of the version before ("" in version 1), which makes the log a chain
//	session           SessionRecord
//	refs              {"sid", "parent", "manifest": {"size", "blake3"}, "keys": [{"suite", "blob"}], "objects":
//	                  [{"object": "<sid>/pack/<n>" or "<sid>/map/<n>", "size", "blake3", "salt", "key"}]}
//
// refs name every pack and map object that the image's maps refer to, its own and those of earlier images, ascending by
// sid, packs before maps, number. size and blake3 are of the whole object, so that a holder without any key can verify
// all that an image needs. salt (hexadecimal) and the key blob (base64), which "key" picks from "keys", repeat what
// stands in the object's header, so that a restore can read any frame without reading headers.
//
// # Containers
//
// Packs, map objects, manifests and WAL objects begin with a header:
//
//	offset  size  field
//	0       8     "PGARKOBJ"
//	8       1     format, 1
//	9       1     kind: 1 pack, 2 map object, 3 manifest, 4 WAL object (a tail, too)
//	10      1     suite: 0 none, 1 AES-256-GCM
//	11      1     0
//	12      4     B, length of the key blob, at most 64 KiB; 0 in suite none
//	16      4     M, length of the meta data, at most 1 MiB
//	20      24    salt: random in suite 1, zeros in suite none
//	44      B     key blob: an age file (age-encryption.org/v1, binary) that holds the 32 bytes of the session key
//	44+B    M     meta data: JSON, not encrypted: in a WAL object WALInfo, else empty
//	44+B+M  32    BLAKE3 over the object's key, one zero byte, and all bytes of the header before this field
//
// Frames follow, numbered from 0, without gap:
//
//	offset  size  field
//	0       4     S, length of the payload; at most R
//	4       4     R, length of the payload after decompression
//	8       1     codec: 0 none (then S = R), 1 zstd (one frame of RFC 8878)
//	9       1     flags: 1 the object's last frame, 2 directory
//	10      2     0
//	12      4     items: files in a manifest's frame, frames in a directory; else 0
//	16      S     payload, encrypted in suite 1
//	16+S    16    tag
//
// R is at most 256 KiB in a pack, 32 MiB in a map object, 4 MiB in a manifest or WAL object, 768 KiB in a directory.
// What each frame authenticates ("associated data") is: the object's key, one zero byte, the kind (1 byte), the frame's
// number (4 bytes), the frame's first 16 bytes. In suite 1 payload and tag are AES-256-GCM under the object's key, with
// eight zero bytes and the frame's number (4 bytes) as the nonce. In suite none the tag is the first 16 bytes of
// BLAKE3 over the associated data and the payload: it finds damage and mix-ups, not a forger.
//
// The object's key in suite 1 is 32 bytes of HKDF-SHA256 with the session key as secret, the header's salt as salt, and
// as info: "pgark/1 object key", one zero byte, the kind (1 byte), the object's key, one zero byte, BLAKE3 over the meta
// data. Session keys are random: one for each image, one for each process and day of WAL. A nonce cannot repeat: each
// object has a salt, and so a key, of its own, is written once, and numbers its frames. That holds for a virtual machine
// that was cloned while it wrote, too, since the salt is drawn for each object anew.
//
// An object is complete only if a frame carries flag 1 and nothing, or in packs and map objects the trailer, follows it.
//
// Packs and map objects have at most 64 MiB and 65536 frames. Their last frame is the directory (flags 3; its number is
// the count of the others): for each frame 12 bytes, its offset in the object, its length with header and tag, and R.
// Then follow 16 bytes: offset and length of the directory's frame (4 bytes each), "PGARKEND". The frames lie without gap
// between header and directory.
//
// A manifest's first frame is one JSON object (see manifestJSON); each further frame is whole lines, each a JSON object
// that describes one file (see fileJSON), cut at about 1 MiB. Strings that are not UTF-8 stand as {"base64": "…"}.
//
// A WAL object's frames are the file, 4 MiB each but the last; an empty file has one empty frame. A reader checks size
// and digest of the whole against the meta data.
//
// # Tails
//
// A tail is WAL of a segment that was not whole yet: the bytes from one position to another, of one timeline and within
// one segment. It begins at the segment's start or at a record's, and ends at a record's end or at the segment's. Its
// object is a WAL object whose name, in the meta data too, is the last element of its key; its size is the difference of
// the positions. Its bytes are those of the segment, page headers included.
//
// Tails of a segment may overlap, and one may hold all that others do: a writer that has stored [start, end) stores
// [start, later end) next, and removes the first at its leisure. A reader that finds no whole segment takes a chain of
// tails, the first from the segment's start, each that follows from a position at or below the end of the one before, and
// pads with zeros what is missing to the segment's size. Where two tails overlap they have the same bytes. Once the whole
// segment is stored its tails may be removed; where they cannot be, they do no harm.
//
// # Segment maps
//
// A map says for every block of one file in which frame it lies. It stands in a frame of a map object or, if small, in
// the file's line of the manifest. All of it is varints, the differences signed ones:
//
//	1 (the version), block size, number of blocks
//	number of packs; for each: sid, n
//	number of frames; for each: difference of its pack's index to the previous frame's (the first: to 0); differences of
//	    frame number and offset to where the previous frame of the same pack ended (the first: to 0); stored length
//	    (header and tag included); R
//	number of runs; for each: number of blocks; difference of its frame's index to the previous run's (the first: to 0);
//	    block within the frame
//
// Runs follow one another from block 0 and cover every block. Blocks within a frame are block size apart; the last may
// be short. Block size is 8192 for relation files, whose blocks are always whole, and 262144 for others.
//
// # The head protocol
//
// The newest head says which images are live and which sessions run. Every step reads it, checks its precondition, and
// creates the next version; of several writers one wins, and the others read again. Heads are never deleted: a writer
// that read version n long ago and wakes up now must find version n+1 taken. Were it deleted, the writer would create it
// anew and believe to have made a step in a log that has long gone on.
//
//	begin     adds session NextSID, which pins its parent; needs the parent live. Raises NextSID
//	commit    turns a session into a live image; needs the session open, and the image's start at or above the WAL floor
//	abort     ends one's own session
//	evict     ends a session whose owner is believed dead
//	expire    takes images out of the live set
//	floor     raises the WAL floor of a timeline, not above the start of an image being restored on it
//
// A session writes objects under its own sid only. Its maps may refer to its own objects and to those that its parent's
// refs name, whatever else lies in the repository. Packs and maps, then the manifest, then the refs are durable before
// the commit.
//
// Collection reads a head, any that ever was the newest, and the refs of its live images and of the parents that its
// sessions pin. A pack or map object is garbage if those do not name it, the session of its sid is not open in that
// head, and its sid is below that head's NextSID. Manifest and refs are garbage if their image is neither live nor a
// pinned parent there, under the same two conditions.
//
// Garbage is stable: what is garbage by one head is garbage by every later one, so that collections may be late, paused
// and concurrent. Let R be what the refs of live images and pinned parents name, and what open sessions write. begin
// adds a session whose sid is above that of every object that could be judged, and pins refs that are in R already;
// commit moves a session's own objects and its parent's, all in R; every other step only shrinks R. Sids are not reused
// because the log orders the steps, names are not reused because objects are never overwritten. Clocks appear nowhere:
// neither the store's nor a machine's time decides anything. A session that was evicted while it only slept cannot
// commit, and what it uploads is garbage. Tests explore the interleavings of these steps exhaustively.
//
// The WAL floor rises before WAL below it is deleted, and commit refuses an image that starts below: so no image becomes
// live without the WAL that makes it consistent. A live image that starts below the floor keeps the segments from its
// start to its stop, and is a restore point without a window. Which WAL may be deleted is stable, too: below the floor
// live images only become fewer.
//
// # What can be rebuilt from what
//
// Each pack is complete by itself: header and directory give, to a holder of an identity, every frame. refs can be
// rebuilt from manifest and maps. The newest head can be rebuilt from its predecessor and the manifests of the images
// committed since. Manifest and maps cannot be rebuilt: frames do not say to which file they belong. A guest keeps its
// parent's maps to write the next image, not because the repository lacks them.
//
// # Compatibility
//
// Readers of this and every later version read format 1. A change that a reader of format 1 would misunderstand raises
// the number, in the objects concerned only; a reader meets a higher number with a *FormatError. Readers ignore members
// that they do not know in all documents but heads: a head is written anew from the one before, and a writer that did
// not know a member would lose it, so a new member in heads raises the format. Readers that do not know tails pass over
// them, and recover what whole segments hold.
package repository
