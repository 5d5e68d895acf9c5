package mesh

import (
	"net/netip"

	networking "istio.io/api/networking/v1"
	security "istio.io/api/security/v1"
)

// ServiceDecl is a Kubernetes Service or an Istio ServiceEntry as declared, before endpoints are joined to it.
type ServiceDecl struct {
	Object     ObjectRef
	Hosts      []string // fully qualified; one for a Kubernetes Service
	Ports      []Port
	Selector   map[string]string // nil: endpoints come from Endpoints or from EndpointSlices
	Addresses  []netip.Addr      // clusterIPs, or ServiceEntry addresses that are single addresses
	Endpoints  []*Endpoint       // ServiceEntry's inline endpoints; Cluster and Network may be empty: the local ones
	Resolution Resolution
	External   bool
	Headless   bool
	Export     bool        // label isthmus.io/export: "true" on the Service or its Namespace
	ExportTo   []ClusterID // annotation isthmus.io/export-to; empty: every peer
}

// EndpointSlice is a Kubernetes EndpointSlice of a Service that has no selector here.
type EndpointSlice struct {
	Object  ObjectRef
	Service string // name of the Service in Object.Namespace
	// Endpoints carry Ports keyed by the slice's own port numbers under PortNames; the store maps them to service ports by name.
	Endpoints []*Endpoint
	PortNames map[string]uint32 // slice port name -> port at the endpoint
}

// Export is an MCS ServiceExport.
type Export struct {
	Object   ObjectRef // name and namespace are those of the Service
	ExportTo []ClusterID
}

// VirtualService is an Istio VirtualService with hosts and destinations written out in full.
type VirtualService struct {
	Object ObjectRef
	Spec   *networking.VirtualService
}

// DestinationRule is an Istio DestinationRule with its host written out in full.
type DestinationRule struct {
	Object ObjectRef
	Spec   *networking.DestinationRule
}

// Gateway is an Istio Gateway.
type Gateway struct {
	Object ObjectRef
	Spec   *networking.Gateway
}

// PeerAuthentication is an Istio PeerAuthentication.
type PeerAuthentication struct {
	Object ObjectRef
	Spec   *security.PeerAuthentication
}

// Import is what one peer exports under one name, as its records say.
type Import struct {
	Cluster   ClusterID
	Namespace string
	Name      string
	Ports     []Port
	VIPs      []netip.Addr // the addresses the exporter claims for NAME.NAMESPACE.global
	Endpoints []*Endpoint  // Ready, Freshness and Identity filled in
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
	Gateways            []*Gateway
	PeerAuthentications []*PeerAuthentication
	Problems            []Problem
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
