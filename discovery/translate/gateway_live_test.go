package translate_test

import (
	"bufio"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"io"
	"math/big"
	"net"
	"net/http"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	listenerv3 "github.com/envoyproxy/go-control-plane/envoy/config/listener/v3"
	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	secretv3 "github.com/envoyproxy/go-control-plane/envoy/service/secret/v3"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
	networking "istio.io/api/networking/v1"

	"github.com/isthmus-mesh/isthmus/discovery/mesh"
	"github.com/isthmus-mesh/isthmus/discovery/translate"
	"github.com/isthmus-mesh/isthmus/internal/envoytest"
)

// named returns the PEM of a certificate for a DNS name, with the authority's root behind it or not, and its key.
func (a *authority) named(t *testing.T, name string, serial int64) (cert, key []byte) {
	t.Helper()
	template := &x509.Certificate{
		SerialNumber: big.NewInt(serial), Subject: pkix.Name{CommonName: name}, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour), DNSNames: []string{name},
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth, x509.ExtKeyUsageServerAuth},
	}
	return a.sign(t, template)
}

// revoke returns a list with the serial numbers.
func (a *authority) revoke(t *testing.T, serials ...int64) []byte {
	t.Helper()
	list := &x509.RevocationList{Number: big.NewInt(1), ThisUpdate: time.Now().Add(-time.Hour), NextUpdate: time.Now().Add(time.Hour)}
	for _, s := range serials {
		list.RevokedCertificateEntries = append(list.RevokedCertificateEntries, x509.RevocationListEntry{SerialNumber: big.NewInt(s), RevocationTime: time.Now().Add(-time.Minute)})
	}
	der, err := x509.CreateRevocationList(rand.Reader, list, a.cert, a.key)
	if err != nil {
		t.Fatal(err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: "X509 CRL", Bytes: der})
}

// signing is an authority that may sign revocation lists.
func signing(t *testing.T) *authority {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "root"}, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageCRLSign, SubjectKeyId: []byte{1, 2, 3, 4},
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return &authority{cert, key, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})}
}

// changing is a control plane whose resources change while clients are connected.
type changing struct {
	discoveryv3.UnimplementedAggregatedDiscoveryServiceServer
	secretv3.UnimplementedSecretDiscoveryServiceServer
	mu      sync.Mutex
	version int
	changed chan struct{}
	set     map[string]map[string]*anypb.Any
	nacks   []string
}

func (c *changing) put(t *testing.T, r translate.Resources) {
	t.Helper()
	c.mu.Lock()
	defer c.mu.Unlock()
	c.set = map[string]map[string]*anypb.Any{}
	add := func(name string, m proto.Message) {
		a, err := anypb.New(m)
		if err != nil {
			t.Fatal(err)
		}
		if c.set[a.TypeUrl] == nil {
			c.set[a.TypeUrl] = map[string]*anypb.Any{}
		}
		c.set[a.TypeUrl][name] = a
	}
	for _, m := range r.Clusters {
		add(m.Name, m)
	}
	for _, m := range r.Endpoints {
		add(m.ClusterName, m)
	}
	for _, m := range r.Listeners {
		add(m.Name, m)
	}
	for _, m := range r.Routes {
		add(m.Name, m)
	}
	for _, m := range r.Secrets {
		add(m.Name, m)
	}
	c.version++
	if c.changed != nil {
		close(c.changed)
	}
	c.changed = make(chan struct{})
}

func (c *changing) StreamAggregatedResources(s discoveryv3.AggregatedDiscoveryService_StreamAggregatedResourcesServer) error {
	return c.follow(s)
}

func (c *changing) StreamSecrets(s secretv3.SecretDiscoveryService_StreamSecretsServer) error {
	return c.follow(s)
}

// placeOf is the place of a type in a push, as the server has it.
func placeOf(kind string) int {
	return slices.Index([]string{"Cluster", "ClusterLoadAssignment", "Secret", "Listener", "RouteConfiguration"}, kind[strings.LastIndexByte(kind, '.')+1:])
}

// follow sends every type that was asked for again when something changed.
func (c *changing) follow(s interface {
	stream
	Context() context.Context
}) error {
	requests := make(chan *discoveryv3.DiscoveryRequest)
	go func() {
		defer close(requests)
		for {
			req, err := s.Recv()
			if err != nil {
				return
			}
			select {
			case requests <- req:
			case <-s.Context().Done():
				return
			}
		}
	}()
	asked, order, nonce := map[string][]string{}, []string{}, 0
	send := func(kind string) error {
		c.mu.Lock()
		nonce++
		resp := &discoveryv3.DiscoveryResponse{TypeUrl: kind, VersionInfo: fmt.Sprint(c.version), Nonce: fmt.Sprint(nonce)}
		for name, a := range c.set[kind] {
			if len(asked[kind]) == 0 || slices.Contains(asked[kind], name) {
				resp.Resources = append(resp.Resources, a)
			}
		}
		c.mu.Unlock()
		return s.Send(resp)
	}
	for {
		c.mu.Lock()
		changed := c.changed
		c.mu.Unlock()
		select {
		case req, ok := <-requests:
			if !ok {
				return nil
			}
			if req.ErrorDetail != nil {
				c.mu.Lock()
				c.nacks = append(c.nacks, req.TypeUrl+": "+req.ErrorDetail.Message)
				c.mu.Unlock()
			}
			had, again := asked[req.TypeUrl]
			names := slices.Sorted(slices.Values(req.ResourceNames))
			if again && slices.Equal(had, names) {
				continue
			}
			if !again {
				order = append(order, req.TypeUrl)
				slices.SortFunc(order, func(a, b string) int { return placeOf(a) - placeOf(b) })
			}
			asked[req.TypeUrl] = names
			if err := send(req.TypeUrl); err != nil {
				return err
			}
		case <-changed:
			for _, kind := range order {
				if err := send(kind); err != nil {
					return err
				}
			}
		case <-s.Context().Done():
			return nil
		}
	}
}

// TestEnvoyGateway runs a gateway: certificates by server name, client certificates, revocation, an exchange of a Secret
// that leaves connections open, redirects, wrong hosts, TLS that is passed on, and TLS towards a server outside.
func TestEnvoyGateway(t *testing.T) {
	envoytest.Path(t)
	ca := signing(t)
	secret := func(name, host string, serial int64) *mesh.Credential {
		cert, key := ca.named(t, host, serial)
		return &mesh.Credential{Object: mesh.ObjectRef{Kind: "Secret", Namespace: "istio-system", Name: name}, Certificate: cert, Key: key}
	}
	app := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { fmt.Fprintf(w, "app %s", r.Host) })}
	appAt := listen(t)
	go app.Serve(appAt)
	t.Cleanup(func() { app.Close() })
	// A server with a certificate of its own, which also asks for one.
	ownCert, ownKey := ca.named(t, "own.example.com", 90)
	own, err := tls.X509KeyPair(ownCert, ownKey)
	if err != nil {
		t.Fatal(err)
	}
	pool := x509.NewCertPool()
	pool.AddCert(ca.cert)
	ownAt := listen(t)
	server := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		name := "nobody"
		if len(r.TLS.PeerCertificates) > 0 {
			name = r.TLS.PeerCertificates[0].Subject.CommonName
		}
		fmt.Fprintf(w, "own %s %s", r.TLS.ServerName, name)
	})}
	go server.Serve(tls.NewListener(ownAt, &tls.Config{Certificates: []tls.Certificate{own}, ClientAuth: tls.VerifyClientCertIfGiven, ClientCAs: pool, NextProtos: []string{"http/1.1"}}))
	t.Cleanup(func() { server.Close() })

	plain, secure := freePort(t), freePort(t)
	service := func(host string, p mesh.Protocol, at net.Listener, external bool) *mesh.Service {
		return &mesh.Service{Host: host, Name: strings.Split(host, ".")[0], Namespace: "a", Object: mesh.ObjectRef{Kind: "ServiceEntry", Namespace: "a", Name: host}, External: external,
			Ports:     []mesh.Port{{Name: "p", Number: 8000, Protocol: p}},
			Endpoints: []*mesh.Endpoint{{Workload: host, Namespace: "a", Cluster: "amber", Network: "net-a", Address: "127.0.0.1", Ports: map[uint32]uint32{8000: uint32(at.Addr().(*net.TCPAddr).Port)}, Ready: true}}}
	}
	to := func(host string) *networking.Destination {
		return &networking.Destination{Host: host, Port: &networking.PortSelector{Number: 8000}}
	}
	gw := func(port uint32, name, protocol, host string, s *networking.ServerTLSSettings) *networking.Server {
		return &networking.Server{Port: &networking.Port{Number: port, Name: name, Protocol: protocol}, Hosts: []string{host}, Tls: s}
	}
	const simple, mutual = networking.ServerTLSSettings_SIMPLE, networking.ServerTLSSettings_MUTUAL
	amber := &mesh.Cluster{ID: "amber", TrustDomain: "amber.mesh", Network: "net-a", Roots: ca.pem}
	client := secret("client", "client.example.com", 40)
	client.Roots = ca.pem
	snap := &mesh.Snapshot{
		Revision: 1, Local: amber, Clusters: []*mesh.Cluster{amber},
		Services: sortedByHost(service("app.a.svc.cluster.local", mesh.HTTP, appAt, false), service("own.example.com", mesh.TLS, ownAt, true), service("out.example.com", mesh.HTTP, ownAt, true)),
		DestinationRules: []*mesh.DestinationRule{{Object: mesh.ObjectRef{Kind: "DestinationRule", Namespace: "a", Name: "out"}, Spec: &networking.DestinationRule{Host: "out.example.com", TrafficPolicy: &networking.TrafficPolicy{
			Tls: &networking.ClientTLSSettings{Mode: networking.ClientTLSSettings_MUTUAL, CredentialName: "client", Sni: "own.example.com"},
		}}}},
		Credentials: []*mesh.Credential{
			client, secret("one", "one.example.com", 10), secret("two", "two.example.com", 20), secret("safe", "safe.example.com", 30),
			secret("opt", "opt.example.com", 31), secret("old", "old.example.com", 32),
			{Object: mesh.ObjectRef{Kind: "Secret", Namespace: "istio-system", Name: "opt-cacert"}, Roots: ca.pem},
			{Object: mesh.ObjectRef{Kind: "Secret", Namespace: "istio-system", Name: "safe-cacert"}, Roots: ca.pem, CRL: ca.revoke(t, 66)},
		},
		Gateways: []*mesh.Gateway{{Object: mesh.ObjectRef{Kind: "Gateway", Namespace: "a", Name: "gw"}, Spec: &networking.Gateway{Selector: map[string]string{"istio": "ingressgateway"}, Servers: []*networking.Server{
			gw(plain, "http", "HTTP", "one.example.com", &networking.ServerTLSSettings{HttpsRedirect: true}),
			gw(secure, "one", "HTTPS", "one.example.com", &networking.ServerTLSSettings{Mode: simple, CredentialName: "one"}),
			gw(secure, "two", "HTTPS", "two.example.com", &networking.ServerTLSSettings{Mode: simple, CredentialName: "two"}),
			gw(secure, "safe", "HTTPS", "safe.example.com", &networking.ServerTLSSettings{Mode: mutual, CredentialName: "safe"}),
			gw(secure, "opt", "HTTPS", "opt.example.com", &networking.ServerTLSSettings{Mode: networking.ServerTLSSettings_OPTIONAL_MUTUAL, CredentialName: "opt"}),
			gw(secure, "old", "HTTPS", "old.example.com", &networking.ServerTLSSettings{Mode: simple, CredentialName: "old",
				MaxProtocolVersion: networking.ServerTLSSettings_TLSV1_2, CipherSuites: []string{"ECDHE-ECDSA-AES256-GCM-SHA384"}}),
			gw(secure, "gone", "HTTPS", "gone.example.com", &networking.ServerTLSSettings{Mode: simple, CredentialName: "gone"}),
			gw(secure, "pass", "TLS", "own.example.com", &networking.ServerTLSSettings{Mode: networking.ServerTLSSettings_PASSTHROUGH}),
		}}}},
		VirtualServices: []*mesh.VirtualService{
			{Object: mesh.ObjectRef{Kind: "VirtualService", Namespace: "a", Name: "pass"}, Spec: &networking.VirtualService{Hosts: []string{"own.example.com"}, Gateways: []string{"a/gw"}, Tls: []*networking.TLSRoute{{
				Match: []*networking.TLSMatchAttributes{{SniHosts: []string{"own.example.com"}}}, Route: []*networking.RouteDestination{{Destination: to("own.example.com")}},
			}}}},
			{Object: mesh.ObjectRef{Kind: "VirtualService", Namespace: "a", Name: "web"}, Spec: &networking.VirtualService{Hosts: []string{"*.example.com"}, Gateways: []string{"a/gw"}, Http: []*networking.HTTPRoute{
				{Match: []*networking.HTTPMatchRequest{{Uri: uriPrefix("/out")}}, Route: []*networking.HTTPRouteDestination{{Destination: to("out.example.com")}}},
				{Match: []*networking.HTTPMatchRequest{{Uri: uriPrefix("/app")}}, Route: []*networking.HTTPRouteDestination{{Destination: to("app.a.svc.cluster.local")}}},
			}}},
		},
	}
	proxy := proxies()["ingress"]
	proxy.Identity = "spiffe://amber.mesh/ns/istio-system/sa/ingress"
	cp := &changing{}
	publish := func() {
		r, _ := translate.Translate(snap, proxy)
		for _, l := range r.Listeners {
			l.Address.GetSocketAddress().Address = "127.0.0.1"
		}
		cp.put(t, r)
	}
	publish()
	l := listen(t)
	g := grpc.NewServer()
	discoveryv3.RegisterAggregatedDiscoveryServiceServer(g, cp)
	go g.Serve(l)
	t.Cleanup(g.Stop)
	startEnvoy(t, l.Addr().String())

	connect := func(sni string, alpn []string, certs ...tls.Certificate) (*tls.Conn, error) {
		d := &tls.Dialer{NetDialer: &net.Dialer{Timeout: 5 * time.Second}, Config: &tls.Config{ServerName: sni, RootCAs: pool, NextProtos: alpn, Certificates: certs}}
		c, err := d.DialContext(context.Background(), "tcp", fmt.Sprintf("127.0.0.1:%d", secure))
		if err != nil {
			return nil, err
		}
		return c.(*tls.Conn), nil
	}
	ask := func(c net.Conn, host, path string) (int, string, error) {
		c.SetDeadline(time.Now().Add(10 * time.Second))
		req, err := http.NewRequest(http.MethodGet, "http://"+host+path, nil)
		if err != nil {
			return 0, "", err
		}
		if err := req.Write(c); err != nil {
			return 0, "", err
		}
		resp, err := http.ReadResponse(bufio.NewReader(c), req)
		if err != nil {
			return 0, "", err
		}
		defer resp.Body.Close()
		body, err := io.ReadAll(resp.Body)
		return resp.StatusCode, string(body), err
	}
	fetch := func(sni, host, path string, certs ...tls.Certificate) (int, string, error) {
		c, err := connect(sni, []string{"http/1.1"}, certs...)
		if err != nil {
			return 0, "", err
		}
		defer c.Close()
		return ask(c, host, path)
	}
	want := func(what, sni, host, path string, status int, body string, certs ...tls.Certificate) {
		t.Helper()
		if got, text, err := fetch(sni, host, path, certs...); err != nil || got != status || !strings.Contains(text, body) {
			t.Errorf("%s: %d %q %v, want %d %q", what, got, text, err, status, body)
		}
	}
	eventually(t, "first answer", func() error {
		status, body, err := fetch("one.example.com", "one.example.com", "/app")
		if err == nil && (status != 200 || body != "app one.example.com") {
			err = fmt.Errorf("%d %s", status, body)
		}
		return err
	})
	want("another certificate by name", "two.example.com", "two.example.com", "/app", 200, "app two")
	want("a path that nobody routes", "one.example.com", "one.example.com", "/headers", 404, "")
	want("a host of another server", "one.example.com", "two.example.com", "/app", 421, "")
	want("TLS passed on", "own.example.com", "own.example.com", "/", 200, "own own.example.com nobody")
	want("TLS towards a server outside", "one.example.com", "one.example.com", "/out", 200, "own own.example.com client.example.com")
	for _, name := range []string{"gone.example.com", "unknown.example.com"} {
		if _, _, err := fetch(name, name, "/app"); err == nil {
			t.Errorf("%s is served", name)
		}
	}
	if c, err := connect("one.example.com", []string{"h2", "http/1.1"}); err != nil || c.ConnectionState().NegotiatedProtocol != "h2" {
		t.Errorf("HTTP/2 is not offered: %v", err)
	} else {
		c.Close()
	}
	pair := func(serial int64, by *authority) tls.Certificate {
		cert, key := by.named(t, "client.example.com", serial)
		p, err := tls.X509KeyPair(cert, key)
		if err != nil {
			t.Fatal(err)
		}
		return p
	}
	want("a client certificate", "safe.example.com", "safe.example.com", "/app", 200, "app safe", pair(50, ca))
	for what, certs := range map[string][]tls.Certificate{"no": nil, "a revoked": {pair(66, ca)}, "another's": {pair(51, newAuthority(t))}} {
		if status, _, err := fetch("safe.example.com", "safe.example.com", "/app", certs...); err == nil {
			t.Errorf("%s client certificate is let in: %d", what, status)
		}
	}
	// A client certificate may be left out here, but not be another's.
	want("no client certificate where it is optional", "opt.example.com", "opt.example.com", "/app", 200, "app opt")
	want("one where it is optional", "opt.example.com", "opt.example.com", "/app", 200, "app opt", pair(52, ca))
	if status, _, err := fetch("opt.example.com", "opt.example.com", "/app", pair(53, newAuthority(t))); err == nil {
		t.Errorf("another's certificate is let in where one is optional: %d", status)
	}
	if c, err := connect("old.example.com", []string{"http/1.1"}); err != nil {
		t.Error(err)
	} else {
		if s := c.ConnectionState(); s.Version != tls.VersionTLS12 || s.CipherSuite != tls.TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384 {
			t.Errorf("version %x with suite %x", s.Version, s.CipherSuite)
		}
		c.Close()
	}
	redirect, err := (&http.Transport{}).RoundTrip(mustRequest(t, fmt.Sprintf("http://127.0.0.1:%d/app", plain), "one.example.com"))
	if err != nil || redirect.StatusCode != 301 || redirect.Header.Get("Location") != "https://one.example.com/app" {
		t.Errorf("redirect: %v %v", redirect, err)
	}

	// A renewed certificate is served to new connections; open ones stay.
	open, err := connect("one.example.com", []string{"http/1.1"})
	if err != nil {
		t.Fatal(err)
	}
	defer open.Close()
	if status, _, err := ask(open, "one.example.com", "/app"); err != nil || status != 200 {
		t.Fatalf("before the exchange: %d %v", status, err)
	}
	before, _ := translate.Translate(snap, proxy)
	next := *snap
	next.Revision++
	next.Credentials = slices.Clone(snap.Credentials)
	next.Credentials[1] = secret("one", "one.example.com", 11)
	next.Credentials = append(next.Credentials, secret("gone", "gone.example.com", 60))
	old := snap
	snap = &next
	publish()
	eventually(t, "the renewed certificate", func() error {
		c, err := connect("one.example.com", nil)
		if err != nil {
			return err
		}
		defer c.Close()
		if n := c.ConnectionState().PeerCertificates[0].SerialNumber.Int64(); n != 11 {
			return fmt.Errorf("serial number %d", n)
		}
		return nil
	})
	eventually(t, "the server whose Secret came", func() error {
		status, _, err := fetch("gone.example.com", "gone.example.com", "/app")
		if err == nil && status != 200 {
			err = fmt.Errorf("status %d", status)
		}
		return err
	})
	if status, _, err := ask(open, "one.example.com", "/app"); err != nil || status != 200 {
		t.Errorf("the open connection did not outlive the exchange: %d %v", status, err)
	}
	if cp.mu.Lock(); len(cp.nacks) > 0 {
		t.Errorf("envoy refused: %v", cp.nacks)
	}
	cp.mu.Unlock()
	// The exchange of a Secret alone changes that secret and nothing else.
	same := *old
	same.Credentials = slices.Clone(old.Credentials)
	same.Credentials[1] = next.Credentials[1]
	after, _ := translate.Translate(&same, proxy)
	if !slices.EqualFunc(before.Listeners, after.Listeners, func(a, b *listenerv3.Listener) bool { return sameButAddress(a, b) }) {
		t.Error("a renewed Secret changes listeners")
	}
	var changed []string
	for i, s := range after.Secrets {
		if !proto.Equal(s, before.Secrets[i]) {
			changed = append(changed, s.Name)
		}
	}
	if !slices.Equal(changed, []string{"kubernetes://one"}) {
		t.Errorf("changed secrets: %v", changed)
	}
}

func sameButAddress(a, b *listenerv3.Listener) bool {
	x, y := proto.Clone(a).(*listenerv3.Listener), proto.Clone(b).(*listenerv3.Listener)
	x.Address, y.Address = nil, nil
	return proto.Equal(x, y)
}

func mustRequest(t *testing.T, url, host string) *http.Request {
	t.Helper()
	req, err := http.NewRequest(http.MethodGet, url, nil)
	if err != nil {
		t.Fatal(err)
	}
	req.Host = host
	return req
}
