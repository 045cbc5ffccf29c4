package provider

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"github.com/hashicorp/terraform-plugin-framework/diag"
	"github.com/hashicorp/terraform-plugin-framework/path"

	"github.com/pgark/terraform-provider-pgark/internal/engine/guest"
	"github.com/pgark/terraform-provider-pgark/internal/engine/guest/sshlink"
	"github.com/pgark/terraform-provider-pgark/internal/engine/job"
	"github.com/pgark/terraform-provider-pgark/internal/engine/objectstore"
	"github.com/pgark/terraform-provider-pgark/internal/engine/repository"
)

// Every text that a user may see as a diagnostic is made here: what happened, to what, and what to do about it.

// unable reports a failed operation: unable("Create", "Repository", "s3://b/p", err).
func unable(action, noun, name string, err error) diag.Diagnostic {
	summary := fmt.Sprintf("Unable to %s %s", action, noun)
	if name != "" {
		summary += fmt.Sprintf(" %q", name)
	}
	return diag.NewErrorDiagnostic(summary, detail(err))
}

// detail is the error's message, and its hint where it carries one.
func detail(err error) string {
	text := withHint(err)
	if errors.Is(err, context.DeadlineExceeded) {
		text += "\n\nThe time for this ran out; it can be given more with the timeouts attribute."
	}
	return text
}

// withHint is the error's message, and its hint where it carries one.
func withHint(err error) string {
	text := sentence(err.Error())
	var h interface{ Hint() string }
	if errors.As(err, &h) && h.Hint() != "" {
		text += "\n\nHint: " + h.Hint()
	}
	if e, ok := errors.AsType[*sshlink.SudoError](err); ok && (e.Problem == sshlink.SudoNeedsPassword || e.Problem == sshlink.SudoNotAllowed) {
		text += "\n\nAs root, on the host:\n  " + guest.SudoersRemedy(e.User, job.Layout{})
	}
	return text
}

// sentence makes an error's message fit for a diagnostic, which is prose: first letter, full stop.
func sentence(s string) string {
	if s == "" {
		return s
	}
	if last := s[len(s)-1]; last != '.' && last != '\n' {
		s += "."
	}
	if first, _, _ := strings.Cut(s, " "); strings.ContainsAny(first, "@/") {
		return s // an account or a path: its letters are as they have to be
	}
	return strings.ToUpper(s[:1]) + s[1:]
}

// notInThisBuild says that something is declared in the schema but not built yet, and what can be used today.
func notInThisBuild(p path.Path, what, instead string) diag.Diagnostic {
	return diag.NewAttributeErrorDiagnostic(p, "Not in This Build", what+" is not in this build.\n\n"+instead)
}

// asWarning turns an error diagnostic into a warning with the same text and place.
func asWarning(d diag.Diagnostic) diag.Diagnostic {
	if d.Severity() == diag.SeverityWarning {
		return d
	}
	if at, ok := d.(diag.DiagnosticWithPath); ok {
		return diag.NewAttributeWarningDiagnostic(at.Path(), d.Summary(), d.Detail())
	}
	return diag.NewWarningDiagnostic(d.Summary(), d.Detail())
}

// prerequisiteNotMet describes one failed check. Its severity is the caller's business.
func prerequisiteNotMet(p path.Path, host string, c guest.Check) diag.Diagnostic {
	on := host
	if c.Instance != "" {
		on += ", instance " + c.Instance
	}
	var b strings.Builder
	fmt.Fprintf(&b, "On %s:\n", on)
	fmt.Fprintf(&b, "  Found:    %s\n", indented(c.Found))
	fmt.Fprintf(&b, "  Expected: %s\n", indented(c.Expected))
	if c.Remedy != "" {
		fmt.Fprintf(&b, "  To fix:   %s\n", indented(c.Remedy))
	}
	b.WriteString("\nNothing was changed on the guest. To plan without this check: prerequisite_checks = \"warn\" or \"off\" on the provider.")
	return diag.NewAttributeErrorDiagnostic(p, "Prerequisite Not Met: "+c.Name, b.String())
}

// indented lines up the further lines of a text under its first, behind "  Expected: ".
func indented(s string) string {
	return strings.ReplaceAll(strings.TrimRight(s, "\n"), "\n", "\n            ")
}

// unreachable says that a guest could not be asked, and that this is not taken for absence.
func unreachable(noun, name, host string, err error) diag.Diagnostic {
	way := "To go on from what was known last, also where it is the connection that is to change: on_unreachable = \"warn\" on the provider, or -refresh=false. "
	if wrong, ok := errors.AsType[*sshlink.HostKeyError](err); ok && wrong.For == "" {
		way = "Once the key is declared in connection.host_key, an apply takes it, and looks what the guest holds. "
	}
	return diag.NewAttributeErrorDiagnostic(connectionPath(err), fmt.Sprintf("Unable to Read %s %q on %s", noun, name, host),
		withHint(err)+"\n\nThe guest could not be asked, so nothing is concluded about what it holds, and the state is left as it was. "+way+goneForGood)
}

// notImported says that there is nothing to import as long as the guest cannot be asked.
func notImported(noun, name, host string, err error) diag.Diagnostic {
	return diag.NewErrorDiagnostic(fmt.Sprintf("Unable to Read %s %q on %s", noun, name, host),
		withHint(err)+"\n\nNothing was imported. An import cannot say how its host is reached: port, account, bastion and keys are those of the provider's ssh block, or of the environment (PGARK_SSH_PORT, PGARK_SSH_USER, …).")
}

// goneForGood is the way out where a guest will never answer again.
const goneForGood = "If the guest is gone for good, let Terraform forget it: terraform state rm ADDRESS, or a removed block with lifecycle { destroy = false }. Backups stay in the repository."

// guestProblem reports that an operation on a guest failed, by cause.
func guestProblem(action, noun, name, host string, err error) diag.Diagnostic {
	summary := fmt.Sprintf("Unable to %s %s %q on %s", action, noun, name, host)
	text := detail(err)
	at := connectionPath(err)
	if _, ok := errors.AsType[*sshlink.UnreachableError](err); ok {
		switch action {
		case deleting.word:
			text += "\n\nWhat is on the guest could not be taken away, so it is kept in the state: destroy again when the guest can be reached. " + goneForGood
		default:
			text += "\n\nThe other resources of this run are not concerned. Apply again when the guest can be reached: what was done stays done, and the rest follows."
		}
	}
	return diag.NewAttributeErrorDiagnostic(at, summary, text)
}

// connectionPath is the attribute to change where a guest is not reached.
func connectionPath(err error) path.Path {
	if wrong, ok := errors.AsType[*sshlink.HostKeyError](err); ok && wrong.For == "" {
		return path.Root(connectionName).AtName("host_key")
	}
	if _, ok := errors.AsType[*sshlink.AuthError](err); ok {
		return path.Root(connectionName)
	}
	return path.Root("host")
}

// repositoryProblem explains why the repository that the attribute at names could not be used, by cause.
func repositoryProblem(at path.Path, action, url string, err error) diag.Diagnostic {
	summary := fmt.Sprintf("Unable to %s Repository %q", action, url)
	var unsuitable *objectstore.UnsuitableError
	switch {
	case errors.As(err, &unsuitable):
		return diag.NewAttributeErrorDiagnostic(at, fmt.Sprintf("Repository %q Is Unsuitable", url),
			fmt.Sprintf("The store cannot hold a repository.\n  Needed: %s\n  Found:  %s\n  To fix: %s\n\nNothing was kept in it.",
				unsuitable.Need, unsuitable.Found, unsuitable.Remedy))
	case errors.Is(err, objectstore.ErrNoBucket):
		return diag.NewAttributeErrorDiagnostic(at, summary, sentence(err.Error())+
			"\n\nThe bucket (or, for file://, the directory) has to exist before: pgark creates none. Compare the name in url, and the endpoint, with where the bucket is.")
	case errors.Is(err, objectstore.ErrRegion):
		return diag.NewAttributeErrorDiagnostic(at, summary, sentence(err.Error())+
			"\n\nSet region to the bucket's own region.")
	case errors.Is(err, objectstore.ErrAccess):
		return diag.NewAttributeErrorDiagnostic(at, summary, sentence(err.Error())+
			"\n\nThe store refused the keys, or what they may do. They come from the provider's s3 block, else from the AWS environment "+
			"(AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, a profile, an instance profile). They need to list, read and create objects; deleting is needed for retention only.")
	case errors.Is(err, repository.ErrNoRepository):
		return diag.NewAttributeErrorDiagnostic(at, summary, sentence(err.Error())+
			"\n\nA pgark_repository resource creates it. If one does in this configuration, refer to it (repository = pgark_repository.NAME.url) or wait for it with depends_on.")
	}
	return diag.NewAttributeErrorDiagnostic(at, summary, detail(err))
}

// repositoryNotReferable explains when a repository's URL alone is not enough.
func repositoryNotReferable(url string) diag.Diagnostic {
	return diag.NewAttributeErrorDiagnostic(path.Root("repository"), "Repository Is Reached in a Way That Its URL Does Not Tell",
		fmt.Sprintf("The pgark_repository of %s exists, and has a region, endpoint or path style of its own; the apply would not learn of them. ", url)+
			"Refer to it with repository = pgark_repository.NAME.location, which carries them, or let the provider's s3 block say them for all.")
}
