# What `make demo` applies: one PostgreSQL cluster on this machine, protected into an S3 server on this machine.

terraform {
  required_providers {
    pgark = {
      source = "pgark/pgark"
    }
  }
}

variable "repository" {
  description = "Where the backups go: s3://bucket/prefix."
  type        = string
}

variable "endpoint" {
  description = "URL of the S3 server."
  type        = string
}

variable "instance" {
  description = "Which cluster is protected: a name, or a pattern such as *-5432."
  type        = string
}

# Keys and region come from the environment.
provider "pgark" {
  s3 = {
    endpoint       = var.endpoint
    use_path_style = true
  }
}

resource "pgark_repository" "demo" {
  url = var.repository
}

resource "pgark_postgresql_backup_job" "demo" {
  name       = "demo"
  host       = "localhost"
  connection = { type = "local" } # the machine that Terraform runs on
  repository = pgark_repository.demo.url

  instances = {
    include = [var.instance]
  }

  image = {
    schedule  = "0 22 * * *"
    on_create = false # the tour takes its images itself
    retention = { keep_last = 7 }
  }
}

resource "pgark_wal_retention" "demo" {
  host = pgark_postgresql_backup_job.demo.host
  job  = pgark_postgresql_backup_job.demo.name

  until_image_deleted = true
}

data "pgark_postgresql_instances" "demo" {
  host       = "localhost"
  connection = { type = "local" }
}

data "pgark_prerequisites" "demo" {
  host       = "localhost"
  connection = { type = "local" }
  job        = "demo"
  repository = pgark_repository.demo.url
  include    = [var.instance]
  depends_on = [pgark_repository.demo]
}

data "pgark_restore_points" "demo" {
  repository = pgark_repository.demo.url
  job        = pgark_postgresql_backup_job.demo.name
  depends_on = [pgark_postgresql_backup_job.demo]
}

data "pgark_backup_statistics" "demo" {
  repository = pgark_repository.demo.url
  job        = pgark_postgresql_backup_job.demo.name
  depends_on = [pgark_postgresql_backup_job.demo]
}

output "protected" {
  description = "The clusters that the job protects."
  value       = [for i in pgark_postgresql_backup_job.demo.protected_instances : "${i.name} (PostgreSQL ${i.version}, ${i.data_directory})"]
}

output "ready" {
  description = "Whether every prerequisite is met."
  value       = data.pgark_prerequisites.demo.ready
}

output "images" {
  description = "What can be restored from."
  value = flatten([for s in data.pgark_restore_points.demo.series : [
    for i in s.images : "${i.id} ${i.kind}, ${i.status}: ${i.source_bytes} bytes, ${i.stored_bytes} stored"
  ]])
}

output "windows" {
  description = "When every moment can be restored."
  value = flatten([for s in data.pgark_restore_points.demo.series : [
    for w in s.windows : "${w.from} to ${w.to}"
  ]])
}

output "statistics" {
  description = "How protection fared."
  value = { for s in data.pgark_backup_statistics.demo.series : s.instance => {
    status   = s.status
    images   = s.images.success_count
    segments = s.wal.segments
  } }
}
