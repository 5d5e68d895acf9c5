package dns

import (
	"context"
	"log/slog"
	"net"
	"net/netip"
	"reflect"
	"strconv"
	"testing"
	"time"

	mdns "github.com/miekg/dns"
	"go.uber.org/goleak"

	dnsv1 "github.com/isthmus-mesh/isthmus/api/dns/v1"
	"github.com/isthmus-mesh/isthmus/dns/zone"
	"github.com/isthmus-mesh/isthmus/internal/porttest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func TestCaptureOnly(t *testing.T) {
	for _, c := range []struct {
		in   []string
		want []netip.Addr
	}{
		{[]string{"10.0.0.1:53"}, nil},
		{[]string{"127.0.0.53:53", "10.0.0.1:53"}, []netip.Addr{netip.MustParseAddr("127.0.0.53"), netip.MustParseAddr("10.0.0.1")}},
	} {
		if got := CaptureOnly(c.in); !reflect.DeepEqual(got, c.want) {
			t.Errorf("%v: got %v", c.in, got)
		}
	}
}

// upstream is a name server that knows one name.
func upstream(t *testing.T) string {
	t.Helper()
	pc, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("tcp", pc.LocalAddr().String())
	if err != nil {
		t.Fatal(err)
	}
	h := mdns.HandlerFunc(func(w mdns.ResponseWriter, q *mdns.Msg) {
		m := new(mdns.Msg).SetReply(q)
		for i := range 60 { // over what fits in a datagram without EDNS
			rr, _ := mdns.NewRR(q.Question[0].Name + " 5 IN A 192.0.2." + strconv.Itoa(i))
			m.Answer = append(m.Answer, rr)
		}
		if w.LocalAddr().Network() == "udp" {
			m.Truncate(512)
		}
		_ = w.WriteMsg(m)
	})
	for _, s := range []*mdns.Server{{PacketConn: pc, Handler: h}, {Listener: l, Handler: h}} {
		done, started := make(chan struct{}), make(chan struct{})
		s.NotifyStartedFunc = func() { close(started) }
		go func() { defer close(done); _ = s.ActivateAndServe() }()
		<-started
		t.Cleanup(func() { _ = s.Shutdown(); <-done })
	}
	return pc.LocalAddr().String()
}

func freePort(t *testing.T) int { return porttest.Take(t) }

func TestServer(t *testing.T) {
	s := New(Config{
		Port: freePort(t), Upstream: []string{"127.0.0.1:1", upstream(t)}, Log: slog.New(slog.DiscardHandler),
		Dialer: func() net.Dialer { return net.Dialer{} },
	})
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- s.Run(ctx) }()
	ask := func(network, host, name string) *mdns.Msg {
		t.Helper()
		client := mdns.Client{Net: network, Timeout: 5 * time.Second}
		for deadline := time.Now().Add(10 * time.Second); ; {
			r, _, err := client.Exchange(new(mdns.Msg).SetQuestion(name, mdns.TypeA), net.JoinHostPort(host, strconv.Itoa(s.c.Port)))
			if err == nil {
				return r
			}
			if time.Now().After(deadline) {
				t.Fatal(err)
			}
		}
	}
	if r := ask("udp", "127.0.0.1", "reviews.default.global."); r.Rcode != mdns.RcodeServerFailure {
		t.Errorf("before anything is known: %s", mdns.RcodeToString[r.Rcode])
	}
	s.Set(zone.New(map[string]*dnsv1.Host{
		"reviews.default.global": {Name: "reviews.default.global", Addresses: []string{"240.0.0.7"}},
	}, zone.Options{Zones: Zones}))
	for _, network := range []string{"udp", "tcp"} {
		if r := ask(network, "127.0.0.1", "Reviews.default.global."); len(r.Answer) != 1 {
			t.Errorf("%s: %v", network, r)
		}
		if r := ask(network, "127.0.0.1", "none.default.global."); r.Rcode != mdns.RcodeNameError {
			t.Errorf("%s: %v", network, r)
		}
	}
	if r := ask("tcp", "127.0.0.1", "example.com."); len(r.Answer) != 60 || r.Truncated {
		t.Errorf("forwarded over TCP: %d answers", len(r.Answer))
	}
	if r := ask("udp", "127.0.0.1", "example.com."); len(r.Answer) == 0 || !r.Truncated {
		t.Errorf("forwarded over UDP: %d answers, truncated %v", len(r.Answer), r.Truncated)
	}
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
}
