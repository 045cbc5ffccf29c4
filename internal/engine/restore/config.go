package restore

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"

	"github.com/pgark/terraform-provider-pgark/internal/engine/postgres"
)

// The lines between which postgresql.auto.conf holds what is for recovery only.
const (
	recoveryBegin = "# pgark restore: for recovery only, taken out when it has ended"
	recoveryEnd   = "# pgark restore: end"
)

// setting is one line of a configuration file.
type setting struct{ name, value string }

func (s setting) String() string { return s.name + " = " + quoteSetting(s.value) }

// quoteSetting quotes a value as PostgreSQL's configuration files want it (guc-file.l): a quote is doubled, and a
// backslash begins an escape.
func quoteSetting(v string) string {
	return "'" + strings.NewReplacer(`\`, `\\`, `'`, `''`, "\n", `\n`, "\r", `\r`).Replace(v) + "'"
}

// settingLine matches a line that sets something: a name, an optional equals sign, a value.
var settingLine = regexp.MustCompile(`^\s*([A-Za-z_][A-Za-z0-9_.$]*)\s*(?:=\s*|\s)\s*('(?:[^'\\]|''|\\.)*'|[^\s#']+)`)

// parseSetting reads one line; false if it sets nothing. Names come in lower case.
func parseSetting(line string) (setting, bool) {
	m := settingLine.FindStringSubmatch(line)
	if m == nil {
		return setting{}, false
	}
	v := m[2]
	if strings.HasPrefix(v, "'") {
		v = unquoteSetting(v[1 : len(v)-1])
	}
	return setting{strings.ToLower(m[1]), v}, true
}

func unquoteSetting(s string) string {
	var b strings.Builder
	for i := 0; i < len(s); i++ {
		switch c := s[i]; {
		case c == '\'':
			i++ // doubled
			b.WriteByte('\'')
		case c == '\\' && i+1 < len(s):
			i++
			switch s[i] {
			case 'n':
				b.WriteByte('\n')
			case 'r':
				b.WriteByte('\r')
			case 't':
				b.WriteByte('\t')
			default:
				b.WriteByte(s[i])
			}
		default:
			b.WriteByte(c)
		}
	}
	return b.String()
}

// lines splits a file so that every line keeps its end.
func lines(b []byte) []string { return strings.SplitAfter(string(b), "\n") }

// isTarget tells of settings that end recovery: two of them at a time are an error for PostgreSQL (xlogrecovery.c,
// error_multiple_recovery_targets), so none may be left over from an earlier restore.
func isTarget(name string) bool {
	switch name {
	case "recovery_target", "recovery_target_time", "recovery_target_xid", "recovery_target_name", "recovery_target_lsn":
		return true
	}
	return false
}

// ofRecovery tells of settings that an earlier recovery may have left in postgresql.auto.conf.
func ofRecovery(name string) bool {
	return isTarget(name) || name == "restore_command" || name == "recovery_end_command" || name == "archive_cleanup_command" ||
		strings.HasPrefix(name, "recovery_target_")
}

// withoutRecovery takes the settings of an earlier recovery, and the block of an earlier restore, out of a
// postgresql.auto.conf.
func withoutRecovery(auto []byte) []byte {
	var out bytes.Buffer
	inside := false
	for _, line := range lines(auto) {
		switch strings.TrimRight(line, "\r\n") {
		case recoveryBegin:
			inside = true
			continue
		case recoveryEnd:
			inside = false
			continue
		}
		if inside {
			continue
		}
		if s, ok := parseSetting(line); ok && ofRecovery(s.name) {
			continue
		}
		out.WriteString(line)
	}
	return out.Bytes()
}

// withLasting appends what sets a copy apart from its original.
func withLasting(auto []byte, lasting []setting) []byte {
	if len(lasting) == 0 {
		return auto
	}
	out := endedBuffer(auto)
	out.WriteString("# pgark restore: so that this copy neither archives into the series that it came from nor collides with its original\n")
	for _, s := range lasting {
		fmt.Fprintln(out, s)
	}
	return out.Bytes()
}

// endedBuffer begins with content whose last line is ended.
func endedBuffer(b []byte) *bytes.Buffer {
	out := bytes.NewBuffer(bytes.Clone(b))
	if out.Len() > 0 && !bytes.HasSuffix(b, []byte("\n")) {
		out.WriteByte('\n')
	}
	return out
}

// withRecovery appends what is for recovery only, in place of what an earlier recovery left.
func withRecovery(auto []byte, recovery []setting) []byte {
	out := endedBuffer(withoutRecovery(auto))
	fmt.Fprintln(out, recoveryBegin)
	for _, s := range recovery {
		fmt.Fprintln(out, s)
	}
	fmt.Fprintln(out, recoveryEnd)
	return out.Bytes()
}

// adoptConfig makes a postgresql.conf that stood elsewhere, or that points elsewhere, stand by itself in the data
// directory. inside maps absolute paths of the old configuration to the new ones, "" for what is not there.
func adoptConfig(conf []byte, data string, outside bool, inside func(string) string) []byte {
	var out bytes.Buffer
	own := map[string]string{
		"data_directory": data,
		"hba_file":       filepath.Join(data, "pg_hba.conf"), "ident_file": filepath.Join(data, "pg_ident.conf"),
		"external_pid_file": "",
	}
	for _, line := range lines(conf) {
		s, ok := parseSetting(line)
		switch {
		case !ok:
		case isTarget(s.name):
			line = "# taken out by pgark restore: " + line
		case strings.HasPrefix(s.name, "include") && filepath.IsAbs(s.value):
			if to := inside(s.value); to != "" {
				line = s.name + " " + quoteSetting(to) + "  # was " + s.value + "\n"
			}
		case s.name == "hba_file" || s.name == "ident_file":
			outside = true
			if to := inside(s.value); to != "" {
				own[s.name] = to
			}
		case own[s.name] != "" || s.name == "external_pid_file":
			outside = true
		}
		out.WriteString(line)
	}
	if !outside {
		return out.Bytes()
	}
	if out.Len() > 0 && !bytes.HasSuffix(out.Bytes(), []byte("\n")) {
		out.WriteByte('\n')
	}
	out.WriteString("# pgark restore: this copy stands by itself, all of it in one directory\n")
	for _, name := range []string{"data_directory", "hba_file", "ident_file", "external_pid_file"} {
		fmt.Fprintln(&out, setting{name, own[name]})
	}
	return out.Bytes()
}

// minimalConfig serves an image without a readable postgresql.conf: recovery refuses to run with less than the
// original had of these (xlogrecovery.c, CheckRequiredParameterValues).
func minimalConfig(c *postgres.Control) []byte {
	var out bytes.Buffer
	out.WriteString("# made by pgark restore: the image holds no postgresql.conf\n")
	for _, s := range []struct {
		name  string
		value int
	}{
		{"max_connections", c.MaxConnections}, {"max_worker_processes", c.MaxWorkerProcesses}, {"max_wal_senders", c.MaxWALSenders},
		{"max_prepared_transactions", c.MaxPreparedXacts}, {"max_locks_per_transaction", c.MaxLocksPerTransaction},
	} {
		fmt.Fprintf(&out, "%s = %d\n", s.name, s.value)
	}
	return out.Bytes()
}

// minimalHBA admits the owner over the socket, and nobody else.
const minimalHBA = "# made by pgark restore: the image holds no pg_hba.conf\nlocal all all peer\n"

// effective reads what the configuration sets, as PostgreSQL does: the last line wins, included files in place,
// postgresql.auto.conf at the end. Files that are not there set nothing.
func effective(data string) map[string]string {
	all := map[string]string{}
	readSettings(filepath.Join(data, "postgresql.conf"), all, 0)
	readSettings(filepath.Join(data, "postgresql.auto.conf"), all, 0)
	return all
}

// maxIncludes is how deep PostgreSQL follows includes (guc-file.l, CONF_FILE_MAX_DEPTH).
const maxIncludes = 10

func readSettings(file string, all map[string]string, depth int) {
	b, err := os.ReadFile(file)
	if err != nil || depth > maxIncludes {
		return
	}
	for _, line := range lines(b) {
		s, ok := parseSetting(line)
		if !ok {
			continue
		}
		name := s.value
		if !filepath.IsAbs(name) {
			name = filepath.Join(filepath.Dir(file), name)
		}
		switch s.name {
		case "include", "include_if_exists":
			readSettings(name, all, depth+1)
		case "include_dir":
			found, _ := filepath.Glob(filepath.Join(name, "*.conf")) // in order; the pattern is well formed
			for _, f := range found {
				if !strings.HasPrefix(filepath.Base(f), ".") {
					readSettings(f, all, depth+1)
				}
			}
		default:
			all[s.name] = s.value
		}
	}
}

// recoverySettings say what ends recovery.
func (p *Plan) recoverySettings(action, restoreCommand string) []setting {
	timeline := strconv.FormatUint(uint64(p.Timeline), 10)
	if p.orphan {
		timeline = "current" // PostgreSQL takes no timeline by its number without its history
	}
	out := []setting{{"restore_command", restoreCommand}, {"recovery_target_timeline", timeline}}
	inclusive := func() {
		if p.target.Exclusive {
			out = append(out, setting{"recovery_target_inclusive", "off"})
		} else {
			out = append(out, setting{"recovery_target_inclusive", "on"})
		}
	}
	switch p.stop {
	case stopConsistency:
		out = append(out, setting{"recovery_target", "immediate"})
	case stopAtKnownEnd:
		out = append(out, setting{"recovery_target_lsn", p.endLSN.String()}, setting{"recovery_target_inclusive", "on"})
	case stopAtTarget:
		switch p.target.kind() {
		case ToTime:
			out = append(out, setting{"recovery_target_time", p.target.Time.UTC().Format("2006-01-02 15:04:05.000000+00")})
			inclusive()
		case ToLSN:
			out = append(out, setting{"recovery_target_lsn", p.target.LSN.String()})
			inclusive()
		case ToXID:
			out = append(out, setting{"recovery_target_xid", p.target.XID})
			inclusive()
		case ToName:
			out = append(out, setting{"recovery_target_name", p.target.Name})
		}
	}
	if p.gap && p.image.PostgresVersion >= 150000 {
		// Looking ahead of what it replays (xlogprefetcher.c), PostgreSQL would ask for what is missing, and end.
		out = append(out, setting{"recovery_prefetch", "off"})
	}
	out = append(out, setting{"recovery_target_action", action})
	if action == ActionPause {
		out = append(out, setting{"hot_standby", "on"}) // or PostgreSQL would shut down instead
	}
	return out
}

// configure puts the configuration of a restored data directory in order. It reads and writes in the data directory
// only, and follows no link.
func (r *run) configure(control *postgres.Control, outside bool) error {
	data := r.o.DataDirectory
	inside := func(name string) string {
		for _, v := range r.layout.manifest.Volumes {
			old := v.Path
			if v.Role == roleData {
				old = r.layout.manifest.DataDirectory
			}
			if v.Role != roleConfig && v.Role != roleData {
				continue
			}
			rel, err := filepath.Rel(old, name)
			if err != nil || !filepath.IsLocal(rel) {
				continue
			}
			to := filepath.Join(data, rel)
			if _, err := os.Stat(to); err == nil {
				return to
			}
		}
		return ""
	}
	conf, ok, err := readOwn(filepath.Join(data, "postgresql.conf"))
	if err != nil {
		return err
	}
	if !ok {
		r.warn("the image holds no postgresql.conf: the copy runs with PostgreSQL's defaults")
		conf = minimalConfig(control)
	}
	if adopted := adoptConfig(conf, data, outside, inside); !ok || !bytes.Equal(adopted, conf) {
		if err := r.writeOwn("postgresql.conf", adopted); err != nil {
			return err
		}
	}
	hba := effective(data)["hba_file"]
	if hba == "" {
		hba = filepath.Join(data, "pg_hba.conf")
	}
	if hba == filepath.Join(data, "pg_hba.conf") {
		if _, ok, err := readOwn(hba); err != nil {
			return err
		} else if !ok {
			r.warn("the image holds no pg_hba.conf: only the owner is admitted, over the socket")
			if err := r.writeOwn("pg_hba.conf", []byte(minimalHBA)); err != nil {
				return err
			}
		}
	}

	auto, _, err := readOwn(filepath.Join(data, "postgresql.auto.conf"))
	if err != nil {
		return err
	}
	// The settings of the image, to see which of them cannot work here.
	now := effective(data)
	var lasting []setting
	if !r.o.KeepArchiving {
		lasting = append(lasting, setting{"archive_mode", "off"})
		if v := now["synchronous_standby_names"]; v != "" {
			r.warn("synchronous_standby_names is emptied: no standby follows this copy, and commits would wait for one")
			lasting = append(lasting, setting{"synchronous_standby_names", ""})
		}
	}
	if r.o.Port != 0 {
		lasting = append(lasting, setting{"port", strconv.Itoa(r.o.Port)})
	}
	if s, ok := r.usableSocketDirectories(now["unix_socket_directories"]); !ok {
		r.warn("unix_socket_directories is set to %s: %q cannot be used here", s, now["unix_socket_directories"])
		lasting = append(lasting, setting{"unix_socket_directories", s})
	}
	if certificate := now["ssl_cert_file"]; onOff(now["ssl"]) && filepath.IsAbs(certificate) {
		if _, err := os.Stat(certificate); err != nil {
			r.warn("ssl is turned off: there is no certificate %s here", certificate)
			lasting = append(lasting, setting{"ssl", "off"})
		}
	}
	auto = withLasting(auto, lasting)
	if err := r.writeOwn("postgresql.auto.conf", withRecovery(auto, r.recoverySettings())); err != nil {
		return err
	}
	return r.writeOwn("recovery.signal", nil)
}

func (r *run) recoverySettings() []setting {
	return r.plan.recoverySettings(r.o.TargetAction, r.restoreCommand)
}

// writeRecovery replaces what postgresql.auto.conf says of recovery.
func (r *run) writeRecovery() error {
	auto, ok, err := readOwn(filepath.Join(r.o.DataDirectory, "postgresql.auto.conf"))
	if err != nil || !ok {
		return err
	}
	return r.writeOwn("postgresql.auto.conf", withRecovery(auto, r.recoverySettings()))
}

// onOff reads a boolean setting; PostgreSQL takes any unambiguous beginning of these.
func onOff(v string) bool {
	switch strings.ToLower(v) {
	case "on", "true", "yes", "1", "t", "tr", "tru", "y", "ye":
		return true
	}
	return false
}

// readOwn reads a regular file of ours; false if there is none, or something else, like a link that leads away.
func readOwn(name string) ([]byte, bool, error) {
	st, err := os.Lstat(name)
	if errors.Is(err, fs.ErrNotExist) || err == nil && !st.Mode().IsRegular() {
		return nil, false, nil
	}
	if err != nil {
		return nil, false, err
	}
	b, err := os.ReadFile(name)
	return b, err == nil, err
}

// writeOwn replaces a file at the top of the data directory, durably, with the mode and owner that PostgreSQL gives
// its own.
func (r *run) writeOwn(name string, content []byte) error {
	return r.owners.replaceFile(filepath.Join(r.o.DataDirectory, name), content)
}

// takeOutRecovery removes what is for recovery only from a server that has left recovery. The running server keeps
// what it has read: these settings take effect at a start only, so it is not told to read the file again.
func (r *run) takeOutRecovery() error {
	name := filepath.Join(r.o.DataDirectory, "postgresql.auto.conf")
	auto, ok, err := readOwn(name)
	if err != nil || !ok {
		return err
	}
	return r.owners.replaceFile(name, withoutRecovery(auto))
}
