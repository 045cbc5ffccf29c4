package daemon

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"github.com/pgark/terraform-provider-pgark/internal/engine/job"
)

// machineID tells which machine this is: what its operating system says, or, where that says nothing, what deploying
// the job has put below Layout.StateRoot.
func machineID(l job.Layout) (string, error) {
	for _, file := range []string{
		filepath.Join(filepath.Dir(l.ConfigDirectory()), "machine-id"), // /etc, or that of a root moved elsewhere
		filepath.Join(l.StateRoot(), "machine-id"),
		"/etc/machine-id",
	} {
		b, err := os.ReadFile(file)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return "", fmt.Errorf("machine id: %w", err)
		}
		if id := strings.TrimSpace(string(b)); id != "" && id != "uninitialized" {
			return id, nil
		}
	}
	return "", fmt.Errorf("machine id: neither /etc/machine-id nor %s holds one; apply the job again", filepath.Join(l.StateRoot(), "machine-id"))
}
