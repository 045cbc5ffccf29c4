//go:build linux && cgo

package main

// client.c answers PostgreSQL before Go starts.

// #cgo CFLAGS: -O2 -Wall -Wextra
import "C"
