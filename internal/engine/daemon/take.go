package daemon

import (
	"context"

	"github.com/pgark/terraform-provider-pgark/internal/engine/image"
	"github.com/pgark/terraform-provider-pgark/internal/engine/repository"
)

// takeImage takes one image, as the job file says now.
func (p *protection) takeImage(ctx context.Context, progress func(line string)) (*repository.ImageInfo, error) {
	c, _ := p.d.current()
	info, err := image.Take(ctx, image.Options{
		Series: p.series, Instance: c.instance, Plan: c.job.Image, Host: p.d.host, MachineID: p.machine,
		StateDirectory: p.d.o.Layout.StateDirectory(p.d.o.Job, p.d.o.Instance),
		WaitWAL:        p.shipper.Wait,
		Progress:       func(s image.Progress) { progress(s.String()) },
		Log:            p.d.log,
	})
	if err != nil {
		return nil, err
	}
	return &info, nil
}

func (p *protection) retain(ctx context.Context) {}
