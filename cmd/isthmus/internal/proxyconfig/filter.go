package proxyconfig

import (
	"slices"
	"strconv"
	"strings"
)

// Filter says what is shown. A zero field lets everything through.
type Filter struct {
	Port      int
	FQDN      string // host of a cluster, of an endpoint's cluster, or a domain of a route
	Subset    string
	Direction string // inbound or outbound
	Name      string // the whole name
}

// clusterName is DIRECTION|PORT|SUBSET|HOST, or with other names the host alone.
type clusterName struct{ direction, port, subset, host string }

func splitCluster(name string) clusterName {
	parts := strings.Split(name, "|")
	if len(parts) != 4 {
		return clusterName{host: name}
	}
	return clusterName{parts[0], parts[1], parts[2], parts[3]}
}

// Lets reports whether a resource of a kind is shown.
func (f Filter) Lets(kind string, r Resource) bool {
	if f.Name != "" && r.Name != f.Name {
		return false
	}
	switch kind {
	case "clusters", "endpoints":
		return f.cluster(splitCluster(r.Name))
	case "listeners":
		return f.listener(r)
	case "routes":
		return f.route(r)
	}
	return true
}

func (f Filter) cluster(c clusterName) bool {
	return (f.Port == 0 || c.port == strconv.Itoa(f.Port)) && (f.FQDN == "" || c.host == f.FQDN) &&
		(f.Subset == "" || c.subset == f.Subset) && (f.Direction == "" || c.direction == f.Direction)
}

func (f Filter) listener(r Resource) bool {
	if f.Port != 0 && text(r.Body, "address", "socket_address", "port_value") != strconv.Itoa(f.Port) {
		return false
	}
	return f.Direction == "" || strings.EqualFold(text(r.Body, "traffic_direction"), f.Direction)
}

func (f Filter) route(r Resource) bool {
	if f.Direction != "" && strings.HasPrefix(r.Name, "inbound|") != (f.Direction == "inbound") {
		return false
	}
	if f.Port != 0 {
		p := strconv.Itoa(f.Port)
		if !slices.Contains(strings.FieldsFunc(r.Name, func(c rune) bool { return c < '0' || c > '9' }), p) {
			return false
		}
	}
	if f.FQDN == "" {
		return true
	}
	return slices.ContainsFunc(items(r.Body["virtual_hosts"]), func(h map[string]any) bool { return slices.Contains(stringsOf(h["domains"]), f.FQDN) })
}

func stringsOf(v any) (out []string) {
	list, _ := v.([]any)
	for _, x := range list {
		if s, ok := x.(string); ok {
			out = append(out, s)
		}
	}
	return out
}
