package job

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
)

// MachineIDFile may name the machine by hand: it comes before what the operating system says. A machine made from a
// copied disk, whose own id is its original's, gets an identity with it; and tests make two machines of one.
func (l Layout) MachineIDFile() string { return filepath.Join(l.ConfigDirectory(), "machine-id") }

// GeneratedMachineIDFile is where deploying a job leaves a random id if the machine has none of its own.
func (l Layout) GeneratedMachineIDFile() string { return filepath.Join(l.StateRoot(), "machine-id") }

// ErrNoMachineID says that nothing tells which machine this is.
var ErrNoMachineID = errors.New("machine id: found none")

// MachineID tells which machine this is: the owner of its jobs in a repository. It reads, in this order,
// Layout.MachineIDFile, /etc/machine-id, /var/lib/dbus/machine-id and Layout.GeneratedMachineIDFile; ErrNoMachineID if
// none of them holds an id.
func MachineID(l Layout) (string, error) {
	files := []string{l.MachineIDFile(), "/etc/machine-id", "/var/lib/dbus/machine-id", l.GeneratedMachineIDFile()}
	for _, file := range files {
		b, err := os.ReadFile(file)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return "", fmt.Errorf("machine id: %w", err)
		}
		// "uninitialized" stands in images whose first boot has not ended (machine-id(5)).
		if id := strings.TrimSpace(string(b)); id != "" && id != "uninitialized" {
			return id, nil
		}
	}
	return "", fmt.Errorf("%w in %s", ErrNoMachineID, strings.Join(files, ", "))
}
