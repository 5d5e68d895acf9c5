// Package v1alpha1 holds the custom resources in which isthmusd keeps what must outlive its Pods: grants of join tokens
// and what is known of other clusters. Users read them with kubectl; isthmusd alone writes them.
package v1alpha1

import (
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
)

// GroupVersion of the resources.
var GroupVersion = schema.GroupVersion{Group: "isthmus.io", Version: "v1alpha1"}

// Names of the resources in paths of the API.
const (
	JoinGrantResource = "joingrants"
	PeerResource      = "peers"
)

// AddToScheme makes the types known to a scheme.
func AddToScheme(s *runtime.Scheme) error {
	s.AddKnownTypes(GroupVersion, &JoinGrant{}, &JoinGrantList{}, &Peer{}, &PeerList{})
	metav1.AddToGroupVersion(s, GroupVersion)
	return nil
}
