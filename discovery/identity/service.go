package identity

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promauto"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"
	securityv1alpha1 "istio.io/api/security/v1alpha1"

	"github.com/isthmus-mesh/isthmus/discovery/mesh"
)

// Caller is who calls, as proven.
type Caller struct {
	Identity       string // SPIFFE id
	Namespace      string // empty for a control identity
	ServiceAccount string
	Pod            string // when a token says it
	By             Method
}

// Method is how a caller proved who it is.
type Method string

// The methods.
const (
	ByCertificate Method = "certificate"
	ByToken       Method = "token"
)

// ErrNoCredentials: the caller shows none that this authenticator looks at.
var ErrNoCredentials = errors.New("no credentials: call with a client certificate of this trust domain, or with authorization: Bearer and a workload token")

// Authenticator finds out who makes a gRPC call.
type Authenticator interface {
	// Authenticate fails with ErrNoCredentials when there is nothing for it to look at.
	Authenticate(ctx context.Context) (Caller, error)
}

// Certificates returns an Authenticator by TLS client certificates of the CA's trust domain. They are verified here
// whether or not TLS did it.
func (ca *CA) Certificates() Authenticator { return certificates{ca} }

// Tokens returns an Authenticator by workload tokens that the CA minted.
func (ca *CA) Tokens() Authenticator { return tokens{ca} }

// AnyOf returns an Authenticator that believes the first of them that recognises the caller.
func AnyOf(all ...Authenticator) Authenticator { return anyOf(all) }

type certificates struct{ ca *CA }

func (a certificates) Authenticate(ctx context.Context) (Caller, error) {
	p, ok := peer.FromContext(ctx)
	if !ok {
		return Caller{}, ErrNoCredentials
	}
	info, ok := p.AuthInfo.(credentials.TLSInfo)
	if !ok || len(info.State.PeerCertificates) == 0 {
		return Caller{}, ErrNoCredentials
	}
	chain := info.State.PeerCertificates
	id, _, err := x509svid.Verify(chain, a.ca.state.Load().bundle, x509svid.WithTime(a.ca.config.Now()))
	if err != nil {
		return Caller{}, fmt.Errorf("client certificate refused: %w", err)
	}
	if !slices.Contains(chain[0].ExtKeyUsage, x509.ExtKeyUsageClientAuth) {
		return Caller{}, fmt.Errorf("client certificate of %s refused: it is not made for clients", id)
	}
	c := Caller{Identity: id.String(), By: ByCertificate}
	if parts := strings.Split(id.Path(), "/"); len(parts) == 5 && parts[1] == "ns" && parts[3] == "sa" {
		c.Namespace, c.ServiceAccount = parts[2], parts[4]
	}
	return c, nil
}

type tokens struct{ ca *CA }

func (a tokens) Authenticate(ctx context.Context) (Caller, error) {
	values := metadata.ValueFromIncomingContext(ctx, "authorization")
	if len(values) == 0 {
		return Caller{}, ErrNoCredentials
	}
	scheme, token, ok := strings.Cut(values[0], " ")
	if len(values) > 1 || !ok || !strings.EqualFold(scheme, "bearer") {
		return Caller{}, fmt.Errorf("%w: want exactly one authorization: Bearer TOKEN", ErrToken)
	}
	w, err := a.ca.Verify(strings.TrimSpace(token))
	if err != nil {
		return Caller{}, err
	}
	return Caller{
		Identity:  mesh.SPIFFE(a.ca.TrustDomain(), w.Namespace, w.ServiceAccount),
		Namespace: w.Namespace, ServiceAccount: w.ServiceAccount, Pod: w.Pod, By: ByToken,
	}, nil
}

type anyOf []Authenticator

func (all anyOf) Authenticate(ctx context.Context) (Caller, error) {
	var errs []error
	for _, a := range all {
		c, err := a.Authenticate(ctx)
		if err == nil {
			return c, nil
		}
		if !errors.Is(err, ErrNoCredentials) {
			errs = append(errs, err)
		}
	}
	if len(errs) == 0 {
		return Caller{}, ErrNoCredentials
	}
	return Caller{}, errors.Join(errs...)
}

// ServiceConfig says who may have certificates signed.
type ServiceConfig struct {
	CA   *CA
	Auth Authenticator
	Log  *slog.Logger // nil: none
	Reg  prometheus.Registerer
}

// Service is istio.v1.auth.IstioCertificateService: each caller gets certificates of its own identity.
type Service struct {
	securityv1alpha1.UnimplementedIstioCertificateServiceServer
	ca       *CA
	auth     Authenticator
	log      *slog.Logger
	requests *prometheus.CounterVec
}

// NewService returns the service; it starts nothing.
func NewService(c ServiceConfig) *Service {
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	factory := promauto.With(c.Reg)
	factory.NewGaugeFunc(prometheus.GaugeOpts{
		Namespace: "isthmus", Subsystem: "identity", Name: "ca_expiry_timestamp_seconds",
		Help: "When the first certificate of the CA's chain expires, in seconds since 1970.",
	}, func() float64 { return float64(c.CA.Expires().Unix()) })
	return &Service{
		ca: c.CA, auth: c.Auth, log: c.Log,
		requests: factory.NewCounterVec(prometheus.CounterOpts{
			Namespace: "isthmus", Subsystem: "identity", Name: "certificate_requests_total",
			Help: "Certificate requests by how the caller authenticated (certificate, token, none) and result (signed, unauthenticated, forbidden, invalid, failed).",
		}, []string{"method", "result"}),
	}
}

// Register adds the service to a gRPC server.
func (s *Service) Register(r grpc.ServiceRegistrar) {
	securityv1alpha1.RegisterIstioCertificateServiceServer(r, s)
}

// CreateCertificate signs the public key of a request for the caller's own identity, and answers with the chain, leaf
// first and root last.
func (s *Service) CreateCertificate(ctx context.Context, req *securityv1alpha1.IstioCertificateRequest) (*securityv1alpha1.IstioCertificateResponse, error) {
	caller, err := s.auth.Authenticate(ctx)
	if err != nil {
		return nil, s.refuse("none", "unauthenticated", codes.Unauthenticated, err)
	}
	method := string(caller.By)
	if caller.Namespace == "" || caller.ServiceAccount == "" {
		return nil, s.refuse(method, "forbidden", codes.PermissionDenied, fmt.Errorf("%s is not a workload; only spiffe://%s/ns/NAMESPACE/sa/SERVICEACCOUNT gets certificates here", caller.Identity, s.ca.TrustDomain()))
	}
	if v, ok := req.GetMetadata().GetFields()["ImpersonatedIdentity"]; ok && v.GetStringValue() != caller.Identity {
		return nil, s.refuse(method, "forbidden", codes.PermissionDenied, fmt.Errorf("%s may not ask for another identity", caller.Identity))
	}
	// Seconds are capped before they are multiplied, so that no number wraps around.
	seconds := min(max(req.GetValidityDuration(), 0), int64(s.ca.config.MaxTTL/time.Second))
	chain, err := s.ca.Sign([]byte(req.GetCsr()), caller.Identity, time.Duration(seconds)*time.Second)
	if errors.Is(err, ErrCSR) {
		return nil, s.refuse(method, "invalid", codes.InvalidArgument, err)
	}
	if err != nil {
		s.log.Error("could not sign a certificate", "id", caller.Identity, "err", err)
		return nil, s.refuse(method, "failed", codes.Internal, err)
	}
	s.requests.WithLabelValues(method, "signed").Inc()
	s.log.Debug("signed a certificate", "id", caller.Identity, "by", method, "pod", caller.Pod)
	return &securityv1alpha1.IstioCertificateResponse{CertChain: chain}, nil
}

func (s *Service) refuse(method, result string, code codes.Code, err error) error {
	s.requests.WithLabelValues(method, result).Inc()
	s.log.Debug("certificate request refused", "method", method, "result", result, "err", err)
	return status.Error(code, strings.ToValidUTF8(err.Error(), "?"))
}
