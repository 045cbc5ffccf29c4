terraform {
  required_providers {
    pgark = {
      source = "pgark/pgark"
    }
  }
}

# S3 keys come from the AWS environment: AWS_* variables, shared files, an instance profile.
provider "pgark" {
  ssh = {
    user             = "deploy" # with the lines of sudoers that the guide "SSH and sudo" has
    private_key_file = "~/.ssh/deploy"
    host_key_policy  = "accept-new" # pinned in the state from the first contact on
  }

  s3 = {
    region = "eu-central-1"
  }
}
