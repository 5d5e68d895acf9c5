package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"strings"
	"sync/atomic"
	"testing"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/health"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/xds"
)

// backend is a gRPC server that counts the calls it gets.
type backend struct {
	port  int
	calls atomic.Int64
}

func newBackend(t *testing.T) *backend {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	b := &backend{port: l.Addr().(*net.TCPAddr).Port}
	s := grpc.NewServer(grpc.UnaryInterceptor(func(ctx context.Context, req any, _ *grpc.UnaryServerInfo, h grpc.UnaryHandler) (any, error) {
		b.calls.Add(1)
		return h(ctx, req)
	}))
	healthpb.RegisterHealthServer(s, health.NewServer())
	done := make(chan struct{})
	go func() { defer close(done); _ = s.Serve(l) }()
	t.Cleanup(func() { s.Stop(); <-done })
	return b
}

// greeterYAML is a service of the backends, each with a version of its own: v1, v2, ...
func greeterYAML(backends ...*backend) string {
	out := `
apiVersion: networking.istio.io/v1
kind: ServiceEntry
metadata: {name: greeter, namespace: default}
spec:
  hosts: [greeter.example.com]
  resolution: STATIC
  ports: [{number: 7070, name: grpc, protocol: GRPC}]
  endpoints:
`
	for i, b := range backends {
		out += fmt.Sprintf("  - {address: 127.0.0.1, ports: {grpc: %d}, labels: {version: v%d}}\n", b.port, i+1)
	}
	return out
}

const greeterRulesYAML = `
apiVersion: networking.istio.io/v1
kind: DestinationRule
metadata: {name: greeter, namespace: default}
spec:
  host: greeter.example.com
  subsets:
  - {name: v1, labels: {version: v1}}
  - {name: v2, labels: {version: v2}}
---
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {name: greeter, namespace: default}
spec:
  hosts: [greeter.example.com]
  http:
  - match: [{headers: {end-user: {exact: jason}}}]
    route:
    - {destination: {host: greeter.example.com, subset: v1}}
  - route:
    - {destination: {host: greeter.example.com, subset: v1}, weight: WEIGHT1}
    - {destination: {host: greeter.example.com, subset: v2}, weight: WEIGHT2}
`

// TestGRPCWithoutProxy calls a service as a grpc-go client does that speaks xDS itself, while its endpoints and routes change.
func TestGRPCWithoutProxy(t *testing.T) {
	one, two := newBackend(t), newBackend(t)
	cfg := testConfig(t, "amber")
	cfg.XDSPlaintext = freeAddr(t)
	writeObjects(t, cfg, "greeter.yaml", greeterYAML(one))
	d := start(t, cfg)

	bootstrap := fmt.Sprintf(`{
		"xds_servers": [{"server_uri": %q, "channel_creds": [{"type": "insecure"}], "server_features": ["xds_v3"]}],
		"node": {"id": "sidecar~127.0.0.1~client.default~default.svc.cluster.local", "metadata": {"GENERATOR": "grpc", "NAMESPACE": "default", "CLUSTER_ID": "amber", "NETWORK": "amber"}}
	}`, cfg.XDSPlaintext)
	resolver, err := xds.NewXDSResolverWithConfigForTesting([]byte(bootstrap))
	if err != nil {
		t.Fatal(err)
	}
	conn, err := grpc.NewClient("xds:///greeter.example.com:7070", grpc.WithResolvers(resolver), grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	call := func() error {
		ctx, cancel := context.WithTimeout(t.Context(), patience)
		defer cancel()
		_, err := healthpb.NewHealthClient(conn).Check(ctx, &healthpb.HealthCheckRequest{}, grpc.WaitForReady(true))
		return err
	}
	if err := call(); err != nil {
		t.Fatalf("%v; proxies: %+v", err, d.status(t).Proxies)
	}
	if one.calls.Load() != 1 {
		t.Errorf("%d calls came", one.calls.Load())
	}

	d.write(t, "greeter.yaml", greeterYAML(one, two))
	eventually(t, "the second endpoint is called", func() error {
		if err := call(); err != nil {
			t.Fatalf("an endpoint more breaks calls: %v", err)
		}
		if two.calls.Load() == 0 {
			return errors.New("no call")
		}
		return nil
	})

	weights := func(one, two int) {
		t.Helper()
		d.write(t, "rules.yaml", strings.NewReplacer("WEIGHT1", fmt.Sprint(one), "WEIGHT2", fmt.Sprint(two)).Replace(greeterRulesYAML))
	}
	// split makes n calls and checks how many of them reach the second. grpc-go may fail a call between taking a new
	// route and making its new cluster, so a failure counts as not there yet.
	split := func(n int, least, most int64) error {
		before := two.calls.Load()
		for range n {
			if err := call(); err != nil {
				return err
			}
		}
		if got := two.calls.Load() - before; got < least || got > most {
			return fmt.Errorf("%d of %d reach the second, want %d to %d", got, n, least, most)
		}
		return nil
	}
	weights(0, 100)
	eventually(t, "all calls reach v2", func() error { return split(20, 20, 20) })
	weights(50, 50)
	eventually(t, "calls reach both", func() error { return split(40, 8, 32) })
	d.write(t, "greeter.yaml", greeterYAML(two, one)) // v1 and v2 change places
	weights(100, 0)
	eventually(t, "all calls reach what is v1 now", func() error { return split(20, 20, 20) })
	for _, p := range d.status(t).Proxies {
		for typ, s := range p.Types {
			if s.Nack != "" {
				t.Errorf("grpc refuses %s: %s", typ, s.Nack)
			}
		}
	}
	// A control plane that is away takes nothing away.
	d.stop(t)
	if err := split(20, 20, 20); err != nil {
		t.Errorf("while isthmusd is away: %v", err)
	}
	again := start(t, cfg)
	again.write(t, "greeter.yaml", greeterYAML(one, two))
	eventually(t, "the client follows again", func() error { return split(20, 0, 0) })
}
