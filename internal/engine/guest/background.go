//go:build linux

package guest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/pgark/terraform-provider-pgark/internal/engine/job"
)

// background keeps a runner alive where there is no systemd: a process of its own session, which supervises the runner
// (pgark run --supervise), writes its pid file and its log, and belongs to the instance's owner. After a start of the
// machine cron brings it back, where there is one (boot.go).
type background struct {
	layout        job.Layout
	job, instance string
	owner         account

	mu      sync.Mutex // guards process
	process *started
}

// started is a supervisor that this process started.
type started struct {
	done chan struct{} // closed once it was waited for
}

var _ runner = (*background)(nil)

// There is nothing to install but what starts it with the machine, which all runners share.
func (b *background) install(context.Context) (bool, error) {
	return false, writeBootFile(b.layout)
}

func (b *background) facts(context.Context) (runnerFacts, error) {
	f := runnerFacts{installed: true}
	pids, err := b.processes(func([]string) bool { return true })
	if err != nil {
		return f, err
	}
	f.alive = len(pids) > 0
	f.what = "no process of it runs"
	if f.alive {
		f.what = fmt.Sprintf("process %d", pids[0])
	}
	f.disabled, err = bootFileMissing(b.layout)
	return f, err
}

func (b *background) start(ctx context.Context) error {
	if err := b.stop(ctx); err != nil {
		return err
	}
	path := b.layout.LogFile(b.job, b.instance)
	// The supervisor opens its log by itself; here goes what it has to say before.
	log, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_APPEND|syscall.O_NOFOLLOW, 0o640)
	if err != nil {
		return err
	}
	defer log.Close()
	if err := chown(path, b.owner); err != nil {
		return err
	}
	var cmd *exec.Cmd
	err = untilWritten(ctx, func() error {
		cmd = b.command(ctx, log)
		return cmd.Start()
	})
	if err != nil {
		return fmt.Errorf("start %s: %w", cmd.Path, err)
	}
	p := &started{done: make(chan struct{})}
	// Whoever starts a process waits for it, or it stays as a zombie for as long as we live.
	go func() {
		_ = cmd.Wait() // its log says why it ended
		close(p.done)
	}()
	b.mu.Lock()
	b.process = p
	b.mu.Unlock()
	return nil
}

func (b *background) command(ctx context.Context, log *os.File) *exec.Cmd {
	// It goes on when the call that started it has ended.
	cmd := exec.CommandContext(context.WithoutCancel(ctx), b.layout.BinaryLink(), "run", "--job", b.job, "--instance", b.instance, "--supervise")
	// A new session: a Ctrl-C that ends Terraform must not end it.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	runAs(cmd, b.owner)
	cmd.Env = append(cmd.Env, "TMPDIR="+b.layout.StateDirectory(b.job, b.instance)) // never /tmp, which may be small, or no place to write to
	if b.layout.Root != "" {
		cmd.Env = append(cmd.Env, job.RootVariable+"="+b.layout.Root)
	}
	cmd.Dir = "/"
	cmd.Stdout, cmd.Stderr = log, log
	return cmd
}

// ended tells whether the supervisor that start started has ended.
func (b *background) ended() bool {
	b.mu.Lock()
	p := b.process
	b.mu.Unlock()
	if p == nil {
		return false
	}
	select {
	case <-p.done:
		return true
	default:
		return false
	}
}

func (b *background) stop(ctx context.Context) error {
	// One that somebody has halted cannot end.
	all, err := b.processes(func([]string) bool { return true })
	if err != nil {
		return err
	}
	for _, pid := range all {
		_ = syscall.Kill(pid, syscall.SIGCONT) // it may be gone
	}
	// The supervisor first: it would start the runner again. It passes the signal on and waits for its runner, so that
	// there is nothing left to stop the second time, unless it was killed.
	for _, which := range []func(args []string) bool{isSupervisor, func([]string) bool { return true }} {
		pids, err := b.processes(which)
		if err != nil {
			return err
		}
		for _, pid := range pids {
			if err := endProcess(ctx, pid); err != nil {
				return fmt.Errorf("stop the runner of %s: %w", b.instance, err)
			}
		}
	}
	return nil
}

func isSupervisor(args []string) bool { return slices.Contains(args, "--supervise") }

// processes finds the instance's supervisor and runner among all processes. The pid file would not do: a supervisor that
// was just started has not written it yet, and one that was killed leaves it behind.
func (b *background) processes(which func(args []string) bool) ([]int, error) {
	lib, err := filepath.EvalSymlinks(b.layout.LibDirectory())
	if errors.Is(err, fs.ErrNotExist) {
		lib = b.layout.LibDirectory()
	} else if err != nil {
		return nil, err
	}
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return nil, fmt.Errorf("read processes: %w", err)
	}
	var pids []int
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil {
			continue
		}
		exe, err := os.Readlink(filepath.Join("/proc", e.Name(), "exe"))
		if err != nil || !strings.HasPrefix(exe, lib+"/") {
			continue
		}
		cmdline, err := os.ReadFile(filepath.Join("/proc", e.Name(), "cmdline"))
		if err != nil {
			continue // it has just ended
		}
		args := strings.Split(strings.TrimRight(string(cmdline), "\x00"), "\x00")
		if len(args) > 1 && args[1] == "run" && b.concerns(args[2:]) && which(args) {
			pids = append(pids, pid)
		}
	}
	return pids, nil
}

// concerns tells whether arguments of `pgark run` name this instance.
func (b *background) concerns(args []string) bool {
	line := " " + strings.ReplaceAll(strings.Join(args, " "), "=", " ") + " " // --job orders, --job=orders
	return strings.Contains(line, " --job "+b.job+" ") && strings.Contains(line, " --instance "+b.instance+" ")
}

// endProcess asks a process to end, and kills it if it does not in time.
func endProcess(ctx context.Context, pid int) error {
	if err := syscall.Kill(pid, syscall.SIGTERM); err != nil && !errors.Is(err, syscall.ESRCH) {
		return fmt.Errorf("process %d: %w", pid, err)
	}
	killAt := time.Now().Add(stopTimeout)
	for wait := 5 * time.Millisecond; ; wait = min(2*wait, 200*time.Millisecond) {
		if gone(pid) {
			return nil
		}
		if time.Now().After(killAt) {
			_ = syscall.Kill(pid, syscall.SIGKILL) // it may have ended just now
			killAt = killAt.Add(stopTimeout)
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("process %d does not end: %w", pid, context.Cause(ctx))
		case <-time.After(wait):
		}
	}
}

// gone tells whether a process has ended. One that nobody has waited for yet has.
func gone(pid int) bool {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return true
	}
	// "pid (name) state …": the name may hold parentheses.
	i := bytes.LastIndexByte(b, ')')
	return i >= 0 && i+2 < len(b) && (b[i+2] == 'Z' || b[i+2] == 'X')
}

func (b *background) remove(context.Context) error {
	for _, f := range []string{b.layout.PIDFile(b.job, b.instance), b.layout.Socket(b.job, b.instance)} {
		if err := os.Remove(f); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	logs, _ := filepath.Glob(b.layout.LogFile(b.job, b.instance) + "*") // the pattern is well formed
	for _, f := range logs {
		if err := os.Remove(f); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	return nil
}

func (b *background) log(context.Context) string {
	return tail(b.layout.LogFile(b.job, b.instance), logTail)
}
