# Nothing that was committed may be lost with the machine, and commits may take as long as a request to the repository.
resource "pgark_postgresql_backup_job" "payments" {
  name       = "payments"
  host       = "db3.example.com"
  repository = pgark_repository.main.url
  wal        = { synchronous = true }
}
