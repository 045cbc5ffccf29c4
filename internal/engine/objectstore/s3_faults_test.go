package objectstore_test

import (
	"bytes"
	"context"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"log"
	"math/rand/v2"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/service/s3"

	"github.com/pgark/terraform-provider-pgark/internal/engine/objectstore"
	"github.com/pgark/terraform-provider-pgark/internal/engine/objectstore/storetest"
	"github.com/pgark/terraform-provider-pgark/test/s3test"
)

// TestS3_contractHoldsUnderFaults runs the whole contract with one request in seven going wrong.
func TestS3_contractHoldsUnderFaults(t *testing.T) {
	server := s3test.Start(t)
	proxy := s3test.NewFaultProxy(t, server.Endpoint(), s3test.Faults{Rate: 0.15, MaxDelay: 30 * time.Millisecond})
	var n atomic.Int64
	storetest.Run(t, storetest.Config{
		New: func(t *testing.T) objectstore.Store {
			return open(t, proxy.Through(server.Location(fmt.Sprintf("bucket/prefix/%d", n.Add(1)))), smallParts)
		},
	})
	total, done := proxy.Counts()
	t.Logf("%d requests, faults: %v", total, done)
	for _, f := range []s3test.Fault{s3test.Answer503, s3test.Answer500, s3test.Answer409, s3test.Answer412, s3test.CutBefore, s3test.CutReply, s3test.CutBody, s3test.Delay} {
		if done[f] == 0 {
			t.Errorf("the run had no %q", f)
		}
	}
}

func put(t *testing.T, s objectstore.Store, key, content string) error {
	t.Helper()
	return s.Create(t.Context(), key, strings.NewReader(content), int64(len(content)))
}

// once lets a fault hit the first n matching requests.
func once(n int64, kind s3test.Fault, match func(*http.Request) bool) s3test.Faults {
	var seen atomic.Int64
	return s3test.Faults{Rate: 1, Kinds: []s3test.Fault{kind}, Match: func(r *http.Request) bool {
		return (match == nil || match(r)) && seen.Add(1) <= n
	}}
}

func isPut(r *http.Request) bool { return r.Method == http.MethodPut }

func TestS3_lostReplyToOwnPut(t *testing.T) {
	server := s3test.Start(t)
	proxy := s3test.NewFaultProxy(t, server.Endpoint(), once(1, s3test.CutReply, isPut))
	s := open(t, proxy.Through(server.Location("bucket")), objectstore.Options{})
	if err := put(t, s, "head/1", "mine"); err != nil {
		t.Errorf("create whose reply was lost: %v, expected success", err)
	}
	if total, done := proxy.Counts(); done[s3test.CutReply] != 1 || total != 3 {
		t.Errorf("%d requests, faults %v; expected PUT (cut), PUT (412) and GET", total, done)
	}
}

func TestS3_lostReplyAndAnotherWriter(t *testing.T) {
	// Our PUT never arrives, and before we try again somebody else takes the name.
	server := s3test.Start(t)
	other := server.Open("bucket")
	proxy := s3test.NewFaultProxy(t, server.Endpoint(), s3test.Faults{Rate: 1, Kinds: []s3test.Fault{s3test.CutBefore}, Match: isPut})
	s := open(t, proxy.Through(server.Location("bucket")), objectstore.Options{})
	result := make(chan error)
	go func() { result <- put(t, s, "head/1", "mine") }()
	for {
		if _, done := proxy.Counts(); done[s3test.CutBefore] > 0 {
			break
		}
		time.Sleep(time.Millisecond)
	}
	if err := put(t, other, "head/1", "theirs"); err != nil {
		t.Fatal(err)
	}
	proxy.Set(s3test.Faults{})
	err := <-result
	conflict, ok := errors.AsType[*objectstore.ConflictError](err)
	if !ok {
		t.Fatalf("create: %v, expected *ConflictError", err)
	}
	if !strings.HasSuffix(conflict.There, "6 bytes") || !strings.HasSuffix(conflict.Here, "4 bytes") {
		t.Errorf("conflict: %v", conflict)
	}
}

// A 412 for an object that is not there must not be taken for success, nor for a conflict.
func TestS3_preconditionFailedButAbsent(t *testing.T) {
	server := s3test.Start(t)
	for name, size := range map[string]int{"one request": 100, "in parts": 6 << 20} {
		t.Run(name, func(t *testing.T) {
			faults := once(3, s3test.Answer412, func(r *http.Request) bool {
				q := r.URL.Query()
				return r.Method == http.MethodPut && !q.Has("partNumber") || r.Method == http.MethodPost && q.Has("uploadId")
			})
			proxy := s3test.NewFaultProxy(t, server.Endpoint(), faults)
			s := open(t, proxy.Through(server.Location("bucket")), smallParts)
			key, content := fmt.Sprintf("object-%d", size), strings.Repeat("x", size)
			if err := put(t, s, key, content); err != nil {
				t.Fatal(err)
			}
			if _, done := proxy.Counts(); done[s3test.Answer412] != 3 {
				t.Errorf("faults: %v", done)
			}
			o, err := server.Open("bucket").Stat(t.Context(), key)
			if err != nil || o.Size != int64(size) {
				t.Errorf("after success the server has %+v, %v", o, err)
			}

			proxy.Set(s3test.Faults{Rate: 1, Kinds: []s3test.Fault{s3test.Answer412}})
			s = open(t, proxy.Through(server.Location("bucket")), objectstore.Options{MaxElapsed: 300 * time.Millisecond})
			err = put(t, s, "other", content)
			if err == nil || !objectstore.IsTransient(err) {
				t.Errorf("create that is always answered with 412: %v, expected a transient error", err)
			}
		})
	}
}

// Every try of an upload in parts that does not end in an object leaves no parts behind.
func TestS3_failedPartsAreRemoved(t *testing.T) {
	server := s3test.Start(t)
	isPart := func(r *http.Request) bool { return r.URL.Query().Has("partNumber") }
	isComplete := func(r *http.Request) bool {
		return r.Method == http.MethodPost && r.URL.Query().Has("uploadId")
	}
	cases := map[string]struct {
		faults  s3test.Faults
		o       objectstore.Options
		succeed bool
	}{
		"parts fail until the budget ends": {
			s3test.Faults{Rate: 1, Kinds: []s3test.Fault{s3test.Answer503}, Match: isPart},
			objectstore.Options{PartThreshold: 5 << 20, MaxElapsed: 200 * time.Millisecond}, false},
		"the reply to the last request is lost": {once(1, s3test.CutReply, isComplete), smallParts, true},
		"a conflict at the last request":        {once(2, s3test.Answer409, isComplete), smallParts, true},
	}
	content := strings.Repeat("0123456789abcdef", 11<<20/16)
	for name, c := range cases {
		t.Run(name, func(t *testing.T) {
			proxy := s3test.NewFaultProxy(t, server.Endpoint(), c.faults)
			s := open(t, proxy.Through(server.Location("bucket")), c.o)
			key := strings.ReplaceAll(name, " ", "-")
			err := put(t, s, key, content)
			if (err == nil) != c.succeed {
				t.Errorf("create: %v", err)
			}
			if err != nil && !objectstore.IsTransient(err) {
				t.Errorf("%v is not transient", err)
			}
			wantNoUploads(t, server)
		})
	}
	t.Run("cancelled", func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		var parts atomic.Int64
		proxy := s3test.NewFaultProxy(t, server.Endpoint(), s3test.Faults{Rate: 1, Kinds: []s3test.Fault{s3test.Delay}, Match: func(r *http.Request) bool {
			if isPart(r) && parts.Add(1) == 2 {
				cancel()
			}
			return false
		}})
		s := open(t, proxy.Through(server.Location("bucket")), smallParts)
		err := s.Create(ctx, "cancelled", strings.NewReader(content), int64(len(content)))
		if !errors.Is(err, context.Canceled) || objectstore.IsTransient(err) {
			t.Errorf("create: %v, expected the cancellation", err)
		}
		wantNoUploads(t, server)
	})
}

func wantNoUploads(t *testing.T, server *s3test.Server) {
	t.Helper()
	out, err := server.Client().ListMultipartUploads(t.Context(), &s3.ListMultipartUploadsInput{Bucket: aws.String("bucket")})
	if err != nil {
		t.Fatal(err)
	}
	for _, u := range out.Uploads {
		t.Errorf("left behind: upload of %s", *u.Key)
	}
}

func TestS3_bodyIsResumed(t *testing.T) {
	server := s3test.Start(t)
	direct := server.Open("bucket")
	content := make([]byte, 3<<20)
	_, _ = rand.NewChaCha8([32]byte{2}).Read(content) // never fails
	if err := direct.Create(t.Context(), "big", bytes.NewReader(content), int64(len(content))); err != nil {
		t.Fatal(err)
	}
	for name, r := range map[string]struct{ offset, n int }{"whole": {0, -1}, "from": {1000, -1}, "range": {1000, 2 << 20}} {
		t.Run(name, func(t *testing.T) {
			proxy := s3test.NewFaultProxy(t, server.Endpoint(), once(4, s3test.CutBody, nil))
			s := open(t, proxy.Through(server.Location("bucket")), objectstore.Options{})
			body, err := s.Get(t.Context(), "big", int64(r.offset), int64(r.n))
			if err != nil {
				t.Fatal(err)
			}
			defer body.Close()
			got, err := io.ReadAll(body)
			if err != nil {
				t.Fatal(err)
			}
			want := content[r.offset:]
			if r.n >= 0 {
				want = want[:r.n]
			}
			if !bytes.Equal(got, want) {
				t.Errorf("read %d bytes that differ from the %d stored", len(got), len(want))
			}
			if total, done := proxy.Counts(); done[s3test.CutBody] != 4 || total != 5 {
				t.Errorf("%d requests, faults %v; expected 5, 4 of them cut", total, done)
			}
		})
	}
	t.Run("gives up", func(t *testing.T) {
		proxy := s3test.NewFaultProxy(t, server.Endpoint(), once(1, s3test.CutBody, nil))
		s := open(t, proxy.Through(server.Location("bucket")), objectstore.Options{MaxElapsed: 300 * time.Millisecond})
		body, err := s.Get(t.Context(), "big", 0, -1)
		if err != nil {
			t.Fatal(err)
		}
		defer body.Close()
		if _, err := io.ReadFull(body, make([]byte, 1000)); err != nil {
			t.Fatal(err)
		}
		proxy.Set(s3test.Faults{Rate: 1, Kinds: []s3test.Fault{s3test.CutBefore}})
		_, err = io.Copy(io.Discard, body)
		if !objectstore.IsTransient(err) {
			t.Errorf("read after the server went away: %v, expected a transient error", err)
		}
		if _, again := body.Read(make([]byte, 1)); !errors.Is(again, err) {
			t.Errorf("the next read: %v, expected the same error", again)
		}
	})
}

func TestS3_outage(t *testing.T) {
	server := s3test.Start(t)
	s := open(t, server.Location("bucket"), objectstore.Options{})
	if err := put(t, s, "before", "x"); err != nil {
		t.Fatal(err)
	}
	server.Stop()
	time.AfterFunc(700*time.Millisecond, server.Start)
	if err := put(t, s, "during", "x"); err != nil {
		t.Errorf("create during an outage that ends: %v", err)
	}
	if err := put(t, s, "before", "x"); err != nil {
		t.Errorf("what was stored before the outage: %v", err)
	}

	server.Stop()
	impatient := open(t, server.Location("bucket"), objectstore.Options{MaxElapsed: 300 * time.Millisecond})
	start := time.Now()
	err := put(t, impatient, "after", "x")
	if !objectstore.IsTransient(err) {
		t.Errorf("create during an outage: %v, expected a transient error", err)
	}
	if d := time.Since(start); d > 2*time.Second {
		t.Errorf("gave up after %v, expected about 0.3 s", d)
	}
	for _, err := range impatient.List(t.Context(), "", "") {
		if !objectstore.IsTransient(err) {
			t.Errorf("list during an outage: %v", err)
		}
	}
}

func TestS3_attemptWithoutProgressEnds(t *testing.T) {
	server := s3test.Start(t)
	proxy := s3test.NewFaultProxy(t, server.Endpoint(), once(1, s3test.Stall, nil))
	s := open(t, proxy.Through(server.Location("bucket")), objectstore.Options{AttemptTimeout: 200 * time.Millisecond})
	if err := put(t, s, "k", strings.Repeat("x", 100_000)); err != nil {
		t.Errorf("create after one stalled attempt: %v", err)
	}
	proxy.Set(s3test.Faults{Rate: 1, Kinds: []s3test.Fault{s3test.Stall}})
	s = open(t, proxy.Through(server.Location("bucket")), objectstore.Options{AttemptTimeout: 100 * time.Millisecond, MaxElapsed: 150 * time.Millisecond})
	_, err := s.Get(t.Context(), "k", 0, -1)
	if !objectstore.IsTransient(err) || !strings.Contains(err.Error(), "get k in s3://bucket: no progress for 100ms") {
		t.Errorf("get from a server that never answers: %v", err)
	}
}

// A transfer may take far longer than the time-out of an attempt, in both directions, as long as it moves.
func TestS3_slowTransferLives(t *testing.T) {
	content := strings.Repeat("slow", 250)
	slow := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Length", fmt.Sprint(len(content)))
		for i := range 10 {
			fmt.Fprint(w, content[i*100:(i+1)*100])
			http.NewResponseController(w).Flush()
			time.Sleep(50 * time.Millisecond)
		}
	}))
	defer slow.Close()
	s := open(t, objectstore.Location{
		URL: "s3://bucket", Endpoint: slow.URL, UsePathStyle: true,
		Credentials: &objectstore.Credentials{AccessKeyID: "a", SecretAccessKey: "b"},
	}, objectstore.Options{AttemptTimeout: 200 * time.Millisecond, MaxElapsed: time.Millisecond})
	body, err := s.Get(t.Context(), "k", 0, -1)
	if err != nil {
		t.Fatal(err)
	}
	defer body.Close()
	time.Sleep(300 * time.Millisecond) // nor does the reader's own pace count
	if b, err := io.ReadAll(body); err != nil || string(b) != content {
		t.Errorf("read %d bytes, %v", len(b), err)
	}
}

func TestS3_deleteWithoutBatches(t *testing.T) {
	server := s3test.Start(t)
	refused := 0
	front := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		refused++
		w.WriteHeader(http.StatusNotImplemented)
		fmt.Fprint(w, `<Error><Code>NotImplemented</Code><Message>A header you provided implies functionality that is not implemented.</Message></Error>`)
	}))
	defer front.Close()
	proxy := s3test.NewFaultProxy(t, server.Endpoint(), s3test.Faults{})
	router := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Method == http.MethodPost && r.URL.Query().Has("delete") {
			front.Config.Handler.ServeHTTP(w, r)
			return
		}
		proxy.ServeHTTP(w, r)
	}))
	defer router.Close()
	loc := server.Location("bucket")
	loc.Endpoint = router.URL
	s := open(t, loc, objectstore.Options{})
	var keys []string
	for i := range 20 {
		keys = append(keys, fmt.Sprintf("d/%d", i))
		if err := put(t, s, keys[i], "x"); err != nil {
			t.Fatal(err)
		}
	}
	for range 2 {
		if err := s.Delete(t.Context(), keys...); err != nil {
			t.Fatal(err)
		}
	}
	for o, err := range s.List(t.Context(), "", "") {
		t.Errorf("left: %+v, %v", o, err)
	}
	if refused != 1 {
		t.Errorf("%d batches tried, expected 1", refused)
	}
}

func TestProbe_ignoredHeader(t *testing.T) {
	server := s3test.Start(t)
	proxy := s3test.NewFaultProxy(t, server.Endpoint(), s3test.Faults{IgnoreIfNoneMatch: server})
	s := open(t, proxy.Through(server.Location("bucket/p")), objectstore.Options{})
	_, err := objectstore.Probe(t.Context(), s)
	unsuitable, ok := errors.AsType[*objectstore.UnsuitableError](err)
	if !ok {
		t.Fatalf("probe: %v, expected *UnsuitableError", err)
	}
	const want = "s3://bucket/p cannot hold a repository: atomic create-if-absent (PUT with If-None-Match: *) is missing: " +
		"a second create of the same name with other content was accepted; use a store that has it, as Amazon S3 and " +
		"current versions of other S3 servers do"
	if unsuitable.Error() != want {
		t.Errorf("probe: %v\nexpected %s", unsuitable, want)
	}
	for o, err := range server.Open("bucket/p").List(t.Context(), "", "") {
		t.Errorf("left behind: %+v, %v", o, err)
	}
}

// A store that looks first and writes then passes every test in sequence. The race finds it.
func TestProbe_checkThenWrite(t *testing.T) {
	server := s3test.Start(t)
	direct := server.Open("bucket")
	proxy := s3test.NewFaultProxy(t, server.Endpoint(), s3test.Faults{IgnoreIfNoneMatch: server})
	front := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Method == http.MethodPut {
			if _, err := direct.Stat(r.Context(), strings.TrimPrefix(r.URL.Path, "/bucket/")); err == nil {
				w.WriteHeader(http.StatusPreconditionFailed)
				return
			}
			time.Sleep(20 * time.Millisecond)
		}
		proxy.ServeHTTP(w, r)
	}))
	defer front.Close()
	loc := server.Location("bucket")
	loc.Endpoint = front.URL
	_, err := objectstore.Probe(t.Context(), open(t, loc, objectstore.Options{}))
	unsuitable, ok := errors.AsType[*objectstore.UnsuitableError](err)
	if !ok || !strings.Contains(unsuitable.Found, "of 8 writers racing for one name") {
		t.Errorf("probe: %v, expected *UnsuitableError about the race", err)
	}
}

func TestProbe_conditionalWritesNotImplemented(t *testing.T) {
	front := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.WriteHeader(http.StatusNotImplemented)
		fmt.Fprint(w, `<Error><Code>NotImplemented</Code><Message>A header you provided implies functionality that is not implemented</Message></Error>`)
	}))
	defer front.Close()
	s := open(t, objectstore.Location{URL: "s3://bucket", Endpoint: front.URL, UsePathStyle: true,
		Credentials: &objectstore.Credentials{AccessKeyID: "a", SecretAccessKey: "b"}}, objectstore.Options{})
	_, err := objectstore.Probe(t.Context(), s)
	if _, ok := errors.AsType[*objectstore.UnsuitableError](err); !ok {
		t.Errorf("probe: %v, expected *UnsuitableError", err)
	}
}

func TestProbe_appendOnly(t *testing.T) {
	server := s3test.Start(t)
	proxy := s3test.NewFaultProxy(t, server.Endpoint(), s3test.Faults{})
	front := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Method == http.MethodDelete || r.URL.Query().Has("delete") {
			w.WriteHeader(http.StatusForbidden)
			fmt.Fprint(w, `<Error><Code>AccessDenied</Code><Message>Access Denied.</Message></Error>`)
			return
		}
		proxy.ServeHTTP(w, r)
	}))
	defer front.Close()
	loc := server.Location("bucket")
	loc.Endpoint = front.URL
	c, err := objectstore.Probe(t.Context(), open(t, loc, objectstore.Options{}))
	if want := (objectstore.Capabilities{CreateIfAbsent: true, RangedGet: true, ListAfterPut: true}); err != nil || c != want {
		t.Errorf("probe: %+v, %v, expected %+v", c, err, want)
	}
}

// Each mistake in a declaration has an error of its own that says what to do, soon, and holds no secret.
func TestS3_mistakes(t *testing.T) {
	server := s3test.Start(t)
	loc := server.Location("bucket/prefix")
	change := func(f func(*objectstore.Location)) objectstore.Location {
		l := loc
		c := *loc.Credentials
		l.Credentials = &c
		f(&l)
		return l
	}
	closed := httptest.NewServer(nil)
	closed.Close()
	cases := map[string]struct {
		loc  objectstore.Location
		is   error
		want []string
	}{
		"wrong bucket": {change(func(l *objectstore.Location) { l.URL = "s3://no-such-bucket/prefix" }), objectstore.ErrNoBucket,
			[]string{"in s3://no-such-bucket/prefix: no such bucket: 404", "create the bucket no-such-bucket first"}},
		"wrong access key": {change(func(l *objectstore.Location) { l.Credentials.AccessKeyID = "AKNOBODY" }), objectstore.ErrAccess,
			[]string{"access denied: 40", "check AWS_ACCESS_KEY_ID"}},
		"wrong secret key": {change(func(l *objectstore.Location) { l.Credentials.SecretAccessKey = "wrong-secret" }), objectstore.ErrAccess,
			[]string{"access denied: 403", "the secret key does not belong to the access key"}},
		"wrong region": {change(func(l *objectstore.Location) { l.Region = "eu-central-1" }), objectstore.ErrRegion,
			[]string{"wrong region", "set the repository's region"}},
		"no credentials": {change(func(l *objectstore.Location) { l.Credentials = nil }), objectstore.ErrAccess,
			[]string{"access denied: no S3 credentials", "set AWS_ACCESS_KEY_ID"}},
		"TLS to a server without": {change(func(l *objectstore.Location) { l.Endpoint = strings.Replace(l.Endpoint, "http:", "https:", 1) }), nil,
			[]string{"the endpoint answers without TLS"}},
		"unknown host": {change(func(l *objectstore.Location) { l.Endpoint = "http://no-such-host.invalid" }), nil,
			[]string{"no-such-host.invalid", "is the endpoint spelt right?"}},
		"nobody listens": {change(func(l *objectstore.Location) { l.Endpoint = closed.URL }), nil,
			[]string{"connection refused"}},
	}
	for _, v := range []string{"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_PROFILE"} {
		t.Setenv(v, "")
	}
	t.Setenv("AWS_EC2_METADATA_DISABLED", "true")
	t.Setenv("AWS_CONFIG_FILE", os.DevNull)
	t.Setenv("AWS_SHARED_CREDENTIALS_FILE", os.DevNull)
	for name, c := range cases {
		t.Run(name, func(t *testing.T) {
			s := open(t, c.loc, objectstore.Options{MaxElapsed: 200 * time.Millisecond})
			calls := map[string]func() error{
				"create": func() error { return put(t, s, "k", "x") },
				"get":    func() error { _, err := s.Get(t.Context(), "k", 0, -1); return err },
				"stat":   func() error { _, err := s.Stat(t.Context(), "k"); return err },
				"list": func() error {
					for _, err := range s.List(t.Context(), "", "") {
						return err
					}
					return nil
				},
				"delete":  func() error { return s.Delete(t.Context(), "k") },
				"delete2": func() error { return s.Delete(t.Context(), "k", "l") },
				"probe":   func() error { _, err := objectstore.Probe(t.Context(), s); return err },
			}
			for call, f := range calls {
				err := f()
				if err == nil {
					t.Errorf("%s succeeded", call)
					continue
				}
				if c.is != nil && !errors.Is(err, c.is) {
					t.Errorf("%s: %v, expected %v", call, err, c.is)
				}
				if c.is != nil && objectstore.IsTransient(err) {
					t.Errorf("%s: %v is transient", call, err)
				}
				if call == "create" {
					t.Logf("%s: %v", call, err)
					for _, want := range c.want {
						if !strings.Contains(err.Error(), want) {
							t.Errorf("%s: %v\nexpected it to contain %q", call, err, want)
						}
					}
				}
				for _, secret := range []string{server.SecretAccessKey, "wrong-secret"} {
					if strings.Contains(err.Error(), secret) {
						t.Errorf("%s: the error holds the secret key", call)
					}
				}
			}
		})
	}
}

// The caller has its body to itself once Create has returned, though the transport may still be reading the request's.
func TestS3_bodyIsNotReadAfterReturn(t *testing.T) {
	front := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.WriteHeader(http.StatusForbidden) // before the body is read
	}))
	defer front.Close()
	s := open(t, objectstore.Location{URL: "s3://bucket", Endpoint: front.URL, UsePathStyle: true,
		Credentials: &objectstore.Credentials{AccessKeyID: "a", SecretAccessKey: "b"}}, objectstore.Options{})
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			body := &watchedReader{Reader: bytes.NewReader(make([]byte, 8<<20))}
			if err := s.Create(t.Context(), "k", body, 8<<20); !errors.Is(err, objectstore.ErrAccess) {
				t.Errorf("create: %v", err)
			}
			body.returned.Store(true)
			time.Sleep(50 * time.Millisecond)
			if body.late.Load() {
				t.Error("the body was read after Create had returned")
			}
		})
	}
	wg.Wait()
}

type watchedReader struct {
	*bytes.Reader
	returned, late atomic.Bool
}

func (w *watchedReader) Read(p []byte) (int, error) {
	if w.returned.Load() {
		w.late.Store(true)
	}
	return w.Reader.Read(p)
}

func TestS3_tls(t *testing.T) {
	server := s3test.Start(t)
	proxy := s3test.NewFaultProxy(t, server.Endpoint(), s3test.Faults{})
	var unsigned atomic.Int64
	front := httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Header.Get("X-Amz-Content-Sha256") == "UNSIGNED-PAYLOAD" {
			unsigned.Add(1)
		}
		proxy.ServeHTTP(w, r)
	}))
	defer front.Close()
	front.Config.ErrorLog = log.New(io.Discard, "", 0)
	loc := server.Location("bucket")
	loc.Endpoint = front.URL

	s := open(t, loc, objectstore.Options{})
	err := put(t, s, "k", "x")
	if err == nil || objectstore.IsTransient(err) || !strings.Contains(err.Error(), "AWS_CA_BUNDLE") {
		t.Errorf("create with an untrusted certificate: %v", err)
	}

	bundle := filepath.Join(t.TempDir(), "ca.pem")
	if err := os.WriteFile(bundle, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: front.Certificate().Raw}), 0o600); err != nil {
		t.Fatal(err)
	}
	t.Setenv("AWS_CA_BUNDLE", bundle)
	s = open(t, loc, smallParts)
	for _, size := range []int{0, 1, 1 << 20, 6 << 20} {
		key, content := fmt.Sprint(size), strings.Repeat("x", size)
		if err := put(t, s, key, content); err != nil {
			t.Errorf("%d bytes: %v", size, err)
		}
		if o, err := s.Stat(t.Context(), key); err != nil || o.Size != int64(size) {
			t.Errorf("%d bytes: %+v, %v", size, o, err)
		}
	}
	if unsigned.Load() < 5 { // three objects and two parts
		t.Errorf("%d requests had an unsigned body, expected each that has a body: hashing is a second pass", unsigned.Load())
	}
}

// Buckets with a default retention take no PUT without a checksum.
func TestS3_objectLockWantsChecksum(t *testing.T) {
	server := s3test.Start(t)
	proxy := s3test.NewFaultProxy(t, server.Endpoint(), s3test.Faults{})
	refused := 0
	front := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Method == http.MethodPut && r.Header.Get("X-Amz-Checksum-Crc32") == "" {
			refused++
			_, _ = io.Copy(io.Discard, r.Body)
			w.WriteHeader(http.StatusBadRequest)
			fmt.Fprint(w, `<Error><Code>InvalidRequest</Code><Message>Content-MD5 OR x-amz-checksum- HTTP header is required for Put Object requests with Object Lock parameters</Message></Error>`)
			return
		}
		proxy.ServeHTTP(w, r)
	}))
	defer front.Close()
	loc := server.Location("bucket")
	loc.Endpoint = front.URL
	s := open(t, loc, objectstore.Options{})
	for i := range 3 {
		if err := put(t, s, fmt.Sprint(i), strings.Repeat("x", 1000*i)); err != nil {
			t.Error(err)
		}
	}
	if refused != 1 {
		t.Errorf("%d requests without a checksum, expected only the first", refused)
	}
}

// TestS3_refusals has a server answer what a test server cannot be brought to say.
func TestS3_refusals(t *testing.T) {
	type answer struct {
		status int
		code   string
	}
	var now atomic.Pointer[answer]
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		_, _ = io.Copy(io.Discard, r.Body)
		a := now.Load()
		w.Header().Set("Content-Type", "application/xml")
		w.WriteHeader(a.status)
		if a.code != "" && r.Method != http.MethodHead {
			fmt.Fprintf(w, "<Error><Code>%s</Code><Message>Text of the store.</Message></Error>", a.code)
		}
	}))
	defer server.Close()
	loc := objectstore.Location{URL: "s3://bucket/prefix", Endpoint: server.URL, UsePathStyle: true,
		Credentials: &objectstore.Credentials{AccessKeyID: "AK", SecretAccessKey: "SK", SessionToken: "T"}}
	s := open(t, loc, objectstore.Options{MaxElapsed: time.Millisecond}) // too short for a second attempt
	all := []error{
		objectstore.ErrAccess, objectstore.ErrExpired, objectstore.ErrReadOnly, objectstore.ErrFull, objectstore.ErrBusy,
		objectstore.ErrNoBucket, objectstore.ErrClock,
	}
	for _, c := range []struct {
		answer
		is        []error
		transient bool
		text      string
	}{
		{answer{400, "ExpiredToken"}, []error{objectstore.ErrAccess, objectstore.ErrExpired}, false, "access denied: 400 ExpiredToken: Text of the store; renew the session token"},
		{answer{400, "TokenRefreshRequired"}, []error{objectstore.ErrAccess, objectstore.ErrExpired}, false, "renew"},
		{answer{403, "AccessDenied"}, []error{objectstore.ErrAccess}, false, "the keys must be allowed"},
		{answer{403, "RequestTimeTooSkewed"}, []error{objectstore.ErrAccess, objectstore.ErrClock}, false, "clock"},
		{answer{403, "QuotaExceeded"}, []error{objectstore.ErrFull}, true, "403 QuotaExceeded: Text of the store"},
		{answer{507, "XMinioStorageFull"}, []error{objectstore.ErrFull}, true, "make room"},
		{answer{507, ""}, []error{objectstore.ErrFull}, true, "507 Insufficient Storage (1 attempts"},
		{answer{405, "MethodNotAllowed"}, []error{objectstore.ErrReadOnly}, false, "must take PUT requests"},
		{answer{503, "SlowDown"}, []error{objectstore.ErrBusy}, true, "503 SlowDown"},
		{answer{503, ""}, []error{objectstore.ErrBusy}, true, "503 Service Unavailable (1 attempts"},
		{answer{500, "InternalError"}, []error{objectstore.ErrBusy}, true, "500 InternalError"},
		{answer{502, ""}, []error{objectstore.ErrBusy}, true, "502 Bad Gateway (1 attempts"},
		{answer{429, "TooManyRequests"}, []error{objectstore.ErrBusy}, true, "429"},
		{answer{409, "ConditionalRequestConflict"}, []error{objectstore.ErrBusy}, true, "409"},
		{answer{404, "NoSuchBucket"}, []error{objectstore.ErrNoBucket}, false, "create the bucket"},
	} {
		now.Store(&c.answer)
		err := put(t, s, "k", "x")
		for _, kind := range all {
			if got, want := errors.Is(err, kind), slices.Contains(c.is, kind); got != want {
				t.Errorf("%d %s: %v: is %q: %v", c.status, c.code, err, kind, got)
			}
		}
		if objectstore.IsTransient(err) != c.transient {
			t.Errorf("%d %s: %v: transient %v", c.status, c.code, err, !c.transient)
		}
		if err == nil || !strings.Contains(err.Error(), c.text) {
			t.Errorf("%d %s: %v, expected %q in it", c.status, c.code, err, c.text)
		}
	}
}
