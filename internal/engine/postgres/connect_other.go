//go:build !linux

package postgres

import (
	"context"
	"net"
)

// dialSocket connects as the process itself: guests are Linux machines, elsewhere only the provider runs.
func dialSocket(ctx context.Context, path string, _ identity) (net.Conn, error) {
	var d net.Dialer
	return d.DialContext(ctx, "unix", path)
}
