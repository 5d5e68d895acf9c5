package wan

import (
	"bytes"
	"context"
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"runtime"
	"slices"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"go.uber.org/goleak"
	"golang.org/x/sys/unix"
	"pgregory.net/rapid"
)

// host is a namespace of its own for one test.
type host struct{ fd int }

// newHost makes a namespace that lives as long as its file descriptor.
func newHost(t *testing.T) *host {
	t.Helper()
	h := &host{fd: -1}
	done := make(chan error)
	go func() {
		runtime.LockOSThread() // never unlocked: the thread ends with the goroutine
		err := unix.Unshare(unix.CLONE_NEWNET)
		if err == nil {
			h.fd, err = unix.Open("/proc/thread-self/ns/net", unix.O_RDONLY|unix.O_CLOEXEC, 0)
		}
		done <- err
	}()
	if err := <-done; err != nil {
		if os.Getenv("REQUIRE_TOOLS") != "" {
			t.Fatalf("network namespaces are needed: %v", err)
		}
		t.Skipf("network namespaces are needed: %v", err)
	}
	t.Cleanup(func() { unix.Close(h.fd) })
	if err := h.do(func() error {
		lo, err := netlink.LinkByName("lo")
		if err != nil {
			return err
		}
		return netlink.LinkSetUp(lo)
	}); err != nil {
		t.Fatal(err)
	}
	return h
}

func (h *host) do(fn func() error) error {
	done := make(chan error)
	go func() {
		runtime.LockOSThread()
		err := unix.Setns(h.fd, unix.CLONE_NEWNET)
		if err == nil {
			err = fn()
		}
		done <- err
	}()
	return <-done
}

func (h *host) packetConn(t *testing.T, address string) *net.UDPConn {
	t.Helper()
	var c *net.UDPConn
	if err := h.do(func() error {
		a, err := net.ResolveUDPAddr("udp", address)
		if err != nil {
			return err
		}
		c, err = net.ListenUDP("udp", a)
		return err
	}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

var (
	addrA = netip.MustParseAddrPort("192.0.2.1:9000")
	addrB = netip.MustParseAddrPort("192.0.2.2:9000")
)

// pair joins two hosts and passes packets for the rest of the test.
func pair(t *testing.T) (e *Emulator, a, b *host) {
	t.Helper()
	if _, err := os.Stat("/dev/net/tun"); err != nil && os.Getenv("REQUIRE_TOOLS") == "" {
		t.Skipf("a TUN device is needed: %v", err)
	}
	a, b = newHost(t), newHost(t)
	e = New(Config{Seed: 1})
	for _, p := range []struct {
		name string
		host *host
		ip   string
	}{{"a", a, "1"}, {"b", b, "2"}} {
		if err := e.Attach(Port{Name: p.name, Enter: p.host.do, Device: "wan", Addresses: []netip.Prefix{
			netip.MustParsePrefix("192.0.2." + p.ip + "/24"), netip.MustParsePrefix("2001:db8::" + p.ip + "/64")}}); err != nil {
			t.Fatal(err)
		}
	}
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- e.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-ended; err != nil {
			t.Errorf("run: %v", err)
		}
		goleak.VerifyNone(t, goleak.IgnoreCurrent())
	})
	return e, a, b
}

func set(t *testing.T, e *Emulator, from, to string, l Link) {
	t.Helper()
	if err := e.Set(from, to, l); err != nil {
		t.Fatal(err)
	}
}

// stream sends n numbered packets from a to b, one every gap, and returns the numbers and the times of travel in
// order of arrival. It ends when all have come or none came for a second.
func stream(t *testing.T, a, b *host, n int, gap time.Duration) (seqs []int, took []time.Duration) {
	t.Helper()
	from, to := a.packetConn(t, addrA.String()), b.packetConn(t, addrB.String())
	defer from.Close()
	defer to.Close()
	_ = to.SetReadBuffer(4 << 20)
	go func() {
		var msg [12]byte
		start := time.Now()
		for i := range n {
			if d := time.Until(start.Add(time.Duration(i) * gap)); d > 0 {
				time.Sleep(d) // the pace of the sender is what is tested
			}
			binary.BigEndian.PutUint32(msg[:], uint32(i))
			binary.BigEndian.PutUint64(msg[4:], uint64(time.Now().UnixNano()))
			if _, err := from.WriteToUDPAddrPort(msg[:], addrB); err != nil {
				return
			}
		}
	}()
	buf, wait := make([]byte, 2048), gap*time.Duration(n)+time.Second
	for len(seqs) < n {
		_ = to.SetReadDeadline(time.Now().Add(wait))
		k, err := to.Read(buf)
		if err != nil {
			break
		}
		if k == 12 {
			seqs = append(seqs, int(binary.BigEndian.Uint32(buf)))
			took = append(took, time.Since(time.Unix(0, int64(binary.BigEndian.Uint64(buf[4:])))))
		}
		wait = time.Second
	}
	return seqs, took
}

func TestPerfectLink(t *testing.T) {
	_, a, b := pair(t)
	seqs, _ := stream(t, a, b, 1000, 100*time.Microsecond)
	if len(seqs) != 1000 || !slices.IsSorted(seqs) {
		t.Fatalf("%d of 1000 arrived, in order: %v", len(seqs), slices.IsSorted(seqs))
	}
}

func TestDelayAndJitter(t *testing.T) {
	e, a, b := pair(t)
	set(t, e, "a", "b", Link{Delay: 100 * time.Millisecond, Jitter: 40 * time.Millisecond})
	seqs, took := stream(t, a, b, 400, 2*time.Millisecond)
	if len(seqs) != 400 {
		t.Fatalf("%d of 400 arrived", len(seqs))
	}
	if !slices.IsSorted(seqs) {
		t.Error("jitter alone must keep the order")
	}
	slices.Sort(took)
	if took[0] < 60*time.Millisecond {
		t.Errorf("one took %v, less than delay minus jitter", took[0])
	}
	if mid := took[200]; mid < 90*time.Millisecond || mid > 200*time.Millisecond {
		t.Errorf("median %v, want about 100ms to 140ms", mid)
	}
	if spread := took[360] - took[40]; spread < 5*time.Millisecond {
		t.Errorf("between the 10th and the 90th percentile there are %v: no jitter", spread)
	}
}

func TestLoss(t *testing.T) {
	e, a, b := pair(t)
	set(t, e, "a", "b", Link{Loss: 0.3})
	const n = 4000
	seqs, _ := stream(t, a, b, n, 50*time.Microsecond)
	if lost := 1 - float64(len(seqs))/n; lost < 0.27 || lost > 0.33 { // 4 standard deviations
		t.Errorf("%.3f were lost, want 0.3", lost)
	}
	if s := e.Stats("a", "b"); int(s.Passed) < len(seqs) || s.Lost+s.Passed < n {
		t.Errorf("stats %+v do not fit %d arrived of %d", s, len(seqs), n)
	}
}

func TestReorder(t *testing.T) {
	e, a, b := pair(t)
	set(t, e, "a", "b", Link{Delay: 30 * time.Millisecond, Reorder: 0.1})
	seqs, _ := stream(t, a, b, 1000, time.Millisecond)
	if len(seqs) != 1000 {
		t.Fatalf("%d of 1000 arrived", len(seqs))
	}
	early := 0
	for i, s := range seqs {
		if i > 0 && s < seqs[i-1] {
			early++
		}
	}
	if early < 40 || early > 160 {
		t.Errorf("%d of 1000 came behind a later one, want about 90", early)
	}
}

// TestOneWayCut: what a sends never comes, what b sends does.
func TestOneWayCut(t *testing.T) {
	e, a, b := pair(t)
	set(t, e, "a", "b", Link{Down: true})
	if seqs, _ := stream(t, a, b, 50, time.Millisecond); len(seqs) != 0 {
		t.Errorf("%d packets came through a cut", len(seqs))
	}
	from, to := b.packetConn(t, addrB.String()), a.packetConn(t, addrA.String())
	if _, err := from.WriteToUDPAddrPort([]byte("back"), addrA); err != nil {
		t.Fatal(err)
	}
	buf := make([]byte, 16)
	_ = to.SetReadDeadline(time.Now().Add(10 * time.Second))
	if n, err := to.Read(buf); err != nil || string(buf[:n]) != "back" {
		t.Errorf("the other direction: %q, %v", buf[:n], err)
	}
	from.Close()
	to.Close()
	set(t, e, "a", "b", Link{})
	if seqs, _ := stream(t, a, b, 50, time.Millisecond); len(seqs) != 50 {
		t.Errorf("after the cut %d of 50 arrived", len(seqs))
	}
}

// TestSmallMTU: TCP finds the size by the answers to packets that are too big, in both families.
func TestSmallMTU(t *testing.T) {
	for _, c := range []struct {
		name, address string
		mtu           int
	}{{"IPv4", addrB.String(), 700}, {"IPv6", "[2001:db8::2]:9000", 1280}} {
		t.Run(c.name, func(t *testing.T) {
			e, a, b := pair(t)
			set(t, e, "a", "b", Link{MTU: c.mtu})
			sent := bytes.Repeat([]byte("0123456789abcdef"), 64<<10)
			if got := transfer(t, a, b, c.address, sent); !bytes.Equal(got, sent) {
				t.Fatalf("%d of %d bytes arrived", len(got), len(sent))
			}
			if s := e.Stats("a", "b"); s.TooBig == 0 {
				t.Error("no packet was too big")
			}
		})
	}
}

// TestBadPath: TCP delivers all bytes over a path that does everything wrong at once.
func TestBadPath(t *testing.T) {
	e, a, b := pair(t)
	bad := Link{Delay: 10 * time.Millisecond, Jitter: 5 * time.Millisecond, Loss: 0.02, Reorder: 0.02, MTU: 1000}
	set(t, e, "a", "b", bad)
	set(t, e, "b", "a", bad)
	sent := bytes.Repeat([]byte("fedcba9876543210"), 16<<10)
	if got := transfer(t, a, b, addrB.String(), sent); !bytes.Equal(got, sent) {
		t.Fatalf("%d of %d bytes arrived", len(got), len(sent))
	}
}

func transfer(t *testing.T, a, b *host, address string, sent []byte) []byte {
	t.Helper()
	var l net.Listener
	if err := b.do(func() (err error) { l, err = net.Listen("tcp", address); return err }); err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	var c net.Conn
	if err := a.do(func() (err error) { c, err = net.DialTimeout("tcp", address, 20*time.Second); return err }); err != nil {
		t.Fatal(err)
	}
	_ = c.SetDeadline(time.Now().Add(60 * time.Second))
	wrote := make(chan error, 1)
	go func() {
		_, err := c.Write(sent)
		c.Close()
		wrote <- err
	}()
	s, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	_ = s.SetDeadline(time.Now().Add(60 * time.Second))
	got, err := io.ReadAll(s)
	if err != nil {
		t.Errorf("read: %v", err)
	}
	if err := <-wrote; err != nil {
		t.Errorf("write: %v", err)
	}
	return got
}

func TestRefusals(t *testing.T) {
	e := New(Config{})
	e.ports = []*port{{Port: Port{Name: "a"}}, {Port: Port{Name: "b"}}}
	for _, c := range []struct {
		from, to string
		link     Link
	}{
		{"a", "c", Link{}}, {"a", "b", Link{Loss: 1.1}}, {"a", "b", Link{Reorder: -1}}, {"a", "b", Link{MTU: 100}}, {"a", "b", Link{MTU: 9000}},
		{"a", "b", Link{Delay: -1}}, {"a", "b", Link{Delay: 1, Jitter: 2}},
	} {
		if err := e.Set(c.from, c.to, c.link); err == nil {
			t.Errorf("%s to %s %+v was taken", c.from, c.to, c.link)
		}
	}
	if err := e.Attach(Port{Name: "a"}); err == nil {
		t.Error("a second port a was taken")
	}
}

// TestOrder: without reordering a later packet is never due before an earlier one.
func TestOrder(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		e := New(Config{Seed: rapid.Uint64().Draw(t, "seed")})
		x := e.link(direction{"a", "b"})
		now, last := time.Unix(1_000_000, 0), time.Time{}
		for range 200 {
			d := time.Duration(rapid.IntRange(0, 50).Draw(t, "delay")) * time.Millisecond
			x.rule = Link{Delay: d, Jitter: d / 2, Loss: 0.1}
			now = now.Add(time.Duration(rapid.IntRange(0, 5).Draw(t, "gap")) * time.Millisecond)
			due, v := x.judge(now, 100)
			if v != pass {
				continue
			}
			if due.Before(last) || due.Before(now) {
				t.Fatalf("due %v after one due %v, sent %v", due, last, now)
			}
			last = due
		}
	})
}

// TestSameDraws: the same seed loses the same packets of a direction, another direction others.
func TestSameDraws(t *testing.T) {
	draws := func(seed uint64, from, to string) string {
		x := New(Config{Seed: seed}).link(direction{from, to})
		x.rule = Link{Loss: 0.5}
		s := ""
		for range 64 {
			_, v := x.judge(time.Unix(0, 0), 1)
			s += fmt.Sprint(int(v))
		}
		return s
	}
	if draws(7, "a", "b") != draws(7, "a", "b") {
		t.Error("one seed gave two fates")
	}
	if draws(7, "a", "b") == draws(7, "b", "a") || draws(7, "a", "b") == draws(8, "a", "b") {
		t.Error("different directions or seeds gave one fate")
	}
}

func FuzzPacket(f *testing.F) {
	f.Add([]byte{0x45, 0, 0, 20, 0, 0, 0x40, 0, 64, 6, 0, 0, 1, 2, 3, 4, 5, 6, 7, 8})
	f.Add(append([]byte{0x60, 0, 0, 0, 0, 0, 6, 64}, make([]byte, 32)...))
	f.Add([]byte{})
	f.Fuzz(func(t *testing.T, p []byte) {
		src, dst, ok := addresses(p)
		r := tooBigReply(p, 1280)
		if r == nil {
			return
		}
		s, d, valid := addresses(r)
		if !ok || !valid || s != dst || d != src {
			t.Fatalf("reply from %v to %v for a packet from %v to %v", s, d, src, dst)
		}
	})
}
