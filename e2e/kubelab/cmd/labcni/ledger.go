package main

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"strings"

	"golang.org/x/sys/unix"
)

// ledger keeps which pod has which address: one file an address, holding the pod's container id.
type ledger struct{ dir string }

// take reserves one address of each subnet. Addresses are given out in a circle, so that one that was given back stays
// unused for as long as possible.
func (l *ledger) take(id string, subnets []netip.Prefix) ([]netip.Addr, error) {
	unlock, err := l.lock()
	if err != nil {
		return nil, err
	}
	defer unlock()
	var out []netip.Addr
	for _, s := range subnets {
		a, err := l.takeOne(id, s)
		if err != nil {
			return nil, errors.Join(err, l.releaseLocked(id))
		}
		out = append(out, a)
	}
	return out, nil
}

func (l *ledger) takeOne(id string, subnet netip.Prefix) (netip.Addr, error) {
	last := filepath.Join(l.dir, "last_"+strings.NewReplacer("/", "_", ":", "-").Replace(subnet.String()))
	first := gateway(subnet).Next()
	at := first
	if text, err := os.ReadFile(last); err == nil {
		if a, err := netip.ParseAddr(string(text)); err == nil && subnet.Contains(a.Next()) {
			at = a.Next()
		}
	}
	for tried := 0; tried < 1<<16; tried++ {
		if !usable(subnet, at) {
			at = first
			if !usable(subnet, at) {
				break
			}
		}
		f, err := os.OpenFile(l.file(at), os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o644)
		if errors.Is(err, os.ErrExist) {
			at = at.Next()
			continue
		}
		if err != nil {
			return netip.Addr{}, err
		}
		_, err = f.WriteString(id)
		return at, errors.Join(err, f.Close(), os.WriteFile(last, []byte(at.String()), 0o644))
	}
	return netip.Addr{}, fmt.Errorf("no address is left in %v", subnet)
}

// usable leaves out what lies outside and the broadcast address.
func usable(subnet netip.Prefix, a netip.Addr) bool {
	return subnet.Contains(a) && (a.Is6() || subnet.Contains(a.Next()))
}

func (l *ledger) file(a netip.Addr) string {
	return filepath.Join(l.dir, strings.ReplaceAll(a.String(), ":", "-"))
}

func (l *ledger) release(id string) error {
	unlock, err := l.lock()
	if err != nil {
		return err
	}
	defer unlock()
	return l.releaseLocked(id)
}

func (l *ledger) releaseLocked(id string) error {
	entries, err := os.ReadDir(l.dir)
	if err != nil {
		return err
	}
	for _, e := range entries {
		path := filepath.Join(l.dir, e.Name())
		if text, err := os.ReadFile(path); err == nil && string(text) == id {
			if err := os.Remove(path); err != nil {
				return err
			}
		}
	}
	return nil
}

func (l *ledger) lock() (unlock func(), err error) {
	if err := os.MkdirAll(l.dir, 0o755); err != nil {
		return nil, err
	}
	f, err := os.OpenFile(filepath.Join(l.dir, "lock"), os.O_CREATE|os.O_RDWR, 0o644)
	if err != nil {
		return nil, err
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX); err != nil {
		_ = f.Close()
		return nil, fmt.Errorf("lock %s: %w", f.Name(), err)
	}
	return func() { _ = f.Close() }, nil
}

// gateway is the first address of a subnet.
func gateway(subnet netip.Prefix) netip.Addr { return subnet.Masked().Addr().Next() }

func single(a netip.Addr) *net.IPNet {
	return &net.IPNet{IP: a.AsSlice(), Mask: net.CIDRMask(a.BitLen(), a.BitLen())}
}

// forwarding makes the node a router. That it may not write is found out by the first packet.
func forwarding() {
	_ = os.WriteFile("/proc/sys/net/ipv4/ip_forward", []byte("1"), 0)
	_ = os.WriteFile("/proc/sys/net/ipv6/conf/all/forwarding", []byte("1"), 0)
	_ = os.WriteFile("/proc/sys/net/ipv4/conf/all/send_redirects", []byte("0"), 0)
	_ = quiet()
}

// quiet makes new interfaces' addresses usable at once: nobody else can have them.
func quiet() error {
	_ = os.WriteFile("/proc/sys/net/ipv6/conf/default/accept_dad", []byte("0"), 0)
	return nil
}

// inNamespace runs fn on a thread in a network namespace.
func inNamespace(f *os.File, fn func() error) error {
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread() // never unlocked: the thread ends with the goroutine
		if err := unix.Setns(int(f.Fd()), unix.CLONE_NEWNET); err != nil {
			done <- fmt.Errorf("enter the pod's namespace: %w", err)
			return
		}
		done <- fn()
	}()
	return <-done
}
