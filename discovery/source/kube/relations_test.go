package kube_test

import (
	"fmt"
	"testing"

	"github.com/isthmus-mesh/isthmus/discovery/mesh"
	"github.com/isthmus-mesh/isthmus/discovery/source/kube"
)

// TestRelations changes objects that others depend on: these are reported anew, and no others.
func TestRelations(t *testing.T) {
	c := newCluster(t)
	node := func(zone, ip string) string {
		return fmt.Sprintf("apiVersion: v1\nkind: Node\nmetadata: {name: n1, labels: {topology.kubernetes.io/region: eu, topology.istio.io/subzone: %s}}\nstatus: {addresses: [{type: InternalIP, address: %s}]}\n---\n", zone, ip)
	}
	ns := func(name, label, value string) string {
		return fmt.Sprintf("apiVersion: v1\nkind: Namespace\nmetadata: {name: %s, labels: {%s: %q}}\n---\n", name, label, value)
	}
	lb := func(ip string) string {
		return fmt.Sprintf("apiVersion: v1\nkind: Service\nmetadata: {name: gw, namespace: istio-system}\nspec: {type: LoadBalancer, clusterIP: 10.96.1.1, allocateLoadBalancerNodePorts: false, selector: {a: b}, ports: [{name: tls, port: 443, targetPort: 443}]}\nstatus: {loadBalancer: {ingress: [{ip: %s}]}}\n---\n", ip)
	}
	c.apply(node("a", "192.0.2.1") + ns("shop", "x", "y") + byhand + "---\n" + podYAML("one", "10.1.0.1") + "---\n" + lb("203.0.113.1") + `
apiVersion: v1
kind: ConfigMap
metadata: {name: istio, namespace: istio-system}
data: {meshNetworks: "networks: {one: {gateways: [{registryServiceName: gw.istio-system.svc.cluster.local, port: 443}]}}"}
---
apiVersion: v1
kind: Service
metadata: {name: np, namespace: istio-system, labels: {topology.istio.io/network: one}}
spec: {type: NodePort, clusterIP: 10.96.1.2, selector: {a: b}, ports: [{name: tls, port: 15443, nodePort: 31443, targetPort: 15443}]}
`)
	sink := newRecorder()
	run(t, "amber", c.REST(), sink)
	sink.wait(t, 30*second, sink.isSynced)
	const pod, service, config, nodePort = "amber/pods/shop/one", "amber/services/shop/byhand", "amber/configmaps/istio-system/istio", "amber/services/istio-system/np"
	is := func(key string, want string, say func(mesh.Input) string) {
		t.Helper()
		sink.wait(t, 10*second, func() error {
			in, _ := sink.get(key)
			if got := say(in); got != want {
				return fmt.Errorf("%s says %s, want %s", key, got, want)
			}
			return nil
		})
	}
	workload := func(in mesh.Input) string {
		if len(in.Workloads) != 1 {
			return "nothing"
		}
		return in.Workloads[0].Locality + " " + string(in.Workloads[0].Network)
	}
	exported := func(in mesh.Input) string { return fmt.Sprint(len(in.Services) == 1 && in.Services[0].Export) }
	gateways := func(in mesh.Input) string {
		out := ""
		for _, n := range in.Networks {
			for _, g := range n.Gateways {
				out += fmt.Sprintf("%s:%d ", g.Address, g.Port)
			}
		}
		return out
	}
	is(pod, "eu//a ", workload)
	is(service, "false", exported)
	is(config, "203.0.113.1:443 ", gateways)
	is(nodePort, "192.0.2.1:31443 ", gateways)

	c.apply(node("b", "192.0.2.2"))
	is(pod, "eu//b ", workload)
	is(nodePort, "192.0.2.2:31443 ", gateways)
	c.apply(ns("istio-system", "topology.istio.io/network", "one"))
	is(pod, "eu//b one", workload)
	c.apply(ns("shop", "isthmus.io/export", "true"))
	is(service, "true", exported)
	c.apply(ns("shop", "isthmus.io/export", "false"))
	is(service, "false", exported)
	c.apply(lb("203.0.113.2"))
	is(config, "203.0.113.2:443 ", gateways)
	reports, _ := sink.counts()
	if n := reports["amber/services/default/kubernetes"]; n != 1 {
		t.Errorf("a Service that depends on nothing was reported %d times", n)
	}
	if n := reports[pod]; n != 3 {
		t.Errorf("the Pod was reported %d times for two changes", n)
	}
	c.remove(node("b", "192.0.2.2"))
	is(pod, "eu one", workload) // the server copies the region of a node to its Pods
}

// TestNetworkDiffers: the configuration and the API name the cluster's network differently.
func TestNetworkDiffers(t *testing.T) {
	c := newCluster(t)
	c.apply("apiVersion: v1\nkind: Namespace\nmetadata: {name: istio-system, labels: {topology.istio.io/network: one}}\n")
	sink := newRecorder()
	s, err := kube.New(kube.Config{Cluster: "amber", Network: "two", API: c.REST(), Sink: sink})
	if err != nil {
		t.Fatal(err)
	}
	runSource(t, s)
	sink.wait(t, 20*second, sink.complains("Namespace/istio-system", "NetworkDiffers", "network one", "two"))
	c.apply("apiVersion: v1\nkind: Namespace\nmetadata: {name: istio-system, labels: {topology.istio.io/network: two}}\n")
	sink.wait(t, 20*second, sink.content("NetworkDiffers"))
}
