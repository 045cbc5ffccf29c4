package sshlink

import (
	"regexp"
	"strings"
)

// script is what sh runs on the host: it tells its process group, so that it can be ended, and then the command.
//
// The language of messages is set to the untranslated one, because what sudo says decides.
func (l *Link) script(c Command, mark string, sudo bool) string {
	var b strings.Builder
	b.WriteString("if IFS= read -r asroot_ 2>/dev/null </proc/self/stat; then set -- ${asroot_##*) }; else set -- - - $$; fi\n")
	b.WriteString("echo \"" + mark + " group $3\" >&2\nset --\n")
	b.WriteString("unset LC_ALL LANGUAGE; LC_MESSAGES=C; export LC_MESSAGES\n")
	if c.Root {
		switch {
		case !sudo:
			b.WriteString("asroot() { \"$@\"; }\n")
		case l.sudoPassword == "":
			b.WriteString(strings.ReplaceAll(sudoMissing+sudoPlain, "MARK", mark))
		default:
			verified := ""
			l.mu.Lock()
			if l.sudoVerified {
				verified = "yes"
			}
			l.mu.Unlock()
			// A variable that came with the environment would go on to what the script starts.
			b.WriteString("unset asroot_password; IFS= read -r asroot_password\nasroot_verified=" + verified + "\n")
			b.WriteString(strings.ReplaceAll(sudoMissing+sudoWithPassword, "MARK", mark))
		}
	}
	switch {
	case len(c.Args) == 0:
		b.WriteString(c.Shell)
	case c.Root:
		b.WriteString("asroot " + quoteAll(c.Args))
	default:
		b.WriteString("exec " + quoteAll(c.Args))
	}
	return b.String()
}

const sudoMissing = `command -v sudo >/dev/null 2>&1 || { echo "MARK missing" >&2; exit 127; }
`

const sudoPlain = `asroot() { sudo -n "$@"; }
`

// sudoWithPassword runs a program by sudo when the password is known and it is not known whether this program needs it: a
// program that needs none would take the password for its input, so it is run without first. sudo -n that is refused for
// want of a password has run nothing and read nothing, so that the input is still there for the second try. The refusal is
// known by what sudo says, since its exit code is that of many a program; for that, standard error is held back.
//
// The password is checked on its own first (sudo -v), once per link: sudo asks again after a wrong one, and would take the
// program's input for the second and third. Behind sudo -S the password and the input come through one pipe. cat at its
// beginning would wait for more input after the program has ended, hence "end"; not if the input is a file or /dev/null, which
// end by themselves: then that of the command is for the next program.
const sudoWithPassword = `asroot() {
  { asroot_said=$(sudo -n "$@" 2>&1 >&3 3>&-); } 3>&1
  set -- "$?" "$@"
  case "$1 $asroot_said" in
  "1 sudo: "*" is required") ;;
  *)
    [ -z "$asroot_said" ] || printf '%s\n' "$asroot_said" >&2
    return "$1" ;;
  esac
  shift
  if [ -z "$asroot_verified" ]; then
    printf '%s\n' "$asroot_password" | sudo -k -S -p '' -v >/dev/null || return 1
    asroot_verified=yes
    echo "MARK verified" >&2
  fi
  asroot_end=yes
  if [ -f /dev/stdin ] || [ -c /dev/stdin ]; then asroot_end=; fi
  { printf '%s\n' "$asroot_password"; exec cat; } | { sudo -k -S -p '' "$@"; asroot_=$?; [ -z "$asroot_end" ] || echo "MARK end" >&2; exit "$asroot_"; }
}
`

// learn remembers what a command has shown about sudo.
func (l *Link) learn(s *stderr) {
	if s.verified.Load() {
		l.mu.Lock()
		l.sudoVerified = true
		l.mu.Unlock()
	}
}

// What sudo says, untranslated, in its versions 1.8 and 1.9, and in sudo-rs, by problem.
var sudoSayings = []struct {
	problem string
	says    *regexp.Regexp
}{
	{SudoWrongPassword, regexp.MustCompile(`(?mi)^(sudo: )?(Sorry, try again|.*incorrect (password|authentication) attempt|.*Authentication failed|sudo: no password was provided)`)},
	{SudoNotAllowed, regexp.MustCompile(`(?m)^(sudo: )?(\S+ is not in the sudoers file|Sorry, user \S+ (is not allowed to execute|may not run sudo)|I'm sorry \S+ I'm afraid I can't do that)`)},
	{SudoNeedsTerminal, regexp.MustCompile(`(?m)^sudo: sorry, you must have a tty`)},
	{SudoNeedsPassword, regexp.MustCompile(`(?m)^sudo: .*((password|authentication) is required|terminal is required to read the password)`)},
}

// sudoProblem says why sudo refused, or "" if nothing says that it did.
func sudoProblem(said string) string {
	for _, s := range sudoSayings {
		if s.says.MatchString(said) {
			return s.problem
		}
	}
	return ""
}
