//go:build linux

package guest

import (
	"context"
	"fmt"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/jackc/pgx/v5"
	"golang.org/x/sys/unix"

	"github.com/pgark/terraform-provider-pgark/internal/engine/job"
	"github.com/pgark/terraform-provider-pgark/internal/engine/postgres"
)

// The settings that streaming and commits that wait for it depend on.
const (
	synchronousCommit = "synchronous_commit"
	maxSlots          = "max_replication_slots"
	maxSlotWAL        = "max_slot_wal_keep_size"
)

// streaming is what a server tells of whether its WAL can be streamed.
type streaming struct {
	mayReplicate bool  // our role
	refused      error // why it made no replication connection; nil: it did
	ours         bool  // of the WAL senders that are taken, one is our runner's
	settings     map[string]postgres.Setting
	slots        []replicationSlot
}

// replicationSlot is a row of pg_replication_slots.
type replicationSlot struct {
	Name     string
	Physical bool
	Active   bool
}

// inspectStreaming asks a server, and tries what cannot be asked: pg_hba.conf has lines of its own for replication.
func inspectStreaming(ctx context.Context, conn *pgx.Conn, c cluster) (*streaming, error) {
	s := &streaming{}
	err := conn.QueryRow(ctx, "select rolsuper or rolreplication from pg_catalog.pg_roles where rolname = current_user").Scan(&s.mayReplicate)
	if err != nil {
		return nil, fmt.Errorf("read whether the role may replicate: %w", err)
	}
	if s.settings, err = postgres.ReadSettings(ctx, conn, synchronousNames, synchronousCommit, maxSlots, maxSlotWAL); err != nil {
		return nil, err
	}
	if s.slots, err = readSlots(ctx, conn); err != nil {
		return nil, err
	}
	r, err := postgres.ConnectReplication(ctx, postgres.ConnectOptions{
		SocketDirectory: c.SocketDirectory, Port: c.Port, User: c.DatabaseUser, Owner: c.Owner,
	}, postgres.ApplicationName+" check") // by another name than the stream's, for which commits may wait
	if err != nil {
		s.refused = err
		return s, nil //nolint:nilerr // it is what the check judges
	}
	_ = r.Close() // it has shown what it was made for
	return s, nil
}

func readSlots(ctx context.Context, conn *pgx.Conn) ([]replicationSlot, error) {
	rows, err := conn.Query(ctx, "select slot_name::text, slot_type = 'physical', active from pg_catalog.pg_replication_slots order by 1")
	if err != nil {
		return nil, fmt.Errorf("read replication slots: %w", err)
	}
	slots, err := pgx.CollectRows(rows, pgx.RowToStructByPos[replicationSlot])
	if err != nil {
		return nil, fmt.Errorf("read replication slots: %w", err)
	}
	return slots, nil
}

// streams tells whether WAL is to be streamed.
func (e *examination) streams() bool { return e.job.WAL.Mode == job.WALContinuous }

// streamChecks are the checks of what only streaming needs. Without it, whole segments are archived all the same.
var streamChecks = []string{"replication", maxWALSenders}

// streaming makes the checks of what streams WAL.
func (e *examination) streaming(cl cluster, s *inspected, add func(Check)) {
	if s.stream == nil {
		return
	}
	senders := e.senders(cl, s)
	if s.Setting(maxWALSenders) != "0" { // else nobody is let in, whoever it is
		add(e.replication(cl, s))
	}
	add(senders)
	if e.job.WantsSlot() {
		add(e.replicationSlot(cl, s))
	}
	if e.job.WantsSynchronous() {
		add(e.synchronousNames(cl, s))
		add(e.synchronousCommit(cl, s))
	}
}

// replication judges whether the server lets our role stream WAL.
func (e *examination) replication(cl cluster, s *inspected) Check {
	c := Check{
		Name: "replication", Status: Pass, Found: "role " + s.User + " may stream WAL, and is let in",
		Expected: "a role with the attribute REPLICATION, a line for replication in pg_hba.conf, and a free WAL sender",
	}
	var found, remedies []string
	if !s.stream.mayReplicate {
		found = append(found, "role "+s.User+" lacks the attribute REPLICATION")
		grant := statements(cl, postgres.GrantReplication(s.User))
		if cl.isReplica() {
			grant = "# on its primary, whose roles a replica has:\n" + grant
		}
		remedies = append(remedies, grant)
	}
	switch why := postgres.RefusalOf(s.stream.refused); {
	case s.stream.refused == nil, postgres.IsDenied(s.stream.refused) && !s.stream.mayReplicate:
	case why == postgres.RefusedByHBA:
		found = append(found, "pg_hba.conf lets it stream no WAL")
		remedies = append(remedies, admitTo(cl, "replication"))
	case why == postgres.RefusedConnections:
		if s.stream.ours {
			break
		}
		senders := s.Setting(maxWALSenders)
		more, _ := strconv.Atoi(senders)
		found = append(found, "all "+senders+" WAL senders are taken")
		remedies = append(remedies, "# this shows by whom:\n"+
			statements(cl, "SELECT usename, application_name, client_addr, state FROM pg_stat_replication")+
			"\n# with more of them, after one restart:\n"+
			statements(cl, alterStatement(maxWALSenders, strconv.Itoa(more+2)))+" && "+restartCommand(cl))
	default:
		found = append(found, s.stream.refused.Error())
		remedies = append(remedies, "see in the server's log why it lets "+s.User+" stream no WAL")
	}
	if len(found) == 0 {
		return c
	}
	c.Status, c.Found = Fail, strings.Join(found, "; ")
	c.Remedy = strings.Join(remedies, "\n") + "\n# or go without, and lose up to wal.interval: wal = { mode = \"interval\" }"
	return c
}

func (e *examination) senders(cl cluster, s *inspected) Check {
	c := Check{Name: maxWALSenders, Status: Pass, Found: s.Setting(maxWALSenders), Expected: "at least 1: WAL is streamed through it"}
	if c.Found == "0" {
		e.restartedSetting(&c, cl, s, maxWALSenders, "it will be "+sendersWanted+", with one restart of PostgreSQL")
	}
	return c
}

// replicationSlot judges whether a slot can be had, and whether it is kept from filling the disk while nobody reads it.
func (e *examination) replicationSlot(cl cluster, s *inspected) Check {
	slot := job.SlotName(e.job.Name)
	c := Check{
		Name: "replication_slot", Status: Pass, Found: maxSlotWAL + " = " + s.stream.settings[maxSlotWAL].Value + " MB",
		Expected: "a free replication slot, and a limit to the WAL that it holds back while the runner is away",
	}
	var found, remedies []string
	if s.stream.settings[maxSlotWAL].Value == "-1" {
		found = append(found, maxSlotWAL+" = -1: a slot that nobody reads would fill the disk, and PostgreSQL stop")
		remedies = append(remedies, "# less than what is free where pg_wal is:\n"+change(cl, maxSlotWAL, slotLimit(cl)))
	}
	exists, logical := false, false
	for _, other := range s.stream.slots {
		if other.Name == slot {
			exists, logical = true, !other.Physical
		}
	}
	limit := s.stream.settings[maxSlots].Value
	if n, err := strconv.Atoi(limit); err == nil && !exists && len(s.stream.slots) >= n {
		found = append(found, "all "+limit+" replication slots are taken")
		remedies = append(remedies, "# this shows which, and pg_drop_replication_slot gives one back that nobody needs:\n"+
			statements(cl, "SELECT slot_name, slot_type, active, restart_lsn FROM pg_replication_slots")+
			"\n# with more of them, after one restart:\n"+
			statements(cl, alterStatement(maxSlots, strconv.Itoa(n+2)))+" && "+restartCommand(cl))
	}
	if logical {
		found = append(found, "there is a logical slot by the name "+slot)
		remedies = append(remedies, "give the job another name, or drop that slot if nobody needs it: "+dropSlotStatement(slot))
	}
	if len(found) > 0 {
		c.Status, c.Found, c.Remedy = Fail, strings.Join(found, "; "), strings.Join(remedies, "\n")
	}
	return c
}

// slotLimit is what a slot may hold back: half of what is free where pg_wal is, in whole gigabytes, 10 at most.
func slotLimit(cl cluster) string {
	var st unix.Statfs_t
	if err := unix.Statfs(filepath.Join(cl.DataDirectory, "pg_wal"), &st); err != nil {
		return "1GB"
	}
	return fmt.Sprintf("%dGB", min(10, max(1, int64(st.Bavail)*st.Bsize/2>>30)))
}

func dropSlotStatement(slot string) string {
	return "SELECT pg_drop_replication_slot('" + slot + "')"
}

// synchronousNames judges for whom commits wait. pgark sets what is empty; a list of somebody's is for him to change: who
// has to be in it, and how many are waited for, is a decision about his data.
func (e *examination) synchronousNames(cl cluster, s *inspected) Check {
	setting := s.stream.settings[synchronousNames]
	c := Check{
		Name: synchronousNames, Status: Pass, Found: "empty",
		Expected: "a list that names " + postgres.ApplicationName + ", so that commits wait until they are in the repository",
	}
	if setting.Value != "" {
		c.Found = strconv.Quote(setting.Value)
	}
	names, err := parseStandbyNames(setting.Value)
	waits := "while the runner, or the repository, is away, commits wait"
	switch {
	case err != nil:
		c.Status, c.Remedy = Fail, change(cl, synchronousNames, postgres.ApplicationName)
	case names.has() && names.everyCommit():
		c.Status = Warn
		c.Found += ": every commit waits for pgark; " + waits
		c.Remedy = "# as intended; where commits have to go on, another standby may stand in for pgark (FIRST 1 (pgark, standby)), or turn wal.synchronous off"
	case names.has():
		c.Status = Warn
		c.Found += ": others may stand in for pgark, and what they have is not yet in the repository then"
		c.Remedy = "# with this, no commit does without pgark:\n# " + change(cl, synchronousNames, withoutPgark(names).always())
	case s.InRecovery:
		c.Status = Warn
		c.Found += ": nothing commits on a replica; once it is promoted, commits do not wait"
		c.Remedy = "# for the time after a promotion, when the runner streams:\n# " + change(cl, synchronousNames, postgres.ApplicationName)
	case setting.Overrides():
		c.Status = Fail
		c.Found += ", given on the server's command line"
		c.Remedy = offCommandLine(cl, synchronousNames)
	case len(names.names) > 0:
		c.Status = Fail
		c.Remedy = "# pgark as the last in the list, so that nothing waits before its runner streams:\n" +
			change(cl, synchronousNames, names.beside()) +
			"\n# and then, so that no commit does without it:\n# " + change(cl, synchronousNames, names.always())
	case e.manages(cl) && !e.deployed:
		c.Status = Warn
		c.Found += ": it will be set to " + postgres.ApplicationName + " once the runner streams; from then on, " + waits
		c.Remedy = "# where commits have to go on, leave wal.synchronous out: then a second is what can be lost"
	case e.deployed:
		c.Status, c.Remedy = Fail, "# once the runner streams:\n"+change(cl, synchronousNames, postgres.ApplicationName)
	default:
		c.Status = Warn
		c.Found += ", and with guest_settings.manage = false you set it yourself; until then commits do not wait"
		c.Remedy = "# once the runner streams (pgark status), not before: commits would wait for it\n# " + change(cl, synchronousNames, postgres.ApplicationName)
	}
	return c
}

// withoutPgark takes pgark out of a list, to be put in at another place.
func withoutPgark(s standbyNames) standbyNames {
	without := standbyNames{quorum: s.quorum, number: s.number}
	for _, n := range s.names {
		if !strings.EqualFold(n, postgres.ApplicationName) {
			without.names = append(without.names, n)
		}
	}
	without.number = min(without.number, len(without.names))
	return without
}

// synchronousCommit judges how far commits wait. pgark says "written" when it has received WAL, "flushed" when that is in the
// repository.
func (e *examination) synchronousCommit(cl cluster, s *inspected) Check {
	c := Check{
		Name: synchronousCommit, Status: Pass, Found: s.stream.settings[synchronousCommit].Value,
		Expected: "on or remote_apply: with anything less, commits do not wait until they are in the repository",
	}
	if c.Found != "on" && c.Found != "remote_apply" {
		c.Status, c.Remedy = Warn, change(cl, synchronousCommit, "on")
	}
	return c
}
