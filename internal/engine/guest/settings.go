//go:build linux

package guest

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/pgark/terraform-provider-pgark/internal/engine/job"
	"github.com/pgark/terraform-provider-pgark/internal/engine/postgres"
)

const closeTimeout = 2 * time.Second

// remembered is settings.json: what postgresql.auto.conf said of the settings that we changed, before we did.
type remembered struct {
	Format   int               `json:"format"`
	Instance job.Instance      `json:"instance"` // found without the job file, too
	Settings map[string]before `json:"settings"`
}

// before is a setting as ALTER SYSTEM had left it.
type before struct {
	Set   bool   `json:"set"` // in postgresql.auto.conf
	Value string `json:"value,omitempty"`
	Ours  string `json:"ours"` // what we changed it to: anything else found later is somebody's decision, and stays
}

func autoConf(dataDirectory string) string {
	return filepath.Join(dataDirectory, "postgresql.auto.conf")
}

func readAutoConf(dataDirectory string) ([]confLine, error) {
	b, err := os.ReadFile(autoConf(dataDirectory))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	return parseConf(string(b)), nil
}

// readArchiveCommand reads archive_command as it is set; pg_settings.setting shows "(disabled)" while archiving is off
// (pgarch.c, show_archive_command).
func readArchiveCommand(ctx context.Context, conn *pgx.Conn) (string, error) {
	var command string
	err := conn.QueryRow(ctx, "select coalesce(reset_val, '') from pg_catalog.pg_settings where name = 'archive_command'").Scan(&command)
	if err != nil {
		return "", fmt.Errorf("read archive_command: %w", err)
	}
	return command, nil
}

// readRemembered reads settings.json; nil where there is none.
func (g *local) readRemembered(name, instance string) (*remembered, error) {
	b, err := os.ReadFile(g.layout.SettingsFile(name, instance))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("settings before pgark: %w", err)
	}
	r := new(remembered)
	if err := json.Unmarshal(b, r); err != nil {
		return nil, fmt.Errorf("settings before pgark: %s: %w", g.layout.SettingsFile(name, instance), err)
	}
	return r, nil
}

// takeSettings makes the wanted values those of the instance, after remembering what was there. It changes nothing that
// is as wanted.
func (g *local) takeSettings(ctx context.Context, name string, i job.Instance, owner account, wanted map[string]string) error {
	r, err := g.readRemembered(name, i.Name)
	if err != nil {
		return err
	}
	if r == nil {
		r = &remembered{Format: 1, Settings: map[string]before{}}
	}
	r.Instance = i
	auto, err := readAutoConf(i.DataDirectory)
	if err != nil {
		return err
	}
	for setting, value := range wanted {
		b, known := r.Settings[setting]
		if !known {
			b.Value, b.Set = confSetting(auto, setting)
			if b.Set && b.Value == value {
				if setting == "archive_mode" {
					continue // somebody else's decision, which only waits for a restart
				}
				// Ours already, from a time whose memory is lost: what was before that nobody knows.
				b = before{}
			}
		}
		b.Ours = value
		r.Settings[setting] = b
	}
	b, err := json.MarshalIndent(r, "", "  ")
	if err != nil {
		return fmt.Errorf("settings before pgark: %w", err)
	}
	// An old archive_command may hold a password.
	if _, err := writeFile(g.layout.SettingsFile(name, i.Name), append(b, '\n'), 0o600, owner); err != nil {
		return fmt.Errorf("remember the settings of %s: %w", i.Name, err)
	}

	conn, err := connect(ctx, i)
	if err != nil {
		return err
	}
	defer closeNow(conn)
	changed := false
	for setting, value := range wanted {
		if there, set := confSetting(auto, setting); set && there == value {
			continue
		}
		if err := postgres.AlterSystem(ctx, conn, setting, value); err != nil {
			return err
		}
		changed = true
	}
	command, err := readArchiveCommand(ctx, conn)
	if err != nil {
		return err
	}
	if !changed && command == wanted["archive_command"] {
		return nil
	}
	if err := postgres.Reload(ctx, conn); err != nil {
		return err
	}
	if command, err = readArchiveCommand(ctx, conn); err != nil {
		return err
	}
	if command != wanted["archive_command"] {
		return fmt.Errorf("archive_command of %s is not ours after the reload: something comes before %s; look for it in pg_settings.sourcefile and pg_file_settings",
			i.Name, autoConf(i.DataDirectory))
	}
	return nil
}

// putBack makes the settings what they were. A setting that somebody has changed since we did is theirs and stays.
func (g *local) putBack(ctx context.Context, name, instance string, known job.Instance) error {
	r, err := g.readRemembered(name, instance)
	if err != nil {
		return &SettingsError{Instance: instance, Err: err}
	}
	i := known
	ours := g.layout.ArchiveCommand(name, instance)
	if r != nil {
		if i.DataDirectory == "" {
			i = r.Instance
		}
	} else {
		// Without its memory, a setting of ours is taken out: what was there before is not known, and ours must not stay.
		r = &remembered{Settings: map[string]before{"archive_command": {Ours: ours}}}
	}
	if i.DataDirectory == "" {
		return nil // nothing tells where it is, so nothing of it was ever changed
	}
	if _, err := os.Stat(filepath.Join(i.DataDirectory, "PG_VERSION")); errors.Is(err, fs.ErrNotExist) || errors.Is(err, syscall.ENOTDIR) {
		return nil // the cluster was removed, its settings with it
	}
	auto, err := readAutoConf(i.DataDirectory)
	if err != nil {
		return &SettingsError{Instance: instance, Err: err}
	}
	back := map[string]*string{}
	for setting, b := range r.Settings {
		if there, set := confSetting(auto, setting); !set || there != b.Ours {
			continue
		}
		back[setting] = nil
		if b.Set {
			back[setting] = &b.Value
		}
	}
	if len(back) == 0 {
		return nil
	}

	running, postmaster, err := postgres.IsRunning(i.DataDirectory)
	if err != nil {
		return &SettingsError{Instance: instance, Err: err}
	}
	if !running {
		if err := editAutoConf(i.DataDirectory, auto, back); err != nil {
			return &SettingsError{Instance: instance, Err: err}
		}
		return nil
	}
	i.Port, i.SocketDirectory = postmaster.Port, postmaster.SocketDirectory
	i.SystemID = 0 // the data directory says whose server it is, also after it was initialised anew
	if err := alterBack(ctx, i, back); err != nil {
		var remedy []string
		for setting, value := range back {
			if value == nil {
				remedy = append(remedy, psql(i, "ALTER SYSTEM RESET "+setting))
			} else {
				// The old value may hold a secret.
				remedy = append(remedy, psql(i, "ALTER SYSTEM SET "+setting+" = '…'")+"  # its value is in "+g.layout.SettingsFile(name, instance))
			}
		}
		return &SettingsError{Instance: instance, Err: err, Remedy: strings.Join(append(remedy, psql(i, "SELECT pg_reload_conf()")), "\n")}
	}
	if _, ok := back["archive_mode"]; !ok {
		return nil
	}
	// We turned archive_mode on with a restart that was allowed. Left on with no archive_command, PostgreSQL would keep
	// all WAL until it has filled the disk, so off must take effect as well.
	return g.restartDirectory(ctx, i)
}

// restartDirectory restarts the server of an instance that is known by its data directory.
func (g *local) restartDirectory(ctx context.Context, i job.Instance) error {
	clusters, err := g.clusters(ctx)
	if err != nil {
		return &SettingsError{Instance: i.Name, Err: err}
	}
	for _, c := range clusters {
		if same, err := sameDirectory(c.DataDirectory, i.DataDirectory); err != nil || !same || !c.Running {
			continue
		}
		if err := g.restart(ctx, c); err != nil {
			return &SettingsError{Instance: i.Name, Err: err, Remedy: restartCommand(c) + "  # archive_mode is off after it; until then, PostgreSQL keeps all WAL"}
		}
	}
	return nil
}

func sameDirectory(a, b string) (bool, error) {
	x, err := os.Stat(a)
	if err != nil {
		return false, err
	}
	y, err := os.Stat(b)
	if err != nil {
		return false, err
	}
	return os.SameFile(x, y), nil
}

func alterBack(ctx context.Context, i job.Instance, back map[string]*string) error {
	conn, err := connect(ctx, i)
	if err != nil {
		return err
	}
	defer closeNow(conn)
	for setting, value := range back {
		if value == nil {
			err = postgres.AlterSystemReset(ctx, conn, setting)
		} else {
			err = postgres.AlterSystem(ctx, conn, setting, *value)
		}
		if err != nil {
			return err
		}
	}
	return postgres.Reload(ctx, conn)
}

// editAutoConf does what ALTER SYSTEM does, for a server that is stopped: a new file, flushed, in the place of the old
// one (guc.c, AlterSystemSetConfigFile).
func editAutoConf(dataDirectory string, lines []confLine, change map[string]*string) error {
	path := autoConf(dataDirectory)
	info, err := os.Stat(path)
	if err != nil {
		return err
	}
	content := ""
	for setting, value := range change {
		content = setConf(lines, setting, value)
		lines = parseConf(content)
	}
	st := status(info)
	owner := account{uid: int(st.Uid), gid: int(st.Gid)}
	if _, err := writeFile(path, []byte(content), info.Mode().Perm(), owner); err != nil {
		return err
	}
	// A server that started in between has read the one or the other file; told to read it again, it has the new one.
	if running, p, err := postgres.IsRunning(dataDirectory); err == nil && running {
		_ = syscall.Kill(p.PID, syscall.SIGHUP)
	}
	return nil
}

// psql is a command that a person can paste.
func psql(i job.Instance, sql string) string {
	return fmt.Sprintf("sudo -u %s psql -h %s -p %d -d postgres -c %s", i.Owner, i.SocketDirectory, i.Port, shellQuote(sql))
}

func shellQuote(s string) string {
	return `"` + strings.NewReplacer(`\`, `\\`, `"`, `\"`, `$`, `\$`, "`", "\\`").Replace(s) + `"`
}
