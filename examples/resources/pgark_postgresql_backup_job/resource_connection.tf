# A guest of another site: behind a bastion, with another port, and a host key that is declared. pgark works as a role that
# is no superuser, and keeps its runner until somebody says otherwise.
resource "pgark_postgresql_backup_job" "ledger" {
  name          = "ledger"
  host          = "10.20.0.7"
  repository    = pgark_repository.main.url
  database_user = "pgark"
  runner_update = "manual"

  connection = {
    port         = 2222
    user         = "admin"
    bastion_host = "bastion.site-b.example.com"
    host_key     = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIJZ3m2yqkqQ0XKyC0qkPbVf9XNbBz4HS5Cw6kVKW6b2M"
  }
}
