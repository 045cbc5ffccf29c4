package objectstore_test

import (
	"fmt"
	"sync/atomic"
	"testing"

	"github.com/pgark/terraform-provider-pgark/internal/engine/objectstore"
	"github.com/pgark/terraform-provider-pgark/internal/engine/objectstore/storetest"
	"github.com/pgark/terraform-provider-pgark/test/s3test"
)

func open(t *testing.T, loc objectstore.Location, o objectstore.Options) objectstore.Store {
	t.Helper()
	s, err := objectstore.Open(t.Context(), loc, o)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// smallParts lets objects go up in parts that are large enough for S3, yet small enough for tests.
var smallParts = objectstore.Options{PartThreshold: 5 << 20}

func TestS3(t *testing.T) {
	server := s3test.Start(t)
	var n atomic.Int64
	storetest.Run(t, storetest.Config{New: func(t *testing.T) objectstore.Store {
		return open(t, server.Location(fmt.Sprintf("bucket/prefix/%d", n.Add(1))), smallParts)
	}})
}
