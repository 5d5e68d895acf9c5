package zone_test

import (
	"net/netip"
	"testing"

	"github.com/isthmus-mesh/isthmus/discovery/mesh"
	"github.com/isthmus-mesh/isthmus/dns/zone"
)

// TestHostsAsDialled: names whose addresses clients have from elsewhere are not answered here, not even with "no address".
func TestHostsAsDialled(t *testing.T) {
	snap := &mesh.Snapshot{Local: &mesh.Cluster{ID: "amber"}, Services: []*mesh.Service{
		{Host: "*.none.example.com", Resolution: mesh.None}, {Host: "given.example.com", Resolution: mesh.None, VIPs: []netip.Addr{netip.MustParseAddr("192.0.2.7")}},
		{Host: "none.example.com", Resolution: mesh.None}, {Host: "range.example.com", Ranges: []netip.Prefix{netip.MustParsePrefix("192.0.2.0/24")}},
	}}
	hosts := zone.Hosts(snap)
	if len(hosts) != 1 || hosts[0].Name != "given.example.com" {
		t.Errorf("got %v, want given.example.com alone", hosts)
	}
}
