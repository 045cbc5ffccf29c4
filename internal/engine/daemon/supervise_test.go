package daemon_test

import (
	"context"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"

	"github.com/pgark/terraform-provider-pgark/internal/engine/daemon/control"
	"github.com/pgark/terraform-provider-pgark/test/pgtest"
)

func TestSupervise(t *testing.T) {
	t.Parallel()
	repo := directory(t)
	c := pgtest.Start(t, pgtest.Options{NoStart: true})
	g := newGuest(t, c, repo, repo)
	own(t, repo)
	p := g.start("supervise", jobName, g.instance.Name)
	child := func() int {
		s, err := control.GetStatus(context.Background(), g.socket())
		if err != nil {
			return 0
		}
		return s.PID
	}
	eventually(t, "the runner answers", func() bool { return child() != 0 })
	first := child()
	pidFile := g.layout.PIDFile(jobName, g.instance.Name)
	b, err := os.ReadFile(pidFile)
	if err != nil || strings.TrimSpace(string(b)) != strconv.Itoa(p.cmd.Process.Pid) {
		t.Errorf("pid file: got %q, %v; expected the supervisor's %d", b, err, p.cmd.Process.Pid)
	}
	if first == p.cmd.Process.Pid {
		t.Error("the runner should be a process of its own")
	}

	second := g.start("supervise", jobName, g.instance.Name)
	<-second.done
	if second.err == nil {
		t.Error("a second supervisor should be refused")
	}

	if err := syscall.Kill(first, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the runner was started again", func() bool { n := child(); return n != 0 && n != first })

	// SIGHUP reaches the child.
	g.job.Enabled = false
	g.declare()
	if err := p.cmd.Process.Signal(syscall.SIGHUP); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the job file was read again", func() bool { return !g.status().Enabled })

	if err := p.cmd.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	<-p.done
	if p.err != nil {
		t.Errorf("the supervisor ended: %v", p.err)
	}
	if n := child(); n != 0 {
		t.Errorf("the runner %d goes on", n)
	}
	if _, err := os.Stat(pidFile); err == nil {
		t.Error("the pid file was left behind")
	}
	log, err := os.ReadFile(g.layout.LogFile(jobName, g.instance.Name))
	if err != nil || !strings.Contains(string(log), "runner stopped") || !strings.Contains(string(log), "started again") {
		t.Errorf("the log should tell of both: %v\n%s", err, log)
	}

	// Killed itself: the child ends, and another supervisor takes over.
	p = g.start("supervise", jobName, g.instance.Name)
	eventually(t, "the runner answers", func() bool { return child() != 0 })
	if err := p.cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the orphan ends", func() bool { return child() == 0 })
	p = g.start("supervise", jobName, g.instance.Name)
	eventually(t, "the runner answers", func() bool { return child() != 0 })
	if err := p.cmd.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	<-p.done
}

func TestRunner_underSystemd(t *testing.T) {
	t.Parallel()
	repo := directory(t)
	c := pgtest.Start(t, pgtest.Options{NoStart: true})
	g := newGuest(t, c, repo, repo)
	own(t, repo)
	name := filepath.Join(g.dir, "notify")
	manager, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: name, Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	defer manager.Close()
	pgtest.Chown(t, name)
	var mu sync.Mutex
	said := map[string]int{}
	go func() {
		b := make([]byte, 4096)
		for {
			n, err := manager.Read(b)
			if err != nil {
				return
			}
			mu.Lock()
			said[string(b[:n])]++
			mu.Unlock()
		}
	}()
	count := func(what string) int {
		mu.Lock()
		defer mu.Unlock()
		return said[what]
	}
	g.env = []string{"NOTIFY_SOCKET=" + name, "WATCHDOG_USEC=300000"}
	g.run()
	eventually(t, "systemd knows that it is ready, and what it does", func() bool {
		return count("READY=1") == 1 && count("STATUS=protecting "+g.instance.Name+" of job orders") > 0
	})
	eventually(t, "it feeds the watchdog", func() bool { return count("WATCHDOG=1") >= 3 })
	g.stop()
	eventually(t, "systemd knows that it stops", func() bool { return count("STOPPING=1") == 1 })
}
