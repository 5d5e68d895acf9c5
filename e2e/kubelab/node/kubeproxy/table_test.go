package kubeproxy

import (
	"fmt"
	"net/netip"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"pgregory.net/rapid"
	"sigs.k8s.io/yaml"
)

var nodes = []Node{
	{Name: "n1", Addresses: []netip.Addr{netip.MustParseAddr("172.30.1.1"), netip.MustParseAddr("fd30::1")}, PodCIDRs: []netip.Prefix{netip.MustParsePrefix("10.1.1.0/24")}},
	{Name: "n2", Addresses: []netip.Addr{netip.MustParseAddr("172.30.1.2")}, PodCIDRs: []netip.Prefix{netip.MustParsePrefix("10.1.2.0/24")}},
}

func (f frontend) String() string {
	s := fmt.Sprintf("%d %v ->", f.proto, netip.AddrPortFrom(f.addr, f.port))
	for _, b := range f.backends {
		s += " " + b.String()
	}
	if f.masquerade {
		s += " masquerade"
	}
	for _, n := range nodes {
		if f.byNode != nil {
			s += fmt.Sprintf(" %s:%v", n.Name, f.byNode[n.Name])
		}
	}
	return s
}

func TestTable(t *testing.T) {
	const slices = `
- metadata: {name: a, namespace: ns, labels: {kubernetes.io/service-name: web}}
  addressType: IPv4
  ports: [{name: http, port: 8080}, {name: dns, port: 53, protocol: UDP}]
  endpoints:
  - {addresses: [10.1.2.9], nodeName: n2, conditions: {ready: true}}
  - {addresses: [10.1.1.8], nodeName: n1}
  - {addresses: [10.1.1.7], nodeName: n1, conditions: {ready: false, serving: true, terminating: true}}
  - {addresses: [10.1.1.6], nodeName: n1, conditions: {ready: false}}
- metadata: {name: b, namespace: ns, labels: {kubernetes.io/service-name: web}}
  addressType: IPv6
  ports: [{name: http, port: 8080}]
  endpoints: [{addresses: ["fd00::9"], nodeName: n2}]
- metadata: {name: c, namespace: ns, labels: {kubernetes.io/service-name: web}}
  addressType: FQDN
  ports: [{name: http, port: 8080}]
  endpoints: [{addresses: [example.org]}]
- metadata: {name: d, namespace: other, labels: {kubernetes.io/service-name: web}}
  addressType: IPv4
  ports: [{name: http, port: 8080}]
  endpoints: [{addresses: [10.1.1.99]}]
- metadata: {name: e, namespace: ns, labels: {kubernetes.io/service-name: ending}}
  addressType: IPv4
  ports: [{port: 8080}]
  endpoints: [{addresses: [10.1.1.5], conditions: {ready: false, serving: true, terminating: true}}, {addresses: [10.1.1.4], conditions: {ready: false, serving: false, terminating: true}}]
`
	for _, c := range []struct{ name, services, want string }{
		{"families and protocols", `
- metadata: {name: web, namespace: ns}
  spec: {clusterIP: 10.2.0.1, clusterIPs: [10.2.0.1, "fd02::1"], ports: [{name: http, port: 80}, {name: dns, port: 53, protocol: UDP}]}`, `
6 10.2.0.1:80 -> 10.1.1.8:8080 10.1.2.9:8080
17 10.2.0.1:53 -> 10.1.1.8:53 10.1.2.9:53
6 [fd02::1]:80 -> [fd00::9]:8080
17 [fd02::1]:53 ->`},
		{"nothing for headless and external names", `
- metadata: {name: web, namespace: ns}
  spec: {clusterIP: None, clusterIPs: [None], ports: [{name: http, port: 80}]}
- metadata: {name: web, namespace: ns}
  spec: {type: ExternalName, externalName: example.org, ports: [{name: http, port: 80}]}`, ``},
		{"from outside", `
- metadata: {name: web, namespace: ns}
  spec: {type: LoadBalancer, clusterIP: 10.2.0.1, clusterIPs: [10.2.0.1], externalIPs: [9.9.9.9], ports: [{name: http, port: 80, nodePort: 30000}]}`, `
6 9.9.9.9:80 -> 10.1.1.8:8080 10.1.2.9:8080 masquerade
6 10.2.0.1:80 -> 10.1.1.8:8080 10.1.2.9:8080
6 172.30.1.1:30000 -> 10.1.1.8:8080 10.1.2.9:8080 masquerade
6 172.30.1.2:30000 -> 10.1.1.8:8080 10.1.2.9:8080 masquerade
6 172.30.1.200:80 -> 10.1.1.8:8080 10.1.2.9:8080 masquerade
6 [fd30::1]:30000 -> [fd00::9]:8080 masquerade`},
		{"local policies", `
- metadata: {name: web, namespace: ns}
  spec: {type: NodePort, externalTrafficPolicy: Local, internalTrafficPolicy: Local, clusterIP: 10.2.0.1, clusterIPs: [10.2.0.1], ports: [{name: http, port: 80, nodePort: 30000}]}`, `
6 10.2.0.1:80 -> 10.1.1.8:8080 10.1.2.9:8080 n1:[10.1.1.8:8080] n2:[10.1.2.9:8080]
6 172.30.1.1:30000 -> 10.1.1.8:8080
6 172.30.1.2:30000 -> 10.1.2.9:8080
6 172.30.1.200:80 -> 10.1.1.8:8080 10.1.2.9:8080
6 [fd30::1]:30000 ->`},
		{"the last ones may end", `
- metadata: {name: ending, namespace: ns}
  spec: {clusterIP: 10.2.0.2, clusterIPs: [10.2.0.2], ports: [{port: 80}]}`, `
6 10.2.0.2:80 -> 10.1.1.5:8080`},
	} {
		t.Run(c.name, func(t *testing.T) {
			in := input{nodes: nodes, balancer: map[string]netip.Addr{"ns/web": netip.MustParseAddr("172.30.1.200")}}
			if strings.Contains(c.name, "families") {
				in.balancer = nil
			}
			if err := yaml.UnmarshalStrict([]byte(slices), &in.slices); err != nil {
				t.Fatal(err)
			}
			if err := yaml.UnmarshalStrict([]byte(c.services), &in.services); err != nil {
				t.Fatal(err)
			}
			var got strings.Builder
			for _, f := range table(in) {
				fmt.Fprintf(&got, "\n%v", f)
			}
			if got.String() != c.want {
				t.Errorf("got:%s\nwant:%s", got.String(), c.want)
			}
		})
	}
}

// Whatever comes and goes: nobody shares an address, who keeps asking for nothing else keeps his, and only a full range
// leaves one without.
func TestAllocate(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		from := netip.MustParsePrefix("172.30.1.8/29")
		before := map[string]netip.Addr{}
		for range 5 {
			var services []*corev1.Service
			for i := range rapid.IntRange(0, 12).Draw(t, "services") {
				s := &corev1.Service{ObjectMeta: metav1.ObjectMeta{Namespace: "ns", Name: fmt.Sprint(i)}}
				if rapid.Bool().Draw(t, "asks") {
					s.Spec.LoadBalancerIP = fmt.Sprintf("172.30.1.%d", rapid.IntRange(6, 17).Draw(t, "ip"))
				}
				services = append(services, s)
			}
			after, errs := allocate(services, before, from)
			owner := map[netip.Addr]string{}
			for key, a := range after {
				if owner[a] != "" || !from.Contains(a) {
					t.Fatalf("%v of %s is out of range or that of %s", a, key, owner[a])
				}
				owner[a] = key
			}
			if len(after)+len(errs) != len(services) || len(errs) > 0 && len(after) != 8 {
				t.Fatalf("%d services, %d addresses, errors %v", len(services), len(after), errs)
			}
			for _, s := range services {
				key := "ns/" + s.Name
				if had, ok := before[key]; ok && s.Spec.LoadBalancerIP == "" && after[key] != had && owner[had] == "" {
					t.Fatalf("%s lost %v for nothing", key, had)
				}
			}
			before = after
		}
	})
}
