package translate

import (
	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	listenerv3 "github.com/envoyproxy/go-control-plane/envoy/config/listener/v3"
	"google.golang.org/protobuf/types/known/structpb"

	"github.com/isthmus-mesh/isthmus/discovery/mesh"
	"github.com/isthmus-mesh/isthmus/discovery/translate/wire"
)

// anyAddress binds a listener to every address of the port, IPv6 too when the proxy has it.
func (v *view) anyAddress(l *listenerv3.Listener, port uint32) *listenerv3.Listener {
	l.Address = wire.Socket("0.0.0.0", port)
	if v.ipv6 {
		l.AdditionalAddresses = []*listenerv3.AdditionalAddress{{Address: wire.Socket("::", port)}}
	}
	return l
}

// origin is metadata that names the configuration object a route or cluster came from.
func origin(o mesh.ObjectRef) *corev3.Metadata {
	return &corev3.Metadata{FilterMetadata: map[string]*structpb.Struct{"isthmus": wire.Strings("object", o.String())}}
}

func clusterName(direction string, port uint32, subset, host string) string {
	return direction + "|" + wire.Itoa(port) + "|" + subset + "|" + host
}
