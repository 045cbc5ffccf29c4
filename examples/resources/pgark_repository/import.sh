# By URL. Where the provider's s3 block does not say how it is reached, the URL's query does.
terraform import pgark_repository.main s3://acme-backups/postgresql
