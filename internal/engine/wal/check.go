package wal

import (
	"fmt"
	"io"
	"time"

	"github.com/pgark/terraform-provider-pgark/internal/engine/postgres"
)

// check compares a segment with its name and the cluster, and takes the times of its transactions.
//
// Records that do not follow one another are reported, and stored: what PostgreSQL has written is all there is, and to
// refuse it would only fill pg_wal. A header that does not fit is another cluster's file, or none, and is refused.
func (s *Shipper) check(r *reading, kind postgres.WALFile) error {
	header := make([]byte, postgres.WALHeaderSize)
	if _, err := r.content.ReadAt(header, 0); err != nil {
		return fmt.Errorf("page header: %w", err)
	}
	if _, err := postgres.CheckSegment(kind.Segment, r.info.Size, header, s.o.SystemID); err != nil {
		return err
	}
	scanner := postgres.NewSegmentScanner(kind.Segment, s.o.SegmentSize)
	if r.memory != nil {
		_, _ = scanner.Write(r.memory) // never fails
	} else if _, err := io.Copy(scanner, io.NewSectionReader(r.content, 0, r.info.Size)); err != nil {
		return err
	}
	scan := scanner.Result()
	r.info.FirstTime, r.info.LastTime = moment(scan.FirstTime), moment(scan.LastTime)
	if scan.Problem != nil && kind.Kind == postgres.SegmentFile {
		s.o.Log.Error("wal is damaged where PostgreSQL keeps it, recovery will not get past it: take an image soon, and look at the disk",
			"name", r.info.Name, "problem", scan.Problem)
	}
	return nil
}

func moment(t time.Time) *time.Time {
	if t.IsZero() {
		return nil
	}
	return &t
}
