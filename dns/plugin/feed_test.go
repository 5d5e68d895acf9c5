package plugin

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"testing"
	"time"

	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"github.com/miekg/dns"
	"go.uber.org/goleak"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// ads is an isthmusd that serves DNS hosts: each stream gets what is there, then what is pushed.
type ads struct {
	discoveryv3.UnimplementedAggregatedDiscoveryServiceServer
	first  []*discoveryv3.Resource
	pushes chan *discoveryv3.DeltaDiscoveryResponse
}

func (a *ads) DeltaAggregatedResources(s discoveryv3.AggregatedDiscoveryService_DeltaAggregatedResourcesServer) error {
	if _, err := s.Recv(); err != nil {
		return err
	}
	if err := s.Send(&discoveryv3.DeltaDiscoveryResponse{TypeUrl: HostType, Resources: a.first, Nonce: "0"}); err != nil {
		return err
	}
	for {
		select {
		case r := <-a.pushes:
			r.TypeUrl, r.Nonce = HostType, "1"
			if err := s.Send(r); err != nil {
				return err
			}
		case <-s.Context().Done():
			return nil
		}
	}
}

// authority makes a certificate for isthmusd that is its own root.
func authority(t *testing.T) (root []byte, cert tls.Certificate) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "isthmusd"}, DNSNames: []string{"isthmusd.test"},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour), IsCA: true, BasicConstraintsValid: true,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}
}

func (a *ads) serve(t *testing.T, cert tls.Certificate) (string, func()) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	g := grpc.NewServer(grpc.Creds(credentials.NewServerTLSFromCert(&cert)))
	discoveryv3.RegisterAggregatedDiscoveryServiceServer(g, a)
	done := make(chan struct{})
	go func() { defer close(done); _ = g.Serve(l) }()
	stop := func() { g.Stop(); <-done }
	t.Cleanup(stop)
	return l.Addr().String(), stop
}

// eventually waits for an answer of so many records.
func eventually(t *testing.T, x *Isthmus, host string, rcode, records int) {
	t.Helper()
	for deadline := time.Now().Add(20 * time.Second); ; time.Sleep(2 * time.Millisecond) {
		m := answer(t, x, host, dns.TypeA)
		if m.Rcode == rcode && len(m.Answer) == records {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("%s: %v", host, m)
		}
	}
}

// TestFailover: the stream moves to another isthmusd, answers go on without any, and a late root is found.
func TestFailover(t *testing.T) {
	root, cert := authority(t)
	dir := t.TempDir()
	first := &ads{first: []*discoveryv3.Resource{host(t, "a.b.global", "240.0.0.1")}}
	second := &ads{first: []*discoveryv3.Resource{host(t, "a.b.global", "240.0.0.1")}, pushes: make(chan *discoveryv3.DeltaDiscoveryResponse)}
	one, stopOne := first.serve(t, cert)
	two, stopTwo := second.serve(t, cert)
	cfg := Config{
		Zones: []string{"global."}, Servers: []string{one, two}, ServerName: "isthmusd.test", Cluster: "amber", TTL: 5,
		Root: filepath.Join(dir, "root.pem"), Token: filepath.Join(dir, "token"), Cache: filepath.Join(dir, "hosts.cache"),
	}
	x := New(cfg)
	x.feed.keep.every = time.Millisecond
	if err := x.start(); err != nil {
		t.Fatal(err)
	}
	stopped := false
	defer func() {
		if !stopped {
			_ = x.stop()
		}
	}()
	eventually(t, x, "a.b.global.", dns.RcodeServerFailure, 0)
	for file, data := range map[string][]byte{cfg.Token: []byte("token"), cfg.Root: root} {
		if err := os.WriteFile(file, data, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	eventually(t, x, "a.b.global.", dns.RcodeSuccess, 1)
	stopOne()
	pushed := time.Now()
	second.pushes <- &discoveryv3.DeltaDiscoveryResponse{Resources: []*discoveryv3.Resource{host(t, "late.b.global", "240.0.0.2")}, RemovedResources: []string{"a.b.global"}}
	eventually(t, x, "late.b.global.", dns.RcodeSuccess, 1)
	eventually(t, x, "a.b.global.", dns.RcodeNameError, 0)
	t.Logf("from the push, reconnection included, to the answer: %v", time.Since(pushed))
	stopTwo()
	eventually(t, x, "late.b.global.", dns.RcodeSuccess, 1)
	stopped = true
	if err := x.stop(); err != nil {
		t.Fatal(err)
	}
	again := New(cfg)
	if !again.Ready() {
		t.Error("not ready with the data of the last run")
	}
	eventually(t, again, "late.b.global.", dns.RcodeSuccess, 1)
	eventually(t, again, "a.b.global.", dns.RcodeNameError, 0)
}

// TestKept: a file that is not whole is no file.
func TestKept(t *testing.T) {
	file := filepath.Join(t.TempDir(), "hosts.cache")
	x := New(Config{Zones: []string{"global."}, Cache: file, TTL: 5})
	for _, n := range []string{"a.b.global", "c.b.global"} {
		if err := x.feed.update(update(host(t, n, "240.0.0.1", "fd69::1"))); err != nil {
			t.Fatal(err)
		}
	}
	x.feed.keep.write()
	whole, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if kept, err := decode(whole); err != nil || len(kept) != 2 || len(kept["a.b.global"].GetAddresses()) != 2 {
		t.Fatalf("%v, %v", kept, err)
	}
	left, err := filepath.Glob(filepath.Join(filepath.Dir(file), ".*"))
	if err != nil || len(left) > 0 {
		t.Errorf("left behind: %v, %v", left, err)
	}
	for i := range whole {
		damaged := append([]byte(nil), whole...)
		damaged[i] ^= 1
		if _, err := decode(damaged); err == nil {
			t.Fatalf("octet %d is wrong and it is taken", i)
		}
		if _, err := decode(whole[:i]); err == nil {
			t.Fatalf("cut off at %d it is taken", i)
		}
	}
	if err := os.WriteFile(file, whole[:len(whole)-1], 0o600); err != nil {
		t.Fatal(err)
	}
	if New(x.cfg).Ready() {
		t.Error("ready with damaged data")
	}
	if err := os.Truncate(file, maxKept+1); err != nil {
		t.Fatal(err)
	}
	if _, err := read(file); !errors.Is(err, errTooLarge) {
		t.Errorf("too large: %v", err)
	}
}

func FuzzDecode(f *testing.F) {
	f.Add([]byte(keptMagic))
	f.Fuzz(func(_ *testing.T, data []byte) { _, _ = decode(data) })
}

// TestPanic: a part that panics is an error, and is started again.
func TestPanic(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	runs := 0
	again(ctx, "part", func(context.Context) error {
		if runs++; runs == 2 {
			cancel()
		}
		panic("bug")
	})
	if runs != 2 {
		t.Errorf("%d runs", runs)
	}
}
