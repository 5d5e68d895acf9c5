package status

import (
	"context"
	"fmt"
	"slices"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/client-go/util/flowcontrol"

	"github.com/isthmus-mesh/isthmus/discovery/mesh"
)

const (
	// perObject is how many Events one object gets; isthmus status has the rest.
	perObject = 10
	// again is when a Problem that lasts gets a new Event: API servers drop Events after an hour.
	again = 50 * time.Minute
	// eventRate and eventBurst bound Events for each second and at once.
	eventRate, eventBurst = 2, 50
)

// eventKinds are the kinds that get Events, with where they are served. Kinds of Istio's are among istioKinds.
var eventKinds = map[string]schema.GroupVersionResource{
	"ConfigMap":     {Version: "v1", Resource: "configmaps"},
	"Endpoints":     {Version: "v1", Resource: "endpoints"},
	"EndpointSlice": {Group: "discovery.k8s.io", Version: "v1", Resource: "endpointslices"},
	"Pod":           {Version: "v1", Resource: "pods"},
	"Service":       {Version: "v1", Resource: "services"},
}

// eventName is the same for the same Problem, in every process: an Event is not written twice.
func eventName(p mesh.Problem) string {
	name := p.Object.Name
	if len(name) > 200 {
		name = name[:200]
	}
	return fmt.Sprintf("%s.%08x%08x", name, hash(p.Object.Kind, p.Reason, p.Field), hash(p.Message, p.Remedy))
}

// eventsOf are the Problems that get Events, at most perObject for each object.
func eventsOf(problems []mesh.Problem) []mesh.Problem {
	count := map[string]int{}
	var out []mesh.Problem
	for _, p := range problems {
		if _, core := eventKinds[p.Object.Kind]; !core && istioKinds[p.Object.Kind].resource == "" && multiClusterKinds[p.Object.Kind] == "" && derivedKinds[p.Object.Kind].resource == "" {
			continue
		}
		if count[p.Object.String()]++; count[p.Object.String()] <= perObject {
			out = append(out, p)
		}
	}
	return out
}

var multiClusterKinds = map[string]string{"ServiceExport": "serviceexports", "ServiceImport": "serviceimports"}

// writeEvents writes an Event for each Problem until ctx ends.
func (s *server) writeEvents(ctx context.Context) {
	limit := flowcontrol.NewTokenBucketRateLimiter(eventRate, eventBurst)
	defer limit.Stop()
	written := map[string]time.Time{}
	for {
		next := again / 10
		present := map[string]bool{}
		if d := s.wanted.Load(); d != nil {
			for _, p := range eventsOf(d.events) {
				id := p.Object.Namespace + "/" + eventName(p)
				present[id] = true
				if time.Since(written[id]) < again {
					continue
				}
				if limit.Wait(ctx) != nil {
					return
				}
				if s.writeEvent(ctx, p) {
					written[id] = time.Now()
				} else {
					next = time.Second
				}
			}
		}
		for id := range written {
			if !present[id] {
				delete(written, id)
			}
		}
		select {
		case <-s.events:
		case <-time.After(next):
		case <-ctx.Done():
			return
		}
	}
}

// resourceOf returns where the kind is served, as far as is known now.
func (s *server) resourceOf(kind string) (schema.GroupVersionResource, bool) {
	if r, ok := eventKinds[kind]; ok {
		return r, true
	}
	name := istioKinds[kind].resource
	if name == "" {
		name = multiClusterKinds[kind]
	}
	if r, ok := derivedKinds[kind]; ok {
		name = keeperName(r.group, r.resource)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	k := s.keepers[name]
	if k == nil {
		return schema.GroupVersionResource{}, false
	}
	return k.gvr, true
}

// writeEvent writes one Event and reports whether it is there or never will be.
func (s *server) writeEvent(ctx context.Context, p mesh.Problem) bool {
	gvr, ok := s.resourceOf(p.Object.Kind)
	if !ok {
		return false
	}
	object, err := s.client.Resource(gvr).Namespace(p.Object.Namespace).Get(ctx, p.Object.Name, metav1.GetOptions{})
	if apierrors.IsNotFound(err) {
		return true // it is on its way out, or comes back with another Problem
	}
	if err != nil {
		s.eventFailed(ctx, p, err)
		return apierrors.IsForbidden(err)
	}
	api := s.client.Resource(schema.GroupVersionResource{Version: "v1", Resource: "events"}).Namespace(p.Object.Namespace)
	have, err := api.Get(ctx, eventName(p), metav1.GetOptions{})
	now := metav1.NewTime(time.Now().UTC().Truncate(time.Second))
	switch {
	case apierrors.IsNotFound(err):
		var obj map[string]any
		if obj, err = runtime.DefaultUnstructuredConverter.ToUnstructured(event(p, object, now)); err == nil {
			_, err = api.Create(ctx, &unstructured.Unstructured{Object: obj}, metav1.CreateOptions{FieldManager: fieldManager})
		}
	case err == nil:
		if fresh(have, now) {
			return true
		}
		have = have.DeepCopy()
		count, _, _ := unstructured.NestedInt64(have.Object, "count")
		have.Object["count"], have.Object["lastTimestamp"] = count+1, now.Format(time.RFC3339)
		_, err = api.Update(ctx, have, metav1.UpdateOptions{FieldManager: fieldManager})
	}
	if err != nil && !apierrors.IsAlreadyExists(err) {
		s.eventFailed(ctx, p, err)
		return terminating(err) || apierrors.IsForbidden(err)
	}
	s.program.metrics.writes.WithLabelValues("events").Inc()
	return true
}

func (s *server) eventFailed(ctx context.Context, p mesh.Problem, err error) {
	if ctx.Err() == nil && !terminating(err) {
		s.program.metrics.errors.WithLabelValues("events").Inc()
		s.log.Debug("event not written", "object", p.Object.String(), "err", err)
	}
}

// fresh reports whether an Event was written not long ago.
func fresh(have *unstructured.Unstructured, now metav1.Time) bool {
	s, _, _ := unstructured.NestedString(have.Object, "lastTimestamp")
	t, err := time.Parse(time.RFC3339, s)
	return err == nil && now.Sub(t) < again
}

func event(p mesh.Problem, object *unstructured.Unstructured, now metav1.Time) *corev1.Event {
	return &corev1.Event{
		TypeMeta:   metav1.TypeMeta{APIVersion: "v1", Kind: "Event"},
		ObjectMeta: metav1.ObjectMeta{Namespace: p.Object.Namespace, Name: eventName(p)},
		InvolvedObject: corev1.ObjectReference{
			APIVersion: object.GetAPIVersion(), Kind: object.GetKind(), Namespace: p.Object.Namespace, Name: p.Object.Name,
			UID: object.GetUID(), ResourceVersion: object.GetResourceVersion(),
		},
		Type: corev1.EventTypeWarning, Reason: p.Reason, Message: text(p),
		Source: corev1.EventSource{Component: fieldManager}, ReportingController: "isthmus.io/" + fieldManager, ReportingInstance: fieldManager,
		FirstTimestamp: now, LastTimestamp: now, Count: 1,
	}
}

// deduplicated returns the Problems without those that say the same of the same object.
func deduplicated(problems []mesh.Problem) []mesh.Problem {
	seen := map[mesh.Problem]bool{}
	return slices.DeleteFunc(slices.Clone(problems), func(p mesh.Problem) bool {
		p.Object.Source = ""
		if seen[p] {
			return true
		}
		seen[p] = true
		return false
	})
}
