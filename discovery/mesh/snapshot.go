package mesh

import (
	"cmp"
	"net/netip"
	"slices"
	"sort"
)

// Snapshot is one consistent state of everything a control plane knows. It is immutable.
type Snapshot struct {
	Revision            uint64
	Local               *Cluster
	Clusters            []*Cluster  // sorted by ID, Local included
	Services            []*Service  // sorted by host
	Workloads           []*Workload // of the local cluster, sorted by namespace and name
	VirtualServices     []*VirtualService
	DestinationRules    []*DestinationRule // these five sorted by namespace and name
	Sidecars            []*SidecarConfig
	Gateways            []*Gateway
	PeerAuthentications []*PeerAuthentication

	AuthorizationPolicies  []*AuthorizationPolicy // these three sorted by namespace and name
	RequestAuthentications []*RequestAuthentication
	EnvoyFilters           []*EnvoyFilter
	Credentials            []*Credential
	ProxyConfigs           []*ProxyConfig // these two sorted by namespace and name
	WorkloadGroups         []*WorkloadGroup
	KubeObjects            []*KubeObject   // what the next three follow from, with objects above
	Statuses               []*ObjectStatus // see Derived
	Backends               []*BackendTLS
	Objects                []*WantedObject

	Networks   []*Network  // sorted by ID, one each, gateways sorted and without repeats
	MeshConfig *MeshConfig // nil: Istio's defaults
	Exports    []*Export   // ServiceExports of the local cluster, sorted by namespace and name
	Imports    []*Import   // sorted by namespace, name, cluster: what each peer exports to us
	Problems   []Problem   // sorted by object

	Delta *Delta `json:"-"` // nil: compare with the Snapshot before; see Since
}

// Service returns the service with exactly that host, or nil.
func (s *Snapshot) Service(host string) *Service {
	i := sort.Search(len(s.Services), func(i int) bool { return s.Services[i].Host >= host })
	if i < len(s.Services) && s.Services[i].Host == host {
		return s.Services[i]
	}
	return nil
}

// Cluster returns the member with that ID, or nil.
func (s *Snapshot) Cluster(id ClusterID) *Cluster {
	i, ok := slices.BinarySearchFunc(s.Clusters, id, func(c *Cluster, id ClusterID) int { return cmp.Compare(c.ID, id) })
	if ok {
		return s.Clusters[i]
	}
	return nil
}

// Network returns what is configured of the network with that ID, or nil.
func (s *Snapshot) Network(id NetworkID) *Network {
	i, ok := slices.BinarySearchFunc(s.Networks, id, func(n *Network, id NetworkID) int { return cmp.Compare(n.ID, id) })
	if ok {
		return s.Networks[i]
	}
	return nil
}

// ExternalNetwork is the network of endpoints that egress gateways alone are to call, by Istio's convention
// (ISTIO_META_REQUESTED_NETWORK_VIEW=external). Unless somebody makes it a network with gateways, whoever calls them does so
// directly.
const ExternalNetwork NetworkID = "external"

// ProxyType is the first part of an Istio node id.
type ProxyType string

const (
	// Sidecar runs beside one workload, or on one machine.
	Sidecar ProxyType = "sidecar"
	// Router is a gateway: ingress, egress or east-west.
	Router ProxyType = "router"
	// Proxyless is a gRPC client or server that speaks xDS itself (node metadata GENERATOR=grpc).
	Proxyless ProxyType = "grpc"
)

// Proxy is one client of the control plane, as its node id and metadata describe it (Istio's node metadata) and as
// its certificate proves it.
type Proxy struct {
	ID        string // sidecar~IP~NAME.NS~DOMAIN
	Type      ProxyType
	Name      string // workload name
	Namespace string
	Domain    string       // DNS domain for short names, "default.svc.cluster.local"
	Addresses []netip.Addr // node id's address first, then INSTANCE_IPS
	Network   NetworkID    // metadata NETWORK; empty: the cluster's
	Cluster   ClusterID    // metadata CLUSTER_ID; empty: the local cluster
	Locality  string       // region/zone/subzone of the node message; empty when unknown
	Placed    bool         // Cluster, Network and Locality are where it is, not what its node says (topologies.Place)
	// NetworkView: endpoints on these networks only are for this proxy (metadata REQUESTED_NETWORK_VIEW); empty: on all.
	NetworkView []NetworkID
	Labels      map[string]string
	Identity    string // SPIFFE id of the authenticated client; empty on the plaintext port
	Transparent bool   // what is captured on its way in keeps its destination on the packet (metadata INTERCEPTION_MODE TPROXY)
	Version     string // metadata ISTIO_VERSION
	// Metadata are the other texts of the node's metadata, which EnvoyFilters may ask for.
	Metadata map[string]string
	EastWest bool // a Router that serves port 15443 between clusters (label istio: eastwestgateway)
}

// Runs reports whether e is p's own workload. An empty Cluster of p matches none.
func (p *Proxy) Runs(e *Endpoint) bool {
	return e.Workload == p.Name && e.Namespace == p.Namespace && e.Cluster == p.Cluster
}

// BindPort returns the port at p's workload that the port of its Service leads to; without a Service it is the same.
func (s *Snapshot) BindPort(p *Proxy, port uint32) uint32 {
	for _, svc := range s.Services {
		x, ok := svc.Port(port)
		if !ok || svc.Global {
			continue
		}
		if i := slices.IndexFunc(svc.Endpoints, p.Runs); i >= 0 {
			return svc.Endpoints[i].PortOf(x)
		}
	}
	return port
}

// SPIFFE returns the SPIFFE id of a service account: spiffe://TD/ns/NS/sa/SA.
func SPIFFE(td TrustDomain, namespace, serviceAccount string) string {
	return "spiffe://" + string(td) + "/ns/" + namespace + "/sa/" + serviceAccount
}

// GlobalSuffix is the DNS zone of imported services.
const GlobalSuffix = ".global"

// LocalHost returns the host of a Kubernetes Service in its own cluster: NAME.NAMESPACE.svc.cluster.local.
func LocalHost(name, namespace string) string { return name + "." + namespace + ".svc.cluster.local" }

// GlobalHost returns the host under which every exporter's NAME in NAMESPACE is merged: NAME.NAMESPACE.global.
func GlobalHost(name, namespace string) string { return name + "." + namespace + GlobalSuffix }

// IsLabel reports whether s is a DNS label in lower case (RFC 1123, section 2.1).
func IsLabel(s string) bool {
	if s == "" || len(s) > 63 || s[0] == '-' || s[len(s)-1] == '-' {
		return false
	}
	for i := range len(s) {
		if c := s[i]; (c < 'a' || c > 'z') && (c < '0' || c > '9') && c != '-' {
			return false
		}
	}
	return true
}
