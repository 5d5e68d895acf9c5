package xds

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"slices"
	"strings"
	"unicode/utf8"

	clusterv3 "github.com/envoyproxy/go-control-plane/envoy/config/cluster/v3"
	"google.golang.org/grpc/mem"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/types/known/anypb"
)

// Type URLs that the server pushes in a fixed order. All other types follow them, sorted.
const (
	ClusterType  = "type.googleapis.com/envoy.config.cluster.v3.Cluster"
	EndpointType = "type.googleapis.com/envoy.config.endpoint.v3.ClusterLoadAssignment"
	ListenerType = "type.googleapis.com/envoy.config.listener.v3.Listener"
	RouteType    = "type.googleapis.com/envoy.config.route.v3.RouteConfiguration"
	SecretType   = "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.Secret"
)

// Resource is one named, versioned, encoded resource. It is immutable, and shared by every stream that sends it.
type Resource struct {
	Name    string
	Version string // changes exactly when Body changes
	Body    *anypb.Any

	piece, body mem.Buffer // the bytes of it in a response, see wire.go; nil: not encoded yet
	size        int        // of piece
	hash        uint64     // of Name and Version
	warms       string     // a cluster whose endpoints come over ADS: their resource name
}

// Set is everything one view serves: type URL -> resources by name. It is immutable once a Feed has returned it.
type Set map[string]*Named

// NewResource encodes m under the name. The version is the first 16 hex digits of the SHA-256 of the deterministic
// encoding, so equal messages have equal versions in every process. It returns nil when m cannot be encoded, which
// happens only to strings that are not UTF-8.
func NewResource(name string, m proto.Message) *Resource {
	r, err := encode(name, m)
	if err != nil {
		return nil
	}
	return r
}

func encode(name string, m proto.Message) (*Resource, error) {
	value, err := proto.MarshalOptions{Deterministic: true}.Marshal(m)
	if err != nil {
		return nil, fmt.Errorf("encode %s %s: %w", m.ProtoReflect().Descriptor().FullName(), name, err)
	}
	if !utf8.ValidString(name) {
		return nil, fmt.Errorf("encode %s %q: the name is not UTF-8", m.ProtoReflect().Descriptor().FullName(), name)
	}
	r := newResource(name, typeURL(m), value)
	if c, ok := m.(*clusterv3.Cluster); ok && c.GetType() == clusterv3.Cluster_EDS {
		if r.warms = c.GetEdsClusterConfig().GetServiceName(); r.warms == "" {
			r.warms = c.GetName()
		}
	}
	return r, nil
}

func newResource(name, typ string, value []byte) *Resource {
	sum := sha256.Sum256(value)
	r := &Resource{Name: name, Version: hex.EncodeToString(sum[:8]), Body: &anypb.Any{TypeUrl: typ, Value: value}}
	r.hash = hashOf(r.Name, r.Version)
	r.lay()
	return r
}

func typeURL(m proto.Message) string {
	return "type.googleapis.com/" + string(m.ProtoReflect().Descriptor().FullName())
}

// Encode returns the messages as a Set, each under the name it carries: cluster_name of a load assignment,
// origin/kind/key of a signed record, otherwise the field name, else origin. A message without a name, two of one type
// with the same name, and one that cannot be encoded are errors.
func Encode(msgs ...proto.Message) (Set, error) {
	list := make([]*Resource, 0, len(msgs))
	for _, m := range msgs {
		r, err := EncodeOne(m)
		if err != nil {
			return nil, err
		}
		list = append(list, r)
	}
	return SetOf(list...)
}

// EncodeOne returns one message as a resource under the name it carries, see Encode.
func EncodeOne(m proto.Message) (*Resource, error) {
	name := nameOf(m.ProtoReflect())
	if name == "" {
		return nil, fmt.Errorf("encode %s: the message has no name", m.ProtoReflect().Descriptor().FullName())
	}
	return encode(name, m)
}

// SetOf returns the set of these resources. Two of one type with the same name are an error.
func SetOf(resources ...*Resource) (Set, error) {
	byType := map[string][]*Resource{}
	for _, r := range resources {
		byType[r.Body.TypeUrl] = append(byType[r.Body.TypeUrl], r)
	}
	set := make(Set, len(byType))
	for typ, list := range byType {
		set[typ] = NewNamed(slices.Values(list))
		if set[typ].Len() < len(list) {
			return nil, fmt.Errorf("%s: two messages are named %s", typ, twice(list))
		}
	}
	return set, nil
}

// twice returns a name that two of the resources have.
func twice(list []*Resource) string {
	seen := map[string]bool{}
	for _, r := range list {
		if seen[r.Name] {
			return r.Name
		}
		seen[r.Name] = true
	}
	return ""
}

func nameOf(m protoreflect.Message) string {
	field := func(name protoreflect.Name) (string, bool) {
		f := m.Descriptor().Fields().ByName(name)
		if f == nil || f.Kind() != protoreflect.StringKind || f.IsList() {
			return "", false
		}
		return m.Get(f).String(), true
	}
	if origin, ok := field("origin"); ok {
		kind, hasKind := field("kind")
		key, hasKey := field("key")
		if hasKind && hasKey {
			return origin + "/" + kind + "/" + key
		}
		return origin
	}
	for _, candidate := range []protoreflect.Name{"cluster_name", "name"} {
		if name, ok := field(candidate); ok {
			return name
		}
	}
	return ""
}

// Sharing returns s with every resource that has the same version in old replaced by old's, and whole types where
// nothing differs by old's. It makes the server's comparison of the two sets cheap and lets old's memory go.
func (s Set) Sharing(old Set) Set {
	if s == nil {
		return nil
	}
	out := make(Set, len(s))
	for typ, named := range s {
		out[typ] = named.sharing(old[typ])
	}
	return out
}

func (r *Resource) contentHash() uint64 {
	if r.hash != 0 {
		return r.hash
	}
	return hashOf(r.Name, r.Version)
}

// hashOf is FNV-1a over name, a zero byte and version. It is the same in every process: sums of it are versions.
func hashOf(name, version string) uint64 {
	h := uint64(14695981039346656037)
	for _, s := range [2]string{name, version} {
		for i := range len(s) {
			h = (h ^ uint64(s[i])) * 1099511628211
		}
		h *= 1099511628211
	}
	// A sum of plain FNV values would let near names cancel out: mix the bits once more.
	h = (h ^ h>>33) * 0xff51afd7ed558ccd
	return h ^ h>>29
}

// rank gives the place of a type in a push.
func rank(typ string) int {
	switch typ {
	case ClusterType:
		return 0
	case EndpointType:
		return 1
	case SecretType: // a root that is trusted no longer, before listeners close the connections from before
		return 2
	case ListenerType:
		return 3
	case RouteType:
		return 4
	}
	return 5
}

// comparePush orders types as they are pushed: what others refer to comes first.
func comparePush(a, b string) int {
	if d := rank(a) - rank(b); d != 0 {
		return d
	}
	return strings.Compare(a, b)
}

// removedLast says that resources of the type are taken away only at the end of a push, when nothing refers to them.
func removedLast(typ string) bool { return typ == ClusterType || typ == EndpointType }

// shortName is the last part of a type URL.
func shortName(typ string) string { return typ[strings.LastIndexAny(typ, "./")+1:] }
