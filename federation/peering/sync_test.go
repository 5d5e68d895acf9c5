package peering

import (
	"context"
	"crypto/ed25519"
	"crypto/tls"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"

	"github.com/isthmus-mesh/isthmus/discovery/mesh"
	"github.com/isthmus-mesh/isthmus/discovery/xds"
	"github.com/isthmus-mesh/isthmus/federation/protocol"
	"github.com/isthmus-mesh/isthmus/federation/trust"
)

// snapshots is what a cluster exports, changed by tests.
type snapshots struct {
	mu      sync.Mutex
	snap    *mesh.Snapshot
	changed chan struct{}
}

// Latest implements mesh.Snapshots.
func (s *snapshots) Latest() (*mesh.Snapshot, <-chan struct{}) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.snap, s.changed
}

// edit publishes a copy of the snapshot in which these services are changed.
func (s *snapshots) edit(change func(*mesh.Service), indexes ...int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	next := &mesh.Snapshot{Revision: s.snap.Revision + 1, Local: s.snap.Local, Services: append([]*mesh.Service{}, s.snap.Services...)}
	for _, i := range indexes {
		svc := *next.Services[i]
		svc.Endpoints = append([]*mesh.Endpoint{}, svc.Endpoints...)
		e := *svc.Endpoints[0]
		svc.Endpoints[0] = &e
		change(&svc)
		next.Services[i] = &svc
	}
	s.snap = next
	close(s.changed)
	s.changed = make(chan struct{})
}

// persists counts records kept.
type persists struct {
	disk
	n atomic.Int64
}

// Commit implements Log.
func (p *persists) Commit(actions []protocol.Action) error {
	for _, a := range actions {
		if _, ok := a.(protocol.Persist); ok {
			p.n.Add(1)
		}
	}
	return nil
}

// cluster is a whole end of a record stream: core, peering, server and TLS.
type cluster struct {
	*Peering
	name, gateway, addr string
	snaps               *snapshots
	store               *store
	log                 *persists
	bundles             trust.Bundles
	in, out             atomic.Int64 // bytes on the connections that it dialled
	cut                 atomic.Bool
	mu                  sync.Mutex
	conns               []net.Conn
}

// counted counts the bytes of a connection.
type counted struct {
	net.Conn
	c *cluster
}

// Read implements net.Conn.
func (c counted) Read(b []byte) (int, error) {
	n, err := c.Conn.Read(b)
	c.c.in.Add(int64(n))
	return n, err
}

// Write implements net.Conn.
func (c counted) Write(b []byte) (int, error) {
	n, err := c.Conn.Write(b)
	c.c.out.Add(int64(n))
	return n, err
}

// sever cuts what the cluster dialled, and lets it dial again or not.
func (c *cluster) sever(cut bool) {
	c.cut.Store(cut)
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, conn := range c.conns {
		conn.Close()
	}
	c.conns = nil
}

// world of services: as Kubernetes names things.
func exports(name string, services, endpoints int) *snapshots {
	local := &mesh.Cluster{ID: mesh.ClusterID(name), TrustDomain: mesh.TrustDomain(name + ".mesh"), Network: mesh.NetworkID(name)}
	snap := &mesh.Snapshot{Local: local}
	for i := range services {
		svc := &mesh.Service{
			Host: fmt.Sprintf("svc-%05d.ns-%03d.svc.cluster.local", i, i%100), Name: fmt.Sprintf("svc-%05d", i), Namespace: fmt.Sprintf("ns-%03d", i%100), Exported: true,
			Ports: []mesh.Port{{Name: "http", Number: 80, Protocol: mesh.HTTP}},
		}
		for k := range endpoints {
			n := i*endpoints + k
			svc.Endpoints = append(svc.Endpoints, &mesh.Endpoint{
				Workload: fmt.Sprintf("%s-%x-%05x", svc.Name, uint32(i*2654435761), n*7919&0xfffff), Namespace: svc.Namespace, Cluster: local.ID, Network: local.Network,
				Address: netip.AddrFrom4([4]byte{10, byte(n >> 16), byte(n >> 8), byte(n)}).String(), Ports: map[uint32]uint32{80: 8080},
				Labels: map[string]string{"app": svc.Name, "version": "v1"}, Identity: "spiffe://" + name + ".mesh/ns/" + svc.Namespace + "/sa/" + svc.Name,
				Locality: "eu-west-1/b", TLS: true, Ready: true, Weight: 1,
			})
		}
		snap.Services = append(snap.Services, svc)
	}
	return &snapshots{snap: snap, changed: make(chan struct{})}
}

// endOf starts a cluster; the others are found by their gateways.
func endOf(t testing.TB, name, gateway string, snaps *snapshots, all map[string]*cluster) *cluster {
	t.Helper()
	ca := newAuthority(t, name)
	cert := ca.leaf(t, name, nil)
	own := func() (*tls.Certificate, error) { return cert, nil }
	c := &cluster{name: name, gateway: gateway, snaps: snaps, store: &store{inputs: map[string]mesh.Input{}}, log: &persists{}}
	local := snaps.snap.Local
	local.Gateways, local.Roots = []netip.AddrPort{netip.MustParseAddrPort(gateway)}, ca.pem
	var roots = func(r map[mesh.TrustDomain][]byte) {
		all := map[mesh.TrustDomain][]byte{local.TrustDomain: ca.pem}
		for td, pem := range r {
			all[td] = pem
		}
		_ = c.bundles.Set(all)
	}
	var err error
	c.Peering, err = New(Config{
		Core: protocol.Config{
			Name: local.ID, TrustDomain: local.TrustDomain, PublicKey: public(name), Sign: func(msg []byte) []byte { return ed25519.Sign(signer(name), msg) }, Beat: 1000, Seed: 1,
		},
		Log: c.log, Local: local, Snapshots: snaps, Sink: c.store, Trust: roots,
		TLS: func(td mesh.TrustDomain) *tls.Config {
			return trust.ClientConfig(trust.Config{Local: own, Bundles: &c.bundles, Authorize: trust.Exactly("spiffe://" + string(td) + "/isthmus/peer")})
		},
		Dial: func(ctx context.Context, addr string) (net.Conn, error) {
			to := all[addr]
			if to == nil || c.cut.Load() || to.cut.Load() {
				return nil, fmt.Errorf("%s is out of reach", addr)
			}
			conn, err := (&net.Dialer{}).DialContext(ctx, "tcp", to.addr)
			if err != nil {
				return nil, err
			}
			c.mu.Lock()
			c.conns = append(c.conns, conn)
			c.mu.Unlock()
			return counted{conn, c}, nil
		},
		Logger: slog.New(slog.DiscardHandler), Reg: prometheus.NewRegistry(),
	})
	if err != nil {
		t.Fatal(err)
	}
	serverTLS := trust.ServerConfig(trust.Config{Local: own, Bundles: &c.bundles, Authorize: trust.Path("/isthmus/peer")})
	serverTLS.NextProtos = []string{"h2"}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	c.addr = l.Addr().String()
	server := xds.New(xds.Config{
		Feed: func(x xds.Client) (xds.Feed, func(), error) {
			f, err := c.Feed(mesh.TrustDomain(strings.TrimPrefix(x.Node.GetId(), "peer~") + ".mesh"))
			return f, nil, err
		}, Reg: prometheus.NewRegistry(),
	})
	g := grpc.NewServer(grpc.Creds(credentials.NewTLS(serverTLS)), grpc.MaxRecvMsgSize(xds.MaxRequestBytes))
	server.Register(g)
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	wg.Go(func() { _ = g.Serve(l) })
	wg.Go(func() {
		if err := c.Run(ctx); err != nil {
			t.Error(err)
		}
	})
	t.Cleanup(func() { cancel(); g.Stop(); wg.Wait() })
	all[gateway] = c
	return c
}

// join lets a cluster in by another one.
func (c *cluster) join(t testing.TB, issuer *cluster) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	defer cancel()
	own, err := c.OwnRecord(ctx)
	if err != nil {
		t.Fatal(err)
	}
	local := c.snaps.snap.Local
	records, _, err := issuer.Admit(ctx, memberOf(c.name, local.TrustDomain), own, false)
	if err != nil {
		t.Fatal(err)
	}
	if err := c.Joined(ctx, records); err != nil {
		t.Fatal(err)
	}
}

// knows reports how many services and endpoint records of another cluster are held.
func (c *cluster) knows(name string) (services, endpoints int) {
	for _, p := range c.Status().Peers {
		if string(p.Name) == name {
			return p.Services, p.Endpoints
		}
	}
	return 0, 0
}

// locality of the first endpoint of a service, as another cluster has it.
func (c *cluster) localityOf(origin string, service int) string {
	in := c.store.input(origin)
	if service >= len(in.Imports) {
		return ""
	}
	for _, i := range in.Imports {
		if i.Name == fmt.Sprintf("svc-%05d", service) && len(i.Endpoints) > 0 {
			for _, e := range i.Endpoints {
				if e.Locality != "eu-west-1/b" {
					return e.Locality
				}
			}
		}
	}
	return ""
}

// figures are what TestSync measures.
type figures struct {
	services, endpoints      int
	joinTime                 time.Duration
	joinIn, joinOut          int64
	idle                     float64 // bytes a second, both streams, both ways
	change                   []time.Duration
	changeBytes              int64
	changes                  int
	reconnectTime            time.Duration
	reconnectIn, reconnectUp int64
	reconnectRecords         int64
}

// measure joins two clusters, of which one exports, and measures what passes between them.
func measure(t testing.TB, services, endpoints int, idle time.Duration, changes int) figures {
	all := map[string]*cluster{}
	birch := endOf(t, "birch", "192.0.2.2:15443", exports("birch", services, endpoints), all)
	amber := endOf(t, "amber", "192.0.2.1:15443", exports("amber", 0, 0), all)
	f := figures{services: services, endpoints: services * endpoints, changes: changes}
	wait := func(what string, ok func() bool) time.Duration {
		t.Helper()
		begin := time.Now()
		for !ok() {
			if time.Since(begin) > 3*time.Minute {
				t.Fatalf("not within 3 min: %s", what)
			}
			time.Sleep(time.Millisecond) // between polls of the condition
		}
		return time.Since(begin)
	}
	wait("birch has said what it exports", func() bool { return birch.log.n.Load() > int64(2*services) })
	birch.join(t, amber)
	f.joinTime = wait("amber holds it all", func() bool {
		s, e := amber.knows("birch")
		return s == services && e == services && count(amber.store.input("birch")) == services*endpoints
	})
	f.joinIn, f.joinOut = amber.in.Load(), amber.out.Load()

	time.Sleep(2 * time.Second) // until what was under way has come
	before := amber.in.Load() + amber.out.Load() + birch.in.Load() + birch.out.Load()
	time.Sleep(idle)
	f.idle = float64(amber.in.Load()+amber.out.Load()+birch.in.Load()+birch.out.Load()-before) / idle.Seconds()

	before = amber.in.Load() + amber.out.Load()
	for i := range 10 {
		where, at := fmt.Sprint("zone-", i), i*services/10
		birch.snaps.edit(func(s *mesh.Service) { s.Endpoints[0].Locality = where }, at)
		f.change = append(f.change, wait("a change", func() bool { return amber.localityOf("birch", at) == where }))
	}
	f.changeBytes = (amber.in.Load() + amber.out.Load() - before) / 10

	amber.sever(true)
	birch.sever(true)
	time.Sleep(500 * time.Millisecond)
	var indexes []int
	for i := range changes {
		indexes = append(indexes, i*services/changes)
	}
	birch.snaps.edit(func(s *mesh.Service) { s.Endpoints[0].Locality = "after" }, indexes...)
	time.Sleep(2 * time.Second)
	in, out, kept := amber.in.Load(), amber.out.Load(), amber.log.n.Load()
	amber.sever(false)
	birch.sever(false)
	f.reconnectTime = wait("what changed in between", func() bool {
		return amber.localityOf("birch", indexes[0]) == "after" && amber.localityOf("birch", indexes[len(indexes)-1]) == "after"
	})
	f.reconnectIn, f.reconnectUp, f.reconnectRecords = amber.in.Load()-in, amber.out.Load()-out, amber.log.n.Load()-kept
	return f
}

// write prints the figures as a table.
func (f figures) write(w io.Writer) {
	var sum, most time.Duration
	for _, d := range f.change {
		sum, most = sum+d, max(most, d)
	}
	fmt.Fprintf(w, "%d services, %d endpoints, two clusters in one process over TLS on loopback\n\n", f.services, f.endpoints)
	fmt.Fprintf(w, "join: received          %10d bytes   target 2,000,000\n", f.joinIn)
	fmt.Fprintf(w, "join: sent              %10d bytes\n", f.joinOut)
	fmt.Fprintf(w, "join: until in use      %10d ms\n", f.joinTime.Milliseconds())
	fmt.Fprintf(w, "idle, both ways         %10.0f bytes/s target 200\n", f.idle)
	fmt.Fprintf(w, "one change: bytes       %10d\n", f.changeBytes)
	fmt.Fprintf(w, "one change: mean        %10d ms   most %d ms\n", (sum / time.Duration(len(f.change))).Milliseconds(), most.Milliseconds())
	fmt.Fprintf(w, "reconnect, %4d changed: records %d, ratio %.2f   target 1.30\n", f.changes, f.reconnectRecords, float64(f.reconnectRecords)/float64(f.changes))
	fmt.Fprintf(w, "reconnect: received     %10d bytes, sent %d\n", f.reconnectIn, f.reconnectUp)
	fmt.Fprintf(w, "reconnect: until in use %10d ms\n", f.reconnectTime.Milliseconds())
}

// TestSync: a join brings everything once, a reconnection what changed, and a change is one record. BENCH_SYNC=file
// measures it with 10,000 services of ten endpoints, and writes the figures there.
func TestSync(t *testing.T) {
	if path := os.Getenv("BENCH_SYNC"); path != "" {
		f := measure(t, 10_000, 10, 10*time.Second, 100)
		out, err := os.Create(path)
		if err != nil {
			t.Fatal(err)
		}
		defer out.Close()
		f.write(io.MultiWriter(out, os.Stdout))
		return
	}
	f := measure(t, 200, 5, time.Second, 20)
	var b strings.Builder
	f.write(&b)
	t.Logf("\n%s", b.String())
	if f.reconnectRecords > 26 {
		t.Errorf("%d records came for 20 changes", f.reconnectRecords)
	}
	if f.joinIn > 400_000 {
		t.Errorf("a join of 200 services took %d bytes", f.joinIn)
	}
}
