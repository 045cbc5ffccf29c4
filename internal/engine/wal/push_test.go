package wal

import (
	"context"
	"errors"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/pgark/terraform-provider-pgark/internal/engine/daemon/control"
	"github.com/pgark/terraform-provider-pgark/internal/engine/postgres"
)

// pushing is a request for a deployed job whose runner is away.
func pushing(t *testing.T) PushRequest {
	t.Helper()
	dir := t.TempDir()
	r := PushRequest{
		Socket: filepath.Join(dir, "s"), JobFile: filepath.Join(dir, "orders.json"),
		Path: filepath.Join(newDataDirectory(t), "pg_wal", "000000010000000000000007"),
	}
	if err := os.WriteFile(r.JobFile, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	return r
}

// runner answers on a socket until stop is called, at the end of the test at the latest.
func runner(t *testing.T, socket string, h control.Handler) (stop func()) {
	t.Helper()
	l, err := control.Listen(socket)
	if err != nil {
		t.Fatal(err)
	}
	var serving sync.WaitGroup
	serving.Go(func() {
		if err := control.Serve(context.Background(), l, h); err != nil {
			t.Error(err)
		}
	})
	stop = sync.OnceFunc(func() {
		l.Close()
		serving.Wait()
	})
	t.Cleanup(stop)
	return stop
}

func yes(context.Context, control.Request, func(string) error) control.Answer {
	return control.Answer{OK: true}
}

// pushInBackground returns once the push has asked in vain at least once.
func pushInBackground(ctx context.Context, r PushRequest) <-chan error {
	result := make(chan error, 1)
	go func() { result <- Push(ctx, r) }()
	time.Sleep(3 * pushRetryFirst)
	return result
}

func TestPush_waitsForTheRunner(t *testing.T) {
	t.Run("that starts", func(t *testing.T) {
		r := pushing(t)
		result := pushInBackground(t.Context(), r)
		runner(t, r.Socket, yes)
		if err := <-result; err != nil {
			t.Error(err)
		}
	})
	t.Run("whose socket is left over", func(t *testing.T) {
		r := pushing(t)
		l, err := new(net.ListenConfig).Listen(t.Context(), "unix", r.Socket)
		if err != nil {
			t.Fatal(err)
		}
		u, ok := l.(*net.UnixListener)
		if !ok {
			t.Fatalf("found a %T", l)
		}
		u.SetUnlinkOnClose(false)
		u.Close()
		result := pushInBackground(t.Context(), r)
		runner(t, r.Socket, yes)
		if err := <-result; err != nil {
			t.Error(err)
		}
	})
	t.Run("that stops, and is started anew", func(t *testing.T) {
		r := pushing(t)
		var asked atomic.Int32
		stop := runner(t, r.Socket, func(context.Context, control.Request, func(string) error) control.Answer {
			asked.Add(1)
			a := control.Fail(ErrStopped)
			a.Again = true
			return a
		})
		result := pushInBackground(t.Context(), r)
		stop()
		runner(t, r.Socket, yes)
		if err := <-result; err != nil || asked.Load() == 0 {
			t.Errorf("found %v, the first runner was asked %d times", err, asked.Load())
		}
	})
	t.Run("that is killed before it answers", func(t *testing.T) {
		r := pushing(t)
		l, err := control.Listen(r.Socket)
		if err != nil {
			t.Fatal(err)
		}
		result := make(chan error, 1)
		go func() { result <- Push(t.Context(), r) }()
		conn, err := l.Accept()
		if err != nil {
			t.Fatal(err)
		}
		conn.Close()
		l.Close()
		runner(t, r.Socket, yes)
		if err := <-result; err != nil {
			t.Error(err)
		}
	})
}

func TestPush_endsAtOnce(t *testing.T) {
	promptly := func(t *testing.T, expected string, push func() error) {
		t.Helper()
		began := time.Now()
		err := push()
		if err == nil || !strings.Contains(err.Error(), expected) {
			t.Errorf("found %v, expected %q in it", err, expected)
		}
		if took := time.Since(began); took > pushPatience/4 {
			t.Errorf("it took %s", took)
		}
	}
	t.Run("no job is deployed", func(t *testing.T) {
		r := pushing(t)
		r.JobFile += ".not"
		promptly(t, "store wal 000000010000000000000007: no runner answers on "+r.Socket+": no such file or directory; PostgreSQL keeps the file and asks again",
			func() error { return Push(t.Context(), r) })
	})
	t.Run("PostgreSQL shuts down", func(t *testing.T) {
		r := pushing(t)
		result := pushInBackground(t.Context(), r)
		file := filepath.Join(filepath.Dir(filepath.Dir(r.Path)), postgres.PostmasterFile)
		if err := os.WriteFile(file, []byte("4711\n/data\n1700000000\n5432\n/tmp\n\n\nstopping\n"), 0o600); err != nil {
			t.Fatal(err)
		}
		promptly(t, "no runner answers", func() error { return <-result })
	})
	t.Run("it is told to", func(t *testing.T) {
		r := pushing(t)
		ctx, cancel := context.WithCancelCause(t.Context())
		result := pushInBackground(ctx, r)
		cancel(errors.New("told to stop"))
		promptly(t, "told to stop", func() error { return <-result })
	})
	t.Run("the runner says no", func(t *testing.T) {
		r := pushing(t)
		var asked atomic.Int32
		runner(t, r.Socket, func(context.Context, control.Request, func(string) error) control.Answer {
			asked.Add(1)
			return control.Answer{Error: "the repository is away", Hint: "look there"}
		})
		promptly(t, "the repository is away (hint: look there)", func() error { return Push(t.Context(), r) })
		if asked.Load() != 1 {
			t.Errorf("asked %d times", asked.Load())
		}
	})
}
