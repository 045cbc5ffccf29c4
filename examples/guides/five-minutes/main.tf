terraform {
  required_providers {
    pgark = { source = "pgark/pgark" }
  }
}

variable "host" {
  description = "The server: a name or an address that SSH reaches."
  type        = string
}

variable "repository" {
  description = "Where the backups go: s3://bucket/prefix. The bucket has to exist."
  type        = string
}

variable "endpoint" {
  description = "URL of an S3 compatible service; null for AWS."
  type        = string
  default     = null
}

variable "private_key_file" {
  description = "SSH key that the server accepts for root."
  type        = string
  default     = "~/.ssh/id_ed25519"
}

variable "known_hosts_file" {
  description = "Where the server's host key is known."
  type        = string
  default     = "~/.ssh/known_hosts"
}

# S3 keys and region come from the AWS environment (AWS_* variables, shared files, an instance profile).
provider "pgark" {
  ssh = {
    private_key_file = var.private_key_file
    known_hosts_file = var.known_hosts_file
  }
  s3 = {
    endpoint       = var.endpoint
    use_path_style = var.endpoint != null
  }
}

resource "pgark_repository" "main" {
  url = var.repository
}

resource "pgark_postgresql_backup_job" "orders" {
  name       = "orders"
  host       = var.host
  repository = pgark_repository.main.url
  image      = { schedule = "0 22 * * *", timezone = "Europe/Berlin" }
}

resource "pgark_wal_retention" "orders" {
  host                = pgark_postgresql_backup_job.orders.host
  job                 = pgark_postgresql_backup_job.orders.name
  until_image_deleted = true
}

output "protected" {
  value = [for i in pgark_postgresql_backup_job.orders.protected_instances : "${i.name} in ${i.data_directory}"]
}
