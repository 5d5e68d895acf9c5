package views

import (
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"testing"
	"time"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/structpb"
	meshconfig "istio.io/api/mesh/v1alpha1"
	networking "istio.io/api/networking/v1"
	"pgregory.net/rapid"

	"github.com/isthmus-mesh/isthmus/discovery/mesh"
	"github.com/isthmus-mesh/isthmus/discovery/xds"
)

// newest is a mesh.Snapshots that a test sets.
type newest struct {
	snap    *mesh.Snapshot
	changed chan struct{}
}

func (n *newest) Latest() (*mesh.Snapshot, <-chan struct{}) { return n.snap, n.changed }

func world(services, pods int) *mesh.Snapshot {
	local := &mesh.Cluster{ID: "amber", TrustDomain: "amber.mesh", Network: "amber"}
	snap := &mesh.Snapshot{Revision: 1, Local: local, Clusters: []*mesh.Cluster{local}}
	for i := range services {
		name := fmt.Sprintf("svc-%05d", i)
		s := &mesh.Service{Host: mesh.LocalHost(name, "shop"), Name: name, Namespace: "shop", Object: mesh.ObjectRef{Kind: "Service", Namespace: "shop", Name: name},
			Ports: []mesh.Port{{Name: "http", Number: 80, Protocol: mesh.HTTP}}}
		for j := range pods {
			s.Endpoints = append(s.Endpoints, &mesh.Endpoint{Workload: fmt.Sprintf("%s-%d", name, j), Namespace: "shop", Cluster: "amber", Network: "amber",
				Address: fmt.Sprintf("10.%d.%d.%d", i/250, i%250, j+1), Ports: map[uint32]uint32{80: 8080}, Identity: "spiffe://amber.mesh/ns/shop/sa/" + name, TLS: true, Ready: true})
		}
		snap.Services = append(snap.Services, s)
	}
	return snap
}

// flip is a snapshot in which one endpoint is not what it was.
func flip(old *mesh.Snapshot, service, endpoint int, change func(*mesh.Endpoint)) *mesh.Snapshot {
	snap := *old
	snap.Revision++
	snap.Services = slices.Clone(old.Services)
	s := *snap.Services[service]
	s.Endpoints = slices.Clone(s.Endpoints)
	e := *s.Endpoints[endpoint]
	change(&e)
	s.Endpoints[endpoint] = &e
	snap.Services[service] = &s
	return &snap
}

func node(name string) *corev3.Node {
	return &corev3.Node{Id: "sidecar~10.9.0.1~" + name + ".shop~shop.svc.cluster.local"}
}

func open(t testing.TB, vs *Views, name string) xds.Feed {
	t.Helper()
	f, _, err := vs.Feed(node(name), "")
	if err != nil {
		t.Fatal(err)
	}
	return f
}

// openAs opens a sidecar whose label app is another.
func openAs(t testing.TB, vs *Views, name, app string) xds.Feed {
	t.Helper()
	n := node(name)
	meta, err := structpb.NewStruct(map[string]any{"LABELS": map[string]any{"app": app}})
	if err != nil {
		t.Fatal(err)
	}
	n.Metadata = meta
	f, _, err := vs.Feed(n, "")
	if err != nil {
		t.Fatal(err)
	}
	return f
}

func versions(f xds.Feed) map[string]string {
	out := map[string]string{}
	set, _ := f.Latest()
	for typ, named := range set {
		for r := range named.All() {
			out[typ+" "+r.Name] = r.Version
		}
	}
	return out
}

func views(snap *mesh.Snapshot) (*Views, *newest) {
	n := &newest{snap: snap, changed: make(chan struct{})}
	return New(n, slog.New(slog.DiscardHandler), prometheus.NewRegistry()), n
}

// However the views got to a snapshot, they serve what views that never saw another serve.
func TestHistoryDoesNotShow(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		snap := world(3, 3)
		vs, n := views(snap)
		vs.rules.patience = 0 // then history shows, for a while
		names := []string{"svc-00000-0", "svc-00001-2", "client"}
		feeds := map[string]xds.Feed{}
		for range rapid.IntRange(1, 8).Draw(t, "steps") {
			if name := rapid.SampledFrom(names).Draw(t, "opens"); feeds[name] == nil {
				f, _, err := vs.Feed(node(name), "")
				if err != nil {
					t.Fatal(err)
				}
				feeds[name] = f
			}
			kind := rapid.IntRange(0, 3).Draw(t, "kind")
			snap = flip(snap, rapid.IntRange(0, 2).Draw(t, "service"), rapid.IntRange(0, 2).Draw(t, "endpoint"), func(e *mesh.Endpoint) {
				switch kind {
				case 0:
					e.Ready = !e.Ready
				case 1:
					e.Address = "10.0.0.77"
				case 2:
					e.Identity = "spiffe://amber.mesh/ns/shop/sa/other"
				case 3:
					e.Workload = "client"
				}
			})
			if rapid.IntRange(0, 2).Draw(t, "rules") == 0 {
				next := *snap // of the same revision: the views see both changes at once
				host := mesh.LocalHost(fmt.Sprintf("svc-%05d", rapid.IntRange(0, 3).Draw(t, "host")), "shop")
				switch rapid.IntRange(0, 4).Draw(t, "rule") {
				case 0, 1:
					next.VirtualServices = []*mesh.VirtualService{{Object: mesh.ObjectRef{Kind: "VirtualService", Namespace: "shop", Name: "rule"}, Spec: &networking.VirtualService{Hosts: []string{host}, Http: []*networking.HTTPRoute{
						{Route: []*networking.HTTPRouteDestination{{Destination: &networking.Destination{Host: mesh.LocalHost("svc-00002", "shop"), Subset: rapid.SampledFrom([]string{"", "v1"}).Draw(t, "subset")}}}}}}}}
				case 2:
					next.DestinationRules = []*mesh.DestinationRule{{Object: mesh.ObjectRef{Kind: "DestinationRule", Namespace: "shop", Name: "rule"}, Spec: &networking.DestinationRule{Host: host, Subsets: []*networking.Subset{{Name: "v1"}}}}}
				case 3:
					next.VirtualServices, next.DestinationRules = nil, nil
				case 4:
					next.MeshConfig = &mesh.MeshConfig{Spec: &meshconfig.MeshConfig{ConnectTimeout: durationpb.New(time.Duration(rapid.IntRange(1, 3).Draw(t, "seconds")) * time.Second)}}
				}
				snap = &next
			}
			n.snap = snap
			vs.mu.Lock()
			vs.renew(snap)
			vs.mu.Unlock()
		}
		fresh, _ := views(snap)
		for name, f := range feeds {
			g, _, err := fresh.Feed(node(name), "")
			if err != nil {
				t.Fatal(err)
			}
			if got, want := versions(f), versions(g); !maps.Equal(got, want) {
				t.Fatalf("%s is served %d resources, want %d, or others", name, len(got), len(want))
			}
		}
	})
}

func TestEqualProxiesShare(t *testing.T) {
	snap := world(3, 2)
	vs, n := views(snap)
	a, b := open(t, vs, "client-1"), open(t, vs, "client-2")
	w := open(t, vs, "svc-00000-0")
	if len(vs.scopes) != 1 {
		t.Errorf("%d scopes for three sidecars that are alike", len(vs.scopes))
	}
	if x, y := versions(a), versions(w); len(y) <= len(x) {
		t.Errorf("a workload is served %d resources, one that nobody calls %d", len(y), len(x))
	}
	_, changed := a.Latest()
	n.snap = flip(snap, 1, 0, func(e *mesh.Endpoint) { e.Ready = false })
	vs.mu.Lock()
	vs.renew(n.snap)
	vs.mu.Unlock()
	select {
	case <-changed:
	default:
		t.Error("the change was not published")
	}
	x, _ := a.Latest()
	y, _ := b.Latest()
	for r := range x[xds.EndpointType].All() {
		if y[xds.EndpointType].Get(r.Name) != r {
			t.Errorf("%s is encoded twice", r.Name)
		}
	}
}

func TestNothingNewIsNotPublished(t *testing.T) {
	snap := world(2, 2)
	vs, n := views(snap)
	_, changed := open(t, vs, "client").Latest()
	same := *snap
	same.Revision++
	n.snap = &same
	vs.mu.Lock()
	vs.renew(&same)
	vs.mu.Unlock()
	select {
	case <-changed:
		t.Error("an equal snapshot was published")
	default:
	}
}

// BenchmarkOneEndpoint is one endpoint that changes while 100 sidecars are there, half of them endpoints themselves.
func BenchmarkOneEndpoint(b *testing.B) {
	for _, services := range []int{1000, 10000} {
		b.Run(fmt.Sprintf("%d services", services), func(b *testing.B) {
			snap := world(services, 10)
			vs, n := views(snap)
			for i := range 50 {
				open(b, vs, fmt.Sprintf("client-%d", i))
				open(b, vs, fmt.Sprintf("svc-%05d-%d", i*7+8, i%10))
			}
			b.ReportAllocs()
			for i := 0; b.Loop(); i++ {
				n.snap = flip(n.snap, 5, 3, func(e *mesh.Endpoint) { e.Weight = uint32(i%7 + 2) })
				vs.mu.Lock()
				vs.renew(n.snap)
				vs.mu.Unlock()
			}
		})
	}
}

// BenchmarkOneVirtualService changes a rule of one service for 100 sidecars of two kinds.
func BenchmarkOneVirtualService(b *testing.B) {
	for _, services := range []int{1000, 10000} {
		b.Run(fmt.Sprintf("%d services", services), func(b *testing.B) {
			snap := world(services, 2)
			vs, n := views(snap)
			for i := range 50 {
				open(b, vs, fmt.Sprintf("client-%d", i))
				openAs(b, vs, fmt.Sprintf("other-%d", i), "other")
			}
			b.ReportAllocs()
			for i := 0; b.Loop(); i++ {
				next := *n.snap
				next.Revision++
				next.Delta = nil
				next.VirtualServices = []*mesh.VirtualService{{Object: mesh.ObjectRef{Kind: "VirtualService", Namespace: "shop", Name: "rule"}, Spec: &networking.VirtualService{
					Hosts: []string{mesh.LocalHost("svc-00007", "shop")}, Http: []*networking.HTTPRoute{{DirectResponse: &networking.HTTPDirectResponse{Status: uint32(200 + i%100)}}}}}}
				renew(vs, n, &next)
			}
		})
	}
}
