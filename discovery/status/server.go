package status

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"reflect"
	"sync"
	"sync/atomic"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/discovery"
	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/cache"

	"github.com/isthmus-mesh/isthmus/discovery/mesh"
	"github.com/isthmus-mesh/isthmus/internal/patient"
)

// server is one API server and what is kept in it.
type server struct {
	program *Status
	cluster Cluster
	log     *slog.Logger
	client  dynamic.Interface
	served  discovery.DiscoveryInterface
	end     context.CancelFunc
	wanted  atomic.Pointer[desired]

	namespaces cache.SharedIndexInformer
	events     chan struct{} // holds one token while events may be due

	mu      sync.Mutex
	keepers map[string]*keeper // by resource
}

func (s *Status) newServer(c Cluster) (*server, error) {
	cfg := rest.CopyConfig(c.Config)
	cfg.QPS, cfg.Burst, cfg.UserAgent = s.cfg.QPS, int(2*s.cfg.QPS), fieldManager+"/status"
	client, err := dynamic.NewForConfig(cfg)
	if err != nil {
		return nil, fmt.Errorf("client of cluster %s: %w", c.ID, err)
	}
	served, err := discovery.NewDiscoveryClientForConfig(cfg)
	if err != nil {
		return nil, fmt.Errorf("client of cluster %s: %w", c.ID, err)
	}
	srv := &server{program: s, cluster: c, log: s.log.With("cluster", string(c.ID)), client: client, served: served, keepers: map[string]*keeper{}, events: make(chan struct{}, 1)}
	gvr := schema.GroupVersionResource{Version: "v1", Resource: "namespaces"}
	where, lost := string(c.ID)+"/namespaces", false // told is called by one goroutine
	told := func(err error) {
		if err != nil {
			srv.unread(where, gvr, err)
		} else if lost {
			srv.program.forget(where)
		}
		lost = err != nil
	}
	srv.namespaces = cache.NewSharedIndexInformerWithOptions(patient.ListWatch(client.Resource(gvr), nil, told, client), &unstructured.Unstructured{}, cache.SharedIndexInformerOptions{ObjectDescription: "namespaces"})
	return srv, nil
}

// run keeps everything until ctx ends.
func (s *server) run(ctx context.Context) {
	var wg sync.WaitGroup
	defer wg.Wait()
	if err := s.namespaces.SetTransform(onlyMetadata); err != nil {
		s.log.Error("namespaces are kept whole", "err", err)
	}
	touch := func(obj any) { s.namespaceChanged(obj) }
	registered, err := s.namespaces.AddEventHandler(cache.ResourceEventHandlerFuncs{AddFunc: touch, UpdateFunc: func(_, obj any) { touch(obj) }})
	if err != nil {
		s.log.Error("not watched", "resource", "namespaces", "err", err)
		return
	}
	wg.Go(func() { s.namespaces.RunWithContext(ctx) })
	if !cache.WaitForCacheSync(ctx.Done(), registered.HasSynced) {
		return
	}
	kinds := []choice{fixed(rootCertificates()), multiCluster(serviceImports()), fixed(importedSlices())}
	if s.cluster.Local {
		kinds = append(kinds, multiCluster(serviceExports()))
		kinds = append(append(kinds, istioConditions()...), derivedStatuses()...)
		if s.program.cfg.Deploy {
			kinds = append(kinds, madeForGateways()...)
		}
		wg.Go(func() { s.writeEvents(ctx) })
	}
	for _, c := range kinds {
		wg.Go(func() { s.keep(ctx, c) })
	}
}

// onlyMetadata cuts an object down to who it is.
func onlyMetadata(obj any) (any, error) {
	u, ok := obj.(*unstructured.Unstructured)
	if !ok {
		return obj, nil
	}
	out := &unstructured.Unstructured{}
	out.SetAPIVersion(u.GetAPIVersion())
	out.SetKind(u.GetKind())
	out.SetName(u.GetName())
	out.SetNamespace(u.GetNamespace())
	out.SetUID(u.GetUID())
	out.SetResourceVersion(u.GetResourceVersion())
	out.SetDeletionTimestamp(u.GetDeletionTimestamp())
	return out, nil
}

// choice is a kind in the versions that will do, the best first.
type choice struct {
	kind
	versions []string // empty: gvr is served for certain
}

func fixed(k kind) choice { return choice{kind: k} }

func multiCluster(k kind) choice {
	return choice{kind: k, versions: []string{"v1beta1", "v1alpha1"}}
}

// absent is how often a resource that is not served is looked for again.
const absent = 5 * time.Second

// keep waits until the resource is served, and keeps it.
func (s *server) keep(ctx context.Context, c choice) {
	for len(c.versions) > 0 {
		if v, ok := s.version(c); ok {
			c.gvr.Version = v
			break
		}
		select {
		case <-time.After(absent):
		case <-ctx.Done():
			return
		}
	}
	k := newKeeper(s, c.kind)
	s.mu.Lock()
	s.keepers[keeperName(c.gvr.Group, c.gvr.Resource)] = k
	s.mu.Unlock()
	k.run(ctx)
}

// keeperName tells resources apart; Istio and the Gateway API have one of the same name.
func keeperName(group, resource string) string {
	if group == groupGatewayAPI {
		return resource + "." + group
	}
	return resource
}

// version returns the best version in which the resource is served.
func (s *server) version(c choice) (string, bool) {
	where, asked := string(s.cluster.ID)+"/"+c.gvr.Resource+"."+c.gvr.Group, true
	for _, v := range c.versions {
		list, err := s.served.ServerResourcesForGroupVersion(schema.GroupVersion{Group: c.gvr.Group, Version: v}.String())
		if err != nil {
			if !apierrors.IsNotFound(err) {
				s.unread(where, c.gvr, err)
				asked = false
			}
			continue
		}
		for _, r := range list.APIResources {
			if r.Name == c.gvr.Resource {
				s.program.forget(where)
				return v, true
			}
		}
	}
	if asked { // a server that starts forbids everything for a moment, also to ask for what is not there
		s.program.forget(where)
	}
	return "", false
}

// want takes what is desired now and looks again at whatever differs from before.
func (s *server) want(d *desired) {
	old := s.wanted.Swap(d)
	if old == d {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, k := range s.keepers {
		for _, key := range k.keys(old, d) {
			k.queue.Add(key)
		}
	}
	select {
	case s.events <- struct{}{}:
	default:
	}
}

// keys lists what has to be looked at when now takes the place of old, which may be nil.
func (k *keeper) keys(old, now *desired) []types.NamespacedName {
	switch {
	case old == nil || k.changed == nil && old.roots != now.roots:
		return k.all(k.server, now)
	case k.changed == nil:
		return nil
	}
	return k.changed(old, now)
}

// differing lists the keys whose values are not deeply equal.
func differing[T any](old, now map[types.NamespacedName]T) []types.NamespacedName {
	var out []types.NamespacedName
	for key, v := range now {
		if o, ok := old[key]; !ok || !reflect.DeepEqual(o, v) {
			out = append(out, key)
		}
	}
	for key := range old {
		if _, ok := now[key]; !ok {
			out = append(out, key)
		}
	}
	return out
}

// namespaceChanged looks again at what belongs into a namespace that came.
func (s *server) namespaceChanged(obj any) {
	u, ok := obj.(*unstructured.Unstructured)
	if !ok || u.GetDeletionTimestamp() != nil {
		return
	}
	d := s.wanted.Load()
	if d == nil {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if k := s.keepers["configmaps"]; k != nil {
		k.queue.Add(types.NamespacedName{Namespace: u.GetName(), Name: RootConfigMap})
	}
	if k := s.keepers["serviceimports"]; k != nil {
		for key := range d.imports {
			if key.Namespace == u.GetName() {
				k.queue.Add(key)
			}
		}
	}
	if k := s.keepers["endpointslices"]; k != nil {
		for key := range d.slices {
			if key.Namespace == u.GetName() {
				k.queue.Add(key)
			}
		}
	}
}

// everywhere lists the object of that name in every namespace.
func (s *server) everywhere(name string) []types.NamespacedName {
	var out []types.NamespacedName
	for _, ns := range s.namespaces.GetStore().ListKeys() {
		out = append(out, types.NamespacedName{Namespace: ns, Name: name})
	}
	return out
}

// active reports whether the namespace is there to stay.
func (s *server) active(namespace string) bool {
	obj, ok, err := s.namespaces.GetStore().GetByKey(namespace)
	u, is := obj.(*unstructured.Unstructured)
	return err == nil && ok && is && u.GetDeletionTimestamp() == nil
}

// unread says that a resource cannot be watched. A server that is merely away is the source's to tell.
func (s *server) unread(where string, gvr schema.GroupVersionResource, err error) {
	if apierrors.IsForbidden(err) || apierrors.IsUnauthorized(err) {
		s.program.report(where, forbidden(s.cluster, "read", gvr, err))
		return
	}
	if !errors.Is(err, context.Canceled) {
		s.log.Debug("watch ended", "resource", gvr.Resource, "err", err)
	}
}

func (s *server) unwritten(where string, gvr schema.GroupVersionResource, key types.NamespacedName, err error) {
	if apierrors.IsForbidden(err) {
		s.program.report(where, forbidden(s.cluster, "write", gvr, err))
		return
	}
	s.log.Warn("object not written, tried again", "resource", gvr.Resource, "object", key.String(), "err", err)
}

func forbidden(c Cluster, verb string, gvr schema.GroupVersionResource, err error) mesh.Problem {
	name := gvr.Resource
	if gvr.Group != "" {
		name += "." + gvr.Group
	}
	p := problem("Resource", name, "Forbidden", "cluster "+string(c.ID)+": may not "+verb+" it: "+err.Error(), "install the roles of this version again: isthmus install")
	if !c.Local {
		p.Remedy = "let the account of the remote secret " + verb + " " + name
	}
	return p
}
