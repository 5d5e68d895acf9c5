// Package gatewaytest holds what every east-west gateway must do, as one table of connections and one story of changes,
// and the servers behind it on loopback. Envoy and the built-in relay run the same.
package gatewaytest

import (
	"bufio"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"io"
	"math/big"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	networking "istio.io/api/networking/v1"

	"github.com/isthmus-mesh/isthmus/discovery/mesh"
	"github.com/isthmus-mesh/isthmus/eastwest/gateway"
	"github.com/isthmus-mesh/isthmus/internal/porttest"
)

// Gateway is a running gateway under test.
type Gateway interface {
	Addr() string
	Update(t *testing.T, res gateway.Resources)
}

// World is one cluster, birch, whose service web.shop is exported on port 80.
type World struct {
	pods     map[string]*Backend // every server that ever ran, by name
	control  *Backend
	up       []string // the pods of web.shop now
	exported bool
	port     uint32 // of the gateway
}

// NewWorld starts the pods web-1 (version v1), web-2 (version v2) and others that must stay out of reach.
func NewWorld(t *testing.T) *World {
	t.Helper()
	w := &World{pods: map[string]*Backend{}, exported: true, port: freePort(t), up: []string{"web-1", "web-2"}}
	for _, name := range []string{"web-1", "web-2", "web-plain", "web-unready", "db-1", "web-5", "web-1b", "books-1", "tills-1"} {
		w.pods[name] = StartBackend(t, name)
	}
	w.control = StartBackend(t, "control")
	return w
}

// Resources translates the world as it is now.
func (w *World) Resources(t *testing.T) gateway.Resources {
	t.Helper()
	res, problems := gateway.Options{Port: w.port, Address: netip.MustParseAddr("127.0.0.1")}.Translate(w.snapshot())
	for _, p := range problems {
		if p.Reason != "NoMeshTLS" {
			t.Errorf("problem: %s", p)
		}
	}
	return res
}

func (w *World) snapshot() *mesh.Snapshot {
	web := service("web", 80, w.exported)
	for _, name := range w.up {
		web.Endpoints = append(web.Endpoints, w.endpoint(name, name, 80))
	}
	unready, plain := w.endpoint("web-unready", "web-unready", 80), w.endpoint("web-plain", "web-plain", 80)
	unready.Ready, plain.TLS = false, false
	web.Endpoints = append(web.Endpoints, unready, plain)
	db := service("db", 5432, false)
	db.Endpoints = append(db.Endpoints, w.endpoint("db-1", "db-1", 5432))
	// A Gateway opens what is in one namespace, exported or not.
	books, tills := service("books", 90, false), service("tills", 91, false)
	books.Namespace, books.Host = "open", mesh.LocalHost("books", "open")
	books.Endpoints = append(books.Endpoints, w.endpoint("books-1", "books-1", 90))
	tills.Endpoints = append(tills.Endpoints, w.endpoint("tills-1", "tills-1", 91))
	local := &mesh.Cluster{ID: "birch", TrustDomain: "birch.mesh", ControlPlane: []netip.AddrPort{w.control.Addr()}}
	return &mesh.Snapshot{
		Local: local, Clusters: []*mesh.Cluster{local}, Services: []*mesh.Service{books, db, tills, web},
		Gateways: []*mesh.Gateway{{Object: mesh.ObjectRef{Kind: "Gateway", Namespace: "open", Name: "books"}, Spec: &networking.Gateway{
			Selector: map[string]string{"istio": "eastwestgateway"}, Servers: []*networking.Server{{
				Port:  &networking.Port{Number: w.port, Protocol: "TLS"},
				Hosts: []string{"open/*.local"}, Tls: &networking.ServerTLSSettings{Mode: networking.ServerTLSSettings_AUTO_PASSTHROUGH},
			}},
		}}},
		DestinationRules: []*mesh.DestinationRule{{
			Object: mesh.ObjectRef{Kind: "DestinationRule", Namespace: "shop", Name: "web"},
			Spec: &networking.DestinationRule{Host: web.Host, Subsets: []*networking.Subset{
				{Name: "v1", Labels: map[string]string{"version": "v1"}}, {Name: "v9", Labels: map[string]string{"version": "v9"}},
			}},
		}},
	}
}

func service(name string, port uint32, exported bool) *mesh.Service {
	return &mesh.Service{
		Host: mesh.LocalHost(name, "shop"), Name: name, Namespace: "shop", Exported: exported,
		Object: mesh.ObjectRef{Kind: "Service", Namespace: "shop", Name: name},
		Ports:  []mesh.Port{{Number: port, Protocol: mesh.TCP}},
	}
}

func (w *World) endpoint(workload, backend string, port uint32) *mesh.Endpoint {
	addr := w.pods[backend].Addr()
	version := map[string]string{"web-1": "v1", "web-2": "v2"}[workload]
	return &mesh.Endpoint{
		Workload: workload, Namespace: "shop", Cluster: "birch", Address: addr.Addr().String(),
		Ports: map[uint32]uint32{port: uint32(addr.Port())}, Labels: map[string]string{"version": version}, TLS: true, Ready: true,
	}
}

// accepted counts the connections that reached any server.
func (w *World) accepted() int64 {
	n := w.control.accepted.Load()
	for _, b := range w.pods {
		n += b.accepted.Load()
	}
	return n
}

// Backend is a TLS server on loopback. It answers each line with its name, the server name it saw and the line, and the
// end of input with "bye".
type Backend struct {
	name     string
	listener net.Listener
	accepted atomic.Int64
}

// StartBackend runs a Backend until the test ends.
func StartBackend(t *testing.T, name string) *Backend {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	b := &Backend{name: name, listener: l}
	config := &tls.Config{Certificates: []tls.Certificate{certificate(t)}, SessionTicketsDisabled: true}
	config.GetConfigForClient = func(hello *tls.ClientHelloInfo) (*tls.Config, error) {
		c := config.Clone()
		c.NextProtos = hello.SupportedProtos // whatever the client offers: the gateway is under test
		return c, nil
	}
	var wg sync.WaitGroup
	open := map[net.Conn]bool{}
	var mu sync.Mutex
	wg.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			b.accepted.Add(1)
			mu.Lock()
			open[c] = true
			mu.Unlock()
			wg.Go(func() {
				b.serve(tls.Server(c, config))
				_ = c.Close()
				mu.Lock()
				delete(open, c)
				mu.Unlock()
			})
		}
	})
	t.Cleanup(func() {
		_ = l.Close()
		mu.Lock()
		for c := range open {
			_ = c.Close()
		}
		mu.Unlock()
		wg.Wait()
	})
	return b
}

// Addr is where the server listens.
func (b *Backend) Addr() netip.AddrPort { return b.listener.Addr().(*net.TCPAddr).AddrPort() }

func (b *Backend) serve(c *tls.Conn) {
	if c.Handshake() != nil {
		return
	}
	lines := bufio.NewReader(c)
	for {
		line, err := lines.ReadString('\n')
		if err == io.EOF {
			_, _ = io.WriteString(c, "bye\n")
			_ = c.CloseWrite()
			return
		}
		if err != nil {
			return
		}
		if _, err := fmt.Fprintf(c, "%s %s %s", b.name, c.ConnectionState().ServerName, line); err != nil {
			return
		}
	}
}

var certificateOnce = sync.OnceValues(func() (tls.Certificate, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return tls.Certificate{}, err
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1), NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour)}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}, err
})

func certificate(t *testing.T) tls.Certificate {
	t.Helper()
	c, err := certificateOnce()
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func freePort(t *testing.T) uint32 { return uint32(porttest.Take(t)) }

// Eventually fails the test unless ok becomes true within 20 s.
func Eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	deadline := time.NewTimer(20 * time.Second)
	defer deadline.Stop()
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for !ok() {
		select {
		case <-tick.C:
		case <-deadline.C:
			t.Fatalf("%s: not within 20 s", what)
		}
	}
}
