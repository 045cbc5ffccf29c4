//go:build !cgo

package repository

var zstdLibrary implementation = newGoZstd()
