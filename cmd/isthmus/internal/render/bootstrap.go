package render

import (
	"maps"
	"os"
	"path/filepath"
	"slices"

	"google.golang.org/protobuf/proto"
	"sigs.k8s.io/yaml"

	"github.com/isthmus-mesh/isthmus/discovery/mesh"
)

// Names of secrets that the agent serves and the control plane does.
const (
	ownSecret   = "default"
	rootsSecret = "ROOTCA"
)

type obj = map[string]any

// Bootstrap is the one file with which a plain Envoy starts and has what the proxy would be served: what would come over
// streams stands in it. It is JSON, which is YAML, too.
func (r *Rendering) Bootstrap() ([]byte, error) {
	x := r.Resources
	s := &static{r: r, routes: map[string]any{}, assignments: map[string]any{}, wanted: map[string]string{}}
	clusters, err := objects(protos(x.Clusters))
	if err != nil {
		return nil, err
	}
	listeners, err := objects(protos(x.Listeners))
	if err != nil {
		return nil, err
	}
	secrets, err := objects(protos(x.Secrets))
	if err != nil {
		return nil, err
	}
	if err := index(s.routes, "name", x.Routes); err != nil {
		return nil, err
	}
	if err := index(s.assignments, "cluster_name", x.Endpoints); err != nil {
		return nil, err
	}
	for _, l := range [][]any{clusters, listeners, secrets} {
		walk(l, s.visit)
	}
	if s.err == nil {
		secrets = append(secrets, s.missing(secrets)...)
	}
	if s.err != nil {
		return nil, s.err
	}
	r.Warnings = append(r.Warnings, s.warnings()...)
	p := r.Proxy
	b := obj{
		"node":             obj{"id": p.ID, "cluster": p.Name + "." + p.Namespace, "metadata": r.metadata()},
		"static_resources": obj{"clusters": clusters, "listeners": listeners, "secrets": secrets},
		"bootstrap_extensions": []any{obj{"name": "envoy.bootstrap.internal_listener", "typed_config": obj{
			"@type": "type.googleapis.com/envoy.extensions.bootstrap.internal_listener.v3.InternalListener",
		}}},
		"layered_runtime": obj{"layers": []any{
			obj{"name": "static", "static_layer": obj{"re2": obj{"max_program_size": obj{"error_level": 32768}}}},
			obj{"name": "admin", "admin_layer": obj{}},
		}},
	}
	if r.cfg.AdminPort != 0 {
		b["admin"] = obj{"address": obj{"socket_address": obj{"address": "127.0.0.1", "port_value": r.cfg.AdminPort}}}
	}
	return indented(b)
}

// YAML writes JSON as YAML.
func YAML(data []byte) ([]byte, error) { return yaml.JSONToYAML(data) }

func (r *Rendering) metadata() obj {
	labels := obj{}
	for k, v := range r.Proxy.Labels {
		labels[k] = v
	}
	return obj{"NAMESPACE": r.Proxy.Namespace, "CLUSTER_ID": string(r.Proxy.Cluster), "NETWORK": string(r.Proxy.Network), "LABELS": labels}
}

// static is one change of resources from those of streams to those of a file.
type static struct {
	r                   *Rendering
	routes, assignments map[string]any
	wanted              map[string]string // secrets that are named: what they are for
	notes               []string
	transparent         bool
	err                 error
}

// What a secret that is named is for.
const (
	forCertificate = "tls_certificate"
	forValidation  = "validation_context"
)

func (s *static) note(text string) { s.notes = append(s.notes, text) }

// visit changes one object. What it puts in is visited next.
func (s *static) visit(m obj) {
	if rds, ok := m["rds"].(obj); ok {
		name, _ := rds["route_config_name"].(string)
		delete(m, "rds")
		table, ok := s.routes[name].(obj)
		if !ok {
			s.note("route table " + name + " is not served: its listener answers 404")
			table = obj{"name": name}
		}
		table = maps.Clone(table)
		table["validate_clusters"] = false // as on the stream: a route to nowhere answers 503
		m["route_config"] = table
	}
	if eds, ok := m["eds_cluster_config"].(obj); ok {
		name, _ := eds["service_name"].(string)
		if name == "" {
			name, _ = m["name"].(string)
		}
		delete(m, "eds_cluster_config")
		m["type"] = "STATIC"
		m["load_assignment"] = obj{"cluster_name": m["name"]}
		if a, ok := s.assignments[name].(obj); ok {
			m["load_assignment"] = a
		}
	}
	s.named(m)
	s.files(m)
	if m["transparent"] == true {
		s.transparent = true
	}
	for _, k := range []string{"on_demand", "vhds", "scoped_routes", "config_discovery"} {
		if _, ok := m[k].(obj); ok {
			s.note(k + " asks a control plane while Envoy runs: it is left as it is")
		}
	}
}

// named takes the way to a secret off, and remembers its name: it stands in the file.
func (s *static) named(m obj) {
	take := func(x any, what string) {
		if c, ok := x.(obj); ok {
			if name, _ := c["name"].(string); name != "" {
				s.wanted[name] = what
			}
			delete(c, "sds_config")
		}
	}
	if l, ok := m["tls_certificate_sds_secret_configs"].([]any); ok {
		for _, c := range l {
			take(c, forCertificate)
		}
	}
	take(m["validation_context_sds_secret_config"], forValidation)
}

// files puts throw-away certificates in the place of files that are not here, and of keys that are not to be shown.
func (s *static) files(m obj) {
	if m["private_key"] != nil && m["certificate_chain"] != nil {
		chain, key := source(m["certificate_chain"]), source(m["private_key"])
		switch {
		case absent(chain), absent(key):
			s.note("certificate " + chain + " is not here: a throw-away one stands in its place")
			s.pair(m, "file "+chain)
		case key == "" && !s.r.cfg.Keys:
			s.note("a private key of a Secret is not shown: a throw-away pair stands in its place; --private-keys shows it")
			s.pair(m, "secret")
		}
	}
	if ca := source(m["trusted_ca"]); absent(ca) {
		s.note("authorities " + ca + " are not here: a throw-away root stands in their place, so that nothing is trusted")
		m["trusted_ca"] = obj{"inline_string": string(s.r.keys.pem)}
	}
	if crl := source(m["crl"]); absent(crl) {
		s.note("revocation list " + crl + " is not here: it is left out")
		delete(m, "crl")
	}
}

// source is the file of a data source; empty when it is inline.
func source(x any) string {
	m, _ := x.(obj)
	name, _ := m["filename"].(string)
	return name
}

func absent(file string) bool {
	if file == "" {
		return false
	}
	_, err := os.Stat(file)
	return err != nil
}

// pair puts a throw-away certificate and key in.
func (s *static) pair(m obj, name string) {
	cert, key, err := s.r.keys.issue(name)
	if err != nil {
		s.err = err
		return
	}
	m["certificate_chain"], m["private_key"] = obj{"inline_string": string(cert)}, obj{"inline_string": string(key)}
}

// missing makes the secrets that are named and that no control plane serves, or that the files do not have.
func (s *static) missing(have []any) (out []any) {
	known := map[string]bool{}
	for _, x := range have {
		if name, ok := x.(obj)["name"].(string); ok {
			known[name] = true
		}
	}
	for _, name := range slices.Sorted(maps.Keys(s.wanted)) {
		if known[name] {
			continue
		}
		if s.wanted[name] == forValidation {
			if name != rootsSecret {
				s.note("secret " + name + " is not in the files: nothing is trusted in its place")
			}
			ca := obj{"inline_string": string(s.r.keys.pem)}
			if name == rootsSecret && s.r.cfg.Certs != "" {
				ca = obj{"filename": filepath.Join(s.r.cfg.Certs, "root-cert.pem")}
			}
			out = append(out, obj{"name": name, "validation_context": obj{"trusted_ca": ca}})
			continue
		}
		c := obj{}
		switch dir := s.r.cfg.Certs; {
		case name != ownSecret:
			s.note("secret " + name + " is not in the files: a throw-away certificate stands in its place")
			s.pair(c, "secret "+name)
		case dir != "":
			c["certificate_chain"], c["private_key"] = obj{"filename": filepath.Join(dir, "cert-chain.pem")}, obj{"filename": filepath.Join(dir, "key.pem")}
		default:
			s.note("the proxy's certificate is a throw-away one, whose key everybody can make; --certs names real ones")
			s.pair(c, s.r.identity)
		}
		out = append(out, obj{"name": name, "tls_certificate": c})
	}
	return out
}

// warnings are what the file cannot have of a running mesh.
func (s *static) warnings() []string {
	var low []string
	for _, l := range s.r.Resources.Listeners {
		if p := l.GetAddress().GetSocketAddress().GetPortValue(); p > 0 && p < 1024 && (l.GetBindToPort() == nil || l.GetBindToPort().GetValue()) {
			low = append(low, l.GetName())
		}
	}
	if len(low) > 0 {
		s.note("ports below 1024 need a right that ordinary users do not have: " + list(low))
	}
	if s.transparent {
		s.note("listeners are transparent: Envoy needs CAP_NET_ADMIN")
	}
	if s.r.Proxy.Type == mesh.Sidecar {
		s.note("connections come in by capture (isthmus-agent init, isthmus-cni): without it nothing is sent to the listeners of single addresses and ports")
	}
	slices.Sort(s.notes)
	return slices.Compact(s.notes)
}

// index keeps messages as objects by their name.
func index[T proto.Message](into map[string]any, field string, msgs []T) error {
	all, err := objects(protos(msgs))
	for _, x := range all {
		if name, ok := x.(obj)[field].(string); ok {
			into[name] = x
		}
	}
	return err
}
