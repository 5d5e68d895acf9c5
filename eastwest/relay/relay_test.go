package relay

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"io"
	"net"
	"net/netip"
	"os"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	clusterv3 "github.com/envoyproxy/go-control-plane/envoy/config/cluster/v3"
	listenerv3 "github.com/envoyproxy/go-control-plane/envoy/config/listener/v3"
	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"
	"go.uber.org/goleak"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/isthmus-mesh/isthmus/discovery/mesh"
	"github.com/isthmus-mesh/isthmus/eastwest/gateway"
	"github.com/isthmus-mesh/isthmus/eastwest/gateway/gatewaytest"
	"github.com/isthmus-mesh/isthmus/internal/diag"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// running is a Relay under test.
type running struct {
	*Relay
	reg  *prometheus.Registry
	stop func() error // ends Run and gives what it returned
	addr string
}

func start(t *testing.T, cfg Config) *running {
	t.Helper()
	reg := prometheus.NewRegistry()
	cfg.Reg = reg
	if cfg.Listen == "" {
		cfg.Listen = "127.0.0.1:0"
	}
	r := &running{Relay: New(cfg), reg: reg}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- r.Run(ctx) }()
	r.stop = sync.OnceValue(func() error {
		cancel()
		return <-done
	})
	t.Cleanup(func() {
		if err := r.stop(); err != nil {
			t.Errorf("Run: %v", err)
		}
	})
	gatewaytest.Eventually(t, "the relay listens", func() bool { return r.Addr().IsValid() })
	r.addr = r.Addr().String()
	return r
}

// whole feeds a relay with Update.
type whole struct{ *running }

func (w whole) Addr() string { return w.addr }

func (w whole) Update(t *testing.T, res gateway.Resources) {
	t.Helper()
	if err := w.Relay.Update(res.Listeners, res.Clusters); err != nil {
		t.Error(err)
	}
}

// deltas feeds a relay with Apply, as a delta stream would.
type deltas struct {
	*running
	sent map[string]map[string]proto.Message
}

func (d deltas) Addr() string { return d.addr }

func (d deltas) Update(t *testing.T, res gateway.Resources) {
	t.Helper()
	clusters, listeners := map[string]proto.Message{}, map[string]proto.Message{}
	for _, c := range res.Clusters {
		clusters[c.Name] = c
	}
	for _, l := range res.Listeners {
		listeners[l.Name] = l
	}
	d.send(t, ClusterType, clusters)
	d.send(t, ListenerType, listeners)
}

func (d deltas) send(t *testing.T, typeURL string, now map[string]proto.Message) {
	t.Helper()
	var added []*discoveryv3.Resource
	var removed []string
	for name, m := range now {
		if old, ok := d.sent[typeURL][name]; !ok || !proto.Equal(old, m) {
			added = append(added, resource(t, name, m))
		}
	}
	for name := range d.sent[typeURL] {
		if _, ok := now[name]; !ok {
			removed = append(removed, name)
		}
	}
	d.sent[typeURL] = now
	if err := d.Apply(typeURL, added, removed); err != nil {
		t.Error(err)
	}
}

func resource(t *testing.T, name string, m proto.Message) *discoveryv3.Resource {
	t.Helper()
	body, err := anypb.New(m)
	if err != nil {
		t.Fatal(err)
	}
	return &discoveryv3.Resource{Name: name, Resource: body}
}

// TestGateway puts the relay through what Envoy must do in eastwest/gateway.
func TestGateway(t *testing.T) {
	t.Run("whole", func(t *testing.T) {
		gatewaytest.Run(t, func(t *testing.T, res gateway.Resources) gatewaytest.Gateway {
			g := whole{start(t, Config{DrainTimeout: time.Millisecond})}
			g.Update(t, res)
			return g
		})
	})
	t.Run("deltas", func(t *testing.T) {
		gatewaytest.Run(t, func(t *testing.T, res gateway.Resources) gatewaytest.Gateway {
			g := deltas{start(t, Config{DrainTimeout: time.Millisecond}), map[string]map[string]proto.Message{}}
			g.Update(t, res)
			return g
		})
	})
}

// serving returns a relay whose control names lead to the given addresses.
func serving(t *testing.T, cfg Config, addrs ...netip.AddrPort) *running {
	t.Helper()
	r := start(t, cfg)
	res, _ := gateway.Translate(&mesh.Snapshot{Local: &mesh.Cluster{ID: "birch", TrustDomain: "birch.mesh", ControlPlane: addrs}})
	whole{r}.Update(t, res)
	return r
}

// listener returns a TCP listener and where it is.
func listener(t *testing.T) (*net.TCPListener, netip.AddrPort) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = l.Close() })
	return l.(*net.TCPListener), l.Addr().(*net.TCPAddr).AddrPort()
}

// pair opens a connection through the relay, with a ClientHello sent, and returns both ends. The server end has read
// the ClientHello.
func pair(t *testing.T, r *running, l *net.TCPListener) (client, server *net.TCPConn) {
	t.Helper()
	client = dial(t, r)
	record := clientHello(t, &tls.Config{ServerName: "join.birch.mesh"})
	if _, err := client.Write(record); err != nil {
		t.Fatal(err)
	}
	_ = l.SetDeadline(time.Now().Add(10 * time.Second))
	server, err := l.AcceptTCP()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = server.Close() })
	_ = server.SetDeadline(time.Now().Add(30 * time.Second))
	got := make([]byte, len(record))
	if _, err := io.ReadFull(server, got); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, record) {
		t.Fatal("the server got another ClientHello than the client sent")
	}
	return client, server
}

func dial(t *testing.T, r *running) *net.TCPConn {
	t.Helper()
	c, err := net.Dial("tcp", r.addr)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() })
	_ = c.SetDeadline(time.Now().Add(30 * time.Second))
	return c.(*net.TCPConn)
}

// ends fails the test unless the connection is closed by the other side.
func ends(t *testing.T, c net.Conn) {
	t.Helper()
	n, err := c.Read(make([]byte, 1))
	if n > 0 || err == nil || isTimeout(err) {
		t.Errorf("read %d octets, %v; want the connection closed", n, err)
	}
}

func (r *running) count(result string) float64 {
	return testutil.ToFloat64(r.metrics.connections.WithLabelValues(result))
}

func TestBulkBothWays(t *testing.T) {
	l, addr := listener(t)
	r := serving(t, Config{}, addr)
	client, server := pair(t, r, l)
	data := bytes.Repeat([]byte("0123456789abcdef"), 1<<20) // 16 MiB
	var wg sync.WaitGroup
	for _, way := range [][2]*net.TCPConn{{client, server}, {server, client}} {
		wg.Go(func() {
			if _, err := way[0].Write(data); err != nil {
				t.Error(err)
			}
			if err := way[0].CloseWrite(); err != nil {
				t.Error(err)
			}
		})
		wg.Go(func() {
			got, err := io.ReadAll(way[1])
			if err != nil || !bytes.Equal(got, data) {
				t.Errorf("got %d octets, %v; want %d", len(got), err, len(data))
			}
		})
	}
	wg.Wait()
	gatewaytest.Eventually(t, "the connection is gone", func() bool { return testutil.ToFloat64(r.metrics.open) == 0 })
	if got := testutil.ToFloat64(r.metrics.toServer); got != float64(len(data)) {
		t.Errorf("counted %v octets to the server, want %d", got, len(data))
	}
}

func TestSlowReader(t *testing.T) {
	l, addr := listener(t)
	r := serving(t, Config{}, addr)
	client, server := pair(t, r, l)
	data := bytes.Repeat([]byte("x"), 32<<20) // more than the sockets on the way hold
	var wg sync.WaitGroup
	wg.Go(func() {
		if _, err := client.Write(data); err != nil {
			t.Error(err)
		}
		_ = client.CloseWrite()
	})
	// The other direction goes on while this one is stuck.
	if _, err := io.WriteString(server, "ping"); err != nil {
		t.Fatal(err)
	}
	if _, err := io.ReadFull(client, make([]byte, 4)); err != nil {
		t.Fatal(err)
	}
	if n, err := io.Copy(io.Discard, server); err != nil || n != int64(len(data)) {
		t.Errorf("got %d octets, %v; want %d", n, err, len(data))
	}
	wg.Wait()
}

// TestIdleDescriptors checks that an idle connection holds its two sockets and nothing else, whatever it carried.
func TestIdleDescriptors(t *testing.T) {
	l, addr := listener(t)
	r := serving(t, Config{}, addr)
	before := descriptors(t)
	const n = 50
	for range n {
		client, server := pair(t, r, l)
		for _, way := range [][2]*net.TCPConn{{client, server}, {server, client}} {
			if _, err := way[0].Write([]byte("x")); err != nil {
				t.Fatal(err)
			}
			if _, err := way[1].Read(make([]byte, 1)); err != nil {
				t.Fatal(err)
			}
		}
	}
	gatewaytest.Eventually(t, "pipes are given back", func() bool {
		runtime.GC()                          // the pool lets go of pipes that are not in use
		return descriptors(t) <= before+4*n+8 // the test holds two sockets of each connection, too
	})
}

func descriptors(t *testing.T) int {
	t.Helper()
	all, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(all)
}

func TestCopyWithoutPipes(t *testing.T) {
	l, addr := listener(t)
	from, err := net.Dial("tcp", addr.String())
	if err != nil {
		t.Fatal(err)
	}
	defer from.Close()
	src, err := l.AcceptTCP()
	if err != nil {
		t.Fatal(err)
	}
	defer src.Close()
	to, err := net.Dial("tcp", addr.String())
	if err != nil {
		t.Fatal(err)
	}
	defer to.Close()
	dst, err := l.AcceptTCP()
	if err != nil {
		t.Fatal(err)
	}
	go func() { _, _ = io.WriteString(from, "hello"); _ = from.(*net.TCPConn).CloseWrite() }()
	total := 0
	if err := (&pipes{}).copy(dst, src, func(n int) { total += n }); err != nil || total != 5 {
		t.Errorf("moved %d octets, %v", total, err)
	}
	_ = dst.Close()
	if got, err := io.ReadAll(to); err != nil || string(got) != "hello" {
		t.Errorf("got %q, %v", got, err)
	}
}

func TestServerResets(t *testing.T) {
	l, addr := listener(t)
	r := serving(t, Config{}, addr)
	client, server := pair(t, r, l)
	_ = server.SetLinger(0)
	_ = server.Close()
	ends(t, client)
	gatewaytest.Eventually(t, "the connection is gone", func() bool { return testutil.ToFloat64(r.metrics.open) == 0 })
}

func TestNextAddress(t *testing.T) {
	gone, dead := listener(t)
	_ = gone.Close()
	l, addr := listener(t)
	r := serving(t, Config{}, dead, addr)
	for range 4 {
		pair(t, r, l)
	}
	if got := testutil.ToFloat64(r.metrics.dialFailures); got != 2 {
		t.Errorf("%v failed dials for 4 connections by turns, want 2", got)
	}
	none := serving(t, Config{}, dead)
	c := dial(t, none)
	_, _ = c.Write(clientHello(t, &tls.Config{ServerName: "join.birch.mesh"}))
	ends(t, c)
	if none.count(resultUnreachable) != 1 {
		t.Error("not counted as unreachable")
	}
}

func TestNoAddress(t *testing.T) {
	r := serving(t, Config{})
	c := dial(t, r)
	_, _ = c.Write(clientHello(t, &tls.Config{ServerName: "join.birch.mesh"}))
	ends(t, c)
	if r.count(resultNoAddress) != 1 {
		t.Error("not counted as without address")
	}
}

func TestHelloTimeout(t *testing.T) {
	_, addr := listener(t)
	r := serving(t, Config{HelloTimeout: 20 * time.Millisecond}, addr)
	record := clientHello(t, &tls.Config{ServerName: "join.birch.mesh"})
	for _, part := range [][]byte{nil, record[:3], record[:len(record)-1]} {
		c := dial(t, r)
		_, _ = c.Write(part)
		ends(t, c)
	}
	if got := r.count(resultTimeout); got != 3 {
		t.Errorf("%v counted, want 3", got)
	}
}

func TestConnectionLimit(t *testing.T) {
	l, addr := listener(t)
	r := serving(t, Config{MaxConnections: 1}, addr)
	client, server := pair(t, r, l)
	if c, err := net.Dial("tcp", r.addr); err == nil { // the reset may already be seen here
		_ = c.SetDeadline(time.Now().Add(30 * time.Second))
		ends(t, c)
		_ = c.Close()
	}
	if got := r.count(resultOverLimit); got != 1 {
		t.Errorf("%v counted over the limit, want 1", got)
	}
	_ = client.Close()
	_ = server.Close()
	gatewaytest.Eventually(t, "the place is free", func() bool { return testutil.ToFloat64(r.metrics.open) == 0 })
	pair(t, r, l)
}

func TestIdleTimeout(t *testing.T) {
	l, addr := listener(t)
	r := serving(t, Config{IdleTimeout: 200 * time.Millisecond}, addr)
	client, server := pair(t, r, l)
	began := time.Now()
	for time.Since(began) < 600*time.Millisecond { // traffic keeps it open
		if _, err := server.Write([]byte("x")); err != nil {
			t.Fatal(err)
		}
		if _, err := client.Read(make([]byte, 1)); err != nil {
			t.Fatal(err)
		}
	}
	ends(t, client)
	gatewaytest.Eventually(t, "it is counted", func() bool { return testutil.ToFloat64(r.metrics.idleClosed) == 1 })
}

func TestDrain(t *testing.T) {
	l, addr := listener(t)
	t.Run("ends in time", func(t *testing.T) {
		r := serving(t, Config{DrainTimeout: time.Minute}, addr)
		client, server := pair(t, r, l)
		ended := make(chan error, 1)
		go func() { ended <- r.stop() }()
		gatewaytest.Eventually(t, "the relay is not ready", func() bool { return !r.Ready() })
		if _, err := server.Write([]byte("x")); err != nil {
			t.Fatal(err)
		}
		if _, err := client.Read(make([]byte, 1)); err != nil {
			t.Errorf("the open connection ended while draining: %v", err)
		}
		_ = client.Close()
		_ = server.Close()
		if err := <-ended; err != nil {
			t.Error(err)
		}
		if _, err := net.Dial("tcp", r.addr); err == nil {
			t.Error("it still listens")
		}
	})
	t.Run("takes too long", func(t *testing.T) {
		r := serving(t, Config{DrainTimeout: 10 * time.Millisecond}, addr)
		client, _ := pair(t, r, l)
		if err := r.stop(); err != nil {
			t.Error(err)
		}
		ends(t, client)
	})
}

func TestPortInUse(t *testing.T) {
	_, addr := listener(t)
	err := New(Config{Listen: addr.String()}).Run(t.Context())
	if err == nil || !strings.Contains(err.Error(), addr.String()) || diag.HintOf(err) == "" {
		t.Errorf("got %v with hint %q; want an error that names the address and the remedy", err, diag.HintOf(err))
	}
}

func TestReady(t *testing.T) {
	r := start(t, Config{})
	if r.Ready() {
		t.Error("ready without routes")
	}
	if err := r.Apply(ClusterType, nil, nil); err != nil || r.Ready() {
		t.Errorf("ready with clusters only, %v", err)
	}
	if err := r.Apply(ListenerType, nil, nil); err != nil || !r.Ready() {
		t.Errorf("not ready with both, %v", err)
	}
}

func TestApplyKeepsGoing(t *testing.T) {
	r := New(Config{})
	res, _ := gateway.Translate(&mesh.Snapshot{Local: &mesh.Cluster{ID: "b", TrustDomain: "b.mesh",
		ControlPlane: []netip.AddrPort{netip.MustParseAddrPort("10.0.0.1:1")}}})
	bad := &clusterv3.Cluster{Name: "bad", ClusterDiscoveryType: &clusterv3.Cluster_Type{Type: clusterv3.Cluster_EDS}}
	err := r.Apply(ClusterType, []*discoveryv3.Resource{resource(t, "bad", bad), resource(t, "control-plane", res.Clusters[0])}, nil)
	if err == nil || !strings.Contains(err.Error(), "cluster bad") {
		t.Errorf("got %v, want an error that names the cluster", err)
	}
	if err := r.Apply(ListenerType, []*discoveryv3.Resource{resource(t, "eastwest", res.Listeners[0])}, nil); err != nil {
		t.Error(err)
	}
	other := &listenerv3.Listener{Name: "other", DefaultFilterChain: &listenerv3.FilterChain{}}
	if err := r.Apply(ListenerType, []*discoveryv3.Resource{resource(t, "other", other)}, nil); err != nil {
		t.Errorf("a listener of another name: %v", err)
	}
	if addrs, ok := r.Lookup("join.b.mesh"); !ok || len(addrs) != 1 {
		t.Errorf("join.b.mesh leads to %v, %v", addrs, ok)
	}
	broken := proto.Clone(res.Listeners[0]).(*listenerv3.Listener)
	broken.DefaultFilterChain = &listenerv3.FilterChain{}
	if err := r.Update([]*listenerv3.Listener{broken}, nil); err == nil {
		t.Error("a default chain was taken")
	}
	if _, ok := r.Lookup("join.b.mesh"); !ok {
		t.Error("a refused update took the routes away")
	}
	if err := r.Apply(ListenerType, nil, []string{"eastwest"}); err != nil {
		t.Error(err)
	}
	if _, ok := r.Lookup("join.b.mesh"); ok {
		t.Error("the route outlived its listener")
	}
}

func TestMetricNames(t *testing.T) {
	r := start(t, Config{})
	problems, err := testutil.GatherAndLint(r.reg)
	if err != nil || len(problems) > 0 {
		t.Errorf("%v, %v", problems, err)
	}
	families, err := r.reg.Gather()
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range families {
		if !strings.HasPrefix(f.GetName(), "isthmus_relay_") {
			t.Errorf("metric %s has not the prefix isthmus_relay_", f.GetName())
		}
	}
}

// errStop ends a handshake once the server has seen the ClientHello.
var errStop = errors.New("stop")
