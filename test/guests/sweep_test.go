//go:build linux

package guests

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"
)

// What a killed test left is removed, processes included; what belongs to this one stays.
func TestNewNetwork_sweepsLeftovers(t *testing.T) {
	mine := NewNetwork(t)

	gone := exec.CommandContext(t.Context(), "sleep", "infinity")
	if err := gone.Start(); err != nil {
		t.Fatal(err)
	}
	name := fmt.Sprintf("%s%d-%s-n1", prefix, gone.Process.Pid, startTime(gone.Process.Pid))
	_ = gone.Process.Kill()
	_ = gone.Wait()

	group := filepath.Join(filepath.Dir(mine.cgroup), name)
	for _, dir := range []string{group, filepath.Join(group, "payload"), filepath.Join(os.TempDir(), name+"-1")} {
		if err := os.Mkdir(dir, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	if err := ip("", "netns add "+name); err != nil {
		t.Fatal(err)
	}
	fd, err := os.Open(filepath.Join(group, "payload"))
	if err != nil {
		t.Fatal(err)
	}
	defer fd.Close()
	left := exec.CommandContext(t.Context(), "sleep", "infinity")
	left.SysProcAttr = &syscall.SysProcAttr{UseCgroupFD: true, CgroupFD: int(fd.Fd())}
	if err := left.Start(); err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() { ended <- left.Wait() }()

	NewNetwork(t)
	if err := <-ended; err == nil {
		t.Error("the process that was left ended by itself")
	}
	for _, path := range []string{group, filepath.Join(os.TempDir(), name+"-1"), filepath.Join(netnsDir, name)} {
		if _, err := os.Lstat(path); err == nil {
			t.Errorf("%s is still there", path)
		}
	}
	for _, path := range []string{mine.cgroup, mine.dir, filepath.Join(netnsDir, mine.name)} {
		if _, err := os.Lstat(path); err != nil {
			t.Errorf("what is in use was removed: %v", err)
		}
	}
}
