package job

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/pgark/terraform-provider-pgark/internal/engine/postgres"
)

// SpoolPlace is a directory in which WAL may lie that PostgreSQL was told is safe: the temporary folder of one series in
// one repository. The runner notes it before it puts anything there, and forgets it when nothing is left.
type SpoolPlace struct {
	Directory  string            `json:"directory"`
	Repository string            `json:"repository"` // its id
	URL        string            `json:"url"`
	SystemID   postgres.SystemID `json:"system_identifier"`
}

// SpoolPlacesFile holds an instance's SpoolPlaces, as a JSON array. It is durable before any WAL lies in them.
func (l Layout) SpoolPlacesFile(job, instance string) string {
	return filepath.Join(l.StateDirectory(job, instance), "spools.json")
}

// SpoolPlaces reads them; no file is none. A file that cannot be read is an error: WAL that is nowhere else may lie where it
// says.
func (l Layout) SpoolPlaces(job, instance string) ([]SpoolPlace, error) {
	file := l.SpoolPlacesFile(job, instance)
	b, err := os.ReadFile(file)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	var all []SpoolPlace
	if err == nil {
		if err = json.Unmarshal(b, &all); err != nil {
			err = fmt.Errorf("%s: %w", file, err)
		}
	}
	if err != nil {
		return nil, fmt.Errorf("in which temporary folders WAL may wait that is nowhere else: %w; look for files that end in .sealed where temp_folder was, "+
			"then move this file away: the runner makes a new one, and stores what lies in the folder that is declared", err)
	}
	return all, nil
}
