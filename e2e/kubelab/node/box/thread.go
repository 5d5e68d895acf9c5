package box

import (
	"context"
	"fmt"
	"net"
	"os"
	"runtime"

	"golang.org/x/sys/unix"
)

// onThread runs fn on a thread that is thrown away afterwards, so that fn may change the thread's namespaces, root and
// capabilities. It never is the main thread: that one cannot end, and stands for the whole process in /proc.
func onThread(fn func() error) error {
	done := make(chan error, 1)
	go lockedThread(func() { done <- fn() })
	return <-done
}

// lockedThread calls fn on a thread other than the main one, which ends with the goroutine.
func lockedThread(fn func()) {
	runtime.LockOSThread()
	if unix.Gettid() == os.Getpid() { // hold the main thread until fn has another
		started := make(chan struct{})
		go func() {
			lockedThread(func() {
				close(started)
				fn()
			})
		}()
		<-started
		runtime.UnlockOSThread()
		return
	}
	fn() // never unlocked
}

// NetNS is a network namespace that is held open.
type NetNS struct {
	fd int
	// Path is the file it was opened from, or is bound to inside the host's file system; for messages and plugins.
	Path string
}

// OpenNetNS opens the network namespace bound to a file.
func OpenNetNS(path string) (*NetNS, error) {
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("open network namespace %s: %w", path, err)
	}
	return &NetNS{fd: fd, Path: path}, nil
}

// NewNetNS makes a network namespace whose loopback is up and in which every port may be bound by any user, as
// container runtimes make them.
func NewNetNS() (*NetNS, error) {
	n := &NetNS{fd: -1}
	err := onThread(func() error {
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			return err
		}
		if err := loopbackUp(); err != nil {
			return fmt.Errorf("loopback: %w", err)
		}
		_ = os.WriteFile("/proc/sys/net/ipv4/ip_unprivileged_port_start", []byte("0"), 0)
		fd, err := unix.Open("/proc/thread-self/ns/net", unix.O_RDONLY|unix.O_CLOEXEC, 0)
		n.fd = fd
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("make network namespace: %w", err)
	}
	return n, nil
}

// loopbackUp sets lo of the thread's namespace up.
func loopbackUp() error {
	s, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(s)
	req, err := unix.NewIfreq("lo")
	if err != nil {
		return err
	}
	req.SetUint16(unix.IFF_UP)
	return unix.IoctlIfreq(s, unix.SIOCSIFFLAGS, req)
}

// Fd returns the file descriptor; it stays the namespace's.
func (n *NetNS) Fd() int { return n.fd }

// Close gives the namespace up; it lives on while processes are in it.
func (n *NetNS) Close() error { return unix.Close(n.fd) }

// Do runs fn on a thread inside the namespace. Sockets that fn opens on its own goroutine belong to the namespace.
func (n *NetNS) Do(fn func() error) error {
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread()
		home, err := unix.Open("/proc/thread-self/ns/net", unix.O_RDONLY|unix.O_CLOEXEC, 0)
		if err != nil {
			done <- err
			return
		}
		defer unix.Close(home)
		if err := unix.Setns(n.fd, unix.CLONE_NEWNET); err != nil {
			runtime.UnlockOSThread()
			done <- fmt.Errorf("enter network namespace %s: %w", n.Path, err)
			return
		}
		err = fn()
		if unix.Setns(home, unix.CLONE_NEWNET) == nil {
			runtime.UnlockOSThread()
		} // else the thread ends with the goroutine
		done <- err
	}()
	return <-done
}

// DialContext connects to an IP address from inside the namespace.
func (n *NetNS) DialContext(ctx context.Context, network, address string) (c net.Conn, err error) {
	err = n.Do(func() error {
		var d net.Dialer
		c, err = d.DialContext(ctx, network, address)
		return err
	})
	return c, err
}

// Listen listens on an IP address inside the namespace.
func (n *NetNS) Listen(network, address string) (l net.Listener, err error) {
	err = n.Do(func() error {
		l, err = net.Listen(network, address)
		return err
	})
	return l, err
}
