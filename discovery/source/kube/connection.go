package kube

import (
	"context"
	"fmt"
	"net"
	"net/http"
	"strings"
	"time"

	authenticationv1 "k8s.io/api/authentication/v1"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/runtime/serializer"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/cache"
	"k8s.io/client-go/util/connrotation"

	"github.com/isthmus-mesh/isthmus/discovery/source/kube/reduce"
)

// newScheme holds the types that are decoded from protobuf; the clientset of all of Kubernetes would be much larger.
func newScheme() (*runtime.Scheme, error) {
	s := runtime.NewScheme()
	for _, add := range []func(*runtime.Scheme) error{corev1.AddToScheme, discoveryv1.AddToScheme, authenticationv1.AddToScheme} {
		if err := add(s); err != nil {
			return nil, err
		}
	}
	metav1.AddToGroupVersion(s, schema.GroupVersion{Version: "v1"})
	return s, nil
}

// connection is how one API server is reached with one set of credentials.
type connection struct {
	server string // as the kubeconfig names it
	base   string // URL that paths are added to
	http   *http.Client
	dialer *connrotation.Dialer
	typed  map[string]rest.Interface // by API group
	custom dynamic.Interface
}

// Limits of requests. Watches are few and long; lists come in a burst at the start.
const (
	clientQPS   = 50
	clientBurst = 100
	dialTimeout = 5 * time.Second
)

// dial prepares a connection; it sends nothing.
func dial(cfg *rest.Config) (*connection, error) {
	cfg = rest.CopyConfig(cfg)
	cfg.QPS, cfg.Burst = clientQPS, clientBurst
	if cfg.UserAgent == "" {
		cfg.UserAgent = "isthmusd"
	}
	cfg.WarningHandler = rest.NoWarnings{}
	d := &net.Dialer{Timeout: dialTimeout, KeepAlive: 15 * time.Second}
	conn := &connection{server: cfg.Host, dialer: connrotation.NewDialer(d.DialContext), typed: map[string]rest.Interface{}}
	cfg.Dial = conn.dialer.DialContext
	base, _, err := rest.DefaultServerURL(cfg.Host, "", schema.GroupVersion{}, true)
	if err != nil {
		return nil, fmt.Errorf("the address of the API server, %q: %w", cfg.Host, err)
	}
	conn.base = base.String()
	if conn.http, err = rest.HTTPClientFor(cfg); err != nil {
		return nil, fmt.Errorf("connect to the API server %s: %w", cfg.Host, err)
	}
	scheme, err := newScheme()
	if err != nil {
		return nil, err
	}
	codecs := serializer.NewCodecFactory(scheme)
	for _, gv := range []schema.GroupVersion{{Version: "v1"}, {Group: "discovery.k8s.io", Version: "v1"}, {Group: "authentication.k8s.io", Version: "v1"}} {
		c := rest.CopyConfig(cfg)
		c.GroupVersion, c.APIPath, c.NegotiatedSerializer = &gv, "/apis", codecs.WithoutConversion()
		if gv.Group == "" {
			c.APIPath = "/api"
		}
		c.ContentType, c.AcceptContentTypes = runtime.ContentTypeProtobuf, strings.Join([]string{runtime.ContentTypeProtobuf, runtime.ContentTypeJSON}, ",")
		if conn.typed[gv.Group], err = rest.RESTClientForConfigAndClient(c, conn.http); err != nil {
			return nil, fmt.Errorf("connect to the API server %s: %w", cfg.Host, err)
		}
	}
	if conn.custom, err = dynamic.NewForConfigAndClient(cfg, conn.http); err != nil {
		return nil, fmt.Errorf("connect to the API server %s: %w", cfg.Host, err)
	}
	return conn, nil
}

// close ends all connections; requests on them fail.
func (c *connection) close() {
	c.dialer.CloseAll()
	c.http.CloseIdleConnections()
}

// lister lists and watches one kind at one version.
func (c *connection) lister(k *kind, version, namespace string, told func(verb string, err error)) cache.ListerWatcher {
	if !k.root {
		namespace = ""
	}
	choose := func(o *metav1.ListOptions) {
		o.LabelSelector, o.FieldSelector = k.labels, k.fields
	}
	list := func(ctx context.Context, o metav1.ListOptions) (runtime.Object, error) {
		return c.custom.Resource(k.gvr(version)).Namespace(namespace).List(ctx, o)
	}
	look := func(ctx context.Context, o metav1.ListOptions) (watch.Interface, error) {
		return c.custom.Resource(k.gvr(version)).Namespace(namespace).Watch(ctx, o)
	}
	if k.typed != nil {
		lw := cache.NewFilteredListWatchFromClient(c.typed[k.group], k.resource, namespace, choose)
		list, look = lw.ListWithContextFunc, lw.WatchFuncWithContext
	}
	return &cache.ListWatch{
		ListWithContextFunc: func(ctx context.Context, o metav1.ListOptions) (runtime.Object, error) {
			choose(&o)
			out, err := list(ctx, o)
			told("list", err)
			if err == nil {
				slim(out)
			}
			return out, err
		},
		WatchFuncWithContext: func(ctx context.Context, o metav1.ListOptions) (watch.Interface, error) {
			choose(&o)
			out, err := look(ctx, o)
			told("watch", err)
			return out, err
		},
	}
}

// slim drops the bulk of listed Pods: all pages of a list are in memory together.
func slim(list runtime.Object) {
	pods, ok := list.(*corev1.PodList)
	if !ok {
		return
	}
	for i := range pods.Items {
		p := &pods.Items[i]
		resourceVersion := p.ResourceVersion
		*p = *reduce.Pod(p)
		p.ResourceVersion = resourceVersion
	}
}
