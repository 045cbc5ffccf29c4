//go:build linux

package sshlink_test

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os/exec"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"testing/iotest"
	"time"

	"github.com/pgark/terraform-provider-pgark/internal/engine/guest/sshlink"
)

func FuzzQuote(f *testing.F) {
	for _, s := range []string{"", "plain", "two words", "it's", `"`, "$HOME `id` $(id)", "a\nb", "\\", "~", "-n", "*", "!!", "#", "ü", "\xff", "a=b", "'''", "\r\t"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, word string) {
		if strings.ContainsRune(word, 0) {
			return // no argument can have it
		}
		for _, shell := range []string{"dash", "bash"} {
			out, err := exec.CommandContext(t.Context(), shell, "-c", "printf '%s|' "+sshlink.Quote(word)+" end").Output()
			if err != nil || string(out) != word+"|end|" {
				t.Errorf("%s: found %q (%v), expected %q", shell, out, err, word)
			}
		}
	})
}

func TestRun_argumentsArriveAsTheyAre(t *testing.T) {
	w := newWorld(t)
	s := w.server(serverOptions{})
	for _, user := range []string{"root", "deploy", "other"} {
		c := s.config()
		c.User = user
		words := []string{"it's", "$HOME `id`", "a\nb", "", "*", "-n", `back\slash`, "ü\xff"}
		out := w.run(w.link(c), sshlink.Command{Args: append([]string{"printf", `%s\n|`}, words...)})
		if expected := strings.Join(words, "\n|") + "\n|"; out != expected {
			t.Errorf("%s: found %q, expected %q", user, out, expected)
		}
	}
}

func TestRun_outcomes(t *testing.T) {
	w := newWorld(t)
	s := w.server(serverOptions{})
	l := w.link(s.config())

	_, err := l.Run(w.ctx, sshlink.Command{Shell: "echo out; echo first >&2; printf second >&2; exit 7"})
	if e := as[*sshlink.CommandError](t, err); e.Code != 7 || e.Stderr != "first\nsecond" || e.Host != l.String() || e.Signal != "" {
		t.Errorf("found %#v", e)
	}
	contains(t, err, "deploy@"+s.address()+": ", "exit code 7: first\nsecond")

	_, err = l.Run(w.ctx, sshlink.Command{Shell: "kill -SEGV $$"})
	if e := as[*sshlink.CommandError](t, err); e.Signal != "SEGV" || e.Code != 128+int(syscall.SIGSEGV) {
		t.Errorf("found %#v", e)
	}

	_, err = l.Run(w.ctx, sshlink.Command{Args: []string{"/no/such/program"}})
	if e := as[*sshlink.CommandError](t, err); e.Code != 127 || !strings.Contains(e.Stderr, "not found") {
		t.Errorf("found %#v", e)
	}

	_, err = l.Run(w.ctx, sshlink.Command{Shell: "i=0; while [ $i -lt 3000 ]; do echo line $i >&2; i=$((i+1)); done; exit 1"})
	if e := as[*sshlink.CommandError](t, err); len(e.Stderr) > 8<<10 || !strings.HasSuffix(e.Stderr, "line 2999") {
		t.Errorf("found %d bytes of standard error, ending in %q", len(e.Stderr), e.Stderr[max(0, len(e.Stderr)-20):])
	}

	_, err = l.Run(w.ctx, sshlink.Command{Shell: "head -c 1048577 /dev/zero"})
	contains(t, err, "it printed more than 1048576 bytes")
	began := time.Now()
	_, err = l.Run(w.ctx, sshlink.Command{Args: []string{"yes"}})
	contains(t, err, "yes: it printed more than 1048576 bytes")
	if out := w.run(l, sshlink.Command{Shell: "head -c 1048576 /dev/zero"}); len(out) != 1<<20 {
		t.Errorf("found %d bytes, expected 1 MiB", len(out))
	}
	w.eventually("yes has ended", func() bool { return len(s.running("yes")) == 0 })
	if d := time.Since(began); d > 10*time.Second {
		t.Errorf("ending a command that prints too much took %s", d)
	}

	reader := io.MultiReader(strings.NewReader("half"), iotest.ErrReader(errors.New("the disk is gone")))
	_, err = l.Run(w.ctx, sshlink.Command{Shell: "cat; sleep 4711", Stdin: reader})
	contains(t, err, "read its input: the disk is gone")

	if _, err = l.Run(w.ctx, sshlink.Command{Args: []string{"echo", "a\x00b"}}); err == nil {
		t.Error("an argument with a NUL byte was taken")
	}

	c := s.config()
	c.User = "locked"
	_, err = w.link(c).Run(w.ctx, sshlink.Command{Args: []string{"true"}})
	contains(t, err, "login shell ran nothing of it")

	if out := w.run(l, sshlink.Command{Args: []string{"cat"}}); out != "" {
		t.Errorf("found %q, expected the end of the input", out)
	}
	// A command that ends before its input does has done what it wanted.
	if out := w.run(l, sshlink.Command{Args: []string{"head", "-c", "3"}, Stdin: strings.NewReader(strings.Repeat("abc", 4<<20))}); out != "abc" {
		t.Errorf("found %q", out)
	}
}

func TestRun_bigInput(t *testing.T) {
	w := newWorld(t)
	l := w.link(w.server(serverOptions{}).config())
	data := make([]byte, 24<<20)
	for i := range data {
		data[i] = byte(rand.Uint32())
	}
	expected := fmt.Sprintf("%x  -\n", sha256.Sum256(data))
	if out := w.run(l, sshlink.Command{Args: []string{"sha256sum"}, Stdin: bytes.NewReader(data)}); out != expected {
		t.Errorf("found %s, expected %s", out, expected)
	}
}

func TestStart_bothWays(t *testing.T) {
	w := newWorld(t)
	l := w.link(w.server(serverOptions{}).config())
	p, err := l.Start(w.ctx, sshlink.Command{Args: []string{"cat"}})
	must(t, err)
	// Talking: what is written comes back before the input ends.
	for _, word := range []string{"hello\n", "again\n"} {
		_, err := io.WriteString(p.Stdin, word)
		must(t, err)
		got := make([]byte, len(word))
		if _, err := io.ReadFull(p.Stdout, got); err != nil || string(got) != word {
			t.Fatalf("found %q (%v), expected %q", got, err, word)
		}
	}
	const size = 64 << 20
	sent, got := sha256.New(), sha256.New()
	go func() {
		_, _ = io.Copy(io.MultiWriter(p.Stdin, sent), io.LimitReader(rand.NewChaCha8([32]byte{1}), size))
		_ = p.Stdin.Close()
	}()
	n, err := io.Copy(got, p.Stdout)
	must(t, err)
	must(t, p.Wait())
	if n != size || !bytes.Equal(sent.Sum(nil), got.Sum(nil)) {
		t.Errorf("found %d bytes with another digest, expected %d", n, size)
	}

	// A process that ends by itself tells how.
	p, err = l.Start(w.ctx, sshlink.Command{Shell: "read -r line; echo got $line; echo sorry >&2; exit 3"})
	must(t, err)
	_, err = io.WriteString(p.Stdin, "x\n")
	must(t, err)
	out, err := io.ReadAll(p.Stdout)
	must(t, err)
	if e := as[*sshlink.CommandError](t, p.Wait()); string(out) != "got x\n" || e.Code != 3 || e.Stderr != "sorry" {
		t.Errorf("found %q, %#v", out, e)
	}
}

func TestStop(t *testing.T) {
	w := newWorld(t)
	s := w.server(serverOptions{})
	l := w.link(s.config())
	heeds, err := l.Start(w.ctx, sshlink.Command{Args: []string{"cat"}})
	must(t, err)
	heeds.Stop(time.Minute)
	must(t, heeds.Wait())

	ignores, err := l.Start(w.ctx, sshlink.Command{Shell: "trap '' TERM HUP; sleep 471101; sleep 471102"})
	must(t, err)
	w.eventually("the process runs", func() bool { return len(s.running("sleep 4711")) > 0 })
	ignores.Stop(10 * time.Millisecond)
	if e := as[*sshlink.CommandError](t, ignores.Wait()); e.Signal != "KILL" {
		t.Errorf("found %#v, expected it to be killed", e)
	}
	w.eventually("the process has ended", func() bool { return len(s.running("sleep 4711")) == 0 })
	w.run(l, sshlink.Command{Args: []string{"true"}}) // the connection stands
}

func TestCancel_endsTheCommand(t *testing.T) {
	w := newWorld(t)
	s := w.server(serverOptions{sudoers: "deploy ALL=(root) NOPASSWD: ALL\nother ALL=(root) ALL"})
	for i, test := range []struct {
		name, user, password string
		command              sshlink.Command
	}{
		{"root, whom sshd signals nothing", "root", "", sshlink.Command{Args: []string{"sleep", "SECONDS"}}},
		{"account", "deploy", "", sshlink.Command{Args: []string{"sleep", "SECONDS"}}},
		{"in a script with children", "deploy", "", sshlink.Command{Shell: "sleep SECONDS | sleep SECONDS; true"}},
		{"by sudo", "deploy", "", sshlink.Command{Args: []string{"sleep", "SECONDS"}, Root: true}},
		{"by sudo with a password", "other", password, sshlink.Command{Args: []string{"sleep", "SECONDS"}, Root: true}},
		{"that ignores SIGTERM, by sudo", "deploy", "", sshlink.Command{Args: []string{"sh", "-c", "trap '' TERM; sleep SECONDS; sleep SECONDS"}, Root: true}},
	} {
		t.Run(test.name, func(t *testing.T) {
			seconds := strconv.Itoa(471200 + i)
			test.command.Shell = strings.ReplaceAll(test.command.Shell, "SECONDS", seconds)
			for j := range test.command.Args {
				test.command.Args[j] = strings.ReplaceAll(test.command.Args[j], "SECONDS", seconds)
			}
			c := s.config()
			c.User, c.SudoPassword = test.user, test.password
			l := w.link(c)
			cause := errors.New("nobody wants it any more")
			ctx, cancel := context.WithCancelCause(w.ctx)
			ran := make(chan error, 1)
			go func() {
				_, err := l.Run(ctx, test.command)
				ran <- err
			}()
			sleeps := func() bool { return len(s.running("sleep "+seconds)) > 0 }
			w.eventually("it runs", sleeps)
			began := time.Now()
			cancel(cause)
			if err := <-ran; !errors.Is(err, cause) {
				t.Errorf("found error %v, expected the context's cause", err)
			}
			t.Logf("ended in %s", time.Since(began))
			w.eventually("nothing of it runs", func() bool { return !sleeps() })
			if d := time.Since(began); d > 12*time.Second {
				t.Errorf("it took %s", d)
			}
			w.run(l, sshlink.Command{Args: []string{"true"}}) // the connection stands
		})
	}
}

func TestRun_fourAtATime(t *testing.T) {
	w := newWorld(t)
	s := w.server(serverOptions{})
	l := w.link(s.config())
	dir := strings.TrimSpace(w.run(l, sshlink.Command{Shell: "mktemp -d ~/four.XXXXXX"}))
	var all sync.WaitGroup
	for i := range 12 {
		all.Add(1)
		go func() {
			defer all.Done()
			out, err := l.Run(w.ctx, sshlink.Command{Shell: fmt.Sprintf("mkdir %s/%d && ls %[1]s | wc -l && sleep 0.2 && rmdir %[1]s/%[2]d", dir, i)})
			if n, _ := strconv.Atoi(strings.TrimSpace(string(out))); err != nil || n < 1 || n > 4 {
				t.Errorf("found %s at a time (%v), expected at most 4", out, err)
			}
		}()
	}
	all.Wait()

	var held []*sshlink.Process
	for range 4 {
		p, err := l.Start(w.ctx, sshlink.Command{Args: []string{"cat"}})
		must(t, err)
		held = append(held, p)
	}
	ctx, cancel := context.WithTimeout(w.ctx, 50*time.Millisecond)
	defer cancel()
	if _, err := l.Run(ctx, sshlink.Command{Args: []string{"true"}}); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("a fifth command: found %v, expected it to wait", err)
	}
	// Each of the four can be ended, which takes a session beside them.
	for _, p := range held {
		p.Stop(time.Second)
		must(t, p.Wait())
	}
	w.run(l, sshlink.Command{Args: []string{"true"}})
}
