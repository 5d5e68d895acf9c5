package store

import (
	"slices"
	"strings"
	"testing"

	"github.com/isthmus-mesh/isthmus/discovery/mesh"
)

func globals(snap *mesh.Snapshot) (out []string) {
	for _, s := range snap.Services {
		if host, ok := strings.CutSuffix(s.Host, mesh.GlobalSuffix); ok {
			out = append(out, host)
		}
	}
	return out
}

// TestNamesOfClustersAndPods: a headless service has a name for each cluster and pod; others when asked.
func TestNamesOfClustersAndPods(t *testing.T) {
	imported := func(facts *mesh.Facts, cluster mesh.ClusterID, pods ...string) *mesh.Import {
		i := reviews(cluster)
		i.Facts, i.Endpoints = facts, nil
		for _, p := range pods {
			i.Endpoints = append(i.Endpoints, &mesh.Endpoint{Workload: p, Namespace: "shop", Cluster: cluster, Network: mesh.NetworkID(cluster), TLS: true, Ready: true, Ports: map[uint32]uint32{9080: 9080}})
		}
		return i
	}
	all := []string{"birch.reviews.shop", "cedar.reviews.shop", "reviews-0.birch.reviews.shop", "reviews-0.cedar.reviews.shop", "reviews-1.birch.reviews.shop", "reviews.shop"}
	clusters := []string{"birch.reviews.shop", "cedar.reviews.shop", "reviews.shop"}
	ask := func(what string) *mesh.Facts {
		return &mesh.Facts{Annotations: map[string]string{namesAnnotation: what}}
	}
	for _, c := range []struct {
		name  string
		facts *mesh.Facts
		set   func(*Config)
		want  []string
	}{
		{"plain", &mesh.Facts{}, nil, []string{"reviews.shop"}},
		{"tells nothing", nil, nil, []string{"reviews.shop"}},
		{"headless", &mesh.Facts{Headless: true}, nil, all},
		{"annotation pod", ask("pod"), nil, all},
		{"annotation cluster", ask("cluster"), nil, clusters},
		{"annotation none", ask("none"), func(c *Config) { c.PodNames = true }, []string{"reviews.shop"}},
		{"configured clusters", &mesh.Facts{}, func(c *Config) { c.ClusterNames = true }, clusters},
		{"configured pods", &mesh.Facts{}, func(c *Config) { c.PodNames = true }, all},
	} {
		t.Run(c.name, func(t *testing.T) {
			cfg := DefaultConfig(local())
			if c.set != nil {
				c.set(&cfg)
			}
			b := newBuilder(cfg)
			in := mesh.Input{Imports: []*mesh.Import{imported(c.facts, "birch", "reviews-0", "reviews-1", "not_a_name"), imported(c.facts, "cedar", "reviews-0")}}
			snap := b.build([]mesh.Input{in}, nil)
			if got := globals(snap); !slices.Equal(got, c.want) {
				t.Fatalf("hosts %v, want %v", got, c.want)
			}
			if len(c.want) < 6 {
				return
			}
			pod := snap.Service("reviews-0.cedar.reviews.shop.global")
			if len(pod.Endpoints) != 1 || pod.Endpoints[0].Cluster != "cedar" || len(pod.VIPs) != 2 || pod.Name != "reviews" || len(pod.Ports) != 1 {
				t.Errorf("pod's host: %+v", pod)
			}
			if slices.Equal(pod.VIPs, snap.Service("reviews.shop.global").VIPs) {
				t.Error("pod and service share addresses")
			}
			again := b.build([]mesh.Input{in}, nil)
			for i, s := range again.Services {
				if snap.Services[i] != s {
					t.Errorf("%s was copied without a change", s.Host)
				}
			}
			mine := &mesh.ServiceDecl{Object: mesh.ObjectRef{Kind: "ServiceEntry", Namespace: "shop", Name: "mine"}, Hosts: []string{pod.Host}, Ports: pod.Ports, Endpoints: []*mesh.Endpoint{{Address: "192.0.2.1"}}}
			if s := b.build([]mesh.Input{in, {Services: []*mesh.ServiceDecl{mine}}}, nil).Service(pod.Host); s.Object.Kind != "ServiceEntry" || len(s.Endpoints) != 1 {
				t.Errorf("a hand-made host does not win: %+v", s)
			}
		})
	}
}

// TestNamesBehindOwnGateways: gateways of networks of this control plane choose the pod, so no name stands for one.
func TestNamesBehindOwnGateways(t *testing.T) {
	cfg := DefaultConfig(local())
	cfg.PodNames = true
	decl, there := service("reviews", http(9080)), service("reviews", http(9080))
	decl.Export = true
	away, near := pod("away", "reviews", "10.1.0.1"), pod("near", "reviews", "10.1.0.2")
	away.Network, near.Network = "other", "amber"
	snap := newBuilder(cfg).build([]mesh.Input{{Services: []*mesh.ServiceDecl{decl}, Workloads: []*mesh.Workload{pod("a", "reviews", "10.0.0.1")}},
		in("dune", mesh.Input{Services: []*mesh.ServiceDecl{there}, Workloads: []*mesh.Workload{away, near}})}, nil)
	if got, want := globals(snap), []string{"a.amber.reviews.shop", "amber.reviews.shop", "dune.reviews.shop", "near.dune.reviews.shop", "reviews.shop"}; !slices.Equal(got, want) {
		t.Errorf("hosts %v, want %v", got, want)
	}
}
