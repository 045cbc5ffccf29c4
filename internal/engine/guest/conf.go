package guest

import (
	"strconv"
	"strings"
)

// confLine is one line of a PostgreSQL configuration file.
type confLine struct {
	text  string // as it stands, without the newline
	name  string // lower case; empty: no setting
	value string // unquoted
}

// parseConf reads a configuration file: name, optionally =, value (guc-file.l). It does not follow include lines: in
// postgresql.auto.conf there are none, and of postgresql.conf it only serves for a first guess about a stopped cluster.
func parseConf(content string) []confLine {
	var lines []confLine
	for text := range strings.Lines(content) {
		text = strings.TrimRight(text, "\r\n")
		l := confLine{text: text}
		rest := strings.TrimLeft(text, " \t")
		n := 0
		for n < len(rest) && (rest[n] == '_' || rest[n] == '.' || isAlphanumeric(rest[n])) {
			n++
		}
		name := rest[:n]
		rest = strings.TrimLeft(rest[n:], " \t")
		rest = strings.TrimLeft(strings.TrimPrefix(rest, "="), " \t")
		if value, ok := confValue(rest); ok && name != "" {
			l.name, l.value = strings.ToLower(name), value
		}
		lines = append(lines, l)
	}
	return lines
}

func isAlphanumeric(c byte) bool {
	return c >= '0' && c <= '9' || c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= 0x80
}

// confValue reads the value that s begins with; what may follow is a comment.
func confValue(s string) (string, bool) {
	if !strings.HasPrefix(s, "'") {
		if i := strings.IndexAny(s, " \t#"); i >= 0 {
			s = s[:i]
		}
		return s, s != ""
	}
	var b strings.Builder
	for i := 1; i < len(s); i++ {
		switch c := s[i]; {
		case c == '\'' && i+1 < len(s) && s[i+1] == '\'':
			b.WriteByte('\'')
			i++
		case c == '\'':
			return b.String(), true
		case c == '\\' && i+1 < len(s):
			i++
			i += unescape(&b, s[i:]) - 1
		default:
			b.WriteByte(c)
		}
	}
	return "", false // the quote does not end
}

// unescape writes the character that the text after a backslash stands for and returns how many bytes of it that took
// (guc-file.l, DeescapeQuotedString).
func unescape(b *strings.Builder, s string) int {
	if i := strings.IndexByte("bfnrt", s[0]); i >= 0 {
		b.WriteByte("\b\f\n\r\t"[i])
		return 1
	}
	n := 0
	for n < len(s) && n < 3 && s[n] >= '0' && s[n] <= '7' {
		n++
	}
	if n == 0 {
		b.WriteByte(s[0])
		return 1
	}
	code, _ := strconv.ParseUint(s[:n], 8, 16) // three octal digits
	b.WriteByte(byte(code))
	return n
}

// confSetting returns a setting of a configuration file: of several lines the last counts.
func confSetting(lines []confLine, name string) (value string, set bool) {
	for _, l := range lines {
		if l.name == name {
			value, set = l.value, true
		}
	}
	return value, set
}

// setConf returns the file with the setting changed, or taken out, as ALTER SYSTEM does: its lines go, and a new one
// comes last (guc.c, replace_auto_config_value).
func setConf(lines []confLine, name string, value *string) string {
	var b strings.Builder
	for _, l := range lines {
		if l.name != name {
			b.WriteString(l.text + "\n")
		}
	}
	if value != nil {
		b.WriteString(name + " = '" + strings.NewReplacer(`'`, `''`, `\`, `\\`).Replace(*value) + "'\n")
	}
	return b.String()
}
