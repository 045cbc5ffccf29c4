package remote

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"

	"github.com/pgark/terraform-provider-pgark/internal/engine/job"
)

// protocol is the version of the conversation. A guest's runner is always the one that came with this program, told apart
// by its digest; the version is there for people who look at what went wrong.
const protocol = 1

// maxLine is the most bytes that a line may have, either way. A job with a thousand instances has less than one.
const maxLine = 64 << 20

// The calls, named after the methods of guest.Guest.
const (
	callMachine         = "machine"
	callDiscover        = "discover"
	callCheck           = "check"
	callApply           = "apply"
	callState           = "state"
	callSetWALRetention = "set_wal_retention"
	callRemove          = "remove"
)

// request is a line of the client. Either ID and Call are set, or Cancel, or Ping.
type request struct {
	ID     uint64          `json:"id,omitempty"` // from 1, each once
	Call   string          `json:"call,omitempty"`
	Params json.RawMessage `json:"params,omitempty"`

	Cancel  uint64 `json:"cancel,omitempty"` // the request that is not waited for any more; it is answered all the same
	Expired bool   `json:"expired,omitempty"`

	Ping bool `json:"ping,omitempty"`
}

// response is a line of the server. The first one has Hello; each after it ID with Result or Error, or Pong.
type response struct {
	Hello *hello `json:"hello,omitempty"`

	ID     uint64          `json:"id,omitempty"`
	Result json.RawMessage `json:"result,omitempty"`
	Error  *failure        `json:"error,omitempty"`

	Pong bool `json:"pong,omitempty"`
}

// hello says who serves.
type hello struct {
	Protocol int    `json:"protocol"`
	SHA256   string `json:"sha256"` // of the program that runs
	PID      int    `json:"pid"`
	EUID     int    `json:"euid"`
}

// named are the params of what needs no more than a job's name.
type named struct {
	Name string `json:"name"`
}

type retentionParams struct {
	Name      string            `json:"name"`
	Retention *job.WALRetention `json:"retention"`
}

// encode writes a message as its line.
func encode(message any) ([]byte, error) {
	b, err := json.Marshal(message)
	if err != nil {
		return nil, err
	}
	if len(b) >= maxLine {
		return nil, fmt.Errorf("found a message of %d bytes, expected less than %d", len(b), maxLine)
	}
	return append(b, '\n'), nil
}

// decode reads what the other end has sent. A field that is not known here is refused: half of what was asked must not
// be overlooked. Its errors hold no value of the document, which may be a secret.
func decode(b []byte, into any) error {
	d := json.NewDecoder(bytes.NewReader(b))
	d.DisallowUnknownFields()
	err := d.Decode(into)
	if err == nil {
		if _, err := d.Token(); !errors.Is(err, io.EOF) {
			return errors.New("found more than one JSON document in a line")
		}
		return nil
	}
	var wrongType *json.UnmarshalTypeError
	var syntax *json.SyntaxError
	switch {
	case errors.As(err, &wrongType):
		return fmt.Errorf("found a JSON %.10s in field %q, expected a %s", wrongType.Value, wrongType.Field, wrongType.Type)
	case errors.As(err, &syntax):
		return fmt.Errorf("found no JSON document: wrong at byte %d", syntax.Offset)
	case errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF):
		return errors.New("found no whole JSON document")
	}
	if field, ok := bytes.CutPrefix([]byte(err.Error()), []byte("json: unknown field ")); ok {
		return fmt.Errorf("found the field %s, which this runner does not know", field)
	}
	return fmt.Errorf("found a document that does not fit %T", into)
}

// lines reads lines of at most maxLine bytes.
type lines struct{ r *bufio.Reader }

func newLines(r io.Reader) *lines { return &lines{r: bufio.NewReaderSize(r, 64<<10)} }

// next returns the next line without its end. io.EOF after the last whole one: what a cut connection leaves of a line is
// no message.
func (l *lines) next() ([]byte, error) {
	var line []byte
	for {
		part, err := l.r.ReadSlice('\n')
		if err == nil {
			return append(line, part[:len(part)-1]...), nil
		}
		if !errors.Is(err, bufio.ErrBufferFull) {
			return nil, err
		}
		if len(line)+len(part) > maxLine {
			return nil, fmt.Errorf("found a line of more than %d bytes", maxLine)
		}
		line = append(line, part...)
	}
}
