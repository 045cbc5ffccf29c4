package daemon

import (
	"context"
	"errors"

	"github.com/pgark/terraform-provider-pgark/internal/engine/repository"
)

func (p *protection) takeImage(ctx context.Context, progress func(string)) (*repository.ImageInfo, error) {
	return nil, errors.New("unimplemented")
}

func (p *protection) retain(ctx context.Context) {}
