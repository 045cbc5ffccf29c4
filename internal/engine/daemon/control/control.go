// Package control is the conversation between a runner and those who ask it something: the archive_command of
// PostgreSQL, the provider, and the commands of pgark.
//
// A runner listens on a unix socket (job.Layout.Socket). A connection carries one request and its answer:
//
//	request  one JSON object, ended by a newline: {"op":"push","path":"/data/pg_wal/000000010000000000000007"}
//	answer   one JSON object, ended by a newline: {"ok":true,…} or {"ok":false,"error":"…","hint":"…"}
//
// An answer with "again" says no because the runner stops: the next one may say yes.
//
// A request with "plain" is answered with one line of text, for programs too small to read JSON, and without progress:
//
//	ok            done
//	ok <file>     of fetch: where the verified file lies
//	absent        of fetch: the archive ends before it
//	again         as above
//	no <message>  the error, its hint in brackets, line breaks replaced by spaces
//
// Whoever reads anything else asks again without "plain": a runner from before does not know it.
//
// Before its answer, a request of a kind that takes long ("image") may be sent progress lines: {"progress":"…"}.
// Unknown fields are ignored by both sides. A request is at most 64 KiB. The one who asks may hang up at any time: an
// upload or an image that goes on is not disturbed by it.
//
// Operations: push (WAL file named by path is durable in the repository), status, image (take one now, or wait for the
// one that is running), reload (read the job file again). The package carries them; it knows nothing of what they do.
package control

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// Op names what is asked. Part of the protocol.
type Op string

// The operations. A runner answers the first four, a WAL fetcher the last.
const (
	OpPush   Op = "push"
	OpStatus Op = "status"
	OpImage  Op = "image"
	OpReload Op = "reload"
	OpFetch  Op = "fetch"
)

// Kind says what kind of image is asked for. Part of the protocol.
type Kind string

// The kinds: whatever fits, or one that stores everything anew.
const (
	AnyKind  Kind = ""
	FullKind Kind = "full"
)

// Request is what is asked.
type Request struct {
	Op   Op     `json:"op"`
	Path string `json:"path,omitempty"` // push: absolute
	Kind Kind   `json:"kind,omitempty"` // image
	Name string `json:"name,omitempty"` // fetch: of the WAL file

	Plain bool `json:"plain,omitempty"` // answer with a line of text; see the package comment
}

// Answer is what comes back. Fields beside OK, Error and Hint belong to one operation each.
type Answer struct {
	OK    bool   `json:"ok"`
	Error string `json:"error,omitempty"`
	Hint  string `json:"hint,omitempty"`  // what to look at, or to do; never part of Error
	Again bool   `json:"again,omitempty"` // the runner stops; the one that is started next has the answer

	Progress string          `json:"progress,omitempty"` // set: this is not the answer yet
	Status   *Status         `json:"status,omitempty"`   // of status
	Image    json.RawMessage `json:"image,omitempty"`    // of image: the repository.ImageInfo that was committed
	Found    bool            `json:"found,omitempty"`    // of fetch
	File     string          `json:"file,omitempty"`     // of fetch: where the verified file lies, to be moved away
}

// Status is what a runner tells of itself.
type Status struct {
	Job       string    `json:"job"`
	Instance  string    `json:"instance"`
	Host      string    `json:"host"`
	PID       int       `json:"pid"`
	StartedAt time.Time `json:"started_at"`
	Enabled   bool      `json:"enabled"`
	State     State     `json:"state"`
	Problem   string    `json:"problem,omitempty"` // why State is not "running", or what else a person should know

	Repository       string      `json:"repository"`
	SystemIdentifier string      `json:"system_identifier,omitempty"`
	DataDirectory    string      `json:"data_directory"`
	ResidentBytes    int64       `json:"resident_bytes,omitempty"` // the runner's own memory
	WAL              WALStatus   `json:"wal"`
	Image            ImageStatus `json:"image"`
}

// State of a runner.
type State string

// The states. A runner in any state but Running answers pushes with its problem, so that PostgreSQL keeps its WAL.
const (
	Starting State = "starting" // the repository has not been opened yet
	Running  State = "running"
	Waiting  State = "waiting" // the repository, or the data directory, cannot be reached; it goes on trying
	Refused  State = "refused" // the job name belongs to another machine
)

// WALStatus counts since the runner started.
type WALStatus struct {
	Segments        int64      `json:"segments"`     // WAL files made durable, of all kinds
	Bytes           int64      `json:"bytes"`        // as PostgreSQL wrote them
	StoredBytes     int64      `json:"stored_bytes"` // as they lie in the repository
	Duplicates      int64      `json:"duplicates"`   // found in the repository already, with the same content
	Failures        int64      `json:"failures"`     // attempts that failed
	Conflicts       int64      `json:"conflicts"`    // files whose name is taken by other content
	Pending         int        `json:"pending"`      // files that PostgreSQL has finished and that are not durable yet
	OldestPending   *time.Time `json:"oldest_pending,omitempty"`
	LastName        string     `json:"last_name,omitempty"`
	LastStoredAt    *time.Time `json:"last_stored_at,omitempty"`
	LastError       string     `json:"last_error,omitempty"`
	LastErrorAt     *time.Time `json:"last_error_at,omitempty"`
	MaxDelaySeconds float64    `json:"max_delay_seconds"` // longest time from finished to durable

	State      WALState  `json:"state"`
	Since      time.Time `json:"since"`            // of State
	Reason     string    `json:"reason,omitempty"` // why State is not the best there is
	Mode       string    `json:"mode"`             // as declared: continuous or interval
	Timeline   uint32    `json:"timeline,omitempty"`
	WrittenLSN string    `json:"written_lsn,omitempty"` // how far PostgreSQL has written, as far as is known
	DurableLSN string    `json:"durable_lsn,omitempty"` // how far all of it is durable, without a hole
	LagBytes   int64     `json:"lag_bytes"`             // from one to the other
	LagSeconds float64   `json:"lag_seconds"`           // age of the oldest WAL that is not durable; 0: all is

	// ObjectiveSeconds is what LagSeconds should stay below: max_lag in continuous mode, the interval in interval mode.
	ObjectiveSeconds float64 `json:"objective_seconds,omitempty"`
	MaxLagSeconds    float64 `json:"max_lag_seconds"` // the longest LagSeconds seen

	Store  StoreState    `json:"store"`
	Stream *StreamStatus `json:"stream,omitempty"` // nil in interval mode
	Spool  *SpoolStatus  `json:"spool,omitempty"`  // nil without a temporary folder
	Gaps   []WALGap      `json:"gaps"`             // found since the runner started, the latest of them

	GapCount int64 `json:"gap_count"` // found since the runner started, all of them
}

// WALState is what becomes of WAL now.
type WALState string

// The states of WAL, from best to worst.
const (
	WALStreaming  WALState = "streaming"   // durable within max_lag
	WALArchiving  WALState = "archiving"   // whole segments as they are finished
	WALCatchingUp WALState = "catching_up" // whole segments, a backlog of them
	WALSpooling   WALState = "spooling"    // the repository is away: into the temporary folder
	WALHeld       WALState = "held"        // the repository is away and the folder is full or none: PostgreSQL keeps its WAL
)

// StoreState is how the repository fares, judged by the latest requests for WAL.
type StoreState string

// The states of a repository.
const (
	StoreReachable   StoreState = "reachable"
	StoreSlow        StoreState = "slow"        // requests take longer than max_lag
	StoreAway        StoreState = "away"        // the network, or the machine behind it
	StoreRefusing    StoreState = "refusing"    // it answers with errors: 5xx, throttling
	StoreDenied      StoreState = "denied"      // credentials that are wrong, expired, or not enough
	StoreReadOnly    StoreState = "read_only"   // it takes no writes
	StoreFull        StoreState = "full"        // no room, or a quota
	StoreMissing     StoreState = "missing"     // no such bucket or directory
	StoreConflicting StoreState = "conflicting" // a name is taken by other content
)

// StreamStatus tells of the replication connection.
type StreamStatus struct {
	Connected   bool       `json:"connected"`
	Since       *time.Time `json:"since,omitempty"` // of Connected
	Restarts    int64      `json:"restarts"`        // connections made after the first
	Timeline    uint32     `json:"timeline,omitempty"`
	ReceivedLSN string     `json:"received_lsn,omitempty"`
	DurableLSN  string     `json:"durable_lsn,omitempty"`
	LastAt      *time.Time `json:"last_at,omitempty"` // of the last message, a keepalive counts
	Tails       int64      `json:"tails"`             // stored since the runner started
	TailBytes   int64      `json:"tail_bytes"`        // the same, as stored
	Synchronous bool       `json:"synchronous"`
	Slot        string     `json:"slot,omitempty"`
	LastError   string     `json:"last_error,omitempty"`
	LastErrorAt *time.Time `json:"last_error_at,omitempty"`
}

// SpoolStatus tells of the temporary folder.
type SpoolStatus struct {
	Directory  string     `json:"directory"`
	Files      int        `json:"files"`
	Bytes      int64      `json:"bytes"`
	LimitBytes int64      `json:"limit_bytes,omitempty"` // 0: only free space limits it
	Oldest     *time.Time `json:"oldest,omitempty"`
	Full       bool       `json:"full"`
}

// WALGap is WAL that is lost: PostgreSQL went on without it having been stored.
type WALGap struct {
	FoundAt  time.Time `json:"found_at"`
	Timeline uint32    `json:"timeline"`
	StartLSN string    `json:"start_lsn"`
	EndLSN   string    `json:"end_lsn"`
	Segments uint64    `json:"segments"`
	Image    string    `json:"image,omitempty"` // the image taken because of it, once there
}

// ImageStatus tells of image backups.
type ImageStatus struct {
	Running     bool       `json:"running"`
	Progress    string     `json:"progress,omitempty"`
	Next        *time.Time `json:"next,omitempty"`
	LastID      string     `json:"last_id,omitempty"`
	LastAt      *time.Time `json:"last_at,omitempty"`
	LastError   string     `json:"last_error,omitempty"`
	LastErrorAt *time.Time `json:"last_error_at,omitempty"`
}

// maxRequest bounds what a stranger on the socket can make a runner hold.
const maxRequest = 64 << 10

// maxAnswer bounds an answer; a status with its messages stays far below it.
const maxAnswer = 1 << 20

// NotRunningError says that nobody listens on a socket.
type NotRunningError struct {
	Socket string
	Err    error
}

func (e *NotRunningError) Error() string {
	return fmt.Sprintf("no runner answers on %s: %v", e.Socket, e.Err)
}

func (e *NotRunningError) Unwrap() error { return e.Err }

// AnswerError is an answer that says no.
type AnswerError struct {
	Op      Op
	Message string
	Hint    string
	Again   bool // the runner stops
}

func (e *AnswerError) Error() string { return e.Message }

// CutError says that a runner ended, or hung up, before it answered. What was asked may be done or not.
type CutError struct {
	Socket string
	Op     Op
	Err    error
}

func (e *CutError) Error() string {
	return fmt.Sprintf("ask the runner on %s to %s: %v", e.Socket, e.Op, e.Err)
}

func (e *CutError) Unwrap() error { return e.Err }

// IsRestarting tells whether an error of Ask is what one sees while a runner is started anew: it is not there, it stops,
// or it ended before it answered. One that refuses the asker is there.
func IsRestarting(err error) bool {
	var away *NotRunningError
	var cut *CutError
	var no *AnswerError
	switch {
	case errors.As(err, &away):
		return errors.Is(err, fs.ErrNotExist) || errors.Is(err, syscall.ECONNREFUSED)
	case errors.As(err, &no):
		return no.Again
	}
	return errors.As(err, &cut)
}

// Ask sends one request and returns the answer that says yes; one that says no is *AnswerError, nobody listening is
// *NotRunningError, one who ends before he answers *CutError. progress may be nil.
func Ask(ctx context.Context, socket string, r Request, progress func(line string)) (*Answer, error) {
	conn, err := dial(ctx, socket)
	if err != nil {
		if ctx.Err() != nil {
			return nil, asked(ctx, socket, r, err)
		}
		return nil, &NotRunningError{Socket: socket, Err: plain(err)}
	}
	defer conn.Close()
	stop := context.AfterFunc(ctx, func() { _ = conn.SetDeadline(time.Unix(1, 0)) })
	defer stop()

	b, err := json.Marshal(r)
	if err != nil {
		return nil, err
	}
	if _, err := conn.Write(append(b, '\n')); err != nil {
		return nil, asked(ctx, socket, r, err)
	}
	lines := bufio.NewScanner(conn)
	lines.Buffer(make([]byte, 0, 4096), maxAnswer)
	for lines.Scan() {
		var a Answer
		if err := json.Unmarshal(lines.Bytes(), &a); err != nil {
			return nil, fmt.Errorf("answer of the runner on %s to %q: %w", socket, r.Op, err)
		}
		switch {
		case a.Progress != "":
			if progress != nil {
				progress(a.Progress)
			}
		case !a.OK:
			return nil, &AnswerError{Op: r.Op, Message: a.Error, Hint: a.Hint, Again: a.Again}
		default:
			return &a, nil
		}
	}
	err = lines.Err()
	if err == nil {
		err = errors.New("it ended before it answered")
	}
	return nil, asked(ctx, socket, r, err)
}

func asked(ctx context.Context, socket string, r Request, err error) error {
	if ctx.Err() != nil {
		return fmt.Errorf("ask the runner on %s to %s: %w", socket, r.Op, context.Cause(ctx))
	}
	return &CutError{Socket: socket, Op: r.Op, Err: plain(err)}
}

// plain takes the socket's name, which the caller's message has, out of a dial error.
func plain(err error) error {
	if op := (*net.OpError)(nil); errors.As(err, &op) {
		err = op.Err
	}
	if s := (*os.SyscallError)(nil); errors.As(err, &s) {
		err = s.Err
	}
	return err
}

// sunPath is what sockaddr_un holds, without the closing NUL.
const sunPath = 107

// reach calls fn with a name for socket that fits a socket address: a longer one is reached through a descriptor of
// its directory, which the kernel offers below /proc.
func reach(socket string, fn func(name string) error) error {
	if len(socket) <= sunPath {
		return fn(socket)
	}
	fd, err := unix.Open(filepath.Dir(socket), unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return &fs.PathError{Op: "open", Path: filepath.Dir(socket), Err: err}
	}
	defer unix.Close(fd)
	return fn("/proc/self/fd/" + strconv.Itoa(fd) + "/" + filepath.Base(socket))
}

func dial(ctx context.Context, socket string) (conn net.Conn, err error) {
	err = reach(socket, func(name string) error {
		var d net.Dialer
		conn, err = d.DialContext(ctx, "unix", name)
		return err
	})
	return conn, err
}

// Listen opens the socket for its owner only, and removes one that a runner which is no more has left. Whoever calls it
// holds the lock that keeps a second runner away.
func Listen(socket string) (net.Listener, error) {
	if err := os.Remove(socket); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	// bind gives the file the mode that the socket itself has (unix_bind_bsd), so nobody else can connect at any moment.
	config := net.ListenConfig{Control: func(_, _ string, c syscall.RawConn) (err error) {
		if e := c.Control(func(fd uintptr) { err = unix.Fchmod(int(fd), 0o600) }); e != nil {
			return e
		}
		return err
	}}
	var l net.Listener
	err := reach(socket, func(name string) (err error) {
		l, err = config.Listen(context.Background(), "unix", name)
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("listen on %s: %w", socket, plain(err))
	}
	if u, ok := l.(*net.UnixListener); ok {
		u.SetUnlinkOnClose(false) // by the name of bind, which may be a /proc name of a descriptor long closed
	}
	return &listener{Listener: l, socket: socket}, nil
}

type listener struct {
	net.Listener
	socket string
}

func (l *listener) Close() error {
	// Removed first: whoever finds no socket is told at once that no runner is there, instead of a refused connection.
	_ = os.Remove(l.socket)
	return l.Listener.Close()
}

// Handler answers a request. progress sends a line ahead of the answer; an error of it means that the asker is gone.
// ctx ends when the server stops, not when the asker hangs up.
type Handler func(ctx context.Context, r Request, progress func(line string) error) Answer

// Serve answers requests until l is closed, each in a goroutine of its own, and returns when all are answered.
func Serve(ctx context.Context, l net.Listener, h Handler) error {
	g := newGroup(maxConnections)
	defer g.wait()
	for {
		conn, err := l.Accept()
		if errors.Is(err, net.ErrClosed) {
			return nil
		}
		if err != nil {
			// Out of descriptors, mostly: it passes.
			select {
			case <-ctx.Done():
				return nil
			case <-time.After(100 * time.Millisecond):
			}
			continue
		}
		g.run(func() {
			defer conn.Close()
			serve(ctx, conn, h)
		})
	}
}

// maxConnections bounds the requests that are answered at one time. PostgreSQL asks one by one.
const maxConnections = 64

func serve(ctx context.Context, conn net.Conn, h Handler) {
	// The one who asks has its request ready when it connects.
	_ = conn.SetReadDeadline(time.Now().Add(10 * time.Second))
	send := func(a Answer) error {
		b, err := json.Marshal(a)
		if err != nil {
			return err
		}
		_ = conn.SetWriteDeadline(time.Now().Add(10 * time.Second))
		_, err = conn.Write(append(b, '\n'))
		return err
	}
	line, err := bufio.NewReader(io.LimitReader(conn, maxRequest)).ReadBytes('\n')
	if err != nil {
		if len(bytes.TrimSpace(line)) > 0 {
			_ = send(Answer{Error: "request: found no newline within 64 KiB"})
		}
		return
	}
	var r Request
	if err := json.Unmarshal(line, &r); err != nil {
		_ = send(Answer{Error: "request: " + err.Error()})
		return
	}
	// The answer is lost when the asker is gone; whoever it was asks again.
	if r.Plain {
		a := h(ctx, r, func(string) error { return nil })
		_ = conn.SetWriteDeadline(time.Now().Add(10 * time.Second))
		_, _ = io.WriteString(conn, a.line(r.Op))
		return
	}
	_ = send(h(ctx, r, func(line string) error { return send(Answer{Progress: line}) }))
}
