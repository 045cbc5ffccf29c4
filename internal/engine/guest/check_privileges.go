//go:build linux

package guest

import (
	"errors"
	"os"
	"slices"
	"strings"

	"github.com/pgark/terraform-provider-pgark/internal/engine/postgres"
)

// privileges judges whether we may do what is to be done: on the machine, at the server's door, and inside.
func (e *examination) privileges(cl cluster, s *inspected, err error) Check {
	c := Check{Name: "privileges", Status: Pass, Found: "role " + cl.DatabaseUser, Expected: "to connect and to configure"}
	fail := func(found, remedy string) Check {
		c.Status, c.Found, c.Remedy = Fail, found, remedy
		return c
	}
	if uid := os.Geteuid(); uid != 0 {
		if o, err := lookupAccount(cl.Owner); err != nil || o.uid != uid {
			c.Expected = "to deploy as root, or as " + cl.Owner + ", the owner of the instance"
			return fail("deploying as user "+ourName(), e.g.becomeRoot())
		}
	}
	var denied *privilegesError
	switch {
	case errors.As(err, &denied):
		return fail(err.Error(), e.grants(cl, denied.missing))
	case errors.Is(err, errNoSocket):
		c.Expected = "a unix socket"
		return fail(err.Error(), makeSocket(cl))
	case err != nil:
		return fail(err.Error(), e.letIn(cl, postgres.RefusalOf(err)))
	case s == nil:
		return c // it does not run
	}
	c.Found = "role " + s.User
	if len(s.missing) > 0 {
		return fail(lacks(s.User, s.missing), e.grants(cl, s.missing))
	}
	if s.Setting("allow_alter_system") == "off" && e.manages(cl) {
		c.Expected = "to connect and to configure: ALTER SYSTEM has to be allowed"
		return fail("allow_alter_system = off", "echo 'allow_alter_system = on' | "+sudo()+"tee -a "+word(cl.configFile)+" && "+reload(cl)+
			"\n# or set archive_command yourself: guest_settings = { manage = false }")
	}
	return c
}

// grants gives the role what it lacks.
func (e *examination) grants(cl cluster, missing []postgres.MissingPrivilege) string {
	var sql []string
	superuserOnly := false
	for _, m := range missing {
		if m.SuperuserOnly {
			superuserOnly = true
		} else {
			sql = append(sql, m.Grant)
		}
	}
	var lines []string
	if len(sql) > 0 {
		if cl.isReplica() {
			lines = append(lines, "# on its primary, whose roles and grants a replica has:")
		}
		lines = append(lines, statements(cl, sql...))
	}
	if superuserOnly {
		lines = append(lines,
			"# before PostgreSQL 15 only a superuser can change settings; so set it by hand, and declare guest_settings = { manage = false }:",
			change(cl, archiveCommand, e.g.layout.ArchiveCommand(e.job.Name, cl.Name)),
			"# or let pgark work as a superuser:",
			"# "+statements(cl, "ALTER ROLE "+postgres.QuoteRole(cl.DatabaseUser)+" SUPERUSER"))
	}
	return strings.Join(lines, "\n")
}

// letIn is what makes a server let our role in.
func (e *examination) letIn(cl cluster, why postgres.Refusal) string {
	role := cl.DatabaseUser
	switch why {
	case postgres.RefusedByHBA:
		return e.admit(cl)
	case postgres.RefusedRole:
		return e.makeRole(cl)
	case postgres.RefusedConnect:
		return statements(cl, postgres.GrantConnect(role))
	case postgres.RefusedDatabase:
		return strings.Replace(statements(cl, "CREATE DATABASE postgres"), " -d postgres ", " -d template1 ", 1)
	case postgres.RefusedConnections:
		return "# all connections are taken; this shows by whom:\n" +
			statements(cl, "SELECT usename, application_name, client_addr, state, count(*) FROM pg_stat_activity GROUP BY 1, 2, 3, 4 ORDER BY 5 DESC") +
			"\n# raise max_connections, or, if the role has a limit of its own:\n" +
			statements(cl, "ALTER ROLE "+postgres.QuoteRole(role)+" CONNECTION LIMIT -1")
	case postgres.NotRefused:
	}
	return "see in the server's log why it does not let " + role + " in"
}

// makeRole makes the role, with all it needs.
func (e *examination) makeRole(cl cluster) string {
	alter := e.altered(cl)
	if e.mayRestart() {
		alter = append(alter, archiveMode, walLevel)
		if e.streams() {
			alter = append(alter, maxWALSenders)
		}
		slices.Sort(alter)
		alter = slices.Compact(alter)
	}
	sql := append(postgres.CreateRole(cl.DatabaseUser), postgres.Grants(cl.Version, cl.DatabaseUser, alter...)...)
	if e.streams() {
		sql = append(sql, postgres.GrantReplication(cl.DatabaseUser))
	}
	if cl.isReplica() {
		return "# on its primary, whose roles and grants a replica has:\n" + statements(cl, sql...)
	}
	return statements(cl, sql...)
}

// admit puts lines for our role into pg_hba.conf and pg_ident.conf. The runner connects as the operating system user who
// owns the instance; a role by another name takes a map. The role itself is made, too, if there is none: that shows only
// once it is let in.
func (e *examination) admit(cl cluster) string {
	role := cl.DatabaseUser
	databases := []string{"all"}
	if e.streams() {
		databases = append(databases, "replication") // which "all" does not mean
	}
	remedy := admitTo(cl, databases...)
	if role == cl.Owner || cl.isReplica() {
		return remedy
	}
	return remedy + "\n# and, if the role is not there yet:\n" + e.makeRole(cl)
}

// admitTo puts a line into pg_hba.conf for each of the databases, before all others, and what they need into pg_ident.conf.
func admitTo(cl cluster, databases ...string) string {
	role := cl.DatabaseUser
	method := "peer"
	var commands []string
	if role != cl.Owner {
		method = "peer map=pgark"
		commands = append(commands, "echo "+quoteLine("pgark "+hbaWord(cl.Owner)+" "+hbaWord(role))+" | "+sudo()+"tee -a "+word(cl.identFile))
	}
	// There is a first line: a server does not take a file without rules.
	first := sudo() + "sed -i --follow-symlinks"
	for _, database := range databases {
		first += " -e " + quoteLine("1i local "+database+" "+hbaWord(role)+" "+method)
	}
	commands = append([]string{first + " " + word(cl.hbaFile)}, commands...)
	return strings.Join(append(commands, reload(cl)), " && ")
}

// hbaWord quotes a name for pg_hba.conf where it would mean something else, or has to be (hba.c, next_token).
func hbaWord(name string) string {
	switch name {
	case "all", "replication", "sameuser", "samerole", "samegroup":
		return `"` + name + `"`
	}
	if strings.ContainsAny(name, " \t,#\"") || strings.HasPrefix(name, "+") || strings.HasPrefix(name, "@") || strings.HasPrefix(name, "/") {
		return `"` + strings.ReplaceAll(name, `"`, `""`) + `"`
	}
	return name
}

// quoteLine quotes a line of text for a shell.
func quoteLine(s string) string { return "'" + strings.ReplaceAll(s, "'", `'\''`) + "'" }

// makeSocket gives a server a unix socket.
func makeSocket(cl cluster) string {
	dir := "/tmp"
	if info, err := os.Stat("/var/run/postgresql"); err == nil && info.IsDir() {
		dir = "/var/run/postgresql"
	}
	return "echo " + quoteLine("unix_socket_directories = '"+dir+"'") + " | " + sudo() + "tee -a " + word(cl.configFile) + " && " + restartCommand(cl)
}
