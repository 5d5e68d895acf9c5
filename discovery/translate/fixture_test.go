package translate_test

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"math/big"
	"net/netip"
	"net/url"
	"slices"
	"testing"
	"time"

	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/wrapperspb"
	networking "istio.io/api/networking/v1"
	security "istio.io/api/security/v1"
	typev1beta1 "istio.io/api/type/v1beta1"

	"github.com/isthmus-mesh/isthmus/discovery/mesh"
)

// fixedRoot is a certificate that golden files may hold: it never changes, and its key is not kept.
const fixedRoot = `-----BEGIN CERTIFICATE-----
MIIBgjCCASmgAwIBAgIUIM6NVecyCZuVvWj8lBTZLqHdOS4wCgYIKoZIzj0EAwIw
DzENMAsGA1UEAwwEcm9vdDAeFw0yNjExMjMwNTEwNDlaFw0zNjExMjAwNTEwNDla
MA8xDTALBgNVBAMMBHJvb3QwWTATBgcqhkjOPQIBBggqhkjOPQMBBwNCAAQe5lzE
qwBQm56T8FwEHAUcN/b0rUEG9XEOhOLIakBZdOP3rsejTMOQErFgvO9540gDOvWM
8kR57CLaG4rTl4pYo2MwYTAdBgNVHQ4EFgQUe5Ggc0k2Uin1tPteHaMyt4GgTtAw
HwYDVR0jBBgwFoAUe5Ggc0k2Uin1tPteHaMyt4GgTtAwDwYDVR0TAQH/BAUwAwEB
/zAOBgNVHQ8BAf8EBAMCAQYwCgYIKoZIzj0EAwIDRwAwRAIgKmwR6Yht57W8RCd7
FoQrYqczLqJVNk3vBHlSeKrkr7sCIFG68ycqv+GVdhLUtmF3K0gijdwOxATum1r+
zq3/hPN9
-----END CERTIFICATE-----
`

// bookstore is amber's view of three clusters: reviews v1 here, v2 in birch behind two gateways, v3 in cedar, which has
// not been heard from lately; a database over TCP, a bank outside, and routing by version.
func bookstore() *mesh.Snapshot {
	amber := &mesh.Cluster{ID: "amber", TrustDomain: "amber.mesh", Network: "net-a", Gateways: gateways("10.1.0.1:15443"), Roots: []byte(fixedRoot)}
	birch := &mesh.Cluster{ID: "birch", TrustDomain: "birch.mesh", Network: "net-b", Gateways: gateways("10.2.0.1:15443", "10.2.0.2:15443"), Roots: []byte(fixedRoot)}
	cedar := &mesh.Cluster{ID: "cedar", TrustDomain: "cedar.mesh", Network: "net-c", Gateways: gateways("[fd00::3]:15443"), Roots: []byte("not PEM"), Freshness: mesh.Late}
	v1 := pod(amber, "reviews-v1", "10.10.0.3", "v1")
	reviews := &mesh.Service{
		Host: "reviews.default.svc.cluster.local", Name: "reviews", Namespace: "default", Object: ref("Service", "reviews"),
		Ports: []mesh.Port{{Name: "http", Number: 9080, Protocol: mesh.HTTP}, {Name: "grpc", Number: 9090, Protocol: mesh.GRPC, Target: 9091}},
		VIPs:  addrs("10.96.0.7"), Exported: true, Endpoints: []*mesh.Endpoint{v1},
	}
	global := *reviews
	global.Host, global.Global, global.Exported, global.VIPs = mesh.GlobalHost("reviews", "default"), true, false, addrs("240.0.0.7", "fd00:15::7")
	gone := pod(birch, "reviews-v2-gone", "10.20.0.9", "v2")
	gone.Ready = false
	plain := pod(birch, "reviews-v2-plain", "10.20.0.8", "v2")
	plain.TLS = false
	global.Endpoints = []*mesh.Endpoint{
		v1, pod(birch, "reviews-v2-a", "10.20.0.3", "v2"), pod(birch, "reviews-v2-b", "10.20.0.4", "v2"), gone, plain, pod(cedar, "reviews-v3", "10.30.0.3", "v3"),
	}
	productpage := &mesh.Service{
		Host: "productpage.default.svc.cluster.local", Name: "productpage", Namespace: "default", Object: ref("Service", "productpage"),
		Ports: []mesh.Port{{Name: "http", Number: 9080, Protocol: mesh.HTTP}, {Name: "tcp", Number: 3306, Protocol: mesh.TCP, Target: 3307}},
		VIPs:  addrs("10.96.0.8"), Endpoints: []*mesh.Endpoint{pod(amber, "productpage-1", "10.10.0.2", "v1")},
	}
	database := &mesh.Service{
		Host: "db.data.svc.cluster.local", Name: "db", Namespace: "data", Object: mesh.ObjectRef{Kind: "Service", Namespace: "data", Name: "db"},
		Ports: []mesh.Port{{Name: "mysql", Number: 3306, Protocol: mesh.TCP}, {Name: "dns", Number: 53, Protocol: mesh.UDP}}, Headless: true,
		Endpoints: []*mesh.Endpoint{{Workload: "db-0", Namespace: "data", Cluster: "amber", Network: "net-a", Address: "10.10.0.20", Ready: true}},
	}
	bank := &mesh.Service{
		Host: "bank.example.com", Name: "bank", Namespace: "default", Object: ref("ServiceEntry", "bank"), Resolution: mesh.DNS, External: true,
		Ports: []mesh.Port{{Name: "http", Number: 80, Protocol: mesh.HTTP}, {Name: "https", Number: 443, Protocol: mesh.HTTPS}},
	}
	return &mesh.Snapshot{
		Revision: 1, Local: amber, Clusters: []*mesh.Cluster{amber, birch, cedar},
		Services:         sortedByHost(reviews, &global, productpage, database, bank),
		VirtualServices:  virtualServices(),
		DestinationRules: destinationRules(),
		Gateways: []*mesh.Gateway{{Object: ref("Gateway", "bookstore"), Spec: &networking.Gateway{
			Selector: map[string]string{"istio": "ingressgateway"},
			Servers: []*networking.Server{
				{Port: &networking.Port{Number: 80, Protocol: "HTTP", Name: "http"}, Hosts: []string{"*"}},
				{Port: &networking.Port{Number: 443, Protocol: "HTTPS", Name: "https"}, Hosts: []string{"*"}},
			},
		}}},
		PeerAuthentications: []*mesh.PeerAuthentication{
			{Object: ref("PeerAuthentication", "page"), Spec: &security.PeerAuthentication{
				Selector: &typev1beta1.WorkloadSelector{MatchLabels: map[string]string{"app": "productpage"}},
				Mtls:     &security.PeerAuthentication_MutualTLS{Mode: security.PeerAuthentication_MutualTLS_PERMISSIVE},
				PortLevelMtls: map[uint32]*security.PeerAuthentication_MutualTLS{
					3307: {Mode: security.PeerAuthentication_MutualTLS_DISABLE}, 7777: {Mode: security.PeerAuthentication_MutualTLS_STRICT},
				},
			}},
			{Object: mesh.ObjectRef{Kind: "PeerAuthentication", Namespace: "istio-system", Name: "all"}, Spec: &security.PeerAuthentication{
				Mtls: &security.PeerAuthentication_MutualTLS{Mode: security.PeerAuthentication_MutualTLS_STRICT},
			}},
		},
	}
}

func virtualServices() []*mesh.VirtualService {
	to := func(host, subset string, weight int32) *networking.HTTPRouteDestination {
		return &networking.HTTPRouteDestination{Destination: &networking.Destination{Host: host, Subset: subset}, Weight: weight}
	}
	const global = "reviews.default.global"
	return []*mesh.VirtualService{
		{Object: ref("VirtualService", "bank"), Spec: &networking.VirtualService{
			Hosts: []string{"bank.example.com"},
			Tls: []*networking.TLSRoute{{
				Match: []*networking.TLSMatchAttributes{{Port: 443, SniHosts: []string{"bank.example.com"}}},
				Route: []*networking.RouteDestination{{Destination: &networking.Destination{Host: "bank.example.com", Port: &networking.PortSelector{Number: 443}}}},
			}},
		}},
		{Object: ref("VirtualService", "bookstore"), Spec: &networking.VirtualService{
			Hosts: []string{"shop.example.com"}, Gateways: []string{"default/bookstore"},
			Http: []*networking.HTTPRoute{
				{Match: []*networking.HTTPMatchRequest{{Uri: uriPrefix("/old")}}, Redirect: &networking.HTTPRedirect{Uri: "/", RedirectCode: 302}},
				{Match: []*networking.HTTPMatchRequest{{Uri: uriPrefix("/api")}}, Rewrite: &networking.HTTPRewrite{Uri: "/"},
					Route: []*networking.HTTPRouteDestination{{Destination: &networking.Destination{Host: "productpage.default.svc.cluster.local", Port: &networking.PortSelector{Number: 9080}}}}},
			},
		}},
		{Object: ref("VirtualService", "reviews"), Spec: &networking.VirtualService{
			Hosts: []string{global},
			Http: []*networking.HTTPRoute{
				{Match: []*networking.HTTPMatchRequest{{Headers: map[string]*networking.StringMatch{
					"end-user": {MatchType: &networking.StringMatch_Exact{Exact: "jason"}},
				}}}, Route: []*networking.HTTPRouteDestination{to(global, "v2", 0)}},
				{Match: []*networking.HTTPMatchRequest{{Uri: uriPrefix("/nowhere")}}, Route: []*networking.HTTPRouteDestination{to(global, "v9", 0)}},
				{Match: []*networking.HTTPMatchRequest{{Uri: &networking.StringMatch{MatchType: &networking.StringMatch_Regex{Regex: "("}}}}, Route: []*networking.HTTPRouteDestination{to(global, "", 0)}},
				{Match: []*networking.HTTPMatchRequest{{Uri: uriPrefix("/slow")}}, Timeout: durationpb.New(time.Second),
					Fault: &networking.HTTPFaultInjection{Delay: &networking.HTTPFaultInjection_Delay{
						HttpDelayType: &networking.HTTPFaultInjection_Delay_FixedDelay{FixedDelay: durationpb.New(2 * time.Second)}, Percentage: &networking.Percent{Value: 50},
					}}, Mirror: &networking.Destination{Host: global, Subset: "v1"}, Route: []*networking.HTTPRouteDestination{to(global, "v1", 0)}},
				{Route: []*networking.HTTPRouteDestination{to(global, "v1", 90), to(global, "v3", 10)}},
			},
		}},
	}
}

func destinationRules() []*mesh.DestinationRule {
	return []*mesh.DestinationRule{
		{Object: ref("DestinationRule", "bank"), Spec: &networking.DestinationRule{
			Host: "*.example.com", TrafficPolicy: &networking.TrafficPolicy{PortLevelSettings: []*networking.TrafficPolicy_PortTrafficPolicy{{
				Port: &networking.PortSelector{Number: 80},
				Tls:  &networking.ClientTLSSettings{Mode: networking.ClientTLSSettings_SIMPLE, CaCertificates: "/etc/bank/ca.pem"},
			}}},
		}},
		{Object: ref("DestinationRule", "reviews"), Spec: &networking.DestinationRule{
			Host: "reviews.default.global",
			Subsets: []*networking.Subset{
				{Name: "v3", Labels: map[string]string{"version": "v3"}},
				{Name: "v2", Labels: map[string]string{"version": "v2"}, TrafficPolicy: &networking.TrafficPolicy{
					LoadBalancer: &networking.LoadBalancerSettings{LbPolicy: &networking.LoadBalancerSettings_Simple{Simple: networking.LoadBalancerSettings_LEAST_REQUEST}},
				}},
				{Name: "v1", Labels: map[string]string{"version": "v1"}},
			},
		}},
	}
}

// destinationRulesFor turns outlier detection on for the host, and sends what fails in eu to the region.
func destinationRulesFor(host, to string) []*mesh.DestinationRule {
	return []*mesh.DestinationRule{{Object: mesh.ObjectRef{Kind: "DestinationRule", Namespace: "sample", Name: "failover"}, Spec: &networking.DestinationRule{
		Host: host, TrafficPolicy: &networking.TrafficPolicy{
			OutlierDetection: &networking.OutlierDetection{Consecutive_5XxErrors: wrapperspb.UInt32(1), Interval: durationpb.New(100 * time.Millisecond), BaseEjectionTime: durationpb.New(time.Minute), MaxEjectionPercent: 100},
			LoadBalancer:     &networking.LoadBalancerSettings{LocalityLbSetting: &networking.LocalityLoadBalancerSetting{Failover: []*networking.LocalityLoadBalancerSetting_Failover{{From: "eu", To: to}}}},
		},
	}}}
}

func ref(kind, name string) mesh.ObjectRef {
	return mesh.ObjectRef{Kind: kind, Namespace: "default", Name: name}
}

func uriPrefix(p string) *networking.StringMatch {
	return &networking.StringMatch{MatchType: &networking.StringMatch_Prefix{Prefix: p}}
}

func pod(c *mesh.Cluster, name, address, version string) *mesh.Endpoint {
	return &mesh.Endpoint{
		Workload: name, Namespace: "default", Cluster: c.ID, Network: c.Network, Address: address, Labels: map[string]string{"version": version},
		Identity: mesh.SPIFFE(c.TrustDomain, "default", "bookstore"), TLS: true, Ready: true, Freshness: c.Freshness, Locality: "europe/" + string(c.ID),
	}
}

func gateways(list ...string) (out []netip.AddrPort) {
	for _, s := range list {
		out = append(out, netip.MustParseAddrPort(s))
	}
	return out
}

func addrs(list ...string) (out []netip.Addr) {
	for _, s := range list {
		out = append(out, netip.MustParseAddr(s))
	}
	return out
}

func sortedByHost(list ...*mesh.Service) []*mesh.Service {
	slices.SortFunc(list, func(a, b *mesh.Service) int { return bytes.Compare([]byte(a.Host), []byte(b.Host)) })
	return list
}

// proxies are the clients of the golden cases, by the case's name.
func proxies() map[string]*mesh.Proxy {
	return map[string]*mesh.Proxy{
		"sidecar": {
			ID: "sidecar~10.10.0.2~productpage-1.default~default.svc.cluster.local", Type: mesh.Sidecar, Name: "productpage-1", Namespace: "default",
			Domain: "default.svc.cluster.local", Addresses: addrs("10.10.0.2", "fd00:10::2"), Labels: map[string]string{"app": "productpage"},
		},
		"ingress": {
			ID: "router~10.10.0.90~ingress-1.istio-system~istio-system.svc.cluster.local", Type: mesh.Router, Name: "ingress-1", Namespace: "istio-system",
			Domain: "istio-system.svc.cluster.local", Addresses: addrs("10.10.0.90"), Labels: map[string]string{"istio": "ingressgateway"},
		},
		"proxyless": {
			ID: "sidecar~10.10.0.4~client-1.default~default.svc.cluster.local", Type: mesh.Proxyless, Name: "client-1", Namespace: "default",
			Domain: "default.svc.cluster.local", Addresses: addrs("10.10.0.4"),
		},
	}
}

// authority is a trust domain's root for tests that make connections.
type authority struct {
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
	pem  []byte
}

func newAuthority(t *testing.T) *authority {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "root"}, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
	if err != nil {
		t.Fatal(err)
	}
	template.Raw = der
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return &authority{cert, key, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})}
}

// issue returns the PEM of a workload certificate and its key.
func (a *authority) issue(t *testing.T, id string) (cert, key []byte) {
	t.Helper()
	uri, err := url.Parse(id)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(2), NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour), URIs: []*url.URL{uri},
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth, x509.ExtKeyUsageServerAuth},
	}
	return a.sign(t, template)
}

// sign makes a key and returns the PEM of its certificate, and its own.
func (a *authority) sign(t *testing.T, template *x509.Certificate) (cert, key []byte) {
	t.Helper()
	leaf, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	der, err := x509.CreateCertificate(rand.Reader, template, a.cert, &leaf.PublicKey, a.key)
	if err != nil {
		t.Fatal(err)
	}
	keyDER, err := x509.MarshalPKCS8PrivateKey(leaf)
	if err != nil {
		t.Fatal(err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: keyDER})
}
