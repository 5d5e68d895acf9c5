package tlsmux_test

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"io"
	"log/slog"
	"math/big"
	"net"
	"net/url"
	"slices"
	"sync/atomic"
	"testing"
	"time"

	"go.uber.org/goleak"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/health"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/peer"

	"github.com/isthmus-mesh/isthmus/internal/tlsmux"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const patience = 10 * time.Second

// certificate is one of its own, for the name and, unless empty, the SPIFFE id.
func certificate(t *testing.T, name, id string) tls.Certificate {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	c := &x509.Certificate{SerialNumber: big.NewInt(1), DNSNames: []string{name}, NotAfter: time.Now().Add(time.Hour)}
	if id != "" {
		u, err := url.Parse(id)
		if err != nil {
			t.Fatal(err)
		}
		c.URIs = []*url.URL{u}
	}
	der, err := x509.CreateCertificate(rand.Reader, c, c, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}
}

// route answers each connection with its name, then waits for the client's end.
func route(t *testing.T, name string, match func(*tls.ClientHelloInfo) bool, protos ...string) tlsmux.Route {
	cert := certificate(t, name, "")
	return tlsmux.Route{
		Name: name, Match: match,
		TLS: func() *tls.Config { return &tls.Config{Certificates: []tls.Certificate{cert}, NextProtos: protos} },
		Serve: func(c *tls.Conn) {
			_, _ = io.WriteString(c, name+"\n")
			_, _ = io.Copy(io.Discard, c)
		},
	}
}

func speaks(proto string) func(*tls.ClientHelloInfo) bool {
	return func(h *tls.ClientHelloInfo) bool { return slices.Contains(h.SupportedProtos, proto) }
}

func named(name string) func(*tls.ClientHelloInfo) bool {
	return func(h *tls.ClientHelloInfo) bool { return h.ServerName == name }
}

// run runs a Mux; the function ends it and waits, and so does the test's end.
func run(t *testing.T, cfg tlsmux.Config) (addr string, stop func()) {
	t.Helper()
	cfg.Addr, cfg.Log = "127.0.0.1:0", slog.New(slog.DiscardHandler)
	m, err := tlsmux.Listen(cfg)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- m.Run(ctx); close(done) }()
	stop = func() {
		cancel()
		select {
		case err := <-done:
			if err != nil {
				t.Errorf("Run: %v", err)
			}
		case <-time.After(patience):
			t.Error("Run does not end")
		}
	}
	t.Cleanup(stop)
	return m.Addr().String(), stop
}

func hello(addr string, cfg *tls.Config) (string, *tls.Conn, error) {
	cfg.InsecureSkipVerify = true
	conn, err := tls.DialWithDialer(&net.Dialer{Timeout: patience}, "tcp", addr, cfg)
	if err != nil {
		return "", nil, err
	}
	_ = conn.SetDeadline(time.Now().Add(patience))
	b := make([]byte, 64)
	n, err := conn.Read(b)
	if err != nil {
		conn.Close()
		return "", nil, err
	}
	return string(b[:max(n-1, 0)]), conn, nil
}

func TestRoutes(t *testing.T) {
	addr, _ := run(t, tlsmux.Config{Routes: []tlsmux.Route{
		route(t, "join", speaks("join"), "join"),
		route(t, "peer", named("peer.amber.mesh"), "h2"),
		route(t, "xds", speaks("h2"), "h2"),
	}})
	for name, c := range map[string]struct {
		cfg   *tls.Config
		route string // empty: refused
		proto string
	}{
		"by protocol":               {&tls.Config{NextProtos: []string{"join"}}, "join", "join"},
		"by name":                   {&tls.Config{ServerName: "peer.amber.mesh", NextProtos: []string{"h2"}}, "peer", "h2"},
		"the first that matches":    {&tls.Config{ServerName: "peer.amber.mesh", NextProtos: []string{"join", "h2"}}, "join", "join"},
		"another name":              {&tls.Config{ServerName: "xds.amber.mesh", NextProtos: []string{"h2"}}, "xds", "h2"},
		"no name":                   {&tls.Config{NextProtos: []string{"h2"}}, "xds", "h2"},
		"unknown protocol":          {&tls.Config{ServerName: "xds.amber.mesh", NextProtos: []string{"http/1.1"}}, "", ""},
		"name without its protocol": {&tls.Config{ServerName: "peer.amber.mesh", NextProtos: []string{"smtp"}}, "", ""},
		"nothing":                   {&tls.Config{}, "", ""},
		"a version that is too old": {&tls.Config{NextProtos: []string{"h2"}, MaxVersion: tls.VersionTLS12}, "", ""},
	} {
		t.Run(name, func(t *testing.T) {
			got, conn, err := hello(addr, c.cfg)
			if c.route == "" {
				if err == nil {
					conn.Close()
					t.Errorf("served by %s", got)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			defer conn.Close()
			state := conn.ConnectionState()
			if got != c.route || state.NegotiatedProtocol != c.proto || state.PeerCertificates[0].DNSNames[0] != c.route {
				t.Errorf("served by %s with %s and the certificate of %v, want %s with %s", got, state.NegotiatedProtocol, state.PeerCertificates[0].DNSNames, c.route, c.proto)
			}
		})
	}
}

// TestConfigurationOfEachConnection changes the certificate between two connections.
func TestConfigurationOfEachConnection(t *testing.T) {
	r := route(t, "a", speaks("h2"), "h2")
	var now atomic.Pointer[tls.Certificate]
	r.TLS = func() *tls.Config {
		return &tls.Config{Certificates: []tls.Certificate{*now.Load()}, NextProtos: []string{"h2"}}
	}
	addr, _ := run(t, tlsmux.Config{Routes: []tlsmux.Route{r}})
	for _, name := range []string{"old", "new"} {
		cert := certificate(t, name, "")
		now.Store(&cert)
		_, conn, err := hello(addr, &tls.Config{NextProtos: []string{"h2"}})
		if err != nil {
			t.Fatal(err)
		}
		if got := conn.ConnectionState().PeerCertificates[0].DNSNames[0]; got != name {
			t.Errorf("got the certificate %s, want %s", got, name)
		}
		conn.Close()
	}
}

// ended waits until the other side has closed the connection.
func ended(t *testing.T, conn net.Conn) {
	t.Helper()
	_ = conn.SetReadDeadline(time.Now().Add(patience))
	var timeout net.Error
	if _, err := io.Copy(io.Discard, conn); errors.As(err, &timeout) && timeout.Timeout() {
		t.Error("the connection stays open")
	}
}

func TestHandshakeTimeout(t *testing.T) {
	addr, _ := run(t, tlsmux.Config{Routes: []tlsmux.Route{route(t, "a", speaks("h2"), "h2")}, HandshakeTimeout: 50 * time.Millisecond})
	for name, first := range map[string]string{"silent": "", "half a hello": "\x16\x03\x01\x02\x00\x01\x00", "no TLS": "GET / HTTP/1.1\r\n\r\n"} {
		t.Run(name, func(t *testing.T) {
			conn, err := net.Dial("tcp", addr)
			if err != nil {
				t.Fatal(err)
			}
			defer conn.Close()
			_, _ = io.WriteString(conn, first)
			ended(t, conn)
		})
	}
	// A connection whose handshake is done may be silent for longer.
	got, conn, err := hello(addr, &tls.Config{NextProtos: []string{"h2"}})
	if err != nil || got != "a" {
		t.Fatalf("got %q, %v", got, err)
	}
	defer conn.Close()
	_ = conn.SetReadDeadline(time.Now().Add(200 * time.Millisecond))
	var timeout net.Error
	if _, err := conn.Read(make([]byte, 1)); !errors.As(err, &timeout) || !timeout.Timeout() {
		t.Errorf("the connection ended with %v", err)
	}
}

func TestMaxConns(t *testing.T) {
	addr, _ := run(t, tlsmux.Config{Routes: []tlsmux.Route{route(t, "a", speaks("h2"), "h2")}, MaxConns: 2})
	var held []*tls.Conn
	for range 2 {
		_, conn, err := hello(addr, &tls.Config{NextProtos: []string{"h2"}})
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		held = append(held, conn)
	}
	if _, conn, err := hello(addr, &tls.Config{NextProtos: []string{"h2"}}); err == nil {
		conn.Close()
		t.Fatal("a third connection is served")
	}
	held[0].Close()
	for deadline := time.Now().Add(patience); ; { // its place is free when its route has returned
		_, conn, err := hello(addr, &tls.Config{NextProtos: []string{"h2"}})
		if err == nil {
			conn.Close()
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("the place stays taken: %v", err)
		}
	}
}

// TestRunEnds ends a Mux with connections in every state.
func TestRunEnds(t *testing.T) {
	queue := tlsmux.NewQueue(&net.TCPAddr{})
	q := route(t, "queue", speaks("queue"), "queue")
	q.Serve = queue.Serve
	addr, stop := run(t, tlsmux.Config{Routes: []tlsmux.Route{route(t, "a", speaks("h2"), "h2"), q}})
	silent, err := net.Dial("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	defer silent.Close()
	_, served, err := hello(addr, &tls.Config{NextProtos: []string{"h2"}})
	if err != nil {
		t.Fatal(err)
	}
	defer served.Close()
	queued, err := tls.Dial("tcp", addr, &tls.Config{InsecureSkipVerify: true, NextProtos: []string{"queue"}})
	if err != nil {
		t.Fatal(err)
	}
	defer queued.Close()
	accepted, err := queue.Accept()
	if err != nil {
		t.Fatal(err)
	}
	waiting, err := tls.Dial("tcp", addr, &tls.Config{InsecureSkipVerify: true, NextProtos: []string{"queue"}})
	if err != nil {
		t.Fatal(err)
	}
	defer waiting.Close()
	queue.Close() // as the gRPC server does that it feeds
	stop()
	for _, c := range []net.Conn{silent, served, queued, waiting} {
		ended(t, c)
	}
	accepted.Close()
}

func TestQueue(t *testing.T) {
	want := &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1), Port: 15012}
	queue := tlsmux.NewQueue(want)
	if queue.Addr() != want {
		t.Errorf("address %v", queue.Addr())
	}
	failed := make(chan error, 1)
	go func() { _, err := queue.Accept(); failed <- err }()
	queue.Close()
	queue.Close() // twice is once
	if err := <-failed; !errors.Is(err, net.ErrClosed) {
		t.Errorf("Accept: %v", err)
	}
	queue.Serve(nil) // returns, nobody takes it
}

// TestGRPC shows that a gRPC server behind a Queue knows who called, and that closing a connection frees its place.
func TestGRPC(t *testing.T) {
	const id = "spiffe://amber.mesh/ns/default/sa/reviews"
	queue := tlsmux.NewQueue(&net.TCPAddr{})
	r := route(t, "grpc", speaks("h2"), "h2")
	base := r.TLS
	r.TLS = func() *tls.Config { c := base(); c.ClientAuth = tls.RequestClientCert; return c }
	r.Serve = queue.Serve
	addr, _ := run(t, tlsmux.Config{Routes: []tlsmux.Route{r}, MaxConns: 1})
	callers := make(chan string, 10)
	srv := grpc.NewServer(grpc.Creds(tlsmux.Credentials()), grpc.UnaryInterceptor(func(ctx context.Context, req any, _ *grpc.UnaryServerInfo, h grpc.UnaryHandler) (any, error) {
		p, _ := peer.FromContext(ctx)
		who := ""
		if info, ok := p.AuthInfo.(credentials.TLSInfo); ok && info.SPIFFEID != nil {
			who = info.SPIFFEID.String()
		}
		callers <- who
		return h(ctx, req)
	}))
	healthpb.RegisterHealthServer(srv, health.NewServer())
	served := make(chan error, 1)
	go func() { served <- srv.Serve(queue) }()
	defer func() {
		srv.Stop()
		if err := <-served; err != nil {
			t.Errorf("Serve: %v", err)
		}
	}()
	for who, certs := range map[string][]tls.Certificate{"": nil, id: {certificate(t, "reviews", id)}} {
		conn, err := grpc.NewClient(addr, grpc.WithTransportCredentials(credentials.NewTLS(&tls.Config{InsecureSkipVerify: true, Certificates: certs})))
		if err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithTimeout(t.Context(), patience)
		_, err = healthpb.NewHealthClient(conn).Check(ctx, &healthpb.HealthCheckRequest{}, grpc.WaitForReady(true))
		cancel()
		conn.Close()
		if err != nil {
			t.Fatal(err)
		}
		if got := <-callers; got != who {
			t.Errorf("the server sees %q, want %q", got, who)
		}
	}
	// A connection that has not come by way of the queue is not believed.
	a, b := net.Pipe()
	defer a.Close()
	defer b.Close()
	if _, _, err := tlsmux.Credentials().ServerHandshake(a); err == nil {
		t.Error("a plain connection passes for one with a handshake")
	}
}

func TestListen(t *testing.T) {
	m, err := tlsmux.Listen(tlsmux.Config{Addr: "127.0.0.1:0"})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := tlsmux.Listen(tlsmux.Config{Addr: m.Addr().String()}); err == nil {
		t.Error("one port twice")
	}
	m.Close()
	again, err := tlsmux.Listen(tlsmux.Config{Addr: m.Addr().String()})
	if err != nil {
		t.Fatalf("the port is not free after Close: %v", err)
	}
	again.Close()
}
