package webhook

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync/atomic"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/client-go/informers"
	"k8s.io/client-go/kubernetes"
	corelisters "k8s.io/client-go/listers/core/v1"
	"k8s.io/client-go/tools/cache"

	"github.com/isthmus-mesh/isthmus/discovery/inject"
	"github.com/isthmus-mesh/isthmus/internal/diag"
	"github.com/isthmus-mesh/isthmus/internal/patient"
)

// Names of the ConfigMaps that the injector reads.
const (
	InjectorConfigMap = "istio-sidecar-injector" // keys config and values; -REVISION for other revisions than default
	MeshConfigMap     = "istio"                  // key mesh
)

// WatchConfig is what a Watcher needs.
type WatchConfig struct {
	Client    kubernetes.Interface
	Namespace string                                           // of the ConfigMaps
	Revision  string                                           // "" or default: no suffix
	Fill      func(d inject.Documents) (*inject.Config, error) // makes the configuration; nil: inject.Parse
	Log       *slog.Logger
}

// Watcher keeps the injector's configuration and the namespaces' labels in view. What does not parse is logged, and the
// last good configuration stays.
type Watcher struct {
	c          WatchConfig
	factories  []informers.SharedInformerFactory
	configs    []cache.SharedIndexInformer
	namespaces cache.SharedIndexInformer
	lister     corelisters.NamespaceLister
	current    atomic.Pointer[inject.Config]
	changed    chan struct{}
}

// ValidatorName is the name of the ValidatingWebhookConfiguration of an installation.
func ValidatorName(revision, namespace string) string {
	return "istio-validator" + Suffix(revision) + "-" + namespace
}

// Suffix is what a revision adds to names: nothing for the default one.
func Suffix(revision string) string {
	if revision == "" || revision == "default" {
		return ""
	}
	return "-" + revision
}

// NewWatcher returns a Watcher with the built-in defaults; it starts nothing.
func NewWatcher(c WatchConfig) (*Watcher, error) {
	if c.Fill == nil {
		c.Fill = inject.Parse
	}
	w := &Watcher{c: c, changed: make(chan struct{}, 1)}
	first, err := c.Fill(inject.Documents{})
	if err != nil {
		return nil, err
	}
	w.current.Store(first)
	for _, name := range []string{InjectorConfigMap + Suffix(c.Revision), MeshConfigMap} {
		f := informers.NewSharedInformerFactory(c.Client, 0)
		only := func(o *metav1.ListOptions) {
			o.FieldSelector = fields.OneTermEqualSelector("metadata.name", name).String()
		}
		informer := f.InformerFor(&corev1.ConfigMap{}, func(client kubernetes.Interface, _ time.Duration) cache.SharedIndexInformer {
			return cache.NewSharedIndexInformer(patient.ListWatch(client.CoreV1().ConfigMaps(c.Namespace), only, nil, client), &corev1.ConfigMap{}, 0, cache.Indexers{})
		})
		if _, err := informer.AddEventHandler(cache.ResourceEventHandlerFuncs{
			AddFunc: func(any) { w.wake() }, UpdateFunc: func(any, any) { w.wake() }, DeleteFunc: func(any) { w.wake() },
		}); err != nil {
			return nil, fmt.Errorf("watch ConfigMap %s: %w", name, err)
		}
		w.factories, w.configs = append(w.factories, f), append(w.configs, informer)
	}
	f := informers.NewSharedInformerFactory(c.Client, 0)
	w.namespaces = f.InformerFor(&corev1.Namespace{}, func(client kubernetes.Interface, _ time.Duration) cache.SharedIndexInformer {
		return cache.NewSharedIndexInformer(patient.ListWatch(client.CoreV1().Namespaces(), nil, nil, client), &corev1.Namespace{}, 0, cache.Indexers{})
	})
	w.lister = f.Core().V1().Namespaces().Lister()
	// Of a namespace its labels alone are kept.
	if err := w.namespaces.SetTransform(func(o any) (any, error) {
		if ns, ok := o.(*corev1.Namespace); ok {
			return &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: ns.Name, Labels: ns.Labels, ResourceVersion: ns.ResourceVersion}}, nil
		}
		return o, nil
	}); err != nil {
		return nil, fmt.Errorf("watch namespaces: %w", err)
	}
	w.factories = append(w.factories, f)
	return w, nil
}

// Current implements Injector.
func (w *Watcher) Current() *inject.Config { return w.current.Load() }

// Labels implements Namespaces.
func (w *Watcher) Labels(name string) (map[string]string, bool) {
	if !w.namespaces.HasSynced() {
		return nil, false
	}
	ns, err := w.lister.Get(name)
	if err != nil {
		return nil, false // made a moment ago: the API server's selectors saw it
	}
	return ns.Labels, true
}

func (w *Watcher) wake() {
	select {
	case w.changed <- struct{}{}:
	default:
	}
}

// Run watches until ctx ends.
func (w *Watcher) Run(ctx context.Context) error {
	for _, f := range w.factories {
		f.Start(ctx.Done())
	}
	defer func() {
		for _, f := range w.factories {
			f.Shutdown()
		}
	}()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-w.changed:
			w.reload()
		}
	}
}

func (w *Watcher) reload() {
	var d inject.Documents
	for i, informer := range w.configs {
		for _, o := range informer.GetStore().List() {
			m, ok := o.(*corev1.ConfigMap)
			switch {
			case !ok:
			case i == 0:
				d.Config, d.Values = m.Data["config"], m.Data["values"]
			default:
				d.Mesh = m.Data["mesh"]
			}
		}
	}
	next, err := w.c.Fill(d)
	if err != nil {
		w.c.Log.Error("injection configuration not taken, the last good one stays", "err", err)
		return
	}
	w.current.Store(next)
	w.c.Log.Info("injection configuration taken", "revision", next.Revision())
}

// ReadConfig reads the same ConfigMaps once, for a command.
func ReadConfig(ctx context.Context, client kubernetes.Interface, namespace, revision string) (*inject.Config, error) {
	ctx, cancel := context.WithTimeout(ctx, 20*time.Second)
	defer cancel()
	name := InjectorConfigMap + Suffix(revision)
	m, err := client.CoreV1().ConfigMaps(namespace).Get(ctx, name, metav1.GetOptions{})
	if err != nil {
		return nil, diag.Hint(fmt.Errorf("ConfigMap %s/%s: %w", namespace, name, err), "install Isthmus there first, or give the configuration with --values FILE")
	}
	d := inject.Documents{Config: m.Data["config"], Values: m.Data["values"]}
	if m, err = client.CoreV1().ConfigMaps(namespace).Get(ctx, MeshConfigMap, metav1.GetOptions{}); err == nil {
		d.Mesh = m.Data["mesh"]
	} else if ctx.Err() != nil {
		return nil, errors.Join(ctx.Err(), err)
	}
	return inject.Parse(d)
}
