resource "pgark_postgresql_backup_job" "orders" {
  name          = "orders"
  host          = "db1.example.com"
  repository    = pgark_repository.main.url
  database_user = "pgark"
}
