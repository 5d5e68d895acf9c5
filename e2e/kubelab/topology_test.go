package kubelab

import (
	"strings"
	"testing"
)

func TestTopologyDefaults(t *testing.T) {
	topo, err := ParseTopology([]byte("clusters: [{name: east}, {name: west, flat: vpn, nodes: [{name: a, region: r1}, {name: b}]}]"))
	if err != nil {
		t.Fatal(err)
	}
	e, w := topo.Cluster("east"), topo.Cluster("west")
	for _, c := range []struct{ what, got, want string }{
		{"pods of east", e.PodCIDR.String(), "10.10.0.0/16"},
		{"IPv6 pods of east", e.PodCIDR6.String(), "fd00:10::/48"},
		{"services of east", e.ServiceCIDR.String(), "10.101.0.0/16"},
		{"cluster DNS", e.ClusterDNS().String(), "10.101.0.10"},
		{"network of east", e.Network, "east"},
		{"network of west", w.Network, "vpn"},
		{"API server of west", w.APIServer.String(), "172.30.2.100"},
		{"node of east", e.Nodes[0].Name, "east-1"},
		{"pods of the second node", w.Nodes[1].pods.String(), "10.20.1.0/24"},
		{"IPv6 pods of the second node", w.Nodes[1].pods6.String(), "fd00:20:0:1::/64"},
		{"address of the second node", w.Nodes[1].Address.String(), "172.30.2.2"},
		{"its IPv6 address", w.Nodes[1].address6.String(), "fd30::202"},
	} {
		if c.got != c.want {
			t.Errorf("%s: %s, want %s", c.what, c.got, c.want)
		}
	}
}

func TestTopologyBad(t *testing.T) {
	for _, c := range []struct{ name, text, want string }{
		{"nothing", "wan: 172.30.0.0/16", "no clusters"},
		{"unknown field", "clusters: [{name: a, podCidr: 10.1.0.0/16}]", "podCidr"},
		{"name twice", "clusters: [{name: a}, {name: a}]", "the name is that of cluster a"},
		{"bad name", "clusters: [{name: A}]", "DNS label"},
		{"flat overlap", "clusters: [{name: a, flat: f, podCIDR: 10.1.0.0/16}, {name: b, flat: f, podCIDR: 10.1.0.0/20}]", "one flat network: podCIDR"},
		{"overlap inside", "clusters: [{name: a, podCIDR: 10.1.0.0/16, serviceCIDR: 10.1.128.0/20}]", "overlaps podCIDR"},
		{"nodes without room", "clusters: [{name: a, podCIDR: 10.1.0.0/24, nodes: [{name: x}, {name: y}]}]", "no /24 left"},
		{"outside the wire", "clusters: [{name: a, loadBalancer: 10.0.0.0/24}]", "not within wan"},
		{"address twice", "clusters: [{name: a}, {name: b, apiServer: 172.30.1.100}]", "already that of"},
		{"machine of nobody", "clusters: [{name: a}]\nmachines: [{name: m, cluster: z, subnet: 10.9.0.0/24, address: 10.9.0.2}]", "is not in this topology"},
		{"dns", "clusters: [{name: a, dns: bind}]", "coredns or none"},
	} {
		t.Run(c.name, func(t *testing.T) {
			_, err := ParseTopology([]byte(c.text))
			if err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("error %v, want one with %q", err, c.want)
			}
		})
	}
}

// Isolated clusters may use the same addresses inside.
func TestTopologyOverlap(t *testing.T) {
	if _, err := ParseTopology([]byte("clusters: [{name: a, podCIDR: 10.1.0.0/16}, {name: b, podCIDR: 10.1.0.0/16}]")); err != nil {
		t.Error(err)
	}
}

// What is accepted can be completed again without a change, and every address is where it belongs.
func FuzzParseTopology(f *testing.F) {
	for _, name := range Topologies() {
		text, err := topologies.ReadFile("topologies/" + name + ".yaml")
		if err != nil {
			f.Fatal(err)
		}
		f.Add(text)
	}
	f.Add([]byte("wan: 10.0.0.0/8\nclusters: [{name: a, podCIDR: 172.16.0.0/24, ipv6: false}]"))
	f.Fuzz(func(t *testing.T, text []byte) {
		topo, err := ParseTopology(text)
		if err != nil {
			return
		}
		for i := range topo.Clusters {
			c := &topo.Clusters[i]
			if !c.ServiceCIDR.Contains(c.ClusterDNS()) || !topo.WAN.Contains(c.APIServer) || !c.Control.Contains(c.control()) {
				t.Errorf("cluster %+v has addresses outside of its ranges", c)
			}
			for _, n := range c.Nodes {
				if !c.PodCIDR.Contains(n.pods.Addr()) || !topo.WAN.Contains(n.Address) {
					t.Errorf("node %+v of cluster %+v has addresses outside of its ranges", n, c)
				}
			}
		}
		if err := topo.Complete(); err != nil {
			t.Errorf("completed again: %v", err)
		}
	})
}
