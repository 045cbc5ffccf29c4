package control

import (
	"context"
	"errors"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"
)

// serving runs a server for the test.
func serving(t *testing.T, socket string, h Handler) {
	t.Helper()
	l, err := Listen(socket)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	wg.Go(func() {
		if err := Serve(ctx, l, h); err != nil {
			t.Error(err)
		}
	})
	t.Cleanup(func() {
		cancel()
		l.Close()
		wg.Wait()
		if _, err := os.Lstat(socket); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("the socket should be gone: %v", err)
		}
	})
}

func TestAsk(t *testing.T) {
	// Longer than a socket's address may be.
	dir := filepath.Join(t.TempDir(), strings.Repeat("d", 100))
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	socket := filepath.Join(dir, "runner.sock")
	if _, err := Ask(t.Context(), socket, Request{Op: OpStatus}, nil); !errors.As(err, new(*NotRunningError)) {
		t.Fatalf("got %v, expected *NotRunningError", err)
	}
	// What a killed runner leaves behind.
	dead, err := Listen(socket)
	if err != nil {
		t.Fatal(err)
	}
	if l, ok := dead.(*listener); ok {
		l.Listener.Close() // and the socket stays
	}
	if _, err := Ask(t.Context(), socket, Request{Op: OpStatus}, nil); !errors.As(err, new(*NotRunningError)) {
		t.Fatalf("got %v, expected *NotRunningError", err)
	}

	serving(t, socket, func(_ context.Context, r Request, progress func(string) error) Answer {
		switch r.Op {
		case OpPush:
			return Fail(hinted{})
		case OpImage:
			if err := errors.Join(progress("half"), progress("nearly")); err != nil {
				t.Error(err)
			}
			return Answer{OK: true, Image: []byte(`{"sid":7}`)}
		case OpStatus:
			return Answer{OK: true, Status: &Status{Job: "orders", State: Refused}}
		}
		return Answer{OK: true}
	})
	info, err := os.Stat(socket)
	if err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("the socket should be its owner's only: %v, %v", info.Mode(), err)
	}
	_, err = Ask(t.Context(), socket, Request{Op: OpPush, Path: "/x"}, nil)
	var no *AnswerError
	if !errors.As(err, &no) || no.Message != "it failed" || no.Hint != "try again" {
		t.Errorf("got %#v, expected the error with its hint", err)
	}
	var lines []string
	image, err := TakeImage(t.Context(), socket, AnyKind, func(s string) { lines = append(lines, s) })
	if err != nil || string(image) != `{"sid":7}` || strings.Join(lines, " ") != "half nearly" {
		t.Errorf("got %s, %v, %v", image, lines, err)
	}
	s, err := GetStatus(t.Context(), socket)
	if err != nil || s.Job != "orders" || s.State != Refused {
		t.Errorf("got %+v, %v", s, err)
	}
	if err := Reload(t.Context(), socket); err != nil {
		t.Error(err)
	}
}

type hinted struct{}

func (hinted) Error() string { return "it failed" }
func (hinted) Hint() string  { return "try again" }

func TestServe_strangers(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "s")
	serving(t, socket, func(context.Context, Request, func(string) error) Answer { return Answer{OK: true} })
	for what, test := range map[string]struct{ send, expect string }{
		"no JSON":        {"hello\n", "invalid character"},
		"another type":   {`{"op":7}` + "\n", "cannot unmarshal"},
		"endless":        {strings.Repeat("x", maxRequest+1), "64 KiB"},
		"unknown fields": {`{"op":"status","since":"v9"}` + "\n", `"ok":true`},
	} {
		t.Run(what, func(t *testing.T) {
			conn, err := new(net.Dialer).DialContext(t.Context(), "unix", socket)
			if err != nil {
				t.Fatal(err)
			}
			defer conn.Close()
			if err := conn.SetDeadline(time.Now().Add(10 * time.Second)); err != nil {
				t.Fatal(err)
			}
			_, _ = conn.Write([]byte(test.send)) // the server may hang up before it has read all
			b := make([]byte, 4096)
			n, err := conn.Read(b)
			if err != nil || !strings.Contains(string(b[:n]), test.expect) {
				t.Errorf("got %q, %v; expected %q in it", b[:n], err, test.expect)
			}
		})
	}
}

func TestAsk_contextEnds(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "s")
	release := make(chan struct{})
	serving(t, socket, func(context.Context, Request, func(string) error) Answer {
		<-release
		return Answer{OK: true}
	})
	ctx, cancel := context.WithTimeoutCause(t.Context(), 50*time.Millisecond, errors.New("no patience"))
	defer cancel()
	if _, err := Ask(ctx, socket, Request{Op: OpPush}, nil); err == nil || !strings.Contains(err.Error(), "no patience") {
		t.Errorf("got %v, expected the cause", err)
	}
	close(release)
}

func TestServe_plain(t *testing.T) {
	for what, test := range map[string]struct {
		request string
		answer  Answer
		expect  string
	}{
		"done":              {`{"op":"push","path":"/x","plain":true}`, Answer{OK: true}, "ok\n"},
		"no":                {`{"op":"push","path":"/x","plain":true}`, Answer{Error: "it failed"}, "no it failed\n"},
		"no, with a hint":   {`{"op":"push","path":"/x","plain":true}`, Fail(hinted{}), "no it failed (hint: try again)\n"},
		"no, on many lines": {`{"op":"push","path":"/x","plain":true}`, Answer{Error: "it\r\nfailed\n", Hint: "try\n\nagain"}, "no it failed (hint: try again)\n"},
		"the runner stops":  {`{"op":"push","path":"/x","plain":true}`, Answer{Error: "it stops", Again: true}, "again\n"},
		"a file":            {`{"op":"fetch","name":"x","plain":true}`, Answer{OK: true, Found: true, File: "/ring/x y"}, "ok /ring/x y\n"},
		"no file":           {`{"op":"fetch","name":"x","plain":true}`, Answer{OK: true}, "absent\n"},
		"an odd file":       {`{"op":"fetch","name":"x","plain":true}`, Answer{OK: true, Found: true, File: "/ring\n/x"}, "no the name of the file does not fit on a line\n"},
		"a failing fetch":   {`{"op":"fetch","name":"x","plain":true}`, Answer{Error: "a gap"}, "no a gap\n"},
		"not plain":         {`{"op":"push","path":"/x"}`, Answer{OK: true}, `{"ok":false,"progress":"half"}` + "\n" + `{"ok":true}` + "\n"},
	} {
		t.Run(what, func(t *testing.T) {
			socket := filepath.Join(t.TempDir(), "s")
			serving(t, socket, func(_ context.Context, _ Request, progress func(string) error) Answer {
				if err := progress("half"); err != nil {
					t.Error(err)
				}
				return test.answer
			})
			conn, err := new(net.Dialer).DialContext(t.Context(), "unix", socket)
			if err != nil {
				t.Fatal(err)
			}
			defer conn.Close()
			if err := conn.SetDeadline(time.Now().Add(10 * time.Second)); err != nil {
				t.Fatal(err)
			}
			if _, err := io.WriteString(conn, test.request+"\n"); err != nil {
				t.Fatal(err)
			}
			if b, err := io.ReadAll(conn); err != nil || string(b) != test.expect {
				t.Errorf("got %q, %v; expected %q", b, err, test.expect)
			}
		})
	}
}
