package job

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"github.com/pgark/terraform-provider-pgark/internal/engine/objectstore"
)

// CredentialsName is the name under which systemd hands over the credentials file (LoadCredential=).
const CredentialsName = "credentials"

// The variables of a credentials file, named as the AWS tools name them.
const (
	accessKeyVariable    = "AWS_ACCESS_KEY_ID"
	secretKeyVariable    = "AWS_SECRET_ACCESS_KEY"
	sessionTokenVariable = "AWS_SESSION_TOKEN"
)

// EncodeCredentials writes a credentials file: lines of NAME=value, unquoted.
func EncodeCredentials(c objectstore.Credentials) []byte {
	var b bytes.Buffer
	fmt.Fprintf(&b, "%s=%s\n%s=%s\n", accessKeyVariable, c.AccessKeyID, secretKeyVariable, c.SecretAccessKey)
	if c.SessionToken != "" {
		fmt.Fprintf(&b, "%s=%s\n", sessionTokenVariable, c.SessionToken)
	}
	return b.Bytes()
}

// ParseCredentials reads a credentials file. Empty lines and lines that begin with # are skipped. Its errors name lines
// and variables, never values.
func ParseCredentials(b []byte) (*objectstore.Credentials, error) {
	c := new(objectstore.Credentials)
	lines := bufio.NewScanner(bytes.NewReader(b))
	for n := 1; lines.Scan(); n++ {
		line := strings.TrimSpace(lines.Text())
		if line == "" || strings.HasPrefix(line, "#") {
			continue
		}
		name, value, ok := strings.Cut(line, "=")
		if !ok {
			return nil, fmt.Errorf("line %d: expected NAME=value", n)
		}
		switch name {
		case accessKeyVariable:
			c.AccessKeyID = value
		case secretKeyVariable:
			c.SecretAccessKey = value
		case sessionTokenVariable:
			c.SessionToken = value
		default:
			return nil, fmt.Errorf("line %d: expected %s, %s or %s", n, accessKeyVariable, secretKeyVariable, sessionTokenVariable)
		}
	}
	if err := lines.Err(); err != nil {
		return nil, err
	}
	if c.AccessKeyID == "" || c.SecretAccessKey == "" {
		return nil, fmt.Errorf("expected both %s and %s", accessKeyVariable, secretKeyVariable)
	}
	return c, nil
}

// LoadCredentials reads the job's credentials: those that systemd handed to this process, else the job's credentials
// file. It returns nil when there are none, which means the AWS chain.
func LoadCredentials(l Layout, job string) (*objectstore.Credentials, error) {
	files := []string{l.CredentialsFile(job)}
	if dir := os.Getenv("CREDENTIALS_DIRECTORY"); dir != "" {
		files = append([]string{filepath.Join(dir, CredentialsName)}, files...)
	}
	for _, file := range files {
		b, err := os.ReadFile(file)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("job %s: credentials: %w", job, err)
		}
		c, err := ParseCredentials(b)
		if err != nil {
			return nil, fmt.Errorf("job %s: credentials %s: %w", job, file, err)
		}
		return c, nil
	}
	return nil, nil
}
