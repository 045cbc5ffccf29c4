resource "pgark_postgresql_backup_job" "orders" {
  name       = "orders"
  host       = "db1.example.com" # reached over SSH, as the provider's ssh block says
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
    restart                  = "allow" # archive_mode may be switched on
    existing_archive_command = "chain" # the archiver that is there goes on, behind pgark's
  }
}
