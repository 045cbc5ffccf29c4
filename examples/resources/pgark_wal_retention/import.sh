# HOST/JOB
terraform import pgark_wal_retention.orders db1.example.com/orders
