package objectstore

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"sync"
)

// probeWriters race for one name, in each of probeRounds rounds. A store that checks before it writes, instead of
// atomically, shows in almost every round with as many.
const (
	probeWriters = 8
	probeRounds  = 3
)

// Probe tries, under the prefix "probe/", what a repository needs: create-if-absent (in sequence and in a race),
// ranged reads, and a listing that shows what was just created. It removes what it wrote where deletion is allowed.
// A store without atomic create-if-absent is refused with an *UnsuitableError that says what was tried and seen, and so
// is one that lacks ranges or whose listings lag behind.
func Probe(ctx context.Context, s Store) (Capabilities, error) {
	p := probe{store: s, prefix: "probe/" + randomHex() + "/"}
	c, err := p.run(ctx)
	var ignored error // what could not be removed is harmless, and an append-only store is a good one
	if c.Delete, ignored = p.clean(ctx); ignored != nil && err == nil && !errors.Is(ignored, ErrAccess) {
		err = ignored
	}
	if err != nil {
		return Capabilities{}, err
	}
	return c, nil
}

type probe struct {
	store  Store
	prefix string
	keys   []string // written
}

func (p *probe) run(ctx context.Context) (c Capabilities, err error) {
	if err := p.createIfAbsent(ctx); err != nil {
		return c, err
	}
	c.CreateIfAbsent = true
	if err := p.rangedGet(ctx); err != nil {
		return c, err
	}
	c.RangedGet = true
	if err := p.listAfterPut(ctx); err != nil {
		return c, err
	}
	c.ListAfterPut = true
	return c, nil
}

func (p *probe) create(ctx context.Context, name, content string) error {
	return p.store.Create(ctx, p.prefix+name, strings.NewReader(content), int64(len(content)))
}

func (p *probe) read(ctx context.Context, name string, offset, n int64) (string, error) {
	r, err := p.store.Get(ctx, p.prefix+name, offset, n)
	if err != nil {
		return "", err
	}
	defer r.Close()
	b, err := io.ReadAll(r)
	return string(b), err
}

func (p *probe) unsuitable(found string) error {
	return &UnsuitableError{
		Store:  p.store.URL(),
		Need:   "atomic create-if-absent (PUT with If-None-Match: *)",
		Found:  found,
		Remedy: "use a store that has it, as Amazon S3 and current versions of other S3 servers do",
	}
}

func (p *probe) createIfAbsent(ctx context.Context) error {
	p.keys = append(p.keys, p.prefix+"first")
	err := p.create(ctx, "first", "one")
	if errors.Is(err, errNotImplemented) {
		return p.unsuitable(fmt.Sprintf("the store answered %q to a conditional create", err))
	}
	if err != nil {
		return err
	}
	if err := p.create(ctx, "first", "one"); err != nil {
		return err
	}
	err = p.create(ctx, "first", "two")
	if err == nil {
		return p.unsuitable("a second create of the same name with other content was accepted")
	}
	if _, ok := errors.AsType[*ConflictError](err); !ok {
		return err
	}
	for round := range probeRounds {
		if err := p.race(ctx, fmt.Sprintf("race-%d", round)); err != nil {
			return err
		}
	}
	return nil
}

func (p *probe) race(ctx context.Context, name string) error {
	p.keys = append(p.keys, p.prefix+name)
	start := make(chan struct{})
	var errs [probeWriters]error
	content := func(writer int) string { return fmt.Sprintf("writer %d", writer) }
	var wg sync.WaitGroup
	for i := range errs {
		wg.Go(func() {
			<-start
			errs[i] = p.create(ctx, name, content(i))
		})
	}
	close(start)
	wg.Wait()
	stored, err := p.read(ctx, name, 0, -1)
	if err != nil {
		return err
	}
	winners := 0
	for i, err := range errs {
		if err == nil {
			winners++
			if stored != content(i) {
				return p.unsuitable(fmt.Sprintf("of %d writers racing for one name, one was told that it won and the object holds another's content", probeWriters))
			}
			continue
		}
		if _, ok := errors.AsType[*ConflictError](err); !ok {
			return err
		}
	}
	if winners != 1 {
		return p.unsuitable(fmt.Sprintf("of %d writers racing for one name, %d were told that they won", probeWriters, winners))
	}
	return nil
}

func (p *probe) rangedGet(ctx context.Context) error {
	got, err := p.read(ctx, "first", 1, 1)
	if err == nil && got == "n" {
		return nil
	}
	if err != nil && !errors.Is(err, errNoRanges) {
		return err
	}
	return &UnsuitableError{
		Store: p.store.URL(), Need: "reading a range of an object",
		Found:  fmt.Sprintf("byte 1 of %q read as %q (%v)", "one", got, err),
		Remedy: "use a store that answers GET with Range",
	}
}

func (p *probe) listAfterPut(ctx context.Context) error {
	listed := make(map[string]bool)
	for o, err := range p.store.List(ctx, p.prefix, "") {
		if err != nil {
			return err
		}
		listed[o.Key] = true
	}
	for _, key := range p.keys {
		if !listed[key] {
			return &UnsuitableError{
				Store: p.store.URL(), Need: "a listing that shows what was just created",
				Found:  key + " was created and is not listed",
				Remedy: "use a store with strong consistency",
			}
		}
	}
	return nil
}

// clean removes what was written and tells whether that is possible.
func (p *probe) clean(ctx context.Context) (deleted bool, err error) {
	if err := p.store.Delete(ctx, p.keys...); err != nil {
		return false, err
	}
	_, err = p.store.Stat(ctx, p.keys[0])
	if errors.Is(err, ErrNotExist) {
		return true, nil
	}
	return false, err
}
