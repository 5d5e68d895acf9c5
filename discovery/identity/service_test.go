package identity

import (
	"context"
	"crypto/ecdsa"
	"crypto/hmac"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"errors"
	"maps"
	"net"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/go-jose/go-jose/v4/jwt"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/structpb"
	securityv1alpha1 "istio.io/api/security/v1alpha1"
)

var workload = Workload{Namespace: "default", ServiceAccount: "reviews", Pod: "reviews-v1-abc"}

func TestTokens(t *testing.T) {
	now := time.Now()
	ca := newCA(t, func(c *Config) { c.Now = func() time.Time { return now } })
	token, err := ca.Mint(workload, time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	if got, err := ca.Verify(token); err != nil || got != workload {
		t.Errorf("%+v, %v", got, err)
	}
	plain := Workload{Namespace: "default", ServiceAccount: "reviews"}
	without, _ := ca.Mint(plain, 1000*time.Hour)
	if got, err := ca.Verify(without); err != nil || got != plain {
		t.Errorf("%+v, %v", got, err)
	}
	now = now.Add(time.Hour + time.Second)
	if _, err := ca.Verify(token); !errors.Is(err, ErrToken) || !strings.Contains(err.Error(), "expired") {
		t.Errorf("expired: %v", err)
	}
	now = now.Add(MaxTokenTTL)
	if _, err := ca.Verify(without); err == nil {
		t.Error("the life of a token is not capped")
	}
	for _, w := range []Workload{{}, {Namespace: "default"}, {Namespace: "a.b", ServiceAccount: "x"}, {Namespace: "default", ServiceAccount: "x:y"}, {Namespace: "a/b", ServiceAccount: "x"}, {Namespace: "default", ServiceAccount: "x", Pod: "A"}} {
		if _, err := ca.Mint(w, time.Hour); err == nil {
			t.Errorf("minted for %+v", w)
		}
	}
	if _, err := ca.Mint(workload, 0); err == nil {
		t.Error("minted for no time")
	}
}

func TestTokenRefused(t *testing.T) {
	ca, other := newCA(t, nil), newCA(t, nil)
	base := map[string]any{
		"iss": "spiffe://amber.mesh", "sub": "system:serviceaccount:default:reviews", "aud": []string{Audience}, "exp": time.Now().Add(time.Hour).Unix(),
		"kubernetes.io": map[string]any{"namespace": "default", "serviceaccount": map[string]any{"name": "reviews"}},
	}
	mint := func(alg jose.SignatureAlgorithm, key any, kid string, change map[string]any) string {
		signer, err := jose.NewSigner(jose.SigningKey{Algorithm: alg, Key: key}, (&jose.SignerOptions{}).WithHeader("kid", kid))
		if err != nil {
			t.Fatal(err)
		}
		c := maps.Clone(base)
		for k, v := range change {
			if c[k] = v; v == nil {
				delete(c, k)
			}
		}
		out, err := jwt.Signed(signer).Claims(c).Serialize()
		if err != nil {
			t.Fatal(err)
		}
		return out
	}
	own := func(change map[string]any) string { return mint(jose.ES256, ca.tokens.signer(), ca.tokens.id, change) }
	if _, err := ca.Verify(own(nil)); err != nil {
		t.Fatal(err)
	}
	good := own(nil)
	parts := strings.Split(good, ".")
	b64 := base64.RawURLEncoding
	none := b64.EncodeToString([]byte(`{"alg":"none","kid":"`+ca.tokens.id+`"}`)) + "." + parts[1] + "."
	// The public key taken for an HMAC secret, a classic.
	der, _ := x509.MarshalPKIXPublicKey(ca.TokenKey())
	head := b64.EncodeToString([]byte(`{"alg":"HS256","kid":"` + ca.tokens.id + `"}`))
	mac := hmac.New(sha256.New, der)
	mac.Write([]byte(head + "." + parts[1]))
	confused := head + "." + parts[1] + "." + b64.EncodeToString(mac.Sum(nil))
	elsewhere, _ := other.Mint(workload, time.Hour)
	cases := map[string]struct{ token, want string }{
		"empty":         {"", "not a JWT"},
		"garbage":       {"a.b.c", "not a JWT"},
		"large":         {strings.Repeat("a", MaxToken+1), "at most"},
		"cut":           {good[:len(good)-2], "signature"},
		"signature":     {parts[0] + "." + parts[1] + "." + b64.EncodeToString(make([]byte, 64)), "signature"},
		"none":          {none, "ES256"},
		"confused":      {confused, "ES256"},
		"other CA":      {elsewhere, "not minted by"},
		"other key":     {mint(jose.ES256, other.tokens.signer(), ca.tokens.id, nil), "signature"},
		"other kid":     {mint(jose.ES256, ca.tokens.signer(), "x", nil), "not minted by"},
		"audience":      {own(map[string]any{"aud": []string{"vault"}}), "audience"},
		"no audience":   {own(map[string]any{"aud": nil}), "audience"},
		"issuer":        {own(map[string]any{"iss": "spiffe://birch.mesh"}), "refused"},
		"no expiry":     {own(map[string]any{"exp": nil}), "never expires"},
		"expired":       {own(map[string]any{"exp": time.Now().Add(-time.Second).Unix()}), "expired"},
		"not yet":       {own(map[string]any{"nbf": time.Now().Add(time.Hour).Unix()}), "refused"},
		"subject":       {own(map[string]any{"sub": "system:serviceaccount:default:admin"}), "subject"},
		"no account":    {own(map[string]any{"kubernetes.io": nil}), "subject"},
		"wrong type":    {own(map[string]any{"kubernetes.io": "x"}), "claims"},
		"path in names": {own(map[string]any{"sub": "system:serviceaccount:default:../x", "kubernetes.io": map[string]any{"namespace": "default", "serviceaccount": map[string]any{"name": "../x"}}}), "subject"},
	}
	for name, c := range cases {
		t.Run(name, func(t *testing.T) {
			w, err := ca.Verify(c.token)
			if !errors.Is(err, ErrToken) || !strings.Contains(err.Error(), c.want) {
				t.Errorf("got %+v, %v, want %q", w, err, c.want)
			}
		})
	}
}

// serve runs the service over TLS on loopback and returns a way to call it.
func serve(t *testing.T, ca *CA, reg prometheus.Registerer) func(client *tls.Certificate, token string, req *securityv1alpha1.IstioCertificateRequest) (*securityv1alpha1.IstioCertificateResponse, error) {
	t.Helper()
	own, err := ca.Rotating("spiffe://amber.mesh/isthmus/controlplane", []string{"xds.amber.mesh"}, 0)
	if err != nil {
		t.Fatal(err)
	}
	server := grpc.NewServer(grpc.Creds(credentials.NewTLS(&tls.Config{GetCertificate: own.GetCertificate, ClientAuth: tls.RequestClientCert, MinVersion: tls.VersionTLS13})))
	NewService(ServiceConfig{CA: ca, Auth: AnyOf(ca.Certificates(), ca.Tokens()), Reg: reg}).Register(server)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	wg.Go(func() { _ = server.Serve(l) })
	t.Cleanup(func() { server.Stop(); wg.Wait() })
	return func(client *tls.Certificate, token string, req *securityv1alpha1.IstioCertificateRequest) (*securityv1alpha1.IstioCertificateResponse, error) {
		config := &tls.Config{RootCAs: pool(ca.Authority().roots), ServerName: "xds.amber.mesh"}
		if client != nil {
			config.Certificates = []tls.Certificate{*client}
		}
		conn, err := grpc.NewClient(l.Addr().String(), grpc.WithTransportCredentials(credentials.NewTLS(config)))
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
		defer cancel()
		if token != "" {
			ctx = metadata.AppendToOutgoingContext(ctx, "authorization", token)
		}
		return securityv1alpha1.NewIstioCertificateServiceClient(conn).CreateCertificate(ctx, req)
	}
}

func TestService(t *testing.T) {
	ca, other := newCA(t, nil), newCA(t, nil)
	reg := prometheus.NewRegistry()
	call := serve(t, ca, reg)
	token, err := ca.Mint(workload, time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	key := ecKey(t)
	good := string(csr(t, key, nil))

	// A token gets the first certificate, that certificate the next one.
	resp, err := call(nil, "Bearer "+token, &securityv1alpha1.IstioCertificateRequest{Csr: good, ValidityDuration: 3600})
	if err != nil || len(resp.GetCertChain()) != 2 {
		t.Fatalf("by token: %v, %v", resp, err)
	}
	leaf, root := parse(t, resp.GetCertChain()[0]), parse(t, resp.GetCertChain()[1])
	if leaf.URIs[0].String() != reviews || !root.Equal(ca.Root()) || time.Until(leaf.NotAfter) > time.Hour {
		t.Errorf("leaf %v until %s", leaf.URIs, leaf.NotAfter)
	}
	mine := &tls.Certificate{Certificate: [][]byte{leaf.Raw}, PrivateKey: key}
	resp, err = call(mine, "", &securityv1alpha1.IstioCertificateRequest{Csr: good, ValidityDuration: 1 << 62})
	if err != nil {
		t.Fatal(err)
	}
	if leaf := parse(t, resp.GetCertChain()[0]); leaf.URIs[0].String() != reviews || time.Until(leaf.NotAfter) > 7*24*time.Hour {
		t.Errorf("by certificate: %v until %s", leaf.URIs, leaf.NotAfter)
	}

	issue := func(ca *CA, id string) *tls.Certificate {
		c, err := ca.Issue(id, nil, 0)
		if err != nil {
			t.Fatal(err)
		}
		return &c
	}
	expired := func() *tls.Certificate {
		past := newCA(t, func(c *Config) { c.Now = func() time.Time { return time.Now().Add(-48 * time.Hour) } })
		past.state.Store(ca.state.Load())
		return issue(past, reviews)
	}()
	foreign, _ := other.Mint(workload, time.Hour)
	impersonate, _ := structpb.NewStruct(map[string]any{"ImpersonatedIdentity": "spiffe://amber.mesh/ns/default/sa/admin"})
	self, _ := structpb.NewStruct(map[string]any{"ImpersonatedIdentity": reviews})
	cases := map[string]struct {
		cert  *tls.Certificate
		token string
		csr   string
		meta  *structpb.Struct
		want  codes.Code
	}{
		"nobody":                 {want: codes.Unauthenticated},
		"basic":                  {token: "Basic abc", want: codes.Unauthenticated},
		"no scheme":              {token: token, want: codes.Unauthenticated},
		"foreign token":          {token: "Bearer " + foreign, want: codes.Unauthenticated},
		"foreign certificate":    {cert: issue(other, reviews), want: codes.Unauthenticated},
		"expired certificate":    {cert: expired, want: codes.Unauthenticated},
		"expired, with token":    {cert: expired, token: "bearer " + token, want: codes.OK},
		"control identity":       {cert: issue(ca, "spiffe://amber.mesh/isthmus/peer"), want: codes.PermissionDenied},
		"impersonates":           {cert: mine, meta: impersonate, want: codes.PermissionDenied},
		"impersonates itself":    {cert: mine, meta: self, want: codes.OK},
		"no request":             {cert: mine, csr: "x", want: codes.InvalidArgument},
		"large request":          {cert: mine, csr: strings.Repeat("a", MaxCSR+1), want: codes.InvalidArgument},
		"certificate wins":       {cert: mine, token: "Bearer " + foreign, want: codes.OK},
		"token in lower case":    {token: "bearer " + token, want: codes.OK},
		"token after two spaces": {token: "Bearer  " + token, want: codes.OK},
	}
	for name, c := range cases {
		t.Run(name, func(t *testing.T) {
			if c.csr == "" {
				c.csr = good
			}
			resp, err := call(c.cert, c.token, &securityv1alpha1.IstioCertificateRequest{Csr: c.csr, Metadata: c.meta})
			if status.Code(err) != c.want {
				t.Fatalf("got %v, want %s", err, c.want)
			}
			if err == nil && parse(t, resp.GetCertChain()[0]).URIs[0].String() != reviews {
				t.Error("another identity was signed")
			}
			if err != nil && c.token != "" && strings.Contains(err.Error(), strings.TrimPrefix(c.token, "Bearer ")) {
				t.Errorf("the error shows the token: %v", err)
			}
		})
	}
	if n, err := testutil.GatherAndCount(reg, "isthmus_identity_certificate_requests_total", "isthmus_identity_ca_expiry_timestamp_seconds"); err != nil || n < 5 {
		t.Errorf("%d metrics, %v", n, err)
	}
	if problems, err := testutil.GatherAndLint(reg); err != nil || len(problems) > 0 {
		t.Errorf("metrics: %v, %v", problems, err)
	}
}

func TestNoPeer(t *testing.T) {
	ca := newCA(t, nil)
	if _, err := AnyOf(ca.Certificates(), ca.Tokens()).Authenticate(t.Context()); !errors.Is(err, ErrNoCredentials) {
		t.Errorf("got %v", err)
	}
	ctx := metadata.NewIncomingContext(t.Context(), metadata.Pairs("authorization", "Bearer a", "authorization", "Bearer b"))
	if _, err := ca.Tokens().Authenticate(ctx); !errors.Is(err, ErrToken) {
		t.Errorf("got %v", err)
	}
}

func FuzzJWT(f *testing.F) {
	ca := newCA(f, nil)
	good, err := ca.Mint(workload, time.Hour)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(good)
	f.Add("a.b.c")
	f.Add(`{"payload":"e30","signature":""}`)
	f.Fuzz(func(t *testing.T, token string) {
		if w, err := ca.Verify(token); err == nil && (w != workload || len(token) < len(good)-4) {
			t.Errorf("accepted %+v", w)
		}
	})
}

// FuzzClaims reaches behind the signature.
func FuzzClaims(f *testing.F) {
	ca := newCA(f, nil)
	f.Add([]byte(`{"iss":"spiffe://amber.mesh","sub":"system:serviceaccount:default:reviews","aud":"istio-ca","exp":4000000000,"kubernetes.io":{"namespace":"default","serviceaccount":{"name":"reviews"}}}`))
	f.Add([]byte(`{"exp":1e300}`))
	signer, err := jose.NewSigner(jose.SigningKey{Algorithm: jose.ES256, Key: ca.tokens.signer().(*ecdsa.PrivateKey)}, (&jose.SignerOptions{}).WithHeader("kid", ca.tokens.id))
	if err != nil {
		f.Fatal(err)
	}
	f.Fuzz(func(t *testing.T, claims []byte) {
		signed, err := signer.Sign(claims)
		if err != nil {
			return
		}
		token, err := signed.CompactSerialize()
		if err != nil {
			return
		}
		if w, err := ca.Verify(token); err == nil && (w.check() != nil || !json.Valid(claims)) {
			t.Errorf("accepted %+v", w)
		}
	})
}
