data "pgark_restore_points" "orders" {
  repository = pgark_repository.main.url
  job        = pgark_postgresql_backup_job.orders.name
}

output "recoverable_to" {
  value = data.pgark_restore_points.orders.recoverable_to
}

check "no_gaps" {
  assert {
    condition     = alltrue([for s in data.pgark_restore_points.orders.series : length(s.gaps) == 0])
    error_message = "WAL of orders is missing: some moments cannot be restored."
  }
}
