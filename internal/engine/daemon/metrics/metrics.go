// Package metrics shows what runners tell of themselves (control.Status) as Prometheus metrics.
//
// A scrape asks every runner anew; nothing is kept between two. A runner that does not answer has pgark_up 0 and no
// other metric, so that nobody takes what it said long ago for the present. Names and labels are what dashboards and
// alerts are made of: they stay.
package metrics

import (
	"context"
	"fmt"
	"io"
	"net/http"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"
	"github.com/prometheus/common/expfmt"

	"github.com/pgark/terraform-provider-pgark/internal/engine/daemon/control"
	"github.com/pgark/terraform-provider-pgark/internal/engine/postgres"
)

// Runner is one runner of this guest, as it answered.
type Runner struct {
	Job, Instance string
	Status        *control.Status // nil: it does not answer
}

// Ask asks all runners that are to be shown.
type Ask func(ctx context.Context) ([]Runner, error)

// Write writes the metrics in Prometheus' text format.
func Write(ctx context.Context, w io.Writer, ask Ask) error {
	runners, err := ask(ctx)
	if err != nil {
		return err
	}
	families, err := registry(func() ([]Runner, error) { return runners, nil }).Gather()
	if err != nil {
		return fmt.Errorf("gather metrics: %w", err)
	}
	encoder := expfmt.NewEncoder(w, expfmt.NewFormat(expfmt.TypeTextPlain))
	for _, f := range families {
		if err := encoder.Encode(f); err != nil {
			return fmt.Errorf("write metrics: %w", err)
		}
	}
	return nil
}

const (
	// scrapeLimit bounds asking the runners; Prometheus gives up after 10 s by default.
	scrapeLimit = 8 * time.Second

	// scrapesAtOnce bounds what those who scrape can make us do.
	scrapesAtOnce = 4
)

// Handler answers scrapes.
func Handler(ask Ask) http.Handler {
	r := registry(func() ([]Runner, error) {
		ctx, cancel := context.WithTimeout(context.Background(), scrapeLimit)
		defer cancel()
		return ask(ctx)
	})
	return promhttp.HandlerFor(r, promhttp.HandlerOpts{MaxRequestsInFlight: scrapesAtOnce, Timeout: scrapeLimit + time.Second})
}

func registry(ask func() ([]Runner, error)) *prometheus.Registry {
	r := prometheus.NewRegistry()
	r.MustRegister(collector(ask))
	return r
}

// collector asks the runners whenever it is collected.
type collector func() ([]Runner, error)

var _ prometheus.Collector = collector(nil)

// Describe describes nothing: what there is depends on what the runners tell.
func (c collector) Describe(chan<- *prometheus.Desc) {}

// Collect implements prometheus.Collector.
func (c collector) Collect(ch chan<- prometheus.Metric) {
	runners, err := c()
	if err != nil {
		ch <- prometheus.NewInvalidMetric(prometheus.NewInvalidDesc(err), err)
		return
	}
	for _, r := range runners {
		m := &sink{ch: ch, labels: []string{"job", "instance"}, values: []string{r.Job, r.Instance}}
		m.yes("pgark_up", "Whether the runner answers.", r.Status != nil)
		if r.Status != nil {
			m.status(r.Status)
		}
	}
}

// sink sends the metrics of one runner.
type sink struct {
	ch             chan<- prometheus.Metric
	labels, values []string
}

func (m *sink) send(kind prometheus.ValueType, name, help string, value float64, extra ...string) {
	labels, values := m.labels[:2:2], m.values[:2:2]
	for i := 0; i+1 < len(extra); i += 2 {
		labels, values = append(labels, extra[i]), append(values, extra[i+1])
	}
	m.ch <- prometheus.MustNewConstMetric(prometheus.NewDesc(name, help, labels, nil), kind, value, values...)
}

func (m *sink) gauge(name, help string, value float64) {
	m.send(prometheus.GaugeValue, name, help, value)
}

func (m *sink) counter(name, help string, value int64) {
	m.send(prometheus.CounterValue, name, help, float64(value))
}

func (m *sink) yes(name, help string, is bool) {
	value := 0.0
	if is {
		value = 1
	}
	m.gauge(name, help, value)
}

// moment leaves out what has not happened.
func (m *sink) moment(name, help string, t *time.Time) {
	if t != nil && !t.IsZero() {
		m.gauge(name, help, float64(t.UnixMicro())/1e6)
	}
}

// position leaves out what is not known.
func (m *sink) position(name, help, lsn string) {
	if p, err := postgres.ParseLSN(lsn); err == nil && p != 0 {
		m.gauge(name, help, float64(p))
	}
}

// oneOf sends 1 for the state that is, and 0 for every other.
func oneOf[S ~string](m *sink, name, help string, is S, all []S) {
	for _, s := range all {
		value := 0.0
		if s == is {
			value = 1
		}
		m.send(prometheus.GaugeValue, name, help, value, "state", string(s))
	}
}

// What states there are, so that each has a series from the start.
var (
	runnerStates = []control.State{control.Starting, control.Running, control.Waiting, control.Refused}
	walStates    = []control.WALState{control.WALStreaming, control.WALArchiving, control.WALCatchingUp, control.WALSpooling, control.WALHeld}
	storeStates  = []control.StoreState{
		control.StoreReachable, control.StoreSlow, control.StoreAway, control.StoreRefusing, control.StoreDenied,
		control.StoreReadOnly, control.StoreFull, control.StoreMissing, control.StoreConflicting,
	}
)

func (m *sink) status(s *control.Status) {
	oneOf(m, "pgark_runner_state", "The runner's state: 1 for the one it is in.", s.State, runnerStates)
	m.send(prometheus.GaugeValue, "pgark_runner_info", "What the runner protects; always 1.", 1,
		"host", s.Host, "repository", s.Repository, "data_directory", s.DataDirectory, "system_identifier", s.SystemIdentifier, "wal_mode", s.WAL.Mode)
	m.yes("pgark_runner_enabled", "Whether images are taken by schedule.", s.Enabled)
	m.moment("pgark_runner_start_time_seconds", "When the runner started, since the epoch.", &s.StartedAt)
	if s.ResidentBytes > 0 {
		m.gauge("pgark_runner_resident_memory_bytes", "Memory of the runner's process.", float64(s.ResidentBytes))
	}
	if s.State != control.Running {
		return // the rest is not known
	}
	m.wal(&s.WAL)
	m.image(&s.Image)
}

func (m *sink) wal(w *control.WALStatus) {
	if w.State != "" {
		oneOf(m, "pgark_wal_state", "What becomes of WAL: 1 for the state it is in.", w.State, walStates)
	}
	if w.Store != "" {
		oneOf(m, "pgark_wal_store_state", "How the repository fares: 1 for the state it is in.", w.Store, storeStates)
	}
	m.gauge("pgark_wal_lag_bytes", "WAL that PostgreSQL has written and that is not durable in the repository.", float64(w.LagBytes))
	m.gauge("pgark_wal_lag_seconds", "Age of the oldest WAL that is not durable in the repository; 0 if all is.", w.LagSeconds)
	m.gauge("pgark_wal_worst_lag_seconds", "The longest lag since the runner started.", w.MaxLagSeconds)
	m.gauge("pgark_wal_objective_seconds", "What the lag should stay below.", w.ObjectiveSeconds)
	m.position("pgark_wal_written_position_bytes", "Position up to which PostgreSQL has written WAL.", w.WrittenLSN)
	m.position("pgark_wal_durable_position_bytes", "Position up to which all WAL is durable in the repository.", w.DurableLSN)
	if w.Timeline != 0 {
		m.gauge("pgark_wal_timeline", "Timeline of the positions.", float64(w.Timeline))
	}
	m.counter("pgark_wal_segments_total", "WAL files made durable, of all kinds.", w.Segments)
	m.counter("pgark_wal_bytes_total", "Size of these WAL files as PostgreSQL wrote them.", w.Bytes)
	m.counter("pgark_wal_stored_bytes_total", "Size of these WAL files as they lie in the repository.", w.StoredBytes)
	m.counter("pgark_wal_duplicates_total", "WAL files found in the repository already, with the same content.", w.Duplicates)
	m.counter("pgark_wal_failures_total", "Attempts to store a WAL file that failed.", w.Failures)
	m.counter("pgark_wal_conflicts_total", "WAL files whose name is taken by other content.", w.Conflicts)
	m.gauge("pgark_wal_pending_files", "WAL files that PostgreSQL has finished and that are not durable yet.", float64(w.Pending))
	age := 0.0
	if w.OldestPending != nil {
		age = max(time.Since(*w.OldestPending).Seconds(), 0)
	}
	m.gauge("pgark_wal_pending_age_seconds", "Age of the oldest of these files.", age)
	m.moment("pgark_wal_last_stored_timestamp_seconds", "When a WAL file was stored last, since the epoch.", w.LastStoredAt)
	m.moment("pgark_wal_last_error_timestamp_seconds", "When storing a WAL file failed last, since the epoch.", w.LastErrorAt)
	m.gauge("pgark_wal_longest_delay_seconds", "The longest time from a finished WAL file to a durable one since the runner started.", w.MaxDelaySeconds)
	m.counter("pgark_wal_gaps_total", "Places where WAL was lost, since the runner started.", w.GapCount)
	if s := w.Stream; s != nil {
		m.yes("pgark_wal_stream_connected", "Whether the replication connection stands.", s.Connected)
		m.counter("pgark_wal_stream_restarts_total", "Replication connections made after the first.", s.Restarts)
		m.moment("pgark_wal_stream_last_message_timestamp_seconds", "When PostgreSQL said anything last, since the epoch.", s.LastAt)
		m.yes("pgark_wal_stream_synchronous", "Whether commits wait for the repository.", s.Synchronous)
		m.counter("pgark_wal_tails_total", "Pieces of WAL stored before their segments were whole.", s.Tails)
		m.counter("pgark_wal_tail_stored_bytes_total", "Size of these pieces as they were stored.", s.TailBytes)
	}
	if s := w.Spool; s != nil {
		m.gauge("pgark_wal_spool_files", "WAL files in the temporary folder.", float64(s.Files))
		m.gauge("pgark_wal_spool_bytes", "Size of the WAL files in the temporary folder.", float64(s.Bytes))
		if s.LimitBytes > 0 {
			m.gauge("pgark_wal_spool_limit_bytes", "What the temporary folder may hold.", float64(s.LimitBytes))
		}
		m.yes("pgark_wal_spool_full", "Whether the temporary folder takes no more.", s.Full)
	}
}

func (m *sink) image(i *control.ImageStatus) {
	m.yes("pgark_image_running", "Whether an image is being taken.", i.Running)
	m.yes("pgark_image_failed", "Whether the latest attempt at an image failed.", i.LastErrorAt != nil)
	m.moment("pgark_image_last_timestamp_seconds", "When the latest image was completed, since the epoch.", i.LastAt)
	m.moment("pgark_image_last_failure_timestamp_seconds", "When the latest attempt failed, since the epoch; gone after a success.", i.LastErrorAt)
	m.moment("pgark_image_next_timestamp_seconds", "When the next image is due, since the epoch.", i.Next)
}
