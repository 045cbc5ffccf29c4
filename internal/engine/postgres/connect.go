package postgres

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"os/user"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/jackc/pgx/v5"
)

// ApplicationName is what pg_stat_activity shows of pgark's connections.
const ApplicationName = "pgark"

// ConnectOptions say how to reach a server on this machine.
type ConnectOptions struct {
	SocketDirectory string // an element of unix_socket_directories
	Port            int    // 0: 5432

	// User is the database role. Empty: the name of Owner, as peer authentication without a map wants it.
	User string

	// Database is the database to connect to. Empty: "postgres".
	Database string

	// Owner is the operating system user, by name or number, as whom a process of root connects. Empty: the owner of the
	// server's socket. A process of anybody else connects as itself.
	Owner string

	// Timeout bounds reaching and authenticating. 0: 10 seconds.
	Timeout time.Duration
}

// Connect opens a connection over the server's unix socket. The server knows who asks from the socket itself (peer
// authentication), so no password is needed; a process of root asks as the instance's owner, because pg_hba.conf admits
// that one nearly everywhere and root nearly nowhere.
//
// Sessions are ours to end: the time limits that the server or the role may set on statements, idling and transactions
// are off, since a backup holds its connection for as long as it takes. search_path is empty, so that nothing a user
// created can take the place of a system function.
//
// A server that is not there matches fs.ErrNotExist or syscall.ECONNREFUSED; a refusal by the server is a
// *pgconn.PgError.
func Connect(ctx context.Context, o ConnectOptions) (*pgx.Conn, error) {
	t, err := o.target()
	if err != nil {
		return nil, err
	}
	conn, err := pgx.ConnectConfig(ctx, t.config)
	if err != nil {
		return nil, fmt.Errorf("%s as %s: %w", t.where, t.config.User, err)
	}
	// These came later than 13, which refuses a startup packet that names them: idle_session_timeout in 14,
	// transaction_timeout in 17.
	_, err = conn.Exec(ctx, `select pg_catalog.set_config(name, '0', false) from pg_catalog.pg_settings
		where name in ('idle_session_timeout', 'transaction_timeout') and setting <> '0'`)
	if err != nil {
		closeNow(conn)
		return nil, fmt.Errorf("%s: turn off session time limits: %w", t.where, err)
	}
	return conn, nil
}

// target is a server to connect to, and how.
type target struct {
	socket string
	where  string // begins errors
	config *pgx.ConnConfig
}

// target decides as whom, and with which settings, to connect.
func (o ConnectOptions) target() (target, error) {
	if o.Port == 0 {
		o.Port = 5432
	}
	if o.Database == "" {
		o.Database = "postgres"
	}
	if o.Timeout == 0 {
		o.Timeout = 10 * time.Second
	}
	socket := filepath.Join(o.SocketDirectory, ".s.PGSQL."+strconv.Itoa(o.Port))
	where := fmt.Sprintf("connect to PostgreSQL at %s", socket)

	as, err := dialIdentity(socket, o.Owner)
	if err != nil {
		return target{}, fmt.Errorf("%s: %w", where, err)
	}
	if o.User == "" {
		if o.User, err = as.name(); err != nil {
			return target{}, fmt.Errorf("%s: %w", where, err)
		}
	}

	// Everything that the environment (PGOPTIONS, PGSSLMODE, a service file, …) could change is set here or below.
	config, err := pgx.ParseConfig(fmt.Sprintf("host=%s port=%d user=%s dbname=%s sslmode=disable target_session_attrs=any",
		quoteConnectionValue(o.SocketDirectory), o.Port, quoteConnectionValue(o.User), quoteConnectionValue(o.Database)))
	if err != nil {
		return target{}, fmt.Errorf("%s: %w", where, err)
	}
	config.Fallbacks = nil
	config.ConnectTimeout = o.Timeout
	config.DialFunc = func(ctx context.Context, _, _ string) (net.Conn, error) { return dialSocket(ctx, socket, as) }
	config.RuntimeParams = map[string]string{
		"application_name":                    ApplicationName,
		"client_encoding":                     "UTF8",
		"DateStyle":                           "ISO",
		"search_path":                         "",
		"statement_timeout":                   "0",
		"lock_timeout":                        "0",
		"idle_in_transaction_session_timeout": "0",
	}
	return target{socket: socket, where: where, config: config}, nil
}

// closeNow closes a connection whose context may be done. Its error tells nothing that the caller's own does not.
func closeNow(conn *pgx.Conn) {
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Second)
	defer cancel()
	_ = conn.Close(ctx)
}

// quoteConnectionValue makes a value of a keyword/value connection string.
func quoteConnectionValue(s string) string {
	return "'" + strings.NewReplacer(`\`, `\\`, `'`, `\'`).Replace(s) + "'"
}

// identity is an operating system user to act as.
type identity struct {
	uid, gid int
	current  bool // it is the process's own: nothing to switch
}

func (i identity) name() (string, error) {
	u, err := user.LookupId(strconv.Itoa(i.uid))
	if err != nil {
		return "", fmt.Errorf("name of user %d: %w", i.uid, err)
	}
	return u.Username, nil
}

// dialIdentity decides as whom to connect.
func dialIdentity(socket, owner string) (identity, error) {
	self := identity{uid: os.Geteuid(), gid: os.Getegid(), current: true}
	if self.uid != 0 {
		return self, nil
	}
	var as identity
	if owner == "" {
		var err error
		if as.uid, as.gid, err = socketOwner(socket); err != nil {
			return identity{}, err
		}
		if u, err := user.LookupId(strconv.Itoa(as.uid)); err == nil {
			// The socket's group may be another one (unix_socket_group).
			if gid, err := strconv.Atoi(u.Gid); err == nil {
				as.gid = gid
			}
		}
	} else {
		u, err := user.Lookup(owner)
		if err != nil {
			if _, numeric := strconv.Atoi(owner); numeric != nil {
				return identity{}, fmt.Errorf("operating system user %q: %w", owner, err)
			}
			if u, err = user.LookupId(owner); err != nil {
				return identity{}, fmt.Errorf("operating system user %q: %w", owner, err)
			}
		}
		if as.uid, err = strconv.Atoi(u.Uid); err != nil {
			return identity{}, fmt.Errorf("operating system user %q: found uid %q, expected a number", owner, u.Uid)
		}
		if as.gid, err = strconv.Atoi(u.Gid); err != nil {
			return identity{}, fmt.Errorf("operating system user %q: found gid %q, expected a number", owner, u.Gid)
		}
	}
	as.current = as.uid == self.uid
	return as, nil
}

// IsNotRunning tells whether an error of Connect means that no server listens there, rather than that it refused us.
func IsNotRunning(err error) bool {
	return errors.Is(err, fs.ErrNotExist) || errors.Is(err, syscall.ECONNREFUSED)
}
