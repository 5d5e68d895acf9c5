package httprule

import (
	routev3 "github.com/envoyproxy/go-control-plane/envoy/config/route/v3"

	"github.com/isthmus-mesh/isthmus/discovery/translate/wire"
)

// usualBody is the longest body of a direct response that Envoy takes without being told.
const usualBody = 4096

// Room lets a table hold the bodies of its direct responses: one that is too long would have Envoy refuse the table.
func Room(table *routev3.RouteConfiguration) {
	most := usualBody
	for _, h := range table.GetVirtualHosts() {
		for _, r := range h.GetRoutes() {
			b := r.GetDirectResponse().GetBody()
			most = max(most, len(b.GetInlineString()), len(b.GetInlineBytes()))
		}
	}
	if most > usualBody && table.GetMaxDirectResponseBodySizeBytes() == nil {
		table.MaxDirectResponseBodySizeBytes = wire.U32(uint32(most))
	}
}
