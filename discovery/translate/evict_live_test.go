package translate_test

import (
	"bufio"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	clusterv3 "github.com/envoyproxy/go-control-plane/envoy/config/cluster/v3"
	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	endpointv3 "github.com/envoyproxy/go-control-plane/envoy/config/endpoint/v3"
	listenerv3 "github.com/envoyproxy/go-control-plane/envoy/config/listener/v3"
	tlsv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/tls/v3"
	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	secretv3 "github.com/envoyproxy/go-control-plane/envoy/service/secret/v3"
	"google.golang.org/grpc"

	"github.com/isthmus-mesh/isthmus/discovery/mesh"
	"github.com/isthmus-mesh/isthmus/discovery/translate"
	"github.com/isthmus-mesh/isthmus/internal/envoytest"
)

// served is a workload of amber with an exported HTTP and TCP port and a TCP port of its own cluster, behind an Envoy that
// drains as the agent has it drain.
type served struct {
	amber, birch, cedar *authority
	roots               []byte // of amber, as they are told
	cert                *tlsv3.Secret
	evictions           string
	http, tcp, own      uint32
	appAt, echoAt       uint32
	cp                  *changing
}

const servedID, amberCaller, birchCaller, cedarCaller = "spiffe://amber.mesh/ns/default/sa/bookstore", "spiffe://amber.mesh/ns/default/sa/caller",
	"spiffe://birch.mesh/ns/default/sa/caller", "spiffe://cedar.mesh/ns/default/sa/caller"

func startServed(t *testing.T) *served {
	t.Helper()
	w := &served{amber: newAuthority(t), birch: newAuthority(t), cedar: newAuthority(t), http: freePort(t), tcp: freePort(t), own: freePort(t), cp: &changing{}}
	w.roots, w.cert = w.amber.pem, certificateSecret(w.amber.issue(t, servedID))
	app := &http.Server{Protocols: new(http.Protocols), Handler: http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
		io.WriteString(rw, "ok")
		for tick := time.NewTicker(50 * time.Millisecond); r.URL.Path == "/stream"; {
			if err := http.NewResponseController(rw).Flush(); err != nil {
				return
			}
			select {
			case <-r.Context().Done():
				return
			case <-tick.C:
				io.WriteString(rw, ".")
			}
		}
	})}
	app.Protocols.SetHTTP1(true)
	app.Protocols.SetUnencryptedHTTP2(true)
	l, echo := listen(t), listen(t)
	go app.Serve(l)
	t.Cleanup(func() { app.Close() })
	go func() {
		for c, err := echo.Accept(); err == nil; c, err = echo.Accept() {
			go func() { defer c.Close(); io.Copy(c, c) }()
		}
	}()
	w.appAt, w.echoAt = uint32(l.Addr().(*net.TCPAddr).Port), uint32(echo.Addr().(*net.TCPAddr).Port)
	w.publish(t)
	at := listen(t)
	g := grpc.NewServer()
	discoveryv3.RegisterAggregatedDiscoveryServiceServer(g, w.cp)
	secretv3.RegisterSecretDiscoveryServiceServer(g, w.cp)
	go g.Serve(at)
	t.Cleanup(g.Stop)
	startEnvoy(t, at.Addr().String(), "--drain-time-s", "8", "--drain-strategy", "immediate")
	t.Cleanup(func() {
		w.cp.mu.Lock()
		defer w.cp.mu.Unlock()
		if len(w.cp.nacks) > 0 {
			t.Errorf("envoy refused: %s", strings.Join(w.cp.nacks, "\n"))
		}
	})
	eventually(t, "first answer", func() error { return w.once(w.birch.pair(t, birchCaller)) })
	return w
}

// publish serves what the fields say. Without cedar's authority there is no cedar.
func (w *served) publish(t *testing.T) {
	t.Helper()
	snap := bookstore()
	snap.Local.Roots, snap.Local.Evictions, snap.Local.Network = w.roots, w.evictions, mesh.NetworkID(snap.Local.ID)
	snap.Clusters[1].Roots = w.birch.pem
	if snap.Clusters = snap.Clusters[:2]; w.cedar != nil {
		snap.Clusters = append(snap.Clusters, &mesh.Cluster{ID: "cedar", TrustDomain: "cedar.mesh", Network: "net-c", Roots: w.cedar.pem})
	}
	snap.DestinationRules, snap.VirtualServices = nil, nil
	snap.PeerAuthentications[0].Spec.PortLevelMtls, snap.PeerAuthentications[0].Spec.Mtls = nil, nil // the mesh's STRICT counts
	self := snap.Service("productpage.default.svc.cluster.local")
	own := *self
	own.Name, own.Host, own.VIPs = "own", mesh.LocalHost("own", "default"), addrs("10.96.0.99")
	own.Ports = []mesh.Port{{Name: "own", Number: w.own, Protocol: mesh.TCP}}
	self.Exported, self.Ports = true, []mesh.Port{{Name: "http", Number: w.http, Protocol: mesh.HTTP}, {Name: "tcp", Number: w.tcp, Protocol: mesh.TCP}}
	snap.Services = sortedByHost(append(slices.Clone(snap.Services), &own)...)

	r, _ := translate.Translate(snap, proxies()["sidecar"])
	for number, at := range map[uint32]uint32{w.http: w.appAt, w.tcp: w.echoAt, w.own: w.echoAt} { // nothing redirects here
		i := slices.IndexFunc(r.Clusters, func(c *clusterv3.Cluster) bool { return strings.HasPrefix(c.Name, fmt.Sprintf("inbound|%d|", number)) })
		if i < 0 {
			t.Fatalf("no cluster of port %d", number)
		}
		c := r.Clusters[i]
		c.ClusterDiscoveryType, c.LbPolicy = &clusterv3.Cluster_Type{Type: clusterv3.Cluster_STATIC}, clusterv3.Cluster_ROUND_ROBIN
		c.LoadAssignment = &endpointv3.ClusterLoadAssignment{ClusterName: c.Name, Endpoints: []*endpointv3.LocalityLbEndpoints{{
			LbEndpoints: []*endpointv3.LbEndpoint{{HostIdentifier: &endpointv3.LbEndpoint_Endpoint{Endpoint: &endpointv3.Endpoint{Address: loopback(at)}}}},
		}}}
	}
	r = bindAt(r, map[string]uint32{"virtualInbound": w.http})
	for _, l := range r.Listeners {
		if l.Name == "virtualInbound" {
			l.AdditionalAddresses = []*listenerv3.AdditionalAddress{{Address: loopback(w.tcp)}, {Address: loopback(w.own)}}
		}
	}
	r.Secrets = append(r.Secrets, w.cert)
	w.cp.put(t, r)
}

func loopback(port uint32) *corev3.Address {
	return &corev3.Address{Address: &corev3.Address_SocketAddress{SocketAddress: &corev3.SocketAddress{
		Address: "127.0.0.1", PortSpecifier: &corev3.SocketAddress_PortValue{PortValue: port},
	}}}
}

// pair is a workload's certificate.
func (a *authority) pair(t *testing.T, id string) *tls.Certificate {
	t.Helper()
	cert, key := a.issue(t, id)
	pair, err := tls.X509KeyPair(cert, key)
	if err != nil {
		t.Fatal(err)
	}
	return &pair
}

// meshClient is TLS as mesh clients speak it. Whom they call is not looked at.
func meshClient(pair *tls.Certificate, alpn ...string) *tls.Config {
	return &tls.Config{InsecureSkipVerify: true, Certificates: []tls.Certificate{*pair}, NextProtos: append([]string{"istio"}, alpn...), MinVersion: tls.VersionTLS13}
}

func dialMesh(cfg *tls.Config, port uint32) (*tls.Conn, error) {
	return tls.DialWithDialer(&net.Dialer{Timeout: 5 * time.Second}, "tcp", fmt.Sprintf("127.0.0.1:%d", port), cfg)
}

// ask has a request answered over a connection that stays open.
func ask(c net.Conn) error {
	c.SetDeadline(time.Now().Add(5 * time.Second))
	defer c.SetDeadline(time.Time{})
	if _, err := io.WriteString(c, "GET / HTTP/1.1\r\nHost: app\r\n\r\n"); err != nil {
		return err
	}
	resp, err := http.ReadResponse(bufio.NewReader(c), nil)
	if err != nil {
		return err
	}
	if body, err := io.ReadAll(resp.Body); err != nil || string(body) != "ok" {
		return fmt.Errorf("%s %q %v", resp.Status, body, err)
	}
	return nil
}

// once has a request answered over a connection of its own.
func (w *served) once(pair *tls.Certificate) error {
	c, err := dialMesh(meshClient(pair, "http/1.1"), w.http)
	if err != nil {
		return err
	}
	defer c.Close()
	return ask(c)
}

// pass sends bytes over a connection and waits for them to come back.
func pass(c net.Conn) error {
	c.SetDeadline(time.Now().Add(5 * time.Second))
	defer c.SetDeadline(time.Time{})
	if _, err := io.WriteString(c, "hello"); err != nil {
		return err
	}
	got := make([]byte, 5)
	if _, err := io.ReadFull(c, got); err != nil || string(got) != "hello" {
		return fmt.Errorf("%q came back: %w", got, err)
	}
	return nil
}

// openAfter reports whether nobody has closed the connection at that time.
func openAfter(c net.Conn, at time.Time) bool {
	c.SetReadDeadline(at)
	_, err := io.Copy(io.Discard, c)
	return errors.Is(err, os.ErrDeadlineExceeded)
}

// load sends requests at a fixed rate, whatever comes back.
type load struct {
	sent, failed atomic.Int64
	mu           sync.Mutex
	last         error
	wg           sync.WaitGroup
	stop         context.CancelFunc
}

// startLoad sends a hundred requests a second: over HTTP/1.1 that is kept open, over HTTP/2, and over a new connection.
// cfg is asked at each handshake.
func (w *served) startLoad(t *testing.T, cfg func(alpn string) *tls.Config) *load {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	l := &load{stop: cancel}
	var clients []*http.Client
	for _, x := range []*http.Transport{{MaxIdleConnsPerHost: 8}, {ForceAttemptHTTP2: true}, {DisableKeepAlives: true}} {
		alpn := "http/1.1"
		if x.ForceAttemptHTTP2 {
			alpn = "h2"
		}
		x.DialTLSContext = func(ctx context.Context, network, addr string) (net.Conn, error) {
			return (&tls.Dialer{Config: cfg(alpn)}).DialContext(ctx, network, addr)
		}
		t.Cleanup(x.CloseIdleConnections)
		clients = append(clients, &http.Client{Timeout: 10 * time.Second, Transport: x})
	}
	one := func(c *http.Client) error {
		resp, err := c.Get(fmt.Sprintf("https://127.0.0.1:%d/", w.http))
		if err != nil {
			return err
		}
		defer resp.Body.Close()
		if body, err := io.ReadAll(resp.Body); err != nil || string(body) != "ok" {
			return fmt.Errorf("%s %q %v", resp.Status, body, err)
		}
		return nil
	}
	l.wg.Go(func() {
		tick := time.NewTicker(10 * time.Millisecond)
		defer tick.Stop()
		for i := 0; ; i++ {
			select {
			case <-ctx.Done():
				return
			case <-tick.C:
			}
			l.wg.Go(func() {
				l.sent.Add(1)
				if err := one(clients[i%len(clients)]); err != nil {
					l.failed.Add(1)
					l.mu.Lock()
					defer l.mu.Unlock()
					l.last = err
				}
			})
		}
	})
	t.Cleanup(func() { cancel(); l.wg.Wait() })
	return l
}

// end stops the load and reports what was lost.
func (l *load) end(t *testing.T, what string) {
	t.Helper()
	l.stop()
	l.wg.Wait()
	sent, failed := l.sent.Load(), l.failed.Load()
	t.Logf("%s: %d requests, %d failed", what, sent, failed)
	if failed > 0 || sent < 100 {
		t.Errorf("%s: %d of %d requests failed: %v", what, failed, sent, l.last)
	}
}

// TestEnvoyEviction: what an evicted trust domain has open is closed within ten seconds, new handshakes of it are refused
// within two, also while it reconnects all the time, and others lose no request; nobody resumes a session.
func TestEnvoyEviction(t *testing.T) {
	envoytest.Path(t)
	w := startServed(t)
	testNoResumption(t, w)
	birch, cedar := w.birch.pair(t, birchCaller), w.cedar.pair(t, cedarCaller)
	idle, err := dialMesh(meshClient(cedar, "http/1.1"), w.http)
	if err != nil {
		t.Fatal(err)
	}
	defer idle.Close()
	raw, err := dialMesh(meshClient(cedar), w.tcp)
	if err != nil {
		t.Fatal(err)
	}
	defer raw.Close()
	inside, err := dialMesh(meshClient(w.amber.pair(t, amberCaller)), w.own)
	if err != nil {
		t.Fatal(err)
	}
	defer inside.Close()
	if err := errors.Join(ask(idle), pass(raw), pass(inside)); err != nil {
		t.Fatal(err)
	}
	stream := &http.Transport{ForceAttemptHTTP2: true, DialTLSContext: func(context.Context, string, string) (net.Conn, error) {
		return dialMesh(meshClient(cedar, "h2"), w.http)
	}}
	defer stream.CloseIdleConnections()
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	resp, err := stream.RoundTrip(mustRequest(t, fmt.Sprintf("https://127.0.0.1:%d/stream", w.http), "app").WithContext(ctx))
	if err != nil || resp.ProtoMajor != 2 {
		t.Fatalf("a stream over HTTP/2: %v %v", resp, err)
	}
	defer resp.Body.Close()
	if _, err := io.ReadFull(resp.Body, make([]byte, 5)); err != nil {
		t.Fatal(err)
	}
	ended := make(chan int64, 1)
	go func() { n, _ := io.Copy(io.Discard, resp.Body); ended <- n }()

	others := w.startLoad(t, func(alpn string) *tls.Config { return meshClient(birch, alpn) })
	var wg sync.WaitGroup
	var mu sync.Mutex
	var again []net.Conn // of those who reconnect all the time
	var last time.Time   // one of them was answered
	hammer, stop := context.WithCancel(t.Context())
	defer wg.Wait()
	defer stop()
	for range 2 {
		wg.Go(func() {
			for hammer.Err() == nil {
				c, err := dialMesh(meshClient(cedar, "http/1.1"), w.http)
				if err == nil {
					err = ask(c)
					mu.Lock()
					if again = append(again, c); err == nil {
						last = time.Now()
					}
					mu.Unlock()
				}
				time.Sleep(5 * time.Millisecond) // the pace
			}
		})
	}
	eventually(t, "some requests of each", func() error {
		mu.Lock()
		defer mu.Unlock()
		if n := others.sent.Load(); n < 50 || len(again) < 20 {
			return fmt.Errorf("%d and %d", n, len(again))
		}
		return nil
	})
	select {
	case n := <-ended:
		t.Fatalf("the stream ended before the eviction, after %d bytes", n)
	default:
	}

	w.cedar, w.evictions = nil, "1"
	began := time.Now()
	w.publish(t)
	limit := began.Add(10 * time.Second)
	time.Sleep(time.Until(began.Add(4 * time.Second))) // those who reconnect go on for twice the time that they may succeed
	stop()
	wg.Wait()
	if took := last.Sub(began); took > 2*time.Second {
		t.Errorf("a new connection of the evicted was answered %s after the eviction", took)
	}
	if err := w.once(cedar); err == nil {
		t.Error("a new connection of the evicted is answered")
	}
	if openAfter(idle, limit) {
		t.Error("an idle HTTP/1.1 connection of the evicted is open after ten seconds")
	}
	if openAfter(raw, limit) {
		t.Error("a TCP connection of the evicted is open after ten seconds")
	}
	select {
	case n := <-ended:
		t.Logf("the stream over HTTP/2 ended %s after the eviction, after %d bytes", time.Since(began), n)
	case <-time.After(time.Until(limit)):
		t.Error("a stream over HTTP/2 of the evicted goes on after ten seconds")
	}
	open := 0
	for _, c := range again {
		if openAfter(c, limit) {
			open++
		}
		c.Close()
	}
	if open > 0 {
		t.Errorf("%d of %d connections of those who reconnected are open after ten seconds", open, len(again))
	}
	t.Logf("all of %d connections were closed %s after the eviction; the last new one was answered after %s", len(again)+3, time.Since(began), last.Sub(began))
	others.end(t, "others")
	if err := pass(inside); err != nil {
		t.Errorf("a connection to a port that is not exported was closed: %v", err)
	}
}

// sessions counts what a client keeps to resume.
type sessions struct {
	tls.ClientSessionCache
	kept atomic.Int64
}

func (s *sessions) Put(key string, x *tls.ClientSessionState) {
	if x != nil {
		s.kept.Add(1)
	}
	s.ClientSessionCache.Put(key, x)
}

// testNoResumption: a client that would resume sessions never does with Envoy; with another server it does.
func testNoResumption(t *testing.T, w *served) {
	t.Helper()
	resumes := func(port uint32) (n int, kept int64) {
		cfg := meshClient(w.birch.pair(t, birchCaller), "http/1.1")
		cache := &sessions{ClientSessionCache: tls.NewLRUClientSessionCache(8)}
		cfg.ClientSessionCache, cfg.ServerName = cache, "app"
		for range 4 {
			c, err := dialMesh(cfg, port)
			if err != nil {
				t.Fatal(err)
			}
			if err := ask(c); err != nil { // reads what comes after the handshake
				t.Fatal(err)
			}
			if c.ConnectionState().DidResume {
				n++
			}
			c.Close()
		}
		return n, cache.kept.Load()
	}
	cert := w.amber.pair(t, servedID)
	l := listen(t)
	s := &http.Server{Handler: http.HandlerFunc(func(rw http.ResponseWriter, _ *http.Request) { io.WriteString(rw, "ok") })}
	go s.Serve(tls.NewListener(l, &tls.Config{Certificates: []tls.Certificate{*cert}, NextProtos: []string{"http/1.1"}}))
	t.Cleanup(func() { s.Close() })
	if n, _ := resumes(uint32(l.Addr().(*net.TCPAddr).Port)); n == 0 {
		t.Fatal("the client resumes no sessions with anybody")
	}
	if n, kept := resumes(w.http); n > 0 || kept > 0 {
		t.Errorf("%d of 4 connections were resumed, %d sessions kept", n, kept)
	}
}

// TestEnvoyRotation: while the root changes, a TCP connection lives on and no request fails: both roots are told, the new
// one signs, the old one is forgotten. Clients verify the server by the roots that are told.
func TestEnvoyRotation(t *testing.T) {
	envoytest.Path(t)
	w := startServed(t)
	old, next := w.amber, newAuthority(t)
	var pair atomic.Pointer[tls.Certificate]
	var roots atomic.Pointer[x509.CertPool]
	trust := func(list ...*authority) {
		pool := x509.NewCertPool()
		w.roots = nil
		for _, a := range list {
			pool.AddCert(a.cert)
			w.roots = append(w.roots, a.pem...)
		}
		roots.Store(pool)
		w.publish(t)
	}
	client := func(alpn string) *tls.Config {
		cfg, pool := meshClient(pair.Load(), alpn), roots.Load()
		cfg.VerifyConnection = func(s tls.ConnectionState) error {
			_, err := s.PeerCertificates[0].Verify(x509.VerifyOptions{Roots: pool, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}})
			return err
		}
		return cfg
	}
	pair.Store(old.pair(t, amberCaller))
	trust(old)
	if err := w.once(next.pair(t, amberCaller)); err == nil {
		t.Fatal("the new root is trusted before it was told")
	}
	stream, err := dialMesh(client("istio"), w.tcp)
	if err != nil {
		t.Fatal(err)
	}
	defer stream.Close()
	var passed atomic.Int64
	broken := make(chan error, 1)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	go func() {
		for ctx.Err() == nil {
			if err := pass(stream); err != nil {
				broken <- err
				return
			}
			passed.Add(1)
			time.Sleep(5 * time.Millisecond) // the pace
		}
		broken <- nil
	}()
	requests := w.startLoad(t, client)
	steady := func(what string) { // some hundred requests between two steps
		t.Helper()
		from, through := requests.sent.Load(), passed.Load()
		eventually(t, what, func() error {
			if a, b := requests.sent.Load()-from, passed.Load()-through; a < 150 || b < 50 {
				return fmt.Errorf("%d requests, %d passed", a, b)
			}
			return nil
		})
	}
	steady("before")

	trust(old, next)
	eventually(t, "the new root is trusted", func() error { return w.once(next.pair(t, amberCaller)) })
	steady("both are told")

	w.cert = certificateSecret(next.issue(t, servedID))
	w.publish(t)
	eventually(t, "the new root signs", func() error {
		c, err := dialMesh(client("http/1.1"), w.http)
		if err != nil {
			return err
		}
		defer c.Close()
		return c.ConnectionState().PeerCertificates[0].CheckSignatureFrom(next.cert)
	})
	steady("the server has another certificate")
	pair.Store(next.pair(t, amberCaller))
	trust(next, old)
	steady("clients have, too")

	trust(next)
	eventually(t, "the old root is forgotten", func() error {
		if w.once(old.pair(t, amberCaller)) == nil {
			return errors.New("its certificates are taken")
		}
		return nil
	})
	steady("after")
	cancel()
	if err := <-broken; err != nil {
		t.Errorf("the TCP connection broke after %d messages: %v", passed.Load(), err)
	}
	requests.end(t, "a rotation")
}
