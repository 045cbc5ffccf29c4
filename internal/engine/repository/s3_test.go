package repository

import (
	"bytes"
	"context"
	"math/rand/v2"
	"strings"
	"sync"
	"testing"
	"time"

	"filippo.io/age"

	"github.com/pgark/terraform-provider-pgark/internal/engine/objectstore"
	"github.com/pgark/terraform-provider-pgark/internal/engine/postgres"
	"github.com/pgark/terraform-provider-pgark/test/s3test"
)

// TestS3_withFaults: two machines back up into one series on a real S3 server, through a network that fails every
// twelfth request, while garbage is collected; every image restores.
func TestS3_withFaults(t *testing.T) {
	server := s3test.Start(t)
	proxy := s3test.NewFaultProxy(t, server.Endpoint(), s3test.Faults{})
	identity, err := age.GenerateX25519Identity()
	must(t, err)
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	open := func() *Series {
		store, err := objectstore.Open(ctx, proxy.Through(server.Location("bucket/prefix")), objectstore.Options{})
		must(t, err)
		return newSeries(t, store, []string{identity.Recipient().String()}, []age.Identity{identity})
	}
	look := open()
	var mu sync.Mutex // guards truth
	truth := map[SID]model{}
	finish := func(sid SID, files model) {
		mu.Lock()
		defer mu.Unlock()
		truth[sid] = files
	}
	proxy.Set(s3test.Faults{Rate: 0.08, MaxDelay: 20 * time.Millisecond})
	var writers sync.WaitGroup
	for n := range uint64(2) {
		s := open()
		writers.Go(func() {
			rnd := rand.New(rand.NewPCG(n, 1))
			g := &guest{s: s, options: WriterOptions{PackSize: 64 << 10}, files: model{"base/1": compressible(n, 60*postgres.PageSize)}, finish: finish}
			before := model{}
			for range 5 {
				if _, err := g.backUp(ctx, rnd, before); err != nil {
					t.Error(err)
					return
				}
				before, g.files = g.files, g.files.change(rnd)
				name := string(postgres.MakeSegmentName(1, rnd.Uint64N(5), testSegment))
				if _, _, err := s.PutWAL(ctx, WALInfo{Name: name, Size: 24}, strings.NewReader(name)); err != nil {
					t.Error(err)
				}
				if _, err := s.Collect(ctx, false); err != nil {
					t.Error(err)
				}
			}
		})
	}
	writers.Wait()
	if t.Failed() {
		return
	}
	must(t, look.Expire(ctx, 1, 4, 7))
	if done, err := look.Collect(ctx, false); err != nil || done.Objects == 0 {
		t.Errorf("collected %+v, %v", done, err)
	}
	h, err := look.Head(ctx)
	if err != nil || len(h.Images) != 7 {
		t.Fatalf("%d images, %v", len(h.Images), err)
	}
	for _, image := range h.Images {
		got, err := restore(ctx, look, image.SID)
		if err == nil {
			err = diff(truth[image.SID], got)
		}
		if err != nil {
			t.Errorf("image %s: %v", image.SID, err)
		}
	}
	for e, err := range look.ListWAL(ctx, 1, "") {
		must(t, err)
		var got bytes.Buffer
		if _, err := look.GetWAL(ctx, e.Name, &got); err != nil || got.String() != e.Name {
			t.Errorf("WAL file %s: %q, %v", e.Name, got.String(), err)
		}
	}
	if total, faults := proxy.Counts(); len(faults) == 0 {
		t.Errorf("none of %d requests failed", total)
	}
}
