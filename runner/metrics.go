package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/http"
	"time"

	"github.com/spf13/cobra"

	"github.com/pgark/terraform-provider-pgark/internal/engine/daemon/metrics"
	"github.com/pgark/terraform-provider-pgark/internal/engine/job"
)

func newMetricsCommand() *cobra.Command {
	t := &target{Layout: job.FindLayout()}
	var listen string
	cmd := &cobra.Command{
		Use:   "metrics [--job JOB [--instance INSTANCE]]",
		Short: "Show what this guest's runners do, for Prometheus",
		Long: `metrics asks the runners of this guest what they do and prints it in Prometheus' text format, for the textfile collector
of node_exporter or a look by hand. With --listen it serves the same at /metrics until it is stopped (SIGTERM), asking the
runners whenever it is scraped. A runner that does not answer has pgark_up 0.

What there is to alert on first: pgark_up, pgark_wal_lag_seconds against pgark_wal_objective_seconds, pgark_wal_gaps_total,
and the age of pgark_image_last_timestamp_seconds.

Run it as root, or as the owner of the instances.

    pgark metrics --job orders
    pgark metrics --listen 127.0.0.1:9187`,
		Args: noArguments,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if listen != "" {
				return serveMetrics(cmd.Context(), listen, t.askForMetrics, func(addr net.Addr) {
					fmt.Fprintf(cmd.ErrOrStderr(), "serving http://%s/metrics\n", addr)
				})
			}
			return metrics.Write(cmd.Context(), cmd.OutOrStdout(), t.askForMetrics)
		},
	}
	f := cmd.Flags()
	f.StringVar(&t.Job, "job", "", "job of this guest (default: every one)")
	f.StringVar(&t.Instance, "instance", "", "instance of the job (default: every one)")
	f.StringVar(&listen, "listen", "", "serve at this address, HOST:PORT, until stopped")
	return cmd
}

// askForMetrics refuses to call a runner down that is only not ours to ask.
func (t *target) askForMetrics(ctx context.Context) ([]metrics.Runner, error) {
	all, err := t.runners(ctx)
	if err != nil {
		return nil, err
	}
	runners := make([]metrics.Runner, len(all))
	for i, r := range all {
		if errors.Is(r.err, fs.ErrPermission) {
			return nil, fmt.Errorf("%w\nhint: run it as root, or as the owner of %s", r.err, r.Instance)
		}
		runners[i] = metrics.Runner{Job: r.Job, Instance: r.Instance, Status: r.Status}
	}
	return runners, nil
}

// serveMetrics answers scrapes at address until ctx ends. listening is told where, once.
func serveMetrics(ctx context.Context, address string, ask metrics.Ask, listening func(net.Addr)) error {
	l, err := new(net.ListenConfig).Listen(ctx, "tcp", address)
	if err != nil {
		return fmt.Errorf("serve metrics: %w", err)
	}
	mux := http.NewServeMux()
	mux.Handle("GET /metrics", metrics.Handler(ask))
	// Whoever scrapes sends a few lines, and gets all there is within seconds.
	server := &http.Server{
		Handler: mux, ReadHeaderTimeout: 5 * time.Second, ReadTimeout: 10 * time.Second, WriteTimeout: 30 * time.Second,
		IdleTimeout: 2 * time.Minute, MaxHeaderBytes: 16 << 10,
	}
	ended := make(chan error, 1)
	go func() { ended <- server.Serve(l) }()
	listening(l.Addr())
	select {
	case err := <-ended:
		return fmt.Errorf("serve metrics at %s: %w", address, err)
	case <-ctx.Done():
	}
	ending, cancel := context.WithTimeout(context.WithoutCancel(ctx), 5*time.Second)
	defer cancel()
	if err := server.Shutdown(ending); err != nil {
		return errors.Join(fmt.Errorf("serve metrics at %s: end the last answers: %w", address, err), server.Close())
	}
	return nil
}
