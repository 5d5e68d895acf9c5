package v1alpha1

import (
	"slices"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
)

// Peer is what isthmusd remembers of one cluster of the mesh, the own one included; its name is the cluster's.
type Peer struct {
	metav1.TypeMeta   `json:",inline"`
	metav1.ObjectMeta `json:"metadata,omitempty"`

	Spec   PeerSpec   `json:"spec"`
	Status PeerStatus `json:"status,omitempty"`
}

// PeerSpec is who the cluster is.
type PeerSpec struct {
	TrustDomain   string `json:"trustDomain,omitempty"`
	FederationKey []byte `json:"federationKey,omitempty"` // Ed25519, public
}

// The states of a Peer.
const (
	PeerSelf     = "Self"
	PeerPending  = "Pending"
	PeerApproved = "Approved"
	PeerEvicted  = "Evicted"
	PeerLeft     = "Left"
)

// PeerStatus is where the cluster stands, and what must not be forgotten.
type PeerStatus struct {
	State     string    `json:"state,omitempty"`
	VouchedBy []string  `json:"vouchedBy,omitempty"`
	TokenID   string    `json:"tokenID,omitempty"`
	Network   string    `json:"network,omitempty"`
	Gateways  []string  `json:"gateways,omitempty"` // HOST:PORT, where it is dialled
	LastHeard time.Time `json:"lastHeard,omitzero"`
	// Epoch and Seq are how far the cluster has come. They never fall. Of the own cluster the epoch is raised, by
	// compare-and-swap, before a new leader says anything.
	Epoch uint64 `json:"epoch,omitempty"`
	Seq   uint64 `json:"seq,omitempty"`
	// Records are its signed statements about members, its description of itself and its deletions, as protobuf. What
	// it exports is not here: that is asked for again.
	Records [][]byte `json:"records,omitempty"`
}

// PeerList is a list of Peers.
type PeerList struct {
	metav1.TypeMeta `json:",inline"`
	metav1.ListMeta `json:"metadata,omitempty"`

	Items []Peer `json:"items"`
}

// DeepCopy returns a copy that shares nothing.
func (in *Peer) DeepCopy() *Peer {
	out := *in
	in.ObjectMeta.DeepCopyInto(&out.ObjectMeta)
	out.Spec.FederationKey = slices.Clone(in.Spec.FederationKey)
	out.Status.VouchedBy, out.Status.Gateways = slices.Clone(in.Status.VouchedBy), slices.Clone(in.Status.Gateways)
	out.Status.Records = slices.Clone(in.Status.Records)
	for i := range out.Status.Records {
		out.Status.Records[i] = slices.Clone(in.Status.Records[i])
	}
	return &out
}

// DeepCopyObject implements runtime.Object.
func (in *Peer) DeepCopyObject() runtime.Object { return in.DeepCopy() }

// DeepCopyObject implements runtime.Object.
func (in *PeerList) DeepCopyObject() runtime.Object {
	out := *in
	in.ListMeta.DeepCopyInto(&out.ListMeta)
	out.Items = make([]Peer, len(in.Items))
	for i := range in.Items {
		out.Items[i] = *in.Items[i].DeepCopy()
	}
	return &out
}
