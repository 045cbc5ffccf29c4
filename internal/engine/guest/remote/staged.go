package remote

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"github.com/pgark/terraform-provider-pgark/internal/engine/job"
)

// RemoveStaged removes the file of the program that runs if it was only brought for this run: it lies in the incoming
// directory of the library or in a staging directory of its own. Those directories go too, and the library if that
// leaves it empty. A runner that is deployed, or lies anywhere else, stays. layout is the one that was found by the
// program's path before: job.FindLayout cannot find it any more.
func RemoveStaged(layout job.Layout) error {
	exe, err := os.Executable()
	if err != nil {
		return fmt.Errorf("find own binary: %w", err)
	}
	return removeStaged(layout, exe)
}

func removeStaged(layout job.Layout, exe string) error {
	dir := filepath.Dir(exe)
	library := ""
	switch {
	case filepath.Base(exe) != "pgark":
		return nil
	case strings.HasPrefix(filepath.Base(dir), stagePrefix):
	case filepath.Base(dir) == incoming && filepath.Base(filepath.Dir(dir)) == filepath.Base(layout.LibDirectory()):
		library = filepath.Dir(dir)
	default:
		return nil
	}
	ours, err := os.Stat("/proc/self/exe")
	if err != nil {
		return fmt.Errorf("find own binary: %w", err)
	}
	// What lies there now may be somebody else's, who will run it in a moment.
	there, err := os.Lstat(exe)
	if err == nil && os.SameFile(ours, there) {
		err = os.Remove(exe)
	}
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("remove what was brought: %w", err)
	}
	// Directories that are not empty are in use, and go with whoever uses them. Those above the library are the machine's,
	// but for a root of its own.
	empty := []string{dir}
	if library != "" {
		empty = append(empty, library)
		if root := filepath.Clean("/" + layout.Root); layout.Root != "" {
			for dir := filepath.Dir(library); len(dir) > len(root); dir = filepath.Dir(dir) {
				empty = append(empty, dir)
			}
		}
	}
	for _, dir := range empty {
		if os.Remove(dir) != nil {
			break
		}
	}
	return nil //nolint:nilerr // see above: a file that is not there is removed
}
