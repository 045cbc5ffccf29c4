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
	stores   *stores
	repo     *repository.Repository // of stores.patient
	series   *repository.Series
	machine  string
	systemID postgres.SystemID
	segment  postgres.SegmentSize
	dataDir  string
	wal      job.WAL // as it was declared when the protection began
	spool    spool

	shipper   *wal.Shipper
	streaming *streaming // nil in interval mode
	interval  *interval
	images    *images
}

// stores is the repository, opened for those who have different patience, and found to be ours.
type stores struct {
	of      config
	url     string
	patient *repository.Repository // images
	quick   *repository.Repository // whole segments
	hasty   *repository.Repository // tails
}

// refusal tells whether err is another machine's right to the job name.
func refusal(err error) bool {
	var owned *repository.OwnedError
	return errors.As(err, &owned)
}

// open gets everything within reach that protecting takes. It changes nothing but the job's owner, and the sessions
// that an earlier run of this runner has left open. before is the protection that ended, or nil: of the same series in
// the same repository it is known already that it is ours, so that a repository which is away does not keep a new
// setting from being taken over.
func (d *daemon) open(ctx context.Context, c config, before *protection) (*protection, error) {
	pg, err := systemID(c.instance.DataDirectory)
	if err != nil {
		return nil, err
	}
	if err := pg.CheckBuild(); err != nil {
		return nil, err
	}
	p := &protection{
		d: d, systemID: pg.SystemID, segment: pg.WALSegmentSize, dataDir: c.instance.DataDirectory, wal: c.job.WAL,
	}
	if p.machine, err = job.MachineID(d.o.Layout); err != nil {
		return nil, err
	}
	id := repository.SeriesID{Job: d.o.Job, Instance: d.o.Instance, SystemID: pg.SystemID}
	if before != nil && before.stores.of.sameTarget(c) && before.series.ID() == id && before.machine == p.machine {
		p.stores = before.stores
	} else if p.stores, err = d.claim(ctx, c, id, p.machine); err != nil {
		return nil, err
	}
	p.repo = p.stores.patient
	p.series = p.repo.Series(id)
	if c.instance.SystemID != 0 && c.instance.SystemID != pg.SystemID {
		d.log.Warn("the cluster was initialised anew since the job was declared: this is a new series, the old one stays restorable",
			"series", id.String(), "declared_system_identifier", c.instance.SystemID.String())
	}
	if err := p.choosePlace(c); err != nil {
		return nil, err
	}
	p.ctx, p.end = context.WithCancelCause(ctx)
	p.images = newImages(p)
	p.interval = newInterval(p, time.Duration(p.wal.Interval))
	o := wal.Options{
		Series: accounts{p.stores.quick.Series(id), p}, DataDirectory: p.dataDir, SystemID: pg.SystemID, SegmentSize: p.segment,
		Repository: p.stores.url, Host: d.host, AnswerAfter: answerAfter - 2*time.Second,
		Adaptive: p.wal.Compression == "adaptive", SpoolDirectory: filepath.Dir(p.spool.used), SpoolLimit: p.wal.TempFolderLimit,
		Gap: p.gap, Log: d.log,
	}
	if p.wal.Mode == job.WALContinuous {
		if p.streaming, err = newStreaming(p, p.stores.hasty.Series(id), c); err != nil {
			p.end(err)
			return nil, err
		}
		o.MaxLag, o.Stored, o.Streaming = time.Duration(p.wal.MaxLag), p.streaming.stored, p.streaming.holds
	}
	if p.shipper, err = wal.New(o); err != nil {
		p.end(err)
		return nil, err
	}
	return p, nil
}

// claim opens the repository, and makes sure that the job's name is ours there.
func (d *daemon) claim(ctx context.Context, c config, id repository.SeriesID, machine string) (*stores, error) {
	s := &stores{of: c}
	var err error
	for _, open := range []struct {
		repo **repository.Repository
		o    objectstore.Options
	}{{&s.quick, impatient}, {&s.hasty, hasty}, {&s.patient, objectstore.Options{}}} {
		if *open.repo, s.url, err = d.openRepository(ctx, c, open.o); err != nil {
			return nil, err
		}
	}
	claimant := repository.Owner{MachineID: machine, Host: d.host, ClaimedAt: time.Now().UTC()}
	if _, err := s.quick.ClaimJob(ctx, d.o.Job, claimant, ""); err != nil {
		return nil, err
	}
	// Whoever holds the instance's lock on this machine is the only one to take its images: what is open is left over.
	evicted, err := s.quick.Series(id).Evict(ctx, func(s repository.OpenSession) bool {
		return s.Kind != repository.SessionImage || s.MachineID != machine
	})
	if err != nil {
		return nil, fmt.Errorf("end what an earlier run left open: %w", err)
	}
	if len(evicted) > 0 {
		d.log.Warn("an earlier run was cut off while it took an image: what it uploaded will be collected", "sessions", fmt.Sprint(evicted))
	}
	return s, nil
}

// impatient makes the store of WAL, which has a queue of its own that tries again: it is to learn soon that the
// repository is away, so that the next request is answered no without waiting.
var impatient = objectstore.Options{AttemptTimeout: 20 * time.Second, MaxElapsed: 5 * time.Second}

// hasty makes the store of tails, which are small: one that takes long is overtaken by the next, which holds it.
var hasty = objectstore.Options{AttemptTimeout: 10 * time.Second, MaxElapsed: 3 * time.Second}

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
	if p.streaming != nil {
		wg.Go(func() { p.streaming.run(p.ctx) })
		wg.Go(func() { p.watchLag(p.ctx) })
	} else {
		wg.Go(func() { p.interval.run(p.ctx) })
	}
	for _, left := range p.spool.leftovers {
		wg.Go(func() { p.drain(p.ctx, left) })
	}
	wg.Go(func() { p.images.run(p.ctx) })
	wg.Go(func() { p.watch(p.ctx) })
	wg.Wait()

	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), grace/2)
	defer cancel()
	if err := p.shipper.EndSession(ctx); err != nil {
		p.d.log.Warn("the account of the last stretch of wal shipping is lost, the wal is not", "error", err)
	}
}

// watch ends the protection when another cluster lives in the data directory, or when the temporary folder can be changed
// to the one that is declared.
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
		if p.moved() {
			p.d.log.Info("what waited in the former temporary folder is stored", "directory", p.spool.used, "declared", p.spool.wanted)
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

// reopenSoon ends the protection so that the next one begins with other settings: at once, or when the image that is
// being taken is there. An image may have hours behind it.
func (p *protection) reopenSoon() {
	t := p.images.taking()
	if t == nil {
		p.end(errReopen)
		return
	}
	p.d.log.Info("the job's settings for wal are taken over when the image is there that is being taken")
	go func() {
		select {
		case <-t.done:
			p.end(errReopen)
		case <-p.ctx.Done():
		}
	}()
}
