data "pgark_postgresql_instances" "db1" {
  host = "db1.example.com"
}

output "primaries" {
  value = [for i in data.pgark_postgresql_instances.db1.instances : i.name if i.role == "primary"]
}

output "other_archivers" {
  value = { for i in data.pgark_postgresql_instances.db1.instances : i.name => i.archive_command if i.archive_command != null }
}
