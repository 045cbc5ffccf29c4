package repository

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"strings"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/pgark/terraform-provider-pgark/internal/engine/objectstore"
	"github.com/pgark/terraform-provider-pgark/internal/engine/postgres"
)

// Series gives access to one series. Safe for concurrent use; it caches the newest head version it has seen.
type Series struct {
	r       *Repository
	id      SeriesID
	invalid error // why id can name no series

	// mu guards newest. It is not held while the store is asked.
	mu     sync.Mutex
	newest *Head
}

// ID names the series.
func (s *Series) ID() SeriesID { return s.id }

// listPage is how many head versions are listed before newestVersion begins to leap: what S3 gives in one answer.
const listPage = 1000

// Head reads the newest head. A series without one gives Version 0 and NextSID 1. The caller must not change it.
func (s *Series) Head(ctx context.Context) (*Head, error) {
	if s.invalid != nil {
		return nil, s.invalid
	}
	known := s.known()
	version, err := s.newestVersion(ctx, known.Version)
	if err != nil {
		return nil, fmt.Errorf("head of %s: %w", s.id, err)
	}
	if version == known.Version {
		return known, nil
	}
	h, err := s.readHead(ctx, version)
	if err != nil {
		return nil, fmt.Errorf("head of %s: %w", s.id, err)
	}
	return s.remember(h), nil
}

// known is the newest head that was seen.
func (s *Series) known() *Head {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.newest == nil {
		return &Head{NextSID: 1}
	}
	return s.newest
}

// remember keeps h if it is newer than what is known, and returns the newer one.
func (s *Series) remember(h *Head) *Head {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.newest == nil || s.newest.Version < h.Version {
		s.newest = h
	}
	return s.newest
}

// newestVersion lists the versions after the given one. Versions have no holes, so where there are more than a page it
// looks ahead in doubling steps, and a log of a million versions is found to its end in some twenty requests.
func (s *Series) newestVersion(ctx context.Context, after uint64) (uint64, error) {
	newest, more, err := s.listHeads(ctx, after, listPage)
	if err != nil || !more {
		return newest, err
	}
	growing := true
	for step := uint64(listPage); step >= listPage; {
		ahead, _, err := s.listHeads(ctx, newest+step, 1)
		if err != nil {
			return 0, err
		}
		if ahead > newest+step {
			newest = ahead
		} else {
			growing = false
		}
		if growing {
			step *= 2
		} else {
			step /= 2
		}
	}
	for {
		newest, more, err = s.listHeads(ctx, newest, listPage)
		if err != nil || !more {
			return newest, err
		}
	}
}

// listHeads returns the last of up to limit versions after the given one, and whether there may be more.
func (s *Series) listHeads(ctx context.Context, after uint64, limit int) (last uint64, more bool, err error) {
	last = after
	n := 0
	startAfter := ""
	if after > 0 {
		startAfter = s.id.headKey(after)
	}
	for o, err := range s.r.store.List(ctx, s.id.headPrefix(), startAfter) {
		if err != nil {
			return 0, false, err
		}
		v, ok := s.id.parseHeadKey(o.Key)
		if !ok {
			continue
		}
		last = v
		if n++; n >= limit {
			return last, true, nil
		}
	}
	return last, false, nil
}

// readHead reads one version.
func (s *Series) readHead(ctx context.Context, version uint64) (*Head, error) {
	d := headDocument{Head: &Head{}}
	key := s.id.headKey(version)
	checksum, err := s.r.readDocument(ctx, key, &d)
	if err != nil {
		return nil, err
	}
	if err := d.check(version); err != nil {
		return nil, &CorruptError{Repository: s.r.store.URL(), Key: key, Err: err}
	}
	d.checksum = checksum
	if known := s.known(); known.Version > 0 && known.Version+1 == version && known.checksum != d.Previous {
		return nil, &CorruptError{Repository: s.r.store.URL(), Key: key, Err: fmt.Errorf("found predecessor %s, expected %s", d.Previous, known.checksum)}
	}
	return d.Head, nil
}

// History yields all head versions, oldest first, and checks that each names its predecessor.
func (s *Series) History(ctx context.Context) iter.Seq2[*Head, error] {
	return func(yield func(*Head, error) bool) {
		newest, err := s.Head(ctx)
		if err != nil {
			yield(nil, err)
			return
		}
		previous := ""
		for v := uint64(1); v <= newest.Version; v++ {
			h, err := s.readHead(ctx, v)
			if err == nil && h.Previous != previous {
				err = &CorruptError{Repository: s.r.store.URL(), Key: s.id.headKey(v), Err: fmt.Errorf("found predecessor %q, expected %q", h.Previous, previous)}
			}
			if err != nil {
				yield(nil, fmt.Errorf("history of %s: %w", s.id, err))
				return
			}
			previous = h.checksum
			if !yield(h, nil) {
				return
			}
		}
	}
}

// maxConflicts bounds the retries of one step. A conflict means that somebody else has made a step, so reaching it
// takes a store that lies, or two programs in a loop.
const maxConflicts = 200

// backOff waits a random time that grows with the attempts: 0–20 ms, 0–40 ms, … up to 2 s.
func (r *Repository) backOff(ctx context.Context, attempt int) error {
	return sleep(ctx, r.jitter(min(20*time.Millisecond<<min(attempt, 10), 2*time.Second)))
}

// step makes one transition of the head: read the newest, apply the change, create the next version; where somebody else
// was faster, again. apply returns nil for "nothing to do".
func (s *Series) step(ctx context.Context, change Change, apply func(*Head) (*Head, []SID, error)) error {
	nonce, err := s.r.nonce()
	if err != nil {
		return err
	}
	change.Nonce = nonce
	if change.Writer == "" {
		change.Writer = s.r.host
	}
	h, err := s.Head(ctx)
	if err != nil {
		return err
	}
	for attempt := 0; ; attempt++ {
		next, sids, err := apply(h)
		if err != nil {
			return err
		}
		if next == nil {
			return nil
		}
		change.SIDs, change.At = sids, s.r.clock()
		next.Version, next.Previous, next.Change = h.Version+1, h.checksum, change
		next.checksum, err = s.r.createDocument(ctx, s.id.headKey(next.Version), headDocument{Format: Format, Head: next})
		if err == nil {
			s.remember(next)
			return nil
		}
		_, conflict := errors.AsType[*objectstore.ConflictError](err)
		if !conflict && !objectstore.IsTransient(err) || attempt >= maxConflicts {
			return fmt.Errorf("%s in %s: %w", change.Op, s.id, err)
		}
		if !conflict && ctx.Err() != nil {
			return context.Cause(ctx)
		}
		// Walk over what was created since, version by version: one of them may be ours, its reply lost.
		found, mine, walkErr := s.walk(ctx, h, nonce)
		switch {
		case walkErr != nil && conflict:
			return fmt.Errorf("%s in %s: %w", change.Op, s.id, walkErr)
		case walkErr != nil:
			return fmt.Errorf("%s in %s: %w", change.Op, s.id, err)
		case mine:
			return nil
		case !conflict:
			// Nobody can say whether the request will still arrive. Giving up is safe: every transition may happen late.
			return fmt.Errorf("%s in %s: %w", change.Op, s.id, err)
		}
		h = found
		if err := s.r.backOff(ctx, attempt); err != nil {
			return err
		}
	}
}

// walk reads the versions that follow h and returns the last, and whether one of them carries nonce.
func (s *Series) walk(ctx context.Context, h *Head, nonce string) (newest *Head, mine bool, err error) {
	for {
		next, err := s.readHead(ctx, h.Version+1)
		if errors.Is(err, objectstore.ErrNotExist) {
			return h, mine, nil
		}
		if err != nil {
			return nil, false, err
		}
		if next.Previous != h.checksum {
			return nil, false, &CorruptError{Repository: s.r.store.URL(), Key: s.id.headKey(next.Version), Err: fmt.Errorf("found predecessor %q, expected %q", next.Previous, h.checksum)}
		}
		mine = mine || next.Change.Nonce == nonce
		h = next
		s.remember(h)
	}
}

// Begin opens a session and pins parent (0: none), which must be live: *NotLiveError otherwise. If it fails after the
// store may have taken the step, a session without an owner remains, for Evict.
func (s *Series) Begin(ctx context.Context, session OpenSession) (SID, error) {
	if session.StartedAt.IsZero() {
		session.StartedAt = s.r.clock()
	}
	var sid SID
	err := s.step(ctx, Change{Op: "begin", Writer: session.Host}, func(h *Head) (*Head, []SID, error) {
		next, err := h.begin(s.id, session)
		sid = h.NextSID
		return next, []SID{sid}, err
	})
	if err != nil {
		return 0, err
	}
	return sid, nil
}

// Commit makes the image live and ends its session. The image's objects must be durable (ImageWriter.Finish).
// ErrSessionGone if the session was evicted; *BelowFloorError if its start lies below the WAL floor. After any other
// error the image may be live or not; committing it again is safe and tells.
func (s *Series) Commit(ctx context.Context, image ImageInfo) error {
	err := s.step(ctx, Change{Op: "commit"}, func(h *Head) (*Head, []SID, error) {
		next, err := h.commit(s.id, image)
		return next, []SID{image.SID}, err
	})
	return err
}

// Abort ends a session without an image; an unknown session is no error. A committed image is not touched.
func (s *Series) Abort(ctx context.Context, sid SID) error {
	err := s.step(ctx, Change{Op: "abort"}, func(h *Head) (*Head, []SID, error) {
		return h.end(sid), []SID{sid}, nil
	})
	return err
}

// Evict ends the sessions that keep reports false for, and returns them. Evicting a running reader breaks that restore;
// evicting a running writer makes its commit fail; no image suffers from either.
func (s *Series) Evict(ctx context.Context, keep func(OpenSession) bool) ([]SID, error) {
	var evicted []SID
	err := s.step(ctx, Change{Op: "evict"}, func(h *Head) (*Head, []SID, error) {
		evicted = nil
		for _, session := range h.Sessions {
			if !keep(session) {
				evicted = append(evicted, session.SID)
			}
		}
		return h.end(evicted...), evicted, nil
	})
	if err != nil {
		return nil, err
	}
	return evicted, nil
}

// Expire takes images out of the live set; unknown ones are no error. Their objects go with the next Collect, unless a
// session or another image needs them.
func (s *Series) Expire(ctx context.Context, sids ...SID) error {
	err := s.step(ctx, Change{Op: "expire"}, func(h *Head) (*Head, []SID, error) {
		return h.expire(sids...), sids, nil
	})
	return err
}

// RaiseWALFloor allows the deletion of WAL that ends at or below lsn on timeline, but for the segments that make a live
// image consistent. It never lowers a floor, and refuses with a *FloorError to rise above the start of an image that a
// restore session reads on that timeline.
func (s *Series) RaiseWALFloor(ctx context.Context, t postgres.Timeline, lsn postgres.LSN) error {
	err := s.step(ctx, Change{Op: "floor"}, func(h *Head) (*Head, []SID, error) {
		next, err := h.raiseFloor(s.id, t, lsn)
		return next, nil, err
	})
	return err
}

// Collected says what a collection removed or, with dryRun, would remove.
type Collected struct {
	Objects int
	Bytes   int64
}

// deleteBatch is how many keys one Delete call names: what S3 takes in one request.
const deleteBatch = 1000

// Collect deletes the objects of images that nothing refers to, by the rule of the package comment. Any number of
// collections may run at once, and be paused for any time. It returns what was removed also when it fails midway.
func (s *Series) Collect(ctx context.Context, dryRun bool) (Collected, error) {
	var done Collected
	h, used, err := s.used(ctx)
	if err != nil {
		return done, fmt.Errorf("collect garbage of %s: %w", s.id, err)
	}
	var keys []string
	var bytes int64
	flush := func() error {
		if len(keys) == 0 {
			return nil
		}
		if !dryRun {
			if err := s.r.store.Delete(ctx, keys...); err != nil {
				return err
			}
		}
		done.Objects += len(keys)
		done.Bytes += bytes
		keys, bytes = keys[:0], 0
		return nil
	}
	for o, err := range s.r.store.List(ctx, s.id.imagePrefix(), "") {
		if err != nil {
			return done, fmt.Errorf("collect garbage of %s: %w", s.id, err)
		}
		key, ok := parseImageKey(strings.TrimPrefix(o.Key, s.id.imagePrefix()))
		if !ok || !condemned(h, used, key) {
			continue
		}
		keys = append(keys, o.Key)
		bytes += o.Size
		if len(keys) == deleteBatch {
			if err := flush(); err != nil {
				return done, fmt.Errorf("collect garbage of %s: %w", s.id, err)
			}
		}
	}
	if err := flush(); err != nil {
		return done, fmt.Errorf("collect garbage of %s: %w", s.id, err)
	}
	return done, nil
}

// used reads the newest head and what the refs of its needed images name.
func (s *Series) used(ctx context.Context) (*Head, map[ObjectRef]struct{}, error) {
	h, err := s.Head(ctx)
	if err != nil {
		return nil, nil, err
	}
	for {
		used, err := s.readUsed(ctx, h)
		if err == nil {
			return h, used, nil
		}
		// While we read, an image may have expired and its refs been collected by another. The next head tells: if the
		// image is still needed there, its refs are lost, and nothing may be deleted.
		if !errors.Is(err, objectstore.ErrNotExist) {
			return nil, nil, err
		}
		newer, headErr := s.Head(ctx)
		if headErr != nil {
			return nil, nil, headErr // nobody knows yet whether refs are lost
		}
		if newer.Version == h.Version {
			return nil, nil, err
		}
		h = newer
	}
}

func (s *Series) readUsed(ctx context.Context, h *Head) (map[ObjectRef]struct{}, error) {
	var mu sync.Mutex // guards used
	used := make(map[ObjectRef]struct{})
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(4) // refs of a few MB each
	for _, sid := range h.needed() {
		g.Go(func() error {
			refs, err := s.readRefs(ctx, sid)
			if err != nil {
				return err
			}
			mu.Lock()
			defer mu.Unlock()
			for i := range refs.Objects {
				used[refs.Objects[i].Object] = struct{}{}
			}
			return nil
		})
	}
	if err := g.Wait(); err != nil {
		return nil, err
	}
	return used, nil
}
