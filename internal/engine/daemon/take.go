package daemon

import (
	"context"
	"math"
	"time"

	"github.com/pgark/terraform-provider-pgark/internal/engine/daemon/control"
	"github.com/pgark/terraform-provider-pgark/internal/engine/image"
	"github.com/pgark/terraform-provider-pgark/internal/engine/job"
	"github.com/pgark/terraform-provider-pgark/internal/engine/repository"
	"github.com/pgark/terraform-provider-pgark/internal/engine/retention"
)

// takeImage takes one image, as the job file says now.
func (p *protection) takeImage(ctx context.Context, kind control.Kind, progress func(line string)) (*repository.ImageInfo, error) {
	c := p.d.current()
	begun := false
	limitMemory(math.MaxInt64)
	defer limitMemory(memoryLimit)
	info, err := image.Take(ctx, image.Options{
		Series: p.series, Instance: c.instance, Plan: c.job.Image, Host: p.d.host, MachineID: p.machine,
		ForceFull:      kind == control.FullKind,
		StateDirectory: p.d.o.Layout.StateDirectory(p.d.o.Job, p.d.o.Instance),
		WaitWAL:        p.shipper.Wait,
		Log:            p.d.log,
		Progress: func(s image.Progress) {
			if !begun && s.SID != 0 {
				begun = true
				p.d.log.Info("image begun", "id", s.SID.String(), "kind", s.Kind)
			}
			progress(s.String())
		},
	})
	if err != nil {
		return nil, err
	}
	return &info, nil
}

// retain applies what the job declares to be kept, after an image, when the guest is to do it. Without any declaration
// nothing is deleted but what images that failed have left behind.
func (p *protection) retain(ctx context.Context) {
	c := p.d.current()
	declared := c.job.WALRetention
	if declared != nil && declared.EnforcedBy != "guest" {
		return
	}
	if declared == nil && c.job.Image.Retention == (job.ImageRetention{}) {
		collected, err := p.series.Collect(ctx, false)
		if err != nil {
			p.d.log.Warn("collect what failed images left: it is tried again after the next image", "error", err)
		} else if collected.Objects > 0 {
			p.d.log.Info("collected what failed images left", "objects", collected.Objects, "bytes", collected.Bytes)
		}
		return
	}
	r, err := retention.Run(ctx, p.series, retention.PolicyOf(c.job), time.Now)
	if err != nil {
		p.d.log.Error("retention: it is tried again after the next image", "error", err)
	}
	if r != nil && (len(r.ExpiredImages) > 0 || r.WALFiles > 0 || r.Tails > 0 || r.GarbageObjects > 0) {
		p.d.log.Info("retention", "expired_images", r.ExpiredImages, "wal_files", r.WALFiles, "wal_bytes", r.WALBytes,
			"tails", r.Tails, "tail_bytes", r.TailBytes,
			"garbage_objects", r.GarbageObjects, "garbage_bytes", r.GarbageBytes)
	}
}
