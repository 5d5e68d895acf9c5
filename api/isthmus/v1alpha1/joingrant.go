package v1alpha1

import (
	"slices"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
)

// JoinGrant is the issuer's half of a join token. It holds nothing that joins: only the public half of the token's
// secret. Redemption is a compare-and-swap of its status on the resource version, so it has one winner.
type JoinGrant struct {
	metav1.TypeMeta   `json:",inline"`
	metav1.ObjectMeta `json:"metadata,omitempty"`

	Spec   JoinGrantSpec   `json:"spec"`
	Status JoinGrantStatus `json:"status,omitempty"`
}

// JoinGrantSpec is what was granted. It never changes.
type JoinGrantSpec struct {
	ID          string            `json:"id"`      // of the token: 16 bytes in base64url
	Kind        string            `json:"kind"`    // cluster or vm
	Subject     string            `json:"subject"` // the one name that may join
	Issuer      string            `json:"issuer"`  // trust domain
	SeedPublic  []byte            `json:"seedPublic"`
	Reference   []byte            `json:"reference"` // SHA-256 of the token's reference
	NotBefore   time.Time         `json:"notBefore"`
	Expires     time.Time         `json:"expires"`
	Uses        int               `json:"uses"`
	Scopes      []string          `json:"scopes,omitempty"`
	AutoApprove bool              `json:"autoApprove,omitempty"`
	Machine     *JoinGrantMachine `json:"machine,omitempty"` // of kind vm
	CreatedBy   string            `json:"createdBy,omitempty"`
}

// JoinGrantMachine is the identity that a token for a machine stands for.
type JoinGrantMachine struct {
	Name           string            `json:"name"`
	Namespace      string            `json:"namespace"`
	ServiceAccount string            `json:"serviceAccount"`
	Labels         map[string]string `json:"labels,omitempty"`
	Ports          map[string]uint32 `json:"ports,omitempty"`
	Network        string            `json:"network,omitempty"`
}

// JoinGrantStatus is what has become of the token.
type JoinGrantStatus struct {
	Redemptions []Redemption `json:"redemptions,omitempty"`
	RevokedAt   time.Time    `json:"revokedAt,omitzero"`
	RevokedBy   string       `json:"revokedBy,omitempty"`
}

// Redemption says who redeemed a token.
type Redemption struct {
	Key  []byte    `json:"key"`  // SHA-256 of the joiner's public key
	Name string    `json:"name"` // as the joiner calls itself
	From string    `json:"from"` // address of the connection
	At   time.Time `json:"at"`
}

// JoinGrantList is a list of JoinGrants.
type JoinGrantList struct {
	metav1.TypeMeta `json:",inline"`
	metav1.ListMeta `json:"metadata,omitempty"`

	Items []JoinGrant `json:"items"`
}

// DeepCopy returns a copy that shares nothing.
func (in *JoinGrant) DeepCopy() *JoinGrant {
	out := *in
	in.ObjectMeta.DeepCopyInto(&out.ObjectMeta)
	out.Spec.SeedPublic, out.Spec.Reference = slices.Clone(in.Spec.SeedPublic), slices.Clone(in.Spec.Reference)
	out.Spec.Scopes = slices.Clone(in.Spec.Scopes)
	if m := in.Spec.Machine; m != nil {
		c := *m
		c.Labels, c.Ports = cloneMap(m.Labels), cloneMap(m.Ports)
		out.Spec.Machine = &c
	}
	out.Status.Redemptions = slices.Clone(in.Status.Redemptions)
	for i := range out.Status.Redemptions {
		out.Status.Redemptions[i].Key = slices.Clone(in.Status.Redemptions[i].Key)
	}
	return &out
}

// DeepCopyObject implements runtime.Object.
func (in *JoinGrant) DeepCopyObject() runtime.Object { return in.DeepCopy() }

// DeepCopyObject implements runtime.Object.
func (in *JoinGrantList) DeepCopyObject() runtime.Object {
	out := *in
	in.ListMeta.DeepCopyInto(&out.ListMeta)
	out.Items = make([]JoinGrant, len(in.Items))
	for i := range in.Items {
		out.Items[i] = *in.Items[i].DeepCopy()
	}
	return &out
}

func cloneMap[V any](in map[string]V) map[string]V {
	if in == nil {
		return nil
	}
	out := make(map[string]V, len(in))
	for k, v := range in {
		out[k] = v
	}
	return out
}
