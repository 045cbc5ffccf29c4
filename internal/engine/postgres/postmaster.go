package postgres

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// Postmaster is what a server writes into postmaster.pid. Fields that it has not written yet are zero.
type Postmaster struct {
	PID             int
	DataDirectory   string
	StartTime       time.Time // to the second
	Port            int
	SocketDirectory string // the first of unix_socket_directories; empty if there is none
	ListenAddress   string // the first of listen_addresses
	Status          string // "starting", "stopping", "ready" or "standby"
}

// PostmasterFile is the file in the data directory that names the running server.
const PostmasterFile = "postmaster.pid"

// ParsePostmaster reads postmaster.pid (miscadmin.h, LOCK_FILE_LINE_…).
func ParsePostmaster(b []byte) (*Postmaster, error) {
	lines := strings.Split(string(b), "\n")
	line := func(n int) string {
		if n < len(lines) {
			return strings.TrimSpace(lines[n])
		}
		return ""
	}
	p := &Postmaster{DataDirectory: line(1), SocketDirectory: line(4), ListenAddress: line(5), Status: line(7)}
	pid, err := strconv.Atoi(line(0))
	if err != nil || pid == 0 {
		return nil, fmt.Errorf("%s: found %q in the first line, expected a process id", PostmasterFile, line(0))
	}
	p.PID = max(pid, -pid) // negative: a single-user server
	if s := line(2); s != "" {
		seconds, err := strconv.ParseInt(s, 10, 64)
		if err != nil {
			return nil, fmt.Errorf("%s: found start time %q, expected seconds", PostmasterFile, s)
		}
		p.StartTime = time.Unix(seconds, 0).UTC()
	}
	if s := line(3); s != "" {
		if p.Port, err = strconv.Atoi(s); err != nil {
			return nil, fmt.Errorf("%s: found port %q, expected a number", PostmasterFile, s)
		}
	}
	return p, nil
}

// ReadPostmaster reads postmaster.pid of a data directory. Without the file, the error matches fs.ErrNotExist; a file
// does not prove that the server runs, IsRunning does.
func ReadPostmaster(dataDirectory string) (*Postmaster, error) {
	path := filepath.Join(dataDirectory, PostmasterFile)
	b, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	p, err := ParsePostmaster(b)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", dataDirectory, err)
	}
	return p, nil
}

// IsRunning tells whether a server runs on the data directory, and what it wrote about itself. After a crash the file
// stays, and its process id may be somebody else's by now: a process counts only if it works in the data directory,
// where we may see that.
func IsRunning(dataDirectory string) (bool, *Postmaster, error) {
	p, err := ReadPostmaster(dataDirectory)
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil, nil
	}
	if err != nil {
		return false, nil, err
	}
	process, err := os.FindProcess(p.PID)
	if err != nil {
		return false, p, err
	}
	// EPERM means that it is there and another user's.
	if err := process.Signal(syscall.Signal(0)); err != nil && !errors.Is(err, fs.ErrPermission) {
		return false, p, nil
	}
	works, err := os.Stat(fmt.Sprintf("/proc/%d/cwd", p.PID))
	if err != nil {
		return !errors.Is(err, fs.ErrNotExist) || !isDirectory("/proc/self"), p, nil
	}
	data, err := os.Stat(dataDirectory)
	if err != nil {
		return false, p, err
	}
	return os.SameFile(works, data), p, nil
}

func isDirectory(path string) bool {
	info, err := os.Stat(path)
	return err == nil && info.IsDir()
}
