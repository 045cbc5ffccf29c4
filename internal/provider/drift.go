package provider

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/hashicorp/terraform-plugin-framework/diag"

	"github.com/pgark/terraform-provider-pgark/internal/engine/guest"
	"github.com/pgark/terraform-provider-pgark/internal/engine/job"
)

// remembered is what the last look at the guest found beyond the state's attributes. ModifyPlan compares with it rather
// than ask the guest again: the plan and the apply's own plan of the same change must come to the same answer, and a plan
// without a refresh needs no connection. It stands in the private state, so it holds nothing secret.
type remembered struct {
	Discovered []discovered   `json:"discovered"`
	Protected  []job.Instance `json:"protected"`
	Location   string         `json:"location,omitempty"` // of the repository, as its pgark_repository says it is reached
	Arch       string         `json:"arch,omitempty"`     // of the guest, as Go names it

	// What was there when Terraform had last put it there.
	MachineID string   `json:"machine_id,omitempty"`
	Runner    string   `json:"runner,omitempty"` // SHA-256
	Job       *job.Job `json:"job,omitempty"`

	// What is there.
	AccessKeyID string    `json:"access_key_id,omitempty"`
	Differences []differs `json:"differences,omitempty"`
}

// differs is one way in which the guest is not as it was left.
type differs struct {
	Attribute string `json:"attribute"` // the computed attribute that it concerns
	Text      string `json:"text"`      // in words
}

type discovered struct {
	job.Instance
	Running bool `json:"running"`
}

const rememberedKey = "guest"

type privateState interface {
	GetKey(context.Context, string) ([]byte, diag.Diagnostics)
}

type privateStateWriter interface {
	SetKey(context.Context, string, []byte) diag.Diagnostics
}

func recall(ctx context.Context, p privateState) (*remembered, diag.Diagnostics) {
	b, diags := p.GetKey(ctx, rememberedKey)
	if diags.HasError() || len(b) == 0 {
		return nil, diags
	}
	m := new(remembered)
	if err := json.Unmarshal(b, m); err != nil {
		return nil, diags // another version's; the next refresh writes it anew
	}
	return m, diags
}

func (m remembered) save(ctx context.Context, p privateStateWriter) diag.Diagnostics {
	b, err := json.Marshal(m)
	if err != nil {
		panic("provider: internal error: " + err.Error()) // plain data
	}
	return p.SetKey(ctx, rememberedKey, b)
}

// repository is how the repository was reached at the last refresh, if a pgark_repository said so then.
func (m *remembered) repository(url string) (s repositorySettings, ok bool) {
	if m == nil || m.Location == "" {
		return s, false
	}
	noted, s := locationQuery(m.Location)
	plain, _ := locationQuery(url)
	return s, noted == plain
}

// noteRepository keeps for the apply what this process knows of the repository.
func (m *remembered) noteRepository(d *providerData, url string) {
	if k, ok := d.known(url); ok {
		m.Location = withSettings(url, k.settings)
	}
}

// selected are the instances that a selection would protect now. One that is not running at the moment is taken as it was
// protected: a stopped server tells little of itself, and stopping it is no change of plan.
func (m *remembered) selected(s job.Selection) []job.Instance {
	var out []job.Instance
	for _, d := range m.Discovered {
		if !s.Match(d.Name) {
			continue
		}
		instance := d.Instance
		for _, p := range m.Protected {
			if p.Name == d.Name && !d.Running {
				instance = p
			}
		}
		out = append(out, instance)
	}
	return out
}

// deployed is what to remember right after a deployment: all is as it should be.
func deployed(s *guest.State, arch string) remembered {
	m := remembered{Arch: arch, MachineID: s.Machine.ID, Runner: s.RunnerSHA256, Job: s.Job, AccessKeyID: s.AccessKeyID}
	if s.Job != nil {
		m.Protected = s.Job.Protected
		for _, i := range s.Job.Protected {
			m.Discovered = append(m.Discovered, discovered{Instance: i, Running: true})
		}
	}
	return m
}

// looked is what to remember after a look at the guest. Without a memory of what was deployed, after an import, what is
// there counts as that. wanted is the digest of this provider's runner: with that on the guest, whoever has put it there,
// it was not tampered with.
func looked(before *remembered, s *guest.State, instances []guest.Instance, arch, wanted string) remembered {
	m := remembered{Arch: arch, MachineID: s.Machine.ID, Runner: s.RunnerSHA256, Job: s.Job, AccessKeyID: s.AccessKeyID}
	if before != nil {
		m.Location = before.Location
		m.MachineID = firstOf(before.MachineID, s.Machine.ID)
		if before.Job != nil {
			m.Job = before.Job
		}
		if before.Runner != "" && s.RunnerSHA256 != wanted {
			m.Runner = before.Runner
		}
	}
	if s.Job != nil {
		m.Protected = s.Job.Protected
	}
	for _, i := range instances {
		m.Discovered = append(m.Discovered, discovered{Instance: i.Instance, Running: i.Running})
	}
	m.Differences = m.compare(s)
	return m
}

// compare says how a guest is not as it was left, one sentence for each. What depends on the declaration is for
// planRepairs.
func (m remembered) compare(s *guest.State) []differs {
	var out []differs
	add := func(attribute, format string, values ...any) {
		out = append(out, differs{attribute, fmt.Sprintf(format, values...)})
	}
	if m.MachineID != s.Machine.ID {
		add("machine_id", "another machine answers: the job was deployed on the machine %s, and this is %s (%s)", m.MachineID, s.Machine.ID, s.Machine.Host)
	}
	switch {
	case s.RunnerSHA256 == "":
		add("runner_sha256", "the runner's binary is missing, or the link to it is broken")
	case m.Runner != "" && s.RunnerSHA256 != m.Runner:
		add("runner_sha256", "the runner's binary was replaced: found %s, deployed was %s", shortDigest(s.RunnerSHA256), shortDigest(m.Runner))
	}
	switch {
	case s.Job == nil:
		add("config_sha256", "the job file is missing or unreadable: %s", s.JobProblem)
	case m.Job != nil && m.Job.Digest() != s.Job.Digest():
		add("config_sha256", "the job file was edited: %s", strings.Join(changedMembers(m.Job, s.Job), ", "))
	}
	if s.CredentialsChanged {
		add("guest_has_credentials", "the file with the S3 keys was changed by hand")
	}
	for _, i := range s.Instances {
		if text := runnerInWords(i); text != "" {
			add("runners", "%s", text)
		}
		for _, text := range settingsInWords(i) {
			add("guest_settings_actual", "%s", text)
		}
	}
	return out
}

// runnerInWords says what is wrong with the runner of an instance; "" if nothing.
func runnerInWords(i guest.InstanceState) string {
	words := map[string]string{
		guest.RunnerStopped:  "is stopped",
		guest.RunnerMissing:  "is missing: there is no service for it",
		guest.RunnerSilent:   "runs, but does not answer at its socket",
		guest.RunnerOutdated: "still runs another binary than the one that is installed",
		guest.RunnerMasked:   "cannot start: its unit is masked",
		guest.RunnerDisabled: "does not start with the machine: its unit is disabled",
		guest.RunnerEdited:   "does not run as deployed: its unit was edited",
	}
	if i.Runner == guest.RunnerRunning {
		return ""
	}
	text := fmt.Sprintf("the runner of %s %s", i.Name, firstOf(words[i.Runner], "is "+i.Runner))
	if i.Detail != "" {
		text += " (" + i.Detail + ")"
	}
	return text
}

// settingsInWords says which of an instance's settings do not hand its WAL to us, or will not after its next restart. Of
// commands only the program is named: the rest may hold a password.
func settingsInWords(i guest.InstanceState) []string {
	var out []string
	add := func(format string, values ...any) { out = append(out, fmt.Sprintf(format, values...)) }
	command, readable := i.Settings["archive_command"]
	ours, theirs := guest.SplitCommand(command)
	wantedOurs, wantedTheirs := guest.SplitCommand(i.Wanted)
	switch {
	case !readable || command == i.Wanted || i.Wanted == "" && ours != "":
	case command == "":
		add("archive_command of %s is empty: its WAL is not archived", i.Name)
	case ours == "":
		add("archive_command of %s is set by somebody else, to %q, expected pgark's", i.Name, guest.ProgramOf(command))
	case ours != wantedOurs:
		add("archive_command of %s hands the WAL to another pgark, expected %q", i.Name, wantedOurs)
	case wantedTheirs == "":
		add("archive_command of %s runs %q behind pgark's, which was not there", i.Name, guest.ProgramOf(theirs))
	case theirs == "":
		add("archive_command of %s does not run %q any more, which is chained behind pgark's", i.Name, guest.ProgramOf(wantedTheirs))
	default:
		add("archive_command of %s runs %q behind pgark's, and the one that is chained there is %q; they differ", i.Name, guest.ProgramOf(theirs), guest.ProgramOf(wantedTheirs))
	}
	if library := i.Settings["archive_library"]; library != "" {
		add("archive_library of %s is %q, which takes the place of archive_command; expected it empty", i.Name, library)
	}
	if i.Settings["archive_mode"] == "off" {
		add("archive_mode of %s is off: its WAL is not archived", i.Name)
	}
	if names, readable := i.Settings[synchronousNames]; i.Waiting && readable && !guest.NamesPgark(names) {
		add("synchronous_standby_names of %s is %q and does not name pgark: commits do not wait until they are in the repository", i.Name, names)
	}
	if i.LeftSlot != "" {
		add("the replication slot %s of %s is left over, and keeps WAL from being removed", i.LeftSlot, i.Name)
	}
	for _, name := range slices.Sorted(maps.Keys(i.Pending)) {
		add("%s of %s will be %q after its next restart, and no WAL is archived then", name, i.Name, i.Pending[name])
	}
	return out
}

// changedMembers names the parts in which two jobs differ, as the job file writes them: "image.schedule". The WAL
// retention is another resource's.
func changedMembers(a, b *job.Job) []string {
	members := func(j *job.Job) map[string]string {
		plain := *j
		plain.WALRetention = nil
		out := map[string]string{}
		d := json.NewDecoder(bytes.NewReader(plain.Encode()))
		d.UseNumber()
		var tree any
		if err := d.Decode(&tree); err != nil {
			panic("provider: internal error: " + err.Error()) // what we just wrote
		}
		flatten(tree, "", out)
		return out
	}
	before, after := members(a), members(b)
	var names []string
	for name := range before {
		if v, ok := after[name]; !ok || v != before[name] {
			names = append(names, name)
		}
	}
	for name := range after {
		if _, ok := before[name]; !ok {
			names = append(names, name)
		}
	}
	slices.Sort(names)
	return names
}

// flatten lists the leaves of a JSON document by their path; a list is a leaf.
func flatten(v any, at string, into map[string]string) {
	object, ok := v.(map[string]any)
	if !ok {
		b, _ := json.Marshal(v) // it was JSON
		into[at] = string(b)
		return
	}
	for name, member := range object {
		flatten(member, strings.TrimPrefix(at+"."+name, "."), into)
	}
}

// instancesInWords says how the instances that a selection finds now differ from those that are protected.
func instancesInWords(found, protected []job.Instance) []string {
	var out []string
	add := func(format string, values ...any) { out = append(out, fmt.Sprintf(format, values...)) }
	byName := func(list []job.Instance, name string) (job.Instance, bool) {
		i := slices.IndexFunc(list, func(i job.Instance) bool { return i.Name == name })
		if i < 0 {
			return job.Instance{}, false
		}
		return list[i], true
	}
	for _, p := range protected {
		if _, ok := byName(found, p.Name); !ok {
			add("instance %s is gone from the guest; its backups stay", p.Name)
		}
	}
	for _, f := range found {
		p, ok := byName(protected, f.Name)
		if !ok {
			add("instance %s in %s is new, and not protected yet", f.Name, f.DataDirectory)
			continue
		}
		if f.DataDirectory != p.DataDirectory {
			add("the data directory of %s has moved from %s to %s", f.Name, p.DataDirectory, f.DataDirectory)
		}
		if f.Port != p.Port {
			add("the port of %s has changed from %d to %d", f.Name, p.Port, f.Port)
		}
		if f.SocketDirectory != p.SocketDirectory {
			add("the socket of %s has moved from %s to %s", f.Name, p.SocketDirectory, f.SocketDirectory)
		}
		if f.Owner != p.Owner {
			add("the owner of %s has changed from %s to %s", f.Name, p.Owner, f.Owner)
		}
		if f.Version != p.Version {
			add("%s was upgraded from PostgreSQL %d to %d", f.Name, p.Version, f.Version)
		}
		if f.SystemID != p.SystemID {
			add("the cluster %s is another: its system identifier was %s and is %s; a new series of backups begins, and the old one stays restorable", f.Name, p.SystemID, f.SystemID)
		}
	}
	return out
}

// shortDigest is enough of a digest to tell two apart.
func shortDigest(digest string) string {
	if len(digest) > 12 {
		return digest[:12] + "…"
	}
	return digest
}
