package views

import (
	"net/netip"
	"slices"
	"testing"

	"google.golang.org/protobuf/proto"

	"github.com/isthmus-mesh/isthmus/discovery/mesh"
	"github.com/isthmus-mesh/isthmus/discovery/xds"
	"github.com/isthmus-mesh/isthmus/dns/zone"
)

// TestNamesFollow: the hosts made from those before are the hosts made from nothing, and what is the same is not made anew.
func TestNamesFollow(t *testing.T) {
	vip := netip.MustParseAddr("240.0.0.9")
	end := func(a string) *mesh.Endpoint {
		return &mesh.Endpoint{Workload: "db-0", Cluster: "amber", Address: a, Ready: true, Labels: map[string]string{"statefulset.kubernetes.io/pod-name": "db-0"}}
	}
	web := &mesh.Service{Host: "web.shop.global", Name: "web", Namespace: "shop", Global: true, VIPs: []netip.Addr{vip}, Facts: &mesh.Facts{}}
	local := &mesh.Service{Host: "db.shop.svc.cluster.local", Headless: true, Endpoints: []*mesh.Endpoint{end("10.0.0.1")}}
	db := &mesh.Service{Host: "db.shop.global", Name: "db", Namespace: "shop", Global: true, VIPs: []netip.Addr{vip}, Facts: &mesh.Facts{Headless: true},
		Endpoints: []*mesh.Endpoint{{Workload: "db-0", Cluster: "birch", Network: "far", Ready: true}}}
	pod := &mesh.Service{Host: "db-0.birch.db.shop.global", Global: true, VIPs: []netip.Addr{netip.MustParseAddr("240.0.0.10")}}
	mine := &mesh.Service{Host: "web.shop.svc.clusterset.local", VIPs: []netip.Addr{netip.MustParseAddr("192.0.2.1")}}
	moved := &mesh.Service{Host: local.Host, Headless: true, Endpoints: []*mesh.Endpoint{end("10.0.0.2")}}
	n := &names{}
	for i, services := range [][]*mesh.Service{{web}, {web, local}, {web, local, db}, {web, local, db, pod}, {web, mine, moved, db, pod}, {web, moved}, {}} {
		slices.SortFunc(services, func(a, b *mesh.Service) int { return compare(a.Host, b.Host) })
		snap := &mesh.Snapshot{Local: &mesh.Cluster{ID: "amber", Network: "amber"}, Services: services}
		next, err := n.next(snap, "amber")
		if err != nil {
			t.Fatal(err)
		}
		var msgs []proto.Message
		for _, h := range zone.Hosts(snap) {
			msgs = append(msgs, h)
		}
		want, err := xds.Encode(msgs...)
		if err != nil {
			t.Fatal(err)
		}
		for typ, named := range want {
			if next.set[typ].Len() != named.Len() {
				t.Errorf("step %d: %d hosts, want %d", i, next.set[typ].Len(), named.Len())
			}
			for r := range named.All() {
				if got := next.set[typ].Get(r.Name); got == nil || got.Version != r.Version {
					t.Errorf("step %d: %s is another", i, r.Name)
				}
			}
			if i > 0 && n.set[typ].Get("web.shop.global") != next.set[typ].Get("web.shop.global") {
				if n.set[typ].Get("web.shop.global") != nil {
					t.Errorf("step %d: web was made anew", i)
				}
			}
		}
		n = next
	}
}

func compare(a, b string) int {
	if a < b {
		return -1
	}
	return 1
}

func BenchmarkNames(b *testing.B) {
	snap := world(10_000, 1)
	n, err := new(names).next(snap, "amber")
	if err != nil {
		b.Fatal(err)
	}
	b.ResetTimer()
	for i := range b.N {
		s := *snap.Services[7]
		s.VIPs = []netip.Addr{netip.AddrFrom4([4]byte{240, 0, byte(i >> 8), byte(i)})}
		next := *snap
		next.Services = slices.Clone(snap.Services)
		next.Services[7] = &s
		if n, err = n.next(&next, "amber"); err != nil {
			b.Fatal(err)
		}
	}
}
