data "pgark_postgresql_instances" "here" {
  host       = "localhost"
  connection = { type = "local" }
}

output "primaries" {
  value = [for i in data.pgark_postgresql_instances.here.instances : i.name if i.role == "primary"]
}
