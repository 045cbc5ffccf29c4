//go:build linux

package guest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/pgark/terraform-provider-pgark/internal/engine/postgres"
)

// restartTimeout bounds a restart. A server with much to write takes its time to stop.
const restartTimeout = 5 * time.Minute

// serviceOf is the systemd unit that a server's process belongs to; "" if it is none.
func serviceOf(pid int) string {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/cgroup", pid))
	if err != nil || !systemdRuns() {
		return ""
	}
	for line := range strings.Lines(string(b)) {
		// 0::/system.slice/system-postgresql.slice/postgresql@15-main.service
		unit := filepath.Base(strings.TrimSpace(line))
		if strings.HasSuffix(unit, ".service") && strings.Contains(line, "/system.slice/") {
			return unit
		}
	}
	return ""
}

// binaries is the directory of a running server's programs; "" if it cannot be told.
func binaries(pid int) string {
	exe, err := os.Readlink(fmt.Sprintf("/proc/%d/exe", pid))
	if err != nil {
		return ""
	}
	return filepath.Dir(exe)
}

// canRestart says in an error why a cluster's server cannot be restarted from here.
func canRestart(c cluster) error {
	if serviceOf(c.pid) != "" {
		return nil
	}
	if c.debian != "" {
		_, err := exec.LookPath("pg_ctlcluster")
		return err
	}
	dir := binaries(c.pid)
	if dir == "" {
		return errors.New("its programs are not found")
	}
	_, err := os.Stat(filepath.Join(dir, "pg_ctl"))
	return err
}

// sendersWanted is what max_wal_senders becomes where it is 0: PostgreSQL's own default.
const sendersWanted = "10"

// restartSettings are the settings that have to be others before WAL can be archived and streamed, and that take a restart;
// all at once. A replica archives only with archive_mode = always. With wal_level = minimal, max_wal_senders is 0, which
// does where nothing is streamed.
func (s *inspected) restartSettings() map[string]string {
	settings := map[string]string{}
	mode := archiveModeOn
	if s.InRecovery {
		mode = archiveAlways
	}
	if there := s.Setting(archiveMode); there != mode && there != archiveAlways {
		settings[archiveMode] = mode
	}
	if s.Setting(walLevel) == walLevelMinimal {
		settings[walLevel] = "replica"
	}
	if s.stream != nil && s.Setting(maxWALSenders) == "0" {
		settings[maxWALSenders] = sendersWanted
	}
	return settings
}

// restart restarts a cluster's server the way it was started, and waits until it answers. If the server does not start,
// rescue (which may be nil) is to change what may keep it from starting, and it is tried once more.
//
// Once begun it goes on, whatever becomes of ctx: whoever ended pg_ctl between its stop and its start would leave the
// database down.
func (g *local) restart(ctx context.Context, c cluster, rescue func() error) error {
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), restartTimeout)
	defer cancel()
	// Made from what its process tells, as long as there is one.
	command, err := g.restartCommand(ctx, c)
	if err != nil {
		return err
	}
	err = runRestart(command())
	if err != nil && rescue != nil {
		if e := rescue(); e != nil {
			return errors.Join(err, e)
		}
		err = runRestart(command())
	}
	if err != nil {
		return err
	}
	for wait := 20 * time.Millisecond; ; wait = min(2*wait, time.Second) {
		conn, err := connect(ctx, c.Instance.Instance)
		if err == nil {
			closeNow(conn)
			return nil
		}
		if !postgres.IsNotRunning(err) && !isStarting(err) {
			return fmt.Errorf("restart PostgreSQL: %w", err)
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("restart PostgreSQL: it takes no connections: %w", err)
		case <-time.After(wait):
		}
	}
}

func (g *local) restartCommand(ctx context.Context, c cluster) (func() *exec.Cmd, error) {
	major, name, debian := strings.Cut(c.debian, "/")
	switch service := serviceOf(c.pid); {
	case service != "":
		return func() *exec.Cmd { return exec.CommandContext(ctx, "systemctl", "restart", service) }, nil
	case debian:
		return func() *exec.Cmd { return exec.CommandContext(ctx, "pg_ctlcluster", major, name, "restart") }, nil
	}
	owner, err := lookupAccount(c.Owner)
	if err != nil {
		return nil, err
	}
	program, log := filepath.Join(binaries(c.pid), "pg_ctl"), serverLog(c)
	return func() *exec.Cmd {
		cmd := exec.CommandContext(ctx, program, "restart", "-s", "-w", "-m", "fast",
			"-t", fmt.Sprint(int(restartTimeout.Seconds())), "-D", c.DataDirectory, "-l", log)
		runAs(cmd, owner)
		cmd.Dir = c.DataDirectory
		return cmd
	}, nil
}

func runRestart(cmd *exec.Cmd) error {
	// A file, not a pipe: whoever starts a server leaves its output open in it, and a pipe's reader would wait for that.
	// In memory, because /tmp may be full, or not ours to write.
	fd, err := unix.MemfdCreate("pgark-restart", unix.MFD_CLOEXEC)
	if err != nil {
		return fmt.Errorf("restart PostgreSQL: %w", os.NewSyscallError("memfd_create", err))
	}
	out := os.NewFile(uintptr(fd), "output of the restart")
	defer out.Close()
	cmd.Stdout, cmd.Stderr = out, out
	if err := cmd.Run(); err != nil {
		said := make([]byte, 4<<10)
		n, _ := out.ReadAt(said, 0)
		return fmt.Errorf("restart PostgreSQL: %s: %w: %s", strings.Join(cmd.Args, " "), err, bytes.TrimSpace(said[:n]))
	}
	return nil
}

// runAs lets a command run as owner, with nothing of our environment but what every program needs.
func runAs(cmd *exec.Cmd, owner account) {
	cmd.Env = []string{"PATH=" + os.Getenv("PATH"), "HOME=/", "LC_ALL=C"}
	if cmd.SysProcAttr == nil {
		cmd.SysProcAttr = &syscall.SysProcAttr{}
	}
	if os.Geteuid() == owner.uid {
		return
	}
	groups := make([]uint32, len(owner.groups))
	for i, g := range owner.groups {
		groups[i] = uint32(g)
	}
	cmd.SysProcAttr.Credential = &syscall.Credential{Uid: uint32(owner.uid), Gid: uint32(owner.gid), Groups: groups}
}
