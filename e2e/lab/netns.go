package lab

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"strings"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// Node is one network namespace of a lab: a pod, a machine, a gateway, a router.
type Node struct {
	// Name is CLUSTER/POD ("amber/reviews-v1"), CLUSTER/NAMESPACE.POD outside namespace default, CLUSTER/GATEWAY,
	// CLUSTER/router, CLUSTER/isthmusd, CLUSTER/coredns, the machine's name, or "wan".
	Name string
	// Path is the file the namespace is bound to.
	Path string
	// Addresses are those of the pod network (or the machine's), IPv4 first.
	Addresses []netip.Addr

	fd         int
	inode      uint64
	nameserver netip.Addr
	mounts     [][2]string
}

// IP returns the node's IPv4 address; the zero Addr for nodes without one.
func (n *Node) IP() netip.Addr {
	if len(n.Addresses) == 0 {
		return netip.Addr{}
	}
	return n.Addresses[0]
}

// onThread runs fn on a thread that is thrown away afterwards, so that fn may change the thread's namespaces. It never
// is the main thread: that one cannot end, and stands for the whole process in /proc.
func onThread(fn func() error) error {
	done := make(chan error, 1)
	var run func(started chan<- struct{})
	run = func(started chan<- struct{}) {
		runtime.LockOSThread()
		if unix.Gettid() == os.Getpid() { // hold the main thread until fn has another
			other := make(chan struct{})
			go run(other)
			<-other
			close(started)
			runtime.UnlockOSThread()
			return
		}
		close(started)
		done <- fn() // never unlocked: the thread ends with the goroutine
	}
	go run(make(chan struct{}))
	return <-done
}

// makeNamespace makes a network namespace and binds it to a file.
func makeNamespace(path string) (fd int, inode uint64, err error) {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_EXCL|os.O_RDONLY, 0o400)
	if err != nil {
		return -1, 0, err
	}
	_ = f.Close()
	if err := onThread(func() error {
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			return err
		}
		return unix.Mount("/proc/thread-self/ns/net", path, "", unix.MS_BIND, "")
	}); err != nil {
		return -1, 0, fmt.Errorf("make network namespace %s: %w", filepath.Base(path), err)
	}
	if fd, err = unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC, 0); err != nil {
		return -1, 0, fmt.Errorf("open network namespace %s: %w", path, err)
	}
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return -1, 0, fmt.Errorf("stat network namespace %s: %w", path, err)
	}
	return fd, st.Ino, nil
}

// Do runs fn on a thread inside the namespace. Sockets that fn opens on its own goroutine belong to the namespace.
func (n *Node) Do(fn func() error) error {
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
			done <- fmt.Errorf("enter namespace of %s: %w", n.Name, err)
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

// Dial connects from inside the namespace; names are asked of the node's own DNS server.
func (n *Node) Dial(ctx context.Context, network, address string) (net.Conn, error) {
	host, port, err := net.SplitHostPort(address)
	if err != nil {
		return nil, err
	}
	hosts := []string{host}
	if _, err := netip.ParseAddr(host); err != nil && host != "localhost" {
		if hosts, err = n.Resolver().LookupHost(ctx, host); err != nil {
			return nil, fmt.Errorf("from %s: %w", n.Name, err)
		}
	} else if host == "localhost" {
		hosts = []string{"127.0.0.1"}
	}
	var errs []error
	for _, h := range hosts {
		c, err := n.dialIP(ctx, network, net.JoinHostPort(h, port))
		if err == nil {
			return c, nil
		}
		errs = append(errs, err)
	}
	return nil, fmt.Errorf("from %s: %w", n.Name, errors.Join(errs...))
}

func (n *Node) dialIP(ctx context.Context, network, address string) (c net.Conn, err error) {
	err = n.Do(func() error {
		var d net.Dialer
		c, err = d.DialContext(ctx, network, address)
		return err
	})
	return c, err
}

// Resolver asks the node's DNS server from inside the namespace.
func (n *Node) Resolver() *net.Resolver {
	return &net.Resolver{PreferGo: true, Dial: func(ctx context.Context, network, _ string) (net.Conn, error) {
		if !n.nameserver.IsValid() {
			return nil, fmt.Errorf("%s has no nameserver", n.Name)
		}
		return n.dialIP(ctx, network, netip.AddrPortFrom(n.nameserver, 53).String())
	}}
}

// HTTP returns a client whose connections start inside the namespace, one a request: with capture on, they go
// through the node's sidecar as the application's own would.
func (n *Node) HTTP() *http.Client {
	return &http.Client{Transport: &http.Transport{DialContext: n.Dial, DisableKeepAlives: true}}
}

func (n *Node) sysctl(name, value string) error {
	path := "/proc/sys/" + strings.ReplaceAll(name, ".", "/")
	err := n.Do(func() error { return os.WriteFile(path, []byte(value), 0) })
	if err != nil {
		return fmt.Errorf("set sysctl %s of %s: %w; /proc/sys must be writable", name, n.Name, err)
	}
	return nil
}

// handle opens a netlink handle in the namespace.
func (n *Node) handle() (*netlink.Handle, error) {
	var h *netlink.Handle
	err := n.Do(func() (err error) {
		h, err = netlink.NewHandle(unix.NETLINK_ROUTE)
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("netlink in %s: %w", n.Name, err)
	}
	return h, nil
}
