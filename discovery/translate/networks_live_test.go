package translate_test

import (
	"errors"
	"fmt"
	"net/http"
	"net/netip"
	"strings"
	"testing"

	"github.com/isthmus-mesh/isthmus/discovery/mesh"
	"github.com/isthmus-mesh/isthmus/discovery/translate"
	"github.com/isthmus-mesh/isthmus/internal/envoytest"
)

// helloWorld has pods of one service on three networks, as c1 sees them: counts are the pods on each.
type helloWorld struct {
	ca    *authority
	pod   *workload
	gates map[mesh.NetworkID][]*workload
	snap  *mesh.Snapshot
}

const helloID, sleepID = "spiffe://mesh.local/ns/sample/sa/hello", "spiffe://mesh.local/ns/sample/sa/sleep"

func newHelloWorld(t *testing.T, pods map[mesh.NetworkID]int, gates map[mesh.NetworkID][]string) *helloWorld {
	t.Helper()
	ca := newAuthority(t)
	w := &helloWorld{ca: ca, pod: startWorkload(t, ca, helloID, ca, sleepID), gates: map[mesh.NetworkID][]*workload{}}
	local := &mesh.Cluster{ID: "c1", TrustDomain: "mesh.local", Network: "network1", Roots: ca.pem}
	w.snap = &mesh.Snapshot{Local: local, Clusters: []*mesh.Cluster{local}}
	hello := &mesh.Service{
		Host: mesh.LocalHost("hello", "sample"), Name: "hello", Namespace: "sample", Object: mesh.ObjectRef{Kind: "Service", Namespace: "sample", Name: "hello"},
		Ports: []mesh.Port{{Name: "http", Number: 5000, Protocol: mesh.HTTP}}, VIPs: addrs("10.96.0.7"),
	}
	w.snap.Services = []*mesh.Service{hello}
	for _, n := range []mesh.NetworkID{"network1", "network2", "network3"} {
		network := &mesh.Network{ID: n}
		for _, host := range gates[n] {
			g := startWorkload(t, ca, helloID, ca, sleepID)
			w.gates[n] = append(w.gates[n], g)
			network.Gateways = append(network.Gateways, mesh.NetworkGateway{Address: host, Port: uint32(g.addrPort().Port())})
		}
		w.snap.Networks = append(w.snap.Networks, network)
		for i := range pods[n] {
			e := &mesh.Endpoint{
				Workload: fmt.Sprintf("hello-%s-%d", n, i), Namespace: "sample", Cluster: "c" + mesh.ClusterID(n[len(n)-1:]), Network: n, Address: fmt.Sprintf("10.9.0.%d", i+1),
				Identity: helloID, TLS: true, Ready: true, Labels: map[string]string{"network": string(n)},
			}
			if n == "network1" { // on loopback there is one
				e.Address, e.Ports = "127.0.0.1", map[uint32]uint32{5000: uint32(w.pod.addrPort().Port())}
			}
			hello.Endpoints = append(hello.Endpoints, e)
		}
	}
	return w
}

// start runs the sidecar of a client in c1 and returns its port.
func (w *helloWorld) start(t *testing.T) uint32 {
	t.Helper()
	p := &mesh.Proxy{ID: "a", Type: mesh.Sidecar, Name: "sleep", Namespace: "sample", Addresses: []netip.Addr{netip.MustParseAddr("10.1.0.9")}}
	r, problems := translate.Translate(w.snap, p)
	if len(problems) > 0 {
		t.Fatal(problems)
	}
	port := freePort(t)
	cert, key := w.ca.issue(t, sleepID)
	cp, addr := serve(t, bindAt(r, map[string]uint32{"0.0.0.0_5000": port}), certificateSecret(cert, key))
	startEnvoy(t, addr)
	eventually(t, "first answer", func() error { return w.call(port) })
	if n := cp.refused(); n != "" {
		t.Fatalf("envoy refused: %s", n)
	}
	return port
}

func (w *helloWorld) call(port uint32) error {
	status, body, err := get(port, "/hello", "hello.sample.svc.cluster.local:5000", "")
	if err == nil && (status != http.StatusOK || !strings.HasPrefix(body, "outbound_.5000_._.hello.sample.svc.cluster.local ")) {
		err = fmt.Errorf("status %d: %s", status, body)
	}
	return err
}

// answered counts who answers n calls: "network1" is the pod, others are gateways by network and number.
func (w *helloWorld) answered(t *testing.T, port uint32, n int) map[string]int {
	t.Helper()
	count := func() map[string]int {
		out := map[string]int{"network1": w.pod.answered()}
		for id, list := range w.gates {
			for i, g := range list {
				out[fmt.Sprintf("%s/%d", id, i)] = g.answered()
			}
		}
		return out
	}
	before := count()
	for range n {
		if err := w.call(port); err != nil {
			t.Fatal(err)
		}
	}
	after := count()
	for k := range after {
		after[k] -= before[k]
	}
	return after
}

// TestEnvoySplitHorizon: with real Envoy one pod counts as one pod, wherever it is and however many gateways lead to it.
func TestEnvoySplitHorizon(t *testing.T) {
	envoytest.Path(t)
	const ip = "127.0.0.1"
	for _, c := range []struct {
		name  string
		pods  map[mesh.NetworkID]int
		gates map[mesh.NetworkID][]string
		want  map[string]int // of 600
	}{
		{"one and one", map[mesh.NetworkID]int{"network1": 1, "network2": 1}, map[mesh.NetworkID][]string{"network2": {ip}}, map[string]int{"network1": 300, "network2/0": 300}},
		{"one and three", map[mesh.NetworkID]int{"network1": 1, "network2": 3}, map[mesh.NetworkID][]string{"network2": {ip}}, map[string]int{"network1": 150, "network2/0": 450}},
		{"three behind two gateways", map[mesh.NetworkID]int{"network1": 1, "network2": 3}, map[mesh.NetworkID][]string{"network2": {ip, ip}}, map[string]int{"network1": 150, "network2/0": 225, "network2/1": 225}},
		{"three networks", map[mesh.NetworkID]int{"network1": 1, "network2": 3, "network3": 2}, map[mesh.NetworkID][]string{"network2": {ip, ip}, "network3": {ip}}, map[string]int{"network1": 100, "network2/0": 150, "network2/1": 150, "network3/0": 200}},
		{"by name", map[mesh.NetworkID]int{"network1": 1, "network2": 3}, map[mesh.NetworkID][]string{"network2": {"localhost"}}, map[string]int{"network1": 150, "network2/0": 450}},
	} {
		t.Run(c.name, func(t *testing.T) {
			w := newHelloWorld(t, c.pods, c.gates)
			port := w.start(t)
			got := w.answered(t, port, 600)
			for who, want := range c.want {
				if n := got[who]; n < want-6 || n > want+6 {
					t.Errorf("%s answered %d, want %d: %v", who, n, want, got)
				}
			}
		})
	}
}

// TestEnvoyNetworkFailover: a rule with outlier detection keeps calls in the client's region, and moves them to the
// other network when the pod is gone.
func TestEnvoyNetworkFailover(t *testing.T) {
	envoytest.Path(t)
	w := newHelloWorld(t, map[mesh.NetworkID]int{"network1": 1, "network2": 2}, map[mesh.NetworkID][]string{"network2": {"127.0.0.1"}})
	hello := w.snap.Services[0]
	w.snap.Workloads = []*mesh.Workload{{Name: "sleep", Namespace: "sample", Locality: "eu/a"}}
	for i, l := range []string{"eu/a", "us/a", "asia/a"} { // the pods behind the gateway are of two regions
		hello.Endpoints[i].Locality = l
	}
	w.snap.DestinationRules = destinationRulesFor(hello.Host, "us")
	port := w.start(t)
	if got := w.answered(t, port, 50); got["network1"] != 50 {
		t.Errorf("with the near pod up: %v", got)
	}
	w.pod.kill()
	failed := 0
	eventually(t, "answers from the other network", func() error {
		err := w.call(port)
		if err != nil {
			failed++
			return err
		}
		if w.gates["network2"][0].answered() == 0 {
			return errors.New("not answered by the gateway")
		}
		return nil
	})
	if got := w.answered(t, port, 50); got["network2/0"] != 50 {
		t.Errorf("with the near pod gone: %v, %d failed before", got, failed)
	}
}
