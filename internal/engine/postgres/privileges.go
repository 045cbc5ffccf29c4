package postgres

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
)

// alterSystemByGrant is the major since which a role that is no superuser may be allowed to ALTER SYSTEM.
const alterSystemByGrant = 15

// MissingPrivilege is something that our role may not do.
type MissingPrivilege struct {
	What  string // "call pg_backup_start", "change archive_command"
	Grant string // the statement that gives the right, in the database postgres; empty: see SuperuserOnly

	// SuperuserOnly says that no grant gives the right: only a superuser has it in this version.
	SuperuserOnly bool
}

// neededFunction is a function that pgark calls and that not everybody may call.
type neededFunction struct {
	name, arguments string
	public          bool // everybody may, unless somebody has taken that away
}

func neededFunctions(major int, alters bool) []neededFunction {
	f := []neededFunction{{"pg_backup_start", "text,boolean", false}, {"pg_backup_stop", "boolean", false}}
	if major < 15 { // they were renamed when the exclusive mode went
		f = []neededFunction{{"pg_start_backup", "text,boolean,boolean", false}, {"pg_stop_backup", "boolean,boolean", false}}
	}
	f = append(f, neededFunction{"pg_switch_wal", "", false}, neededFunction{"pg_create_restore_point", "text", false})
	if alters {
		f = append(f, neededFunction{"pg_reload_conf", "", false})
	}
	return append(f, neededFunction{"pg_control_system", "", true}, neededFunction{"pg_control_checkpoint", "", true})
}

func (f neededFunction) signature() string { return "pg_catalog." + f.name + "(" + f.arguments + ")" }

func grantFunction(f neededFunction, role string) string {
	return "GRANT EXECUTE ON FUNCTION " + f.signature() + " TO " + role
}

func grantSetting(name, role string) string {
	return "GRANT ALTER SYSTEM ON PARAMETER " + name + " TO " + role
}

// grantReadSettings: without it the server does not say where its configuration files are, which an image holds.
func grantReadSettings(role string) string { return "GRANT pg_read_all_settings TO " + role }

// Grants are the statements that give a role which is no superuser all that pgark needs in a server of that major, to be
// run in the database postgres: for backups, for WAL shipping, and, since 15, for ALTER SYSTEM of the given settings (and a
// reload, if there are any). Running them twice does no harm.
func Grants(major int, role string, alter ...string) []string {
	quoted := QuoteRole(role)
	if major < alterSystemByGrant {
		alter = nil
	}
	grants := []string{grantReadSettings(quoted)}
	for _, f := range neededFunctions(major, len(alter) > 0) {
		if !f.public {
			grants = append(grants, grantFunction(f, quoted))
		}
	}
	for _, name := range alter {
		grants = append(grants, grantSetting(name, quoted))
	}
	return grants
}

// CreateRole are the statements that make a role which may log in, if there is none, or let one log in that may not.
func CreateRole(role string) []string {
	quoted := QuoteRole(role)
	return []string{
		"DO 'BEGIN CREATE ROLE " + strings.ReplaceAll(quoted, "'", "''") + "; EXCEPTION WHEN duplicate_object THEN NULL; END'",
		"ALTER ROLE " + quoted + " LOGIN",
	}
}

// GrantConnect is the statement that lets a role connect to the database postgres.
func GrantConnect(role string) string {
	return "GRANT CONNECT ON DATABASE postgres TO " + QuoteRole(role)
}

// GrantReplication is the statement that lets a role stream WAL. It is no grant: the attribute is the role's own, and no
// membership passes it on.
func GrantReplication(role string) string { return "ALTER ROLE " + QuoteRole(role) + " REPLICATION" }

// QuoteRole quotes a role's name for SQL, and only where it has to be: people read it.
func QuoteRole(role string) string {
	for i, c := range []byte(role) {
		if c >= 'a' && c <= 'z' || c == '_' || i > 0 && c >= '0' && c <= '9' {
			continue
		}
		return pgx.Identifier{role}.Sanitize()
	}
	// The reserved words that somebody might call a role.
	switch role {
	case "", "all", "user", "none", "default", "current_user", "session_user", "current_role", "public":
		return pgx.Identifier{role}.Sanitize()
	}
	return role
}

// MissingPrivileges tells what our role lacks for backups, WAL shipping, and for ALTER SYSTEM of the given settings. A
// superuser lacks nothing. It needs no privilege itself.
func MissingPrivileges(ctx context.Context, conn *pgx.Conn, alter ...string) ([]MissingPrivilege, error) {
	fail := func(err error) ([]MissingPrivilege, error) { return nil, fmt.Errorf("read privileges: %w", err) }
	version, err := versionNumber(ctx, conn)
	if err != nil {
		return fail(err)
	}
	major := version / 10000
	var superuser, readsSettings bool
	var role string
	err = conn.QueryRow(ctx, `select rolsuper, pg_has_role('pg_read_all_settings', 'usage'), rolname::text
		from pg_roles where rolname = current_user`).Scan(&superuser, &readsSettings, &role)
	if err != nil {
		return fail(err)
	}
	if superuser {
		return nil, nil
	}
	quoted := QuoteRole(role)
	var missing []MissingPrivilege
	if !readsSettings {
		missing = append(missing, MissingPrivilege{What: "read all settings", Grant: grantReadSettings(quoted)})
	}
	for _, f := range neededFunctions(major, len(alter) > 0 && major >= alterSystemByGrant) {
		var may bool
		if err := conn.QueryRow(ctx, "select has_function_privilege($1, 'execute')", f.signature()).Scan(&may); err != nil {
			return fail(err)
		}
		if !may {
			missing = append(missing, MissingPrivilege{What: "call " + f.name, Grant: grantFunction(f, quoted)})
		}
	}
	for _, name := range alter {
		if major < alterSystemByGrant {
			missing = append(missing, MissingPrivilege{What: "change " + name + " (before PostgreSQL 15 only a superuser can)", SuperuserOnly: true})
			continue
		}
		var may bool
		if err := conn.QueryRow(ctx, "select has_parameter_privilege($1, 'alter system')", name).Scan(&may); err != nil {
			return fail(err)
		}
		if !may {
			missing = append(missing, MissingPrivilege{What: "change " + name, Grant: grantSetting(name, quoted)})
		}
	}
	return missing, nil
}

// Refusal is why a server did not let a role in.
type Refusal int

// The reasons of a Refusal. Servers tell them in their own language; the names of their functions are the same in all.
const (
	NotRefused         Refusal = 0 // another error, or none
	RefusedByHBA       Refusal = 1 // pg_hba.conf has no line for it, or one that wants a password, or pg_ident.conf has none
	RefusedRole        Refusal = 2 // there is no such role, or it may not log in
	RefusedConnect     Refusal = 3 // the role may not connect to the database
	RefusedDatabase    Refusal = 4 // there is no such database
	RefusedConnections Refusal = 5 // there are too many connections, of all or of the role
	RefusedReplication Refusal = 6 // the role lacks the attribute REPLICATION
)

// RefusalOf judges an error of Connect and of ConnectReplication.
func RefusalOf(err error) Refusal {
	var pg *pgconn.PgError
	if !errors.As(err, &pg) {
		return NotRefused
	}
	switch pg.Code {
	case "28P01":
		return RefusedByHBA
	case "28000":
		if pg.Routine == "InitializeSessionUserId" { // miscinit.c
			return RefusedRole
		}
		return RefusedByHBA
	case "42501":
		if pg.Routine == "InitPostgres" { // postinit.c
			return RefusedReplication
		}
		return RefusedConnect
	case "3D000":
		return RefusedDatabase
	case "53300":
		return RefusedConnections
	}
	return NotRefused
}

// IsDenied tells whether a server refused a statement because our role lacks a privilege.
func IsDenied(err error) bool {
	var pg *pgconn.PgError
	return errors.As(err, &pg) && pg.Code == "42501"
}
