package postgres

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
)

// Tablespace is a tablespace other than pg_default and pg_global.
type Tablespace struct {
	OID      uint32
	Name     string
	Location string // empty: inside the data directory (allow_in_place_tablespaces)
}

// Database is a database and its size; -1 if we may not know it, or it takes too long to find out.
type Database struct {
	OID       uint32
	Name      string
	Template  bool
	SizeBytes int64
}

// Inventory is what a server holds, and who follows it.
type Inventory struct {
	Databases   []Database // with a template's, in order of name
	Tablespaces []Tablespace
	Extensions  []string // of the database that we are connected to, in order of name

	// Followers are the application names of the standbys that stream from the server, in order. Without pg_read_all_stats
	// there are none to be seen.
	Followers []string
}

// SizeBytes is the size of all databases whose size is known.
func (i *Inventory) SizeBytes() int64 {
	var sum int64
	for _, d := range i.Databases {
		sum += max(d.SizeBytes, 0)
	}
	return sum
}

// ReadInventory asks a server what it holds. The sizes of databases take as long as the file system does to look at every
// file; after the given time they stay unknown.
func ReadInventory(ctx context.Context, conn *pgx.Conn, forSizes time.Duration) (*Inventory, error) {
	i := &Inventory{}
	rows, err := conn.Query(ctx, `select oid, spcname::text, coalesce(pg_tablespace_location(oid), '') from pg_tablespace
		where spcname not in ('pg_default', 'pg_global') order by oid`)
	if err == nil {
		i.Tablespaces, err = pgx.CollectRows(rows, pgx.RowToStructByPos[Tablespace])
	}
	if err != nil {
		return nil, fmt.Errorf("read tablespaces: %w", err)
	}
	if i.Extensions, err = collectStrings(ctx, conn, "select extname::text from pg_extension order by 1"); err != nil {
		return nil, fmt.Errorf("read extensions: %w", err)
	}
	// Subscribers stream, too, and follow only a part; pgark streams for a backup. The names are null for those who may not
	// see them.
	i.Followers, err = collectStrings(ctx, conn, `select r.application_name from pg_stat_replication r
		where r.state = 'streaming' and r.application_name <> '`+ApplicationName+`' and not exists
			(select from pg_replication_slots s where s.active_pid = r.pid and s.slot_type = 'logical') order by 1`)
	if err != nil {
		return nil, fmt.Errorf("read followers: %w", err)
	}
	if i.Databases, err = readDatabases(ctx, conn, forSizes); err != nil {
		return nil, fmt.Errorf("read databases: %w", err)
	}
	return i, nil
}

func collectStrings(ctx context.Context, conn *pgx.Conn, sql string) ([]string, error) {
	rows, err := conn.Query(ctx, sql)
	if err != nil {
		return nil, err
	}
	return pgx.CollectRows(rows, pgx.RowTo[string])
}

func readDatabases(ctx context.Context, conn *pgx.Conn, forSizes time.Duration) ([]Database, error) {
	const (
		size   = `coalesce(case when has_database_privilege(oid, 'connect') or pg_has_role('pg_read_all_stats', 'usage') then pg_database_size(oid) end, -1)`
		nobody = `(-1)::bigint`
	)
	read := func(size string) (d []Database, err error) {
		rows, err := conn.Query(ctx, "select oid, datname::text, datistemplate, "+size+" from pg_database order by datname")
		if err != nil {
			return nil, err
		}
		return pgx.CollectRows(rows, pgx.RowToStructByPos[Database])
	}
	limit := func(d time.Duration) error {
		_, err := conn.Exec(ctx, "select set_config('statement_timeout', $1, false)", strconv.FormatInt(d.Milliseconds(), 10))
		return err
	}
	if err := limit(forSizes); err != nil {
		return nil, err
	}
	d, err := read(size)
	// A database may be dropped while it is measured; its size is then null, or an error that another try avoids.
	if err != nil && !isTimeout(err) && !conn.IsClosed() {
		d, err = read(size)
	}
	if conn.IsClosed() {
		return nil, err
	}
	if err := limit(0); err != nil {
		return nil, err
	}
	if err != nil {
		return read(nobody)
	}
	return d, nil
}

// isTimeout tells whether the server ended a statement because of statement_timeout.
func isTimeout(err error) bool {
	var pg *pgconn.PgError
	return errors.As(err, &pg) && pg.Code == "57014"
}
