package explain

import (
	"fmt"
	"net/netip"
	"strings"
	"testing"

	networking "istio.io/api/networking/v1"

	"github.com/isthmus-mesh/isthmus/discovery/mesh"
)

func endpoint(workload string, cluster mesh.ClusterID, version string) *mesh.Endpoint {
	return &mesh.Endpoint{Workload: workload, Namespace: "default", Cluster: cluster, Network: mesh.NetworkID(cluster), Address: "10.0.0.9",
		Ports: map[uint32]uint32{9080: 8080}, Labels: map[string]string{"version": version}, TLS: true, Ready: true}
}

func snapshot() *mesh.Snapshot {
	amber := &mesh.Cluster{ID: "amber", TrustDomain: "amber.mesh", Network: "amber"}
	birch := &mesh.Cluster{ID: "birch", TrustDomain: "birch.mesh", Network: "birch", Gateways: []netip.AddrPort{netip.MustParseAddrPort("172.31.0.21:15443")}}
	to := func(subset string, weight int32) *networking.HTTPRouteDestination {
		return &networking.HTTPRouteDestination{Weight: weight, Destination: &networking.Destination{Host: "reviews.default.global", Subset: subset}}
	}
	return &mesh.Snapshot{
		Local: amber, Clusters: []*mesh.Cluster{amber, birch},
		Workloads: []*mesh.Workload{{Name: "productpage-1", Namespace: "default", Labels: map[string]string{"app": "productpage"}}},
		Services: []*mesh.Service{
			{Host: "productpage.default.svc.cluster.local", Name: "productpage", Namespace: "default", Endpoints: []*mesh.Endpoint{{Workload: "productpage-1", Namespace: "default", Cluster: "amber"}}},
			{Host: "reviews.default.global", Name: "reviews", Namespace: "default", Global: true, Ports: []mesh.Port{{Name: "http", Number: 9080, Protocol: mesh.HTTP}},
				VIPs: []netip.Addr{netip.MustParseAddr("240.0.0.7")}, Endpoints: []*mesh.Endpoint{endpoint("reviews-v1", "amber", "v1"), endpoint("reviews-v2", "birch", "v2")}},
		},
		VirtualServices: []*mesh.VirtualService{{Object: mesh.ObjectRef{Kind: "VirtualService", Namespace: "default", Name: "reviews"}, Spec: &networking.VirtualService{
			Hosts: []string{"reviews.default.global"},
			Http: []*networking.HTTPRoute{
				{Match: []*networking.HTTPMatchRequest{{Headers: map[string]*networking.StringMatch{"end-user": {MatchType: &networking.StringMatch_Exact{Exact: "jason"}}}}}, Route: []*networking.HTTPRouteDestination{to("v2", 0)}},
				{Route: []*networking.HTTPRouteDestination{to("v1", 75), to("v2", 25)}},
			},
		}}},
		DestinationRules: []*mesh.DestinationRule{{Object: mesh.ObjectRef{Kind: "DestinationRule", Namespace: "default", Name: "reviews"}, Spec: &networking.DestinationRule{Host: "reviews.default.global", Subsets: []*networking.Subset{
			{Name: "v1", Labels: map[string]string{"version": "v1"}}, {Name: "v2", Labels: map[string]string{"version": "v2"}},
		}}}},
	}
}

func TestExplain(t *testing.T) {
	for _, c := range []struct {
		name, url string
		headers   map[string]string
		want      []string // "WEIGHT SUBSET WORKLOAD SNI"
		route     string
	}{
		{name: "header", url: "http://reviews.default.global:9080/", headers: map[string]string{"end-user": "jason"}, route: "http[0]",
			want: []string{"100 v2 reviews-v2 reviews-v2.p9080.birch.reviews.default.global"}},
		{name: "weights", url: "http://reviews.default.global:9080/", route: "http[1]",
			want: []string{"75 v1 reviews-v1 outbound_.9080_.v1_.reviews.default.global", "25 v2 reviews-v2 reviews-v2.p9080.birch.reviews.default.global"}},
		{name: "by address", url: "http://240.0.0.7:9080/", route: "http[1]",
			want: []string{"75 v1 reviews-v1 outbound_.9080_.v1_.reviews.default.global", "25 v2 reviews-v2 reviews-v2.p9080.birch.reviews.default.global"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			w, err := Explain(snapshot(), Request{From: "productpage.default", URL: c.url, Headers: c.headers})
			if err != nil {
				t.Fatal(err)
			}
			if !strings.HasSuffix(w.Route, c.route) {
				t.Errorf("route %s", w.Route)
			}
			var got []string
			for _, target := range w.Targets {
				for _, h := range target.Hops {
					got = append(got, fmt.Sprintf("%d %s %s %s", target.Weight, target.Subset, h.Endpoint.Workload, h.SNI))
				}
			}
			if strings.Join(got, "\n") != strings.Join(c.want, "\n") {
				t.Errorf("got\n%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(c.want, "\n"))
			}
		})
	}
}

func TestRefusals(t *testing.T) {
	for _, c := range []struct{ from, url, want string }{
		{"nobody.default", "http://reviews.default.global:9080/", "no workload"},
		{"productpage.default", "http://ghost.default.global/", "no service has the host ghost.default.global"},
		{"productpage.default", "http://reviews.default.global:81/", "it has 9080"},
		{"productpage.default", "reviews", "is not a URL"},
	} {
		if _, err := Explain(snapshot(), Request{From: c.from, URL: c.url}); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s %s: %v, want %q", c.from, c.url, err, c.want)
		}
	}
}
