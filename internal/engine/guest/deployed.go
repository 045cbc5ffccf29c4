//go:build linux

package guest

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/pgark/terraform-provider-pgark/internal/engine/job"
)

// deployed is deployed.json: what Apply wrote last, where the guest's own files cannot tell whether they are that still.
// Digests are SHA-256 in hexadecimal; the file is for whoever deploys only, because one of them is of a secret.
type deployed struct {
	Format      int               `json:"format"`
	Credentials string            `json:"credentials,omitempty"` // of the credentials file; "": there is none
	Units       map[string]string `json:"units,omitempty"`       // of the unit files, by instance
}

// deployedFile lies beside the state directories of the job's instances.
func (g *local) deployedFile(name string) string {
	return filepath.Join(filepath.Dir(g.layout.StateDirectory(name, "x")), "deployed.json")
}

// readDeployed returns nil where there is none, or it may not be read: nothing is known then, and nothing is claimed.
func (g *local) readDeployed(name string) *deployed {
	b, err := os.ReadFile(g.deployedFile(name))
	if err != nil {
		return nil
	}
	d := new(deployed)
	if err := json.Unmarshal(b, d); err != nil {
		return nil
	}
	return d
}

func (g *local) writeDeployed(name string, d *deployed) error {
	b, err := json.MarshalIndent(d, "", "  ")
	if err != nil {
		return err
	}
	if _, err := writeFile(g.deployedFile(name), append(b, '\n'), 0o600, root()); err != nil {
		return fmt.Errorf("remember what was deployed: %w", err)
	}
	return nil
}

func hexDigest(b []byte) string {
	sum := sha256.Sum256(b)
	return hex.EncodeToString(sum[:])
}

// fileDigest is the digest of a file; "" if it is not there.
func fileDigest(path string) (string, error) {
	b, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return "", nil
	}
	if err != nil {
		return "", err
	}
	return hexDigest(b), nil
}

// credentialsState tells which key a job's credentials file holds, and whether it is the file that was deployed.
func (g *local) credentialsState(name string) (accessKeyID string, changed bool) {
	file := g.layout.CredentialsFile(name)
	b, err := os.ReadFile(file)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return "", false
	}
	digest := ""
	if err == nil {
		digest = hexDigest(b)
		if c, err := job.ParseCredentials(b); err == nil {
			accessKeyID = c.AccessKeyID
		}
		if info, err := os.Stat(file); err == nil && info.Mode().Perm() != 0o600 {
			changed = true
		}
	}
	d := g.readDeployed(name)
	return accessKeyID, changed || d != nil && d.Credentials != digest
}
