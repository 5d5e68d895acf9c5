package plugin

import (
	"bytes"
	"context"
	"path/filepath"
	"strings"
	"testing"

	"github.com/coredns/caddy"
	"github.com/coredns/coredns/plugin/metrics"
	"github.com/coredns/coredns/plugin/pkg/dnstest"
	"github.com/coredns/coredns/plugin/test"
	"github.com/coredns/coredns/request"
	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"github.com/miekg/dns"
	"google.golang.org/protobuf/types/known/anypb"

	dnsv1 "github.com/isthmus-mesh/isthmus/api/dns/v1"
	"github.com/isthmus-mesh/isthmus/internal/xdsclient"
)

const good = `isthmus global {
	server 10.0.0.1:15012 10.0.0.2:15012
	server_name xds.amber.mesh
	root /root.pem
	token /token
	cluster amber
	ttl 30
}`

func TestParse(t *testing.T) {
	for _, c := range []struct{ name, in, want string }{
		{"good", good, ""},
		{"unknown", strings.Replace(good, "ttl 30", "tll 30", 1), `unknown property "tll"`},
		{"no server", strings.Replace(good, "server 10.0.0.1:15012 10.0.0.2:15012", "", 1), "server is missing"},
		{"no token", strings.Replace(good, "token /token", "", 1), "token is missing"},
		{"ttl", strings.Replace(good, "ttl 30", "ttl 9999", 1), "1 to 3600"},
		{"two arguments", strings.Replace(good, "token /token", "token /a /b", 1), "2 arguments"},
	} {
		cfg, err := parse(caddy.NewTestController("dns", c.in))
		switch {
		case c.want == "" && (err != nil || len(cfg.Servers) != 2 || cfg.TTL != 30 || cfg.Zones[0] != "global."):
			t.Errorf("%s: %+v, %v", c.name, cfg, err)
		case c.want != "" && (err == nil || !strings.Contains(err.Error(), c.want)):
			t.Errorf("%s: %v, want %q", c.name, err, c.want)
		}
	}
}

func answer(t *testing.T, x *Isthmus, name string, qtype uint16) *dns.Msg {
	t.Helper()
	q := new(dns.Msg)
	q.SetQuestion(name, qtype)
	w := dnstest.NewRecorder(&test.ResponseWriter{})
	code, err := x.ServeDNS(context.Background(), w, q)
	if err != nil {
		t.Fatal(err)
	}
	if w.Msg == nil {
		w.Msg = new(dns.Msg)
		w.Msg.Rcode = code
	}
	return w.Msg
}

func host(t *testing.T, name string, addrs ...string) *discoveryv3.Resource {
	t.Helper()
	body, err := anypb.New(&dnsv1.Host{Name: name, Addresses: addrs})
	if err != nil {
		t.Fatal(err)
	}
	return &discoveryv3.Resource{Name: name, Version: "1", Resource: body}
}

func TestServe(t *testing.T) {
	cfg := Config{Zones: []string{"global."}, Cache: filepath.Join(t.TempDir(), "hosts.cache"), TTL: 5}
	x := New(cfg)
	x.Next = test.NextHandler(dns.RcodeRefused, nil)
	if m := answer(t, x, "reviews.default.global.", dns.TypeA); m.Rcode != dns.RcodeServerFailure || x.Ready() {
		t.Errorf("before data: %s, ready %v", dns.RcodeToString[m.Rcode], x.Ready())
	}
	if m := answer(t, x, "example.com.", dns.TypeA); m.Rcode != dns.RcodeRefused {
		t.Errorf("another's name is not passed on: %s", dns.RcodeToString[m.Rcode])
	}
	if err := x.feed.update(update(host(t, "reviews.default.global", "240.0.0.7"))); err != nil {
		t.Fatal(err)
	}
	x.feed.keep.write()
	if m := answer(t, x, "reviews.default.global.", dns.TypeA); len(m.Answer) != 1 {
		t.Errorf("answer: %v", m)
	}
	if m := answer(t, x, "none.default.global.", dns.TypeA); m.Rcode != dns.RcodeNameError {
		t.Errorf("unknown name: %s", dns.RcodeToString[m.Rcode])
	}
	again := New(cfg)
	if m := answer(t, again, "reviews.default.global.", dns.TypeA); len(m.Answer) != 1 || !again.Ready() {
		t.Errorf("after a restart without isthmusd: %v", m)
	}
	bad := host(t, "late.default.global", "240.0.0.8")
	bad.Resource.TypeUrl = "type.googleapis.com/isthmus.dns.v1.Port"
	if err := x.feed.update(xdsclient.Update{TypeURL: HostType, Added: []*discoveryv3.Resource{bad}, Removed: []string{"reviews.default.global"}}); err == nil {
		t.Error("a host of another type is taken")
	}
	if m := answer(t, x, "reviews.default.global.", dns.TypeA); len(m.Answer) != 1 {
		t.Errorf("a refused response changed answers: %v", m)
	}
	if err := x.feed.update(xdsclient.Update{TypeURL: HostType, Removed: []string{"reviews.default.global"}}); err != nil {
		t.Fatal(err)
	}
	if m := answer(t, x, "reviews.default.global.", dns.TypeA); m.Rcode != dns.RcodeNameError {
		t.Errorf("after removal: %s", dns.RcodeToString[m.Rcode])
	}
}

func update(added ...*discoveryv3.Resource) xdsclient.Update {
	return xdsclient.Update{TypeURL: HostType, Added: added}
}

// rawRecorder is the writer that CoreDNS's server hands to plugins, with what reaches the client.
type rawRecorder struct {
	test.ResponseWriter
	wire []byte
}

func (w *rawRecorder) Write(b []byte) (int, error) {
	w.wire = bytes.Clone(b)
	return len(b), nil
}

// TestWriters: bytes go past nobody who would look at the message.
func TestWriters(t *testing.T) {
	x := New(Config{Zones: []string{"global."}, TTL: 5})
	if err := x.feed.update(update(host(t, "reviews.default.global", "240.0.0.7"))); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		name string
		wrap func(dns.ResponseWriter) dns.ResponseWriter
		raw  bool
	}{
		{"server", func(w dns.ResponseWriter) dns.ResponseWriter { return w }, true},
		{"prometheus", func(w dns.ResponseWriter) dns.ResponseWriter { return metrics.NewRecorder(w) }, true},
		{"another", func(w dns.ResponseWriter) dns.ResponseWriter { return dnstest.NewRecorder(w) }, false},
		{"prometheus after another", func(w dns.ResponseWriter) dns.ResponseWriter { return metrics.NewRecorder(dnstest.NewRecorder(w)) }, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			q := new(dns.Msg).SetQuestion("None.default.global.", dns.TypeA)
			client := new(rawRecorder)
			w := c.wrap(request.NewScrubWriter(q, client))
			code, err := x.ServeDNS(context.Background(), w, q)
			if err != nil || code != dns.RcodeNameError {
				t.Errorf("code %d, %v", code, err)
			}
			if (client.wire != nil) != c.raw {
				t.Errorf("bytes sent: %v, want %v", client.wire != nil, c.raw)
			}
			if r, ok := w.(*metrics.Recorder); ok && r.Rcode != dns.RcodeNameError {
				t.Errorf("prometheus is told %s", dns.RcodeToString[r.Rcode])
			}
		})
	}
}

// FuzzServeDNS: any packet that parses is answered with a packet that parses, or passed on.
func FuzzServeDNS(f *testing.F) {
	x := New(Config{Zones: []string{"global.", "in-addr.arpa."}, TTL: 5})
	x.Next = test.NextHandler(dns.RcodeRefused, nil)
	body, err := anypb.New(&dnsv1.Host{Name: "reviews.default.global", Addresses: []string{"240.0.0.7", "fd69::7"}, Ports: []*dnsv1.Port{{Name: "http", Number: 80, Protocol: "tcp"}}})
	if err != nil {
		f.Fatal(err)
	}
	if err := x.feed.update(xdsclient.Update{TypeURL: HostType, Added: []*discoveryv3.Resource{{Name: "reviews.default.global", Resource: body}}}); err != nil {
		f.Fatal(err)
	}
	for _, q := range []*dns.Msg{
		new(dns.Msg).SetQuestion("reviews.default.global.", dns.TypeA), new(dns.Msg).SetQuestion("_http._tcp.reviews.default.global.", dns.TypeSRV).SetEdns0(1232, true),
		new(dns.Msg).SetQuestion("7.0.0.240.in-addr.arpa.", dns.TypePTR), new(dns.Msg).SetNotify("global."), new(dns.Msg).SetQuestion("version.bind.", dns.TypeTXT),
	} {
		packet, err := q.Pack()
		if err != nil {
			f.Fatal(err)
		}
		f.Add(packet)
	}
	f.Fuzz(func(t *testing.T, packet []byte) {
		q := new(dns.Msg)
		if q.Unpack(packet) != nil {
			return
		}
		client := new(rawRecorder)
		if _, err := x.ServeDNS(context.Background(), request.NewScrubWriter(q, client), q); err != nil {
			t.Fatal(err)
		}
		if client.wire != nil && new(dns.Msg).Unpack(client.wire) != nil {
			t.Fatalf("answer to %v does not parse: %x", q, client.wire)
		}
	})
}
