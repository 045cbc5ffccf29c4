package main

import (
	"bufio"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/hex"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"log"
	"math/big"
	mathrand "math/rand/v2"
	"net"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/klauspost/compress/zstd"

	"github.com/pgark/terraform-provider-pgark/internal/engine/postgres"
)

// world is what both tools work on: one cluster, one S3 server, one temporary directory.
type world struct {
	ctx             context.Context
	dir             string // everything lies below it
	data, socket    string
	bin             string // PostgreSQL's programs
	port, s3Port    int
	uid, gid        uint32
	peerRoot        string
	postgresVersion string
	secret          string
	conn            *pgx.Conn
	outside         []*exec.Cmd // PostgreSQL's and S3's processes: not counted
	resident        []*exec.Cmd // resident parts of a tool: counted where they take part
	residentCounts  bool        // in the present measurement
	mounts          []string
}

func newWorld(ctx context.Context, mib int, peerRoot string) (_ *world, err error) {
	if err := becomeReaper(); err != nil {
		return nil, err
	}
	account, err := user.Lookup("postgres")
	if err != nil {
		return nil, err
	}
	uid, _ := strconv.Atoi(account.Uid)
	gid, _ := strconv.Atoi(account.Gid)
	bins, _ := filepath.Glob("/usr/lib/postgresql/*/bin")
	if len(bins) == 0 {
		return nil, errors.New("no PostgreSQL below /usr/lib/postgresql: run test/setup.sh bench")
	}
	slices.Sort(bins)
	dir, err := os.MkdirTemp("", "pgark-bench.")
	if err != nil {
		return nil, err
	}
	w := &world{ctx: ctx, dir: dir, data: filepath.Join(dir, "data"), socket: filepath.Join(dir, "s"), bin: bins[len(bins)-1],
		uid: uint32(uid), gid: uint32(gid), peerRoot: peerRoot}
	defer func() {
		if err != nil {
			w.close()
		}
	}()
	if err := os.Chmod(dir, 0o755); err != nil {
		return nil, err
	}
	for _, d := range []string{"", "s", "s3/pgark", "s3/peer", "restored"} {
		if err := w.ownedDir(filepath.Join(dir, d)); err != nil {
			return nil, err
		}
	}
	if w.port, err = freePort(ctx); err != nil {
		return nil, err
	}
	if w.s3Port, err = freePort(ctx); err != nil {
		return nil, err
	}
	if err := w.startS3(); err != nil {
		return nil, err
	}
	if err := w.startPostgres(); err != nil {
		return nil, err
	}
	return w, w.fill(mib)
}

func (w *world) ownedDir(dir string) error {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	return os.Chown(dir, int(w.uid), int(w.gid))
}

func (w *world) emptyDir(name string) (string, error) {
	dir := filepath.Join(w.dir, "restored", name)
	return dir, errors.Join(os.RemoveAll(dir), os.Mkdir(dir, 0o700), os.Chown(dir, int(w.uid), int(w.gid)))
}

// freePort finds a port that nothing listens on.
func freePort(ctx context.Context) (int, error) {
	l, err := new(net.ListenConfig).Listen(ctx, "tcp", "127.0.0.1:0")
	if err != nil {
		return 0, err
	}
	_, port, err := net.SplitHostPort(l.Addr().String())
	if err := errors.Join(err, l.Close()); err != nil {
		return 0, err
	}
	return strconv.Atoi(port)
}

// certificate writes a self-signed one for localhost: pgBackRest speaks S3 over TLS only.
func (w *world) certificate() error {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return err
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "localhost"}, DNSNames: []string{"localhost"},
		IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(48 * time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageDigitalSignature | x509.KeyUsageCertSign}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
	if err != nil {
		return err
	}
	keyDER, err := x509.MarshalECPrivateKey(key)
	if err != nil {
		return err
	}
	return errors.Join(
		os.WriteFile(w.certFile(), pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), 0o644),
		os.WriteFile(filepath.Join(w.dir, "s3.key"), pem.EncodeToMemory(&pem.Block{Type: "EC PRIVATE KEY", Bytes: keyDER}), 0o600))
}

func (w *world) certFile() string { return filepath.Join(w.dir, "s3.crt") }

func (w *world) startS3() error {
	if err := w.certificate(); err != nil {
		return err
	}
	b := make([]byte, 16)
	_, _ = rand.Read(b)
	w.secret = hex.EncodeToString(b)
	cmd := exec.CommandContext(context.WithoutCancel(w.ctx), ".tools/bin/versitygw", "--port", fmt.Sprintf("127.0.0.1:%d", w.s3Port), "--region", "us-east-1",
		"--cert", w.certFile(), "--key", filepath.Join(w.dir, "s3.key"), "--keep-alive", "--quiet",
		"posix", "--data-integrity-etag", filepath.Join(w.dir, "s3"))
	cmd.Env = append(os.Environ(), "ROOT_ACCESS_KEY_ID=bench", "ROOT_SECRET_ACCESS_KEY="+w.secret)
	if err := cmd.Start(); err != nil {
		return err
	}
	w.outside = append(w.outside, cmd)
	for range 100 {
		if c, err := new(net.Dialer).DialContext(w.ctx, "tcp", fmt.Sprintf("127.0.0.1:%d", w.s3Port)); err == nil {
			return c.Close()
		}
		time.Sleep(100 * time.Millisecond)
	}
	return errors.New("the S3 server does not answer")
}

func (w *world) startPostgres() error {
	if err := w.runAsPostgres(command{argv: []string{filepath.Join(w.bin, "initdb"), "-D", w.data, "--data-checksums", "-A", "trust"}}); err != nil {
		return err
	}
	conf, err := os.OpenFile(filepath.Join(w.data, "postgresql.conf"), os.O_APPEND|os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	fmt.Fprintf(conf, "port = %d\nlisten_addresses = ''\nunix_socket_directories = '%s'\narchive_mode = on\nshared_buffers = 512MB\nmax_wal_size = 16GB\nwal_keep_size = 64GB\ncheckpoint_timeout = 1h\nautovacuum = off\nlogging_collector = off\n", w.port, w.socket)
	if err := conf.Close(); err != nil {
		return err
	}
	cmd := exec.CommandContext(context.WithoutCancel(w.ctx), filepath.Join(w.bin, "postgres"), "-D", w.data)
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: w.uid, Gid: w.gid}}
	logFile, err := os.Create(filepath.Join(w.dir, "postgres.log"))
	if err != nil {
		return err
	}
	cmd.Stdout, cmd.Stderr = logFile, logFile
	if err := cmd.Start(); err != nil {
		return err
	}
	w.outside = append(w.outside, cmd)
	for range 300 {
		w.conn, err = postgres.Connect(w.ctx, postgres.ConnectOptions{SocketDirectory: w.socket, Port: w.port, User: "postgres", Database: "postgres", Owner: "postgres"})
		if err == nil {
			break
		}
		time.Sleep(100 * time.Millisecond)
	}
	if err != nil {
		return err
	}
	if _, err := w.conn.Exec(w.ctx, "SET search_path TO public"); err != nil {
		return err
	}
	return w.conn.QueryRow(w.ctx, "SELECT 'PostgreSQL ' || current_setting('server_version')").Scan(&w.postgresVersion)
}

// fill makes the data set: half pgbench, half text, JSON and UUIDs that compress about 3:1.
func (w *world) fill(mib int) error {
	log.Printf("making %d MiB of data", mib)
	// pgbench -s 1 is about 15 MiB; room in the pages lets an update stay in its page.
	scale := max(1, mib/2/16)
	if err := w.runAsPostgres(command{argv: []string{filepath.Join(w.bin, "pgbench"), "-i", "-q", "-F", "90", "-s", strconv.Itoa(scale), "-h", w.socket, "-p", strconv.Itoa(w.port), "postgres"}}); err != nil {
		return err
	}
	if _, err := w.conn.Exec(w.ctx, "CREATE TABLE document (id bigint, key uuid, body text, attributes jsonb) WITH (fillfactor = 90)"); err != nil {
		return err
	}
	rng := mathrand.New(mathrand.NewPCG(1, 2)) // the same data in every run
	rows := mib / 2 * 1024 * 1024 / 1100
	r, pw := io.Pipe()
	go func() {
		buffered := bufio.NewWriterSize(pw, 1<<20)
		for i := range rows {
			writeDocument(buffered, rng, i)
		}
		pw.CloseWithError(buffered.Flush())
	}()
	if _, err := w.conn.PgConn().CopyFrom(w.ctx, r, "COPY document FROM STDIN"); err != nil {
		return err
	}
	for _, s := range []string{"CREATE INDEX ON document (key)", "VACUUM ANALYZE", "CHECKPOINT"} {
		if _, err := w.conn.Exec(w.ctx, s); err != nil {
			return err
		}
	}
	return nil
}

func writeDocument(b *bufio.Writer, rng *mathrand.Rand, id int) {
	fmt.Fprintf(b, "%d\t%08x-%04x-4%03x-a%03x-%012x\t", id, rng.Uint32(), rng.Uint32N(1<<16), rng.Uint32N(1<<12), rng.Uint32N(1<<12), rng.Uint64N(1<<48))
	for range 60 {
		// A Zipf-like choice over a vocabulary, as in prose.
		word := int(float64(len(vocabulary)) * rng.Float64() * rng.Float64() * rng.Float64())
		fmt.Fprintf(b, "%s ", vocabulary[word])
	}
	fmt.Fprintf(b, "\t{\"customer\": %d, \"status\": \"%s\", \"trace\": \"%016x%016x\", \"amount\": %d.%02d, \"tags\": [\"%s\", \"%s\"]}\n",
		rng.Uint32N(1e6), []string{"open", "paid", "shipped", "returned"}[rng.IntN(4)], rng.Uint64(), rng.Uint64(), rng.IntN(1e4), rng.IntN(100),
		vocabulary[rng.IntN(len(vocabulary))], vocabulary[rng.IntN(len(vocabulary))])
}

// vocabulary is 4096 pronounceable words.
var vocabulary = func() []string {
	rng := mathrand.New(mathrand.NewPCG(3, 4))
	words := make([]string, 4096)
	for i := range words {
		var s strings.Builder
		for range 1 + rng.IntN(4) {
			s.WriteByte("bcdfghjklmnprstvwz"[rng.IntN(18)])
			s.WriteByte("aeiou"[rng.IntN(5)])
		}
		words[i] = s.String()
	}
	return words
}()

// compressionRatio is zstd level 3's on the text half, to show what kind of data this is.
func (w *world) compressionRatio() (float64, error) {
	var path string
	if err := w.conn.QueryRow(w.ctx, "SELECT pg_relation_filepath('document')").Scan(&path); err != nil {
		return 0, err
	}
	f, err := os.Open(filepath.Join(w.data, path))
	if err != nil {
		return 0, err
	}
	defer f.Close()
	var stored counter
	enc, err := zstd.NewWriter(&stored, zstd.WithEncoderLevel(zstd.SpeedDefault))
	if err != nil {
		return 0, err
	}
	n, err := io.Copy(enc, io.LimitReader(f, 64<<20))
	if err := errors.Join(err, enc.Close()); err != nil {
		return 0, err
	}
	return float64(n) / float64(stored), nil
}

type counter int64

func (c *counter) Write(b []byte) (int, error) { *c += counter(len(b)); return len(b), nil }

// change updates one row in every hundredth page of both halves; rows stay in their pages (fillfactor 90, HOT).
func (w *world) change(round int) error {
	for _, s := range []string{
		fmt.Sprintf("UPDATE pgbench_accounts SET abalance = abalance + 1 WHERE aid %% 5500 = %d", 7+round*61),
		fmt.Sprintf("UPDATE document SET attributes = jsonb_set(attributes, '{status}', '\"seen\"') WHERE id %% 600 = %d", 3+round*7),
		"CHECKPOINT",
	} {
		if _, err := w.conn.Exec(w.ctx, s); err != nil {
			return err
		}
	}
	return nil
}

// hideArchiving turns archiving off and stops the runner, so that nobody looks ahead at segments while they are written.
func (w *world) hideArchiving() error {
	if err := w.signalResident(syscall.SIGSTOP); err != nil {
		return err
	}
	for _, s := range []string{"ALTER SYSTEM SET archive_command = ''", "SELECT pg_reload_conf()", "SELECT pg_switch_wal()", "CHECKPOINT"} {
		if _, err := w.conn.Exec(w.ctx, s); err != nil {
			return err
		}
	}
	time.Sleep(time.Second) // the archiver takes the new setting
	return nil
}

// nextSegment is the one that will be written next.
func (w *world) nextSegment() (first string, err error) {
	err = w.conn.QueryRow(w.ctx, "SELECT pg_walfile_name(pg_current_wal_insert_lsn() + 1)").Scan(&first)
	return first, err
}

// makeSegments writes WAL, by pgbench and bulk loads in turns, until there are n segments from first on, and hides them:
// they are marked as archived.
func (w *world) makeSegments(first string, n int) ([]string, error) {
	log.Printf("writing %d WAL segments", n)
	for i := 0; ; i++ {
		if i%2 == 0 {
			if err := w.runAsPostgres(command{argv: []string{filepath.Join(w.bin, "pgbench"), "-n", "-c", "4", "-j", "2", "-t", "2000", "-h", w.socket, "-p", strconv.Itoa(w.port), "postgres"}, env: []string{"PGOPTIONS=-c synchronous_commit=off"}}); err != nil {
				return nil, err
			}
		} else {
			for _, q := range []string{fmt.Sprintf("CREATE TABLE loaded AS SELECT * FROM document WHERE id %% 8 = %d", i/2%8), "DROP TABLE loaded"} {
				if _, err := w.conn.Exec(w.ctx, q); err != nil {
					return nil, err
				}
			}
		}
		if _, err := w.conn.Exec(w.ctx, "SELECT pg_switch_wal()"); err != nil {
			return nil, err
		}
		ready, err := filepath.Glob(filepath.Join(w.data, "pg_wal", "archive_status", strings.Repeat("[0-9A-F]", 24)+".ready"))
		if err != nil {
			return nil, err
		}
		var names []string
		for _, r := range ready {
			if name := strings.TrimSuffix(filepath.Base(r), ".ready"); name >= first {
				names = append(names, name)
			}
		}
		if len(names) >= n {
			slices.Sort(names)
			for _, r := range ready {
				if err := os.Rename(r, strings.TrimSuffix(r, ".ready")+".done"); err != nil {
					return nil, err
				}
			}
			return names[:n], nil
		}
	}
}

// resumeArchiving lets PostgreSQL archive by itself again, to our runner, which an image needs.
func (w *world) resumeArchiving() error {
	if err := w.signalResident(syscall.SIGCONT); err != nil {
		return err
	}
	for _, s := range []string{"ALTER SYSTEM RESET archive_command", "SELECT pg_reload_conf()"} {
		if _, err := w.conn.Exec(w.ctx, s); err != nil {
			return err
		}
	}
	return nil
}

func (w *world) sizeMiB() int64 {
	var n int64
	if err := w.conn.QueryRow(w.ctx, "SELECT sum(pg_database_size(oid))::bigint FROM pg_database").Scan(&n); err != nil {
		return 0
	}
	return n >> 20
}

// checkRestored makes sure that a restore that is fast is also there.
func (w *world) checkRestored(dir string) error {
	n, err := treeSize(dir)
	if err != nil {
		return err
	}
	if want := w.sizeMiB() << 20; n < want*9/10 {
		return fmt.Errorf("%s holds %d MiB, expected about %d", dir, n>>20, want>>20)
	}
	_, err = os.Stat(filepath.Join(dir, "global/pg_control"))
	return err
}

func treeSize(dir string) (n int64, err error) {
	err = filepath.WalkDir(dir, func(_ string, d os.DirEntry, err error) error {
		if err != nil {
			if errors.Is(err, os.ErrNotExist) {
				return nil
			}
			return err
		}
		if d.Type().IsRegular() {
			if info, err := d.Info(); err == nil {
				n += info.Size()
			}
		}
		return nil
	})
	return n, err
}

func (w *world) writeAsPostgres(path string, b []byte) error {
	return errors.Join(os.WriteFile(path, b, 0o600), os.Chown(path, int(w.uid), int(w.gid)))
}

// excluded says that a process is no part of a tool.
func (w *world) excluded(pid int) bool {
	return slices.ContainsFunc(w.outside, func(c *exec.Cmd) bool { return c.Process.Pid == pid })
}

func (w *world) isResident(pid int) bool {
	return slices.ContainsFunc(w.resident, func(c *exec.Cmd) bool { return c.Process.Pid == pid })
}

// signalResident stops and continues the runner, so that it does not work ahead outside of its measurement, nor beside
// the peer's.
func (w *world) signalResident(s syscall.Signal) error {
	for _, c := range w.resident {
		if err := c.Process.Signal(s); err != nil {
			return err
		}
	}
	return nil
}

// known says that a process is ours and is meant to be running.
func (w *world) known(pid int) bool {
	return w.excluded(pid) || w.isResident(pid)
}

func (w *world) close() {
	if w.conn != nil {
		_ = w.conn.Close(context.Background())
	}
	_ = w.signalResident(syscall.SIGCONT)
	for _, c := range append(w.resident, w.outside...) {
		_ = c.Process.Signal(syscall.SIGQUIT)
	}
	for _, c := range append(w.resident, w.outside...) {
		done := make(chan struct{})
		go func() { _ = c.Wait(); close(done) }()
		select {
		case <-done:
		case <-time.After(10 * time.Second):
			_ = c.Process.Kill()
			<-done
		}
	}
	for _, m := range slices.Backward(w.mounts) {
		_ = syscall.Unmount(m, syscall.MNT_DETACH)
	}
	_ = os.RemoveAll(w.dir)
}
