package main

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"net"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	tlsv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/tls/v3"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/protobuf/proto"
	securityv1alpha1 "istio.io/api/security/v1alpha1"

	"github.com/isthmus-mesh/isthmus/api/admin"
	"github.com/isthmus-mesh/isthmus/discovery/mesh"
	"github.com/isthmus-mesh/isthmus/discovery/xds"
	"github.com/isthmus-mesh/isthmus/federation/trust"
)

// caller is what a proxy and its agent are to the roots: it has those that the control plane told it, and renews its
// certificate soon after another root signs, and often besides.
type caller struct {
	d     *daemonTest
	xds   *proxy
	token string
	// bundles are those of the newest ROOTCA.
	bundles trust.Bundles
	first   atomic.Pointer[[]byte] // root that signs, in PEM
	cert    atomic.Pointer[tls.Certificate]
	renewed atomic.Int64
}

func newCaller(t *testing.T, d *daemonTest) *caller {
	t.Helper()
	w := &caller{d: d, token: d.workloadToken(t, "default", "reviews", "reviews-1")}
	root, err := os.ReadFile(d.cfg.data("root-cert.pem"))
	if err := errors.Join(err, w.bundles.Set(map[mesh.TrustDomain][]byte{mesh.TrustDomain(d.cfg.TrustDomain): root})); err != nil {
		t.Fatal(err)
	}
	w.xds = connect(t, d, sidecar(t, d.cfg, "reviews", "default"), w.options(), nil)
	w.xds.waitFor(t, xds.SecretType, "ROOTCA", nil)
	if err := errors.Join(w.look(), w.renew(t.Context())); err != nil {
		t.Fatal(err)
	}
	return w
}

// options are those of a client that knows the control plane by the newest roots.
func (w *caller) options() []grpc.DialOption {
	cfg := trust.ClientConfig(trust.Config{Bundles: &w.bundles, Authorize: trust.Exactly("spiffe://" + w.d.cfg.TrustDomain + pathControlPlane)})
	cfg.ServerName = "xds." + w.d.cfg.TrustDomain
	return []grpc.DialOption{grpc.WithTransportCredentials(credentials.NewTLS(cfg)), grpc.WithPerRPCCredentials(bearer(w.token))}
}

// look takes the roots that the stream brought.
func (w *caller) look() error {
	s, v := new(tlsv3.Secret), new(tlsv3.SPIFFECertValidatorConfig)
	if err := proto.Unmarshal(w.xds.resource(xds.SecretType, "ROOTCA"), s); err != nil {
		return err
	}
	if err := s.GetValidationContext().GetCustomValidatorConfig().GetTypedConfig().UnmarshalTo(v); err != nil {
		return err
	}
	all := map[mesh.TrustDomain][]byte{}
	for _, x := range v.GetTrustDomains() {
		all[mesh.TrustDomain(x.GetName())] = []byte(x.GetTrustBundle().GetInlineString())
	}
	block, _ := pem.Decode(all[mesh.TrustDomain(w.d.cfg.TrustDomain)])
	if block == nil {
		return errors.New("no root of the own trust domain")
	}
	w.first.Store(&block.Bytes)
	return w.bundles.Set(all)
}

// renew gets a certificate, trusting the control plane by the roots that it told.
func (w *caller) renew(ctx context.Context) error {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return err
	}
	csr, err := x509.CreateCertificateRequest(rand.Reader, new(x509.CertificateRequest), key)
	if err != nil {
		return err
	}
	conn, err := grpc.NewClient(w.d.cfg.Listen, w.options()...)
	if err != nil {
		return err
	}
	defer conn.Close()
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	reply, err := securityv1alpha1.NewIstioCertificateServiceClient(conn).CreateCertificate(ctx, &securityv1alpha1.IstioCertificateRequest{
		Csr: string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: csr})),
	})
	if err != nil {
		return err
	}
	out := tls.Certificate{PrivateKey: key}
	for rest := []byte(strings.Join(reply.GetCertChain(), "\n")); ; {
		var block *pem.Block
		if block, rest = pem.Decode(rest); block == nil {
			break
		}
		out.Certificate = append(out.Certificate, block.Bytes)
	}
	w.cert.Store(&out)
	w.renewed.Add(1)
	return nil
}

// follow takes new roots as they come, until ctx ends.
func (w *caller) follow(ctx context.Context) error {
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for ctx.Err() == nil {
		<-tick.C
		if err := w.look(); err != nil {
			return err
		}
	}
	return nil
}

// live renews every so often, and when another root signs, until ctx ends.
func (w *caller) live(ctx context.Context, every time.Duration) error {
	look, renew := time.NewTicker(20*time.Millisecond), time.NewTicker(every)
	defer look.Stop()
	defer renew.Stop()
	var signed []byte
	for {
		now := *w.first.Load()
		select {
		case <-ctx.Done():
			return nil
		case <-look.C:
			if bytes.Equal(now, signed) {
				continue
			}
		case <-renew.C:
		}
		if err := w.renew(ctx); err != nil && ctx.Err() == nil {
			return fmt.Errorf("certificate of a workload of %s: %w", w.d.cfg.Cluster, err)
		}
		signed = now
	}
}

// call makes a connection to another workload, and has both sides prove who they are.
func (w *caller) call(to *caller) error {
	anybody := func(spiffeid.ID) error { return nil }
	local := func(w *caller) trust.Local { return func() (*tls.Certificate, error) { return w.cert.Load(), nil } }
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	defer l.Close()
	near, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		return err
	}
	far, err := l.Accept()
	if err != nil {
		return err
	}
	client := tls.Client(near, trust.ClientConfig(trust.Config{Local: local(w), Bundles: &w.bundles, Authorize: anybody}))
	server := tls.Server(far, trust.ServerConfig(trust.Config{Local: local(to), Bundles: &to.bundles, Authorize: anybody}))
	defer client.Close()
	defer server.Close()
	deadline := time.Now().Add(patience)
	if err := errors.Join(near.SetDeadline(deadline), far.SetDeadline(deadline)); err != nil {
		return err
	}
	answered := make(chan error, 1)
	go func() {
		b := make([]byte, 1)
		_, err := server.Read(b)
		if err == nil {
			_, err = server.Write(b)
		}
		if err != nil {
			far.Close()
		}
		answered <- err
	}()
	_, err = client.Write([]byte{7})
	if err == nil {
		_, err = client.Read(make([]byte, 1))
	}
	near.Close()
	return errors.Join(err, <-answered)
}

func (d *daemonTest) trust(t *testing.T) admin.Trust {
	t.Helper()
	var out admin.Trust
	if err := d.call("GET", "/v1/trust", nil, &out); err != nil {
		t.Fatal(err)
	}
	return out
}

// TestRotateRoots: roots of three clusters are rotated, and certificates renewed all the time, while workloads of all of
// them call each other. No call fails.
func TestRotateRoots(t *testing.T) {
	short := func(c *Config) { c.CA.MaxTTL, c.CA.Overlap = 8*time.Second, 8*time.Second }
	amber, _ := member(t, "amber", short)
	birch, _ := member(t, "birch", short)
	cedar, _ := member(t, "cedar", short)
	all := []*daemonTest{amber, birch, cedar}
	birch.mustJoin(t, amber)
	cedar.mustJoin(t, amber)
	settled(t, all...)

	ctx, stop := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	var calls, failed atomic.Int64
	var why atomic.Pointer[string]
	fail := func(err error) {
		text := err.Error()
		if failed.Add(1) == 1 {
			why.Store(&text)
		}
	}
	var workloads []*caller
	for _, d := range all {
		w := newCaller(t, d)
		workloads = append(workloads, w)
		wg.Go(func() {
			if err := w.follow(ctx); err != nil {
				fail(err)
			}
		})
		wg.Go(func() {
			if err := w.live(ctx, time.Second); err != nil {
				fail(err)
			}
		})
	}
	for i, from := range workloads {
		for j, to := range workloads {
			wg.Go(func() {
				tick := time.NewTicker(time.Duration(90+7*i+11*j) * time.Millisecond)
				defer tick.Stop()
				for ctx.Err() == nil {
					<-tick.C
					calls.Add(1)
					if err := from.call(to); err != nil && ctx.Err() == nil {
						fail(fmt.Errorf("%s calls %s: %w", from.d.cfg.Cluster, to.d.cfg.Cluster, err))
					}
				}
			})
		}
	}
	eventually(t, "workloads call", func() error {
		if calls.Load() < 20 {
			return errors.New("not yet")
		}
		return nil
	})
	for round, d := range []*daemonTest{amber, birch, cedar} {
		before := d.trust(t)
		if before.Phase == "steady" && len(before.Roots) != 1 {
			t.Fatalf("round %d: %s begins with %+v", round, d.cfg.Cluster, before)
		}
		if err := d.call("POST", "/v1/trust", admin.RotateRequest{}, nil); err != nil {
			t.Fatal(err)
		}
		eventually(t, d.cfg.Cluster+" signs with a new root", func() error {
			now := d.trust(t)
			if now.Roots[0].Fingerprint == before.Roots[0].Fingerprint {
				return fmt.Errorf("%+v", now)
			}
			return nil
		})
	}
	eventually(t, "old roots are gone everywhere", func() error {
		for _, d := range all {
			if now := d.trust(t); now.Phase != "steady" || len(now.Roots) != 1 || len(now.Domains) != 2 {
				return fmt.Errorf("%s: %+v", d.cfg.Cluster, now)
			}
			for _, other := range d.trust(t).Domains {
				if len(other.Roots) != 1 {
					return fmt.Errorf("%s trusts of %s %v", d.cfg.Cluster, other.Name, other.Roots)
				}
			}
		}
		return nil
	})
	stop()
	wg.Wait()
	if n := failed.Load(); n > 0 {
		t.Errorf("%d of %d calls failed, the first: %s", n, calls.Load(), *why.Load())
	}
	for _, w := range workloads {
		if w.renewed.Load() < 5 {
			t.Errorf("a workload of %s renewed its certificate %d times", w.d.cfg.Cluster, w.renewed.Load())
		}
	}
	t.Logf("%d calls", calls.Load())
	settled(t, all...)
	amber.stop(t) // what it signs with is kept
	again := start(t, amber.cfg)
	if got, want := again.trust(t).Roots, 1; len(got) != want {
		t.Errorf("after a restart: %+v", got)
	}
	settled(t, again, birch, cedar)
}
