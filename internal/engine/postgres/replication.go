package postgres

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"regexp"
	"strconv"
	"sync"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgproto3"
)

// Replication is a physical replication connection (protocol-replication in PostgreSQL's documentation). Not safe for
// concurrent use, except that Report and Close may be called while Receive waits.
//
// A call whose context ends leaves the connection as it is: what has come of a message is kept, and Receive goes on with
// it. Only a write that was cut short, a lost connection and a server that ends the session make it useless: then
// Broken tells so, and every call fails.
type Replication struct {
	conn     net.Conn
	frontend *pgproto3.Frontend
	options  ConnectOptions // of the ordinary connection that looks at slots
	where    string         // begins errors
	pending  reply          // what a reply that is under way has given so far

	mu    sync.Mutex // guards what follows, and writing to conn
	state replicationState
	cause error  // why the state is broken
	out   []byte // for messages to be sent
}

// replicationState is what the server expects or does.
type replicationState int

const (
	replicationIdle      replicationState = 0 // it waits for a command
	replicationReplying  replicationState = 1 // its reply to a command is under way
	replicationStreaming replicationState = 2 // it sends WAL
	replicationBroken    replicationState = 3
)

// reply is the reply to a command: its only rows, and the error that stands in its place.
type reply struct {
	rows [][]string // null: ""
	err  error
}

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
	ServerEnd LSN    // where the server's WAL ended when it sent this; in a keepalive: how far it has sent
	SentAt    time.Time
	Reply     bool // the server wants a Report at once
}

// TimelineEnd says that the server has streamed a timeline to its end and that another one follows.
type TimelineEnd struct {
	Next  Timeline
	Begin LSN // of Next
}

// Error says which timeline goes on, and where.
func (e *TimelineEnd) Error() string {
	return fmt.Sprintf("the timeline has ended at %s, where timeline %d goes on", e.Begin, uint32(e.Next))
}

// ErrServerEnded says that the server has ended the stream in order, having sent all its WAL: it shuts down.
var ErrServerEnded = errors.New("the server shuts down: it has sent all its WAL and ended the stream")

// maxReplicationMessage bounds what one message of the server may make us allocate. WAL comes in pieces of at most 128 KiB
// (MAX_SEND_SIZE in walsender.c); history files, which come whole, are a line for each timeline.
const maxReplicationMessage = 16 << 20

// ConnectReplication opens a replication connection over the server's unix socket, as Connect does. application is what
// pg_stat_replication shows and synchronous_standby_names names.
//
// The role needs the attribute REPLICATION, and pg_hba.conf a line for the "database" replication. Errors are those of
// Connect, and RefusalOf judges them.
func ConnectReplication(ctx context.Context, o ConnectOptions, application string) (*Replication, error) {
	t, err := o.target()
	if err != nil {
		return nil, err
	}
	t.config.RuntimeParams["application_name"] = application
	t.config.RuntimeParams["replication"] = "true"
	conn, err := pgconn.ConnectConfig(ctx, &t.config.Config)
	if err != nil {
		return nil, fmt.Errorf("%s for replication as %s: %w", t.where, t.config.User, err)
	}
	h, err := conn.Hijack()
	if err != nil {
		return nil, fmt.Errorf("%s for replication: %w", t.where, err)
	}
	h.Frontend.SetMaxBodyLen(maxReplicationMessage)
	return &Replication{conn: h.Conn, frontend: h.Frontend, options: o, where: "replication from " + t.socket}, nil
}

// Identify asks which cluster this is and where its WAL stands.
func (r *Replication) Identify(ctx context.Context) (System, error) {
	var s System
	row, err := r.row(ctx, "IDENTIFY_SYSTEM", 3)
	if err != nil {
		return System{}, err
	}
	fail := func(err error) (System, error) { return System{}, fmt.Errorf("%s: IDENTIFY_SYSTEM: %w", r.where, err) }
	if s.ID, err = ParseSystemID(row[0]); err != nil {
		return fail(err)
	}
	if s.Timeline, err = parseTimeline(row[1]); err != nil {
		return fail(err)
	}
	if s.Flushed, err = ParseLSN(row[2]); err != nil {
		return fail(err)
	}
	return s, nil
}

// History fetches the history file of a timeline; timeline 1 has none.
func (r *Replication) History(ctx context.Context, t Timeline) ([]byte, error) {
	command := fmt.Sprintf("TIMELINE_HISTORY %d", uint32(t))
	row, err := r.row(ctx, command, 2)
	if err != nil {
		return nil, err
	}
	if expected := HistoryFileName(t); row[0] != expected {
		return nil, fmt.Errorf("%s: %s: found the file %q, expected %q", r.where, command, row[0], expected)
	}
	return []byte(row[1]), nil
}

// slotName is what PostgreSQL allows (ReplicationSlotValidateName).
var slotName = regexp.MustCompile(`^[a-z0-9_]{1,63}$`)

// EnsureSlot makes the permanent physical slot if it is absent, reserving WAL at once, and says from where it holds WAL.
// A slot that has lost its WAL (max_slot_wal_keep_size), or never held any, is made anew: it would hold none until
// something is received on it. A logical slot of that name is an error.
func (r *Replication) EnsureSlot(ctx context.Context, slot string) (LSN, error) {
	if !slotName.MatchString(slot) {
		return 0, fmt.Errorf("replication slot %q: expected 1 to 63 lower case letters, digits and underscores", slot)
	}
	for made := 0; ; made++ {
		kept, err := r.slot(ctx, slot)
		if err != nil {
			return 0, err
		}
		switch {
		case kept.from != 0:
			return kept.from, nil
		case made > 1:
			return 0, fmt.Errorf("replication slot %s: found no WAL reserved by it right after it was made", slot)
		case kept.present:
			if err := r.DropSlot(ctx, slot); err != nil {
				return 0, err
			}
		}
		_, err = r.command(ctx, "CREATE_REPLICATION_SLOT "+slot+" PHYSICAL RESERVE_WAL")
		if err != nil && !isCode(err, "42710") { // duplicate_object: somebody was faster
			return 0, err
		}
	}
}

// keptWAL is what a slot holds.
type keptWAL struct {
	present bool
	from    LSN // 0: nothing, or not any more
}

// slot looks at a slot over a connection of its own: READ_REPLICATION_SLOT came with 15 and does not tell whether WAL was
// lost.
func (r *Replication) slot(ctx context.Context, slot string) (keptWAL, error) {
	fail := func(err error) (keptWAL, error) { return keptWAL{}, fmt.Errorf("replication slot %s: %w", slot, err) }
	conn, err := Connect(ctx, r.options)
	if err != nil {
		return fail(err)
	}
	defer closeNow(conn)
	var kind, reserved, status string
	err = conn.QueryRow(ctx, `select slot_type, coalesce(restart_lsn::text, ''), coalesce(wal_status, '')
		from pg_catalog.pg_replication_slots where slot_name = $1`, slot).Scan(&kind, &reserved, &status)
	switch {
	case errors.Is(err, pgx.ErrNoRows):
		return keptWAL{}, nil
	case err != nil:
		return fail(err)
	case kind != "physical":
		return fail(fmt.Errorf("found a %s slot, expected a physical one: drop it, or give the job another name", kind))
	case reserved == "" || status == "lost":
		return keptWAL{present: true}, nil
	}
	from, err := ParseLSN(reserved)
	if err != nil {
		return fail(err)
	}
	return keptWAL{present: true, from: from}, nil
}

// DropSlot removes a slot; one that is absent is no error, one that is in use is.
func (r *Replication) DropSlot(ctx context.Context, slot string) error {
	if !slotName.MatchString(slot) {
		return fmt.Errorf("replication slot %q: expected 1 to 63 lower case letters, digits and underscores", slot)
	}
	if _, err := r.command(ctx, "DROP_REPLICATION_SLOT "+slot); err != nil && !isCode(err, "42704") { // undefined_object
		return err
	}
	return nil
}

// Start begins to stream t from a position, on a slot if one is named. If t ends just there, the error is a *TimelineEnd
// at once. After a refusal by the server (a *pgconn.PgError) the connection can be used for another command; after the end
// of ctx it cannot. Servers see only when they begin to send that they do not have that WAL (IsWALRemoved), or not yet:
// then the refusal comes with Receive.
func (r *Replication) Start(ctx context.Context, t Timeline, from LSN, slot string) error {
	command := "START_REPLICATION "
	if slot != "" {
		if !slotName.MatchString(slot) {
			return fmt.Errorf("replication slot %q: expected 1 to 63 lower case letters, digits and underscores", slot)
		}
		command += "SLOT " + slot + " "
	}
	command += fmt.Sprintf("PHYSICAL %s TIMELINE %d", from, uint32(t))
	rows, err := r.command(ctx, command)
	if err != nil || r.current() == replicationStreaming {
		return err
	}
	return r.timelineEnd(rows)
}

// Receive waits for the next message. *TimelineEnd after the last one of a timeline; the connection can Start again then,
// as it can after an error of the server that did not end the session (Broken). After the end of ctx, whose cause is the
// error then, nothing is lost, and Receive can be called again.
func (r *Replication) Receive(ctx context.Context) (StreamMessage, error) {
	// A reply is under way if the context of an earlier call ended while the stream did.
	if s := r.current(); s != replicationStreaming && s != replicationReplying {
		return StreamMessage{}, r.unexpectedState(s, "receive WAL", "a stream that was started")
	}
	for {
		msg, err := r.next(ctx)
		if err != nil {
			return StreamMessage{}, err
		}
		if data, ok := msg.(*pgproto3.CopyData); ok && r.current() == replicationStreaming {
			return r.decode(data.Data)
		}
		done, err := r.step(msg)
		if err != nil {
			return StreamMessage{}, err
		}
		if done {
			rows, err := r.take()
			if err != nil {
				return StreamMessage{}, err
			}
			return StreamMessage{}, r.timelineEnd(rows)
		}
	}
}

// The layouts of what travels in CopyData messages: a letter, then numbers of eight bytes each, big endian, times in
// microseconds since 2000 (protocol-replication in PostgreSQL's documentation).
const (
	walDataHeader   = 1 + 8 + 8 + 8         // 'w', start of the data, end of the server's WAL, time
	keepaliveLength = 1 + 8 + 8 + 1         // 'k', end of what was sent, time, whether a reply is wanted (one byte)
	statusLength    = 1 + 8 + 8 + 8 + 8 + 1 // 'r', written, flushed, applied, time, whether a reply is wanted (one byte)
)

// serverEpoch is the beginning of PostgreSQL's time, in microseconds since 1970.
const serverEpoch = 946684800 * 1_000_000

func (r *Replication) decode(b []byte) (StreamMessage, error) {
	number := func(at int) uint64 { return binary.BigEndian.Uint64(b[at:]) }
	when := func(at int) time.Time { return time.UnixMicro(int64(number(at)) + serverEpoch).UTC() }
	switch {
	case len(b) > walDataHeader && b[0] == 'w':
		return StreamMessage{Start: LSN(number(1)), ServerEnd: LSN(number(9)), SentAt: when(17), Data: b[walDataHeader:]}, nil
	case len(b) == keepaliveLength && b[0] == 'k':
		return StreamMessage{ServerEnd: LSN(number(1)), SentAt: when(9), Reply: b[17] != 0}, nil
	}
	kind := "nothing"
	if len(b) > 0 {
		kind = strconv.QuoteRune(rune(b[0]))
	}
	return StreamMessage{}, r.breakOff(fmt.Errorf("found a message of %d bytes that begins with %s, expected WAL or a keepalive", len(b), kind))
}

// Report tells the server how far WAL was received and how far it is durable (write, flush and apply position), and asks
// for an answer if ping is set. It does nothing while nothing is streamed, so that it may race with the stream's end.
//
// A durable position of 0 says nothing about durability. Then the server cannot take this connection for a synchronous
// standby, which one that matches synchronous_standby_names = '*' would be, and a fast shutdown waits only until all
// WAL is received. With a durable position it waits, without a limit, until that has reached the end of WAL. A slot
// moves with the durable position only.
func (r *Replication) Report(ctx context.Context, received, durable LSN, ping bool) error {
	var b [statusLength]byte
	b[0] = 'r'
	binary.BigEndian.PutUint64(b[1:], uint64(received))
	binary.BigEndian.PutUint64(b[9:], uint64(durable))
	binary.BigEndian.PutUint64(b[17:], uint64(durable))
	binary.BigEndian.PutUint64(b[25:], uint64(time.Now().UnixMicro()-serverEpoch))
	if ping {
		b[33] = 1
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	switch r.state {
	case replicationBroken:
		return r.cause
	case replicationStreaming:
		return r.send(ctx, &pgproto3.CopyData{Data: b[:]})
	}
	return nil
}

// Broken tells whether the connection is of no more use.
func (r *Replication) Broken() bool { return r.current() == replicationBroken }

// Close ends the connection. A Receive that waits fails.
func (r *Replication) Close() error {
	// Whoever writes now must not keep us: the server may have stopped reading.
	_ = r.conn.SetWriteDeadline(time.Now().Add(100 * time.Millisecond))
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.state != replicationBroken {
		r.state, r.cause = replicationBroken, fmt.Errorf("%s: %w", r.where, net.ErrClosed)
		// A courtesy: without it the server's log speaks of an unexpected end of file.
		if b, err := (&pgproto3.Terminate{}).Encode(nil); err == nil {
			_, _ = r.conn.Write(b)
		}
	}
	if err := r.conn.Close(); err != nil && !errors.Is(err, net.ErrClosed) {
		return fmt.Errorf("%s: close: %w", r.where, err)
	}
	return nil
}

// IsWALRemoved tells whether an error of Start or Receive means that the server does not have that WAL any more
// ("requested WAL segment … has already been removed").
func IsWALRemoved(err error) bool { return isCode(err, "58P01") }

func isCode(err error, code string) bool {
	var pg *pgconn.PgError
	return errors.As(err, &pg) && pg.Code == code
}

// command sends a command and reads the reply to its end, or until the server streams.
func (r *Replication) command(ctx context.Context, command string) ([][]string, error) {
	r.mu.Lock()
	s, err := r.state, error(nil)
	if s == replicationIdle {
		if err = r.send(ctx, &pgproto3.Query{String: command}); err == nil {
			r.state, r.pending = replicationReplying, reply{}
		}
	}
	r.mu.Unlock()
	if s != replicationIdle {
		return nil, r.unexpectedState(s, command, "one that waits for a command")
	}
	if err != nil {
		return nil, fmt.Errorf("%s: %w", command, err)
	}
	for {
		msg, err := r.next(ctx)
		if err != nil {
			if ctx.Err() != nil {
				// Nobody is going to read the rest of this reply.
				_ = r.breakOff(fmt.Errorf("%s was abandoned: %w", command, err))
			}
			return nil, fmt.Errorf("%s: %w", command, err)
		}
		if _, ok := msg.(*pgproto3.CopyBothResponse); ok {
			r.become(replicationStreaming)
			return nil, nil
		}
		done, err := r.step(msg)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", command, err)
		}
		if done {
			rows, err := r.take()
			if err != nil {
				return nil, fmt.Errorf("%s: %w", command, err)
			}
			return rows, nil
		}
	}
}

// row is command for those that answer with one row.
func (r *Replication) row(ctx context.Context, command string, columns int) ([]string, error) {
	rows, err := r.command(ctx, command)
	if err != nil {
		return nil, err
	}
	if len(rows) != 1 || len(rows[0]) < columns {
		return nil, fmt.Errorf("%s: %s: found %d rows, expected one of at least %d columns", r.where, command, len(rows), columns)
	}
	return rows[0], nil
}

// step takes a message of a reply, or of a stream's end; done is set with the last one.
func (r *Replication) step(msg pgproto3.BackendMessage) (done bool, err error) {
	switch msg := msg.(type) {
	case *pgproto3.DataRow:
		row := make([]string, len(msg.Values))
		for i, v := range msg.Values {
			row[i] = string(v)
		}
		r.pending.rows = append(r.pending.rows, row)
	case *pgproto3.CopyDone:
		// The server is at the timeline's end. It goes on when we have said the same.
		r.mu.Lock()
		defer r.mu.Unlock()
		if r.state == replicationStreaming {
			r.state, r.pending = replicationReplying, reply{}
			return false, r.send(context.Background(), &pgproto3.CopyDone{})
		}
	case *pgproto3.CommandComplete:
		// In the middle of a stream it is what a server says that shuts down, and the last thing that it says.
		if r.current() == replicationStreaming {
			return false, r.breakOff(ErrServerEnded)
		}
	case *pgproto3.ErrorResponse:
		refusal := pgconn.ErrorResponseToPgError(msg)
		if refusal.SeverityUnlocalized == "FATAL" || refusal.SeverityUnlocalized == "PANIC" {
			return false, r.breakOff(refusal)
		}
		r.pending = reply{err: fmt.Errorf("%s: %w", r.where, refusal)}
		r.become(replicationReplying) // until it is ready
	case *pgproto3.ReadyForQuery:
		r.become(replicationIdle)
		return true, nil
	case *pgproto3.RowDescription, *pgproto3.NoticeResponse, *pgproto3.ParameterStatus, *pgproto3.CopyData:
		// Nothing that matters here.
	default:
		return false, r.breakOff(fmt.Errorf("found an unexpected message %T", msg))
	}
	return false, nil
}

// take returns the reply that step has gathered.
func (r *Replication) take() ([][]string, error) {
	p := r.pending
	r.pending = reply{}
	return p.rows, p.err
}

// timelineEnd reads the row that ends a stream.
func (r *Replication) timelineEnd(rows [][]string) error {
	if len(rows) != 1 || len(rows[0]) < 2 {
		return fmt.Errorf("%s: found %d rows at the end of a timeline, expected one with the next timeline and its beginning", r.where, len(rows))
	}
	next, err := parseTimeline(rows[0][0])
	if err != nil {
		return fmt.Errorf("%s: end of a timeline: %w", r.where, err)
	}
	begin, err := ParseLSN(rows[0][1])
	if err != nil {
		return fmt.Errorf("%s: end of a timeline: %w", r.where, err)
	}
	return &TimelineEnd{Next: next, Begin: begin}
}

// next reads a message. If ctx ends first, what has come of one stays in the frontend's buffer.
func (r *Replication) next(ctx context.Context) (pgproto3.BackendMessage, error) {
	release, err := r.limit(ctx, r.conn.SetReadDeadline)
	if err != nil {
		return nil, err
	}
	msg, err := r.frontend.Receive()
	release()
	switch {
	case err == nil:
		return msg, nil
	case errors.Is(err, os.ErrDeadlineExceeded) && ctx.Err() != nil:
		return nil, context.Cause(ctx)
	case errors.Is(err, io.ErrUnexpectedEOF):
		err = fmt.Errorf("the server has closed the connection: %w", err)
	}
	return nil, r.breakOff(err)
}

// limit lets reads or writes fail once ctx ends, until release.
func (r *Replication) limit(ctx context.Context, set func(time.Time) error) (release func(), err error) {
	if ctx.Err() != nil {
		return nil, context.Cause(ctx)
	}
	if ctx.Done() == nil {
		return func() {}, nil
	}
	ended := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		_ = set(time.Unix(1, 0)) // of a closed connection; whoever uses it sees so
		close(ended)
	})
	return func() {
		if !stop() {
			<-ended
			_ = set(time.Time{})
		}
	}, nil
}

// send writes a message. The caller holds mu. A write that fails may have sent a part, so that nothing can follow it.
func (r *Replication) send(ctx context.Context, msg pgproto3.FrontendMessage) error {
	release, err := r.limit(ctx, r.conn.SetWriteDeadline)
	if err != nil {
		return err
	}
	defer release()
	if r.out, err = msg.Encode(r.out[:0]); err != nil {
		return fmt.Errorf("%s: %w", r.where, err)
	}
	if _, err := r.conn.Write(r.out); err != nil {
		if errors.Is(err, os.ErrDeadlineExceeded) && ctx.Err() != nil {
			err = context.Cause(ctx)
		}
		r.state, r.cause = replicationBroken, fmt.Errorf("%s: send: %w", r.where, err)
		return r.cause
	}
	return nil
}

func (r *Replication) current() replicationState {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.state
}

func (r *Replication) become(s replicationState) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.state != replicationBroken { // by Close
		r.state = s
	}
}

// breakOff gives the connection up. The first reason stays.
func (r *Replication) breakOff(err error) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.state != replicationBroken {
		r.state, r.cause = replicationBroken, fmt.Errorf("%s: %w", r.where, err)
	}
	return r.cause
}

func (r *Replication) unexpectedState(s replicationState, doing, expected string) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if s == replicationBroken && r.cause != nil {
		return r.cause
	}
	found := map[replicationState]string{
		replicationIdle: "waits for a command", replicationReplying: "replies to a command", replicationStreaming: "streams",
	}
	return fmt.Errorf("%s: %s: found a connection that %s, expected %s", r.where, doing, found[s], expected)
}

func parseTimeline(s string) (Timeline, error) {
	t, err := strconv.ParseUint(s, 10, 32)
	if err != nil || t == 0 {
		return 0, fmt.Errorf("timeline %q: expected a number from 1", s)
	}
	return Timeline(t), nil
}
