package main

import (
	"context"
	"fmt"
	"slices"
	"testing"
	"time"

	clusterv3 "github.com/envoyproxy/go-control-plane/envoy/config/cluster/v3"
	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	listenerv3 "github.com/envoyproxy/go-control-plane/envoy/config/listener/v3"
	hcmv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/http_connection_manager/v3"
	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	rpcstatus "google.golang.org/genproto/googleapis/rpc/status"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/structpb"

	"github.com/isthmus-mesh/isthmus/discovery/xds"
)

// Types that Istio's own sidecars and load generators ask for besides Envoy's; nothing is served of them.
var foreignTypes = []string{
	"type.googleapis.com/istio.networking.nds.v1.NameTable", "type.googleapis.com/istio.mesh.v1alpha1.ProxyConfig", "istio.io/debug", "istio.io/connect",
	"type.googleapis.com/envoy.config.core.v3.TypedExtensionConfig",
}

// istioNode describes a sidecar as Istio's agent does, of a cluster by Istio's default name.
func istioNode(t *testing.T) *corev3.Node {
	t.Helper()
	meta, err := structpb.NewStruct(map[string]any{
		"ANNOTATIONS": map[string]any{"sidecar.istio.io/status": "{}"}, "APP_CONTAINERS": "app", "CLUSTER_ID": "Kubernetes", "ENVOY_PROMETHEUS_PORT": 15090, "ENVOY_STATUS_PORT": 15021,
		"INSTANCE_IPS": "10.1.0.9,fd00::9", "INTERCEPTION_MODE": "REDIRECT", "ISTIO_PROXY_SHA": "0123", "ISTIO_VERSION": "1.31.1", "LABELS": map[string]any{"app": "client", "version": "v1"},
		"MESH_ID": "cluster.local", "NAME": "client-5d7b9f4bd4-abcde", "NAMESPACE": "default", "NETWORK": "", "NODE_NAME": "node-1", "OWNER": "kubernetes://apis/apps/v1/namespaces/default/deployments/client",
		"PILOT_SAN": []any{"istiod.istio-system.svc"}, "POD_PORTS": "[{\"containerPort\":80}]", "PLATFORM_METADATA": map[string]any{}, "PROXY_CONFIG": map[string]any{"concurrency": 2, "discoveryAddress": "istiod:15012"},
		"SERVICE_ACCOUNT": "client", "WORKLOAD_NAME": "client", "GENERATOR": "", "DNS_CAPTURE": "true",
	})
	if err != nil {
		t.Fatal(err)
	}
	return &corev3.Node{Id: "sidecar~10.1.0.9~client-5d7b9f4bd4-abcde.default~default.svc.cluster.local", Cluster: "client.default", Metadata: meta,
		Locality: &corev3.Locality{Region: "r1", Zone: "z1"}, UserAgentName: "envoy", UserAgentVersionType: &corev3.Node_UserAgentVersion{UserAgentVersion: "1.31"}}
}

func foreignConn(t *testing.T) (*daemonTest, discoveryv3.AggregatedDiscoveryServiceClient, context.Context) {
	t.Helper()
	cfg := testConfig(t, "amber")
	cfg.XDSPlaintext = freeAddr(t)
	bookstore(t, cfg)
	d := start(t, cfg)
	conn, err := grpc.NewClient(cfg.XDSPlaintext, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	t.Cleanup(cancel)
	return d, discoveryv3.NewAggregatedDiscoveryServiceClient(conn), ctx
}

// namedIn reads what a client is to ask for next: endpoints of clusters, or routes of listeners.
func namedIn(t *testing.T, bodies []*anypb.Any) (out []string) {
	t.Helper()
	for _, b := range bodies {
		switch b.GetTypeUrl() {
		case xds.ClusterType:
			c := new(clusterv3.Cluster)
			if err := b.UnmarshalTo(c); err != nil {
				t.Fatal(err)
			}
			if c.GetType() == clusterv3.Cluster_EDS {
				out = append(out, c.GetName())
			}
		case xds.ListenerType:
			l := new(listenerv3.Listener)
			if err := b.UnmarshalTo(l); err != nil {
				t.Fatal(err)
			}
			for _, chain := range l.GetFilterChains() {
				for _, f := range chain.GetFilters() {
					m := new(hcmv3.HttpConnectionManager)
					if f.GetTypedConfig().UnmarshalTo(m) == nil && m.GetRds() != nil {
						out = append(out, m.GetRds().GetRouteConfigName())
					}
				}
			}
		}
	}
	slices.Sort(out)
	return slices.Compact(out)
}

// TestForeignStateOfTheWorld is a client that is not ours: it asks for each type in turn, also for such as are not known
// here, names what it found, repeats itself with old nonces, and refuses something.
func TestForeignStateOfTheWorld(t *testing.T) {
	d, ads, ctx := foreignConn(t)
	s, err := ads.StreamAggregatedResources(ctx)
	if err != nil {
		t.Fatal(err)
	}
	send := func(r *discoveryv3.DiscoveryRequest) {
		t.Helper()
		if err := s.Send(r); err != nil {
			t.Fatal(err)
		}
	}
	recv := func() *discoveryv3.DiscoveryResponse {
		t.Helper()
		r, err := s.Recv()
		if err != nil {
			t.Fatal(err)
		}
		return r
	}
	// ask subscribes, accepts the answer and returns it.
	ask := func(typ string, node *corev3.Node, names ...string) *discoveryv3.DiscoveryResponse {
		t.Helper()
		send(&discoveryv3.DiscoveryRequest{TypeUrl: typ, Node: node, ResourceNames: names})
		r := recv()
		if r.GetTypeUrl() != typ || r.GetNonce() == "" || r.GetVersionInfo() == "" {
			t.Fatalf("asked for %s, received %s, nonce %q, version %q", typ, r.GetTypeUrl(), r.GetNonce(), r.GetVersionInfo())
		}
		send(&discoveryv3.DiscoveryRequest{TypeUrl: typ, ResourceNames: names, VersionInfo: r.GetVersionInfo(), ResponseNonce: r.GetNonce()})
		return r
	}
	clusters := ask(xds.ClusterType, istioNode(t))
	wanted := namedIn(t, clusters.GetResources())
	if !slices.Contains(wanted, reviewsV2) {
		t.Fatalf("clusters %v", wanted)
	}
	if r := ask(xds.EndpointType, nil, wanted...); len(r.GetResources()) != len(wanted) {
		t.Errorf("%d assignments of %d", len(r.GetResources()), len(wanted))
	}
	listeners := ask(xds.ListenerType, nil)
	routes := namedIn(t, listeners.GetResources())
	if r := ask(xds.RouteType, nil, routes...); len(r.GetResources()) != len(routes) || len(routes) == 0 {
		t.Errorf("%d route tables of %d", len(r.GetResources()), len(routes))
	}
	for _, typ := range foreignTypes {
		if r := ask(typ, nil); len(r.GetResources()) != 0 {
			t.Errorf("%d resources of %s", len(r.GetResources()), typ)
		}
	}
	// Secrets by name: the roots of the mesh are there, a workload's own certificate comes from its agent.
	if r := ask(xds.SecretType, nil, "ROOTCA", "default"); len(r.GetResources()) != 1 {
		t.Errorf("%d secrets", len(r.GetResources()))
	}
	// What is long answered is asked again, with the nonce of another type, with one that never was, and refused late.
	for _, nonce := range []string{clusters.GetNonce(), "never", listeners.GetNonce()} {
		send(&discoveryv3.DiscoveryRequest{TypeUrl: xds.ClusterType, VersionInfo: clusters.GetVersionInfo(), ResponseNonce: nonce})
		send(&discoveryv3.DiscoveryRequest{TypeUrl: xds.ListenerType, VersionInfo: "old", ResponseNonce: nonce, ErrorDetail: &rpcstatus.Status{Message: "late"}})
	}
	// Fewer endpoints are wanted, then all again: the one that came back is sent.
	send(&discoveryv3.DiscoveryRequest{TypeUrl: xds.EndpointType, ResourceNames: wanted[1:]})
	send(&discoveryv3.DiscoveryRequest{TypeUrl: xds.EndpointType, ResourceNames: wanted})
	r := recv()
	if len(r.GetResources()) != 1 {
		t.Fatalf("%s: %d resources for a name that came back", r.GetTypeUrl(), len(r.GetResources()))
	}
	send(&discoveryv3.DiscoveryRequest{TypeUrl: xds.EndpointType, ResourceNames: wanted, VersionInfo: r.GetVersionInfo(), ResponseNonce: r.GetNonce()})
	writeObjects(t, d.cfg, "reviews.yaml", reviewsYAML+fmt.Sprintf(morePod, 3))
	for got := 0; got == 0; {
		r := recv()
		if r.GetTypeUrl() != xds.EndpointType {
			t.Fatalf("%s with %d resources after an endpoint came", r.GetTypeUrl(), len(r.GetResources()))
		}
		got = len(r.GetResources())
	}
}

const morePod = `---
apiVersion: v1
kind: Pod
metadata: {name: reviews-v2-%[1]d, namespace: default, labels: {app: reviews, version: v2}}
spec: {serviceAccountName: reviews, containers: [{name: app, image: reviews}]}
status: {phase: Running, podIP: 10.1.1.%[1]d, conditions: [{type: Ready, status: "True"}]}
`

// TestForeignDelta does so with delta: wildcards in both spellings, names beside them, versions from before.
func TestForeignDelta(t *testing.T) {
	d, ads, ctx := foreignConn(t)
	s, err := ads.DeltaAggregatedResources(ctx)
	if err != nil {
		t.Fatal(err)
	}
	send := func(r *discoveryv3.DeltaDiscoveryRequest) {
		t.Helper()
		if err := s.Send(r); err != nil {
			t.Fatal(err)
		}
	}
	recv := func(typ string) *discoveryv3.DeltaDiscoveryResponse {
		t.Helper()
		r, err := s.Recv()
		if err != nil {
			t.Fatal(err)
		}
		if r.GetTypeUrl() != typ {
			t.Fatalf("received %s, want %s", r.GetTypeUrl(), typ)
		}
		send(&discoveryv3.DeltaDiscoveryRequest{TypeUrl: typ, ResponseNonce: r.GetNonce()})
		return r
	}
	bodies := func(r *discoveryv3.DeltaDiscoveryResponse) (out []*anypb.Any) {
		for _, x := range r.GetResources() {
			out = append(out, x.GetResource())
		}
		return out
	}
	send(&discoveryv3.DeltaDiscoveryRequest{TypeUrl: xds.ClusterType, Node: istioNode(t), ResourceNamesSubscribe: []string{"*"}, InitialResourceVersions: map[string]string{reviewsV2: "old", "gone": "1"}})
	clusters := recv(xds.ClusterType)
	wanted := namedIn(t, bodies(clusters))
	if !slices.Contains(wanted, reviewsV2) {
		t.Fatalf("clusters %v", wanted)
	}
	send(&discoveryv3.DeltaDiscoveryRequest{TypeUrl: xds.EndpointType, ResourceNamesSubscribe: wanted})
	// What is gone is told when nothing else may refer to it; it need not wait for the endpoints.
	if removed := clusters.GetRemovedResources(); len(removed) == 0 {
		if r := recv(xds.ClusterType); !slices.Equal(r.GetRemovedResources(), []string{"gone"}) {
			t.Errorf("removed %v", r.GetRemovedResources())
		}
	}
	if r := recv(xds.EndpointType); len(r.GetResources()) != len(wanted) {
		t.Errorf("%d assignments of %d", len(r.GetResources()), len(wanted))
	}
	send(&discoveryv3.DeltaDiscoveryRequest{TypeUrl: xds.ListenerType})
	routes := namedIn(t, bodies(recv(xds.ListenerType)))
	send(&discoveryv3.DeltaDiscoveryRequest{TypeUrl: xds.RouteType, ResourceNamesSubscribe: append([]string{"nobody-has-this"}, routes...)})
	if r := recv(xds.RouteType); len(r.GetResources()) != len(routes) || !slices.Equal(r.GetRemovedResources(), []string{"nobody-has-this"}) {
		t.Errorf("%d route tables of %d, without %v", len(r.GetResources()), len(routes), r.GetRemovedResources())
	}
	for _, typ := range foreignTypes {
		send(&discoveryv3.DeltaDiscoveryRequest{TypeUrl: typ})
		recv(typ)
		send(&discoveryv3.DeltaDiscoveryRequest{TypeUrl: typ, ResourceNamesUnsubscribe: []string{"*"}})
	}
	send(&discoveryv3.DeltaDiscoveryRequest{TypeUrl: xds.EndpointType, ResourceNamesUnsubscribe: []string{wanted[0], "never-asked-for"}, ResponseNonce: "stale"})
	send(&discoveryv3.DeltaDiscoveryRequest{TypeUrl: xds.ClusterType, ResponseNonce: clusters.GetNonce(), ErrorDetail: &rpcstatus.Status{Message: "late"}})
	writeObjects(t, d.cfg, "reviews.yaml", reviewsYAML+fmt.Sprintf(morePod, 3))
	if r := recv(xds.EndpointType); len(r.GetResources()) == 0 || slices.ContainsFunc(r.GetResources(), func(x *discoveryv3.Resource) bool { return x.GetName() == wanted[0] }) {
		t.Errorf("%d assignments after an endpoint came", len(r.GetResources()))
	}
}
