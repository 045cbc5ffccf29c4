package main

import "github.com/spf13/cobra"

func newRetentionCommand() *cobra.Command { return &cobra.Command{Use: "retention", Hidden: true} }
