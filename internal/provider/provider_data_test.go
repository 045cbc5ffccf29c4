package provider

import (
	"context"
	"errors"
	"sync"
	"testing"

	"github.com/hashicorp/terraform-plugin-framework/types"

	"github.com/pgark/terraform-provider-pgark/internal/engine/guest"
	"github.com/pgark/terraform-provider-pgark/internal/engine/job"
	"github.com/pgark/terraform-provider-pgark/internal/engine/objectstore"
)

func TestResolve(t *testing.T) {
	d := newProviderData(world{})
	d.s3.location = repositorySettings{region: "provider-region", endpoint: "http://provider"}
	d.rememberRepository("s3://known/p", knownRepository{settings: repositorySettings{region: "known-region", usePathStyle: true}})

	for name, c := range map[string]struct {
		url  string
		want repositorySettings
	}{
		"a pgark_repository says so":          {"s3://known/p", repositorySettings{region: "known-region", usePathStyle: true}},
		"the same with a slash at the end":    {"s3://known/p/", repositorySettings{region: "known-region", usePathStyle: true}},
		"the query of the URL":                {"s3://b/p?endpoint=http%3A%2F%2Fhere&path_style=true", repositorySettings{region: "provider-region", endpoint: "http://here", usePathStyle: true}},
		"the provider":                        {"s3://b/p", repositorySettings{region: "provider-region", endpoint: "http://provider"}},
		"a directory has nothing of all that": {"file:///srv", repositorySettings{}},
	} {
		t.Run(name, func(t *testing.T) {
			if got := d.resolve(c.url); got != c.want {
				t.Errorf("found %+v, expected %+v", got, c.want)
			}
		})
	}
}

func TestWithSettings(t *testing.T) {
	for want, s := range map[string]repositorySettings{
		"s3://b/p":           {},
		"s3://b/p?region=eu": {region: "eu"},
		"s3://b/p?endpoint=http%3A%2F%2Fh%3A9&path_style=true&region=eu&storage_class=X": {region: "eu", endpoint: "http://h:9", usePathStyle: true, storageClass: "X"},
	} {
		got := withSettings("s3://b/p/?region=other", s)
		if got != want {
			t.Errorf("found %s, expected %s", got, want)
		}
		if err := checkLocation(got); err != nil {
			t.Error(err)
		}
		if plain, back := locationQuery(got); plain != "s3://b/p" || back != s {
			t.Errorf("%s reads as %s, %+v", got, plain, back)
		}
	}
}

func TestCheckLocation(t *testing.T) {
	for url, ok := range map[string]bool{
		"s3://bucket/prefix":                true,
		"s3://bucket":                       true,
		"file:///srv/backup":                true,
		"s3://b/p?region=x&path_style=true": true,
		"s3://":                             false,
		"file://relative":                   false,
		"https://bucket/prefix":             false,
		"s3://b/p?path_style=yes":           false,
		"s3://b/p?secret=x":                 false,
		"s3://key:secret@b/p":               false,
	} {
		if err := checkLocation(url); (err == nil) != ok {
			t.Errorf("%s: found %v", url, err)
		}
	}
}

// asked is a guest that can only be checked, and counts how often it was.
type asked struct {
	guest.Guest

	mu    sync.Mutex
	times int
	err   error
}

func (a *asked) Check(context.Context, guest.CheckRequest) ([]guest.Check, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.times++
	return []guest.Check{{Name: "archive_mode", Status: guest.Pass}}, a.err
}

func TestCheck_asksOnce(t *testing.T) {
	d, g := newProviderData(world{}), &asked{}
	r := guest.CheckRequest{Job: &job.Job{Name: "orders"}, Credentials: &objectstore.Credentials{}}
	var wait sync.WaitGroup
	for range 10 {
		wait.Go(func() {
			if c, err := d.check(context.Background(), g, "db1", r); err != nil || len(c) != 1 {
				t.Errorf("found %v, %v", c, err)
			}
		})
	}
	wait.Wait()
	if g.times != 1 {
		t.Errorf("the guest was asked %d times, expected once", g.times)
	}
	if _, err := d.check(context.Background(), g, "db2", r); err != nil || g.times != 2 {
		t.Errorf("another host was not asked: %v", err)
	}
}

func TestCheck_remembersNoFailure(t *testing.T) {
	d, g := newProviderData(world{}), &asked{err: errors.New("connection refused")}
	r := guest.CheckRequest{Job: &job.Job{Name: "orders"}}
	for range 2 {
		if _, err := d.check(context.Background(), g, "db1", r); err == nil {
			t.Error("expected the failure")
		}
	}
	if g.times != 2 {
		t.Errorf("the guest was asked %d times, expected twice", g.times)
	}
}

func TestShortened(t *testing.T) {
	until := walRetentionModel{UntilImageDeleted: types.BoolValue(true)}
	days := func(n int64) walRetentionModel { return walRetentionModel{KeepDays: types.Int64Value(n)} }
	for name, c := range map[string]struct {
		before, after walRetentionModel
		want          bool
	}{
		"fewer days":              {days(15), days(14), true},
		"as many days":            {days(15), days(15), false},
		"more days":               {days(15), days(16), false},
		"from images to days":     {until, days(3650), true},
		"from days to images":     {days(15), until, false},
		"not known while planned": {until, walRetentionModel{KeepDays: types.Int64Unknown()}, false},
	} {
		t.Run(name, func(t *testing.T) {
			if _, _, got := shortened(c.before, c.after); got != c.want {
				t.Errorf("found %t, expected %t", got, c.want)
			}
		})
	}
}
