variable "backup_secret" {
  type      = string
  ephemeral = true
}

# The machine that Terraform runs on, with keys of its own. The secret is write-only: it is in no plan and no state.
resource "pgark_postgresql_backup_job" "billing" {
  name       = "billing"
  host       = "localhost"
  connection = { type = "local" }
  repository = pgark_repository.main.url

  instances = {
    include = ["16-*"]
    exclude = ["16-scratch"]
  }

  credentials = {
    source                       = "static"
    access_key_id                = "AKIAIOSFODNN7EXAMPLE"
    secret_access_key_wo         = var.backup_secret
    secret_access_key_wo_version = 1 # to be raised when the keys change
  }
}
