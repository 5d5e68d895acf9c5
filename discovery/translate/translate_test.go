package translate_test

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"

	clusterv3 "github.com/envoyproxy/go-control-plane/envoy/config/cluster/v3"
	endpointv3 "github.com/envoyproxy/go-control-plane/envoy/config/endpoint/v3"

	"github.com/isthmus-mesh/isthmus/discovery/mesh"
	"github.com/isthmus-mesh/isthmus/discovery/translate"
	transport "github.com/isthmus-mesh/isthmus/discovery/translate/socket"
	"github.com/isthmus-mesh/isthmus/internal/golden"
)

func render(t *testing.T, r translate.Resources, problems []mesh.Problem) map[string]string {
	t.Helper()
	return map[string]string{
		"listeners.json": golden.ProtoJSON(t, r.Listeners), "clusters.json": golden.ProtoJSON(t, r.Clusters),
		"endpoints.json": golden.ProtoJSON(t, r.Endpoints), "routes.json": golden.ProtoJSON(t, r.Routes),
		"secrets.json": golden.ProtoJSON(t, r.Secrets), "problems.txt": golden.Lines(problems),
	}
}

func TestTranslateGolden(t *testing.T) {
	for _, c := range golden.Cases(t, "testdata/*.txtar") {
		t.Run(c.Name, func(t *testing.T) {
			p := proxies()[c.Name]
			if p == nil {
				t.Fatalf("no proxy is named %s", c.Name)
			}
			r, problems := translate.Translate(bookstore(), p)
			files := render(t, r, problems)
			for _, name := range []string{"problems.txt", "listeners.json", "routes.json", "clusters.json", "endpoints.json", "secrets.json"} {
				c.Want(t, name, files[name])
			}
		})
	}
}

// TestTranslateOrder shuffles what a source may report in any order: endpoints, and the subsets of a rule.
func TestTranslateOrder(t *testing.T) {
	for name, p := range proxies() {
		r, problems := translate.Translate(bookstore(), p)
		want := render(t, r, problems)
		for seed := range uint64(20) {
			snap := bookstore()
			rng := rand.New(rand.NewPCG(seed, 1))
			for _, s := range snap.Services {
				shuffle(rng, s.Endpoints)
			}
			for _, d := range snap.DestinationRules {
				shuffle(rng, d.Spec.Subsets)
			}
			r, problems := translate.Translate(snap, p)
			for file, text := range render(t, r, problems) {
				if text != want[file] {
					t.Errorf("%s, seed %d: %s differs", name, seed, file)
				}
			}
		}
	}
}

func shuffle[T any](rng *rand.Rand, list []T) {
	rng.Shuffle(len(list), func(i, j int) { list[i], list[j] = list[j], list[i] })
}

func TestTrustBundle(t *testing.T) {
	snap := bookstore()
	intruder := *snap.Clusters[1]
	intruder.ID, intruder.TrustDomain, intruder.Roots = "aaa", "amber.mesh", []byte(fixedRoot+fixedRoot)
	snap.Clusters = append([]*mesh.Cluster{&intruder}, snap.Clusters...)
	text := transport.TrustBundle(snap).String()
	if strings.Count(text, "amber.mesh") != 1 || strings.Contains(text, "cedar.mesh") || !strings.Contains(text, "birch.mesh") {
		t.Errorf("want amber.mesh once with its own roots, birch.mesh, and no cedar.mesh, whose roots are not PEM:\n%s", text)
	}
	if transport.TrustBundle(&mesh.Snapshot{}) != nil {
		t.Error("a bundle without roots")
	}
}

// BenchmarkTranslate builds all resources of one sidecar in a mesh of 1,000 services with 10 endpoints each.
func BenchmarkTranslate(b *testing.B) {
	snap := bookstore()
	snap.VirtualServices, snap.DestinationRules, snap.Services = nil, nil, nil
	for i := range 1000 {
		name := fmt.Sprintf("s%04d", i)
		s := &mesh.Service{Host: mesh.LocalHost(name, "default"), Name: name, Namespace: "default", Ports: []mesh.Port{{Number: 9080, Protocol: mesh.HTTP}}}
		for j := range 10 {
			s.Endpoints = append(s.Endpoints, pod(snap.Local, fmt.Sprintf("%s-%d", name, j), fmt.Sprintf("10.1.%d.%d", i%250, j), "v1"))
		}
		snap.Services = append(snap.Services, s)
	}
	for b.Loop() {
		translate.Translate(snap, proxies()["sidecar"])
	}
}

// TestMutualTLSTurnedOff: clients speak no mutual TLS to a port for which a PeerAuthentication turned it off.
func TestMutualTLSTurnedOff(t *testing.T) {
	snap := bookstore()
	for _, s := range snap.Services {
		for _, e := range s.Endpoints {
			if e.Workload == "productpage-1" {
				e.Labels["app"] = "productpage" // selected by the rule that turns it off at 3307
			}
		}
	}
	r, _ := translate.Translate(snap, proxies()["ingress"])
	for name, want := range map[string]bool{
		"outbound|9080||productpage.default.svc.cluster.local": true, "outbound|3306||productpage.default.svc.cluster.local": false,
	} {
		i := slices.IndexFunc(r.Clusters, func(c *clusterv3.Cluster) bool { return c.GetName() == name })
		if got := len(r.Clusters[i].GetTransportSocketMatches()) > 0; got != want {
			t.Errorf("cluster %s offers mutual TLS: %v", name, got)
		}
		i = slices.IndexFunc(r.Endpoints, func(a *endpointv3.ClusterLoadAssignment) bool { return a.GetClusterName() == name })
		_, got := r.Endpoints[i].GetEndpoints()[0].GetLbEndpoints()[0].GetMetadata().GetFilterMetadata()["envoy.transport_socket_match"]
		if got != want {
			t.Errorf("endpoint of %s is marked for mutual TLS: %v", name, got)
		}
	}
}

// TestTransparent: a proxy whose pod is captured by TPROXY has a transparent inbound listener, and no other has.
func TestTransparent(t *testing.T) {
	for _, want := range []bool{false, true} {
		p := *proxies()["sidecar"]
		p.Transparent = want
		r, _ := translate.Translate(bookstore(), &p)
		for _, l := range r.Listeners {
			if got := l.GetTransparent().GetValue(); got != (want && l.GetName() == "virtualInbound") {
				t.Errorf("listener %s: transparent %v, captured by TPROXY %v", l.GetName(), got, want)
			}
		}
	}
}
