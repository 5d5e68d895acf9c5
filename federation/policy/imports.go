package policy

import (
	"cmp"
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"time"

	federationv1 "github.com/isthmus-mesh/isthmus/api/federation/v1"
	"github.com/isthmus-mesh/isthmus/discovery/mesh"
	"github.com/isthmus-mesh/isthmus/federation/protocol"
	"google.golang.org/protobuf/proto"
)

// Options steers Imports. The zero value is for production.
type Options struct {
	// AllowLoopback takes gateways and endpoints on loopback addresses, for tests on one machine.
	AllowLoopback bool
	// MaxEndpoints caps the endpoints of one origin; 0 is 100,000. MaxServices its services; 0 is 20,000.
	MaxEndpoints, MaxServices int
	// Memo keeps what was read of each service from one call to the next: one that is unchanged is not read again, and
	// its Import is the same value. nil: everything is read anew.
	Memo *Memo
	// Drained says how much of a cluster's share is taken away, in parts of mesh.DrainSteps. nil: nothing of any.
	Drained map[mesh.ClusterID]uint32
	// OwnRanges are addresses of our own workloads and services: no peer's endpoint may claim them.
	OwnRanges []netip.Prefix
}

// MaxWeight is the highest weight of an endpoint: no peer may draw all traffic, nor overflow a proxy's sum.
const MaxWeight = 10_000

const (
	maxPorts  = 1024
	maxLabels = 128
	maxVIPs   = 16
	maxRanges = 256
	// maxProblems per origin; the last one says how many more there are.
	maxProblems = 100
)

// Origin is what is believed of one peer, ready for a Sink: one Cluster, its Imports and its Problems.
type Origin struct {
	Cluster mesh.ClusterID
	Input   mesh.Input
	Refused map[string]uint64 // how many things are left out, by reason
}

// Imports decodes the records of approved members (those of the local cluster are passed over) into one Input per
// origin, sorted by name. Whatever is refused is left out by itself and named in a Problem; the second result is the
// Problems of all origins. An origin without a usable cluster record gives only Problems.
func Imports(local *mesh.Cluster, records []*federationv1.Record, freshness func(mesh.ClusterID) (mesh.Freshness, time.Time), o Options) ([]Origin, []mesh.Problem) {
	if o.MaxEndpoints <= 0 {
		o.MaxEndpoints = 100_000
	}
	if o.MaxServices <= 0 {
		o.MaxServices = 20_000
	}
	o.Memo.turn(local, o.OwnRanges)
	byOrigin := map[mesh.ClusterID][]*federationv1.Record{}
	var order []mesh.ClusterID
	for _, r := range records {
		id := mesh.ClusterID(r.GetOrigin())
		if id == "" || id == local.ID {
			continue
		}
		if byOrigin[id] == nil {
			order = append(order, id)
		}
		byOrigin[id] = append(byOrigin[id], r)
	}
	slices.Sort(order)
	var out []Origin
	var problems []mesh.Problem
	for _, id := range order {
		in := &importer{o: o, local: local, id: id, freshness: freshness, refused: map[string]uint64{}}
		in.run(byOrigin[id])
		if in.more > 0 {
			in.problems = append(in.problems, mesh.Problem{
				Object: in.ref("Cluster", "", string(id)), Reason: "MoreProblems",
				Message: fmt.Sprintf("%d more things it says are refused", in.more),
			})
		}
		out = append(out, Origin{Cluster: id, Input: mesh.Input{Imports: in.imports, Problems: in.problems}, Refused: in.refused})
		if in.cluster != nil {
			out[len(out)-1].Input.Clusters = []*mesh.Cluster{in.cluster}
		}
	}
	gatewayConflicts(out)
	foreignAddresses(local, out)
	for _, origin := range out {
		problems = append(problems, origin.Input.Problems...)
	}
	return out, problems
}

// importer works on one origin.
type importer struct {
	o         Options
	local     *mesh.Cluster
	id        mesh.ClusterID
	freshness func(mesh.ClusterID) (mesh.Freshness, time.Time)

	cluster   *mesh.Cluster
	imports   []*mesh.Import
	endpoints int
	problems  []mesh.Problem
	more      int
	refused   map[string]uint64
}

func (in *importer) ref(kind, namespace, name string) mesh.ObjectRef {
	return mesh.ObjectRef{Kind: kind, Namespace: namespace, Name: name, Source: "cluster " + string(in.id)}
}

func (in *importer) problem(ref mesh.ObjectRef, field, reason, format string, args ...any) {
	if in.refused != nil {
		in.refused[reason]++
	}
	if len(in.problems) >= maxProblems {
		in.more++
		return
	}
	in.problems = append(in.problems, mesh.Problem{
		Object: ref, Field: field, Reason: reason, Message: fmt.Sprintf(format, args...),
		Remedy: "correct it in cluster " + string(in.id),
	})
}

func (in *importer) run(records []*federationv1.Record) {
	records = slices.SortedFunc(slices.Values(records), func(a, b *federationv1.Record) int {
		return cmp.Or(cmp.Compare(a.Kind, b.Kind), cmp.Compare(a.Key, b.Key), protocol.Compare(b, a))
	})
	endpoints := map[string]*federationv1.Record{}
	var services []*federationv1.Record
	for _, r := range records {
		switch r.Kind {
		case protocol.KindCluster:
			if in.cluster == nil {
				in.readCluster(r)
			}
		case protocol.KindEndpoints:
			if endpoints[r.Key] == nil {
				endpoints[r.Key] = r
			}
		case protocol.KindService:
			if n := len(services); n == 0 || services[n-1].Key != r.Key {
				services = append(services, r)
			}
		}
	}
	if in.cluster == nil {
		if len(services) > 0 {
			in.problem(in.ref("Cluster", "", string(in.id)), "", "NoClusterRecord", "its services are not used: it has not described itself")
		}
		return
	}
	for i, r := range services {
		if i >= in.o.MaxServices {
			in.problem(in.ref("Cluster", "", string(in.id)), "", "TooManyServices", "cluster %s has %d services, %d are allowed, the rest is not used", in.id, len(services), in.o.MaxServices)
			break
		}
		in.recall(r, endpoints[r.Key])
	}
	slices.SortFunc(in.imports, func(a, b *mesh.Import) int {
		return cmp.Or(cmp.Compare(a.Namespace, b.Namespace), cmp.Compare(a.Name, b.Name))
	})
}

func (in *importer) readCluster(r *federationv1.Record) {
	ref := in.ref("Cluster", "", string(in.id))
	body := &federationv1.Cluster{}
	if err := proto.Unmarshal(r.Body, body); err != nil {
		in.problem(ref, "", "Malformed", "its description does not decode: %v", err)
		return
	}
	if !mesh.IsLabel(string(in.id)) || !protocol.IsDomain(body.TrustDomain) {
		in.problem(ref, "trustDomain", "BadName", "trust domain %s is not a DNS name", quote(body.TrustDomain))
		return
	}
	c := &mesh.Cluster{ID: in.id, TrustDomain: mesh.TrustDomain(body.TrustDomain), Network: mesh.NetworkID(body.Network), Roots: body.Bundle}
	if len(body.Network) > 63 {
		in.problem(ref, "network", "BadName", "network %s has more than 63 bytes", quote(body.Network))
		return
	}
	if c.Network == "" && in.local.Network != "" { // no name must not mean: within everybody's reach
		c.Network = mesh.NetworkID(in.id)
	}
	for i, g := range body.Gateways {
		field := "gateways[" + strconv.Itoa(i) + "]"
		ap, err := netip.ParseAddrPort(g)
		if err != nil {
			in.problem(ref, field, "BadGateway", "gateway %s is not ADDRESS:PORT", quote(g))
			continue
		}
		why := BadAddress(ap.Addr(), in.o.AllowLoopback)
		if ap.Port() == 0 {
			why = "has port 0"
		}
		if why == "" && c.Network != in.local.Network && slices.Contains(in.local.Gateways, ap) {
			why = "is one of our own"
		}
		if why != "" {
			in.problem(ref, field, "BadGateway", "gateway %s %s", quote(g), why)
			continue
		}
		c.Gateways = append(c.Gateways, ap)
	}
	c.PodRanges, c.ServiceRanges = in.readRanges(ref, "podRanges", body.PodRanges), in.readRanges(ref, "serviceRanges", body.ServiceRanges)
	slices.SortFunc(c.Gateways, netip.AddrPort.Compare)
	c.Gateways = slices.Compact(c.Gateways)
	if in.freshness != nil {
		c.Freshness, c.LastHeard = in.freshness(in.id)
	}
	in.cluster = c
}

func (in *importer) readService(r, endpoints *federationv1.Record) {
	namespace, name, _ := strings.Cut(r.Key, "/")
	ref := in.ref("Service", namespace, name)
	if !mesh.IsLabel(namespace) || !mesh.IsLabel(name) {
		in.problem(in.ref("Service", "", quote(r.Key)), "", "BadName", "%s is not NAMESPACE/NAME of two DNS labels", quote(r.Key))
		return
	}
	body := &federationv1.Service{}
	if err := proto.Unmarshal(r.Body, body); err != nil {
		in.problem(ref, "", "Malformed", "service does not decode: %v", err)
		return
	}
	if !protocol.Visible(r, in.local.ID) {
		in.problem(ref, "", "NotExported", "service is not exported to %s", in.local.ID)
		return
	}
	imp := &mesh.Import{Cluster: in.id, Namespace: namespace, Name: name}
	imp.Ports = in.readPorts(ref, body.Ports)
	imp.VIPs = in.readVIPs(ref, body.Vips)
	imp.Facts = in.readFacts(ref, body.Export)
	if endpoints != nil {
		in.readEndpoints(ref, imp, endpoints)
	}
	in.imports = append(in.imports, imp)
}

var protocols = []mesh.Protocol{mesh.HTTP, mesh.HTTP2, mesh.GRPC, mesh.HTTPS, mesh.TLS, mesh.TCP, mesh.UDP}

func (in *importer) readPorts(ref mesh.ObjectRef, ports []*federationv1.Port) []mesh.Port {
	var out []mesh.Port
	seen := map[uint32]bool{}
	for i, p := range ports {
		field := "ports[" + strconv.Itoa(i) + "]"
		switch {
		case i >= maxPorts:
			in.problem(ref, "ports", "TooManyPorts", "%d ports, %d are allowed", len(ports), maxPorts)
			return sortPorts(out)
		case p.Number == 0 || p.Number > 65535:
			in.problem(ref, field, "BadPort", "port %d is not 1..65535", p.Number)
			continue
		case seen[p.Number]:
			in.problem(ref, field, "BadPort", "port %d is there twice", p.Number)
			continue
		}
		seen[p.Number] = true
		port := mesh.Port{Name: p.Name, Number: p.Number, Protocol: mesh.Protocol(p.Protocol)}
		if !slices.Contains(protocols, port.Protocol) {
			port.Protocol = mesh.TCP // a protocol that a later version knows
		}
		if port.Name != "" && !mesh.IsLabel(port.Name) {
			in.problem(ref, field, "BadName", "port name %s is not a DNS label", quote(p.Name))
			port.Name = ""
		}
		out = append(out, port)
	}
	return sortPorts(out)
}

func sortPorts(ports []mesh.Port) []mesh.Port {
	slices.SortFunc(ports, func(a, b mesh.Port) int { return cmp.Compare(a.Number, b.Number) })
	return ports
}

var (
	vip4      = netip.MustParsePrefix("240.0.0.0/4")
	vip6      = netip.MustParsePrefix("fd00::/8")
	broadcast = netip.MustParseAddr("255.255.255.255")
	metadata4 = netip.MustParseAddr("169.254.169.254")
	metadata6 = netip.MustParseAddr("fd00:ec2::254")
)

func (in *importer) readVIPs(ref mesh.ObjectRef, vips []string) []netip.Addr {
	var out []netip.Addr
	for i, s := range vips {
		if i >= maxVIPs {
			in.problem(ref, "vips", "TooManyVIPs", "%d virtual addresses, %d are allowed", len(vips), maxVIPs)
			break
		}
		ip, err := netip.ParseAddr(s)
		if err != nil || ip.Zone() != "" || ip == broadcast || ip == metadata6 || !vip4.Contains(ip) && !vip6.Contains(ip) {
			in.problem(ref, "vips["+strconv.Itoa(i)+"]", "BadVIP", "virtual address %s is not in %s or %s", quote(s), vip4, vip6)
			continue
		}
		out = append(out, ip)
	}
	slices.SortFunc(out, netip.Addr.Compare)
	return slices.Compact(out)
}

func (in *importer) readEndpoints(ref mesh.ObjectRef, imp *mesh.Import, r *federationv1.Record) {
	body := &federationv1.Endpoints{}
	if err := proto.Unmarshal(r.Body, body); err != nil {
		in.problem(ref, "endpoints", "Malformed", "endpoints do not decode: %v", err)
		return
	}
	if !protocol.Visible(r, in.local.ID) {
		in.problem(ref, "endpoints", "NotExported", "endpoints are not exported to %s", in.local.ID)
		return
	}
	if in.local.Network == "" && in.cluster.Network != "" && len(body.Endpoints) > 0 {
		in.problem(ref, "endpoints", "NoLocalNetwork", "our own network has no name, so it is not known how to reach network %s", in.cluster.Network)
		if last := &in.problems[len(in.problems)-1]; last.Reason == "NoLocalNetwork" {
			last.Remedy = "set network in the configuration of isthmusd"
		}
		return
	}
	seen := map[string]bool{}
	for i, e := range body.Endpoints {
		if in.endpoints >= in.o.MaxEndpoints {
			in.problem(ref, "endpoints", "TooManyEndpoints", "cluster %s has more than %d endpoints, the rest is not used", in.id, in.o.MaxEndpoints)
			break
		}
		field := "endpoints[" + strconv.Itoa(i) + "]"
		if seen[e.Workload] {
			in.problem(ref, field, "DuplicateWorkload", "workload %s is there twice", quote(e.Workload))
			continue
		}
		if out := in.readEndpoint(ref, field, imp, e); out != nil {
			seen[e.Workload] = true
			in.endpoints++
			imp.Endpoints = append(imp.Endpoints, out)
		}
	}
	slices.SortFunc(imp.Endpoints, func(a, b *mesh.Endpoint) int {
		return cmp.Or(cmp.Compare(a.Workload, b.Workload), cmp.Compare(a.Address, b.Address))
	})
}

func (in *importer) readEndpoint(ref mesh.ObjectRef, field string, imp *mesh.Import, e *federationv1.Endpoint) *mesh.Endpoint {
	refuse := func(reason, format string, args ...any) *mesh.Endpoint {
		in.problem(ref, field, reason, format, args...)
		return nil
	}
	// The longest server name of the workload: WORKLOAD.p65535.CLUSTER.SERVICE.NAMESPACE.global.
	length := len(e.Workload) + len(".p65535.") + len(in.id) + 1 + len(imp.Name) + 1 + len(imp.Namespace) + len(mesh.GlobalSuffix)
	network := mesh.NetworkID(e.Network)
	if network == "" {
		network = in.cluster.Network
	}
	switch {
	case !protocol.IsDomain(e.Workload):
		return refuse("BadName", "workload %s is not a DNS name", quote(e.Workload))
	case length > protocol.MaxKey:
		return refuse("NameTooLong", "server name of workload %s has up to %d bytes, %d are allowed", quote(e.Workload), length, protocol.MaxKey)
	case e.ServiceAccount != "" && !protocol.IsDomain(e.ServiceAccount):
		return refuse("BadName", "service account %s of workload %s is not a DNS name", quote(e.ServiceAccount), e.Workload)
	case len(e.Network) > 63:
		return refuse("BadName", "network %s of workload %s has more than 63 bytes", quote(e.Network), e.Workload)
	case network == in.local.Network && in.cluster.Network != in.local.Network:
		return refuse("ForeignNetwork", "workload %s claims our network %s, its cluster is on %s", e.Workload, quote(e.Network), in.cluster.Network)
	case len(e.Labels) > maxLabels:
		return refuse("TooManyLabels", "workload %s has %d labels, %d are allowed", e.Workload, len(e.Labels), maxLabels)
	case len(e.Locality) > protocol.MaxKey:
		return refuse("BadName", "locality of workload %s has more than %d bytes", e.Workload, protocol.MaxKey)
	case len(e.Ports) > maxPorts:
		return refuse("TooManyPorts", "workload %s has %d ports, %d are allowed", e.Workload, len(e.Ports), maxPorts)
	}
	for service, target := range e.Ports {
		if service == 0 || service > 65535 || target == 0 || target > 65535 {
			return refuse("BadPort", "workload %s has a port that is not 1..65535", e.Workload)
		}
	}
	out := &mesh.Endpoint{
		Workload: e.Workload, Namespace: imp.Namespace, Cluster: in.id, Network: network, Ports: e.Ports, Labels: e.Labels,
		Locality: e.Locality, Weight: e.Weight, TLS: true, Ready: !e.NotReady, Freshness: in.cluster.Freshness, Drained: in.o.Drained[in.id],
	}
	if e.ServiceAccount != "" {
		out.Identity = mesh.SPIFFE(in.cluster.TrustDomain, imp.Namespace, e.ServiceAccount)
	}
	if e.Weight > MaxWeight {
		in.problem(ref, field, "BadWeight", "weight %d of workload %s is over %d", e.Weight, e.Workload, MaxWeight)
		out.Weight = MaxWeight
	}
	if e.Address == "" && network == in.local.Network {
		return refuse("BadAddress", "workload %s has no address, and its network %s is ours", e.Workload, network)
	}
	if e.Address != "" {
		ip, err := netip.ParseAddr(e.Address)
		if err != nil {
			return refuse("BadAddress", "address %s of workload %s is not an IP address", quote(e.Address), e.Workload)
		}
		if why := BadAddress(ip, in.o.AllowLoopback); why != "" {
			return refuse("BadAddress", "address %s of workload %s %s", quote(e.Address), e.Workload, why)
		}
		if network == in.local.Network { // elsewhere only its gateways are ever dialled
			for _, own := range in.o.OwnRanges {
				if own.Contains(ip) {
					return refuse("BadAddress", "address %s of workload %s is in our own range %s", ip, e.Workload, own)
				}
			}
			out.Address = ip.String()
		}
	}
	return out
}

func quote(s string) string {
	if len(s) > 80 {
		return strconv.QuoteToASCII(s[:80]) + "..."
	}
	return strconv.QuoteToASCII(s)
}
