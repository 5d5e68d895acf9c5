package sds_test

import (
	"context"
	"crypto/x509"
	"log/slog"
	"net"
	"path/filepath"
	"testing"
	"time"

	tlsv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/tls/v3"
	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	secretv3 "github.com/envoyproxy/go-control-plane/envoy/service/secret/v3"
	"go.uber.org/goleak"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	"github.com/isthmus-mesh/isthmus/cmd/isthmus-agent/internal/ca"
	"github.com/isthmus-mesh/isthmus/cmd/isthmus-agent/internal/catest"
	"github.com/isthmus-mesh/isthmus/cmd/isthmus-agent/internal/sds"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func start(t *testing.T) (*ca.Manager, secretv3.SecretDiscoveryServiceClient) {
	t.Helper()
	root := catest.New(t)
	const id = "spiffe://amber.mesh/ns/default/sa/web"
	m, err := ca.New(ca.Config{
		ID: id, TTL: time.Hour, Log: slog.New(slog.DiscardHandler), Roots: func() (*x509.CertPool, error) { return root.Pool(), nil },
		Sign: func(_ context.Context, csr []byte, ttl time.Duration, _ *ca.Certificate) ([]string, error) {
			return root.Sign(csr, id, ttl)
		},
	})
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(t.TempDir(), "sds.sock")
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	srv := grpc.NewServer()
	sds.New(m, slog.New(slog.DiscardHandler)).Register(srv)
	done := make(chan struct{})
	go func() { defer close(done); _ = srv.Serve(l) }()
	conn, err := grpc.NewClient("unix://"+path, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close(); srv.Stop(); <-done })
	return m, secretv3.NewSecretDiscoveryServiceClient(conn)
}

func obtain(t *testing.T, m *ca.Manager) {
	t.Helper()
	if err := m.Obtain(t.Context()); err != nil {
		t.Fatal(err)
	}
}

func TestDelta(t *testing.T) {
	m, client := start(t)
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	stream, err := client.DeltaSecrets(ctx)
	if err != nil {
		t.Fatal(err)
	}
	if err := stream.Send(&discoveryv3.DeltaDiscoveryRequest{TypeUrl: sds.TypeURL, ResourceNamesSubscribe: []string{"default", "other"}}); err != nil {
		t.Fatal(err)
	}
	r, err := stream.Recv()
	if err != nil || len(r.GetRemovedResources()) != 1 || r.GetRemovedResources()[0] != "other" {
		t.Fatalf("unknown name: %v, %v", r, err)
	}
	obtain(t, m)
	first, err := stream.Recv()
	if err != nil || len(first.GetResources()) != 1 {
		t.Fatal(first, err)
	}
	var secret tlsv3.Secret
	if err := first.GetResources()[0].GetResource().UnmarshalTo(&secret); err != nil || secret.GetName() != "default" {
		t.Fatal(&secret, err)
	}
	obtain(t, m)
	second, err := stream.Recv()
	if err != nil || second.GetResources()[0].GetVersion() == first.GetResources()[0].GetVersion() {
		t.Fatal("the renewed certificate has the old version", err)
	}
	// One that has the newest certificate gets nothing until the next.
	again, err := client.DeltaSecrets(ctx)
	if err != nil {
		t.Fatal(err)
	}
	version := second.GetResources()[0].GetVersion()
	if err := again.Send(&discoveryv3.DeltaDiscoveryRequest{
		TypeUrl: sds.TypeURL, ResourceNamesSubscribe: []string{"default"}, InitialResourceVersions: map[string]string{"default": version},
	}); err != nil {
		t.Fatal(err)
	}
	got := make(chan *discoveryv3.DeltaDiscoveryResponse, 1)
	go func() { r, _ := again.Recv(); got <- r }()
	select {
	case r := <-got:
		t.Fatalf("sent again: %v", r.GetResources())
	case <-time.After(50 * time.Millisecond):
	}
	obtain(t, m)
	if r := <-got; r.GetResources()[0].GetVersion() == version {
		t.Error("old version")
	}
}

func TestStateOfTheWorld(t *testing.T) {
	m, client := start(t)
	obtain(t, m)
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	stream, err := client.StreamSecrets(ctx)
	if err != nil {
		t.Fatal(err)
	}
	ask := &discoveryv3.DiscoveryRequest{TypeUrl: sds.TypeURL, ResourceNames: []string{"default"}}
	if err := stream.Send(ask); err != nil {
		t.Fatal(err)
	}
	first, err := stream.Recv()
	if err != nil || len(first.GetResources()) != 1 {
		t.Fatal(first, err)
	}
	ask.VersionInfo, ask.ResponseNonce = first.GetVersionInfo(), first.GetNonce()
	if err := stream.Send(ask); err != nil { // the acknowledgement is not answered
		t.Fatal(err)
	}
	obtain(t, m)
	second, err := stream.Recv()
	if err != nil || second.GetVersionInfo() == first.GetVersionInfo() {
		t.Fatal(second.GetVersionInfo(), err)
	}
}
