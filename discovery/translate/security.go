package translate

import (
	"slices"

	"github.com/isthmus-mesh/isthmus/discovery/mesh"
	"github.com/isthmus-mesh/isthmus/discovery/translate/peerauth"
	"github.com/isthmus-mesh/isthmus/eastwest/sni"
	"github.com/isthmus-mesh/isthmus/topologies"
)

// takesTLS reports whether mesh TLS is spoken to the endpoint's port: it has a proxy, and no PeerAuthentication turned
// mutual TLS off there. What other clusters have turned off is not known here.
func (v *view) takesTLS(e *mesh.Endpoint, p mesh.Port) bool {
	if !e.TLS || !v.mtlsOff || e.Identity == "" || topologies.IsPeer(v.snap, v.snap.Cluster(e.Cluster)) {
		return e.TLS
	}
	return peerauth.For(v.snap.PeerAuthentications, e.Namespace, e.Labels).At(e.PortOf(p)) != peerauth.Disable
}

// meshALPN is what tells mesh TLS from the application's own.
func meshALPN() []string { return slices.Clone(sni.ALPN) }
