data "pgark_prerequisites" "here" {
  host       = "localhost"
  connection = { type = "local" }
}

output "to_do" {
  value = [for c in data.pgark_prerequisites.here.checks : "${c.name}: ${c.remedy}" if c.status == "fail"]
}
