package daemon

import (
	"context"
	"fmt"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/pgark/terraform-provider-pgark/internal/engine/postgres"
)

// connectOptions say how the protected server is reached.
func (p *protection) connectOptions() postgres.ConnectOptions {
	i := p.d.current().instance
	return postgres.ConnectOptions{SocketDirectory: i.SocketDirectory, Port: i.Port, User: i.DatabaseUser, Owner: i.Owner}
}

// withServer calls fn with a connection of its own, which it closes.
func (p *protection) withServer(ctx context.Context, fn func(*pgx.Conn) error) error {
	conn, err := postgres.Connect(ctx, p.connectOptions())
	if err != nil {
		return err
	}
	defer func() {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), time.Second)
		defer cancel()
		_ = conn.Close(ctx) // it was only asked
	}()
	return fn(conn)
}

// position is where a server's WAL stands.
type position struct {
	replica  bool
	timeline postgres.Timeline // of the position; 0: a replica that does not say
	written  postgres.LSN      // up to here pg_wal holds it; of a replica: what it has received
	inserted postgres.LSN      // up to here it is promised; of a replica: as written
}

// readPosition asks a server where its WAL stands.
func readPosition(ctx context.Context, conn *pgx.Conn) (position, error) {
	var p position
	var name, written, inserted string
	// The functions that a replica refuses are in branches that it does not take. What a replica receives lies in pg_wal
	// before it is replayed.
	err := conn.QueryRow(ctx, `select pg_is_in_recovery(),
		case when pg_is_in_recovery() then '' else pg_walfile_name(pg_current_wal_insert_lsn()) end,
		case when pg_is_in_recovery() then coalesce(greatest(pg_last_wal_receive_lsn(), pg_last_wal_replay_lsn()), '0/0')
			else pg_current_wal_flush_lsn() end::text,
		case when pg_is_in_recovery() then '0/0' else pg_current_wal_insert_lsn() end::text`).
		Scan(&p.replica, &name, &written, &inserted)
	if err != nil {
		return position{}, fmt.Errorf("read the WAL position: %w", err)
	}
	if p.written, err = postgres.ParseLSN(written); err != nil {
		return position{}, fmt.Errorf("read the WAL position: %w", err)
	}
	if p.inserted, err = postgres.ParseLSN(inserted); err != nil {
		return position{}, fmt.Errorf("read the WAL position: %w", err)
	}
	if p.replica {
		p.inserted = p.written
		return p, nil
	}
	segment, err := postgres.ParseSegmentName(name)
	if err != nil {
		return position{}, fmt.Errorf("read the WAL position: %w", err)
	}
	p.timeline = segment.Timeline()
	return p, nil
}
