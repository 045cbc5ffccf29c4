//go:build linux

package guest

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/pgark/terraform-provider-pgark/internal/engine/job"
	"github.com/pgark/terraform-provider-pgark/internal/engine/objectstore"
	"github.com/pgark/terraform-provider-pgark/internal/engine/postgres"
	"github.com/pgark/terraform-provider-pgark/internal/engine/repository"
)

// proofPatience is how long a forced segment may be without any progress of the archiver: WAL that had been waiting
// before comes first, however long that takes.
const proofPatience = 60 * time.Second

// Prove makes each primary of the job as it is deployed here finish a WAL segment, and waits until that is in the
// repository: the whole way, through archive_command and the runner. What is chained behind ours has to succeed, too. A
// segment that gets stuck is a *ProofError. In mode continuous each runner has to stream WAL, those of replicas, too; one that
// does not is a *StreamError.
func Prove(ctx context.Context, layout job.Layout, j *job.Job, credentials *objectstore.Credentials) ([]Proof, error) {
	store, err := objectstore.Open(ctx, j.Location(credentials), objectstore.Options{})
	if err != nil {
		return nil, err
	}
	repo, err := repository.Open(ctx, store)
	if err != nil {
		return nil, err
	}
	g := &local{layout: layout}
	var proofs []Proof
	for _, i := range j.Protected {
		p, err := g.prove(ctx, repo, j, i)
		if err != nil {
			return proofs, err
		}
		proofs = append(proofs, p)
		if j.Enabled && j.WAL.Mode == job.WALContinuous {
			if err := g.awaitStream(ctx, j.Name, i.Name); err != nil {
				return proofs, err
			}
		}
	}
	return proofs, nil
}

// prove is Prove for one instance.
func (g *local) prove(ctx context.Context, repo *repository.Repository, j *job.Job, i job.Instance) (Proof, error) {
	began := time.Now()
	conn, err := connect(ctx, i)
	if err != nil {
		return Proof{}, err
	}
	defer closeNow(conn)
	var recovers bool
	if err := conn.QueryRow(ctx, "select pg_catalog.pg_is_in_recovery()").Scan(&recovers); err != nil {
		return Proof{}, fmt.Errorf("role of %s: %w", i.Name, err)
	}
	if recovers {
		return Proof{Instance: i.Name, Skipped: "a replica writes no WAL of its own"}, nil
	}
	segment, err := postgres.ForceSegment(ctx, conn, "pgark check")
	if err != nil {
		return Proof{}, err
	}
	command, err := readArchiveCommand(ctx, conn)
	if err != nil {
		return Proof{}, err
	}
	chained := unchain(command) != ""
	series := repo.Series(repository.SeriesID{Job: j.Name, Instance: i.Name, SystemID: i.SystemID})
	last, progress, stored := postgres.Archiver{}, time.Now(), false
	for wait := 20 * time.Millisecond; ; wait = min(2*wait, time.Second) {
		a, archiver := postgres.ReadArchiver(ctx, conn)
		info, err := series.StatWAL(ctx, string(segment))
		stored = stored || err == nil
		if err == nil && (!chained || archiver == nil && a.LastArchived >= string(segment)) {
			return Proof{Instance: i.Name, Segment: string(segment), Seconds: time.Since(began).Seconds(), StoredSize: info.StoredSize}, nil
		}
		if !stored && ctx.Err() == nil && !errors.Is(err, objectstore.ErrNotExist) && !objectstore.IsTransient(err) {
			return Proof{}, err
		}
		if archiver == nil && a.Archived != last.Archived {
			last, progress = a, time.Now()
		}
		if errors.Is(context.Cause(ctx), context.Canceled) {
			return Proof{}, context.Cause(ctx) // nobody waits for it any more: it may be on its way as it should
		}
		if time.Since(progress) > proofPatience || ctx.Err() != nil {
			e := g.stuck(context.WithoutCancel(ctx), j, i, string(segment), time.Since(began))
			e.Behind, e.Err = stored, context.Cause(ctx)
			return Proof{}, e
		}
		select {
		case <-ctx.Done():
		case <-time.After(wait):
		}
	}
}

// stuck says where a segment got stuck.
func (g *local) stuck(ctx context.Context, j *job.Job, i job.Instance, segment string, waited time.Duration) *ProofError {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	e := &ProofError{Instance: i.Name, Segment: segment, Waited: waited.Round(time.Second).String(), Log: g.runner(j.Name, i.Name, account{}).log(ctx)}
	e.Archiver = func() string {
		conn, err := connect(ctx, i)
		if err != nil {
			return err.Error()
		}
		defer closeNow(conn)
		a, err := postgres.ReadArchiver(ctx, conn)
		if err != nil {
			return err.Error()
		}
		said := fmt.Sprintf("archived %d", a.Archived)
		if a.LastArchived != "" {
			said += ", last " + a.LastArchived
		}
		said += fmt.Sprintf("; failed %d times", a.Failed)
		if a.LastFailed != "" {
			said += ", last " + a.LastFailed
		}
		return said
	}()
	if s, err := g.status(ctx, j.Name, i.Name); err != nil {
		e.Runner = err.Error()
	} else {
		e.Runner = string(s.State)
		if s.Problem != "" {
			e.Runner += ": " + s.Problem
		}
		if s.WAL.LastError != "" {
			e.Runner += "; last error: " + s.WAL.LastError
		}
	}
	return e
}

func (a *application) prove(ctx context.Context, i job.Instance) error {
	_, err := a.g.prove(ctx, a.repo, a.job, i)
	var stuck *ProofError
	if errors.As(err, &stuck) {
		if s := a.exam.servers[i.Name]; s != nil && len(s.fileProblems) > 0 {
			stuck.Archiver += "; and in its configuration: " + s.tellFiles()
		}
	}
	return err
}
