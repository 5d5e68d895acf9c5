package ads_test

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"path/filepath"
	"sync"
	"testing"
	"time"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	secretv3 "github.com/envoyproxy/go-control-plane/envoy/service/secret/v3"
	"go.uber.org/goleak"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/isthmus-mesh/isthmus/cmd/isthmus-agent/internal/ads"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// control answers each request with its own subscription as removed resources, and the node's id as a resource.
type control struct {
	discoveryv3.UnimplementedAggregatedDiscoveryServiceServer
}

func (control) DeltaAggregatedResources(s discoveryv3.AggregatedDiscoveryService_DeltaAggregatedResourcesServer) error {
	for {
		r, err := s.Recv()
		if err != nil {
			return nil
		}
		body, _ := anypb.New(r)
		if err := s.Send(&discoveryv3.DeltaDiscoveryResponse{TypeUrl: r.GetTypeUrl(), Resources: []*discoveryv3.Resource{{Name: "echo", Resource: body}}}); err != nil {
			return err
		}
	}
}

func (control) StreamAggregatedResources(s discoveryv3.AggregatedDiscoveryService_StreamAggregatedResourcesServer) error {
	r, err := s.Recv()
	if err != nil {
		return err
	}
	return s.Send(&discoveryv3.DiscoveryResponse{TypeUrl: r.GetTypeUrl(), VersionInfo: "1"})
}

func serve(t *testing.T, name string, register func(*grpc.Server), opts ...grpc.ServerOption) (target string, stop func()) {
	t.Helper()
	path := filepath.Join(t.TempDir(), name)
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	s := grpc.NewServer(opts...)
	register(s)
	done := make(chan struct{})
	go func() { defer close(done); _ = s.Serve(l) }()
	stop = sync.OnceFunc(func() { s.Stop(); <-done })
	t.Cleanup(stop)
	return "unix://" + path, stop
}

func dial(t *testing.T, target string) *grpc.ClientConn {
	t.Helper()
	conn, err := grpc.NewClient(target, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	return conn
}

func TestForwards(t *testing.T) {
	up, stopUp := serve(t, "up", func(s *grpc.Server) { discoveryv3.RegisterAggregatedDiscoveryServiceServer(s, control{}) })
	fails := 2
	proxy := ads.New(ads.Config{Log: slog.New(slog.DiscardHandler), Connect: func(context.Context) (*grpc.ClientConn, error) {
		if fails--; fails >= 0 {
			return nil, errors.New("away")
		}
		return dial(t, up), nil
	}})
	down, _ := serve(t, "down", func(*grpc.Server) {}, proxy.ServerOptions()...)
	conn := dial(t, down)
	defer conn.Close()
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	client := discoveryv3.NewAggregatedDiscoveryServiceClient(conn)
	stream, err := client.DeltaAggregatedResources(ctx)
	if err != nil {
		t.Fatal(err)
	}
	for _, typ := range []string{"a", "b"} {
		ask := &discoveryv3.DeltaDiscoveryRequest{TypeUrl: typ, Node: &corev3.Node{Id: "sidecar~1"}, InitialResourceVersions: map[string]string{"x": "1"}}
		if err := stream.Send(ask); err != nil {
			t.Fatal(err)
		}
		r, err := stream.Recv()
		if err != nil {
			t.Fatal(err)
		}
		var echo discoveryv3.DeltaDiscoveryRequest
		if err := r.GetResources()[0].GetResource().UnmarshalTo(&echo); err != nil || !proto.Equal(&echo, ask) {
			t.Fatalf("changed on the way: %v, %v", &echo, err)
		}
	}
	if proxy.Connected() != 1 {
		t.Errorf("%d streams", proxy.Connected())
	}
	sotw, err := client.StreamAggregatedResources(ctx)
	if err != nil {
		t.Fatal(err)
	}
	if err := sotw.Send(&discoveryv3.DiscoveryRequest{TypeUrl: "a"}); err != nil {
		t.Fatal(err)
	}
	if r, err := sotw.Recv(); err != nil || r.GetVersionInfo() != "1" {
		t.Fatal(r, err)
	}
	if _, err := sotw.Recv(); status.Code(err) != codes.Unavailable {
		t.Errorf("an ended stream gives %v", err)
	}
	if _, err := secretv3.NewSecretDiscoveryServiceClient(conn).FetchSecrets(ctx, &discoveryv3.DiscoveryRequest{}); status.Code(err) != codes.Unimplemented {
		t.Errorf("another method gives %v", err)
	}
	stopUp()
	if _, err := stream.Recv(); status.Code(err) != codes.Unavailable {
		t.Errorf("loss of the control plane gives %v", err)
	}
}
