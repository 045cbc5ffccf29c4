package guest

import (
	"errors"
	"strings"
)

// chain puts an archive_command behind ours. Both have to succeed, and ours comes first: it is asked again without harm,
// while what is behind it may refuse a file that it has got before. The old one stands in a subshell, as it was; an
// empty one leaves ours alone. It fails, with the reason, for one that would mean something else there.
func chain(ours, old string) (string, error) {
	if isNoCommand(old) {
		return ours, nil
	}
	if err := chainable(old); err != nil {
		return "", err
	}
	return ours + chainOpen + old + chainClose, nil
}

const (
	chainOpen  = " && ( "
	chainClose = " )"
)

// unchain returns what chain put behind ours; "" if there is nothing.
func unchain(command string) (old string) {
	_, old, chained := strings.Cut(command, chainOpen) // ours holds none
	if !chained {
		return ""
	}
	old, chained = strings.CutSuffix(old, chainClose)
	if !chained {
		return ""
	}
	return old
}

// SplitCommand splits an archive_command into ours and what is chained behind it; both are "" for one that is not ours.
func SplitCommand(command string) (ours, theirs string) {
	ours, _, _ = strings.Cut(command, chainOpen)
	if !strings.Contains(ours, "/pgark wal push --job ") {
		return "", ""
	}
	return ours, unchain(command)
}

// unsaid stands for what may hold a password.
const unsaid = "…"

// ProgramOf cuts a foreign command down to its program: its arguments may hold a password, and no secret enters a state or
// a message.
func ProgramOf(command string) string {
	program, rest, _ := strings.Cut(strings.TrimSpace(command), " ")
	switch {
	case strings.ContainsAny(program, "=$`'\"\\;&|<>(){}"):
		return unsaid // NAME=secret command, or something that a shell would have to read
	case rest != "":
		return program + " " + unsaid
	}
	return program
}

// RedactCommand is an archive_command as anybody may see it: ours whole, another's program.
func RedactCommand(command string) string {
	ours, theirs := SplitCommand(command)
	switch {
	case ours == "":
		return ProgramOf(command)
	case theirs != "":
		return ours + chainOpen + ProgramOf(theirs) + chainClose
	}
	return ours
}

// isNoCommand tells whether an archive_command is none. PostgreSQL shows "(disabled)" where archiving is off.
func isNoCommand(command string) bool {
	return strings.TrimSpace(command) == "" || command == "(disabled)"
}

// chainable says why a shell command cannot stand between parentheses on one line. It refuses more than the shell would,
// never less: of a command that is complete by itself, only a comment or a backslash at its end would reach for what
// follows, and one that is not complete has never worked.
func chainable(command string) error {
	if strings.ContainsAny(command, "\n\r\x00") {
		return errors.New("it has more than one line")
	}
	// Quotes begin anew in a substitution, so that they tell nothing sure about a # in such a command.
	nested := strings.Contains(command, "$(") || strings.Contains(command, "`")
	depth, quote := 0, byte(0)
	wordBegins := true
	for i := 0; i < len(command); i++ {
		c := command[i]
		if c == '#' && wordBegins && (quote == 0 || nested) {
			return errors.New("it has a comment (#), which would swallow what follows")
		}
		wordBegins = strings.IndexByte(" \t;&|()<>`\"'", c) >= 0
		switch {
		case quote == '\'':
			if c == quote {
				quote = 0
			}
		case c == '\\':
			if i++; i == len(command) {
				return errors.New("it ends in a backslash")
			}
			wordBegins = false
		case quote != 0:
			if c == quote {
				quote = 0
			}
		case c == '\'', c == '"', c == '`':
			quote = c
		case c == '(':
			depth++
		case c == ')':
			if depth--; depth < 0 {
				return errors.New("its parentheses do not match")
			}
		}
	}
	switch {
	case quote != 0:
		return errors.New("a quote in it (" + string(quote) + ") is not closed")
	case depth > 0:
		return errors.New("its parentheses do not match")
	}
	return nil
}

// wantedCommand decides what archive_command has to be under a policy, where current is in force, and what was before
// ours: what stands behind ours, where they are chained. memory is what is remembered of an earlier deployment.
func wantedCommand(policy, ours, current string, ownCurrent bool, memory *before) (wanted, old string, err error) {
	if memory != nil {
		if old = memory.Effective; old == "" && memory.Set {
			old = memory.Value
		}
	} else if ownCurrent {
		old = unchain(current) // its memory is lost
	}
	chained := memory != nil && unchain(memory.Ours) != "" || memory == nil && ownCurrent && unchain(current) != ""
	if !ownCurrent && !isNoCommand(current) && (memory == nil || policy == commandChain) {
		old = current // somebody's later decision, where there was an earlier one
	}
	if isNoCommand(old) {
		old = ""
	}
	// Not to replace what is found does not take apart what an earlier deployment has chained.
	if policy == commandChain || chained && policy != commandReplace {
		wanted, err = chain(ours, old)
		return wanted, old, err
	}
	return ours, old, nil
}
