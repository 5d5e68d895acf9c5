package config

import (
	"slices"
	"testing"
)

// A gateway behind node ports answers at the nodes' addresses of its Service's families only.
func TestNodeGatewayFamilies(t *testing.T) {
	opts := Options{ByLabel: true, Nodes: map[string]Node{"n1": {Addresses: []string{"192.0.2.1", "2001:db8::1"}}}}
	for families, want := range map[string][]string{
		"":                         {"192.0.2.1", "2001:db8::1"},
		"ipFamilies: [IPv4]":       {"192.0.2.1"},
		"ipFamilies: [IPv6]":       {"2001:db8::1"},
		"ipFamilies: [IPv6, IPv4]": {"192.0.2.1", "2001:db8::1"},
	} {
		in, _ := Decode("services.yaml", []byte(`
apiVersion: v1
kind: Service
metadata: {name: gw, namespace: istio-system, labels: {topology.istio.io/network: one}}
spec:
  type: NodePort
  selector: {a: b}
  ports: [{name: tls, port: 15443, nodePort: 31443}]
  `+families+"\n"), opts)
		var got []string
		for _, n := range in.Networks {
			for _, g := range n.Gateways {
				got = append(got, g.Address)
			}
		}
		if !slices.Equal(got, want) {
			t.Errorf("%q: gateways at %v, want %v", families, got, want)
		}
	}
}
