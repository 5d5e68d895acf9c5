package webhook

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"time"

	admissionregistrationv1 "k8s.io/api/admissionregistration/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/informers"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/tools/cache"
)

// BundleConfig is what a Bundler needs.
type BundleConfig struct {
	Client kubernetes.Interface
	Name   string // of the MutatingWebhookConfiguration
	// Validating: it is a ValidatingWebhookConfiguration.
	Validating bool
	Service    string // namespace of the Services isthmusd and istiod: webhooks that lead elsewhere are not ours
	// Roots gives the certificate authority, PEM.
	Roots func() []byte
	Log   *slog.Logger
}

// retryBundle is the wait after a patch that was refused, for example by a missing right.
const retryBundle = 5 * time.Second

// Bundler keeps the certificate authority in a webhook configuration: whoever removes or changes it, or installs the
// configuration anew, finds it there again. Every replica may run one; they write the same.
type Bundler struct {
	c        BundleConfig
	factory  informers.SharedInformerFactory
	informer cache.SharedIndexInformer
	changed  chan struct{}
}

// NewBundler returns a Bundler; it starts nothing.
func NewBundler(c BundleConfig) (*Bundler, error) {
	b := &Bundler{c: c, changed: make(chan struct{}, 1)}
	b.factory = informers.NewSharedInformerFactoryWithOptions(c.Client, 0,
		informers.WithTweakListOptions(func(o *metav1.ListOptions) {
			o.FieldSelector = fields.OneTermEqualSelector("metadata.name", c.Name).String()
		}))
	b.informer = b.factory.Admissionregistration().V1().MutatingWebhookConfigurations().Informer()
	if c.Validating {
		b.informer = b.factory.Admissionregistration().V1().ValidatingWebhookConfigurations().Informer()
	}
	if _, err := b.informer.AddEventHandler(cache.ResourceEventHandlerFuncs{
		AddFunc: func(any) { b.wake() }, UpdateFunc: func(any, any) { b.wake() },
	}); err != nil {
		return nil, fmt.Errorf("watch webhook configuration %s: %w", c.Name, err)
	}
	return b, nil
}

func (b *Bundler) wake() {
	select {
	case b.changed <- struct{}{}:
	default:
	}
}

// Run keeps the configuration patched until ctx ends. It looks again every minute, too: roots change without an event.
func (b *Bundler) Run(ctx context.Context) error {
	b.factory.Start(ctx.Done())
	defer b.factory.Shutdown()
	timer := time.NewTimer(time.Minute)
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-b.changed:
		case <-timer.C:
		}
		wait := time.Minute
		if err := b.patch(ctx); err != nil && ctx.Err() == nil {
			b.c.Log.Warn("certificate authority not written into the webhook configuration", "name", b.c.Name, "err", err)
			wait = retryBundle
		}
		timer.Reset(wait)
	}
}

func (b *Bundler) patch(ctx context.Context) error {
	for _, o := range b.informer.GetStore().List() {
		name, clients, ok := clientsOf(o)
		if !ok {
			continue
		}
		ops := bundlePatch(clients, b.c.Service, b.c.Roots())
		if len(ops) == 0 {
			continue
		}
		data, err := json.Marshal(ops)
		if err != nil {
			return err
		}
		ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
		defer cancel()
		api, opts := b.c.Client.AdmissionregistrationV1(), metav1.PatchOptions{FieldManager: "isthmusd"}
		if b.c.Validating {
			_, err = api.ValidatingWebhookConfigurations().Patch(ctx, name, types.JSONPatchType, data, opts)
		} else {
			_, err = api.MutatingWebhookConfigurations().Patch(ctx, name, types.JSONPatchType, data, opts)
		}
		if apierrors.IsNotFound(err) {
			continue
		}
		if err != nil {
			return err
		}
		b.c.Log.Info("certificate authority written into the webhook configuration", "name", name)
	}
	return nil
}

// client is one webhook of a configuration: its name and where it leads.
type client struct {
	name string
	to   admissionregistrationv1.WebhookClientConfig
}

// clientsOf returns the name and the webhooks of a configuration of either kind.
func clientsOf(o any) (name string, out []client, ok bool) {
	switch cfg := o.(type) {
	case *admissionregistrationv1.MutatingWebhookConfiguration:
		for _, w := range cfg.Webhooks {
			out = append(out, client{w.Name, w.ClientConfig})
		}
		return cfg.Name, out, true
	case *admissionregistrationv1.ValidatingWebhookConfiguration:
		for _, w := range cfg.Webhooks {
			out = append(out, client{w.Name, w.ClientConfig})
		}
		return cfg.Name, out, true
	}
	return "", nil, false
}

// operation is one step of a JSON patch; test guards against a list that changed meanwhile.
type operation struct {
	Op    string `json:"op"`
	Path  string `json:"path"`
	Value any    `json:"value"`
}

// bundlePatch returns the JSON patch that puts roots into the webhooks that lead to our Services in namespace;
// empty when they are there. Webhooks with a URL are those of a remote control plane, and ours, too.
func bundlePatch(clients []client, namespace string, roots []byte) []operation {
	var ops []operation
	for i, w := range clients {
		cc := w.to
		ours := cc.URL != nil || cc.Service != nil && cc.Service.Namespace == namespace && (cc.Service.Name == "isthmusd" || cc.Service.Name == "istiod")
		if !ours || bytes.Equal(cc.CABundle, roots) {
			continue
		}
		at := fmt.Sprintf("/webhooks/%d", i)
		ops = append(ops, operation{"test", at + "/name", w.name}, operation{"add", at + "/clientConfig/caBundle", roots})
	}
	return ops
}
