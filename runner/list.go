package main

import "github.com/spf13/cobra"

func newListCommand() *cobra.Command { return &cobra.Command{Use: "list", Hidden: true} }
