// Package mesh is the model every other part speaks: clusters, networks, services, endpoints and the
// configuration objects that steer traffic between them, gathered in an immutable Snapshot.
//
// It knows no client, no clock and no I/O. Values reachable from a Snapshot are never written after the
// Snapshot is published: a changed value is a new value, an unchanged one keeps its pointer, so that a reader may
// reuse what it derived from an equal pointer.
package mesh

import (
	"cmp"
	"net/netip"
	"time"
)

// ClusterID names a cluster, as Istio's clusterID: a DNS label, for example "amber". It is unique in the mesh.
type ClusterID string

// NetworkID names a set of endpoints that reach each other directly, as the label topology.istio.io/network.
type NetworkID string

// TrustDomain is the SPIFFE trust domain of one cluster, for example "amber.mesh" (SPIFFE-ID, section 2.1).
type TrustDomain string

// Protocol is what a port speaks, as Istio's port naming and appProtocol give it.
type Protocol string

// The protocols that translations tell apart. HTTP2 and GRPC are HTTP/2 without TLS of the application's own;
// HTTPS and TLS are carried opaquely and routed by SNI.
const (
	HTTP  Protocol = "HTTP"
	HTTP2 Protocol = "HTTP2"
	GRPC  Protocol = "GRPC"
	HTTPS Protocol = "HTTPS"
	TLS   Protocol = "TLS"
	TCP   Protocol = "TCP"
	UDP   Protocol = "UDP"
)

// IsHTTP reports whether Envoy parses the port's bytes as HTTP.
func (p Protocol) IsHTTP() bool { return p == HTTP || p == HTTP2 || p == GRPC }

// IsHTTP2 reports whether the upstream side must be HTTP/2.
func (p Protocol) IsHTTP2() bool { return p == HTTP2 || p == GRPC }

// Freshness says how much the state of a cluster is to be trusted: lost is not empty, so state ages, it does not vanish.
type Freshness int

const (
	// Fresh: heard from within the lease.
	Fresh Freshness = iota
	// Late: not heard from; its endpoints are used only when fresh ones do not suffice (Envoy: DEGRADED).
	Late
	// Expired: its lease has ended; its endpoints are dropped where another cluster serves the same host.
	Expired
)

// String returns "fresh", "late" or "expired".
func (f Freshness) String() string { return [...]string{"fresh", "late", "expired"}[f] }

// ObjectRef names the configuration object a value came from, for Problems and for explain.
type ObjectRef struct {
	Kind      string `json:"kind"`                // Kubernetes kind: Service, VirtualService, ...
	Namespace string `json:"namespace,omitempty"` // empty for cluster-wide objects
	Name      string `json:"name"`
	Source    string `json:"source,omitempty"` // "FILE:LINE" or "cluster NAME"; empty when unknown
}

// String returns KIND/NAMESPACE/NAME, the form in which users name objects.
func (r ObjectRef) String() string {
	if r.Namespace == "" {
		return r.Kind + "/" + r.Name
	}
	return r.Kind + "/" + r.Namespace + "/" + r.Name
}

// Problem is one thing that is wrong with one object. The object is left out or used in part; all others work on.
type Problem struct {
	Object  ObjectRef `json:"object"`
	Field   string    `json:"field,omitempty"` // dotted path in the object, for example "spec.http[0].route[1].destination.subset"
	Reason  string    `json:"reason"`          // CamelCase, stable: a metric label and a condition's reason
	Message string    `json:"message"`         // one line: what is wrong, with the offending value
	Remedy  string    `json:"remedy,omitempty"`
}

// String returns the one line shown to users.
func (p Problem) String() string {
	s := p.Object.String()
	if p.Object.Source != "" {
		s += " (" + p.Object.Source + ")"
	}
	if p.Field != "" {
		s += " " + p.Field
	}
	s += ": " + p.Reason + ": " + p.Message
	if p.Remedy != "" {
		s += "; " + p.Remedy
	}
	return s
}

// Cluster is a member of the mesh: the local one, or a peer as its signed cluster record describes it.
type Cluster struct {
	ID          ClusterID
	TrustDomain TrustDomain
	Network     NetworkID
	Gateways    []netip.AddrPort // east-west gateways as other networks dial them, sorted
	// ControlPlane is where the local control plane listens, as the local gateways dial it; empty for peers.
	ControlPlane []netip.AddrPort
	Roots        []byte // PEM of the trust domain's root certificates
	// Trusts says which bundle of each other trust domain the local cluster and all its proxies have: its SHA-256. Nil of
	// peers.
	Trusts map[TrustDomain][]byte
	// Evictions changes with each cluster that is evicted: connections from before are to be made anew. Empty of peers, and
	// while nobody was evicted.
	Evictions string
	// PodRanges and ServiceRanges are the addresses of its pods and of its services, as far as they are known. Both are
	// sorted, and no two ranges of one overlap.
	PodRanges, ServiceRanges []netip.Prefix
	// Managed: it has no control plane of its own, the local one reads its API server (remote secret). It is no peer:
	// Gateways and Roots are empty, TrustDomain is the local one, Network is what its own API server says, or empty.
	Managed   bool
	Freshness Freshness
	LastHeard time.Time // by the receiver's clock; zero for the local cluster
}

// Port is one port of a Service.
type Port struct {
	Name     string   `json:"name,omitempty"`
	Number   uint32   `json:"number"` // 1..65535
	Protocol Protocol `json:"protocol"`
	// Sniffed: nobody said what the port speaks. Protocol is TCP, and clients look for HTTP in the first bytes.
	Sniffed    bool   `json:"sniffed,omitempty"`
	TargetName string `json:"targetName,omitempty"` // named container port; wins over Target when set
	Target     uint32 `json:"target,omitempty"`     // 0: same as Number
}

// Resolution is how a Service's endpoints are found (ServiceEntry.Resolution).
type Resolution int

const (
	// Static endpoints are addresses the model holds.
	Static Resolution = iota
	// DNS endpoints are host names that Envoy resolves.
	DNS
	// None passes to the address the client dialled.
	None
	// Dynamic resolves the name that each request or TLS connection asks for, below a wildcard host.
	Dynamic
)

// Endpoint is one instance of a Service: a pod, a machine, or an external address.
type Endpoint struct {
	Workload  string            // pod or WorkloadEntry name, a DNS label or subdomain; unique within cluster and namespace
	Namespace string            // namespace of the workload
	Cluster   ClusterID         // where it runs
	Network   NetworkID         // who reaches it directly
	Address   string            // IP; a host name when the Service's Resolution is DNS; "unix://PATH" for a socket of a ServiceEntry
	Ports     map[uint32]uint32 // service port number -> port at Address
	Labels    map[string]string // subsets select by these
	Identity  string            // SPIFFE id, empty when unknown
	Locality  string            // region/zone/subzone
	Weight    uint32            // relative; 0 means 1
	TLS       bool              // accepts mesh mutual TLS
	Ready     bool              // false: known, not to be sent traffic
	Freshness Freshness         // of its cluster, copied here so that an endpoint is complete by itself
	Drained   uint32            // what is taken of its share, in parts of DrainSteps: its cluster is drained
}

// DrainSteps is in how many steps a cluster is drained. At the last one its endpoints are left out where others serve.
const DrainSteps = 20

// PortOf returns where the service's port is at the endpoint's address.
func (e *Endpoint) PortOf(p Port) uint32 { return cmp.Or(e.Ports[p.Number], p.Target, p.Number) }

// Service is one host and who answers for it, merged from all declarations and imports.
type Service struct {
	Host      string // lower case, no trailing dot: "reviews.default.svc.cluster.local", "reviews.default.global", "*.example.com"
	Name      string // object name: "reviews"
	Namespace string
	Object    ObjectRef
	Ports     []Port       // sorted by number
	VIPs      []netip.Addr // what DNS answers; IPv4 before IPv6; empty for headless and wildcard hosts
	// ClusterVIPs are the cluster addresses of a Service that other clusters of the same control plane declare, too;
	// a proxy there listens for these instead of VIPs. Nil when only the local cluster declares it.
	ClusterVIPs     map[ClusterID][]netip.Addr
	Resolution      Resolution
	External        bool           // outside the mesh: no mesh TLS
	Headless        bool           // DNS answers with endpoint addresses
	Global          bool           // a ".global" host: merges every exporter, the local cluster included
	Exported        bool           // the local cluster exports it (set on the local ".svc.cluster.local" service)
	ExportTo        []ClusterID    // when Exported: only to these; empty means every peer. Sorted
	Ranges          []netip.Prefix `json:",omitempty"` // connections to these addresses are for it; DNS does not answer them
	OneAddress      bool           `json:",omitempty"` // resolution DNS: connections go to whatever address was resolved last
	SubjectAltNames []string       `json:",omitempty"` // whom its servers' certificates may name, sorted; empty: the endpoints' identities, or the host
	VisibleTo       []string       `json:",omitempty"` // namespaces that see it (Istio's exportTo); empty: the mesh's default
	Endpoints       []*Endpoint    // sorted by cluster, namespace, workload, address
	Facts           *Facts         `json:",omitempty"` // when Exported, what multi-cluster services compare; of a ".global" host, what that comes to. Nil when unknown
}

// Port returns the port with that number.
func (s *Service) Port(number uint32) (Port, bool) {
	for _, p := range s.Ports {
		if p.Number == number {
			return p, true
		}
	}
	return Port{}, false
}

// VIPsIn returns the addresses by which clients in the cluster call the service.
func (s *Service) VIPsIn(id ClusterID) []netip.Addr {
	if v, ok := s.ClusterVIPs[id]; ok {
		return v
	}
	return s.VIPs
}

// EndpointsIn returns the endpoints that run in the cluster, in the Service's order.
func (s *Service) EndpointsIn(id ClusterID) []*Endpoint {
	var out []*Endpoint
	for _, e := range s.Endpoints {
		if e.Cluster == id {
			out = append(out, e)
		}
	}
	return out
}

// Workload is a pod or a machine of the local cluster, or of one whose API server the local control plane reads,
// whether or not a Service selects it.
type Workload struct {
	Object         ObjectRef
	Cluster        ClusterID // empty: the local cluster
	Name           string
	Namespace      string
	Network        NetworkID // empty: the cluster's
	Addresses      []string  // IPs, IPv4 first; the first is the endpoint address
	Labels         map[string]string
	ServiceAccount string
	TrustDomain    TrustDomain       // empty: the cluster's
	Ports          map[string]uint32 // named ports
	Locality       string
	Weight         uint32
	TLS            bool // has a proxy of the mesh
	Ready          bool
	VM             bool // a machine: WorkloadEntry
}
