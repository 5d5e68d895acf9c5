package capture

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"strings"
	"syscall"
	"testing"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

func apply(t *testing.T, c Config) {
	t.Helper()
	if err := Apply(c); err != nil {
		if errors.Is(err, unix.EPERM) || errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, unix.ENOENT) {
			t.Skipf("nftables not usable: %v", err)
		}
		t.Fatal(err)
	}
	chains, err := Installed()
	must(t, err)
	if got, want := Text(chains), Text(Plan(c)); got != want {
		t.Errorf("in place:\n%s\nwanted:\n%s", got, want)
	}
}

type dial struct {
	name string
	from netns.NsHandle
	addr string
	want string
}

func (w *world) check(t *testing.T, dials []dial) {
	t.Helper()
	for _, x := range dials {
		if got := w.dial(x.from, x.addr, 0); !strings.HasPrefix(got, x.want) {
			t.Errorf("%s: got %q, want %q", x.name, got, x.want)
		}
	}
}

// TestUsers: the proxy is told by its user or by its group, without a mark.
func TestUsers(t *testing.T) {
	if !inNamespace(t) {
		return
	}
	w := newWorld(t)
	w.serve(w.peer, 8080, "direct")
	w.serve(w.here, OutboundPort, "outbound")
	for _, c := range []struct {
		name string
		cfg  Config
		want string
	}{
		{"this user", Config{UIDs: []uint32{0}}, "direct"},
		{"this group", Config{GIDs: []uint32{0}}, "direct"},
		{"another user and group", Config{UIDs: []uint32{1337}, GIDs: []uint32{1337}}, "outbound 10.0.0.2:8080"},
	} {
		apply(t, c.cfg)
		w.check(t, []dial{{c.name, w.here, "10.0.0.2:8080", c.want}})
	}
}

// TestIncludes: of ports and networks that are listed only these are captured.
func TestIncludes(t *testing.T) {
	if !inNamespace(t) {
		return
	}
	w := newWorld(t)
	for port, name := range map[int]string{8080: "direct", 3306: "direct"} {
		w.serve(w.peer, port, name)
	}
	for port, name := range map[int]string{OutboundPort: "outbound", InboundPort: "inbound", 8081: "app", 8082: "app"} {
		w.serve(w.here, port, name)
	}
	peer4 := netip.MustParsePrefix("10.0.0.2/32")
	apply(t, Config{IncludeOutboundCIDRs: []netip.Prefix{peer4}, IncludeInboundPorts: []uint16{8081}})
	w.check(t, []dial{
		{"network in the list", w.here, "10.0.0.2:8080", "outbound 10.0.0.2:8080"},
		{"network not in the list", w.here, "[fd00::2]:8080", "direct"},
		{"port in the list", w.peer, "10.0.0.1:8081", "inbound 10.0.0.1:8081"},
		{"port not in the list", w.peer, "10.0.0.1:8082", "app"},
	})
	apply(t, Config{IncludeOutboundCIDRs: []netip.Prefix{}, IncludeOutboundPorts: []uint16{3306}, IncludeInboundPorts: []uint16{}})
	w.check(t, []dial{
		{"no network, port in the list", w.here, "10.0.0.2:3306", "outbound 10.0.0.2:3306"},
		{"no network, port not in the list", w.here, "10.0.0.2:8080", "direct"},
		{"no inbound port", w.peer, "10.0.0.1:8081", "app"},
	})
	apply(t, Config{ExcludeInterfaces: []string{"a"}})
	w.check(t, []dial{
		{"out by an excluded interface", w.here, "10.0.0.2:8080", "direct"},
		{"in by an excluded interface", w.peer, "10.0.0.1:8081", "app"},
	})
	apply(t, Config{VirtualInterfaces: []string{"a"}})
	w.check(t, []dial{{"a guest's connection", w.peer, "10.0.0.1:8081", "outbound 10.0.0.1:8081"}})
}

// TestTransparent: with TPROXY the connection reaches the proxy with its own destination, and nothing is left afterwards.
func TestTransparent(t *testing.T) {
	if !inNamespace(t) {
		return
	}
	w := newWorld(t)
	apply(t, Config{Mode: TPROXY, ExcludeInboundPorts: []uint16{22}})
	must(t, Apply(Config{Mode: TPROXY, ExcludeInboundPorts: []uint16{22}})) // again: no second route or rule
	w.serve(w.here, 22, "app")
	w.serve(w.here, OutboundPort, "outbound")
	w.serve(w.peer, 8080, "direct")
	for _, network := range []string{"tcp4", "tcp6"} {
		lc := net.ListenConfig{Control: func(_, _ string, c syscall.RawConn) (err error) {
			_ = c.Control(func(fd uintptr) {
				if network == "tcp4" {
					err = unix.SetsockoptInt(int(fd), unix.SOL_IP, unix.IP_TRANSPARENT, 1)
				} else {
					err = unix.SetsockoptInt(int(fd), unix.SOL_IPV6, unix.IPV6_TRANSPARENT, 1)
				}
			})
			return err
		}}
		l, err := lc.Listen(context.Background(), network, fmt.Sprintf(":%d", InboundPort))
		must(t, err)
		t.Cleanup(func() { l.Close() })
		go func() {
			for {
				c, err := l.Accept()
				if err != nil {
					return
				}
				fmt.Fprintf(c, "transparent %s", c.LocalAddr())
				c.Close()
			}
		}()
	}
	w.check(t, []dial{
		{"inbound", w.peer, "10.0.0.1:8081", "transparent 10.0.0.1:8081"},
		{"inbound, again", w.peer, "10.0.0.1:8081", "transparent 10.0.0.1:8081"},
		{"inbound IPv6", w.peer, "[fd00::1]:8081", "transparent [fd00::1]:8081"},
		{"excluded inbound", w.peer, "10.0.0.1:22", "app"},
		{"outbound is redirected", w.here, "10.0.0.2:8080", "outbound 10.0.0.2:8080"},
	})
	must(t, Clean())
	for _, family := range []int{unix.AF_INET, unix.AF_INET6} {
		rules, err := netlink.RuleList(family)
		must(t, err)
		for _, r := range rules {
			if r.Table == tproxyTable {
				t.Errorf("left behind: rule %v", r)
			}
		}
		routes, err := netlink.RouteListFiltered(family, &netlink.Route{Table: tproxyTable}, netlink.RT_FILTER_TABLE)
		must(t, err)
		if len(routes) != 0 {
			t.Errorf("left behind: routes %v", routes)
		}
	}
	w.check(t, []dial{{"after Clean", w.peer, "10.0.0.1:22", "app"}})
}

// TestValidate: with the rules the check passes, without them it fails and says what to do.
func TestValidate(t *testing.T) {
	if !inNamespace(t) {
		return
	}
	w := newWorld(t)
	l, err := netlink.LinkByName("a")
	must(t, err)
	must(t, netlink.RouteAdd(&netlink.Route{LinkIndex: l.Attrs().Index, Gw: net.ParseIP("10.0.0.2")}))
	validate := func() (err error) {
		done := make(chan error)
		go func() { // its own goroutines are in another namespace than this locked thread's: stay in one
			done <- Validate(context.Background())
		}()
		return <-done
	}
	_ = w
	if err := validate(); !errors.Is(err, ErrNotCaptured) {
		t.Errorf("without rules: %v", err)
	}
	apply(t, Config{UIDs: []uint32{1337}})
	must(t, validate())
}
