package zone

import (
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/miekg/dns"

	dnsv1 "github.com/isthmus-mesh/isthmus/api/dns/v1"
	"github.com/isthmus-mesh/isthmus/discovery/mesh"
)

func sample() *Zone {
	return New(map[string]*dnsv1.Host{
		"reviews.default.global":       {Addresses: []string{"240.0.0.7", "fd69::7"}, Ports: []*dnsv1.Port{{Name: "http", Number: 9080, Protocol: "tcp"}}},
		"four.default.global":          {Addresses: []string{"240.0.0.8"}},
		"*.wild.global":                {Addresses: []string{"240.0.0.9"}},
		"db.default.svc.cluster.local": {Addresses: []string{"10.0.0.1", "10.0.0.2"}, Headless: true},
		"api.example.com":              {Addresses: []string{"240.0.0.10"}},
	}, Options{Zones: []string{"global", "cluster.local"}})
}

func TestAnswer(t *testing.T) {
	for _, c := range []struct{ ask, want string }{
		{"reviews.default.global. A", "NOERROR 240.0.0.7"},
		{"ReViews.Default.GLOBAL. A", "NOERROR 240.0.0.7"},
		{"reviews.default.global. AAAA", "NOERROR fd69::7"},
		{"reviews.default.global. MX", "NOERROR SOA"},
		{"four.default.global. AAAA", "NOERROR SOA"},
		{"none.default.global. A", "NXDOMAIN SOA"},
		{"default.global. A", "NOERROR SOA"},
		{"global. SOA", "NOERROR ns.dns.global."},
		{"global. NS", "NOERROR ns.dns.global."},
		{"dns-version.global. TXT", "NOERROR 1.1.0"},
		{"a.wild.global. A", "NOERROR 240.0.0.9"},
		{"a.b.wild.global. A", "NOERROR 240.0.0.9"},
		{"wild.global. A", "NOERROR SOA"},
		{"_http._tcp.reviews.default.global. SRV", "NOERROR 9080 reviews.default.global."},
		{"_grpc._tcp.reviews.default.global. SRV", "NXDOMAIN SOA"},
		{"reviews.default.global. SRV", "NOERROR 9080 reviews.default.global."},
		{"7.0.0.240.in-addr.arpa. PTR", "NOERROR reviews.default.global."},
		{"1.0.0.10.in-addr.arpa. PTR", "not ours"},
		{"db.default.svc.cluster.local. A", "NOERROR 10.0.0.1 10.0.0.2"},
		{"api.example.com. A", "NOERROR 240.0.0.10"},
		{"www.example.com. A", "not ours"},
	} {
		name, kind, _ := strings.Cut(c.ask, " ")
		q := new(dns.Msg)
		q.SetQuestion(name, dns.StringToType[kind])
		if got := show(sample().Answer(q)); got != c.want {
			t.Errorf("%s: %s, want %s", c.ask, got, c.want)
		}
	}
}

func show(m *dns.Msg, ours bool) string {
	if !ours {
		return "not ours"
	}
	out := []string{dns.RcodeToString[m.Rcode]}
	for _, rr := range m.Answer {
		switch rr := rr.(type) {
		case *dns.A:
			out = append(out, rr.A.String())
		case *dns.AAAA:
			out = append(out, rr.AAAA.String())
		case *dns.PTR:
			out = append(out, rr.Ptr)
		case *dns.NS:
			out = append(out, rr.Ns)
		case *dns.SOA:
			out = append(out, rr.Ns)
		case *dns.TXT:
			out = append(out, rr.Txt...)
		case *dns.SRV:
			out = append(out, strings.TrimSpace(strings.Join(strings.Fields(rr.String())[6:], " ")))
		}
	}
	if len(m.Answer) == 0 && len(m.Ns) == 1 {
		out = append(out, "SOA")
	}
	return strings.Join(out, " ")
}

func TestHosts(t *testing.T) {
	local := &mesh.Cluster{ID: "amber"}
	snap := &mesh.Snapshot{Local: local, Services: []*mesh.Service{
		{Host: "a.default.global", VIPs: []netip.Addr{netip.MustParseAddr("240.0.0.1")}, Ports: []mesh.Port{{Name: "http", Number: 80, Protocol: mesh.HTTP}}},
		{Host: "h.default.svc.cluster.local", Headless: true, Endpoints: []*mesh.Endpoint{
			{Address: "10.0.0.2", Ready: true, Cluster: "amber"}, {Address: "10.0.0.1", Ready: true, Cluster: "amber"}, {Address: "10.0.0.3", Cluster: "amber"}}},
	}}
	hosts := Hosts(snap)
	if got := hosts[1].Addresses; !slices.Equal(got, []string{"10.0.0.1", "10.0.0.2"}) {
		t.Errorf("headless: %v", got)
	}
	if got := hosts[0]; got.Addresses[0] != "240.0.0.1" || got.Ports[0].Number != 80 {
		t.Errorf("host: %v", got)
	}
}

func FuzzAnswer(f *testing.F) {
	q := new(dns.Msg)
	q.SetQuestion("_http._tcp.reviews.default.global.", dns.TypeSRV)
	packed, _ := q.Pack()
	f.Add(packed)
	f.Add([]byte{0, 1, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 1})
	z := sample()
	f.Fuzz(func(t *testing.T, packet []byte) {
		m := new(dns.Msg)
		if m.Unpack(packet) != nil {
			return
		}
		if reply, ours := z.Answer(m); ours {
			if _, err := reply.Pack(); err != nil {
				t.Fatalf("reply to %q does not pack: %v", packet, err)
			}
		}
	})
}
