package translate_test

import (
	"fmt"
	"os"
	"slices"
	"testing"

	meshconfig "istio.io/api/mesh/v1alpha1"
	networking "istio.io/api/networking/v1"
	security "istio.io/api/security/v1"
	"pgregory.net/rapid"

	"github.com/isthmus-mesh/isthmus/discovery/mesh"
	"github.com/isthmus-mesh/isthmus/discovery/translate"
	"github.com/isthmus-mesh/isthmus/discovery/translate/memo"
)

// reconfigure changes configuration at random: rules and routes come, go and change, services and their ports, too.
func reconfigure(t *rapid.T, old *mesh.Snapshot, step int) *mesh.Snapshot {
	snap := *old
	var hosts []string
	for _, s := range old.Services {
		hosts = append(hosts, s.Host)
	}
	hosts = append(hosts, "nobody.example.com")
	host := func() string { return rapid.SampledFrom(hosts).Draw(t, "host") }
	subset := func() string { return rapid.SampledFrom([]string{"", "v1", "v2"}).Draw(t, "subset") }
	ref := func(kind string) mesh.ObjectRef {
		return mesh.ObjectRef{Kind: kind, Namespace: rapid.SampledFrom([]string{"default", "istio-system"}).Draw(t, "namespace"), Name: rapid.SampledFrom([]string{"a", "b", "c"}).Draw(t, "name")}
	}
	switch rapid.IntRange(0, 8).Draw(t, "what") {
	case 0, 1:
		to := func() *networking.Destination { return &networking.Destination{Host: host(), Subset: subset()} }
		vs := &mesh.VirtualService{Object: ref("VirtualService"), Spec: &networking.VirtualService{Hosts: []string{host()}, Http: []*networking.HTTPRoute{
			{Match: []*networking.HTTPMatchRequest{{SourceLabels: rapid.SampledFrom([]map[string]string{nil, {"app": "a"}}).Draw(t, "from"), Uri: &networking.StringMatch{MatchType: &networking.StringMatch_Prefix{Prefix: "/" + fmt.Sprint(step)}}}}, Route: []*networking.HTTPRouteDestination{{Destination: to()}}},
			{Route: []*networking.HTTPRouteDestination{{Destination: to(), Weight: 1}, {Destination: to(), Weight: 2}}},
		}, Tcp: []*networking.TCPRoute{{Route: []*networking.RouteDestination{{Destination: to()}}}}}}
		snap.VirtualServices = replaced(old.VirtualServices, vs, func(x *mesh.VirtualService) mesh.ObjectRef { return x.Object })
	case 2, 3:
		d := &mesh.DestinationRule{Object: ref("DestinationRule"), Spec: &networking.DestinationRule{Host: host(), Subsets: []*networking.Subset{
			{Name: "v1", Labels: map[string]string{"version": "v1"}}}}}
		if rapid.Bool().Draw(t, "second") {
			d.Spec.Subsets = append(d.Spec.Subsets, &networking.Subset{Name: "v2", Labels: map[string]string{"version": "v2"}})
		}
		if rapid.Bool().Draw(t, "policy") {
			d.Spec.TrafficPolicy = &networking.TrafficPolicy{OutlierDetection: &networking.OutlierDetection{}, LoadBalancer: &networking.LoadBalancerSettings{LocalityLbSetting: &networking.LocalityLoadBalancerSetting{
				FailoverPriority: rapid.SampledFrom([][]string{nil, {"app"}}).Draw(t, "first")}}, ConnectionPool: &networking.ConnectionPoolSettings{Tcp: &networking.ConnectionPoolSettings_TCPSettings{MaxConnections: int32(step + 1)}}}
		}
		snap.DestinationRules = replaced(old.DestinationRules, d, func(x *mesh.DestinationRule) mesh.ObjectRef { return x.Object })
	case 4:
		snap.VirtualServices = slices.Clone(old.VirtualServices)
		if n := len(snap.VirtualServices); n > 0 {
			i := rapid.IntRange(0, n-1).Draw(t, "gone")
			snap.VirtualServices = slices.Delete(snap.VirtualServices, i, i+1)
		}
	case 5:
		snap.DestinationRules = slices.Clone(old.DestinationRules)
		if n := len(snap.DestinationRules); n > 0 {
			i := rapid.IntRange(0, n-1).Draw(t, "gone")
			snap.DestinationRules = slices.Delete(snap.DestinationRules, i, i+1)
		}
	case 6:
		snap.Services = slices.Clone(old.Services)
		i := rapid.IntRange(0, len(snap.Services)-1).Draw(t, "service")
		if rapid.Bool().Draw(t, "remove") && len(snap.Services) > 2 {
			snap.Services = slices.Delete(snap.Services, i, i+1)
			break
		}
		s := *snap.Services[i]
		s.Ports = append(slices.Clone(s.Ports), mesh.Port{Name: "extra", Number: uint32(7000 + step), Protocol: rapid.SampledFrom([]mesh.Protocol{mesh.HTTP, mesh.TCP, mesh.TLS, mesh.UDP}).Draw(t, "protocol"), Sniffed: step%2 == 0})
		snap.Services[i] = &s
	case 7:
		snap.MeshConfig = &mesh.MeshConfig{Spec: &meshconfig.MeshConfig{OutboundTrafficPolicy: &meshconfig.MeshConfig_OutboundTrafficPolicy{Mode: meshconfig.MeshConfig_OutboundTrafficPolicy_Mode(step % 2)}}}
	case 8:
		snap.PeerAuthentications = []*mesh.PeerAuthentication{{Object: ref("PeerAuthentication"), Spec: &security.PeerAuthentication{Mtls: &security.PeerAuthentication_MutualTLS{Mode: security.PeerAuthentication_MutualTLS_Mode(step % 4)}}}}
	}
	return &snap
}

func replaced[T any](list []*T, x *T, ref func(*T) mesh.ObjectRef) []*T {
	list = slices.DeleteFunc(slices.Clone(list), func(y *T) bool { return ref(y) == ref(x) })
	list = append(list, x)
	slices.SortFunc(list, func(a, b *T) int {
		ra, rb := ref(a), ref(b)
		return slices.Compare([]string{ra.Namespace, ra.Name}, []string{rb.Namespace, rb.Name})
	})
	return list
}

// A translation with a memory gives what one without gives, whatever has changed since the last.
func TestAgainEqualsTranslate(t *testing.T) {
	used, steps := 0, 4
	if os.Getenv("SOAK") != "" {
		steps = 8
	}
	rapid.Check(t, func(t *rapid.T) {
		snap := bookstore()
		m := &memo.Memo{} // one for all proxies
		for step := range rapid.IntRange(1, steps).Draw(t, "steps") {
			if step > 0 && rapid.Bool().Draw(t, "endpoints") {
				snap = mutate(t, snap)
			} else if step > 0 {
				snap = reconfigure(t, snap, step)
			}
			for name, p := range proxies() {
				if p.Type == mesh.Sidecar && rapid.IntRange(0, 3).Draw(t, "nameless") > 0 {
					p, name = translate.Nameless(p), name+" without a name"
				}
				if p.Type == mesh.Sidecar && rapid.Bool().Draw(t, "another") {
					q := *p
					q.Namespace, q.Locality = rapid.SampledFrom([]string{"default", "istio-system", "prod"}).Draw(t, "namespace"), rapid.SampledFrom([]string{"", "r1/z1", "r2/z1"}).Draw(t, "locality")
					q.Labels = map[string]string{"app": rapid.SampledFrom([]string{"a", "b"}).Draw(t, "label")}
					p = &q
				}
				got, problems := translate.Again(m, snap, p)
				want, wanted := translate.Translate(snap, p)
				if !equal(got, want) || !same(got.Endpoints, want.Endpoints) {
					t.Fatalf("%s, step %d: another translation", name, step)
				}
				if !slices.Equal(problems, wanted) {
					t.Fatalf("%s, step %d: problems %v, want %v", name, step, problems, wanted)
				}
			}
			_, n := m.Counts()
			used += n
			m.Sweep()
		}
	})
	if used == 0 {
		t.Error("nothing was ever remembered")
	}
}

// One VirtualService of many services makes anew its own virtual host and the route table with it.
func TestOneVirtualServiceMakesTwoPartsAnew(t *testing.T) {
	snap := bookstore()
	p := &mesh.Proxy{Type: mesh.Sidecar, Namespace: "default", Cluster: snap.Local.ID, Domain: "default.svc.cluster.local"}
	var host string
	for _, s := range snap.Services {
		if len(s.Ports) == 1 && s.Ports[0].Protocol == mesh.HTTP {
			host = s.Host
		}
	}
	rule := func(status uint32) []*mesh.VirtualService {
		return []*mesh.VirtualService{{Object: mesh.ObjectRef{Kind: "VirtualService", Namespace: "default", Name: "rule"}, Spec: &networking.VirtualService{Hosts: []string{host},
			Http: []*networking.HTTPRoute{{DirectResponse: &networking.HTTPDirectResponse{Status: status}}}}}}
	}
	snap.VirtualServices = rule(200)
	var m memo.Memo
	translate.Again(&m, snap, p)
	if made, used := m.Counts(); made == 0 || used != 0 {
		t.Errorf("%d made, %d used at first", made, used)
	}
	next := *snap
	next.VirtualServices = rule(201)
	translate.Again(&m, &next, p)
	if made, used := m.Counts(); made != 2 || used == 0 {
		t.Errorf("%d parts made, %d used", made, used)
	}
	labelled := *p
	labelled.Labels = map[string]string{"app": "another"}
	translate.Again(&m, &next, &labelled)
	if made, _ := m.Counts(); made > 3 { // rules may ask for labels; what is inbound does
		t.Errorf("%d parts made for a proxy that differs in its labels", made)
	}
}
