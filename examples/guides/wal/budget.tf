# A server that is written to all day, on a store that bills requests: ten seconds may be lost.
resource "pgark_postgresql_backup_job" "metrics" {
  name       = "metrics"
  host       = "db2.example.com"
  repository = pgark_repository.main.url

  wal = {
    max_lag               = "10s"
    max_requests_per_hour = 1000
    temp_folder           = "/srv/pgark" # a volume of its own, which belongs to postgres
    temp_folder_limit     = 64 * 1024 * 1024 * 1024
  }
}
