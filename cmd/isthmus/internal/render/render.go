// Package render makes, from the objects in some files, what one proxy would be served: as resources, or as one file
// that a plain Envoy starts with. Equal files give equal bytes, in whatever order they come.
package render

import (
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"

	"github.com/isthmus-mesh/isthmus/cmd/internal/served"
	"github.com/isthmus-mesh/isthmus/cmd/isthmus/internal/validate"
	"github.com/isthmus-mesh/isthmus/discovery/gatewayapi"
	"github.com/isthmus-mesh/isthmus/discovery/mesh"
	"github.com/isthmus-mesh/isthmus/discovery/store"
	"github.com/isthmus-mesh/isthmus/discovery/translate"
	"github.com/isthmus-mesh/isthmus/internal/diag"
)

// Config says what is rendered.
type Config struct {
	Files []validate.File
	// Node is TYPE~IP~NAME.NAMESPACE~DOMAIN, "TYPE NAME.NAMESPACE", TYPE~NAME.NAMESPACE or NAME.NAMESPACE of a sidecar.
	Node string
	// Cluster, Network and TrustDomain are where the proxy is. Empty: "local", none, "cluster.local".
	Cluster, Network, TrustDomain string
	// Labels are the proxy's; nil: those of its workload in the files.
	Labels map[string]string
	// Certs is a folder with cert-chain.pem, key.pem and root-cert.pem, which Envoy reads. Empty: throw-away
	// certificates stand in the file.
	Certs string
	// Keys puts private keys of Secrets among the files into the file; without it throw-away ones stand there.
	Keys bool
	// AdminPort is where Envoy's admin interface listens on 127.0.0.1; 0: nowhere.
	AdminPort int
}

// Rendering is what a proxy would be served.
type Rendering struct {
	Proxy     *mesh.Proxy
	Resources translate.Resources
	// Problems are what was left out of the files, and why.
	Problems []mesh.Problem
	// Warnings are about what the files do not say and only a running mesh does.
	Warnings []string

	cfg      Config
	identity string
	keys     *throwAway
}

// New renders for one proxy.
func New(c Config) (*Rendering, error) {
	local := validate.Local(c.Cluster)
	if c.Cluster == "" {
		local.ID = "local"
	}
	local.Network = mesh.NetworkID(c.Network)
	if c.TrustDomain != "" {
		local.TrustDomain = mesh.TrustDomain(c.TrustDomain)
	}
	keys, err := newThrowAway(string(local.TrustDomain))
	if err != nil {
		return nil, err
	}
	local.Roots = keys.pem
	if c.Certs != "" {
		if local.Roots, err = os.ReadFile(filepath.Join(c.Certs, "root-cert.pem")); err != nil {
			return nil, diag.Hint(fmt.Errorf("read the root: %w", err), "--certs names a folder with cert-chain.pem, key.pem and root-cert.pem")
		}
	}
	inputs, problems := validate.Inputs(c.Files)
	cfg := store.DefaultConfig(local)
	cfg.Derive = gatewayapi.Derive
	snap := store.Once(cfg, inputs)
	p, in, known, err := c.proxyOf(snap, inputs)
	if err != nil {
		return nil, err
	}
	r := &Rendering{cfg: c, identity: in.identity, keys: keys, Proxy: p}
	var more []mesh.Problem
	r.Resources, more = served.To(snap, p)
	r.Problems = sorted(slices.Concat(problems, snap.Problems, more))
	if !known && len(in.labels) == 0 {
		r.warn("%s.%s is not in the files: give its labels with --labels where they matter, and its address as --node '%s~IP~%s.%s~DOMAIN'", p.Name, p.Namespace, p.Type, p.Name, p.Namespace)
	} else if !known {
		r.warn("no pod %s.%s is in the files: it has no address and no services of its own here", p.Name, p.Namespace)
	}
	r.empty(snap, inputs)
	return r, nil
}

func (r *Rendering) warn(format string, args ...any) {
	r.Warnings = append(r.Warnings, fmt.Sprintf(format, args...))
}

// empty warns of services that have endpoints only where pods run.
func (r *Rendering) empty(snap *mesh.Snapshot, inputs map[string]mesh.Input) {
	var hosts []string
	for _, in := range inputs {
		for _, d := range in.Services {
			for _, h := range d.Hosts {
				if s := snap.Service(h); len(d.Selector) > 0 && s != nil && len(s.Endpoints) == 0 {
					hosts = append(hosts, h)
				}
			}
		}
	}
	slices.Sort(hosts)
	if hosts = slices.Compact(hosts); len(hosts) > 0 {
		r.warn("no pod of %s is in the files: it is answered with 503 until its pods are known", list(hosts))
	}
}

// list names the first few.
func list(names []string) string {
	if n := len(names) - 5; n > 0 {
		return fmt.Sprintf("%s and %d more", strings.Join(names[:5], ", "), n)
	}
	return strings.Join(names, ", ")
}

func sorted(ps []mesh.Problem) []mesh.Problem {
	slices.SortFunc(ps, func(a, b mesh.Problem) int { return strings.Compare(a.String(), b.String()) })
	return slices.Compact(ps)
}

// redacted stands for a private key.
const redacted = "[redacted]"

// JSON is the resources by type, as they are served; private keys are left out.
func (r *Rendering) JSON() ([]byte, error) {
	out := map[string]any{}
	x := r.Resources
	for name, msgs := range map[string][]proto.Message{
		"clusters": protos(x.Clusters), "endpoints": protos(x.Endpoints), "listeners": protos(x.Listeners), "routes": protos(x.Routes), "secrets": protos(x.Secrets),
	} {
		l, err := objects(msgs)
		if err != nil {
			return nil, err
		}
		out[name] = l
	}
	walk(out["secrets"], func(m map[string]any) {
		for _, k := range []string{"private_key", "password"} {
			if _, ok := m[k]; ok {
				m[k] = map[string]any{"inline_string": redacted}
			}
		}
	})
	return indented(out)
}

func protos[T proto.Message](in []T) []proto.Message {
	out := make([]proto.Message, len(in))
	for i, m := range in {
		out[i] = m
	}
	return out
}

// objects turns messages into JSON objects with the field names of Envoy's documentation.
func objects(msgs []proto.Message) ([]any, error) {
	out := []any{}
	for _, m := range msgs {
		text, err := protojson.MarshalOptions{UseProtoNames: true}.Marshal(m)
		if err != nil {
			return nil, fmt.Errorf("write %s: %w", m.ProtoReflect().Descriptor().FullName(), err)
		}
		d := json.NewDecoder(bytes.NewReader(text))
		d.UseNumber()
		var x map[string]any
		if err := d.Decode(&x); err != nil {
			return nil, fmt.Errorf("write %s: %w", m.ProtoReflect().Descriptor().FullName(), err)
		}
		out = append(out, x)
	}
	return out, nil
}

// walk visits every object below x, parents first.
func walk(x any, visit func(map[string]any)) {
	switch x := x.(type) {
	case []any:
		for _, e := range x {
			walk(e, visit)
		}
	case map[string]any:
		visit(x)
		for _, e := range x {
			walk(e, visit)
		}
	}
}

func indented(v any) ([]byte, error) {
	var out bytes.Buffer
	e := json.NewEncoder(&out)
	e.SetEscapeHTML(false)
	e.SetIndent("", "  ")
	if err := e.Encode(v); err != nil {
		return nil, fmt.Errorf("write the rendering: %w", err)
	}
	return out.Bytes(), nil
}
