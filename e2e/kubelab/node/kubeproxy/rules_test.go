package kubeproxy

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"syscall"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/isthmus-mesh/isthmus/e2e/kubelab/node/box"
)

// space makes a network namespace, or skips the test where that is not allowed.
func space(t *testing.T) *box.NetNS {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("needs root")
	}
	n, err := box.NewNetNS()
	if err != nil {
		if os.Getenv("REQUIRE_TOOLS") != "" {
			t.Fatal(err)
		}
		t.Skip(err)
	}
	t.Cleanup(func() { _ = n.Close() })
	return n
}

// join connects two namespaces by a pair of interfaces and gives each an address of either family and a default route.
func join(t *testing.T, a, b *box.NetNS) {
	t.Helper()
	err := a.Do(func() error {
		return netlink.LinkAdd(&netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "eth0"}, PeerName: "eth0", PeerNamespace: netlink.NsFd(b.Fd())})
	})
	for i, n := range []*box.NetNS{a, b} {
		if err == nil {
			err = n.Do(func() error {
				link, err := netlink.LinkByName("eth0")
				if err != nil {
					return err
				}
				if err := netlink.LinkSetUp(link); err != nil {
					return err
				}
				for _, p := range []netip.Prefix{netip.MustParsePrefix("10.1.1.0/24"), netip.MustParsePrefix("fd01::/64")} {
					ip := p.Addr().AsSlice()
					ip[len(ip)-1] = byte(i + 1)
					err := netlink.AddrAdd(link, &netlink.Addr{Flags: unix.IFA_F_NODAD, IPNet: &net.IPNet{IP: ip, Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}})
					if err != nil {
						return err
					}
					if i == 1 {
						gw := p.Addr().AsSlice()
						gw[len(gw)-1] = 1
						if err := netlink.RouteAdd(&netlink.Route{LinkIndex: link.Attrs().Index, Gw: gw}); err != nil {
							return err
						}
					}
				}
				return nil
			})
		}
	}
	if err != nil {
		t.Fatal(err)
	}
}

var ranges = []netip.Prefix{netip.MustParsePrefix("10.2.0.0/16"), netip.MustParsePrefix("fd02::/112")}

func TestRules(t *testing.T) {
	router, pod := space(t), space(t)
	join(t, router, pod)
	one := []Node{{Name: "n", Addresses: []netip.Addr{netip.MustParseAddr("10.1.1.1"), netip.MustParseAddr("fd01::1")}}}
	p := &Proxy{cfg: Config{Router: router, Nodes: one, ServiceCIDRs: ranges, Log: slog.New(slog.DiscardHandler)}}
	if err := p.prepareRouter(); err != nil {
		t.Fatal(err)
	}
	l, err := pod.Listen("tcp", "[::]:8080")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			_ = c.Close()
		}
	}()
	dial := func(from *box.NetNS, address string) error {
		ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
		defer cancel()
		begun := time.Now()
		c, err := from.DialContext(ctx, "tcp", address)
		if err == nil {
			_ = c.Close()
		}
		t.Logf("%s: %v after %v", address, err, time.Since(begun))
		return err
	}
	both := func(want error, addresses ...string) {
		t.Helper()
		for _, a := range addresses {
			for who, n := range map[string]*box.NetNS{"router": router, "pod": pod} {
				if err := dial(n, a); !errors.Is(err, want) {
					t.Errorf("%s from %s: %v, want %v", a, who, err, want)
				}
			}
		}
	}
	frontends := []frontend{
		{addr: netip.MustParseAddr("10.2.0.1"), proto: unix.IPPROTO_TCP, port: 80, backends: []netip.AddrPort{netip.MustParseAddrPort("10.1.1.2:8080")}},
		{addr: netip.MustParseAddr("fd02::1"), proto: unix.IPPROTO_TCP, port: 80, backends: []netip.AddrPort{netip.MustParseAddrPort("[fd01::2]:8080")}},
	}
	for range 3 { // again and again: the rules are replaced
		if err := apply(router.Fd(), frontends, one, ranges); err != nil {
			t.Fatal(err)
		}
		both(nil, "10.2.0.1:80", "[fd02::1]:80")
		both(syscall.ECONNREFUSED, "10.2.0.1:81", "10.2.0.2:80", "[fd02::2]:80")
		if err := apply(router.Fd(), nil, one, ranges); err != nil {
			t.Fatal(err)
		}
		both(syscall.ECONNREFUSED, "10.2.0.1:80", "[fd02::1]:80")
	}
}

// Rules for many Services still fit into the messages to the kernel.
func TestManyRules(t *testing.T) {
	n := space(t)
	var list []frontend
	for i := range 1000 {
		a := netip.AddrFrom4([4]byte{10, 2, byte(i >> 8), byte(i)})
		f := frontend{addr: a, proto: unix.IPPROTO_TCP, port: 80}
		for k := range 3 {
			f.backends = append(f.backends, netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, 1, byte(i >> 8), byte(i + k)}), 8080))
		}
		list = append(list, f)
	}
	begun := time.Now()
	if err := apply(n.Fd(), list, nil, ranges); err != nil {
		t.Fatal(err)
	}
	t.Logf("1000 services with 3 endpoints each in %v", time.Since(begun))
}
