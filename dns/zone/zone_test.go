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
		"here.below.wild.global":       {Addresses: []string{"240.0.0.11"}},
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
		{"_tcp.reviews.default.global. SRV", "NOERROR SOA"}, // exists because of what is below
		{"_udp.reviews.default.global. SRV", "NXDOMAIN SOA"},
		{"_http._tcp.reviews.default.global. A", "NOERROR SOA"},
		{"reviews.default.global. ANY", "NOERROR RFC8482"},
		{"none.default.global. ANY", "NXDOMAIN SOA"},
		{"x.below.wild.global. A", "NXDOMAIN SOA"}, // the closest name that exists has no wildcard (RFC 4592)
		{"x.y.wild.global. AAAA", "NOERROR SOA"},
		{"*.wild.global. A", "NOERROR 240.0.0.9"},
		{"ns.dns.global. A", "NOERROR SOA"},
		{"dns-version.global. A", "NOERROR SOA"},
		{"cluster.local. SOA", "NOERROR ns.dns.cluster.local."},
		{"8.0.0.240.in-addr.arpa. TXT", "NOERROR"},
		{"7.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.9.6.d.f.ip6.arpa. PTR", "NOERROR reviews.default.global."},
		{"7.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.9.6.d.g.ip6.arpa. PTR", "not ours"},
		{"api.example.com. AAAA", "NOERROR"},
		{"api.example.com. HTTPS", "NOERROR"}, // its hints would lead around the mesh
		{"api.example.com. MX", "not ours"},
		{"example.com. A", "not ours"},
		{"a\\.b.default.global. A", "NXDOMAIN SOA"},
		{"a\\.global. A", "not ours"}, // one label
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
		q.Id = 0 // pods take turns by it
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
		case *dns.HINFO:
			out = append(out, rr.Cpu)
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
		for _, size := range []int{dns.MinMsgSize, dns.MaxMsgSize} {
			wire, result := z.Reply(nil, m, size)
			if result == NotOurs {
				continue
			}
			reply := new(dns.Msg)
			if err := reply.Unpack(wire); err != nil || len(wire) > size {
				t.Fatalf("reply to %q: %d octets, %v", packet, len(wire), err)
			}
			if !reply.Response || reply.Id != m.Id || len(reply.Question) != 1 || reply.Question[0] != m.Question[0] {
				t.Fatalf("reply to %v: %v", m, reply)
			}
		}
	})
}

func TestClusterSet(t *testing.T) {
	end := func(name, cluster, network, address string, labels map[string]string) *mesh.Endpoint {
		return &mesh.Endpoint{Workload: name, Cluster: mesh.ClusterID(cluster), Network: mesh.NetworkID(network), Address: address, Ready: true, Labels: labels}
	}
	pet := func(name string) map[string]string { return map[string]string{labelPod: name} }
	vips := func(a ...string) (out []netip.Addr) {
		for _, s := range a {
			out = append(out, netip.MustParseAddr(s))
		}
		return out
	}
	snap := &mesh.Snapshot{Local: &mesh.Cluster{ID: "amber", Network: "flat"}, Services: []*mesh.Service{
		{Host: "birch.web.shop.global", Name: "web", Namespace: "shop", VIPs: vips("240.0.0.8"), Global: true, Facts: &mesh.Facts{}},
		{Host: "db-0.cedar.db.shop.global", Name: "db", Namespace: "shop", VIPs: vips("240.0.0.9"), Global: true, Facts: &mesh.Facts{}},
		{Host: "db.shop.global", Name: "db", Namespace: "shop", Global: true, VIPs: vips("240.0.0.2"),
			Facts: &mesh.Facts{Headless: true, Ports: []mesh.ExportedPort{{Name: "sql", Number: 5432, Protocol: "TCP"}}},
			Endpoints: []*mesh.Endpoint{
				end("db-0", "amber", "flat", "10.1.0.1", pet("db-0")), end("db-x7k", "birch", "flat", "10.2.0.1", nil),
				end("db-0", "cedar", "far", "", pet("db-0")), end("db-1", "cedar", "far", "", pet("db-1")),
			}},
		{Host: "far.shop.global", Name: "far", Namespace: "shop", Global: true, VIPs: vips("240.0.0.3"), Facts: &mesh.Facts{Headless: true},
			Endpoints: []*mesh.Endpoint{end("far-0", "cedar", "far", "", nil)}},
		{Host: "hand.shop.global", Name: "entry", Namespace: "shop", Global: true, VIPs: vips("240.0.0.4")},
		{Host: "web.shop.global", Name: "web", Namespace: "shop", Global: true, VIPs: vips("240.0.0.1", "fd69::1"),
			Facts:     &mesh.Facts{Ports: []mesh.ExportedPort{{Name: "tcp", Number: 42, Protocol: "TCP"}, {Name: "udp", Number: 42, Protocol: "UDP"}}},
			Endpoints: []*mesh.Endpoint{end("web-0", "birch", "flat", "10.2.0.9", pet("web-0"))}},
		{Host: "web.shop.svc.cluster.local", Name: "web", Namespace: "shop", VIPs: vips("10.96.0.1"), Facts: &mesh.Facts{}},
	}}
	hosts := map[string]*dnsv1.Host{}
	last := ""
	for _, h := range Hosts(snap) {
		if h.Name <= last {
			t.Errorf("%s after %s", h.Name, last)
		}
		last, hosts[h.Name] = h.Name, h
	}
	z := New(hosts, Options{Zones: []string{"global", "clusterset.local"}})
	for _, c := range []struct{ ask, want string }{
		{"web.shop.svc.clusterset.local. A", "NOERROR 240.0.0.1"},
		{"web.shop.svc.clusterset.local. AAAA", "NOERROR fd69::1"},
		{"web.shop.svc.clusterset.local. SRV", "NOERROR 42 web.shop.svc.clusterset.local."},
		{"_tcp._tcp.web.shop.svc.clusterset.local. SRV", "NOERROR 42 web.shop.svc.clusterset.local."},
		{"_udp._udp.web.shop.svc.clusterset.local. SRV", "NOERROR 42 web.shop.svc.clusterset.local."},
		{"birch.web.shop.svc.clusterset.local. A", "NXDOMAIN SOA"}, // must not exist
		{"web-0.birch.web.shop.svc.clusterset.local. A", "NXDOMAIN SOA"},
		{"1.0.0.240.in-addr.arpa. PTR", "NOERROR web.shop.global."},
		{"dns-version.clusterset.local. TXT", "NOERROR 1.0.0"},
		{"dns-version.global. TXT", "NOERROR 1.1.0"},
		{"none.shop.svc.clusterset.local. A", "NXDOMAIN SOA"},
		{"hand.shop.svc.clusterset.local. A", "NXDOMAIN SOA"},
		{"shop.svc.clusterset.local. A", "NOERROR SOA"},
		{"db.shop.svc.clusterset.local. A", "NOERROR 10.1.0.1 10.2.0.1 240.0.0.9"},
		{"db-0.amber.db.shop.svc.clusterset.local. A", "NOERROR 10.1.0.1"},
		{"10-2-0-1.birch.db.shop.svc.clusterset.local. A", "NOERROR 10.2.0.1"},
		{"db-0.cedar.db.shop.svc.clusterset.local. A", "NOERROR 240.0.0.9"}, // through a gateway
		{"db-1.cedar.db.shop.svc.clusterset.local. A", "NXDOMAIN SOA"},
		{"cedar.db.shop.svc.clusterset.local. A", "NOERROR SOA"},
		{"db.shop.svc.clusterset.local. SRV", "NOERROR 5432 10-2-0-1.birch.db.shop.svc.clusterset.local. 5432 db-0.amber.db.shop.svc.clusterset.local. 5432 db-0.cedar.db.shop.svc.clusterset.local."},
		{"_sql._tcp.db.shop.svc.clusterset.local. SRV", "NOERROR 5432 10-2-0-1.birch.db.shop.svc.clusterset.local. 5432 db-0.amber.db.shop.svc.clusterset.local. 5432 db-0.cedar.db.shop.svc.clusterset.local."},
		{"far.shop.svc.clusterset.local. A", "NOERROR 240.0.0.3"}, // no pod can be dialled: the mesh's address
	} {
		name, kind, _ := strings.Cut(c.ask, " ")
		q := new(dns.Msg)
		q.SetQuestion(name, dns.StringToType[kind])
		q.Id = 0 // pods take turns by it
		if got := show(z.Answer(q)); got != c.want {
			t.Errorf("%s: %s, want %s", c.ask, got, c.want)
		}
	}
	q := new(dns.Msg)
	q.SetQuestion("_sql._tcp.db.shop.svc.clusterset.local.", dns.TypeSRV)
	if m, _ := z.Answer(q); len(m.Extra) != 3 {
		t.Errorf("additional records: %v", m.Extra)
	}
	// A hand-made object of the name wins.
	snap.Services = slices.Insert(snap.Services, 5, &mesh.Service{Host: "web.shop.svc.clusterset.local", VIPs: vips("240.9.9.9")})
	for _, h := range Hosts(snap) {
		if h.Name == "web.shop.svc.clusterset.local" && h.Addresses[0] != "240.9.9.9" {
			t.Errorf("%v", h)
		}
	}
}
