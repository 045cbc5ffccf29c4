package postgres

import (
	"context"
	"errors"
	"fmt"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"
)

// Setting is a row of pg_settings.
type Setting struct {
	Value          string // in the setting's base unit
	Unit           string // "kB", "8kB", "s", "ms", …
	Context        string // "postmaster": a change needs a restart; "sighup": a reload; …
	Source         string // "default", "configuration file", "command line", …
	SourceFile     string // empty without the right to see it
	PendingRestart bool
}

// FromAlterSystem tells whether the value comes from postgresql.auto.conf, that is from ALTER SYSTEM.
func (s Setting) FromAlterSystem() bool {
	return strings.HasSuffix(s.SourceFile, "/postgresql.auto.conf")
}

// Overrides tells whether ALTER SYSTEM is powerless, because the value was given on the command line.
func (s Setting) Overrides() bool { return s.Source == "command line" }

// Archiver is pg_stat_archiver. Its times are zero, and its names empty, for what has not happened yet.
type Archiver struct {
	Archived         int64
	LastArchived     string
	LastArchivedTime time.Time
	Failed           int64
	LastFailed       string
	LastFailedTime   time.Time
}

// Server is what a running server tells about itself.
type Server struct {
	VersionNumber int    // 170010
	Version       string // "17.10"
	StartTime     time.Time
	Time          time.Time // the server's clock
	InRecovery    bool      // it is a replica, or still recovers
	SystemID      SystemID
	User          string // the role that we are
	Superuser     bool

	// Settings are those that pgark looks at. Without pg_read_all_settings some are missing: data_directory, the
	// configuration files, unix_socket_directories.
	Settings map[string]Setting

	Archiver Archiver
}

// Major is the server's major version.
func (s *Server) Major() int { return s.VersionNumber / 10000 }

// Setting is a setting's value; empty if it is not known.
func (s *Server) Setting(name string) string { return s.Settings[name].Value }

// SegmentSize is the size of WAL segments.
func (s *Server) SegmentSize() SegmentSize {
	v, err := strconv.ParseUint(s.Setting("wal_segment_size"), 10, 64)
	if err != nil {
		return 0
	}
	return SegmentSize(v)
}

// serverSettings are the settings that ReadServer reads, where the server has them.
var serverSettings = []string{
	"allow_alter_system", "archive_command", "archive_library", "archive_mode", "archive_timeout", "cluster_name", "config_file",
	"data_checksums", "data_directory", "external_pid_file", "full_page_writes", "hba_file", "ident_file",
	"listen_addresses", "max_connections", "max_wal_senders", "max_worker_processes", "max_prepared_transactions",
	"max_locks_per_transaction", "port", "server_version", "server_version_num", "summarize_wal",
	"unix_socket_directories", "wal_block_size", "wal_compression", "wal_keep_size", "wal_level", "wal_segment_size",
	"block_size", "log_directory", "primary_conninfo", "restore_command",
}

// secretSettings may hold a password: what matters of them is whether they are set.
var secretSettings = []string{"primary_conninfo", "restore_command"}

// ReadServer asks a server for what pgark wants to know before it protects it.
func ReadServer(ctx context.Context, conn *pgx.Conn) (*Server, error) {
	s := &Server{}
	fail := func(what string, err error) (*Server, error) { return nil, fmt.Errorf("read %s: %w", what, err) }

	var system int64
	err := conn.QueryRow(ctx, `select current_setting('server_version_num')::int, current_setting('server_version'),
			pg_postmaster_start_time(), clock_timestamp(), pg_is_in_recovery(), current_user::text,
			(select rolsuper from pg_roles where rolname = current_user),
			(select system_identifier from pg_control_system())`).
		Scan(&s.VersionNumber, &s.Version, &s.StartTime, &s.Time, &s.InRecovery, &s.User, &s.Superuser, &system)
	if err != nil {
		return fail("server version and role", err)
	}
	s.SystemID = SystemID(system) // its bits: SQL has no unsigned numbers
	s.Version, _, _ = strings.Cut(s.Version, " ")
	s.StartTime, s.Time = s.StartTime.UTC(), s.Time.UTC()

	if s.Settings, err = ReadSettings(ctx, conn, serverSettings...); err != nil {
		return nil, err
	}
	for _, name := range secretSettings {
		if v, ok := s.Settings[name]; ok && v.Value != "" {
			v.Value = "(set)"
			s.Settings[name] = v
		}
	}

	if s.Archiver, err = ReadArchiver(ctx, conn); err != nil {
		return nil, err
	}
	return s, nil
}

// ReadSettings reads rows of pg_settings. Names that the server does not have, or does not show us, are missing.
func ReadSettings(ctx context.Context, conn *pgx.Conn, names ...string) (map[string]Setting, error) {
	rows, err := conn.Query(ctx, `select name, coalesce(setting, ''), coalesce(unit, ''), context, source,
		coalesce(sourcefile, ''), pending_restart from pg_settings where name = any($1)`, names)
	if err != nil {
		return nil, fmt.Errorf("read settings: %w", err)
	}
	settings := make(map[string]Setting, len(names))
	var name string
	var v Setting
	_, err = pgx.ForEachRow(rows, []any{&name, &v.Value, &v.Unit, &v.Context, &v.Source, &v.SourceFile, &v.PendingRestart}, func() error {
		settings[name] = v
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("read settings: %w", err)
	}
	return settings, nil
}

// ReadArchiver reads pg_stat_archiver.
func ReadArchiver(ctx context.Context, conn *pgx.Conn) (Archiver, error) {
	var a Archiver
	var archived, failed *time.Time
	err := conn.QueryRow(ctx, `select archived_count, coalesce(last_archived_wal, ''), last_archived_time, failed_count,
		coalesce(last_failed_wal, ''), last_failed_time from pg_stat_archiver`).
		Scan(&a.Archived, &a.LastArchived, &archived, &a.Failed, &a.LastFailed, &failed)
	if err != nil {
		return Archiver{}, fmt.Errorf("read pg_stat_archiver: %w", err)
	}
	if archived != nil {
		a.LastArchivedTime = archived.UTC()
	}
	if failed != nil {
		a.LastFailedTime = failed.UTC()
	}
	return a, nil
}

func versionNumber(ctx context.Context, conn *pgx.Conn) (int, error) {
	var v int
	if err := conn.QueryRow(ctx, "select current_setting('server_version_num')::int").Scan(&v); err != nil {
		return 0, fmt.Errorf("server version: %w", err)
	}
	return v, nil
}

var settingName = regexp.MustCompile(`^[A-Za-z_][A-Za-z0-9_.]*$`)

// AlterSystem writes a setting into postgresql.auto.conf. It takes Reload, or a restart, to have an effect.
func AlterSystem(ctx context.Context, conn *pgx.Conn, name, value string) error {
	return alterSystem(ctx, conn, name, " = "+quoteLiteral(value))
}

// AlterSystemReset removes a setting from postgresql.auto.conf. It takes Reload, or a restart, to have an effect.
func AlterSystemReset(ctx context.Context, conn *pgx.Conn, name string) error {
	return alterSystem(ctx, conn, name, "")
}

func alterSystem(ctx context.Context, conn *pgx.Conn, name, assignment string) error {
	if !settingName.MatchString(name) {
		return fmt.Errorf("alter system: %q is no setting's name", name)
	}
	verb := "set"
	if assignment == "" {
		verb = "reset"
	}
	// The value may hold a secret (chained archive commands do): the statement stays out of the error. PostgreSQL's own
	// message names the setting.
	if _, err := conn.Exec(ctx, "alter system "+verb+" "+name+assignment); err != nil {
		return fmt.Errorf("alter system %s %s: %w", verb, name, err)
	}
	return nil
}

// quoteLiteral makes a string constant that means the same with and without standard_conforming_strings.
func quoteLiteral(s string) string {
	quoted := "'" + strings.ReplaceAll(s, "'", "''") + "'"
	if strings.Contains(s, `\`) {
		return " E" + strings.ReplaceAll(quoted, `\`, `\\`)
	}
	return quoted
}

// ErrReloadUnconfirmed says that the server was told to read its configuration, but our session saw nothing of it
// within the time allowed: a file with a mistake makes the server keep what it had.
var ErrReloadUnconfirmed = errors.New("the server did not confirm that it read its configuration")

// Reload tells the server to read its configuration and waits up to ten seconds until our session has, too. The other
// processes were told before.
func Reload(ctx context.Context, conn *pgx.Conn) error {
	var before time.Time
	var sent bool
	if err := conn.QueryRow(ctx, "select pg_conf_load_time(), pg_reload_conf()").Scan(&before, &sent); err != nil {
		return fmt.Errorf("reload the configuration: %w", err)
	}
	if !sent {
		return errors.New("reload the configuration: the server could not signal its postmaster")
	}
	deadline := time.Now().Add(10 * time.Second)
	for wait := 2 * time.Millisecond; ; wait = min(2*wait, 200*time.Millisecond) {
		var loaded time.Time
		if err := conn.QueryRow(ctx, "select pg_conf_load_time()").Scan(&loaded); err != nil {
			return fmt.Errorf("reload the configuration: %w", err)
		}
		if loaded.After(before) {
			return nil
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("reload the configuration: %w", ErrReloadUnconfirmed)
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("reload the configuration: %w", context.Cause(ctx))
		case <-time.After(wait):
		}
	}
}

// FileProblem is a line of a configuration file that the server could not use.
type FileProblem struct {
	File    string
	Line    int
	Name    string
	Problem string
}

// FileProblems reads what is wrong in the configuration files as they are now (pg_file_settings; superusers only, or by
// grant). A problem in any of them makes a Reload change nothing at all, or leave out that line.
func FileProblems(ctx context.Context, conn *pgx.Conn) ([]FileProblem, error) {
	// A setting that takes a restart is "could not be applied" too; that is no problem of the file.
	rows, err := conn.Query(ctx, `select coalesce(f.sourcefile, ''), coalesce(f.sourceline, 0), coalesce(f.name, ''), f.error
		from pg_file_settings f left join pg_settings s on s.name = f.name and s.context = 'postmaster'
		where f.error is not null and (s.name is null or f.error <> 'setting could not be applied') order by f.seqno`)
	if err != nil {
		return nil, fmt.Errorf("read pg_file_settings: %w", err)
	}
	problems, err := pgx.CollectRows(rows, pgx.RowToStructByPos[FileProblem])
	if err != nil {
		return nil, fmt.Errorf("read pg_file_settings: %w", err)
	}
	return slices.Clip(problems), nil
}

// CreateRestorePoint writes a named restore point into WAL and returns the end of its record.
func CreateRestorePoint(ctx context.Context, conn *pgx.Conn, name string) (LSN, error) {
	return queryLSN(ctx, conn, "create restore point", "select pg_create_restore_point($1)::text", name)
}

// SwitchWAL ends the current segment, so that it is archived, and returns the end of what was written to it. Without
// any WAL since the last switch it does nothing: ForceSegment makes sure that there is some.
func SwitchWAL(ctx context.Context, conn *pgx.Conn) (LSN, error) {
	return queryLSN(ctx, conn, "switch WAL", "select pg_switch_wal()::text")
}

// ForceSegment writes a restore point of the given name, ends its segment and returns that segment's name: what
// archive_command gets next. A replica refuses.
func ForceSegment(ctx context.Context, conn *pgx.Conn, restorePoint string) (SegmentName, error) {
	var size int64
	var current string
	err := conn.QueryRow(ctx, `select setting::bigint, pg_walfile_name(pg_current_wal_lsn())
		from pg_settings where name = 'wal_segment_size'`).Scan(&size, &current)
	if err != nil {
		return "", fmt.Errorf("force a WAL segment: %w", err)
	}
	segment, err := ParseSegmentName(current)
	if err != nil {
		return "", fmt.Errorf("force a WAL segment: %w", err)
	}
	lsn, err := CreateRestorePoint(ctx, conn, restorePoint)
	if err != nil {
		return "", err
	}
	if _, err := SwitchWAL(ctx, conn); err != nil {
		return "", err
	}
	// Not pg_walfile_name(lsn): 17 changed what it says on a boundary.
	return MakeSegmentName(segment.Timeline(), SegmentSize(size).NumberBefore(lsn), SegmentSize(size)), nil
}

// CurrentLSN is the server's position: where it writes, or, in recovery, what it has replayed.
func CurrentLSN(ctx context.Context, conn *pgx.Conn) (LSN, error) {
	return queryLSN(ctx, conn, "read the WAL position",
		"select coalesce(case when pg_is_in_recovery() then pg_last_wal_replay_lsn() else pg_current_wal_lsn() end, '0/0')::text")
}

func queryLSN(ctx context.Context, conn *pgx.Conn, doing, sql string, args ...any) (LSN, error) {
	var s string
	if err := conn.QueryRow(ctx, sql, args...).Scan(&s); err != nil {
		return 0, fmt.Errorf("%s: %w", doing, err)
	}
	lsn, err := ParseLSN(s)
	if err != nil {
		return 0, fmt.Errorf("%s: %w", doing, err)
	}
	return lsn, nil
}
