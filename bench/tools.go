package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/pgark/terraform-provider-pgark/internal/engine/daemon/control"
	"github.com/pgark/terraform-provider-pgark/internal/engine/job"
	"github.com/pgark/terraform-provider-pgark/internal/engine/objectstore"
	"github.com/pgark/terraform-provider-pgark/internal/engine/postgres"
	"github.com/pgark/terraform-provider-pgark/internal/engine/repository"
)

// ---- pgark ----------------------------------------------------------------------------------------------------------

type pgark struct {
	w        *world
	binary   string
	layout   job.Layout
	instance string
	systemID postgres.SystemID
	env      []string
	job      *job.Job
	turns    int // repositories used so far
}

func (w *world) newPgark() (*pgark, error) {
	p := &pgark{w: w, layout: job.Layout{Root: filepath.Join(w.dir, "guest")}, instance: fmt.Sprintf("bench-%d", w.port)}
	p.binary = filepath.Join(w.dir, "pgark") // the checkout may not be readable for the postgres user
	b, err := os.ReadFile("bin/pgark")
	if err != nil {
		return nil, err
	}
	if err := os.WriteFile(p.binary, b, 0o755); err != nil {
		return nil, err
	}
	endpoint := fmt.Sprintf("https://localhost:%d", w.s3Port)
	p.env = []string{"PGARK_ROOT=" + p.layout.Root, "AWS_ACCESS_KEY_ID=bench", "AWS_SECRET_ACCESS_KEY=" + w.secret, "AWS_REGION=us-east-1",
		"AWS_ENDPOINT_URL=" + endpoint, "AWS_CA_BUNDLE=" + w.certFile()}
	cluster, err := postgres.ReadControl(w.data)
	if err != nil {
		return nil, err
	}
	major, err := postgres.ReadMajor(w.data)
	if err != nil {
		return nil, err
	}
	p.job = &job.Job{Format: job.Format, Name: "bench", Host: "localhost", Enabled: true,
		Repository: job.Repository{Region: "us-east-1", Endpoint: endpoint, UsePathStyle: true},
		Protected: []job.Instance{{Name: p.instance, DataDirectory: w.data, SocketDirectory: w.socket, Port: w.port, Owner: "postgres",
			DatabaseUser: "postgres", Version: major, SystemID: cluster.SystemID}}}
	p.job.ApplyDefaults()
	p.systemID = cluster.SystemID
	for _, d := range []string{p.layout.JobsDirectory(), p.layout.StateDirectory("bench", p.instance), p.layout.RunDirectory("bench"), filepath.Dir(p.layout.LogFile("bench", p.instance))} {
		if err := w.ownedDir(d); err != nil {
			return nil, err
		}
	}
	// The store is opened in this process, which learns of the server's certificate as the runner does.
	if err := os.Setenv("AWS_CA_BUNDLE", w.certFile()); err != nil {
		return nil, err
	}
	if err := p.turn("zstd"); err != nil {
		return nil, err
	}
	daemon := exec.CommandContext(context.WithoutCancel(w.ctx), p.binary, "run", "--job", "bench", "--instance", p.instance)
	daemon.Env = append(os.Environ(), p.env...)
	daemon.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: w.uid, Gid: w.gid}}
	logFile, err := os.Create(filepath.Join(w.dir, "pgark.log"))
	if err != nil {
		return nil, err
	}
	daemon.Stdout, daemon.Stderr = logFile, logFile
	if err := daemon.Start(); err != nil {
		return nil, err
	}
	w.resident = append(w.resident, daemon)
	for range 100 {
		if _, err := os.Stat(p.layout.Socket("bench", p.instance)); err == nil {
			break
		}
		time.Sleep(100 * time.Millisecond)
	}
	// archive_command stands in postgresql.conf, so that resetting ALTER SYSTEM's value resumes archiving.
	conf, err := os.OpenFile(filepath.Join(w.data, "postgresql.conf"), os.O_APPEND|os.O_WRONLY, 0)
	if err != nil {
		return nil, err
	}
	_, err = fmt.Fprintf(conf, "archive_command = 'PGARK_ROOT=%s %s'\n", p.layout.Root, strings.Replace(p.layout.ArchiveCommand("bench", p.instance), p.layout.BinaryLink(), p.binary, 1))
	if err := errors.Join(err, conf.Close()); err != nil {
		return nil, err
	}
	return p, w.resumeArchiving()
}

// turn makes a new repository, and writes a job file that says to use it, and how to compress WAL.
func (p *pgark) turn(compression string) error {
	p.turns++
	p.job.Repository.URL = fmt.Sprintf("s3://pgark/repository%d", p.turns)
	p.job.WAL.Compression = compression
	store, err := objectstore.Open(p.w.ctx, p.job.Location(&objectstore.Credentials{AccessKeyID: "bench", SecretAccessKey: p.w.secret}), objectstore.Options{})
	if err != nil {
		return err
	}
	if _, _, err := repository.Create(p.w.ctx, store, nil); err != nil {
		return err
	}
	return p.w.writeAsPostgres(p.layout.JobFile("bench"), p.job.Encode())
}

// forgetWAL has the runner begin anew, in an empty repository: it will store again what it has stored.
func (p *pgark) forgetWAL(compression string) error {
	if err := p.turn(compression); err != nil {
		return err
	}
	socket := p.layout.Socket("bench", p.instance)
	if err := control.Reload(p.w.ctx, socket); err != nil {
		return err
	}
	for range 100 {
		s, err := control.GetStatus(p.w.ctx, socket)
		if err != nil {
			return err
		}
		if s.State == control.Running && s.Repository == p.job.Repository.URL {
			return nil
		}
		time.Sleep(100 * time.Millisecond)
	}
	return fmt.Errorf("the runner has not opened %s within 10 s", p.job.Repository.URL)
}

// fetch is the restore_command of what the present repository holds.
func (p *pgark) fetch() string {
	return fmt.Sprintf("%s wal fetch --path-style --repository %s --series bench/%s/%s %%f %%p", p.binary, p.job.Repository.URL, p.instance, p.systemID)
}

func (p *pgark) name() string { return "pgark" }

func (p *pgark) version() string {
	cmd := exec.CommandContext(p.w.ctx, p.binary, "version")
	out, err := cmd.Output()
	if err != nil {
		return "?"
	}
	return strings.TrimPrefix(strings.TrimSpace(strings.SplitN(string(out), "\n", 2)[0]), "pgark ")
}

func (p *pgark) settings() string {
	return "defaults, not encrypted; the resident runner is counted where it works (not in restores)"
}

func (p *pgark) command(args ...string) command {
	return command{argv: append([]string{p.binary}, args...), env: p.env}
}

func (p *pgark) full() command {
	return p.command("image", "--job", "bench", "--instance", p.instance, "--kind", "full")
}

func (p *pgark) increment() command {
	return p.command("image", "--job", "bench", "--instance", p.instance)
}

func (p *pgark) push(segment string) command {
	c := p.command("wal", "push", "--job", "bench", "--instance", p.instance, "pg_wal/"+segment)
	c.dir = p.w.data
	return c
}

func (p *pgark) restore(dir string) command {
	return p.command("restore", "--job", "bench", "--instance", p.instance, "--latest", "--data-directory", dir)
}

func (p *pgark) stored() int64 { n, _ := treeSize(filepath.Join(p.w.dir, "s3/pgark")); return n }

// ---- pgBackRest -----------------------------------------------------------------------------------------------------

type pgBackRest struct {
	w      *world
	config string
}

// newPgBackRest prepares the peer in its root: the directories that it works on are mounted there under the same names.
func (w *world) newPgBackRest() (*pgBackRest, error) {
	p := &pgBackRest{w: w, config: filepath.Join(w.dir, "pgbackrest.conf")}
	inside := filepath.Join(w.peerRoot, w.dir)
	for _, m := range []struct{ from, to string }{{w.dir, inside}, {"/proc", filepath.Join(w.peerRoot, "proc")}, {"/dev", filepath.Join(w.peerRoot, "dev")}} {
		if err := os.MkdirAll(m.to, 0o755); err != nil {
			return nil, err
		}
		if err := syscall.Mount(m.from, m.to, "", syscall.MS_BIND|syscall.MS_REC, ""); err != nil {
			return nil, fmt.Errorf("mount %s in the peer's root: %w", m.from, err)
		}
		w.mounts = append(w.mounts, m.to)
	}
	for _, d := range []string{"peer/lock", "peer/spool", "peer/log"} {
		if err := w.ownedDir(filepath.Join(w.dir, d)); err != nil {
			return nil, err
		}
	}
	conf := fmt.Sprintf(`[global]
repo1-type=s3
repo1-path=/repository
repo1-s3-bucket=peer
repo1-s3-endpoint=localhost
repo1-storage-port=%d
repo1-s3-key=bench
repo1-s3-key-secret=%s
repo1-s3-region=us-east-1
repo1-s3-uri-style=path
repo1-storage-ca-file=%s
repo1-retention-full=100
repo1-bundle=y
repo1-block=y
lock-path=%[4]s/lock
spool-path=%[4]s/spool
log-path=%[4]s/log
log-level-file=off
log-level-console=warn
archive-check=n
archive-async=y
start-fast=y
process-max=2
compress-type=zst
compress-level=3
[bench]
pg1-path=%[5]s
pg1-port=%[6]d
pg1-socket-path=%[7]s
pg1-user=postgres
`, w.s3Port, w.secret, w.certFile(), filepath.Join(w.dir, "peer"), w.data, w.port, w.socket)
	if err := w.writeAsPostgres(p.config, []byte(conf)); err != nil {
		return nil, err
	}
	return p, w.runAsPostgres(p.command("--no-online", "stanza-create"))
}

func (p *pgBackRest) name() string { return "pgBackRest" }

func (p *pgBackRest) version() string {
	out, err := exec.CommandContext(p.w.ctx, "chroot", p.w.peerRoot, "pgbackrest", "version").Output()
	if err != nil {
		return "?"
	}
	return strings.TrimPrefix(strings.TrimSpace(string(out)), "pgBackRest ")
}

func (p *pgBackRest) settings() string {
	return "zst level 3, two processes, bundles, block incremental, asynchronous archiving, not encrypted"
}

func (p *pgBackRest) command(args ...string) command {
	argv := append([]string{"/usr/bin/pgbackrest", "--config=" + p.config, "--stanza=bench"}, args...)
	return command{argv: argv, chroot: p.w.peerRoot}
}

func (p *pgBackRest) full() command      { return p.command("--type=full", "backup") }
func (p *pgBackRest) increment() command { return p.command("--type=incr", "backup") }

func (p *pgBackRest) push(segment string) command {
	c := p.command("archive-push", "pg_wal/"+segment)
	c.dir = p.w.data
	return c
}

// pushSynchronous stores one segment while PostgreSQL waits, and looks for no others.
func (p *pgBackRest) pushSynchronous(segment string) command {
	c := p.command("--no-archive-async", "archive-push", "pg_wal/"+segment)
	c.dir = p.w.data
	return c
}

func (p *pgBackRest) restore(dir string) command {
	return p.command("--pg1-path="+dir, "--type=none", "restore")
}

// forgetWAL removes the WAL that it has stored.
func (p *pgBackRest) forgetWAL() error {
	stored, err := filepath.Glob(filepath.Join(p.w.dir, "s3/peer/repository/archive/bench/*/*", strings.Repeat("[0-9A-F]", 24)+"-*"))
	if err != nil {
		return err
	}
	for _, name := range stored {
		if err := os.Remove(name); err != nil {
			return err
		}
	}
	return nil
}

func (p *pgBackRest) stored() int64 { n, _ := treeSize(filepath.Join(p.w.dir, "s3/peer")); return n }
