package main

import (
	"cmp"
	"fmt"
	"net"

	"github.com/prometheus/client_golang/prometheus"
	"k8s.io/client-go/kubernetes"

	"github.com/isthmus-mesh/isthmus/discovery/config"
	"github.com/isthmus-mesh/isthmus/discovery/inject"
	"github.com/isthmus-mesh/isthmus/discovery/inject/webhook"
	"github.com/isthmus-mesh/isthmus/discovery/mesh"
	"github.com/isthmus-mesh/isthmus/discovery/source/kube/kubeconfig"
	"github.com/isthmus-mesh/isthmus/eastwest/sni"
	"github.com/isthmus-mesh/isthmus/internal/diag"
)

// webhookConfig is about the admission webhooks: injection, and the check of Istio's objects.
type webhookConfig struct {
	// Listen is their address, HTTPS; empty: off.
	Listen string `yaml:"listen"`
	// Revision is the one whose pods are injected here; "default" unless given.
	Revision string `yaml:"revision"`
}

func (w webhookConfig) validate() error {
	if w.Revision != "" && !label.MatchString(w.Revision) {
		return fmt.Errorf("webhook.revision: %q is not a revision", w.Revision)
	}
	if w.Listen == "" {
		return nil
	}
	if _, port, err := net.SplitHostPort(w.Listen); err != nil || port == "" {
		return fmt.Errorf("webhook.listen: %q is not ADDRESS:PORT", w.Listen)
	}
	return nil
}

// pathWebhook is the identity in the webhooks' certificate; API servers go by its DNS names.
const pathWebhook = "/isthmus/webhook"

// webhooks makes the parts that serve admission webhooks; none without a listener.
func (d *daemon) webhooks(l net.Listener, reg prometheus.Registerer) ([]part, error) {
	if l == nil {
		return nil, nil
	}
	k := d.cfg.Source.Kube
	namespace := cmp.Or(k.Namespace, "istio-system")
	cert, err := d.ca.Rotating("spiffe://"+string(d.local.TrustDomain)+pathWebhook, controlNames(sni.XDS.Name(d.local.TrustDomain), namespace), 0)
	if err != nil {
		return nil, err
	}
	c := webhook.Config{Listener: l, Certificate: cert.GetCertificate, Cluster: d.cfg.Cluster, Validate: d.validateObject, Proxies: d.proxyConfigs, Log: d.log, Reg: reg}
	var parts []part
	if k.Enabled {
		watcher, more, err := d.watchInjection(k, namespace)
		if err != nil {
			return nil, err
		}
		c.Injector, c.Namespaces, parts = watcher, watcher, more
	} else {
		defaults, err := d.injection(inject.Documents{})
		if err != nil {
			return nil, err
		}
		c.Injector = fixedInjection{defaults}
	}
	return append(parts, part{"discovery/inject/webhook", webhook.New(c).Run}), nil
}

// proxyConfigs are those of the newest snapshot.
func (d *daemon) proxyConfigs() []*mesh.ProxyConfig {
	snap, _ := d.snapshots.Latest()
	if snap == nil {
		return nil
	}
	return snap.ProxyConfigs
}

// watchInjection makes the parts that need the API server: the injector's configuration, and its certificate authority
// in the webhook configuration.
func (d *daemon) watchInjection(k kubeSource, namespace string) (*webhook.Watcher, []part, error) {
	api, err := kubeconfig.Local(k.Kubeconfig, k.Context)
	if err != nil {
		return nil, nil, err
	}
	client, err := kubernetes.NewForConfig(api)
	if err != nil {
		return nil, nil, diag.Hint(fmt.Errorf("client of the API server: %w", err), "correct source.kube.kubeconfig")
	}
	watcher, err := webhook.NewWatcher(webhook.WatchConfig{Client: client, Namespace: namespace, Revision: d.cfg.Webhook.Revision, Fill: d.injection, Log: d.log})
	if err != nil {
		return nil, nil, err
	}
	bundle := webhook.BundleConfig{
		Client: client, Name: webhook.InjectorConfigMap + webhook.Suffix(d.cfg.Webhook.Revision), Service: namespace, Roots: d.ca.Roots, Log: d.log,
	}
	bundler, err := webhook.NewBundler(bundle)
	if err != nil {
		return nil, nil, err
	}
	check := bundle
	check.Name, check.Validating = webhook.ValidatorName(d.cfg.Webhook.Revision, namespace), true
	checker, err := webhook.NewBundler(check)
	if err != nil {
		return nil, nil, err
	}
	remote := webhook.NewRemoteBundles(d.remoteServers, bundle)
	return watcher, []part{{"discovery/inject configuration", watcher.Run}, {"webhook certificate authority", bundler.Run}, {"validation certificate authority", checker.Run}, {"webhook certificate authority of remote clusters", remote.Run}}, nil
}

// remoteServers are the API servers of the clusters that are read by remote secret.
func (d *daemon) remoteServers() (out []webhook.Remote, changed <-chan struct{}) {
	servers, changed := d.kube.Servers()
	for _, s := range servers {
		if s.Remote {
			out = append(out, webhook.Remote{Cluster: s.Cluster, Config: s.Config})
		}
	}
	return out, changed
}

// injection parses the injector's documents; what they leave open is what this control plane is.
func (d *daemon) injection(docs inject.Documents) (*inject.Config, error) {
	docs.Defaults = inject.Identity{
		Cluster: d.cfg.Cluster, Network: d.cfg.Network, TrustDomain: d.cfg.TrustDomain, Namespace: d.cfg.Source.Kube.Namespace, Revision: d.cfg.Webhook.Revision,
	}
	return inject.Parse(docs)
}

type fixedInjection struct{ c *inject.Config }

// Current implements webhook.Injector.
func (f fixedInjection) Current() *inject.Config { return f.c }

// validateObject says what keeps an object from being used. What is merely not honoured is let pass: the rest of the
// object works, and isthmus status shows it.
func (d *daemon) validateObject(raw []byte) []string {
	_, problems := config.Decode("", raw, config.Options{RootNamespace: d.cfg.Source.Kube.Namespace, TrustDomain: mesh.TrustDomain(d.cfg.TrustDomain), Local: mesh.ClusterID(d.cfg.Cluster), ByLabel: true})
	var out []string
	for _, p := range problems {
		if p.Reason != "Unsupported" {
			out = append(out, p.String())
		}
	}
	return out
}
