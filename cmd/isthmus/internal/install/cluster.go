package install

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"regexp"
	"strings"
	"time"

	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/client-go/discovery"
	"k8s.io/client-go/discovery/cached/memory"
	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/metadata"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/restmapper"
	"k8s.io/client-go/tools/clientcmd"
	clientcmdapi "k8s.io/client-go/tools/clientcmd/api"

	"github.com/isthmus-mesh/isthmus/internal/diag"
)

// Target names a cluster by a kubeconfig's context.
type Target struct {
	Kubeconfig string // empty: the environment's KUBECONFIG, then ~/.kube/config
	Context    string // empty: the current one
}

func (t Target) loader() clientcmd.ClientConfig {
	rules := clientcmd.NewDefaultClientConfigLoadingRules()
	rules.ExplicitPath = t.Kubeconfig
	rules.WarnIfAllMissing = false
	return clientcmd.NewNonInteractiveDeferredLoadingClientConfig(rules, &clientcmd.ConfigOverrides{CurrentContext: t.Context})
}

// Name returns the name of the context without asking the cluster.
func (t Target) Name() (string, error) {
	raw, err := t.loader().RawConfig()
	if err != nil {
		return "", diag.Hint(fmt.Errorf("kubeconfig: %w", err), "name a kubeconfig with --kubeconfig or KUBECONFIG")
	}
	name := t.Context
	if name == "" {
		name = raw.CurrentContext
	}
	if name != "" && raw.Contexts[name] == nil {
		return "", diag.Hint(fmt.Errorf("kubeconfig: no context %q", name), "contexts there are: %s", strings.Join(contexts(raw), ", "))
	}
	return name, nil
}

func contexts(raw clientcmdapi.Config) []string {
	var names []string
	for n := range raw.Contexts {
		names = append(names, n)
	}
	if len(names) == 0 {
		return []string{"none"}
	}
	return sorted(names)
}

var notLabel = regexp.MustCompile(`[^a-z0-9]+`)

// ClusterName makes a cluster's name of a context's: a DNS label.
func ClusterName(contextName string) string {
	name := strings.Trim(notLabel.ReplaceAllString(strings.ToLower(contextName), "-"), "-")
	if len(name) > 63 {
		name = strings.Trim(name[:63], "-")
	}
	return name
}

// Cluster is an API server that things are installed on.
type Cluster struct {
	Context string // as the kubeconfig names it
	Server  string // its address
	Version string // its version, v1.36.3

	dynamic   dynamic.Interface
	metadata  metadata.Interface
	discovery discovery.CachedDiscoveryInterface
	mapper    *restmapper.DeferredDiscoveryRESTMapper
}

// Connect finds the cluster and asks for its version.
func Connect(ctx context.Context, t Target) (*Cluster, error) {
	name, err := t.Name()
	if err != nil {
		return nil, err
	}
	cfg, err := t.loader().ClientConfig()
	if err != nil {
		return nil, diag.Hint(fmt.Errorf("kubeconfig: %w", err), "name a kubeconfig with --kubeconfig or KUBECONFIG, a context with --context")
	}
	cfg.QPS, cfg.Burst = 100, 200
	cfg.UserAgent = "isthmus"
	cfg.WarningHandler = rest.NoWarnings{}
	if cfg.Timeout == 0 {
		cfg.Timeout = time.Minute
	}
	return connect(ctx, name, cfg)
}

func connect(ctx context.Context, name string, cfg *rest.Config) (*Cluster, error) {
	if name == "" {
		name = "in-cluster"
	}
	c := &Cluster{Context: name, Server: cfg.Host}
	d, err := discovery.NewDiscoveryClientForConfig(cfg)
	if err != nil {
		return nil, fmt.Errorf("context %s: %w", name, err)
	}
	version, err := d.ServerVersion()
	if err != nil {
		return nil, unreachable(name, cfg.Host, err)
	}
	c.Version = version.GitVersion
	c.discovery = memory.NewMemCacheClient(d)
	c.mapper = restmapper.NewDeferredDiscoveryRESTMapper(c.discovery)
	if c.dynamic, err = dynamic.NewForConfig(cfg); err != nil {
		return nil, fmt.Errorf("context %s: %w", name, err)
	}
	if c.metadata, err = metadata.NewForConfig(cfg); err != nil {
		return nil, fmt.Errorf("context %s: %w", name, err)
	}
	return c, ctx.Err()
}

func unreachable(name, server string, err error) error {
	err = fmt.Errorf("context %s: ask %s: %w", name, server, err)
	var op *net.OpError
	if errors.As(err, &op) || os.IsTimeout(err) {
		return diag.Hint(err, "the API server cannot be reached from here: check the context (isthmus install --context NAME) and the network")
	}
	return diag.Hint(err, "check the context's credentials: kubectl --context %s version", name)
}

// mapping finds the resource of a kind.
func (c *Cluster) mapping(gvk schema.GroupVersionKind) (*meta.RESTMapping, error) {
	m, err := c.mapper.RESTMapping(gvk.GroupKind(), gvk.Version)
	if meta.IsNoMatchError(err) {
		c.mapper.Reset() // definitions may be new
		m, err = c.mapper.RESTMapping(gvk.GroupKind(), gvk.Version)
	}
	if err != nil {
		return nil, fmt.Errorf("kind %s: %w", gvk.Kind, err)
	}
	return m, nil
}

// object returns the client of the kind of o, in its namespace.
func (c *Cluster) object(o *unstructured.Unstructured) (dynamic.ResourceInterface, error) {
	m, err := c.mapping(o.GroupVersionKind())
	if err != nil {
		return nil, err
	}
	if m.Scope.Name() == meta.RESTScopeNameNamespace {
		return c.dynamic.Resource(m.Resource).Namespace(o.GetNamespace()), nil
	}
	return c.dynamic.Resource(m.Resource), nil
}

// heads is like object, of a client that gets metadata alone: of a definition that is a hundredth.
func (c *Cluster) heads(o *unstructured.Unstructured) (metadata.ResourceInterface, error) {
	m, err := c.mapping(o.GroupVersionKind())
	if err != nil {
		return nil, err
	}
	if m.Scope.Name() == meta.RESTScopeNameNamespace {
		return c.metadata.Resource(m.Resource).Namespace(o.GetNamespace()), nil
	}
	return c.metadata.Resource(m.Resource), nil
}

// definition reads a resource definition.
func (c *Cluster) definition(ctx context.Context, name string) (*definition, error) {
	data, err := c.discovery.RESTClient().Get().AbsPath("/apis/apiextensions.k8s.io/v1/customresourcedefinitions", name).
		SetHeader("Accept", "application/json").Do(ctx).Raw()
	if err != nil {
		return nil, err
	}
	d := &definition{}
	return d, json.Unmarshal(data, d)
}

// get reads one object.
func (c *Cluster) get(ctx context.Context, gvr schema.GroupVersionResource, namespace, name string) (*unstructured.Unstructured, error) {
	if namespace == "" {
		return c.dynamic.Resource(gvr).Get(ctx, name, metav1.GetOptions{})
	}
	return c.dynamic.Resource(gvr).Namespace(namespace).Get(ctx, name, metav1.GetOptions{})
}

// Resources that are asked for by name.
var (
	namespaces  = schema.GroupVersionResource{Version: "v1", Resource: "namespaces"}
	secrets     = schema.GroupVersionResource{Version: "v1", Resource: "secrets"}
	configMaps  = schema.GroupVersionResource{Version: "v1", Resource: "configmaps"}
	pods        = schema.GroupVersionResource{Version: "v1", Resource: "pods"}
	services    = schema.GroupVersionResource{Version: "v1", Resource: "services"}
	leases      = schema.GroupVersionResource{Group: "coordination.k8s.io", Version: "v1", Resource: "leases"}
	deployments = schema.GroupVersionResource{Group: "apps", Version: "v1", Resource: "deployments"}
	reviews     = schema.GroupVersionResource{Group: "authorization.k8s.io", Version: "v1", Resource: "selfsubjectaccessreviews"}
)

// title names an object in lines for people: Kind/namespace/name.
func title(o *unstructured.Unstructured) string {
	if ns := o.GetNamespace(); ns != "" {
		return o.GetKind() + "/" + ns + "/" + o.GetName()
	}
	return o.GetKind() + "/" + o.GetName()
}
