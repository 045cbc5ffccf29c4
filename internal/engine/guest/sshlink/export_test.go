package sshlink

import "time"

// SetKeepalive has the link notice a dead host sooner.
func (l *Link) SetKeepalive(interval time.Duration) { l.keepalive = interval }
