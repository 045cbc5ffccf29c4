data "pgark_backup_statistics" "orders" {
  repository = pgark_repository.main.url
  job        = pgark_postgresql_backup_job.orders.name
  period     = "168h"
}

check "protected" {
  assert {
    condition     = data.pgark_backup_statistics.orders.unprotected_instances == 0
    error_message = "The latest image of an instance of orders failed."
  }
}
