resource "pgark_wal_retention" "orders" {
  host = pgark_postgresql_backup_job.orders.host
  job  = pgark_postgresql_backup_job.orders.name

  until_image_deleted = true
}

resource "pgark_wal_retention" "billing" {
  host = pgark_postgresql_backup_job.billing.host
  job  = pgark_postgresql_backup_job.billing.name

  keep_days = 15
}
