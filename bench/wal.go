package main

import (
	"bytes"
	"errors"
	"fmt"
	"log"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// This file measures WAL: a backlog, single segments, and replay.

// backlog pushes the same segments through both tools, and through pgark once more with a codec that adapts.
func (w *world) backlog(names []string, ours *pgark, order []tool, add func(op string, t tool, s sample)) error {
	op := fmt.Sprintf("%d segments pushed", len(names))
	for _, t := range order {
		if err := w.signalResident(syscall.SIGSTOP); err != nil { // measurePush wakes it for its own turn
			return err
		}
		s, err := w.measurePush(t, names)
		if err != nil {
			return fmt.Errorf("push of %s: %w", t.name(), err)
		}
		add(op, t, s)
		adapted := op + ", codec adapts to the backlog"
		if t.name() != ours.name() {
			add(adapted, t, s)
			continue
		}
		if err := ours.forgetWAL("adaptive"); err != nil {
			return err
		}
		s, err = w.measurePush(t, names)
		if err != nil {
			return fmt.Errorf("push of %s with a codec that adapts: %w", t.name(), err)
		}
		add(adapted, t, s)
		if err := ours.forgetWAL("zstd"); err != nil {
			return err
		}
	}
	return nil
}

// singles pushes segments one at a time, as they come while a server is busy: .ready appears when the one before is
// done. known says that the tool's resident part may have met the segment before it is asked, as streaming lets it.
func (w *world) singles(names []string, ours *pgark, peer *pgBackRest) ([]call, error) {
	status := filepath.Join(w.data, "pg_wal", "archive_status")
	var all []call
	for _, c := range []struct {
		what  string
		push  func(segment string) command
		ahead time.Duration
		ours  bool
	}{
		{"pgark, not stored yet", ours.push, 0, true},
		{"pgark, stored by streaming", ours.push, 1500 * time.Millisecond, true},
		{"pgBackRest, synchronous", peer.pushSynchronous, 0, false},
		{"pgBackRest, asynchronous", peer.push, 0, false},
	} {
		turn := syscall.SIGSTOP
		if c.ours {
			turn = syscall.SIGCONT
		}
		if err := w.signalResident(turn); err != nil {
			return nil, err
		}
		result := call{what: c.what}
		for _, n := range names {
			_ = os.Remove(filepath.Join(status, n+".done"))
			if err := w.writeAsPostgres(filepath.Join(status, n+".ready"), nil); err != nil {
				return nil, err
			}
			time.Sleep(c.ahead)
			began := time.Now()
			if err := w.runAsPostgres(c.push(n)); err != nil {
				return nil, err
			}
			result.took = append(result.took, time.Since(began))
			if err := os.Rename(filepath.Join(status, n+".ready"), filepath.Join(status, n+".done")); err != nil {
				return nil, err
			}
			time.Sleep(20 * time.Millisecond)
		}
		if err := w.settle(); err != nil {
			return nil, err
		}
		if c.ours {
			if err := ours.forgetWAL("zstd"); err != nil {
				return nil, err
			}
		} else if err := peer.forgetWAL(); err != nil {
			return nil, err
		}
		slices.Sort(result.took)
		log.Printf("%-28s median %v, most %v", c.what, result.median(), result.took[len(result.took)-1])
		all = append(all, result)
	}
	return all, nil
}

// call is how long archive_command took.
type call struct {
	what string
	took []time.Duration // ascending
}

func (c call) median() time.Duration { return c.took[len(c.took)/2] }

// base copies the cluster, so that recovery can begin before the segments that are written next.
func (w *world) base() (string, error) {
	dir := filepath.Join(w.dir, "base")
	if err := os.RemoveAll(dir); err != nil {
		return "", err
	}
	if err := w.runAsPostgres(command{argv: []string{filepath.Join(w.bin, "pg_basebackup"), "-D", dir, "-h", w.socket, "-p", strconv.Itoa(w.port), "-U", "postgres", "-X", "fetch", "-c", "fast"}}); err != nil {
		return "", err
	}
	return dir, nil
}

var restoredLine = regexp.MustCompile(`(?m)^([0-9]+\.[0-9]+) LOG:  restored log file "([0-9A-F]{24})"`)

// replay recovers a copy of base through a restore_command, and measures from the first to the last segment.
func (w *world) replay(base, restoreCommand string, env []string) (replayed, error) {
	dir := filepath.Join(w.dir, "replay")
	if err := os.RemoveAll(dir); err != nil {
		return replayed{}, err
	}
	defer os.RemoveAll(dir)
	if err := w.runAsPostgres(command{argv: []string{"cp", "-a", base, dir}}); err != nil {
		return replayed{}, err
	}
	files, err := filepath.Glob(filepath.Join(dir, "pg_wal", strings.Repeat("[0-9A-F]", 24)))
	if err != nil {
		return replayed{}, err
	}
	for _, f := range files {
		if err := os.Remove(f); err != nil {
			return replayed{}, err
		}
	}
	port, err := freePort(w.ctx)
	if err != nil {
		return replayed{}, err
	}
	settings := fmt.Sprintf("port = %d\narchive_mode = off\nrestore_command = '%s'\nhot_standby = off\nlog_line_prefix = '%%n '\nlog_min_messages = log\nwal_keep_size = 0\n",
		port, restoreCommand)
	if err := errors.Join(w.writeAsPostgres(filepath.Join(dir, "postgresql.auto.conf"), []byte(settings)), w.writeAsPostgres(filepath.Join(dir, "recovery.signal"), nil)); err != nil {
		return replayed{}, err
	}
	syscall.Sync()
	cmd := exec.CommandContext(w.ctx, filepath.Join(w.bin, "postgres"), "-D", dir)
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: w.uid, Gid: w.gid}}
	cmd.Env = append(append(os.Environ(), "HOME="+w.dir), env...)
	logName := filepath.Join(w.dir, "replay.log")
	logFile, err := os.Create(logName)
	if err != nil {
		return replayed{}, err
	}
	defer logFile.Close()
	cmd.Stdout, cmd.Stderr = logFile, logFile
	if err := cmd.Start(); err != nil {
		return replayed{}, err
	}
	var said []byte
	for deadline := time.Now().Add(10 * time.Minute); ; time.Sleep(100 * time.Millisecond) {
		if said, err = os.ReadFile(logName); err != nil {
			break
		}
		if bytes.Contains(said, []byte("database system is ready to accept connections")) {
			break
		}
		if bytes.Contains(said, []byte("FATAL: ")) || time.Now().After(deadline) {
			err = fmt.Errorf("recovery failed:\n%s", tail(said, 2000))
			break
		}
	}
	_ = cmd.Process.Signal(syscall.SIGQUIT)
	_ = cmd.Wait() // it ends by a signal
	if err != nil {
		return replayed{}, err
	}
	found := restoredLine.FindAllSubmatch(said, -1)
	if len(found) < 2 {
		return replayed{}, fmt.Errorf("found %d restored segments in the log:\n%s", len(found), tail(said, 2000))
	}
	first, err := strconv.ParseFloat(string(found[0][1]), 64)
	if err != nil {
		return replayed{}, err
	}
	last, err := strconv.ParseFloat(string(found[len(found)-1][1]), 64)
	if err != nil {
		return replayed{}, err
	}
	return replayed{segments: len(found) - 1, took: time.Duration((last - first) * float64(time.Second))}, nil
}

// replayed is a recovery: how many segments were read, and in what time.
type replayed struct {
	segments int
	took     time.Duration
}

func (r replayed) rate() float64 { return float64(r.segments) / r.took.Seconds() }

// keepSegments copies segments to a directory, from where cp restores them.
func (w *world) keepSegments(names []string) (string, error) {
	dir := filepath.Join(w.dir, "kept")
	if err := errors.Join(os.RemoveAll(dir), w.ownedDir(dir)); err != nil {
		return "", err
	}
	for _, n := range names {
		b, err := os.ReadFile(filepath.Join(w.data, "pg_wal", n))
		if err != nil {
			return "", err
		}
		if err := w.writeAsPostgres(filepath.Join(dir, n), b); err != nil {
			return "", err
		}
	}
	return dir, nil
}
