//go:build linux

package guest

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/pgark/terraform-provider-pgark/internal/engine/job"
	"github.com/pgark/terraform-provider-pgark/internal/engine/postgres"
)

const closeTimeout = 2 * time.Second

// The settings that are ours to change.
const (
	archiveMode      = "archive_mode"
	archiveCommand   = "archive_command"
	archiveLibrary   = "archive_library"
	walLevel         = "wal_level"
	maxWALSenders    = "max_wal_senders"
	synchronousNames = "synchronous_standby_names"
)

// restarted are those of them that take a restart.
var restarted = []string{archiveMode, walLevel, maxWALSenders}

// remembered is settings.json: what postgresql.auto.conf said of the settings that are ours to change, before we did.
type remembered struct {
	Format   int               `json:"format"`
	Instance job.Instance      `json:"instance"` // found without the job file, too
	Settings map[string]before `json:"settings"`
	// AutoConf is postgresql.auto.conf before our first change: PostgreSQL rewrites the file, comments and all.
	// nil: not known.
	AutoConf []byte `json:"auto_conf"`
}

// before is a setting as ALTER SYSTEM had left it.
type before struct {
	Set   bool   `json:"set"` // in postgresql.auto.conf
	Value string `json:"value,omitempty"`
	// Ours is what we changed it to: anything else found later is somebody's decision, and stays. "": it is as we found it.
	Ours string `json:"ours"`
	// Effective is the archive_command that was in force, from whichever file: what a chain has behind ours.
	Effective string `json:"effective,omitempty"`
	// Live says that the value was in force before we set it, so that taking it back takes no restart.
	Live bool `json:"live,omitempty"`
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

// recall is readRemembered for an instance that is there. What was remembered of another cluster, in whose place this one
// was made, is not about this one.
func (g *local) recall(name string, i job.Instance) (*remembered, error) {
	r, err := g.readRemembered(name, i.Name)
	if err != nil || r == nil || r.Instance.SystemID != i.SystemID {
		return nil, err
	}
	return r, nil
}

// configured tells whether a job has configured an instance's cluster before. What is found there now that is not ours
// came later.
func (g *local) configured(name string, i job.Instance) bool {
	r, err := g.recall(name, i)
	return err == nil && r != nil && r.Settings[archiveCommand].Ours != ""
}

// plannedCommand is what Apply would make of an archive_command, current, under a policy; an error says why the current
// one cannot be chained.
func (g *local) plannedCommand(name string, i job.Instance, policy, current string) (wanted string, err error) {
	r, err := g.recall(name, i)
	if err != nil {
		return "", err
	}
	wanted, _, err = g.wantedCommand(name, i.Name, policy, current, r)
	return wanted, err
}

func (g *local) wantedCommand(name, instance, policy, current string, r *remembered) (wanted, old string, err error) {
	var memory *before
	if r != nil {
		if b, ok := r.Settings[archiveCommand]; ok {
			memory = &b
		}
	}
	return wantedCommand(policy, g.layout.ArchiveCommand(name, instance), current, g.jobOfCommand(current) == name, memory)
}

// deployedCommand is what archive_command was made by the last Apply, and has to be.
func (g *local) deployedCommand(name, instance string) string {
	ours := g.layout.ArchiveCommand(name, instance)
	r, err := g.readRemembered(name, instance)
	if err != nil || r == nil {
		return ours
	}
	if wanted, err := chain(ours, unchain(r.Settings[archiveCommand].Ours)); err == nil {
		return wanted
	}
	return ours
}

// takeSettings makes archive_command what the policy wants, and the settings in restart those values, after remembering
// what was there. It changes nothing that is as wanted, and undoes what somebody has prepared for the next restart that
// would end archiving. restarts tells whether a restart has to follow.
func (g *local) takeSettings(
	ctx context.Context, name string, i job.Instance, owner account, policy string, restart map[string]string,
) (restarts bool, err error) {
	conn, err := connect(ctx, i)
	if err != nil {
		return false, err
	}
	defer closeNow(conn)
	// The checks were made before the guest was locked: somebody may have restarted the server since, to the same end.
	settings, err := postgres.ReadSettings(ctx, conn, restarted...)
	if err != nil {
		return false, err
	}
	restart = maps.Clone(restart)
	maps.DeleteFunc(restart, func(setting, value string) bool {
		return settings[setting].Value == value || setting == maxWALSenders && settings[setting].Value != "0"
	})
	r, err := g.recall(name, i)
	if err != nil {
		return false, err
	}
	content, err := os.ReadFile(autoConf(i.DataDirectory))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return false, err
	}
	auto := parseConf(string(content))
	var there before
	there.Value, there.Set = confSetting(auto, archiveCommand)
	own := g.jobOfCommand(there.Value) == name
	if r == nil {
		r = &remembered{Format: 1, Settings: map[string]before{}}
		if !own && err == nil {
			r.AutoConf = content
		}
	}
	if own {
		// From a time whose memory may be lost: what was before is not known then, except for what stands behind ours.
		behind := unchain(there.Value)
		there = before{Set: behind != "", Value: behind}
	}
	r.Instance = i
	current, err := readArchiveCommand(ctx, conn)
	if err != nil {
		return false, err
	}
	command, old, err := g.wantedCommand(name, i.Name, policy, current, r)
	if err != nil {
		return false, fmt.Errorf("archive_command of %s cannot be chained: %w", i.Name, err)
	}
	foreign := !isNoCommand(current) && g.jobOfCommand(current) != name
	r.noteCommand(there, command, old, foreign && policy == commandChain)
	wanted := map[string]string{archiveCommand: command}
	for setting, value := range restart {
		if r.noteRestart(auto, setting, value) {
			wanted[setting] = value
		}
	}
	// What does not change now may be changed by somebody later: what it was is to be known then.
	for _, setting := range []string{archiveMode, walLevel} {
		if _, known := r.Settings[setting]; !known {
			b := before{}
			b.Value, b.Set = confSetting(auto, setting)
			r.Settings[setting] = b
		}
	}
	if err := g.remember(name, i.Name, r, owner); err != nil {
		return false, err
	}

	changed := false
	for setting, value := range wanted {
		if there, set := confSetting(auto, setting); set && there == value {
			continue
		}
		if err := postgres.AlterSystem(ctx, conn, setting, value); err != nil {
			return false, err
		}
		changed = true
	}
	if changed || current != command {
		if err := postgres.Reload(ctx, conn); err != nil {
			return false, err
		}
		if current, err = readArchiveCommand(ctx, conn); err != nil {
			return false, err
		}
	}
	if current != command {
		return false, fmt.Errorf("archive_command of %s is not ours after the reload: something comes before %s; look for it in pg_settings.sourcefile and pg_file_settings",
			i.Name, autoConf(i.DataDirectory))
	}
	if err := takeLibraryBack(ctx, conn, i, auto); err != nil {
		return false, err
	}
	if len(restart) > 0 {
		return true, nil // with which nothing is pending any more
	}
	return false, g.undoPending(ctx, conn, name, i, owner, r)
}

// alteredLibrary is the archive_library that ALTER SYSTEM has set; "" for none. The checks let only one that came after
// us get as far as takeSettings.
func alteredLibrary(auto []confLine) string {
	library, _ := confSetting(auto, archiveLibrary)
	return library
}

// takeLibraryBack undoes an ALTER SYSTEM that has put an archive_library in the place of archive_command.
func takeLibraryBack(ctx context.Context, conn *pgx.Conn, i job.Instance, auto []confLine) error {
	if alteredLibrary(auto) == "" {
		return nil
	}
	if err := postgres.AlterSystemReset(ctx, conn, archiveLibrary); err != nil {
		return err
	}
	if err := postgres.Reload(ctx, conn); err != nil {
		return err
	}
	settings, err := postgres.ReadSettings(ctx, conn, archiveLibrary)
	if err != nil {
		return err
	}
	if library := settings[archiveLibrary].Value; library != "" {
		return fmt.Errorf("archive_library of %s is %q in a configuration file; look for it in pg_file_settings", i.Name, library)
	}
	return nil
}

func (g *local) remember(name, instance string, r *remembered, owner account) error {
	b, err := json.MarshalIndent(r, "", "  ")
	if err != nil {
		return fmt.Errorf("settings before pgark: %w", err)
	}
	// An old archive_command may hold a password.
	if _, err := writeFile(g.layout.SettingsFile(name, instance), append(b, '\n'), 0o600, owner); err != nil {
		return fmt.Errorf("remember the settings of %s: %w", instance, err)
	}
	return nil
}

// noteCommand remembers what was before archive_command becomes command: old was in force, and there is what
// postgresql.auto.conf says. What is remembered already stays, unless somebody has decided anew since.
func (r *remembered) noteCommand(there before, command, old string, anew bool) {
	b, known := r.Settings[archiveCommand]
	if !known || anew && old != b.Effective {
		b = there
	}
	b.Ours, b.Effective = command, old
	r.Settings[archiveCommand] = b
}

// noteRestart remembers what was before a setting that takes a restart gets a value. false: there is nothing to change.
func (r *remembered) noteRestart(auto []confLine, setting, value string) bool {
	b, known := r.Settings[setting]
	if !known || b.Ours == "" {
		b.Value, b.Set = confSetting(auto, setting)
		b.Live = false
	}
	if b.Set && b.Value == value && b.Ours == "" {
		return false // somebody else's decision, which only waits for a restart
	}
	b.Ours = value
	r.Settings[setting] = b
	return true
}

// endsArchiving tells whether a setting that takes a restart would, with this value, end the archiving of WAL.
func endsArchiving(setting, value string) bool {
	switch setting {
	case archiveMode:
		return slices.Contains([]string{archiveModeOff, "false", "no", "0"}, strings.ToLower(value))
	case walLevel:
		return strings.EqualFold(value, walLevelMinimal)
	}
	return false
}

// pendingSettings are settings that are right as they are and will, with the next restart, end archiving. A value that
// cannot be read (pg_file_settings is for superusers) is not among them.
func pendingSettings(ctx context.Context, conn *pgx.Conn, dataDirectory string) (map[string]string, error) {
	settings, err := postgres.ReadSettings(ctx, conn, archiveMode, walLevel)
	if err != nil {
		return nil, err
	}
	pending := map[string]string{}
	for name, s := range settings {
		if !s.PendingRestart || endsArchiving(name, s.Value) {
			continue
		}
		if value := fileSetting(ctx, conn, dataDirectory, name); endsArchiving(name, value) {
			pending[name] = value
		}
	}
	return pending, nil
}

// fileSetting is a setting as the configuration files have it; "" if that cannot be told.
func fileSetting(ctx context.Context, conn *pgx.Conn, dataDirectory, name string) string {
	if auto, err := readAutoConf(dataDirectory); err == nil {
		if value, set := confSetting(auto, name); set {
			return value
		}
	}
	var value string
	err := conn.QueryRow(ctx, "select coalesce(setting, '') from pg_catalog.pg_file_settings where name = $1 order by seqno desc limit 1", name).Scan(&value)
	if err != nil {
		return ""
	}
	return value
}

// undoPending takes back what would end archiving with the next restart: it makes postgresql.auto.conf say of the setting
// what it said when the job was applied first and, where that does not do, what the server has now.
func (g *local) undoPending(ctx context.Context, conn *pgx.Conn, name string, i job.Instance, owner account, r *remembered) error {
	for _, insist := range []bool{false, true} {
		pending, err := pendingSettings(ctx, conn, i.DataDirectory)
		if err != nil || len(pending) == 0 {
			return err
		}
		current, err := postgres.ReadSettings(ctx, conn, archiveMode, walLevel)
		if err != nil {
			return err
		}
		for setting := range pending {
			b := r.Settings[setting]
			value, set := b.Value, b.Set
			if b.Ours != "" {
				value, set = b.Ours, true
			}
			if insist {
				value, set = current[setting].Value, true
				if b.Ours == "" {
					b.Live = true
				}
				b.Ours = value
				r.Settings[setting] = b
				if err := g.remember(name, i.Name, r, owner); err != nil {
					return err
				}
			}
			if set {
				err = postgres.AlterSystem(ctx, conn, setting, value)
			} else {
				err = postgres.AlterSystemReset(ctx, conn, setting)
			}
			if err != nil {
				return err
			}
		}
		if err := postgres.Reload(ctx, conn); err != nil {
			return err
		}
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
	if r == nil {
		// Without its memory, a setting of ours is taken out: what was there before is not known, and ours must not stay.
		r = &remembered{Settings: map[string]before{archiveCommand: {Ours: g.layout.ArchiveCommand(name, instance)}}}
	} else if i.DataDirectory == "" {
		i = r.Instance
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
	back := g.settingsBack(name, auto, r)
	running, postmaster, err := postgres.IsRunning(i.DataDirectory)
	if err != nil && len(back) > 0 {
		return &SettingsError{Instance: instance, Err: err}
	}
	if len(back) == 0 && (!running || !r.modeIsBack(auto)) {
		if running {
			// Whoever put the settings back before us may have ended before the server was told.
			_ = syscall.Kill(postmaster.PID, syscall.SIGHUP)
		}
		return nil
	}
	if !running {
		// Whether it could be started with that, and who would be locked out, is not to be known.
		delete(back, walLevel)
		delete(back, maxWALSenders)
		if err := editAutoConf(i.DataDirectory, auto, back); err != nil {
			return &SettingsError{Instance: instance, Err: err}
		}
		restoreAutoConf(i.DataDirectory, r.AutoConf)
		return nil
	}
	i.Port, i.SocketDirectory = postmaster.Port, postmaster.SocketDirectory
	i.SystemID = 0 // the data directory says whose server it is, also after it was initialised anew
	restart, err := alterBack(ctx, i, back, r)
	if err != nil {
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
	if !restart {
		return nil
	}
	// We turned archive_mode on with a restart that was allowed. Left on with no archive_command, PostgreSQL would keep
	// all WAL until it has filled the disk, so off must take effect as well.
	return g.restartDirectory(ctx, i, func() error {
		// Somebody has set up something that wal_level = minimal does not allow, and that we have not seen.
		if _, ok := back[walLevel]; !ok {
			return nil
		}
		auto, err := readAutoConf(i.DataDirectory)
		if err != nil {
			return err
		}
		ours := r.Settings[walLevel].Ours
		return editAutoConf(i.DataDirectory, auto, map[string]*string{walLevel: &ours})
	})
}

// settingsBack are the settings to change, and to what (nil: taken out of postgresql.auto.conf).
func (g *local) settingsBack(name string, auto []confLine, r *remembered) map[string]*string {
	back := map[string]*string{}
	for setting, b := range r.Settings {
		there, set := confSetting(auto, setting)
		own := setting == archiveCommand && g.jobOfCommand(there) == name
		if !set || b.Ours == "" || there != b.Ours && !own {
			continue
		}
		back[setting] = nil
		if b.Set {
			back[setting] = &b.Value
		}
		// Somebody has changed what stands behind ours: that is theirs to keep.
		if behind := unchain(there); own && behind != "" && behind != b.Effective {
			back[setting] = &behind
		}
	}
	return back
}

// restartDirectory restarts the server of an instance that is known by its data directory; see restart.
func (g *local) restartDirectory(ctx context.Context, i job.Instance, rescue func() error) error {
	clusters, err := g.clusters(ctx)
	if err != nil {
		return &SettingsError{Instance: i.Name, Err: err}
	}
	for _, c := range clusters {
		if same, err := sameDirectory(c.DataDirectory, i.DataDirectory); err != nil || !same || !c.Running {
			continue
		}
		if err := g.restart(ctx, c, rescue); err != nil {
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

// alterBack changes settings of a server that runs, and tells whether a restart has to follow.
func alterBack(ctx context.Context, i job.Instance, back map[string]*string, r *remembered) (restart bool, err error) {
	conn, err := connect(ctx, i)
	if err != nil {
		return false, err
	}
	defer closeNow(conn)
	level, lowersLevel := back[walLevel]
	delete(back, walLevel)
	if _, ok := back[maxWALSenders]; ok && othersReplicate(ctx, conn) {
		delete(back, maxWALSenders)
	}
	for setting, value := range back {
		if err := alterTo(ctx, conn, setting, value); err != nil {
			return false, err
		}
	}
	// After max_wal_senders, of which what the files say now counts.
	_, modeToo := back[archiveMode]
	_, sendersToo := back[maxWALSenders]
	if lowersLevel && modeToo && startsMinimal(ctx, conn, i.DataDirectory, sendersToo) {
		back[walLevel] = level
		if err := alterTo(ctx, conn, walLevel, level); err != nil {
			return false, err
		}
	}
	restoreAutoConf(i.DataDirectory, r.AutoConf)
	if err := postgres.Reload(ctx, conn); err != nil {
		return false, err
	}
	settings, err := postgres.ReadSettings(ctx, conn, archiveMode)
	if err != nil {
		return false, err
	}
	auto, err := readAutoConf(i.DataDirectory)
	if err != nil {
		return false, err
	}
	return r.modeIsBack(auto) && settings[archiveMode].PendingRestart, nil
}

// alterTo makes a setting a value; nil: what the other configuration files say.
func alterTo(ctx context.Context, conn *pgx.Conn, setting string, value *string) error {
	if value == nil {
		return postgres.AlterSystemReset(ctx, conn, setting)
	}
	return postgres.AlterSystem(ctx, conn, setting, *value)
}

// othersReplicate tells whether somebody but pgark streams WAL, or may come back to a slot: he would be locked out without
// WAL senders. Whoever cannot be told from others counts.
func othersReplicate(ctx context.Context, conn *pgx.Conn) bool {
	var others bool
	err := conn.QueryRow(ctx, `select exists (select from pg_catalog.pg_stat_replication where application_name is distinct from $1)
		or exists (select from pg_catalog.pg_replication_slots where slot_name !~ '^pgark_')`, postgres.ApplicationName).Scan(&others)
	return err != nil || others
}

// modeIsBack tells whether the file says of archive_mode, which took a restart to become ours, what it said before: then
// the server has to be restarted once more, whoever has put it there, and whenever.
func (r *remembered) modeIsBack(auto []confLine) bool {
	b := r.Settings[archiveMode]
	value, set := confSetting(auto, archiveMode)
	return b.Ours != "" && !b.Live && set == b.Set && value == b.Value
}

// startsMinimal tells whether the server would start with wal_level = minimal, as it did before: anything that somebody
// has set up since which needs more keeps it from starting (postmaster.c, PostmasterMain; slot.c, RestoreSlotFromDisk).
// sendersBack: max_wal_senders was put back just now, so that it is not yet what it will be.
func startsMinimal(ctx context.Context, conn *pgx.Conn, dataDirectory string, sendersBack bool) bool {
	var slots int
	if err := conn.QueryRow(ctx, "select count(*) from pg_catalog.pg_replication_slots").Scan(&slots); err != nil || slots > 0 {
		return false
	}
	settings, err := postgres.ReadSettings(ctx, conn, maxWALSenders, "summarize_wal")
	if err != nil {
		return false
	}
	for name, s := range settings {
		// What the files say counts at the start, also of what the server has not been told of yet.
		values := []string{s.Value, cmp.Or(fileSetting(ctx, conn, dataDirectory, name), s.Value)}
		if name == maxWALSenders && sendersBack {
			values = values[1:]
		}
		for _, value := range values {
			if value != "0" && value != archiveModeOff {
				return false
			}
		}
	}
	return true
}

// restoreAutoConf gives postgresql.auto.conf back the very bytes that it had, if it says the same: PostgreSQL has written
// it anew, without its comments. Where that fails it stays as PostgreSQL left it, which is as good.
func restoreAutoConf(dataDirectory string, original []byte) {
	path := autoConf(dataDirectory)
	content, err := os.ReadFile(path)
	if err != nil || original == nil || bytes.Equal(content, original) || !maps.Equal(confSettings(content), confSettings(original)) {
		return
	}
	info, err := os.Stat(path)
	if err != nil {
		return
	}
	// Whoever changed a setting since we read the file has put another in its place; what is left of that race is the time
	// of a rename.
	if again, err := os.ReadFile(path); err != nil || !bytes.Equal(again, content) {
		return
	}
	st := status(info)
	_, _ = writeFile(path, original, info.Mode().Perm(), account{uid: int(st.Uid), gid: int(st.Gid)}) // see above
}

// confSettings are the settings of a configuration file.
func confSettings(content []byte) map[string]string {
	settings := map[string]string{}
	for _, l := range parseConf(string(content)) {
		if l.name != "" {
			settings[l.name] = l.value
		}
	}
	return settings
}

// editAutoConf does what ALTER SYSTEM does, for a server that is stopped: a new file, flushed, in the place of the old
// one (guc.c, AlterSystemSetConfigFile).
func editAutoConf(dataDirectory string, lines []confLine, change map[string]*string) error {
	if len(change) == 0 {
		return nil
	}
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
	return statements(cluster{Instance: Instance{Instance: i}}, sql)
}

func shellQuote(s string) string {
	return `"` + strings.NewReplacer(`\`, `\\`, `"`, `\"`, `$`, `\$`, "`", "\\`").Replace(s) + `"`
}
