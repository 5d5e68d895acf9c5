package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/isthmus-mesh/isthmus/api/admin"
	"github.com/isthmus-mesh/isthmus/discovery/identity"
	"github.com/isthmus-mesh/isthmus/discovery/source/file"
	"github.com/isthmus-mesh/isthmus/discovery/source/kube"
	"github.com/isthmus-mesh/isthmus/discovery/source/kube/kubeconfig"
	"github.com/isthmus-mesh/isthmus/discovery/store"
)

// sources says where the cluster's objects come from: an API server, a folder, or both, which add up.
type sources struct {
	// Dir is a folder of Kubernetes and Istio YAML, watched.
	Dir string `yaml:"dir"`
	// Kube is the Kubernetes API.
	Kube kubeSource `yaml:"kube"`
}

// kubeSource says which API server is the local one.
type kubeSource struct {
	// Enabled reads the cluster's API server, and those of the clusters whose remote secrets it holds.
	Enabled bool `yaml:"enabled"`
	// Kubeconfig is a file; empty: isthmusd runs as a Pod of the cluster.
	Kubeconfig string `yaml:"kubeconfig"`
	// Context of the kubeconfig; empty: its current one.
	Context string `yaml:"context"`
	// EverySecret reads certificates of gateways in all namespaces; else in the root namespace alone.
	EverySecret bool `yaml:"everySecret"`
	// DeployGateways makes pods and Services for Gateways of the Gateway API that name none.
	DeployGateways bool `yaml:"deployGateways"`
	// Namespace is the root namespace, istio-system unless given: the mesh's ConfigMap and remote secrets are there.
	Namespace string `yaml:"namespace"`
}

func (s sources) validate() error {
	switch {
	case s.Dir == "" && !s.Kube.Enabled:
		return errors.New("source: neither source.kube.enabled is set nor a folder of objects named in source.dir")
	case !s.Kube.Enabled && (s.Kube.Kubeconfig != "" || s.Kube.Context != ""):
		return errors.New("source.kube.enabled: it is not set, but a kubeconfig is named")
	case s.Kube.Kubeconfig == "" && s.Kube.Context != "":
		return errors.New("source.kube.context: it names a context of no kubeconfig; name source.kube.kubeconfig, too")
	case !label.MatchString(s.Kube.Namespace):
		return fmt.Errorf("source.kube.namespace: %q is not a namespace", s.Kube.Namespace)
	}
	return nil
}

// awaited names the sources that the first snapshot waits for.
func (s sources) awaited() []string {
	var out []string
	if s.Dir != "" {
		out = append(out, "file")
	}
	if s.Kube.Enabled {
		out = append(out, "kube")
	}
	return out
}

// readObjects makes the sources of the cluster's objects.
func (d *daemon) readObjects(st *store.Store, reg prometheus.Registerer) ([]part, error) {
	var out []part
	if dir := d.cfg.Source.Dir; dir != "" {
		out = append(out, part{"discovery/source/file", file.New(file.Config{Dir: dir, Sink: st.Sink("file"), Log: d.log}).Run})
	}
	k := d.cfg.Source.Kube
	if !k.Enabled {
		return out, nil
	}
	api, err := kubeconfig.Local(k.Kubeconfig, k.Context)
	if err != nil {
		return nil, err
	}
	d.kube, err = kube.New(kube.Config{
		Cluster: d.local.ID, TrustDomain: d.local.TrustDomain, Network: d.local.Network, API: api, Namespace: k.Namespace, EverySecret: k.EverySecret,
		Sink: st.Sink("kube"), Memory: d.kept.copy, Log: d.log, Reg: reg,
	})
	if err != nil {
		return nil, err
	}
	d.reviews = identity.NewReviews(identity.ReviewConfig{Reviewer: d.kube, TrustDomain: d.local.TrustDomain})
	return append(out, part{"discovery/source/kube", d.kube.Run}, part{"last known objects", func(ctx context.Context) error { return d.kept.copy.Run(ctx, d.kube) }}), nil
}

// sourceStates is what status says of API servers; empty where none is read.
func (d *daemon) sourceStates() []admin.Source {
	if d.kube == nil {
		return nil
	}
	var out []admin.Source
	for _, s := range d.kube.Status() {
		x := admin.Source{Cluster: string(s.Cluster), Remote: s.Remote, Server: s.Server, Connected: s.Connected, Since: s.Since, Error: s.Error}
		for _, k := range s.Kinds {
			x.Objects += k.Objects
			x.Kinds = append(x.Kinds, admin.SourceKind{Kind: k.Kind, Version: k.Version, Objects: k.Objects, State: k.State, Message: k.Message, Remedy: k.Remedy})
		}
		out = append(out, x)
	}
	return out
}

// controlNames are the DNS names of the control plane's certificate: that by which agents everywhere call it, and those
// of its Services.
func controlNames(xds string, namespace string) []string {
	out := []string{xds}
	for _, service := range []string{"isthmusd", "istiod"} {
		name := service + "." + cmp.Or(namespace, "istio-system")
		out = append(out, name+".svc", name+".svc.cluster.local", name)
	}
	return out
}
