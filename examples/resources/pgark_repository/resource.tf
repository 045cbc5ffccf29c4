resource "pgark_repository" "main" {
  url = "s3://acme-backups/postgresql"

  encryption = {
    recipients = ["age1ql3z7hjy54pw3hyww5ayyfg7zqgvc7w3j2elw8zmrj2kg5sfn9aqmcac8p"]
  }
}

# An S3 compatible service.
resource "pgark_repository" "minio" {
  url            = "s3://backups/postgresql"
  endpoint       = "https://minio.example.com"
  use_path_style = true
}

# A directory, on NFS for example.
resource "pgark_repository" "nfs" {
  url = "file:///srv/backup/postgresql"
}
