package patch

import (
	"encoding/json"
	"fmt"
	"strings"

	_ "github.com/cncf/xds/go/udpa/type/v1" // its TypedStruct may be written by users
	xdstypev3 "github.com/cncf/xds/go/xds/type/v3"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/reflect/protoregistry"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/structpb"

	"github.com/isthmus-mesh/isthmus/discovery/translate/wire"
)

// maxDepth bounds how deep values may stand in values.
const maxDepth = 100

// typedStruct carries the fields of a message whose type is not compiled in; Envoy reads it as that message.
var typedStruct = "type.googleapis.com/" + string((*xdstypev3.TypedStruct)(nil).ProtoReflect().Descriptor().FullName())

// decode reads a patch's value as a message. Configuration of a type that is not known here is passed on to Envoy, which
// knows all of its own.
func decode(value *structpb.Struct, m proto.Message) error {
	raw, err := json.Marshal(foreign(value.AsMap(), 0))
	if err != nil {
		return err
	}
	if err := protojson.Unmarshal(raw, m); err != nil {
		return fmt.Errorf("patch.value: %s", strings.TrimPrefix(strings.ReplaceAll(err.Error(), "\u00a0", " "), "proto: "))
	}
	return nil
}

// foreign wraps what has a type that is not known here.
func foreign(v any, depth int) any {
	if depth > maxDepth {
		return v
	}
	switch x := v.(type) {
	case []any:
		for i := range x {
			x[i] = foreign(x[i], depth+1)
		}
	case map[string]any:
		if url, ok := x["@type"].(string); ok {
			name := protoreflect.FullName(url[strings.LastIndexByte(url, '/')+1:])
			if _, err := protoregistry.GlobalTypes.FindMessageByName(name); err != nil {
				delete(x, "@type")
				return map[string]any{"@type": typedStruct, "type_url": url, "value": x}
			}
			if string(name) == "udpa.type.v1.TypedStruct" || url == typedStruct {
				return x // what stands in it is Envoy's to read
			}
		}
		for k := range x {
			x[k] = foreign(x[k], depth+1)
		}
	}
	return v
}

// valid reports what Envoy would refuse of a message at once: its own rules for values.
func valid(m proto.Message) error {
	if v, ok := m.(interface{ Validate() error }); ok {
		return v.Validate()
	}
	return nil
}

// merge adds what over says to base: lists grow, or are replaced; configuration of the same type is merged in turn.
func merge(base, over protoreflect.Message, replaceLists bool) error {
	var failed error
	over.Range(func(fd protoreflect.FieldDescriptor, v protoreflect.Value) bool {
		switch {
		case fd.IsList():
			if replaceLists {
				base.Clear(fd)
			}
			list := base.Mutable(fd).List()
			for i := range v.List().Len() {
				list.Append(v.List().Get(i))
			}
		case fd.IsMap():
			m := base.Mutable(fd).Map()
			v.Map().Range(func(k protoreflect.MapKey, x protoreflect.Value) bool {
				m.Set(k, x)
				return true
			})
		case fd.Message() == nil || !base.Has(fd) || whole(fd.Message()):
			base.Set(fd, v)
		case fd.Message().FullName() == "google.protobuf.Any":
			merged, err := mergeAny(base.Get(fd).Message().Interface().(*anypb.Any), v.Message().Interface().(*anypb.Any), replaceLists)
			if err != nil {
				failed = err
				return false
			}
			base.Set(fd, protoreflect.ValueOfMessage(merged.ProtoReflect()))
		default:
			failed = merge(base.Mutable(fd).Message(), v.Message(), replaceLists)
		}
		return failed == nil
	})
	return failed
}

// whole reports whether a message is one value: the parts of two durations make no sense together.
func whole(md protoreflect.MessageDescriptor) bool {
	return md.FullName().Parent() == "google.protobuf" && md.Name() != "Any" && md.Name() != "Struct"
}

func mergeAny(base, over *anypb.Any, replaceLists bool) (*anypb.Any, error) {
	if base.GetTypeUrl() != over.GetTypeUrl() {
		return over, nil
	}
	into, err := base.UnmarshalNew()
	if err != nil {
		return nil, err
	}
	from, err := over.UnmarshalNew()
	if err != nil {
		return nil, err
	}
	if err := merge(into.ProtoReflect(), from.ProtoReflect(), replaceLists); err != nil {
		return nil, err
	}
	if err := valid(into); err != nil {
		return nil, err
	}
	return wire.Pack(into), nil
}
