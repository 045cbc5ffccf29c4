resource "pgark_repository" "main" {
  url        = "s3://acme-backups/postgresql"
  encryption = { recipients = ["age1ql3z7hjy54pw3hyww5ayyfg7zqgvc7w3j2elw8zmrj2kg5sfn9aqmcac8p"] }
}

resource "pgark_postgresql_backup_job" "orders" {
  name       = "orders"
  host       = "localhost"
  connection = { type = "local" } # the machine that Terraform runs on
  repository = pgark_repository.main.url
  image      = { schedule = "0 22 * * *", timezone = "Europe/Berlin" }
}

resource "pgark_wal_retention" "orders" {
  host                = pgark_postgresql_backup_job.orders.host
  job                 = pgark_postgresql_backup_job.orders.name
  until_image_deleted = true
}
