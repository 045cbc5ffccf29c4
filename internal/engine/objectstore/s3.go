package objectstore

import (
	"context"
	"errors"
)

const maxPut = 5 << 30 // bytes; S3's limit for one PUT

func openS3(ctx context.Context, loc Location, bucket, prefix string, o Options) (Store, error) {
	return nil, errors.New("s3 is on its way")
}
