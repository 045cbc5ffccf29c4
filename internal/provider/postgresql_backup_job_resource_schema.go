package provider

import (
	"context"
	"fmt"
	"time"

	"github.com/hashicorp/terraform-plugin-framework-timeouts/resource/timeouts"
	"github.com/hashicorp/terraform-plugin-framework-timetypes/timetypes"
	"github.com/hashicorp/terraform-plugin-framework-validators/int64validator"
	"github.com/hashicorp/terraform-plugin-framework-validators/setvalidator"
	"github.com/hashicorp/terraform-plugin-framework-validators/stringvalidator"
	"github.com/hashicorp/terraform-plugin-framework/attr"
	"github.com/hashicorp/terraform-plugin-framework/path"
	"github.com/hashicorp/terraform-plugin-framework/resource"
	"github.com/hashicorp/terraform-plugin-framework/resource/schema"
	"github.com/hashicorp/terraform-plugin-framework/resource/schema/booldefault"
	"github.com/hashicorp/terraform-plugin-framework/resource/schema/int64default"
	"github.com/hashicorp/terraform-plugin-framework/resource/schema/planmodifier"
	"github.com/hashicorp/terraform-plugin-framework/resource/schema/setdefault"
	"github.com/hashicorp/terraform-plugin-framework/resource/schema/stringdefault"
	"github.com/hashicorp/terraform-plugin-framework/resource/schema/stringplanmodifier"
	"github.com/hashicorp/terraform-plugin-framework/schema/validator"
	"github.com/hashicorp/terraform-plugin-framework/types"

	"github.com/pgark/terraform-provider-pgark/internal/engine/job"
	"github.com/pgark/terraform-provider-pgark/internal/provider/validators"
)

// The defaults that are the declaration's own; those of the job file are package job's.
const (
	defaultSchedule       = "0 22 * * *" // daily at 22:00, as the reference product has it
	defaultRestart        = "never"
	defaultExisting       = "fail"
	existingReplace       = "replace"
	existingChain         = "chain"
	defaultRunnerUpdate   = "auto"
	runnerUpdateManual    = "manual"
	defaultDeletionPolicy = "retain"
	deleteBackups         = "delete_backups"
	credentialsProvider   = "provider"
	credentialsInstance   = "instance_profile"
	credentialsStatic     = "static"
)

// withDefault makes a string attribute optional, with a default that the plan shows.
func withDefault(value, description string, v ...validator.String) schema.StringAttribute {
	return schema.StringAttribute{
		Optional: true, Computed: true, Default: stringdefault.StaticString(value),
		MarkdownDescription: description + " Default: `" + value + "`.",
		Validators:          v,
	}
}

func durationWithDefault(value, description string, set func(*job.Job, job.Duration)) schema.StringAttribute {
	a := withDefault(value, description, validators.String("a Go duration within the limits", func(s string) error {
		var d job.Duration
		if err := d.UnmarshalText([]byte(s)); err != nil {
			return nil //nolint:nilerr // the attribute's type says so already, and better
		}
		return validators.Job(set)(d)
	}))
	a.CustomType = timetypes.GoDurationType{}
	return a
}

func boolWithDefault(value bool, description string) schema.BoolAttribute {
	text := "`false`"
	if value {
		text = "`true`"
	}
	return schema.BoolAttribute{
		Optional: true, Computed: true, Default: booldefault.StaticBool(value),
		MarkdownDescription: description + " Default: " + text + ".",
	}
}

func keepCount(description string, set func(*job.Job, int)) schema.Int64Attribute {
	return schema.Int64Attribute{
		Optional: true, MarkdownDescription: description,
		Validators: []validator.Int64{int64validator.Between(1, 100000), jobInt64(set)},
	}
}

func jobInt64(set func(*job.Job, int)) validator.Int64 {
	rule := validators.Job(set)
	return validators.Int64("a number within the limits", func(v int64) error { return rule(int(v)) })
}

func patterns(def []attr.Value, description string, set func(*job.Job, []string)) schema.SetAttribute {
	rule := validators.Job(set)
	return schema.SetAttribute{
		ElementType: types.StringType, Optional: true, Computed: true,
		Default:             setdefault.StaticValue(types.SetValueMust(types.StringType, def)),
		MarkdownDescription: description,
		Validators: []validator.Set{setvalidator.ValueStringsAre(
			validators.String("a name or a pattern with `*`, `?` and `[a-z]`", func(s string) error { return rule([]string{s}) }))},
	}
}

// connectionAttribute is how a host is reached. It holds nothing secret.
func connectionAttribute() schema.SingleNestedAttribute {
	return schema.SingleNestedAttribute{
		MarkdownDescription: "How the host is reached, where that is not as the provider's `ssh` block says. Changing it changes nothing on the guest; it has to lead to the same machine.",
		Attributes: map[string]schema.Attribute{
			"type": withDefault(connectionSSH, "`ssh`, or `local`: the machine that Terraform runs on, as root.",
				stringvalidator.OneOf(connectionSSH, connectionLocal)),
			"port":         schema.Int64Attribute{Optional: true, MarkdownDescription: "Port of the SSH server. Default: the provider's.", Validators: []validator.Int64{int64validator.Between(1, 65535)}},
			"user":         schema.StringAttribute{Optional: true, MarkdownDescription: "Account to log in as. Default: the provider's.", Validators: []validator.String{stringvalidator.LengthAtLeast(1)}},
			"host_key":     schema.StringAttribute{Optional: true, MarkdownDescription: "Public key that the host has to show, `ssh-ed25519 AAAA…`. It comes before the one that is pinned: declare the new one after a host was set up anew.", Validators: []validator.String{validators.String("a public key, as in `ssh-ed25519 AAAA…`", checkHostKey)}},
			"bastion_host": schema.StringAttribute{Optional: true, MarkdownDescription: "Host to jump through. Default: the provider's.", Validators: hostValidators()},
		},
	}
}

func repositorySettingsAttribute() schema.SingleNestedAttribute {
	return schema.SingleNestedAttribute{
		Optional: true, Computed: true,
		MarkdownDescription: "How the repository is reached. Default: what the `pgark_repository` with this URL says, else the URL's query (`?region=…&endpoint=…&path_style=true`), else the provider's `s3` block. " +
			"To be set only where the repository is declared in another configuration and the provider's `s3` block does not fit it.",
		Attributes: map[string]schema.Attribute{
			"region":         schema.StringAttribute{Optional: true, MarkdownDescription: "Region of the bucket."},
			"endpoint":       schema.StringAttribute{Optional: true, MarkdownDescription: "URL of an S3 compatible service."},
			"use_path_style": schema.BoolAttribute{Optional: true, MarkdownDescription: "Whether the bucket stands in the path rather than in the host name."},
			"storage_class":  schema.StringAttribute{Optional: true, MarkdownDescription: "Storage class of what is stored."},
		},
	}
}

func instancesAttribute() schema.SingleNestedAttribute {
	return withDefaults(schema.SingleNestedAttribute{
		MarkdownDescription: "Which instances (clusters) on the host are protected, by name: major version, hyphen, name or port, as in `15-main`.",
		Attributes: map[string]schema.Attribute{
			"include": patterns([]attr.Value{types.StringValue("*")}, "Names or patterns of instances to protect. Default: `[\"*\"]`.",
				func(j *job.Job, p []string) { j.Instances.Include = p }),
			"exclude": patterns([]attr.Value{}, "Names or patterns of instances to leave out. Default: none.",
				func(j *job.Job, p []string) { j.Instances.Exclude = p }),
		},
	})
}

func imageAttribute() schema.SingleNestedAttribute {
	return withDefaults(schema.SingleNestedAttribute{
		MarkdownDescription: "Image backups of the volumes that hold the instance. The first is full, all others are incremental, and each is complete by itself.",
		Attributes: map[string]schema.Attribute{
			"schedule": withDefault(defaultSchedule, "When images are taken: a cron expression of five fields. An empty string: only on demand.",
				validators.String("a cron expression of five fields", validators.Job(func(j *job.Job, v string) { j.Image.Schedule = v }))),
			"timezone": withDefault(job.DefaultTimezone, "Time zone of the schedule, an IANA name.",
				validators.String("an IANA time zone, as in `Europe/Berlin`", validators.Job(func(j *job.Job, v string) { j.Image.Timezone = v }))),
			"compression": withDefault(job.DefaultCompression, "`zstd` or `none`.",
				validators.String("`zstd` or `none`", validators.Job(func(j *job.Job, v string) { j.Image.Compression = v }))),
			"parallelism": schema.Int64Attribute{
				Optional: true, Computed: true, Default: int64default.StaticInt64(0),
				MarkdownDescription: "How many files are read at once. Default: `0`, one a core.",
				Validators:          []validator.Int64{jobInt64(func(j *job.Job, v int) { j.Image.Parallelism = v })},
			},
			"max_rate": schema.Int64Attribute{
				Optional: true, MarkdownDescription: "Most bytes uploaded per second. Default: no limit.",
				Validators: []validator.Int64{int64validator.AtLeast(1)},
			},
			"capture": withDefault(job.DefaultCapture, "How the volumes are read: `auto` or `live`.",
				validators.String("`auto` or `live`", validators.Job(func(j *job.Job, v string) { j.Image.Capture = v }))),
			"retry": withDefaults(schema.SingleNestedAttribute{
				MarkdownDescription: "What happens when an image fails.",
				Attributes: map[string]schema.Attribute{
					"attempts": schema.Int64Attribute{
						Optional: true, Computed: true, Default: int64default.StaticInt64(job.DefaultRetryAttempts),
						MarkdownDescription: "How often it is tried. Default: `3`.",
						Validators:          []validator.Int64{jobInt64(func(j *job.Job, v int) { j.Image.Retry.Attempts = v })},
					},
					"wait": durationWithDefault(shortDuration(job.DefaultRetryWait), "How long to wait between attempts, as a Go duration.",
						func(j *job.Job, v job.Duration) { j.Image.Retry.Wait = v }),
				},
			}),
			"retention": schema.SingleNestedAttribute{
				Optional:            true,
				MarkdownDescription: "Which images are kept: those that any of the rules keeps. Without rules, all are kept.",
				Attributes: map[string]schema.Attribute{
					"keep_last": keepCount("The last so many images.", func(j *job.Job, v int) { j.Image.Retention.KeepLast = v }),
					"keep_days": keepCount("Images of the last so many days.", func(j *job.Job, v int) { j.Image.Retention.KeepDays = v }),
					"weekly":    keepCount("The last image of each of the last so many weeks.", func(j *job.Job, v int) { j.Image.Retention.Weekly = v }),
					"monthly":   keepCount("The last image of each of the last so many months.", func(j *job.Job, v int) { j.Image.Retention.Monthly = v }),
					"yearly":    keepCount("The last image of each of the last so many years.", func(j *job.Job, v int) { j.Image.Retention.Yearly = v }),
				},
			},
			"on_create": boolWithDefault(true, "Whether the first image is taken at once, rather than when the schedule first says so."),
		},
	})
}

// The limits of wal.interval, in minutes, as the reference product has them. A job file may have less.
const (
	leastInterval = time.Minute
	mostInterval  = 480 * time.Minute
)

func walAttribute() schema.SingleNestedAttribute {
	interval := durationWithDefault(shortDuration(job.DefaultWALInterval), "In mode `interval`: the most that is lost, as a Go duration from `1m` to `8h`. In mode `continuous` it is not used.",
		func(j *job.Job, v job.Duration) { j.WAL.Interval = v })
	interval.Validators = append(interval.Validators, validators.String("a Go duration from `1m` to `8h`", func(s string) error {
		if d, err := time.ParseDuration(s); err == nil && (d < leastInterval || d > mostInterval) {
			return fmt.Errorf("wal.interval %s: not in %s–%s", s, shortDuration(leastInterval), shortDuration(mostInterval))
		}
		return nil // what is no duration, the attribute's type says better
	}))
	return withDefaults(schema.SingleNestedAttribute{
		MarkdownDescription: "How the write-ahead log reaches the repository, and how much of it can be lost: see the guide [How much can be lost](../guides/wal.md).",
		Attributes: map[string]schema.Attribute{
			"mode": withDefault(job.DefaultWALMode, "`continuous`: WAL is streamed to the repository as PostgreSQL writes it, at most `max_lag` behind, beside archiving whole segments. "+
				"`interval`: whole segments only; PostgreSQL is made to finish one every `interval` in which something was written.",
				validators.String("`continuous` or `interval`", validators.Job(func(j *job.Job, v string) { j.WAL.Mode = v }))),
			"interval": interval,
			"max_lag": durationWithDefault(shortDuration(job.DefaultWALMaxLag), "In mode `continuous`: how long a commit may take to become durable in the repository, which is the most that is lost with the machine. A Go duration from `100ms` to `1h`. "+
				"It costs requests: on a server that commits all the time two for each `max_lag`, 7,200 an hour with `1s` (more only where the store is slow); on one that is idle none.",
				func(j *job.Job, v job.Duration) { j.WAL.MaxLag = v }),
			"max_requests_per_hour": schema.Int64Attribute{
				Optional: true,
				MarkdownDescription: "In mode `continuous`: the most requests an hour for WAL that has not filled a segment yet. While the budget is used up, `max_lag` is exceeded, and `pgark status` says so. " +
					"Whole segments are stored all the same. Default: as many as `max_lag` takes.",
				Validators: []validator.Int64{int64validator.AtLeast(1)},
			},
			"synchronous": boolWithDefault(false, "In mode `continuous`: whether every commit waits until it is durable in the repository, so that nothing is lost with the machine. pgark takes part as a synchronous standby: "+
				"`synchronous_standby_names` is set to `pgark` once it streams, where that is empty, and put back before its runner stops. "+
				"**It costs** one request to the repository for each commit (or for each group of those that commit at the same time), and as much time; "+
				"and **while the repository or the runner is away, commits wait**, also for the few seconds in which a runner is replaced by another version. It excludes `max_requests_per_hour`."),
			"slot": boolWithDefault(false, "In mode `continuous`: whether a replication slot (`pgark_` and the job's name) keeps WAL in `pg_wal` until it was streamed. Archiving does that anyway, so nothing is lost without one; "+
				"a slot spares the stream from waiting for the next segment after the runner was away. **A slot that nobody reads holds WAL back without end**: `max_slot_wal_keep_size` has to limit it, or the plan fails. It is dropped on destroy."),
			"compression": withDefault(job.DefaultCompression, "`zstd`; or `adaptive`: less of it while there is a backlog, which costs less CPU and time then and takes up to twice the room.",
				validators.String("`zstd` or `adaptive`", validators.Job(func(j *job.Job, v string) { j.WAL.Compression = v }))),
			"temp_folder": schema.StringAttribute{
				Optional: true,
				MarkdownDescription: "Directory on the guest that takes WAL while the repository is away, sealed as it would be stored there, so that PostgreSQL need not keep it. It has to exist and to belong to the instance's owner. " +
					"Default: `/var/lib/pgark/JOB/INSTANCE/spool`.",
				Validators: []validator.String{stringvalidator.LengthAtLeast(1), validators.String("an absolute path", validators.Job(func(j *job.Job, v string) { j.WAL.TempFolder = v }))},
			},
			"temp_folder_limit": schema.Int64Attribute{
				Optional:            true,
				MarkdownDescription: "Most bytes in the temporary folder of each instance. Beyond it, WAL waits in `pg_wal`. Default: what the file system has, but for 5 % and at least 1 GiB, which always stay free.",
				Validators:          []validator.Int64{int64validator.AtLeast(1)},
			},
			"transport": withDefault(job.DefaultTransport, "How WAL travels: `automatic`, `direct` or `log_shipping_servers` (**not in this build**).",
				validators.String("`automatic`, `direct` or `log_shipping_servers`", oneOf("automatic", "direct", "log_shipping_servers"))),
			"log_shipping_servers": schema.SetAttribute{
				ElementType: types.StringType, Optional: true, Computed: true,
				Default:             setdefault.StaticValue(types.SetValueMust(types.StringType, []attr.Value{})),
				MarkdownDescription: "Log shipping servers to choose from. **Not in this build.**",
			},
		},
	})
}

func guestSettingsAttribute() schema.SingleNestedAttribute {
	return withDefaults(schema.SingleNestedAttribute{
		MarkdownDescription: "What may be done to the guest's PostgreSQL. Settings are changed by `ALTER SYSTEM` and a reload; the values found are remembered on the guest and put back on destroy.",
		Attributes: map[string]schema.Attribute{
			"manage": boolWithDefault(true, "Whether settings are changed at all; if not, what is missing is a prerequisite that is not met."),
			"restart": withDefault(defaultRestart, "Whether PostgreSQL may be restarted where a setting (`archive_mode`, `wal_level`, `max_wal_senders`) needs that: `never` or `allow`.",
				stringvalidator.OneOf(defaultRestart, "allow")),
			"existing_archive_command": withDefault(defaultExisting, "What to do about an `archive_command` that is not ours: `fail`; `replace` it, until destroy puts it back; or `chain` it behind ours, so that both have to succeed, and destroy puts it back byte for byte.",
				stringvalidator.OneOf(defaultExisting, existingReplace, existingChain)),
		},
	})
}

func (r *backupJobResource) Schema(ctx context.Context, _ resource.SchemaRequest, resp *resource.SchemaResponse) {
	connection := withDefaults(connectionAttribute())
	resp.Schema = schema.Schema{
		MarkdownDescription: "Protects the PostgreSQL instances of a host: deploys the runner, configures PostgreSQL's archiving, takes image backups by schedule and ships WAL all the time. " +
			"Prerequisites are checked when the plan is made, all at once. Destroying it removes the runner and puts the settings back; **backups stay**, unless `deletion_policy` says otherwise.",
		Attributes: map[string]schema.Attribute{
			"name": schema.StringAttribute{
				Required: true, MarkdownDescription: "Name of the job, unique in its repository.",
				PlanModifiers: []planmodifier.String{stringplanmodifier.RequiresReplace()},
				Validators:    []validator.String{validators.String("letters, digits, dot, underscore and hyphen", jobName)},
			},
			"host": schema.StringAttribute{
				Required: true, MarkdownDescription: "The guest: a host name or address. It may be unknown while planning, and is what the guest is called in the repository.",
				PlanModifiers: []planmodifier.String{stringplanmodifier.RequiresReplace()},
				Validators:    hostValidators(),
			},
			connectionName: connection,
			"repository": schema.StringAttribute{
				Required: true, MarkdownDescription: "URL of the repository: `pgark_repository.NAME.url`, or `pgark_repository.NAME.location` where that has a region, endpoint or path style of its own.",
				Validators: urlValidators(),
			},
			"repository_settings": repositorySettingsAttribute(),
			"instances":           instancesAttribute(),
			"image":               imageAttribute(),
			"wal":                 walAttribute(),
			"guest_settings":      guestSettingsAttribute(),
			"credentials": schema.SingleNestedAttribute{
				Optional:            true,
				MarkdownDescription: "With which S3 keys the guest writes to the repository. Default: those of the provider. No secret enters the state.",
				Attributes: map[string]schema.Attribute{
					"source": withDefault(credentialsProvider, "`provider`: the keys that the provider uses are handed over. `static`: those given here. `instance_profile`: none, the guest finds its own.",
						stringvalidator.OneOf(credentialsProvider, credentialsInstance, credentialsStatic)),
					"access_key_id": schema.StringAttribute{
						Optional: true, MarkdownDescription: "Access key, for `static`.",
						Validators: []validator.String{stringvalidator.LengthAtLeast(1), stringvalidator.AlsoRequires(path.MatchRelative().AtParent().AtName("secret_access_key_wo"))},
					},
					"secret_access_key_wo": schema.StringAttribute{
						Optional: true, WriteOnly: true, Sensitive: true,
						MarkdownDescription: "Its secret, for `static`. Write-only: it is in no plan and no state, and may be ephemeral.",
						Validators: []validator.String{stringvalidator.AlsoRequires(
							path.MatchRelative().AtParent().AtName("access_key_id"), path.MatchRelative().AtParent().AtName("secret_access_key_wo_version"))},
					},
					"secret_access_key_wo_version": schema.Int64Attribute{
						Optional: true, MarkdownDescription: "A number to raise when the keys change, also those of the provider: what is write-only cannot be compared.",
						Validators: []validator.Int64{int64validator.Between(0, 2147483647)},
					},
				},
			},
			"database_user": schema.StringAttribute{
				Optional: true, MarkdownDescription: "PostgreSQL role that pgark works as in every instance, over the Unix socket by peer authentication. It needs no superuser, but the attribute `REPLICATION` in `wal` mode `continuous`; a grant that it lacks is a prerequisite that is not met. Default: the role of the instance's owner.",
				Validators: []validator.String{stringvalidator.LengthAtLeast(1), validators.String("a role's name", validators.Job(func(j *job.Job, v string) { j.DatabaseUser = v }))},
			},
			"enabled": boolWithDefault(true, "Whether the runner works; `false` pauses the job without removing it."),
			"runner_update": withDefault(defaultRunnerUpdate, "When the guest's runner becomes the one that this provider carries: `auto`, with the next apply; `manual`, never by itself: another one makes no difference in a plan, and a guest keeps its runner until this is set to `auto`. One that is missing is installed in any case.",
				stringvalidator.OneOf(defaultRunnerUpdate, runnerUpdateManual)),
			"deletion_policy":      withDefault(defaultDeletionPolicy, "What destroy does with the job's backups: `retain` them, or `delete_backups`.", stringvalidator.OneOf(defaultDeletionPolicy, deleteBackups)),
			"wait_for_first_image": boolWithDefault(false, "Whether apply waits until every instance has its first image. The `create` timeout has to allow for it."),

			"host_key":      hostKeyAttribute(),
			"machine_id":    schema.StringAttribute{Computed: true, MarkdownDescription: "Identity of the machine that the job runs on. Known after apply, when another machine answers."},
			"runner_sha256": schema.StringAttribute{Computed: true, MarkdownDescription: "SHA-256 of the runner on the guest. Known after apply, when another one is to be installed."},
			"config_sha256": schema.StringAttribute{Computed: true, MarkdownDescription: "SHA-256 of the job as the guest has it. Known after apply, when the guest's differs from what is declared."},
			"protected_instances": schema.ListNestedAttribute{
				Computed: true, MarkdownDescription: "The instances that the job protects.",
				NestedObject: schema.NestedAttributeObject{Attributes: map[string]schema.Attribute{
					"name":              schema.StringAttribute{Computed: true, MarkdownDescription: "Name of the instance."},
					"version":           schema.Int64Attribute{Computed: true, MarkdownDescription: "Major version of PostgreSQL."},
					"data_directory":    schema.StringAttribute{Computed: true, MarkdownDescription: "Data directory."},
					"port":              schema.Int64Attribute{Computed: true, MarkdownDescription: "Port."},
					"system_identifier": schema.StringAttribute{Computed: true, MarkdownDescription: "System identifier of the cluster, decimal."},
				}},
			},
			"guest_settings_actual": schema.MapAttribute{
				Computed: true, ElementType: types.MapType{ElemType: types.StringType},
				MarkdownDescription: "The PostgreSQL settings that pgark owns, as each protected instance has them. Known after apply, when they are not what they should be and will be repaired.",
			},
			"runners": schema.MapAttribute{
				Computed: true, ElementType: types.StringType,
				MarkdownDescription: "State of each instance's runner: `running`, `stopped`, `missing`, `silent` (it does not answer), `outdated` (it runs another binary), `masked`, `disabled` or `edited` (its unit). Known after apply, when it is not what it should be and will be repaired.",
			},
			"guest_has_credentials": schema.BoolAttribute{Computed: true, MarkdownDescription: "Whether the guest holds S3 keys for the job."},

			"timeouts": timeouts.Attributes(ctx, timeouts.Opts{
				Create: true, Read: true, Update: true, Delete: true,
				CreateDescription: "Limit for creating, as a Go duration. Default: `10m`.",
				ReadDescription:   "Limit for reading, as a Go duration. Default: `2m`.",
				UpdateDescription: "Limit for updating, as a Go duration. Default: `10m`.",
				DeleteDescription: "Limit for deleting, as a Go duration. Default: `10m`.",
			}),
		},
	}
}

// hostKeyAttribute is the key that a host has shown.
func hostKeyAttribute() schema.StringAttribute {
	return schema.StringAttribute{
		Computed: true, MarkdownDescription: "Public key that the host has shown, `ssh-ed25519 AAAA…`. From then on it has to show that one, wherever Terraform runs, unless `connection.host_key` declares another. " +
			"Null for a local connection, and under `host_key_policy = \"insecure\"`.",
	}
}

// hostValidators: import names a job as host/name, split at the first slash.
func hostValidators() []validator.String {
	return []validator.String{
		stringvalidator.LengthAtLeast(1),
		validators.String("a host name or address, without slash or blank", checkHost),
	}
}
