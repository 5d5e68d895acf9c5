package refs_test

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/isthmus-mesh/isthmus/discovery/config"
	"github.com/isthmus-mesh/isthmus/discovery/config/refs"
	"github.com/isthmus-mesh/isthmus/discovery/mesh"
)

const references = `
apiVersion: networking.istio.io/v1
kind: DestinationRule
metadata: {name: reviews}
spec:
  host: reviews
  trafficPolicy: {portLevelSettings: [{port: {number: 81}, tls: {mode: DISABLE}}]}
  subsets: [{name: v1, labels: {version: v1}}]
---
apiVersion: networking.istio.io/v1
kind: DestinationRule
metadata: {name: gone}
spec: {host: gone}
---
apiVersion: networking.istio.io/v1
kind: Gateway
metadata: {name: front}
spec: {selector: {istio: ingressgateway}, servers: [{port: {number: 80, name: http, protocol: HTTP}, hosts: ["*"]}]}
---
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {name: a}
spec:
  hosts: [reviews]
  gateways: [mesh, front, back]
  http:
  - route:
    - {destination: {host: reviews, subset: v1, port: {number: 80}}, weight: 1}
    - {destination: {host: reviews, subset: v2}, weight: 1}
    - {destination: {host: reviews, port: {number: 8080}}, weight: 1}
    - {destination: {host: ratings}, weight: 1}
    - {destination: {host: ratings.default.global}, weight: 1}
    - {destination: {host: reviews.default}, weight: 1}
    - {destination: {host: api.example.com}, weight: 1}
---
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {name: b}
spec:
  hosts: [reviews]
  http: [{route: [{destination: {host: reviews}}]}]
---
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {name: c}
spec:
  hosts: [reviews]
  tcp: [{route: [{destination: {host: reviews}}]}]
`

func TestCheckReferences(t *testing.T) {
	in, problems := config.Decode("f.yaml", []byte(references), config.Options{})
	if len(problems) > 0 {
		t.Fatalf("decode: %v", problems)
	}
	service := func(host, kind string, vip string) *mesh.Service {
		name, _, _ := strings.Cut(host, ".")
		return &mesh.Service{
			Host: host, Name: name, Namespace: "default", Object: mesh.ObjectRef{Kind: kind, Namespace: "default", Name: name},
			Ports: []mesh.Port{{Number: 80}}, VIPs: []netip.Addr{netip.MustParseAddr(vip)},
		}
	}
	snap := &mesh.Snapshot{
		Services: []*mesh.Service{
			service("*.example.com", "ServiceEntry", "10.0.0.3"),
			service("details.default.svc.cluster.local", "Service", "10.0.0.1"),
			service("reviews.default.svc.cluster.local", "Service", "10.0.0.1"),
		},
		VirtualServices: in.VirtualServices, DestinationRules: in.DestinationRules, Gateways: in.Gateways,
	}
	var got []string
	for _, p := range refs.Check(snap) {
		if p.Message == "" || p.Remedy == "" {
			t.Errorf("incomplete: %v", p)
		}
		got = append(got, p.Object.String()+" "+p.Field+" "+p.Reason)
	}
	want := []string{
		"Service/default/reviews spec.clusterIPs AddressInUse",
		"VirtualService/default/a spec.http[0].route[1].destination.subset UnknownSubset",
		"VirtualService/default/a spec.http[0].route[2].destination.port.number UnknownPort",
		"VirtualService/default/a spec.http[0].route[3].destination.host UnknownHost",
		"VirtualService/default/a spec.http[0].route[4].destination.host UnknownHost",
		"VirtualService/default/a spec.http[0].route[5].destination.host UnknownHost",
		"VirtualService/default/a spec.gateways[2] UnknownGateway",
		"VirtualService/default/b spec.hosts[0] ConflictingHosts",
		"DestinationRule/default/reviews spec.trafficPolicy.portLevelSettings[0].port.number UnknownPort",
		"DestinationRule/default/gone spec.host UnknownHost",
	}
	if !slices.Equal(got, want) {
		t.Errorf("got\n%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
	if refs.Check(&mesh.Snapshot{}) != nil {
		t.Error("an empty snapshot has problems")
	}
}

// TestRulesWithoutEffect: objects that are right by themselves, name what is there and do nothing, or harm.
func TestRulesWithoutEffect(t *testing.T) {
	const virtual = "apiVersion: networking.istio.io/v1\nkind: VirtualService\nmetadata: {name: v, namespace: shop}\nspec: "
	const rule = "apiVersion: networking.istio.io/v1\nkind: DestinationRule\nmetadata: {name: d, namespace: shop}\nspec: "
	const to = "route: [{destination: {host: mixed.shop.svc.cluster.local, port: {number: 80}}}]"
	const web, local, mixed, raw = "web.shop.global", "web.shop.svc.cluster.local", "mixed.shop.svc.cluster.local", "raw.shop.svc.cluster.local"
	for _, c := range []struct {
		name, object string
		want         []string // FIELD REASON: MESSAGE; REMEDY
	}{
		{"no port, one of them HTTP", virtual + "{hosts: [" + mixed + "], http: [{" + to + "}]}", nil},
		{"an HTTP port", virtual + "{hosts: [" + mixed + "], http: [{match: [{port: 80}], " + to + "}]}", nil},
		{"a TCP port", virtual + "{hosts: [" + mixed + "], http: [{match: [{port: 80}, {port: 8081}], " + to + "}]}", []string{
			"spec.http[0].match[1].port NotHTTP: http rules do not apply to port 8081 of " + mixed + ", which is TCP; name the port http-..., or set appProtocol: http on it"}},
		{"a TCP port of one host, an HTTP port of another", virtual + "{hosts: [" + mixed + ", other.shop.svc.cluster.local], http: [{match: [{port: 8081}], " + to + "}]}", nil},
		{"no HTTP port", virtual + "{hosts: [" + raw + "], http: [{" + to + "}, {" + to + "}]}", []string{
			"spec.http NotHTTP: http rules do not apply to port 443 of " + raw + ", which is TLS; route it by tls rules, or name the port http-... if it is plain HTTP",
			"spec.http NotHTTP: http rules do not apply to port 8081 of " + raw + ", which is TCP; name the port http-..., or set appProtocol: http on it"}},
		{"a ServiceEntry", virtual + "{hosts: [db.example.com], http: [{" + to + "}]}", []string{
			"spec.http NotHTTP: http rules do not apply to port 5432 of db.example.com, which is TCP; set protocol: HTTP on the port"}},
		{"at a gateway", virtual + "{hosts: [" + raw + "], gateways: [front], http: [{match: [{port: 443}], " + to + "}]}", nil},
		{"at a gateway and in the mesh", virtual + "{hosts: [" + raw + "], gateways: [front, mesh], http: [{match: [{port: 443}], " + to + "}]}", nil},
		{"at the mesh only by the match", virtual + "{hosts: [" + raw + "], gateways: [front, mesh], http: [{match: [{port: 8081, gateways: [mesh]}], " + to + "}]}", []string{
			"spec.http[0].match[0].port NotHTTP: http rules do not apply to port 8081 of " + raw + ", which is TCP; name the port http-..., or set appProtocol: http on it"}},
		{"a host with a wildcard", virtual + "{hosts: [" + raw + ", '*.shop.svc.cluster.local'], http: [{" + to + "}]}", nil},

		{"hosts that are not there", virtual + "{hosts: [gone, gone.shop.global, gone.example.com, '*.global', " + web + "], http: [{" + to + "}]}", []string{
			"spec.hosts[0] UnknownHost: no service has the host gone.shop.svc.cluster.local; create the Service or ServiceEntry, or correct the host",
			"spec.hosts[1] UnknownHost: no service has the host gone.shop.global; export it in a cluster of the mesh"}},
		{"hosts of a gateway", virtual + "{hosts: [gone.shop.global], gateways: [front], http: [{" + to + "}]}", nil},

		{"tls as it is", rule + "{host: " + web + ", trafficPolicy: {tls: {mode: ISTIO_MUTUAL}}}", nil},
		{"tls DISABLE", rule + "{host: " + web + ", trafficPolicy: {tls: {mode: DISABLE}}}", []string{
			"spec.trafficPolicy.tls.mode NeedsMutualTLS: endpoints in clusters birch, cedar are reached through gateways, which carry mutual TLS only; with tls mode DISABLE they are not used; leave tls out, or use ISTIO_MUTUAL"}},
		{"tls SIMPLE for a port", rule + "{host: " + web + ", trafficPolicy: {portLevelSettings: [{port: {number: 80}, tls: {mode: SIMPLE}}]}}", []string{
			"spec.trafficPolicy.portLevelSettings[0].tls.mode NeedsMutualTLS: endpoints in clusters birch, cedar are reached through gateways, which carry mutual TLS only; with tls mode SIMPLE they are not used; leave tls out, or use ISTIO_MUTUAL"}},
		{"tls DISABLE replaced for every port", rule + "{host: " + web + ", trafficPolicy: {tls: {mode: DISABLE}, portLevelSettings: [{port: {number: 80}}]}}", nil},
		{"tls DISABLE for subsets", rule + "{host: " + web + ", subsets: [{name: v1, labels: {version: v1}, trafficPolicy: {tls: {mode: DISABLE}}}, {name: v3, labels: {version: v3}, trafficPolicy: {tls: {mode: DISABLE}}}]}", []string{
			"spec.subsets[1].trafficPolicy.tls.mode NeedsMutualTLS: endpoints in cluster cedar are reached through gateways, which carry mutual TLS only; with tls mode DISABLE they are not used; leave tls out, or use ISTIO_MUTUAL"}},
		{"tls DISABLE for all", rule + "{host: '*.global', trafficPolicy: {tls: {mode: DISABLE}}}", []string{
			"spec.trafficPolicy.tls.mode NeedsMutualTLS: endpoints in clusters birch, cedar are reached through gateways, which carry mutual TLS only; with tls mode DISABLE they are not used; leave tls out, or use ISTIO_MUTUAL"}},
		{"tls DISABLE for a local host", rule + "{host: " + local + ", trafficPolicy: {tls: {mode: DISABLE}}}", nil},
		{"tls SIMPLE for a host outside", rule + "{host: db.example.com, trafficPolicy: {tls: {mode: SIMPLE}}}", nil},
	} {
		t.Run(c.name, func(t *testing.T) {
			in, problems := config.Decode("f.yaml", []byte(c.object), config.Options{})
			if len(problems) > 0 {
				t.Fatalf("decode: %v", problems)
			}
			snap := shop()
			snap.VirtualServices, snap.DestinationRules = in.VirtualServices, in.DestinationRules
			if got := found(snap); !slices.Equal(got, c.want) {
				t.Errorf("got\n%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(c.want, "\n"))
			}
		})
	}
	for target, want := range map[string][]string{
		"web.shop.global": {"spec.externalName AliasOfMeshHost: externalName web.shop.global is a host of the mesh; Envoy would dial its virtual address; point a VirtualService at it instead, or use the host itself"},
		"db.example.com":  nil, // outside
		"www.example.org": nil,
	} {
		t.Run("externalName "+target, func(t *testing.T) {
			snap := shop()
			alias := service("alias.shop.svc.cluster.local", "Service", mesh.Port{Number: 80, Protocol: mesh.HTTP})
			alias.Resolution, alias.External, alias.Endpoints = mesh.DNS, true, []*mesh.Endpoint{{Address: target}}
			snap.Services = append([]*mesh.Service{alias}, snap.Services...)
			if got := found(snap); !slices.Equal(got, want) {
				t.Errorf("got %q, want %q", got, want)
			}
		})
	}
}

// found writes the Problems with references, except that Gateways are missing.
func found(snap *mesh.Snapshot) []string {
	var out []string
	for _, p := range refs.Check(snap) {
		if p.Reason != "UnknownGateway" {
			out = append(out, fmt.Sprintf("%s %s: %s; %s", p.Field, p.Reason, p.Message, p.Remedy))
		}
	}
	return out
}

func service(host, kind string, ports ...mesh.Port) *mesh.Service {
	name, _, _ := strings.Cut(host, ".")
	return &mesh.Service{Host: host, Name: name, Namespace: "shop", Object: mesh.ObjectRef{Kind: kind, Namespace: "shop", Name: name}, Ports: ports}
}

// shop is a cluster amber with a peer on its network, dogwood, and two on others.
func shop() *mesh.Snapshot {
	http, tcp := mesh.Port{Number: 80, Protocol: mesh.HTTP}, mesh.Port{Number: 8081, Protocol: mesh.TCP}
	end := func(cluster mesh.ClusterID, network mesh.NetworkID, version string) *mesh.Endpoint {
		return &mesh.Endpoint{Cluster: cluster, Network: network, Labels: map[string]string{"version": version}, TLS: true, Ready: true}
	}
	web := service("web.shop.global", "Service", http)
	web.Global = true
	web.Endpoints = []*mesh.Endpoint{end("amber", "net1", "v1"), end("birch", "net2", "v2"), end("cedar", "net3", "v3"), end("dogwood", "net1", "v1")}
	local := service("web.shop.svc.cluster.local", "Service", http)
	local.Endpoints = web.Endpoints[:1]
	db := service("db.example.com", "ServiceEntry", mesh.Port{Number: 5432, Protocol: mesh.TCP})
	db.Resolution, db.External = mesh.DNS, true
	return &mesh.Snapshot{
		Local: &mesh.Cluster{ID: "amber", Network: "net1"},
		Services: []*mesh.Service{
			db, service("mixed.shop.svc.cluster.local", "Service", http, tcp),
			service("other.shop.svc.cluster.local", "Service", mesh.Port{Number: 8081, Protocol: mesh.GRPC}),
			service("raw.shop.svc.cluster.local", "Service", mesh.Port{Number: 443, Protocol: mesh.TLS}, mesh.Port{Number: 5353, Protocol: mesh.UDP}, tcp),
			web, local,
		},
	}
}
