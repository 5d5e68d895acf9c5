package config

import "testing"

// TestClusterSetHosts: rules on either name of an exported service are rules of that service.
func TestClusterSetHosts(t *testing.T) {
	in, problems := Decode("x.yaml", []byte(`
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {name: web, namespace: shop}
spec:
  hosts: [web.shop.svc.clusterset.local]
  http:
  - route: [{destination: {host: web.shop.svc.clusterset.local, subset: v1}}]
---
apiVersion: networking.istio.io/v1
kind: DestinationRule
metadata: {name: web, namespace: shop}
spec:
  host: Web.shop.svc.clusterset.local
  subsets: [{name: v1, labels: {version: v1}}]
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: web-1, namespace: shop, labels: {multicluster.kubernetes.io/service-name: web}}
addressType: IPv4
endpoints: []
`), Options{Domain: "cluster.local"})
	if len(problems) != 0 || len(in.Slices) != 0 {
		t.Errorf("problems %v, slices %v", problems, in.Slices)
	}
	vs := in.VirtualServices[0].Spec
	if vs.Hosts[0] != "web.shop.global" || vs.Http[0].Route[0].Destination.Host != "web.shop.global" || in.DestinationRules[0].Spec.Host != "web.shop.global" {
		t.Errorf("%v %v", vs, in.DestinationRules[0].Spec)
	}
}
