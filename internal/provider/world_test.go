package provider

import (
	"bytes"
	"compress/gzip"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	tfjson "github.com/hashicorp/terraform-json"
	"github.com/hashicorp/terraform-plugin-go/tfprotov6"
	"github.com/hashicorp/terraform-plugin-testing/helper/resource"
	"github.com/hashicorp/terraform-plugin-testing/statecheck"

	"github.com/pgark/terraform-provider-pgark/internal/engine/guest"
	"github.com/pgark/terraform-provider-pgark/internal/engine/job"
	"github.com/pgark/terraform-provider-pgark/internal/engine/objectstore"
	"github.com/pgark/terraform-provider-pgark/internal/engine/repository"
	"github.com/pgark/terraform-provider-pgark/test/pgtest"
	"github.com/pgark/terraform-provider-pgark/test/s3test"
)

// The acceptance tests run the CLI that is on PATH against this provider, a real PostgreSQL and a real S3 server, with
// the guest's files below a directory of their own. `make test` sets TF_ACC=1, which the test framework asks for.

// testRunner is the runner as these tests deploy it: built once, from this source.
var testRunner = sync.OnceValues(func() ([]byte, error) {
	return built(func(file string) *exec.Cmd {
		return exec.CommandContext(context.Background(), "bash", "../../runner/build.sh", runtime.GOARCH, file)
	})
})

// built returns what a command builds in a file.
func built(command func(file string) *exec.Cmd) ([]byte, error) {
	out, err := os.MkdirTemp("", "pgark-provider-test.")
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(out)
	file := filepath.Join(out, "program")
	cmd := command(file)
	if text, err := cmd.CombinedOutput(); err != nil {
		return nil, fmt.Errorf("%s: %w\n%s", cmd, err, text)
	}
	return os.ReadFile(file)
}

// accWorld is one guest with one PostgreSQL of its own, and an S3 server.
type accWorld struct {
	*testing.T

	cluster *pgtest.Cluster
	s3      *s3test.Server
	layout  job.Layout

	here    func() job.Layout // of this machine, for those that reach it as such
	changed []byte            // appended to the runner: another version of it

	mu     sync.Mutex        // guards packed
	packed map[string][]byte // compressed runners by digest
}

const accBucket = "provider"

// needTerraform fails a run without TF_ACC: a skipped acceptance test would look like a passed one.
func needTerraform(t *testing.T) {
	t.Helper()
	if os.Getenv("TF_ACC") == "" {
		t.Fatal("TF_ACC is not set: acceptance tests would be skipped; run make test, or set TF_ACC=1")
	}
}

func newAccWorld(t *testing.T, o pgtest.Options) *accWorld {
	t.Helper()
	needTerraform(t)
	if o.Settings == nil {
		o.Settings = map[string]string{"archive_mode": "on"}
	}
	w := &accWorld{T: t, s3: s3test.Start(t), layout: job.Layout{Root: pgtest.Dir(t)}, here: job.FindLayout, packed: map[string][]byte{}}
	w.s3.CreateBucket(accBucket)
	w.cluster = pgtest.Start(t, o)
	t.Setenv(job.RootVariable, w.layout.Root)
	for _, name := range []string{"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_PROFILE", "AWS_REGION", "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "TF_CLI_CONFIG_FILE"} {
		t.Setenv(name, "")
		os.Unsetenv(name)
	}
	t.Setenv("AWS_EC2_METADATA_DISABLED", "true")
	t.Cleanup(func() {
		// Where the test failed before its destroy, runners would go on.
		ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
		defer cancel()
		for _, name := range []string{"orders", "demo"} {
			if err := guest.Local(w.layout).Remove(ctx, name); err != nil {
				t.Errorf("remove job %s: %v", name, err)
			}
		}
	})
	return w
}

// factories start this provider in the test's process.
func (w *accWorld) factories() map[string]func() (tfprotov6.ProviderServer, error) {
	binary := func(string) ([]byte, error) {
		b, err := testRunner()
		return append(append([]byte{}, b...), w.changed...), err
	}
	runner := func(arch string) ([]byte, string, error) {
		b, err := binary(arch)
		if err != nil {
			return nil, "", err
		}
		sum := sha256.Sum256(b)
		digest := hex.EncodeToString(sum[:])
		w.mu.Lock()
		defer w.mu.Unlock()
		if w.packed[digest] == nil {
			if w.packed[digest], err = compress(b); err != nil {
				return nil, "", err
			}
		}
		return w.packed[digest], digest, nil
	}
	return map[string]func() (tfprotov6.ProviderServer, error){
		"pgark": func() (tfprotov6.ProviderServer, error) {
			return serve(&pgarkProvider{version: "test", world: world{layout: w.here, there: job.FindLayout, runner: runner, binary: binary}})(), nil
		},
	}
}

func compress(b []byte) ([]byte, error) {
	var packed bytes.Buffer
	z, err := gzip.NewWriterLevel(&packed, gzip.BestSpeed)
	if err != nil {
		return nil, err
	}
	if _, err := z.Write(b); err != nil {
		return nil, err
	}
	err = z.Close()
	return packed.Bytes(), err
}

// test runs the steps. In the end everything is destroyed.
func (w *accWorld) test(steps ...resource.TestStep) {
	w.Helper()
	resource.Test(w.T, resource.TestCase{ProtoV6ProviderFactories: w.factories(), Steps: steps})
}

// providerConfig is a provider block with the S3 server's keys, and extra arguments. Where the server is, the repository
// says.
func (w *accWorld) providerConfig(extra string) string {
	return fmt.Sprintf(`
provider "pgark" {
  s3 = { access_key_id = %q, secret_access_key = %q }
  %s
}
`, w.s3.AccessKeyID, w.s3.SecretAccessKey, extra)
}

func (w *accWorld) url() string { return "s3://" + accBucket + "/backups" }

func (w *accWorld) repositoryConfig() string {
	return fmt.Sprintf(`
resource "pgark_repository" "main" {
  url            = %q
  endpoint       = %q
  region         = %q
  use_path_style = true
}
`, w.url(), w.s3.Endpoint(), s3test.Region)
}

// jobConfig is the job "orders" with what every test has, and extra arguments.
func (w *accWorld) jobConfig(extra string) string {
	return fmt.Sprintf(`
resource "pgark_postgresql_backup_job" "orders" {
  name            = "orders"
  host            = "localhost"
  connection = { type = "local" }
  repository      = pgark_repository.main.url
  instances       = { include = ["*-%d"] }
  %s
}
`, w.cluster.Port, extra)
}

// instance is what the job calls the cluster.
func (w *accWorld) instance() string {
	return strconv.Itoa(w.cluster.Major) + "-" + strconv.Itoa(w.cluster.Port)
}

// archiveCommand is how the server has it, whatever archive_mode says.
func (w *accWorld) archiveCommand() string {
	w.Helper()
	return w.cluster.Scalar("select reset_val from pg_settings where name = 'archive_command'")
}

// ours is the archive_command that the job sets.
func (w *accWorld) ours() string { return w.layout.ArchiveCommand("orders", w.instance()) }

func (w *accWorld) repository() *repository.Repository {
	w.Helper()
	loc := w.s3.Location(accBucket + "/backups")
	store, err := objectstore.Open(w.Context(), loc, objectstore.Options{})
	if err != nil {
		w.Fatal(err)
	}
	repo, err := repository.Open(w.Context(), store)
	if err != nil {
		w.Fatal(err)
	}
	return repo
}

// walFiles counts what the repository holds of the job's WAL.
func (w *accWorld) walFiles() int {
	w.Helper()
	repo := w.repository()
	ids, err := repo.SeriesList(w.Context(), "orders", "")
	if err != nil {
		w.Fatal(err)
	}
	n := 0
	for _, id := range ids {
		timelines, err := repo.Series(id).Timelines(w.Context())
		if err != nil {
			w.Fatal(err)
		}
		for _, t := range timelines {
			for _, err := range repo.Series(id).ListWAL(w.Context(), t, "") {
				if err != nil {
					w.Fatal(err)
				}
				n++
			}
		}
	}
	return n
}

// guestFiles lists what is left on the guest, logs apart.
func (w *accWorld) guestFiles() []string {
	w.Helper()
	var files []string
	err := filepath.WalkDir(w.layout.Root, func(path string, d os.DirEntry, err error) error {
		if err == nil && !d.IsDir() && !strings.Contains(path, "/var/log/") {
			files = append(files, path)
		}
		return err
	})
	if err != nil && !os.IsNotExist(err) {
		w.Fatal(err)
	}
	return files
}

// noSecret checks that a state holds none of the texts, wherever in it.
type noSecret []string

func (n noSecret) CheckState(_ context.Context, req statecheck.CheckStateRequest, resp *statecheck.CheckStateResponse) {
	b, err := json.Marshal(req.State)
	if err != nil {
		resp.Error = err
		return
	}
	for _, secret := range n {
		if strings.Contains(string(b), secret) {
			resp.Error = fmt.Errorf("found a secret in the state, %d characters long", len(secret))
		}
	}
}

var _ statecheck.StateCheck = noSecret(nil)

// stateFunc makes a state check of a function.
type stateFunc func(*tfjson.State) error

func (f stateFunc) CheckState(_ context.Context, req statecheck.CheckStateRequest, resp *statecheck.CheckStateResponse) {
	resp.Error = f(req.State)
}

// inOrder makes an expression for a text that holds all the parts, in this order. Terraform wraps lines anywhere, so blanks
// match any white space and frame.
func inOrder(parts ...string) *regexp.Regexp {
	for i, p := range parts {
		parts[i] = strings.ReplaceAll(regexp.QuoteMeta(p), " ", `[\s│]+`)
	}
	return regexp.MustCompile(`(?s)` + strings.Join(parts, ".*"))
}
