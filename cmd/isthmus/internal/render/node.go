package render

import (
	"cmp"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	"google.golang.org/protobuf/types/known/structpb"

	"github.com/isthmus-mesh/isthmus/discovery/mesh"
	"github.com/isthmus-mesh/isthmus/discovery/translate/nodeid"
	"github.com/isthmus-mesh/isthmus/internal/diag"
)

// instance is what the files say of the workload that a proxy stands beside.
type instance struct {
	addresses []string
	labels    map[string]string
	account   string
	identity  string
	locality  string
}

// find looks for a workload: among pods and machines, then among the endpoints of services. Where its pods are not there,
// false, a Deployment of the name says what they would be, or a Service by which labels it would select them.
func (c Config) find(snap *mesh.Snapshot, inputs map[string]mesh.Input, name, namespace string) (instance, bool) {
	for _, w := range snap.Workloads {
		if w.Name == name && w.Namespace == namespace {
			return instance{addresses: w.Addresses, labels: w.Labels, account: w.ServiceAccount, locality: w.Locality}, true
		}
	}
	for _, s := range snap.Services {
		for _, e := range s.Endpoints {
			if e.Workload == name && e.Namespace == namespace && e.Cluster == snap.Local.ID {
				return instance{addresses: []string{e.Address}, labels: e.Labels, identity: e.Identity, locality: e.Locality}, true
			}
		}
	}
	if in, kind := templateOf(c.Files, name, namespace); kind != "" {
		return in, false
	}
	for _, key := range slices.Sorted(maps.Keys(inputs)) {
		for _, d := range inputs[key].Services {
			if d.Object.Kind == "Service" && d.Object.Name == name && d.Object.Namespace == namespace && len(d.Selector) > 0 {
				return instance{labels: d.Selector}, false
			}
		}
	}
	return instance{}, false
}

// proxyOf reads a node: TYPE~IP~NAME.NAMESPACE~DOMAIN, or in short "TYPE NAME.NAMESPACE", TYPE~NAME.NAMESPACE or, for a
// sidecar, NAME.NAMESPACE. The files say the rest.
func (c Config) proxyOf(snap *mesh.Snapshot, inputs map[string]mesh.Input) (p *mesh.Proxy, in instance, known bool, err error) {
	kind, workload, id := "sidecar", strings.TrimSpace(c.Node), ""
	if parts := strings.Split(workload, "~"); len(parts) == 4 {
		kind, workload, id = parts[0], parts[2], workload
	} else if len(parts) == 2 {
		kind, workload = parts[0], parts[1]
	} else if k, w, two := strings.Cut(workload, " "); two {
		kind, workload = k, strings.TrimSpace(w)
	}
	dot := strings.LastIndexByte(workload, '.')
	if dot <= 0 || dot == len(workload)-1 || strings.ContainsAny(workload, "~ ") {
		return nil, in, false, diag.Hint(fmt.Errorf("node %q names no proxy", c.Node), "--node POD.NAMESPACE, --node 'router POD.NAMESPACE' or --node sidecar~IP~POD.NAMESPACE~DOMAIN")
	}
	name, namespace := workload[:dot], workload[dot+1:]
	in, known = c.find(snap, inputs, name, namespace)
	if len(c.Labels) > 0 {
		in.labels = c.Labels
	}
	if id == "" {
		ip := "127.0.0.1"
		if len(in.addresses) > 0 {
			ip = in.addresses[0]
		}
		if _, err := netip.ParseAddr(ip); err != nil {
			return nil, in, known, fmt.Errorf("node %q: its address %q is not an IP", c.Node, ip)
		}
		id = kind + "~" + ip + "~" + workload + "~" + namespace + ".svc.cluster.local"
	}
	labels := map[string]any{}
	for k, v := range in.labels {
		labels[k] = v
	}
	meta, err := structpb.NewStruct(map[string]any{
		"NAMESPACE": namespace, "CLUSTER_ID": string(snap.Local.ID), "NETWORK": string(snap.Local.Network),
		"INSTANCE_IPS": strings.Join(in.addresses, ","), "LABELS": labels,
	})
	if err != nil {
		return nil, in, known, fmt.Errorf("labels of %s: %w", workload, err)
	}
	in.identity = cmp.Or(in.identity, mesh.SPIFFE(snap.Local.TrustDomain, namespace, cmp.Or(in.account, "default")))
	p, err = nodeid.Parse(&corev3.Node{Id: id, Cluster: workload, Metadata: meta, Locality: localityOf(in.locality)}, in.identity)
	if err != nil {
		return nil, in, known, diag.Hint(errors.New(err.Error()), "--node POD.NAMESPACE, --node 'router POD.NAMESPACE' or --node sidecar~IP~POD.NAMESPACE~DOMAIN")
	}
	return p, in, known, nil
}

// localityOf reads region/zone/subzone.
func localityOf(s string) *corev3.Locality {
	if s == "" {
		return nil
	}
	parts := append(strings.SplitN(s, "/", 3), "", "")
	return &corev3.Locality{Region: parts[0], Zone: parts[1], SubZone: parts[2]}
}
