package store

import (
	"fmt"
	"maps"
	"net/netip"
	"reflect"
	"slices"
	"testing"

	"pgregory.net/rapid"

	"github.com/isthmus-mesh/isthmus/discovery/mesh"
)

// randomInput is one source's word: few names, so that things meet.
func randomInput(t *rapid.T) mesh.Input {
	name := rapid.SampledFrom([]string{"a", "b", "c"})
	clusters := rapid.SampledFrom([]mesh.ClusterID{"", "amber", "dune"})
	var in mesh.Input
	for range rapid.IntRange(0, 2).Draw(t, "services") {
		decl := service(name.Draw(t, "service"), mesh.Port{Name: "http", Number: 80, Protocol: mesh.HTTP, TargetName: "web"})
		if rapid.Bool().Draw(t, "no selector") {
			decl.Selector = nil
		}
		decl.Export = rapid.Bool().Draw(t, "export")
		decl.Cluster = clusters.Draw(t, "of")
		if rapid.Bool().Draw(t, "tcp") {
			decl.Ports[0].Protocol = mesh.TCP
		}
		decl.Addresses = []netip.Addr{netip.MustParseAddr(rapid.SampledFrom([]string{"10.96.0.1", "10.96.0.2"}).Draw(t, "cluster ip"))}
		decl.Object.Source = rapid.SampledFrom([]string{"x", "y"}).Draw(t, "source")
		in.Services = append(in.Services, decl)
	}
	for range rapid.IntRange(0, 3).Draw(t, "pods") {
		p := pod(name.Draw(t, "pod"), name.Draw(t, "app"), "10.0.0."+rapid.SampledFrom([]string{"1", "2", "3"}).Draw(t, "ip"))
		p.Cluster, p.Network = clusters.Draw(t, "runs in"), rapid.SampledFrom([]mesh.NetworkID{"", "", "n9"}).Draw(t, "network")
		p.Ready = rapid.Bool().Draw(t, "ready")
		in.Workloads = append(in.Workloads, p)
	}
	if rapid.Bool().Draw(t, "slice") {
		in.Slices = append(in.Slices, &mesh.EndpointSlice{
			Object: mesh.ObjectRef{Kind: "EndpointSlice", Namespace: "shop", Name: name.Draw(t, "slice name")}, Cluster: clusters.Draw(t, "slice in"), Service: name.Draw(t, "slice of"),
			PortNames: map[string]uint32{"http": 8080}, Endpoints: []*mesh.Endpoint{{Address: "10.0.0.1", Ready: true}},
		})
	}
	for range rapid.IntRange(0, 2).Draw(t, "networks") {
		n := &mesh.Network{ID: rapid.SampledFrom([]mesh.NetworkID{"n1", "n2"}).Draw(t, "id")}
		n.Registries = []mesh.ClusterID{rapid.SampledFrom([]mesh.ClusterID{"Kubernetes", "dune", "nowhere"}).Draw(t, "registry")}
		n.CIDRs = []netip.Prefix{netip.MustParsePrefix(rapid.SampledFrom([]string{"10.0.0.2/32", "10.0.0.0/24"}).Draw(t, "cidr"))}
		in.Networks = append(in.Networks, n)
	}
	for range rapid.IntRange(0, 2).Draw(t, "imports") {
		i := reviews(rapid.SampledFrom([]mesh.ClusterID{"birch", "cedar"}).Draw(t, "cluster"), rapid.SampledFrom([]string{"240.0.0.9", "241.1.2.3"}).Draw(t, "claim"))
		i.Name = name.Draw(t, "import")
		in.Imports = append(in.Imports, i)
	}
	return in
}

// What a builder remembers must not show in what it builds.
func TestRememberingChangesNothing(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		b := newBuilder(DefaultConfig(local()))
		inputs := make([]mesh.Input, 3)
		for range rapid.IntRange(1, 6).Draw(t, "steps") {
			inputs[rapid.IntRange(0, 2).Draw(t, "which")] = randomInput(t)
			fresh := newBuilder(DefaultConfig(local()))
			fresh.held = maps.Clone(b.held)
			got, want := b.build(inputs, nil), fresh.build(inputs, nil)
			if !reflect.DeepEqual(got.Services, want.Services) {
				t.Fatalf("services differ:\n%s\n%s", show(got.Services), show(want.Services))
			}
			if !reflect.DeepEqual(got.Networks, want.Networks) || !reflect.DeepEqual(got.Clusters, want.Clusters) || !reflect.DeepEqual(got.Workloads, want.Workloads) {
				t.Fatalf("networks, clusters or workloads differ:\n%+v\n%+v", got, want)
			}
			if !slices.Equal(got.Problems, want.Problems) {
				t.Fatalf("problems differ:\n%v\n%v", got.Problems, want.Problems)
			}
		}
	})
}

func show(ss []*mesh.Service) string {
	out := ""
	for _, s := range ss {
		out += fmt.Sprintf("%+v\n", *s)
		for _, e := range s.Endpoints {
			out += fmt.Sprintf("   %+v\n", *e)
		}
	}
	return out
}

// BenchmarkOneEndpoint changes one pod of one service.
func BenchmarkOneEndpoint(b *testing.B) {
	for _, n := range []int{1000, 10000} {
		b.Run(fmt.Sprintf("%d services", n), func(b *testing.B) {
			var inputs []mesh.Input
			for i := range n {
				name := fmt.Sprintf("svc-%d", i)
				in := mesh.Input{Services: []*mesh.ServiceDecl{service(name, mesh.Port{Name: "http", Number: 80, Protocol: mesh.HTTP})}}
				for j := range 10 {
					in.Workloads = append(in.Workloads, pod(fmt.Sprintf("%s-%d", name, j), name, fmt.Sprintf("10.%d.%d.%d", i/256, i%256, j)))
				}
				inputs = append(inputs, in)
			}
			builder := newBuilder(DefaultConfig(local()))
			builder.build(inputs, nil)
			b.ReportAllocs()
			for i := 0; b.Loop(); i++ {
				w := *inputs[7].Workloads[3]
				w.Ready = i%2 == 0
				ws := slices.Clone(inputs[7].Workloads)
				ws[3] = &w
				inputs[7].Workloads = ws
				builder.build(inputs, nil)
			}
		})
	}
}
