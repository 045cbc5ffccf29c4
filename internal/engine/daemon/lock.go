package daemon

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
)

// RunningError says that a runner protects the instance already.
type RunningError struct {
	PID  int // 0: not known
	File string
}

func (e *RunningError) Error() string {
	if e.PID == 0 {
		return "another runner does already (it holds " + e.File + ")"
	}
	return fmt.Sprintf("another runner does already (process %d holds %s)", e.PID, e.File)
}

// lock takes the lock that lets one runner at a time protect an instance. The kernel drops it with the process.
func lock(directory string) (unlock func(), err error) {
	if err := os.MkdirAll(directory, 0o700); err != nil {
		return nil, err
	}
	name := filepath.Join(directory, "runner.lock")
	f, err := os.OpenFile(name, os.O_RDWR|os.O_CREATE, 0o600)
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
	if err := f.Truncate(0); err == nil {
		_, err = f.WriteString(strconv.Itoa(os.Getpid()) + "\n")
		if err != nil {
			f.Close()
			return nil, fmt.Errorf("lock %s: %w", name, err)
		}
	}
	return func() { f.Close() }, nil
}

// readPID reads a process id for a message; 0 where there is none.
func readPID(f *os.File) int {
	b := make([]byte, 32)
	n, _ := f.ReadAt(b, 0)
	pid, _ := strconv.Atoi(strings.TrimSpace(string(b[:n])))
	return pid
}
