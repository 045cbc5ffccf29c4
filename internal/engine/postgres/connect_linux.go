package postgres

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"runtime"
	"syscall"
	"time"
)

// dialSocket connects to a unix socket as somebody. It does so by hand, because the kernel takes the peer's credentials
// from the thread that calls connect(2), and package net does not say which one that will be.
func dialSocket(ctx context.Context, path string, as identity) (net.Conn, error) {
	addr := &syscall.SockaddrUnix{Name: path}
	fail := func(err error) (net.Conn, error) {
		return nil, &net.OpError{Op: "dial", Net: "unix", Addr: &net.UnixAddr{Name: path, Net: "unix"}, Err: err}
	}
	if len(path) > 107 {
		return fail(fmt.Errorf("the path has %d bytes, expected at most 107", len(path)))
	}
	fd, err := syscall.Socket(syscall.AF_UNIX, syscall.SOCK_STREAM|syscall.SOCK_CLOEXEC|syscall.SOCK_NONBLOCK, 0)
	if err != nil {
		return fail(os.NewSyscallError("socket", err))
	}
	for {
		var connectErr error
		if err := actAs(as, func() { connectErr = syscall.Connect(fd, addr) }); err != nil {
			_ = syscall.Close(fd)
			return fail(err)
		}
		if connectErr == nil {
			break
		}
		// A unix socket answers at once, but for EAGAIN: the server's listen queue is full.
		if !errors.Is(connectErr, syscall.EAGAIN) && !errors.Is(connectErr, syscall.EINTR) {
			_ = syscall.Close(fd)
			return fail(os.NewSyscallError("connect", connectErr))
		}
		select {
		case <-ctx.Done():
			_ = syscall.Close(fd)
			return fail(context.Cause(ctx))
		case <-time.After(10 * time.Millisecond):
		}
	}
	file := os.NewFile(uintptr(fd), path)
	defer func() { _ = file.Close() }() // FileConn duplicates it
	conn, err := net.FileConn(file)
	if err != nil {
		return fail(err)
	}
	return conn, nil
}

// actAs runs f on a thread whose effective user and group are as. Only that thread changes: Go's own Setresuid would
// change every one. The real and saved ids stay root's, which is what allows the way back.
func actAs(as identity, f func()) error {
	if as.current {
		f()
		return nil
	}
	done := make(chan error)
	go func() {
		runtime.LockOSThread()
		const keep = ^uintptr(0)
		setGID := func(gid int) error { return rawSetID(syscall.SYS_SETRESGID, keep, uintptr(gid), keep) }
		setUID := func(uid int) error { return rawSetID(syscall.SYS_SETRESUID, keep, uintptr(uid), keep) }
		uid, gid := os.Geteuid(), os.Getegid()

		err := setGID(as.gid) // first, while we still may
		if err != nil {
			err = fmt.Errorf("switch to group %d: %w", as.gid, err)
		} else if err = setUID(as.uid); err != nil {
			err = fmt.Errorf("switch to user %d: %w", as.uid, err)
		} else {
			f()
		}
		// A goroutine that ends while locked takes its thread with it, so a thread that could not be restored never runs
		// anything else.
		if setUID(uid) == nil && setGID(gid) == nil {
			runtime.UnlockOSThread()
		}
		done <- err
	}()
	return <-done
}

// rawSetID makes the system call by itself: syscall.Setresuid would change all threads.
func rawSetID(trap uintptr, realID, effectiveID, savedID uintptr) error {
	if _, _, errno := syscall.RawSyscall(trap, realID, effectiveID, savedID); errno != 0 {
		return errno
	}
	return nil
}

// socketOwner tells who runs the server that listens on a socket.
func socketOwner(path string) (uid, gid int, err error) {
	var st syscall.Stat_t
	if err := syscall.Stat(path, &st); err != nil {
		return 0, 0, &os.PathError{Op: "stat", Path: path, Err: err}
	}
	return int(st.Uid), int(st.Gid), nil
}
