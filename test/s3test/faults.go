package s3test

import (
	"fmt"
	"io"
	"log"
	"maps"
	"math/rand/v2"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"slices"
	"strconv"
	"sync"
	"testing"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	v4 "github.com/aws/aws-sdk-go-v2/aws/signer/v4"

	"github.com/pgark/terraform-provider-pgark/internal/engine/objectstore"
)

// Fault is one way in which a request can go wrong.
type Fault string

// The faults of a FaultProxy. Those that answer do not forward: nothing is stored.
const (
	Answer503 Fault = "503"        // SlowDown
	Answer500 Fault = "500"        // InternalError
	Answer409 Fault = "409"        // ConditionalRequestConflict, on writes
	Answer412 Fault = "412"        // PreconditionFailed although nothing is there, on writes
	CutBefore Fault = "cut before" // the connection breaks and nothing is forwarded
	CutReply  Fault = "cut reply"  // the request is carried out, then the connection breaks
	CutBody   Fault = "cut body"   // the connection breaks in the middle of the answer's body
	Delay     Fault = "delay"      // the request is forwarded after a random part of Faults.MaxDelay
	Stall     Fault = "stall"      // no answer, ever
	Slow      Fault = "slow"       // the request's body is forwarded at 256 KiB/s
)

// allFaults are those that Faults.Rate draws from by default. A stall is not among them, nor a slow body: each costs as
// much as a time-out.
var allFaults = []Fault{Answer503, Answer500, Answer409, Answer412, CutBefore, CutReply, CutBody, Delay}

// Faults says what a FaultProxy does. The zero value forwards everything.
type Faults struct {
	Rate     float64       // share of requests that get a fault, 0 to 1
	Kinds    []Fault       // drawn from evenly; default: all but Stall and Slow
	MaxDelay time.Duration // of Delay; default 200 ms

	// Match restricts the faults to the requests that it returns true for.
	Match func(*http.Request) bool

	// IgnoreIfNoneMatch removes the header of conditional writes, so that the server, whose keys are used to sign the
	// request anew, does what a store does that does not know the header: it overwrites.
	IgnoreIfNoneMatch *Server
}

// FaultProxy is an HTTP proxy before an S3 server. It leaves requests as they are, so that their signatures hold.
type FaultProxy struct {
	server    *httptest.Server
	target    *url.URL
	transport *http.Transport

	mu     sync.Mutex // guards what follows
	faults Faults
	rng    *rand.Rand
	counts map[Fault]int
	total  int
}

// SeedVariable names the environment variable that repeats a run: the seed is logged by each proxy at its start.
const SeedVariable = "PGARK_TEST_SEED"

// NewFaultProxy starts a proxy before the server at target, a URL. It ends with the test.
func NewFaultProxy(t testing.TB, target string, f Faults) *FaultProxy {
	t.Helper()
	u, err := url.Parse(target)
	if err != nil {
		t.Fatal(err)
	}
	seed := rand.Uint64()
	if s := os.Getenv(SeedVariable); s != "" {
		if seed, err = strconv.ParseUint(s, 10, 64); err != nil {
			t.Fatalf("%s: %v", SeedVariable, err)
		}
	}
	t.Logf("fault proxy: %s=%d", SeedVariable, seed)
	p := &FaultProxy{
		target:    u,
		transport: &http.Transport{DisableCompression: true, MaxIdleConnsPerHost: 64},
		faults:    f,
		rng:       rand.New(rand.NewPCG(seed, 0)),
		counts:    make(map[Fault]int),
	}
	p.server = httptest.NewUnstartedServer(p)
	p.server.Config.ErrorLog = log.New(io.Discard, "", 0)
	p.server.Start()
	t.Cleanup(func() {
		p.server.CloseClientConnections() // those that are stalled
		p.server.Close()
		p.transport.CloseIdleConnections()
	})
	return p
}

// URL is the proxy's address.
func (p *FaultProxy) URL() string { return p.server.URL }

// Through is loc reached by way of the proxy.
func (p *FaultProxy) Through(loc objectstore.Location) objectstore.Location {
	loc.Endpoint = p.server.URL
	return loc
}

// Set changes what the proxy does from the next request on.
func (p *FaultProxy) Set(f Faults) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.faults = f
}

// Counts tells how many requests came and what was done to them.
func (p *FaultProxy) Counts() (total int, done map[Fault]int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.total, maps.Clone(p.counts)
}

// draw decides what happens to a request; "" is nothing.
func (p *FaultProxy) draw(r *http.Request) (fault Fault, delay time.Duration, strip *Server) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.total++
	f := p.faults
	if p.rng.Float64() >= f.Rate || f.Match != nil && !f.Match(r) {
		return "", 0, f.IgnoreIfNoneMatch
	}
	kinds := f.Kinds
	if kinds == nil {
		kinds = allFaults
	}
	if r.Method != http.MethodPut && r.Method != http.MethodPost {
		kinds = slices.DeleteFunc(slices.Clone(kinds), func(k Fault) bool { return k == Answer409 || k == Answer412 })
	}
	if len(kinds) == 0 {
		return "", 0, f.IgnoreIfNoneMatch
	}
	fault = kinds[p.rng.IntN(len(kinds))]
	p.counts[fault]++
	maxDelay := f.MaxDelay
	if maxDelay == 0 {
		maxDelay = 200 * time.Millisecond
	}
	return fault, time.Duration(p.rng.Int64N(int64(maxDelay))), f.IgnoreIfNoneMatch
}

var answers = map[Fault]struct {
	status        int
	code, message string
}{
	Answer503: {http.StatusServiceUnavailable, "SlowDown", "Please reduce your request rate."},
	Answer500: {http.StatusInternalServerError, "InternalError", "We encountered an internal error. Please try again."},
	Answer409: {http.StatusConflict, "ConditionalRequestConflict", "A conflicting conditional operation is in progress."},
	Answer412: {http.StatusPreconditionFailed, "PreconditionFailed", "At least one of the pre-conditions you specified did not hold."},
}

// ServeHTTP forwards a request, or does to it what was drawn.
func (p *FaultProxy) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	fault, delay, strip := p.draw(r)
	switch fault {
	case CutBefore:
		panic(http.ErrAbortHandler)
	case Stall:
		_, _ = io.Copy(io.Discard, r.Body) // so that the client's going away is noticed
		<-r.Context().Done()
		panic(http.ErrAbortHandler)
	case Delay:
		time.Sleep(delay)
	case Slow:
		r.Body = &slowBody{r.Body}
	default:
		if a, ok := answers[fault]; ok {
			_, _ = io.Copy(io.Discard, r.Body) // a client that goes away needs no answer
			w.Header().Set("Content-Type", "application/xml")
			w.WriteHeader(a.status)
			if r.Method != http.MethodHead {
				fmt.Fprintf(w, `<?xml version="1.0" encoding="UTF-8"?><Error><Code>%s</Code><Message>%s</Message></Error>`, a.code, a.message)
			}
			return
		}
	}
	out := r.Clone(r.Context())
	out.RequestURI = ""
	out.URL.Scheme, out.URL.Host = p.target.Scheme, p.target.Host
	if r.ContentLength == 0 {
		out.Body = nil // or the transport would send it in chunks
	}
	if strip != nil && r.Header.Get("If-None-Match") != "" {
		out.Header.Del("If-None-Match")
		if err := strip.sign(out); err != nil {
			panic(fmt.Sprintf("s3test: sign a request: %v", err))
		}
	}
	resp, err := p.transport.RoundTrip(out)
	if err != nil {
		panic(http.ErrAbortHandler) // the server is away: the client sees a broken connection
	}
	defer resp.Body.Close()
	if fault == CutReply {
		_, _ = io.Copy(io.Discard, resp.Body) // the answer is lost either way
		panic(http.ErrAbortHandler)
	}
	maps.Copy(w.Header(), resp.Header)
	w.WriteHeader(resp.StatusCode)
	if fault == CutBody && resp.ContentLength > 0 {
		_, _ = io.CopyN(w, resp.Body, resp.ContentLength/2)
		http.NewResponseController(w).Flush()
		panic(http.ErrAbortHandler)
	}
	if _, err := io.Copy(w, resp.Body); err != nil {
		panic(http.ErrAbortHandler)
	}
}

// slowBody hands out a body bit by bit.
type slowBody struct{ io.ReadCloser }

func (b *slowBody) Read(p []byte) (int, error) {
	time.Sleep(100 * time.Millisecond)
	return b.ReadCloser.Read(p[:min(len(p), 256<<10/10)])
}

// sign replaces the request's signature.
func (s *Server) sign(r *http.Request) error {
	r.Header.Del("Authorization")
	signer := v4.NewSigner(func(o *v4.SignerOptions) { o.DisableURIPathEscaping = true })
	keys := aws.Credentials{AccessKeyID: s.AccessKeyID, SecretAccessKey: s.SecretAccessKey}
	return signer.SignHTTP(r.Context(), keys, r, r.Header.Get("X-Amz-Content-Sha256"), "s3", Region, time.Now())
}
