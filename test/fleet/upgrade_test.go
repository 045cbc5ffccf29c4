//go:build linux

package fleet

import (
	"bytes"
	"compress/gzip"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/pgark/terraform-provider-pgark/test/guests"
)

// previousRunner is the runner of one commit ago. Without a history, or where that commit does not build, which is not this
// one's fault, this source stands in for it. Its version is another one in any case, so that the binary differs.
func (w *world) previousRunner() []byte {
	w.Helper()
	const file, old, replacement = "runner/main.go", `const version = "0.1.0"`, `const version = "0.0.9"`
	dir := w.TempDir()
	cmd := exec.CommandContext(w.Context(), "sh", "-c", `git archive --output "$0/source.tar" HEAD~1 && tar -x -f "$0/source.tar" -C "$0"`, dir)
	cmd.Dir = sourceTree
	if out, err := cmd.CombinedOutput(); err != nil {
		w.Logf("no previous commit: %v: %s", err, out)
	} else if b, err := w.runnerWith(dir, file, old, replacement); err != nil {
		w.Logf("the previous commit: %v", err)
	} else {
		return b
	}
	b, err := w.runnerWith(sourceTree, file, old, replacement)
	if err != nil {
		w.Fatal(err)
	}
	return b
}

var sourceTree = filepath.Join("..", "..")

// runnerWith builds the runner of a source tree with one of its files changed: other versions of it, or broken ones,
// without a hook for that in the product.
func (w *world) runnerWith(tree, file, old, replacement string) ([]byte, error) {
	w.Helper()
	path, err := filepath.Abs(filepath.Join(tree, file))
	if err != nil {
		return nil, err
	}
	source, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	if !bytes.Contains(source, []byte(old)) {
		return nil, fmt.Errorf("found no %q in %s", old, file)
	}
	dir := w.TempDir()
	changed := filepath.Join(dir, "changed.go")
	if err := os.WriteFile(changed, bytes.Replace(source, []byte(old), []byte(replacement), 1), 0o644); err != nil {
		return nil, err
	}
	out := filepath.Join(dir, "pgark")
	overlay := w.overlay(map[string]string{path: changed})
	cmd := exec.CommandContext(w.Context(), "bash", "runner/build.sh", runtime.GOARCH, out, "-overlay", overlay)
	cmd.Dir = tree
	if text, err := cmd.CombinedOutput(); err != nil {
		return nil, fmt.Errorf("build the runner: %w\n%s", err, text)
	}
	return os.ReadFile(out)
}

// overlay writes the file that go build -overlay takes.
func (w *world) overlay(replace map[string]string) string {
	w.Helper()
	b, err := json.Marshal(map[string]any{"Replace": replace})
	if err != nil {
		w.Fatal(err)
	}
	file := filepath.Join(w.TempDir(), "overlay.json")
	if err := os.WriteFile(file, b, 0o644); err != nil {
		w.Fatal(err)
	}
	return file
}

// providerWith builds the provider with another runner in it.
func (w *world) providerWith(runner []byte) []byte {
	w.Helper()
	var packed bytes.Buffer
	z := gzip.NewWriter(&packed)
	if _, err := z.Write(runner); err != nil {
		w.Fatal(err)
	}
	if err := z.Close(); err != nil {
		w.Fatal(err)
	}
	file := filepath.Join(w.TempDir(), "runner.gz")
	if err := os.WriteFile(file, packed.Bytes(), 0o644); err != nil {
		w.Fatal(err)
	}
	embedded, err := filepath.Abs(filepath.Join(sourceTree, "internal/provider/runnerdist/dist/pgark_linux_"+runtime.GOARCH+".gz"))
	if err != nil {
		w.Fatal(err)
	}
	b, err := buildProvider(w.overlay(map[string]string{embedded: file}))
	if err != nil {
		w.Fatal(err)
	}
	return b
}

func digest(b []byte) string {
	sum := sha256.Sum256(b)
	return hex.EncodeToString(sum[:])
}

// deployed is the digest of the binary that the link on the guest leads to, and of the one that the runner runs.
func deployed(g *guests.Guest, unit string) (link, running string) {
	link, _, _ = strings.Cut(g.Run("sha256sum /usr/local/bin/pgark"), " ")
	running, _, _ = strings.Cut(g.Run("sha256sum /proc/$(systemctl show -P MainPID '"+unit+"')/exe"), " ")
	return link, running
}

// archiver is what pg_stat_archiver says.
type archiver struct {
	archived, failed int
	failing          bool // the newest attempt failed
}

func readArchiver(t *testing.T, g *guests.Guest) archiver {
	t.Helper()
	f := strings.Split(strings.TrimSpace(g.SQL("/var/run/postgresql", 5432,
		"select archived_count, failed_count, coalesce(last_failed_time > last_archived_time, false) from pg_stat_archiver")), "|")
	if len(f) != 3 {
		t.Fatalf("pg_stat_archiver: found %q", f)
	}
	var a archiver
	var err error
	if a.archived, err = strconv.Atoi(f[0]); err == nil {
		a.failed, err = strconv.Atoi(f[1])
	}
	if err != nil {
		t.Fatal(err)
	}
	a.failing = f[2] == "t"
	return a
}

// TestUpgrade replaces a runner by a newer one, and by one that does not start, while pgbench writes and a segment is
// switched every second. No attempt to archive may fail for good, nothing may be missing, and the broken one goes.
func TestUpgrade(t *testing.T) {
	w := newWorld(t)
	g := w.net.Boot(guests.Options{})
	const unit = "pgark@orders-15-main.service"

	older := w.previousRunner()
	broken, err := w.runnerWith(sourceTree, "runner/run.go", "layout := job.FindLayout()", `return errors.New("this runner does not start")`+"\nlayout := job.FindLayout()")
	if err != nil {
		t.Fatal(err)
	}
	w.install(w.providerWith(older))
	w.configure("", job("orders", g, `guest_settings = { restart = "allow" }`))
	w.apply()
	if link, running := deployed(g, unit); link != digest(older) || running != digest(older) {
		t.Fatalf("deployed %s, running %s, expected %s", link, running, digest(older))
	}

	g.Run(`su postgres -c "createdb bench && /usr/lib/postgresql/15/bin/pgbench -q -i -s 5 bench"
systemd-run -q --unit load-bench -p User=postgres /usr/lib/postgresql/15/bin/pgbench -n -c 2 -R 50 -T 600 bench
systemd-run -q --unit load-switch -p User=postgres sh -c 'while :; do psql -qAtc "select pg_switch_wal()" postgres; sleep 1; done'`)
	image(g, "orders")
	before := readArchiver(t, g)

	current, err := providerBinary()
	if err != nil {
		t.Fatal(err)
	}
	w.install(current)
	w.must("init", "-no-color", "-input=false")
	out, changes := w.plan()
	if !changes {
		t.Fatalf("the plan does not see the older runner:\n%s", out)
	}
	w.says(out, "runner_sha256")
	w.apply()
	link, running := deployed(g, unit)
	if link != running || link == digest(older) {
		t.Errorf("after the upgrade the link leads to %s and %s runs", link, running)
	}
	if n := strings.TrimSpace(g.Run("ls /usr/local/lib/pgark | wc -l")); n != "1" {
		t.Errorf("found %s binaries after the upgrade, expected 1", n)
	}

	w.install(w.providerWith(broken))
	w.must("init", "-no-color", "-input=false")
	w.says(w.applyFails(), "this runner does not start", "previous runner")
	if again, runs := deployed(g, unit); again != link || runs != link {
		t.Errorf("after the broken runner the link leads to %s and %s runs, expected %s", again, runs, link)
	}

	w.install(current)
	w.must("init", "-no-color", "-input=false")
	w.nothingToDo()
	g.Run("systemctl stop load-bench load-switch")
	var last string
	w.eventually(2*time.Minute, "everything is archived", func() bool {
		last = g.SQL("/var/run/postgresql", 5432, "select count(*) from pg_ls_archive_statusdir() where name like '%.ready'")
		return strings.TrimSpace(last) == "0"
	})
	after := readArchiver(t, g)
	t.Logf("archived %d segments over two upgrades, %d attempts failed", after.archived-before.archived, after.failed-before.failed)
	if after.failing {
		t.Error("the newest attempt to archive failed")
	}
	if after.failed-before.failed > 3 {
		t.Errorf("%d attempts to archive failed", after.failed-before.failed)
	}
	w.noGap(g, "orders")
}
