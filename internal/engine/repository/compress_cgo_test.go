//go:build cgo

package repository

func init() { libraries["C"] = newCZstd() }
