resource "pgark_postgresql_backup_job" "orders" {
  name       = "orders"
  host       = "localhost"
  connection = { type = "local" } # the machine that Terraform runs on
  repository = pgark_repository.main.url

  image = {
    schedule  = "0 22 * * *"
    timezone  = "Europe/Berlin"
    retention = { keep_last = 14 }
  }

  wal = {
    mode     = "interval"
    interval = "5m"
  }

  guest_settings = {
    restart = "allow" # archive_mode may be switched on
  }
}
