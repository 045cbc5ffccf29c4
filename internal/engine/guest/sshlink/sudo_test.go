//go:build linux

package sshlink_test

import (
	"io"
	"strings"
	"testing"
	"time"

	"github.com/pgark/terraform-provider-pgark/internal/engine/guest/sshlink"
)

// restricted is a sudoers file of the kind that guides show: single programs, without a password.
const restricted = `deploy ALL=(root) NOPASSWD: /usr/bin/install -D -m 0755 /dev/stdin /run/lib/incoming/program
deploy ALL=(root) NOPASSWD: /run/lib/*/program guest`

func TestSudo_lines(t *testing.T) {
	w := newWorld(t)
	s := w.server(serverOptions{sudoers: restricted})
	l := w.link(s.config())
	install := sshlink.Command{Args: []string{"/usr/bin/install", "-D", "-m", "0755", "/dev/stdin", "/run/lib/incoming/program"}, Root: true}
	guest := sshlink.Command{Args: []string{"/run/lib/incoming/program", "guest"}, Root: true}
	const program = "#!/bin/sh\necho \"$(id -u) $1\"; cat; echo \"LC_MESSAGES=$LC_MESSAGES\"\n"

	// install(1) opens /dev/stdin, which has to be a pipe: sshd's is a socket.
	if _, err := l.Run(w.ctx, sshlink.Command{Name: "bring", Root: true, Shell: "gzip -dc | asroot " + strings.Join(install.Args, " "), Stdin: strings.NewReader(gzipped(t, program))}); err != nil {
		t.Fatal(withHint(err))
	}
	if got := s.file("/run/lib/incoming/program"); got != program {
		t.Fatalf("found %q installed", got)
	}
	guest.Stdin = strings.NewReader("input")
	if out := w.run(l, guest); out != "0 guest\ninputLC_MESSAGES=C\n" {
		t.Errorf("found %q", out)
	}
	// One session: some of the input for a program in front, the rest for the last one.
	out := w.run(l, sshlink.Command{Root: true, Stdin: strings.NewReader("firstsecond"),
		Shell: "head -c 5 >/dev/null; asroot /run/lib/incoming/program guest </dev/null; asroot /run/lib/incoming/program guest; echo code $?"})
	if out != "0 guest\nLC_MESSAGES=C\n0 guest\nsecondLC_MESSAGES=C\ncode 0\n" {
		t.Errorf("found %q", out)
	}

	_, err := l.Run(w.ctx, sshlink.Command{Args: []string{"id", "-u"}, Root: true})
	if e := as[*sshlink.SudoError](t, err); e.Problem != sshlink.SudoNeedsPassword || e.User != "deploy" {
		t.Errorf("found %#v", e)
	}
	contains(t, err, "deploy@"+s.address()+": run id -u as root: sudo wants a password for this command, and none is given: sudo: a password is required",
		"hint: set sudo_password, or give deploy a line with NOPASSWD for this command in /etc/sudoers.d.", `"SSH and sudo"`)

	// The policies.
	c := s.config()
	c.Sudo = sshlink.SudoNever
	never := w.link(c)
	if out := w.run(never, sshlink.Command{Args: []string{"id", "-u"}, Root: true}); out != "4242\n" || never.MaySudo() {
		t.Errorf("never: found %q", out)
	}
	c.User, c.Sudo = "root", ""
	if out := w.run(w.link(c), sshlink.Command{Shell: "asroot sh -c 'echo $PPID' | grep -c . && asroot id -u", Root: true}); out != "1\n0\n" {
		t.Errorf("root: found %q", out)
	}
	if log := s.file("/run/sudo.log"); strings.Contains(log, "root :") {
		t.Errorf("root went through sudo: %s", log)
	}
}

func TestSudo_password(t *testing.T) {
	for name, test := range map[string]serverOptions{
		"as Debian 12 has it":           {},
		"with a pseudo terminal":        {sudoers: "Defaults use_pty\n"}, // the default since sudo 1.9.14
		"with bash in place of dash":    {script: "mount --bind /usr/bin/bash /usr/bin/dash"},
		"with warnings that come first": {script: "echo 127.0.0.1 localhost >/run/hosts; mount --bind /run/hosts /etc/hosts; echo hosts: files >/run/names; mount --bind /run/names /etc/nsswitch.conf", sudoers: "Defaults fqdn\n"},
	} {
		t.Run(name, func(t *testing.T) { testSudoPassword(t, test) })
	}
}

func testSudoPassword(t *testing.T, o serverOptions) {
	w := newWorld(t)
	s := w.server(serverOptions{script: o.script, sudoers: o.sudoers + "root ALL=(ALL) ALL\ndeploy ALL=(root) NOPASSWD: /usr/bin/cat\ndeploy ALL=(ALL:ALL) PASSWD: /usr/bin/tac, /usr/bin/id, /usr/bin/sh\nother ALL=(ALL:ALL) ALL"})
	c := s.config()
	c.SudoPassword = password
	link := func(user string) *sshlink.Link {
		c := c
		c.User = user
		return w.link(c)
	}
	for _, user := range []string{"deploy", "other"} { // bash, dash
		l := link(user)
		for range 2 { // before and after the password is known to be right
			if out := w.run(l, sshlink.Command{Args: []string{"id", "-u"}, Root: true}); out != "0\n" {
				t.Errorf("%s: found %q", user, out)
			}
			// The program gets its input, and only that, whether sudo asks for the password or not.
			for _, program := range []string{"cat", "tac"} {
				in := strings.Repeat("a line of some length, so that a pipe is full in between\n", 15000)
				if out := w.run(l, sshlink.Command{Args: []string{program}, Root: true, Stdin: strings.NewReader(in)}); out != in {
					t.Errorf("%s: %s: found %d bytes, expected %d", user, program, len(out), len(in))
				}
				if out := w.run(l, sshlink.Command{Shell: "gzip -dc | asroot " + program + "; echo code $?", Root: true, Stdin: strings.NewReader(gzipped(t, in))}); out != in+"code 0\n" {
					t.Errorf("%s: %s behind gzip: found %d bytes, expected %d", user, program, len(out), len(in))
				}
				if out := w.run(l, sshlink.Command{Shell: "head -c 5 >/dev/null; asroot " + program, Root: true, Stdin: strings.NewReader("firstsecond\n")}); out != "second\n" {
					t.Errorf("%s: %s behind head: found %q", user, program, out)
				}
			}
		}
		_, err := l.Run(w.ctx, sshlink.Command{Args: []string{"sh", "-c", "echo out; echo sorry >&2; exit 5"}, Root: true})
		if e := as[*sshlink.CommandError](t, err); e.Code != 5 || !strings.HasSuffix(e.Stderr, "sorry") {
			t.Errorf("%s: found %#v", user, e)
		}
		// A conversation: each side waits for the other. That the program ends is noticed while its input is open.
		p, err := l.Start(w.ctx, sshlink.Command{Args: []string{"sh", "-c", "id -u; read -r line; echo got $line"}, Root: true})
		must(t, err)
		first := make([]byte, 2)
		if _, err := io.ReadFull(p.Stdout, first); err != nil || string(first) != "0\n" {
			t.Fatalf("%s: found %q (%v)", user, first, err)
		}
		_, err = io.WriteString(p.Stdin, "that\n")
		must(t, err)
		out, err := io.ReadAll(p.Stdout)
		must(t, err)
		must(t, p.Wait())
		if string(out) != "got that\n" {
			t.Errorf("%s: found %q", user, out)
		}
		if seen := s.running("sudo"); len(seen) > 0 {
			t.Errorf("%s: sudo is still running", user)
		}
	}

	// The login's password is sudo's unless that has one.
	c.SudoPassword, c.Password, c.User = "", password, "other"
	if out := w.run(w.link(c), sshlink.Command{Args: []string{"id", "-u"}, Root: true}); out != "0\n" {
		t.Errorf("found %q", out)
	}

	// A wrong one is tried once, and nothing of the program's input in its place.
	c.Password = "wrong"
	l := w.link(c)
	_, err := l.Run(w.ctx, sshlink.Command{Args: []string{"cat"}, Root: true, Stdin: strings.NewReader(password + "\n")})
	if e := as[*sshlink.SudoError](t, err); e.Problem != sshlink.SudoWrongPassword {
		t.Errorf("found %#v", e)
	}
	contains(t, err, "sudo did not accept the password", "hint: sudo_password (or, where that is not set, password)")
	if strings.Contains(withHint(err), "wrong\n") || strings.Contains(withHint(err), password) {
		t.Errorf("a password is in %v", err)
	}
	if log := s.file("/run/sudo.log"); strings.Count(log, "incorrect password attempt") != 1 || !strings.Contains(log, "1 incorrect password attempt") {
		t.Errorf("found in sudo's log:\n%s", log)
	}

	// What the account may not do at all.
	c.Password, c.User = password, "deploy"
	_, err = w.link(c).Run(w.ctx, sshlink.Command{Args: []string{"head"}, Root: true})
	if e := as[*sshlink.SudoError](t, err); e.Problem != sshlink.SudoNotAllowed {
		t.Errorf("found %#v", e)
	}
	contains(t, err, "sudo does not allow it: ", "Sorry, user deploy is not allowed to execute '/usr/bin/head' as root", "hint: deploy needs a line for this command in /etc/sudoers.d, word for word (sudo -l -U deploy")
}

func TestSudo_passwordIsNowhereToBeSeen(t *testing.T) {
	w := newWorld(t)
	s := w.server(serverOptions{sudoers: "other ALL=(ALL:ALL) ALL"})
	c := s.config()
	c.User, c.SudoPassword = "other", password
	out := w.run(w.link(c), sshlink.Command{Root: true, Shell: "asroot sh -c 'cat /proc/[0-9]*/cmdline /proc/[0-9]*/environ; env' </dev/null; set | grep -v ^asroot_password=; env"})
	if strings.Contains(out, password) || !strings.Contains(out, "sudo") {
		t.Errorf("found %q", out)
	}
}

func TestSudo_unusable(t *testing.T) {
	w := newWorld(t)
	for name, test := range map[string]struct {
		options  serverOptions
		problem  string
		password string
	}{
		"not installed":        {serverOptions{}, sshlink.SudoMissing, ""},
		"not in sudoers":       {serverOptions{}, sshlink.SudoNotAllowed, password},
		"not in sudoers, bare": {serverOptions{}, sshlink.SudoNeedsPassword, ""},
		"terminal":             {serverOptions{sudoers: "Defaults requiretty\ndeploy ALL=(ALL) NOPASSWD: ALL"}, sshlink.SudoNeedsTerminal, ""},
	} {
		t.Run(name, func(t *testing.T) {
			if name == "not installed" {
				// A directory of links to everything else takes the place of /usr/bin.
				test.options.script = "mkdir /run/bin /run/real; mount --bind /usr/bin /run/real; for f in /run/real/*; do n=${f##*/}; case $n in sudo) ;; *) ln -s $f /run/bin/$n ;; esac; done; mount --bind /run/bin /usr/bin"
			}
			s := w.server(test.options)
			c := s.config()
			c.SudoPassword = test.password
			l := w.link(c)
			_, err := l.Run(w.ctx, sshlink.Command{Args: []string{"id"}, Root: true})
			if e := as[*sshlink.SudoError](t, err); e.Problem != test.problem {
				t.Errorf("found %v, expected %s", withHint(err), test.problem)
			}
			contains(t, err, "hint: ", `The guide "SSH and sudo" has the lines.`)
			p, err := l.Start(w.ctx, sshlink.Command{Args: []string{"cat"}, Root: true})
			must(t, err)
			// sudo refuses while the caller still waits for an answer.
			out, err := io.ReadAll(p.Stdout)
			if err != nil || len(out) > 0 {
				t.Errorf("found %q (%v)", out, err)
			}
			_ = as[*sshlink.SudoError](t, p.Wait())
			p.Stop(time.Second)
		})
	}
}
