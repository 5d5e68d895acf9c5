package config_test

import (
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/isthmus-mesh/isthmus/discovery/config"
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
	for _, p := range config.CheckReferences(snap) {
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
	if config.CheckReferences(&mesh.Snapshot{}) != nil {
		t.Error("an empty snapshot has problems")
	}
}
