// Command terraform-provider-pgark is the Terraform and OpenTofu provider: it declares how PostgreSQL servers are
// protected, and deploys the runner that does it.
package main

import (
	"flag"
	"log"

	"github.com/hashicorp/terraform-plugin-go/tfprotov6/tf6server"

	"github.com/pgark/terraform-provider-pgark/internal/provider"
)

// version is set by the linker (GNUmakefile, .goreleaser.yml).
var version = "dev"

func main() {
	debug := flag.Bool("debug", false, "run so that a debugger can be attached, and print how Terraform is to be told")
	flag.Parse()

	var options []tf6server.ServeOpt
	if *debug {
		options = append(options, tf6server.WithManagedDebug())
	}
	if err := tf6server.Serve("registry.terraform.io/pgark/pgark", provider.NewServer(version), options...); err != nil {
		log.Fatal(err)
	}
}
