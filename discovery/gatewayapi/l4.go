package gatewayapi

import (
	"time"

	networking "istio.io/api/networking/v1"

	"github.com/isthmus-mesh/isthmus/discovery/mesh"
)

// l4 is where a route leads connections.
type l4 struct {
	ref     mesh.ObjectRef
	created time.Time
	hosts   []string
	to      []*networking.RouteDestination
}

func (c *converter) emitL4(l *listener) {}

func (c *converter) attachService(r *route, index int, p any) {}
