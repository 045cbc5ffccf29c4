package postgres_test

import (
	"strconv"
	"testing"

	"github.com/pgark/terraform-provider-pgark/internal/engine/postgres"
	"github.com/pgark/terraform-provider-pgark/test/pgtest"
)

func TestSmoke(t *testing.T) {
	for _, major := range pgtest.Majors {
		t.Run(strconv.Itoa(major), func(t *testing.T) {
			c := pgtest.Start(t, pgtest.Options{Major: major, Tablespaces: []string{"ts"}})
			t.Log(c.Scalar("select row(c.*, p.*, i.*, s.*) from pg_control_checkpoint() c, pg_control_system() p, pg_control_init() i, pg_control_recovery() s"), c.SwitchWAL(), c.Root)
			ctl, err := postgres.ReadControl(c.DataDir)
			t.Logf("%+v %v", ctl, err)
			c.Kill()
			c.Start()
			c.Stop(pgtest.Fast)
		})
	}
}
