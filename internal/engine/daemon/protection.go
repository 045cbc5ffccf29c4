package daemon

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"sync"
	"time"

	"github.com/pgark/terraform-provider-pgark/internal/engine/job"
	"github.com/pgark/terraform-provider-pgark/internal/engine/objectstore"
	"github.com/pgark/terraform-provider-pgark/internal/engine/postgres"
	"github.com/pgark/terraform-provider-pgark/internal/engine/repository"
	"github.com/pgark/terraform-provider-pgark/internal/engine/wal"
)

// protection is the work on one series: the repository as the job file names it, for the cluster that lives in the data
// directory.
type protection struct {
	d        *daemon
	ctx      context.Context // its cause says why the protection ended
	end      context.CancelCauseFunc
	repo     *repository.Repository
	series   *repository.Series
	machine  string
	systemID postgres.SystemID
	segment  postgres.SegmentSize
	dataDir  string
	shipper  *wal.Shipper
	images   *images
}

// refusal tells whether err is another machine's right to the job name.
func refusal(err error) bool {
	var owned *repository.OwnedError
	return errors.As(err, &owned)
}

// open gets everything within reach that protecting takes. It changes nothing but the job's owner, and the sessions
// that an earlier run of this runner has left open.
func (d *daemon) open(ctx context.Context, c config) (*protection, error) {
	pg, err := systemID(c.instance.DataDirectory)
	if err != nil {
		return nil, err
	}
	if err := pg.CheckBuild(); err != nil {
		return nil, err
	}
	quick, store, err := d.openRepository(ctx, c, impatient)
	if err != nil {
		return nil, err
	}
	patient, _, err := d.openRepository(ctx, c, objectstore.Options{})
	if err != nil {
		return nil, err
	}
	machine, err := job.MachineID(d.o.Layout)
	if err != nil {
		return nil, err
	}
	claimant := repository.Owner{MachineID: machine, Host: d.host, ClaimedAt: time.Now().UTC()}
	if _, err := quick.ClaimJob(ctx, d.o.Job, claimant, ""); err != nil {
		return nil, err
	}
	id := repository.SeriesID{Job: d.o.Job, Instance: d.o.Instance, SystemID: pg.SystemID}
	p := &protection{
		d: d, repo: patient, series: patient.Series(id), machine: machine,
		systemID: pg.SystemID, segment: pg.WALSegmentSize, dataDir: c.instance.DataDirectory,
	}
	// Whoever holds the instance's lock on this machine is the only one to take its images: what is open is left over.
	evicted, err := quick.Series(id).Evict(ctx, func(s repository.OpenSession) bool {
		return s.Kind != repository.SessionImage || s.MachineID != machine
	})
	if err != nil {
		return nil, fmt.Errorf("end what an earlier run left open: %w", err)
	}
	if len(evicted) > 0 {
		d.log.Warn("an earlier run was cut off while it took an image: what it uploaded will be collected", "sessions", fmt.Sprint(evicted))
	}
	if c.instance.SystemID != 0 && c.instance.SystemID != pg.SystemID {
		d.log.Warn("the cluster was initialised anew since the job was declared: this is a new series, the old one stays restorable",
			"series", id.String(), "declared_system_identifier", c.instance.SystemID.String())
	}
	p.ctx, p.end = context.WithCancelCause(ctx)
	p.shipper, err = wal.New(wal.Options{
		Series: quick.Series(id), DataDirectory: c.instance.DataDirectory, SystemID: pg.SystemID, SegmentSize: p.segment,
		Repository: store, Host: d.host, AnswerAfter: answerAfter - 2*time.Second, Log: d.log,
	})
	if err != nil {
		p.end(err)
		return nil, err
	}
	p.images = newImages(p)
	return p, nil
}

// impatient makes the store of WAL, which has a queue of its own that tries again: it is to learn soon that the
// repository is away, so that the next request is answered no without waiting.
var impatient = objectstore.Options{AttemptTimeout: 20 * time.Second, MaxElapsed: 5 * time.Second}

// openRepository also returns the repository's URL.
func (d *daemon) openRepository(ctx context.Context, c config, o objectstore.Options) (*repository.Repository, string, error) {
	r := c.job.Repository
	store, err := objectstore.Open(ctx, objectstore.Location{
		URL: r.URL, Region: r.Region, Endpoint: r.Endpoint, UsePathStyle: r.UsePathStyle, StorageClass: r.StorageClass,
		Credentials: c.credentials,
	}, o)
	if err != nil {
		return nil, "", err
	}
	repo, err := repository.Open(ctx, store)
	if err != nil {
		return nil, "", err
	}
	return repo, store.URL(), nil
}

// run works until p.ctx ends: because the runner stops, or somebody ends the protection.
func (p *protection) run(ctx context.Context) {
	defer p.end(nil)
	var wg sync.WaitGroup
	wg.Go(func() {
		if err := p.shipper.Run(p.ctx); err != nil {
			p.d.log.Error("ship wal", "error", err)
		}
	})
	wg.Go(func() { p.images.run(p.ctx) })
	wg.Go(func() { p.watch(p.ctx) })
	wg.Wait()

	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), grace/2)
	defer cancel()
	if err := p.shipper.EndSession(ctx); err != nil {
		p.d.log.Warn("the account of the last stretch of wal shipping is lost, the wal is not", "error", err)
	}
}

// watch ends the protection when another cluster lives in the data directory.
func (p *protection) watch(ctx context.Context) {
	tick := time.NewTicker(watchEvery)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		// A data directory that is away for a while is a server being restored, or a file system not yet mounted.
		if pg, err := systemID(p.dataDir); err == nil && pg.SystemID != p.systemID {
			p.d.log.Warn("the cluster was initialised anew", "system_identifier", pg.SystemID.String(), "before", p.systemID.String())
			p.end(errReopen)
			return
		}
	}
}

// looksElsewhere tells whether a push failed because another cluster lives in the data directory by now.
func (p *protection) looksElsewhere(err error) bool {
	var invalid *wal.InvalidError
	if !errors.As(err, &invalid) {
		return false
	}
	pg, err := systemID(p.dataDir)
	return err == nil && pg.SystemID != p.systemID
}

func walName(path string) string { return filepath.Base(path) }
