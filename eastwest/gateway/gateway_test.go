package gateway_test

import (
	"fmt"
	"math/rand/v2"
	"net"
	"net/netip"
	"slices"
	"strings"
	"testing"

	clusterv3 "github.com/envoyproxy/go-control-plane/envoy/config/cluster/v3"
	listenerv3 "github.com/envoyproxy/go-control-plane/envoy/config/listener/v3"
	"google.golang.org/protobuf/proto"
	"sigs.k8s.io/yaml"

	tcpproxyv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/tcp_proxy/v3"

	"github.com/isthmus-mesh/isthmus/discovery/mesh"
	"github.com/isthmus-mesh/isthmus/eastwest/gateway"
	"github.com/isthmus-mesh/isthmus/eastwest/gateway/gatewaytest"
	"github.com/isthmus-mesh/isthmus/internal/golden"
	"github.com/isthmus-mesh/isthmus/topologies"
)

// TestTranslate compares the outputs that a case names: clusters.json and listeners.json in full, routes.txt as one line
// for each chain and cluster, and always problems.txt.
func TestTranslate(t *testing.T) {
	for _, c := range golden.Cases(t, "testdata/*.txtar") {
		t.Run(c.Name, func(t *testing.T) {
			snap := parse(t, c.File("snapshot.yaml"))
			var options gateway.Options
			if text := c.File("proxy.yaml"); text != nil {
				p := &mesh.Proxy{}
				if err := yaml.UnmarshalStrict(text, p); err != nil {
					t.Fatal(err)
				}
				options.Proxy = topologies.Place(snap, p)
			}
			got, problems := options.Translate(snap)
			for _, name := range c.Names() {
				switch name {
				case "clusters.json":
					c.Want(t, name, golden.ProtoJSON(t, got.Clusters))
				case "listeners.json":
					c.Want(t, name, golden.ProtoJSON(t, got.Listeners))
				case "routes.txt":
					c.Want(t, name, routes(t, got))
				}
			}
			c.Want(t, "problems.txt", golden.Lines(problems))
			for seed := range uint64(5) {
				again, problemsAgain := options.Translate(shuffled(snap, seed))
				if !slices.Equal(encode(t, got), encode(t, again)) {
					t.Errorf("seed %d: shuffled input gives other resources", seed)
				}
				if golden.Lines(problems) != golden.Lines(problemsAgain) {
					t.Errorf("seed %d: shuffled input gives other problems", seed)
				}
			}
			if !testing.Short() {
				gatewaytest.Validate(t, got)
			}
		})
	}
}

func TestOptions(t *testing.T) {
	got, problems := gateway.Options{Port: 1234, Address: netip.MustParseAddr("127.0.0.1"), IPv6: true}.Translate(
		&mesh.Snapshot{Local: &mesh.Cluster{ID: "amber", TrustDomain: "amber.mesh", ControlPlane: []netip.AddrPort{netip.MustParseAddrPort("10.0.0.1:1")}}})
	if len(problems) != 0 || len(got.Listeners) != 1 {
		t.Fatalf("%d listeners, problems %v", len(got.Listeners), problems)
	}
	l := got.Listeners[0]
	if a := l.Address.GetSocketAddress(); a.Address != "127.0.0.1" || a.GetPortValue() != 1234 {
		t.Errorf("address %v", a)
	}
	if len(l.AdditionalAddresses) != 1 || l.AdditionalAddresses[0].Address.GetSocketAddress().Address != "::" {
		t.Errorf("additional addresses %v", l.AdditionalAddresses)
	}
	if l.DefaultFilterChain != nil {
		t.Error("there is a default chain")
	}
	if !testing.Short() {
		gatewaytest.Validate(t, got)
	}
	if got, problems := gateway.Translate(&mesh.Snapshot{}); len(got.Listeners)+len(got.Clusters)+len(problems) != 0 {
		t.Errorf("a snapshot without a local cluster gives %v, %v", got, problems)
	}
}

// TestPodsLeaveListenerAlone checks the property that keeps connections open while pods come and go.
func TestPodsLeaveListenerAlone(t *testing.T) {
	snap := parse(t, golden.Cases(t, "testdata/pods.txtar")[0].File("snapshot.yaml"))
	before, _ := gateway.Translate(snap)
	svc := *snap.Service("web.shop.svc.cluster.local")
	svc.Endpoints = svc.Endpoints[1:]
	less := *snap
	less.Services = []*mesh.Service{&svc}
	after, _ := gateway.Translate(&less)
	if !proto.Equal(before.Listeners[0], after.Listeners[0]) {
		t.Error("the listener changed with a pod")
	}
	if len(after.Clusters) >= len(before.Clusters) {
		t.Errorf("%d clusters before, %d after", len(before.Clusters), len(after.Clusters))
	}
}

func parse(t *testing.T, data []byte) *mesh.Snapshot {
	t.Helper()
	snap := &mesh.Snapshot{}
	if err := yaml.UnmarshalStrict(data, snap); err != nil {
		t.Fatalf("snapshot.yaml: %v", err)
	}
	slices.SortFunc(snap.Services, func(a, b *mesh.Service) int { return strings.Compare(a.Host, b.Host) })
	return snap
}

// shuffled returns a copy with another order of everything that is a list.
func shuffled(snap *mesh.Snapshot, seed uint64) *mesh.Snapshot {
	r := rand.New(rand.NewPCG(seed, 1))
	out := *snap
	out.DestinationRules = shuffle(r, snap.DestinationRules)
	out.Services = shuffle(r, snap.Services)
	for i, s := range out.Services {
		s := *s
		s.Endpoints = shuffle(r, s.Endpoints)
		s.Ports = shuffle(r, s.Ports)
		out.Services[i] = &s
	}
	return &out
}

func shuffle[T any](r *rand.Rand, xs []T) []T {
	out := slices.Clone(xs)
	r.Shuffle(len(out), func(i, j int) { out[i], out[j] = out[j], out[i] })
	return out
}

func encode(t *testing.T, res gateway.Resources) []string {
	t.Helper()
	var out []string
	add := func(m proto.Message) {
		b, err := proto.MarshalOptions{Deterministic: true}.Marshal(m)
		if err != nil {
			t.Fatal(err)
		}
		out = append(out, string(b))
	}
	for _, c := range res.Clusters {
		add(c)
	}
	for _, l := range res.Listeners {
		add(l)
	}
	return out
}

// routes shows chains as "chain NAME [ALPN]: SERVER NAMES -> CLUSTER" and clusters as "cluster NAME: ADDRESSES".
func routes(t *testing.T, res gateway.Resources) string {
	t.Helper()
	var b strings.Builder
	for _, l := range res.Listeners {
		if len(res.Listeners) > 1 || l.Name != gateway.ListenerName {
			fmt.Fprintf(&b, "listener %s at %d\n", l.Name, l.Address.GetSocketAddress().GetPortValue())
		}
		chainsOf(t, &b, l)
	}
	for _, c := range res.Clusters {
		fmt.Fprintf(&b, "cluster %s:%s\n", c.Name, addresses(c))
	}
	return b.String()
}

func chainsOf(t *testing.T, b *strings.Builder, l *listenerv3.Listener) {
	t.Helper()
	if l.DefaultFilterChain != nil {
		t.Errorf("listener %s has a default chain", l.Name)
	}
	for _, c := range l.FilterChains {
		if c.TransportSocket != nil {
			t.Errorf("chain %s terminates TLS", c.Name)
		}
		proxy := &tcpproxyv3.TcpProxy{}
		if err := c.Filters[len(c.Filters)-1].GetTypedConfig().UnmarshalTo(proxy); err != nil {
			t.Fatal(err)
		}
		to := proxy.GetCluster()
		if len(c.Filters) == 2 {
			to = gateway.PodPrefix + "SNI"
		}
		alpn := ""
		if len(c.FilterChainMatch.ApplicationProtocols) > 0 {
			alpn = " ALPN"
		}
		for _, w := range proxy.GetWeightedClusters().GetClusters() {
			to += fmt.Sprintf("%s (%d) ", w.Name, w.Weight)
		}
		names := strings.Join(c.FilterChainMatch.ServerNames, " ")
		if names == "" {
			names = "any " + c.FilterChainMatch.TransportProtocol
		}
		fmt.Fprintf(b, "chain %s%s: %s -> %s\n", c.Name, alpn, names, to)
	}
}

func addresses(c *clusterv3.Cluster) string {
	var b strings.Builder
	for _, locality := range c.LoadAssignment.Endpoints {
		for _, e := range locality.LbEndpoints {
			a := e.GetEndpoint().Address.GetSocketAddress()
			fmt.Fprintf(&b, " %s", net.JoinHostPort(a.Address, fmt.Sprint(a.GetPortValue())))
			for _, more := range e.GetEndpoint().AdditionalAddresses {
				a := more.Address.GetSocketAddress()
				fmt.Fprintf(&b, "+%s", netip.AddrPortFrom(netip.MustParseAddr(a.Address), uint16(a.GetPortValue())))
			}
		}
	}
	return b.String()
}
