//go:build linux

package guest

import (
	"context"
	"testing"
	"time"

	"github.com/pgark/terraform-provider-pgark/test/pgtest"
)

// A server that does not start again is not left like that.
func TestRestart_rescue(t *testing.T) {
	t.Parallel()
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	server := pgtest.Start(t, pgtest.Options{})
	t.Cleanup(func() {
		// A restarted server is no child of the test any more.
		_ = server.Command("pg_ctl", "stop", "-s", "-w", "-m", "immediate", "-D", server.DataDir).Run()
	})
	g := &local{}
	clusters, err := g.clusters(ctx)
	if err != nil {
		t.Fatal(err)
	}
	set := func(value *string) error {
		auto, err := readAutoConf(server.DataDir)
		if err != nil {
			return err
		}
		return editAutoConf(server.DataDir, auto, map[string]*string{walLevel: value})
	}
	for _, c := range clusters {
		if c.DataDirectory != server.DataDir {
			continue
		}
		minimal := walLevelMinimal // which max_wal_senders, above 0, forbids
		if err := set(&minimal); err != nil {
			t.Fatal(err)
		}
		rescued := false
		err := g.restart(ctx, c, func() error {
			rescued = true
			return set(nil)
		})
		if err != nil || !rescued || server.Scalar("show wal_level") != "replica" {
			t.Errorf("found %v, rescued %t", err, rescued)
		}
		return
	}
	t.Fatalf("%s is not found in %+v", server.DataDir, clusters)
}
