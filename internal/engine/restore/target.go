package restore

import (
	"fmt"
	"strings"
	"time"

	"github.com/pgark/terraform-provider-pgark/internal/engine/postgres"
)

// timeFormat is how times are shown and handed to PostgreSQL: to the microsecond, which is PostgreSQL's resolution.
const timeFormat = "2006-01-02 15:04:05.999999-07:00"

// TargetKind says what ends recovery.
type TargetKind string

// The kinds of targets, named as the recovery_target parameters.
const (
	Latest    TargetKind = "latest"    // the end of what is archived
	Immediate TargetKind = "immediate" // as soon as the image is consistent
	ToTime    TargetKind = "time"
	ToLSN     TargetKind = "lsn"
	ToXID     TargetKind = "xid"
	ToName    TargetKind = "name"
)

// Target is where recovery is to end. The zero value is Latest.
type Target struct {
	Kind      TargetKind
	Time      time.Time
	LSN       postgres.LSN
	XID       string // decimal
	Name      string // of a restore point
	Exclusive bool   // stop just before the target rather than just after it: time, LSN and xid only
}

// String names the target for people: "2026-11-22 14:03:10+00:00", "LSN 0/3000060", "the latest moment".
func (t Target) String() string {
	before := ""
	if t.Exclusive {
		before = "just before "
	}
	switch t.Kind {
	case Immediate:
		return "the image's first consistent moment"
	case ToTime:
		return before + t.Time.UTC().Format(timeFormat)
	case ToLSN:
		return before + "LSN " + t.LSN.String()
	case ToXID:
		return before + "transaction " + t.XID
	case ToName:
		return fmt.Sprintf("restore point %q", t.Name)
	}
	return "the latest moment"
}

// Validate reports a target that PostgreSQL would refuse or that means nothing.
func (t Target) Validate() error {
	switch t.Kind {
	case "", Latest, Immediate:
		if t.Exclusive {
			return fmt.Errorf("target %s: only a time, an LSN or a transaction can be exclusive", t.kind())
		}
	case ToTime:
		if t.Time.IsZero() {
			return fmt.Errorf("target time: expected a moment")
		}
	case ToLSN:
		if t.LSN == 0 {
			return fmt.Errorf("target LSN 0/0: expected a position in the WAL")
		}
	case ToXID:
		if t.XID == "" || strings.Trim(t.XID, "0123456789") != "" {
			return fmt.Errorf("target transaction %q: expected a decimal number", t.XID)
		}
	case ToName:
		// MAXFNAMELEN - 1: PostgreSQL refuses longer names in pg_create_restore_point too.
		if t.Name == "" || len(t.Name) > 63 || strings.ContainsAny(t.Name, "\n\r\x00") {
			return fmt.Errorf("target name %q: expected a restore point's name of 1 to 63 bytes", t.Name)
		}
		if t.Exclusive {
			return fmt.Errorf("target name %q: only a time, an LSN or a transaction can be exclusive", t.Name)
		}
	default:
		return fmt.Errorf("target kind %q: expected latest, immediate, time, lsn, xid or name", t.Kind)
	}
	return nil
}

func (t Target) kind() TargetKind {
	if t.Kind == "" {
		return Latest
	}
	return t.Kind
}
