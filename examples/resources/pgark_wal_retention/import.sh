# HOST/JOB
terraform import pgark_wal_retention.orders localhost/orders
