// Package s3test runs a real S3 server for tests, and a proxy before it that injects faults.
//
// The server is versitygw with its posix backend, a child process on a free port of the loopback interface. It is looked
// for in $PGARK_TOOLS/bin, else in .tools/bin of the module, where "make tools" puts it. A test that lacks it fails.
package s3test

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/credentials"
	"github.com/aws/aws-sdk-go-v2/service/s3"
	"github.com/aws/aws-sdk-go-v2/service/s3/types"

	"github.com/pgark/terraform-provider-pgark/internal/engine/objectstore"
)

const startTimeout = 30 * time.Second // on a machine that is busy with other tests

// Region is what the server calls its region.
const Region = "us-east-1"

// Server is a running S3 server. Its methods fail the test on an error.
type Server struct {
	AccessKeyID     string
	SecretAccessKey string
	Directory       string // holds a directory a bucket

	t         testing.TB
	addr      string
	namespace string // file of its network namespace; "" for that of the test

	mu      sync.Mutex
	process *process // nil while stopped
	buckets map[string]bool
}

// process is one run of the server.
type process struct {
	cmd    *exec.Cmd
	log    bytes.Buffer  // read after exited is closed
	exited chan struct{} // closed when the process is gone
}

// Start runs a server with its data in a temporary directory. It ends with the test.
func Start(t testing.TB) *Server {
	t.Helper()
	return StartIn(t, t.TempDir())
}

// StartIn runs a server with its data in directory, which needs a file system with user extended attributes.
func StartIn(t testing.TB, directory string) *Server {
	t.Helper()
	s := newServer(t, directory, freeAddress(t))
	t.Cleanup(s.Stop)
	s.Start()
	return s
}

// StartInNamespace is Start for a server that runs in another network namespace, named by its file, and listens on
// address there ("10.1.2.3:7070"), which this process must reach. It needs root.
func StartInNamespace(t testing.TB, namespace, address string) *Server {
	t.Helper()
	s := newServer(t, t.TempDir(), address)
	s.namespace = namespace
	t.Cleanup(s.Stop)
	s.Start()
	return s
}

func newServer(t testing.TB, directory, address string) *Server {
	return &Server{
		AccessKeyID:     "AKTEST" + rand.Text()[:14],
		SecretAccessKey: rand.Text() + rand.Text()[:14],
		Directory:       directory,
		t:               t,
		addr:            address,
		buckets:         make(map[string]bool),
	}
}

// Endpoint is the server's URL.
func (s *Server) Endpoint() string { return "http://" + s.addr }

// Start runs the server again after Stop, on the same port with the same data. It returns once the server answers.
func (s *Server) Start() {
	s.t.Helper()
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.process != nil {
		return
	}
	p := &process{exited: make(chan struct{})}
	args := []string{Binary(s.t), "--port", s.addr, "--region", Region, "--keep-alive", "--quiet",
		"posix", "--data-integrity-etag", s.Directory}
	if s.namespace != "" {
		args = append([]string{"nsenter", "--net=" + s.namespace}, args...) // it becomes the server: same process
	}
	p.cmd = exec.CommandContext(context.WithoutCancel(s.t.Context()), args[0], args[1:]...)
	// The keys are in the environment, where "ps" does not show them to others.
	p.cmd.Env = append(os.Environ(), "ROOT_ACCESS_KEY_ID="+s.AccessKeyID, "ROOT_SECRET_ACCESS_KEY="+s.SecretAccessKey)
	p.cmd.Stdout, p.cmd.Stderr = &p.log, &p.log
	// It must not outlive a test that is killed.
	p.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	started := make(chan error)
	go func() {
		// The death signal comes when the thread that started the process ends, so the thread must stay.
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		err := p.cmd.Start()
		started <- err
		if err == nil {
			_ = p.cmd.Wait() // how it ended is of no interest: we end it with a signal
			close(p.exited)
		}
	}()
	if err := <-started; err != nil {
		s.t.Fatalf("start S3 server: %v", err)
	}
	s.process = p
	deadline := time.Now().Add(startTimeout)
	for {
		resp, err := s.ask()
		if err == nil {
			resp.Body.Close() // it answers, if only with a refusal
			return
		}
		select {
		case <-p.exited:
			s.process = nil
			s.t.Fatalf("the S3 server has ended at its start:\n%s", p.log.Bytes())
		case <-time.After(20 * time.Millisecond):
		}
		if time.Now().After(deadline) {
			s.t.Fatalf("the S3 server does not answer after %v: %v", startTimeout, err)
		}
	}
}

// ask makes a request without a signature, which the server refuses once it runs.
func (s *Server) ask() (*http.Response, error) {
	req, err := http.NewRequestWithContext(context.WithoutCancel(s.t.Context()), http.MethodGet, s.Endpoint(), nil)
	if err != nil {
		return nil, err
	}
	return http.DefaultClient.Do(req)
}

// Stop kills the server, as in an outage: connections break and further ones are refused. Its data stays.
func (s *Server) Stop() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.process == nil {
		return
	}
	_ = s.process.cmd.Process.Kill() // it fails if the process has ended, which is as good
	<-s.process.exited
	s.process = nil
}

// Location returns where "bucket" or "bucket/prefix" is, with the server's keys. The bucket is made if it is missing.
func (s *Server) Location(bucketPrefix string) objectstore.Location {
	s.t.Helper()
	bucket, _, _ := strings.Cut(bucketPrefix, "/")
	s.CreateBucket(bucket)
	return objectstore.Location{
		URL:          "s3://" + bucketPrefix,
		Region:       Region,
		Endpoint:     s.Endpoint(),
		UsePathStyle: true,
		Credentials:  &objectstore.Credentials{AccessKeyID: s.AccessKeyID, SecretAccessKey: s.SecretAccessKey},
	}
}

// Open opens the store at Location(bucketPrefix).
func (s *Server) Open(bucketPrefix string) objectstore.Store {
	s.t.Helper()
	store, err := objectstore.Open(s.t.Context(), s.Location(bucketPrefix), objectstore.Options{})
	if err != nil {
		s.t.Fatal(err)
	}
	return store
}

// Env is the environment in which AWS tools, Terraform and pgark find the server and its keys.
func (s *Server) Env() []string {
	return []string{
		"AWS_ACCESS_KEY_ID=" + s.AccessKeyID,
		"AWS_SECRET_ACCESS_KEY=" + s.SecretAccessKey,
		"AWS_REGION=" + Region,
		"AWS_ENDPOINT_URL=" + s.Endpoint(),
		"AWS_EC2_METADATA_DISABLED=true",
	}
}

// CreateBucket makes a bucket unless it is there.
func (s *Server) CreateBucket(bucket string) {
	s.t.Helper()
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.buckets[bucket] {
		return
	}
	_, err := s.Client().CreateBucket(context.WithoutCancel(s.t.Context()), &s3.CreateBucketInput{Bucket: &bucket})
	if _, mine := errors.AsType[*types.BucketAlreadyOwnedByYou](err); err != nil && !mine {
		s.t.Fatalf("create bucket %s: %v", bucket, err)
	}
	s.buckets[bucket] = true
}

// Client is a plain S3 client, for what the object store does not do.
func (s *Server) Client() *s3.Client {
	return s3.New(s3.Options{
		Region:                     Region,
		BaseEndpoint:               aws.String(s.Endpoint()),
		UsePathStyle:               true,
		Credentials:                credentials.NewStaticCredentialsProvider(s.AccessKeyID, s.SecretAccessKey, ""),
		RequestChecksumCalculation: aws.RequestChecksumCalculationWhenRequired,
		ResponseChecksumValidation: aws.ResponseChecksumValidationWhenRequired,
	})
}

// Binary finds versitygw, or fails the test.
func Binary(t testing.TB) string {
	t.Helper()
	tools := os.Getenv("PGARK_TOOLS")
	if tools == "" {
		tools = filepath.Join(moduleRoot(t), ".tools")
	}
	path := filepath.Join(tools, "bin", "versitygw")
	if _, err := os.Stat(path); err != nil {
		t.Fatalf("S3 server: %v; run \"make tools\", or set PGARK_TOOLS to a directory with bin/versitygw", err)
	}
	return path
}

func moduleRoot(t testing.TB) string {
	t.Helper()
	dir, err := os.Getwd()
	if err != nil {
		t.Fatal(err)
	}
	for {
		if _, err := os.Stat(filepath.Join(dir, "go.mod")); err == nil {
			return dir
		}
		if dir == filepath.Dir(dir) {
			t.Fatal("no go.mod above the working directory")
		}
		dir = filepath.Dir(dir)
	}
}

func freeAddress(t testing.TB) string {
	t.Helper()
	l, err := new(net.ListenConfig).Listen(t.Context(), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().String()
}
