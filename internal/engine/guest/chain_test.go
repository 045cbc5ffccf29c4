package guest

import (
	"os/exec"
	"strings"
	"testing"
)

func TestChain(t *testing.T) {
	const ours = "/usr/local/bin/pgark wal push --job orders --instance 15-main %p"
	for old, reason := range map[string]string{
		"":                                   "",
		"  ":                                 "",
		"(disabled)":                         "",
		"/bin/true":                          "",
		"test ! -f /mnt/%f && cp %p /mnt/%f": "",
		`cp "%p" '/mnt/a (b/#1)'/%f ; `:      "",
		`(cd /tmp && exit 0) || exit 3`:      "",
		`echo $(basename "%p") > /dev/null`:  "",
		`cp %p /mnt/a\#b`:                    "",
		`cp %p a#b`:                          "",
		`cp %p /mnt # to the NFS server`:     "a comment",
		`#off`:                               "a comment",
		`cp "$(echo "x # y")" b`:             "a comment",
		"true;#":                             "a comment",
		"cp %p \\\n /mnt":                    "more than one line",
		`cp %p /mnt\`:                        "ends in a backslash",
		`echo 'a`:                            "a quote in it (') is not closed",
		`echo "a`:                            `a quote in it (") is not closed`,
		"echo `a":                            "a quote in it (`) is not closed",
		`true ) || ( true`:                   "parentheses do not match",
		`( true`:                             "parentheses do not match",
	} {
		command, err := chain(ours, old)
		switch {
		case reason != "":
			if err == nil || !strings.Contains(err.Error(), reason) {
				t.Errorf("%q: found %q, %v, expected %q in the error", old, command, err, reason)
			}
		case err != nil:
			t.Errorf("%q: %v", old, err)
		case isNoCommand(old):
			if command != ours {
				t.Errorf("%q: found %q", old, command)
			}
		default:
			if command != ours+" && ( "+old+" )" || unchain(command) != old {
				t.Errorf("%q: found %q, and %q in it", old, command, unchain(command))
			}
			cmd := exec.CommandContext(t.Context(), "sh", "-n")
			cmd.Stdin = strings.NewReader(command)
			if out, err := cmd.CombinedOutput(); err != nil {
				t.Errorf("%q: the shell says %v: %s", command, err, out)
			}
		}
	}
}

// What chain lets through is one subshell to the shell: what stands behind it runs.
func FuzzChain(f *testing.F) {
	for _, s := range []string{"true", "a \\", "(a", "'", "$(x # y)", "case x in y) ;; esac", "`#`", `"$(" # ")"`} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, old string) {
		if chainable(old) != nil || isNoCommand(old) {
			return
		}
		valid := func(script string) bool {
			cmd := exec.CommandContext(t.Context(), "sh", "-n")
			cmd.Stdin = strings.NewReader(script)
			return cmd.Run() == nil
		}
		composed, err := chain("ours", old)
		if err != nil {
			t.Fatal(err)
		}
		if valid(old) && !valid(composed) {
			t.Errorf("%q is complete by itself, and %q is not", old, composed)
		}
	})
}

func TestWantedCommand(t *testing.T) {
	const ours, theirs, other = "pgark push %p", "cp %p /a", "cp %p /b"
	chained, err := chain(ours, theirs)
	if err != nil {
		t.Fatal(err)
	}
	chainedOther, err := chain(ours, other)
	if err != nil {
		t.Fatal(err)
	}
	for what, test := range map[string]struct {
		policy, current string
		memory          *before
		wanted, old     string
	}{
		"nothing there":                          {commandChain, "", nil, ours, ""},
		"theirs, to be replaced":                 {commandReplace, theirs, nil, ours, theirs},
		"theirs, to be chained":                  {commandChain, theirs, nil, chained, theirs},
		"chained already":                        {commandChain, chained, &before{Ours: chained, Effective: theirs}, chained, theirs},
		"chained, and its memory lost":           {commandChain, chained, nil, chained, theirs},
		"chained, to be replaced":                {commandReplace, chained, &before{Ours: chained, Effective: theirs}, ours, theirs},
		"replaced, to be chained":                {commandChain, ours, &before{Ours: ours, Effective: theirs}, chained, theirs},
		"replaced by an older build, to chain":   {commandChain, ours, &before{Ours: ours, Set: true, Value: theirs}, chained, theirs},
		"chained, and no policy any more":        {"fail", chained, &before{Ours: chained, Effective: theirs}, chained, theirs},
		"chained, ours taken out":                {commandChain, theirs, &before{Ours: chained, Effective: theirs}, chained, theirs},
		"chained, theirs taken out":              {commandChain, ours, &before{Ours: chained, Effective: theirs}, chained, theirs},
		"chained, what is behind was changed":    {commandChain, chainedOther, &before{Ours: chained, Effective: theirs}, chained, theirs},
		"chained, and somebody has decided anew": {commandChain, other, &before{Ours: chained, Effective: theirs}, chainedOther, other},
		"replaced, and somebody has changed it":  {commandReplace, other, &before{Ours: ours, Effective: theirs}, ours, theirs},
		"emptied":                                {commandChain, "", &before{Ours: chained, Effective: theirs}, chained, theirs},
	} {
		wanted, old, err := wantedCommand(test.policy, ours, test.current, strings.HasPrefix(test.current, ours), test.memory)
		if err != nil || wanted != test.wanted || old != test.old {
			t.Errorf("%s: found %q, %q, %v, expected %q, %q", what, wanted, old, err, test.wanted, test.old)
		}
	}
}
