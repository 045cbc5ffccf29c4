package main

import (
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/pgark/terraform-provider-pgark/internal/engine/daemon/control"
	"github.com/pgark/terraform-provider-pgark/internal/engine/daemon/metrics"
)

func streamingStatus() *control.Status {
	since := time.Now().Add(-90 * time.Second)
	return &control.Status{
		Job: "orders", Instance: "15-main", PID: 7, State: control.Running, Enabled: true, StartedAt: since,
		Repository: "s3://b/p", SystemIdentifier: "42", DataDirectory: "/data",
		WAL: control.WALStatus{
			Segments: 3, Bytes: 3 << 24, StoredBytes: 1 << 20, State: control.WALStreaming, Since: since, Store: control.StoreReachable,
			Mode: "continuous", Timeline: 2, WrittenLSN: "0/5000060", DurableLSN: "0/5000000", LagBytes: 96, LagSeconds: 0.25,
			ObjectiveSeconds: 1, MaxLagSeconds: 0.75,
			Stream: &control.StreamStatus{Connected: true, Since: &since, Restarts: 2, Tails: 12, TailBytes: 2048, Slot: "pgark_orders", Synchronous: true},
		},
	}
}

func TestPrintStatus(t *testing.T) {
	shown := func(change func(*control.WALStatus)) string {
		s := streamingStatus()
		change(&s.WAL)
		var b strings.Builder
		printStatus(&b, runnerStatus{Job: "orders", Instance: "15-main", Running: true, Status: s})
		return b.String()
	}
	for situation, test := range map[string]struct {
		change func(*control.WALStatus)
		want   []string
	}{
		"streaming": {func(*control.WALStatus) {}, []string{
			"repository   s3://b/p, reachable\n",
			"wal          streaming for 1 min 30 s\n",
			"             96 B and 0.2 s behind; at most 1.0 s are wanted, 0.8 s were seen\n",
			"             written up to 0/5000060, durable up to 0/5000000 on timeline 2\n",
			"stream       connected for 1 min 30 s, 2 restarts, slot pgark_orders, commits wait for the repository; 12 tails, 2.0 KiB stored\n",
			"archive      3 files stored, 48.0 MiB as 1.0 MiB; 0 failures\n",
		}},
		"nothing behind": {func(w *control.WALStatus) { w.LagBytes, w.LagSeconds = 0, 0 }, []string{"all is durable; at most 1.0 s"}},
		"spooling": {func(w *control.WALStatus) {
			oldest := time.Now().Add(-5 * time.Second)
			w.State, w.Store, w.Reason = control.WALSpooling, control.StoreDenied, "the keys\nhave expired"
			w.Spool = &control.SpoolStatus{Directory: "/spool", Files: 4, Bytes: 4 << 20, LimitBytes: 1 << 30, Oldest: &oldest, Full: true}
		}, []string{
			"DENIED: the credentials are wrong, expired, or not enough\n",
			"SPOOLING: the repository is away, WAL goes into the temporary folder for 1 min 30 s: the keys have expired\n",
			"spool        4 files, 4.0 MiB of 1.0 GiB in /spool, the oldest for 5.0 s; FULL: PostgreSQL keeps its WAL\n",
		}},
		"gaps": {func(w *control.WALStatus) {
			w.GapCount = 8
			for range 6 {
				w.Gaps = append(w.Gaps, control.WALGap{StartLSN: "0/1", EndLSN: "0/2", Timeline: 1})
			}
			w.Gaps[5].Image = "17"
		}, []string{"GAPS         3 earlier ones\n", "taken, or due, because of it\n", "; image 17 was taken after it\n"}},
	} {
		t.Run(situation, func(t *testing.T) {
			got := shown(test.change)
			for _, want := range test.want {
				if !strings.Contains(got, want) {
					t.Errorf("got\n%s\nexpected %q in it", got, want)
				}
			}
		})
	}
}

func TestStatusLine(t *testing.T) {
	now := time.Date(2026, 5, 31, 12, 0, 0, 0, time.UTC)
	got := statusLine(now, runnerStatus{Job: "orders", Instance: "15-main", Running: true, Status: streamingStatus()})
	if want := " orders/15-main streaming, 0.2 s behind (96 B), written 0/5000060, durable 0/5000000, repository reachable"; !strings.HasSuffix(got, want) {
		t.Errorf("got %q, expected %q at the end", got, want)
	}
	got = statusLine(now, runnerStatus{Job: "orders", Instance: "15-main", Error: "nobody\nthere"})
	if !strings.HasSuffix(got, " orders/15-main NOT RUNNING: nobody there") {
		t.Errorf("got %q", got)
	}
}

func TestOnScreen(t *testing.T) {
	if got := onScreen("häuser\nb\nc\nd\n", 5, 4); got != "\x1b[Hhäus\x1b[K\nb\x1b[K\nc\x1b[K\n\x1b[J" {
		t.Errorf("got %q, expected what fits", got)
	}
	if got := onScreen("häuser\n", 0, 0); got != "\x1b[Hhäuser\x1b[K\n\x1b[J" {
		t.Errorf("got %q, expected all of it on a terminal that does not tell its size", got)
	}
}

func TestServeMetrics(t *testing.T) {
	ask := func(context.Context) ([]metrics.Runner, error) {
		return []metrics.Runner{{Job: "orders", Instance: "15-main", Status: streamingStatus()}}, nil
	}
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	addr, ended := make(chan net.Addr, 1), make(chan error, 1)
	go func() { ended <- serveMetrics(ctx, "127.0.0.1:0", ask, func(a net.Addr) { addr <- a }) }()
	var at net.Addr
	select {
	case at = <-addr:
	case err := <-ended:
		t.Fatal(err)
	}
	get := func(path string) (int, string) {
		req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, "http://"+at.String()+path, nil)
		if err != nil {
			t.Fatal(err)
		}
		resp, err := http.DefaultClient.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		b, err := io.ReadAll(resp.Body)
		if err != nil {
			t.Fatal(err)
		}
		return resp.StatusCode, string(b)
	}
	if code, text := get("/metrics"); code != http.StatusOK || !regexp.MustCompile(`(?m)^pgark_wal_lag_seconds\{.*\} 0\.25$`).MatchString(text) {
		t.Errorf("got %d: %s", code, text)
	}
	if code, _ := get("/"); code != http.StatusNotFound {
		t.Errorf("got %d, expected nothing elsewhere", code)
	}
	if err := serveMetrics(ctx, at.String(), ask, func(net.Addr) {}); err == nil || !strings.Contains(err.Error(), at.String()) {
		t.Errorf("got %v, expected that the address is taken", err)
	}
	cancel()
	if err := <-ended; err != nil && !errors.Is(err, context.Canceled) {
		t.Errorf("it ended with %v", err)
	}
}
