// Package sds gives Envoy the workload's certificate over the secret discovery service, in both its stream kinds. It
// knows one secret, "default", and no other.
package sds

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"log/slog"
	"slices"
	"strconv"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	tlsv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/tls/v3"
	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	secretv3 "github.com/envoyproxy/go-control-plane/envoy/service/secret/v3"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/isthmus-mesh/isthmus/cmd/isthmus-agent/internal/ca"
)

// Name is the secret's resource name, as Istio's proxies ask for it.
const Name = "default"

// TypeURL is the type of the resource.
const TypeURL = "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.Secret"

// Certificates gives the newest certificate, nil before the first, and a channel closed when it is outdated.
type Certificates interface {
	Current() (*ca.Certificate, <-chan struct{})
}

// Server answers SDS.
type Server struct {
	secretv3.UnimplementedSecretDiscoveryServiceServer
	certs Certificates
	log   *slog.Logger
}

// New returns a Server; it starts nothing.
func New(certs Certificates, log *slog.Logger) *Server { return &Server{certs: certs, log: log} }

// Register adds the service to s.
func (s *Server) Register(r grpc.ServiceRegistrar) {
	secretv3.RegisterSecretDiscoveryServiceServer(r, s)
}

// Secret returns the resource and its version for a certificate.
func Secret(c *ca.Certificate) (*anypb.Any, string, error) {
	body, err := anypb.New(&tlsv3.Secret{Name: Name, Type: &tlsv3.Secret_TlsCertificate{TlsCertificate: &tlsv3.TlsCertificate{
		CertificateChain: inline(c.Chain), PrivateKey: inline(c.Key),
	}}})
	if err != nil {
		return nil, "", err
	}
	sum := sha256.Sum256(c.Chain)
	return body, hex.EncodeToString(sum[:8]), nil
}

func inline(data []byte) *corev3.DataSource {
	return &corev3.DataSource{Specifier: &corev3.DataSource_InlineBytes{InlineBytes: data}}
}

// receive turns Recv into a channel that is closed at the stream's end.
func receive[T any](ctx context.Context, recv func() (T, error)) <-chan T {
	out := make(chan T)
	go func() {
		defer close(out)
		for {
			m, err := recv()
			if err != nil {
				return
			}
			select {
			case out <- m:
			case <-ctx.Done():
				return
			}
		}
	}()
	return out
}

// StreamSecrets serves the state-of-the-world kind.
func (s *Server) StreamSecrets(stream secretv3.SecretDiscoveryService_StreamSecretsServer) error {
	requests := receive(stream.Context(), stream.Recv)
	wanted, sent, nonce := false, "", 0
	for {
		cert, changed := s.certs.Current()
		if wanted && cert != nil {
			body, version, err := Secret(cert)
			if err != nil {
				return status.Errorf(codes.Internal, "encode secret: %v", err)
			}
			if version != sent {
				nonce++
				if err := stream.Send(&discoveryv3.DiscoveryResponse{
					VersionInfo: version, Resources: []*anypb.Any{body}, TypeUrl: TypeURL, Nonce: strconv.Itoa(nonce),
				}); err != nil {
					return err
				}
				sent = version
			}
		}
		select {
		case <-stream.Context().Done():
			return nil
		case <-changed:
		case r, ok := <-requests:
			if !ok {
				return nil
			}
			s.nack(r.GetErrorDetail().GetMessage())
			if r.GetResponseNonce() == "" && r.GetVersionInfo() != "" {
				sent = r.GetVersionInfo() // Envoy came back with what it has
			}
			wanted = slices.Contains(r.GetResourceNames(), Name)
		}
	}
}

// DeltaSecrets serves the incremental kind.
func (s *Server) DeltaSecrets(stream secretv3.SecretDiscoveryService_DeltaSecretsServer) error {
	requests := receive(stream.Context(), stream.Recv)
	wanted, sent, nonce := false, "", 0
	send := func(r *discoveryv3.DeltaDiscoveryResponse) error {
		nonce++
		r.TypeUrl, r.Nonce = TypeURL, strconv.Itoa(nonce)
		return stream.Send(r)
	}
	for {
		cert, changed := s.certs.Current()
		if wanted && cert != nil {
			body, version, err := Secret(cert)
			if err != nil {
				return status.Errorf(codes.Internal, "encode secret: %v", err)
			}
			if version != sent {
				if err := send(&discoveryv3.DeltaDiscoveryResponse{
					SystemVersionInfo: version, Resources: []*discoveryv3.Resource{{Name: Name, Version: version, Resource: body}},
				}); err != nil {
					return err
				}
				sent = version
			}
		}
		select {
		case <-stream.Context().Done():
			return nil
		case <-changed:
		case r, ok := <-requests:
			if !ok {
				return nil
			}
			s.nack(r.GetErrorDetail().GetMessage())
			var unknown []string
			for _, name := range r.GetResourceNamesSubscribe() {
				if name != Name {
					unknown = append(unknown, name)
					continue
				}
				wanted, sent = true, r.GetInitialResourceVersions()[Name]
			}
			if slices.Contains(r.GetResourceNamesUnsubscribe(), Name) {
				wanted, sent = false, ""
			}
			if len(unknown) > 0 {
				s.log.Warn("unknown secret asked for", "names", unknown)
				if err := send(&discoveryv3.DeltaDiscoveryResponse{RemovedResources: unknown}); err != nil {
					return err
				}
			}
		}
	}
}

func (s *Server) nack(text string) {
	if text != "" {
		s.log.Warn("certificate refused by the proxy", "err", text)
	}
}
