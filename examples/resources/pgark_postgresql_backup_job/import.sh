# HOST/NAME. The guest says the rest.
terraform import pgark_postgresql_backup_job.orders localhost/orders
