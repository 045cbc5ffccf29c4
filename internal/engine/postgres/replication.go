package postgres

import (
	"context"
	"errors"
	"time"
)

var errReplicationNotBuilt = errors.New("not built yet")

// Replication is a physical replication connection (protocol-replication in PostgreSQL's documentation). Not safe for
// concurrent use, except that Report may be called while Receive waits.
type Replication struct{}

// System is what IDENTIFY_SYSTEM answers.
type System struct {
	ID       SystemID
	Timeline Timeline
	Flushed  LSN // on a standby: replayed or received, as the server says
}

// StreamMessage is what Receive returns: WAL, or a sign of life.
type StreamMessage struct {
	Start     LSN    // of Data
	Data      []byte // valid until the next Receive; empty: a keepalive
	ServerEnd LSN    // where the server's WAL ended when it sent this
	SentAt    time.Time
	Reply     bool // the server wants a Report at once
}

// TimelineEnd says that the server has streamed a timeline to its end and that another one follows.
type TimelineEnd struct {
	Next  Timeline
	Begin LSN // of Next
}

func (e *TimelineEnd) Error() string { return "the timeline has ended" }

// ConnectReplication opens a replication connection over the server's unix socket, as Connect does. application is what
// pg_stat_replication shows and synchronous_standby_names names.
func ConnectReplication(ctx context.Context, o ConnectOptions, application string) (*Replication, error) {
	return nil, errReplicationNotBuilt
}

// Identify asks which cluster this is and where its WAL stands.
func (r *Replication) Identify(ctx context.Context) (System, error) {
	return System{}, errReplicationNotBuilt
}

// History fetches the history file of a timeline; timeline 1 has none.
func (r *Replication) History(ctx context.Context, t Timeline) ([]byte, error) {
	return nil, errReplicationNotBuilt
}

// EnsureSlot makes the permanent physical slot if it is absent, reserving WAL at once, and says from where it holds WAL.
func (r *Replication) EnsureSlot(ctx context.Context, slot string) (LSN, error) {
	return 0, errReplicationNotBuilt
}

// Start begins to stream t from a position, on a slot if one is named.
func (r *Replication) Start(ctx context.Context, t Timeline, from LSN, slot string) error {
	return errReplicationNotBuilt
}

// Receive waits for the next message. *TimelineEnd after the last one of a timeline; the connection can Start again then.
func (r *Replication) Receive(ctx context.Context) (StreamMessage, error) {
	return StreamMessage{}, errReplicationNotBuilt
}

// Report tells the server how far WAL was received and how far it is durable (write, flush and apply position), and asks
// for an answer if ping is set.
func (r *Replication) Report(ctx context.Context, received, durable LSN, ping bool) error {
	return errReplicationNotBuilt
}

// Close ends the connection.
func (r *Replication) Close() error { return nil }
