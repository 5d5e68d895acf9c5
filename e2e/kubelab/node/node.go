package node

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net/netip"
	"os"
	"path/filepath"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/informers"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/kubernetes/scheme"
	typedcorev1 "k8s.io/client-go/kubernetes/typed/core/v1"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/cache"
	"k8s.io/client-go/tools/record"

	"github.com/isthmus-mesh/isthmus/e2e/kubelab/node/box"
	"github.com/isthmus-mesh/isthmus/e2e/kubelab/node/kubelet"
	"github.com/isthmus-mesh/isthmus/e2e/kubelab/node/kubeproxy"
)

// Spec is one Node of the cluster.
type Spec struct {
	Name   string
	Labels map[string]string // beside kubernetes.io/hostname and the like
	// PodCIDRs is one IPv4 prefix, one IPv6 prefix or both: Pods of the node get an address of each. The first address
	// of a prefix is the router's.
	PodCIDRs []netip.Prefix
	// Addresses are the node's own, at most one of each family: Pods on the host's network have them, and NodePorts
	// are dialed at them. They are put on the router when it has them not. Default: the first addresses of PodCIDRs.
	Addresses []netip.Addr
}

// Program is what an image holds.
type Program struct {
	// Command is the entry point: the path of a program of this machine, and arguments that a Pod's args come after.
	Command []string
	// Args are used by Pods that give neither command nor args.
	Args []string
	// Env holds NAME=VALUE that a Pod's own may replace.
	Env []string
	// UID is the user of Pods whose security context says none.
	UID int64
	// Files maps paths in the container to files or folders of this machine.
	Files map[string]string
}

// Config is what a Node is made from. What is not said to have a default must be given.
type Config struct {
	REST  *rest.Config
	Nodes []Spec
	// Router is the file of the network namespace that the nodes share, and the only way to their Pods.
	Router string
	// Images maps names of images to programs. A name without tag and digest is looked up as it is, then by its last
	// part, then by the longest entry that begins either.
	Images map[string]Program
	// CNIConfDir and CNIBinDir are /etc/cni/net.d and /opt/cni/bin of the nodes.
	CNIConfDir, CNIBinDir string
	// CNIPlugin is the path of the program labcni: it is linked into CNIBinDir, and a configuration for it is written when
	// CNIConfDir has none. "" leaves both folders alone.
	CNIPlugin string
	// RunDir keeps volumes and state, of this process alone; LogDir/NAMESPACE_POD/CONTAINER.log are what containers print.
	RunDir, LogDir string
	// ServiceCIDRs are the cluster's ranges for Services.
	ServiceCIDRs []netip.Prefix
	// ProxyNamespaces are files of further network namespaces in which Services are answered for: the API server's.
	ProxyNamespaces []string
	// LoadBalancer is the range that Services of type LoadBalancer get addresses from; the zero Prefix leaves them pending.
	LoadBalancer netip.Prefix
	// WANLink is the router's interface that gets the addresses of LoadBalancer. Default lo.
	WANLink string
	// ClusterDomain is the suffix of the cluster's names. Default cluster.local.
	ClusterDomain string
	// Scheduler binds Pods that nobody has bound: set it where no scheduler runs.
	Scheduler bool
	// HostPaths replaces folders of the nodes' file system by folders of this machine.
	HostPaths map[string]string
	// Env is given to every container: marks by which a lab finds its processes.
	Env []string
	// TLS is the certificate of the kubelets, and the clients that they serve: the API server. nil leaves kubectl logs, exec
	// and port-forward without an answer.
	TLS *tls.Config
	// Backoff is the pause before the second restart of a container; it doubles up to 30 times itself. Default 1 s: real
	// nodes wait 10 s.
	Backoff time.Duration
	// Log gets what an operator of nodes would read. Default: discarded.
	Log *slog.Logger
}

// Node serves the nodes of one cluster.
type Node struct {
	cfg     Config
	log     *slog.Logger
	client  kubernetes.Interface
	host    *box.Host
	router  *box.NetNS
	cni     *network
	events  record.EventRecorder
	pods    cache.SharedIndexInformer
	factory informers.SharedInformerFactory
	nodes   map[string]*Spec
	ready   chan struct{}
	proxy   *kubeproxy.Proxy

	mu      sync.Mutex
	workers map[types.UID]*worker
	frozen  map[string]bool
	wait    sync.WaitGroup
	run     context.Context
}

// New checks the configuration. It starts nothing.
func New(cfg Config) (*Node, error) {
	var errs []error
	need := func(ok bool, what string) {
		if !ok {
			errs = append(errs, fmt.Errorf("node: no %s given", what))
		}
	}
	need(cfg.REST != nil, "REST configuration")
	need(len(cfg.Nodes) > 0, "nodes")
	need(cfg.Router != "", "network namespace of the router")
	need(cfg.CNIConfDir != "" && cfg.CNIBinDir != "", "folders for network plugins")
	need(cfg.RunDir != "" && cfg.LogDir != "", "folders for state and logs")
	if len(errs) > 0 {
		return nil, errors.Join(errs...)
	}
	for _, p := range []*string{&cfg.CNIConfDir, &cfg.CNIBinDir, &cfg.RunDir, &cfg.LogDir} {
		abs, err := filepath.Abs(*p)
		if err != nil {
			return nil, fmt.Errorf("node: %w", err)
		}
		*p = abs
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	if cfg.Backoff <= 0 {
		cfg.Backoff = time.Second
	}
	if cfg.ClusterDomain == "" {
		cfg.ClusterDomain = "cluster.local"
	}
	if cfg.WANLink == "" {
		cfg.WANLink = "lo"
	}
	n := &Node{
		cfg: cfg, log: cfg.Log, nodes: map[string]*Spec{}, workers: map[types.UID]*worker{}, frozen: map[string]bool{},
		ready: make(chan struct{}),
	}
	for i := range cfg.Nodes {
		s := &n.cfg.Nodes[i]
		if len(s.PodCIDRs) == 0 {
			return nil, fmt.Errorf("node %s: no pod CIDR given", s.Name)
		}
		if len(s.Addresses) == 0 {
			for _, p := range s.PodCIDRs {
				s.Addresses = append(s.Addresses, p.Masked().Addr().Next())
			}
		}
		n.nodes[s.Name] = s
	}
	rc := rest.CopyConfig(cfg.REST)
	rc.QPS, rc.Burst, rc.UserAgent = 500, 1000, "kubelet"
	var err error
	if n.client, err = kubernetes.NewForConfig(rc); err != nil {
		return nil, fmt.Errorf("node: %w", err)
	}
	return n, nil
}

// Ready is closed once the Nodes are registered and Pods are being served.
func (n *Node) Ready() <-chan struct{} { return n.ready }

// Run serves the nodes until ctx ends; then every container is killed. It returns an error when the nodes cannot be
// made; an API server that is away is waited for.
func (n *Node) Run(ctx context.Context) (err error) {
	for _, d := range []string{n.cfg.RunDir, n.cfg.LogDir, n.cfg.CNIConfDir, n.cfg.CNIBinDir} {
		if err := os.MkdirAll(d, 0o755); err != nil {
			return fmt.Errorf("node: %w", err)
		}
	}
	binds := map[string]string{"/etc/cni/net.d": n.cfg.CNIConfDir, "/opt/cni/bin": n.cfg.CNIBinDir}
	maps.Copy(binds, n.cfg.HostPaths)
	if n.host, err = box.OpenHost(n.cfg.RunDir, binds); err != nil {
		return err
	}
	defer n.host.Close()
	if n.router, err = box.OpenNetNS(n.cfg.Router); err != nil {
		return err
	}
	defer n.router.Close()
	if n.cni, err = newNetwork(n); err != nil {
		return err
	}
	if err := n.addresses(); err != nil {
		return err
	}
	stopEvents := n.startEvents()
	defer stopEvents()
	return n.serve(ctx)
}

func (n *Node) startEvents() (stop func()) {
	broadcaster := record.NewBroadcaster(record.WithCorrelatorOptions(record.CorrelatorOptions{BurstSize: 200, QPS: 5}))
	broadcaster.StartRecordingToSink(&typedcorev1.EventSinkImpl{Interface: n.client.CoreV1().Events("")})
	n.events = broadcaster.NewRecorder(scheme.Scheme, corev1.EventSource{Component: "kubelet", Host: n.cfg.Nodes[0].Name})
	return broadcaster.Shutdown
}

func (n *Node) serve(ctx context.Context) error {
	n.factory = informers.NewSharedInformerFactoryWithOptions(n.client, 0, informers.WithTransform(strip))
	defer n.factory.Shutdown()
	n.pods = n.factory.Core().V1().Pods().Informer()
	configMaps, secrets := n.factory.Core().V1().ConfigMaps().Informer(), n.factory.Core().V1().Secrets().Informer()
	proxy, err := kubeproxy.New(n.proxyConfig())
	if err != nil {
		return err
	}
	g, ctx := errgroup.WithContext(ctx)
	n.mu.Lock()
	n.run, n.proxy = ctx, proxy
	n.mu.Unlock()
	defer n.wait.Wait()
	n.factory.Start(ctx.Done())
	synced := []cache.InformerSynced{n.pods.HasSynced, configMaps.HasSynced, secrets.HasSynced, n.factory.Core().V1().Services().Informer().HasSynced}
	g.Go(func() error { return proxy.Run(ctx) })
	if n.cfg.TLS != nil {
		l, err := n.router.Listen("tcp", fmt.Sprintf(":%d", kubelet.Port)) // of all nodes
		if err != nil {
			return fmt.Errorf("kubelet: %w", err)
		}
		g.Go(func() error { return kubelet.New(kubeletPods{n}, l, n.cfg.TLS).Run(ctx) })
	}
	g.Go(func() error {
		if err := n.register(ctx); err != nil || !cache.WaitForCacheSync(ctx.Done(), synced...) {
			return err
		}
		for _, w := range []cache.SharedIndexInformer{configMaps, secrets} {
			if _, err := w.AddEventHandler(n.watchConfig()); err != nil {
				return fmt.Errorf("node: %w", err)
			}
		}
		if _, err := n.pods.AddEventHandler(n.watchPods()); err != nil {
			return fmt.Errorf("node: %w", err)
		}
		close(n.ready)
		n.log.Info("nodes are ready", "nodes", len(n.nodes))
		n.heartbeat(ctx)
		return nil
	})
	if n.cfg.Scheduler {
		g.Go(func() error { return n.schedule(ctx) })
	}
	return g.Wait()
}

// kubeletPods is what the kubelets' API sees of the nodes.
type kubeletPods struct{ *Node }

// NetNS returns a Pod's network.
func (p kubeletPods) NetNS(namespace, pod string) (*box.NetNS, error) {
	ns, _, err := p.Node.NetNS(namespace, pod)
	return ns, err
}

func (n *Node) proxyConfig() kubeproxy.Config {
	c := kubeproxy.Config{
		Client: n.client, Factory: n.factory, Router: n.router, Namespaces: n.cfg.ProxyNamespaces, ServiceCIDRs: n.cfg.ServiceCIDRs,
		LoadBalancer: n.cfg.LoadBalancer, WANLink: n.cfg.WANLink, Log: n.log,
	}
	for _, s := range n.cfg.Nodes {
		c.Nodes = append(c.Nodes, kubeproxy.Node{Name: s.Name, Addresses: s.Addresses, PodCIDRs: s.PodCIDRs})
	}
	return c
}

// strip drops what nobody here reads before an object is kept.
func strip(obj any) (any, error) {
	if o, ok := obj.(interface {
		SetManagedFields([]metav1.ManagedFieldsEntry)
	}); ok {
		o.SetManagedFields(nil)
	}
	return obj, nil
}

// watchPods hands Pods of this process's nodes to their workers.
func (n *Node) watchPods() cache.ResourceEventHandler {
	return cache.ResourceEventHandlerFuncs{
		AddFunc:    func(obj any) { n.sawPod(obj.(*corev1.Pod)) },
		UpdateFunc: func(_, obj any) { n.sawPod(obj.(*corev1.Pod)) },
		DeleteFunc: func(obj any) {
			if last, ok := obj.(cache.DeletedFinalStateUnknown); ok {
				obj = last.Obj
			}
			pod, ok := obj.(*corev1.Pod)
			if !ok {
				return
			}
			n.mu.Lock()
			w := n.workers[pod.UID]
			n.mu.Unlock()
			if w != nil {
				w.vanish()
			}
		},
	}
}

func (n *Node) sawPod(pod *corev1.Pod) {
	spec := n.nodes[pod.Spec.NodeName]
	if spec == nil {
		return
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	if w := n.workers[pod.UID]; w != nil {
		w.update(pod)
		return
	}
	if n.run.Err() != nil {
		return
	}
	ended := pod.Status.Phase == corev1.PodSucceeded || pod.Status.Phase == corev1.PodFailed
	if ended && pod.DeletionTimestamp == nil {
		return
	}
	w := newWorker(n, spec, pod)
	n.workers[pod.UID] = w
	n.wait.Go(func() {
		w.serve(n.run, ended)
		n.mu.Lock()
		delete(n.workers, pod.UID)
		n.mu.Unlock()
	})
}

// watchConfig has workers look at their volumes again when a ConfigMap or Secret of their namespace changes.
func (n *Node) watchConfig() cache.ResourceEventHandler {
	changed := func(obj any) {
		o, ok := obj.(interface{ GetNamespace() string })
		if !ok {
			return
		}
		n.mu.Lock()
		defer n.mu.Unlock()
		for _, w := range n.workers {
			if w.namespace == o.GetNamespace() {
				w.resync()
			}
		}
	}
	return cache.ResourceEventHandlerFuncs{AddFunc: changed, UpdateFunc: func(_, obj any) { changed(obj) }, DeleteFunc: changed}
}
