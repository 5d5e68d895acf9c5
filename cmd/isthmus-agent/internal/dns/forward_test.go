package dns

import (
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"strings"
	"sync"
	"testing"

	mdns "github.com/miekg/dns"
)

// seen is what a name server sees of one question.
type seen struct {
	id   uint16
	port uint16
	name string
}

// liar answers each question over UDP with what reply makes of it, and truthfully over TCP; it returns what it was asked.
func liar(t *testing.T, reply func(q *mdns.Msg) []*mdns.Msg) (string, func() []seen) {
	t.Helper()
	pc, err := net.ListenPacket("udp", fmt.Sprintf("127.0.0.1:%d", freePort(t)))
	if err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("tcp", pc.LocalAddr().String())
	if err != nil {
		t.Fatal(err)
	}
	var mu sync.Mutex
	var asked []seen
	h := mdns.HandlerFunc(func(w mdns.ResponseWriter, q *mdns.Msg) {
		mu.Lock()
		asked = append(asked, seen{q.Id, netip.MustParseAddrPort(w.RemoteAddr().String()).Port(), q.Question[0].Name})
		mu.Unlock()
		if w.LocalAddr().Network() == "tcp" {
			_ = w.WriteMsg(truth(q))
			return
		}
		for _, m := range reply(q) {
			_ = w.WriteMsg(m)
		}
	})
	for _, s := range []*mdns.Server{{PacketConn: pc, Handler: h}, {Listener: l, Handler: h}} {
		done, started := make(chan struct{}), make(chan struct{})
		s.NotifyStartedFunc = func() { close(started) }
		go func() { defer close(done); _ = s.ActivateAndServe() }()
		<-started
		t.Cleanup(func() { _ = s.Shutdown(); <-done })
	}
	return pc.LocalAddr().String(), func() []seen { mu.Lock(); defer mu.Unlock(); return append([]seen(nil), asked...) }
}

func with(q *mdns.Msg, address string) *mdns.Msg {
	m := new(mdns.Msg).SetReply(q)
	rr, _ := mdns.NewRR(q.Question[0].Name + " 5 IN A " + address)
	m.Answer = []mdns.RR{rr}
	return m
}

func truth(q *mdns.Msg) *mdns.Msg { return with(q, "192.0.2.1") }

func lie(q *mdns.Msg, change func(m *mdns.Msg)) *mdns.Msg {
	m := with(q, "203.0.113.66")
	change(m)
	return m
}

func forwarder(upstream ...string) *Server {
	return New(Config{Upstream: upstream, Log: slog.New(slog.DiscardHandler), Dialer: func() net.Dialer { return net.Dialer{} }})
}

// TestSpoofed: packets that come before the answer, from the right address and port, are not taken for it.
func TestSpoofed(t *testing.T) {
	for _, c := range []struct {
		name string
		make func(m *mdns.Msg)
	}{
		{"id", func(m *mdns.Msg) { m.Id++ }},
		{"letters", func(m *mdns.Msg) { m.Question[0].Name = strings.ToLower(m.Question[0].Name) }},
		{"name", func(m *mdns.Msg) { m.Question[0].Name = "other.example.com." }},
		{"type", func(m *mdns.Msg) { m.Question[0].Qtype = mdns.TypeAAAA }},
		{"no question", func(m *mdns.Msg) { m.Question = nil }},
		{"a question", func(m *mdns.Msg) { m.Response = false }},
	} {
		t.Run(c.name, func(t *testing.T) {
			server, _ := liar(t, func(q *mdns.Msg) []*mdns.Msg { return []*mdns.Msg{lie(q, c.make), truth(q)} })
			q := new(mdns.Msg).SetQuestion("wWw.many-letters-to-guess.example.com.", mdns.TypeA)
			m := forwarder(server).forward(q, false)
			if m == nil || len(m.Answer) != 1 || m.Answer[0].(*mdns.A).A.String() != "192.0.2.1" {
				t.Fatalf("got %v", m)
			}
			if m.Id != q.Id || m.Question[0] != q.Question[0] || m.Answer[0].Header().Name != q.Question[0].Name {
				t.Errorf("the client gets %v", m)
			}
		})
	}
}

// TestFlooded: one who answers wrongly again and again is left, and the next name server is asked.
func TestFlooded(t *testing.T) {
	flood, _ := liar(t, func(q *mdns.Msg) (out []*mdns.Msg) {
		for range maxWrong {
			out = append(out, lie(q, func(m *mdns.Msg) { m.Id++ }))
		}
		return out
	})
	good, _ := liar(t, func(q *mdns.Msg) []*mdns.Msg { return []*mdns.Msg{truth(q)} })
	if m := forwarder(flood, good).forward(new(mdns.Msg).SetQuestion("example.com.", mdns.TypeA), false); m == nil || len(m.Answer) != 1 {
		t.Errorf("got %v", m)
	}
}

// TestUnguessable: ids, ports and letters differ from question to question.
func TestUnguessable(t *testing.T) {
	server, asked := liar(t, func(q *mdns.Msg) []*mdns.Msg { return []*mdns.Msg{truth(q)} })
	s := forwarder(server)
	const n = 40
	for range n {
		q := new(mdns.Msg).SetQuestion("www.many-letters-to-guess.example.com.", mdns.TypeA)
		q.Id = 7
		if m := s.forward(q, false); m == nil || len(m.Answer) != 1 || m.Id != 7 {
			t.Fatalf("got %v", m)
		}
	}
	ids, ports, names := map[uint16]bool{}, map[uint16]bool{}, map[string]bool{}
	for _, x := range asked() {
		ids[x.id], ports[x.port], names[x.name] = true, true, true
	}
	if len(ids) < n*3/4 || len(ports) < n/2 || len(names) < n*3/4 {
		t.Errorf("of %d questions %d ids, %d ports, %d spellings", n, len(ids), len(ports), len(names))
	}
}

func FuzzDisguise(f *testing.F) {
	f.Add("www.example.com.")
	f.Add(`a\.b\065c\\.Example.`)
	f.Fuzz(func(t *testing.T, name string) {
		q := new(mdns.Msg).SetQuestion(name, mdns.TypeA)
		packet, err := q.Pack()
		if err != nil || q.Unpack(packet) != nil || len(q.Question) != 1 {
			return
		}
		ask, err := disguised(q)
		if err != nil {
			t.Fatal(err)
		}
		if packet, err = ask.Pack(); err != nil || ask.Unpack(packet) != nil {
			t.Fatalf("%q does not pack: %v", ask.Question[0].Name, err)
		}
		if mdns.CanonicalName(ask.Question[0].Name) != mdns.CanonicalName(q.Question[0].Name) {
			t.Fatalf("%q became %q", q.Question[0].Name, ask.Question[0].Name)
		}
	})
}
