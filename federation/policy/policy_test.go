package policy

import (
	"fmt"
	"net/netip"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	federationv1 "github.com/isthmus-mesh/isthmus/api/federation/v1"
	"github.com/isthmus-mesh/isthmus/discovery/mesh"
	"github.com/isthmus-mesh/isthmus/federation/protocol"
	"google.golang.org/protobuf/proto"
)

func testSnapshot() *mesh.Snapshot {
	local := &mesh.Cluster{ID: "birch", TrustDomain: "birch.mesh", Network: "birch-net", Gateways: []netip.AddrPort{netip.MustParseAddrPort("192.0.2.9:15443")}}
	pod := func(name, identity string, tls bool) *mesh.Endpoint {
		return &mesh.Endpoint{
			Workload: name, Namespace: "default", Cluster: "birch", Network: "birch-net", Address: "10.2.0.1", Ports: map[uint32]uint32{9080: 8080, 9443: 8443},
			Labels: map[string]string{"version": "v2", "app": "reviews"}, Identity: identity, TLS: tls, Ready: name != "b", Weight: 2, Locality: "eu/north",
		}
	}
	foreign := pod("z", "spiffe://amber.mesh/ns/default/sa/reviews", true)
	foreign.Cluster = "amber"
	return &mesh.Snapshot{
		Local: local,
		Services: []*mesh.Service{
			{Host: "reviews.default.global", Name: "reviews", Namespace: "default", Global: true, Exported: true,
				VIPs: []netip.Addr{netip.MustParseAddr("240.0.0.7"), netip.MustParseAddr("fd00::7")}},
			{Host: "reviews.default.svc.cluster.local", Name: "reviews", Namespace: "default", Exported: true,
				ExportTo: []mesh.ClusterID{"amber", "cedar"},
				Ports:    []mesh.Port{{Name: "http", Number: 9080, Protocol: mesh.HTTP}, {Name: "https", Number: 9443, Protocol: mesh.HTTPS}},
				Endpoints: []*mesh.Endpoint{
					pod("b", "spiffe://birch.mesh/ns/default/sa/reviews", true),
					pod("a", "spiffe://birch.mesh/ns/default/sa/reviews", true),
					pod("plain", "spiffe://birch.mesh/ns/default/sa/reviews", false),
					pod("other-namespace", "spiffe://birch.mesh/ns/shop/sa/reviews", true),
					pod("other-domain", "spiffe://cedar.mesh/ns/default/sa/reviews", true),
					pod("slash", "spiffe://birch.mesh/ns/default/sa/a/b", true),
					foreign,
				}},
			{Host: "secret.default.svc.cluster.local", Name: "secret", Namespace: "default"},
		},
	}
}

// records signs nothing: policy looks at bodies that the core has checked.
func records(origin string, statements ...protocol.Statement) []*federationv1.Record {
	var out []*federationv1.Record
	for i, s := range statements {
		out = append(out, &federationv1.Record{Origin: origin, Kind: s.Kind, Key: s.Key, Epoch: 1, Seq: uint64(i + 1), Body: s.Body})
	}
	return out
}

func TestExports(t *testing.T) {
	snap := testSnapshot()
	got := Exports(snap)
	if len(got) != 2 || got[0].Kind != protocol.KindEndpoints || got[1].Kind != protocol.KindService || got[1].Key != "default/reviews" {
		t.Fatalf("got %v", got)
	}
	svc, ends := &federationv1.Service{}, &federationv1.Endpoints{}
	if err := proto.Unmarshal(got[1].Body, svc); err != nil {
		t.Fatal(err)
	}
	if err := proto.Unmarshal(got[0].Body, ends); err != nil {
		t.Fatal(err)
	}
	if want := (&federationv1.Service{
		Ports: []*federationv1.Port{{Name: "http", Number: 9080, Protocol: "HTTP"}, {Name: "https", Number: 9443, Protocol: "HTTPS"}},
		Vips:  []string{"240.0.0.7", "fd00::7"}, ExportTo: []string{"amber", "cedar"},
	}); !proto.Equal(svc, want) {
		t.Errorf("service is %v, want %v", svc, want)
	}
	var names []string
	for _, e := range ends.Endpoints {
		names = append(names, fmt.Sprintf("%s %s %v", e.Workload, e.ServiceAccount, e.NotReady))
	}
	if want := "a reviews false, b reviews true"; strings.Join(names, ", ") != want || !slices.Equal(ends.ExportTo, svc.ExportTo) {
		t.Errorf("endpoints are %v for %v, want %s", names, ends.ExportTo, want)
	}
	// The same input in another order gives the same bytes.
	slices.Reverse(snap.Services[1].Endpoints)
	slices.Reverse(snap.Services[1].Ports)
	slices.Reverse(snap.Services[1].ExportTo)
	slices.Reverse(snap.Services[0].VIPs)
	for range 20 {
		if again := Exports(snap); !reflect.DeepEqual(again, got) {
			t.Fatal("another order, other bytes")
		}
	}
	if Exports(nil) != nil || Exports(&mesh.Snapshot{}) != nil {
		t.Error("exports of nothing")
	}
}

func fresh(mesh.ClusterID) (mesh.Freshness, time.Time) { return mesh.Late, time.Unix(1000, 0) }

// TestRoundTrip: what one cluster exports is what another imports.
func TestRoundTrip(t *testing.T) {
	snap := testSnapshot()
	rs := records("birch", append(Exports(snap), ClusterStatement(snap.Local, []byte("key"), []string{"b", "a"}))...)
	amber := &mesh.Cluster{ID: "amber", Network: "amber-net"}
	got, problems := Imports(amber, append(rs, records("amber", ClusterStatement(amber, nil, nil))...), fresh, Options{})
	if len(problems) != 0 || len(got) != 1 {
		t.Fatalf("got %v, problems %v", got, problems)
	}
	want := mesh.Input{
		Clusters: []*mesh.Cluster{{ID: "birch", TrustDomain: "birch.mesh", Network: "birch-net", Gateways: snap.Local.Gateways, Freshness: mesh.Late, LastHeard: time.Unix(1000, 0)}},
		Imports: []*mesh.Import{{
			Cluster: "birch", Namespace: "default", Name: "reviews", Ports: snap.Services[1].Ports, VIPs: snap.Services[0].VIPs,
			Endpoints: []*mesh.Endpoint{snap.Services[1].Endpoints[1], snap.Services[1].Endpoints[0]},
		}},
	}
	for _, e := range want.Imports[0].Endpoints {
		e.Address, e.Freshness = "", mesh.Late // another network
	}
	if !reflect.DeepEqual(got[0].Input, want) {
		t.Errorf("got\n%+v\nwant\n%+v", got[0].Input, want)
	}
	// On one network the address stays.
	got, _ = Imports(&mesh.Cluster{ID: "amber", Network: "birch-net"}, rs, fresh, Options{})
	if e := got[0].Input.Imports[0].Endpoints[0]; e.Address != "10.2.0.1" {
		t.Errorf("address on the same network is %q", e.Address)
	}
	if got, _ = Imports(&mesh.Cluster{ID: "dune", Network: "dune-net"}, rs, fresh, Options{}); len(got[0].Input.Imports) != 0 {
		t.Error("dune sees what is exported to amber and cedar")
	}
}

func TestImportsRefuse(t *testing.T) {
	cluster := &federationv1.Cluster{TrustDomain: "eve.mesh", Network: "eve-net", Gateways: []string{"192.0.2.1:15443"}}
	good := &federationv1.Endpoint{Workload: "good", Ports: map[uint32]uint32{80: 80}, ServiceAccount: "a", Address: "10.9.0.1"}
	type world struct {
		cluster  *federationv1.Cluster
		service  *federationv1.Service
		endpoint *federationv1.Endpoint
		key      string
	}
	type test struct {
		name   string
		change func(*world)
		want   string // reason
	}
	var tests []test
	add := func(name, want string, change func(*world)) { tests = append(tests, test{name, change, want}) }
	for _, a := range []string{
		"127.0.0.1", "::1", "169.254.1.1", "169.254.169.254", "fd00:ec2::254", "fe80::1", "224.0.0.1", "ff02::1", "0.0.0.0", "::", "0.1.2.3",
		"::ffff:10.0.0.1", "::ffff:127.0.0.1", "fe80::1%eth0", "255.255.255.255", "240.0.0.1", "localhost", "10.0.0.1:80", "10.0.0.01",
	} {
		add("endpoint "+a, "BadAddress", func(w *world) { w.endpoint.Address = a })
		add("endpoint on our network "+a, "BadAddress", func(w *world) { w.endpoint.Address, w.cluster.Network = a, "amber-net" })
		if !strings.HasSuffix(a, ":80") {
			host := a
			if strings.Contains(a, ":") {
				host = "[" + a + "]"
			}
			add("gateway "+a, "BadGateway", func(w *world) { w.cluster.Gateways = []string{host + ":15443"} })
		}
	}
	for _, g := range []string{"192.0.2.1:0", "192.0.2.1", "gw.example.com:15443", "192.0.2.1:99999", "", "203.0.113.1:15443"} {
		add("gateway "+g, "BadGateway", func(w *world) { w.cluster.Gateways = []string{g} })
	}
	for _, v := range []string{"10.0.0.1", "239.1.1.1", "255.255.255.255", "2001:db8::1", "fc00::1", "::ffff:240.0.0.1", "x", "127.0.0.1", "fd00::1%a", "fd00:ec2::254"} {
		add("VIP "+v, "BadVIP", func(w *world) { w.service.Vips = []string{v} })
	}
	for _, n := range []string{"", "A", "*", "a..b", "-a", "a_b", "gооd", "a/b", strings.Repeat("a", 64)} {
		add("workload "+n, "BadName", func(w *world) { w.endpoint.Workload = n })
	}
	add("long workload", "NameTooLong", func(w *world) { w.endpoint.Workload = strings.TrimSuffix(strings.Repeat("abcdefghi.", 24), ".") })
	add("account", "BadName", func(w *world) { w.endpoint.ServiceAccount = "a/../b" })
	add("account of others", "BadName", func(w *world) { w.endpoint.ServiceAccount = "a/ns/b" })
	add("our network", "ForeignNetwork", func(w *world) { w.endpoint.Network = "amber-net" })
	add("no address on our network", "BadAddress", func(w *world) { w.cluster.Network, w.endpoint.Address = "amber-net", "" })
	add("our own range", "BadAddress", func(w *world) { w.cluster.Network, w.endpoint.Address = "amber-net", "10.1.2.3" })
	add("port 0", "BadPort", func(w *world) { w.endpoint.Ports = map[uint32]uint32{0: 80} })
	add("target 70000", "BadPort", func(w *world) { w.endpoint.Ports = map[uint32]uint32{80: 70000} })
	add("weight", "BadWeight", func(w *world) { w.endpoint.Weight = 1 << 31 })
	add("twice", "DuplicateWorkload", func(w *world) { w.endpoint.Workload = "good" })
	add("service port", "BadPort", func(w *world) { w.service.Ports = []*federationv1.Port{{Number: 70000}} })
	add("service port twice", "BadPort", func(w *world) { w.service.Ports = []*federationv1.Port{{Number: 80}, {Number: 80}} })
	add("port name", "BadName", func(w *world) { w.service.Ports = []*federationv1.Port{{Number: 80, Name: "Ünix"}} })
	add("service name", "BadName", func(w *world) { w.key = "default/*" })
	add("no namespace", "BadName", func(w *world) { w.key = "reviews" })
	add("for others", "NotExported", func(w *world) { w.service.ExportTo = []string{"dune"} })
	add("trust domain", "BadName", func(w *world) { w.cluster.TrustDomain = "eve mesh" })

	local := &mesh.Cluster{ID: "amber", Network: "amber-net", Gateways: []netip.AddrPort{netip.MustParseAddrPort("203.0.113.1:15443")}}
	options := Options{OwnRanges: []netip.Prefix{netip.MustParsePrefix("10.1.0.0/16")}}
	for _, tt := range tests {
		w := &world{cluster: proto.CloneOf(cluster), service: &federationv1.Service{}, endpoint: proto.CloneOf(good), key: "default/bad"}
		w.endpoint.Workload = "bad"
		tt.change(w)
		rs := records("eve",
			protocol.Statement{Kind: protocol.KindCluster, Body: encode(w.cluster)},
			protocol.Statement{Kind: protocol.KindService, Key: w.key, Body: encode(w.service)},
			protocol.Statement{Kind: protocol.KindEndpoints, Key: w.key, Body: encode(&federationv1.Endpoints{Endpoints: []*federationv1.Endpoint{good, w.endpoint}})},
			protocol.Statement{Kind: protocol.KindService, Key: "default/other", Body: encode(&federationv1.Service{})},
			protocol.Statement{Kind: protocol.KindEndpoints, Key: "default/other", Body: encode(&federationv1.Endpoints{Endpoints: []*federationv1.Endpoint{good}})})
		got, problems := Imports(local, rs, fresh, options)
		var reasons []string
		for _, p := range problems {
			reasons = append(reasons, p.Reason)
		}
		if !slices.Contains(reasons, tt.want) {
			t.Errorf("%s: problems %v, want %s", tt.name, problems, tt.want)
		}
		if len(got) != 1 {
			t.Fatalf("%s: %d origins", tt.name, len(got))
		}
		if tt.name == "trust domain" {
			continue
		}
		n := len(got[0].Input.Imports)
		if n == 0 || got[0].Input.Imports[n-1].Name != "other" || len(got[0].Input.Imports[n-1].Endpoints) != 1 {
			t.Errorf("%s: the other service is gone", tt.name)
		}
		for _, imp := range got[0].Input.Imports {
			for _, e := range imp.Endpoints {
				if e.Workload == "bad" && tt.name != "weight" && strings.HasPrefix(tt.want, "BadAddress") {
					t.Errorf("%s: the endpoint is taken", tt.name)
				}
				if !strings.HasPrefix(e.Identity, "spiffe://eve.mesh/ns/default/sa/") || e.Cluster != "eve" {
					t.Errorf("%s: identity %s of cluster %s", tt.name, e.Identity, e.Cluster)
				}
			}
		}
	}
}

func TestImportsCaps(t *testing.T) {
	many := &federationv1.Endpoints{}
	for i := range 30 {
		many.Endpoints = append(many.Endpoints, &federationv1.Endpoint{Workload: fmt.Sprintf("w%d", i)})
	}
	body := encode(many)
	rs := records("eve",
		protocol.Statement{Kind: protocol.KindCluster, Body: encode(&federationv1.Cluster{TrustDomain: "eve.mesh"})},
		protocol.Statement{Kind: protocol.KindService, Key: "a/a"}, protocol.Statement{Kind: protocol.KindEndpoints, Key: "a/a", Body: body},
		protocol.Statement{Kind: protocol.KindService, Key: "a/b"}, protocol.Statement{Kind: protocol.KindEndpoints, Key: "a/b", Body: body})
	got, problems := Imports(&mesh.Cluster{ID: "amber", Network: "amber-net"}, rs, nil, Options{MaxEndpoints: 40})
	if n := len(got[0].Input.Imports[0].Endpoints) + len(got[0].Input.Imports[1].Endpoints); n != 40 {
		t.Errorf("%d endpoints, want 40", n)
	}
	if len(problems) != 1 || problems[0].Reason != "TooManyEndpoints" || problems[0].Object.Source != "cluster eve" {
		t.Errorf("problems %v", problems)
	}
	if c := got[0].Input.Clusters[0]; c.Network != "eve" {
		t.Errorf("a cluster without a network is on %q: within reach of everyone", c.Network)
	}
	// Problems are bounded too.
	for _, e := range many.Endpoints {
		e.Workload = "B A D"
	}
	var statements []protocol.Statement
	for i := range 20 {
		key := fmt.Sprintf("a/s%d", i)
		statements = append(statements, protocol.Statement{Kind: protocol.KindService, Key: key}, protocol.Statement{Kind: protocol.KindEndpoints, Key: key, Body: encode(many)})
	}
	_, problems = Imports(&mesh.Cluster{ID: "amber", Network: "n"}, append(records("eve", statements...), rs[0]), nil, Options{})
	if len(problems) != maxProblems+1 || problems[maxProblems].Reason != "MoreProblems" {
		t.Errorf("%d problems", len(problems))
	}
}

func TestGatewayConflict(t *testing.T) {
	of := func(id, network string) []*federationv1.Record {
		return records(id, protocol.Statement{Kind: protocol.KindCluster, Body: encode(&federationv1.Cluster{TrustDomain: id + ".mesh", Network: network, Gateways: []string{"192.0.2.1:15443"}})})
	}
	local := &mesh.Cluster{ID: "amber", Network: "amber-net"}
	if _, problems := Imports(local, append(of("birch", "x"), of("cedar", "x")...), nil, Options{}); len(problems) != 0 {
		t.Errorf("one network, one gateway: %v", problems)
	}
	_, problems := Imports(local, append(of("birch", "x"), of("cedar", "y")...), nil, Options{})
	if len(problems) != 2 || problems[0].Reason != "GatewayConflict" || problems[1].Object.Name != "cedar" { // whose it is cannot be known
		t.Errorf("two networks, one gateway: %v", problems)
	}
	// Loopback is for tests on one machine.
	rs := records("birch", protocol.Statement{Kind: protocol.KindCluster, Body: encode(&federationv1.Cluster{TrustDomain: "birch.mesh", Network: "x", Gateways: []string{"127.0.0.1:15443"}})})
	if got, problems := Imports(local, rs, nil, Options{AllowLoopback: true}); len(problems) != 0 || len(got[0].Input.Clusters[0].Gateways) != 1 {
		t.Errorf("loopback allowed: %v", problems)
	}
}

func FuzzImports(f *testing.F) {
	snap := testSnapshot()
	for _, s := range append(Exports(snap), ClusterStatement(snap.Local, []byte("key"), nil)) {
		f.Add(s.Kind, s.Key, s.Body)
	}
	f.Add(protocol.KindEndpoints, "default/reviews", []byte{0x0a, 0xff})
	f.Fuzz(func(t *testing.T, kind, key string, body []byte) {
		rs := records("birch", append(Exports(snap), ClusterStatement(snap.Local, nil, nil))...)
		rs = append(rs, &federationv1.Record{Origin: "birch", Kind: kind, Key: key, Epoch: 2, Seq: 1, Body: body})
		got, _ := Imports(&mesh.Cluster{ID: "amber", Network: "amber-net"}, rs, nil, Options{})
		for _, o := range got {
			for _, imp := range o.Input.Imports {
				for _, e := range imp.Endpoints {
					if e.Network == "" || e.Address != "" && e.Network != "amber-net" || !protocol.IsDomain(e.Workload) {
						t.Fatalf("took %+v", e)
					}
				}
				for _, v := range imp.VIPs {
					if !vip4.Contains(v) && !vip6.Contains(v) {
						t.Fatalf("took VIP %s", v)
					}
				}
			}
		}
	})
}
