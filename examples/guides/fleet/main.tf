variable "hosts" {
  description = "The servers, by the name of their job."
  type        = map(string)
}

resource "pgark_postgresql_backup_job" "each" {
  for_each   = var.hosts
  name       = each.key
  host       = each.value
  repository = pgark_repository.main.url
  image      = { schedule = "0 22 * * *" }
}
