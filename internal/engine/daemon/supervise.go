package daemon

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime"
	"strconv"
	"sync"
	"syscall"
	"time"

	"github.com/pgark/terraform-provider-pgark/internal/engine/job"
)

const (
	// While the runner is away PostgreSQL keeps its WAL and archives nothing, so it should not be away for long; starting
	// it once in five seconds costs the machine nothing that the database would notice.
	restartFirst = 250 * time.Millisecond
	restartMost  = 5 * time.Second
	// A child that lived as long was healthy: the next failure is a new one.
	restartForgotten = 30 * time.Second

	maxLog = 8 << 20 // bytes; the log and the one before it
)

// Supervise does for a runner what systemd does, where there is none: it starts command, starts it again when it ends,
// after 0.25 s at first and 5 s at most, and writes what it prints to the log file, which is kept in bounds. It is the
// leader of a session of its own, its process id is in the pid file as long as it lives, and signals that ask it to stop
// or reload (SIGTERM through ctx, SIGHUP) reach the child. When it is killed, the child is told to stop.
func Supervise(ctx context.Context, l job.Layout, name, instance string, command []string) error {
	// Whoever starts us may have made us the leader of a session already.
	if _, err := syscall.Setsid(); err != nil && !errors.Is(err, syscall.EPERM) {
		return fmt.Errorf("begin a session: %w", err)
	}
	out, err := openLog(l.LogFile(name, instance), maxLog)
	if err != nil {
		return err
	}
	defer out.Close()
	log := slog.New(slog.NewTextHandler(out, nil)).With("supervisor", os.Getpid())

	removePID, err := writePID(l.PIDFile(name, instance))
	if err != nil {
		return fmt.Errorf("supervise %s of job %s: %w", instance, name, err)
	}
	defer removePID()

	hangup := make(chan os.Signal, 1)
	signal.Notify(hangup, syscall.SIGHUP)
	defer signal.Stop(hangup)

	// The kernel takes the end of the starting thread, not of the process, as the parent's death (prctl(2),
	// PR_SET_PDEATHSIG).
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()

	for wait := restartFirst; ; {
		began := time.Now()
		err := supervise(ctx, command, out, hangup)
		if ctx.Err() != nil {
			log.Info("runner ended", "error", err)
			return nil
		}
		if time.Since(began) > restartForgotten {
			wait = restartFirst
		}
		log.Error("runner ended, it is started again", "error", err, "in", wait)
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(wait):
		}
		wait = min(2*wait, restartMost)
	}
}

func supervise(ctx context.Context, command []string, out io.Writer, hangup <-chan os.Signal) error {
	cmd := exec.CommandContext(ctx, command[0], command[1:]...)
	cmd.Stdout, cmd.Stderr = out, out
	cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGTERM) }
	cmd.WaitDelay = 2 * grace // then it is killed
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGTERM}
	if err := cmd.Start(); err != nil {
		return err
	}
	ended := make(chan struct{})
	var forwarding sync.WaitGroup
	forwarding.Go(func() {
		for {
			select {
			case s := <-hangup:
				_ = cmd.Process.Signal(s) // it may have ended
			case <-ended:
				return
			}
		}
	})
	err := cmd.Wait()
	close(ended)
	forwarding.Wait()
	return err
}

// writePID writes the pid file and keeps it locked: a file that is not is left over from a process that was killed.
func writePID(name string) (remove func(), err error) {
	if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
		return nil, err
	}
	f, err := os.OpenFile(name, os.O_RDWR|os.O_CREATE, 0o644)
	if err != nil {
		return nil, err
	}
	if err := syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB); err != nil {
		defer f.Close()
		if !errors.Is(err, syscall.EWOULDBLOCK) {
			return nil, fmt.Errorf("lock %s: %w", name, err)
		}
		return nil, &RunningError{PID: readPID(f), File: name}
	}
	err = f.Truncate(0)
	if err == nil {
		_, err = f.WriteAt([]byte(strconv.Itoa(os.Getpid())+"\n"), 0)
	}
	if err != nil {
		f.Close()
		return nil, err
	}
	return func() {
		_ = os.Remove(name) // while it is locked, so that nobody takes it for left over meanwhile
		f.Close()
	}, nil
}

// logFile is a file that starts anew when it is full; the one before it is kept as ".1". Safe for concurrent use.
type logFile struct {
	name string
	max  int64

	mu   sync.Mutex // guards what follows
	f    *os.File
	size int64
}

func openLog(name string, limit int64) (*logFile, error) {
	if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
		return nil, err
	}
	l := &logFile{name: name, max: limit}
	return l, l.open()
}

func (l *logFile) open() error {
	f, err := os.OpenFile(l.name, os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o640)
	if err != nil {
		return err
	}
	info, err := f.Stat()
	if err != nil {
		f.Close()
		return err
	}
	l.f, l.size = f, info.Size()
	return nil
}

// Write reports success even when the disk is full: a runner must not end because its log cannot be written.
func (l *logFile) Write(b []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.size > 0 && l.size+int64(len(b)) > l.max {
		l.f.Close()
		_ = os.Rename(l.name, l.name+".1") // if not, the log grows on
		if err := l.open(); err != nil {
			return 0, err
		}
	}
	n, _ := l.f.Write(b)
	l.size += int64(n)
	return len(b), nil
}

func (l *logFile) Close() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.f.Close()
}
