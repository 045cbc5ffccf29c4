//go:build linux

package main

import (
	"bytes"
	"context"
	"debug/elf"
	"errors"
	"fmt"
	"hash/fnv"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/spf13/pflag"

	"github.com/pgark/terraform-provider-pgark/internal/engine/daemon/control"
	"github.com/pgark/terraform-provider-pgark/internal/engine/job"
)

// clients are the runner as it is deployed, whose small client answers, and the runner without C.
var clients = map[string]string{}

func TestMain(m *testing.M) {
	dir, err := os.MkdirTemp("", "pgark-client-")
	if err != nil {
		panic(err)
	}
	code := 1
	if err := buildClients(dir); err != nil {
		fmt.Fprintf(os.Stderr, "build the runner: %v\n", err)
	} else {
		code = m.Run()
	}
	_ = os.RemoveAll(dir)
	os.Exit(code)
}

func buildClients(dir string) error {
	for name, cmd := range map[string]*exec.Cmd{
		"C":  exec.CommandContext(context.Background(), "bash", "build.sh", runtime.GOARCH, filepath.Join(dir, "C")),
		"Go": exec.CommandContext(context.Background(), "go", "build", "-o", filepath.Join(dir, "Go"), "."),
	} {
		if name == "Go" {
			cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
		}
		if out, err := cmd.CombinedOutput(); err != nil {
			return fmt.Errorf("%w\n%s", err, out)
		}
		clients[name] = filepath.Join(dir, name)
	}
	return nil
}

// asked is a server, and what it was asked.
type asked struct {
	mu       sync.Mutex
	requests []control.Request
}

func (a *asked) all() []control.Request {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.requests
}

// serve answers on socket until the test ends.
func serve(t *testing.T, socket string, answer func(ctx context.Context, n int, r control.Request) control.Answer) *asked {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(socket), 0o700); err != nil {
		t.Fatal(err)
	}
	l, err := control.Listen(socket)
	if err != nil {
		t.Fatal(err)
	}
	a := &asked{}
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	wg.Go(func() {
		if err := control.Serve(ctx, l, func(ctx context.Context, r control.Request, _ func(string) error) control.Answer {
			a.mu.Lock()
			a.requests = append(a.requests, r)
			n := len(a.requests)
			a.mu.Unlock()
			return answer(ctx, n, r)
		}); err != nil {
			t.Error(err)
		}
	})
	t.Cleanup(func() {
		cancel()
		l.Close()
		wg.Wait()
	})
	return a
}

func say(a control.Answer) func(context.Context, int, control.Request) control.Answer {
	return func(context.Context, int, control.Request) control.Answer { return a }
}

// call is one call of a client.
type call struct {
	dir  string   // working directory
	env  []string // beside that of the test
	args []string
	kill os.Signal   // sent once when is true
	when func() bool // asked again and again
}

// run returns the exit code, or minus the signal that ended the client, and what it wrote.
func (c call) run(t *testing.T, binary string) (code int, stdout, stderr string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	cmd := exec.CommandContext(ctx, binary, c.args...)
	cmd.Dir = c.dir
	cmd.Env = append([]string{"HOME=/nonexistent"}, c.env...)
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	if c.kill != nil {
		for !c.when() && ctx.Err() == nil {
			time.Sleep(time.Millisecond)
		}
		if err := cmd.Process.Signal(c.kill); err != nil {
			t.Error(err)
		}
	}
	err := cmd.Wait()
	if err != nil && !errors.As(err, new(*exec.ExitError)) || ctx.Err() != nil {
		t.Fatal(err, ctx.Err())
	}
	if st, ok := cmd.ProcessState.Sys().(syscall.WaitStatus); ok && st.Signaled() {
		return -int(st.Signal()), out.String(), errs.String()
	}
	return cmd.ProcessState.ExitCode(), out.String(), errs.String()
}

func forEachClient(t *testing.T, run func(t *testing.T, name, binary string)) {
	for name, binary := range clients {
		t.Run(name, func(t *testing.T) { run(t, name, binary) })
	}
}

// directory is a temporary one whose name is short enough for a socket in it, whatever the test is called.
func directory(t testing.TB) string {
	t.Helper()
	base := os.TempDir()
	if len(base) > 40 {
		base = "/tmp"
	}
	dir, err := os.MkdirTemp(base, "pgark") //nolint:usetesting // t.TempDir is long
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	})
	return dir
}

// deployed makes a layout with a job file in it.
func deployed(t *testing.T, root string) job.Layout {
	t.Helper()
	l := job.Layout{Root: root}
	if err := os.MkdirAll(l.JobsDirectory(), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(l.JobFile("orders"), []byte("{}"), 0o600); err != nil {
		t.Fatal(err)
	}
	return l
}

const segment = "000000010000000000000007"

func TestStatic(t *testing.T) {
	f, err := elf.Open(clients["C"])
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	for _, p := range f.Progs {
		if p.Type == elf.PT_INTERP || p.Type == elf.PT_DYNAMIC {
			t.Errorf("found a %v segment: it would need a C library of the guest's", p.Type)
		}
	}
	for _, s := range f.Sections {
		if s.Name == ".note.gnu.build-id" {
			t.Error("found a build id")
		}
	}
	for name, binary := range clients {
		if code, out, _ := (call{args: []string{"version"}}).run(t, binary); code != 0 || !strings.HasPrefix(out, "pgark "+version) {
			t.Errorf("%s: version: exit %d, %q", name, code, out)
		}
	}
}

// TestPush checks that both clients do the same, and that the small one does the usual by itself.
func TestPush(t *testing.T) {
	usual := []string{"wal", "push", "--job", "orders", "--instance", "15-main", "pg_wal/" + segment}
	for what, test := range map[string]struct {
		args   []string
		answer func(ctx context.Context, n int, r control.Request) control.Answer
		code   int
		stderr string // "": nothing
		path   string // that the server is asked for, relative to the data directory; "": that of usual
		small  int    // requests of the small client
		full   int    // requests that then follow
	}{
		"stored":     {args: usual, answer: say(control.Answer{OK: true}), small: 1},
		"with =":     {args: []string{"wal", "push", "--instance=15-main", "--job=orders", "pg_wal/" + segment}, answer: say(control.Answer{OK: true}), small: 1},
		"path first": {args: []string{"wal", "push", "pg_wal/" + segment, "--job", "orders", "--instance", "15-main"}, answer: say(control.Answer{OK: true}), small: 1},
		"refused":    {args: usual, answer: say(control.Answer{Error: "it failed"}), code: 1, stderr: "pgark: it failed\n", small: 1},
		"refused, with a hint": {args: usual, answer: say(control.Answer{Error: "it failed", Hint: "try again"}), code: 1,
			stderr: "pgark: it failed (hint: try again)\n", small: 1},
		"refused, at length": {args: usual, answer: say(control.Answer{Error: strings.Repeat("long ", 5000)}), code: 1,
			stderr: "pgark: " + strings.Repeat("long ", 5000) + "\n", small: 1, full: 1},
		"being restarted": {args: usual, answer: func(_ context.Context, n int, _ control.Request) control.Answer {
			return control.Answer{OK: n > 3, Again: n <= 3, Error: "it stops"}
		}, small: 1, full: 3},
		"a space":     {args: []string{"wal", "push", "--job", "orders", "--instance", "15-main", "pg wal/" + segment}, answer: say(control.Answer{OK: true}), path: "pg wal/" + segment, small: 1},
		"a quote":     {args: []string{"wal", "push", "--job", "orders", "--instance", "15-main", `a"b/` + segment}, answer: say(control.Answer{OK: true}), path: `a"b/` + segment, full: 1},
		"a backslash": {args: []string{"wal", "push", "--job", "orders", "--instance", "15-main", `a\b/` + segment}, answer: say(control.Answer{OK: true}), path: `a\b/` + segment, full: 1},
		"a line":      {args: []string{"wal", "push", "--job", "orders", "--instance", "15-main", "a\nb/" + segment}, answer: say(control.Answer{OK: true}), path: "a\nb/" + segment, full: 1},
		"an umlaut":   {args: []string{"wal", "push", "--job", "orders", "--instance", "15-main", "ä/" + segment}, answer: say(control.Answer{OK: true}), path: "ä/" + segment, full: 1},
		"dots":        {args: []string{"wal", "push", "--job", "orders", "--instance", "15-main", "./x/../pg_wal//" + segment}, answer: say(control.Answer{OK: true}), full: 1},
		"no path": {args: []string{"wal", "push", "--job", "orders", "--instance", "15-main"}, answer: say(control.Answer{OK: true}), code: 2,
			stderr: "pgark: wal push: usage: pgark wal push --job JOB --instance INSTANCE PATH\n"},
		"two paths": {args: append([]string{"wal", "push", "a"}, usual[2:]...), answer: say(control.Answer{OK: true}), code: 2,
			stderr: "pgark: wal push: unexpected argument \"pg_wal/" + segment + "\"; usage: pgark wal push --job JOB --instance INSTANCE PATH\n"},
		"another flag": {args: append([]string{"wal", "push", "--force"}, usual[2:]...), answer: say(control.Answer{OK: true}), code: 2,
			stderr: "pgark: wal push: unexpected argument \"--force\"; usage: pgark wal push --job JOB --instance INSTANCE PATH\n"},
		"a job that is a path": {args: []string{"wal", "push", "--job", "x/../orders", "--instance", "15-main", "pg_wal/" + segment}, answer: say(control.Answer{OK: true}), full: 1},
	} {
		t.Run(what, func(t *testing.T) {
			forEachClient(t, func(t *testing.T, name, binary string) {
				root, data := directory(t), directory(t)
				l := deployed(t, root)
				if err := os.Mkdir(filepath.Join(l.JobsDirectory(), "x"), 0o700); err != nil {
					t.Fatal(err)
				}
				server := serve(t, l.Socket("orders", "15-main"), test.answer)
				code, stdout, stderr := call{dir: data, env: []string{"PGARK_ROOT=" + root}, args: test.args}.run(t, binary)
				if code != test.code || stderr != test.stderr || stdout != "" {
					t.Errorf("exit %d, %q, %q; expected %d, %q", code, stderr, stdout, test.code, test.stderr)
				}
				path := test.path
				if path == "" {
					path = "pg_wal/" + segment
				}
				small, full := 0, 0
				for _, r := range server.all() {
					if r.Op != control.OpPush || r.Path != filepath.Join(data, path) {
						t.Errorf("asked %+v, expected push of %s", r, filepath.Join(data, path))
					}
					if r.Plain {
						small++
					} else {
						full++
					}
				}
				expect := [2]int{test.small, test.full}
				if name == "Go" {
					expect = [2]int{0, test.full}
					if test.small > 0 && (test.full == 0 || what == "being restarted") {
						expect[1] += test.small
					}
				}
				if got := [2]int{small, full}; got != expect {
					t.Errorf("asked %d times by the small client and %d by the other, expected %v", small, full, expect)
				}
			})
		})
	}
}

func TestPush_places(t *testing.T) {
	push := []string{"wal", "push", "--job", "orders", "--instance", "15-main", "pg_wal/" + segment}
	forEachClient(t, func(t *testing.T, name, binary string) {
		t.Run("below the root that it was deployed to", func(t *testing.T) {
			root, data := directory(t), directory(t)
			l := deployed(t, root)
			there := filepath.Join(l.BinaryDirectory("abc"), "pgark")
			if err := errors.Join(os.MkdirAll(filepath.Dir(there), 0o700), os.MkdirAll(filepath.Dir(l.BinaryLink()), 0o700),
				os.Link(binary, there), os.Symlink(there, l.BinaryLink())); err != nil {
				t.Fatal(err)
			}
			server := serve(t, l.Socket("orders", "15-main"), say(control.Answer{OK: true}))
			if code, _, stderr := (call{dir: data, args: push}).run(t, l.BinaryLink()); code != 0 {
				t.Errorf("exit %d: %s", code, stderr)
			}
			if got := server.all(); len(got) != 1 || got[0].Plain != (name == "C") || got[0].Path != filepath.Join(data, "pg_wal", segment) {
				t.Errorf("asked %+v", got)
			}
		})
		t.Run("a socket whose name is too long", func(t *testing.T) {
			root := filepath.Join(directory(t), strings.Repeat("r", 100))
			server := serve(t, deployed(t, root).Socket("orders", "15-main"), say(control.Answer{OK: true}))
			if code, _, stderr := (call{dir: directory(t), env: []string{"PGARK_ROOT=" + root}, args: push}).run(t, binary); code != 0 || len(server.all()) != 1 {
				t.Errorf("exit %d, asked %+v: %s", code, server.all(), stderr)
			}
		})
		t.Run("an absolute path", func(t *testing.T) {
			root := directory(t)
			server := serve(t, deployed(t, root).Socket("orders", "15-main"), say(control.Answer{OK: true}))
			args := append(push[:len(push)-1:len(push)-1], "/data/pg_wal/"+segment)
			code, _, stderr := call{dir: "/", env: []string{"PGARK_ROOT=" + root + "/"}, args: args}.run(t, binary)
			if got := server.all(); code != 0 || len(got) != 1 || got[0].Path != "/data/pg_wal/"+segment {
				t.Errorf("exit %d, asked %+v: %s", code, got, stderr)
			}
		})
	})
}

// TestPush_withoutAnAnswer: the small client leaves patience and its limits to the other.
func TestPush_withoutAnAnswer(t *testing.T) {
	push := []string{"wal", "push", "--job", "orders", "--instance", "15-main", "pg_wal/" + segment}
	forEachClient(t, func(t *testing.T, name, binary string) {
		t.Run("nobody, and no job", func(t *testing.T) {
			root := directory(t)
			code, _, stderr := call{dir: directory(t), env: []string{"PGARK_ROOT=" + root}, args: push}.run(t, binary)
			expect := "pgark: store wal " + segment + ": no runner answers on " + root + "/run/pgark/orders/15-main.sock: no such file or directory; PostgreSQL keeps the file and asks again\n"
			if code != 1 || stderr != expect {
				t.Errorf("exit %d, %q; expected 1, %q", code, stderr, expect)
			}
		})
		t.Run("a socket that was left, and a runner that comes", func(t *testing.T) {
			root := directory(t)
			l := deployed(t, root)
			socket := l.Socket("orders", "15-main")
			if err := os.MkdirAll(filepath.Dir(socket), 0o700); err != nil {
				t.Fatal(err)
			}
			left, err := new(net.ListenConfig).Listen(t.Context(), "unix", socket)
			if err != nil {
				t.Fatal(err)
			}
			if u, ok := left.(*net.UnixListener); ok {
				u.SetUnlinkOnClose(false)
			}
			left.Close()
			var server *asked
			c := call{dir: directory(t), env: []string{"PGARK_ROOT=" + root}, args: push}
			came := make(chan struct{})
			go func() {
				defer close(came)
				time.Sleep(200 * time.Millisecond)
				server = serve(t, socket, say(control.Answer{OK: true}))
			}()
			code, _, stderr := c.run(t, binary)
			<-came
			if code != 0 || len(server.all()) != 1 {
				t.Errorf("exit %d, asked %+v: %s", code, server.all(), stderr)
			}
		})
		for what, answer := range map[string]string{"one who hangs up": "", "one who speaks otherwise": "maybe\n", "one who hangs up amid the line": "o", "a runner from before": "{\"ok\":true}\n"} {
			t.Run(what, func(t *testing.T) {
				root := directory(t)
				socket := deployed(t, root).Socket("orders", "15-main")
				if err := os.MkdirAll(filepath.Dir(socket), 0o700); err != nil {
					t.Fatal(err)
				}
				l, err := new(net.ListenConfig).Listen(t.Context(), "unix", socket)
				if err != nil {
					t.Fatal(err)
				}
				times := 0
				var wg sync.WaitGroup
				wg.Go(func() {
					for {
						conn, err := l.Accept()
						if err != nil {
							return
						}
						b := make([]byte, 4096)
						n, _ := conn.Read(b)
						if times++; !bytes.Contains(b[:n], []byte(`"plain"`)) {
							answer = `{"ok":true}` + "\n"
						}
						_, _ = conn.Write([]byte(answer))
						conn.Close()
					}
				})
				code, _, stderr := call{dir: directory(t), env: []string{"PGARK_ROOT=" + root}, args: push}.run(t, binary)
				l.Close()
				wg.Wait()
				if expect := map[string]int{"C": 2, "Go": 1}[name]; code != 0 || times != expect || stderr != "" {
					t.Errorf("exit %d after %d times, expected 0 after %d: %s", code, times, expect, stderr)
				}
			})
		}
		for signal, expect := range map[syscall.Signal]int{syscall.SIGINT: 1, syscall.SIGTERM: -int(syscall.SIGTERM)} {
			t.Run(signal.String(), func(t *testing.T) {
				root := directory(t)
				server := serve(t, deployed(t, root).Socket("orders", "15-main"), func(ctx context.Context, _ int, _ control.Request) control.Answer {
					<-ctx.Done()
					return control.Answer{OK: true}
				})
				code, _, stderr := call{
					dir: directory(t), env: []string{"PGARK_ROOT=" + root}, args: push,
					kill: signal, when: func() bool { return len(server.all()) > 0 },
				}.run(t, binary)
				if code != expect {
					t.Errorf("exit %d: %s; expected %d", code, stderr, expect)
				}
				if said := strings.HasPrefix(stderr, "pgark: store wal "+segment+": ") && strings.HasSuffix(stderr, "; PostgreSQL keeps the file and asks again\n"); said != (expect == 1) {
					t.Errorf("said %q", stderr)
				}
			})
		}
	})
}

// TestFetch checks restore_command as restore writes it, and as it is written by hand.
func TestFetch(t *testing.T) {
	for what, test := range map[string]struct {
		answer func(ring string) control.Answer
		path   string // PATH, default that of PostgreSQL
		code   int
		stderr string
		again  bool // the small client leaves it to the other
	}{
		"found":  {answer: func(ring string) control.Answer { return control.Answer{OK: true, Found: true, File: ring + "/file"} }},
		"absent": {answer: func(string) control.Answer { return control.Answer{OK: true} }, code: 1},
		"a gap": {answer: func(string) control.Answer { return control.Answer{Error: "a gap", Hint: "look"} }, code: 130,
			stderr: "pgark: a gap\n", again: true},
		"no place for it": {answer: func(ring string) control.Answer { return control.Answer{OK: true, Found: true, File: ring + "/file"} },
			path: "missing/RECOVERYXLOG", code: 130, stderr: "pgark: put wal " + segment + " in place: open missing/RECOVERYXLOG.pgark: no such file or directory\n", again: true},
		"a file that is gone": {answer: func(ring string) control.Answer { return control.Answer{OK: true, Found: true, File: ring + "/gone"} },
			code: 130, stderr: "pgark: put wal " + segment + " in place: open RING/gone: no such file or directory\n", again: true},
	} {
		t.Run(what, func(t *testing.T) {
			forEachClient(t, func(t *testing.T, name, binary string) {
				for _, detached := range []bool{false, true} {
					data := directory(t)
					path := "pg_wal/RECOVERYXLOG"
					if test.path != "" {
						path = test.path
					}
					if err := os.Mkdir(filepath.Join(data, "pg_wal"), 0o700); err != nil {
						t.Fatal(err)
					}
					flags := []string{"--repository=file:///backups", "--series", "orders/15-main", "--path-style", "--until-lsn=0/7000000"}
					ring := filepath.Join(data, "ring")
					if !detached {
						flags = append(flags, "--socket="+filepath.Join(ring, "socket"))
					} else if ring = filepath.Join(data, filepath.Dir(path), ringName(flags)); test.path != "" {
						continue // there is no ring where there is no directory
					}
					server := serve(t, filepath.Join(ring, "socket"), say(test.answer(ring)))
					if err := os.WriteFile(filepath.Join(ring, "file"), []byte("wal"), 0o600); err != nil {
						t.Fatal(err)
					}
					args := append(append([]string{"wal", "fetch"}, flags...), segment, path)
					code, stdout, stderr := call{dir: data, args: args}.run(t, binary)
					stderr, _, _ = strings.Cut(stderr, "hint: ")
					if code != test.code || strings.ReplaceAll(stderr, ring, "RING") != test.stderr || stdout != "" {
						t.Errorf("detached %v: exit %d, %q; expected %d, %q", detached, code, stderr, test.code, test.stderr)
					}
					b, err := os.ReadFile(filepath.Join(data, path))
					if (code == 0) != (err == nil && string(b) == "wal") {
						t.Errorf("detached %v: exit %d, and found %q, %v", detached, code, b, err)
					}
					got := server.all()
					expect := 1
					if name == "C" && test.again {
						expect = 2
					}
					if len(got) != expect || got[0].Name != segment || got[0].Plain != (name == "C") || got[len(got)-1].Plain != (name == "C" && !test.again) {
						t.Errorf("detached %v: asked %+v", detached, got)
					}
				}
			})
		})
	}
}

func TestFetch_nobody(t *testing.T) {
	forEachClient(t, func(t *testing.T, name, binary string) {
		data := directory(t)
		code, _, stderr := call{dir: data, args: []string{"wal", "fetch", "--socket", data + "/s", segment, "RECOVERYXLOG"}}.run(t, binary)
		if code != 130 || !strings.Contains(stderr, "no runner answers on "+data+"/s") {
			t.Errorf("exit %d: %s", code, stderr)
		}

		// After the one that served the restore comes the one that an earlier call left behind.
		flags := []string{"--job=orders", "--socket", data + "/s"}
		ring := filepath.Join(data, ringName(flags))
		server := serve(t, filepath.Join(ring, "socket"), say(control.Answer{OK: true}))
		args := append(append([]string{"wal", "fetch"}, flags...), segment, "RECOVERYXLOG")
		if code, _, stderr := (call{dir: data, args: args}).run(t, binary); code != 1 || stderr != "" || len(server.all()) != 1 || server.all()[0].Plain != (name == "C") {
			t.Errorf("exit %d, asked %+v: %s", code, server.all(), stderr)
		}

		// What anybody may have put there is not taken.
		if err := os.Chmod(ring, 0o755); err != nil {
			t.Fatal(err)
		}
		if code, _, stderr := (call{dir: data, args: args}).run(t, binary); code != 130 || !strings.Contains(stderr, "nobody else can enter") || len(server.all()) != 1 {
			t.Errorf("exit %d, asked %+v: %s", code, server.all(), stderr)
		}

		// Flags that it does not know, or that stand elsewhere.
		for _, odd := range [][]string{{"--never", segment, "x"}, {segment}, {segment, "x", "--socket", data + "/s"}, {"--socket", segment, "x"}} {
			if code, _, stderr := (call{dir: data, args: append([]string{"wal", "fetch"}, odd...)}).run(t, binary); code != 130 || stderr == "" {
				t.Errorf("%q: exit %d: %s", odd, code, stderr)
			}
		}
	})
}

// TestFetch_everyFlag: a flag that the small client does not know makes every call a slow one.
func TestFetch_everyFlag(t *testing.T) {
	data := directory(t)
	server := serve(t, filepath.Join(data, "s"), say(control.Answer{OK: true}))
	args := []string{"wal", "fetch"}
	newWALFetchCommand().Flags().VisitAll(func(f *pflag.Flag) {
		switch {
		case f.Name == "socket":
			args = append(args, "--socket", filepath.Join(data, "s"))
		case f.Name == "serve", f.Name == "ring", f.Name == "json": // not of restore_command
		case f.Value.Type() == "bool":
			args = append(args, "--"+f.Name)
		default:
			args = append(args, "--"+f.Name+"=1", "--"+f.Name, "1")
		}
	})
	code, _, stderr := call{dir: data, args: append(args, segment, "RECOVERYXLOG")}.run(t, clients["C"])
	if got := server.all(); code != 1 || len(got) != 1 || !got[0].Plain {
		t.Errorf("%q: exit %d, asked %+v: %s", args, code, got, stderr)
	}
}

// ringName is where the fetcher of a command line lives.
func ringName(flags []string) string {
	h := fnv.New64a()
	_, _ = h.Write([]byte(strings.Join(flags, "\x00") + "\x00"))
	return fmt.Sprintf(".pgark-fetch-%016x", h.Sum64())
}

// BenchmarkPush is one archive_command that finds its file stored.
func BenchmarkPush(b *testing.B) {
	for name, binary := range clients {
		b.Run(name, func(b *testing.B) {
			root := directory(b)
			socket := job.Layout{Root: root}.Socket("orders", "15-main")
			if err := os.MkdirAll(filepath.Dir(socket), 0o700); err != nil {
				b.Fatal(err)
			}
			l, err := control.Listen(socket)
			if err != nil {
				b.Fatal(err)
			}
			var wg sync.WaitGroup
			wg.Go(func() {
				_ = control.Serve(b.Context(), l, func(context.Context, control.Request, func(string) error) control.Answer {
					return control.Answer{OK: true}
				})
			})
			var used time.Duration
			for b.Loop() {
				cmd := exec.CommandContext(b.Context(), binary, "wal", "push", "--job", "orders", "--instance", "15-main", "pg_wal/"+segment)
				cmd.Env = []string{"PGARK_ROOT=" + root}
				if err := cmd.Run(); err != nil {
					b.Fatal(err)
				}
				used += cmd.ProcessState.UserTime() + cmd.ProcessState.SystemTime()
			}
			b.ReportMetric(float64(used.Microseconds())/float64(b.N), "µs-CPU/op")
			l.Close()
			wg.Wait()
		})
	}
}
