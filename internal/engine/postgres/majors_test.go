package postgres_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/pgark/terraform-provider-pgark/internal/engine/postgres"
	"github.com/pgark/terraform-provider-pgark/test/pgtest"
)

// TestMajors runs everything that may differ between versions against one server of each.
func TestMajors(t *testing.T) {
	for i, major := range pgtest.Majors {
		t.Run(strconv.Itoa(major), func(t *testing.T) {
			t.Parallel()
			c := pgtest.Start(t, pgtest.Options{
				// 13, 15 and 17 with page checksums, the others without.
				Major: major, DataChecksums: i%2 == 0, WALSegmentSizeMB: []int{16, 1, 64}[i%3], SeparateWAL: i%2 == 1, SeparateConfig: i%3 == 1,
				Tablespaces: []string{"space"},
				Settings:    map[string]string{"max_prepared_transactions": "5", "wal_keep_size": "1GB", "wal_level": []string{"replica", "logical"}[i%2]},
			})
			size := postgres.SegmentSize([]int{16, 1, 64}[i%3] << 20)
			t.Run("control", func(t *testing.T) { checkControl(t, c.For(t), size) })
			t.Run("connect", func(t *testing.T) { checkConnect(t, c.For(t)) })
			t.Run("server", func(t *testing.T) { checkServer(t, c.For(t)) })
			t.Run("inventory", func(t *testing.T) { checkInventory(t, c.For(t)) })
			t.Run("privileges", func(t *testing.T) { checkPrivileges(t, c.For(t)) })
			t.Run("refusals", func(t *testing.T) { checkRefusals(t, c.For(t)) })
			t.Run("settings", func(t *testing.T) { checkSettings(t, c.For(t)) })
			t.Run("backup", func(t *testing.T) { checkBackup(t, c.For(t), size) })
			t.Run("wal", func(t *testing.T) { checkWAL(t, c.For(t), size) })
			t.Run("records", func(t *testing.T) { checkRecords(t, c.For(t), size) })
			t.Run("pages", func(t *testing.T) { checkPages(t, c.For(t)) })
			t.Run("postmaster", func(t *testing.T) { checkPostmaster(t, c.For(t)) })
		})
	}
}

// checkControl compares pg_control with the server's own reading of it.
func checkControl(t *testing.T, c *pgtest.Cluster, size postgres.SegmentSize) {
	c.Exec("checkpoint")
	expected := c.Scalar(`select concat_ws(' ', s.system_identifier, s.pg_control_version, s.catalog_version_no,
			p.checkpoint_lsn, p.redo_lsn, p.timeline_id, p.full_page_writes, extract(epoch from p.checkpoint_time)::bigint,
			i.database_block_size, i.blocks_per_segment, i.wal_block_size, i.bytes_per_wal_segment, i.data_page_checksum_version,
			r.min_recovery_end_lsn, r.min_recovery_end_timeline, r.backup_start_lsn, r.backup_end_lsn, r.end_of_backup_record_required,
			current_setting('wal_level'), current_setting('max_connections'), current_setting('max_worker_processes'),
			current_setting('max_wal_senders'), current_setting('max_prepared_transactions'), current_setting('max_locks_per_transaction'))
		from pg_control_checkpoint() p, pg_control_system() s, pg_control_init() i, pg_control_recovery() r`)
	b := func(v bool) string { return strconv.FormatBool(v)[:1] }
	k, err := postgres.ReadControl(c.DataDir)
	if err != nil {
		t.Fatal(err)
	}
	found := fmt.Sprint(k.SystemID, " ", k.ControlVersion, " ", k.CatalogVersion, " ", k.Checkpoint, " ", k.CheckpointRedo, " ",
		uint32(k.CheckpointTimeline), " ", b(k.FullPageWrites), " ", k.CheckpointTime.Unix(), " ",
		k.BlockSize, " ", k.RelationSegmentSize, " ", k.WALBlockSize, " ", uint64(k.WALSegmentSize), " ", k.DataChecksumVersion, " ",
		k.MinRecoveryPoint, " ", uint32(k.MinRecoveryPointTimeline), " ", k.BackupStart, " ", k.BackupEnd, " ", b(k.BackupEndRequired), " ",
		k.WALLevel, " ", k.MaxConnections, " ", k.MaxWorkerProcesses, " ", k.MaxWALSenders, " ", k.MaxPreparedXacts, " ", k.MaxLocksPerTransaction)
	if found != expected {
		t.Errorf("pg_control:\nfound    %s\nexpected %s", found, expected)
	}
	if k.State != postgres.StateInProduction || k.WALSegmentSize != size {
		t.Errorf("found state %s, segments of %d", k.State, k.WALSegmentSize)
	}
	if err := k.CheckBuild(); err != nil {
		t.Error(err)
	}
	if major, err := postgres.ReadMajor(c.DataDir); err != nil || major != c.Major {
		t.Errorf("ReadMajor: %d, %v", major, err)
	}
	version := postgres.TablespaceVersionDirectory(c.Major, k.CatalogVersion)
	if _, err := os.Stat(filepath.Join(c.TablespaceDir("space"), version)); err != nil {
		t.Error(err)
	}

	raw, err := os.ReadFile(filepath.Join(c.DataDir, postgres.ControlFile))
	if err != nil {
		t.Fatal(err)
	}
	for i := range 292 {
		flipped := slices.Clone(raw)
		flipped[i] ^= 0x10
		if k, err := postgres.ParseControl(flipped); err == nil && (c.Major >= 18 || i < 288) {
			t.Errorf("byte %d flipped: found %+v, expected an error", i, k)
		}
	}
	if _, err := postgres.ParseControl(raw[:200]); err == nil {
		t.Error("a short pg_control was accepted")
	}
}

func checkConnect(t *testing.T, c *pgtest.Cluster) {
	ctx := context.Background()
	c.Exec("alter role " + pgx.Identifier{c.Owner}.Sanitize() + " set statement_timeout = '7s'")
	defer c.Exec("alter role " + pgx.Identifier{c.Owner}.Sanitize() + " reset statement_timeout")
	conn, err := postgres.Connect(ctx, postgres.ConnectOptions{SocketDirectory: c.SocketDir, Port: c.Port})
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = conn.Close(ctx) }()
	var user, application, statement, idle, path string
	err = conn.QueryRow(ctx, `select current_user::text, current_setting('application_name'), current_setting('statement_timeout'),
		coalesce(current_setting('idle_session_timeout', true), '0'), current_setting('search_path')`).Scan(&user, &application, &statement, &idle, &path)
	if err != nil {
		t.Fatal(err)
	}
	if user != c.Owner || application != "pgark" || statement != "0" || idle != "0" || path != "" {
		t.Errorf("found user %q, application %q, statement_timeout %q, idle_session_timeout %q, search_path %q", user, application, statement, idle, path)
	}
	if os.Geteuid() != 0 {
		return
	}
	// The thread that dialled is root again, whichever it was.
	for range 20 {
		done := make(chan int)
		go func() { done <- os.Geteuid() }()
		if uid := <-done; uid != 0 {
			t.Fatalf("a thread runs as %d", uid)
		}
	}
	_, err = postgres.Connect(ctx, postgres.ConnectOptions{SocketDirectory: c.SocketDir, Port: c.Port, Owner: "root", User: c.Owner})
	if err == nil || !strings.Contains(err.Error(), "28000") {
		t.Errorf("connect as root: found %v, expected peer authentication to fail", err)
	}
}

func checkServer(t *testing.T, c *pgtest.Cluster) {
	ctx := context.Background()
	s, err := postgres.ReadServer(ctx, c.Conn(ctx))
	if err != nil {
		t.Fatal(err)
	}
	if s.Major() != c.Major || s.SystemID != c.SystemID || s.InRecovery || !s.Superuser || s.User != c.Owner {
		t.Errorf("found %+v", s)
	}
	if s.Setting("data_directory") != c.DataDir || s.Setting("config_file") != filepath.Join(c.ConfigDir, "postgresql.conf") ||
		s.Setting("hba_file") != filepath.Join(c.ConfigDir, "pg_hba.conf") || s.Setting("unix_socket_directories") != c.SocketDir {
		t.Errorf("found settings %+v", s.Settings)
	}
	if _, ok := s.Settings["archive_library"]; ok != (c.Major >= 15) {
		t.Errorf("archive_library: found %v", ok)
	}
	if d := time.Since(s.Time); d < -time.Second || d > time.Minute || s.StartTime.After(s.Time) {
		t.Errorf("found clock %s, started %s", s.Time, s.StartTime)
	}
}

func checkInventory(t *testing.T, c *pgtest.Cluster) {
	ctx := context.Background()
	conn := c.Conn(ctx)
	i, err := postgres.ReadInventory(ctx, conn, time.Minute)
	if err != nil {
		t.Fatal(err)
	}
	if len(i.Tablespaces) != 1 || i.Tablespaces[0].Name != "space" || i.Tablespaces[0].Location != c.TablespaceDir("space") {
		t.Errorf("found tablespaces %+v", i.Tablespaces)
	}
	if len(i.Databases) != 3 || i.Databases[0].Template || !i.Databases[1].Template || i.SizeBytes() < 10<<20 {
		t.Errorf("found databases %+v", i.Databases)
	}
	if !slices.Equal(i.Extensions, []string{"plpgsql"}) || len(i.Followers) > 0 {
		t.Errorf("found extensions %q, followers %q", i.Extensions, i.Followers)
	}
	// Sizes that take too long cost nothing but themselves.
	if i, err = postgres.ReadInventory(ctx, conn, time.Millisecond); err != nil || len(i.Databases) != 3 {
		t.Errorf("found %+v, %v", i, err)
	}
	var limit string
	if err := conn.QueryRow(ctx, "show statement_timeout").Scan(&limit); err != nil || limit != "0" {
		t.Errorf("statement_timeout: found %q, %v", limit, err)
	}
}

// checkPrivileges gives a role exactly what Grants says, and takes each away again.
func checkPrivileges(t *testing.T, c *pgtest.Cluster) {
	ctx := context.Background()
	alter := []string{"archive_command", "archive_mode"}
	for _, role := range []string{"weak", `We"ak's`} {
		for _, statement := range append(postgres.CreateRole(role), postgres.CreateRole(role)...) {
			c.Exec(statement)
		}
		quoted := pgx.Identifier{role}.Sanitize()
		conn := c.Conn(ctx)
		if _, err := conn.Exec(ctx, "set session authorization "+quoted); err != nil {
			t.Fatal(err)
		}
		missing := func() []string {
			t.Helper()
			found, err := postgres.MissingPrivileges(ctx, conn, alter...)
			if err != nil {
				t.Fatal(err)
			}
			var grants []string
			for _, m := range found {
				if m.SuperuserOnly != (m.Grant == "") || m.SuperuserOnly != (c.Major < 15 && strings.HasPrefix(m.What, "change ")) {
					t.Errorf("found %+v", m)
				}
				if !m.SuperuserOnly {
					grants = append(grants, m.Grant)
				}
			}
			return grants
		}
		grants := postgres.Grants(c.Major, role, alter...)
		if found := missing(); !slices.Equal(found, grants) {
			t.Errorf("found missing %q, expected %q", found, grants)
		}
		for _, g := range append(grants, grants...) {
			c.Exec(g)
		}
		if found := missing(); len(found) > 0 {
			t.Errorf("after every grant: %q", found)
		}
		for _, g := range grants {
			revoke := strings.Replace(strings.Replace(g, "GRANT", "REVOKE", 1), " TO ", " FROM ", 1)
			c.Exec(revoke)
			if found := missing(); !slices.Equal(found, []string{g}) {
				t.Errorf("%s: found missing %q", revoke, found)
			}
			c.Exec(g)
		}
		// What everybody may can be taken from everybody.
		c.Exec("revoke execute on function pg_control_checkpoint() from public")
		if found := missing(); len(found) != 1 || !strings.Contains(found[0], "pg_control_checkpoint") {
			t.Errorf("found %q", found)
		}
		c.Exec("grant execute on function pg_control_checkpoint() to public")
		if _, err := postgres.ReadServer(ctx, conn); err != nil {
			t.Error(err)
		}
		if i, err := postgres.ReadInventory(ctx, conn, time.Minute); err != nil || i.SizeBytes() < 10<<20 {
			t.Errorf("found %+v, %v", i, err)
		}
		c.Exec("drop owned by " + quoted)
		c.Exec("drop role " + quoted)
	}
}

// checkRefusals tells the ways apart in which a server keeps somebody out, in whatever language it says so.
func checkRefusals(t *testing.T, c *pgtest.Cluster) {
	ctx := context.Background()
	hba := filepath.Join(c.ConfigDir, "pg_hba.conf")
	before, err := os.ReadFile(hba)
	if err != nil {
		t.Fatal(err)
	}
	rules := func(text string) {
		t.Helper()
		if err := os.WriteFile(hba, []byte(text+"\n"), 0o600); err != nil {
			t.Fatal(err)
		}
		// No connection is needed to tell the server.
		running, p, err := postgres.IsRunning(c.DataDir)
		if err != nil || !running {
			t.Fatal(running, err)
		}
		log := len(c.Log())
		if err := syscall.Kill(p.PID, syscall.SIGHUP); err != nil {
			t.Fatal(err)
		}
		for end := time.Now().Add(10 * time.Second); !strings.Contains(c.Log()[log:], "SIGHUP") && time.Now().Before(end); {
			time.Sleep(time.Millisecond)
		}
	}
	defer rules(string(before))
	expect := func(what, user, database string, expected postgres.Refusal) {
		t.Helper()
		// The postmaster has read the rules a moment after it says that it was told to.
		var conn *pgx.Conn
		for end := time.Now().Add(5 * time.Second); ; time.Sleep(5 * time.Millisecond) {
			conn, err = postgres.Connect(ctx, postgres.ConnectOptions{SocketDirectory: c.SocketDir, Port: c.Port, Owner: c.Owner, User: user, Database: database})
			if err == nil {
				_ = conn.Close(ctx)
			}
			if postgres.RefusalOf(err) == expected {
				return
			}
			if time.Now().After(end) {
				t.Errorf("%s: found refusal %d, expected %d: %v", what, postgres.RefusalOf(err), expected, err)
				return
			}
		}
	}
	c.Exec("create role dumb nologin; create role narrow login connection limit 0; create role outside login; create role secret login password 'hush'")
	defer c.Exec("drop role dumb, narrow, outside, secret")
	c.Exec("create database closed")
	defer c.Exec("drop database closed")
	c.Exec("revoke connect on database closed from public")
	rules("local all " + c.Owner + " peer\nlocal all secret scram-sha-256\nlocal all barred reject\nlocal all peerless peer\nlocal postgres,closed,absent absent,dumb,narrow,outside trust")
	expect("no line", "nobody_knows", "", postgres.RefusedByHBA)
	expect("reject", "barred", "", postgres.RefusedByHBA)
	expect("peer of another name", "peerless", "", postgres.RefusedByHBA)
	expect("password", "secret", "", postgres.RefusedByHBA)
	expect("no role", "absent", "", postgres.RefusedRole)
	expect("no login", "dumb", "", postgres.RefusedRole)
	expect("limit", "narrow", "", postgres.RefusedConnections)
	expect("no connect", "outside", "closed", postgres.RefusedConnect)
	expect("no database", "outside", "absent", postgres.RefusedDatabase)
	expect("let in", "outside", "", postgres.NotRefused)
}

func checkSettings(t *testing.T, c *pgtest.Cluster) {
	ctx := context.Background()
	conn := c.Conn(ctx)
	for _, value := range []string{`/bin/true '%p' \ "x"`, "it's", ""} {
		if err := postgres.AlterSystem(ctx, conn, "restore_command", value); err != nil {
			t.Fatal(err)
		}
		if err := postgres.Reload(ctx, conn); err != nil {
			t.Fatal(err)
		}
		s, err := postgres.ReadSettings(ctx, conn, "restore_command")
		if err != nil {
			t.Fatal(err)
		}
		// In 13, restore_command takes a restart.
		if got := s["restore_command"]; c.Major > 13 && (got.Value != value || !got.FromAlterSystem()) {
			t.Errorf("found %+v, expected %q", got, value)
		}
	}
	if err := postgres.AlterSystem(ctx, conn, "work_mem", "5MB"); err != nil {
		t.Fatal(err)
	}
	if err := postgres.AlterSystemReset(ctx, conn, "restore_command"); err != nil {
		t.Fatal(err)
	}
	if err := postgres.Reload(ctx, conn); err != nil {
		t.Fatal(err)
	}
	s, err := postgres.ReadSettings(ctx, conn, "restore_command", "work_mem", "nonsense")
	if err != nil {
		t.Fatal(err)
	}
	if len(s) != 2 || s["work_mem"].Value != "5120" || s["work_mem"].Unit != "kB" || s["restore_command"].FromAlterSystem() {
		t.Errorf("found %+v", s)
	}
	if err := postgres.AlterSystem(ctx, conn, "work_mem; drop", "1"); err == nil {
		t.Error("a name with a semicolon was accepted")
	}
	problems, err := postgres.FileProblems(ctx, conn)
	if err != nil || len(problems) != 0 {
		t.Errorf("found problems %+v, %v", problems, err)
	}
	if err := os.WriteFile(filepath.Join(c.DataDir, "extra.conf"), []byte("maintenance_work_mem = 'much'\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	c.Configure(map[string]string{"include_if_exists": filepath.Join(c.DataDir, "extra.conf")})
	if problems, err = postgres.FileProblems(ctx, conn); err != nil || len(problems) == 0 || !strings.HasSuffix(problems[0].File, "extra.conf") {
		t.Errorf("found problems %+v, %v", problems, err)
	}
	if err := os.Remove(filepath.Join(c.DataDir, "extra.conf")); err != nil {
		t.Fatal(err)
	}
}

func checkBackup(t *testing.T, c *pgtest.Cluster, size postgres.SegmentSize) {
	ctx := context.Background()
	b, err := postgres.StartBackup(ctx, c.Conn(ctx), "a 'label'")
	if err != nil {
		t.Fatal(err)
	}
	if err := b.Alive(ctx); err != nil {
		t.Fatal(err)
	}
	c.Exec("create table during_backup as select generate_series(1, 100) g")
	r, err := b.Stop(ctx)
	if err != nil {
		t.Fatal(err)
	}
	if r.StartLSN != b.StartLSN || r.StopLSN <= r.StartLSN || r.Timeline != 1 || b.StartTimeline != 1 || r.StopTime.Before(b.StartTime) {
		t.Errorf("found %+v, started at %s, %s", r, b.StartLSN, b.StartTime)
	}
	label, err := postgres.ParseBackupLabel(r.Label)
	if err != nil {
		t.Fatal(err)
	}
	if label.Label != "a 'label'" || label.StartFile != postgres.SegmentAt(1, r.StartLSN, size) || label.FromStandby || label.Checkpoint < label.StartLSN {
		t.Errorf("found label %+v", label)
	}
	if !strings.Contains(r.TablespaceMap, " "+c.TablespaceDir("space")+"\n") {
		t.Errorf("found tablespace map %q", r.TablespaceMap)
	}
	backups, err := filepath.Glob(filepath.Join(c.WALDir, "*.backup"))
	if err != nil || len(backups) != 1 && c.Scalar("select current_setting('archive_mode')") == "on" {
		t.Errorf("found backup history files %q, %v", backups, err)
	}
	for _, path := range backups {
		f, err := postgres.ParseWALFile(filepath.Base(path))
		if err != nil || f.Kind != postgres.BackupFile || f.String() != filepath.Base(path) || f.Segment != label.StartFile || uint64(f.Offset) != size.Offset(r.StartLSN) {
			t.Errorf("%s: found %+v, %v", path, f, err)
		}
	}

	lost, err := postgres.StartBackup(ctx, c.Conn(ctx), "lost")
	if err != nil {
		t.Fatal(err)
	}
	c.Exec("select pg_terminate_backend(pid) from pg_stat_activity where query like '%timeline_id%' and pid <> pg_backend_pid()")
	_, err = lost.Stop(ctx)
	if e, ok := errors.AsType[*postgres.BackupLostError](err); !ok || e.StartLSN != lost.StartLSN {
		t.Errorf("found %v, expected a *BackupLostError", err)
	}
	if err := lost.Alive(ctx); err == nil {
		t.Error("a lost backup is alive")
	}

	aborted, err := postgres.StartBackup(ctx, c.Conn(ctx), "aborted")
	if err != nil {
		t.Fatal(err)
	}
	aborted.Abort()
	if _, err := aborted.Stop(ctx); err == nil {
		t.Error("an aborted backup could be stopped")
	}
}

func checkWAL(t *testing.T, c *pgtest.Cluster, size postgres.SegmentSize) {
	ctx := context.Background()
	conn := c.Conn(ctx)
	before := time.Now().Add(-time.Millisecond)
	c.Exec("create table w (v text)")
	c.Exec("insert into w select repeat(md5(g::text), 20) from generate_series(1, 3000) g")
	after := time.Now().Add(time.Millisecond)
	name, err := postgres.ForceSegment(ctx, conn, "forced")
	if err != nil {
		t.Fatal(err)
	}
	// The segment with the insert's commit may be the one before.
	var scans []postgres.SegmentScan
	names := []postgres.SegmentName{name}
	if p, ok := name.Previous(size); ok {
		names = append(names, p)
	}
	for _, n := range names {
		b, err := os.ReadFile(filepath.Join(c.WALDir, string(n)))
		if err != nil {
			t.Fatal(err)
		}
		h, err := postgres.CheckSegment(n, int64(len(b)), b[:postgres.WALHeaderSize], c.SystemID)
		if err != nil {
			t.Error(err)
		}
		if h.Major != c.Major || h.SegmentSize != size || h.Timeline != 1 {
			t.Errorf("%s: found header %+v", n, h)
		}
		_, err = postgres.CheckSegment(n, int64(len(b)), b, c.SystemID+1)
		if e, ok := errors.AsType[*postgres.SegmentError](err); !ok || e.Field != "system identifier" {
			t.Errorf("found %v, expected a *SegmentError about the system identifier", err)
		}
		_, err = postgres.CheckSegment(n.Next(size), int64(len(b)), b, c.SystemID)
		if e, ok := errors.AsType[*postgres.SegmentError](err); !ok || e.Field != "address" || e.Found != n.Start(size).String() {
			t.Errorf("found %v, expected a *SegmentError about the address", err)
		}
		if _, err = postgres.CheckSegment(n, int64(len(b))-1, b, c.SystemID); err == nil {
			t.Error("a short segment was accepted")
		}
		s := postgres.ScanSegment(n, size, b)
		if s.Problem != nil {
			t.Error(s.Problem)
		}
		scans = append(scans, s)
	}
	last := scans[0]
	if !last.Switched || last.End != name.End(size) || len(last.RestorePoints) != 1 || last.RestorePoints[0].Name != "forced" {
		t.Errorf("found %+v", last)
	}
	in := func(at time.Time) bool { return at.After(before) && at.Before(after) }
	if !slices.ContainsFunc(scans, func(s postgres.SegmentScan) bool { return in(s.LastTime) || in(s.FirstTime) }) {
		t.Errorf("found %+v, expected a commit between %s and %s", scans, before, after)
	}
	if lsn, err := postgres.CurrentLSN(ctx, conn); err != nil || lsn < name.Start(size) {
		t.Errorf("CurrentLSN: %s, %v", lsn, err)
	}

	// The segment in use ends somewhere, and that is no surprise.
	c.Exec("insert into w values ('x')")
	current := postgres.SegmentAt(1, lsnOf(t, c.Scalar("select pg_current_wal_lsn()")), size)
	b, err := os.ReadFile(filepath.Join(c.WALDir, string(current)))
	if err != nil {
		t.Fatal(err)
	}
	s := postgres.ScanSegment(current, size, b)
	if s.Problem == nil || s.Records == 0 || s.End < lsnOf(t, c.Scalar("select pg_current_wal_lsn()"))-100 {
		t.Errorf("segment in use: found %+v", s)
	}
}

func lsnOf(t *testing.T, s string) postgres.LSN {
	t.Helper()
	lsn, err := postgres.ParseLSN(s)
	if err != nil {
		t.Fatal(err)
	}
	return lsn
}

// checkPages reads every page of the stopped cluster: with checksums each must be right, and wrong in another place.
func checkPages(t *testing.T, c *pgtest.Cluster) {
	c.Exec("create unlogged table u (a int); insert into u values (1); create temp table x as select 1")
	c.Exec("vacuum w")
	c.Stop(pgtest.Fast)
	checksums := strings.Contains(t.Name(), "13/") || strings.Contains(t.Name(), "15/") || strings.Contains(t.Name(), "17/")
	var pages, empty, unlogged int
	check := func(root, prefix string) {
		err := filepath.WalkDir(root, func(path string, d os.DirEntry, err error) error {
			if err != nil || !d.Type().IsRegular() {
				return err
			}
			rel := prefix + strings.TrimPrefix(path, root+"/")
			if postgres.ClassifyPath(rel) == postgres.SkipPath {
				return nil
			}
			r, ok := postgres.ParseRelationPath(rel)
			if ok != postgres.Checksummed(rel) {
				t.Errorf("%s: relation %v", rel, ok)
			}
			if !ok {
				return nil
			}
			if r.Fork == postgres.InitializationFork {
				unlogged++
			}
			b, err := os.ReadFile(path)
			if err != nil {
				return err
			}
			for n := range len(b) / postgres.PageSize {
				page := b[n*postgres.PageSize:][:postgres.PageSize]
				block := r.FirstBlock(postgres.RelationSegmentBlocks) + uint32(n)
				if postgres.PageIsNew(page) {
					empty++
					continue
				}
				pages++
				if !checksums {
					continue
				}
				if err := postgres.VerifyPage(page, block); err != nil {
					t.Errorf("%s: %v", rel, err)
				}
				if postgres.ValidPage(page, block+1) {
					t.Errorf("%s: block %d is right in another place", rel, block)
				}
			}
			return nil
		})
		if err != nil {
			t.Error(err)
		}
	}
	check(c.DataDir, "")
	oids, err := filepath.Glob(filepath.Join(c.DataDir, "pg_tblspc", "*"))
	if err != nil || len(oids) != 1 {
		t.Fatalf("found %q, %v", oids, err)
	}
	check(c.TablespaceDir("space"), "pg_tblspc/"+filepath.Base(oids[0])+"/")
	if pages < 2000 || unlogged != 1 {
		t.Errorf("found %d pages, %d new ones, %d unlogged relations", pages, empty, unlogged)
	}
	k, err := postgres.ReadControl(c.DataDir)
	if err != nil || k.State != postgres.StateShutdown || k.DataChecksums() != checksums {
		t.Errorf("found %+v, %v", k, err)
	}
}

func checkPostmaster(t *testing.T, c *pgtest.Cluster) {
	if running, p, err := postgres.IsRunning(c.DataDir); running || p != nil || err != nil {
		t.Errorf("stopped: found %v, %+v, %v", running, p, err)
	}
	c.Start()
	running, p, err := postgres.IsRunning(c.DataDir)
	if !running || err != nil {
		t.Fatalf("running: found %v, %+v, %v", running, p, err)
	}
	if p.PID != c.PID() || p.Port != c.Port || p.SocketDirectory != c.SocketDir || p.DataDirectory != c.DataDir || p.Status != "ready" ||
		time.Since(p.StartTime) > time.Minute {
		t.Errorf("found %+v", p)
	}
	c.Kill()
	line, err := postgres.ReadCommandLine(c.DataDir)
	if err != nil || line.Directory != c.ConfigDir || filepath.Base(line.Program) != "postgres" {
		t.Errorf("found command line %+v, %v", line, err)
	}
	if running, p, err := postgres.IsRunning(c.DataDir); running || p == nil || err != nil {
		t.Errorf("killed: found %v, %+v, %v", running, p, err)
	}
	_, err = postgres.Connect(context.Background(), postgres.ConnectOptions{SocketDirectory: c.SocketDir, Port: c.Port, Owner: c.Owner})
	if !postgres.IsNotRunning(err) {
		t.Errorf("connect to a killed server: found %v", err)
	}
	_, err = postgres.Connect(context.Background(), postgres.ConnectOptions{SocketDirectory: c.SocketDir, Port: 1})
	if !postgres.IsNotRunning(err) {
		t.Errorf("connect to no server: found %v", err)
	}
	c.Start()
}
