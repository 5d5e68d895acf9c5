package status

import (
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/tools/cache"
	"k8s.io/client-go/util/workqueue"

	"github.com/isthmus-mesh/isthmus/internal/patient"
)

// fieldManager names this writer in managedFields.
const fieldManager = "isthmusd"

// kind says what is kept of one resource, and how.
type kind struct {
	gvr schema.GroupVersionResource
	// narrow limits what is watched; nil: all.
	narrow func(*metav1.ListOptions)
	// cut takes away what sync does not look at; nil: only managedFields.
	cut cache.TransformFunc
	// all lists the keys that should be there now, changed those whose desired state differs; nil: all, with the roots.
	all     func(*server, *desired) []types.NamespacedName
	changed func(old, now *desired) []types.NamespacedName
	// sync brings one object in line; have is nil when there is none, and is not to be changed. It reports whether it wrote.
	sync func(ctx context.Context, k *keeper, key types.NamespacedName, have *unstructured.Unstructured) (bool, error)
}

// keeper keeps the objects of one kind in one API server as they should be.
type keeper struct {
	kind
	server   *server
	api      dynamic.NamespaceableResourceInterface
	informer cache.SharedIndexInformer
	lost     atomic.Bool // it could not be read, and that was told
	queue    workqueue.TypedRateLimitingInterface[types.NamespacedName]
	log      *slog.Logger

	// These belong to the worker.
	settled map[types.NamespacedName]settlement
	pace    map[types.NamespacedName]pace
}

// settlement is what the server made of a write: it may drop or default fields, and then have never equals want.
type settlement struct {
	version string // resourceVersion
	want    uint32
}

// pace slows writes of an object that another writer changes back each time.
type pace struct {
	last  time.Time
	count int
}

const (
	// calm is how long an object has to stay for its writes to be forgotten.
	calm = time.Minute
	// free is how many writes within that time are not slowed.
	free = 10
)

func newKeeper(s *server, k kind) *keeper {
	if k.cut == nil {
		k.cut = withoutManagedFields
	}
	out := &keeper{
		kind: k, server: s, api: s.client.Resource(k.gvr), log: s.log.With("resource", k.gvr.Resource),
		queue:   workqueue.NewTypedRateLimitingQueue(workqueue.NewTypedItemExponentialFailureRateLimiter[types.NamespacedName](100*time.Millisecond, 30*time.Second)),
		settled: map[types.NamespacedName]settlement{}, pace: map[types.NamespacedName]pace{},
	}
	out.informer = cache.NewSharedIndexInformerWithOptions(patient.ListWatch(out.api, k.narrow, out.told, s.client), &unstructured.Unstructured{},
		cache.SharedIndexInformerOptions{ObjectDescription: k.gvr.String()})
	return out
}

// told hears of every try to read.
func (k *keeper) told(err error) {
	switch {
	case err != nil:
		k.lost.Store(true)
		k.server.unread(k.where(), k.gvr, err)
	case k.lost.Load():
		k.readable(k.where())
	}
}

// where names the keeper in the program's Problems.
func (k *keeper) where() string {
	return string(k.server.cluster.ID) + "/" + k.gvr.Resource + "." + k.gvr.Group
}

func withoutManagedFields(obj any) (any, error) {
	if u, ok := obj.(*unstructured.Unstructured); ok {
		u.SetManagedFields(nil)
	}
	return obj, nil
}

// run keeps until ctx ends.
func (k *keeper) run(ctx context.Context) {
	where := k.where()
	failed := func(_ context.Context, _ *cache.Reflector, err error) { k.server.unread(where, k.gvr, err) }
	if err := k.informer.SetWatchErrorHandlerWithContext(failed); err != nil {
		k.log.Error("watch errors are not reported", "err", err)
	}
	if err := k.informer.SetTransform(k.cut); err != nil {
		k.log.Error("objects are kept whole", "err", err)
	}
	handler := cache.ResourceEventHandlerFuncs{AddFunc: k.touch, UpdateFunc: func(_, obj any) { k.touch(obj) }, DeleteFunc: k.touch}
	registered, err := k.informer.AddEventHandler(handler)
	if err != nil {
		k.log.Error("not watched", "err", err)
		return
	}
	var wg sync.WaitGroup
	defer wg.Wait()
	wg.Go(func() { k.informer.RunWithContext(ctx) })
	defer k.queue.ShutDown()
	stop := context.AfterFunc(ctx, k.queue.ShutDown)
	defer stop()
	if !cache.WaitForCacheSync(ctx.Done(), registered.HasSynced) {
		return
	}
	k.readable(where)
	if d := k.server.wanted.Load(); d != nil {
		for _, key := range k.all(k.server, d) {
			k.queue.Add(key)
		}
	}
	for k.next(ctx) {
	}
}

// readable ends the Problem of a watch that failed.
func (k *keeper) readable(where string) {
	k.lost.Store(false)
	k.server.program.forget(where)
}

// touch looks at an object again.
func (k *keeper) touch(obj any) {
	if name, err := cache.DeletionHandlingObjectToName(obj); err == nil {
		k.queue.Add(types.NamespacedName{Namespace: name.Namespace, Name: name.Name})
	}
}

// next works on one key and reports whether there may be more.
func (k *keeper) next(ctx context.Context) bool {
	key, down := k.queue.Get()
	if down {
		return false
	}
	defer k.queue.Done(key)
	if wait := k.pace[key].wait(time.Now()); wait > 0 {
		k.queue.AddAfter(key, wait)
		return true
	}
	obj, exists, err := k.informer.GetStore().GetByKey(cache.NewObjectName(key.Namespace, key.Name).String())
	if err != nil {
		return true
	}
	var have *unstructured.Unstructured
	if exists {
		have, _ = obj.(*unstructured.Unstructured)
	}
	wrote, err := k.sync(ctx, k, key, have)
	if wrote {
		k.server.program.metrics.writes.WithLabelValues(k.gvr.Resource).Inc()
		k.pace[key] = k.pace[key].wrote(time.Now())
	} else if have == nil {
		delete(k.pace, key)
		delete(k.settled, key)
	}
	switch {
	case err == nil:
		k.queue.Forget(key)
	case ctx.Err() != nil || terminating(err):
	default:
		// What the informer has not shown yet is no failure to tell of.
		if !apierrors.IsConflict(err) && !apierrors.IsAlreadyExists(err) && !apierrors.IsNotFound(err) {
			k.server.program.metrics.errors.WithLabelValues(k.gvr.Resource).Inc()
			k.server.unwritten(k.where()+"/write", k.gvr, key, err)
		}
		k.queue.AddRateLimited(key)
		return true
	}
	if wrote && err == nil {
		k.server.program.forget(k.where() + "/write")
	}
	return true
}

// terminating reports whether the server refused because the namespace is on its way out.
func terminating(err error) bool {
	return err != nil && apierrors.HasStatusCause(err, "NamespaceTerminating")
}

func (p pace) wait(now time.Time) time.Duration {
	if p.count <= free {
		return 0
	}
	gap := min(time.Second<<min(p.count-free, 6), 30*time.Second)
	return gap - now.Sub(p.last)
}

func (p pace) wrote(now time.Time) pace {
	if now.Sub(p.last) > calm {
		p.count = 0
	}
	return pace{last: now, count: p.count + 1}
}

// done reports whether have is what the server made of this very want.
func (k *keeper) done(key types.NamespacedName, have *unstructured.Unstructured, want uint32) bool {
	s, ok := k.settled[key]
	return ok && have != nil && s.version == have.GetResourceVersion() && s.want == want
}

// settle remembers what the server made of want.
func (k *keeper) settle(key types.NamespacedName, got *unstructured.Unstructured, want uint32) {
	k.settled[key] = settlement{version: got.GetResourceVersion(), want: want}
}

// digest of a value that has a JSON form.
func digest(v any) uint32 {
	data, err := json.Marshal(v)
	if err != nil {
		return hash(fmt.Sprint(v))
	}
	return hash(string(data))
}

func (k *keeper) namespaced(key types.NamespacedName) dynamic.ResourceInterface {
	return k.api.Namespace(key.Namespace)
}

// patchStatus merges the patch into the object's status.
func (k *keeper) patchStatus(ctx context.Context, key types.NamespacedName, patch map[string]any) (*unstructured.Unstructured, error) {
	data, err := json.Marshal(patch)
	if err != nil {
		return nil, err
	}
	return k.namespaced(key).Patch(ctx, key.Name, types.MergePatchType, data, metav1.PatchOptions{FieldManager: fieldManager}, "status")
}

// remove deletes exactly the object that was seen.
func (k *keeper) remove(ctx context.Context, key types.NamespacedName, have *unstructured.Unstructured) (bool, error) {
	if have.GetDeletionTimestamp() != nil {
		return false, nil
	}
	uid, version := have.GetUID(), have.GetResourceVersion()
	err := k.namespaced(key).Delete(ctx, key.Name, metav1.DeleteOptions{Preconditions: &metav1.Preconditions{UID: &uid, ResourceVersion: &version}})
	if apierrors.IsNotFound(err) {
		return false, nil
	}
	return err == nil, err
}
