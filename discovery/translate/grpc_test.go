package translate_test

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/health"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/xds"

	networking "istio.io/api/networking/v1"

	"github.com/isthmus-mesh/isthmus/discovery/mesh"
	"github.com/isthmus-mesh/isthmus/discovery/translate"
)

// TestGRPCWithoutProxy reaches a service by grpc-go's own xDS client, by its full and its short name, routed by version.
func TestGRPCWithoutProxy(t *testing.T) {
	backend := func(service string) netip.AddrPort {
		l := listen(t)
		s := grpc.NewServer()
		h := health.NewServer()
		h.SetServingStatus(service, healthpb.HealthCheckResponse_SERVING)
		healthpb.RegisterHealthServer(s, h)
		go s.Serve(l)
		t.Cleanup(s.Stop)
		return l.Addr().(*net.TCPAddr).AddrPort()
	}
	snap := bookstore()
	reviews := snap.Service("reviews.default.svc.cluster.local")
	reviews.Endpoints = nil
	for _, version := range []string{"v1", "v2"} {
		a := backend(version)
		e := pod(snap.Local, "reviews-"+version, a.Addr().String(), version)
		e.Ports = map[uint32]uint32{9090: uint32(a.Port())}
		reviews.Endpoints = append(reviews.Endpoints, e)
	}
	remote := pod(snap.Clusters[1], "reviews-v2-far", "127.0.0.1", "v2") // behind a gateway: not for this client
	remote.Ports = map[uint32]uint32{9090: 1}
	reviews.Endpoints = append(reviews.Endpoints, remote)
	rule := snap.DestinationRules[1]
	rule.Spec.Host = reviews.Host
	snap.VirtualServices = []*mesh.VirtualService{{Object: ref("VirtualService", "reviews"), Spec: &networking.VirtualService{
		Hosts: []string{reviews.Host},
		Http:  []*networking.HTTPRoute{{Route: []*networking.HTTPRouteDestination{{Destination: &networking.Destination{Host: reviews.Host, Subset: "v2"}}}}},
	}}}

	r, problems := translate.Translate(snap, proxies()["proxyless"])
	if len(problems) > 0 {
		t.Fatal(problems)
	}
	cp, addr := serve(t, r)
	resolver, err := xds.NewXDSResolverWithConfigForTesting([]byte(fmt.Sprintf(
		`{"node": {"id": "client"}, "xds_servers": [{"server_uri": %q, "channel_creds": [{"type": "insecure"}], "server_features": ["xds_v3"]}]}`, addr)))
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"reviews.default.svc.cluster.local:9090", "reviews:9090"} {
		conn, err := grpc.NewClient("xds:///"+name, grpc.WithResolvers(resolver), grpc.WithTransportCredentials(insecure.NewCredentials()))
		if err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
		for range 10 {
			if _, err := healthpb.NewHealthClient(conn).Check(ctx, &healthpb.HealthCheckRequest{Service: "v2"}, grpc.WaitForReady(true)); err != nil {
				t.Errorf("%s: %v; refused: %s", name, err, cp.refused())
				break
			}
		}
		cancel()
		conn.Close()
	}
	if n := cp.refused(); n != "" {
		t.Errorf("grpc refused: %s", n)
	}
}
