//go:build linux

package guest

import (
	"context"
	"errors"
	"fmt"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"

	"github.com/pgark/terraform-provider-pgark/internal/engine/job"
	"github.com/pgark/terraform-provider-pgark/internal/engine/objectstore"
	"github.com/pgark/terraform-provider-pgark/internal/engine/repository"
)

// pgark is not older than this: a clock that shows less is wrong.
var clockNotBefore = time.Date(2026, 11, 1, 0, 0, 0, 0, time.UTC)

// clockTolerance is how far the clocks of this machine and of others that write to the repository may be apart. S3
// refuses requests that are 15 minutes off.
const clockTolerance = 5 * time.Minute

// foundRepository is what looking at the repository gave.
type foundRepository struct {
	id     string
	newest time.Time // the time of the newest change that we looked at
	err    error
}

// lookAtRepository looks whether the repository can be used from here, and when it was changed.
func (e *examination) lookAtRepository(ctx context.Context) foundRepository {
	ctx, cancel := context.WithTimeout(ctx, 20*time.Second)
	defer cancel()
	var f foundRepository
	store, err := objectstore.Open(ctx, e.job.Location(e.keys), objectstore.Options{AttemptTimeout: 8 * time.Second, MaxElapsed: 4 * time.Second})
	if err != nil {
		f.err = err
		return f
	}
	repo, err := repository.Open(ctx, store)
	if err != nil {
		f.err = err
		return f
	}
	f.id, f.newest = repo.Description().ID, repo.Description().CreatedAt
	owner, err := repo.JobOwner(ctx, e.job.Name)
	switch {
	case errors.Is(err, objectstore.ErrNotExist):
	case err != nil:
		f.err = err
		return f
	default:
		if owner.ClaimedAt.After(f.newest) {
			f.newest = owner.ClaimedAt
		}
		if machine, err := job.MachineID(e.g.layout); err != nil || machine != owner.MachineID {
			f.err = &repository.OwnedError{Repository: store.URL(), Job: e.job.Name, Owner: owner, Claimant: repository.Owner{MachineID: machine, Host: e.job.Host}}
			return f
		}
	}
	f.err = e.directoryUsable()
	return f
}

func (e *examination) repository(f foundRepository) {
	c := Check{Name: "repository_reachable", Status: Pass, Found: "repository " + e.job.Repository.URL, Expected: "a repository that this machine may use"}
	if f.err != nil {
		e.explain(&c, f.err)
		e.causes = append(e.causes, f.err)
	} else {
		c.Found += " (id " + f.id + ")"
	}
	e.add(c)
}

// explain gives each way in which a repository is out of reach its own words.
func (e *examination) explain(c *Check, err error) {
	c.Status = Fail
	c.Found = err.Error()
	url := e.job.Repository.URL
	declare := "declare it: resource \"pgark_repository\" \"main\" { url = \"" + url + "\" }, and let the job refer to it: repository = pgark_repository.main.url"
	dir := directoryOf(url)
	var owned *repository.OwnedError
	var newer *repository.FormatError
	var directory *directoryError
	var failed *objectstore.Error
	errors.As(err, &failed)
	switch {
	case errors.As(err, &owned):
		c.Expected = "a job name that is free, or this machine's"
		c.Remedy = "# give the job another name; or, if this machine takes the place of " + owned.Owner.Host + " for good, give it that machine's identity:\n" +
			sudo() + "mkdir -p " + word(e.g.layout.ConfigDirectory()) + " && echo " + word(owned.Owner.MachineID) + " | " + sudo() + "tee " + word(e.g.layout.MachineIDFile())
	case errors.As(err, &directory):
		c.Expected, c.Remedy = "a directory that the owner of PostgreSQL may use", directory.remedy
	case errors.As(err, &newer):
		c.Expected, c.Remedy = "a repository that this version of pgark reads", "update the provider: terraform init -upgrade"
	case errors.Is(err, repository.ErrNoRepository):
		c.Found = "no repository in " + url
		c.Expected = "a repository, as pgark_repository creates it"
		c.Remedy = declare
	case errors.Is(err, objectstore.ErrNoBucket) && dir != "":
		c.Expected = "a bucket (or directory) that exists"
		c.Remedy = e.makeDirectory(dir) + "\n# and " + declare
	case errors.Is(err, objectstore.ErrNoBucket):
		c.Expected = "a bucket (or directory) that exists"
		c.Remedy = "compare the name in " + url + ", and the endpoint, with where the bucket is; pgark creates none"
	case errors.Is(err, objectstore.ErrRegion):
		c.Expected = "a bucket in the region that is declared"
		c.Remedy = "set the repository's region to the bucket's"
		if failed != nil && failed.Hint != "" {
			c.Remedy = failed.Hint
		}
	case errors.Is(err, objectstore.ErrAccess) && dir != "":
		c.Expected = "a directory that this user may use"
		c.Remedy = e.makeDirectory(dir)
	case errors.Is(err, objectstore.ErrAccess):
		c.Expected = "S3 keys that are valid and may list, read and create objects below " + url
		c.Remedy = "check the access key and its policy (s3:GetObject, s3:PutObject, s3:ListBucket, s3:DeleteObject), and the clock of this machine"
		if failed != nil && failed.Hint != "" {
			c.Remedy += ": " + failed.Hint
		}
	default:
		c.Expected = "an answer of the store"
		c.Remedy = "check network, name resolution, endpoint and certificates from this machine"
		if failed != nil && failed.Hint != "" {
			c.Remedy += ": " + failed.Hint
		}
	}
}

// makeDirectory makes a directory, or gives one that is there, to the owner of the instances.
func (e *examination) makeDirectory(dir string) string {
	owner := "postgres"
	if owners := e.owners(); len(owners) > 0 {
		owner = owners[0].String()
	}
	return fmt.Sprintf("%sinstall -d -o %s -m 0750 %s", sudo(), owner, word(dir))
}

// directoryError says that the owner of an instance may not use a repository in a directory.
type directoryError struct{ found, remedy string }

func (e *directoryError) Error() string { return e.found }

// directoryUsable judges a file:// repository: the runner works there as the owner of the instance. What belongs to root
// is handed over when the job is applied.
func (e *examination) directoryUsable() error {
	dir := directoryOf(e.job.Repository.URL)
	if dir == "" {
		return nil
	}
	info, err := os.Stat(dir)
	if err != nil {
		return err
	}
	if readOnly(dir) {
		return &directoryError{dir + " is on a file system that is mounted read-only", remount(dir, "rw")}
	}
	for _, o := range e.owners() {
		if blocked, err := o.mayReach(dir); err == nil && blocked != "" {
			return &directoryError{fmt.Sprintf("%s may not pass %s on the way to %s", o, blocked, dir), sudo() + "chmod o+x " + word(blocked)}
		}
		if status(info).Uid != 0 && !o.may(info, mayRead|mayWrite|mayExecute) {
			return &directoryError{
				fmt.Sprintf("%s belongs to %s with mode %04o; %s may not write to it", dir, ownerOf(info), info.Mode().Perm(), o),
				fmt.Sprintf("%schown -R %s %s && %schmod u+rwx %s", sudo(), o, word(dir), sudo(), word(dir)),
			}
		}
	}
	return nil
}

// directoryOf is the directory of a file:// repository; "" for any other.
func directoryOf(repositoryURL string) string {
	u, err := url.Parse(repositoryURL)
	if err != nil || u.Scheme != "file" {
		return ""
	}
	return filepath.Clean(u.Path)
}

// clock compares this machine's clock with what it cannot be before: the release of pgark, and what stands in the
// repository; and with the store's, which refuses requests of another time. A clock that is a little ahead cannot be told
// from one that is right.
func (e *examination) clock(f foundRepository) {
	now := time.Now()
	c := Check{Name: "clock", Status: Pass, Found: now.UTC().Format(time.RFC3339), Expected: "a clock that is right: restore points are found by it"}
	switch {
	case now.Before(clockNotBefore):
		c.Status, c.Expected = Fail, "a time after "+clockNotBefore.Format(time.RFC3339)
	case now.Add(clockTolerance).Before(f.newest):
		c.Status, c.Expected = Fail, "a time after "+f.newest.UTC().Format(time.RFC3339)+", when the repository was last changed"
	case errors.Is(f.err, objectstore.ErrClock):
		c.Status, c.Expected = Fail, "the time of the store, which refuses requests that are 15 minutes off"
	default:
		var t unix.Timex
		if state, err := unix.Adjtimex(&t); err == nil {
			if state == unix.TIME_ERROR {
				c.Found += ", not synchronised as far as the kernel knows"
			} else {
				c.Found += ", synchronised"
			}
		}
	}
	if c.Status == Fail {
		c.Remedy = setClock()
	}
	e.add(c)
}

// setClock sets the clock by what keeps time on this machine.
func setClock() string {
	for _, way := range [][2]string{
		{"chronyc", "chronyc makestep"},
		{"timedatectl", "timedatectl set-ntp true && " + sudo() + "systemctl restart systemd-timesyncd"},
	} {
		if _, err := exec.LookPath(way[0]); err == nil && (way[0] != "timedatectl" || systemdRuns()) {
			return sudo() + way[1] + "\n# or by hand: " + sudo() + "date -u -s 'YYYY-MM-DD hh:mm:ss'"
		}
	}
	return sudo() + "date -u -s 'YYYY-MM-DD hh:mm:ss'  # with the right time; then keep it right, by chrony say"
}
