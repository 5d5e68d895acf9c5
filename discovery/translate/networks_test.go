package translate_test

import (
	"fmt"
	"math/rand/v2"
	"os/exec"
	"slices"
	"strings"
	"testing"

	clusterv3 "github.com/envoyproxy/go-control-plane/envoy/config/cluster/v3"
	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	"sigs.k8s.io/yaml"

	"github.com/isthmus-mesh/isthmus/discovery/mesh"
	"github.com/isthmus-mesh/isthmus/discovery/translate"
	"github.com/isthmus-mesh/isthmus/internal/envoytest"
	"github.com/isthmus-mesh/isthmus/internal/golden"
)

// TestNetworksGolden: each case is a snapshot and proxies, and for each proxy where its clusters lead.
func TestNetworksGolden(t *testing.T) {
	for _, c := range golden.Cases(t, "testdata/networks/*.txtar") {
		t.Run(c.Name, func(t *testing.T) {
			snap := parseSnapshot(t, c.File("snapshot.yaml"))
			ps := map[string]*mesh.Proxy{}
			if err := yaml.UnmarshalStrict(c.File("proxies.yaml"), &ps); err != nil {
				t.Fatal(err)
			}
			for _, name := range c.Names() {
				name, ok := strings.CutSuffix(name, ".txt")
				if !ok {
					continue
				}
				p := ps[name]
				if p == nil {
					t.Fatalf("proxies.yaml has no %s", name)
				}
				r, problems := translate.Translate(snap, p)
				text := leads(r) + golden.Lines(problems)
				c.Want(t, name+".txt", text)
				for seed := range uint64(5) {
					again, problemsAgain := translate.Translate(shuffledSnapshot(snap, seed), p)
					if leads(again)+golden.Lines(problemsAgain) != text {
						t.Errorf("%s: shuffle %d gives another result", name, seed)
					}
				}
				if !testing.Short() {
					validate(t, r)
				}
			}
		})
	}
}

func validate(t *testing.T, r translate.Resources) {
	t.Helper()
	out, err := exec.Command(envoytest.Path(t), "--mode", "validate", "-c", writeJSON(t, "envoy.json", staticBootstrap(t, r))).CombinedOutput()
	if err != nil {
		t.Errorf("envoy refuses the resources: %v\n%s", err, tail(out))
	}
}

func parseSnapshot(t *testing.T, data []byte) *mesh.Snapshot {
	t.Helper()
	snap := &mesh.Snapshot{}
	if err := yaml.UnmarshalStrict(data, snap); err != nil {
		t.Fatal(err)
	}
	snap.Local.Roots = []byte(fixedRoot)
	for i, c := range snap.Clusters {
		if c.ID == snap.Local.ID {
			snap.Clusters[i] = snap.Local
		}
	}
	slices.SortFunc(snap.Services, func(a, b *mesh.Service) int { return strings.Compare(a.Host, b.Host) })
	for _, s := range snap.Services {
		for _, e := range s.Endpoints {
			if e.Namespace == "" {
				e.Namespace = s.Namespace
			}
		}
	}
	return snap
}

func shuffledSnapshot(snap *mesh.Snapshot, seed uint64) *mesh.Snapshot {
	rng := rand.New(rand.NewPCG(seed, 1))
	out := *snap
	out.Services = slices.Clone(snap.Services)
	for i, s := range out.Services {
		s := *s
		s.Endpoints = slices.Clone(s.Endpoints)
		shuffle(rng, s.Endpoints)
		out.Services[i] = &s
	}
	return &out
}

// leads writes one line for each host of each cluster that stands for a service, and for each listener of an address.
func leads(r translate.Resources) string {
	var b strings.Builder
	for _, a := range r.Endpoints {
		if cluster := named(r.Clusters, a.ClusterName); cluster.GetCommonLbConfig().GetLocalityWeightedLbConfig() != nil {
			fmt.Fprintf(&b, "%s by weights of localities\n", a.ClusterName)
		}
		if len(a.Endpoints) == 0 {
			fmt.Fprintf(&b, "%s: nowhere\n", a.ClusterName)
		}
		for _, g := range a.Endpoints {
			fmt.Fprintf(&b, "%s: priority %d, %s, weight %d\n", a.ClusterName, g.Priority, place(g.Locality), g.LoadBalancingWeight.GetValue())
			for _, e := range g.LbEndpoints {
				fmt.Fprintf(&b, "  %s weight %d%s\n", address(e.GetEndpoint().GetAddress()), e.LoadBalancingWeight.GetValue(), socket(e.GetMetadata()))
			}
		}
	}
	for _, c := range r.Clusters {
		if c.GetLoadAssignment() == nil || strings.HasPrefix(c.Name, "inbound") {
			continue
		}
		var hosts []string
		for _, e := range c.GetLoadAssignment().GetEndpoints()[0].GetLbEndpoints() {
			hosts = append(hosts, address(e.GetEndpoint().GetAddress()))
		}
		kind := c.GetType().String()
		if c.GetClusterType() != nil {
			kind = c.GetClusterType().GetName()
		}
		fmt.Fprintf(&b, "%s (%s): %s\n", c.Name, kind, strings.Join(hosts, " "))
	}
	for _, l := range r.Listeners {
		if !strings.HasPrefix(l.Name, "virtual") && !strings.HasPrefix(l.Name, "0.0.0.0") {
			fmt.Fprintf(&b, "listener %s\n", l.Name)
		}
	}
	return b.String()
}

func named(clusters []*clusterv3.Cluster, name string) *clusterv3.Cluster {
	for _, c := range clusters {
		if c.Name == name {
			return c
		}
	}
	return nil
}

func place(l *corev3.Locality) string {
	if l.GetRegion() == "" {
		return "nowhere"
	}
	return strings.TrimRight(l.GetRegion()+"/"+l.GetZone()+"/"+l.GetSubZone(), "/")
}

func address(a *corev3.Address) string {
	if i := a.GetEnvoyInternalAddress(); i != nil {
		return i.GetServerListenerName() + " (" + i.GetEndpointId() + ")"
	}
	return fmt.Sprintf("%s:%d", a.GetSocketAddress().GetAddress(), a.GetSocketAddress().GetPortValue())
}

// socket says how the transport socket is chosen.
func socket(m *corev3.Metadata) string {
	f := m.GetFilterMetadata()["envoy.transport_socket_match"].GetFields()
	switch {
	case f["via"] != nil:
		return ", mutual TLS by host name"
	case f["tlsMode"] != nil:
		return ", mutual TLS"
	}
	return ""
}
