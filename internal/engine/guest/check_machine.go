//go:build linux

package guest

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/user"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/pgark/terraform-provider-pgark/internal/engine/postgres"
)

// roomForRunners is what has to be free where the runner's binary goes: the one that runs and its successor, beside each
// other while one is replaced.
const roomForRunners = 64 << 20

func (e *examination) operatingSystem() {
	c := Check{Name: "operating_system", Status: Pass, Found: "Linux", Expected: "Linux"}
	var u unix.Utsname
	if err := unix.Uname(&u); err == nil {
		c.Found = "Linux " + unix.ByteSliceToString(u.Release[:]) + ", " + unix.ByteSliceToString(u.Machine[:])
	}
	e.add(c)
}

func (e *examination) executablePlace() {
	lib := e.g.layout.LibDirectory()
	c := Check{Name: "executable_place", Status: Pass, Found: lib, Expected: "a directory where programs can be put, and run by the owner of PostgreSQL"}
	for _, dir := range []string{existing(lib), existing(filepath.Dir(e.g.layout.BinaryLink()))} {
		if found, remedy := e.judgePlace(dir, lib); found != "" {
			c.Status, c.Found, c.Remedy = Fail, found, remedy
			break
		}
	}
	e.add(c)
}

// judgePlace says what is wrong with a directory that programs are to lie in; "" if nothing is.
func (e *examination) judgePlace(dir, lib string) (found, remedy string) {
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err != nil {
		return fmt.Sprintf("%s: %v", dir, err), "see why " + dir + " cannot be looked at; stat -f " + word(dir) + " shows the same"
	}
	if st.Flags&unix.ST_RDONLY != 0 {
		return dir + " is on a file system that is mounted read-only", remount(dir, "rw")
	}
	if st.Flags&unix.ST_NOEXEC != 0 {
		return dir + " is on a file system that is mounted noexec", remount(dir, "exec")
	}
	for _, o := range e.owners() {
		// What does not exist yet is made for everybody to pass.
		if blocked, err := o.mayReach(filepath.Join(dir, "pgark")); err == nil && blocked != "" {
			return fmt.Sprintf("%s may not pass %s on the way to %s", o, blocked, lib), sudo() + "chmod o+x " + word(blocked)
		}
	}
	if _, err := os.Stat(e.g.layout.BinaryLink()); err == nil {
		return "", "" // deployed: the owner of an instance, who may look, need not write
	}
	if err := unix.Access(dir, unix.W_OK|unix.X_OK); err != nil {
		return dir + " is not writable for the user that deploys pgark", e.g.becomeRoot()
	}
	if free := int64(st.Bavail) * st.Bsize; free < roomForRunners {
		return fmt.Sprintf("%s has %s free, expected %s", dir, bytesText(free), bytesText(roomForRunners)), fullRemedy(dir)
	}
	return "", ""
}

// fullRemedy shows what fills a file system: which of it may go is not ours to say.
func fullRemedy(dir string) string {
	return "# free space there; this shows what takes it:\n" + sudo() + "du -xh $(findmnt -no TARGET -T " + word(dir) + ") | sort -h | tail -n 20"
}

// ourName is the user that we are, by number where it has no name.
func ourName() string {
	if u, err := user.LookupId(strconv.Itoa(os.Geteuid())); err == nil {
		return u.Username
	}
	return strconv.Itoa(os.Geteuid())
}

// becomeRoot says how the user who deploys gets the right to.
func (g *local) becomeRoot() string {
	name := ourName()
	return "# over SSH: log in as root, or let " + name + " use sudo (provider: ssh = { sudo = \"auto\" }) with these lines, written by root:\n" +
		SudoersRemedy(name, g.layout) +
		"\n# on this machine itself (connection type \"local\"): run terraform, or pgark, as root"
}

// reserve is what the temporary folder leaves free of the file system that it lies on: 5 %, and at least 1 GiB. PostgreSQL
// may need it more.
func reserve(st unix.Statfs_t) int64 {
	return max(1<<30, int64(st.Blocks)*st.Bsize/20)
}

// temporaryFolder judges the directory that takes WAL while the repository is away. One that is declared has to exist:
// where it was to be mounted, and is not, nobody wants it made.
func (e *examination) temporaryFolder() {
	folder := e.job.WAL.TempFolder
	need := int64(2 * postgres.DefaultSegmentSize)
	for _, cl := range e.clusters {
		need = max(need, 2*int64(cl.WALSegment))
	}
	need = max(need, e.job.WAL.TempFolderLimit)
	c := Check{
		Name: "temporary_folder", Status: Pass, Found: folder,
		Expected: fmt.Sprintf("a directory that the owner of PostgreSQL may write to, with %s free", bytesText(need)),
	}
	fail := func(found, remedy string) { c.Status, c.Found, c.Remedy = Fail, found, remedy }
	owner := "postgres"
	if owners := e.owners(); len(owners) > 0 {
		owner = owners[0].String()
	}
	if folder == "" {
		e.defaultFolder(&c, need)
		e.add(c)
		return
	}
	create := fmt.Sprintf("%sinstall -d -o %s -m 0700 %s", sudo(), owner, word(folder))
	info, err := os.Stat(folder)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		if above := existing(folder); !readOnly(above) {
			fail(folder+" does not exist", create)
		} else {
			fail(folder+" does not exist, and "+above+" is on a file system that is mounted read-only", remount(above, "rw")+" && "+create)
		}
	case err != nil:
		fail(err.Error(), "name another directory in wal.temp_folder, or see why this one cannot be looked at")
	case !info.IsDir():
		fail(folder+" is no directory", "name a directory in wal.temp_folder")
	case readOnly(folder):
		fail(folder+" is on a file system that is mounted read-only", remount(folder, "rw"))
	default:
		for _, o := range e.owners() {
			if blocked, err := o.mayReach(folder); err == nil && blocked != "" {
				fail(fmt.Sprintf("%s may not pass %s", o, blocked), sudo()+"chmod o+x "+word(blocked))
			} else if !o.may(info, mayRead|mayWrite|mayExecute) {
				fail(fmt.Sprintf("%s belongs to %s with mode %04o; %s may not write to it", folder, ownerOf(info), info.Mode().Perm(), o),
					fmt.Sprintf("%schown %s %s && %schmod u+rwx %s", sudo(), o, word(folder), sudo(), word(folder)))
			}
		}
		if c.Status == Pass {
			e.roomInFolder(&c, folder, need)
		}
	}
	e.add(c)
}

// defaultFolder judges the directories that are used where none is declared. The runner makes them.
func (e *examination) defaultFolder(c *Check, need int64) {
	c.Found = e.g.layout.StateRoot()
	for _, cl := range e.clusters {
		folder := e.g.layout.SpoolDirectory(e.job, cl.Name)
		if len(e.clusters) == 1 {
			c.Found = folder
		}
		info, err := os.Stat(folder)
		if err != nil {
			continue // that is usual, and what is above it is looked at below
		}
		if o, err := lookupAccount(cl.Owner); err == nil && !o.may(info, mayRead|mayWrite|mayExecute) {
			c.Status, c.Found = Fail, fmt.Sprintf("%s belongs to %s with mode %04o; %s may not write to it", folder, ownerOf(info), info.Mode().Perm(), o)
			c.Remedy = fmt.Sprintf("%schown %s %s && %schmod u+rwx %s", sudo(), o, word(folder), sudo(), word(folder))
			return
		}
	}
	if dir := existing(c.Found); readOnly(dir) {
		c.Status, c.Found, c.Remedy = Fail, dir+" is on a file system that is mounted read-only", remount(dir, "rw")
		return
	}
	e.roomInFolder(c, c.Found, need)
}

// roomInFolder judges the room where a folder is, or will be. Without a declaration nobody counts on there being any: then
// WAL waits in pg_wal, as it always can.
func (e *examination) roomInFolder(c *Check, folder string, need int64) {
	var st unix.Statfs_t
	if err := unix.Statfs(existing(folder), &st); err != nil {
		c.Status, c.Found, c.Remedy = Fail, fmt.Sprintf("%s: %v", folder, err), "name another directory in wal.temp_folder"
		return
	}
	free := int64(st.Bavail) * st.Bsize
	c.Found = fmt.Sprintf("%s with %s free", folder, bytesText(free))
	other := "\n# or name another wal.temp_folder"
	declared := e.job.WAL.TempFolder != "" || e.job.WAL.TempFolderLimit > 0
	switch {
	case free < need && declared:
		c.Status, c.Remedy = Fail, fullRemedy(folder)+other+", or lower wal.temp_folder_limit"
	case free < need+reserve(st):
		c.Status = Warn
		c.Found += fmt.Sprintf(", of which %s stay free: while the repository is away, WAL will wait in pg_wal instead", bytesText(reserve(st)))
		c.Remedy = fullRemedy(folder) + other
	case st.Files > 0 && st.Ffree < 64: // file systems without a table of inodes say 0 of both
		c.Status, c.Found, c.Remedy = Fail, c.Found+", and no inodes", fullRemedy(folder)+other
	}
}

// readOnly tells whether a path lies on a file system that is mounted read-only.
func readOnly(path string) bool {
	var st unix.Statfs_t
	return unix.Statfs(path, &st) == nil && st.Flags&unix.ST_RDONLY != 0
}

func (e *examination) clusterManager() {
	c := Check{Name: "cluster_manager", Status: Pass, Found: "none", Expected: "none: this build does not follow a switch to another machine"}
	var found, names []string
	for _, cl := range e.clusters {
		for _, m := range cl.managers {
			found = append(found, fmt.Sprintf("%s (process %d) manages %s", m.name, m.pid, cl.Name))
			names = append(names, m.name)
		}
	}
	if len(found) > 0 {
		c.Status, c.Found = Warn, strings.Join(found, ", ")
		c.Remedy = "leave archive_mode, archive_command and archive_library out of what " + names[0] + " manages; when another machine becomes the primary, WAL comes from there no more"
	}
	e.add(c)
}

func bytesText(n int64) string {
	switch {
	case n >= 1<<30:
		return fmt.Sprintf("%.1f GiB", float64(n)/(1<<30))
	case n >= 1<<20:
		return fmt.Sprintf("%.0f MiB", float64(n)/(1<<20))
	}
	return fmt.Sprintf("%d bytes", n)
}
