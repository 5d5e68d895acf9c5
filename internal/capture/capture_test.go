package capture

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// inside is set in the test process that runs in a network namespace of its own.
const inside = "ISTHMUS_CAPTURE_TEST"

// inNamespace runs the calling test once more in a new network namespace, with or without root. It reports whether this
// is that run.
func inNamespace(t *testing.T) bool {
	t.Helper()
	if os.Getenv(inside) != "" {
		return true
	}
	cmd := exec.Command(os.Args[0], "-test.run=^"+t.Name()+"$", "-test.v", "-test.count=1")
	cmd.Env = append(os.Environ(), inside+"=1")
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags:  syscall.CLONE_NEWUSER | syscall.CLONE_NEWNET,
		UidMappings: []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getuid(), Size: 1}},
		GidMappings: []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getgid(), Size: 1}},
	}
	out, err := cmd.CombinedOutput()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		t.Skipf("no network namespace: %v", err)
	}
	switch {
	case err != nil:
		t.Fatalf("inside the namespace: %v\n%s", err, out)
	case bytes.Contains(out, []byte("--- SKIP")):
		t.Skipf("inside the namespace:\n%s", out)
	}
	return false
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// world is two namespaces joined by a cable: the test's, with addresses ending in 1, and a peer's, ending in 2.
type world struct {
	t          *testing.T
	here, peer netns.NsHandle
}

func newWorld(t *testing.T) *world {
	t.Helper()
	runtime.LockOSThread()
	t.Cleanup(runtime.UnlockOSThread)
	here, err := netns.Get()
	must(t, err)
	peer, err := netns.New() // switches this thread to it
	must(t, err)
	must(t, netns.Set(here))
	w := &world{t, here, peer}
	veth := &netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "a"}, PeerName: "b", PeerNamespace: netlink.NsFd(peer)}
	if err := netlink.LinkAdd(veth); err != nil {
		t.Skipf("no veth: %v", err)
	}
	setUp := func(name, host string) {
		for link, addrs := range map[string][]string{"lo": nil, name: {"10.0.0." + host + "/24", "fd00::" + host + "/64"}} {
			l, err := netlink.LinkByName(link)
			must(t, err)
			must(t, netlink.LinkSetUp(l))
			for _, a := range addrs {
				addr, err := netlink.ParseAddr(a)
				must(t, err)
				if addr.IP.To4() == nil {
					addr.Flags = unix.IFA_F_NODAD
				}
				must(t, netlink.AddrAdd(l, addr))
			}
		}
	}
	setUp("a", "1")
	w.in(peer, func() { setUp("b", "2") })
	return w
}

func (w *world) in(ns netns.NsHandle, f func()) {
	w.t.Helper()
	must(w.t, netns.Set(ns))
	defer func() { must(w.t, netns.Set(w.here)) }()
	f()
}

// serve answers every connection to port with text and the destination it had before any redirect.
func (w *world) serve(ns netns.NsHandle, port int, text string) {
	w.t.Helper()
	w.in(ns, func() {
		l, err := net.Listen("tcp", fmt.Sprintf(":%d", port))
		must(w.t, err)
		w.t.Cleanup(func() { l.Close() })
		go func() {
			for {
				c, err := l.Accept()
				if err != nil {
					return
				}
				fmt.Fprintf(c, "%s %s", text, originalDst(c.(*net.TCPConn)))
				c.Close()
			}
		}()
	})
}

func originalDst(c *net.TCPConn) string {
	raw, err := c.SyscallConn()
	if err != nil {
		return err.Error()
	}
	out := "?"
	_ = raw.Control(func(fd uintptr) {
		if c.LocalAddr().(*net.TCPAddr).IP.To4() == nil {
			out = "v6"
			return
		}
		a, err := unix.GetsockoptIPv6Mreq(int(fd), unix.SOL_IP, 80) // SO_ORIGINAL_DST, a sockaddr_in
		if err != nil {
			out = "none"
			return
		}
		b := a.Multiaddr
		out = fmt.Sprintf("%d.%d.%d.%d:%d", b[4], b[5], b[6], b[7], int(b[2])<<8|int(b[3]))
	})
	return out
}

func (w *world) dial(ns netns.NsHandle, addr string, mark int) (answer string) {
	w.t.Helper()
	w.in(ns, func() {
		d := net.Dialer{Timeout: 500 * time.Millisecond, Control: func(_, _ string, c syscall.RawConn) error {
			var err error
			if mark != 0 {
				_ = c.Control(func(fd uintptr) { err = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_MARK, mark) })
			}
			return err
		}}
		c, err := d.Dial("tcp", addr)
		if err != nil {
			answer = "error"
			return
		}
		defer c.Close()
		_ = c.SetDeadline(time.Now().Add(2 * time.Second))
		data, _ := io.ReadAll(c)
		answer = string(data)
	})
	return answer
}

func TestRedirects(t *testing.T) {
	if !inNamespace(t) {
		return
	}
	w := newWorld(t)
	c := Config{
		Mark: 1337, ExcludeInboundPorts: []uint16{22}, ExcludeOutboundPorts: []uint16{9999},
		ExcludeOutboundCIDRs: []netip.Prefix{netip.MustParsePrefix("10.0.0.3/32"), netip.MustParsePrefix("fd00::3/128")}, DNSPort: 15053,
	}
	if err := Apply(c); err != nil {
		if errors.Is(err, unix.EPERM) || errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, unix.ENOENT) {
			t.Skipf("nftables not usable: %v", err)
		}
		t.Fatal(err)
	}
	must(t, Apply(c)) // again: in place of the first
	chains, err := Installed()
	must(t, err)
	if got, want := Text(chains), Text(Plan(c)); got != want {
		t.Errorf("in place:\n%s\nwanted:\n%s", got, want)
	}
	w.in(w.peer, func() {
		l, err := netlink.LinkByName("b")
		must(t, err)
		a, _ := netlink.ParseAddr("10.0.0.3/24")
		must(t, netlink.AddrAdd(l, a))
	})
	w.serve(w.peer, 8080, "direct")
	w.serve(w.peer, 9999, "direct")
	for port, name := range map[int]string{OutboundPort: "outbound", InboundPort: "inbound", 8081: "app", 15443: "app", 22: "app", 15053: "dns"} {
		w.serve(w.here, port, name)
	}
	for _, x := range []struct {
		name string
		from netns.NsHandle
		addr string
		mark int
		want string
	}{
		{"outbound", w.here, "10.0.0.2:8080", 0, "outbound 10.0.0.2:8080"},
		{"outbound, nobody there", w.here, "10.0.0.77:1", 0, "outbound 10.0.0.77:1"},
		{"outbound, other mark", w.here, "10.0.0.2:8080", 7, "outbound 10.0.0.2:8080"},
		{"outbound IPv6", w.here, "[fd00::2]:8080", 0, "outbound v6"},
		{"marked", w.here, "10.0.0.2:8080", 1337, "direct"},
		{"marked IPv6", w.here, "[fd00::2]:8080", 1337, "direct"},
		{"excluded port", w.here, "10.0.0.2:9999", 0, "direct"},
		{"excluded network", w.here, "10.0.0.3:8080", 0, "direct"},
		{"loopback", w.here, "127.0.0.1:8081", 0, "app"},
		{"loopback, the name server of systemd", w.here, "127.0.0.53:8081", 0, "app"},
		{"loopback, the host's own name", w.here, "127.0.1.1:8081", 0, "app"},
		{"loopback, a service's address", w.here, "127.255.0.2:8081", 0, "outbound 127.255.0.2:8081"},
		{"loopback, a service's address, marked", w.here, "127.255.0.2:8081", 1337, "app"},
		{"loopback, a service's address, excluded port", w.here, "127.255.0.2:9999", 0, "error"},
		{"own address", w.here, "10.0.0.1:8081", 0, "app"},
		{"DNS over TCP", w.here, "10.0.0.2:53", 0, "dns 10.0.0.2:53"},
		{"DNS over TCP IPv6", w.here, "[fd00::2]:53", 0, "dns v6"},
		{"inbound", w.peer, "10.0.0.1:8081", 0, "inbound 10.0.0.1:8081"},
		{"inbound, nothing listens", w.peer, "10.0.0.1:4444", 0, "inbound 10.0.0.1:4444"},
		{"inbound IPv6", w.peer, "[fd00::1]:8081", 0, "inbound v6"},
		{"own port of the mesh", w.peer, "10.0.0.1:15443", 0, "app"},
		{"excluded inbound", w.peer, "10.0.0.1:22", 0, "app"},
		{"capture port from outside", w.peer, "10.0.0.1:15006", 0, "error"},
		{"outbound port from outside", w.peer, "[fd00::1]:15001", 0, "error"},
	} {
		if got := w.dial(x.from, x.addr, x.mark); !strings.HasPrefix(got, x.want) {
			t.Errorf("%s: got %q, want %q", x.name, got, x.want)
		}
	}
	w.testUDP(t)
	must(t, Clean())
	must(t, Clean()) // nothing is there: nothing to do
	if got := w.dial(w.here, "10.0.0.2:8080", 0); !strings.HasPrefix(got, "direct") {
		t.Errorf("after Clean: %q", got)
	}
	if chains, err := Installed(); err != nil || len(chains) != 0 {
		t.Errorf("after Clean: %v, %v", chains, err)
	}
}

func (w *world) testUDP(t *testing.T) {
	for bind, remote := range map[string]string{"127.0.0.1:15053": "10.0.0.2:53", "[::1]:15053": "[fd00::2]:53"} {
		pc, err := net.ListenPacket("udp", bind)
		must(t, err)
		go func() {
			buf := make([]byte, 16)
			if _, from, err := pc.ReadFrom(buf); err == nil {
				_, _ = pc.WriteTo([]byte("answer"), from)
			}
		}()
		c, err := net.Dial("udp", remote)
		must(t, err)
		_, err = c.Write([]byte("question"))
		must(t, err)
		_ = c.SetDeadline(time.Now().Add(2 * time.Second))
		buf := make([]byte, 16)
		if n, err := c.Read(buf); err != nil || string(buf[:n]) != "answer" {
			t.Errorf("question to %s: %q, %v", remote, buf[:n], err)
		}
		c.Close()
		pc.Close()
	}
}

func TestPlanDNSServers(t *testing.T) {
	text := Text(Plan(Config{Mark: 1337, DNSPort: 15053, DNSServers: []netip.Addr{netip.MustParseAddr("127.0.0.53")}}))
	if !strings.Contains(text, "ip daddr 127.0.0.53 udp dport 53 redirect to :15053") || strings.Contains(text, "\t\tudp dport 53") {
		t.Errorf("got\n%s", text)
	}
}
