data "pgark_prerequisites" "db1" {
  host = "db1.example.com"
}

output "to_do" {
  value = [for c in data.pgark_prerequisites.db1.checks : "${c.name}: ${c.remedy}" if c.status == "fail"]
}
