// Package bootstrap writes the configuration that Envoy starts with. It is pure: equal parameters give equal bytes.
package bootstrap

import (
	"bytes"
	"encoding/json"
	"fmt"
	"maps"
	"net/netip"
	"strings"

	"sigs.k8s.io/yaml"
)

// Mark is the socket mark of connections that capture lets through.
const Mark = 1337

// XDSCluster and SDSCluster are the static clusters that lead to the agent.
const (
	XDSCluster = "xds-grpc"
	SDSCluster = "sds-grpc"
)

// IstioVersion is the version of Istio whose API the control plane reads: EnvoyFilters choose proxies by it.
const IstioVersion = "1.31.0"

// Node is who the proxy is, in Istio's terms.
type Node struct {
	Type           string // sidecar or router
	Name           string // workload name
	Namespace      string
	ServiceAccount string
	Cluster        string
	Network        string
	Locality       string // region/zone/subzone
	Addresses      []string
	Labels         map[string]string
	Domain         string         // default: NAMESPACE.svc.cluster.local
	Extra          map[string]any // more metadata
}

// ID returns TYPE~IP~NAME.NS~NS.svc.cluster.local.
func (n Node) ID() string {
	ip := "127.0.0.1"
	if len(n.Addresses) > 0 {
		ip = n.Addresses[0]
	}
	domain := n.Domain
	if domain == "" {
		domain = n.Namespace + ".svc.cluster.local"
	}
	return n.Type + "~" + ip + "~" + n.Name + "." + n.Namespace + "~" + domain
}

// Metadata returns the node metadata, with Istio's keys.
func (n Node) Metadata() map[string]any {
	labels := make(map[string]any, len(n.Labels))
	for k, v := range n.Labels {
		labels[k] = v
	}
	m := map[string]any{"ISTIO_VERSION": IstioVersion}
	maps.Copy(m, n.Extra)
	maps.Copy(m, map[string]any{
		"NAME": n.Name, "NAMESPACE": n.Namespace, "SERVICE_ACCOUNT": n.ServiceAccount, "CLUSTER_ID": n.Cluster,
		"INSTANCE_IPS": strings.Join(n.Addresses, ","), "LABELS": labels,
	})
	if n.Network != "" {
		m["NETWORK"] = n.Network
	}
	return m
}

// Params is what the bootstrap depends on.
type Params struct {
	Node           Node
	AdminPort      int
	StatsPort      int
	XDSSocket      string // path
	SDSSocket      string // path; empty: Envoy gets no workload key
	Mark           bool   // mark upstream sockets so that capture lets them through; needs CAP_NET_ADMIN
	MaxConnections int
	Custom         []byte // JSON or YAML merged over the result; nil: none
}

type obj = map[string]any
type list = []any

// Build returns the bootstrap as indented JSON.
func Build(p Params) ([]byte, error) {
	b := obj{
		"node":              p.node(),
		"admin":             obj{"address": socket("127.0.0.1", p.AdminPort)},
		"dynamic_resources": dynamicResources(),
		"static_resources":  obj{"clusters": p.clusters(), "listeners": list{p.statsListener()}},
		"bootstrap_extensions": list{
			typed("envoy.bootstrap.internal_listener", "extensions.bootstrap.internal_listener.v3.InternalListener", nil),
		},
		"layered_runtime": obj{"layers": list{
			obj{"name": "static", "static_layer": obj{"re2": obj{"max_program_size": obj{"error_level": 32768}}}},
			obj{"name": "admin", "admin_layer": obj{}},
		}},
		"overload_manager": obj{"resource_monitors": list{
			typed("envoy.resource_monitors.global_downstream_max_connections",
				"extensions.resource_monitors.downstream_connections.v3.DownstreamConnectionsConfig",
				obj{"max_active_downstream_connections": p.MaxConnections}),
		}},
	}
	if p.Mark {
		b["cluster_manager"] = obj{"upstream_bind_config": obj{"socket_options": list{obj{
			"description": "mark for isthmus capture", "level": 1, "name": 36, "int_value": Mark, "state": "STATE_PREBIND", // SOL_SOCKET, SO_MARK
		}}}}
	}
	if p.Custom != nil {
		over, err := customObject(p.Custom)
		if err != nil {
			return nil, err
		}
		b = merge(b, over)
	}
	var out bytes.Buffer
	enc := json.NewEncoder(&out)
	enc.SetEscapeHTML(false)
	enc.SetIndent("", "  ")
	if err := enc.Encode(b); err != nil {
		return nil, fmt.Errorf("write bootstrap: %w", err)
	}
	return out.Bytes(), nil
}

func (p Params) node() obj {
	n := obj{"id": p.Node.ID(), "cluster": p.Node.Name + "." + p.Node.Namespace, "metadata": p.Node.Metadata()}
	if p.Node.Locality != "" {
		l := obj{}
		for i, part := range strings.SplitN(p.Node.Locality, "/", 3) {
			l[[]string{"region", "zone", "sub_zone"}[i]] = part
		}
		n["locality"] = l
	}
	return n
}

func dynamicResources() obj {
	// The first answer is waited for without a limit: a control plane that is away must not make Envoy live and empty.
	source := func() obj { return obj{"ads": obj{}, "resource_api_version": "V3", "initial_fetch_timeout": "0s"} }
	return obj{
		"ads_config": obj{
			"api_type": "DELTA_GRPC", "transport_api_version": "V3", "set_node_on_first_message_only": true,
			"grpc_services": list{obj{"envoy_grpc": obj{
				"cluster_name": XDSCluster,
				"retry_policy": obj{"retry_back_off": obj{"base_interval": "0.1s", "max_interval": "1s"}},
			}}},
		},
		"cds_config": source(),
		"lds_config": source(),
	}
}

func (p Params) clusters() list {
	out := list{unixCluster(XDSCluster, p.XDSSocket)}
	if p.SDSSocket != "" {
		out = append(out, unixCluster(SDSCluster, p.SDSSocket))
	}
	return append(out, obj{
		"name": "prometheus_stats", "type": "STATIC", "connect_timeout": "1s",
		"load_assignment": assignment("prometheus_stats", socket("127.0.0.1", p.AdminPort)),
	})
}

func unixCluster(name, path string) obj {
	return obj{
		"name": name, "type": "STATIC", "connect_timeout": "1s",
		"load_assignment": assignment(name, obj{"pipe": obj{"path": path}}),
		"typed_extension_protocol_options": obj{
			"envoy.extensions.upstreams.http.v3.HttpProtocolOptions": obj{
				"@type": typePrefix + "extensions.upstreams.http.v3.HttpProtocolOptions",
				"explicit_http_config": obj{"http2_protocol_options": obj{
					"initial_stream_window_size": 1 << 20, "initial_connection_window_size": 1 << 20,
				}},
			},
		},
		"circuit_breakers": obj{"thresholds": list{
			obj{"max_connections": 100000, "max_pending_requests": 100000, "max_requests": 100000},
			obj{"priority": "HIGH", "max_connections": 100000, "max_pending_requests": 100000, "max_requests": 100000},
		}},
	}
}

// statsListener answers /stats/prometheus and nothing else of the admin interface.
func (p Params) statsListener() obj {
	return obj{
		"name": "stats", "address": socket(p.any(), p.StatsPort), "ignore_global_conn_limit": true,
		"filter_chains": list{obj{"filters": list{
			typed("envoy.filters.network.http_connection_manager",
				"extensions.filters.network.http_connection_manager.v3.HttpConnectionManager", obj{
					"stat_prefix": "stats", "codec_type": "AUTO",
					"route_config": obj{"name": "stats", "virtual_hosts": list{obj{
						"name": "stats", "domains": list{"*"}, "routes": list{obj{
							"match": obj{"path": "/stats/prometheus", "headers": list{obj{
								"name": ":method", "string_match": obj{"exact": "GET"},
							}}},
							"route": obj{"cluster": "prometheus_stats"},
						}},
					}}},
					"http_filters": list{typed("envoy.filters.http.router", "extensions.filters.http.router.v3.Router", nil)},
				}),
		}}},
	}
}

// any is the unspecified address of the family that the proxy has.
func (p Params) any() string {
	if len(p.Node.Addresses) > 0 {
		for _, s := range p.Node.Addresses {
			if a, err := netip.ParseAddr(s); err == nil && a.Is4() {
				return "0.0.0.0"
			}
		}
		return "::"
	}
	return "0.0.0.0"
}

const typePrefix = "type.googleapis.com/envoy."

func typed(name, message string, fields obj) obj {
	config := obj{"@type": typePrefix + message}
	for k, v := range fields {
		config[k] = v
	}
	return obj{"name": name, "typed_config": config}
}

func socket(address string, port int) obj {
	return obj{"socket_address": obj{"address": address, "port_value": port}}
}

func assignment(cluster string, address obj) obj {
	return obj{"cluster_name": cluster, "endpoints": list{obj{"lb_endpoints": list{obj{"endpoint": obj{"address": address}}}}}}
}

func customObject(data []byte) (obj, error) {
	var o obj
	if err := yaml.Unmarshal(data, &o); err != nil {
		return nil, fmt.Errorf("custom bootstrap: %w", err)
	}
	return snakeKeys(o, true).(obj), nil
}

// snakeKeys writes the names of the bootstrap's own fields as Envoy's documentation does, so that both spellings
// merge with ours. Keys below metadata and "@type" values are left alone.
func snakeKeys(v any, fields bool) any {
	switch v := v.(type) {
	case obj:
		out := make(obj, len(v))
		for k, x := range v {
			name := k
			if fields {
				name = snake(k)
			}
			out[name] = snakeKeys(x, fields && name != "metadata" && name != "static_layer" && name != "typed_extension_protocol_options")
		}
		return out
	case list:
		out := make(list, len(v))
		for i, x := range v {
			out[i] = snakeKeys(x, fields)
		}
		return out
	}
	return v
}

func snake(s string) string {
	var b strings.Builder
	for i, r := range s {
		if r >= 'A' && r <= 'Z' {
			if i > 0 {
				b.WriteByte('_')
			}
			r += 'a' - 'A'
		}
		b.WriteRune(r)
	}
	return b.String()
}

// merge puts over on base as protobuf merging does: messages merge, lists grow, values are replaced.
func merge(base, over obj) obj {
	for k, v := range over {
		switch v := v.(type) {
		case obj:
			if b, ok := base[k].(obj); ok {
				base[k] = merge(b, v)
				continue
			}
		case list:
			if b, ok := base[k].(list); ok {
				base[k] = append(b, v...)
				continue
			}
		}
		base[k] = over[k]
	}
	return base
}
