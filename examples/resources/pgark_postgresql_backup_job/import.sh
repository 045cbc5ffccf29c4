# HOST/NAME. The guest says the rest. It is reached as the provider's ssh block says.
terraform import pgark_postgresql_backup_job.orders db1.example.com/orders
