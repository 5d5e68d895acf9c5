package xds

import (
	"context"
	"fmt"
	"strconv"
	"sync"
	"syscall"
	"testing"
	"time"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	endpointv3 "github.com/envoyproxy/go-control-plane/envoy/config/endpoint/v3"
	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"google.golang.org/grpc"
)

const benchClients = 100

func assignment(service, change int) *Resource {
	name := fmt.Sprintf("outbound|9080||service-%d.namespace-%d.svc.cluster.local", service, service%50)
	hosts := &endpointv3.LocalityLbEndpoints{}
	for i := range 10 {
		hosts.LbEndpoints = append(hosts.LbEndpoints, &endpointv3.LbEndpoint{
			HostIdentifier: &endpointv3.LbEndpoint_Endpoint{Endpoint: &endpointv3.Endpoint{Address: &corev3.Address{
				Address: &corev3.Address_SocketAddress{SocketAddress: &corev3.SocketAddress{
					Address:       fmt.Sprintf("10.%d.%d.%d", service/250%250, service%250, i),
					PortSpecifier: &corev3.SocketAddress_PortValue{PortValue: uint32(9080 + change%2)},
				}}}}},
		})
	}
	return NewResource(name, &endpointv3.ClusterLoadAssignment{ClusterName: name, Endpoints: []*endpointv3.LocalityLbEndpoints{hosts}})
}

// crowd is 100 delta clients over gRPC in memory that name every service; each counts what it is sent.
type crowd struct {
	w    *world
	sent sync.WaitGroup // one for each client and expected resource
	stop func()
}

func gather(b *testing.B, feed Feed, names []string) *crowd {
	c := &crowd{w: serving(b, feed)}
	ctx, cancel := context.WithCancel(context.Background())
	var readers sync.WaitGroup
	c.sent.Add(benchClients * len(names))
	var conns []*grpc.ClientConn
	for i := range benchClients {
		conn, err := c.w.dial()
		if err != nil {
			b.Fatal(err)
		}
		conns = append(conns, conn)
		ads, err := discoveryv3.NewAggregatedDiscoveryServiceClient(conn).DeltaAggregatedResources(ctx)
		if err != nil {
			b.Fatal(err)
		}
		err = ads.Send(&discoveryv3.DeltaDiscoveryRequest{Node: &corev3.Node{Id: strconv.Itoa(i)}, TypeUrl: EndpointType, ResourceNamesSubscribe: names})
		if err != nil {
			b.Fatal(err)
		}
		readers.Go(func() {
			for {
				r, err := ads.Recv()
				if err != nil {
					return
				}
				ads.Send(&discoveryv3.DeltaDiscoveryRequest{TypeUrl: EndpointType, ResponseNonce: r.GetNonce()})
				c.sent.Add(-len(r.GetResources()))
			}
		})
	}
	c.stop = func() {
		cancel()
		readers.Wait()
		for _, conn := range conns {
			conn.Close()
		}
		c.w.stop()
	}
	c.sent.Wait()
	return c
}

// BenchmarkOneEndpoint changes one endpoint and waits until 100 clients have it. The CPU figure includes the clients.
func BenchmarkOneEndpoint(b *testing.B) {
	for _, services := range []int{1_000, 10_000} {
		b.Run(fmt.Sprintf("services=%d/clients=%d", services, benchClients), func(b *testing.B) {
			all := map[string]*Resource{}
			var names []string
			for i := range services {
				r := assignment(i, 0)
				all[r.Name] = r
				names = append(names, r.Name)
			}
			set := NamedOf(all)
			feed := newMemory(Set{EndpointType: set})
			c := gather(b, feed, names)
			defer c.stop()
			var cpu time.Duration
			n := 0
			for b.Loop() {
				b.StopTimer() // what a translation would do: put the changed one in
				n++
				r := assignment(n%services, n)
				if r.Version == set.Get(r.Name).Version {
					r = assignment(n%services, n+1)
				}
				set = set.With(r)
				c.sent.Add(benchClients)
				before := cpuTime()
				b.StartTimer()
				feed.replace(Set{EndpointType: set})
				c.sent.Wait()
				cpu += cpuTime() - before
			}
			b.ReportMetric(float64(cpu.Microseconds())/float64(n), "cpu-µs/op")
		})
	}
}

// BenchmarkConnect has 100 equal clients connect and take 1,000 services.
func BenchmarkConnect(b *testing.B) {
	all := map[string]*Resource{}
	var names []string
	for i := range 1_000 {
		r := assignment(i, 0)
		all[r.Name] = r
		names = append(names, r.Name)
	}
	cpu, n := cpuTime(), 0
	for b.Loop() {
		n++
		gather(b, newMemory(Set{EndpointType: NamedOf(all)}), names).stop()
	}
	b.ReportMetric(float64((cpuTime()-cpu).Milliseconds())/float64(n), "cpu-ms/op")
}

// BenchmarkDiff compares two sets of 10,000 resources that differ in one.
func BenchmarkDiff(b *testing.B) {
	all := map[string]*Resource{}
	for i := range 10_000 {
		r := assignment(i, 0)
		all[r.Name] = r
	}
	before := NamedOf(all)
	after := before.With(assignment(7, 1))
	for b.Loop() {
		if len(diff(before, after)) != 1 {
			b.Fatal("not one difference")
		}
	}
}

// replace publishes without comparing: the benchmark measures the server's own comparison.
func (m *memory) replace(set Set) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.set = set
	close(m.outdated)
	m.outdated = make(chan struct{})
}

func cpuTime() time.Duration {
	var u syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &u); err != nil {
		return 0
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}
