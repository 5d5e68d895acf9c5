// Package proxyconfig reads the configuration that an Envoy has, as its admin interface dumps it, and shows it in short,
// in full, or against what the control plane holds. It shows no private key.
package proxyconfig

import (
	"bytes"
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/isthmus-mesh/isthmus/cmd/internal/redact"
	"github.com/isthmus-mesh/isthmus/internal/diag"
)

// Resource is one resource in a dump.
type Resource struct {
	Name    string
	Version string
	State   string // active, static, warming, draining, error
	Error   string // why a newer version was refused
	Body    map[string]any
}

// Dump is the configuration of one Envoy, each list by name.
type Dump struct {
	Bootstrap                                       map[string]any
	Listeners, Routes, Clusters, Endpoints, Secrets []Resource
}

// Kinds are the parts of a dump that are shown, in order.
var Kinds = []string{"listeners", "routes", "clusters", "endpoints", "secrets", "bootstrap"}

// Of returns the resources of a kind.
func (d *Dump) Of(kind string) []Resource {
	switch kind {
	case "listeners":
		return d.Listeners
	case "routes":
		return d.Routes
	case "clusters":
		return d.Clusters
	case "endpoints":
		return d.Endpoints
	case "secrets":
		return d.Secrets
	}
	return nil
}

// Node is the node id of the Envoy; empty when the dump does not say.
func (d *Dump) Node() string { return text(d.Bootstrap, "node", "id") }

// Parse reads the JSON of Envoy's /config_dump?include_eds, or of isthmusd's /debug/config_dump.
func Parse(data []byte) (*Dump, error) {
	var in struct {
		Configs []map[string]any `json:"configs"`
	}
	d := json.NewDecoder(bytes.NewReader(data))
	d.UseNumber()
	if err := d.Decode(&in); err != nil {
		return nil, diag.Hint(fmt.Errorf("read the dump: %w", err), "it is what Envoy's admin interface answers to /config_dump?include_eds")
	}
	if in.Configs == nil {
		return nil, diag.Hint(errors.New("read the dump: it has no configs"), "it is what Envoy's admin interface answers to /config_dump?include_eds")
	}
	out := &Dump{}
	for _, c := range in.Configs {
		redact.JSON(c)
		typ, _ := c["@type"].(string)
		switch typ[strings.LastIndexByte(typ, '.')+1:] {
		case "BootstrapConfigDump":
			out.Bootstrap, _ = c["bootstrap"].(map[string]any)
		case "ClustersConfigDump":
			out.Clusters = append(out.Clusters, collect(c, "cluster", "static_clusters", "dynamic_active_clusters", "dynamic_warming_clusters")...)
		case "ListenersConfigDump":
			out.Listeners = append(out.Listeners, collect(c, "listener", "static_listeners")...)
			out.Listeners = append(out.Listeners, dynamicListeners(c)...)
		case "RoutesConfigDump":
			out.Routes = append(out.Routes, collect(c, "route_config", "static_route_configs", "dynamic_route_configs")...)
		case "EndpointsConfigDump":
			out.Endpoints = append(out.Endpoints, collect(c, "endpoint_config", "static_endpoint_configs", "dynamic_endpoint_configs")...)
		case "SecretsConfigDump":
			out.Secrets = append(out.Secrets, collect(c, "secret", "static_secrets", "dynamic_active_secrets", "dynamic_warming_secrets")...)
		}
	}
	for _, kind := range Kinds {
		slices.SortStableFunc(out.Of(kind), func(a, b Resource) int { return cmp.Compare(a.Name, b.Name) })
	}
	return out, nil
}

// collect reads lists of states that each hold a resource in a field.
func collect(c map[string]any, field string, lists ...string) (out []Resource) {
	for _, name := range lists {
		state := "active"
		if strings.HasPrefix(name, "static") {
			state = "static"
		} else if strings.Contains(name, "warming") {
			state = "warming"
		}
		for _, x := range items(c[name]) {
			if r, ok := resource(x, field, state); ok {
				out = append(out, r)
			}
		}
	}
	return out
}

func dynamicListeners(c map[string]any) (out []Resource) {
	for _, l := range items(c["dynamic_listeners"]) {
		refusal := text(l, "error_state", "details")
		for _, s := range []string{"active", "warming", "draining"} {
			x, ok := l[s+"_state"].(map[string]any)
			if !ok {
				continue
			}
			if r, ok := resource(x, "listener", s); ok {
				r.Name, r.Error = cmp.Or(text(l, "name"), r.Name), refusal
				out, refusal = append(out, r), ""
			}
		}
		if refusal != "" {
			out = append(out, Resource{Name: text(l, "name"), State: "error", Error: refusal, Body: map[string]any{}})
		}
	}
	return out
}

func resource(x map[string]any, field, state string) (Resource, bool) {
	body, ok := x[field].(map[string]any)
	if !ok {
		return Resource{}, false
	}
	name := cmp.Or(text(x, "name"), text(body, "name"), text(body, "cluster_name"))
	return Resource{Name: name, Version: text(x, "version_info"), State: state, Error: text(x, "error_state", "details"), Body: body}, true
}

// items are the objects in a list.
func items(v any) (out []map[string]any) {
	list, _ := v.([]any)
	for _, x := range list {
		if m, ok := x.(map[string]any); ok {
			out = append(out, m)
		}
	}
	return out
}

// at follows the path through objects.
func at(v any, path ...string) any {
	for _, p := range path {
		m, _ := v.(map[string]any)
		v = m[p]
	}
	return v
}

// text is the string or number at the path.
func text(v any, path ...string) string {
	switch x := at(v, path...).(type) {
	case string:
		return x
	case json.Number:
		return x.String()
	}
	return ""
}
