package main

import "github.com/spf13/cobra"

// walPush is `pgark wal push` with the arguments after it; it returns the exit code.
func walPush(args []string) int { return 1 }

func newWALCommand() *cobra.Command { return &cobra.Command{Use: "wal", Hidden: true} }
