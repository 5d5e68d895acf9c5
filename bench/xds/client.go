package main

import (
	"context"
	"fmt"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/structpb"
)

const (
	clusterType  = "type.googleapis.com/envoy.config.cluster.v3.Cluster"
	endpointType = "type.googleapis.com/envoy.config.endpoint.v3.ClusterLoadAssignment"
	listenerType = "type.googleapis.com/envoy.config.listener.v3.Listener"
)

// crowd is clients that take clusters, listeners and the endpoints of every service, and answer what they get.
type crowd struct {
	clients int
	bytes   atomic.Int64
	cancel  context.CancelFunc
	readers sync.WaitGroup
	conns   []*grpc.ClientConn

	mu       sync.Mutex
	seen     chan time.Time
	versions map[string]map[string]string // of the first client, by type and name; delta only
}

// expect returns where each client says when it next gets endpoints.
func (c *crowd) expect() <-chan time.Time {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.seen = make(chan time.Time, 2*c.clients)
	return c.seen
}

func (c *crowd) got() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.seen != nil {
		select {
		case c.seen <- time.Now():
		default:
		}
	}
}

func (c *crowd) close() map[string]map[string]string {
	c.cancel()
	c.readers.Wait()
	for _, conn := range c.conns {
		conn.Close()
	}
	return c.versions
}

// node describes client i as a sidecar of Istio does.
func node(i int) *corev3.Node {
	ip := fmt.Sprintf("10.250.%d.%d", i/250, i%250+1)
	meta, _ := structpb.NewStruct(map[string]any{
		"CLUSTER_ID": "bench", "NAMESPACE": "bench", "NAME": fmt.Sprintf("client-%d", i), "INSTANCE_IPS": ip, "ISTIO_VERSION": "1.31.1",
		"LABELS": map[string]any{"app": "client"}, "MESH_ID": "bench", "SERVICE_ACCOUNT": "client", "INTERCEPTION_MODE": "REDIRECT",
	})
	return &corev3.Node{Id: fmt.Sprintf("sidecar~%s~client-%d.bench~bench.svc.cluster.local", ip, i), Cluster: "client.bench", Metadata: meta}
}

// connect opens the clients and waits until each has clusters (if any are expected) and the endpoints of every service.
func connect(ctx context.Context, addr string, l load, clusters int) (*crowd, error) {
	return open(ctx, addr, l, clusters > 0, l.services, nil)
}

// resume opens the clients with what they had, and waits until nothing has come for a while.
func resume(ctx context.Context, addr string, l load, had map[string]map[string]string) (*crowd, error) {
	c, err := open(ctx, addr, l, true, 0, had)
	if err != nil {
		return nil, err
	}
	time.Sleep(2 * time.Second)
	return c, nil
}

func open(ctx context.Context, addr string, l load, all bool, want int, had map[string]map[string]string) (*crowd, error) {
	ctx, cancel := context.WithCancel(ctx)
	c := &crowd{clients: l.clients, cancel: cancel, versions: map[string]map[string]string{}}
	var names []string
	for i := range l.services {
		names = append(names, clusterName(i))
	}
	ready := make(chan error, l.clients)
	for i := range l.clients {
		conn, err := grpc.NewClient(addr, grpc.WithTransportCredentials(insecure.NewCredentials()), grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(256<<20)))
		if err != nil {
			c.close()
			return nil, err
		}
		c.conns = append(c.conns, conn)
		ads := discoveryv3.NewAggregatedDiscoveryServiceClient(conn)
		c.readers.Go(func() {
			run := c.delta
			if l.sotw {
				run = c.sotw
			}
			if err := run(ctx, ads, i, all, names, want, had, ready); err != nil && ctx.Err() == nil {
				select {
				case ready <- fmt.Errorf("client %d: %w", i, err):
				default:
				}
			}
		})
	}
	timeout := time.After(deadline)
	for range l.clients {
		select {
		case err := <-ready:
			if err != nil {
				c.close()
				return nil, err
			}
		case <-timeout:
			c.close()
			return nil, fmt.Errorf("not every client has everything within %s", deadline)
		}
	}
	return c, nil
}

func (c *crowd) delta(ctx context.Context, ads discoveryv3.AggregatedDiscoveryServiceClient, i int, all bool, names []string, want int, had map[string]map[string]string, ready chan<- error) error {
	s, err := ads.DeltaAggregatedResources(ctx)
	if err != nil {
		return err
	}
	types := []string{endpointType}
	if all {
		types = []string{clusterType, endpointType, listenerType}
	}
	for n, typ := range types {
		req := &discoveryv3.DeltaDiscoveryRequest{TypeUrl: typ, InitialResourceVersions: had[typ]}
		if typ == endpointType {
			req.ResourceNamesSubscribe = names
		}
		if n == 0 {
			req.Node = node(i)
		}
		if err := s.Send(req); err != nil {
			return err
		}
	}
	if want == 0 {
		ready <- nil
	}
	endpoints := 0
	for {
		r, err := s.Recv()
		if err != nil {
			return err
		}
		c.bytes.Add(int64(proto.Size(r)))
		if i == 0 {
			c.keep(r)
		}
		if err := s.Send(&discoveryv3.DeltaDiscoveryRequest{TypeUrl: r.GetTypeUrl(), ResponseNonce: r.GetNonce()}); err != nil {
			return err
		}
		if r.GetTypeUrl() == endpointType {
			endpoints = c.count(endpoints, len(r.GetResources()), want, ready)
		}
	}
}

// count adds endpoints that came to those before. The first time that there are as many as wanted the client is ready; what
// comes later is a change.
func (c *crowd) count(before, came, want int, ready chan<- error) int {
	if before >= want {
		c.got()
	} else if before+came >= want {
		ready <- nil
	}
	return before + came
}

// keep notes what the first client has.
func (c *crowd) keep(r *discoveryv3.DeltaDiscoveryResponse) {
	named := c.versions[r.GetTypeUrl()]
	if named == nil {
		named = map[string]string{}
		c.versions[r.GetTypeUrl()] = named
	}
	for _, x := range r.GetResources() {
		named[x.GetName()] = strings.Clone(x.GetVersion())
	}
	for _, name := range r.GetRemovedResources() {
		delete(named, name)
	}
}

func (c *crowd) sotw(ctx context.Context, ads discoveryv3.AggregatedDiscoveryServiceClient, i int, _ bool, names []string, want int, _ map[string]map[string]string, ready chan<- error) error {
	s, err := ads.StreamAggregatedResources(ctx)
	if err != nil {
		return err
	}
	of := func(typ string) []string {
		if typ == endpointType {
			return names
		}
		return nil
	}
	for n, typ := range []string{clusterType, endpointType, listenerType} {
		req := &discoveryv3.DiscoveryRequest{TypeUrl: typ, ResourceNames: of(typ)}
		if n == 0 {
			req.Node = node(i)
		}
		if err := s.Send(req); err != nil {
			return err
		}
	}
	endpoints := 0
	for {
		r, err := s.Recv()
		if err != nil {
			return err
		}
		c.bytes.Add(int64(proto.Size(r)))
		if err := s.Send(&discoveryv3.DiscoveryRequest{TypeUrl: r.GetTypeUrl(), ResourceNames: of(r.GetTypeUrl()), ResponseNonce: r.GetNonce(), VersionInfo: r.GetVersionInfo()}); err != nil {
			return err
		}
		if r.GetTypeUrl() == endpointType {
			endpoints = c.count(endpoints, len(r.GetResources()), want, ready)
		}
	}
}
