package main

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// sample is one measurement.
type sample struct {
	wall   time.Duration
	cpu    time.Duration // user and system, of the tool, its resident part and every descendant, ended or not
	rss    int64         // bytes, peak of the sum over those processes (shared pages count in each), sampled
	stored int64         // bytes that the S3 directory grew by
}

// command is a program to run as the postgres user.
type command struct {
	argv   []string
	env    []string
	dir    string
	chroot string
}

// residentPart says whether a tool's resident process belongs to a measurement.
type residentPart bool

const (
	counted    residentPart = true
	notCounted residentPart = false
)

const clockTick = 100 // USER_HZ, fixed in Linux's user-space interface

// becomeReaper makes orphaned descendants ours, so that daemonised children are waited for and counted.
func becomeReaper() error {
	return unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
}

type processInfo struct {
	pid, parent int
	cpu         time.Duration // own time and that of children it has waited for
	rss         int64
}

func processes() map[int]processInfo {
	all := map[int]processInfo{}
	stats, _ := filepath.Glob("/proc/[0-9]*/stat")
	for _, name := range stats {
		b, err := os.ReadFile(name)
		if err != nil {
			continue // it ended meanwhile
		}
		pid, err := strconv.Atoi(filepath.Base(filepath.Dir(name)))
		if err != nil {
			continue
		}
		// The command name may hold spaces and parentheses; the fields begin after the last one.
		f := strings.Fields(string(b[bytes.LastIndexByte(b, ')')+1:]))
		if len(f) < 22 {
			continue
		}
		number := func(i int) int64 { v, _ := strconv.ParseInt(f[i], 10, 64); return v }
		all[pid] = processInfo{
			pid: pid, parent: int(number(1)),
			cpu: time.Duration(number(11)+number(12)+number(13)+number(14)) * time.Second / clockTick,
			rss: number(21) * int64(os.Getpagesize()),
		}
	}
	return all
}

// usage adds up the CPU of all descendants that are not below an excluded process, and their present memory. The
// resident runner counts only in what it takes part in.
func (w *world) usage() (cpu time.Duration, rss int64) {
	all := processes()
	self := os.Getpid()
	below := func(pid int) bool {
		for pid != self {
			p, ok := all[pid]
			if !ok || pid <= 1 || w.excluded(pid) || !w.residentCounts && w.isResident(pid) {
				return false
			}
			pid = p.parent
		}
		return true
	}
	for pid, p := range all {
		if pid != self && below(pid) {
			cpu += p.cpu
			rss += p.rss
		}
	}
	var r syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_CHILDREN, &r); err == nil {
		cpu += time.Duration(r.Utime.Nano() + r.Stime.Nano())
	}
	return cpu, rss
}

// during samples memory while fn runs and accounts CPU and stored bytes over it.
func (w *world) during(t tool, fn func() error) (sample, error) {
	syscall.Sync()
	before, _ := w.usage()
	stored := t.stored()
	stop, done := make(chan struct{}), make(chan int64)
	go func() {
		var peak int64
		tick := time.NewTicker(25 * time.Millisecond)
		defer tick.Stop()
		for {
			_, rss := w.usage()
			peak = max(peak, rss)
			select {
			case <-stop:
				done <- peak
				return
			case <-tick.C:
			}
		}
	}()
	start := time.Now()
	err := fn()
	wall := time.Since(start)
	close(stop)
	peak := <-done
	after, _ := w.usage()
	return sample{wall: wall, cpu: after - before, rss: peak, stored: t.stored() - stored}, err
}

// measure runs one command of a tool. resident says whether the tool's resident part does the work.
func (w *world) measure(t tool, c command, resident residentPart) (sample, error) {
	w.residentCounts = resident == counted && t.name() == "pgark"
	return w.during(t, func() error { return w.runAsPostgres(c) })
}

// runAsPostgres runs c as the postgres user and returns its output in the error, if it fails.
func (w *world) runAsPostgres(c command) error {
	cmd := exec.CommandContext(w.ctx, c.argv[0], c.argv[1:]...)
	cmd.Dir = c.dir
	if cmd.Dir == "" {
		cmd.Dir = w.dir
	}
	cmd.Env = append(append(os.Environ(), "HOME="+w.dir), c.env...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Chroot: c.chroot, Credential: &syscall.Credential{Uid: w.uid, Gid: w.gid}}
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := cmd.Run(); err != nil {
		return fmt.Errorf("%s: %w\n%s", strings.Join(c.argv, " "), err, tail(out.Bytes(), 2000))
	}
	return nil
}

func tail(b []byte, n int) []byte {
	if len(b) > n {
		return b[len(b)-n:]
	}
	return b
}

// measurePush plays PostgreSQL's archiver: one sh -c a segment, in order, .ready becoming .done; it ends when the last
// one is acknowledged. Both tools may look ahead in archive_status, as they do in production.
//
// While the segments were written, nobody could look ahead: makeSegments hides them and has the runner stopped.
func (w *world) measurePush(t tool, names []string) (sample, error) {
	status := filepath.Join(w.data, "pg_wal", "archive_status")
	if t.name() == "pgark" {
		if err := w.signalResident(syscall.SIGCONT); err != nil {
			return sample{}, err
		}
	}
	w.residentCounts = t.name() == "pgark"
	s, err := w.during(t, func() error {
		for _, n := range names {
			_ = os.Remove(filepath.Join(status, n+".done"))
			if err := w.writeAsPostgres(filepath.Join(status, n+".ready"), nil); err != nil {
				return err
			}
		}
		for _, n := range names {
			if err := w.runAsPostgres(t.push(n)); err != nil {
				return err
			}
			if err := os.Rename(filepath.Join(status, n+".ready"), filepath.Join(status, n+".done")); err != nil {
				return err
			}
		}
		return nil
	})
	return s, errors.Join(err, w.settle())
}

// settle waits until daemonised parts of the tool, orphans that became ours, have ended, and reaps them.
func (w *world) settle() error {
	self := os.Getpid()
	for deadline := time.Now().Add(time.Minute); time.Now().Before(deadline); time.Sleep(20 * time.Millisecond) {
		busy := false
		for pid, p := range processes() {
			if p.parent != self || w.known(pid) {
				continue
			}
			busy = true
			_, _ = syscall.Wait4(pid, nil, syscall.WNOHANG, nil) // still running, or reaped now
		}
		if !busy {
			return nil
		}
	}
	return errors.New("a daemonised part of the tool is still running after a minute")
}
