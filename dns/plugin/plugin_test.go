package plugin

import (
	"context"
	"path/filepath"
	"strings"
	"testing"

	"github.com/coredns/caddy"
	"github.com/coredns/coredns/plugin/pkg/dnstest"
	"github.com/coredns/coredns/plugin/test"
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
		{"ttl", strings.Replace(good, "ttl 30", "ttl 9999", 1), "0 to 3600"},
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
	cfg := Config{Zones: []string{"global."}, Cache: filepath.Join(t.TempDir(), "dns.json"), TTL: 5}
	x, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	x.Next = test.NextHandler(dns.RcodeRefused, nil)
	if m := answer(t, x, "reviews.default.global.", dns.TypeA); m.Rcode != dns.RcodeServerFailure || x.Ready() {
		t.Errorf("before data: %s, ready %v", dns.RcodeToString[m.Rcode], x.Ready())
	}
	if m := answer(t, x, "example.com.", dns.TypeA); m.Rcode != dns.RcodeRefused {
		t.Errorf("another's name is not passed on: %s", dns.RcodeToString[m.Rcode])
	}
	if err := x.feed.update(xdsclient.Update{TypeURL: HostType, Added: []*discoveryv3.Resource{host(t, "reviews.default.global", "240.0.0.7")}}); err != nil {
		t.Fatal(err)
	}
	if m := answer(t, x, "reviews.default.global.", dns.TypeA); len(m.Answer) != 1 {
		t.Errorf("answer: %v", m)
	}
	if m := answer(t, x, "none.default.global.", dns.TypeA); m.Rcode != dns.RcodeNameError {
		t.Errorf("unknown name: %s", dns.RcodeToString[m.Rcode])
	}
	again, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	if m := answer(t, again, "reviews.default.global.", dns.TypeA); len(m.Answer) != 1 || !again.Ready() {
		t.Errorf("after a restart without isthmusd: %v", m)
	}
	if err := x.feed.update(xdsclient.Update{TypeURL: HostType, Removed: []string{"reviews.default.global"}}); err != nil {
		t.Fatal(err)
	}
	if m := answer(t, x, "reviews.default.global.", dns.TypeA); m.Rcode != dns.RcodeNameError {
		t.Errorf("after removal: %s", dns.RcodeToString[m.Rcode])
	}
}
