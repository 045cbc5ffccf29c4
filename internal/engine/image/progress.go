package image

import (
	"fmt"
	"time"

	"github.com/pgark/terraform-provider-pgark/internal/engine/repository"
)

// Phase is what an image backup is busy with.
type Phase string

// The phases, in their order.
const (
	Starting   Phase = "starting"        // choosing a parent, waiting for the checkpoint of backup start
	Scanning   Phase = "scanning"        // listing files
	Copying    Phase = "copying"         // reading, comparing, uploading
	Stopping   Phase = "stopping"        // pg_control, backup stop
	Awaiting   Phase = "waiting for WAL" // until the WAL that makes the image consistent is durable
	Committing Phase = "committing"      // maps, manifest and head
	Done       Phase = "done"
)

// Progress is a moment of an image backup.
type Progress struct {
	Phase        Phase
	SID          repository.SID
	Kind         string // "full" or "incremental"
	Elapsed      time.Duration
	Copied       time.Duration // spent in Copying so far
	FilesDone    int64
	FilesTotal   int64
	BytesDone    int64 // of BytesTotal: read, or known to be unchanged
	BytesTotal   int64
	ReadBytes    int64
	ChangedBytes int64 // found new or changed
	StoredBytes  int64 // uploaded, compressed and sealed
}

// Remaining estimates how much longer Copying will take; 0 while it cannot be told.
func (p Progress) Remaining() time.Duration {
	if p.Phase != Copying || p.BytesDone == 0 || p.Copied < 2*time.Second {
		return 0
	}
	return time.Duration(float64(p.Copied) * float64(p.BytesTotal-p.BytesDone) / float64(p.BytesDone))
}

// String is one line for people.
func (p Progress) String() string {
	if p.SID == 0 || p.Phase == Starting {
		return "image: starting: waiting for PostgreSQL's checkpoint"
	}
	name := fmt.Sprintf("image %s (%s): ", p.SID, p.Kind)
	switch p.Phase {
	case Scanning:
		return name + "listing files"
	case Stopping:
		return name + "ending backup mode"
	case Awaiting:
		return name + "waiting until the WAL that it needs is in the repository"
	case Committing:
		return name + "committing"
	}
	amount := fmt.Sprintf("%s of %s read, %s changed, %s stored", byteCount(p.ReadBytes), byteCount(p.BytesTotal),
		byteCount(p.ChangedBytes), byteCount(p.StoredBytes))
	if p.Phase == Done {
		return fmt.Sprintf("%sdone in %s: %d files, %s", name, clock(p.Elapsed), p.FilesTotal, amount)
	}
	percent := 100.0
	if p.BytesTotal > 0 {
		percent = 100 * float64(p.BytesDone) / float64(p.BytesTotal)
	}
	line := fmt.Sprintf("%s%.0f %%, %d of %d files, %s", name, percent, p.FilesDone, p.FilesTotal, amount)
	if s := p.Copied.Seconds(); s >= 1 {
		line += fmt.Sprintf(", %s/s", byteCount(int64(float64(p.BytesDone)/s)))
	}
	if r := p.Remaining(); r > 0 {
		line += ", " + clock(r) + " left"
	}
	return line
}

// byteCount prints a size as people read it.
func byteCount(n int64) string {
	f, i := float64(n), 0
	units := [...]string{"B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"}
	for f >= 1023.95 && i < len(units)-1 {
		f /= 1024
		i++
	}
	if i == 0 {
		return fmt.Sprintf("%d B", n)
	}
	return fmt.Sprintf("%.1f %s", f, units[i])
}

// clock prints a duration as m:ss or h:mm:ss.
func clock(d time.Duration) string {
	s := int64(d.Round(time.Second) / time.Second)
	if s < 3600 {
		return fmt.Sprintf("%d:%02d", s/60, s%60)
	}
	return fmt.Sprintf("%d:%02d:%02d", s/3600, s/60%60, s%60)
}
