package mesh

import (
	"cmp"
	"net/netip"
	"reflect"
	"slices"
	"strconv"
	"time"

	meshconfig "istio.io/api/mesh/v1alpha1"
	networking "istio.io/api/networking/v1"
	envoyfilter "istio.io/api/networking/v1alpha3"
	proxyconfig "istio.io/api/networking/v1beta1"
	security "istio.io/api/security/v1"
)

// ServiceDecl is a Kubernetes Service or an Istio ServiceEntry as declared, before endpoints are joined to it.
type ServiceDecl struct {
	Object     ObjectRef
	Cluster    ClusterID // whose API server declares it; empty: the local cluster
	Hosts      []string  // fully qualified; one for a Kubernetes Service
	Ports      []Port
	Selector   map[string]string // nil: endpoints come from Endpoints or from EndpointSlices
	Addresses  []netip.Addr      // clusterIPs, or ServiceEntry addresses that are single addresses
	Endpoints  []*Endpoint       // ServiceEntry's inline endpoints; Cluster and Network may be empty: the local ones
	Resolution Resolution
	External   bool
	Headless   bool
	// PublishNotReady: selected pods count as ready whatever they say (publishNotReadyAddresses).
	PublishNotReady bool           `json:",omitempty"`
	Export          bool           // label isthmus.io/export: "true" on the Service or its Namespace
	ExportTo        []ClusterID    // annotation isthmus.io/export-to; empty: every peer
	Outside         []string       `json:",omitempty"` // addresses and names by which a Kubernetes Service is reached from outside of the cluster, sorted
	Balanced        bool           `json:",omitempty"` // of type LoadBalancer: without Outside it has no address yet
	Facts           *Facts         `json:",omitempty"` // of a Kubernetes Service; nil otherwise
	Ranges          []netip.Prefix `json:",omitempty"` // ServiceEntry addresses that are ranges
	OneAddress      bool           `json:",omitempty"` // resolution DNS: connections go to whatever address was resolved last (DNS_ROUND_ROBIN)
	SubjectAltNames []string       `json:",omitempty"` // whom its servers' certificates may name (ServiceEntry); empty: as elsewhere
	VisibleTo       []string       `json:",omitempty"` // namespaces that see it (Istio's exportTo: names, ".", "*", "~"); empty: the mesh's default
}

// EndpointSlice is a Kubernetes EndpointSlice of a Service that has no selector here.
type EndpointSlice struct {
	Object  ObjectRef
	Cluster ClusterID // whose API server holds it; empty: the local cluster
	Service string    // name of the Service in Object.Namespace
	// Endpoints carry Ports keyed by the slice's own port numbers under PortNames; the store maps them to service ports by name.
	Endpoints []*Endpoint
	PortNames map[string]uint32 // slice port name -> port at the endpoint
}

// Export is an MCS ServiceExport.
type Export struct {
	Object   ObjectRef // name and namespace are those of the Service
	ExportTo []ClusterID
	Created  time.Time // of the ServiceExport; of two exports that conflict the oldest wins (KEP-1645). Zero when unknown
	// Generation is the object's metadata.generation that the rest was read from; 0 when unknown.
	Generation  int64
	Labels      map[string]string `json:",omitempty"` // exportedLabels
	Annotations map[string]string `json:",omitempty"` // exportedAnnotations
}

// Network is what the mesh's own configuration says of one network: meshNetworks, the label topology.istio.io/network
// on a gateway's Service, or a Gateway API Gateway of class istio-east-west. Gateways of peers stand in their Cluster.
type Network struct {
	ID       NetworkID
	Object   ObjectRef
	Gateways []NetworkGateway
	// Registries are the clusters whose pods are on the network (meshNetworks' fromRegistry).
	Registries []ClusterID
	// CIDRs are address ranges on the network (meshNetworks' fromCidr); they win over Registries.
	CIDRs []netip.Prefix
}

// NetworkGateway is one address under which other networks reach a network.
type NetworkGateway struct {
	Object   ObjectRef
	Address  string    // an IP, or a host name that Envoy resolves
	Port     uint32    // 1..65535, usually 15443
	Cluster  ClusterID // where the gateway runs; empty when unknown
	Locality string    // region/zone/subzone; empty when unknown
}

// MeshConfig is Istio's mesh-wide configuration, with Istio's defaults filled in where it is silent.
type MeshConfig struct {
	Object ObjectRef
	Spec   *meshconfig.MeshConfig
}

// GetSpec returns the spec, nil where there is none and Istio's defaults hold.
func (c *MeshConfig) GetSpec() *meshconfig.MeshConfig {
	if c == nil {
		return nil
	}
	return c.Spec
}

// VirtualService is an Istio VirtualService with hosts and destinations written out in full.
type VirtualService struct {
	Object ObjectRef
	Spec   *networking.VirtualService
	// Origins says where each rule of Spec.Http stands when delegates gave some; nil: in Object, in the same order.
	Origins []Origin `json:",omitempty"`
	// GatewayAPI: prefixes of paths end at a slash, and what leads to no destination gets 500, as in the Gateway API.
	GatewayAPI bool `json:",omitempty"`
}

// Origin is the place of one HTTP rule.
type Origin struct {
	Object ObjectRef
	Index  int    // in spec.http, or in Field
	Field  string `json:",omitempty"` // "spec.rules" of the Gateway API's routes; empty: spec.http
}

// Rule returns the object that has the HTTP rule with that index in Spec.Http, and its path there.
func (vs *VirtualService) Rule(i int) (ObjectRef, string) {
	if i < len(vs.Origins) {
		return vs.Origins[i].Object, cmp.Or(vs.Origins[i].Field, "spec.http") + "[" + strconv.Itoa(vs.Origins[i].Index) + "]"
	}
	return vs.Object, "spec.http[" + strconv.Itoa(i) + "]"
}

// DestinationRule is an Istio DestinationRule with its host written out in full.
type DestinationRule struct {
	Object ObjectRef
	Spec   *networking.DestinationRule
}

// SidecarConfig is an Istio Sidecar object: what the proxies of its namespace, or those it selects, see and listen to.
type SidecarConfig struct {
	Object ObjectRef
	Spec   *networking.Sidecar
}

// GetSpec returns the spec, nil for no Sidecar.
func (s *SidecarConfig) GetSpec() *networking.Sidecar {
	if s == nil {
		return nil
	}
	return s.Spec
}

// Gateway is an Istio Gateway.
type Gateway struct {
	Object ObjectRef
	Spec   *networking.Gateway
	// Routers is the namespace of those that it selects; empty: any.
	Routers string `json:",omitempty"`
	// Secrets are those that its servers may name in any namespace ("kubernetes-gateway://NAMESPACE/NAME"); others they
	// name are of the router's namespace.
	Secrets []string `json:",omitempty"`
}

// PeerAuthentication is an Istio PeerAuthentication.
type PeerAuthentication struct {
	Object ObjectRef
	Spec   *security.PeerAuthentication
}

// AuthorizationPolicy is an Istio AuthorizationPolicy. DryRun: it is evaluated and counted, and decides nothing
// (annotation istio.io/dry-run). Closed: the object is wrong, and Spec keeps out all that it may have been meant to.
type AuthorizationPolicy struct {
	Object ObjectRef
	DryRun bool
	Closed bool                          `json:",omitempty"`
	Spec   *security.AuthorizationPolicy // never nil; without rules it allows nothing
}

// RequestAuthentication is an Istio RequestAuthentication. Closed: the object is wrong, and takes no token.
type RequestAuthentication struct {
	Object ObjectRef
	Closed bool `json:",omitempty"`
	Spec   *security.RequestAuthentication
}

// EnvoyFilter is an Istio EnvoyFilter. Created orders filters of one priority; zero when unknown.
type EnvoyFilter struct {
	Object  ObjectRef
	Created time.Time
	Spec    *envoyfilter.EnvoyFilter
}

// ProxyConfig is an Istio ProxyConfig: what the proxies of a mesh, a namespace or a workload start with. Created orders
// several of a kind; zero when unknown.
type ProxyConfig struct {
	Object  ObjectRef
	Created time.Time
	Spec    *proxyconfig.ProxyConfig
}

// WorkloadGroup is an Istio WorkloadGroup: what the WorkloadEntries of machines of one kind have in common.
type WorkloadGroup struct {
	Object ObjectRef
	Spec   *networking.WorkloadGroup // never without a template
}

// Import is what one peer exports under one name, as its records say.
type Import struct {
	Cluster   ClusterID
	Namespace string
	Name      string
	Ports     []Port
	VIPs      []netip.Addr // the addresses the exporter claims for NAME.NAMESPACE.global
	Endpoints []*Endpoint  // Ready, Freshness and Identity filled in
	Facts     *Facts       `json:",omitempty"` // nil: the peer tells none
}

// Input is all that one source knows under one key. A source reports it whole, again and again.
type Input struct {
	Clusters            []*Cluster
	Services            []*ServiceDecl
	Workloads           []*Workload
	Slices              []*EndpointSlice
	Exports             []*Export
	Imports             []*Import
	VirtualServices     []*VirtualService
	DestinationRules    []*DestinationRule
	Sidecars            []*SidecarConfig
	Gateways            []*Gateway
	PeerAuthentications []*PeerAuthentication

	AuthorizationPolicies  []*AuthorizationPolicy
	RequestAuthentications []*RequestAuthentication
	EnvoyFilters           []*EnvoyFilter
	Credentials            []*Credential
	ProxyConfigs           []*ProxyConfig
	WorkloadGroups         []*WorkloadGroup
	KubeObjects            []*KubeObject

	PodRanges   []netip.Prefix // of the local cluster, as its nodes tell
	Networks    []*Network     // of one ID several may be reported: their parts add up
	MeshConfigs []*MeshConfig  // one at most in a mesh; the first by Object counts, others are Problems
	Problems    []Problem
}

// Sink takes what a source knows. Its methods hand over and return; they never block and never call back.
type Sink interface {
	// Report replaces what the source said under key. The sink owns in afterwards.
	Report(key string, in Input)
	// Forget removes what the source said under key: the object is gone, not merely out of sight.
	Forget(key string)
	// Synced says that everything the source knew at its start has been reported.
	Synced()
}

// Snapshots gives the newest Snapshot and a channel that is closed when it is outdated. The Snapshot is nil
// until the first one is built; the channel is never nil.
type Snapshots interface {
	Latest() (*Snapshot, <-chan struct{})
}

// Empty reports whether in says nothing at all.
func (in Input) Empty() bool {
	v := reflect.ValueOf(in)
	for i := range v.NumField() {
		if v.Field(i).Len() > 0 {
			return false
		}
	}
	return true
}

// Clone copies the lists of in, for a sink owns those it is given; what they point to is never written.
func (in Input) Clone() Input {
	v := reflect.ValueOf(&in).Elem()
	for i := range v.NumField() {
		if f := v.Field(i); f.Len() > 0 {
			f.Set(reflect.AppendSlice(reflect.MakeSlice(f.Type(), 0, f.Len()), f))
		} else {
			f.SetZero()
		}
	}
	return in
}

// Sound returns in without the policies that are Closed.
func (in Input) Sound() Input {
	in = in.Clone()
	in.AuthorizationPolicies = slices.DeleteFunc(in.AuthorizationPolicies, func(p *AuthorizationPolicy) bool { return p.Closed })
	in.RequestAuthentications = slices.DeleteFunc(in.RequestAuthentications, func(r *RequestAuthentication) bool { return r.Closed })
	return in
}
