package provider

import (
	"context"
	"fmt"
	"time"

	"github.com/hashicorp/terraform-plugin-framework/diag"
	"github.com/hashicorp/terraform-plugin-framework/path"

	"github.com/pgark/terraform-provider-pgark/internal/engine/postgres"
	"github.com/pgark/terraform-provider-pgark/internal/engine/repository"
	"github.com/pgark/terraform-provider-pgark/internal/engine/retention"
)

// openForJob opens the job's repository from here, with the provider's own keys.
func (r *backupJobResource) openForJob(ctx context.Context, m backupJobModel, diags *diag.Diagnostics) *repository.Repository {
	s := decode[repositorySettingsModel](ctx, m.RepositorySettings, diags).settings()
	repo, err := r.data.openRepository(ctx, m.Repository.ValueString(), s, applyPatience)
	if err != nil {
		diags.Append(repositoryProblem(path.Root("repository"), "Read", m.Repository.ValueString(), err))
		return nil
	}
	return repo
}

// waitForFirstImage returns when every protected instance has an image. It watches the repository, not the runner: an
// image is there when it can be listed.
func (r *backupJobResource) waitForFirstImage(ctx context.Context, m backupJobModel, diags *diag.Diagnostics) {
	repo := r.openForJob(ctx, m, diags)
	if repo == nil {
		return
	}
	var instances []protectedInstanceModel
	diags.Append(m.ProtectedInstances.ElementsAs(ctx, &instances, false)...)
	for _, i := range instances {
		system, err := postgres.ParseSystemID(i.SystemIdentifier.ValueString())
		if err != nil {
			diags.Append(unable("Read", jobNoun, m.Name.ValueString(), err))
			return
		}
		series := repo.Series(repository.SeriesID{Job: m.Name.ValueString(), Instance: i.Name.ValueString(), SystemID: system})
		if err := waitForImage(ctx, series); err != nil {
			diags.AddAttributeError(path.Root("wait_for_first_image"), fmt.Sprintf("No First Image of %s Yet", i.Name.ValueString()),
				detail(err)+fmt.Sprintf("\n\nThe job is deployed, and its runner goes on by itself: pgark status --job %s on the guest tells how far it is.", m.Name.ValueString()))
			return
		}
	}
}

func waitForImage(ctx context.Context, series *repository.Series) error {
	begin := time.Now()
	for pause := time.Second; ; pause = min(2*pause, 15*time.Second) {
		head, err := series.Head(ctx)
		if err != nil {
			return fmt.Errorf("read the head of %s: %w", series.ID(), err)
		}
		if len(head.Images) > 0 {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("waited %s for an image of %s: %w", time.Since(begin).Round(time.Second), series.ID(), context.Cause(ctx))
		case <-time.After(pause):
		}
	}
}

// deleteBackups does what deletion_policy = "delete_backups" asked for in so many words. The job's runners are gone by
// then, so nobody writes. The series' head logs stay, as the record of what was there.
func (r *backupJobResource) deleteBackups(ctx context.Context, m backupJobModel, diags *diag.Diagnostics) {
	repo := r.openForJob(ctx, m, diags)
	if repo == nil {
		return
	}
	name := m.Name.ValueString()
	ids, err := repo.SeriesList(ctx, name, "")
	if err == nil {
		for _, id := range ids {
			if err = retention.Empty(ctx, repo.Series(id)); err != nil {
				break
			}
		}
	}
	if err != nil {
		diags.AddAttributeError(path.Root("deletion_policy"), fmt.Sprintf("Unable to Delete the Backups of %q", name), detail(err)+
			"\n\nThe job itself is removed from the guest. Apply again to go on deleting, or set deletion_policy = \"retain\" with terraform state rm to leave the rest where it is.")
	}
}
