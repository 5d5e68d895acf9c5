package peering

import (
	"context"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"log/slog"
	"math/big"
	"net"
	"net/netip"
	"net/url"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"go.uber.org/goleak"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/protobuf/proto"

	federationv1 "github.com/isthmus-mesh/isthmus/api/federation/v1"
	"github.com/isthmus-mesh/isthmus/discovery/mesh"
	"github.com/isthmus-mesh/isthmus/discovery/xds"
	"github.com/isthmus-mesh/isthmus/federation/policy"
	"github.com/isthmus-mesh/isthmus/federation/protocol"
	"github.com/isthmus-mesh/isthmus/federation/trust"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// signer is a federation key.
func signer(name string) ed25519.PrivateKey {
	seed := sha256.Sum256([]byte("federation key of " + name))
	return ed25519.NewKeyFromSeed(seed[:])
}

func public(name string) ed25519.PublicKey { return signer(name).Public().(ed25519.PublicKey) }

func encode(m proto.Message) []byte {
	b, err := proto.MarshalOptions{Deterministic: true}.Marshal(m)
	if err != nil {
		panic(err)
	}
	return b
}

// authority is the CA of one trust domain.
type authority struct {
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
	pem  []byte
}

func newAuthority(t testing.TB, name string) authority {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	tpl := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: name}, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign, URIs: []*url.URL{{Scheme: "spiffe", Host: name + ".mesh"}},
	}
	der, err := x509.CreateCertificate(rand.Reader, tpl, tpl, &key.PublicKey, key)
	if err != nil {
		t.Fatal(err)
	}
	cert, _ := x509.ParseCertificate(der)
	return authority{cert, key, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})}
}

// leaf makes the certificate of a peer, with changes.
func (a authority) leaf(t testing.TB, name string, change func(*x509.Certificate)) *tls.Certificate {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	tpl := &x509.Certificate{
		SerialNumber: big.NewInt(2), NotBefore: time.Now().Add(-time.Minute), NotAfter: time.Now().Add(time.Hour),
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
		BasicConstraintsValid: true, URIs: []*url.URL{{Scheme: "spiffe", Host: name + ".mesh", Path: "/isthmus/peer"}},
	}
	if change != nil {
		change(tpl)
	}
	der, err := x509.CreateCertificate(rand.Reader, tpl, a.cert, &key.PublicKey, a.key)
	if err != nil {
		t.Fatal(err)
	}
	return &tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}
}

// said is a cluster that serves whatever it is told to say over the record stream: an honest one or a liar.
type said struct {
	name    string
	addr    string // where it really listens
	gateway string // what is dialled
	ca      authority

	mu      sync.Mutex
	cert    *tls.Certificate
	set     map[string]*xds.Resource
	beat    uint64
	changed chan struct{}
	seq     uint64
	extra   map[string]*xds.Resource // digests it tells of others
	conns   []net.Conn
}

// tracked notes connections, so that they can be cut.
type tracked struct {
	net.Listener
	s *said
}

// Accept implements net.Listener.
func (t tracked) Accept() (net.Conn, error) {
	c, err := t.Listener.Accept()
	if err == nil {
		t.s.mu.Lock()
		t.s.conns = append(t.s.conns, c)
		t.s.mu.Unlock()
	}
	return c, err
}

// show presents another certificate, on new connections only.
func (s *said) show(cert *tls.Certificate) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.cert = cert
	for _, c := range s.conns {
		c.Close()
	}
	s.conns = nil
}

// Latest implements xds.Feed.
func (s *said) Latest() (xds.Set, <-chan struct{}) {
	s.mu.Lock()
	defer s.mu.Unlock()
	digests := map[string]*xds.Resource{s.name: xds.NewResource(s.name, s.digest())}
	for name, d := range s.extra {
		digests[name] = d
	}
	return xds.Set{RecordType: xds.NamedOf(s.set), DigestType: xds.NamedOf(digests)}, s.changed
}

func (s *said) digest() *federationv1.Digest {
	var own []*federationv1.Record
	for _, x := range s.set {
		r := &federationv1.Record{}
		if x.Body.UnmarshalTo(r) == nil && r.Origin == s.name {
			own = append(own, r)
		}
	}
	d := protocol.Digest(mesh.ClusterID(s.name), own)
	d.Beat = s.beat
	return d
}

// say serves records, under their names, in place of those of the same names.
func (s *said) say(records ...*federationv1.Record) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, r := range records {
		x := xds.NewResource(protocol.ResourceName(r), r)
		s.set[x.Name] = x
	}
	s.turn()
}

// serve serves resources as they are.
func (s *said) serve(resources ...*xds.Resource) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, x := range resources {
		s.set[x.Name] = x
	}
	s.turn()
}

// keep takes back everything but the names given.
func (s *said) keep(names map[string]*xds.Resource) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.set = map[string]*xds.Resource{}
	for n, x := range names {
		s.set[n] = x
	}
	s.extra = nil
	s.turn()
}

func (s *said) turn() {
	s.beat++
	close(s.changed)
	s.changed = make(chan struct{})
}

// record signs a statement with the next number.
func (s *said) record(kind, key string, m proto.Message) *federationv1.Record {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.seq++
	var body []byte
	if m != nil {
		body = encode(m)
	}
	return signed(s.name, s.name, kind, key, 1, s.seq, body)
}

// signed makes a record of origin, signed by anybody.
func signed(by, origin, kind, key string, epoch, seq uint64, body []byte) *federationv1.Record {
	r := &federationv1.Record{Origin: origin, Kind: kind, Key: key, Epoch: epoch, Seq: seq, TtlSeconds: 600, Body: body}
	protocol.Sign(r, func(msg []byte) []byte { return ed25519.Sign(signer(by), msg) })
	return r
}

func (s *said) cluster() *federationv1.Cluster {
	return &federationv1.Cluster{TrustDomain: s.name + ".mesh", Network: "amber", Gateways: []string{s.gateway}, FederationKey: public(s.name), Bundle: s.ca.pem}
}

func (s *said) member() *federationv1.Member {
	return memberOf(s.name, mesh.TrustDomain(s.name+".mesh"))
}

func memberOf(name string, td mesh.TrustDomain) *federationv1.Member {
	return &federationv1.Member{Name: name, TrustDomain: string(td), FederationKey: public(name)}
}

// speak starts a cluster that serves its record stream over mutual TLS.
func speak(t *testing.T, name, gateway string) *said {
	t.Helper()
	s := &said{name: name, gateway: gateway, ca: newAuthority(t, name), set: map[string]*xds.Resource{}, beat: 1, changed: make(chan struct{}), seq: 100}
	s.cert = s.ca.leaf(t, name, nil)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	s.addr = l.Addr().String()
	server := xds.New(xds.Config{Feed: func(xds.Client) (xds.Feed, func(), error) { return s, nil, nil }, Reg: prometheus.NewRegistry()})
	g := grpc.NewServer(grpc.Creds(credentials.NewTLS(&tls.Config{
		MinVersion: tls.VersionTLS13, NextProtos: []string{"h2"}, ClientAuth: tls.RequireAnyClientCert,
		GetCertificate: func(*tls.ClientHelloInfo) (*tls.Certificate, error) {
			s.mu.Lock()
			defer s.mu.Unlock()
			return s.cert, nil
		},
	})), grpc.MaxRecvMsgSize(xds.MaxRequestBytes))
	server.Register(g)
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	wg.Go(func() { _ = g.Serve(tracked{l, s}) })
	wg.Go(func() { // its beat
		for {
			select {
			case <-ctx.Done():
				return
			case <-time.After(300 * time.Millisecond):
				s.mu.Lock()
				s.turn()
				s.mu.Unlock()
			}
		}
	})
	t.Cleanup(func() { cancel(); g.Stop(); wg.Wait() })
	return s
}

// disk is a Log that forgets.
type disk struct{}

// Commit implements Log.
func (disk) Commit([]protocol.Action) error { return nil }

// Heard implements Log.
func (disk) Heard(map[mesh.ClusterID]time.Time) error { return nil }

// nothing exports nothing.
type nothing struct{ local *mesh.Cluster }

// Latest implements mesh.Snapshots.
func (n nothing) Latest() (*mesh.Snapshot, <-chan struct{}) {
	return &mesh.Snapshot{Local: n.local}, make(chan struct{})
}

// store is a Sink that keeps the newest input of each origin and looks after that of a victim.
type store struct {
	mu     sync.Mutex
	inputs map[string]mesh.Input
	victim string
	hurt   []string
}

// Report implements mesh.Sink.
func (s *store) Report(key string, in mesh.Input) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if was, known := s.inputs[key]; known && key == s.victim && count(was) > count(in) {
		s.hurt = append(s.hurt, fmt.Sprintf("%s had %d endpoints, has %d: %v", key, count(was), count(in), in.Problems))
	}
	if key == s.victim && len(in.Clusters) == 1 && in.Clusters[0].Freshness == mesh.Expired {
		s.hurt = append(s.hurt, key+" is expired")
	}
	s.inputs[key] = in
}

// Forget implements mesh.Sink.
func (s *store) Forget(key string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if key == s.victim {
		s.hurt = append(s.hurt, key+" is forgotten")
	}
	delete(s.inputs, key)
}

// Synced implements mesh.Sink.
func (s *store) Synced() {}

func (s *store) input(key string) mesh.Input {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.inputs[key]
}

func count(in mesh.Input) int {
	n := 0
	for _, i := range in.Imports {
		n += len(i.Endpoints)
	}
	return n
}

// listener is the cluster under attack: a real core, real peering, real TLS.
type listener struct {
	*Peering
	store   *store
	bundles trust.Bundles
	ca      authority
}

// listen starts cluster amber, whose members are reached through their gateways as the network would.
func listen(t *testing.T, members ...*said) *listener {
	t.Helper()
	const name = "amber"
	a := &listener{ca: newAuthority(t, name), store: &store{inputs: map[string]mesh.Input{}}}
	cert := a.ca.leaf(t, name, nil)
	local := &mesh.Cluster{
		ID: name, TrustDomain: name + ".mesh", Network: name, Gateways: []netip.AddrPort{netip.MustParseAddrPort("192.0.2.1:15443")},
		PodRanges: []netip.Prefix{netip.MustParsePrefix("10.1.0.0/16")}, ServiceRanges: []netip.Prefix{netip.MustParsePrefix("10.96.0.0/16")}, Roots: a.ca.pem,
	}
	var err error
	a.Peering, err = New(Config{
		Core: protocol.Config{
			Name: name, TrustDomain: local.TrustDomain, PublicKey: public(name), Sign: func(msg []byte) []byte { return ed25519.Sign(signer(name), msg) },
			Beat: 1000, Seed: 1, LateAfter: 2 * time.Second, ResyncAfter: 200 * time.Millisecond,
			MaxRecords: 400, MaxBytes: 8 << 20,
		},
		Log: disk{}, Local: local, Snapshots: nothing{local}, Sink: a.store, Policy: policy.Options{MaxServices: 100, MaxEndpoints: 1000},
		Trust: func(roots map[mesh.TrustDomain][]byte) { _ = a.bundles.Set(roots) },
		TLS: func(td mesh.TrustDomain) *tls.Config {
			return trust.ClientConfig(trust.Config{
				Local: func() (*tls.Certificate, error) { return cert, nil }, Bundles: &a.bundles, Authorize: trust.Exactly("spiffe://" + string(td) + "/isthmus/peer"),
			})
		},
		Dial: func(ctx context.Context, addr string) (net.Conn, error) {
			for _, m := range members {
				if m.gateway == addr {
					return (&net.Dialer{}).DialContext(ctx, "tcp", m.addr)
				}
			}
			if addr != "192.0.2.1:15443" { // our own gateway does no harm: it does not prove to be another
				t.Errorf("the control plane dialled %s", addr)
			}
			return nil, fmt.Errorf("%s is nobody's gateway", addr)
		},
		Logger: slog.New(slog.DiscardHandler), Reg: prometheus.NewRegistry(),
	})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() {
		defer close(done)
		if err := a.Run(ctx); err != nil {
			t.Error(err)
		}
	}()
	t.Cleanup(func() { cancel(); <-done })
	return a
}

// admit lets a cluster in.
func (a *listener) admit(t *testing.T, s *said) {
	t.Helper()
	record := s.record(protocol.KindCluster, "", s.cluster())
	s.say(record)
	if _, _, err := a.Admit(t.Context(), s.member(), record, false); err != nil {
		t.Fatalf("admit %s: %v", s.name, err)
	}
}

func (a *listener) peer(name string) (protocol.Peer, map[string]uint64) {
	st := a.Status()
	i := slices.IndexFunc(st.Peers, func(p protocol.Peer) bool { return string(p.Name) == name })
	if i < 0 {
		return protocol.Peer{}, nil
	}
	return st.Peers[i], st.Refused[mesh.ClusterID(name)]
}

// patience is how long a condition is waited for.
var patience = 30 * time.Second

// eventually waits for a condition and says what is missing.
func eventually(t *testing.T, what string, missing func() string) {
	t.Helper()
	last := ""
	for deadline := time.Now().Add(patience); ; {
		if last = missing(); last == "" {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("not in time: %s: %s", what, last)
		}
		time.Sleep(10 * time.Millisecond) // between polls of the condition
	}
}

// reasons prints counters.
func reasons(m map[string]uint64) string {
	var out []string
	for k, n := range m {
		out = append(out, fmt.Sprintf("%s %d", k, n))
	}
	slices.Sort(out)
	return strings.Join(out, ", ")
}
