package metrics_test

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus/testutil/promlint"

	"github.com/pgark/terraform-provider-pgark/internal/engine/daemon/control"
	"github.com/pgark/terraform-provider-pgark/internal/engine/daemon/metrics"
)

// everything is a status that has something to tell in every field.
func everything() *control.Status {
	at := time.Date(2026, 5, 31, 12, 0, 0, 500e6, time.UTC)
	return &control.Status{
		Job: "orders", Instance: "15-main", Host: "db1", StartedAt: at, Enabled: true, State: control.Running,
		Repository: "s3://b/p", SystemIdentifier: "7", DataDirectory: `/data "x"`, ResidentBytes: 64 << 20,
		WAL: control.WALStatus{
			Segments: 12, Bytes: 12 << 24, StoredBytes: 5000, Duplicates: 1, Failures: 2, Conflicts: 3, Pending: 4,
			OldestPending: &at, LastStoredAt: &at, LastErrorAt: &at, MaxDelaySeconds: 0.25,
			State: control.WALSpooling, Mode: "continuous", Timeline: 3, WrittenLSN: "1/10", DurableLSN: "1/0",
			LagBytes: 16, LagSeconds: 0.5, ObjectiveSeconds: 1, MaxLagSeconds: 2, Store: control.StoreAway, GapCount: 1,
			Stream: &control.StreamStatus{Connected: true, Restarts: 6, LastAt: &at, Tails: 70, TailBytes: 700, Synchronous: true},
			Spool:  &control.SpoolStatus{Files: 8, Bytes: 800, LimitBytes: 1 << 30},
		},
		Image: control.ImageStatus{LastAt: &at, LastErrorAt: &at, Next: &at},
	}
}

func ask(runners ...metrics.Runner) metrics.Ask {
	return func(context.Context) ([]metrics.Runner, error) { return runners, nil }
}

func TestWrite(t *testing.T) {
	waiting := everything()
	waiting.State, waiting.Instance = control.Waiting, "16-main"
	var b bytes.Buffer
	err := metrics.Write(t.Context(), &b, ask(
		metrics.Runner{Job: "orders", Instance: "15-main", Status: everything()},
		metrics.Runner{Job: "orders", Instance: "16-main", Status: waiting},
		metrics.Runner{Job: "orders", Instance: "17-main"},
	))
	if err != nil {
		t.Fatal(err)
	}
	problems, err := promlint.New(bytes.NewReader(b.Bytes())).Lint()
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range problems {
		t.Errorf("%s: %s", p.Metric, p.Text)
	}
	text := b.String()
	for _, line := range []string{
		"# HELP pgark_wal_lag_seconds Age of the oldest WAL that is not durable in the repository; 0 if all is.",
		"# TYPE pgark_wal_segments_total counter",
		`pgark_up{instance="15-main",job="orders"} 1`,
		`pgark_up{instance="17-main",job="orders"} 0`,
		`pgark_runner_state{instance="16-main",job="orders",state="waiting"} 1`,
		`pgark_runner_info{data_directory="/data \"x\"",host="db1",instance="15-main",job="orders",repository="s3://b/p",system_identifier="7",wal_mode="continuous"} 1`,
		`pgark_wal_lag_bytes{instance="15-main",job="orders"} 16`,
		`pgark_wal_lag_seconds{instance="15-main",job="orders"} 0.5`,
		`pgark_wal_written_position_bytes{instance="15-main",job="orders"} 4.294967312e+09`,
		`pgark_wal_state{instance="15-main",job="orders",state="spooling"} 1`,
		`pgark_wal_state{instance="15-main",job="orders",state="streaming"} 0`,
		`pgark_wal_store_state{instance="15-main",job="orders",state="away"} 1`,
		`pgark_wal_stream_restarts_total{instance="15-main",job="orders"} 6`,
		`pgark_wal_spool_limit_bytes{instance="15-main",job="orders"} 1.073741824e+09`,
		`pgark_wal_gaps_total{instance="15-main",job="orders"} 1`,
		`pgark_image_last_timestamp_seconds{instance="15-main",job="orders"} 1.7802288005e+09`,
	} {
		if !strings.Contains(text, line+"\n") {
			t.Errorf("it should say: %s", line)
		}
	}
	for _, line := range strings.Split(text, "\n") {
		if strings.Contains(line, `instance="16-main"`) && strings.HasPrefix(line, "pgark_wal_") {
			t.Errorf("what a runner that waits knows nothing of: %s", line)
		}
		if strings.Contains(line, `instance="17-main"`) && !strings.HasPrefix(line, "pgark_up") {
			t.Errorf("what a runner that is down cannot tell: %s", line)
		}
	}
	if t.Failed() {
		t.Log(text)
	}
}

func TestHandler(t *testing.T) {
	get := func(ask metrics.Ask) (int, string) {
		w := httptest.NewRecorder()
		metrics.Handler(ask).ServeHTTP(w, httptest.NewRequestWithContext(t.Context(), "GET", "/metrics", nil))
		b, err := io.ReadAll(w.Result().Body)
		if err != nil {
			t.Fatal(err)
		}
		return w.Result().StatusCode, string(b)
	}
	if code, text := get(ask(metrics.Runner{Job: "a", Instance: "b", Status: everything()})); code != 200 || !strings.Contains(text, `pgark_up{instance="b",job="a"} 1`) {
		t.Errorf("got %d: %s", code, text)
	}
	failing := func(context.Context) ([]metrics.Runner, error) { return nil, errors.New("no job file to be read") }
	if code, text := get(failing); code != 500 || !strings.Contains(text, "no job file to be read") {
		t.Errorf("got %d: %s; expected the error", code, text)
	}
	if err := metrics.Write(t.Context(), io.Discard, failing); err == nil {
		t.Error("an error of asking should be one of writing")
	}
}
