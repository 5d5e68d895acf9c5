// Package gateway turns a Snapshot into the Envoy resources of gateways that pass TLS on by server name: one listener
// with a filter chain for each exported service and port, and one small cluster for each exported pod port; and what
// Gateway objects open on routers that they select (AUTO_PASSTHROUGH, PASSTHROUGH and TCP servers).
//
// A gateway forwards mutual TLS by server name and terminates nothing: it holds no key and no certificate. What is
// neither exported nor opened by a Gateway object has no chain, and there is no default chain. Chains carry no pod
// names, so pods that come and go change clusters only; a listener whose chains change drains the connections of those
// chains.
//
// Server names are no authorization: a gateway cannot see who calls. Whom a service is exported to is decided by what
// its records tell each peer, and who may call by the mutual TLS at the pod.
package gateway

import (
	"cmp"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	clusterv3 "github.com/envoyproxy/go-control-plane/envoy/config/cluster/v3"
	listenerv3 "github.com/envoyproxy/go-control-plane/envoy/config/listener/v3"
	networking "istio.io/api/networking/v1"

	"github.com/isthmus-mesh/isthmus/discovery/mesh"
	"github.com/isthmus-mesh/isthmus/discovery/translate/peerauth"
	"github.com/isthmus-mesh/isthmus/eastwest/sni"
	"github.com/isthmus-mesh/isthmus/topologies"
)

const (
	// Port is where east-west gateways listen.
	Port = 15443
	// ListenerName is the name of the one listener.
	ListenerName = "eastwest"
	// ControlPlaneCluster is the cluster of the local control plane.
	ControlPlaneCluster = "control-plane"
	// PodPrefix precedes the server name in the name of a pod port's cluster.
	PodPrefix = "pod|"
	// BlackHole names no cluster: the proxy closes a connection that is sent to it.
	BlackHole = "BlackHoleCluster"
)

// rootNamespace holds Istio configuration that is meant for every namespace.
const rootNamespace = "istio-system"

// Options say who is served and how the listeners are bound. The zero value is an east-west gateway of the local
// cluster with the label istio: eastwestgateway alone.
type Options struct {
	Port    uint32     // of the listener for exported services; 0: Port
	Address netip.Addr // zero: 0.0.0.0
	IPv6    bool       // listen on [::] too
	// Proxy is the router, as topologies.Place has placed it. Exported services are served if it is EastWest.
	Proxy *mesh.Proxy
}

// Resources is what a gateway is served, each kind sorted by name. Clusters carry their endpoints, so that a pod is
// one resource.
type Resources struct {
	Clusters  []*clusterv3.Cluster
	Listeners []*listenerv3.Listener
}

// Translate returns what every east-west gateway of the local cluster serves for snap, and what was left out and why,
// with default Options. It is pure: equal snapshots give equal resources in equal order.
func Translate(snap *mesh.Snapshot) (Resources, []mesh.Problem) { return Options{}.Translate(snap) }

// Translate is the function of that name with these Options.
func (o Options) Translate(snap *mesh.Snapshot) (Resources, []mesh.Problem) {
	if snap == nil || snap.Local == nil {
		return Resources{}, nil
	}
	b := &builder{
		snap: snap, local: snap.Local, proxy: o.Proxy, main: cmp.Or(o.Port, Port), rules: rulesByHost(snap.DestinationRules),
		clusters: map[string]*clusterv3.Cluster{}, binds: map[uint32]*bind{},
	}
	if b.proxy == nil {
		b.proxy = &mesh.Proxy{Type: mesh.Router, Cluster: snap.Local.ID, Network: snap.Local.Network, EastWest: true, Labels: map[string]string{"istio": "eastwestgateway"}}
	}
	if b.proxy.EastWest {
		b.at(b.main)
		if b.here() {
			b.control()
		}
		for _, svc := range exported(snap.Services) {
			b.service(svc, subsets(b.rules[svc.Host], svc.Namespace))
		}
	}
	b.servers()
	slices.SortFunc(b.problems, func(x, y mesh.Problem) int { return cmp.Compare(x.String(), y.String()) })
	b.problems = slices.Compact(b.problems)
	out := Resources{}
	for _, port := range slices.Sorted(maps.Keys(b.binds)) {
		name := ListenerName
		if port != b.main || !b.proxy.EastWest {
			name = "gateway|" + strconv.FormatUint(uint64(port), 10)
		}
		chains := b.binds[port].chains
		slices.SortFunc(chains, func(x, y *listenerv3.FilterChain) int { return cmp.Compare(x.Name, y.Name) })
		out.Listeners = append(out.Listeners, o.listener(name, port, chains))
	}
	slices.SortFunc(out.Listeners, func(x, y *listenerv3.Listener) int { return cmp.Compare(x.Name, y.Name) })
	for _, name := range slices.Sorted(maps.Keys(b.clusters)) {
		out.Clusters = append(out.Clusters, b.clusters[name])
	}
	return out, b.problems
}

// builder gathers what one translation makes.
type builder struct {
	snap     *mesh.Snapshot
	local    *mesh.Cluster
	proxy    *mesh.Proxy
	main     uint32 // the port for exported services
	rules    map[string][]*mesh.DestinationRule
	clusters map[string]*clusterv3.Cluster
	binds    map[uint32]*bind
	problems []mesh.Problem
}

// bind is one port to listen on.
type bind struct {
	chains []*listenerv3.FilterChain
	taken  map[string]string // server name -> chain that has it; "" for a chain without names
}

func (b *builder) at(port uint32) *bind {
	x := b.binds[port]
	if x == nil {
		x = &bind{taken: map[string]string{}}
		b.binds[port] = x
	}
	return x
}

// here reports whether the gateway runs in the local cluster, and not in another that the control plane manages.
func (b *builder) here() bool { return b.proxy.Cluster == b.local.ID }

// control adds the chains that lead to the control plane.
func (b *builder) control() {
	object := mesh.ObjectRef{Kind: "Cluster", Name: string(b.local.ID)}
	td := b.local.TrustDomain
	if !isServerName(string(td)) {
		b.problem(object, "trustDomain", "BadTrustDomain", fmt.Sprintf("%q is no DNS name, so peers cannot reach the control plane by it", td),
			"set trustDomain to a lower-case DNS name")
		return
	}
	if len(b.local.ControlPlane) == 0 {
		b.problem(object, "controlPlane", "NoControlPlane", "the address of the control plane is unknown, so the gateway closes what peers send to it",
			"set advertise in the configuration of isthmusd")
	}
	var targets []target
	for _, addr := range b.local.ControlPlane {
		targets = append(targets, target{addrs: []netip.AddrPort{addr}})
	}
	b.cluster(ControlPlaneCluster, targets)
	for _, c := range sni.Controls {
		b.chain(object, chain{name: "control|" + c.Name(td), names: []string{c.Name(td)}, cluster: ControlPlaneCluster})
	}
}

// service adds chains and clusters of every port of one exported service.
func (b *builder) service(svc *mesh.Service, subsets []*networking.Subset) {
	endpoints, ok := b.endpoints(svc)
	if !ok {
		return
	}
	seen := map[uint32]bool{}
	for _, port := range svc.Ports {
		if port.Protocol == mesh.UDP {
			b.problem(svc.Object, "", "UDPNotExported", fmt.Sprintf("port %d is UDP, which gateways do not carry", port.Number), "")
			continue
		}
		pod := sni.Pod{Workload: "x", Port: port.Number, Cluster: b.local.ID, Service: svc.Name, Namespace: svc.Namespace}
		if _, err := pod.Name(); err != nil {
			b.problem(svc.Object, "", "UnroutableName", fmt.Sprintf("%s is no server name of at most %d octets", pod.Wildcard(), sni.MaxLen),
				"use names that are DNS labels, and shorter ones if they are too long")
			continue
		}
		if seen[port.Number] {
			continue
		}
		seen[port.Number] = true
		name := svc.Namespace + "/" + svc.Name + ":" + strconv.FormatUint(uint64(port.Number), 10)
		var targets []target
		if b.here() { // peers are told of the local cluster's pods alone
			b.chain(svc.Object, chain{name: name, names: []string{pod.Wildcard()}, alpn: sni.ALPN, byName: true})
			targets = b.pods(svc.Object, pod, endpoints)
		}
		targets = append(targets, b.neighbours(svc, port)...)
		b.aggregate(svc, port.Number, name, nil, targets)
		for _, s := range subsets {
			b.aggregate(svc, port.Number, name, s, targets)
		}
	}
}

// endpoints returns the local endpoints of svc that may be offered across networks.
func (b *builder) endpoints(svc *mesh.Service) (out []*mesh.Endpoint, ok bool) {
	var plain []string
	for _, e := range svc.EndpointsIn(b.local.ID) {
		switch {
		case svc.External || !e.TLS || peerauth.OffEverywhere(b.snap.PeerAuthentications, e, svc.Ports):
			plain = append(plain, e.Workload)
		case e.Ready:
			out = append(out, e)
		}
	}
	if len(plain) > 0 {
		slices.Sort(plain)
		plain = slices.Compact(plain)
		names := strings.Join(plain[:min(3, len(plain))], ", ")
		if len(plain) > 3 {
			names += fmt.Sprintf(" and %d more", len(plain)-3)
		}
		b.problem(svc.Object, "", "NoMeshTLS", "exported, but these endpoints do not accept mutual TLS: "+names,
			"put the workloads into the mesh (label sidecar.istio.io/inject: \"true\"), let their PeerAuthentication take mutual TLS, or do not export the service")
	}
	foreign := func(e *mesh.Endpoint) int { // 0: in the service's namespace, which wins a name
		if e.Namespace == svc.Namespace {
			return 0
		}
		return 1
	}
	slices.SortFunc(out, func(x, y *mesh.Endpoint) int {
		return cmp.Or(cmp.Compare(foreign(x), foreign(y)), cmp.Compare(x.Namespace, y.Namespace), cmp.Compare(x.Workload, y.Workload), cmp.Compare(x.Address, y.Address))
	})
	return out, !svc.External
}

// neighbours returns the pods of other clusters of this control plane on the gateway's network.
func (b *builder) neighbours(svc *mesh.Service, port mesh.Port) (out []target) {
	for _, e := range svc.Endpoints {
		if e.Cluster == b.local.ID && b.here() || !b.serves(e) || !e.TLS {
			continue
		}
		if t, ok := b.targetOf(svc, e, port); ok {
			out = append(out, t)
		}
	}
	slices.SortFunc(out, target.compare)
	return out
}

// pods adds the cluster of each pod port and returns the pods as targets, sorted by workload.
func (b *builder) pods(object mesh.ObjectRef, pod sni.Pod, endpoints []*mesh.Endpoint) []target {
	byName := map[string]*target{}
	for _, e := range endpoints {
		number, ok := e.Ports[pod.Port]
		if !ok {
			continue // the pod does not have the port, for example under its name
		}
		addr, err := netip.ParseAddr(e.Address)
		if err != nil || number == 0 || number > 65535 {
			b.problem(object, "", "NoAddress", fmt.Sprintf("endpoint %s has address %q port %d, which a gateway cannot dial", e.Workload, e.Address, number),
				"give the endpoint an IP address and a port")
			continue
		}
		pod.Workload = e.Workload
		name, err := pod.Name()
		if err != nil {
			b.problem(object, "", "UnroutableName", err.Error(), "use names that are DNS names, and shorter ones if they are too long")
			continue
		}
		t := byName[name]
		if t == nil {
			t = &target{name: name, namespace: e.Namespace, endpoint: e, weight: e.Weight}
			byName[name] = t
		}
		if t.namespace != e.Namespace {
			b.problem(object, "", "DuplicateWorkload", fmt.Sprintf("workload %s is in the namespaces %s and %s; only one can be reached by name", e.Workload, t.namespace, e.Namespace),
				"give the workloads different names")
			continue
		}
		t.addrs = append(t.addrs, netip.AddrPortFrom(addr.Unmap(), uint16(number)))
	}
	var out []target
	for _, name := range slices.Sorted(maps.Keys(byName)) {
		t := byName[name]
		slices.SortFunc(t.addrs, netip.AddrPort.Compare)
		t.addrs = slices.Compact(t.addrs)
		b.cluster(PodPrefix+name, []target{*t})
		out = append(out, *t)
	}
	return out
}

// aggregate adds the chain and the cluster that reach any pod of a service, or of one subset of it, by Istio's names.
func (b *builder) aggregate(svc *mesh.Service, port uint32, chainName string, subset *networking.Subset, targets []target) {
	name := subset.GetName()
	global := svc.Name + "." + svc.Namespace + mesh.GlobalSuffix
	var names []string
	for _, host := range []string{global, svc.Host} {
		n := sni.Istio(port, name, host)
		if _, again, _, err := sni.ParseIstio(n); err != nil || again != name || !isServerName(n) {
			b.problem(svc.Object, "", "UnroutableName", fmt.Sprintf("subset %q cannot be part of the server name %s", name, n),
				"use a short subset name of lower-case letters, digits and hyphens")
			return
		}
		names = append(names, n)
	}
	if subset != nil {
		targets = slices.DeleteFunc(slices.Clone(targets), func(t target) bool { return !(t.endpoint != nil && topologies.Selects(subset.Labels, t.endpoint)) })
		chainName += "|" + name
	} else {
		chainName += "|"
	}
	cluster := fmt.Sprintf("outbound|%d|%s|%s", port, name, svc.Host)
	if b.chain(svc.Object, chain{name: chainName, names: names, alpn: sni.ALPN, cluster: cluster}) {
		b.cluster(cluster, targets)
	}
}

// chain adds a filter chain of the port for exported services.
func (b *builder) chain(object mesh.ObjectRef, c chain) bool { return b.chainAt(b.main, object, c) }

// chainAt adds a filter chain unless another chain has one of its names: a proxy refuses the whole listener then.
func (b *builder) chainAt(port uint32, object mesh.ObjectRef, c chain) bool {
	at := b.at(port)
	for _, n := range c.keys() {
		if other, ok := at.taken[n]; ok {
			b.problem(object, "", "ServerNameTaken", fmt.Sprintf("server name %s of chain %s already belongs to chain %s", n, c.name, other), "rename one of them")
			return false
		}
	}
	for _, n := range c.keys() {
		at.taken[n] = c.name
	}
	at.chains = append(at.chains, c.proto())
	return true
}

func (b *builder) cluster(name string, targets []target) { b.clusters[name] = cluster(name, targets) }

func (b *builder) problem(object mesh.ObjectRef, field, reason, message, remedy string) {
	b.problems = append(b.problems, mesh.Problem{Object: object, Field: field, Reason: reason, Message: message, Remedy: remedy})
}

// exported returns the services of the local cluster that have chains, sorted by host.
func exported(services []*mesh.Service) []*mesh.Service {
	var out []*mesh.Service
	for _, s := range services {
		if s.Exported && s.Host == mesh.LocalHost(s.Name, s.Namespace) {
			out = append(out, s)
		}
	}
	slices.SortFunc(out, func(x, y *mesh.Service) int { return cmp.Compare(x.Host, y.Host) })
	return out
}

// rulesByHost groups the rules that are not for selected clients only, sorted by namespace and name.
func rulesByHost(rules []*mesh.DestinationRule) map[string][]*mesh.DestinationRule {
	out := map[string][]*mesh.DestinationRule{}
	for _, r := range rules {
		if r.Spec.GetWorkloadSelector() == nil {
			out[r.Spec.GetHost()] = append(out[r.Spec.GetHost()], r)
		}
	}
	for _, rs := range out {
		slices.SortFunc(rs, func(x, y *mesh.DestinationRule) int {
			return cmp.Or(cmp.Compare(x.Object.Namespace, y.Object.Namespace), cmp.Compare(x.Object.Name, y.Object.Name))
		})
	}
	return out
}

// subsets returns the subsets that the rules in the service's namespace define, or those in the root namespace when
// there are none. The first rule to define a name wins. Rules of other namespaces are for clients there.
func subsets(rules []*mesh.DestinationRule, namespace string) []*networking.Subset {
	byName := map[string]*networking.Subset{}
	for _, ns := range []string{namespace, rootNamespace} {
		for _, r := range rules {
			for _, s := range r.Spec.GetSubsets() {
				if r.Object.Namespace == ns && s.GetName() != "" && byName[s.GetName()] == nil {
					byName[s.GetName()] = s
				}
			}
		}
		if len(byName) > 0 {
			break
		}
	}
	var out []*networking.Subset
	for _, name := range slices.Sorted(maps.Keys(byName)) {
		out = append(out, byName[name])
	}
	return out
}

// isServerName reports whether s can be sent as a server name and be found again: proxies compare in lower case.
func isServerName(s string) bool {
	if s == "" || len(s) > sni.MaxLen || strings.Contains(s, "..") || s[0] == '.' || s[len(s)-1] == '.' {
		return false
	}
	for i := range len(s) {
		if c := s[i]; (c < 'a' || c > 'z') && (c < '0' || c > '9') && c != '-' && c != '.' && c != '_' {
			return false
		}
	}
	return true
}
