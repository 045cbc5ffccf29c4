package daemon

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"

	"github.com/pgark/terraform-provider-pgark/internal/engine/job"
	"github.com/pgark/terraform-provider-pgark/internal/engine/repository"
	"github.com/pgark/terraform-provider-pgark/internal/engine/wal"
)

// drainAgain is the wait before WAL of an earlier cluster is tried again.
const drainAgain = 30 * time.Second

// keepPlaces makes the file durable: forgetting a place would lose what lies there.
func (d *daemon) keepPlaces(all []job.SpoolPlace) error {
	b, err := json.MarshalIndent(all, "", "  ")
	if err != nil {
		return err
	}
	name := d.o.Layout.SpoolPlacesFile(d.o.Job, d.o.Instance)
	f, err := os.OpenFile(name+".new", os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	_, err = f.Write(append(b, '\n'))
	if err == nil {
		err = f.Sync()
	}
	if e := f.Close(); err == nil {
		err = e
	}
	if err == nil {
		err = os.Rename(name+".new", name)
	}
	if err != nil {
		return err
	}
	dir, err := os.Open(filepath.Dir(name))
	if err != nil {
		return err
	}
	defer dir.Close()
	return dir.Sync()
}

// spoolFor is the directory for WAL that waits for a repository. The shipper makes one in it for each cluster.
func (d *daemon) spoolFor(c config, repository string) string {
	return filepath.Join(d.o.Layout.SpoolDirectory(c.job, d.o.Instance), fmt.Sprintf("%.8s", repository))
}

// spool is where a protection's WAL waits. What was put into a place is brought to the repository even when the job names
// another folder by now, or another cluster lives in the data directory. Only its own repository has a use for it: nobody
// else's keys open it.
type spool struct {
	used      string           // of this series
	wanted    string           // what used would be as the job is declared
	leftovers []job.SpoolPlace // of series of earlier clusters
}

// choosePlace decides where WAL waits while the repository is away. As long as some waits where an earlier job file said,
// that is the place: files in two folders would not be stored in order. It also finds what waits there for other series.
func (p *protection) choosePlace(c config) error {
	d := p.d
	repo := p.repo.Description().ID
	p.spool.wanted = filepath.Join(d.spoolFor(c, repo), p.systemID.String())
	here := job.SpoolPlace{Directory: p.spool.wanted, Repository: repo, URL: p.stores.url, SystemID: p.systemID}
	all, err := d.o.Layout.SpoolPlaces(d.o.Job, d.o.Instance)
	if err != nil {
		return err
	}
	var keep []job.SpoolPlace
	for _, e := range all {
		if e.Directory == p.spool.wanted {
			continue
		}
		n, err := wal.CountSpooled(e.Directory)
		if err != nil {
			return fmt.Errorf("WAL that PostgreSQL was told is safe may wait in %s: %w", e.Directory, err)
		}
		if n == 0 {
			_ = os.Remove(e.Directory) // it is ours; what else may lie in it keeps it
			continue
		}
		keep = append(keep, e)
		switch {
		case e.Repository != repo:
			d.log.Error("wal that was meant for another repository waits in a temporary folder: declare that repository again, or remove the folder",
				"directory", e.Directory, "files", n, "repository", e.URL)
		case e.SystemID != p.systemID:
			p.spool.leftovers = append(p.spool.leftovers, e)
		default:
			if err := unix.Access(e.Directory, unix.W_OK); err != nil {
				return fmt.Errorf("%d WAL files that PostgreSQL was told are safe wait in the former temporary folder %s: %w; make it writable for the runner until they are stored", n, e.Directory, err)
			}
			d.log.Warn("wal waits in the former temporary folder: it is used until that is stored", "directory", e.Directory, "files", n, "declared", p.spool.wanted)
			here.Directory = e.Directory
		}
	}
	p.spool.used = here.Directory
	if p.spool.used == p.spool.wanted {
		keep = append(keep, here)
	}
	return d.keepPlaces(keep)
}

// moved tells whether the temporary folder that is used is not the one that is declared, and nothing waits in it.
func (p *protection) moved() bool {
	if p.spool.used == p.spool.wanted {
		return false
	}
	n, err := wal.CountSpooled(p.spool.used)
	return err == nil && n == 0
}

// drain brings what waits for the series of an earlier cluster to the repository.
func (p *protection) drain(ctx context.Context, e job.SpoolPlace) {
	log := p.d.log.With("directory", e.Directory)
	id := p.series.ID()
	id.SystemID = e.SystemID
	log.Info("wal of an earlier cluster waits in a temporary folder: it is stored now", "series", id.String())
	for {
		err := drain(ctx, log, p.repo.Series(id), e.Directory)
		if err == nil {
			log.Info("no wal of an earlier cluster waits any more", "series", id.String())
			_ = os.Remove(e.Directory) // what else lies in it keeps it
			return
		}
		if ctx.Err() != nil {
			return
		}
		log.Warn("store wal of an earlier cluster: it is tried again", "error", err, "in", drainAgain)
		select {
		case <-ctx.Done():
			return
		case <-time.After(drainAgain):
		}
	}
}

func drain(ctx context.Context, log *slog.Logger, series *repository.Series, dir string) error {
	spool, err := wal.OpenSpool(dir, 0)
	if err != nil {
		return err
	}
	var left error
	for _, name := range spool.Names() {
		if err := drainFile(ctx, log, series, spool, name); err != nil {
			left = err
		}
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
	}
	return left
}

// drainFile stores one file. What is damaged, or in the repository with other content, stays where people find it.
func drainFile(ctx context.Context, log *slog.Logger, series *repository.Series, spool *wal.Spool, name string) error {
	var damaged *wal.DamagedError
	var conflict *repository.WALConflictError
	w, err := spool.Read(name, series.ReadSealed)
	if err == nil {
		_, _, err = series.PutSealed(ctx, w)
		err = errors.Join(err, w.Close())
	}
	switch {
	case err == nil:
		return spool.Remove(name)
	case errors.As(err, &damaged), errors.As(err, &conflict):
		// Trying again would not help. It is for people to look at, who are told once.
		log.Error("wal of an earlier cluster cannot be stored; the file is set aside", "name", name, "error", err)
		return spool.SetAside(name)
	}
	return err
}
