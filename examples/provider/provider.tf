terraform {
  required_providers {
    pgark = {
      source = "pgark/pgark"
    }
  }
}

# Keys come from the AWS environment: AWS_* variables, shared files, an instance profile.
provider "pgark" {
  s3 = {
    region = "eu-central-1"
  }
}
