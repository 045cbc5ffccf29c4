provider "pgark" {
  ssh = {
    user             = "deploy"
    private_key_file = "~/.ssh/deploy"

    bastion_host = "bastion.example.com"
    bastion_user = "jump"
  }
}
