package debug

import (
	"bytes"
	"encoding/base64"
	"encoding/json"
	"slices"
	"strings"

	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/isthmus-mesh/isthmus/cmd/internal/redact"
	"github.com/isthmus-mesh/isthmus/discovery/xds"
)

// dumped says where Envoy's config_dump has the resources of a type: in which message, under which list and field.
var dumped = []struct{ typ, message, list, field string }{
	{xds.ClusterType, "ClustersConfigDump", "dynamic_active_clusters", "cluster"},
	{xds.ListenerType, "ListenersConfigDump", "dynamic_listeners", "listener"},
	{xds.RouteType, "RoutesConfigDump", "dynamic_route_configs", "route_config"},
	{xds.EndpointType, "EndpointsConfigDump", "dynamic_endpoint_configs", "endpoint_config"},
	{xds.SecretType, "SecretsConfigDump", "dynamic_active_secrets", "secret"},
}

// dump writes a set in the form of Envoy's config_dump, by name, with what is secret left out.
func dump(set xds.Set) any {
	configs := []any{}
	for _, d := range dumped {
		list := []any{}
		for _, r := range slices.SortedFunc(set[d.typ].All(), func(a, b *xds.Resource) int { return strings.Compare(a.Name, b.Name) }) {
			state := map[string]any{"version_info": r.Version, d.field: shown(r.Body)}
			switch d.typ {
			case xds.ListenerType:
				list = append(list, map[string]any{"name": r.Name, "active_state": state})
			case xds.SecretType:
				state["name"] = r.Name
				list = append(list, state)
			default:
				list = append(list, state)
			}
		}
		configs = append(configs, map[string]any{"@type": "type.googleapis.com/envoy.admin.v3." + d.message, d.list: list})
	}
	return map[string]any{"configs": configs}
}

// shown is a resource as JSON. One with parts whose types are not known here is shown as it is on the wire, unless it may
// carry a key.
func shown(body *anypb.Any) any {
	text, err := protojson.MarshalOptions{UseProtoNames: true}.Marshal(body)
	if err == nil {
		var v any
		d := json.NewDecoder(bytes.NewReader(text))
		d.UseNumber()
		if err = d.Decode(&v); err == nil {
			redact.JSON(v)
			return v
		}
	}
	out := map[string]any{"@type": body.GetTypeUrl(), "not_shown": err.Error()}
	if body.GetTypeUrl() != xds.SecretType && body.GetTypeUrl() != xds.ListenerType && body.GetTypeUrl() != xds.ClusterType {
		out["wire"] = base64.StdEncoding.EncodeToString(body.GetValue())
	}
	return out
}
