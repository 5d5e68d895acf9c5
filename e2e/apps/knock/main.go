// Command knock is a client of east-west gateways that makes by hand what a sidecar makes: a TLS connection with a
// server name that says where to go, application protocols of the mesh and a certificate of the mesh, and one HTTP
// request in it. It says what came of it.
package main

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"flag"
	"fmt"
	"io"
	"math/big"
	"net"
	"net/http"
	"net/url"
	"os"
	"strings"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/metadata"
	security "istio.io/api/security/v1alpha1"
)

const usage = `knock --gateway HOST:PORT --sni NAME [flags]

It prints "answered STATUS by IDENTITY over PROTOCOL: BODY", or "closed at STEP: REASON" where STEP is
dial, handshake, identity or request. In a pod of the mesh it gets its certificate as the proxy does.

`

// options are the flags.
type options struct {
	gateway, sni, alpn, path, host string
	plain                          bool
	as                             string // whose certificate: mesh, nobody or stranger
	roots                          string // files with commas between
	ca, caRoot, token, cluster     string
	timeout                        time.Duration
}

func main() {
	o := options{}
	f := flag.NewFlagSet("knock", flag.ExitOnError)
	f.StringVar(&o.gateway, "gateway", "", "address of the gateway")
	f.StringVar(&o.sni, "sni", "", "server name; empty sends none")
	f.StringVar(&o.alpn, "alpn", "istio-peer-exchange,istio", "application protocols, commas between; empty sends none")
	f.StringVar(&o.path, "path", "/", "what to ask for")
	f.StringVar(&o.host, "host", "knock", "Host of the request")
	f.BoolVar(&o.plain, "plain", false, "send the request without TLS")
	f.StringVar(&o.as, "as", "mesh", "certificate to show: mesh; nobody: none; stranger: one of a root of its own")
	f.StringVar(&o.roots, "roots", "", "PEM files of roots that the server's certificate must be of, commas between; empty: any")
	f.StringVar(&o.ca, "ca", first(os.Getenv("CA_ADDR"), "isthmusd.istio-system.svc:15012"), "certificate authority of the mesh")
	f.StringVar(&o.caRoot, "ca-root", "/var/run/secrets/istio/root-cert.pem", "PEM file of its root")
	f.StringVar(&o.token, "token", "/var/run/secrets/tokens/istio-token", "file of the service account token for it")
	f.StringVar(&o.cluster, "cluster", first(os.Getenv("ISTIO_META_CLUSTER_ID"), "Kubernetes"), "cluster that the token is of")
	f.DurationVar(&o.timeout, "timeout", 5*time.Second, "of everything together")
	f.Usage = func() { fmt.Fprint(f.Output(), usage); f.PrintDefaults() }
	_ = f.Parse(os.Args[1:])
	if o.gateway == "" {
		f.Usage()
		os.Exit(2)
	}
	ctx, cancel := context.WithTimeout(context.Background(), o.timeout)
	defer cancel()
	said, err := knock(ctx, o)
	var c *closed
	switch {
	case errors.As(err, &c):
		fmt.Println(c)
	case err != nil:
		fmt.Fprintln(os.Stderr, "knock:", err)
		os.Exit(1)
	default:
		fmt.Println(said)
	}
}

func first(a, b string) string {
	if a != "" {
		return a
	}
	return b
}

// closed says where a gateway, or the pod behind it, gave up on us.
type closed struct {
	step string
	err  error
}

func (c *closed) Error() string { return fmt.Sprintf("closed at %s: %v", c.step, c.err) }
func (c *closed) Unwrap() error { return c.err }

// knock connects, asks and says what was answered. Its error is a *closed unless the trouble is on this side.
func knock(ctx context.Context, o options) (string, error) {
	cfg, err := o.tls(ctx)
	if err != nil {
		return "", err
	}
	conn, err := (&net.Dialer{}).DialContext(ctx, "tcp", o.gateway)
	if err != nil {
		return "", &closed{"dial", err}
	}
	defer conn.Close()
	if deadline, ok := ctx.Deadline(); ok {
		_ = conn.SetDeadline(deadline)
	}
	who, proto := "nobody", ""
	if !o.plain {
		t := tls.Client(conn, cfg)
		if err := t.HandshakeContext(ctx); err != nil {
			step := "handshake"
			if errors.Is(err, errIdentity) {
				step = "identity"
			}
			return "", &closed{step, err}
		}
		state := t.ConnectionState()
		conn, who, proto = t, identity(state.PeerCertificates[0]), state.NegotiatedProtocol
	}
	status, body, err := ask(ctx, conn, proto == "h2" || proto == "istio-h2", o.host, o.path)
	if err != nil {
		return "", &closed{"request", err}
	}
	return fmt.Sprintf("answered %d by %s over %q: %s", status, who, proto, strings.Join(strings.Fields(body), " ")), nil
}

// ask sends one request over the connection, as HTTP/2 or HTTP/1.1.
func ask(ctx context.Context, conn net.Conn, two bool, host, path string) (int, string, error) {
	var protocols http.Protocols
	protocols.SetHTTP1(!two)
	protocols.SetUnencryptedHTTP2(two) // the connection is encrypted already
	client := http.Client{Transport: &http.Transport{
		Protocols: &protocols, DisableKeepAlives: !two,
		DialContext: func(context.Context, string, string) (net.Conn, error) { return conn, nil },
	}}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+host+path, nil)
	if err != nil {
		return 0, "", err
	}
	resp, err := client.Do(req)
	if err != nil {
		return 0, "", err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(io.LimitReader(resp.Body, 64<<10))
	return resp.StatusCode, string(body), err
}

func identity(c *x509.Certificate) string {
	if len(c.URIs) == 0 {
		return "nobody"
	}
	return c.URIs[0].String()
}

var errIdentity = errors.New("the server's certificate is of no root that is trusted")

func (o options) tls(ctx context.Context) (*tls.Config, error) {
	if o.plain {
		return nil, nil
	}
	cfg := &tls.Config{ServerName: o.sni, InsecureSkipVerify: true} // names are SPIFFE ids: verified below
	if o.alpn != "" {
		cfg.NextProtos = strings.Split(o.alpn, ",")
	}
	if o.roots != "" {
		pool := x509.NewCertPool()
		for _, name := range strings.Split(o.roots, ",") {
			text, err := os.ReadFile(name)
			if err != nil {
				return nil, err
			}
			if !pool.AppendCertsFromPEM(text) {
				return nil, fmt.Errorf("%s has no certificate", name)
			}
		}
		cfg.VerifyConnection = func(s tls.ConnectionState) error { return verify(s.PeerCertificates, pool) }
	}
	switch o.as {
	case "nobody":
		return cfg, nil
	case "stranger":
		c, err := stranger()
		cfg.Certificates = []tls.Certificate{c}
		return cfg, err
	case "mesh":
		c, err := o.certificate(ctx)
		cfg.Certificates = []tls.Certificate{c}
		return cfg, err
	}
	return nil, fmt.Errorf("--as %s: say mesh, nobody or stranger", o.as)
}

func verify(chain []*x509.Certificate, roots *x509.CertPool) error {
	between := x509.NewCertPool()
	for _, c := range chain[1:] {
		between.AddCert(c)
	}
	if _, err := chain[0].Verify(x509.VerifyOptions{Roots: roots, Intermediates: between}); err != nil {
		return fmt.Errorf("%w: %w", errIdentity, err)
	}
	return nil
}

// certificate asks the mesh for one, with the service account's token as proof.
func (o options) certificate(ctx context.Context) (none tls.Certificate, err error) {
	token, err := os.ReadFile(o.token)
	if err != nil {
		return none, err
	}
	root, err := os.ReadFile(o.caRoot)
	if err != nil {
		return none, err
	}
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(root) {
		return none, fmt.Errorf("%s has no certificate", o.caRoot)
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return none, err
	}
	csr, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, key)
	if err != nil {
		return none, err
	}
	host, _, err := net.SplitHostPort(o.ca)
	if err != nil {
		return none, err
	}
	conn, err := grpc.NewClient("passthrough:///"+o.ca, grpc.WithTransportCredentials(credentials.NewTLS(&tls.Config{RootCAs: pool, ServerName: host})))
	if err != nil {
		return none, err
	}
	defer conn.Close()
	ctx = metadata.AppendToOutgoingContext(ctx, "authorization", "Bearer "+strings.TrimSpace(string(token)), "clusterid", o.cluster)
	resp, err := security.NewIstioCertificateServiceClient(conn).CreateCertificate(ctx, &security.IstioCertificateRequest{
		Csr: string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: csr})), ValidityDuration: 3600,
	})
	if err != nil {
		return none, fmt.Errorf("certificate of %s: %w", o.ca, err)
	}
	return pair([]byte(strings.Join(resp.CertChain, "\n")), key)
}

func pair(chain []byte, key crypto.Signer) (none tls.Certificate, err error) {
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return none, err
	}
	return tls.X509KeyPair(chain, pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}))
}

// stranger makes a certificate that claims an identity of the mesh and is of no root that the mesh knows.
func stranger() (none tls.Certificate, err error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return none, err
	}
	id := &url.URL{Scheme: "spiffe", Host: "c1.mesh", Path: "/ns/sample/sa/sleep"}
	c := &x509.Certificate{
		SerialNumber: big.NewInt(1), URIs: []*url.URL{id}, NotBefore: time.Now().Add(-time.Minute), NotAfter: time.Now().Add(time.Hour),
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
	}
	der, err := x509.CreateCertificate(rand.Reader, c, c, key.Public(), key)
	if err != nil {
		return none, err
	}
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}, nil
}
