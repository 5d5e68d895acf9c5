package features

import (
	"bufio"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"net"
	"net/url"
	"os"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/structpb"
	security "istio.io/api/security/v1alpha1"

	"github.com/isthmus-mesh/isthmus/e2e/lab"
)

// sign asks the control plane, from a pod, for a certificate with the identity id.
func (w *world) sign(token, id string, metadataFields map[string]any) (*x509.Certificate, error) {
	w.t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		w.t.Fatal(err)
	}
	uri, err := url.Parse(id)
	if err != nil {
		w.t.Fatal(err)
	}
	csr, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{URIs: []*url.URL{uri}}, key)
	if err != nil {
		w.t.Fatal(err)
	}
	fields, err := structpb.NewStruct(metadataFields)
	if err != nil {
		w.t.Fatal(err)
	}
	amber := w.Cluster("amber")
	root, err := os.ReadFile(amber.RootCert())
	if err != nil {
		w.t.Fatal(err)
	}
	pool := x509.NewCertPool()
	pool.AppendCertsFromPEM(root)
	conn, err := grpc.NewClient("passthrough:///"+amber.Spec.ControlPlane.String()+":15012",
		grpc.WithTransportCredentials(credentials.NewTLS(&tls.Config{RootCAs: pool, ServerName: "xds." + amber.Spec.TrustDomain})),
		grpc.WithContextDialer(func(ctx context.Context, addr string) (net.Conn, error) {
			return w.Node(client("legacy")).Dial(ctx, "tcp", addr)
		}))
	if err != nil {
		w.t.Fatal(err)
	}
	defer conn.Close()
	ctx, cancel := context.WithTimeout(w.t.Context(), 5*time.Second)
	defer cancel()
	reply, err := security.NewIstioCertificateServiceClient(conn).CreateCertificate(metadata.AppendToOutgoingContext(ctx, "authorization", "Bearer "+token),
		&security.IstioCertificateRequest{
			Csr:              string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: csr})),
			ValidityDuration: int64(10 * 365 * 24 * time.Hour / time.Second), Metadata: fields,
		})
	if err != nil {
		return nil, err
	}
	block, _ := pem.Decode([]byte(reply.GetCertChain()[0]))
	return x509.ParseCertificate(block.Bytes)
}

// serial is that of the certificate which a node's Envoy presents.
func (w *world) serial(ctx context.Context, node string) (string, error) {
	text, err := w.admin(ctx, node, "/certs")
	if err != nil {
		return "", err
	}
	var certs struct {
		Certificates []struct {
			Chain []struct {
				Serial string `json:"serial_number"`
			} `json:"cert_chain"`
		} `json:"certificates"`
	}
	if err := json.Unmarshal([]byte(text), &certs); err != nil {
		return "", err
	}
	for _, c := range certs.Certificates {
		if len(c.Chain) > 0 {
			return c.Chain[0].Serial, nil
		}
	}
	return "", errors.New("no certificate")
}

// echo answers every line that comes in on a port of a node.
func echo(t *testing.T, n *lab.Node, port int) {
	t.Helper()
	var l net.Listener
	if err := n.Do(func() (err error) {
		l, err = net.Listen("tcp", fmt.Sprintf(":%d", port))
		return err
	}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = l.Close() })
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				defer c.Close()
				for lines := bufio.NewScanner(c); lines.Scan(); {
					fmt.Fprintf(c, "%s\n", lines.Text())
				}
			}()
		}
	}()
}

// exchange sends one line and wants it back.
func exchange(c net.Conn, r *bufio.Reader, line string) error {
	_ = c.SetDeadline(time.Now().Add(2 * time.Second))
	if _, err := fmt.Fprintln(c, line); err != nil {
		return err
	}
	got, err := r.ReadString('\n')
	if err == nil && got != line+"\n" {
		err = fmt.Errorf("sent %q, got %q back", line, got)
	}
	return err
}

// TestIdentity: a token is good for its own identity alone, and certificates are replaced while traffic flows.
func TestIdentity(t *testing.T) {
	const life = 10 * time.Second
	w := up(t, "namespaces", func(l *lab.World) { l.Clusters[0].Agent = map[string]any{"certTTL": life.String()} })

	token := w.isthmus("amber", "token", "workload", "--namespace", "foo", "--service-account", "sleep", "--pod", "sleep")
	const own, other = "spiffe://amber.mesh/ns/foo/sa/sleep", "spiffe://amber.mesh/ns/bar/sa/httpbin"
	for _, asked := range []string{own, other} { // what a request says of itself counts for nothing
		cert, err := w.sign(token, asked, nil)
		switch {
		case err != nil && asked == own:
			t.Error(err)
		case err == nil && (len(cert.URIs) != 1 || cert.URIs[0].String() != own || len(cert.DNSNames) > 0):
			t.Errorf("asked for %s with the token of %s: got %v", asked, own, cert.URIs)
		case err == nil && time.Until(cert.NotAfter) > 24*time.Hour+time.Minute:
			t.Errorf("a certificate until %s", cert.NotAfter)
		}
	}
	if _, err := w.sign(token, other, map[string]any{"ImpersonatedIdentity": other}); status.Code(err) != codes.PermissionDenied {
		t.Errorf("impersonation: %v", err)
	}
	parts := strings.Split(token, ".")
	forged := w.isthmus("amber", "token", "workload", "--namespace", "bar", "--service-account", "httpbin", "--pod", "httpbin")
	for name, bad := range map[string]string{
		"none": "", "payload of another": parts[0] + "." + strings.Split(forged, ".")[1] + "." + parts[2], "no signature": parts[0] + "." + parts[1] + ".",
	} {
		if _, err := w.sign(bad, other, nil); status.Code(err) != codes.Unauthenticated {
			t.Errorf("token: %s: %v", name, err)
		}
	}

	echo(t, w.Node(server("foo")), 9000)
	var stream net.Conn
	w.eventually(func(ctx context.Context) (err error) {
		if stream, err = w.Node(client("bar")).Dial(ctx, "tcp", host("foo")+":9000"); err == nil {
			err = exchange(stream, bufio.NewReader(stream), "first")
		}
		return err
	})
	defer stream.Close()
	replies := bufio.NewReader(stream)
	var changes []time.Time
	s := w.underLoad(client("bar"), "http://"+host("foo")+":8000/", 50, 13*time.Second, func() {
		last, end := "", time.Now().Add(13*time.Second)
		ticker := time.NewTicker(100 * time.Millisecond)
		defer ticker.Stop()
		for time.Now().Before(end) {
			now, err := w.serial(t.Context(), server("foo"))
			if err != nil {
				t.Error(err)
			}
			if last != "" && now != last {
				changes = append(changes, time.Now())
			}
			last = now
			if err := exchange(stream, replies, now); err != nil {
				t.Errorf("the open stream after %d new certificates: %v", len(changes), err)
				return
			}
			<-ticker.C
		}
	})
	if s.Caller["spiffe://amber.mesh/ns/bar/sa/sleep"] != s.Requests {
		t.Errorf("the server saw %v", s.Caller)
	}
	if len(changes) < 2 || len(changes) > 3 {
		t.Fatalf("%d new certificates in 13 s, want one about every %s", len(changes), life/2)
	}
	if gap := changes[1].Sub(changes[0]); gap < life*4/10 || gap > life*7/10 {
		t.Errorf("certificates with a life of %s were replaced after %s", life, gap)
	}
}
