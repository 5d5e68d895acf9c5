// Package traffic decodes and checks the kinds of Istio's networking API that say how traffic is routed, treated and
// seen: VirtualService, DestinationRule, Gateway, Sidecar and EnvoyFilter. Older fields become their newer ones.
package traffic

import "github.com/isthmus-mesh/isthmus/discovery/config/written"

// object is what the checks of this package are methods of.
type object struct{ *written.Object }
