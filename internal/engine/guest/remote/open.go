package remote

import (
	"bytes"
	"compress/gzip"
	"context"
	"crypto/rand"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	mathrand "math/rand/v2"
	"path"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/pgark/terraform-provider-pgark/internal/engine/guest/sshlink"
	"github.com/pgark/terraform-provider-pgark/internal/engine/job"
)

const (
	// stagePrefix begins the names of directories that hold the runner on its way to a guest, and nothing else.
	stagePrefix = ".pgark-stage."
	// incoming is where root gets the runner from, below the library directory. Lines of sudoers name it.
	incoming = "incoming"
	// stageTries is how often the runner is brought to a guest before it is given up: who else brings another runner
	// to the same guest at the same moment replaces ours, or removes it.
	stageTries = 6
	// stagePause is the longest pause before the second try; it doubles with each.
	stagePause = 200 * time.Millisecond
	// stageSlack is the room that has to be left where the runner is unpacked.
	stageSlack = 1 << 20
)

// probe is what one look at a guest tells.
type probe struct {
	system, machine string // as uname prints them: "Linux", "x86_64"
	uid             int
	gzip            bool
	deployed        map[string]bool // digests of the runners that are there, and safe to run
	library         place           // the file system that the library directory is on, or would be
	places          []place         // in order of preference
}

// place is a directory that a file can be put in.
type place struct {
	path string // of library: where its file system is mounted
	exec bool   // what is in it can be run
	ro   bool   // of library: it is mounted so
	free int64  // bytes
}

// probeScript prints lines that begin with "pgark:". It needs a POSIX shell and leaves nothing.
const probeScript = `
LC_ALL=C; export LC_ALL
say() { printf 'pgark:%s\n' "$*"; }
say system "$(uname -s)" "$(uname -m)"
say uid "$(id -u)"
if command -v gzip >/dev/null 2>&1; then say gzip; fi
for d in "$lib"/*; do
	f=$d/pgark
	if [ -f "$f" ] && [ ! -L "$f" ] && [ ! -L "$d" ]; then
		set -- $(ls -ldn "$f") && file="$1 $3"
		set -- $(ls -ldn "$d") && say deployed "$file" "$1" "$3" "${d##*/}"
	fi
done
d=$lib
while [ -n "$d" ] && [ ! -d "$d" ]; do d=${d%/*}; done
set -- $(df -Pk "${d:-/}" 2>/dev/null | tail -n 1)
exec=exec
while read -r _ at _ options _; do
	if [ "$at" = "$6" ]; then
		case ,$options, in *,ro,*) exec=ro ;; *,noexec,*) exec=noexec ;; *) exec=exec ;; esac
	fi
done </proc/mounts
say library "$exec" "${4:-0}" "$6"
t=
trap 'if [ -n "$t" ]; then rm -rf "$t"; fi' EXIT
trap 'exit 1' HUP INT TERM PIPE
for d in "$HOME" /var/tmp /dev/shm "$XDG_RUNTIME_DIR" "$TMPDIR" /tmp; do
	case $d in /*) ;; *) continue ;; esac
	t=${d%/}/$name
	(umask 077 && mkdir "$t") 2>/dev/null || { t=; continue; }
	exec=noexec
	printf '#!/bin/sh\nexit 0\n' >"$t/try" 2>/dev/null && chmod 700 "$t/try" && "$t/try" 2>/dev/null && exec=exec
	set -- $(df -Pk "$t" 2>/dev/null | tail -n 1)
	rm -rf "$t"; t=
	say place "$exec" "${4:-0}" "$d"
done
`

// stageScript unpacks the first $size bytes of its input to a directory of its own, and starts what was in them: as
// root after install(1), or as it lies there. It reads no further: what follows is for the runner, and nobody sends that
// before the runner has spoken. If less comes, it removes what it has made.
const stageScript = `
LC_ALL=C; export LC_ALL
t=$place/$name
trap 'rm -rf "$t"' EXIT
trap 'exit 1' HUP INT TERM PIPE
(umask 077 && mkdir "$t") || exit 1
head -c "$size" | $unpack >"$t/pgark" || exit 98
set -- $(ls -ln "$t/pgark")
if [ "$5" != "$unpacked" ]; then
	echo "found $5 bytes of the runner, expected $unpacked: the upload was cut, or there is no room" >&2
	exit 98
fi
`

// notUnpacked is what the stageScript exits with if it did not get the runner whole.
const notUnpacked = 98

// stageAsRoot and stageAsUser end the stageScript. Once it runs, the runner removes its file; one that cannot run is
// removed here, where that takes no more than what sudo allows.
const (
	stageAsRoot = `
asroot /usr/bin/install -D -m 0755 /dev/stdin "$lib/incoming/pgark" <"$t/pgark" || exit
rm -rf "$t"
trap - EXIT HUP INT TERM PIPE
asroot $env "$lib/incoming/pgark" guest
code=$?
if [ "$code" -ne 0 ] && [ "$(id -u)" = 0 ]; then
	rm -f "$lib/incoming/pgark"
	rmdir "$lib/incoming" "$lib" 2>/dev/null
fi
exit "$code"
`
	stageAsUser = `
chmod 700 "$t/pgark" || exit 1
trap - EXIT HUP INT TERM PIPE
$env "$t/pgark" guest
code=$?
rm -rf "$t"
exit $code
`
)

// opener opens conversations with one guest.
type opener struct {
	o Options

	mu   sync.Mutex // guards arch
	arch string     // as Go names it; "" before the first probe
}

// architecture is that of the guest, as Go names it; "" while it is not known.
func (p *opener) architecture() string {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.arch
}

// library is where runners lie on the guest.
func (p *opener) library() string { return job.Layout{Root: p.o.Root}.LibDirectory() }

// environment is what stands before a runner to start it; "" on real guests. A runner that was
// deployed, or is incoming, finds its root by its own path, but not one that was staged elsewhere.
func (p *opener) environment() string {
	if p.o.Root == "" {
		return ""
	}
	return "env " + job.RootVariable + "=" + p.o.Root
}

// assign writes shell assignments, before a script.
func assign(script string, values ...string) string {
	var b strings.Builder
	for i := 0; i < len(values); i += 2 {
		b.WriteString(values[i] + "='" + strings.ReplaceAll(values[i+1], "'", `'\''`) + "'\n")
	}
	return b.String() + script
}

// stageName is a name that nobody guesses.
func stageName() string {
	var random [8]byte
	_, _ = rand.Read(random[:]) // never fails
	return stagePrefix + hex.EncodeToString(random[:])
}

// look makes the probe.
func (p *opener) look(ctx context.Context) (*probe, error) {
	out, err := p.o.Link.Run(ctx, sshlink.Command{
		Name: "a look at the guest", Shell: assign(probeScript, "lib", p.library(), "name", stageName()),
	})
	if err != nil {
		return nil, err
	}
	found, err := p.parseProbe(out)
	if err != nil {
		return nil, &StageError{Host: p.o.Link.String(), Step: "look at the guest", Err: err}
	}
	arch, ok := map[string]string{"x86_64": "amd64", "aarch64": "arm64"}[found.machine]
	if found.system != "Linux" || !ok {
		return nil, &UnsupportedError{Host: p.o.Link.String(), Found: found.system + " on " + found.machine}
	}
	p.mu.Lock()
	p.arch = arch
	p.mu.Unlock()
	return found, nil
}

func (p *opener) parseProbe(out []byte) (*probe, error) {
	found := &probe{uid: -1, deployed: map[string]bool{}}
	for line := range strings.Lines(string(out)) {
		line, ok := strings.CutPrefix(strings.TrimRight(line, "\r\n"), "pgark:")
		if !ok {
			continue // what the account's shell has to say
		}
		kind, rest, _ := strings.Cut(line, " ")
		fields := strings.Fields(rest)
		switch {
		case kind == "system" && len(fields) > 0:
			found.system, found.machine = fields[0], strings.Join(fields[1:], " ")
		case kind == "uid" && len(fields) == 1:
			uid, err := strconv.Atoi(fields[0])
			if err != nil {
				return nil, fmt.Errorf("found uid %q, expected a number", fields[0])
			}
			found.uid = uid
		case kind == "gzip":
			found.gzip = true
		case kind == "deployed" && len(fields) == 5:
			if p.onlyRoots(fields[0], fields[1], '-', found.uid) && p.onlyRoots(fields[2], fields[3], 'd', found.uid) {
				found.deployed[fields[4]] = true
			}
		case (kind == "place" || kind == "library") && len(fields) >= 3:
			_, dir, _ := strings.Cut(rest, " ")
			_, dir, _ = strings.Cut(dir, " ")
			here := place{path: dir, exec: fields[0] != "noexec", ro: fields[0] == "ro"}
			if blocks, err := strconv.ParseInt(fields[1], 10, 64); err == nil {
				here.free = blocks << 10
			}
			if kind == "library" {
				found.library = here
			} else {
				here.path = strings.TrimSuffix(dir, "/") // a name comes behind it
				found.places = append(found.places, here)
			}
		}
	}
	if found.system == "" || found.uid < 0 {
		return nil, fmt.Errorf("found no answer in what its shell printed, %d bytes; expected a POSIX shell with uname and id", len(out))
	}
	return found, nil
}

// onlyRoots tells whether a file, as ls -ldn shows it, is of the kind, belongs to root, and can be written by nobody
// else. Below a root of its own, the files are those of the account.
func (p *opener) onlyRoots(mode, owner string, kind byte, uid int) bool {
	if len(mode) < 10 || mode[0] != kind || mode[5] == 'w' || mode[8] == 'w' {
		return false
	}
	return owner == "0" || p.o.Root != "" && owner == strconv.Itoa(uid)
}

// open begins a conversation: with the runner that is deployed if it is the right one, else with one that is brought.
func (p *opener) open(ctx context.Context) (*conversation, error) {
	found, err := p.look(ctx)
	if err != nil {
		return nil, err
	}
	runner, err := p.o.Runner(p.architecture())
	if err != nil {
		return nil, err
	}
	root := found.uid == 0 || p.o.Link.MaySudo()
	if found.deployed[runner.SHA256] {
		c, err := p.start(ctx, runner, root)
		if err == nil {
			return c, nil
		}
		if final(ctx, err) {
			return nil, err
		}
		// It went since we looked, or is not what its name says: we bring our own.
	}
	if found.uid == 0 && (!found.library.exec || found.library.ro) {
		root = false // a root account can run it from anywhere; what is wrong with the library, the checks tell
	}
	where, err := p.choose(found, runner, root)
	if err != nil {
		return nil, err
	}
	for try := range stageTries {
		if try > 0 {
			select {
			case <-time.After(mathrand.N(stagePause << (try - 1))):
			case <-ctx.Done():
				return nil, context.Cause(ctx)
			}
		}
		var c *conversation
		if c, err = p.stage(ctx, runner, found, where, root); err == nil {
			return c, nil
		}
		if final(ctx, err) {
			return nil, err
		}
		if ended, ok := errors.AsType[*sshlink.CommandError](err); ok && ended.Code == notUnpacked {
			break // nobody else has to do with that
		}
	}
	return nil, &StageError{Host: p.o.Link.String(), Step: "start the runner", Err: bare(err),
		Remedy: "it was brought to " + p.destination(where, root) + " on the guest: can that be written, is there room, and can programs run there (mount options ro and noexec, SELinux)?"}
}

// final tells whether an error is none that another try at bringing the runner helps against.
func final(ctx context.Context, err error) bool {
	var ended *sshlink.CommandError
	return ctx.Err() != nil || !errors.As(err, &ended) && !errors.Is(err, errUnfit)
}

// errUnfit says that what was run is not the runner that was meant.
var errUnfit = errors.New("another program than the runner that was expected")

// bare is an error without the host and the command, which a *StageError names.
func bare(err error) error {
	if e, ok := errors.AsType[*sshlink.CommandError](err); ok {
		said := e.Stderr
		if said == "" {
			said = "it said nothing"
		}
		return fmt.Errorf("exit code %d: %s", e.Code, said)
	}
	return err
}

func (p *opener) destination(where place, root bool) string {
	if root {
		return p.library() + "/" + incoming
	}
	return where.path
}

// choose picks the place where the runner is unpacked, and, without root, run.
func (p *opener) choose(found *probe, runner Runner, root bool) (place, error) {
	need := unpackedSize(runner) + stageSlack
	if l := found.library; root && (!l.exec || l.ro || l.free < need) {
		e := &StageError{Host: p.o.Link.String(), Step: "find a place for the runner"}
		switch {
		case l.ro:
			e.Err = fmt.Errorf("found %s, which %s is on, mounted read-only; expected a file system that can be written", l.path, p.library())
			e.Remedy = "sudo mount -o remount,rw " + l.path
		case !l.exec:
			e.Err = fmt.Errorf("found %s, which %s is on, mounted noexec; expected a file system that programs can run from", l.path, p.library())
			e.Remedy = "sudo mount -o remount,exec " + l.path
		default:
			e.Err = fmt.Errorf("found %d MiB free for %s on %s, expected %d", l.free>>20, p.library(), l.path, need>>20+1)
			e.Remedy = "make room on " + l.path
		}
		return place{}, e
	}
	var seen []string
	for _, c := range found.places {
		if (c.exec || root) && c.free >= need {
			return c, nil
		}
		why := "programs cannot run there"
		if c.exec || root {
			why = strconv.FormatInt(c.free>>20, 10) + " MiB free"
		}
		seen = append(seen, c.path+" ("+why+")")
	}
	if len(seen) == 0 {
		seen = []string{"no directory that can be written"}
	}
	kind := ""
	if !root {
		kind = " on a file system that programs can run from"
	}
	return place{}, &StageError{
		Host: p.o.Link.String(), Step: "find a place for the runner",
		Err:    fmt.Errorf("found %s; expected a directory with %d MiB free%s", strings.Join(seen, ", "), need>>20+1, kind),
		Remedy: "make room in one of them, or set TMPDIR for the account to a directory that has it",
	}
}

// unpackedSize is the size of a runner, from the end of what gzip wrote (RFC 1952, ISIZE).
func unpackedSize(r Runner) int64 {
	if len(r.Compressed) < 4 {
		return 0
	}
	return int64(binary.LittleEndian.Uint32(r.Compressed[len(r.Compressed)-4:]))
}

// start begins a conversation with the runner that is deployed.
func (p *opener) start(ctx context.Context, runner Runner, root bool) (*conversation, error) {
	binary := path.Join(p.library(), runner.SHA256, "pgark")
	args := []string{binary, "guest"}
	if env := p.environment(); env != "" {
		args = append(strings.SplitN(env, " ", 2), args...)
	}
	return p.converse(ctx, runner, sshlink.Command{Args: args, Root: root}, nil)
}

// stage brings the runner to the guest and begins a conversation with it, in one session: there is no moment at which
// a lost connection leaves something behind.
func (p *opener) stage(ctx context.Context, runner Runner, found *probe, where place, root bool) (*conversation, error) {
	upload, size, unpack := io.Reader(bytes.NewReader(runner.Compressed)), int64(len(runner.Compressed)), "gzip -dc"
	if !found.gzip {
		z, err := gzip.NewReader(upload)
		if err != nil {
			return nil, fmt.Errorf("unpack the runner: %w", err)
		}
		upload, size, unpack = z, unpackedSize(runner), "cat"
	}
	script := stageScript
	if root {
		script += stageAsRoot
	} else {
		script += stageAsUser
	}
	return p.converse(ctx, runner, sshlink.Command{Name: "the runner, brought to " + p.destination(where, root), Shell: assign(script,
		"lib", p.library(), "place", where.path, "name", stageName(), "env", p.environment(),
		"size", strconv.FormatInt(size, 10), "unpacked", strconv.FormatInt(unpackedSize(runner), 10), "unpack", unpack,
	), Root: root}, upload)
}

// converse starts a command and talks to it. ctx ends what happens until the server has spoken; the conversation goes on
// after it.
func (p *opener) converse(ctx context.Context, runner Runner, command sshlink.Command, upload io.Reader) (*conversation, error) {
	living, release := context.WithCancelCause(context.WithoutCancel(ctx))
	started := context.AfterFunc(ctx, func() { release(context.Cause(ctx)) })
	process, err := p.o.Link.Start(living, command)
	started() // from here on it is ended by its input's end, so that it can clear up
	if err != nil {
		release(nil)
		return nil, err
	}
	wait := func() error {
		defer release(nil)
		return process.Wait()
	}
	c, err := greet(ctx, transport{
		in: process.Stdin, out: process.Stdout, upload: upload, wait: sync.OnceValue(wait), stop: process.Stop,
	}, p.o)
	if err != nil {
		return nil, err
	}
	if c.hello.SHA256 != runner.SHA256 {
		c.end()
		return nil, fmt.Errorf("%w: found %.12s…, expected %.12s…", errUnfit, c.hello.SHA256, runner.SHA256)
	}
	return c, nil
}
