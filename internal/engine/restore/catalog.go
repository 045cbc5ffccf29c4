package restore

import (
	"fmt"
	"time"

	"github.com/pgark/terraform-provider-pgark/internal/engine/postgres"
)

// Window is a closed interval over which every moment can be restored.
type Window struct {
	From     time.Time         `json:"from"` // the first consistent moment
	To       time.Time         `json:"to"`   // the last commit known in the WAL
	StartLSN postgres.LSN      `json:"start_lsn"`
	EndLSN   postgres.LSN      `json:"end_lsn"`
	Timeline postgres.Timeline `json:"timeline"`
}

func (w Window) String() string {
	return fmt.Sprintf("%s to %s (LSN %s to %s, timeline %d)",
		w.From.UTC().Format(timeFormat), w.To.UTC().Format(timeFormat), w.StartLSN, w.EndLSN, w.Timeline)
}
